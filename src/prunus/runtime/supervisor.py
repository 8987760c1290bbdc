"""The daemon: keeps one broker and N workers alive, and stops them in the right order.

`Roster` decides and `Supervisor` acts. The roster is told what is wanted and what happened, and says whom to start,
to terminate and to kill; it knows no process and no clock. Its rules:

* a service that ends without being asked is started again, after a pause that doubles with each end that comes too
  soon (`MIN_PAUSE_S` .. `MAX_PAUSE_S`) and starts over when it was healthy for `HEALTHY_S`;
* a service that is not wanted any more is asked to end (SIGTERM) and, after its grace and `KILL_MARGIN_S`, killed;
* the broker is asked last, when no worker is left that could need it.

A supervisor is not needed by what it watches: if it dies, the broker and the workers go on. The next one adopts
whoever holds the locks of the services. The wanted number of workers is in ``run/daemon.json``; SIGHUP makes the
supervisor read it again, SIGTERM and SIGINT make it stop all and end. How a daemon is started, asked and stopped
from outside is in `prunus.runtime.daemon`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec

from prunus.errors import DaemonError, PrunusError
from prunus.runtime.locks import ServiceLock, read_holder, start_time
from prunus.runtime.profile import FOLDER_NAME, Profile

BROKER = "broker"
WORKER_PREFIX = "worker-"
MIN_PAUSE_S = 0.05
MAX_PAUSE_S = 30.0
"""The pause before a service is started again: doubled with each end that comes too soon."""
HEALTHY_S = 5.0
"""A service that ran this long was healthy: its next end is the first one."""
FLAPPING = 5
"""After so many ends that came too soon the log says what follows from it."""
KILL_MARGIN_S = 5.0
"""What a service gets on top of the grace that it gives to running steps, before it is killed."""
WATCH_INTERVAL_S = 0.1
"""How often a process is looked at where the system can't tell us of its end (no pidfd)."""
MAX_LOG_BYTES = 20 * 1024 * 1024
"""A longer log is moved to ``<name>.log.1`` when its service is started."""

log = logging.getLogger("prunus.supervisor")


# --- deciding ---------------------------------------------------------------------------------------


@dataclass
class Service:
    """What the roster knows of one service. Times are of one monotonic clock, in seconds."""

    name: str
    pid: int | None = None
    started_at: float = 0.0
    asked_at: float | None = None
    """When it was asked to end."""
    killed: bool = False
    too_soon: int = 0
    """How often it ended too soon, in a row."""
    start_at: float = 0.0
    """It is not started before."""


@dataclass(frozen=True)
class Ended:
    """What an end means: how long the service ran, and when it is started again (None: it is not wanted)."""

    asked: bool
    ran_s: float
    pause_s: float | None
    flapping: bool


@dataclass(frozen=True)
class Decision:
    """What is to be done now. `wake_at`: when to ask again, if nothing happens before. `done`: all have ended."""

    start: tuple[str, ...] = ()
    terminate: tuple[str, ...] = ()
    kill: tuple[str, ...] = ()
    wake_at: float | None = None
    done: bool = False


