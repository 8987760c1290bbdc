"""How work crosses from the core's side of a communicator to its users' loops, and back.

Waking another thread is what costs most of a message, so all that one step of the core's side has for a loop is handed
over together (`Handover`), with one wake-up. What handlers came to goes back the same way: those that end before the
core's side looks again are seen by it at once.

A handler is an ``async def`` and runs as a task of its subscriber's loop, or a plain ``def`` and runs in a worker
thread that this loop waits for, at most `MAX_HANDLER_THREADS` at once; one that waits for its communicator does not
count (`waiting`), because what it waits for may have to run here. Both get a copy of the context in which they
were subscribed. Each run ends exactly once: with a result, an error or a cancellation, also if its loop is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Container, Iterator
from contextvars import ContextVar, copy_context
from typing import Any, ClassVar

import anyio.to_thread
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

from prunus.errors import PrunusError

MAX_HANDLER_THREADS = 64
"""Plain ``def`` handlers that run at once for one loop; more wait for a free thread."""
MAX_WAITING_THREADS = 1_000
"""So many more may wait for their communicator."""
MAX_UNHEARD_ENDS = 100
"""Handlers that nobody waits for and that have ended, before the core's side is woken for them."""

logger = logging.getLogger(__name__)
_limiter: RunVar[CapacityLimiter] = RunVar("prunus_handler_threads")


class NotRunError(PrunusError):
    """The loop of the handler is gone: it was not run, or nobody knows how it ended."""


class Crossing(ABC):
    """Something to be done in another loop."""

    __slots__ = ()

    @abstractmethod
    def arrive(self) -> None:
        """Do it, there. Never raises."""

    def strand(self) -> None:  # noqa: B027 (for most it is enough that nobody is there to care)
        """On the core's side: that loop is closed, so it will never be done."""


class Handover:
    """What waits to cross, by loop. Used on the core's side only; emptied at the end of each of its steps."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[Crossing]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, crossing: Crossing) -> None:
        crossings = self._waiting.get(loop)
        if crossings is None:
            self._waiting[loop] = [crossing]
        else:
            crossings.append(crossing)

    def send(self) -> None:
        """Hand all of it over; what is for the loop that runs here is there at once."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        here = running_loop()
        for loop, crossings in waiting.items():
            if loop is here:
                _arrive(crossings)
                continue
            try:
                loop.call_soon_threadsafe(_arrive, crossings)
            except RuntimeError:
                for crossing in crossings:
                    crossing.strand()


class Waiter(Crossing):
    """A future, and the loop that alone may touch it."""

    __slots__ = ("future", "loop", "outcome")

    def __init__(self) -> None:
        """Here is who waits."""
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.outcome: object = None

    def arrive(self) -> None:
        if self.future.done():
            return
        if isinstance(self.outcome, BaseException):
            self.future.set_exception(self.outcome)
        else:
            self.future.set_result(self.outcome)


class Callback(Crossing):
    """A function that is to be called in the loop in which it was given, with what gathered since the last time.

    It is not called again before that call began: a loop that is busy for long finds one call, not thousands.
    """

    __slots__ = ("_function", "_gathered", "_on_its_way", "_saying", "loop")

    def __init__(self, function: Callable[[int], object]) -> None:
        self.loop = asyncio.get_running_loop()
        self._function = function
        self._gathered = self._saying = 0
        self._on_its_way = False

    def gather(self, count: int) -> None:
        self._gathered += count

    @property
    def gathered(self) -> int:
        """What nobody was told yet."""
        return self._gathered

    def call(self, handover: Handover) -> None:
        """Say what gathered, if there is something to say."""
        if self._gathered and not self._on_its_way:
            self._on_its_way = True
            self._saying, self._gathered = self._gathered, 0
            handover.add(self.loop, self)

    def arrive(self) -> None:
        self.loop.call_soon(self._call)

    def _call(self) -> None:
        self._on_its_way = False
        self._function(self._saying)


class Handler:
    """A user's function, and where and how it runs."""

    __slots__ = ("context", "function", "is_async", "loop")

    def __init__(self, function: Callable[[Any], Any]) -> None:
        """To run in this loop. Raises `TypeError` if it is nothing that could be called."""
        if not callable(function):
            raise TypeError(f"a handler is a function, or an object that can be called, not {function!r:.100}")
        self.function = function
        self.loop = asyncio.get_running_loop()
        self.context = copy_context()
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 (an object whose call is a coroutine function)
        )


