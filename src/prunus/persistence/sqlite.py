"""The process store on SQLite: the one truth about who exists, who owns whom, and who can go on.

`ProcessStore` is synchronous and works in its caller's transaction, so that whoever owns the connection decides what
becomes durable together (a broker puts its queue in the same file). If an operation raises, the caller rolls back to
where it began. `SqlitePersister` is the asynchronous seam over a file that this program opens itself; `MemoryPersister`
the same without a file.

Invariants:

* `epoch` only rises, and only `claim` raises it. Who writes names the epoch of its claim and must still be the owner.
  A pid that is used again after `delete` begins above all epochs that it had.
* A wait is *done* exactly while its target is terminal. Wait rows live as long as the waiter is ``waiting``.
* Whether an unheld process is runnable or called is a function of its row (`_Row.is_runnable`, `_Row.is_called`), used
  wherever a row changes and when everything is looked through (`unheld_work`).
* An unfinished process that is unheld and runnable or called was reported in the `Effects` of the operation that
  made it so.

Saying an operation again (a client that got no answer does) is harmless: `create` keeps the first one, `claim` only
raises the epoch, `release`, `set_aside` and a last `save` that are there already are answered as before. Only `post`
adds a second letter.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future as ThreadFuture
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from prunus.errors import (
    CheckpointNotFoundError,
    ForkedProcessError,
    InvalidStateError,
    PersistenceError,
    PrunusError,
    StaleOwnerError,
)
from prunus.persistence.database import (
    MEMORY,
    WAL_LIMIT_BYTES,
    checkpoint_wal,
    commit,
    database_path,
    full_disk,
    open_database,
    wal_bytes,
)
from prunus.persistence.persister import (
    TERMINAL_STATES,
    Claim,
    Effects,
    Event,
    Letter,
    NewProcess,
    Posted,
    Query,
    Record,
    Save,
    Saved,
)
from prunus.persistence.requests import PersisterOfRequests, Request, perform

__all__ = ["MemoryPersister", "PersisterStatistics", "ProcessStore", "SqlitePersister", "merge", "open_database"]

MAX_BATCH = 256
"""The most requests in one commit of a `SqlitePersister`."""

MAX_QUERY_STATES = 32
"""The most states that one query names (there are six)."""

NOTHING = Effects()

logger = logging.getLogger(__name__)


class ProcessStore:
    """One method for each operation of the seam, in the caller's transaction; answers (answer, effects).

    `epoch_floor` is below every epoch that is given from now on: a broker that was restored from an older copy of its
    disk still gives epochs that no worker has seen. `clock` is the wall clock, for showing only.
    """

    def __init__(
        self, connection: sqlite3.Connection, *, epoch_floor: int = 0, clock: Callable[[], float] = time.time
    ) -> None:
        self._connection = connection
        self._clock = clock
        self.path = database_path(connection)
        alone = not connection.in_transaction
        if alone:
            self._run("BEGIN")
        for statement in _TABLES:
            self._run(statement)
        [deleted] = self._run(_DELETED_EPOCH).fetchone()
        self._epoch_floor = max(epoch_floor, deleted + 1)
        if alone:
            commit(connection)

    # --- the operations of the seam -----------------------------------------------------------------

    def create(self, process: NewProcess) -> tuple[bool, Effects]:
        at = process.created_at
        created = self._run(_CREATE, process.pid, process.class_id, process.parent, at, at)
        if created.rowcount == 0:
            return False, NOTHING
        n = created.lastrowid
        self._run(_SET_CHECKPOINT, n, process.checkpoint)
        for tag in dict.fromkeys(process.tags):
            self._run(_ADD_TAG, n, tag)
        return True, Effects(runnable=(process.pid,))

    def claim(self, pid: str, owner: str, *, at: float) -> tuple[Claim, Effects]:
        row = self._find(pid)
        if row.is_terminal:
            return Claim(record=self._record(row.n, content=True), epoch=0), NOTHING
        epoch = max(row.epoch + 1, self._epoch_floor)
        self._run(_CLAIM, epoch, owner, self._clock(), row.n)
        self._add_events(row.n, [Event(subject="claimed", at=at)], owner)
        record = self._record(row.n, content=True)
        results = dict(self._run(_RESULTS_WAITED_FOR, row.n))
        return Claim(record=record, epoch=epoch, inbox=self._letters(row), results=results), NOTHING

    def save(self, save: Save) -> tuple[Saved, Effects]:
        row = self._find(save.pid)
        if self._must_own(row, save.epoch, lambda: self._is_saved(row, save)):
            return Saved(seq=row.seq), NOTHING
        terminal = save.state in TERMINAL_STATES
        if terminal and save.result is None:
            raise ValueError(f"process {save.pid} ends without a result: whoever waits for it could never go on")

        effects = [self.create(child)[1] for child in save.children]
        inbox_done = row.inbox_last if terminal else max(row.inbox_done, min(save.inbox_done, row.inbox_last))
        if inbox_done > row.inbox_done:
            self._run(_FORGET_LETTERS, row.n, inbox_done)
        if row.state == "waiting":
            self._run(_FORGET_WAITS, row.n)
        if save.state == "waiting":
            for target in dict.fromkeys(save.waits):
                found = self._find(target)
                self._run(_ADD_WAIT, row.n, found.n, found.is_terminal)
        if save.checkpoint is not None:
            self._run(_SET_CHECKPOINT, row.n, save.checkpoint)
        if terminal:
            self._run(_SET_RESULT, save.result, row.n)
        self._add_events(row.n, save.events, row.owner)
        good_state = row.good_state if terminal or save.checkpoint is None else save.state
        suspended = save.suspended and save.state == "waiting"
        seen = (good_state, save.status, save.step, inbox_done, suspended, self._clock())
        owner = None if terminal or save.release else row.owner
        if (save.state, save.play, owner, None) == (row.state, row.play, row.owner, row.aside):
            self._run(_SAVE_IN_PLACE, *seen, row.n)
        else:
            self._run(_SAVE, *seen, save.state, save.play, owner, row.n)
        effects += [self._post_if_alive(*letter) for letter in save.letters]
        if terminal:
            effects.append(self._wake_waiters(row.n))
        elif save.release:
            effects.append(self._effects_on(save.pid))
        left = () if terminal else self._letters(row._replace(inbox_done=inbox_done))
        return Saved(seq=row.seq + 1, inbox=left), merge(effects)

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
            self._run(_SET_RESULT, None, row.n)
            self._run(_SET_WAITS_DONE, False, row.n)
        return self._record(row.n), self._effects_on(pid)

    def post(self, pid: str, body: bytes) -> tuple[Posted, Effects]:
        row = self._find(pid)
        if row.is_terminal:
            return Posted(seq=0, state=row.state), NOTHING
        seq = row.inbox_last + 1
        self._run(_ADD_LETTER, row.n, seq, body)
        self._run(_COUNT_LETTER, seq, row.n)
        effects = Effects(called=(pid,)) if row.owner is None else Effects(nudged=((row.owner, pid),))
        return Posted(seq=seq, state=row.state, owner=row.owner, epoch=row.epoch), effects

    def load(self, pid: str) -> tuple[Record, Effects]:
        row = self._find(pid)
        return msgspec.structs.replace(self._record(row.n, content=True), inbox=self._letters(row)), NOTHING

    def query(self, query: Query) -> tuple[list[Record], Effects]:
        if len(query.states) > MAX_QUERY_STATES:
            raise ValueError(f"a query names up to {MAX_QUERY_STATES} states, not {len(query.states)}")
        before = None if query.before is None else self._find(query.before).n
        numbers, values = _query_statement(query, before)
        return [
            _record_of(row) for row in self._run(f"{_RECORD} WHERE n IN ({numbers}) ORDER BY n DESC", *values)
        ], NOTHING

    def history(self, pid: str) -> tuple[list[Event], Effects]:
        return [
            Event(seq=seq, subject=subject, at=at, step=step, note=note, by=by)
            for seq, subject, at, step, note, by in self._run(_HISTORY, self._find(pid).n)
        ], NOTHING

    def delete(self, pid: str) -> tuple[None, Effects]:
        row = self._find(pid)
        if not row.is_terminal:
            raise InvalidStateError(row.state, "finished, excepted or killed")
        if waiter := self._run(_ANY_WAITER, row.n).fetchone():
            raise InvalidStateError(row.state, f"one whose result nobody waits for, but {waiter[0]} does")
        self._epoch_floor = max(self._epoch_floor, row.epoch + 1)  # if this is rolled back it is too high: no harm
        self._run(_KEEP_EPOCH, row.epoch)
        self._run(_DELETE, row.n)
        return None, NOTHING

    # --- for the owner of the store -----------------------------------------------------------------

    def release_all(self, owner: str) -> Effects:
        """`owner` is gone: nobody holds any more what it held, and a save under its claims is refused."""
        effects = []
        for [pid] in self._run(_FIND_HELD_BY, owner).fetchall():
            row = self._find(pid)
            event = Event(subject="released", at=self._clock(), note="its worker is gone")
            self._add_events(row.n, [event], owner)
            self._run(_RELEASE, row.aside, self._clock(), row.n)
            effects.append(self._effects_on(pid))
        return merge(effects)

    def unheld_work(self) -> Effects:
        """All unheld processes that are runnable or called now: each must have a task."""
        rows = [_Row(*values) for values in self._run(_FIND_UNHELD)]
        return Effects(
            runnable=tuple(row.pid for row in rows if row.is_runnable),
            called=tuple(row.pid for row in rows if row.is_called),
        )

    def held(self) -> tuple[str, ...]:
        """All processes that somebody claimed and did not give back. Only its claimer knows whether it still lives."""
        return tuple(pid for [pid] in self._run(_FIND_HELD))

    def statistics(self) -> dict[str, int]:
        """How many processes are in each state."""
        return dict(self._run(_COUNT_STATES))

    # --- parts of operations ------------------------------------------------------------------------

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise (full_disk(error, self._connection) or error) from error
        except (sqlite3.IntegrityError, sqlite3.DataError) as error:  # a time that is no number, a value over 1 GB
            raise ValueError(f"a process store can't keep this: {error}") from error

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
        return _record_of(self._run(f"{_RECORD} WHERE n = ?", n).fetchone(), checkpoint=checkpoint, result=result)

    def _letters(self, row: _Row) -> tuple[Letter, ...]:
        if row.inbox_last <= row.inbox_done:
            return ()
        return tuple(Letter(seq, body) for seq, body in self._run(_LETTERS, row.n))

    def _add_events(self, n: int, events: Sequence[Event], by: str | None) -> None:
        if not events:
            return
        [last] = self._run(_LAST_EVENT, n).fetchone()
        for seq, event in enumerate(events, last + 1):
            self._run(_ADD_EVENT, n, seq, event.subject, event.at, event.step, event.note, by)

    def _post_if_alive(self, pid: str, body: bytes) -> Effects:
        try:
            return self.post(pid, body)[1]
        except CheckpointNotFoundError:
            return NOTHING

    def _wake_waiters(self, target: int) -> Effects:
        """The process `target` is terminal now: who waited for nothing else?"""
        self._run(_SET_WAITS_DONE, True, target)
        waiters = [_Row(*values) for values in self._run(_FIND_WAITERS, target).fetchall()]
        return Effects(runnable=tuple(row.pid for row in waiters if row.is_runnable))

    def _effects_on(self, pid: str) -> Effects:
        row = self._find(pid)
        return Effects(runnable=(pid,) if row.is_runnable else (), called=(pid,) if row.is_called else ())


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
    suspended: int
    inbox_done: int
    inbox_claimed: int
    inbox_last: int
    waiting: int

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL_STATES

    @property
    def is_runnable(self) -> bool:
        """Nobody holds it and it can step."""
        idle = self.owner is not None or self.is_terminal or self.aside is not None
        return not (idle or self.play != "playing" or self.suspended or self.waiting)

    @property
    def is_called(self) -> bool:
        """Nobody holds it and it has letters. One that is aside is called only by what came after its last claim: who
        set it aside could do nothing with the others."""
        dealt_with = self.inbox_done if self.aside is None else max(self.inbox_done, self.inbox_claimed)
        return self.owner is None and not self.is_terminal and self.inbox_last > dealt_with


def merge(effects: Iterable[Effects]) -> Effects:
    """All of them as one, nobody told twice."""
    gathered = [one for one in effects if one != NOTHING]
    if not gathered:
        return NOTHING
    return Effects(
        runnable=tuple(dict.fromkeys(pid for one in gathered for pid in one.runnable)),
        called=tuple(dict.fromkeys(pid for one in gathered for pid in one.called)),
        nudged=tuple(dict.fromkeys(nudge for one in gathered for nudge in one.nudged)),
    )


def _record_of(row: tuple[Any, ...], **content: Any) -> Record:
    """From the columns of `_RECORD`."""
    *values, tags, waits = row
    return Record(
        **dict(zip(_RECORD_FIELDS, values, strict=True)),
        **content,
        tags=_decode_texts(tags),
        waits=_decode_texts(waits),
    )


_decode_texts = msgspec.json.Decoder(tuple[str, ...]).decode


# --- the statements ---------------------------------------------------------------------------------

_UNFINISHED = "state NOT IN ('excepted', 'finished', 'killed')"
"""Written the same everywhere: SQLite uses the partial indexes only for the very same condition."""

_TABLES = (
    # The facts. `n` is the order of creation; what is large lives elsewhere, so that a claim rewrites little.
    """CREATE TABLE IF NOT EXISTS process (
        n INTEGER PRIMARY KEY,
        pid TEXT NOT NULL UNIQUE,
        class_id TEXT NOT NULL,
        parent TEXT,
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
        aside TEXT,
        suspended INTEGER NOT NULL DEFAULT 0,
        inbox_done INTEGER NOT NULL DEFAULT 0,
        inbox_claimed INTEGER NOT NULL DEFAULT 0,  -- `inbox_last` at the last claim
        inbox_last INTEGER NOT NULL DEFAULT 0
    )""",
    "CREATE INDEX IF NOT EXISTS process_by_state ON process (state)",
    "CREATE INDEX IF NOT EXISTS process_by_class ON process (class_id)",
    "CREATE INDEX IF NOT EXISTS process_by_parent ON process (parent)",
    f"CREATE INDEX IF NOT EXISTS process_unfinished ON process (n) WHERE {_UNFINISHED}",
    "CREATE INDEX IF NOT EXISTS process_not_playing ON process (play) WHERE play <> 'playing'",
    "CREATE INDEX IF NOT EXISTS process_aside ON process (n) WHERE aside IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS process_held ON process (owner) WHERE owner IS NOT NULL",
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
    # Who waits for whom. Kept when done, until the waiter goes on: a claim brings the results.
    """CREATE TABLE IF NOT EXISTS wait (
        waiter INTEGER NOT NULL REFERENCES process (n) ON DELETE CASCADE,
        target INTEGER NOT NULL REFERENCES process (n),
        done INTEGER NOT NULL,
        PRIMARY KEY (waiter, done, target)  -- in this order: is any still open? is one step, however many there are
    ) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS wait_for_target ON wait (target)",
    """CREATE TABLE IF NOT EXISTS inbox (
        process INTEGER NOT NULL REFERENCES process (n) ON DELETE CASCADE,
        seq INTEGER NOT NULL,
        body BLOB NOT NULL,
        PRIMARY KEY (process, seq)
    ) WITHOUT ROWID""",
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
    # The highest epoch of a deleted process: a new one with the same pid begins above it.
    "CREATE TABLE IF NOT EXISTS fence (epoch INTEGER NOT NULL)",
)