@dataclass
class Roster:
    """What is wanted and what is, of all services: decides what to do."""

    grace_s: float
    wanted: tuple[str, ...] = ()
    services: dict[str, Service] = field(default_factory=dict)

    def want(self, names: Iterable[str]) -> None:
        """From now on these, and no others, shall run."""
        self.wanted = tuple(names)

    def started(self, name: str, pid: int, now: float) -> None:
        """It runs: it was started or adopted."""
        service = self.services.setdefault(name, Service(name))
        service.pid, service.started_at, service.asked_at, service.killed = pid, now, None, False

    def failed(self, name: str, now: float) -> Ended:
        """It could not be started at all."""
        self.services.setdefault(name, Service(name)).started_at = now
        return self.ended(name, now)

    def ended(self, name: str, now: float) -> Ended:
        """It does not run any more."""
        service = self.services[name]
        asked, ran_s = service.asked_at is not None, now - service.started_at
        service.too_soon = 0 if asked else 1 if ran_s >= HEALTHY_S else service.too_soon + 1
        pause_s = min(MIN_PAUSE_S * 2 ** (service.too_soon - 1), MAX_PAUSE_S) if service.too_soon else 0.0
        service.pid, service.asked_at, service.killed, service.start_at = None, None, False, now + pause_s
        return Ended(asked, ran_s, pause_s if name in self.wanted else None, service.too_soon >= FLAPPING)

    def decide(self, now: float) -> Decision:
        """What to do now. What is to be terminated or killed counts as done; `started` or `failed` must be said of
        what is to be started."""
        running = [service for service in self.services.values() if service.pid is not None]
        start, terminate, kill, times = [], [], [], []
        for name in self.wanted:
            service = self.services.get(name, Service(name))
            if service.pid is None and service.start_at <= now:
                start.append(name)
            elif service.pid is None:
                times.append(service.start_at)
        for service in running:
            if service.asked_at is None:
                is_needed = service.name == BROKER and len(running) > 1
                if service.name not in self.wanted and not is_needed:
                    service.asked_at = now
                    terminate.append(service.name)
            if service.asked_at is not None and not service.killed:
                deadline = service.asked_at + self.grace_s + KILL_MARGIN_S
                if deadline <= now:
                    service.killed = True
                    kill.append(service.name)
                else:
                    times.append(deadline)
        return Decision(
            start=tuple(start),
            terminate=tuple(terminate),
            kill=tuple(kill),
            wake_at=min(times, default=None),
            done=not self.wanted and not running,
        )


def service_names(workers: int) -> tuple[str, ...]:
    """The services of a daemon with so many workers, in the order in which they start."""
    return (BROKER, *(f"{WORKER_PREFIX}{number}" for number in range(1, workers + 1)))


# --- acting -----------------------------------------------------------------------------------------

CommandFor = Callable[[str], list[str]]


