"""Frames that nobody honest would send, and some that he would.

`Frames` begins with valid messages of every type (made from the types themselves, so a new message is in at once) and
spoils them: on the level of fields (another type, a number that is too large, NaN, a key twice, text that is no text,
nesting without end, fields missing or too many), and on the level of bytes (bits, lengths, ends, two frames mixed up).
The seed decides everything.
"""

from __future__ import annotations

import math
import random
import re
import struct
import typing
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import inspect

from prunus.messaging.messages import MAGIC, MAX_FRAME_BYTES, PROTOCOL, BrokerMessage, ClientMessage

HEADER = bytes((MAGIC, PROTOCOL))
CORPUS = 1500
"""Valid messages to begin with."""
NAMES = ("", "a", "b.c", "default", "state.*", "#", "t1", "t2", "ü\0\n", "x" * 1024)
TEXTS = ("fuzz-0", "fuzz-1", "fuzz-2", "s", *(digit * 64 for digit in "09af"))
"""Where not every text is right."""
NUMBERS = (0, 1, 2, 3, 7, 2**31, 2**32 + 1, 2**53, 2**62, 2**63 - 1)
LEAPS = 0.02
"""How many requests have a number far away from those before."""
BODIES = (b"", b"body", bytes(300), b"\xff" * 20)
DEEP = (10, 1_000, 100_000)

WEIRD = (
    b"\xc0",
    b"\xc1",
    b"\xc2",
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xcb" + struct.pack(">d", math.nan),
    b"\xcb" + struct.pack(">d", math.inf),
    b"\xcb" + struct.pack(">d", -1e300),
    b"\xca\x7f\xc0\x00\x00",
    b"\xa2\xff\xfe",
    b"\xa3\xed\xa0\x80",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xffabc",
    b"\xdd\xff\xff\xff\xff",
    b"\xdd\x00\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdf\x00\xff\xff\xff\xa1a",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xd4\x01\x00",
    b"\xd6\xff\x00\x00\x00\x00",
    b"\xc7\x0c\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x82\xa1a\x01\xa1a\x02",
    b"\x81\x90\x01",
    b"\x81\x81\x01\x02\x03",
    b"\x81\xcb" + struct.pack(">d", math.nan) + b"\x01",
    b"\x90",
    b"\x80",
    b"\xa0",
    b"\xdc\x27\x10" + b"\xc0" * 10_000,
    b"\xda\x04\x01" + b"x" * 1025,
)


