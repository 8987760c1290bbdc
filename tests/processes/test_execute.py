"""The local driver."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prunus.errors import InvalidInputError, ProcessExceptedError, ProcessKilledError
from prunus.processes import (
    Continue,
    KillMessage,
    Pause,
    Play,
    Process,
    ProcessListener,
    ProcessSpec,
    ProcessState,
    Resume,
    Transition,
    Wait,
    WorkChain,
    WorkChainSpec,
    execute,
    run,
    while_,
)
from prunus.processes.states import PlayState


class Tree(Process):
    """Makes children of its own kind, down to depth 0, and adds up what they count."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        spec.input("depth", valid_type=int)
        spec.output("count", valid_type=int)

    async def run(self) -> Any:
        depth = self.inputs.depth
        children = [self.submit(Tree, {"depth": depth - 1}) for _ in range(3 if depth else 0)]
        return Wait(self.collect, on=children)

    async def collect(self, results: list[Any]) -> None:
        self.out("count", 1 + sum(result.outputs.count for result in results))


class Asks(Process):
    async def run(self) -> Wait:
        return Wait(self.answered, "for a person")

    async def answered(self, value: Any = None) -> Any:
        return value


class Parent(Process):
    """Has a child that waits for ever."""

    children: list[Asks]

    async def run(self) -> Wait:
        return Wait(on=[self.submit(Asks, pid="child")])


def reaching(process: Process, *states: ProcessState | PlayState) -> asyncio.Event:
    """An event that is set when the process is in one of the states."""
    event = asyncio.Event()

    class Looks(ProcessListener):
        def on_transition(self, process: Process, transition: Transition) -> None:
            if process.state in states or process.play_state in states:
                event.set()

    process.add_listener(Looks())
    return event


async def test_children_run_beside_their_parent_to_any_depth() -> None:
    """1 + 3 + 9 + 27 processes, one result."""
    assert (await execute(Tree, {"depth": 3})).outputs.count == 40


async def test_the_children_run_at_the_same_time() -> None:
    """Two children that wait for each other both end."""
    meeting = asyncio.Barrier(2)

    class Meets(Process):
        async def run(self) -> None:
            await meeting.wait()

    class Both(Process):
        async def run(self) -> Wait:
            return Wait(on=[self.submit(Meets), self.submit(Meets)])

    assert (await Both().execute()).successful


async def test_it_is_controlled_while_it_runs() -> None:
    """Resume, pause and play reach it from elsewhere in the loop."""
    process = Asks()
    waiting = reaching(process, ProcessState.WAITING)
    task = asyncio.create_task(process.execute())
    await waiting.wait()
    process.receive(Pause())
    process.receive(Resume(7, True))
    await asyncio.sleep(0)
    assert (process.state, process.paused) == (ProcessState.RUNNING, True)
    process.receive(Play())
    assert (await task).value == 7


async def test_a_kill_from_elsewhere_ends_it() -> None:
    """The one who waits gets the error with the reason."""
    process = Asks()
    waiting = reaching(process, ProcessState.WAITING)
    task = asyncio.create_task(process.execute())
    await waiting.wait()
    process.receive(KillMessage("enough"))
    with pytest.raises(ProcessKilledError, match="enough"):
        await task


async def test_cancelling_it_kills_the_process_and_its_children() -> None:
    """And the cancellation goes on."""
    seen: list[Process] = []

    class Noted(Asks):
        async def run(self) -> Wait:
            seen.append(self)
            both.set()
            return await super().run()

    class Outer(Process):
        async def run(self) -> Wait:
            seen.append(self)
            return Wait(on=[self.submit(Noted), self.submit(Noted)])

    both = asyncio.Event()
    task = asyncio.create_task(execute(Outer))
    await both.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen
    assert all(process.state is ProcessState.KILLED for process in seen)


async def test_killing_a_parent_kills_its_children() -> None:
    """Nobody is left who would wait for them."""
    children: list[Process] = []
    started = asyncio.Event()

    class Noted(Process):
        async def run(self) -> None:
            children.append(self)
            started.set()
            await asyncio.Event().wait()

    class Outer(Process):
        async def run(self) -> Wait:
            return Wait(on=[self.submit(Noted)])

    process = Outer()
    task = asyncio.create_task(process.execute())
    await started.wait()
    process.receive(KillMessage())
    with pytest.raises(ProcessKilledError):
        await task
    assert [child.state for child in children] == [ProcessState.KILLED]


async def test_it_ends_when_the_children_have_ended_too() -> None:
    """Also those that the parent did not wait for."""
    done: list[str] = []

    class Slow(Process):
        async def run(self, n: int = 5) -> Any:
            if n:
                return Continue(self.run, n - 1)
            done.append(self.pid)
            return None

    class Careless(Process):
        async def run(self) -> None:
            self.submit(Slow, pid="s")

    await execute(Careless)
    assert done == ["s"]


async def test_waiting_for_a_stranger_fails_at_once() -> None:
    """A process that does not run here would be waited for for ever."""

    class Waits(Process):
        async def run(self) -> Wait:
            return Wait(on=["nobody"])

    with pytest.raises(ProcessExceptedError, match="not for nobody"):
        await execute(Waits)


async def test_errors_are_raised_as_what_they_are() -> None:
    """Wrong inputs before anything runs; a failed step as the failure of the process."""

    class Fails(Process):
        async def run(self) -> None:
            raise ValueError("bad")

    with pytest.raises(ProcessExceptedError, match="ValueError: bad"):
        await execute(Fails)
    with pytest.raises(InvalidInputError):
        await execute(Tree)


def test_run_blocks_until_the_end() -> None:
    """For a script."""
    assert run(Tree, {"depth": 1}).outputs.count == 4


async def test_run_in_a_loop_says_what_to_write() -> None:
    """A notebook has a running loop; the message names the way there."""
    with pytest.raises(RuntimeError, match=r"await prunus\.execute"):
        run(Tree, {"depth": 0})


async def test_a_family_of_a_thousand_is_no_problem() -> None:
    """Many children at once."""

    class Many(Process):
        async def run(self) -> Wait:
            return Wait(self.collect, on=[self.submit(Tree, {"depth": 0}) for _ in range(1000)])

        async def collect(self, results: list[Any]) -> int:
            return sum(result.outputs.count for result in results)

    assert (await execute(Many)).value == 1000


class Restless(WorkChain):
    """Steps without end, none of which waits for anything."""

    @classmethod
    def define(cls, spec: WorkChainSpec) -> None:
        super().define(spec)
        spec.outline(while_(cls.always)(cls.step_on))

    def always(self) -> bool:
        return True

    async def step_on(self) -> None: ...


async def test_steps_that_wait_for_nothing_let_others_run() -> None:
    """Somebody else on the loop can still kill it."""
    process = Restless()
    asyncio.get_running_loop().call_later(0.05, process.receive, KillMessage("enough"))
    with pytest.raises(ProcessKilledError, match="enough"):
        await execute(process)
