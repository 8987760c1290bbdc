"""Copies of a database that is in use, and putting one back."""

from __future__ import annotations

import os
import socket
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prunus.errors import PersistenceError
from prunus.persistence import database
from prunus.persistence.database import (
    back_up,
    begin_note,
    checkpoint_wal,
    commit,
    find_damage,
    open_database,
    put_back,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "p" / "prunus.db"


@pytest.fixture
def connection(path: Path) -> Iterator[sqlite3.Connection]:
    path.parent.mkdir()
    with closing(open_database(path)) as connection:
        connection.execute("CREATE TABLE t (n INTEGER PRIMARY KEY, x BLOB)")
        add(connection, 1000)
        yield connection


def add(connection: sqlite3.Connection, rows: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany("INSERT INTO t (x) VALUES (?)", [(os.urandom(4000),)] * rows)
    commit(connection)


def count(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM t").fetchone()[0])


def nothing(_: sqlite3.Connection) -> None:
    pass


def everything_in(folder: Path) -> dict[Path, tuple[int, int, bytes]]:
    """What lies there, and what is in it."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[path] = status.st_mode, status.st_ino, content
    return found


def test_a_copy_is_a_database(connection: sqlite3.Connection, tmp_path: Path) -> None:
    """Sound, with all that was committed, for its owner only; nothing else is left in its folder."""
    copy = tmp_path / "b" / "copy.db"
    copy.parent.mkdir()
    size = back_up(connection, copy)
    assert [file.name for file in copy.parent.iterdir()] == ["copy.db"]
    assert (size, stat.S_IMODE(copy.stat().st_mode)) == (copy.stat().st_size, 0o600)
    with closing(open_database(copy)) as opened:
        assert count(opened) == 1000
        assert find_damage(opened) == []


def test_the_database_is_used_meanwhile(connection: sqlite3.Connection, tmp_path: Path) -> None:
    """What is committed during the copy is in it as a whole or not at all; what was before it is in it."""
    copy = tmp_path / "copy.db"
    batches = [0]

    def progress(done: int, total: int) -> None:
        add(connection, 7)
        batches.append(done)
        if len(batches) % 3 == 0:
            assert checkpoint_wal(connection)

    back_up(connection, copy, progress=progress)
    assert len(batches) > 5
    assert batches == sorted(batches), "it never had to begin anew"
    with closing(open_database(copy)) as opened:
        assert count(opened) > 1000
        assert (count(opened) - 1000) % 7 == 0
        assert find_damage(opened) == []
    assert count(connection) == 1000 + 7 * (len(batches) - 1)


def test_there_is_nothing_to_copy_inside_of_a_transaction(connection: sqlite3.Connection, tmp_path: Path) -> None:
    """It would wait for its own end."""
    connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(ValueError, match="commit first"):
        back_up(connection, tmp_path / "copy.db")
    connection.execute("ROLLBACK")


def test_progress_is_told(connection: sqlite3.Connection, tmp_path: Path) -> None:
    """From little to all; and raising ends the copy, without a trace."""
    told: list[tuple[int, int]] = []
    back_up(connection, tmp_path / "copy.db", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[0][0] < told[-1][0] == told[-1][1]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        back_up(connection, tmp_path / "other.db", progress=stop)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.db", "p"]


def test_a_file_that_is_there_is_left_alone(connection: sqlite3.Connection, tmp_path: Path) -> None:
    """Also one that appears during the copy; unless it is to be replaced."""
    copy = tmp_path / "copy.db"
    copy.write_text("dear diary")
    with pytest.raises(PersistenceError, match="exists already"):
        back_up(connection, copy)
    assert copy.read_text() == "dear diary"
    back_up(connection, copy, replace=True)
    assert copy.read_bytes().startswith(b"SQLite")
    with pytest.raises(PersistenceError, match="exists already"):
        back_up(connection, tmp_path / "late", progress=lambda done, total: (tmp_path / "late").touch())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.db", "late", "p"]


def test_a_place_that_can_not_be_written_is_named(connection: sqlite3.Connection, tmp_path: Path) -> None:
    """With the reason."""
    with pytest.raises(PersistenceError, match=r"nowhere.copy.db can't be written: there is no folder"):
        back_up(connection, tmp_path / "nowhere" / "copy.db")
    with pytest.raises(PersistenceError, match="is a folder"):
        back_up(connection, tmp_path, replace=True)


@pytest.mark.parametrize("added", ["", "-wal", "-shm", "-journal", "-mark"])
@pytest.mark.parametrize("name", ["its own", "link", "hard link", "through a folder"])
def test_no_file_of_the_database_itself_is_replaced(
    connection: sqlite3.Connection, path: Path, tmp_path: Path, added: str, name: str
) -> None:
    """Under whatever name, and whether it is there at the moment or not: its broker would lose it."""
    begin_note(connection)
    own, target = Path(f"{path}{added}"), tmp_path / "copy.db"
    match name:
        case "its own":
            target = own
        case "link":
            target.symlink_to(own)
        case "hard link" if own.exists():
            target.hardlink_to(own)
        case _:
            (tmp_path / "other").symlink_to(path.parent)
            target = tmp_path / "other" / own.name
    before = everything_in(tmp_path)
    for replace in (True, False):
        with pytest.raises(PersistenceError, match=r"the database itself; nothing was changed: choose another name$"):
            back_up(connection, target, replace=replace)
    assert everything_in(tmp_path) == before
    add(connection, 1)


@pytest.mark.parametrize("added", ["-wal", "-journal", "-mark"])
@pytest.mark.parametrize("is_there", [True, False])
def test_the_database_of_somebody_else_is_not_replaced(
    connection: sqlite3.Connection, tmp_path: Path, added: str, is_there: bool
) -> None:
    """One that is used, or was, has a log or a note beside it; with a copy in its place they would be a mixture."""
    other = tmp_path / "other.db"
    if is_there:
        other.write_bytes(b"a database")
    Path(f"{other}{added}").write_bytes(b"what belongs to it")
    before = everything_in(tmp_path)
    with pytest.raises(PersistenceError, match=rf"lies .*other\.db{added}, so another database is there, or was"):
        back_up(connection, other, replace=True)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("kind", ["FIFO", "socket"])
@pytest.mark.parametrize("name", ["its own", "link"])
def test_only_a_file_is_replaced(
    connection: sqlite3.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    """What is none is named, also through a link, and also if it comes there during the copy."""
    monkeypatch.chdir(tmp_path)  # the path of a socket has to be short
    there, target = tmp_path / "there", tmp_path / ("there" if name == "its own" else "link")
    if name == "link":
        target.symlink_to(there)

    def make() -> None:
        if kind == "FIFO":
            os.mkfifo(there)
        else:
            with closing(socket.socket(socket.AF_UNIX)) as listener:
                listener.bind(there.name)

    with pytest.raises(PersistenceError, match=f"{target.name} is a {kind}; nothing was changed: choose another name"):
        back_up(connection, target, replace=True, progress=lambda done, total: None if there.exists() else make())
    before = everything_in(tmp_path)
    with pytest.raises(PersistenceError, match=f"{target.name} is a {kind}; nothing was changed: choose another name"):
        back_up(connection, target, replace=True, progress=lambda done, total: pytest.fail("it was copied"))
    assert everything_in(tmp_path) == before
    assert stat.S_IFMT(there.stat().st_mode) == (stat.S_IFIFO if kind == "FIFO" else stat.S_IFSOCK)


def test_what_is_undone_does_not_get_into_the_copy(connection: sqlite3.Connection, tmp_path: Path) -> None:
    """Nor does the copy go on for ever, if that happens all the time."""
    copy = tmp_path / "copy.db"
    undone = 0

    def undo(done: int, total: int) -> None:
        nonlocal undone
        undone += 1
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("DELETE FROM t WHERE n < 10")
        connection.execute("ROLLBACK")

    with pytest.raises(PersistenceError, match="had to begin"):
        back_up(connection, copy, progress=undo)
    assert undone == database.MAX_COPY_RESTARTS
    assert not copy.exists()
    undone = 0
    back_up(connection, copy, progress=lambda done, total: undo(done, total) if undone < 5 else None)
    with closing(open_database(copy)) as opened:
        assert count(opened) == 1000


def test_a_damaged_database_is_not_copied_silently(connection: sqlite3.Connection, path: Path, tmp_path: Path) -> None:
    """Whoever relies on a copy must know that it is sound."""
    connection.close()
    with path.open("r+b") as file:
        file.seek(20 * 4096)
        file.write(bytes(64))
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as damaged,
        pytest.raises(PersistenceError, match="the database is damaged"),
    ):
        back_up(damaged, tmp_path / "copy.db")
    assert not (tmp_path / "copy.db").exists()


def test_a_backup_is_put_back(connection: sqlite3.Connection, path: Path, tmp_path: Path) -> None:
    """The old database is kept beside it, with what was in its log."""
    back_up(connection, tmp_path / "copy.db")
    add(connection, 5)
    connection.close()
    prepared: list[int] = []
    aside = put_back(tmp_path / "copy.db", path, lambda copy: prepared.append(count(copy)))
    assert prepared == [1000]
    assert aside is not None
    assert aside.name.startswith("prunus.db.before-restore-")
    with closing(open_database(path)) as restored, closing(open_database(aside)) as old:
        assert (count(restored), count(old)) == (1000, 1005)
    assert (tmp_path / "copy.db").exists()
    again = [put_back(tmp_path / "copy.db", path, lambda copy: None) for _ in range(2)]  # in the same second
    assert len({aside, *again}) == 3


def test_a_backup_takes_the_place_of_a_damaged_database(
    connection: sqlite3.Connection, path: Path, tmp_path: Path
) -> None:
    """That is kept as it is, its log too."""
    back_up(connection, tmp_path / "copy.db")
    checkpoint_wal(connection)
    log = Path(f"{path}-wal").read_bytes()
    connection.close()
    path.write_bytes(b"nonsense")
    Path(f"{path}-wal").write_bytes(log)
    aside = put_back(tmp_path / "copy.db", path, nothing)
    assert aside is not None
    assert aside.read_bytes() == b"nonsense"
    assert Path(f"{aside}-wal").read_bytes() == log
    with closing(open_database(path)) as restored:
        assert count(restored) == 1000


def test_a_backup_is_put_back_where_nothing_is(connection: sqlite3.Connection, path: Path, tmp_path: Path) -> None:
    """The file was lost."""
    back_up(connection, tmp_path / "copy.db")
    connection.close()
    path.unlink()
    assert put_back(tmp_path / "copy.db", path, nothing) is None
    with closing(open_database(path)) as restored:
        assert count(restored) == 1000


@pytest.mark.parametrize("name", ["its own", "link", "hard link"])
def test_the_remains_of_a_restore_are_no_backup(
    connection: sqlite3.Connection, path: Path, tmp_path: Path, name: str
) -> None:
    """It begins with removing them."""
    left = path.with_name(".prunus.db.restoring")
    back_up(connection, left)
    connection.close()
    backup = left if name == "its own" else tmp_path / "copy.db"
    if name == "link":
        backup.symlink_to(left)
    elif name == "hard link":
        backup.hardlink_to(left)
    before = everything_in(tmp_path)
    with pytest.raises(PersistenceError, match="interrupted"):
        put_back(backup, path, nothing)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("added", ["", "-wal"])
def test_a_fifo_is_not_read(connection: sqlite3.Connection, path: Path, tmp_path: Path, added: str) -> None:
    """Nobody may ever write to it; neither as a backup, nor as the log of one."""
    back_up(connection, tmp_path / "copy.db")
    connection.close()
    if not added:
        (tmp_path / "copy.db").unlink()
    os.mkfifo(tmp_path / f"copy.db{added}")
    before = everything_in(tmp_path)
    with pytest.raises(PersistenceError, match=rf"copy\.db{added} is not a file"):
        put_back(tmp_path / "copy.db", path, nothing)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("kind", ["missing", "text", "foreign", "damaged", "empty", "itself"])
def test_what_is_no_backup_is_refused(connection: sqlite3.Connection, path: Path, tmp_path: Path, kind: str) -> None:
    """And the database stays as it is."""
    backup = tmp_path / "copy.db"
    back_up(connection, backup)
    connection.close()
    match kind:
        case "missing":
            backup.unlink()
        case "text":
            backup.write_text("dear diary " * 1000)
        case "empty":
            backup.write_bytes(b"")
        case "foreign":
            backup.unlink()
            with closing(sqlite3.connect(backup)) as other:
                other.execute("CREATE TABLE theirs (x)")
        case "damaged":
            with backup.open("r+b") as file:
                file.seek(20 * 4096)
                file.write(bytes(64))
        case _:
            backup = path
    before = path.read_bytes()
    with pytest.raises(PersistenceError, match=r"copy\.db|prunus\.db"):
        put_back(backup, path, nothing)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["prunus.db"]
