"""Futures that resolve to futures, as kiwipy has them, across a wire on which each question has one answer.

A subscriber may return a future, which may resolve to another one, and so on. Its caller gets a future for the
question, and one more for each of those. `unwrap` is the subscriber's side: it waits through all of them and tells how
many there were. `Chain` is the caller's side: it grows when the other side says that it waits, and is complete, with
just as many futures, when the answer is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

from prunus.compat.kiwipy.wire import Reply


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a subscriber came to in the end, after `depth` futures. `cancelled` if one of these was."""

    depth: int
    value: Any = None
    error: BaseException | None = None
    cancelled: bool = False


async def unwrap(value: Any, error: BaseException | None, waits: Callable[[int], None]) -> Outcome:
    """The outcome of a call that returned `value` or raised `error`. `waits` is told of each future before it is waited
    for. Raises `asyncio.CancelledError` only if this waiting is cancelled, not if a future is."""
    depth = 0
    while error is None:
        if isinstance(value, Future):
            depth += 1
            if not value.done():
                waits(depth)
                await _thread_future_done(value)
        elif asyncio.isfuture(value):
            depth += 1
            if not value.done():
                waits(depth)
                await _loop_future_done(value)
        elif inspect.isawaitable(value):  # what an `async def` returned
            value, error = await outcome_of_awaiting(value)
            continue
        else:
            return Outcome(depth, value)
        if value.cancelled():
            return Outcome(depth, cancelled=True)
        error = value.exception()
        value = value.result() if error is None else None
    return Outcome(depth, error=error, cancelled=isinstance(error, CancelledError | asyncio.CancelledError))


async def outcome_of_awaiting(value: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """What a user's coroutine returned, or raised. Raises only if whoever waits here is cancelled."""
    try:
        return await value, None
    except asyncio.CancelledError as error:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise
        return None, error
    except Exception as error:  # the user's: whatever it is, is the answer
        return None, error


class Chain:
    """The caller's side. Each future is resolved once; one that its holder cancelled stays so."""

    def __init__(self) -> None:
        self.first: Future[Any] = Future()
        self._last = self.first
        self._depth = 0

    def deepen(self, depth: int) -> list[Callable[[], None]]:
        """There are `depth` futures behind the first. Returns what resolves them, to be called soon, in any threads: it
        calls back whoever waits."""
        steps = []
        while self._depth < depth:
            outer, self._last = self._last, Future()
            self._depth += 1
            steps.append(_setter(outer, self._last))
        return steps

    def finish(
        self, reply: Reply, decode: Callable[[bytes], Any], remote: Callable[[Reply], Exception]
    ) -> list[Callable[[], None]]:
        """The answer is there; returns what resolves the futures (see `deepen`)."""
        steps = self.deepen(reply.depth)
        last = self._last
        match reply.kind:
            case "cancelled":
                steps.append(lambda: _cancel(last))
            case "exception":
                steps.append(_setter(last, error=remote(reply)))
            case "result":
                try:
                    value = decode(reply.result)
                except Exception as error:  # the user's decoder: its error is the answer
                    steps.append(_setter(last, error=error))
                else:
                    steps.append(_setter(last, value))
        return steps

    def fail(self, error: Exception) -> Callable[[], None]:
        """There will be no answer; returns what resolves the last future."""
        return _setter(self._last, error=error)


def _setter(future: Future[Any], value: Any = None, error: Exception | None = None) -> Callable[[], None]:
    def resolve() -> None:
        if not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    return resolve


def _cancel(future: Future[Any]) -> None:
    future.cancel()
    future.set_running_or_notify_cancel()


async def _thread_future_done(future: Future[Any]) -> None:
    """Wait until a future that belongs to no loop is done, whatever it came to."""
    await _done(future.add_done_callback)


async def _loop_future_done(future: asyncio.Future[Any]) -> None:
    """The same for one that belongs to a loop: this one, or that of another thread."""
    loop = future.get_loop()
    await _done(lambda done: loop.call_soon_threadsafe(future.add_done_callback, done))


async def _done(add: Callable[[Callable[[Any], None]], Any]) -> None:
    here = asyncio.get_running_loop()
    done = here.create_future()

    def wake() -> None:
        if not done.done():
            done.set_result(None)

    def called(_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # this loop is closed: nobody waits any more
            here.call_soon_threadsafe(wake)

    add(called)
    await done
