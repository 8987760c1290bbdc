"""The blocking face: scripts, threads, handlers that ask, Ctrl-C, and calls that would wait for themselves."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from prunus.errors import (
    CommunicatorClosedError,
    ConnectionLostError,
    ForkedProcessError,
    ProfileError,
    RemoteError,
    TaskRejectedError,
    UnroutableError,
)
from prunus.messaging import BlockingCommunicator, Communicator, LocalBroker, connect_sync, handover
from prunus.messaging.communicator import Broadcast, IncomingTask
from prunus.messaging.peer import PeerCommunicator
from prunus.testing.communicator_contract import ContractService
from tests.messaging.served import serving

PATIENCE_S = 10.0


@pytest.fixture
def endpoint(short_folder: Path) -> Iterator[str]:
    with serving(endpoint := f"ipc://{short_folder}/run/s"):
        yield endpoint


@pytest.fixture
def communicator(endpoint: str) -> Iterator[BlockingCommunicator]:
    with connect_sync(endpoint) as communicator:
        yield communicator


def test_it_has_all_of_the_seam() -> None:
    """Every method of `Communicator`, by the same name and with the same arguments; none is to be awaited."""
    for name, method in inspect.getmembers(Communicator, inspect.isfunction):
        if not name.startswith("_"):
            mine = getattr(BlockingCommunicator, name)
            assert inspect.signature(mine).parameters.keys() == inspect.signature(method).parameters.keys(), name
            assert not inspect.iscoroutinefunction(mine)
    assert hasattr(BlockingCommunicator, "session")


def test_tasks(communicator: BlockingCommunicator) -> None:
    """Sent, handled by a plain function, and their results waited for, each as long as the caller wants."""
    done: list[bytes] = []
    go_on = threading.Event()

    def work(task: IncomingTask) -> bytes:
        go_on.wait(PATIENCE_S)
        if task.body == b"bad":
            raise KeyError("x")
        done.append(task.body)
        return task.body * 2

    subscription = communicator.add_task_subscriber(work, queue="q", credit=2)
    good = communicator.task_send(b"ab", queue="q", want_result=True)
    bad = communicator.task_send(b"bad", queue="q", want_result=True)
    assert good.stored
    with pytest.raises(TimeoutError, match=rf"{good.id} was not there within 0 s; it can be asked for again"):
        good.result(timeout_s=0)
    go_on.set()
    assert good.result(PATIENCE_S) == good.result() == good.result(timeout_s=0) == b"abab"
    with pytest.raises(RemoteError, match="KeyError"):
        bad.result(PATIENCE_S)
    subscription.set_credit(0)
    subscription.cancel()
    communicator.task_send(b"nobody", queue="q")
    assert done == [b"ab"]


def test_fetching_tasks(communicator: BlockingCommunicator) -> None:
    """One at a time, in a block that acknowledges it or gives it back."""
    receipt = communicator.task_send(b"1", key="k", subject="s", want_result=True)
    task = communicator.next_task()
    assert (task.id, task.body, task.key, task.subject, task.queue) == (receipt.id, b"1", "k", "s", "default")
    with pytest.raises(TaskRejectedError), task:
        raise TaskRejectedError("later")
    with communicator.next_task(timeout_s=PATIENCE_S) as task:
        assert task.attempt == 2
        assert task.epoch > 0
        task.acknowledge(b"42")
    assert receipt.result(PATIENCE_S) == b"42"
    with pytest.raises(TimeoutError):
        communicator.next_task(timeout_s=0)
    receipt = communicator.task_send(b"2", want_result=True)
    communicator.next_task().fail(ValueError("no"))
    with pytest.raises(RemoteError, match="no"):
        receipt.result(PATIENCE_S)


def test_a_call_acknowledges_a_fetched_task(communicator: BlockingCommunicator) -> None:
    """Its place is given up: nothing more comes here for it, and the next task stays where it is."""
    first, second = communicator.task_send(b"1", want_result=True), communicator.task_send(b"2")
    taken = communicator.next_task()
    assert communicator.call([], acks=[taken]) == []
    assert first.result(PATIENCE_S) == b""
    assert communicator.communicator._deliveries.lanes == {}
    [task] = communicator.tasks()
    assert (task.id, task.place) == (second.id, "ready")


def test_questions_and_broadcasts(communicator: BlockingCommunicator) -> None:
    """Asked and answered, told and heard, called."""
    heard: Future[Broadcast] = Future()
    communicator.add_rpc_subscriber(lambda body: body + b"!", "me")
    communicator.add_broadcast_subscriber(heard.set_result, sender="s*")
    assert communicator.rpc_send("me", b"x") == b"x!"
    with pytest.raises(UnroutableError):
        communicator.rpc_send("nobody", b"")
    communicator.broadcast_send(b"news", sender="sun")
    assert heard.result(PATIENCE_S).body == b"news"
    assert communicator.call([b"add a", b"words"]) == [b"1", b"a"]


def test_many_threads_at_once(communicator: BlockingCommunicator) -> None:
    """Each gets its own answers."""
    communicator.add_rpc_subscriber(lambda body: body, "echo")

    def ask(number: int) -> None:
        for turn in range(20):
            body = b"%d.%d" % (number, turn)
            assert communicator.rpc_send("echo", body) == body

    with ThreadPoolExecutor(8) as threads:
        for asked in [threads.submit(ask, number) for number in range(8)]:
            asked.result(PATIENCE_S)


def test_a_plain_handler_may_ask(communicator: BlockingCommunicator) -> None:
    """It runs in a thread of its own: a question in a question in a task is answered."""
    communicator.add_rpc_subscriber(lambda body: body + b"!", "inner")
    communicator.add_rpc_subscriber(lambda body: communicator.rpc_send("inner", body) + b"?", "outer")
    communicator.add_task_subscriber(lambda task: communicator.rpc_send("outer", task.body))
    assert communicator.task_send(b"x", want_result=True).result(PATIENCE_S) == b"x!?"


def test_plain_handlers_that_wait_for_each_other(
    communicator: BlockingCommunicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deeper than there are threads for handlers: one that waits does not count. Afterwards all count again."""
    monkeypatch.setattr(handover, "MAX_HANDLER_THREADS", 2)

    def descend(body: bytes) -> bytes:
        depth = int(body)
        return communicator.rpc_send("descend", b"%d" % (depth - 1)) if depth else b"the ground"

    def threads(body: bytes) -> bytes:
        job = handover.serving()
        assert job is not None
        assert job.limiter is not None
        return b"%d" % job.limiter.total_tokens

    communicator.add_rpc_subscriber(descend, "descend")
    communicator.add_rpc_subscriber(threads, "threads")
    assert communicator.rpc_send("descend", b"20") == b"the ground"
    assert communicator.rpc_send("threads", b"") == b"2"


