"""Which process a session lives in, and the proof that it died.

A lost connection or silence is no proof. That the kernel says so is: on the same host (same boot, same PID namespace)
a pidfd becomes readable the moment the process ends, and the start time tells a process from a later one with its
number. Where this can't be known (another host, not Linux) nothing is claimed and the lease decides.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from functools import lru_cache

from prunus.messaging.messages import Peer

_STARTED_FIELD = 22
"""The start time in ``/proc/<pid>/stat``, in clock ticks since the boot (proc_pid_stat(5))."""
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def this_peer() -> Peer:
    """The process that calls this."""
    pid = os.getpid()
    return Peer(_host(), pid, _started(pid) or 0)


def boottime() -> float:
    """Seconds by a clock that nobody sets and that goes on while the machine sleeps (where there is one: Linux).

    Leases and silences are measured by it: a laptop that slept for hours was silent for hours.
    """
    return time.clock_gettime(_CLOCK)


class Obituaries:
    """Watches the processes of sessions. `fileno` is readable when one of them may have ended."""

    def __init__(self) -> None:
        self._poll = select.epoll() if hasattr(select, "epoll") else None
        self._pidfds: dict[str, int] = {}
        self._sessions: dict[int, str] = {}
        self._dead: list[str] = []

    def fileno(self) -> int | None:
        """To be polled for reading; None where the kernel can't tell."""
        return None if self._poll is None else self._poll.fileno()

    def watch(self, session: str, peer: Peer) -> None:
        """Report `session` when its process is dead (at once if it is already)."""
        self.forget(session)
        if self._poll is None or not peer.host or peer.host != _host():
            return
        try:
            pidfd = os.pidfd_open(peer.pid)
        except (ProcessLookupError, ValueError):
            self._dead.append(session)
            return
        except OSError:  # no pidfd here (an old kernel, no file left): the lease decides
            return
        if _started(peer.pid) != peer.started:  # read after the pidfd was opened: the number can't be reused between
            os.close(pidfd)
            self._dead.append(session)
            return
        self._pidfds[session], self._sessions[pidfd] = pidfd, session
        self._poll.register(pidfd, select.EPOLLIN)

    @property
    def has_news(self) -> bool:
        """Whether `dead` has something to tell of which `fileno` says nothing."""
        return bool(self._dead)

    def forget(self, session: str) -> None:
        """Nobody asks for it any more."""
        pidfd = self._pidfds.pop(session, None)
        if pidfd is not None and self._poll is not None:
            del self._sessions[pidfd]
            self._poll.unregister(pidfd)
            os.close(pidfd)

    def dead(self) -> list[str]:
        """The sessions whose processes ended since the last call."""
        if self._poll is not None:
            for pidfd, _ in self._poll.poll(0):
                session = self._sessions[pidfd]
                self.forget(session)
                self._dead.append(session)
        dead, self._dead = self._dead, []
        return dead

    def close(self) -> None:
        for session in list(self._pidfds):
            self.forget(session)
        if self._poll is not None:
            self._poll.close()


@lru_cache(maxsize=1)
def _host() -> str:
    """The boot and the PID namespace in which the numbers of processes mean something; empty if unknown."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open(f"/proc/{pid}/stat", "rb") as file:
            after_name = file.read().rpartition(b")")[2]  # the name may hold spaces and parentheses
        return int(after_name.split()[_STARTED_FIELD - 3])
    return None
