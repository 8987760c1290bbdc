"""Connections between peers and the broker that lose, delay and repeat what real ones do, and nothing else.

Within one connection frames arrive in order, as over a socket. What a connection may do:

- break: what was on the way, in both directions, is lost; the peer hears of it a little later, and what it says until
  then may arrive, after the hole;
- be cut off for a time, in one direction or both: what is said meanwhile arrives afterwards;
- be closed by its peer while frames are under way: they may arrive late, after those of the peer's next connection;
- repeat a frame.

While the broker is down, frames wait at the peer, and go out when it is up again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

from prunus.errors import ProtocolError
from prunus.messaging.messages import (
    BroadcastDelivery,
    BroadcastSend,
    Hello,
    Missed,
    decode_from_broker,
    decode_from_client,
)
from tests.torture.sim.nemesis import Profile
from tests.torture.sim.timeline import Node, Timeline

USUAL_DELAY_S = 0.0005
SLOW_DELAY_S = 2.0
"""The longest delay of a slow frame."""
NOTICE_S = 0.2
"""How long it takes at most until a peer notices that its connection broke."""

STUCK_S = 2.0


class Endpoint(Protocol):
    """A peer, for the network."""

    @property
    def node(self) -> Node: ...
    def received(self, connection: Connection, frame: bytes) -> None: ...
    def broken(self, connection: Connection) -> None: ...


class Connection:
    """One connection of a peer. `route` is what the broker calls it."""

    def __init__(self, route: int, endpoint: Endpoint) -> None:
        self.route, self.endpoint = route, endpoint
        self.is_open = True
        self.doomed = False
        """It broke; the peer does not know it yet."""
        self.generation = 0
        self.up_at = self.down_at = 0.0
        """When the last frame to the broker arrives, and the last one from it."""
        self.waiting: list[bytes] = []
        """Said while there was no broker."""


class Network:
    """See the module. `receive` is the broker's; None while it is down."""

    def __init__(self, timeline: Timeline, profile: Profile, chance: random.Random) -> None:
        self._timeline, self._profile, self._chance = timeline, profile, chance
        self._routes = 0
        self.connections: dict[int, Connection] = {}
        self.broker: Node | None = None
        self.receive: Callable[[int, bytes], None] | None = None
        self.dropped: Callable[[int], None] = lambda route: None
        self.cut_up: dict[str, float] = {}
        self.cut_down: dict[str, float] = {}
        """Until when nothing comes from a peer to the broker, and the other way."""
        self.calm = False
        self.checksum = 0
        self.counts = dict.fromkeys(("frames", "lost", "late", "duplicated", "cut", "resets"), 0)

    # --- for peers ---

    def open(self, endpoint: Endpoint) -> Connection:
        self._routes += 1
        connection = self.connections[self._routes] = Connection(self._routes, endpoint)
        return connection

    def close(self, connection: Connection) -> None:
        """The broker notices it after what was on the way."""
        if not connection.is_open:
            return
        connection.is_open = False
        if connection.waiting or not self._lets_late():
            connection.waiting.clear()
            connection.generation += 1
        arrival = self._arrival(connection.up_at, self.cut_up.get(connection.endpoint.node.name, 0.0))
        self._timeline.at(arrival, self.broker, self._dropped, connection)

    def say(self, connection: Connection, frame: bytes) -> None:
        """From the peer to the broker."""
        if not connection.is_open:
            return
        if connection.doomed:  # it broke, and nobody here has noticed: nothing comes behind what was lost
            self.counts["lost"] += 1
            return
        if self.receive is None:
            connection.waiting.append(frame)
            return
        connection.up_at = self._arrival(connection.up_at, self.cut_up.get(connection.endpoint.node.name, 0.0))
        for _ in range(self._copies(frame, from_client=True)):
            self._timeline.at(connection.up_at, self.broker, self._arrive, connection, connection.generation, frame)

    # --- for the broker ---

    def tell(self, route: int, frame: bytes) -> None:
        """From the broker to a peer."""
        connection = self.connections.get(route)
        if connection is None or not connection.is_open or connection.doomed:
            self.counts["lost"] += 1
            return
        node = connection.endpoint.node
        connection.down_at = self._arrival(connection.down_at, self.cut_down.get(node.name, 0.0))
        for _ in range(self._copies(frame, from_client=False)):
            self._timeline.at(connection.down_at, node, self._reach, connection, connection.generation, frame)

    def is_stuck(self, route: int) -> bool:
        """Whether the peer reads so little that its queues are full: it is stopped, and will be for a while."""
        connection = self.connections.get(route)
        return connection is not None and connection.endpoint.node.paused_until > self._timeline.now + STUCK_S

    def broker_down(self) -> None:
        self.receive = None
        for connection in list(self.connections.values()):
            connection.generation += 1  # what was on its way to this broker does not reach the next one
            self.reset(connection)

    def broker_up(self, receive: Callable[[int, bytes], None]) -> None:
        self.receive = receive
        for connection in list(self.connections.values()):
            waiting, connection.waiting = connection.waiting, []
            for frame in waiting if connection.is_open else ():
                self.say(connection, frame)

    # --- for the nemesis ---

    def reset(self, connection: Connection) -> None:
        """It breaks."""
        if connection.doomed or not connection.is_open:
            return
        self.counts["resets"] += 1
        connection.doomed = True
        connection.generation += 1
        node = connection.endpoint.node
        notice = self._timeline.now + self._chance.uniform(0.001, NOTICE_S)
        self._timeline.at(max(notice, self.cut_down.get(node.name, 0.0)), node, self._notice, connection)
        if self.receive is not None and self._chance.random() < 0.5:
            self._timeline.at(notice, self.broker, self._dropped, connection)

    def cut(self, name: str, until: float, *, up: bool, down: bool) -> None:
        """A partition."""
        self.counts["cut"] += 1
        if up:
            self.cut_up[name] = until
        if down:
            self.cut_down[name] = until

    def heal(self) -> None:
        self.calm = True
        self.cut_up.clear()
        self.cut_down.clear()

    # --- inside ---

    def _lets_late(self) -> bool:
        late = not self.calm and "late" in self._profile and self._chance.random() < 0.5
        self.counts["late"] += late
        return late

    def _arrival(self, last: float, cut_until: float) -> float:
        delay = USUAL_DELAY_S * self._chance.random()
        if not self.calm and self._chance.random() < self._profile.rates.get("slow", 0.0):
            delay = SLOW_DELAY_S * self._chance.random() ** 3
        return max(last, self._timeline.now + delay, cut_until)

    def _copies(self, frame: bytes, *, from_client: bool) -> int:
        if self.calm or self._chance.random() >= self._profile.rates.get("duplicate", 0.0):
            return 1
        try:
            message = decode_from_client(frame) if from_client else decode_from_broker(frame)
        except ProtocolError:
            return 1
        if isinstance(message, Hello | BroadcastSend | BroadcastDelivery | Missed):
            return 1  # (no socket repeats anything; of all but these the protocol says that it would be harmless)
        self.counts["duplicated"] += 1
        return 2

    def _arrive(self, connection: Connection, generation: int, frame: bytes) -> None:
        if self.receive is None or connection.generation != generation:
            self.counts["lost"] += 1
            return
        self.counts["frames"] += 1
        self.receive(connection.route, frame)

    def _reach(self, connection: Connection, generation: int, frame: bytes) -> None:
        if connection.generation != generation or not connection.is_open:
            self.counts["lost"] += 1
            return
        self.counts["frames"] += 1
        connection.endpoint.received(connection, frame)

    def _notice(self, connection: Connection) -> None:
        if connection.is_open:
            connection.endpoint.broken(connection)

    def _dropped(self, connection: Connection) -> None:
        if not connection.is_open:
            self.connections.pop(connection.route, None)
        if self.receive is not None:
            self.dropped(connection.route)
