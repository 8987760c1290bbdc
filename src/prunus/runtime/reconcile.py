"""Is every process looked after (G12)? What is wrong with them, and the repair: one truth for broker and doctor.

Every process that has not ended is **live** on one worker, **queued**, or **parked** with a registered wake-up. What
the broker does keeps that true in each commit. Should it be false all the same (somebody wrote to the database by hand,
a disk lied, Prunus has a defect), this finds it:

=============  ================================================================  ====================================
finding        what is the matter                                                the repair
=============  ================================================================  ====================================
orphan         held by a session that the broker does not know                   nobody holds it any more
lost           nothing would wake it, though its waits are over or some of them  it is looked at once, and says anew
               are gone; or it could run, and is not marked so                   what it waits for
no task        somebody has to look at it, and no task says so                   a task
late           its timer is over for more than `LATE_S` and did not fire         the timer fires
stray task     a task of the broker's own for a process that does not exist      none is needed: a worker drops it
=============  ================================================================  ====================================

`look` finds, and changes nothing; `mend` repairs what was found. The broker does both when it starts and every minute
(`Reconciler`), ``prunus doctor`` asks for the first and with ``--fix`` for both, and for the last two (`look_on`): a
broker that runs has dealt with these itself within a second. *Orphan* and *no task* cost as much as is held and to do;
for *lost* every parked process is looked at, for `SLICE_S` at a time, so that a million of them holds nobody up.

`violations` says the same of a small store in the plainest way, for tests: what it says is what G12 means.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from typing import Literal, Protocol

import msgspec

from prunus.errors import ProtocolError
from prunus.messaging.broker import OWN_TASKS
from prunus.persistence.persister import TERMINAL_STATES, Effects
from prunus.persistence.sqlite import ProcessStore, merge

PREFIX = b"reconcile:"
"""What distinguishes these requests from those about processes."""
SLICE_S = 0.01
"""So long parked processes are looked at in one go."""
LATE_S = 10.0
"""Timers fire within a second."""
MAX_FOUND = 1000
"""So many of one kind are in one answer; whoever asks again gets the others."""
MAX_TASKS = 10_000
"""So many tasks are looked at for strays."""
NO_LIMIT = 2**63 - 1
LOOKED_AFTER = 64
"""So many parked processes are looked at between two looks at the clock."""

Kind = Literal["orphan", "lost", "no task", "late", "stray task"]


class Tasks(Protocol):
    """What the broker knows."""

    def has_task(self, key: str) -> bool:
        """Whether a task with this key is pending or held."""
        ...

    def is_served(self, queue: str) -> bool:
        """Whether anybody subscribes to this queue."""
        ...

    def sessions(self) -> Collection[str]:
        """Those that are not gone."""
        ...

    def own_tasks(self, limit: int) -> Sequence[str]:
        """The keys of up to so many pending tasks that the broker made itself: each is the pid of a process."""
        ...


class Finding(msgspec.Struct, frozen=True):
    """One process of which G12 is not true."""

    kind: Kind
    pid: str
    text: str
    """What is the matter, as the end of a sentence that begins with the process."""


class Place(msgspec.Struct, frozen=True):
    """Where the look at the parked processes goes on."""

    state: str
    after: int


class Check(msgspec.Struct, frozen=True, tag="check"):
    """What is wrong? `after`: the `Report.after` of the answer before."""

    after: Place | None = None


class Mend(msgspec.Struct, frozen=True, tag="mend"):
    """The same, and repair it."""

    after: Place | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, and mended if that was asked for."""

    found: tuple[Finding, ...] = ()
    after: Place | None = None
    """Ask again from here; None: that was all."""
    now: float
    """The wall clock of the broker, seconds since 1970."""
    newest: float | None = None
    """When the newest process was created."""
    version: str
    """Of Prunus, that the broker runs."""


Request = Check | Mend
_PARKED_IN = ("waiting", "running", "created")


