"""What an annotation says of a value: check it, or read plain data into it.

`Schema` is an annotation, compiled once: ``float | None``, ``list[Point]``, ``dict[str, Path]``, ``Literal["a", "b"]``,
dataclasses, `msgspec.Struct`, TypedDict, pydantic models, to any depth. It has two operations:

* **check**, for the ports of a process: does the value fit as it is? Contents of lists, tuples, sets and mappings are
  looked at; an instance of a class fits, whatever is in it. Nothing is changed.
* **read**, for what comes over a wire (messages, arguments of queries and updates): a value that fits is kept as it is,
  the same object; plain data (what JSON or YAML can hold) is converted: a mapping to a dataclass, a list to a tuple, a
  text to a `datetime`, an `Enum`, a `Path`.

Rules
- A `bool` is no number here, though Python says so; an `int` may stand for a `float`, and both for a `complex`.
- A text is no ``Sequence[str]``, though Python says so.
- Every problem is written down with its path (``.points[3].x``), up to `MAX_PROBLEMS`.
- pydantic is never imported: a class can only be a pydantic model if somebody else has imported it.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import datetime
import decimal
import difflib
import enum
import inspect
import pathlib
import sys
import types
import typing
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import msgspec

from prunus.errors import InvalidInputError, SpecError

MAX_PROBLEMS = 20
"""More problems than that with one value are not told."""

MAX_SHOWN_CHARS = 60
"""A longer value is cut in the message of a problem."""


class Problems(dict[str, str]):
    """What is wrong, by dotted path."""

    missing: tuple[str, ...] = ()
    """The paths where a value is needed and none was given."""


class Schema:
    """An annotation, compiled. Raises `SpecError` if values can't be checked against it.

    `where` names the place of the annotation in errors. A tuple of annotations means any of them. Without `reads` it
    can only check, and then the fields of dataclasses need no annotations that can be evaluated here.
    """

    __slots__ = ("_node", "annotation", "quick", "text")

    def __init__(self, annotation: Any = Any, where: str = "the annotation", *, reads: bool = True) -> None:
        self.annotation = annotation
        self._node = _Compiler(reads).node(annotation, where)
        self.text = self._node.text
        """For people: ``int or None``."""
        self.quick = self._node.quick
        """A value whose very type is one of these fits; of others `check` must be asked."""

    @classmethod
    def unchecked(cls, annotation: Any) -> Schema:
        """A schema that says `annotation` and takes anything: somebody else looks at the values."""
        schema = cls()
        schema.annotation, schema.text = annotation, type_text(annotation)
        return schema

    @property
    def is_any(self) -> bool:
        """Whether every value fits."""
        return isinstance(self._node, _Anything)

    def check(self, value: Any, path: str, problems: Problems) -> bool:
        """Whether `value` fits as it is; if not, `problems` are added under `path`."""
        before = len(problems)
        self._run(value, path, problems, convert=False)
        return len(problems) == before

    def read_into(self, value: Any, path: str, problems: Problems) -> Any:
        """`value`, converted; if it can't be, `problems` are added under `path`."""
        return self._run(value, path, problems, convert=True)

    def read(self, value: Any) -> Any:
        """`value`, converted. Raises `ValueError` that tells every problem by its path (``.points[3].x: ...``)."""
        problems = Problems()
        value = self._run(value, "", problems, convert=True)
        if problems:
            raise ValueError("; ".join(f"{path}: {text}" if path else text for path, text in problems.items()))
        return value

    def _run(self, value: Any, path: str, problems: Problems, *, convert: bool) -> Any:
        try:
            return self._node.read(value, path, problems, convert)
        except RecursionError:
            problems[path] = f"expected {self.text}, got a value that is nested too deeply or contains itself"
            return value

    def __repr__(self) -> str:
        return f"Schema({self.text})"


