"""The checkpoint codec: what comes back is what was saved, or it was refused before anything was written."""

from __future__ import annotations

import base64
import collections
import contextlib
import dataclasses
import enum
import functools
import math
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any, ClassVar
from uuid import UUID
from zoneinfo import ZoneInfo

import hypothesis.strategies as st
import msgspec
import pytest
import yaml
from hypothesis import example, given, settings

from prunus.errors import (
    CheckpointCorruptError,
    CheckpointIncompatibleError,
    CheckpointNotFoundError,
    Failure,
    ProcessClassNotFoundError,
    UnsavableValueError,
)
from prunus.persistence.checkpoint import (
    FORMAT,
    MAX_DEPTH,
    Tag,
    checkpoint_as_yaml,
    decode_checkpoint,
    decode_data,
    decode_value,
    encode_checkpoint,
    encode_data,
    encode_value,
    type_loader,
)
from prunus.processes import ProcessResult, ProcessState

GOLDEN = Path(__file__).parent / "golden"


def same(a: Any, b: Any) -> bool:
    """Equal, and of the same types all the way down (NaN is NaN, 0.0 is not -0.0, an order is an order)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a.hex() == b.hex()
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, set | frozenset):
        return a == b and {type(x) for x in a} == {type(x) for x in b}
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, Decimal):
        return a.as_tuple() == b.as_tuple()
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, datetime | time):
        return a == b and (a.fold, a.tzname(), repr(a.tzinfo)) == (b.fold, b.tzname(), repr(b.tzinfo))
    return bool(a == b)


class Colour(enum.Enum):
    RED = "r"
    ALSO_RED = "r"  # noqa: PIE796
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 1


class Rights(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


@dataclasses.dataclass
class Point:
    x: float
    label: str = "origin"
    seen: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    corner: Point
    kind: Colour = Colour.RED


@dataclasses.dataclass
class Guarded:
    """Its constructor must not run when it is rebuilt."""

    x: int
    square: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.square = self.x**2
        if self.x == 13:
            raise AssertionError("the constructor was called")

    @functools.cached_property
    def cube(self) -> int:
        return self.x**3


@dataclasses.dataclass
class TextWithNotes(str):
    """A dataclass that is more than its fields."""

    notes: int = 0


# --- the module of the user, so that it can change or vanish between saving and loading --------------


@pytest.fixture
def lab() -> Iterator[ModuleType]:
    """A module that a test may change and take away."""
    module = ModuleType("lab_of_test_checkpoint")
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


def put(module: ModuleType, name: str, *fields: Any) -> type:
    made = dataclasses.make_dataclass(name, fields)
    made.__module__ = module.__name__
    setattr(module, name, made)
    return made


class TestValues:
    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            0,
            -(2**63),
            2**64 - 1,
            2**64,
            -(2**63) - 1,
            1 << 20_000,
            1.5,
            -0.0,
            math.inf,
            -math.inf,
            math.nan,
            5e-324,
            "",
            "Zürich 東京 \U0001f351 \0",
            "not unicode: \udcff",
            b"",
            bytes(range(256)),
            [],
            {},
            (),
            set(),
            frozenset(),
            [1, [2, (3, [4])]],
            {"a": {"b": [None]}},
            {1: "a", None: "b", (1, 2): "c", "text": "d", 2.5: "e", Colour.RED: "f"},
            {"not unicode: \udcff": 1},
            {"über": 1, "a": 2},
            {1, "a", None, (1, 2), frozenset({3})},
            frozenset({b"x"}),
            1 - 2j,
            complex(math.nan, -0.0),
            Decimal("1.100"),
            Decimal("-Infinity"),
            Decimal("1E+400"),
            UUID(int=7),
            Path("/tmp/a b"),
            Path("relative"),
            Path("bad \udcff name"),
            PurePosixPath("/x"),
            PureWindowsPath(r"C:\x"),
            date(2024, 2, 29),
            time(1, 2, 3, 4),
            time(1, 2, tzinfo=UTC, fold=1),
            datetime(1, 1, 1),
            datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
            datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Zurich")),
            datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=-5, seconds=1))),
            datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=2), "CEST")),
            timedelta(days=-1, microseconds=1),
            timedelta.max,
            Colour.BLUE,
            Colour.ALSO_RED,
            Level.LOW,
            Rights.READ,
            Rights.READ | Rights.WRITE,
            Rights(0),
            Point(1.0, seen={1}),
            Cell(Point(-0.0), Colour.BLUE),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_values_come_back_the_same(self, value: Any) -> None:
        """Equal and of the same type, alone and inside every kind of collection."""
        assert same(decode_value(encode_value(value)), value)
        inside = {"a": [value, (value,)], "b": {1: value}}
        assert same(decode_data(encode_data(inside)), inside)

    atoms = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.binary(max_size=20),
        st.complex_numbers(),
        st.decimals(),
        st.uuids(),
        st.dates(),
        st.times(),
        st.timedeltas(),
        st.datetimes(timezones=st.none() | st.timezones()),
        st.sampled_from(Colour),
    )
    hashables = st.recursive(
        st.one_of(st.integers(), st.text(), st.none(), st.binary(max_size=5)),
        lambda inner: st.one_of(st.tuples(inner, inner), st.frozensets(inner, max_size=3)),
        max_leaves=4,
    )
    values = st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(st.text(), inner, max_size=4),
            st.builds(Point, x=inner),
        ),
        max_leaves=12,
    )

    @given(st.dictionaries(st.text(), values | hashables | st.dictionaries(hashables, atoms, max_size=3), max_size=4))
    @example({"a": {"b": (1, {"c": [frozenset()]})}})
    @settings(max_examples=150, deadline=None)
    def test_any_snapshot_comes_back_the_same(self, snapshot: dict[str, Any]) -> None:
        """Whatever is put together from savable values is savable."""
        data = encode_checkpoint(snapshot, class_id="lab:Work", class_version=1)
        assert same(decode_checkpoint(data).snapshot(), snapshot)
        checkpoint_as_yaml(data)

    def test_a_failure_comes_back_with_its_causes_and_facts(self) -> None:
        """An error as data is a value, and is still no result."""
        error = CheckpointNotFoundError("p")
        error.__cause__ = KeyError("x")
        failure = Failure.of(error)
        back = decode_value(encode_value([failure]))[0]
        assert back == failure
        assert isinstance(back.to_exception(), CheckpointNotFoundError)

    def test_no_constructor_runs_when_a_dataclass_is_rebuilt(self) -> None:
        """Its fields are set as they were; what is computed is saved as it was, what is cached is computed anew."""
        value = Guarded(2)
        value.x, value.square = 13, 5
        assert value.cube == 2197
        back = decode_value(encode_value(value))
        assert (back.x, back.square, "cube" in vars(back)) == (13, 5, False)

    def test_a_field_without_a_value_stays_without(self) -> None:
        """A dataclass need not be complete."""
        value = Guarded(2)
        del value.square
        assert not hasattr(decode_value(encode_value(value)), "square")

    def test_a_shared_object_becomes_two_equal_ones(self) -> None:
        """Sharing is not kept (and no cycle can arise)."""
        shared = [1]
        back = decode_value(encode_value([shared, shared]))
        assert back == [[1], [1]]
        assert back[0] is not back[1]

    def test_numpy_scalars_become_plain_ones(self) -> None:
        """Exact numbers survive; arrays, dates and long doubles are refused."""
        numpy = pytest.importorskip("numpy")
        values = [numpy.float64(0.1), numpy.float32(0.1), numpy.int32(-3), numpy.uint64(2**64 - 1), numpy.bool_(True)]
        values += [numpy.complex128(1j), numpy.str_("x"), numpy.bytes_(b"x")]
        back = decode_value(encode_value(values))
        assert back == [value.item() for value in values]
        assert [type(value) for value in back] == [float, float, int, int, bool, complex, str, bytes]
        for refused in (numpy.array([1.0]), numpy.datetime64("2024-01-01"), numpy.longdouble(1)):
            with pytest.raises(UnsavableValueError, match="numpy"):
                encode_value(refused)
        with pytest.raises(UnsavableValueError, match="tolist"):
            encode_value(numpy.zeros(3))


class TestRefusals:
    @pytest.mark.parametrize(
        ("snapshot", "where", "kind"),
        [
            ({"inputs": {"structure": object()}}, "inputs.structure", "object"),
            ({"context": {"points": [1, 2, 3, {"calc": object()}]}}, "context.points[3].calc", "object"),
            ({"context": {"a": (1, {2: object()})}}, "context.a[1][2]", "object"),
            ({"context": {"a": {"x": 1, 3: object()}}}, "context.a[3]", "object"),
            ({"context": {"a": {3: 1, "b": object()}}}, "context.a.b", "object"),
            ({"context": {"a": {object: 1}}}, "context.a[<class 'object'>]", "type"),
            ({"context": {"p": Point(1.0, seen={object})}}, "context.p.seen[0]", "type"),  # type: ignore[arg-type]
            ({"f": len}, "f", "builtin_function_or_method"),
            ({"f": collections.OrderedDict(a=1)}, "f", "collections.OrderedDict"),
            ({"f": collections.Counter()}, "f", "collections.Counter"),
            ({"f": bytearray()}, "f", "bytearray"),
            ({"f": type("Text", (str,), {})("x")}, "f", "Text"),
            ({"f": type("Number", (int,), {})(1)}, "f", "Number"),
            ({"f": type("Number", (float,), {})(1)}, "f", "Number"),
            ({"f": type("Items", (list,), {})()}, "f", "Items"),
            ({"f": {type("Text", (str,), {})("x"): 1}}, "f['x']", "Text"),
            ({"f": TextWithNotes("x")}, "f", "TextWithNotes"),
            ({"f": dataclasses.make_dataclass("Local", ["x"])(1)}, "f", "Local"),
            ({"f": enum.Enum("Local", "A").A}, "f", "Local"),
            ({"f": Point}, "f", "type"),
            ({"f": Failure("a", "b", facts={"x": object()})}, "f", "Failure"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_an_unsavable_value_is_named_with_its_place(self, snapshot: dict[str, Any], where: str, kind: str) -> None:
        """The dotted path and the type; subclasses of savable types are other types."""
        with pytest.raises(UnsavableValueError) as caught:
            encode_checkpoint(snapshot, class_id="lab:Work", class_version=1)
        assert caught.value.where == where
        assert kind in caught.value.type

    def test_the_path_begins_where_it_is_told(self) -> None:
        """A result says ``outputs``."""
        with pytest.raises(UnsavableValueError) as caught:
            encode_data({"calc": object()}, "outputs")
        assert caught.value.where == "outputs.calc"

    def test_an_attribute_that_is_no_field_is_refused(self) -> None:
        """It would be lost silently."""
        point = Point(1.0)
        point.extra = 1  # type: ignore[attr-defined]
        with pytest.raises(UnsavableValueError) as caught:
            encode_value(point, "p")
        assert caught.value.where == "p.extra"

    def test_a_value_inside_itself_is_refused(self) -> None:
        """So is one that is too deep, with a path that people can read."""
        cycle: list[Any] = []
        cycle.append(cycle)
        loop: dict[str, Any] = {}
        loop["again"] = (loop,)
        for value in (cycle, loop):
            with pytest.raises(UnsavableValueError, match="inside itself") as caught:
                encode_value(value)
            assert len(caught.value.where) < 200

    def test_the_depth_has_a_bound(self) -> None:
        """`MAX_DEPTH` collections inside one another are saved, one more is not."""
        value: Any = 1
        for i in range(MAX_DEPTH):
            value = [value] if i % 2 else (value,)
        assert decode_value(encode_value(value)) == value
        with pytest.raises(UnsavableValueError):
            encode_value([value])


class TestTypes:
    def test_types_come_only_from_allowed_modules(self) -> None:
        """Nothing is imported from others."""
        data = encode_value(Colour.RED)
        assert decode_value(data, type_loader([__name__])) is Colour.RED
        assert decode_value(data, type_loader([__name__[:5] + "*"])) is Colour.RED
        with pytest.raises(ProcessClassNotFoundError, match="not allowed"):
            decode_value(data, type_loader(["other.*"]))

    def test_nothing_but_enums_and_dataclasses_is_built(self) -> None:
        """A checkpoint that names a function, a class or a module gets nothing called."""
        for target in ("subprocess:Popen", "os:system", "os:path", "builtins:dict", "collections:OrderedDict"):
            for tag, form in ((Tag.ENUM, [target, "x"]), (Tag.DATACLASS, [target, {"args": "x"}])):
                data = msgspec.msgpack.encode(msgspec.msgpack.Ext(int(tag), msgspec.msgpack.encode(form)))
                with pytest.raises(ProcessClassNotFoundError):
                    decode_value(data)

    def test_a_type_that_is_gone_is_named(self, lab: ModuleType) -> None:
        """The bytes are sound: what lacks is code, as if the process class were missing."""
        put(lab, "Box", "size")
        data = encode_value(lab.Box(1))
        assert decode_value(data) == lab.Box(1)
        del lab.Box
        with pytest.raises(ProcessClassNotFoundError, match="lab_of_test_checkpoint:Box"):
            decode_value(data)
        sys.modules.pop(lab.__name__)
        with pytest.raises(ProcessClassNotFoundError, match="No module"):
            decode_value(data)

    def test_a_dataclass_may_gain_fields_with_defaults(self, lab: ModuleType) -> None:
        """An older checkpoint then has the default; without one, and for a lost field, it is refused."""
        data = encode_value(put(lab, "Box", "size")(1))
        put(
            lab,
            "Box",
            "size",
            ("lid", str, dataclasses.field(default="oak")),
            ("d", list, dataclasses.field(default_factory=list)),
        )
        assert decode_value(data) == lab.Box(1, "oak", [])
        put(lab, "Box", "size", "lid")
        with pytest.raises(ProcessClassNotFoundError, match="lid"):
            decode_value(data)
        put(lab, "Box", ("width", int, 1))
        with pytest.raises(ProcessClassNotFoundError, match="size"):
            decode_value(data)

    def test_an_enum_that_lost_a_member_is_named(self, lab: ModuleType) -> None:
        """With the member."""
        lab.Mood = enum.Enum("Mood", "GOOD BAD", module=lab.__name__)  # type: ignore[attr-defined]
        data = encode_value(lab.Mood.BAD)
        lab.Mood = enum.Enum("Mood", "GOOD", module=lab.__name__)  # type: ignore[attr-defined]
        with pytest.raises(ProcessClassNotFoundError, match="BAD"):
            decode_value(data)


class TestEnvelope:
    snapshot: ClassVar = {"inputs": {"element": "Cu", "where": Path("/x")}, "point": Point(1.0)}

    @pytest.fixture
    def data(self) -> bytes:
        return encode_checkpoint(self.snapshot, class_id="lab:Work", class_version=3)

    def test_the_envelope_is_read_without_the_users_classes(self, lab: ModuleType) -> None:
        """Format, class and version are known although the values can't be built."""
        put(lab, "Box", "size")
        data = encode_checkpoint({"box": lab.Box(1)}, class_id="lab:Work", class_version=3)
        del lab.Box
        checkpoint = decode_checkpoint(data)
        assert (checkpoint.format, checkpoint.class_id, checkpoint.class_version) == (FORMAT, "lab:Work", 3)
        with pytest.raises(ProcessClassNotFoundError):
            checkpoint.snapshot()
        assert "size: 1" in checkpoint_as_yaml(data)

    def test_every_snapshot_is_a_new_one(self, data: bytes) -> None:
        """Changing one does not change the next."""
        checkpoint = decode_checkpoint(data)
        checkpoint.snapshot()["inputs"].clear()
        assert checkpoint.snapshot() == self.snapshot

    def test_every_flipped_bit_is_noticed(self, data: bytes) -> None:
        """Damage in any byte is an error that says so (or, in the format number, that it is newer)."""
        for i in range(len(data)):
            for bit in (0, 3, 7):
                damaged = bytearray(data)
                damaged[i] ^= 1 << bit
                with pytest.raises((CheckpointCorruptError, CheckpointIncompatibleError)):
                    decode_checkpoint(bytes(damaged))

    def test_every_truncation_is_noticed(self, data: bytes) -> None:
        """No prefix of a checkpoint is a checkpoint, and none with something after it."""
        for end in range(len(data)):
            with pytest.raises(CheckpointCorruptError):
                decode_checkpoint(data[:end])
        with pytest.raises(CheckpointCorruptError):
            decode_checkpoint(data + b"\0")

    @given(st.binary(max_size=60))
    @example(b"null")
    @example(msgspec.msgpack.encode(["prunus", FORMAT, "a:B", 1, 0, b""]))
    @example(msgspec.msgpack.encode(["other", FORMAT, "a:B", 1, 0, b""]))
    @settings(max_examples=200, deadline=None)
    def test_noise_is_refused(self, noise: bytes) -> None:
        """Bytes from anywhere are an error of our tree, as a checkpoint and as data."""
        with pytest.raises(CheckpointCorruptError):
            decode_checkpoint(noise)
        with contextlib.suppress(CheckpointCorruptError, ProcessClassNotFoundError):
            decode_data(noise)

    @pytest.mark.parametrize("form", [["prunus", 2], ["prunus", 9, {"all": "new"}], ["prunus", 2, "a:B", 1, 0, b""]])
    def test_a_newer_format_is_named(self, form: list[Any]) -> None:
        """However else it looks like."""
        with pytest.raises(CheckpointIncompatibleError) as caught:
            decode_checkpoint(msgspec.msgpack.encode(form))
        assert (caught.value.found, caught.value.readable) == (form[1], FORMAT)

    def test_a_payload_of_another_kind_is_corrupt(self) -> None:
        """Data are a mapping; tags have the form that they were given."""
        with pytest.raises(CheckpointCorruptError, match="mapping"):
            decode_data(encode_value([1]))
        for tag in Tag:
            for form in (None, "x", [], ["x"], {"a": 1}, -1):
                data = msgspec.msgpack.encode(msgspec.msgpack.Ext(int(tag), msgspec.msgpack.encode(form)))
                with contextlib.suppress(CheckpointCorruptError, ProcessClassNotFoundError):
                    decode_value(data)
        with pytest.raises(CheckpointCorruptError):
            decode_value(msgspec.msgpack.encode(msgspec.msgpack.Ext(99, b"\xc0")))


