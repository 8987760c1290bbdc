"""A profile with very many parked processes: what it costs that they are there.

`fill` writes them through the process store itself, in large transactions, as workers would have left them: created,
claimed, parked and given back, with a history and a checkpoint that can be continued. Of ten, five wait for a message,
three for a time far away, and two are a parent that waits for a child, and that child.
"""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import prunus
from benchmarks.run import Report
from prunus.persistence.checkpoint import encode_checkpoint
from prunus.persistence.database import checkpoint_wal, commit, open_database
from prunus.persistence.persister import Event, NewProcess, Query, Save
from prunus.persistence.sqlite import ProcessStore
from prunus.processes.pids import advance, pid_from
from prunus.runtime.backend import missing_tasks
from prunus.runtime.runner import checkpoint_of

AT_ONCE = 10_000
"""Processes that are written in one transaction."""
FAR_AWAY_S = 365 * 86_400.0
"""When the timers fire."""
MILLION = 1_000_000
WOKEN = 200
"""Processes whose wake-up is timed."""
SHOWN = 50
"""Rows of one answer."""


class Listening(prunus.Process):
    """Waits for the message ``go``; ends with the moment at which it went on (monotonic clock, ns)."""

    @classmethod
    def define(cls, spec: prunus.ProcessSpec) -> None:
        super().define(spec)
        spec.message("go", valid_type=bool)

    async def run(self) -> prunus.Wait:
        return prunus.Wait(prunus.message("go"), then=self.end)

    async def end(self, value: Any) -> int:
        return time.monotonic_ns()


class Sleeping(prunus.Process):
    """Waits for a time far away."""

    async def run(self) -> prunus.Wait:
        return prunus.Wait(prunus.sleep(FAR_AWAY_S), then=self.end)

    async def end(self) -> None:
        pass


class Parent(prunus.Process):
    """Waits for its child."""

    async def run(self) -> prunus.Wait:
        return prunus.Wait(self.submit(Listening), then=self.end)

    async def end(self, child: prunus.ProcessResult) -> Any:
        return child.value


class _Kind(NamedTuple):
    """A process of one class, once before its first step and once parked."""

    created: prunus.Process
    parked: dict[str, Any]
    """Its snapshot."""
    child: str | None


def fill(path: Path, count: int, *, runnable: int = 0) -> None:
    """Write `count` processes into the database at `path`: parked ones, but for so many that can run at once."""
    listening, sleeping, parent = asyncio.run(_kinds())
    kinds = {number: sleeping if number % 10 in (1, 4, 7) else listening for number in range(10)} | {9: parent}
    # The child of a parent is the one before it.
    with closing(open_database(path)) as connection:
        store = ProcessStore(connection)
        pids = _pids()
        before = ""
        for begin in range(0, count, AT_ONCE):
            connection.execute("BEGIN")
            for number in range(begin, min(begin + AT_ONCE, count)):
                pid = next(pids)
                _write(store, kinds[number % 10], pid, before, is_parked=number >= runnable)
                before = pid
            commit(connection)
            checkpoint_wal(connection)


def measure(report: Report) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prunus.db"
        report.doing(f"{MILLION:,} processes are parked")
        begun = time.perf_counter()
        fill(path, MILLION)
        report.add("processes created, claimed, parked and stored", MILLION / (time.perf_counter() - begun), "/s")
        report.add("size of the database, for each", path.stat().st_size / MILLION, "bytes")
        for what, value, unit in figures(path):
            report.add(f"{MILLION:,} parked: {what}", value, unit)


def figures(path: Path) -> Iterator[tuple[str, float, str]]:
    """What it costs a broker that the processes in this database are there: (what, value, unit). Wakes some."""
    begun = time.perf_counter()
    with closing(open_database(path)) as connection:
        store = ProcessStore(connection)
        opened = time.perf_counter()
        missing = missing_tasks(store, lambda pid: False)
        store.statistics()
        looked = time.perf_counter()
        yield "database opened", (opened - begun) * 1e3, "ms"
        yield f"looked for missing tasks ({len(missing):,} of them) and counted", (looked - opened) * 1e3, "ms"
        newest = store.query(Query(limit=SHOWN))[0]
        for what, look in _looks(store, newest[-1].pid):
            yield what, _milliseconds(look), "ms"
        yield from _wake_ups(store, connection)


