"""Small files that are replaced as a whole, and folders that are nobody else's."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import stat
from pathlib import Path

from prunus.errors import ProfileError


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that whoever reads it sees the old one or the new one, never a part; `OSError`."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # what keeps it from being written may keep it from being removed
            temporary.unlink()
        raise


def private_folder(folder: Path, *, parents: bool = False) -> Path:
    """Make sure that `folder` exists (made with its `parents`, if these are wanted), is no link, is ours, and is closed
    to everybody else. Raises `ProfileError`."""
    try:
        folder.mkdir(mode=0o700, parents=parents, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise ProfileError(f"the folder {folder} can't be made: {why_refused(folder, error)}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise ProfileError(f"{folder} is a link; put the folder itself there")
    if status.st_uid != os.getuid():
        raise ProfileError(f"the folder {folder} belongs to another user; use one of your own")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ProfileError(f"the folder {folder} is open to other users; close it with: chmod 700 {folder}")
    return folder


def why_refused(path: Path, error: OSError) -> str:
    """Why `path` can't be made, entered or changed: what the system says, and where a permission lacks, what gives it
    or whose it is."""
    reason = error.strerror or str(error)
    if error.errno not in (errno.EACCES, errno.EPERM):
        return reason
    closed = _closed(path.absolute())
    owner = closed.lstat().st_uid
    if owner == os.getuid():
        return f"{reason}; `chmod u+rw{'x' if closed.is_dir() else ''} {closed}` allows it"
    try:
        return f"{reason}: {closed} belongs to {pwd.getpwuid(owner).pw_name}"
    except KeyError:  # a user without a name
        return f"{reason}: {closed} belongs to the user {owner}"


def _closed(path: Path) -> Path:
    """What is in the way to changing `path`: a folder that can't be entered, or that nothing can be added to, or it."""
    for folder in reversed(path.parents):
        if not os.access(folder, os.X_OK):
            return folder if os.path.lexists(folder) else folder.parent
    return path if os.path.lexists(path) and not os.access(path, os.W_OK) else path.parent
