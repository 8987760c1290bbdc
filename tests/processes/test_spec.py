"""Ports and specs: what a process takes, and what it says about what it does not take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Optional

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import InvalidInputError, SpecError
from prunus.processes import FrozenNamespace, Process, ProcessSpec
from prunus.processes.schemas import fields_of
from prunus.processes.spec import ExitCode


def positive(value: float) -> str | None:
    return None if value > 0 else "must be positive"


def raises(value: float) -> str | None:
    raise ValueError("never good")


class Cell(Process):
    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("cell.a", valid_type=float, validator=positive, help="lattice constant")
        spec.input("cell.angle", valid_type=float, default=90.0)
        spec.input("steps", valid_type=int, default=lambda: 10)
        spec.input("label", valid_type=str, required=False)
        spec.input("mode", valid_type=Literal["fast", "good"], default="fast")
        spec.input_namespace("settings", dynamic=True, valid_type=(int, str))
        spec.output("energy", valid_type=float)
        spec.output("parts.kinetic", valid_type=float, required=False)

    async def run(self) -> None: ...


class Classy(Process):
    @dataclass(frozen=True)
    class Inputs:
        element: str
        scale: float = 1.0
        name: str | None = None
        old: Optional[int] = None  # noqa: UP045
        scales: list[float] = field(default_factory=lambda: [1.0])

    @dataclass(frozen=True)
    class Outputs:
        energy: float

    async def run(self) -> None: ...


def problems_of(process_class: type[Process], inputs: Any) -> dict[str, str]:
    with pytest.raises(InvalidInputError) as raised:
        process_class(inputs)
    return raised.value.problems


def spec_of(define: Callable[[Any], None], **names: Any) -> ProcessSpec:
    """The spec of a class with this `define`."""

    async def run(self: Any) -> None: ...

    def define_all(cls: type[Process], spec: ProcessSpec) -> None:
        define(spec)

    return spec_of_class(type("Some", (Process,), {"define": classmethod(define_all), "run": run, **names}))


def spec_of_class(process_class: Any) -> ProcessSpec:
    spec: ProcessSpec = process_class.spec()
    return spec


def refused(spec: ProcessSpec, inputs: Any) -> dict[str, str]:
    with pytest.raises(InvalidInputError) as raised:
        spec.read_inputs(inputs)
    return raised.value.problems


def test_defaults_are_filled_in_and_read_by_attribute_and_item() -> None:
    """Inputs are complete when the process exists, nested namespaces too, and what has no default is not there."""
    inputs = Cell({"cell": {"a": 3}, "settings": {"n": 1}}).inputs
    assert inputs.cell.a == inputs["cell"]["a"] == 3
    assert inputs.cell.angle == 90.0
    assert inputs.steps == 10
    assert dict(inputs.settings) == {"n": 1}
    assert "label" not in inputs
    with pytest.raises(AttributeError, match="the inputs of Cell has no 'label'"):
        _ = inputs.label


def test_inputs_can_not_be_changed() -> None:
    """Neither by attribute nor by item."""
    inputs = Cell({"cell": {"a": 3}}).inputs
    with pytest.raises(AttributeError):
        inputs.steps = 3
    with pytest.raises(TypeError):
        inputs["steps"] = 3


def test_all_problems_are_told_at_once_by_their_paths() -> None:
    """One error names every wrong port, what was expected and what was given."""
    found = problems_of(
        Cell, {"cell": {"a": -1.0, "angel": 1}, "steps": True, "mode": "bad", "settings": {"x": 1.5}, "labl": "x"}
    )
    assert found == {
        "inputs.cell.a": "must be positive",
        "inputs.cell.angel": "there is no such port; did you mean 'angle'?",
        "inputs.steps": "expected int, got True (bool)",
        "inputs.mode": "expected 'fast' or 'good', got 'bad' (str)",
        "inputs.settings.x": "expected int or str, got 1.5 (float)",
        "inputs.labl": "there is no such port; did you mean 'label'?",
    }
    assert problems_of(Cell, {}) == {"inputs.cell.a": "expected float, nothing was given"}
    assert problems_of(Cell, {"cell": 3}) == {"inputs.cell": "expected a mapping (a namespace of ports), got 3 (int)"}
    assert problems_of(Cell, 3) == {"inputs": "expected a mapping (a namespace of ports), got 3 (int)"}


def test_an_int_is_a_float_but_a_bool_is_no_int() -> None:
    """What Python's class hierarchy says of bool is hardly ever meant."""
    assert Classy({"element": "Cu", "scale": 2}).inputs.scale == 2
    assert problems_of(Classy, {"element": "Cu", "scale": True}) == {"inputs.scale": "expected float, got True (bool)"}


def test_a_validator_may_return_a_text_or_raise() -> None:
    """Both say no; a validator that is broken says so."""

    def define(spec: ProcessSpec) -> None:
        spec.input("a", validator=raises)
        spec.input("b", validator=lambda value: value.nothing)
        spec.input("c", validator=lambda value: value > 0)
        spec.input("d", validator=lambda value: "")
        spec.input("e", validator=lambda value, port: f"{port.name} is not {value}")

    with pytest.raises(InvalidInputError) as raised:
        spec_of(define).read_inputs(dict.fromkeys("abcde", 1))
    assert raised.value.problems == {
        "inputs.a": "never good",
        "inputs.b": "the validator failed with AttributeError(\"'int' object has no attribute 'nothing'\")",
        "inputs.c": "the validator returned True (bool); it must return None, or a text that says what is wrong",
        "inputs.d": "the validator says no, without a reason",
        "inputs.e": "e is not 1",
    }


def test_dataclasses_fill_the_same_spec() -> None:
    """`Inputs` gives ports, types and defaults; the process shows an instance of it."""
    process = Classy({"element": "Cu"})
    assert process.inputs == Classy.Inputs("Cu")
    assert Classy(Classy.Inputs("Al", 2.0)).inputs == Classy.Inputs("Al", 2.0)
    assert Classy.spec().describe()["inputs"]["ports"]["name"] == {
        "type": "str or None",
        "required": False,
        "default": "None",
    }
    assert problems_of(Classy, {"element": None, "name": 3, "scales": 3}) == {
        "inputs.element": "expected str, got None",
        "inputs.name": "expected str or None, got 3 (int)",
        "inputs.scales": "expected list[float], got 3 (int)",
    }


