"""`ProcessHandle.watch`: everything from the past through now, exactly once, in order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from prunus import WatchEvent, errors
from prunus.persistence.persister import Event, NewProcess, Query, Save
from prunus.runtime import following
from prunus.runtime.controller import ProcessController, ProcessHandle
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.real_daemon import RealDaemon
from tests.runtime import workflows
from tests.runtime.waiting import file_has, until

RESULT = b"ended"


async def seen_by(handle: ProcessHandle, after: int = 0, *, tree: bool = False) -> list[WatchEvent]:
    """All that a watcher sees until it ends."""
    return [event async for event in handle.watch(after=after, tree=tree)]


def numbers(events: list[WatchEvent]) -> list[int]:
    return [event.seq for event in events]


class Writer:
    """A worker that does nothing but make transitions as fast as it can."""

    def __init__(self, controller: ProcessController, pid: str) -> None:
        self._persister = controller._backend.persister
        self.pid = pid
        self.epoch = 0

    async def begin(self) -> None:
        new = NewProcess(
            pid=self.pid, class_id="m:Fast", checkpoint=b"", created_at=1.0, state="running", play="paused"
        )
        await self._persister.create(new)
        self.epoch = (await self._persister.claim(self.pid, "writer", at=1.0)).epoch

    async def write(self, state: str, *subjects: str) -> None:
        events = tuple(Event(subject=subject, at=1.0) for subject in subjects)
        ended = state == "finished"
        result = RESULT if ended else None
        await self._persister.save(
            Save(pid=self.pid, epoch=self.epoch, state=state, events=events, result=result, release=ended)
        )


async def test_the_past_and_the_end(daemon: LocalDaemon) -> None:
    """Of an ended process: its whole history, and that is all."""
    handle = await daemon.controller.launch(workflows.Add, {"a": 1})
    await handle.result()
    seen = await seen_by(handle)
    assert [event.subject for event in seen] == ["claimed", "created.running", "running.finished"]
    assert numbers(seen) == [1, 2, 3]
    assert {event.pid for event in seen} == {handle.pid}
    assert (seen[-1].step, seen[-1].ends, seen[0].ends) == ("run", True, False)
    history = await handle.history()
    assert [(one.subject, one.at, one.by) for one in history] == [(one.subject, one.at, one.by) for one in seen]


async def test_it_goes_on_where_one_left_off(daemon: LocalDaemon) -> None:
    """With the number of the last event that was seen; behind the last one there is nothing to wait for."""
    handle = await daemon.controller.launch(workflows.Add, {"a": 1})
    await handle.result()
    assert numbers(await seen_by(handle, after=1)) == [2, 3]
    assert await seen_by(handle, after=3) == []
    assert [event.seq for event in await handle.history(after=2)] == [3]


async def test_an_unknown_process_is_named(daemon: LocalDaemon) -> None:
    """Also one that is forgotten while it is watched."""
    for after in (0, 5):
        with pytest.raises(errors.CheckpointNotFoundError, match="nobody"):
            await seen_by(daemon.controller.handle("nobody"), after)


async def test_it_does_not_end_before_the_process(daemon: LocalDaemon) -> None:
    """It waits as long as the process does, and brings the last event."""
    handle = await daemon.controller.launch(workflows.Ask)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    watching = handle.watch()
    past = [await anext(watching) for _ in range(3)]
    assert [event.subject for event in past] == ["claimed", "created.running", "running.waiting"]
    following_one = asyncio.ensure_future(anext(watching))
    await handle.pause("looking")
    assert (await following_one).subject == "claimed"
    await handle.play()
    await handle.resume(1)
    rest = [event async for event in watching]
    assert [event.subject for event in rest if event.subject != "claimed"] == [
        "playing.paused",
        "paused.playing",
        "waiting.running",
        "running.finished",
    ]
    assert [*numbers(past), 4, *numbers(rest)] == list(range(1, 5 + len(rest)))


async def test_a_retry_is_another_life(daemon: LocalDaemon, tmp_path: Path) -> None:
    """A watch ends with the life that it saw; one from the beginning tells all lives."""
    cure = tmp_path / "cure"
    handle = await daemon.controller.launch(workflows.Heal, {"file": str(cure)})
    first = await seen_by(handle)
    assert first[-1].subject == "running.excepted"
    cure.touch()
    await handle.retry()
    second = await seen_by(handle, after=first[-1].seq)
    assert (second[0].subject, second[-1].subject) == ("revived", "running.finished")
    assert numbers(await seen_by(handle)) == numbers(first) + numbers(second)


@pytest.mark.parametrize("seed", range(3))
async def test_each_watcher_sees_each_event_once_whenever_it_begins(daemon: LocalDaemon, seed: int) -> None:
    """A writer goes as fast as it can, and watchers join at random moments, some of them slow."""
    chance = random.Random(seed)
    writer = Writer(daemon.controller, "fast")
    await writer.begin()
    handle = daemon.controller.handle("fast")
    watchers: list[asyncio.Task[list[int]]] = []

    async def watch(after: int, slow: bool) -> list[int]:
        found = []
        async for event in handle.watch(after=after):
            found.append(event.seq)
            if slow:
                await asyncio.sleep(0)
        return [after, *found]

    written = 1  # it was claimed
    for _ in range(150):
        several = chance.randrange(1, 4)
        await writer.write("running", *["running.running"] * several)
        written += several
        if chance.random() < 0.1:
            watchers.append(asyncio.create_task(watch(chance.randrange(written + 1), chance.random() < 0.5)))
    await writer.write("finished", "running.finished")
    watchers.append(asyncio.create_task(watch(0, False)))
    for found in await asyncio.gather(*watchers):
        assert found == list(range(found[0], written + 2))
    assert len(watchers) > 5


async def test_it_needs_no_broadcast(daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """They make it quick, and no more: what is missed is found at the next look."""
    monkeypatch.setattr(following, "RECHECK_S", 0.01)
    monkeypatch.setattr(following, "listening", deaf)
    handle = await daemon.controller.launch(workflows.Ask)
    seen = asyncio.create_task(seen_by(handle))
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    await handle.resume(1)
    assert (await seen)[-1].subject == "running.finished"


class deaf:
    """Hears nothing."""

    def __init__(self, *_: object) -> None: ...

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


async def test_a_tree_tells_of_all_its_members(daemon: LocalDaemon) -> None:
    """Each process's events in order, and the end when all of them have ended."""
    handle = await daemon.controller.launch(workflows.Fan, {"count": 60})
    seen = await seen_by(handle, tree=True)
    children = await handle.children()
    assert len(children) == 60
    for one in (handle, *children):
        history = [event.seq for event in await one.history()]
        assert [event.seq for event in seen if event.pid == one.pid] == history
    assert {event.pid for event in seen} == {handle.pid, *(child.pid for child in children)}
    assert await seen_by(handle, tree=True) != []


