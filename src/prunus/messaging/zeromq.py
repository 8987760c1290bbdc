"""Frames over TCP with CURVE: a ROUTER in the broker, a DEALER in each peer.

What experience with ZeroMQ taught, as rules
- One frame a message. (`IMMEDIATE` with several parts can abort the client inside libzmq.)
- libzmq counts the frames that it queues for a peer; how many bytes of these it has not read is asked of the kernel.
- A routing id is random for each connection and gives no right: `HANDOVER` is off, the session in `Hello` counts.
- HWM and `MAXMSGSIZE` do not bound what a peer makes libzmq keep: it may begin a message of many frames and never end
  it. What came over a connection since its last whole message is therefore asked of the kernel as well.

Who may connect: who holds a key that the broker knows (CurveZMQ), and only after the broker found it in its keys
(ZAP). There is no TCP without keys. Each frame carries the key with which it came, as libzmq proved it: a peer is what
its key says (`access`), whatever it calls itself. A key that is revoked is worth nothing from that moment: connections
that came with it are closed and their sessions end.

Who is refused in the handshake is told why by its status: 400, the key is unknown; 500, there is no room for one more
(or the list of keys can't be read). The transport hands that on as the `Unwelcome` that the broker would have said.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import secrets
import selectors
import socket
import struct
import termios
from collections import deque
from collections.abc import Sequence

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message, recv_monitor_message

from prunus.errors import Failure, KeyRefusedError, ProfileError
from prunus.messaging.access import Principal
from prunus.messaging.doors import MAX_BATCH, MAX_BATCH_BYTES, Connection, Door, too_many_connections, woken
from prunus.messaging.keys import ClientKey, Keyring
from prunus.messaging.liveness import boottime
from prunus.messaging.messages import FORWARD_BYTES, MAX_FRAME_BYTES, Unwelcome, encode

QUEUE_FRAMES = 300
"""Frames that libzmq queues for one peer: more than a batch, few enough that a stuck peer costs little memory."""
UNREAD_BYTES = 2 * 1024 * 1024
"""About so many bytes are handed to libzmq for one peer before the kernel says that it read them."""
RETRY_S = 0.005
"""How soon a peer whose queue was full is tried again ..."""
MAX_RETRY_S = 0.1
"""... and at least this often, if it does not read."""
MAX_UNFINISHED_BYTES = 4 * MAX_FRAME_BYTES
"""What may come over a connection without one whole message among it."""
FLOOD_CHECK_S = 0.5
"""How often that is looked at."""
TOLD_CONNECTIONS = 50
"""So many beyond those that there may be get as far as the end of their handshakes, where they are told why they are
refused; more are hung up on before."""
RECONNECT_MS, MAX_RECONNECT_MS = 20, 3000
"""A client that lost its broker tries again after this, and at least this often."""
HANDSHAKE_MS = 5000
"""Who has not proved its key by then is hung up on."""
PING_MS = 3000
"""A connection is tried so often ..."""
PONG_MS = 15_000
"""... and is closed if nothing comes back for so long."""
KEEPALIVE_S = 30
"""After so much silence the kernel tries a connection too."""
IO_THREADS = 1
NEEDED_LIBZMQ = (4, 3, 5)
"""Older ones have known holes before authentication (CVE-2019-13132, CVE-2020-15166) or lack what is used here."""

_ZAP_ENDPOINT, _ZAP_DOMAIN, _ZAP_VERSION = "inproc://zeromq.zap.01", b"prunus", b"1.0"
_UNKNOWN_KEY, _NO_ROOM = 400, 500
_NEWS_ENDPOINT = "inproc://news"
_TCPI_BYTES_RECEIVED = 128
"""The offset of ``tcpi_bytes_received`` in ``struct tcp_info`` (linux/tcp.h, since Linux 4.1)."""
_CAME, _PROVED, _LEFT = zmq.EVENT_ACCEPTED, zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

logger = logging.getLogger(__name__)
# Plain numbers: with the enumerations of pyzmq, putting the flags together costs more than sending.
_AT_ONCE, _AT_ONCE_FIRST, _HAS_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.RCVMORE)


def check_curve() -> None:
    """Raises `ProfileError` if this libzmq can't keep a network connection safe."""
    if not zmq.has("curve"):
        raise ProfileError("this libzmq was built without CURVE; install pyzmq from a wheel (pip install pyzmq)")
    if zmq.zmq_version_info() < NEEDED_LIBZMQ:
        needed = ".".join(map(str, NEEDED_LIBZMQ))
        raise ProfileError(
            f"libzmq {zmq.zmq_version()} is too old for a network, {needed} is needed; "
            "upgrade it with: pip install --upgrade pyzmq"
        )


