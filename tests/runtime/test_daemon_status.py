"""The status of a daemon: one screen that says what is wrong, and what to do about it."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from rich.console import Console

import prunus
from prunus.messaging.inventory import QueueStatistics, SessionStatistics
from prunus.runtime import health
from prunus.runtime.backend import BrokerStatus
from prunus.runtime.health import Health, InHand, Load, Said, Service, picture, problems_of
from prunus.runtime.locks import ServiceLock
from prunus.runtime.logs import put_aside
from prunus.runtime.profile import Config, Profile
from prunus.runtime.roster import BROKER
from prunus.runtime.services import End, Evidence, change_note
from prunus.runtime.wish import Wish, write_wish
from tests.runtime.shell import Shell, daemon_in
from tests.runtime.stage import Stage
from tests.runtime.terminal import terminal

NOW = 1_700_000_000.0
W1, W2 = "worker-1", "worker-2"


def a_session(pid: int, held: int = 0, credit: int = 4, silent_s: float = 0.1) -> SessionStatistics:
    return SessionStatistics(
        connected=True, host="h", pid=pid, role="owner", key=None, silent_s=silent_s, round_trip_s=None, held=held,
        credit=credit, subscriptions=1, questions=0,
    )  # fmt: skip


def a_broker(**changes: object) -> BrokerStatus:
    whole = BrokerStatus(
        broker_epoch=1, uptime_s=60.0, queues={}, resources={}, sessions={"w": a_session(11, 2)}, questions=0,
        identifiers=0, broadcast_subscriptions=0, answers_kept=0, accepted=0, settled=0, delivered=0,
        processes={"running": 2, "waiting": 1000},
    )  # fmt: skip
    return msgspec.structs.replace(whole, **changes)


def a_service(name: str, pid: int = 11, **changes: object) -> Service:
    service = Service(name=name, state="running", pid=pid, since=NOW - 3600, cpu_percent=12.0, memory_bytes=40_000_000)
    if name.startswith("worker"):
        service = msgspec.structs.replace(service, slots=16, used=2, silent_s=0.1, queues=("default",))
    return msgspec.structs.replace(service, **changes)


def a_daemon(*services: Service, **changes: object) -> Health:
    services = services or (a_service(BROKER, 10), a_service(W1))
    whole = Health(
        profile="/p", name="/p", version="1", daemon=9, since=NOW - 3600, daemon_version="1",
        services={each.name: each for each in services}, missing={}, supervisor=a_service("daemon", 9),
        broker=a_broker(), disk_free_bytes=10**11, database_bytes=10**6,
    )  # fmt: skip
    return msgspec.structs.replace(whole, **changes)


def screen(found: Health, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(picture(msgspec.structs.replace(found, problems=tuple(problems_of(found, NOW))), NOW))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_daemon_that_is_well_has_no_problems() -> None:
    """Its screen says since when, how much, and who works on what."""
    in_hand = InHand(pid="0199-abcd", class_id="m:Fit", step="scan", since=NOW - 5)
    found = a_daemon(a_service(BROKER, 10), a_service(W1, in_hand=(in_hand,), programs=3))
    assert problems_of(found, NOW) == []
    text = screen(found)
    assert "up for 1 h 0 min" in text
    assert "2 running, 1,000 waiting" in text
    assert "Fit 0199-abcd (scan), 1 more, 2 programs" in text
    assert "12 %" in text
    assert "2/16" in text
    assert "!" not in text


def test_no_daemon_at_all() -> None:
    """What to do depends on whether something runs without one."""
    nothing = a_daemon(daemon=None, since=None, services={}, supervisor=None, broker=None)
    assert problems_of(nothing, NOW) == ["No daemon runs; `prunus daemon start` starts it."]
    orphans = a_daemon(daemon=None, since=None, supervisor=None)
    assert problems_of(orphans, NOW) == ["No daemon runs; `prunus daemon start` takes over what runs."]
    assert "not running" in screen(nothing)


def test_workers_of_a_user_need_no_daemon() -> None:
    """What `prunus worker` does is shown beside the daemon's workers; with a broker it is all that has to run."""
    in_hand = InHand(pid="0199-abcd", class_id="m:Fit", step="scan", since=NOW - 5)
    mine = Service(name="foreground-1", state="on its own", pid=77, slots=16, used=1, in_hand=(in_hand,))
    found = a_daemon(
        a_service(BROKER, 10), daemon=None, since=None, supervisor=None, others={mine.name: mine}, other_workers=1
    )
    assert problems_of(found, NOW) == []
    assert re.search(r"foreground-1 +1/16 +Fit 0199-abcd \(scan\)", screen(found))
    orphans = a_daemon(daemon=None, since=None, supervisor=None, others={mine.name: mine})
    assert problems_of(orphans, NOW) == ["No daemon runs; `prunus daemon start` takes over what runs."]


