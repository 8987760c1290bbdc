"""G10: control of a process that exists always gets an answer, whether somebody holds the process or not."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from prunus import errors
from prunus.messaging.communicator import IncomingTask
from prunus.runtime.backend import Backend
from prunus.runtime.controller import ProcessHandle
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import features, workflows
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


@pytest.mark.parametrize("name", ["pause", "kill"])
async def test_a_process_whose_worker_was_just_killed_is_reachable(name: str, tmp_path: Path) -> None:
    """The slots of the worker that is left are taken: control does not wait for one."""
    async with LocalDaemon(workers=1, slots=1) as daemon:
        launch = daemon.controller.launch
        orphan = await launch(workflows.Endless, {"begun": str(tmp_path / "orphan")})
        await file_has(tmp_path / "orphan", 1)
        await daemon.start_worker("worker-2")
        busy = await launch(workflows.Endless, {"begun": str(tmp_path / "busy")})
        await file_has(tmp_path / "busy", 1)
        await daemon.kill_worker("worker-1")
        await getattr(orphan, name)()
        record = await orphan.record()
        assert "paused" in (record.play, record.state) or record.state == "killed"
        await busy.kill()
        await orphan.kill()


async def test_control_that_asks_nothing_of_a_running_step_does_not_wait_for_it(tmp_path: Path) -> None:
    """The step would last for ever; a play is answered meanwhile, and so is a pause that the play takes back."""
    async with LocalDaemon(workers=1) as daemon:
        handle = await daemon.controller.launch(workflows.Endless, {"begun": str(tmp_path / "begun")})
        await file_has(tmp_path / "begun", 1)
        await handle.play()
        await asyncio.gather(handle.pause(), handle.play())
        record = await handle.record()
        assert (record.state, record.play, record.inbox_done) == ("running", "playing", 3)
        last_pause = asyncio.create_task(handle.pause())
        await until(handle, lambda row: row.play == "pausing")
        assert not last_pause.done()
        await handle.kill()
        with pytest.raises(errors.InvalidStateError):
            await last_pause
        assert len((tmp_path / "begun").read_text().splitlines()) == 2, "the step was run once, and cleaned up"


async def created(daemon: LocalDaemon, folder: Path) -> ProcessHandle:
    """It was never begun: nobody takes its queue."""
    return await daemon.controller.launch(workflows.Rent, {"returned": str(folder / "returned")}, queue="nobody")


async def created_paused(daemon: LocalDaemon, folder: Path) -> ProcessHandle:
    return await daemon.controller.launch(workflows.Ask, paused=True)


def tasks_of(daemon: LocalDaemon) -> list[str]:
    return [key for [key] in daemon.connection.execute("SELECT key FROM broker_task WHERE outcome IS NULL")]


@pytest.mark.parametrize("make", [created, created_paused, parked, paused, waiting_for_a_child])
async def test_a_kill_needs_no_worker(make: Making, tmp_path: Path) -> None:
    """What nobody can take is killed by the broker, in the commit of the kill, and all below it too."""
    async with LocalDaemon(workers=1) as daemon:
        handle = await make(daemon, tmp_path)
        await daemon.stop_worker("worker-1")
        before = await handle.record()
        await handle.kill("enough")
        record = await handle.record()
        assert (record.state, record.play, record.owner, record.epoch > before.epoch) == (
            "killed",
            "playing",
            None,
            True,
        )
        history = [event for event in await handle.history() if event.subject == f"{before.state}.killed"]
        assert [(event.note, event.by) for event in history] == [("enough", "broker")]
        assert [row.state for row in await daemon.controller.processes(unfinished=True).records()] == []
        assert tasks_of(daemon) == []
        with pytest.raises(errors.ProcessKilledError, match="enough"):
            await handle.result()


async def test_a_killed_process_keeps_the_outputs_that_it_has(tmp_path: Path) -> None:
    """Also if nothing of its code was there; by force its last step is left out."""
    async with LocalDaemon(workers=1) as daemon:
        handle = await daemon.controller.launch(workflows.Rent, {"returned": str(tmp_path / "returned")})
        await until(handle, lambda row: row.state == "waiting" and row.owner is None)
        await daemon.stop_worker("worker-1")
        await handle.kill("now", force=True)
        outcome = await handle.outcome()
        assert outcome is not None
        assert (outcome.outputs.flat, outcome.exit_message) == (Path("a/flat"), "now")
        assert not (tmp_path / "returned").exists()


async def test_a_last_step_waits_for_a_worker_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was begun elsewhere is given back, whenever the next worker comes."""
    async with LocalDaemon(workers=1) as daemon:
        handle = await daemon.controller.launch(workflows.Rent, {"returned": str(tmp_path / "returned")})
        await until(handle, lambda row: row.state == "waiting" and row.owner is None)
        await daemon.stop_worker("worker-1")
        killing = asyncio.create_task(handle.kill("now"))
        await until(handle, lambda row: row.inbox_last == 1)
        assert (await handle.record()).state == "waiting"
        await daemon.start_worker("worker-2")
        await killing
        assert (tmp_path / "returned").read_text() == "now\n"
    [said] = [record.getMessage() for record in caplog.records if record.name == "prunus.runtime.selection"]
    assert said.startswith("no worker runs: the kill of 1 process is kept until one does")
    assert said.endswith("a kill by force does without")


