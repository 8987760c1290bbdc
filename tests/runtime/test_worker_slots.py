"""Which worker gets which process: queues, slots, and workers that come later."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, ClassVar

from prunus import Continue, Process, step
from prunus.runtime.controller import ProcessHandle
from prunus.runtime.walltime import Walltime
from prunus.runtime.worker import Worker
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime.waiting import until


class Gated(Process):
    """Goes through a gate when the test opens it. `begun` has the pids in the order in which they began."""

    gate: ClassVar[asyncio.Event]
    begun: ClassVar[asyncio.Queue[str]]

    async def run(self) -> None:
        self.begun.put_nowait(self.pid)
        await self.gate.wait()


class Slow(Process):
    """Its second step may take an hour, and says so."""

    async def run(self) -> Continue:
        return Continue(self.dig)

    @step(timeout=3600)
    async def dig(self) -> None:
        return None


class SlowAtOnce(Process):
    @step(timeout=3600)
    async def run(self) -> None:
        return None


@asynccontextmanager
async def gated(**options: Any) -> AsyncIterator[LocalDaemon]:
    """A daemon without workers, and a closed gate, which is open at the end."""
    Gated.gate, Gated.begun = asyncio.Event(), asyncio.Queue()
    async with LocalDaemon(workers=0, **options) as daemon:
        try:
            yield daemon
        finally:
            Gated.gate.set()


@asynccontextmanager
async def working(daemon: LocalDaemon, name: str, slots: int, **options: Any) -> AsyncIterator[Worker]:
    """One more worker; stopped at the end."""
    async with await daemon.broker.connect(name=name) as communicator:
        worker = Worker(communicator, slots=slots, grace_s=0.0, **options)
        running = asyncio.create_task(worker.run())
        await worker.ready.wait()
        try:
            yield worker
        finally:
            worker.stop()
            await running


async def launched(daemon: LocalDaemon, count: int, **options: Any) -> list[ProcessHandle]:
    return [await daemon.controller.launch(Gated, **options) for _ in range(count)]


async def holders(handles: list[ProcessHandle]) -> Counter[str]:
    """How many of these each worker has."""
    owners = [(await handle.record()).owner for handle in handles]
    return Counter(owner.rpartition("-")[0] for owner in owners if owner)


async def begun(count: int) -> list[str]:
    return [await Gated.begun.get() for _ in range(count)]


async def test_all_queues_of_a_worker_share_its_slots() -> None:
    """Two slots, two queues full of work: it has two, and the broker the others, ready for anybody."""
    async with gated() as daemon:
        await launched(daemon, 3, queue="gpu")
        await launched(daemon, 3)
        async with working(daemon, "worker-1", 2, queues=("gpu", "default")):
            await begun(2)
            statistics = (await daemon.controller._backend.communicator.statistics()).queues
            assert (statistics["gpu"].held, statistics["gpu"].ready) == (2, 1)
            assert (statistics["default"].held, statistics["default"].ready) == (0, 3)
            Gated.gate.set()
            await begun(4)


async def test_either_queue_may_fill_all_slots_and_the_first_named_goes_first() -> None:
    """While there is nothing for the gpu, all slots do other work; when one is free, a late gpu process is first."""
    async with gated() as daemon:
        others = await launched(daemon, 4)
        async with working(daemon, "worker-1", 2, queues=("gpu", "default")):
            first = await begun(2)
            [urgent] = await launched(daemon, 1, queue="gpu")
            await next(one for one in others if one.pid == first[0]).kill()
            assert await begun(1) == [urgent.pid]


async def test_a_worker_takes_nothing_of_other_queues() -> None:
    """It waits for one that does."""
    async with gated() as daemon:
        [elsewhere] = await launched(daemon, 1, queue="gpu")
        async with working(daemon, "worker-1", 4):
            [here] = await launched(daemon, 1)
            assert await begun(1) == [here.pid]
            assert (await elsewhere.record()).owner is None
            async with working(daemon, "worker-2", 4, queues=("gpu",)):
                assert await begun(1) == [elsewhere.pid]


async def test_full_slots_are_in_nobodys_way_who_calls() -> None:
    """Letters to processes that nobody holds have a lane of their own."""
    async with gated() as daemon, working(daemon, "worker-1", 1, queues=("gpu", "default")):
        await launched(daemon, 1, queue="gpu")
        await begun(1)
        [waiting] = await launched(daemon, 1)
        await waiting.pause("not now")
        assert (await waiting.record()).play == "paused"


async def test_a_worker_that_comes_later_gets_what_is_queued_at_once() -> None:
    """The first one has fetched nothing ahead."""
    async with gated() as daemon:
        handles = await launched(daemon, 6)
        async with working(daemon, "worker-1", 2):
            await begun(2)
            assert await holders(handles) == {"worker-1": 2}
            async with working(daemon, "worker-2", 4):
                await begun(4)
                assert await holders(handles) == {"worker-1": 2, "worker-2": 4}
                Gated.gate.set()


async def test_free_slots_go_to_the_least_loaded_worker() -> None:
    """Two new processes go to the worker that has none, though the other has room as well."""
    async with gated() as daemon, working(daemon, "worker-1", 4):
        await launched(daemon, 2)
        await begun(2)
        async with working(daemon, "worker-2", 4):
            new = await launched(daemon, 2)
            await begun(2)
            assert await holders(new) == {"worker-2": 2}
            even = await launched(daemon, 4)
            await begun(4)
            assert await holders(even) == {"worker-1": 2, "worker-2": 2}
            Gated.gate.set()


# --- its time ---------------------------------------------------------------------------------------


async def test_what_can_not_end_in_time_is_left_to_others_untouched() -> None:
    """A step that may take an hour, a worker that has a minute: it is not even claimed; another worker runs it."""
    async with gated() as daemon:
        long = await daemon.controller.launch(SlowAtOnce)
        short_of_time = Walltime(ends_at=200.0, drain_at=100.0)
        async with working(daemon, "worker-1", 4, walltime=short_of_time, clock=lambda: 40.0):
            [short] = await launched(daemon, 1)
            await begun(1)
            tasks = await rejected(daemon, long.pid)
            assert "may take longer than is left" in (tasks.reason or "")
            assert "claimed" not in [event.subject for event in await long.history()]
            async with working(daemon, "worker-2", 4):
                await long.result()
            assert {event.by.rpartition("-")[0] for event in await long.history() if event.subject == "claimed"} == {
                "worker-2"
            }
            Gated.gate.set()
            await short.result()


async def rejected(daemon: LocalDaemon, pid: str) -> Any:
    """The task of a process as soon as a worker did not want it."""
    communicator = daemon.controller._backend.communicator
    while True:
        found = await communicator.tasks(key=pid)
        if found and found[0].reason:
            return found[0]
        await asyncio.sleep(0.01)


async def test_a_process_in_hand_is_given_back_before_a_step_that_does_not_fit() -> None:
    """The steps before it are checkpointed, and not run again."""
    async with gated() as daemon:
        handle = await daemon.controller.launch(Slow)
        async with working(daemon, "worker-1", 4, walltime=Walltime(200.0, 100.0), clock=lambda: 40.0):
            record = await until(handle, lambda row: row.step == "dig" and row.owner is None)
            assert record.state == "running"
            await rejected(daemon, handle.pid)
        async with working(daemon, "worker-2", 4):
            await handle.result()


async def test_a_worker_whose_time_is_over_stops_by_itself() -> None:
    """Its processes are given back, and a worker with more time goes on with them."""
    async with gated() as daemon:
        handles = await launched(daemon, 2)
        now = [0.0]
        async with await daemon.broker.connect(name="worker-1") as communicator:
            worker = Worker(
                communicator, slots=4, grace_s=30.0, walltime=Walltime(ends_at=0.6, drain_at=0.1), clock=lambda: now[0]
            )
            running = asyncio.create_task(worker.run())
            await begun(2)
            now[0] = 0.3
            await running
            assert worker.ended == "walltime"
        assert not await holders(handles)
        async with working(daemon, "worker-2", 4):
            await begun(2)
            Gated.gate.set()
            await asyncio.gather(*(handle.result() for handle in handles))


async def test_a_second_word_ends_the_grace() -> None:
    """The first one lets steps end, however long that takes; the second one gives back at once what runs."""
    async with gated() as daemon:
        handles = await launched(daemon, 1)
        async with await daemon.broker.connect(name="worker-1") as communicator:
            worker = Worker(communicator, slots=4, grace_s=86_400.0)
            running = asyncio.create_task(worker.run())
            await begun(1)
            worker.signalled()
            _, still = await asyncio.wait((running,), timeout=0.05)
            assert still
            worker.signalled()
            await running
        assert (await handles[0].record()).owner is None
        async with working(daemon, "worker-2", 1):
            assert await begun(1) == [handles[0].pid]
            Gated.gate.set()
