"""G4: every claim raises the epoch, the store refuses an older one, and the runner that used it stops at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunus import errors
from prunus.persistence.persister import NewProcess, Save
from prunus.runtime.backend import Backend
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.real_daemon import steps_in_order
from tests.runtime import workflows
from tests.runtime.waiting import file_has, until


async def test_a_worker_that_was_taken_for_dead_does_not_write_any_more(tmp_path: Path) -> None:
    """It lives, and goes on with its step; the other worker has the process, and only that one gets any further."""
    file = tmp_path / "journal"
    async with LocalDaemon(workers=1) as daemon:
        handle = await daemon.controller.launch(workflows.Journal, {"file": str(file), "steps": 40, "pace_s": 0.005})
        await file_has(file, 5)
        await daemon.start_worker("worker-2")
        first = (await handle.record()).owner
        assert first is not None
        daemon.broker.expire(first)
        taken = await until(handle, lambda row: row.owner not in (None, first))
        assert taken.epoch >= 2
        assert (await handle.result()).outputs.written == 40
        history = await handle.history()
    lines = file.read_text().splitlines()
    assert len(set(lines)) == 40
    assert steps_in_order(lines)
    writers = [event.by for event in history if event.by is not None]
    last = max(number for number, writer in enumerate(writers) if writer == first)
    assert first not in writers[last + 1 :], "after the second claim nothing of the first worker is in the history"


async def test_the_store_refuses_whatever_comes_under_an_older_claim() -> None:
    """Each claim is above all before it, also across a restart; save, release and set_aside under another one fail."""
    async with LocalDaemon(workers=0) as daemon:
        first, second = [Backend(await daemon.broker.connect(name=name)) for name in ("first", "second")]
        process = NewProcess(pid="p", class_id="a:B", checkpoint=b"0", created_at=0.0)
        await first.persister.create(process)
        epochs = [(await backend.persister.claim("p", "", at=0.0)).epoch for backend in (first, second, first, second)]
        daemon.broker.restart()
        epochs.append((await first.persister.claim("p", "", at=0.0)).epoch)
        assert epochs == sorted(set(epochs))
        before = await second.persister.load("p")
        for epoch in (*epochs[:-1], epochs[-1] + 1):
            with pytest.raises(errors.StaleOwnerError):
                await second.persister.save(Save(pid="p", epoch=epoch, state="running", checkpoint=b"1"))
            with pytest.raises(errors.StaleOwnerError):
                await second.persister.release("p", epoch)
            with pytest.raises(errors.StaleOwnerError):
                await second.persister.set_aside("p", epoch, "why")
        assert await second.persister.load("p") == before
        for backend in (first, second):
            await backend.communicator.close()


async def test_a_step_of_a_worker_that_was_taken_for_dead_is_stopped(tmp_path: Path) -> None:
    """It would last for ever; when its worker hears that somebody else has the process, the step is cancelled."""
    file = tmp_path / "begun"
    async with LocalDaemon(workers=1) as daemon:
        handle = await daemon.controller.launch(workflows.Endless, {"begun": str(file)})
        await file_has(file, 1)
        await daemon.start_worker("worker-2")
        first = (await handle.record()).owner
        assert first is not None
        daemon.broker.expire(first)
        lines = await file_has(file, 3)
        assert sorted(lines) == sorted([f"{handle.pid}:1", f"{handle.pid}:1", "cleaned up"])
        assert (await handle.record()).owner != first
        await handle.kill()
