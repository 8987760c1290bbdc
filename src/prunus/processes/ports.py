"""Ports: what values a process takes and gives.

A `Port` is one value, a `PortNamespace` a group of ports, to any depth. Both have one operation, ``fill``: check a
value, put in what it leaves out, and write down *every* problem by its dotted path.

Rules
- `MISSING` is "nothing was given"; ``None``, ``0``, ``""``, ``False`` and ``()`` are values.
- A value is left as it is, or it goes through the port's serializer, if it has one and the value is not of the valid
  type. What types accept is the matter of `prunus.processes.schemas`.
- The default of a port may be a function of the values beside it. They are made in the order in which they need each
  other, whatever the order of the ports; a circle is a problem that names its ports.
- A validator sees values that have the valid type and no other problem. That of a namespace is taken over by another
  class only together with all ports of the namespace (`PortNamespace.merge`), and sees these ports only.
- A port never changes. A namespace changes until it is frozen, with all namespaces in it; the copies that another class
  has taken over are its own.
"""

from __future__ import annotations

import copy
import datetime
import decimal
import enum
import inspect
import pathlib
import types
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prunus.errors import SpecError
from prunus.processes.namespaces import RESERVED, FrozenNamespace, thaw
from prunus.processes.schemas import Problems, Schema, brief, show, unknown


class Missing(enum.Enum):
    """The type of `MISSING`: there is no value (which is not the same as None)."""

    MISSING = "missing"

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = Missing.MISSING

Validator = Callable[[Any], str | None] | Callable[[Any, Any], str | None]
"""Takes a value, or a value and its port; returns None, or what is wrong (or raises `ValueError` with that text)."""

Serializer = Callable[[Any], Any]
"""Takes a value that is not of the valid type; returns one that is, or raises."""

Check = Callable[[Mapping[str, Any], str, Problems], object]
"""Looks at the values of a namespace, given its path, and adds what is wrong."""


