"""Processes that are run within a step of another one: depth, threads, errors, lines and ends."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from prunus.errors import InvalidInputError, InvalidStateError, ProcessExceptedError, ProcessKilledError
from prunus.processes import (
    Continue,
    KillMessage,
    Pause,
    Process,
    ProcessState,
    RetryPolicy,
    Stop,
    Wait,
    WorkChain,
    execute,
    message,
    sleep,
    step,
)
from tests.processes.bench import Bench

DEPTH = 500


class Down(Process):
    """Calls itself until it is at the bottom."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("depth", valid_type=int)
        spec.input("in_threads", valid_type=bool, default=False)

    async def run(self) -> Any:
        depth = self.inputs.depth
        if depth == 0:
            self.report("the bottom")
            return Stop(0)
        assert Process.current() is self
        result = await self.call(Down, {"depth": depth - 1})
        assert Process.current() is self
        return Stop(result.value + 1)


class DownInThreads(Down):
    """The same from plain steps."""

    def run(self) -> Any:  # type: ignore[override]
        depth = self.inputs.depth
        if depth == 0:
            self.report("the bottom")
            return Stop(0)
        result = self.call(DownInThreads, {"depth": depth - 1}).result()
        assert Process.current() is self
        return Stop(result.value + 1)


class DownInBoth(Down):
    """By turns."""

    async def run(self) -> Any:
        depth = self.inputs.depth
        kind = DownInThreads if depth % 2 else DownInBoth
        return Stop(0 if depth == 0 else (await self.call(kind, {"depth": depth - 1})).value + 1)


@pytest.mark.parametrize(("kind", "depth"), [(Down, DEPTH), (DownInThreads, DEPTH), (DownInBoth, 50)])
async def test_calls_are_nested_as_deep_as_memory_allows(kind: type[Process], depth: int) -> None:
    """Each one is a process of its own; from coroutines, from threads, and from both by turns."""
    assert (await execute(kind, {"depth": depth})).value == depth


async def test_many_calls_run_at_the_same_time() -> None:
    """They are awaited like anything else, and their threads do not wait for one another."""

    class Many(Process):
        async def run(self) -> Any:
            calls = [self.call(kind, {"depth": 3}) for kind in (Down, DownInThreads) for _ in range(20)]
            results = await asyncio.gather(*calls)
            return Stop([result.value for result in results])

    assert (await execute(Many)).value == [3] * 40


async def test_a_called_process_does_all_that_a_process_does() -> None:
    """It waits, fans out, has children; nothing of it is in the checkpoint of its caller."""

    class Child(WorkChain):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.outline(cls.first, cls.second, cls.third)

        async def first(self) -> None:
            self.to_context(grandchild=self.submit(Down, {"depth": 2}))

        async def second(self) -> Any:
            return Wait(sleep(0.01))

        async def third(self) -> Any:
            return Stop([self.ctx.grandchild.value, self.parent])

    class Caller(Process):
        async def run(self) -> Any:
            return Stop((await self.call(Child, tags=["inner"])).value)

    bench = Bench()
    caller = await bench.run(Caller(pid="p"))
    assert caller.result().value == [2, "p"]
    assert bench.ended == {}


@pytest.mark.parametrize("in_thread", [False, True])
async def test_the_errors_of_a_called_process_are_raised(in_thread: bool) -> None:
    """As `execute` raises them: it can be caught there, or it is the failure of the caller."""

    class Fails(Process):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.input("how", valid_type=str)

        async def run(self) -> Any:
            if self.inputs.how == "killed":
                self.receive(KillMessage("by itself"))
                await asyncio.sleep(0)
            raise ValueError("by itself")

    class Caller(Process):
        async def run(self) -> Any:
            texts = []
            for how, kind in (("raises", ProcessExceptedError), ("killed", ProcessKilledError)):
                call = self.call(Fails, {"how": how})
                with pytest.raises(kind) as caught:
                    await (asyncio.to_thread(call.result) if in_thread else call)
                texts.append(str(caught.value))
            with pytest.raises(InvalidInputError, match=r"inputs\.how"):
                self.call(Fails, {})
            return texts

    raised, killed = (await execute(Caller)).value
    assert raised.endswith("excepted: ValueError: by itself")
    assert killed.endswith("was killed: by itself")


