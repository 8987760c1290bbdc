"""Ports and specs: what a process takes, and what it says about what it does not take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import InvalidInputError, SpecError
from prunus.processes import FrozenNamespace, Process, ProcessSpec


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
        "inputs.steps": "expected int, True (bool) was given",
        "inputs.mode": "expected one of 'fast', 'good'; 'bad' (str) was given",
        "inputs.settings.x": "expected int or str, 1.5 (float) was given",
        "inputs.labl": "there is no such port; did you mean 'label'?",
    }
    assert problems_of(Cell, {}) == {"inputs.cell.a": "expected float, nothing was given"}
    assert problems_of(Cell, {"cell": 3}) == {
        "inputs.cell": "expected a mapping (a namespace of ports), 3 (int) was given"
    }
    assert problems_of(Cell, 3) == {"inputs": "expected a mapping (a namespace of ports), 3 (int) was given"}


def test_an_int_is_a_float_but_a_bool_is_no_int() -> None:
    """What Python's class hierarchy says of bool is hardly ever meant."""
    assert Classy({"element": "Cu", "scale": 2}).inputs.scale == 2
    assert problems_of(Classy, {"element": "Cu", "scale": True}) == {
        "inputs.scale": "expected float, True (bool) was given"
    }


def test_a_validator_may_return_a_text_or_raise() -> None:
    """Both say no; a validator that is broken says so."""
    spec = ProcessSpec("X")
    spec.input("a", validator=raises)
    spec.input("b", validator=lambda value: value.nothing)
    with pytest.raises(InvalidInputError) as raised:
        spec.read_inputs({"a": 1, "b": 2})
    assert raised.value.problems["inputs.a"] == "never good"
    assert raised.value.problems["inputs.b"].startswith("the validator failed with AttributeError")


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
        "inputs.element": "expected str, None was given",
        "inputs.name": "expected str or None, 3 (int) was given",
        "inputs.scales": "expected list, 3 (int) was given",
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
        with pytest.raises(SpecError, match="complete"):
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
        ({"include": ["n"], "exclude": ["n.a"]}, {"n.ab", "n.deep.x"}),
        ({"include": []}, set()),
        ({"namespace": "child", "include": ["n.deep"]}, {"child.n.deep.x"}),
        ({"namespace": "x.y", "include": ["ab"]}, {"x.y.ab"}),
    ],
)
def test_exposing_goes_by_whole_segments(options: dict[str, Any], expected: set[str]) -> None:
    """`a` is the port a, and never ab; a namespace stands for all in it."""
    assert exposing(**options) == expected


def test_exposing_what_is_not_there_is_a_spec_error() -> None:
    """A typing error in `include` would otherwise go unnoticed."""
    with pytest.raises(SpecError, match=r"no port 'n\.b'"):
        exposing(exclude=["n.b"])


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
