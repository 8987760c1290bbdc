"""Is all well with a profile, and if not, what to do: a list of findings.

Each check looks at one thing and says what it saw. Nothing is changed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prunus.errors import PersistenceError, PrunusError
from prunus.persistence.database import refuse_network_file_system
from prunus.persistence.persister import QUERY_LIMIT, Query
from prunus.runtime import daemon
from prunus.runtime.display import class_name, short, span
from prunus.runtime.profile import Profile

LITTLE_SPACE_BYTES = 1024**3
NO_SPACE_BYTES = 64 * 1024**2
"""With less free space the broker will soon refuse new work."""
SLOW_ANSWER_S = 1.0

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What was seen of one thing. `advice` says what to do, if there is something to do."""

    level: Level
    subject: str
    text: str
    advice: str | None = None


async def examine(find: Callable[[], Profile], *, check_checkpoints: bool = False) -> AsyncIterator[Finding]:
    """All findings about the profile that `find` gives, the cheap ones first.

    With `check_checkpoints` every live process is loaded with the code as it can be imported here and now.
    """
    try:
        profile = find()
        yield Finding("ok", "profile", str(profile.path))
        for finding in _folders(profile):
            yield finding
        now = daemon.status(profile)
        for finding in _services(now):
            yield finding
    except PrunusError as error:
        yield Finding("problem", "profile", str(error))
        return
    if "broker" in now.services:
        try:
            async for finding in _broker(profile):
                yield finding
            if check_checkpoints:
                async for finding in _checkpoints(profile):
                    yield finding
        except (PrunusError, TimeoutError) as error:
            yield Finding("problem", "broker", str(error), f"see {profile.log('broker')}")


def _folders(profile: Profile) -> Iterator[Finding]:
    space = shutil.disk_usage(profile.path).free
    level: Level = "problem" if space < NO_SPACE_BYTES else "warning" if space < LITTLE_SPACE_BYTES else "ok"
    yield Finding(level, "disk", f"{_bytes(space)} free", None if level == "ok" else "free some space")
    try:
        refuse_network_file_system(profile.database)
    except PersistenceError as error:
        yield Finding(
            "problem", "file system", str(error), "`prunus init --profile NAME` makes one in your home folder"
        )
    if not os.access(profile.path, os.W_OK):
        yield Finding("problem", "folder", "you may not write to the profile", f"chown it, or chmod 700 {profile.path}")
    if profile.database.exists():
        wal = Path(f"{profile.database}-wal")
        size = profile.database.stat().st_size + (wal.stat().st_size if wal.exists() else 0)
        yield Finding("ok", "database", f"{profile.database.name}, {_bytes(size)}")
    else:
        yield Finding("ok", "database", "not there yet; the first `prunus daemon start` makes it")
    for folder in profile.import_folders:
        if not folder.is_dir():
            advice = f"change import_from in {profile.path / 'config.yaml'}"
            yield Finding("warning", "imports", f"there is no folder {folder} to import classes from", advice)


def _services(now: daemon.DaemonStatus) -> Iterator[Finding]:
    if now.daemon is None and now.services:
        left = ", ".join(now.services)
        yield Finding("problem", "daemon", f"not running, but {left} go on", "`prunus daemon start` takes them over")
    elif now.daemon is None:
        yield Finding("problem", "daemon", "not running", "`prunus daemon start` starts it")
    else:
        yield Finding("ok", "daemon", f"pid {now.daemon.pid}, for {span(time.time() - now.daemon.since)}")
        for name, holder in now.services.items():
            yield Finding("ok", name, f"pid {holder.pid}, for {span(time.time() - holder.since)}")
        for name in now.missing:
            yield Finding("problem", name, "not running; the daemon tries to start it", f"`prunus daemon logs {name}`")


async def _broker(profile: Profile) -> AsyncIterator[Finding]:
    from prunus.runtime.controller import connect

    async with connect(profile) as controller:
        before = time.perf_counter()
        statistics = await controller.broker_statistics()
        answer_s = time.perf_counter() - before
        slow = answer_s > SLOW_ANSWER_S
        yield Finding("warning" if slow else "ok", "answers", f"the broker answers in {answer_s * 1000:.1f} ms")
        if statistics.get("disk_full"):
            yield Finding("problem", "disk", "the broker refuses new work because its disk is full", "free some space")
        counts = statistics.get("processes")
        if isinstance(counts, dict):
            text = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
            yield Finding("ok", "processes", text or "none yet")
        if paused := await controller.find(Query(play="paused", unfinished=True, limit=QUERY_LIMIT)):
            more = " or more" if len(paused) == QUERY_LIMIT else ""
            text = f"{len(paused)}{more} process{'' if len(paused) == 1 else 'es'} will not go on until somebody plays"
            advice = "`prunus list --state paused` shows them, `prunus show PID` says why"
            yield Finding("warning", "paused", f"{text} {'it' if len(paused) == 1 else 'them'}", advice)
        for record in await controller.find(Query(aside=True, unfinished=True, limit=QUERY_LIMIT)):
            yield Finding(
                "problem",
                short(record.pid),
                f"{class_name(record.class_id)} is set aside: {record.aside}",
                f"mend the cause, then `prunus retry {short(record.pid)}`",
            )


async def _checkpoints(profile: Profile) -> AsyncIterator[Finding]:
    """Those that would not continue, and how many would."""
    from prunus.persistence.checkpoint import decode_checkpoint, type_loader
    from prunus.processes import load_class
    from prunus.runtime.controller import connect

    modules = profile.config.modules
    load_type = type_loader(modules)
    good = 0
    async with connect(profile) as controller:
        before: str | None = None
        while rows := await controller.find(Query(unfinished=True, limit=QUERY_LIMIT, before=before)):
            before = rows[-1].pid
            for row in rows:
                record = await controller.handle(row.pid).record()
                try:
                    checkpoint = decode_checkpoint(record.checkpoint or b"")
                    process_class = load_class(checkpoint.class_id, modules)
                    process_class.restore(checkpoint.snapshot(load_type))
                    good += 1
                except PrunusError as error:
                    advice = "mend the class (renamed_from, migrate), before workers load it"
                    yield Finding("problem", short(row.pid), f"would not continue: {error}", advice)
    yield Finding("ok", "checkpoints", f"{good} live process{'' if good == 1 else 'es'} would continue with this code")


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
