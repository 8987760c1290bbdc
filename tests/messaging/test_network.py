"""The communicator over TCP with CURVE: the contract, and everybody who should not get in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from asyncio.subprocess import PIPE, create_subprocess_exec
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq

from prunus.errors import (
    BusyError,
    ConnectionLostError,
    IndeterminateError,
    KeyRefusedError,
    NotPermittedError,
    ProfileError,
    UnroutableError,
)
from prunus.messaging import client, connect_sync, zeromq
from prunus.messaging import server as server_module
from prunus.messaging.access import Role
from prunus.messaging.blobs import BlobStore
from prunus.messaging.communicator import Communicator
from prunus.messaging.connecting import connect_to
from prunus.messaging.doors import Connection
from prunus.messaging.exchange import Exchange
from prunus.messaging.keys import ClientKey, KeyFolder, KeyPair, Keyring
from prunus.messaging.liveness import boottime
from prunus.messaging.messages import (
    MAX_FRAME_BYTES,
    Alive,
    BrokerMessage,
    Heartbeat,
    Hello,
    HelloNeeded,
    Peer,
    Unwelcome,
    Welcome,
    decode_from_broker,
    encode,
)
from prunus.messaging.server import Server as BrokerServer
from prunus.messaging.threaded import ThreadedCommunicator
from prunus.messaging.zeromq import NetworkDoor, NetworkTransport
from prunus.testing import CommunicatorContract, ContractService
from prunus.testing.communicator_contract import Inbox, TakeForDead, echo
from tests.messaging.test_unix import HERE, environment

POLL_S = 0.01
Connect = Callable[[], Awaitable[Communicator]]


class Server:
    """A real broker in a thread, which listens on 127.0.0.1 for those with a key."""

    def __init__(self, folder: Path, listen: tuple[str, ...] = ("tcp://127.0.0.1:0",)) -> None:
        self.folder = folder
        self.keys = KeyFolder(folder / "keys")
        self.keys.make()
        self._connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.exchange: Exchange[Connection] = Exchange(
            self._connection,
            service=ContractService(self._connection),
            blobs=BlobStore(folder / "blobs", boottime()),
        )
        self._server = BrokerServer(self.exchange, f"ipc://{folder}/run/s", listen=listen, keys=Keyring(self.keys))
        self.local, *self.places = self._server.endpoints
        self._thread = threading.Thread(target=self._server.run, name="prunus-broker")
        self._thread.start()

    def key(self, name: str, role: Role = Role.OWNER) -> ClientKey:
        return self.keys.add(name, role, self.places, self.folder / f"{name}.key")

    def close(self) -> None:
        self._server.stop()
        self._thread.join()
        self._server.close()
        self._connection.close()


@pytest.fixture
def server(short_folder: Path) -> Iterator[Server]:
    server = Server(short_folder)
    yield server
    server.close()


@pytest.fixture
async def peers(server: Server) -> AsyncIterator[Connect]:
    """Peers that come with keys of their own."""
    async with AsyncExitStack() as stack:
        numbers = iter(range(1_000_000))

        async def connect() -> Communicator:
            return await stack.enter_async_context(await connect_to(server.key(f"peer-{next(numbers)}")))

        yield connect


class TestCurveCommunicator(CommunicatorContract):
    @pytest.fixture
    async def connect(self, peers: Connect) -> Connect:
        return peers

    @pytest.fixture
    async def take_for_dead(self) -> TakeForDead:
        async def take_for_dead(peer: Communicator) -> None:
            """Say in its name, and with its key, that it holds nothing."""
            assert isinstance(peer, ThreadedCommunicator)
            assert isinstance(peer._transport, NetworkTransport)
            with raw_peer(peer._transport._key) as imposter:
                hello = Hello(session=peer.session, peer=Peer(), secret=peer._core._secret)
                [answer] = await asyncio.to_thread(say, imposter, hello)
                assert isinstance(answer, Welcome)

        return take_for_dead


@contextmanager
def raw_peer(key: ClientKey, *, curve: bool = True, routing_id: bytes | None = None) -> Iterator[zmq.Socket[bytes]]:
    """A DEALER without any manners."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = 10_000
        if routing_id is not None:
            dealer.setsockopt(zmq.ROUTING_ID, routing_id)
        if curve:
            dealer.curve_serverkey = key.server_key.encode()
            dealer.curve_publickey, dealer.curve_secretkey = key.public_key.encode(), key.secret_key.encode()
        dealer.connect(key.endpoints[0])
        yield dealer


