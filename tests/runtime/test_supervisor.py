"""What the daemon decides, and that it does it: with real processes that stand in for broker and workers."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prunus
from prunus.errors import DaemonError
from prunus.runtime import daemon
from prunus.runtime.profile import Config, Profile
from prunus.runtime.roster import (
    BROKER,
    FLAPPING,
    HEALTHY_S,
    KILL_MARGIN_S,
    MAX_PAUSE_S,
    MIN_PAUSE_S,
    Decision,
    Roster,
    service_names,
)
from prunus.runtime.supervisor import Supervisor
from prunus.runtime.wish import Wish, read_wish, wanted_services, write_wish
from tests.runtime.stage import Stage, is_alive, until

W1, W2 = "worker-1", "worker-2"

# --- deciding ---------------------------------------------------------------------------------------


def roster(*wanted: str, grace_s: float = 10.0, running: tuple[str, ...] = ()) -> Roster:
    made = Roster(grace_s)
    made.want(wanted)
    for pid, name in enumerate(running, 1):
        made.started(name, pid, 0.0)
    return made


def test_what_is_wanted_is_started_the_broker_first() -> None:
    """Nothing runs: everything is started, in order, once."""
    it = roster(*service_names(2))
    assert it.decide(0.0) == Decision(start=(BROKER, W1, W2))
    for name in (BROKER, W1, W2):
        it.started(name, 1, 0.0)
    assert it.decide(0.0) == Decision()


def test_the_pause_doubles_and_has_a_bound() -> None:
    """50 ms, 100 ms ... 30 s; what comes of it is said after some ends that came too soon."""
    it, now, pauses, flapping = roster(BROKER), 0.0, [], []
    for _ in range(15):
        it.started(BROKER, 1, now)
        end = it.ended(BROKER, now + 0.01)
        assert end.pause_s is not None
        pauses.append(end.pause_s)
        flapping.append(end.flapping)
        decision = it.decide(now + 0.01)
        assert decision == Decision(wake_at=now + 0.01 + end.pause_s)
        now = decision.wake_at or 0.0
        assert it.decide(now).start == (BROKER,)
    assert pauses[:4] == [MIN_PAUSE_S, 2 * MIN_PAUSE_S, 4 * MIN_PAUSE_S, 8 * MIN_PAUSE_S]
    assert pauses[-1] == MAX_PAUSE_S
    assert flapping.index(True) == FLAPPING - 1


def test_a_healthy_while_is_a_new_beginning() -> None:
    """After it the first pause is the shortest again."""
    it = roster(BROKER)
    for _ in range(6):
        it.started(BROKER, 1, 0.0)
        it.ended(BROKER, 0.0)
    it.started(BROKER, 1, 0.0)
    assert it.ended(BROKER, HEALTHY_S).pause_s == MIN_PAUSE_S


def test_a_service_that_cannot_be_started_is_tried_again_later() -> None:
    """A failure to start counts as an end that came too soon."""
    it = roster(BROKER)
    assert it.failed(BROKER, 1.0).pause_s == MIN_PAUSE_S
    assert it.failed(BROKER, 2.0).pause_s == 2 * MIN_PAUSE_S


def test_scaling_down_ends_the_highest_numbers() -> None:
    """The others are not touched; an end that was asked for is followed by no start."""
    it = roster(*service_names(1), running=(BROKER, W1, W2))
    assert it.decide(5.0) == Decision(terminate=(W2,), wake_at=5.0 + 10.0 + KILL_MARGIN_S)
    assert it.decide(6.0).terminate == ()
    end = it.ended(W2, 7.0)
    assert (end.asked, end.pause_s) == (True, None)
    assert it.decide(7.0) == Decision()


def test_scaling_up_while_one_still_ends_starts_it_anew() -> None:
    """A worker that drains is not stopped from it; it is started again as soon as it has ended, without a pause."""
    it = roster(BROKER, running=(BROKER, W1))
    it.decide(0.0)
    it.want(service_names(1))
    assert it.decide(1.0).start == ()
    assert it.ended(W1, 2.0).pause_s == 0.0
    assert it.decide(2.0).start == (W1,)


def test_the_broker_is_the_last_to_be_asked() -> None:
    """Workers give back what they hold to a broker that is there; when they have gone it ends, then all is done."""
    it = roster(running=(BROKER, W1, W2))
    assert it.decide(0.0).terminate == (W1, W2)
    it.ended(W1, 1.0)
    assert it.decide(1.0).terminate == ()
    it.ended(W2, 2.0)
    assert it.decide(2.0).terminate == (BROKER,)
    it.ended(BROKER, 3.0)
    assert it.decide(3.0) == Decision(done=True)


def test_who_does_not_end_in_time_is_killed_once() -> None:
    """The time is the grace that the profile gives to steps, and a margin."""
    it = roster(running=(W1,), grace_s=2.0)
    wake_at = it.decide(0.0).wake_at
    assert wake_at == 2.0 + KILL_MARGIN_S
    assert it.decide(wake_at - 0.1).kill == ()
    assert it.decide(wake_at).kill == (W1,)
    assert it.decide(wake_at + 1).kill == ()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 4), st.sampled_from(["end", "tick", "stop"])), max_size=40), st.randoms())
def test_whatever_happens_it_comes_to_what_is_wanted(events: list[Any], random: Any) -> None:
    """From any past of starts, ends and wishes, obedient services reach what is wanted; never two of one name run,
    and the broker is never asked while a worker is there."""
    it, now, running = Roster(10.0), 0.0, set[str]()

    def look() -> Decision:
        decision = it.decide(now)
        assert not running & set(decision.start)
        assert BROKER not in decision.terminate or running == {BROKER}
        for name in decision.start:
            it.started(name, 1, now)
            running.add(name)
        return decision

    def end(name: str) -> None:
        it.ended(name, now)
        running.discard(name)

    it.want(service_names(1))
    for event in events:
        now += random.choice([0.0, 0.01, 1.0, 40.0])
        if isinstance(event, int):
            it.want(service_names(event))
        elif event == "end" and running:
            end(random.choice(sorted(running)))
        elif event == "stop":
            it.want(())
        look()
    for _ in range(20):
        for name in [name for name in sorted(running) if it.services[name].asked_at is not None]:
            end(name)
        decision = look()
        now = max(now, decision.wake_at or now)
    assert running == set(it.wanted)


def test_the_wish_outlives_the_supervisor(profile: Profile) -> None:
    """What was asked for last is what the next supervisor does; without a wish, what the configuration says."""
    assert read_wish(profile) is None
    assert wanted_services(profile) == service_names(2)
    write_wish(profile, Wish(7))
    assert read_wish(profile) == Wish(7)
    assert wanted_services(profile) == service_names(7)
    (profile.run_folder / "daemon.json").write_text("{")
    with pytest.raises(DaemonError, match="scale N"):
        read_wish(profile)


# --- acting -----------------------------------------------------------------------------------------


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return Profile.create(tmp_path / "profile", Config(grace_s=0.2))


@pytest.fixture
def stage(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("PYTHONPATH", str(Path(prunus.__file__).parents[1]))  # services run in another folder
    return Stage(profile, tmp_path)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For services that do not end when they are asked to. (The others get all the time that a busy machine takes.)"""
    monkeypatch.setattr("prunus.runtime.roster.KILL_MARGIN_S", 1.0)


