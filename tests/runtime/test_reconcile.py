"""What nobody looks after is found and repaired: when a broker starts, at an interval, and by the doctor."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from prunus.errors import NotPermittedError, ProtocolError
from prunus.messaging.access import Role
from prunus.messaging.liveness import boottime
from prunus.persistence.persister import Effects
from prunus.persistence.sqlite import ProcessStore, open_database
from prunus.runtime import reconcile
from prunus.runtime.backend import ProcessService
from prunus.runtime.broker import RECONCILE_INTERVAL_S, Broker
from prunus.runtime.controller import ProcessController
from prunus.runtime.reconcile import (
    LOOKED_AFTER,
    NO_LIMIT,
    Check,
    Finding,
    Mend,
    Place,
    Reconciler,
    Report,
    TasksOf,
    TasksOnDisk,
    look,
    look_on,
    mend,
    violations,
)
from prunus.testing.local_daemon import LocalDaemon
from prunus.testing.persister_contract import new, save_of
from tests.guarantees.real_daemon import RealDaemon
from tests.runtime import features, workflows
from tests.runtime.shell import Shell
from tests.runtime.waiting import until

NOW = 1000.0

# --- small stores, damaged by hand ------------------------------------------------------------------


class World:
    """A store with processes in every situation, and a broker that knows what it should."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.store = ProcessStore(connection, clock=lambda: NOW)
        self.tasks: dict[str, None] = {}
        self.known = {"worker-1", "worker-2"}
        for pid in ("child", "other", "queued", "held", "timed", "listening", "suspended", "paused", "called", "some"):
            self.do(self.store.create(new(pid))[1])
        self.store.claim("held", "worker-1", at=1.0)
        self.park("timed", wake_at=NOW + 100)
        self.park("listening", names=("mail",), listens=("mail",))
        self.park("suspended")
        self.park("paused", state="running", play="paused")
        self.park("called", play="paused")
        self.do(self.store.post("called", b"hello")[1])
        self.park("some", waits=(("child",), ("other", "held")), wake_at=NOW + 200)
        self.do(self.store.create(new("all"))[1])
        self.park("all", waits=(("child", "other"),))
        self.finish("child")

    def do(self, effects: Effects) -> None:
        """What becomes of this in a broker."""
        self.tasks |= dict.fromkeys((*effects.runnable, *effects.called))

    def park(self, pid: str, state: str = "waiting", **fields: object) -> None:
        claim = self.store.claim(pid, "worker-1", at=1.0)[0]
        self.tasks.pop(pid, None)
        self.do(self.store.save(save_of(claim, state, release=True, **fields))[1])

    def finish(self, pid: str) -> None:
        claim = self.store.claim(pid, "worker-2", at=2.0)[0]
        self.tasks.pop(pid, None)
        self.do(self.store.save(save_of(claim, "finished"))[1])

    def has_task(self, key: str) -> bool:
        return key in self.tasks

    def is_served(self, queue: str) -> bool:
        return bool(self.known)

    def sessions(self) -> set[str]:
        return self.known

    def own_tasks(self, limit: int) -> Sequence[str]:
        return list(self.tasks)[:limit]

    def found(self) -> list[Finding]:
        found, after = look(self.store, self, None, time.monotonic, 10.0)
        assert after is None
        return found

    def mend(self) -> None:
        self.do(mend(self.store, self, self.found(), NOW))

    def violations(self) -> list[str]:
        return violations(self.connection, self)