class TestYaml:
    def test_people_can_read_it(self) -> None:
        """Fields are named, odd types are tagged, the class and its version come first."""
        snapshot = {
            "inputs": {"element": "Cu", "n": 3},
            "where": Path("/data"),
            "pair": (1, 2**70),
            "kind": Colour.RED,
            "point": Point(1.5),
            "table": {1: "a"},
            "raw": b"abc",
        }
        text = checkpoint_as_yaml(encode_checkpoint(snapshot, class_id="lab:Work", class_version=3))
        head, _, rest = text.partition("snapshot:\n")
        assert head == "format: 1\nclass: lab:Work\nversion: 3\n"
        for line in (
            "element: Cu",
            "where: !path '/data'",
            "pair: !tuple",
            f"kind: !enum '{__name__}:Colour.RED'",
            f"point: !{__name__}:Point",
            "x: 1.5",
            "label: origin",
            "raw: !!binary",
        ):
            assert line in rest, line

    def test_no_yaml_loader_builds_anything_from_it(self) -> None:
        """It is for eyes only."""
        text = checkpoint_as_yaml(encode_checkpoint({"a": Point(1.0)}, class_id="lab:Work", class_version=1))
        with pytest.raises(yaml.YAMLError):
            yaml.safe_load(text)

    def test_importing_the_room_imports_no_yaml(self) -> None:
        """It is imported when it is used."""
        code = "import sys, prunus.persistence; print(*{'yaml', 'zmq', 'numpy', 'anyio'} & set(sys.modules))"
        path = [entry for entry in sys.path if entry]
        out = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"], capture_output=True
        )
        assert (out.returncode, out.stdout.strip()) == (0, b""), out.stderr


