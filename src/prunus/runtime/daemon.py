"""The daemon from outside: start it, ask how it is, scale it, stop it.

All that is known of a daemon is who holds the locks in ``run/`` and what the broker answers. There is no pid file
to believe in: a daemon runs if, and only if, somebody holds its lock.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunus.errors import DaemonError, MessagingError
from prunus.runtime.locks import Holder, ServiceLock, read_holder
from prunus.runtime.profile import Profile
from prunus.runtime.supervisor import (
    BROKER,
    KILL_MARGIN_S,
    WORKER_PREFIX,
    Supervisor,
    Wish,
    forget_wish,
    module_command,
    open_log,
    wanted_services,
    working_folder,
    write_wish,
)

START_TIMEOUT_S = 30.0
"""A daemon that has not started all its services by then is reported as not ready."""
STOP_MARGIN_S = 5.0
"""What the supervisor gets on top of the time that its services may take to end."""
ASK_TIMEOUT_S = 1.0
"""A broker that does not answer within this time while a daemon starts is asked again."""
LOOK_INTERVAL_S = 0.02
SHOWN_LOG_LINES = 8
HOPELESS_ENDS = 3
"""A broker that gave up so often, each time with a reason, is not waited for any longer."""

Statistics = Callable[[Profile], Awaitable[dict[str, Any]]]


@dataclass(frozen=True)
class DaemonStatus:
    """Who runs, and who should."""

    daemon: Holder | None
    services: dict[str, Holder]
    """Every broker and worker that runs, the broker first."""
    wanted: tuple[str, ...]
    """The services that should run; none if no daemon does."""

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(name for name in self.wanted if name not in self.services)

    @property
    def is_healthy(self) -> bool:
        return self.daemon is not None and not self.missing


def status(profile: Profile) -> DaemonStatus:
    """What is true now."""
    daemon = read_holder(profile.lock("daemon"))
    names = [file.stem for file in profile.run_folder.glob("*.lock")]
    holders = {name: read_holder(profile.lock(name)) for name in sorted(names, key=_order) if _is_service(name)}
    wanted = wanted_services(profile) if daemon is not None else ()
    return DaemonStatus(daemon, {name: holder for name, holder in holders.items() if holder is not None}, wanted)


async def start(
    profile: Profile, workers: int | None = None, *, command: list[str] | None = None, ask: Statistics | None = None
) -> DaemonStatus:
    """Start the daemon, detached from this process, and return when the broker answers and all workers are there.

    Without `workers` there are as many as were asked for before the supervisor crashed, else as the configuration
    says. Broker and workers that such a crash left behind are taken over. `DaemonError` if there is a daemon already,
    or if it is not ready within `START_TIMEOUT_S` (with the end of the log that tells why). `command` starts another
    program as the supervisor, `ask` asks another broker.
    """
    with ServiceLock(profile.lock("daemon")):  # a daemon runs already: say so before anything is changed
        if workers is not None:
            write_wish(profile, Wish(workers))
    logs = {name: _size(profile.log(name)) for name in ("daemon", *wanted_services(profile))}
    with open_log(profile.log("daemon")) as output:
        child = subprocess.Popen(  # noqa: ASYNC220 (a short call)
            command or module_command("prunus.runtime.supervisor", profile),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=working_folder(profile),
            start_new_session=True,
        )
    try:
        return await _until_ready(profile, child, logs, ask or _ask_broker)
    finally:
        # It goes on without us. Should it end before us, somebody must take note of that.
        threading.Thread(target=child.wait, daemon=True, name="prunus-daemon-reaper").start()


async def stop(profile: Profile) -> bool:
    """Stop the daemon gracefully: workers, then the broker; returns when all have ended. False if nothing ran.

    Broker and workers that a killed supervisor left behind are stopped too. Services that do not end within their
    grace are killed; nothing is lost by that. `DaemonError` if the supervisor does not end.
    """
    before = status(profile)
    if before.daemon is not None:
        limit_s = 2 * (profile.config.grace_s + KILL_MARGIN_S) + STOP_MARGIN_S
        _signal(profile, signal.SIGTERM)
        deadline = time.monotonic() + limit_s
        while read_holder(profile.lock("daemon")) == before.daemon:
            if time.monotonic() > deadline:
                raise DaemonError(
                    f"the daemon (pid {before.daemon.pid}) did not end within {limit_s:.0f} s; "
                    f"`kill -9 {before.daemon.pid}`, then `prunus daemon stop` again, stops it in any case"
                )
            await asyncio.sleep(LOOK_INTERVAL_S)
    with ServiceLock(profile.lock("daemon")):
        await Supervisor(profile).run()  # nothing is wanted: it stops what is left
        forget_wish(profile)
    return before.daemon is not None or bool(before.services)


def scale(profile: Profile, workers: int) -> None:
    """Let the running daemon have so many workers from now on; superfluous ones give back what they hold and end."""
    if read_holder(profile.lock("daemon")) is not None:
        write_wish(profile, Wish(workers))
    if not _signal(profile, signal.SIGHUP):
        raise DaemonError("no daemon runs here; `prunus daemon start -w N` starts one with N workers")


def last_lines(path: Path, count: int, since: int = 0) -> list[str]:
    """The last lines of a log from byte `since` on; none if there is no such file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(since if since <= size else 0, size - 65_536))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


