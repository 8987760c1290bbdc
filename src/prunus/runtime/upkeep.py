"""What is done for a broker's database on the side, while it serves: backups, checks, giving back space.

A request of the owner of the profile (`Request`, said through `Communicator.call`) is answered at once. A backup is
copied between two batches, `TURN_S` at a time, and whoever asked for it asks how far it is; the other requests are done
in the batch that they come in, in portions that are small enough for that.

What concerns one file and no running broker (`back_up`, `restore`, `check`) is here as well, for the command line.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import assert_never
from urllib.parse import quote

import msgspec

from prunus.errors import (
    BlobDamagedError,
    BlobNotFoundError,
    BusyError,
    Failure,
    PersistenceError,
    ProtocolError,
    PrunusError,
    StoreFullError,
)
from prunus.messaging.blobs import BlobStore
from prunus.messaging.exchange import Served
from prunus.messaging.taskstore import TaskStore, needed_blobs
from prunus.persistence import database
from prunus.persistence.sqlite import ProcessStore
from prunus.runtime.locks import ServiceLock
from prunus.runtime.profile import Profile

PREFIX = b"upkeep:"
"""What distinguishes these requests from those about processes."""
TURN_S = 0.002
"""How long a backup is copied between two batches."""
ASK_INTERVAL_S = 0.005
"""How often whoever waits for a backup asks how far it is: that also gives an idle broker something to do."""
PAGES_AT_ONCE = 250
"""Pages that are given back in one batch: about 20 ms."""
MANY_FREE_PAGES = 2_500
"""So many free pages are given back without being asked, if they are also `MUCH_FREE` of the file."""
MUCH_FREE = 0.25
SPARE_BYTES = 8 * 1024 * 1024
"""What a backup leaves free on the disk of the database."""
CHECKED_WHILE_SERVING_BYTES = 512 * 1024 * 1024
"""A larger database is not checked while it serves: the broker would stand still for more than about half a second."""
RESTORED_EPOCHS = 1_000_000
"""By so much epochs rise with a restored backup: none that was given after it was made is given again."""

_OWN_FILES = ("config.yaml", ".gitignore", "ballast")
_OWN_FOLDERS = ("blobs", "keys", "logs", "run")
"""Of a profile, beside its database and whatever has a name that begins like that of the database."""

logger = logging.getLogger(__name__)


class BackUp(msgspec.Struct, frozen=True, tag="back_up"):
    """Begin to copy the database to `file`, an absolute path on the broker's host; answered with `Copying`."""

    file: str
    replace: bool = False


class CopyAsk(msgspec.Struct, frozen=True, tag="copy_ask"):
    """How far is the last backup? Answered with `Copying`."""


class GiveBack(msgspec.Struct, frozen=True, tag="give_back"):
    """Give up to `PAGES_AT_ONCE` free pages back to the file system; answered with `Space`."""


class Check(msgspec.Struct, frozen=True, tag="check"):
    """Read the whole file; answered with what is wrong (a list of strings)."""


Request = BackUp | CopyAsk | GiveBack | Check


class Copying(msgspec.Struct, frozen=True, kw_only=True):
    """How far a backup is."""

    file: str
    done: int = 0
    """Pages ..."""
    total: int = 0
    """... of so many; 0: not begun yet."""
    size: int | None = None
    """Of the file in bytes, when it is there."""
    failure: Failure | None = None
    """Why there is none."""


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """What could be given back."""

    given: int = 0
    """Pages that this request gave back."""
    free_pages: int
    page_bytes: int
    gives_back: bool
    """False: the file was made by an older version, and has to be vacuumed as a whole (without a daemon)."""


def blobs_of_backup(file: Path) -> Path:
    """The folder beside a backup with the blobs that its tasks refer to; it is there if there are any."""
    return file.with_name(f"{file.name}.blobs")


class _StoppedError(Exception):
    """The broker ends."""


