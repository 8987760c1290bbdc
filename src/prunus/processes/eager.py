"""Start a task at once, so that one that never waits costs no turn of the event loop.

A new `asyncio.Task` begins in the next turn of its loop, and whoever awaits it continues in the one after that. Most
steps of a workflow do little and wait for nothing, so these two turns are most of what they cost. `start` runs the
coroutine to its first suspension before it returns. It is an ordinary task in every respect: `asyncio.current_task`,
cancellation, timeouts and context variables behave as always.

Python 3.12 does this itself (``eager_start``). On 3.11 the loop is asked to hand over the task's first step instead of
queueing it; a loop that does not let itself be asked (it has no ``__dict__``) queues it as usual.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

if sys.version_info >= (3, 12):

    def start(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task on the running `loop` for `coroutine`, which has run to its first suspension, or to its end."""
        return asyncio.Task(coroutine, loop=loop, eager_start=True)

else:
    from asyncio.tasks import _enter_task, _leave_task

    def start(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task on the running `loop` for `coroutine`, which has run to its first suspension, or to its end."""
        starter = asyncio.current_task(loop)
        if starter is None or not hasattr(loop, "__dict__"):
            return loop.create_task(coroutine)
        first: list[Callable[[], None]] = []

        def hand_over(callback: Callable[[], None], *, context: contextvars.Context | None = None) -> None:
            first.append(callback)

        context = contextvars.copy_context()
        loop.call_soon = hand_over  # type: ignore[assignment,method-assign]
        try:
            task = asyncio.Task(coroutine, loop=loop, context=context)
        finally:
            del loop.call_soon
        # What a third-party task owes the loop around each of its steps ("Extending" in the asyncio documentation).
        _leave_task(loop, starter)
        try:
            context.run(first[0])
        finally:
            _enter_task(loop, starter)
        return task
