"""Launch, look, wait and control, over the real broker, store and worker without a network."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from prunus import Process, ProcessState, errors
from prunus.persistence.persister import QUERY_LIMIT, Query
from prunus.runtime.controller import ProcessController, ProcessHandle
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import workflows
from tests.runtime.waiting import file_has, until


async def test_a_launched_process_runs_and_its_result_comes_back(daemon: LocalDaemon) -> None:
    """Launch, result: the outputs are those of the step."""
    handle = await daemon.controller.launch(workflows.Add, {"a": 1, "b": 2}, tags=["demo"])
    result = await handle.result()
    assert result.outputs.sum == 3
    record = await handle.record()
    assert (record.state, record.tags, record.owner) == ("finished", ("demo",), None)


async def test_the_history_tells_every_transition(daemon: LocalDaemon) -> None:
    """Who claimed it, and each transition in order."""
    handle = await daemon.controller.launch(workflows.Add, {"a": 1})
    await handle.result()
    history = await handle.history()
    assert [event.subject for event in history] == ["claimed", "created.running", "running.finished"]
    assert (history[-1].by or "").startswith("worker-1")


async def test_wrong_inputs_are_all_named_before_anything_is_sent(daemon: LocalDaemon) -> None:
    """The launching side validates; nothing reaches the store."""
    with pytest.raises(errors.InvalidInputError) as caught:
        await daemon.controller.launch(workflows.Add, {"a": "one", "c": 3})
    assert set(caught.value.problems) == {"inputs.a", "inputs.c"}
    assert await daemon.controller.find() == []


async def test_a_class_that_no_worker_can_import_is_refused(daemon: LocalDaemon) -> None:
    """A class inside of a function has no name that a worker could import."""

    class Hidden(Process):
        async def run(self) -> None: ...

    with pytest.raises(errors.ProcessClassNotFoundError, match="top level of its module"):
        await daemon.controller.launch(Hidden)


async def test_launching_a_pid_again_continues_what_is_there(daemon: LocalDaemon) -> None:
    """G6: the same pid is the same process, also after its end."""
    first = await daemon.controller.launch(workflows.Add, {"a": 1}, pid="mine")
    assert (await first.result()).outputs.sum == 2
    again = await daemon.controller.launch(workflows.Add, {"a": 5}, pid="mine")
    assert (await again.result()).outputs.sum == 2
    assert len(await daemon.controller.find()) == 1


async def test_all_processes_are_found_or_as_many_as_are_asked_for() -> None:
    """More than one answer of the store holds; the newest first, each once."""
    async with LocalDaemon(workers=0) as daemon:
        handles = await daemon.controller.launch_many([(workflows.Add, {"a": 1})] * (QUERY_LIMIT + 1), tags=["many"])
        newest_first = [handle.pid for handle in reversed(handles)]
        assert [row.pid for row in await daemon.controller.find()] == newest_first
        assert [row.pid for row in await daemon.controller.find(Query(tag="many"))] == newest_first
        assert [row.pid for row in await daemon.controller.find(Query(limit=3))] == newest_first[:3]


async def test_a_process_is_launched_as_its_options_say(daemon: LocalDaemon) -> None:
    """The store has them; a worker that does not take the queue leaves it alone."""
    handle = await daemon.controller.launch(
        workflows.Add, {"a": 1}, queue="nobody", priority=7, key="mine", tags=["demo"], on_exception="pause"
    )
    row = await handle.record()
    assert (row.queue, row.priority, row.resources, row.key, row.tags) == ("nobody", 7, {}, "mine", ("demo",))
    assert (row.state, row.depth) == ("created", 0)


async def test_launching_a_key_again_leads_to_the_process_that_has_it(daemon: LocalDaemon) -> None:
    """Also after its end, with other inputs and another pid; until it is deleted."""
    first = await daemon.controller.launch(workflows.Add, {"a": 1}, key="Cu")
    assert (await first.result()).outputs.sum == 2
    again = await daemon.controller.launch(workflows.Add, {"a": 5}, key="Cu", pid="other")
    assert again.pid == first.pid
    other = await daemon.controller.launch(workflows.Add, {"a": 5}, key="Al")
    assert (await other.result()).outputs.sum == 6
    await first.delete()
    anew = await daemon.controller.launch(workflows.Add, {"a": 5}, key="Cu")
    assert anew.pid != first.pid
    assert (await anew.result()).outputs.sum == 6


@pytest.mark.parametrize("options", [{"priority": 10}, {"queue": ""}, {"resources": {"x": 0}}, {"key": ""}])
async def test_options_that_can_not_be_meant_are_refused_before_anything_is_sent(
    daemon: LocalDaemon, options: dict[str, Any]
) -> None:
    """With what would be right."""
    with pytest.raises(ValueError, match="not"):
        await daemon.controller.launch(workflows.Add, {"a": 1}, **options)
    assert await daemon.controller.find() == []


async def test_tokens_that_nobody_has_are_refused(daemon: LocalDaemon) -> None:
    """The broker counts them, and knows which there are."""
    with pytest.raises(errors.UnknownResourceError, match="licence"):
        await daemon.controller.launch(workflows.Add, {"a": 1}, resources={"licence": 1})


async def test_many_are_launched_at_once(daemon: LocalDaemon) -> None:
    """In the order of the jobs, with options for all and for each; said again, nothing is new."""
    jobs: list[Any] = [(workflows.Add, {"a": n}, {"key": f"job-{n}"}) for n in range(450)]
    handles = await daemon.controller.launch_many(jobs, tags=["many"], priority=2)
    results = await asyncio.gather(*(handle.result() for handle in handles))
    assert [result.outputs.sum for result in results] == list(range(1, 451))
    again = await daemon.controller.launch_many(jobs)
    assert [handle.pid for handle in again] == [handle.pid for handle in handles]
    row = await handles[7].record()
    assert (row.tags, row.priority, row.key) == (("many",), 2, "job-7")
    by_name = await daemon.controller.launch_many([("tests.runtime.workflows:Add", {"a": 1})])
    assert (await by_name[0].result()).outputs.sum == 2
    assert await daemon.controller.launch_many([]) == []


async def test_of_many_none_is_launched_if_one_is_wrong(daemon: LocalDaemon) -> None:
    """All are checked before anything is sent, and the error says which one it is."""
    jobs: list[Any] = [(workflows.Add, {"a": n if n != 300 else "x"}) for n in range(400)]
    with pytest.raises(errors.InvalidInputError) as caught:
        await daemon.controller.launch_many(jobs)
    assert caught.value.__notes__ == ["(job number 300)"]
    with pytest.raises(ValueError, match="one by one"):
        await daemon.controller.launch_many([(workflows.Add, {"a": 1}, {"parent": "p"})])
    assert await daemon.controller.find() == []


async def test_a_child_can_be_launched_from_outside(daemon: LocalDaemon) -> None:
    """It is killed with its parent, or is not, as was said."""
    parent = await daemon.controller.launch(workflows.Ask)
    await until(parent, lambda row: row.state == "waiting" and row.owner is None)
    kept = await daemon.controller.launch(workflows.Ask, parent=parent.pid, parent_close="abandon")
    lost = await daemon.controller.launch(workflows.Ask, parent=parent.pid)
    assert [child.pid for child in await parent.children()] == [kept.pid, lost.pid]
    assert (await lost.record()).depth == 1
    await parent.kill()
    with pytest.raises(errors.ProcessKilledError):
        await lost.result()
    await kept.resume(1)
    await kept.result()
    with pytest.raises(errors.InvalidStateError, match="to get a child"):
        await daemon.controller.launch(workflows.Ask, parent=parent.pid)
    with pytest.raises(ValueError, match="only the parent itself"):
        await daemon.controller.launch(workflows.Ask, parent="p", parent_close="wait")


async def test_an_ended_process_can_be_forgotten(daemon: LocalDaemon) -> None:
    """With all that belongs to it; a living one can't."""
    handle = await daemon.controller.launch(workflows.Ask)
    with pytest.raises(errors.InvalidStateError, match="finished, excepted or killed"):
        await handle.delete()
    await handle.kill()
    await handle.delete()
    with pytest.raises(errors.CheckpointNotFoundError):
        await handle.record()


