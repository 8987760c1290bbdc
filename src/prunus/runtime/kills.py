"""Ending a process that is to be killed without its code.

So ends one that can't be continued (`prunus.runtime.launcher`), and one that nobody could take, because there is no
worker: then the broker does it, in the commit of the kill (`prunus.runtime.backend`). A process whose class has a last
step (``on_kill``) waits for a worker that takes it, unless it has not begun or the kill is forced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from prunus.errors import PersistenceError, ProtocolError
from prunus.persistence.checkpoint import Gist, decode_checkpoint, type_loader
from prunus.persistence.persister import Event, Letter, Record, Save, Tell
from prunus.processes import PlayState, ProcessResult, ProcessState
from prunus.processes.control import Kill
from prunus.runtime.letters import decode_letter, encode_letter

_NO_TYPES = type_loader(())


def find_kill(inbox: Sequence[Letter]) -> Kill | None:
    """The first letter that asks for the end of a process, or the first that does so by force. Nothing of the user's is
    imported for the others."""
    kills = []
    for letter in inbox:
        with contextlib.suppress(ProtocolError):  # a letter that nobody can read asks for nothing
            if isinstance(message := decode_letter(letter.body, _NO_TYPES), Kill):
                kills.append(message)
    return next((kill for kill in kills if kill.force), kills[0] if kills else None)


def needs_its_code(record: Record, kill: Kill) -> bool:
    """Whether there is something to be done before the process is killed."""
    return record.state != ProcessState.CREATED and not kill.force and _gist(record).has_last_step


def killed(record: Record, epoch: int, kill: Kill, at: float) -> Save:
    """The save under the claim `epoch` that ends a process as it stands, and tells its children."""
    result = ProcessResult[object](pid=record.pid, state=ProcessState.KILLED, exit_message=kill.message)
    events = [Event(subject=f"{record.state}.killed", at=at, note=kill.message)]
    if record.play != PlayState.PLAYING:
        events.append(Event(subject=f"{record.play}.playing", at=at))
    cascade = Kill(f"its parent {record.pid} was killed", force=kill.force, grace_s=kill.grace_s)
    return Save(
        pid=record.pid,
        epoch=epoch,
        state=ProcessState.KILLED.value,
        result=_gist(record).encode_result(result),
        status=record.status,
        events=tuple(events),
        tells=(Tell(body=encode_letter(cascade), to=("kill",)),),
        release=True,
    )


def _gist(record: Record) -> Gist:
    try:
        return decode_checkpoint(record.checkpoint or b"").gist
    except PersistenceError:  # no code could make anything of it
        return Gist(has_last_step=False)
