"""An ``async def`` without any ``await`` can't wait: it is called at once, and needs no task of its own."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from prunus.errors import ProcessExceptedError
from prunus.processes import (
    Continue,
    KillMessage,
    Process,
    ProcessState,
    WorkChain,
    WorkChainSpec,
    execute,
    if_,
)
from prunus.processes.steps import can_wait

colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour", default="none")


async def never() -> list[int]:
    """Loops, calls and inner functions are no waiting."""

    async def inner() -> None:
        await asyncio.sleep(0)

    return [number for number in range(3) if callable(inner)]


async def awaits() -> None:
    await asyncio.sleep(0)


async def perhaps(condition: bool) -> None:
    if condition:
        await asyncio.sleep(0)


async def enters(manager: AbstractAsyncContextManager[None]) -> None:
    async with manager:
        pass


async def iterates(source: AsyncIterator[int]) -> None:
    async for _ in source:
        pass


async def gathers(source: AsyncIterator[int]) -> list[int]:
    return [number async for number in source]


def plain() -> Any:
    return awaits()


@functools.wraps(never)
async def wrapped() -> None:
    await never()


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (never, False),
        (awaits, True),
        (perhaps, True),
        (enters, True),
        (iterates, True),
        (gathers, True),
        (plain, True),
        (wrapped, True),
        (functools.partial(never), True),
    ],
)
def test_whether_a_function_can_wait_stands_in_its_code(function: Callable[..., Any], answer: bool) -> None:
    """Of anything but an ``async def`` of Python's own it is not known, so it may."""
    assert can_wait(function) is answer


class Notes(Process):
    """Two steps that can't wait, and one that can."""

    tasks: list[Any]
    seen: list[Any]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.tasks, self.seen = [], []

    async def run(self) -> Continue:
        self.note()
        colour.set("red")
        self.helper = asyncio.create_task(self.help())
        return Continue(self.second)

    async def second(self) -> Continue:
        self.note()
        return Continue(self.third)

    async def third(self) -> int:
        self.note()
        async with asyncio.timeout(5.0):
            await self.helper
        return 5

    async def help(self) -> None:
        await asyncio.sleep(0)
        self.seen.append((colour.get(), Process.current() is self, Process.current_step()))

    def note(self) -> None:
        self.tasks.append(asyncio.current_task())
        self.seen.append((colour.get(), Process.current() is self, Process.current_step()))


async def test_each_step_has_a_context_of_its_own() -> None:
    """What a step sets, its tasks see, and neither the next step nor who executes the process."""
    process = Notes()
    assert (await process.execute()).value == 5
    assert colour.get() == "none"
    assert process.seen == [
        ("none", True, "run"),
        ("none", True, "second"),
        ("none", True, "third"),
        ("red", True, "run"),
    ]


async def test_a_step_that_can_wait_has_a_task_of_its_own_from_its_first_line() -> None:
    """The others run in the task that drives the process, as plain functions on the loop do."""
    process = Notes()
    await process.execute()
    driver = asyncio.current_task()
    assert process.tasks[:2] == [driver, driver]
    assert process.tasks[2] is not driver
    assert process.tasks[2].done()


async def test_its_error_is_that_of_the_step() -> None:
    """With the line that raised it; also what would end the interpreter."""

    class Fails(WorkChain):
        @classmethod
        def define(cls, spec: WorkChainSpec) -> None:
            super().define(spec)
            spec.outline(cls.bad)

        async def bad(self) -> None:
            raise SystemExit("no more")

    process = Fails()
    with pytest.raises(ProcessExceptedError, match="SystemExit: no more") as raised:
        await process.execute()
    assert "in bad" in str(raised.value.failure.traceback)


async def test_it_may_kill_its_own_process() -> None:
    """It ends, and so does the process; what it returns counts for nothing."""

    class Suicidal(Process):
        async def run(self) -> int:
            self.receive(KillMessage("by myself"))
            return 5

    process = Suicidal()
    await process.step()
    await process.step()
    assert process.state is ProcessState.KILLED
    assert (process.result().exit_message, process.result().value) == ("by myself", None)


async def helper() -> int:
    return 3


class Forgets(Process):
    async def run(self) -> Any:
        return helper()


class ForgetsInOutline(WorkChain):
    @classmethod
    def define(cls, spec: WorkChainSpec) -> None:
        super().define(spec)
        spec.outline(cls.first)

    async def first(self) -> Any:
        return helper()


class ForgetsLate(ForgetsInOutline):
    async def first(self) -> Any:
        await asyncio.sleep(0)
        return helper()


@pytest.mark.parametrize("process_class", [Forgets, ForgetsInOutline, ForgetsLate])
async def test_a_forgotten_await_is_told(process_class: type[Process]) -> None:
    """A step that returns what is to be awaited has failed, whether it could wait or not."""
    with pytest.raises(ProcessExceptedError, match="was an `await` forgotten"):
        await execute(process_class)


async def test_a_predicate_may_wait_after_a_step_that_can_not() -> None:
    """The step, its kind of predicate and what follows are one step."""

    class Asks(WorkChain):
        @classmethod
        def define(cls, spec: WorkChainSpec) -> None:
            super().define(spec)
            spec.outline(cls.first, if_(cls.ready)(cls.second))

        async def first(self) -> None:
            self.ctx.steps = ["first"]

        async def ready(self) -> bool:
            await asyncio.sleep(0)
            return bool(self.ctx.steps == ["first"])

        async def second(self) -> None:
            self.ctx.steps.append("second")

    process = Asks()
    await process.execute()
    assert process.ctx.steps == ["first", "second"]
