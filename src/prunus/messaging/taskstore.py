"""The broker's memory on disk: tasks, sessions, what is known of clients, limits, and answers that may be asked again.

The tables live beside others in a database file that somebody else opened. Nothing here opens, commits or rolls back:
every method works inside the transaction of its caller, who decides when all of it becomes true.

What changed in a batch is written once, whatever happened to it meanwhile: a task that came and was settled in the same
batch leaves no trace. Bodies stay here: those that came lately in memory, up to `BODY_CACHE_BYTES`, all others on disk
alone, each with a checksum. What came of a task, and waits for its sender, is on disk alone.

What a client has done changes with each task that it sends. That is its *mark*, and goes beside the task, into a page
that is written anyway: it is *afloat*. When a task that may carry one goes away, or after `MAX_AFLOAT` tasks, all that
are afloat *sink* to the table of clients, and so they do when the broker starts.
"""

from __future__ import annotations

import itertools
import sqlite3
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import msgspec

from prunus.errors import PersistenceError
from prunus.messaging.broker import Changes, Client, StoredState
from prunus.messaging.inventory import QueueLimits
from prunus.messaging.messages import MAX_PRIORITY, Peer
from prunus.messaging.queues import MAX_DEPTH, Hold, Needs, Task, depth_of, priority_of

BODY_CACHE_BYTES = 32 * 1024 * 1024
"""Bodies of tasks that were accepted lately are kept in memory up to this."""
BODY_OVERHEAD_BYTES = 200
"""What a body in memory costs besides its bytes."""
MAX_AFLOAT = 10_000
"""Among so many of the newest tasks marks are looked for when the broker starts."""
MAX_MARKS_BYTES = 1000
"""Marks that are longer than this together are too large to be beside a task."""

# Every task that was accepted and is not done with; `place` is its rank among tasks of one priority.
CREATE_TASK = """
    CREATE TABLE IF NOT EXISTS broker_task (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL, queue TEXT NOT NULL, key TEXT, subject TEXT,
        priority INTEGER NOT NULL, place INTEGER NOT NULL, attempt INTEGER NOT NULL, max_attempts INTEGER NOT NULL,
        sent_at REAL NOT NULL, not_before REAL NOT NULL, expires_at REAL NOT NULL, resources TEXT,
        holder TEXT, pattern TEXT, epoch INTEGER, waiters TEXT NOT NULL, outcome BLOB, dead INTEGER NOT NULL,
        reason TEXT, crc INTEGER NOT NULL, body BLOB NOT NULL, blob TEXT, blob_size INTEGER, depth INTEGER, marks BLOB
    ) STRICT"""
# The few tasks whose body is a blob.
CREATE_BLOBS = "CREATE INDEX IF NOT EXISTS broker_blob ON broker_task (blob) WHERE blob IS NOT NULL"
# Every session that may hold tasks, and the process in which it lives.
CREATE_SESSION = """
    CREATE TABLE IF NOT EXISTS broker_session (
        id TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, started INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID"""
# What is known of clients, also of those that were silent for too long: the digest of their secret, the id below which
# every `TaskSend` was done, and (as msgpack) those of them that were not. What is afloat is newer.
CREATE_CLIENT = """
    CREATE TABLE IF NOT EXISTS broker_client (
        session TEXT PRIMARY KEY, secret BLOB, done INTEGER NOT NULL, undone BLOB NOT NULL
    ) STRICT, WITHOUT ROWID"""
# The answers to requests that changed something and that do not follow from these, until the client has seen them.
CREATE_ANSWER = """
    CREATE TABLE IF NOT EXISTS broker_answer (
        session TEXT NOT NULL, request INTEGER NOT NULL, frame BLOB NOT NULL, PRIMARY KEY (session, request)
    ) STRICT, WITHOUT ROWID"""