def look(
    store: ProcessStore,
    tasks: Tasks,
    after: Place | None,
    clock: Callable[[], float],
    slice_s: float = SLICE_S,
    limit: int = MAX_FOUND,
) -> tuple[list[Finding], Place | None]:
    """What is wrong, and where to go on: parked processes are looked at from `after` on (None: from the first), for
    `slice_s` by `clock`. The other kinds are looked for at the beginning, up to `limit` of each."""
    found: list[Finding] = []
    if after is None:
        found += _at_once(store, tasks, limit)
        after = Place(_PARKED_IN[0], 0)
    lost = 0
    until = clock() + slice_s
    for state in _PARKED_IN[_PARKED_IN.index(after.state) :]:
        begin = after.after if state == after.state else 0
        for number, (n, pid, what) in enumerate(store.lost(state, begin), 1):
            if pid is not None:
                found.append(Finding("lost", pid, f"is {state} and has lost {what}: nothing would wake it"))
                lost += 1
            if (number % LOOKED_AFTER == 0 and clock() >= until) or lost >= limit:
                return found, Place(state, n)
    return found, None


def look_on(store: ProcessStore, tasks: Tasks, now: float) -> list[Finding]:
    """What a broker deals with itself as long as all is well. `now` is the wall clock."""
    return [
        *(
            Finding("late", pid, f"should have been woken {now - at:.0f} s ago")
            for pid, at in store.overdue(now - LATE_S, MAX_FOUND)
        ),
        *(
            Finding("stray task", key, "does not exist, and a task is about it: a worker will drop that")
            for key in tasks.own_tasks(MAX_TASKS)
            if not store.has(key)
        ),
    ]


def mend(store: ProcessStore, tasks: Tasks, found: Sequence[Finding], now: float) -> Effects:
    """Repair what `look` found, in the caller's transaction; who is to be looked at now, without those that have a
    task."""
    pids = {kind: {one.pid for one in found if one.kind == kind} for kind in ("orphan", "lost", "no task", "late")}
    effects: list[Effects] = []
    if pids["orphan"]:
        for owner in store.owners():
            if owner not in tasks.sessions():
                pids["lost"].update(store.held_by(owner))  # whoever wrote this may have written more
                effects.append(store.release_all(owner))
    effects += [store.find_again(pid) for pid in sorted(pids["lost"]) if store.has(pid)]
    if pids["late"]:
        effects.append(store.fire_timers(now))
    if wanted := pids["no task"]:
        missing = without_task(store, tasks.has_task)
        runnable, called = (tuple(pid for pid in they if pid in wanted) for they in (missing.runnable, missing.called))
        effects.append(Effects(runnable=runnable, called=called, routes=missing.routes))
    return merge(effects)


def without_task(store: ProcessStore, has_task: Callable[[str], bool]) -> Effects:
    """Every process that somebody has to look at and that has no task (G12).

    That is what is runnable or called, and what is held: its holder has a task for it, as long as it lives.
    """
    unheld = store.unheld_work()
    held = tuple(pid for pid in store.held() if not has_task(pid))
    return Effects(
        runnable=(*(pid for pid in unheld.runnable if not has_task(pid)), *held),
        called=tuple(pid for pid in unheld.called if not has_task(pid)),
        routes={**unheld.routes, **store.routes(held)},
    )


class Reconciler:
    """The look of a broker at its processes: a round begins every `interval_s`, and each turn goes on with it."""

    def __init__(self, store: ProcessStore, tasks: Tasks, interval_s: float) -> None:
        self._store, self._tasks, self._interval_s = store, tasks, interval_s
        self._next_round_s = 0.0
        self._after: Place | None = None

    def turn(self, now: float, wall: float, slice_s: float = SLICE_S) -> tuple[list[Finding], Effects]:
        """Look on, and repair what is found, in the caller's transaction. `now` is monotonic."""
        if self._after is None:
            if now < self._next_round_s:
                return [], Effects()
            self._next_round_s = now + self._interval_s
        found, self._after = look(self._store, self._tasks, self._after, time.monotonic, slice_s, NO_LIMIT)
        return found, mend(self._store, self._tasks, found, wall) if found else Effects()

    def is_due(self, now: float) -> bool:
        """Whether a turn would do something."""
        return self._after is not None or now >= self._next_round_s


