"""Frames over ZeroMQ: a ROUTER in the broker, a DEALER in each peer, one Unix socket in a private folder.

What experience with ZeroMQ taught, as rules
- One frame a message. (`IMMEDIATE` with several parts can abort the client inside libzmq.)
- A send never waits: one peer that does not read must not stop the others. Each has a bounded queue of ours behind
  libzmq's; when that is full too, its connection is dropped and all is said again when it comes back.
- `send` proves nothing: what matters is confirmed end to end.
- A routing id is random for each connection and gives no right: `HANDOVER` is off, the session in `Hello` counts.
- A lost connection does not end a session. Only its lease, or the kernel's word that its process died, does.
- The socket's folder is ours and closed to others (0700); that is who may connect.

A second `bind` on the path of a socket silently takes it over. So whoever runs a server holds the lock of its profile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from prunus.errors import ProfileError
from prunus.messaging.exchange import Exchange, NewTask
from prunus.messaging.liveness import Obituaries
from prunus.messaging.messages import FORWARD_BYTES, MAX_FRAME_BYTES, Peer
from prunus.messaging.threaded import ThreadedCommunicator

CONNECT_TIMEOUT_S = 5.0
"""How long `connect_zmq` waits for a broker."""
MAX_BATCH = 256
"""Frames in one commit."""
MAX_PATH_BYTES = 107
"""The path of a Unix socket, with its closing zero byte, has at most this plus one (unix(7))."""
QUEUE_FRAMES = 300
"""Frames that libzmq queues for one peer: more than a batch, few enough that a stuck peer costs little memory."""
MAX_BACKLOG_FRAMES = 10_000
"""Frames of ours that wait for one peer behind these."""
MAX_BACKLOG_BYTES = 64 * 1024 * 1024
"""Their bytes."""
RETRY_S = 0.005
"""How soon a peer whose queue was full is tried again."""
RECONNECT_MS = 20
"""A client that lost its broker tries again after this ..."""
MAX_RECONNECT_MS = 100
"""... and at least this often."""
IO_THREADS = 1

logger = logging.getLogger(__name__)


def ipc_path(endpoint: str) -> Path:
    """The path of the socket in an endpoint ``ipc:///folder/name``. Raises `ProfileError` if it can't be one."""
    scheme, _, name = endpoint.partition("://")
    if scheme != "ipc" or not name.startswith("/"):
        raise ProfileError(f"{endpoint!r} is no endpoint of a broker; it must be ipc:// and an absolute path")
    size = len(os.fsencode(name))
    if size > MAX_PATH_BYTES - 1:
        raise ProfileError(
            f"the path of the socket {name} has {size} bytes, {MAX_PATH_BYTES - 1} are possible; "
            "use a profile in a folder with a shorter path"
        )
    return Path(name)


def private_folder(folder: Path) -> None:
    """Make sure that `folder` exists, is ours, and is closed to everybody else. Raises `ProfileError`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise ProfileError(f"the folder {folder} belongs to another user; use a profile of your own")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ProfileError(f"the folder {folder} is open to other users; close it with: chmod 700 {folder}")


class ZmqServer:
    """An exchange behind a ROUTER socket, in the thread that calls `run`. A context manager."""

    def __init__(self, exchange: Exchange[bytes], endpoint: str) -> None:
        """Bind. Raises `ProfileError` if the path or its folder can't be used."""
        path = ipc_path(endpoint)
        private_folder(path.parent)
        self.endpoint = endpoint
        self._exchange = exchange
        self._obituaries = Obituaries()
        exchange.on_session = self._on_session
        for session, peer in exchange.sessions().items():
            self._obituaries.watch(session, peer)
        self._backlogs: dict[bytes, _Backlog] = {}
        self._stop = False
        self._path: Path | None = None
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._context = zmq.Context(io_threads=IO_THREADS)
        self._router = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.SNDHWM, QUEUE_FRAMES),
            (zmq.RCVHWM, QUEUE_FRAMES),
        ):
            self._router.setsockopt(option, value)
        try:
            self._router.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ProfileError(f"the socket {path} can't be opened: {error.strerror}") from error
        self._path = path

    def __enter__(self) -> ZmqServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, tasks: Sequence[NewTask]) -> None:
        """Store tasks of the broker's own making, and deliver them. In the thread of `run` only."""
        self._send(self._exchange.put(time.monotonic(), tasks))

    def stop(self) -> None:
        """Have `run` return. Thread-safe, and safe in a signal handler."""
        self._stop = True
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    def run(self, each_turn: Callable[[float], None] = lambda now: None) -> None:
        """Serve until `stop`. Raises `BrokerStoppedError`: then this process must end and start again.

        `each_turn` is called at least once a second, between two batches, with the monotonic time.
        """
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        if (deaths := self._obituaries.fileno()) is not None:
            poller.register(deaths, zmq.POLLIN)
        while not self._stop:
            wait_s = RETRY_S if self._backlogs else max(0.0, self._exchange.due() - time.monotonic())
            poller.poll(_milliseconds(wait_s))
            drained = self._serve_batch()
            now = time.monotonic()
            if drained:  # what the dead and the silent said last was heard first
                if dead := self._obituaries.dead():
                    self._send(self._exchange.expire(now, dead))
                if now >= self._exchange.due():
                    self._send(self._exchange.tick(now))
            for route in list(self._backlogs):
                self._work_off(route)
            each_turn(now)

    def close(self) -> None:
        """Close the socket (its file goes too). Idempotent."""
        self._exchange.on_session = lambda session, peer: None
        if not self._router.closed:
            self._router.close()
            self._context.term()
            if self._path is not None:
                self._path.unlink(missing_ok=True)  # libzmq leaves it there
            self._obituaries.close()
            self._wake_read.close()
            self._wake_write.close()

    # --- inside ---

    def _on_session(self, session: str, peer: Peer | None) -> None:
        if peer is None:
            self._obituaries.forget(session)
        else:
            self._obituaries.watch(session, peer)

    def _serve_batch(self) -> bool:
        """Deal with what came, in one commit; whether that was all."""
        frames: list[tuple[bytes, bytes]] = []
        drained = False
        while len(frames) < MAX_BATCH:
            try:
                parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                drained = True
                break
            # More than one part is no message of ours: an empty frame is none either, and is answered as that.
            frames.append((parts[0], parts[1] if len(parts) == 2 else b""))
        if frames:
            self._send(self._exchange.process(time.monotonic(), frames))
        return drained

    def _send(self, sends: list[tuple[bytes, bytes]]) -> None:
        for route, frame in sends:
            backlog = self._backlogs.get(route)
            if backlog is None:
                if self._try(route, frame):
                    continue
                backlog = self._backlogs[route] = _Backlog()
            backlog.frames.append(frame)
            backlog.size += len(frame)
            if len(backlog.frames) > MAX_BACKLOG_FRAMES or backlog.size > MAX_BACKLOG_BYTES:
                logger.warning("a peer does not read; its connection is dropped, and all is said again when it is back")
                self._drop(route)
        if sends:
            self._exchange.failpoint("after_send")

    def _try(self, route: bytes, frame: bytes) -> bool:
        """Hand a frame to libzmq; False if there is no room for it."""
        try:
            self._router.send_multipart((route, frame), zmq.NOBLOCK, copy=True)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._drop(route)
        return True

    def _work_off(self, route: bytes) -> None:
        backlog = self._backlogs.get(route)
        while backlog is not None and backlog.frames:
            if not self._try(route, backlog.frames[0]):
                return
            backlog.size -= len(backlog.frames.popleft()) if backlog.frames else 0
        self._backlogs.pop(route, None)

    def _drop(self, route: bytes) -> None:
        self._backlogs.pop(route, None)
        self._exchange.drop_route(route)


