"""Annotations as schemas: what fits, what is converted, and where it says that the rest is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NewType, NotRequired, Optional, Protocol, TypedDict, Union
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import InvalidInputError, SpecError
from prunus.processes.schemas import MAX_PROBLEMS, Arguments, Problems, Schema


@dataclass(frozen=True)
class Point:
    x: float
    y: float = 0.0


@dataclass
class Cloud:
    points: list[Point]
    inner: list[Cloud] = field(default_factory=list)


@dataclass
class Ordered:
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")


class Mesh(msgspec.Struct):
    size: Annotated[int, msgspec.Meta(gt=0)]
    name: str = msgspec.field(default="", name="meshName")
    kinds: list[str] = []


class Cat(msgspec.Struct, tag="cat"):
    lives: int


class Dog(msgspec.Struct, tag="dog"):
    lives: int


class Options(TypedDict):
    cutoff: float
    label: NotRequired[str]


class Pair(NamedTuple):
    left: int
    right: str = "r"


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1


class Unreadable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


Metres = NewType("Metres", float)


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (Any, object, object),
        (int, 3, 3),
        (float, 3, 3.0),
        (complex, 2, 2 + 0j),
        (bool, True, True),
        (str, "", ""),
        (None, None, None),
        (Optional[int], None, None),  # noqa: UP045 - old annotations too
        (Union[int, str], "a", "a"),  # noqa: UP007 - old annotations too
        (int | float, 3, 3),
        (float | str, 3, 3.0),
        (list[float] | list[int], [1], [1]),
        ((int, str), "a", "a"),
        (Literal["a", 1], 1, 1),
        (Literal[Color.RED], "red", Color.RED),
        (list[int], [], []),
        (list[float], [1, 2.5], [1.0, 2.5]),
        (list[int], (1, 2), [1, 2]),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[int, str], [1, "a"], (1, "a")),
        (tuple[()], [], ()),
        (tuple, [1], (1,)),
        (set[int], [1, 1], {1}),
        (frozenset[str], ["a"], frozenset("a")),
        (deque[int], [1], deque([1])),
        (Sequence[int], (1,), (1,)),
        (dict[str, Point], {"a": {"x": 1}}, {"a": Point(1.0)}),
        (Mapping[str, int], {"a": 1}, {"a": 1}),
        (Color, "red", Color.RED),
        (Level, 1, Level.LOW),
        (date, "2024-02-29", date(2024, 2, 29)),
        (datetime, "2024-02-29T12:00:00", datetime(2024, 2, 29, 12)),
        (timedelta, "PT1M", timedelta(minutes=1)),
        (UUID, "00000000-0000-0000-0000-000000000001", UUID(int=1)),
        (Decimal, "1.50", Decimal("1.50")),
        (bytes, "YWI=", b"ab"),
        (Path, "/a/b", Path("/a/b")),
        (Metres, 2, 2.0),
        (Annotated[int, "of no matter"], 2, 2),
        (Annotated[int, msgspec.Meta(ge=2)], 2, 2),
        (Point, {"x": 1}, Point(1.0)),
        (Mesh, {"size": 2, "meshName": "m"}, Mesh(2, "m")),
        (Cat | Dog, {"type": "dog", "lives": 1}, Dog(1)),
        (Options, {"cutoff": 1}, {"cutoff": 1.0}),
        (Pair, [1], Pair(1)),
        (Pair, {"left": 1, "right": "x"}, Pair(1, "x")),
        (Cloud, {"points": [], "inner": [{"points": [{"x": 1}]}]}, Cloud([], [Cloud([Point(1.0)])])),
    ],
)
def test_plain_data_is_read_into_what_the_annotation_says(annotation: Any, value: Any, expected: Any) -> None:
    """Equal, and of the same types all the way down."""
    read = Schema(annotation).read(value)
    assert read == expected
    assert repr(read) == repr(expected)


@pytest.mark.parametrize(
    ("annotation", "value", "problem"),
    [
        (int, True, "expected int, got True (bool)"),
        (float, True, "expected float, got True (bool)"),
        (int, 1.0, "expected int, got 1.0 (float)"),
        (int, "1", "expected int, got '1' (str)"),
        (str, None, "expected str, got None"),
        (float, 10**400, "expected float, got a number that is too large for it"),
        (int | None, "a", "expected int or None, got 'a' (str)"),
        (Literal[1, 2], True, "expected 1 or 2, got True (bool)"),
        (Literal["a", "b"], "c", "expected 'a' or 'b', got 'c' (str)"),
        (list[int], "ab", "expected list[int], got 'ab' (str)"),
        (Sequence[str], "ab", "expected Sequence[str], got 'ab' (str)"),
        (list[int], [1, "a"], "[1]: expected int, got 'a' (str)"),
        (set[list[int]], [[1]], "expected set[list[int]]: unhashable type: 'list'"),
        (tuple[int, str], [1], "expected tuple[int, str], got 1 items"),
        (tuple[int, str], [1, 2], "[1]: expected str, got 2 (int)"),
        (dict[str, int], {"a b": "x"}, "['a b']: expected int, got 'x' (str)"),
        (dict[str, int], {1: 1}, "[1]: the key: expected str, got 1 (int)"),
        (dict[str, int], [1], "expected dict[str, int], got [1] (list)"),
        (Color, "green", "expected Color, got 'green' (str)"),
        (Level, True, "expected Level, got True (bool)"),
        (datetime, "yesterday", "expected datetime, got 'yesterday' (str)"),
        (Annotated[int, msgspec.Meta(ge=2)], 1, "expected int >= 2, got 1 (int)"),
        (Point, {"x": "a"}, ".x: expected float, got 'a' (str)"),
        (Point, {}, ".x: expected float, nothing was given"),
        (Point, {"x": 1, "yy": 2}, ".yy: there is no such field; did you mean 'y'?"),
        (Point, {"x": 1, "q": 2}, ".q: there is no such field; there are: x, y"),
        (Point | None, {"x": "a"}, ".x: expected float, got 'a' (str)"),
        (list[int] | None, [1, "a"], "[1]: expected int, got 'a' (str)"),
        (Point | Pair, {"x": "a"}, "expected Point or Pair, got {'x': 'a'} (dict)"),
        (Ordered, {"low": 2, "high": 1}, "low is above high"),
        (list[Ordered], [{"low": 2, "high": 1}], "[0]: low is above high"),
        (Mesh, {"size": 0}, ".size: expected int >= 1, got 0 (int)"),
        (Cat, {"type": "dog", "lives": 1}, ".type: there is no such field; there are: lives"),
        (Options, {"label": 1}, ".label: expected str, got 1 (int); .cutoff: expected float, nothing was given"),
        (Pair, [1, "a", 3], "expected Pair, got 3 items"),
        (Cloud, {"points": [{"x": 0}, {"x": "a"}]}, ".points[1].x: expected float, got 'a' (str)"),
        (int, Unreadable(), "expected int, got (its repr failed with RuntimeError) (Unreadable)"),
        (int, "x" * 200, f"expected int, got '{'x' * 56}... (str)"),
    ],
)
def test_what_does_not_fit_is_told_by_its_path(annotation: Any, value: Any, problem: str) -> None:
    """What was expected, what was given, and where."""
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        Schema(annotation).read(value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Point, Point("not looked at")),  # type: ignore[arg-type]
        (list[Point], [Point(1.0)]),
        (list[list[float]], [[1.0]]),
        (dict[str, list[float]], {"a": [1.0]}),
        (tuple[Point, int], (Point(1.0), 1)),
        (set[int], {1}),
        (Mesh, Mesh(1)),
        (Options, {"cutoff": 1.0}),
        (Pair, Pair(1)),
        (Callable[[int], int], abs),
        (type[int], bool),
        (Iterable[int], iter("not looked at")),
    ],
)
def test_what_fits_is_kept_as_it_is(annotation: Any, value: Any) -> None:
    """The very same object comes back."""
    assert Schema(annotation).read(value) is value
    assert Schema(annotation).check(value, "", Problems())


def test_checking_converts_nothing() -> None:
    """A port's value is right or wrong; contents are looked at, but a dictionary is no dataclass there."""
    schema = Schema(list[Point | float], reads=False)
    assert schema.check([1, Point(0.0)], "inputs.x", Problems())
    problems = Problems()
    assert not schema.check([1, {"x": 1.0}, "a"], "inputs.x", problems)
    assert problems == {
        "inputs.x[1]": "expected Point or float, got {'x': 1.0} (dict)",
        "inputs.x[2]": "expected Point or float, got 'a' (str)",
    }
    assert not Schema(Color).check("red", "", Problems())
    assert not Schema(tuple[int, ...]).check([1], "", Problems())
    assert not Schema(Options).check({"cutoff": "a"}, "", Problems())


