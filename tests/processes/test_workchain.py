"""Work chains: the outline at work, the context, waiting for children."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from prunus.errors import ProcessExceptedError, SpecError
from prunus.processes import (
    Continue,
    KillMessage,
    Outcomes,
    Process,
    ProcessResult,
    ProcessState,
    Resume,
    Stop,
    ToContext,
    Wait,
    WorkChain,
    WorkChainSpec,
    append_,
    execute,
    if_,
    return_,
    while_,
)


class Square(Process):
    @dataclass(frozen=True)
    class Inputs:
        x: int

    @dataclass(frozen=True)
    class Outputs:
        y: int

    async def run(self) -> Square.Outputs:
        return self.Outputs(self.inputs.x**2)


def chain(*names: str | Any, **steps: Callable[..., Any]) -> type[WorkChain]:
    """A work chain with these steps; its context collects what they say."""

    def define(cls: type[WorkChain], spec: WorkChainSpec) -> None:
        spec.output("x", required=False)
        spec.outline(*names)

    body: dict[str, Any] = {"define": classmethod(define), "run_sync_steps_in": "loop", "__module__": __name__}
    for name, step in steps.items():
        body[name] = lambda self, *args, _step=step: _step(self, *args)
    return types.new_class("Chain", (WorkChain,), exec_body=lambda namespace: namespace.update(body))


def say(text: str, value: Any = None) -> Callable[[Any], Any]:
    def step(self: WorkChain, *args: Any) -> Any:
        self.ctx.said = [*self.ctx.get("said", []), text, *args]
        return value

    return step


async def drive(process: Process) -> Process:
    while process.can_step:
        await process.step()
    return process


def said(process: Process) -> list[str]:
    return list(process.snapshot()["context"].get("said", []))


async def test_the_results_of_children_come_into_the_context() -> None:
    """One `ProcessResult` for each; those of append_ in the order of submission, whoever ends first."""

    def launch(self: WorkChain) -> ToContext:
        for x in (3, 1, 2):
            self.to_context(points=append_(self.submit(Square, {"x": x})))
        return ToContext(single=self.submit(Square, {"x": 5}))

    def collect(self: WorkChain) -> None:
        self.out("x", [point.outputs.y for point in self.ctx.points] + [self.ctx.single.outputs.y])

    assert (await execute(chain("launch", "collect", launch=launch, collect=collect))).outputs.x == [9, 1, 4, 25]


async def test_children_of_the_last_step_are_waited_for() -> None:
    """A chain finishes after all that it has asked for."""

    def last(self: WorkChain) -> None:
        self.to_context(child=self.submit(Square, {"x": 2}))

    process = await drive(chain("last", last=last)(pid="w"))
    (child,) = process.take_effects().children
    assert (process.state, process.waiting_for) == (ProcessState.WAITING, (child.pid,))
    restored = type(process).restore(process.snapshot())
    result = ProcessResult(child.pid, ProcessState.FINISHED, {"y": 4}, 0)
    restored.settle(Outcomes(0.0, {child.pid: result}))
    assert restored.snapshot()["context"]["child"] is result
    await drive(restored)
    assert restored.result().successful


async def test_appending_goes_on_where_it_was() -> None:
    """A later step appends to the same list."""

    def launch(self: WorkChain) -> None:
        self.to_context(points=append_(self.submit(Square, {"x": len(self.ctx.get("points", []))})))

    def collect(self: WorkChain) -> None:
        self.out("x", [point.outputs.y for point in self.ctx.points])

    steps = chain("launch", "launch", "launch", "collect", launch=launch, collect=collect)
    assert (await execute(steps)).outputs.x == [0, 1, 4]


@pytest.mark.parametrize(
    ("value", "state", "status", "texts"),
    [
        (None, "finished", 0, ["a", "b"]),
        (0, "finished", 0, ["a", "b"]),
        (7, "finished", 7, ["a"]),
        (Stop(exit_status=3), "finished", 3, ["a"]),
        (Stop(), "finished", 0, ["a"]),
        (Continue("detour", 1), "finished", 0, ["a", "detour", 1, "b"]),
        (Wait(on=[]), "finished", 0, ["a", "b"]),
        ("text", "excepted", None, ["a"]),
        (True, "excepted", None, ["a"]),
        (Continue("nowhere"), "excepted", None, ["a"]),
    ],
)
async def test_what_a_step_of_an_outline_returns(value: Any, state: str, status: int | None, texts: list[Any]) -> None:
    """Nothing, a status, a command: also one that leads through a step beside the outline, and back."""
    process = await drive(chain("a", "b", a=say("a", value), b=say("b"), detour=say("detour"))())
    assert process.state == state
    assert process.result().exit_status == status
    assert said(process) == texts


async def test_an_outline_can_wait_for_a_message() -> None:
    """A suspended wait goes on with the outline, or with a callback first."""
    process = await drive(chain("a", "b", a=say("a", Wait()), b=say("b"))())
    assert process.suspended
    process.receive(Resume(3, True))
    await drive(process)
    assert said(process) == ["a", "b"]
    process = await drive(chain("a", "b", a=say("a", Wait("answer")), b=say("b"), answer=say("answer"))())
    process = type(process).restore(process.snapshot())
    process.receive(Resume(3, True))
    await drive(process)
    assert said(process) == ["a", "answer", 3, "b"]


async def test_return_gives_the_exit_status() -> None:
    """And ends the outline there."""
    steps = chain("a", if_("p")(return_(12)), "b", a=say("a"), b=say("b"), p=lambda self: True)
    process = await drive(steps())
    assert process.result().exit_status == 12
    assert said(process) == ["a"]


@pytest.mark.parametrize("answer", [1, None, "yes"])
async def test_a_predicate_must_answer_true_or_false(answer: Any) -> None:
    """What is merely true in Python is likely to be a mistake."""
    process = await drive(chain(if_("p")("a"), a=say("a"), p=lambda self: answer)())
    assert "must answer True or False" in str(process.result().failure)


async def test_a_predicate_sees_what_the_children_left() -> None:
    """It is asked after the wait, not before; it may be a coroutine."""

    def launch(self: WorkChain) -> None:
        self.to_context(last=self.submit(Square, {"x": self.ctx.get("n", 0)}))
        self.ctx.n = self.ctx.get("n", 0) + 1

    async def small(self: WorkChain) -> bool:
        await asyncio.sleep(0)
        return bool(self.ctx.last.outputs.y < 9)

    def end(self: WorkChain) -> None:
        self.out("x", self.ctx.n)

    steps = chain("launch", while_("small")("launch"), "end", launch=launch, small=small, end=end)
    assert (await execute(steps)).outputs.x == 4


async def test_a_failed_child_is_a_result_like_another() -> None:
    """The parent decides what it means; reading an output of it says what happened."""

    class Fails(Process):
        async def run(self) -> None:
            raise ValueError("no luck")

    def launch(self: WorkChain) -> None:
        self.to_context(child=self.submit(Fails))

    def look(self: WorkChain) -> None:
        assert self.ctx.child.state == "excepted"
        self.out("x", self.ctx.child.outputs.energy)

    with pytest.raises(ProcessExceptedError, match=r"EXCEPTED \(ValueError: no luck\) and has no 'energy'"):
        await execute(chain("launch", "look", launch=launch, look=look))


async def test_the_next_step_is_the_one_of_the_outline() -> None:
    """People see the names of their steps."""
    process = chain("a", if_("p")("b"), a=say("a"), b=say("b"), p=lambda self: True)()
    names = []
    while process.can_step:
        names.append(process.next_step)
        transitions = await process.step()
    assert names == ["a", "a", "b"]
    assert transitions[0].step == "b"
    assert process.next_step is None


async def test_a_changed_outline_is_noticed() -> None:
    """A checkpoint says what came next; when something else stands there it is refused, not run."""
    process = chain("a", "b", a=say("a"), b=say("b"))()
    await process.step()
    await process.step()
    for other in (chain("x", "a", "b", **dict.fromkeys("abx", say("."))), chain("a", a=say("a"))):
        with pytest.raises(SpecError, match=r"outline .*changed"):
            other.restore(process.snapshot())


async def test_the_context_of_a_step_that_is_cancelled_is_dropped() -> None:
    """As are the children that it has asked for: the attempt leaves no trace."""
    entered = asyncio.Event()

    async def a(self: WorkChain) -> None:
        self.ctx.half = 1
        self.to_context(child=self.submit(Square, {"x": 1}))
        entered.set()
        await asyncio.Event().wait()

    process = chain("a", a=a)()
    await process.step()
    before = process.snapshot()
    task = asyncio.create_task(process.step())
    await entered.wait()
    assert process.snapshot() == before
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert process.snapshot() == before
    assert process.take_effects().children == ()


async def test_a_kill_reaches_the_step_of_an_outline() -> None:
    """As in any process."""
    entered = asyncio.Event()

    async def a(self: WorkChain) -> None:
        entered.set()
        await asyncio.Event().wait()

    process = chain("a", a=a)()
    await process.step()
    task = asyncio.create_task(process.step())
    await entered.wait()
    process.receive(KillMessage())
    await task
    assert process.state is ProcessState.KILLED


@pytest.mark.parametrize(
    "step",
    [
        lambda self: self.to_context(x=3),
        lambda self: ToContext(x=self),
        lambda self: (self.ctx.update(x=1), self.to_context(x=append_(self.submit(Square, {"x": 1}))))[1],
    ],
)
async def test_what_is_no_child_can_not_be_waited_for(step: Callable[[Any], Any]) -> None:
    """The error says what `to_context` takes."""
    process = await drive(chain("a", a=step)())
    assert "TypeError: to_context(x" in str(process.result().failure)


def test_a_chain_without_an_outline_is_a_spec_error() -> None:
    """A base for others needs none, but nobody can make a process of it."""

    class Base(WorkChain): ...

    with pytest.raises(SpecError, match=r"the outline of .*Base has no steps"):
        Base()


def test_a_spec_is_defined_once() -> None:
    """That the class may be a base without an outline costs no look of its own."""
    defined: list[str] = []

    class Base(WorkChain):
        @classmethod
        def define(cls, spec: WorkChainSpec) -> None:
            super().define(spec)
            defined.append(cls.__name__)

    class Whole(Base):
        @classmethod
        def define(cls, spec: WorkChainSpec) -> None:
            super().define(spec)
            spec.outline(cls.work)

        async def work(self) -> None: ...

    Whole()
    assert defined == ["Base", "Whole"]


@pytest.mark.parametrize("name", ["driver", "revision", "pid", "_register", "_memo"])
def test_a_class_can_not_have_what_the_object_keeps(name: str) -> None:
    """An attribute of the class of the same name would be lost."""
    with pytest.raises(SpecError, match=f"Chain defines {name}, which Process needs"):
        chain("work", work=say("x"), **{name: 5})


def test_a_step_can_not_have_the_name_of_a_method_of_ours() -> None:
    """A step called `submit` would take the place of what it calls."""
    with pytest.raises(SpecError, match="Chain defines submit, which Process needs"):
        chain("submit", submit=say("x"))


def test_the_description_has_the_outline() -> None:
    """For tools and people."""
    described = chain("a", while_("p")("b"), a=say("a"), b=say("b"), p=say("p")).spec().describe()
    assert described["outline"] == ["a", {"while p": ["b"]}]
