"""When to open a connection, who may use it, when to close it: decisions without a clock and without any I/O.

A `Share` is what is known of the connection to one endpoint at a moment, and `decide` says what is to be done about it.
Whoever keeps the share does that, writes down what has become of it, and asks again.

Rules
- A connection is opened when somebody waits for one, and not more often than once in `safe_interval_s`. All that ask
  meanwhile share the one opening.
- An opening that fails is tried again, each time after a longer pause, as long as somebody waits. After `max_attempts`
  everybody who waits is told, and the next who asks begins a new series.
- A connection serves up to `max_users` at a time, first come, first served. One that is broken serves nobody any more.
- A connection that nobody uses or waits for is closed after `idle_s`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import msgspec

Seconds = Annotated[float, msgspec.Meta(ge=0, le=30 * 86_400)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one endpoint wants to be treated."""

    safe_interval_s: Seconds = 0.0
    """From the beginning of one opening to that of the next."""
    idle_s: Seconds = 30.0
    """How long an unused connection stays open."""
    max_users: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """How many may use it at the same time; None: any number."""
    open_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 30.0
    """An opening that takes longer has failed."""
    initial_interval_s: Seconds = 5.0
    """The pause after the first failure; ..."""
    backoff: Annotated[float, msgspec.Meta(ge=1, le=100)] = 2.0
    """... each further one is so many times as long, ..."""
    max_interval_s: Seconds = 300.0
    """... up to this."""
    jitter: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    """By how much of itself a pause is spread, in either direction: workers are not to try in step."""
    max_attempts: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    """So many failures in a row are a reason to pause those who wait."""

    def delay_s(self, failures: int, chance: float) -> float:
        """The pause after so many failures (from 1); `chance`, from 0 to 1, decides the jitter."""
        try:
            grown = self.initial_interval_s * self.backoff ** (failures - 1)
        except OverflowError:
            grown = math.inf
        return min(grown, self.max_interval_s) * (1 + self.jitter * (2 * chance - 1))


@dataclass(slots=True)
class Share:
    """What is known of the connection to one endpoint. Times are those of a monotonic clock, in seconds."""

    waiting: int = 0
    users: int = 0
    """Of the connection that is open."""
    is_open: bool = False
    is_broken: bool = False
    """It is open, as far as we have closed it or not, and of no use."""
    is_opening: bool = False
    began_opening_s: float = -math.inf
    """When the last opening began."""
    failures: int = 0
    """In a row, of this series."""
    is_hopeless: bool = False
    """The last failure was one that trying again does not mend."""
    try_again_s: float = -math.inf
    """When the pause after the last failure is over."""
    idle_since_s: float = 0.0
    """When the last user left, or it was opened."""


@dataclass(frozen=True, slots=True)
class Open:
    """Begin to open a connection."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Hand the connection to the first `number` of those who wait."""

    number: int


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection, or forget the broken one; whoever still uses it may be told so by it."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Tell all that wait that there is no connection."""


@dataclass(frozen=True, slots=True)
class LookAgain:
    """Nothing can be done before `at_s`."""

    at_s: float


Decision = Open | Grant | Close | GiveUp | LookAgain | None


def decide(share: Share, limits: Limits, now_s: float) -> Decision:
    """What is to be done now; None: nothing until something happens."""
    if share.is_open:
        if share.is_broken:
            return Close()
        room = share.waiting if limits.max_users is None else min(share.waiting, limits.max_users - share.users)
        if room > 0:
            return Grant(room)
        if share.users or share.waiting:
            return None
        close_s = share.idle_since_s + limits.idle_s
        return Close() if now_s >= close_s else LookAgain(close_s)
    if share.is_opening or not share.waiting:
        return None
    if share.failures >= limits.max_attempts or share.is_hopeless:
        return GiveUp()
    open_s = max(share.began_opening_s + limits.safe_interval_s, share.try_again_s)
    return Open() if now_s >= open_s else LookAgain(open_s)