async def _until_ready(
    profile: Profile, child: subprocess.Popen[bytes], logs: dict[str, int], ask: Statistics
) -> DaemonStatus:
    began = time.monotonic()
    while True:
        if child.poll() is not None:
            end = _end_of(profile.log("daemon"), logs["daemon"])
            raise DaemonError(f"the daemon ended at once (exit code {child.returncode}){end}")
        now = status(profile)
        if now.is_healthy and (reason := await _not_ready(profile, len(now.wanted) - 1, ask)) is None:
            return now
        hopeless = _gave_up(profile.log(BROKER), logs.get(BROKER, 0)) >= HOPELESS_ENDS
        waited_s = time.monotonic() - began
        if hopeless or waited_s > START_TIMEOUT_S:
            missing = now.missing or ((BROKER,) if hopeless else ())  # it may be there, for a moment
            talking = [name for name in missing if last_lines(profile.log(name), 1, logs.get(name, 0))]
            name = (*talking, *missing, "daemon")[0]
            what = f"the {name} does not run" if missing else reason
            raise DaemonError(
                f"the daemon is not ready after {waited_s:.0f} s: {what}. It goes on trying; "
                f"`prunus daemon stop` stops it{_end_of(profile.log(name), logs.get(name, 0))}"
            )
        await asyncio.sleep(LOOK_INTERVAL_S)


async def _ask_broker(profile: Profile) -> dict[str, Any]:
    from prunus.runtime.controller import connect

    async with asyncio.timeout(ASK_TIMEOUT_S), connect(profile) as controller:
        return await controller.broker_statistics()


async def _not_ready(profile: Profile, workers: int, ask: Statistics) -> str | None:
    """Why the broker does not serve so many workers yet, or None if it does."""
    try:
        statistics = await ask(profile)
    except (MessagingError, TimeoutError) as error:
        return str(error)
    sessions = statistics.get("sessions")
    if isinstance(sessions, int) and sessions <= workers:  # one of them is ours
        return f"only {sessions - 1} of {workers} workers have called the broker"
    return None


def _signal(profile: Profile, number: signal.Signals) -> bool:
    """Send a signal to the daemon; False if there is none."""
    holder = read_holder(profile.lock("daemon"))
    if holder is None:
        return False
    try:
        os.kill(holder.pid, number)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise DaemonError(f"the daemon (pid {holder.pid}) belongs to another user") from error
    return True


def _gave_up(path: Path, since: int) -> int:
    """How often the service of this log ended with a reason."""
    return sum(" CRITICAL " in line for line in last_lines(path, 1000, since))


def _end_of(path: Path, since: int) -> str:
    lines = last_lines(path, SHOWN_LOG_LINES, since)
    return f"\nThe end of {path}:\n" + "\n".join(f"  {line}" for line in lines) if lines else f"; see {path}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _is_service(name: str) -> bool:
    return name == BROKER or name.startswith(WORKER_PREFIX)


def _order(name: str) -> tuple[bool, int, str]:
    number = name.removeprefix(WORKER_PREFIX)
    return name != BROKER, int(number) if number.isdecimal() else 0, name
