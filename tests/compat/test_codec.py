"""Values as bytes: what goes in comes out, and nothing else does."""

from __future__ import annotations

import math
import os
from datetime import date, datetime, timedelta, timezone
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.compat.kiwipy.codec import MAX_DEPTH, decode, encode

zones = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
hashable = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.text("a\u00e9\ud800\udce9\udfff")
    | st.binary()
    | st.uuids()
    | st.dates()
    | st.datetimes(timezones=st.none() | zones),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
values = st.recursive(
    hashable | st.sets(hashable, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hashable, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=10,
)


def same(one: Any, other: Any) -> bool:
    """Equal, and of equal types all through."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, datetime):
        return bool(one == other and one.utcoffset() == other.utcoffset())
    return bool(one == other)


@given(values)
def test_what_goes_in_comes_out(value: Any) -> None:
    """With the same types, tuples and sets and keys that are no texts included."""
    assert same(decode(encode(value)), value)


@pytest.mark.parametrize("number", [-(2**63) - 1, -(2**63), 2**63, 2**64 - 1, 2**64, 10**1000, -(10**1000)])
def test_integers_of_any_size(number: int) -> None:
    assert decode(encode(number)) == number


@pytest.mark.parametrize("text", [os.fsdecode(b"caf\xe9.dat"), "\ud83d\ude00", "\ud800", "\udfff\U0001f600"])
def test_texts_that_utf8_can_not_say(text: str) -> None:
    """As values and as keys; two halves of a character stay two."""
    assert same(decode(encode([text, {text: 1, "a": text}])), [text, {text: 1, "a": text}])


def test_not_a_number() -> None:
    assert math.isnan(decode(encode(math.nan)))


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Colour.RED, "red"),
        ({Colour.RED: 1}, {"red": 1}),
        (bytearray(b"x"), b"x"),
        (MappingProxyType({"a": 1}), {"a": 1}),
        (MappingProxyType({1: 2}), {1: 2}),
    ],
)
def test_subclasses_arrive_as_what_they_are_a_subclass_of(value: Any, plain: Any) -> None:
    assert same(decode(encode(value)), plain)


@pytest.mark.parametrize("value", [object(), len, ValueError("x"), type, [object()], {"a": {1: object()}}, (object(),)])
def test_anything_else_is_refused(value: Any) -> None:
    """The error names the type."""
    with pytest.raises(TypeError, match="can't be sent"):
        encode(value)


def test_what_contains_itself_is_refused() -> None:
    """So is what is nested too deeply; what is not, is not."""
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ValueError, match="contains itself"):
        encode(value)
    nested: Any = ()
    for _ in range(MAX_DEPTH):
        nested = (nested,)
    assert same(decode(encode(nested)), nested)
    with pytest.raises(ValueError, match="nested"):
        encode((nested,))


@given(st.binary())
def test_other_bytes_are_a_value_error(data: bytes) -> None:
    """Whatever they are, and nothing is made of them but plain data."""
    try:
        value = decode(data)
    except ValueError:
        return
    encode(value)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\xd4\x63x", b"\xc7\x02\x08zz", b"\xd4\x01\xc1", b"\xd4\x02\x91"])
def test_bytes_that_are_none_of_ours(data: bytes) -> None:
    with pytest.raises(ValueError, match="same encoder and decoder"):
        decode(data)


def test_a_date_is_no_datetime() -> None:
    assert same(decode(encode([date(2000, 1, 2), datetime(2000, 1, 2)])), [date(2000, 1, 2), datetime(2000, 1, 2)])
