"""The broker's turns: hear what came through its doors, do it in one commit, say what follows, look after the rest.

A door is a way in (`doors`): `unix` for this host, `zeromq` for the network. The connections of peers that came through
them are the routes of the exchange.

Rules
- A send never waits: one peer that does not read must not stop the others. What a peer has not taken waits here, to a
  bound. A peer that is stuck is told apart (`Server.is_stuck`): questions to it are refused, broadcasts dropped and
  counted. When its bound is reached all the same, its connection is closed and all is said again when it comes back.
- A send proves nothing: what matters is confirmed end to end.
- A lost connection does not end a session. Only its lease, or the kernel's word that its process died, does.
- What the dead and the silent said last is heard before they are taken for dead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import selectors
import socket
import sys
from collections.abc import Callable, Sequence

from prunus.errors import ProfileError
from prunus.files import private_folder
from prunus.messaging.access import Principal
from prunus.messaging.doors import Connection, Door, woken
from prunus.messaging.exchange import Exchange, NewTask
from prunus.messaging.keys import Keyring, check_place
from prunus.messaging.liveness import Obituaries, boottime
from prunus.messaging.messages import Peer
from prunus.messaging.unix import UnixDoor, socket_path

STUCK_FRAMES = 1000
"""A peer is stuck if more of our frames wait for it ..."""
STUCK_BYTES = 8 * 1024 * 1024
"""... or more of our bytes."""
MAX_BACKLOG_FRAMES = 10_000
"""With more frames waiting its connection is closed ..."""
MAX_BACKLOG_BYTES = 64 * 1024 * 1024
"""... or with more bytes ..."""
MAX_ALL_BACKLOGS_BYTES = 256 * 1024 * 1024
"""... or if it has the most of so many that wait for all peers together. From half of it on all that wait are stuck."""
NO_REST_S = 1.0
"""A broker to which more comes all the while than it can do looks after the dead and the silent at least so often:
everybody had his turn by then."""
WATCHFUL_S = 0.0003
"""While things come within so long of each other the broker looks for the next one instead of sleeping, for as long:
to sleep and be woken takes about that time, and who waits for an answer waits for it twice ..."""
BRISK = 3
"""... after so many in a row; and only where another processor is there for whoever it waits for."""
MAX_CONNECTIONS = 5000
"""More are refused; fewer if the process may not open so many files."""
RESERVED_FILES = 200
"""Files that the broker needs beside two for each connection."""

logger = logging.getLogger(__name__)


class Server:
    """An exchange behind its doors, in the thread that calls `run`. A context manager."""

    def __init__(
        self,
        exchange: Exchange[Connection],
        endpoint: str,
        *,
        listen: Sequence[str] = (),
        keys: Keyring | None = None,
    ) -> None:
        """Be at `endpoint` (``ipc://``), and at `listen` (``tcp://ADDRESS:PORT``) for those who hold one of the `keys`.

        Raises `ProfileError` if a path, its folder or a port can't be used, and for `listen` without `keys`.
        """
        path = socket_path(endpoint)
        private_folder(path.parent, parents=True)
        for place in listen:
            check_place(place)
        if listen and keys is None:
            raise ProfileError(
                f"without keys nobody listens on a network, and so not at {listen[0]}; "
                "make some with: prunus key add NAME --role worker|controller|viewer"
            )
        self.endpoint = endpoint
        self._exchange, self._keys = exchange, keys
        self._selector = selectors.DefaultSelector()
        self._obituaries, self._dead = Obituaries(), list[str]()
        self._has_somebody_died = False
        self._rested_at = boottime()
        """When all that had come was heard."""
        self._brisk = 0
        """How many things in a row came soon after the broker had done all."""
        self._may_watch = len(os.sched_getaffinity(0)) > 1 if hasattr(os, "sched_getaffinity") else False
        exchange.on_session = self._on_session
        exchange.principal_of = _principal_of
        exchange.is_stuck = self.is_stuck
        for session, peer in exchange.sessions().items():
            self._obituaries.watch(session, peer)
        self._waiting: dict[Connection, int] = {}
        """The bytes that wait, of those of which some do."""
        self._waiting_bytes = 0
        self._stop = self._is_closed = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        max_connections = max(1, min(MAX_CONNECTIONS, (_max_files() - RESERVED_FILES) // 2))
        self._doors: list[Door] = []
        try:
            self._doors.append(UnixDoor(path, max_connections))
            if listen and keys is not None:
                from prunus.messaging.zeromq import NetworkDoor

                self._doors.append(NetworkDoor(listen, keys, max_connections))
        except BaseException:
            self.close()
            raise
        for door in self._doors:
            door.on_refused = self._refused
            door.watch(self._selector)
        self._selector.register(self._wake_read, selectors.EVENT_READ, woken)
        if (deaths := self._obituaries.fileno()) is not None:
            self._selector.register(deaths, selectors.EVENT_READ, self._somebody_died)

    @property
    def endpoints(self) -> list[str]:
        """Where it listens, with the ports that the system chose."""
        return [endpoint for door in self._doors for endpoint in door.endpoints]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def put(self, tasks: Sequence[NewTask]) -> None:
        """Store tasks of the broker's own making, and deliver them. In the thread of `run` only."""
        now = boottime()
        self._send(now, self._exchange.put(now, tasks))

    def is_stuck(self, connection: Connection) -> bool:
        """Whether so much waits for this peer that it should get no more of what can be refused or dropped."""
        return connection in self._waiting and (
            connection.waiting_bytes > STUCK_BYTES
            or connection.waiting_frames > STUCK_FRAMES
            or self._waiting_bytes > MAX_ALL_BACKLOGS_BYTES // 2
        )

    def stop(self) -> None:
        """Have `run` return. Thread-safe, and safe in a signal handler."""
        self._stop = True
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    def run(self, each_turn: Callable[[float], None] = lambda now: None) -> None:
        """Serve until `stop`. Raises `BrokerStoppedError`: then this process must end and start again.

        `each_turn` is called at least once a second, between two batches, with the time (`liveness.boottime`).
        """
        while not self._stop:
            for key, events in self._select():
                key.data(events)
            if self._has_somebody_died or self._obituaries.has_news:
                self._has_somebody_died = False
                self._dead += self._obituaries.dead()
            if self._keys is not None and self._keys.changed():
                self._apply_keys(self._keys)
            drained = self.serve_batch()
            now = boottime()
            if drained or now >= self._rested_at + NO_REST_S:
                self._rested_at = now
                if self._dead:
                    dead, self._dead = self._dead, []
                    self._send(now, self._exchange.expire(now, dead))
                if now >= self._exchange.due():
                    self._send(now, self._exchange.tick(now))
            for door in self._doors:
                for connection in door.writable:
                    self._flush(connection, now)
                door.writable.clear()
                if now >= door.due():
                    door.look(now)
            for connection in [one for one in self._waiting if one.retry_at <= now]:
                self._flush(connection, now)
            each_turn(now)

    def serve_batch(self) -> bool:
        """Deal with what came, in one commit; whether that was all."""
        frames: list[tuple[Connection, bytes]] = []
        drained = True
        for door in self._doors:
            drained = door.receive(frames) and drained
        if frames:
            now = boottime()
            self._send(now, self._exchange.process(now, frames))
        for door in self._doors:
            for connection in door.departed():
                self._forget(connection)
        return drained

    def close(self) -> None:
        """Close the sockets (the file of the local one goes too). Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._exchange.on_session = lambda session, peer: None
        for door in self._doors:
            door.close()
        self._selector.close()
        self._obituaries.close()
        self._wake_read.close()
        self._wake_write.close()

    # --- inside: what comes ---

    def _somebody_died(self, events: int) -> None:
        self._has_somebody_died = True

    def _on_session(self, session: str, peer: Peer | None) -> None:
        if peer is None:
            self._obituaries.forget(session)
        else:
            self._obituaries.watch(session, peer)

    def _select(self) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait until something can be done."""
        begun = boottime()
        patience_s = self._patience_s(begun)
        ready: list[tuple[selectors.SelectorKey, int]] = []
        if self._brisk >= BRISK and patience_s > WATCHFUL_S:
            while not ready and boottime() < begun + WATCHFUL_S:
                ready = self._selector.select(0)
        ready = ready or self._selector.select(patience_s)
        came_soon = bool(ready) and boottime() < begun + WATCHFUL_S
        self._brisk = self._brisk + 1 if came_soon and self._may_watch else 0
        return ready

    def _patience_s(self, now: float) -> float:
        if self._obituaries.has_news or any(door.has_news() for door in self._doors):
            return 0.0
        due = min(self._exchange.due(), *(door.due() for door in self._doors))
        if self._waiting:
            due = min(due, min(connection.retry_at for connection in self._waiting))
        return max(0.0, due - now)

    def _refused(self) -> None:
        self._exchange.refused_connections += 1

    def _apply_keys(self, keys: Keyring) -> None:
        """The keys are others than before: who came with one that is gone has to leave, and is gone."""
        if keys.problem is not None:
            logger.error("nobody may come over the network: %s", keys.problem)
        known = keys.principals()
        dead = [
            session
            for session, principal in self._exchange.principals().items()
            if principal.key is not None and principal not in known
        ]
        for door in self._doors:
            for connection in door.revoked():
                logger.warning("%s is not what it was: its connection is closed", connection.principal)
                self._close(connection)
        if dead:
            now = boottime()
            self._send(now, self._exchange.expire(now, sorted(dead)))

    # --- inside: what goes ---

    def _send(self, now: float, sends: Sequence[tuple[Connection, bytes]]) -> None:
        if not sends:
            return
        for connection, frame in sends:
            connection.add(frame)
        for connection in dict.fromkeys(connection for connection, _ in sends):
            self._flush(connection, now)
        self._exchange.failpoint("after_send")

    def _flush(self, connection: Connection, now: float) -> None:
        """Send what waits for it, and close its connection if it is too much that stays."""
        connection.flush(now)
        if not connection.waiting_frames:
            self._waiting_bytes -= self._waiting.pop(connection, 0)
            return
        left = connection.waiting_bytes
        self._waiting_bytes += left - self._waiting.get(connection, 0)
        self._waiting[connection] = left
        if connection.waiting_frames > MAX_BACKLOG_FRAMES or left > MAX_BACKLOG_BYTES:
            logger.warning("a peer does not read; its connection is closed, and all is said again when it is back")
            self._close(connection)
        elif self._waiting_bytes > MAX_ALL_BACKLOGS_BYTES:
            logger.warning("many peers do not read; the connection of the one with the most to read is closed")
            self._close(max(self._waiting, key=lambda one: one.waiting_bytes))

    def _forget(self, connection: Connection) -> None:
        """It is gone; its session is not."""
        connection.door.forget(connection)
        self._waiting_bytes -= self._waiting.pop(connection, 0)
        self._exchange.drop_route(connection)

    def _close(self, connection: Connection) -> None:
        """Hang up, and so free what is kept for it."""
        connection.door.hang_up(connection)
        self._forget(connection)


def _principal_of(connection: Connection) -> Principal:
    return connection.principal


def _max_files() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit if limit != resource.RLIM_INFINITY else sys.maxsize
