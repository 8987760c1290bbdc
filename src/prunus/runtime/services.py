"""What became of the services of a daemon: ``run/services.json``.

Only the supervisor writes it (it holds the lock "daemon"), each time as a whole and atomically; anybody may read it.
It outlives the supervisor: the next one knows from it which generation a service that it adopts was started in, and
goes on counting. It is a note, not a truth: who runs is decided by the locks alone, and a note counts only
for the process that it names (`ServiceNote.is_about`). Where it is lost, counts start over and a reload may
replace a worker once more than it had to. A disk that is full stops the notes, and nothing else.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import msgspec

from prunus.errors import ProfileError
from prunus.files import why_refused, write_whole
from prunus.runtime.locks import Holder
from prunus.runtime.profile import Profile

MAX_ENDS_NOTED = 20
"""Of how many ends the times are kept."""

log = logging.getLogger("prunus.supervisor")


class End(msgspec.Struct, frozen=True, kw_only=True):
    """How a service ended."""

    at: float
    """Wall clock, seconds since 1970."""
    pid: int
    how: str
    """For people: ``by SIGKILL``, ``with exit code 1`` ..."""
    signal: str | None = None
    """The name of the signal that ended it ..."""
    code: int | None = None
    """... or its exit code; neither is known of a service that an earlier supervisor started."""
    ran_s: float
    asked: bool
    """Somebody wanted it to end."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the last end of a service that nobody had asked for."""

    at: float
    pid: int
    how: str
    log: str
    """The last lines that it wrote."""


class ServiceNote(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one service."""

    pid: int | None = None
    """The process that it is, or None between two."""
    started: float | None = None
    """With `pid` it names one process (`locks.start_time`)."""
    generation: int = 0
    ready: bool = False
    """It was seen to serve (asked only during a reload)."""
    restarts: int = 0
    """How often it ended without being asked, since the daemon was started."""
    ends: tuple[float, ...] = ()
    """When it did, the newest last (wall clock)."""
    last_end: End | None = None
    evidence: Evidence | None = None
    flapping: bool = False
    """At its last end it was: it ends again and again."""
    start_at: float | None = None
    """When it is tried again (wall clock), while it does not run."""

    def is_about(self, holder: Holder) -> bool:
        """Whether this is about the process that holds the lock of the service now."""
        return (self.pid, self.started) == (holder.pid, holder.started)


class Notes(msgspec.Struct, frozen=True):
    """What is known of all services."""

    version: str = ""
    """Of Prunus, that the supervisor runs."""
    services: dict[str, ServiceNote] = {}
    grace_s: float | None = None
    """What the supervisor gives running steps when it stops a worker."""


def read_notes(profile: Profile) -> Notes:
    """The notes; empty ones if there are none that can be read."""
    try:
        return msgspec.json.decode(_path(profile).read_bytes(), type=Notes)
    except (OSError, msgspec.MsgspecError, ProfileError):
        return Notes()


def write_notes(profile: Profile, notes: Notes) -> None:
    """Write them all; a disk that refuses it is a warning in the log."""
    try:
        write_whole(_path(profile), msgspec.json.encode(notes))
    except (OSError, ProfileError) as error:
        log.warning("services.json can't be written (%s): `prunus daemon status` may not be up to date", error)


def change_note(profile: Profile, service: str, **changes: Any) -> None:
    """Change what is known of one service."""
    notes = read_notes(profile)
    note = msgspec.structs.replace(notes.services.get(service, ServiceNote()), **changes)
    write_notes(profile, msgspec.structs.replace(notes, services={**notes.services, service: note}))


def tell_end(profile: Profile, service: str, pid: int, how: str, log_tail: str) -> None:
    """A service ended without being asked: keep the evidence, for those whose processes it held."""
    change_note(profile, service, evidence=Evidence(at=time.time(), pid=pid, how=how, log=log_tail))


def forget_notes(profile: Profile) -> None:
    """The daemon was stopped: the next one counts from the start; or it goes on, where the file can't be removed."""
    path = _path(profile)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s can't be removed: %s", path, why_refused(path, error))


def _path(profile: Profile) -> Path:
    return profile.run_folder / "services.json"
