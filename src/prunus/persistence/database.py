"""One SQLite file as a durable database: opening it safely, committing, and keeping its log short.

Rules:

* **One connection writes** (``locking_mode=EXCLUSIVE``): a second program that opens the file is told so.
* **Committed means on the disk**: WAL with ``synchronous=FULL``, read back, because SQLite ignores a pragma that it
  does not understand.
* We write ``BEGIN`` and ``COMMIT`` ourselves (autocommit mode of `sqlite3`): only the owner of the connection knows
  what belongs together.
* The WAL is copied back by `checkpoint_wal`, when its owner says so, and somebody looks at the result. Its file stays
  as long as it is and is written from its beginning again: writing over blocks that a file has already is synced in
  about half the time of appending to it (`lay_out_log`).
* Nothing is ever repaired silently. What is not ours, is newer or is damaged is refused with a sentence.
* **A log belongs to one file.** SQLite applies whatever log lies beside a database; with the log of another file (of
  the one that lay there before a backup was copied over it) the two would become a mixture. So each log begins with a
  mark that names the mark which the file had then, and opening compares the two.
* **No loss goes unseen.** A file that was emptied looks like a new one, and one whose log was removed after a crash
  like one that was closed. So where it is wanted (`begin_note`) the last mark is noted outside of both, in
  ``PATH-mark``, and opening compares that too. A mark is noted once it is durable, and the next one is made once it is
  noted (`_mark_log`): wherever a crash comes between, the note has the mark of the database or the one before it.
* Pages that are free go back to the file system in portions (``auto_vacuum=INCREMENTAL``, `give_back_pages`).
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import logging
import os
import shlex
import sqlite3
import stat
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from prunus.errors import PersistenceError, StoreFullError

APPLICATION_ID = int.from_bytes(b"Prun")
"""In the header of every database of ours."""
SCHEMA_VERSION = 3
"""The tables' version that is written (``user_version``). A newer one is refused; an older one is left as it is, for
the owner of the tables to upgrade."""
WAL_LIMIT_BYTES = 16 * 1024 * 1024
"""With more in the log the owner should call `checkpoint_wal`; its file is not kept longer than this."""
LOCK_TIMEOUT_S = 2.0
"""How long opening waits for another program to let the file go."""
CHECKED_AT_OPENING_BYTES = 8 * 1024 * 1024
"""A file up to this size is checked as a whole whenever it is opened, ..."""
CHECKED_AFTER_CRASH_BYTES = 512 * 1024 * 1024
"""... and one up to this size if whoever had it open before did not close it (up to 3 s, with hundreds of thousands of
processes in it). Of a larger one SQLite looks at the header and the length; a damaged page is found by whoever reads it
and by `find_damage`, when asked. (Pages have no checksums: a part of a file can't be checked without the rest.)"""
STEP_PAGES = 128
"""How much a backup copies at once; meanwhile the database stands still."""
MAX_COPY_RESTARTS = 100
"""A transaction that is undone makes a backup begin anew; after so many times it gives up."""

NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "gpfs", "beegfs", "pvfs2", "ocfs2"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.ceph-fuse"}
)
"""Where locks or fsync can't be relied on."""

MEMORY = ":memory:"

_ALONGSIDE = ("-wal", "-shm", "-journal", "-mark")
"""What SQLite and this module add to the name of a database for the files that belong to it."""
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}

_RESCUED = ".rescued-"
"""In the name of what was copied of a database whose file was removed."""

_MARK = b"Prunus log mark\0"
_MARK_ID_BYTES = 16
_MARK_BYTES = len(_MARK) + 2 * _MARK_ID_BYTES
_MARK_FRAMES = 8
"""The transaction that writes a mark is shorter than this."""
_LOG_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
"""https://www.sqlite.org/fileformat2.html#the_write_ahead_log"""

logger = logging.getLogger(__name__)


