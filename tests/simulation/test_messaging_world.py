"""The messaging world: whatever fails, nothing that was promised is broken, and everything comes to an end.

The first failing seed is looked at with ``python -m tests.torture.sim show messaging SEED``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture import kept
from tests.torture.sim import campaign, messaging
from tests.torture.sim.campaign import run_found, run_seeds
from tests.torture.sim.nemesis import FAULTS
from tests.torture.sim.world import Settings
from tests.torture.simulated import run_kept

SEEDS = 2000
CHUNK = 100
CHECKSUMS = "from tests.torture.sim import messaging as m; print([m.run(seed).checksum for seed in (1, 2, 3, 11)])"
SOMETIMES = (
    "redeliveries",
    "done after a redelivery",
    "tasks lost",
    "tasks joined",
    "tasks rejected",
    "tasks edited: delete",
    "tasks edited: requeue",
    "tasks edited: bury",
    "dead letters",
    "stale acknowledgements",
    "settled by a stranger, refused",
    "fenced writes refused",
    "calls undone",
    "missed broadcasts told",
    "listeners whose holes were counted",
    "deaths of workers looked at",
    "sessions resumed",
    "silences",
    "names taken",
    "names refused",
    "send: UnknownResourceError",
    "question: IndeterminateError",
    "question: UnroutableError",
    "question: NotDeliveredError",
    "question: BusyError",
    "network: lost",
    "network: late",
    "network: duplicated",
    "network: cut",
    "network: resets",
    "broker killed",
    "broker stopped by its disk",
    "fault: kill_peer",
    "fault: pause_peer",
    "fault: pause_broker",
    "fault: sleep",
    "fault: wall_jump",
    "fault: rogue",
    "fault: leave",
)
"""What must have happened in a sample of all runs: else they show nothing about it."""


def test_seeds_that_are_kept_run_with_their_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that they need, or all."""
    monkeypatch.setattr(kept, "FILE", tmp_path / "seeds.txt")
    kept.FILE.write_text(
        "# Seeds.\nmessaging 5 late one\nmessaging 6 all two\nprocesses 6 all three\nkills 7 50 four\n"
    )
    [(first, settings), (second, everything)] = campaign.found_before("messaging")
    assert (first, second, everything) == (5, 6, Settings())
    assert settings.without == frozenset(FAULTS) - {"late"}
    assert run_kept(0, 0).done == 3


def test_seeds_that_found_something_once() -> None:
    """They run first."""
    tally = run_found("messaging")
    assert not tally.failures, tally.report()


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_no_seed_breaks_a_promise(first: int) -> None:
    """Nothing confirmed is lost, nothing runs after its acknowledged end, everybody is answered, and in the end it is
    quiet."""
    tally = run_seeds("messaging", range(first, first + CHUNK))
    assert not tally.failures, tally.report()


def test_everything_that_may_happen_does_happen() -> None:
    """In a sample of the seeds."""
    counts = run_seeds("messaging", range(150)).counts
    assert not [what for what in SOMETIMES if not counts[what]]


def test_a_seed_is_one_run() -> None:
    """Also in another process, in which hashes are others."""
    runs = [
        subprocess.run(
            [sys.executable, "-c", CHECKSUMS],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(path for path in sys.path if path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=25,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_a_disk_that_loses_commits_is_found_out() -> None:
    """The same rig with a disk that does not keep what it was told to: then confirmed tasks are lost."""
    failures = run_seeds("messaging", range(40), Settings(synced=False)).failures
    assert any("I1: " in complaint for complaints in failures.values() for complaint in complaints)


def test_without_faults_everything_is_done_once() -> None:
    """No redelivery, no resumed session, no error: so what the faults show is due to the faults."""
    settings = Settings(without=frozenset(FAULTS), special=False, editing=False)
    for seed in range(10):
        outcome = messaging.run(seed, settings)
        assert not outcome.complaints
        assert not {"sessions resumed", "tasks lost", "stale acknowledgements"} & outcome.counts.keys()
