"""Workers that stop, die, meet classes that are gone, and take each other's processes over."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from prunus import errors
from prunus.messaging import server
from prunus.messaging.connecting import connect_to
from prunus.persistence.persister import DEFAULT_QUEUE
from prunus.runtime import worker
from prunus.runtime.profile import Config, Profile
from prunus.runtime.worker import Settings, wait_for_broker
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.real_daemon import RealDaemon
from tests.messaging.served import serving
from tests.runtime import workflows
from tests.runtime.waiting import POLL_S, file_has, until


async def test_a_stopped_worker_gives_its_processes_back_at_a_checkpoint(tmp_path: Path) -> None:
    """Another worker continues; no step that was checkpointed is run again."""
    file = tmp_path / "journal"
    async with LocalDaemon(workers=2, slots=1) as daemon:
        handle = await daemon.controller.launch(workflows.Journal, {"file": str(file), "steps": 40, "pace_s": 0.002})
        await file_has(file, 3)
        holder = (await handle.record()).owner or ""
        await daemon.stop_worker(holder.rpartition("-")[0])
        assert (await handle.result()).outputs.written == 40
        claims = [event.by for event in await handle.history() if event.subject == "claimed"]
    assert len(claims) == 2
    assert claims[0] != claims[1]
    lines = file.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 40


@pytest.mark.parametrize("key", [None, "mine"])
async def test_a_task_about_no_process_is_not_lost(key: str | None) -> None:
    """Somebody sent it into a queue of workers: it goes back with the reason, and processes go on."""
    async with LocalDaemon(workers=1) as daemon:
        communicator = daemon.controller.communicator
        await communicator.task_send(b"precious", queue=DEFAULT_QUEUE, key=key)
        while not (await communicator.tasks(queue=DEFAULT_QUEUE))[0].reason:
            await asyncio.sleep(POLL_S)
        handle = await daemon.controller.launch(workflows.Journal, {"file": "/dev/null", "steps": 1})
        await handle.result()
        [task] = await communicator.tasks(queue=DEFAULT_QUEUE, bodies=True)
        assert task.body == b"precious"
        assert "about no process" in (task.reason or "")


async def test_a_step_that_outlasts_the_grace_is_cancelled_and_run_again(tmp_path: Path) -> None:
    """The unfinished step begins again on the next worker, under the same idempotency key (G5)."""
    file = tmp_path / "begun"
    async with LocalDaemon(workers=1, grace_s=0.0) as daemon:
        handle = await daemon.controller.launch(workflows.Endless, {"begun": str(file)})
        await file_has(file, 1)
        await daemon.stop_worker("worker-1")
        await daemon.start_worker("worker-2")
        lines = await file_has(file, 3)
        await handle.kill()
    assert lines[0] == lines[2]
    assert lines[1] == "cleaned up"


async def test_the_processes_of_a_dead_worker_continue_on_another(tmp_path: Path) -> None:
    """Killed in the middle: the finished steps are not run again, the others are."""
    file = tmp_path / "journal"
    async with LocalDaemon(workers=1) as daemon:
        handle = await daemon.controller.launch(workflows.Journal, {"file": str(file), "steps": 30, "pace_s": 0.002})
        await file_has(file, 5)
        await daemon.start_worker("worker-2")
        await daemon.kill_worker("worker-1")
        assert (await handle.result()).outputs.written == 30
    lines = file.read_text().splitlines()
    assert len(set(lines)) == 30
    assert len(lines) <= 31, "at most the one step that was not checkpointed ran twice"


async def test_a_class_that_is_gone_sets_its_process_aside_with_the_reason(daemon: LocalDaemon) -> None:
    """Not lost, not tried again and again; control says why; it can be killed without its code."""
    handle = await daemon.controller.launch(workflows.Ask)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    kept, workflows.Ask.__qualname__ = workflows.Ask, "Gone"
    del workflows.Ask
    try:
        await handle._controller._backend.persister.post(handle.pid, b"")
        record = await until(handle, lambda row: row.aside is not None)
        assert "Ask" in (record.aside or "")
        with pytest.raises(errors.InvalidStateError, match="SET ASIDE"):
            await handle.pause()
        await handle.kill("no longer needed")
        assert (await handle.record()).state == "killed"
    finally:
        workflows.Ask = kept  # type: ignore[misc]
        kept.__qualname__ = "Ask"


async def test_a_set_aside_process_continues_once_the_cause_is_mended(daemon: LocalDaemon) -> None:
    """`retry` brings it back where it was."""
    handle = await daemon.controller.launch(workflows.Ask)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    kept = workflows.Ask
    del workflows.Ask
    await handle._controller._backend.persister.post(handle.pid, b"")
    await until(handle, lambda row: row.aside is not None)
    workflows.Ask = kept  # type: ignore[misc]
    await handle.retry()
    await until(handle, lambda row: row.aside is None and row.owner is None)
    await handle.resume(42)
    assert (await handle.result()).outputs.answer == 42


async def test_a_stale_runner_stops_and_changes_nothing(daemon: LocalDaemon, tmp_path: Path) -> None:
    """G4: while a step runs somebody else claims the process; its first worker's kill and save come too late."""
    file = tmp_path / "begun"
    handle = await daemon.controller.launch(workflows.Endless, {"begun": str(file)})
    await file_has(file, 1)
    persister = handle._controller._backend.persister
    claim = await persister.claim(handle.pid, "somebody else", at=0.0)
    with pytest.raises(errors.StaleOwnerError):
        await persister.release(handle.pid, claim.epoch - 1)
    record = await handle.record()
    assert (record.owner, record.state) == (persister_owner(record.owner), "running")


