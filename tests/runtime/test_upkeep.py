"""What is done for a broker's database while it serves, and when nobody serves it."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from prunus.errors import (
    BusyError,
    DaemonError,
    NotPermittedError,
    PersistenceError,
    ProtocolError,
    StaleOwnerError,
    StoreFullError,
)
from prunus.messaging.access import Role
from prunus.messaging.doors import Connection
from prunus.messaging.exchange import BrokerStoppedError
from prunus.messaging.liveness import boottime, this_peer
from prunus.messaging.messages import ClientMessage, Hello, TaskEdit, TaskSend, encode
from prunus.persistence import NewProcess, Save, database
from prunus.persistence.database import find_damage, free_pages, open_database
from prunus.persistence.sqlite import ProcessStore
from prunus.runtime import upkeep
from prunus.runtime.backend import ProcessService
from prunus.runtime.broker import Broker
from prunus.runtime.controller import ProcessController, connect
from prunus.runtime.locks import ServiceLock
from prunus.runtime.profile import Config, Profile
from prunus.runtime.upkeep import BackUp, Check, CopyAsk, Copying, GiveBack, Request, Upkeep
from tests.disks import small_file_system
from tests.guarantees.real_daemon import RealDaemon

SENT_BEFORE = 400
BODY = os.urandom(20_000)


async def ask(controller: ProcessController, request: Request) -> bytes:
    [answer] = await controller.communicator.call([upkeep.encode(request)])
    return answer


async def written(controller: ProcessController) -> Copying:
    """The end of the backup that was begun."""
    while True:
        copying = upkeep.decode_copying(await ask(controller, CopyAsk()))
        if copying.size is not None or copying.failure is not None:
            return copying


async def ids_of(controller: ProcessController, queue: str) -> set[str]:
    found: set[str] = set()
    after = 0
    while page := await controller.communicator.tasks(queue, after=after, limit=1000):
        found |= {info.id for info in page}
        after = page[-1].order
    return found


# --- with a broker process --------------------------------------------------------------------------


async def test_a_backup_is_made_while_tasks_go_on(short_folder: Path) -> None:
    """Traffic does not stop for it. A broker serves the copy, with every task in it that was confirmed before it began,
    and with none in halves."""
    copy = short_folder / "copy.db"
    async with RealDaemon(short_folder, workers=0) as daemon:
        controller = daemon.controller
        send = controller.communicator.task_send
        before = {receipt.id for receipt in await asyncio.gather(*(send(BODY, queue="q") for _ in range(SENT_BEFORE)))}
        begun = upkeep.decode_copying(await ask(controller, BackUp(file=str(copy))))
        assert begun.size is None
        during = set()
        end = asyncio.ensure_future(written(controller))
        while not end.done():
            during.add((await send(BODY, queue="q")).id)
        copying = end.result()
        assert copying.failure is None
        assert copying.size == copy.stat().st_size
        assert len(during) > 1, "tasks were confirmed meanwhile"
        assert await ids_of(controller, "q") == before | during
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert [name for name in os.listdir(short_folder) if "partial" in name] == []
    other = Profile.create(short_folder / "other")
    shutil.copy(copy, other.database)
    async with Serving(other) as controller:
        found = await ids_of(controller, "q")
        assert before <= found <= before | during
        [info] = await controller.communicator.tasks(task=min(before), bodies=True)
        assert info.body == BODY


class Serving:
    """A broker process of an existing profile, and a controller."""

    def __init__(self, profile: Profile) -> None:
        self._daemon = RealDaemon.__new__(RealDaemon)
        self._daemon.profile, self._daemon.services, self._daemon._workers = profile, {}, 0
        self._daemon._connection = connect(profile)

    async def __aenter__(self) -> ProcessController:
        await self._daemon.__aenter__()
        return self._daemon.controller

    async def __aexit__(self, *_: object) -> None:
        await self._daemon.__aexit__()


async def test_a_broker_that_ends_leaves_no_half_backup(short_folder: Path) -> None:
    """SIGTERM in the middle of one: the file is whole or not there, and nothing else is."""
    async with RealDaemon(short_folder, workers=0) as daemon:
        send = daemon.controller.communicator.task_send
        await asyncio.gather(*(send(BODY, queue="q") for _ in range(SENT_BEFORE)))
        folder = short_folder / "backups"
        folder.mkdir()
        await ask(daemon.controller, BackUp(file=str(folder / "copy.db")))
        daemon.services["broker"].send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(daemon.services["broker"].wait, 20) == 0
        left = os.listdir(folder)
        assert left in ([], ["copy.db"])
        if left:
            with closing(open_database(folder / "copy.db")) as copy:
                assert find_damage(copy) == []
        daemon.start("broker")


@pytest.fixture
def small_disk(short_folder: Path) -> Iterator[Path]:
    """A file system with room for a part of a backup."""
    with small_file_system(short_folder / "small", 2 * 1024 * 1024) as folder:
        yield folder


async def test_a_full_disk_is_the_askers_trouble_alone(short_folder: Path, small_disk: Path) -> None:
    """The broker goes on, and of the backup nothing is left."""
    async with RealDaemon(short_folder, workers=0) as daemon:
        send = daemon.controller.communicator.task_send
        await asyncio.gather(*(send(BODY, queue="q") for _ in range(SENT_BEFORE)))
        with pytest.raises(StoreFullError):
            await ask(daemon.controller, BackUp(file=str(small_disk / "copy.db")))
        assert os.listdir(small_disk) == []
        await send(b"goes on", queue="q")
        await ask(daemon.controller, BackUp(file=str(short_folder / "copy.db")))
        assert (await written(daemon.controller)).failure is None


async def test_a_damaged_database_stops_the_broker_with_a_sentence(short_folder: Path) -> None:
    """It says which file, what is wrong and what to do; and it repairs nothing."""
    async with RealDaemon(short_folder, workers=0) as daemon:
        send = daemon.controller.communicator.task_send
        await asyncio.gather(*(send(BODY, queue="q") for _ in range(20)))
    file = daemon.profile.database
    with file.open("r+b") as handle:
        handle.seek(3 * 4096)
        handle.write(b"\xff" * 4096 * 3)
    before = file.read_bytes()
    daemon.start("broker")
    assert await asyncio.to_thread(daemon.services["broker"].wait, 20) == 1
    last = daemon.profile.log("broker").read_text().splitlines()[-1]
    assert "CRITICAL" in last
    for part in (str(file), "nothing was repaired", "`prunus broker restore FILE`"):
        assert part in last
    assert file.read_bytes() == before


def test_a_disk_that_fails_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the broker does at that moment: it ends as one that stops, and not with a traceback."""

    def fail(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    broker = Broker(tmp_path / "prunus.db")
    with monkeypatch.context() as patched:
        patched.setattr("prunus.runtime.broker.checkpoint_wal", fail)
        with pytest.raises(BrokerStoppedError, match="disk I/O error"):
            broker.close()
        patched.setattr("prunus.runtime.reconcile.look", fail)
        with pytest.raises(BrokerStoppedError, match="disk I/O error"):
            broker.look_after(boottime() + 100, put=fail)
        broker.abandon()
        patched.setattr("prunus.runtime.broker.ProcessStore", fail)
        with pytest.raises(BrokerStoppedError, match="disk I/O error"):
            Broker(tmp_path / "prunus.db")
    Broker(tmp_path / "prunus.db").close()  # nobody holds the file any more


# --- requests ---------------------------------------------------------------------------------------


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(open_database(tmp_path / "prunus.db")) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.executemany("INSERT INTO t VALUES (?)", [(BODY,)] * 100)
        yield connection


@pytest.fixture
def served(connection: sqlite3.Connection) -> Iterator[Upkeep]:
    served = Upkeep(connection)
    yield served
    served.stop()


def say(served: Upkeep, request: Request) -> bytes:
    return served.execute(upkeep.encode(request).removeprefix(upkeep.PREFIX)).answer


def end_of(served: Upkeep) -> Copying:
    while True:
        served.turn()
        copying = upkeep.decode_copying(say(served, CopyAsk()))
        if copying.size is not None or copying.failure is not None:
            return copying


def test_only_the_owner_looks_after_the_database(connection: sqlite3.Connection, tmp_path: Path) -> None:
    """A key of another role is not enough to have files written on the broker's host."""
    service = ProcessService(ProcessStore(connection), upkeep=Upkeep(connection))
    for role in Role:
        request = upkeep.encode(Check())
        if role is Role.OWNER:
            assert upkeep.decode_damage(service.execute(request, "s", role).answer) == []
        else:
            with pytest.raises(NotPermittedError):
                service.execute(request, "s", role)


def test_a_backup_has_to_be_possible(served: Upkeep, tmp_path: Path) -> None:
    """What can be seen at once is said at once."""
    (tmp_path / "there").touch()
    for file, says in (
        (tmp_path / "there", "exists already"),
        (tmp_path / "nowhere" / "copy.db", "no folder"),
        (tmp_path, "is a folder"),
        (Path("/"), "is a folder"),
        (Path("copy.db"), "no absolute path"),
        (tmp_path / ("x" * 300), "too long"),
        (tmp_path / "x" / ("y" * 300) / "copy.db", "no folder"),
        (tmp_path / ("x" * 252), "too long"),
        (tmp_path / "a\0b", "not the name of a file"),
    ):
        with pytest.raises(PersistenceError, match=says):
            say(served, BackUp(file=str(file)))
    with pytest.raises(PersistenceError, match="no backup was made"):
        say(served, CopyAsk())
    with pytest.raises(ProtocolError):
        served.execute(b"\xc1")


def test_one_backup_at_a_time(served: Upkeep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one is refused while the first is written, and taken afterwards."""
    monkeypatch.setattr(database, "STEP_PAGES", 1)
    say(served, BackUp(file=str(tmp_path / "a.db")))
    with pytest.raises(BusyError, match=r"a\.db is being written"):
        say(served, BackUp(file=str(tmp_path / "b.db")))
    assert end_of(served).failure is None
    while True:
        try:
            say(served, BackUp(file=str(tmp_path / "a.db"), replace=True))
            break
        except BusyError:  # the thread of the first one is about to end
            pass
    assert end_of(served).failure is None


def test_a_failure_is_told(served: Upkeep, tmp_path: Path) -> None:
    """Somebody else makes the file during the copy."""
    say(served, BackUp(file=str(tmp_path / "a.db")))
    (tmp_path / "a.db").touch()
    with pytest.raises(PersistenceError, match="exists already"):
        upkeep.raise_failure(end_of(served))


@pytest.mark.parametrize("has_begun", [False, True])
def test_an_end_of_the_broker_ends_a_backup(
    connection: sqlite3.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_begun: bool
) -> None:
    """At once, and without a trace of it."""
    monkeypatch.setattr(database, "STEP_PAGES", 1)
    monkeypatch.setattr(upkeep, "TURN_S", 1e-9)
    served = Upkeep(connection)
    say(served, BackUp(file=str(tmp_path / "a.db")))
    if has_begun:
        monkeypatch.setattr(upkeep, "TURN_S", 1e-3)
        served.turn()
        assert 0 < upkeep.decode_copying(say(served, CopyAsk())).done < 100
    served.stop()
    copying = upkeep.decode_copying(say(served, CopyAsk()))
    with pytest.raises(PersistenceError, match="the broker ended"):
        upkeep.raise_failure(copying)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith((".", "a"))] == []


def test_space_is_given_back_in_portions(served: Upkeep, connection: sqlite3.Connection) -> None:
    """As many requests as it takes, in the transaction of each."""
    connection.execute("DELETE FROM t")
    free, given = free_pages(connection), 0
    assert free > upkeep.PAGES_AT_ONCE
    while True:
        connection.execute("BEGIN IMMEDIATE")
        space = upkeep.decode_space(say(served, GiveBack()))
        connection.execute("COMMIT")
        assert space.given <= upkeep.PAGES_AT_ONCE
        given += space.given
        if not space.given:
            break
    assert (given, free_pages(connection)) == (free, 0)


def test_much_free_space_is_given_back_without_being_asked(
    served: Upkeep, connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not a little: it will be used again."""
    connection.execute("DELETE FROM t WHERE rowid > 10")
    free = free_pages(connection)
    served.give_back()
    assert free_pages(connection) == free, "fewer than MANY_FREE_PAGES"
    monkeypatch.setattr(upkeep, "MANY_FREE_PAGES", 10)
    served.give_back()
    assert free_pages(connection) == free - upkeep.PAGES_AT_ONCE
    monkeypatch.setattr(upkeep, "MUCH_FREE", 1.0)
    served.give_back()
    assert free_pages(connection) == free - upkeep.PAGES_AT_ONCE


def test_a_large_database_is_not_checked_while_it_serves(served: Upkeep, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stand still for too long; the error says what to do."""
    assert upkeep.decode_damage(say(served, Check())) == []
    monkeypatch.setattr(upkeep, "CHECKED_WHILE_SERVING_BYTES", 1000)
    with pytest.raises(PersistenceError, match="`prunus daemon stop`"):
        say(served, Check())


# --- without a broker -------------------------------------------------------------------------------


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return Profile.create(tmp_path / "profile")


def claim(profile: Profile, pid: str, *, new: bool = False) -> int:
    """The epoch under which a worker holds a process from now on."""
    with closing(open_database(profile.database)) as connection:
        store = ProcessStore(connection)
        connection.execute("BEGIN")
        if new:
            store.create(NewProcess(pid=pid, class_id="m:C", checkpoint=b"c", created_at=1.0))
        epoch = store.claim(pid, "w", at=1.0)[0].epoch
        connection.execute("COMMIT")
        return epoch


def test_epochs_go_on_above_all_that_were_given(profile: Profile, tmp_path: Path) -> None:
    """A worker that claimed a process after the backup was made can't write to what was restored, whoever holds it
    now; nor does a broker say that it is one that was there before."""
    claim(profile, "p", new=True)
    Broker(profile.database).close()
    upkeep.back_up(profile, tmp_path / "copy.db", replace=False, progress=lambda done, total: None)
    late = [claim(profile, "p") for _ in range(3)][-1]
    broker = Broker(profile.database)
    epoch_before = broker.exchange.broker_epoch
    broker.close()
    aside = upkeep.restore(profile, tmp_path / "copy.db")
    assert aside is not None
    assert claim(profile, "p") > late
    broker = Broker(profile.database)
    assert broker.exchange.broker_epoch > epoch_before
    broker.close()
    with closing(open_database(profile.database)) as connection, pytest.raises(StaleOwnerError):
        ProcessStore(connection).save(Save(pid="p", epoch=late, state="running", checkpoint=b"late"))
    with closing(open_database(aside)) as connection:
        assert ProcessStore(connection).load("p")[0].epoch == late


def test_a_profile_that_is_served_is_left_alone(profile: Profile, tmp_path: Path) -> None:
    """Whoever holds the broker's lock has the database; a daemon would start a broker in the middle of it."""
    claim(profile, "p", new=True)
    upkeep.back_up(profile, tmp_path / "copy.db", replace=False, progress=lambda done, total: None)
    for name in ("broker", "daemon"):
        with ServiceLock(profile.lock(name)), pytest.raises(DaemonError, match="runs already"):
            upkeep.restore(profile, tmp_path / "copy.db")
    with ServiceLock(profile.lock("broker")):
        for act in (upkeep.vacuum, upkeep.check):
            with pytest.raises(DaemonError):
                act(profile)


def test_without_a_database_there_is_nothing_to_do(profile: Profile, tmp_path: Path) -> None:
    """And none is made."""
    for act in (upkeep.vacuum, upkeep.check):
        with pytest.raises(PersistenceError, match="there is no database"):
            act(profile)
    with pytest.raises(PersistenceError, match="there is no database"):
        upkeep.back_up(profile, tmp_path / "copy.db", replace=False, progress=lambda done, total: None)
    assert not profile.database.exists()


OWN = (
    *("config.yaml", ".gitignore", "prunus.db", "prunus.db-wal", "prunus.db-shm", "prunus.db-mark", "prunus.db.old"),
    *(".prunus.db.restoring", "run", "run/broker.lock", "run/new", "logs/broker.log", "keys", "keys/server.yaml"),
    *("blobs", "blobs/00/11", "ballast"),
)
"""Names that a profile has for itself, those of files that it has and of others."""


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("way", ["its own", "link", "hard link", "through a folder"])
def test_nothing_of_the_profile_itself_becomes_a_backup(profile: Profile, tmp_path: Path, name: str, way: str) -> None:
    """Under whatever name: neither by a broker, which a client asked for it, nor without one."""
    Broker(profile.database).close()
    profile.log("broker").write_text("a line")
    own, target = profile.path / name, tmp_path / "copy.db"
    match way:
        case "its own":
            target = own
        case "link":
            target.symlink_to(own)
        case "hard link" if own.is_file():
            target.hardlink_to(own)
        case _:
            (tmp_path / "other").symlink_to(profile.path)
            target = tmp_path / "other" / "logs" / ".." / name
    before = files_in(tmp_path)
    for replace in (True, False):
        with pytest.raises(PersistenceError, match=r"of the profile .* itself; nothing was changed: choose a name"):
            upkeep.back_up(profile, target, replace=replace, progress=lambda done, total: None)
        assert files_in(tmp_path) == before
        with closing(open_database(profile.database)) as connection:
            served = Upkeep(connection)
            while_open = files_in(tmp_path)
            with pytest.raises(PersistenceError, match=r"of the profile .* itself; nothing was changed: choose a name"):
                say(served, BackUp(file=str(target), replace=replace))
            assert files_in(tmp_path) == while_open
        before = files_in(tmp_path)


def test_a_folder_of_the_profile_may_lie_elsewhere(profile: Profile, tmp_path: Path) -> None:
    """It is the profile's own there, too; be it the one that a backup would use for its blobs."""
    Broker(profile.database).close()
    for name in ("large", "copy.db.blobs"):
        (tmp_path / name).mkdir()
        profile.blobs.unlink(missing_ok=True)
        profile.blobs.symlink_to(tmp_path / name)
        target = tmp_path / "large" / "copy.db" if name == "large" else tmp_path / "copy.db"
        with pytest.raises(PersistenceError, match=r"large.copy\.db is, or would be|not a folder of a backup"):
            upkeep.back_up(profile, target, replace=False, progress=lambda done, total: None)


@pytest.mark.parametrize("name", ["copy.db", "backups/copy.db", "backups/prunus.db", "backups/config.yaml"])
def test_a_backup_may_lie_in_the_profile(profile: Profile, name: str) -> None:
    """Beside what the profile has for itself, and in a folder of one's own; it is replaced, if that is asked for."""
    Broker(profile.database).close()
    (profile.path / "backups").mkdir()
    for replace in (False, True):
        upkeep.back_up(profile, profile.path / name, replace=replace, progress=lambda done, total: None)
    with closing(open_database(profile.path / name)) as copy:
        assert find_damage(copy) == []


def test_what_is_no_file_is_not_replaced(served: Upkeep, tmp_path: Path) -> None:
    """The broker says so at once."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    for name in ("fifo", "link"):
        with pytest.raises(PersistenceError, match=f"{name} is a FIFO"):
            say(served, BackUp(file=str(tmp_path / name), replace=True))
    assert stat.S_ISFIFO((tmp_path / "fifo").lstat().st_mode)


def files_in(folder: Path) -> dict[Path, tuple[int, int, bytes]]:
    """What lies there, and what is in it (not in locks, which say who holds them)."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) and path.suffix != ".lock" else b""
        found[path] = status.st_mode, status.st_ino, content
    return found


# --- retention --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("30d", 30 * 86_400), ("12h", 43_200), ("90min", 5400), ("5s", 5), (None, None)]
)
def test_how_long_dead_letters_are_kept(text: str | None, seconds: float | None) -> None:
    """As the profile says; else for ever."""
    config = Config.from_mapping({} if text is None else {"retention": {"dead_letters": text}}, "config.yaml")
    assert config.keep_s("dead_letters") == seconds
    assert Config.from_mapping({"retention": {}}, "config.yaml").keep_s("dead_letters") is None


@pytest.mark.parametrize("value", [{"dead_letters": "a month"}, {"dead_letters": 30}, {"dead": "30d"}, "30d"])
def test_a_wrong_retention_is_refused(value: object) -> None:
    """With the name of the setting."""
    with pytest.raises(Exception, match="retention"):
        Config.from_mapping({"retention": value}, "config.yaml")


def test_old_dead_letters_are_forgotten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that died long ago, and no other task; younger ones stay."""
    caplog.set_level(logging.INFO)
    file = tmp_path / "prunus.db"
    for keep_s, left in ((3600.0, 3), (None, 3), (0.0, 0)):
        broker = Broker(file, keep_dead_s=keep_s)
        if left == 3 and keep_s is not None:
            bury(broker, 3)
        for _ in range(2):
            broker.look_after(boottime() + 2, put=lambda tasks: None)
        queue = broker.exchange.statistics().queues["q"]
        assert (queue.dead, queue.ready) == (left, 1)
        broker.close()
    assert "3 dead letters were older than 0 s and are forgotten" in caplog.text


def bury(broker: Broker, count: int) -> None:
    """So many dead letters, and a task that is none."""
    route = cast(Connection, "a route")
    ids = [f"t{number}" for number in range(count)]
    say: list[ClientMessage] = [
        Hello(session="s", peer=this_peer()),
        *(TaskSend(id=number, task=name, queue="q", body=b"") for number, name in enumerate([*ids, "live"], 1)),
        TaskEdit(id=count + 2, action="bury", tasks=tuple(ids)),
    ]
    broker.exchange.process(boottime(), [(route, encode(message)) for message in say])
