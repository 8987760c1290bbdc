"""Schedules as processes: over the real broker, store and workers without a network, with a clock that is moved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import prunus
from prunus import Process, ProcessKilledError, Schedule, Wait, errors
from prunus.persistence.checkpoint import decode_checkpoint
from prunus.persistence.persister import Query, Record
from prunus.processes import Outcomes
from prunus.runtime import runner, schedules
from prunus.runtime.controller import ProcessHandle
from prunus.runtime.runner import checkpoint_of, new_process
from prunus.runtime.timetable import MAX_CATCH_UP, stamp
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import features, workflows
from tests.runtime.waiting import until

HOUR_S = 3600


class World:
    """A daemon and the time in it."""

    def __init__(self, daemon: LocalDaemon) -> None:
        self.daemon = daemon
        self.ahead_s = 0.0

    def now_s(self) -> float:
        return time.time() + self.ahead_s

    async def launch(
        self, process_class: type[Process[Any, Any]] = features.Patient, inputs: Any = None, **options: Any
    ) -> ProcessHandle[Any]:
        """An hourly schedule that waits for its first fire time."""
        written = Schedule.every("1h", process_class, inputs, **options)
        handle = await self.daemon.controller.launch(Schedule, written, pid="hourly")
        await self.parked(handle)
        return handle

    async def parked(self, handle: ProcessHandle[Any]) -> Record:
        """Until it waits for a time that is yet to come, or has ended."""
        return await until(
            handle,
            lambda row: (
                row.is_terminal
                or row.play == "paused"
                or (row.owner is None and row.wake_at is not None and row.wake_at > self.now_s())
            ),
        )

    async def go_on(self, handle: ProcessHandle[Any], hours: float = 1.0) -> Record:
        """Time goes by."""
        self.ahead_s += hours * HOUR_S
        self.daemon.broker.tick()
        return await self.parked(handle)

    async def runs(self) -> dict[str, str]:
        """The states of its runs, the oldest first, by the numbers of their hours or what else they are called."""
        children = await self.daemon.controller.find(Query(parent="hourly", limit=1000))
        created_s = await self.created_s()
        names = {f"hourly@{stamp(created_s + hour * HOUR_S)}": str(hour) for hour in range(1000)}
        return {names.get(child.pid, child.pid): child.state for child in reversed(children)}

    async def context(self) -> dict[str, Any]:
        return context_of(await self.daemon.controller.handle("hourly").record())

    async def launched(self, number: int) -> None:
        """Until it has launched so many."""
        await until(self.daemon.controller.handle("hourly"), lambda row: context_of(row)["runs"] >= number)

    async def end_run(self, hour: int) -> None:
        """Resume one that is suspended: it ends."""
        handle = self.daemon.controller.handle(f"hourly@{stamp(await self.created_s() + hour * HOUR_S)}")
        await until(handle, lambda row: row.state == "waiting")
        await handle.resume()
        await handle.result()

    async def created_s(self) -> int:
        return int((await self.daemon.controller.handle("hourly").record()).created_at)


def context_of(record: Record) -> dict[str, Any]:
    assert record.checkpoint is not None
    context: dict[str, Any] = decode_checkpoint(record.checkpoint).snapshot()["context"]
    return context


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """One worker; the clocks of the store and of the schedules are moved together."""
    ahead: list[World] = []
    async with LocalDaemon(clock=lambda: ahead[0].now_s() if ahead else time.time()) as daemon:
        world = World(daemon)
        ahead.append(world)
        monkeypatch.setattr(schedules, "time", SimpleNamespace(time=world.now_s))
        yield world


# --- it runs, once each time ----------------------------------------------------------------------------


async def test_a_schedule_is_parked_until_it_fires(world: World) -> None:
    """It is a row with a time; each run is a child whose pid says the fire time."""
    handle = await world.launch(workflows.Add, {"a": 1}, tags=["nightly"])
    record = await handle.record()
    assert (record.state, record.owner) == ("waiting", None)
    assert record.wake_at == int(record.created_at) + HOUR_S
    assert record.status is not None
    assert record.status.startswith("next run ")
    assert await world.runs() == {}
    for _ in range(3):
        record = await world.go_on(handle)
    assert record.wake_at == int(record.created_at) + 4 * HOUR_S
    assert list(await world.runs()) == ["1", "2", "3"]
    first = world.daemon.controller.handle(f"hourly@{stamp(int(record.created_at) + HOUR_S)}")
    assert (await first.result()).outputs.sum == 2
    record = await first.record()
    assert (record.tags, record.parent_close) == (("nightly",), "abandon")
    assert [line.text.partition("@")[0] for line in await handle.log()] == ["launched hourly"] * 3


async def test_who_dies_at_the_moment_of_firing_launches_once(world: World) -> None:
    """The step that fires, done twice from one checkpoint, asks for the same child; the store makes it once."""
    handle = await world.launch(workflows.Add, {"a": 1})
    record = await handle.record()
    assert record.checkpoint is not None
    assert record.wake_at is not None
    pids = []
    for _ in range(2):
        schedule = Schedule.restore(decode_checkpoint(record.checkpoint).snapshot())
        schedule.driver = Alone()  # type: ignore[assignment]
        schedule.settle(Outcomes(record.wake_at))
        await schedule.step()
        [child] = schedule.take_effects().children
        await world.daemon.controller._backend.persister.create(new_process(child))
        pids.append(child.pid)
    assert pids == [f"hourly@{stamp(int(record.created_at) + HOUR_S)}"] * 2
    await world.go_on(handle)  # and the real one finds it there
    assert list(await world.runs()) == ["1"]


async def test_a_worker_that_is_killed_while_it_fires_leaves_it_to_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, and the next fire time as always."""
    handle = await world.launch(workflows.Add, {"a": 1})
    fires, goes_on = asyncio.Event(), asyncio.Event()
    launch = Schedule._launch

    async def slowly(self: Schedule, times: Any) -> None:
        await launch(self, times)
        fires.set()
        await goes_on.wait()

    monkeypatch.setattr(Schedule, "_launch", slowly)
    world.ahead_s += HOUR_S
    world.daemon.broker.tick()
    await fires.wait()
    await world.daemon.kill_worker("worker-1")
    goes_on.set()
    await world.daemon.start_worker("worker-2")
    await world.parked(handle)
    assert list(await world.runs()) == ["1"]
    assert (await world.context())["runs"] == 1


