"""The process store on SQLite: the one truth about who exists, who owns whom, and who can go on.

`ProcessStore` is synchronous and works in its caller's transaction, so that whoever owns the connection decides what
becomes durable together (a broker puts its queue in the same file). If an operation raises, the caller rolls back to
where it began. `SqlitePersister` is the asynchronous seam over a file that this program opens itself; `MemoryPersister`
the same without a file.

Invariants:

* `epoch` only rises, and only `claim` raises it. Who writes names the epoch of its claim and must still be the owner.
  A pid that is used again after `delete` begins above all epochs that it had.
* The row of a wait says that its target has *ended* exactly while the target is terminal. A process has wait rows, a
  timer, names and listens only while it is ``waiting``.
* `ready` is positive for a created or running process and 0 for a terminal one. For a waiting one it is what made it
  ready since its last save. What a complete group did is undone when one of the group is revived; nothing else is.
* Whether an unheld process is runnable or called is a function of its row (`_Row.is_runnable`, `_Row.is_called`), used
  wherever a row changes and when everything is looked through (`unheld_work`).
* An unfinished process that is unheld and runnable or called was reported in the `Effects` of the operation that
  made it so, with its route.
* The table ``tally`` has how many processes are in each state, so that counting costs no scan; it is counted anew when
  the store is opened. (Triggers could keep it, for 10 us each time: they make SQLite copy every page that is changed.)
* `crashes` counts the workers that died in the step which is next, or runs. Whom that makes `ProcessStore.max_crashes`
  is set aside in the same commit.
* `wakers` is how much a waiting process said that wakes it: its rows in ``wait``, its timer, its `listens`. While
  it is parked that many are there; where it is not so, somebody changed the database by hand (`lost`).
* `ended_at` is when a terminal process ended, or came from elsewhere. (`updated_at` says nearly the same, but may have
  no index: most saves change nothing that has one.)

Saying an operation again (a client that got no answer does) is harmless: `create` keeps the first one (of a pid, and of
a key), `claim` only
raises the epoch, `release`, `set_aside` and a last `save` that are there already are answered as before; `stage` puts
the same in its place, and `adopt` is refused: there is nothing to adopt any more. Only `post`,
`send` and `note` add theirs a second time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future as ThreadFuture
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from prunus.errors import (
    ArchiveError,
    BusyError,
    CheckpointNotFoundError,
    ForkedProcessError,
    InvalidStateError,
    PersistenceError,
    PrunusError,
    StaleOwnerError,
)
from prunus.persistence.database import (
    MEMORY,
    SCHEMA_VERSION,
    WAL_LIMIT_BYTES,
    checkpoint_wal,
    commit,
    database_path,
    full_disk,
    open_database,
    wal_bytes,
)
from prunus.persistence.persister import (
    ARRIVAL_TIME_S,
    DEFAULT_QUEUE,
    FIRST_EVENTS,
    KEPT_STEPS,
    LOG_LIMIT,
    MAX_ARRIVAL_BYTES,
    MAX_EVENTS,
    MAX_LETTERS,
    MAX_LOG_LINES,
    MAX_MAIL,
    MAX_NAME_CHARS,
    MAX_PRIORITY,
    MAX_REPLIES,
    MAX_TOKENS,
    PLAIN,
    PORTION_BYTES,
    SECTIONS,
    TERMINAL_STATES,
    Adopted,
    Claim,
    Created,
    Cursor,
    Effects,
    Event,
    Kept,
    Letter,
    LogLine,
    Mail,
    NewProcess,
    Note,
    Past,
    PastStep,
    Portion,
    Posted,
    Query,
    Record,
    Reply,
    Route,
    Save,
    Saved,
    Tell,
)
from prunus.persistence.requests import PersisterOfRequests, Request, perform

__all__ = ["MemoryPersister", "PersisterStatistics", "ProcessStore", "SqlitePersister", "merge", "open_database"]

MAX_BATCH = 256
"""The most requests in one commit of a `SqlitePersister`."""

MAX_QUERY_STATES = 32
"""The most states that one query names (there are six)."""

MAX_TIMERS = 1000
"""The most timers that one call fires."""

MAX_DEPTH = 1_000_000
"""Deeper ones are kept as if they were so deep."""

TAIL_CHARS = 8
"""So many characters at the end of a pid are found by an index. (People see eight.)"""

_ITEM_BYTES = 32
"""What a small item of a copy takes beside its texts."""

_SHOWN_PIDS = 5
"""In an error that is about several."""

LOG_BLOCK = MAX_LOG_LINES // 10
"""Old lines of a log are forgotten so many at a time."""

EVENT_BLOCK = MAX_EVENTS // 10
"""Old events of a history are left out so many at a time."""

NOTHING = Effects()

# What makes a process ready (column `process.ready`).
_PARKED = 0
_BY_GROUP = 1
"""A complete group; a revival in it takes this back."""
_READY = 2
"""Its state, a timer, mail, or its own revival."""

# What the waiter knows of its target (column `wait.ended`).
_ALIVE = 0
_NEWS = 1
"""It has ended, and the waiter has not looked at that."""
_SEEN = 2

logger = logging.getLogger(__name__)


class ProcessStore:
    """One method for each operation of the seam, in the caller's transaction; answers (answer, effects).

    `epoch_floor` is below every epoch that is given from now on: a broker that was restored from an older copy of its
    disk still gives epochs that no worker has seen. `clock` is the wall clock, for showing only.
    """

    def __init__(
        self, connection: sqlite3.Connection, *, epoch_floor: int = 0, clock: Callable[[], float] = time.time
    ) -> None:
        """Make the tables, or upgrade those of an older version, in the caller's transaction or in one of its own."""
        self._connection = connection
        self._clock = clock
        self.max_crashes = 0
        """A process in whose step so many workers died is set aside; 0: never."""
        self.path = database_path(connection)
        alone = not connection.in_transaction
        if alone:
            self._run("BEGIN")
        try:
            self._upgrade()
            for statement in _TABLES:
                self._run(statement)
            self._run(_FORGET_COUNTS)
            self._run(_COUNT_ALL)
            [deleted] = self._run(_DELETED_EPOCH).fetchone()
            if alone:
                commit(connection)
        except BaseException:
            if alone and connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._epoch_floor = max(epoch_floor, deleted + 1)

    # --- the operations of the seam -----------------------------------------------------------------

    def create(self, process: NewProcess) -> tuple[Created, Effects]:
        depth = 0
        if process.parent is not None and (found := self._run(_DEPTH, process.parent).fetchone()) is not None:
            depth = found[0] + 1
        return self._create(process, depth)

    def _create(self, process: NewProcess, depth: int) -> tuple[Created, Effects]:
        _check_new(process)
        route = _route_of(process.queue, process.priority, process.resources, min(depth, MAX_DEPTH))
        created = self._run(
            _CREATE,
            process.pid,
            process.class_id,
            process.parent,
            process.parent_close,
            process.created_at,
            process.created_at,
            process.state,
            process.state,
            process.play,
            process.step,
            process.status,
            None if route.queue == DEFAULT_QUEUE else route.queue,
            route.priority,
            msgspec.json.encode(route.resources).decode() if route.resources else None,
            process.key,
            route.depth,
        )
        if created.rowcount == 0:
            [pid] = self._run(_TAKEN, process.pid, process.key).fetchone()
            return Created(pid, is_new=False), NOTHING
        n = created.lastrowid
        self._run(_ONE_MORE, process.state)
        self._run(_SET_CHECKPOINT, n, process.checkpoint)
        for tag in dict.fromkeys(process.tags):
            self._run(_ADD_TAG, n, tag)
        answer = Created(process.pid, is_new=True)
        return answer, _runnable(process.pid, route) if process.play == "playing" else NOTHING

    def claim(self, pid: str, owner: str, *, at: float) -> tuple[Claim, Effects]:
        row = self._find(pid)
        if row.is_terminal:
            return Claim(record=self._record(row.n, content=True), epoch=0), NOTHING
        epoch = max(row.epoch + 1, self._epoch_floor)
        self._run(_CLAIM, epoch, owner, self._clock(), row.n)
        self._add_events(row.n, [Event(subject="claimed", at=at)], owner)
        record = self._record(row.n, content=True)
        results = dict(self._run(_RESULTS_WAITED_FOR, row.n)) if row.state == "waiting" else {}
        mail = self._oldest_mail(row)
        inbox = self._letters(row.n) if row.inbox_last > row.inbox_done else ()
        return Claim(record=record, epoch=epoch, inbox=inbox, results=results, mail=mail), NOTHING

    def save(self, save: Save) -> tuple[Saved, Effects]:
        row = self._find(save.pid)
        if self._must_own(row, save.epoch, lambda: self._is_saved(row, save)):
            return Saved(seq=row.seq), NOTHING
        _check(save)
        terminal = save.state in TERMINAL_STATES
        now = self._clock()

        effects = [
            self._create(child, row.depth + 1)[1] if child.parent == save.pid else self.create(child)[1]
            for child in save.children
        ]
        inbox_done = row.inbox_last if terminal else max(row.inbox_done, min(save.inbox_done, row.inbox_last))
        if inbox_done > row.inbox_done:
            self._run(_FORGET_LETTERS, row.n, inbox_done)
        if save.replies:
            self._add_replies(row.n, save.replies)
        mail_count = self._consume(row, save) if row.mail_count else 0
        if save.checkpoint is not None:
            self._run(_SET_CHECKPOINT, row.n, save.checkpoint)
            if save.keep_as is not None:
                self._run(_KEEP_STEP, row.n, row.seq + 1, save.keep_as, now, save.checkpoint)
                self._run(_FORGET_STEPS, row.n, row.n, KEPT_STEPS)
        if terminal:
            self._run(_SET_RESULT, save.result, row.n)
        self._add_events(row.n, save.events, row.owner)
        if save.lines:
            self._add_lines(row.n, save.lines)

        good_state = row.good_state if terminal or save.checkpoint is None else save.state
        owner = None if terminal or save.release else row.owner
        said = (good_state, save.status, save.step, save.progress, save.detail, now)
        # A save in the middle of a step is no progress: the same step goes on, and may take down the next worker too.
        crashes = row.crashes if save.state == row.state == "running" and save.keep_as is None else 0
        stays = save.state == row.state and save.play == row.play and owner == row.owner and row.aside is None
        if stays and inbox_done == row.inbox_done and save.state != "waiting":
            self._run(_SAVE_IN_PLACE, *said, crashes, row.n)
        else:
            wakes = self._wakes(row, save, mail_count, now)
            ended_at = now if terminal else None
            self._run(_SAVE, *said, crashes, save.state, save.play, owner, inbox_done, *wakes, ended_at, row.n)
            if save.state != row.state:
                self._count(row.state, save.state)
        effects += [self._tell(save.pid, tell) for tell in save.tells]
        if terminal:
            effects.append(self._wake_waiters(row.n))
        elif save.release:
            effects.append(self._effects_on(save.pid))
        left = self._letters(row.n) if row.inbox_last > inbox_done else ()
        return Saved(seq=row.seq + 1, inbox=left), merge(effects)

    def note(self, note: Note) -> tuple[None, Effects]:
        row = self._find(note.pid)
        self._must_own(row, note.epoch, lambda: False)
        if note.lines:
            self._add_lines(row.n, note.lines)
        self._run(_NOTE, note.progress, note.detail, note.status, self._clock(), row.n)
        return None, NOTHING

    def release(self, pid: str, epoch: int) -> tuple[None, Effects]:
        row = self._find(pid)
        if self._must_own(row, epoch, lambda: True):
            return None, NOTHING
        self._add_events(row.n, [Event(subject="released", at=self._clock())], row.owner)
        self._run(_RELEASE, None, self._clock(), row.n)
        return None, self._effects_on(pid)

    def set_aside(self, pid: str, epoch: int, reason: str) -> tuple[None, Effects]:
        row = self._find(pid)
        if self._must_own(row, epoch, lambda: row.aside == reason):
            return None, NOTHING
        if row.aside != reason:
            self._add_events(row.n, [Event(subject="set_aside", at=self._clock(), note=reason)], row.owner)
        self._run(_RELEASE, reason, self._clock(), row.n)
        return None, self._effects_on(pid)

    def revive(self, pid: str) -> tuple[Record, Effects]:
        row = self._find(pid)
        if row.state != "excepted" and (row.aside is None or row.is_terminal):
            raise InvalidStateError(row.state, "excepted or set aside")
        self._add_events(row.n, [Event(subject="revived", at=self._clock(), note=row.aside)], None)
        self._run(_REVIVE, row.good_state if row.is_terminal else row.state, self._clock(), row.n)
        if row.is_terminal:
            self._count(row.state, row.good_state)
            self._run(_SET_RESULT, None, row.n)
            if self._run(_SET_ENDED, _ALIVE, row.n).rowcount:
                self._run(_TAKE_BACK, row.n)
        return self._record(row.n), self._effects_on(pid)

    def post(self, pid: str, body: bytes) -> tuple[Posted, Effects]:
        row = self._find(pid)
        if row.is_terminal:
            return Posted(seq=0, state=row.state), NOTHING
        if row.inbox_last - row.inbox_done >= MAX_LETTERS:
            raise BusyError(f"process {pid} has {MAX_LETTERS} letters that it has not dealt with; try again later")
        seq = row.inbox_last + 1
        self._run(_ADD_LETTER, row.n, seq, body)
        self._run(_COUNT_LETTER, seq, row.n)
        effects = Effects(called=(pid,)) if row.owner is None else Effects(nudged=((row.owner, pid),))
        return Posted(seq=seq, state=row.state, owner=row.owner, epoch=row.epoch), effects

    def reply(self, pid: str, seq: int) -> tuple[bytes | None, Effects]:
        found = self._run(_REPLY, self._find(pid).n, seq).fetchone()
        return (None if found is None else found[0]), NOTHING

    def send(self, pid: str, name: str, body: bytes, *, at: float, sender: str | None = None) -> tuple[Posted, Effects]:
        row = self._find(pid)
        if row.is_terminal:
            return Posted(seq=0, state=row.state), NOTHING
        if row.mail_count >= MAX_MAIL:
            raise BusyError(f"process {pid} has {MAX_MAIL} messages that it has not consumed; try again later")
        seq = row.mail_last + 1
        self._run(_ADD_MAIL, row.n, seq, name, body, at, sender)
        self._run(_COUNT_MAIL, seq, row.mail_count + 1, row.n)
        effects = self._make_ready(row, _READY) if name in _decode_texts(row.listens) else NOTHING
        return Posted(seq=seq, state=row.state, owner=row.owner, epoch=row.epoch), effects

    def load(self, pid: str) -> tuple[Record, Effects]:
        row = self._find(pid)
        return msgspec.structs.replace(self._record(row.n, content=True), inbox=self._letters(row.n)), NOTHING

    def query(self, query: Query) -> tuple[list[Record], Effects]:
        if len(query.states) > MAX_QUERY_STATES:
            raise ValueError(f"a query names up to {MAX_QUERY_STATES} states, not {len(query.states)}")
        before = None if query.before is None else self._find(query.before).n
        numbers, values = _query_statement(query, before)
        return [
            _record_of(row) for row in self._run(f"{_RECORD} WHERE n IN ({numbers}) ORDER BY n DESC", *values)
        ], NOTHING

    def history(self, pid: str, after: int = 0) -> tuple[list[Event], Effects]:
        return [
            Event(seq=seq, subject=subject, at=at, step=step, note=note, by=by)
            for seq, subject, at, step, note, by in self._run(_HISTORY, self._find(pid).n, after)
        ], NOTHING

    def log(
        self, pid: str, after: int = 0, limit: int = LOG_LIMIT, *, last: int | None = None
    ) -> tuple[list[LogLine], Effects]:
        count = limit if last is None else last
        if after < 0 or not 1 <= count <= LOG_LIMIT:
            raise ValueError(
                f"a log answers with 1 to {LOG_LIMIT} lines after line 0 or later, not {count} after {after}"
            )
        n = self._find(pid).n
        rows = self._run(_LOG, n, after, count) if last is None else self._run(_LOG_END, n, after, count)
        lines = [
            LogLine(seq=seq, at=at, text=text, level=level, source=source, step=step)
            for seq, at, text, level, source, step in rows
        ]
        return (lines if last is None else lines[::-1]), NOTHING

    def past(self, pid: str) -> tuple[list[Past], Effects]:
        return [Past(*values) for values in self._run(_PAST, self._find(pid).n)], NOTHING

    def past_checkpoint(self, pid: str, seq: int) -> tuple[bytes, Effects]:
        row = self._find(pid)
        found = self._run(_PAST_CHECKPOINT, row.n, seq).fetchone()
        if found is None:
            raise InvalidStateError(row.state, f"one of which the checkpoint of save {seq} is kept (see its steps)")
        return found[0], NOTHING

    def delete(self, pid: str) -> tuple[None, Effects]:
        row = self._find(pid)
        if not row.is_terminal:
            raise InvalidStateError(row.state, "finished, excepted or killed")
        if waiter := self._run(_ANY_WAITER, row.n).fetchone():
            raise InvalidStateError(row.state, f"one whose result nobody waits for, but {waiter[0]} does")
        self._forget([(row.n, row.epoch, row.state)])
        return None, NOTHING

    def prune(self, query: Query) -> tuple[int, Effects]:
        if query.before is not None:
            raise ValueError("processes are forgotten in the order in which they ended: there are no pages of them")
        found: list[tuple[float, int, int, str]] = []
        for state in dict.fromkeys(query.states or _ENDS):
            if state in TERMINAL_STATES:
                statement, values = _prune_statement(query, state)
                found += ((*row, state) for row in self._run(statement, *values))
        rows = [(n, epoch, state) for _, n, epoch, state in sorted(found)[: query.at_most]]
        self._forget(rows)
        return len(rows), NOTHING

    def export(self, pid: str, after: Cursor | None = None) -> tuple[Portion, Effects]:
        row = self._find(pid)
        if after is None:
            kept = self._kept(row)
            begin, used = Cursor(SECTIONS[0], 0, row.seq), _heart_bytes(kept)
        else:
            kept, begin, used = None, after, 0
        if begin.section not in SECTIONS:
            raise ValueError(f"what belongs to a process is {', '.join(SECTIONS)}, not {begin.section!r}")
        if begin.section == SECTIONS[0] and begin.save != row.seq:
            raise BusyError(f"process {pid} went on while it was copied; try again, or pause it first")
        copied: dict[str, list[Any]] = {}
        end = None
        for section in SECTIONS[SECTIONS.index(begin.section) :]:
            last = begin.after if section == begin.section else 0
            kind, statement = _COPIED[section]
            for values in self._run(statement, row.n, last):
                size = _ITEM_BYTES + sum(len(value) for value in values if isinstance(value, str | bytes))
                if used and used + size > PORTION_BYTES:
                    end = Cursor(section, last, begin.save)
                    break
                copied.setdefault(section, []).append(kind(values))
                last, used = values[0], used + size
            if end is not None:
                break
        return Portion(pid=pid, kept=kept, next=end, **{name: tuple(items) for name, items in copied.items()}), NOTHING

    def stage(self, arrival: str, number: int, portions: Sequence[Portion]) -> tuple[None, Effects]:
        if not 0 < len(arrival) <= MAX_NAME_CHARS or number < 0:
            raise ValueError(f"an arrival has a name of 1 to {MAX_NAME_CHARS} characters, and its parcels numbers")
        now = self._clock()
        self._run(_FORGET_STRANDED, now - ARRIVAL_TIME_S)
        body = msgspec.msgpack.encode(tuple(portions))
        [arrived] = self._run(_ARRIVED_BYTES).fetchone()
        if arrived + len(body) > MAX_ARRIVAL_BYTES:
            raise BusyError(
                f"{arrived:,} bytes of other imports are not done yet ({MAX_ARRIVAL_BYTES:,} may be); try again later"
            )
        self._run(_STAGE, arrival, number, now, len(body), body)
        return None, NOTHING

    def adopt(self, arrival: str, parcels: int, source: str, *, skip_existing: bool = False) -> tuple[Adopted, Effects]:
        [staged] = self._run(_COUNT_PARCELS, arrival, parcels).fetchone()
        if staged != parcels:
            raise ArchiveError(f"only {staged} of {parcels} parcels are there, so nothing was imported; do it again")
        arriving = _Arriving(source, self._clock())
        try:
            for number in range(parcels):
                [body] = self._run(_PARCEL, arrival, number).fetchone()
                for portion in _PARCEL_DECODER.decode(body):
                    self._take_in(portion, arriving)
            if arriving.present and not skip_existing:
                raise ArchiveError(_are_here(arriving.present))
            for n, groups in arriving.groups:
                self._adopt_waits(n, groups)
            for n in arriving.numbers.values():
                self._run(_TIDY_ADOPTED, n)
        except (ValueError, OverflowError) as error:
            raise ArchiveError(f"this can't be imported: {error}") from error
        self._run(_FORGET_ARRIVAL, arrival)
        effects = merge([self._effects_on(pid) for pid in arriving.numbers])
        return Adopted(pids=tuple(arriving.numbers), skipped=tuple(arriving.present)), effects

    # --- for the owner of the store -----------------------------------------------------------------

    def release_all(self, owner: str) -> Effects:
        """`owner` is gone: nobody holds any more what it held, and a save under its claims is refused."""
        return merge(self._lose(self._find(pid), owner) for [pid] in self._run(_FIND_HELD_BY, owner).fetchall())

    def blame_all(self, owner: str, worker: str) -> Blamed:
        """`owner` died: as `release_all`, and each process whose step it ran has one crash more. `worker` names it for
        people."""
        effects: list[Effects] = []
        blamed: dict[str, str | None] = {}
        aside: list[str] = []
        for [pid] in self._run(_FIND_HELD_BY, owner).fetchall():
            row = self._find(pid)
            if row.may_be_in_step:
                crashes, step = row.crashes + 1, f"the step {row.step!r}" if row.step else "its first step"
                event = Event(subject="crashed", at=self._clock(), step=row.step, note=f"{worker} died in {step}")
                self._add_events(row.n, [event], owner)
                blamed[pid] = row.step
                reason = None
                if 0 < self.max_crashes <= crashes:
                    reason = f"its worker died {_times(crashes)} in {step} (last: {worker})"
                    self._add_events(row.n, [Event(subject="set_aside", at=self._clock(), note=reason)], None)
                    aside.append(pid)
                self._run(_BLAME, crashes, reason, row.n)
            effects.append(self._lose(row, owner))
        return Blamed(merge(effects), blamed, tuple(aside))

    def pardon(self, pids: Iterable[str]) -> None:
        """It is known now which process took down a worker of these, and it was none of them: each has one crash
        less."""
        self._run_many(_PARDON, [(pid,) for pid in pids])

    def add_lines(self, pid: str, lines: Sequence[LogLine]) -> None:
        """Append to the log of a process, whoever holds it; nothing if there is no such process any more."""
        if (found := self._run(_FIND_TARGET, pid).fetchone()) is not None:
            self._add_lines(found[0], lines)

    def forget_ended(
        self, state: str, before: float, after: tuple[float, int], limit: int
    ) -> tuple[int, tuple[float, int] | None]:
        """Of the processes that ended in `state` before this wall-clock time, look at up to `limit`, the longest ended
        first, and forget those that nobody waits for and whose children have all ended.

        How many are forgotten, and where to go on (`after`, at first (0.0, 0)); None: that were all.
        """
        rows = self._run(_FIND_ENDED, state, *after, before, limit).fetchall()
        forgotten = [(n, epoch, state) for _, n, epoch, is_needed in rows if not is_needed]
        self._forget(forgotten)
        return len(forgotten), (rows[-1][0], rows[-1][1]) if len(rows) == limit else None

    def unheld_work(self) -> Effects:
        """All unheld processes that are runnable or called now: each must have a task. Costs nothing for the others."""
        runnable = [_Row(*values) for values in self._run(_FIND_RUNNABLE)]
        return Effects(
            runnable=tuple(row.pid for row in runnable if row.is_runnable),
            called=self.called(),
            routes={row.pid: route for row in runnable if row.is_runnable and (route := row.route) is not PLAIN},
        )

    def called(self) -> tuple[str, ...]:
        """All unheld processes that have letters now. Costs nothing for the others."""
        rows = [_Row(*values) for values in self._run(_FIND_CALLED)]
        return tuple(row.pid for row in rows if row.is_called)

    def routes(self, pids: Iterable[str]) -> dict[str, Route]:
        """Those of these processes, as far as they are not plain."""
        return {pid: route for pid in pids if (route := self._find(pid).route) is not PLAIN}

    def next_wake(self) -> float | None:
        """The wall-clock time of the next timer; None if there is none."""
        found = self._run(_NEXT_WAKE).fetchone()
        return None if found is None else found[0]

    def fire_timers(self, now: float) -> Effects:
        """What waits for a wall-clock time up to `now` is ready; the earliest `MAX_TIMERS` at once, call it again for
        the others."""
        rows = [_Row(*values) for values in self._run(_FIND_DUE, now, MAX_TIMERS)]
        self._run_many(_FIRE, [(row.n,) for row in rows])
        return merge(self._make_ready(row, _READY) for row in rows)

    def held(self) -> tuple[str, ...]:
        """All processes that somebody claimed and did not give back. Only its claimer knows whether it still lives."""
        return tuple(pid for [pid] in self._run(_FIND_HELD))

    def owners(self) -> tuple[str, ...]:
        """All who hold processes."""
        return tuple(owner for [owner] in self._run(_FIND_OWNERS))

    def held_by(self, owner: str) -> tuple[str, ...]:
        """The processes that it holds."""
        return tuple(pid for [pid] in self._run(_FIND_HELD_BY, owner))

    def has(self, pid: str) -> bool:
        """Whether there is such a process, ended or not."""
        return self._run(_FIND_TARGET, pid).fetchone() is not None

    def newest(self) -> float | None:
        """When the newest process was created, by the wall clock of its creator; None if there is none."""
        found = self._run(_NEWEST).fetchone()
        return None if found is None else found[0]

    def overdue(self, before: float, limit: int) -> tuple[tuple[str, float], ...]:
        """Up to `limit` processes whose timer should have fired before this wall-clock time, and when."""
        return tuple((row[0], row[1]) for row in self._run(_OVERDUE, before, limit))

    def lost(self, state: str, after: int) -> Iterator[tuple[int, str | None, str]]:
        """Look at the unheld processes in a state that is no end, the oldest first, from the one behind number `after`
        on: the number of each, and of one that nothing would ever wake its pid and what it has lost.

        Costs about 10 us a process, and 1 us for each that it waits for: whoever asks stops when it was enough.
        """
        for n, pid, is_parked, count, wakers, is_over, is_mixed_up, letters in self._run(_LOST, state, after):
            what = ""
            if not is_parked:
                pass
            elif state != "waiting":
                what = "that it can run"
            elif is_over:
                what = "that its waits are over"
            elif is_mixed_up:
                what = "who of those that it waits for has ended"
            elif wakers is not None and count != wakers:
                what = f"{wakers - count} of the {wakers} things that could wake it" if count < wakers else "its waits"
            if letters:
                what = "letters"
            yield n, (pid if what else None), what

    def find_again(self, pid: str) -> Effects:
        """Undo what `lost` found: a process that waits looks at its waits again, and says anew what they are."""
        row = self._find(pid)
        self._run(_COUNT_LETTERS_AGAIN, row.n)
        if row.state == "waiting":
            self._run(_SET_TARGETS, row.n)
        if row.ready == _PARKED and not row.is_terminal:
            self._run(_SET_READY, _READY, row.n)
        self._add_events(row.n, [Event(subject="mended", at=self._clock(), note="a lost wake-up was made good")], None)
        return self._effects_on(pid)

    def raise_epochs(self, by: int) -> None:
        """Every epoch that is given from now on is above all that there were, by more than `by`: those that were given
        after this copy of the database was made are not given again."""
        self._run(_RAISE_EPOCHS, by)
        [floor] = self._run(_DELETED_EPOCH).fetchone()
        self._epoch_floor = max(self._epoch_floor, floor + 1)

    def statistics(self) -> dict[str, int]:
        """How many processes are in each state; costs the same however many there are."""
        return dict(self._run(_COUNT_STATES))

    # --- parts of operations ------------------------------------------------------------------------

    def _lose(self, row: _Row, owner: str) -> Effects:
        self._add_events(row.n, [Event(subject="released", at=self._clock(), note="its worker is gone")], owner)
        self._run(_LOSE, self._clock(), row.n)
        return self._effects_on(row.pid)

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise self._as_ours(error) from error

    def _run_many(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if not rows:
            return
        try:
            self._connection.executemany(statement, rows)
        except sqlite3.Error as error:
            raise self._as_ours(error) from error

    def _as_ours(self, error: sqlite3.Error) -> Exception:
        match error:
            case sqlite3.OperationalError():
                return full_disk(error, self._connection) or error
            case sqlite3.IntegrityError() | sqlite3.DataError():  # a time that is no number, a value over 1 GB
                return ValueError(f"a process store can't keep this: {error}")
            case _:
                return error

    def _upgrade(self) -> None:
        """Bring the tables of an older version to this one; everything in them goes on."""
        [version] = self._run("PRAGMA user_version").fetchone()
        if version >= SCHEMA_VERSION:
            return
        if self._run(_HAS_TABLES).fetchone():
            for older, statements in _FROM_VERSIONS:
                for statement in statements if version <= older else ():
                    self._run(statement)
        self._run(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _find(self, pid: str) -> _Row:
        values = self._run(_FIND, pid).fetchone()
        if values is None:
            raise CheckpointNotFoundError(pid)
        return _Row(*values)

    def _must_own(self, row: _Row, epoch: int, is_done_already: Callable[[], bool]) -> bool:
        """False if the claim of `epoch` still stands, True if this is its last word, said again; else raises."""
        if row.epoch == epoch and row.owner is not None:
            return False
        if row.epoch == epoch and is_done_already():
            return True
        raise StaleOwnerError(row.pid, epoch)

    def _is_saved(self, row: _Row, save: Save) -> bool:
        leaves = save.release or save.state in TERMINAL_STATES
        if not leaves or (row.state, row.play) != (save.state, save.play):
            return False
        return save.checkpoint is None or self._run(_CHECKPOINT, row.n).fetchone() == (save.checkpoint,)

    def _record(self, n: int, *, content: bool = False) -> Record:
        checkpoint, result = self._run(_CONTENT, n).fetchone() if content else (None, None)
        record = _record_of(self._run(f"{_RECORD} WHERE n = ?", n).fetchone(), checkpoint=checkpoint, result=result)
        if not 0 < self.max_crashes <= record.crashes + 1 or not record.crashes:
            return record
        return msgspec.structs.replace(record, suspect=True)

    def _letters(self, n: int) -> tuple[Letter, ...]:
        return tuple(Letter(seq, body) for seq, body in self._run(_LETTERS, n))

    def _add_events(self, n: int, events: Sequence[Event], by: str | None) -> None:
        if not events:
            return
        [last] = self._run(_LAST_EVENT, n).fetchone()
        for seq, event in enumerate(events, last + 1):
            self._run(_ADD_EVENT, n, seq, event.subject, event.at, event.step, event.note, by)
        end = last + len(events)
        if end // EVENT_BLOCK > last // EVENT_BLOCK and end > MAX_EVENTS:
            self._thin_history(n, end - MAX_EVENTS + FIRST_EVENTS)

    def _thin_history(self, n: int, last: int) -> None:
        """Leave out the events after the first ones up to number `last`, and say so in its place."""
        if self._run(_FORGET_EVENTS, n, FIRST_EVENTS, last).rowcount:
            note = f"{last - FIRST_EVENTS} events were left out: the first {FIRST_EVENTS} and the newest are kept"
            self._run(_ADD_EVENT, n, last, "thinned", self._clock(), None, note, None)

    def _add_lines(self, n: int, lines: Sequence[LogLine]) -> None:
        [last] = self._run(_LAST_LINE, n).fetchone()
        self._run_many(
            _ADD_LINE,
            [
                (n, seq, line.at, line.text, line.level, line.source, line.step)
                for seq, line in enumerate(lines, last + 1)
            ],
        )
        end = last + len(lines)
        if end // LOG_BLOCK > last // LOG_BLOCK:
            self._run(_FORGET_LINES, n, end - MAX_LOG_LINES)

    def _add_replies(self, n: int, replies: Sequence[Reply]) -> None:
        self._run_many(_ADD_REPLY, [(n, reply.seq, reply.body) for reply in replies])
        self._run(_FORGET_REPLIES, n, n, MAX_REPLIES)

    def _consume(self, row: _Row, save: Save) -> int:
        """Forget the mail that is used up, or that nobody will ever use; how much is left."""
        if save.state in TERMINAL_STATES and save.state != "excepted":
            self._run(_FORGET_ALL_MAIL, row.n)
            left = 0
        else:
            left = row.mail_count - sum(self._run(_FORGET_MAIL, row.n, seq).rowcount for seq in save.consumed)
        if left != row.mail_count:
            self._run(_COUNT_MAIL, row.mail_last, left, row.n)
        return left

    def _oldest_mail(self, row: _Row) -> tuple[Mail, ...]:
        if not row.mail_count or row.names is None:
            return ()
        found = (self._run(_OLDEST_MAIL, row.n, name).fetchone() for name in _decode_texts(row.names))
        return tuple(Mail(*values) for values in found if values is not None)

    def _wakes(self, row: _Row, save: Save, mail_count: int, now: float) -> _Wakes:
        """Keep what a save waits for; what that makes of its row."""
        if save.state != "waiting":
            if row.state == "waiting":
                self._run(_FORGET_WAITS, row.n)
            return _Wakes(_PARKED if save.state in TERMINAL_STATES else _READY)
        ready = _BY_GROUP if self._keep_waits(row, save) else _PARKED
        wakers = sum(map(len, set(map(frozenset, save.waits)))) + (save.wake_at is not None) + len(save.listens)
        wake_at = save.wake_at
        if wake_at is not None and wake_at <= now:
            ready, wake_at = _READY, None
        names, listens = _encode_texts(save.names), _encode_texts(save.listens)
        if mail_count and listens is not None and self._run(_ANY_MAIL, row.n, listens).fetchone():
            ready = _READY
        return _Wakes(ready, wake_at, names, listens, wakers)

    def _keep_waits(self, row: _Row, save: Save) -> bool:
        """Write what is new in its groups, and no more; whether one of them is complete and has news."""
        standing: dict[int, list[_Wait]] = {}
        if row.state == "waiting":
            for wait in map(_Wait._make, self._run(_WAITS, row.n)):
                standing.setdefault(wait.grp, []).append(wait)
        last = max(standing, default=0)
        known = {frozenset(wait.pid for wait in group): group for group in standing.values()}
        wanted = dict.fromkeys(map(frozenset, save.waits))
        self._run_many(
            _FORGET_WAIT,
            [
                (row.n, wait.ended, wait.grp, wait.target)
                for pids, group in known.items()
                if pids not in wanted
                for wait in group
            ],
        )
        seen = frozenset(save.seen)
        added: list[tuple[int, int, int, int]] = []
        changed: list[tuple[int, int, int, int, int]] = []
        has_news = False
        for number, pids in enumerate(wanted, last + 1):
            group = known.get(pids)
            is_new = group is None
            least = _SEEN
            for wait in group or [self._new_wait(number, pid) for pid in sorted(pids)]:
                ended = wait.ended and (_SEEN if wait.pid in seen else _NEWS)
                if is_new:
                    added.append((row.n, ended, number, wait.target))
                elif ended != wait.ended:
                    changed.append((ended, row.n, wait.ended, wait.grp, wait.target))
                least = min(least, ended)
            has_news = has_news or least == _NEWS
        self._run_many(_ADD_WAIT, added)
        self._run_many(_CHANGE_WAIT, changed)
        return has_news

    def _new_wait(self, grp: int, pid: str) -> _Wait:
        found = self._run(_FIND_TARGET, pid).fetchone()
        if found is None:
            raise CheckpointNotFoundError(pid)
        n, state = found
        return _Wait(grp, n, pid, _NEWS if state in TERMINAL_STATES else _ALIVE)

    def _tell(self, parent: str, tell: Tell) -> Effects:
        """A letter for its children, however many."""
        to = _encode_texts(tell.to)
        if to is None:
            return NOTHING
        children = self._run(_FIND_TOLD, parent, to).fetchall()
        if not children:
            return NOTHING
        self._run(_ADD_LETTERS, tell.body, parent, to)
        self._run(_COUNT_LETTERS, parent, to)
        return Effects(
            called=tuple(pid for pid, owner in children if owner is None),
            nudged=tuple((owner, pid) for pid, owner in children if owner is not None),
        )

    def _wake_waiters(self, target: int) -> Effects:
        """The process `target` is terminal now: whose groups did that complete?"""
        if not self._run(_SET_ENDED, _NEWS, target).rowcount:
            return NOTHING
        waiters = [_Row(*values) for values in self._run(_FIND_COMPLETED, target)]
        return merge(self._make_ready(row, _BY_GROUP) for row in waiters)

    def _make_ready(self, row: _Row, by: int) -> Effects:
        if by > row.ready:
            self._run(_SET_READY, by, row.n)
        became = row.ready == _PARKED and row._replace(ready=by).is_runnable
        return _runnable(row.pid, row.route) if became else NOTHING

    def _effects_on(self, pid: str) -> Effects:
        row = self._find(pid)
        if not row.is_runnable:
            return Effects(called=(pid,)) if row.is_called else NOTHING
        effects = _runnable(pid, row.route)
        return msgspec.structs.replace(effects, called=(pid,)) if row.is_called else effects

    def _kept(self, row: _Row) -> Kept:
        """The heart of a process, for a copy of it."""
        groups: dict[int, list[str]] = {}
        for wait in map(_Wait._make, self._run(_WAITS, row.n)):
            groups.setdefault(wait.grp, []).append(wait.pid)
        [events_last] = self._run(_LAST_EVENT, row.n).fetchone()
        [lines_last] = self._run(_LAST_LINE, row.n).fetchone()
        return Kept(
            record=msgspec.structs.replace(self._record(row.n, content=True), inbox=self._letters(row.n)),
            good_state=row.good_state,
            groups=tuple(tuple(sorted(pids)) for _, pids in sorted(groups.items())),
            listens=_decode_texts(row.listens),
            mail_last=row.mail_last,
            events_last=events_last,
            lines_last=lines_last,
        )

    def _take_in(self, portion: Portion, arriving: _Arriving) -> None:
        """Keep a part of a process that comes from elsewhere; its waits come when all are here."""
        if portion.kept is not None:
            if portion.pid != portion.kept.record.pid or portion.pid in arriving.numbers:
                raise ArchiveError(f"process {portion.pid} is in it twice, or is another one than it says")
            if portion.pid not in arriving.present:
                self._adopt_row(portion.kept, arriving)
        if portion.pid in arriving.present:
            return
        n = arriving.numbers.get(portion.pid)
        if n is None:
            raise ArchiveError(f"of process {portion.pid} the first portion is missing")
        rows = [(n, mail.seq, mail.name, mail.body, mail.at, mail.sender) for mail in portion.mail]
        self._run_many(_ADD_MAIL, rows)
        self._run_many(_ADD_REPLY, [(n, reply.seq, reply.body) for reply in portion.replies])
        self._run_many(_KEEP_STEP, [(n, past.seq, past.step, past.at, past.checkpoint) for past in portion.steps])
        self._run_many(
            _ADD_EVENT,
            [(n, event.seq, event.subject, event.at, event.step, event.note, event.by) for event in portion.events],
        )
        self._run_many(
            _ADD_LINE,
            [(n, line.seq, line.at, line.text, line.level, line.source, line.step) for line in portion.lines],
        )
        if portion.next is None:
            events = [Event(subject="imported", at=arriving.at, note=f"from {arriving.source}")]
            if n in arriving.paused:
                note = arriving.paused[n]
                events.append(Event(subject="playing.paused", at=arriving.at, note=note))
            self._add_events(n, events, None)

    def _adopt_row(self, kept: Kept, arriving: _Arriving) -> None:
        _check_kept(kept)
        record = kept.record
        route = _route_of(record.queue, record.priority, record.resources, min(record.depth, MAX_DEPTH))
        waits = record.state == "waiting"
        made = self._run(
            _ADOPT,
            record.pid,
            record.class_id,
            record.parent,
            record.parent_close,
            record.created_at,
            record.updated_at,
            record.state,
            kept.good_state,
            record.play,
            record.seq,
            record.status,
            record.step,
            record.progress,
            record.detail,
            record.aside,
            _PARKED if record.is_terminal else _READY,
            record.wake_at if waits else None,
            _encode_texts(record.names) if waits else None,
            _encode_texts(kept.listens) if waits else None,
            record.inbox[0].seq - 1 if record.inbox else record.inbox_last,
            record.inbox_last,
            record.inbox_last,
            kept.mail_last,
            None if route.queue == DEFAULT_QUEUE else route.queue,
            route.priority,
            msgspec.json.encode(route.resources).decode() if route.resources else None,
            record.key,
            route.depth,
            arriving.at if record.is_terminal else None,
        )
        if made.rowcount == 0:
            [pid] = self._run(_TAKEN, record.pid, record.key).fetchone()
            if pid != record.pid:
                raise ArchiveError(f"process {record.pid} has the key {record.key!r}, and so has process {pid} here")
            arriving.present[pid] = None
            return
        n = made.lastrowid
        assert n is not None
        arriving.numbers[record.pid] = n
        self._run(_ONE_MORE, record.state)
        self._run(_SET_CHECKPOINT, n, record.checkpoint)
        self._run(_SET_RESULT, record.result, n)
        for tag in dict.fromkeys(record.tags):
            self._run(_ADD_TAG, n, tag)
        self._run_many(_ADD_LETTER, [(n, letter.seq, letter.body) for letter in record.inbox])
        if kept.is_held_back:
            arriving.paused[n] = record.status
        if waits and kept.groups:
            arriving.groups.append((n, kept.groups))

    def _adopt_waits(self, n: int, groups: Sequence[Sequence[str]]) -> None:
        for number, pids in enumerate(groups, 1):
            for pid in sorted(set(pids)):
                try:
                    wait = self._new_wait(number, pid)
                except CheckpointNotFoundError as error:
                    raise ArchiveError(
                        f"a process in it waits for {pid}, which is neither in it nor here; export that one with it"
                    ) from error
                self._run(_ADD_WAIT, n, wait.ended, number, wait.target)

    def _count(self, before: str, after: str) -> None:
        """One process is in another state."""
        self._run(_LESS, 1, before)
        self._run(_ONE_MORE, after)

    def _forget(self, rows: Sequence[tuple[int, int, str]]) -> None:
        """Delete the processes with these (n, epoch, state), all of them terminal and none waited for."""
        if not rows:
            return
        epoch = max(epoch for _, epoch, _ in rows)
        self._epoch_floor = max(self._epoch_floor, epoch + 1)  # if this is rolled back it is too high: no harm
        self._run(_KEEP_EPOCH, epoch)
        self._run_many(_DELETE, [(n,) for n, _, _ in rows])
        self._run_many(_LESS, [(count, state) for state, count in Counter(state for _, _, state in rows).items()])


class _Row(NamedTuple):
    """The facts of a process that decide what may be done with it (the columns of `_FIND`)."""

    n: int
    pid: str
    state: str
    play: str
    good_state: str
    epoch: int
    owner: str | None
    seq: int
    aside: str | None
    ready: int
    names: str | None
    listens: str | None
    inbox_done: int
    inbox_claimed: int
    inbox_last: int
    mail_last: int
    mail_count: int
    queue: str | None
    priority: int
    resources: str | None
    depth: int
    crashes: int
    step: str | None

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL_STATES

    @property
    def may_be_in_step(self) -> bool:
        """Whoever holds it does so to step it, and not for its letters alone."""
        return self.aside is None and self.play != "paused" and self.ready > _PARKED

    @property
    def route(self) -> Route:
        if self.queue is None and not self.priority and self.resources is None and not self.depth:
            return PLAIN
        return Route(self.queue or DEFAULT_QUEUE, self.priority, _decode_resources(self.resources), self.depth)

    @property
    def is_runnable(self) -> bool:
        """Nobody holds it and it can step."""
        return self.owner is None and self.aside is None and self.play == "playing" and self.ready > _PARKED

    @property
    def is_called(self) -> bool:
        """Nobody holds it and it has letters. One that is aside is called only by what came after its last claim: who
        set it aside could do nothing with the others."""
        dealt_with = self.inbox_done if self.aside is None else max(self.inbox_done, self.inbox_claimed)
        return self.owner is None and not self.is_terminal and self.inbox_last > dealt_with


class _Wait(NamedTuple):
    """One process in one of the groups of another (the columns of `_WAITS`)."""

    grp: int
    target: int
    pid: str
    ended: int


@dataclass(slots=True)
class _Arriving:
    """Processes from elsewhere, while they are adopted."""

    source: str
    at: float
    numbers: dict[str, int] = field(default_factory=dict)
    """Those that are kept now: their `n`."""
    present: dict[str, None] = field(default_factory=dict)
    """Those that were here before."""
    groups: list[tuple[int, tuple[tuple[str, ...], ...]]] = field(default_factory=list)
    """What they wait for."""
    paused: dict[int, str | None] = field(default_factory=dict)
    """Those that are paused because they came from elsewhere: their status."""


class _Wakes(NamedTuple):
    """What is to wake a process, as its row has it."""

    ready: int
    wake_at: float | None = None
    names: str | None = None
    listens: str | None = None
    wakers: int | None = None


class Blamed(NamedTuple):
    """What the death of a worker means."""

    effects: Effects
    steps: dict[str, str | None]
    """The processes whose steps it ran, and which, ..."""
    aside: tuple[str, ...]
    """... and those of them that are set aside now."""


def _times(number: int) -> str:
    return "once" if number == 1 else "twice" if number == 2 else f"{number} times"


def _check_new(process: NewProcess) -> None:
    """Raises `ValueError` for a new process that can't be meant."""
    if process.state not in _FIRST_STATES:
        raise ValueError(f"a new process is {' or '.join(_FIRST_STATES)}, not {process.state}")
    for what, name in (("queue", process.queue), ("key", process.key), *(("resource", it) for it in process.resources)):
        if name is not None and not 0 < len(name) <= MAX_NAME_CHARS:
            raise ValueError(f"the name of a {what} has 1 to {MAX_NAME_CHARS} characters, not {len(name)}")
    if not 0 <= process.priority <= MAX_PRIORITY:
        raise ValueError(f"a priority is 0 to {MAX_PRIORITY}, not {process.priority}")
    for name, tokens in process.resources.items():
        if not 0 < tokens <= MAX_TOKENS:
            raise ValueError(f"process {process.pid} needs {tokens} of {name!r}; it must be 1 to {MAX_TOKENS:,}")


def _route_of(queue: str, priority: int, resources: dict[str, int], depth: int) -> Route:
    route = Route(queue, priority, resources, depth)
    return PLAIN if route == PLAIN else route


def _runnable(pid: str, route: Route) -> Effects:
    """One process became runnable."""
    return Effects(runnable=(pid,)) if route is PLAIN else Effects(runnable=(pid,), routes={pid: route})


def _check(save: Save) -> None:
    """Raises `ValueError` for a save that can't be meant."""
    for child in save.children:
        if child.key is not None:
            raise ValueError(f"the child {child.pid} has the key {child.key!r}: a child has none, its pid is its name")
    if save.state in TERMINAL_STATES and save.result is None:
        raise ValueError(f"process {save.pid} ends without a result: whoever waits for it could never go on")
    if save.keep_as is not None and save.checkpoint is None:
        raise ValueError(f"process {save.pid} has no checkpoint to be kept as the step {save.keep_as!r}")
    if () in save.waits:
        raise ValueError(f"process {save.pid} waits for a group of no processes, which nobody can complete")
    if save.wake_at is not None and math.isnan(save.wake_at):
        raise ValueError(f"process {save.pid} waits for a time that is no number: nothing would ever wake it")
    if save.listens and (stray := set(save.listens).difference(save.names)):
        raise ValueError(f"process {save.pid} listens for mail that it does not wait for: {', '.join(sorted(stray))}")


def _heart_bytes(kept: Kept) -> int:
    record = kept.record
    letters = sum(len(letter.body) for letter in record.inbox)
    return _ITEM_BYTES + len(record.checkpoint or b"") + len(record.result or b"") + letters


def _check_kept(kept: Kept) -> None:
    """Raises `ArchiveError` or `ValueError` for a copy that can't be meant."""
    record = kept.record
    pid = record.pid
    living = record.state in _LIVING_STATES
    seqs = [letter.seq for letter in record.inbox]
    is_meant = (
        (living or record.state in TERMINAL_STATES)
        and kept.good_state in _LIVING_STATES
        and record.play in (("playing", "paused") if living else ("playing", "pausing", "paused"))
        and record.checkpoint is not None
        and (record.result is None) == living
        and seqs == sorted(set(seqs))
        and (not seqs or (living and seqs[0] > 0 and seqs[-1] <= record.inbox_last))
        and 0 <= record.depth <= MAX_DEPTH
        and min(record.inbox_last, record.seq, kept.mail_last) >= 0
        and () not in kept.groups
        and set(kept.listens) <= set(record.names)
        and (record.wake_at is None or not math.isnan(record.wake_at))
    )
    if not is_meant:
        raise ArchiveError(f"what it says of process {pid} does not fit together; export it again")
    _check_new(
        NewProcess(
            pid=pid,
            class_id=record.class_id,
            checkpoint=b"",
            created_at=record.created_at,
            queue=record.queue,
            priority=record.priority,
            resources=record.resources,
            key=record.key,
        )
    )


def _are_here(pids: Iterable[str]) -> str:
    """That these exist already."""
    known = list(pids)
    more = f" and {len(known) - _SHOWN_PIDS} more" if len(known) > _SHOWN_PIDS else ""
    verb = "is" if len(known) == 1 else "are"
    shown = ", ".join(known[:_SHOWN_PIDS])
    return f"{shown}{more} {verb} here already; nothing was imported (--skip-existing leaves that out)"


def merge(effects: Iterable[Effects]) -> Effects:
    """All of them as one, nobody told twice."""
    gathered = [one for one in effects if one != NOTHING]
    if not gathered:
        return NOTHING
    return Effects(
        runnable=tuple(dict.fromkeys(pid for one in gathered for pid in one.runnable)),
        called=tuple(dict.fromkeys(pid for one in gathered for pid in one.called)),
        nudged=tuple(dict.fromkeys(nudge for one in gathered for nudge in one.nudged)),
        routes={pid: route for one in gathered for pid, route in one.routes.items()},
    )


def _record_of(row: tuple[Any, ...], **content: Any) -> Record:
    """From the columns of `_RECORD`."""
    *values, queue, resources, names, tags, waits = row
    return Record(
        **dict(zip(_RECORD_FIELDS, values, strict=True)),
        **content,
        queue=queue or DEFAULT_QUEUE,
        resources=_decode_resources(resources),
        names=_decode_texts(names),
        tags=_decode_texts(tags),
        waits=_decode_texts(waits),
    )


def _encode_texts(texts: Sequence[str]) -> str | None:
    return msgspec.json.encode(texts).decode() if texts else None


def _decode_texts(texts: str | None) -> tuple[str, ...]:
    return () if texts is None else _TEXTS_DECODER.decode(texts)


def _decode_resources(resources: str | None) -> dict[str, int]:
    return {} if resources is None else _RESOURCES_DECODER.decode(resources)


_TEXTS_DECODER = msgspec.json.Decoder(tuple[str, ...])
_RESOURCES_DECODER = msgspec.json.Decoder(dict[str, int])
_PARCEL_DECODER = msgspec.msgpack.Decoder(tuple[Portion, ...])


# --- the statements ---------------------------------------------------------------------------------

_UNFINISHED = "state NOT IN ('excepted', 'finished', 'killed')"

_RUNNABLE = f"owner IS NULL AND aside IS NULL AND play = 'playing' AND ready > {_PARKED}"
"""`_Row.is_runnable`. Written the same everywhere: SQLite uses a partial index only for the very same condition."""

_CALLED = "owner IS NULL AND inbox_last > inbox_done"
"""At least those that are `_Row.is_called`."""

_TAIL = f"substr(pid, -{TAIL_CHARS})"
"""The end of a pid; all of a short one."""

_ENDS = ("finished", "excepted", "killed")
_FIRST_STATES = ("created", "running")
_LIVING_STATES = (*_FIRST_STATES, "waiting")

_TABLES = (
    # The facts. `n` is the order of creation; what is large lives elsewhere, so that a claim rewrites little.
    """CREATE TABLE IF NOT EXISTS process (
        n INTEGER PRIMARY KEY,
        pid TEXT NOT NULL UNIQUE,
        class_id TEXT NOT NULL,
        parent TEXT,
        parent_close TEXT NOT NULL DEFAULT 'kill',
        state TEXT NOT NULL,
        play TEXT NOT NULL,
        good_state TEXT NOT NULL,          -- that of the last checkpoint that is not an end: a revived process is in it
        created_at REAL NOT NULL,
        updated_at REAL NOT NULL,
        epoch INTEGER NOT NULL DEFAULT 0,
        owner TEXT,
        seq INTEGER NOT NULL DEFAULT 0,
        status TEXT,
        step TEXT,
        progress REAL,
        detail TEXT,
        aside TEXT,
        ready INTEGER NOT NULL DEFAULT 0,
        wake_at REAL,
        names TEXT,                        -- JSON; NULL for none
        listens TEXT,
        inbox_done INTEGER NOT NULL DEFAULT 0,
        inbox_claimed INTEGER NOT NULL DEFAULT 0,  -- `inbox_last` at the last claim
        inbox_last INTEGER NOT NULL DEFAULT 0,
        mail_last INTEGER NOT NULL DEFAULT 0,
        mail_count INTEGER NOT NULL DEFAULT 0,     -- the rows in `mail`
        queue TEXT,                                -- NULL for the default one
        priority INTEGER NOT NULL DEFAULT 0,
        resources TEXT,                            -- JSON; NULL for none
        key TEXT,
        depth INTEGER NOT NULL DEFAULT 0,
        crashes INTEGER NOT NULL DEFAULT 0,
        ended_at REAL,                             -- NULL unless it is terminal
        wakers INTEGER                             -- NULL: not known
    )""",
    "CREATE INDEX IF NOT EXISTS process_by_state ON process (state)",
    "CREATE INDEX IF NOT EXISTS process_by_class ON process (class_id)",
    "CREATE INDEX IF NOT EXISTS process_by_parent ON process (parent)",
    # To tell the children of a parent that had very many (`_FIND_TOLD`).
    f"CREATE INDEX IF NOT EXISTS process_living_child ON process (parent) WHERE parent IS NOT NULL AND {_UNFINISHED}",
    "CREATE INDEX IF NOT EXISTS process_not_playing ON process (play) WHERE play <> 'playing'",
    "CREATE INDEX IF NOT EXISTS process_aside ON process (n) WHERE aside IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS process_held ON process (owner) WHERE owner IS NOT NULL",
    f"CREATE INDEX IF NOT EXISTS process_runnable ON process (n) WHERE {_RUNNABLE}",
    f"CREATE INDEX IF NOT EXISTS process_called ON process (n) WHERE {_CALLED}",
    "CREATE INDEX IF NOT EXISTS process_timer ON process (wake_at) WHERE wake_at IS NOT NULL",
    "CREATE UNIQUE INDEX IF NOT EXISTS process_by_key ON process (key) WHERE key IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS process_by_queue ON process (queue) WHERE queue IS NOT NULL",
    f"CREATE INDEX IF NOT EXISTS process_by_tail ON process ({_TAIL})",
    "CREATE INDEX IF NOT EXISTS process_ended ON process (state, ended_at) WHERE ended_at IS NOT NULL",
    # How many processes are in each state.
    "CREATE TABLE IF NOT EXISTS tally (state TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID",
    # The checkpoint and the result of a process, opaque.
    """CREATE TABLE IF NOT EXISTS content (
        process INTEGER PRIMARY KEY REFERENCES process (n) ON DELETE CASCADE,
        checkpoint BLOB NOT NULL,
        result BLOB
    )""",
    """CREATE TABLE IF NOT EXISTS tag (
        process INTEGER NOT NULL REFERENCES process (n) ON DELETE CASCADE,
        tag TEXT NOT NULL
    )""",
    "CREATE INDEX IF NOT EXISTS tag_of_process ON tag (process)",
    "CREATE INDEX IF NOT EXISTS tag_by_name ON tag (tag, process)",
    # Who waits for whom, in groups. Kept when ended, until the waiter goes on: a claim brings the results.
    """CREATE TABLE IF NOT EXISTS wait (
        waiter INTEGER NOT NULL REFERENCES process (n) ON DELETE CASCADE,
        ended INTEGER NOT NULL,
        grp INTEGER NOT NULL,
        target INTEGER NOT NULL REFERENCES process (n),
        PRIMARY KEY (waiter, ended, grp, target)  -- in this order: is any in a group still alive? is one step
    ) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS wait_for_target ON wait (target)",
    # Letters, until they are dealt with.
    """CREATE TABLE IF NOT EXISTS inbox (
        process INTEGER NOT NULL REFERENCES process (n) ON DELETE CASCADE,
        seq INTEGER NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (process, seq)
    ) WITHOUT ROWID""",
    # Answers to letters; `seq` is the letter's.
    """CREATE TABLE IF NOT EXISTS reply (
        process INTEGER NOT NULL REFERENCES process (n) ON DELETE CASCADE,
        seq INTEGER NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (process, seq)
    ) WITHOUT ROWID""",
    # Named messages, until they are consumed.
    """CREATE TABLE IF NOT EXISTS mail (
        process INTEGER NOT NULL REFERENCES process (n) ON DELETE CASCADE,
        seq INTEGER NOT NULL,
        name TEXT NOT NULL,
        body BLOB NOT NULL,
        at REAL NOT NULL,
        sender TEXT,
        PRIMARY KEY (process, seq)
    ) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS mail_by_name ON mail (process, name, seq)",
    # What its steps said.
    """CREATE TABLE IF NOT EXISTS line (
        process INTEGER NOT NULL REFERENCES process (n) ON DELETE CASCADE,
        seq INTEGER NOT NULL,
        at REAL NOT NULL,
        text TEXT NOT NULL,
        level TEXT NOT NULL,
        source TEXT,
        step TEXT,
        PRIMARY KEY (process, seq)
    ) WITHOUT ROWID""",
    # Past checkpoints; `seq` is that of the save. With a rowid: what is large stays out of the index.
    """CREATE TABLE IF NOT EXISTS past (
        process INTEGER NOT NULL REFERENCES process (n) ON DELETE CASCADE,
        seq INTEGER NOT NULL,
        step TEXT NOT NULL,
        at REAL NOT NULL,
        checkpoint BLOB NOT NULL,
        PRIMARY KEY (process, seq)
    )""",
    """CREATE TABLE IF NOT EXISTS event (
        process INTEGER NOT NULL REFERENCES process (n) ON DELETE CASCADE,
        seq INTEGER NOT NULL,
        subject TEXT NOT NULL,
        at REAL NOT NULL,
        step TEXT,
        note TEXT,
        by TEXT,
        PRIMARY KEY (process, seq)
    ) WITHOUT ROWID""",
    # What comes from elsewhere, until all of it is here.
    """CREATE TABLE IF NOT EXISTS arrival (
        name TEXT NOT NULL,
        number INTEGER NOT NULL,
        at REAL NOT NULL,
        size INTEGER NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (name, number)
    )""",
    "CREATE INDEX IF NOT EXISTS arrival_by_age ON arrival (at, size)",
    # The highest epoch of a deleted process: a new one with the same pid begins above it.
    "CREATE TABLE IF NOT EXISTS fence (epoch INTEGER NOT NULL)",
)

_COPIED: dict[str, tuple[Callable[[tuple[Any, ...]], Any], str]] = {
    "mail": (
        lambda values: Mail(*values),
        "SELECT seq, name, body, at, sender FROM mail WHERE process = ? AND seq > ? ORDER BY seq",
    ),
    "replies": (
        lambda values: Reply(*values),
        "SELECT seq, body FROM reply WHERE process = ? AND seq > ? ORDER BY seq",
    ),
    "steps": (
        lambda values: PastStep(*values),
        "SELECT seq, step, at, checkpoint FROM past WHERE process = ? AND seq > ? ORDER BY seq",
    ),
    "events": (
        lambda values: Event(**dict(zip(("seq", "subject", "at", "step", "note", "by"), values, strict=True))),
        "SELECT seq, subject, at, step, note, by FROM event WHERE process = ? AND seq > ? ORDER BY seq",
    ),
    "lines": (
        lambda values: LogLine(**dict(zip(("seq", "at", "text", "level", "source", "step"), values, strict=True))),
        "SELECT seq, at, text, level, source, step FROM line WHERE process = ? AND seq > ? ORDER BY seq",
    ),
}
"""How each section of a copy is read: what a row of it is, and the statement; the number comes first."""

_STAGE = "INSERT OR REPLACE INTO arrival (name, number, at, size, body) VALUES (?, ?, ?, ?, ?)"
"""A parcel of what is to be adopted."""

_ARRIVED_BYTES = "SELECT coalesce(sum(size), 0) FROM arrival"
"""Parcels are large, so they are few."""

_COUNT_PARCELS = "SELECT count(*) FROM arrival WHERE name = ? AND number < ?"
"""How many of the first parcels of an arrival are there."""

_PARCEL = "SELECT body FROM arrival WHERE name = ? AND number = ?"
"""One of these."""

_FORGET_ARRIVAL = "DELETE FROM arrival WHERE name = ?"
"""It is adopted."""

_FORGET_STRANDED = "DELETE FROM arrival WHERE at < ?"
"""Whoever brought it is gone."""

_ADOPT = """
    INSERT INTO process (pid, class_id, parent, parent_close, created_at, updated_at, state, good_state, play, seq,
                         status, step, progress, detail, aside, ready, wake_at, names, listens, inbox_done,
                         inbox_claimed, inbox_last, mail_last, queue, priority, resources, key, depth, ended_at)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT DO NOTHING"""
"""A process from elsewhere, unless its pid or its key is taken."""

_TIDY_ADOPTED = """
    UPDATE process SET
        mail_count = (SELECT count(*) FROM mail WHERE process = n),
        mail_last = max(mail_last, (SELECT coalesce(max(seq), 0) FROM mail WHERE process = n)),
        seq = max(seq, (SELECT coalesce(max(seq), 0) FROM past WHERE process = n))
    WHERE n = ?"""
"""Whatever came with it: the next number is above those that are there."""

_HAS_TABLES = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'process'"

_FROM_VERSION_1 = (
    # There a wait was one group, `done` or not, and who waited for a letter alone was `suspended`.
    "ALTER TABLE process RENAME COLUMN suspended TO ready",
    "ALTER TABLE process ADD COLUMN parent_close TEXT NOT NULL DEFAULT 'kill'",
    "ALTER TABLE process ADD COLUMN progress REAL",
    "ALTER TABLE process ADD COLUMN detail TEXT",
    "ALTER TABLE process ADD COLUMN wake_at REAL",
    "ALTER TABLE process ADD COLUMN names TEXT",
    "ALTER TABLE process ADD COLUMN listens TEXT",
    "ALTER TABLE process ADD COLUMN mail_last INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE process ADD COLUMN mail_count INTEGER NOT NULL DEFAULT 0",
    f"""UPDATE process SET ready = CASE
            WHEN state IN ('excepted', 'finished', 'killed') THEN {_PARKED}
            WHEN state <> 'waiting' THEN {_READY}
            WHEN ready OR EXISTS (SELECT 1 FROM wait WHERE waiter = process.n AND done = 0) THEN {_PARKED}
            WHEN EXISTS (SELECT 1 FROM wait WHERE waiter = process.n) THEN {_BY_GROUP}
            ELSE {_READY} END""",
    "DROP INDEX process_unfinished",
    "DROP INDEX wait_for_target",
    "ALTER TABLE wait RENAME TO wait_of_version_1",
    next(table for table in _TABLES if "EXISTS wait (" in table),
    f"""INSERT INTO wait (waiter, ended, grp, target)
        SELECT waiter, CASE done WHEN 0 THEN {_ALIVE} ELSE {_NEWS} END, 1, target FROM wait_of_version_1""",
    "DROP TABLE wait_of_version_1",
)
"""How the tables of version 1 become those of version 2; what is new is made as in a new database."""

_FROM_VERSION_2 = (
    # There every process was in one queue, and nobody knew how deep in its tree it was.
    "ALTER TABLE process ADD COLUMN queue TEXT",
    "ALTER TABLE process ADD COLUMN priority INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE process ADD COLUMN resources TEXT",
    "ALTER TABLE process ADD COLUMN key TEXT",
    "ALTER TABLE process ADD COLUMN depth INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE process ADD COLUMN crashes INTEGER NOT NULL DEFAULT 0",
    """WITH RECURSIVE below (n, pid, depth) AS (
           SELECT child.n, child.pid, 1 FROM process AS child JOIN process AS parent ON parent.pid = child.parent
           WHERE parent.parent IS NULL OR parent.parent NOT IN (SELECT pid FROM process)
           UNION ALL
           SELECT child.n, child.pid, below.depth + 1 FROM below JOIN process AS child ON child.parent = below.pid)
       UPDATE process SET depth = below.depth FROM below WHERE below.n = process.n""",
    "ALTER TABLE process ADD COLUMN ended_at REAL",
    "ALTER TABLE process ADD COLUMN wakers INTEGER",
    f"UPDATE process SET ended_at = updated_at WHERE NOT ({_UNFINISHED})",
)
"""How the tables of version 2 become these."""

_FROM_VERSIONS = ((1, _FROM_VERSION_1), (2, _FROM_VERSION_2))
"""Each brings the tables of this version to the next."""

_CREATE = f"""
    INSERT INTO process (pid, class_id, parent, parent_close, created_at, updated_at, state, good_state, play, step,
                         status, queue, priority, resources, key, depth, ready)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {_READY}) ON CONFLICT DO NOTHING"""
"""A new process, unless its pid or its key is taken."""

_TAKEN = "SELECT pid FROM process WHERE pid = ?1 OR key = ?2 ORDER BY pid <> ?1 LIMIT 1"
"""Who has this pid, or else this key."""

_DEPTH = "SELECT depth FROM process WHERE pid = ?"
"""How deep in its tree a process is."""

_SET_CHECKPOINT = """
    INSERT INTO content (process, checkpoint) VALUES (?, ?)
    ON CONFLICT (process) DO UPDATE SET checkpoint = excluded.checkpoint"""
"""The newest good checkpoint of a process."""

_SET_RESULT = "UPDATE content SET result = ? WHERE process = ?"
"""How a process ended; NULL when it is revived."""

_CHECKPOINT = "SELECT checkpoint FROM content WHERE process = ?"
"""To compare a save that is said again."""

_CONTENT = "SELECT checkpoint, result FROM content WHERE process = ?"
"""What is large, for a claim or a load."""

_ADD_TAG = "INSERT INTO tag (process, tag) VALUES (?, ?)"
"""One tag of a new process; they keep their order."""

_FACTS = """
    SELECT n, pid, state, play, good_state, epoch, owner, seq, aside, ready, names, listens,
           inbox_done, inbox_claimed, inbox_last, mail_last, mail_count, queue, priority, resources, depth, crashes,
           step
    FROM process"""
"""The columns of `_Row`."""

_FIND = f"{_FACTS} WHERE pid = ?"
"""One process by its pid."""

_FIND_TARGET = "SELECT n, state FROM process WHERE pid = ?"
"""What a wait needs to know of a process."""

_GROUP_IS_COMPLETE = f"""
    NOT EXISTS (SELECT 1 FROM wait WHERE waiter = member.waiter AND ended = {_ALIVE} AND grp = member.grp)"""

_FIND_COMPLETED = f"""{_FACTS}
    WHERE n IN (SELECT waiter FROM wait AS member WHERE target = ? AND {_GROUP_IS_COMPLETE}) ORDER BY n"""
"""Those with a complete group in which is the process that has ended."""

_FIND_RUNNABLE = f"{_FACTS} WHERE {_RUNNABLE} ORDER BY n"
"""Everything that somebody must claim to step."""

_FIND_CALLED = f"{_FACTS} WHERE {_CALLED} ORDER BY n"
"""Everything that somebody must claim for its letters (some of those that are aside have no new ones)."""

_FIND_DUE = f"{_FACTS} WHERE wake_at <= ? ORDER BY wake_at LIMIT ?"
"""Everything whose timer has run out, the earliest first."""

_NEXT_WAKE = "SELECT wake_at FROM process WHERE wake_at IS NOT NULL ORDER BY wake_at LIMIT 1"
"""The next timer."""

_FIRE = "UPDATE process SET wake_at = NULL WHERE n = ?"
"""A timer has fired."""

_SET_READY = "UPDATE process SET ready = ? WHERE n = ?"
"""A waiting process may go on."""

_TAKE_BACK = f"""
    UPDATE process SET ready = {_PARKED}
    WHERE n IN (SELECT waiter FROM wait WHERE target = ?) AND ready = {_BY_GROUP} AND NOT EXISTS (
        SELECT 1 FROM wait AS member WHERE waiter = process.n AND ended = {_NEWS} AND {_GROUP_IS_COMPLETE})"""
"""A process was revived: its waiters have one complete group less."""

_FIND_HELD = "SELECT pid FROM process INDEXED BY process_held WHERE owner IS NOT NULL ORDER BY n"
"""Everything that somebody holds."""

_FIND_HELD_BY = "SELECT pid FROM process INDEXED BY process_held WHERE owner = ? ORDER BY n"
"""Everything that one of them holds."""

_COUNT_STATES = "SELECT state, count FROM tally WHERE count > 0 ORDER BY state"
"""How many processes are in each state."""

_FORGET_COUNTS = "DELETE FROM tally"
"""They are counted anew."""

_COUNT_ALL = "INSERT INTO tally (state, count) SELECT state, count(*) FROM process GROUP BY state"
"""Read from an index alone: 40 ms for a million."""

_ONE_MORE = "INSERT INTO tally (state, count) VALUES (?, 1) ON CONFLICT (state) DO UPDATE SET count = count + 1"
"""A process came into a state."""

_LESS = "UPDATE tally SET count = count - ? WHERE state = ?"
"""So many have left one."""

_CLAIM = "UPDATE process SET epoch = ?, owner = ?, updated_at = ?, inbox_claimed = inbox_last WHERE n = ?"
"""A new owner under a new epoch."""

_SAVE = """
    UPDATE process SET good_state = ?, status = ?, step = ?, progress = ?, detail = ?, updated_at = ?, crashes = ?,
           state = ?, play = ?, owner = ?, inbox_done = ?, ready = ?, wake_at = ?, names = ?, listens = ?,
           wakers = ?, ended_at = ?, aside = NULL, seq = seq + 1
    WHERE n = ?"""
"""Where a process stands now. What was saved can go on, so it is not aside any more."""

_SAVE_IN_PLACE = """
    UPDATE process SET good_state = ?, status = ?, step = ?, progress = ?, detail = ?, updated_at = ?, crashes = ?,
           seq = seq + 1
    WHERE n = ?"""
"""The same when nothing changed that has an index, which is most of the time: a third of the cost."""

_NOTE = """
    UPDATE process SET progress = coalesce(?, progress), detail = coalesce(?, detail), status = coalesce(?, status),
           updated_at = ?
    WHERE n = ?"""
"""What a running step says of itself."""

_RELEASE = "UPDATE process SET owner = NULL, aside = ?, updated_at = ? WHERE n = ?"
"""Nobody holds it any more; it may be aside for a reason."""

_LOSE = "UPDATE process SET owner = NULL, updated_at = ? WHERE n = ?"
"""Whoever held it is gone."""

_BLAME = "UPDATE process SET crashes = ?, aside = ? WHERE n = ?"
"""A worker died in its step."""

_PARDON = "UPDATE process SET crashes = crashes - 1 WHERE pid = ? AND crashes > 0 AND aside IS NULL"
"""It was not the one in whose step a worker died."""

_FIND_OWNERS = "SELECT DISTINCT owner FROM process INDEXED BY process_held WHERE owner IS NOT NULL"
"""Everybody who holds something."""

_NEWEST = "SELECT created_at FROM process WHERE n > 0 ORDER BY n DESC LIMIT 1"
"""The newest process."""

_OVERDUE = "SELECT pid, wake_at FROM process WHERE wake_at < ? ORDER BY wake_at LIMIT ?"
"""Those whose timer did not fire."""

_LOST = f"""
    SELECT n, pid, is_parked, count, wakers,
           is_parked AND count AND EXISTS (
               SELECT 1 FROM wait AS member JOIN process AS target ON target.n = member.target
               WHERE member.waiter = parked.n GROUP BY member.grp
               HAVING min(CASE WHEN target.{_UNFINISHED} THEN {_ALIVE} ELSE max(member.ended, {_NEWS}) END) = {_NEWS}),
           is_parked AND count AND EXISTS (
               SELECT 1 FROM wait AS member JOIN process AS target ON target.n = member.target
               WHERE member.waiter = parked.n AND (member.ended > {_ALIVE}) = (target.{_UNFINISHED})),
           inbox_last < (SELECT coalesce(max(seq), 0) FROM inbox WHERE process = parked.n)
    FROM (SELECT n, pid, inbox_last, wakers, ready <= {_PARKED} AS is_parked,
                 (SELECT count(*) FROM wait WHERE waiter = process.n) + (wake_at IS NOT NULL)
                 + coalesce(json_array_length(listens), 0) AS count
          FROM process INDEXED BY process_by_state
          WHERE state = ? AND n > ? AND owner IS NULL) AS parked
    ORDER BY n"""
"""Those that nothing but their waits or a letter can wake, and what their rows say of that."""

_SET_TARGETS = f"""
    UPDATE wait SET ended = CASE WHEN (SELECT {_UNFINISHED} FROM process WHERE n = target) THEN {_ALIVE}
                                 ELSE max(ended, {_NEWS}) END
    WHERE waiter = ?"""
"""Who of those that a process waits for has ended."""

_COUNT_LETTERS_AGAIN = """
    UPDATE process SET inbox_last = max(inbox_last, (SELECT coalesce(max(seq), 0) FROM inbox WHERE process = n))
    WHERE n = ?"""
"""Letters that are there count."""

_REVIVE = f"""
    UPDATE process SET state = ?, aside = NULL, crashes = 0, ready = {_READY}, ended_at = NULL, updated_at = ?
    WHERE n = ?"""
"""It goes on from its last good checkpoint (which says itself what it waits for)."""

_RECORD_COLUMNS = (
    "pid, class_id, state, play, created_at, updated_at, epoch, seq, parent, parent_close, "
    "owner, status, step, progress, detail, aside, wake_at, inbox_done, inbox_last, mail_count, "
    "priority, key, depth, crashes"
)
_RECORD_FIELDS = _RECORD_COLUMNS.replace("mail_count", "mail").split(", ")

_RECORD = f"""
    SELECT {_RECORD_COLUMNS}, queue, resources, names,
           (SELECT json_group_array(tag) FROM (SELECT tag FROM tag WHERE process = process.n ORDER BY rowid)),
           CASE state WHEN 'waiting' THEN
               (SELECT json_group_array(pid) FROM (SELECT DISTINCT target.pid
                                                   FROM wait JOIN process AS target ON target.n = target
                                                   WHERE waiter = process.n AND ended = {_ALIVE} ORDER BY target.n))
           END
    FROM process"""
"""Rows for people, each with its tags in their order and what it still waits for."""

_RESULTS_WAITED_FOR = f"""
    SELECT pid, result FROM wait JOIN process ON n = target JOIN content ON content.process = target
    WHERE waiter = ? AND ended > {_ALIVE} ORDER BY process.updated_at, target"""
"""The results of those that a process waited for and that have ended, in the order in which they did. (The clock of
this one store says it; should it be set back meanwhile, two results change places, and nothing else.)"""

_WAITS = "SELECT grp, target, pid, ended FROM wait JOIN process ON n = target WHERE waiter = ?"
"""The columns of `_Wait`."""

_ADD_WAIT = "INSERT INTO wait (waiter, ended, grp, target) VALUES (?, ?, ?, ?)"
"""One process in a group of a process that waits."""

_CHANGE_WAIT = "UPDATE wait SET ended = ? WHERE waiter = ? AND ended = ? AND grp = ? AND target = ?"
"""Its waiter has looked at it (or not, after all)."""

_FORGET_WAIT = "DELETE FROM wait WHERE waiter = ? AND ended = ? AND grp = ? AND target = ?"
"""Its waiter does not wait for this group any more."""

_FORGET_WAITS = "DELETE FROM wait WHERE waiter = ?"
"""A process goes on."""

_SET_ENDED = "UPDATE wait SET ended = ? WHERE target = ?"
"""A process ended, or was revived."""

_ANY_WAITER = "SELECT pid FROM wait JOIN process ON n = waiter WHERE target = ? LIMIT 1"
"""Somebody who needs the result of a process."""

_ADD_LETTER = "INSERT INTO inbox (process, seq, body) VALUES (?, ?, ?)"
"""A message for a process."""

_COUNT_LETTER = "UPDATE process SET inbox_last = ? WHERE n = ?"
"""The number of its newest message."""

_LETTERS = "SELECT seq, body FROM inbox WHERE process = ? ORDER BY seq"
"""The messages that a process has not dealt with (the others are gone)."""

_FORGET_LETTERS = "DELETE FROM inbox WHERE process = ? AND seq <= ?"
"""The messages that are dealt with."""

_FIND_TOLD = f"""
    SELECT pid, owner FROM process
    WHERE parent = ? AND {_UNFINISHED} AND parent_close IN (SELECT value FROM json_each(?)) ORDER BY n"""
"""The children that are to get a letter."""

_ADD_LETTERS = f"""
    INSERT INTO inbox (process, seq, body) SELECT n, inbox_last + 1, ? FROM process
    WHERE parent = ? AND {_UNFINISHED} AND parent_close IN (SELECT value FROM json_each(?))"""
"""The same message for each of these."""

_COUNT_LETTERS = f"""
    UPDATE process SET inbox_last = inbox_last + 1
    WHERE parent = ? AND {_UNFINISHED} AND parent_close IN (SELECT value FROM json_each(?))"""
"""The number of their newest message."""

_ADD_REPLY = "INSERT OR REPLACE INTO reply (process, seq, body) VALUES (?, ?, ?)"
"""The answer to a letter."""

_REPLY = "SELECT body FROM reply WHERE process = ? AND seq = ?"
"""One of these."""

_FORGET_REPLIES = """
    DELETE FROM reply WHERE process = ? AND seq <= (
        SELECT seq FROM reply WHERE process = ? ORDER BY seq DESC LIMIT 1 OFFSET ?)"""
"""All but the newest."""

_ADD_MAIL = "INSERT INTO mail (process, seq, name, body, at, sender) VALUES (?, ?, ?, ?, ?, ?)"
"""A named message."""

_COUNT_MAIL = "UPDATE process SET mail_last = ?, mail_count = ? WHERE n = ?"
"""Mail came, or went."""

_ANY_MAIL = """
    SELECT 1 FROM json_each(?2) CROSS JOIN mail INDEXED BY mail_by_name ON process = ?1 AND name = value LIMIT 1"""
"""Whether a process has mail with one of some names."""

_OLDEST_MAIL = """
    SELECT seq, name, body, at, sender FROM mail INDEXED BY mail_by_name
    WHERE process = ? AND name = ? ORDER BY seq LIMIT 1"""
"""The next message of a name."""

_FORGET_MAIL = "DELETE FROM mail WHERE process = ? AND seq = ?"
"""A message is used up."""

_FORGET_ALL_MAIL = "DELETE FROM mail WHERE process = ?"
"""Nobody will use it any more."""

_LAST_LINE = "SELECT coalesce(max(seq), 0) FROM line WHERE process = ?"
"""The number of the newest line of a log."""

_ADD_LINE = "INSERT INTO line (process, seq, at, text, level, source, step) VALUES (?, ?, ?, ?, ?, ?, ?)"
"""One line of a log."""

_FORGET_LINES = "DELETE FROM line WHERE process = ? AND seq <= ?"
"""The oldest of them."""

_LOG = "SELECT seq, at, text, level, source, step FROM line WHERE process = ? AND seq > ? ORDER BY seq LIMIT ?"
"""A part of a log, oldest first."""

_LOG_END = "SELECT seq, at, text, level, source, step FROM line WHERE process = ? AND seq > ? ORDER BY seq DESC LIMIT ?"
"""The end of a log, newest first."""

_KEEP_STEP = "INSERT INTO past (process, seq, step, at, checkpoint) VALUES (?, ?, ?, ?, ?)"
"""A checkpoint from which another process can go on."""

_FORGET_STEPS = """
    DELETE FROM past WHERE process = ? AND seq <= (
        SELECT seq FROM past WHERE process = ? ORDER BY seq DESC LIMIT 1 OFFSET ?)"""
"""All but the newest."""

_PAST = "SELECT seq, step, at FROM past WHERE process = ? ORDER BY seq"
"""The columns of `Past`."""

_PAST_CHECKPOINT = "SELECT checkpoint FROM past WHERE process = ? AND seq = ?"
"""One of these."""

_LAST_EVENT = "SELECT coalesce(max(seq), 0) FROM event WHERE process = ?"
"""The number of the newest line of a history."""

_ADD_EVENT = "INSERT INTO event (process, seq, subject, at, step, note, by) VALUES (?, ?, ?, ?, ?, ?, ?)"
"""One line of a history."""

_FORGET_EVENTS = "DELETE FROM event WHERE process = ? AND seq > ? AND seq <= ?"
"""Those in the middle of a history."""

_HISTORY = "SELECT seq, subject, at, step, note, by FROM event WHERE process = ? AND seq > ? ORDER BY seq"
"""A part of a history, oldest first."""

_DELETED_EPOCH = "SELECT coalesce(max(epoch), 0) FROM fence"
"""The highest epoch of all deleted processes."""

_KEEP_EPOCH = (
    "INSERT OR REPLACE INTO fence (rowid, epoch) VALUES (1, max(?, (SELECT coalesce(max(epoch), 0) FROM fence)))"
)
"""A process is about to be deleted."""

_RAISE_EPOCHS = (
    "INSERT OR REPLACE INTO fence (rowid, epoch) VALUES (1, ? + max((SELECT coalesce(max(epoch), 0) FROM fence), "
    "(SELECT coalesce(max(epoch), 0) FROM process)))"
)
"""A copy of a database goes on in its place."""

_DELETE = "DELETE FROM process WHERE n = ?"
"""A process and all that belongs to it."""

_IS_NEEDED = f"""
    (EXISTS (SELECT 1 FROM wait WHERE target = process.n)
     OR EXISTS (SELECT 1 FROM process AS child WHERE child.parent = process.pid AND child.{_UNFINISHED}))"""
"""Whether somebody waits for a process, or a child of it has not ended."""

_FIND_ENDED = f"""
    SELECT ended_at, n, epoch, {_IS_NEEDED} FROM process INDEXED BY process_ended
    WHERE state = ? AND (ended_at, n) > (?, ?) AND ended_at < ? ORDER BY ended_at, n LIMIT ?"""
"""Some of those that ended, the longest ended first, and whether they are needed."""


def _query_statement(query: Query, before: int | None) -> tuple[str, list[Any]]:
    """The numbers of the matching processes, newest first.

    Each state is a query of its own, limited by itself, and then the newest of all are taken: so each is a walk along
    one index from its end, however many processes there are.
    """
    states = query.states
    if query.unfinished:
        states = tuple(state for state in states or _LIVING_STATES if state in _LIVING_STATES)
        if not states:
            return "SELECT n FROM process WHERE false", []
    order = "n" if query.tag is None else "tag.process"
    parts: list[str] = []
    values: list[Any] = []
    for state in dict.fromkeys(states) or (None,):
        source, where, wanted = _conditions(query, state, before)
        parts.append(f"SELECT * FROM (SELECT n FROM {source} WHERE {where} ORDER BY {order} DESC LIMIT ?)")
        values += [*wanted, query.at_most]
    return f"{' UNION '.join(parts)} ORDER BY n DESC LIMIT ?", [*values, query.at_most]


def _prune_statement(query: Query, state: str) -> tuple[str, list[Any]]:
    """(ended_at, n, epoch) of those that ended in `state`, match and are not needed; the longest ended first."""
    source, where, values = _conditions(query, state, None)
    if query.updated_before is not None:
        where, values = f"{where} AND ended_at < ?", [*values, query.updated_before]
    if query.unfinished:
        where = f"false AND {where}"
    return (
        f"SELECT ended_at, n, epoch FROM {source} WHERE ended_at IS NOT NULL AND {where} AND NOT {_IS_NEEDED} "
        "ORDER BY ended_at, n LIMIT ?"
    ), [*values, query.at_most]


def _conditions(query: Query, state: str | None, before: int | None) -> tuple[str, str, list[Any]]:
    """What the processes that match are chosen from, by which condition, with which values."""
    terms: list[str] = []
    values: list[Any] = []

    def must(term: str, *wanted: Any) -> None:
        terms.append(term)
        values.extend(wanted)

    if state is not None:
        must("state = ?", state)
    if query.play is not None:
        must("play = ?", query.play)
        if query.play != "playing":
            must("play <> 'playing'")
    if query.class_id is not None:
        must("class_id = ?", query.class_id)
    if query.parent is not None:
        must("parent = ?", query.parent)
    if query.tag is not None:
        must("tag = ?", query.tag)
    if query.key is not None:
        must("key = ?", query.key)
    if query.queue == DEFAULT_QUEUE:
        must("queue IS NULL")
    elif query.queue is not None:
        must("queue = ?", query.queue)
    if query.prefix:
        must(*_named_so(query.prefix))
    if query.created_before is not None:
        must("created_at < ?", query.created_before)
    if query.updated_before is not None:
        must("updated_at < ?", query.updated_before)
    if before is not None:
        must("n < ?", before)
    if query.roots:
        must("parent IS NULL")
    if query.aside is not None:
        must(f"aside IS {'NOT ' if query.aside else ''}NULL")
    source = "process" if query.tag is None else "tag JOIN process ON n = tag.process"
    return source, " AND ".join(terms) or "true", values


def _named_so(text: str) -> tuple[str, *tuple[Any, ...]]:
    """The condition that a pid begins or ends with `text`, and its values. A beginning is found by an index, an end of
    `TAIL_CHARS` (and that is what people see of a pid) or more too; one of fewer by a walk along all pids (0.2 s for a
    million)."""
    wanted: tuple[Any, ...]
    if len(text) >= TAIL_CHARS:
        ends, wanted = f"{_TAIL} = ? AND substr(pid, ?) = ?", (text[-TAIL_CHARS:], -len(text), text)
    else:
        ends, wanted = "substr(pid, ?) = ?", (-len(text), text)
    return (
        f"n IN (SELECT n FROM process WHERE pid >= ? AND pid < ? UNION ALL SELECT n FROM process WHERE {ends})",
        *(text, text + _LAST_CHARACTER),
        *wanted,
    )


_LAST_CHARACTER = chr(0x10FFFF)
"""Sorts behind every other."""


# --- the seam over a connection of our own ----------------------------------------------------------

EffectsCallback = Callable[[Effects], None]


@dataclass(slots=True)
class _Job:
    """A request on its way through a commit."""

    request: Request
    answer: Any = None
    error: BaseException | None = None
    future: asyncio.Future[Any] | None = None

    def settle(self) -> None:
        """In the loop of the one who asked."""
        if self.future is None or self.future.done():  # it may have been cancelled
            return
        if self.error is None:
            self.future.set_result(self.answer)
        else:
            self.future.set_exception(self.error)


def _commit_together(store: ProcessStore, connection: sqlite3.Connection, jobs: Sequence[_Job]) -> Effects:
    """Do all `jobs` in one transaction. One that is refused leaves no trace and does not disturb the others.

    If it raises, nothing was done: `StoreFullError` lets one try again, after anything else `connection` is unusable.
    """
    effects = []
    connection.execute("BEGIN")
    try:
        for job in jobs:
            connection.execute("SAVEPOINT request")
            try:
                job.answer, caused = perform(store, job.request)
            except (PrunusError, ValueError, TypeError, OverflowError) as error:  # refused; the caller will hear of it
                if not connection.in_transaction:  # SQLite gave up all of it: the disk is full
                    raise
                job.error = error
                connection.execute("ROLLBACK TO request")
            else:
                effects.append(caused)
            connection.execute("RELEASE request")
        commit(connection)
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return merge(effects)


class MemoryPersister(PersisterOfRequests):
    """The seam without a disk: the very `ProcessStore`, on a database in memory, run inline. For tests and scripts."""

    def __init__(self, *, on_effects: EffectsCallback | None = None, clock: Callable[[], float] = time.time) -> None:
        self._connection = open_database(MEMORY)
        self._store = ProcessStore(self._connection, clock=clock)
        self._on_effects = on_effects

    async def ask(self, request: Request) -> Any:
        job = _Job(request)
        effects = _commit_together(self._store, self._connection, [job])
        if job.error is not None:
            raise job.error
        if self._on_effects is not None and effects != NOTHING:
            self._on_effects(effects)
        return job.answer

    async def close(self) -> None:
        self._connection.close()

    async def __aenter__(self) -> MemoryPersister:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


@dataclass(frozen=True, slots=True)
class PersisterStatistics:
    """Since it was opened: how many requests, in how many commits (each at most one fsync)."""

    requests: int
    commits: int


class SqlitePersister(PersisterOfRequests):
    """The seam over a file that this program opens itself; an async context manager.

    One thread owns the connection. It takes all requests that are waiting, runs each in a savepoint and commits them
    together: however many arrive while the disk is busy, they cost one fsync (group commit). Nobody hears of a request
    before it is durable. It may be used from several event loops; `on_effects` is called in the one that opened it.

    When the disk is full the requests of that commit fail with `StoreFullError`, and later ones are tried anew. After
    any other error at a commit nobody knows what the disk holds: this and every later request fails.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        on_effects: EffectsCallback | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = os.fspath(path)
        self._on_effects = on_effects
        self._clock = clock
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._open = False
        self._broken: BaseException | None = None
        self._opener = os.getpid()
        self._requests = self._commits = 0
        self._loop: asyncio.AbstractEventLoop
        self._ended: ThreadFuture[None]

    async def __aenter__(self) -> SqlitePersister:
        """Open the file; raises as `open_database` does."""
        self._loop = asyncio.get_running_loop()
        self._jobs, self._ended, self._broken = queue.SimpleQueue(), ThreadFuture(), None
        opened: ThreadFuture[None] = ThreadFuture()
        threading.Thread(target=self._serve, args=(opened,), name=f"prunus-store {self._path}", daemon=True).start()
        try:
            await asyncio.shield(asyncio.wrap_future(opened))
        except asyncio.CancelledError:
            self._jobs.put(None)  # nobody will use it
            raise
        self._opener, self._open = os.getpid(), True
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Finish what was asked, close the file. Idempotent."""
        self._refuse_fork()
        with self._gate:
            if self._open:
                self._open = False
                self._jobs.put(None)
        await asyncio.shield(asyncio.wrap_future(self._ended))

    async def ask(self, request: Request) -> Any:
        self._refuse_fork()
        loop = asyncio.get_running_loop()
        job = _Job(request, future=loop.create_future())
        with self._gate:
            if not self._open:
                raise PersistenceError(f"the store {self._path} is not open")
            self._jobs.put(job)
        assert job.future is not None
        return await job.future

    def statistics(self) -> PersisterStatistics:
        return PersisterStatistics(requests=self._requests, commits=self._commits)

    def _refuse_fork(self) -> None:
        if os.getpid() != self._opener:
            raise ForkedProcessError("process store")

    # --- in the thread ------------------------------------------------------------------------------

    def _serve(self, opened: ThreadFuture[None]) -> None:
        try:
            connection = open_database(self._path)
            try:
                store = ProcessStore(connection, clock=self._clock)
            except BaseException:
                connection.close()
                raise
        except BaseException as error:  # whoever opens gets it
            self._ended.set_result(None)
            opened.set_exception(error)
            return
        opened.set_result(None)
        try:
            for jobs in self._batches():
                self._do(store, connection, jobs)
            if self._broken is None:
                checkpoint_wal(connection)
        finally:
            connection.close()
            self._ended.set_result(None)

    def _batches(self) -> Iterator[list[_Job]]:
        """What is waiting, as often as something is; ends when the store is closed and all is done."""
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            while len(jobs) < MAX_BATCH:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    yield jobs
                    return
                jobs.append(job)
            yield jobs

    def _do(self, store: ProcessStore, connection: sqlite3.Connection, jobs: list[_Job]) -> None:
        effects = NOTHING
        try:
            if self._broken is not None:
                raise PersistenceError(f"the store {self._path} failed before: {self._broken}") from self._broken
            effects = _commit_together(store, connection, jobs)
            self._requests += len(jobs)
            self._commits += 1
        except PersistenceError as error:
            _fail(jobs, error)
        except BaseException as error:  # the outermost loop of the thread: everybody must hear of it
            logger.error("%s can't be written any more (%s); all that is asked from now on fails", self._path, error)
            self._broken = error
            failed = PersistenceError(f"{self._path} can't be written ({error}); what was asked was not done")
            failed.__cause__ = error
            _fail(jobs, failed)
        self._deliver(jobs, effects)
        if self._broken is None and wal_bytes(self._path) > WAL_LIMIT_BYTES:
            checkpoint_wal(connection)

    def _deliver(self, jobs: list[_Job], effects: Effects) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, deque[Callable[[], None]]] = {}
        if self._on_effects is not None and effects != NOTHING:
            callback = self._on_effects
            by_loop.setdefault(self._loop, deque()).append(lambda: callback(effects))
        for job in jobs:
            if job.future is not None:
                by_loop.setdefault(job.future.get_loop(), deque()).append(job.settle)
        for loop, calls in by_loop.items():
            try:
                loop.call_soon_threadsafe(_call_all, calls)
            except RuntimeError:
                logger.debug("an event loop was closed before its requests were answered; they are durable")


def _fail(jobs: Iterable[_Job], error: BaseException) -> None:
    for job in jobs:
        job.answer, job.error = None, error


def _call_all(calls: Iterable[Callable[[], None]]) -> None:
    for call in calls:
        call()
