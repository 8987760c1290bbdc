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
  made it so.

Saying an operation again (a client that got no answer does) is harmless: `create` keeps the first one, `claim` only
raises the epoch, `release`, `set_aside` and a last `save` that are there already are answered as before. Only `post`,
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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future as ThreadFuture
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from prunus.errors import (
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
    KEPT_STEPS,
    LOG_LIMIT,
    MAX_LETTERS,
    MAX_LOG_LINES,
    MAX_MAIL,
    MAX_REPLIES,
    TERMINAL_STATES,
    Claim,
    Effects,
    Event,
    Letter,
    LogLine,
    Mail,
    NewProcess,
    Note,
    Past,
    Posted,
    Query,
    Record,
    Reply,
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

LOG_BLOCK = MAX_LOG_LINES // 10
"""Old lines of a log are forgotten so many at a time."""

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
        self.path = database_path(connection)
        alone = not connection.in_transaction
        if alone:
            self._run("BEGIN")
        try:
            self._upgrade()
            for statement in _TABLES:
                self._run(statement)
            [deleted] = self._run(_DELETED_EPOCH).fetchone()
            if alone:
                commit(connection)
        except BaseException:
            if alone and connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._epoch_floor = max(epoch_floor, deleted + 1)

    # --- the operations of the seam -----------------------------------------------------------------

    def create(self, process: NewProcess) -> tuple[bool, Effects]:
        if process.state not in _FIRST_STATES:
            raise ValueError(f"a new process is {' or '.join(_FIRST_STATES)}, not {process.state}")
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
        )
        if created.rowcount == 0:
            return False, NOTHING
        n = created.lastrowid
        self._run(_SET_CHECKPOINT, n, process.checkpoint)
        for tag in dict.fromkeys(process.tags):
            self._run(_ADD_TAG, n, tag)
        return True, Effects(runnable=(process.pid,)) if process.play == "playing" else NOTHING

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

        effects = [self.create(child)[1] for child in save.children]
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
        stays = save.state == row.state and save.play == row.play and owner == row.owner and row.aside is None
        if stays and inbox_done == row.inbox_done and save.state != "waiting":
            self._run(_SAVE_IN_PLACE, *said, row.n)
        else:
            wakes = self._wakes(row, save, mail_count, now)
            self._run(_SAVE, *said, save.state, save.play, owner, inbox_done, *wakes, row.n)
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

    def history(self, pid: str) -> tuple[list[Event], Effects]:
        return [
            Event(seq=seq, subject=subject, at=at, step=step, note=note, by=by)
            for seq, subject, at, step, note, by in self._run(_HISTORY, self._find(pid).n)
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
        """All unheld processes that are runnable or called now: each must have a task. Costs nothing for the others."""
        runnable = [_Row(*values) for values in self._run(_FIND_RUNNABLE)]
        called = [_Row(*values) for values in self._run(_FIND_CALLED)]
        return Effects(
            runnable=tuple(row.pid for row in runnable if row.is_runnable),
            called=tuple(row.pid for row in called if row.is_called),
        )

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

    def statistics(self) -> dict[str, int]:
        """How many processes are in each state."""
        return dict(self._run(_COUNT_STATES))

    # --- parts of operations ------------------------------------------------------------------------

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
        if version != 1:
            return
        if self._run(_HAS_TABLES).fetchone():
            for statement in _FROM_VERSION_1:
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
        return _record_of(self._run(f"{_RECORD} WHERE n = ?", n).fetchone(), checkpoint=checkpoint, result=result)

    def _letters(self, n: int) -> tuple[Letter, ...]:
        return tuple(Letter(seq, body) for seq, body in self._run(_LETTERS, n))

    def _add_events(self, n: int, events: Sequence[Event], by: str | None) -> None:
        if not events:
            return
        [last] = self._run(_LAST_EVENT, n).fetchone()
        for seq, event in enumerate(events, last + 1):
            self._run(_ADD_EVENT, n, seq, event.subject, event.at, event.step, event.note, by)

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
        wake_at = save.wake_at
        if wake_at is not None and wake_at <= now:
            ready, wake_at = _READY, None
        names, listens = _encode_texts(save.names), _encode_texts(save.listens)
        if mail_count and listens is not None and self._run(_ANY_MAIL, row.n, listens).fetchone():
            ready = _READY
        return _Wakes(ready, wake_at, names, listens)

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
        return Effects(runnable=(row.pid,)) if became else NOTHING

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
    ready: int
    names: str | None
    listens: str | None
    inbox_done: int
    inbox_claimed: int
    inbox_last: int
    mail_last: int
    mail_count: int

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL_STATES

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


class _Wakes(NamedTuple):
    """What is to wake a process, as its row has it."""

    ready: int
    wake_at: float | None = None
    names: str | None = None
    listens: str | None = None


def _check(save: Save) -> None:
    """Raises `ValueError` for a save that can't be meant."""
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
    *values, names, tags, waits = row
    return Record(
        **dict(zip(_RECORD_FIELDS, values, strict=True)),
        **content,
        names=_decode_texts(names),
        tags=_decode_texts(tags),
        waits=_decode_texts(waits),
    )


def _encode_texts(texts: Sequence[str]) -> str | None:
    return msgspec.json.encode(texts).decode() if texts else None


def _decode_texts(texts: str | None) -> tuple[str, ...]:
    return () if texts is None else _TEXTS_DECODER.decode(texts)


_TEXTS_DECODER = msgspec.json.Decoder(tuple[str, ...])


# --- the statements ---------------------------------------------------------------------------------

_UNFINISHED = "state NOT IN ('excepted', 'finished', 'killed')"

_RUNNABLE = f"owner IS NULL AND aside IS NULL AND play = 'playing' AND ready > {_PARKED}"
"""`_Row.is_runnable`. Written the same everywhere: SQLite uses a partial index only for the very same condition."""

_CALLED = "owner IS NULL AND inbox_last > inbox_done"
"""At least those that are `_Row.is_called`."""

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
        mail_count INTEGER NOT NULL DEFAULT 0      -- the rows in `mail`
    )""",
    "CREATE INDEX IF NOT EXISTS process_by_state ON process (state)",
    "CREATE INDEX IF NOT EXISTS process_by_class ON process (class_id)",
    "CREATE INDEX IF NOT EXISTS process_by_parent ON process (parent)",
    "CREATE INDEX IF NOT EXISTS process_not_playing ON process (play) WHERE play <> 'playing'",
    "CREATE INDEX IF NOT EXISTS process_aside ON process (n) WHERE aside IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS process_held ON process (owner) WHERE owner IS NOT NULL",
    f"CREATE INDEX IF NOT EXISTS process_runnable ON process (n) WHERE {_RUNNABLE}",
    f"CREATE INDEX IF NOT EXISTS process_called ON process (n) WHERE {_CALLED}",
    "CREATE INDEX IF NOT EXISTS process_timer ON process (wake_at) WHERE wake_at IS NOT NULL",
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
    # The highest epoch of a deleted process: a new one with the same pid begins above it.
    "CREATE TABLE IF NOT EXISTS fence (epoch INTEGER NOT NULL)",
)

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
"""How the tables of version 1 become these; those that are new are made as in a new database."""

_CREATE = f"""
    INSERT INTO process (pid, class_id, parent, parent_close, created_at, updated_at, state, good_state, play, step,
                         status, ready)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {_READY}) ON CONFLICT (pid) DO NOTHING"""
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
    SELECT n, pid, state, play, good_state, epoch, owner, seq, aside, ready, names, listens,
           inbox_done, inbox_claimed, inbox_last, mail_last, mail_count
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

_COUNT_STATES = "SELECT state, count(*) FROM process GROUP BY state ORDER BY state"
"""Read from an index alone."""

_CLAIM = "UPDATE process SET epoch = ?, owner = ?, updated_at = ?, inbox_claimed = inbox_last WHERE n = ?"
"""A new owner under a new epoch."""

_SAVE = """
    UPDATE process SET good_state = ?, status = ?, step = ?, progress = ?, detail = ?, updated_at = ?,
           state = ?, play = ?, owner = ?, inbox_done = ?, ready = ?, wake_at = ?, names = ?, listens = ?,
           aside = NULL, seq = seq + 1
    WHERE n = ?"""
"""Where a process stands now. What was saved can go on, so it is not aside any more."""

_SAVE_IN_PLACE = """
    UPDATE process SET good_state = ?, status = ?, step = ?, progress = ?, detail = ?, updated_at = ?, seq = seq + 1
    WHERE n = ?"""
"""The same when nothing changed that has an index, which is most of the time: a third of the cost."""

_NOTE = """
    UPDATE process SET progress = coalesce(?, progress), detail = coalesce(?, detail), status = coalesce(?, status),
           updated_at = ?
    WHERE n = ?"""
"""What a running step says of itself."""

_RELEASE = "UPDATE process SET owner = NULL, aside = ?, updated_at = ? WHERE n = ?"
"""Nobody holds it any more; it may be aside for a reason."""

_REVIVE = f"UPDATE process SET state = ?, aside = NULL, ready = {_READY}, updated_at = ? WHERE n = ?"
"""It goes on from its last good checkpoint (which says itself what it waits for)."""

_RECORD_COLUMNS = (
    "pid, class_id, state, play, created_at, updated_at, epoch, seq, parent, parent_close, "
    "owner, status, step, progress, detail, aside, wake_at, inbox_done, inbox_last, mail_count"
)
_RECORD_FIELDS = _RECORD_COLUMNS.replace("mail_count", "mail").split(", ")

_RECORD = f"""
    SELECT {_RECORD_COLUMNS}, names,
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
    states = query.states
    if query.unfinished:
        states = tuple(state for state in states or _LIVING_STATES if state in _LIVING_STATES)
        if not states:
            return "SELECT n FROM process WHERE false", []
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
        *([f"aside IS {'NOT ' if query.aside else ''}NULL"] if query.aside is not None else []),
    ]
    source, order = ("process", "n") if query.tag is None else ("tag JOIN process ON n = tag.process", "tag.process")
    parts: list[str] = []
    values: list[Any] = []
    for state in dict.fromkeys(states) or (None,):
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
