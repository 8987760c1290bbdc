"""Outlines and positions, without a process (and, at the end, with one that crashes after each step)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prunus.errors import SpecError
from prunus.processes import Process, WorkChain, WorkChainSpec, if_, return_, while_
from prunus.processes.outline import End, Outline, Path, Question, Return, Step, advance, compile_outline, seek


class Names:
    """Every name is a method."""

    def a(self) -> None: ...
    def b(self) -> None: ...
    def c(self) -> None: ...
    def d(self) -> None: ...
    def p(self) -> bool: ...  # type: ignore[empty-body]
    def q(self) -> bool: ...  # type: ignore[empty-body]


def compiled(*instructions: Any) -> Outline:
    return compile_outline(instructions, Names)


def trace(outline: Outline, answers: dict[str, list[bool]]) -> list[str]:
    """The names of the steps and questions in the order in which they are reached."""
    names: list[str] = []

    def ask(name: str) -> bool:
        names.append(f"{name}?")
        return answers[name].pop(0)

    path = seek(outline, outline.start, ask)
    while isinstance(place := outline.at(path), Step):
        names.append(place.name)
        path = advance(outline, path, ask)
    return [*names, f"return {place.code}"] if isinstance(place, Return) else names


def test_steps_follow_one_another() -> None:
    """The simplest outline; the position is the number of the step."""
    outline = compiled(Names.a, Names.b)
    assert trace(outline, {}) == ["a", "b"]
    assert outline.places == {(0,): Step("a", (1,)), (1,): Step("b", (2,)), (2,): End()}


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([True], [], ["p?", "a", "d"]),
        ([False], [True], ["p?", "q?", "b", "d"]),
        ([False], [False], ["p?", "q?", "c", "d"]),
    ],
)
def test_the_first_branch_with_yes_is_taken(p: list[bool], q: list[bool], expected: list[str]) -> None:
    """`elif_` is asked only after a no, `else_` never."""
    outline = compiled(if_(Names.p)(Names.a).elif_(Names.q)(Names.b).else_(Names.c), Names.d)
    assert trace(outline, {"p": p, "q": q}) == expected


def test_a_loop_is_asked_again_after_each_turn() -> None:
    """Also when its body ends with a branch; and it is left for what follows it."""
    outline = compiled(while_(Names.p)(Names.a, if_(Names.q)(Names.b)), Names.c)
    answers = {"p": [True, True, False], "q": [True, False]}
    assert trace(outline, answers) == ["p?", "a", "q?", "b", "p?", "a", "q?", "p?", "c"]


def test_an_outline_may_begin_and_end_with_a_question() -> None:
    """A position may be a question, so a process can stop there and go on."""
    outline = compiled(if_(Names.p)(while_(Names.q)(Names.a)))
    assert outline.places[outline.start] == Question("p", (0, 0, 0), (1,))
    assert trace(outline, {"p": [True], "q": [False]}) == ["p?", "q?"]
    assert trace(outline, {"p": [False]}) == ["p?"]


def test_return_ends_it_anywhere() -> None:
    """With and without a code, in a loop too."""
    assert trace(compiled(Names.a, return_), {}) == ["a", "return 0"]
    assert trace(compiled(while_(Names.p)(return_(12)), Names.a), {"p": [True]}) == ["p?", "return 12"]
    branches = if_(Names.p)(Names.a, return_(3)).else_(Names.b)
    assert trace(compiled(branches, Names.c), {"p": [True]}) == ["p?", "a", "return 3"]


@pytest.mark.parametrize(
    ("before", "title"),
    [
        (lambda: return_, "return_"),
        (lambda: return_(12), r"return_\(12\)"),
        (lambda: if_(Names.p)(return_).else_(Names.a, return_(3)), r"if_\(p\)\.\.\.else_"),
        (lambda: if_(Names.p)(return_).elif_(Names.q)(return_).else_(if_(Names.q)(return_).else_(return_)), "if_"),
    ],
)
def test_a_step_that_is_never_reached_is_a_spec_error(before: Callable[[], Any], title: str) -> None:
    """What stands behind something that always ends the outline is told by name; in a block of a loop too."""
    for several in ((before(), Names.b), (while_(Names.q)(before(), Names.b),)):
        with pytest.raises(SpecError, match=f"nothing can come after {title}.*it always ends the outline"):
            compiled(*several)


def test_what_may_go_on_may_be_followed() -> None:
    """A loop may not be entered, and an `if_` without an else may be passed by."""
    outline = compiled(while_(Names.p)(return_), if_(Names.p)(return_).elif_(Names.q)(return_), Names.a)
    assert trace(outline, {"p": [False, False], "q": [False]}) == ["p?", "p?", "q?", "a"]


@pytest.mark.parametrize(
    "instructions",
    [
        lambda: (),
        lambda: (if_(Names.p),),
        lambda: (while_(Names.p),),
        lambda: (while_(Names.p)(),),
        lambda: (if_(Names.p)(),),
        lambda: (if_(Names.p)(Names.a).else_(),),
        lambda: (if_(Names.p)(Names.a).else_(Names.b).elif_(Names.q)(Names.c),),
        lambda: (if_(Names.p)(Names.a).else_(Names.b).else_(Names.c),),
        lambda: (if_(Names.p)(Names.a)(Names.b),),
        lambda: (while_(Names.p)(Names.a)(Names.b),),
        lambda: (if_(Names.p).else_(Names.a),),
        lambda: (lambda self: None,),
        lambda: (3,),
        lambda: (return_(True),),
        lambda: ("missing",),
    ],
)
def test_what_is_no_outline_is_a_spec_error(instructions: Any) -> None:
    """Empty bodies, branches after else_, steps that are no methods."""
    with pytest.raises(SpecError):
        compile_outline(instructions(), Names)


def test_a_place_that_is_not_there_is_a_spec_error() -> None:
    """As after a change of the outline under a saved process."""
    with pytest.raises(SpecError, match="was it changed"):
        compiled(Names.a).at((5,))


def test_it_can_be_described() -> None:
    """As plain data for people."""
    outline = compiled(Names.a, while_(Names.p)(if_(Names.q)(Names.b).else_(return_(3))))
    assert outline.described == ["a", {"while p": [{"if q": ["b"], "else": [{"return": 3}]}]}]


# --- any outline, with a crash after every step -----------------------------------------------------

names = st.sampled_from(["a", "b", "c"])
predicates = st.sampled_from(["p", "q"])


def ends(instruction: Any) -> bool:
    """Whether nothing behind it is ever reached."""
    match instruction:
        case return_():
            return True
        case if_(branches=[*_, (None, _)] as branches):
            return all(ends(body[-1]) for _, body in branches)
    return False


def reachable(block: list[Any]) -> list[Any]:
    """The block up to what always ends it."""
    last = next((place for place, item in enumerate(block) if ends(item)), len(block))
    return block[: last + 1]


def blocks(inner: st.SearchStrategy[Any], longest: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(inner, min_size=1, max_size=longest).map(reachable)


def branch(parts: tuple[str, list[Any], str, list[Any], list[Any] | None]) -> Any:
    first, body, second, other, otherwise = parts
    built = if_(first)(*body).elif_(second)(*other)
    return built if otherwise is None else built.else_(*otherwise)


instructions = st.recursive(
    names | st.builds(return_, st.integers(0, 3)),
    lambda inner: (
        st.tuples(predicates, blocks(inner, 3)).map(lambda x: while_(x[0])(*x[1]))
        | st.tuples(predicates, blocks(inner, 3)).map(lambda x: if_(x[0])(*x[1]))
        | st.tuples(predicates, blocks(inner, 2), predicates, blocks(inner, 2), st.none() | blocks(inner, 2)).map(
            branch
        )
    ),
    max_leaves=8,
)
outlines = blocks(instructions, 4)


class Tracer(WorkChain):
    """Writes down what it does; answers questions from its inputs, then with no."""

    async def a(self) -> None:
        self.ctx.trace = [*self.ctx.get("trace", []), "a"]

    def b(self) -> int:
        self.ctx.trace = [*self.ctx.get("trace", []), "b"]
        return 0

    async def c(self) -> None:
        self.ctx.trace = [*self.ctx.get("trace", []), "c"]

    def p(self) -> bool:
        return self._told("p")

    async def q(self) -> bool:
        return self._told("q")

    def _told(self, name: str) -> bool:
        asked = self.ctx.get("asked", 0)
        self.ctx.asked = asked + 1
        self.ctx.trace = [*self.ctx.get("trace", []), f"{name}?"]
        answers: list[bool] = self.inputs.answers
        return answers[asked] if asked < len(answers) else False


def tracer(body: list[Any]) -> type[Tracer]:
    class Random(Tracer):
        run_sync_steps_in = "loop"

        @classmethod
        def define(cls, spec: WorkChainSpec) -> None:
            super().define(spec)
            spec.input("answers", valid_type=list)
            spec.outline(*body)

    return Random


def straight(body: list[Any], answers: list[bool]) -> tuple[list[str], int]:
    """What an outline does, by walking through what the user wrote: the meaning that the compiled one must have."""
    names: list[str] = []
    left = list(answers)

    class Done(Exception):
        pass

    def ask(name: str) -> bool:
        names.append(f"{name}?")
        return left.pop(0) if left else False

    def walk(block: Any) -> None:
        for item in block:
            match item:
                case str():
                    names.append(item)
                case return_():
                    raise Done(item.code)
                case while_():
                    while ask(item.predicate):
                        walk(item.body)
                case if_():
                    for predicate, inner in item.branches:
                        if predicate is None or ask(predicate):
                            walk(inner)
                            break

    try:
        walk(body)
    except Done as done:
        return names, done.args[0]
    return names, 0


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(outlines, st.lists(st.booleans(), max_size=8))
@example([while_("p")(if_("q")("a"))], [True, False])
async def test_a_crash_after_every_step_changes_nothing(body: list[Any], answers: list[bool]) -> None:
    """Restored from its snapshot before each step, a work chain does exactly what its outline says, once."""
    random = tracer(body)
    expected, status = straight(body, answers)
    process: Process = random({"answers": answers})
    while not process.has_terminated():
        process = random.restore(process.snapshot())
        await process.step()
    process = random.restore(process.snapshot())
    assert process.result().exit_status == status, process.result()
    assert process.snapshot()["context"].get("trace", []) == expected


@given(outlines, st.randoms(use_true_random=False))
def test_every_position_leads_to_positions(body: list[Any], random: Any) -> None:
    """The table is closed: nothing points to a place that is not there, and the end can always be reached."""
    outline = compile_outline(tuple(body), Tracer)
    for place in outline.places.values():
        following: list[Path] = []
        match place:
            case Step():
                following = [place.then]
            case Question():
                following = [place.yes, place.no]
        assert all(path in outline.places for path in following)
