"""What users give to a communicator, checked before anything is said to the broker.

`TypeError` for what is no such thing at all, `ValueError` for what is out of its range: each says what is wanted and
what was given. So nothing is sent that the broker could not understand (it would end the connection of everybody who
shares it), and the mistake shows where it was made.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from datetime import datetime
from enum import Enum
from numbers import Real
from typing import get_args

import msgspec

from prunus.errors import MessageTooLargeError, speakable
from prunus.messaging.blobs import is_digest
from prunus.messaging.communicator import MAX_BODY_BYTES, BlobRef
from prunus.messaging.inventory import MAX_LISTED, QueueLimits, TaskPlace
from prunus.messaging.messages import MAX_MOMENT, MAX_NAME_CHARS, MAX_PRIORITY, SessionName

MAX_TIMEOUT_S = 1e9
"""The longest time-out of a question, some thirty years."""
MAX_PEER_NAME_CHARS = 167
"""Of the name of a session the rest is random."""


def as_bytes(body: bytes) -> bytes:
    if not isinstance(body, (bytes, bytearray, memoryview)):
        raise TypeError(f"a body is bytes, not {type(body).__name__}")
    return bytes(body)


def checked_body(body: bytes) -> bytes:
    body = as_bytes(body)
    if len(body) > MAX_BODY_BYTES:
        raise MessageTooLargeError(len(body), MAX_BODY_BYTES)
    return body


def check_optional_names(*names: str | None) -> None:
    check_names(*(name for name in names if name is not None))


def check_names(*names: str) -> None:
    for name in names:
        if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or not (name.isascii() or speakable(name) == name):
            raise ValueError(f"a name is a text of up to {MAX_NAME_CHARS} characters, not {name!r:.100}")
        if type(name) is not str and not isinstance(name, Enum):  # as numpy has one
            raise ValueError(
                f"a name is a plain text, not of the type {type(name).__name__}; give str() of {name!r:.100}"
            )


def check_seconds(timeout_s: float) -> None:
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not 0 <= timeout_s <= MAX_TIMEOUT_S:
        raise ValueError(f"a time-out is from 0 to {MAX_TIMEOUT_S:g} seconds, not {timeout_s!r:.100}")


def check_priority(priority: int) -> None:
    if not is_whole(priority) or not 0 <= priority <= MAX_PRIORITY:
        raise ValueError(f"a priority is from 0 to {MAX_PRIORITY}, not {priority!r:.100}")


def check_if_pending(if_pending: str) -> None:
    if if_pending not in ("join", "replace"):
        raise ValueError(f"if_pending is 'join' or 'replace', not {if_pending!r}")


def check_patience(timeout_s: float | None) -> None:
    if timeout_s is not None and not (isinstance(timeout_s, Real) and timeout_s == timeout_s):  # the latter: NaN
        raise ValueError(f"a time-out is a number of seconds, or None for no end, not {timeout_s!r:.100}")


def check_peer_name(name: str) -> None:
    """It becomes a part of the name of a session, which is all that a broker takes there."""
    if not isinstance(name, str):
        raise TypeError(f"the name of a peer is a text, not {name!r:.100}")
    try:
        msgspec.convert(f"{name}-{'0' * 32}", SessionName)
    except (msgspec.ValidationError, UnicodeError):
        raise ValueError(
            f"the name of a peer is made of the letters A to Z and a to z, digits, and _ . : - only, up to "
            f"{MAX_PEER_NAME_CHARS} in all; {name!r:.250} is none"
        ) from None


def check_page(after: int, limit: int) -> None:
    check_number("after", after)
    if not is_whole(limit) or not 1 <= limit <= MAX_LISTED:
        raise ValueError(f"a page has from 1 to {MAX_LISTED} tasks, not {limit}; ask for the next with `after`")


def check_callback(callback: object) -> None:
    if not callable(callback):
        raise TypeError(f"a callback is a function, or an object that can be called, not {callback!r:.100}")
    if inspect.iscoroutinefunction(callback):
        raise TypeError(f"a callback is called, and nobody awaits it: make it a plain function, not {callback!r:.100}")


def check_tasks(*tasks: object) -> None:
    for task in tasks:
        if not (hasattr(task, "id") and hasattr(task, "epoch")):
            raise TypeError(f"give tasks as they came to a handler or from next_task, not {task!r:.100}")


def checked_digest(ref: BlobRef) -> str:
    if not isinstance(ref, BlobRef) or not is_digest(ref.digest):
        raise ValueError(f"this is no reference to a blob: {ref!r:.200}; blob_put gives one")
    return ref.digest


def check_number(what: str, number: int) -> None:
    if not is_whole(number) or not 0 <= number < 2**63:
        raise ValueError(f"{what} is a whole number from 0 on, below 2**63, not {number!r:.100}")


def is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def check_place(place: str | None) -> None:
    if place is not None and place not in get_args(TaskPlace):
        raise ValueError(f"a place is one of {', '.join(get_args(TaskPlace))}, not {place!r:.100}")


def check_limits(limits: QueueLimits) -> None:
    """By the broker's own rules."""
    if not isinstance(limits, QueueLimits):
        raise TypeError(
            f"the limits of a queue are a QueueLimits, not {limits!r:.100}; QueueLimits() is no limit at all"
        )
    try:
        for name in ("concurrency", "max_length"):
            if (number := getattr(limits, name)) is not None:
                check_number(name, number)
        if not is_whole(limits.burst):
            raise ValueError(f"burst is a whole number, not {limits.burst!r:.100}")
        msgspec.convert(msgspec.structs.asdict(limits), QueueLimits)
        wrong = limits.what_is_wrong()
    except (msgspec.ValidationError, ValueError) as error:
        wrong = str(error)
    if wrong is not None:
        raise ValueError(f"these are no limits of a queue: {wrong}")


def checked_resources(resources: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    if not isinstance(resources, Mapping):
        raise TypeError(f"resources are a mapping of names to numbers of tokens, not {resources!r:.100}")
    check_names(*resources)
    for resource, tokens in resources.items():
        check_number(f"what a task takes of the resource {resource!r}", tokens)
    return tuple(resources.items())


def wall_clock(what: str, moment: datetime | None) -> float:
    """Seconds since 1970, up to the last that can be said; 0: nothing was asked for."""
    if moment is None:
        return 0.0
    if not isinstance(moment, datetime):
        raise TypeError(f"{what} is a datetime with a time zone, not {moment!r:.100}")
    if moment.tzinfo is None:
        raise ValueError(f"{what} needs a time zone, say datetime.now(UTC) + ...; {moment!r} has none")
    return min(max(moment.timestamp(), 1.0), MAX_MOMENT)
