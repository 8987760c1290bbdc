"""G6: the caller chooses the pid; a launch that is said again continues what is there."""

from __future__ import annotations

import asyncio

from prunus.processes.pids import new_pid
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import workflows


async def test_ten_launches_of_one_pid_are_one_process() -> None:
    """All get the handle of the same process, which ran once."""
    async with LocalDaemon(workers=2) as daemon:
        pid = new_pid()
        launches = (daemon.controller.launch(workflows.Add, {"a": number}, pid=pid) for number in range(10))
        handles = await asyncio.gather(*launches)
        results = await asyncio.gather(*(handle.result() for handle in handles))
        assert len({result.outputs.sum for result in results}) == 1
        assert len(await daemon.controller.find()) == 1
        history = await handles[0].history()
    assert [event.subject for event in history].count("running.finished") == 1


async def test_pids_are_in_the_order_of_their_making() -> None:
    """A pid is a UUIDv7: sorting by it sorts by time."""
    pids = [new_pid() for _ in range(1000)]
    assert pids == sorted(pids)
    assert len(set(pids)) == 1000
