"""The end of a worker: how it is told, and what fits before it."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from prunus.runtime.walltime import LAST_S, MARGIN_S, Walltime, end_of_job, read_end

NOW = datetime(2026, 10, 2, 17, 45, 30, tzinfo=timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("2h", NOW + timedelta(hours=2)),
        ("90s", NOW + timedelta(seconds=90)),
        ("1h30min", NOW + timedelta(minutes=90)),
        ("1d2h3m4s", NOW + timedelta(days=1, hours=2, minutes=3, seconds=4)),
        ("0s", NOW),
        ("18:30", NOW.replace(hour=18, minute=30, second=0)),
        ("18:30:15", NOW.replace(hour=18, minute=30, second=15)),
        ("17:45", NOW.replace(day=3, second=0)),
        ("7:05", NOW.replace(day=3, hour=7, minute=5, second=0)),
        ("2026-10-02T18:30", NOW.replace(hour=18, minute=30, second=0)),
        ("2026-10-02 18:30", NOW.replace(hour=18, minute=30, second=0)),
        ("2026-10-02T18:30:00+00:00", NOW.replace(hour=20, minute=30, second=0)),
        (" 2026-10-03 ", NOW.replace(day=3, hour=0, minute=0, second=0)),
    ],
)
def test_times_are_read_as_people_write_them(text: str, end: datetime) -> None:
    """Durations from now, times of the day, and ISO times, which are local ones if they say nothing else."""
    assert read_end(text, NOW) == end.timestamp()


@pytest.mark.parametrize("text", ["", "soon", "25:00", "12:61", "2 h", "-2h", "2h junk", "2026-13-01", "1e3"])
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    """The sentence says what is expected."""
    with pytest.raises(ValueError, match=r"write a duration \(2h"):
        read_end(text, NOW)


def test_a_time_that_is_over_is_refused() -> None:
    """It is told what time it is."""
    with pytest.raises(ValueError, match=r"is over already; it is 2026-10-02T17:45\+02:00"):
        read_end("2026-10-02T17:45", NOW)


@pytest.mark.parametrize(
    ("environment", "end"),
    [
        ({"SLURM_JOB_END_TIME": "1790000000"}, 1_790_000_000.0),
        ({}, None),
        ({"SLURM_JOB_END_TIME": ""}, None),
        ({"SLURM_JOB_END_TIME": "Unknown"}, None),
        ({"SLURM_JOB_END_TIME": "0"}, None),
        ({"SLURM_JOB_END_TIME": "inf"}, None),
        ({"SLURM_JOB_END_TIME": "nan"}, None),
    ],
)
def test_slurm_says_when_its_job_ends(environment: dict[str, str], end: float | None) -> None:
    """Whatever is no time means that the end is not known."""
    assert end_of_job(environment) == end


def test_the_stop_begins_a_grace_and_a_margin_before_the_end() -> None:
    """So that steps get their grace, and what follows has its time."""
    walltime = Walltime.of(ends_at=10_000.0, grace_s=30.0, now=0.0)
    assert walltime.drain_at == 10_000.0 - 30.0 - MARGIN_S
    assert walltime.left_s(9_000.0) == 960.0
    assert walltime.left_s(9_970.0) == -10.0
    assert walltime.grace_s(30.0, 9_960.0) == 30.0
    assert walltime.grace_s(30.0, 9_990.0) == 10.0 - LAST_S
    assert walltime.grace_s(30.0, 10_001.0) == 0.0


def test_of_a_short_time_half_is_worked() -> None:
    """A worker with little time and a long grace works all the same."""
    assert Walltime.of(ends_at=10.0, grace_s=30.0, now=0.0).drain_at == 5.0
    assert Walltime.of(ends_at=10.0, grace_s=30.0, now=20.0).left_s(20.0) < 0


def test_a_step_fits_if_its_limit_ends_before_the_stop() -> None:
    """One that does not say how long it takes is begun."""
    walltime = Walltime(ends_at=200.0, drain_at=100.0)
    assert walltime.fits(60.0, now=40.0)
    assert not walltime.fits(60.1, now=40.0)
    assert walltime.fits(None, now=99.0)