async def test_many_are_told_at_once_that_no_worker_runs(caplog: pytest.LogCaptureFixture) -> None:
    """Once for all of them; a letter that was read is no matter."""
    async with LocalDaemon(workers=0) as daemon:
        await daemon.controller.launch_many([(workflows.Ask, None)] * 3)
        pausing = asyncio.create_task(daemon.controller.pause_all())
        while not any(row.inbox_last for row in await daemon.controller.find()):
            await asyncio.sleep(0)
        await daemon.start_worker("worker-1")
        assert len(await pausing) == 3
    assert [record.getMessage() for record in caplog.records if record.name == "prunus.runtime.selection"] == [
        "no worker runs: the pause of 3 processes is kept until one does (`prunus daemon start`)"
    ]


@pytest.mark.parametrize("gone", ["killed", "closed"])
@pytest.mark.parametrize("is_held", [True, False])
async def test_a_kill_that_the_last_worker_did_not_read_is_done_when_it_is_gone(gone: str, is_held: bool) -> None:
    """It holds the process, or was just about to take it for its letter: nobody else will."""
    async with LocalDaemon(workers=0) as daemon:
        worker = await daemon.broker.connect(name="worker-1")
        taken = asyncio.Event()

        async def never_reads(_: IncomingTask) -> None:
            taken.set()
            await asyncio.Event().wait()

        await worker.add_task_subscriber(never_reads, queue="control")
        handle = await daemon.controller.launch(workflows.Ask)
        if is_held:
            await Backend(worker).persister.claim(handle.pid, worker.session, at=0.0)
        killing = asyncio.create_task(handle.kill("enough"))
        await until(handle, lambda row: row.inbox_last == 1)
        if not is_held:
            await taken.wait()
        assert (await handle.record()).state == "created"
        if gone == "killed":
            daemon.broker.kill(worker)
        await worker.close()
        await killing
        assert (await handle.record()).state == "killed"
        assert tasks_of(daemon) == []


async def test_a_process_that_has_ended_leaves_no_task_behind() -> None:
    """That for its next step was in a queue that nobody takes; a worker read the kill from the control lane."""
    async with LocalDaemon(workers=1) as daemon:
        handle = await daemon.controller.launch(workflows.Ask, queue="nobody")
        communicator = daemon.controller.communicator
        await communicator.task_send(b"", queue="elsewhere", key=handle.pid)
        assert [task.queue for task in await communicator.tasks()] == ["nobody", "elsewhere"]
        await handle.kill()
        left = [task.queue for task in await communicator.tasks(place="ready")]
        assert left == ["elsewhere"], "what somebody else has sent stays"