class _Copy:
    """A backup that is made in turns. SQLite's call for it returns when all is copied: so it has a thread of its own,
    which uses the connection only while the other one waits in `turn`."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        blobs: BlobStore | None,
        request: BackUp,
        leave_space: Callable[[Path, int], None],
    ) -> None:
        self.now = Copying(file=request.file)
        """How far it is."""
        self._connection, self._blobs, self._request, self._leave_space = connection, blobs, request, leave_space
        self._begins, self._ends = threading.Semaphore(0), threading.Semaphore(0)
        self._is_copying, self._is_stopped = True, False
        self._thread = threading.Thread(target=self._run, name="prunus-backup", daemon=True)
        self._thread.start()

    @property
    def is_going_on(self) -> bool:
        return self._thread.is_alive()

    def turn(self) -> None:
        """Copy for `TURN_S`. The connection must be in no transaction."""
        until = time.monotonic() + TURN_S
        while self._is_copying and time.monotonic() < until:
            self._begins.release()
            self._ends.acquire()

    def stop(self) -> None:
        """End it; what was written is removed."""
        self._is_stopped = True
        self._begins.release()
        self._thread.join()

    def _run(self) -> None:
        target = Path(self._request.file)
        try:
            self._wait_for_turn()
            size = _back_up(
                self._connection, self._blobs, target, self._request.replace, self._progress, self._each_chunk
            )
            self.now = Copying(file=self._request.file, done=1, total=1, size=size)
        except _StoppedError:
            error = PersistenceError(f"{target} was not written: the broker ended; ask again when it is back")
            self.now = Copying(file=self._request.file, failure=Failure.of(error))
        except Exception as error:  # the outermost place of this thread: whoever asked is told
            self.now = Copying(file=self._request.file, failure=Failure.of(error))
        finally:
            self._is_copying = False
            self._ends.release()

    def _progress(self, done: int, total: int) -> None:
        self.now = Copying(file=self._request.file, done=done, total=total)
        self._leave_space(Path(self._request.file), 0)
        if done < total:
            self._ends.release()
            self._wait_for_turn()
        else:  # what follows does not need the connection
            self._is_copying = False
            self._ends.release()

    def _each_chunk(self, size: int) -> None:
        if self._is_stopped:
            raise _StoppedError
        self._leave_space(Path(self._request.file), size)

    def _wait_for_turn(self) -> None:
        self._begins.acquire()
        if self._is_stopped:
            raise _StoppedError


class Upkeep:
    """The side of the broker. One connection and one store of blobs, those of the broker."""

    def __init__(self, connection: sqlite3.Connection, blobs: BlobStore | None = None) -> None:
        self._connection, self._blobs = connection, blobs
        self._path = Path(database.database_path(connection))
        self._copy: _Copy | None = None

    def execute(self, data: bytes) -> Served:
        """Answer a request, in the open transaction. Raises `PersistenceError`, `BusyError` and `ProtocolError`."""
        try:
            request = _requests.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"these bytes ask for no upkeep: {error}") from error
        match request:
            case BackUp():
                return _answer(self._begin_copy(request))
            case CopyAsk():
                if self._copy is None:
                    raise PersistenceError("no backup was made since the broker started; ask for one again")
                return _answer(self._copy.now)
            case GiveBack():
                return _answer(self._give_back(), wrote=True)
            case Check():
                return _answer(self._check())
            case _:
                assert_never(request)

    @property
    def is_copying(self) -> bool:
        """Whether a backup is being written."""
        return self._copy is not None and self._copy.is_going_on

    def turn(self) -> None:
        """Go on with what is going on. Between two batches."""
        if self._copy is not None:
            self._copy.turn()

    def give_back(self) -> None:
        """Give back some pages, if many are free. Between two batches."""
        if not database.gives_back_pages(self._connection):
            return
        free = database.free_pages(self._connection)
        [pages] = self._connection.execute("PRAGMA page_count").fetchone()
        if free > MANY_FREE_PAGES and free > MUCH_FREE * pages:
            database.give_back_pages(self._connection, PAGES_AT_ONCE)

    def stop(self) -> None:
        """End what runs; before the connection is closed."""
        if self._copy is not None:
            self._copy.stop()

    def _give_back(self) -> Space:
        before = space_of(self._connection)
        if not before.gives_back:
            return before
        database.give_back_pages(self._connection, PAGES_AT_ONCE)
        after = space_of(self._connection)
        return msgspec.structs.replace(after, given=before.free_pages - after.free_pages)

    def _begin_copy(self, request: BackUp) -> Copying:
        if self._copy is not None and self.is_copying:
            raise BusyError(f"a backup to {self._copy.now.file} is being written; try again when it is there")
        target = Path(request.file)
        if not target.is_absolute():
            raise PersistenceError(f"{target} is no absolute path; the broker does not know your folder")
        _check_target(target, self._path, replace=request.replace)
        [pages] = self._connection.execute("PRAGMA page_count").fetchone()
        self._leave_space(target, pages * space_of(self._connection).page_bytes)
        self._copy = _Copy(self._connection, self._blobs, request, self._leave_space)
        return self._copy.now

    def _leave_space(self, target: Path, size: int) -> None:
        """The disk of the database must not run full of its backups."""
        try:
            status = os.statvfs(target.parent)
            spare = SPARE_BYTES if target.parent.stat().st_dev == self._path.stat().st_dev else 0
        except OSError as error:
            raise PersistenceError(f"{target} can't be written: {error.strerror}") from error
        if status.f_bavail * status.f_frsize < size + spare:
            raise StoreFullError(str(target))

    def _check(self) -> list[str]:
        size = self._path.stat().st_size
        if size > CHECKED_WHILE_SERVING_BYTES:
            raise PersistenceError(
                f"{self._path} is too large to be checked while it serves ({size:,} bytes): `prunus broker backup "
                "FILE` checks what it copies, and after `prunus daemon stop` `prunus doctor` checks the file"
            )
        return database.find_damage(self._connection)


# --- from outside -----------------------------------------------------------------------------------


def encode(request: Request) -> bytes:
    """The bytes that ask a broker's service for this."""
    return PREFIX + msgspec.msgpack.encode(request)


