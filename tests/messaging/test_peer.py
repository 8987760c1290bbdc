"""What lies between the wire and handlers: lost tasks, gaps, crossings between threads, and their bounds."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from prunus.errors import BusyError, CommunicatorClosedError, TaskRejectedError
from prunus.messaging import client, deliveries, handover, local
from prunus.messaging import peer as peer_module
from prunus.messaging.client import PATIENCE_S
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
    Hello,
    HelloNeeded,
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
from prunus.messaging.peer import PeerCommunicator, Taken
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
    """To acknowledge it is an error and changes nothing, whether that was known before or not; and the next one can be
    fetched."""
    sender, worker, other = await peers(), await peers(), await peers()
    for is_known in (False, True):
        receipt = await sender.task_send(b"job", want_result=True, queue="q")
        async with await worker.next_task(queue="q") as task:
            broker.expire(worker.session)
            async with await other.next_task(queue="q") as again:
                assert again.id == task.id
                if is_known:
                    await worker.call([])
                with pytest.raises(TaskRejectedError) as error:
                    await task.acknowledge(b"stale")
                assert f"somebody else has the task {task.id} of the queue 'q' meanwhile" in str(error.value)
                assert "does not count" in str(error.value)
                await again.acknowledge(b"fresh")
        assert await receipt.result() == b"fresh"
    receipt = await sender.task_send(b"job", want_result=True)
    async with await worker.next_task() as task:
        await task.acknowledge(b"fresh")
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


async def fetched(peer: ByHand) -> Taken:
    """A task that it holds."""
    fetching = asyncio.create_task(peer.next_task(queue="q"))
    await asyncio.sleep(0)
    peer.step(1.0)
    peer.step(1.0, TaskDelivery(task="t", queue="q", key=None, body=b"x", epoch=5, attempt=1))
    [*_, subscribe] = peer.said()
    assert isinstance(subscribe, TaskSubscribe)
    peer.step(1.0, Done(id=subscribe.id))
    return await fetching


@pytest.mark.parametrize("over", [False, True])
async def test_an_acknowledgement_that_is_said_again(over: bool) -> None:
    """The connection broke after it was said. If the task is done with by then, that has done it; else it is somebody
    else's."""
    peer = ByHand()
    task = await fetched(peer)
    settling = asyncio.create_task(task.acknowledge())
    await asyncio.sleep(0)
    peer.step(1.0)
    assert [type(message) for message in peer.said()] == [TaskUnsubscribe, TaskAck]
    peer._core.connect(1.0)
    peer.step(1.0, Welcome(broker_epoch=1, lost=("t",)))
    [*_, ack] = peer.said()
    assert isinstance(ack, TaskAck)
    peer.step(1.0, Done(id=ack.id, stale=True, over=over))
    if over:
        await settling
        await task.acknowledge()
        return
    with pytest.raises(TaskRejectedError, match="somebody else has the task t of the queue 'q' meanwhile"):
        await settling
    with pytest.raises(TaskRejectedError):
        await task.acknowledge()


async def test_what_a_broker_did_not_take_is_known() -> None:
    """One that had forgotten the session did nothing of what was said to it before the next `Hello`."""
    peer = ByHand()
    task = await fetched(peer)
    settling = asyncio.create_task(task.acknowledge())
    await asyncio.sleep(0)
    peer.step(1.0)
    peer.step(1.0, HelloNeeded())
    peer.step(1.0, Welcome(broker_epoch=1, lost=("t",)))
    [*_, ack] = peer.said()
    peer.step(1.0, Done(id=ack.id, stale=True, over=True))  # type: ignore[union-attr]
    with pytest.raises(TaskRejectedError):
        await settling


@pytest.mark.parametrize("broke", [False, True])
async def test_what_a_handler_came_to_and_does_not_count_is_said(broke: bool, caplog: pytest.LogCaptureFixture) -> None:
    """With the task and its queue. One that was said again, and is done with, counted the first time."""
    peer = ByHand()
    subscribing = asyncio.create_task(peer.add_task_subscriber(lambda task: _nothing(), queue="q"))
    await asyncio.sleep(0)
    peer.step(1.0)
    [*_, subscribe] = peer.said()
    peer.step(1.0, Done(id=subscribe.id))  # type: ignore[union-attr]
    await subscribing
    peer.step(1.0, TaskDelivery(task="t", queue="q", key=None, body=b"x", epoch=5, attempt=1))
    while not peer._jobs.ended:
        await asyncio.sleep(0)
    peer.step(1.0)
    [ack] = peer.said()
    assert isinstance(ack, TaskAck)
    if broke:
        peer._core.connect(1.0)
        peer.step(1.0, Welcome(broker_epoch=1))
    peer.step(1.0, Done(id=ack.id, stale=True, over=True))
    said = "somebody else has the task t of the queue 'q' meanwhile; what its handler came to is dropped"
    assert (said in caplog.text) == (not broke)
    assert not peer._deliveries.settling


