"""What ``prunus top`` shows: rows and lines, made of facts alone."""

from __future__ import annotations

from typing import Any

import pytest
from rich.cells import cell_len

from prunus.messaging.inventory import QueueStatistics
from prunus.persistence.persister import Event, LogLine, Query, Record
from prunus.runtime.top.model import (
    PALETTE,
    RECENT_S,
    SAMPLE_S,
    SAMPLES,
    SORTS,
    Columns,
    Details,
    Filter,
    Look,
    Rates,
    Row,
    Service,
    arrange,
    brief,
    condition,
    details_text,
    headline,
    is_recent,
    merged,
    next_sort,
    process_counts,
    process_heading,
    process_line,
    queue_lines,
    service_lines,
    services_width,
    size,
    sparkline,
    what,
)
from tests.runtime.brokers import session, status

NOW = 1_000_000.0
WIDTHS = (20, 40, 76, 100, 156)


def record(pid: str, **facts: Any) -> Record:
    given: dict[str, Any] = {
        "class_id": "flow:Relax",
        "state": "running",
        "play": "playing",
        "created_at": NOW - 60,
        "updated_at": NOW - 5,
        "epoch": 1,
        "seq": 3,
    }
    return Record(pid=pid, **given | facts)


def family() -> list[Record]:
    """A parent with two children, one of which has one, and a stranger; the newest first."""
    return [
        record("stranger", created_at=NOW - 1),
        record("d", parent="b", created_at=NOW - 2),
        record("c", parent="a", created_at=NOW - 3),
        record("b", parent="a", created_at=NOW - 4),
        record("a", created_at=NOW - 5),
    ]


# --- order ------------------------------------------------------------------------------------------


def test_children_are_below_their_parent_the_oldest_first() -> None:
    """Each with what leads from its parent to it."""
    rows = arrange(family(), "newest", tree=True)
    assert [(row.guide, row.record.pid) for row in rows] == [
        ("", "stranger"),
        ("", "a"),
        ("├ ", "b"),
        ("│ └ ", "d"),
        ("└ ", "c"),
    ]
    plain_rows = arrange(family(), "newest", tree=True, utf8=False)
    assert [row.guide for row in plain_rows] == ["", "", "|-", "| `-", "`-"]


def test_a_child_without_its_parent_stands_alone() -> None:
    """Its parent may have ended long ago."""
    rows = arrange([record("d", parent="gone")], "newest", tree=True)
    assert [(row.guide, row.record.pid) for row in rows] == [("", "d")]


def test_a_long_chain_of_children_is_arranged_too() -> None:
    """However deep it is."""
    chain = [record(str(number), parent=str(number - 1), created_at=NOW + number) for number in range(1, 3000)]
    rows = arrange([*chain, record("0", created_at=NOW)], "newest", tree=True)
    assert [row.record.pid for row in rows] == [str(number) for number in range(3000)]
    columns = Columns.fit(80, rows)
    assert cell_len(process_line(rows[-1], columns, NOW).plain) == 80


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("newest", ["new", "stuck", "far", "old"]),
        ("last change", ["old", "new", "stuck", "far"]),
        ("state", ["stuck", "new", "far", "old"]),
        ("class", ["old", "new", "stuck", "far"]),
        ("progress", ["far", "new", "stuck", "old"]),
    ],
)
def test_the_orders(sort: str, order: list[str]) -> None:
    """In a flat list; what is equal is ordered by age."""
    rows = [
        record("new", created_at=NOW - 1, updated_at=NOW - 2, progress=0.1),
        record("stuck", created_at=NOW - 2, updated_at=NOW - 3, play="paused"),
        record("far", created_at=NOW - 3, updated_at=NOW - 4, progress=0.9, state="waiting"),
        record("old", created_at=NOW - 4, updated_at=NOW - 1, state="finished", class_id="flow:Alpha"),
    ]
    assert [row.record.pid for row in arrange(rows, sort, tree=False)] == order


def test_what_goes_on_comes_before_what_has_ended() -> None:
    """Many short processes hide nothing; children stay with their parent."""
    rows = [record("short", state="finished"), *family()[1:4], record("a", created_at=NOW - 99)]
    rows[1] = record("d", parent="b", created_at=NOW - 2, state="finished")
    arranged = arrange(rows, "newest", tree=True, live_first=True)
    assert [row.record.pid for row in arranged] == ["a", "b", "d", "c", "short"]
    assert [row.record.pid for row in arrange(rows, "newest", tree=False, live_first=True)] == [
        "c",
        "b",
        "a",
        "d",
        "short",
    ]


