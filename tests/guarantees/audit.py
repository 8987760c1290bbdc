"""What must hold of the database after each single commit (G2 and G12)."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable

UNWATCHED = """
    SELECT pid, state, play, owner FROM process
    WHERE state NOT IN ('finished', 'excepted', 'killed')
      AND (owner IS NOT NULL OR inbox_last > inbox_done
           OR (play = 'playing' AND aside IS NULL AND (state <> 'waiting' OR ready)))
      AND NOT EXISTS (SELECT 1 FROM broker_task WHERE key = pid AND outcome IS NULL)"""
"""Processes that somebody holds, or should look at, and that no task is about."""

OWNERS = "SELECT pid, owner, epoch FROM process WHERE owner IS NOT NULL"
HELD = "SELECT key, holder, id, epoch FROM broker_task WHERE holder IS NOT NULL"


def nth_commit(number: int) -> tuple[Callable[[str], None], asyncio.Event]:
    """A failpoint of the broker that counts commits, and the event that it sets at this one."""
    reached = asyncio.Event()
    commits = 0

    def count(failpoint: str) -> None:
        nonlocal commits
        commits += failpoint == "after_commit"
        if commits == number:
            reached.set()

    return count, reached


class Auditor:
    """A failpoint of the broker: looks at the database after each commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._owned: dict[tuple[str, str, int], object] = {}
        """The claims that stand, and the task that their worker held for each when it claimed."""
        self.commits = 0
        self.releases = 0
        self.complaints: list[str] = []

    def __call__(self, failpoint: str) -> None:
        if failpoint != "after_commit":
            return
        self.commits += 1
        self.complaints += [f"nobody watches {row}" for row in self._connection.execute(UNWATCHED)]
        held = {(pid, holder): (task, epoch) for pid, holder, task, epoch in self._connection.execute(HELD)}
        claims = self._connection.execute(OWNERS).fetchall()
        owned = {claim: self._owned.get(claim, held.get(claim[:2])) for claim in claims}
        unowned = {pid for pid, _, _ in self._owned} - {pid for pid, _, _ in owned}
        for claim in [claim for claim in self._owned if claim[0] in unowned]:
            self.releases += 1
            task = self._owned[claim]
            if task is not None and task == held.get(claim[:2]):
                self.complaints.append(f"{claim[0]} was given up, but its task was not acknowledged in that commit")
        self._owned = owned
