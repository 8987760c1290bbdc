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
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

from prunus.compat.kiwipy.wire import MAX_FUTURES, Reply


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a subscriber came to in the end, after `depth` futures. `cancelled` if one of these was."""

    depth: int
    value: Any = None
    error: BaseException | None = None
    cancelled: bool = False


async def unwrap(value: Any, error: BaseException | None, waits: Callable[[int], None]) -> Outcome:
    """The outcome of a call that returned `value` or raised `error`. `waits` is told of each future before it is waited
    for; more than `MAX_FUTURES` are an error. Raises `asyncio.CancelledError` only if this waiting is cancelled, not if
    a future is."""
    depth = 0
    while error is None:
        its_end: Callable[[Any], Awaitable[None]]
        if isinstance(value, Future):
            its_end = _thread_future_done
        elif asyncio.isfuture(value):
            its_end = _loop_future_done
        elif inspect.isawaitable(value):  # what an `async def` returned
            value, error = await outcome_of_awaiting(value)
            continue
        else:
            return Outcome(depth, value)
        if depth == MAX_FUTURES:
            return Outcome(depth, error=ValueError(f"a future of more than {MAX_FUTURES} futures, or of itself"))
        depth += 1
        if not value.done():
            waits(depth)
            await its_end(value)
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


class Answer(Future[Any]):
    """A future of the caller's. Where somebody has to be called back it is resolved in a thread, else at once: who only
    waits for it needs no free thread."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._has_callbacks = False

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        with self._lock:
            self._has_callbacks = True
        super().add_done_callback(fn)

    def resolve(self, how: Callable[[], None], in_thread: Callable[[Callable[[], None]], object]) -> None:
        """Do `how`, here or `in_thread`."""
        with self._lock:
            if not self._has_callbacks:
                how()
                return
        in_thread(how)


class Chain:
    """The caller's side. Each future is resolved once; one that its holder cancelled stays so."""

    def __init__(self, in_thread: Callable[[Callable[[], None]], object]) -> None:
        """`in_thread` has a function called in a thread, where it may wait: it calls back whoever asked for that."""
        self.first = self._last = Answer()
        self._in_thread = in_thread
        self._depth = 0

    def deepen(self, depth: int) -> None:
        """There are `depth` futures behind the first."""
        while self._depth < depth:
            outer, self._last = self._last, Answer()
            self._depth += 1
            self._set(outer, self._last)

    def finish(self, reply: Reply, decode: Callable[[bytes], Any], remote: Callable[[Reply], Exception]) -> None:
        """The answer is there."""
        self.deepen(reply.depth)
        last = self._last
        match reply.kind:
            case "cancelled":
                last.resolve(lambda: _cancel(last), self._in_thread)
            case "exception":
                self.fail(remote(reply))
            case "result":
                try:
                    value = decode(reply.result)
                except Exception as error:  # the user's decoder: its error is the answer
                    self.fail(error)
                else:
                    self._set(last, value)

    def fail(self, error: Exception) -> None:
        """The last future ends with this error."""
        self._set(self._last, error=error)

    def _set(self, future: Answer, value: Any = None, error: Exception | None = None) -> None:
        def resolve() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)

        future.resolve(resolve, self._in_thread)


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