class _Backlog:
    """Frames for a peer whose queue is full."""

    __slots__ = ("frames", "size")

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.size = 0


class ZmqTransport:
    """A DEALER, made anew whenever its connection breaks, so that every connection starts with `Hello`."""

    def __init__(self, endpoint: str) -> None:
        ipc_path(endpoint)
        self._endpoint = endpoint
        self._context = zmq.Context(io_threads=IO_THREADS)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._dealer: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()
        self._waiting: deque[bytes] = deque()

    def open(self) -> None:
        self._close_sockets()
        dealer = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES + FORWARD_BYTES),
            (zmq.SNDHWM, QUEUE_FRAMES),
            (zmq.RCVHWM, QUEUE_FRAMES),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS),
        ):
            dealer.setsockopt(option, value)
        dealer.setsockopt(zmq.ROUTING_ID, b"p" + secrets.token_bytes(16))
        self._monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        dealer.connect(self._endpoint)
        self._dealer = dealer
        self._poller = zmq.Poller()
        self._poller.register(self._wake_read, zmq.POLLIN)
        self._poller.register(dealer, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def send(self, frame: bytes) -> None:
        self._waiting.append(frame)
        self._flush()

    def wait(self, timeout_s: float) -> tuple[list[bytes], str | None]:
        dealer, monitor = self._dealer, self._monitor
        assert dealer is not None, "open comes first"
        assert monitor is not None
        self._flush()
        self._poller.modify(dealer, zmq.POLLIN | zmq.POLLOUT if self._waiting else zmq.POLLIN)
        ready = dict(self._poller.poll(_milliseconds(timeout_s)))
        with contextlib.suppress(BlockingIOError):
            if self._wake_read.fileno() in ready:
                self._wake_read.recv(4096)
        frames: list[bytes] = []
        with contextlib.suppress(zmq.Again):
            while len(frames) < MAX_BATCH:
                parts = dealer.recv_multipart(zmq.NOBLOCK)
                frames.append(parts[0] if len(parts) == 1 else b"")
        broken = None
        if monitor in ready:
            recv_monitor_message(monitor)
            broken = "the connection broke"
        return frames, broken

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake; closed: it is gone
            self._wake_write.send(b"\0")

    def close(self) -> None:
        self._close_sockets()
        self._context.term()
        self._wake_read.close()
        self._wake_write.close()

    def _flush(self) -> None:
        assert self._dealer is not None, "open comes first"
        while self._waiting:
            try:
                self._dealer.send(self._waiting[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self._waiting.popleft()

    def _close_sockets(self) -> None:
        self._waiting.clear()
        if self._dealer is not None:
            self._dealer.disable_monitor()
            self._dealer.close()
        if self._monitor is not None:
            self._monitor.close(linger=0)
        self._dealer = self._monitor = None


async def connect_zmq(
    endpoint: str, *, name: str = "peer", timeout_s: float = CONNECT_TIMEOUT_S
) -> ThreadedCommunicator:
    """A communicator at the broker that serves `endpoint`; leave it with `close` or ``async with``.

    Raises `ConnectionLostError` if no broker answers within `timeout_s`, `ProfileError` for an impossible endpoint.
    """
    communicator = ThreadedCommunicator(ZmqTransport(endpoint), endpoint, name)
    try:
        await communicator.connected(timeout_s)
    except BaseException:  # also cancelled: the thread must not stay
        await asyncio.shield(communicator.close())
        raise
    return communicator


def _milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1000)