def _looks(store: ProcessStore, pid: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """What people and the broker itself ask for."""
    yield "how many in each state", store.statistics
    yield "when the next timer fires", store.next_wake
    for what, query in (
        ("newest", Query(limit=SHOWN)),
        ("newest unfinished", Query(limit=SHOWN, unfinished=True)),
        ("newest that wait, of one class", Query(limit=SHOWN, states=("waiting",), class_id=f"{__name__}:Parent")),
        ("newest of a queue that has none", Query(limit=SHOWN, queue="gpu")),
        ("those that excepted", Query(limit=SHOWN, states=("excepted",))),
        ("one by the end of its pid", Query(prefix=pid[-8:])),
        ("one by four characters", Query(prefix=pid[-4:])),
        ("one by its key", Query(key="key")),
        ("older than all of them", Query(limit=SHOWN, created_before=1.0)),
        ("waiting, older than all of them", Query(limit=SHOWN, states=("waiting",), updated_before=1.0)),
    ):
        yield f"{SHOWN} rows: {what}", lambda query=query: store.query(query)  # type: ignore[misc]
    yield "nothing to prune", lambda: store.prune(Query(updated_before=1e12))


def _wake_ups(store: ProcessStore, connection: sqlite3.Connection) -> Iterator[tuple[str, float, str]]:
    """Each in a commit of its own, as an idle broker makes it: the slowest part is the disk."""
    rows = {
        kind: [
            record
            for record in store.query(Query(limit=WOKEN, class_id=f"{__name__}:{kind}"))[0]
            if record.owner is None
        ]
        for kind in ("Listening", "Sleeping", "Parent")
    }

    def one(act: Callable[[], object]) -> float:
        begun = time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        act()
        commit(connection)
        return (time.perf_counter() - begun) * 1e3

    def end(pid: str) -> None:
        epoch = store.claim(pid, "worker", at=1.0)[0].epoch
        store.save(Save(pid=pid, epoch=epoch, state="finished", checkpoint=b"", result=b""))

    at = time.time()
    message = [one(lambda pid=record.pid: store.send(pid, "go", b"", at=at)) for record in rows["Listening"]]  # type: ignore[misc]
    child = [one(lambda pid=record.waits[0]: end(pid)) for record in rows["Parent"]]  # type: ignore[misc]
    timer = [one(lambda: store.fire_timers(store.next_wake() or 0.0)) for _ in rows["Sleeping"]]
    for what, times in (("a message", message), ("the end of a child", child), ("a timer", timer)):
        yield f"one woken by {what}, with its commit, p50", statistics.median(times), "ms"


def _milliseconds(look: Callable[[], object]) -> float:
    """The median of some."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        look()
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e3


async def _kinds() -> list[_Kind]:
    kinds = []
    for process_class in (Listening, Sleeping, Parent):
        process = process_class()
        created = process_class(pid=process.pid)
        while process.state is not prunus.ProcessState.WAITING:
            await process.step()
        children = process.take_effects().children
        kinds.append(_Kind(created, process.snapshot(), children[0].pid if children else None))
    return kinds


def _write(store: ProcessStore, kind: _Kind, pid: str, before: str, *, is_parked: bool) -> None:
    class_id, version, own = kind.created.class_id, kind.created.version, kind.created.pid
    now = time.time()
    parent_of_one = kind.child is not None
    first = checkpoint_of(kind.created)
    if not is_parked:  # somebody will read it
        snapshot = _renamed(kind.created.snapshot(), {own: pid})
        first = encode_checkpoint(snapshot, class_id=class_id, class_version=version)
    store.create(NewProcess(pid=pid, class_id=class_id, checkpoint=first, created_at=now, step="run"))
    if not is_parked:
        return
    claim = store.claim(pid, "worker", at=now)[0]
    events = tuple(Event(subject=subject, at=now) for subject in ("created.running", "running.waiting"))
    parked = _renamed(kind.parked, {own: pid, **({kind.child: before} if kind.child else {})})
    store.save(
        Save(
            pid=pid,
            epoch=claim.epoch,
            state="waiting",
            step="end",
            checkpoint=encode_checkpoint(parked, class_id=class_id, class_version=version),
            events=events,
            waits=((before,),) if parent_of_one else (),
            wake_at=now + FAR_AWAY_S if class_id.endswith("Sleeping") else None,
            names=("go",) if class_id.endswith("Listening") else (),
            listens=("go",) if class_id.endswith("Listening") else (),
            release=True,
        )
    )


def _renamed(data: Any, names: dict[str, str]) -> Any:
    """The same data about other processes."""
    if isinstance(data, str):
        return names.get(data, data)
    if isinstance(data, dict):
        return {key: _renamed(value, names) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(_renamed(value, names) for value in data)
    return data


def _pids() -> Iterator[str]:
    """As `new_pid` gives them, and the same ones each time."""
    number, now_ms = 0, 1_700_000_000_000
    while True:
        now_ms += 1
        number = advance(number, now_ms, hash(("a", now_ms)) * 0x9E3779B97F4A7C15)
        yield pid_from(number)
