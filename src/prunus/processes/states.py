"""The two state machines of a process, pure: no I/O, no clock, no user code.

A process is in one of six **states**, and independently of that in one of three **play states**. Both machines are
tables: ``TABLE[state, event]`` is the set of states that the event may lead to. An event that the table does not
have raises `InvalidTransitionError`, and nothing is changed.

::

    CREATED --start--> RUNNING --wait--> WAITING --resume--> RUNNING
                       RUNNING --continue--> RUNNING
                       RUNNING --stop--> FINISHED
    anything that lives --kill--> KILLED, --fail--> EXCEPTED

    PLAYING --pause--> PAUSED (between two steps), or PAUSING (while a step runs) --settle--> PAUSED
    PAUSED, PAUSING --play--> PLAYING;   a process that terminates is PLAYING again (--end-->)

The data of a state is a frozen struct; `to_data` and `from_data` make plain dictionaries of it and back. The
values of the enums are plumpy's.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, ClassVar, Final, Literal, assert_never

import msgspec

from prunus.errors import Failure, InvalidTransitionError
from prunus.processes import waits
from prunus.processes.waits import AllOf, Condition, OnChild


class ProcessState(StrEnum):
    """Where a process stands in its life."""

    CREATED = "created"
    RUNNING = "running"
    WAITING = "waiting"
    FINISHED = "finished"
    EXCEPTED = "excepted"
    KILLED = "killed"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL


class PlayState(StrEnum):
    """Whether a process may take its next step."""

    PLAYING = "playing"
    PAUSING = "pausing"
    PAUSED = "paused"


class Event(StrEnum):
    """What can happen to the state of a process."""

    START = "start"
    CONTINUE = "continue"
    WAIT = "wait"
    RESUME = "resume"
    STOP = "stop"
    KILL = "kill"
    FAIL = "fail"


class PlayEvent(StrEnum):
    """What can happen to the play state of a process."""

    PAUSE = "pause"
    SETTLE = "settle"
    PLAY = "play"
    END = "end"


TERMINAL: Final = frozenset({ProcessState.FINISHED, ProcessState.EXCEPTED, ProcessState.KILLED})

STATE_TABLE: Final[Mapping[tuple[ProcessState, Event], frozenset[ProcessState]]] = {
    (ProcessState.CREATED, Event.START): frozenset({ProcessState.RUNNING}),
    (ProcessState.CREATED, Event.KILL): frozenset({ProcessState.KILLED}),
    (ProcessState.CREATED, Event.FAIL): frozenset({ProcessState.EXCEPTED}),
    (ProcessState.RUNNING, Event.CONTINUE): frozenset({ProcessState.RUNNING}),
    (ProcessState.RUNNING, Event.WAIT): frozenset({ProcessState.WAITING}),
    (ProcessState.RUNNING, Event.STOP): frozenset({ProcessState.FINISHED}),
    (ProcessState.RUNNING, Event.KILL): frozenset({ProcessState.KILLED}),
    (ProcessState.RUNNING, Event.FAIL): frozenset({ProcessState.EXCEPTED}),
    (ProcessState.WAITING, Event.RESUME): frozenset({ProcessState.RUNNING}),
    (ProcessState.WAITING, Event.KILL): frozenset({ProcessState.KILLED}),
    (ProcessState.WAITING, Event.FAIL): frozenset({ProcessState.EXCEPTED}),
}

PLAY_TABLE: Final[Mapping[tuple[PlayState, PlayEvent], frozenset[PlayState]]] = {
    (PlayState.PLAYING, PlayEvent.PAUSE): frozenset({PlayState.PAUSED, PlayState.PAUSING}),
    (PlayState.PAUSING, PlayEvent.SETTLE): frozenset({PlayState.PAUSED}),
    (PlayState.PAUSING, PlayEvent.PLAY): frozenset({PlayState.PLAYING}),
    (PlayState.PAUSING, PlayEvent.END): frozenset({PlayState.PLAYING}),
    (PlayState.PAUSED, PlayEvent.PLAY): frozenset({PlayState.PLAYING}),
    (PlayState.PAUSED, PlayEvent.END): frozenset({PlayState.PLAYING}),
}


# --- the data of each state -------------------------------------------------------------------------


Effect = Literal["", "begun", "unknown"]
"""What is known of a step whose effect is to take place once."""


class Pending(msgspec.Struct, frozen=True):
    """Something that is waited for, and the step that comes when it is there."""

    on: Condition | None
    """None: *suspended*, until somebody resumes it."""
    step: str | None = None
    """None: finish (a work chain: go on with the outline)."""
    args: tuple[Any, ...] = ()
    """What the step gets before the value of what was waited for."""
    kwargs: Mapping[str, Any] = {}
    message: str | None = None
    data: Any = None
    attempt: int = 1
    """Above 1: `step` has failed so often less one, and is tried again."""
    effect: Effect = ""
    """Of a step with ``effect="once"`` that is tried again."""


class Created(msgspec.Struct, frozen=True):
    """Accepted; nothing of the user's code ran yet."""

    kind: ClassVar[ProcessState] = ProcessState.CREATED
    step: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


class Running(msgspec.Struct, frozen=True):
    """`step` is the next one to be run, or runs at this moment."""

    kind: ClassVar[ProcessState] = ProcessState.RUNNING
    step: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    attempt: int = 1
    effect: Effect = ""
    """Of a step with ``effect="once"``: an attempt has begun and nobody has seen it end; nobody knows what it did."""
    pending: tuple[Pending, ...] = ()
    """What else is waited for meanwhile."""