def test_problems_are_bounded() -> None:
    """A long list of wrong items does not make an endless message."""
    problems = Problems()
    Schema(list[int]).check(["a"] * 10_000, "x", problems)
    assert len(problems) == MAX_PROBLEMS


def test_a_value_that_contains_itself_is_refused() -> None:
    """With a problem, and not with a RecursionError."""
    cloud: dict[str, Any] = {"points": []}
    cloud["inner"] = [cloud]
    with pytest.raises(ValueError, match="nested too deeply or contains itself"):
        Schema(Cloud).read(cloud)


class NotForChecks(Protocol):
    def method(self) -> None: ...


@dataclass
class Dangling:
    x: Nowhere  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("int", "here: 'int' is no type"),
        (3, "here: 3 is no type"),
        ((), "here: an empty tuple"),
        (NotForChecks, "here: values can't be checked against NotForChecks"),
        (list[Dangling], "here: an annotation can't be read .*Nowhere"),
        (Annotated[set, msgspec.Meta(gt=1)], "here: "),
    ],
)
def test_what_can_not_be_a_schema_is_a_spec_error(annotation: Any, message: str) -> None:
    """It says where."""
    with pytest.raises(SpecError, match=message):
        Schema(annotation, "here")


def test_a_port_needs_no_readable_fields() -> None:
    """To check that something is an instance of a class, the annotations of the class need not be evaluated."""
    assert Schema(list[Dangling], reads=False).check([Dangling(1)], "", Problems())