def test_the_two_ways_can_be_mixed() -> None:
    """With ports beside those of `Inputs` the inputs are a namespace that holds both."""

    class Mixed(Classy):
        @classmethod
        def define(cls, spec: ProcessSpec) -> None:
            super().define(spec)
            spec.input("extra", valid_type=int, default=1)

    assert dict(Mixed({"element": "Cu"}).inputs)["extra"] == 1
    assert Mixed({"element": "Cu"}).inputs.element == "Cu"


def test_what_post_init_refuses_is_an_invalid_input() -> None:
    """The dataclass may look at its fields together."""

    class Range(Process):
        @dataclass(frozen=True)
        class Inputs:
            low: int
            high: int

            def __post_init__(self) -> None:
                if self.low > self.high:
                    raise ValueError("low is above high")

        async def run(self) -> None: ...

    assert problems_of(Range, {"low": 2, "high": 1}) == {"inputs": "low is above high"}


def test_a_spec_is_complete_once_it_is_built() -> None:
    """Nothing can be added later, at no depth."""
    for name in ("late", "cell.late"):
        with pytest.raises(SpecError, match=f"the spec is complete and can't be changed any more; define '{name}'"):
            Cell.spec().input(name)
    assert Cell.spec() is Cell.spec()


@pytest.mark.parametrize("name", ["items", "values", "not a name", "_private", "a.keys", "", "a..b"])
def test_a_name_that_could_not_be_read_by_attribute_is_refused(name: str) -> None:
    """A port called `values` would hide, or be hidden by, the method of the mapping."""
    with pytest.raises(SpecError, match="can't be the name of a port"):
        ProcessSpec("X").input(name)


def test_wrong_definitions_are_spec_errors() -> None:
    """A default that does not fit, a port in a port, a type that is none, a class without a first step."""
    spec = ProcessSpec("X")
    with pytest.raises(SpecError, match="does not fit its own port"):
        spec.input("a", valid_type=int, default="x")
    spec.input("b", valid_type=int)
    with pytest.raises(SpecError, match="nothing can be in it"):
        spec.input("b.c")
    with pytest.raises(SpecError, match="no type"):
        spec.input("d", valid_type="int")
    with pytest.raises(SpecError, match="no outline"):
        spec.outline()
    with pytest.raises(SpecError, match="no step to begin with"):
        Process()


def test_an_annotation_that_is_not_there_at_run_time_is_told() -> None:
    """The message names the class and the name that can't be found."""

    class Broken(Process):
        @dataclass(frozen=True)
        class Inputs:
            cell: "Nowhere"  # type: ignore[name-defined]  # noqa: F821, UP037

        async def run(self) -> None: ...

    with pytest.raises(SpecError, match=r"Broken.Inputs.*Nowhere"):
        Broken({"cell": 1})


def test_a_mutable_default_is_not_shared() -> None:
    """Each process has its own copy."""

    class Listy(Process):
        @classmethod
        def define(cls, spec: ProcessSpec) -> None:
            spec.input("x", valid_type=list, default=[])

        async def run(self) -> None: ...

    one, two = Listy(), Listy()
    one.inputs.x.append(1)
    assert two.inputs.x == []


def exposing(**options: Any) -> set[str]:
    class Parent(Process):
        @classmethod
        def define(cls, spec: ProcessSpec) -> None:
            spec.expose_inputs(Nested, **options)

        async def run(self) -> None: ...

    def names(ports: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for name, about in ports.items():
            inner = about.get("ports")
            found |= {prefix + name} if inner is None else names(inner, f"{prefix}{name}.")
        return found

    return names(Parent.spec().describe()["inputs"]["ports"])


class Nested(Process):
    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        for name in ("a", "ab", "n.a", "n.ab", "n.deep.x"):
            spec.input(name, valid_type=int)

    async def run(self) -> None: ...


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"a", "ab", "n.a", "n.ab", "n.deep.x"}),
        ({"include": ["a"]}, {"a"}),
        ({"include": ["n.a", "n.deep"]}, {"n.a", "n.deep.x"}),
        ({"exclude": ["a", "n.deep"]}, {"ab", "n.a", "n.ab"}),
        ({"exclude": ["n"]}, {"a", "ab"}),
        ({"exclude": []}, {"a", "ab", "n.a", "n.ab", "n.deep.x"}),
        ({"include": iter(["a", "n"])}, {"a", "n.a", "n.ab", "n.deep.x"}),
        ({"namespace": "child", "include": ["n.deep"]}, {"child.n.deep.x"}),
        ({"namespace": "x.y", "include": ["ab"]}, {"x.y.ab"}),
    ],
)
def test_exposing_goes_by_whole_segments(options: dict[str, Any], expected: set[str]) -> None:
    """`a` is the port a, and never ab; a namespace stands for all in it."""
    assert exposing(**options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["n.b"]}, r"no port 'n\.b'; there are: a, ab, deep"),
        ({"include": ["x"]}, "no port 'x'; there are: a, ab, n"),
        ({"include": ["a.b"]}, r"no port 'a\.b'"),
        ({"include": ["n"], "exclude": ["n.a"]}, "include or exclude, not both"),
        ({"include": []}, "an empty include exposes nothing"),
        ({"include": "a"}, r"write include=\['a'\]"),
        (
            {"namespace": "x", "namespace_options": {"requird": False}},
            "no option 'requird' of a namespace; there are: dy",
        ),
    ],
)
def test_exposing_in_a_wrong_way_is_a_spec_error(options: dict[str, Any], message: str) -> None:
    """A typing error would otherwise go unnoticed."""
    with pytest.raises(SpecError, match=message):
        exposing(**options)


