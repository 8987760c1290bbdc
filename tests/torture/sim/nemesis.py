"""Which faults happen in a world, how often and when. All of it follows from the seed.

Swarm testing: each seed gets a random part of all faults, each with a random rate, so that they meet in many
combinations and rare ones are not drowned by frequent ones. After `HEAL_SHARE` of the horizon nothing fails any more.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

Fault = Literal[
    "slow",  # frames take long
    "duplicate",  # a frame comes twice
    "late",  # frames of a closed connection arrive after those of the next one
    "reset",  # a connection breaks and loses what was on the way
    "partition",  # nothing passes between a peer and the broker, in one or both directions
    "kill_peer",  # SIGKILL; another one takes its place
    "no_proof",  # nobody can prove that a peer is dead: its lease decides
    "pause_peer",  # SIGSTOP, also for longer than a lease
    "leave",  # a peer says goodbye; another one takes its place
    "kill_broker",  # SIGKILL at any moment
    "failpoint",  # the same before or after a commit, and between two sends
    "failed_commit",  # the disk refuses; what it wrote may or may not be there
    "pause_broker",  # SIGSTOP, also for longer than a lease
    "sleep",  # all machines are suspended, for up to an hour
    "wall_jump",  # a wall clock is set
    "skew",  # clocks run at different rates
    "rogue",  # somebody sends nonsense, and says things in the name of others
    "meddle",  # a peer settles tasks that it does not hold
]
FAULTS: tuple[Fault, ...] = get_args(Fault)
HEAL_SHARE = 0.6
"""From here on, as a share of the horizon, nothing fails any more."""


@dataclass(frozen=True, slots=True)
class Profile:
    """The faults of one world."""

    horizon_s: float
    rates: dict[Fault, float]
    """How often per second, or with which probability for each frame or commit."""

    @property
    def heal_at_s(self) -> float:
        return self.horizon_s * HEAL_SHARE

    def __contains__(self, fault: Fault) -> bool:
        return fault in self.rates

    @classmethod
    def of(cls, seed: int, *, without: frozenset[str] = frozenset(), horizons_s: tuple[float, float]) -> Profile:
        """That of a seed; `without` some faults, to find out which of them matter."""
        chance = random.Random(f"{seed} profile")
        horizon = chance.uniform(*horizons_s)
        share = chance.choice((0.15, 0.35, 0.6))
        rates: dict[Fault, float] = {}
        for fault in FAULTS:
            is_on, rate = chance.random() < share, 10 ** chance.uniform(-1.7, -0.3)
            if is_on and fault not in without:
                rates[fault] = rate
        return cls(horizon, rates)