def test_each_order_leads_to_the_next() -> None:
    """And the last to the first."""
    seen = ["newest"]
    for _ in SORTS:
        seen.append(next_sort(seen[-1]))
    assert seen == [*SORTS, "newest"]


def test_rows_of_several_answers_are_merged() -> None:
    """Each process once, the newest first."""
    old, new = record("a", created_at=NOW - 9), record("b", created_at=NOW - 1)
    again = record("a", created_at=NOW - 9, state="finished")
    assert merged([old, new], [again]) == [new, again]


def test_what_ended_a_moment_ago_is_still_there() -> None:
    """And what goes on is, whenever it changed last."""
    assert is_recent(record("a", updated_at=0.0), NOW)
    assert is_recent(record("a", state="finished", updated_at=NOW - RECENT_S + 1), NOW)
    assert not is_recent(record("a", state="finished", updated_at=NOW - RECENT_S - 1), NOW)


# --- filter -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("", True),
        ("relax", True),
        ("RELAX", True),
        ("class:relax", True),
        ("tag:relax", False),
        ("tag:demo", True),
        ("state:run", False),
        ("state:wait", True),
        ("state:paused", True),
        ("state:aus", False),
        ("paused licence", True),
        ("paused tree", False),
        ("worker:worker-1", True),
        ("worker:worker-2", False),
        ("step:fit", True),
        ("pid:00ff", True),
        ("tag:", True),
        ("nonsense:relax", False),
    ],
)
def test_a_filter_holds_if_every_word_does(text: str, holds: bool) -> None:
    """A word with a known name in front is looked for there, any other one everywhere."""
    row = record(
        "00ff",
        state="waiting",
        play="paused",
        tags=("demo",),
        step="fit",
        status="no licence is free",
        owner=f"worker-1-{'0' * 32}",
    )
    assert Filter.read(text).holds(row) is holds


def test_the_store_is_asked_for_the_states_that_a_filter_names() -> None:
    """As far as the store knows them: the others it would not find."""
    assert Filter.read("state:wait x").narrow(Query()).states == ("waiting",)
    assert Filter.read("state:paused").narrow(Query()).states == ()
    assert Filter.read("relax").narrow(Query()).states == ()


# --- processes --------------------------------------------------------------------------------------


def test_every_line_is_as_wide_as_the_screen() -> None:
    """Also with wide letters, long names and at any width; text that a terminal would obey is shown in letters."""
    rows = [
        Row(record("x" * 36, class_id="flow:" + "VeryLongName" * 9, step="s" * 50, progress=0.5, detail="分子" * 40)),
        Row(record("b", state="waiting", waits=("c",), status="\x1b[31mred\nnext"), "│ └ "),
        Row(record("c", state="excepted", aside="gone")),
        Row(record("d", aside="its class is gone", owner="w" * 90)),
    ]
    for width in WIDTHS:
        columns = Columns.fit(width, rows)
        lines = [process_heading(columns), *(process_line(row, columns, NOW) for row in rows)]
        assert {cell_len(line.plain) for line in lines} == {width}
        assert not any("\x1b" in line.plain or "\n" in line.plain for line in lines)


def test_a_line_says_how_a_process_is() -> None:
    """Its state, or why it does not go on; its progress; what it waits for."""
    rows = [
        Row(record("a", progress=0.4, detail="relaxing", step="run", owner=f"worker-2-{'0' * 32}")),
        Row(record("b", play="paused", status="looking at it")),
        Row(record("c", aside="its class is gone")),
        Row(record("d", state="waiting", names=("verdict",))),
        Row(record("e", state="waiting", wake_at=NOW + 7200)),
        Row(record("f", state="finished", updated_at=NOW - 50, progress=0.4, status="done")),
    ]
    columns = Columns.fit(156, rows)
    lines = [" ".join(process_line(row, columns, NOW).plain.split()) for row in rows]
    assert lines == [
        "a Relax ● running run ━━━───── 40% 1m00s worker-2 relaxing",
        "b Relax ‖ paused 1m00s looking at it",
        "c Relax ! set aside 1m00s its class is gone",
        "d Relax ◌ waiting 1m00s waits for the message verdict",
        "e Relax ◌ waiting 1m00s wakes in 2h00m",
        "f Relax ✓ finished 10s done",
    ]
    assert process_line(rows[0], columns, NOW, utf8=False).plain.isascii()


