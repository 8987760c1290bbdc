"""The faults that happen in the same way in every simulated world: to connections, to the broker, to a node's time."""

from __future__ import annotations

import random

from tests.torture.sim.broker_node import BrokerNode
from tests.torture.sim.nemesis import Profile
from tests.torture.sim.network import Network
from tests.torture.sim.timeline import Node, Timeline

LONG_PAUSE_S = 40.0
"""The longest SIGSTOP: longer than a lease."""
FAILED_COMMITS = 0.2
"""A fault that happens so often per second is one of so many commits."""


class Faults:
    """A world's faults, by the names that `nemesis.Fault` has for them."""

    timeline: Timeline
    network: Network
    broker: BrokerNode
    profile: Profile
    chance: random.Random

    def _fault_reset(self) -> None:
        connections = [one for one in self.network.connections.values() if one.is_open]
        if connections:
            self.network.reset(self.chance.choice(connections))

    def _fault_pause_broker(self) -> None:
        if self.broker.exchange is not None:
            self._pause(self.broker)

    def _pause(self, node: Node) -> None:
        length = self.chance.choice((1.0, 8.0, LONG_PAUSE_S)) * self.chance.random()
        node.paused_until = max(node.paused_until, min(self.timeline.now + length, self.profile.heal_at_s))

    def _fault_kill_broker(self) -> None:
        self.broker.kill()

    def _fault_failpoint(self) -> None:
        self.broker.armed = self.chance.choice(("before_commit", "after_commit", "after_send"))
