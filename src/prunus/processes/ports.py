"""Ports: what values a process takes and gives.

A `Port` is one value, a `PortNamespace` a group of ports, to any depth. Both have one operation, ``fill``: check a
value, put in what it leaves out, and write down *every* problem by its dotted path. `bool` is not accepted where
`int` is asked for (it is one in Python, but hardly ever meant); `int` is accepted where `float` is asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from prunus.errors import SpecError
from prunus.processes.namespaces import RESERVED, FrozenNamespace, thaw


class Missing(enum.Enum):
    """The type of `MISSING`: there is no value (which is not the same as None)."""

    MISSING = "missing"

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing.MISSING

Validator = Callable[[Any], str | None]
"""Takes a value; returns None, or what is wrong with it (or raises `ValueError` with that text)."""

Types = tuple[type, ...] | None
"""The classes that a value may have; None for any."""

Problems = dict[str, str]
"""What is wrong, by dotted path."""

MAX_SHOWN_CHARS = 60
"""A longer value is cut in the message of a problem."""


@dataclass(frozen=True, slots=True)
class Port:
    """One value."""

    name: str
    types: Types = None
    required: bool = True
    default: Any = MISSING
    """A value (a mutable one is copied for each process), or a function without arguments that makes it."""
    validator: Validator | None = None
    help: str | None = None

    def fill(self, value: Any, path: str, problems: Problems) -> Any:
        """The value, or the default if it is `MISSING`; `MISSING` if there is neither."""
        if value is MISSING:
            if self.default is not MISSING:
                return self.default() if callable(self.default) else copy.deepcopy(self.default)
            if self.required:
                problems[path] = f"expected {describe_types(self.types)}, nothing was given"
            return MISSING
        if isinstance(value, FrozenNamespace):
            value = thaw(value)
        problem = self.problem(value)
        if problem is not None:
            problems[path] = problem
        return value

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`; None if it fits."""
        if not accepts(self.types, value):
            return f"expected {describe_types(self.types)}, {show(value)} was given"
        return judge(self.validator, value)

    def describe(self) -> dict[str, Any]:
        about: dict[str, Any] = {"type": describe_types(self.types), "required": self.required}
        if self.default is not MISSING:
            about["default"] = show(self.default()) if callable(self.default) else show(self.default)
        if self.help:
            about["help"] = self.help
        return about


class InputPort(Port):
    """One input."""

    __slots__ = ()


class OutputPort(Port):
    """One output."""

    __slots__ = ()


