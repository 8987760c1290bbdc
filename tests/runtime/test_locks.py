"""One holder a lock, decided by the kernel; the file is only what people read."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from prunus.errors import DaemonError
from prunus.runtime.locks import Holder, ServiceLock, read_holder, start_time

HOLD = """
import sys, pathlib
from prunus.runtime.locks import ServiceLock
ServiceLock(pathlib.Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holding(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdin
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def test_the_holder_is_named(tmp_path: Path) -> None:
    """While a lock is held everybody can read who holds it, and afterwards that nobody does."""
    path = tmp_path / "broker.lock"
    assert read_holder(path) is None
    with ServiceLock(path):
        holder = read_holder(path)
        assert holder is not None
        assert (holder.name, holder.pid) == ("broker", os.getpid())
        assert holder.started == start_time(os.getpid())
    assert read_holder(path) is None
    assert path.exists()


def test_a_second_holder_is_refused(tmp_path: Path) -> None:
    """Who comes second is told the pid of the first, and what to do."""
    path = tmp_path / "worker-1.lock"
    with holding(path) as process, pytest.raises(DaemonError, match=f"worker-1 .*pid {process.pid}.*daemon stop"):
        ServiceLock(path).acquire()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    """The lock of a process that got SIGKILL is free, whatever the file says."""
    path = tmp_path / "daemon.lock"
    with holding(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert b"daemon" in path.read_bytes()
        assert read_holder(path) is None
        with ServiceLock(path):
            assert read_holder(path) is not None


def test_an_old_file_with_a_reused_pid_is_no_holder(tmp_path: Path) -> None:
    """A file that names a process which lives, but does not hold the lock, means nothing."""
    path = tmp_path / "daemon.lock"
    me = Holder(name="daemon", pid=os.getpid(), started=start_time(os.getpid()) or 0.0, since=0.0)
    path.write_bytes(msgspec.json.encode(me))
    assert read_holder(path) is None


def test_a_file_that_is_not_written_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is held under a file of somebody else's, or none, names no wrong process; it ends in an error."""
    monkeypatch.setattr("prunus.runtime.locks.PATIENCE_S", 0.05)
    path = tmp_path / "daemon.lock"
    with holding(path):
        path.write_bytes(msgspec.json.encode(Holder(name="daemon", pid=os.getpid(), started=1.0, since=0.0)))
        for ask in (read_holder, lambda path: ServiceLock(path).acquire()):
            with pytest.raises(DaemonError, match="does not say who"):
                ask(path)


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A child that outlives the holder does not hold its lock."""
    path = tmp_path / "worker-1.lock"
    lock = ServiceLock(path)
    lock.acquire()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        os.close(write)
        os.read(read, 1)  # until the parent says so
        os._exit(0)
    try:
        lock.release()
        with ServiceLock(path):
            pass
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_a_program_that_is_started_does_not_keep_the_lock(tmp_path: Path) -> None:
    """The descriptor is closed on exec, even where all others are passed on."""
    path = tmp_path / "worker-1.lock"
    lock = ServiceLock(path)
    lock.acquire()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False):
        lock.release()
        assert read_holder(path) is None


def test_acquiring_twice_is_a_mistake(tmp_path: Path) -> None:
    """A lock object is taken once; releasing may be said again."""
    lock = ServiceLock(tmp_path / "x.lock")
    with lock, pytest.raises(ValueError, match="held already"):
        lock.acquire()
    lock.release()


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    """A lock that can't be made names its path."""
    with pytest.raises(DaemonError, match=r"no/x\.lock can't be opened"):
        ServiceLock(tmp_path / "no" / "x.lock").acquire()


@pytest.mark.parametrize("what", ["nothing", "another file", "no folder"])
def test_a_removed_lock_is_renewed(what: str, tmp_path: Path) -> None:
    """Its holder is named again, others are refused again, and at its end it is free."""
    path = tmp_path / "run" / "daemon.lock"
    path.parent.mkdir()
    with ServiceLock(path) as lock:
        taken = read_holder(path)
        path.unlink()
        if what == "no folder":
            path.parent.rmdir()
        elif what == "another file":
            path.write_text("something else")
        assert read_holder(path) is None
        lock.renew()
        holder = read_holder(path)
        assert holder is not None
        assert holder == taken, "it is held as long as before"
        with pytest.raises(DaemonError, match=f"daemon of this profile runs already \\(pid {os.getpid()}\\)"):
            ServiceLock(path).acquire()
        number = path.stat().st_ino
        lock.renew()
        assert path.stat().st_ino == number, "it is in its place"
    assert read_holder(path) is None


def test_a_lock_that_somebody_else_took_meanwhile_is_not_taken_away(tmp_path: Path) -> None:
    """Without a folder that can happen; then each of them holds its own file."""
    path = tmp_path / "daemon.lock"
    with ServiceLock(path) as lock:
        path.unlink()
        with holding(path) as process:
            lock.renew()
            holder = read_holder(path)
            assert holder is not None
            assert holder.pid == process.pid


def test_of_a_deleted_profile_nothing_is_made_again(tmp_path: Path) -> None:
    """Neither a folder nor a file."""
    path = tmp_path / "profile" / "run" / "daemon.lock"
    path.parent.mkdir(parents=True)
    with ServiceLock(path) as lock:
        shutil.rmtree(tmp_path / "profile")
        lock.renew()
        assert not (tmp_path / "profile").exists()


def test_a_removed_lock_with_a_folder_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even before it is renewed; who asks is patient, for then its holder has a name."""
    monkeypatch.setattr("prunus.runtime.locks.PATIENCE_S", 0.05)
    path = tmp_path / "daemon.lock"
    with ServiceLock(path, tmp_path) as lock:
        path.unlink()
        with pytest.raises(DaemonError, match="does not say who"):
            ServiceLock(path, tmp_path).acquire()
        lock.renew()
        with pytest.raises(DaemonError, match="runs already"):
            ServiceLock(path, tmp_path).acquire()
    with ServiceLock(path, tmp_path):
        pass


async def test_a_lock_is_kept_while_something_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked after until that has ended, with its value."""
    monkeypatch.setattr("prunus.runtime.locks.RENEW_INTERVAL_S", 0.001)
    path = tmp_path / "worker-1.lock"

    async def work() -> str:
        path.unlink()
        while read_holder(path) is None:
            await asyncio.sleep(0)
        return "done"

    with ServiceLock(path) as lock:
        assert await lock.kept(work()) == "done"
    assert len(asyncio.all_tasks()) == 1
