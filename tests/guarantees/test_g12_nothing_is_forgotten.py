"""G12: what has no task though it should is found and repaired when a broker starts.

(That each commit keeps the sentence true is in `test_g02_acked_means_ended_or_parked`.)
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest

from prunus.runtime.backend import Backend, missing_tasks
from prunus.runtime.runner import new_process
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.real_daemon import RealDaemon
from tests.runtime import features, workflows
from tests.runtime.waiting import file_has, until


@pytest.mark.timeout(60)
async def test_processes_whose_tasks_were_deleted_by_hand_complete(short_folder: Path) -> None:
    """Queued, held by a dead worker, and called: all their tasks are gone, and all of them go on."""
    journal = short_folder / "journal"
    async with RealDaemon(short_folder, workers=1, slots=1) as daemon:
        launch = daemon.controller.launch
        asked = await launch(workflows.Ask)
        await until(asked, lambda row: row.state == "waiting" and row.owner is None)
        held = await launch(workflows.Journal, {"file": str(journal), "steps": 20, "pace_s": 0.01})
        await file_has(journal, 2)
        queued = await launch(workflows.Add, {"a": 1})
        daemon.kill("worker-1")
        daemon.kill("broker")
        with sqlite3.connect(daemon.profile.database) as connection:
            [before] = connection.execute("SELECT count(*) FROM broker_task").fetchone()
            connection.execute("DELETE FROM broker_task")
        connection.close()
        assert before >= 2
        daemon.start("broker")
        daemon.start("worker-1")
        assert (await held.result()).outputs.written == 20, daemon.logs()
        assert (await queued.result()).outputs.sum == 2
        await asked.resume("still there")
        assert (await asked.result()).outputs.answer == "still there"


async def test_a_task_whose_claim_was_refused_is_not_done_with() -> None:
    """The disk is full for the moment of the claim: the process stays in the queue, and runs when there is space."""
    async with LocalDaemon() as daemon:
        exchange = daemon.broker.exchange
        held = "SELECT count(*) FROM broker_task WHERE holder IS NOT NULL"

        def fill_the_disk(failpoint: str) -> None:
            if failpoint == "after_commit" and daemon.connection.execute(held).fetchone() != (0,):
                exchange.refuse_changes = "/full"

        exchange.failpoint = fill_the_disk
        handle = await daemon.controller.launch(workflows.Add, {"a": 1})
        while any(queue["held"] for queue in (await daemon.controller.broker_statistics())["queues"].values()):
            assert (await handle.record()).epoch == 0, "nobody could claim it"
        exchange.failpoint = lambda failpoint: None
        exchange.refuse_changes = None
        assert (await handle.result()).outputs.sum == 2


async def test_a_process_that_nobody_was_told_of_is_found() -> None:
    """It is written into the database behind the broker's back; the reconciler gives it a task, and only it."""
    async with LocalDaemon() as daemon:
        parked = await daemon.controller.launch(workflows.Ask)
        await until(parked, lambda row: row.state == "waiting" and row.owner is None)
        daemon.store.create(new_process(workflows.Add({"a": 1}, pid="unknown")))
        missing = missing_tasks(daemon.store, daemon.broker.exchange.has_task)
        assert [task.key for task in missing] == ["unknown"]
        daemon.broker.put(*missing)
        assert (await daemon.controller.handle("unknown").result()).outputs.sum == 2
        assert missing_tasks(daemon.store, daemon.broker.exchange.has_task) == []


async def test_what_somebody_claimed_and_left_goes_to_others() -> None:
    """A claim without a task of the broker: when its owner goes, by itself or not, a worker gets the process."""
    async with LocalDaemon(workers=0) as daemon:
        handles = [await daemon.controller.launch(workflows.Add, {"a": number}) for number in range(2)]
        daemon.connection.execute("DELETE FROM broker_task")
        daemon.broker.restart()
        guests = [Backend(await daemon.broker.connect(name="guest")) for _ in handles]
        for guest, handle in zip(guests, handles, strict=True):
            await guest.persister.claim(handle.pid, guest.communicator.session, at=0.0)
        await guests[0].communicator.close()
        daemon.broker.expire(guests[1].communicator.session)
        await daemon.start_worker("worker-1")
        assert [(await handle.result()).outputs.sum for handle in handles] == [1, 2]
        await guests[1].communicator.close()


@pytest.mark.timeout(60)
async def test_timers_survive_a_restart_and_late_ones_fire_at_once(short_folder: Path) -> None:
    """The broker is dead when the first one ends, and another broker wakes both: the second one not before its time."""
    async with RealDaemon(short_folder, workers=1) as daemon:
        handles = [await daemon.controller.launch(features.Nap, {"seconds": seconds}) for seconds in (0.5, 3.5)]
        late, ahead = [
            await until(handle, lambda row: row.state == "waiting" and row.owner is None) for handle in handles
        ]
        assert late.wake_at is not None
        assert ahead.wake_at is not None
        daemon.kill("broker")
        while time.time() < late.wake_at:
            await asyncio.sleep(0.01)
        daemon.start("broker")
        assert (await handles[0].result()).value == "awake", daemon.logs()
        assert (await handles[1].result()).value == "awake", daemon.logs()
        woken = [
            next(event.at for event in await handle.history() if event.subject == "waiting.running")
            for handle in handles
        ]
    assert woken[0] < ahead.wake_at, "at once, and not with the next timer"
    assert woken[1] >= ahead.wake_at