class NetworkConnection(Connection):
    """A peer that came with a key."""

    door: NetworkDoor
    __slots__ = (
        "_backlog",
        "_backlog_bytes",
        "_pause_s",
        "_unread",
        "descriptor",
        "heard",
        "public_key",
        "routing_id",
    )

    def __init__(
        self, door: NetworkDoor, routing_id: bytes, descriptor: int, public_key: str, principal: Principal
    ) -> None:
        super().__init__(door, principal)
        self.routing_id, self.descriptor, self.public_key = routing_id, descriptor, public_key
        self.heard = True
        """Whether a whole message came since this was last looked at."""
        self._unread = 0
        """Bytes handed to libzmq since the kernel said that all was read."""
        self._backlog: deque[bytes] = deque()
        """What waits behind libzmq's queue."""
        self._backlog_bytes = 0
        self._pause_s = RETRY_S

    @property
    def waiting_frames(self) -> int:
        return len(self._backlog)

    @property
    def waiting_bytes(self) -> int:
        return self._backlog_bytes

    def add(self, frame: bytes) -> None:
        self._backlog.append(frame)
        self._backlog_bytes += len(frame)

    def clear(self) -> None:
        self._backlog.clear()
        self._backlog_bytes = 0

    def flush(self, now: float) -> None:
        backlog, worked = self._backlog, False
        while backlog:
            if not self._try(backlog[0]):
                self._pause_s = RETRY_S if worked else min(2 * self._pause_s, MAX_RETRY_S)
                self.retry_at = now + self._pause_s
                return
            worked = True
            self._backlog_bytes -= len(backlog.popleft())
        self._pause_s, self.retry_at = RETRY_S, math.inf

    def _try(self, frame: bytes) -> bool:
        """Hand a frame to libzmq; False if there is no room for it."""
        if self._unread > UNREAD_BYTES:
            if _unread(self.descriptor):
                return False
            self._unread = 0
        try:
            router = self.door.router
            router.send(self.routing_id, _AT_ONCE_FIRST)
            router.send(frame, _AT_ONCE)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # it has left: it is named among those soon
                raise
        self._unread += len(frame)
        return True


