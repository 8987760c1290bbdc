"""Opening a database file: ours alone, durable, and refused with a sentence when it is not what it should be."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import sqlite3
import stat
import struct
import subprocess
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
    begin_note,
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


def test_a_copy_in_the_place_of_a_database_with_a_log_is_taken_by_two_commands(path: Path, tmp_path: Path) -> None:
    """Those that the error says: the copy goes on, and the log is kept."""
    lie(path, crashed=False)
    with closing(noted(path)) as connection:
        database.back_up(connection, tmp_path / "copy")
    with closing(noted(path)) as connection:
        fill(connection, 1)
        log = Path(f"{path}-wal").read_bytes()
    (tmp_path / "copy").replace(path)
    Path(f"{path}-wal").write_bytes(log)
    says = refused(path)
    assert "belongs to another file" in says
    found = re.search("`(mv [^`]+) && prunus broker restore ([^`]+)`", says)
    assert found
    subprocess.run(shlex.split(found[1]), check=True)
    database.put_back(Path(*shlex.split(found[2])), path, lambda copy: None)
    assert rows(path) == 5
    assert log in [file.read_bytes() for file in path.parent.iterdir()]


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


# --- what lay there last ----------------------------------------------------------------------------


def noted(path: Path) -> sqlite3.Connection:
    """The database at `path`, with a note of its marks beside it."""
    connection = open_database(path)
    begin_note(connection)
    return connection


def lie(path: Path, *, crashed: bool) -> None:
    """A noted database that was closed, or that a kill left with all of its rows in its log."""
    connection = noted(path)
    connection.execute("CREATE TABLE t (x)")
    checkpoint_wal(connection)
    fill(connection, 5)
    left = {file: file.read_bytes() for file in path.parent.iterdir()}
    connection.close()
    if crashed:
        for file, content in left.items():
            file.write_bytes(content)


def rows(path: Path) -> int:
    with closing(open_database(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM t").fetchone()[0])


@pytest.mark.parametrize("crashed", [False, True])
def test_what_was_noted_is_opened_again_and_again(path: Path, crashed: bool) -> None:
    """By whoever opens it, with and without a log; and the note is for nobody else."""
    lie(path, crashed=crashed)
    assert stat.S_IMODE(Path(f"{path}-mark").stat().st_mode) == 0o600
    assert [rows(path) for _ in range(3)] == [5, 5, 5]
    with closing(noted(path)) as connection:
        database.vacuum(connection)
    with closing(open_database(path, exclusive=False)) as connection:
        fill(connection, 1)
    assert rows(path) == 6


def test_another_program_may_put_the_log_into_the_file(path: Path) -> None:
    """Whoever looks at it with SQLite's own shell after a crash does that, and nothing is lost by it."""
    lie(path, crashed=True)
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT count(*) FROM t").fetchone() == (5,)
    assert not Path(f"{path}-wal").exists()
    assert rows(path) == 5


@pytest.mark.parametrize("crashed", [False, True])
@pytest.mark.parametrize("log", ["log", "no log"])
@pytest.mark.parametrize("lost", ["empty", "gone"])
def test_a_database_that_was_taken_away_is_missed(path: Path, crashed: bool, log: str, lost: str) -> None:
    """It was emptied or removed, after a stop or a crash, with its log or without: a new one would hide that."""
    lie(path, crashed=crashed)
    if log == "no log":
        Path(f"{path}-wal").unlink(missing_ok=True)
    path.write_bytes(b"")
    if lost == "gone":
        path.unlink()
    assert f"{path} is {lost}, but" in refused(path)


def test_a_new_beginning_needs_one_word(path: Path) -> None:
    """That which the error says; and without any of the files nobody asks."""
    lie(path, crashed=False)
    path.unlink()
    assert f"`rm {path}-mark`" in refused(path)
    Path(f"{path}-mark").unlink()
    with closing(noted(path)) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 't'").fetchone() == (0,)
    for file in path.parent.iterdir():
        file.unlink()
    noted(path).close()


@pytest.mark.parametrize("content", [None, b"", bytes(4096)], ids=["removed", "emptied", "zeros"])
@pytest.mark.parametrize("session", [1, 2])
def test_a_log_that_was_taken_away_after_a_crash_is_missed(path: Path, content: bytes | None, session: int) -> None:
    """What was committed is in it and nowhere else; that of the very first session, too."""
    if session == 2:
        noted(path).close()
    connection = noted(path)
    fill(connection, 5)
    left = {file: file.read_bytes() for file in path.parent.iterdir()}
    connection.close()
    for file, before in left.items():
        file.write_bytes(before)
    log = Path(f"{path}-wal")
    before = log.read_bytes()
    log.unlink() if content is None else log.write_bytes(content)
    assert f"its log {log} was removed or damaged" in refused(path)
    log.write_bytes(before)
    assert rows(path) == 5


