"""The small dose of the kills: what was confirmed is done, once, whoever dies (``make torture`` has the large one)."""

from __future__ import annotations

import pytest

from tests.torture.kills import processes, tasks

SEED = 7


@pytest.mark.timeout(90)
def test_tasks_survive_fifty_kills_and_stops() -> None:
    """Broker, workers and clients are killed, workers stopped beyond their lease, and the judge finds nothing."""
    batch = tasks.run(SEED, 50)
    assert batch.failures == (), f"seed {SEED}: {batch.counts}"
    assert batch.done == 50
    for what in (
        "broker killed",
        "worker killed",
        "client killed",
        "worker stopped",
        "tasks delivered again",
        "tasks taken over from a stopped worker",
    ):
        assert batch.counts[what], f"{what}: this did not happen, so nothing was shown; {batch.counts}"


@pytest.mark.timeout(90)
def test_processes_survive_kills() -> None:
    """Work chains on real workers with real checkpoints: every one ends, and no checkpointed step runs again."""
    batch = processes.run(SEED, 5)
    assert batch.failures == (), f"seed {SEED}: {batch.counts}"
    assert batch.done == 5


@pytest.mark.parametrize(
    ("lines", "resumed", "late"),
    [
        (["p:1", "p:2", "q:1", "p:2", "p:3"], [], []),
        (["p:1", "p:2", "p:1", "p:3"], [], ["p:1"]),
        (["p:1", "p:2", "p:1", "p:3"], [2], []),
        (["p:1", "p:2", "p:1", "p:3"], [3], ["p:1"]),
        (["p:1", "p:2", "p:3", "p:1", "p:2", "p:4"], [1], ["p:2"]),
        (["p:1", "q:1", "p:2", "q:2", "p:1", "q:1"], [4], []),
        (["p:1", "p:2", "p:1", "p:3", "p:2"], [1, 3], []),
    ],
)
def test_the_judge_of_steps(lines: list[str], resumed: list[int], late: list[str]) -> None:
    """A worker that was stopped may begin one step late, of each process that it held, and no other."""
    assert processes.begun_late(lines, resumed) == late
