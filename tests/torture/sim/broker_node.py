"""The broker of a world: the real exchange over the simulated disk, started again whenever it dies."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable

from prunus.messaging.exchange import BrokerStoppedError, Exchange, Service
from prunus.messaging.messages import Peer
from tests.torture.sim import check
from tests.torture.sim.disk import Disk
from tests.torture.sim.network import Network
from tests.torture.sim.timeline import Clock, Node, Timeline

BATCH_S = 0.002
"""Frames that come within this are dealt with together."""
RESTART_S = (0.05, 3.0)
"""How long a supervisor takes to start a dead broker again."""
PROOF_S = 0.01
"""How long it takes until the kernel's word that a process died is heard."""
MAX_BATCH = 256


class Killed(BaseException):
    """SIGKILL, from inside."""


class BrokerNode(Node):
    """See the module."""

    def __init__(
        self,
        timeline: Timeline,
        network: Network,
        disk: Disk,
        chance: random.Random,
        clock: Clock,
        *,
        service: Callable[[BrokerNode], Service | None] = lambda node: None,
        complain: Callable[[str], None],
    ) -> None:
        """`service` makes the service behind each new exchange."""
        super().__init__("broker", clock)
        self.timeline, self.network, self.disk, self._chance = timeline, network, disk, chance
        self._make_service = service
        self._complain = complain
        self.exchange: Exchange[int] | None = None
        self.epochs: list[int] = []
        """The broker epoch of each start."""
        self.armed: str | None = None
        """The failpoint at which it dies next."""
        self.dead_sessions: dict[str, None] = {}
        """Those whose death can be proved."""
        self.watchers: list[Callable[[Exchange[int], str], None]] = []
        """Called at each failpoint."""
        self.deaths = self.stops = 0
        self._inbox: list[tuple[int, bytes]] = []
        self._is_due = False
        self._timer = 0
        self._life = 0
        network.broker = self
        network.dropped = self._dropped

    # --- life and death ---

    def start(self) -> None:
        if self.exchange is not None:
            return
        self._life += 1
        now = self.clock.boottime(self.timeline.now)
        try:
            self.exchange = Exchange(
                self.disk.connection,
                service=self._make_service(self),
                now=now,
                wall_clock=lambda: self.clock.wall(self.timeline.now),
                failpoint=self._failpoint,
                on_session=self._on_session,
            )
        except (BrokerStoppedError, sqlite3.Error):  # (the tables of the service are made before there is an exchange)
            self.stops += 1
            self.disk.crash()
            self._start_later()
            return
        self.exchange.is_stuck = self.network.is_stuck
        self.epochs.append(self.exchange.broker_epoch)
        for session in self.exchange.sessions():
            self._on_session(session, Peer())
        self.network.broker_up(self._receive)
        self._set_timer()

    def kill(self) -> None:
        """SIGKILL; it is started again a little later."""
        if self.exchange is not None:
            self.deaths += 1
            self._die()

    def died(self, session: str) -> None:
        """The process of `session` ended, and that can be proved."""
        self.dead_sessions[session] = None
        self._prove(session)

    def _die(self) -> None:
        self.exchange = None
        self.armed = None
        self._inbox.clear()
        self._is_due = False
        self.paused_until = 0.0
        self.disk.crash()
        self.network.broker_down()
        self._start_later()

    def _start_later(self) -> None:
        delay = self._chance.uniform(*RESTART_S) if not self.network.calm else RESTART_S[0]
        self.timeline.at(self.timeline.now + delay, None, self.start)

    # --- work ---

    def _receive(self, route: int, frame: bytes) -> None:
        self._inbox.append((route, frame))
        if not self._is_due:
            self._is_due = True
            self._later(self.timeline.now + BATCH_S * self._chance.random(), self._work)

    def _work(self) -> None:
        self._is_due = False
        while self._inbox and self.exchange is not None:
            frames, self._inbox = self._inbox[:MAX_BATCH], self._inbox[MAX_BATCH:]
            self._do(lambda exchange, now: exchange.process(now, frames))  # noqa: B023 (it is called at once)

    def _tick(self, timer: int) -> None:
        if timer != self._timer or self.exchange is None:
            return
        self._work()  # what the silent said last is heard first
        self._do(lambda exchange, now: exchange.tick(now))

    def _prove(self, session: str) -> None:
        def expire() -> None:
            self._work()
            self._do(lambda exchange, now: exchange.expire(now, [session]))

        self._later(self.timeline.now + PROOF_S * self._chance.random(), expire)

    def _on_session(self, session: str, peer: Peer | None) -> None:
        if peer is not None and session in self.dead_sessions:
            self._prove(session)

    def _do(self, work: Callable[[Exchange[int], float], list[tuple[int, bytes]]]) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        try:
            sends = work(exchange, self.clock.boottime(self.timeline.now))
            if sends and (complaint := check.release(self.disk)) is not None:
                self._complain(complaint)
            cut = self._chance.randrange(len(sends)) if self.armed == "after_send" and sends else len(sends)
            for route, frame in sends[:cut]:
                self.network.tell(route, frame)
            if sends:
                self._failpoint("after_send")
        except Killed:
            self.kill()
            return
        except BrokerStoppedError:
            self.stops += 1
            self._die()
            return
        except Exception as error:  # whatever comes in, the broker goes on: this one is a finding
            self._complain(f"the broker raised {error!r}")
            raise
        self._set_timer()

    def _failpoint(self, name: str) -> None:
        if self.exchange is None:
            return  # it is just being made
        for watch in self.watchers:
            watch(self.exchange, name)
        if self.armed == name:
            raise Killed

    def _dropped(self, route: int) -> None:
        if self.exchange is not None:
            self.exchange.drop_route(route)

    def _set_timer(self) -> None:
        if self.exchange is not None:
            self._timer += 1
            due = self.clock.world_time(self.exchange.due())
            self._later(max(due, self.timeline.now + 0.001), self._tick, self._timer)

    def _later(self, when: float, action: Callable[..., object], *arguments: object) -> None:
        life = self._life

        def act() -> None:
            if life == self._life:
                action(*arguments)

        # What was there before a stop is done before: so time passes only after the frames that waited.
        self.timeline.at(when, self, lambda: self.timeline.at(self.timeline.now, self, act))
