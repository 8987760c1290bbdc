"""One SQLite file as a durable database: opening it safely, committing, and keeping its log short.

Rules:

* **One connection writes** (``locking_mode=EXCLUSIVE``): a second program that opens the file is told so.
* **Committed means on the disk**: WAL with ``synchronous=FULL``, read back, because SQLite ignores a pragma that it
  does not understand.
* We write ``BEGIN`` and ``COMMIT`` ourselves (autocommit mode of `sqlite3`): only the owner of the connection knows
  what belongs together.
* The WAL is copied back by `checkpoint_wal`, when its owner says so, and somebody looks at the result.
* Nothing is ever repaired silently. What is not ours, is newer or is damaged is refused with a sentence.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from pathlib import Path

from prunus.errors import PersistenceError, StoreFullError

APPLICATION_ID = int.from_bytes(b"Prun")
"""In the header of every database of ours."""
SCHEMA_VERSION = 2
"""The tables' version that is written (``user_version``). A newer one is refused; an older one is left as it is, for
the owner of the tables to upgrade."""
WAL_LIMIT_BYTES = 16 * 1024 * 1024
"""Over this size the owner should call `checkpoint_wal`."""
LOCK_TIMEOUT_S = 2.0
"""How long opening waits for another program to let the file go."""
CHECKED_AT_OPENING_BYTES = 8 * 1024 * 1024
"""A file up to this size is checked as a whole when it is opened; a larger one by `find_damage`, when asked."""

NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "pvfs2", "ocfs2"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.ceph-fuse"}
)
"""Where locks or fsync can't be relied on."""

MEMORY = ":memory:"

logger = logging.getLogger(__name__)


def open_database(path: str | os.PathLike[str], *, exclusive: bool = True) -> sqlite3.Connection:
    """Open the database at `path` (created with mode 0600 if it is not there), or a new one in ``:memory:``.

    The connection is in autocommit mode and may move between threads, one at a time. Raises `PersistenceError` with
    what to do if the file can't be used.
    """
    in_memory = os.fspath(path) == MEMORY
    if not in_memory:
        refuse_network_file_system(Path(path))
        _create_file(Path(path))
    try:
        connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise _explained(error, path) from error
    try:
        _recognise(connection, path)
        _configure(connection, exclusive=exclusive and not in_memory, journal_mode="memory" if in_memory else "wal")
        if not in_memory and os.path.getsize(path) <= CHECKED_AT_OPENING_BYTES and find_damage(connection):
            raise sqlite3.DatabaseError("its pages contradict each other")
    except sqlite3.Error as error:
        connection.close()
        raise _explained(error, path) from error
    except PersistenceError:
        connection.close()
        raise
    return connection


def commit(connection: sqlite3.Connection) -> None:
    """Make the open transaction durable. Raises `StoreFullError`; any other error means that this connection must not
    be used again (what the disk then holds is known only after opening it anew)."""
    try:
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise (full_disk(error, connection) or error) from error


def full_disk(error: sqlite3.Error, connection: sqlite3.Connection) -> StoreFullError | None:
    """`error` as a `StoreFullError`, if that is what it is."""
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return StoreFullError(database_path(connection))
    return None


def database_path(connection: sqlite3.Connection) -> str:
    """Where the database lies; ``:memory:`` if it is nowhere."""
    [path] = connection.execute("SELECT file FROM pragma_database_list WHERE name = 'main'").fetchone()
    return str(path) or MEMORY


def wal_bytes(path: str | os.PathLike[str]) -> int:
    """How long the write-ahead log of the database at `path` is."""
    try:
        return os.stat(f"{os.fspath(path)}-wal").st_size
    except FileNotFoundError:
        return 0


def checkpoint_wal(connection: sqlite3.Connection) -> bool:
    """Copy the write-ahead log into the database and empty it. False (and a warning) if it could not be done."""
    try:
        busy, frames, copied = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError as error:
        if full_disk(error, connection) is None:
            raise
        busy, frames, copied = 1, -1, -1
    if busy:
        logger.warning(
            "the write-ahead log could not be emptied (%d of %d pages copied); it grows until that works",
            copied,
            frames,
        )
    return not busy


