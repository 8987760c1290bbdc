"""What one batch of a rig did: the same for all rigs, so that batches can be added up and reported together."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

import prunus

PROJECT = Path(__file__).parents[2]
MAX_FAILURES = 20
"""Failures that are kept of one batch; the first ones tell most."""


class Batch(msgspec.Struct, frozen=True):
    """`done` counts what the rig counts: cycles, states, frames. The same seed and size give the same batch."""

    done: int
    failures: tuple[str, ...] = ()
    counts: dict[str, int] = {}
    """What happened on the way: added up over batches."""
    worst: dict[str, float] = {}
    """Figures of which the largest counts."""
    not_run: str = ""
    """Why it can't be done on this machine."""

    @classmethod
    def of(
        cls,
        done: int,
        failures: Iterable[str] = (),
        counts: dict[str, int] | None = None,
        worst: dict[str, float] | None = None,
        not_run: str = "",
    ) -> Batch:
        return cls(done, tuple(failures)[:MAX_FAILURES], counts or {}, worst or {}, not_run)

    def __add__(self, other: Batch) -> Batch:
        return Batch.of(
            self.done + other.done,
            self.failures + other.failures,
            {name: self.counts.get(name, 0) + other.counts.get(name, 0) for name in {**self.counts, **other.counts}},
            {name: max(self.worst.get(name, 0), other.worst.get(name, 0)) for name in {**self.worst, **other.worst}},
            self.not_run or other.not_run,
        )


class CanNotRunError(Exception):
    """Why a rig can't be used on this machine."""


def environment(**more: str) -> dict[str, str]:
    """The variables of a program that imports this Prunus and these tests."""
    path = f"{Path(prunus.__file__).parents[1]}{os.pathsep}{PROJECT}"
    return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **more}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What goes wrong here is meant to, and thousands of lines about it help nobody."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
