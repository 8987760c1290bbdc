"""A peer of a broker on this host without any manners: it says and reads what it is told to, frame by frame."""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from prunus.messaging.messages import FORWARD_BYTES, MAX_FRAME_BYTES
from prunus.messaging.unix import FrameReader, socket_path

PATIENCE_S = 10.0


def framed(frame: bytes) -> bytes:
    """As it goes over the wire."""
    return struct.pack("!I", len(frame)) + frame


class RawPeer:
    def __init__(self, endpoint: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(str(socket_path(endpoint)))
        self._reader = FrameReader(MAX_FRAME_BYTES + FORWARD_BYTES)
        self._frames: deque[bytes] = deque()

    def send(self, frame: bytes) -> None:
        self.socket.sendall(framed(frame))

    def recv(self) -> bytes:
        """The next frame; `EOFError` if the broker hung up."""
        while not self._frames:
            data = self.socket.recv(64 * 1024)
            if not data:
                raise EOFError
            self._frames += self._reader.feed(data)
        return self._frames.popleft()

    def poll(self, milliseconds: int) -> bool:
        """Whether something comes, or the broker hangs up, within that time."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(self._frames or poll.poll(milliseconds))


@contextmanager
def raw_peer(endpoint: str) -> Iterator[RawPeer]:
    peer = RawPeer(endpoint)
    with peer.socket:
        yield peer