def open_database(path: str | os.PathLike[str], *, exclusive: bool = True) -> sqlite3.Connection:
    """Open the database at `path` (created with mode 0600 if it is not there), or a new one in ``:memory:``.

    The connection is in autocommit mode and may move between threads, one at a time. Raises `PersistenceError` with
    what to do if the file can't be used, or is not what lay there last (as far as that was noted, see `begin_note`).
    """
    in_memory = os.fspath(path) == MEMORY
    unclean = False
    if not in_memory:
        refuse_network_file_system(Path(path))
        unclean = wal_bytes(path) > 0
        _refuse_a_loss(Path(path))
        _create_file(Path(path))
    try:
        connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as error:
        raise explain(error, path) from error
    try:
        _recognise(connection, path)
        _configure(connection, exclusive=exclusive and not in_memory, journal_mode="memory" if in_memory else "wal")
        checked = CHECKED_AFTER_CRASH_BYTES if unclean else CHECKED_AT_OPENING_BYTES
        if not in_memory and os.path.getsize(path) <= checked and (damage := find_damage(connection, 1)):
            raise sqlite3.DatabaseError(damage[0])
        if exclusive and not in_memory:
            if unclean:  # (there may be no space for both)
                checkpoint_wal(connection, shrink=True)
            else:
                _mark_log(connection)
    except sqlite3.Error as error:
        connection.close()
        raise explain(error, path) from error
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
    """How much is in the write-ahead log of the database at `path` since it was begun. Its file may be longer."""
    try:
        with Path(f"{os.fspath(path)}-wal").open("rb", buffering=0) as file:
            header = file.read(_LOG_HEADER_BYTES)
            if len(header) < _LOG_HEADER_BYTES or header == bytes(_LOG_HEADER_BYTES):
                return 0
            frame_bytes = _FRAME_HEADER_BYTES + int.from_bytes(header[8:12])
            # The frames of the log that is there now have the salts of its header; behind them are those of older ones.
            low, high = 0, (os.fstat(file.fileno()).st_size - _LOG_HEADER_BYTES) // frame_bytes
            while low < high:
                middle = (low + high) // 2
                found = os.pread(file.fileno(), 16, _LOG_HEADER_BYTES + middle * frame_bytes)
                low, high = (middle + 1, high) if found[8:] == header[16:24] else (low, middle)
            return _LOG_HEADER_BYTES + low * frame_bytes
    except FileNotFoundError:
        return 0


def log_file_bytes(path: str | os.PathLike[str]) -> int:
    """What the write-ahead log of the database at `path` takes on the disk."""
    try:
        return os.stat(f"{os.fspath(path)}-wal").st_size
    except FileNotFoundError:
        return 0


def lay_out_log(connection: sqlite3.Connection) -> None:
    """Give the write-ahead log its blocks (`WAL_LIMIT_BYTES`), so that from the first commit on none has to be added.

    Not being able to is no harm. To be called when the log has just been begun; the space is given back by
    ``checkpoint_wal(connection, shrink=True)`` and by closing.
    """
    log = Path(f"{database_path(connection)}-wal")
    with contextlib.suppress(OSError), log.open("r+b", buffering=0) as file:
        before = size = file.seek(0, os.SEEK_END)
        try:
            while size < WAL_LIMIT_BYTES:  # (written, and not only reserved: that would cost the same later)
                size += file.write(bytes(min(1024 * 1024, WAL_LIMIT_BYTES - size)))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)


def checkpoint_wal(connection: sqlite3.Connection, *, shrink: bool = False) -> bool:
    """Copy the write-ahead log into the database and begin it anew; with `shrink` its space is given back. False (and a
    warning) if it could not be done."""
    mode = "TRUNCATE" if shrink else "RESTART"
    try:
        [(busy, frames, copied)] = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchall()
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
    else:
        _mark_log(connection)
    return not busy


def find_damage(connection: sqlite3.Connection, limit: int = 10) -> list[str]:
    """What SQLite finds wrong with the file, up to `limit` lines; empty if all is well. Reads the whole file.

    Not ``quick_check``: that of SQLite 3.40 takes sound rows of tables without a rowid for damaged ones.
    """
    try:
        found = [" ".join(str(line).split()) for [line] in connection.execute(f"PRAGMA integrity_check({limit})")]
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        return [str(error)]
    return [] if found == ["ok"] else found


def is_damage(error: sqlite3.Error) -> bool:
    """Whether SQLite says that the file is not what it wrote. (Not that the disk below it can't be read or written.)"""
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