def test_exposed_inputs_are_ready_for_the_child() -> None:
    """What was taken over can be handed on in one go."""

    class Parent(Process):
        @classmethod
        def define(cls, spec: ProcessSpec) -> None:
            spec.expose_inputs(Cell, "child")
            spec.input("own", valid_type=int)

        async def run(self) -> None: ...

    parent = Parent({"own": 1, "child": {"cell": {"a": 2.0}}})
    assert Cell(parent.exposed_inputs(Cell, "child")).inputs.cell.a == 2.0


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats(),
        lambda inner: st.dictionaries(st.sampled_from(["cell", "a", "angle", "steps", "settings", "x"]), inner),
        max_leaves=8,
    )
)
def test_any_value_is_taken_or_refused_with_reasons(value: Any) -> None:
    """Nothing but `InvalidInputError`, and never an empty one; what is taken is taken the same way again."""
    problems: dict[str, str] = {}
    try:
        process = Cell(value)
    except InvalidInputError as error:
        problems = error.problems
        process = None
    if process is None:
        assert problems
        assert all(path == "inputs" or path.startswith("inputs.") for path in problems)
    else:
        assert Cell(process.inputs).snapshot()["inputs"] == process.snapshot()["inputs"]


def test_a_namespace_of_values_is_handed_on_as_a_dictionary() -> None:
    """What one process shows as a frozen namespace is a plain dictionary in the inputs of the next."""

    class Takes(Process):
        @classmethod
        def define(cls, spec: ProcessSpec) -> None:
            spec.input("x", valid_type=dict)

        async def run(self) -> None: ...

    assert Takes({"x": FrozenNamespace({"k": FrozenNamespace({"a": 1})})}).inputs.x == {"k": {"a": 1}}


# --- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, "", False, (), [], {}, 0.0, None])
def test_an_empty_value_is_a_value(value: Any) -> None:
    """Given or as a default, it is neither "nothing" nor replaced by a default."""

    def define(spec: ProcessSpec) -> None:
        spec.input("given")
        spec.input("beside", default="default")
        spec.input("left", default=value)
        spec.input("typed", valid_type=type(value), default=value)
        spec.output("given")

    spec = spec_of(define)
    values = spec.read_inputs({"given": value, "beside": value})
    assert values == {"given": value, "beside": value, "left": value, "typed": value}
    assert spec.check_outputs({"given": value}) == ({"given": value}, None)


def test_none_is_refused_where_it_is_not_allowed() -> None:
    """It is allowed by the type, or by being the default; then no validator is asked about it."""

    def define(spec: ProcessSpec) -> None:
        spec.input("a", valid_type=int)
        spec.input("b", valid_type=int | None)
        spec.input("c", valid_type=int, default=None, validator=positive)

    spec = spec_of(define)
    assert refused(spec, {"a": None, "b": None}) == {"inputs.a": "expected int, got None"}
    assert spec.read_inputs({"a": 1, "b": None, "c": None}) == {"a": 1, "b": None, "c": None}
    assert refused(spec, {"a": 1, "b": None, "c": -1}) == {"inputs.c": "must be positive"}


def test_the_contents_of_containers_are_checked_and_not_converted() -> None:
    """An int in a list of floats stays an int."""

    def define(spec: ProcessSpec) -> None:
        spec.input("points", valid_type=dict[str, list[float]])

    spec = spec_of(define)
    given = {"a": [1, 2.5]}
    assert spec.read_inputs({"points": given})["points"] is given
    assert refused(spec, {"points": {"a": [1, "x"], "b": 3}}) == {
        "inputs.points.a[1]": "expected float, got 'x' (str)",
        "inputs.points.b": "expected list[float], got 3 (int)",
    }


class Length:
    def __init__(self, metres: float) -> None:
        self.metres = metres


def read_length(value: Any) -> Length:
    if value == "nothing":
        return value  # type: ignore[no-any-return]
    if isinstance(value, str):
        raise ValueError(f"{value!r} has no unit")
    return Length(value + 0)


def test_a_serializer_makes_the_valid_type_of_other_values() -> None:
    """Before validation, and only of those that are not of it yet, defaults too; its error is a problem of the port."""
    seen: list[float] = []

    def define(spec: ProcessSpec) -> None:
        spec.input(
            "x",
            valid_type=Length,
            serializer=read_length,
            validator=lambda value: seen.append(value.metres),
            default=2.0,
        )

    spec = spec_of(define)
    length = Length(1.0)
    assert spec.read_inputs({"x": length})["x"] is length
    assert spec.read_inputs({"x": 3})["x"].metres == 3
    assert spec.read_inputs({})["x"].metres == 2.0
    assert seen == [1.0, 3, 2.0]
    assert refused(spec, {"x": "ten"}) == {
        "inputs.x": "the serializer could not convert 'ten' (str): 'ten' has no unit"
    }
    assert refused(spec, {"x": None})["inputs.x"].startswith("the serializer could not convert None: TypeError(")
    assert refused(spec, {"x": "nothing"}) == {"inputs.x": "expected Length, got 'nothing' (str)"}


def test_defaults_may_need_each_other_in_any_order() -> None:
    """A function of one argument sees the other values of its namespace, given or made."""

    def define(spec: ProcessSpec) -> None:
        spec.input("double", default=lambda inputs: 2 * inputs.base)
        spec.input("more", default=lambda inputs: inputs["double"] + inputs.group.n)
        spec.input("base", valid_type=int, default=lambda: 1)
        spec.input("maybe", required=False)
        spec.input("asks", default=lambda inputs: (inputs.get("maybe", "no"), "maybe" in inputs, sorted(inputs)))
        spec.input("group.n", default=lambda group: len(group.m))
        spec.input("group.m", default=[1, 2, 3])

    spec = spec_of(define)
    names = ["base", "double", "group", "more"]
    assert spec.read_inputs({}) == {
        "double": 2,
        "more": 5,
        "base": 1,
        "asks": ("no", False, names),
        "group": {"n": 3, "m": [1, 2, 3]},
    }
    assert list(spec.read_inputs({"group": {"m": []}, "base": 5})) == ["double", "more", "base", "asks", "group"]
    assert spec.read_inputs({"double": 7, "maybe": 1})["more"] == 10
    assert spec.read_inputs({"double": 7, "maybe": 1})["asks"] == (1, True, sorted([*names, "maybe"]))


