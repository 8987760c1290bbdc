"""What the communicators and brokers before this one lost, leaked or let hang: each defect by its name, not here.

``w1`` to ``w25`` are those of AiiDA's ZeroMQ broker, the others those of kiwipy over RabbitMQ and of what was built on
it. All over a real socket. Some are shown where they belong: killed and stopped processes and stuck peers in
`test_unix`, keys in `test_access` and `test_keys`, proofs of death in `test_liveness`, disks in ``tests/faults``.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from asyncio.subprocess import create_subprocess_exec
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import prunus
from prunus.errors import (
    CommunicatorClosedError,
    DeadLetterError,
    DuplicateSubscriberError,
    IndeterminateError,
    RemoteError,
    TaskRejectedError,
    UnroutableError,
)
from prunus.messaging import connect
from prunus.messaging.communicator import Broadcast, Communicator, IncomingTask
from prunus.messaging.peer import PeerCommunicator
from prunus.testing.communicator_contract import Inbox, echo, never
from tests.messaging.served import serving

Connect = Callable[[], Awaitable[PeerCommunicator]]

SHOWN_ELSEWHERE = {
    "w2: a process that stands still for long, and then its work is done twice": (
        "tests/messaging/test_unix.py::test_a_stopped_worker_keeps_its_work",
        "tests/messaging/test_unix.py::test_a_stopped_broker_takes_nobody_for_dead",
        "tests/messaging/test_unix.py::test_who_was_silent_for_too_long_has_lost_its_tasks",
    ),
    "w10: the tasks of a dead worker wait until another client leaves": (
        "tests/messaging/test_unix.py::test_a_killed_worker_is_replaced_within_milliseconds",
        "tests/messaging/test_unix.py::test_a_restarted_broker_knows_the_dead",
    ),
    "w13: one slow client blocks the whole broker": (
        "tests/messaging/test_unix.py::test_a_stuck_peer_stops_nobody",
        "tests/torture/fuzz/test_fuzz.py::test_a_hundred_peers_that_never_read_stop_nobody",
    ),
    "w15: no fsync; what a power cut tears is deleted; a full disk is only logged": (
        "tests/torture/disk/test_disk.py::test_no_power_cut_takes_back_what_was_confirmed",
        "tests/messaging/test_exchange.py::test_a_damaged_body_is_a_dead_letter",
        "tests/messaging/test_unix.py::test_a_full_disk_refuses_new_tasks_only",
    ),
    "w16: two brokers on one folder": ("tests/runtime/test_locks.py::test_a_second_holder_is_refused",),
    "w17: a number of a process that was used again is taken for a broker": (
        "tests/runtime/test_locks.py::test_an_old_file_with_a_reused_pid_is_no_holder",
        "tests/messaging/test_liveness.py::test_who_is_dead_already_is_told",
    ),
    "w18: what a task costs grows with the number of those that wait": (
        "tests/messaging/test_queues.py::test_a_dispatch_does_not_look_at_what_waits",
    ),
    "w23: no limits, no metrics": (
        "tests/messaging/test_queues.py::test_length_of_a_queue",
        "tests/messaging/test_exchange.py::test_sessions_and_subscriptions_have_a_bound",
        "tests/messaging/test_exchange.py::test_statistics_are_told",
    ),
    "w24: one host only": ("tests/messaging/test_network.py::test_several_places",),
    "kiwipy: a lost connection, and the same task in two workers": (
        "tests/messaging/test_unix.py::test_a_lost_connection_is_not_the_end_of_a_session",
    ),
}
"""Defects that other tests show not to be here, each where it belongs."""


def test_every_named_defect_has_its_test() -> None:
    """W1 to W25, here or where `SHOWN_ELSEWHERE` says."""
    root = Path(__file__).parents[2]
    for tests in SHOWN_ELSEWHERE.values():
        for file, _, test in (test.partition("::") for test in tests):
            assert f"def {test}(" in (root / file).read_text(encoding="utf-8"), test
    here = {int(name.split("_")[1][1:]) for name in globals() if name.startswith("test_w")}
    elsewhere = {int(name.partition(":")[0][1:]) for name in SHOWN_ELSEWHERE if name.startswith("w")}
    assert here | elsewhere == set(range(1, 26))


@pytest.fixture
def endpoint(short_folder: Path) -> str:
    return f"ipc://{short_folder}/run/s"


@pytest.fixture
def broker(endpoint: str) -> Iterator[None]:
    with serving(endpoint):
        yield


@pytest.fixture
async def peers(endpoint: str, broker: None) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def new() -> PeerCommunicator:
            return await stack.enter_async_context(await connect(endpoint))

        yield new


# --- AiiDA's ZeroMQ broker ---


async def test_w1_a_restarted_broker_strands_nobody(endpoint: str, short_folder: Path) -> None:
    """Clients reconnected to a path that was gone, and nobody subscribed again: tasks, questions and broadcasts were
    for nobody until every client was restarted."""
    database = str(short_folder / "broker.db")
    inbox, heard = Inbox(), asyncio.Queue[Broadcast]()
    async with AsyncExitStack() as stack:
        with serving(endpoint, database):
            sender = await stack.enter_async_context(await connect(endpoint))
            worker = await stack.enter_async_context(await connect(endpoint))
            await worker.add_task_subscriber(inbox, credit=2)
            await worker.add_rpc_subscriber(echo, "echo")
            await worker.add_broadcast_subscriber(heard.put)
            early = await sender.task_send(b"before", want_result=True)
            held = await inbox.next()
        up = asyncio.Event()
        worker.on_reconnect(up.set)
        waiting = asyncio.create_task(sender.task_send(b"meanwhile"))
        with serving(endpoint, database):
            await waiting
            assert (await inbox.next()).body == b"meanwhile"
            assert await sender.rpc_send("echo", b"x") == b"x"
            await up.wait()
            await sender.broadcast_send(b"news")
            assert (await heard.get()).body == b"news"
            inbox.ack(held, b"done")
            assert await early.result() == b"done"
            await asyncio.gather(sender.close(), worker.close())


async def test_w3_no_send_is_dropped(peers: Connect) -> None:
    """Of 5,000 sends at once up to 37 % vanished without an error: a full queue in ZeroMQ was never looked at."""
    sender = await peers()
    receipts = await asyncio.gather(*(sender.task_send(b"x" * 300) for _ in range(5000)))
    assert len({receipt.id for receipt in receipts}) == 5000
    assert (await sender.statistics()).queues["default"].ready == 5000


async def test_w4_a_script_that_sends_and_ends_loses_nothing(endpoint: str, broker: None, peers: Connect) -> None:
    """`close` right behind `task_send` threw away what was not yet on the wire."""
    program = (
        "import sys; from prunus.messaging import connect_sync\n"
        "with connect_sync(sys.argv[1]) as communicator:\n"
        "    for number in range(10): communicator.task_send(b'%d' % number)\n"
    )
    path = {**os.environ, "PYTHONPATH": str(Path(prunus.__file__).parents[1])}
    script = await create_subprocess_exec(sys.executable, "-c", program, endpoint, env=path)
    assert await script.wait() == 0
    found = await (await peers()).tasks("default", bodies=True)
    assert [task.body for task in found] == [b"%d" % number for number in range(10)]


async def test_w4_a_send_that_is_cut_off_by_close_is_not_silent(peers: Connect) -> None:
    """Each of them was stored, or raised."""
    sender, other = await peers(), await peers()
    sending = [asyncio.create_task(sender.task_send(b"%d" % number)) for number in range(100)]
    await asyncio.sleep(0)
    await sender.close()
    outcomes = await asyncio.gather(*sending, return_exceptions=True)
    stored = [outcome.id for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert {type(outcome) for outcome in outcomes if isinstance(outcome, BaseException)} <= {CommunicatorClosedError}
    assert {task.id for task in await other.tasks("default")} >= set(stored)


async def test_w5_a_client_with_nothing_but_a_broadcast_subscription_hears(peers: Connect) -> None:
    """Broadcasts went to those only who had a task or RPC subscription as well."""
    speaker, listener = await peers(), await peers()
    heard: asyncio.Queue[Broadcast] = asyncio.Queue()
    await listener.add_broadcast_subscriber(heard.put, subject="state_changed.#")
    await speaker.broadcast_send(b"1", subject="state_changed.running.finished")
    assert (await heard.get()).body == b"1"


async def test_w6_errors_keep_their_type(peers: Connect) -> None:
    """Each error came as a bare ``Exception(str)``; an unknown recipient was not `UnroutableError`."""
    asker, answerer = await peers(), await peers()

    async def fail(body: bytes) -> bytes:
        raise LookupError("which?")

    await answerer.add_rpc_subscriber(fail, "fail")
    with pytest.raises(RemoteError) as error:
        await asker.rpc_send("fail", b"")
    assert (error.value.failure.type, error.value.failure.message) == ("LookupError", "which?")
    assert "in fail" in error.value.failure.traceback
    with pytest.raises(UnroutableError):
        await asker.rpc_send("nobody", b"")


async def test_w7_a_question_whose_recipient_goes_ends_at_once_and_leaves_nothing(peers: Connect) -> None:
    """The caller waited for its whole time, and the broker kept the question for ever."""
    asker, answerer = await peers(), await peers()
    asked = asyncio.Event()

    async def hang(body: bytes) -> bytes:
        asked.set()
        return await never(body)

    await answerer.add_rpc_subscriber(hang, "hang")
    question = asyncio.create_task(asker.rpc_send("hang", b"", timeout_s=1000))
    await asked.wait()
    assert (await asker.statistics()).questions == 1
    await answerer.close()
    with pytest.raises(IndeterminateError):
        await question
    assert (await asker.statistics()).questions == 0


async def test_w8_a_name_can_not_be_taken_over(peers: Connect) -> None:
    """A second client got the name silently, and lost it when the first one unsubscribed."""
    first, second = await peers(), await peers()
    subscription = await first.add_rpc_subscriber(echo, "name")
    with pytest.raises(DuplicateSubscriberError):
        await second.add_rpc_subscriber(echo, "name")
    await subscription.cancel()
    await second.add_rpc_subscriber(echo, "name")
    await subscription.cancel()
    assert await first.rpc_send("name", b"x") == b"x"


async def test_w9_the_first_worker_does_not_take_the_whole_backlog(peers: Connect) -> None:
    """It got all 500 tasks, or 200 of them; a worker that was added later stood idle."""
    sender, first, second = await peers(), await peers(), await peers()
    early, late = Inbox(), Inbox()
    await first.add_task_subscriber(early, credit=4)
    await asyncio.gather(*(sender.task_send(b"") for _ in range(20)))
    for _ in range(4):
        await early.next()
    await second.add_task_subscriber(late, credit=4)
    for _ in range(4):
        await late.next()
    assert early.came.empty()
    assert (await sender.statistics()).queues["default"].ready == 12


async def test_w11_a_task_that_all_reject_is_no_hot_loop(peers: Connect) -> None:
    """It was offered 1,800 times a second for ever; kiwipy's 328 times. Here it waits longer after each rejection, and
    ends as a dead letter with its reason where that was asked for."""
    sender, worker = await peers(), await peers()
    attempts: list[int] = []

    async def reject(task: IncomingTask) -> None:
        attempts.append(task.attempt)
        raise TaskRejectedError("not mine")

    await worker.add_task_subscriber(reject)
    receipt = await sender.task_send(b"poison", max_attempts=3, want_result=True)
    await sender.task_send(b"for ever", queue="elsewhere")
    task = await worker.next_task(queue="elsewhere")
    await task.reject("nor mine")
    [waiting] = await sender.tasks("elsewhere")
    assert (waiting.place, waiting.reason) == ("delayed", "nor mine")
    with pytest.raises(DeadLetterError, match="not mine"):
        await receipt.result()
    assert attempts == [1, 2, 3]


async def test_w11_a_rejection_is_no_acknowledgement(peers: Connect) -> None:
    """`TaskRejected` out of a coroutine counted as done: the task was lost. An error is told to the sender instead."""
    sender, worker = await peers(), await peers()
    inbox = Inbox()
    await worker.add_task_subscriber(inbox)
    receipt = await sender.task_send(b"", want_result=True)
    inbox.fail(await inbox.next(), TaskRejectedError())
    inbox.fail(await inbox.next(), ValueError("bad"))
    with pytest.raises(RemoteError, match="bad"):
        await receipt.result()


async def test_w12_cancelled_handlers_free_their_places(peers: Connect) -> None:
    """A cancelled task future was neither acknowledged nor given back: two of them, and a worker with two places
    never got anything again."""
    sender, worker = await peers(), await peers()
    inbox = Inbox()
    await worker.add_task_subscriber(inbox, credit=2)
    ids = {(await sender.task_send(b"")).id for _ in range(5)}
    for _ in range(2):
        inbox.running[(await inbox.next()).id].cancel()
    done = set()
    while done != ids:
        task = await inbox.next()
        done.add(task.id)
        inbox.ack(task)


async def test_w14_looking_into_a_queue_changes_nothing(peers: Connect) -> None:
    """Iterating it gave running tasks back, which ran again after the next restart; in kiwipy it held them all."""
    sender, worker = await peers(), await peers()
    inbox = Inbox()
    await worker.add_task_subscriber(inbox)
    receipt = await sender.task_send(b"running", want_result=True)
    await sender.task_send(b"waiting")
    running = await inbox.next()
    for _ in range(3):
        assert [task.place for task in await sender.tasks(bodies=True)] == ["held", "ready"]
    inbox.ack(running, b"once")
    assert await receipt.result() == b"once"
    assert (await inbox.next()).body == b"waiting"
    assert (await sender.statistics()).delivered == 2


async def test_w19_results_come_back(peers: Connect) -> None:
    """The sender of a task got ``True``, whatever its worker returned."""
    peer = await peers()

    async def double(task: IncomingTask) -> bytes:
        return task.body * 2

    await peer.add_task_subscriber(double)
    assert await (await peer.task_send(b"ab", want_result=True)).result() == b"abab"


async def test_w20_tasks_that_come_back_keep_their_order(peers: Connect) -> None:
    """They came back in reverse; and the order was that of the wall clock."""
    sender, first, second = await peers(), await peers(), await peers()
    inbox = Inbox()
    await first.add_task_subscriber(inbox, credit=5)
    for number in range(8):
        await sender.task_send(b"%d" % number)
    for _ in range(5):
        await inbox.next()
    await first.close()
    theirs = Inbox()
    await second.add_task_subscriber(theirs, credit=8)
    assert [(await theirs.next()).body for _ in range(8)] == [b"%d" % number for number in range(8)]


async def test_w21_nobody_settles_what_another_holds(peers: Connect) -> None:
    """Any client could acknowledge any task."""
    sender, worker, thief = await peers(), await peers(), await peers()
    inbox = Inbox()
    await worker.add_task_subscriber(inbox)
    receipt = await sender.task_send(b"", want_result=True)
    task = await inbox.next()
    await thief.call([], acks=[task])
    [info] = await sender.tasks(task=task.id)
    assert info.holder == worker.session
    inbox.ack(task, b"by its holder")
    assert await receipt.result() == b"by its holder"


async def test_w22_a_handler_that_blocks_stops_nobody_else(peers: Connect) -> None:
    """Handlers ran on the loop of the socket: one that blocked stopped acknowledgements and heart-beats too. Here
    not even an ``async def`` that blocks its own loop does."""
    peer, asker = await peers(), await peers()
    blocked, go_on = threading.Event(), threading.Event()

    async def block(body: bytes) -> bytes:
        blocked.set()
        go_on.wait()
        return body

    async def elsewhere() -> bytes:
        await peer.add_rpc_subscriber(block, "block")
        return await peer.rpc_send("block", b"at last", timeout_s=1000)

    await peer.add_rpc_subscriber(echo, "echo")
    thread = asyncio.create_task(asyncio.to_thread(asyncio.run, elsewhere()))
    await asyncio.to_thread(blocked.wait)
    assert await asker.rpc_send("echo", b"x") == b"x"
    assert (await peer.task_send(b"")).stored
    go_on.set()
    assert await thread == b"at last"


async def test_w25_the_broker_may_stop_first(endpoint: str) -> None:
    """At a shutdown broker and workers were stopped together, and a worker's good-bye met nobody: `close` ends all the
    same, with handlers cancelled."""
    inbox = Inbox()
    with serving(endpoint):
        worker = await connect(endpoint)
        await worker.add_task_subscriber(inbox)
        await worker.task_send(b"")
        handler = inbox.running[(await inbox.next()).id]
    await worker.close()
    await asyncio.wait([handler])
    assert handler.cancelled()


# --- kiwipy, and what was built on it ---


async def test_kiwipy_ttl_no_task_has_a_time_limit_of_its_own(peers: Connect) -> None:
    """Tasks vanished after seven days (kiwipy#57, #59, #92): also those in progress, when their worker stopped."""
    sender = await peers()
    await sender.task_send(b"")
    [task] = await sender.tasks()
    assert (task.expires_at, task.max_attempts) == (None, 0)


async def test_kiwipy_one_task_runs_once_in_one_subscriber(peers: Connect) -> None:
    """After a subscriber that raised, the next one of the same client got the task as well (a missing ``break``)."""
    peer = await peers()
    handled: list[str] = []

    def subscriber(name: str) -> Callable[[IncomingTask], bytes]:
        def fail(task: IncomingTask) -> bytes:
            handled.append(name)
            raise ValueError(name)

        return fail

    for name in ("first", "second"):
        await peer.add_task_subscriber(subscriber(name))
    receipt = await peer.task_send(b"", want_result=True)
    with pytest.raises(RemoteError, match="ValueError"):
        await receipt.result()
    assert len(handled) == 1


async def test_kiwipy_subscribing_while_a_broadcast_is_dealt_with(peers: Connect) -> None:
    """A handler that added or removed a subscription made later subscribers miss the broadcast."""
    peer = await peers()
    heard: asyncio.Queue[str] = asyncio.Queue()
    subscriptions = []

    async def change(broadcast: Broadcast) -> None:
        await peer.add_broadcast_subscriber(lambda _: None)
        await subscriptions[0].cancel()
        heard.put_nowait("first")

    async def listen(broadcast: Broadcast) -> None:
        heard.put_nowait("second")

    subscriptions.append(await peer.add_broadcast_subscriber(change))
    await peer.add_broadcast_subscriber(listen)
    await peer.broadcast_send(b"")
    assert {await heard.get(), await heard.get()} == {"first", "second"}


async def test_kiwipy_every_delivery_has_exactly_one_answer(peers: Connect) -> None:
    """An undecodable message, an un-encodable result or a cancellation left the caller without an answer, or the task
    without an owner."""
    peer = await peers()

    async def answer(argument: object) -> bytes:
        body = argument if isinstance(argument, bytes) else argument.body  # type: ignore[attr-defined]
        match body:
            case b"result":
                return b"fine"
            case b"unsendable":
                return object()  # type: ignore[return-value]
            case b"exception":
                raise ValueError("bad")
            case _:
                raise asyncio.CancelledError

    await peer.add_rpc_subscriber(answer, "me")
    await peer.add_task_subscriber(answer)
    assert await peer.rpc_send("me", b"result") == b"fine"
    for body, kind in ((b"unsendable", "TypeError"), (b"exception", "ValueError"), (b"cancelled", "CancelledError")):
        with pytest.raises(RemoteError, match=kind):
            await peer.rpc_send("me", body)
    for body, kind in ((b"unsendable", "TypeError"), (b"exception", "ValueError")):
        with pytest.raises(RemoteError, match=kind):
            await (await peer.task_send(body, want_result=True)).result()
    receipt = await peer.task_send(b"cancelled", want_result=True, max_attempts=2)
    with pytest.raises(DeadLetterError, match="cancelled"):
        await receipt.result()


async def test_kiwipy_nothing_leaks(peers: Connect) -> None:
    """Task queues kept their channels (workgraph#463: the 1,024th failed), RPC subscriptions their queues, questions to
    nobody their entry: after a thousand of each there is nothing left, here and at the broker."""
    peer = await peers()

    async def one(number: int) -> None:
        subscription = await peer.add_rpc_subscriber(echo, f"name {number}")
        await subscription.cancel()
        with pytest.raises(UnroutableError):
            await peer.rpc_send(f"name {number}", b"")
        with pytest.raises(TimeoutError):
            await peer.next_task(queue=f"queue {number}", timeout_s=0)
        listener = await peer.add_broadcast_subscriber(echo, subject=f"s{number}")  # type: ignore[arg-type]
        await listener.cancel()

    for start in range(0, 1000, 100):
        await asyncio.gather(*(one(number) for number in range(start, start + 100)))
    numbers = await peer.statistics()
    mine = numbers.sessions[peer.session]
    assert (mine.subscriptions, mine.credit, mine.questions, mine.held) == (0, 0, 0, 0)
    assert (numbers.questions, numbers.identifiers, numbers.broadcast_subscriptions) == (0, 0, 0)
    assert not peer._waiters
    assert not peer._deliveries.lanes
    assert not peer._deliveries.rpcs
    assert not peer._deliveries.broadcasts
    assert not len(peer._jobs)


async def test_kiwipy_who_stopped_waiting_breaks_nothing(peers: Connect) -> None:
    """The answer to a future that was cancelled raised in the communicator's thread (aiida-core#2158)."""
    asker, answerer = await peers(), await peers()
    go_on = asyncio.Event()

    async def late(body: bytes) -> bytes:
        await go_on.wait()
        return body

    await answerer.add_rpc_subscriber(late, "late")
    questions = [asyncio.create_task(asker.rpc_send("late", b"", timeout_s=1000)) for _ in range(10)]
    await asker.call([])
    for question in questions:
        question.cancel()
    await asyncio.wait(questions)
    go_on.set()
    assert await asker.rpc_send("late", b"x") == b"x"
    assert not asker._waiters


async def test_kiwipy_the_end_of_a_communicator_does_not_wait_for_others(peers: Connect) -> None:
    """Each disconnect took its whole time-out (aiida-core#6673). Here they leave together."""
    leaving: list[Communicator] = [await peers() for _ in range(20)]
    other = await peers()
    await asyncio.gather(*(peer.close() for peer in leaving))
    assert list((await other.statistics()).sessions) == [other.session]
