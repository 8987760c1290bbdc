"""A process as bytes: the checkpoint codec. Pure: no I/O, no clock; it imports only what a checkpoint names.

A checkpoint is an *envelope* around a *payload*::

    [ "prunus", format, class id, class version, crc32, payload ]         (msgpack)

The envelope can be read without the user's code, so that a process whose class is gone can still be listed, shown
and set aside. The checksum is there to notice damage (a torn write, a bad cable), not malice, and CRC-32 does that
at the speed of memory. It covers the whole envelope.

The payload is the snapshot: a mapping of text to *values*. Rules:

* A value comes back equal and **of the same type**, or it is refused with `UnsavableValueError`, which names the place
  (``context.points[3].calc``), before anything is written. So a subclass of ``str``, ``dict`` or ``tuple`` is refused;
  an ``Enum`` or a dataclass is kept by the name of its type (``module:QualName``), the fields of a dataclass as values.
* JSON-like values (None, bool, int, float, str, list, dict with text keys) and ``bytes`` are plain msgpack. What JSON
  lacks is a msgpack extension whose data is msgpack again (`Tag`). The numbers of the tags never change their meaning.
* Rebuilding runs no constructor of the user's: a dataclass is filled field by field (neither ``__init__`` nor
  ``__post_init__`` runs; a field that is newer than the checkpoint gets its default), an enum is looked up. Anything
  else under that name is refused.
* numpy's scalars become Python's (``np.float64(1.0)`` comes back as ``1.0``): science code is full of them, and
  their numbers survive exactly. Arrays are refused: a list or a file says better what is meant.
* One object that is referred to twice comes back as two equal ones. Cycles are refused.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import itertools
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
from msgspec.msgpack import Ext

from prunus.errors import (
    CheckpointCorruptError,
    CheckpointIncompatibleError,
    Failure,
    ProcessClassNotFoundError,
    UnsavableValueError,
)
from prunus.processes.namespaces import FrozenNamespace, freeze, thaw
from prunus.processes.result import ProcessResult

FORMAT = 1
"""The format that is written. All formats from 1 to this one are read."""
MAX_DEPTH = 100
"""How many collections may lie inside one another; a value that contains itself is over any bound."""

_MAGIC = "prunus"

LoadType = Callable[[str], Any]
"""From ``module:QualName`` to what stands there (the codec looks whether it is an enum or a dataclass); raises
`ProcessClassNotFoundError`."""


_NOT_MSGPACK = (msgspec.DecodeError, UnicodeDecodeError)
"""What msgspec raises for noise: text that is not UTF-8 is an error of its own."""


class Tag(enum.IntEnum):
    """The msgpack extensions: what JSON has no form for. Numbers are for ever."""

    BIG_INT = 1
    ODD_TEXT = 2
    TUPLE = 3
    SET = 4
    FROZENSET = 5
    PAIRS = 6
    COMPLEX = 7
    DECIMAL = 8
    UUID = 9
    PATH = 10
    PURE_PATH = 11
    DATE = 12
    TIME = 13
    DATETIME = 14
    TIMEDELTA = 15
    ENUM = 16
    DATACLASS = 17
    FAILURE = 18
    RESULT = 19
    NAMESPACE = 20


class _Envelope(msgspec.Struct, array_like=True, frozen=True):
    magic: str
    format: int
    class_id: str
    class_version: int
    checksum: int
    payload: bytes


class _Head(msgspec.Struct, array_like=True, frozen=True):
    """What every format, also a future one, begins with."""

    magic: str
    format: int


def encode_checkpoint(snapshot: Mapping[str, Any], *, class_id: str, class_version: int) -> bytes:
    """`snapshot` as a checkpoint; raises `UnsavableValueError` naming the value that has no form."""
    payload = encode_data(snapshot)
    checksum = _checksum(FORMAT, class_id, class_version, payload)
    return _ENCODER.encode(_Envelope(_MAGIC, FORMAT, class_id, class_version, checksum, payload))


def decode_checkpoint(data: bytes) -> Checkpoint:
    """Open the envelope; the values are decoded when `Checkpoint.snapshot` asks for them.

    Raises `CheckpointCorruptError` (these are not the bytes that were written) or `CheckpointIncompatibleError`
    (a newer Prunus wrote them).
    """
    try:
        envelope = _ENVELOPE_DECODER.decode(data)
    except _NOT_MSGPACK as error:
        _refuse_newer_format(data)
        raise CheckpointCorruptError("it is not a checkpoint, or a part is missing") from error
    if envelope.magic != _MAGIC:
        raise CheckpointCorruptError("it is not a checkpoint")
    if envelope.format > FORMAT:
        raise CheckpointIncompatibleError(envelope.format, FORMAT)
    found = _checksum(envelope.format, envelope.class_id, envelope.class_version, envelope.payload)
    if found != envelope.checksum or envelope.format < 1:
        raise CheckpointCorruptError("its checksum does not match")
    return Checkpoint(envelope.format, envelope.class_id, envelope.class_version, envelope.payload)


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened envelope. The user's classes are needed only for `snapshot`."""

    format: int
    class_id: str
    class_version: int
    payload: bytes = dataclasses.field(repr=False)

    def snapshot(self, load_type: LoadType | None = None) -> dict[str, Any]:
        """The values, newly built at each call. Raises as `decode_value` does."""
        return decode_data(self.payload, load_type)

    @property
    def gist(self) -> Gist:
        """What can be read without the user's types."""
        try:
            return msgspec.msgpack.decode(self.payload, type=Gist)
        except _NOT_MSGPACK as error:
            raise CheckpointCorruptError("its snapshot can't be read") from error


