"""Many processes at once: which ones, and what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from prunus import CheckpointNotFoundError, ProcessState
from prunus.persistence.persister import NewProcess, Query, Save
from prunus.runtime import selection
from prunus.runtime.cli.choosing import Filters, rows_of
from prunus.runtime.controller import ProcessController
from prunus.runtime.selection import BulkReport, in_turns, matches, query_of
from prunus.runtime.top.model import View
from prunus.runtime.top.source import Source
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import workflows
from tests.runtime.waiting import file_has, until


async def parked(controller: ProcessController, count: int = 1, **options: Any) -> list[str]:
    """Processes that wait for a person; their pids, the oldest first."""
    handles = await controller.launch_many([(workflows.Ask, None)] * count, **options)
    for handle in handles:
        await until(handle, lambda row: row.owner is None and (row.state == "waiting" or row.play == "paused"))
    return [handle.pid for handle in handles]


async def finished(controller: ProcessController, count: int = 1, **options: Any) -> list[str]:
    """Processes that have finished."""
    handles = await controller.launch_many([(workflows.Add, {"a": 1})] * count, **options)
    return [(await handle.result()).pid for handle in handles]


async def pids_of(selected: selection.ProcessSelection) -> list[str]:
    """The pids, the oldest first."""
    return [handle.pid async for handle in selected][::-1]


async def test_all_that_is_said_must_hold(daemon: LocalDaemon) -> None:
    """State, class, tag, queue, key, parent, paused: each narrows it down."""
    controller = daemon.controller
    [asks] = await parked(controller, tags=["demo"])
    [lies] = await parked(controller, paused="later", queue="default", priority=3)
    [ended] = await finished(controller, tags=["demo", "sums"])
    keyed = await controller.launch(workflows.Ask, key="mine", queue="nobody")
    expected: list[tuple[dict[str, Any], list[str]]] = [
        ({}, [asks, lies, ended, keyed.pid]),
        ({"state": "waiting"}, [asks]),
        ({"state": ["waiting", ProcessState.FINISHED]}, [asks, ended]),
        ({"unfinished": True}, [asks, lies, keyed.pid]),
        ({"cls": workflows.Add}, [ended]),
        ({"cls": "tests.runtime.workflows:Ask"}, [asks, lies, keyed.pid]),
        ({"tag": "demo"}, [asks, ended]),
        ({"tag": "demo", "state": "finished"}, [ended]),
        ({"paused": True}, [lies]),
        ({"queue": "nobody"}, [keyed.pid]),
        ({"key": "mine"}, [keyed.pid]),
        ({"prefix": asks[-8:]}, [asks]),
        ({"aside": True}, []),
        ({"older_than": 3600}, []),
        ({"older_than": timedelta(hours=-1)}, [asks, lies, ended, keyed.pid]),
        ({"unchanged_for": -3600.0, "state": "finished"}, [ended]),
        ({"roots": True, "state": None, "cls": None}, [asks, lies, ended, keyed.pid]),
    ]
    rows = await controller.processes().records()
    for filters, pids in expected:
        selected = controller.processes(**filters)
        assert await pids_of(selected) == pids, filters
        assert await selected.count() == len(pids)
        query = query_of(filters, time.time())  # type: ignore[arg-type]
        assert [row.pid for row in rows[::-1] if matches(row, query)] == pids, filters


def test_what_can_not_be_meant_is_refused() -> None:
    """At once, before anything is asked."""
    for wrong, why in (({"state": "ended"}, "'ended' is not"), ({"state": []}, "names no state")):
        with pytest.raises(ValueError, match=why):
            query_of(wrong, 0.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="selected by colour"):
        query_of({"colour": "red"}, 0.0)  # type: ignore[typeddict-unknown-key]


def test_ages_count_back_from_the_moment_of_the_question() -> None:
    """Seconds, or a timedelta."""
    query = query_of({"older_than": 60, "unchanged_for": timedelta(minutes=2)}, 1000.0)
    assert query == Query(created_before=940.0, updated_before=880.0)


async def test_a_tree_is_a_process_and_its_descendants(daemon: LocalDaemon) -> None:
    """A parent before its children; the other filters hold for each member."""
    controller = daemon.controller
    await parked(controller)
    family = await controller.launch(workflows.Fan, {"count": 3})
    await family.result()
    tree = controller.processes(root=family.pid)
    children = await family.children()
    assert {handle.pid async for handle in tree} == {family.pid, *(child.pid for child in children)}
    assert (await tree.records())[0].pid == family.pid
    assert await controller.processes(root=family.pid, cls=workflows.Add).count() == 3
    assert await controller.processes(parent=family.pid).count() == 3
    parents = [await child.parent() for child in children]
    assert {one.pid for one in parents if one is not None} == {family.pid}
    assert await family.parent() is None


async def test_pages_are_stable_while_things_change(daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are created meanwhile do not come; those that go do no harm; each of the others comes once."""
    monkeypatch.setattr(selection, "QUERY_LIMIT", 3)
    controller = daemon.controller
    pids = await finished(controller, 20)
    seen = []
    async for handle in controller.processes(state="finished"):
        seen.append(handle.pid)
        if len(seen) % 4 == 1:
            await finished(controller)
            with contextlib.suppress(CheckpointNotFoundError):
                await handle.delete()
        if len(seen) == 7:  # the whole next page, and the one behind it
            await controller.processes(state="finished").delete()
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(pids)
    assert seen == sorted(seen, key=pids.index, reverse=True)
    assert seen[:7] == pids[::-1][:7]


