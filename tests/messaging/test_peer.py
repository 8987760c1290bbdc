"""What lies between the wire and handlers: lost tasks, gaps, crossings between threads, and their bounds."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from prunus.errors import BusyError
from prunus.messaging import client, deliveries, handover, local
from prunus.messaging.communicator import IncomingTask
from prunus.messaging.handover import Callback, Crossing, Handler, Handover, Job, Jobs, NotRunError, Waiter
from prunus.messaging.liveness import boottime
from prunus.messaging.local import LocalBroker, LocalCommunicator
from prunus.messaging.messages import (
    LEASE_S,
    BroadcastDelivery,
    BrokerMessage,
    ClientMessage,
    Done,
    Missed,
    TaskAck,
    TaskDelivery,
    TaskNack,
    TaskSubscribe,
    TaskUnsubscribe,
    Welcome,
    decode_from_client,
    encode,
)
from prunus.messaging.peer import PeerCommunicator
from prunus.testing.communicator_contract import Inbox

Connect = Callable[[], Awaitable[LocalCommunicator]]


# --- a task that is somebody else's now ---


async def test_a_lost_task_cancels_its_handler(broker: LocalBroker, peers: Connect) -> None:
    """The one who was taken for dead learns it with its next word: its handler is cancelled, and nothing that it says
    about the task touches the one who has it now."""
    sender, worker, other = await peers(), await peers(), await peers()
    inbox, theirs = Inbox(), Inbox()
    await worker.add_task_subscriber(inbox)
    receipt = await sender.task_send(b"job", want_result=True)
    lost = await inbox.next()
    handler = inbox.running[lost.id]
    await other.add_task_subscriber(theirs)
    broker.expire(worker.session)
    again = await theirs.next()
    assert again.epoch > lost.epoch
    await worker.call([])
    await asyncio.wait([handler])
    assert handler.cancelled()
    await worker.call([])
    assert not inbox.in_hand
    theirs.ack(again, b"by the other")
    assert await receipt.result() == b"by the other"
    await sender.task_send(b"next")
    await sender.task_send(b"and next")
    assert {(await inbox.next()).body, (await theirs.next()).body} == {b"next", b"and next"}, "its room is free again"


async def test_a_plain_handler_of_a_lost_task_ends_in_its_own_time(
    broker: LocalBroker, peers: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread can't be stopped: what it returns is dropped, and the log says so."""
    sender, worker, other = await peers(), await peers(), await peers()
    loop, began, ended = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    go_on = threading.Event()
    theirs = Inbox()

    def work(task: IncomingTask) -> bytes:
        loop.call_soon_threadsafe(began.set)
        go_on.wait()
        loop.call_soon_threadsafe(ended.set)
        return b"too late"

    await worker.add_task_subscriber(work)
    receipt = await sender.task_send(b"job", want_result=True)
    await began.wait()
    await other.add_task_subscriber(theirs)
    broker.expire(worker.session)
    again = await theirs.next()
    with caplog.at_level(logging.WARNING):
        await worker.call([])
    assert "what it returns is dropped" in caplog.text
    go_on.set()
    await ended.wait()
    while len(worker._jobs):
        await worker.call([])
    theirs.ack(again, b"in time")
    assert await receipt.result() == b"in time"


async def test_a_lost_task_that_was_fetched(broker: LocalBroker, peers: Connect) -> None:
    """To acknowledge it changes nothing, and the next one can be fetched."""
    sender, worker, other = await peers(), await peers(), await peers()
    receipt = await sender.task_send(b"job", want_result=True)
    async with await worker.next_task() as task:
        broker.expire(worker.session)
        async with await other.next_task() as again:
            assert again.id == task.id
            await worker.call([])
            await task.acknowledge(b"stale")
            await again.acknowledge(b"fresh")
    assert await receipt.result() == b"fresh"
    await sender.task_send(b"next")
    async with await worker.next_task(timeout_s=0) as task:
        assert task.body == b"next"