class Gist(msgspec.Struct, frozen=True):
    """What whoever ends a process without its code has to know of its snapshot."""

    has_last_step: bool = True
    """Its class has an ``on_kill``. (A checkpoint that does not say so may be of such a class.)"""
    outputs: msgspec.Raw = msgspec.Raw(b"\x80")
    """As they were encoded; none is an empty mapping."""

    def encode_result(self, result: ProcessResult[Any]) -> bytes:
        """`result` as `encode_data` writes it, with these outputs."""
        return _ENCODER.encode({**_form(result.to_data(), MAX_DEPTH), "outputs": self.outputs})


def encode_data(data: Mapping[str, Any], where: str = "") -> bytes:
    """A mapping of values as bytes, for instance a result as plain data. `where` begins the path of a complaint."""
    return encode_value(dict(data), where)


def decode_data(data: bytes, load_type: LoadType | None = None) -> dict[str, Any]:
    """What `encode_data` wrote. Raises as `decode_value` does."""
    value = decode_value(data, load_type)
    if type(value) is not dict:
        raise CheckpointCorruptError(f"a mapping was expected where a {type(value).__name__} is")
    return value


def encode_value(value: Any, where: str = "value") -> bytes:
    """One value as bytes; raises `UnsavableValueError` with the dotted path from `where` on."""
    try:
        return _ENCODER.encode(_form(value, MAX_DEPTH))
    except _Unsavable as error:
        raise UnsavableValueError(error.path(where), error.type) from None


def decode_value(data: bytes, load_type: LoadType | None = None) -> Any:
    """What `encode_value` wrote. Enums and dataclasses come from `load_type` (None: `type_loader()`).

    Raises `CheckpointCorruptError`, or `ProcessClassNotFoundError` for a type that is missing here, is not allowed or
    has changed: the bytes are sound then (restoring a backup would not help), but this installation lacks the code
    that they need, exactly as if the process class itself were missing.
    """
    return (_READER if load_type is None else _Reader(load_type)).read(data)


