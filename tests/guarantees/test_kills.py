"""Kill -9 the worker or the broker at any time: nothing accepted is lost, nothing confirmed is done again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from prunus.persistence.persister import Query
from tests.guarantees.real_daemon import RealDaemon, steps_in_order
from tests.runtime import workflows
from tests.runtime.waiting import file_has

STEPS = 30
PROCESSES = 6


@pytest.mark.timeout(90)
@pytest.mark.parametrize("victim", ["worker-1", "broker"])
async def test_processes_survive_kills(short_folder: Path, victim: str) -> None:
    """Three kills under load: every process finishes with every step in order, and terminal states stay as they were."""
    journal = short_folder / "journal"
    async with RealDaemon(short_folder) as daemon:
        launch = daemon.controller.launch
        inputs = {"file": str(journal), "steps": STEPS, "pace_s": 0.02}
        handles = [await launch(workflows.Journal, inputs) for _ in range(PROCESSES)]
        early = await launch(workflows.Add, {"a": 1})
        assert (await early.result()).outputs.sum == 2
        written = 0
        for _ in range(3):
            written = len(await file_has(journal, written + 2 * PROCESSES))
            daemon.kill(victim)
            handles.append(await accepted(daemon, victim, inputs))
        results = await asyncio.gather(*(handle.result() for handle in handles))
        assert {result.outputs.written for result in results} == {STEPS}, daemon.logs()
        assert (await early.record()).state == "finished"
        assert [event.subject for event in await early.history()].count("running.finished") == 1
        assert not await daemon.controller.find(Query(unfinished=True))
    lines = journal.read_text().splitlines()
    assert len(set(lines)) == STEPS * len(handles)
    assert steps_in_order(lines)


async def accepted(daemon: RealDaemon, victim: str, inputs: dict[str, object]):  # type: ignore[no-untyped-def]
    """A launch during the outage: it waits for the broker, and is accepted."""
    launching = asyncio.create_task(daemon.controller.launch(workflows.Journal, inputs))
    daemon.start(victim)
    return await launching