def test_on_a_small_screen_progress_is_a_number_and_workers_are_left_out() -> None:
    """So that there is room for what a process says."""
    rows = [Row(record("a", progress=1.7, detail="relaxing", owner="worker-1"))]
    line = process_line(rows[0], Columns.fit(76, rows), NOW).plain
    assert "100%" in line
    assert "relaxing" in line
    assert "worker-1" not in line


def test_the_condition_is_one_word() -> None:
    """An end counts more than what held it before."""
    assert condition(record("a", state="killed", play="paused", aside="x")) == "killed"
    assert condition(record("a", aside="x", play="paused")) == "aside"
    assert condition(record("a", play="pausing")) == "pausing"


def test_what_it_says_comes_before_what_it_waits_for() -> None:
    """And nothing is said of what has ended without a word."""
    assert what(record("a", state="waiting", waits=("b", "c"), status="two children"), NOW) == "two children"
    assert what(record("a", state="waiting", waits=("b", "c")), NOW) == "waits for 2 processes"
    assert what(record("a", state="finished", waits=("b",)), NOW) == ""


def test_the_counts_of_all_processes() -> None:
    """Whatever is shown of them."""
    assert process_counts(Look(NOW, status()), 2) == "2 running · 1,000 finished"
    assert process_counts(Look(NOW, status(), is_cut=True), 100) == "2 running · 1,000 finished · the first 100 shown"
    assert process_counts(Look(NOW, status(processes={})), 0) == "none yet"


# --- queues and services ----------------------------------------------------------------------------


def test_rates_are_measured_between_two_looks() -> None:
    """Not more often than `SAMPLE_S`, and a counter that begins anew is no rate."""
    rates = Rates()
    rates.observe(0.0, {"q": 10})
    assert rates.of("q") == []
    rates.observe(SAMPLE_S / 2, {"q": 15})
    assert rates.of("q") == []
    rates.observe(2.0, {"q": 30})
    assert rates.of("q") == [10.0]
    rates.observe(4.0, {"q": 0})
    rates.observe(6.0, {"q": 8})
    assert rates.of("q") == [10.0, 4.0]
    for number in range(2 * SAMPLES):
        rates.observe(10.0 + 2 * number, {"q": 100})
    assert len(rates.of("q")) == SAMPLES
    rates.observe(1000.0, {})
    assert rates.of("q") == []


def test_a_sparkline_has_its_newest_rate_at_the_right_end() -> None:
    """Scaled to the greatest of those shown."""
    assert sparkline([0, 5, 10], 5) == "  ▁▅█"
    assert sparkline([99, 0, 5, 10], 3) == "▁▅█"
    assert sparkline([0, 0], 2) == "▁▁"
    assert sparkline([], 3) == "   "
    assert sparkline([1, 2], 0) == ""
    assert sparkline([0, 1], 2, utf8=False) == "_#"


def test_the_busiest_queues_come_first_and_too_many_are_counted() -> None:
    """Each line as wide as its panel."""
    rates = Rates()
    rates.observe(0.0, {"render": 0})
    rates.observe(2.0, {"render": 6})
    for width in WIDTHS[1:]:
        lines = queue_lines(status(), rates, width, 6)
        assert {cell_len(line.plain) for line in lines} == {width}
        assert [line.plain.split()[0] for line in lines] == ["queue", "render", "mail"]
    assert lines[1].plain.split() == ["render", "1,200", "5", "4", "5", "5.0/s", "█"]
    many = {f"q{number}": QueueStatistics(ready=number) for number in range(9)}
    lines = queue_lines(status(queues=many), rates, 60, 4)
    assert [line.plain.split()[0] for line in lines] == ["queue", "q8", "q7", "and"]
    assert lines[-1].plain.strip() == "and 7 more queues"
    assert "no task" in queue_lines(status(queues={}), rates, 60, 4)[-1].plain


