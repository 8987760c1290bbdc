"""What lines tell of a process: each change, also of states that have passed when somebody looks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from prunus.persistence.persister import Event, Record
from prunus.runtime import display
from prunus.runtime.watch import Moment, moments_of, watch_family
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import workflows


async def lines_of(daemon: LocalDaemon, pid: str, *, since_launch: bool = False) -> list[str]:
    """What a watch writes into a pipe until the process has ended, without the times."""
    console = Console(file=io.StringIO(), width=display.UNBOUNDED_WIDTH)
    await watch_family(daemon.controller, pid, console, since_launch=since_launch)
    assert isinstance(console.file, io.StringIO)
    return [line.split("  ", 1)[1] for line in console.file.getvalue().splitlines()]


async def test_no_state_is_skipped(daemon: LocalDaemon) -> None:
    """Who looks for the first time when all is over still tells every state since the launch, also of children."""
    handle = await daemon.controller.launch(workflows.Fan, {"count": 2})
    await handle.result()
    told = await lines_of(daemon, handle.pid, since_launch=True)

    def of(pid: str) -> list[str]:
        return [line.removeprefix(f"{display.short(pid)}  ") for line in told if line.startswith(display.short(pid))]

    states = ["created  scatter", "running  scatter", "waiting  gather", "running  gather", "finished"]
    assert [line.removeprefix("Fan  ") for line in of(handle.pid)] == states
    for child in await handle.children():
        assert of(child.pid) == ["Add  created  run", "Add  running  run", "Add  finished"]
    assert len(told) == 5 + 2 * 3
    assert told[-1].endswith("Fan  finished"), "they stand in the order in which they happened"


async def test_what_was_before_the_watch_is_not_told(daemon: LocalDaemon) -> None:
    """Only how things are when it begins."""
    handle = await daemon.controller.launch(workflows.Add, {"a": 1})
    await handle.result()
    assert await lines_of(daemon, handle.pid) == [f"{display.short(handle.pid)}  Add  finished"]


def record(**facts: object) -> Record:
    given: dict[str, object] = {"state": "running", "play": "playing", "step": "two", "updated_at": 9.0}
    return Record(pid="p", class_id="m:C", created_at=1.0, epoch=1, seq=1, **given | facts)  # type: ignore[arg-type]


def events(*said: str) -> list[Event]:
    """``subject`` or ``subject step``, one a second."""
    return [
        Event(subject=subject, step=step or None, at=float(seq + 1), seq=seq)
        for seq, (subject, _, step) in enumerate((each.partition(" ") for each in said), 1)
    ]


def test_the_moments_between_changes() -> None:
    """The step of a moment is the one that was next then; notes are no changes."""
    history = events("claimed", "created.running", "running.running run", "crashed run")
    assert moments_of(record(), history) == [
        Moment(1.0, 0, "created", "playing", "run"),
        Moment(3.0, 2, "running", "playing", "run"),
        Moment(4.0, 3, "running", "playing", "two"),
    ]


def test_a_pause_is_a_change_of_its_own() -> None:
    """The two machines go on independently of each other."""
    history = events("playing.pausing", "running.waiting run", "pausing.paused", "paused.playing")
    found = moments_of(record(state="waiting"), history)
    assert [(each.state, each.play, each.step) for each in found] == [
        ("running", "playing", "run"),
        ("running", "pausing", "run"),
        ("waiting", "pausing", "two"),
        ("waiting", "paused", "two"),
        ("waiting", "playing", "two"),
    ]


@pytest.mark.parametrize("history", [[], events("claimed", "context_edited", "imported")])
def test_without_changes_there_is_one_moment(history: list[Event]) -> None:
    """How it is."""
    assert moments_of(record(play="paused"), history) == [Moment(1.0, 0, "running", "paused", "two")]
