"""What must hold of the database after each single commit (G2 and G12)."""

from __future__ import annotations

import sqlite3

UNWATCHED = """
    SELECT pid, state, play, owner FROM process
    WHERE state NOT IN ('finished', 'excepted', 'killed')
      AND (owner IS NOT NULL OR inbox_last > inbox_done OR (play = 'playing' AND aside IS NULL AND NOT suspended
           AND NOT EXISTS (SELECT 1 FROM wait WHERE waiter = process.n AND done = 0)))
      AND NOT EXISTS (SELECT 1 FROM broker_task WHERE key = pid AND outcome IS NULL)"""
"""Processes that somebody holds, or should look at, and that no task is about."""

OWNERS = "SELECT pid, owner FROM process WHERE owner IS NOT NULL"
HOLDERS = "SELECT key, holder, attempt FROM broker_task WHERE holder IS NOT NULL"


class Auditor:
    """A failpoint of the broker: looks at the database after each commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._owned: dict[str, str] = {}
        self.commits = 0
        self.releases = 0
        self.complaints: list[str] = []

    def __call__(self, failpoint: str) -> None:
        if failpoint != "after_commit":
            return
        self.commits += 1
        self.complaints += [f"nobody watches {row}" for row in self._connection.execute(UNWATCHED)]
        owned = dict(self._connection.execute(OWNERS).fetchall())
        held = {key: (holder, attempt) for key, holder, attempt in self._connection.execute(HOLDERS)}
        for pid in self._owned.keys() - owned.keys():
            self.releases += 1
            holder, attempt = held.get(pid, (None, 0))
            # In its first attempt it is a new task: stored and delivered in the commit of the old one's end.
            if holder == self._owned[pid] and attempt > 1:
                self.complaints.append(f"{pid} was given up, but its task was not acknowledged in that commit")
        self._owned = owned
