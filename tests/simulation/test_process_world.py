"""The process world: real workers, processes and checkpoints, whatever fails.

The first failing seed is looked at with ``python -m tests.torture.sim show processes SEED``.
"""

from __future__ import annotations

import pytest

from tests.torture.sim import processes
from tests.torture.sim.campaign import run_found, run_seeds

SEEDS = 150
CHUNK = 15
SOMETIMES = (
    "processes finished",
    "processes killed",
    "steps run again",
    "network: lost",
    "network: resets",
    "broker killed",
    "broker stopped by its disk",
    "fault: kill_peer",
    "fault: leave",
    "fault: partition",
    "fault: pause_peer",
    "fault: sleep",
)


def test_seeds_that_found_something_once() -> None:
    """They run first."""
    tally = run_found("processes")
    assert not tally.failures, tally.report()


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_seed_breaks_a_promise(first: int) -> None:
    """No process is lost or ends twice, no checkpointed step runs again, every call is answered, nothing is left."""
    tally = run_seeds("processes", range(first, first + CHUNK))
    assert not tally.failures, tally.report()


def test_everything_that_may_happen_does_happen() -> None:
    """In a sample of the seeds."""
    counts = run_seeds("processes", range(40)).counts
    assert not [what for what in SOMETIMES if not counts[what]]


def test_a_seed_is_one_run() -> None:
    """The same seed gives the same frames and the same commits at the same times."""
    assert processes.run(7) == processes.run(7)
