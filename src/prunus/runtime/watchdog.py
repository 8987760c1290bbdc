"""Notices that an event loop does not turn, and says which step of which process keeps it.

A step that computes, or waits without ``await``, stops everything else of its worker: the other processes, their
letters, their timers. Nothing in the loop can tell, so a thread looks: it has the loop answer every
`PROBE_INTERVAL_S`, and when no answer comes for `LOOP_LIMIT_S` it reads from the stack of the loop's thread which step
runs. That is logged once with the stack, and once more with the whole time when the loop turns again; both go into the
log of the process too. A block that is a little longer than the limit may be missed, one that is reported was longer.

Leases go on meanwhile, because the communicator has a thread that looks after them; but not for ever:
`Watchdog.silent_s` is what a worker's communicator looks at before it says that this worker lives (see
`ThreadedCommunicator.speak_only_while`).
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from prunus.processes import stack
from prunus.processes.attempts import Attempt, at_once

if TYPE_CHECKING:
    from prunus.processes.machine import Machine

LOOP_LIMIT_S = 1.0
"""A loop that does not turn for longer is reported."""
PROBE_INTERVAL_S = 0.4
"""How often the loop is asked for an answer. An idle program spends less than 0.1 % of a core on that."""
MAX_STACK = 30
"""So many of the innermost frames are shown."""
_IDLE_SHARE = 0.1
"""A process that used less than this of one core meanwhile was stopped as a whole (SIGSTOP, a suspended machine)."""

logger = logging.getLogger(__name__)


class Watchdog:
    """Watches the loop in which it is entered, from then until it is left."""

    def __init__(self, limit_s: float = LOOP_LIMIT_S) -> None:
        self._limit_s = limit_s
        self._turned_at = time.monotonic()
        self._answered, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        loop, ident = asyncio.get_running_loop(), threading.get_ident()
        self._turned_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(loop, ident), name="prunus-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._answered.set()
        if self._thread is not None:
            self._thread.join()

    def silent_s(self) -> float:
        """The seconds since the loop was last known to turn. From any thread."""
        return time.monotonic() - self._turned_at

    def _run(self, loop: asyncio.AbstractEventLoop, ident: int) -> None:
        while not self._stopping.wait(PROBE_INTERVAL_S):
            self._answered.clear()
            if self._stopping.is_set():  # said just before that, so that no answer comes
                return
            asked_at, used_s = time.monotonic(), time.process_time()
            try:
                loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # the loop is closed
                return
            if self._answered.wait(self._limit_s):
                continue
            stood_s = time.monotonic() - asked_at
            stood_still = stood_s > 2 * self._limit_s and time.process_time() - used_s < _IDLE_SHARE * stood_s
            if stood_still and self._answered.wait(self._limit_s):
                continue
            try:
                self._report(loop, ident, asked_at)
            except Exception:  # it reads the stack of somebody else's code; and without this thread the lease ends
                logger.exception("what keeps the loop of this worker can't be shown")

    def _answer(self) -> None:
        self._turned_at = time.monotonic()
        self._answered.set()

    def _report(self, loop: asyncio.AbstractEventLoop, ident: int, asked_at: float) -> None:
        innermost = sys._current_frames().get(ident)
        culprit = (None if innermost is None else culprit_in(innermost)) or _culprit_of_task(loop)
        stack_text, where = ("", "") if innermost is None else (shown_stack(innermost), _place(innermost))
        del innermost  # a frame keeps alive what it refers to
        who, facts = ("no step of a process", {}) if culprit is None else (str(culprit), culprit.facts)
        logger.warning(
            "the loop of this worker has not turned for %.1f s, and nothing else of it goes on: it runs %s. Let that "
            "`await`, or make it a plain `def` step, which runs in a thread. It is here:\n%s",
            self._limit_s,
            who,
            stack_text,
            extra=facts,
        )
        if culprit is not None:
            culprit.tell(f"blocks the loop of its worker for more than {self._limit_s:.1f} s{where}")
        self._answered.wait()
        if self._stopping.is_set():
            return
        lasted_s = time.monotonic() - asked_at
        logger.warning("the loop turns again; it stood still for %.1f s in %s", lasted_s, who, extra=facts)
        if culprit is not None:
            culprit.tell(f"blocked the loop of its worker for {lasted_s:.1f} s")


@dataclass(frozen=True)
class Culprit:
    """A step that runs."""

    process: Machine
    step: str | None
    frames: stack.Stack
    """The process stack in it."""

    @property
    def facts(self) -> dict[str, Any]:
        """For the fields of a log line."""
        return {"pid": self.process.pid, "step": self.step}

    def tell(self, text: str) -> None:
        """Into the log of the process; its next checkpoint takes it along, also the one that ends it."""
        token = stack.enter(self.frames)
        try:
            self.process.write_line("WARNING", text, __name__)
        finally:
            stack.pop(token)

    def __str__(self) -> str:
        return f"the step {self.step!r} of process {self.process.pid}"


def culprit_in(innermost: FrameType) -> Culprit | None:
    """The step that this stack runs, the innermost of several."""
    frame: FrameType | None = innermost
    while frame is not None:
        if frame.f_code in _CALLS_STEPS:
            attempt = frame.f_locals.get("self")
            if isinstance(attempt, Attempt):
                return Culprit(attempt.process, attempt.step, attempt.frames or ())
        frame = frame.f_back
    return None


def shown_stack(innermost: FrameType) -> str:
    """The stack from the step on, as in a traceback; all of it if it is in none."""
    frames: list[FrameType] = []
    frame: FrameType | None = innermost
    while frame is not None and frame.f_code not in (*_CALLS_STEPS, at_once.__code__):
        frames.append(frame)
        frame = frame.f_back
    shown = traceback.StackSummary.extract((one, one.f_lineno) for one in reversed(frames[:MAX_STACK]))
    return "".join(shown.format()).rstrip()


_CALLS_STEPS = (Attempt._body.__code__, Attempt._call_inline.__code__)
"""The code that calls the user's steps on the loop."""


def _place(innermost: FrameType) -> str:
    return f", at {innermost.f_code.co_filename}:{innermost.f_lineno}"


def _culprit_of_task(loop: asyncio.AbstractEventLoop) -> Culprit | None:
    """The step to which the task belongs that runs now: a task that a step has made has its context."""
    task = asyncio.current_task(loop)
    if task is None or not hasattr(task, "get_context"):  # before Python 3.12 a task does not say
        return None
    frames: stack.Stack = task.get_context().copy().run(stack.frames)
    for reference, _, step in reversed(frames):
        process = reference()
        if process is not None:
            return Culprit(process, step, frames)
    return None
