"""Is all well with a profile, and if not, what to do: a list of findings.

Each check looks at one thing and says what it saw. Nothing is changed, but for the log that a crash left: opening the
database of a stopped daemon puts it into the file. Asked to fix, it has repaired what the broker repairs by itself
(`prunus.runtime.reconcile`), and says each thing; the other findings say what to do.
"""

from __future__ import annotations

import math
import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Literal

import msgspec

import prunus
from prunus.errors import PersistenceError, PrunusError
from prunus.messaging import blobs
from prunus.persistence.database import commit, open_database, refuse_network_file_system, wal_bytes, was_made
from prunus.persistence.persister import QUERY_LIMIT, Query, Record
from prunus.persistence.sqlite import ProcessStore
from prunus.runtime import daemon, health, reconcile, upkeep
from prunus.runtime.display import class_name, count, plain, short, span, word
from prunus.runtime.locks import ServiceLock
from prunus.runtime.overview import size as size_text
from prunus.runtime.profile import Profile

if TYPE_CHECKING:
    from prunus.runtime.controller import ProcessController

LITTLE_SPACE_BYTES = 1024**3
NO_SPACE_BYTES = 64 * 1024**2
"""With less free space the broker will soon refuse new work."""
SLOW_ANSWER_S = 1.0
MAX_SHOWN = 20
"""So many findings of one kind are shown, the others are counted."""
MAX_ROUNDS = 100_000
"""So many answers of the broker are looked at, each about some thousand processes or less."""
SKEW_S = 2.0
"""The clocks of two hosts, and those of now and of earlier, may differ by so much."""

Level = Literal["ok", "warning", "problem", "fixed"]


class Finding(msgspec.Struct, frozen=True):
    """What was seen of one thing. `advice` says what to do, if there is something to do."""

    level: Level
    subject: str
    text: str
    advice: str | None = None


async def examine(
    find: Callable[[], Profile], *, check_checkpoints: bool = False, fix: bool = False
) -> AsyncIterator[Finding]:
    """All findings about the profile that `find` gives, the cheap ones first.

    With `fix` what can be repaired safely is repaired. With `check_checkpoints` every live process is loaded with the
    code as it can be imported here and now.
    """
    try:
        profile = find()
        yield Finding("ok", "profile", str(profile.path))
        for finding in _folders(profile):
            yield finding
        now = daemon.status(profile)
        for finding in _services(profile, now):
            yield finding
        if error := health.network_error(profile, is_running="broker" in now.services):
            yield Finding("problem", "network", error)
        elif profile.config.listen:
            yield Finding(
                "ok", "network", f"{count(len(profile.keys.clients()), 'key')} for {', '.join(profile.config.listen)}"
            )
    except PrunusError as error:
        yield Finding("problem", "profile", str(error))
        return
    if now.daemon is None and "broker" not in now.services and was_made(profile.database):
        for finding in _file(profile, fix=fix):
            yield finding
    if "broker" in now.services:
        try:
            async for finding in _broker(profile, fix=fix):
                yield finding
            for text in health.warnings_of(await health.look(profile, health.Load()), time.time()):
                yield Finding("warning", "services", text)
            if check_checkpoints:
                async for finding in _checkpoints(profile):
                    yield finding
        except (PrunusError, TimeoutError) as error:
            yield Finding("problem", "broker", str(error), f"see {profile.log('broker')}")


def _folders(profile: Profile) -> Iterator[Finding]:
    space = shutil.disk_usage(profile.path).free
    level: Level = "problem" if space < NO_SPACE_BYTES else "warning" if space < LITTLE_SPACE_BYTES else "ok"
    yield Finding(level, "disk", f"{size_text(space)} free", None if level == "ok" else "free some space")
    try:
        refuse_network_file_system(profile.database)
    except PersistenceError as error:
        yield Finding(
            "problem", "file system", str(error), "`prunus init --profile NAME` makes one in your home folder"
        )
    if not os.access(profile.path, os.W_OK):
        yield Finding("problem", "folder", "you may not write to the profile", f"chown it, or chmod 700 {profile.path}")
    if profile.database.exists():
        size = profile.database.stat().st_size + wal_bytes(profile.database)
        yield Finding("ok", "database", f"{profile.database.name}, {size_text(size)}")
    elif not was_made(profile.database):
        yield Finding("ok", "database", "not there yet; the first `prunus daemon start` makes it")
    for folder in profile.import_folders:
        if not folder.is_dir():
            advice = f"change import_from in {profile.path / 'config.yaml'}"
            yield Finding("warning", "imports", f"there is no folder {folder} to import classes from", advice)