class NetworkDoor(Door):
    """A ROUTER for those who hold a key: who is there, and who has left."""

    def __init__(self, places: Sequence[str], keys: Keyring, max_connections: int) -> None:
        """Raises `ProfileError` if it can't listen at one of the `places`."""
        super().__init__()
        check_curve()
        self._keys = keys
        self._max_connections = max_connections
        self._connections: dict[bytes, NetworkConnection] = {}
        """By routing id: those that said something."""
        self._open: dict[int, NetworkConnection | None] = {}
        """By descriptor: all of them."""
        self._leaving: list[NetworkConnection] = []
        """They have left; what they said last may still be in the socket ..."""
        self._left: list[Connection] = []
        """... and of these it was heard."""
        self._unfinished: dict[int, int] = {}
        """Of connections that needed looking at: the bytes that had come when a whole message last came."""
        self._next_flood_check = 0.0
        self._context = zmq.Context(io_threads=IO_THREADS)
        self.zap = self._context.socket(zmq.ROUTER)  # bound first: without it libzmq would let everybody in
        self.zap.setsockopt(zmq.LINGER, 0)
        self.zap.bind(_ZAP_ENDPOINT)
        self.router: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.SNDHWM, QUEUE_FRAMES),
            (zmq.RCVHWM, QUEUE_FRAMES),
            (zmq.IPV6, int(any("[" in place for place in places))),
            (zmq.ZAP_ENFORCE_DOMAIN, 1),
            (zmq.CURVE_SERVER, 1),
        ):
            self.router.setsockopt(option, value)
        self.router.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        self.router.setsockopt(zmq.CURVE_PUBLICKEY, keys.server.public_key.encode())
        self.router.setsockopt(zmq.CURVE_SECRETKEY, keys.server.secret_key.encode())
        _prepare_network(self.router)
        self.router.monitor(_NEWS_ENDPOINT, _CAME | _LEFT | _FAILED)
        self._news: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._news.rcvhwm = 0  # the io thread must never wait for us
        self._news.connect(_NEWS_ENDPOINT)
        self._endpoints: list[str] = []
        for place in places:
            try:
                self.router.bind(place)
            except zmq.ZMQError as error:
                self.close()
                raise ProfileError(f"the broker can't listen at {place}: {error.strerror}") from error
            self._endpoints.append(self.router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))

    @property
    def endpoints(self) -> list[str]:
        return self._endpoints

    def watch(self, selector: selectors.BaseSelector) -> None:
        for one in (self.router, self._news, self.zap):
            selector.register(int(one.getsockopt(zmq.FD)), selectors.EVENT_READ, woken)

    def has_news(self) -> bool:
        # The descriptors of libzmq tell of a change only: what is there already has to be asked for.
        return any(int(one.getsockopt(zmq.EVENTS)) & zmq.POLLIN for one in (self.zap, self._news, self.router))

    def due(self) -> float:
        if self._leaving:
            return boottime() + RETRY_S
        return self._next_flood_check if self._open else math.inf

    def look(self, now: float) -> None:
        """Hang up on those that send and send, and never end a message."""
        if now < self._next_flood_check:
            return
        self._next_flood_check = now + FLOOD_CHECK_S
        for descriptor, connection in list(self._open.items()):
            if (came := _received(descriptor)) is None:
                continue
            if connection is not None and connection.heard:
                connection.heard = False
                self._unfinished[descriptor] = came
            elif came - self._unfinished.setdefault(descriptor, 0) > MAX_UNFINISHED_BYTES:
                who = "a peer" if connection is None else str(connection.principal)
                self.refuse("%s sent %d MB without a whole message; its connection is closed", who, came >> 20)
                _hang_up(descriptor)

    def receive(self, frames: list[tuple[Connection, bytes]]) -> bool:
        leaving, self._leaving = self._leaving, []
        self._hear_who_left()
        self.answer_zap()
        if self._receive(frames):
            self._left += leaving  # what they said before they left was heard
            return True
        self._leaving += leaving
        return False

    def departed(self) -> list[Connection]:
        left, self._left = self._left, []
        return left

    def revoked(self) -> list[Connection]:
        return [one for one in self._connections.values() if self._keys.principal(one.public_key) != one.principal]

    def forget(self, connection: Connection) -> None:
        assert isinstance(connection, NetworkConnection)
        if self._connections.get(connection.routing_id) is connection:
            del self._connections[connection.routing_id]
        connection.clear()

    def hang_up(self, connection: Connection) -> None:
        assert isinstance(connection, NetworkConnection)
        if self._open.get(connection.descriptor) is connection:
            _hang_up(connection.descriptor)

    def close(self) -> None:
        if not self._context.closed:
            self.router.disable_monitor()
            for one in (self.router, self._news, self.zap):
                one.close(linger=0)
            self._context.term()

    # --- inside: what comes ---

    def _receive(self, frames: list[tuple[Connection, bytes]]) -> bool:
        """Take what is there, up to a batch; whether that was all."""
        router, size = self.router, 0
        for _ in range(MAX_BATCH):
            try:
                routing_id = router.recv(_AT_ONCE)
            except zmq.Again:
                return True
            part = router.recv(copy=False)
            frame = part.bytes
            connection = self._who(routing_id, part)
            while router.getsockopt(_HAS_MORE):  # more than one part is no message of ours: ...
                router.recv()
                frame = b""  # ... an empty frame is none either, and is answered as that
            if connection is not None:
                connection.heard = True
                frames.append((connection, frame))
                size += len(frame)
                if size > MAX_BATCH_BYTES:
                    return False
        return False

    def _who(self, routing_id: bytes, part: zmq.Frame) -> NetworkConnection | None:
        """The connection on which a frame came; None if nobody may speak there."""
        known = self._connections.get(routing_id)
        try:
            public_key = str(part.get("User-Id"))
        except zmq.ZMQError:
            return None
        if known is not None and known.public_key == public_key:
            return known
        principal = self._keys.principal(public_key)
        if principal is None:  # revoked a moment ago
            return None
        if known is not None:  # another peer under the same routing id: the first one is gone
            self._left.append(known)
        self._hear_who_left()  # whatever was known about this descriptor is from before
        try:
            descriptor = int(part.get(zmq.SRCFD))
        except zmq.ZMQError:
            descriptor = -1
        connection = NetworkConnection(self, routing_id, descriptor, public_key, principal)
        self._connections[routing_id] = connection
        if descriptor in self._open:
            before, self._open[descriptor] = self._open[descriptor], connection
        else:
            before = connection  # it said something and left
        if before is not None:
            self._leaving.append(before)
        return connection

    def _hear_who_left(self) -> None:
        """What libzmq says about connections."""
        while int(self._news.get(zmq.EVENTS)) & zmq.POLLIN:
            news = parse_monitor_message(self._news.recv_multipart())
            event, descriptor = news["event"], int(news["value"])
            if event == _CAME:
                self._open[descriptor] = None
                if len(self._open) > self._max_connections + TOLD_CONNECTIONS:
                    self.refuse("far more than %d connections: one is hung up on", self._max_connections)
                    _hang_up(descriptor)
            elif event == _LEFT:
                self._unfinished.pop(descriptor, None)
                connection = self._open.pop(descriptor, None)
                if connection is not None:
                    self._leaving.append(connection)
            elif event != zmq.EVENT_HANDSHAKE_FAILED_AUTH:  # `answer_zap` refused that one: counted there
                self.on_refused()

    def answer_zap(self) -> None:
        """Say who may come (ZAP, RFC 27): whose key is known now, as long as there is room."""
        while True:
            try:
                sender, empty, version, request, *asked = self.zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            public_key = ""
            if version == _ZAP_VERSION and len(asked) == 5 and asked[0] == _ZAP_DOMAIN and asked[3] == b"CURVE":
                public_key = z85.encode(asked[4]).decode()
            if self._keys.problem is not None:
                self.refuse("the keys can't be read: a peer is refused")
                answer = [b"%d" % _NO_ROOM, b"no keys", b""]
            elif self._keys.principal(public_key) is None:
                address = asked[1].decode("ascii", "replace") if len(asked) > 1 else "?"
                self.refuse("a peer at %s came with the key %s, which nobody added: it is refused", address, public_key)
                answer = [b"%d" % _UNKNOWN_KEY, b"unknown key", b""]
            elif len(self._open) > self._max_connections:
                self.refuse("more than %d connections: one is refused", self._max_connections)
                answer = [b"%d" % _NO_ROOM, b"no room", b""]
            else:
                answer = [b"200", b"OK", public_key.encode()]
            self.zap.send_multipart([sender, empty, _ZAP_VERSION, request, *answer, b""], zmq.NOBLOCK)