class TasksOnDisk:
    """What a broker that does not run would know: read from its database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        has_tables = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'broker_task'").fetchone()
        self._tasks: dict[str, str] = {}
        self._sessions: frozenset[str] = frozenset()
        if has_tables:
            rows = connection.execute("SELECT key, id FROM broker_task WHERE key IS NOT NULL AND outcome IS NULL")
            self._tasks = dict(rows.fetchall())
            self._sessions = frozenset(name for [name] in connection.execute("SELECT id FROM broker_session"))

    def has_task(self, key: str) -> bool:
        return key in self._tasks

    def is_served(self, queue: str) -> bool:
        return False

    def sessions(self) -> Collection[str]:
        return self._sessions

    def own_tasks(self, limit: int) -> Sequence[str]:
        return [key for key, task in self._tasks.items() if task.startswith(OWN_TASKS)][:limit]


class TasksOf:
    """What a broker in this process knows; it need not be there yet."""

    def __init__(self, exchange: Callable[[], Tasks]) -> None:
        self._exchange = exchange

    def has_task(self, key: str) -> bool:
        return self._exchange().has_task(key)

    def is_served(self, queue: str) -> bool:
        return self._exchange().is_served(queue)

    def sessions(self) -> Collection[str]:
        return self._exchange().sessions()

    def own_tasks(self, limit: int) -> Sequence[str]:
        return self._exchange().own_tasks(limit)


def violations(connection: sqlite3.Connection, tasks: Tasks) -> list[str]:
    """Each process of which G12 is not true, as a sentence. Reads everything: for tests, and small stores."""
    rows = connection.execute(
        "SELECT n, pid, state, play, owner, aside, ready, wake_at, listens, wakers, inbox_done, inbox_claimed, "
        "inbox_last FROM process ORDER BY n"
    ).fetchall()
    states = {row[0]: row[2] for row in rows}
    groups: dict[int, dict[int, list[tuple[int, int]]]] = {}
    for waiter, ended, grp, target in connection.execute("SELECT waiter, ended, grp, target FROM wait"):
        groups.setdefault(waiter, {}).setdefault(grp, []).append((target, ended))
    letters = dict(connection.execute("SELECT process, max(seq) FROM inbox GROUP BY process").fetchall())
    said = []
    for n, pid, state, play, owner, aside, ready, wake_at, listens, wakers, done, claimed, last in rows:
        if state in TERMINAL_STATES:
            continue
        if owner is not None:
            if owner not in tasks.sessions():
                said.append(f"{pid} is held by {owner}, whom nobody knows")
            elif not tasks.has_task(pid):
                said.append(f"{pid} is held and has no task")
            continue
        if letters.get(n, 0) > last:
            said.append(f"{pid} has letters that do not count")
        called = last > (done if aside is None else max(done, claimed))
        runnable = ready > 0 and play == "playing" and aside is None
        if (called or runnable) and not tasks.has_task(pid):
            said.append(f"{pid} could go on and has no task")
        if ready > 0:
            continue
        if state != "waiting":
            said.append(f"{pid} is {state} and not ready")
            continue
        waits = groups.get(n, {})
        count = sum(map(len, waits.values())) + (wake_at is not None) + len(msgspec.json.decode(listens or "[]"))
        if wakers is not None and wakers != count:
            said.append(f"{pid} waits for {wakers} things, and {count} could wake it")
        for group in waits.values():
            over = [states[target] in TERMINAL_STATES for target, _ in group]
            if any(is_over != bool(ended) for is_over, (_, ended) in zip(over, group, strict=True)):
                said.append(f"{pid} does not know which of those that it waits for have ended")
            if all(over) and not all(ended == _SEEN for _, ended in group):
                said.append(f"{pid} waits for what is over")
    return said


_SEEN = 2


def _at_once(store: ProcessStore, tasks: Tasks, limit: int) -> list[Finding]:
    sessions = tasks.sessions()
    ghosts = [owner for owner in store.owners() if owner not in sessions]
    orphans = [(pid, owner) for owner in ghosts for pid in store.held_by(owner)][:limit]
    found = [
        Finding("orphan", pid, f"is held by {owner.rpartition('-')[0] or owner}, which the broker does not know")
        for pid, owner in orphans
    ]
    orphaned = {pid for pid, _ in orphans}
    missing = without_task(store, tasks.has_task)
    without = [pid for pid in dict.fromkeys((*missing.runnable, *missing.called)) if pid not in orphaned]
    return found + [Finding("no task", pid, "could go on, and no task says so") for pid in without[:limit]]


def encode_request(request: Request) -> bytes:
    """The bytes that ask a broker's service for this."""
    return PREFIX + msgspec.msgpack.encode(request)


def decode_request(data: bytes) -> Request:
    """Raises `ProtocolError` for bytes that are none."""
    try:
        return _requests.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"these bytes ask for no check: {error}") from error


def encode(report: Report) -> bytes:
    return msgspec.msgpack.encode(report)


def decode_report(answer: bytes) -> Report:
    return msgspec.msgpack.decode(answer, type=Report)


_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