class Job(Crossing):
    """One run of a handler."""

    __slots__ = ("_argument", "_ended", "_jobs", "error", "handler", "limiter", "result", "task")

    is_answered: ClassVar[bool] = True
    """Somebody waits for its end: the core's side hears of it at once. Else when it looks, or when many have ended."""

    def __init__(self, jobs: Jobs, handler: Handler, argument: object) -> None:
        self.handler = handler
        self._jobs, self._argument = jobs, argument
        self._ended = False
        self.task: asyncio.Task[None] | None = None
        self.limiter: CapacityLimiter | None = None
        """Among which threads it counts, if it runs in one."""
        self.result: object = None
        self.error: BaseException | None = None

    @abstractmethod
    def finish(self, now: float) -> None:
        """On the core's side: it ended, see `result` and `error`. Called once."""

    async def _prepare(self, argument: Any) -> Any:
        """With what the handler is called, if something has to be fetched first. What it raises ends the run."""
        return argument

    def arrive(self) -> None:
        handler = self.handler
        self.task = task = handler.loop.create_task(self._run(), context=handler.context.copy())
        task.add_done_callback(self._done)

    def strand(self) -> None:
        self._end(None, NotRunError("the event loop of this handler is closed"))

    async def _run(self) -> None:
        _SERVING.set(self)
        handler = self.handler
        try:
            argument = await self._prepare(self._argument)
            if handler.is_async:
                result = await handler.function(argument)
            else:
                self.limiter = _threads()
                result = await anyio.to_thread.run_sync(handler.function, argument, limiter=self.limiter)
                if inspect.isawaitable(result):
                    result = await result
            if isinstance(result, bytearray | memoryview):
                result = bytes(result)  # now: its owner may go on to change it
        except Exception as error:  # the user's handler: whatever it raised is the answer
            self._end(None, error)
        except (SystemExit, KeyboardInterrupt) as error:
            self._end(None, error)
            if threading.current_thread() is threading.main_thread():
                raise
            logger.error("a handler wanted to end the program, from a thread that can't: only the handler ended")
        except BaseException as error:
            self._end(None, error)
            raise
        else:
            self._end(result, None)

    def _done(self, task: asyncio.Task[None]) -> None:
        if not self._ended:  # it was cancelled before it began
            self._end(None, asyncio.CancelledError())
        if not task.cancelled():
            task.exception()  # is in `error` already; asked for, so that nobody complains

    def _end(self, result: object, error: BaseException | None) -> None:
        if not self._ended:
            self._ended = True
            self.result, self.error = result, error
            self._jobs.ended.append(self)
            if self.is_answered or error is not None or len(self._jobs.ended) >= MAX_UNHEARD_ENDS:
                self._jobs.wake()


class _Cancel(Crossing):
    __slots__ = ("_job",)

    def __init__(self, job: Job) -> None:
        self._job = job

    def arrive(self) -> None:
        if self._job.task is not None:
            self._job.task.cancel()


class Jobs:
    """The handlers that run now."""

    def __init__(self, handover: Handover, wake: Callable[[], object]) -> None:
        """`wake` has the core's side call `collect` soon; it is called from any thread."""
        self.wake = wake
        self.ended: deque[Job] = deque()
        """Those that ended and that the core's side has not yet seen; at most those in hand."""
        self._handover = handover
        self._in_hand: set[Job] = set()

    def start(self, job: Job) -> None:
        self._in_hand.add(job)
        self._handover.add(job.handler.loop, job)

    def collect(self, now: float) -> None:
        """Finish those that ended."""
        while self.ended:
            job = self.ended.popleft()
            self._in_hand.discard(job)
            job.finish(now)

    def cancel(self, job: Job) -> bool:
        """Cancel it, unless it runs in a thread: that can't be stopped, and ends in its own time. Whether it can be."""
        if job.handler.is_async:
            self._handover.add(job.handler.loop, _Cancel(job))
        return job.handler.is_async

    def cancel_all(self, but: Container[Job]) -> None:
        for job in self._in_hand:
            if job not in but:
                self.cancel(job)
        self._in_hand.clear()

    def strand_those_of_closed_loops(self) -> None:
        for job in self._in_hand:
            if job.handler.loop.is_closed():
                job.strand()

    def __len__(self) -> int:
        return len(self._in_hand)


def serving() -> Job | None:
    """The run of a handler in which the caller is, if it is in one."""
    return _SERVING.get()


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around what the caller waits for in its thread. If that is a plain handler it does not count among the threads
    meanwhile."""
    job = serving()
    if job is None or (limiter := job.limiter) is None:
        yield
        return

    lent = 0

    def lend() -> None:
        nonlocal lent
        lent = int(limiter.total_tokens < MAX_HANDLER_THREADS + MAX_WAITING_THREADS)
        limiter.total_tokens += lent

    def take_back() -> None:
        limiter.total_tokens -= lent

    with contextlib.suppress(RuntimeError):  # that loop is closed
        job.handler.loop.call_soon_threadsafe(lend)
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):
            job.handler.loop.call_soon_threadsafe(take_back)


_SERVING: ContextVar[Job | None] = ContextVar("prunus_handler", default=None)


def _threads() -> CapacityLimiter:
    try:
        return _limiter.get()
    except LookupError:
        limiter = CapacityLimiter(MAX_HANDLER_THREADS)
        _limiter.set(limiter)
        return limiter


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs on this thread."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _arrive(crossings: list[Crossing]) -> None:
    for crossing in crossings:
        crossing.arrive()
