"""A database of an older Prunus is opened and goes on; each version that was ever written is kept in ``golden``."""

from __future__ import annotations

import gzip
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prunus.errors import StoreFullError
from prunus.messaging.queues import depth_of, priority_of
from prunus.messaging.taskstore import TaskStore
from prunus.persistence.database import SCHEMA_VERSION, find_damage, open_database
from prunus.persistence.persister import Effects, Query, Route
from prunus.persistence.sqlite import ProcessStore
from prunus.testing.persister_contract import new, save_of

GOLDEN = Path(__file__).parent / "golden"


def unpacked(version: int, folder: Path) -> Path:
    path = folder / "prunus.db"
    path.write_bytes(gzip.decompress((GOLDEN / f"schema{version}.db.gz").read_bytes()))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return unpacked(1, tmp_path)


@pytest.fixture
def connection(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(open_database(path)) as connection:
        yield connection


@pytest.fixture
def store(connection: sqlite3.Connection) -> ProcessStore:
    return ProcessStore(connection, epoch_floor=8 << 32, clock=lambda: 9000.0)


def version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def columns(connection: sqlite3.Connection) -> dict[str, set[tuple[object, ...]]]:
    """Of each table (name, type, not null, default, primary key)."""
    tables = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'broker%' AND name NOT LIKE 'sqlite%'"
        " AND name <> 'log_mark'"
    ).fetchall()
    return {name: {row[1:] for row in connection.execute(f"PRAGMA table_info({name})")} for [name] in tables}


def indexes(connection: sqlite3.Connection) -> set[str]:
    return {
        text
        for [text] in connection.execute(
            "SELECT sql FROM sqlite_master WHERE type = 'index' AND sql NOT NULL AND name NOT LIKE 'broker%'"
        )
    }


def test_the_golden_file_is_of_version_1(connection: sqlite3.Connection) -> None:
    """Opening alone changes nothing: who owns the tables upgrades them."""
    assert version(connection) == 1
    assert [
        name for [name] in connection.execute("SELECT name FROM pragma_table_info('process') WHERE name = 'ready'")
    ] == []


@pytest.mark.parametrize("before", [1, 2])
def test_its_tables_become_those_of_a_new_database(before: int, tmp_path: Path) -> None:
    """Column by column and index by index; the file is sound, no reference hangs in the air, and the processes are
    counted."""
    with closing(open_database(unpacked(before, tmp_path))) as connection:
        assert version(connection) == before
        store = ProcessStore(connection)
        assert version(connection) == SCHEMA_VERSION
        with closing(open_database(":memory:")) as fresh:
            ProcessStore(fresh)
            assert columns(connection) == columns(fresh)
            assert indexes(connection) == indexes(fresh)
        assert find_damage(connection) == []
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT key FROM broker_task LIMIT 1").fetchone() == ("created",)
        counted = connection.execute("SELECT state, count(*) FROM process GROUP BY state").fetchall()
        assert store.statistics() == dict(counted)


def test_everybody_is_in_the_situation_it_was_in(store: ProcessStore) -> None:
    """Who could go on can; who waited waits; who was held is held."""
    assert store.unheld_work() == Effects(
        runnable=("created", "running", "child-open", "complete"),
        called=("paused",),
        routes={"child-open": Route(depth=1)},
    )
    assert store.held() == ("held", "held-waiter")
    rows = {record.pid: record for record in store.query(Query(limit=50))[0]}
    assert {pid: record.state for pid, record in rows.items() if record.is_terminal} == {
        "child-ended": "finished",
        "child-killed": "killed",
        "finished": "finished",
        "excepted": "excepted",
    }
    assert {pid: record.waits for pid, record in rows.items() if record.waits} == {
        "waiter": ("child-open",),
        "held-waiter": ("child-open",),
    }
    assert (rows["suspended"].state, rows["suspended"].waits) == ("waiting", ())
    assert (rows["aside"].aside, rows["created"].tags) == ("its class is gone", ("b", "a"))
    assert (rows["running"].step, rows["running"].status) == ("second", "half way")
    assert {record.parent_close for record in rows.values()} == {"kill"}
    assert store.next_wake() is None


def test_waits_are_one_group_of_all(store: ProcessStore) -> None:
    """The end of the last child wakes both waiters, the held one when it is given back, with the results of all."""
    claim = store.claim("child-open", "w", at=1.0)[0]
    assert store.save(save_of(claim, "finished"))[1] == Effects(runnable=("waiter",))
    assert store.release_all("w1").runnable == ("held", "held-waiter")
    claim = store.claim("waiter", "w", at=2.0)[0]
    assert claim.results == {"child-ended": b"result of child-ended", "child-open": b"finished"}
    assert claim.record.checkpoint == b"waiting waiter"


def test_letters_histories_and_epochs_go_on(store: ProcessStore) -> None:
    """Nothing of them is lost, and epochs only rise, also for a pid that was deleted before."""
    claim = store.claim("paused", "w", at=1.0)[0]
    assert [(letter.seq, letter.body) for letter in claim.inbox] == [(2, b"play")]
    assert claim.epoch >= 8 << 32
    assert [event.subject for event in store.history("finished")[0]] == [
        "claimed",
        "created.running",
        "created.finished",
    ]
    store.create(new("deleted"))
    assert store.claim("deleted", "w", at=1.0)[0].epoch > (7 << 32) + 1


