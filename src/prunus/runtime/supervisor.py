"""The daemon: keeps one broker and N workers alive, and stops them in the right order.

The `Roster` decides (see `prunus.runtime.roster` for its rules) and the `Supervisor` acts. A supervisor is not needed
by what it watches: if it dies, the broker and the workers go on. The next one adopts whoever holds the locks of the
services.

What is wanted is in ``run/daemon.json`` (`prunus.runtime.wish`); SIGHUP makes the supervisor read it again, with the
configuration; SIGTERM and SIGINT make it stop all and end. What became of the services it writes to
``run/services.json`` (`prunus.runtime.services`). How a daemon is started, asked and stopped from outside is in
`prunus.runtime.daemon`.
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
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

import prunus
from prunus.errors import DaemonError, PrunusError
from prunus.runtime import logs, systemd
from prunus.runtime.crashes import EVIDENCE_LINES, Evidence, Messenger
from prunus.runtime.hooks import Hooks
from prunus.runtime.locks import ServiceLock, read_holder, start_time
from prunus.runtime.profile import FOLDER_NAME, Profile
from prunus.runtime.roster import BROKER, KILL_MARGIN_S, Ended, Roster, is_service, service_names
from prunus.runtime.services import (
    MAX_ENDS_NOTED,
    End,
    ServiceNote,
    change_note,
    forget_notes,
    read_notes,
    tell_end,
    write_notes,
)
from prunus.runtime.wish import Wish, forget_wish, read_wish

WATCH_INTERVAL_S = 0.1
"""How often a process is looked at where the system can't tell us of its end (no pidfd)."""
CHECK_INTERVAL_S = 0.2
"""How often the broker is asked during a reload whom it has heard of."""
CHECK_TIMEOUT_S = 2.0
"""A broker that does not answer within this time is asked again."""

log = logging.getLogger("prunus.supervisor")

CommandFor = Callable[[str], list[str]]
WhoServes = Callable[[Profile], Awaitable[frozenset[int]]]
"""The pids of the processes on this host that serve: the broker, and the workers that have called it."""


