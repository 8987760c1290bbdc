"""A process: user code in steps, with a state between them that can be written down.

Whoever drives a process owes it no more than this::

    while not process.has_terminated():
        transitions = await process.step()       # when it is playing and not waiting
        children = process.take_children()       # ... to be run by the driver
        process.resolve(results)                 # when those that it is `waiting_for` have ended
        process.receive(message)                 # at any time, on the loop: also while a step runs

Rules
- A step is a transaction. What a step writes (outputs, children, the context of a work chain) goes to a working copy,
  its `_Attempt`, that becomes the state of the process when the step ends. A step that is cancelled from outside leaves
  the process as it was. A step that was abandoned (killed, and deaf) writes to nowhere.
- User code runs in a task of its own, plain ``def`` steps in a worker thread: a kill reaches it and nothing else.
- `step` returns what has changed, and nothing changes in between: a snapshot taken after it is a checkpoint.
- Everything but the plain ``def`` steps happens on one event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, Self, assert_never

import msgspec

from prunus.errors import Failure, InvalidInputError, InvalidStateError, SpecError
from prunus.processes import commands, control, loading, stack, states
from prunus.processes.commands import Child, Command, Continue, Stop, Wait
from prunus.processes.pids import new_pid
from prunus.processes.result import ProcessResult
from prunus.processes.spec import ProcessSpec, build, fields_of
from prunus.processes.states import (
    Created,
    Event,
    Excepted,
    Finished,
    Killed,
    PlayEvent,
    PlayState,
    ProcessState,
    Running,
    State,
    Waiting,
    enter,
    turn,
)

CANCEL_GRACE_S = 10.0
"""How long a step that is cancelled from outside may clean up before it is abandoned."""

_log = logging.getLogger(__name__)


class Transition(msgspec.Struct, frozen=True):
    """One change of one of the two state machines."""

    kind: Literal["state", "play"]
    source: str
    target: str
    step: str | None = None
    """The step that led to it."""
    note: str | None = None
    """A reason, for people."""

    @property
    def subject(self) -> str:
        """``state_changed.running.finished``, ``play_changed.playing.paused`` ..."""
        return f"{self.kind}_changed.{self.source}.{self.target}"


class Process:
    """The base of all processes. A subclass defines its ports and a first step, ``run``.

    ``run`` and the other steps are methods, ``async def`` or plain ``def`` (those run in a worker thread). What a step
    returns says what comes next: a command (`Continue`, `Wait`, `Stop`, `Kill`), an instance of the class's `Outputs`
    (they are emitted, and the process finishes), or any other value: the process finishes with it.
    """

    version: ClassVar[int] = 1
    """The version of the class, written into each checkpoint."""
    run_sync_steps_in: ClassVar[Literal["thread", "loop"]] = "thread"
    """Where plain ``def`` steps run. On the loop they are cheap, and block everybody else while they last."""
    spec_class: ClassVar[type[ProcessSpec]] = ProcessSpec
    run: ClassVar[Any] = None
    """The first step."""

    # --- the class ----------------------------------------------------------------------------------

    @classmethod
    def define(cls, spec: Any) -> None:
        """Fill the spec; an override begins with ``super().define(spec)``."""

    @classmethod
    def spec(cls) -> ProcessSpec:
        """The spec of this class; `SpecError` if it is defined wrongly."""
        try:
            return cls.__dict__["_spec"]  # type: ignore[no-any-return]
        except KeyError:
            if cls.run is None:
                raise SpecError(f"{cls.__qualname__} has no step to begin with; define `async def run(self)`") from None
            cls._refuse_reserved_names()
            cls._spec = build(cls)
            return cls._spec

    @classmethod
    def _refuse_reserved_names(cls) -> None:
        for base in cls.__mro__:
            taken = [] if "_reserved" in vars(base) else sorted(cls._reserved & vars(base).keys())
            if taken:
                raise SpecError(
                    f"{base.__qualname__} defines {', '.join(taken)}, which Process needs for itself; a step or helper "
                    "must have another name"
                )

    @staticmethod
    def current() -> Process | None:
        """The process whose step this code runs in: also in its tasks and threads. None outside of any."""
        return stack.top()

    _spec: ClassVar[ProcessSpec]
    _reserved: ClassVar[frozenset[str]]
    """Names that a subclass must not define."""
    _inputs: Any

    # --- a new one, and one from a checkpoint -------------------------------------------------------

    def __init__(
        self,
        inputs: Any = None,
        *,
        pid: str | None = None,
        parent: str | None = None,
        tags: Iterable[str] = (),
    ) -> None:
        """A new process, CREATED. `inputs` is a mapping or an instance of the class's `Inputs`.

        Raises `InvalidInputError` that names every wrong input, and `SpecError` if the class is defined wrongly.
        """
        values = self.spec().read_inputs(inputs)
        self._set_up(pid or new_pid(), parent, tuple(tags), values, time.time())
        if self._spec.input_class is not None:
            try:
                self._inputs = self._spec.show_inputs(values)
            except Exception as error:  # user code: the __post_init__ of Inputs is a validator
                raise InvalidInputError(self._spec.name, {"inputs": str(error) or repr(error)}) from error

    def _set_up(
        self, pid: str, parent: str | None, tags: tuple[str, ...], values: dict[str, Any], created_at: float
    ) -> None:
        self.pid = pid
        self.parent = parent
        self.tags = tags
        self.created_at = created_at
        """Wall clock, seconds since 1970; for showing only."""
        self.on_change: Callable[[], None] | None = None
        """Called after `receive` or `resolve` has changed something: a driver wakes up by it."""
        self._values = values
        self._inputs = None
        self._outputs: dict[str, Any] = {}
        self._state: State = Created("run")
        self._play = PlayState.PLAYING
        self._pause_note: str | None = None
        self._status: str | None = None
        self._step_number = 0
        self._children: tuple[Process, ...] = ()
        self._attempt: _Attempt | None = None
        self._attempts = 0

    def snapshot(self) -> dict[str, Any]:
        """The process as plain dictionaries and lists, with the user's own values in them.

        A snapshot that is taken while a step runs is the one from before that step.
        """
        return {
            "class_id": self.class_id,
            "version": self.version,
            "pid": self.pid,
            "parent": self.parent,
            "tags": list(self.tags),
            "created_at": self.created_at,
            "inputs": self._values,
            "outputs": self._outputs,
            "state": states.to_data(self._state),
            "play": "playing" if self._play is PlayState.PLAYING else "paused",
            "status": self._status,
            "step_number": self._step_number,
        }

    @classmethod
    def restore(cls, snapshot: Mapping[str, Any]) -> Self:
        """The process that `snapshot` describes; it goes on where that one was.

        Raises `SpecError` if the class does not fit any more: a step or an input that it had is gone.
        """
        process = cls.__new__(cls)
        try:
            process._load(snapshot)
        except (KeyError, ValueError, TypeError) as error:
            raise SpecError(f"this is no checkpoint of a {cls.__qualname__}: {error!r}") from error
        return process

    def _load(self, snapshot: Mapping[str, Any]) -> None:
        spec = self.spec()
        self._set_up(
            snapshot["pid"],
            snapshot["parent"],
            tuple(snapshot["tags"]),
            dict(snapshot["inputs"]),
            snapshot["created_at"],
        )
        self._outputs = dict(snapshot["outputs"])
        self._state = states.from_data(snapshot["state"])
        self._play = PlayState(snapshot["play"])
        self._status = snapshot["status"]
        self._step_number = snapshot["step_number"]
        if isinstance(self._state, (Created, Running, Waiting)) and self._state.step is not None:
            self._method(self._state.step)
        if spec.input_class is not None:
            try:
                self._inputs = spec.show_inputs(self._values)
            except Exception as error:  # user code: the class's Inputs, as it is now
                raise SpecError(f"{spec.name}.Inputs does not take the inputs of this checkpoint: {error}") from error

    # --- what can be asked --------------------------------------------------------------------------

    @property
    def class_id(self) -> str:
        """``module:QualName``."""
        return loading.class_id(type(self))

    @property
    def inputs(self) -> Any:
        """The inputs, by attribute: an instance of the class's `Inputs` if it has one; never changed."""
        if self._inputs is None:
            self._inputs = self._spec.show_inputs(self._values)
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, Any]:
        """The outputs so far; inside a step with those that it has emitted."""
        attempt = self._mine()
        return self._spec.outputs.freeze_values(
            self._outputs if attempt is None else attempt.outputs, f"the outputs of {self._spec.name}"
        )

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
    def status(self) -> str | None:
        """A line for people: what the process says of itself, or else what it waits for."""
        if self._status is None and isinstance(self._state, Waiting):
            return self._state.message
        return self._status

    @property
    def next_step(self) -> str | None:
        """The name of the step that is next or runs; None if there is none."""
        return self._state.step if isinstance(self._state, (Created, Running, Waiting)) else None

    @property
    def idempotency_key(self) -> str:
        """The same for each attempt at this step, and another one for each other step (G5)."""
        return f"{self.pid}:{self._step_number}"

    @property
    def waiting_for(self) -> tuple[str, ...]:
        """The pids that it waits for."""
        return self._state.children if isinstance(self._state, Waiting) else ()

    @property
    def suspended(self) -> bool:
        """Whether it waits for a `Resume`."""
        return isinstance(self._state, Waiting) and self._state.suspended

    @property
    def can_step(self) -> bool:
        """Whether `step` may be called."""
        return (
            self._attempt is None
            and self._play is PlayState.PLAYING
            and self._state.kind in (ProcessState.RUNNING, ProcessState.CREATED)
        )

    def has_terminated(self) -> bool:
        return self._state.kind in states.TERMINAL

    def result(self) -> ProcessResult:
        """How it ended; `InvalidStateError` if it has not."""
        state = self._state
        match state:
            case Finished(value, status, message):
                return ProcessResult(self.pid, state.kind, self._outputs, status, message, value=value)
            case Excepted(failure):
                return ProcessResult(self.pid, state.kind, self._outputs, failure=failure)
            case Killed(message):
                return ProcessResult(self.pid, state.kind, self._outputs, exit_message=message)
            case Created() | Running() | Waiting():
                raise InvalidStateError(state.kind.value, "terminated")
            case _:
                assert_never(state)

    async def execute(self) -> ProcessResult:
        """Run it here to its end, its children too; see `prunus.execute`."""
        from prunus.processes.execute import execute

        return await execute(self)

    def __repr__(self) -> str:
        return f"<{type(self).__qualname__} {self.pid} {self.state.value} {self._play.value}>"

    # --- for steps ----------------------------------------------------------------------------------

    def out(self, name: str, value: Any) -> None:
        """Emit an output; a dotted name is one in a namespace. Raises `InvalidInputError` if it does not fit."""
        value = self._spec.read_output(name, value)
        attempt = self._mine()
        outputs = self._outputs if attempt is None else attempt.outputs
        *on_the_way, last = name.split(".")
        for segment in on_the_way:
            inner = outputs[segment] = dict(outputs.get(segment, {}))
            outputs = inner
        outputs[last] = value

    def set_status(self, text: str | None) -> None:
        """Say in a line what goes on, for people."""
        if not self._is_stale():
            self._status = text

    def submit(
        self, process_class: type[Process], inputs: Any = None, *, pid: str | None = None, tags: Iterable[str] = ()
    ) -> Child:
        """Make a child process. It starts when this step has ended, and goes on by itself.

        Its inputs are checked here and now (`InvalidInputError`). The handle can be waited for.
        """
        child = process_class(inputs, pid=pid, parent=self.pid, tags=tags)
        attempt = self._mine()
        if attempt is None:
            raise InvalidStateError(self.state.value, "in a step, to submit a child")
        attempt.children.append(child)
        return Child(child.pid, child.class_id)

    def exposed_inputs(self, process_class: type[Process], namespace: str | None = None) -> dict[str, Any]:
        """Those of the inputs that `expose_inputs` took over from `process_class`: ready for `submit`."""
        values: Any = self._values
        for segment in namespace.split(".") if namespace else ():
            values = values.get(segment, {})
        return {name: values[name] for name in process_class.spec().inputs.ports if name in values}

    # --- hooks: a subclass may override them; what they raise is logged ---------------------------------

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
        if not self.can_step:
            raise InvalidStateError(
                self._play.value if isinstance(state, (Created, Running)) else state.kind.value,
                "playing and ready for its next step",
            )
        if isinstance(state, Created):
            return self._enter(Event.START, Running(state.step, state.args, state.kwargs), None)
        assert isinstance(state, Running)
        name = self.next_step
        self._attempts += 1
        attempt = self._attempt = self._new_attempt(self._attempts)
        try:
            outcome = await self._run_attempt(attempt, state)
        except asyncio.CancelledError:
            self._attempt = None
            if self._play is PlayState.PAUSING:
                self._turn(PlayEvent.SETTLE, PlayState.PAUSED, self._pause_note)
            raise
        self._attempt = None
        if attempt.kill is not None:
            return self._enter(Event.KILL, Killed(attempt.kill.message), name, attempt.kill.message)
        return self._follow(attempt, outcome, name)

    def receive(self, message: control.Message) -> tuple[Transition, ...]:
        """Take a message. One that does not fit (resume of a process that does not wait) changes nothing.

        A kill of a step that runs takes effect in `step`.
        """
        changes: tuple[Transition, ...] = ()
        match message:
            case control.Pause():
                if self._play is PlayState.PLAYING and not self.has_terminated():
                    self._pause_note = message.reason
                    target = PlayState.PAUSED if self._attempt is None else PlayState.PAUSING
                    changes = self._turn(PlayEvent.PAUSE, target, message.reason)
            case control.Play():
                if self._play is not PlayState.PLAYING:
                    changes = self._turn(PlayEvent.PLAY, PlayState.PLAYING)
            case control.Kill():
                if self._attempt is not None:
                    self._kill_attempt(self._attempt, message)
                    return ()
                if not self.has_terminated():
                    changes = self._enter(Event.KILL, Killed(message.message), None, message.message)
            case control.Resume():
                if self.suspended:
                    changes = self._go_on((message.value,) if message.has_value else ())
            case _:
                assert_never(message)
        if changes:
            self._changed()
        else:
            _log.debug("a message does not fit the state of the process and is ignored", extra={"pid": self.pid})
        return changes

    def resolve(self, results: Mapping[str, ProcessResult]) -> tuple[Transition, ...]:
        """End its wait for children, if there is a result for each of them."""
        if not self.waiting_for or any(pid not in results for pid in self.waiting_for):
            return ()
        self._collect(results)
        changes = self._go_on(([results[pid] for pid in self.waiting_for],))
        self._changed()
        return changes

    def fail(self, failure: Failure) -> tuple[Transition, ...]:
        """End it as EXCEPTED, for a reason outside of its steps; not while a step runs."""
        if self._attempt is not None:
            raise InvalidStateError(self.state.value, "between two steps")
        changes = self._enter(Event.FAIL, Excepted(failure), None, str(failure))
        self._changed()
        return changes

    def take_children(self) -> tuple[Process, ...]:
        """The children that were submitted in the last step; once."""
        children, self._children = self._children, ()
        return children

    # --- one attempt at one step ------------------------------------------------------------------------

    def _new_attempt(self, number: int) -> _Attempt:
        return _Attempt(number, dict(self._outputs))

    def _commit(self, attempt: _Attempt) -> None:
        """Make what the step has written the state of the process."""
        self._outputs = attempt.outputs
        self._children = tuple(attempt.children)

    async def _run_attempt(self, attempt: _Attempt, state: Running) -> _Outcome:
        loop = asyncio.get_running_loop()
        attempt.done = loop.create_future()
        attempt.task = loop.create_task(self._user_code(attempt, state))
        try:
            return await attempt.done
        except asyncio.CancelledError:
            # Our caller is cancelled. The next attempt must not meet this one, so the step is given time to end.
            if attempt.kill is None:
                attempt.task.cancel()
            await asyncio.wait((attempt.task,), timeout=CANCEL_GRACE_S)
            raise
        finally:
            if attempt.timer is not None:
                attempt.timer.cancel()
            if attempt.started and not attempt.ended:
                _abandon(attempt.task, self.pid)

    async def _user_code(self, attempt: _Attempt, state: Running) -> None:
        """The body of the task of a step: the one place where steps are called."""
        attempt.started = True
        token = stack.push(self, attempt.number)
        value, error = None, None
        try:
            value = await self._call(self._method(state.step), *state.args, **state.kwargs)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as raised:  # the user's step: also SystemExit is no more than the end of this process
            error = raised
        finally:
            stack.pop(token)
        attempt.ended = True
        if attempt.done is not None and not attempt.done.done():
            attempt.done.set_result((value, error))

    async def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a step of the user's, in a thread if it is a plain function."""
        code = getattr(function, "__code__", None)
        if code is not None and code.co_flags & inspect.CO_COROUTINE:
            return await function(*args, **kwargs)
        if self.run_sync_steps_in == "loop":
            value = function(*args, **kwargs)
            return await value if inspect.isawaitable(value) else value
        context = contextvars.copy_context()

        def in_thread() -> tuple[Any, BaseException | None]:
            # Returned rather than raised: a future can't carry StopIteration, and SystemExit would end the thread.
            try:
                return context.run(function, *args, **kwargs), None
            except BaseException as error:  # the user's step
                return None, error

        try:
            value, error = await asyncio.get_running_loop().run_in_executor(None, in_thread)
        except asyncio.CancelledError:
            _log.warning(
                "a plain step can't be interrupted: it goes on in its thread, and what it returns is dropped",
                extra={"pid": self.pid, "step": getattr(function, "__name__", None)},
            )
            raise
        if error is not None:
            raise error
        return await value if inspect.isawaitable(value) else value

    def _kill_attempt(self, attempt: _Attempt, message: control.Kill) -> None:
        assert attempt.task is not None
        assert attempt.done is not None
        first, attempt.kill = attempt.kill is None, attempt.kill or message
        if first:
            attempt.task.cancel()
        grace_s = 0.0 if message.force or not attempt.started else message.grace_s
        if attempt.timer is not None:
            attempt.timer.cancel()
        if grace_s <= 0:
            _give_up(attempt.done)
        else:
            attempt.timer = asyncio.get_running_loop().call_later(grace_s, _give_up, attempt.done)

    def _mine(self) -> _Attempt | None:
        """The working copy that the calling code writes to; None between steps."""
        if self._is_stale():
            _log.debug("what a step that was abandoned still writes has no effect", extra={"pid": self.pid})
            return self._new_attempt(0)
        return self._attempt

    def _is_stale(self) -> bool:
        number = stack.attempt_of(self)
        return number is not None and (self._attempt is None or self._attempt.number != number)

    def _method(self, name: str) -> Callable[..., Any]:
        method = getattr(self, name, None)
        if not callable(method):
            raise SpecError(
                f"{type(self).__qualname__} has no step {name!r}; was it renamed? Keep the old name as well until no "
                "process needs it"
            )
        return method  # type: ignore[no-any-return]

    # --- from one state to the next ---------------------------------------------------------------------

    def _follow(self, attempt: _Attempt, outcome: _Outcome, name: str | None) -> tuple[Transition, ...]:
        """Go where the step's outcome leads."""
        value, error = outcome
        if error is None:
            try:
                command = self._command(attempt, value)
                if isinstance(command, Wait) and command.on == ():
                    command = Continue(command.callback or "_end", [])
                if isinstance(command, Continue):
                    self._method(command.step)
                elif isinstance(command, Wait) and command.callback is not None:
                    self._method(command.callback)
                elif isinstance(command, Stop) and command.exit_status == 0:
                    attempt.outputs = self._spec.read_outputs(attempt.outputs)
            except Exception as raised:  # the step's value may be anything; its fault is the step's fault
                error = raised
        if error is not None:
            attempt.children.clear()
            self._commit(attempt)
            failure = Failure.of(error)
            return self._enter(Event.FAIL, Excepted(failure), name, str(failure))
        self._commit(attempt)
        match command:
            case Continue():
                return self._enter(Event.CONTINUE, Running(command.step, command.args, command.kwargs), name)
            case Wait():
                waiting = Waiting(command.callback, command.msg, command.data, command.on or ())
                return self._enter(Event.WAIT, waiting, name, command.msg)
            case Stop():
                finished = Finished(command.result, command.exit_status, command.exit_message)
                return self._enter(Event.STOP, finished, name, command.exit_message)
            case commands.Kill():
                return self._enter(Event.KILL, Killed(command.message), name, command.message)
            case _:
                assert_never(command)

    def _command(self, attempt: _Attempt, value: Any) -> Command:
        """What the value of a step means; may raise what the step is then to blame for."""
        if isinstance(value, (Continue, Wait, Stop, commands.Kill)):
            return value
        if self._spec.output_class is not None and isinstance(value, self._spec.output_class):
            for name, item in fields_of(value).items():
                attempt.outputs[name] = self._spec.read_output(name, item)
            return Stop()
        return Stop(value)

    def _go_on(self, args: tuple[Any, ...]) -> tuple[Transition, ...]:
        assert isinstance(self._state, Waiting)
        return self._enter(Event.RESUME, Running(self._state.step or "_end", args), None)

    def _collect(self, results: Mapping[str, ProcessResult]) -> None:
        """The results of those that it waited for are here."""

    async def _end(self, *_: Any) -> None:
        """The step after a wait without a callback."""

    def _enter(self, event: Event, target: Any, step: str | None, note: str | None = None) -> tuple[Transition, ...]:
        """The one place where the state changes."""
        source = self._state
        self._state = enter(source, event, target)
        if isinstance(target, Running):
            self._step_number += 1
        change = Transition("state", source.kind.value, target.kind.value, step, note)
        if target.kind in states.TERMINAL:
            self._hook(self.on_terminated)
            if self._play is not PlayState.PLAYING:
                return (change, *self._turn(PlayEvent.END, PlayState.PLAYING))
        elif self._play is PlayState.PAUSING:
            return (change, *self._turn(PlayEvent.SETTLE, PlayState.PAUSED, self._pause_note))
        return (change,)

    def _turn(self, event: PlayEvent, target: PlayState, note: str | None = None) -> tuple[Transition, ...]:
        """The one place where the play state changes."""
        source = self._play
        self._play = turn(source, event, target)
        if target is PlayState.PAUSED:
            self._hook(self.on_paused)
        elif target is PlayState.PLAYING and source is PlayState.PAUSED and event is PlayEvent.PLAY:
            self._hook(self.on_playing)
        return (Transition("play", source.value, target.value, None, note),)

    def _hook(self, hook: Callable[[], None]) -> None:
        try:
            hook()
        except Exception:  # a listener of the user's: the process goes on without it
            _log.exception("a hook of the process failed; the process goes on", extra={"pid": self.pid})

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()