async def _nothing() -> None:
    pass


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
async def test_what_ends_a_handler_gives_its_task_back(broker: LocalBroker, end: type[BaseException]) -> None:
    """As the next attempt, with what it was as the reason. In a loop of another thread, where nobody can end the
    program."""
    sender = await broker.connect()
    worker = await broker.connect()

    async def work(task: IncomingTask) -> None:
        raise end("enough")

    async def subscribe() -> None:
        await worker.add_task_subscriber(work)

    loop = asyncio.new_event_loop()

    def serve() -> None:
        while True:
            try:
                loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                continue
            return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(subscribe(), loop))
    await sender.task_send(b"")
    while not (tasks := await sender.tasks()) or tasks[0].reason is None:
        await asyncio.sleep(0)
    assert tasks[0].reason.startswith(
        "its handler was cancelled" if end is asyncio.CancelledError else f"its handler was ended by {end.__name__}"
    )
    await worker.close()
    await sender.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("is_heard", [False, True], ids=["not yet said", "said"])
async def test_a_fetch_ends_in_time_without_a_broker(monkeypatch: pytest.MonkeyPatch, is_heard: bool) -> None:
    """One that hangs is waited for a moment only. It is told that no task is wanted any more, and one that comes all
    the same goes back untouched."""
    monkeypatch.setattr(peer_module, "LAST_WORD_S", 0.0)
    peer = ByHand()
    peer.said()
    fetching = asyncio.create_task(peer.next_task(queue="q", timeout_s=0.0))
    await asyncio.sleep(0)
    if is_heard:
        peer.step(1.0)
        [subscribe] = peer.said()
        peer.step(1.0, Done(id=subscribe.id))  # type: ignore[union-attr]
    with pytest.raises(TimeoutError, match="no task came from the queue 'q' within 0 s"):
        await fetching
    peer.step(1.0)
    *_, last = peer.said()
    assert isinstance(last, TaskUnsubscribe)
    assert not peer._deliveries.lanes
    peer.step(1.0, TaskDelivery(task="t", queue="q", key=None, body=b"x", epoch=5, attempt=1))
    [nack] = peer.said()
    assert isinstance(nack, TaskNack)
    assert not nack.attempted


async def test_a_fetch_that_ends_leaves_a_handler_of_its_queue_alone() -> None:
    """Also if nobody answers for so long that all of it is given up: it is still stated in the next `Hello`."""
    peer = ByHand()
    subscribing = asyncio.create_task(peer.add_task_subscriber(lambda task: None, queue="q"))
    await asyncio.sleep(0)
    peer.step(1.0)
    [*_, subscribe] = peer.said()
    peer.step(1.0, Done(id=subscribe.id))  # type: ignore[union-attr]
    await subscribing
    peer._core.connect(1.0)
    fetching = asyncio.create_task(peer.next_task(queue="q", timeout_s=0))
    while not fetching.done():
        await asyncio.sleep(0)
        peer.step(1.0)
    with pytest.raises(TimeoutError, match="within 0 s, and no broker answers at nowhere"):
        await fetching
    peer.step(1.0)
    for _ in range(3):
        peer._step(1.0 + PATIENCE_S / 2, [])
        peer._core.connect(1.0 + PATIENCE_S / 2)
        peer._step(2.0 + PATIENCE_S, [])
    assert peer._core.is_idle
    peer.said()
    peer._core.connect(3.0 + PATIENCE_S)
    [hello] = peer.said()
    assert isinstance(hello, Hello)
    assert hello.queues == (("q", 1),)


async def test_who_waits_no_longer_hears_nothing_of_the_end(broker: LocalBroker) -> None:
    """A result or a task that was waited for, and then not any more: asyncio has nothing to complain of."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    peer = await broker.connect()
    receipt = await peer.task_send(b"", queue="nobody's", want_result=True)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await receipt.result()
    assert receipt._result is not None
    assert not receipt._result._waiters
    waiting = asyncio.create_task(receipt.result())
    fetching = asyncio.create_task(peer.next_task(queue="empty", timeout_s=1000))
    await peer.call([])
    await peer.close()
    for one in (waiting, fetching):
        with pytest.raises(CommunicatorClosedError):
            await one
    with pytest.raises(CommunicatorClosedError):
        await receipt.result()
    del waiting, fetching, one, receipt, peer
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


async def test_the_end_in_the_last_moment_of_a_fetch_is_told_once() -> None:
    """When its time is over and the broker is asked whether a task is on its way."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    peer = ByHand()
    fetching = asyncio.create_task(peer.next_task(queue="q", timeout_s=0))
    await asyncio.sleep(0)
    peer.step(1.0)
    [*_, subscribe] = peer.said()
    peer.step(1.0, Done(id=subscribe.id))  # type: ignore[union-attr]
    while not peer._commands:
        await asyncio.sleep(0)
    peer.step(1.0)
    peer._finish()
    [error] = await asyncio.gather(fetching, return_exceptions=True)
    assert isinstance(error, CommunicatorClosedError)
    del error, fetching, peer
    await asyncio.sleep(0)  # the loop has forgotten them too
    gc.collect()
    assert complaints == []


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
