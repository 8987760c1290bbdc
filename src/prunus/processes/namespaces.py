"""Nested values by attribute and by item: the shape of inputs, outputs and the context.

A name that the class needs for itself (``items``, ``values`` ...) can't be used as an attribute: the context refuses it
when it is set, a spec when a port is defined with it (`RESERVED`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

RESERVED = frozenset({"get", "items", "keys", "values"})


class FrozenNamespace(Mapping[str, Any]):
    """A mapping that never changes, whose items are attributes too.

    `about` begins the message of the error for a missing name: ``<about> has no 'x'; there are: a, b``.
    """

    __slots__ = ("_about", "_items")

    def __init__(self, items: dict[str, Any], about: object = "this namespace") -> None:
        _set_items(self, items)
        _set_about(self, about)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self._about} can't be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{self._about} can't be changed")

    def __getitem__(self, name: str) -> Any:
        try:
            return self._items[name]
        except KeyError:
            raise KeyError(self._lacks(name)) from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while a copy of it is being built
            raise AttributeError(name)
        try:
            return self._items[name]
        except KeyError:
            raise AttributeError(self._lacks(name)) from None

    def _lacks(self, name: str) -> str:
        return f"{self._about} has no {name!r}; there are: {', '.join(self._items) or 'none'}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self._items]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._items!r})"


# The descriptors of the slots: quicker than `object.__setattr__`, and each result of a process makes one of these.
_set_items = FrozenNamespace.__dict__["_items"].__set__
_set_about = FrozenNamespace.__dict__["_about"].__set__


class AttributeDict(dict[str, Any]):
    """A dictionary whose items are attributes too."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:  # (`__getattr__` alone is slow: an error is made before it is asked)
        if name not in _OWN:
            try:
                return self[name]
            except KeyError:
                pass
        return _own(self, name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"there is no {name!r} here; there are: {', '.join(self) or 'none'}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            raise AttributeError(f"{name!r} is a method here; use another name, or [{name!r}]")
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r} here") from None

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self]

    def copy(self) -> AttributeDict:
        return AttributeDict(_copy(self))


_OWN = frozenset(dir(AttributeDict))
"""What is a method, or belongs to every object."""
_own, _copy = object.__getattribute__, dict.copy


def freeze(values: Mapping[str, Any], about: object) -> FrozenNamespace:
    """`values` and all dictionaries in it, frozen. `about` is asked for its text when a name is missing."""
    return FrozenNamespace(
        {name: freeze(value, about) if isinstance(value, dict) else value for name, value in values.items()}, about
    )


def thaw(values: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite of `freeze`: plain dictionaries all the way down."""
    return {name: thaw(value) if isinstance(value, FrozenNamespace) else value for name, value in values.items()}
