"""The machine in a process: what a step, a message, and what it waited for make of its state.

Whoever drives a process owes it no more than this::

    while not process.has_terminated():
        transitions = await process.step()       # while `can_step`
        process.settle(outcomes)                 # while it is waiting: what has happened of what it `waits_for`
        process.receive(message)                 # at any time, on the loop: also while a step runs
        process.take_effects()                   # after each of these: what belongs into the next checkpoint

Rules
- A step is a transaction. What a step writes (outputs, children, the context of a work chain) goes to a working copy,
  its `Attempt`, that becomes the state of the process when the step ends. A step that is cancelled from outside leaves
  the process as it was, and so does one that is tried again. A step that was abandoned (killed, and deaf) writes to
  nowhere.
- User code runs in a task of its own, plain ``def`` steps in a worker thread: a kill reaches it and nothing else. What
  can't wait can't be reached: an ``async def`` without any ``await`` and a plain ``def`` on the loop are just called.
- What is wanted of it (a pause, a kill) is a register (`prunus.processes.control`), looked at between two steps.
- `step` returns what has changed, and nothing changes in between: a snapshot taken after it is a checkpoint.
- Everything but the plain ``def`` steps happens on one event loop.

`Machine` is the lower half of `prunus.processes.process.Process`; nobody uses it alone.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    assert_never,
)

import msgspec
from msgspec.structs import replace as changed

from prunus.errors import (
    Failure,
    InvalidInputError,
    InvalidStateError,
    InvalidStepError,
    PrunusError,
    SpecError,
    StepBlockedError,
)
from prunus.processes import commands, control, stack, waits
from prunus.processes.attempts import OF_USERS, Attempt, Outcome, at_once
from prunus.processes.commands import Command, Continue, Stop, Wait
from prunus.processes.control import CALM, KillLevel, Register, merge
from prunus.processes.fanout import FanOut, children_of
from prunus.processes.listeners import Line, ProcessListener
from prunus.processes.options import OnException, ParentClose
from prunus.processes.result import ProcessResult
from prunus.processes.schemas import Arguments, fields_of
from prunus.processes.spec import ExitCode, ProcessSpec
from prunus.processes.states import (
    TERMINAL,
    Created,
    Event,
    Excepted,
    Finished,
    Killed,
    Pending,
    PlayEvent,
    PlayState,
    ProcessState,
    Running,
    State,
    Waiting,
    enter,
    turn,
)
from prunus.processes.steps import DidNotHappen, Happened, StepOptions, StepTable, can_wait
from prunus.processes.waits import (
    AllOf,
    Answer,
    Condition,
    OnChild,
    OnMap,
    OnTime,
    Outcomes,
    Wakes,
    names_of_values,
    wakes_of,
)

if TYPE_CHECKING:
    from prunus.processes.process import Process

MAX_UNTOLD_LINES = 10_000
"""Lines of the log that wait to be taken by the driver; when there are more the oldest are lost."""

OWN_STEPS = ("run", "_end", "_finish")
"""Of the methods of ours only these are steps."""
LAST_STEP = "on_kill"
"""The step that a class may have for the end of a process that is killed."""

T = TypeVar("T")
StepCall = tuple[StepOptions, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]
"""A step, what is called for it, and with which arguments."""

_log = logging.getLogger(__name__)


class Transition(msgspec.Struct, frozen=True, gc=False):
    """One change of one of the two state machines, or a note for the history."""

    kind: Literal["state", "play", "note"]
    source: str
    """Of a note: its subject, such as ``context_edited``."""
    target: str
    step: str | None = None
    """The step that led to it."""
    note: str | None = None
    """A reason, for people."""

    @property
    def event(self) -> str:
        """``running.finished``, ``playing.paused``, ``context_edited`` ..."""
        return self.source if self.kind == "note" else f"{self.source}.{self.target}"

    @property
    def subject(self) -> str:
        """``state_changed.running.finished``, ``play_changed.playing.paused``, ``context_edited`` ..."""
        return self.source if self.kind == "note" else f"{self.kind}_changed.{self.source}.{self.target}"


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a message that was received with a `token`."""

    token: Any
    value: Any = None
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Effects:
    """What a process wants to become true together with its next checkpoint."""

    children: tuple[Process, ...] = ()
    """To be run by the driver."""
    tells: tuple[tuple[control.Message, tuple[ParentClose, ...]], ...] = ()
    """Messages for its living children, and for which of them by their ``parent_close``."""
    used_mail: tuple[int, ...] = ()
    """Messages that are used up."""
    replies: tuple[Reply, ...] = ()
    lines: tuple[Line, ...] = ()


NO_EFFECTS = Effects()


