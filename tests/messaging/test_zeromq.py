"""The communicator over ZeroMQ: the contract, hostile and stuck peers, real processes that are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
import threading
import time
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import zmq

import prunus
from prunus.errors import (
    CommunicatorClosedError,
    ConnectionLostError,
    ForkedProcessError,
    IndeterminateError,
    ProfileError,
    StoreFullError,
)
from prunus.messaging import zeromq
from prunus.messaging.communicator import Communicator
from prunus.messaging.exchange import Exchange
from prunus.messaging.messages import (
    Alive,
    Heartbeat,
    Hello,
    HelloNeeded,
    Peer,
    TaskSend,
    TaskStored,
    Violation,
    Welcome,
    decode_from_broker,
    encode,
)
from prunus.messaging.zeromq import QUEUE_FRAMES, ZmqServer, connect_zmq
from prunus.testing.communicator_contract import CommunicatorContract, ContractService, Inbox, echo

Connect = Callable[[], Awaitable[Communicator]]
HERE = Path(__file__).parent


@contextmanager
def serving(endpoint: str) -> Iterator[Exchange[bytes]]:
    """A real server in a thread, with everything in memory."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    exchange: Exchange[bytes] = Exchange(connection, service=ContractService(connection))
    with ZmqServer(exchange, endpoint) as server:
        thread = threading.Thread(target=server.run, name="prunus-broker")
        thread.start()
        try:
            yield exchange
        finally:
            server.stop()
            thread.join()
    connection.close()


@pytest.fixture
def endpoint(short_folder: Path) -> str:
    return f"ipc://{short_folder}/run/s"


@pytest.fixture
def exchange(endpoint: str) -> Iterator[Exchange[bytes]]:
    with serving(endpoint) as exchange:
        yield exchange


@pytest.fixture
async def peers(endpoint: str, exchange: Exchange[bytes]) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def connect() -> Communicator:
            return await stack.enter_async_context(await connect_zmq(endpoint))

        yield connect


class TestZmqCommunicator(CommunicatorContract):
    @pytest.fixture
    async def connect(self, peers: Connect) -> Connect:
        return peers


# --- one peer is no danger to another ---