def test_defaults_in_a_circle_are_one_clear_problem() -> None:
    """It names the ports of the circle; a given value breaks the circle."""

    def define(spec: ProcessSpec) -> None:
        spec.input("outside", default=lambda inputs: inputs.a)
        spec.input("a", default=lambda inputs: inputs.b)
        spec.input("b", default=lambda inputs: inputs.c)
        spec.input("c", default=lambda inputs: inputs.a)

    spec = spec_of(define)
    assert refused(spec, {}) == {"inputs.a": "the defaults need each other in a circle: a -> b -> c -> a; give one"}
    assert spec.read_inputs({"b": 1}) == {"outside": 1, "a": 1, "b": 1, "c": 1}


def test_a_default_that_needs_a_wrong_value_is_no_problem_of_its_own() -> None:
    """Only the cause is told; a default that fails by itself is told too, and so is one that does not fit."""

    def define(spec: ProcessSpec) -> None:
        spec.input("a", valid_type=int)
        spec.input("b", default=lambda inputs: inputs.a + 1)
        spec.input("c", default=lambda: 1 / 0)
        spec.input("d", valid_type=int, default=lambda: "x")
        spec.input("e", default=lambda inputs: inputs.nothing)

    spec = spec_of(define)
    others = {
        "inputs.c": "its default could not be made: ZeroDivisionError('division by zero')",
        "inputs.d": "expected int, got 'x' (str)",
        "inputs.e": "its default could not be made: AttributeError(\"inputs has no value for 'nothing'; "
        'there are ports for: a, b, c, d, e")',
    }
    assert refused(spec, {"a": "x"}) == {"inputs.a": "expected int, got 'x' (str)", **others}
    assert refused(spec, {}) == {"inputs.a": "expected int, nothing was given", **others}


def test_an_optional_namespace_is_left_out_with_its_defaults() -> None:
    """Unless it is given, were it empty; its validator is asked then only."""

    def define(spec: ProcessSpec) -> None:
        spec.input_namespace("some", required=False, validator=lambda some: "too small" if some.n < 2 else None)
        spec.input("some.n", default=1)

    spec = spec_of(define)
    assert spec.read_inputs({}) == {}
    assert refused(spec, {"some": {}}) == {"inputs.some": "too small"}
    assert spec.read_inputs({"some": {"n": 2}}) == {"some": {"n": 2}}


def test_a_dynamic_namespace_takes_any_names_at_any_depth() -> None:
    """Any mapping will do; what is in it has the type of the namespace."""

    def define(spec: ProcessSpec) -> None:
        spec.input_namespace("any", dynamic=True, valid_type=list[int])
        spec.output_namespace("any", dynamic=True, valid_type=int)

    spec = spec_of(define)
    given = {"any": FrozenNamespace({"a": [1], "deep": FrozenNamespace({"er": [2]})})}
    assert spec.read_inputs(given) == {"any": {"a": [1], "deep": {"er": [2]}}}
    assert refused(spec, {"any": {"a": ["x"], "deep": {"er": 3, 4: []}, 5: []}}) == {
        "inputs.any.a[0]": "expected int, got 'x' (str)",
        "inputs.any.deep.er": "expected list[int], got 3 (int)",
        "inputs.any.deep.4": "expected a text as the name, got 4 (int)",
        "inputs.any.5": "expected a text as the name, got 5 (int)",
    }
    assert spec.read_output("any.x.y", 1) == 1
    with pytest.raises(InvalidInputError, match=r"outputs.any.x.y: expected int, got 'a'"):
        spec.read_output("any.x.y", "a")
    with pytest.raises(InvalidInputError, match=r"outputs.other.x: there is no such port"):
        spec.read_output("other.x", 1)


# --- definition -----------------------------------------------------------------------------------------


def test_a_later_definition_wins() -> None:
    """A subclass may say anew what a port is; saying more of a namespace keeps its ports."""

    def define(spec: ProcessSpec) -> None:
        spec.input("a", valid_type=int)
        spec.input("a", valid_type=str, default="x")
        spec.input("space.n", default=1)
        spec.input_namespace("space", required=False, help="about it")
        spec.input_namespace("space", dynamic=True, metadata={"kept": [1, {"deep": True}]})

    spec = spec_of(define)
    assert spec.read_inputs({"space": {"other": 2}}) == {"a": "x", "space": {"n": 1, "other": 2}}
    assert spec.read_inputs({}) == {"a": "x"}
    assert spec.inputs.describe()["ports"]["space"] == {
        "ports": {"n": {"type": "any value", "required": False, "default": "1"}},
        "dynamic": "any value",
        "required": False,
        "help": "about it",
        "metadata": {"kept": [1, {"deep": True}]},
    }


def not_a_validator(one: Any, two: Any, three: Any) -> None: ...


async def asynchronous(value: Any) -> None: ...


