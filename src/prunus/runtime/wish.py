"""What a daemon shall be, as its users asked for it: ``run/daemon.json``.

The wish outlives the supervisor: the next one goes on with it. A stop forgets it. It is changed by whoever asks
(`change_wish`: one at a time, atomically) and read by the supervisor when it starts and at each SIGHUP.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from prunus.errors import DaemonError
from prunus.files import why_refused, write_whole
from prunus.runtime.profile import Profile
from prunus.runtime.roster import service_names

log = logging.getLogger("prunus.supervisor")


class Wish(msgspec.Struct, frozen=True):
    """What the daemon shall be, as `prunus daemon start`, `scale` and `reload` wrote it down."""

    workers: int | None = None
    """How many; None: as the configuration says."""
    reloads: int = 0
    """How often a reload was asked for: workers that were started before the last time are replaced."""
    broker_reloads: int = 0
    """How often one with a new broker was asked for."""


def read_wish(profile: Profile) -> Wish | None:
    """The wish, or None if there is none: then the configuration counts. `DaemonError` if it can't be read."""
    path = _path(profile)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Wish)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise DaemonError(f"{path} can't be read ({error}); `prunus daemon scale N` writes it anew") from error


def wanted_services(profile: Profile) -> tuple[str, ...]:
    """The services that the daemon of this profile shall have, as the wish or else the configuration says."""
    wish = read_wish(profile) or Wish()
    return service_names(profile.config.workers if wish.workers is None else wish.workers)


def write_wish(profile: Profile, wish: Wish) -> None:
    """Write it down; the running daemon reads it when it gets SIGHUP."""
    path = _path(profile)
    try:
        write_whole(path, msgspec.json.encode(wish))
    except OSError as error:
        raise DaemonError(f"{path} can't be written: {why_refused(path, error)}") from error


def change_wish(profile: Profile, change: Callable[[Wish], Wish]) -> Wish:
    """Write down what `change` makes of the wish, while nobody else changes it; returns the new one. A wish that can't
    be read counts as none."""
    path = profile.run_folder / "wish.flock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DaemonError(f"{path} can't be opened: {why_refused(path, error)}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        wish = Wish()
        with contextlib.suppress(DaemonError):
            wish = read_wish(profile) or wish
        wish = change(wish)
        write_wish(profile, wish)
        return wish
    finally:
        os.close(descriptor)


def forget_wish(profile: Profile) -> None:
    """The next daemon starts as the configuration says. Who stops one does not fail for this: where the file can't be
    removed, a warning in the log says so."""
    path = _path(profile)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s can't be removed, so the next daemon goes on with it: %s", path, why_refused(path, error))


def _path(profile: Profile) -> Path:
    return profile.run_folder / "daemon.json"
