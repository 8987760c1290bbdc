"""The process stack: which process, and which step of it, the code that asks is running in.

The stack is an immutable tuple in a context variable, so it is right in coroutines, in tasks that a step starts, in
the worker threads of plain steps, and when one process executes another one inside a step. A frame holds its process
weakly: a context that outlives the step (a forgotten task, a cached callback) keeps no process alive. Beside it stands
the number of the attempt, by which a process knows the doings of a step that it has abandoned.
"""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from contextvars_extras.context_var_ext import ContextVarExt

if TYPE_CHECKING:
    from prunus.processes.machine import Machine
    from prunus.processes.process import Process


Frame = tuple["weakref.ref[Machine]", int, "str | None"]
"""One attempt at one step of one process: the process, the number of the attempt, the name of the step."""


Stack = tuple[Frame, ...]

_stack: ContextVarExt[Stack] = ContextVarExt("prunus.process_stack", default=())

frames: Callable[[], Stack] = _stack.get_raw
"""All frames of this context, the innermost last."""
enter: Callable[[Stack], contextvars.Token[Stack]] = _stack.set
"""Make these the frames of this context; give the token back to `pop` in the same context."""
pop: Callable[[contextvars.Token[Stack]], None] = _stack.reset
"""Leave the step that `push` or `enter` entered."""


def extended(process: Machine, attempt: int, step: str | None = None) -> Stack:
    """The frames of this context and one more."""
    return frames() + ((process._weakly, attempt, step),)  # noqa: RUF005  (quicker)


def push(process: Machine, attempt: int, step: str | None = None) -> contextvars.Token[Stack]:
    """Enter a step; give the token back to `pop` in the same context."""
    return enter(extended(process, attempt, step))


def top() -> Process | None:
    """The innermost process that is still alive."""
    for reference, _, _ in reversed(frames()):
        process: Any = reference()
        if process is not None:
            return process  # type: ignore[no-any-return]
    return None


def current_step() -> str | None:
    """The name of the step of `top`."""
    return next((step for reference, _, step in reversed(frames()) if reference() is not None), None)


def attempt_of(process: Machine) -> int | None:
    """The attempt of `process` that this code belongs to; None outside of its steps."""
    for reference, attempt, _ in reversed(frames()):
        if reference() is process:
            return attempt
    return None


def depth() -> int:
    """How many steps are inside one another here."""
    return len(frames())


def clean_context() -> contextvars.Context:
    """A copy of this context without the stack: for tasks that outlive the step that starts them."""
    context = contextvars.copy_context()
    context.run(_stack.set, ())
    return context
