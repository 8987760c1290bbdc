"""Steps and what may be said of them: ``@step(retry=..., timeout=...)``, and the methods that are asked from outside.

A step is any method; ``@step`` says more of it. A checkpoint names a step by its *stable name*: the name of the method,
or what ``name=`` says. Names that it had before are listed in ``renamed_from``, so that old checkpoints find it.

``@query`` marks a method that answers a question and changes nothing, ``@update`` one that changes the state of the
process between two steps and whose answer is given when the change is durable.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar, overload

from prunus.errors import SpecError
from prunus.processes.schemas import Arguments

F = TypeVar("F", bound=Callable[..., Any])

Errors = tuple[type[BaseException], ...]

_STEP, _QUERY, _UPDATE = "__prunus_step__", "__prunus_query__", "__prunus_update__"


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and when, a step that raised is tried again. Between two attempts the process is parked.

    The pause before attempt ``n + 1`` is ``initial_interval_s * backoff ** (n - 1)`` seconds, at most
    `max_interval_s`, spread by up to ``jitter`` of itself in either direction.
    """

    max_attempts: int = 3
    """The first one is counted."""
    initial_interval_s: float = 1.0
    backoff: float = 2.0
    max_interval_s: float = 100.0
    jitter: float = 0.1
    retry_on: type[BaseException] | Errors = (Exception,)
    """Other errors are not tried again ..."""
    give_up_on: type[BaseException] | Errors = ()
    """... and neither are these."""

    def __post_init__(self) -> None:
        if (
            self.max_attempts < 1
            or self.backoff < 1
            or min(self.initial_interval_s, self.max_interval_s) < 0
            or not 0 <= self.jitter <= 1
            or not (_are_errors(self.retry_on) and _are_errors(self.give_up_on))
        ):
            raise ValueError(
                f"{self}: max_attempts and backoff are at least 1, the intervals at least 0, jitter from 0 to 1, "
                "retry_on and give_up_on an exception class or a tuple of them"
            )

    def wants(self, error: BaseException, attempt: int) -> bool:
        """Whether there is another attempt after `attempt` (from 1) has raised `error`."""
        return (
            attempt < self.max_attempts and isinstance(error, self.retry_on) and not isinstance(error, self.give_up_on)
        )

    def delay_s(self, attempt: int, chance: float) -> float:
        """The pause after `attempt` (from 1); `chance`, from 0 to 1, decides the jitter."""
        try:
            grown = self.initial_interval_s * self.backoff ** (attempt - 1)
        except OverflowError:
            grown = self.max_interval_s
        return min(grown, self.max_interval_s) * (1 + self.jitter * (2 * chance - 1))


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What is known of a step."""

    name: str
    """Its stable name."""
    method: str
    """The attribute of the class."""
    retry: RetryPolicy | None = None
    timeout_s: float | None = None
    heartbeat_timeout_s: float | None = None
    thread: bool | None = None
    """Whether a plain ``def`` runs in a thread; None: as the class says."""
    effect: Literal["repeatable", "once"] = "repeatable"
    reconcile: str | None = None
    """The method that says whether the effect took place."""
    renamed_from: tuple[str, ...] = ()
    is_async: bool = False
    """Whether it is an ``async def``."""
    is_inline: bool = False
    """Whether it is called on the loop and nothing can come between: a plain ``def`` that does not run in a thread, or
    an ``async def`` without any ``await``."""

    @property
    def is_plain(self) -> bool:
        """Whether nothing needs to be watched while it runs."""
        return self.timeout_s is None and self.heartbeat_timeout_s is None


@dataclass(frozen=True, slots=True)
class Happened:
    """What a reconcile method returns: the effect took place, and the step returned (or would have) `value`."""

    value: Any = None


@dataclass(frozen=True, slots=True)
class DidNotHappen:
    """What a reconcile method returns: the effect did not take place, so the step may run (again)."""


@overload
def step(function: F, /) -> F: ...
@overload
def step(
    *,
    retry: RetryPolicy | None = None,
    timeout: float | None = None,
    heartbeat_timeout: float | None = None,
    thread: bool | None = None,
    name: str | None = None,
    renamed_from: str | Iterable[str] = (),
    effect: Literal["repeatable", "once"] = "repeatable",
    reconcile: str | Callable[..., Any] | None = None,
) -> Callable[[F], F]: ...
def step(
    function: Any = None,
    /,
    *,
    retry: RetryPolicy | None = None,
    timeout: float | None = None,
    heartbeat_timeout: float | None = None,
    thread: bool | None = None,
    name: str | None = None,
    renamed_from: str | Iterable[str] = (),
    effect: Literal["repeatable", "once"] = "repeatable",
    reconcile: str | Callable[..., Any] | None = None,
) -> Any:
    """Say more of a step.

    `retry`: a `RetryPolicy`. `timeout`, `heartbeat_timeout`: seconds after which it is cancelled and has failed with
    `StepTimeoutError`; the second counts from its last `Process.heartbeat`. `thread`: whether a plain ``def`` runs in
    a worker thread. `name`: its name in checkpoints, if not that of the method; `renamed_from`: names it had before.
    `effect="once"`: an effect outside that must not be repeated. The intent is durable before the step begins, and if
    its worker dies in it, `reconcile(self, idempotency_key)` is asked, which returns `Happened(value)`,
    `DidNotHappen()`, or None if it can't tell; then, and without a `reconcile`, the process is paused with the reason.
    Raises `SpecError` for options that make no sense.
    """

    def mark(function: F) -> F:
        old = (renamed_from,) if isinstance(renamed_from, str) else tuple(renamed_from)
        own = getattr(function, "__name__", None)
        if not callable(function) or not isinstance(own, str) or not own.isidentifier():
            raise SpecError(f"@step marks a method of a process class, not {function!r}")
        for option, seconds in (("timeout", timeout), ("heartbeat_timeout", heartbeat_timeout)):
            if seconds is not None and not seconds > 0:
                raise SpecError(f"the step {own}: {option} is a number of seconds above 0, not {seconds!r}")
        if retry is not None and not isinstance(retry, RetryPolicy):
            raise SpecError(f"the step {own}: retry is a RetryPolicy, not {retry!r}")
        if effect not in ("repeatable", "once"):
            raise SpecError(f"the step {own}: effect is 'repeatable' or 'once', not {effect!r}")
        if reconcile is not None and effect != "once":
            raise SpecError(f"the step {own}: reconcile is for effect='once'")
        for each in (name, *old):
            if each is not None and not each.isidentifier():
                raise SpecError(f"the step {own}: {each!r} can't be the name of a step")
        method = reconcile if reconcile is None or isinstance(reconcile, str) else reconcile.__name__
        options = StepOptions(name or own, own, retry, timeout, heartbeat_timeout, thread, effect, method, old)
        setattr(function, _STEP, options)
        return function

    return mark if function is None else mark(function)


def query(function: F) -> F:
    """Mark a method that answers questions from outside: from the living process, or from its checkpoint."""
    if inspect.iscoroutinefunction(function):
        raise SpecError(
            f"the query {function.__name__} is an async def; a query looks at the process and waits for nothing"
        )
    setattr(function, _QUERY, True)
    return function


def update(function: F) -> F:
    """Mark a method that changes the process when it is called from outside, between two of its steps."""
    if inspect.iscoroutinefunction(function):
        raise SpecError(
            f"the update {function.__name__} is an async def; an update changes the process and waits for nothing"
        )
    setattr(function, _UPDATE, True)
    return function


def with_options_of(original: Any, function: F) -> F:
    """`function` as a step of its own name, with what is said of `original`."""
    options: StepOptions | None = getattr(original, _STEP, None)
    if options is not None:
        setattr(function, _STEP, replace(options, name=function.__name__, method=function.__name__))
    return function


@dataclass(frozen=True, slots=True)
class StepTable:
    """The steps, queries and updates of a class."""

    marked: Mapping[str, StepOptions]
    """Steps with options, by stable name."""
    names: Mapping[str, str]
    """From old names to stable ones."""
    queries: Mapping[str, str]
    updates: Mapping[str, str]
    arguments: dict[str, Arguments] = field(default_factory=dict)
    """Of queries and updates, each since it was first asked for: its annotations may name what comes later."""

    def current_name(self, name: str) -> str:
        """The name by which the step goes now."""
        return self.names.get(name, name)


def read_steps(process_class: type) -> StepTable:
    """What is marked in a class and its bases. Raises `SpecError` if two steps claim one name."""
    marked: dict[str, StepOptions] = {}
    names: dict[str, str] = {}
    queries: dict[str, str] = {}
    updates: dict[str, str] = {}
    for attribute in dir(process_class):
        if attribute.startswith("__"):
            continue
        function = inspect.getattr_static(process_class, attribute)
        options: StepOptions | None = getattr(function, _STEP, None)
        if options is not None:
            options = options if options.method == attribute else replace(options, method=attribute)
            if options.name in marked:
                raise SpecError(
                    f"{process_class.__qualname__}: the steps {marked[options.name].method} and {attribute} have the "
                    f"same name {options.name!r}"
                )
            marked[options.name] = options
            reconcile = options.reconcile
            if reconcile is not None and not callable(getattr(process_class, reconcile, None)):
                raise SpecError(f"{process_class.__qualname__} has no method {reconcile!r} to reconcile {attribute}")
        if getattr(function, _QUERY, False):
            queries[attribute] = attribute
        if getattr(function, _UPDATE, False):
            updates[attribute] = attribute
    for options in marked.values():
        for old in options.renamed_from:
            if old in names or old in marked:
                raise SpecError(f"{process_class.__qualname__}: two steps claim the old name {old!r}")
            names[old] = options.name
        if options.name != options.method:
            names.setdefault(options.method, options.name)
    return StepTable(
        MappingProxyType(marked), MappingProxyType(names), MappingProxyType(queries), MappingProxyType(updates)
    )


def _are_errors(kinds: Any) -> bool:
    several = kinds if isinstance(kinds, tuple) else (kinds,)
    return all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in several)


def options_of(function: Any) -> StepOptions | None:
    """What ``@step`` said of a method; None if it is not marked."""
    options: StepOptions | None = getattr(function, _STEP, None)
    return options


def can_wait(function: Any) -> bool:
    """Whether an ``async def`` may wait for something: there is an ``await`` in it, ``async with`` or ``async for``."""
    code: types.CodeType | None = getattr(function, "__code__", None)
    return code is None or not code.co_flags & inspect.CO_COROUTINE or _YIELD_VALUE in code.co_code[::2]


_YIELD_VALUE = dis.opmap["YIELD_VALUE"]
"""Each of them is compiled to this instruction, and nothing else suspends a coroutine."""


def stable_name(function: Any) -> str | None:
    """The name under which a method stands in checkpoints; None for what has no name to be found by later."""
    options = options_of(function)
    name = options.name if options is not None else getattr(function, "__name__", None)
    return name if isinstance(name, str) and name.isidentifier() else None
