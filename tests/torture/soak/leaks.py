"""Whether services grow: samples of their memory, files and threads, and a line through those of the last part."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import psutil

WARM_UP = 0.2
"""This share of the samples is left out: caches fill, threads start."""
MIB = 2**20


class Sample(NamedTuple):
    """A service at a moment."""

    at_s: float
    rss_mib: float
    files: int
    threads: int


class Bound(NamedTuple):
    """How much a service may grow while it is watched."""

    rss_mib: float
    files: float
    threads: float


class Growth(NamedTuple):
    """By how much the line through the samples rises, from the first to the last of them."""

    rss_mib: float
    files: float
    threads: float


def sample(pid: int, at_s: float) -> Sample | None:
    """None if it is gone."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return Sample(at_s, process.memory_info().rss / MIB, process.num_fds(), process.num_threads())
    return None


def growth(samples: Sequence[Sample]) -> Growth:
    rest = samples[int(len(samples) * WARM_UP) :]
    if len(rest) < 3:
        return Growth(0.0, 0.0, 0.0)
    times = [each.at_s for each in rest]
    return Growth(
        *(slope(times, [float(each[index]) for each in rest]) * (times[-1] - times[0]) for index in (1, 2, 3))
    )


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Of the line with the least squares."""
    mean_time, mean_value = sum(times) / len(times), sum(values) / len(values)
    spread = sum((time - mean_time) ** 2 for time in times)
    if not spread:
        return 0.0
    pairs = zip(times, values, strict=True)
    return sum((time - mean_time) * (value - mean_value) for time, value in pairs) / spread


def complaints(watched: Mapping[str, Sequence[Sample]], bound: Bound) -> list[str]:
    """Which service grew by more than it may."""
    found = []
    for name, samples in watched.items():
        grew = growth(samples)
        for what, by, most in zip(Growth._fields, grew, bound, strict=True):
            if by > most:
                seen = [getattr(each, what) for each in samples]
                found.append(
                    f"{name} leaks: {what} grew by {by:.1f} in {samples[-1].at_s - samples[0].at_s:.0f} s "
                    f"(from {seen[0]:.0f} to {seen[-1]:.0f}), and may by {most:g}"
                )
    return found