OVERRIDABLE = frozenset(
    {"define", "on_paused", "on_playing", "on_terminated", "restore", "run", "run_sync_steps_in", "snapshot"}
    | {"spec_class", "version", "_spec"}
)
"""What a subclass may define anew."""


def names_of(base: type[Process]) -> frozenset[str]:
    """What `base` defines for itself, and no subclass may."""
    return frozenset(name for name in vars(base) if not name.startswith("__")) - OVERRIDABLE


Process._reserved = names_of(Process)

_Outcome = tuple[Any, BaseException | None]
"""What a step has returned, or what it has raised."""


class _Attempt:
    """One attempt at a step: its task, and the working copy of what it may write."""

    __slots__ = ("children", "done", "ended", "kill", "memo", "number", "outputs", "started", "task", "timer")

    def __init__(self, number: int, outputs: dict[str, Any]) -> None:
        self.number = number
        self.outputs = outputs
        self.children: list[Process] = []
        self.memo: Any = None
        """What a subclass of `Process` keeps in a working copy."""
        self.task: asyncio.Task[None] | None = None
        self.done: asyncio.Future[_Outcome] | None = None
        self.kill: control.Kill | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.started = False
        """A task that is cancelled before it begins runs nothing of its coroutine."""
        self.ended = False


def _give_up(done: asyncio.Future[_Outcome]) -> None:
    if not done.done():
        done.set_result((None, None))


_abandoned: set[asyncio.Task[None]] = set()
"""Steps that do not end though they were cancelled. The loop holds its tasks weakly, so somebody must hold them."""


def _abandon(task: asyncio.Task[None], pid: str) -> None:
    _log.warning(
        "a step did not end when it was cancelled; it is abandoned, and what it does from now on has no effect",
        extra={"pid": pid},
    )
    _abandoned.add(task)
    task.add_done_callback(_abandoned.discard)
