"""Small files that are replaced as a whole, and folders that are nobody else's."""

from __future__ import annotations

import contextlib
import os
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
        raise ProfileError(f"the folder {folder} can't be made: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise ProfileError(f"{folder} is a link; put the folder itself there")
    if status.st_uid != os.getuid():
        raise ProfileError(f"the folder {folder} belongs to another user; use one of your own")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ProfileError(f"the folder {folder} is open to other users; close it with: chmod 700 {folder}")
    return folder
