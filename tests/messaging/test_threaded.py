"""Who moves the frames of a communicator: its home, or its thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from prunus.errors import CommunicatorClosedError, IndeterminateError, RemoteError
from prunus.messaging import client, threaded
from prunus.messaging.communicator import Communicator
from prunus.messaging.connecting import connect_to
from prunus.messaging.handover import Crossing
from prunus.messaging.threaded import ThreadedCommunicator
from prunus.messaging.unix import UnixTransport
from prunus.testing import CommunicatorContract
from prunus.testing.communicator_contract import TakeForDead, echo
from tests.messaging.raw import PATIENCE_S
from tests.messaging.served import serving
from tests.messaging.test_unix import forget_what_it_holds

NEVER_S = 3600.0


class Watched(UnixTransport):
    """Knows on which threads frames were received."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.receivers: set[int] = set()
        self.sent = self.chunks = 0
        """Frames, and the times that some of them were sent together."""
        self.on_received: Callable[[], None] = lambda: None
        self.thread_rests = threading.Event()

    def wait(self, timeout_s: float, *, for_frames: bool = True) -> bool:
        if not for_frames:
            self.thread_rests.set()
        return super().wait(timeout_s, for_frames=for_frames)

    def send(self, frame: bytes) -> None:
        self.sent += 1
        super().send(frame)

    def flush(self) -> None:
        self.chunks += bool(self._out)
        super().flush()

    def receive(self) -> tuple[list[bytes], str | None]:
        frames, broken = super().receive()
        if frames:
            self.receivers.add(threading.get_ident())
            self.on_received()
        return frames, broken


@pytest.fixture
def endpoint(short_folder: Path) -> Iterator[str]:
    endpoint = f"ipc://{short_folder}/run/s"
    with serving(endpoint, lease_s=10 * NEVER_S):
        yield endpoint


async def connected(endpoint: str) -> tuple[ThreadedCommunicator, Watched]:
    transport = Watched(endpoint)
    communicator = ThreadedCommunicator(transport, endpoint)
    await communicator.connected(PATIENCE_S)
    await asyncio.to_thread(transport.thread_rests.wait)
    transport.receivers.clear()
    return communicator, transport


@asynccontextmanager
async def at_home(endpoint: str) -> AsyncIterator[tuple[ThreadedCommunicator, Watched]]:
    communicator, transport = await connected(endpoint)
    async with communicator:
        yield communicator, transport


