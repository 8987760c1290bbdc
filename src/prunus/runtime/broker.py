"""The broker process: queue and processes in one database, behind one socket, one thread and one commit.

It is crash-only. Its truth is on the disk; an error at a commit ends the process (nothing that was not committed was
said to anybody), the supervisor starts it again, and the clients say again what was not confirmed. Starting is
therefore the same as recovering:

1. hold ``run/broker.lock`` (a `flock`: a second broker is refused);
2. open the database (exclusive, WAL, ``synchronous=FULL``) and raise the broker epoch;
3. reconcile: every process that is runnable, called or held has a task (G12);
4. bind the socket and serve.

When the disk runs full, new work is refused (`StoreFullError`) and what is there goes on: checkpoints and
acknowledgements get the space of the ballast file, which is given up at that moment.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunus.errors import PrunusError
from prunus.messaging.exchange import Exchange
from prunus.persistence.database import WAL_LIMIT_BYTES, checkpoint_wal, open_database, wal_bytes
from prunus.persistence.persister import Effects
from prunus.persistence.sqlite import ProcessStore
from prunus.runtime.backend import ProcessService, broker_counts, tasks_for
from prunus.runtime.locks import ServiceLock
from prunus.runtime.profile import Profile

BALLAST_BYTES = 1024 * 1024
"""Given up when the disk is full, so that running work can still be saved."""
LOW_SPACE_BYTES = 8 * 1024 * 1024
"""With less free space than this, new work is refused."""
CHECK_INTERVAL_S = 1.0
"""How often the disk's free space and the length of the write-ahead log are looked at."""

logger = logging.getLogger(__name__)


class DiskGuard:
    """Says when the disk is too full for new work, and keeps a ballast file to give up at that moment."""

    def __init__(self, database: Path) -> None:
        self._folder = database.parent
        self._ballast = database.with_name("ballast")
        self.is_full = False

    def check(self) -> bool:
        """Look at the disk; True if it is too full for new work."""
        status = os.statvfs(self._folder)
        free = status.f_bavail * status.f_frsize
        was_full, self.is_full = self.is_full, free < LOW_SPACE_BYTES
        if self.is_full and not was_full:
            logger.error(
                "only %d kB are free in %s: new work is refused until there is more", free // 1024, self._folder
            )
            self._ballast.unlink(missing_ok=True)
        elif not self.is_full:
            if was_full:
                logger.info("there is space in %s again: new work is taken", self._folder)
            self._keep_ballast()
        return self.is_full

    def _keep_ballast(self) -> None:
        if not self._ballast.exists():
            # Written out, not sparse: the blocks must be there to be given up.
            self._ballast.write_bytes(os.urandom(BALLAST_BYTES))


class Broker:
    """The parts of a broker, put together on one connection."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._guard = DiskGuard(database)
        self._connection: sqlite3.Connection = open_database(database)
        self._store = ProcessStore(self._connection)
        self._service = ProcessService(self._store, self._statistics)
        self.exchange: Exchange[bytes] = Exchange(self._connection, service=self._service, now=time.monotonic())
        self._next_check_s = 0.0

    def reconcile(self) -> None:
        """Every process that somebody has to look at gets a task, unless it has one (G12).

        What was held is looked at again as well: if its worker lives, the task waits behind the one that this worker
        holds, and finds nothing to do.
        """
        unheld = self._store.unheld_work()
        effects = Effects(runnable=(*unheld.runnable, *self._store.held()), called=unheld.called)
        tasks = [task for task in tasks_for(effects) if task.key is not None and not self.exchange.has_task(task.key)]
        if tasks:
            logger.warning("%d processes had no task: they get one now", len(tasks))
            self.exchange.put(time.monotonic(), tasks)

    def look_after_disk(self, now: float) -> None:
        """Called by the server in every turn, with the monotonic time: checks now and then."""
        if now < self._next_check_s:
            return
        self._next_check_s = now + CHECK_INTERVAL_S
        full = str(self._database) if self._guard.check() else None
        self.exchange.refuse_new = full
        self._service.refuse_new = full
        if wal_bytes(self._database) > WAL_LIMIT_BYTES:
            checkpoint_wal(self._connection)

    def close(self) -> None:
        """Leave the disk tidy. A broker that is killed leaves it as safe, but with a log to read."""
        checkpoint_wal(self._connection)
        self._connection.close()

    def _statistics(self) -> dict[str, Any]:
        return {**broker_counts(self.exchange.statistics()), "pid": os.getpid(), "disk_full": self._guard.is_full}


def serve(profile: Profile) -> None:
    """Serve a profile until SIGTERM or SIGINT. The caller holds the lock."""
    from prunus.messaging.zeromq import ZmqServer

    broker = Broker(profile.database)
    broker.look_after_disk(time.monotonic())
    broker.reconcile()
    logger.info("epoch %d: serving at %s", broker.exchange.broker_epoch, profile.endpoint)
    with ZmqServer(broker.exchange, profile.endpoint) as server:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: server.stop())
        server.run(each_turn=broker.look_after_disk)
    broker.close()
    logger.info("stopped")


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m prunus.runtime.broker --profile FOLDER``."""
    parser = argparse.ArgumentParser(prog="prunus-broker")
    parser.add_argument("--profile", type=Path, required=True)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    try:
        profile = Profile.load(options.profile)
        with ServiceLock(profile.lock("broker")):
            serve(profile)
    except PrunusError as error:
        logger.critical("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
