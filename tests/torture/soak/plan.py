"""What happens in a soak, and when: one seed, one plan.

Deeds are those of callers; strikes fall on the services. In the first half strikes fall on all of them. In the second
half the broker, the supervisor and one worker (`SPARED`) are left alone and watched for leaks; the others come and go.
Numbers in a plan choose among what is there at that moment.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

CALLERS = 3
DEEDS_PER_S = 12.0
STRIKE_EVERY_S = 4.0
SPARED = "worker-1"
MAX_WORKERS = 4
LAUNCHES = ("launch",) * 8 + ("launch many", "schedule")
CONTROLS = (
    ("pause",) * 3
    + ("play",) * 5
    + ("kill",) * 2
    + ("send",) * 6
    + ("resume",) * 5
    + ("retry", "update", "update", "ask", "relaunch", "list", "play all")
)
STRIKES = (
    "kill a worker",
    "kill the broker",
    "kill the supervisor",
    "kill a worker",
    "scale up",
    "kill broker and worker",
    "reload",
    "scale down",
    "stop and start",
    "kill all workers",
    "stop a worker for a moment",
)
"""Those of the first half: each once before one comes again."""
LATE_STRIKES = ("kill another worker", "scale up", "kill another worker", "scale down")


@dataclass(frozen=True)
class Deed:
    """`number` chooses the process and the rest, `caller` says who."""

    at_s: float
    what: str
    caller: int
    number: int


@dataclass(frozen=True)
class Strike:
    at_s: float
    what: str
    number: int


@dataclass(frozen=True)
class Plan:
    seconds: float
    deeds: tuple[Deed, ...]
    strikes: tuple[Strike, ...]


def plan_of(seed: int, seconds: float) -> Plan:
    """The plan of a soak of so many seconds. Even the shortest one has each strike once."""
    chance = random.Random(seed)
    deeds = []
    at_s = 0.0
    while (at_s := at_s + chance.expovariate(DEEDS_PER_S)) < seconds:
        what = chance.choice(chance.choice((LAUNCHES, CONTROLS)))
        deeds.append(Deed(at_s, what, chance.randrange(CALLERS), chance.getrandbits(30)))
    half = seconds / 2
    strikes = _strikes(chance, STRIKES, 0.0, half) + _strikes(chance, LATE_STRIKES, half, seconds)
    return Plan(seconds, tuple(deeds), tuple(strikes))


def _strikes(chance: random.Random, kinds: tuple[str, ...], begin_s: float, end_s: float) -> list[Strike]:
    count = max(len(kinds), int((end_s - begin_s) / STRIKE_EVERY_S))
    decks = [chance.sample(kinds, len(kinds)) for _ in range(count // len(kinds) + 1)]
    names = [name for deck in decks for name in deck][:count]
    times = sorted(chance.uniform(begin_s, end_s) for _ in names)
    return [Strike(at_s, name, chance.getrandbits(30)) for at_s, name in zip(times, names, strict=True)]
