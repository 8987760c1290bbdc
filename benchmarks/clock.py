"""Timing: the best of several rounds, and percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

ROUNDS = 7


def per_call_us(work: Callable[[], object], calls: int, rounds: int = ROUNDS) -> float:
    """Microseconds of one of `calls` calls in a row, in the round that was disturbed least."""
    return min(_round(work, calls) for _ in range(rounds)) / calls * 1e6


def _round(work: Callable[[], object], calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - begun


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share (0 to 1) of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