# --- space ------------------------------------------------------------------------------------------


def free_pages(connection: sqlite3.Connection) -> int:
    """How many pages of the file are not used."""
    [count] = connection.execute("PRAGMA freelist_count").fetchone()
    return int(count)


def gives_back_pages(connection: sqlite3.Connection) -> bool:
    """Whether `give_back_pages` does anything: not for files that were made before it was there, until `vacuum`."""
    return bool(connection.execute("PRAGMA auto_vacuum").fetchone() == (2,))


def give_back_pages(connection: sqlite3.Connection, count: int) -> None:
    """Give up to `count` free pages back to the file system, in the caller's transaction or in one of its own."""
    alone = not connection.in_transaction
    if alone:
        connection.execute("BEGIN IMMEDIATE")
    for _ in range(min(count, free_pages(connection))):
        connection.execute("PRAGMA incremental_vacuum(1)")
    if alone:
        commit(connection)


def vacuum(connection: sqlite3.Connection) -> None:
    """Write the whole file anew, without free pages and so that it gives back pages from now on. Takes long, and up to
    twice its size on the disk. Raises `StoreFullError`; the file is then as before."""
    try:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("PRAGMA temp_store = FILE")  # the copy is as large as the database
        connection.execute("VACUUM")
    except sqlite3.OperationalError as error:
        raise (full_disk(error, connection) or error) from error
    finally:
        connection.execute("PRAGMA temp_store = MEMORY")
    checkpoint_wal(connection)


# --- backups ----------------------------------------------------------------------------------------


def back_up(
    connection: sqlite3.Connection,
    target: Path,
    *,
    replace: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    accompany: Callable[[Path], None] = lambda copy: None,
) -> int:
    """Copy the database of `connection` to the file `target`, and return the size of that in bytes.

    `progress` is called after every `STEP_PAGES`, is told how many pages of how many are done, and ends it by raising.
    Meanwhile the connection may be used, also by another thread if that is over when `progress` returns: what it
    commits is in the copy too. The copy has been checked and is durable when it appears under its name; before that
    `accompany` is called with it, to put beside it what belongs to it.

    Raises `PersistenceError` if the target can't be written (see `check_target`), exists (without `replace`) or the
    database is damaged, and `StoreFullError` if the disk of the target is full; then nothing is left behind.
    """
    if connection.in_transaction:
        raise ValueError("commit first: inside of a transaction there is nothing that could be copied")
    source = database_path(connection)
    check_target(target, source, replace=replace)
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    except OSError as error:
        raise PersistenceError(f"{target} can't be written: {error.strerror}") from error
    os.close(handle)
    partial = Path(name)
    try:
        _copy_pages(connection, partial, target, progress)
        _finish_copy(partial, target)
        accompany(partial)
        size = partial.stat().st_size
        check_target(target, source, replace=replace)
        _publish(partial, target, replace=replace)
    finally:
        for left in (partial, Path(f"{partial}-wal"), Path(f"{partial}-shm"), Path(f"{partial}-journal")):
            left.unlink(missing_ok=True)
    return size


def check_target(target: Path, source: str, *, replace: bool) -> None:
    """Raises `PersistenceError` if a backup of the database at `source` can't be written to `target`, as far as one
    sees before. With `replace` too: only a file is replaced, none of the database's own under whatever name, and none
    that another database uses."""
    found: os.stat_result | None = None
    try:
        if not target.parent.is_dir():
            raise PersistenceError(f"{target} can't be written: there is no folder {target.parent}")
        with contextlib.suppress(FileNotFoundError):
            found = target.stat()
    except OSError as error:
        raise PersistenceError(f"{target} can't be written: {error.strerror}") from error
    except ValueError as error:
        raise PersistenceError(f"{str(target)!r} is not the name of a file: {error}") from error
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise PersistenceError(f"{target} is a folder; name a file in it")
    if found is not None and not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no file")
        raise PersistenceError(f"{target} is {kind}; nothing was changed: choose another name")
    real = os.path.realpath(target)
    for own in (source, *(source + added for added in _ALONGSIDE)) if source != MEMORY else ():
        if real == os.path.realpath(own) or (found is not None and _file_id(Path(own)) == (found.st_dev, found.st_ino)):
            what = "the database itself" if own == source else f"{own}, a file of the database itself"
            raise PersistenceError(f"{target} is {what}; nothing was changed: choose another name")
    for added in ("-wal", "-journal", "-mark"):
        with contextlib.suppress(OSError):
            if os.stat(real + added).st_size > 0:
                raise PersistenceError(
                    f"beside {target} lies {real}{added}, so another database is there, or was; nothing was changed: "
                    "choose another name"
                )
    if os.path.lexists(target) and not replace:
        raise _exists(target)