async def test_a_broker_whose_clock_is_ahead_is_believed() -> None:
    """It says that it is time, so it is; the schedule does not look again and again until its own clock agrees."""
    ahead_s = 0.0
    async with LocalDaemon(clock=lambda: time.time() + ahead_s) as late:
        handle = await late.controller.launch(Schedule, Schedule.every("1h", workflows.Add, {"a": 1}))
        begun = await until(handle, lambda row: row.wake_at is not None)
        ahead_s = HOUR_S
        late.broker.tick()
        record = await until(handle, lambda row: row.wake_at is not None and row.wake_at != begun.wake_at)
        assert record.wake_at == (begun.wake_at or 0) + HOUR_S
        assert len(await late.controller.find(Query(parent=handle.pid))) == 1


# --- what was missed ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("catch_up", "expected", "missed"),
    [("skip", ["5"], 4), ("last", ["4", "5"], 3), ("all", ["1", "2", "3", "4", "5"], 0)],
)
async def test_what_was_missed_while_nothing_ran(world: World, catch_up: str, expected: list[str], missed: int) -> None:
    """No worker is there for four and a half hours."""
    handle = await world.launch(workflows.Add, {"a": 1}, catch_up=catch_up, overlap="allow")
    await world.daemon.stop_worker("worker-1")
    world.ahead_s += 4.5 * HOUR_S
    world.daemon.broker.tick()
    await world.daemon.start_worker("worker-2")
    await world.parked(handle)
    await world.go_on(handle, 0.5)
    assert list(await world.runs()) == expected
    context = await world.context()
    assert (context["runs"], context["missed"]) == (len(expected), missed)


@pytest.mark.parametrize(("catch_up", "expected"), [("skip", ["3"]), ("last", ["2", "3"]), ("all", ["1", "2", "3"])])
async def test_what_was_missed_while_it_was_paused(world: World, catch_up: str, expected: list[str]) -> None:
    """Nothing is launched before it is played; then its policy holds."""
    handle = await world.launch(workflows.Add, {"a": 1}, catch_up=catch_up, overlap="allow")
    await handle.pause("holidays")
    world.ahead_s += 2.5 * HOUR_S
    world.daemon.broker.tick()
    assert (await handle.record()).play == "paused"
    assert await world.runs() == {}
    await handle.play()
    await world.parked(handle)
    await world.go_on(handle, 0.5)
    assert list(await world.runs()) == expected


async def test_a_run_that_is_a_little_late_is_not_missed(world: World) -> None:
    """By less than `late_s`."""
    handle = await world.launch(workflows.Add, {"a": 1}, late_s=1800.0)
    await world.go_on(handle, 1.4)
    assert list(await world.runs()) == ["1"]
    await world.go_on(handle, 1.2)
    assert (await world.context())["missed"] == 1


