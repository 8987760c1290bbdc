"""The broker process: queue and processes in one database, behind one socket, one thread and one commit.

It is crash-only. Its truth is on the disk; an error at a commit ends the process (nothing that was not committed was
said to anybody), the supervisor starts it again, and the clients say again what was not confirmed. Starting is
therefore the same as recovering:

1. hold ``run/broker.lock`` (a `flock`: a second broker is refused);
2. open the database (exclusive, WAL, ``synchronous=FULL``) and raise the broker epoch;
3. reconcile, now and every minute (`prunus.runtime.reconcile`): each process that has not ended is live, queued or
   parked with something that wakes it (G12), or is repaired; what has ended and is older than the profile wants is
   forgotten, some at a time;
4. bind the socket, and the places on a network that the profile names, if it has keys; and serve.

A disk that runs full is no reason to end. With little space left new work is refused (`StoreFullError`), and what is
there goes on, also on the space of a ballast file that is given up at that moment. With none left nothing is changed
any more: runners wait with their checkpoints, and what only reads is answered. Should SQLite find no space all the
same, everything is read from the disk again, as after a kill, and nothing is changed for a while.

Nobody may take the database away unseen. At its start the broker refuses one that was emptied, removed or replaced,
and one whose log is gone (`prunus.persistence.database`). If that is done while it serves, it ends within about a
second: what was in a log that was removed is put into the file by that; a file that was removed lives as long as the
broker has it open, and is copied to a new one before that is over. The next broker does not start before somebody has
decided.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import functools
import logging
import os
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

import prunus
from prunus.errors import PersistenceError, PrunusError, StoreFullError
from prunus.messaging.blobs import BlobStore
from prunus.messaging.exchange import BrokerStoppedError, Exchange, NewTask
from prunus.messaging.liveness import boottime
from prunus.messaging.messages import LEASE_S
from prunus.persistence.database import (
    WAL_LIMIT_BYTES,
    begin_note,
    checkpoint_wal,
    commit,
    explain,
    file_ids,
    is_damage,
    lay_out_log,
    log_file_bytes,
    open_database,
    rescue,
    wal_bytes,
)
from prunus.persistence.sqlite import ProcessStore
from prunus.runtime import logs
from prunus.runtime.backend import ProcessService, tasks_for
from prunus.runtime.locks import ServiceLock
from prunus.runtime.profile import Config, Profile
from prunus.runtime.reconcile import SLICE_S, Finding, Reconciler, TasksOf
from prunus.runtime.upkeep import Upkeep

if TYPE_CHECKING:
    from prunus.messaging.doors import Connection
    from prunus.messaging.server import Server

BALLAST_BYTES = 4 * 1024 * 1024
"""Given up when the disk is full, so that running work can still be saved."""
LOW_SPACE_BYTES = 8 * 1024 * 1024
"""With less free space than this, new work is refused ..."""
NO_SPACE_BYTES = 1024 * 1024
"""... and with less than this every change."""
SCARCE_WAL_LIMIT_BYTES = 512 * 1024
"""With little space the write-ahead log is emptied when it is longer than this."""
PLENTY_BYTES = 4 * LOW_SPACE_BYTES
"""With more, the disk is not asked before every batch, ..."""
MEASURED_S = 0.02
"""... but after so long; what was written meanwhile counts."""
COPIES = 2
"""What is written needs its size so many times: in the write-ahead log and in the tables."""
BLOB_SPARES_BYTES = 8 * 1024 * 1024
"""A blob that would leave less than this above `LOW_SPACE_BYTES` is refused. So the pieces of one, which come a few MiB
at a time, do not make the broker refuse the work of others."""
FULL_PAUSE_S = 2.0
"""For so long nothing is changed after SQLite found no space; then it is tried again."""
STARTING_PAUSE_S = 0.5
"""The pause before everything is read again after that."""
RECONCILE_INTERVAL_S = 60.0
"""How often it is looked whether every process is looked after."""
STARTING_SLICE_S = 0.25
"""So long that is looked at when the broker starts; what is left then comes while it serves."""
MENDED_SAID = 10
"""So many repairs of one turn are said in the log."""
MEMORY_LIMIT_BYTES = 4 * 1024 * 1024 * 1024
"""The broker gets no more: whatever somebody makes it keep, it is this process that ends, and starts again."""
RETENTION_INTERVAL_S = 60.0
"""How often old dead letters are looked for."""
FORGOTTEN_AT_ONCE = 1000
"""Dead letters, or ended processes that are looked at, in one batch; while there are more, the next batch comes with
the next check."""
RECONCILED_AT_ONCE = 10_000
"""Processes that had no task and get one in one commit."""
CHECK_INTERVAL_S = 1.0
"""How often the disk's free space, the length of the write-ahead log and whether the files are still there are looked
at, with or without work."""

_ENDS: tuple[Literal["finished", "excepted", "killed"], ...] = ("finished", "excepted", "killed")
_FIRST_ENDED = (0.0, 0)

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
        self._measured, self._measured_until_s = 0, 0.0
        """The free space that there was, less what was written since then, and how long that is believed."""
        self.space = Space.NEW_WORK
        """At the last `check`."""

    def is_scarce(self, size: int, now: float) -> bool:
        """Whether new work would be refused, if `size` bytes come."""
        return self._free(now) < LOW_SPACE_BYTES + COPIES * size

    def takes_blob(self, size: int) -> bool:
        """Whether `size` bytes more of a blob leave enough for all other work. Looks at the disk: an upload that was
        dropped a moment ago has given its space back."""
        return self._measure() >= LOW_SPACE_BYTES + BLOB_SPARES_BYTES + size

    def room_for(self, size: int, now: float) -> Space:
        """What there is room for, if `size` bytes come. Gives up the ballast at once when space is low."""
        free = self._free(now)
        self._measured -= COPIES * size
        if free < LOW_SPACE_BYTES and self._ballast.exists():
            self._ballast.unlink(missing_ok=True)
            free = self._free(now)
        if free < NO_SPACE_BYTES + COPIES * size or now < self._refused_until_s:
            return Space.NOTHING
        return Space.RUNNING_WORK if free < LOW_SPACE_BYTES + COPIES * size else Space.NEW_WORK

    def check(self, now: float) -> None:
        """Look at the disk, say what changed, and make the ballast again when there is room."""
        before, self.space = self.space, self.room_for(0, now)
        if self.space != before:
            kB = self._free(now) // 1024
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
        if self.space is Space.NEW_WORK and self._free(now) > LOW_SPACE_BYTES + 2 * BALLAST_BYTES:
            self._keep_ballast()

    def found_none(self, now: float) -> None:
        """SQLite found no space."""
        self._refused_until_s = now + FULL_PAUSE_S
        self._ballast.unlink(missing_ok=True)

    def _free(self, now: float) -> int:
        if self._measured < PLENTY_BYTES or now >= self._measured_until_s:
            self._measured, self._measured_until_s = self._measure(), now + MEASURED_S
        return self._measured

    def _measure(self) -> int:
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

    def __init__(
        self,
        database: Path,
        guard: DiskGuard | None = None,
        *,
        lease_s: float = LEASE_S,
        keep_dead_s: float | None = None,
        keep_ended_s: Mapping[str, float] | None = None,
        max_crashes: int = 0,
    ) -> None:
        """`keep_dead_s`: how long a dead letter is kept; None: for ever. `keep_ended_s`: by their state, how long
        processes are kept that ended in it; of a state that is not there, for ever. Blobs are beside the database. A
        process in whose step `max_crashes` workers died is set aside; 0: never."""
        self._database = database
        self._guard = guard or DiskGuard(database)
        self._keep_dead_s = keep_dead_s
        self._keep_ended_s = dict(keep_ended_s or {})
        self._ended_after: dict[str, tuple[float, int]] = {}
        """By state: where the next batch of ended processes begins, if it is not the first."""
        self._connection: sqlite3.Connection = open_database(database)
        try:
            begin_note(self._connection)
            self._files = file_ids(database)
            if not self._guard.is_scarce(WAL_LIMIT_BYTES, boottime()):
                lay_out_log(self._connection)
            with _the_disk_may_fail():
                self._store = ProcessStore(self._connection)
            self._store.max_crashes = max_crashes
            blobs = BlobStore(database.with_name("blobs"), boottime(), self._full_with_blob)
            self._upkeep = Upkeep(self._connection, blobs)
            tasks = TasksOf(lambda: self.exchange)
            self._service = ProcessService(self._store, self._statistics, upkeep=self._upkeep, tasks=tasks)
            self._reconciler, self._slice_s = Reconciler(self._store, tasks, RECONCILE_INTERVAL_S), STARTING_SLICE_S
            self.exchange: Exchange[Connection] = Exchange(
                self._connection,
                service=self._service,
                blobs=blobs,
                now=boottime(),
                lease_s=lease_s,
                before_batch=self._make_room,
            )
        except BaseException:
            self._connection.close()
            raise
        self._next_check_s = self._next_emptying_s = self._next_forgetting_s = 0.0
        self._next_pruning_s = 0.0
        self._admitted = Space.NEW_WORK

    def look_after(self, now: float, put: Put) -> None:
        """Called by the server in every turn, with the time (`boottime`): goes on with a backup, and checks now and
        then."""
        self._upkeep.turn()
        if now < self._next_check_s:
            return
        self._next_check_s = now + CHECK_INTERVAL_S
        try:
            self._keep_hold()
        except StoreFullError as error:  # then it must not end, nor confirm anything, before there is a copy
            logger.error("%s was removed while the broker had it open, and is not saved: %s", self._database, error)
            self._guard.found_none(now)
        scarce = self._guard.is_scarce(0, now)
        self._empty_log(now, SCARCE_WAL_LIMIT_BYTES if scarce else WAL_LIMIT_BYTES, shrink=scarce)
        self._guard.check(now)
        self._admit(self._guard.space)
        if self._guard.space is not Space.NOTHING and self._reconciler.is_due(now):
            with _the_disk_may_fail():
                self._reconcile(now, put)
        if self._guard.space is Space.NEW_WORK:
            with _the_disk_may_fail():
                self._upkeep.give_back()
            self._forget_dead(now)
            with _the_disk_may_fail():
                self._forget_ended(now)
        self.exchange.sweep_blobs(now, keep_finished=self._upkeep.is_copying)  # a backup has to copy them yet

    def close(self) -> None:
        """Leave the disk tidy. A broker that is killed leaves it as safe, but with a log to read."""
        self._upkeep.stop()
        self._keep_hold()
        self._checkpoint()
        self._connection.close()

    def abandon(self) -> None:
        """Let go of the database as it is."""
        self._upkeep.stop()
        self._connection.close()

    def _keep_hold(self) -> None:
        """If somebody took the database or its log away, save what was in it and raise a `PersistenceError` that says
        where it is; a `StoreFullError` if there is no space for that."""
        found = file_ids(self._database)
        if found == self._files:
            return
        self._upkeep.stop()
        if found[0] == self._files[0]:
            raise PersistenceError(
                f"the log {self._database}-wal was removed or replaced while the broker had it open; the broker ends, "
                "so that what was in it is put into the database, and can be started again"
            )
        try:
            copy = rescue(self._connection)
        except StoreFullError:
            raise
        except PersistenceError as error:
            raise PersistenceError(
                f"{self._database} was removed or replaced while the broker had it open, and what was in it is lost: "
                f"{error}"
            ) from error
        raise PersistenceError(
            f"{self._database} was removed or replaced while the broker had it open; all that was in it is saved: "
            f"`prunus broker restore {copy}` goes on from there"
        )

    def _make_room(self, size: int) -> None:
        now = boottime()
        if now >= self._next_emptying_s and self._guard.is_scarce(size, now):
            self._empty_log(now, SCARCE_WAL_LIMIT_BYTES, shrink=True)
        self._admit(self._guard.room_for(size, now))

    def _full_with_blob(self, size: int) -> str | None:
        return None if self._guard.takes_blob(size) else str(self._database)

    def _empty_log(self, now: float, limit: int, *, shrink: bool) -> None:
        if (log_file_bytes if shrink else wal_bytes)(self._database) > limit:
            self._next_emptying_s = now + CHECK_INTERVAL_S
            self._checkpoint(shrink=shrink)

    def _checkpoint(self, *, shrink: bool = False) -> None:
        with _the_disk_may_fail():
            checkpoint_wal(self._connection, shrink=shrink)

    def _forget_dead(self, now: float) -> None:
        """Dead letters that are older than the profile wants are forgotten, some at a time."""
        if self._keep_dead_s is None or now < self._next_forgetting_s:
            return
        self._next_forgetting_s = now + RETENTION_INTERVAL_S
        forgotten = self.exchange.forget_dead(now, before=time.time() - self._keep_dead_s, limit=FORGOTTEN_AT_ONCE)
        if forgotten:
            logger.info("%d dead letters were older than %.0f s and are forgotten", forgotten, self._keep_dead_s)
        if forgotten == FORGOTTEN_AT_ONCE:
            self._next_forgetting_s = now

    def _forget_ended(self, now: float) -> None:
        """Processes that ended longer ago than the profile wants are forgotten, some at a time."""
        if not self._keep_ended_s or now < self._next_pruning_s:
            return
        self._next_pruning_s = now + RETENTION_INTERVAL_S
        for state, keep_s in self._keep_ended_s.items():
            after = self._ended_after.pop(state, _FIRST_ENDED)
            self._connection.execute("BEGIN IMMEDIATE")
            forgotten, more = self._store.forget_ended(state, time.time() - keep_s, after, FORGOTTEN_AT_ONCE)
            commit(self._connection)
            if forgotten:
                logger.info("%d processes were %s for more than %.0f s and are forgotten", forgotten, state, keep_s)
            if more is not None:
                self._ended_after[state] = more
                self._next_pruning_s = now

    def _admit(self, space: Space) -> None:
        if space is self._admitted:
            return
        self._admitted, path = space, str(self._database)
        self.exchange.refuse_changes = self._service.refuse_changes = None if space else path
        self.exchange.refuse_new = self._service.refuse_new = None if space is Space.NEW_WORK else path

    def _reconcile(self, now: float, put: Put) -> None:
        """Every process is looked after (G12), whoever else wrote to the database."""
        self._connection.execute("BEGIN IMMEDIATE")
        found, effects = self._reconciler.turn(now, time.time(), self._slice_s)
        commit(self._connection)  # were the tasks lost, the next round would miss them
        self._slice_s = SLICE_S
        _say(found)
        tasks = tasks_for(effects)
        for begin in range(0, len(tasks), RECONCILED_AT_ONCE):
            put(tasks[begin : begin + RECONCILED_AT_ONCE])

    def _statistics(self) -> dict[str, Any]:
        full = self._guard.room_for(0, boottime()) is not Space.NEW_WORK
        size = self._database.stat().st_size + wal_bytes(self._database)
        counts: dict[str, Any] = msgspec.to_builtins(self.exchange.statistics())
        about = {"pid": os.getpid(), "version": prunus.__version__}
        return {**counts, "database_bytes": size, "disk_full": full, **about}


def _say(found: Sequence[Finding]) -> None:
    for finding in found[:MENDED_SAID]:
        logger.warning("repaired: process %s %s", finding.pid, finding.text, extra={"pid": finding.pid})
    if len(found) > MENDED_SAID:
        logger.warning("repaired: %d more processes that nobody looked after", len(found) - MENDED_SAID)


@contextlib.contextmanager
def _the_disk_may_fail() -> Iterator[None]:
    """What SQLite refuses ends this process: with a sentence."""
    try:
        yield
    except sqlite3.Error as error:
        raise BrokerStoppedError.of(error) from error


def kept_ended_s(config: Config) -> dict[str, float]:
    """By their state, for how many seconds processes are kept that ended; one that is not there, for ever."""
    return {state: keep_s for state in _ENDS if (keep_s := config.keep_s(state)) is not None}


class Whereabouts:
    """The files by which a broker is found: its lock and its socket. Whoever cleans up may take them away."""

    def __init__(self, profile: Profile, lock: ServiceLock | None) -> None:
        """Of a broker that serves now. Without a `lock`, that is somebody else's business."""
        self._folder, self._lock = profile.path, lock
        self._socket = Path(profile.endpoint.removeprefix("ipc://"))
        self._file = self._socket.stat()
        self._next_look_s = 0.0

    def are_lost(self, now: float) -> bool:
        """Whether nobody can find the broker any more, for its socket is gone; the lock is renewed where that is all.
        Asked often, it looks once a second. Of a profile that was deleted there is nothing to be found."""
        if now < self._next_look_s or not self._folder.is_dir():
            return False
        self._next_look_s = now + CHECK_INTERVAL_S
        if self._lock is not None:
            self._lock.renew()
        try:
            return not os.path.samestat(self._socket.lstat(), self._file)
        except FileNotFoundError:
            return True
        except OSError:  # it can't be seen at the moment
            return False


