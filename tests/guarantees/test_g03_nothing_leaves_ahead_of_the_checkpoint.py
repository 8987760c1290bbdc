"""G3: no broadcast, answer, acknowledgement or child launch leaves ahead of the checkpoint.

A second connection to the same file sees only what is committed: whoever hears something asks it at once.
"""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from prunus.messaging.communicator import Broadcast
from prunus.persistence import open_database
from prunus.persistence.checkpoint import decode_checkpoint
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.audit import nth_commit
from tests.runtime import features, workflows
from tests.runtime.waiting import file_has, until


async def test_what_is_heard_is_committed_already(tmp_path: Path) -> None:
    """For each broadcast the history on the disk has the line; for each answer to a control call the state."""
    path = tmp_path / "prunus.db"
    journal = tmp_path / "journal"
    heard: list[str] = []
    early: list[str] = []
    async with LocalDaemon(workers=2, connection=open_database(path, exclusive=False)) as daemon:
        reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)

        async def listen(broadcast: Broadcast) -> None:
            _, _, change = (broadcast.subject or "").partition("_changed.")
            if change:
                heard.append(change)
                [count] = reader.execute(
                    "SELECT count(*) FROM event JOIN process ON n = process WHERE pid = ? AND subject = ?",
                    [broadcast.sender, change],
                ).fetchone()
                if not count:
                    early.append(f"{broadcast.sender}: {change}")

        communicator = daemon.controller._backend.communicator
        subscription = await communicator.add_broadcast_subscriber(listen)
        fan = await daemon.controller.launch(workflows.Fan)
        paused = await daemon.controller.launch(workflows.Journal, {"file": str(journal), "steps": 20, "pace_s": 0.001})
        await file_has(journal, 1)
        await paused.pause()
        assert reader.execute("SELECT play FROM process WHERE pid = ?", [paused.pid]).fetchone() == ("paused",)
        await paused.play()
        assert (await paused.result()).outputs.written == 20
        assert (await fan.result()).outputs.total == 6
        await subscription.cancel()
        reader.close()
    assert early == []
    assert "waiting.running" in heard
    assert "running.finished" in heard


async def test_children_exist_only_with_the_checkpoint_of_the_step_that_submitted_them() -> None:
    """In no commit is there a child of a parent that is not known to wait for it."""
    async with LocalDaemon() as daemon:
        ahead: list[object] = []

        def audit(failpoint: str) -> None:
            if failpoint == "after_commit":
                ahead.extend(daemon.connection.execute(AHEAD_OF_ITS_PARENT))

        daemon.broker.exchange.failpoint = audit
        handle = await daemon.controller.launch(workflows.Fan)
        await handle.result()
    assert ahead == []


AHEAD_OF_ITS_PARENT = """
    SELECT child.pid FROM process AS child JOIN process AS parent ON child.parent = parent.pid
    WHERE NOT EXISTS (SELECT 1 FROM event WHERE process = parent.n AND subject = 'running.waiting')"""


async def test_an_update_is_durable_before_it_is_answered(tmp_path: Path) -> None:
    """While it is parked and while a step runs: who has the answer finds the change on the disk."""
    path, go = tmp_path / "prunus.db", tmp_path / "go"
    async with LocalDaemon(connection=open_database(path, exclusive=False)) as daemon:
        reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)

        def context_of(pid: str) -> dict[str, object]:
            [checkpoint] = reader.execute(CHECKPOINT, [pid]).fetchone()
            context: dict[str, object] = decode_checkpoint(checkpoint).snapshot()["context"]
            return context

        parked = await daemon.controller.launch(workflows.Wander, {"seed": 0, "steps": 0}, paused=True)
        for number in range(5):
            assert await parked.update("apply", f"change {number}") == number + 1
            assert len(context_of(parked.pid)["applied"]) == number + 1  # type: ignore[arg-type]
        stepping = await daemon.controller.launch(features.GatedChain, {"file": str(go)})
        await until(stepping, lambda row: row.step == "wait" and row.owner is not None)
        edit = asyncio.create_task(stepping.edit_context(text="edited"))
        await until(stepping, lambda row: row.inbox_last == 1)
        assert not edit.done()
        go.touch()
        await edit
        assert context_of(stepping.pid)["text"] == "edited"
        await stepping.kill()
        reader.close()


CHECKPOINT = "SELECT checkpoint FROM content JOIN process ON n = process WHERE pid = ?"


@pytest.mark.parametrize("commit", range(1, 4))
async def test_an_update_is_applied_once_whenever_its_worker_dies(commit: int) -> None:
    """After any commit that follows it: it is answered once, with what was applied once."""
    async with LocalDaemon() as daemon:
        handle = await daemon.controller.launch(features.Review)
        await until(handle, lambda row: row.state == "waiting" and row.owner is None)
        count, reached = nth_commit(commit)
        daemon.broker.exchange.failpoint = count
        update = asyncio.create_task(handle.update("set_limit", 8))
        await reached.wait()
        await daemon.kill_worker("worker-1")
        await daemon.start_worker("worker-2")
        assert await update == 3
        assert await handle.query("limit_plus") == 8
        assert [event.subject for event in await handle.history()].count("updated") == 1
