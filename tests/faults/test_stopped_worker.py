"""SIGSTOP beyond the lease: the worker's processes go to others, and when it comes back it changes nothing (G4)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults.parts import Services
from tests.guarantees.real_daemon import steps_in_order
from tests.runtime import workflows
from tests.runtime.waiting import file_has, until

LEASE_S = 3.0
"""More than the heartbeat of a client (2 s)."""
STEPS = 80


@pytest.mark.timeout(60)
async def test_a_worker_that_was_stopped_beyond_its_lease_changes_nothing(short_folder: Path) -> None:
    """Nothing proves it dead, so its lease has to run out; another one goes on, and the first one stops at once."""
    journal = short_folder / "journal"
    async with Services(short_folder, workers=2, broker_options=("--lease", str(LEASE_S))) as services:
        inputs = {"file": str(journal), "steps": STEPS, "pace_s": 0.01}
        handle = await services.controller.launch(workflows.Journal, inputs)
        await file_has(journal, 5)
        before = await handle.record()
        assert before.owner is not None
        first = before.owner.rpartition("-")[0]
        services.stop_for_a_while(first)
        stopped_at = len(journal.read_text().splitlines())

        taken = await until(handle, lambda row: row.owner not in (None, before.owner))
        assert taken.epoch > before.epoch
        await file_has(journal, stopped_at + 5)
        services.go_on(first)
        await services.said(first, "somebody else has this task now; its handler is cancelled")
        assert (await handle.result()).outputs.written == STEPS
        assert (await handle.record()).epoch == taken.epoch

        writers = [event.by for event in await handle.history() if event.by is not None]
        second = writers.index(taken.owner)
        assert set(writers[second:]) == {taken.owner}, "after the second claim nothing of the first is in the history"
        lines = journal.read_text().splitlines()
        assert len(set(lines)) == STEPS
        assert len(lines) <= STEPS + 1, "only the step in which it was stopped ran twice"
        assert steps_in_order(lines)

        again = [await services.controller.launch(workflows.Add, {"a": number}) for number in range(20)]
        await asyncio.gather(*(one.result() for one in again))
        assert services.services[first].poll() is None, "it works on, for others"