_CREATE = """
    INSERT INTO process (pid, class_id, parent, created_at, updated_at, state, play, good_state)
    VALUES (?, ?, ?, ?, ?, 'created', 'playing', 'created') ON CONFLICT (pid) DO NOTHING"""
"""A new process, unless its pid is taken."""

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
    SELECT n, pid, state, play, good_state, epoch, owner, seq, aside, suspended, inbox_done, inbox_claimed, inbox_last,
           EXISTS (SELECT 1 FROM wait WHERE waiter = process.n AND done = 0)
    FROM process"""
"""The columns of `_Row`."""

_FIND = f"{_FACTS} WHERE pid = ?"
"""One process by its pid."""

_FIND_WAITERS = f"{_FACTS} WHERE n IN (SELECT waiter FROM wait WHERE target = ?) ORDER BY n"
"""Those that declared to wait for a process."""

_FIND_UNHELD = f"{_FACTS} WHERE {_UNFINISHED} AND owner IS NULL ORDER BY n"
"""Everything that is alive and that nobody holds."""

_FIND_HELD = f"SELECT pid FROM process WHERE {_UNFINISHED} AND owner IS NOT NULL ORDER BY n"
"""Everything that somebody holds."""

_FIND_HELD_BY = f"SELECT pid FROM process WHERE {_UNFINISHED} AND owner = ? ORDER BY n"
"""Everything that one of them holds."""

_COUNT_STATES = "SELECT state, count(*) FROM process GROUP BY state ORDER BY state"
"""Read from an index alone."""

_CLAIM = "UPDATE process SET epoch = ?, owner = ?, updated_at = ?, inbox_claimed = inbox_last WHERE n = ?"
"""A new owner under a new epoch."""

_SAVE = """
    UPDATE process SET good_state = ?, status = ?, step = ?, inbox_done = ?, suspended = ?, updated_at = ?,
           state = ?, play = ?, owner = ?, aside = NULL, seq = seq + 1
    WHERE n = ?"""
"""Where a process stands now. What was saved can go on, so it is not aside any more."""

_SAVE_IN_PLACE = """
    UPDATE process SET good_state = ?, status = ?, step = ?, inbox_done = ?, suspended = ?, updated_at = ?,
           seq = seq + 1
    WHERE n = ?"""
"""The same when nothing changed that has an index, which is most of the time: a third of the cost."""

_RELEASE = "UPDATE process SET owner = NULL, aside = ?, updated_at = ? WHERE n = ?"
"""Nobody holds it any more; it may be aside for a reason."""

_REVIVE = "UPDATE process SET state = ?, aside = NULL, suspended = 0, updated_at = ? WHERE n = ?"
"""It goes on from its last good checkpoint (which says itself whether it waits for a message)."""

_RECORD_COLUMNS = (
    "pid, class_id, state, play, created_at, updated_at, epoch, seq, "
    "parent, owner, status, step, aside, inbox_done, inbox_last"
)
_RECORD_FIELDS = _RECORD_COLUMNS.split(", ")

_RECORD = f"""
    SELECT {_RECORD_COLUMNS},
           (SELECT json_group_array(tag) FROM (SELECT tag FROM tag WHERE process = process.n ORDER BY rowid)),
           (SELECT json_group_array(pid) FROM (SELECT target.pid FROM wait JOIN process AS target ON target.n = target
                                               WHERE waiter = process.n AND done = 0 ORDER BY target.n))
    FROM process"""
"""Rows for people, each with its tags in their order and what it still waits for."""

_RESULTS_WAITED_FOR = """
    SELECT pid, result FROM wait JOIN process ON n = target JOIN content ON content.process = target
    WHERE waiter = ? AND done = 1 ORDER BY target"""
"""The results of those that a process waited for and that have ended."""

_ADD_WAIT = "INSERT INTO wait (waiter, target, done) VALUES (?, ?, ?)"
"""One process that a process waits for."""

_FORGET_WAITS = "DELETE FROM wait WHERE waiter = ?"
"""A process goes on, or declares anew what it waits for."""

_SET_WAITS_DONE = "UPDATE wait SET done = ? WHERE target = ?"
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

_LAST_EVENT = "SELECT coalesce(max(seq), 0) FROM event WHERE process = ?"
"""The number of the newest line of a history."""

_ADD_EVENT = "INSERT INTO event (process, seq, subject, at, step, note, by) VALUES (?, ?, ?, ?, ?, ?, ?)"
"""One line of a history."""

_HISTORY = "SELECT seq, subject, at, step, note, by FROM event WHERE process = ? ORDER BY seq"
"""A history, oldest first."""

_DELETED_EPOCH = "SELECT coalesce(max(epoch), 0) FROM fence"
"""The highest epoch of all deleted processes."""

_KEEP_EPOCH = (
    "INSERT OR REPLACE INTO fence (rowid, epoch) VALUES (1, max(?, (SELECT coalesce(max(epoch), 0) FROM fence)))"
)
"""A process is about to be deleted."""

_DELETE = "DELETE FROM process WHERE n = ?"
"""A process and all that belongs to it."""


def _query_statement(query: Query, before: int | None) -> tuple[str, list[Any]]:
    """The numbers of the matching processes, newest first.

    Each state is a query of its own, limited by itself, and then the newest of all are taken: so each is a walk along
    one index from its end, however many processes there are.
    """
    terms: list[tuple[str, Any]] = []
    if query.play is not None:
        not_playing = "" if query.play == "playing" else " AND play <> 'playing'"
        terms.append((f"play = ?{not_playing}", query.play))
    if query.class_id is not None:
        terms.append(("class_id = ?", query.class_id))
    if query.parent is not None:
        terms.append(("parent = ?", query.parent))
    if query.tag is not None:
        terms.append(("tag = ?", query.tag))
    if before is not None:
        terms.append(("n < ?", before))
    plain = [
        *(["parent IS NULL"] if query.roots else []),
        *([_UNFINISHED] if query.unfinished else []),
        *([f"aside IS {'NOT ' if query.aside else ''}NULL"] if query.aside is not None else []),
    ]
    source, order = ("process", "n") if query.tag is None else ("tag JOIN process ON n = tag.process", "tag.process")
    parts: list[str] = []
    values: list[Any] = []
    for state in dict.fromkeys(query.states) or (None,):
        own = [*terms, *([("state = ?", state)] if state is not None else [])]
        where = " AND ".join([term for term, _ in own] + plain) or "true"
        parts.append(f"SELECT * FROM (SELECT n FROM {source} WHERE {where} ORDER BY {order} DESC LIMIT ?)")
        values += [*(value for _, value in own), query.limit]
    return f"{' UNION '.join(parts)} ORDER BY n DESC LIMIT ?", [*values, query.limit]


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
            store = ProcessStore(connection, clock=self._clock)
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