@dataclass(slots=True)
class PortNamespace:
    """A group of ports. A dynamic one also takes values for names that it has no port for, of its `types`."""

    name: str = ""
    required: bool = True
    """An optional namespace that is not given is left out with all that is in it."""
    dynamic: bool = False
    types: Types = None
    validator: Validator | None = None
    help: str | None = None
    ports: Mapping[str, Port | PortNamespace] = dataclasses.field(default_factory=dict)
    frozen: bool = dataclasses.field(default=False, init=False)

    def fill(self, value: Any, path: str, problems: Problems) -> Any:
        """A new plain dictionary with the given values and the defaults of the others."""
        if value is MISSING:
            if not self.required:
                return MISSING
            value = {}
        if not isinstance(value, Mapping):
            problems[path] = f"expected a mapping (a namespace of ports), {show(value)} was given"
            return MISSING
        before = len(problems)
        filled: dict[str, Any] = {}
        for name, port in self.ports.items():
            item = port.fill(value.get(name, MISSING), f"{path}.{name}", problems)
            if item is not MISSING:
                filled[name] = item
        if len(filled) < len(value) or any(name not in self.ports for name in value):
            for name in value:
                if name not in self.ports:
                    filled[name] = self._fill_unnamed(name, value[name], f"{path}.{name}", problems)
        if self.validator is not None and len(problems) == before:
            problem = judge(self.validator, FrozenNamespace(filled))
            if problem is not None:
                problems[path] = problem
        return filled

    def _fill_unnamed(self, name: Any, value: Any, path: str, problems: Problems) -> Any:
        if not isinstance(name, str):
            problems[path] = f"expected a text as the name, {show(name)} was given"
        elif not self.dynamic:
            problems[path] = self.unknown(name)
        elif not accepts(self.types, value):
            if isinstance(value, Mapping):
                return {key: self._fill_unnamed(key, item, f"{path}.{key}", problems) for key, item in value.items()}
            problems[path] = f"expected {describe_types(self.types)}, {show(value)} was given"
        return thaw(value) if isinstance(value, FrozenNamespace) else value

    def accept(self, segments: list[str], value: Any, path: str, problems: Problems) -> Any:
        """Check one `value` for the port at `segments`; the value to keep."""
        name, rest = segments[0], segments[1:]
        path = f"{path}.{name}"
        port = self.ports.get(name)
        if port is None:
            value = self._fill_unnamed(name, value, path, problems)
        elif not rest:
            value = port.fill(value, path, problems)
        elif isinstance(port, PortNamespace):
            value = port.accept(rest, value, path, problems)
        else:
            problems[path] = f"this is a port, not a namespace; {'.'.join(rest)!r} can't be in it"
        return value

    def unknown(self, name: str) -> str:
        """The problem with a name that has no port."""
        import difflib

        near = difflib.get_close_matches(name, self.ports, n=1)
        if near:
            return f"there is no such port; did you mean {near[0]!r}?"
        return f"there is no such port; there are: {', '.join(self.ports) or 'none'}"

    def freeze_values(self, values: Mapping[str, Any], about: str) -> FrozenNamespace:
        """`values` for reading by attribute: namespaces are frozen, the values of ports are left as they are."""
        nested = {name for name, port in self.ports.items() if isinstance(port, PortNamespace)}
        if not nested:
            return FrozenNamespace(dict(values), about)
        return FrozenNamespace(
            {
                name: port.freeze_values(value, about)
                if isinstance(port := self.ports.get(name), PortNamespace)
                else value
                for name, value in values.items()
            },
            about,
        )

    def add(self, path: str, port: Port | PortNamespace) -> None:
        """Put `port` at the dotted `path`; namespaces on the way are made. Raises `SpecError`."""
        space = self
        *on_the_way, name = path.split(".")
        for segment in on_the_way:
            inner = space.ports.get(segment)
            if inner is None:
                inner = PortNamespace(segment)
                space._put(segment, inner, path)
            if not isinstance(inner, PortNamespace):
                raise SpecError(f"{path!r}: {segment!r} is a port, so nothing can be in it")
            space = inner
        space._put(name, port, path)

    def _put(self, name: str, port: Port | PortNamespace, path: str) -> None:
        if self.frozen:
            raise SpecError(f"the spec is complete and can't be changed any more; define {path!r} in `define`")
        if not name.isidentifier() or name in RESERVED or name.startswith("_"):
            raise SpecError(f"{path!r}: {name!r} can't be the name of a port; take another identifier")
        self.ports = {**self.ports, name: port}

    def find(self, path: str) -> Port | PortNamespace:
        """The port at the dotted `path`; `SpecError` if there is none."""
        space: Port | PortNamespace = self
        for segment in path.split("."):
            inner = space.ports.get(segment) if isinstance(space, PortNamespace) else None
            if inner is None:
                raise SpecError(f"there is no port {path!r}")
            space = inner
        return space

    def merge(self, other: PortNamespace, include: Iterable[str] | None, exclude: Iterable[str] | None) -> None:
        """Take over the ports of `other`: those at or below an `include`d path, but none at or below an `exclude`d."""
        wanted = None if include is None else [tuple(path.split(".")) for path in include]
        unwanted = [tuple(path.split(".")) for path in exclude or ()]
        for path in (*(wanted or ()), *unwanted):
            other.find(".".join(path))
        self._merge(other, (), wanted, unwanted)

    def _merge(
        self,
        other: PortNamespace,
        at: tuple[str, ...],
        wanted: list[tuple[str, ...]] | None,
        unwanted: list[tuple[str, ...]],
    ) -> None:
        for name, port in other.ports.items():
            path = (*at, name)
            if path in unwanted:
                continue
            chosen = wanted is None or any(path[: len(item)] == item for item in wanted)
            if isinstance(port, PortNamespace):
                on_the_way = wanted is not None and any(item[: len(path)] == path for item in wanted)
                if chosen or on_the_way:
                    inner = dataclasses.replace(port, ports={})
                    inner._merge(port, path, None if chosen else wanted, unwanted)
                    self._put(name, inner, name)
            elif chosen:
                self._put(name, port, name)
        if not at and wanted is None and other.dynamic:
            self.dynamic, self.types = True, other.types

    def freeze(self) -> None:
        """Refuse changes from now on."""
        self.frozen = True
        self.ports = types.MappingProxyType(dict(self.ports))
        for port in self.ports.values():
            if isinstance(port, PortNamespace):
                port.freeze()

    def describe(self) -> dict[str, Any]:
        about: dict[str, Any] = {"ports": {name: port.describe() for name, port in self.ports.items()}}
        if self.dynamic:
            about["dynamic"] = describe_types(self.types)
        if not self.required:
            about["required"] = False
        if self.help:
            about["help"] = self.help
        return about


