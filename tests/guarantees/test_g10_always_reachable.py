"""G10: control of a process that exists always gets an answer, whether somebody holds the process or not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from prunus import errors
from prunus.runtime.controller import ProcessHandle
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import workflows
from tests.runtime.waiting import file_has, until

Making = Callable[[LocalDaemon, Path], Awaitable[ProcessHandle]]


async def queued(daemon: LocalDaemon, folder: Path) -> ProcessHandle:
    """Accepted, and behind others in the queue."""
    blocker = await daemon.controller.launch(workflows.Endless, {"begun": str(folder / "blocker")})
    await file_has(folder / "blocker", 1)
    handle = await daemon.controller.launch(workflows.Ask)
    assert (await blocker.record()).state == "running"
    return handle


async def running(daemon: LocalDaemon, folder: Path) -> ProcessHandle:
    handle = await daemon.controller.launch(
        workflows.Journal, {"file": str(folder / "journal"), "steps": 100_000, "pace_s": 0.001}
    )
    await file_has(folder / "journal", 1)
    return handle


async def parked(daemon: LocalDaemon, folder: Path) -> ProcessHandle:
    handle = await daemon.controller.launch(workflows.Ask)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    return handle


async def paused(daemon: LocalDaemon, folder: Path) -> ProcessHandle:
    handle = await parked(daemon, folder)
    await handle.pause()
    return handle


async def waiting_for_a_child(daemon: LocalDaemon, folder: Path) -> ProcessHandle:
    handle = await daemon.controller.launch(workflows.Nest, {"begun": str(folder / "child")})
    await file_has(folder / "child", 1)
    return handle


@pytest.mark.parametrize("make", [queued, running, parked, paused, waiting_for_a_child])
async def test_pause_play_and_kill_are_answered(make: Making, tmp_path: Path) -> None:
    """One slot, wherever the process is: each call returns, and what it says is then true."""
    async with LocalDaemon(workers=1, slots=1) as daemon:
        handle = await make(daemon, tmp_path)
        await handle.pause("a look")
        assert (await handle.record()).play == "paused"
        await handle.play()
        assert (await handle.record()).play == "playing"
        await handle.kill("enough")
        assert (await handle.record()).state == "killed"
        await daemon.controller.kill_all()


@pytest.mark.parametrize("make", [queued, running, parked])
async def test_many_callers_at_once_are_all_answered(make: Making, tmp_path: Path) -> None:
    """Pause, play and kill back to back: everybody gets one answer, an error is one, and the process is killed."""
    async with LocalDaemon(workers=1, slots=1) as daemon:
        handle = await make(daemon, tmp_path)
        calls = [handle.pause(), handle.play(), handle.pause(), handle.kill(), handle.play(), handle.kill()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(answer) for answer in answers} <= {type(None), errors.InvalidStateError}
        assert (await handle.record()).state == "killed"
        await daemon.controller.kill_all()


async def test_a_question_to_a_process_that_nobody_holds_is_answered_from_its_row(tmp_path: Path) -> None:
    """Status, history and checkpoint need no worker at all."""
    async with LocalDaemon(workers=1) as daemon:
        handle = await parked(daemon, tmp_path)
        await daemon.stop_worker("worker-1")
        assert (await handle.record()).state == "waiting"
        assert (await handle.history())[-1].subject == "running.waiting"
        assert "waiting for a person" in await handle.checkpoint_yaml()


async def test_control_waits_for_a_worker_and_is_not_lost(tmp_path: Path) -> None:
    """While there is no worker the letter stays in the inbox; the first worker that comes deals with it."""
    async with LocalDaemon(workers=1) as daemon:
        handle = await parked(daemon, tmp_path)
        await daemon.stop_worker("worker-1")
        killing = asyncio.create_task(handle.kill("late"))
        await until(handle, lambda row: row.inbox_last > row.inbox_done)
        await daemon.start_worker("worker-2")
        await killing
        assert (await handle.record()).state == "killed"