# The limits of queues, as JSON.
CREATE_QUEUE = "CREATE TABLE IF NOT EXISTS broker_queue (name TEXT PRIMARY KEY, limits TEXT NOT NULL) STRICT"
# How many tokens there are of a resource.
CREATE_RESOURCE = "CREATE TABLE IF NOT EXISTS broker_resource (name TEXT PRIMARY KEY, capacity INTEGER NOT NULL) STRICT"
# Numbers of the broker itself.
CREATE_META = "CREATE TABLE IF NOT EXISTS broker_meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT"

# A new task.
INSERT_TASK = """
    INSERT INTO broker_task (
        attempt, holder, pattern, epoch, waiters, outcome, dead, reason, not_before, expires_at, place, number, id,
        queue, key, subject, priority, depth, max_attempts, sent_at, resources, crc, body, blob, blob_size, marks
    ) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
# What can change of a task.
UPDATE_TASK = """
    UPDATE broker_task SET attempt = ?, holder = ?, pattern = ?, epoch = ?, waiters = ?,
        outcome = coalesce(?, outcome), dead = ?,
        reason = ?, not_before = ?, expires_at = ?, place = ? WHERE number = ?"""
# A task is done, and somebody waits for its result: nobody needs its body any more.
EMPTY_TASK = "UPDATE broker_task SET body = x'', crc = 0, blob = NULL, blob_size = NULL WHERE number = ?"
# A task is done with.
DELETE_TASK = "DELETE FROM broker_task WHERE number = ?"
# The body of a task.
READ_BODY = "SELECT body, crc FROM broker_task WHERE number = ?"
# What came of a task.
READ_OUTCOME = "SELECT outcome FROM broker_task WHERE number = ?"
# Whether a blob is the body of a task.
NEEDS_BLOB = "SELECT EXISTS (SELECT 1 FROM broker_task WHERE blob = ?)"
# The blobs that are bodies of tasks, and their sizes.
ALL_BLOBS = "SELECT DISTINCT blob, blob_size FROM broker_task WHERE blob IS NOT NULL ORDER BY blob"
# A session is known, or known with another process.
SAVE_SESSION = "INSERT OR REPLACE INTO broker_session (id, host, pid, started) VALUES (?, ?, ?, ?)"
# A session is gone.
FORGET_SESSION = "DELETE FROM broker_session WHERE id = ?"
# A client is known, or has done more.
SAVE_CLIENT = "INSERT OR REPLACE INTO broker_client (session, secret, done, undone) VALUES (?, ?, ?, ?)"
# A client left for good, or was silent for too long.
FORGET_CLIENT = "DELETE FROM broker_client WHERE session = ?"
# The answer to a request, in the commit of what it answers for.
SAVE_ANSWER = "INSERT OR REPLACE INTO broker_answer (session, request, frame) VALUES (?, ?, ?)"
# The client has seen these answers, or is gone.
DROP_ANSWERS = "DELETE FROM broker_answer WHERE session = ? AND request < ?"
# The limits of a queue.
SAVE_LIMITS = "INSERT OR REPLACE INTO broker_queue (name, limits) VALUES (?, ?)"
# A queue has no limits any more.
FORGET_LIMITS = "DELETE FROM broker_queue WHERE name = ?"
# The tokens of a resource.
SAVE_RESOURCE = "INSERT OR REPLACE INTO broker_resource (name, capacity) VALUES (?, ?)"
# A resource is not limited any more.
FORGET_RESOURCE = "DELETE FROM broker_resource WHERE name = ?"
# What few tasks have, and what stands there of all others. (A subject pattern and an epoch come with a holder.)
_RARE = {
    "resources": "NULL", "not_before": "0.0", "expires_at": "0.0", "max_attempts": "0", "attempt": "0",
    "holder": "NULL", "waiters": "''", "outcome": "NULL", "dead": "0", "reason": "NULL", "blob": "NULL",
}  # fmt: skip
_IS_PLAIN = " AND ".join(f"{column} IS {nothing}" for column, nothing in _RARE.items())
# The fields of any `Task`, in their order, but for its body; the first is `urgency_of` its priority and depth.
_FIELDS = f"""
    ({MAX_PRIORITY} - priority) * {MAX_DEPTH + 1} + {MAX_DEPTH} - coalesce(depth, 0), place, number, id, queue, key,
    subject, coalesce(blob_size, length(body)), sent_at"""
# The tasks that have no more than these.
LOAD_PLAIN = f"SELECT {_FIELDS} FROM broker_task WHERE {_IS_PLAIN} ORDER BY number"
# The others, with all that they have, but for what came of them.
LOAD_OTHERS = f"""
    SELECT {", ".join(_RARE).replace("outcome", "length(outcome)")}, pattern, epoch, {_FIELDS} FROM broker_task
    WHERE NOT ({_IS_PLAIN}) ORDER BY number"""
# All sessions.
LOAD_SESSIONS = "SELECT id, host, pid, started FROM broker_session ORDER BY id"
# All clients.
LOAD_CLIENTS = "SELECT session, secret, done, undone FROM broker_client ORDER BY session"
# The newest task.
NEWEST_TASK = "SELECT coalesce(max(number), 0) FROM broker_task"
# The number of the newest task when marks sank for the last time.
LOAD_SUNK = "SELECT value FROM broker_meta WHERE name = 'marks_sunk'"
# Marks sank: those beside tasks up to this number are of no use any more.
SAVE_SUNK = "INSERT OR REPLACE INTO broker_meta (name, value) VALUES ('marks_sunk', ?)"
# The marks that are afloat, oldest first.
LOAD_MARKS = "SELECT marks FROM broker_task WHERE number > ? AND marks IS NOT NULL ORDER BY number"
# All answers that may be asked for again, in the order of their requests.
LOAD_ANSWERS = "SELECT session, request, frame FROM broker_answer ORDER BY session, request"
# All limits of queues.
LOAD_LIMITS = "SELECT name, limits FROM broker_queue ORDER BY name"
# All resources.
LOAD_RESOURCES = "SELECT name, capacity FROM broker_resource ORDER BY name"
# The broker starts once more.
RAISE_EPOCH = """
    INSERT INTO broker_meta (name, value) VALUES ('broker_epoch', 1)
    ON CONFLICT (name) DO UPDATE SET value = value + 1 RETURNING value"""
# A copy of the database takes its place: no epoch that was given since it was made is given again.
RAISE_EPOCH_BY = "UPDATE broker_meta SET value = value + ? WHERE name = 'broker_epoch'"
# The columns of the tasks' table, as it is in this file.
TASK_COLUMNS = "SELECT name FROM pragma_table_info('broker_task')"
# Tables of the first version had tasks by id, without subjects, delays, dead letters and checksums.
UPGRADE_TASKS = """
    INSERT INTO broker_task (
        number, id, queue, key, priority, place, attempt, max_attempts, sent_at, not_before, expires_at, holder, epoch,
        waiters, outcome, dead, crc, body
    )
    SELECT rank, id, queue, key, priority, rank, attempt, 0, CAST(strftime('%s', 'now') AS REAL), 0.0, 0.0, holder,
        epoch, waiters, outcome, 0, crc32(body), body
    FROM (SELECT *, row_number() OVER (ORDER BY place, id) AS rank FROM broker_task_1) ORDER BY rank"""

_Row = tuple[Any, ...]
_NUMBER = 11
"""Where its number stands in the row of a new task."""
_Mark = tuple[str, int, list[int]]
"""The session, and of its `Client` what is `done` and `undone`."""
_WAITER_SEPARATOR = "\n"
_NEVER = 2**63 - 1


def needed_blobs(connection: sqlite3.Connection) -> list[tuple[str, int]]:
    """The (digest, size) of each blob that is the body of a task in a database of any version."""
    if ("blob",) not in connection.execute(TASK_COLUMNS).fetchall():
        return []
    return connection.execute(ALL_BLOBS).fetchall()


class TaskStore:
    """Writes what changed, reads bodies, and reads everything back. Raises `sqlite3.Error`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Make the tables that are not there, and upgrade those of an older version, in the caller's transaction."""
        self._connection = connection
        self._fresh: dict[int, bytes] = {}
        """Bodies that are not on the disk yet, by the number of their task."""
        self._bodies: OrderedDict[int, bytes] = OrderedDict()
        self._bodies_bytes = 0
        self._afloat: dict[str, Client] = {}
        """The clients whose marks are afloat."""
        self._newest = self._sunk = 0
        """The number of the newest task, and of the newest one when marks sank."""
        columns = {name for (name,) in connection.execute(TASK_COLUMNS)}
        is_old = bool(columns) and "number" not in columns
        if is_old:
            connection.execute("ALTER TABLE broker_task RENAME TO broker_task_1")
        for statement in (
            CREATE_TASK, CREATE_SESSION, CREATE_CLIENT, CREATE_ANSWER, CREATE_QUEUE, CREATE_RESOURCE, CREATE_META,
        ):  # fmt: skip
            connection.execute(statement)
        if is_old:
            connection.create_function("crc32", 1, zlib.crc32, deterministic=True)
            connection.execute(UPGRADE_TASKS)
            connection.execute("DROP TABLE broker_task_1")
        elif columns and "blob" not in columns:
            connection.execute("ALTER TABLE broker_task ADD COLUMN blob TEXT")
            connection.execute("ALTER TABLE broker_task ADD COLUMN blob_size INTEGER")
        if columns and not is_old and "depth" not in columns:
            connection.execute("ALTER TABLE broker_task ADD COLUMN depth INTEGER")
        if columns and not is_old and "marks" not in columns:
            connection.execute("ALTER TABLE broker_task ADD COLUMN marks BLOB")
        connection.execute(CREATE_BLOBS)

    def next_broker_epoch(self) -> int:
        """One more than at the last start; durable with the caller's next commit."""
        [(epoch,)] = self._connection.execute(RAISE_EPOCH).fetchall()
        return int(epoch)

    def raise_broker_epoch(self, by: int) -> None:
        """Every broker epoch from now on is above all that there were, by more than `by`: for a copy of the database
        that takes its place."""
        self._connection.execute(RAISE_EPOCH_BY, (by,))

    def load(self) -> StoredState:
        """All that survived. The tasks are read when they are asked for, once. With the next `write` marks sink."""
        rows = self._connection.execute
        return StoredState(
            tasks=self._tasks(),
            sessions=tuple((id, Peer(host, pid, started)) for id, host, pid, started in rows(LOAD_SESSIONS)),
            clients=tuple(self._load_clients().items()),
            answers=tuple(rows(LOAD_ANSWERS)),
            limits={name: msgspec.json.decode(limits, type=QueueLimits) for name, limits in rows(LOAD_LIMITS)},
            resources=dict(rows(LOAD_RESOURCES).fetchall()),
        )

    def _load_clients(self) -> dict[str, Client]:
        rows = self._connection.execute
        clients = {
            session: Client(secret=secret, done=done, undone=dict.fromkeys(msgspec.msgpack.decode(undone)))
            for session, secret, done, undone in rows(LOAD_CLIENTS)
        }
        [[self._newest]] = rows(NEWEST_TASK).fetchall()
        [self._sunk] = rows(LOAD_SUNK).fetchone() or (0,)
        for [marks] in rows(LOAD_MARKS, (self._sunk,)):
            for session, done, undone in msgspec.msgpack.decode(marks, type=list[_Mark]):
                client = clients.get(session)
                if client is not None and client.done <= done:  # else somebody wrote who knew nothing of marks
                    client.done, client.undone = done, dict.fromkeys(undone)
                    self._afloat[session] = client
        if self._afloat or self._sunk != self._newest:  # the numbers of tasks to come may be lower than they were
            self._sunk = -MAX_AFLOAT
        return clients

    # --- bodies ---

    def keep(self, number: int, body: bytes) -> None:
        """The body of a new task; it is written with the task."""
        self._fresh[number] = body

    def body(self, number: int, *, checked: bool = True) -> bytes:
        """The body of a task. Raises `PersistenceError` if it is not what was written (unless it is not `checked`)."""
        body = self._fresh.get(number)
        if body is None:
            body = self._bodies.get(number)
        if body is None:
            row = self._connection.execute(READ_BODY, (number,)).fetchone()
            body, crc = row or (b"", None)
            if checked and zlib.crc32(body) != crc:
                raise PersistenceError("its body is damaged on the disk: the checksum does not fit")
        return body

    def outcome(self, number: int) -> bytes | None:
        """The frame that says what came of a task; None if there is none."""
        row = self._connection.execute(READ_OUTCOME, (number,)).fetchone()
        return None if row is None else row[0]

    def needs_blob(self, digest: str) -> bool:
        """Whether a blob is the body of a task, as far as it was written."""
        [[needed]] = self._connection.execute(NEEDS_BLOB, (digest,)).fetchall()
        return bool(needed)

    def forget_body(self, number: int) -> None:
        """It will hardly be asked for again soon."""
        if (body := self._bodies.pop(number, None)) is not None:
            self._bodies_bytes -= len(body) + BODY_OVERHEAD_BYTES

    def _remember_body(self, number: int, body: bytes) -> None:
        self._bodies[number] = body
        self._bodies_bytes += len(body) + BODY_OVERHEAD_BYTES
        while self._bodies_bytes > BODY_CACHE_BYTES:
            _, oldest = self._bodies.popitem(last=False)
            self._bodies_bytes -= len(oldest) + BODY_OVERHEAD_BYTES

    # --- writing ---

    def write(self, changes: Changes) -> None:
        """Make it all true in the transaction that is open."""
        many = self._connection.executemany
        inserted: list[_Row] = []
        updated: list[_Row] = []
        deleted: list[tuple[int]] = []
        emptied: list[tuple[int]] = []
        for task in changes.tasks:
            number = task.number
            place = task.place
            if not place:
                self._fresh.pop(number, None)
                if task.is_stored:
                    deleted.append((number,))
                    self.forget_body(number)
                continue
            hold = task.hold
            row = (
                task.attempt,
                hold and hold.session,
                hold and hold.pattern,
                hold and hold.epoch,
                _WAITER_SEPARATOR.join(task.waiters) if task.waiters else "",
                task.outcome,
                1 if place == "dead" else 0,
                task.reason,
                task.not_before,
                task.expires_at,
                task.order,
                number,
            )
            task.outcome = None
            if task.is_stored:
                updated.append(row)
                if place == "settled":
                    emptied.append((number,))
                    self.forget_body(number)
            else:
                task.is_stored = True
                if place == "settled":
                    body = b""
                    self._fresh.pop(number, None)
                else:
                    body = self._fresh.pop(number)
                    if hold is None:
                        self._remember_body(number, body)
                needs = msgspec.json.encode(task.needs).decode() if task.needs else None
                inserted.append(
                    (
                        *row, task.id, task.queue, task.key, task.subject, priority_of(task.urgency),
                        depth_of(task.urgency) or None, task.max_attempts, task.sent_at, needs, zlib.crc32(body), body,
                        task.blob, task.size if task.blob is not None else None, None,
                    )
                )  # fmt: skip
        self._write_clients(changes, inserted, deleted)
        for statement, rows in (
            (DELETE_TASK, deleted), (INSERT_TASK, inserted), (UPDATE_TASK, updated), (EMPTY_TASK, emptied),
        ):  # fmt: skip
            if rows:
                many(statement, rows)
        for session, peer in changes.sessions.items():
            if peer is None:
                many(FORGET_SESSION, [(session,)])
            else:
                many(SAVE_SESSION, [(session, peer.host, peer.pid, peer.started)])
        if changes.dropped:
            many(DROP_ANSWERS, changes.dropped.items())
        if changes.answers:
            many(SAVE_ANSWER, [(*request, frame) for request, frame in changes.answers.items()])
        for queue, limits in changes.limits.items():
            if limits == QueueLimits():
                many(FORGET_LIMITS, [(queue,)])
            else:
                many(SAVE_LIMITS, [(queue, msgspec.json.encode(limits).decode())])
        for resource, capacity in changes.resources.items():
            if capacity is None:
                many(FORGET_RESOURCE, [(resource,)])
            else:
                many(SAVE_RESOURCE, [(resource, min(capacity, _NEVER))])

    def _write_clients(self, changes: Changes, inserted: list[_Row], deleted: list[tuple[int]]) -> None:
        """Marks go beside the last task of `inserted`, or all sink."""
        marks, newest = changes.marks, self._newest
        if inserted:
            self._newest = max(newest, inserted[-1][_NUMBER])
        if not (
            changes.clients
            or self._newest >= self._sunk + MAX_AFLOAT
            or (deleted and self._afloat and max(deleted)[0] > self._sunk)
        ):
            if not marks:
                return
            if inserted and inserted[-1][_NUMBER] > newest:
                done = [(session, client.done, list(client.undone)) for session, client in marks.items()]
                if len(encoded := msgspec.msgpack.encode(done)) <= MAX_MARKS_BYTES:
                    self._afloat.update(marks)
                    inserted[-1] = (*inserted[-1][:-1], encoded)
                    return
        many = self._connection.executemany
        for session, client in {**self._afloat, **marks, **changes.clients}.items():
            if client is None:
                many(FORGET_CLIENT, [(session,)])
            else:
                undone = msgspec.msgpack.encode(list(client.undone))
                many(SAVE_CLIENT, [(session, client.secret, client.done, undone)])
        self._afloat.clear()
        if self._sunk != self._newest:
            self._sunk = self._newest
            many(SAVE_SUNK, [(self._sunk,)])

    # --- reading ---

    def _tasks(self) -> Iterator[Task]:
        """The plain ones first: no line of ours is run for each of a million."""
        rows = self._connection.execute
        return itertools.chain(itertools.starmap(Task, rows(LOAD_PLAIN)), self._others())

    def _others(self) -> Iterator[Task]:
        shared: dict[str, str] = {}
        needs: dict[str, Needs] = {"": ()}
        for (
            resources, not_before, expires_at, max_attempts, attempt, holder, waiters, outcome_size, dead, reason, blob,
            pattern, epoch, urgency, order, number, id, queue, key, subject, size, sent_at,
        ) in self._connection.execute(LOAD_OTHERS):  # fmt: skip
            if outcome_size is not None:
                size = outcome_size
            if subject is not None:
                subject = shared.setdefault(subject, subject)
            if resources is not None and resources not in needs:
                needs[resources] = msgspec.json.decode(resources, type=Needs)
            yield Task(
                urgency, order, number, id, queue, key, subject, size, sent_at,
                needs=needs[resources or ""],
                not_before=not_before,
                expires_at=expires_at,
                max_attempts=max_attempts,
                attempt=attempt,
                place="settled" if outcome_size is not None else "dead" if dead else "",
                hold=None if holder is None else Hold(shared.setdefault(holder, holder), pattern, epoch, 0.0),
                waiters=tuple(waiters.split(_WAITER_SEPARATOR)) if waiters else (),
                reason=reason,
                blob=blob,
            )  # fmt: skip
