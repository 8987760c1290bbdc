"""G11: a process that waits holds no slot, no task and no memory: it is a row with a registered wake-up."""

from __future__ import annotations

import asyncio
import gc
import time

from prunus import Process
from prunus.persistence.persister import Query
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import features, workflows
from tests.runtime.waiting import until

COUNT = 100


async def test_parked_processes_leave_nothing_in_the_worker() -> None:
    """A hundred parked processes and one slot: no task of the broker, no asyncio task, no object of theirs is left."""
    async with LocalDaemon(workers=1, slots=1) as daemon:
        first = await daemon.controller.launch(workflows.Ask)
        await until(first, lambda row: row.state == "waiting" and row.owner is None)
        before, others = len(asyncio.all_tasks()), processes()
        handles = [await daemon.controller.launch(workflows.Ask) for _ in range(COUNT)]
        for handle in handles:
            await until(handle, lambda row: row.state == "waiting" and row.owner is None)
        [tasks] = daemon.connection.execute("SELECT count(*) FROM broker_task").fetchone()
        assert tasks == 0
        assert len(asyncio.all_tasks()) <= before + 1
        assert processes() <= others
        for handle in handles:
            await handle.resume("go")
        results = await asyncio.gather(*(handle.result() for handle in handles))
        assert {result.outputs.answer for result in results} == {"go"}


def processes() -> set[int]:
    """The process objects that are alive."""
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if isinstance(thing, Process)}


async def test_many_waiting_parents_and_one_slot() -> None:
    """Each parent has children; if a waiting parent held the slot, none would ever end.

    A slot that becomes free is taken by the next task in the same commit: no worker ever sends a task away.
    """
    async with LocalDaemon(workers=1, slots=1) as daemon:
        handles = [await daemon.controller.launch(workflows.Fan, {"count": 2}) for _ in range(COUNT)]
        results = await asyncio.gather(*(handle.result() for handle in handles))
        statistics = await daemon.controller.broker_statistics()
    assert {result.outputs.total for result in results} == {3}
    assert statistics["delivered"] == statistics["settled"]


async def test_those_that_wait_for_a_time_or_a_message_leave_nothing_in_the_worker() -> None:
    """Rows with a time or with names: no task, no object; at their time, or with the message, they go on."""
    ahead_s = 0.0
    async with LocalDaemon(workers=1, slots=1, clock=lambda: time.time() + ahead_s) as daemon:
        first = await daemon.controller.launch(features.Nap, {"seconds": 3600.0})
        await until(first, lambda row: row.state == "waiting" and row.owner is None)
        before, others = len(asyncio.all_tasks()), processes()
        naps = [await daemon.controller.launch(features.Nap, {"seconds": 3600.0}) for _ in range(COUNT)]
        reviews = [await daemon.controller.launch(features.Review) for _ in range(COUNT)]
        for handle in (*naps, *reviews):
            await until(handle, lambda row: row.state == "waiting" and row.owner is None)
        [tasks] = daemon.connection.execute("SELECT count(*) FROM broker_task").fetchone()
        assert tasks == 0
        assert len(asyncio.all_tasks()) <= before + 1
        assert processes() <= others
        for handle in reviews:
            await handle.send("approve", True)
        assert {(await handle.result()).value for handle in reviews} == {"approved"}
        assert {row.state for row in await daemon.controller.find(Query(class_id=NAP, limit=1000))} == {"waiting"}
        ahead_s = 3601.0
        daemon.broker.tick()
        assert {(await handle.result()).value for handle in naps} == {"awake"}


NAP = f"{features.Nap.__module__}:Nap"