@contextmanager
def raw_peer(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvtimeo = 10_000
        socket.rcvhwm = 1
        socket.connect(endpoint)
        yield socket


async def test_nonsense_changes_nothing(endpoint: str, peers: Connect, exchange: Exchange[bytes]) -> None:
    """Bytes that are no message, and frames of several parts, are answered with `Violation`, then not at all."""
    good = await peers()
    with raw_peer(endpoint) as socket:
        for _ in range(10):
            socket.send(b"nonsense")
            assert isinstance(decode_from_broker(socket.recv()), Violation)
        socket.send(encode(Hello(session="s", peer=Peer())))
        await good.add_rpc_subscriber(echo, "me")
        assert await good.rpc_send("me", b"x") == b"x"
        assert socket.poll(0) == 0
    with raw_peer(endpoint) as socket:
        socket.send_multipart([b"a", b"b", b"c"])
        assert isinstance(decode_from_broker(socket.recv()), Violation)
    assert exchange.statistics().protocol_errors == 11


def test_who_does_not_say_hello_is_asked_for_it(endpoint: str, exchange: Exchange[bytes]) -> None:
    """Nothing is done for a connection before its `Hello`."""
    with raw_peer(endpoint) as socket:
        socket.send(encode(Heartbeat()))
        assert isinstance(decode_from_broker(socket.recv()), HelloNeeded)
        socket.send(encode(Hello(session="s", peer=Peer())))
        assert isinstance(decode_from_broker(socket.recv()), Welcome)
        socket.send(encode(Heartbeat()))
        assert isinstance(decode_from_broker(socket.recv()), Alive)


async def test_a_stuck_peer_stops_nobody(
    endpoint: str, peers: Connect, exchange: Exchange[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that does not read has its connection dropped; everybody else is served meanwhile."""
    monkeypatch.setattr(zeromq, "MAX_BACKLOG_BYTES", 1024 * 1024)
    speaker = await peers()
    await speaker.add_rpc_subscriber(echo, "me")
    with raw_peer(endpoint) as socket:
        socket.send(encode(Hello(session="stuck", peer=Peer(), patterns=((1, None, None),))))
        assert isinstance(decode_from_broker(socket.recv()), Welcome)
        for _ in range(QUEUE_FRAMES // 10 + 5):
            await asyncio.gather(*(speaker.broadcast_send(bytes(200 * 1024)) for _ in range(10)))
            assert await speaker.rpc_send("me", b"x") == b"x"
    statistics = exchange.statistics().broker
    assert (statistics.sessions, statistics.connected) == (2, 1)


async def test_a_full_disk_refuses_new_tasks_only(peers: Connect, exchange: Exchange[bytes]) -> None:
    """With `refuse_new` new tasks are refused with `StoreFullError`; acknowledgements and calls go on."""
    peer, inbox = await peers(), Inbox()
    await peer.add_task_subscriber(inbox)
    receipt = await peer.task_send(b"1", want_result=True)
    task = await inbox.next()
    exchange.refuse_new = "/full"
    with pytest.raises(StoreFullError):
        await peer.task_send(b"2")
    assert await peer.call([b"add a"]) == [b"1"]
    inbox.ack(task, b"done")
    assert await receipt.result() == b"done"
    exchange.refuse_new = None
    await peer.task_send(b"3")


# --- connections and sessions ---


async def test_a_lost_connection_is_not_the_end_of_a_session(peers: Connect, exchange: Exchange[bytes]) -> None:
    """When a peer's connection breaks it comes back as the same session, and nothing was taken from it."""
    sender, worker, inbox = await peers(), await peers(), Inbox()
    await worker.add_task_subscriber(inbox)
    await worker.add_rpc_subscriber(echo, "echo")
    receipt = await sender.task_send(b"1", want_result=True)
    task = await inbox.next()
    up = asyncio.Event()
    forget = worker.on_reconnect(up.set)
    core, transport = worker._core, worker._transport  # type: ignore[attr-defined]

    def pull_the_plug(now: float) -> None:
        transport.open()
        core.connect(now)

    worker._post(pull_the_plug)  # type: ignore[attr-defined]
    await up.wait()
    forget()
    assert await sender.rpc_send("echo", b"x") == b"x"
    inbox.ack(task, b"done")
    assert await receipt.result() == b"done"
    assert exchange.statistics().broker.delivered == 1


async def test_no_broker(endpoint: str) -> None:
    """Without a broker `connect_zmq` says where it looked, and leaves nothing behind."""
    with pytest.raises(ConnectionLostError) as error:
        await connect_zmq(endpoint, timeout_s=0.05)
    assert error.value.endpoint == endpoint
    assert "daemon" in str(error.value)


async def test_the_path_must_fit(short_folder: Path) -> None:
    """An endpoint whose path is too long for a Unix socket, or that is none, is refused in words."""
    for bad in (f"ipc://{short_folder}/{'x' * 107}", "tcp://127.0.0.1:1", "ipc://@abstract", "ipc://relative"):
        with pytest.raises(ProfileError):
            await connect_zmq(bad)
    longest = f"ipc://{short_folder}/{'x' * (106 - len(str(short_folder)) - 1)}"
    with serving(longest):
        await (await connect_zmq(longest)).close()


def test_the_folder_is_private(endpoint: str, short_folder: Path, exchange: Exchange[bytes]) -> None:
    """The socket's folder is made with mode 0700; one that is open to others is refused."""
    assert (short_folder / "run").stat().st_mode & 0o777 == 0o700
    (short_folder / "open").mkdir()
    (short_folder / "open").chmod(0o755)
    connection = sqlite3.connect(":memory:", isolation_level=None)
    with pytest.raises(ProfileError, match="chmod 700"):
        ZmqServer(Exchange(connection), f"ipc://{short_folder}/open/s")
    connection.close()


async def test_the_communicators_own_thread_may_not_wait(peers: Connect) -> None:
    """Using a communicator from its own thread raises at once instead of waiting for itself."""
    peer = await peers()
    outcome: asyncio.Queue[BaseException] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def inside(now: float) -> None:
        try:
            asyncio.run(peer.task_send(b""))
        except RuntimeError as error:
            loop.call_soon_threadsafe(outcome.put_nowait, error)

    peer._post(inside)  # type: ignore[attr-defined]
    assert "own thread" in str(await outcome.get())


async def test_after_a_fork_the_child_has_no_communicator(peers: Connect) -> None:
    """In a forked child every use raises `ForkedProcessError`, `close` does nothing, and the parent goes on."""
    peer = await peers()
    await peer.add_rpc_subscriber(echo, "me")
    child = os.fork()
    if child == 0:
        coroutine = peer.task_send(b"")
        try:
            coroutine.send(None)
        except ForkedProcessError:
            os._exit(7)
        finally:
            os._exit(1)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert await peer.rpc_send("me", b"x") == b"x"


def test_importing_the_room_imports_no_zmq() -> None:
    """Only `prunus.messaging.zeromq` needs ZeroMQ."""
    program = "import sys, prunus.messaging; sys.exit('zmq' in sys.modules)"
    assert os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-c", program], environment()) == 0


# --- real processes ---


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(prunus.__file__).parents[1])}


@asynccontextmanager
async def program(name: str, *arguments: str) -> AsyncIterator[Process]:
    """A real process that said ``ready``."""
    process = await create_subprocess_exec(sys.executable, str(HERE / name), *arguments, stdout=PIPE, env=environment())
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_killed_worker_is_replaced_within_milliseconds(endpoint: str, peers: Connect) -> None:
    """SIGKILL of a peer: its tasks are with another, and who waits for its answer knows, long before any lease ends."""
    sender, other, inbox = await peers(), await peers(), Inbox()
    async with program("peer_program.py", endpoint, "work") as worker:
        assert worker.stdout is not None
        await sender.task_send(b"job", queue="work")
        assert await worker.stdout.readline() == b"held job\n"
        question = asyncio.create_task(sender.rpc_send("work", b"hang", timeout_s=1000))
        assert await worker.stdout.readline() == b"asked\n"
        await other.add_task_subscriber(inbox, queue="work")
        worker.send_signal(signal.SIGKILL)
        started = time.perf_counter()
        task = await inbox.next()
        with pytest.raises(IndeterminateError):
            await question
        assert time.perf_counter() - started < 1.0
        assert (task.body, task.attempt) == (b"job", 2)
        await other.add_rpc_subscriber(echo, "work")


async def test_a_stopped_worker_keeps_its_work(endpoint: str, peers: Connect) -> None:
    """SIGSTOP is no proof of death: within the lease nothing is taken away, and after SIGCONT all goes on."""
    sender = await peers()
    async with program("peer_program.py", endpoint, "work") as worker:
        worker.send_signal(signal.SIGSTOP)
        await sender.task_send(b"job", queue="work")
        question = asyncio.create_task(sender.rpc_send("work", b""))
        await sender.broadcast_send(b"")
        worker.send_signal(signal.SIGCONT)
        assert await question == str(worker.pid).encode()
        assert worker.stdout is not None
        assert await worker.stdout.readline() == b"held job\n"


async def test_a_killed_broker_loses_nothing(endpoint: str, short_folder: Path) -> None:
    """SIGKILL of the broker amid traffic: everybody reconnects within two seconds, each accepted task comes once."""
    database = str(short_folder / "broker.db")
    inbox, sent = Inbox(), []
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(program("broker_program.py", database, endpoint))
        sender = await stack.enter_async_context(await connect_zmq(endpoint))
        worker = await stack.enter_async_context(await connect_zmq(endpoint))
        await worker.add_task_subscriber(inbox, credit=1000)
        await worker.add_rpc_subscriber(echo, "echo")
        held = []
        for cycle in range(3):
            sending = [asyncio.create_task(sender.task_send(b"%d.%d" % (cycle, number))) for number in range(50)]
            adding = [asyncio.create_task(sender.call([b"add %d.%d" % (cycle, number)])) for number in range(50)]
            held.append(await inbox.next())
            broker.send_signal(signal.SIGKILL)
            await broker.wait()
            broker = await stack.enter_async_context(program("broker_program.py", database, endpoint))
            started = time.perf_counter()
            assert await sender.rpc_send("echo", b"x") == b"x"
            assert time.perf_counter() - started < 2.0
            sent += [receipt.id for receipt in await asyncio.gather(*sending)]
            await asyncio.gather(*adding)
        held += [await inbox.next() for _ in range(len(sent) - len(held))]
        assert sorted(task.id for task in held) == sorted(sent)
        assert inbox.came.empty()
        [words] = await sender.call([b"words"])
        assert len(words.split()) == len(set(words.split())) == 150


async def test_a_restarted_broker_knows_the_dead(endpoint: str, short_folder: Path) -> None:
    """A worker that died while there was no broker: the next one sees it at once and gives its tasks to another."""
    database = str(short_folder / "broker.db")
    inbox = Inbox()
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(program("broker_program.py", database, endpoint))
        worker = await stack.enter_async_context(program("peer_program.py", endpoint, "work"))
        other = await stack.enter_async_context(await connect_zmq(endpoint))
        await other.task_send(b"job", queue="work")
        assert worker.stdout is not None
        assert await worker.stdout.readline() == b"held job\n"
        for process in (broker, worker):
            process.send_signal(signal.SIGKILL)
            await process.wait()
        await stack.enter_async_context(program("broker_program.py", database, endpoint))
        await other.add_task_subscriber(inbox, queue="work")
        assert (await inbox.next()).attempt == 2


async def test_a_broken_thread_ends_all_waiting(peers: Connect) -> None:
    """If the communicator's thread fails, whoever waits gets an error, and so does whoever comes later."""
    peer = await peers()

    def fail(now: float) -> None:
        raise ZeroDivisionError("a defect")

    await peer.add_rpc_subscriber(Inbox(), "slow")  # type: ignore[arg-type]
    question = asyncio.create_task(peer.rpc_send("slow", b""))
    await asyncio.sleep(0)
    peer._post(fail)  # type: ignore[attr-defined]
    with pytest.raises(CommunicatorClosedError):
        await question
    with pytest.raises(CommunicatorClosedError):
        await peer.task_send(b"")
    assert zeromq.RECONNECT_MS < 1000


def test_a_session_that_sends_a_task_twice(endpoint: str, exchange: Exchange[bytes]) -> None:
    """The same request on a second connection is answered alike and stored once."""
    send = encode(TaskSend(id=1, task="t", body=b""))
    for _ in range(2):
        with raw_peer(endpoint) as socket:
            socket.send(encode(Hello(session="s", peer=Peer())))
            socket.recv()
            socket.send(send)
            assert decode_from_broker(socket.recv()) == TaskStored(id=1, task="t", stored=True)
    assert exchange.statistics().broker.accepted == 1
