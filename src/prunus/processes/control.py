"""Control: what may be asked of a process from outside, and the register that remembers what is wanted of it.

A message (pause, play, kill, resume ...) is data: the body of a letter in the inbox of a process, and the argument of
`Process.receive`. The wishes among them are merged into the **register**, which is saved with the process:

* merging is idempotent: saying something twice is the same as saying it once;
* a kill is never taken back, and a forced one stays forced: force beats graceful beats pause;
* a play takes back a pause, and nothing else.

The process looks at the register at each of its safe points. No exception is thrown into anything, and no order of
messages can lose one: `tests/processes/test_control_table.py` has all pairs.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

import msgspec

from prunus.errors import ProtocolError

DEFAULT_GRACE_S = 10.0
"""How long a killed step may clean up before it is abandoned."""


# --- messages ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pause:
    """Take no further step. A step that runs is not interrupted."""

    type: ClassVar[str] = "pause"
    reason: str | None = None
    cascade: bool = False
    """Pause the descendants too."""


@dataclass(frozen=True, slots=True)
class Play:
    """Go on after a pause; undoes a pause that has not taken effect yet."""

    type: ClassVar[str] = "play"
    cascade: bool = False
    """Play the descendants too."""


@dataclass(frozen=True, slots=True)
class PauseAt:
    """Set a breakpoint: pause before this step is taken, once. None takes it back."""

    type: ClassVar[str] = "pause_at"
    step: str | None = None


@dataclass(frozen=True, slots=True)
class Kill:
    """End the process as KILLED. A step that runs is cancelled at its next await."""

    type: ClassVar[str] = "kill"
    message: str | None = None
    force: bool = False
    """Do not wait for the step to clean up."""
    grace_s: float = DEFAULT_GRACE_S
    """Seconds that the step has to clean up."""


@dataclass(frozen=True, slots=True)
class Resume:
    """End the wait of a suspended process. Its callback gets `value` if the message has one."""

    type: ClassVar[str] = "resume"
    value: Any = None
    has_value: bool = False


@dataclass(frozen=True, slots=True)
class Update:
    """Call the method `name`, one of those marked with ``@update``, between two steps; the answer is its value."""

    type: ClassVar[str] = "update"
    name: str = ""
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EditContext:
    """Set these names in the context of a work chain, between two steps; the history says so."""

    type: ClassVar[str] = "edit_context"
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settle:
    """Take the step that may have had its effect (``effect="once"``) for done, with `value` as what it returned."""

    type: ClassVar[str] = "settle"
    value: Any = None


Message = Pause | Play | PauseAt | Kill | Resume | Update | EditContext | Settle

_KINDS: dict[str, type[Any]] = {
    kind.type: kind for kind in (Pause, Play, PauseAt, Kill, Resume, Update, EditContext, Settle)
}


def to_data(message: Message) -> dict[str, Any]:
    """The message as a dictionary; the user's own values in it are left as they are."""
    return {"type": message.type, **{item.name: getattr(message, item.name) for item in fields(message)}}


def from_data(data: Any) -> Message:
    """The message that `to_data` has described; `ProtocolError` if it is none."""
    try:
        facts = dict(data)
        kind = _KINDS[facts.pop("type")]
        if unknown := facts.keys() - {item.name for item in fields(kind)}:
            raise ValueError(f"{kind.type} has no {', '.join(sorted(map(str, unknown)))}")
        message: Message = msgspec.convert(facts, kind)
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"this is no message to a process: {error!r}") from error
    return message


# --- the register -----------------------------------------------------------------------------------


class KillLevel(enum.IntEnum):
    """How urgently a process is to end."""

    NONE = 0
    GRACEFUL = 1
    FORCE = 2


@dataclass(frozen=True, slots=True)
class Register:
    """What is wanted of a process."""

    pause: bool = False
    reason: str | None = None
    """Of the pause."""
    cascade: bool = False
    """The pause is meant for the descendants too, also for those that are yet to be submitted."""
    pause_at: str | None = None
    kill: KillLevel = KillLevel.NONE
    message: str | None = None
    """Of the kill."""
    grace_s: float = DEFAULT_GRACE_S
    seq: int = 0
    """How many wishes were merged into it."""


def merge(register: Register, wish: Pause | Play | PauseAt | Kill) -> Register:
    """The register with one wish more."""
    seq = register.seq + 1
    match wish:
        case Pause(reason, cascade):
            if register.pause:  # the first reason stays
                return replace(register, cascade=register.cascade or cascade, seq=seq)
            return replace(register, pause=True, reason=reason, cascade=cascade, seq=seq)
        case Play():
            return replace(register, pause=False, reason=None, cascade=False, seq=seq)
        case PauseAt(step):
            return replace(register, pause_at=step, seq=seq)
        case Kill(message, force, grace_s):
            level = KillLevel.FORCE if force else KillLevel.GRACEFUL
            if register.kill is KillLevel.NONE:
                return replace(register, kill=level, message=message, grace_s=grace_s, seq=seq)
            return replace(register, kill=max(register.kill, level), seq=seq)


def register_to_data(register: Register) -> dict[str, Any]:
    """What differs from a register that nobody has touched."""
    return {name: value for name, value in asdict(register).items() if value != getattr(CALM, name)}


def register_from_data(data: Mapping[str, Any]) -> Register:
    """The register that `register_to_data` has described."""
    facts = dict(data)
    if "kill" in facts:
        facts["kill"] = KillLevel(facts["kill"])
    return Register(**facts)


CALM = Register()
"""Nobody wants anything."""