def test_where_it_would_wait_for_itself_it_raises_at_once(communicator: BlockingCommunicator) -> None:
    """In an ``async def`` handler, which runs in the loop that would have to answer; there one awaits instead."""

    async def wait(body: bytes) -> bytes:
        return communicator.rpc_send("echo", body)

    async def await_it(body: bytes) -> bytes:
        return await communicator.communicator.rpc_send("echo", body)

    communicator.add_rpc_subscriber(lambda body: body, "echo")
    communicator.add_rpc_subscriber(wait, "waits")
    communicator.add_rpc_subscriber(await_it, "awaits")
    with pytest.raises(RemoteError, match="wait for itself"):
        communicator.rpc_send("waits", b"x", timeout_s=1000)
    assert communicator.rpc_send("awaits", b"x") == b"x"


async def test_in_a_loop_that_serves_its_handlers_it_raises_at_once(endpoint: str) -> None:
    """Also if that is a loop of the user's. In any other loop it only stops that one while it waits."""

    async def echo(body: bytes) -> bytes:
        return body

    communicator = await asyncio.to_thread(connect_sync, endpoint)
    try:
        assert communicator.call([]) == []
        subscription = await communicator.communicator.add_rpc_subscriber(echo, "echo")
        with pytest.raises(RuntimeError, match="wait for itself"):
            communicator.rpc_send("echo", b"x")
        assert await asyncio.to_thread(communicator.rpc_send, "echo", b"x") == b"x"
        await subscription.cancel()
        assert communicator.call([]) == []
    finally:
        await asyncio.to_thread(communicator.close)


