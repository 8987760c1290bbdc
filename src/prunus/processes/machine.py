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
- User code runs in a task of its own, plain ``def`` steps in a worker thread: a kill reaches it and nothing else.
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
import time
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

from prunus.errors import (
    Failure,
    InvalidInputError,
    InvalidStateError,
    InvalidStepError,
    PrunusError,
    SpecError,
)
from prunus.processes import commands, control, loading, stack, states, waits
from prunus.processes.attempts import Attempt, Outcome
from prunus.processes.commands import Command, Continue, Stop, Wait
from prunus.processes.control import CALM, KillLevel, Register, merge
from prunus.processes.fanout import MAX_LISTED_ITEMS, FanOut
from prunus.processes.listeners import Line, ProcessListener
from prunus.processes.result import ProcessResult
from prunus.processes.schemas import Arguments, fields_of
from prunus.processes.spec import ExitCode, ProcessSpec
from prunus.processes.states import (
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
from prunus.processes.steps import DidNotHappen, Happened, StepOptions, StepTable
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

T = TypeVar("T")
ParentClose = Literal["kill", "abandon", "wait"]
OnException = Literal["fail", "pause"]

StepCall = tuple[StepOptions, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]
"""A step, what is called for it, and with which arguments."""

_log = logging.getLogger(__name__)


class Transition(msgspec.Struct, frozen=True):
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


class Machine:
    """See the module."""

    # What `Process` gives it.
    run_sync_steps_in: ClassVar[Literal["thread", "loop"]]
    on_exception: ClassVar[OnException]
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

    # What most processes never change costs them nothing.
    driver: Driver | None = None
    parent_close: ParentClose = "kill"
    """What becomes of it when its parent ends; see `submit`."""
    progress: float | None = None
    """What the running step says of itself, from 0 to 1."""
    detail: str | None = None
    revision: int = 0
    """Rises with every change that belongs into a checkpoint."""
    _on_exception: OnException | None = None
    _register: Register = CALM
    _play: PlayState = PlayState.PLAYING
    _status: str | None = None
    _step_number = 0
    _attempt: Attempt | None = None
    _attempts = 0
    _may_begin = False
    """Of a step with ``effect="once"``: this very object has written down that it begins."""
    _done: Mapping[str, Any] = {}
    """What `do` has done in this step."""
    _mapped: Mapping[str, type[Process]] = {}
    """The classes of its fan-outs, as long as it lives: a script's classes can't be found by their names."""
    _awaits_at_end: tuple[str, ...] = ()
    """Children with ``parent_close="wait"``."""
    _deferred: tuple[tuple[control.Message, Any], ...] = ()
    """Messages that wait for the end of the step."""
    _listening: tuple[ProcessListener, ...] = ()
    _children: tuple[Process, ...] = ()
    _tells: tuple[tuple[control.Message, tuple[ParentClose, ...]], ...] = ()
    _used_mail: tuple[int, ...] = ()
    _replies: tuple[Reply, ...] = ()
    _lines: deque[Line] | None = None

    @classmethod
    def read_arguments(cls, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a query or an update by their names, checked and converted to its annotations.

        Raises `InvalidInputError` for arguments that do not fit and for a name that the class does not have.
        """
        cls.spec()
        methods = {**cls._table.queries, **cls._table.updates}
        if name not in methods:
            known = ", ".join(sorted(methods)) or "none"
            raise InvalidInputError(cls.__qualname__, {name: f"there is no such query or update; there are: {known}"})
        return Arguments(getattr(cls, methods[name])).read(args, kwargs)

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
    def can_step(self) -> bool:
        """Whether `step` may be called."""
        return (
            self._attempt is None
            and self._play is PlayState.PLAYING
            and (type(self._state) is Running or type(self._state) is Created)
        )

    @property
    def is_stepping(self) -> bool:
        """Whether a step runs at this moment."""
        return self._attempt is not None

    def has_terminated(self) -> bool:
        return self._state.kind in states.TERMINAL

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
        state = self._state
        if self._attempt is not None or self._play is not PlayState.PLAYING or type(state) not in (Running, Created):
            raise InvalidStateError(
                self._play.value if isinstance(state, (Created, Running)) else state.kind.value,
                "playing and ready for its next step",
            )
        if self._register.kill is not KillLevel.NONE:  # of a step that was cancelled, or lost, before it took effect
            return self._killed(None)
        if type(state) is Created:
            return self._enter(Event.START, Running(state.step, state.args, state.kwargs), None)
        assert type(state) is Running  # (mypy does not see it)
        self._attempts += 1
        attempt = self._attempt = self._new_attempt(self._attempts)
        try:
            outcome = self._begin_attempt(attempt, state) or await self._run_attempt(attempt, state)
        except asyncio.CancelledError:
            self._attempt = None
            self._show_play(self._register.reason)
            raise
        self._attempt = None
        if attempt.is_killed:
            changes = self._killed(attempt.step)
        elif isinstance(outcome, _NotYet):
            changes = outcome.changes
        else:
            changes = self._follow(attempt, outcome)
        return (*changes, *self._receive_deferred()) if self._deferred else changes

    def receive(self, message: control.Message, token: Any = None) -> tuple[Transition, ...]:
        """Take a message. One that does not fit changes nothing.

        A kill of a step that runs takes effect in `step`; an update, an edit, and a resume of something that is waited
        for beside the step wait for its end. With a `token` these are answered with a `Reply` (see `take_effects`), and
        so is whatever is refused.
        """
        if self.has_terminated():
            self._refuse(token, "not ended")
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
        self._used_mail += answer.used
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
        if not (self._children or self._lines or self._used_mail or self._tells or self._replies):
            return NO_EFFECTS
        effects = Effects(self._children, self._tells, self._used_mail, self._replies, self.take_lines())
        self._children, self._tells, self._used_mail, self._replies = (), (), (), ()
        return effects

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
        untold: deque[Line] = self.__dict__.setdefault("_lines", deque(maxlen=MAX_UNTOLD_LINES))
        untold.append(line)
        if self._listening:
            self._tell_listeners("on_report", line)

    # --- one attempt at one step ------------------------------------------------------------------------

    def _new_attempt(self, number: int) -> Attempt:
        return Attempt(self, number, self._outputs.copy())

    def _commit(self, attempt: Attempt) -> None:
        """Make what the step has written the state of the process."""
        self._outputs = attempt.outputs
        if attempt.children:
            if self._register.cascade:
                for child in attempt.children:
                    child.receive(control.Pause(self._register.reason, cascade=True))
            waited_for = tuple(child.pid for child in attempt.children if child.parent_close == "wait")
            if waited_for:
                self._awaits_at_end += waited_for
            self._children = (*self._children, *attempt.children)

    def _written(self, attempt: Attempt) -> dict[str, Any]:
        """What an attempt has written that goes into a checkpoint."""
        return {"outputs": attempt.outputs}

    def _begin_attempt(self, attempt: Attempt, state: Running) -> Outcome | None:
        """Begin the step that is next, if nothing is to be done before; its outcome, if it has ended already."""
        call = self._next_call(attempt, state)
        if call is None or call[0].effect == "once":
            return None
        options, function, args, kwargs = call
        attempt.step = options.name
        return attempt.begin(function, args, kwargs, options)

    async def _run_attempt(self, attempt: Attempt, state: Running) -> Outcome | _NotYet:
        """Run the step that is next, or go on with it, with all that belongs around it."""
        if attempt.task is not None:
            return await attempt.end()
        call = self._next_call(attempt, state)
        if call is None:
            if (not_yet := await self._find_place(attempt)) is not None:
                return not_yet
            call = self._next_call(attempt, state)
            assert call is not None
        options, function, args, kwargs = call
        attempt.step = options.name
        if options.effect == "once" and not self._may_begin:
            outcome = await self._begin_once(attempt, state, options)
            if outcome is not None:
                return outcome
        self._may_begin = False
        return await attempt.run(function, args, kwargs, options)

    def _next_call(self, attempt: Attempt, state: Running) -> StepCall | None:
        """The step that is next; None if user code decides which one that is (`_find_place`)."""
        options = self._find_step(state.step)
        return options, getattr(self, options.method), state.args, state.kwargs

    async def _find_place(self, attempt: Attempt) -> Outcome | _NotYet | None:
        """Run that code. None: the step may run now."""
        return None

    async def _begin_once(self, attempt: Attempt, state: Running, options: StepOptions) -> Outcome | _NotYet | None:
        """Before a step whose effect must not be repeated; None if it may begin."""
        if not state.effect:
            # The intent first, and durable: whoever finds it there later can't take the step for one that never ran.
            self._commit(attempt)
            self._state = replace(state, effect="begun")
            self._may_begin = True
            self.revision += 1
            return _NotYet((Transition("state", "running", "running", None, f"{options.name} is about to begin"),))
        why = "has no `reconcile` to find out"
        if options.reconcile is not None:
            look = StepOptions(options.reconcile, options.reconcile, thread=options.thread)
            value, error = await attempt.run(getattr(self, options.reconcile), (self.idempotency_key,), {}, look)
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
                case _:
                    told = f"raised {error!r}" if error is not None else f"returned {value!r}, no verdict"
                    why = f"`{options.reconcile}` {told}"
        self._state = replace(state, effect="unknown")
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
            options = replace(options, is_inline=not thread and not is_async, is_async=is_async)
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
        calls: set[Any] = attempt.__dict__.setdefault("calls", set())
        calls.add(future)
        if attempt.is_over:  # since we looked
            future.cancel()
        try:
            return future.result()
        finally:
            calls.discard(future)

    # --- messages ---------------------------------------------------------------------------------------

    def _obey(self, wish: control.Pause | control.Play | control.PauseAt | control.Kill) -> tuple[Transition, ...]:
        before, self._register = self._register, merge(self._register, wish)
        match wish:
            case control.Kill():
                self.revision += 1
                if self._attempt is None:
                    return self._killed(None)
                self._attempt.kill(self._register)
                return ()
            case control.Pause():
                reason = wish.reason
            case control.Play():
                reason = None
                if type(self._state) is Running and self._state.effect == "unknown":
                    self._state = replace(self._state, effect="")
            case control.PauseAt():
                if self.can_step and type(self._state) is Running:
                    self._look_for_breakpoint()
                reason = self._register.reason
        cascades = not isinstance(wish, control.PauseAt) and wish.cascade
        if cascades:
            self._tells = (*self._tells, (wish, ("kill", "abandon", "wait")))
        if replace(self._register, seq=0) != replace(before, seq=0):
            self.revision += 1
        elif not cascades:
            self._register = before  # it is what was wanted already
        return self._show_play(reason)

    def _killed(self, step: str | None) -> tuple[Transition, ...]:
        message = self._register.message
        why = f"its parent {self.pid} was killed"
        force = self._register.kill is KillLevel.FORCE
        self._tells = (*self._tells, (control.Kill(why, force=force, grace_s=self._register.grace_s), ("kill",)))
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
        except Exception as error:  # the user's update, or a message that does not fit: its sender is told
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
            self._replies = (*self._replies, Reply(token, value, failure))

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
        return (note, *self._follow(attempt, (value, None)), *self._show_play(None))

    def _settle_place(self, attempt: Attempt) -> None:
        """The step is taken for done."""

    # --- from one state to the next ---------------------------------------------------------------------

    def _follow(self, attempt: Attempt, outcome: Outcome) -> tuple[Transition, ...]:
        """Go where the step's outcome leads."""
        state = self._state
        assert type(state) is Running
        value, error = outcome
        if error is None:
            try:
                command = self._command(attempt, value, state)
                if type(command) is Running:
                    self._commit(attempt)
                    return self._enter(Event.CONTINUE, command, attempt.step)
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
                return self._killed(attempt.step)
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
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()
            raise InvalidStepError(type(self).__qualname__, step, f"returned {value!r}; was an `await` forgotten?")
        return Stop(value)

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
            for name in () if condition is None else wakes_of((condition,), 0.0).names:
                self._spec.check_message(name)
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
        return self._enter(Event.STOP, Finished(stop.result, status, message), attempt.step, message)

    def _failed(self, attempt: Attempt, state: Running, error: BaseException) -> tuple[Transition, ...]:
        """The step has raised."""
        failure = Failure.of(error)
        step, options = attempt.step or state.step, attempt.options
        policy = None if options is None else options.retry
        self._add_line(Line(time.time(), "ERROR", failure.traceback or str(failure), step))
        if policy is not None and policy.wants(error, state.attempt):
            delay_s = policy.delay_s(state.attempt, random.random())
            note = f"attempt {state.attempt} of {policy.max_attempts} failed ({failure}); again in {delay_s:.3g} s"
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
        if (self._on_exception or self.on_exception) == "pause":
            self._state = replace(state, attempt=1)
            note = f"the step {step} failed: {failure}"
            self._register = merge(self._register, control.Pause(note))
            self.revision += 1
            return (Transition("note", "failed", "", step, str(failure)), *self._show_play(note))
        attempt.children.clear()
        self._commit(attempt)
        note = str(failure) if state.attempt == 1 else f"attempt {state.attempt} failed as well: {failure}"
        return self._enter(Event.FAIL, Excepted(failure), step, note)

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
                self._used_mail = (*self._used_mail, mail.seq)
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
                self._children = (*self._children, *self._children_of(fan, numbers))
            except Exception as error:  # the user's method that gives the items
                return self._enter(Event.FAIL, Excepted(Failure.of(error)), None, str(error))
            pending[place] = replace(item, on=replace(item.on, fan=fan))
            self.revision += 1
        evolved = Waiting(tuple(pending))
        self._state = evolved
        return evolved

    def _read_source(self, items: Any, count: int | None) -> tuple[tuple[Any, ...], int]:
        if isinstance(items, range):
            return ("range", items.start, items.step), len(items)
        if isinstance(items, (list, tuple)):
            if len(items) > MAX_LISTED_ITEMS:
                raise ValueError(
                    f"map over a list of {len(items)} items: more than {MAX_LISTED_ITEMS} do not belong into a "
                    "checkpoint; give a method that returns one by its number, and count="
                )
            return ("items", list(items)), len(items)
        name = getattr(items, "__name__", None)
        if not callable(items) or not isinstance(name, str) or not callable(getattr(self, name, None)):
            raise TypeError(f"map over {items!r}: give a list, a range, or a method of {type(self).__qualname__}")
        if count is None:
            raise TypeError(f"map over the method {name}: say count=, how many items there are")
        return ("method", name), count

    def _children_in(self, attempt: Attempt, fan: FanOut, numbers: range) -> list[Process]:
        """The method that gives the items sees what the step has written."""
        self._attempt = attempt
        try:
            return self._children_of(fan, numbers)
        finally:
            self._attempt = None

    def _children_of(self, fan: FanOut, numbers: range) -> list[Process]:
        if not numbers:
            return []
        process_class = self._mapped.get(fan.class_id) or loading.load_class(fan.class_id)
        only_port = next(iter(process_class.spec().inputs.ports), None)
        children = []
        for number in numbers:
            match fan.source:
                case ("range", start, step):
                    inputs: Any = {only_port: start + number * step}
                case ("items", listed):
                    inputs = listed[number]
                case ("method", name):
                    inputs = getattr(self, name)(number)
                case _:
                    raise ValueError(f"no source of items: {fan.source!r}")
            children.append(process_class(inputs, pid=fan.pid(number), parent=self.pid))
        return children

    def _enter(
        self, event: Event, target: Any, step: str | None, note: str | None = None, *, again: bool = False
    ) -> tuple[Transition, ...]:
        """The one place where the state changes."""
        source = self._state
        self._state = enter(source, event, target)
        self.revision += 1
        if self._done and not (again or type(target) is Excepted or (type(target) is Waiting and target.is_retry)):
            self._done = {}  # the step has ended
        if type(target) is Running:
            if not again:
                self._step_number += 1
            if self._register.pause_at is not None:
                self._look_for_breakpoint()
        if self.progress is not None or self.detail is not None:
            self.progress = self.detail = None
        change = Transition("state", source.kind, target.kind, step, note)
        if self._listening:
            self._tell_listeners("on_transition", change)
        if target.kind in states.TERMINAL:
            self._end_well()
        if self._register is not CALM:
            return (change, *self._show_play(self._register.reason))
        return (change,)

    def _end_well(self) -> None:
        for _, token in self._deferred:
            self._refuse(token, "not ended")
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
        except Exception:  # a hook of the user's: the process goes on without it
            _log.exception("a hook of process %s failed; the process goes on", self.pid, extra={"pid": self.pid})

    def _tell_listeners(self, method: str, *facts: Any) -> None:
        for listener in self._listening:
            try:
                getattr(listener, method)(self, *facts)
            except Exception:  # a listener of the user's: the process goes on without it
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


_STOP = Stop()
_COMMANDS = (Continue, Wait, Stop, commands.Kill)
NO_EFFECTS = Effects()
