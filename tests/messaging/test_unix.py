"""The communicator over a Unix socket: the contract, hostile and stuck peers, real processes that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import random
import resource
import selectors
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

import prunus
from prunus.errors import (
    BusyError,
    CommunicatorClosedError,
    ConnectionLostError,
    ForkedProcessError,
    IndeterminateError,
    ProfileError,
    ProtocolError,
    StoreFullError,
)
from prunus.messaging import broker, client, connect_sync, server, unix
from prunus.messaging.broker import PAUSE_S
from prunus.messaging.communicator import Communicator
from prunus.messaging.connecting import connect_to
from prunus.messaging.doors import Connection
from prunus.messaging.exchange import Exchange
from prunus.messaging.inventory import QueueStatistics
from prunus.messaging.messages import (
    LEASE_S,
    MAGIC,
    MAX_CREDIT,
    MAX_FRAME_BYTES,
    MAX_HELD_BYTES,
    MAX_NAME_CHARS,
    PROTOCOL,
    Alive,
    BlobGet,
    BroadcastDelivery,
    Done,
    Goodbye,
    Heartbeat,
    Hello,
    HelloNeeded,
    Missed,
    Peer,
    TaskAck,
    TaskDelivery,
    TaskSend,
    TaskStored,
    Unwelcome,
    Violation,
    Welcome,
    bytes_in_hello,
    decode_from_broker,
    encode,
)
from prunus.messaging.peer import PeerCommunicator
from prunus.messaging.server import Server
from prunus.messaging.threaded import ThreadedCommunicator
from prunus.messaging.unix import UnixDoor, socket_path
from prunus.testing import CommunicatorContract
from prunus.testing.communicator_contract import Inbox, TakeForDead, echo
from tests.messaging import served
from tests.messaging.raw import PATIENCE_S, RawPeer, framed, raw_peer

Connect = Callable[[], Awaitable[Communicator]]
HERE = Path(__file__).parent
NOTHING = QueueStatistics()
POLL_S = 0.01


@contextmanager
def serving(endpoint: str, lease_s: float = LEASE_S) -> Iterator[Exchange[Connection]]:
    """The exchange of a real server in a thread."""
    with served.serving(endpoint, lease_s=lease_s) as server:
        yield server._exchange


@pytest.fixture
def endpoint(short_folder: Path) -> str:
    return f"ipc://{short_folder}/run/s"


@pytest.fixture
def exchange(endpoint: str) -> Iterator[Exchange[Connection]]:
    with serving(endpoint) as exchange:
        yield exchange


@pytest.fixture
async def peers(endpoint: str, exchange: Exchange[Connection]) -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def connect() -> Communicator:
            return await stack.enter_async_context(await connect_to(endpoint))

        yield connect


async def forget_what_it_holds(endpoint: str, peer: Communicator) -> None:
    """Say in the name of a peer that it holds nothing: its tasks go to others. It comes again with its next word."""
    assert isinstance(peer, PeerCommunicator)
    with raw_peer(endpoint) as imposter:
        imposter.send(encode(Hello(session=peer.session, peer=Peer(), secret=peer._core._secret)))
        assert isinstance(decode_from_broker(imposter.recv()), Welcome)


class TestUnixCommunicator(CommunicatorContract):
    @pytest.fixture
    async def connect(self, peers: Connect) -> Connect:
        return peers

    @pytest.fixture
    async def take_for_dead(self, endpoint: str) -> TakeForDead:
        return partial(forget_what_it_holds, endpoint)


# --- one peer is no danger to another ---


async def test_nonsense_changes_nothing(endpoint: str, peers: Connect, exchange: Exchange[Connection]) -> None:
    """Bytes that are no message are answered with `Violation`, then not at all."""
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
        socket.send(b"")
        assert isinstance(decode_from_broker(socket.recv()), Violation)
    assert exchange.statistics().protocol_errors == 11


async def test_a_frame_that_is_too_long_is_not_waited_for(
    endpoint: str, peers: Connect, exchange: Exchange[Connection]
) -> None:
    """Its length alone is enough to hang up; what was said before it was heard."""
    good = await peers()
    for length in (MAX_FRAME_BYTES + 1, 2**32 - 1):
        with raw_peer(endpoint) as liar:
            liar.socket.sendall(framed(encode(Heartbeat())))
            assert isinstance(decode_from_broker(liar.recv()), HelloNeeded)
            liar.socket.sendall(struct.pack("!I", length) + b"a little of it")
            with pytest.raises((EOFError, ConnectionResetError)):
                liar.recv()
    assert exchange.refused_connections == 2
    assert (await good.statistics()).protocol_errors == 0, "no frame of it was heard"


async def test_frames_that_never_end_fill_no_memory(
    endpoint: str, peers: Connect, exchange: Exchange[Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all have begun together has a bound: who has said nothing for longest in the midst of a frame is hung up
    on, and frames that do end get through."""
    size = 1024 * 1024
    monkeypatch.setattr(unix, "MAX_UNFINISHED_BYTES", 4 * size)
    good = await peers()
    await good.add_rpc_subscriber(echo, "me")
    with ExitStack() as stack:
        hostile = [stack.enter_context(raw_peer(endpoint)) for _ in range(3)]
        for each in hostile:
            each.socket.sendall(struct.pack("!I", 2 * size) + bytes(3 * size // 2))
            each.socket.settimeout(PATIENCE_S)
        with pytest.raises((EOFError, ConnectionResetError)):
            hostile[0].recv()
        assert not hostile[2].poll(0)
        assert len(await good.rpc_send("me", bytes(size))) == size
    assert exchange.refused_connections >= 1


def test_frames_arrive_whole_however_they_are_cut() -> None:
    """A reader gets bytes in any pieces; frames come out as they went in, and nothing is left over."""
    choice = random.Random(3)
    frames = [choice.randbytes(choice.choice((0, 1, 3, 4, 5, 300, 70_000))) for _ in range(200)]
    stream = b"".join(map(framed, frames))
    for most in (1, 3, 7, 1000, 100_000, len(stream)):
        reader, read, begin = unix.FrameReader(MAX_FRAME_BYTES), [], 0
        while begin < len(stream):
            end = begin + choice.randint(1, most)
            read += reader.feed(stream[begin:end])
            begin = end
        assert read == frames
        assert reader.unfinished == 0


async def test_answers_that_nobody_reads_fill_no_memory(
    endpoint: str, peers: Connect, exchange: Exchange[Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for more than may wait for all peers together, and does not read it, is hung up on; everybody else is
    served."""
    size = 1024 * 1024
    monkeypatch.setattr(server, "MAX_ALL_BACKLOGS_BYTES", 4 * size)
    good = await peers()
    await good.add_rpc_subscriber(echo, "me")
    ref = await good.blob_put(bytes(size))
    with raw_peer(endpoint) as greedy:
        greedy.send(encode(Hello(session="greedy", peer=Peer())))
        assert isinstance(decode_from_broker(greedy.recv()), Welcome)
        asked = [encode(BlobGet(id=id, digest=ref.digest, offset=0, limit=size)) for id in range(1, 9)]
        greedy.socket.sendall(b"".join(map(framed, asked)))  # in one batch: later ones would be refused
        assert await good.rpc_send("me", b"x") == b"x"
        with pytest.raises((EOFError, ConnectionResetError)):
            read_to_the_end(greedy)
    assert await good.rpc_send("me", b"x") == b"x"


def test_who_says_much_does_not_keep_others_from_being_heard(short_folder: Path) -> None:
    """Each connection has its turn, however much comes on those before it."""
    path = short_folder / "s"
    door = UnixDoor(path, max_connections=10)
    with selectors.DefaultSelector() as selector, ExitStack() as stack:
        door.watch(selector)
        stack.callback(door.close)
        talkers = [stack.enter_context(raw_peer(f"ipc://{path}")) for _ in range(4)]
        for talker in talkers:
            talker.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    talker.socket.send(framed(b"") * 10_000)
        heard: set[Connection] = set()
        for _ in range(1 + len(talkers)):  # the first turn is for who comes
            for key, events in selector.select(0):
                key.data(events)
            frames: list[tuple[Connection, bytes]] = []
            door.receive(frames)
            heard |= {connection for connection, _ in frames}
        assert len(heard) == len(talkers)


async def test_a_broker_that_never_rests_notices_deaths(
    endpoint: str, peers: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks after the dead also if there is always more to do."""
    receive = UnixDoor.receive
    sender, other, inbox = await peers(), await peers(), Inbox()
    async with program("peer_program.py", endpoint, "work") as worker:
        assert worker.stdout is not None
        await sender.task_send(b"job", queue="work")
        assert await worker.stdout.readline() == b"held job\n"
        monkeypatch.setattr(UnixDoor, "receive", lambda door, frames: receive(door, frames) and False)
        await other.add_task_subscriber(inbox, queue="work")
        worker.send_signal(signal.SIGKILL)
        assert (await inbox.next()).body == b"job"


def read_to_the_end(peer: RawPeer) -> None:
    while True:
        peer.recv()


async def test_connections_are_counted(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than there may be is told so; when another leaves there is room again."""
    endpoint = f"ipc://{short_folder}/run/s"
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    with serving(endpoint) as exchange:
        first, second = await connect_to(endpoint), await connect_to(endpoint)
        with pytest.raises(BusyError) as error:
            await connect_to(endpoint, timeout_s=PATIENCE_S)
        assert error.value.reason == (
            f"the broker at {endpoint} refuses this client: "
            "it has 2 connections, as many as it may have; close some, or try again later"
        )
        assert exchange.refused_connections == 1
        await first.close()
        await (await connect_to(endpoint, timeout_s=PATIENCE_S)).close()
        await second.close()


def test_of_many_that_are_refused_the_log_tells_one(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All are counted, and told why; nothing is kept of them."""
    endpoint = f"ipc://{short_folder}/run/s"
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 1)
    with serving(endpoint) as exchange, raw_peer(endpoint) as first:
        first.send(encode(Hello(session="first", peer=Peer())))
        assert isinstance(decode_from_broker(first.recv()), Welcome)
        for _ in range(100):
            with raw_peer(endpoint) as late:
                assert isinstance(decode_from_broker(late.recv()), Unwelcome)
                with pytest.raises(EOFError):
                    late.recv()
        assert exchange.refused_connections == 100
        assert list(exchange.principals()) == ["first"]
    assert caplog.text.count("more than 1 connections") == 1


async def test_one_session_more_than_there_may_be(
    endpoint: str, peers: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told which bound of which broker is reached, at once; when another leaves there is room."""
    first = await peers()
    monkeypatch.setattr(broker, "MAX_SESSIONS", 1)
    with pytest.raises(BusyError, match="the bound of 1 sessions is reached; try again when some are gone") as error:
        await connect_to(endpoint, timeout_s=PATIENCE_S)
    assert endpoint in error.value.reason
    with pytest.raises(BusyError, match="the bound of 1 sessions"):
        connect_sync(endpoint)
    await first.close()
    await (await connect_to(endpoint)).close()


@pytest.mark.parametrize("bound", ["MAX_SESSIONS", "MAX_CONNECTIONS"])
async def test_who_was_there_comes_again(
    bound: str, endpoint: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A broker that has too many peers when a client comes back refuses it for now: what it is asked for waits."""
    monkeypatch.setattr(client, "REFUSED_PAUSE_S", (0.05, 0.05))
    with ExitStack() as first_life:
        first_life.enter_context(serving(endpoint))
        peer = await connect_to(endpoint)
        await peer.add_rpc_subscriber(echo, "me")
        monkeypatch.setattr(broker if bound == "MAX_SESSIONS" else server, bound, 1)
        other = Path(endpoint.removeprefix("ipc://")).with_name("other")
        with serving(f"ipc://{other}") as exchange, raw_peer(f"ipc://{other}") as early:
            early.send(encode(Hello(session="early", peer=Peer())))
            assert isinstance(decode_from_broker(early.recv()), Welcome)
            first_life.close()
            other.rename(other.with_name("s"))  # so nobody else is earlier
            begun = time.monotonic()
            asking = asyncio.create_task(peer.rpc_send("me", b"x"))
            while exchange.refused_connections < 3:
                await asyncio.sleep(POLL_S)
            assert time.monotonic() > begun + 0.05, "it does not come again at once"
            assert not asking.done()
            early.send(encode(Goodbye(id=1)))
            early.socket.shutdown(socket.SHUT_WR)
            assert await asking == b"x"
            await peer.close()
    assert caplog.text.count("refuses this client for now") == 1


@pytest.mark.parametrize(
    ("begins", "words"),
    [
        (bytes((MAGIC, PROTOCOL + 1)), f"speaks protocol {PROTOCOL + 1}, this one {PROTOCOL}; use the same Prunus"),
        (b"HTTP/1.1 400", "no message of Prunus"),
    ],
)
async def test_who_speaks_another_language(begins: bytes, words: str, endpoint: str) -> None:
    """What is there is named, at once, and why nobody can talk to it."""
    path = socket_path(endpoint)
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        with ThreadPoolExecutor(1) as thread:
            thread.submit(answer_once, listening, begins + b"...")
            with pytest.raises(ProtocolError, match=words) as error:
                await connect_to(endpoint, timeout_s=PATIENCE_S)
    assert endpoint in error.value.reason


def answer_once(listening: socket.socket, frame: bytes) -> None:
    """Hear what somebody says, answer with this, and wait until it leaves."""
    peer, _ = listening.accept()
    with peer:
        peer.recv(1000)
        peer.sendall(framed(frame))
        peer.recv(1000)


def test_who_speaks_another_version_is_told(endpoint: str, exchange: Exchange[Connection]) -> None:
    """In the language of this one, whose header says which it is."""
    with raw_peer(endpoint) as peer:
        peer.send(bytes((MAGIC, PROTOCOL + 1)) + encode(Hello(session="s", peer=Peer()))[2:])
        answer = peer.recv()
    assert answer[1] == PROTOCOL
    violation = decode_from_broker(answer)
    assert isinstance(violation, Violation)
    assert f"protocol {PROTOCOL + 1}" in violation.reason
    assert exchange.principals() == {}


async def test_a_session_holds_no_more_than_it_can_say(
    endpoint: str, peers: Connect, exchange: Exchange[Connection]
) -> None:
    """However much credit it gives: so nothing is lost when it comes back, and what it has done makes room."""
    ids = [f"{number:0{MAX_NAME_CHARS}}" for number in range(MAX_HELD_BYTES // MAX_NAME_CHARS)]
    sends = [encode(TaskSend(id=number, task=task, body=b"")) for number, task in enumerate(ids, 1)]
    with raw_peer(endpoint) as sender:
        sender.send(encode(Hello(session="sender", peer=Peer())))
        decode_from_broker(sender.recv())
        for frame in sends:
            sender.send(frame)
            assert isinstance(decode_from_broker(sender.recv()), TaskStored)
    most = math.ceil(MAX_HELD_BYTES / bytes_in_hello(ids[0]))
    assert most < len(ids)
    worker, inbox, up = await peers(), Inbox(), asyncio.Event()
    await worker.add_task_subscriber(inbox, credit=MAX_CREDIT)
    tasks = [await inbox.next() for _ in range(most)]
    worker.on_reconnect(up.set)

    def held() -> tuple[int, int]:
        statistics = exchange.statistics()
        return statistics.sessions[worker.session].held, statistics.sessions[worker.session].credit

    assert held() == (most, 0)
    pull_the_plug(worker)
    await up.wait()
    assert held() == (most, 0)
    inbox.ack(tasks[0])
    assert (await inbox.next()).id == ids[most]
    assert held() == (most, 0)
    assert exchange.statistics().delivered == most + 1


def test_a_connection_for_which_there_is_no_file_is_taken_later(
    endpoint: str, exchange: Exchange[Connection], caplog: pytest.LogCaptureFixture
) -> None:
    """The others are served meanwhile, and nothing runs hot."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with raw_peer(endpoint) as there, socket.socket(socket.AF_UNIX) as late, ExitStack() as files:
        there.send(encode(Heartbeat()))
        assert isinstance(decode_from_broker(there.recv()), HelloNeeded)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with contextlib.suppress(OSError):
            while True:
                files.callback(os.close, os.dup(0))
        late.settimeout(PATIENCE_S)
        late.connect(str(socket_path(endpoint)))
        late.sendall(framed(encode(Heartbeat())))
        while "can't be taken" not in caplog.text:
            there.send(encode(Heartbeat()))
            assert isinstance(decode_from_broker(there.recv()), HelloNeeded)
        files.close()
        assert late.recv(1000)
    assert caplog.text.count("can't be taken") < 20


def test_frames_are_written_as_far_as_there_is_room() -> None:
    """Whatever the socket takes at a time, the other side reads all of them, in order, and nothing else."""
    choice = random.Random(4)
    frames = [choice.randbytes(choice.choice((0, 1, 300, 70_000, 600_000))) for _ in range(60)]
    writer, reader, read = unix.FrameWriter(), unix.FrameReader(MAX_FRAME_BYTES), []
    ours, its = socket.socketpair()
    with ours, its:
        ours.setblocking(False)
        left = iter(frames)
        blocked = 0
        while len(read) < len(frames):
            for frame in itertools.islice(left, choice.randint(0, 3)):
                writer.add(frame)
            blocked += not writer.write_to(ours)
            with contextlib.suppress(BlockingIOError):
                read += reader.feed(its.recv(choice.choice((1, 1000, 300_000)), socket.MSG_DONTWAIT))
        assert read == frames
        assert blocked
        assert (len(writer), writer.size) == (0, 0)


async def test_the_last_words_of_a_peer_are_heard(endpoint: str, peers: Connect) -> None:
    """Who says something and is gone at once has said it."""
    good = await peers()
    for number in range(20):
        with raw_peer(endpoint) as hasty:
            hello, send = Hello(session=f"hasty-{number}", peer=Peer()), TaskSend(id=1, task=f"t{number}", body=b"")
            hasty.socket.sendall(framed(encode(hello)) + framed(encode(send)))
    while (await good.statistics()).queues.get("default", NOTHING).ready < 20:
        await asyncio.sleep(0)


def test_a_file_in_the_place_of_the_socket_is_left_alone(short_folder: Path) -> None:
    """Only a socket is taken for what a killed broker left; and a broker removes only its own."""
    (short_folder / "run").mkdir(mode=0o700)
    path = short_folder / "run" / "s"
    path.write_text("precious")
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        with pytest.raises(ProfileError, match="can't be opened"):
            Server(Exchange(connection), f"ipc://{path}")
        assert path.read_text() == "precious"
        path.unlink()
        first = Server(Exchange(connection), f"ipc://{path}")
        second = Server(Exchange(connection), f"ipc://{path}")  # the lock of the profile keeps this from happening
        first.close()
        assert path.is_socket()
        second.close()
        assert not path.exists()


def test_who_does_not_say_hello_is_asked_for_it(endpoint: str, exchange: Exchange[Connection]) -> None:
    """Nothing is done for a connection before its `Hello`."""
    with raw_peer(endpoint) as socket:
        socket.send(encode(Heartbeat()))
        assert isinstance(decode_from_broker(socket.recv()), HelloNeeded)
        socket.send(encode(Hello(session="s", peer=Peer())))
        assert isinstance(decode_from_broker(socket.recv()), Welcome)
        socket.send(encode(Heartbeat()))
        assert isinstance(decode_from_broker(socket.recv()), Alive)


async def test_a_stuck_peer_stops_nobody(
    endpoint: str, peers: Connect, exchange: Exchange[Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that does not read has its connection dropped; everybody else is served meanwhile."""
    monkeypatch.setattr(server, "MAX_BACKLOG_BYTES", 1024 * 1024)
    speaker = await peers()
    await speaker.add_rpc_subscriber(echo, "me")
    with raw_peer(endpoint) as socket:
        socket.send(encode(Hello(session="stuck", peer=Peer(), patterns=((1, None, None),))))
        assert isinstance(decode_from_broker(socket.recv()), Welcome)
        for _ in range(35):
            await asyncio.gather(*(speaker.broadcast_send(bytes(200 * 1024)) for _ in range(10)))
            assert await speaker.rpc_send("me", b"x") == b"x"
    sessions = exchange.statistics().sessions
    assert [one.connected for one in sessions.values()].count(True) == 1
    assert len(sessions) == 2


async def test_peers_that_never_read_fill_no_memory(
    endpoint: str, peers: Connect, exchange: Exchange[Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broadcasts to peers that are stuck are dropped, and each is told how many it missed when it reads again; all
    that is kept for them together has a bound; and everybody else is served meanwhile."""
    size, number, stuck = 50_000, 600, 5
    monkeypatch.setattr(server, "STUCK_FRAMES", 10)
    monkeypatch.setattr(server, "MAX_ALL_BACKLOGS_BYTES", 2 * stuck * 100 * size)
    speaker = await peers()
    await speaker.add_rpc_subscriber(echo, "me")
    with ExitStack() as stack:
        sockets = [stack.enter_context(raw_peer(endpoint)) for _ in range(stuck)]
        for each, socket in enumerate(sockets):
            socket.send(encode(Hello(session=f"stuck-{each}", peer=Peer(), patterns=((1, None, None),))))
            assert isinstance(decode_from_broker(socket.recv()), Welcome)
        for _ in range(number // 10):
            await asyncio.gather(*(speaker.broadcast_send(bytes(size)) for _ in range(10)))
            assert await speaker.rpc_send("me", b"x") == b"x"
        missed = (await speaker.statistics()).broadcasts_missed
        assert missed > stuck * (number - 200), "few of them wait"
        assert all(one.connected for one in (await speaker.statistics()).sessions.values())
        await asyncio.gather(*(asyncio.to_thread(read_all, socket, number) for socket in sockets))


def read_all(socket: RawPeer, number: int) -> None:
    """What it reads and what it is told that it missed is all that there was."""
    heard = told = 0
    while heard + told < number:
        match decode_from_broker(socket.recv()):
            case BroadcastDelivery():
                heard += 1
            case Missed(count=count):
                told += count
    assert heard + told == number
    assert told > 0


async def test_a_question_to_a_stuck_peer_is_refused(
    endpoint: str, peers: Connect, exchange: Exchange[Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller hears at once that nobody takes it."""
    monkeypatch.setattr(server, "STUCK_FRAMES", 1)
    asker = await peers()
    with raw_peer(endpoint) as socket:
        socket.send(encode(Hello(session="stuck", peer=Peer(), identifiers=(("stuck", 0),))))
        assert isinstance(decode_from_broker(socket.recv()), Welcome)
        outcomes: list[BaseException | bytes] = []
        while not any(isinstance(one, BusyError) for one in outcomes):
            asked = [asker.rpc_send("stuck", bytes(200_000), timeout_s=0.05) for _ in range(10)]
            outcomes += await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(one, BusyError | IndeterminateError) for one in outcomes)


def test_the_kernel_says_whose_process_connects(
    endpoint: str, short_folder: Path, exchange: Exchange[Connection]
) -> None:
    """Another user does not get in, even if the folder were open."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    short_folder.chmod(0o755)
    (short_folder / "run").chmod(0o755)
    (short_folder / "run" / "s").chmod(0o777)
    program = (
        "import os, socket, sys\nos.setuid(int(sys.argv[2]))\ns = socket.socket(socket.AF_UNIX)\n"
        "s.connect(sys.argv[1])\ntry:\n    s.sendall(bytes([0, 0, 0, 1, 0]))\n    heard = bool(s.recv(1))\n"
        "except ConnectionError:\n    heard = False\nsys.exit(10 + heard)"
    )
    for user, heard in ((65534, False), (0, True)):
        done = subprocess.run([sys.executable, "-c", program, str(socket_path(endpoint)), str(user)], check=False)
        assert done.returncode == 10 + heard
    assert exchange.statistics().frames == 1


async def test_a_full_disk_refuses_new_tasks_only(peers: Connect, exchange: Exchange[Connection]) -> None:
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


async def test_a_lost_connection_is_not_the_end_of_a_session(peers: Connect, exchange: Exchange[Connection]) -> None:
    """When a peer's connection breaks it comes back as the same session, and nothing was taken from it."""
    sender, worker, inbox = await peers(), await peers(), Inbox()
    await worker.add_task_subscriber(inbox)
    await worker.add_rpc_subscriber(echo, "echo")
    receipt = await sender.task_send(b"1", want_result=True)
    task = await inbox.next()
    up = asyncio.Event()
    forget = worker.on_reconnect(up.set)
    pull_the_plug(worker)
    await up.wait()
    forget()
    assert await sender.rpc_send("echo", b"x") == b"x"
    inbox.ack(task, b"done")
    assert await receipt.result() == b"done"
    assert exchange.statistics().delivered == 1


def pull_the_plug(peer: Communicator) -> None:
    """Its connection breaks, and is made anew."""
    assert isinstance(peer, ThreadedCommunicator)

    def pull(now: float) -> None:
        peer._transport.open()
        peer._core.connect(now)

    peer._post(pull)


async def test_no_broker(endpoint: str) -> None:
    """Without a broker `connect_to` says where it looked, and leaves nothing behind."""
    with pytest.raises(ConnectionLostError) as error:
        await connect_to(endpoint, timeout_s=0.05)
    assert error.value.endpoint == endpoint
    assert "daemon" in str(error.value)


async def test_the_path_must_fit(short_folder: Path) -> None:
    """An endpoint whose path is too long for a Unix socket, or that is none, is refused in words."""
    for bad in (f"ipc://{short_folder}/{'x' * 107}", "tcp://127.0.0.1:1", "ipc://@abstract", "ipc://relative"):
        with pytest.raises(ProfileError):
            await connect_to(bad)
    longest = f"ipc://{short_folder}/{'x' * (106 - len(str(short_folder)) - 1)}"
    with serving(longest):
        await (await connect_to(longest)).close()


def test_the_folder_is_private(endpoint: str, short_folder: Path, exchange: Exchange[Connection]) -> None:
    """The socket's folder is made with mode 0700; one that is open to others is refused."""
    assert (short_folder / "run").stat().st_mode & 0o777 == 0o700
    (short_folder / "open").mkdir()
    (short_folder / "open").chmod(0o755)
    connection = sqlite3.connect(":memory:", isolation_level=None)
    with pytest.raises(ProfileError, match="chmod 700"):
        Server(Exchange(connection), f"ipc://{short_folder}/open/s")
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

    await asyncio.to_thread(peer._post, inside)  # type: ignore[attr-defined]
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


def test_on_one_host_nobody_imports_zmq() -> None:
    """Only `prunus.messaging.zeromq` needs ZeroMQ, for the network."""
    program = "import sys, prunus.messaging.connecting, prunus.messaging.server; sys.exit('zmq' in sys.modules)"
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


ENDED_BY_A_SIGNAL = """
import asyncio, signal, sys, threading, time
from prunus.messaging.connecting import connect_to

def compute(task):
    print("computing", flush=True)
    if KIND == "plain":
        interrupted.wait()
        sys.exit(0)
    while True:
        time.sleep(0.01)

async def compute_async(task):
    compute(task)

def leave(signum, frame):
    interrupted.set()
    if KIND == "async":
        sys.exit(0)

async def main():
    async with await connect_to(ENDPOINT) as communicator:
        await communicator.add_task_subscriber(compute_async if KIND == "async" else compute, queue="work")
        print("ready", flush=True)
        while True:
            await asyncio.sleep(0.01)

KIND, ENDPOINT = sys.argv[1:]
interrupted = threading.Event()
signal.signal(signal.SIGTERM, leave)
asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_who_is_ended_by_a_signal_gives_its_task_back(endpoint: str, peers: Connect, kind: str) -> None:
    """A program whose signal handler calls `sys.exit` while a handler computes: the task is not done, and comes to
    another."""
    sender, other = await peers(), await peers()
    receipt = await sender.task_send(b"job", queue="work", want_result=True)
    worker = await create_subprocess_exec(
        sys.executable, "-c", ENDED_BY_A_SIGNAL, kind, endpoint, stdout=PIPE, env=environment()
    )
    try:
        assert worker.stdout is not None
        assert {await worker.stdout.readline(), await worker.stdout.readline()} == {b"ready\n", b"computing\n"}
        worker.send_signal(signal.SIGTERM)
        assert await worker.wait() == 0
    finally:
        if worker.returncode is None:
            worker.kill()
        await worker.communicate()
    async with await other.next_task(queue="work", timeout_s=PATIENCE_S) as task:
        assert (task.id, task.attempt) == (receipt.id, 2)
        [seen] = await sender.tasks("work")
        assert seen.reason == "its handler was ended by SystemExit: 0"
        await task.acknowledge(b"done")
    assert await receipt.result() == b"done"


async def test_a_fetch_ends_in_time_though_the_broker_is_away(endpoint: str, short_folder: Path) -> None:
    """Before it was begun, or in its midst; and when a broker is there again it knows of no such wish."""
    database = str(short_folder / "broker.db")
    async with AsyncExitStack() as stack:
        with served.serving(endpoint, database):
            peer = await stack.enter_async_context(await connect_to(endpoint))
            fetching = asyncio.create_task(peer.next_task(queue="q", timeout_s=0.3))
            while "q" not in (await peer.statistics()).queues:
                pass
        with pytest.raises(TimeoutError, match=f"and no broker answers at {endpoint}"):
            await fetching
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="and no broker answers"):
            await peer.next_task(queue="q", timeout_s=0.1)
        assert time.monotonic() - began < 5.0
        with served.serving(endpoint, database):
            receipt = await peer.task_send(b"job", queue="q")
            assert (await peer.statistics()).sessions[peer.session].subscriptions == 0
            [task] = await peer.tasks("q")
            assert (task.id, task.place, task.attempt) == (receipt.id, "ready", 0)
            await peer.close()


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


async def test_a_stopped_broker_takes_nobody_for_dead(endpoint: str, short_folder: Path) -> None:
    """A broker and a worker that are stopped for longer than a lease (a laptop that sleeps): whoever wakes first, the
    worker keeps what it has, for the broker knows that it was away itself."""
    database, lease_s = str(short_folder / "broker.db"), 3.0
    inbox = Inbox()
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(program("broker_program.py", database, endpoint, str(lease_s)))
        worker = await stack.enter_async_context(program("peer_program.py", endpoint, "work"))
        other = await stack.enter_async_context(await connect_to(endpoint))
        await other.task_send(b"job", queue="work")
        assert worker.stdout is not None
        assert await worker.stdout.readline() == b"held job\n"
        await other.add_task_subscriber(inbox, queue="work")
        for process in (worker, broker):
            process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(max(lease_s, PAUSE_S) + 0.5)  # this is what happens, and nothing is waited for
        broker.send_signal(signal.SIGCONT)
        await other.add_task_subscriber(inbox, queue="else")
        await other.task_send(b"another", queue="else")
        assert (await inbox.next()).body == b"another"
        assert inbox.came.empty()
        worker.send_signal(signal.SIGCONT)
        assert await other.rpc_send("work", b"") == str(worker.pid).encode()
        assert inbox.came.empty(), "the job is where it was"


async def test_a_killed_broker_loses_nothing(endpoint: str, short_folder: Path) -> None:
    """SIGKILL of the broker amid traffic: everybody reconnects within two seconds, each accepted task comes once."""
    database = str(short_folder / "broker.db")
    inbox, sent = Inbox(), []
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(program("broker_program.py", database, endpoint))
        sender = await stack.enter_async_context(await connect_to(endpoint))
        worker = await stack.enter_async_context(await connect_to(endpoint))
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
        other = await stack.enter_async_context(await connect_to(endpoint))
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


def test_who_was_silent_for_too_long_has_lost_its_tasks(endpoint: str) -> None:
    """After its lease a task goes to another. When the silent one is back it is told, and its acknowledgement under
    the old epoch is stale and changes nothing."""
    with serving(endpoint, lease_s=0.2), raw_peer(endpoint) as silent, raw_peer(endpoint) as other:
        silent.send(encode(Hello(session="silent", peer=Peer(), queues=(("q", 1),))))
        silent.send(encode(TaskSend(id=1, task="t", body=b"x", queue="q")))
        heard = [decode_from_broker(silent.recv()) for _ in range(3)]
        [first] = [one for one in heard if isinstance(one, TaskDelivery)]

        other.send(encode(Hello(session="other", peer=Peer(), queues=(("q", 1),))))
        assert isinstance(decode_from_broker(other.recv()), Welcome)
        second = None
        while not isinstance(second, TaskDelivery):
            other.send(encode(Heartbeat()))
            if other.poll(20):
                second = decode_from_broker(other.recv())
        assert (second.task, second.attempt) == ("t", 2)
        assert second.epoch > first.epoch

        silent.send(encode(TaskAck(id=2, task="t", epoch=first.epoch)))
        assert isinstance(decode_from_broker(silent.recv()), HelloNeeded)
        silent.send(encode(Hello(session="silent", peer=Peer(), held=(("t", first.epoch),))))
        assert decode_from_broker(silent.recv()) == Welcome(broker_epoch=1, lost=("t",), lease_s=0.2)
        silent.send(encode(TaskAck(id=2, task="t", epoch=first.epoch)))
        assert decode_from_broker(silent.recv()) == Done(id=2, stale=True)
        other.send(encode(TaskAck(id=1, task="t", epoch=second.epoch)))
        answers = [decode_from_broker(other.recv())]
        while not isinstance(answers[-1], Done):
            answers.append(decode_from_broker(other.recv()))
        assert answers[-1] == Done(id=1, stale=False)


def test_a_session_that_sends_a_task_twice(endpoint: str, exchange: Exchange[Connection]) -> None:
    """The same request on a second connection is answered alike and stored once."""
    send = encode(TaskSend(id=1, task="t", body=b""))
    for _ in range(2):
        with raw_peer(endpoint) as socket:
            socket.send(encode(Hello(session="s", peer=Peer())))
            socket.recv()
            socket.send(send)
            assert decode_from_broker(socket.recv()) == TaskStored(id=1, task="t", stored=True)
    assert exchange.statistics().accepted == 1


async def test_a_broker_watches_while_things_come_in_quick_succession(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And sleeps again when nothing comes."""
    monkeypatch.setattr(server, "WATCHFUL_S", 0.2)
    with served.serving(endpoint) as broker:
        broker._may_watch = True  # also where there is one processor
        waits: list[float | None] = []
        slept = threading.Event()
        select = broker._selector.select

        def noted(timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            waits.append(timeout)
            if timeout:
                slept.set()
            return select(timeout)

        monkeypatch.setattr(broker._selector, "select", noted)
        async with await connect_to(endpoint) as one:
            while 0 not in waits:
                await one.statistics()
        slept.clear()
        await asyncio.to_thread(slept.wait)
