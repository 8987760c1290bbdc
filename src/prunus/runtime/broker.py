"""The broker process: queue and processes in one database, behind one socket, one thread and one commit.

It is crash-only. Its truth is on the disk; an error at a commit ends the process (nothing that was not committed was
said to anybody), the supervisor starts it again, and the clients say again what was not confirmed. Starting is
therefore the same as recovering:

1. hold ``run/broker.lock`` (a `flock`: a second broker is refused);
2. open the database (exclusive, WAL, ``synchronous=FULL``) and raise the broker epoch;
3. reconcile, now and every minute: each process that is runnable, called or held has a task (G12);
4. bind the socket and serve.

A disk that runs full is no reason to end. With little space left new work is refused (`StoreFullError`), and what is
there goes on, also on the space of a ballast file that is given up at that moment. With none left nothing is changed
any more: runners wait with their checkpoints, and what only reads is answered. Should SQLite find no space all the
same, everything is read from the disk again, as after a kill, and nothing is changed for a while.
"""

from __future__ import annotations

import argparse
import enum
import functools
import logging
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prunus.errors import PrunusError, StoreFullError
from prunus.messaging.broker import LEASE_S
from prunus.messaging.exchange import BrokerStoppedError, Exchange, NewTask
from prunus.persistence.database import WAL_LIMIT_BYTES, checkpoint_wal, open_database, wal_bytes
from prunus.persistence.sqlite import ProcessStore
from prunus.runtime.backend import ProcessService, broker_counts, missing_tasks
from prunus.runtime.locks import ServiceLock
from prunus.runtime.profile import Profile

BALLAST_BYTES = 4 * 1024 * 1024
"""Given up when the disk is full, so that running work can still be saved."""
LOW_SPACE_BYTES = 8 * 1024 * 1024
"""With less free space than this, new work is refused ..."""
NO_SPACE_BYTES = 1024 * 1024
"""... and with less than this every change."""
SCARCE_WAL_LIMIT_BYTES = 512 * 1024
"""With little space the write-ahead log is emptied when it is longer than this."""
COPIES = 2
"""What is written needs its size so many times: in the write-ahead log and in the tables."""
FULL_PAUSE_S = 2.0
"""For so long nothing is changed after SQLite found no space; then it is tried again."""
STARTING_PAUSE_S = 0.5
"""The pause before everything is read again after that."""
RECONCILE_INTERVAL_S = 60.0
"""How often every process is looked for its task."""
CHECK_INTERVAL_S = 1.0
"""How often the disk's free space and the length of the write-ahead log are looked at, with or without work."""

logger = logging.getLogger(__name__)
Put = Callable[[Sequence[NewTask]], object]
"""Stores tasks, and delivers them."""


class Space(enum.IntEnum):
    """What the disk has room for."""

    NOTHING = 0
    RUNNING_WORK = 1
    NEW_WORK = 2


class DiskGuard:
    """Says what the disk has room for, and keeps a ballast file to give up when that is little."""

    def __init__(self, database: Path) -> None:
        self._folder = database.parent
        self._ballast = database.with_name("ballast")
        self._refused_until_s = 0.0
        self.space = Space.NEW_WORK
        """At the last `check`."""

    def is_scarce(self, size: int) -> bool:
        """Whether new work would be refused, if `size` bytes come."""
        return self._free() < LOW_SPACE_BYTES + COPIES * size

    def room_for(self, size: int, now: float) -> Space:
        """What there is room for, if `size` bytes come. Gives up the ballast at once when space is low."""
        free = self._free()
        if free < LOW_SPACE_BYTES and self._ballast.exists():
            self._ballast.unlink(missing_ok=True)
            free = self._free()
        if free < NO_SPACE_BYTES + COPIES * size or now < self._refused_until_s:
            return Space.NOTHING
        return Space.RUNNING_WORK if free < LOW_SPACE_BYTES + COPIES * size else Space.NEW_WORK

    def check(self, now: float) -> None:
        """Look at the disk, say what changed, and make the ballast again when there is room."""
        before, self.space = self.space, self.room_for(0, now)
        if self.space != before:
            kB = self._free() // 1024
            match self.space:
                case Space.NOTHING:
                    logger.error(
                        "%d kB are free in %s: nothing is changed until there is more; free some space",
                        kB,
                        self._folder,
                    )
                case Space.RUNNING_WORK:
                    logger.error(
                        "%d kB are free in %s: new work is refused until there is more; free some space",
                        kB,
                        self._folder,
                    )
                case Space.NEW_WORK:
                    logger.info("there is space in %s again: new work is taken", self._folder)
        if self.space is Space.NEW_WORK and self._free() > LOW_SPACE_BYTES + 2 * BALLAST_BYTES:
            self._keep_ballast()

    def found_none(self, now: float) -> None:
        """SQLite found no space."""
        self._refused_until_s = now + FULL_PAUSE_S
        self._ballast.unlink(missing_ok=True)

    def _free(self) -> int:
        status = os.statvfs(self._folder)
        return status.f_bavail * status.f_frsize

    def _keep_ballast(self) -> None:
        if self._ballast.exists():
            return
        try:
            # Written out, not sparse: the blocks must be there to be given up.
            self._ballast.write_bytes(os.urandom(BALLAST_BYTES))
        except OSError as error:  # somebody else took the space meanwhile
            logger.warning("no ballast could be kept: %s", error)
            self._ballast.unlink(missing_ok=True)


