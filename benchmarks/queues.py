"""A million queued tasks: how fast they are taken, what they cost, how soon a broker with them serves again."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time

import psutil

from benchmarks.consumer import QUEUE
from benchmarks.messaging import BODY, READY_S, consumer
from benchmarks.run import Report
from benchmarks.services import Services
from prunus.messaging.communicator import Communicator
from prunus.messaging.connecting import connect_to

MILLION = 1_000_000
FEW = 1_000
SENDERS = 500
DISPATCHED = 30_000
"""Tasks whose dispatch is timed while the others wait."""
MOST_OF_FEW = 1.5
"""So many times as long as behind a few tasks may dispatch take behind a million."""
MOST_MIB = 600e6 / 2**20
"""What a broker with all of them may hold."""
LOOK_S = 0.005


async def measure(report: Report) -> None:
    few = await dispatch_per_s(FEW, report=None)
    report.add(f"dispatch of tasks, {FEW:,} others queued", few, "/s")
    many = await dispatch_per_s(MILLION, report)
    what = f"dispatch of tasks, {MILLION:,} others queued; peer: {FEW:,} queued"
    report.add(what, many, "/s", few, "Prunus", aim=1 / MOST_OF_FEW)


async def dispatch_per_s(queued: int, report: Report | None) -> float:
    """How many tasks of high priority are delivered and settled in a second, while `queued` others wait."""
    with Services() as services:
        broker = services.start("prunus.runtime.broker")
        endpoint = services.profile.endpoint
        async with await connect_to(endpoint, name="bench", timeout_s=READY_S) as communicator:
            begun = time.perf_counter()
            await send(communicator, queued, priority=0)
            if report is not None:
                report.add(
                    f"{queued:,} tasks queued, confirmed", queued / (time.perf_counter() - begun), "/s", limit=8000
                )
                memory = psutil.Process(broker.pid).memory_info().rss / 2**20
                report.add("memory of the broker with all of them", memory, "MiB", limit=MOST_MIB)
        if report is not None:
            broker.send_signal(signal.SIGKILL)
            broker.wait()
            begun = time.perf_counter()
            broker = services.start("prunus.runtime.broker")
            async with await connect_to(endpoint, name="bench", timeout_s=READY_S) as communicator:
                await communicator.statistics()
                taken_s = time.perf_counter() - begun
                report.add("broker killed and started, to its first answer", taken_s, "s", limit=10)
                memory = psutil.Process(broker.pid).memory_info().rss / 2**20
                report.add("memory of the broker then", memory, "MiB", limit=MOST_MIB)
        async with await connect_to(endpoint, name="bench", timeout_s=READY_S) as communicator:
            await send(communicator, DISPATCHED, priority=9)
            before = (await communicator.statistics()).settled
            begun = time.perf_counter()
            services.spawn(consumer("tasks", endpoint), "consumer")
            while (now := (await communicator.statistics()).settled) == before:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
            begun, before = time.perf_counter(), now
            while (now := (await communicator.statistics()).settled) - before < DISPATCHED - 2_000:  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)
            return (now - before) / (time.perf_counter() - begun)


async def send(communicator: Communicator, number: int, priority: int) -> None:
    count = itertools.count()

    async def sender() -> None:
        while next(count) < number:
            await communicator.task_send(BODY, queue=QUEUE, priority=priority)

    await asyncio.gather(*(sender() for _ in range(SENDERS)))