DAMAGE: dict[str, tuple[str, str, str]] = {
    "its owner is a ghost": ("UPDATE process SET owner = 'ghost-1' WHERE pid = 'held'", "held", "orphan"),
    "an owner for who has none": ("UPDATE process SET owner = 'ghost-2' WHERE pid = 'timed'", "timed", "orphan"),
    "its rows of waits are gone": (
        "DELETE FROM wait WHERE waiter = (SELECT n FROM process WHERE pid = 'all')",
        "all",
        "lost",
    ),
    "one of its rows of waits is gone": (
        "DELETE FROM wait WHERE waiter = (SELECT n FROM process WHERE pid = 'all') AND ended = 0",
        "all",
        "lost",
    ),
    "it does not know who has ended": (
        "UPDATE wait SET ended = 0 WHERE target = (SELECT n FROM process WHERE pid = 'child')",
        "all",
        "lost",
    ),
    "it believes that somebody has ended": ("UPDATE wait SET ended = 1", "all", "lost"),
    "its timer is cleared": ("UPDATE process SET wake_at = NULL WHERE pid = 'timed'", "timed", "lost"),
    "what it listens for is cleared": (
        "UPDATE process SET listens = NULL WHERE pid = 'listening'",
        "listening",
        "lost",
    ),
    "it is not ready any more": ("UPDATE process SET ready = 0 WHERE pid = 'queued'", "queued", "lost"),
    "it is not ready after a group": ("UPDATE process SET ready = 0 WHERE pid = 'some'", "some", "lost"),
    "its letters do not count": ("UPDATE process SET inbox_last = 0 WHERE pid = 'called'", "called", "lost"),
}


@pytest.fixture
def world() -> World:
    return World(open_database(":memory:"))


def test_nothing_is_found_where_all_is_well(world: World) -> None:
    """Not who is suspended, paused, called, parked, held or queued."""
    assert world.violations() == []
    assert world.found() == []
    world.tasks.clear()
    assert {one.kind for one in world.found()} == {"no task"}
    assert world.violations()
    world.mend()
    assert world.violations() == []


@pytest.mark.parametrize("damage", DAMAGE)
def test_each_kind_of_damage_is_found_and_repaired(world: World, damage: str) -> None:
    """It is found at the process that has it, and then all is well again."""
    statement, pid, kind = DAMAGE[damage]
    assert world.connection.execute(statement).rowcount
    assert world.violations()
    assert (pid, kind) in {(one.pid, one.kind) for one in world.found()}
    world.mend()
    assert world.violations() == []
    assert world.found() == []
    assert world.has_task(pid), "somebody looks at it anew"


@settings(max_examples=60, deadline=None)
@given(damage=st.lists(st.sampled_from(sorted(DAMAGE)), min_size=1), lost_tasks=st.booleans(), rounds=st.integers(1, 2))
def test_any_damage_is_repaired(damage: list[str], lost_tasks: bool, rounds: int) -> None:
    """However much of it there is together: after the repair G12 holds, and another one finds nothing to do."""
    with closing(open_database(":memory:")) as connection:
        world = World(connection)
        for _ in range(rounds):
            for one in damage:
                connection.execute(DAMAGE[one][0])
            if lost_tasks:
                world.tasks.clear()
            world.mend()
            assert world.violations() == []
        assert world.found() == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_written_over_is_repaired(data: st.DataObject) -> None:
    """Any flag of any process that has not ended, and any wait, may be wrong."""
    with closing(open_database(":memory:")) as connection:
        world = World(connection)
        pids = st.sampled_from(["other", "queued", "held", "timed", "listening", "suspended", "paused", "some", "all"])
        for _ in range(data.draw(st.integers(1, 6))):
            column, value = data.draw(
                st.sampled_from(
                    [("ready", 0), ("owner", "ghost-3"), ("owner", None), ("wake_at", None), ("listens", None)]
                )
            )
            connection.execute(f"UPDATE process SET {column} = ? WHERE pid = ?", (value, data.draw(pids)))
            connection.execute(f"UPDATE wait SET ended = {data.draw(st.sampled_from(['ended', '0', '1']))}")
        for pid in data.draw(st.lists(pids)):
            world.tasks.pop(pid, None)
        world.mend()
        assert world.violations() == []


def test_what_is_late_and_stray_is_shown(world: World) -> None:
    """A timer that did not fire, and a task about nobody: the first is repaired, the second needs no repair."""
    world.connection.execute("UPDATE process SET wake_at = ? WHERE pid = 'timed'", (NOW - 60,))
    world.tasks["nobody"] = None
    found = look_on(world.store, world, NOW)
    assert [(one.kind, one.pid) for one in found] == [("late", "timed"), ("stray task", "nobody")]
    assert found[0].text == "should have been woken 60 s ago"
    world.do(mend(world.store, world, found, NOW))
    assert world.has_task("timed")
    assert [one.kind for one in look_on(world.store, world, NOW)] == ["stray task"]


