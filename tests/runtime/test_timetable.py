"""Fire times, and which of them are due: pure, by tables and by properties."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise, takewhile
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prunus.runtime import timetable
from prunus.runtime.timetable import (
    MAX_CATCH_UP,
    MAX_COUNTED,
    OVERLAPS,
    Cron,
    Due,
    Interval,
    Timetable,
    Turn,
    due,
    duration_text,
    local_zone_name,
    read_cron,
    read_interval,
    read_moment,
    read_rhythm,
    read_zone,
    stamp,
    take_turn,
)

ZURICH, NEW_YORK, LORD_HOWE = (ZoneInfo(name) for name in ("Europe/Zurich", "America/New_York", "Australia/Lord_Howe"))
NOON = int(datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp())


def seconds(moment: str, zone: ZoneInfo, fold: int = 0) -> int:
    return int(datetime.fromisoformat(moment).replace(tzinfo=zone, fold=fold).timestamp())


def fires(expression: str, zone: ZoneInfo, after: str, number: int) -> list[str]:
    """The next fire times, as the clocks of the zone show them."""
    times = islice(Cron(expression, zone).after(seconds(after, zone)), number)
    return [f"{datetime.fromtimestamp(at_s, zone):%m-%d %H:%M %Z}" for at_s in times]


# --- cron expressions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        ("0 2 * * *", "2026-11-21T02:00", ["11-22 02:00 CET", "11-23 02:00 CET"]),
        ("30 8-9 * * MON-FRI", "2026-11-20T09:00", ["11-20 09:30 CET", "11-23 08:30 CET"]),
        ("*/20 * * * *", "2026-11-21T23:50", ["11-22 00:00 CET", "11-22 00:20 CET"]),
        ("0 0 29 2 *", "2026-01-01", ["02-29 00:00 CET", "02-29 00:00 CET"]),  # 2028 and 2032
        ("0 0 31 * *", "2026-01-31T12:00", ["03-31 00:00 CEST", "05-31 00:00 CEST"]),
        ("59 23 L * *", "2026-01-31T23:59", ["02-28 23:59 CET", "03-31 23:59 CEST"]),
        ("0 12 1,15 * *", "2026-12-20", ["01-01 12:00 CET", "01-15 12:00 CET"]),
        ("0 0 13 * 5", "2026-11-01", ["11-06 00:00 CET", "11-13 00:00 CET"]),  # the 13th, or a Friday, as in cron
        ("0 9 * * MON#1", "2026-11-21", ["12-07 09:00 CET", "01-04 09:00 CET"]),
    ],
)
def test_cron_expressions_mean_what_they_mean_to_cron(expression: str, after: str, expected: list[str]) -> None:
    """Months of all lengths, leap days, days of the week, and steps."""
    assert fires(expression, ZURICH, after, len(expected)) == expected


def test_a_leap_day_is_one_in_four_years() -> None:
    """The years are right, too."""
    times = islice(Cron("0 0 29 2 *", ZURICH).after(seconds("2026-01-01", ZURICH)), 3)
    assert [datetime.fromtimestamp(at_s, ZURICH).year for at_s in times] == [2028, 2032, 2036]


@pytest.mark.parametrize(
    ("expression", "zone", "after", "expected"),
    [
        # In spring the clock leaps from 2 to 3: what it leaps over fires when it has leapt, once.
        ("30 2 * * *", ZURICH, "2026-03-28T12:00", ["03-29 03:00 CEST", "03-30 02:30 CEST"]),
        ("0,30 2 * * *", ZURICH, "2026-03-28T12:00", ["03-29 03:00 CEST", "03-30 02:00 CEST"]),
        ("30 2 * * *", NEW_YORK, "2026-03-07T12:00", ["03-08 03:00 EDT", "03-09 02:30 EDT"]),
        ("15 2 * * *", LORD_HOWE, "2026-10-03T12:00", ["10-04 02:30 +11", "10-05 02:15 +11"]),
        # In autumn it shows an hour twice: the first one counts.
        ("30 2 * * *", ZURICH, "2026-10-24T12:00", ["10-25 02:30 CEST", "10-26 02:30 CET"]),
        ("30 1 * * *", NEW_YORK, "2026-10-31T12:00", ["11-01 01:30 EDT", "11-02 01:30 EST"]),
        ("45 1 * * *", LORD_HOWE, "2026-04-04T12:00", ["04-05 01:45 +11", "04-06 01:45 +1030"]),
        # What is so every so often follows the clock: over the leap, and through both hours.
        ("30 * * * *", ZURICH, "2026-03-29T01:00", ["03-29 01:30 CET", "03-29 03:30 CEST"]),
        ("30 * * * *", ZURICH, "2026-10-25T02:00", ["10-25 02:30 CEST", "10-25 02:30 CET", "10-25 03:30 CET"]),
        ("0 */2 * * *", NEW_YORK, "2026-11-01T00:30", ["11-01 02:00 EST", "11-01 04:00 EST"]),
        ("*/30 * * * *", LORD_HOWE, "2026-04-05T01:10", ["04-05 01:30 +11", "04-05 01:30 +1030", "04-05 02:00 +1030"]),
        # An hour that comes after a leap by half an hour is whole (cronsim by itself loses its first half).
        ("*/15 3 * * *", LORD_HOWE, "2026-10-03T12:00", ["10-04 03:00 +11", "10-04 03:15 +11", "10-04 03:30 +11"]),
        ("*/15 3 * * *", LORD_HOWE, "2026-04-04T12:00", ["04-05 03:00 +1030", "04-05 03:15 +1030"]),
        # A whole day that an island left out: a time in it fires at its end.
        ("0 12 30 12 *", ZoneInfo("Pacific/Apia"), "2011-12-01T00:00", ["12-31 00:00 +14", "12-30 12:00 +14"]),
    ],
)
def test_daylight_saving_time(expression: str, zone: ZoneInfo, after: str, expected: list[str]) -> None:
    """Nothing is lost in spring, and nothing that names a time is done twice in autumn."""
    assert fires(expression, zone, after, len(expected)) == expected


def test_it_does_not_matter_from_where_one_looks() -> None:
    """Also in the middle of the hour that comes twice."""
    second_time = seconds("2026-10-25T02:30", ZURICH, fold=1)
    assert next(Cron("45 2 * * *", ZURICH).after(second_time)) == seconds("2026-10-26T02:45", ZURICH)
    assert next(Cron("45 * * * *", ZURICH).after(second_time)) == seconds("2026-10-25T02:45", ZURICH, fold=1)


def test_what_never_comes_ends() -> None:
    """The fifth Monday of a February comes in 18 years, and not any more before the calendar ends."""
    rare = Cron("0 0 * 2 MON#5", read_zone("UTC"))
    assert stamp(next(rare.after(NOON))) == "2044-02-29T00:00Z"
    assert [*rare.after(seconds("9990-01-01", read_zone("UTC")))] == []
    assert Timetable(rare).next_after(seconds("9990-01-01", read_zone("UTC"))) is None


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("61 * * * *", "the minute '61'"),
        ("*/0 * * * *", "the minute '*/0'"),
        ("0 25 * * *", "the hour '25'"),
        ("0 0 32 * *", "the day of the month '32'"),
        ("0 0 31 2 *", "the day of the month '31'"),
        ("0 0 1 13 *", "the month '13'"),
        ("0 0 31 13 *", "the month '13'"),
        ("0 0 * * FUN", "the day of the week 'FUN'"),
        ("0 0 * *", "has 4 fields, and a cron expression has five"),
        ("0 0 0 * * *", "has 6 fields"),
        ("@daily", "for @daily write '0 0 * * *'"),
        ("", "has 0 fields"),
    ],
)
def test_a_wrong_expression_says_which_field_is_wrong(expression: str, complaint: str) -> None:
    """With what may stand there, or an example."""
    with pytest.raises(ValueError, match=r"0 to|1 to|five") as raised:
        read_cron(expression)
    assert complaint in str(raised.value)


@pytest.mark.parametrize("text", ["", "15", "1.5h", "-1s", "15 minutes", "0s", "1w"])
def test_a_wrong_interval_is_refused(text: str) -> None:
    """With an example, or the shortest one."""
    with pytest.raises(ValueError, match=r"6h or 1d|the shortest is 1s"):
        read_interval(text)


def test_what_is_read_is_shown_as_it_was_meant() -> None:
    """Rhythms, durations, moments and stamps."""
    assert read_rhythm("every 90s", ZURICH, 7) == Interval(90, 7)
    assert read_rhythm("  0  2 * * * ", ZURICH, 7) == Cron("0 2 * * *", ZURICH)
    assert Interval(5400, 0).words == "every 90min"
    assert Cron("0 2 * * 1-5", ZURICH).words == "at 02:00 on Monday through Friday, Europe/Zurich"
    assert [duration_text(each) for each in (1, 90, 3600, 86_400, 0.5)] == ["1s", "90s", "1h", "1d", "0.5s"]
    assert [read_interval(text) for text in ("1s", "90s", "15min", "6h", "1d")] == [1, 90, 900, 21_600, 86_400]
    assert stamp(NOON) == "2026-11-21T12:00Z"
    assert stamp(NOON + 7) == "2026-11-21T12:00:07Z"
    assert read_moment("2026-11-21T13:00", ZURICH) == read_moment("2026-11-21T12:00Z", ZURICH) == NOON
    for wrong in ("tomorrow", "2026-13-01"):
        with pytest.raises(ValueError, match="no date or time"):
            read_moment(wrong, ZURICH)
    for wrong in ("Mars/Olympus", "../etc/passwd", ""):
        with pytest.raises(ValueError, match="no time zone"):
            read_zone(wrong)


def test_the_zone_of_this_computer_is_known_by_its_name(tmp_path: Path) -> None:
    """From the environment, the link, or the file; else it is UTC."""
    assert local_zone_name({"TZ": "Europe/Zurich"}, tmp_path) == "Europe/Zurich"
    assert local_zone_name({"TZ": ":America/New_York"}, tmp_path) == "America/New_York"
    assert local_zone_name({}, tmp_path) == "UTC"
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "timezone").write_text("Asia/Tokyo\n")
    assert local_zone_name({"TZ": "no such zone"}, tmp_path) == "Asia/Tokyo"
    folder = tmp_path / "usr" / "share" / "zoneinfo" / "Asia"
    folder.mkdir(parents=True)
    (folder / "Kolkata").touch()
    (tmp_path / "etc" / "localtime").symlink_to(folder / "Kolkata")
    assert local_zone_name({}, tmp_path) == "Asia/Kolkata"


# --- properties of rhythms ------------------------------------------------------------------------------

zones = st.sampled_from(
    ["UTC", "Europe/Zurich", "America/New_York", "Australia/Lord_Howe", "Africa/Cairo", "Asia/Kolkata"]
)
minutes = st.sampled_from(["*", "*/7", "0", "15,45", "30-40/5"])
hours = st.sampled_from(["*", "*/5", "0", "1-3", "2", "23"])
days = st.sampled_from(["*", "*/10", "1", "L", "28-31"])
months = st.sampled_from(["*", "*", "3,10", "4,11"])
weekdays = st.sampled_from(["*", "*", "SUN", "MON-FRI", "5L"])
crons = st.builds(
    lambda *parts: Cron(" ".join(parts[:5]), ZoneInfo(parts[5])), minutes, hours, days, months, weekdays, zones
)
intervals = st.builds(Interval, st.integers(1, 9) | st.integers(1, 200_000), st.integers(NOON - 10**6, NOON + 10**6))
moments = st.integers(seconds("2026-01-01", read_zone("UTC")), seconds("2028-01-01", read_zone("UTC")))
rhythms = crons | intervals


def shown_in(cron: Cron, window: range) -> set[int]:
    """The moments at which the clock shows what the expression says, as the calendar alone has it."""
    walls = {at_s: datetime.fromtimestamp(at_s, cron.zone).replace(tzinfo=None) for at_s in window}
    first, last = min(walls.values()), max(walls.values())
    calendar = timetable.CronSim(cron.expression, first - timedelta(seconds=1))
    wanted = set(takewhile(lambda wall: wall <= last, calendar))
    return {at_s for at_s, wall in walls.items() if wall in wanted}


@settings(deadline=None)
@given(rhythms, moments)
def test_fire_times_rise_and_are_the_same_from_wherever_one_looks(rhythm: Cron | Interval, after_s: int) -> None:
    """Strictly after the moment; and looking again from one of them gives the next one."""
    times = list(islice(rhythm.after(after_s), 6))
    assert all(low < high for low, high in pairwise([after_s, *times]))
    for low, high in pairwise(times):
        assert next(rhythm.after(low)) == high
        assert next(rhythm.after(high - 1)) == high


@settings(deadline=None)
@given(crons, moments)
@example(Cron("* * * * *", LORD_HOWE), seconds("2026-04-05T01:29", LORD_HOWE))
def test_no_fire_time_is_left_out(cron: Cron, after_s: int) -> None:
    """Between two of them there is no minute at which the clock shows what the expression says, but for the second
    time that it shows a fixed time."""
    after_s -= after_s % 60
    window = range(after_s + 60, after_s + 4 * 3600, 60)
    found = set(cron.between(after_s, window[-1], 1000).newest)
    shown = shown_in(cron, window)
    if not cron.is_fixed:
        assert found == shown
        return
    for at_s in found ^ shown:
        again = datetime.fromtimestamp(at_s, cron.zone).fold == 1
        leapt = (
            datetime.fromtimestamp(at_s, cron.zone).utcoffset()
            != datetime.fromtimestamp(at_s - 1, cron.zone).utcoffset()
        )
        assert again if at_s in shown else leapt


@settings(deadline=None)
@given(rhythms, moments, st.integers(0, 400_000), st.integers(1, 20))
def test_between_counts_what_after_gives(rhythm: Cron | Interval, after_s: int, span_s: int, keep: int) -> None:
    """The number is exact as long as they are few, and the newest ones are the newest."""
    to_s = after_s + span_s
    times = list(islice(takewhile(lambda at_s: at_s <= to_s, rhythm.after(after_s)), MAX_COUNTED))
    if len(times) < MAX_COUNTED:
        assert rhythm.between(after_s, to_s, keep) == (len(times), tuple(times[-keep:]))


def test_a_long_absence_costs_little() -> None:
    """Fifty years of seconds are counted, and of fifty years of minutes the newest are found."""
    assert Interval(1, 0).between(0, NOON, 3) == (NOON, (NOON - 2, NOON - 1, NOON))
    every_minute = Cron("* * * * *", ZURICH).between(0, NOON, 3)
    assert every_minute == (MAX_COUNTED, (NOON - 120, NOON - 60, NOON))


# --- due ------------------------------------------------------------------------------------------------

HOURLY = Interval(3600, NOON)


@pytest.mark.parametrize(
    ("facts", "now_s", "expected"),
    [
        # On time, a little late, and too late.
        ({}, NOON + 3600, Due((NOON + 3600,), 0, NOON + 3600, NOON + 7200)),
        ({}, NOON + 3660, Due((NOON + 3600,), 0, NOON + 3600, NOON + 7200)),
        ({}, NOON + 3661, Due((), 1, NOON + 3600, NOON + 7200)),
        ({"late_s": 0}, NOON + 3600.5, Due((), 1, NOON + 3600, NOON + 7200)),
        ({"late_s": 1800}, NOON + 5400, Due((NOON + 3600,), 0, NOON + 3600, NOON + 7200)),
        # Not yet; and the clock was set back.
        ({}, NOON + 3599.9, Due((), 0, NOON, NOON + 3600)),
        ({}, NOON - 10**6, Due((), 0, NOON, NOON + 3600)),
        # Three are missed.
        ({}, NOON + 3 * 3600 + 1800, Due((), 3, NOON + 3 * 3600, NOON + 4 * 3600)),
        ({}, NOON + 3 * 3600, Due((NOON + 3 * 3600,), 2, NOON + 3 * 3600, NOON + 4 * 3600)),
        ({"catch_up": "last"}, NOON + 3 * 3600 + 1800, Due((NOON + 10800,), 2, NOON + 10800, NOON + 14400)),
        (
            {"catch_up": "all"},
            NOON + 3 * 3600 + 1800,
            Due((NOON + 3600, NOON + 7200, NOON + 10800), 0, NOON + 10800, NOON + 14400),
        ),
        # It has an end.
        ({"until_s": NOON + 7200}, NOON + 7200, Due((NOON + 7200,), 1, NOON + 7200, None)),
        ({"until_s": NOON + 7199}, NOON + 86_400, Due((), 1, NOON + 3600, None)),
        ({"until_s": NOON}, NOON + 86_400, Due((), 0, NOON, None)),
    ],
)
def test_what_is_due(facts: dict[str, object], now_s: float, expected: Due) -> None:
    """An hourly timetable of which all up to noon is decided."""
    assert due(Timetable(HOURLY, **facts), NOON, now_s) == expected  # type: ignore[arg-type]


def test_of_a_long_absence_only_so_many_are_made_up_for() -> None:
    """The newest; the others are counted."""
    found = due(Timetable(HOURLY, catch_up="all"), NOON, NOON + 1000 * 3600)
    assert len(found.launch) == MAX_CATCH_UP
    assert found.launch[-1] == NOON + 1000 * 3600
    assert found.missed == 1000 - MAX_CATCH_UP


def test_jitter_is_a_part_of_the_fire_time() -> None:
    """The same for each who asks, another one for each time and schedule, and below its bound."""
    one, other = (Timetable(HOURLY, seed=seed, jitter_s=600.0) for seed in ("one", "other"))
    delays = [one.begin_s(NOON + 3600 * number) - (NOON + 3600 * number) for number in range(50)]
    assert delays == [one.begin_s(NOON + 3600 * number) - (NOON + 3600 * number) for number in range(50)]
    assert all(0 <= delay < 600 for delay in delays)
    assert len(set(delays)) == 50
    assert max(delays) - min(delays) > 300
    assert one.begin_s(NOON) != other.begin_s(NOON)
    begin_s = one.begin_s(NOON + 3600)
    assert due(one, NOON, begin_s - 0.01).launch == ()
    assert due(one, NOON, begin_s).launch == (NOON + 3600,)
    assert due(one, NOON, begin_s + 60).launch == (NOON + 3600,)
    assert due(one, NOON, begin_s + 60.01).missed == 1


tables = st.builds(
    Timetable,
    rhythm=rhythms,
    seed=st.sampled_from(["one", "other"]),
    jitter_s=st.sampled_from([0.0, 0.0, 1.0, 100.0, 5000.0]),
    late_s=st.sampled_from([0.0, 60.0, 10_000.0]),
    catch_up=st.sampled_from(timetable.CATCH_UPS),
    until_s=st.none() | moments.map(float),
)


@settings(deadline=None)
@given(tables, moments, st.lists(st.floats(-1e5, 1e5) | st.floats(0, 1e3), max_size=6))
def test_each_fire_time_is_decided_once(table: Timetable, begin_s: int, leaps: list[float]) -> None:
    """However the clock goes, also back: what is launched rises strictly, nothing is launched before its time, and all
    that has passed was launched or missed."""
    decided_s, now_s, launched, missed = begin_s, float(begin_s), list[int](), 0
    for leap in leaps:
        now_s += leap
        found = due(table, decided_s, now_s)
        assert all(decided_s < fire_s <= now_s and table.begin_s(fire_s) <= now_s for fire_s in found.launch)
        assert found.launch == tuple(sorted(set(found.launch)))
        if table.catch_up == "skip":
            assert all(now_s - table.begin_s(fire_s) <= table.late_s for fire_s in found.launch)
        if table.catch_up != "all":
            assert len(found.launch) <= 1
        assert found.next_s is None or found.next_s > found.decided_s >= decided_s
        launched += found.launch
        missed += found.missed
        decided_s = found.decided_s
        if found.next_s is not None:
            assert table.begin_s(found.next_s) > now_s
    assert launched == sorted(set(launched))
    between = table.rhythm.between(begin_s, decided_s, 1)
    if isinstance(table.rhythm, Interval) or between.number < MAX_COUNTED:
        assert len(launched) + missed == between.number
    if launched and table.catch_up == "all" and between.number <= MAX_CATCH_UP:
        assert missed == 0


# --- turns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlap", "is_busy", "queued", "new", "expected"),
    [
        ("allow", True, (), (1, 2), Turn((1, 2), (), 0)),
        ("skip", False, (), (1,), Turn((1,), (), 0)),
        ("skip", False, (), (1, 2, 3), Turn((3,), (), 2)),
        ("skip", True, (), (1, 2), Turn((), (), 2)),
        ("queue", False, (), (1,), Turn((1,), (), 0)),
        ("queue", True, (), (1,), Turn((), (1,), 0)),
        ("queue", True, (1,), (2,), Turn((), (2,), 1)),
        ("queue", True, (1,), (), Turn((), (1,), 0)),
        ("queue", False, (1,), (), Turn((1,), (), 0)),
        ("queue", False, (1,), (2,), Turn((1,), (2,), 0)),
        ("queue", False, (), (1, 2, 3), Turn((1,), (3,), 1)),
        ("replace", False, (), (1, 2), Turn((2,), (), 1)),
        ("replace", True, (), (1,), Turn((), (1,), 0, True)),
        ("replace", True, (1,), (), Turn((), (1,), 0)),
        ("replace", True, (1,), (2,), Turn((), (2,), 1, True)),
        ("replace", False, (1,), (), Turn((1,), (), 0)),
    ],
)
def test_whose_turn_it_is(
    overlap: timetable.Overlap, is_busy: bool, queued: tuple[int, ...], new: tuple[int, ...], expected: Turn
) -> None:
    """The four policies, with room for one that waits."""
    assert take_turn(overlap, is_busy, queued, new, 1) == expected


@settings(deadline=None)
@given(
    st.sampled_from(OVERLAPS),
    st.booleans(),
    st.lists(st.integers(0, 9), max_size=3, unique=True).map(sorted),
    st.lists(st.integers(10, 19), max_size=5, unique=True).map(sorted),
    st.integers(1, 3),
)
def test_a_turn_accounts_for_all(
    overlap: timetable.Overlap, is_busy: bool, queued: list[int], new: list[int], room: int
) -> None:
    """Each is launched, waits or is skipped; at most `room` wait; two run at the same time only if that is allowed."""
    turn = take_turn(overlap, is_busy, queued, new, room)
    assert len(turn.launch) + len(turn.queued) + turn.skipped == len(queued) + len(new)
    assert [*turn.launch, *turn.queued] == sorted({*turn.launch, *turn.queued})
    assert len(turn.queued) <= room
    if overlap != "allow":
        assert len(turn.launch) + is_busy <= 1
    if not is_busy and (queued or new):
        assert turn.launch