def _file(profile: Profile, *, fix: bool) -> Iterator[Finding]:
    """Of a profile without a broker."""
    try:
        damage = upkeep.check(profile)
        yield _damage(damage)
        if not damage:
            with ServiceLock(profile.lock("broker")), closing(open_database(profile.database)) as connection:
                yield from _on_disk(connection, fix=fix)
    except PrunusError as error:
        yield Finding("problem", "database", str(error))


def _on_disk(connection: sqlite3.Connection, *, fix: bool) -> Iterator[Finding]:
    """The processes in a database that no broker has. Tasks are not made here: a broker makes them when it starts."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        store, tasks = ProcessStore(connection), reconcile.TasksOnDisk(connection)
        found, _ = reconcile.look(store, tasks, None, time.monotonic, math.inf, reconcile.NO_LIMIT)
        found = [one for one in found if one.kind != "no task"]
        asides, _ = store.query(Query(aside=True, unfinished=True, limit=QUERY_LIMIT))
        if fix:
            reconcile.mend(store, tasks, found, time.time())
            commit(connection)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    yield from _unlooked(found, fixed=fix)
    yield from _asides(asides)


def _unlooked(found: Sequence[reconcile.Finding], *, fixed: bool) -> Iterator[Finding]:
    """Processes that nobody looks after."""
    for number, one in enumerate(found):
        if number == MAX_SHOWN:
            text = f"{len(found) - MAX_SHOWN} more of the kind"
            yield Finding("fixed" if fixed else "problem", "processes", text)
            return
        if one.kind == "stray task":
            yield Finding("warning", short(one.pid), one.text)
        elif fixed:
            yield Finding("fixed", short(one.pid), f"it {one.text}: {_REPAIRS[one.kind]}")
        else:
            advice = f"`prunus doctor --fix`, or the next round of the broker (every minute): {_REPAIRS[one.kind]}"
            yield Finding("problem", short(one.pid), f"it {one.text}", advice)
    if not found:
        yield Finding("ok", "looked after", "every process that has not ended is live, queued or parked with a wake-up")


_REPAIRS = {
    "orphan": "it goes to others",
    "lost": "it is looked at once, and says anew what it waits for",
    "no task": "it gets a task",
    "late": "its timer fires",
}


def _asides(records: Sequence[Record]) -> Iterator[Finding]:
    for record in records:
        pid = word(short(record.pid))
        look = f"`prunus logs {pid}` shows what the workers said last; " if record.crashes else ""
        yield Finding(
            "problem",
            short(record.pid),
            f"{class_name(record.class_id)} is set aside: {record.aside}",
            f"{look}mend the cause, then `prunus retry {pid}`",
        )


def _damage(found: Sequence[str]) -> Finding:
    if not found:
        return Finding("ok", "database", "its pages are sound")
    advice = "`prunus broker restore FILE` puts a backup in its place; nothing is repaired by itself"
    return Finding("problem", "database", f"damaged: {found[0]}", advice)


def examine_blobs(
    find: Callable[[], Profile], *, fix: bool, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Finding]:
    """Every blob is read; `progress` is told how many bytes of how many. With `fix` damaged ones are set aside."""
    findings = []
    try:
        for file in blobs.find_damaged(find().blobs, progress):
            if fix:
                text = f"{file} was damaged, and is now {blobs.set_aside(file).name}"
                finding = Finding("fixed", "blobs", text, "whoever has the data puts it again, or restore a backup")
            else:
                advice = "restore a backup; or put it again, after `prunus doctor --check-blobs --fix` set this aside"
                finding = Finding("problem", "blobs", f"{file} is damaged", advice)
            findings.append(finding)
    except PrunusError as error:
        findings.append(Finding("problem", "blobs", str(error)))
    return findings or [Finding("ok", "blobs", "each is what was put")]


def _services(profile: Profile, now: daemon.DaemonStatus) -> Iterator[Finding]:
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
            yield Finding("problem", name, health.absence(profile, name))


async def _looked_after(controller: ProcessController, *, fix: bool) -> AsyncIterator[Finding]:
    """What the broker finds at its processes, and at its version and clock."""
    found: list[reconcile.Finding] = []
    report: reconcile.Report | None = None
    for _ in range(MAX_ROUNDS):
        after = None if report is None else report.after
        request = reconcile.Mend(after) if fix else reconcile.Check(after)
        sent_at = time.time()
        [answer] = await controller.communicator.call([reconcile.encode_request(request)])
        report, is_first = reconcile.decode_report(answer), report is None
        found += report.found
        if is_first:
            for finding in _broker_itself(report, sent_at, time.time()):
                yield finding
        if report.after is None and not (fix and len(report.found) >= reconcile.MAX_FOUND):
            break
    for finding in _unlooked(found, fixed=fix):
        yield finding


def _broker_itself(report: reconcile.Report, sent_at: float, came_at: float) -> Iterator[Finding]:
    if report.version != prunus.__version__:
        text = f"the broker runs Prunus {report.version}, and this is {prunus.__version__}"
        yield Finding("warning", "version", text, "`prunus daemon restart` makes it the same")
    if not sent_at - SKEW_S <= report.now <= came_at + SKEW_S:
        where = "ahead of" if report.now > came_at else "behind"
        text = f"the broker's is {abs(report.now - came_at):.0f} s {where} ours"
        yield Finding("warning", "clock", text, "set it; timers fire by the broker's clock")
    if report.newest is not None and report.newest > report.now + SKEW_S:
        text = f"it was set back: the newest process was created {span(report.newest - report.now)} from now"
        yield Finding("warning", "clock", text, "timers of that time fire late by as much; look who set it")


async def _broker(profile: Profile, *, fix: bool) -> AsyncIterator[Finding]:
    from prunus.runtime.controller import connect

    async with connect(profile) as controller:
        before = time.perf_counter()
        statistics = await controller.broker_statistics()
        answer_s = time.perf_counter() - before
        slow = answer_s > SLOW_ANSWER_S
        yield Finding("warning" if slow else "ok", "answers", f"the broker answers in {answer_s * 1000:.1f} ms")
        if statistics.get("disk_full"):
            yield Finding("problem", "disk", "the broker refuses new work because its disk is full", "free some space")
        try:
            [answer] = await controller.communicator.call([upkeep.encode(upkeep.Check())])
            yield _damage(upkeep.decode_damage(answer))
        except PersistenceError as error:
            yield Finding("warning", "database", str(error))
        for name, queue in statistics["queues"].items():
            if dead := queue["dead"]:
                text = f"{count(dead, 'dead letter')} in the queue {plain(name)}"
                yield Finding("warning", "tasks", text, f"`prunus tasks --dead --queue {word(name)}` shows why")
        counts = statistics.get("processes")
        if isinstance(counts, dict):
            text = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
            yield Finding("ok", "processes", text or "none yet")
        if paused := await controller.find(Query(play="paused", unfinished=True, limit=QUERY_LIMIT)):
            more = " or more" if len(paused) == QUERY_LIMIT else ""
            text = f"{len(paused)}{more} process{'' if len(paused) == 1 else 'es'} will not go on until somebody plays"
            advice = "`prunus list --state paused` shows them, `prunus show PID` says why"
            yield Finding("warning", "paused", f"{text} {'it' if len(paused) == 1 else 'them'}", advice)
        async for finding in _looked_after(controller, fix=fix):
            yield finding
        for finding in _asides(await controller.find(Query(aside=True, unfinished=True, limit=QUERY_LIMIT))):
            yield finding


async def _checkpoints(profile: Profile) -> AsyncIterator[Finding]:
    """Those that would not continue, and how many would."""
    from prunus.persistence.checkpoint import decode_checkpoint, type_loader
    from prunus.processes import load_class
    from prunus.runtime.controller import connect
    from prunus.runtime.launcher import OWN_MODULES

    modules = [*profile.config.modules, OWN_MODULES]
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
