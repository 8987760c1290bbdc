"""What the broker keeps on disk: everything comes back, each change is written once, and damage is seen."""

from __future__ import annotations

import random
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from operator import attrgetter
from pathlib import Path

import msgspec
import pytest

from prunus.errors import PersistenceError
from prunus.messaging import taskstore
from prunus.messaging.broker import Changes, Client
from prunus.messaging.inventory import QueueLimits
from prunus.messaging.messages import Peer
from prunus.messaging.queues import Hold, Task, TaskQueues, depth_of, priority_of, urgency_of
from prunus.messaging.taskstore import TaskStore

OLD_TABLES = """
    CREATE TABLE broker_task (
        id TEXT PRIMARY KEY, queue TEXT NOT NULL, key TEXT, priority INTEGER NOT NULL, body BLOB NOT NULL,
        place INTEGER NOT NULL, attempt INTEGER NOT NULL DEFAULT 0, holder TEXT, epoch INTEGER NOT NULL DEFAULT 0,
        waiters TEXT NOT NULL DEFAULT '', outcome BLOB
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE broker_session (
        id TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, started INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE broker_answer (
        session TEXT NOT NULL, request INTEGER NOT NULL, frame BLOB NOT NULL, PRIMARY KEY (session, request)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE broker_meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
"""
"""As the first version made them."""


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        yield connection


def task(number: int, **fields: object) -> Task:
    task = Task(9, number, number, f"t{number}", "q", None, None, 4, 1000.0, place="ready")
    for name, value in fields.items():
        setattr(task, name, value)
    return task


def write(store: TaskStore, *tasks: Task, **others: object) -> None:
    for one in tasks:
        if not one.is_stored:
            store.keep(one.number, b"body")
    store.write(Changes(tasks=list(tasks), **others))  # type: ignore[arg-type]


def loaded(connection: sqlite3.Connection) -> list[Task]:
    return sorted(TaskStore(connection).load().tasks, key=attrgetter("number"))


def as_read(task: Task) -> Task:
    """Where it is, unless it is over, and that there is a row of it, finds out who restores the queues."""
    place = task.place if task.place in ("dead", "settled") else ""
    return msgspec.structs.replace(task, place=place, is_stored=False)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"key": "k"},
        {"subject": "a.b"},
        {"order": 7},
        {"urgency": urgency_of(3, 2)},
        {"needs": (("gpu", 1),)},
        {"not_before": 5.5},
        {"expires_at": 6.5},
        {"max_attempts": 3},
        {"attempt": 2},
        {"hold": Hold("ann", None, 99, 0.0)},
        {"hold": Hold("ann", "a.*", 99, 0.0)},
        {"waiters": ("ann", "bob")},
        {"outcome": b"", "place": "settled", "size": 0},
        {"place": "dead"},
        {"reason": "no disk"},
        {"blob": "d1", "size": 10},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_a_task_comes_back_with_whatever_it_has(connection: sqlite3.Connection, fields: dict[str, object]) -> None:
    """Each thing alone: a plain task is read in another way than one that has more."""
    rare = task(2, **fields)
    write(TaskStore(connection), task(1), rare, task(3))
    assert loaded(connection) == [as_read(task(1)), as_read(rare), as_read(task(3))]


