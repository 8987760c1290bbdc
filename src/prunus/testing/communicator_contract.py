"""What every `Communicator` must do, as a test class: inherit from it and give it a `connect`.

::

    class TestMine(CommunicatorContract):
        @pytest.fixture
        async def connect(self):
            broker = ...
            async with AsyncExitStack() as stack:
                async def connect() -> Communicator:
                    peer = await broker.connect()
                    stack.push_async_callback(peer.close)
                    return peer
                yield connect

`connect` is an async function: each call is a new peer of one broker, which is empty when a test begins. The service
behind that broker behaves as `ContractService` does. A test knows no more of them than `Communicator` says; what
differs from one implementation to another is stated as attributes of the class. There may be one more fixture,
`take_for_dead`: without it the test that needs it is skipped.

Needs pytest and pytest-asyncio (``asyncio_mode = "auto"``). What never comes shows as a test that never ends:
pytest-timeout ends it.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from prunus.errors import (
    BlobNotFoundError,
    BusyError,
    CommunicatorClosedError,
    DeadLetterError,
    DuplicateSubscriberError,
    IndeterminateError,
    InvalidStateError,
    MessageTooLargeError,
    NotDeliveredError,
    RemoteError,
    TaskDeletedError,
    TaskRejectedError,
    UnknownResourceError,
    UnroutableError,
)
from prunus.messaging.access import Role
from prunus.messaging.communicator import (
    MAX_BODY_BYTES,
    MAX_BROADCASTS_IN_HAND,
    MAX_QUESTIONS_IN_HAND,
    BlobRef,
    Broadcast,
    Communicator,
    IncomingTask,
    TakenTask,
)
from prunus.messaging.exchange import NewTask, Served
from prunus.messaging.inventory import QueueLimits

Connect = Callable[[], Awaitable[Communicator]]
TakeForDead = Callable[[Communicator], Awaitable[None]]
SHORT_S = 0.05
"""The time-out of questions that are not meant to be answered."""


class ContractService:
    """The service that the suite talks to: it keeps words, in the broker's database.

    ``add WORD`` keeps a word and answers with their number; ``words`` answers with all; ``task QUEUE KEY`` makes a
    task, ``timer SECONDS QUEUE`` one that comes later; ``refuse`` raises `InvalidStateError`; ``break`` raises an
    error that is not one of ours.
    """

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float] = time.time) -> None:
        self._connection = connection
        self._clock = clock
        connection.execute("CREATE TABLE IF NOT EXISTS word (word TEXT NOT NULL)")
        connection.execute("CREATE TABLE IF NOT EXISTS timer (at REAL NOT NULL, queue TEXT NOT NULL)")

    def left(self, session: str, lost: object) -> tuple[NewTask, ...]:
        return ()

    def due(self) -> float | None:
        [(at,)] = self._connection.execute("SELECT min(at) FROM timer")
        return None if at is None else at - self._clock()

    def tick(self) -> tuple[NewTask, ...]:
        now = self._clock()
        fired = self._connection.execute("SELECT queue FROM timer WHERE at <= ? ORDER BY at", (now,)).fetchall()
        self._connection.execute("DELETE FROM timer WHERE at <= ?", (now,))
        return tuple(NewTask(queue=queue, body=b"made by a timer") for (queue,) in fired)

    def execute(self, request: bytes, session: str, role: Role) -> Served:
        match request.decode().split():
            case ["add", word]:
                self._connection.execute("INSERT INTO word VALUES (?)", (word,))
                [(number,)] = self._connection.execute("SELECT count(*) FROM word")
                return Served(answer=str(number).encode())
            case ["words"]:
                words = [word for (word,) in self._connection.execute("SELECT word FROM word ORDER BY rowid")]
                return Served(answer=" ".join(words).encode())
            case ["task", queue, key]:
                return Served(answer=b"", tasks=(NewTask(queue=queue, key=key, body=b"made by the service"),))
            case ["timer", seconds, queue]:
                at = self._clock() + float(seconds)
                self._connection.execute("INSERT INTO timer VALUES (?, ?)", (at, queue))
                return Served(answer=b"")
            case ["refuse"]:
                raise InvalidStateError("finished", "waiting")
            case _:
                raise ZeroDivisionError("broken")


class EndOfProgramError(BaseException):
    """As `SystemExit`, but the program goes on."""


class Inbox:
    """A task handler that shows what it gets, and settles a task when it is told to."""

    def __init__(self) -> None:
        self.came: asyncio.Queue[IncomingTask] = asyncio.Queue()
        self.in_hand: dict[str, asyncio.Future[bytes | None]] = {}
        self.running: dict[str, asyncio.Task[object]] = {}
        self.most = 0

    async def __call__(self, task: IncomingTask) -> bytes | None:
        end: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self.in_hand[task.id] = end
        running = asyncio.current_task()
        assert running is not None
        self.running[task.id] = running
        self.most = max(self.most, len(self.in_hand))
        self.came.put_nowait(task)
        try:
            return await end
        finally:
            del self.in_hand[task.id], self.running[task.id]

    async def next(self) -> IncomingTask:
        return await self.came.get()

    def ack(self, task: IncomingTask, result: bytes | None = None) -> None:
        self.in_hand[task.id].set_result(result)

    def fail(self, task: IncomingTask, error: Exception) -> None:
        self.in_hand[task.id].set_exception(error)


async def echo(body: bytes) -> bytes:
    return body


async def _sent(peer: Communicator) -> TakenTask:
    """A task of the queue ``fetched``."""
    await peer.task_send(b"", queue="fetched")
    return await peer.next_task(queue="fetched")


async def never(body: bytes) -> bytes:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("not reached")


class CommunicatorContract:
    """See the module."""

    max_questions_in_hand = MAX_QUESTIONS_IN_HAND
    """So many questions are in the handlers of one communicator; the next one is refused."""
    max_broadcasts_in_hand = MAX_BROADCASTS_IN_HAND
    """So many broadcasts wait for the handler of one subscription, or are in it; the next one is dropped."""

    @pytest.fixture
    async def connect(self) -> Connect:
        raise NotImplementedError("give your subclass a fixture `connect`")

    @pytest.fixture
    async def take_for_dead(self) -> TakeForDead:
        """An async function that has the broker believe that a peer of `connect` is gone, though it is not: others get
        its tasks, and it learns that with its next word."""
        pytest.skip("there is no fixture `take_for_dead`")

    # --- tasks ---

    async def test_a_task_reaches_a_subscriber_of_its_queue(self, connect: Connect) -> None:
        """What was sent is what comes, as the first attempt; another queue gets nothing."""
        sender, worker = await connect(), await connect()
        inbox, other = Inbox(), Inbox()
        await worker.add_task_subscriber(inbox, queue="mine")
        await worker.add_task_subscriber(other, queue="other")
        receipt = await sender.task_send(b"\x00body", queue="mine", key="k")
        task = await inbox.next()
        assert (task.id, task.key, task.queue, task.body) == (receipt.id, "k", "mine", b"\x00body")
        assert task.attempt == 1
        assert task.epoch > 0
        assert receipt.stored
        assert other.came.empty()

    async def test_a_task_waits_for_a_subscriber(self, connect: Connect) -> None:
        """A task that was sent before anybody subscribed is delivered when somebody does."""
        sender = await connect()
        await sender.task_send(b"early")
        worker, inbox = await connect(), Inbox()
        await worker.add_task_subscriber(inbox)
        assert (await inbox.next()).body == b"early"

    async def test_the_result_comes_back(self, connect: Connect) -> None:
        """What the handler returns is what `result` returns, each time it is asked."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox)
        receipt = await sender.task_send(b"", want_result=True)
        inbox.ack(await inbox.next(), b"42")
        assert await receipt.result() == b"42"
        assert await receipt.result() == b"42"

    async def test_the_failure_comes_back_as_what_it_was(self, connect: Connect) -> None:
        """An error of our tree comes back as itself with its facts, any other as a `RemoteError` with its type."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox, credit=2)
        receipts = [await sender.task_send(b"", want_result=True) for _ in range(2)]
        inbox.fail(await inbox.next(), InvalidStateError("finished", "waiting"))
        inbox.fail(await inbox.next(), KeyError("x"))
        with pytest.raises(InvalidStateError) as ours:
            await receipts[0].result()
        assert ours.value.needed == "waiting"
        with pytest.raises(RemoteError) as foreign:
            await receipts[1].result()
        assert foreign.value.failure.type == "KeyError"

    async def test_a_failed_task_is_done_with(self, connect: Connect) -> None:
        """An exception acknowledges the task: the next one comes, not the same again."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox)
        await sender.task_send(b"bad")
        await sender.task_send(b"good")
        inbox.fail(await inbox.next(), ValueError("bad"))
        assert (await inbox.next()).body == b"good"

    async def test_a_result_must_be_asked_for(self, connect: Connect) -> None:
        """`result` of a task that was sent without ``want_result`` is misuse."""
        receipt = await (await connect()).task_send(b"")
        with pytest.raises(ValueError, match="want_result"):
            await receipt.result()

    async def test_a_rejected_task_comes_again(self, connect: Connect) -> None:
        """`TaskRejectedError` gives the task back: another delivery, a higher epoch, the next attempt."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox)
        await sender.task_send(b"")
        first = await inbox.next()
        inbox.fail(first, TaskRejectedError())
        second = await inbox.next()
        assert second.id == first.id
        assert second.epoch > first.epoch
        assert second.attempt == first.attempt + 1

    async def test_a_cancelled_handler_gives_its_task_back(self, connect: Connect) -> None:
        """A cancellation of a handler is an answer too: the task comes again."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox)
        await sender.task_send(b"")
        first = await inbox.next()
        inbox.running[first.id].cancel()
        assert (await inbox.next()).id == first.id

    async def test_the_end_of_a_program_is_not_the_end_of_its_task(self, connect: Connect) -> None:
        """What is no `Exception`, as `SystemExit`, gives the task back; who asked a question gets it as an error."""
        sender, worker = await connect(), await connect()
        attempts: list[int] = []

        async def work(task: IncomingTask) -> bytes:
            attempts.append(task.attempt)
            if task.attempt == 1:
                raise EndOfProgramError("enough")
            return b"done"

        def work_in_a_thread(task: IncomingTask) -> bytes:
            attempts.append(task.attempt)
            if task.attempt == 1:
                raise EndOfProgramError("enough")
            return b"done"

        async def answer(question: bytes) -> bytes:
            raise EndOfProgramError("enough")

        await worker.add_task_subscriber(work, queue="async")
        await worker.add_task_subscriber(work_in_a_thread, queue="plain")
        for queue in ("async", "plain"):
            receipt = await sender.task_send(b"", queue=queue, want_result=True)
            assert await receipt.result() == b"done"
        assert attempts == [1, 2, 1, 2]
        await worker.add_rpc_subscriber(answer, "name")
        with pytest.raises(RemoteError, match="enough"):
            await sender.rpc_send("name", b"")

    async def test_credit_is_never_exceeded(self, connect: Connect) -> None:
        """A subscriber holds at most as many tasks as it gave credit for, and gets the next when it settles one."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox, credit=3)
        for number in range(10):
            await sender.task_send(b"%d" % number)
        for number in range(10):
            task = await inbox.next()
            assert task.body == b"%d" % number
            if number >= 2:
                inbox.ack(task)
        assert inbox.most == 3

    async def test_credit_can_be_changed(self, connect: Connect) -> None:
        """With credit 0 nothing new comes; with more, more does."""
        sender, worker, other = await connect(), await connect(), await connect()
        inbox, theirs = Inbox(), Inbox()
        subscription = await worker.add_task_subscriber(inbox, credit=0)
        await sender.task_send(b"1")
        await other.add_task_subscriber(theirs, credit=1)
        assert (await theirs.next()).body == b"1"
        await subscription.set_credit(2)
        await sender.task_send(b"2")
        await sender.task_send(b"3")
        assert [(await inbox.next()).body, (await inbox.next()).body] == [b"2", b"3"]

    async def test_who_has_most_room_is_served_first(self, connect: Connect) -> None:
        """A backlog is spread over the subscribers by their free credit, not taken by the first of them."""
        sender, first, second = await connect(), await connect(), await connect()
        inboxes = Inbox(), Inbox()
        await first.add_task_subscriber(inboxes[0], credit=8)
        await second.add_task_subscriber(inboxes[1], credit=8)
        for _ in range(8):
            await sender.task_send(b"")
        for inbox in inboxes:
            for _ in range(4):
                await inbox.next()
        assert inboxes[0].most == inboxes[1].most == 4

    async def test_two_subscribers_of_one_peer_share_a_queue(self, connect: Connect) -> None:
        """Their credits add up, and each gets its share."""
        peer = await connect()
        inboxes = Inbox(), Inbox()
        for inbox in inboxes:
            await peer.add_task_subscriber(inbox, credit=1)
        await peer.task_send(b"1")
        await peer.task_send(b"2")
        assert {(await inboxes[0].next()).body, (await inboxes[1].next()).body} == {b"1", b"2"}

    async def test_shared_subscriptions_have_one_credit(self, connect: Connect) -> None:
        """What is held by one of them takes room in all; a free place goes to the one that was made first."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        for queue in ("first", "second"):
            await worker.add_task_subscriber(inbox, queue=queue, credit=2, shared=True)
        for queue in ("second", "second", "second", "first"):
            await sender.task_send(b"", queue=queue)
        tasks = [await inbox.next(), await inbox.next()]
        assert [task.queue for task in tasks] == ["second", "second"]
        for expected in ("first", "second"):
            inbox.ack(tasks.pop())
            tasks.append(await inbox.next())
            assert tasks[-1].queue == expected
        assert inbox.most == 2

    async def test_priority_then_age(self, connect: Connect) -> None:
        """The highest priority comes first, the oldest first within one."""
        sender, worker = await connect(), await connect()
        for body, priority in ((b"a", 0), (b"b", 5), (b"c", 9), (b"d", 5), (b"e", 0)):
            await sender.task_send(body, priority=priority)
        inbox, order = Inbox(), []
        await worker.add_task_subscriber(inbox)
        for _ in range(5):
            task = await inbox.next()
            order.append(task.body)
            inbox.ack(task)
        assert order == [b"c", b"b", b"d", b"a", b"e"]

    async def test_a_priority_is_from_0_to_9(self, connect: Connect) -> None:
        """Others are misuse."""
        peer = await connect()
        for priority in (-1, 10):
            with pytest.raises(ValueError, match="priority"):
                await peer.task_send(b"", priority=priority)

    async def test_one_pending_task_of_a_key(self, connect: Connect) -> None:
        """A second task of a (queue, key) that is pending is not stored; the receipt names the one that is."""
        sender, worker = await connect(), await connect()
        first = await sender.task_send(b"first", key="k")
        second = await sender.task_send(b"second", key="k")
        elsewhere = await sender.task_send(b"third", key="k", queue="elsewhere")
        assert (first.stored, second.stored, elsewhere.stored) == (True, False, True)
        assert second.id == first.id
        inbox = Inbox()
        await worker.add_task_subscriber(inbox, credit=5)
        assert (await inbox.next()).body == b"first"
        assert inbox.came.empty()

    async def test_one_held_task_of_a_key(self, connect: Connect) -> None:
        """While a task of a key is held, others of that key wait, in every queue; then they come."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox, credit=5)
        await worker.add_task_subscriber(inbox, queue="other", credit=5)
        await sender.task_send(b"1", key="k")
        held = await inbox.next()
        assert (await sender.task_send(b"2", key="k")).stored
        assert (await sender.task_send(b"3", key="k", queue="other")).stored
        await sender.task_send(b"free", key="another")
        assert (await inbox.next()).body == b"free"
        inbox.ack(held)
        then = await inbox.next()
        assert inbox.came.empty()
        inbox.ack(then)
        last = await inbox.next()
        assert {then.body, last.body} == {b"2", b"3"}

    async def test_who_leaves_gives_its_tasks_back(self, connect: Connect) -> None:
        """`close` gives tasks in hand to others, under a higher epoch, before newer ones."""
        sender, leaving, staying = await connect(), await connect(), await connect()
        inbox, theirs = Inbox(), Inbox()
        await leaving.add_task_subscriber(inbox)
        await sender.task_send(b"old")
        held = await inbox.next()
        await sender.task_send(b"new")
        await leaving.close()
        await staying.add_task_subscriber(theirs, credit=2)
        again = await theirs.next()
        assert (again.id, again.body, again.attempt) == (held.id, b"old", 2)
        assert again.epoch > held.epoch
        assert (await theirs.next()).body == b"new"

    async def test_a_cancelled_subscription_still_settles(self, connect: Connect) -> None:
        """After `cancel` nothing new comes; the task in hand is acknowledged by its handler. Idempotent."""
        sender, worker, other = await connect(), await connect(), await connect()
        inbox, theirs = Inbox(), Inbox()
        subscription = await worker.add_task_subscriber(inbox, credit=5)
        receipt = await sender.task_send(b"1", want_result=True)
        held = await inbox.next()
        await subscription.cancel()
        await subscription.cancel()
        await sender.task_send(b"2")
        await other.add_task_subscriber(theirs)
        assert (await theirs.next()).body == b"2"
        inbox.ack(held, b"done")
        assert await receipt.result() == b"done"
        assert inbox.came.empty()

    async def test_many_tasks_each_once(self, connect: Connect) -> None:
        """Many senders at once, two workers: each task is handled exactly once."""
        sender, workers = await connect(), [await connect(), await connect()]
        done: list[bytes] = []

        async def handle(task: IncomingTask) -> bytes:
            done.append(task.body)
            return task.body

        for worker in workers:
            await worker.add_task_subscriber(handle, credit=10)
        bodies = [b"%d" % number for number in range(300)]
        receipts = await asyncio.gather(*(sender.task_send(body, want_result=True) for body in bodies))
        assert await asyncio.gather(*(receipt.result() for receipt in receipts)) == bodies
        assert sorted(done) == sorted(bodies)

    async def test_a_subject_pattern_chooses_tasks(self, connect: Connect) -> None:
        """A subscriber gets the tasks of its queue whose subject matches, each by a credit of its own; one without a
        pattern gets all; what nobody asks for waits."""
        sender, worker = await connect(), await connect()
        copper, water, everything = Inbox(), Inbox(), Inbox()
        await worker.add_task_subscriber(copper, subject="fit.cu")
        await worker.add_task_subscriber(water, subject="md.#")
        for subject in ("fit.cu", "md.water.long", "fit.al", None):
            await sender.task_send(str(subject).encode(), subject=subject)
        task = await copper.next()
        assert (task.subject, task.body) == ("fit.cu", b"fit.cu")
        assert (await water.next()).body == b"md.water.long"
        await worker.add_task_subscriber(everything, credit=2)
        assert [(await everything.next()).body for _ in range(2)] == [b"fit.al", b"None"]
        await sender.task_send(b"next", subject="fit.cu")
        copper.ack(task)
        assert (await copper.next()).body == b"next"

    async def test_two_subscribers_with_one_pattern_share_it(self, connect: Connect) -> None:
        """Their credits add up; when one cancels, the other goes on with its own."""
        sender, worker = await connect(), await connect()
        inboxes = Inbox(), Inbox()
        first = await worker.add_task_subscriber(inboxes[0], subject="a.*")
        await worker.add_task_subscriber(inboxes[1], subject="a.*")
        for number in range(3):
            await sender.task_send(b"%d" % number, subject="a.b")
        tasks = [await inboxes[0].next(), await inboxes[1].next()]
        assert {task.body for task in tasks} == {b"0", b"1"}
        await first.cancel()
        inboxes[0].ack(tasks[0])
        inboxes[1].ack(tasks[1])
        assert (await inboxes[1].next()).body == b"2"
        assert inboxes[0].came.empty()

    async def test_a_task_is_not_delivered_before_its_time(self, connect: Connect) -> None:
        """``not_before``: it is delayed and seen as that; then it comes."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        start = datetime.now(UTC) + timedelta(seconds=0.2)
        receipt = await sender.task_send(b"later", not_before=start)
        await sender.task_send(b"now")
        [info] = await sender.tasks(task=receipt.id)
        assert info.place == "delayed"
        assert info.due_at == pytest.approx(start.timestamp(), abs=0.01)
        await worker.add_task_subscriber(inbox, credit=2)
        assert [(await inbox.next()).body for _ in range(2)] == [b"now", b"later"]
        assert datetime.now(UTC) >= start

    async def test_a_task_that_expired_is_a_dead_letter(self, connect: Connect) -> None:
        """``expires_at``: nobody gets it any more, its sender hears why, and it stays until somebody looks."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        past = datetime.now(UTC) - timedelta(seconds=1)
        receipt = await sender.task_send(b"late", expires_at=past, want_result=True)
        with pytest.raises(DeadLetterError) as error:
            await receipt.result()
        assert error.value.task == receipt.id
        [letter] = await sender.tasks(place="dead")
        assert letter.id == receipt.id
        assert letter.reason
        await worker.add_task_subscriber(inbox)
        await sender.task_send(b"fresh")
        assert (await inbox.next()).body == b"fresh"

    async def test_moments_need_a_time_zone(self, connect: Connect) -> None:
        """A moment without one could be any of two dozen."""
        peer = await connect()
        nowhere = datetime(2030, 1, 1)
        for sending in (peer.task_send(b"", not_before=nowhere), peer.task_send(b"", expires_at=nowhere)):
            with pytest.raises(ValueError, match=r"time zone|not_before|expires_at"):
                await sending

    async def test_a_task_that_nobody_can_do_is_a_dead_letter(self, connect: Connect) -> None:
        """After ``max_attempts`` rejections its sender gets the last reason; requeued, it is as good as new."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        subscription = await worker.add_task_subscriber(inbox)
        receipt = await sender.task_send(b"poison", max_attempts=2, want_result=True)
        for attempt in (1, 2):
            task = await inbox.next()
            assert task.attempt == attempt
            inbox.fail(task, TaskRejectedError("not today"))
        with pytest.raises(DeadLetterError, match="not today"):
            await receipt.result()
        await subscription.cancel()
        assert await sender.requeue(receipt.id) == 1
        async with await worker.next_task() as again:
            assert (again.id, again.attempt) == (receipt.id, 1)

    async def test_a_later_task_replaces_a_pending_one(self, connect: Connect) -> None:
        """``if_pending="replace"``: the later body comes, once, in the place of the first, whose sender is told."""
        sender, worker = await connect(), await connect()
        first = await sender.task_send(b"first", key="k", want_result=True)
        await sender.task_send(b"behind")
        second = await sender.task_send(b"second", key="k", want_result=True, if_pending="replace")
        assert second.stored
        assert second.id != first.id
        with pytest.raises(TaskDeletedError) as error:
            await first.result()
        assert error.value.task == first.id
        inbox = Inbox()
        await worker.add_task_subscriber(inbox, credit=5)
        task = await inbox.next()
        assert [task.body, (await inbox.next()).body] == [b"second", b"behind"]
        inbox.ack(task, b"done")
        assert await second.result() == b"done"
        assert inbox.came.empty()

    async def test_tasks_share_a_resource(self, connect: Connect) -> None:
        """No more tokens are taken than there are; a resource that nobody configured is refused by name."""
        sender, worker = await connect(), await connect()
        with pytest.raises(UnknownResourceError) as error:
            await sender.task_send(b"", resources={"gpu": 1})
        assert (error.value.resource, error.value.wanted) == ("gpu", 1)
        await sender.configure_resource("gpu", 2)
        inbox = Inbox()
        await worker.add_task_subscriber(inbox, credit=5)
        for number in range(3):
            await sender.task_send(b"%d" % number, resources={"gpu": 1})
        await sender.task_send(b"free")
        tasks = [await inbox.next() for _ in range(3)]
        assert {task.body for task in tasks} == {b"0", b"1", b"free"}
        assert (await sender.statistics()).resources["gpu"].taken == 2
        inbox.ack(tasks[0])
        assert (await inbox.next()).body == b"2"

    async def test_misuse_of_a_task_is_said_at_once(self, connect: Connect) -> None:
        """What can't be meant is refused before it is sent."""
        peer = await connect()
        for wrong, word in (
            ({"max_attempts": -1}, "max_attempts"),
            ({"max_attempts": True}, "max_attempts"),
            ({"max_attempts": 2**63}, "max_attempts"),
            ({"priority": 2.5}, "priority"),
            ({"priority": True}, "priority"),
            ({"if_pending": "forget"}, "if_pending"),
            ({"resources": {"gpu": -1}}, "gpu"),
            ({"resources": {"gpu": True}}, "gpu"),
            ({"resources": {None: 1}}, "name|resource"),
            ({"queue": "x" * 2000}, "name|queue"),
            ({"queue": None}, "name|queue"),
        ):
            with pytest.raises(ValueError, match=word):
                await peer.task_send(b"", **wrong)
        with pytest.raises(ValueError, match="credit"):
            await peer.add_task_subscriber(Inbox(), credit=-1)
        subscription = await peer.add_task_subscriber(Inbox(), queue="credits")
        for credit in (-1, 1.5, float("nan"), True):
            with pytest.raises(ValueError, match="credit"):
                await subscription.set_credit(credit)  # type: ignore[arg-type]
        for page in (0, 100_000, True):
            with pytest.raises(ValueError, match=r"page|limit"):
                await peer.tasks(limit=page)
        for timeout_s in (-1.0, float("inf"), float("nan"), True):
            with pytest.raises(ValueError, match=r"time-?out"):
                await peer.rpc_send("name", b"", timeout_s=timeout_s)
        for limits in (
            QueueLimits(burst=1.5),  # type: ignore[arg-type]
            QueueLimits(max_length="many"),  # type: ignore[arg-type]
            QueueLimits(concurrency=2**70),
        ):
            with pytest.raises(ValueError, match=r"limits|broker"):
                await peer.configure_queue("q", limits)
        for capacity in (-1, True, 2**63):
            with pytest.raises(ValueError, match="capacity"):
                await peer.configure_resource("gpu", capacity)
        for name in ("\ud800", "x" * 2000):
            with pytest.raises(ValueError, match=r"name|queue"):
                await peer.add_task_subscriber(Inbox(), queue=name)
        with pytest.raises(ValueError, match="place"):
            await peer.tasks(place="nowhere")  # type: ignore[arg-type]
        for edit in (peer.requeue(), peer.delete()):
            with pytest.raises(ValueError, match="tasks"):
                await edit
        nameless = (peer.requeue(None), peer.rpc_send(None, b""), peer.add_rpc_subscriber(echo, None))  # type: ignore[arg-type]
        for call in nameless:
            with pytest.raises(ValueError, match=r"name|tasks|recipient|identifier"):
                await call
        no_handlers = (
            peer.add_task_subscriber(None),  # type: ignore[arg-type]
            peer.add_rpc_subscriber(5, "five"),  # type: ignore[arg-type]
            peer.add_broadcast_subscriber(never, on_missed=5),  # type: ignore[arg-type]
        )
        for call in no_handlers:
            with pytest.raises(TypeError, match=r"call|handler|on_missed"):
                await call
        assert await peer.tasks() == [], "it goes on, and nothing of all that was stored"

    async def test_the_end_of_time(self, connect: Connect) -> None:
        """The last moment that Python can say is as good as never."""
        sender, worker = await connect(), await connect()
        await sender.task_send(b"never", not_before=datetime.max.replace(tzinfo=UTC))
        await sender.task_send(b"now", expires_at=datetime.max.replace(tzinfo=UTC))
        inbox = Inbox()
        await worker.add_task_subscriber(inbox, credit=5)
        task = await inbox.next()
        assert task.body == b"now"
        inbox.ack(task)
        [left] = await sender.tasks(place="delayed")
        assert left.due_at is not None
        assert left.due_at > datetime(5000, 1, 1, tzinfo=UTC).timestamp()

    # --- fetching one task ---

    async def test_next_task_fetches_one(self, connect: Connect) -> None:
        """One task and no other; leaving the block acknowledges it, and the next call gets the next one."""
        sender, worker, other = await connect(), await connect(), await connect()
        receipt = await sender.task_send(b"1", want_result=True)
        await sender.task_send(b"2")
        async with await worker.next_task() as task:
            assert (task.id, task.body, task.attempt) == (receipt.id, b"1", 1)
            async with await other.next_task(timeout_s=10) as second:
                assert second.body == b"2", "it stayed at the broker"
        assert await receipt.result() == b""
        await sender.task_send(b"3")
        async with await worker.next_task() as task:
            assert task.body == b"3"

    async def test_next_task_settles_as_it_is_told(self, connect: Connect) -> None:
        """`acknowledge` with a result, `fail` with an error, `reject`: each once; leaving the block changes nothing."""
        sender, worker = await connect(), await connect()
        receipts = [await sender.task_send(b"%d" % number, want_result=True) for number in range(2)]
        async with await worker.next_task() as task:
            await task.reject("later")
        async with await worker.next_task(timeout_s=10) as other:
            assert other.body == b"1", "a rejected one waits a moment"
            await other.fail(KeyError("x"))
            await other.acknowledge(b"too late")
        with pytest.raises(RemoteError, match="KeyError"):
            await receipts[1].result()
        async with await worker.next_task() as again:
            assert (again.id, again.attempt) == (task.id, 2)
            await again.acknowledge(b"42")
        assert await receipts[0].result() == b"42"

    async def test_an_exception_gives_a_fetched_task_back(self, connect: Connect) -> None:
        """So does the end of the communicator."""
        sender, worker, other = await connect(), await connect(), await connect()
        await sender.task_send(b"1")
        with pytest.raises(ZeroDivisionError):
            async with await worker.next_task():
                raise ZeroDivisionError
        task = await worker.next_task()
        assert task.attempt == 2
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 (what is closed can't give it back: that hides nothing)
            async with task:
                await worker.close()
                raise ZeroDivisionError
        async with await other.next_task() as again:
            assert (again.id, again.body) == (task.id, b"1")

    async def test_who_lost_a_fetched_task_is_told(self, connect: Connect, take_for_dead: TakeForDead) -> None:
        """What is said of it does not count, and that never looks like a success: `TaskRejectedError`, however often it
        is said, also at the end of a block, but not instead of the block's own error. To give it back is harmless."""
        sender, worker, other = await connect(), await connect(), await connect()
        receipts = [await sender.task_send(b"", want_result=True) for _ in range(5)]
        one, two, three, four, five = [await worker.next_task() for _ in receipts]
        await take_for_dead(worker)
        taken = [await other.next_task() for _ in receipts]
        assert {task.id for task in taken} == {receipt.id for receipt in receipts}
        for _ in range(2):
            with pytest.raises(TaskRejectedError, match=one.id):
                await one.acknowledge(b"stale")
        with pytest.raises(TaskRejectedError, match=two.id):
            await two.fail(ValueError("stale"))
        await three.reject()
        with pytest.raises(TaskRejectedError, match=four.id):
            async with four:
                pass
        with pytest.raises(ZeroDivisionError):
            async with five:
                raise ZeroDivisionError
        async with one:
            pass  # its receiver was told
        for task in taken:
            await task.acknowledge(b"fresh")
        assert [await receipt.result() for receipt in receipts] == [b"fresh"] * 5

    async def test_next_task_of_an_empty_queue(self, connect: Connect) -> None:
        """`TimeoutError`, at once or in time; a task that comes later goes to somebody else."""
        sender, worker, other = await connect(), await connect(), await connect()
        for timeout_s in (0, SHORT_S):
            with pytest.raises(TimeoutError, match="empty"):
                await worker.next_task(queue="empty", timeout_s=timeout_s)
        await sender.task_send(b"1", queue="empty")
        async with await other.next_task(queue="empty", timeout_s=0) as task:
            assert (task.body, task.attempt) == (b"1", 1)

    async def test_next_task_that_is_cancelled_takes_nothing(self, connect: Connect) -> None:
        """Neither while it waits, nor when its task is on the way: the task is another's, as its first attempt."""
        sender, worker, other = await connect(), await connect(), await connect()
        for number in range(20):
            fetching = asyncio.create_task(worker.next_task())
            await asyncio.sleep(0)
            await worker.broadcast_send(b"")  # the second operation: by then the first one waits at the broker
            sending = asyncio.create_task(sender.task_send(b"%d" % number))
            for _ in range(number):
                await asyncio.sleep(0)
            fetching.cancel()
            try:
                taken = await fetching
            except asyncio.CancelledError:
                taken = await other.next_task()
            await sending
            async with taken:
                assert (taken.body, taken.attempt) == (b"%d" % number, 1)

    async def test_next_task_by_subject(self, connect: Connect) -> None:
        """It fetches what matches, past older ones that don't."""
        peer = await connect()
        await peer.task_send(b"1", subject="a.x")
        await peer.task_send(b"2", subject="b.x")
        async with await peer.next_task(subject="b.*") as task:
            assert task.body == b"2"

    async def test_next_task_beside_a_handler(self, connect: Connect) -> None:
        """A fetched task takes no room of a handler on the same queue, and leaves it none."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox, credit=1)
        await sender.task_send(b"1")
        held = await inbox.next()
        await sender.task_send(b"2")
        async with await worker.next_task() as task:
            assert task.body == b"2"
            await sender.task_send(b"3")
            inbox.ack(held)
            held = await inbox.next()
            assert held.body == b"3"
        await sender.task_send(b"4")
        assert await worker.call([]) == []
        assert inbox.came.empty()
        inbox.ack(held)
        assert (await inbox.next()).body == b"4"

    async def test_a_call_settles_a_fetched_task(self, connect: Connect) -> None:
        """It is done with the commit of the call; leaving the block says nothing more."""
        sender, worker = await connect(), await connect()
        receipt = await sender.task_send(b"1", want_result=True)
        async with await worker.next_task() as task:
            assert await worker.call([b"add a"], acks=[task]) == [b"1"]
            assert await receipt.result() == b""
        assert (await sender.statistics()).sessions[worker.session].subscriptions == 0
        with pytest.raises(TimeoutError):
            await worker.next_task(timeout_s=0)

    # --- looking into queues, and changing them ---

    async def test_looking_into_a_queue(self, connect: Connect) -> None:
        """Every task with where it is, in the order in which they were accepted, page by page; nothing is taken."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        for number in range(5):
            await sender.task_send(b"%d" % number, queue="seen", key=f"k{number}", subject="s", priority=number)
        await sender.task_send(b"elsewhere", queue="other")
        await worker.add_task_subscriber(inbox, queue="seen")
        held = await inbox.next()
        first = await sender.tasks("seen", limit=3, bodies=True)
        rest = await sender.tasks("seen", limit=3, after=first[-1].order)
        assert [info.body for info in first] == [b"0", b"1", b"2"]
        assert [info.key for info in rest] == ["k3", "k4"]
        assert [info.place for info in (*first, *rest)] == ["ready"] * 4 + ["held"]
        info = rest[-1]
        assert (info.id, info.holder, info.attempt, info.size) == (held.id, worker.session, 1, 1)
        assert (info.priority, info.subject, info.body) == (4, "s", None)
        assert [info.id for info in await sender.tasks(place="held")] == [held.id]
        assert [info.key for info in await sender.tasks(key="k1")] == ["k1"]
        assert await sender.tasks("nothing here") == []

    async def test_deleting_tasks(self, connect: Connect) -> None:
        """Their senders are told; one that is held is left alone."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        held, doomed, spared = [await sender.task_send(b"%d" % number, want_result=True) for number in range(3)]
        await worker.add_task_subscriber(inbox)
        task = await inbox.next()
        assert await sender.delete(held.id, doomed.id, "nobody") == 1
        with pytest.raises(TaskDeletedError) as error:
            await doomed.result()
        assert error.value.task == doomed.id
        inbox.ack(task, b"done")
        assert await held.result() == b"done"
        assert (await inbox.next()).id == spared.id

    async def test_burying_tasks(self, connect: Connect) -> None:
        """Their senders are told; they stay as dead letters, and are as good as new when they are requeued. One that is
        held is left alone."""
        sender = await connect()
        held = await sender.task_send(b"held", queue="q")
        task = await sender.next_task(queue="q")
        doomed = await sender.task_send(b"doomed", queue="q", want_result=True)
        spared = await sender.task_send(b"spared", queue="q")
        assert await sender.bury(held.id, doomed.id, "nobody") == 1
        with pytest.raises(DeadLetterError) as error:
            await doomed.result()
        assert error.value.task == doomed.id
        places = {info.id: info.place for info in await sender.tasks("q")}
        assert places == {held.id: "held", doomed.id: "dead", spared.id: "ready"}
        assert await sender.bury(queue="q", place="ready") == 1
        assert await sender.requeue(doomed.id) == 1
        async with await sender.next_task(queue="q") as again:
            assert (again.id, again.attempt) == (doomed.id, 1)
        await task.acknowledge()
        assert [info.id for info in await sender.tasks("q")] == [spared.id]

    async def test_purging_a_queue(self, connect: Connect) -> None:
        """All that nobody holds is gone, the dead too; other queues are as they were."""
        sender = await connect()
        past = datetime.now(UTC) - timedelta(seconds=1)
        for number in range(3):
            await sender.task_send(b"%d" % number, queue="full")
        await sender.task_send(b"dead", queue="full", expires_at=past)
        await sender.task_send(b"other", queue="other")
        held = await sender.next_task(queue="full")
        assert await sender.purge("full") == 3
        assert [info.id for info in await sender.tasks("full")] == [held.id]
        assert len(await sender.tasks("other")) == 1
        await held.acknowledge()

    async def test_purging_a_long_queue(self, connect: Connect) -> None:
        """Others are served meanwhile; what they send after it is answered is kept."""
        sender, other = await connect(), await connect()
        await asyncio.gather(*(sender.task_send(b"", queue="long") for _ in range(2500)))
        purge = asyncio.create_task(sender.purge("long"))
        await other.task_send(b"other", queue="other")
        assert await purge == 2500
        kept = await other.task_send(b"", queue="long")
        assert [info.id for info in await sender.tasks("long")] == [kept.id]
        assert len(await sender.tasks("other")) == 1

    async def test_requeuing_all_dead_letters(self, connect: Connect) -> None:
        """Of a queue, in one go."""
        sender = await connect()
        for queue in ("dead", "dead", "other"):
            await sender.task_send(b"x", queue=queue, max_attempts=1)
            task = await sender.next_task(queue=queue)
            await task.reject("a test")
        assert [info.reason for info in await sender.tasks("dead", place="dead")] == ["a test", "a test"]
        assert await sender.requeue(queue="dead", place="dead") == 2
        assert [info.place for info in await sender.tasks("dead")] == ["ready", "ready"]
        assert len(await sender.tasks(place="dead")) == 1

    async def test_a_queue_has_limits(self, connect: Connect) -> None:
        """How many may be held at once, how many may be there: changeable at any time, and seen."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await sender.configure_queue("q", QueueLimits(concurrency=1, max_length=3))
        await worker.add_task_subscriber(inbox, queue="q", credit=5)
        for number in range(3):
            await sender.task_send(b"%d" % number, queue="q")
        with pytest.raises(BusyError):
            await sender.task_send(b"3", queue="q")
        await inbox.next()
        assert await worker.call([]) == []
        assert inbox.came.empty()
        assert (await sender.statistics()).queues["q"].limits.concurrency == 1
        await sender.configure_queue("q", QueueLimits())
        assert [(await inbox.next()).body for _ in range(2)] == [b"1", b"2"]

    async def test_statistics(self, connect: Connect) -> None:
        """Queues, sessions and counts, as they are now."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox, queue="q", credit=2)
        for _ in range(4):
            await sender.task_send(b"", queue="q")
        inbox.ack(await inbox.next())
        await inbox.next()
        await inbox.next()
        numbers = await sender.statistics()
        queue, session = numbers.queues["q"], numbers.sessions[worker.session]
        assert (queue.ready, queue.held, queue.accepted, queue.settled) == (1, 2, 4, 1)
        assert (session.connected, session.held) == (True, 2)
        assert numbers.accepted >= 4

    # --- questions ---

    async def test_a_question_is_answered(self, connect: Connect) -> None:
        """The one who subscribed under the name answers, also to itself."""
        asker, answerer = await connect(), await connect()

        async def double(body: bytes) -> bytes:
            return body * 2

        await answerer.add_rpc_subscriber(double, "double")
        assert await asker.rpc_send("double", b"ab") == b"abab"
        assert await answerer.rpc_send("double", b"cd") == b"cdcd"

    async def test_nobody_listens(self, connect: Connect) -> None:
        """A question to a name that nobody has is refused at once."""
        with pytest.raises(UnroutableError) as error:
            await (await connect()).rpc_send("nobody", b"", timeout_s=1000)
        assert error.value.recipient == "nobody"

    async def test_errors_of_an_answerer_cross_as_data(self, connect: Connect) -> None:
        """An error of our tree arrives as itself, any other as a `RemoteError`; a cancellation is an answer too."""
        asker, answerer = await connect(), await connect()

        async def refuse(body: bytes) -> bytes:
            match body:
                case b"ours":
                    raise BusyError("no")
                case b"foreign":
                    raise KeyError("x")
                case b"no bytes":
                    return "text"  # type: ignore[return-value]
                case _:
                    raise asyncio.CancelledError

        await answerer.add_rpc_subscriber(refuse, "refuse")
        with pytest.raises(BusyError):
            await asker.rpc_send("refuse", b"ours")
        for body, kind in ((b"foreign", "KeyError"), (b"no bytes", "TypeError"), (b"cancel", "CancelledError")):
            with pytest.raises(RemoteError) as error:
                await asker.rpc_send("refuse", body)
            assert error.value.failure.type.endswith(kind)

    async def test_a_name_belongs_to_one(self, connect: Connect) -> None:
        """A second subscriber is refused; when the first cancels or leaves, the name is free."""
        first, second = await connect(), await connect()
        subscription = await first.add_rpc_subscriber(echo, "name")
        for peer in (first, second):
            with pytest.raises(DuplicateSubscriberError):
                await peer.add_rpc_subscriber(echo, "name")
        assert await second.rpc_send("name", b"still the first") == b"still the first"
        await subscription.cancel()
        with pytest.raises(UnroutableError):
            await second.rpc_send("name", b"")
        await second.add_rpc_subscriber(echo, "name")
        await subscription.cancel()
        assert await first.rpc_send("name", b"now the second") == b"now the second"
        await second.close()
        await first.add_rpc_subscriber(echo, "name")

    async def test_a_question_has_an_end(self, connect: Connect) -> None:
        """Without an answer in time: `IndeterminateError`, since it may have happened."""
        asker, answerer = await connect(), await connect()
        await answerer.add_rpc_subscriber(never, "never")
        with pytest.raises(IndeterminateError):
            await asker.rpc_send("never", b"", timeout_s=SHORT_S)

    async def test_the_answerer_leaves(self, connect: Connect) -> None:
        """Who waits for an answer of a peer that leaves is told so at once."""
        asker, answerer = await connect(), await connect()
        asked = asyncio.Event()

        async def ask_me(body: bytes) -> bytes:
            asked.set()
            return await never(body)

        await answerer.add_rpc_subscriber(ask_me, "leaving")
        question = asyncio.create_task(asker.rpc_send("leaving", b"", timeout_s=1000))
        await asked.wait()
        await answerer.close()
        with pytest.raises(IndeterminateError):
            await question

    async def test_order_without_waiting(self, connect: Connect) -> None:
        """Operations go out in the order in which they were begun: a name is known to the question right behind it."""
        peer = await connect()
        results = await asyncio.gather(peer.add_rpc_subscriber(echo, "me"), peer.rpc_send("me", b"early"))
        assert results[1] == b"early"

    async def test_a_question_that_is_given_up_disturbs_nobody(self, connect: Connect) -> None:
        """The caller's cancellation ends its wait; other questions go on."""
        asker, answerer = await connect(), await connect()
        await answerer.add_rpc_subscriber(never, "never")
        await answerer.add_rpc_subscriber(echo, "echo")
        question = asyncio.create_task(asker.rpc_send("never", b"", timeout_s=1000))
        await asker.rpc_send("echo", b"")
        question.cancel()
        with pytest.raises(asyncio.CancelledError):
            await question
        assert await asker.rpc_send("echo", b"x") == b"x"

    # --- broadcasts ---

    @pytest.mark.parametrize(
        ("sender", "subject", "heard"),
        [
            (None, None, [b"1", b"2", b"3"]),
            ("p1", None, [b"1", b"2"]),
            ("p*", "state.#", [b"1", b"3"]),
            ("p*", "state.*", []),
            (None, "state.*.finished", [b"3"]),
            ("p1", "other", [b"2"]),
            ("*", "#", [b"1", b"2", b"3"]),
            ("*", "*", [b"2"]),
            ("p", None, []),
        ],
    )
    async def test_broadcasts_are_filtered(
        self, connect: Connect, sender: str | None, subject: str | None, heard: list[bytes]
    ) -> None:
        """A broadcast reaches whom it matches, also a peer that subscribes to nothing else, in order."""
        speaker, listener = await connect(), await connect()
        got: list[bytes] = []
        end = asyncio.Event()

        async def listen(broadcast: Broadcast) -> None:
            got.append(broadcast.body)

        async def until(broadcast: Broadcast) -> None:
            end.set()

        await listener.add_broadcast_subscriber(listen, sender=sender, subject=subject)
        await listener.add_broadcast_subscriber(until, sender="the", subject="end")
        await speaker.broadcast_send(b"1", sender="p1", subject="state.created.running")
        await speaker.broadcast_send(b"2", sender="p1", subject="other")
        await speaker.broadcast_send(b"3", sender="p2", subject="state.running.finished")
        await speaker.broadcast_send(b"end", sender="the", subject="end")
        await end.wait()
        assert [body for body in got if body != b"end"] == heard

    async def test_a_broadcast_without_names(self, connect: Connect) -> None:
        """A broadcast without sender and subject matches only those that ask for neither."""
        peer = await connect()
        got: asyncio.Queue[Broadcast] = asyncio.Queue()

        async def named(broadcast: Broadcast) -> None:
            raise AssertionError("not for me")

        await peer.add_broadcast_subscriber(named, sender="*")
        await peer.add_broadcast_subscriber(got.put)
        await peer.broadcast_send(b"x")
        broadcast = await got.get()
        assert (broadcast.body, broadcast.sender, broadcast.subject) == (b"x", None, None)

    async def test_a_listener_that_fails_or_leaves(self, connect: Connect) -> None:
        """A handler that raises does not disturb the others; after `cancel` nothing comes any more."""
        peer = await connect()
        got: asyncio.Queue[Broadcast] = asyncio.Queue()
        heard: list[bytes] = []

        async def fail(broadcast: Broadcast) -> None:
            heard.append(broadcast.body)
            raise ValueError("mine")

        subscription = await peer.add_broadcast_subscriber(fail)
        await peer.add_broadcast_subscriber(got.put)
        await peer.broadcast_send(b"1")
        assert (await got.get()).body == b"1"
        await subscription.cancel()
        await subscription.cancel()
        await peer.broadcast_send(b"2")
        assert (await got.get()).body == b"2"
        assert heard == [b"1"]

    # --- calls ---

    async def test_a_call_is_answered_in_order(self, connect: Connect) -> None:
        """One answer a request; nothing asked, nothing answered."""
        peer = await connect()
        assert await peer.call([b"add a", b"add b", b"words"]) == [b"1", b"2", b"a b"]
        assert await peer.call([]) == []

    async def test_a_call_is_all_or_nothing(self, connect: Connect) -> None:
        """If the service refuses one request, nothing is done: no word is kept, and the task stays held."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox)
        receipt = await sender.task_send(b"", want_result=True)
        task = await inbox.next()
        with pytest.raises(InvalidStateError):
            await worker.call([b"add a", b"refuse"], acks=[task])
        with pytest.raises(RemoteError) as error:
            await worker.call([b"add a", b"break"], acks=[task])
        assert error.value.failure.type == "ZeroDivisionError"
        assert await worker.call([b"words"]) == [b""]
        inbox.ack(task, b"still mine")
        assert await receipt.result() == b"still mine"

    async def test_a_call_settles_tasks(self, connect: Connect) -> None:
        """A task that a call acknowledged is done with, whatever its handler does then; its credit is free."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox)
        first = await sender.task_send(b"1", want_result=True)
        await sender.task_send(b"2")
        task = await inbox.next()
        assert await worker.call([b"add a"], acks=[task]) == [b"1"]
        assert await first.result() == b""
        assert (await inbox.next()).body == b"2", "though the first handler goes on"
        inbox.fail(task, ValueError("after the end"))
        await sender.task_send(b"3")
        assert await worker.call([]) == []
        assert inbox.came.empty(), "the end of the first one frees no place again"

    async def test_a_call_may_depend_on_a_task_in_hand(self, connect: Connect) -> None:
        """A call that says "as long as I hold this task" does nothing once the task is done with."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox)
        await sender.task_send(b"")
        task = await inbox.next()
        assert await worker.call([b"add a"], holding=[task]) == [b"1"]
        assert await worker.call([b"add b"], acks=[task], holding=[task]) == [b"2"]
        with pytest.raises(TaskRejectedError):
            await worker.call([b"add c"], holding=[task])
        assert await worker.call([b"words"]) == [b"a b"]
        inbox.ack(task)

    async def test_a_call_frees_the_key_for_the_task_that_it_causes(self, connect: Connect) -> None:
        """The new task of a call has the key of the task that it acknowledges: it is delivered at once."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        await worker.add_task_subscriber(inbox, credit=2)
        await sender.task_send(b"first", key="k")
        task = await inbox.next()
        await worker.call([b"task default k"], acks=[task])
        following = await inbox.next()
        assert (following.key, following.body) == ("k", b"made by the service")
        inbox.ack(task)

    # --- handlers ---

    async def test_plain_handlers_run_in_worker_threads(self, connect: Connect) -> None:
        """A plain ``def`` may wait without stopping anybody: others answer meanwhile; each has its subscriber's
        context."""
        asker, answerer = await connect(), await connect()
        threads: set[int] = set()
        go_on = threading.Event()
        mark: ContextVar[str] = ContextVar("mark")
        mark.set("the subscriber's")

        def question(body: bytes) -> bytes:
            threads.add(threading.get_ident())
            go_on.wait()
            return mark.get().encode()

        def task(task: IncomingTask) -> bytes:
            threads.add(threading.get_ident())
            return task.body * 2

        def heard(broadcast: Broadcast) -> None:
            threads.add(threading.get_ident())
            go_on.set()

        await answerer.add_rpc_subscriber(question, "plain")
        await answerer.add_rpc_subscriber(echo, "echo")
        await answerer.add_task_subscriber(task)
        await answerer.add_broadcast_subscriber(heard)
        mark.set("changed since")
        asked = asyncio.create_task(asker.rpc_send("plain", b"", timeout_s=1000))
        assert await asker.rpc_send("echo", b"x") == b"x"
        assert await (await asker.task_send(b"ab", want_result=True)).result() == b"abab"
        assert not asked.done()
        await asker.broadcast_send(b"")
        assert await asked == b"the subscriber's"
        assert threading.get_ident() not in threads

    async def test_a_plain_handler_may_return_something_to_await(self, connect: Connect) -> None:
        """As a lambda around a coroutine function does."""
        peer = await connect()
        await peer.add_rpc_subscriber(lambda body: echo(body + b"!"), "lambda")
        assert await peer.rpc_send("lambda", b"x") == b"x!"

    async def test_errors_of_plain_handlers_are_answers_too(self, connect: Connect) -> None:
        """`StopIteration` as well, which no future can hold."""
        peer = await connect()

        def fail(body: bytes) -> bytes:
            raise StopIteration if body == b"stop" else ValueError("mine")

        await peer.add_rpc_subscriber(fail, "fail")
        with pytest.raises(RemoteError, match="mine"):
            await peer.rpc_send("fail", b"")
        with pytest.raises(RemoteError, match="StopIteration"):
            await peer.rpc_send("fail", b"stop")

    async def test_a_handler_may_use_its_communicator(self, connect: Connect) -> None:
        """A question to itself, a task, a broadcast, a new name: in handlers of all three kinds."""
        peer = await connect()
        heard: asyncio.Queue[bytes] = asyncio.Queue()

        async def work(task: IncomingTask) -> bytes:
            answer = await peer.rpc_send("busy", task.body)
            await peer.broadcast_send(answer, sender="work")
            return answer

        async def busy(body: bytes) -> bytes:
            subscription = await peer.add_rpc_subscriber(echo, "inner")
            answer = await peer.rpc_send("inner", body)
            await subscription.cancel()
            return answer + b"!"

        async def listen(broadcast: Broadcast) -> None:
            await heard.put(await peer.rpc_send("busy", broadcast.body))

        await peer.add_rpc_subscriber(busy, "busy")
        await peer.add_task_subscriber(work)
        await peer.add_broadcast_subscriber(listen, sender="work")
        receipt = await peer.task_send(b"x", want_result=True)
        assert await receipt.result() == b"x!"
        assert await heard.get() == b"x!!"

    async def test_an_error_of_ours_that_a_handler_raised(self, connect: Connect) -> None:
        """It comes as what it is, with traceback and cause of there; but what would say something of a message is not
        taken for a word on the one that led to the handler."""
        peer = await connect()

        async def fail(argument: object) -> bytes:
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise BusyError("outer") from error

        async def tell(argument: object) -> bytes:
            raise NotDeliveredError("somebody else")

        await peer.add_rpc_subscriber(fail, "fail")
        await peer.add_rpc_subscriber(tell, "tell")
        with pytest.raises(BusyError, match="outer") as busy:
            await peer.rpc_send("fail", b"")
        assert isinstance(busy.value.__cause__, RemoteError)
        failure = busy.value.__cause__.failure
        assert "in fail" in failure.traceback
        assert failure.cause is not None
        assert failure.cause.type == "KeyError"
        with pytest.raises(RemoteError, match="NotDeliveredError: the message to 'somebody else'"):
            await peer.rpc_send("tell", b"")
        with pytest.raises(UnroutableError) as nobody:
            await peer.rpc_send("nobody", b"")
        assert nobody.value.__cause__ is None

    async def test_a_remote_error_has_all_of_it(self, connect: Connect) -> None:
        """Type, message, traceback and cause, of questions and of tasks."""
        peer = await connect()

        async def fail(argument: object) -> bytes:
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise LookupError("outer") from error

        await peer.add_rpc_subscriber(fail, "fail")
        await peer.add_task_subscriber(fail)
        receipt = await peer.task_send(b"", want_result=True)
        for answer in (peer.rpc_send("fail", b""), receipt.result()):
            with pytest.raises(RemoteError) as error:
                await answer
            failure = error.value.failure
            assert (failure.type, failure.message) == ("LookupError", "outer")
            assert "in fail" in failure.traceback
            assert failure.cause is not None
            assert (failure.cause.type, failure.cause.message) == ("KeyError", "'inner'")

    async def test_words_that_can_not_be_encoded(self, connect: Connect) -> None:
        """An error with the name of a file in another encoding is an answer like others, of questions and of tasks."""
        asker, answerer = await connect(), await connect()
        name = b"caf\xe9".decode("utf-8", "surrogateescape")

        async def fail(argument: object) -> bytes:
            if isinstance(argument, bytes):
                raise FileNotFoundError(name)
            raise TaskRejectedError(name)

        await answerer.add_rpc_subscriber(fail, "fail")
        await answerer.add_task_subscriber(fail)
        with pytest.raises(RemoteError, match=r"caf\\udce9"):
            await asker.rpc_send("fail", b"")
        receipt = await asker.task_send(b"", want_result=True, max_attempts=1)
        with pytest.raises(DeadLetterError, match=r"caf\\udce9"):
            await receipt.result()
        async with await _sent(asker) as task:
            await task.reject(name)
        async with await asker.next_task(queue="fetched") as task:
            await task.fail(OSError(name))

    async def test_what_can_not_be_sent_back_is_an_error(self, connect: Connect) -> None:
        """A task's result that is no bytes, or too large, is an error to its sender: not silence, and not a retry."""
        peer = await connect()

        async def work(task: IncomingTask) -> bytes:
            return bytes(MAX_BODY_BYTES + 1) if task.body == b"large" else {"no": "bytes"}  # type: ignore[return-value]

        await peer.add_task_subscriber(work)
        with pytest.raises(MessageTooLargeError):
            await (await peer.task_send(b"large", want_result=True)).result()
        with pytest.raises(RemoteError, match="bytes") as error:
            await (await peer.task_send(b"", want_result=True)).result()
        assert error.value.failure.type.endswith("TypeError")

    async def test_a_loop_that_is_gone_gives_its_tasks_back(self, connect: Connect) -> None:
        """A handler whose loop was closed does not keep its task: it goes to somebody else."""
        sender, worker, other = await connect(), await connect(), await connect()
        got = threading.Event()

        async def elsewhere() -> None:
            async def hold(task: IncomingTask) -> None:
                got.set()
                await asyncio.get_running_loop().create_future()

            await worker.add_task_subscriber(hold, credit=2)
            while not got.is_set():
                await worker.broadcast_send(b"")

        held = await sender.task_send(b"1")
        await asyncio.to_thread(asyncio.run, elsewhere())
        later = await sender.task_send(b"2")
        inbox = Inbox()
        await other.add_task_subscriber(inbox, credit=2)
        assert {(await inbox.next()).id, (await inbox.next()).id} == {held.id, later.id}
        numbers = await sender.statistics()
        assert numbers.sessions[worker.session].subscriptions == 0
        assert numbers.delivered < 10, "it was not offered to the closed loop over and over"

    # --- bounds ---

    async def test_too_many_questions(self, connect: Connect) -> None:
        """Who has as many in hand as it can take refuses the next with `BusyError`, until one is answered."""
        asker, answerer = await connect(), await connect()
        come = asyncio.Semaphore(0)
        ends: dict[bytes, asyncio.Future[bytes]] = {}

        async def slow(body: bytes) -> bytes:
            ends[body] = asyncio.get_running_loop().create_future()
            come.release()
            return await ends[body]

        await answerer.add_rpc_subscriber(slow, "slow")
        bodies = [b"%d" % number for number in range(self.max_questions_in_hand)]
        asking = [asyncio.create_task(asker.rpc_send("slow", body, timeout_s=1000)) for body in bodies]
        for _ in asking:
            await come.acquire()
        with pytest.raises(BusyError, match="slow"):
            await asker.rpc_send("slow", b"one more")
        ends.pop(bodies[0]).set_result(b"first")
        assert await asking[0] == b"first"
        asking[0] = asyncio.create_task(asker.rpc_send("slow", b"another"))
        await come.acquire()
        for end in ends.values():
            end.set_result(b"done")
        assert await asyncio.gather(*asking) == [b"done"] * len(asking)

    async def test_who_is_slow_is_told_what_it_missed(self, connect: Connect) -> None:
        """Broadcasts beyond the bound are dropped and counted for each subscription; when it caught up it is told how
        many, and so are the callbacks of `on_reconnect`. Another that is fast misses nothing."""
        speaker, listener = await connect(), await connect()
        go_on = asyncio.Event()
        slow: asyncio.Queue[bytes] = asyncio.Queue()
        fast: asyncio.Queue[bytes] = asyncio.Queue()
        missed: asyncio.Queue[int] = asyncio.Queue()
        again: asyncio.Queue[str] = asyncio.Queue()

        async def listen(broadcast: Broadcast) -> None:
            await go_on.wait()
            slow.put_nowait(broadcast.body)

        async def keep_up(broadcast: Broadcast) -> None:
            fast.put_nowait(broadcast.body)

        def never(count: int) -> None:
            raise AssertionError("it missed nothing")

        await listener.add_broadcast_subscriber(listen, on_missed=missed.put_nowait)
        await listener.add_broadcast_subscriber(keep_up, on_missed=never)
        listener.on_reconnect(lambda: again.put_nowait("something was missed"))
        bodies = [b"%d" % number for number in range(self.max_broadcasts_in_hand + 2)]
        for body in bodies:
            await speaker.broadcast_send(body)
            assert await fast.get() == body
        assert missed.empty()
        go_on.set()
        assert [await slow.get() for _ in bodies[:-2]] == bodies[:-2]
        assert await missed.get() == 2
        assert await again.get()
        await speaker.broadcast_send(b"on we go")
        assert await fast.get() == await slow.get() == b"on we go"
        assert missed.empty()

    # --- the whole ---

    async def test_handlers_run_in_the_loop_of_their_subscriber(self, connect: Connect) -> None:
        """Two loops, one communicator: each handler runs in its own; both may ask."""
        peer = await connect()
        threads: dict[str, int] = {}

        def handler(name: str) -> Callable[[bytes], Awaitable[bytes]]:
            async def handle(body: bytes) -> bytes:
                threads[name] = threading.get_ident()
                return body

            return handle

        await peer.add_rpc_subscriber(handler("here"), "here")

        async def elsewhere() -> bytes:
            await peer.add_rpc_subscriber(handler("there"), "there")
            return await peer.rpc_send("there", b"a") + await peer.rpc_send("here", b"b")

        assert await asyncio.to_thread(asyncio.run, elsewhere()) == b"ab"
        assert threads["here"] == threading.get_ident() != threads["there"]

    async def test_what_is_too_large_is_not_sent(self, connect: Connect) -> None:
        """Over the limit: `MessageTooLargeError`, before anything is sent; the peer goes on."""
        peer = await connect()
        body = bytes(MAX_BODY_BYTES + 1)
        with pytest.raises(MessageTooLargeError):
            await peer.rpc_send("me", body)
        with pytest.raises(MessageTooLargeError):
            await peer.broadcast_send(body)
        with pytest.raises(MessageTooLargeError):
            await peer.call([body])
        with pytest.raises(MessageTooLargeError):
            await peer.call([body[:-1], body[:-1]])
        await peer.add_rpc_subscriber(echo, "me")
        assert await peer.rpc_send("me", b"x") == b"x"

    async def test_files_are_blobs_too(self, connect: Connect, tmp_path: Path) -> None:
        """One that is saved takes the place of another when it is whole; what is not there leaves that one alone."""
        sender, receiver = await connect(), await connect()
        body = os.urandom(100_000)
        (tmp_path / "from").write_bytes(body)
        (tmp_path / "to").write_bytes(b"old")
        with pytest.raises(BlobNotFoundError):
            await receiver.blob_save(BlobRef("0" * 64, 1), tmp_path / "to")
        assert (tmp_path / "to").read_bytes() == b"old"
        ref = await sender.blob_put(tmp_path / "from")
        assert ref == BlobRef(hashlib.sha256(body).hexdigest(), len(body))
        await receiver.blob_save(ref, tmp_path / "to")
        assert (tmp_path / "to").read_bytes() == body
        with pytest.raises(IsADirectoryError, match=f"'{re.escape(str(tmp_path))}'$"):
            await receiver.blob_save(ref, tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["from", "to"]

    async def test_a_large_task_arrives_as_a_blob(self, connect: Connect) -> None:
        """A task over the limit reaches its handler, or who fetches it, with all of its body; so do bytes that were put
        as a blob, under a name that follows from them."""
        sender, worker = await connect(), await connect()
        body = os.urandom(MAX_BODY_BYTES + 1)
        inbox = Inbox()
        subscription = await worker.add_task_subscriber(inbox)
        receipt = await sender.task_send(body, subject="s", want_result=True)
        task = await inbox.next()
        assert (task.id, task.subject, task.body == body) == (receipt.id, "s", True)
        inbox.ack(task, b"read")
        assert await receipt.result() == b"read"
        await subscription.cancel()
        await sender.task_send(body)
        [listed] = await sender.tasks(bodies=True)
        assert (listed.size, listed.body, listed.blob) == (len(body), None, hashlib.sha256(body).hexdigest())
        async with await worker.next_task() as fetched:
            assert fetched.body == body
        ref = await sender.blob_put(b"few bytes")
        assert ref == BlobRef(hashlib.sha256(b"few bytes").hexdigest(), 9)
        assert await worker.blob_get(ref) == b"few bytes"
        with pytest.raises(BlobNotFoundError):
            await worker.blob_get(BlobRef("0" * 64, 1))

    async def test_the_largest_body_passes(self, connect: Connect) -> None:
        """A body of exactly the limit goes there and back; a larger answer is an error of its own."""
        peer = await connect()

        async def grow(body: bytes) -> bytes:
            return body + b"x"

        await peer.add_rpc_subscriber(echo, "echo")
        await peer.add_rpc_subscriber(grow, "grow")
        body = bytes(MAX_BODY_BYTES)
        assert await peer.rpc_send("echo", body) == body
        with pytest.raises(MessageTooLargeError):
            await peer.rpc_send("grow", body)

    async def test_bodies_are_bytes(self, connect: Connect) -> None:
        """Or what holds some; so are results and answers. Anything else is misuse."""
        peer = await connect()
        with pytest.raises(TypeError, match="bytes"):
            await peer.task_send("text")  # type: ignore[arg-type]
        await peer.add_task_subscriber(lambda task: bytearray(b"some"))  # type: ignore[arg-type, return-value]
        await peer.add_rpc_subscriber(lambda question: memoryview(question), "name")  # type: ignore[arg-type, return-value]
        receipt = await peer.task_send(bytearray(b"x"), want_result=True)  # type: ignore[arg-type]
        assert await receipt.result() == b"some"
        assert await peer.rpc_send("name", memoryview(b"y")) == b"y"  # type: ignore[arg-type]

    async def test_sessions_have_names_of_their_own(self, connect: Connect) -> None:
        """No two peers share one."""
        assert (await connect()).session != (await connect()).session

    async def test_a_closed_communicator_says_so(self, connect: Connect) -> None:
        """After `close` everything raises `CommunicatorClosedError`; closing again is nothing."""
        peer, other = await connect(), await connect()
        await other.add_rpc_subscriber(never, "never")
        subscription = await peer.add_rpc_subscriber(echo, "echo")
        question = asyncio.create_task(peer.rpc_send("never", b""))
        await peer.rpc_send("echo", b"")
        fetching = asyncio.create_task(peer.next_task(queue="empty"))
        await peer.rpc_send("echo", b"")
        await asyncio.gather(peer.close(), peer.close())
        await peer.close()
        for waiting in (question, fetching):
            with pytest.raises(CommunicatorClosedError):
                await waiting
        for operation in (
            peer.task_send(b""),
            peer.rpc_send("echo", b""),
            peer.broadcast_send(b""),
            peer.call([]),
            peer.add_rpc_subscriber(echo, "x"),
        ):
            with pytest.raises(CommunicatorClosedError):
                await operation
        await subscription.cancel()

    async def test_a_handler_may_close_its_communicator(self, connect: Connect) -> None:
        """`close` inside a handler ends, and the handler goes on."""
        sender, worker = await connect(), await connect()
        ended = asyncio.Event()

        async def leave(task: IncomingTask) -> None:
            await worker.close()
            ended.set()

        await worker.add_task_subscriber(leave)
        await sender.task_send(b"")
        await ended.wait()

    # --- timers of the service ----------------------------------------------------------------------

    async def test_the_timers_of_the_service_fire_in_time(self, connect: Connect) -> None:
        """The earlier one first, whichever was set first, though nobody says anything meanwhile; late ones at once."""
        sender, worker = await connect(), await connect()
        inbox = Inbox()
        for queue in ("soon", "sooner", "now"):
            await worker.add_task_subscriber(inbox, queue=queue)
        began = time.monotonic()
        await sender.call([b"timer 0.2 soon"])
        await sender.call([b"timer 0.1 sooner", b"timer -5 now"])
        came = [(await inbox.next()).queue for _ in range(3)]
        assert came == ["now", "sooner", "soon"]
        assert time.monotonic() - began >= 0.2
