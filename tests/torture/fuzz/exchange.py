"""Hostile frames against an exchange with a real database: it goes on, and what it refuses changes nothing.

Frames that can't be read are given to it in batches, on connections of known sessions; before and after, all that its
core remembers and all that is in its tables is compared. Frames that can be read, sensible or not, may do what they
say; but those that are answered with a `Violation`, or with `Unwelcome`, may not.

As a program: ``exchange SEED SIZE`` limits its own memory and prints a `Batch`.
"""

from __future__ import annotations

import sqlite3
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import closing
from dataclasses import is_dataclass
from typing import Any

import msgspec

from prunus.errors import ProtocolError
from prunus.messaging.exchange import MAX_PROTOCOL_ERRORS, Exchange
from prunus.messaging.messages import Hello, Peer, Unwelcome, Violation, decode_from_broker, decode_from_client, encode
from tests.torture.batch import Batch
from tests.torture.fuzz.codec import MAX_GROWTH_BYTES, in_a_program, limit_memory, memory_bytes
from tests.torture.fuzz.frames import Frames

ROUTES = 28
"""Connections in a batch; each may send less nonsense than makes it ignored."""
PER_ROUTE = MAX_PROTOCOL_ERRORS - 1
BATCHES = 10
"""So many, and a new exchange begins."""
WATCHED = 2
"""How many of the frames of a batch that can be read are looked at one by one."""
PLAIN = frozenset({type(None), bool, int, float, str, bytes})
CLOCKS = frozenset({"wall", "_wall"})
"""What of a core says only how late it is."""
TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"


def fuzz(seed: int, size: int) -> Batch:
    """At least `size` frames."""
    before = memory_bytes()
    frames = Frames(seed)
    counts = {"refused": 0, "could be read": 0, "violations by messages": 0}
    failures: list[str] = []
    done = 0
    while done < size and not failures:
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
            one = _One(connection, frames, counts)
            for number in range(BATCHES):
                try:
                    failures += one.batch(number)
                except Exception as error:
                    failures.append(f"after {done} frames the exchange raised {error!r}")
                done += ROUTES * PER_ROUTE
                if failures:
                    break
    growth = memory_bytes() - before
    if growth > MAX_GROWTH_BYTES:
        failures.append(f"the memory grew by {growth >> 20} MiB")
    return Batch.of(done, failures, counts, {"memory grew by MiB": growth / 2**20})


class _One:
    """One exchange."""

    def __init__(self, connection: sqlite3.Connection, frames: Frames, counts: dict[str, int]) -> None:
        self._connection = connection
        self._exchange: Exchange[str] = Exchange(connection)
        self._frames = frames
        self._counts = counts
        self._now = 0.0

    def batch(self, number: int) -> list[str]:
        self._now += 0.7
        self._exchange.tick(self._now)
        routes = [f"{number}.{place}" for place in range(ROUTES)]
        hellos = [Hello(session=f"fuzz-{place}", peer=Peer(), queues=(("default", 3),)) for place in range(ROUTES)]
        self._exchange.process(self._now, [(route, encode(one)) for route, one in zip(routes, hellos, strict=True)])
        refused: list[tuple[str, bytes]] = []
        read: list[tuple[str, bytes]] = []
        for route in routes:
            for _ in range(PER_ROUTE):
                frame = self._frames.next()
                (read if is_readable(frame) else refused).append((route, frame))
        failures = self._refuse(refused)
        watched = read[:WATCHED]
        for route, frame in watched:
            failures += self._watch(route, frame)
        self._exchange.process(self._now, read[len(watched) :])
        self._counts["could be read"] += len(read)
        return failures

    def _refuse(self, frames: list[tuple[str, bytes]]) -> list[str]:
        before = digest(self._exchange, self._connection)
        answers = self._exchange.process(self._now, frames)
        self._counts["refused"] += len(frames)
        failures = []
        if digest(self._exchange, self._connection) != before:
            failures.append(f"one of {len(frames)} frames that can't be read changed something")
        if not all(isinstance(decode_from_broker(answer), Violation) for _, answer in answers):
            failures.append("a frame that can't be read was not answered with a violation")
        if [route for route, _ in answers] != [route for route, _ in frames]:
            failures.append(f"{len(frames)} frames that can't be read got {len(answers)} answers")
        return failures

    def _watch(self, route: str, frame: bytes) -> list[str]:
        before = digest(self._exchange, self._connection)
        answers = [decode_from_broker(answer) for _, answer in self._exchange.process(self._now, [(route, frame)])]
        if not any(isinstance(answer, Violation | Unwelcome) for answer in answers):
            return []
        self._counts["violations by messages"] += 1
        if digest(self._exchange, self._connection) != before:
            return [f"a violation changed something: {decode_from_client(frame)}"]
        return []


def is_readable(frame: bytes) -> bool:
    try:
        decode_from_client(frame)
    except ProtocolError:
        return False
    return True


def digest(exchange: Exchange[str], connection: sqlite3.Connection) -> int:
    """All that an exchange knows: its core and its tables. (Hashes know their own: bodies may be long.)"""
    parts: list[object] = []
    _walk(exchange._core, parts, set())
    tables = [
        name for [name] in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
    ]
    for table in tables:
        parts += connection.execute(f"SELECT * FROM {table}").fetchall()
    return hash(tuple(parts))


def _walk(thing: Any, parts: list[object], seen: set[int]) -> None:
    """Whatever it is made of; each thing once."""
    if id(thing) in seen:
        return
    if thing is None or isinstance(thing, str | bytes | int | float):
        parts.append(thing)
        return
    seen.add(id(thing))
    if isinstance(thing, Mapping) and set(map(type, thing.values())) <= PLAIN:
        parts.append(tuple(thing.items()))
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            parts.append(key)
            _walk(value, parts, seen)
    elif isinstance(thing, set | frozenset):
        parts.append(frozenset(thing))
    elif isinstance(thing, msgspec.Struct):
        for name in thing.__struct_fields__:
            _walk(getattr(thing, name), parts, seen)
    elif isinstance(thing, list | tuple | deque) and set(map(type, thing)) <= PLAIN:
        parts.append(tuple(thing))
    elif hasattr(thing, "__iter__"):
        parts.append(type(thing))
        for one in thing:
            _walk(one, parts, seen)
    elif not callable(thing):
        names = getattr(thing, "__slots__", None) or sorted(vars(thing))
        if is_dataclass(thing):
            names = sorted(thing.__dataclass_fields__)
        for name in (one for one in names if one not in CLOCKS):
            parts.append(name)
            _walk(getattr(thing, name, None), parts, seen)


def run(seed: int, size: int) -> Batch:
    return in_a_program("tests.torture.fuzz.exchange", seed, size)


if __name__ == "__main__":
    limit_memory()
    sys.stdout.buffer.write(msgspec.json.encode(fuzz(int(sys.argv[1]), int(sys.argv[2]))))
