"""The broker's memory on disk: tasks, sessions, and the answers that a client may ask for again.

The tables live beside others in a database file that somebody else opened. Nothing here opens, commits or rolls back:
every method works inside the transaction of its caller, who decides when all of it becomes true.
"""

from __future__ import annotations

import sqlite3
from typing import assert_never

from prunus.messaging.broker import (
    DeleteTask,
    DropAnswers,
    ForgetSession,
    HoldTask,
    ReleaseTask,
    SaveAnswer,
    SaveSession,
    SettleTask,
    SetWaiters,
    StoredState,
    StoredTask,
    StoreEffect,
    StoreTask,
    Task,
)
from prunus.messaging.messages import Peer

# Every task that was accepted and is not done with; `place` is its rank among tasks of one priority.
CREATE_TASK = """
    CREATE TABLE IF NOT EXISTS broker_task (
        id TEXT PRIMARY KEY, queue TEXT NOT NULL, key TEXT, priority INTEGER NOT NULL, body BLOB NOT NULL,
        place INTEGER NOT NULL, attempt INTEGER NOT NULL DEFAULT 0, holder TEXT, epoch INTEGER NOT NULL DEFAULT 0,
        waiters TEXT NOT NULL DEFAULT '', outcome BLOB
    ) STRICT, WITHOUT ROWID"""
# Every session that may hold tasks, and the process in which it lives.
CREATE_SESSION = """
    CREATE TABLE IF NOT EXISTS broker_session (
        id TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, started INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID"""
# The answers to requests that changed something, until the client has seen them.
CREATE_ANSWER = """
    CREATE TABLE IF NOT EXISTS broker_answer (
        session TEXT NOT NULL, request INTEGER NOT NULL, frame BLOB NOT NULL, PRIMARY KEY (session, request)
    ) STRICT, WITHOUT ROWID"""
# Numbers of the broker itself.
CREATE_META = "CREATE TABLE IF NOT EXISTS broker_meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT"

# A new task is pending.
INSERT_TASK = """
    INSERT INTO broker_task (id, queue, key, priority, body, place, waiters) VALUES (?, ?, ?, ?, ?, ?, ?)"""
# A session holds a task from now on.
HOLD_TASK = "UPDATE broker_task SET holder = ?, epoch = ?, attempt = ? WHERE id = ?"
# A task is pending again; its epoch and attempts stay.
RELEASE_TASK = "UPDATE broker_task SET holder = NULL WHERE id = ?"
# Other sessions wait for the result of a task.
SET_WAITERS = "UPDATE broker_task SET waiters = ? WHERE id = ?"
# A task is done, and its result is waited for.
SETTLE_TASK = "UPDATE broker_task SET holder = NULL, outcome = ?, body = x'' WHERE id = ?"
# A task is done with.
DELETE_TASK = "DELETE FROM broker_task WHERE id = ?"
# A session is known, or known with another process.
SAVE_SESSION = "INSERT OR REPLACE INTO broker_session (id, host, pid, started) VALUES (?, ?, ?, ?)"
# A session is gone.
FORGET_SESSION = "DELETE FROM broker_session WHERE id = ?"
# The answer to a request, in the commit of what it answers for.
SAVE_ANSWER = "INSERT OR REPLACE INTO broker_answer (session, request, frame) VALUES (?, ?, ?)"
# The client has seen these answers, or is gone.
DROP_ANSWERS = "DELETE FROM broker_answer WHERE session = ? AND request < ?"
# All tasks.
LOAD_TASKS = """
    SELECT id, queue, key, priority, body, place, attempt, holder, epoch, waiters, outcome
    FROM broker_task ORDER BY place"""
# All sessions.
LOAD_SESSIONS = "SELECT id, host, pid, started FROM broker_session ORDER BY id"
# All answers that may be asked for again, in the order of their requests.
LOAD_ANSWERS = "SELECT session, request, frame FROM broker_answer ORDER BY session, request"
# The broker starts once more.
RAISE_EPOCH = """
    INSERT INTO broker_meta (name, value) VALUES ('broker_epoch', 1)
    ON CONFLICT (name) DO UPDATE SET value = value + 1 RETURNING value"""

_WAITER_SEPARATOR = "\n"


class TaskStore:
    """Applies the store effects of the broker core, and reads everything back. Raises `sqlite3.Error`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        for statement in (CREATE_TASK, CREATE_SESSION, CREATE_ANSWER, CREATE_META):
            connection.execute(statement)

    def next_broker_epoch(self) -> int:
        """One more than at the last start; durable with the caller's next commit."""
        [(epoch,)] = self._connection.execute(RAISE_EPOCH).fetchall()
        return int(epoch)

    def load(self) -> StoredState:
        """All that survived."""
        return StoredState(
            tasks=tuple(
                StoredTask(
                    task=Task(id=id, queue=queue, key=key, priority=priority, body=body, order=place),
                    attempt=attempt,
                    holder=holder,
                    epoch=epoch,
                    waiters=tuple(waiters.split(_WAITER_SEPARATOR)) if waiters else (),
                    outcome=outcome,
                )
                for id, queue, key, priority, body, place, attempt, holder, epoch, waiters, outcome in (
                    self._connection.execute(LOAD_TASKS)
                )
            ),
            sessions=tuple(
                (id, Peer(host, pid, started)) for id, host, pid, started in self._connection.execute(LOAD_SESSIONS)
            ),
            answers=tuple(self._connection.execute(LOAD_ANSWERS)),
        )

    def apply(self, effect: StoreEffect) -> None:
        """Make one effect true in the transaction that is open."""
        execute = self._connection.execute
        match effect:
            case StoreTask(task=task, waiters=waiters):
                waiting = _WAITER_SEPARATOR.join(waiters)
                execute(INSERT_TASK, (task.id, task.queue, task.key, task.priority, task.body, task.order, waiting))
            case HoldTask():
                execute(HOLD_TASK, (effect.session, effect.epoch, effect.attempt, effect.task))
            case ReleaseTask():
                execute(RELEASE_TASK, (effect.task,))
            case SetWaiters():
                execute(SET_WAITERS, (_WAITER_SEPARATOR.join(effect.waiters), effect.task))
            case SettleTask():
                execute(SETTLE_TASK, (effect.outcome, effect.task))
            case DeleteTask():
                execute(DELETE_TASK, (effect.task,))
            case SaveSession(session=session, peer=peer):
                execute(SAVE_SESSION, (session, peer.host, peer.pid, peer.started))
            case ForgetSession():
                execute(FORGET_SESSION, (effect.session,))
            case SaveAnswer():
                execute(SAVE_ANSWER, (effect.session, effect.request, effect.frame))
            case DropAnswers():
                execute(DROP_ANSWERS, (effect.session, effect.below))
            case _:
                assert_never(effect)
