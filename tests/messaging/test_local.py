"""The communicator without a network, and what happens around a restart and a death."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import pytest

from prunus.errors import CommunicatorClosedError, DuplicateSubscriberError
from prunus.messaging.arguments import MAX_PEER_NAME_CHARS
from prunus.messaging.communicator import Communicator, IncomingTask
from prunus.messaging.inventory import QueueLimits
from prunus.messaging.local import LocalBroker, LocalCommunicator
from prunus.testing import CommunicatorContract, ContractService
from prunus.testing.communicator_contract import Inbox, TakeForDead, echo

Connect = Callable[[], Awaitable[LocalCommunicator]]


class TestLocalCommunicator(CommunicatorContract):
    @pytest.fixture
    async def connect(self, peers: Connect) -> Connect:
        return peers

    @pytest.fixture
    async def take_for_dead(self, broker: LocalBroker) -> TakeForDead:
        async def take_for_dead(peer: Communicator) -> None:
            broker.expire(peer.session)

        return take_for_dead


async def test_a_session_is_known_by_its_process(peers: Connect) -> None:
    """Statistics say in which operating system process a peer lives."""
    peer = await peers()
    assert (await peer.statistics()).sessions[peer.session].pid == os.getpid()


async def test_misuse_is_refused_with_what_to_do(peers: Connect) -> None:
    """The contract wants the type of the error and the name of what is wrong; these are our words."""
    peer = await peers()
    for misuse, words in (
        (peer.task_send(b"", not_before=datetime(2030, 1, 1)), "time zone"),
        (peer.requeue(), "say which tasks to requeue"),
        (peer.tasks(limit=0), "ask for the next with `after`"),
        (peer.rpc_send("name", b"", timeout_s=-1.0), "a time-out is from 0 to"),
    ):
        with pytest.raises(ValueError, match=words):
            await misuse


class Text(str):
    __slots__ = ()


class Bytes(bytes):
    __slots__ = ()


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda one: one.rpc_send("name", b"", timeout_s=None), "a time-out is from 0 to 1e\\+09 seconds, not None"),
        (lambda one: one.rpc_send(Text("name"), b""), "a plain text, not of the type Text; give str"),
        (lambda one: one.add_rpc_subscriber(echo, Text("name")), "a plain text"),
        (lambda one: one.add_task_subscriber(echo, queue=Text("name")), "a plain text"),
        (lambda one: one.next_task(queue=Text("name"), timeout_s=0.0), "a plain text"),
        (lambda one: one.next_task(timeout_s="1"), "a time-out is a number of seconds, or None for no end, not '1'"),
        (lambda one: one.next_task(timeout_s=float("nan")), "a time-out is a number of seconds"),
        (lambda one: one.task_send(b"", not_before="2030-01-01"), "not_before is a datetime with a time zone"),
        (lambda one: one.task_send(b"", resources=["gpu"]), "resources are a mapping"),
        (lambda one: one.call([], acks=["task"]), "as they came to a handler or from next_task, not 'task'"),
        (lambda one: one.configure_queue("q", None), "are a QueueLimits, not None"),
        (lambda one: one.configure_queue("q", QueueLimits(rate_per_s=0)), "rate_per_s is 0; it must be more than 0"),
        (lambda one: one.configure_queue("q", QueueLimits(rate_per_s=-1.0)), "rate_per_s is -1.0"),
        (lambda one: one.configure_queue("q", QueueLimits(rate_per_s=float("nan"))), "rate_per_s is nan"),
        (lambda one: one.configure_queue("q", QueueLimits(rate_per_s=float("inf"))), "rate_per_s is inf"),
        (lambda one: one.configure_queue("q", QueueLimits(rate_per_s="5")), r"no limits of a queue.*rate_per_s"),
        (lambda one: one.configure_queue("q", QueueLimits(burst=0)), "burst is 0; it must be from 1 to 2,000,000"),
        (lambda one: one.configure_queue("q", QueueLimits(burst=2**70)), "burst is 1180591620717411303424; it must be"),
        (lambda one: one.configure_queue("q", QueueLimits(burst=1.5)), "burst is a whole number, not 1.5"),
        (lambda one: one.configure_queue("q", QueueLimits(concurrency=-1)), "concurrency is a whole number from 0 on"),
        (lambda one: one.configure_queue("q", QueueLimits(max_length=2**70)), "max_length is a whole number from 0 on"),
    ],
)
async def test_what_is_of_another_type_is_refused_and_leaves_nothing(
    peers: Connect, use: Callable[[Any], Awaitable[object]], words: str
) -> None:
    """With what is wrong, before anybody else hears of it; the communicator goes on."""
    peer = await peers()
    with pytest.raises((ValueError, TypeError), match=words):
        await use(peer)
    assert (await peer.statistics()).sessions[peer.session].pid == os.getpid()


async def test_misuse_of_what_is_in_hand_leaves_it_in_hand(peers: Connect) -> None:
    """Wrong words for its end do not end a task; a callback that is none is not registered."""
    peer = await peers()
    receipt = await peer.task_send(b"1", want_result=True)
    task = await peer.next_task()
    for misuse in (task.reject(None), task.fail("no"), task.fail(ValueError), task.acknowledge("1")):  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"a text, not None|with an exception|a body is bytes"):
            await misuse
    with pytest.raises(TypeError, match="a callback is a function"):
        peer.on_reconnect(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="nobody awaits it: make it a plain function"):
        peer.on_reconnect(peer.close)
    with pytest.raises(TypeError, match="nobody awaits it: make it a plain function"):
        await peer.add_broadcast_subscriber(print, on_missed=echo)  # type: ignore[arg-type]
    await task.acknowledge(Bytes(b"42"))
    assert await receipt.result() == b"42"


async def test_bytes_of_a_subclass_are_bytes(peers: Connect) -> None:
    """As numpy has one: as a body, as an answer, as the result of a task."""
    peer, other = await peers(), await peers()

    async def answer(question: bytes) -> bytes:
        return Bytes(question + b"!")

    async def change_it_then(task: IncomingTask) -> bytes:
        buffer = bytearray(task.body)
        asyncio.get_running_loop().call_soon(buffer.clear)
        return buffer  # type: ignore[return-value]

    await peer.add_rpc_subscriber(answer, "name")
    await peer.add_task_subscriber(change_it_then, queue="buffers")
    assert await (await other.task_send(b"1", queue="buffers", want_result=True)).result() == b"1", "as it was then"
    await peer.add_task_subscriber(lambda task: Bytes(task.body))
    assert await other.rpc_send("name", Bytes(b"1")) == b"1!"
    receipt = await other.task_send(Bytes(b"2"), want_result=True)
    assert await receipt.result() == b"2"
    assert await other.rpc_send("name", b"3") == b"3!"


@pytest.mark.parametrize("name", ["worker 1", "J\xf6rg", "a" * 168, "\ud800", "a/b", "a\n"])
async def test_a_name_that_no_session_can_have_is_refused(broker: LocalBroker, name: str) -> None:
    """Before anything is said, with what a name is."""
    with pytest.raises(ValueError, match="the name of a peer is made of the letters A to Z and a to z, digits"):
        await broker.connect(name)


async def test_a_name_is_a_text(broker: LocalBroker) -> None:
    """As long as there is room for what makes a session unique."""
    for wrong in (5, None, b"name"):
        with pytest.raises(TypeError, match="the name of a peer is a text"):
            await broker.connect(wrong)  # type: ignore[arg-type]
    async with await broker.connect("a" * MAX_PEER_NAME_CHARS) as peer:
        assert peer.session in (await peer.statistics()).sessions


async def test_what_is_seen_of_a_peer(broker: LocalBroker) -> None:
    """Who it is, to what it is subscribed, and whether that is over."""
    peer = await broker.connect("ann")
    subscriptions = [
        await peer.add_task_subscriber(echo, queue="q", credit=3, subject="a.*"),  # type: ignore[arg-type]
        await peer.add_rpc_subscriber(echo, "name"),
        await peer.add_broadcast_subscriber(print, subject="news"),
        await peer.add_broadcast_subscriber(print),
    ]
    shown = [
        f"<TaskSubscription 'q', subject 'a.*', credit 3 of {peer.session}>",
        f"<RpcSubscription 'name' of {peer.session}>",
        f"<BroadcastSubscription subject 'news' of {peer.session}>",
        f"<BroadcastSubscription all of {peer.session}>",
    ]
    assert list(map(repr, subscriptions)) == shown
    await subscriptions[0].cancel()
    await subscriptions[1].cancel()
    assert [repr(one).endswith(", cancelled>") for one in subscriptions] == [True, True, False, False]
    assert repr(peer) == f"<LocalCommunicator {peer.session} at local>"
    await peer.close()
    assert repr(peer) == f"<LocalCommunicator {peer.session} at local, closed>"
    assert all(repr(one).endswith(", cancelled>") for one in subscriptions)


async def test_who_has_a_name_already_is_said(peers: Connect) -> None:
    """This communicator, or somebody else."""
    peer, other = await peers(), await peers()
    await peer.add_rpc_subscriber(echo, "name")
    with pytest.raises(DuplicateSubscriberError, match="this communicator is subscribed as 'name' already; cancel"):
        await peer.add_rpc_subscriber(echo, "name")
    with pytest.raises(DuplicateSubscriberError, match="somebody else is subscribed as 'name'"):
        await other.add_rpc_subscriber(echo, "name")


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
