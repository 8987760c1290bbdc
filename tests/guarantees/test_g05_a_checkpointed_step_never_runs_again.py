"""G5: a checkpointed step never runs again; an unfinished one may, under the same idempotency key.

Steps write their idempotency keys into a file, so the file says what ran how often.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from prunus import errors
from prunus.persistence.persister import Query
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.audit import nth_commit
from tests.guarantees.real_daemon import RealDaemon, steps_in_order
from tests.runtime import features, workflows
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
        count, reached = nth_commit(commit)
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


@pytest.mark.parametrize("commit", range(2, 14, 2))
async def test_messages_are_used_once_whenever_a_worker_dies(tmp_path: Path, commit: int) -> None:
    """After any commit of a process that takes three of them: each is used once, and in its order."""
    journal = tmp_path / "journal"
    async with LocalDaemon(workers=1) as daemon:
        count, reached = nth_commit(commit)
        handle = await daemon.controller.launch(features.Ledger, {"file": str(journal), "count": 3})
        daemon.broker.exchange.failpoint = count
        for number in range(3):
            await handle.send("entry", number)
        await reached.wait()
        await daemon.kill_worker("worker-1")
        await daemon.start_worker("worker-2")
        assert (await handle.result()).outputs.entries == [0, 1, 2]
    lines = journal.read_text().splitlines()
    assert len(set(lines)) == 3
    assert len(lines) <= 4
    assert steps_in_order(lines)


async def test_attempts_are_counted_across_restarts() -> None:
    """Broker and worker die between two attempts: there are as many as the policy says, and no more."""
    features.Stubborn.keys.clear()
    ahead_s = 0.0
    async with LocalDaemon(clock=lambda: time.time() + ahead_s) as daemon:
        handle = await daemon.controller.launch(features.Stubborn)
        for attempt, interval_s in ((1, 3600), (2, 3 * 3600)):
            await until(handle, lambda row: row.state == "waiting" and row.owner is None)
            assert len(features.Stubborn.keys) == attempt
            await daemon.kill_worker(f"worker-{attempt}")
            daemon.broker.restart()
            await daemon.start_worker(f"worker-{attempt + 1}")
            ahead_s = interval_s + 1.0
            daemon.broker.tick()
        with pytest.raises(errors.ProcessExceptedError, match="attempt 3"):
            await handle.result()
        notes = [event.note or "" for event in await handle.history() if event.note]
    assert features.Stubborn.keys == [f"{handle.pid}:1"] * 3
    assert [note.partition(" failed")[0] for note in notes if note.startswith("attempt")] == [
        "attempt 1 of 3",
        "attempt 2 of 3",
        "attempt 3",
    ]


@pytest.mark.timeout(60)
async def test_an_effect_that_its_worker_died_in_is_not_repeated(short_folder: Path) -> None:
    """SIGKILL of a real worker in the step, with and without a way to find out: one effect each.

    The intent was durable before the step began, so the next worker does not take the step for one that never ran.
    """
    blind, seeing = short_folder / "blind", short_folder / "seeing"
    async with RealDaemon(short_folder, workers=1) as daemon:
        charge = await daemon.controller.launch(features.Charge, {"file": str(blind)})
        look = await daemon.controller.launch(features.ChargeAndLook, {"file": str(seeing)})
        await file_has(blind, 1)
        await file_has(seeing, 1)
        daemon.kill("worker-1")
        daemon.start("worker-2")
        assert (await look.result()).value == "found", daemon.logs()
        record = await until(charge, lambda row: row.play == "paused")
        assert "the step run began and nobody saw it end" in (record.status or "")
        await charge.settle("charged by hand")
        assert (await charge.result()).value == "charged by hand"
    assert blind.read_text().splitlines() == [f"{charge.pid}:1"]
    assert seeing.read_text().splitlines() == [f"{look.pid}:1"]