@pytest.fixture
def nothing_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread has no reason of its own to look."""
    monkeypatch.setattr(client, "HEARTBEAT_S", NEVER_S)
    monkeypatch.setattr(threaded, "LATE_S", NEVER_S / 2)


class TestWithoutAHome(CommunicatorContract):
    """The thread does everything as soon as a communicator was used from anywhere else."""

    @pytest.fixture
    async def connect(self, endpoint: str) -> AsyncIterator[Callable[[], object]]:
        async with contextlib.AsyncExitStack() as stack:

            async def connect() -> Communicator:
                communicator = await stack.enter_async_context(await connect_to(endpoint))
                await asyncio.to_thread(communicator._post, lambda now: None)
                return communicator

            yield connect

    @pytest.fixture
    async def take_for_dead(self, endpoint: str) -> TakeForDead:
        return partial(forget_what_it_holds, endpoint)


@pytest.mark.usefixtures("nothing_is_due")
async def test_at_home_no_other_thread_is_on_the_way(endpoint: str) -> None:
    """Of a question, of its answer, and of a durable task."""
    async with at_home(endpoint) as (one, transport):
        await one.add_rpc_subscriber(echo, "echo")
        assert await one.rpc_send("echo", b"x", timeout_s=NEVER_S) == b"x"
        receipt = await one.task_send(b"y", want_result=True)
        await one.add_task_subscriber(echo_task)
        assert await receipt.result() == b"y"
        assert transport.receivers == {threading.get_ident()}


@pytest.mark.usefixtures("nothing_is_due")
async def test_a_lone_request_leaves_at_once(endpoint: str) -> None:
    """Not in the next turn of the loop, which may have much to do before."""
    async with at_home(endpoint) as (one, transport):
        sent = transport.sent
        sending = asyncio.create_task(one.task_send(b"x"))
        await asyncio.sleep(0)
        assert transport.sent == sent + 1
        await sending


@pytest.mark.usefixtures("nothing_is_due")
async def test_a_lone_answer_leaves_at_once(endpoint: str) -> None:
    """Before anything else that its loop has to do."""
    async with at_home(endpoint) as (one, transport):
        sent_by_then: list[int] = []

        async def answer(body: bytes) -> bytes:
            sent = transport.sent
            asyncio.get_running_loop().call_soon(lambda: sent_by_then.append(transport.sent - sent))
            return body

        await one.add_rpc_subscriber(answer, "me")
        assert await one.rpc_send("me", b"x") == b"x"
        assert sent_by_then == [1]


@pytest.mark.usefixtures("nothing_is_due")
async def test_what_is_asked_in_one_turn_of_the_loop_leaves_together(endpoint: str) -> None:
    """But for the first; and so do the answers of handlers that end in one."""
    async with at_home(endpoint) as (one, transport):
        chunks = transport.chunks
        sending = asyncio.gather(*(one.task_send(b"x") for _ in range(100)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert transport.chunks == chunks + 2
        await sending
        end, come = asyncio.Event(), asyncio.Semaphore(0)

        async def wait(body: bytes) -> bytes:
            come.release()
            await end.wait()
            return body

        await one.add_rpc_subscriber(wait, "me")
        asking = asyncio.gather(*(one.rpc_send("me", b"x") for _ in range(100)))
        for _ in range(100):
            await come.acquire()
        sent, chunks = transport.sent, transport.chunks
        end.set()
        while transport.sent < sent + 100:
            await asyncio.sleep(0)
        assert transport.chunks <= chunks + 2
        assert len(await asking) == 100


@pytest.mark.usefixtures("nothing_is_due")
async def test_who_asks_in_the_midst_of_a_turn_is_heard_in_the_next(endpoint: str) -> None:
    """As a handler does whose first step is taken at once (an eager task): the lock is held by his own thread."""
    async with at_home(endpoint) as (one, _):
        answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()

        class Asks(Crossing):
            def arrive(self) -> None:
                assert one._lock.locked()
                one._post(lambda now: answer.set_result(None))

        home = asyncio.get_running_loop()
        one._post(lambda now: one._handover.add(home, Asks()))
        await answer


async def echo_task(task: object) -> bytes:
    return task.body  # type: ignore[attr-defined, no-any-return]


@pytest.mark.usefixtures("nothing_is_due")
async def test_a_busy_home_is_stood_in_for_until_it_is_back(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes meanwhile is taken by the thread; nothing of it is lost."""
    monkeypatch.setattr(threaded, "LATE_S", 0.01)
    stood_in = threading.Event()
    async with at_home(endpoint) as (one, transport):
        await one.add_rpc_subscriber(echo, "echo")
        home = threading.get_ident()
        transport.on_received = lambda: stood_in.set() if threading.get_ident() != home else None

        async def ask() -> bytes:
            async with await connect_to(endpoint) as other:
                return await other.rpc_send("echo", b"x", timeout_s=PATIENCE_S)

        asked = asyncio.create_task(asyncio.to_thread(asyncio.run, ask()))
        await asyncio.sleep(0)
        assert stood_in.wait(PATIENCE_S), "the loop stands still here"
        assert await asked == b"x"
        transport.thread_rests.clear()
        await asyncio.to_thread(transport.thread_rests.wait)
        transport.receivers.clear()
        await one.statistics()
        assert transport.receivers == {home}


