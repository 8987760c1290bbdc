"""Processes that come from another store: what they cause here, and what is left of those that do not come."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec
import pytest

from prunus.errors import BusyError, CheckpointNotFoundError, StaleOwnerError
from prunus.persistence import sqlite
from prunus.persistence.persister import (
    ARRIVAL_TIME_S,
    Adopted,
    Cursor,
    Effects,
    Event,
    Mail,
    PastStep,
    Portion,
    Query,
    Save,
)
from prunus.persistence.sqlite import ProcessStore, open_database
from prunus.testing.persister_contract import new, save_of


class Clock:
    """A wall clock that tests move."""

    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(open_database(":memory:")) as connection:
        yield connection


@pytest.fixture
def store(connection: sqlite3.Connection, clock: Clock) -> ProcessStore:
    return ProcessStore(connection, clock=clock)


@pytest.fixture
def elsewhere(clock: Clock) -> Iterator[ProcessStore]:
    with closing(open_database(":memory:")) as connection:
        yield ProcessStore(connection, clock=clock)


def copy_of(store: ProcessStore, pid: str, **changes: Any) -> list[Portion]:
    """All of it; the row with `changes`."""
    portions = [store.export(pid)[0]]
    while (after := portions[-1].next) is not None:
        portions.append(store.export(pid, after)[0])
    kept = portions[0].kept
    assert kept is not None
    changed = msgspec.structs.replace(kept, record=msgspec.structs.replace(kept.record, **changes))
    return [msgspec.structs.replace(portions[0], kept=changed), *portions[1:]]


def bring(store: ProcessStore, *portions: Portion) -> tuple[Adopted, Effects]:
    for number, portion in enumerate(portions):
        store.stage("ship", number, [portion])
    return store.adopt("ship", len(portions), "far")


def wait(store: ProcessStore, pid: str, **facts: Any) -> None:
    """A process that waits, and that nobody holds."""
    store.create(new(pid))
    epoch = store.claim(pid, "w", at=1.0)[0].epoch
    store.save(Save(pid=pid, epoch=epoch, state="waiting", checkpoint=b"c", release=True, **facts))


def test_one_that_plays_is_runnable_and_a_paused_one_is_not(store: ProcessStore, elsewhere: ProcessStore) -> None:
    """Whatever it waits for: somebody has to look whether that is over here. Letters call it, paused or not."""
    wait(elsewhere, "playing", wake_at=2e9)
    wait(elsewhere, "paused")
    wait(elsewhere, "called")
    elsewhere.post("called", b"letter")
    arrived = [
        *copy_of(elsewhere, "playing"),
        *copy_of(elsewhere, "paused", play="paused"),
        *copy_of(elsewhere, "called", play="paused"),
    ]
    _, effects = bring(store, *arrived)
    assert effects == Effects(runnable=("playing",), called=("called",))
    assert store.unheld_work() == effects
    assert store.next_wake() == 2e9
    assert store.statistics() == {"waiting": 3}


def test_its_route_comes_with_it(store: ProcessStore, elsewhere: ProcessStore) -> None:
    """Queue, priority, resources and depth, for the task that it gets."""
    elsewhere.create(new(parent="q", queue="gpu", priority=4, resources={"licence": 2}))
    _, effects = bring(store, *copy_of(elsewhere, "p", depth=3))
    [route] = effects.routes.values()
    assert (route.queue, route.priority, route.resources, route.depth) == ("gpu", 4, {"licence": 2}, 3)


def test_a_group_that_comes_complete_wakes_its_waiter_once_it_plays(
    store: ProcessStore, elsewhere: ProcessStore
) -> None:
    """A child that lives ends here, and its parent, which came with it, goes on."""
    elsewhere.create(new("child"))
    wait(elsewhere, "parent", waits=(("child",),))
    bring(store, *copy_of(elsewhere, "parent"), *copy_of(elsewhere, "child"))
    looked = store.claim("parent", "w", at=2.0)[0]
    again = Save(pid="parent", epoch=looked.epoch, state="waiting", waits=(("child",),), release=True)
    assert store.save(again)[1] == Effects()
    ended = store.save(save_of(store.claim("child", "w", at=2.0)[0], "finished"))[1]
    assert ended == Effects(runnable=("parent",))


def test_whoever_held_it_before_can_not_write_it(store: ProcessStore) -> None:
    """Also not in the store where it was, forgotten, and came to again (G4)."""
    store.create(new())
    old = store.claim("p", "w", at=1.0)[0]
    store.save(save_of(old, "excepted"))
    copy = copy_of(store, "p")
    store.delete("p")
    bring(store, *copy)
    store.revive("p")
    assert store.claim("p", "v", at=2.0)[0].epoch > old.epoch
    with pytest.raises(StaleOwnerError):
        store.save(save_of(old, "running"))


def test_what_is_set_aside_stays_so_and_is_not_called(store: ProcessStore, elsewhere: ProcessStore) -> None:
    """Its letters wait with it, until a new one comes."""
    elsewhere.create(new())
    elsewhere.post("p", b"letter")
    elsewhere.set_aside("p", elsewhere.claim("p", "w", at=1.0)[0].epoch, "no class")
    _, effects = bring(store, *copy_of(elsewhere, "p", play="paused"))
    assert effects == Effects()
    assert store.load("p")[0].aside == "no class"
    assert store.post("p", b"new")[1] == Effects(called=("p",))


def test_what_it_says_of_numbers_is_mended(store: ProcessStore, elsewhere: ProcessStore) -> None:
    """The next save, letter, mail and event get numbers that are free, and nobody is called for letters that are not
    there."""
    wait(elsewhere, "p")
    [portion] = copy_of(elsewhere, "p", seq=0, inbox_last=7, inbox_done=2, play="paused")
    odd = msgspec.structs.replace(
        portion,
        mail=(Mail(40, "m", b"", 1.0),),
        steps=(PastStep(30, "s", 1.0, b""),),
        events=(Event(subject="e", at=1.0, seq=20),),
    )
    assert bring(store, odd)[1] == Effects()
    assert store.post("p", b"")[0].seq == 8
    assert store.send("p", "m", b"", at=1.0)[0].seq == 41
    claim = store.claim("p", "w", at=2.0)[0]
    assert store.save(save_of(claim, keep_as="t"))[0].seq == 31
    assert [event.seq for event in store.history("p")[0]] == [20, 21, 22]


def test_a_paused_one_says_why(store: ProcessStore, elsewhere: ProcessStore) -> None:
    """In its history, if that is because it came."""
    wait(elsewhere, "p")
    [portion] = copy_of(elsewhere, "p", play="paused", status="imported from far")
    assert portion.kept is not None
    held = msgspec.structs.replace(portion, kept=msgspec.structs.replace(portion.kept, is_held_back=True))
    bring(store, held)
    events = store.history("p")[0]
    assert [(event.subject, event.note) for event in events[-2:]] == [
        ("imported", "from far"),
        ("playing.paused", "imported from far"),
    ]


def test_what_is_staged_is_forgotten_after_a_time(store: ProcessStore, elsewhere: ProcessStore, clock: Clock) -> None:
    """When the next one comes; and what is adopted at once."""
    elsewhere.create(new())
    bring(store, *copy_of(elsewhere, "p"))
    [arrived] = store._connection.execute("SELECT count(*) FROM arrival").fetchone()
    assert arrived == 0
    store.stage("lost", 0, copy_of(elsewhere, "p"))
    clock.now += ARRIVAL_TIME_S + 1
    store.stage("other", 0, copy_of(elsewhere, "p"))
    names = store._connection.execute("SELECT name FROM arrival").fetchall()
    assert names == [("other",)]


def test_what_is_staged_has_a_bound(
    store: ProcessStore, elsewhere: ProcessStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All imports together."""
    elsewhere.create(new(checkpoint=bytes(1000)))
    monkeypatch.setattr(sqlite, "MAX_ARRIVAL_BYTES", 1500)
    store.stage("a", 0, copy_of(elsewhere, "p"))
    with pytest.raises(BusyError, match="other imports"):
        store.stage("b", 0, copy_of(elsewhere, "p"))


def test_wrong_use_is_refused(store: ProcessStore) -> None:
    """With a sentence."""
    store.create(new())
    for name, number in (("", 0), ("x" * 300, 0), ("x", -1)):
        with pytest.raises(ValueError, match="an arrival has a name"):
            store.stage(name, number, [])
    with pytest.raises(ValueError, match="not 'secrets'"):
        store.export("p", Cursor("secrets", 0, 0))
    with pytest.raises(CheckpointNotFoundError):
        store.export("q")


def test_an_upgraded_database_takes_them_too(elsewhere: ProcessStore) -> None:
    """The place for what arrives is made when a store is opened."""
    elsewhere.create(new())
    with closing(open_database(":memory:")) as connection:
        ProcessStore(connection)
        connection.execute("DROP TABLE arrival")
        store = ProcessStore(connection)
        assert bring(store, *copy_of(elsewhere, "p"))[0].pids == ("p",)
        assert [record.pid for record in store.query(Query())[0]] == ["p"]