SLOW_MODULE = """
import asyncio, pathlib, time
from prunus import Process

FOLDER = pathlib.Path(__file__).parent
while (FOLDER / "hold").exists():
    time.sleep(0.005)

class Slow(Process):
    async def run(self):
        (FOLDER / "begun").write_text("begun\\n")
        await asyncio.Event().wait()
"""


async def test_control_reaches_a_process_whose_class_is_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker claimed it and has no runner for it yet; when the endless step begins, the letter is read."""
    (tmp_path / "slow_module.py").write_text(SLOW_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    async with LocalDaemon(workers=1) as daemon:
        handle = await daemon.controller.launch("slow_module:Slow")
        await file_has(tmp_path / "begun", 1)
        await daemon.kill_worker("worker-1")
        del sys.modules["slow_module"]
        (tmp_path / "hold").touch()
        await daemon.start_worker("worker-2")
        await until(handle, lambda row: row.epoch == 2)
        killing = asyncio.create_task(handle.kill())
        await until(handle, lambda row: row.inbox_last == 1)
        await handle.record()  # what the worker was told with that letter is heard by now
        (tmp_path / "hold").unlink()
        await killing
        assert (await handle.record()).state == "killed"
    del sys.modules["slow_module"]


async def test_control_waits_for_a_worker_and_is_not_lost(tmp_path: Path) -> None:
    """While there is no worker the letter stays in the inbox; the first worker that comes deals with it."""
    async with LocalDaemon(workers=1) as daemon:
        handle = await parked(daemon, tmp_path)
        await daemon.stop_worker("worker-1")
        pausing = asyncio.create_task(handle.pause("late"))
        await until(handle, lambda row: row.inbox_last > row.inbox_done)
        await daemon.start_worker("worker-2")
        await pausing
        assert (await handle.record()).play == "paused"


@pytest.mark.parametrize("quiesced", [True, False])
async def test_a_pause_that_was_answered_survives_the_death_of_its_worker(quiesced: bool, tmp_path: Path) -> None:
    """Whether the step had ended by then or not: the next worker takes no step before a play."""
    journal = tmp_path / "journal"
    async with LocalDaemon() as daemon:
        inputs = {"file": str(journal), "steps": 3, "pace_s": 0.0 if quiesced else 3600.0}
        handle = await daemon.controller.launch(workflows.Journal, inputs, pause_at="write" if quiesced else None)
        if quiesced:
            await until(handle, lambda row: row.play == "paused")
        else:
            await file_has(journal, 1)
        await handle.pause("for good", quiesced=quiesced)
        await daemon.kill_worker("worker-1")
        await daemon.start_worker("worker-2")
        record = await until(handle, lambda row: row.play == "paused" and row.owner is None)
        written = len(await file_has(journal, 0))
        other = await daemon.controller.launch(workflows.Add, {"a": 1})
        await other.result()
        assert (await handle.record()).seq == record.seq
        assert len(await file_has(journal, 0)) == written == (0 if quiesced else 1)
        await handle.play()
        await file_has(journal, written + 1)
        await handle.kill()


@pytest.mark.timeout(60)
async def test_a_killed_parent_reaches_two_thousand_children() -> None:
    """In the commit of its end each of them has its letter; none is left alive."""
    async with LocalDaemon(slots=64) as daemon:
        parent = await daemon.controller.launch(features.Crowd, {"count": 2000})
        async with daemon.controller.events() as events:

            async def all_are(state: str) -> None:
                while (await daemon.controller.broker_statistics())["processes"] != {state: 2001}:
                    await anext(events)

            await all_are("waiting")
            await parent.kill("all of you")
            await all_are("killed")
