"""The report of ``make torture``, and how batches are added up."""

from __future__ import annotations

import importlib
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from tests.torture import __main__ as torture
from tests.torture import kept
from tests.torture.batch import MAX_FAILURES, Batch
from tests.torture.sim.campaign import WORLDS


def test_batches_are_added_up() -> None:
    """Counts are sums, figures maxima, and the first failures stay."""
    total = Batch.of(2, ["first"], {"a": 1}, {"ms": 3.0}) + Batch.of(3, ["second"], {"a": 2, "b": 1}, {"ms": 1.0})
    assert total == Batch.of(5, ["first", "second"], {"a": 3, "b": 1}, {"ms": 3.0})
    many = Batch.of(1, map(str, range(1000)))
    assert many.failures == tuple(map(str, range(MAX_FAILURES)))


def test_the_report_says_how_to_do_it_again() -> None:
    """What failed, its seeds, and the command of each batch that failed."""
    again = " ".join(torture.command_of("kills", 5, 50))
    failed = torture._Result("kills", "cycles", 1.0, Batch.of(50, ["lost: a"], {"broker killed": 7}), [again], [5])
    fine = torture._Result("codec", "frames", 1.0, Batch.of(1000), seeds=[5, 6])
    skipped = torture._Result("full-disk", "disks", total=Batch.of(0, not_run="no mount here"))
    said = torture.report([failed, fine, skipped])
    for words in ("FAILED", "broker killed: 7", "- lost: a", f"$ {again}", "seeds 5 to 6", "no mount here"):
        assert words in said
    assert "1 of 3 campaigns failed" in said
    assert "nothing failed" in torture.report([fine, skipped])


@pytest.fixture
def seeds_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of our own, for what is kept."""
    monkeypatch.setattr(kept, "FILE", tmp_path / "seeds.txt")
    kept.FILE.write_text("# Seeds.\nkills 5 50 one\n")
    return kept.FILE


def test_a_seed_that_fails_is_kept_once(seeds_file: Path) -> None:
    """With its size and what it found; the same seed in another size is another batch."""
    for _ in range(2):
        kept.keep("kills", 5, "50", "one")
        kept.keep("kills", 5, "20", "two\nlines")
        kept.keep("soak", 5, "600", "three")
    assert seeds_file.read_text().splitlines()[1:] == ["kills 5 50 one", "kills 5 20 two lines", "soak 5 600 three"]
    assert [(one.seed, one.how) for one in kept.kept("kills")] == [(5, "50"), (5, "20")]


def test_a_batch_that_fails_is_done_first_from_then_on(seeds_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rig of which a seed decides the batches: found in one run, in front in the next."""
    begun: list[tuple[int, int]] = []

    def batch(campaign: torture.Campaign, seed: int, size: int) -> Batch:
        begun.append((seed, size))
        return Batch.of(size, ["lost: a"] if seed == 101 else [])

    monkeypatch.setattr(torture, "_in_a_program", batch)  # (what runs there has tests of its own)
    rig = torture.Campaign("rig", "of:nobody", 10, 40, "things", 1.0)
    failed = torture.run_campaign(rig, 100, 1, 60.0)
    assert failed.again == ["python -m tests.torture rig --seed 101 --size 10"]
    assert kept.kept("rig") == [kept.Kept("rig", 101, "10", "lost: a")]
    torture.run_campaign(rig, 200, 1, 60.0)
    assert begun == [(100, 10), (101, 10), (101, 10)]

    torture.run_campaign(replace(rig, rig="other", is_kept=False), 101, 1, 60.0)
    assert kept.kept("other") == []


def test_what_is_kept_is_done_if_there_is_time(seeds_file: Path) -> None:
    """Before what is new; a soak only if it is no longer than there is time."""
    kills, soak = (next(one for one in torture.CAMPAIGNS if one.rig == name) for name in ("kills", "soak"))
    kept.keep("soak", 1, "600", "a")
    kept.keep("soak", 2, "60", "b")
    assert list(islice(torture.batches_of(kills, 9, 1.0), 3)) == [(5, 50), (9, 50), (10, 50)]
    assert list(torture.batches_of(soak, 9, 300.0)) == [(2, 60), (9, 300)]


def test_what_is_kept_is_of_rigs_that_are_there() -> None:
    """Each line of the file names a world, or a campaign that keeps its seeds, with the size of a batch."""
    names = {one.rig for one in torture.CAMPAIGNS if one.is_kept} | set(WORLDS)
    for line in kept.FILE.read_text().splitlines():
        if not line.startswith("#"):
            rig, seed, how, _ = line.split(maxsplit=3)
            assert rig in names, line
            assert seed.isdigit(), line
            assert how.isdigit() == (rig not in WORLDS), line


@pytest.mark.parametrize("campaign", torture.CAMPAIGNS, ids=lambda campaign: campaign.rig)
def test_every_campaign_has_its_rig(campaign: torture.Campaign) -> None:
    """The names in the table are those of functions."""
    module, _, function = campaign.function.partition(":")
    assert callable(getattr(importlib.import_module(f"tests.torture.{module}"), function))


def test_one_batch_can_be_done_again(capsys: pytest.CaptureFixture[str]) -> None:
    """By the command that the report prints; without a seed it says what is missing."""
    rig = next(campaign for campaign in torture.CAMPAIGNS if campaign.rig == "codec")
    assert torture.main([rig.rig, "--seed", "1", "--size", "50"]) == 0
    assert '"done": 50' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        torture.main([rig.rig, "--size", "50"])
    assert "one batch needs a rig and a --seed" in capsys.readouterr().err