# --- overlap ------------------------------------------------------------------------------------------


async def test_overlap_skip(world: World) -> None:
    """While a run is there no other one begins."""
    handle = await world.launch()
    await world.go_on(handle)
    await world.go_on(handle)
    assert await world.runs() == {"1": "waiting"}
    await world.end_run(1)
    await world.go_on(handle)
    assert await world.runs() == {"1": "finished", "3": "waiting"}
    context = await world.context()
    assert (context["runs"], context["skipped"], context["missed"]) == (2, 1, 0)


async def test_overlap_allow(world: World) -> None:
    """They run at the same time, and the schedule waits for none of them."""
    handle = await world.launch(overlap="allow")
    for _ in range(3):
        record = await world.go_on(handle)
        assert record.waits == ()
    assert await until_all(world, "waiting") == ["1", "2", "3"]


async def test_overlap_queue(world: World) -> None:
    """One waits, the newest; it begins as soon as the run before it has ended, not at the next fire time."""
    handle = await world.launch(overlap="queue")
    for _ in range(3):
        await world.go_on(handle)
    assert await world.runs() == {"1": "waiting"}
    await world.end_run(1)
    await world.launched(2)
    assert list(await world.runs()) == ["1", "3"]
    context = await world.context()
    assert (context["runs"], context["skipped"], context["queued"]) == (2, 1, [])


async def test_queue_and_catch_up_all_lose_nothing(world: World) -> None:
    """All that was missed has its turn, one after the other."""
    handle = await world.launch(overlap="queue", catch_up="all")
    await world.go_on(handle, 3)
    for hour in (1, 2, 3):
        await world.launched(hour)
        await world.end_run(hour)
    assert await world.runs() == {"1": "finished", "2": "finished", "3": "finished"}
    await world.go_on(handle, MAX_CATCH_UP + 50)
    context = await world.context()
    assert (len(context["queued"]), context["missed"], context["skipped"]) == (MAX_CATCH_UP - 1, 50, 0)


async def test_overlap_replace(world: World, tmp_path: Path) -> None:
    """The run that is there is killed, and the new one begins when it has ended."""
    handle = await world.launch(features.Gated, {"file": str(tmp_path / "go")}, overlap="replace")
    await world.go_on(handle)
    first = world.daemon.controller.handle(f"hourly@{stamp(await world.created_s() + HOUR_S)}")
    await until(first, lambda row: row.owner is not None and row.state == "running")
    await world.go_on(handle)
    with pytest.raises(ProcessKilledError, match="the next run of its schedule takes its place"):
        await first.result()
    await world.launched(2)
    assert list(await world.runs()) == ["1", "2"]
    context = await world.context()
    assert (context["runs"], context["skipped"]) == (2, 0)
    (tmp_path / "go").touch()
    await until_all(world, "finished", but=first.pid)


async def test_a_run_that_was_forgotten_has_ended(world: World) -> None:
    """Ended runs may be deleted; the schedule goes on."""
    handle = await world.launch(workflows.Add, {"a": 1})
    await world.go_on(handle)
    first = world.daemon.controller.handle(f"hourly@{stamp(await world.created_s() + HOUR_S)}")
    await first.result()
    await world.daemon.controller._backend.persister.delete(first.pid)
    await world.go_on(handle)
    assert list(await world.runs()) == ["2"]


# --- its life -----------------------------------------------------------------------------------------


async def test_it_ends_after_so_many_runs(world: World) -> None:
    """Its outputs say what it did; a run that goes on does so without it."""
    handle = await world.launch(max_runs=2, overlap="allow")
    await world.go_on(handle)
    record = await world.go_on(handle)
    assert record.state == "finished"
    assert dict((await handle.result()).outputs) == {"runs": 2, "missed": 0, "skipped": 0}
    assert await until_all(world, "waiting") == ["1", "2"]


async def test_it_ends_at_its_end(world: World) -> None:
    """There is no fire time after `until`."""
    end_s = time.time() + 1.5 * HOUR_S
    handle = await world.launch(workflows.Add, {"a": 1}, until=f"{stamp(int(end_s))[:-1]}+00:00")
    record = await world.go_on(handle)
    assert record.state == "finished"
    assert list(await world.runs()) == ["1"]


async def test_a_kill_removes_it_and_leaves_its_runs(world: World) -> None:
    """The run that is there goes on to its end."""
    handle = await world.launch()
    await world.go_on(handle)
    await handle.kill("removed")
    await world.end_run(1)
    assert await world.runs() == {"1": "finished"}