def put_back(backup: Path, database: Path, prepare: Callable[[sqlite3.Connection], None]) -> Path | None:
    """Make the copy `backup` the database at `database`, which nobody has open; where the old one is now, if there was
    one. `prepare` changes the copy before it takes that place.

    Raises `PersistenceError` if the backup is no sound database of ours; nothing is changed then.
    """
    if not backup.is_file():
        raise PersistenceError(f"{backup} is not a file" if backup.exists() else f"there is no file {backup}")
    log = Path(f"{backup}-wal")
    if log.exists() and not log.is_file():
        raise PersistenceError(f"{log} is not a file; nothing was changed: move it away, it is no log of a backup")
    if database.exists() and backup.samefile(database):
        raise PersistenceError(f"{backup} is the database itself; name a backup of it")
    fresh = database.with_name(f".{database.name}.restoring")
    if fresh.exists() and backup.samefile(fresh):
        raise PersistenceError(f"{backup} is what a restore that was interrupted left half done; name a backup")
    for left in (fresh, Path(f"{fresh}-wal")):
        left.unlink(missing_ok=True)
    try:
        _refuse_a_loss(backup)
        # A file that lies alone is read as it is, also where nothing can be written.
        uri = f"file:{quote(os.fspath(backup))}?mode=ro{'' if wal_bytes(backup) else '&immutable=1'}"
        try:
            with closing(sqlite3.connect(uri, uri=True)) as source:
                _recognise(source, backup, may_be_new=False)
                if damage := find_damage(source, 1):
                    raise PersistenceError(
                        f"{backup} is damaged ({damage[0]}); nothing was changed: try another backup"
                    )
                back_up(source, fresh)
        except sqlite3.Error as error:
            raise explain(error, backup) from error
        with closing(open_database(fresh)) as copy:
            prepare(copy)
        return _change_places(fresh, database)
    finally:
        for left in (fresh, Path(f"{fresh}-wal")):
            left.unlink(missing_ok=True)


def rescue(connection: sqlite3.Connection) -> Path:
    """Copy the database of `connection`, whose file was removed, to a new file beside its place; where that is. What
    then lies at its place is refused, until somebody has decided. Raises as `back_up` does."""
    path = Path(database_path(connection))
    copy = _dated(path, _RESCUED)
    back_up(connection, copy)
    begin_note(connection)
    return copy


def _copy_pages(
    connection: sqlite3.Connection, partial: Path, target: Path, progress: Callable[[int, int], None]
) -> None:
    beginnings = 0

    def step(status: int, remaining: int, total: int) -> None:
        nonlocal beginnings
        beginnings += status == sqlite3.SQLITE_OK and total - remaining <= STEP_PAGES
        if beginnings > MAX_COPY_RESTARTS:
            raise PersistenceError(f"{target} was not written: the copy had to begin {beginnings} times; try again")
        progress(total - remaining, total)

    with closing(sqlite3.connect(partial, isolation_level=None)) as copy:
        copy.execute("PRAGMA synchronous = OFF")  # it is synced as a whole
        copy.execute("PRAGMA journal_mode = OFF")
        try:
            connection.backup(copy, pages=STEP_PAGES, progress=step)
        except sqlite3.Error as error:
            raise _failed_copy(error, target) from error


