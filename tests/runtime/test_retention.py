"""What has ended is forgotten when it is older than the profile wants; what somebody needs is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from prunus.messaging.liveness import boottime
from prunus.persistence import NewProcess, ProcessStore, Query, Save, open_database
from prunus.runtime import broker
from prunus.runtime.broker import CHECK_INTERVAL_S, RETENTION_INTERVAL_S, Broker
from prunus.runtime.profile import Config

DAY_S = 86_400.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prunus.db"


@contextmanager
def store_at(path: Path, age_s: float = 0.0) -> Iterator[ProcessStore]:
    """The store, by a clock that is `age_s` behind."""
    with closing(open_database(path)) as connection:
        yield ProcessStore(connection, clock=lambda: time.time() - age_s)


def ended(store: ProcessStore, pid: str, state: str = "finished") -> None:
    store.create(NewProcess(pid=pid, class_id="lab:Work", checkpoint=b"c", created_at=1.0))
    epoch = store.claim(pid, "w", at=1.0)[0].epoch
    store.save(Save(pid=pid, epoch=epoch, state=state, checkpoint=b"c", result=b"r"))


def kept(path: Path) -> list[str]:
    with store_at(path) as store:
        return sorted(record.pid for record in store.query(Query(limit=1000))[0])


def look_after(path: Path, turns: int = 1, **keep_ended_s: float) -> None:
    """What a broker with this retention does in so many checks."""
    one = Broker(path, keep_ended_s=keep_ended_s)
    begun = boottime()
    for turn in range(turns):
        one.look_after(begun + turn * CHECK_INTERVAL_S, put=lambda tasks: None)
    one.close()


def test_each_state_has_a_time_of_its_own(path: Path) -> None:
    """Of a state without one everything is kept, and of each what ended lately."""
    with store_at(path, age_s=10 * DAY_S) as store:
        for state in ("finished", "excepted", "killed"):
            ended(store, f"{state} long ago", state)
    with store_at(path) as store:
        for state in ("finished", "killed"):
            ended(store, f"{state} lately", state)
    look_after(path, finished=DAY_S, killed=30 * DAY_S)
    assert kept(path) == ["excepted long ago", "finished lately", "killed lately", "killed long ago"]


def test_without_a_time_everything_is_kept(path: Path) -> None:
    """As the profile says that `prunus init` makes."""
    with store_at(path, age_s=10 * DAY_S) as store:
        ended(store, "p")
    look_after(path)
    assert kept(path) == ["p"]


def test_the_profile_says_how_long() -> None:
    """Each state as its line in config.yaml; dead letters are another matter."""
    config = Config(retention={"finished": "30d", "killed": "0s", "dead_letters": "1h"})
    assert broker.kept_ended_s(config) == {"finished": 30 * DAY_S, "killed": 0.0}
    assert broker.kept_ended_s(Config()) == {}


def test_many_are_forgotten_some_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch with each check; the longest ended first."""
    monkeypatch.setattr(broker, "FORGOTTEN_AT_ONCE", 2)
    with store_at(path, age_s=10 * DAY_S) as store:
        for number in range(5):
            ended(store, f"p{number}")
    look_after(path, turns=1, finished=DAY_S)
    assert kept(path) == ["p2", "p3", "p4"]
    look_after(path, turns=2, finished=DAY_S)
    assert kept(path) == []


def test_what_is_needed_stays_and_is_in_nobodys_way(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody waits for the first ones, one has a child that goes on: those behind them are forgotten all the same."""
    monkeypatch.setattr(broker, "FORGOTTEN_AT_ONCE", 2)
    with store_at(path, age_s=10 * DAY_S) as store:
        for number in range(3):
            ended(store, f"awaited{number}")
        ended(store, "parent")
        store.create(NewProcess(pid="child", class_id="a:B", checkpoint=b"c", created_at=1.0, parent="parent"))
        store.create(NewProcess(pid="waiter", class_id="a:B", checkpoint=b"c", created_at=1.0))
        waits = (tuple(f"awaited{number}" for number in range(3)), ("child",))
        epoch = store.claim("waiter", "w", at=1.0)[0].epoch
        store.save(Save(pid="waiter", epoch=epoch, state="waiting", checkpoint=b"c", waits=waits, release=True))
        for number in range(3):
            ended(store, f"p{number}")
    look_after(path, turns=4, finished=DAY_S)
    assert kept(path) == ["awaited0", "awaited1", "awaited2", "child", "parent", "waiter"]


def test_it_is_looked_again_and_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was young is forgotten when it is old, by a broker that runs for weeks."""
    with store_at(path, age_s=10 * DAY_S) as store:
        ended(store, "p")
    one, begun = Broker(path, keep_ended_s={"finished": 20 * DAY_S}), boottime()
    one.look_after(begun, put=lambda tasks: None)
    later = time.time() + 11 * DAY_S
    monkeypatch.setattr("time.time", lambda: later)
    one.look_after(begun + RETENTION_INTERVAL_S, put=lambda tasks: None)
    one.close()
    assert kept(path) == []
