"""Who is the broker, the daemon, worker-1 of a profile: one lock file a service, held for life.

The `flock` alone decides; the kernel gives it back when its holder ends, however it ends. What the file says
(`Holder`) is for people and for a supervisor that wants to know whom to watch: it counts only while the lock is
held and the process that it names is the one that wrote it, so an old file and a pid that was given to somebody
else mean nothing. Lock files are never removed: two processes would otherwise hold "the" lock on two files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import weakref
from pathlib import Path
from types import TracebackType

import msgspec

from prunus.errors import DaemonError

PATIENCE_S = 5.0
"""A lock that is held by nobody in particular (somebody looks at it, or has not written its name yet) is asked for
again during this time."""
POLL_INTERVAL_S = 0.005
_HAS_PROC = Path("/proc/self/stat").exists()


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

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock; `DaemonError` that names the holder if it is taken."""
        if self._fd is not None:
            raise ValueError(f"{self.path} is held already")
        fd = _open(self.path)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not _lock(fd, fcntl.LOCK_EX):
                holder = _written(fd)
                if holder is not None or time.monotonic() > deadline:
                    raise _taken(self.path, holder)
                time.sleep(POLL_INTERVAL_S)
            me = Holder(name=self.path.stem, pid=os.getpid(), started=start_time(os.getpid()) or 0.0, since=time.time())
            os.ftruncate(fd, 0)
            try:
                os.pwrite(fd, msgspec.json.encode(me), 0)
            except OSError as error:  # a full disk
                raise DaemonError(f"the lock file {self.path} can't be written: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        _held.add(self)

    def release(self) -> None:
        """Give it back. Idempotent."""
        fd, self._fd = self._fd, None
        _held.discard(self)
        if fd is not None:
            os.ftruncate(fd, 0)
            os.close(fd)

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
        raise DaemonError(f"the lock file {path} can't be read: {error.strerror}") from error
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
        raise DaemonError(f"the lock file {path} can't be opened: {error.strerror}") from error


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
        if lock._fd is not None:
            with contextlib.suppress(OSError):
                os.close(lock._fd)
            lock._fd = None
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
