"""When a worker has to be gone: as it was told, or as the batch system says.

A batch system ends a job at a time that is known from the start. A worker that knows it stops taking processes while
there is still time to end well: at `Walltime.drain_at` it begins the graceful stop of `worker`. What can be known not
to fit is not begun: a step that says how long it takes (``@step(timeout=...)``) is left to others if that is
more than is left.

Times are wall-clock times, in seconds since 1970, as batch systems tell them; a worker looks at the clock again and
again, so a clock that is set meanwhile does no harm. All here is pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

MARGIN_S = 10.0
"""Beside the grace of its steps a worker needs this long to give processes back, leave the broker and end."""
LAST_S = 5.0
"""So long before the end the steps that still run are cancelled, whatever their grace is."""
SLURM_END = "SLURM_JOB_END_TIME"
"""Slurm says here when the job ends, in seconds since 1970 (sbatch(1), "output environment variables")."""

_DURATION = re.compile(r"(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})(?:min|m))?(?:(\d{1,6})s)?")
_CLOCK_TIME = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")


@dataclass(frozen=True)
class Walltime:
    """A worker's end."""

    ends_at: float
    """When it has to be gone."""
    drain_at: float
    """When it begins to stop."""

    @classmethod
    def of(cls, ends_at: float, grace_s: float, now: float) -> Walltime:
        """A worker whose steps get `grace_s` to end. The stop takes at most half of the time that is left."""
        return cls(ends_at, max(ends_at - (grace_s + MARGIN_S), (ends_at + now) / 2 if ends_at > now else ends_at))

    def left_s(self, now: float) -> float:
        """Until the stop begins; negative if it should have begun."""
        return self.drain_at - now

    def grace_s(self, grace_s: float, now: float) -> float:
        """What the steps get of their grace in a stop that begins now."""
        return min(grace_s, max(0.0, self.ends_at - LAST_S - now))

    def fits(self, timeout_s: float | None, now: float) -> bool:
        """Whether a step that takes at most so long (None: nobody knows) ends before the stop begins."""
        return timeout_s is None or timeout_s <= self.left_s(now)


def read_end(text: str, now: datetime) -> float:
    """A time as people write it: a duration (``2h``, ``1h30min``, ``90s``), a time of the day (``18:30``: the next one)
    or an ISO time (without a zone it is that of `now`, which has one). `ValueError` that says what is expected."""
    text = text.strip()
    found = _DURATION.fullmatch(text)
    if text and found is not None:
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return (now + timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)).timestamp()
    try:
        if (found := _CLOCK_TIME.fullmatch(text)) is not None:
            hours, minutes, seconds = (int(part or 0) for part in found.groups())
            end = now.replace(hour=hours, minute=minutes, second=seconds, microsecond=0)
            return (end if end > now else end + timedelta(days=1)).timestamp()
        end = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r} is no time: write a duration (2h, 1h30min), a time of the day (18:30) or an ISO time "
            "(2026-10-02T18:30)"
        ) from None
    end = end if end.tzinfo is not None else end.replace(tzinfo=now.tzinfo)
    if end <= now:
        raise ValueError(f"{text} is over already; it is {now.isoformat(timespec='minutes')}")
    return end.timestamp()


def end_of_job(environment: Mapping[str, str]) -> float | None:
    """When the batch job that this is ends; None if it is none, or its end is not known."""
    try:
        ends_at = float(environment.get(SLURM_END, ""))
    except ValueError:
        return None
    return ends_at if 0 < ends_at < math.inf else None