def test_everything_comes_back(connection: sqlite3.Connection) -> None:
    """Tasks in each place with all that is known of them; sessions, clients, answers, limits and resources."""
    store = TaskStore(connection)
    tasks = [
        task(1, urgency=2, key="k", subject="a.b", max_attempts=3, not_before=5.5, expires_at=6.5, attempt=2),
        task(2, order=7, needs=(("cpu", 2), ("gpu", 1)), waiters=("ann", "bob")),
        task(3, place="held", hold=Hold("ann", "a.*", 99, 0.0), attempt=1),
        task(4, place="dead", reason="no disk"),
        task(5, place="settled", outcome=b"result", waiters=("ann",), size=6),
    ]
    sessions = {"ann": Peer("host", 1, 2), "bob": Peer()}
    clients = {"ann": Client(secret=b"digest", done=7, undone={3: None, 5: None}), "gone": Client()}
    limits = {"q": QueueLimits(concurrency=3, rate_per_s=0.5, burst=2, max_length=9)}
    answers = {("ann", 4): b"four", ("ann", 2): b"two"}
    write(store, *tasks, sessions=sessions, clients=clients, limits=limits, answers=answers, resources={"gpu": 2})

    again = TaskStore(connection)
    state = again.load()
    assert sorted(state.tasks, key=attrgetter("number")) == [as_read(one) for one in tasks]
    assert (again.outcome(5), again.outcome(4), again.outcome(6)) == (b"result", None, None)
    assert dict(state.sessions) == sessions
    assert dict(state.clients) == clients
    assert state.answers == (("ann", 2, b"two"), ("ann", 4, b"four"))
    assert (state.limits, state.resources) == (limits, {"gpu": 2})


def test_what_is_taken_back_is_gone(connection: sqlite3.Connection) -> None:
    """Sessions, clients, answers, limits and resources; drops come before what is kept anew."""
    store = TaskStore(connection)
    write(
        store,
        sessions={"ann": Peer()},
        clients={"ann": Client()},
        answers={("ann", 1): b"1", ("ann", 9): b"9"},
        limits={"q": QueueLimits(burst=2)},
        resources={"gpu": 1},
    )
    write(
        store,
        sessions={"ann": None},
        clients={"ann": None},
        dropped={"ann": 5},
        answers={("ann", 2): b"new"},
        limits={"q": QueueLimits()},
        resources={"gpu": None},
    )
    state = store.load()
    assert (state.sessions, state.clients, state.limits, state.resources) == ((), (), {}, {})
    assert state.answers == (("ann", 2, b"new"), ("ann", 9, b"9"))


# --- marks ---


def done_by(connection: sqlite3.Connection) -> dict[str, tuple[int, list[int]]]:
    """What a broker that starts now knows of each client."""
    return {session: (one.done, list(one.undone)) for session, one in TaskStore(connection).load().clients}


def sends(store: TaskStore, number: int, session: str, client: Client) -> Task:
    """A batch in which a client sends a task, and nothing else."""
    client.done += 1
    sent = task(number)
    write(store, sent, marks={session: client})
    return sent


def test_a_mark_is_written_beside_a_task(connection: sqlite3.Connection) -> None:
    """One row for a task and for what its sender has done: one page of the file."""
    store, ann = TaskStore(connection), Client()
    write(store, clients={"ann": ann})
    before = connection.total_changes
    sends(store, 1, "ann", ann)
    ann.undone[2] = None
    ann.done = 3
    sends(store, 2, "ann", ann)
    assert connection.total_changes == before + 2
    assert done_by(connection) == {"ann": (4, [2])}


def test_a_mark_outlives_its_task(connection: sqlite3.Connection) -> None:
    """It sinks when a task goes that may carry it; one that can carry none is not worth a write."""
    store, ann = TaskStore(connection), Client()
    write(store, clients={"ann": ann})
    first, second = sends(store, 1, "ann", ann), sends(store, 2, "ann", ann)
    first.place = second.place = ""
    write(store, second)
    assert done_by(connection) == {"ann": (3, [])}
    before = connection.total_changes
    write(store, first)
    assert connection.total_changes == before + 1


def test_a_mark_without_a_task_sinks(connection: sqlite3.Connection) -> None:
    """Beside nothing it is written by itself, also if its task went in the same batch."""
    store, ann = TaskStore(connection), Client()
    write(store, clients={"ann": ann})
    ann.done = 5
    write(store, task(1, place=""), marks={"ann": ann})
    assert done_by(connection) == {"ann": (5, [])}


def test_a_long_mark_sinks(connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taskstore, "MAX_MARKS_BYTES", 10)
    store, ann = TaskStore(connection), Client()
    write(store, clients={"ann": ann})
    ann.undone = dict.fromkeys((1, 2, 3))
    ann.done = 4
    sends(store, 1, "ann", ann)
    assert connection.execute("SELECT marks FROM broker_task").fetchall() == [(None,)]
    assert done_by(connection) == {"ann": (5, [1, 2, 3])}