def persister_owner(owner: str | None) -> str | None:
    """The owner is whoever claimed last: the session of the controller here."""
    assert owner is not None
    assert owner.startswith("controller")
    return owner


async def test_many_processes_on_two_workers_all_finish() -> None:
    """Two hundred, each with children."""
    async with LocalDaemon(workers=2, slots=4) as daemon:
        handles = await asyncio.gather(*(daemon.controller.launch(workflows.Fan, {"count": 2}) for _ in range(100)))
        results = await asyncio.gather(*(handle.result() for handle in handles))
    assert {result.outputs.total for result in results} == {3}


async def test_a_crash_of_the_interpreter_leaves_its_stack_in_the_log(tmp_path: Path) -> None:
    """What a C library does to a worker can be seen afterwards."""
    begun = tmp_path / "begun"
    async with RealDaemon(tmp_path, workers=1) as daemon:
        await daemon.controller.launch(workflows.Endless, {"begun": str(begun)})
        await file_has(begun, 1)
        worker = daemon.services.pop("worker-1")
        worker.send_signal(signal.SIGSEGV)
        assert await asyncio.to_thread(worker.wait, 20) == -signal.SIGSEGV
        log = daemon.profile.log("worker-1").read_text()
    assert "Fatal Python error: Segmentation fault" in log
    assert "in run_forever" in log


def test_a_profile_does_not_make_workers_of_the_control_lane(tmp_path: Path) -> None:
    """They serve it in any case, with slots of its own."""
    profile = Profile.create(tmp_path / "p", Config(queues=["default", "control"]))
    with pytest.raises(errors.ProfileError, match=r"config\.yaml: queues: 'control' is no queue"):
        Settings.of(profile)


async def test_a_worker_waits_for_a_broker_that_has_room(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is full when the worker starts may soon not be; after its patience it says what is wrong."""
    endpoint = f"ipc://{short_folder}/run/s"
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(worker, "BUSY_PAUSE_S", POLL_S)
    with serving(endpoint):
        first = await connect_to(endpoint)
        with pytest.raises(errors.BusyError, match="1 connections, as many as it may have"):
            await wait_for_broker(endpoint, "worker-1", 2 * POLL_S)
        caplog.clear()
        waiting = asyncio.create_task(wait_for_broker(endpoint, "worker-1", 30.0))
        while "waiting for a broker" not in caplog.text:
            await asyncio.sleep(POLL_S)
        await first.close()
        await (await waiting).close()
