"""G2: a task is acknowledged in the same transaction as the checkpoint that makes it unnecessary.

G12: every non-terminal process is live on one worker, queued, or parked with a registered wake-up.

Both are statements about what is on the disk, so they are checked after every single commit of a busy daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

from prunus import errors
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import workflows
from tests.runtime.waiting import file_has, until

UNWATCHED = """
    SELECT pid, state, play, owner FROM process
    WHERE state NOT IN ('finished', 'excepted', 'killed')
      AND (owner IS NOT NULL OR inbox_last > inbox_done OR (play = 'playing' AND aside IS NULL AND NOT suspended
           AND NOT EXISTS (SELECT 1 FROM wait WHERE waiter = process.n AND done = 0)))
      AND NOT EXISTS (SELECT 1 FROM broker_task WHERE key = pid AND outcome IS NULL)"""
"""Processes that somebody holds, or should look at, and that no task is about."""

OWNERS = "SELECT pid, epoch FROM process WHERE owner IS NOT NULL"
HELD = "SELECT key FROM broker_task WHERE holder IS NOT NULL"


class Auditor:
    """Looks at the database after each commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._owned: dict[str, int] = {}
        self.commits = 0
        self.releases = 0
        self.complaints: list[str] = []

    def __call__(self, failpoint: str) -> None:
        if failpoint != "after_commit":
            return
        self.commits += 1
        self.complaints += [f"nobody watches {row}" for row in self._connection.execute(UNWATCHED)]
        owned = dict(self._connection.execute(OWNERS).fetchall())
        held = {key for [key] in self._connection.execute(HELD)}
        for pid in self._owned.keys() - owned.keys():
            self.releases += 1
            if pid in held and not self._is_offered_again(pid):
                self.complaints.append(f"{pid} was given up, but its task was not acknowledged in that commit")
        self._owned = owned

    def _is_offered_again(self, pid: str) -> bool:
        """The task of this pid is a new one: it was stored and delivered in the commit of the old one's end."""
        [count] = self._connection.execute("SELECT count(*) FROM broker_task WHERE key = ?", [pid]).fetchone()
        [attempt] = self._connection.execute("SELECT max(attempt) FROM broker_task WHERE key = ?", [pid]).fetchone()
        return bool(count == 1 and attempt == 1)


async def test_after_every_commit_each_process_is_ended_watched_or_parked(tmp_path: Path) -> None:
    """Launches, children, pauses, kills, a dying and a leaving worker: not one commit is out of order."""
    file = tmp_path / "journal"
    async with LocalDaemon(workers=2, slots=3) as daemon:
        auditor = Auditor(daemon.connection)
        daemon.broker.exchange.failpoint = auditor
        launch = daemon.controller.launch
        chains = [await launch(workflows.Fan, {"count": 3}) for _ in range(10)]
        journals = [
            await launch(workflows.Journal, {"file": str(file), "steps": 10, "pace_s": 0.001}) for _ in range(5)
        ]
        asks = [await launch(workflows.Ask) for _ in range(5)]
        await file_has(file, 5)
        await daemon.kill_worker("worker-1")
        for handle in journals[:3]:
            with contextlib.suppress(errors.InvalidStateError):
                await handle.pause()
                await handle.play()
        await daemon.start_worker("worker-3")
        await daemon.stop_worker("worker-2")
        await asks[0].kill()
        for handle in asks[1:]:
            await handle.pause()
            await handle.play()
            await until(handle, lambda row: row.state == "waiting")
            await handle.resume(1)
        await asyncio.gather(*(handle.result() for handle in chains + journals + asks[1:]))
    assert auditor.complaints == []
    assert auditor.commits > 100
    assert auditor.releases > 50