def _turn(broker: Broker, server: Server, whereabouts: Whereabouts, now: float) -> None:
    broker.look_after(now, server.put)
    if whereabouts.are_lost(now):
        server.stop()


def serve(profile: Profile, *, lease_s: float = LEASE_S, lock: ServiceLock | None = None) -> None:
    """Serve a profile until SIGTERM or SIGINT. The caller holds the lock, and gives it to be renewed."""
    from prunus.messaging.keys import Keyring
    from prunus.messaging.server import Server

    profile.check_keys()
    _limit_resources()
    listen = profile.config.listen
    keys = Keyring(profile.keys) if listen else None
    guard = DiskGuard(profile.database)
    servers: list[Server] = []
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
            guard.check(boottime())
            broker = Broker(
                profile.database,
                guard,
                lease_s=lease_s,
                keep_dead_s=profile.config.keep_s("dead_letters"),
                keep_ended_s=kept_ended_s(profile.config),
                max_crashes=profile.config.max_crashes,
            )
            broker.look_after(boottime(), put=functools.partial(broker.exchange.put, boottime()))
            with Server(broker.exchange, profile.endpoint, listen=listen, keys=keys) as server:
                servers[:] = [server]
                profile.note_listening(dict(zip(listen, server.endpoints[1:], strict=True)))
                logger.info("epoch %d: serving at %s", broker.exchange.broker_epoch, ", ".join(server.endpoints))
                whereabouts = Whereabouts(profile, lock)
                if not stopping:
                    server.run(each_turn=functools.partial(_turn, broker, server, whereabouts))
            broker.close()
            if not stopping:
                logger.warning("the socket %s was removed: starting again, with a new one", profile.endpoint)
                profile = Profile(profile.path, profile.config)  # where its socket is, was written in that folder
        except (BrokerStoppedError, StoreFullError) as error:
            if broker is not None:
                broker.abandon()
            cause = error.__cause__
            if isinstance(cause, sqlite3.Error) and is_damage(cause):
                raise explain(cause, profile.database) from error
            if isinstance(error, BrokerStoppedError) and not error.full:
                raise
            guard.found_none(boottime())
            logger.error(
                "the disk that holds %s is full: everything is read from it again, and for %.0f s nothing is changed; "
                "free some space",
                profile.database,
                FULL_PAUSE_S,
            )
            time.sleep(STARTING_PAUSE_S)
        except PersistenceError:
            if broker is not None:
                broker.abandon()
            raise
    logger.info("stopped")


def _limit_resources() -> None:
    """Memory is bounded, and there are as many files as may be: two for each client."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or hard > MEMORY_LIMIT_BYTES:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, hard))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m prunus.runtime.broker --profile FOLDER``."""
    parser = argparse.ArgumentParser(prog="prunus-broker")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--lease", type=float, default=LEASE_S, help="seconds of silence after which a peer is gone")
    options = parser.parse_args(arguments)
    logs.configure(options.profile, "broker")
    try:
        profile = Profile.load(options.profile)
        with ServiceLock(profile.lock("broker")) as lock:
            serve(profile, lease_s=options.lease, lock=lock)
    except PrunusError as error:
        logger.critical("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
