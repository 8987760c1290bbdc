"""A checkpoint that is damaged or of a newer format: set aside with one sentence, and nobody else notices."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from prunus.errors import CheckpointCorruptError, InvalidStateError
from prunus.persistence.checkpoint import FORMAT
from prunus.runtime.controller import ProcessHandle
from tests.faults.parts import Services, claims, command_line, complaint, set_aside
from tests.runtime import workflows
from tests.runtime.waiting import file_has, until


def flipped(checkpoint: bytes) -> bytes:
    """One bit is another one."""
    middle = len(checkpoint) // 2
    return checkpoint[:middle] + bytes([checkpoint[middle] ^ 0x10]) + checkpoint[middle + 1 :]


def newer(checkpoint: bytes) -> bytes:
    """As a later Prunus might write it."""
    magic, found, *rest = msgspec.msgpack.decode(checkpoint)
    assert found == FORMAT
    return msgspec.msgpack.encode([magic, FORMAT + 1, *rest, "something new"])


DAMAGES = {
    "a flipped bit": (flipped, "the checkpoint is damaged (its checksum does not match); restore it from a backup"),
    "cut off": (lambda checkpoint: checkpoint[:-10], "the checkpoint is damaged (it is not a checkpoint, or a part is"),
    "emptied": (lambda checkpoint: b"", "the checkpoint is damaged (it is not a checkpoint, or a part is missing)"),
    "newer": (newer, f"has format {FORMAT + 1}, this Prunus reads up to format {FORMAT}; upgrade Prunus"),
}


async def waiting(services: Services) -> ProcessHandle:
    """A process that nobody holds."""
    handle = await services.controller.launch(workflows.Ask)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    return handle


@pytest.mark.timeout(60)
async def test_it_is_set_aside_and_goes_on_when_restored(short_folder: Path) -> None:
    """Bytes changed in the database while the broker was down: found when the process is needed, never before."""
    journal = short_folder / "journal"
    async with Services(short_folder, workers=1, slots=8) as services:
        profile = services.profile.path
        handles = [await waiting(services) for _ in DAMAGES]
        doomed = await waiting(services)
        other = await services.controller.launch(
            workflows.Journal, {"file": str(journal), "steps": 100_000, "pace_s": 0.01}
        )
        await file_has(journal, 3)
        services.kill("broker")
        originals = {}
        with closing(sqlite3.connect(services.profile.database, isolation_level=None)) as connection:
            changes = [change for change, _ in DAMAGES.values()]
            for handle, change in zip([*handles, doomed], [*changes, flipped], strict=True):
                where = "WHERE process = (SELECT n FROM process WHERE pid = ?)"
                [original] = connection.execute(f"SELECT checkpoint FROM content {where}", [handle.pid]).fetchone()
                connection.execute(f"UPDATE content SET checkpoint = ? {where}", [change(original), handle.pid])
                originals[handle.pid] = original
        services.start("broker")

        for handle, (_, sentence) in zip(handles, DAMAGES.values(), strict=True):
            with pytest.raises(InvalidStateError, match=f"prunus retry {handle.pid}"):
                await handle.resume("hello")
            assert sentence in await set_aside(handle)
            assert await claims(handle) == 2, "one before, one to look at it"
        doctor = await command_line(profile, "doctor")
        assert doctor.code == 1
        for _, sentence in DAMAGES.values():
            assert sentence in doctor.out
        with pytest.raises(CheckpointCorruptError):
            await handles[0].checkpoint_yaml()
        assert DAMAGES["a flipped bit"][1] in await complaint(profile, "show", "--checkpoint", handles[0].pid)
        assert (await command_line(profile, "show", handles[0].pid)).code == 0, "all else can be shown"
        assert "the process is SET ASIDE" in await complaint(profile, "play", handles[0].pid)
        await doomed.kill("damaged")
        assert (await doomed.record()).state == "killed"

        written = len(await file_has(journal, 1))
        await file_has(journal, written + 10)
        services.kill("broker")
        with closing(sqlite3.connect(services.profile.database, isolation_level=None)) as connection:
            for pid, original in originals.items():
                connection.execute(
                    "UPDATE content SET checkpoint = ? WHERE process = (SELECT n FROM process WHERE pid = ?)",
                    [original, pid],
                )
        services.start("broker")
        for handle in handles:
            await handle.retry()
            result = await handle.result()
            assert result.outputs.answer == "hello", "the letter was kept"
        assert (await other.record()).state == "running"
        await other.kill()
