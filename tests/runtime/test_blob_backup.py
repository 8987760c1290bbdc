"""Blobs belong to the data of a profile: they are in its backups, and come back with them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from prunus.errors import PersistenceError
from prunus.messaging import MAX_BODY_BYTES
from prunus.messaging.blobs import BlobStore
from prunus.messaging.doors import Connection
from prunus.messaging.liveness import boottime
from prunus.messaging.messages import CHUNK_BYTES, BlobPut, ClientMessage, Hello, Peer, TaskSend, encode
from prunus.messaging.taskstore import needed_blobs
from prunus.persistence.database import open_database
from prunus.runtime import upkeep
from prunus.runtime.broker import Broker
from prunus.runtime.cli import cli
from prunus.runtime.profile import Profile
from prunus.runtime.upkeep import BackUp, CopyAsk, Copying, Upkeep
from tests.guarantees.real_daemon import RealDaemon

BODY, OTHER = os.urandom(2 * CHUNK_BYTES), os.urandom(10)


def digest_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def file_in(folder: Path, body: bytes) -> Path:
    digest = digest_of(body)
    return folder / digest[:2] / digest[2:]


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    """Two blobs are in it, and to one of them a task refers."""
    profile = Profile.create(tmp_path / "p")
    broker = Broker(profile.database)
    for number, body in enumerate((BODY, OTHER)):
        say(broker, Hello(session="s", peer=Peer()))
        for at in range(0, len(body), CHUNK_BYTES):
            chunk = body[at : at + CHUNK_BYTES]
            put = BlobPut(id=10 * number + 1, digest=digest_of(body), offset=at, total=len(body), chunk=chunk)
            say(broker, put)
    say(broker, TaskSend(id=99, task="t", body=b"", blob=digest_of(BODY)))
    broker.close()
    return profile


def say(broker: Broker, message: ClientMessage) -> None:
    route: Connection = "route"  # type: ignore[assignment]
    broker.exchange.process(boottime(), [(route, encode(message))])


def back_up(profile: Profile, target: Path, *, replace: bool = False) -> None:
    upkeep.back_up(profile, target, replace=replace, progress=lambda done, total: None)


def test_a_backup_has_the_blobs_of_its_tasks(profile: Profile, tmp_path: Path) -> None:
    """Those, and no others; they are there before the file appears."""
    copy = tmp_path / "copy.db"
    back_up(profile, copy)
    folder = tmp_path / "copy.db.blobs"
    assert file_in(folder, BODY).read_bytes() == BODY
    assert not file_in(folder, OTHER).exists()
    with closing(sqlite3.connect(profile.database)) as connection:
        connection.execute("DELETE FROM broker_task")
        connection.commit()
    back_up(profile, copy, replace=True)
    assert not file_in(folder, BODY).exists(), "nobody needs it in this one"


def test_a_backup_without_blobs_has_no_folder(tmp_path: Path) -> None:
    profile = Profile.create(tmp_path / "p")
    Broker(profile.database).close()
    back_up(profile, tmp_path / "copy.db")
    assert not (tmp_path / "copy.db.blobs").exists()


@pytest.mark.parametrize("kind", ["file", "FIFO", "link to a folder", "link to the blobs of the profile"])
def test_the_folder_of_the_blobs_has_to_be_one(profile: Profile, tmp_path: Path, kind: str) -> None:
    """And no link: blobs that the backup does not need are removed from it. Nothing is changed then."""
    folder, other = tmp_path / "copy.db.blobs", tmp_path / "other"
    other.mkdir()
    match kind:
        case "file":
            folder.write_text("dear diary")
        case "FIFO":
            os.mkfifo(folder)
        case "link to a folder":
            folder.symlink_to(other)
        case _:
            folder.symlink_to(profile.blobs)
    (tmp_path / "copy.db").write_text("an older one")
    before = folder.lstat()
    with pytest.raises(PersistenceError, match=r"copy\.db\.blobs, where the bodies .* nothing was changed"):
        back_up(profile, tmp_path / "copy.db", replace=True)
    after = folder.lstat()
    assert (before.st_mode, before.st_ino, before.st_size) == (after.st_mode, after.st_ino, after.st_size)
    assert (tmp_path / "copy.db").read_text() == "an older one"
    assert os.listdir(other) == []
    assert file_in(profile.blobs, OTHER).read_bytes() == OTHER


def test_a_profile_is_no_folder_of_blobs(tmp_path: Path) -> None:
    """Though it may have such a name."""
    profile = Profile.create(tmp_path / "copy.db.blobs")
    Broker(profile.database).close()
    with pytest.raises(PersistenceError, match="not a folder of a backup"):
        back_up(profile, tmp_path / "copy.db")


def test_a_restored_backup_has_its_blobs(profile: Profile, tmp_path: Path) -> None:
    """Those that the profile lacks come from the folder beside the backup; without that nothing is changed."""
    copy, folder = tmp_path / "copy.db", tmp_path / "copy.db.blobs"
    back_up(profile, copy)
    file_in(profile.blobs, BODY).unlink()
    folder.rename(tmp_path / "elsewhere")
    before = profile.database.read_bytes()
    with pytest.raises(PersistenceError, match=r"copy\.db\.blobs.*nothing was changed"):
        upkeep.restore(profile, copy)
    assert profile.database.read_bytes() == before
    (tmp_path / "elsewhere").rename(folder)
    upkeep.restore(profile, copy)
    assert file_in(profile.blobs, BODY).read_bytes() == BODY
    with closing(open_database(profile.database)) as connection:
        assert needed_blobs(connection) == [(digest_of(BODY), len(BODY))]


def test_a_lost_blob_is_left_out(profile: Profile, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A warning names it; all the rest is in the backup, which can be restored."""
    file_in(profile.blobs, BODY).write_bytes(BODY[::-1])
    back_up(profile, tmp_path / "copy.db")
    assert digest_of(BODY) in caplog.text
    assert not file_in(tmp_path / "copy.db.blobs", BODY).exists()
    file_in(profile.blobs, BODY).unlink()
    upkeep.restore(profile, tmp_path / "copy.db")


