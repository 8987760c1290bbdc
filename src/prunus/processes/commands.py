"""What a step may return to say what comes next.

``Continue`` runs another step, ``Wait`` waits, ``Stop`` ends the process, ``Kill`` kills it. A step is named by its
method (``Continue(self.fit, 3)``) and kept by name, so that it can be written into a checkpoint. A step may return
several waits in a list: each goes on with a step of its own. None goes on waiting if there is something left to wait
for, and else ends the process; any other value ends it with that result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, overload

from prunus.errors import SpecError
from prunus.processes.steps import stable_name
from prunus.processes.waits import AllOf, AnyOf, Child, Condition, Waitable, condition_of, part_of

if TYPE_CHECKING:
    from prunus.processes.process import Process

P = ParamSpec("P")
ProcessT = TypeVar("ProcessT", bound="Process")

StepRef = str | Callable[..., Any]
"""A step: a method of the process class, bound or not, or its name."""

__all__ = ["Child", "Command", "Continue", "Kill", "StepRef", "Stop", "Wait", "step_name"]


@dataclass(frozen=True, slots=True, init=False)
class Continue:
    """Run `step` next, with these arguments. The process is checkpointed in between."""

    step: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @overload
    def __init__(self, step: str, /, *args: Any, **kwargs: Any) -> None: ...
    @overload
    def __init__(self, step: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> None: ...
    @overload
    def __init__(self, step: Callable[Concatenate[ProcessT, P], Any], /, *args: P.args, **kwargs: P.kwargs) -> None: ...
    def __init__(self, step: StepRef, /, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "step", step_name(step))
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "kwargs", kwargs)


@dataclass(frozen=True, slots=True, init=False)
class Wait:
    """Wait for what `on` names, then run `then` with its value.

    ``Wait(child, then=self.collect)``, ``Wait([a, b], then=...)`` (all of them), ``Wait(message("ok"), then=...)``,
    ``Wait(sleep(60))``, ``Wait.any(approved=message("approve"), late=sleep(3600), then=self.decide)``: the step gets
    the value, or, where the conditions have names, one keyword argument for each. A time has no value. (What values
    there are stands in `prunus.processes.waits`.)

    Without `on` the process is *suspended*: it waits until somebody resumes it, and `then` gets the value that comes
    with it, if one does. (An empty list is over at once.) Without `then` the process finishes, or goes on with its
    outline, when the wait is over; the named values are in its context then. `msg` is a line for people.

    As in plumpy the step may come first: ``Wait(self.collect, "waits for its children", on=children)``.
    """

    callback: str | None
    msg: str | None
    data: Any
    on: Condition | None
    """None: suspended."""

    @overload
    def __init__(
        self, first: StepRef, msg: str | None = None, data: Any = None, on: Waitable | None = None
    ) -> None: ...
    @overload
    def __init__(
        self, first: Waitable, msg: str | None = None, data: Any = None, *, then: StepRef | None = None
    ) -> None: ...
    @overload
    def __init__(
        self,
        first: None = None,
        msg: str | None = None,
        data: Any = None,
        on: Waitable | None = None,
        *,
        then: StepRef | None = None,
    ) -> None: ...
    def __init__(
        self,
        first: Any = None,
        msg: str | None = None,
        data: Any = None,
        on: Any = None,
        *,
        then: StepRef | None = None,
    ) -> None:
        if isinstance(first, str) or (callable(first) and not isinstance(first, type)):
            if then is not None:
                raise TypeError(f"Wait({first!r}, then={then!r}): two steps can't both come next")
            then = first
        elif first is not None:
            if on is not None:
                raise TypeError("Wait(...) takes what it waits for as its first argument or as on=..., not as both")
            on = first
        object.__setattr__(self, "callback", None if then is None else step_name(then))
        object.__setattr__(self, "msg", msg)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "on", None if on is None else condition_of(on))

    @classmethod
    def all(cls, *on: Waitable, then: StepRef | None = None, msg: str | None = None, **named: Waitable) -> Wait:
        """Wait for everything that is named."""
        items, names = _several(on, named, "all")
        return cls(on=AllOf(items, names), msg=msg, then=then)

    @classmethod
    def any(cls, *on: Waitable, then: StepRef | None = None, msg: str | None = None, **named: Waitable) -> Wait:
        """Wait for the first of them. By name, those that did not happen are None."""
        items, names = _several(on, named, "any")
        if not items:
            raise TypeError("Wait.any() of nothing would never be over")
        return cls(on=AnyOf(items, names), msg=msg, then=then)


def _several(
    on: tuple[Any, ...], named: Mapping[str, Any], word: str
) -> tuple[tuple[Condition, ...], tuple[str, ...] | None]:
    if on and named:
        raise TypeError(f"Wait.{word}(...): give a name to each of them, or to none")
    if named:
        return tuple(part_of(item) for item in named.values()), tuple(named)
    if len(on) == 1 and isinstance(on[0], (list, tuple)):
        on = tuple(on[0])
    return tuple(part_of(item) for item in on), None


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
    name = step if isinstance(step, str) else stable_name(step)
    if name is None or not name.isidentifier():
        raise SpecError(f"a step must be a method of the process class, so that a checkpoint can name it; got {step!r}")
    return name