@pytest.mark.usefixtures("nothing_is_due")
@pytest.mark.parametrize("closed", [False, True])
def test_a_home_that_does_not_run_is_not_waited_for(endpoint: str, closed: bool) -> None:
    """Whoever uses the communicator from another loop is answered, whether the first one is closed or not."""
    home = asyncio.new_event_loop()
    communicator, _ = home.run_until_complete(connected(endpoint))
    if closed:
        home.close()

    async def use() -> None:
        async with communicator:
            receipt = await communicator.task_send(b"x")
            assert [task.id for task in await communicator.tasks()] == [receipt.id]

    asyncio.run(use())
    home.close()


@pytest.mark.usefixtures("nothing_is_due")
def test_who_asks_somebody_without_a_loop_hears_it(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread says it in place of a home that was closed."""
    monkeypatch.setattr(threaded, "LATE_S", 0.01)
    home = asyncio.new_event_loop()
    communicator, _ = home.run_until_complete(connected(endpoint))
    home.run_until_complete(communicator.add_rpc_subscriber(echo, "echo"))
    home.close()

    async def ask() -> None:
        async with await connect_to(endpoint) as other:
            with pytest.raises(RemoteError, match="the event loop of this handler is closed"):
                await other.rpc_send("echo", b"x", timeout_s=PATIENCE_S)

    asyncio.run(ask())
    asyncio.run(communicator.close())


@pytest.mark.usefixtures("nothing_is_due")
async def test_a_deadline_is_kept_though_nothing_comes(endpoint: str) -> None:
    """The thread learns of one that comes before it wanted to look."""
    late = asyncio.Event()

    async def answer_late(body: bytes) -> bytes:
        await late.wait()
        return body

    async with at_home(endpoint) as (one, _):
        await one.add_rpc_subscriber(answer_late, "me")
        with pytest.raises(IndeterminateError):
            await one.rpc_send("me", b"x", timeout_s=0.01)
        late.set()


@pytest.mark.parametrize("broker_is_there", [False, True])
async def test_a_closed_communicator_leaves_nothing_in_its_home(short_folder: Path, broker_is_there: bool) -> None:
    """Who gets the number of its descriptor next can be watched there."""
    endpoint = f"ipc://{short_folder}/other/s"
    with serving(endpoint):
        communicator, transport = await connected(endpoint)
        if broker_is_there:
            await communicator.close()
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(transport.descriptor)
    await communicator.close()
    await asyncio.sleep(0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        number = os.dup2(ours.fileno(), transport.descriptor)
        come = asyncio.Event()
        asyncio.get_running_loop().add_reader(number, come.set)
        theirs.send(b"x")
        await come.wait()
        asyncio.get_running_loop().remove_reader(number)
        os.close(number)


def test_ctrl_c_in_the_midst_of_a_turn_loses_no_answer(endpoint: str) -> None:
    """It is asked for again on a new connection; the task is stored once."""
    home = asyncio.new_event_loop()
    communicator, transport = home.run_until_complete(connected(endpoint))

    def press() -> None:
        transport.on_received = lambda: None
        raise KeyboardInterrupt

    async def use() -> str:
        transport.on_received = press
        return (await communicator.task_send(b"x")).id

    using = home.create_task(use())
    with pytest.raises(KeyboardInterrupt):
        home.run_until_complete(using)
    stored = home.run_until_complete(using)
    tasks = home.run_until_complete(communicator.tasks())
    assert [task.id for task in tasks] == [stored]
    home.run_until_complete(communicator.close())
    home.close()


@pytest.mark.usefixtures("nothing_is_due")
async def test_a_defect_ends_everything_that_waits(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    """With an error; nobody waits for ever, and the log says why."""

    def fail() -> None:
        raise RuntimeError("a defect")

    async with at_home(endpoint) as (one, transport):
        transport.on_received = fail
        with caplog.at_level(logging.CRITICAL, "prunus"), pytest.raises(CommunicatorClosedError):
            await one.statistics()
        with pytest.raises(CommunicatorClosedError):
            await one.statistics()
    assert not one._thread.is_alive()