def test_who_was_suspended_is_called_by_letters_only(store: ProcessStore) -> None:
    """As before."""
    assert store.post("suspended", b"resume")[1] == Effects(called=("suspended",))


def test_who_excepted_in_a_wait_can_be_revived(store: ProcessStore) -> None:
    """It is ready once, so that somebody looks at its wait again."""
    record, effects = store.revive("excepted")
    assert (record.state, effects) == ("waiting", Effects(runnable=("excepted",)))


def test_who_was_complete_and_paused_goes_on_when_it_is_played(store: ProcessStore) -> None:
    """Its group is complete, and nobody has looked at it."""
    claim = store.claim("paused-complete", "w", at=1.0)[0]
    assert claim.results == {"child-ended": b"result of child-ended"}
    save = save_of(claim, "waiting", waits=(("child-ended",),), release=True)
    assert store.save(save)[1] == Effects(runnable=("paused-complete",))


def test_it_is_upgraded_once(store: ProcessStore, connection: sqlite3.Connection) -> None:
    """Opened again it is as it was left."""
    before = store.unheld_work()
    assert ProcessStore(connection).unheld_work() == before


def test_an_upgrade_is_all_or_nothing(path: Path) -> None:
    """With no space for it, the file stays one of version 1, and with space it is upgraded."""
    with closing(open_database(path)) as connection:
        [pages] = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreFullError):
            ProcessStore(connection)
        assert not connection.in_transaction
        assert version(connection) == 1
        assert columns(connection).keys() == {"process", "content", "tag", "wait", "inbox", "event", "fence"}
    with closing(open_database(path)) as connection:
        assert len(ProcessStore(connection).held()) == 2


def test_an_empty_database_of_version_1_is_upgraded(tmp_path: Path) -> None:
    """One that was opened and never used has no tables yet."""
    with closing(open_database(tmp_path / "empty.db")) as connection:
        connection.execute("PRAGMA user_version = 1")
        ProcessStore(connection).create(new())
        assert version(connection) == SCHEMA_VERSION


class TestVersion2:
    """Every process was in one queue, and nobody knew how deep in its tree it was."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return unpacked(2, tmp_path)

    def test_every_process_goes_on_as_a_plain_one(self, store: ProcessStore) -> None:
        """In the default queue, without a key, and as deep as its tree is; who has lost its parent is a root."""
        rows = {record.pid: record for record in store.query(Query())[0]}
        depths = {pid: record.depth for pid, record in rows.items()}
        assert {pid: depth for pid, depth in depths.items() if depth} == {"child": 1, "other": 1, "grandchild": 2}
        assert depths["orphan"] == 0
        assert {(one.queue, one.priority, one.key, one.crashes) for one in rows.values()} == {("default", 0, None, 0)}
        assert all(record.resources == {} for record in rows.values())

    def test_everybody_is_in_the_situation_it_was_in(self, store: ProcessStore) -> None:
        """Who could go on can, with its route; groups, timers, mail, logs and past checkpoints are as they were."""
        assert store.unheld_work() == Effects(
            runnable=("created", "grandchild", "orphan"),
            called=("paused",),
            routes={"grandchild": Route(depth=2)},
        )
        assert store.held() == ("held",)
        assert store.next_wake() == 9999.0
        assert store.fire_timers(9999.0) == Effects(runnable=("timer",))
        assert store.send("mail", "x", b"came", at=4.0)[1] == Effects(runnable=("mail",))
        assert [mail.body for mail in store.claim("mail", "w", at=1.0)[0].mail] == [b"came", b"kept"]
        assert (store.load("held")[0].progress, store.log("held")[0][0].text) == (0.5, "said")
        assert [past.step for past in store.past("excepted")[0]] == ["run"]
        assert store.reply("killed", 1)[0] == b"yes"

    def test_what_has_ended_can_be_forgotten(self, store: ProcessStore) -> None:
        """It ended when it was updated last."""
        assert store.forget_ended("killed", 5000.0, (0.0, 0), 9) == (0, None)
        assert store.forget_ended("killed", 5001.0, (0.0, 0), 9) == (1, None)

    def test_a_tree_ends_from_its_leaves(self, store: ProcessStore) -> None:
        """The waits of each are complete when the last below it has ended."""
        claim = store.claim("grandchild", "w", at=1.0)[0]
        assert store.save(save_of(claim, "finished"))[1] == Effects(
            runnable=("child",), routes={"child": Route(depth=1)}
        )
        claim = store.claim("child", "w", at=1.0)[0]
        assert store.save(save_of(claim, "finished"))[1] == Effects(runnable=("root",))
        assert list(store.claim("root", "w", at=1.0)[0].results) == ["other", "child"]

    def test_its_tasks_keep_their_priorities(self, connection: sqlite3.Connection) -> None:
        """Which were stored without a depth."""
        tasks = {task.key: task for task in TaskStore(connection).load().tasks}
        assert {key: (priority_of(one.urgency), depth_of(one.urgency)) for key, one in tasks.items()} == {
            "created": (0, 0),
            "grandchild": (4, 0),
        }