def test_parked_processes_are_looked_at_in_slices(world: World) -> None:
    """When the time of a turn is over the next one goes on; no process is left out, and none is looked at twice."""
    pids = [f"p{number}" for number in range(3 * LOOKED_AFTER)]
    for pid in pids:
        world.do(world.store.create(new(pid))[1])
        world.park(pid, wake_at=NOW + 1)
    world.connection.execute("UPDATE process SET wake_at = NULL WHERE pid LIKE 'p_%' AND pid <> 'paused'")
    found, places, after = list[Finding](), list[Place](), None
    while True:
        more, after = look(world.store, world, after, lambda: 0.0, 0.0)
        found += more
        if after is None:
            break
        places.append(after)
        assert len(more) <= LOOKED_AFTER
    assert len(places) >= 3
    assert [one.pid for one in found] == pids
    some, after = look(world.store, world, None, time.monotonic, 10.0, limit=5)
    assert [one.pid for one in some] == pids[:5]
    assert after is not None


def test_a_round_begins_at_an_interval(world: World) -> None:
    """Between two of them a turn does nothing; a round that is not over goes on in the next turn."""
    reconciler = Reconciler(world.store, world, 60.0)
    assert reconciler.is_due(0.0)
    world.connection.execute("UPDATE process SET ready = 0 WHERE pid = 'queued'")
    found, effects = reconciler.turn(0.0, NOW)
    assert [one.pid for one in found] == ["queued"]
    assert effects.runnable == ("queued",)
    assert not reconciler.is_due(59.0)
    assert reconciler.turn(59.0, NOW) == ([], Effects())
    assert reconciler.is_due(60.0)


def test_only_the_owner_of_the_profile_has_it_checked(world: World) -> None:
    """And bytes that ask for nothing are refused."""
    service = ProcessService(world.store, tasks=TasksOf(lambda: world))
    for role in set(Role) - {Role.OWNER}:
        with pytest.raises(NotPermittedError):
            service.execute(reconcile.encode_request(Check()), "s", role)
    with pytest.raises(ProtocolError):
        service.execute(reconcile.PREFIX + b"nonsense", "s", Role.OWNER)
    answer = service.execute(reconcile.encode_request(Mend()), "s", Role.OWNER)
    assert [one.kind for one in reconcile.decode_report(answer.answer).found] == ["late", "late"]
    assert {task.key for task in answer.tasks} == {"timed"}, "the other one can go on already"


# --- by a broker ------------------------------------------------------------------------------------


async def ask(controller: ProcessController, request: Check | Mend) -> Report:
    [answer] = await controller.communicator.call([reconcile.encode_request(request)])
    return reconcile.decode_report(answer)


async def test_a_repaired_process_goes_on_as_if_nothing_had_happened() -> None:
    """Its waits are gone, its timer and its mail: each looks at them anew, waits again, and is woken by them."""
    async with LocalDaemon() as daemon:
        nap = await daemon.controller.launch(features.Nap, {"seconds": 3600.0})
        review = await daemon.controller.launch(features.Letters, {"count": 1})
        parked = [await until(each, lambda row: row.state == "waiting" and row.owner is None) for each in (nap, review)]
        daemon.connection.execute("UPDATE process SET wake_at = NULL, listens = NULL")
        report = await ask(daemon.controller, Check())
        assert sorted(one.pid for one in report.found) == sorted(record.pid for record in parked)
        report = await ask(daemon.controller, Mend())
        assert {one.kind for one in report.found} == {"lost"}
        for handle, before in zip((nap, review), parked, strict=True):
            after = await until(handle, lambda row, before=before: row.owner is None and row.epoch > before.epoch)  # type: ignore[misc]
            assert (after.state, after.names) == ("waiting", before.names)
            assert after.wake_at == (None if before.wake_at is None else pytest.approx(before.wake_at, abs=5.0))
        assert violations(daemon.connection, TasksOf(lambda: daemon.broker.exchange)) == []
        assert (await ask(daemon.controller, Check())).found == ()


