"""A real daemon is stopped, started and reloaded under work: each step runs once, and nothing fails."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import prunus
from prunus.errors import DaemonError
from prunus.persistence.persister import Query
from prunus.runtime import daemon
from prunus.runtime.broker import Broker
from prunus.runtime.controller import ProcessHandle, connect
from prunus.runtime.daemon import StopProgress
from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Config, Profile
from prunus.runtime.roster import BROKER
from prunus.runtime.wish import Wish, write_wish
from tests.faults.parts import PROJECT, Ended, command_line
from tests.runtime import workflows
from tests.runtime.stage import Stage, until
from tests.runtime.waiting import file_has

PROCESSES = 100
STEPS = 8


class Prunus:
    """`prunus` with a profile."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    async def __call__(self, *words: str) -> Ended:
        ended = await command_line(self.profile.path, *words)
        assert ended.code == 0, ended
        return ended


@asynccontextmanager
async def a_daemon(folder: Path, workers: int = 2) -> AsyncIterator[Prunus]:
    config = Config(workers=workers, slots=PROCESSES // workers, grace_s=20.0, import_from=[str(PROJECT)])
    prunus = Prunus(Profile.create(folder / "profile", config))
    try:
        await prunus("daemon", "start")
        yield prunus
    finally:
        await prunus("daemon", "stop")


async def launch(profile: Profile, journal: Path, number: int, **inputs: object) -> list[str]:
    async with connect(profile) as controller:
        told = {"file": str(journal), "steps": STEPS, **inputs}
        return [(await controller.launch(workflows.Journal, told)).pid for _ in range(number)]


async def all_finish_once(profile: Profile, journal: Path, pids: list[str]) -> None:
    """All finish; each of their steps ran once."""
    async with connect(profile) as controller:
        handles: list[ProcessHandle] = [controller.handle(pid) for pid in pids]
        for handle in handles:
            assert (await handle.result()).outputs.written == STEPS
        assert not await controller.find(Query(states=("excepted", "killed")))
        assert not await controller.find(Query(unfinished=True))
    lines = lines_of(journal)
    assert len(lines) == len(set(lines)) == STEPS * len(pids)


def lines_of(journal: Path) -> list[str]:
    return journal.read_text().splitlines()


@pytest.mark.timeout(120)
async def test_a_hundred_live_processes_survive_a_stop_and_a_start(short_folder: Path) -> None:
    """Their steps end and are checkpointed while the broker still serves; after the start they go on with the next
    ones."""
    journal = short_folder / "journal"
    async with a_daemon(short_folder) as prunus:
        pids = await launch(prunus.profile, journal, PROCESSES, pace_s=0.6)
        await file_has(journal, PROCESSES)
        assert (await prunus("daemon", "stop")).out == "The daemon has stopped; nothing is lost.\n"
        stopped_at = lines_of(journal)
        assert len(stopped_at) == len(set(stopped_at)) < STEPS * PROCESSES
        await prunus("daemon", "start")
        await all_finish_once(prunus.profile, journal, pids)
    assert "run again" not in prunus.profile.log("worker-1").read_text()


@pytest.mark.timeout(120)
async def test_processes_move_over_in_a_reload(short_folder: Path) -> None:
    """All workers are other ones then, and each step ran once; with `broker` that is another one too."""
    journal = short_folder / "journal"

    def who(profile: Profile) -> dict[str, int]:
        holders = {name: read_holder(profile.lock(name)) for name in (BROKER, "worker-1", "worker-2")}
        return {name: holder.pid for name, holder in holders.items() if holder is not None}

    async with a_daemon(short_folder) as prunus:
        pids = await launch(prunus.profile, journal, 20, pace_s=0.3)
        await file_has(journal, 20)
        before = who(prunus.profile)
        await daemon.reload(prunus.profile)
        middle = who(prunus.profile)
        assert middle[BROKER] == before[BROKER]
        assert not {*before.values()} & {middle["worker-1"], middle["worker-2"]}
        await daemon.reload(prunus.profile, broker=True)
        assert not {*middle.values()} & {*who(prunus.profile).values()}
        assert (await prunus("daemon", "status")).code == 0
        await all_finish_once(prunus.profile, journal, pids)


async def test_a_stop_says_what_is_left(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many workers, and with how many processes if the broker says so."""
    monkeypatch.setenv("PYTHONPATH", str(Path(prunus.__file__).parents[1]))
    monkeypatch.setattr("prunus.runtime.daemon.PROGRESS_INTERVAL_S", 0.01)
    monkeypatch.setattr("prunus.runtime.daemon.ASK_TIMEOUT_S", 0.01)
    profile = Profile.create(short_folder / "profile", Config(grace_s=0.2))
    stage, said = Stage(profile, short_folder, worker_1="deaf"), list[StopProgress]()
    write_wish(profile, Wish(1))
    with stage.daemon_process() as process:
        await stage.running("daemon", BROKER, "worker-1")
        assert await daemon.stop(profile, said.append)
        assert process.wait() == 0
    assert said[0] == StopProgress(1, None)


async def test_a_stop_does_not_say_of_a_lost_database_that_nothing_is_lost(short_folder: Path) -> None:
    """It says where the broker saved what was in it."""
    profile = Profile.create(short_folder / "profile", Config(workers=0))
    prunus = Prunus(profile)
    await prunus("daemon", "start")
    profile.database.unlink()
    stopped = await prunus("daemon", "stop")
    [saved] = profile.path.glob("prunus.db.rescued-*")
    assert stopped.out == "The daemon has stopped.\n"
    assert "Warning: its broker ended with an error: " in stopped.err
    assert f"is saved: `prunus broker restore {saved}` goes on from there" in stopped.err
    await prunus("broker", "restore", str(saved))
    await prunus("daemon", "start")
    assert (await prunus("daemon", "stop")).out == "The daemon has stopped; nothing is lost.\n"


async def test_a_database_that_was_taken_away_without_a_word_of_its_broker(short_folder: Path) -> None:
    """As when that was killed before it could see it: the file is looked for."""
    profile = Profile.create(short_folder / "profile")
    path = profile.database
    assert daemon.what_is_wrong(profile) == (
        f"it has no database: {path} was removed with all that belongs to it, or was never made"
    )
    Broker(path).close()
    assert daemon.what_is_wrong(profile) is None
    whole = path.read_bytes()
    path.write_bytes(b"")
    assert f"its database {path} is empty: put the file back, or" in (daemon.what_is_wrong(profile) or "")
    path.unlink()
    assert f"its database {path} is gone: put the file back, or" in (daemon.what_is_wrong(profile) or "")
    path.write_bytes(whole)
    said = "2026-01-31 12:00:00,000 CRITICAL __main__: the disk is no more\n"
    profile.log(BROKER).write_text(said)
    assert daemon.what_is_wrong(profile) == "its broker ended with an error: the disk is no more"
    profile.log(BROKER).write_text(f"{said}2026-01-31 12:00:01,000 INFO    __main__: stopped\n")
    assert daemon.what_is_wrong(profile) is None


async def test_the_daemon_runs_in_the_foreground(short_folder: Path) -> None:
    """As a program of its own, with the number of workers that was asked for; Ctrl-C stops all of it in order."""
    folder = Profile.create(short_folder / "profile", Config(grace_s=1.0)).path
    command = [sys.executable, "-m", "prunus.runtime.cli", "--profile", str(folder), "daemon", "run", "-w", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(prunus.__file__).parents[1])}
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=environment)
    assert process.stderr is not None
    text = ""
    while "worker-1 started" not in text:
        text += (await process.stderr.readline()).decode()
    second = await command_line(folder, "daemon", "run", "-w", "3")
    assert second.code == 1
    assert "runs already" in second.err
    process.send_signal(signal.SIGINT)
    text += (await process.stderr.read()).decode()
    assert await process.wait() == 0
    assert "SIGINT: stopping the workers, then the broker" in text
    assert "the daemon ends" in text
    assert "worker-2" not in text


async def test_a_daemon_goes_on_when_its_run_folder_was_removed(short_folder: Path) -> None:
    """No second one starts beside it, and a moment later everybody is found as before: daemon, broker and workers."""
    async with a_daemon(short_folder, workers=1) as prunus:
        profile = prunus.profile
        before = daemon.status(profile)
        assert before.is_healthy
        assert before.daemon is not None
        shutil.rmtree(profile.path / "run")
        refusal = f"^the daemon of this profile runs already \\(pid {before.daemon.pid}\\)"
        with pytest.raises(DaemonError, match=refusal):
            await daemon.start(profile)
        socket = Path(profile.endpoint.removeprefix("ipc://"))
        await until(lambda: daemon.status(profile).is_healthy and socket.exists())
        after = daemon.status(profile)
        assert after.daemon is not None
        pids = {name: holder.pid for name, holder in before.services.items()}
        assert (after.daemon.pid, {name: holder.pid for name, holder in after.services.items()}) == (
            before.daemon.pid,
            pids,
        )
        async with connect(profile) as controller:
            handle = await controller.launch(workflows.Add, {"a": 1})
            assert (await handle.result(30)).outputs.sum == 2
