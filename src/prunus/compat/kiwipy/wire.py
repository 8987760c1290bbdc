"""How kiwipy's messages travel as ours: their envelopes, and the names under which they are routed.

kiwipy's users share a broker with Prunus's own processes, and with each other by `exchange` and queue. So every name
on the wire begins with ``kiwipy``, and holds the exchange. Senders and subjects may be missing, and may be anything;
there they are ``-`` or ``=`` and a text, the value itself is in the body. Identifiers, exchanges and queues are said as
they are, so they must be what UTF-8 can say.

A `kiwipy.BroadcastFilter` is asked for each broadcast that arrives, so it always decides. As far as its filters can be
said as patterns of ours, the broker is told them too, and does not send what nobody wants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote, unquote
from uuid import UUID

import kiwipy
import msgspec

from prunus.errors import Failure, ProtocolError, speakable

MAX_FUTURES = 1000
"""Futures in futures; one that resolves to itself has more."""
MAX_TEXT_CHARS = 500
"""Of a sender or a subject, as it stands in a name; with its exchange it has to fit into one."""

_QUOTED = str.maketrans({"%": "%25", "*": "%2A", "#": "%23"})
_PLAIN = re.compile(r"\[\.\]|\.\*|\\.|[^\\^$.|?*+()\[\]{}]", re.DOTALL)
"""What a regular expression may be made of to be said as a pattern: dots, runs, escaped and ordinary characters."""


# --- envelopes --------------------------------------------------------------------------------------


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A task or a question."""

    body: bytes
    reply_to: str
    """The sender under which notes on its way (`Pending`) are broadcast; empty: nobody waits for a result."""
    number: int
    """What its sender calls it."""


Depth = Annotated[int, msgspec.Meta(ge=0, le=MAX_FUTURES)]


class Pending(msgspec.Struct, frozen=True, array_like=True):
    """Note: the subscriber answered `number` with a future (`depth` 1), and that with another one (2), ..."""

    number: int
    depth: Depth


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """What a subscriber made of a task or a question, after `depth` futures."""

    kind: Literal["result", "exception", "cancelled"]
    depth: Depth
    result: bytes = b""
    failure: Failure | None = None


def pack(message: Envelope | Pending | Reply) -> bytes:
    return _encoder.encode(message)


def unpack_envelope(data: bytes) -> Envelope:
    """Raises `ProtocolError`."""
    return _unpack(_envelopes, data)


def unpack_pending(data: bytes) -> Pending:
    """Raises `ProtocolError`."""
    return _unpack(_pendings, data)


def unpack_reply(data: bytes) -> Reply:
    """Raises `ProtocolError`."""
    return _unpack(_replies, data)


# --- names ------------------------------------------------------------------------------------------


def queue_name(queue: str) -> str:
    """Raises `ValueError` for one that can't be said."""
    return f"kiwipy:{_said('name of a queue', queue)}"


def checked_exchange(exchange: str) -> str:
    """Raises `TypeError` for what is no text, `ValueError` for one that can't be said."""
    if not isinstance(exchange, str):
        raise TypeError(f"message_exchange is a text, not {exchange!r:.100}")
    return _said("message_exchange", exchange)


def reply_name(session: str) -> str:
    """The sender of the notes for a session."""
    return f"kiwipy-reply:{session}"


def recipient_name(exchange: str, identifier: object) -> str:
    """Raises `ValueError` for one that can't be said."""
    return f"kiwipy:{quote(exchange)} {_said('identifier', identifier)}"


def spoken(recipient: str) -> str:
    """A recipient in the words of who named it; whatever else has a name on the wire as it is."""
    kind, _, name = recipient.partition("kiwipy:")
    exchange, _, identifier = name.partition(" ")
    return recipient if kind or not identifier else f"{identifier!r} on the exchange {unquote(exchange)!r}"


def subject_name(exchange: str, subject: object) -> str:
    return f"kiwipy:{quote(exchange)} {sender_name(subject)}"


def sender_name(sender: object) -> str:
    """One that is too long for a name, or that UTF-8 can't say, goes to all, as if there were none: whoever gets it
    looks at the value itself."""
    text = None if sender is None else _quoted(_text(sender))
    return "-" if text is None else f"={text}"


def patterns(exchange: str, subscriber: Callable[..., Any]) -> list[tuple[str | None, str]]:
    """(sender, subject) of disjoint subscriptions that together cover all that `subscriber` may want to hear.

    As in kiwipy, a broadcast without a sender passes all filters for senders, one without a subject all for subjects.
    """
    senders: list[str | None] = [None]
    subjects = [f"kiwipy:{quote(exchange)} #"]
    if isinstance(subscriber, kiwipy.BroadcastFilter):
        if (sender := _pattern(getattr(subscriber, "_sender_filters", ()))) is not None:
            senders = ["-", f"={sender}"]
        if (subject := _pattern(getattr(subscriber, "_subject_filters", ()))) is not None:
            subjects = [f"kiwipy:{quote(exchange)} -", f"kiwipy:{quote(exchange)} ={subject}"]
    return [(sender, subject) for sender in senders for subject in subjects]


# --- inside -----------------------------------------------------------------------------------------


def _pattern(filters: Sequence[Callable[[Any], Any]]) -> str | None:
    """A pattern for all that passes these filters, and perhaps more; None: for everything."""
    if len(filters) != 1:
        return None
    expression = getattr(filters[0], "__self__", None)
    if isinstance(expression, re.Pattern):
        plain = isinstance(expression.pattern, str) and expression.flags == re.UNICODE.value
        return _pattern_of(expression.pattern) if plain else None
    [cell] = getattr(filters[0], "__closure__", None) or [None]
    value = getattr(cell, "cell_contents", None)  # what it compares with
    return _quoted(_text(value)) if isinstance(value, int | UUID) else None


def _pattern_of(expression: str) -> str | None:
    """`re.match` looks at the beginning only, so anything may follow."""
    parts = []
    end = 0
    for part in _PLAIN.finditer(expression):
        if part.start() != end or (len(part[0]) == 2 and part[0][0] == "\\" and part[0][1].isalnum()):
            return None
        end = part.end()
        parts.append({"[.]": ".", ".*": "#"}.get(part[0]) or part[0][-1].translate(_QUOTED))
    pattern = re.sub("#+", "#", "".join(parts) + "#")
    return pattern if end == len(expression) and _fits(pattern) else None


def _quoted(text: str) -> str | None:
    """As it stands in a name; None for what can't stand there."""
    quoted = text.translate(_QUOTED)
    return quoted if _fits(quoted) else None


def _fits(text: str) -> bool:
    """Whether it can stand in a name."""
    return len(text) <= MAX_TEXT_CHARS and speakable(text) == text


def _said(what: str, value: object) -> str:
    text = str(value)
    if speakable(text) != text:
        raise ValueError(f"the {what} {text!r:.100} can't be said in UTF-8; give another one, as ascii() makes it")
    return text


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool | int | float) and value == value // 1 else str(value)


T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
_envelopes = msgspec.msgpack.Decoder(Envelope)
_pendings = msgspec.msgpack.Decoder(Pending)
_replies = msgspec.msgpack.Decoder(Reply)


def _unpack(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"this is no message of a kiwipy application: {error}") from None
