"""Opening a database file: ours alone, durable, and refused with a sentence when it is not what it should be."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import stat
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prunus.errors import PersistenceError, StoreFullError
from prunus.persistence import database
from prunus.persistence.database import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    WAL_LIMIT_BYTES,
    checkpoint_wal,
    commit,
    database_path,
    explain,
    file_system_of,
    find_damage,
    lay_out_log,
    log_file_bytes,
    open_database,
    wal_bytes,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "processes.db"


@pytest.fixture
def connection(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(open_database(path)) as connection:
        yield connection


SETTINGS = {
    "journal_mode": "wal",
    "synchronous": 2,
    "locking_mode": "exclusive",
    "foreign_keys": 1,
    "trusted_schema": 0,
    "wal_autocheckpoint": 0,
    "application_id": APPLICATION_ID,
    "user_version": SCHEMA_VERSION,
}


def pragma(connection: sqlite3.Connection, name: str) -> object:
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def fill(connection: sqlite3.Connection, rows: int = 50) -> None:
    connection.execute("CREATE TABLE IF NOT EXISTS t (x)")
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO t VALUES (?)", [(os.urandom(4000),)] * rows)
    commit(connection)


def test_what_is_committed_is_on_the_disk(connection: sqlite3.Connection) -> None:
    """WAL with synchronous=FULL, an exclusive lock, foreign keys, no trust in the schema, and no hidden checkpoints."""
    assert {name: pragma(connection, name) for name in SETTINGS} == SETTINGS
    assert connection.isolation_level is None


def test_only_the_user_can_read_it(connection: sqlite3.Connection, path: Path) -> None:
    """The file and its log have mode 0600, whatever the umask is."""
    fill(connection)
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert database_path(connection) == str(path)


def test_a_second_opener_is_refused(
    connection: sqlite3.Connection, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment of opening, though nothing is written; and it may try again when the first is gone."""
    monkeypatch.setattr(database, "LOCK_TIMEOUT_S", 0.01)
    with pytest.raises(PersistenceError, match=r"another program has .* open"):
        open_database(path)
    connection.close()
    with closing(open_database(path)), pytest.raises(PersistenceError, match=r"another program has .* open"):
        open_database(path)
    open_database(path).close()


def test_without_exclusive_several_may_open_it(path: Path) -> None:
    """For tools that read beside the owner."""
    with closing(open_database(path, exclusive=False)) as one, closing(open_database(path, exclusive=False)) as two:
        fill(one, 3)
        assert two.execute("SELECT count(*) FROM t").fetchone() == (3,)


def test_memory_needs_no_file() -> None:
    """The same settings, as far as they make sense."""
    with closing(open_database(":memory:")) as connection:
        assert database_path(connection) == ":memory:"
        assert pragma(connection, "foreign_keys") == 1


def test_the_database_of_another_program_is_left_alone(path: Path) -> None:
    """Whether it says whose it is or only has tables: no byte of it changes."""
    for statement in ("PRAGMA application_id = 77", "CREATE TABLE theirs (x)"):
        path.unlink(missing_ok=True)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute(statement)
        before = path.read_bytes()
        with pytest.raises(PersistenceError, match="another program"):
            open_database(path)
        assert path.read_bytes() == before
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_newer_tables_are_refused(connection: sqlite3.Connection, path: Path) -> None:
    """With what to do."""
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(PersistenceError, match="upgrade Prunus"):
        open_database(path)


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    """And not overwritten."""
    path.write_text("dear diary, " * 100)
    with pytest.raises(PersistenceError, match="no database"):
        open_database(path)
    assert path.read_text().startswith("dear diary")


def test_a_damaged_database_is_refused(connection: sqlite3.Connection, path: Path) -> None:
    """Nothing is repaired silently."""
    fill(connection)
    connection.close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(4096 * 3))
    with pytest.raises(PersistenceError, match="backup"):
        open_database(path)


