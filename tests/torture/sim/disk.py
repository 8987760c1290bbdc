"""The broker's disk: a real SQLite database in memory, whose commits fail and whose power is cut.

A crash loses what was not committed. On a disk that is not `synced` a power cut also takes back the commits since the
last one that happened to reach it, as ``synchronous=OFF`` would.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterable
from typing import Any

SYNC_SHARE = 0.1
"""How many commits of a disk that is not synced reach it by themselves."""


class Disk:
    """See the module."""

    def __init__(self, chance: random.Random, *, synced: bool = True) -> None:
        self._chance, self._synced = chance, synced
        self.failure_rate = 0.0
        """With which probability a commit fails."""
        self.failed = self.undone = 0
        self.has_refused = False
        """A commit failed, and the program that was told so goes on."""
        self.connection = self._open()
        self.connection.execute("PRAGMA user_version = 1")  # an empty database has no image
        self._image = b"" if synced else self.connection.serialize()

    def crash(self) -> None:
        """The program that used it is gone."""
        if self.connection.in_transaction:
            self.connection.execute("ROLLBACK")
        self.has_refused = False
        if not self._synced:
            self.undone += 1
            self.connection.close()
            self.connection = self._open()
            self.connection.deserialize(self._image)

    def close(self) -> None:
        self.connection.close()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(":memory:", isolation_level=None, factory=_Connection)
        connection.disk = self
        return connection

    def fails(self) -> bool:
        failing = self.failure_rate > 0 and self._chance.random() < self.failure_rate
        self.failed += failing
        self.has_refused |= failing
        return failing

    def is_there_all_the_same(self) -> bool:
        """Whether a commit whose failure was reported is on the disk after all."""
        return self._chance.random() < 0.5

    def committed(self) -> None:
        if not self._synced and self._chance.random() < SYNC_SHARE:
            self._image = self.connection.serialize()


class _Connection(sqlite3.Connection):
    disk: Disk

    def execute(self, statement: str, parameters: Iterable[Any] = (), /) -> sqlite3.Cursor:  # type: ignore[override]
        if statement != "COMMIT":
            return super().execute(statement, parameters)  # type: ignore[arg-type]
        if self.disk.fails():
            if self.disk.is_there_all_the_same():
                super().execute("COMMIT")
            raise sqlite3.OperationalError("disk I/O error")
        cursor = super().execute("COMMIT")
        self.disk.committed()
        return cursor