def decode_copying(answer: bytes) -> Copying:
    return msgspec.msgpack.decode(answer, type=Copying)


def decode_space(answer: bytes) -> Space:
    return msgspec.msgpack.decode(answer, type=Space)


def decode_damage(answer: bytes) -> list[str]:
    return msgspec.msgpack.decode(answer, type=list[str])


def space_of(connection: sqlite3.Connection) -> Space:
    """What of the file is free."""
    [page_bytes] = connection.execute("PRAGMA page_size").fetchone()
    return Space(
        free_pages=database.free_pages(connection),
        page_bytes=page_bytes,
        gives_back=database.gives_back_pages(connection),
    )


def back_up(profile: Profile, target: Path, *, replace: bool, progress: Callable[[int, int], None]) -> int:
    """Copy the database of a profile that has no broker; the size of the copy in bytes."""
    _check_target(target, profile.database, replace=replace)
    with _alone(profile), closing(_open(profile)) as connection:
        blobs = BlobStore(profile.blobs, time.monotonic())
        return _back_up(connection, blobs, target, replace, progress, lambda size: None)


def vacuum(profile: Profile) -> tuple[int, int]:
    """Write the database of a profile that has no broker anew; its size in bytes before and after."""
    with _alone(profile):
        before = profile.database.stat().st_size if profile.database.exists() else 0
        with closing(_open(profile)) as connection:
            database.vacuum(connection)
        return before, profile.database.stat().st_size


def check(profile: Profile) -> list[str]:
    """What is wrong with the database of a profile that has no broker. Raises `PersistenceError` if it can't be used at
    all."""
    with _alone(profile), closing(_open(profile)) as connection:
        return database.find_damage(connection)


def restore(profile: Profile, backup: Path) -> Path | None:
    """Put a backup in the place of the database of a profile that has no daemon and no broker; where that is now.

    The blobs that its tasks refer to are put into the profile first. Raises `PersistenceError`.
    """

    def prepare(connection: sqlite3.Connection) -> None:
        blobs = BlobStore(profile.blobs, time.monotonic())
        beside = BlobStore(blobs_of_backup(backup), time.monotonic())
        lacking = [digest for digest, size in needed_blobs(connection) if blobs.size(digest) != size]
        if lacking and not blobs_of_backup(backup).is_dir():
            raise PersistenceError(
                f"tasks in {backup} refer to blobs that are in the folder {blobs_of_backup(backup)}, which is not "
                "there; nothing was changed: put it beside the backup"
            )
        _copy_blobs(beside, blobs, lacking)
        connection.execute("BEGIN IMMEDIATE")
        ProcessStore(connection).raise_epochs(RESTORED_EPOCHS)
        TaskStore(connection).raise_broker_epoch(RESTORED_EPOCHS)
        database.commit(connection)

    with ServiceLock(profile.lock("daemon"), profile.path), _alone(profile):
        return database.put_back(backup, profile.database, prepare)


