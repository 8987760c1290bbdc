"""Tasks that start at once are ordinary tasks."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from prunus.processes.eager import start

T = TypeVar("T")

colour: contextvars.ContextVar[str] = contextvars.ContextVar("colour")


def begin(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    return start(asyncio.get_running_loop(), coroutine)


async def test_it_runs_to_its_first_suspension_before_start_returns() -> None:
    """And goes on in the loop like every task."""
    order: list[str] = []
    gate = asyncio.Event()

    async def body() -> str:
        order.append("begun")
        await gate.wait()
        order.append("ended")
        return "value"

    task = begin(body())
    order.append("returned")
    assert not task.done()
    gate.set()
    assert await task == "value"
    assert order == ["begun", "returned", "ended"]


async def test_one_that_never_waits_costs_no_turn_of_the_loop() -> None:
    """It is done when `start` returns, with its value or its error."""

    async def value() -> int:
        return 5

    async def error() -> int:
        raise ValueError("bad")

    turns: list[None] = []
    asyncio.get_running_loop().call_soon(turns.append, None)
    good, bad = begin(value()), begin(error())
    assert turns == []
    assert (good.done(), good.result()) == (True, 5)
    assert bad.done()
    with pytest.raises(ValueError, match="bad"):
        await bad


async def test_the_current_task_is_right_on_both_sides() -> None:
    """Inside it is the new one, also after it has waited; outside the old one, before and after, also nested."""
    starter = asyncio.current_task()
    seen: list[Any] = []
    inner: list[asyncio.Task[None]] = []

    async def leaf() -> None:
        seen.append(asyncio.current_task())

    async def body() -> None:
        seen.append(asyncio.current_task())
        inner.append(begin(leaf()))
        seen.append(asyncio.current_task())
        await asyncio.sleep(0)
        seen.append(asyncio.current_task())

    task = begin(body())
    assert asyncio.current_task() is starter
    await task
    assert asyncio.current_task() is starter
    assert seen == [task, inner[0], task, task]


async def test_the_current_task_is_right_after_an_interrupt() -> None:
    """What goes through the loop goes through `start`; the starter is the current task again."""
    starter = asyncio.current_task()
    tasks: list[asyncio.Task[Any] | None] = []

    async def interrupted() -> None:
        tasks.append(asyncio.current_task())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(interrupted())
    assert asyncio.current_task() is starter
    (task,) = tasks
    assert task is not None
    assert isinstance(task.exception(), KeyboardInterrupt)


async def test_context_variables_go_in_and_not_out() -> None:
    """It has a copy of the starter's context."""
    colour.set("red")
    seen: list[str] = []

    async def body() -> None:
        seen.append(colour.get())
        colour.set("blue")
        await asyncio.sleep(0)
        seen.append(colour.get())

    task = begin(body())
    assert colour.get() == "red"
    colour.set("green")
    await task
    assert seen == ["red", "blue"]
    assert colour.get() == "green"


async def test_a_timeout_in_the_first_segment_is_its_own() -> None:
    """It cancels the new task's wait, and nothing of the starter's."""

    async def body() -> str:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            return "timed out"
        return "no"

    assert await begin(body()) == "timed out"
    current = asyncio.current_task()
    assert current is not None
    assert current.cancelling() == 0


async def test_a_task_group_in_the_first_segment_is_its_own() -> None:
    """An error in the group cancels the task that entered it, which gets the group of errors."""

    async def fails() -> None:
        raise ValueError("in the group")

    async def body() -> list[str]:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fails())
                await asyncio.Event().wait()
        except* ValueError as errors:
            told = [str(error) for error in errors.exceptions]
        return told

    assert await begin(body()) == ["in the group"]


async def test_it_may_be_cancelled_where_it_waits() -> None:
    """At its first suspension, as everywhere."""
    cleaned: list[bool] = []

    async def body() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    task = begin(body())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (cleaned, task.cancelled()) == ([True], True)


@pytest.mark.parametrize("waits", [True, False])
async def test_it_may_cancel_itself_in_its_first_segment(waits: bool) -> None:
    """The cancellation comes when it waits, or when it ends: as in a task that the loop has started."""
    reached: list[str] = []

    async def body() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        reached.append("still here")
        if waits:
            await asyncio.Event().wait()
            reached.append("never")

    for task in (begin(body()), asyncio.create_task(body())):
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
    assert reached == ["still here", "still here"]


async def test_cancelling_the_starter_does_not_cancel_it() -> None:
    """They are two tasks."""
    begun: list[asyncio.Task[str]] = []
    gate = asyncio.Event()

    async def body() -> str:
        await gate.wait()
        return "value"

    async def starter() -> None:
        begun.append(begin(body()))
        await asyncio.Event().wait()

    outer = begin(starter())
    outer.cancel()
    await asyncio.wait([outer])
    gate.set()
    assert outer.cancelled()
    assert await begun[0] == "value"


async def test_what_the_first_segment_schedules_is_scheduled() -> None:
    """Callbacks, tasks and futures in it use the loop as it is."""
    order: list[str] = []

    async def other() -> None:
        order.append("task")

    async def body() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(order.append, "callback")
        task = loop.create_task(other())
        order.append("first segment")
        await asyncio.to_thread(order.append, "thread")
        await task

    await begin(body())
    assert order[:1] == ["first segment"]
    assert sorted(order[1:]) == ["callback", "task", "thread"]


async def test_nothing_is_left_on_the_loop() -> None:
    """Its own method is back, also after an error."""
    loop = asyncio.get_running_loop()

    async def value() -> None: ...

    begin(value())
    with pytest.raises(TypeError, match="coroutine was expected"):
        begin(3)  # type: ignore[arg-type]
    assert "call_soon" not in vars(loop)
    await asyncio.sleep(0)


async def test_without_a_running_task_it_is_queued_as_usual() -> None:
    """In a callback of the loop there is no task to come back to."""
    loop = asyncio.get_running_loop()
    begun: list[str] = []
    made: list[asyncio.Task[None]] = []

    async def body() -> None:
        begun.append("begun")

    def callback() -> None:
        made.append(start(loop, body()))
        if sys.version_info < (3, 12):
            assert begun == []

    loop.call_soon(callback)
    await asyncio.sleep(0)
    await made[0]
    assert begun == ["begun"]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python does it itself")
async def test_a_loop_that_can_not_be_asked_queues_it_as_usual() -> None:
    """A loop of another make, whose methods can't be replaced."""
    loop, starter = asyncio.get_running_loop(), asyncio.current_task()
    begun: list[str] = []

    class Closed:
        """It has no ``__dict__``."""

        __slots__ = ()

        def create_task(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
            return loop.create_task(coroutine)

    async def body() -> str:
        begun.append("begun")
        return "value"

    closed: Any = Closed()
    assert starter is not None
    asyncio.tasks._enter_task(closed, starter)  # as a loop does around each step of a task
    try:
        task = start(closed, body())
    finally:
        asyncio.tasks._leave_task(closed, starter)
    assert begun == []
    assert await task == "value"