class Port:
    """One value. `ProcessSpec.input` and `ProcessSpec.output` make it; it never changes.

    Raises `SpecError` for a default that does not fit, and for functions that take other arguments than they would get.
    """

    __slots__ = (
        *("_copy", "_default", "_is_made", "_is_right", "_takes_view", "_validate", "help", "metadata", "name"),
        *("quick", "required", "schema", "serializer", "shown_default", "validator"),
    )

    _copy: Callable[[Any], Any] | None
    _default: Any
    _is_made: bool
    """The default is a function."""
    _is_right: bool
    """The default is a value, and was found to fit when the port was defined."""
    _takes_view: bool
    _validate: Callable[[Any, Any], object] | None
    name: str
    schema: Schema
    required: bool
    validator: Validator | None
    serializer: Serializer | None
    help: str | None
    metadata: Mapping[str, Any]
    quick: frozenset[type]
    """A value whose very type is one of these needs no further look."""
    shown_default: str | None
    """For people, if somebody else than the port makes the default."""

    def __init__(
        self,
        path: str,
        schema: Schema,
        *,
        required: bool | None = None,
        default: Any = MISSING,
        validator: Validator | None = None,
        serializer: Serializer | None = None,
        help: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        shown_default: str | None = None,
    ) -> None:
        set_ = object.__setattr__
        set_(self, "name", path.rpartition(".")[2])
        if default is None and not schema.is_any and not schema.check(None, "", Problems()):
            schema = Schema((schema.annotation, None), path, reads=False)
        set_(self, "schema", schema)
        set_(self, "required", default is MISSING if required is None else required)
        set_(self, "validator", validator)
        set_(self, "_validate", _bind_validator(validator, path))
        set_(self, "serializer", serializer)
        set_(self, "help", help)
        set_(self, "metadata", _freeze(metadata or {}))
        set_(self, "shown_default", shown_default)
        set_(self, "quick", schema.quick if validator is None else frozenset())
        is_made = callable(default)
        set_(self, "_is_made", is_made)
        set_(self, "_takes_view", is_made and _takes_view(default, path))
        set_(self, "_default", default if is_made else copy.deepcopy(default))
        set_(self, "_copy", _copier_of(default))
        set_(self, "_is_right", False)
        if serializer is not None and schema.is_any:
            raise SpecError(f"{path!r}: a serializer is for values that are not of the valid type; give a valid_type")
        if default is MISSING or is_made or (serializer is not None and not schema.check(default, "", Problems())):
            return
        problems = Problems()
        set_(self, "_is_right", self._check(default, "", problems))
        for problem in problems.values():
            raise SpecError(f"the default of {path!r} does not fit its own port: {problem}")

    def __setattr__(self, name: str, value: object) -> None:
        raise SpecError(f"the port {self.name!r} can't be changed; define another one in `define`")

    def __delattr__(self, name: str) -> None:
        raise SpecError(f"the port {self.name!r} can't be changed; define another one in `define`")

    @property
    def has_default(self) -> bool:
        return self._default is not MISSING

    @property
    def default(self) -> Any:
        """The default, a copy of it, or the function that makes it; `MISSING` if there is none."""
        return self._default if self._is_made else copy.deepcopy(self._default)

    @property
    def is_computed(self) -> bool:
        """Whether the default is a function of the values beside it."""
        return self._takes_view

    @property
    def constant(self) -> Any:
        """The default, if all processes can share it as it is; else `MISSING`."""
        return self._default if self._is_right and self._copy is None else MISSING

    def fill(self, value: Any, path: str, problems: Problems, view: Mapping[str, Any] | None = None) -> Any:
        """The value, or the default if it is `MISSING`; `MISSING` if there is neither, or a problem with it."""
        if value is MISSING:
            if self._is_right:
                return self._default if self._copy is None else self._copy(self._default)
            if self._default is MISSING:
                if self.required:
                    problems[path] = f"expected {self.schema.text}, nothing was given"
                    problems.missing += (path,)
                return MISSING
            value = self._make_default(path, problems, view) if self._is_made else copy.deepcopy(self._default)
            if value is MISSING:
                return MISSING
        elif isinstance(value, FrozenNamespace):
            value = thaw(value)
        if self.serializer is not None and not self.schema.check(value, path, Problems()):
            try:
                value = self.serializer(value)
            except Exception as error:  # user code: whatever it raises is its way to say no
                text = str(error) if isinstance(error, ValueError) and str(error) else repr(error)
                problems[path] = f"the serializer could not convert {show(value)}: {text}"
                return MISSING
        return value if self._check(value, path, problems) else MISSING

    def _make_default(self, path: str, problems: Problems, view: Mapping[str, Any] | None) -> Any:
        try:
            return self._default(view) if self._takes_view else self._default()
        except _NotThereError:
            return MISSING
        except _CircleError as circle:
            if circle.names[0] == self.name:
                problems[path] = f"the defaults need each other in a circle: {' -> '.join(circle.names)}; give one"
                return MISSING
            raise
        except Exception as error:  # user code
            problems[path] = f"its default could not be made: {error!r}"
            return MISSING

    def _check(self, value: Any, path: str, problems: Problems) -> bool:
        if type(value) not in self.schema.quick and not self.schema.check(value, path, problems):
            return False
        if self._validate is not None and not (value is None and self._default is None):
            problem = _judge(self._validate, value, self)
            if problem is not None:
                problems[path] = problem
                return False
        return True

    def describe(self) -> dict[str, Any]:
        about: dict[str, Any] = {"type": self.schema.text, "required": self.required}
        if self.shown_default is not None:
            about["default"] = self.shown_default
        elif self.is_computed:
            about["default"] = "computed from the other values"
        elif self.has_default:
            about["default"] = _show_default(self._default)
        return _describe_more(about, self.help, self.metadata)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.schema.text}>"


class InputPort(Port):
    """One input."""

    __slots__ = ()


