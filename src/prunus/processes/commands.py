"""What a step may return to say what comes next.

``Continue`` runs another step, ``Wait`` waits for children or for a message, ``Stop`` ends the process, ``Kill``
kills it. A step is named by its method (``Continue(self.fit, 3)``) and kept by name, so that it can be written into a
checkpoint. Any other value that a step returns ends the process with that result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prunus.errors import SpecError

StepRef = str | Callable[..., Any]
"""A step: a method of the process class, bound or not, or its name."""


@dataclass(frozen=True, slots=True)
class Child:
    """A handle to a submitted process: what `Process.submit` gives and what can be waited for."""

    pid: str
    class_id: str


@dataclass(frozen=True, slots=True, init=False)
class Continue:
    """Run `step` next, with these arguments. The process is checkpointed in between."""

    step: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __init__(self, step: StepRef, /, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "step", step_name(step))
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)


@dataclass(frozen=True, slots=True, init=False)
class Wait:
    """Wait until all children `on` have terminated, then run `callback` with the list of their `ProcessResult`.

    Without `on` the process is *suspended*: it waits for a `Resume` message, and `callback` gets its value if it has
    one. (An empty `on` is over at once.) Without a callback the process finishes, or goes on with its outline, when the
    wait is over.
    """

    callback: str | None
    msg: str | None
    data: Any
    on: tuple[str, ...] | None
    """None: suspended."""

    def __init__(
        self,
        callback: StepRef | None = None,
        msg: str | None = None,
        data: Any = None,
        on: Iterable[Child | str] | None = None,
    ) -> None:
        pids = None if on is None else tuple(child.pid if isinstance(child, Child) else child for child in on)
        object.__setattr__(self, "callback", None if callback is None else step_name(callback))
        object.__setattr__(self, "msg", msg)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "on", pids)


@dataclass(frozen=True, slots=True, init=False)
class Stop:
    """End here. An `exit_status` other than 0 says that the purpose was not reached; the process is FINISHED."""

    result: Any
    exit_status: int
    exit_message: str | None

    def __init__(
        self,
        result: Any = None,
        successful: bool = True,
        *,
        exit_status: int | None = None,
        exit_message: str | None = None,
    ) -> None:
        if exit_status is None:
            exit_status = 0 if successful else 1
        object.__setattr__(self, "result", result)
        object.__setattr__(self, "exit_status", int(exit_status))
        object.__setattr__(self, "exit_message", exit_message)


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill this process."""

    message: str | None = None


Command = Continue | Wait | Stop | Kill


def step_name(step: StepRef) -> str:
    """The name under which `step` stands in a checkpoint.

    Raises `SpecError` for something that has no name to be found by later, such as a lambda.
    """
    name = step if isinstance(step, str) else getattr(step, "__name__", None)
    if name is None or not name.isidentifier():
        raise SpecError(f"a step must be a method of the process class, so that a checkpoint can name it; got {step!r}")
    return name