async def test_a_fork_runs_as_the_process_did(daemon: LocalDaemon, tmp_path: Path) -> None:
    """With its priority and its queue, but a key is one process's."""
    inputs = {"file": str(tmp_path / "journal"), "steps": 3}
    handle = await daemon.controller.launch(workflows.Journal, inputs, priority=4, key="mine")
    await handle.result()
    forked = await handle.fork((await handle.steps())[-1].step)
    row = await forked.record()
    assert (row.priority, row.key) == (4, None)
    await forked.result()


async def test_a_failed_step_is_an_excepted_process(daemon: LocalDaemon) -> None:
    """The failure comes back with type, message and traceback."""
    handle = await daemon.controller.launch(workflows.Boom)
    with pytest.raises(errors.ProcessExceptedError) as caught:
        await handle.result()
    failure = caught.value.failure
    assert (failure.type, failure.message) == ("ZeroDivisionError", "no good")
    assert "workflows.py" in failure.traceback


async def test_an_output_that_cant_be_saved_excepts_the_process_and_names_it(daemon: LocalDaemon) -> None:
    """The port is named; the last good checkpoint stays."""
    handle = await daemon.controller.launch(workflows.Unsavable)
    with pytest.raises(errors.ProcessExceptedError, match=r"outputs\.thing holds a value of type object"):
        await handle.result()
    history = await handle.history()
    assert history[-1].subject == "running.excepted"


