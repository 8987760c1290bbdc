"""A broker whose database may not grow for now: ``python -m tests.faults.small_broker --profile FOLDER``.

SIGUSR1 says that the disk is full, SIGUSR2 that there is space again. (What SQLite does when it may have no more pages
is what it does when the file system has none.)
"""

from __future__ import annotations

import os
import signal
import sqlite3

from prunus.runtime import broker

PLENTY = 1_000_000
opened: list[sqlite3.Connection] = []
limit = PLENTY


def limit_pages(number: int) -> None:
    global limit
    limit = number
    for connection in opened[-1:]:
        connection.execute(f"PRAGMA max_page_count = {limit}")


def open_database(path: str | os.PathLike[str]) -> sqlite3.Connection:
    opened.append(real_open_database(path))
    limit_pages(limit)
    return opened[-1]


if __name__ == "__main__":
    real_open_database = broker.open_database
    broker.open_database = open_database  # type: ignore[assignment]
    signal.signal(signal.SIGUSR1, lambda *_: limit_pages(1))
    signal.signal(signal.SIGUSR2, lambda *_: limit_pages(PLENTY))
    broker.main()
