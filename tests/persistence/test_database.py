"""Opening a database file: ours alone, durable, and refused with a sentence when it is not what it should be."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prunus.errors import PersistenceError, StoreFullError
from prunus.persistence import database
from prunus.persistence.database import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    checkpoint_wal,
    commit,
    database_path,
    file_system_of,
    find_damage,
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
    """It grows until its owner says so."""
    fill(connection, 300)
    assert wal_bytes(path) > 300 * 4000
    assert checkpoint_wal(connection) is True
    assert wal_bytes(path) == 0
    assert wal_bytes(path.with_name("nothing")) == 0


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