class Supervisor:
    """Runs the services of a profile until it is told to stop.

    `command_for` says which program is the service of a name; it takes the lock ``profile.lock(name)`` itself.
    Whoever runs a supervisor holds the lock "daemon" of the profile.
    """

    def __init__(self, profile: Profile, command_for: CommandFor | None = None) -> None:
        self.profile = profile
        self.command_for = command_for or _command_for(profile)
        self._roster = Roster(profile.config.grace_s)
        self._running: dict[str, _Running] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    def want(self, names: Iterable[str]) -> None:
        """Let these services run, and no others; none at all: stop and return from `run`."""
        self._roster.want(names)
        self._news.set()

    async def run(self) -> None:
        """Adopt what runs, then keep running what is wanted; returns when nothing is wanted and all have ended."""
        self._adopt()
        try:
            while True:
                self._news.clear()
                decision = self._roster.decide(time.monotonic())
                if decision.done:
                    return
                for name in decision.terminate:
                    self._terminate(name)
                for name in decision.kill:
                    self._kill(name)
                for name in decision.start:
                    self._start(name)
                if decision.start:
                    continue  # the start may have failed: ask for the next time
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(_loop_time(decision.wake_at)):
                        await self._news.wait()
        finally:
            for watch in self._watches:
                watch.cancel()
            await asyncio.gather(*self._watches, return_exceptions=True)

    def _adopt(self) -> None:
        """Watch what runs already, be it wanted or not."""
        names = {file.stem for file in self.profile.run_folder.glob("*.lock")}
        for name in sorted(names):
            if name == BROKER or name.startswith(WORKER_PREFIX):
                try:
                    self._adopt_one(name)
                except DaemonError as error:
                    log.error("%s can't be watched: %s", name, error)

    def _adopt_one(self, name: str) -> bool:
        path = self.profile.lock(name)
        holder = read_holder(path)
        if holder is None:
            return False
        running = _Running(name, holder.pid, holder.started)
        if read_holder(path) != holder:  # it ended before we could watch it
            running.close()
            return False
        log.info("%s runs already (pid %d); watching it from now on", name, holder.pid)
        self._watch(running)
        return True

    def _start(self, name: str) -> None:
        try:
            if self._adopt_one(name):  # somebody else was faster
                return
            with open_log(self.profile.log(name)) as output:
                child = subprocess.Popen(
                    self.command_for(name),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=working_folder(self.profile),
                    env={**os.environ, "PRUNUS_PROFILE": str(self.profile.path), "PYTHONUNBUFFERED": "1"},
                    start_new_session=True,
                )
        except (OSError, DaemonError) as error:
            end = self._roster.failed(name, time.monotonic())
            log.error("%s can't be started (%s); trying again in %.2f s", name, error, end.pause_s or 0.0)
            return
        log.info("%s started (pid %d)", name, child.pid)
        self._watch(_Running(name, child.pid, child=child))

    def _terminate(self, name: str) -> None:
        running = self._running[name]
        limit_s = self._roster.grace_s + KILL_MARGIN_S
        log.info("asking %s (pid %d) to end; it is killed if it has not in %.0f s", name, running.pid, limit_s)
        running.send(signal.SIGTERM)

    def _kill(self, name: str) -> None:
        running = self._running[name]
        log.warning(
            "%s (pid %d) did not end in time: killing it. Nothing is lost; its unfinished steps run again later",
            name,
            running.pid,
        )
        running.kill()

    def _watch(self, running: _Running) -> None:
        self._roster.started(running.name, running.pid, time.monotonic())
        self._running[running.name] = running
        watch = asyncio.create_task(self._wait_for_end(running))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    async def _wait_for_end(self, running: _Running) -> None:
        try:
            how = await running.wait()
        finally:
            running.close()
        del self._running[running.name]
        end = self._roster.ended(running.name, time.monotonic())
        what = f"{running.name} (pid {running.pid}) ended {how} after {end.ran_s:.1f} s"
        if end.pause_s is None:
            log.info("%s", what)
        elif end.flapping:
            log.error(
                "%s, too soon once more: something is wrong, see %s. Next try in %.2f s; its work stays queued",
                what,
                self.profile.log(running.name),
                end.pause_s,
            )
        else:
            log.warning("%s without being asked; starting it again in %.2f s", what, end.pause_s)
        self._news.set()


