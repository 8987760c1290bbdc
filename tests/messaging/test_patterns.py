"""Patterns of dotted names: what an AMQP topic matches, these match."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prunus.messaging.patterns import is_exact, matcher


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        (None, [None, "", "x", "a.b"], []),
        ("x", ["x"], [None, "", "xx", "X", "x.x"]),
        ("*", ["", "x", "x\ny"], [None, "a.b"]),
        ("#", ["", "x", "a.b.c", "x\ny"], [None]),
        ("state.*", ["state.done", "state."], ["state", "state.a.b", "xstate.a"]),
        ("state.#", ["state", "state.a", "state.a.b"], ["states", "x.state"]),
        ("#.done", ["done", "a.done", "a.b.done"], ["xdone", "done.a"]),
        ("a.#.c", ["a.c", "a.b.c", "a.b.b.c"], ["ac", "a.b", "xa.c"]),
        ("a.*.c", ["a.b.c", "a..c"], ["a.c", "a.b.b.c", "xa.b.c", "a.b.cx"]),
        ("*.*", ["a.b"], ["a", "a.b.c"]),
        ("pre*", ["pre", "prefix"], ["pre.fix", "xpre"]),
        ("(*)+", ["()+", "(x)+"], ["x", "(x)", "(x.y)+"]),
    ],
)
def test_what_a_pattern_matches(pattern: str | None, matching: list[str | None], others: list[str | None]) -> None:
    """``*`` stays within a word, ``#`` crosses words, everything else is itself."""
    match = matcher(pattern)
    assert [name for name in matching if not match(name)] == []
    assert [name for name in others if match(name)] == []


def test_an_exact_pattern_is_known() -> None:
    """It matches one name only, and can be looked up instead of being tried."""
    assert is_exact("a.b")
    assert not any(is_exact(pattern) for pattern in (None, "*", "a.#", "a*b"))


@given(st.text(max_size=20))
def test_a_name_without_wildcards_matches_itself_alone(name: str) -> None:
    """Also with characters that mean something in a regular expression."""
    plain = re.sub(r"[*#]", "", name)
    assert matcher(plain)(plain)
    assert not matcher(plain)(plain + "x")


@settings(max_examples=500)
@given(st.lists(st.sampled_from(["a", "b", "*", "#"]), max_size=6), st.lists(st.sampled_from(["a", "b"]), max_size=6))
@example(["#", "#", "a"], ["a"])
@example(["#", "a", "*"], ["a", "a", "a", "b"])
def test_it_is_the_same_as_word_by_word(pattern: list[str], words: list[str]) -> None:
    """Against the definition: ``*`` is one word, ``#`` is any number of words."""

    def fits(pattern: list[str], words: list[str]) -> bool:
        if not pattern:
            return not words
        if pattern[0] == "#":
            return fits(pattern[1:], words) or (bool(words) and fits(pattern, words[1:]))
        return bool(words) and pattern[0] in ("*", words[0]) and fits(pattern[1:], words[1:])

    if pattern and words:
        assert bool(matcher(".".join(pattern))(".".join(words))) is fits(pattern, words)


@settings(max_examples=500)
@given(st.text("ab.*#", max_size=8), st.text("ab.", max_size=9))
@example("#a*b", "a.ab")
@example("a*.#", "abc")
def test_it_is_the_same_as_trying_everything(pattern: str, name: str) -> None:
    """Against a search that goes back: no match is missed because the first place was taken."""
    if is_exact(pattern) or ".#.#" in f".{pattern}":
        return
    wild = re.compile(r"(^#\.|\.#(?=\.|$)|#|\*)")
    meaning = {"#.": r"(?:.*\.)?", ".#": r"(?:\..*)?", "#": ".*", "*": "[^.]*"}
    tidy = re.sub(r"\*+", "*", re.sub(r"[*#]*#[*#]*", "#", pattern))
    slow = "".join(meaning.get(part) or re.escape(part) for part in wild.split(tidy) if part)
    assert bool(matcher(pattern)(name)) is bool(re.fullmatch(slow, name))


@pytest.mark.parametrize("pattern", ["#a" * 100 + "#b", "*a" * 100 + "*b", "a*" * 200 + ".b", "#.a.*" * 50 + ".b"])
def test_a_hostile_pattern_costs_little(pattern: str) -> None:
    """A search that goes back over what it has read would not end before the sun does."""
    assert not matcher(pattern)("a" * 1024)
    assert not matcher(pattern)("a." * 512)