def test_a_database_of_an_older_version_needs_none(profile: Profile) -> None:
    with closing(sqlite3.connect(profile.database)) as connection:
        connection.execute("DROP INDEX broker_blob")
        connection.execute("ALTER TABLE broker_task DROP COLUMN blob")
        assert needed_blobs(connection) == []


@pytest.fixture
def served(profile: Profile) -> Iterator[Upkeep]:
    with closing(open_database(profile.database)) as connection:
        served = Upkeep(connection, BlobStore(profile.blobs, 0.0))
        yield served
        served.stop()


def ask(served: Upkeep, request: upkeep.Request) -> Copying:
    return upkeep.decode_copying(served.execute(upkeep.encode(request).removeprefix(upkeep.PREFIX)).answer)


def test_a_broker_copies_blobs_while_it_serves(served: Upkeep, tmp_path: Path) -> None:
    """And says so until all are there: meanwhile none is removed."""
    assert not served.is_copying
    copying = ask(served, BackUp(file=str(tmp_path / "copy.db")))
    assert served.is_copying
    while copying.size is None and copying.failure is None:
        served.turn()
        copying = ask(served, CopyAsk())
    assert copying.failure is None
    assert file_in(tmp_path / "copy.db.blobs", BODY).read_bytes() == BODY


def test_a_broker_that_ends_leaves_no_half_blobs(
    profile: Profile, served: Upkeep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had copied beside a backup that is not there is removed."""
    begun: list[str] = []
    copy_from = BlobStore.copy_from

    def end_meanwhile(self: BlobStore, other: BlobStore, digest: str, *others: object) -> None:
        begun.append(digest)
        assert served._copy is not None
        served._copy._is_stopped = True
        copy_from(self, other, digest, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(BlobStore, "copy_from", end_meanwhile)
    copying = ask(served, BackUp(file=str(tmp_path / "copy.db")))
    while copying.failure is None:
        served.turn()
        copying = ask(served, CopyAsk())
    assert "the broker ended" in copying.failure.message
    assert begun == [digest_of(BODY)]
    assert sorted(os.listdir(tmp_path)) == ["p"]


async def test_with_a_broker_process(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large task is in the folder of the profile, in its backup and on the screen."""
    body = os.urandom(MAX_BODY_BYTES + 1)
    async with RealDaemon(short_folder, workers=0) as daemon:
        communicator = daemon.controller.communicator
        receipt = await communicator.task_send(body, queue="q")
        assert file_in(daemon.profile.blobs, body).read_bytes() == body
        monkeypatch.setenv("PRUNUS_PROFILE", str(daemon.profile.path))
        shown = await _run("tasks", "show", receipt.id)
        assert digest_of(body) in shown
        assert "--raw" in shown
        said = await _run("broker", "backup", str(short_folder / "copy.db"))
        assert f"{short_folder}/copy.db.blobs: the bodies of large tasks" in said
        assert file_in(short_folder / "copy.db.blobs", body).read_bytes() == body
        raw = await _run_raw("tasks", "show", "--raw", receipt.id)
        assert raw == body


async def _run(*arguments: str) -> str:
    return (await _run_raw(*arguments)).decode()


async def _run_raw(*arguments: str) -> bytes:
    result = await asyncio.to_thread(CliRunner().invoke, cli, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout_bytes
