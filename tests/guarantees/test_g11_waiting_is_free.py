"""G11: a process that waits holds no slot, no task and no memory: it is a row with a registered wake-up."""

from __future__ import annotations

import asyncio
import gc

from prunus import Process
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import workflows
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