def _finish_copy(partial: Path, target: Path) -> None:
    """Check it, give it a mark of its own and put it on the disk."""
    try:
        with closing(sqlite3.connect(partial, isolation_level=None)) as copy:
            if damage := find_damage(copy, 1):
                raise PersistenceError(
                    f"{target} was not written: the database is damaged ({damage[0]}); "
                    "`prunus broker restore` puts an older backup in its place"
                )
            _mark_log(copy)
        file = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except sqlite3.Error as error:
        raise _failed_copy(error, target) from error
    except OSError as error:
        raise PersistenceError(f"{target} can't be written: {error.strerror}") from error


def _failed_copy(error: sqlite3.Error, target: Path) -> PersistenceError:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return StoreFullError(os.fspath(target))
    return PersistenceError(f"{target} was not written: {error}")


def _publish(partial: Path, target: Path, *, replace: bool) -> None:
    """Give it its name, without taking that of another file."""
    try:
        if replace:
            partial.replace(target)
        else:
            os.link(partial, target)
        _sync_folder(target.parent)
    except FileExistsError:
        raise _exists(target) from None
    except OSError as error:
        raise PersistenceError(f"{target} can't be written: {error.strerror}") from error


def _exists(target: Path) -> PersistenceError:
    return PersistenceError(f"{target} exists already; choose another name (or --force)")


def _change_places(fresh: Path, database: Path) -> Path | None:
    """Whenever this is interrupted, one of the two files has that name. Where there is a note, the old one is refused
    from before its log is moved away."""
    aside = _dated(database, ".before-restore-")
    was_there = database.exists()
    try:
        if was_there:
            with contextlib.suppress(PersistenceError):  # what is in its log goes into the file, if it is sound
                open_database(database).close()
            os.link(database, aside)
        if mark := _mark_in_file(fresh):
            _note(database, mark)
        with contextlib.suppress(FileNotFoundError):
            Path(f"{database}-wal").rename(f"{aside}-wal")
        fresh.replace(database)
        _sync_folder(database.parent)
    except OSError as error:
        raise PersistenceError(f"{database} can't be put aside: {error.strerror}") from error
    return aside if was_there else None


def _dated(database: Path, what: str) -> Path:
    """The place beside a database for what it is or was now; there is nothing yet."""
    first = database.with_name(f"{database.name}{what}{time.strftime('%Y%m%d-%H%M%S')}")
    places = (first if number == 1 else first.with_name(f"{first.name}-{number}") for number in itertools.count(1))
    return next(place for place in places if not place.exists())


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- what belongs together --------------------------------------------------------------------------


class _Mark(NamedTuple):
    """With this a log begins, and its file has it when the log is in there."""

    before: bytes
    """The mark that the file had when the log was begun."""
    own: bytes

    @classmethod
    def at_start_of(cls, data: bytes) -> _Mark | None:
        if len(data) < _MARK_BYTES or not data.startswith(_MARK):
            return None
        own_at = _MARK_BYTES - _MARK_ID_BYTES
        return cls(data[len(_MARK) : own_at], data[own_at:_MARK_BYTES])

    @property
    def data(self) -> bytes:
        return _MARK + self.before + self.own


_UNMARKED = _Mark(bytes(_MARK_ID_BYTES), bytes(_MARK_ID_BYTES))
"""Of a file into which no log was put yet."""


