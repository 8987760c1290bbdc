"""What all simulated worlds have: a timeline, a network, a disk and a broker, in which everything may fail.

One seed is one run: who does what, when which fault happens, everything. A world says who lives in it and what they do
(`_live`, which ends with a look at what came of it), and which faults are its own (``_fault_NAME``, by the names of
`nemesis.Fault`).
"""

from __future__ import annotations

import contextlib
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

from prunus.messaging import broker
from prunus.messaging.exchange import Exchange, Service
from tests.torture.sim.broker_node import BrokerNode
from tests.torture.sim.disk import Disk
from tests.torture.sim.history import History
from tests.torture.sim.nemesis import Profile
from tests.torture.sim.network import Network
from tests.torture.sim.timeline import Clock, Node, Timeline

LONG_PAUSE_S = 40.0
"""The longest SIGSTOP: longer than a lease."""
RESULTS_KEPT_S = 60.0
"""So long results are kept for those who are silent here: longer than any silence but a sleep."""
FAILED_COMMITS = 0.2
"""A fault that happens so often per second is one of so many commits."""


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


USUAL = Settings()


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


class World(ABC):
    """See the module. `run` once."""

    horizons_s: ClassVar[tuple[float, float]]
    """When the last fault happens: between these."""
    never: ClassVar[frozenset[str]] = frozenset()
    """Faults that this world does not know."""
    rate_error: ClassVar[float]
    """How much faster or slower than time a skewed clock goes at most ..."""
    wall_error_s: ClassVar[float]
    """... and how wrong it is at most."""

    def __init__(self, seed: int, settings: Settings) -> None:
        self.seed, self.settings = seed, settings
        self.profile = Profile.of(seed, without=settings.without | self.never, horizons_s=self.horizons_s)
        self.timeline = Timeline()
        self.chance = random.Random(f"{seed} nemesis")
        self.history = History()
        self.network = Network(self.timeline, self.profile, random.Random(f"{seed} network"))
        self.disk = Disk(random.Random(f"{seed} disk"), synced=settings.synced)
        self.trace: list[str] = []
        self.checksum = 0
        self._lives: dict[str, int] = {}
        """How many of each name there were."""
        self._auditing = random.Random(f"{seed} audit")
        self.broker = BrokerNode(
            self.timeline,
            self.network,
            self.disk,
            random.Random(f"{seed} broker"),
            self._clock(),
            service=self._service,
            complain=self.complain,
        )
        self.broker.watchers.append(self._audit)

    @abstractmethod
    def _service(self, node: BrokerNode) -> Service:
        """What is kept behind the broker, anew after each of its starts."""

    @abstractmethod
    def _everybody(self) -> Iterable[Node]:
        """All nodes but the broker."""

    @abstractmethod
    def _audit(self, exchange: Exchange[int], failpoint: str) -> None:
        """The broker comes by a failpoint: what must always hold."""

    @abstractmethod
    def _live(self) -> None:
        """All that happens."""

    def _leave(self) -> None:  # noqa: B027 (most have nothing to do)
        """It is over: what still runs ends."""

    def run(self) -> Outcome:
        with virtual_time(self.timeline):
            try:
                self._live()
            except Exception as error:  # of the product (or of the rig): the seed is kept in both cases
                self.complain(f"{type(error).__name__}: {error}")
                if self.settings.trace:
                    raise
            finally:
                self._leave()
                self.disk.close()
        counts = {**self.history.counts, **{f"network: {name}": count for name, count in self.network.counts.items()}}
        counts["broker killed"], counts["broker stopped by its disk"] = self.broker.deaths, self.broker.stops
        counts["commits that failed"] = self.disk.failed
        return Outcome(self.seed, self.history.complaints, counts, self.checksum, self.timeline.now, self.trace)

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
            self.trace.append(f"{self.timeline.now:9.4f} {node.name if node else '':10} {text}")

    def _clock(self) -> Clock:
        clock = Clock(origin_s=self.chance.uniform(0.0, 1e6))
        if "skew" in self.profile:
            clock.rate = self.chance.uniform(1.0 - self.rate_error, 1.0 + self.rate_error)
            clock.wall_error_s = self.chance.uniform(-self.wall_error_s, self.wall_error_s)
        return clock

    # --- faults ---

    def _plan_faults(self) -> None:
        """The times at which each happens. (Those of frames and commits are looked up there.)"""
        for fault, rate in self.profile.rates.items():
            if fault == "failed_commit":
                self.disk.failure_rate = rate * FAILED_COMMITS
            if not hasattr(self, f"_fault_{fault}"):
                continue
            when = self.chance.expovariate(rate)
            while when < self.profile.heal_at_s:
                self.timeline.at(when, None, self._fault, fault)
                when += self.chance.expovariate(rate)

    def _fault(self, name: str) -> None:
        if not self.network.calm:
            self.count(f"fault: {name}")
            getattr(self, f"_fault_{name}")()

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

    def _heal(self) -> None:
        """Nothing fails from now on."""
        self.network.heal()
        self.disk.failure_rate = 0.0
        self.broker.armed = None
        for node in (self.broker, *self._everybody()):
            node.paused_until = min(node.paused_until, self.timeline.now)
            node.clock.wall_error_s = 0.0
        self.note("healed")


@contextlib.contextmanager
def virtual_time(timeline: Timeline) -> Iterator[None]:
    """All clocks of this process are those of the program in the world that runs now; and a week is a minute."""
    with (
        mock.patch.object(broker, "RESULTS_KEPT_S", RESULTS_KEPT_S),
        mock.patch.object(time, "time", timeline.wall_time),
        mock.patch.object(time, "time_ns", timeline.wall_time_ns),
        mock.patch.object(time, "monotonic", timeline.boottime),
    ):
        yield