async def test_a_machine_that_slept(broker: LocalBroker, peers: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """After hours of which nobody noticed anything each peer connects anew before it says anything; the broker slept
    too, so that nobody lost what it had."""
    sender, worker = await peers(), await peers()
    inbox = Inbox()
    again: asyncio.Queue[str] = asyncio.Queue()
    worker.on_reconnect(lambda: again.put_nowait("up"))
    await worker.add_task_subscriber(inbox)
    receipt = await sender.task_send(b"job", want_result=True)
    task = await inbox.next()
    monkeypatch.setattr(local, "boottime", lambda: boottime() + 1000 * LEASE_S)
    inbox.ack(task, b"done")
    assert await again.get() == "up"
    assert await receipt.result() == b"done"


class ByHand(PeerCommunicator):
    """One whose steps a test makes."""

    def __init__(self) -> None:
        super().__init__("nowhere")
        self._core.connect(1.0)
        self.step(1.0, Welcome(broker_epoch=1))

    def _wake(self, *, at_once: bool = False) -> bool:
        return True

    def step(self, now: float, *messages: BrokerMessage) -> str | None:
        return self._step(now, [encode(message) for message in messages])

    def said(self) -> list[ClientMessage]:
        return [decode_from_client(frame) for frame in self._core.take()]


async def test_a_step_looks_at_the_clock_first() -> None:
    """After a gap longer than a lease what was posted meanwhile is not said on the old connection."""
    peer = ByHand()
    peer.said()
    sending = asyncio.create_task(peer.task_send(b""))
    await asyncio.sleep(0)
    reason = peer.step(LEASE_S + 2.0)
    assert reason is not None
    assert "stood still" in reason
    assert peer.said() == []
    sending.cancel()


async def test_a_task_that_crosses_the_end_of_a_fetch_is_taken() -> None:
    """`next_task` whose time is over gives up its place at the broker; a task that was on its way by then is taken, and
    keeps its place until it is settled."""
    peer = ByHand()
    fetching = asyncio.create_task(peer.next_task(queue="q", timeout_s=0))
    await asyncio.sleep(0)
    peer.step(1.0)
    [*_, subscribe] = peer.said()
    assert isinstance(subscribe, TaskSubscribe)
    assert subscribe.credit == 1
    peer.step(1.0, Done(id=subscribe.id))
    while not peer._commands:
        await asyncio.sleep(0)
    peer.step(1.0)
    [unsubscribe] = peer.said()
    assert isinstance(unsubscribe, TaskUnsubscribe)
    peer.step(1.0, TaskDelivery(task="t", queue="q", key=None, body=b"x", epoch=5, attempt=1), Done(id=unsubscribe.id))
    task = await fetching
    [again] = peer.said()
    assert isinstance(again, TaskSubscribe)
    assert again.credit == 1
    settling = asyncio.create_task(task.acknowledge())
    await asyncio.sleep(0)
    peer.step(1.0)
    assert [type(message) for message in peer.said()] == [TaskUnsubscribe, TaskAck]
    settling.cancel()


async def test_a_delivery_for_which_there_is_no_room() -> None:
    """It goes back as not attempted: it crossed the end of its subscription."""
    peer = ByHand()
    peer.said()
    peer.step(1.0, TaskDelivery(task="t", queue="q", key=None, body=b"x", epoch=5, attempt=1))
    [nack] = peer.said()
    assert isinstance(nack, TaskNack)
    assert (nack.task, nack.epoch, nack.attempted) == ("t", 5, False)


# --- broadcasts that were dropped ---


async def test_what_the_broker_dropped_is_told(peers: Connect) -> None:
    """`Missed` of the broker: each subscription is told the number, callbacks of `on_reconnect` that there is one."""
    peer = await peers()
    told: asyncio.Queue[int] = asyncio.Queue()
    again: asyncio.Queue[str] = asyncio.Queue()

    async def listen(_: object) -> None: ...

    await peer.add_broadcast_subscriber(listen, on_missed=told.put_nowait)
    await peer.add_broadcast_subscriber(listen, sender="x", on_missed=told.put_nowait)
    peer.on_reconnect(lambda: again.put_nowait("something was missed"))
    peer.receive(encode(Missed(count=7)))
    assert [await told.get(), await told.get()] == [7, 7]
    assert await again.get()


async def test_questions_are_bounded_by_bytes_too(peers: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not fit beside those in hand is refused; it fits when they are answered."""
    asker, answerer = await peers(), await peers()
    monkeypatch.setattr(deliveries, "MAX_QUESTION_BYTES_IN_HAND", 100)
    come, go_on = asyncio.Event(), asyncio.Event()

    async def slow(body: bytes) -> bytes:
        come.set()
        await go_on.wait()
        return b"%d" % len(body)

    await answerer.add_rpc_subscriber(slow, "slow")
    asking = asyncio.create_task(asker.rpc_send("slow", bytes(60)))
    await come.wait()
    with pytest.raises(BusyError, match="slow"):
        await asker.rpc_send("slow", bytes(41))
    go_on.set()
    assert await asking == b"60"
    assert await asker.rpc_send("slow", bytes(41)) == b"41"


async def test_broadcasts_are_bounded_by_bytes_too(peers: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not fit beside those in hand is dropped and counted; what fits later comes."""
    peer = await peers()
    monkeypatch.setattr(deliveries, "MAX_BROADCAST_BYTES_IN_HAND", 100)
    go_on, told = asyncio.Event(), asyncio.Event()
    heard: asyncio.Queue[int] = asyncio.Queue()
    missed: list[int] = []

    async def listen(broadcast: Any) -> None:
        await go_on.wait()
        heard.put_nowait(len(broadcast.body))

    def on_missed(count: int) -> None:
        missed.append(count)
        told.set()

    await peer.add_broadcast_subscriber(listen, on_missed=on_missed)
    for size in (60, 60, 40):
        peer.receive(encode(BroadcastDelivery(body=bytes(size), sender=None, subject=None)))
    await told.wait()
    go_on.set()
    assert [await heard.get(), await heard.get()] == [60, 40]
    assert missed == [1]


# --- crossings ---


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often another thread woke it."""

    wake_ups = 0

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
        self.wake_ups += 1
        return super().call_soon_threadsafe(*args, **kwargs)


def test_one_wake_up_for_all_of_a_step() -> None:
    """Whatever one step has for a loop crosses together, in order."""
    loop = CountingLoop()
    came: list[int] = []

    class Arrival(Crossing):
        def __init__(self, number: int) -> None:
            self.number = number

        def arrive(self) -> None:
            came.append(self.number)
            if self.number == 99:
                loop.stop()

    crossings = Handover()
    for number in range(100):
        crossings.add(loop, Arrival(number))
    crossings.send()
    crossings.send()
    loop.run_forever()
    assert loop.wake_ups == 1
    assert came == list(range(100))
    loop.close()


async def test_a_busy_loop_finds_one_call_with_all_that_gathered() -> None:
    """What gathers while a callback is on its way is said by the next call: nothing piles up."""
    told: list[int] = []
    callback, crossings = Callback(told.append), Handover()
    for count in (1, 2, 3):
        callback.gather(count)
        callback.call(crossings)
        crossings.send()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    callback.call(crossings)
    callback.call(crossings)
    crossings.send()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert told == [1, 5]


class Run(Job):
    ended_with: BaseException | None = None

    def finish(self, now: float) -> None:
        self.ended_with = self.error


async def test_a_run_that_is_cancelled_before_it_began_ends() -> None:
    """Exactly once, as a cancellation."""

    async def never(_: object) -> None:
        raise AssertionError("not reached")

    crossings = Handover()
    jobs = Jobs(crossings, lambda: None)
    run = Run(jobs, Handler(never), None)
    jobs.start(run)
    run.arrive()
    assert run.task is not None
    run.task.cancel()
    await asyncio.wait([run.task])
    await asyncio.sleep(0)
    assert len(jobs.ended) == 1
    jobs.collect(0.0)
    assert isinstance(run.ended_with, asyncio.CancelledError)
    assert len(jobs) == 0


def test_a_run_whose_loop_is_gone_ends() -> None:
    """Whether the loop was closed before the hand-over or after it."""
    loop = asyncio.new_event_loop()

    async def never(_: object) -> None:
        await asyncio.get_running_loop().create_future()

    async def subscribe() -> tuple[Handler, Waiter]:
        return Handler(never), Waiter()

    handler, waiter = loop.run_until_complete(subscribe())
    crossings = Handover()
    jobs = Jobs(crossings, lambda: None)
    after, before = Run(jobs, handler, None), Run(jobs, handler, None)
    jobs.start(after)
    crossings.send()
    loop.close()
    jobs.start(before)
    crossings.add(loop, waiter)
    crossings.send()
    jobs.strand_those_of_closed_loops()
    jobs.collect(0.0)
    assert isinstance(before.ended_with, NotRunError)
    assert isinstance(after.ended_with, NotRunError)
    assert len(jobs) == 0


async def test_plain_handlers_share_a_bounded_number_of_threads(
    peers: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than `MAX_HANDLER_THREADS` wait for a free thread; all are served."""
    monkeypatch.setattr(handover, "MAX_HANDLER_THREADS", 2)
    sender, worker = await peers(), await peers()
    loop, go_on = asyncio.get_running_loop(), threading.Event()
    began: asyncio.Queue[bytes] = asyncio.Queue()

    def work(task: IncomingTask) -> bytes:
        loop.call_soon_threadsafe(began.put_nowait, task.body)
        go_on.wait()
        return task.body

    await worker.add_task_subscriber(work, credit=10)
    receipts = [await sender.task_send(b"%d" % number, want_result=True) for number in range(6)]
    for _ in range(2):
        await began.get()
    for _ in range(20):
        await worker.call([])
    assert began.empty()
    go_on.set()
    assert [await receipt.result() for receipt in receipts] == [b"%d" % number for number in range(6)]


async def test_the_core_is_asked_before_bounds_are_passed(peers: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand `task_send` at once: those beyond the bound are refused, the others are stored."""
    monkeypatch.setattr(client, "MAX_UNANSWERED", 10)
    sender = await peers()
    outcomes = await asyncio.gather(*(sender.task_send(b"") for _ in range(1000)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(error).__name__ for error in refused} == {"BusyError"}
    assert (await sender.statistics()).accepted == len(outcomes) - len(refused) >= 10


async def test_what_is_in_hand_is_given_back_beyond_the_bound(peers: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may ask for nothing new settles a fetched task and leaves all the same; nobody else is troubled."""
    peer, other = await peers(), await peers()
    await other.task_send(b"1")
    subscription = await peer.add_rpc_subscriber(lambda body: body, "name")
    monkeypatch.setattr(client, "MAX_UNANSWERED", 0)
    with pytest.raises(BusyError):
        await peer.task_send(b"")
    monkeypatch.undo()
    taken = await peer.next_task()
    monkeypatch.setattr(client, "MAX_UNANSWERED", 0)
    await taken.acknowledge()
    await subscription.cancel()
    monkeypatch.undo()
    assert await other.tasks() == []
    await other.add_rpc_subscriber(lambda body: body, "name")
    assert await peer.rpc_send("name", b"x") == b"x"