@pytest.mark.parametrize(
    ("define", "message"),
    [
        (lambda spec: (spec.input("a.b"), spec.input("a")), "'a' is a namespace with ports in it"),
        (lambda spec: (spec.input("a"), spec.input_namespace("a")), "'a' is a port, so nothing can be in it"),
        (lambda spec: (spec.input("a"), spec.input("a.b.c")), "'a.b.c': 'a' is a port"),
        (lambda spec: (spec.input("n"), spec.expose_inputs(Nested)), "'n' is a port here"),
        (lambda spec: (spec.input("x"), spec.expose_inputs(Nested, "x")), "'x' is a port, so nothing can be in it"),
        (lambda spec: spec.input("a", validator=not_a_validator), "'a': a validator takes"),
        (lambda spec: spec.input("a", validator=asynchronous), "'a': a validator is a plain function"),
        (lambda spec: spec.input("a", default=lambda x, y: 1), "'a': a default takes nothing, or the values"),
        (lambda spec: spec.input("a", default=-1.0, validator=positive), "'a' does not fit its own port: must be"),
        (
            lambda spec: spec.input("a", valid_type=list[int], default=["x"]),
            "'a' does not fit its own port: expected i",
        ),
        (lambda spec: spec.input("a", serializer=int), "'a': a serializer is for values that are not of the valid ty"),
        (lambda spec: spec.input_namespace("a", valid_type=int), "'a': the valid_type of a namespace is for values wi"),
        (lambda spec: spec.exit_code(-1, "A", ""), "0 or more; A has -1"),
        (lambda spec: spec.exit_code(True, "A", ""), "0 or more; A has True"),
        (lambda spec: spec.exit_code(400, "a b", ""), "identifier, like ERROR_NO_ENERGY; 400 has 'a b'"),
        (lambda spec: spec.exit_code(400, "A", "{}"), "the message of A has a field without a name"),
        (lambda spec: spec.exit_code(400, "A", "{"), "the message of A can't be filled in"),
        (lambda spec: spec.exit_code(11, "A", ""), r"A \(11\) conflicts with ERROR_MISSING_OUTPUT \(11\)"),
        (lambda spec: spec.exit_code(11, "ERROR_MISSING_OUTPUT", ""), "set by Prunus itself"),
        (
            lambda spec: (spec.exit_code(400, "A", ""), spec.exit_code(401, "A", "")),
            r"A \(401\) conflicts with A \(400",
        ),
        (lambda spec: spec.message("a.b"), "'a.b' can't be the name of a message"),
        (lambda spec: spec.message("a", valid_type="int"), "the message a: 'int' is no type"),
    ],
)
def test_what_makes_no_sense_is_a_spec_error(define: Any, message: str) -> None:
    """It names the port and says why."""
    with pytest.raises(SpecError, match=message):
        spec_of(define)


def test_nothing_of_a_complete_spec_can_be_changed() -> None:
    """At no level: neither the spec, nor namespaces, nor ports, nor what they hold."""
    metadata, default = {"flags": ["a"]}, [1]

    def define(spec: ProcessSpec) -> None:
        spec.input("deep.x", valid_type=list, default=default, metadata=metadata)
        spec.exit_code(400, "ERROR_A", "")
        spec.message("m")

    spec = spec_of(define)
    deep = spec.inputs.find("deep")
    port = spec.inputs.find("deep.x")
    for change in (
        lambda: setattr(spec, "inputs", None),
        lambda: setattr(deep, "dynamic", True),
        lambda: setattr(port, "required", False),
        lambda: delattr(port, "name"),
        lambda: delattr(deep, "ports"),
        lambda: spec.input("deep.y"),
        lambda: spec.input_namespace("deep", dynamic=True),
        lambda: spec.output("y"),
        lambda: spec.expose_inputs(Nested),
        lambda: spec.expose_outputs(Nested, "deep"),
        lambda: spec.exit_code(401, "ERROR_B", ""),
        lambda: spec.message("n"),
    ):
        with pytest.raises(SpecError):
            change()
    for container in (deep.ports, port.metadata, spec.messages, spec.exposures):  # type: ignore[union-attr]
        with pytest.raises(TypeError):
            container["new"] = 1  # type: ignore[index]
    port.default.append(2)  # type: ignore[union-attr]
    default.append(2)
    metadata["flags"].append("b")
    assert spec.read_inputs({}) == {"deep": {"x": [1]}}
    assert port.describe()["metadata"] == {"flags": ["a"]}


def test_what_is_changed_after_exposing_leaves_the_source_alone() -> None:
    """And an exposed namespace is a copy, that its new class may go on defining."""

    def define(spec: ProcessSpec) -> None:
        spec.expose_inputs(Nested)
        spec.input("n.new", default=1)
        spec.input_namespace("n", help="mine")

    assert "new" in spec_of(define).inputs.find("n").ports  # type: ignore[union-attr]
    assert "new" not in Nested.spec().inputs.find("n").ports  # type: ignore[union-attr]
    assert Nested.spec().inputs.find("n").help is None


def test_values_are_not_read_before_the_spec_is_complete() -> None:
    """Half a spec would drop values silently."""
    spec = ProcessSpec("X")
    spec.input("a")
    with pytest.raises(SpecError, match="not complete yet"):
        spec.read_inputs({"a": 1})


# --- exposing -------------------------------------------------------------------------------------------


def in_order(values: Any) -> str | None:
    assert not {"low", "high"} ^ set(values) - {"range"}
    return None if values.low <= values.high else "low is above high"


def asks_for_port(values: Any, port: Any) -> str | None:
    return None if "low" in port.ports else "this is another namespace"


class Range(Process):
    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        spec.input("range.low", default=1)
        spec.input("range.high", default=2)
        spec.input_namespace("range", validator=in_order)
        spec.input("low", default=1)
        spec.input("high", default=2, metadata={"kept": True})
        spec.inputs.configure("inputs", {"metadata": {"whole": True}, "help": "of Range"})
        spec.inputs.validator = in_order
        spec.output("n.a", valid_type=int, required=False)
        spec.output("b", valid_type=int, required=False)
        spec.output_namespace("many", dynamic=True)

    async def run(self) -> None: ...


def test_a_namespace_validator_comes_only_with_all_of_its_ports() -> None:
    """And sees these only, whatever else is in the namespace where they are now."""

    def whole(spec: ProcessSpec) -> None:
        spec.input("other")
        spec.expose_inputs(Range)

    def part(spec: ProcessSpec) -> None:
        spec.expose_inputs(Range, exclude=["range.high", "high"])

    def inner(spec: ProcessSpec) -> None:
        spec.expose_inputs(Range, include=["range"])

    def almost(spec: ProcessSpec) -> None:
        spec.expose_inputs(Range, exclude=["range.high"])

    wrong = {"low": 3, "range": {"low": 4}}
    told = {"inputs": "low is above high", "inputs.range": "low is above high"}
    assert refused(spec_of(whole), {**wrong, "other": 1}) == {"inputs.range": told["inputs.range"]}
    assert refused(spec_of(whole), {"low": 3, "other": 1}) == {"inputs": told["inputs"]}
    assert spec_of(part).read_inputs(wrong) == wrong
    assert spec_of(almost).read_inputs(wrong) == {**wrong, "high": 2}
    assert refused(spec_of(inner), {"range": {"low": 4}}) == {"inputs.range": told["inputs.range"]}


