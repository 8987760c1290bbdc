"""Whoever may connect to a broker's socket, and means no good.

It speaks to the socket itself: noise, frames that are said to be of 4 GiB, frames that never end, heads that are cut
off, and the frames of `frames`, in pieces that begin and end anywhere.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from prunus.messaging.messages import MAX_FRAME_BYTES
from tests.messaging.raw import framed
from tests.torture.fuzz.frames import Frames

Way = Callable[[], list[bytes]]
FRAMES_PER_CONNECTION = (1, 5, 12, 200)
PIECES = (1, 3, 7, 1000, 70_000)
"""What is said at a time, at most."""
ANNOUNCED = (2**32 - 1, 2**31, MAX_FRAME_BYTES + 1, MAX_FRAME_BYTES, 100_000)
"""Lengths of frames that do not end."""
MOST_OF_IT = 4 * 1024 * 1024
"""So much comes of one of these at most."""
LEFT_OPEN = 20
"""Connections that stay, and do not read what is said to them."""
TIMEOUT_S = 5.0
"""A broker that does not take bytes for so long has stopped."""


def head(length: int) -> bytes:
    """What a frame of this length begins with."""
    return struct.pack("!I", length)


class Attacker:
    """The seed decides all that it says."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self._choice = random.Random(seed)
        self._frames = Frames(seed)
        self._open: list[socket.socket] = []
        self.said = 0
        """Frames, and streams that are none."""
        self._ways: list[Way] = [self._messages] * 6 + [self._noise, self._empty, self._cut_off, self._endless]

    def attack(self) -> None:
        """One more connection."""
        parts = self._choice.choice(self._ways)()
        self.said += len(parts)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(TIMEOUT_S)
        self._open.append(connection)
        connection.connect(str(self._path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was hung up on: well so
            for piece in self._pieces(b"".join(parts)):
                connection.sendall(piece)
        if len(self._open) > LEFT_OPEN:
            self._open.pop(self._choice.randrange(len(self._open))).close()

    def close(self) -> None:
        for connection in self._open:
            connection.close()

    # --- what it says ---

    def _pieces(self, stream: bytes) -> Iterator[bytes]:
        """All of it, a few times cut anywhere."""
        begin = 0
        for _ in range(self._choice.choice((0, 0, 3))):
            end = begin + self._choice.randint(1, self._choice.choice(PIECES))
            yield stream[begin:end]
            begin = end
        yield stream[begin:]

    def _messages(self) -> list[bytes]:
        count = self._choice.choice(FRAMES_PER_CONNECTION)
        return [framed(self._frames.next()) for _ in range(count)]

    def _noise(self) -> list[bytes]:
        return [self._choice.randbytes(self._choice.choice((1, 10, 64, 5000)))]

    def _empty(self) -> list[bytes]:
        return [head(0)] * self._choice.choice((1, 20, 5000))

    def _cut_off(self) -> list[bytes]:
        return [framed(self._frames.valid()), head(self._choice.choice(ANNOUNCED))[: self._choice.randint(1, 3)]]

    def _endless(self) -> list[bytes]:
        announced = self._choice.choice(ANNOUNCED)
        size = min(announced - 1, self._choice.choice((0, 1, 1000, MOST_OF_IT)))
        return [framed(self._frames.valid()), head(announced) + bytes(size)]


class Hostile(Protocol):
    """Whoever attacks a broker, at whatever door."""

    said: int

    def attack(self) -> None: ...
    def close(self) -> None: ...


def say_all(attacker: Hostile, count: int) -> None:
    """Say so many frames, and then print how many these were."""
    while attacker.said < count:
        attacker.attack()
    attacker.close()
    print(attacker.said, flush=True)


def main(arguments: Sequence[str]) -> None:
    """``attacker SOCKET SEED FRAMES``: see `say_all`."""
    path, seed, count = arguments
    say_all(Attacker(Path(path), int(seed)), int(count))


def deaf(arguments: Sequence[str]) -> None:
    """``deaf SOCKET COUNT``: so many peers that want to hear everything and never read; until it is killed."""
    import time

    from prunus.messaging.messages import Hello, Peer, encode

    path, count = arguments
    connections = []
    for number in range(int(count)):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
        hello = Hello(session=f"deaf-{number}", peer=Peer(), patterns=((1, None, None),))
        connection.sendall(framed(encode(hello)))
        assert connection.recv(1), "that is all that it ever hears"
        connections.append(connection)
    print("all are there", flush=True)
    time.sleep(3600)
