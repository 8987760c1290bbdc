"""Timing: medians of rounds, and percentiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

ROUNDS = 5


def per_call_us(work: Callable[[], object], calls: int, rounds: int = ROUNDS) -> float:
    """Median microseconds of one of `calls` calls in a row."""
    return statistics.median(_round(work, calls) for _ in range(rounds)) / calls * 1e6


def _round(work: Callable[[], object], calls: int) -> float:
    begun = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - begun


async def seconds(work: Callable[[], Awaitable[object]], rounds: int = ROUNDS) -> float:
    """Median seconds of `work`."""
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        await work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which this share (0 to 1) of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
