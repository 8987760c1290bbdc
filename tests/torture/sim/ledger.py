"""A service behind the broker that shows whether its promises hold: pids with a fenced log of writes.

Each pid is claimed under an epoch that rises; a write under an older one is refused. One that is open and unclaimed
has a task, or a timer that makes one. So it is a process store in small, and its log tells who wrote when.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable

from prunus.errors import PersistenceError, StaleOwnerError
from prunus.messaging.exchange import NewTask, Served

QUEUE = "fenced"
TABLES = (
    """CREATE TABLE IF NOT EXISTS ledger (pid TEXT PRIMARY KEY, epoch INTEGER NOT NULL DEFAULT 0, owner TEXT,
       closed INTEGER NOT NULL DEFAULT 0, wake_at REAL) STRICT, WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS ledger_log (n INTEGER PRIMARY KEY, pid TEXT, epoch INTEGER, value TEXT) STRICT",
)


class Ledger:
    """A `Service`. A request is words: ``open PID``, ``claim PID``, ``write|close PID EPOCH VALUE``,
    ``park PID EPOCH VALUE SECONDS``, ``read PID``."""

    def __init__(self, connection: sqlite3.Connection, wall: Callable[[], float]) -> None:
        self._connection, self._wall = connection, wall
        for table in TABLES:
            connection.execute(table)

    def execute(self, request: bytes, session: str, role: object = None) -> Served:
        deed, pid, *rest = request.decode().split()
        answer, tasks = getattr(self, f"_{deed}")(session, pid, *rest)
        return Served(answer=str(answer).encode(), tasks=tasks)

    def left(self, session: str, lost: object) -> Iterable[NewTask]:
        rows = self._connection.execute(
            "UPDATE ledger SET owner = NULL WHERE owner = ? AND NOT closed RETURNING pid", (session,)
        ).fetchall()
        return [NewTask(queue=QUEUE, key=pid) for (pid,) in sorted(rows)]

    def due(self) -> float | None:
        [(wake_at,)] = self._connection.execute("SELECT min(wake_at) FROM ledger").fetchall()
        return None if wake_at is None else wake_at - self._wall()

    def tick(self) -> Iterable[NewTask]:
        rows = self._connection.execute(
            "UPDATE ledger SET wake_at = NULL WHERE wake_at <= ? RETURNING pid", (self._wall(),)
        ).fetchall()
        return [NewTask(queue=QUEUE, key=pid) for (pid,) in sorted(rows)]

    # --- deeds ---

    def _open(self, session: str, pid: str) -> tuple[object, tuple[NewTask, ...]]:
        rows = self._connection.execute(
            "INSERT OR IGNORE INTO ledger (pid) VALUES (?) RETURNING pid", (pid,)
        ).fetchall()
        return ("opened", (NewTask(queue=QUEUE, key=pid),)) if rows else ("there", ())

    def _claim(self, session: str, pid: str) -> tuple[object, tuple[NewTask, ...]]:
        rows = self._connection.execute(
            "UPDATE ledger SET epoch = epoch + 1, owner = ?, wake_at = NULL WHERE pid = ? AND NOT closed"
            " RETURNING epoch",
            (session, pid),
        ).fetchall()
        return (rows[0][0] if rows else "closed"), ()

    def _write(self, session: str, pid: str, epoch: str, value: str) -> tuple[object, tuple[NewTask, ...]]:
        rows = self._connection.execute(
            "SELECT epoch FROM ledger WHERE pid = ? AND owner = ? AND NOT closed", (pid, session)
        ).fetchall()
        if rows != [(int(epoch),)]:
            raise StaleOwnerError(pid, int(epoch))
        self._connection.execute(
            "INSERT INTO ledger_log (pid, epoch, value) VALUES (?, ?, ?)", (pid, int(epoch), value)
        )
        return "written", ()

    def _close(self, session: str, pid: str, epoch: str, value: str) -> tuple[object, tuple[NewTask, ...]]:
        self._write(session, pid, epoch, value)
        self._connection.execute("UPDATE ledger SET closed = 1, owner = NULL WHERE pid = ?", (pid,))
        return "closed", ()

    def _park(self, session: str, pid: str, epoch: str, value: str, seconds: str) -> tuple[object, tuple[NewTask, ...]]:
        self._write(session, pid, epoch, value)
        wake_at = self._wall() + float(seconds)
        self._connection.execute("UPDATE ledger SET owner = NULL, wake_at = ? WHERE pid = ?", (wake_at, pid))
        return "parked", ()

    def _read(self, session: str, pid: str) -> tuple[object, tuple[NewTask, ...]]:
        if pid == "nothing":
            raise PersistenceError("there is nothing of that name")
        [(count,)] = self._connection.execute("SELECT count(*) FROM ledger_log WHERE pid = ?", (pid,)).fetchall()
        return count, ()
