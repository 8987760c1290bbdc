"""A database that is taken away from the broker which has it open: nothing is lost, and somebody is told."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from prunus.errors import PersistenceError
from prunus.messaging.exchange import NewTask
from prunus.messaging.liveness import boottime
from prunus.runtime import doctor
from prunus.runtime.broker import CHECK_INTERVAL_S, LOW_SPACE_BYTES, Broker
from prunus.runtime.profile import Profile
from tests.disks import small_file_system
from tests.faults.parts import Services, command_line
from tests.runtime import workflows

ENDS_S = 20.0
LARGE_BYTES = 24 * 1024 * 1024
SMALL_DISK_BYTES = 6 * LARGE_BYTES


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a database in a folder of its own."""
    folder = tmp_path / "p"
    folder.mkdir()
    return folder / "prunus.db"


@pytest.fixture
def broker(path: Path) -> Iterator[Broker]:
    """It has looked after its disk, and has taken a task since."""
    broker = Broker(path)
    look_after(broker, turn=0)
    put(broker, "first")
    yield broker
    broker.abandon()


def look_after(broker: Broker, turn: int) -> None:
    """One look at the disk; each `turn` is later than the one before."""
    broker.look_after(boottime() + turn * 2 * CHECK_INTERVAL_S, lambda tasks: None)


def put(broker: Broker, name: str, size: int = 0) -> None:
    broker.exchange.put(boottime(), [NewTask(queue="q", key=name, body=bytes(size))])


def tasks_in(path: Path) -> int:
    """What the next broker finds."""
    broker = Broker(path)
    try:
        return broker.exchange.statistics().queues["q"].ready
    finally:
        broker.abandon()


def left(path: Path) -> Sequence[str]:
    return sorted(file.name for file in path.parent.iterdir() if file.name.startswith(path.name))


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
@pytest.mark.parametrize("when", ["while it serves", "when it stops"])
def test_what_was_in_a_file_that_was_taken_away_is_saved(broker: Broker, path: Path, how: str, when: str) -> None:
    """All of it, with what was confirmed since; and the next broker does not begin anew, nor take another file."""
    match how:
        case "removed":  # with all that belongs to it
            for name in left(path):
                path.with_name(name).unlink()
        case "moved":
            path.rename(path.with_name("elsewhere"))
        case _:
            Broker(path.with_name("new.db")).close()
            path.with_name("new.db").replace(path)
    put(broker, "second")
    with pytest.raises(PersistenceError, match=r"was removed or replaced while .*; all that was in it is saved"):
        look_after(broker, 1) if when == "while it serves" else broker.close()
    broker.abandon()
    [saved] = path.parent.glob("prunus.db.rescued-*")
    assert tasks_in(saved) == 2
    with pytest.raises(PersistenceError, match=f"`prunus broker restore {saved}`"):
        Broker(path)


def test_a_log_that_was_taken_away_is_put_into_the_file(broker: Broker, path: Path) -> None:
    """The broker ends for that, and the next one starts."""
    Path(f"{path}-wal").unlink()
    put(broker, "second")
    with pytest.raises(PersistenceError, match="-wal was removed or replaced while the broker had it open"):
        look_after(broker, 1)
    broker.abandon()
    assert tasks_in(path) == 2


def test_a_file_that_is_there_again_was_never_away(broker: Broker, path: Path) -> None:
    """Somebody moved it, saw the mistake and moved it back in time."""
    path.rename(path.with_name("elsewhere"))
    path.with_name("elsewhere").rename(path)
    look_after(broker, 1)
    broker.close()
    assert tasks_in(path) == 1


def test_a_folder_that_is_gone_is_no_reason_to_stay(broker: Broker, path: Path) -> None:
    """There is no place to save anything to: that is said."""
    path.parent.rename(path.parent.with_name("elsewhere"))
    with pytest.raises(PersistenceError, match=r"is lost: .* there is no folder"):
        look_after(broker, 1)


def test_without_space_to_save_it_the_broker_stays_and_confirms_nothing(tmp_path: Path) -> None:
    """Until there is some: though there is enough for new work, there is not for a copy."""
    with small_file_system(tmp_path / "disk", SMALL_DISK_BYTES) as folder:
        broker = Broker(folder / "prunus.db")
        put(broker, "first", LARGE_BYTES)
        look_after(broker, 0)
        assert broker.exchange.refuse_changes is None
        status = os.statvfs(folder)
        with (folder / "filler").open("wb") as filler:
            left_free = LOW_SPACE_BYTES + LARGE_BYTES // 2
            os.posix_fallocate(filler.fileno(), 0, status.f_bavail * status.f_frsize - left_free)
        (folder / "prunus.db").unlink()
        look_after(broker, 1)
        assert broker.exchange.refuse_changes == str(folder / "prunus.db")
        (folder / "filler").unlink()
        with pytest.raises(PersistenceError, match="is saved"):
            look_after(broker, 3)
        broker.abandon()
        [saved] = folder.glob("prunus.db.rescued-*")
        assert tasks_in(saved) == 1


@pytest.mark.timeout(90)
async def test_a_daemon_survives_the_removal_of_its_database(short_folder: Path) -> None:
    """It ends, does not start on nothing, and goes on from what was saved, as it is told to."""
    async with Services(short_folder, workers=0) as services:
        database = services.profile.database
        services.start("worker-1")
        handle = await services.controller.launch(workflows.Add, {"a": 1, "b": 2})
        assert (await handle.result()).outputs.sum == 3
        for file in database.parent.glob("prunus.db*"):
            file.unlink()
        ended = services.services.pop("broker")
        assert await asyncio.to_thread(ended.wait, ENDS_S) == 1
        [saved] = database.parent.glob("prunus.db.rescued-*")
        assert f"`prunus broker restore {saved}` goes on from there" in services.log("broker")
        assert "Traceback" not in services.log("broker")

        services.start("broker")
        refused = services.services.pop("broker")
        assert await asyncio.to_thread(refused.wait, ENDS_S) == 1
        assert f"{database} is gone, but it was a database once" in services.log("broker")
        assert f"or restore a backup (`prunus broker restore {saved}`)" in services.log("broker")

        assert (await command_line(services.profile.path, "broker", "restore", str(saved))).code == 0
        services.start("broker")
        assert (await handle.result()).outputs.sum == 3


@pytest.mark.timeout(60)
async def test_a_daemon_survives_the_removal_of_its_log(short_folder: Path) -> None:
    """It ends, and the next broker has all that was confirmed."""
    async with Services(short_folder, workers=0) as services:
        handle = await services.controller.launch(workflows.Add, {"a": 1, "b": 2})
        services.profile.database.with_name("prunus.db-wal").unlink()
        ended = services.services.pop("broker")
        assert await asyncio.to_thread(ended.wait, ENDS_S) == 1
        assert "prunus.db-wal was removed or replaced" in services.log("broker")
        services.start("broker")
        services.start("worker-1")
        assert (await handle.result()).outputs.sum == 3


@pytest.mark.parametrize("lost", ["empty", "gone"])
async def test_a_doctor_sees_that_a_database_is_lost(path: Path, lost: str) -> None:
    """Nobody is told that it will be made."""
    profile = Profile.create(path.parent)
    Broker(profile.database).close()
    profile.database.write_bytes(b"")
    if lost == "gone":
        profile.database.unlink()
    findings = [one async for one in doctor.examine(lambda: profile)]
    [problem] = [one for one in findings if one.subject == "database" and one.level == "problem"]
    assert f"is {lost}, but it was a database once" in problem.text
    assert not [one for one in findings if "not there yet" in one.text]
