"""A step that can't go on for now: its process is paused with the reason, intact, and `play` takes the step again."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from prunus import EndpointUnavailableError, Failure, ProcessKilledError, StepBlockedError
from prunus.processes import (
    Continue,
    DidNotHappen,
    Happened,
    KillMessage,
    Play,
    Process,
    ProcessState,
    RetryPolicy,
    Stop,
    WorkChain,
    execute,
    step,
)
from tests.processes.bench import Bench

DOWN = "the cluster is being mended"


class Gate:
    """The world outside: closed for so many looks."""

    def __init__(self, closed_for: int) -> None:
        self.closed_for, self.looks = closed_for, 0

    def pass_through(self) -> None:
        self.looks += 1
        if self.looks <= self.closed_for:
            raise StepBlockedError(DOWN)


class Passes(Process):
    gate: Gate

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.output("written", required=False)

    async def run(self) -> Continue:
        return Continue(self.go, 7)

    @step(retry=RetryPolicy(max_attempts=2, initial_interval_s=1))
    async def go(self, number: int) -> Any:
        self.out("written", "by a step that is not over")
        self.gate.pass_through()
        return number


class PassesInThread(Passes):
    @step(retry=RetryPolicy(max_attempts=2, initial_interval_s=1))
    def go(self, number: int) -> Any:  # type: ignore[override]
        self.out("written", "by a step that is not over")
        self.gate.pass_through()
        return number


class ChainPasses(WorkChain):
    gate: Gate

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.outline(cls.first, cls.second)

    async def first(self) -> None:
        self.ctx.first = self.ctx.get("first", 0) + 1

    async def second(self) -> None:
        self.ctx.second = "half"
        self.gate.pass_through()


@pytest.fixture(autouse=True)
def gate() -> Gate:
    """Closed twice."""
    Passes.gate = ChainPasses.gate = Gate(2)
    return Passes.gate


@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize("kind", [Passes, PassesInThread])
async def test_a_blocked_step_pauses_the_process_before_it(kind: type[Passes], gate: Gate, crashes: bool) -> None:
    """The reason is its status, what the step wrote is gone, and each play takes the step again with its arguments."""
    bench = Bench(crashes=crashes)
    process = await bench.run(kind())
    assert (process.state, process.paused, process.next_step) == (ProcessState.RUNNING, True, "go")
    assert process.status == f"the step go is blocked: {DOWN}"
    assert not process.outputs
    process.receive(Play())
    process = await bench.run(process)
    assert process.paused
    process.receive(Play())
    process = await bench.run(process)
    assert process.result().value == 7
    assert [(change.subject, change.note) for change in bench.history if change.kind == "note"] == [
        ("blocked", DOWN)
    ] * 2
    assert [line.level for line in bench.lines] == ["WARNING"] * 2


async def test_being_blocked_is_no_failed_attempt(gate: Gate) -> None:
    """A step with two attempts is blocked twice, fails once, and still has its second attempt."""
    bench = Bench()

    class FailsToo(Passes):
        failed: ClassVar[bool] = False

        @step(retry=RetryPolicy(max_attempts=2, initial_interval_s=1))
        async def go(self, number: int) -> Any:
            self.gate.pass_through()
            if not FailsToo.failed:
                FailsToo.failed = True
                raise RuntimeError("a failure of its own")
            return number

    process = await bench.run(FailsToo())
    for _ in range(2):
        assert process.paused
        process.receive(Play())
        process = await bench.run(process)
    assert process.result().value == 7
    assert gate.looks == 4


async def test_a_step_of_an_outline_can_be_blocked(gate: Gate) -> None:
    """The steps before it are not taken again, and the context is as it was before it."""
    bench = Bench(crashes=True)
    process = await bench.run(ChainPasses())
    assert (process.paused, process.next_step, dict(process.ctx)) == (True, "second", {"first": 1})
    for _ in range(2):
        process.receive(Play())
        process = await bench.run(process)
    assert process.state is ProcessState.FINISHED


async def test_a_blocked_process_can_be_killed(gate: Gate) -> None:
    """It is paused, and dies as any other."""
    process = await Bench().run(Passes())
    process.receive(KillMessage("enough"))
    assert (process.state, process.paused) == (ProcessState.KILLED, False)


class Once(Process):
    """Its effect is not to be repeated."""

    gate: Gate
    effects: list[str]
    found: Any = DidNotHappen()

    async def run(self) -> Any:
        return Continue(self.act)

    @step(effect="once", reconcile="look")
    async def act(self) -> Any:
        self.gate.pass_through()
        self.effects.append(self.idempotency_key)
        return "acted"

    async def look(self, key: str) -> Any:
        self.gate.pass_through()
        return self.found


@pytest.mark.parametrize("found", [DidNotHappen(), Happened("found")])
async def test_an_effect_is_looked_for_until_somebody_can_tell(found: Any) -> None:
    """The step is blocked, then `reconcile` is, again and again: the step never runs without its word."""
    Once.gate, Once.effects, Once.found = Gate(3), [], found
    bench = Bench(crashes=True)
    process = await bench.run(Once())
    for _ in range(3):
        assert process.paused
        assert process.status == f"the step act is blocked: {DOWN}"
        process.receive(Play())
        process = await bench.run(process)
    assert process.result().value == ("found" if isinstance(found, Happened) else "acted")
    assert len(Once.effects) == (0 if isinstance(found, Happened) else 1)


async def test_without_a_reconcile_the_play_decides() -> None:
    """Nobody can be asked whether a blocked step with `effect="once"` took effect: who plays it takes that on."""

    class OnceBlind(Once):
        @step(effect="once")
        async def act(self) -> Any:
            self.gate.pass_through()
            return "acted"

    OnceBlind.gate = Gate(1)
    process = await Bench().run(OnceBlind())
    assert process.paused
    process.receive(Play())
    assert (await Bench().run(process)).result().value == "acted"


async def test_a_caller_is_blocked_by_the_process_that_it_calls(gate: Gate) -> None:
    """Nobody could play a process that runs inside a step: the step is blocked in its place, also from below."""

    class Grandparent(Process):
        async def run(self) -> Any:
            return (await self.call(Parent)).value

    class Parent(Process):
        async def run(self) -> Any:
            child = self.submit(Passes)
            return self.wait(child)

        def wait(self, child: Any) -> Any:
            from prunus import Wait

            return Wait(child, then=self.end)

        async def end(self, result: Any) -> Any:
            return Stop(result.value)

    bench = Bench()
    process = await bench.run(Grandparent())
    for _ in range(2):
        assert process.paused
        assert process.status == f"the step run is blocked: the step go is blocked: {DOWN}"
        process.receive(Play())
        process = await bench.run(process)
    assert process.result().value == 7


async def test_executed_alone_it_waits_until_it_is_played(gate: Gate) -> None:
    """`prunus.execute` has a process object that anybody in the program can play."""
    process = Passes()

    class Plays:
        def on_paused(self, process: Process) -> None:
            import asyncio

            asyncio.get_running_loop().call_soon(process.receive, Play())

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    process.add_listener(Plays())  # type: ignore[arg-type]
    assert (await execute(process)).value == 7
    assert gate.looks == 3


def test_the_errors_cross_wires() -> None:
    """They keep their facts."""
    error = Failure.of(EndpointUnavailableError("cluster", 5, "refused")).to_exception()
    assert isinstance(error, EndpointUnavailableError)
    assert isinstance(error, StepBlockedError)
    assert (error.endpoint, error.attempts, error.reason) == ("cluster", 5, "refused")
    assert str(error) == "no connection to 'cluster' in 5 attempts: refused"
    assert not isinstance(error, ProcessKilledError)