def begin_note(connection: sqlite3.Connection) -> None:
    """Have the marks of the database noted beside it, from now on and by whoever opens it. Not being able to is no
    harm."""
    path = Path(database_path(connection))
    with contextlib.suppress(OSError):  # (one that is there is kept by `_mark_log`)
        os.close(os.open(_note_path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        _note(path, _mark_of(connection) or _UNMARKED)
        _sync_folder(path.parent)


def was_made(path: Path) -> bool:
    """Whether there is a database at `path`, or should be one."""
    return path.exists() or _noted(path) is not None


def file_ids(path: Path) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Which file lies at `path`, and which one as its log: device and inode, None where there is none. Whoever has them
    open sees by a change that they were removed, moved or replaced."""
    return _file_id(path), _file_id(Path(f"{path}-wal"))


def _file_id(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _refuse_a_loss(path: Path) -> None:
    """Raises `PersistenceError` if database, log and note at `path` do not belong together. Looks only."""
    log, note, noted = Path(f"{path}-wal"), _note_path(path), _noted(path)
    has_log = wal_bytes(path) > 0
    backup = max(path.parent.glob(f"{glob.escape(path.name)}{_RESCUED}*[0-9]"), default="FILE")
    restore = f"restore a backup (`prunus broker restore {backup}`)"
    if not path.exists() or path.stat().st_size == 0:
        lost = "empty" if path.exists() else "gone"
        if has_log:
            raise PersistenceError(
                f"{path} is {lost}, but its log {log} is not; nothing was changed: put the file back, or {restore}"
            )
        if noted:
            raise PersistenceError(
                f"{path} is {lost}, but it was a database once ({note} tells); nothing was changed: put the file back, "
                f"or {restore}, or begin anew, without what was in it (`rm {note}`)"
            )
    elif has_log or noted:
        in_file, in_log = _mark_in_file(path), _mark_in_log(log) if has_log else None
        if has_log and in_file == _UNMARKED:  # nobody knows: a part of the log may have been put into the file
            in_file = None
        last = in_log or in_file
        if in_file and in_log and in_file.own not in in_log:
            moved = shlex.quote(str(_dated(path, ".moved-")))
            raise PersistenceError(
                f"the log {log} belongs to another file than {path}, which was replaced (by a copy or a backup); "
                "together they would be damaged, and nothing was changed: put the file back that belongs to the log; "
                f"or {restore}; or go on with the file that is there, without what is in the log: "
                f"`mv {shlex.quote(str(path))} {moved} && prunus broker restore {moved}`"
            )
        if last and noted and noted.own not in last:
            raise PersistenceError(
                f"what was committed last to {path} is lost: its log {log} was removed or damaged; nothing was "
                f"changed: put the log back, or {restore}, or go on without what is lost (`rm {note}`)"
                if last.own == noted.before
                else f"{path} is not the database that was there last, or an older copy of it; nothing was changed: "
                f"put that one back, or {restore}, or take it as it is (`rm {note}`)"
            )


def _mark_log(connection: sqlite3.Connection) -> None:
    """Begin the log, which is empty, with a mark, and note that. Not being able to (on a full disk) is no harm."""
    path = Path(database_path(connection))
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE IF NOT EXISTS log_mark (id INTEGER PRIMARY KEY, mark BLOB NOT NULL)")
        last = _mark_of(connection) or _UNMARKED
        # Though it was noted when it was made: had that failed, nobody would know what is on the disk.
        if not _note(path, last):
            connection.execute("ROLLBACK")
            return
        mark = _Mark(last.own, os.urandom(_MARK_ID_BYTES))
        connection.execute("INSERT OR REPLACE INTO log_mark VALUES (1, ?)", (mark.data,))
        connection.execute("COMMIT")
        _note(path, mark)
    except sqlite3.OperationalError as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if full_disk(error, connection) is None:
            raise


def _mark_of(connection: sqlite3.Connection) -> _Mark | None:
    """The last mark; None if what is there is none."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'log_mark'").fetchone() is None:
        return _UNMARKED
    [found] = connection.execute("SELECT mark FROM log_mark").fetchone() or [None]
    return _Mark.at_start_of(found) if isinstance(found, bytes) else None


def _mark_in_file(path: Path) -> _Mark | None:
    """The last mark that is in the file itself, whatever is in its log; None if there is none that can be read."""
    uri = f"file:{quote(os.fspath(path))}?mode=ro&immutable=1"  # without its log, and without locks
    try:
        with closing(sqlite3.connect(uri, uri=True)) as file:
            return _mark_of(file)
    except sqlite3.Error:
        return None


def _mark_in_log(log: Path) -> _Mark | None:
    """The mark with which a log begins; None if it begins with none.

    The format: https://www.sqlite.org/fileformat2.html#the_write_ahead_log
    """
    with log.open("rb") as file:
        header = file.read(32)
        if len(header) < 32:
            return None
        magic, _, page_size = struct.unpack(">3I", header[:12])
        order = ">" if magic & 1 else "<"
        sums = _log_sums(header[:24], (0, 0), order)
        if magic & ~1 != 0x377F0682 or page_size > 65_536 or sums != struct.unpack(">2I", header[24:]):
            return None
        for _ in range(_MARK_FRAMES):
            frame = file.read(24 + page_size)
            if len(frame) < 24 + page_size or frame[8:16] != header[16:24]:
                break
            sums = _log_sums(frame[24:], _log_sums(frame[:8], sums, order), order)
            if sums != struct.unpack(">2I", frame[16:24]):
                break
            if (at := frame.find(_MARK, 24)) >= 0:
                return _Mark.at_start_of(frame[at:])
            if frame[4:8] != bytes(4):  # the end of the first transaction
                break
    return None


def _note_path(path: Path) -> Path:
    return Path(f"{path}-mark")


def _note(path: Path, mark: _Mark) -> bool:
    """Write down, where there is a note, that the database at `path` has this mark; False if that did not succeed.

    In place: it is so short that no disk writes a part of it, and needs no space.
    """
    data = mark.data + zlib.crc32(mark.data).to_bytes(4)
    try:
        file = os.open(_note_path(path), os.O_WRONLY | os.O_CLOEXEC)
        try:
            written = os.pwrite(file, data, 0)
            os.fsync(file)
        finally:
            os.close(file)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return written == len(data)


def _noted(path: Path) -> _Mark | None:
    """The mark that the database at `path` had last, or the one before it; None if nobody knows."""
    try:
        data = _note_path(path).read_bytes()
    except OSError:
        return None
    mark = _Mark.at_start_of(data)
    return mark if mark and data[_MARK_BYTES : _MARK_BYTES + 4] == zlib.crc32(mark.data).to_bytes(4) else None


def _log_sums(data: bytes, sums: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = sums
    words = iter(struct.unpack(f"{order}{len(data) // 4}I", data))
    for one, two in zip(words, words, strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second


# --- opening ----------------------------------------------------------------------------------------


def _recognise(connection: sqlite3.Connection, path: str | os.PathLike[str], *, may_be_new: bool = True) -> None:
    """Say of a new database that it is ours; refuse one that is not, before anything in it is changed."""
    [[application_id]] = connection.execute("PRAGMA application_id").fetchall()
    [[version]] = connection.execute("PRAGMA user_version").fetchall()
    [[tables]] = connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
    if may_be_new and (application_id, version, tables) == (0, 0, 0):
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
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
        "temp_store": 2,  # MEMORY: else what a savepoint may have to undo is written to a file, page by page
        "foreign_keys": 1,
        "trusted_schema": 0,
        "wal_autocheckpoint": 0,
        "journal_size_limit": WAL_LIMIT_BYTES,
        "fullfsync": 1,  # a plain fsync on macOS leaves the data in the drive's cache
        "checkpoint_fullfsync": 1,
    }
    for name, value in wanted.items():
        # To its last step: the change of journal_mode returns its row first, and may fail after that.
        connection.execute(f"PRAGMA {name} = {value}").fetchall()
    if exclusive:  # takes the lock now, and keeps it
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("COMMIT")
    for name, value in wanted.items():
        [[found]] = connection.execute(f"PRAGMA {name}").fetchall() or [[None]]
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
    _sync_folder(path.parent)


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


def explain(error: sqlite3.Error, path: str | os.PathLike[str]) -> PersistenceError:
    """An error of SQLite about the file at `path`, with what to do."""
    match getattr(error, "sqlite_errorname", None):
        case "SQLITE_BUSY" | "SQLITE_LOCKED":
            return PersistenceError(f"another program has {path} open; is a daemon running? (`prunus daemon status`)")
        case "SQLITE_NOTADB":
            return PersistenceError(
                f"{path} is no database, or its beginning is damaged; nothing was changed: choose another file, or "
                "restore a backup (`prunus broker restore FILE`)"
            )
        case "SQLITE_FULL":
            return StoreFullError(os.fspath(path))
        case str(name) if name.startswith("SQLITE_IOERR"):
            return PersistenceError(
                f"{path} can't be read or written ({error}): its disk is full or fails; nothing was changed: free some "
                "space, or see to the disk (`df`, `dmesg`), and start again"
            )
        case _:
            return PersistenceError(
                f"{path} can't be used as a database ({error}); nothing was repaired: if the disk is sound, restore a "
                "backup (`prunus broker restore FILE`)"
            )