@pytest.mark.skipif(sys.version_info < (3, 12), reason="`type X = ...` is of Python 3.12")
def test_an_alias_may_contain_itself() -> None:
    """JSON is such a type."""
    names: dict[str, Any] = {}
    exec("type Json = None | bool | float | str | list[Json] | dict[str, Json]", names)
    assert Schema(names["Json"]).read({"a": [1.5, None, {"b": True}]}) == {"a": [1.5, None, {"b": True}]}
    with pytest.raises(ValueError, match="expected"):
        Schema(names["Json"]).read({"a": [object()]})


def test_pydantic_models_read_themselves() -> None:
    """At any depth; what they refuse has the path of the field, by its name, and what was given."""
    pydantic = pytest.importorskip("pydantic")

    class Cell(pydantic.BaseModel):  # type: ignore[name-defined,misc]
        a: float = pydantic.Field(gt=0, alias="latticeConstant")
        angles: list[float] = pydantic.Field(default_factory=list)

        @pydantic.field_validator("angles")
        @classmethod
        def are_three(cls, angles: list[float]) -> list[float]:
            if len(angles) == 1:
                raise ValueError("one angle is not enough")
            return angles

    schema = Schema(dict[str, Cell])
    cell = Cell(latticeConstant=1)
    assert schema.read({"x": cell})["x"] is cell
    assert schema.read({"x": {"a": 1}, "y": {"latticeConstant": 1}}) == {"x": cell, "y": cell}
    with pytest.raises(ValueError, match="x") as raised:
        schema.read({"x": {"a": -1, "angles": [1, "b"]}, "y": {"a": 1, "angles": [1]}, "z": {}})
    assert str(raised.value).split("; ") == [
        ".x.a: input should be greater than 0, got -1 (int)",
        ".x.angles[1]: input should be a valid number, unable to parse string as a number, got 'b' (str)",
        ".y.angles: one angle is not enough",
        ".z.a: expected a value, nothing was given",
    ]


