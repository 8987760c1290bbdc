"""Who is the broker, the daemon, worker-1 of a profile: one lock file a service, held for life.

The `flock` alone decides; the kernel gives it back when its holder ends, however it ends. What the file says
(`Holder`) is for people and for a supervisor that wants to know whom to watch: it counts only while the lock is
held and the process that it names is the one that wrote it, so an old file and a pid that was given to somebody
else mean nothing.

Prunus never removes a lock file: two processes would otherwise hold "the" lock on two files. Others may, so whoever
holds a lock looks now and then whether its file is in its place, and takes the lock on a new one if it is not
(`ServiceLock.renew`). Until then the daemon holds the folder of the profile too, so that there is no moment in which a
second one could start.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import time
import weakref
from collections.abc import Awaitable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from prunus.errors import DaemonError
from prunus.files import why_refused

PATIENCE_S = 5.0
"""A lock that is held by nobody in particular (somebody looks at it, or has not written its name yet) is asked for
again during this time."""
POLL_INTERVAL_S = 0.005
RENEW_INTERVAL_S = 1.0
"""How often a holder looks whether its file is in its place."""
_HAS_PROC = Path("/proc/self/stat").exists()

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Holder(msgspec.Struct, frozen=True):
    """The process that holds a lock."""

    name: str
    pid: int
    started: float
    """When the process was started (`start_time`): with the pid it names one process."""
    since: float
    """Wall clock, seconds since 1970: when it took the lock; for showing only."""


class ServiceLock:
    """The right to be the service that the file is named after. Given back by `release` or by the end of the process;
    a forked child has no part in it."""

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        """With `folder`, which is there for good, nobody else gets the lock of it and this file even when the file was
        removed."""
        self.path = path
        self.folder = folder
        self._since = 0.0
        self._fd: int | None = None
        self._folder_fd: int | None = None

    def acquire(self) -> None:
        """Take the lock; `DaemonError` that names the holder if it is taken."""
        if self._fd is not None:
            raise ValueError(f"{self.path} is held already")
        deadline = time.monotonic() + PATIENCE_S
        try:
            if self.folder is not None:
                self._folder_fd = _open_folder(self.folder)
                self._wait_for(self._folder_fd, deadline)
            self._fd = _open(self.path)
            self._wait_for(self._fd, deadline)
            self._since = time.time()
            self._sign(self._fd)
        except BaseException:
            self._close()
            raise
        _held.add(self)

    def _wait_for(self, fd: int, deadline: float) -> None:
        while not _lock(fd, fcntl.LOCK_EX):
            holder = _holder_in(self.path)
            if holder is not None or time.monotonic() > deadline:
                raise _taken(self.path, holder)
            time.sleep(POLL_INTERVAL_S)

    def renew(self) -> None:
        """Where somebody has removed the file, or put another one there, hold the lock on one that is in its place."""
        if self._fd is None or _is_at(self._fd, self.path):
            return
        try:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            fd = _open(self.path)
        except (OSError, DaemonError):  # the profile was deleted, or the disk is full: later, if at all
            return
        try:
            if not _lock(fd, fcntl.LOCK_EX):
                return  # by somebody who looks at it, or by another one, whom its holder has to refuse
            self._sign(fd)
        except DaemonError:
            return
        else:
            self._fd, fd = fd, self._fd
            logger.warning("the lock file %s was removed; it is there again, and held as before", self.path)
        finally:
            os.close(fd)

    async def kept(self, work: Awaitable[T]) -> T:
        """What `work` gives; meanwhile the lock is renewed where that is needed."""

        async def look() -> None:
            while True:
                await asyncio.sleep(RENEW_INTERVAL_S)
                self.renew()

        looking = asyncio.create_task(look())
        try:
            return await work
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    def release(self) -> None:
        """Give it back. Idempotent."""
        _held.discard(self)
        if self._fd is not None:
            os.ftruncate(self._fd, 0)
        self._close()

    def _sign(self, fd: int) -> None:
        """Write down who holds this lock."""
        pid = os.getpid()
        me = Holder(name=self.path.stem, pid=pid, started=start_time(pid) or 0.0, since=self._since)
        os.ftruncate(fd, 0)
        try:
            os.pwrite(fd, msgspec.json.encode(me), 0)
        except OSError as error:  # a full disk
            raise DaemonError(f"the lock file {self.path} can't be written: {error.strerror}") from error

    def _close(self) -> None:
        for fd in (self._fd, self._folder_fd):
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._fd = self._folder_fd = None

    def __enter__(self) -> ServiceLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def read_holder(path: Path) -> Holder | None:
    """Who holds this lock, or None if nobody does. `DaemonError` if somebody does who can't be named."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DaemonError(f"the lock file {path} can't be read: {why_refused(path, error)}") from error
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _lock(fd, fcntl.LOCK_SH):
            if (holder := _written(fd)) is not None:
                return holder
            if time.monotonic() > deadline:
                raise _taken(path, None)
            time.sleep(POLL_INTERVAL_S)
        return None
    finally:
        os.close(fd)


def start_time(pid: int) -> float | None:
    """When this process was started, or None if it does not run. Two processes of one pid have different ones."""
    if _HAS_PROC:
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return None
        return None if fields[0] in (b"Z", b"X") else float(fields[19])
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise DaemonError(f"the lock file {path} can't be opened: {why_refused(path, error)}") from error


def _open_folder(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise DaemonError(f"the folder {path} can't be opened: {error.strerror}") from error


def _is_at(fd: int, path: Path) -> bool:
    """Whether this is the file at `path`; also if that can't be seen at the moment."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _holder_in(path: Path) -> Holder | None:
    """What the file at `path` says, if there is one, and if the process that wrote it runs."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _written(fd)
    finally:
        os.close(fd)


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise DaemonError(
            f"this file system has no locks ({error.strerror}); keep the profile on a local disk"
        ) from error
    return True


def _written(fd: int) -> Holder | None:
    """What the file says, if the process that wrote it runs."""
    try:
        holder = msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
    except msgspec.MsgspecError:
        return None
    return holder if holder.pid > 0 and start_time(holder.pid) == holder.started else None


def _taken(path: Path, holder: Holder | None) -> DaemonError:
    if holder is None:
        return DaemonError(f"somebody holds {path} and does not say who; `fuser {path}` shows the process")
    return DaemonError(
        f"the {holder.name} of this profile runs already (pid {holder.pid}); `prunus daemon stop` stops it"
    )


_held: weakref.WeakSet[ServiceLock] = weakref.WeakSet()


def _let_go_in_child() -> None:
    # An inherited descriptor would keep the lock alive after its holder has died.
    for lock in list(_held):
        lock._close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
