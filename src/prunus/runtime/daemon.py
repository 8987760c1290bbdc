"""The daemon from outside: start it, ask how it is, scale it, stop it.

All that is known of a daemon is who holds the locks in ``run/`` and what the broker answers. There is no pid file
to believe in: a daemon runs if, and only if, somebody holds its lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from prunus.errors import DaemonError, MessagingError
from prunus.persistence.database import was_made
from prunus.runtime.locks import Holder, ServiceLock, read_holder
from prunus.runtime.logs import last_lines, open_log, parse
from prunus.runtime.profile import Profile
from prunus.runtime.roster import BROKER, KILL_MARGIN_S, WORKER_PREFIX, in_order, is_service
from prunus.runtime.services import ServiceNote, forget_notes, read_notes
from prunus.runtime.supervisor import Supervisor, module_command, working_folder
from prunus.runtime.systemd import stop_limit_s
from prunus.runtime.wish import Wish, change_wish, forget_wish, wanted_services

START_TIMEOUT_S = 30.0
"""A daemon that has not started all its services by then is reported as not ready."""
STOP_MARGIN_S = 5.0
"""What the supervisor gets on top of the time that it may take."""
PROGRESS_INTERVAL_S = 0.5
"""How often is said what a stop waits for."""
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


@dataclass(frozen=True)
class StopProgress:
    """What still runs while a daemon stops."""

    workers: int
    processes: int | None
    """That they have in hand, all together; None if the broker does not say."""


@dataclass(frozen=True)
class ReloadProgress:
    """How far a reload is."""

    done: int
    total: int
    current: str
    """The service that is replaced now."""


def status(profile: Profile) -> DaemonStatus:
    """What is true now."""
    daemon = read_holder(profile.lock("daemon"))
    wanted = wanted_services(profile) if daemon is not None else ()
    return DaemonStatus(daemon, _running(profile), wanted)


async def start(
    profile: Profile, workers: int | None = None, *, command: list[str] | None = None, ask: Statistics | None = None
) -> DaemonStatus:
    """Start the daemon, detached from this process, and return when the broker answers and all workers are there.

    Without `workers` there are as many as were asked for before the supervisor crashed, else as the configuration
    says. Broker and workers that such a crash left behind are taken over. `DaemonError` if there is a daemon already,
    or if it is not ready within `START_TIMEOUT_S` (with the end of the log that tells why); `ProfileError` if its
    broker could not start for want of keys. `command` starts another program as the supervisor, `ask` asks another
    broker.
    """
    with ServiceLock(profile.lock("daemon"), profile.path):  # a daemon runs already: say so before anything is changed
        profile.check_keys()
        if workers is not None:
            _wish_workers(profile, workers)
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


async def stop(profile: Profile, say: Callable[[StopProgress], None] | None = None) -> bool:
    """Stop the daemon gracefully: workers, then the broker; returns when all have ended. False if nothing ran.

    Broker and workers that a killed supervisor left behind are stopped too. Services that do not end within their
    grace are killed; nothing is lost by that. `say` is called about every `PROGRESS_INTERVAL_S` with what is left.
    `DaemonError` if the supervisor does not end.
    """
    daemon, services = read_holder(profile.lock("daemon")), _running(profile)
    profile = as_it_runs(profile)
    async with _saying(profile, say):
        if daemon is not None:
            limit_s = stop_limit_s(profile.config.grace_s) + STOP_MARGIN_S
            _signal(profile, signal.SIGTERM)
            deadline = time.monotonic() + limit_s
            while read_holder(profile.lock("daemon")) == daemon:
                if time.monotonic() > deadline:
                    raise DaemonError(
                        f"the daemon (pid {daemon.pid}) did not end within {limit_s:.0f} s; "
                        f"`kill -9 {daemon.pid}`, then `prunus daemon stop` again, stops it in any case"
                    )
                await asyncio.sleep(LOOK_INTERVAL_S)
        with ServiceLock(profile.lock("daemon"), profile.path):
            await Supervisor(profile).run()  # nothing is wanted: it stops what is left
            forget_wish(profile)
            forget_notes(profile)
    return daemon is not None or bool(services)


def what_is_wrong(profile: Profile) -> str | None:
    """Why what a daemon that has stopped did is not known to be kept, and what to do: its broker's last words, if it
    ended with an error, or that there is no database. None: it is kept."""
    [last] = last_lines(profile.log(BROKER), 1) or [""]
    if (entry := parse(last)) is not None and entry.level == "CRITICAL":
        return f"its broker ended with an error: {entry.text}"
    path = profile.database
    try:
        if path.exists() and path.stat().st_size > 0:
            return None
        if not was_made(path):
            return f"it has no database: {path} was removed with all that belongs to it, or was never made"
        return (
            f"its database {path} is {'empty' if path.exists() else 'gone'}: put the file back, or restore a backup "
            "(`prunus broker restore FILE`)"
        )
    except OSError as error:
        return f"its database {path} can't be seen: {error.strerror}"


def as_it_runs(profile: Profile) -> Profile:
    """The profile with the grace that its daemon gives, whatever its file says by now."""
    if (grace_s := read_notes(profile).grace_s) is None:
        return profile
    return dataclasses.replace(profile, config=msgspec.structs.replace(profile.config, grace_s=grace_s))


def wish_workers(profile: Profile, workers: int) -> None:
    """Let the daemon that is started next have so many workers; `DaemonError` if one runs already."""
    with ServiceLock(profile.lock("daemon"), profile.path):
        _wish_workers(profile, workers)


def _wish_workers(profile: Profile, workers: int) -> None:
    change_wish(profile, lambda wish: msgspec.structs.replace(wish, workers=workers))


def scale(profile: Profile, workers: int) -> None:
    """Let the running daemon have so many workers from now on; superfluous ones give back what they hold and end."""
    if read_holder(profile.lock("daemon")) is not None:
        _wish_workers(profile, workers)
    if not _signal(profile, signal.SIGHUP):
        raise DaemonError("no daemon runs here; `prunus daemon start -w N` starts one with N workers")


async def reload(
    profile: Profile, *, broker: bool = False, say: Callable[[ReloadProgress], None] | None = None, wait: bool = True
) -> None:
    """Let all workers be replaced one by one, with the code and the configuration as they are now; with `broker` the
    broker before them. Returns when all services are new and serve (or at once, without `wait`).

    Workers give their processes back at the next checkpoint, and the next one is asked only when the replacement of
    the last one serves. One more reload while one is going on is fine: both are done when all workers are newer than
    the last request. `say` is called with what is left, whenever that changes. `DaemonError` if no daemon runs, or if
    a replacement does not come up: the other workers go on as they are then, and the daemon goes on trying.
    """
    if read_holder(profile.lock("daemon")) is None:
        raise DaemonError("no daemon runs here; `prunus daemon start` starts one")
    if broker:
        profile.check_keys()  # else the daemon would have no broker
    wish = change_wish(
        profile,
        lambda wish: msgspec.structs.replace(
            wish, reloads=wish.reloads + 1, broker_reloads=wish.broker_reloads + 1 if broker else wish.broker_reloads
        ),
    )
    if not _signal(profile, signal.SIGHUP):
        raise DaemonError("the daemon ended just now; `prunus daemon start` starts it, with the new code")
    if wait:
        await _until_reloaded(profile, wish, say or (lambda progress: None))


async def _until_reloaded(profile: Profile, wish: Wish, say: Callable[[ReloadProgress], None]) -> None:
    limit_s = profile.config.grace_s + KILL_MARGIN_S + START_TIMEOUT_S
    asked_at, moved_at, before = time.time(), time.monotonic(), None
    while True:
        now = reload_progress(profile, wish)
        if now is None:
            return
        if now != before:
            moved_at, before = time.monotonic(), now
            say(now)
        if read_holder(profile.lock("daemon")) is None:
            raise DaemonError("the daemon ended during the reload; `prunus daemon start` starts it, and goes on")
        note = read_notes(profile).services.get(now.current, ServiceNote())
        fell_again = note.flapping and note.evidence is not None and note.evidence.at > asked_at
        if fell_again or time.monotonic() - moved_at > limit_s:
            lines = note.evidence.log.splitlines() if fell_again and note.evidence else []
            lines = lines or last_lines(profile.log(now.current), SHOWN_LOG_LINES)
            raise DaemonError(
                f"{now.current} does not come up again: the reload stops there, after {now.done} of {now.total}, and "
                f"the others go on as they are. Mend what is wrong and `prunus daemon reload` again"
                f"{_shown(profile.log(now.current), lines)}"
            )
        await asyncio.sleep(LOOK_INTERVAL_S)


def reload_progress(profile: Profile, wish: Wish) -> ReloadProgress | None:
    """How far the reload that `wish` asks for is; None if all that is wanted is new, and serves."""
    notes, names = read_notes(profile).services, wanted_services(profile)
    behind = []
    for name in names:
        note = notes.get(name, ServiceNote())
        generation = wish.broker_reloads if name == BROKER else wish.reloads
        if note.pid is None or note.generation < generation or not note.ready:
            behind.append(name)
    if not behind:
        return None
    between = [name for name in behind if notes.get(name, ServiceNote()).pid is None or is_new(notes[name], name, wish)]
    return ReloadProgress(done=len(names) - len(behind), total=len(names), current=(*between, *behind)[0])


def is_new(note: ServiceNote, name: str, wish: Wish) -> bool:
    """Whether a service was started after what the wish asked for last."""
    return note.generation >= (wish.broker_reloads if name == BROKER else wish.reloads)


async def _until_ready(
    profile: Profile, child: subprocess.Popen[bytes], logs: dict[str, int], ask: Statistics
) -> DaemonStatus:
    began = time.monotonic()
    reason: str | None = "it has not begun yet"
    while True:
        if child.poll() is not None:
            end = _end_of(profile.log("daemon"), logs["daemon"])
            raise DaemonError(f"the daemon ended at once (exit code {child.returncode}){end}")
        now = status(profile)
        # Somebody else may have been faster: then ours finds the lock taken, and ends with that.
        is_ours = now.daemon is not None and now.daemon.pid == child.pid
        if is_ours and now.is_healthy and (reason := await _not_ready(profile, len(now.wanted) - 1, ask)) is None:
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
    sessions = len(statistics.get("sessions", {}))
    if 0 < sessions <= workers:  # one of them is ours
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


def _running(profile: Profile) -> dict[str, Holder]:
    """Every broker and worker that runs, the broker first."""
    names = sorted((file.stem for file in profile.run_folder.glob("*.lock")), key=in_order)
    holders = {name: read_holder(profile.lock(name)) for name in names if is_service(name)}
    return {name: holder for name, holder in holders.items() if holder is not None}


def _gave_up(path: Path, since: int) -> int:
    """How often the service of this log ended with a reason."""
    entries = map(parse, last_lines(path, 1000, since))
    return sum(entry is not None and entry.level == "CRITICAL" for entry in entries)


def _end_of(path: Path, since: int) -> str:
    return _shown(path, last_lines(path, SHOWN_LOG_LINES, since))


def _shown(path: Path, lines: Sequence[str]) -> str:
    lines = lines[-SHOWN_LOG_LINES:]
    return f"\nThe end of {path}:\n" + "\n".join(f"  {line}" for line in lines) if lines else f"; see {path}"


@contextlib.asynccontextmanager
async def _saying(profile: Profile, say: Callable[[StopProgress], None] | None) -> AsyncIterator[None]:
    """While the block runs, say what is left."""
    if say is None:
        yield
        return

    async def go_on() -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            services = _running(profile)
            workers = {holder.pid for name, holder in services.items() if name.startswith(WORKER_PREFIX)}
            say(StopProgress(len(workers), await _in_hand(profile, workers) if BROKER in services else None))

    saying = asyncio.create_task(go_on())
    try:
        yield
    finally:
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)


async def _in_hand(profile: Profile, pids: Collection[int]) -> int | None:
    """How many processes these workers have in hand."""
    try:
        sessions = (await _ask_broker(profile)).get("sessions", {}).values()
    except (MessagingError, TimeoutError):
        return None
    return sum(int(session["held"]) for session in sessions if session["pid"] in pids)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
