"""When there is nothing left to do, by the counts of the broker."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from prunus.errors import ConnectionLostError, TaskRejectedError
from prunus.messaging.communicator import IncomingTask
from prunus.messaging.inventory import QueueLimits, QueueStatistics
from prunus.messaging.local import LocalBroker
from prunus.runtime.idle import busy_queues, until_idle
from tests.runtime import brokers

STOPPED = QueueLimits(concurrency=0)


@pytest.mark.parametrize(
    ("counts", "is_busy"),
    [
        ({}, False),
        ({"dead": 3, "settled": 9}, False),
        ({"ready": 1}, True),
        ({"held": 1}, True),
        ({"blocked": 1}, True),
        ({"delayed": 1}, True),
        ({"ready": 5, "limits": STOPPED}, False),
        ({"ready": 5, "held": 1, "limits": STOPPED}, True),
    ],
)
def test_a_queue_is_busy_while_somebody_works_in_it_or_could(counts: dict[str, Any], is_busy: bool) -> None:
    """Of a queue whose concurrency is 0 nobody can take anything."""
    statistics = brokers.status(queues={"gpu": QueueStatistics(**counts), "other": QueueStatistics(ready=9)})
    assert busy_queues(statistics, ["gpu", "unheard-of"]) == (["gpu"] if is_busy else [])


async def test_work_in_any_hands_is_waited_for_and_its_end_is_noticed() -> None:
    """Also that of another worker; a queue that was not named counts for nothing."""
    broker = LocalBroker()
    began, may_end = asyncio.Event(), asyncio.Event()

    async def work(task: IncomingTask) -> None:
        began.set()
        await may_end.wait()

    try:
        async with await broker.connect() as worker, await broker.connect() as me:
            await me.task_send(b"", queue="another")
            await me.task_send(b"", queue="gpu")
            waiting = asyncio.create_task(until_idle(me, ["gpu"], 0.0))
            await worker.add_task_subscriber(work, queue="gpu")
            await began.wait()
            assert not waiting.done()
            may_end.set()
            await waiting
    finally:
        broker.close()


async def test_what_is_put_off_for_long_is_not_waited_for() -> None:
    """A task that is due in an hour, but not one that is due within the grace."""
    broker = LocalBroker()
    try:
        async with await broker.connect() as me:
            await me.task_send(b"", queue="gpu", not_before=datetime.now(UTC) + timedelta(hours=1))
            await until_idle(me, ["gpu"], 0.0)
            waiting = asyncio.create_task(until_idle(me, ["gpu"], 7200.0))
            statistics = (await me.statistics()).queues["gpu"]
            assert statistics.delayed == 1
            assert not waiting.done()
            waiting.cancel()
    finally:
        broker.close()


async def test_a_task_that_was_rejected_is_work() -> None:
    """It comes back within seconds, and nobody waits for that in vain."""
    broker, attempts = LocalBroker(), list[int]()

    async def work(task: IncomingTask) -> None:
        attempts.append(task.attempt)
        if task.attempt < 5:
            raise TaskRejectedError("not now")

    try:
        async with await broker.connect() as me:
            await me.add_task_subscriber(work, queue="gpu")
            await me.task_send(b"", queue="gpu")
            await until_idle(me, ["gpu"], 0.0)
            assert attempts == [1, 2, 3, 4, 5]
    finally:
        broker.close()


async def test_a_broker_that_is_away_is_no_idleness() -> None:
    """Nobody knows what there is to do; and with work in hand it is not even asked."""

    class Away:
        asked = 0

        async def statistics(self) -> Any:
            self.asked += 1
            if self.asked < 3:
                raise ConnectionLostError("ipc:///nowhere")
            return brokers.status(queues={})

    away, hands = Away(), [True, True, False]
    await until_idle(away, ["gpu"], 0.0, has_work=lambda: hands.pop(0) if len(hands) > 1 else False)  # type: ignore[arg-type]
    assert away.asked == 3
