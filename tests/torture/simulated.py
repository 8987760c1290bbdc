"""Batches of the simulated worlds (`sim`), in the form of the other rigs."""

from __future__ import annotations

from collections.abc import Iterable

from tests.torture.batch import Batch, quiet
from tests.torture.sim import campaign


def run_messaging(seed: int, size: int) -> Batch:
    """`size` worlds: those from ``seed * size`` on."""
    return _batch("messaging", range(seed * size, (seed + 1) * size))


def run_processes(seed: int, size: int) -> Batch:
    """The same, with workers and processes."""
    return _batch("processes", range(seed * size, (seed + 1) * size))


def run_kept(seed: int, size: int) -> Batch:
    """Every seed that has found something once, whatever `seed` and `size` are."""
    total = Batch.of(0)
    for world in campaign.WORLDS:
        total += _batch(world, campaign.found_before(world))
    return total


def _batch(world: str, seeds: Iterable[int]) -> Batch:
    with quiet():
        tally = campaign.run_seeds(world, seeds)
    failures = [
        f"$ python -m tests.torture.sim show {world} {seed}: {'; '.join(complaints[:3])}"
        for seed, complaints in sorted(tally.failures.items())
    ]
    return Batch.of(tally.runs, failures, {**tally.counts, "virtual hours": int(tally.virtual_s / 3600)})
