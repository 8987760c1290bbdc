"""What every `Communicator` must do, as a runnable suite.

Subclass `CommunicatorContract` in a test module (pytest with pytest-asyncio in auto mode) and give it a `connect`
fixture: an async function that returns a new peer of one broker, whose service behaves as `ContractService` does.

::

    class TestMine(CommunicatorContract):
        @pytest.fixture
        async def connect(self):
            broker = ...
            async with AsyncExitStack() as stack:
                async def connect() -> Communicator:
                    return await stack.enter_async_context(await broker.connect())
                yield connect
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from prunus.errors import (
    BusyError,
    CommunicatorClosedError,
    DuplicateSubscriberError,
    IndeterminateError,
    InvalidStateError,
    MessageTooLargeError,
    RemoteError,
    TaskRejectedError,
    UnroutableError,
)
from prunus.messaging.communicator import MAX_BODY_BYTES, Broadcast, Communicator, IncomingTask
from prunus.messaging.exchange import NewTask, Served

Connect = Callable[[], Awaitable[Communicator]]
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

    def left(self, session: str) -> tuple[NewTask, ...]:
        return ()

    def due(self) -> float | None:
        [(at,)] = self._connection.execute("SELECT min(at) FROM timer")
        return None if at is None else at - self._clock()

    def tick(self) -> tuple[NewTask, ...]:
        now = self._clock()
        fired = self._connection.execute("SELECT queue FROM timer WHERE at <= ? ORDER BY at", (now,)).fetchall()
        self._connection.execute("DELETE FROM timer WHERE at <= ?", (now,))
        return tuple(NewTask(queue=queue, body=b"made by a timer") for (queue,) in fired)

    def execute(self, request: bytes, session: str) -> Served:
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


async def never(body: bytes) -> bytes:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("not reached")


class CommunicatorContract:
    """See the module."""

    @pytest.fixture
    async def connect(self) -> Connect:
        raise NotImplementedError("give your subclass a fixture `connect`")

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
                inbox.most = min(inbox.most, 3)
        assert inbox.most <= 3

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
            ("p*", "state.*", [b"1", b"3"]),
            (None, "state.*.finished", [b"3"]),
            ("p1", "other", [b"2"]),
            ("*", "*", [b"1", b"2", b"3"]),
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
        inbox.fail(task, ValueError("after the end"))
        assert (await inbox.next()).body == b"2"

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
            await peer.task_send(body)
        with pytest.raises(MessageTooLargeError):
            await peer.call([body])
        with pytest.raises(MessageTooLargeError):
            await peer.call([body[:-1], body[:-1]])
        await peer.add_rpc_subscriber(echo, "me")
        assert await peer.rpc_send("me", b"x") == b"x"

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
        """Anything else is misuse."""
        with pytest.raises(TypeError, match="bytes"):
            await (await connect()).task_send("text")  # type: ignore[arg-type]

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
        await asyncio.gather(peer.close(), peer.close())
        await peer.close()
        with pytest.raises(CommunicatorClosedError):
            await question
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
        await sender.call([b"timer 0.1 soon"])
        await sender.call([b"timer 0.05 sooner"])
        await sender.call([b"timer -5 now"])
        came = [(await inbox.next()).queue for _ in range(3)]
        assert came == ["now", "sooner", "soon"]
        assert time.monotonic() - began >= 0.1
