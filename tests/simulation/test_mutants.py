"""The worlds find bugs: each one that is planted is found by the seed that is known to find it."""

from __future__ import annotations

import pytest

from tests.torture.sim.mutants import MUTANTS, Mutant

SEARCHED = 60
"""Seeds that are tried where the known one does not find it any more."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_found(mutant: Mutant) -> None:
    """As a breach of the invariant that it breaks, and only because it is planted: without it the same seed finds
    nothing."""
    seeds = (mutant.seed, *range(SEARCHED))
    assert any(mutant.is_found(seed) and not mutant.run_without(seed).complaints for seed in seeds)


def test_there_are_many() -> None:
    """Each with a name of its own."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 15
