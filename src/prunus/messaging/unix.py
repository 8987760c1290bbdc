"""Frames over a Unix socket: how peers on its own host talk to a broker.

On the wire a frame is its length (4 bytes, the most significant one first) and its bytes; there is no greeting, the
first frame is a `Hello`. (A peer for which there is no room hears why before that, and is hung up on.) Nothing that is
announced has to be believed: of a frame that is said to be longer than it may be nothing is kept, and of others only
what has come.

Why no library moves these bytes: between two programs on one host a frame needs two system calls and one wake-up on its
way. libzmq, which is made for networks, has a thread of its own on each side of each connection (docs/adr/0013); over
TCP it is used (`zeromq`).

Who may connect: the folder of the socket is ours and closed to others (0700), and the kernel says whose process it is.
Whoever runs a server holds the lock of its profile, so a socket that is there already was left by one that was killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import selectors
import socket
import stat
import struct
import time
from collections import deque
from pathlib import Path

from prunus.errors import ProfileError, ProtocolError
from prunus.messaging.access import OWNER
from prunus.messaging.doors import MAX_BATCH, MAX_BATCH_BYTES, Connection, Door, too_many_connections
from prunus.messaging.liveness import boottime
from prunus.messaging.messages import FORWARD_BYTES, MAX_FRAME_BYTES, encode

MAX_PATH_BYTES = 107
"""The path of a Unix socket, with its closing zero byte, has at most this plus one (unix(7))."""
READ_BYTES = 64 * 1024
"""So much is read at a time."""
WRITE_BYTES = 256 * 1024
"""About so much is written at a time."""
MAX_UNFINISHED_BYTES = 512 * 1024 * 1024
"""What all peers together have sent of frames that are not whole. With more, who has been silent for longest in the
midst of one is hung up on."""
WAITING_CONNECTIONS = 1024
"""Peers that connected and were not taken yet; more try again."""
NO_FILES_PAUSE_S = 0.1
"""When there is no file left for one more connection it is tried again after so long."""
RECONNECT_S = (0.02, 0.1)
"""How soon a peer that finds no broker tries again, at first and at last."""
SHORT_LIVED_S = 1.0
"""A connection that broke sooner came to nothing: ..."""
COME_AGAIN_S = (0.02, 0.5)
"""... how soon the next one is made, at first and at last."""

BROKEN = "the connection broke"

_NOTHING = memoryview(b"")
_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")

logger = logging.getLogger(__name__)


def socket_path(endpoint: str) -> Path:
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


class FrameReader:
    """Takes bytes as they come, and gives whole frames."""

    __slots__ = ("_limit", "_needed", "_partial")

    def __init__(self, limit: int) -> None:
        """No frame has more than `limit` bytes."""
        self._limit = limit
        self._partial = bytearray()
        self._needed = 0
        """With fewer bytes than this there is no whole frame."""

    @property
    def unfinished(self) -> int:
        """How many bytes there are of a frame that is not whole."""
        return len(self._partial)

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that are whole now. Raises `ProtocolError` if one is too long; nothing more can be read then."""
        partial = self._partial
        if partial:
            partial += data
            if len(partial) < self._needed:
                return []
            data = bytes(partial)
            partial.clear()
        frames, begin, size = [], 0, len(data)
        self._needed = _LENGTH.size
        while size - begin >= _LENGTH.size:
            [length] = _LENGTH.unpack_from(data, begin)
            if length > self._limit:
                raise ProtocolError(f"a frame of {length:,} bytes is announced, {self._limit:,} are possible")
            end = begin + _LENGTH.size + length
            if end > size:
                self._needed = end - begin
                break
            frames.append(data[begin + _LENGTH.size : end])
            begin = end
        if begin < size:
            partial += data[begin:] if begin else data
        return frames


