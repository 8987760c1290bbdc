"""Values as bytes and back, if the user brings no encoder: msgpack, with a mark on what msgpack would change.

What goes in comes out with the same type: None, bool, int (of any size), float, complex, str (any: also one that
UTF-8 can't say), bytes, list, tuple, set, frozenset, dict (with any keys of these), datetime (its zone as an offset),
date, UUID. Subclasses of these arrive as what they are a subclass of. Any other value raises `TypeError` where it is
sent. Decoding makes these types and nothing else: no class is looked up, and nothing is called, on the word of a
message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from typing import Any
from uuid import UUID

import msgspec

MAX_DEPTH = 100
"""Collections in collections; a dict whose keys are not all texts counts twice, and what contains itself is deeper. It
bounds what decoding a message of somebody else may take of the stack."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_encoder = msgspec.msgpack.Encoder()


def encode(value: object) -> bytes:
    """The bytes of a value. Raises `TypeError` for one that has none, `ValueError` if it is nested too deeply."""
    return _encoder.encode(_marked(value, 0))


def decode(data: bytes) -> Any:
    """The value in `data`. Raises `ValueError`."""
    try:
        return _unpack(data)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"these bytes are not of the default encoder ({error}): give all communicators the same encoder and decoder"
        ) from None


def _marked(value: object, depth: int) -> object:
    """The same in terms of msgpack."""
    if depth > MAX_DEPTH:
        raise ValueError(
            f"a value that is nested more than {MAX_DEPTH} deep, or contains itself, can't be sent; send it flat, or "
            "give `connect` an encoder and a decoder"
        )
    match value:
        case None | bool():
            return value
        case str() if _is_utf8(value):
            return str.__str__(value)
        case int() if -(2**63) <= value < 2**64:
            return int(value)
        case float():
            return float(value)
        case bytes() | bytearray():
            return bytes(value)
        case list():
            return [_marked(item, depth + 1) for item in value]
        case Mapping() if all(isinstance(key, str) and _is_utf8(key) for key in value):
            return {str.__str__(key): _marked(item, depth + 1) for key, item in value.items()}
    for code, (kind, to_bytes, _) in _MARKS.items():
        if isinstance(value, kind):
            return msgspec.msgpack.Ext(code, to_bytes(value, depth))
    raise TypeError(
        f"a value of type {type(value).__module__}.{type(value).__qualname__} can't be sent; send plain data (numbers, "
        "texts, lists, dicts ...), or give `connect` an encoder and a decoder"
    )


def _unmarked(code: int, data: memoryview) -> Any:
    if code not in _MARKS:
        raise ValueError(f"there is no kind of value {code}")
    return _MARKS[code][2](bytes(data))


def _is_utf8(text: str) -> bool:
    """Not so is what `os.fsdecode` makes of the name of a file that is in another encoding."""
    return str.isascii(text) or _SURROGATE.search(text) is None


def _pack(items: Iterable[object], depth: int) -> bytes:
    return _encoder.encode(_marked(list(items), depth))


def _unpack(data: bytes) -> Any:
    return _decoder.decode(data)


_MARKS: dict[int, tuple[type, Callable[[Any, int], bytes], Callable[[bytes], Any]]] = {
    1: (tuple, _pack, lambda data: tuple(_unpack(data))),
    2: (set, _pack, lambda data: set(_unpack(data))),
    3: (frozenset, _pack, lambda data: frozenset(_unpack(data))),
    4: (Mapping, lambda pairs, depth: _pack(map(list, pairs.items()), depth), lambda data: dict(_unpack(data))),
    5: (
        int,
        lambda number, _: number.to_bytes(number.bit_length() // 8 + 1, signed=True),
        lambda data: int.from_bytes(data, signed=True),
    ),
    6: (complex, lambda number, _: str(complex(number)).encode(), lambda data: complex(data.decode())),
    7: (datetime, lambda time, _: time.isoformat().encode(), lambda data: datetime.fromisoformat(data.decode())),
    8: (date, lambda day, _: day.isoformat().encode(), lambda data: date.fromisoformat(data.decode())),
    9: (UUID, lambda uuid, _: uuid.bytes, lambda data: UUID(bytes=data)),
    10: (
        str,
        lambda text, _: str.encode(text, "utf-8", "surrogatepass"),
        lambda data: data.decode("utf-8", "surrogatepass"),
    ),
}
"""By code: what msgpack does not have, as its type, how it becomes bytes (at which depth), and how it comes back."""
_decoder = msgspec.msgpack.Decoder(ext_hook=_unmarked)