class Broker:
    """The parts of a broker, put together on one connection."""

    def __init__(self, database: Path, guard: DiskGuard | None = None, *, lease_s: float = LEASE_S) -> None:
        self._database = database
        self._guard = guard or DiskGuard(database)
        self._connection: sqlite3.Connection = open_database(database)
        try:
            self._store = ProcessStore(self._connection)
            self._service = ProcessService(self._store, self._statistics)
            self.exchange: Exchange[bytes] = Exchange(
                self._connection,
                service=self._service,
                now=time.monotonic(),
                lease_s=lease_s,
                before_batch=self._make_room,
            )
        except BaseException:
            self._connection.close()
            raise
        self._next_check_s = self._next_emptying_s = self._next_reconciling_s = 0.0

    def look_after(self, now: float, put: Put) -> None:
        """Called by the server in every turn, with the monotonic time: checks now and then."""
        if now < self._next_check_s:
            return
        self._next_check_s = now + CHECK_INTERVAL_S
        self._empty_log(now, SCARCE_WAL_LIMIT_BYTES if self._guard.is_scarce(0) else WAL_LIMIT_BYTES)
        self._guard.check(now)
        self._admit(self._guard.space)
        if now >= self._next_reconciling_s and self._guard.space is not Space.NOTHING:
            self._next_reconciling_s = now + RECONCILE_INTERVAL_S
            self._reconcile(put)

    def close(self) -> None:
        """Leave the disk tidy. A broker that is killed leaves it as safe, but with a log to read."""
        checkpoint_wal(self._connection)
        self._connection.close()

    def abandon(self) -> None:
        """Let go of the database as it is."""
        self._connection.close()

    def _make_room(self, size: int) -> None:
        now = time.monotonic()
        if self._guard.is_scarce(size) and now >= self._next_emptying_s:
            self._empty_log(now, SCARCE_WAL_LIMIT_BYTES)
        self._admit(self._guard.room_for(size, now))

    def _empty_log(self, now: float, limit: int) -> None:
        if wal_bytes(self._database) > limit:
            self._next_emptying_s = now + CHECK_INTERVAL_S
            checkpoint_wal(self._connection)

    def _admit(self, space: Space) -> None:
        path = str(self._database)
        self.exchange.refuse_changes = self._service.refuse_changes = None if space else path
        self.exchange.refuse_new = self._service.refuse_new = None if space is Space.NEW_WORK else path

    def _reconcile(self, put: Put) -> None:
        """Every process that somebody has to look at has a task (G12), whoever else wrote to the database."""
        if tasks := missing_tasks(self._store, self.exchange.has_task):
            logger.warning("%d processes had no task: they get one now", len(tasks))
            put(tasks)

    def _statistics(self) -> dict[str, Any]:
        full = self._guard.room_for(0, time.monotonic()) is not Space.NEW_WORK
        return {**broker_counts(self.exchange.statistics()), "pid": os.getpid(), "disk_full": full}


def serve(profile: Profile, *, lease_s: float = LEASE_S) -> None:
    """Serve a profile until SIGTERM or SIGINT. The caller holds the lock."""
    from prunus.messaging.zeromq import ZmqServer

    guard = DiskGuard(profile.database)
    servers: list[ZmqServer] = []
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for server in servers:
            server.stop()

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    while not stopping:
        broker: Broker | None = None
        try:
            guard.check(time.monotonic())
            broker = Broker(profile.database, guard, lease_s=lease_s)
            broker.look_after(time.monotonic(), put=functools.partial(broker.exchange.put, time.monotonic()))
            logger.info("epoch %d: serving at %s", broker.exchange.broker_epoch, profile.endpoint)
            with ZmqServer(broker.exchange, profile.endpoint) as server:
                servers[:] = [server]
                if not stopping:
                    server.run(each_turn=functools.partial(broker.look_after, put=server.put))
            broker.close()
        except (BrokerStoppedError, StoreFullError) as error:
            if broker is not None:
                broker.abandon()
            if isinstance(error, BrokerStoppedError) and not error.full:
                raise
            guard.found_none(time.monotonic())
            logger.error(
                "the disk that holds %s is full: everything is read from it again, and for %.0f s nothing is changed; "
                "free some space",
                profile.database,
                FULL_PAUSE_S,
            )
            time.sleep(STARTING_PAUSE_S)
    logger.info("stopped")


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m prunus.runtime.broker --profile FOLDER``."""
    parser = argparse.ArgumentParser(prog="prunus-broker")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--lease", type=float, default=LEASE_S, help="seconds of silence after which a peer is gone")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    try:
        profile = Profile.load(options.profile)
        with ServiceLock(profile.lock("broker")):
            serve(profile, lease_s=options.lease)
    except PrunusError as error:
        logger.critical("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
