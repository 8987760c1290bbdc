"""The messaging world: real exchange, store and client cores; peers that send, work, ask and tell; everything may fail.

One seed is one run: who does what, when which fault happens, everything. After the last fault the world is healed,
drained, and looked at (see `check`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from prunus.messaging.exchange import Exchange
from prunus.messaging.messages import (
    Hello,
    HelloNeeded,
    Peer,
    TaskDelivery,
    Unwelcome,
    Violation,
    decode_from_broker,
    encode,
)
from tests.torture.sim import check, ledger
from tests.torture.sim.broker_node import BrokerNode
from tests.torture.sim.history import Delivered
from tests.torture.sim.network import Connection
from tests.torture.sim.peers import SimPeer
from tests.torture.sim.timeline import Clock, Node
from tests.torture.sim.world import USUAL, Outcome, Settings, World

DRAIN_S = 150.0
"""By then everything must be over after the last fault: leases, patience and the longest work included."""
QUIET_S = 6.0
"""For so long nothing may happen any more after everything is over."""
DEEDS = (15, 60)
"""What all peers together do in one run."""
TAG_AT, DELIVERY_TAG = 3, encode(TaskDelivery(task="", queue="", key=None, body=b"", epoch=0, attempt=0))[3]
"""Where a frame says which message it is, and what it says then."""
AUDIT_SHARE = 0.2
"""How many commits are followed by a look at the tables."""


class MessagingWorld(World):
    """See the module."""

    horizons_s = (8.0, 50.0)
    rate_error = 0.1
    wall_error_s = 60.0

    def __init__(self, seed: int, settings: Settings) -> None:
        super().__init__(seed, settings)
        self._unique = 0
        self.peers: dict[str, SimPeer] = {}
        self.auditor = check.Auditor(self.disk, self.history)

    def _service(self, node: BrokerNode) -> ledger.Ledger:
        return ledger.Ledger(self.disk.connection, lambda: node.clock.wall(self.timeline.now))

    def _everybody(self) -> Iterable[SimPeer]:
        return self.peers.values()

    # --- for all who are in it ---

    def unique(self, prefix: str) -> str:
        self._unique += 1
        return f"{prefix}{self._unique}"

    def delivered(self, record: Delivered, delivery: TaskDelivery) -> None:
        """A worker got a task."""
        history = self.history
        same = history.delivered.setdefault((record.task, record.epoch), [])
        if same:
            self.complain(f"I3: {record.task} came to {record.session} and {same[0].session} under one epoch")
        same.append(record)
        last = history.last_delivery.get(record.task)
        if last is None or last.epoch < record.epoch:
            history.last_delivery[record.task] = record
        if (end := history.acked.get(record.task)) is not None and end.epoch < record.epoch:
            self.complain(f"I8: {record.task} is delivered after its acknowledged end (attempt {record.attempt})")
        self.count("tasks delivered")
        if record.attempt > 1:
            self.count("redeliveries")
        sent = history.sent.get(record.task)
        if sent is not None:
            check.delivery(self, sent, record, delivery)

    def acked(self, record: Delivered) -> None:
        """The broker accepted the end of a task."""
        if (other := self.history.acked.get(record.task)) is not None:
            self.complain(f"I5: {record.task} ended twice, under {other.epoch} and {record.epoch}")
        record.ending = "acked"
        self.history.acked[record.task] = record
        self.count("tasks done")
        if record.attempt > 1:
            self.count("done after a redelivery")

    def left(self, peer: SimPeer) -> None:
        """It said goodbye; another one comes."""
        if self.peers.get(peer.name) is peer and not peer.dead:
            peer.die()
            del self.peers[peer.name]
            self._bear(peer.name)

    # --- the run ---

    def _live(self) -> None:
        profile, timeline = self.profile, self.timeline
        self.broker.start()
        self._watch_frames()
        number_of_peers = self.chance.randint(2, 5)
        for number in range(number_of_peers):
            self._bear(f"p{number}")
        deeds = self.chance.randint(*DEEDS)
        times = sorted(self.chance.uniform(0.0, profile.heal_at_s) for _ in range(deeds))
        who = [f"p{self.chance.randrange(number_of_peers)}" for _ in range(deeds)]
        for when, name in list(zip(times, who, strict=True))[: self.settings.deeds]:
            timeline.at(when, None, self._deed, name)
        self._plan_faults()
        timeline.run(profile.heal_at_s)
        self._heal()
        for name in self.peers:
            for _ in range(2):
                timeline.at(timeline.now + self.chance.random(), None, self._deed, name)
        heal_at = timeline.now
        timeline.run(heal_at + 5.0)
        check.after_heal(self)
        timeline.run(heal_at + DRAIN_S, self._is_quiet)
        if not self._is_quiet():
            self.complain(f"L1: not quiet {DRAIN_S:g} s after the last fault: {self.describe()}")
        else:
            self.history.counts["seconds to drain"] += round(timeline.now - heal_at)
            delivered = self.history.counts["tasks delivered"]
            timeline.run(timeline.now + QUIET_S)
            if self.history.counts["tasks delivered"] != delivered or not self._is_quiet():
                self.complain(f"L5: it was quiet, and then not: {self.describe()}")
        check.at_the_end(self)

    def _deed(self, name: str) -> None:
        peer = self.peers.get(name)
        if peer is not None and not peer.dead and not peer.leaving:
            self.timeline.at(self.timeline.now, peer, peer.act)

    def _bear(self, name: str) -> None:
        if name in self.peers:
            return
        self._lives[name] = self._lives.get(name, 0) + 1
        self.peers[name] = SimPeer(self, name, self._lives[name], self._clock())

    def _watch_frames(self) -> None:
        receive = self.broker._receive

        def watched(route: int, frame: bytes) -> None:
            self.checksum = zlib.crc32(frame, self.checksum)
            receive(route, frame)

        self.broker._receive = watched  # type: ignore[method-assign]
        self.network.receive = watched
        tell = self.network.tell

        def told(route: int, frame: bytes) -> None:
            self.checksum = zlib.crc32(frame, self.checksum)
            if frame[TAG_AT] == DELIVERY_TAG and isinstance(message := decode_from_broker(frame), TaskDelivery):
                self.history.dispatched.setdefault(message.task, (message.epoch, self.timeline.now))
            tell(route, frame)

        self.network.tell = told  # type: ignore[method-assign]

    def _audit(self, exchange: Exchange[int], failpoint: str) -> None:
        if failpoint == "after_commit" and self._auditing.random() < AUDIT_SHARE:
            self.auditor.look(exchange)

    # --- faults ---

    def _somebody(self) -> SimPeer:
        return self.peers[self.chance.choice(sorted(self.peers))]

    def _fault_partition(self) -> None:
        until = self.timeline.now + self.chance.choice((0.5, 4.0, 12.0, 25.0)) * self.chance.random()
        up, down = self.chance.choice(((True, True), (True, False), (False, True)))
        self.network.cut(self._somebody().name, min(until, self.profile.heal_at_s), up=up, down=down)

    def _fault_kill_peer(self) -> None:
        peer = self._somebody()
        peer.die()
        if "no_proof" not in self.profile:
            self.broker.died(peer.session)
        check.death(self, peer)
        self.timeline.at(self.timeline.now + self.chance.uniform(0.0, 2.0), None, self._bear, peer.name)
        del self.peers[peer.name]
        if not self.peers:
            self._bear(peer.name)

    def _fault_leave(self) -> None:
        peer = self._somebody()
        if not peer.leaving:
            self.timeline.at(self.timeline.now, peer, peer.leave)

    def _fault_pause_peer(self) -> None:
        self._pause(self._somebody())

    def _fault_sleep(self) -> None:
        """Everything stands still, and the clocks run."""
        if any(node.paused_until > self.timeline.now for node in (*self.peers.values(), self.broker)):
            return
        wake_at = min(self.timeline.now + self.chance.choice((5.0, 30.0, 3600.0)), self.profile.heal_at_s)
        for node in (*self.peers.values(), self.broker):
            node.paused_until = wake_at

    def _fault_wall_jump(self) -> None:
        node = self.chance.choice((self.broker, self._somebody()))
        node.clock.wall_error_s = self.chance.uniform(-60.0, 60.0)

    def _fault_rogue(self) -> None:
        """A stranger with a connection of its own."""
        stranger = _Stranger(self)
        known = [peer for peer in self.peers.values() if peer.core.broker_epoch]
        for _ in range(self.chance.randint(1, 15)):
            kind = self.chance.randrange(3 if known else 2)
            if kind == 0:
                frame = self.chance.randbytes(self.chance.randrange(40))
            elif kind == 1:
                frame = encode(Hello(session="rogue", peer=Peer()))
                frame = frame[: self.chance.randrange(len(frame))]
            else:
                stranger.victims.append(self.chance.choice(known))
                frame = encode(Hello(session=stranger.victims[-1].session, peer=Peer(), secret="guessed"))
            self.network.say(stranger.connection, frame)

    # --- the end ---

    def _is_quiet(self) -> bool:
        if self.broker.exchange is None or self.history.results_due:
            return False
        return all(peer.is_idle for peer in self.peers.values()) and self.auditor.is_empty()

    def describe(self) -> str:
        peers = "; ".join(peer.describe() for peer in self.peers.values() if not peer.is_idle)
        results = list(self.history.results_due)
        return f"peers: {peers or 'idle'}; results due: {results}; in the store: {self.auditor.left()}"


class _Stranger:
    """It never says anything that gives it a right to be welcome."""

    def __init__(self, world: MessagingWorld) -> None:
        self.world = world
        self.victims: list[SimPeer] = []
        """Those for whom it said that it speaks."""
        self.node = Node("rogue", Clock())
        self.connection = world.network.open(self)

    def received(self, connection: Connection, frame: bytes) -> None:
        if any(victim.leaving for victim in self.victims):
            return  # a name that was given up is free
        if not isinstance(decode_from_broker(frame), Violation | Unwelcome | HelloNeeded):
            self.world.complain(f"I14: a stranger is told {decode_from_broker(frame)}")

    def broken(self, connection: Connection) -> None:
        pass


def run(seed: int, settings: Settings = USUAL) -> Outcome:
    """One run."""
    return MessagingWorld(seed, settings).run()