class Supervisor:
    """Runs the services of a profile until it is told to stop.

    `command_for` says which program is the service of a name; it takes the lock ``profile.lock(name)`` itself.
    Whoever runs a supervisor holds the lock "daemon" of the profile.
    """

    def __init__(
        self, profile: Profile, command_for: CommandFor | None = None, who_serves: WhoServes | None = None
    ) -> None:
        self.profile = profile
        self.command_for = command_for or _command_for(profile)
        self._who_serves = who_serves or _who_serves
        self.hooks = Hooks(profile.config.hooks, {"profile": str(profile.path)}, working_folder(profile))
        self.up = asyncio.Event()
        """Set when all that was wanted first has been started."""
        self._roster = Roster(profile.config.grace_s)
        self._running: dict[str, _Running] = {}
        self._watches: set[asyncio.Task[None]] = set()
        self._flapping: set[str] = set()
        self._news = asyncio.Event()
        self._messenger = Messenger()

    def want(self, names: Iterable[str], *, reloads: int = 0, broker_reloads: int = 0) -> None:
        """Let these services run, and no others, none of them of an older generation than this; none at all: stop and
        return from `run`."""
        self._roster.want(names, workers_generation=reloads, broker_generation=broker_reloads)
        self._news.set()

    def obey(self, wish: Wish) -> tuple[str, ...]:
        """Let run what was asked for; the names of all."""
        names = service_names(self.profile.config.workers if wish.workers is None else wish.workers)
        self.want(names, reloads=wish.reloads, broker_reloads=wish.broker_reloads)
        return names

    def configure(self, profile: Profile) -> None:
        """The configuration was changed: from now on this one counts, for what is started then too."""
        self.profile = profile
        self.hooks.commands = dict(profile.config.hooks)
        self._roster.grace_s = profile.config.grace_s
        self._news.set()

    async def run(self) -> None:
        """Adopt what runs, then keep running what is wanted; returns when nothing is wanted and all have ended."""
        self._adopt()
        checking: asyncio.Task[None] | None = None
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
                if self._roster.wanted and not self.up.is_set():
                    self.up.set()
                if decision.check and (checking is None or checking.done()):
                    checking = asyncio.create_task(self._check(decision.check))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(_loop_time(decision.wake_at)):
                        await self._news.wait()
        finally:
            tasks = [*self._watches, *([checking] if checking is not None else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._messenger.stop()

    def _adopt(self) -> None:
        """Watch what runs already, be it wanted or not."""
        names = {file.stem for file in self.profile.run_folder.glob("*.lock")}
        for name in sorted(names):
            if is_service(name):
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
        note = read_notes(self.profile).services.get(name, ServiceNote())
        if not note.is_about(holder):  # nobody knows which code it has: a reload replaces it
            note = ServiceNote()
        self._watch(running, generation=note.generation, ready=note.ready)
        return True

    def _start(self, name: str) -> None:
        try:
            if self._adopt_one(name):  # somebody else was faster
                return
            with logs.open_log(self.profile.log(name)) as output:
                log_from = output.tell()
                child = subprocess.Popen(
                    self.command_for(name),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=working_folder(self.profile),
                    env=self._environment(),
                    start_new_session=True,
                )
        except (OSError, DaemonError) as error:
            end = self._roster.failed(name, time.monotonic())
            log.error("%s can't be started (%s); trying again in %.2f s", name, error, end.pause_s or 0.0)
            self._note_end(name, 0, f"could not be started: {error}", None, None, end)
            tell_end(self.profile, name, 0, f"could not be started: {error}", "")
            return
        log.info("%s started (pid %d)", name, child.pid)
        self._watch(_Running(name, child.pid, child=child, log_from=log_from))

    def _environment(self) -> dict[str, str]:
        environment = {**os.environ, "PRUNUS_PROFILE": str(self.profile.path), "PYTHONUNBUFFERED": "1"}
        environment.pop("NOTIFY_SOCKET", None)  # it is meant for us alone
        return environment

    def _terminate(self, name: str) -> None:
        running = self._running[name]
        limit_s = self._roster.grace_s + KILL_MARGIN_S
        why = " (a reload)" if name in self._roster.wanted else ""
        log.info("asking %s (pid %d) to end%s; it is killed if it has not in %.0f s", name, running.pid, why, limit_s)
        running.send(signal.SIGTERM)

    def _kill(self, name: str) -> None:
        running = self._running[name]
        log.warning(
            "%s (pid %d) did not end in time: killing it. Nothing is lost; its unfinished steps run again later",
            name,
            running.pid,
        )
        running.kill()

    def _watch(self, running: _Running, *, generation: int | None = None, ready: bool = False) -> None:
        name = running.name
        self._roster.started(name, running.pid, time.monotonic(), generation=generation, ready=ready)
        self._running[name] = running
        self._note(
            name,
            pid=running.pid,
            started=running.started,
            generation=self._roster.services[name].generation,
            ready=ready,
            start_at=None,
        )
        watch = asyncio.create_task(self._wait_for_end(running))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    async def _wait_for_end(self, running: _Running) -> None:
        try:
            code = await running.wait()
        finally:
            running.close()
        name, pid = running.name, running.pid
        del self._running[name]
        end = self._roster.ended(name, time.monotonic())
        self._news.set()
        if not self.profile.path.is_dir():
            log.error("%s ended, and the profile was deleted: there is nothing left to run; the daemon ends", name)
            self.want(())
            return
        signal_name = _signal_name(-code) if code is not None and code < 0 else None
        how = "(how is not known)" if code is None else f"by {signal_name}" if signal_name else f"with exit code {code}"
        self._note_end(name, pid, how, signal_name, None if signal_name else code, end)
        what = f"{name} (pid {pid}) ended {how} after {end.ran_s:.1f} s"
        if not end.asked:
            tail = logs.last_words(self.profile.log(name), EVIDENCE_LINES, running.log_from)
            tell_end(self.profile, name, pid, how, "\n".join(tail))
            if name != BROKER:
                self._messenger.send(self.profile, Evidence.of(name, pid, how, tail))
        if end.pause_s is None or end.asked:
            log.info("%s", what)
        elif end.flapping:
            log.error(
                "%s, too soon once more: something is wrong, see %s. Next try in %.2f s; its work stays queued",
                what,
                self.profile.log(name),
                end.pause_s,
            )
        else:
            log.warning("%s without being asked; starting it again in %.2f s", what, end.pause_s)
        self._run_hooks(name, pid, "" if code is None else signal_name or str(code), end)

    def _run_hooks(self, name: str, pid: int, exit: str, end: Ended) -> None:
        became_flapping = end.flapping and name not in self._flapping
        (self._flapping.add if end.flapping else self._flapping.discard)(name)
        if end.asked:
            return
        facts = {"service": name, "pid": pid, "exit": exit, "ran_s": f"{end.ran_s:.3f}", "log": self.profile.log(name)}
        if end.pause_s is not None:
            facts["restart_s"] = f"{end.pause_s:.3f}"
        self.hooks.run("broker_ended" if name == BROKER else "worker_ended", **facts)
        if became_flapping:
            self.hooks.run("flapping", **facts)

    # --- reloads ---

    async def _check(self, names: tuple[str, ...]) -> None:
        """Ask who serves, and take note of it; then wait a moment, so that it is not asked too often."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                pids = await self._who_serves(self.profile)
        except (PrunusError, OSError, TimeoutError, LookupError, TypeError) as error:  # it may be of another version
            log.debug("who serves is not known: %r", error)
            pids = frozenset()
        for name in names:
            if (running := self._running.get(name)) is not None and running.pid in pids:
                self._roster.serves(name)
                self._note(name, ready=True)
                log.info("%s (pid %d) serves", name, running.pid)
        if not all(name in self._running and self._running[name].pid in pids for name in names):
            await asyncio.sleep(CHECK_INTERVAL_S)
        self._news.set()

    # --- notes ---

    def _note(self, name: str, **changes: Any) -> None:
        change_note(self.profile, name, **changes)

    def _note_end(self, name: str, pid: int, how: str, signal_name: str | None, code: int | None, end: Ended) -> None:
        now = time.time()
        note = read_notes(self.profile).services.get(name, ServiceNote())
        self._note(
            name,
            pid=None,
            started=None,
            ready=False,
            restarts=note.restarts + (not end.asked),
            ends=note.ends if end.asked else (*note.ends, now)[-MAX_ENDS_NOTED:],
            last_end=End(at=now, pid=pid, how=how, signal=signal_name, code=code, ran_s=end.ran_s, asked=end.asked),
            flapping=end.flapping,
            start_at=None if end.pause_s is None else now + end.pause_s,
        )


class _Running:
    """A process that we watch: our child, or one that an earlier supervisor started (`child` is None)."""

    def __init__(
        self,
        name: str,
        pid: int,
        started: float | None = None,
        child: subprocess.Popen[bytes] | None = None,
        log_from: int = 0,
    ) -> None:
        self.name, self.pid, self.log_from = name, pid, log_from
        self._started, self._child = started, child
        self.started = started if started is not None else start_time(pid)
        """With the pid it names one process."""
        self._fd: int | None = None
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # an old kernel, or it is gone already: then we look at it by interval
                self._fd = os.pidfd_open(pid)

    async def wait(self) -> int | None:
        """Wait for its end; returns its exit code, the negative number of a signal, or None: nobody knows."""
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
            return None
        # Its own children would go on with work that will be done again. Until `wait` the group is surely its own.
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)
        return self._child.wait()

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


async def _who_serves(profile: Profile) -> frozenset[int]:
    from prunus.messaging.liveness import this_peer
    from prunus.runtime.controller import connect

    async with connect(profile) as controller:
        statistics = await controller.broker_statistics()
    here = this_peer().host
    sessions = [each for each in statistics["sessions"].values() if each["connected"] and each["host"] == here]
    takers = [each["pid"] for each in sessions if each["credit"] or each["held"]]
    return frozenset([statistics["pid"], *takers])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"


def _loop_time(monotonic: float | None) -> float | None:
    if monotonic is None:
        return None
    return asyncio.get_running_loop().time() + max(0.0, monotonic - time.monotonic())


# --- the program ------------------------------------------------------------------------------------


async def supervise(
    profile: Profile, command_for: CommandFor | None = None, who_serves: WhoServes | None = None
) -> None:
    """Be the daemon of this profile until SIGTERM or SIGINT; `DaemonError` if there is one, `ProfileError` if its
    broker could not start for want of keys."""
    profile.check_keys()
    supervisor = Supervisor(profile, command_for, who_serves)
    stopping = False

    def note_self(grace_s: float) -> None:
        notes = read_notes(profile)
        write_notes(profile, msgspec.structs.replace(notes, version=prunus.__version__, grace_s=grace_s))

    def read_again() -> None:
        if stopping:
            return
        try:
            supervisor.configure(Profile.load(profile.path))
            note_self(supervisor.profile.config.grace_s)
        except PrunusError as error:
            log.error("%s; the settings stay as they were", error)
        try:
            wanted = supervisor.obey(read_wish(profile) or Wish())
        except DaemonError as error:
            log.error("%s; the number of workers stays as it is", error)
            return
        log.info("wanted from now on: %s", ", ".join(wanted))

    def stop(number: signal.Signals) -> None:
        nonlocal stopping
        log.info("%s: stopping the workers, then the broker", number.name)
        stopping = True
        supervisor.want(())
        systemd.notify("STOPPING=1")
        forget_wish(profile)

    async def say_when_up() -> None:
        await supervisor.up.wait()
        systemd.notify("READY=1")
        supervisor.hooks.run("started")

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, read_again)  # whoever sees the lock may send signals at once
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    saying = asyncio.create_task(say_when_up())
    try:
        with ServiceLock(profile.lock("daemon"), profile.path) as lock:
            log.info("the daemon of %s runs (pid %d)", profile.path, os.getpid())
            note_self(profile.config.grace_s)
            if not stopping:
                supervisor.obey(read_wish(profile) or Wish())
            await lock.kept(supervisor.run())
            log.info("all services have ended; the daemon ends")
            if profile.path.is_dir():  # else it was deleted
                forget_notes(profile)
            supervisor.hooks.run("stopped")
            await supervisor.hooks.finish()
    finally:
        saying.cancel()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)


def main(
    arguments: list[str] | None = None,
    command_for: CommandFor | None = None,
    who_serves: WhoServes | None = None,
) -> int:
    """``python -m prunus.runtime.supervisor --profile PATH``: the daemon, in the foreground."""
    parser = argparse.ArgumentParser(description="The daemon of a Prunus profile, in the foreground.")
    parser.add_argument("--profile", type=Path, required=True, help="the folder of the profile")
    options = parser.parse_args(arguments)
    logs.configure(options.profile, "daemon")
    try:
        asyncio.run(supervise(Profile.load(options.profile), command_for, who_serves))
    except PrunusError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