def test_exposing_again_keeps_what_came_with_the_ports() -> None:
    """Metadata, help and validators go from class to class to class."""

    class Middle(Process):
        @classmethod
        def define(cls, spec: ProcessSpec) -> None:
            spec.expose_inputs(Range, "a")

        async def run(self) -> None: ...

    spec = spec_of(lambda spec: spec.expose_inputs(Middle, "b"))
    about = spec.inputs.describe()["ports"]["b"]["ports"]["a"]
    assert about["help"] == "of Range"
    assert about["metadata"] == {"whole": True}
    assert about["ports"]["high"]["metadata"] == {"kept": True}
    assert refused(spec, {"b": {"a": {"low": 5}}}) == {"inputs.b.a": "low is above high"}


def test_namespace_options_win() -> None:
    """Over what the namespace had, and over validators that were taken over."""
    options = {"required": False, "dynamic": True, "valid_type": int, "validator": asks_for_port, "help": "h"}

    def define(spec: ProcessSpec) -> None:
        spec.expose_inputs(Range, "x", namespace_options={**options, "metadata": {"m": 1}})

    spec = spec_of(define)
    assert spec.read_inputs({}) == {}
    assert spec.read_inputs({"x": {"low": 9, "more": 1}})["x"]["more"] == 1
    assert spec.inputs.describe()["ports"]["x"]["metadata"] == {"m": 1}


class Parent(Process):
    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        spec.expose_inputs(Nested, "one")
        spec.expose_inputs(Nested, "two.deep", include=["a", "n.deep"])
        spec.expose_inputs(Nested, exclude=["n", "ab"])
        spec.expose_inputs(Open, "open")
        spec.input("one.own", default=1)
        spec.input("open.own", default=2)
        spec.expose_outputs(Range, "out")
        spec.expose_outputs(Range, exclude=["n"])

    async def run(self) -> None: ...


class Open(Process):
    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        spec.input("named", default=1)
        spec.inputs.configure("inputs", {"dynamic": True, "valid_type": (int, list)})

    async def run(self) -> None: ...


def test_exactly_what_was_exposed_is_handed_on() -> None:
    """By class and namespace, also if a class is exposed several times."""
    spec = Parent.spec()
    assert spec.exposed_inputs(Nested, "one") == ("a", "ab", "n")
    assert spec.exposed_inputs(Nested, "two.deep") == ("a", "n.deep")
    assert spec.exposed_inputs(Nested) == ("a",)
    given = {
        "one": {"a": 1, "ab": 2, "n": {"a": 3, "ab": 4, "deep": {"x": 5}}},
        "two": {"deep": {"a": 6, "n": {"deep": {"x": 7}}}},
        "a": 8,
        "open": {"extra": 9},
    }
    values = spec.read_inputs(given)
    assert spec.pick_exposed_inputs(Nested, values, "one") == given["one"]
    assert spec.pick_exposed_inputs(Nested, values, "two.deep") == {"a": 6, "n": {"deep": {"x": 7}}}
    assert spec.pick_exposed_inputs(Nested, values) == {"a": 8}
    assert spec.pick_exposed_inputs(Open, values, "open") == {"named": 1, "extra": 9}
    assert values["open"]["own"] == 2
    for process_class, namespace in ((Nested, "three"), (Cell, None)):
        with pytest.raises(SpecError, match=r"it exposes: those of Nested in 'one', those of Nested in 'two\.deep', "):
            spec.exposed_inputs(process_class, namespace)


def test_the_outputs_of_a_child_are_handed_on_by_their_names_here() -> None:
    """Ready for `out`, one by one; what the child did not emit is not there."""
    outputs = FrozenNamespace(
        {"n": FrozenNamespace({"a": 1}), "many": FrozenNamespace({"x": FrozenNamespace({"y": 2})})}
    )
    spec = Parent.spec()
    picked = spec.pick_exposed_outputs(Range, outputs, "out")
    assert picked == {"out.n.a": 1, "out.many.x": {"y": 2}}
    assert spec.pick_exposed_outputs(Range, outputs) == {"many.x": {"y": 2}}
    for name, value in picked.items():
        assert spec.read_output(name, value) == value


def test_classes_that_expose_each_other_are_told() -> None:
    """Not with a RecursionError."""

    class Selfish(Process):
        async def run(self) -> None: ...

    def define(cls: type[Process], spec: ProcessSpec) -> None:
        spec.expose_inputs(cls)

    with pytest.raises(SpecError, match=r"expose each other in a circle: .*Narcissus -> .*Narcissus"):
        spec_of_class(type("Narcissus", (Selfish,), {"define": classmethod(define)}))


# --- exit codes and outputs -----------------------------------------------------------------------------


class Failing(Process):
    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.exit_code(410, "ERROR_NO_ENERGY", "no energy after {n} steps, {{really}}")
        spec.exit_code(0, "FINE", "all is well")

    async def run(self) -> None: ...


class FailingToo(Failing):
    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.exit_code(410, "ERROR_NO_ENERGY", "none")
        spec.exit_code(420, "ERROR_LOST", "lost")