def test_pydantic_is_not_imported() -> None:
    """By nothing in Prunus, unless the user has."""
    code = (
        "import sys, prunus\n"
        "from prunus.processes.schemas import Schema\n"
        "assert Schema(list[int]).read([1]) == [1]\n"
        "assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, env={"PYTHONPATH": ":".join(sys.path)})


class Asked:
    def plain(self, n: int, point: Point, *, scale: float = 1.0, note: str | None = None) -> None: ...

    def others(self, n: int = 1, **rest: int) -> None: ...

    def bare(self, value, other=2): ...  # type: ignore[no-untyped-def]

    def only_by_position(self, n: int, /) -> None: ...

    def any_number(self, *args: int) -> None: ...

    def unreadable(self, n: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821


def test_arguments_are_read_by_the_signature() -> None:
    """By position or name, converted; what has a default and was not given is left to the function."""
    arguments = Arguments(Asked.plain)
    assert arguments.read([1], {"point": {"x": 2}, "scale": 3}) == {"n": 1, "point": Point(2.0), "scale": 3.0}
    assert arguments.read([1, Point(0.0)]) == {"n": 1, "point": Point(0.0)}
    assert Arguments(Asked().plain).read([1, Point(0.0)]) == {"n": 1, "point": Point(0.0)}
    assert Arguments(Asked.others).read([], {"n": 2, "x": 3}) == {"n": 2, "x": 3}
    assert Arguments(Asked.bare).read(["any"]) == {"value": "any"}
    assert arguments.describe()["scale"] == {"type": "float", "required": False, "default": "1.0"}
    assert arguments.describe()["point"] == {"type": "Point", "required": True}


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "problems"),
    [
        (Asked.plain, [], {}, {"n": "expected int, nothing was given", "point": "expected Point, nothing was given"}),
        (
            Asked.plain,
            [True],
            {"point": {"x": "a"}, "scal": 1},
            {
                "n": "expected int, got True (bool)",
                "point.x": "expected float, got 'a' (str)",
                "scal": "there is no such parameter; did you mean 'scale'?",
            },
        ),
        (
            Asked.plain,
            [1, Point(0.0), 3],
            {"n": 1},
            {
                "n": "was given twice, by position and by name",
                "argument 3": "there is no such parameter; taken by position: n, point",
            },
        ),
        (Asked.others, [], {"x": "a"}, {"x": "expected int, got 'a' (str)"}),
    ],
)
def test_wrong_arguments_are_told_by_parameter(
    function: Any, args: list[Any], kwargs: dict[str, Any], problems: dict[str, str]
) -> None:
    """All of them at once."""
    with pytest.raises(InvalidInputError) as raised:
        Arguments(function).read(args, kwargs)
    assert raised.value.problems == problems
    assert raised.value.process_class == function.__qualname__


@pytest.mark.parametrize("function", [Asked.only_by_position, Asked.any_number, Asked.unreadable])
def test_a_parameter_that_can_not_be_given_by_name_is_a_spec_error(function: Any) -> None:
    """And so is an annotation that can't be evaluated."""
    with pytest.raises(SpecError, match=function.__qualname__):
        Arguments(function)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["x", "y", "points", "inner", "cutoff", "lives", "type"]), inner)
    ),
    max_leaves=8,
)


@given(
    st.sampled_from(
        [int | float, list[Point], Cloud, Options, Cat | Dog | None, dict[str, int] | list[str], tuple[int, str], Mesh]
    ),
    _json,
)
def test_reading_either_fits_or_tells_why(annotation: Any, value: Any) -> None:
    """Nothing is raised, and what was read is kept as it is when it is read again."""
    schema = Schema(annotation)
    problems = Problems()
    read = schema.read_into(value, "", problems)
    if not problems:
        assert schema.check(read, "", Problems())
        assert schema.read(read) is read or schema.read(read) == read
