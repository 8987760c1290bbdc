"""A broker without a network: the same core, exchange and client core, in one event loop.

For tests and scripts. Messages are encoded and decoded, commits happen before sends, and restarts and deaths can be
played; only sockets and processes are missing.

::

    broker = LocalBroker()
    async with await broker.connect() as communicator:
        await communicator.task_send(b"...")
    broker.close()
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sqlite3
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from prunus.errors import CommunicatorClosedError
from prunus.messaging.blobs import BlobStore
from prunus.messaging.communicator import CONNECT_TIMEOUT_S
from prunus.messaging.exchange import Exchange, NewTask, Service
from prunus.messaging.handover import running_loop
from prunus.messaging.liveness import boottime
from prunus.messaging.peer import PeerCommunicator


class LocalBroker:
    """See the module. It lives in the loop of its first `connect`; `connection` is used in that thread only."""

    def __init__(
        self,
        connection: sqlite3.Connection | None = None,
        service: Service | None = None,
        failpoint: Callable[[str], None] = lambda name: None,
        blobs: Path | None = None,
    ) -> None:
        """Without a `connection` everything is kept in memory, but blobs: they are files in the folder `blobs`, or
        without one in a temporary folder."""
        self._own = connection is None
        self._connection = connection or sqlite3.connect(":memory:", isolation_level=None)
        self._service = service
        self._failpoint = failpoint
        self._blobs = blobs or Path(tempfile.gettempdir(), f"prunus-{secrets.token_hex(16)}")
        self._remove_blobs = None if blobs else weakref.finalize(self, shutil.rmtree, self._blobs, ignore_errors=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._peers: dict[int, LocalCommunicator] = {}
        self._inbox: list[tuple[int, bytes]] = []
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._routes = 0
        self._closed = False
        self.exchange = self._start()

    async def connect(self, name: str = "local") -> LocalCommunicator:
        """A new peer."""
        if self._closed:
            raise CommunicatorClosedError
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.get_running_loop()
            self._tick()
        communicator = LocalCommunicator(self, self._loop, name)
        await communicator.connected(CONNECT_TIMEOUT_S)
        return communicator

    def put(self, *tasks: NewTask) -> None:
        """Store tasks of the broker's own making."""
        self._deliver(self.exchange.put(boottime(), tasks))

    def tick(self) -> None:
        """Look at the clocks now. Else it happens in time, or within a second if that of the service jumps."""
        self._deliver(self.exchange.tick(boottime()))
        self.exchange.sweep_blobs(boottime())

    def restart(self) -> None:
        """As after a SIGKILL of the broker: what was not committed is gone, and every connection breaks."""
        self._inbox.clear()
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self.exchange = self._start()
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            peer.broken()
        self._deliver([])

    def kill(self, communicator: PeerCommunicator) -> None:
        """As a SIGKILL of the peer's process: it says nothing more, and the broker has the proof that it is dead."""
        assert isinstance(communicator, LocalCommunicator), "only a local communicator can be killed here"
        communicator.die()
        for route in [route for route, peer in self._peers.items() if peer is communicator]:
            del self._peers[route]
            self._inbox = [(sender, frame) for sender, frame in self._inbox if sender != route]
            self.exchange.drop_route(route)
        self.expire(communicator.session)

    def expire(self, session: str) -> None:
        """As when its lease ran out: a peer that may live is taken for dead."""
        self._deliver(self.exchange.expire(boottime(), [session]))

    def close(self) -> None:
        """Peers that are still connected find nobody any more. Idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._peers.clear()
        if self._own:
            self._connection.close()
        if self._remove_blobs is not None:
            self._remove_blobs()

    # --- for the communicators, in the loop ---

    def open_route(self, peer: LocalCommunicator) -> int:
        """A new connection; whatever was on the way on its old one is lost."""
        self.close_route(peer)
        self._routes += 1
        self._peers[self._routes] = peer
        return self._routes

    def close_route(self, peer: LocalCommunicator) -> None:
        for route in [route for route, other in self._peers.items() if other is peer]:
            del self._peers[route]
            self.exchange.drop_route(route)

    def receive(self, route: int, frame: bytes) -> None:
        """A frame came; it is dealt with together with the others of this turn of the loop."""
        self._inbox.append((route, frame))
        if not self._scheduled and self._loop is not None:
            self._scheduled = True
            self._loop.call_soon(self._work)

    # --- inside ---

    def _start(self) -> Exchange[int]:
        now = boottime()
        blobs = BlobStore(self._blobs, now)
        return Exchange(self._connection, service=self._service, blobs=blobs, now=now, failpoint=self._failpoint)

    def _work(self) -> None:
        self._scheduled = False
        if self._closed:
            return
        frames, self._inbox = self._inbox, []
        self._deliver(self.exchange.process(boottime(), frames))

    def _tick(self) -> None:
        if self._closed or self._loop is None:
            return
        self.tick()
        self._timer = self._loop.call_later(max(0.0, self.exchange.due() - boottime()), self._tick)

    def _deliver(self, sends: list[tuple[int, bytes]]) -> None:
        for route, frame in sends:
            if (peer := self._peers.get(route)) is not None:
                peer.receive(frame)
        if sends:
            self.exchange.failpoint("after_send")
        if self._timer is not None and self._loop is not None and self.exchange.due() < self._timer.when():
            self._timer.cancel()
            self._timer = self._loop.call_later(max(0.0, self.exchange.due() - boottime()), self._tick)


class LocalCommunicator(PeerCommunicator):
    """A peer of a `LocalBroker`. Its core runs in the broker's loop; it can be used from any other loop too."""

    def __init__(self, broker: LocalBroker, loop: asyncio.AbstractEventLoop, name: str) -> None:
        super().__init__("local", name)
        self._broker = broker
        self._loop = loop
        self._route = broker.open_route(self)
        self._frames: list[bytes] = []
        self._awake = False
        self._break: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._core.connect(boottime())
        self._wake()

    def receive(self, frame: bytes) -> None:
        """A frame from the broker."""
        self._frames.append(frame)
        self._wake()

    def broken(self) -> None:
        """The connection is gone."""
        self._frames.clear()
        self._break = "the broker restarted"
        self._wake()

    def die(self) -> None:
        """Say nothing more, to the broker or to anybody."""
        self._frames.clear()
        self._finish()

    def _wake(self, *, at_once: bool = False) -> bool:
        if self._loop.is_closed():
            return False
        if not self._awake:
            self._awake = True
            here = running_loop() is self._loop
            (self._loop.call_soon if here else self._loop.call_soon_threadsafe)(self._pump)
        return True

    def _pump(self) -> None:
        self._awake = False
        frames, self._frames = self._frames, []
        broken, self._break = self._break, None
        broken = self._step(boottime(), frames) or broken
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._finished:
            self._broker.close_route(self)
            return
        if broken is not None:
            self._route = self._broker.open_route(self)
            self._core.connect(boottime())
        for frame in self._core.take():
            self._broker.receive(self._route, frame)
        self._timer = self._loop.call_later(max(0.0, self._due() - boottime()), self._wake)