async def test_a_forgotten_child_is_no_reason_to_wait(daemon: LocalDaemon) -> None:
    """Of what is no more there is nothing to tell."""
    handle = await daemon.controller.launch(workflows.Fan, {"count": 3})
    await handle.result()
    await (await handle.children())[1].delete()
    assert len({event.pid for event in await seen_by(handle, tree=True)}) == 3


async def test_who_reads_no_further_leaves_nothing_behind(daemon: LocalDaemon) -> None:
    """The subscription ends with the reader."""
    handle = await daemon.controller.launch(workflows.Ask)
    before = (await daemon.controller.communicator.statistics()).broadcast_subscriptions
    watching: AsyncIterator[WatchEvent] = handle.watch()
    await anext(watching)
    assert (await daemon.controller.communicator.statistics()).broadcast_subscriptions == before + 1
    await watching.aclose()  # type: ignore[attr-defined]
    assert (await daemon.controller.communicator.statistics()).broadcast_subscriptions == before


@pytest.mark.timeout(120)
async def test_a_broker_that_is_killed_leaves_no_gap_and_no_duplicate(tmp_path: Path) -> None:
    """SIGKILL of the broker in the middle, twice; watchers that began before, and one that begins after it."""
    async with RealDaemon(tmp_path, workers=1) as daemon:
        file = tmp_path / "journal"
        handle = await daemon.controller.launch(workflows.Journal, {"file": str(file), "steps": 60, "pace_s": 0.01})
        watchers = [asyncio.create_task(seen_by(handle)), asyncio.create_task(seen_by(handle, tree=True))]
        for lines in (10, 30):
            await file_has(file, lines)
            daemon.kill("broker")
            daemon.start("broker")
        await handle.result()
        watchers.append(asyncio.create_task(seen_by(handle)))
        history = [event.seq for event in await handle.history()]
        for seen in await asyncio.gather(*watchers):
            assert numbers(seen) == history, daemon.logs()
        assert history == list(range(1, len(history) + 1))
        assert await daemon.controller.find(Query(unfinished=True)) == []