async def test_a_killed_service_comes_back(stage: Stage) -> None:
    """SIGKILL of a worker or the broker: another process takes its place at once; the others go on."""
    async with stage.supervised(BROKER, W1):
        before = await stage.running(BROKER, W1)
        for name in (W1, BROKER):
            os.kill(before[name], signal.SIGKILL)
            await until(lambda name=name: stage.runs(name) not in (None, before[name]))
        assert stage.profile.log(W1).read_text() == "a line in the log\n" * 2
    assert not any(stage.runs(name) for name in (BROKER, W1))


async def test_a_broken_service_is_tried_with_pauses(
    stage: Stage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not spin; the log names the consequence and where to look; mended, it runs."""
    monkeypatch.setattr("prunus.runtime.roster.HEALTHY_S", 3600.0)  # a busy machine takes its time to end it, too
    stage.modes = {W1: "broken"}
    caplog.set_level("INFO")
    async with stage.supervised(BROKER, W1):
        await until(lambda: "too soon once more" in caplog.text)
        stage.modes = {}
        await stage.running(BROKER, W1)
    assert [float(record.getMessage().split(" in ")[1].split()[0]) for record in caplog.records
            if "starting it again" in record.getMessage()] == [0.05, 0.10, 0.20, 0.40]  # fmt: skip
    assert f"see {stage.profile.log(W1)}" in caplog.text
    assert "this one is broken" in stage.profile.log(W1).read_text()


async def test_notes_that_cannot_be_written_stop_nothing_else(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is in their way, a service that was killed comes back."""
    (stage.profile.run_folder / f"services.json.{os.getpid()}").mkdir()
    async with stage.supervised(W1):
        before = await stage.running(W1)
        os.kill(before[W1], signal.SIGKILL)
        await until(lambda: stage.runs(W1) not in (None, before[W1]))
    assert "services.json can't be written" in caplog.text


async def test_a_deleted_profile_ends_the_daemon(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """When a service has ended for it, the others are asked to, and nothing is started again, also if it comes back."""
    supervisor = Supervisor(stage.profile, stage.command_for, stage.who_serves)
    supervisor.want([BROKER, W1])
    task = asyncio.create_task(supervisor.run())
    running = await stage.running(BROKER, W1)
    away = stage.profile.path.with_name("away")
    stage.profile.path.rename(away)
    os.kill(running[W1], signal.SIGKILL)
    await task
    assert not is_alive(running[BROKER])
    assert "the profile was deleted" in caplog.text
    away.rename(stage.profile.path)
    assert (stage.runs(BROKER), stage.runs(W1)) == (None, None)


async def test_a_program_that_does_not_exist_is_tried_again(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """An error of the start itself ends nothing."""
    supervisor = Supervisor(stage.profile, lambda name: ["/no/such/program"])
    supervisor.want([BROKER])
    task = asyncio.create_task(supervisor.run())
    await until(lambda: caplog.text.count("can't be started") >= 2)
    supervisor.want(())
    await task


async def test_workers_end_before_the_broker(stage: Stage) -> None:
    """The stop asks the workers; the broker is asked when the last of them has ended."""
    async with stage.supervised(*service_names(2)):
        await stage.running(*service_names(2))
    story = [line for line in stage.lines if "runs" not in line]
    assert sorted(story[:4]) == [f"{W1} asked", f"{W1} ended", f"{W2} asked", f"{W2} ended"]
    assert story[4:] == [f"{BROKER} asked", f"{BROKER} ended"]


@pytest.mark.usefixtures("impatient")
async def test_a_deaf_worker_is_killed_after_its_grace(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """It was asked, did not end, and is gone all the same; the log says what that means."""
    stage.modes = {W1: "deaf"}
    async with stage.supervised(BROKER, W1):
        pid = (await stage.running(BROKER, W1))[W1]
    assert not is_alive(pid)
    assert f"{W1} asked" in stage.lines
    assert f"{W1} ended" not in stage.lines
    assert "unfinished steps run again" in caplog.text


async def test_what_a_killed_worker_started_ends_with_it(stage: Stage) -> None:
    """The step will run again: the programs of its first run must not go on beside it."""
    stage.modes = {W1: "leaves-a-child"}
    async with stage.supervised(W1):
        pid = (await stage.running(W1))[W1]
        child = int(next(line for line in stage.lines if "child" in line).split()[-1])
        assert is_alive(child)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not is_alive(child))


async def test_scaling_up_and_down(stage: Stage) -> None:
    """One more is started, one too many is asked to end; the first one never notices."""
    async with stage.supervised(BROKER, W1) as supervisor:
        first = await stage.running(BROKER, W1)
        supervisor.want(service_names(2))
        await stage.running(W2)
        supervisor.want(service_names(1))
        await until(lambda: f"{W2} ended" in stage.lines and stage.runs(W2) is None)
        assert await stage.running(BROKER, W1) == first


@pytest.mark.parametrize("pidfd", [True, False])
async def test_a_new_supervisor_adopts_what_runs(stage: Stage, monkeypatch: pytest.MonkeyPatch, pidfd: bool) -> None:
    """After `kill -9` of the supervisor the services go on; the next one keeps them, starts again those that end, and
    stops them in order. It works too where the system has no pidfd."""
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    write_wish(stage.profile, Wish(2))
    with stage.daemon_process() as first:
        before = await stage.running("daemon", *service_names(2))
        first.kill()
        first.wait()
        assert await stage.running(*service_names(2)) == {n: p for n, p in before.items() if n != "daemon"}
        async with stage.supervised(*service_names(1)):
            await until(lambda: stage.runs(W2) is None)  # it was not wanted any more
            assert (await stage.running(BROKER, W1)) == {BROKER: before[BROKER], W1: before[W1]}
            os.kill(before[W1], signal.SIGKILL)
            await until(lambda: stage.runs(W1) not in (None, before[W1]))
    assert [line for line in stage.lines if BROKER in line] == [
        f"{BROKER} runs {before[BROKER]}",
        f"{BROKER} asked",
        f"{BROKER} ended",
    ]


async def test_a_service_that_somebody_started_by_hand_is_adopted(stage: Stage) -> None:
    """What holds the lock is the service: no second one is started to be refused."""
    async with stage.supervised(BROKER) as supervisor:
        await stage.running(BROKER)
        by_hand = subprocess.Popen(stage.command_for(W1), stdout=subprocess.DEVNULL)  # noqa: ASYNC220 (a short call)
        try:
            await stage.running(W1)
            supervisor.want(service_names(2))
            assert (await stage.running(W1, W2))[W1] == by_hand.pid
            supervisor.want([BROKER])
            await until(lambda: by_hand.poll() is not None)
        finally:
            by_hand.kill()
            by_hand.wait()
    assert not stage.profile.log(W1).exists()


@pytest.mark.usefixtures("impatient")
async def test_a_deaf_worker_that_was_adopted_is_killed(stage: Stage) -> None:
    """A process that is not our child is killed as well as one that is."""
    stage.modes = {W1: "deaf"}
    write_wish(stage.profile, Wish(1))
    with stage.daemon_process() as first:
        pid = (await stage.running(BROKER, W1))[W1]
        first.kill()
        first.wait()
        assert await daemon.stop(stage.profile)
        assert not is_alive(pid)
        assert read_wish(stage.profile) is None


async def test_a_second_daemon_is_refused(stage: Stage) -> None:
    """With one sentence that names the first, and without touching it."""
    with stage.daemon_process() as first:
        await stage.running("daemon", *service_names(2))
        second = await asyncio.to_thread(subprocess.run, stage.daemon_command, capture_output=True, check=False)
        assert second.returncode == 1
        error = second.stderr.decode()
        assert (
            error
            == f"Error: the daemon of this profile runs already (pid {first.pid}); `prunus daemon stop` stops it\n"
        )
        with pytest.raises(DaemonError, match=f"pid {first.pid}"):
            await daemon.start(stage.profile, 5)
        assert read_wish(stage.profile) is None
        assert await daemon.stop(stage.profile)


# --- from outside -----------------------------------------------------------------------------------


async def all_are_there(profile: Profile) -> dict[str, Any]:
    return {"sessions": {name: {} for name in ("ours", *daemon.status(profile).services) if name != BROKER}}


async def test_a_daemon_from_start_to_stop(stage: Stage) -> None:
    """start waits until all is there, scale is obeyed, stop waits until nothing is left."""
    now = await daemon.start(stage.profile, 1, command=stage.daemon_command, ask=all_are_there)
    assert now.is_healthy
    assert list(now.services) == [BROKER, W1]
    daemon.scale(stage.profile, 2)
    await stage.running(W2)
    assert daemon.status(stage.profile).wanted == service_names(2)
    assert await daemon.stop(stage.profile)
    after = daemon.status(stage.profile)
    assert (after.daemon, after.services, after.wanted) == (None, {}, ())
    assert not await daemon.stop(stage.profile)
    assert read_wish(stage.profile) is None
    with pytest.raises(DaemonError, match="daemon start -w N"):
        daemon.scale(stage.profile, 3)


async def test_a_start_after_a_crash_keeps_the_number_of_workers(stage: Stage) -> None:
    """The wish is forgotten by a stop, not by a crash."""
    await daemon.start(stage.profile, 1, command=stage.daemon_command, ask=all_are_there)
    pid = (await stage.running("daemon"))["daemon"]
    services = await stage.running(BROKER, W1)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: stage.runs("daemon") is None)
    assert not daemon.status(stage.profile).is_healthy
    now = await daemon.start(stage.profile, command=stage.daemon_command, ask=all_are_there)
    assert {name: holder.pid for name, holder in now.services.items()} == services
    await daemon.stop(stage.profile)


async def test_a_start_that_fails_shows_the_log(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which service does not run, and what it said last."""
    monkeypatch.setattr("prunus.runtime.daemon.START_TIMEOUT_S", 2.0)
    stage.modes = {W1: "broken"}
    try:
        with pytest.raises(DaemonError, match=r"(?s)worker-1 does not run.*this one is broken"):
            await daemon.start(stage.profile, 1, command=stage.daemon_command, ask=all_are_there)
    finally:
        await daemon.stop(stage.profile)
    with pytest.raises(DaemonError, match=r"(?s)ended at once \(exit code 3\).*no daemon today"):
        await daemon.start(
            stage.profile,
            command=[sys.executable, "-c", "import sys; sys.stderr.write('no daemon today'); sys.exit(3)"],
        )


async def test_signals_during_the_stop_change_nothing(stage: Stage) -> None:
    """A second SIGTERM or a late SIGHUP neither hurries the stop nor starts anything again."""
    stage.modes = {W1: "deaf"}
    with stage.daemon_process() as process:
        await stage.running("daemon", *service_names(2))
        process.terminate()
        await until(lambda: f"{W1} asked" in stage.lines)
        process.send_signal(signal.SIGHUP)
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0
    assert sum("runs" in line for line in stage.lines) == 3


async def test_a_long_log_is_put_aside(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of a service has a bound: at a start the old one is moved to `.1`."""
    monkeypatch.setattr("prunus.runtime.logs.MAX_LOG_BYTES", 10)
    log = stage.profile.log(W1)
    log.write_text("old " * 10)
    async with stage.supervised(W1):
        await stage.running(W1)
        await until(lambda: log.read_text() == "a line in the log\n")
    assert log.with_name("worker-1.log.1").read_text().startswith("old")