class Driver(Protocol):
    """What a process needs of whoever drives it."""

    def changed(self) -> None:
        """A message has changed the process: look at it."""
        ...

    def said(self) -> None:
        """There are new lines for its log, or its progress has changed, while a step runs. Called on the loop."""
        ...

    def deliver(self, name: str, value: Any) -> None:
        """Put a message into the box of the process."""
        ...

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise `UnsavableValueError` if these have no form in a checkpoint."""
        ...

    async def keep(self) -> None:
        """Write a snapshot, now: what `do` has done is not to be done again."""
        ...

    async def results(self, pids: Sequence[str]) -> list[ProcessResult]:
        """The results of processes that have ended."""
        ...

    def load_class(self, identifier: str) -> type[Process]:
        """The process class of this name, from a module that may be imported here (`ProcessClassNotFoundError`)."""
        ...


class Machine:
    """See the module."""

    # What `Process` gives it.
    run_sync_steps_in: ClassVar[Literal["thread", "loop"]]
    on_exception: ClassVar[OnException]
    on_kill: Any
    listeners: ClassVar[tuple[ProcessListener, ...]]
    pid: str
    _spec: ClassVar[ProcessSpec]
    _table: ClassVar[StepTable]
    _options: ClassVar[dict[str, StepOptions]]
    """Those that were looked up already."""
    _reserved: ClassVar[frozenset[str]]
    """Names that a subclass must not define."""
    _outputs: dict[str, Any]
    _state: State
    if TYPE_CHECKING:

        @classmethod
        def spec(cls) -> ProcessSpec: ...

        def _make_child(
            self, process_class: type[Process], inputs: Any, pid: str | None, options: Mapping[str, Any]
        ) -> Process: ...

    # What each step looks at stands in the object; see `_begin_idle`.
    driver: Driver | None
    revision: int
    """Rises with every change that belongs into a checkpoint."""
    _register: Register
    _play: PlayState
    _step_number: int
    _attempt: Attempt | None
    _attempts: int
    """So many were begun by this object."""
    _done: Mapping[str, Any]
    """What `do` has done in this step."""
    _deferred: tuple[tuple[control.Message, Any], ...]
    """Messages that wait for the end of the step."""
    _listening: tuple[ProcessListener, ...]
    _memo: Any
    """What a subclass of `Process` keeps, and a step writes to a copy of."""
    _effects: Effects
    _lines: deque[Line] | None
    _weakly: weakref.ref[Machine]
    """Itself, for the process stack."""

    # What most processes never change costs them nothing.
    parent_close: ParentClose = "kill"
    """What becomes of it when its parent ends; see `submit`."""
    _on_exception: OnException | None = None
    _status: str | None = None
    _may_begin = False
    """Of a step with ``effect="once"``: this very object has written down that it begins."""
    _mapped: Mapping[str, type[Process]] = {}
    """The classes of its fan-outs, as long as it lives: a script's classes can't be found by their names."""
    _awaits_at_end: tuple[str, ...] = ()
    """Children with ``parent_close="wait"``."""

    def _begin_idle(self) -> None:
        """Nobody drives it, nobody wants anything of it, and no step runs."""
        self.driver = self._attempt = self._memo = self._lines = None
        self.revision = self._step_number = self._attempts = 0
        self._register, self._play = CALM, _PLAYING
        self._deferred, self._listening = (), self.listeners
        self._done, self._effects = _NOTHING, NO_EFFECTS
        self._weakly = weakref.ref(self)

    @classmethod
    def read_arguments(cls, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a query or an update by their names, checked and converted to its annotations.

        Raises `InvalidInputError` for arguments that do not fit and for a name that the class does not have.
        """
        cls.spec()
        table = cls._table
        if name not in table.queries and name not in table.updates:
            known = ", ".join(sorted({*table.queries, *table.updates})) or "none"
            raise InvalidInputError(cls.__qualname__, {name: f"there is no such query or update; there are: {known}"})
        arguments = table.arguments.get(name)
        if arguments is None:
            arguments = table.arguments[name] = Arguments(getattr(cls, table.queries.get(name) or table.updates[name]))
        return arguments.read(args, kwargs)

    # --- what can be asked --------------------------------------------------------------------------

    @property
    def state(self) -> ProcessState:
        return self._state.kind

    @property
    def play_state(self) -> PlayState:
        return self._play

    @property
    def paused(self) -> bool:
        return self._play is PlayState.PAUSED

    @property
    def register(self) -> Register:
        """What is wanted of it."""
        return self._register

    @property
    def status(self) -> str | None:
        """A line for people: why it is paused, or what it says of itself, or else what it waits for."""
        if self._register.pause and self._register.reason is not None and not self.has_terminated():
            return self._register.reason
        if self._status is None and isinstance(self._state, Waiting):
            return self._state.message
        return self._status

    @property
    def next_step(self) -> str | None:
        """The name of the step that is next or runs; None if there is none."""
        match self._state:
            case Created(step) | Running(step):
                return step
            case Waiting((first, *_)):
                return first.step
            case _:
                return None

    @property
    def idempotency_key(self) -> str:
        """The same for each attempt at this step, and another one for each other step (G5)."""
        return f"{self.pid}:{self._step_number}"

    @property
    def waits_for(self) -> tuple[Condition, ...]:
        """What may make a waiting process go on by itself."""
        if not isinstance(self._state, Waiting):
            return ()
        return tuple(item.on for item in self._state.pending if item.on is not None)

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """The pids that it waits for."""
        return self.wakes(0.0).pids

    def wakes(self, now_s: float) -> Wakes:
        """What must be registered so that it is woken, as of the wall-clock time `now_s`."""
        return wakes_of(self.waits_for, now_s)

    @property
    def suspended(self) -> bool:
        """Whether it waits for somebody to resume it."""
        return isinstance(self._state, Waiting) and self._state.suspended

    @property
    def progress(self) -> float | None:
        """What the running step says of itself, from 0 to 1."""
        return None if self._attempt is None else self._attempt.progress

    @property
    def detail(self) -> str | None:
        """What the running step says of its progress in words."""
        return None if self._attempt is None else self._attempt.detail

    @property
    def can_step(self) -> bool:
        """Whether `step` may be called."""
        return self._attempt is None and self._play is _PLAYING and type(self._state) in _STEPPED

    def has_terminated(self) -> bool:
        return self._state.kind in TERMINAL

    # --- listeners, and hooks that a subclass may override; what they raise is logged -------------------

    def add_listener(self, listener: ProcessListener) -> None:
        """Tell `listener` what happens here from now on."""
        self._listening = (*self._listening, listener)

    def remove_listener(self, listener: ProcessListener) -> None:
        """Tell it no more. Nothing happens if it was not told before."""
        self._listening = tuple(other for other in self._listening if other is not listener)

    def on_paused(self) -> None:
        """It is PAUSED now."""

    def on_playing(self) -> None:
        """It is PLAYING again."""

    def on_terminated(self) -> None:
        """It is FINISHED, EXCEPTED or KILLED now."""

    # --- for drivers --------------------------------------------------------------------------------

    async def step(self) -> tuple[Transition, ...]:
        """Take one step: run user code, and go to the next state. Returns what has changed.

        Raises `InvalidStateError` if it is paused, waiting, terminal or in a step. If the caller is cancelled, the
        step is cancelled, `CancelledError` goes on, and the process is as it was before the step.
        """
        changes = self.begin_step()
        return await self.end_step() if changes is None else changes

    def begin_step(self) -> tuple[Transition, ...] | None:
        """`step` without the wait: None if the step has not ended yet, and `end_step` is to be awaited."""
        state, register = self._state, self._register
        if self._attempt is not None or self._play is not _PLAYING or type(state) not in _STEPPED:
            raise InvalidStateError(
                self._play.value if isinstance(state, (Created, Running)) else state.kind.value,
                "playing and ready for its next step",
            )
        if register is not CALM and register.kill is not KillLevel.NONE and not self._is_leaving:
            return self._take_leave(None)  # of a step that was cancelled, or lost, before it took effect
        if type(state) is not Running:
            assert type(state) is Created
            return self._enter(_START, Running(state.step, state.args, state.kwargs), None)
        self._attempts += 1
        attempt = self._attempt = self._new_attempt(self._attempts)
        call = self._next_call(attempt, state)
        if call is None or call[0].effect != "repeatable":
            return None
        attempt.step, attempt.begun_in = call[0].name, state
        outcome = attempt.begin(*call)
        return None if outcome is None else self._take_outcome(attempt, state, outcome)

    async def end_step(self) -> tuple[Transition, ...]:
        """The rest of a step that `begin_step` has begun."""
        attempt = self._attempt
        assert attempt is not None
        state = attempt.begun_in or self._state
        assert type(state) is Running
        try:
            if attempt.begun_in is not None:
                outcome: Outcome | _NotYet = await attempt.end()
            else:
                outcome = await self._run_attempt(attempt, state, self._next_call(attempt, state))
        except asyncio.CancelledError:
            self._attempt = None
            self._show_play(self._register.reason)
            raise
        return self._take_outcome(attempt, state, outcome)

    def _take_outcome(self, attempt: Attempt, state: Running, outcome: Outcome | _NotYet) -> tuple[Transition, ...]:
        self._attempt = None
        if attempt.is_killed:
            changes = self._take_leave(attempt.step)
        elif isinstance(outcome, _NotYet):
            changes = outcome.changes
        else:
            changes = self._follow(attempt, state, outcome)
        return (*changes, *self._receive_deferred()) if self._deferred else changes

    def receive(self, message: control.Message, token: Any = None) -> tuple[Transition, ...]:
        """Take a message. One that does not fit changes nothing.

        A kill of a step that runs takes effect in `step`; an update, an edit, and a resume of something that is waited
        for beside the step wait for its end. With a `token` these are answered with a `Reply` (see `take_effects`), and
        so is whatever is refused.
        """
        if self.has_terminated():
            self._refuse(token, "alive")
            return ()
        before = self.revision
        match message:
            case control.Pause() | control.Play() | control.PauseAt() | control.Kill():
                changes = self._obey(message)
            case control.Resume() | control.Update() | control.EditContext() | control.Settle():
                if self._attempt is not None and not (isinstance(message, control.Resume) and not self._is_pending()):
                    self._deferred = (*self._deferred, (message, token))
                    return ()
                changes = self._answer(message, token)
            case _:
                assert_never(message)
        if self.revision != before and self.driver is not None:
            self.driver.changed()
        return changes

    @property
    def has_deferred(self) -> bool:
        """Whether there are messages that wait for the end of the step that runs."""
        return bool(self._deferred)

    def settle(self, outcomes: Outcomes) -> tuple[Transition, ...]:
        """Hand it what has happened of what it waits for; it goes on if that is enough for one of its waits."""
        state = self._state
        if type(state) is not Waiting:
            return ()
        outcomes = self._read_mail(state, outcomes)
        evolved = self._fan_out(state, outcomes)
        if isinstance(evolved, tuple):
            return evolved
        state = evolved
        ready = [
            (answer.rank, place, answer)
            for place, item in enumerate(state.pending[:1] if state.is_retry else state.pending)
            if item.on is not None and (answer := waits.value_of(item.on, outcomes)) is not None
        ]
        if not ready:
            return ()
        _, place, answer = min(ready, key=lambda item: item[:2])
        self._want("used_mail", *answer.used)
        changes = self._go_on(state, place, answer)
        if self.driver is not None:
            self.driver.changed()
        return changes

    def fail(self, failure: Failure) -> tuple[Transition, ...]:
        """End it as EXCEPTED, for a reason outside of its steps; not while a step runs."""
        if self._attempt is not None:
            raise InvalidStateError(self.state.value, "between two steps")
        changes = self._enter(Event.FAIL, Excepted(failure), None, str(failure))
        if self.driver is not None:
            self.driver.changed()
        return changes

    def take_effects(self) -> Effects:
        """What belongs into the next checkpoint beside the snapshot; once."""
        effects = self._effects
        if effects is NO_EFFECTS and not self._lines:
            return NO_EFFECTS
        self._effects = NO_EFFECTS
        return replace(effects, lines=self.take_lines())

    def _want(self, what: str, *more: Any) -> None:
        """Something more that is to become true with the next checkpoint."""
        if more:
            self._effects = replace(self._effects, **{what: (*getattr(self._effects, what), *more)})

    def take_lines(self) -> tuple[Line, ...]:
        """The lines for its log that nobody has taken yet; once."""
        untold, lines = self._lines, []
        while untold:
            lines.append(untold.popleft())
        return tuple(lines)

    def write_line(self, level: str, text: str, source: str | None = None) -> None:
        """A line for its log. From any thread."""
        self._add_line(Line(time.time(), level, text, stack.current_step(), source))
        if self.driver is not None and self._attempt is not None:
            self._attempt.ask_loop(self.driver.said)

    def _add_line(self, line: Line) -> None:
        if (untold := self._lines) is None:
            with _first_line:
                untold = self._lines = self._lines or deque(maxlen=MAX_UNTOLD_LINES)
        untold.append(line)
        if self._listening:
            self._tell_listeners("on_report", line)

    # --- one attempt at one step ------------------------------------------------------------------------

    def _new_attempt(self, number: int) -> Attempt:
        return Attempt(self, number, self._outputs.copy(), None if self._memo is None else self._memo.copy())

    def _commit(self, attempt: Attempt) -> None:
        """Make what the step has written the state of the process."""
        self._outputs = attempt.outputs
        self._memo = attempt.memo
        if attempt.children:
            if self._register.cascade:
                for child in attempt.children:
                    child.receive(control.Pause(self._register.reason, cascade=True))
            waited_for = tuple(child.pid for child in attempt.children if child.parent_close == "wait")
            if waited_for:
                self._awaits_at_end += waited_for
            self._want("children", *attempt.children)

    def _written(self, attempt: Attempt) -> dict[str, Any]:
        """What an attempt has written that goes into a checkpoint."""
        return {"outputs": attempt.outputs}

    async def _run_attempt(self, attempt: Attempt, state: Running, call: StepCall | None) -> Outcome | _NotYet:
        """Run the step that is next, with all that belongs around it."""
        if call is None:
            if (not_yet := await self._find_place(attempt)) is not None:
                return not_yet
            call = self._next_call(attempt, state)
            assert call is not None
        options = call[0]
        attempt.step = options.name
        if options.effect == "once" and not self._may_begin:
            outcome = await self._begin_once(attempt, state, options)
            if outcome is not None:
                return outcome
        self._may_begin = False
        return await attempt.run(*call)

    def _next_call(self, attempt: Attempt, state: Running) -> StepCall | None:
        """The step that is next; None if user code decides which one that is (`_find_place`)."""
        options = self._find_step(state.step)
        if options.timeout_s is None and self._is_leaving:
            options = replace(options, timeout_s=self._register.grace_s)
        step = getattr(self, options.method)
        if options.is_inline and options.is_async:
            return options, at_once, (step, *state.args), state.kwargs
        return options, step, state.args, state.kwargs

    async def _find_place(self, attempt: Attempt) -> Outcome | _NotYet | None:
        """Run that code. None: the step may run now."""
        return None

    async def _begin_once(self, attempt: Attempt, state: Running, options: StepOptions) -> Outcome | _NotYet | None:
        """Before a step whose effect must not be repeated; None if it may begin."""
        if not state.effect:
            # The intent first, and durable: whoever finds it there later can't take the step for one that never ran.
            self._commit(attempt)
            self._state = changed(state, effect="begun")
            self._may_begin = True
            self.revision += 1
            return _NotYet((Transition("state", "running", "running", None, f"{options.name} is about to begin"),))
        why = "has no `reconcile` to find out"
        if options.reconcile is not None:
            look = StepOptions(options.reconcile, options.reconcile, thread=options.thread)
            value, error = await attempt.run(look, getattr(self, options.reconcile), (self.idempotency_key,), {})
            if attempt.is_killed:
                return value, error
            match value:
                case Happened(found) if error is None:
                    self._settle_place(attempt)
                    return found, None
                case DidNotHappen() if error is None:
                    return None
                case None if error is None:
                    why = f"`{options.reconcile}` can't tell"
                case _ if isinstance(error, StepBlockedError):  # it will be asked again
                    self._attempt = None
                    return _NotYet(self._blocked(options.name, error))
                case _:
                    told = f"raised {error!r}" if error is not None else f"returned {value!r}, no verdict"
                    why = f"`{options.reconcile}` {told}"
        self._state = changed(state, effect="unknown")
        reason = (
            f"the step {options.name} began and nobody saw it end; whether it took effect is unknown ({why}): "
            "look, and then play to run it again, or settle it with what it returned"
        )
        self._register = merge(self._register, control.Pause(reason))
        self.revision += 1
        self._attempt = None
        return _NotYet(self._show_play(reason))

    def _mine(self) -> Attempt | None:
        """The working copy that the calling code writes to; None between steps."""
        if self._is_stale():
            _log.debug("what a step that was abandoned still writes has no effect", extra={"pid": self.pid})
            return self._new_attempt(0)
        return self._attempt

    def _is_stale(self) -> bool:
        number = stack.attempt_of(self)
        return number is not None and (self._attempt is None or self._attempt.number != number)

    def _find_step(self, name: str) -> StepOptions:
        """What is known of a step; `SpecError` if the class has none of this name."""
        options = self._options.get(name)
        if options is None:
            current = self._table.current_name(name)
            options = self._table.marked.get(current) or StepOptions(current, current)
            function = getattr(type(self), options.method, None)
            if options.method in self._reserved and options.method not in OWN_STEPS:
                raise SpecError(
                    f"{options.method} is a method of Process, and can't be a step of {type(self).__qualname__}"
                )
            if not callable(function):
                raise SpecError(
                    f"{type(self).__qualname__} has no step {name!r}; was it renamed? Say "
                    f"@step(renamed_from={name!r}) at the step that it is now"
                )
            is_async = inspect.iscoroutinefunction(function)
            thread = self.run_sync_steps_in == "thread" if options.thread is None else options.thread
            is_inline = not can_wait(function) if is_async else not thread
            options = replace(options, is_inline=is_inline, is_async=is_async)
            self._options[name] = options
        return options

    def _from_thread(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Have something done on the loop of this process by a step that runs in a thread, and wait for it."""
        attempt = self._attempt
        if attempt is None or attempt.loop is None or self._is_stale():
            coroutine.close()
            raise InvalidStateError(self.state.value, "in a step")
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is attempt.loop:
            coroutine.close()
            raise RuntimeError("this would block the event loop that is to do it: in an `async def` write `await`")
        future = asyncio.run_coroutine_threadsafe(coroutine, attempt.loop)
        attempt.calls.append(future)
        if attempt.is_over:  # since we looked
            future.cancel()
        try:
            return future.result()
        finally:
            attempt.calls.remove(future)

    # --- messages ---------------------------------------------------------------------------------------

    def _obey(self, wish: control.Pause | control.Play | control.PauseAt | control.Kill) -> tuple[Transition, ...]:
        before, self._register = self._register, merge(self._register, wish)
        match wish:
            case control.Kill():
                self.revision += 1
                if self._is_leaving and not wish.force:
                    return ()
                if self._attempt is None:
                    return self._take_leave(None)
                self._attempt.kill(self._register)
                return ()
            case control.Pause():
                reason = wish.reason
            case control.Play():
                reason = None
                if type(self._state) is Running and self._state.effect == "unknown":
                    self._state = changed(self._state, effect="")
            case control.PauseAt():
                if self.can_step and type(self._state) is Running:
                    self._look_for_breakpoint()
                reason = self._register.reason
        cascades = not isinstance(wish, control.PauseAt) and wish.cascade
        if cascades:
            self._want("tells", (wish, ("kill", "abandon", "wait")))
        if replace(self._register, seq=0) != replace(before, seq=0):
            self.revision += 1
        elif not cascades:
            self._register = before  # it is what was wanted already
        return self._show_play(reason)

    @property
    def _is_leaving(self) -> bool:
        """Whether it is killed, and at its last step."""
        if self._register.kill is KillLevel.NONE:
            return False
        match self._state:
            case Running(step):
                return step == LAST_STEP
            case Waiting((first, *_)):
                return first.step == LAST_STEP
            case _:
                return False

    def _take_leave(self, step: str | None) -> tuple[Transition, ...]:
        """It is to be killed: at once, or after the last step that its class has for that."""
        is_new = isinstance(self._state, Created)
        if self.on_kill is None or is_new or self._is_leaving or self._register.kill is KillLevel.FORCE:
            return self._killed(step)
        event = Event.RESUME if isinstance(self._state, Waiting) else Event.CONTINUE
        note = "it is killed" + (f": {self._register.message}" if self._register.message else "")
        return self._enter(event, Running(LAST_STEP, (self._register.message,)), step, note)

    def _killed(self, step: str | None) -> tuple[Transition, ...]:
        message = self._register.message
        why = f"its parent {self.pid} was killed"
        force = self._register.kill is KillLevel.FORCE
        self._want("tells", (control.Kill(why, force=force, grace_s=self._register.grace_s), ("kill",)))
        return self._enter(Event.KILL, Killed(message), step, message)

    def _is_pending(self) -> bool:
        """Whether something waits for a resume beside the step that runs."""
        return type(self._state) is Running and any(item.on is None for item in self._state.pending)

    def _answer(
        self, message: control.Resume | control.Update | control.EditContext | control.Settle, token: Any
    ) -> tuple[Transition, ...]:
        """Between two steps."""
        try:
            match message:
                case control.Resume(value, has_value):
                    changes = self._resume(value, has_value)
                    value = None
                case control.Update(name, args, kwargs):
                    value = self._in_transaction(lambda: self._update(name, args, kwargs), name)
                    changes = (Transition("note", "updated", "", None, name),)
                case control.EditContext(values):
                    value = self._in_transaction(lambda: self._edit_context(values), "edit_context")
                    changes = (Transition("note", "context_edited", "", None, ", ".join(values)),)
                case control.Settle(value):
                    changes, value = self._settle_effect(value), None
                case _:
                    assert_never(message)
        except OF_USERS as error:  # the user's update, or a message that does not fit: its sender is told
            self.revision += token is not None
            self._reply(token, failure=Failure.of(error))
            return ()
        self.revision += 1
        self._reply(token, value)
        return changes

    def _receive_deferred(self) -> tuple[Transition, ...]:
        deferred, self._deferred = self._deferred, ()
        changes: tuple[Transition, ...] = ()
        for message, token in deferred:
            changes += self.receive(message, token)
        return changes

    def _reply(self, token: Any, value: Any = None, failure: Failure | None = None) -> None:
        if token is not None:
            self._want("replies", Reply(token, value, failure))

    def _refuse(self, token: Any, needed: str) -> None:
        self._reply(token, failure=Failure.of(InvalidStateError(self.state.value, needed)))

    def _resume(self, value: Any, has_value: bool) -> tuple[Transition, ...]:
        state = self._state
        if type(state) is Waiting and not state.is_retry:
            for place, item in enumerate(state.pending):
                if item.on is None:
                    return self._go_on(state, place, Answer(value) if has_value else None)
        raise InvalidStateError(self.state.value, "suspended, waiting for somebody to resume it")

    def _in_transaction(self, change: Callable[[], T], name: str) -> T:
        """Do something as a step would: all of it, or nothing."""
        self._attempts += 1
        attempt = self._attempt = self._new_attempt(self._attempts)
        token = stack.push(self, attempt.number, name)
        try:
            value = change()
            if self.driver is not None:
                self.driver.check({**self._written(attempt), "answer": value})
            self._commit(attempt)
        finally:
            stack.pop(token)
            self._attempt = None
        return value

    def _update(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        arguments = self.read_arguments(name, args, kwargs)
        if name not in self._table.updates:
            raise InvalidInputError(type(self).__qualname__, {name: "it is a query, and changes nothing"})
        return getattr(self, self._table.updates[name])(**arguments)

    def _edit_context(self, values: Mapping[str, Any]) -> None:
        raise InvalidStateError(
            self.state.value, f"of a WorkChain, which has a context; {type(self).__qualname__} is none"
        )

    def _settle_effect(self, value: Any) -> tuple[Transition, ...]:
        state = self._state
        if type(state) is not Running or state.effect != "unknown":
            raise InvalidStateError(self.state.value, "paused because nobody knows whether a step took effect")
        attempt = self._new_attempt(0)
        attempt.step = self.next_step
        if (call := self._next_call(attempt, state)) is not None:
            attempt.options = call[0]
        self._settle_place(attempt)
        note = Transition("note", "settled", "", attempt.step, "somebody says what the step has returned")
        self._register = merge(self._register, control.Play())
        return (note, *self._follow(attempt, state, (value, None)), *self._show_play(None))

    def _settle_place(self, attempt: Attempt) -> None:
        """The step is taken for done."""

    # --- from one state to the next ---------------------------------------------------------------------

    def _follow(self, attempt: Attempt, state: Running, outcome: Outcome) -> tuple[Transition, ...]:
        """Go where the step's outcome leads."""
        value, error = outcome
        if self._is_leaving and error is None:
            attempt.children.clear()
            self._commit(attempt)
            return self._killed(attempt.step)
        if error is None:
            try:
                command = self._command(attempt, value, state)
                if type(command) is Running:
                    self._commit(attempt)
                    return self._enter(_CONTINUE, command, attempt.step)
                if type(command) is tuple:
                    return self._wait(attempt, state, command)
                if isinstance(command, Stop):
                    return self._stop(attempt, state, command)
                if isinstance(command, Continue):
                    self._find_step(command.step)
            except Exception as raised:  # the step's value may be anything; its fault is the step's fault
                error = raised
        if error is not None:
            return self._failed(attempt, state, error)
        self._commit(attempt)
        match command:
            case Continue(step, args, kwargs):
                return self._enter(Event.CONTINUE, Running(step, args, kwargs, pending=state.pending), attempt.step)
            case commands.Kill(message):
                self._register = merge(self._register, control.Kill(message))
                return self._take_leave(attempt.step)
            case _:
                raise AssertionError(command)

    def _command(self, attempt: Attempt, value: Any, state: Running) -> Command | tuple[Wait, ...] | Running:
        """What the value of a step means: waits if it is to wait, the next state if that is known already.

        May raise what the step is to blame for.
        """
        if value is None:
            return () if state.pending else _STOP
        if isinstance(value, (Continue, Stop, commands.Kill)):
            return value
        if isinstance(value, Wait):
            return (value,)
        if isinstance(value, ExitCode):
            return Stop(exit_status=value.status, exit_message=value.message)
        if type(value) is list and value and all(isinstance(item, Wait) for item in value):
            return tuple(value)
        if self._spec.output_class is not None and isinstance(value, self._spec.output_class):
            for name, item in fields_of(value).items():
                attempt.outputs[name] = self._spec.read_output(name, item)
            return _STOP
        step = attempt.step or state.step
        if type(value) in (list, tuple) and any(isinstance(item, _COMMANDS) for item in value):
            raise InvalidStepError(
                type(self).__qualname__, step, f"returned {value!r}; only waits can stand beside one another, in a list"
            )
        self._refuse_awaitable(step, value)
        return Stop(value)

    def _refuse_awaitable(self, step: str, value: Any) -> None:
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()
            raise InvalidStepError(type(self).__qualname__, step, f"returned {value!r}; was an `await` forgotten?")

    def _wait(self, attempt: Attempt, state: Running, several: tuple[Wait, ...]) -> tuple[Transition, ...]:
        pending = []
        for wait in several:
            if wait.callback is not None:
                self._find_step(wait.callback)
            condition = wait.on
            if isinstance(condition, AllOf) and not condition.items and len(several) == 1 and not state.pending:
                self._commit(attempt)
                empty = Answer([] if condition.names is None else {})
                running = self._after(Pending(condition, wait.callback), empty, ())
                return self._enter(Event.CONTINUE, running, attempt.step)
            for each in () if condition is None else waits.messages_of(condition):
                self._spec.check_message(each.name, each.schema)
            if condition is not None and (repeated := waits.repeated_message(condition)) is not None:
                raise InvalidStepError(
                    self._spec.name,
                    attempt.step or state.step,
                    f"waits for the message {repeated!r} more than once in one wait, and one message would be used for "
                    "all of them; wait for the next one when the first is there",
                )
            if isinstance(condition, OnMap):
                fan, numbers = condition.fan.more()
                attempt.children += self._children_in(attempt, fan, numbers)
                condition = replace(condition, fan=fan)
            pending.append(Pending(condition, wait.callback, message=wait.msg, data=wait.data))
        self._commit(attempt)
        waiting = Waiting((*state.pending, *pending))
        return self._enter(Event.WAIT, waiting, attempt.step, waiting.message)

    def _stop(self, attempt: Attempt, state: Running, stop: Stop) -> tuple[Transition, ...]:
        status, message = stop.exit_status, stop.exit_message
        if status == 0:
            attempt.outputs, wrong = self._spec.check_outputs(attempt.outputs)
            if wrong is not None:
                status, message = wrong.status, wrong.message
        if status and message is None and status in self._spec.exit_codes:
            message = self._spec.exit_codes[status].message
        self._commit(attempt)
        if self._awaits_at_end:
            on = AllOf(tuple(OnChild(pid) for pid in self._awaits_at_end))
            args = (stop.result, status, message)
            self._awaits_at_end = ()
            return self._enter(
                Event.WAIT,
                Waiting((Pending(on, "_finish", args, message="waits for its children before it ends"),)),
                attempt.step,
            )
        return self._enter(_FINISH, Finished(stop.result, status, message), attempt.step, message)

    def _failed(self, attempt: Attempt, state: Running, error: BaseException) -> tuple[Transition, ...]:
        """The step has raised."""
        step, options = attempt.step or state.step, attempt.options
        if isinstance(error, StepBlockedError) and not self._is_leaving:
            if state.effect == "begun" and (options is None or options.reconcile is None):
                self._state = changed(state, effect="unknown")  # nobody can be asked: whoever plays it decides
            return self._blocked(step, error)
        failure = Failure.of(error)
        policy = None if options is None else options.retry
        self._add_line(Line(time.time(), "ERROR", failure.traceback or str(failure), step))
        if policy is not None and policy.wants(error, state.attempt):
            delay_s = policy.delay_s(state.attempt, random.random())
            pause = f"{delay_s:.3g}" if delay_s < 100 else f"{delay_s:.0f}"
            note = f"attempt {state.attempt} of {policy.max_attempts} failed ({failure}); again in {pause} s"
            again = Pending(
                waits.sleep(delay_s),
                state.step,
                state.args,
                state.kwargs,
                note,
                attempt=state.attempt + 1,
                effect=state.effect,
            )
            return self._enter(Event.WAIT, Waiting((again, *state.pending)), step, note)
        if self._is_leaving:
            return (Transition("note", "failed", "", step, str(failure)), *self._killed(step))
        if (self._on_exception or self.on_exception) == "pause":
            self._state = changed(state, attempt=1)
            note = f"the step {step} failed: {failure}"
            self._register = merge(self._register, control.Pause(note))
            self.revision += 1
            return (Transition("note", "failed", "", step, str(failure)), *self._show_play(note))
        attempt.children.clear()
        self._commit(attempt)
        note = str(failure) if state.attempt == 1 else f"attempt {state.attempt} failed as well: {failure}"
        return self._enter(Event.FAIL, Excepted(failure), step, note)

    def _blocked(self, step: str, error: StepBlockedError) -> tuple[Transition, ...]:
        """The step can't go on for now: pause before it. It is no failure, so its attempts are not counted."""
        note = f"the step {step} is blocked: {error}"
        self._add_line(Line(time.time(), "WARNING", note, step))
        self._register = merge(self._register, control.Pause(note))
        self.revision += 1
        return (Transition("note", "blocked", "", step, str(error)), *self._show_play(note))

    def _go_on(self, state: Waiting, place: int, answer: Answer | None) -> tuple[Transition, ...]:
        """One of its waits is over. `answer` is None if it has no value."""
        item = state.pending[place]
        left = (*state.pending[:place], *state.pending[place + 1 :])
        if item.attempt > 1:
            assert item.step is not None
            running = Running(item.step, item.args, item.kwargs, item.attempt, item.effect, left)
            return self._enter(Event.RESUME, running, None, again=True)
        return self._enter(Event.RESUME, self._after(item, answer, left), None)

    def _after(self, item: Pending, answer: Answer | None, left: tuple[Pending, ...]) -> Running:
        """The step that comes when a wait is over."""
        step, args, kwargs = item.step or "_end", item.args, item.kwargs
        if step == "_finish" or answer is None or type(item.on) is OnTime:
            pass
        elif item.on is not None and names_of_values(item.on) is not None:
            kwargs = {**kwargs, **answer.value}
        else:
            args = (*args, answer.value)
        return Running(step, args, kwargs, pending=left)

    async def _end(self, *_: Any, **__: Any) -> None:
        """The step after a wait without one."""

    async def _finish(self, result: Any, status: int, message: str | None) -> Stop:
        """The step after the wait for children that are not to be left alone."""
        return Stop(result, exit_status=status, exit_message=message)

    def _read_mail(self, state: Waiting, outcomes: Outcomes) -> Outcomes:
        """The messages, as the class declares them. One that does not fit is dropped, and the log says so."""
        if not outcomes.mail:
            return outcomes
        good = []
        for mail in outcomes.mail:
            try:
                if isinstance(mail.value, PrunusError):  # why there is no value
                    raise mail.value
                good.append(mail._replace(value=self._spec.read_message(mail.name, mail.value)))
            except PrunusError as error:
                self._want("used_mail", mail.seq)
                self.revision += 1
                self._add_line(Line(time.time(), "WARNING", f"a message was dropped: {error}"))
        return replace(outcomes, mail=good)

    def _fan_out(self, state: Waiting, outcomes: Outcomes) -> Waiting | tuple[Transition, ...]:
        """Where children of a fan-out have ended, the next ones begin."""
        pending = list(state.pending)
        for place, item in enumerate(pending):
            if not isinstance(item.on, OnMap):
                continue
            fan = item.on.fan
            ended = [pid for pid in fan.pids if pid in outcomes.results]
            if not ended:
                continue
            if fan.on_error == "fail":
                bad = next((outcomes.results[pid] for pid in ended if not outcomes.results[pid].successful), None)
                if bad is not None:
                    error = InvalidStepError(self._spec.name, item.step or "map", f"maps over items, and {bad}")
                    return self._enter(Event.FAIL, Excepted(Failure.of(error)), None, str(error))
            fan, numbers = fan.without(ended).more()
            try:
                self._want("children", *children_of(self, fan, numbers))
            except OF_USERS as error:  # the user's method that gives the items
                return self._enter(Event.FAIL, Excepted(Failure.of(error)), None, str(error))
            pending[place] = changed(item, on=replace(item.on, fan=fan))
            self.revision += 1
        evolved = Waiting(tuple(pending))
        self._state = evolved
        return evolved

    def _children_in(self, attempt: Attempt, fan: FanOut, numbers: range) -> list[Process]:
        """The method that gives the items sees what the step has written."""
        self._attempt = attempt
        try:
            return children_of(self, fan, numbers)
        finally:
            self._attempt = None

    def _enter(
        self, event: Event, target: Any, step: str | None, note: str | None = None, *, again: bool = False
    ) -> tuple[Transition, ...]:
        """The one place where the state changes."""
        source, register = self._state.kind, self._register
        kind = enter(source, event, target.kind)
        self._state = target
        self.revision += 1
        if self._done and not (again or type(target) is Excepted or (type(target) is Waiting and target.is_retry)):
            self._done = _NOTHING  # the step has ended
        if type(target) is Running:
            if not again:
                self._step_number += 1
            if register.pause_at is not None:
                self._look_for_breakpoint()
        change = Transition("state", source, kind, step, note)
        if self._listening:
            self._tell_listeners("on_transition", change)
        if kind in TERMINAL:
            self._end_well()
        if register is not CALM:
            return (change, *self._show_play(self._register.reason))
        return (change,)

    def _end_well(self) -> None:
        for _, token in self._deferred:
            self._refuse(token, "alive")
        self._deferred = ()
        self._hook(self.on_terminated)

    def _look_for_breakpoint(self) -> None:
        if self._register.pause_at is not None and self._register.pause_at == self.next_step:
            reason = f"breakpoint before the step {self.next_step}"
            self._register = merge(merge(self._register, control.PauseAt(None)), control.Pause(reason))

    def _wanted_play(self) -> PlayState:
        if not self._register.pause or self._register.kill is not KillLevel.NONE or self.has_terminated():
            return PlayState.PLAYING
        return PlayState.PAUSED if self._attempt is None else PlayState.PAUSING

    def _show_play(self, note: str | None = None) -> tuple[Transition, ...]:
        """The one place where the play state changes: it follows from the register, and whether a step runs."""
        changes: tuple[Transition, ...] = ()
        while (wanted := self._wanted_play()) is not self._play:
            source = self._play
            if self.has_terminated():
                event = PlayEvent.END
            elif wanted is PlayState.PLAYING:
                event = PlayEvent.PLAY
            else:
                event = PlayEvent.PAUSE if source is PlayState.PLAYING else PlayEvent.SETTLE
            self._play = turn(source, event, wanted)
            change = Transition("play", source, wanted, None, None if wanted is PlayState.PLAYING else note)
            changes = (*changes, change)
            if self._listening:
                self._tell_listeners("on_transition", change)
            if wanted is PlayState.PAUSED:
                self._hook(self.on_paused)
                self._tell_listeners("on_paused")
            elif event is PlayEvent.PLAY and source is PlayState.PAUSED:
                self._hook(self.on_playing)
                self._tell_listeners("on_played")
        return changes

    def _hook(self, hook: Callable[[], None]) -> None:
        try:
            hook()
        except OF_USERS:  # a hook of the user's: the process goes on without it
            _log.exception("a hook of process %s failed; the process goes on", self.pid, extra={"pid": self.pid})

    def _tell_listeners(self, method: str, *facts: Any) -> None:
        for listener in self._listening:
            try:
                getattr(listener, method)(self, *facts)
            except OF_USERS:  # a listener of the user's: the process goes on without it
                _log.exception(
                    "the listener %r of process %s failed; the process goes on",
                    listener,
                    self.pid,
                    extra={"pid": self.pid},
                )


@dataclass(frozen=True, slots=True)
class _NotYet:
    """There is something to be made durable before the step runs."""

    changes: tuple[Transition, ...]


# What each step needs. (To look up the member of an enum costs as much as a call.)
_PLAYING, _START, _CONTINUE, _FINISH = PlayState.PLAYING, Event.START, Event.CONTINUE, Event.STOP
_STEPPED = frozenset({Created, Running})
_first_line = threading.Lock()
_NOTHING: Mapping[str, Any] = {}
_STOP = Stop()
_COMMANDS = (Continue, Wait, Stop, commands.Kill)
