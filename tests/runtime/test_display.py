"""What people see of processes, from rows alone."""

import io
import shlex
from typing import Any

import pytest
from rich.console import Console, RenderableType

from prunus import Process, ProcessSpec, Wait, message
from prunus.persistence.persister import Event, LogLine, Record
from prunus.processes import Outcomes
from prunus.runtime import display
from prunus.runtime.display import Family
from prunus.runtime.runner import checkpoint_of

UUID = "01a1fe56-938c-794d-a81d-48daba94997f"
NOW = 1_000_000.0


def row(pid: str = UUID, state: str = "running", **facts: Any) -> Record:
    """A row of the store, five seconds old."""
    given: dict[str, Any] = {"play": "playing", "created_at": NOW - 5, "updated_at": NOW, "epoch": 1, "seq": 1} | facts
    return Record(pid=pid, class_id="pkg.mod:Cls", state=state, **given)


def drawn(what: RenderableType, width: int = 100) -> str:
    """What a terminal of this width shows."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def items(**counts: int) -> list[Record]:
    """So many children of each state, in this order."""
    states = [state for state, count in counts.items() for _ in range(count)]
    return [row(f"{UUID}.1.{number}", state, parent=UUID) for number, state in enumerate(states)]


def family(rows: list[Record], **facts: Any) -> Family:
    chosen = display.choose_children(rows)
    return Family(
        row(state="waiting", step="end"),
        children=tuple(Family(each) for each in rows if each.pid in chosen),
        others=tuple(each for each in rows if each.pid not in chosen),
        **facts,
    )


@pytest.mark.parametrize(
    ("pid", "shown"),
    [(UUID, "ba94997f"), (f"{UUID}.3.17", "ba94997f.3.17"), ("survey", "survey"), ("survey.1.2", "survey.1.2")],
)
def test_a_pid_is_shown_by_its_end(pid: str, shown: str) -> None:
    """The numbers of an item of a fan-out stay; a pid that somebody has chosen stays as it is."""
    assert display.short(pid) == shown


def test_the_state_says_what_keeps_it_from_going_on() -> None:
    """Set aside comes before paused, and both before a timer; without a clock a timer is left out."""
    timed: dict[str, Any] = {"state": "waiting", "wake_at": NOW + 90}
    assert display.state(row(**timed), NOW).plain == "waiting, wakes in 1 min 30 s"
    assert display.state(row(**timed)).plain == "waiting"
    assert display.state(row(play="paused", **timed), NOW).plain == "waiting, paused"
    assert display.state(row(play="paused", aside="why", **timed), NOW).plain == "waiting, set aside"
    assert display.state(row(state="killed", play="paused"), NOW).plain == "killed"


def test_what_it_waits_for() -> None:
    """Processes by their short names or their number, messages by name, times with what is left of them."""
    assert display.awaited(row(waits=(UUID,)), NOW) == "process ba94997f"
    assert display.awaited(row(waits=("a", "b"), names=("x", "y")), NOW) == "2 processes, the messages x, y"
    assert display.awaited(row(wake_at=NOW + 4), NOW).endswith("(in 4.0 s)")
    assert display.situation(row(state="waiting", names=("go",), wake_at=NOW)) == "waits for the message go"
    assert display.situation(row(state="waiting", wake_at=NOW)) == ""
    assert display.situation(row(status="one\n  two", names=("go",))) == "one two"


def test_a_bar_is_full_only_at_the_end() -> None:
    """A step that is nearly done is not shown as done."""
    assert display.bar(0.0, utf8=False) == "-" * 12
    assert display.bar(0.999, utf8=False) == "#" * 11 + "-"
    assert display.bar(7.0, utf8=True) == "█" * 12
    assert display.progress_bar(row(progress=0.5, detail="half"), utf8=False) == "######------ 50% half"
    assert display.progress_bar(row(detail="cycle 3"), utf8=False) == "cycle 3"


def test_of_a_few_children_all_are_shown() -> None:
    """Also those that have finished."""
    text = drawn(display.family_tree(family(items(finished=2, running=1)), NOW, utf8=True))
    assert text.count("Cls") == 4
    assert "2 of 3 ended" in text
    assert "more" not in text


def test_of_many_children_those_are_shown_that_people_look_for() -> None:
    """What can't go on first, some that failed, what runs; the others are counted, and the bar counts them all."""
    rows = items(finished=900, excepted=30, running=20, created=7)
    rows += [row("stuck", "running", parent=UUID, play="paused"), row("aside", "waiting", parent=UUID, aside="x")]
    many = family(rows, to_come=41)
    shown = [child.record for child in many.children]
    assert len(shown) == display.MAX_CHILDREN_SHOWN
    assert {child.pid for child in shown} > {"stuck", "aside"}
    assert [child.state for child in shown if not display.is_stuck(child)] == ["excepted"] * 4 + ["running"] * 6
    text = drawn(display.family_tree(many, NOW, utf8=False), 120)
    assert "###########-  930 of 1000 ended, 30 excepted" in text
    assert "`-- . 7 more created  > 14 more running  + 900 more finished  x 26 more excepted" in text.replace(
        "└──", "`--"
    )
    assert len(text.splitlines()) == display.MAX_CHILDREN_SHOWN + 2


