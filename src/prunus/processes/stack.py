"""The process stack: which process the code that asks is running in.

The stack is an immutable tuple in a context variable, so it is right in coroutines, in tasks that a step starts, in
the worker threads of plain steps, and when one process executes another one inside a step. A frame holds its process
weakly: a context that outlives the step (a forgotten task, a cached callback) keeps no process alive. Beside it stands
the number of the attempt, by which a process knows the doings of a step that it has abandoned.
"""

from __future__ import annotations

import weakref
from contextvars import Token
from typing import TYPE_CHECKING, NamedTuple

from contextvars_extras.context_var_ext import ContextVarExt

if TYPE_CHECKING:
    from prunus.processes.process import Process


class Frame(NamedTuple):
    """One attempt at one step of one process."""

    process: weakref.ref[Process]
    attempt: int


Stack = tuple[Frame, ...]

_stack: ContextVarExt[Stack] = ContextVarExt("prunus.process_stack", default=())


def push(process: Process, attempt: int) -> Token[Stack]:
    """Enter a step; give the token back to `pop` in the same context."""
    token: Token[Stack] = _stack.set((*_stack.get(), Frame(weakref.ref(process), attempt)))
    return token


def pop(token: Token[Stack]) -> None:
    """Leave the step that `push` entered."""
    _stack.reset(token)


def top() -> Process | None:
    """The innermost process that is still alive."""
    frames: Stack = _stack.get()
    for frame in reversed(frames):
        process = frame.process()
        if process is not None:
            return process
    return None


def attempt_of(process: Process) -> int | None:
    """The attempt of `process` that this code belongs to; None outside of its steps."""
    frames: Stack = _stack.get_raw()
    for frame in reversed(frames):
        if frame.process() is process:
            return frame.attempt
    return None