class OutputPort(Port):
    """One output."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _Taken:
    """A check that came with the ports of another class: it sees these only."""

    check: Check
    names: frozenset[str] | None
    """None for all."""


OPTIONS: Final = frozenset({"required", "dynamic", "valid_type", "validator", "help", "metadata"})
"""What may be said of a namespace."""


class PortNamespace:
    """A group of ports. A dynamic one also takes values for names that it has no port for, of its `schema`."""

    __slots__ = (
        *("_frozen", "_is_lazy", "_nested", "_plan", "_ready", "_taken", "_validate"),
        *("dynamic", "help", "metadata", "name", "ports", "required", "schema", "validator"),
    )

    def __init__(self, name: str = "") -> None:
        self._frozen = False
        self.name = name
        self.ports: Mapping[str, Port | PortNamespace] = {}
        self.required = True
        """An optional namespace that is not given is left out with all that is in it."""
        self.dynamic = False
        self.schema = Schema()
        """What values without a port may be."""
        self.validator: Validator | None = None
        self.help: str | None = None
        self.metadata: Mapping[str, Any] = {}
        self._validate: Callable[[Any, Any], object] | None = None
        self._taken: tuple[_Taken, ...] = ()
        self._plan: tuple[tuple[str, Port | PortNamespace, frozenset[type], Any], ...] = ()
        self._ready: dict[str, Any] | None = None
        self._is_lazy = False
        self._nested: tuple[tuple[str, PortNamespace], ...] = ()

    def __setattr__(self, name: str, value: object) -> None:
        if getattr(self, "_frozen", False):
            raise SpecError(f"the spec is complete and can't be changed any more; set {name!r} in `define`")
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        raise SpecError(f"the namespace {self.name!r} needs its {name!r}")

    @property
    def frozen(self) -> bool:
        """Whether it can't be changed any more."""
        return self._frozen

    @property
    def is_content_with_nothing(self) -> bool:
        """Whether `fill` makes an empty dictionary of one. Known when it is frozen."""
        return self._ready == {}

    # --- values -------------------------------------------------------------------------------------

    def fill(self, value: Any, path: str, problems: Problems, view: Mapping[str, Any] | None = None) -> Any:
        """A new plain dictionary with the given values and the defaults of the others; only when it is frozen."""
        if not self._frozen:
            raise SpecError(f"the namespace {path} is not complete yet; values are read when the class is defined")
        if value is MISSING:
            if not self.required:
                return MISSING
            value = {}
        elif type(value) is not dict and not isinstance(value, Mapping):
            problems[path] = f"expected a mapping (a namespace of ports), got {show(value)}"
            return MISSING
        if not value and self._ready is not None:
            return self._ready.copy()
        before = len(problems)
        filled: dict[str, Any]
        if self._is_lazy:
            filled = _Filling(self, value, path, problems).all()
        else:
            filled = {}
            used = 0
            for name, port, quick, constant in self._plan:
                item = value.get(name, MISSING)
                if item is MISSING:
                    if constant is not MISSING:
                        filled[name] = constant
                        continue
                else:
                    used += 1
                    if type(item) in quick:
                        filled[name] = item
                        continue
                item = port.fill(item, f"{path}.{name}", problems)
                if item is not MISSING:
                    filled[name] = item
            if used < len(value):
                self._fill_others(value, path, problems, filled)
        if len(problems) == before and (self._validate is not None or self._taken):
            self._run_checks(filled, path, problems)
        return filled

    def _fill_others(self, value: Mapping[str, Any], path: str, problems: Problems, filled: dict[str, Any]) -> None:
        for name in value:
            if name not in self.ports and value[name] is not MISSING:
                filled[name] = self.fill_unnamed(name, value[name], f"{path}.{name}", problems)

    def fill_unnamed(self, name: Any, value: Any, path: str, problems: Problems) -> Any:
        """A value for which there is no port."""
        if not isinstance(name, str):
            problems[path] = f"expected a text as the name, got {show(name)}"
        elif not self.dynamic:
            problems[path] = unknown("port", name, self.ports)
        else:
            return self._fill_dynamic(value, path, problems)
        return value

    def _fill_dynamic(self, value: Any, path: str, problems: Problems) -> Any:
        if isinstance(value, FrozenNamespace):
            value = thaw(value)
        probe = Problems()
        if self.schema.check(value, path, probe):
            return value
        if not isinstance(value, Mapping):
            problems.update(probe)
            return value
        filled = {}
        for key, item in value.items():
            if isinstance(key, str):
                filled[key] = self._fill_dynamic(item, f"{path}.{key}", problems)
            else:
                problems[f"{path}.{key}"] = f"expected a text as the name, got {show(key)}"
        return filled

    def _run_checks(self, filled: Mapping[str, Any], path: str, problems: Problems) -> None:
        before = len(problems)
        for taken in self._taken:
            names = taken.names
            seen = filled if names is None else {name: item for name, item in filled.items() if name in names}
            taken.check(seen, path, problems)
        if self._validate is not None and len(problems) == before:
            problem = _judge(self._validate, self.freeze_values(filled, f"the namespace {path}"), self)
            if problem is not None:
                problems[path] = problem

    def accept(self, segments: list[str], value: Any, path: str, problems: Problems) -> Any:
        """Check one `value` for the port at `segments`; the value to keep."""
        name, rest = segments[0], segments[1:]
        path = f"{path}.{name}"
        port = self.ports.get(name)
        if port is None:
            return self.fill_unnamed(name, value, ".".join((path, *rest)), problems)
        if not rest:
            return port.fill(value, path, problems)
        if isinstance(port, PortNamespace):
            return port.accept(rest, value, path, problems)
        problems[path] = f"this is a port, not a namespace; {'.'.join(rest)!r} can't be in it"
        return value

    def freeze_values(self, values: Mapping[str, Any], about: str) -> FrozenNamespace:
        """`values` for reading by attribute: namespaces are frozen, the values of ports are left as they are."""
        items = dict(values)
        for name, port in self._nested:
            if name in items:
                items[name] = port.freeze_values(items[name], about)
        return FrozenNamespace(items, about)

    # --- definition ---------------------------------------------------------------------------------

    def configure(self, path: str, options: Mapping[str, Any]) -> None:
        """Set those of `OPTIONS` that are given (not `MISSING`). Raises `SpecError`."""
        given = {name: value for name, value in options.items() if value is not MISSING}
        for name in given:
            if name not in OPTIONS:
                raise SpecError(
                    f"{path!r}: there is no option {name!r} of a namespace; there are: {', '.join(sorted(OPTIONS))}"
                )
        self._refuse_if_frozen(path)
        if "required" in given:
            self.required = bool(given["required"])
        if "dynamic" in given:
            self.dynamic = bool(given["dynamic"])
        if "valid_type" in given:
            self.schema = Schema(given["valid_type"], path, reads=False)
        if "validator" in given:
            _bind_validator(given["validator"], path)
            self.validator = given["validator"]
        if "help" in given:
            self.help = given["help"]
        if "metadata" in given:
            self.metadata = given["metadata"] or {}
        if not self.dynamic and not self.schema.is_any:
            raise SpecError(
                f"{path!r}: the valid_type of a namespace is for values without a port; say dynamic=True too"
            )

    def add(self, path: str, port: Port) -> None:
        """Put `port` at the dotted `path`; namespaces on the way are made. Raises `SpecError`."""
        on_the_way, _, name = path.rpartition(".")
        space = self.space(on_the_way, path)[0] if on_the_way else self
        space._put(name, port, path)

    def space(self, path: str, where: str | None = None) -> tuple[PortNamespace, bool]:
        """The namespace at the dotted `path`, and whether it is new: it is made if it is not there."""
        space, is_new = self, False
        for segment in path.split("."):
            inner = space.ports.get(segment)
            is_new = inner is None
            if inner is None:
                inner = PortNamespace(segment)
                space._put(segment, inner, where or path)
            if not isinstance(inner, PortNamespace):
                raise SpecError(f"{where or path!r}: {segment!r} is a port, so nothing can be in it")
            space = inner
        return space, is_new

    def _put(self, name: str, port: Port | PortNamespace, path: str) -> None:
        self._refuse_if_frozen(path)
        if not name.isidentifier() or name in RESERVED or name.startswith("_"):
            raise SpecError(f"{path!r}: {name!r} can't be the name of a port; take another identifier")
        if isinstance(self.ports.get(name), PortNamespace) and not isinstance(port, PortNamespace):
            raise SpecError(f"{path!r} is a namespace with ports in it; it can't be a port too")
        self.ports = {**self.ports, name: port}

    def _refuse_if_frozen(self, path: str) -> None:
        if self._frozen:
            raise SpecError(f"the spec is complete and can't be changed any more; define {path!r} in `define`")

    def find(self, path: str) -> Port | PortNamespace:
        """The port at the dotted `path`; `SpecError` if there is none."""
        space: Port | PortNamespace = self
        for segment in path.split("."):
            inner = space.ports.get(segment) if isinstance(space, PortNamespace) else None
            if inner is None:
                known = ", ".join(space.ports) if isinstance(space, PortNamespace) else ""
                raise SpecError(f"there is no port {path!r}; there are: {known or 'none'}")
            space = inner
        return space

    def merge(
        self, other: PortNamespace, include: tuple[str, ...] | None, exclude: tuple[str, ...]
    ) -> tuple[tuple[str, ...], bool]:
        """Take over the ports of `other`: those at or below an `include`d path, but none at or below an `exclude`d.

        A namespace that is taken over whole brings its validators. Returns the dotted paths of the ports, and of whole
        namespaces, that were taken over, and whether that is all.
        """
        for path in (*(include or ()), *exclude):
            other.find(path)
        wanted = None if include is None else [tuple(path.split(".")) for path in include]
        unwanted = [tuple(path.split(".")) for path in exclude]
        taken, is_whole = self._merge(other, (), wanted, unwanted)
        return tuple(taken), is_whole

    def _merge(
        self,
        other: PortNamespace,
        at: tuple[str, ...],
        wanted: list[tuple[str, ...]] | None,
        unwanted: list[tuple[str, ...]],
    ) -> tuple[list[str], bool]:
        """What was taken, and whether that is all of `other`."""
        taken: list[str] = []
        is_whole = wanted is None
        for name, port in other.ports.items():
            path = (*at, name)
            chosen = path not in unwanted and (wanted is None or any(path[: len(item)] == item for item in wanted))
            on_the_way = wanted is not None and any(item[: len(path)] == path for item in wanted)
            if path in unwanted or not (chosen or on_the_way):
                is_whole = False
            elif isinstance(port, Port):
                self._put(name, port, ".".join(path))
                taken.append(".".join(path))
            else:
                inner = self.ports.get(name)
                if inner is None:
                    inner = PortNamespace(name)
                    inner._adopt(port)
                    self._put(name, inner, ".".join(path))
                if not isinstance(inner, PortNamespace):
                    raise SpecError(f"{'.'.join(path)!r} is a port here; a namespace can't be exposed over it")
                below, all_below = inner._merge(port, path, None if chosen else wanted, unwanted)
                taken += [".".join(path)] if all_below else below
                is_whole = is_whole and all_below
        if is_whole:
            self._take_checks(other)
        return taken, is_whole

    def _adopt(self, other: PortNamespace) -> None:
        """Take over what is said of another namespace, but not what is in it, nor its checks."""
        self.required, self.dynamic, self.schema = other.required, other.dynamic, other.schema
        self.help, self.metadata = other.help, other.metadata

    def _take_checks(self, other: PortNamespace) -> None:
        names = None if other.dynamic else frozenset(other.ports)
        taken = [_Taken(one.check, names if one.names is None else one.names) for one in other._taken]
        if other._validate is not None:
            taken.append(_Taken(other._own_check, names))
        self._taken = (*self._taken, *taken)

    def _own_check(self, values: Mapping[str, Any], path: str, problems: Problems) -> None:
        assert self._validate is not None
        problem = _judge(self._validate, self.freeze_values(values, f"the namespace {path}"), self)
        if problem is not None:
            problems[path] = problem

    def add_check(self, check: Check, names: Iterable[str]) -> None:
        """Have the values of these ports looked at together; whoever takes over the whole namespace has it too."""
        self._taken = (*self._taken, _Taken(check, frozenset(names)))

    def drop_checks(self) -> None:
        """Forget the validators that were taken over."""
        self._taken = ()

    def freeze(self) -> None:
        """Refuse changes from now on, and prepare for reading values."""
        for port in self.ports.values():
            if isinstance(port, PortNamespace):
                port.freeze()
        if self._frozen:
            return
        self._validate = _bind_validator(self.validator, self.name)
        self.metadata = _freeze(self.metadata)
        plan: list[tuple[str, Port | PortNamespace, frozenset[type], Any]] = []
        for name, port in self.ports.items():
            if isinstance(port, Port):
                plan.append((name, port, port.quick, port.constant))
            else:
                plan.append((name, port, frozenset(), MISSING))
        self._plan = tuple(plan)
        self._nested = tuple((name, port) for name, port in self.ports.items() if isinstance(port, PortNamespace))
        self._is_lazy = any(isinstance(port, Port) and port.is_computed for port in self.ports.values())
        self._ready = self._ready_values()
        self.ports = types.MappingProxyType(dict(self.ports))
        self._frozen = True

    def _ready_values(self) -> dict[str, Any] | None:
        """What `fill` makes of nothing, if that is the same for all processes."""
        if self._validate is not None or self._taken:
            return None
        ready: dict[str, Any] = {}
        for name, port in self.ports.items():
            if isinstance(port, Port):
                if port.constant is not MISSING:
                    ready[name] = port.constant
                elif port.required or port.has_default:
                    return None
            elif port.required:
                return None
        return ready

    def describe(self) -> dict[str, Any]:
        about: dict[str, Any] = {"ports": {name: port.describe() for name, port in self.ports.items()}}
        if self.dynamic:
            about["dynamic"] = self.schema.text
        if not self.required:
            about["required"] = False
        return _describe_more(about, self.help, self.metadata)

    def __repr__(self) -> str:
        return f"<PortNamespace {self.name}: {', '.join(self.ports) or 'empty'}>"