# --- the golden corpus: written once, loaded for ever -----------------------------------------------


RESULTS = [
    ProcessResult("child-1", ProcessState.FINISHED, {"y": 4, "cell": {"a": 3.6}}, 0),
    ProcessResult("child-2", ProcessState.EXCEPTED, failure=Failure("ValueError", "bad", "Traceback ...")),
    ProcessResult("child-3", ProcessState.KILLED, {}, None, "enough"),
]


def read_golden(name: str) -> bytes:
    return base64.b64decode((GOLDEN / name).read_text())


class TestGolden:
    """Never change these files: a user's processes are saved like them."""

    def test_a_plain_checkpoint_of_format_1_loads(self) -> None:
        """JSON-like values."""
        checkpoint = decode_checkpoint(read_golden("format1_plain.b64"))
        assert (checkpoint.format, checkpoint.class_id, checkpoint.class_version) == (1, "lab:Work", 2)
        assert checkpoint.snapshot() == {
            "pid": "0193-golden",
            "state": "waiting",
            "inputs": {"element": "Cu", "scales": [0.94, 1.0, 1.06], "n": -7, "flag": True, "nothing": None},
            "context": {"名": "über", "raw": b"\x00\xff"},
        }

    def test_all_tags_of_format_1_load(self) -> None:
        """One value of each tag but those that need a class."""
        expected = {
            "big_int": -(2**80),
            "odd_text": "\udcff",
            "tuple": (1, (2, ())),
            "set": {1, 2},
            "frozenset": frozenset({"a"}),
            "pairs": {1: "a", (2, 3): None},
            "complex": 1 - 2j,
            "decimal": Decimal("1.10"),
            "uuid": UUID(int=1),
            "path": Path("/data/x"),
            "pure_path": [PurePosixPath("/a"), PureWindowsPath(r"C:\a")],
            "date": date(2024, 2, 29),
            "time": time(1, 2, 3, 4),
            "datetime": [
                datetime(2024, 1, 2, 3, 4, 5, 6),
                datetime(2024, 1, 2, tzinfo=UTC),
                datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Zurich")),
                datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=2), "CEST")),
            ],
            "timedelta": timedelta(days=-1, microseconds=5),
            "failure": Failure("ValueError", "bad", "Traceback ...", Failure("KeyError", "'x'")),
        }
        assert same(decode_checkpoint(read_golden("format1_tags.b64")).snapshot(), expected)
        elsewhere = {Tag.ENUM, Tag.DATACLASS, Tag.RESULT, Tag.NAMESPACE}
        assert {Tag[name.upper()] for name in expected} | elsewhere == set(Tag)

    def test_results_of_format_1_load(self) -> None:
        """What a work chain has in its context: the results of its children, and what it took out of them."""
        snapshot = decode_checkpoint(read_golden("format1_results.b64")).snapshot()
        assert snapshot["results"] == RESULTS
        assert snapshot["outputs"] == RESULTS[0].outputs
        assert snapshot["outputs"].cell.a == 3.6

    def test_enums_and_dataclasses_of_format_1_load(self, lab: ModuleType) -> None:
        """They are found under the name of their class."""
        lab.Mood = enum.Enum("Mood", "GOOD BAD", module=lab.__name__)  # type: ignore[attr-defined]
        lab.Rights = enum.Flag("Rights", "READ WRITE", module=lab.__name__)  # type: ignore[attr-defined]
        put(lab, "Box", "size", "inner")
        expected = {"box": lab.Box(1.5, lab.Box((1,), None)), "mood": lab.Mood.BAD, "rights": lab.Rights(3)}
        assert decode_checkpoint(read_golden("format1_types.b64")).snapshot() == expected