class Arguments:
    """The parameters of a method, compiled from its signature; ``self`` is left out.

    Raises `SpecError` for a parameter that can't be given by name (``/``, ``*args``).
    """

    __slots__ = ("_name", "_order", "_others", "_parameters")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name: str = getattr(function, "__qualname__", repr(function))
        hints = annotations_of(function, self._name)
        self._parameters: dict[str, tuple[Schema, inspect.Parameter]] = {}
        self._others: Schema | None = None
        """Of ``**kwargs``."""
        order: list[str] = []
        for number, parameter in enumerate(inspect.signature(function).parameters.values()):
            name, kind = parameter.name, parameter.kind
            if number == 0 and name == "self":
                continue
            if kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
                raise SpecError(f"{self._name}: the parameter {name!r} can't be given by name; take a plain one")
            schema = Schema(hints.get(name, Any), f"{self._name}, {name!r}")
            if kind is parameter.VAR_KEYWORD:
                self._others = schema
                continue
            self._parameters[name] = schema, parameter
            if kind is parameter.POSITIONAL_OR_KEYWORD:
                order.append(name)
        self._order = tuple(order)

    def read(self, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The arguments by name, converted; those that were not given and have a default are left out.

        Raises `InvalidInputError` with every problem, by parameter.
        """
        given, problems = dict(kwargs or {}), Problems()
        for number, value in enumerate(args):
            if number >= len(self._order):
                taken = ", ".join(self._order) or "none"
                problems[f"argument {number + 1}"] = f"there is no such parameter; taken by position: {taken}"
            elif self._order[number] in given:
                problems[self._order[number]] = "was given twice, by position and by name"
            else:
                given[self._order[number]] = value
        read: dict[str, Any] = {}
        for name, value in given.items():
            if name in self._parameters:
                read[name] = self._parameters[name][0].read_into(value, name, problems)
            elif self._others is not None:
                read[name] = self._others.read_into(value, name, problems)
            else:
                problems[name] = unknown("parameter", name, self._parameters)
        for name, (schema, parameter) in self._parameters.items():
            if name not in given and parameter.default is parameter.empty:
                problems[name] = f"expected {schema.text}, nothing was given"
        if problems:
            raise InvalidInputError(self._name, problems)
        return read

    def describe(self) -> dict[str, dict[str, Any]]:
        """The parameters as plain data, for people and tools."""
        described: dict[str, dict[str, Any]] = {}
        for name, (schema, parameter) in self._parameters.items():
            described[name] = {"type": schema.text, "required": parameter.default is parameter.empty}
            if parameter.default is not parameter.empty:
                described[name]["default"] = brief(parameter.default)
        return described


# --- classes with fields --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a dataclass, a `msgspec.Struct`, a pydantic model, a named tuple or a TypedDict."""

    name: str
    annotation: Any
    required: bool
    default: Any = None
    factory: Callable[[], Any] | None = None
    """Makes the default, if it is not `default`."""
    key: str = ""
    """The name that data has for it (pydantic's alias, msgspec's rename)."""
    help: str | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


ModelKind = Literal["dataclass", "struct", "pydantic"]


def model_kind(kind: Any) -> ModelKind | None:
    """Which sort of class with typed fields `kind` is; None if it is none."""
    if not isinstance(kind, type):
        return None
    if issubclass(kind, msgspec.Struct):
        return "struct"
    if _is_pydantic(kind):
        return "pydantic"
    return "dataclass" if dataclasses.is_dataclass(kind) else None


def fields_of(instance: Any) -> dict[str, Any]:
    """The fields of an instance of a dataclass, a Struct or a pydantic model.

    The values are left as they are; those of a pydantic model are dumped (models in them are dictionaries then, which a
    checkpoint can hold and from which the model can be made again).
    """
    kind = type(instance)
    if isinstance(instance, msgspec.Struct):
        return {name: getattr(instance, name) for name in kind.__struct_fields__}
    if dataclasses.is_dataclass(kind):
        return {field.name: getattr(instance, field.name) for field in dataclasses.fields(kind)}
    dumped: dict[str, Any] = instance.model_dump()
    return dumped


def model_fields(kind: type[Any], where: str, names: Mapping[str, Any] | None = None) -> tuple[Field, ...]:
    """The fields of one of the three kinds of classes; `names` are others that its annotations may use.

    Raises `SpecError` for annotations that can't be read and for fields that nobody can give.
    """
    match model_kind(kind):
        case "pydantic":
            return tuple(_pydantic_fields(kind, where))
        case "struct":
            return tuple(_struct_fields(kind, where, names))
        case "dataclass":
            return tuple(_dataclass_fields(kind, where, names))
        case None:
            raise SpecError(
                f"{where} must be a dataclass, a msgspec.Struct or a pydantic model; put @dataclass(frozen=True) above "
                "it"
            )


def build_model(kind: type[Any], values: Mapping[str, Any], path: str, problems: Problems) -> Any:
    """An instance of `kind`, made by its constructor with `values`. What it refuses is added to `problems`."""
    if _is_pydantic(kind):
        return _validate_pydantic(kind, values, path, problems)
    try:
        return kind(**values)
    except Exception as error:  # user code: the __post_init__ of the class is a validator
        problems[path] = str(error) or repr(error)
        return None


def _dataclass_fields(kind: Any, where: str, names: Mapping[str, Any] | None) -> Iterable[Field]:
    hints = annotations_of(kind, where, names)
    for field in dataclasses.fields(kind):
        if not field.init:
            raise SpecError(f"{where}.{field.name}: a field with init=False can't be given by anybody")
        made, fixed = field.default_factory, field.default
        yield Field(
            field.name,
            hints[field.name],
            required=made is dataclasses.MISSING and fixed is dataclasses.MISSING,
            default=None if fixed is dataclasses.MISSING else fixed,
            factory=None if made is dataclasses.MISSING else made,
            key=field.name,
            help=field.metadata.get("help") or _annotated_help(hints[field.name]),
            metadata={name: value for name, value in field.metadata.items() if name != "help"},
        )


def _struct_fields(kind: Any, where: str, names: Mapping[str, Any] | None) -> Iterable[Field]:
    hints = annotations_of(kind, where, names)
    keys = dict(zip(kind.__struct_fields__, kind.__struct_encode_fields__, strict=True))
    optional = dict(zip(reversed(kind.__struct_fields__), reversed(kind.__struct_defaults__), strict=False))
    for name in kind.__struct_fields__:
        default = optional.get(name, msgspec.NODEFAULT)
        factory = getattr(default, "factory", None) if type(default).__module__.startswith("msgspec") else None
        yield Field(
            name,
            hints[name],
            required=default is msgspec.NODEFAULT,
            default=None if default is msgspec.NODEFAULT or factory is not None else default,
            factory=factory,
            key=keys[name],
            help=_annotated_help(hints[name]),
        )


def _pydantic_fields(kind: Any, where: str) -> Iterable[Field]:
    for name, about in kind.model_fields.items():
        alias = about.validation_alias if about.validation_alias is not None else about.alias
        if alias is not None and not isinstance(alias, str):
            raise SpecError(f"{where}.{name}: of aliases only a plain text can be used")
        factory = about.default_factory
        yield Field(
            name,
            about.annotation,
            required=about.is_required(),
            default=None if about.is_required() else about.default,
            factory=factory,
            key=alias or name,
            help=about.description,
            metadata=about.json_schema_extra if isinstance(about.json_schema_extra, dict) else {},
        )


def _annotated_help(annotation: Any) -> str | None:
    for item in getattr(annotation, "__metadata__", ()):
        if isinstance(item, msgspec.Meta) and item.description:
            return item.description
    return None


def _is_pydantic(kind: type) -> bool:
    pydantic = sys.modules.get("pydantic")
    base = getattr(pydantic, "BaseModel", None)
    return base is not None and issubclass(kind, base) and hasattr(kind, "model_fields")


def _validate_pydantic(kind: Any, value: Any, path: str, problems: Problems) -> Any:
    try:
        # By name too, because that is how ports and checkpoints call a field that has an alias.
        return kind.model_validate(value, by_name=True, by_alias=True)
    except ValueError as error:
        details = getattr(error, "errors", None)
        if details is None:
            problems[path] = str(error) or repr(error)
            return None
        names = {field.key: field.name for field in _pydantic_fields(kind, kind.__qualname__)}
        for detail in details(include_url=False)[:MAX_PROBLEMS]:
            place = path
            for depth, segment in enumerate(detail["loc"]):
                place = _inside(place, segment if depth else names.get(segment, segment))
            problems[place] = _pydantic_problem(detail)
    except Exception as error:  # user code: a validator of the model failed in another way
        problems[path] = f"the validator failed with {error!r}"
    return None


def _pydantic_problem(detail: Mapping[str, Any]) -> str:
    if detail["type"] == "missing":
        return "expected a value, nothing was given"
    reason = detail.get("ctx", {}).get("error")
    if isinstance(reason, Exception):
        return str(reason) or repr(reason)
    message: str = detail["msg"]
    return f"{message[:1].lower()}{message[1:]}, got {show(detail['input'])}"


# --- annotations ------------------------------------------------------------------------------------------


def annotations_of(thing: Any, where: str, names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The annotations of a class or function, evaluated. Raises `SpecError`."""
    try:
        try:
            return typing.get_type_hints(thing, include_extras=True)
        except NameError:
            if names is None:
                raise
            return typing.get_type_hints(thing, localns={**names, **vars(thing)}, include_extras=True)
    except Exception as error:  # evaluating annotations runs the user's expressions
        raise SpecError(
            f"{where}: an annotation can't be read ({error}); its names must be importable from the module at run time"
        ) from error


def type_text(annotation: Any) -> str:
    """An annotation for people: ``int or None``, ``list[float]``, ``'fast' or 'good'``."""
    if annotation is None or annotation is types.NoneType:
        return "None"
    if annotation is Any or annotation is object or isinstance(annotation, typing.TypeVar):
        return "any value"
    if isinstance(annotation, tuple):
        return " or ".join(dict.fromkeys(map(type_text, annotation)))
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(type_text, args)))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is typing.Annotated or origin in _QUALIFIERS:
        return type_text(args[0])
    if origin is collections.abc.Callable:
        return "Callable"
    if isinstance(origin, type) and args:
        inner = ("..." if item is ... else "Any" if item is Any else type_text(item) for item in args)
        return f"{origin.__name__}[{', '.join(inner)}]"
    return str(getattr(origin or annotation, "__name__", annotation))


def show(value: Any) -> str:
    """A value with its type, for a message."""
    return brief(value) if value is None else f"{brief(value)} ({type(value).__name__})"


def brief(value: Any) -> str:
    """A value for people, cut if it is long."""
    try:
        text = repr(value)
    except Exception as error:  # user code: a broken __repr__ must not hide the problem that is to be told
        text = f"(its repr failed with {type(error).__name__})"
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The problem with a name that does not exist: the nearest one, or all there are."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    if near:
        return f"there is no such {what}; did you mean {near[0]!r}?"
    return f"there is no such {what}; there are: {', '.join(names) or 'none'}"


def _inside(path: str, key: Any) -> str:
    """The path of what `key` stands for in the mapping or list at `path`."""
    return f"{path}.{key}" if isinstance(key, str) and key.isidentifier() else f"{path}[{key!r}]"


_QUALIFIERS = frozenset(
    qualifier
    for name in ("Required", "NotRequired", "ReadOnly", "Final", "ClassVar")
    if (qualifier := getattr(typing, name, None)) is not None
)


# --- what an annotation is compiled to --------------------------------------------------------------------


class _Node(Protocol):
    text: str
    quick: frozenset[type]
    """The very types whose values fit, without a further look."""
    same: frozenset[type]
    """Of these, the ones whose values `read` keeps as they are."""

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any: ...


_NONE: frozenset[type] = frozenset()


class _Anything:
    """Every value."""

    text = "any value"
    quick = same = _NONE

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any:
        return value


class _Class:
    """An instance of one class."""

    _BY_MSGSPEC: ClassVar = (
        *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta),
        *(uuid.UUID, decimal.Decimal, bytes, bytearray),
    )
    """What msgspec converts texts (and numbers) to."""

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.text = "None" if kind is types.NoneType else kind.__name__
        self.lends: tuple[type, ...] = {float: (int,), complex: (int, float)}.get(kind, ())
        """Whose values may stand for it."""
        self.same = frozenset((kind,))
        self.quick = frozenset((kind, *self.lends))

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any:
        kind = self.kind
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        if isinstance(value, self.lends) and not isinstance(value, bool):
            try:
                return kind(value) if convert else value
            except OverflowError:
                problems[path] = f"expected {self.text}, got a number that is too large for it"
                return value
        if convert:
            try:
                return self._convert(value)
            except (ValueError, TypeError):
                pass
        problems[path] = _expected(self.text, value)
        return value

    def _convert(self, value: Any) -> Any:
        kind = self.kind
        if issubclass(kind, enum.Enum):
            for member in kind:
                if type(member.value) is type(value) and member.value == value:
                    return member
        elif issubclass(kind, pathlib.PurePath) and isinstance(value, str):
            return kind(value)
        elif kind in self._BY_MSGSPEC:
            return msgspec.convert(value, kind)
        raise ValueError("no conversion")


class _OneOf:
    """``Literal``."""

    quick = same = _NONE

    def __init__(self, choices: tuple[Any, ...]) -> None:
        self.choices = choices
        self.text = " or ".join(map(repr, choices))

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any:
        for choice in self.choices:
            if type(value) is type(choice) and value == choice:
                return value
            if (
                convert
                and isinstance(choice, enum.Enum)
                and type(value) is type(choice.value)
                and value == choice.value
            ):
                return choice
        problems[path] = _expected(self.text, value)
        return value


class _Union:
    """Any of several."""

    def __init__(self, members: list[_Node]) -> None:
        self.members = members
        self.text = " or ".join(dict.fromkeys(member.text for member in members))
        self.quick = frozenset().union(*(member.quick for member in members))
        self.same = frozenset().union(*(member.same for member in members))

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any:
        if type(value) in (self.same if convert else self.quick):
            return value
        found: list[Any] = []
        for member in self.members:
            probe = Problems()
            member.read(value, path, probe, False)
            if not probe:
                if not convert:
                    return value
                found.append(member.read(value, path, probe, True))
                if found[-1] is value:
                    return value
        if found:
            return found[0]
        if convert:
            for member in self.members:
                probe = Problems()
                read = member.read(value, path, probe, True)
                if not probe:
                    return read
        alike = [member for member in self.members if _is_alike(member, value, convert)]
        if len(alike) == 1:
            return alike[0].read(value, path, problems, convert)
        problems[path] = _expected(self.text, value)
        return value


class _Items:
    """A list, set or the like, with items of one sort."""

    def __init__(self, origin: type, text: str, item: _Node) -> None:
        self.origin, self.text, self.item = origin, text, item
        self.quick = self.same = frozenset((origin,)) if isinstance(item, _Anything) else _NONE
        self.make: Callable[[list[Any]], Any] = _CONCRETE.get(origin, origin)

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any:
        fits = isinstance(value, self.origin) and not isinstance(value, (str, bytes, bytearray))
        if not fits and not (convert and isinstance(value, (list, tuple, set, frozenset, collections.deque))):
            problems[path] = _expected(self.text, value)
            return value
        item = self.item
        if fits and (
            isinstance(item, _Anything) or (item.same if convert else item.quick).issuperset(map(type, value))
        ):
            return value
        items, before, changed = [], len(problems), not fits
        for number, one in enumerate(value):
            read = item.read(one, f"{path}[{number}]", problems, convert)
            changed = changed or read is not one
            items.append(read)
            if len(problems) - before >= MAX_PROBLEMS:
                return value
        if not changed or not convert or len(problems) > before:
            return value
        try:
            return self.make(items)
        except TypeError as error:  # an item of a set that is not hashable
            problems[path] = f"expected {self.text}: {error}"
            return value


class _Tuple:
    """A tuple of a fixed length."""

    quick = same = _NONE

    def __init__(self, text: str, items: list[_Node]) -> None:
        self.text, self.items = text, items

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any:
        fits = isinstance(value, tuple)
        if not fits and not (convert and isinstance(value, list)):
            problems[path] = _expected(self.text, value)
            return value
        if len(value) != len(self.items):
            problems[path] = f"expected {self.text}, got {len(value)} items"
            return value
        items = [
            node.read(one, f"{path}[{number}]", problems, convert)
            for number, (node, one) in enumerate(zip(self.items, value, strict=True))
        ]
        if not convert or (fits and all(read is one for read, one in zip(items, value, strict=True))):
            return value
        return tuple(items)


class _Mapping:
    """A mapping with keys of one sort and values of one sort."""

    def __init__(self, origin: type, text: str, key: _Node, item: _Node) -> None:
        self.origin, self.text, self.key, self.item = origin, text, key, item
        is_any = isinstance(key, _Anything) and isinstance(item, _Anything)
        self.is_any = is_any
        self.quick = self.same = frozenset((origin,)) if is_any else _NONE

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any:
        fits = isinstance(value, self.origin)
        if not fits and not (convert and isinstance(value, Mapping)):
            problems[path] = _expected(self.text, value)
            return value
        if fits and self.is_any:
            return value
        read: dict[Any, Any] = {}
        before, changed = len(problems), not fits
        for key, one in value.items():
            place, probe = _inside(path, key), Problems()
            new_key = self.key.read(key, place, probe, convert)
            problems.update((at, f"the key: {problem}") for at, problem in probe.items())
            new = self.item.read(one, place, problems, convert)
            changed = changed or new is not one or new_key is not key
            read[new_key] = new
            if len(problems) - before >= MAX_PROBLEMS:
                return value
        return read if changed and convert and len(problems) == before else value


class _Fields:
    """A class with fields: a dataclass, a Struct, a named tuple; or a TypedDict, which is a mapping with fields."""

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind
        self.text = kind.__name__
        self.is_mapping = _is_typed_dict(kind)
        self.quick = self.same = _NONE if self.is_mapping else frozenset((kind,))
        self.fields: dict[str, tuple[Field, _Node]] = {}
        """By key; filled after it is made, because a class may contain itself."""
        self.tag: tuple[str, Any] | None = None

    def fill(self, where: str, compiler: _Compiler) -> None:
        kind: Any = self.kind
        fields: Iterable[Field]
        if self.is_mapping:
            hints = annotations_of(kind, where)
            fields = [Field(name, hints[name], _is_required(kind, name, hints[name]), key=name) for name in hints]
        elif issubclass(kind, tuple):
            hints = annotations_of(kind, where)
            optional = kind._field_defaults
            fields = [Field(name, hints.get(name, Any), name not in optional, key=name) for name in kind._fields]
        else:
            fields = model_fields(kind, where)
            config = getattr(kind, "__struct_config__", None)
            if config is not None and config.tag is not None:
                self.tag = config.tag_field, config.tag
        for field in fields:
            self.fields[field.key] = field, compiler.node(field.annotation, f"{where}.{field.name}")

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any:
        if not self.is_mapping and isinstance(value, self.kind):
            return value
        given: Any = value
        if convert and isinstance(value, (list, tuple)) and issubclass(self.kind, tuple):
            if len(value) > len(self.fields):
                problems[path] = f"expected {self.text}, got {len(value)} items"
                return value
            given = dict(zip(self.fields, value, strict=False))
        if not isinstance(given, Mapping) or not (convert or self.is_mapping):
            problems[path] = _expected(self.text, value)
            return value
        before, changed, read = len(problems), False, {}
        for key, one in given.items():
            if key not in self.fields:
                if self.tag is None or self.tag != (key, one):
                    problems[_inside(path, key)] = unknown("field", key, self.fields)
                continue
            field, node = self.fields[key]
            new = read[field.name] = node.read(one, f"{path}.{field.name}", problems, convert)
            changed = changed or new is not one
        for key, (field, node) in self.fields.items():
            if field.required and key not in given:
                problems[f"{path}.{field.name}"] = f"expected {node.text}, nothing was given"
        if len(problems) > before or not convert:
            return value
        if self.is_mapping:
            return read if changed or type(value) is not dict else value
        return build_model(self.kind, read, path, problems)


class _Pydantic:
    """A pydantic model: it reads plain data itself."""

    def __init__(self, kind: type[Any]) -> None:
        self.kind = kind
        self.text = kind.__name__
        self.quick = self.same = frozenset((kind,))

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any:
        if isinstance(value, self.kind):
            return value
        if not convert or not isinstance(value, Mapping):
            problems[path] = _expected(self.text, value)
            return value
        return _validate_pydantic(self.kind, value, path, problems)


class _Alias:
    """``type X = ...``, which may contain itself."""

    quick = same = _NONE
    node: _Node

    def __init__(self, text: str) -> None:
        self.text = text

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any:
        return self.node.read(value, path, problems, convert)


class _Bounded:
    """``Annotated[int, msgspec.Meta(gt=0)]``."""

    quick = same = _NONE

    def __init__(self, annotation: Any, inner: _Node) -> None:
        self.annotation, self.inner, self.text = annotation, inner, inner.text

    def read(self, value: Any, path: str, problems: Problems, convert: bool) -> Any:
        before = len(problems)
        value = self.inner.read(value, path, problems, convert)
        if len(problems) == before:
            try:
                msgspec.convert(value, self.annotation)
            except msgspec.ValidationError as error:
                text = str(error).partition(" - at ")[0].replace("`", "")
                problems[path] = f"{text[:1].lower()}{text[1:]}, got {show(value)}"
        return value


def _expected(text: str, value: Any) -> str:
    return f"expected {text}, got {show(value)}"


def _is_alike(member: _Node, value: Any, convert: bool) -> bool:
    """Whether the problems that `member` has with `value` say more than that it is none."""
    if isinstance(value, Mapping):
        return isinstance(member, _Mapping) or (
            isinstance(member, (_Fields, _Pydantic)) and (convert or getattr(member, "is_mapping", False))
        )
    if isinstance(member, _Items):
        return isinstance(value, member.origin if not convert else (list, tuple, set, frozenset))
    return isinstance(value, (list, tuple) if convert else tuple) and isinstance(member, _Tuple)


_CONCRETE: dict[type, Callable[[list[Any]], Any]] = {
    collections.abc.Sequence: list,
    collections.abc.MutableSequence: list,
    collections.abc.Collection: list,
    collections.abc.Set: frozenset,
    collections.abc.MutableSet: set,
}
"""What an abstract collection is made as."""

_COLLECTIONS = (list, set, frozenset, collections.deque, *_CONCRETE)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


class _Compiler:
    """From annotations to nodes. Without `reads` the fields of classes are not looked at: an instance is enough."""

    def __init__(self, reads: bool) -> None:
        self.reads = reads
        self.known: dict[Any, _Node] = {}
        """Classes and aliases by themselves, for those that contain themselves."""

    def node(self, annotation: Any, where: str) -> _Node:
        if annotation is None:
            return _Class(types.NoneType)
        if annotation is Any or annotation is object or isinstance(annotation, typing.TypeVar):
            return _Anything()
        if isinstance(annotation, tuple):
            return self._union(annotation, where)
        if isinstance(annotation, typing.NewType):
            return self.node(annotation.__supertype__, where)
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if origin in (typing.Union, types.UnionType):
            return self._union(args, where)
        if origin is Literal:
            return _OneOf(args)
        if origin in _QUALIFIERS:
            return self.node(args[0], where)
        if origin is typing.Annotated:
            return self._annotated(annotation, where)
        kind = origin or annotation
        if isinstance(kind, type):
            if kind in _COLLECTIONS:
                return _Items(kind, type_text(annotation), self.node(args[0] if args else Any, where))
            if kind in _MAPPINGS:
                key, item = args or (Any, Any)
                return _Mapping(kind, type_text(annotation), self.node(key, where), self.node(item, where))
            return self._tuple(annotation, args, where) if kind is tuple else self._class(kind, where)
        if type(annotation).__name__ == "TypeAliasType":  # ``type X = ...``, of Python 3.12
            return self._alias(annotation, where)
        raise SpecError(f"{where}: {annotation!r} is no type that values can be checked against")

    def _union(self, annotations: Iterable[Any], where: str) -> _Node:
        members = [self.node(annotation, where) for annotation in annotations]
        if not members:
            raise SpecError(f"{where}: an empty tuple is no type that values can be checked against")
        for member in members:
            if isinstance(member, _Anything):
                return member
        return members[0] if len(members) == 1 else _Union(members)

    def _tuple(self, annotation: Any, args: tuple[Any, ...], where: str) -> _Node:
        text = type_text(annotation)
        if args[1:] == (...,) or annotation in (tuple, typing.Tuple):  # noqa: UP006 - old annotations too
            return _Items(tuple, text, self.node(args[0] if args else Any, where))
        return _Tuple(text, [self.node(item, where) for item in args])

    def _class(self, kind: type[Any], where: str) -> _Node:
        if kind in self.known:
            return self.known[kind]
        if _is_typed_dict(kind) or (self.reads and (_is_named_tuple(kind) or _has_fields(kind))):
            node = self.known[kind] = _Fields(kind)
            node.fill(where, self)
            return node
        if self.reads and _is_pydantic(kind):
            return _Pydantic(kind)
        try:
            isinstance(None, kind)
        except TypeError as error:
            raise SpecError(f"{where}: values can't be checked against {kind.__name__} ({error})") from error
        return _Class(kind)

    def _annotated(self, annotation: Any, where: str) -> _Node:
        inner = self.node(annotation.__origin__, where)
        metas = [item for item in annotation.__metadata__ if isinstance(item, msgspec.Meta)]
        if all(getattr(meta, bound) is None for meta in metas for bound in _BOUNDS):
            return inner
        try:
            msgspec.json.Decoder(annotation)
        except TypeError as error:
            raise SpecError(f"{where}: {error}") from error
        return _Bounded(annotation, inner)

    def _alias(self, alias: Any, where: str) -> _Node:
        if alias not in self.known:
            node = self.known[alias] = _Alias(alias.__name__)
            node.node = self.node(alias.__value__, where)
        return self.known[alias]


def _is_required(kind: Any, name: str, annotation: Any) -> bool:
    """Whether a TypedDict needs a key. It does not know itself if its annotations are texts."""
    origin = typing.get_origin(annotation)
    return origin is typing.Required or (origin is not typing.NotRequired and name in kind.__required_keys__)


def _has_fields(kind: type[Any]) -> bool:
    return model_kind(kind) in ("dataclass", "struct")


def _is_typed_dict(kind: type[Any]) -> bool:
    return issubclass(kind, dict) and hasattr(kind, "__required_keys__")


def _is_named_tuple(kind: type[Any]) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_field_defaults")


_BOUNDS = ("gt", "ge", "lt", "le", "multiple_of", "pattern", "min_length", "max_length", "tz")
