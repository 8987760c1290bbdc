"""The report of ``make torture``, and how batches are added up."""

from __future__ import annotations

import importlib

import pytest

from tests.torture import __main__ as torture
from tests.torture.batch import MAX_FAILURES, Batch


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