def test_services_show_their_use_and_what_is_wrong() -> None:
    """One that does not run is said to be so; of too many those that are well are counted."""
    services = [
        Service("daemon", "running", 1, 90_000.0, 0.001, 32_000_000),
        Service("broker", "running", 2, 90_000.0, 0.25, 64_000_000, restarts=2),
        Service("worker-1", "running", 3, 5.0, 1.5, 1_200_000_000, held=4, room=6),
        Service("worker-2", "not running"),
    ]
    lines = [" ".join(line.plain.split()) for line in service_lines(services, 60, 9)]
    assert lines == [
        "service cpu mem up starts works on",
        "● daemon 0% 32 MB 1d1h",
        "● broker 25% 64 MB 1d1h +2",
        "● worker-1 150% 1 GB 5.0s 4 of 10",
        "○ worker-2 not running",
    ]
    narrow = [" ".join(line.plain.split()) for line in service_lines(services, 28, 9)]
    assert narrow[0] == "service up works on"
    assert narrow[3] == "● worker-1 5.0s 4 of 10"
    assert services_width(services, 80) == 32
    assert services_width(services, 120) == 50
    assert "works on" in service_lines(services, 46, 9)[0].plain
    few = [line.plain.strip() for line in service_lines(services, 36, 4)]
    assert few[-1] == "and 2 more"
    assert any("worker-2" in line for line in few)
    for width in WIDTHS[1:]:
        assert {cell_len(line.plain) for line in service_lines(services, width, 9)} == {width}


def test_the_first_line_says_whether_all_is_well() -> None:
    """Which daemon, and what is the matter with it."""
    look = Look(NOW, status())
    for width in (40, 80, 200):
        assert cell_len(headline(look, "my/profile", None, width).plain) == width
    assert "broker up 1h01m" in headline(look, "mine", None, 80).plain
    assert "disk full" in headline(Look(NOW, status(disk_full=True)), "mine", None, 120).plain
    assert "reconnecting" in headline(look, "mine", "reconnecting ...", 80).plain
    assert "connecting" in headline(None, "mine", None, 80).plain
    assert session().role == "owner"


# --- details ----------------------------------------------------------------------------------------


def test_details_tell_the_story_of_a_process() -> None:
    """Facts, inputs, failure, the end of its history and of its log."""
    row = record("0" * 28 + "deadbeef", state="excepted", tags=("demo",), parent="p")
    text = details_text(
        Details(
            record=row,
            inputs={"element": "Cu"},
            failure="Traceback\nConnectionError: no licence",
            events=(
                Event(subject="created.running", at=NOW - 60),
                Event(subject="claimed", at=NOW - 59),
                Event(subject="running.excepted", at=NOW - 50, step="run", note="ConnectionError: no licence"),
            ),
            lines=(LogLine(at=NOW - 55, text="begun\x07"), LogLine(at=NOW - 50, text="oh", level="ERROR")),
        ),
        NOW,
    )
    for part in ("✗ Relax", "excepted", "why", "prunus retry", "element: Cu", "ConnectionError: no licence", "demo"):
        assert part in text.plain
    assert "claimed" not in text.plain
    assert "\x07" not in text.plain
    assert text.plain.index("inputs") < text.plain.index("failure") < text.plain.index("history")
    assert PALETTE["bad"] in {str(span.style) for span in text.spans}


def test_long_inputs_are_cut() -> None:
    """With the number of lines that are not shown."""
    text = details_text(Details(record=record("a"), inputs={f"k{number}": number for number in range(99)}), NOW).plain
    assert "k15: 15" in text
    assert "k16: 16" not in text
    assert "... 83 more lines" in text


# --- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0.0s"),
        (9.94, "9.9s"),
        (10, "10s"),
        (60, "1m00s"),
        (3599, "59m59s"),
        (3600, "1h00m"),
        (86_399, "23h59m"),
        (90_000, "1d1h"),
        (99 * 86_400 + 86_399, "99d23h"),
        (100 * 86_400, "100d"),
        (999 * 86_400, "999d"),
        (4000 * 86_400, "10y"),
    ],
)
def test_a_duration_has_at_most_six_characters(seconds: float, text: str) -> None:
    """In the two units that matter."""
    assert brief(seconds) == text
    assert len(text) <= 6


def test_a_size_has_at_most_six_characters() -> None:
    """In powers of ten."""
    assert [size(number) for number in (0, 999, 999.6, 31_400_000, 2e9, 5e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "31 MB",
        "2 GB",
        "5 TB",
    ]