def test_marks_are_looked_for_among_the_newest_tasks_only(
    connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are."""
    monkeypatch.setattr(taskstore, "MAX_AFLOAT", 10)
    store, ann = TaskStore(connection), Client()
    write(store, clients={"ann": ann})
    for number in range(1, 96):
        sends(store, number, "ann", ann)
        [[sunk]] = connection.execute(taskstore.LOAD_SUNK).fetchall() or [[0]]
        assert number - sunk < 10
    assert done_by(connection) == {"ann": (96, [])}


def test_a_task_that_is_written_late_carries_no_mark(connection: sqlite3.Connection) -> None:
    """On a full disk it waited, while newer ones were written and marks sank: nobody would look for it there."""
    store, ann = TaskStore(connection), Client()
    write(store, task(2), clients={"ann": ann})
    sends(store, 1, "ann", ann)
    assert done_by(connection) == {"ann": (2, [])}


def test_numbers_that_begin_anew_carry_marks(connection: sqlite3.Connection) -> None:
    """A broker that starts with no tasks counts them from one again."""
    store, ann = TaskStore(connection), Client()
    write(store, clients={"ann": ann})
    for number in range(1, 6):
        sends(store, number, "ann", ann).place = ""
    write(store, *(task(number, place="", is_stored=True) for number in range(1, 6)))
    store = TaskStore(connection)
    [(_, ann)] = store.load().clients
    write(store)
    sends(store, 1, "ann", ann)
    assert connection.execute("SELECT marks IS NULL FROM broker_task").fetchall() == [(0,)]
    assert done_by(connection) == {"ann": (7, [])}


def test_a_client_that_was_forgotten_does_not_come_back(connection: sqlite3.Connection) -> None:
    """Its mark stands beside a task that is still there; another client of that name has done nothing yet."""
    store, ann = TaskStore(connection), Client()
    write(store, clients={"ann": ann})
    sends(store, 1, "ann", ann)
    write(store, clients={"ann": None})
    assert done_by(connection) == {}
    write(store, clients={"ann": Client()})
    assert done_by(connection) == {"ann": (1, [])}


def test_what_was_written_without_marks_counts(connection: sqlite3.Connection) -> None:
    """An older Prunus, which knows nothing of them, wrote what the client had done by then."""
    store, ann = TaskStore(connection), Client()
    write(store, clients={"ann": ann})
    sends(store, 1, "ann", ann)
    connection.execute(taskstore.SAVE_CLIENT, ("ann", None, 9, b"\x90"))
    assert done_by(connection) == {"ann": (9, [])}


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_marks_are_known(
    connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Tasks come, go, or do both in one batch; clients come, go, come again, and are refused; the broker restarts."""
    monkeypatch.setattr(taskstore, "MAX_AFLOAT", 7)
    chance = random.Random(seed)
    store, clients, there, number = TaskStore(connection), dict[str, Client](), list[Task](), 0
    for _ in range(150):
        changes: dict[str, dict[str, Client | None]] = {"clients": {}, "marks": {}}
        batch = []
        for _ in range(chance.randrange(4)):
            name = chance.choice("abc")
            client = clients.get(name)
            match chance.randrange(6):
                case 0 if client is None:
                    changes["clients"][name] = clients[name] = Client(secret=name.encode())
                case 1 if client is not None and name not in changes["marks"]:
                    changes["clients"][name] = None
                    del clients[name]
                case 2 if client is not None:
                    client.undone[client.done] = None
                    client.done += 1
                case 3 | 4 if client is not None:
                    client.done += 1
                    changes["marks"][name] = client
                    number += 1
                    batch.append(task(number, place=chance.choice(("ready", "ready", "settled", ""))))
                case 5 if there:
                    gone = there.pop(chance.randrange(len(there)))
                    gone.place = ""
                    batch.append(gone)
        write(store, *batch, **changes)
        there += [one for one in batch if one.place]
        if chance.random() < 0.2:
            store = TaskStore(connection)
            known = dict(store.load().clients)
            assert {name: _done(one) for name, one in known.items()} == {
                name: _done(one) for name, one in clients.items()
            }
            write(store)
            clients, number = known, max((one.number for one in there), default=0)


def _done(client: Client) -> set[int]:
    return {request for request in range(client.done) if request not in client.undone}


def test_tasks_without_a_depth_are_read(connection: sqlite3.Connection) -> None:
    """The tables of the version before had priorities alone, and no marks."""
    write(TaskStore(connection), task(1, urgency=urgency_of(7)), task(2, urgency=urgency_of(7, 3)))
    assert [(priority_of(one.urgency), depth_of(one.urgency)) for one in loaded(connection)] == [(7, 0), (7, 3)]
    connection.execute("ALTER TABLE broker_task DROP COLUMN depth")
    connection.execute("ALTER TABLE broker_task DROP COLUMN marks")
    assert [(priority_of(one.urgency), depth_of(one.urgency)) for one in loaded(connection)] == [(7, 0), (7, 0)]
    write(TaskStore(connection), task(3, urgency=urgency_of(7, 3)))
    assert depth_of(loaded(connection)[2].urgency) == 3


def test_each_task_is_written_once(connection: sqlite3.Connection) -> None:
    """One row for what came and was given away; none for what came and went; one deletion."""
    store = TaskStore(connection)
    before = connection.total_changes
    held, gone = task(1, place="held", hold=Hold("ann", None, 1, 0.0)), task(2, place="")
    write(store, held, gone)
    assert connection.total_changes == before + 1
    held.place, held.hold = "", None
    write(store, held)
    assert connection.total_changes == before + 2
    assert loaded(connection) == []


def test_one_task_takes_over_from_another_in_one_commit(connection: sqlite3.Connection) -> None:
    """The old one is deleted before the new one comes."""
    store = TaskStore(connection)
    old = task(1, key="k")
    write(store, old)
    old.place = ""
    write(store, task(2, order=1, key="k"), old)
    assert [(one.number, one.order) for one in loaded(connection)] == [(2, 1)]


def test_bodies_are_on_disk_and_the_latest_in_memory(
    connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a bound; what is given away or done with makes room."""
    monkeypatch.setattr(taskstore, "BODY_CACHE_BYTES", 2 * (taskstore.BODY_OVERHEAD_BYTES + 4))
    store = TaskStore(connection)
    tasks = [task(number) for number in range(1, 5)]
    write(store, *tasks)
    statements: list[str] = []
    connection.set_trace_callback(statements.append)
    assert [store.body(number) for number in range(1, 5)] == [b"body"] * 4
    assert len(statements) == 2
    store.forget_body(4)
    assert store.body(4) == b"body"
    assert len(statements) == 3
    connection.set_trace_callback(None)


def test_the_body_of_a_settled_task_is_not_kept(connection: sqlite3.Connection) -> None:
    """Only its result is, as long as somebody waits for it."""
    store = TaskStore(connection)
    old, quick = task(1, waiters=("ann",)), task(2, waiters=("ann",))
    write(store, old)
    for one in (old, quick):
        one.place, one.outcome, one.size = "settled", b"result", 6
    write(store, old, quick)
    assert old.outcome is quick.outcome is None
    write(store, old, quick)  # somebody else waits for it, say
    assert connection.execute("SELECT body, outcome FROM broker_task").fetchall() == [(b"", b"result")] * 2
    assert [store.body(number) for number in (1, 2)] == [b"", b""]


@pytest.mark.parametrize("damage", ["x'626f6479ff'", "x''", "x'626f6478'"])
def test_a_damaged_body_is_seen(connection: sqlite3.Connection, damage: str) -> None:
    """By its checksum; it is still there for who wants to look at it."""
    write(TaskStore(connection), task(1))
    connection.execute(f"UPDATE broker_task SET body = {damage}")
    store = TaskStore(connection)
    with pytest.raises(PersistenceError, match="damaged"):
        store.body(1)
    assert store.body(1, checked=False) == bytes.fromhex(damage[2:-1])


def test_a_body_that_is_gone_is_damage(connection: sqlite3.Connection) -> None:
    """Somebody deleted its row behind our back."""
    with pytest.raises(PersistenceError):
        TaskStore(connection).body(1)


def test_the_epoch_of_the_broker_rises(connection: sqlite3.Connection) -> None:
    """With every start, for ever."""
    assert [TaskStore(connection).next_broker_epoch() for _ in range(3)] == [1, 2, 3]


def test_tables_of_the_first_version_are_upgraded(tmp_path: Path) -> None:
    """In the transaction of the caller: all or nothing. Every task keeps its place, holder, waiters and result."""
    path = tmp_path / "old.db"
    rows = [
        ("b", "q", "k", 5, b"second", 12, 1, "ann", 77, "ann\nbob", None),
        ("a", "q", None, 0, b"first", 3, 0, None, 0, "", None),
        ("c", "r", None, 0, b"", 13, 2, None, 78, "bob", b"result"),
    ]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(OLD_TABLES)
        connection.executemany(f"INSERT INTO broker_task VALUES ({', '.join('?' * 11)})", rows)
        connection.execute("INSERT INTO broker_session VALUES ('ann', 'h', 1, 2)")
        connection.execute("INSERT INTO broker_meta VALUES ('broker_epoch', 41)")
        connection.execute("BEGIN IMMEDIATE")
        TaskStore(connection)
        connection.execute("ROLLBACK")
        assert connection.execute("SELECT count(*) FROM broker_task WHERE body = x''").fetchone() == (1,)
        connection.execute("BEGIN IMMEDIATE")
        store = TaskStore(connection)
        assert store.next_broker_epoch() == 42
        connection.execute("COMMIT")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        store = TaskStore(connection)
        state = store.load()
        first, second, third = state.tasks
        assert [(one.id, one.order) for one in (first, second, third)] == [("a", 1), ("b", 2), ("c", 3)]
        assert second.hold == Hold("ann", None, 77, 0.0)
        assert (second.key, priority_of(second.urgency), second.attempt) == ("k", 5, 1)
        assert second.waiters == ("ann", "bob")
        assert (third.place, store.outcome(third.number)) == ("settled", b"result")
        assert [store.body(number) for number in (1, 2, 3)] == [b"first", b"second", b""]
        crcs = connection.execute("SELECT crc FROM broker_task ORDER BY number").fetchall()
        assert crcs == [(zlib.crc32(body),) for body in (b"first", b"second", b"")]
        assert state.sessions == (("ann", Peer("h", 1, 2)),)
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        assert "broker_task_1" not in names
        TaskStore(connection)
        assert len(loaded(connection)) == 3


def test_a_million_tasks_share_what_is_the_same(connection: sqlite3.Connection) -> None:
    """Names and needs are one object each, so that they fit into memory."""
    plain = [task(number, queue="queue", subject="subject") for number in range(1, 4)]
    others = [
        task(number, queue="queue", subject="subject", needs=(("gpu", 1),), not_before=1e12) for number in range(4, 7)
    ]
    write(TaskStore(connection), *plain, *others)
    queues = TaskQueues(1, 0.0, lambda effect: None)
    queues.restore(TaskStore(connection).load().tasks, {}, {})
    back = list(queues.select("queue"))
    assert [one.place for one in back] == ["ready"] * 3 + ["delayed"] * 3
    assert len({id(one.queue) for one in back}) == 1
    for kind in (back[:3], back[3:]):
        assert len({id(one.subject) for one in kind}) == 1
        assert len({id(one.needs) for one in kind}) == 1


def test_a_copy_that_takes_the_place_of_a_database_has_epochs_of_its_own(connection: sqlite3.Connection) -> None:
    """Above all that were given since it was made."""
    store = TaskStore(connection)
    store.next_broker_epoch()
    store.raise_broker_epoch(40)
    assert store.next_broker_epoch() == 42
