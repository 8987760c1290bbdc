"""Batches of the simulated worlds (`sim`), in the form of the other rigs."""

from __future__ import annotations

from tests.torture import kept
from tests.torture.batch import Batch, quiet
from tests.torture.sim import campaign


def run_messaging(seed: int, size: int) -> Batch:
    """`size` worlds: those from ``seed * size`` on."""
    return _new("messaging", seed, size)


def run_processes(seed: int, size: int) -> Batch:
    """The same, with workers and processes."""
    return _new("processes", seed, size)


def run_kept(seed: int, size: int) -> Batch:
    """Every seed that has found something once, whatever `seed` and `size` are."""
    total = Batch.of(0)
    for world in campaign.WORLDS:
        with quiet():
            tally = campaign.run_found(world)
        total += _batch(world, tally)
    return total


def _new(world: str, seed: int, size: int) -> Batch:
    with quiet():
        tally = campaign.run_seeds(world, range(seed * size, (seed + 1) * size))
    for failed, complaints in tally.failures.items():
        kept.keep(world, failed, campaign.EVERY_FAULT, complaints[0])
    return _batch(world, tally)


def _batch(world: str, tally: campaign.Tally) -> Batch:
    failures = [
        f"$ python -m tests.torture.sim show {world} {seed}: {'; '.join(complaints[:3])}"
        for seed, complaints in sorted(tally.failures.items())
    ]
    return Batch.of(tally.runs, failures, {**tally.counts, "virtual hours": int(tally.virtual_s / 3600)})
