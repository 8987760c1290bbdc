"""``prunus schedule``: what is told at once, and schedules of a real daemon by their names."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from prunus.runtime.cli.schedule import _short_moment
from tests.runtime.shell import Shell, daemon_in
from tests.runtime.terminal import terminal

ADD = "tests.runtime.workflows:Add"


@pytest.fixture
def alone(tmp_path: Path) -> Shell:
    """A profile without a daemon."""
    shell = Shell(tmp_path)
    shell("init")
    return shell


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with daemon_in(tmp_path_factory.mktemp("schedules")) as shell:
        yield shell


def schedules(shell: Shell) -> dict[str, Any]:
    """What the list says, by names."""
    return {each["name"]: each for each in json.loads(shell("schedule", "list", "--json").stdout)}


def until(shell: Shell, name: str, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """What is known of a schedule as soon as a condition holds of it."""
    while True:
        facts: dict[str, Any] = json.loads(shell("schedule", "show", "--json", name).stdout)
        if holds(facts):
            return facts


# --- without a daemon -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["61 * * * *", ADD, "a=1"], "the minute '61' in '61 * * * *' is wrong: it is 0 to 59"),
        (["@daily", ADD, "a=1"], "for @daily write '0 0 * * *'"),
        (["* * *", ADD, "a=1"], "has 3 fields, and a cron expression has five"),
        ([ADD, "a=1"], "a cron expression in quotes first"),
        (["0", "2", "*", "*", "*", ADD], "a cron expression in quotes first"),
        (["0 2 * * *"], "say what to launch"),
        (["--every", "1h", "0 2 * * *", ADD], "and not by both"),
        (["--every", "90", ADD, "a=1"], "--every: '90' is no interval"),
        (["0 2 * * *", ADD, "a=1", "--anchor", "2026-01-01"], "--anchor goes with --every"),
        (["--every", "1h", ADD, "a=1", "--anchor", "soon"], "--anchor: 'soon' is no date"),
        (["0 2 * * *", ADD, "a=1", "--until", "soon"], "--until: 'soon' is no date"),
        (["0 2 * * *", ADD, "a=1", "--timezone", "Mars"], "--timezone: 'Mars' is no time zone"),
        (["0 2 * * *", ADD, "a=1", "--jitter", "long"], "--jitter: 'long' is no duration"),
        (["0 2 * * *", ADD, "a=1", "--name", "two words"], "--name: 'two words' is no name"),
        (["0 2 * * *", ADD, "a=1", "--overlap", "never"], "'never' is not one of"),
        (["0 2 * * *", ADD, "a"], "'a' is not of the form key=value"),
        (["0 2 * * *", ADD, "a=1", "--resource", "gpu=some"], "--resource: 'gpu=some'"),
    ],
)
def test_what_is_written_wrongly_is_told_at_once(alone: Shell, words: list[str], complaint: str) -> None:
    """Exit code 2, and what would be right."""
    assert complaint in " ".join(alone.error("schedule", "add", *words, code=2).split())


def test_the_class_and_its_inputs_are_checked_at_once(alone: Shell) -> None:
    """The daemon is not asked; without one it is said how to start it."""
    assert "inputs.a: expected int" in alone.error("schedule", "add", "0 2 * * *", ADD, "a=one")
    assert "no module 'nowhere'" in alone.error("schedule", "add", "0 2 * * *", "nowhere:Cls")
    assert "never comes" in alone.error("schedule", "add", "0 0 */10 4 5L", ADD, "a=1")
    assert "longer than the interval" in alone.error(
        "schedule", "add", "--every", "1min", ADD, "a=1", "--jitter", "2min"
    )
    for words in ["add", "0 2 * * *", ADD, "a=1"], ["list"], ["show", "x"], ["pause", "x"], ["remove", "x"]:
        assert "`prunus daemon start` starts it" in alone.error("schedule", *words)


# --- with a daemon --------------------------------------------------------------------------------------


def test_the_life_of_a_schedule(shell: Shell) -> None:
    """It runs each second, rests while it is paused, and is removed; then its name is free again."""
    ended = shell("schedule", "add", "--every", "1s", ADD, "a=1", "b=41", "--name", "often", "--tag", "much")
    assert ended.stdout == "often\n"
    assert "every 1s; its first run begins at " in ended.stderr
    facts = until(shell, "often", lambda facts: facts["runs"] >= 2 and facts["last_runs"][-1]["state"] == "finished")
    assert facts["pid"] == "schedule-often"
    first = facts["last_runs"][-1]["pid"]
    assert re.fullmatch(r"schedule-often@\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d)?Z", first)
    run = shell.record(first)
    assert (run["outputs"], run["tags"], run["parent"]) == ({"sum": 42}, ["much"], "schedule-often")

    assert shell("schedule", "pause", "often", "-m", "too often").stdout == "paused schedule-often\n"
    paused = until(shell, "often", lambda facts: True)
    assert (paused["state"], paused["why"]) == ("paused", "too often")
    assert re.search(r"^often .*  paused  too often  ", shell("schedule", "list").stdout, re.MULTILINE)
    number = paused["runs"]
    by_hand = shell("schedule", "run-now", "often").stdout.strip()
    assert shell.until(by_hand, lambda facts: facts["state"] == "finished")["outputs"] == {"sum": 42}
    assert until(shell, "often", lambda facts: True)["runs"] == number

    assert shell("schedule", "play", "often").stdout == "playing schedule-often\n"
    until(shell, "often", lambda facts: facts["runs"] > number)
    assert "there is a schedule often already" in shell.error(
        "schedule", "add", "0 2 * * *", ADD, "a=1", "--name", "often"
    )
    assert shell("schedule", "remove", "often").stdout == "removed schedule-often\n"
    assert "often" not in schedules(shell)
    assert until(shell, "often", lambda facts: True)["state"] == "killed"
    assert "schedule-often: " in shell("schedule", "pause", "often", code=1).stderr

    shell("schedule", "add", "--every", "1d", ADD, "a=1", "--name", "often")
    assert schedules(shell)["often"]["pid"] == "schedule-often-2"
    shell("schedule", "remove", "often")


def test_list_and_show_are_for_people(shell: Shell) -> None:
    """In words, with the next runs in its zone and here; names come from classes."""
    words = ["schedule", "add", "30 2 * * MON-FRI", "flow:Talk"]
    assert shell(*words, "--timezone", "Asia/Tokyo", "--jitter", "5min", "--queue", "gpu").stdout == "talk\n"
    assert shell(*words, "--timezone", "Asia/Tokyo", "--max-runs", "2").stdout == "talk-2\n"
    listed = shell("schedule", "list").stdout
    assert "at 02:30 on Monday through Friday, Asia/Tokyo" in listed
    assert len(re.findall(r"\d{4}-\d\d-\d\d 02:3\d(?::\d\d)? JST", listed)) == 2
    shown = shell("schedule", "show", "talk").stdout
    for line in [
        r"launches +flow:Talk",
        r"jitter +up to 5min",
        r"catch up +skip",
        r"queue +gpu",
        r"in +Asia/Tokyo +here \(",
    ]:
        assert re.search(line, shown), line
    assert len(re.findall(r"\d\d:\d\d(?::\d\d)? JST", shown)) == 5
    assert len(json.loads(shell("schedule", "show", "talk-2", "--json").stdout)["next_runs"]) == 2
    assert "there is no schedule talks; there are: talk, talk-2" in shell.error("schedule", "show", "talks")
    assert shell("schedule", "remove", "talk", "talk-2").stdout.count("removed") == 2
    assert {"talk", "talk-2"}.isdisjoint(schedules(shell))
    assert shell("schedule", "list", "--all").stdout.count("killed") >= 2


def test_a_list_fits_into_a_narrow_terminal(shell: Shell) -> None:
    """In 80 columns names, states and times are whole: times are short, and what matters less is left out."""
    talk, long_name = ["flow:Talk", "--timezone", "UTC"], "the-nightly-backup-of-all-the-data-of-the-group"
    shell("schedule", "add", "--every", "1d", *talk, "--name", long_name)
    shell("schedule", "add", "--every", "2d", *talk, "--name", "busy")
    shell("schedule", "run-now", "busy")
    shell("schedule", "pause", long_name, "-m", "the disk of the cluster is full of things that nobody needs any more")
    with terminal(shell, "schedule", "list", columns=80, TZ="UTC") as shown:
        text = shown.end()
    with terminal(shell, "schedule", "list", columns=240) as shown:
        wide = shown.end()
    shell("schedule", "remove", long_name, "busy")
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert re.match(r"name +state +next run +last run *\n", text)
    moment = r"(\d\d\d\d-)?\d\d-\d\d \d\d:\d\d(:\d\d)?"
    assert re.search(rf"^busy +on +{moment} +(\d\d-\d\d )?\d\d:\d\d(:\d\d)?, \w+ *$", text, re.MULTILINE)
    folded = re.search(r"^(the-\S+) +paused +\n(\S+) *$", text, re.MULTILINE)
    assert folded is not None
    assert folded[1] + folded[2] == long_name
    assert re.search(rf"^busy +Talk +every 2d +on .*  {moment} UTC  .* UTC, \w+ +0 +0 *$", wide, re.MULTILINE)
    assert re.search(rf"^{long_name} .* paused  the disk of the cluster is full .*", wide, re.MULTILINE)


@pytest.mark.parametrize(
    ("zone", "moment", "short"),
    [
        ("UTC", "2026-11-22 13:00", "13:00"),
        ("UTC", "2026-11-22 13:00:30", "13:00:30"),
        ("UTC", "2026-11-23 02:30", "11-23 02:30"),
        ("UTC", "2027-01-01 06:00", "2027-01-01 06:00"),
        ("Europe/Zurich", "2026-11-23 02:30", "11-23 02:30 CET"),
        ("Africa/Abidjan", "2026-11-23 02:30", "11-23 02:30"),  # as late as here
        ("Asia/Tokyo", "2026-11-23 02:30", "11-23 02:30 JST"),  # it is that day there, and not here
    ],
)
def test_short_moments(zone: str, moment: str, short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what goes without saying to who is in UTC at 2026-11-22 20:00."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    try:
        at_s = datetime.fromisoformat(moment).replace(tzinfo=ZoneInfo(zone)).timestamp()
        now_s = datetime(2026, 11, 22, 20, tzinfo=ZoneInfo("UTC")).timestamp()
        assert _short_moment(at_s, ZoneInfo(zone), now_s) == short
    finally:
        monkeypatch.undo()
        time.tzset()


def test_without_any_schedule_the_list_says_how_to_make_one(shell: Shell) -> None:
    """On the standard error; the output is empty."""
    for name in schedules(shell):
        shell("schedule", "remove", name)
    ended = shell("schedule", "list")
    assert (ended.stdout, "`prunus schedule add" in ended.stderr) == ("", True)
    assert json.loads(shell("schedule", "list", "--json").stdout) == []