def test_a_worker_that_does_not_stay() -> None:
    """How it ended, how often, what it said last, when it is tried again."""
    end = End(at=NOW - 3, pid=5, how="with exit code 1", code=1, ran_s=0.5, asked=False)
    gone = Service(
        name=W2, state="flapping", restarts=7, last_end=end, reason=("a", "ImportError: no numpy"), start_at=NOW + 25
    )
    found = a_daemon(missing={W2: gone})
    [problem] = problems_of(found, NOW)
    for part in (
        "worker-2 does not run: it ended with exit code 1 3.0 s ago, after 0.5 s (7 times so far).",
        "It said last: 'ImportError: no numpy'.",
        "It is tried again in 25 s.",
        "`prunus daemon logs worker-2`",
    ):
        assert part in problem
    text = screen(found)
    assert "flapping" in text
    assert "next try in 25 s" in text


@pytest.mark.parametrize(
    ("changes", "worker", "expected"),
    [
        ({"broker": None, "broker_error": "no answer"}, {}, "The broker does not answer (no answer)"),
        ({"broker": a_broker(disk_full=True)}, {}, "The disk is full"),
        ({"disk_free_bytes": 5_000_000}, {}, "Only 5.0 MB are free"),
        ({"daemon_version": "0"}, {}, "The daemon runs Prunus 0, and this is 1"),
        ({}, {"used": None}, "worker-1 runs, but is not connected to the broker"),
        ({}, {"silent_s": 30.0}, "worker-1 (pid 11) was not heard for 30 s"),
        ({}, {"recent_restarts": 4, "last_fault": "by SIGKILL"}, "4 times in the last 10 minutes, last by SIGKILL"),
        (
            {"broker": a_broker(queues={"gpu": QueueStatistics(ready=3)}), "process_queues": ("gpu",)},
            {},
            "3 tasks of the queue gpu wait for a worker that takes it: add it to `queues` in config.yaml and `prunus "
            "daemon reload`, or start one with `prunus worker -q gpu`.",
        ),
        (
            {"broker": a_broker(queues={"two words": QueueStatistics(ready=1)})},
            {},
            "1 task of the queue two words waits for a program that takes them: start it; `prunus tasks --queue "
            "'two words'` lists them.",
        ),
    ],
)
def test_each_trouble_is_named(changes: dict[str, object], worker: dict[str, object], expected: str) -> None:
    """In a sentence; one trouble, one sentence."""
    found = a_daemon(a_service(BROKER, 10), a_service(W1, **worker), **changes)
    [problem] = problems_of(found, NOW)
    assert expected in problem


def test_what_is_no_trouble() -> None:
    """A worker that has just started; one that was replaced since it ended; one that is on its way out, or between."""
    young = a_service(W1, used=None, since=NOW - 1, state="starting")
    mended = a_service(W2, recent_restarts=9, is_mended=True)
    leaving = a_service("worker-3", used=None, state="ending")
    between = Service(name="worker-4", state="starting")
    assert problems_of(a_daemon(young, mended, leaving, missing={"worker-4": between}), NOW) == []


def test_the_log_tells_what_was_said_last() -> None:
    """With its age, and what a terminal would obey in letters."""
    text = screen(a_daemon(said=(Said(NOW - 60, W1, "ERROR", "bad \x1b[2J news"),)))
    assert "1 min 0 s ago  worker-1: bad \\x1b[2J news" in text


