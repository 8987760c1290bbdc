"""The communicator without a network, and what happens around a restart and a death."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable

import pytest

from prunus.errors import CommunicatorClosedError
from prunus.messaging.local import LocalBroker, LocalCommunicator
from prunus.testing.communicator_contract import CommunicatorContract, ContractService, Inbox, echo

Connect = Callable[[], Awaitable[LocalCommunicator]]


class TestLocalCommunicator(CommunicatorContract):
    @pytest.fixture
    async def connect(self, peers: Connect) -> Connect:
        return peers


async def test_nothing_is_lost_in_a_restart(broker: LocalBroker, peers: Connect) -> None:
    """After a restart tasks in hand stay in hand, pending ones come, names and filters are known again."""
    sender, worker = await peers(), await peers()
    inbox = Inbox()
    heard: asyncio.Queue[object] = asyncio.Queue()
    up = asyncio.Event()
    sender.on_reconnect(up.set)
    await worker.add_task_subscriber(inbox)
    await worker.add_rpc_subscriber(echo, "echo")
    await sender.add_broadcast_subscriber(heard.put)
    first = await sender.task_send(b"1", want_result=True)
    await sender.task_send(b"2")
    held = await inbox.next()
    broker.restart()
    assert await sender.rpc_send("echo", b"x") == b"x"
    await up.wait()
    await worker.broadcast_send(b"hello")
    await heard.get()
    inbox.ack(held, b"one")
    assert await first.result() == b"one"
    following = await inbox.next()
    assert (following.body, following.attempt) == (b"2", 1)
    assert following.epoch > held.epoch


async def test_requests_in_flight_survive_a_restart(broker: LocalBroker, peers: Connect) -> None:
    """What was asked before the restart and not answered is asked again, and done once."""
    sender, worker = await peers(), await peers()
    inbox = Inbox()
    sending = [asyncio.create_task(sender.task_send(b"%d" % number)) for number in range(50)]
    calling = [asyncio.create_task(sender.call([b"add %d" % number])) for number in range(50)]
    await asyncio.sleep(0)
    broker.restart()
    receipts = await asyncio.gather(*sending)
    await asyncio.gather(*calling)
    assert len({receipt.id for receipt in receipts}) == 50
    [words] = await worker.call([b"words"])
    assert sorted(words.split(), key=int) == [b"%d" % number for number in range(50)]
    await worker.add_task_subscriber(inbox, credit=100)
    assert {(await inbox.next()).id for _ in range(50)} == {receipt.id for receipt in receipts}
    assert inbox.came.empty()


async def test_the_dead_give_their_tasks_back(broker: LocalBroker, peers: Connect) -> None:
    """A killed peer says nothing more; its task goes to another at once."""
    sender, worker, other = await peers(), await peers(), await peers()
    inbox, theirs = Inbox(), Inbox()
    await worker.add_task_subscriber(inbox)
    await sender.task_send(b"1")
    held = await inbox.next()
    await other.add_task_subscriber(theirs)
    assert isinstance(worker, type(other))
    broker.kill(worker)  # type: ignore[arg-type]
    again = await theirs.next()
    assert (again.id, again.attempt) == (held.id, 2)
    with pytest.raises(CommunicatorClosedError):
        await worker.task_send(b"")


async def test_a_closed_broker_takes_nobody() -> None:
    """`connect` to a broker that was closed is refused; `close` is idempotent."""
    broker = LocalBroker()
    broker.close()
    broker.close()
    with pytest.raises(CommunicatorClosedError):
        await broker.connect()


async def test_a_moved_clock_is_looked_at_when_a_test_says_so() -> None:
    """A timer that is days away fires at once when the clock of the service has moved; also after a restart."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    wall = 0.0
    broker = LocalBroker(connection, service=ContractService(connection, clock=lambda: wall))
    async with await broker.connect() as communicator:
        inbox = Inbox()
        await communicator.add_task_subscriber(inbox, credit=2)
        await communicator.call([b"timer 86400 default"])
        broker.tick()
        assert inbox.came.empty()
        wall += 86400
        broker.tick()
        assert (await inbox.next()).body == b"made by a timer"
        await communicator.call([b"timer 86400 default"])
        wall += 86400
        broker.restart()
        assert (await inbox.next()).body == b"made by a timer"
    broker.close()
    connection.close()
