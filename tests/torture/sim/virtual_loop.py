"""An asyncio event loop whose time is that of a `Timeline`: coroutines of many programs, in one world.

What a program schedules is an event of that program: it waits while the program is stopped, and is gone when it is
dead. Callbacks of one program run in the order in which they were scheduled, as asyncio promises; those of different
programs in any order, which follows from the seed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any
from weakref import WeakKeyDictionary

from tests.torture.sim.timeline import Node, Timeline

LONGEST_TURN_S = 2e-5
"""How long a callback keeps its program busy, at most."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """See the module. It is driven by its timeline: `Timeline.run`."""

    def __init__(self, timeline: Timeline, chance: random.Random, complain: Callable[[dict[str, Any]], None]) -> None:
        self.timeline, self._chance, self._complain = timeline, chance, complain
        self._busy_until: dict[Node | None, float] = {}
        self.owners: WeakKeyDictionary[asyncio.Task[Any], Node | None] = WeakKeyDictionary()
        """Whose each task is."""

    def time(self) -> float:
        return self.timeline.now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *arguments: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, arguments, self, context)
        node = self.timeline.node
        turn = LONGEST_TURN_S * self._chance.random()
        when = self._busy_until[node] = max(self._busy_until.get(node, 0.0), self.timeline.now) + turn
        self.timeline.at(when, node, self._run, handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *arguments: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.timeline.now + delay, callback, *arguments, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *arguments: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, arguments, self, context)
        self.timeline.at(when, self.timeline.node, self._run, handle)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coroutine: Coroutine[Any, Any, Any] | Generator[Any, None, Any],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coroutine, loop=self, name=name, context=context)
        self.owners[task] = self.timeline.node
        return task

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self._complain(context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def _run(self, handle: asyncio.Handle) -> None:
        if not handle.cancelled():
            handle._run()