def test_on_the_communicators_own_thread_it_raises_at_once(communicator: BlockingCommunicator) -> None:
    """No user code runs there; who finds a way all the same is told."""
    outcome: Future[str] = Future()

    def inside(now: float) -> None:
        try:
            communicator.rpc_send("anybody", b"")
        except RuntimeError as error:
            outcome.set_result(str(error))

    communicator.communicator._post(inside)
    assert "own thread" in outcome.result(PATIENCE_S)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_handler_that_would_end_the_program(
    communicator: BlockingCommunicator, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """`sys.exit` ends the handler, whose caller hears of it, and no more: the thread can't end the program."""

    def leave(body: bytes) -> bytes:
        sys.exit(3)

    async def leave_async(body: bytes) -> bytes:
        sys.exit(3)

    communicator.add_rpc_subscriber(leave_async if is_async else leave, "leave")
    for _ in range(2):
        with pytest.raises(RemoteError, match="SystemExit"):
            communicator.rpc_send("leave", b"")
    assert "only the handler ended" in caplog.text


@pytest.mark.parametrize("is_async", [False, True])
def test_a_handler_that_would_end_the_program_gives_its_task_back(
    communicator: BlockingCommunicator, is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not done, and comes again."""

    def leave_at_first(task: IncomingTask) -> bytes:
        if task.attempt == 1:
            sys.exit(3)
        return b"done"

    async def leave_at_first_async(task: IncomingTask) -> bytes:
        return leave_at_first(task)

    communicator.add_task_subscriber(leave_at_first_async if is_async else leave_at_first)
    assert communicator.task_send(b"", want_result=True).result(PATIENCE_S) == b"done"
    assert "only the handler ended" in caplog.text


def test_a_result_that_is_not_waited_for_any_more(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    """After its time-out, or Ctrl-C: asyncio has nothing to complain of when the communicator is closed."""
    with connect_sync(endpoint) as communicator:
        receipt = communicator.task_send(b"", want_result=True)
        with pytest.raises(TimeoutError, match="can be asked for again"):
            receipt.result(timeout_s=0.01)
        with pytest.raises(ValueError, match="a time-out is a number of seconds"):
            receipt.result(timeout_s=float("nan"))
        threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            receipt.result()
    del receipt, communicator
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"endpoint": None},
            "a broker is named by its endpoint .ipc:// and a path., a key or the file of one",
        ),
        ({"endpoint": 5}, "not by 5"),
        (
            {"endpoint": "tcp://10.0.0.1:5010"},
            "is reached with a key, which says where it is: give the file",
        ),
        ({"timeout_s": "x"}, "a time-out is a number of seconds, or None for no end, not 'x'"),
        ({"timeout_s": float("nan")}, "a time-out is a number of seconds"),
        ({"name": "worker 1"}, "the name of a peer is made of the letters"),
        ({"name": 5}, "the name of a peer is a text, not 5"),
        ({"name": None}, "the name of a peer is a text, not None"),
    ],
)
def test_what_nobody_can_connect_to(endpoint: str, arguments: dict[str, Any], words: str) -> None:
    """It is said at once, in words, and no thread stays."""
    before = set(threading.enumerate())
    with pytest.raises((TypeError, ValueError, ProfileError), match=words):
        connect_sync(**{"endpoint": endpoint, **arguments})
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_what_is_seen_of_it(endpoint: str) -> None:
    """Who it is, and that it is closed."""
    communicator = connect_sync(endpoint)
    subscription = communicator.add_rpc_subscriber(lambda body: body, "echo")
    behind = f"<ThreadedCommunicator {communicator.session} at {endpoint}"
    assert repr(communicator) == f"<BlockingCommunicator of {behind}>>"
    assert repr(subscription) == f"<blocking <RpcSubscription 'echo' of {communicator.session}>>"
    communicator.close()
    assert repr(communicator) == f"<BlockingCommunicator of {behind}, closed>, closed>"
    assert repr(subscription) == f"<blocking <RpcSubscription 'echo' of {communicator.session}, cancelled>>"


def test_ctrl_c_ends_the_wait(communicator: BlockingCommunicator) -> None:
    """`KeyboardInterrupt` where the main thread waits; the communicator goes on, and nobody waits for that answer."""
    answering = threading.Event()
    go_on = threading.Event()

    def interrupt(body: bytes) -> bytes:
        answering.set()
        os.kill(os.getpid(), signal.SIGINT)
        go_on.wait(PATIENCE_S)
        return body

    communicator.add_rpc_subscriber(interrupt, "slow")
    with pytest.raises(KeyboardInterrupt):
        communicator.rpc_send("slow", b"x", timeout_s=1000)
    assert answering.is_set()
    go_on.set()
    communicator.add_rpc_subscriber(lambda body: body, "echo")
    assert communicator.rpc_send("echo", b"x") == b"x"


def test_ctrl_c_takes_back_what_was_waited_for(communicator: BlockingCommunicator) -> None:
    """A call that was interrupted is cancelled: `next_task` does not go on to take a task for nobody."""
    main = threading.get_ident()

    def interrupt() -> None:
        while "q" not in communicator.statistics().queues:  # until the broker knows that somebody waits
            pass
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        communicator.next_task(queue="q")
    thread.join(PATIENCE_S)
    while communicator.statistics().sessions[communicator.session].subscriptions:
        pass
    communicator.task_send(b"", queue="q")
    assert [task.place for task in communicator.tasks("q")] == ["ready"]


def test_the_end(endpoint: str) -> None:
    """Whoever waits is told so, in whichever thread; later calls too; closing again is nothing."""
    communicator = connect_sync(endpoint)
    outcome: Future[None] = Future()

    def fetch() -> None:
        try:
            communicator.next_task(queue="empty")
        except CommunicatorClosedError as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    while "empty" not in communicator.statistics().queues:  # until the broker knows that somebody waits
        pass
    communicator.close()
    with pytest.raises(CommunicatorClosedError):
        outcome.result(PATIENCE_S)
    thread.join(PATIENCE_S)
    communicator.close()
    with pytest.raises(CommunicatorClosedError):
        communicator.call([])


def test_a_handler_may_close_it(endpoint: str) -> None:
    """`close` in a handler ends, and the handler goes on."""
    communicator = connect_sync(endpoint)
    ended = threading.Event()

    def leave(task: IncomingTask) -> None:
        communicator.close()
        ended.set()

    communicator.add_task_subscriber(leave)
    communicator.task_send(b"")
    assert ended.wait(PATIENCE_S)
    with pytest.raises(CommunicatorClosedError):
        communicator.call([])
    communicator._thread.join(PATIENCE_S)


def test_on_reconnect(communicator: BlockingCommunicator) -> None:
    """Callbacks are called when the connection is up again, until they are taken back."""
    up = threading.Event()
    forget = communicator.on_reconnect(up.set)
    peer: Any = communicator.communicator

    def pull_the_plug(now: float) -> None:
        peer._transport.open()
        peer._core.connect(now)

    peer._post(pull_the_plug)
    assert up.wait(PATIENCE_S)
    forget()


def test_no_broker(short_folder: Path) -> None:
    """`ConnectionLostError`, and no thread stays."""
    before = set(threading.enumerate())
    with pytest.raises(ConnectionLostError):
        connect_sync(f"ipc://{short_folder}/run/none", timeout_s=0.05)
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_after_a_fork_the_child_has_none(communicator: BlockingCommunicator) -> None:
    """In a forked child every use raises at once instead of waiting for a thread that is not there."""
    child = os.fork()
    if child == 0:
        try:
            communicator.call([])
        except ForkedProcessError:
            communicator.close()
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert communicator.call([]) == []


def test_over_a_broker_in_this_process() -> None:
    """Any way to connect will do: here a `LocalBroker` that lives in the communicator's loop."""

    async def connect() -> PeerCommunicator:
        connection = sqlite3.connect(":memory:", isolation_level=None)
        return await LocalBroker(connection, ContractService(connection)).connect()

    with BlockingCommunicator(connect) as communicator:
        communicator.add_rpc_subscriber(lambda body: body, "echo")
        assert communicator.rpc_send("echo", b"x") == b"x"
        assert communicator.call([b"add a"]) == [b"1"]
