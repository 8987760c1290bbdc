"""The judge sees each kind of crime, and accuses nobody who is innocent."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.kills.checker import History, check
from tests.torture.kills.journal import Event, Journal, Journals

SENT = [Event("invoke", "client", "a"), Event("ok", "client", "a", task="t")]
FIRST = Event("delivery", "w1", "a", task="t", epoch=1, session="s1")
AGAIN = Event("delivery", "w2", "a", task="t", epoch=2, session="s2")
LATE = [
    Event("ack", "w1", task="t", epoch=1, session="s1", request=5),
    Event("accepted", "w1", session="s1", request=5),
]
GOOD = [
    Event("ack", "w2", task="t", epoch=2, session="s2", request=5),
    Event("accepted", "w2", session="s2", request=5),
]


def complaints(*events: Event, left: tuple[str, ...] = ()) -> list[str]:
    return check(History(events), left)


def test_a_task_that_is_done_under_its_last_epoch_is_fine() -> None:
    """Also if its first holder lost it, and was told so."""
    stale = [LATE[0], Event("stale", "w1", session="s1", request=5)]
    assert complaints(*SENT, FIRST, AGAIN, *stale, *GOOD) == []


def test_a_task_that_is_still_there_is_fine() -> None:
    """Confirmed, not settled, and in the database."""
    assert complaints(*SENT, left=("t",)) == []
    assert History(SENT).unsettled() == ["a"]


def test_an_acknowledgement_that_nobody_answered_may_have_counted() -> None:
    """The worker or the broker died between the commit and the answer."""
    assert complaints(*SENT, FIRST, LATE[0]) == []


@pytest.mark.parametrize(
    ("crime", "events"),
    [
        ("lost: a", [*SENT]),
        ("lost: a", [*SENT, FIRST]),
        ("lost: a", [*SENT, FIRST, LATE[0], AGAIN]),
        ("settled twice: task t", [*SENT, FIRST, AGAIN, *LATE, *GOOD]),
        ("doubled past an epoch: task t", [*SENT, FIRST, AGAIN, *LATE]),
        ("delivered twice under one epoch: task t", [*SENT, FIRST, FIRST, *LATE]),
        ("doubled: a", [*SENT, AGAIN, *GOOD, Event("delivery", "w1", "a", task="u", epoch=3)]),
        ("invented: task t", [FIRST, *LATE]),
        ("refused, yet done: a", [SENT[0], Event("fail", "client", "a"), FIRST, *LATE]),
        ("a result of nobody: a", [*SENT, FIRST, Event("result", "client", "a")]),
    ],
)
def test_each_crime_is_seen(crime: str, events: list[Event]) -> None:
    """And named, with the task."""
    assert any(one.startswith(crime) for one in complaints(*events)), complaints(*events)


def test_a_line_that_is_not_whole_yet_is_read_later(tmp_path: Path) -> None:
    """Journals are read while they grow."""
    journal, journals = Journal(tmp_path / "one.journal", "client"), Journals(tmp_path)
    journal.write(SENT[0])
    with (tmp_path / "one.journal").open("ab") as file:
        file.write(b'{"kind":"ok","who":"cl')
    assert journals.read() == [SENT[0]]
    with (tmp_path / "one.journal").open("ab") as file:
        file.write(b'ient","body":"a","task":"t"}\n')
    assert journals.read() == [SENT[1]]
    assert journals.events == SENT
