"""Whoever can reach the port of a broker, and means no good: strangers, and one who has a key.

A stranger speaks TCP, and never gets further than that: noise, greetings that are broken, of other protocols or of
other mechanisms, half a handshake and then silence, commands that are said to have lengths which never come.

CURVE lets in whoever has a key. He says the frames of `frames` there, and what ZeroMQ makes of messages: none in them,
many parts, thousands of parts, more than a message may be.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence

import zmq

from prunus.messaging.keys import ClientKey
from prunus.messaging.messages import MAX_FRAME_BYTES, Hello, Peer, encode
from tests.torture.fuzz.attacker import FRAMES_PER_CONNECTION, LEFT_OPEN, TIMEOUT_S, say_all
from tests.torture.fuzz.frames import Frames

SIGNATURE = b"\xff" + struct.pack("!Q", 1) + b"\x7f"
"""What each version of ZMTP since 2.0 begins with."""
GREETING_BYTES = 64
MECHANISMS = (b"CURVE", b"NULL", b"PLAIN", b"GSSAPI", b"", b"\xff" * 20)
OTHER_PROTOCOLS = (
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"SSH-2.0-a\r\n",
    b"\x01\x00\x05\x00hello",  # ZMTP 1.0
    SIGNATURE + b"\x01\x05\x00\x00\x03abc",  # ZMTP 2.0
)
SHORT_COMMAND, LONG_COMMAND = 0x04, 0x06
"""The flags of a command whose length is one byte, or eight."""
CURVE_HELLO_BYTES = 200
ANNOUNCED = (2**63 - 1, 2**64 - 1, 2**32, MAX_FRAME_BYTES + 1, 100_000)
"""Lengths of commands that do not end."""
SOME_OF_IT = 100_000
"""So much comes of one of these at most."""
STRANGERS = 0.5
"""Of the connections so many are those of strangers."""
PARTS = (2, 3, 10, 5_000)
PART_BYTES, LONG_PARTS, LONG_SHARE = 64 * 1024, 1_500, 0.02
"""A few messages have so many of such parts: more than a broker wants to hear before a message ends."""


def greeting(mechanism: bytes = b"CURVE", *, version: bytes = b"\x03\x01") -> bytes:
    """What a client of ZMTP 3 says first."""
    return (SIGNATURE + version + mechanism.ljust(20, b"\0")).ljust(GREETING_BYTES, b"\0")


def command(body: bytes, announced: int | None = None) -> bytes:
    """As it goes over the wire; `announced` is the length that it is said to have."""
    size = len(body) if announced is None else announced
    head = struct.pack("!BB", SHORT_COMMAND, size) if size < 256 else struct.pack("!BQ", LONG_COMMAND, size)
    return head + body


class NetworkAttacker:
    """The seed decides all that it says."""

    def __init__(self, key: ClientKey, seed: int) -> None:
        self._key = key
        host, _, port = key.endpoints[0].removeprefix("tcp://").rpartition(":")
        self._place = host, int(port)
        self._choice = random.Random(seed)
        self._frames = Frames(seed)
        self._open: list[socket.socket] = []
        self._context = zmq.Context()
        self.said = 0
        """Messages, and streams that are none ..."""
        self.strangers = 0
        """... which are so many."""
        self._streams: list[Callable[[], bytes]] = [
            self._silence,
            self._noise,
            self._other_protocol,
            self._broken_greeting,
            self._other_mechanism,
            self._half_a_handshake,
            self._wrong_handshake,
            self._endless_command,
        ]
        self._messages: list[Callable[[], Iterator[list[bytes]]]] = [self._nonsense] * 6 + [
            self._empty,
            self._many_parts,
            self._too_long,
        ]

    def attack(self) -> None:
        """One more connection."""
        if self._choice.random() < STRANGERS:
            self._come_as_a_stranger(self._choice.choice(self._streams)())
        else:
            self._come_with_a_key(self._choice.choice(self._messages)())

    def close(self) -> None:
        """Once all has been said."""
        for connection in self._open:
            connection.close()
        self._context.term()

    # --- a stranger ---

    def _come_as_a_stranger(self, stream: bytes) -> None:
        self.said += 1
        self.strangers += 1
        connection = socket.create_connection(self._place, TIMEOUT_S)
        self._open.append(connection)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was hung up on: well so
            connection.sendall(stream)
        if len(self._open) > LEFT_OPEN:
            self._open.pop(self._choice.randrange(len(self._open))).close()

    def _silence(self) -> bytes:
        return b""

    def _noise(self) -> bytes:
        return self._choice.randbytes(self._choice.choice((1, 10, 64, 5000)))

    def _other_protocol(self) -> bytes:
        return self._choice.choice(OTHER_PROTOCOLS)

    def _broken_greeting(self) -> bytes:
        said = bytearray(greeting(version=self._choice.choice((b"\x03\x01", b"\x03\x00", b"\x00\x00", b"\xff\xff"))))
        if self._choice.random() < 0.5:
            return bytes(said[: self._choice.randrange(GREETING_BYTES)])
        for _ in range(self._choice.choice((1, 5))):
            said[self._choice.randrange(GREETING_BYTES)] ^= 1 << self._choice.randrange(8)
        return bytes(said) + self._choice.randbytes(self._choice.choice((0, 300)))

    def _other_mechanism(self) -> bytes:
        """And all of its handshake, and a message, in one breath."""
        ready = command(b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0")
        frame = self._frames.valid()[:255]
        return greeting(self._choice.choice(MECHANISMS)) + ready + bytes((0, len(frame))) + frame

    def _half_a_handshake(self) -> bytes:
        hello = command(b"\x05HELLO\x01\0".ljust(CURVE_HELLO_BYTES, b"\0"))
        return greeting() + hello[: self._choice.randrange(len(hello))]

    def _wrong_handshake(self) -> bytes:
        name = self._choice.choice((b"\x05HELLO", b"\x08INITIATE", b"\x07MESSAGE", b"\x05READY", b"\xffA", b""))
        size = self._choice.choice((0, 20, CURVE_HELLO_BYTES - len(name), 255, 5000))
        return greeting() + command(name + self._choice.randbytes(size))

    def _endless_command(self) -> bytes:
        body = b"\x05HELLO" + bytes(self._choice.choice((0, 1, 1000, SOME_OF_IT)))
        return greeting() + command(body, self._choice.choice(ANNOUNCED))

    # --- one who has a key ---

    def _come_with_a_key(self, messages: Iterator[list[bytes]]) -> None:
        with self._context.socket(zmq.DEALER) as dealer:
            join(dealer, self._key)
            for parts in messages:
                self.said += 1
                dealer.send_multipart(parts, copy=False)

    def _nonsense(self) -> Iterator[list[bytes]]:
        for _ in range(self._choice.choice(FRAMES_PER_CONNECTION)):
            yield [self._frames.next()]

    def _empty(self) -> Iterator[list[bytes]]:
        for _ in range(self._choice.choice((1, 20))):
            yield [b""] * self._choice.choice((1, 2))

    def _many_parts(self) -> Iterator[list[bytes]]:
        yield [self._frames.valid()]
        if self._choice.random() < LONG_SHARE:
            yield [bytes(PART_BYTES)] * LONG_PARTS
        else:
            yield [self._frames.next() for _ in range(self._choice.choice(PARTS))]

    def _too_long(self) -> Iterator[list[bytes]]:
        yield [self._frames.valid()]
        yield [bytes(MAX_FRAME_BYTES + self._choice.choice((0, 1, 1000)))]


def join(dealer: zmq.Socket[bytes], key: ClientKey) -> None:
    """Connect with a key, without any manners: what it says before it leaves is said."""
    dealer.linger = dealer.sndtimeo = dealer.rcvtimeo = int(TIMEOUT_S * 1000)
    dealer.curve_serverkey = key.server_key.encode()
    dealer.curve_publickey, dealer.curve_secretkey = key.public_key.encode(), key.secret_key.encode()
    dealer.connect(key.endpoints[0])


def main(arguments: Sequence[str]) -> None:
    """``network attacker KEY SEED FRAMES``: see `say_all`; and how many of them were strangers."""
    key, seed, count = arguments
    attacker = NetworkAttacker(ClientKey.read(key), int(seed))
    say_all(attacker, int(count))
    print(attacker.strangers, "strangers", flush=True)


def deaf(arguments: Sequence[str]) -> None:
    """``network deaf KEY COUNT``: so many peers that want to hear everything and never read; until it is killed."""
    file, count = arguments
    key, context, dealers = ClientKey.read(file), zmq.Context(), []
    for number in range(int(count)):
        dealer = context.socket(zmq.DEALER)
        dealer.rcvhwm = 1
        join(dealer, key)
        dealer.send(encode(Hello(session=f"deaf-network-{number}", peer=Peer(), patterns=((1, None, None),))))
        assert dealer.recv(), "that is all that it ever hears"
        dealers.append(dealer)
    print("all are there", flush=True)
    time.sleep(3600)