def test_who_can_go_on_without_what_is_lost_may(path: Path) -> None:
    """By the word that the error says."""
    lie(path, crashed=True)
    Path(f"{path}-wal").unlink()
    assert f"`rm {path}-mark`" in refused(path)
    Path(f"{path}-mark").unlink()
    assert rows(path) == 0


@pytest.mark.parametrize("other", ["older", "another"])
def test_another_file_in_its_place_is_noticed(path: Path, other: str) -> None:
    """An older copy of it, or that of another profile: epochs would be given a second time."""
    lie(path, crashed=False)
    copy = path.with_name("copy.db")
    with closing(open_database(path if other == "older" else copy)) as connection:
        if other == "older":
            database.back_up(connection, copy)
    for _ in range(2):
        rows(path)
    copy.replace(path)
    assert "is not the database that was there last" in refused(path)


def test_a_note_that_is_torn_says_nothing(path: Path) -> None:
    """It can't have been written in part; and if it was, it is no reason to refuse."""
    lie(path, crashed=True)
    note = Path(f"{path}-mark")
    whole = note.read_bytes()
    for damaged in (b"", whole[:30], bytes(len(whole)), whole[:-5] + bytes(5)):
        note.write_bytes(damaged)
        assert rows(path) == 5
        assert note.read_bytes() != damaged
        Path(f"{path}-wal").unlink(missing_ok=True)


def test_a_note_that_became_longer_still_says_it(path: Path) -> None:
    """What somebody appended to it is nobody's; notes are written over its beginning, and so it would stay for ever."""
    lie(path, crashed=False)
    with Path(f"{path}-mark").open("ab") as note:
        note.write(b"and more")
    assert rows(path) == 5
    path.unlink()
    with pytest.raises(PersistenceError, match="was a database once"):
        open_database(path)


def test_a_database_without_a_mark_is_noted_as_such(path: Path) -> None:
    """There was no space for one."""
    with closing(open_database(path)) as connection:
        connection.execute("DROP TABLE log_mark")
        begin_note(connection)
        fill(connection, 5)
    assert [rows(path) for _ in range(3)] == [5, 5, 5]


def test_no_log_gets_a_mark_while_the_one_before_is_not_noted(path: Path) -> None:
    """A disk that takes no notes for a while does not make a sound database look like a lost one."""
    lie(path, crashed=False)
    note = Path(f"{path}-mark")
    kept = note.read_bytes()
    note.unlink()
    note.mkdir()  # it can't be written, not even by root
    for _ in range(3):
        assert rows(path) == 5
    note.rmdir()
    note.write_bytes(kept)
    assert rows(path) == 5
    assert note.read_bytes() != kept


@pytest.mark.parametrize("crashed", [False, True])
def test_a_restored_backup_is_what_lies_there(path: Path, tmp_path: Path, crashed: bool) -> None:
    """Also in the place of a database that was lost; and the file that it replaces is refused from then on."""
    lie(path, crashed=crashed)
    with closing(open_database(path)) as connection:
        database.back_up(connection, tmp_path / "copy")
        fill(connection, 1)
    aside = database.put_back(tmp_path / "copy", path, lambda copy: None)
    assert aside is not None
    assert rows(path) == 5
    path.unlink()
    assert database.put_back(tmp_path / "copy", path, lambda copy: None) is None
    assert rows(path) == 5
    aside.replace(path)
    assert "is not the database that was there last" in refused(path)


def test_a_restore_that_was_interrupted_is_not_taken_for_one(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old file without its log lies there: it is refused, and restoring again helps."""
    lie(path, crashed=True)
    with closing(open_database(path)) as connection:
        database.back_up(connection, tmp_path / "copy")

    def power_cut(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", power_cut)
        with pytest.raises(KeyboardInterrupt):
            database.put_back(tmp_path / "copy", path, lambda copy: None)
    assert "is not the database that was there last" in refused(path)
    database.put_back(tmp_path / "copy", path, lambda copy: None)
    assert rows(path) == 5


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