def test_damage_can_be_looked_for(connection: sqlite3.Connection) -> None:
    """In a sound file there is none."""
    fill(connection)
    assert find_damage(connection) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The folder is not made: that is the profile's business."""
    with pytest.raises(PersistenceError, match=r"can't be created: No such file"):
        open_database(tmp_path / "nowhere" / "p.db")


def test_a_checkpoint_empties_the_log(connection: sqlite3.Connection, path: Path) -> None:
    """It grows until its owner says so; then it holds its mark and nothing else."""
    fill(connection, 300)
    assert wal_bytes(path) > 300 * 4000
    assert checkpoint_wal(connection) is True
    assert wal_bytes(path) < 2 * 4096
    assert wal_bytes(path.with_name("nothing")) == 0


def test_the_log_is_written_over_and_not_begun_anew(connection: sqlite3.Connection, path: Path) -> None:
    """Its file has its blocks from the start, and keeps them: no commit has to wait for new ones."""
    assert log_file_bytes(path) < WAL_LIMIT_BYTES
    lay_out_log(connection)
    used = wal_bytes(path)
    assert used < 8 * 4096, "what was laid out is empty"
    for _ in range(3):
        fill(connection, 300)
        assert wal_bytes(path) > 300 * 4000
        assert log_file_bytes(path) == WAL_LIMIT_BYTES
        assert checkpoint_wal(connection) is True
        assert wal_bytes(path) < 2 * 4096
        assert log_file_bytes(path) == WAL_LIMIT_BYTES
    assert checkpoint_wal(connection, shrink=True) is True
    assert log_file_bytes(path) < 8 * 4096


def test_a_long_log_does_not_stay_long(connection: sqlite3.Connection, path: Path) -> None:
    """What it grew to in a bad hour is given back."""
    fill(connection, 2 * WAL_LIMIT_BYTES // 4096)
    assert wal_bytes(path) > WAL_LIMIT_BYTES
    assert checkpoint_wal(connection) is True
    assert log_file_bytes(path) <= WAL_LIMIT_BYTES


def test_what_was_committed_over_an_older_log_survives(path: Path, tmp_path: Path) -> None:
    """A file and its log are copied as a kill leaves them: of the log that was written over nothing comes back."""
    with closing(open_database(path)) as connection:
        lay_out_log(connection)
        fill(connection, 300)
        assert checkpoint_wal(connection) is True
        connection.execute("DELETE FROM t")
        connection.execute("INSERT INTO t VALUES (x'77')")
        copy = tmp_path / "copy.db"
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
        assert wal_bytes(copy) == wal_bytes(path) < log_file_bytes(path)
    with closing(open_database(copy)) as connection:
        assert connection.execute("SELECT x FROM t").fetchall() == [(b"w",)]
        assert find_damage(connection) == []


def test_a_checkpoint_that_fails_is_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reader that holds on to the log keeps it from being emptied: False, and a warning with the consequence."""
    with closing(open_database(path, exclusive=False)) as one, closing(open_database(path, exclusive=False)) as two:
        one.execute("PRAGMA busy_timeout = 0")
        fill(one, 3)
        two.execute("BEGIN")
        two.execute("SELECT count(*) FROM t").fetchone()
        fill(one, 3)
        with caplog.at_level(logging.WARNING):
            assert checkpoint_wal(one) is False
        assert "it grows until that works" in caplog.text


def test_a_full_disk_has_an_error_of_its_own(connection: sqlite3.Connection, path: Path) -> None:
    """With the path; what was there stays, and once there is space it goes on."""
    fill(connection, 3)
    connection.execute("PRAGMA max_page_count = 20")
    with pytest.raises(sqlite3.OperationalError) as caught:
        fill(connection, 50)
    full = database.full_disk(caught.value, connection)
    assert isinstance(full, StoreFullError)
    assert full.path == str(path)
    if connection.in_transaction:
        connection.execute("ROLLBACK")
    connection.execute("PRAGMA max_page_count = 2000")
    fill(connection, 50)
    assert connection.execute("SELECT count(*) FROM t").fetchone() == (53,)


def test_network_file_systems_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the mount that the path lies on."""
    monkeypatch.setattr(database, "file_system_of", lambda *_: "nfs4")
    with pytest.raises(PersistenceError, match=r"network file system \(nfs4\)"):
        open_database(path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/x", "ext4"),
        ("/home/me/p.db", "nfs"),
        ("/home/local/p.db", "xfs"),
        ("/homely/p.db", "ext4"),
        ("/with space/p.db", "cifs"),
        ("/over/p.db", "tmpfs"),
    ],
)
def test_the_longest_mount_point_counts(path: str, kind: str) -> None:
    """And of two at the same place the later one."""
    mounts = (
        "dev / ext4 rw 0 0\nsrv:/h /home nfs rw 0 0\ndev2 /home/local xfs rw 0 0\n"
        "//s /with\\040space cifs rw 0 0\nd /over nfs rw 0 0\nt /over tmpfs rw 0 0\n"
    )
    assert file_system_of(Path(path), mounts) == kind