def say(dealer: zmq.Socket[bytes], *messages: Hello | Heartbeat) -> list[BrokerMessage]:
    answers = []
    for message in messages:
        dealer.send(encode(message))
        answers.append(decode_from_broker(dealer.recv()))
    return answers


def has_ended(connection: socket.socket) -> bool:
    """Whether the other side has hung up by now; what it said before is skipped."""
    try:
        while connection.recv(1000, socket.MSG_DONTWAIT):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        pass
    return True


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(POLL_S)


# --- who does not get in ---


async def test_an_unknown_key_is_refused(server: Server) -> None:
    """It hears so at once, and nothing that it says is heard."""
    stranger = KeyPair.new()
    key = msgspec.structs.replace(server.key("known"), public_key=stranger.public_key, secret_key=stranger.secret_key)
    with pytest.raises(KeyRefusedError, match="does not know this key, or it was revoked") as error:
        await connect_to(key, timeout_s=20)
    assert server.places[0] in str(error.value)
    assert server.exchange.refused_connections >= 1
    assert server.exchange.statistics().frames == 0


async def test_a_stolen_public_key_is_worth_nothing(server: Server) -> None:
    """Public keys are no secret: who does not have the other half does not get in."""
    key = msgspec.structs.replace(server.key("known"), secret_key=KeyPair.new().secret_key)
    with pytest.raises((KeyRefusedError, ConnectionLostError)):
        await connect_to(key, timeout_s=1)
    assert server.exchange.statistics().frames == 0


async def test_without_curve_nobody_gets_in(server: Server) -> None:
    """A client that speaks in the clear is hung up on before it says anything; the others notice nothing."""
    key = server.key("known")
    with raw_peer(key, curve=False) as dealer:
        dealer.send(encode(Hello(session="s", peer=Peer())))
        await until(lambda: server.exchange.refused_connections > 0)
        assert not dealer.poll(100)
    assert server.exchange.statistics().frames == 0
    await (await connect_to(key)).close()


async def test_a_broker_with_another_key_is_not_trusted(server: Server) -> None:
    """A client talks to the broker that its key is for, and to no other that sits at its place."""
    key = msgspec.structs.replace(server.key("known"), server_key=KeyPair.new().public_key)
    with pytest.raises(KeyRefusedError, match="does not speak as this key expects"):
        await connect_to(key, timeout_s=1)
    assert server.exchange.statistics().frames == 0


async def test_nobody_there(server: Server) -> None:
    """Without a broker it is a lost connection, as over a socket."""
    key = server.key("known")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        key = msgspec.structs.replace(key, endpoints=[f"tcp://127.0.0.1:{free.getsockname()[1]}"])
        with pytest.raises(ConnectionLostError):
            await connect_to(key, timeout_s=0.3)