def test_a_screen_of_a_hundred_columns_holds_it() -> None:
    """The column of the work gives way."""
    in_hand = tuple(InHand(pid=f"p{n}", class_id="m:EquationOfState", step="scan", since=NOW) for n in range(3))
    text = screen(a_daemon(a_service(W1, in_hand=in_hand, used=3)), width=100)
    assert max(map(len, text.splitlines())) <= 100
    assert "worker-1" in text


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell in a folder whose daemon runs, with one worker."""
    with daemon_in(tmp_path_factory.mktemp("status")) as shell:
        yield shell


def test_the_status_of_a_real_daemon(live: Shell) -> None:
    """What a worker does is there by name, for people and for programs; nothing is wrong."""
    begun = live.folder / "begun"
    pid = live.launch("Nest", f"begun={begun}")
    while not begun.exists():
        pass
    facts = json.loads(live("daemon", "status", "--json").stdout)
    worker = facts["services"][W1]
    assert (worker["state"], worker["queues"], worker["restarts"]) == ("running", ["default"], 0)
    assert worker["used"] >= 1
    assert (facts["problems"], facts["missing"]) == ([], {})
    assert facts["broker"]["sessions"]
    assert worker["cpu_percent"] is not None
    text = live("daemon", "status").stdout
    [child] = live.record(pid)["children"]
    assert child[-8:] in text
    assert re.search(rf"worker-1 +{worker['pid']} +running", text)
    live("kill", pid, "--force")


@pytest.mark.timeout(120)
def test_a_reload_from_the_command_line(live: Shell) -> None:
    """It says when it is done; with --no-wait it does not wait."""
    before = json.loads(live("daemon", "status", "--json").stdout)["services"]
    assert live.process("daemon", "reload").stdout == "The daemon has new workers: 1 worker.\n"
    said = live.process("daemon", "reload", "--broker").stdout
    assert said == "The daemon has a new broker and new workers: 1 worker.\n"
    after = json.loads(live("daemon", "status", "--json").stdout)["services"]
    assert not {each["pid"] for each in before.values()} & {each["pid"] for each in after.values()}
    assert "`prunus daemon status` shows" in live("daemon", "reload", "--no-wait").stdout
    while True:  # nothing is wrong meanwhile
        services = json.loads(live("daemon", "status", "--json").stdout)["services"]
        if services.get(W1, after[W1])["pid"] != after[W1]["pid"]:
            break


def test_a_live_view_on_a_terminal(live: Shell) -> None:
    """Until Ctrl-C; elsewhere it is refused, and with --json too."""
    with terminal(live, "daemon", "status", "--watch") as window:
        window.until("worker-1 +[0-9]+ +running")
        window.interrupt()
        window.end(130)
    assert "terminal" in live.error("daemon", "status", "-w", code=2)
    assert "--json" in live.error("daemon", "status", "-w", "--json", code=2)


def test_logs_are_followed_over_a_rotation(live: Shell) -> None:
    """What is written to the old file and to the new one comes, and what comes to logs that are new."""
    logs_ = live.folder / ".prunus" / "logs"
    log = logs_ / "worker-9.log"
    log.write_text("before\n")
    with live.begin("daemon", "logs", "-f", "-n", "1", "worker-9") as one, live.begin("daemon", "logs", "-f") as all_:
        for process in (one, all_):
            assert process.stdout is not None
            while process.stdout.readline() != "before\n":
                pass
        with log.open("a") as writer:
            put_aside(log)
            print("old", file=writer)
        log.write_text("new\n")
        assert one.stdout is not None
        assert [one.stdout.readline(), one.stdout.readline()] == ["old\n", "new\n"]
        (logs_ / "worker-8.log").write_text("another\n")
        heard = set[str]()
        while not {"worker-9 | old\n", "worker-9 | new\n", "worker-8 | another\n"} <= heard:
            assert all_.stdout is not None
            heard.add(all_.stdout.readline())


# --- looking ----------------------------------------------------------------------------------------


def test_the_programs_of_a_step_count(tmp_path: Path) -> None:
    """Also those that made themselves independent of their group."""
    program = "import subprocess, sys; subprocess.run(['sleep', '60'], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", program], start_new_session=True) as process:
        try:
            while not psutil.Process(process.pid).children():
                pass
            load = Load()
            first = load.look([process.pid])[process.pid]
            second = load.look([process.pid])[process.pid]
            assert (first[0], first[2]) == (None, 2)
            assert second[0] is not None
            assert second[1] > psutil.Process(process.pid).memory_info().rss
        finally:
            for child in psutil.Process(process.pid).children():
                child.kill()
            process.kill()


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("PYTHONPATH", str(Path(prunus.__file__).parents[1]))
    monkeypatch.setattr(health, "ASK_TIMEOUT_S", 0.2)  # what stands in for the broker never answers
    return Stage(Profile.create(tmp_path / "profile", Config(grace_s=0.2)), tmp_path)


async def test_what_runs_is_looked_at(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who runs, for how long, of which generation; who should, and what became of it."""
    write_wish(stage.profile, Wish(2, 1))
    with ServiceLock(stage.profile.lock("daemon")):
        async with stage.supervised(BROKER, W1):
            pids = await stage.running(BROKER, W1)
            evidence = Evidence(at=time.time(), pid=5, how="by SIGKILL", log="one\n\ntwo")
            change_note(stage.profile, W2, evidence=evidence, flapping=True, restarts=6, ends=(time.time(), 5.0))
            found = await health.look(stage.profile, Load())
            monkeypatch.setattr(health, "HEALTHY_S", 0.0)
            later = await health.look(stage.profile, Load())
    assert later.services[W1].state == "running", "nobody says that it is not"
    assert found.daemon == os.getpid()
    assert {name: service.pid for name, service in found.services.items()} == pids
    assert found.broker is None
    assert found.broker_error
    assert (found.services[W1].state, found.services[W1].is_old) == ("starting", True)
    assert found.reloading == 1
    missing = found.missing[W2]
    assert (missing.state, missing.restarts, missing.recent_restarts) == ("flapping", 6, 1)
    assert missing.reason == ("one", "two")
    assert not found.is_well
    assert msgspec.json.encode(found)