def _hang_up(descriptor: int) -> None:
    """End a connection of libzmq's, which then finds it broken and frees what belongs to it."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def _unread(descriptor: int) -> int:
    """Bytes in the kernel that the other side has not taken yet; 0 where this can't be known."""
    with contextlib.suppress(OSError):
        [size] = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0\0\0\0"))
        return int(size)
    return 0


def _received(descriptor: int) -> int | None:
    """Bytes that came over a TCP connection so far; None where this can't be known."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    with contextlib.suppress(OSError, struct.error):
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
        try:
            facts = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_BYTES_RECEIVED + 8)
        finally:
            connection.detach()
        return int(struct.unpack_from("Q", facts, _TCPI_BYTES_RECEIVED)[0])
    return None


def _prepare_network(router: zmq.Socket[bytes]) -> None:
    """So that a connection which leads nowhere any more is found out, on both sides."""
    for option, value in (
        (zmq.TCP_KEEPALIVE, 1),
        (zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S),
        (zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_S // 3),
        (zmq.TCP_KEEPALIVE_CNT, 3),
        (zmq.HEARTBEAT_IVL, PING_MS),
        (zmq.HEARTBEAT_TIMEOUT, PONG_MS),
        (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
    ):
        router.setsockopt(option, value)


class NetworkTransport:
    """A DEALER, made anew whenever its connection breaks, so that every connection starts with `Hello`."""

    def __init__(self, key: ClientKey) -> None:
        """To the broker that `key` is for, at its endpoints in turn."""
        check_curve()
        self._endpoints = deque(key.endpoints)
        self._key = key
        self._endpoint = ""
        """That of the connection."""
        self.refusal: str | None = None
        """Why the last connection came to nothing, if somebody was there who did not understand it."""
        self._proved = self._was_proved = False
        self._context = zmq.Context(io_threads=IO_THREADS)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._dealer: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()
        self._is_told = False
        """libzmq has said something of the connection."""
        self._waiting: deque[bytes] = deque()

    @property
    def descriptor(self) -> None:
        """libzmq's sockets stay on one thread."""

    def open(self) -> None:
        self._close_sockets()
        self._is_told = False
        dealer = self._context.socket(zmq.DEALER)
        self._endpoint = endpoint = self._endpoints[0]
        self._endpoints.rotate(-1)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES + FORWARD_BYTES),
            (zmq.SNDHWM, QUEUE_FRAMES),
            (zmq.RCVHWM, QUEUE_FRAMES),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS),
            (zmq.IPV6, int("[" in endpoint)),
        ):
            dealer.setsockopt(option, value)
        dealer.setsockopt(zmq.ROUTING_ID, b"p" + secrets.token_bytes(16))
        dealer.setsockopt(zmq.CURVE_SERVERKEY, self._key.server_key.encode())
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, self._key.public_key.encode())
        dealer.setsockopt(zmq.CURVE_SECRETKEY, self._key.secret_key.encode())
        _prepare_network(dealer)
        self._proved = False
        self._monitor = dealer.get_monitor_socket(_LEFT | _PROVED | _FAILED)
        dealer.connect(endpoint)
        self._dealer = dealer
        self._poller = zmq.Poller()
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def receive(self) -> tuple[list[bytes], str | None]:
        dealer, monitor = self._dealer, self._monitor
        assert dealer is not None, "open comes first"
        assert monitor is not None
        frames: list[bytes] = []
        with contextlib.suppress(zmq.Again):
            while len(frames) < MAX_BATCH:
                frame = dealer.recv(_AT_ONCE)
                while dealer.getsockopt(_HAS_MORE):
                    dealer.recv()
                    frame = b""
                frames.append(frame)
        return frames, self._hear(monitor, frames) if self._is_told else None

    def send(self, frame: bytes) -> None:
        self._waiting.append(frame)

    def flush(self) -> None:
        assert self._dealer is not None, "open comes first"
        while self._waiting:
            try:
                self._dealer.send(self._waiting[0], _AT_ONCE)
            except zmq.Again:
                break
            self._waiting.popleft()
        self._poller.modify(self._dealer, zmq.POLLIN | zmq.POLLOUT if self._waiting else zmq.POLLIN)

    def wait(self, timeout_s: float, *, for_frames: bool = True) -> bool:
        ready = dict(self._poller.poll(_milliseconds(timeout_s)))
        self._is_told = self._monitor in ready
        if self._wake_read.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake_read.recv(4096)
        return bool(ready)

    def has_news(self) -> bool:
        return False

    def _hear(self, monitor: zmq.Socket[bytes], frames: list[bytes]) -> str | None:
        """What libzmq says about the connection; why it broke, if it did. A refusal is added to the `frames`.

        One that never came about is no broken one: libzmq tries again, more and more slowly.
        """
        broken = None
        while monitor.poll(0):
            news = recv_monitor_message(monitor)
            event = news["event"]
            if event == _PROVED:
                self._proved, self._was_proved, self.refusal = True, True, None
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                frames.append(encode(self._unwelcome(int(news["value"]))))
            elif event != _LEFT:
                self._misunderstood()
            elif self._proved:
                broken = "the connection broke"
        return broken

    def _unwelcome(self, status: int) -> Unwelcome:
        if status == _NO_ROOM:
            return too_many_connections()
        error = KeyRefusedError(self._endpoint, "does not know this key, or it was revoked")
        return Unwelcome(failure=Failure.of(error))

    def _misunderstood(self) -> None:
        if self.refusal is None:
            self.refusal = "does not speak as this key expects: it has other keys, or is no broker"
            if self._was_proved:  # nobody waits for a first connection that could tell
                logger.warning("the broker at %s %s; it is tried again", self._endpoint, self.refusal)

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake; closed: it is gone
            self._wake_write.send(b"\0")

    def close(self) -> None:
        self._close_sockets()
        self._context.term()
        self._wake_read.close()
        self._wake_write.close()

    def close_descriptor(self) -> None:
        """There is none."""

    def _close_sockets(self) -> None:
        self._waiting.clear()
        if self._dealer is not None:
            self._dealer.disable_monitor()
            self._dealer.close()
        if self._monitor is not None:
            self._monitor.close(linger=0)
        self._dealer = self._monitor = None


def _milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000)