class Waiting(msgspec.Struct, frozen=True):
    """Waits for the first of `pending` to be there."""

    kind: ClassVar[ProcessState] = ProcessState.WAITING
    pending: tuple[Pending, ...]

    @property
    def suspended(self) -> bool:
        """Whether somebody may resume it."""
        return not self.is_retry and any(item.on is None for item in self.pending)

    @property
    def is_retry(self) -> bool:
        """Whether the first is a step that is tried again: it has not ended yet, so no other one comes before it."""
        return bool(self.pending) and self.pending[0].attempt > 1

    @property
    def message(self) -> str | None:
        return next((item.message for item in self.pending if item.message is not None), None)


class Finished(msgspec.Struct, frozen=True):
    """The last step has returned. An `exit_status` of 0 is a success."""

    kind: ClassVar[ProcessState] = ProcessState.FINISHED
    result: Any = None
    exit_status: int = 0
    exit_message: str | None = None


class Excepted(msgspec.Struct, frozen=True):
    """A step has raised."""

    kind: ClassVar[ProcessState] = ProcessState.EXCEPTED
    failure: Failure


class Killed(msgspec.Struct, frozen=True):
    """Somebody has killed it."""

    kind: ClassVar[ProcessState] = ProcessState.KILLED
    message: str | None = None


State = Created | Running | Waiting | Finished | Excepted | Killed


# --- decisions --------------------------------------------------------------------------------------


_ENTERED = frozenset((source, event, target) for (source, event), targets in STATE_TABLE.items() for target in targets)


def enter(source: ProcessState, event: Event, target: ProcessState) -> ProcessState:
    """`target`, if `event` may lead from `source` to it; else `InvalidTransitionError`."""
    if (source, event, target) not in _ENTERED:
        raise InvalidTransitionError(source.value, event.value)
    return target


def turn(source: PlayState, event: PlayEvent, target: PlayState) -> PlayState:
    """`target`, if `event` may lead from `source` to it; else `InvalidTransitionError`."""
    if target not in PLAY_TABLE.get((source, event), ()):
        raise InvalidTransitionError(source.value, event.value)
    return target


def diagram() -> str:
    """The table of the states as a Mermaid diagram."""
    lines = ["stateDiagram-v2", "    [*] --> created"]
    for (source, event), targets in STATE_TABLE.items():
        lines += [f"    {source} --> {target}: {event}" for target in sorted(targets)]
    return "\n".join([*lines, *(f"    {state} --> [*]" for state in sorted(TERMINAL))])


# --- as plain data ----------------------------------------------------------------------------------


def to_data(state: State) -> dict[str, Any]:
    """The state as a dictionary whose values are texts, numbers, lists and the user's own values."""
    facts: dict[str, Any]
    match state:
        case Created():
            facts = {"step": state.step, "args": list(state.args), "kwargs": dict(state.kwargs)}
        case Running():
            facts = {"step": state.step, "args": list(state.args), "kwargs": dict(state.kwargs)}
            if state.attempt != 1:
                facts["attempt"] = state.attempt
            if state.effect:
                facts["effect"] = state.effect
            if state.pending:
                facts["pending"] = [_pending_to_data(item) for item in state.pending]
        case Waiting():
            facts = {"pending": [_pending_to_data(item) for item in state.pending]}
        case Finished():
            facts = {"result": state.result, "exit_status": state.exit_status, "exit_message": state.exit_message}
        case Excepted():
            facts = {"failure": msgspec.to_builtins(state.failure)}
        case Killed():
            facts = {"message": state.message}
        case _:
            assert_never(state)
    return {"state": state.kind.value, **facts}


def from_data(data: Mapping[str, Any]) -> State:
    """The state that `to_data` has described; `ValueError` or `KeyError` if `data` is not of its making."""
    kind = ProcessState(data["state"])
    match kind:
        case ProcessState.CREATED:
            return Created(data["step"], tuple(data["args"]), dict(data["kwargs"]))
        case ProcessState.RUNNING:
            return Running(
                data["step"],
                tuple(data["args"]),
                dict(data["kwargs"]),
                data.get("attempt", 1),
                data.get("effect", ""),
                tuple(_pending_from_data(item) for item in data.get("pending", ())),
            )
        case ProcessState.WAITING:
            if "pending" not in data:  # as Prunus 0.1 wrote it
                children = tuple(OnChild(pid) for pid in data["children"])
                on = AllOf(children) if children else None
                return Waiting((Pending(on, data["step"], message=data["message"], data=data["data"]),))
            return Waiting(tuple(_pending_from_data(item) for item in data["pending"]))
        case ProcessState.FINISHED:
            return Finished(data["result"], data["exit_status"], data["exit_message"])
        case ProcessState.EXCEPTED:
            return Excepted(msgspec.convert(data["failure"], Failure))
        case ProcessState.KILLED:
            return Killed(data["message"])
        case _:
            assert_never(kind)


def _pending_to_data(pending: Pending) -> dict[str, Any]:
    facts: dict[str, Any] = {"on": None if pending.on is None else waits.to_data(pending.on), "step": pending.step}
    if pending.args:
        facts["args"] = list(pending.args)
    if pending.kwargs:
        facts["kwargs"] = dict(pending.kwargs)
    if pending.message is not None:
        facts["message"] = pending.message
    if pending.data is not None:
        facts["data"] = pending.data
    if pending.attempt != 1:
        facts["attempt"] = pending.attempt
    if pending.effect:
        facts["effect"] = pending.effect
    return facts


def _pending_from_data(data: Mapping[str, Any]) -> Pending:
    return Pending(
        None if data["on"] is None else waits.from_data(data["on"]),
        data["step"],
        tuple(data.get("args", ())),
        dict(data.get("kwargs", {})),
        data.get("message"),
        data.get("data"),
        data.get("attempt", 1),
        data.get("effect", ""),
    )