def test_without_keys_there_is_no_network(short_folder: Path) -> None:
    """The broker binds nothing but its socket then; there is no way around it."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    with pytest.raises(ProfileError, match="without keys nobody listens on a network"):
        BrokerServer(Exchange(connection), f"ipc://{short_folder}/run/s", listen=["tcp://127.0.0.1:0"])
    assert not (short_folder / "run" / "s").exists()
    folder = KeyFolder(short_folder / "keys")
    folder.make()
    for place, words in (("ipc:///x/y", "no place to listen"), ("tcp://203.0.113.1:5010", "can't listen at")):
        with pytest.raises(ProfileError, match=words):
            BrokerServer(Exchange(connection), f"ipc://{short_folder}/run/s", listen=[place], keys=Keyring(folder))
        assert not (short_folder / "run" / "s").exists()
    connection.close()


# --- who has to leave ---


async def test_a_revoked_key_is_worth_nothing_at_once(server: Server) -> None:
    """Its connections are closed, its sessions end and give their tasks to others, and it does not come again."""
    worker, other = await connect_to(server.key("worker", Role.WORKER)), await connect_to(server.key("other"))
    held, later = Inbox(), Inbox()
    async with worker, other:
        await worker.add_task_subscriber(held)
        await worker.add_rpc_subscriber(echo, "me")
        receipt = await other.task_send(b"job")
        assert (await held.next()).id == receipt.id
        assert await other.rpc_send("me", b"x") == b"x"
        before = server.exchange.refused_connections

        server.keys.revoke("worker")
        with pytest.raises(UnroutableError):
            await other.rpc_send("me", b"x")
        await other.add_task_subscriber(later)
        task = await later.next()
        assert (task.id, task.attempt) == (receipt.id, 2)
        await until(lambda: server.exchange.refused_connections > before)
        assert list(server.exchange.principals()) == [other.session]
    with pytest.raises(KeyRefusedError):
        await connect_to(server.folder / "worker.key")


async def test_who_is_revoked_is_told_so(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """What waits ends with `KeyRefusedError`, and so does all that is asked afterwards; it does not come again."""
    async with await connect_to(server.key("worker", Role.WORKER)) as peer:
        subscription = await peer.add_task_subscriber(Inbox())
        waiting = [asyncio.create_task(peer.next_task(queue="empty")), asyncio.create_task(peer.ended())]
        await until(lambda: "empty" in server.exchange.statistics().queues)
        server.keys.revoke("worker")
        with pytest.raises(KeyRefusedError, match="does not know this key, or it was revoked") as error:
            await waiting[0]
        assert error.value.endpoint == server.places[0]
        await waiting[1]
        assert isinstance(peer.failure, KeyRefusedError)
        for _ in range(2):
            with pytest.raises(KeyRefusedError):
                await peer.task_send(b"x")
        refused = server.exchange.refused_connections
        await subscription.cancel()
    assert server.exchange.refused_connections == refused
    assert caplog.text.count("everything that waits for it ends with this error") == 1


def test_who_is_revoked_is_told_so_in_a_script(server: Server) -> None:
    """The blocking face raises the same."""
    server.key("script")
    with connect_sync(server.folder / "script.key") as peer, ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(peer.next_task)
        while "default" not in server.exchange.statistics().queues:
            time.sleep(POLL_S)
        server.keys.revoke("script")
        for ask in (waiting.result, peer.statistics):
            with pytest.raises(KeyRefusedError, match="does not know this key, or it was revoked"):
                ask()


async def test_a_revoked_key_is_not_heard_any_more(server: Server) -> None:
    """What is on the wire when the key is revoked is not done: the next frame finds nobody."""
    key = server.key("loud")
    with raw_peer(key) as dealer:
        [welcome] = say(dealer, Hello(session="loud", peer=Peer()))
        assert isinstance(welcome, Welcome)
        server.keys.revoke("loud")
        frames = server.exchange.statistics().frames
        dealer.send(encode(Heartbeat()))
        await until(lambda: server.exchange.refused_connections > 0)
        assert server.exchange.statistics().frames == frames
        assert server.exchange.sessions() == {}


async def test_a_revoked_listener_hears_nothing(server: Server) -> None:
    """Also one that only listens is gone before the next broadcast is told."""
    viewer, speaker = await connect_to(server.key("viewer", Role.VIEWER)), await connect_to(server.key("speaker"))
    heard: list[bytes] = []

    async def listen(broadcast: object) -> None:
        heard.append(broadcast.body)  # type: ignore[attr-defined]

    async with viewer, speaker:
        await viewer.add_broadcast_subscriber(listen)
        server.keys.revoke("viewer")
        await speaker.broadcast_send(b"secret")
        await until(lambda: viewer.session not in server.exchange.principals())
    assert heard == []


# --- what a key allows ---


async def test_what_a_role_may_not_do_is_an_error_to_it_alone(server: Server) -> None:
    """`NotPermittedError` names the role and what it asked for; the session goes on."""
    async with AsyncExitStack() as stack:
        viewer, controller, worker = [
            await stack.enter_async_context(await connect_to(server.key(role.value, role)))
            for role in (Role.VIEWER, Role.CONTROLLER, Role.WORKER)
        ]
        inbox = Inbox()
        await worker.add_task_subscriber(inbox)
        for peer in (viewer, controller):
            with pytest.raises(NotPermittedError, match="to work on tasks"):
                await peer.add_task_subscriber(Inbox())
            with pytest.raises(NotPermittedError, match="to answer questions"):
                await peer.add_rpc_subscriber(echo, "me")
        with pytest.raises(NotPermittedError, match="to send tasks"):
            await viewer.task_send(b"")
        with pytest.raises(NotPermittedError, match="to broadcast"):
            await viewer.broadcast_send(b"")
        assert await viewer.call([b"words"]) == [b""]
        await controller.task_send(b"job")
        assert (await inbox.next()).body == b"job"


async def test_a_session_can_not_be_taken_over(server: Server) -> None:
    """Neither by another key that knows its name, nor by the same key that does not know its secret."""
    worker = await connect_to(server.key("worker", Role.WORKER))
    sender = await connect_to(server.key("sender"))
    async with worker, sender:
        await worker.add_rpc_subscriber(echo, "me")
        for thief in (server.key("thief"), ClientKey.read(server.folder / "worker.key")):
            with raw_peer(thief) as dealer:
                stolen = Hello(session=worker.session, peer=Peer(), identifiers=(("me", 0),), secret="guessed")
                [answer] = say(dealer, stolen)
                assert isinstance(answer, Unwelcome)
                assert isinstance(say(dealer, Heartbeat())[0], HelloNeeded)
                assert await sender.rpc_send("me", b"x") == b"x"


async def test_a_routing_id_gives_no_right(server: Server) -> None:
    """Another key that comes with the routing id of a connection, during its life or after, is another peer."""
    first, second = server.key("first"), server.key("second")
    with raw_peer(first, routing_id=b"same") as one:
        assert isinstance(say(one, Hello(session="one", peer=Peer()))[0], Welcome)
        with raw_peer(second, routing_id=b"same") as two:
            two.send(encode(Heartbeat()))
            assert say(one, Heartbeat()) == [Alive()]
            assert not two.poll(100), "libzmq does not let it in as long as the first is there"
    with raw_peer(second, routing_id=b"same") as two:
        assert say(two, Heartbeat()) == [HelloNeeded()]


async def test_a_frame_is_of_the_key_with_which_it_came(short_folder: Path) -> None:
    """Also if another peer took over a routing id so quickly that nobody noticed that the first one left."""
    folder = KeyFolder(short_folder / "keys")
    folder.make()
    connection = sqlite3.connect(":memory:", isolation_level=None)
    exchange: Exchange[Connection] = Exchange(connection)
    with BrokerServer(
        exchange, f"ipc://{short_folder}/run/s", listen=["tcp://127.0.0.1:0"], keys=Keyring(folder)
    ) as server:
        first, second = (
            folder.add(name, Role.WORKER, server.endpoints[1:], short_folder / f"{name}.key") for name in ("a", "b")
        )
        assert server._keys is not None
        assert server._keys.changed()
        network = server._doors[1]
        assert isinstance(network, NetworkDoor)

        async def frame_is_there() -> None:
            while not network.router.poll(0):
                network.answer_zap()
                await asyncio.sleep(0)

        with raw_peer(first, routing_id=b"same") as one:
            one.send(encode(Hello(session="one", peer=Peer())))
            await frame_is_there()
            server.serve_batch()
            assert list(exchange.principals()) == ["one"]
        with raw_peer(second, routing_id=b"same") as two:
            two.send(encode(Heartbeat()))
            await frame_is_there()
            server.serve_batch()
            assert decode_from_broker(two.recv()) == HelloNeeded()
    connection.close()


# --- who sends too much, or nothing ---


async def test_a_message_without_an_end_does_not_fill_the_memory(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sends frame after frame of one message is hung up on; `MAXMSGSIZE` and HWM would let it go on for ever."""
    monkeypatch.setattr(zeromq, "MAX_UNFINISHED_BYTES", 8 * 1024 * 1024)
    monkeypatch.setattr(zeromq, "FLOOD_CHECK_S", 0.02)
    good, hostile = await connect_to(server.key("good")), server.key("hostile")
    part = zmq.Frame(bytes(64 * 1024), copy=False)  # 1.2 GiB in all, of which the sender holds one part
    async with good:
        await good.add_rpc_subscriber(echo, "me")
        with raw_peer(hostile) as dealer:
            assert isinstance(say(dealer, Hello(session="hostile", peer=Peer()))[0], Welcome)
            for _ in range(20_000):
                dealer.send(part, zmq.SNDMORE, copy=False)
            dealer.send(part, copy=False)  # libzmq's own client begins to send with the last part
            await until(lambda: server.exchange.refused_connections > 0)
            assert server.exchange.statistics().protocol_errors == 0, "no message of it was heard"
        assert await good.rpc_send("me", b"x") == b"x"


