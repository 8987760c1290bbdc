"""Patterns of dotted names, for senders and subjects of broadcasts and for subjects of tasks.

===========  =========================================================================
``*``        any run of characters within one word (``state.*`` is like ``state.done``)
``#``        any run of characters, dots too (``state.#`` is like ``state`` and ``state.a.b``)
else         itself
None         everything, also what has no name
===========  =========================================================================

So a topic pattern of AMQP means here what it means there. Patterns come from peers that nobody vouches for, so a match
never goes back over what it has read: what follows a wildcard is looked for once, from left to right, and the first
place is taken for good. (A later one can't do better: all that comes after it can come after the first one too.)
"""

from __future__ import annotations

import re
from collections.abc import Callable

_WILD = re.compile(r"(^#\.|\.#(?=\.|$)|#|\*)")
_ANY_WORDS = {"#.": r"(?:.*?\.)??", ".#": r"(?:\..*?)??", "#": ".*?"}


def is_exact(pattern: str | None) -> bool:
    """Whether it matches one name only: itself."""
    return pattern is not None and "*" not in pattern and "#" not in pattern


def matcher(pattern: str | None) -> Callable[[str | None], object]:
    """Says whether a name matches `pattern` (a true value, or not)."""
    if pattern is None:
        return lambda _: True
    if is_exact(pattern):
        return lambda name: name == pattern
    matches = re.compile(_expression(pattern), re.DOTALL).match
    return lambda name: name is not None and matches(name)


def _expression(pattern: str) -> str:
    """A group for each ``#`` and what follows it up to the next one; within it a group for each ``*``."""
    pattern = re.sub(r"(?:(?<=\.)|^)#(?:\.#)+(?=\.|$)", "#", pattern)
    pattern = re.sub(r"\*+", "*", re.sub(r"[*#]*#[*#]*", "#", pattern))
    groups: list[list[str]] = [[""]]
    for part in _WILD.split(pattern):
        if part in _ANY_WORDS:
            groups.append([_ANY_WORDS[part]])
        elif part == "*":
            groups[-1].append("")
        else:
            groups[-1][-1] += re.escape(part)
    expression = ""
    for (first, *rest), following in zip(groups, [*groups[1:], None], strict=True):
        if following is None or following[0].startswith(_ANY_WORDS[".#"]):  # up to the end, or to that of a word
            end = r"\Z" if following is None else r"(?=\.|\Z)"
            text = "".join(map(_found, rest[:-1])) + (f"[^.]*{rest[-1]}" if rest else "") + end
        else:
            text = "".join(map(_found, rest))
        expression += f"(?>{first}{text})"
    return expression


def _found(text: str) -> str:
    """The rest of a word up to the first `text` in it; all of the word if that is empty."""
    return f"(?>[^.]*?{text})" if text else "(?>[^.]*)"