def _back_up(
    connection: sqlite3.Connection,
    blobs: BlobStore | None,
    target: Path,
    replace: bool,
    progress: Callable[[int, int], None],
    each_chunk: Callable[[int], None],
) -> int:
    """Copy the database, and the blobs that the copied tasks refer to: these are there when the file appears. The size
    of the file. `each_chunk` is told how many bytes come next, and ends it by raising."""
    source = Path(database.database_path(connection))
    _check_target(target, source, replace=replace)
    folder = blobs_of_backup(target)
    was_there = folder.exists()
    needed: list[str] = []

    def copy_blobs(copy: Path) -> None:
        with closing(sqlite3.connect(f"file:{quote(os.fspath(copy))}?mode=ro&immutable=1", uri=True)) as copied:
            needed.extend(digest for digest, _ in needed_blobs(copied))
        _check_target(target, source, replace=replace)
        if blobs is not None and needed:
            folder.mkdir(mode=0o700, exist_ok=True)
            _copy_blobs(blobs, BlobStore(folder, time.monotonic()), needed, each_chunk)

    try:
        size = database.back_up(connection, target, replace=replace, progress=progress, accompany=copy_blobs)
    except BaseException:
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if was_there:
        BlobStore(folder, time.monotonic()).keep_only(needed)
    return size


def _check_target(target: Path, source: Path, *, replace: bool) -> None:
    """Raises `PersistenceError` if a backup of the database `source` can't be written to `target`, or if it would take
    the place of something of the profile's own.

    That are its folders `_OWN_FOLDERS` with all that is in them, its `_OWN_FILES`, and in its folder every name that
    begins like that of its database; links to them, and other names of the same files. Also the folder with the blobs
    of a backup has to be a folder, and no link.
    """
    if "\0" in str(target):
        raise PersistenceError(f"{str(target)!r} is not the name of a file; choose another one")
    profile = source.parent
    home = _id_of(profile)
    own_folders = {id for name in _OWN_FOLDERS if (id := _id_of(profile / name)) is not None}

    def is_own(name: str) -> bool:
        return name in (*_OWN_FILES, *_OWN_FOLDERS) or name.removeprefix(".").startswith(source.name)

    def is_inside(path: Path) -> bool:
        """Whether it is a place of the profile's own, whether anything is there or not."""
        return any(
            _id_of(place) in own_folders or (is_own(place.name) and _id_of(place.parent) == home)
            for place in (path, *path.parents)
        )

    def files() -> Iterator[Path]:
        with suppress(OSError):
            yield from (path for path in profile.iterdir() if is_own(path.name))
        for name in ("keys", "logs", "run"):  # (there may be very many blobs, each with the one name)
            with suppress(OSError):
                yield from (profile / name).iterdir()

    places = {Path(os.path.realpath(target.parent)) / target.name, Path(os.path.realpath(target))}
    found = _id_of(target)
    if any(map(is_inside, places)) or (found is not None and found in map(_id_of, files())):
        raise PersistenceError(
            f"{target} is, or would be, a file of the profile {profile} itself; nothing was changed: choose a name "
            f"outside of it, or one in a folder of your own there (not {', '.join(_OWN_FOLDERS)})"
        )
    database.check_target(target, str(source), replace=replace)
    folder = blobs_of_backup(target)
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise PersistenceError(f"{folder} can't be written: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or is_inside(folder) or _id_of(folder) == home:
        raise PersistenceError(
            f"{folder}, where the bodies of large tasks would go, is not a folder of a backup; nothing was changed: "
            "move it away, or choose another name for the backup"
        )


def _id_of(path: Path) -> tuple[int, int] | None:
    """Which file it is, or leads to: device and inode; None: there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _copy_blobs(
    source: BlobStore, target: BlobStore, digests: list[str], each_chunk: Callable[[int], None] = lambda size: None
) -> None:
    """One that is lost must not keep the others from being copied: its task becomes a dead letter in its turn."""
    for digest in digests:
        try:
            target.copy_from(source, digest, each_chunk)
        except (BlobNotFoundError, BlobDamagedError) as error:
            logger.warning("a blob is left out, and its task will be a dead letter: %s", error)


@contextmanager
def _alone(profile: Profile) -> Iterator[None]:
    """Nobody else is the broker meanwhile; `DaemonError` if somebody is."""
    with ServiceLock(profile.lock("broker")):
        yield


def _open(profile: Profile) -> sqlite3.Connection:
    if not database.was_made(profile.database):
        raise PersistenceError(f"there is no database {profile.database} yet; the first `prunus daemon start` makes it")
    return database.open_database(profile.database)


def raise_failure(copying: Copying) -> None:
    """Raise what made an end of a backup."""
    if copying.failure is not None:
        error = copying.failure.to_exception()
        raise error if isinstance(error, PrunusError) else PersistenceError(str(error))


def _answer(value: object, *, wrote: bool = False) -> Served:
    return Served(answer=msgspec.msgpack.encode(value), wrote=wrote)


_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