async def test_the_logs_are_read_for_what_was_wrong(stage: Stage) -> None:
    """Warnings and errors of the life of this daemon, the newest last."""
    with ServiceLock(stage.profile.lock("daemon")):
        async with stage.supervised(BROKER):
            await stage.running(BROKER)
            clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + 1))
            old = "2001-01-01 00:00:00,000 ERROR   a: of another life\n"
            lines = [f"{clock},{n:03} {level:7} a: {level.lower()} {n}\n"
                     for n, level in enumerate(["INFO", "WARNING", "ERROR", "WARNING"])]  # fmt: skip
            stage.profile.log(BROKER).write_text(old + "".join(lines))
            found = await health.look(stage.profile, Load())
    assert [said.text for said in found.said] == ["warning 1", "error 2", "warning 3"]


def test_a_service_that_was_replaced_on_request_is_mended(tmp_path: Path) -> None:
    """What happened to the one before it is no problem any more."""
    profile = Profile.create(tmp_path / "profile", Config(workers=1))
    write_wish(profile, Wish(1))
    ends = tuple(time.time() - n for n in range(5, 0, -1))
    end = End(at=time.time(), pid=5, how="with exit code 0", code=0, ran_s=1.0, asked=True)
    evidence = Evidence(at=time.time() - 1, pid=4, how="by SIGKILL", log="")
    change_note(profile, W1, last_end=end, evidence=evidence, ends=ends, restarts=5)
    with ServiceLock(profile.lock("daemon")), ServiceLock(profile.lock(W1)):
        found = asyncio.run(health.look(profile, Load()))
    service = found.services[W1]
    assert (service.recent_restarts, service.last_fault, service.is_mended) == (5, "by SIGKILL", True)