def test_exit_codes_are_found_by_label_and_by_status() -> None:
    """A subclass has those of its base, and may give them another message."""
    codes = Failing.spec().exit_codes
    assert codes.ERROR_NO_ENERGY == codes[410] == ExitCode(410, "ERROR_NO_ENERGY", codes[410].message)
    assert [code.status for code in codes] == [0, 10, 11, 410]
    assert len(codes) == 4
    assert 410 in codes
    assert "FINE" in codes
    assert 411 not in codes
    assert "ERROR_NO_ENERGY" in dir(codes)
    assert repr(codes).startswith("<exit codes of Failing: FINE (0), ERROR_INVALID_OUTPUT (10)")
    too = FailingToo.spec().exit_codes
    assert (too.ERROR_NO_ENERGY.message, too.ERROR_LOST.status, too.FINE.status) == ("none", 420, 0)
    with pytest.raises(AttributeError, match="Failing has no exit code ERROR_LOST; there are: FINE, ERROR_INVALID"):
        _ = codes.ERROR_LOST
    with pytest.raises(KeyError, match="Failing has no exit code with status 7; there are: 0, 10, 11, 410"):
        _ = codes[7]
    with pytest.raises(AttributeError):
        codes.ERROR_NEW = 3  # type: ignore[attr-defined]


def test_the_message_of_an_exit_code_is_filled_in() -> None:
    """With all the names in it; the code itself stays as it was."""
    code = Failing.spec().exit_codes.ERROR_NO_ENERGY
    assert code.format(n=3, more=1) == ExitCode(410, "ERROR_NO_ENERGY", "no energy after 3 steps, {really}")
    assert str(code.format(n=3)) == "ERROR_NO_ENERGY (410): no energy after 3 steps, {really}"
    with pytest.raises(ValueError, match="the message of ERROR_NO_ENERGY needs a value for 'n'"):
        code.format(m=3)


def test_missing_and_wrong_outputs_are_exit_codes() -> None:
    """Nothing is raised; what was emitted is kept, and defaults are filled in."""

    def define(spec: ProcessSpec) -> None:
        spec.output("a", valid_type=int)
        spec.output("n.b", valid_type=int)
        spec.output("c", valid_type=int, default=3)
        spec.output("d", valid_type=int, required=False)
        spec.output_namespace("n", validator=lambda values: "b is odd" if values.b % 2 else None)

    spec = spec_of(define)
    assert spec.check_outputs({"a": 1, "n": {"b": 2}}) == ({"a": 1, "n": {"b": 2}, "c": 3}, None)
    assert spec.check_outputs({"d": 1}) == (
        {"d": 1, "n": {}, "c": 3},
        ExitCode(11, "ERROR_MISSING_OUTPUT", "the process did not emit the required output a, n.b"),
    )
    values, code = spec.check_outputs({"a": 1, "n": {"b": 1}, "d": "x"})
    assert values == {"a": 1, "n": {"b": 1}, "c": 3, "d": "x"}
    assert code == ExitCode(
        10,
        "ERROR_INVALID_OUTPUT",
        "the process emitted outputs that do not fit: outputs.n: b is odd; outputs.d: expected int, got 'x' (str)",
    )
    assert spec_of(lambda spec: None).check_outputs({}) == ({}, None)


# --- messages -------------------------------------------------------------------------------------------


class Talking(Process):
    @dataclass
    class Messages:
        pick: int
        range: list[float]

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("done", help="when all is said")
        spec.message("cell", valid_type=Point)

    async def run(self) -> None: ...


@dataclass(frozen=True)
class Point:
    x: float


def test_messages_are_declared_and_read() -> None:
    """By a nested class and in `define`; plain data is converted."""
    spec = Talking.spec()
    assert spec.read_message("pick", 3) == 3
    assert spec.read_message("cell", {"x": 1}) == Point(1.0)
    assert spec.read_message("done", None) is None
    assert spec.describe()["messages"] == {
        "pick": {"type": "int"},
        "range": {"type": "list[float]"},
        "done": {"type": "any value", "help": "when all is said"},
        "cell": {"type": "Point"},
    }
    spec.check_message("pick")


@pytest.mark.parametrize(
    ("name", "value", "problems"),
    [
        ("pick", "a", {"messages.pick": "expected int, got 'a' (str)"}),
        ("cell", {"x": "a"}, {"messages.cell.x": "expected float, got 'a' (str)"}),
        ("range", [1, None], {"messages.range[1]": "expected float, got None"}),
        ("pikc", 3, {"messages.pikc": "there is no such message; did you mean 'pick'?"}),
        ("zzz", 3, {"messages.zzz": "there is no such message; there are: pick, range, done, cell"}),
    ],
)
def test_a_wrong_message_is_an_invalid_input(name: str, value: Any, problems: dict[str, str]) -> None:
    """With its path."""
    with pytest.raises(InvalidInputError) as raised:
        Talking.spec().read_message(name, value)
    assert raised.value.problems == problems


# --- inputs and outputs as classes ----------------------------------------------------------------------


class Structured(Process):
    class Inputs(msgspec.Struct, frozen=True):
        element: Annotated[str, msgspec.Meta(description="the symbol", min_length=1)]
        scales: list[float] = msgspec.field(default_factory=lambda: [1.0], name="strains")
        kinds: list[int] = []
        label: str | None = None

    class Outputs(msgspec.Struct):
        energy: float

        def __post_init__(self) -> None:
            if self.energy > 0:
                raise ValueError("not bound")

    async def run(self) -> None: ...


def test_a_struct_makes_the_inputs() -> None:
    """Its fields are the ports, by their names in Python; bounds are checked."""
    spec = Structured.spec()
    inputs = Structured({"element": "Cu"}).inputs
    assert inputs == Structured.Inputs("Cu")
    assert type(inputs) is Structured.Inputs
    assert inputs.kinds is not Structured({"element": "Cu"}).inputs.kinds
    assert Structured(Structured.Inputs("Al", label="x")).inputs == Structured.Inputs("Al", label="x")
    assert spec.describe()["inputs"]["ports"]["element"] == {"type": "str", "required": True, "help": "the symbol"}
    assert refused(spec, {"element": "", "scales": ["a"], "strains": [], "label": 3}) == {
        "inputs.element": "expected str of length >= 1, got '' (str)",
        "inputs.scales[0]": "expected float, got 'a' (str)",
        "inputs.strains": "there is no such port; there are: element, scales, kinds, label",
        "inputs.label": "expected str or None, got 3 (int)",
    }
    assert fields_of(inputs) == {"element": "Cu", "scales": [1.0], "kinds": [], "label": None}
    assert spec.check_outputs({"energy": -1.0}) == ({"energy": -1.0}, None)
    assert spec.check_outputs({"energy": 1.0})[1] == ExitCode(
        10, "ERROR_INVALID_OUTPUT", "the process emitted outputs that do not fit: outputs: not bound"
    )