def damage(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database)) as connection, connection:
        for statement in statements:
            assert connection.execute(statement).rowcount


def test_a_broker_repairs_when_it_starts_and_at_the_interval(tmp_path: Path) -> None:
    """The same damage twice; at the second time the broker runs."""
    database = tmp_path / "broker.db"
    statements = ["UPDATE process SET owner = 'ghost', ready = 0 WHERE pid = 'p'", "UPDATE process SET ready = 0"]
    with closing(open_database(database)) as connection:
        for pid in ("p", "q"):
            ProcessStore(connection).create(new(pid))
    damage(database, *statements)
    broker = Broker(database)
    try:
        connection = broker._connection
        now = boottime()
        broker.look_after(now, put=lambda tasks: broker.exchange.put(now, tasks))
        assert all(map(broker.exchange.has_task, ("p", "q")))
        assert violations(connection, broker.exchange) == []
        connection.execute(statements[1])
        last = now + RECONCILE_INTERVAL_S
        broker.look_after(last - 1, put=lambda tasks: None)
        assert violations(connection, broker.exchange)
        broker.look_after(last, put=lambda tasks: broker.exchange.put(last, tasks))
        assert violations(connection, broker.exchange) == []
    finally:
        broker.close()


@pytest.mark.timeout(60)
async def test_a_damaged_database_goes_on_when_the_broker_starts(short_folder: Path) -> None:
    """A ghost holds one process, another one has lost its timer: both of them end."""
    async with RealDaemon(short_folder, workers=1) as daemon:
        nap = await daemon.controller.launch(features.Nap, {"seconds": 0.2})
        add = await daemon.controller.launch(workflows.Ask)
        for handle in (nap, add):
            await until(handle, lambda row: row.state in ("waiting", "finished") and row.owner is None)
        daemon.kill("worker-1")
        daemon.kill("broker")
        damage(
            daemon.profile.database,
            "UPDATE process SET wake_at = NULL",
            f"UPDATE process SET owner = 'worker-9-ghost' WHERE pid = '{add.pid}'",
        )
        daemon.start("broker")
        daemon.start("worker-1")
        assert (await nap.result()).value == "awake", daemon.logs()
        await add.resume("still there")
        assert (await add.result()).outputs.answer == "still there"


def test_the_doctor_repairs_what_a_stopped_daemon_left(tmp_path: Path) -> None:
    """Without --fix it only says so, with a bad exit code; with it, it says what it did; --json is for programs."""
    shell = Shell(tmp_path)
    shell("init")
    database = shell.folder / ".prunus" / "prunus.db"
    with closing(open_database(database)) as connection:
        ProcessStore(connection).create(new("p", class_id="nowhere:Work"))
    damage(database, "UPDATE process SET ready = 0")
    for _ in range(2):
        assert "problem  p          it is created and has lost that it can run" in shell("doctor", code=1).stdout
    assert "fixed    p          it is created and has lost that it can run" in shell("doctor", "--fix", code=1).stdout
    assert "has lost" not in shell("doctor", code=1).stdout
    found = json.loads(shell("doctor", "--json", code=1).stdout)
    assert {one["subject"]: one["level"] for one in found}["daemon"] == "problem"


def test_what_a_stopped_broker_knows_is_read_from_its_database(tmp_path: Path) -> None:
    """Its tasks and sessions; a database without tables of tasks has none."""
    with closing(open_database(tmp_path / "broker.db")) as connection:
        assert TasksOnDisk(connection).sessions() == frozenset()
    broker = Broker(tmp_path / "broker.db")
    broker.close()
    with closing(open_database(tmp_path / "broker.db")) as connection:
        tasks = TasksOnDisk(connection)
        assert not tasks.has_task("p")
        assert tasks.own_tasks(NO_LIMIT) == []