async def test_what_cant_be_launched_pauses_it_with_the_reason(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is gone; when it is back and the schedule is played, it goes on."""
    handle = await world.launch(workflows.Add, {"a": 1}, late_s=86_400.0)
    monkeypatch.delattr(workflows, "Add")
    record = await world.go_on(handle)
    assert record.play == "paused"
    assert "the step look failed" in (record.status or "")
    assert "Add" in (record.status or "")
    monkeypatch.undo()
    monkeypatch.setattr(schedules, "time", SimpleNamespace(time=world.now_s))
    await handle.play()
    await world.parked(handle)
    assert list(await world.runs()) == ["1"]


async def test_a_broker_that_is_away_is_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it can't be asked whether a run has ended is no reason to stop."""
    handle = await world.launch(workflows.Add, {"a": 1})
    await world.go_on(handle)
    results = runner.Runner.results
    away = ["once"]

    async def ask(self: runner.Runner, pids: Any) -> Any:
        if away:
            raise errors.NotDeliveredError(away.pop())
        return await results(self, pids)

    monkeypatch.setattr(runner.Runner, "results", ask)
    await world.go_on(handle)
    assert list(await world.runs()) == ["1", "2"]
    notes = [event.note or "" for event in await handle.history()]
    assert [note.partition(" failed")[0] for note in notes if "attempt" in note] == ["attempt 1 of 1000"]


async def test_a_run_by_hand(world: World) -> None:
    """At once, also while it is paused, and beside those of its times."""
    handle = await world.launch(workflows.Add, {"a": 1})
    await handle.pause()
    pid = await handle.update("run_now")
    assert (await world.daemon.controller.handle(pid).result()).outputs.sum == 2
    assert pid.startswith("hourly@now-")
    await handle.play()
    await world.parked(handle)
    await world.go_on(handle)
    assert list(await world.runs()) == [pid, "1"]
    assert (await world.context())["runs"] == 1


async def test_its_runs_have_its_queue_priority_and_resources(world: World) -> None:
    """What is not said is as the class says."""
    await world.daemon.controller.launch(
        Schedule, Schedule.every("1h", features.Patient, queue="gpu", priority=7, resources={"licence": 2}), pid="gpus"
    )
    gpus = world.daemon.controller.handle("gpus")
    record = await world.parked(gpus)
    assert record.checkpoint is not None
    schedule = Schedule.restore(decode_checkpoint(record.checkpoint).snapshot())
    schedule.driver = Alone()  # type: ignore[assignment]
    schedule.settle(Outcomes(record.wake_at or 0.0))
    await schedule.step()
    [child] = schedule.take_effects().children
    assert (child.queue, child.priority, child.resources) == ("gpu", 7, {"licence": 2})


async def test_what_it_remembers_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a thousand runs its checkpoint is as large as after ten."""
    schedule = Schedule(Schedule.every("1h", features.Patient, overlap="queue"), pid="hourly")
    sizes, driver = [], Alone()
    now_s = schedule.created_at
    monkeypatch.setattr(schedules, "time", SimpleNamespace(time=lambda: now_s))
    schedule.driver = driver  # type: ignore[assignment]
    while len(sizes) < 1000:
        while schedule.can_step:
            await schedule.step()
        driver.launched += len(schedule.take_effects().children)
        sizes.append(len(checkpoint_of(schedule)))
        now_s += HOUR_S
        schedule.settle(Outcomes(now_s))
    assert driver.launched == 999
    assert max(sizes[10:]) - min(sizes[10:]) < 10


async def test_alone_in_a_script_it_does_the_same() -> None:
    """`prunus.execute` drives it, its runs too."""
    result = await prunus.execute(Schedule, Schedule.every("1s", workflows.Add, {"a": 1}, max_runs=1))
    assert result.outputs.runs == 1


async def test_who_runs_alone_is_told_whether_a_child_has_ended() -> None:
    """The driver of a script says it as a worker does."""
    result = await prunus.execute(Asks)
    assert result.value == ["created", "finished"]


class Asks(Process):
    """Asks for the result of its child before and after its end."""

    async def run(self) -> Wait:
        child = self.submit(workflows.Add, {"a": 1}, pid="asked")
        return Wait(child, then=self.ask)

    async def ask(self, result: Any) -> Any:
        assert self.driver is not None
        self.submit(features.Nap, {"seconds": 0.0}, pid="napping")
        return prunus.Continue(self.ask_again)

    async def ask_again(self) -> Any:
        assert self.driver is not None
        [one] = await self.driver.results(["asked"])
        try:
            await self.driver.results(["napping"])
        except errors.InvalidStateError as error:
            return [error.state, one.state.value]
        return None


class Alone:
    """A driver of a schedule whose runs have all ended."""

    launched = 0

    def changed(self) -> None:
        """Nobody looks."""

    def said(self) -> None:
        """Nobody listens."""

    async def results(self, pids: Any) -> Any:
        return []

    def load_class(self, identifier: str) -> Any:
        return prunus.processes.load_class(identifier)


async def until_all(world: World, state: str, but: str | None = None) -> list[str]:
    """The runs as soon as all (`but` one) are in this state."""
    for child in await world.daemon.controller.find(Query(parent="hourly")):
        if child.pid != but:
            await until(world.daemon.controller.handle(child.pid), lambda row: row.state == state)
    return list(await world.runs())


# --- what is wrong is told at once ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ({"when": "61 * * * *"}, "the minute '61'"),
        ({"when": "every 90"}, "is no interval"),
        ({"when": "0 0 */10 4 5L"}, "never comes"),
        ({"when": "every 1h", "until": "2001-01-01"}, "never comes until 2001-01-01"),
        ({"when": "every 1h", "until": "soon"}, "'soon' is no date or time"),
        ({"when": "every 1h", "anchor": "soon"}, "'soon' is no date or time"),
        ({"when": "0 2 * * *", "anchor": "2026-01-01"}, "only an interval has one"),
        ({"when": "0 2 * * *", "timezone": "Mars"}, "timezone: 'Mars' is no time zone"),
        ({"when": "every 60s", "jitter_s": 61.0}, "longer than the interval"),
        ({"when": "0 2 * * *", "jitter_s": -1.0}, "jitter_s: a jitter is 0 to 86400 seconds"),
        ({"when": "0 2 * * *", "late_s": -1.0}, "late_s: it is 0 seconds or more"),
        ({"when": "0 2 * * *", "max_runs": 0}, "max_runs: it is 1 or more"),
        ({"when": "0 2 * * *", "overlap": "never"}, "overlap"),
        ({"when": "0 2 * * *", "catch_up": "some"}, "catch_up"),
        ({"when": "0 2 * * *", "priority": 10}, "priority: a priority is a number from 0 to 9"),
        ({"when": "0 2 * * *", "queue": ""}, "queue: a queue is a text of 1"),
        ({"when": "0 2 * * *", "resources": {"gpu": 0}}, "resources: of the resource 'gpu'"),
        ({"when": "0 2 * * *", "process_class": "Add"}, "process_class: write it as package.module:Class"),
    ],
)
def test_wrong_inputs_are_refused(written: dict[str, Any], complaint: str) -> None:
    """With what is wrong and with which of them."""
    with pytest.raises(errors.InvalidInputError) as raised:
        Schedule({"process_class": "tests.runtime.workflows:Add", **written})
    assert complaint in str(raised.value)


def test_the_helpers_check_the_class_and_its_inputs() -> None:
    """Before anything is launched."""
    written = Schedule.cron("0 2 * * *", "tests.runtime.workflows:Add", {"a": 1}, timezone="Europe/Zurich", late_s=5.0)
    assert written == {
        "when": "0 2 * * *",
        "process_class": "tests.runtime.workflows:Add",
        "inputs": {"a": 1},
        "timezone": "Europe/Zurich",
        "late_s": 5.0,
    }
    with pytest.raises(errors.InvalidInputError, match=r"inputs\.a"):
        Schedule.every("1h", workflows.Add, {"a": "one"})
    with pytest.raises(errors.InvalidInputError, match="did you mean 'overlap'"):
        Schedule.every("1h", workflows.Add, {"a": 1}, overlaps="skip")
    with pytest.raises(errors.ProcessClassNotFoundError):
        Schedule.every("1h", "tests.runtime.workflows:Subtract")

    class Local(Process):
        async def run(self) -> None: ...

    with pytest.raises(errors.ProcessClassNotFoundError, match="inside a function"):
        Schedule.every("1h", Local)


async def test_a_profile_with_few_modules_allows_schedules_of_these_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`Schedule` itself is always allowed; a class from another module pauses it, and is not imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "not_allowed.py").write_text("raise AssertionError('it was imported')\n")
    from prunus.runtime.worker import Worker

    async with LocalDaemon(workers=0) as daemon:
        communicator = await daemon.broker.connect(name="strict")
        worker = Worker(communicator, slots=2, grace_s=1.0, modules=["tests.*"])
        task = asyncio.create_task(worker.run())
        written = {"when": "every 1s", "process_class": "not_allowed:Anything"}
        handle = await daemon.controller.launch(Schedule, written)
        record = await until(handle, lambda row: row.play == "paused")
        assert "not allowed" in (record.status or "")
        worker.stop()
        await task
        await communicator.close()