async def test_retry_continues_an_excepted_process_from_its_failed_step(daemon: LocalDaemon, tmp_path: Path) -> None:
    """What made the step fail is mended, and the same process finishes."""
    file = tmp_path / "cure"
    handle = await daemon.controller.launch(workflows.Heal, {"file": str(file)})
    with pytest.raises(errors.ProcessExceptedError):
        await handle.result()
    file.touch()
    await handle.retry()
    assert (await handle.result()).outputs.healed is True


async def test_children_run_while_their_parent_is_parked(daemon: LocalDaemon) -> None:
    """Fan out, wait, gather: with results in the context."""
    handle = await daemon.controller.launch(workflows.Fan, {"count": 4})
    assert (await handle.result()).outputs.total == 10
    children = await daemon.controller.find(Query(parent=handle.pid))
    assert [child.state for child in children] == ["finished"] * 4


async def test_waiting_parents_hold_no_slot() -> None:
    """G11: twenty parents and one slot, and all complete."""
    async with LocalDaemon(slots=1) as daemon:
        handles = [await daemon.controller.launch(workflows.Fan) for _ in range(20)]
        results = await asyncio.gather(*(handle.result() for handle in handles))
    assert [result.outputs.total for result in results] == [6] * 20


async def test_a_process_waits_for_a_message_without_a_worker(daemon: LocalDaemon) -> None:
    """It is parked; the message wakes it up with its value."""
    handle = await daemon.controller.launch(workflows.Ask)
    parked = await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    assert parked.owner is None
    await handle.resume({"yes": 1})
    assert (await handle.result()).outputs.answer == {"yes": 1}


async def test_a_message_for_a_process_that_waits_for_none_is_an_error(daemon: LocalDaemon) -> None:
    """The state and what is needed are named."""
    handle = await daemon.controller.launch(workflows.Add, {"a": 1})
    await handle.result()
    with pytest.raises(errors.InvalidStateError, match="alive"):
        await handle.resume(1)


async def test_a_running_step_is_killed_at_its_await_and_may_clean_up(daemon: LocalDaemon, tmp_path: Path) -> None:
    """KILLED with its message; the step's finally was run."""
    handle, file = await begun(daemon.controller, tmp_path)
    await handle.kill("enough")
    assert (await handle.record()).state == "killed"
    with pytest.raises(errors.ProcessKilledError, match="enough"):
        await handle.result()
    assert file.read_text().splitlines()[-1] == "cleaned up"


async def test_killing_twice_is_killing_once(daemon: LocalDaemon, tmp_path: Path) -> None:
    """A killed process stays killed, and the second caller is answered too."""
    handle, _ = await begun(daemon.controller, tmp_path)
    await asyncio.gather(handle.kill("one"), handle.kill("two"))
    await handle.kill("three")
    outcome = await handle.outcome()
    assert outcome is not None
    assert outcome.state is ProcessState.KILLED