# --- defaults that need each other ----------------------------------------------------------------------


class _NotThereError(Exception):
    """A default needs a value that has a problem of its own, which is told already."""


class _CircleError(Exception):
    """Defaults need each other."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        super().__init__(" -> ".join(names))


class _Filling(Mapping[str, Any]):
    """The values of a namespace while it is filled, read-only: who asks for one has it made.

    This is what a default that takes an argument is given.
    """

    __slots__ = ("_busy", "_done", "_failed", "_given", "_path", "_problems", "_space")

    def __init__(self, space: PortNamespace, given: Mapping[str, Any], path: str, problems: Problems) -> None:
        self._space, self._given, self._path, self._problems = space, given, path, problems
        self._done: dict[str, Any] = {}
        """`MISSING` for those that have no value."""
        self._failed: set[str] = set()
        self._busy: list[str] = []

    def all(self) -> dict[str, Any]:
        for name in self._space.ports:
            self._make(name)
        filled = {name: self._done[name] for name in self._space.ports if self._done[name] is not MISSING}
        self._space._fill_others(self._given, self._path, self._problems, filled)
        return filled

    def _make(self, name: str) -> Any:
        """The value of the port `name`; `MISSING` if it has none."""
        if name in self._done:
            return self._done[name]
        if name in self._busy:
            raise _CircleError((*self._busy[self._busy.index(name) :], name))
        port, before = self._space.ports[name], len(self._problems)
        self._busy.append(name)
        try:
            value = port.fill(self._given.get(name, MISSING), f"{self._path}.{name}", self._problems, self)
        finally:
            self._busy.pop()
        self._done[name] = value
        # A default that is not there for want of another value has no problem of its own.
        if value is MISSING and (len(self._problems) > before or (isinstance(port, Port) and port.has_default)):
            self._failed.add(name)
        return value

    def __getitem__(self, name: str) -> Any:
        port = self._space.ports.get(name)
        value = self._given.get(name, MISSING) if port is None else self._make(name)
        if name in self._failed:
            raise _NotThereError(name)
        if value is MISSING:
            raise KeyError(self._lacks(name))
        if isinstance(port, PortNamespace):
            return port.freeze_values(value, f"{self._path}.{name}")
        return value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(self._lacks(name)) from None

    def __iter__(self) -> Iterator[str]:
        for name in self._space.ports:
            if name not in self._busy and self._make(name) is not MISSING:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _lacks(self, name: str) -> str:
        return f"{self._path} has no value for {name!r}; there are ports for: {', '.join(self._space.ports) or 'none'}"


# --- functions of the user's ----------------------------------------------------------------------------


def _bind_validator(validator: Any, path: str) -> Callable[[Any, Any], object] | None:
    """A function of a value and a port, whichever of the two forms the validator has."""
    if validator is None:
        return None
    if not callable(validator) or inspect.iscoroutinefunction(validator):
        raise SpecError(f"{path!r}: a validator is a plain function of (value) or (value, port), not {validator!r}")
    try:
        signature = inspect.signature(validator)
    except (ValueError, TypeError):  # a function of C that does not tell
        return lambda value, port: validator(value)
    if _can_take(signature, 1):
        return lambda value, port: validator(value)
    if _can_take(signature, 2):
        return validator  # type: ignore[no-any-return]
    raise SpecError(f"{path!r}: a validator takes (value) or (value, port); {validator!r} takes {signature}")


def _takes_view(default: Any, path: str) -> bool:
    """Whether a function that makes a default takes the values beside it."""
    try:
        signature = inspect.signature(default)
    except (ValueError, TypeError):  # a function of C that does not tell
        return False
    if _can_take(signature, 0):
        return False
    if _can_take(signature, 1):
        return True
    raise SpecError(f"{path!r}: a default takes nothing, or the values beside it; {default!r} takes {signature}")


def _can_take(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _judge(validate: Callable[[Any, Any], object], value: Any, port: Port | PortNamespace) -> str | None:
    """What a validator says of `value`."""
    try:
        answer = validate(value, port)
    except Exception as error:  # user code: whatever it raises is its way to say no
        return str(error) if isinstance(error, ValueError) and str(error) else f"the validator failed with {error!r}"
    if answer is None or isinstance(answer, str):
        return "the validator says no, without a reason" if answer == "" else answer
    return f"the validator returned {show(answer)}; it must return None, or a text that says what is wrong"


# --- defaults and metadata ------------------------------------------------------------------------------

_ATOMS = (
    *(types.NoneType, bool, int, float, complex, str, bytes, enum.Enum, pathlib.PurePath, decimal.Decimal, uuid.UUID),
    *(datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo),
)


def _is_immutable(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_immutable, value))
    return isinstance(value, _ATOMS)


def _copier_of(default: Any) -> Callable[[Any], Any] | None:
    """What copies a default for each process; None if it needs no copies."""
    if _is_immutable(default):
        return None
    if type(default) in (list, set) and all(map(_is_immutable, default)):
        return list.copy if type(default) is list else set.copy
    if type(default) is dict and all(map(_is_immutable, default.values())):
        return dict.copy
    return copy.deepcopy


def _freeze(value: Any) -> Any:
    """A copy whose mappings, lists and sets can't be changed."""
    if isinstance(value, Mapping):
        return types.MappingProxyType({key: _freeze(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(map(_freeze, value))
    return frozenset(value) if isinstance(value, set) else copy.deepcopy(value)


def _show_default(default: Any) -> str:
    if not callable(default):
        return brief(default)
    try:
        return brief(default())
    except Exception as error:  # user code: a description is no place to fail
        return f"(could not be made: {error!r})"


def _describe_more(about: dict[str, Any], help: str | None, metadata: Mapping[str, Any]) -> dict[str, Any]:
    if help:
        about["help"] = help
    if metadata:
        about["metadata"] = plain(metadata)
    return about


def plain(value: Any) -> Any:
    """`value` as what JSON can hold; what has no such form is shown as a text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return getattr(value, "__qualname__", None) or brief(value)