async def test_its_lines_go_to_its_caller() -> None:
    """With the process that said them and the step of its caller; from any depth and from its children too."""
    bench = Bench()
    await bench.run(Down({"depth": 3}, pid="p"))
    reports = [line for line in bench.lines if line.level == "REPORT"]
    (line,) = reports
    assert (line.text, line.step) == ("the bottom", "run")
    assert line.source is not None
    assert line.source.startswith("Down ")

    class Caller(Process):
        def run(self) -> None:
            self.report("mine")
            self.call(DownInThreads, {"depth": 1}).result()

    bench = Bench()
    await bench.run(Caller(pid="c"))
    assert [(line.text, line.source is None) for line in bench.lines] == [("mine", True), ("the bottom", False)]


@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_kill_of_the_caller_reaches_the_called(in_thread: bool) -> None:
    """Within the same grace period; nothing is left behind."""
    called: list[Process] = []
    running = asyncio.Event()

    class Hangs(Process):
        async def run(self) -> None:
            called.append(self)
            running.set()
            await asyncio.Event().wait()

    class Caller(Process):
        @step(thread=True)
        def run(self) -> Any:
            if in_thread:
                return self.call(Hangs).result()
            return self.awaits()

        async def awaits(self) -> Any:
            return await self.call(Hangs)

    process = Caller()
    task = asyncio.create_task(process.execute())
    await running.wait()
    process.receive(KillMessage("enough", grace_s=5))
    with pytest.raises(ProcessKilledError, match="enough"):
        await task
    while not called[0].has_terminated():
        await asyncio.sleep(0)
    assert called[0].state is ProcessState.KILLED


async def test_a_step_that_was_given_up_calls_nobody() -> None:
    """Its thread goes on, but what it calls does not begin, although the process is in its next step by then."""
    gate, ended = threading.Event(), threading.Event()
    called: list[Process] = []
    errors: list[BaseException] = []

    class Child(Process):
        async def run(self) -> None:
            called.append(self)

    class Caller(Process):
        @step(timeout=0.02, retry=RetryPolicy(max_attempts=2, initial_interval_s=0))
        def run(self) -> Any:
            if self.status is None:
                self.set_status("hangs")
                gate.wait(10)
                try:
                    self.call(Child).result()
                except BaseException as error:
                    errors.append(error)
                ended.set()
                return None
            return Continue(self.second)

        async def second(self) -> Any:
            gate.set()
            return Stop(await asyncio.to_thread(ended.wait, 10))

    assert (await execute(Caller)).value is True
    assert not called
    assert [type(error) for error in errors] == [InvalidStateError]


async def test_a_pause_of_the_caller_waits_for_the_end_of_the_step() -> None:
    """The called process belongs to the step, so it goes on."""
    running = asyncio.Event()

    class Child(Process):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.message("go")

        async def run(self) -> Wait:
            children.append(self)
            return Wait(message("go"), then=self.then)

        async def then(self, value: Any) -> Stop:
            return Stop(value)

    children: list[Process] = []

    class Caller(Process):
        async def run(self) -> Any:
            running.set()
            self.set_status(str((await self.call(Child)).value))
            return Wait(sleep(1000))

    process = Caller()
    bench = Bench()
    task = asyncio.create_task(bench.run(process))
    await running.wait()
    process.receive(Pause("later"))
    while not (children and children[0].state is ProcessState.WAITING):
        await asyncio.sleep(0)
    children[0].send("go", 5)
    await task
    assert (process.state, process.paused) == (ProcessState.WAITING, True)
    assert process.snapshot()["status"] == "5"


async def test_only_a_step_can_call() -> None:
    """Outside of one write `execute`."""
    with pytest.raises(InvalidStateError, match="in a step to call a process"):
        Down({"depth": 1}).call(Down, {"depth": 0})


async def test_an_async_step_awaits_a_call() -> None:
    """Asking for its result would block the loop that runs it: the error says what to write."""

    class Blocks(Process):
        async def run(self) -> Any:
            return self.call(Down, {"depth": 0}).result()

    with pytest.raises(
        ProcessExceptedError, match=r"this would block the event loop .* in an `async def` write `await`"
    ):
        await execute(Blocks)


async def test_no_thread_is_left() -> None:
    """The threads of nested plain steps end with them."""
    await execute(DownInThreads, {"depth": 20})
    while [thread for thread in threading.enumerate() if thread.name == "step"]:
        await asyncio.sleep(0)