async def test_many_are_paused_played_and_killed(daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many pages and batches: each is told once, and the report has all of them."""
    monkeypatch.setattr(selection, "QUERY_LIMIT", 7)
    monkeypatch.setattr(selection, "BATCH", 4)
    monkeypatch.setattr(selection, "IN_FLIGHT", 9)
    controller = daemon.controller
    pids = await parked(controller, 30, tags=["demo"])
    others = await parked(controller, 2)
    await finished(controller, 3, tags=["demo"])
    demo = controller.processes(tag="demo")
    told: list[int] = []
    paused = await demo.pause("lunch", progress=lambda report: told.append(len(report.done)))
    assert (sorted(paused.done), paused.skipped) == (sorted(pids), {})
    assert told == sorted(told)
    assert told[-1] == 30
    rows = {row.pid: row for row in await controller.processes(unfinished=True).records()}
    assert {rows[pid].status for pid in pids} == {"lunch"}
    assert {rows[pid].play for pid in others} == {"playing"}
    assert [rows[pid].inbox_last for pid in pids] == [1] * 30
    assert sorted((await demo.play()).done) == sorted(pids)
    assert await controller.processes(paused=True).count() == 0
    killed = await demo.kill("over", force=True)
    assert str(killed) == "30 done, 0 skipped"
    assert await controller.processes(state="killed").count() == 30


async def test_a_bulk_pause_waits_for_the_steps_that_run(daemon: LocalDaemon, tmp_path: Path) -> None:
    """With `quiesced` (as by default) no step runs any more when it returns."""
    file = tmp_path / "journal"
    handle = await daemon.controller.launch(workflows.Journal, {"file": str(file), "steps": 200, "pace_s": 0.002})
    await file_has(file, 1)
    assert (await daemon.controller.processes(unfinished=True).pause()).done == [handle.pid]
    row = await handle.record()
    assert (row.play, row.owner) == ("paused", None)


async def test_a_step_that_goes_on_keeps_a_bulk_pause_waiting(daemon: LocalDaemon, tmp_path: Path) -> None:
    """Unless it need not be quiesced: then it is enough that the process knows."""
    file = tmp_path / "begun"
    handle = await daemon.controller.launch(workflows.Endless, {"begun": str(file)})
    await file_has(file, 1)
    selected = daemon.controller.processes(unfinished=True)
    assert (await selected.pause(quiesced=False)).done == [handle.pid]
    pausing = asyncio.create_task(selected.pause())
    await until(handle, lambda row: row.inbox_done == 2)
    await handle.kill()
    assert (await pausing).skipped == {handle.pid: "it ended before (killed)"}


async def test_a_page_begins_where_the_last_one_ended_though_that_is_forgotten(
    daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of processes that were launched at the same instant, too."""
    monkeypatch.setattr(selection, "QUERY_LIMIT", 3)
    persister = daemon.controller._backend.persister
    for number in range(10):
        pid = f"twin-{number}"
        await persister.create(
            NewProcess(pid=pid, class_id="m:C", checkpoint=b"", created_at=1.0, state="running", play="paused")
        )
        epoch = (await persister.claim(pid, "me", at=1.0)).epoch
        await persister.save(Save(pid=pid, epoch=epoch, state="finished", result=b"ended"))
    report = await daemon.controller.processes().delete()
    assert report == BulkReport([f"twin-{number}" for number in range(9, -1, -1)])


async def test_a_list_goes_on_though_the_end_of_its_page_is_forgotten(
    daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of the command line and that of `top` read the same pages as selections."""
    monkeypatch.setattr(selection, "QUERY_LIMIT", 3)
    controller = daemon.controller
    pids = await finished(controller, 9)
    find, number = controller.find, 0

    async def find_and_forget(query: Query | None = None) -> Any:
        nonlocal number
        rows = list(await find(query))
        number += 1
        if rows and number < 3:
            await controller.handle(rows[-1].pid).delete()
        return rows

    monkeypatch.setattr(controller, "find", find_and_forget)
    filters = Filters(class_name="Add")
    query = msgspec.structs.replace(await filters.query(controller), limit=selection.QUERY_LIMIT)
    assert [row.pid async for row in rows_of(controller, filters, query)] == pids[::-1]
    number = 0
    look = await Source(controller).look(View(wanted=6, everything=True))
    assert [row.pid for row in look.records] == [pid for pid in pids[::-1] if pid not in (pids[6], pids[3])][:6]


async def test_what_could_not_be_done_is_reported_with_the_reason(daemon: LocalDaemon) -> None:
    """The others are done all the same: a refusal concerns nobody else in its batch."""
    controller = daemon.controller
    pids = await finished(controller, 5)
    rows = await controller.processes().records()
    await controller.handle(pids[2]).delete()

    class Late(selection.ProcessSelection):
        """It has asked before."""

        async def _pages(self, query: Query | None, limit: int | None = None) -> Any:
            yield rows

    report = await Late(controller, Query()).delete()
    assert sorted([*report.done, pids[2]]) == sorted(pids)
    assert list(report.skipped) == [pids[2]]
    assert "there is no process" in report.skipped[pids[2]]


async def test_a_letter_that_comes_too_late_is_reported(daemon: LocalDaemon) -> None:
    """Between the page and the letter the process ended."""
    controller = daemon.controller
    [asks] = await parked(controller)
    rows = await controller.processes().records()

    class Late(selection.ProcessSelection):
        async def _pages(self, query: Query | None, limit: int | None = None) -> Any:
            yield rows

    await controller.handle(asks).resume("now")
    await controller.handle(asks).result()
    late = Late(controller, Query())
    assert (await late.pause()).skipped == {asks: "it ended before (finished)"}
    assert (await late.kill()).skipped == {asks: "it ended before (finished)"}
    assert (await late.send("go")).skipped == {asks: "it ended before (finished)"}
    await controller.handle(asks).delete()
    assert list((await late.play()).skipped) == [asks]


async def test_what_is_over_is_not_touched(daemon: LocalDaemon) -> None:
    """`pause`, `play`, `kill` and `send` mean those that have not ended, `delete` those that have."""
    controller = daemon.controller
    ended = await finished(controller, 2)
    everything = controller.processes()
    for report in (
        await everything.kill(),
        await everything.pause(),
        await everything.play(),
        await everything.retry(),
    ):
        assert report == BulkReport()
    [asks] = await parked(controller)
    assert (await controller.processes(unfinished=True).delete()) == BulkReport()
    assert sorted((await everything.delete()).done) == sorted(ended)
    assert [row.pid for row in await controller.find()] == [asks]


async def test_the_excepted_are_retried(daemon: LocalDaemon, tmp_path: Path) -> None:
    """All of them, and nothing else."""
    cure = tmp_path / "cure"
    handles = await daemon.controller.launch_many([(workflows.Heal, {"file": str(cure)})] * 3)
    for handle in handles:
        await until(handle, lambda row: row.state == "excepted")
    await finished(daemon.controller)
    cure.touch()
    report = await daemon.controller.processes().retry()
    assert sorted(report.done) == sorted(handle.pid for handle in handles)
    for handle in handles:
        assert (await handle.result()).outputs.healed is True


async def test_a_message_goes_to_all(daemon: LocalDaemon) -> None:
    """And is there for each of them."""
    pids = await parked(daemon.controller, 3)
    assert sorted((await daemon.controller.processes(state="waiting").send("news", 1)).done) == sorted(pids)
    assert [row.mail for row in await daemon.controller.find()] == [1, 1, 1]


async def test_a_lost_broadcast_delays_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits looks again now and then."""
    monkeypatch.setattr(selection, "RECHECK_S", 0.01)
    monkeypatch.setattr(selection._Telling, "heard", lambda *_: None)
    async with LocalDaemon() as daemon:
        await parked(daemon.controller, 5)
        assert len((await daemon.controller.processes(state="waiting").pause()).done) == 5


async def test_in_turns_keeps_the_order_and_leaves_nothing_behind() -> None:
    """What comes first is first; after an error nothing goes on."""
    begun: list[int] = []
    cancelled: list[int] = []

    async def one(number: int) -> int:
        begun.append(number)
        try:
            await asyncio.sleep(0 if number < 3 else 3600)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        if number == 2:
            raise ValueError("two")
        return number

    assert await in_turns((one(number) for number in (1, 0)), width=1) == [1, 0]
    begun.clear()
    with pytest.raises(ValueError, match="two"):
        await in_turns((one(number) for number in range(10)), width=3)
    assert set(begun) <= {0, 1, 2, 3, 4}
    assert cancelled == [number for number in begun if number > 2]
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_a_selection_says_what_it_asks_for(daemon_free_controller: ProcessController) -> None:
    """For people at a prompt."""
    shown = repr(daemon_free_controller.processes(state="waiting", tag="demo", root="one"))
    assert shown == "ProcessSelection(states=('waiting',), tag='demo', root='one')"


@pytest.fixture
def daemon_free_controller() -> ProcessController:
    """Nothing is asked of it."""
    return ProcessController(None)  # type: ignore[arg-type]
