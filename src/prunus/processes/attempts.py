"""One attempt at one step: the user's code in a task of its own, and the working copy that it writes to.

Everything that can go wrong with user code is dealt with here. It may raise, take too long, fall silent, block its
thread, ignore its cancellation, or go on writing after it was given up: `Attempt.run` comes back in each case, within a
bound, with an outcome. What the step writes belongs to the attempt; the process takes it over if the attempt ends well.

An ``async def`` runs on the loop, a plain ``def`` in a worker thread; each has a copy of the context. What can't wait
(an ``async def`` without any ``await``, a plain ``def`` that is to run on the loop) is called at once, without a task:
nothing can come between, so nothing could cancel it. A thread can't be stopped: one whose step was given up runs on,
its value is dropped, and a warning says so.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from prunus.errors import StepTimeoutError
from prunus.processes import eager, stack
from prunus.processes.control import KillLevel, Register
from prunus.processes.steps import StepOptions

if TYPE_CHECKING:
    from concurrent.futures import Future

    from prunus.processes.machine import Machine
    from prunus.processes.process import Process
    from prunus.processes.states import Running

CANCEL_GRACE_S = 10.0
"""How long a step that is cancelled, but not killed, may clean up before it is abandoned."""
MAX_EAGER_DEPTH = 8
"""Steps that run inside steps start eagerly down to this depth; deeper ones would fill the interpreter's stack."""

T = TypeVar("T")
Outcome = tuple[Any, BaseException | None]
"""What a step has returned, or what it has raised."""
OF_USERS = (Exception, SystemExit, GeneratorExit)
"""What a function of the user's that is no step may raise: no more than its own error."""

_log = logging.getLogger(__name__)


