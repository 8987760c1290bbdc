"""G9: credits, sizes and queues have bounds, and each bound says what happens there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from prunus import errors
from prunus.messaging.communicator import MAX_BODY_BYTES
from prunus.persistence.persister import QUERY_LIMIT, Query
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import workflows
from tests.runtime.waiting import file_has


async def test_a_worker_never_holds_more_than_its_slots(tmp_path: Path) -> None:
    """Ten endless processes, three slots: three have begun, seven wait in the queue."""
    file = tmp_path / "begun"
    async with LocalDaemon(workers=1, slots=3) as daemon:
        handles = [await daemon.controller.launch(workflows.Endless, {"begun": str(file)}) for _ in range(10)]
        await file_has(file, 3)
        statistics = await daemon.controller.broker_statistics()
        assert list(statistics["held"].values()) == [3]
        assert statistics["pending"] == {"default": 7}
        assert statistics["delivered"] == 3, "more are not even offered"
        await asyncio.gather(*(handle.kill() for handle in handles))


async def test_an_input_that_is_too_large_is_refused_before_it_is_sent() -> None:
    """The size and the limit are named, and nothing is launched."""
    async with LocalDaemon() as daemon:
        with pytest.raises(errors.MessageTooLargeError) as caught:
            await daemon.controller.launch(workflows.Journal, {"file": "x" * (MAX_BODY_BYTES + 2**21)})
        assert caught.value.size > caught.value.limit
        assert not await daemon.controller.find()


async def test_a_body_of_one_byte_too_many_is_refused() -> None:
    """Of a task, a question, a broadcast and a call: before it is sent, and with the same limit."""
    async with LocalDaemon(workers=0) as daemon:
        communicator = daemon.controller._backend.communicator
        body = bytes(MAX_BODY_BYTES + 1)
        sends = [
            communicator.task_send(body),
            communicator.rpc_send("nobody", body),
            communicator.broadcast_send(body),
            communicator.call([body]),
        ]
        for send in sends:
            with pytest.raises(errors.MessageTooLargeError) as caught:
                await send
            assert (caught.value.size, caught.value.limit) == (MAX_BODY_BYTES + 1, MAX_BODY_BYTES)


async def test_a_query_has_a_limit() -> None:
    """More than the bound can't be asked for at once."""
    async with LocalDaemon() as daemon:
        with pytest.raises(ValueError, match=str(QUERY_LIMIT)):
            await daemon.controller.find(Query(limit=QUERY_LIMIT + 1))