def test_when_all_have_ended_the_failed_ones_are_shown() -> None:
    """The newest of them, as many as there is room for."""
    chosen = display.choose_children(items(excepted=20, finished=100))
    assert chosen == {f"{UUID}.1.{number}" for number in range(8, 20)}
    assert display.choose_children(items(finished=100)) == set()


def test_the_items_of_a_fan_out_that_were_not_read_are_counted() -> None:
    """By the numbers of those that were: what was not read has ended."""
    rows = [row(f"{UUID}.1.{number}", "finished", parent=UUID) for number in range(1000, 2990)]
    rows += [row(f"{UUID}.1.{number}", "running", parent=UUID) for number in (7, *range(2990, 3000))]
    cut = family(rows, is_cut=True, to_come=7000)
    assert display.children_text(cut) == "2989 of 10000 ended"
    text = drawn(display.family_tree(cut, NOW, utf8=False), 120)
    assert "###---------  2989 of 10000 ended" in text
    assert "and 999 older ones that have ended" in text
    assert f"{display.short(UUID)}.1.7 " in text


def test_a_family_that_was_not_read_to_its_end_claims_no_number() -> None:
    """It says that there are more."""
    cut = family(items(finished=20), is_cut=True)
    assert display.children_text(cut) == "more than 20 children"
    assert "more than 20 children" in drawn(display.children_tree(cut, NOW, utf8=True))


def test_a_narrow_terminal_cuts_what_is_long_and_nothing_else() -> None:
    """The status in a list, in one line; a note of a history goes on in the next line."""
    long = "word " * 40
    table = drawn(display.process_table([row(status=long, step="run")], NOW), 80)
    assert [len(line) <= 80 for line in table.splitlines()] == [True, True]
    assert "ba94997f  Cls    running  run   word" in table
    assert "…" in table
    assert "5.0 s" in table
    history = drawn(display.history_table([Event(subject="running.waiting", at=NOW, step="run", note=long)]), 100)
    assert history.count("word") == 40
    assert "running.waiting  run" in history


def test_claims_that_led_to_nothing_are_one_line() -> None:
    """A process that is woken a thousand times to wait on has a history that can be read."""
    events = [Event(subject="created.running", at=NOW), *(Event(subject="claimed", at=NOW + n) for n in range(1, 50))]
    text = drawn(display.history_table([*events, Event(subject="running.finished", at=NOW + 50)]))
    assert len(text.splitlines()) == 4
    assert "49 s   claimed" in text
    assert "the last of 49 times" in text


def test_a_traceback_begins_in_the_code_of_the_user() -> None:
    """Frames of the engine before it are left out; those behind it, and a traceback that has no others, stay."""
    ours = '  File "/x/prunus/processes/attempts.py", line 1, in _body\n    outcome = 1\n              ^\n'
    theirs = '  File "/home/me/flow.py", line 2, in run\n    1 / 0\n'
    head, end = "Traceback (most recent call last):\n", "ZeroDivisionError: division by zero\n"
    assert display.without_our_frames(head + ours + ours + theirs + ours + end) == head + theirs + ours + end
    assert display.without_our_frames(head + ours + end) == head + ours + end
    assert display.without_our_frames("only words") == "only words"
    line = LogLine(at=NOW, text=head + ours + theirs + end, level="ERROR", step="run")
    assert display.log_line(line).endswith(f"  ERROR   [run]  {head}{theirs}{end}".rstrip())