class FrameWriter:
    """Keeps frames that are to be sent until the socket takes them."""

    __slots__ = ("_chunk", "_frames", "_size")

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._size = 0
        """The bytes of these frames."""
        self._chunk = _NOTHING
        """What is being written."""

    def __len__(self) -> int:
        """How many there are, about: those that are being written count as one."""
        return len(self._frames) + bool(self._chunk)

    @property
    def size(self) -> int:
        """Their bytes."""
        return self._size + len(self._chunk)

    def add(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._size += len(frame)

    def clear(self) -> None:
        self._frames.clear()
        self._size, self._chunk = 0, _NOTHING

    def write_to(self, connection: socket.socket) -> bool:
        """As much as there is room for; whether that was all. Raises `OSError` if the connection is broken."""
        while self._frames or self._chunk:
            chunk = self._chunk or self._next_chunk()
            try:
                written = connection.send(chunk)
            except (BlockingIOError, InterruptedError):
                written = 0
            self._chunk = memoryview(chunk)[written:] if written < len(chunk) else _NOTHING
            if not written:
                return False
        return True

    def _next_chunk(self) -> bytes:
        """At least one frame; there is one."""
        frames, size = self._frames, 0
        parts: list[bytes] = []
        while frames and size < WRITE_BYTES:
            frame = frames.popleft()
            parts += (_LENGTH.pack(len(frame)), frame)
            size += len(frame)
        self._size -= size
        return b"".join(parts)


# --- the broker's side ------------------------------------------------------------------------------


class UnixConnection(Connection):
    """A peer on this host."""

    door: UnixDoor
    __slots__ = ("_is_watched_for_room", "_out", "heard_at", "reader", "socket", "unfinished")

    def __init__(self, door: UnixDoor, connected: socket.socket) -> None:
        super().__init__(door, OWNER)
        self.socket, self.reader = connected, FrameReader(MAX_FRAME_BYTES)
        self.unfinished, self.heard_at = 0, 0.0
        """The bytes of a frame that is not whole, and when the last of these came."""
        self._out = FrameWriter()
        self._is_watched_for_room = False

    @property
    def waiting_frames(self) -> int:
        return len(self._out)

    @property
    def waiting_bytes(self) -> int:
        return self._out.size

    def add(self, frame: bytes) -> None:
        self._out.add(frame)

    def flush(self, now: float) -> None:
        try:
            done = self._out.write_to(self.socket)
        except OSError:  # it is broken: what came on it before can still be read
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
            self._out.clear()
            done = True
        if done == self._is_watched_for_room:
            self._is_watched_for_room = not done
            self.door.watch_for_room(self, not done)

    def on_event(self, events: int) -> None:
        """The selector says that something can be done with its socket."""
        if events & selectors.EVENT_READ:
            self.door.readable[self] = None
        if events & selectors.EVENT_WRITE:
            self.door.writable.append(self)


class UnixDoor(Door):
    """A listening socket, and the connections that came through it."""

    def __init__(self, path: Path, max_connections: int) -> None:
        """Raises `ProfileError` if there can't be a socket at `path`. Another user's processes are refused."""
        super().__init__()
        self.readable: dict[UnixConnection, None] = {}
        """Those from which something came, in turn: who was not heard in one batch is the first in the next."""
        self._path = path
        self._max_connections = max_connections
        frame = encode(too_many_connections(max_connections))
        self._no_room = _LENGTH.pack(len(frame)) + frame
        """What one more is told."""
        self._connections: set[UnixConnection] = set()
        self._left: list[Connection] = []
        self._selector: selectors.BaseSelector | None = None
        self._unfinished = 0
        """The bytes of all frames that are not whole."""
        self._accept_again_at: float | None = None
        self._is_somebody_there = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.setblocking(False)
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(path.lstat().st_mode):  # who was killed left it
                    path.unlink()
            self._listener.bind(str(path))
            path.chmod(0o600)
            self._listener.listen(WAITING_CONNECTIONS)
        except OSError as error:
            self._listener.close()
            raise ProfileError(f"the socket {path} can't be opened: {error.strerror}") from error
        self._file = path.stat()

    @property
    def endpoints(self) -> list[str]:
        return [f"ipc://{self._path}"]

    def watch(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        selector.register(self._listener, selectors.EVENT_READ, self._somebody_comes)

    def receive(self, frames: list[tuple[Connection, bytes]]) -> bool:
        drained = self._read(frames)
        if self._is_somebody_there:  # only then: there may be room because somebody left before
            self._is_somebody_there = False
            self._accept()
        return drained

    def _read(self, frames: list[tuple[Connection, bytes]]) -> bool:
        """Take what came on the connections, up to a batch; whether that was all."""
        readable, drained, size = self.readable, True, 0
        while readable:
            if len(frames) >= MAX_BATCH or size >= MAX_BATCH_BYTES:
                return False
            connection = next(iter(readable))
            del readable[connection]
            try:
                data = connection.socket.recv(READ_BYTES)
            except (BlockingIOError, InterruptedError):
                continue
            except OSError:  # broken
                data = b""
            if not data:
                self._leave(connection)
                continue
            drained = drained and len(data) < READ_BYTES
            size += len(data)
            try:
                for frame in connection.reader.feed(data):
                    frames.append((connection, frame))
            except ProtocolError as error:
                self.refuse("a peer sends what can't be read, and is hung up on: %s", error)
                self._leave(connection)
            else:
                self._note_unfinished(connection)
        return drained

    def departed(self) -> list[Connection]:
        left, self._left = self._left, []
        return left

    def has_news(self) -> bool:
        return bool(self.readable)

    def due(self) -> float:
        return super().due() if self._accept_again_at is None else self._accept_again_at

    def look(self, now: float) -> None:
        if self._accept_again_at is not None and now >= self._accept_again_at and self._selector is not None:
            self._accept_again_at = None
            self._selector.register(self._listener, selectors.EVENT_READ, self._somebody_comes)

    def forget(self, connection: Connection) -> None:
        assert isinstance(connection, UnixConnection)
        if connection in self._connections:
            self._connections.discard(connection)
            self._hear_no_more(connection)
            connection.socket.close()

    def hang_up(self, connection: Connection) -> None:
        """`forget` closes it."""

    def close(self) -> None:
        for connection in self._connections:
            connection.socket.close()
        self._connections.clear()
        with contextlib.suppress(OSError):
            there = self._path.lstat()
            if (there.st_dev, there.st_ino) == (self._file.st_dev, self._file.st_ino):  # nobody else's by now
                self._path.unlink()
        self._listener.close()  # until then its number is not given to another file

    def watch_for_room(self, connection: UnixConnection, wanted: bool) -> None:
        """Hear, or do not hear any more, when a connection takes more."""
        if self._selector is not None and connection in self._connections:
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
            with contextlib.suppress(KeyError):  # it has left
                self._selector.modify(connection.socket, events, connection.on_event)

    # --- inside ---

    def _somebody_comes(self, events: int) -> None:
        self._is_somebody_there = True

    def _accept(self) -> None:
        assert self._selector is not None, "nobody comes before it is watched"
        while True:
            try:
                connected, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no file is left for it
                logger.warning("one more connection can't be taken: %s", error)
                self._selector.unregister(self._listener)
                self._accept_again_at = boottime() + NO_FILES_PAUSE_S
                return
            if len(self._connections) - len(self._left) >= self._max_connections:
                self.refuse("more than %d connections: one is refused", self._max_connections)
                with contextlib.suppress(OSError):  # its buffer is empty: if it is still there, it gets this
                    connected.send(self._no_room, socket.MSG_DONTWAIT)
            elif not _is_ours(connected):
                self.refuse("a process of another user came: it is refused")
            else:
                connected.setblocking(False)
                connection = UnixConnection(self, connected)
                self._connections.add(connection)
                self._selector.register(connected, selectors.EVENT_READ, connection.on_event)
                continue
            connected.close()

    def _note_unfinished(self, connection: UnixConnection) -> None:
        """Count what it has begun; and what all have begun together has a bound."""
        self._unfinished += connection.reader.unfinished - connection.unfinished
        connection.unfinished = connection.reader.unfinished
        if connection.unfinished:
            connection.heard_at = boottime()
        while self._unfinished > MAX_UNFINISHED_BYTES:
            silent = min((one for one in self._connections if one.unfinished), key=lambda one: one.heard_at)
            self.refuse("%d MB of frames that do not end are here: a peer is hung up on", self._unfinished >> 20)
            self._leave(silent)

    def _leave(self, connection: UnixConnection) -> None:
        self._hear_no_more(connection)
        self._left.append(connection)

    def _hear_no_more(self, connection: UnixConnection) -> None:
        self.readable.pop(connection, None)
        self._unfinished -= connection.unfinished
        connection.unfinished = 0
        if self._selector is not None:
            with contextlib.suppress(KeyError, ValueError):  # it has left before
                self._selector.unregister(connection.socket)


def _is_ours(connected: socket.socket) -> bool:
    """Whether a process of this user, or root's, is at the other end, as far as the kernel says."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    _, user, _ = _CREDENTIALS.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return user in (os.getuid(), 0)


# --- the peer's side --------------------------------------------------------------------------------


class UnixTransport:
    """A connection to the broker whose socket is at a path, made anew whenever it breaks."""

    def __init__(self, endpoint: str) -> None:
        """Raises `ProfileError` for an impossible endpoint."""
        self._path = str(socket_path(endpoint))
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._socket: socket.socket | None = None
        """Connected, or None."""
        self._reader, self._out = FrameReader(MAX_FRAME_BYTES + FORWARD_BYTES), FrameWriter()
        self._connect_at, self._pause_s = 0.0, RECONNECT_S[0]
        """When to connect next, and how long to wait if nobody is there then."""
        self._connected_at, self._rest_s = 0.0, COME_AGAIN_S[0]
        """When it was connected, and how long to wait if the broker hangs up at once."""
        self._watched = selectors.DefaultSelector()
        """Has the connection, whichever it is: so who watches this need not know when there is another one."""
        self._events = 0
        """For which the connection is watched."""
        self._descriptor = self._watched.fileno()
        self._poll, self._poll_wake = select.poll(), select.poll()
        self._poll.register(self._watched, select.POLLIN)
        self._poll.register(self._wake_read, select.POLLIN)
        self._poll_wake.register(self._wake_read, select.POLLIN)
        self._wake_fd = self._wake_read.fileno()

    @property
    def descriptor(self) -> int:
        return self._descriptor

    def open(self) -> None:
        if self._socket is not None:
            now = time.monotonic()
            self._connect_at, self._pause_s = now, RECONNECT_S[0]
            if now < self._connected_at + SHORT_LIVED_S:
                self._connect_at += self._rest_s
                self._rest_s = min(2 * self._rest_s, COME_AGAIN_S[1])
            else:
                self._rest_s = COME_AGAIN_S[0]
        self._hang_up()
        self._out.clear()
        self._reader = FrameReader(MAX_FRAME_BYTES + FORWARD_BYTES)

    def receive(self) -> tuple[list[bytes], str | None]:
        connected = self._socket
        if connected is None:
            return [], None
        try:
            data = connected.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return [], None
        except OSError:
            data = b""
        if not data:
            return [], BROKEN
        try:
            return self._reader.feed(data), None
        except ProtocolError as error:
            return [], str(error)

    def send(self, frame: bytes) -> None:
        self._out.add(frame)

    def flush(self) -> None:
        if self._socket is None and time.monotonic() >= self._connect_at:
            self._connect()
        if (connected := self._socket) is None:
            return
        try:
            done = self._out.write_to(connected)
        except OSError:  # it is broken: what came on it before can still be received
            self._out.clear()
            done = True
        events = selectors.EVENT_READ if done else selectors.EVENT_READ | selectors.EVENT_WRITE
        if events != self._events:
            self._events = events
            self._watched.modify(connected, events)

    def wait(self, timeout_s: float, *, for_frames: bool = True) -> bool:
        if self._socket is None:
            timeout_s = min(timeout_s, self._connect_at - time.monotonic())
        ready = (self._poll if for_frames else self._poll_wake).poll(max(0.0, timeout_s) * 1000)
        if any(descriptor == self._wake_fd for descriptor, _ in ready):
            with contextlib.suppress(BlockingIOError):
                self._wake_read.recv(4096)
        return bool(ready)

    def has_news(self) -> bool:
        return bool(self._watched.select(0))

    def wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake; closed: it is gone
            self._wake_write.send(b"\0")

    def close(self) -> None:
        self._hang_up()
        self._wake_read.close()
        self._wake_write.close()

    def close_descriptor(self) -> None:
        self._watched.close()

    # --- inside ---

    def _connect(self) -> None:
        """Nothing here waits: either a broker listens, or there is none at the moment."""
        connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connecting.setblocking(False)
        try:
            connecting.connect(self._path)
        except OSError:
            connecting.close()
            self._connect_at = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, RECONNECT_S[1])
            return
        self._socket, self._events = connecting, selectors.EVENT_READ
        self._connected_at = time.monotonic()
        self._watched.register(connecting, self._events)

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._watched.unregister(self._socket)
            self._socket.close()
            self._socket = None