# --- damage -----------------------------------------------------------------------------------------


def lie_as_after_a_crash(path: Path, rows: int = 400) -> bytes:
    """A database whose log was not put into it; all of its rows are in the log. Returns what a crash leaves of it."""
    connection = open_database(path)
    connection.execute("CREATE TABLE t (x)")
    checkpoint_wal(connection)
    fill(connection, rows)
    log = Path(f"{path}-wal").read_bytes()
    file = path.read_bytes()
    connection.close()
    path.write_bytes(file)
    Path(f"{path}-wal").write_bytes(log)
    return log


def refused(path: Path) -> str:
    """What opening says, that it says what to do, and that no byte of the file or of its log was changed."""
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(PersistenceError) as caught:
        open_database(path)
    assert str(path) in str(caught.value)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    return str(caught.value)


def test_what_a_crash_leaves_is_opened(path: Path) -> None:
    """The log is put into the file, again and again."""
    lie_as_after_a_crash(path)
    for _ in range(2):
        with closing(open_database(path)) as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (400,)


def test_a_log_of_another_database_is_refused(path: Path) -> None:
    """Though SQLite would take it for this one's, and make a mixture of both."""
    lie_as_after_a_crash(path.with_name("other.db"))
    with closing(open_database(path)) as connection:
        fill(connection, 10)
    shutil.move(path.with_name("other.db-wal"), f"{path}-wal")
    assert "belongs to another file" in refused(path)


def test_the_log_of_the_file_that_a_backup_replaced_is_refused(path: Path, tmp_path: Path) -> None:
    """The copy of a database is another file: whoever copies it over the old one must take the log away."""
    with closing(open_database(path)) as connection:
        fill(connection, 10)
        database.back_up(connection, tmp_path / "copy")
    Path(f"{path}-wal").unlink(missing_ok=True)
    lie_as_after_a_crash(path.with_name("later.db"))
    log = path.with_name("later.db-wal")
    with closing(open_database(path)) as connection:
        checkpoint_wal(connection)
        fill(connection, 10)
        log = Path(f"{path}-wal").read_bytes()
    shutil.copy(tmp_path / "copy", path)
    Path(f"{path}-wal").write_bytes(log)
    assert "belongs to another file" in refused(path)


def test_a_log_without_a_mark_is_taken(path: Path) -> None:
    """It may be of a version that did not make one; what is not known is no reason to refuse."""
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        old.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        old.execute("PRAGMA journal_mode = wal")
        old.execute("CREATE TABLE t (x)")
        old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        fill(old, 3)
        file, log = path.read_bytes(), Path(f"{path}-wal").read_bytes()
    path.write_bytes(file)
    Path(f"{path}-wal").write_bytes(log)
    with closing(open_database(path)) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (3,)