class Wrong(Process):
    """A step that raises."""

    async def run(self) -> None:
        raise ValueError("async")


class WrongInThread(Process):
    """A plain step that raises."""

    def run(self) -> None:
        raise ValueError("plain")


@pytest.mark.parametrize("wrong", [Wrong, WrongInThread])
async def test_the_frames_of_the_engine_are_known(wrong: type[Process]) -> None:
    """The traceback of a real step begins with the step, and its source."""
    process = wrong()
    while process.can_step:
        await process.step()
    failure = process.result().failure
    assert failure is not None
    assert "attempts.py" in failure.traceback
    lines = display.without_our_frames(failure.traceback).splitlines()
    assert lines[1].endswith(", in run")
    assert "raise ValueError(" in lines[2]


class Many(Process):
    """Fans out."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("go")

    async def run(self) -> list[Wait]:
        return [self.map(Many, [{}] * 70, max_in_flight=20), Wait(message("go"))]


async def test_how_many_children_are_yet_to_begin_is_read_from_the_checkpoint() -> None:
    """Only of a process that waits for them."""
    process = Many(pid="many")
    while process.can_step:
        await process.step()
    process.settle(Outcomes(NOW))
    record = row("many", process.state.value, checkpoint=checkpoint_of(process))
    assert display.still_to_begin(record) == 50
    assert display.still_to_begin(row("many", "running", checkpoint=record.checkpoint)) == 0
    assert display.still_to_begin(row("many", "waiting")) == 0
    assert display.still_to_begin(row("many", "waiting", checkpoint=b"damaged")) == 0


def test_what_to_do_about_a_process_that_does_not_go_on() -> None:
    """A pause after a failure points to the log, any other one to play; one that goes on needs nothing."""
    pause = Event(subject="playing.paused", at=NOW)
    failed = [Event(subject="failed", at=NOW, step="run"), pause]
    paused = row(play="paused", status="the step run failed: x")
    found = display.trouble(paused, failed)
    assert found is not None
    assert found.why == "the step run failed: x"
    assert found.advice.startswith("`prunus logs ba94997f` has the traceback")
    later = display.trouble(paused, [*failed, Event(subject="paused.playing", at=NOW), pause])
    assert later is not None
    assert later.advice == "`prunus play ba94997f` lets it go on"
    excepted = display.trouble(row(state="excepted"), [Event(subject="running.excepted", at=NOW, note="E: no")])
    assert excepted is not None
    assert excepted.why == "E: no"
    assert "`prunus retry ba94997f`" in excepted.advice
    for fine in (row(), row(play="pausing"), row(state="finished"), row(state="killed", aside="old")):
        assert display.trouble(fine, failed) is None


def test_any_value_is_yaml_that_people_can_read() -> None:
    """Short lists on one line, texts of several lines as they are, and what YAML lacks as its text."""
    value = {"a": (1, 2), "b": [{"c": None}], "text": "one\ntwo", "set": complex(1, 2)}
    assert display.as_yaml(value) == "a: [1, 2]\nb:\n- c: null\ntext: |-\n  one\n  two\nset: (1+2j)"


def test_nothing_that_a_process_says_is_a_command_to_the_terminal() -> None:
    """Escape sequences in a log, a status, a detail or a class name are shown as letters."""
    nasty = "red\x1b[2Jline"
    shown = display.log_line(LogLine(at=NOW, text=nasty, source=nasty))
    shown += display.one_line(nasty) + display.class_name(f"m:{nasty}")
    assert "\x1b" not in shown
    assert shown.count(r"red\x1b[2Jline") == 4
    assert display.log_line(LogLine(at=NOW, text="a\n\tb")).endswith("a\n\tb")


def test_advice_can_be_copied_into_a_shell() -> None:
    """What a shell would take for more than a word is quoted."""
    record = row("it's;me", play="paused", names=("go on",))
    found = display.trouble(record, [])
    assert found is not None
    command = found.advice.split("`")[1]
    assert shlex.split(command) == ["prunus", "play", "it's;me"]
    sends = display.how_to_continue(row("it's;me", state="waiting", names=("go on",)))
    assert sends is not None
    assert shlex.split(sends.split("`")[1]) == ["prunus", "send", "it's;me", "go on", "[VALUE]"]
