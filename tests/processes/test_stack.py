"""Which process is the current one."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import weakref
from typing import Any

from prunus.processes import Continue, Process, Update, WorkChain, WorkChainSpec, execute, step, update
from prunus.processes import stack as process_stack


async def noted(seen: list[Any]) -> None:
    seen.append(Process.current())


async def test_it_is_right_in_steps_tasks_threads_and_nested_processes() -> None:
    """And it is the outer one again after the inner one, and none outside."""
    seen: list[Any] = []
    inner_seen: list[Any] = []

    class Inner(Process):
        async def run(self) -> None:
            inner_seen.extend([self, Process.current()])

    class Outer(Process):
        async def run(self) -> None:
            seen.append(Process.current())
            await asyncio.create_task(noted(seen))
            await asyncio.to_thread(lambda: seen.append(Process.current()))
            await execute(Inner)
            seen.append(Process.current())

    process = Outer()
    assert Process.current() is None
    await process.execute()
    assert Process.current() is None
    assert seen == [process] * 4
    assert inner_seen[0] is inner_seen[1]


async def test_the_current_step_is_known_by_its_name() -> None:
    """In the step, its tasks and threads; in an update it is the name of that; outside there is none."""
    seen: list[str | None] = []

    class Named(Process):
        @step(name="first")
        async def run(self) -> Continue:
            seen.append(Process.current_step())
            await asyncio.create_task(self.helper())
            await asyncio.to_thread(lambda: seen.append(Process.current_step()))
            return Continue(self.second)

        async def helper(self) -> None:
            seen.append(Process.current_step())

        def second(self) -> None:
            seen.append(Process.current_step())

        @update
        def change(self) -> str | None:
            return Process.current_step()

    process = Named()
    process.receive(Update("change"), token=1)
    (reply,) = process.take_effects().replies
    assert reply.value == "change"
    await process.execute()
    assert Process.current_step() is None
    assert seen == ["first", "first", "first", "second"]


async def test_what_outlives_a_step_can_be_given_a_clean_context() -> None:
    """It knows no process, and keeps the other variables."""
    colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour")
    contexts: list[contextvars.Context] = []

    class Leaves(Process):
        async def run(self) -> None:
            colour.set("red")
            contexts.append(process_stack.clean_context())
            assert Process.current() is self

    process = Leaves()
    await process.execute()
    assert contexts[0].run(Process.current) is None
    assert contexts[0].run(Process.current_step) is None
    assert contexts[0].run(colour.get) == "red"


async def test_many_processes_at_once_do_not_mix() -> None:
    """Each step sees its own, before and after it waits, in predicates and plain steps too."""
    wrong: list[Any] = []

    class Chain(WorkChain):
        @classmethod
        def define(cls, spec: WorkChainSpec) -> None:
            from prunus.processes import while_

            super().define(spec)
            spec.outline(while_(cls.more)(cls.one, cls.two))

        def check(self) -> None:
            if Process.current() is not self:
                wrong.append(Process.current())

        def more(self) -> bool:
            self.check()
            self.ctx.n = self.ctx.get("n", 0) + 1
            return bool(self.ctx.n < 4)

        async def one(self) -> None:
            self.check()
            await asyncio.sleep(0)
            self.check()

        def two(self) -> None:
            self.check()

    await asyncio.gather(*(Chain().execute() for _ in range(20)))
    assert wrong == []


async def test_a_leaked_context_keeps_no_process_alive() -> None:
    """A context that was copied in a step, and outlives it, knows only that there was one."""
    leaked: list[contextvars.Context] = []

    class Leaks(Process):
        async def run(self) -> None:
            leaked.append(contextvars.copy_context())

    process = Leaks()
    await process.execute()
    alive = weakref.ref(process)
    assert leaked[0].run(Process.current) is process
    del process
    gc.collect()
    assert alive() is None
    assert leaked[0].run(Process.current) is None


async def test_a_task_that_outlives_its_step_writes_nothing() -> None:
    """It belongs to a step that is over: what it emits has no effect."""
    gate = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    class Leaves(Process):
        @classmethod
        def define(cls, spec: Any) -> None:
            spec.output("x", required=False)

        async def run(self) -> Any:
            tasks.append(asyncio.create_task(self.later()))

        async def later(self) -> None:
            await gate.wait()
            self.out("x", 1)

    process = Leaves()
    result = await process.execute()
    gate.set()
    await tasks[0]
    assert result.outputs == process.result().outputs == {}


async def test_a_thread_without_the_context_writes_to_the_step() -> None:
    """A thread that the user starts does not know the process, but `self` does."""

    class Threads(Process):
        @classmethod
        def define(cls, spec: Any) -> None:
            spec.output("x")

        async def run(self) -> None:
            thread = threading.Thread(target=self.out, args=("x", 1))
            thread.start()
            await asyncio.to_thread(thread.join)

    assert (await execute(Threads)).outputs.x == 1


def test_frames_are_set_and_reset_by_token() -> None:
    """The stack is immutable: leaving one step can't disturb another context."""

    class Any_(Process):
        async def run(self) -> None: ...

    one, two = Any_(), Any_()
    outer = process_stack.push(one, 1)
    inner = process_stack.push(two, 7)
    copied = contextvars.copy_context()
    assert process_stack.top() is two
    assert (process_stack.attempt_of(one), process_stack.attempt_of(two)) == (1, 7)
    process_stack.pop(inner)
    assert process_stack.top() is one
    assert copied.run(process_stack.top) is two
    process_stack.pop(outer)
    assert process_stack.top() is None