def find_damage(connection: sqlite3.Connection) -> list[str]:
    """What SQLite finds wrong with the file; empty if all is well. Reads the whole file.

    Not ``quick_check``: that of SQLite 3.40 takes sound rows of tables without a rowid for damaged ones.
    """
    found = [str(line) for [line] in connection.execute("PRAGMA integrity_check(10)")]
    return [] if found == ["ok"] else found


# --- opening ----------------------------------------------------------------------------------------


def _recognise(connection: sqlite3.Connection, path: str | os.PathLike[str]) -> None:
    """Mark a new database as ours; refuse one that is not, before anything in it is changed."""
    [application_id] = connection.execute("PRAGMA application_id").fetchone()
    [version] = connection.execute("PRAGMA user_version").fetchone()
    [tables] = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (application_id, version, tables) == (0, 0, 0):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    elif application_id != APPLICATION_ID:
        raise PersistenceError(f"{path} is the database of another program; nothing was changed, choose another file")
    elif version > SCHEMA_VERSION:
        raise PersistenceError(
            f"{path} was written by a newer Prunus (tables of version {version}, this one knows {SCHEMA_VERSION}); "
            "upgrade Prunus, nothing was changed"
        )


def _configure(connection: sqlite3.Connection, *, exclusive: bool, journal_mode: str) -> None:
    wanted = {
        "locking_mode": "exclusive" if exclusive else "normal",
        "journal_mode": journal_mode,
        "synchronous": 2,  # FULL
        "foreign_keys": 1,
        "trusted_schema": 0,
        "wal_autocheckpoint": 0,
        "fullfsync": 1,  # a plain fsync on macOS leaves the data in the drive's cache
        "checkpoint_fullfsync": 1,
    }
    for name, value in wanted.items():
        connection.execute(f"PRAGMA {name} = {value}")
    if exclusive:  # takes the lock now, and keeps it
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("COMMIT")
    for name, value in wanted.items():
        [found] = connection.execute(f"PRAGMA {name}").fetchone() or [None]
        too_old = name == "trusted_schema" and sqlite3.sqlite_version_info < (3, 31)
        if found != value and not too_old and not (journal_mode == "memory" and name == "locking_mode"):
            raise PersistenceError(f"SQLite {sqlite3.sqlite_version} does not accept {name} = {value}: it says {found}")


def _create_file(path: Path) -> None:
    """So that nobody else can read it from its first moment on, and its name survives a power cut."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise PersistenceError(f"{path} can't be created: {error.strerror}") from error
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def refuse_network_file_system(path: Path) -> None:
    """Raises `PersistenceError` if a database at `path` would not be safe there."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mounts = Path("/proc/self/mounts").read_text(errors="surrogateescape")
    except OSError:  # no /proc here: then nobody can tell
        return
    kind = file_system_of(path.resolve(), mounts)
    if kind in NETWORK_FILE_SYSTEMS:
        raise PersistenceError(
            f"{path} lies on a network file system ({kind}), where locks and fsync can't be relied on; "
            "choose a folder on a local disk"
        )


def file_system_of(path: Path, mounts: str) -> str:
    """The type of the file system that holds the absolute `path`, by a table like that of ``/proc/mounts``."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        _, mount_point, mount_type, *_ = line.split(" ")
        mount_point = mount_point.replace(r"\040", " ").replace(r"\011", "\t").replace(r"\134", "\\")
        if path.is_relative_to(mount_point) and len(mount_point) >= best:
            best, kind = len(mount_point), mount_type
    return kind


def _explained(error: sqlite3.Error, path: str | os.PathLike[str]) -> PersistenceError:
    match getattr(error, "sqlite_errorname", None):
        case "SQLITE_BUSY" | "SQLITE_LOCKED":
            return PersistenceError(f"another program has {path} open; is a daemon running? (`prunus daemon status`)")
        case "SQLITE_NOTADB":
            return PersistenceError(f"{path} is no database; nothing was changed, move it away or choose another file")
        case "SQLITE_FULL":
            return StoreFullError(os.fspath(path))
        case _:
            return PersistenceError(
                f"{path} can't be used as a database ({error}); if the disk is sound, restore the file from a backup"
            )