class Attempt(msgspec.Struct, eq=False):
    """See the module. Everything but plain ``def`` steps happens on one event loop."""

    process: Machine
    number: int
    outputs: dict[str, Any]
    memo: Any
    """What a subclass of `Process` keeps in a working copy."""
    step: str | None = None
    """The name of the step, when it is known."""
    begun_in: Running | None = None
    """The state whose step it is, once that has begun."""
    options: StepOptions | None = None
    frames: stack.Stack | None = None
    """The process stack in the step."""
    children: list[Process] = []
    progress: float | None = None
    """What the step says of itself, from 0 to 1."""
    detail: str | None = None
    is_killed: bool = False
    failure: BaseException | None = None
    """Why it was cancelled, if it was not killed."""
    outcome: Outcome | None = None
    task: asyncio.Task[None] | None = None
    waiter: asyncio.Future[None] | None = None
    loop: asyncio.AbstractEventLoop | None = None
    guard: asyncio.TimerHandle | None = None
    """The timer that cancels it, or gives it up."""
    beat_at_s: float = 0.0
    doing: defaultdict[str, asyncio.Lock] | None = None
    """What `Process.do` does at this moment, by name."""
    maps: int = 0
    """How often it has fanned out."""
    is_over: bool = False
    """The step has ended or is given up: what it calls from now on is not waited for."""
    calls: list[Future[Any]] = []
    """Processes that a step in a thread has called."""

    async def run(
        self, options: StepOptions, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Outcome:
        """Call a step and wait for its end, or until it is given up.

        If the caller is cancelled, the step is cancelled, given `CANCEL_GRACE_S` to end, and `CancelledError` goes on.
        """
        self.outcome, self.is_over = None, False  # of what was run before it
        return self.begin(options, function, args, kwargs) or await self.end()

    def begin(
        self, options: StepOptions, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Outcome | None:
        """Call a step. The outcome if it has ended already; if not, its `end` must be awaited."""
        self.options = options
        self.frames = stack.extended(self.process, self.number, self.step)
        loop = self.loop = asyncio.get_running_loop()
        if options.is_inline:
            called = contextvars.copy_context().run(self._call_inline, function, args, kwargs)
            if isinstance(called, tuple):
                return called
            coroutine = called
        else:
            coroutine = self._body(function, args, kwargs)
        if not self.is_killed and len(self.frames) <= MAX_EAGER_DEPTH:
            self.task = eager.start(loop, coroutine)
        else:
            self.task = loop.create_task(coroutine)
        return self.outcome

    async def end(self) -> Outcome:
        """Wait for the end of what did not end in `begin`."""
        loop, task, options = self.loop, self.task, self.options
        assert loop is not None
        assert task is not None
        assert options is not None
        self.waiter = loop.create_future()
        task.add_done_callback(self._ended)
        if self.is_killed:  # by its own first lines
            task.cancel()
            self.kill(self.process.register)
        elif not options.is_plain:
            self._watch(loop, options)
        try:
            await self.waiter
        except asyncio.CancelledError:
            # Our caller is cancelled. The next attempt must not meet this one, so the step is given time to end.
            if not self.is_killed:
                task.cancel()
            await asyncio.wait((task,), timeout=CANCEL_GRACE_S)
            raise
        finally:
            self.waiter = None
            if self.guard is not None:
                self.guard.cancel()
            if self.outcome is None and not task.done():
                self._abandon(task)
            self.is_over = True
            for call in tuple(self.calls):
                call.cancel()
        if self.failure is not None:
            return None, self.failure
        return self.outcome or (None, asyncio.CancelledError())

    def kill(self, register: Register) -> None:
        """Cancel it; it may clean up for the grace period of the kill."""
        is_new, is_forced = not self.is_killed, register.kill is KillLevel.FORCE
        if is_new:
            self.is_killed = True
            self._cancel()
        if is_new or is_forced or self.guard is None:  # saying it again gives it no more time
            self._give_up_after(0.0 if is_forced else register.grace_s)

    def fail(self, error: BaseException) -> None:
        """Cancel it: `error` is what it has raised, whatever it makes of that."""
        if self.failure is None and not self.is_killed:
            self.failure = error
            self._cancel()
            self._give_up_after(CANCEL_GRACE_S)

    def beat(self) -> None:
        """It lives. From any thread."""
        self.beat_at_s = time.monotonic()

    def ask_loop(self, call: Callable[[], object]) -> None:
        """Have something called on the loop of the process, from any thread."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(call)

    # --- the user's code ------------------------------------------------------------------------------

    async def _body(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The body of the task of a step: the one place where steps are called."""
        assert self.frames is not None
        stack.enter(self.frames)  # (the task has a context of its own)
        try:
            is_async = self.options is not None and self.options.is_async
            value = await (function(*args, **kwargs) if is_async else self.call(function, *args, **kwargs))
            self.outcome = value, None
        except BaseException as error:  # the user's step: also SystemExit is no more than the end of this process
            if _is_ctrl_c(error):
                raise
            self.outcome = None, error

    def _call_inline(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Outcome | Coroutine[Any, Any, None]:
        """Call a step that can't wait, so nothing can come between. If it returns an awaitable, that is left.

        Runs in a copy of the context. `asyncio.current_task` is that of the driver.
        """
        assert self.frames is not None
        stack.enter(self.frames)
        try:
            value = function(*args, **kwargs) if kwargs else function(*args)
            if value is not None and function is not at_once and inspect.isawaitable(value):
                return self._body(_await, (value,), {})
            return value, None
        except BaseException as error:  # the user's step
            if _is_ctrl_c(error):
                raise
            return None, error

    async def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of the user's, in a thread if it is a plain one."""
        code = getattr(function, "__code__", None)
        if code is not None and code.co_flags & inspect.CO_COROUTINE:
            return await function(*args, **kwargs)
        in_thread = None if self.options is None else self.options.thread
        if in_thread is None:
            in_thread = self.process.run_sync_steps_in == "thread"
        if not in_thread or inspect.iscoroutinefunction(function):
            value = function(*args, **kwargs)
            return await value if inspect.isawaitable(value) else value
        try:
            value, error = await _in_thread(function, args, kwargs)
        except asyncio.CancelledError:
            _log.warning(
                "a plain step can't be interrupted: it goes on in its thread, and what it returns is dropped",
                extra={"pid": self.process.pid, "step": self.step},
            )
            raise
        if error is not None:
            raise error
        return await value if inspect.isawaitable(value) else value

    # --- its end ----------------------------------------------------------------------------------------

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # a KeyboardInterrupt; it went to the loop as well
        self._give_up()

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def _give_up_after(self, seconds: float) -> None:
        if self.guard is not None:
            self.guard.cancel()
        if self.waiter is None:
            return
        if seconds <= 0:
            self._give_up()
        else:
            self.guard = self.waiter.get_loop().call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def _abandon(self, task: asyncio.Task[None]) -> None:
        pid = self.process.pid
        _log.warning(
            "a step did not end when it was cancelled; it is abandoned, and what it does from now on has no effect",
            extra={"pid": pid, "step": self.step},
        )

        def ended(task: asyncio.Task[None]) -> None:
            _abandoned.discard(task)
            error = None if self.outcome is None else self.outcome[1]
            if error is not None and not isinstance(error, asyncio.CancelledError):
                _log.warning(
                    "a step of process %s that was abandoned has failed; that changes nothing",
                    pid,
                    exc_info=error,
                    extra={"pid": pid, "step": self.step},
                )

        _abandoned.add(task)
        task.add_done_callback(ended)

    def _watch(self, loop: asyncio.AbstractEventLoop, options: StepOptions) -> None:
        """Fail it when its time is over, or when it was silent for too long."""
        begun_s = self.beat_at_s = time.monotonic()

        def look() -> None:
            now_s = time.monotonic()
            timeout_s, silence_s = options.timeout_s, options.heartbeat_timeout_s
            if timeout_s is not None and now_s - begun_s >= timeout_s:
                self.fail(StepTimeoutError(options.name, timeout_s, "it did not end"))
            elif silence_s is not None and now_s - self.beat_at_s >= silence_s:
                self.fail(StepTimeoutError(options.name, silence_s, "it gave no heartbeat"))
            else:
                ends = [] if timeout_s is None else [begun_s + timeout_s]
                ends += [] if silence_s is None else [self.beat_at_s + silence_s]
                self.guard = loop.call_later(max(0.0, min(ends) - now_s), look)

        look()


def at_once(step: Callable[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any) -> T:
    """Call an ``async def`` that can't wait."""
    coroutine = step(*args, **kwargs)
    try:
        coroutine.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError(f"{coroutine!r} has waited")


async def _await(value: Awaitable[Any]) -> Any:
    return await value


async def _in_thread(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Outcome:
    """Call `function` in a thread, in a copy of this context.

    A step inside a step gets a thread of its own: those of the pool may all be held by steps that wait for it.
    """
    context = contextvars.copy_context()

    def work() -> Outcome:
        # Returned rather than raised: a future can't carry StopIteration, and SystemExit would end the thread.
        try:
            return context.run(function, *args, **kwargs), None
        except BaseException as error:  # the user's step
            return None, error

    loop = asyncio.get_running_loop()
    if stack.depth() <= 1:
        return await loop.run_in_executor(None, work)
    future: asyncio.Future[Outcome] = loop.create_future()

    def settle(outcome: Outcome) -> None:
        if not future.done():
            future.set_result(outcome)

    def own_thread() -> None:
        outcome = work()
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=own_thread, name="step", daemon=True).start()
    return await future


_abandoned: set[asyncio.Task[None]] = set()
"""Steps that do not end though they were cancelled. The loop holds its tasks weakly, so somebody must hold them."""


def _is_ctrl_c(error: BaseException) -> bool:
    """Whether somebody wants to end the program. Where SIGINT is handled by the event loop, as in a worker, only the
    step itself can have raised it."""
    handled = getattr(signal.getsignal(signal.SIGINT), "__module__", "") == "asyncio.unix_events"
    return isinstance(error, KeyboardInterrupt) and not handled
