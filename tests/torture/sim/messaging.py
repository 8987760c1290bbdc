"""The messaging world: real exchange, store and client cores; peers that send, work, ask and tell; everything may fail.

One seed is one run: who does what, when which fault happens, everything. After the last fault the world is healed,
drained, and looked at (see `check`).
"""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

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
from tests.torture.sim.disk import Disk
from tests.torture.sim.faults import FAILED_COMMITS, Faults
from tests.torture.sim.history import Delivered, History
from tests.torture.sim.nemesis import Profile
from tests.torture.sim.network import Connection, Network
from tests.torture.sim.peers import SimPeer
from tests.torture.sim.timeline import Clock, Node, Timeline

HORIZONS_S = (8.0, 50.0)
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


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is like, apart from its seed."""

    synced: bool = True
    """False: the disk loses commits that the broker was told are there."""
    without: frozenset[str] = frozenset()
    """Faults that do not happen."""
    deeds: int | None = None
    """Only the first so many."""
    special: bool = True
    """Tasks have subjects, times, limits and so on."""
    editing: bool = True
    trace: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run."""

    seed: int
    complaints: list[str]
    counts: dict[str, int]
    checksum: int
    """Of all frames, in their order: the same for the same seed."""
    virtual_s: float
    trace: list[str]


class World(Faults):
    """See the module. `run` once."""

    def __init__(self, seed: int, settings: Settings = Settings()) -> None:
        self.seed, self.settings = seed, settings
        self.profile = Profile.of(seed, without=settings.without, horizons_s=HORIZONS_S)
        self.timeline = Timeline()
        self.chance = random.Random(f"{seed} nemesis")
        self.history = History()
        self.network = Network(self.timeline, self.profile, random.Random(f"{seed} network"))
        self.disk = Disk(random.Random(f"{seed} disk"), synced=settings.synced)
        self.trace: list[str] = []
        self.checksum = 0
        self._unique = 0
        self._lives: dict[str, int] = {}
        self.peers: dict[str, SimPeer] = {}
        self._auditing = random.Random(f"{seed} audit")
        self.broker = BrokerNode(
            self.timeline,
            self.network,
            self.disk,
            random.Random(f"{seed} broker"),
            self._clock(),
            service=lambda node: ledger.Ledger(self.disk.connection, lambda: node.clock.wall(self.timeline.now)),
            complain=self.complain,
        )
        self.broker.watchers.append(self._audit)
        self.auditor = check.Auditor(self.disk, self.history)

    # --- for all who are in it ---

    def complain(self, text: str) -> None:
        self.history.complain(f"{self.timeline.now:9.4f} {text}")
        self.note(f"WRONG: {text}")

    def count(self, what: str) -> None:
        self.history.counts[what] += 1
        self.note(what)

    def note(self, text: str) -> None:
        if self.settings.trace:
            node = self.timeline.node
            self.trace.append(f"{self.timeline.now:9.4f} {node.name if node else '':7} {text}")

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

    def run(self) -> Outcome:
        with virtual_time(self.timeline):
            try:
                self._live()
            except Exception as error:  # of the product (or of the rig): the seed is kept in both cases
                self.complain(f"{type(error).__name__}: {error}")
                if self.settings.trace:
                    raise
            finally:
                self.disk.close()
        counts = {**self.history.counts, **{f"network: {name}": count for name, count in self.network.counts.items()}}
        counts["broker killed"], counts["broker stopped by its disk"] = self.broker.deaths, self.broker.stops
        counts["commits that failed"] = self.disk.failed
        return Outcome(self.seed, self.history.complaints, counts, self.checksum, self.timeline.now, self.trace)

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
        for fault, rate in profile.rates.items():
            self._plan(fault, rate)
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

    def _clock(self) -> Clock:
        clock = Clock(origin_s=self.chance.uniform(0.0, 1e6))
        if "skew" in self.profile:
            clock.rate = self.chance.uniform(0.9, 1.1)
            clock.wall_error_s = self.chance.uniform(-60.0, 60.0)
        return clock

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

    def _plan(self, fault: str, rate: float) -> None:
        """The times at which a fault happens. (Those of frames and commits are looked up there.)"""
        if fault == "failed_commit":
            self.disk.failure_rate = rate * FAILED_COMMITS
        if (happen := getattr(self, f"_fault_{fault}", None)) is None:
            return
        when = self.chance.expovariate(rate)
        while when < self.profile.heal_at_s:
            self.timeline.at(when, None, self._fault, fault, happen)
            when += self.chance.expovariate(rate)

    def _fault(self, name: str, happen: Callable[[], None]) -> None:
        if not self.network.calm:
            self.count(f"fault: {name}")
            happen()

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

    def _heal(self) -> None:
        self.network.heal()
        self.disk.failure_rate = 0.0
        self.broker.armed = None
        for node in (self.broker, *self.peers.values()):
            node.paused_until = min(node.paused_until, self.timeline.now)
            node.clock.wall_error_s = 0.0
        self.note("healed")

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

    def __init__(self, world: World) -> None:
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


@contextmanager
def virtual_time(timeline: Timeline) -> Iterator[None]:
    """All clocks of this process are those of the program in the world that runs now."""
    with (
        mock.patch.object(time, "time", timeline.wall_time),
        mock.patch.object(time, "time_ns", timeline.wall_time_ns),
        mock.patch.object(time, "monotonic", timeline.boottime),
    ):
        yield


def run(seed: int, settings: Settings = Settings()) -> Outcome:
    """One run."""
    return World(seed, settings).run()
