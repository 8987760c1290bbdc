"""G4: every claim raises the epoch, the store refuses an older one, and the runner that used it stops at once."""

from __future__ import annotations

from pathlib import Path

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
