"""G5: a checkpointed step never runs again; an unfinished one may, under the same idempotency key.

Steps write their idempotency keys into a file, so the file says what ran how often.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from prunus.persistence.persister import Query
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.real_daemon import RealDaemon, steps_in_order
from tests.runtime import workflows
from tests.runtime.waiting import file_has, until

STEPS = 30
PROCESSES = 6


@pytest.mark.timeout(90)
@pytest.mark.parametrize("victim", ["worker-1", "broker"])
async def test_processes_survive_kills(short_folder: Path, victim: str) -> None:
    """Three kills under load: every process finishes with its steps in order, and what had ended stays as it was."""
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


@pytest.mark.parametrize("commit", range(3, 15))
async def test_a_worker_dies_after_any_commit(tmp_path: Path, commit: int) -> None:
    """Whichever commit was the last one that it made: no step but the one in hand runs twice, and none is left out."""
    journal = tmp_path / "journal"
    async with LocalDaemon(workers=1) as daemon:
        reached = asyncio.Event()
        commits = 0

        def count(failpoint: str) -> None:
            nonlocal commits
            commits += failpoint == "after_commit"
            if commits == commit:
                reached.set()

        daemon.broker.exchange.failpoint = count
        handle = await daemon.controller.launch(workflows.Journal, {"file": str(journal), "steps": 10})
        await reached.wait()
        checkpointed = journal.read_text().splitlines()[:-1] if journal.exists() else []
        await daemon.kill_worker("worker-1")
        killed_at = len(journal.read_text().splitlines()) if journal.exists() else 0
        await daemon.start_worker("worker-2")
        assert (await handle.result()).outputs.written == 10
    lines = journal.read_text().splitlines()
    assert len(set(lines)) == 10
    assert len(lines) <= 11
    assert not set(checkpointed) & set(lines[killed_at:])
    assert steps_in_order(lines)


async def test_an_unfinished_step_keeps_its_idempotency_key(tmp_path: Path) -> None:
    """Three workers die in the middle of one step: four attempts, one key."""
    file = tmp_path / "begun"
    async with LocalDaemon(workers=1) as daemon:
        handle = await daemon.controller.launch(workflows.Endless, {"begun": str(file)})
        for number in range(1, 4):
            await file_has(file, 2 * number - 1)
            await daemon.kill_worker(f"worker-{number}")
            await daemon.start_worker(f"worker-{number + 1}")
        attempts = (await file_has(file, 7))[::2]
        await until(handle, lambda row: (row.owner or "").startswith("worker-4"))
        await handle.kill()
    assert len(attempts) == 4
    assert set(attempts) == {f"{handle.pid}:1"}
