"""Wrong uses: each has one error, and it says which class, which port or step, what was given and what was expected."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from prunus.errors import (
    InvalidInputError,
    InvalidStateError,
    InvalidStepError,
    ProcessExceptedError,
    SpecError,
    UnsavableValueError,
)
from prunus.processes import (
    Child,
    Continue,
    Process,
    ProcessState,
    Stop,
    ToContext,
    Wait,
    WorkChain,
    append_,
    execute,
    if_,
    message,
    return_,
    run,
    sleep,
    while_,
)
from tests.processes.bench import Bench, checkpoint_of


class Lab(Process):
    """Its step does what the test says."""

    do_wrong: Callable[[Any], Any]

    @dataclass(frozen=True)
    class Outputs:
        energy: float = 0.0

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("element", valid_type=str)
        spec.output("count", valid_type=int, required=False)
        spec.message("go", valid_type=int)

    async def run(self) -> Any:
        return self.do_wrong()

    async def takes_one(self, value: Any) -> None: ...


class Chain(WorkChain):
    """A step of its outline does what the test says."""

    do_wrong: Callable[[Any], Any]

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.exit_code(300, "ERROR_LOST", "lost {what}")
        spec.outline(cls.first, cls.second)

    async def first(self) -> Any:
        return self.do_wrong()

    async def second(self) -> None: ...


def inputs_of(kind: type[Process]) -> dict[str, Any]:
    return {"element": "Cu"} if kind is Lab else {}


MAY_RETURN = (
    "; a step of an outline may return None, ToContext, a command, a list of waits, Outputs, an exit code or an "
    "exit status"
)
GONE = "LabWrong has no step 'nowhere'; was it renamed? Say @step(renamed_from='nowhere') at the step that it is now"

IN_A_STEP: list[tuple[str, type[Process], Any, str, str]] = [
    (
        "an output that is not in the spec",
        Lab,
        lambda self: self.out("energie", 1.0),
        "prunus.errors.InvalidInputError",
        "LabWrong does not accept these values:\n  outputs.energie: there is no such port; did you mean 'energy'?",
    ),
    (
        "an output of another type",
        Lab,
        lambda self: self.out("count", "three"),
        "prunus.errors.InvalidInputError",
        "LabWrong does not accept these values:\n  outputs.count: expected int, got 'three' (str)",
    ),
    (
        "an output in a port",
        Lab,
        lambda self: self.out("count.x", 1),
        "prunus.errors.InvalidInputError",
        "LabWrong does not accept these values:\n  outputs.count: this is a port, not a namespace; 'x' can't be in it",
    ),
    ("a next step that is not there", Lab, lambda self: Continue("nowhere"), "prunus.errors.SpecError", GONE),
    (
        "a step after a wait that is not there",
        Lab,
        lambda self: Wait(sleep(0), then="nowhere"),
        "prunus.errors.SpecError",
        GONE,
    ),
    (
        "a next step without a name",
        Lab,
        lambda self: Continue(lambda: None),
        "prunus.errors.SpecError",
        "a step must be a method of the process class, so that a checkpoint can name it; got <function",
    ),
    (
        "a next step that needs a value",
        Lab,
        lambda self: Continue(self.takes_one),
        "TypeError",
        "Lab.takes_one() missing 1 required positional argument: 'value'",
    ),
    (
        "a wait beside something else",
        Lab,
        lambda self: [Wait(message("go")), 3],
        "prunus.errors.InvalidStepError",
        "LabWrong.run returned [Wait(",
    ),
    (
        "two commands",
        Lab,
        lambda self: (Wait(message("go")), Stop()),
        "prunus.errors.InvalidStepError",
        "; only waits can stand beside one another, in a list",
    ),
    (
        "a forgotten await",
        Lab,
        lambda self: self.takes_one(1),
        "prunus.errors.InvalidStepError",
        "; was an `await` forgotten?",
    ),
    (
        "a wait for a message that no one declared",
        Lab,
        lambda self: Wait(message("stop")),
        "prunus.errors.InvalidInputError",
        "LabWrong does not accept these values:\n  messages.stop: there is no such message; there are: go",
    ),
    (
        "a wait for what can't be waited for",
        Lab,
        lambda self: Wait(on=3.5),
        "TypeError",
        "one can wait for a child, sleep(...), until(...), message(...) and for lists of these, not for 3.5",
    ),
    (
        "an unknown input of a child",
        Lab,
        lambda self: self.submit(Lab, {"elment": "Cu"}),
        "prunus.errors.InvalidInputError",
        "Lab does not accept these values:\n  inputs.element: expected str, nothing was given\n"
        "  inputs.elment: there is no such port; did you mean 'element'?",
    ),
    (
        "a child that is no class",
        Lab,
        lambda self: self.submit(int),
        "TypeError",
        "a child is made of a Process class and its inputs, not of <class 'int'>",
    ),
    (
        "another way to close a child",
        Lab,
        lambda self: self.submit(Lab, {"element": "Cu"}, parent_close="stop"),
        "ValueError",
        "parent_close is one of 'kill', 'abandon', 'wait', not 'stop'",
    ),
    (
        "an input that is not there",
        Lab,
        lambda self: self.inputs.elment,
        "AttributeError",
        "has no 'elment'; there are: element",
    ),
    (
        "a change of an input",
        Lab,
        lambda self: setattr(self.inputs, "element", "C"),
        "AttributeError",
        "can't be changed",
    ),
    *(
        (
            f"a step of an outline that returns {value!r}",
            Chain,
            lambda self, value=value: value,
            "prunus.errors.InvalidStepError",
            f"ChainWrong.first returned {value!r}{MAY_RETURN}",
        )
        for value in (3.0, "done", True, {"a": 1}, [1], object)
    ),
    (
        "an exit code that is not there",
        Chain,
        lambda self: self.exit_codes.ERROR_LOSS,
        "AttributeError",
        "ChainWrong has no exit code ERROR_LOSS; there are: ",
    ),
    (
        "what is no child in the context",
        Chain,
        lambda self: ToContext(child=5),
        "TypeError",
        "to_context(child=...) takes what self.submit gives, or append_ of it; got 5",
    ),
    (
        "appending to what is no list",
        Chain,
        lambda self: (setattr(self.ctx, "x", 1), self.to_context(x=append_(Child("p", "m:C")))),
        "TypeError",
        "to_context(x=append_(...)): ctx.x is there already, and is no list",
    ),
    (
        "a name that is not in the context",
        Chain,
        lambda self: (setattr(self.ctx, "x", 1), self.ctx.y),
        "AttributeError",
        "there is no 'y' here; there are: x",
    ),
    (
        "a name that the context needs",
        Chain,
        lambda self: setattr(self.ctx, "items", 1),
        "AttributeError",
        "'items' is a method here; use another name, or ['items']",
    ),
]


@pytest.mark.parametrize(
    ("kind", "wrong", "error", "text"), [case[1:] for case in IN_A_STEP], ids=[c[0] for c in IN_A_STEP]
)
async def test_what_a_step_does_wrong_is_its_failure(kind: type[Process], wrong: Any, error: str, text: str) -> None:
    """The process is EXCEPTED with it, and nobody else is harmed."""
    process = await Bench().run(type(f"{kind.__name__}Wrong", (kind,), {"do_wrong": wrong})(inputs_of(kind)))
    assert process.state is ProcessState.EXCEPTED
    failure = process.result().failure
    assert failure is not None
    assert failure.type == error
    assert text in failure.message


async def test_waiting_for_a_process_that_does_not_exist_is_a_failure() -> None:
    """Where it runs alone, only its own family can be waited for."""

    class Waits(Process):
        async def run(self) -> Wait:
            return Wait(on="nobody")

    with pytest.raises(ProcessExceptedError, match="waiting for processes that run here, not for nobody"):
        await execute(Waits)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (lambda process: Continue("takes_one", {"calc": object()}), "state.args[0].calc"),
        (lambda process: Wait(message("go", default=[object()])), "state.pending[0].on[3][0]"),
        (lambda process: Stop({"x": (1, object())}), "state.result.x[1]"),
    ],
)
async def test_a_value_that_can_not_be_saved_is_told_with_its_place(value: Any, where: str) -> None:
    """Before anything is written."""
    process = type("Odd", (Lab,), {"do_wrong": value})({"element": "Cu"})
    await process.step()
    await process.step()
    with pytest.raises(UnsavableValueError, match=re.escape(f"{where} holds a value of type object")):
        checkpoint_of(process)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda: Lab(), InvalidInputError, r"Lab does .*\n  inputs\.element: expected str, nothing was given"),
        (
            lambda: Lab({"element": 1, "z": 1}),
            InvalidInputError,
            r"element: expected str, got 1 \(int\)\n  inputs\.z: ",
        ),
        (lambda: Lab(5), InvalidInputError, r"inputs: expected a mapping .*, got 5 \(int\)"),
        (lambda: Lab({"element": "C"}, parent_close="x"), ValueError, "parent_close is one of .* not 'x'"),
        (
            lambda: Lab({"element": "C"}, on_exception="x"),
            ValueError,
            "on_exception is one of 'fail', 'pause', not 'x'",
        ),
        (lambda: Lab({"element": "C"}).result(), InvalidStateError, "is CREATED; it has to be terminated"),
        (
            lambda: Lab({"element": "C"}).submit(Lab, {"element": "C"}),
            InvalidStateError,
            "in a step to submit a child",
        ),
        (lambda: Lab({"element": "C"}).map(Lab, []), InvalidStateError, "in a step to map over items"),
        (lambda: Process(), SpecError, r"Process has no step to begin with; define `async def run\(self\)`"),
        (lambda: WorkChain(), SpecError, "the outline of WorkChain has no steps"),
        (lambda: Lab.restore({}), SpecError, r"this is no checkpoint of a Lab: KeyError\('pid'\)"),
        (
            lambda: Lab.restore({**Lab({"element": "C"}).snapshot(), "state": {"state": "dreaming"}}),
            SpecError,
            "this is no checkpoint of a Lab: .*'dreaming' is not a valid ProcessState",
        ),
    ],
)
def test_what_is_wrong_outside_of_steps_is_raised_there(wrong: Any, error: type[Exception], text: str) -> None:
    """At the line that does it."""
    with pytest.raises(error, match=text):
        wrong()


async def test_a_blocking_run_in_a_loop_says_what_to_write() -> None:
    """Instead of blocking the loop."""
    with pytest.raises(RuntimeError, match=r"there is a running event loop here: write `await prunus.execute\(...\)`"):
        run(Lab, {"element": "Cu"})


# --- outlines ---------------------------------------------------------------------------------------


class Asks(WorkChain):
    """Predicates of all kinds."""

    answer: Any = True

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.outline(if_(cls.question)(cls.one))

    def question(self) -> Any:
        return self.answer

    async def one(self) -> None: ...


@pytest.mark.parametrize("answer", [None, 1, "yes", []])
async def test_a_predicate_answers_true_or_false(answer: Any) -> None:
    """Anything else is a failure that names it, and what it returned."""
    with pytest.raises(ProcessExceptedError) as caught:
        await execute(type("Vague", (Asks,), {"answer": answer}))
    assert caught.value.failure.facts == {
        "process_class": "Vague",
        "step": "question",
        "problem": f"must answer True or False; it returned {answer!r}",
    }
    assert isinstance(caught.value.failure.to_exception(), InvalidStepError)


async def test_an_outline_that_does_not_end_is_noticed() -> None:
    """A loop in which nothing is done but asking would never give anybody else a turn."""

    class Endless(Asks):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.outline(while_(cls.question)(if_(cls.never)(cls.one)))

        def never(self) -> bool:
            return False

    with pytest.raises(
        ProcessExceptedError, match=r"Endless\.question was asked again and again: .* so this outline does not end"
    ):
        await asyncio.wait_for(execute(Endless), 5)


OUTLINES: list[tuple[Any, str]] = [
    (lambda cls: [], "the outline of Wrong has no steps"),
    (lambda cls: [cls.one, "two"], "two in an outline is no method of Wrong; write cls.name"),
    (lambda cls: [lambda self: None], "in an outline is no method of Wrong; write cls.name"),
    (lambda cls: [cls.takes], "Wrong.takes stands in an outline, so it must take no argument but self"),
    (lambda cls: [if_(cls.one)], "if_(one) has no steps; write if_(predicate)(steps...)"),
    (lambda cls: [if_(cls.one)()], "if one has no steps"),
    (lambda cls: [while_(cls.one)], "while_(one) has no steps"),
    (
        lambda cls: [return_, cls.one],
        "in the outline of Wrong nothing can come after return_: it always ends the outline",
    ),
    (lambda cls: [if_(cls.one)(return_(1), cls.one)], "in if one nothing can come after return_(1)"),
    (
        lambda cls: [if_(cls.one)(return_(1)).else_(return_), cls.one],
        "nothing can come after if_(one)...else_(...): it always ends the outline",
    ),
    (lambda cls: [return_("3")], "return_ takes an exit status, a number; got '3'"),
    (lambda cls: [if_(cls.one)(cls.one).else_(cls.one).elif_(cls.one)(cls.one)], "there can be no elif_ after else_"),
    (lambda cls: [if_(cls.one)(cls.one)(cls.one)], "this branch has its steps already"),
]


@pytest.mark.parametrize(("outline", "text"), OUTLINES)
def test_an_outline_is_checked_when_its_class_is_made(outline: Any, text: str) -> None:
    """Unknown steps, steps that nothing leads to and a return in a wrong place are errors of the import."""

    def define(cls: Any, spec: Any) -> None:
        WorkChain.define.__func__(cls, spec)
        spec.outline(*outline(cls))

    async def one(self: Any) -> None: ...

    async def takes(self: Any, value: int) -> None: ...

    members = {"define": classmethod(define), "one": one, "takes": takes}
    with pytest.raises(SpecError, match=re.escape(text)):
        type("Wrong", (WorkChain,), members).spec()


# --- ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Process, WorkChain])
async def test_an_exit_code_ends_the_process_with_its_status(kind: type[Process]) -> None:
    """FINISHED, with the status and the message of the code; no required outputs are asked for."""

    async def first(self: Any) -> Any:
        return self.exit_codes.ERROR_LOST.format(what="the key")

    def define(cls: Any, spec: Any) -> None:
        kind.define.__func__(cls, spec)
        spec.output("needed")
        spec.exit_code(300, "ERROR_LOST", "lost {what}")
        if kind is WorkChain:
            spec.outline(cls.first)

    name = "first" if kind is WorkChain else "run"
    result = await execute(type("Ends", (kind,), {"define": classmethod(define), name: first}))
    assert (result.state, result.exit_status, result.exit_message) == (ProcessState.FINISHED, 300, "lost the key")


async def test_missing_outputs_are_an_exit_status_that_is_decided_before_the_end() -> None:
    """There is one transition, to FINISHED with status 11, and it names what is missing."""

    class Forgets(Process):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.output("a")
            spec.output("b.c")
            spec.output("d", default=4)

        async def run(self) -> None:
            self.out("a", 1)

    bench = Bench()
    process = await bench.run(Forgets())
    assert [change.event for change in bench.history] == ["created.running", "running.finished"]
    result = process.result()
    assert (result.state, result.exit_status, result.successful) == (ProcessState.FINISHED, 11, False)
    assert result.exit_message is not None
    assert "b.c" in result.exit_message
    assert bench.history[-1].note == result.exit_message
    assert result.outputs["a"] == 1