def test_a_class_looks_at_its_values_wherever_they_are() -> None:
    """Also beside other ports, and in a class that has taken over all of them."""

    class Mixed(Process):
        @dataclass
        class Inputs:
            low: int
            high: int = 2

            def __post_init__(self) -> None:
                if self.low > self.high:
                    raise ValueError("low is above high")

        @classmethod
        def define(cls, spec: ProcessSpec) -> None:
            spec.input("other", default=0)

        async def run(self) -> None: ...

    assert Mixed.spec().read_inputs({"low": 1}) == {"low": 1, "high": 2, "other": 0}
    assert refused(Mixed.spec(), {"low": 3}) == {"inputs": "low is above high"}
    exposing = spec_of(lambda spec: spec.expose_inputs(Mixed, "mixed"))
    assert refused(exposing, {"mixed": {"low": 3}}) == {"inputs.mixed": "low is above high"}
    partly = spec_of(lambda spec: spec.expose_inputs(Mixed, exclude=["other"]))
    assert partly.read_inputs({"low": 3}) == {"low": 3, "high": 2}


def test_a_nested_class_may_use_the_names_beside_it() -> None:
    """An annotation of `Inputs` may name another class in the body of the process class."""

    class Neighbours(Process):
        class Kind(Enum):
            FCC = "fcc"

        @dataclass
        class Inputs:
            kind: "Kind"  # type: ignore[name-defined]  # noqa: F821, UP037

        async def run(self) -> None: ...

    assert Neighbours({"kind": Neighbours.Kind.FCC}).inputs.kind is Neighbours.Kind.FCC


@pytest.mark.parametrize("name", ["Inputs", "Outputs", "Messages"])
def test_what_has_no_fields_can_not_say_what_there_is(name: str) -> None:
    """The error says what to write; a field that nobody can give is told too."""
    with pytest.raises(SpecError, match=rf"Some.{name} must be a dataclass, a msgspec.Struct or a pydantic model"):
        spec_of(lambda spec: None, **{name: type(name, (), {})})
    with pytest.raises(SpecError, match=r"Some.\w+.x: a field with init=False"):
        spec_of(lambda spec: None, **{name: make_dataclass(name, [("x", int, field(init=False))])})


def test_pydantic_models_make_inputs_and_outputs() -> None:
    """They check, convert and make defaults themselves; the values that are kept are plain."""
    pydantic = pytest.importorskip("pydantic")

    class Lattice(pydantic.BaseModel):  # type: ignore[name-defined,misc]
        a: float = pydantic.Field(gt=0)

    class Inputs(pydantic.BaseModel):  # type: ignore[name-defined,misc]
        model_config = pydantic.ConfigDict(frozen=True)
        lattice: Lattice = pydantic.Field(alias="cell", description="the cell")
        steps: int = 3
        names: list[str] = pydantic.Field(default_factory=list)

        @pydantic.model_validator(mode="after")
        def is_consistent(self) -> Any:
            if self.steps > self.lattice.a * 10:
                raise ValueError("too many steps for this cell")
            return self

    class Outputs(pydantic.BaseModel):  # type: ignore[name-defined,misc]
        energy: float = pydantic.Field(lt=0)

    spec = spec_of(lambda spec: None, Inputs=Inputs, Outputs=Outputs)
    values, shown = spec.fill_inputs({"lattice": {"a": 1}, "steps": "2"})
    assert values == {"lattice": {"a": 1.0}, "steps": 2, "names": []}
    assert type(shown) is Inputs
    assert spec.show_inputs(values) == shown == Inputs(cell={"a": 1}, steps=2)
    assert spec.read_inputs(shown) == values == fields_of(shown)
    assert spec.describe()["inputs"]["ports"] == {
        "lattice": {"type": "Lattice", "required": True, "help": "the cell"},
        "steps": {"type": "int", "required": False, "default": "3"},
        "names": {"type": "list[str]", "required": False, "default": "made by the model"},
    }
    assert refused(spec, {"lattice": {"a": -1}, "steps": "x", "stepz": 1}) == {
        "inputs.stepz": "there is no such port; did you mean 'steps'?",
        "inputs.lattice.a": "input should be greater than 0, got -1 (int)",
        "inputs.steps": "input should be a valid integer, unable to parse string as an integer, got 'x' (str)",
    }
    assert refused(spec, {"steps": 1}) == {"inputs.lattice": "expected Lattice, nothing was given"}
    assert refused(spec, {"lattice": {"a": 1}, "steps": 20}) == {"inputs": "too many steps for this cell"}
    assert spec.check_outputs({"energy": -1}) == ({"energy": -1.0}, None)
    assert spec.check_outputs({"energy": 1})[1] == ExitCode(
        10,
        "ERROR_INVALID_OUTPUT",
        "the process emitted outputs that do not fit: outputs.energy: input should be less than 0, got 1 (int)",
    )
    assert spec.check_outputs({})[1].status == 11  # type: ignore[union-attr]
    exposing = spec_of(lambda spec: spec.expose_inputs(with_inputs(Inputs), "child"))
    assert refused(exposing, {"child": {"lattice": {"a": 0}}}) == {
        "inputs.child.lattice.a": "input should be greater than 0, got 0 (int)"
    }


def with_inputs(inputs: Any) -> type[Process]:
    async def run(self: Any) -> None: ...

    return type("WithInputs", (Process,), {"Inputs": inputs, "run": run})
