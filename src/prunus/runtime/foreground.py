"""Workers of a user's own, beside those of a daemon or without one: ``prunus worker``.

On a host where nobody may run a daemon, one command has to do: where a profile has neither a daemon nor a broker, the
worker starts the broker, in a process of its own, and stops it at its end. As long as it works it looks after the
broker: when that is gone and no daemon runs, it starts another one. So several such workers of a profile need no
order among themselves: when the one that started the broker ends, another one takes that over. Where a daemon
runs, or appears, the broker is the daemon's business.

Each worker has a name that no other of its profile has, `NAME_PREFIX` and a number or a word: it is no worker of the
daemon, which neither counts nor stops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from prunus.errors import DaemonError, PrunusError
from prunus.messaging.keys import ClientKey
from prunus.runtime.locks import ServiceLock, read_holder
from prunus.runtime.logs import last_lines, open_log
from prunus.runtime.profile import Profile
from prunus.runtime.supervisor import module_command, working_folder
from prunus.runtime.worker import BROKER_PATIENCE_S, Ended, Settings, serve

NAME_PREFIX = "foreground-"
"""What the names of these workers begin with."""
MAX_NAMES = 1000
"""So many workers without a name of their own can a profile have."""
LOOK_INTERVAL_S = 1.0
"""How often it is looked whether there is a broker."""
BROKER_PAUSE_S = (1.0, 60.0)
"""First and longest pause before a broker that ended is started again."""
END_INTERVAL_S = 0.02
BROKER_END_S = 10.0
"""A broker that was asked to end gets so long; then it is killed, which harms nothing."""

logger = logging.getLogger(__name__)


async def work(
    place: Profile | ClientKey,
    name: str,
    settings: Settings,
    *,
    lock: ServiceLock | None = None,
    say: Callable[[str], None] = logger.info,
    patience_s: float = BROKER_PATIENCE_S,
) -> tuple[Ended, Mapping[str, int] | None]:
    """Be a worker as `worker.serve`, and see to it that a profile has a broker; `say` tells the user of it. `lock` is
    that of its name, which is kept meanwhile."""
    if isinstance(place, ClientKey):
        return await serve(place, name, settings, patience_s=patience_s)
    async with _own_broker(place, say):
        serving = serve(place, name, settings, patience_s=patience_s)
        return await (serving if lock is None else lock.kept(serving))


def free_lock(profile: Profile, name: str | None = None) -> ServiceLock:
    """The lock of a worker of this name, or of the first that is free; held. `DaemonError` if that name is taken."""
    if name is not None:
        lock = ServiceLock(profile.lock(NAME_PREFIX + name))
        lock.acquire()
        return lock
    for number in range(1, MAX_NAMES + 1):
        lock = ServiceLock(profile.lock(f"{NAME_PREFIX}{number}"))
        if not lock.path.exists() or read_holder(lock.path) is None:
            try:
                lock.acquire()
                return lock
            except DaemonError:
                if not lock.path.exists():  # else somebody else was faster
                    raise
    raise DaemonError(f"{MAX_NAMES:,} workers of the profile {profile.name} run in the foreground already")


@contextlib.asynccontextmanager
async def _own_broker(profile: Profile, say: Callable[[str], None]) -> AsyncIterator[None]:
    keeper = BrokerKeeper(profile, say)
    if not keeper.is_superfluous:
        profile.check_keys()
    keeper.look()
    keeping = asyncio.create_task(keeper.keep())
    try:
        yield
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await keeper.leave()


class BrokerKeeper:
    """Sees to it that a profile without a daemon has a broker."""

    def __init__(self, profile: Profile, say: Callable[[str], None]) -> None:
        self._profile, self._say = profile, say
        self._child: subprocess.Popen[bytes] | None = None
        self._started_at = self._start_at = 0.0
        self._pause_s = BROKER_PAUSE_S[0]

    async def keep(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            self.look()

    @property
    def is_superfluous(self) -> bool:
        """Whether there is a broker, or somebody else who would start one."""
        return any(read_holder(self._profile.lock(service)) is not None for service in ("daemon", "broker"))

    def look(self) -> None:
        """Start a broker if there is none, and nobody else who would. What can't be done now is tried again later."""
        profile, now = self._profile, asyncio.get_running_loop().time()
        try:
            if self._child is not None and self._child.poll() is not None:
                self._ended(now)
            if self._child is not None or now < self._start_at or not profile.path.is_dir():
                return
            if self.is_superfluous:
                return
            self._start(now)
        except (OSError, PrunusError) as error:
            logger.error("the broker can't be looked after (%s); trying again in %.0f s", error, self._put_off(now))

    def _start(self, now: float) -> None:
        profile = self._profile
        with open_log(profile.log("broker")) as log:
            self._child = subprocess.Popen(
                module_command("prunus.runtime.broker", profile),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=working_folder(profile),
                start_new_session=True,  # Ctrl-C is for the worker
            )
        self._started_at = now
        self._say(
            f"No broker runs for the profile {profile.name}: this worker has started one (pid {self._child.pid}), and "
            "stops it when it ends."
        )

    def _ended(self, now: float) -> None:
        child, self._child = self._child, None
        assert child is not None, "a child has ended"
        if read_holder(self._profile.lock("broker")) is not None:  # somebody else's was faster
            return
        if now - self._started_at > BROKER_PAUSE_S[1]:  # it was healthy
            self._pause_s = BROKER_PAUSE_S[0]
        pause_s = self._put_off(now)
        said = last_lines(self._profile.log("broker"), 1) if self._profile.path.is_dir() else []
        logger.error(
            "the broker (pid %d) has ended with exit code %d. It is started again in %.0f s. %s",
            child.pid,
            child.returncode,
            pause_s,
            f"It said: {said[0]}" if said else "",
        )

    def _put_off(self, now: float) -> float:
        """Do nothing for a while, which grows; returns for how many seconds."""
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, BROKER_PAUSE_S[1])
        self._start_at = now + pause_s
        return pause_s

    async def leave(self) -> None:
        """Stop the broker that this worker started, unless a daemon runs by now: then it is the daemon's."""
        child, self._child = self._child, None
        if child is None or child.poll() is not None:
            return
        if self._profile.path.is_dir() and read_holder(self._profile.lock("daemon")) is not None:
            logger.info("a daemon runs by now: the broker (pid %d) is left to it", child.pid)
            child.returncode = 0  # nobody waits for it here
            return
        child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + BROKER_END_S
        while child.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110 (nothing sets an event)
            await asyncio.sleep(END_INTERVAL_S)
        child.kill()  # does nothing to one that has ended
        child.wait()


def import_folders(place: Profile | ClientKey) -> list[Path]:
    """Where classes are imported from, the first place first: the current folder, and those of the profile."""
    folders = [] if isinstance(place, ClientKey) else place.import_folders
    return [Path.cwd(), *(folder for folder in folders if folder != Path.cwd())]