def type_loader(allowed: Sequence[str] = ("*",)) -> LoadType:
    """A loader that imports modules whose name matches one of the patterns `allowed` (``mylab.*``), no others.

    Prunus' own modules are always allowed.
    """
    patterns = ("prunus.*", *allowed)

    def load(identifier: str) -> Any:
        module_name, _, qualname = identifier.partition(":")
        if not any(fnmatchcase(module_name, pattern) for pattern in patterns):
            raise ProcessClassNotFoundError(identifier, f"the module {module_name} is not allowed in this profile")
        try:
            target: Any = sys.modules.get(module_name) or importlib.import_module(module_name)
            for name in qualname.split("."):
                target = getattr(target, name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ProcessClassNotFoundError(identifier, f"a saved value needs it, but: {error}") from error
        return target

    return load


def amend_checkpoint(data: bytes, amend: Callable[[dict[str, Any]], None]) -> bytes:
    """The checkpoint with another snapshot: `amend` changes the mapping that it gets. Needs none of the user's classes:
    what has a form of its own (`Tag`) stays the opaque extension that it is, and what is put in must be JSON-like.

    Raises as `decode_checkpoint` does.
    """
    checkpoint = decode_checkpoint(data)
    try:
        snapshot = msgspec.msgpack.decode(checkpoint.payload)
    except _NOT_MSGPACK as error:
        raise CheckpointCorruptError("its payload can't be read") from error
    if type(snapshot) is not dict:
        raise CheckpointCorruptError("its payload is no mapping")
    amend(snapshot)
    format, class_id, version = checkpoint.format, checkpoint.class_id, checkpoint.class_version
    payload = msgspec.msgpack.encode(snapshot)
    return _ENCODER.encode(
        _Envelope(_MAGIC, format, class_id, version, _checksum(format, class_id, version, payload), payload)
    )


def checkpoint_as_yaml(data: bytes) -> str:
    """A checkpoint for people. Needs none of the user's classes, and can't be loaded back."""
    import yaml

    checkpoint = decode_checkpoint(data)
    head = {"format": checkpoint.format, "class": checkpoint.class_id, "version": checkpoint.class_version}
    document = {**head, "snapshot": _Shower().read(checkpoint.payload)}

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def show(dumper: Any, value: _Shown) -> Any:
        if isinstance(value.content, dict):
            return dumper.represent_mapping(value.tag, value.content)
        if isinstance(value.content, list):
            return dumper.represent_sequence(value.tag, value.content)
        return dumper.represent_scalar(value.tag, str(value.content))

    Dumper.add_representer(_Shown, show)
    text: str = yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


# --- from values to msgpack -------------------------------------------------------------------------


class _Unsavable(Exception):
    """A value without a form; the path gathers on the way up, innermost first."""

    def __init__(self, type: str) -> None:
        self.type = type
        self.parts: list[str] = []

    def path(self, where: str) -> str:
        parts = [where, *reversed(self.parts)]
        if len(parts) > 12:
            parts[10:-1] = [" ... "]
        return "".join(parts).removeprefix(".")


def _form(value: Any, depth: int) -> Any:
    """`value` as something that msgpack writes without losing its type; `depth` collections may still be inside."""
    return _FORMS.get(type(value), _rare)(value, depth)


def _atom(value: Any, depth: int) -> Any:
    return value


def _int(value: int, depth: int) -> Any:
    return value if -(2**63) <= value < 2**64 else _tagged(Tag.BIG_INT, hex(value))


def _str(value: str, depth: int) -> Any:
    return value if value.isascii() or _is_unicode(value) else _odd_text(value)


def _odd_text(value: str) -> Ext:
    """Text with lone surrogates (a file name that is not UTF-8): not Unicode, so not msgpack text."""
    return _tagged(Tag.ODD_TEXT, value.encode("utf-8", "surrogatepass"))


def _list(value: Iterable[Any], depth: int) -> list[Any]:
    _check(value, depth)
    out: list[Any] = []
    try:
        for item in value:
            kind = type(item)
            out.append(item if kind in _ATOMS else _FORMS.get(kind, _rare)(item, depth - 1))
    except _Unsavable as error:
        error.parts.append(f"[{len(out)}]")
        raise
    return out


def _dict(value: dict[Any, Any], depth: int) -> Any:
    _check(value, depth)
    out: dict[str, Any] = {}
    key: Any = None
    try:
        for key, item in value.items():
            if type(key) is not str or not (key.isascii() or _is_unicode(key)):
                break
            kind = type(item)
            out[key] = item if kind in _ATOMS else _FORMS.get(kind, _rare)(item, depth - 1)
        else:
            return out
    except _Unsavable as error:
        error.parts.append(f".{key}")
        raise
    return _pairs(value, depth)


def _pairs(value: dict[Any, Any], depth: int) -> Ext:
    out: list[Any] = []
    for key, item in value.items():
        part = f"[{key!r:.40}]"
        try:
            out.append(_form(key, depth - 1))
            part = f".{key}" if type(key) is str else part
            out.append(_form(item, depth - 1))
        except _Unsavable as error:
            error.parts.append(part)
            raise
    return _tagged(Tag.PAIRS, out)


def _rare(value: Any, depth: int) -> Any:
    """What the table of exact types has no entry for."""
    if isinstance(value, enum.Enum):
        member = value.value if isinstance(value, enum.Flag) else value.name
        return _tagged(Tag.ENUM, [_identifier(type(value)), member])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _dataclass(value, depth)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in "biufcSU":
        scalar = value.item()
        if type(scalar) in _NUMPY_SCALARS:  # a longdouble has no Python type that holds it
            return _form(scalar, depth)
    raise _Unsavable(_describe(value))


def _dataclass(value: Any, depth: int) -> Ext:
    _check(value, depth)
    kind = type(value)
    if not _is_plain_dataclass(kind):  # it is also a str, a dict, an exception: more than its fields
        raise _Unsavable(_describe(value))
    identifier = _identifier(kind)
    names = [field.name for field in dataclasses.fields(value)]
    fields: dict[str, Any] = {}
    extra = [name for name in getattr(value, "__dict__", ()) if name not in names]
    for name in itertools.chain(names, extra):
        try:
            if name not in names:
                if not isinstance(getattr(kind, name, None), functools.cached_property):
                    raise _Unsavable(f"{_describe(getattr(value, name))} (not a field of its dataclass)")
            elif hasattr(value, name):  # a field that was never set stays unset
                fields[name] = _form(getattr(value, name), depth - 1)
        except _Unsavable as error:
            error.parts.append(f".{name}")
            raise
    return _tagged(Tag.DATACLASS, [identifier, fields])


def _failure(value: Failure, depth: int) -> Ext:
    try:
        return _tagged(Tag.FAILURE, msgspec.to_builtins(value))
    except TypeError as error:
        raise _Unsavable(f"{_describe(value)} with facts that are not plain") from error


def _result(value: ProcessResult, depth: int) -> Ext:
    return _tagged(Tag.RESULT, _dict(value.to_data(), depth))


def _namespace(value: FrozenNamespace, depth: int) -> Ext:
    return _tagged(Tag.NAMESPACE, [_dict(thaw(value), depth), str(value._about)])


def _datetime(value: datetime, depth: int) -> Ext:
    return _tagged(Tag.DATETIME, [value.replace(tzinfo=None).isoformat(), value.fold, _zone(value.tzinfo)])


def _time(value: time, depth: int) -> Ext:
    return _tagged(Tag.TIME, [value.replace(tzinfo=None).isoformat(), value.fold, _zone(value.tzinfo)])


def _zone(zone: tzinfo | None) -> Any:
    """None, the key of a `ZoneInfo`, or [offset in µs, name] of a fixed `timezone`."""
    if zone is None:
        return None
    if type(zone) is timezone:
        offset = zone.utcoffset(None)
        name = zone.tzname(None)
        return [offset // timedelta(microseconds=1), None if name == timezone(offset).tzname(None) else name]
    if type(zone) is ZoneInfo and zone.key:
        return zone.key
    raise _Unsavable(f"a time with a tzinfo of type {_describe(zone)}")


def _is_plain_dataclass(kind: Any) -> bool:
    """Whether its fields are all that an instance is made of."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and getattr(kind, "__new__", None) is _NEW


def _identifier(kind: type) -> str:
    """``module:QualName`` if the type is found under it; a type made in a function never is."""
    identifier = f"{kind.__module__}:{kind.__qualname__}"
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is not kind:
        raise _Unsavable(f"{kind.__module__}.{kind.__qualname__} (define it at the top level of a module)")
    return identifier


def _check(value: Any, depth: int) -> None:
    if depth <= 0:
        raise _Unsavable(f"{_describe(value)}, more than {MAX_DEPTH} levels deep or inside itself")


def _describe(value: Any) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{name} (use .tolist(), or keep it in a file)" if name == "numpy.ndarray" else name


def _tagged(tag: Tag, form: Any) -> Ext:
    return Ext(int(tag), _ENCODER.encode(form))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_NEW: Any = object.__new__
_ENCODER = msgspec.msgpack.Encoder()
_ATOMS = frozenset({type(None), bool, float, bytes})
_NUMPY_SCALARS = frozenset({bool, int, float, complex, str, bytes})
_FORMS: dict[type, Callable[[Any, int], Any]] = {
    **dict.fromkeys(_ATOMS, _atom),
    int: _int,
    str: _str,
    list: _list,
    dict: _dict,
    tuple: lambda value, depth: _tagged(Tag.TUPLE, _list(value, depth)),
    set: lambda value, depth: _tagged(Tag.SET, _list(value, depth)),
    frozenset: lambda value, depth: _tagged(Tag.FROZENSET, _list(value, depth)),
    complex: lambda value, depth: _tagged(Tag.COMPLEX, [value.real, value.imag]),
    Decimal: lambda value, depth: _tagged(Tag.DECIMAL, str(value)),
    UUID: lambda value, depth: _tagged(Tag.UUID, value.bytes),
    type(Path()): lambda value, depth: _tagged(Tag.PATH, os.fsencode(value)),
    PurePosixPath: lambda value, depth: _tagged(Tag.PURE_PATH, ["posix", os.fsencode(value)]),
    PureWindowsPath: lambda value, depth: _tagged(Tag.PURE_PATH, ["windows", os.fsencode(value)]),
    date: lambda value, depth: _tagged(Tag.DATE, value.isoformat()),
    time: _time,
    datetime: _datetime,
    timedelta: lambda value, depth: _tagged(Tag.TIMEDELTA, [value.days, value.seconds, value.microseconds]),
    Failure: _failure,
    ProcessResult: _result,
    FrozenNamespace: _namespace,
}
"""By exact type: a subclass is another type, and would come back as less than it was."""


# --- from msgpack to values -------------------------------------------------------------------------


class _Reader:
    """Reads values; subclasses decide what an enum or a dataclass is read as."""

    def __init__(self, load_type: LoadType) -> None:
        self._load_type = load_type
        self._decoder = msgspec.msgpack.Decoder(ext_hook=self._read_extension)

    def read(self, data: bytes | memoryview) -> Any:
        try:
            return self._decoder.decode(data)
        except (*_NOT_MSGPACK, RecursionError) as error:
            raise CheckpointCorruptError(f"a value can't be read: {error}") from error

    def _read_extension(self, code: int, data: memoryview) -> Any:
        form = self.read(data)
        match code:
            case Tag.ENUM | Tag.DATACLASS:
                return self._build_named(Tag(code), form)
            case _:
                return self._build(code, form)

    def _build(self, code: int, form: Any) -> Any:
        try:
            return _BUILD[code](form)
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise CheckpointCorruptError(f"a value with tag {code} can't be read: {error!r}") from error

    def _build_named(self, tag: Tag, form: Any) -> Any:
        match form:
            case [str(identifier), str() | int() as member] if tag is Tag.ENUM:
                return self._build_enum(identifier, member)
            case [str(identifier), dict(values)] if tag is Tag.DATACLASS:
                return self._build_dataclass(identifier, values)
            case _:
                raise CheckpointCorruptError(f"a value with tag {tag} can't be read")

    def _build_enum(self, identifier: str, member: str | int) -> Any:
        kind = self._load_type(identifier)
        if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
            raise ProcessClassNotFoundError(identifier, "a saved value needs it as an enum; it is none any more")
        try:
            return kind(member) if issubclass(kind, enum.Flag) else kind[str(member)]
        except (KeyError, ValueError, TypeError) as error:
            raise ProcessClassNotFoundError(identifier, f"a saved value needs its member {member!r}") from error

    def _build_dataclass(self, identifier: str, values: dict[str, Any]) -> Any:
        kind = self._load_type(identifier)
        if not _is_plain_dataclass(kind):
            raise ProcessClassNotFoundError(identifier, "a saved value needs it as a dataclass; it is none any more")
        fields = {field.name: field for field in dataclasses.fields(kind)}
        if unknown := values.keys() - fields.keys():
            names = ", ".join(sorted(map(str, unknown)))
            raise ProcessClassNotFoundError(identifier, f"a saved value has the fields {names}, the class has not")
        instance = object.__new__(kind)
        for name, field in fields.items():
            if name in values:
                object.__setattr__(instance, name, values[name])
            elif field.default is not dataclasses.MISSING:  # a field that is newer than the checkpoint
                object.__setattr__(instance, name, field.default)
            elif field.default_factory is not dataclasses.MISSING:
                object.__setattr__(instance, name, field.default_factory())
            elif field.init:
                raise ProcessClassNotFoundError(identifier, f"a saved value lacks its field {name}: give it a default")
        return instance


@dataclasses.dataclass(frozen=True, slots=True)
class _Shown:
    """A value for the eyes of people: a YAML tag and text, a list or a mapping."""

    tag: str
    content: Any


class _Shower(_Reader):
    """Reads values as plain ones and `_Shown` ones."""

    def __init__(self) -> None:
        super().__init__(type_loader(()))

    def _build_named(self, tag: Tag, form: Any) -> Any:
        if tag is Tag.ENUM:
            return _Shown("!enum", f"{form[0]}.{form[1]}")
        return _Shown(f"!{form[0]}", form[1])

    def _build(self, code: int, form: Any) -> Any:
        match code:
            case Tag.TUPLE | Tag.SET | Tag.FROZENSET | Tag.FAILURE | Tag.RESULT | Tag.BIG_INT:
                shown = form
            case Tag.NAMESPACE:
                shown = form[0]
            case Tag.PAIRS:
                shown = _two(form)
            case Tag.ODD_TEXT:
                shown = ascii(super()._build(code, form))
            case _:
                shown = super()._build(code, form)
        return _Shown(f"!{Tag(code).name.lower()}", shown)


def _two(flat: list[Any]) -> list[list[Any]]:
    return [[flat[i], flat[i + 1]] for i in range(0, len(flat), 2)]


def _build_pure_path(form: Any) -> PurePath:
    return {"posix": PurePosixPath, "windows": PureWindowsPath}[form[0]](os.fsdecode(form[1]))


def _build_zone(form: Any) -> tzinfo | None:
    if form is None:
        return None
    if isinstance(form, str):
        return ZoneInfo(form)
    offset = timedelta(microseconds=form[0])
    return timezone(offset) if form[1] is None else timezone(offset, form[1])


_BUILD: dict[int, Callable[[Any], Any]] = {
    Tag.BIG_INT: lambda form: int(form, 16),
    Tag.ODD_TEXT: lambda form: form.decode("utf-8", "surrogatepass"),
    Tag.TUPLE: tuple,
    Tag.SET: set,
    Tag.FROZENSET: frozenset,
    Tag.PAIRS: lambda form: dict(_two(form)),
    Tag.COMPLEX: lambda form: complex(*form),
    Tag.DECIMAL: Decimal,
    Tag.UUID: lambda form: UUID(bytes=form),
    Tag.PATH: lambda form: Path(os.fsdecode(form)),
    Tag.PURE_PATH: _build_pure_path,
    Tag.DATE: date.fromisoformat,
    Tag.TIME: lambda form: time.fromisoformat(form[0]).replace(fold=form[1], tzinfo=_build_zone(form[2])),
    Tag.DATETIME: lambda form: datetime.fromisoformat(form[0]).replace(fold=form[1], tzinfo=_build_zone(form[2])),
    Tag.TIMEDELTA: lambda form: timedelta(*form),
    Tag.FAILURE: lambda form: msgspec.convert(form, Failure),
    Tag.RESULT: ProcessResult.from_data,
    Tag.NAMESPACE: lambda form: freeze(form[0], form[1]),
}

_READER = _Reader(type_loader())


# --- the envelope -----------------------------------------------------------------------------------

_ENVELOPE_DECODER = msgspec.msgpack.Decoder(_Envelope)


def _checksum(format: int, class_id: str, class_version: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(f"{format}\0{class_id}\0{class_version}\0".encode()))


def _refuse_newer_format(data: bytes) -> None:
    try:
        head = msgspec.msgpack.decode(data, type=_Head)
    except _NOT_MSGPACK:
        return
    if head.magic == _MAGIC and head.format > FORMAT:
        raise CheckpointIncompatibleError(head.format, FORMAT)