class _Running:
    """A process that we watch: our child, or one that an earlier supervisor started (`child` is None)."""

    def __init__(
        self, name: str, pid: int, started: float | None = None, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.name, self.pid, self._started, self._child = name, pid, started, child
        self._fd: int | None = None
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # an old kernel, or it is gone already: then we look at it by interval
                self._fd = os.pidfd_open(pid)

    async def wait(self) -> str:
        """Wait for its end; returns how it ended, for people."""
        if self._fd is not None:
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(self._fd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(self._fd)
        else:
            while self._is_alive():  # noqa: ASYNC110 (nothing could set an event)
                await asyncio.sleep(WATCH_INTERVAL_S)
        if self._child is None:
            return "(how is not known)"
        # Its own children would go on with work that will be done again. Until `wait` the group is surely its own.
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._child.wait()
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def send(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if it is gone."""
        with contextlib.suppress(OSError):
            if self._child is not None or self._fd is None:
                if self._is_alive():
                    os.kill(self.pid, number)
            else:
                signal.pidfd_send_signal(self._fd, number)

    def kill(self) -> None:
        """Kill it and the processes that it started."""
        with contextlib.suppress(OSError):
            if self._is_alive() and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, signal.SIGKILL)
        self.send(signal.SIGKILL)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _is_alive(self) -> bool:
        started = start_time(self.pid)
        return started is not None and self._started in (None, started)


def open_log(path: Path) -> IO[bytes]:
    """Open a log to append to; one that is too long is put aside first."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_name(path.name + ".1"))
    return path.open("ab")


def working_folder(profile: Profile) -> Path:
    """Where services run: in the project's folder, or in that of a profile that belongs to none."""
    return profile.path.parent if profile.path.name == FOLDER_NAME else profile.path


def module_command(module: str, profile: Profile, *options: str) -> list[str]:
    """A command that runs one of our modules (-P: a file in the current folder can't take the place of a library)."""
    return [sys.executable, "-P", "-m", module, "--profile", str(profile.path), *options]


def _command_for(profile: Profile) -> CommandFor:
    def command_for(name: str) -> list[str]:
        if name == BROKER:
            return module_command("prunus.runtime.broker", profile)
        return module_command("prunus.runtime.worker", profile, "--name", name)

    return command_for


def _loop_time(monotonic: float | None) -> float | None:
    if monotonic is None:
        return None
    return asyncio.get_running_loop().time() + max(0.0, monotonic - time.monotonic())


# --- the wish ---------------------------------------------------------------------------------------


class Wish(msgspec.Struct, frozen=True):
    """What the daemon shall be, as `prunus daemon start` and `scale` wrote it down."""

    workers: int


def read_wish(profile: Profile) -> Wish | None:
    """The wish, or None if there is none: then the configuration counts. `DaemonError` if it can't be read."""
    path = _wish_path(profile)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Wish)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise DaemonError(f"{path} can't be read ({error}); `prunus daemon scale N` writes it anew") from error


def wanted_services(profile: Profile) -> tuple[str, ...]:
    """The services that the daemon of this profile shall have, as the wish or else the configuration says."""
    wish = read_wish(profile)
    return service_names(profile.config.workers if wish is None else wish.workers)


def write_wish(profile: Profile, wish: Wish) -> None:
    """Write it down; the running daemon reads it when it gets SIGHUP."""
    path = _wish_path(profile)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(msgspec.json.encode(wish))
    temporary.replace(path)


def forget_wish(profile: Profile) -> None:
    """The next daemon starts as the configuration says."""
    _wish_path(profile).unlink(missing_ok=True)


def _wish_path(profile: Profile) -> Path:
    return profile.run_folder / "daemon.json"


# --- the program ------------------------------------------------------------------------------------


async def supervise(profile: Profile, command_for: CommandFor | None = None) -> None:
    """Be the daemon of this profile until SIGTERM or SIGINT; `DaemonError` if there is one."""
    supervisor = Supervisor(profile, command_for)
    stopping = False

    def read_again() -> None:
        if stopping:
            return
        try:
            wanted = wanted_services(profile)
        except DaemonError as error:
            log.error("%s; the number of workers stays as it is", error)
            return
        log.info("wanted from now on: %s", ", ".join(wanted))
        supervisor.want(wanted)

    def stop(number: signal.Signals) -> None:
        nonlocal stopping
        log.info("%s: stopping the workers, then the broker", number.name)
        forget_wish(profile)
        stopping = True
        supervisor.want(())

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, read_again)  # whoever sees the lock may send signals at once
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        with ServiceLock(profile.lock("daemon")):
            log.info("the daemon of %s runs (pid %d)", profile.path, os.getpid())
            supervisor.want(wanted_services(profile))
            await supervisor.run()
            log.info("all services have ended; the daemon ends")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


def main(arguments: list[str] | None = None, command_for: CommandFor | None = None) -> int:
    """``python -m prunus.runtime.supervisor --profile PATH``: the daemon, in the foreground."""
    parser = argparse.ArgumentParser(description="The daemon of a Prunus profile, in the foreground.")
    parser.add_argument("--profile", required=True, help="the folder of the profile")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s")
    try:
        asyncio.run(supervise(Profile.load(Path(options.profile)), command_for))
    except PrunusError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
