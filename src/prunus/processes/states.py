"""The two state machines of a process, pure: no I/O, no clock, no user code.

A process is in one of six **states**, and independently of that in one of three **play states**. Both machines are
tables: ``TABLE[state, event]`` is the set of states that the event may lead to. An event that the table does not
have raises `InvalidTransitionError`, and nothing is changed.

::

    CREATED --start--> RUNNING --wait--> WAITING --resume--> RUNNING
                       RUNNING --continue--> RUNNING
                       RUNNING --stop--> FINISHED (or EXCEPTED, when a required output is missing)
    anything that lives --kill--> KILLED, --fail--> EXCEPTED

    PLAYING --pause--> PAUSED (between two steps), or PAUSING (while a step runs) --settle--> PAUSED
    PAUSED, PAUSING --play--> PLAYING;   a process that terminates is PLAYING again (--end-->)

The data of a state is a frozen dataclass; `to_data` and `from_data` make plain dictionaries of it and back. The
values of the enums are plumpy's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Final, TypeVar, assert_never

import msgspec

from prunus.errors import Failure, InvalidTransitionError


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
    (ProcessState.RUNNING, Event.STOP): frozenset({ProcessState.FINISHED, ProcessState.EXCEPTED}),
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


@dataclass(frozen=True, slots=True)
class Created:
    """Accepted; nothing of the user's code ran yet."""

    kind: ClassVar[ProcessState] = ProcessState.CREATED
    step: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Running:
    """`step` is the next one to be run, or runs at this moment."""

    kind: ClassVar[ProcessState] = ProcessState.RUNNING
    step: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Waits for the end of `children`, or, without any, *suspended* for a message; then goes on with `step`."""

    kind: ClassVar[ProcessState] = ProcessState.WAITING
    step: str | None = None
    """None: finish when the wait is over."""
    message: str | None = None
    data: Any = None
    children: tuple[str, ...] = ()

    @property
    def suspended(self) -> bool:
        return not self.children


@dataclass(frozen=True, slots=True)
class Finished:
    """The last step has returned. An `exit_status` of 0 is a success."""

    kind: ClassVar[ProcessState] = ProcessState.FINISHED
    result: Any = None
    exit_status: int = 0
    exit_message: str | None = None


@dataclass(frozen=True, slots=True)
class Excepted:
    """A step has raised."""

    kind: ClassVar[ProcessState] = ProcessState.EXCEPTED
    failure: Failure


@dataclass(frozen=True, slots=True)
class Killed:
    """Somebody has killed it."""

    kind: ClassVar[ProcessState] = ProcessState.KILLED
    message: str | None = None


State = Created | Running | Waiting | Finished | Excepted | Killed


# --- decisions --------------------------------------------------------------------------------------


S = TypeVar("S", Created, Running, Waiting, Finished, Excepted, Killed)


def enter(source: State, event: Event, target: S) -> S:
    """`target`, if `event` may lead from `source` to it; else `InvalidTransitionError`."""
    if target.kind not in STATE_TABLE.get((source.kind, event), ()):
        raise InvalidTransitionError(source.kind.value, event.value)
    return target


def turn(source: PlayState, event: PlayEvent, target: PlayState) -> PlayState:
    """`target`, if `event` may lead from `source` to it; else `InvalidTransitionError`."""
    if target not in PLAY_TABLE.get((source, event), ()):
        raise InvalidTransitionError(source.value, event.value)
    return target


# --- as plain data ----------------------------------------------------------------------------------


def to_data(state: State) -> dict[str, Any]:
    """The state as a dictionary whose values are texts, numbers, lists and the user's own values."""
    facts: dict[str, Any]
    match state:
        case Created() | Running():
            facts = {"step": state.step, "args": list(state.args), "kwargs": dict(state.kwargs)}
        case Waiting():
            facts = {
                "step": state.step,
                "message": state.message,
                "data": state.data,
                "children": list(state.children),
            }
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
            return Running(data["step"], tuple(data["args"]), dict(data["kwargs"]))
        case ProcessState.WAITING:
            return Waiting(data["step"], data["message"], data["data"], tuple(data["children"]))
        case ProcessState.FINISHED:
            return Finished(data["result"], data["exit_status"], data["exit_message"])
        case ProcessState.EXCEPTED:
            return Excepted(msgspec.convert(data["failure"], Failure))
        case ProcessState.KILLED:
            return Killed(data["message"])
        case _:
            assert_never(kind)