async def test_a_pause_takes_effect_when_the_step_ends_and_play_goes_on(daemon: LocalDaemon, tmp_path: Path) -> None:
    """Paused between two steps, held by nobody; played, it finishes, and no step was run twice."""
    file = tmp_path / "journal"
    handle = await daemon.controller.launch(workflows.Journal, {"file": str(file), "steps": 50, "pace_s": 0.002})
    await file_has(file, 1)
    await handle.pause("looking")
    record = await handle.record()
    assert (record.play, record.owner, record.state) == ("paused", None, "running")
    before = file.read_text()
    await handle.pause("again")
    assert file.read_text() == before
    await handle.play()
    assert (await handle.result()).outputs.written == 50
    lines = file.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 50


async def test_a_parked_process_is_paused_played_and_killed_without_a_holder(daemon: LocalDaemon) -> None:
    """G10: each is answered though nobody held the process."""
    handle = await daemon.controller.launch(workflows.Ask)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    await handle.pause()
    assert (await handle.record()).play == "paused"
    await handle.play()
    assert (await handle.record()).play == "playing"
    await handle.kill("over")
    assert (await handle.record()).state == "killed"


async def test_a_paused_process_that_is_resumed_continues_when_it_is_played(daemon: LocalDaemon) -> None:
    """The message is kept; the step waits for play."""
    handle = await daemon.controller.launch(workflows.Ask)
    await until(handle, lambda row: row.state == "waiting")
    await handle.pause()
    await handle.resume("late")
    assert (await handle.record()).state == "running"
    await handle.play()
    assert (await handle.result()).outputs.answer == "late"


async def test_control_reaches_a_process_though_every_slot_is_taken(tmp_path: Path) -> None:
    """A queued process can be killed before it ever ran."""
    async with LocalDaemon(slots=1) as daemon:
        first, _ = await begun(daemon.controller, tmp_path)
        second = await daemon.controller.launch(workflows.Add, {"a": 1})
        await second.kill("not needed")
        assert (await second.record()).state == "killed"
        await first.kill()


async def test_killing_a_parent_kills_its_children(daemon: LocalDaemon, tmp_path: Path) -> None:
    """A parked parent is killed, and its running child with it."""
    file = tmp_path / "begun"
    handle = await daemon.controller.launch(workflows.Nest, {"begun": str(file)})
    await file_has(file, 1)
    await handle.kill("all of it")
    [child] = await daemon.controller.find(Query(parent=handle.pid))
    with pytest.raises(errors.ProcessKilledError, match="its parent"):
        await daemon.controller.handle(child.pid).result()


async def test_an_ended_process_refuses_control(daemon: LocalDaemon) -> None:
    """pause, play and kill of a finished process: InvalidStateError, and nothing changes."""
    handle = await daemon.controller.launch(workflows.Add, {"a": 1})
    await handle.result()
    for call in (handle.pause, handle.play, handle.kill, handle.retry):
        with pytest.raises(errors.InvalidStateError):
            await call()
    assert (await handle.record()).state == "finished"


async def test_an_unknown_pid_is_named(daemon: LocalDaemon) -> None:
    """Every question about a process that does not exist says so."""
    handle = daemon.controller.handle("nobody")
    for call in (handle.record, handle.result, handle.pause, handle.history):
        with pytest.raises(errors.CheckpointNotFoundError, match="nobody"):
            await call()


async def test_pause_all_play_all_kill_all(daemon: LocalDaemon) -> None:
    """They tell every process that has not ended."""
    handles = [await daemon.controller.launch(workflows.Ask) for _ in range(5)]
    pids = {handle.pid for handle in handles}
    assert set(await daemon.controller.pause_all()) == pids
    assert {row.play for row in await daemon.controller.find()} == {"paused"}
    assert set(await daemon.controller.play_all()) == pids
    assert set(await daemon.controller.kill_all("bye")) == pids
    assert {row.state for row in await daemon.controller.find()} == {"killed"}


async def begun(controller: ProcessController, folder: Path) -> tuple[ProcessHandle, Path]:
    """An endless process that is in its step."""
    file = folder / "begun"
    handle = await controller.launch(workflows.Endless, {"begun": str(file)})
    await file_has(file, 1)
    return handle, file