# --- types ------------------------------------------------------------------------------------------


def types_of(annotation: Any, where: str) -> Types:
    """The classes that values of `annotation` have: ``float | None``, ``list[float]``, ``Literal["a", "b"]`` ...

    What a container contains is not looked at. Raises `SpecError` if the annotation is no type.
    """
    if annotation is None:
        return (types.NoneType,)
    if annotation is Any or annotation is object or isinstance(annotation, typing.TypeVar):
        return None
    if isinstance(annotation, tuple):
        return _join(annotation, where)
    if isinstance(annotation, typing.NewType):
        return types_of(annotation.__supertype__, where)
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _join(typing.get_args(annotation), where)
    if origin is typing.Annotated:
        return types_of(typing.get_args(annotation)[0], where)
    if origin is Literal:
        return tuple({type(value): None for value in typing.get_args(annotation)})
    if isinstance(origin or annotation, type):
        return (origin or annotation,)
    raise SpecError(f"{where}: {annotation!r} is no type that values can be checked against")


def _join(annotations: Iterable[Any], where: str) -> Types:
    joined: dict[type, None] = {}
    for annotation in annotations:
        found = types_of(annotation, where)
        if found is None:
            return None
        joined.update(dict.fromkeys(found))
    return tuple(joined)


def choices_of(annotation: Any) -> Validator | None:
    """A validator for ``Literal[...]``."""
    if typing.get_origin(annotation) is not Literal:
        return None
    choices = typing.get_args(annotation)

    def is_one_of(value: Any) -> str | None:
        return None if value in choices else f"expected one of {', '.join(map(repr, choices))}; {show(value)} was given"

    return is_one_of


def accepts(expected: Types, value: Any) -> bool:
    """Whether `value` may stand where one of the types is expected."""
    if expected is None:
        return True
    if isinstance(value, bool):
        return bool in expected or object in expected
    if isinstance(value, expected):
        return True
    return isinstance(value, int) and float in expected


def judge(validator: Validator | None, value: Any) -> str | None:
    """What `validator` says of `value`."""
    if validator is None:
        return None
    try:
        return validator(value)
    except Exception as error:  # user code: whatever it raises is its way to say no
        return str(error) if isinstance(error, ValueError) else f"the validator failed with {error!r}"


def describe_types(expected: Types) -> str:
    """``int or None``."""
    if expected is None:
        return "any value"
    return " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in expected)


def show(value: Any) -> str:
    """A value with its type, for a message."""
    try:
        text = repr(value)
    except Exception as error:  # user code: a broken __repr__ must not hide the problem that is to be told
        text = f"(its repr failed with {type(error).__name__})"
    if len(text) > MAX_SHOWN_CHARS:
        text = text[: MAX_SHOWN_CHARS - 3] + "..."
    return text if value is None else f"{text} ({type(value).__name__})"