@pytest.mark.parametrize("kept", [0, 31, 32, 200, 5000])
def test_a_torn_log_is_no_foreign_one(path: Path, kept: int) -> None:
    """What was not committed is not there: with as much of the log as a power cut left."""
    log = lie_as_after_a_crash(path)
    Path(f"{path}-wal").write_bytes(log[:kept])
    with closing(open_database(path)) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (0,)


def test_a_log_without_its_file_is_refused(path: Path) -> None:
    """SQLite would delete the log, and what was committed with it."""
    lie_as_after_a_crash(path)
    path.write_bytes(b"")
    assert "is empty, but its log" in refused(path)
    path.unlink()
    assert "is gone, but its log" in refused(path)


def test_an_empty_file_is_a_new_database(path: Path) -> None:
    """It is what a crash in the moment of its making leaves."""
    path.touch()
    with closing(open_database(path)) as connection:
        assert pragma(connection, "application_id") == APPLICATION_ID


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (0, b"X", "is no database, or its beginning is damaged"),
        (16, b"\x13", "can't be used"),
        (60, struct.pack(">I", SCHEMA_VERSION + 1), "newer Prunus"),
        (68, b"Tree", "another program"),
        (100, b"\xff", "can't be used"),
    ],
    ids=["magic", "page size", "version", "application id", "first page"],
)
def test_a_damaged_header_is_refused(path: Path, at: int, value: bytes, says: str) -> None:
    """Whatever of it was changed."""
    with closing(open_database(path)) as connection:
        fill(connection)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)
    assert says in refused(path) or "is no database" in refused(path)


@pytest.mark.parametrize("large", [False, True])
def test_a_file_that_lost_its_end_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """Also a large one, which is not read as a whole."""
    with closing(open_database(path)) as connection:
        fill(connection)
    os.truncate(path, path.stat().st_size - 8192)
    if large:
        monkeypatch.setattr(database, "CHECKED_AT_OPENING_BYTES", 0)
    assert "prunus broker restore" in refused(path)


def test_a_large_file_is_checked_after_a_crash(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not whenever it is opened: a damaged page in its middle is found by who looks, and after an unclean end."""
    monkeypatch.setattr(database, "CHECKED_AT_OPENING_BYTES", 0)
    with closing(open_database(path)) as connection:
        fill(connection, 100)
    with path.open("r+b") as file:
        file.seek(10 * 4096)
        file.write(bytes(8))
    with closing(open_database(path)) as connection:
        assert find_damage(connection)
        fill(connection, 1)
        log = Path(f"{path}-wal").read_bytes()
    Path(f"{path}-wal").write_bytes(log)
    with pytest.raises(PersistenceError, match="prunus broker restore"):
        open_database(path)


# --- space ------------------------------------------------------------------------------------------


def test_free_pages_go_back_to_the_file_system(connection: sqlite3.Connection, path: Path) -> None:
    """In portions, as many as are asked for."""
    fill(connection, 300)
    connection.execute("DELETE FROM t")
    free = database.free_pages(connection)
    assert free >= 290
    assert database.gives_back_pages(connection)
    database.give_back_pages(connection, 100)
    assert database.free_pages(connection) == free - 100
    database.give_back_pages(connection, 10_000)
    checkpoint_wal(connection)
    assert path.stat().st_size < 10 * 4096


def test_an_old_file_gives_back_pages_after_a_vacuum(path: Path) -> None:
    """It was made without that; nothing of it is lost."""
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        old.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        fill(old, 300)
        old.execute("DELETE FROM t WHERE rowid > 5")
    with closing(open_database(path)) as connection:
        assert not database.gives_back_pages(connection)
        database.vacuum(connection)
        assert database.gives_back_pages(connection)
        assert database.free_pages(connection) == 0
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (5,)
        assert find_damage(connection) == []
    assert path.stat().st_size < 20 * 4096


def test_a_disk_that_fails_is_no_damage() -> None:
    """Nobody should put a backup in the place of a sound database whose disk is full or gone."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = "SQLITE_IOERR_SHMSIZE"
    said = str(explain(error, "some.db"))
    assert "its disk is full or fails" in said
    assert "restore" not in said