class Frames:
    """An endless supply for one side: ``client`` are frames to the broker, ``broker`` those from it."""

    def __init__(self, seed: int, side: str = "client") -> None:
        self._choice = random.Random(seed)
        union = ClientMessage if side == "client" else BrokerMessage
        self._types = [inspect.type_info(kind) for kind in typing.get_args(union)]
        # Each type equally often: the rare ones have as many bugs.
        messages = [self._value(self._types[number % len(self._types)]) for number in range(CORPUS)]
        self._trees: list[Any] = [msgspec.to_builtins(message, builtin_types=(bytes,)) for message in messages]
        self._valid = [HEADER + msgspec.msgpack.encode(message) for message in messages]
        self._ways: list[Callable[[], bytes]] = [self._misbuilt] * 5 + [self._damaged] * 4 + [self.valid, self._odd]

    def next(self) -> bytes:
        """Another one."""
        return self._choice.choice(self._ways)()

    def valid(self) -> bytes:
        """One that can be read; that does not mean that it makes sense."""
        return self._choice.choice(self._valid)

    # --- spoiled ---

    def _misbuilt(self) -> bytes:
        """Right msgpack (mostly) that is no message (mostly)."""
        tree = self._choice.choice(self._trees)
        for _ in range(self._choice.choice((1, 1, 2, 3))):
            tree = self._changed(tree)
        return HEADER + msgspec.msgpack.encode(tree)

    def _changed(self, tree: Any) -> Any:
        """With one node anywhere in it replaced, left out, doubled or put in."""
        if isinstance(tree, list) and tree and self._choice.random() < 0.9:
            place = self._choice.randrange(len(tree))
            match self._choice.randrange(8):
                case 0:
                    return [*tree[:place], *tree[place + 1 :]]
                case 1:
                    return [*tree[:place], tree[place], *tree[place:]]
                case 2:
                    return [*tree, self._strange()]
                case 3:
                    return tree[:place]
                case _:
                    return [*tree[:place], self._changed(tree[place]), *tree[place + 1 :]]
        if isinstance(tree, dict) and tree and self._choice.random() < 0.7:
            name = self._choice.choice(sorted(tree))
            return {**tree, name: self._changed(tree[name])}
        return self._strange()

    def _strange(self) -> Any:
        match self._choice.randrange(12):
            case 0:
                return self._choice.choice(NUMBERS)
            case 1:
                return self._choice.choice(NAMES)
            case 2:
                return self._choice.choice(self._choice.choice(self._trees))
            case 3 if self._choice.random() < 0.05:
                return msgspec.Raw(self._choice.choice((b"\x91", b"\x81\xa1a")) * self._choice.choice(DEEP))
            case _:
                return msgspec.Raw(self._choice.choice(WEIRD))

    def _damaged(self) -> bytes:
        """A valid one on a bad day."""
        frame = bytearray(self.valid())
        place = self._choice.randrange(len(frame))
        match self._choice.randrange(7):
            case 0:
                del frame[place:]
            case 1:
                frame[place:place] = self._choice.choice(WEIRD)
            case 2:
                frame[place : place + 4] = self._choice.choice(WEIRD)[:4]
            case 3:
                other = self.valid()
                frame[place:] = other[self._choice.randrange(len(other)) :]
            case 4:
                frame += self._choice.randbytes(self._choice.randrange(20))
            case _:
                for _ in range(self._choice.choice((1, 1, 2, 5))):
                    frame[self._choice.randrange(len(frame))] ^= 1 << self._choice.randrange(8)
        return bytes(frame)

    def _odd(self) -> bytes:
        """Not even that."""
        match self._choice.randrange(8):
            case 0:
                return self._choice.randbytes(self._choice.randrange(40))
            case 1:
                return HEADER + self._choice.choice(WEIRD)
            case 2:
                return bytes((MAGIC, self._choice.randrange(256))) + self.valid()[2:]
            case 3:
                return self.valid()[: self._choice.randrange(3)]
            case 4:
                return HEADER + b"\x92\x04" + self._choice.choice((b"\x91", b"\x81\x01", b"\xdc\x00\x01")) * 5_000
            case 5 if self._choice.random() < 0.001:
                return HEADER + bytes(MAX_FRAME_BYTES)
            case 6:
                return b"\x92" + HEADER + self.valid()
            case _:
                return HEADER + self._choice.randbytes(self._choice.randrange(200))

    # --- valid, from the types ---

    def _value(self, kind: inspect.Type) -> Any:
        choice = self._choice
        match kind:
            case inspect.StructType(cls=cls, fields=fields):
                given = {one.name: self._value(one.type) for one in fields if one.required or choice.random() < 0.7}
                if "id" in given and isinstance(given["id"], int) and choice.random() > LEAPS:
                    given["id"] = choice.randrange(1, 100)
                return cls(**given)
            case inspect.UnionType(types=types):
                return self._value(choice.choice(types))
            case inspect.IntType(ge=low, le=high):
                return choice.choice([n for n in NUMBERS if (low or 0) <= n and (high is None or n <= high)])
            case inspect.StrType(pattern=pattern):
                return choice.choice([text for text in TEXTS if re.search(pattern, text)] if pattern else NAMES)
            case inspect.FloatType():
                return choice.choice((0.0, 0.5, 10.0, 1e9))
            case inspect.BytesType():
                return choice.choice(BODIES)
            case inspect.BoolType():
                return choice.random() < 0.5
            case inspect.LiteralType(values=values):
                return choice.choice(values)
            case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
                return tuple(self._value(item) for _ in range(choice.randrange(3)))
            case inspect.TupleType(item_types=items):
                return tuple(self._value(item) for item in items)
            case inspect.DictType(key_type=key, value_type=value):
                return {self._value(key): self._value(value) for _ in range(choice.randrange(3))}
            case _:  # None, Any
                return None
