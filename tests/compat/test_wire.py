"""Names and patterns on the wire: what the broker is told about filters never keeps back what a filter lets through."""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

import kiwipy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.compat.kiwipy import wire
from prunus.errors import ProtocolError
from prunus.messaging.patterns import matcher

letters = st.text("ab.*#%[]?-= \n/", max_size=6)
odd_letters = st.text("a.*\udce9", max_size=6)
UUIDS = [UUID(int=1), UUID(int=2)]
names = (
    st.none()
    | letters
    | odd_letters
    | st.integers(-2, 2)
    | st.sampled_from(UUIDS)
    | st.booleans()
    | st.sampled_from([1.0, 1.5])
)


def compiles(expression: str) -> bool:
    try:
        re.compile(expression)
    except (re.error, FutureWarning):  # a warning is an error in these tests
        return False
    return True


@st.composite
def filter_values(draw: st.DrawFn) -> Any:
    text = draw(letters | odd_letters)
    kind = draw(st.sampled_from(["text", "regex", "flags", "other"]))
    if kind == "other" or not compiles(text) or not compiles(text.replace(".", "[.]").replace("*", ".*")):
        return draw(st.integers(-2, 2) | st.sampled_from(UUIDS) | st.just(1.5))
    if kind == "text":
        return text
    return re.compile(text, re.IGNORECASE if kind == "flags" else 0)


def delivered(subscriber: Any, exchange: str, sender: Any, subject: Any, to_exchange: str | None = None) -> int:
    """How often the broker would deliver this broadcast to this subscriber, who may listen on another exchange."""
    return sum(
        bool(
            matcher(sender_pattern)(wire.sender_name(sender))
            and matcher(subject_pattern)(wire.subject_name(exchange, subject))
        )
        for sender_pattern, subject_pattern in wire.patterns(to_exchange or exchange, subscriber)
    )


@given(st.lists(filter_values(), max_size=2), st.lists(filter_values(), max_size=2), names, names, letters)
def test_the_broker_keeps_nothing_back(
    senders: list[Any], subjects: list[Any], sender: Any, subject: Any, exchange: str
) -> None:
    """What kiwipy's filter lets through is delivered, once; all of it is of the right exchange."""
    subscriber = kiwipy.BroadcastFilter(lambda *_: None)
    for value in senders:
        subscriber.add_sender_filter(value)
    for value in subjects:
        subscriber.add_subject_filter(value)
    times = delivered(subscriber, exchange, sender, subject)
    assert times <= 1
    try:
        filtered = subscriber.is_filtered(sender, subject)
    except TypeError:  # a regular expression, and a name that is no text: kiwipy does not call the subscriber
        filtered = True
    assert times or filtered
    assert not delivered(subscriber, exchange, sender, subject, exchange + "x")


@pytest.mark.parametrize(
    ("subject", "wanted", "unwanted"),
    [
        ("a.b", ["a.b", "a.bc", None], ["a.c", "axb", "b.a.b"]),
        ("a.*.c", ["a.b.c", "a..c", "a.b.b.c.d", None], ["a.b.d", "c"]),
        ("*.jones", ["bob.jones", "a.b.jones"], ["jones", "bob.smith"]),
        (re.compile(r"a\.b"), ["a.b"], ["axb"]),
        (5, [5, "5"], [6, "x"]),
        (UUIDS[0], [UUIDS[0]], [UUIDS[1]]),
    ],
)
def test_what_the_broker_can_decide_it_decides(subject: Any, wanted: list[Any], unwanted: list[Any]) -> None:
    """Texts with stars, plain regular expressions, numbers and UUIDs: what nobody wants is not sent at all."""
    subscriber = kiwipy.BroadcastFilter(lambda *_: None, subject=subject)
    assert [delivered(subscriber, "e", None, name) for name in wanted] == [1] * len(wanted)
    assert [delivered(subscriber, "e", None, name) for name in unwanted] == [0] * len(unwanted)


@pytest.mark.parametrize("subject", ["a+", "[ab]", re.compile("a.b"), re.compile("a", re.I), re.compile(r"\d")])
def test_what_the_broker_can_not_decide_is_delivered(subject: Any) -> None:
    assert delivered(kiwipy.BroadcastFilter(lambda *_: None, subject=subject), "e", "s", "something else") == 1


def test_plain_subscribers_hear_everything() -> None:
    assert wire.patterns("e", print) == [(None, "kiwipy:e #")]


@pytest.mark.parametrize("subject", ["caf\udce9*", re.compile("\udce9"), "caf*"])
def test_names_are_what_utf8_can_say(subject: Any) -> None:
    """Whatever the subject, the sender and the filter are: who may want to hear of it hears of it."""
    subscriber = kiwipy.BroadcastFilter(lambda *_: None, subject=subject, sender="caf\udce9.dat")
    said = [wire.sender_name("caf\udce9.dat"), wire.subject_name("e", "caf\udce9.dat")]
    for name in [*said, *(name for pair in wire.patterns("e", subscriber) for name in pair if name)]:
        name.encode()
    assert delivered(subscriber, "e", "caf\udce9.dat", "caf\udce9.dat") == 1


def test_names_of_exchanges_are_never_mixed_up() -> None:
    """Neither by spaces nor by stars in them."""
    assert wire.recipient_name("a b", "c") != wire.recipient_name("a", "b c")
    assert wire.subject_name("*", "x") != wire.subject_name("a", "x")
    assert not matcher(wire.patterns("*", print)[0][1])(wire.subject_name("a", "x"))


@pytest.mark.parametrize("depth", [-1, wire.MAX_FUTURES + 1, 10**12])
def test_no_message_makes_more_futures_than_there_may_be(depth: int) -> None:
    for message, unpack in (
        (wire.Pending(1, depth), wire.unpack_pending),
        (wire.Reply("result", depth), wire.unpack_reply),
    ):
        with pytest.raises(ProtocolError):
            unpack(wire.pack(message))


@given(st.binary())
def test_other_bytes_are_a_protocol_error(data: bytes) -> None:
    for unpack in (wire.unpack_envelope, wire.unpack_reply, wire.unpack_pending):
        try:
            unpack(data)
        except ProtocolError:
            continue