async def test_large_messages_are_no_flood(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole messages, however many, are listened to."""
    monkeypatch.setattr(zeromq, "MAX_UNFINISHED_BYTES", 4 * 1024 * 1024)
    monkeypatch.setattr(zeromq, "FLOOD_CHECK_S", 0.01)
    peer = await connect_to(server.key("large"))
    async with peer:
        await peer.add_rpc_subscriber(echo, "me")
        for _ in range(20):
            assert len(await peer.rpc_send("me", bytes(2 * 1024 * 1024))) == 2 * 1024 * 1024
    assert server.exchange.refused_connections == 0


async def test_connections_are_counted(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more than there may be is told so; when another leaves there is room again."""
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    server = Server(short_folder)
    try:
        first = await connect_to(server.key("first"))
        second = await connect_to(server.key("second"))
        third = server.key("third")
        with pytest.raises(BusyError, match="as many connections as it may have; close some") as error:
            await connect_to(third, timeout_s=20)
        assert server.places[0] in error.value.reason
        assert server.exchange.refused_connections == 1
        await first.close()
        third_peer = await connect_to(third, timeout_s=20)
        await third_peer.close()
        await second.close()
    finally:
        server.close()


async def test_far_too_many_connections_get_no_handshake(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that can't all be told are hung up on before they cost anything."""
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    server = Server(short_folder)
    host, _, port = server.places[0].removeprefix("tcp://").rpartition(":")
    try:
        async with await connect_to(server.key("there")) as peer:
            with contextlib.ExitStack() as stack:
                silent = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(60)]
                too_many = 61 - 2 - zeromq.TOLD_CONNECTIONS
                await until(lambda: sum(map(has_ended, silent)) == too_many)
                assert caplog.text.count("one is hung up on") == 1, "the log is not filled"
                with pytest.raises(UnroutableError):
                    await peer.rpc_send("nobody", b"")
    finally:
        server.close()


async def test_as_long_as_keys_cannot_be_read_nobody_is_refused_for_good(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes for the first time is told that it may try later; who was there comes again until it may."""
    monkeypatch.setattr(client, "REFUSED_PAUSE_S", (POLL_S, POLL_S))
    monkeypatch.setattr(client, "WELCOME_S", 0.5)
    key, clients = server.key("worker"), server.keys.path / "clients.yaml"
    async with await connect_to(key) as peer:
        clients.chmod(0o644)
        with pytest.raises(BusyError, match="try again later"):
            await connect_to(key, timeout_s=20)
        asking = asyncio.create_task(peer.rpc_send("nobody", b""))
        await until(lambda: peer._core._turned_away is not None)
        clients.chmod(0o600)
        with pytest.raises((UnroutableError, IndeterminateError)):
            await asking


def test_hostile_streams(server: Server) -> None:
    """Bytes that are not even ZeroMQ's, and handshakes that end nowhere: the others are served."""
    host, _, port = server.places[0].removeprefix("tcp://").rpartition(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15) + b"\x00" + bytes(31)
    streams = [
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(10_000),
        greeting,
        greeting + b"\x04\xc8\x05HELLO" + bytes(194),
        greeting + b"\x06" + struct.pack("!Q", 2**40),
        greeting.replace(b"CURVE", b"NULL\0") + b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER",
        greeting.replace(b"CURVE", b"PLAIN") + b"\x04\x09\x05HELLO\x01a\x01b",
    ]
    opened = []
    for stream in streams * 3:
        connection = socket.create_connection((host, int(port)))
        with contextlib.suppress(OSError):
            connection.sendall(stream)
        opened.append(connection)
    with raw_peer(server.key("good")) as dealer:
        assert isinstance(say(dealer, Hello(session="s", peer=Peer()))[0], Welcome)
    for connection in opened:
        connection.close()
    assert server.exchange.statistics().protocol_errors == 0, "nothing of it came as a frame"


async def test_several_places(short_folder: Path) -> None:
    """A broker listens at several; a client tries those of its key in turn."""
    server = Server(short_folder, ("tcp://127.0.0.1:0", "tcp://127.0.0.1:*"))
    try:
        assert len(set(server.places)) == 2
        assert not any(place.endswith((":0", ":*")) for place in server.places)
        key = server.key("both")
        for place in server.places:
            await (await connect_to(msgspec.structs.replace(key, endpoints=[place]))).close()
    finally:
        server.close()


async def test_a_frame_over_the_limit_ends_its_connection_only(server: Server) -> None:
    """libzmq refuses it before it is read."""
    with raw_peer(server.key("large")) as dealer:
        assert isinstance(say(dealer, Hello(session="large", peer=Peer()))[0], Welcome)
        frames = server.exchange.statistics().frames
        dealer.send(bytes(MAX_FRAME_BYTES + 1))
        await until(lambda: not any(one.connected for one in server.exchange.statistics().sessions.values()))
        assert server.exchange.statistics().frames == frames


# --- a network that is cut ---


class Cable:
    """A network of its own for a client, whose cable can be pulled."""

    def __init__(self) -> None:
        number = os.getpid() % 16_000
        self.name = f"pr{number}"
        self._ours, self._theirs = f"pr{number}a", f"pr{number}b"
        net = f"198.18.{number // 64 % 256}.{number % 64 * 4}"
        base, _, last = net.rpartition(".")
        self.address = f"{base}.{int(last) + 1}"
        ip("netns", "add", self.name)
        ip("link", "add", self._ours, "type", "veth", "peer", "name", self._theirs, "netns", self.name)
        ip("addr", "add", f"{self.address}/30", "dev", self._ours)
        ip("link", "set", self._ours, "up")
        ip("-n", self.name, "addr", "add", f"{base}.{int(last) + 2}/30", "dev", self._theirs)
        ip("-n", self.name, "link", "set", self._theirs, "up")

    def pull(self) -> None:
        ip("-n", self.name, "link", "set", self._theirs, "down")

    def plug_in(self) -> None:
        ip("-n", self.name, "link", "set", self._theirs, "up")

    def close(self) -> None:
        ip("link", "del", self._ours)
        ip("netns", "del", self.name)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("ip") is None, reason="only root can make a network")
@pytest.mark.timeout(60)
async def test_a_network_that_is_cut(short_folder: Path) -> None:
    """A client behind a cable that is pulled for longer than a silence: what is asked of it meanwhile ends within its
    time; when it is back it goes on as the same session with the tasks in its hands, and each of them runs once."""
    async with AsyncExitStack() as stack:
        cable = Cable()
        stack.callback(cable.close)
        server = Server(short_folder, ("tcp://127.0.0.1:0", f"tcp://{cable.address}:0"))
        stack.callback(server.close)
        key = server.keys.add("far", Role.WORKER, server.places[1:], short_folder / "far.key")
        sender = await stack.enter_async_context(await connect_to(server.local))
        program = await create_subprocess_exec(
            *("ip", "netns", "exec", cable.name, sys.executable, str(HERE / "network_program.py")),
            *(str(short_folder / "far.key"), "work"),
            stdout=PIPE,
            env=environment(),
        )
        assert program.stdout is not None
        said = program.stdout
        try:
            assert await said.readline() == b"ready\n"
            first = await sender.task_send(b"first", queue="work", want_result=True)
            assert await said.readline() == b"held first\n"
            [session] = [one for one, who in server.exchange.principals().items() if who.key == key.name]

            cable.pull()
            second = await sender.task_send(b"second", queue="work", want_result=True)
            with pytest.raises(IndeterminateError):
                await sender.rpc_send("work", b"are you there?", timeout_s=0.5)
            patient = asyncio.create_task(sender.rpc_send("work", b"hello", timeout_s=50))
            assert await said.readline() == b"away\n"
            assert not patient.done()

            cable.plug_in()
            lines: list[bytes] = []
            while not {b"back\n", b"held second\n"} <= set(lines):
                lines.append(await said.readline())
            assert await patient == b"hello"
            assert await sender.rpc_send("work", b"finish") == b"finish"
            assert [await first.result(), await second.result()] == [b"done", b"done"]
            assert session in server.exchange.principals(), "it is the same session"
            program.kill()
            lines += (await said.read()).splitlines(keepends=True)
            assert [line for line in lines if line.startswith(b"held")] == [b"held second\n"], "nothing ran twice"
        finally:
            with contextlib.suppress(ProcessLookupError):
                program.kill()
            await program.communicate()
