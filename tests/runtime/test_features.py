"""What steps can wait for, retry, say and be asked: over the real broker, store and workers without a network."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from prunus import Process, errors
from prunus.persistence.persister import Query
from prunus.processes import Outcomes, Transition
from prunus.runtime import runner
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import features
from tests.runtime.waiting import file_has, until


async def test_a_step_is_tried_again_and_its_attempts_are_in_the_history(daemon: LocalDaemon) -> None:
    """Between two attempts the process is parked; the idempotency key is the same in each."""
    features.Flaky.keys.clear()
    handle = await daemon.controller.launch(features.Flaky, {"failures": 2})
    result = await handle.result()
    assert features.Flaky.keys == [result.value] * 3
    history = await handle.history()
    assert [event.subject for event in history if event.subject != "claimed"] == [
        "created.running",
        "running.waiting",
        "waiting.running",
        "running.waiting",
        "waiting.running",
        "running.finished",
    ]
    assert [event.note for event in history if event.subject == "running.waiting"] == [
        "attempt 1 of 3 failed (ConnectionError: no answer to call 1); again in 0.01 s",
        "attempt 2 of 3 failed (ConnectionError: no answer to call 2); again in 0.02 s",
    ]


async def test_retries_that_are_exhausted_are_a_failure(daemon: LocalDaemon) -> None:
    """The failure is that of the last attempt, and the log has them all."""
    features.Flaky.keys.clear()
    handle = await daemon.controller.launch(features.Flaky, {"failures": 9})
    with pytest.raises(errors.ProcessExceptedError, match="no answer to call 3"):
        await handle.result()
    assert [line.level for line in await handle.log()] == ["ERROR"] * 3


async def test_a_sleeping_process_is_parked_and_wakes_by_itself(daemon: LocalDaemon) -> None:
    """It is a row with a time; nobody holds it."""
    handle = await daemon.controller.launch(features.Nap, {"seconds": 0.05})
    record = await until(handle, lambda row: row.state == "waiting")
    assert record.wake_at is not None
    assert (await handle.result()).value == "awake"


async def test_a_message_can_come_before_it_is_waited_for(daemon: LocalDaemon) -> None:
    """It is kept; one that is not declared, or does not fit, is refused where it is sent."""
    handle = await daemon.controller.launch(features.Review, paused=True)
    await handle.send("approve", True)
    with pytest.raises(errors.InvalidInputError, match="did you mean 'approve'"):
        await handle.send("aprove", True)
    with pytest.raises(errors.InvalidInputError, match=r"messages\.approve"):
        await handle.send("approve", "yes")
    assert (await handle.record()).mail == 1
    await handle.play()
    assert (await handle.result()).value == "approved"
    with pytest.raises(errors.InvalidStateError):
        await handle.send("approve", True)


async def test_messages_of_one_sender_keep_their_order(daemon: LocalDaemon) -> None:
    """Each is taken once, one at a time."""
    handle = await daemon.controller.launch(features.Letters, {"count": 10})
    for letter in "abcdefghij":
        await handle.send("comment", letter)
    assert (await handle.result()).value == "abcdefghij"


async def test_queries_are_answered_while_parked_paused_and_in_a_step(daemon: LocalDaemon, tmp_path: Path) -> None:
    """From the checkpoint, or from the living object."""
    handle = await daemon.controller.launch(features.Review)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    assert await handle.query("limit_plus", 4) == 7
    await handle.pause()
    assert await handle.query("limit_plus", more=1) == 4
    with pytest.raises(errors.InvalidInputError, match="more"):
        await handle.query("limit_plus", "many")
    running = await daemon.controller.launch(features.Gated, {"file": str(tmp_path / "go")})
    await until(running, lambda row: row.owner is not None and row.state == "running")
    assert await running.query("where") == "run"
    (tmp_path / "go").touch()
    await running.result()
    assert await running.query("where") is None


async def test_an_update_is_durable_when_it_is_answered(daemon: LocalDaemon) -> None:
    """Its value, or its error, comes back; a failed one changes nothing."""
    handle = await daemon.controller.launch(features.Review)
    await until(handle, lambda row: row.state == "waiting")
    assert await handle.update("set_limit", 8) == 3
    with pytest.raises(errors.RemoteError, match="not negative"):
        await handle.update("set_limit", limit=-1)
    with pytest.raises(errors.InvalidInputError, match="limit"):
        await handle.update("set_limit", "many")
    assert await handle.query("limit_plus") == 8
    assert "updated" in [event.subject for event in await handle.history()]


async def test_what_a_running_step_says_is_seen_while_it_runs(daemon: LocalDaemon, tmp_path: Path) -> None:
    """Its log and its progress."""
    handle = await daemon.controller.launch(features.Gated, {"file": str(tmp_path / "go")})
    record = await until(handle, lambda row: row.progress is not None)
    assert (record.progress, record.detail, record.state) == (0.5, "half of it", "running")
    assert [(line.level, line.text, line.step) for line in await handle.log()] == [
        ("REPORT", "waiting for the file", "run")
    ]
    (tmp_path / "go").touch()
    await handle.result()
    assert (await handle.record()).progress is None


async def test_a_pause_can_be_answered_at_once(daemon: LocalDaemon, tmp_path: Path) -> None:
    """Without waiting for the step it is PAUSING; and the pause survives the death of its worker."""
    handle = await daemon.controller.launch(features.Gated, {"file": str(tmp_path / "go")})
    await until(handle, lambda row: row.owner is not None and row.state == "running")
    await handle.pause("in a while", quiesced=False)
    assert (await handle.record()).play == "pausing"
    await daemon.kill_worker("worker-1")
    await daemon.start_worker("worker-2")
    record = await until(handle, lambda row: row.play == "paused" and row.owner is None)
    assert record.status == "in a while"
    (tmp_path / "go").touch()
    await handle.play()
    assert (await handle.result()).value == "done"


async def test_a_breakpoint_stops_before_its_step_once(daemon: LocalDaemon) -> None:
    """At launch, and at a play."""
    handle = await daemon.controller.launch(features.Chain, pause_at="second")
    record = await until(handle, lambda row: row.play == "paused")
    assert (record.step, record.status) == ("second", "breakpoint before the step second")
    await handle.play(pause_at="third")
    await until(handle, lambda row: row.play == "paused" and row.step == "third")
    await handle.play()
    assert (await handle.result()).value == "abc"


async def test_the_context_is_edited_while_it_is_paused(daemon: LocalDaemon) -> None:
    """The history says so."""
    handle = await daemon.controller.launch(features.Chain, pause_at="third")
    await until(handle, lambda row: row.play == "paused")
    await handle.edit_context(text="xyz")
    await handle.play()
    assert (await handle.result()).value == "xyzc"
    assert [event.note for event in await handle.history() if event.subject == "context_edited"] == ["text"]


async def test_a_failed_process_goes_on_from_the_step_that_failed(daemon: LocalDaemon) -> None:
    """`retry` has the context from before it; `fork` makes another one from any step."""
    handle = await daemon.controller.launch(features.Chain, {"bad": True})
    with pytest.raises(errors.ProcessExceptedError, match="not mended"):
        await handle.result()
    assert [past.step for past in await handle.steps()] == ["first", "second"]
    other = await handle.fork("second", mended=True)
    assert (await other.result()).value == "abc"
    with pytest.raises(errors.InvalidStateError, match="on record: first, second"):
        await handle.fork("third")
    await handle.retry()
    with pytest.raises(errors.ProcessExceptedError, match="not mended"):
        await handle.result()


async def test_on_exception_pause_parks_it_intact(daemon: LocalDaemon, tmp_path: Path) -> None:
    """The step runs again when it is played."""
    handle = await daemon.controller.launch(features.Careful, {"file": str(tmp_path / "it")})
    record = await until(handle, lambda row: row.play == "paused")
    assert record.state == "running"
    assert record.status == "the step run failed: FileNotFoundError: it is not there yet"
    (tmp_path / "it").touch()
    await handle.play()
    assert (await handle.result()).value == "found"


async def test_a_fan_out_has_its_results_in_order(daemon: LocalDaemon) -> None:
    """At most so many at a time; the checkpoint does not grow."""
    handle = await daemon.controller.launch(features.SumOfSquares, {"count": 30})
    assert (await handle.result()).value == sum(x * x for x in range(30))
    assert len(await daemon.controller.find(Query(parent=handle.pid, limit=100))) == 30


async def test_several_waits_with_steps_of_their_own(daemon: LocalDaemon) -> None:
    """Each result is applied once, one at a time."""
    handle = await daemon.controller.launch(features.AsTheyCome)
    await handle.result()
    status = (await handle.record()).status or ""
    assert sorted(filter(None, status.split(","))) == ["0", "1", "4", "9", "zzz"]


async def test_an_effect_is_not_repeated_when_its_worker_dies(daemon: LocalDaemon, tmp_path: Path) -> None:
    """Without a way to find out it pauses and says so; a person settles it."""
    file = tmp_path / "charges"
    handle = await daemon.controller.launch(features.Charge, {"file": str(file)})
    await file_has(file, 1)
    await daemon.kill_worker("worker-1")
    await daemon.start_worker("worker-2")
    record = await until(handle, lambda row: row.play == "paused")
    assert "the step run began and nobody saw it end" in (record.status or "")
    await handle.settle("charged once")
    assert (await handle.result()).value == "charged once"
    assert len(file.read_text().splitlines()) == 1


async def test_a_reconciled_effect_is_found(daemon: LocalDaemon, tmp_path: Path) -> None:
    """The process goes on with what was found."""
    file = tmp_path / "charges"
    handle = await daemon.controller.launch(features.ChargeAndLook, {"file": str(file)})
    await file_has(file, 1)
    await daemon.kill_worker("worker-1")
    await daemon.start_worker("worker-2")
    assert (await handle.result()).value == "found"
    assert len(file.read_text().splitlines()) == 1


async def test_a_kill_takes_the_children_along_that_want_it(daemon: LocalDaemon, tmp_path: Path) -> None:
    """kill: with it; abandon and wait: they go on."""
    go = tmp_path / "go"
    handle = await daemon.controller.launch(features.Parent, {"file": str(go)}, pid="p")
    await until(handle, lambda row: row.state == "waiting")
    await handle.kill("enough")
    await until(daemon.controller.handle("p-kill"), lambda row: row.state == "killed")
    go.touch()
    for policy in ("abandon", "wait"):
        assert (await daemon.controller.handle(f"p-{policy}").result()).value == "done"


async def test_a_parent_does_not_end_before_children_that_it_waits_for(daemon: LocalDaemon, tmp_path: Path) -> None:
    """parent_close="wait"."""
    go = tmp_path / "go"
    handle = await daemon.controller.launch(features.Parent, {"file": str(go), "end": True}, pid="p")
    record = await until(handle, lambda row: row.state == "waiting")
    assert record.waits == ("p-wait",)
    go.touch()
    assert (await handle.result()).successful


async def test_a_pause_cascades_and_waits_for_quiet(daemon: LocalDaemon, tmp_path: Path) -> None:
    """When it returns no step of the tree runs; a play cascades too."""
    go = tmp_path / "go"
    handle = await daemon.controller.launch(features.Parent, {"file": str(go)}, pid="p")
    await until(handle, lambda row: row.state == "waiting")
    for policy in ("kill", "abandon", "wait"):
        await until(daemon.controller.handle(f"p-{policy}"), lambda row: row.owner is not None)
    pausing = asyncio.create_task(handle.pause("all of you", cascade=True))
    await until(daemon.controller.handle("p-kill"), lambda row: row.play == "pausing")
    assert not pausing.done()
    go.touch()
    await pausing
    rows = await daemon.controller.find(Query(parent="p"))
    assert all(row.is_terminal or row.play == "paused" for row in rows)
    await handle.play(cascade=True)
    assert (await handle.record()).play == "playing"
    await handle.kill()


# --- what chance found, one by one --------------------------------------------------------------------


async def test_a_question_whose_answer_died_with_its_worker_is_asked_again(daemon: LocalDaemon, tmp_path: Path) -> None:
    """The worker was asked and is gone; the next one, or the checkpoint, answers."""
    handle = await daemon.controller.launch(features.Asked, {"file": str(tmp_path / "go")})
    await until(handle, lambda row: row.owner is not None and row.state == "running")
    deaths = [lambda: daemon.broker.kill(daemon._workers["worker-1"][1])]
    features.Asked.hook = staticmethod(lambda: deaths.pop()() if deaths else None)
    assert await handle.query("much") == "an answer"
    await daemon.kill_worker("worker-1")


async def test_a_play_behind_an_edit_is_not_lost_when_its_worker_leaves(tmp_path: Path) -> None:
    """Both wait for the end of the step, which is cut off; the history tells what everybody saw."""
    async with LocalDaemon(grace_s=0.0) as daemon:
        handle = await daemon.controller.launch(features.Gated, {"file": str(tmp_path / "go")})
        await until(handle, lambda row: row.owner is not None and row.state == "running")
        await handle.pause("a while", quiesced=False)
        edit = asyncio.create_task(handle.edit_context(text="x"))
        await until(handle, lambda row: row.inbox_last == 2)
        play = asyncio.create_task(handle.play())
        await until(handle, lambda row: row.inbox_last == 3)
        assert await handle.query("where") == "run"  # by now the worker has read both
        await daemon.stop_worker("worker-1")
        await daemon.start_worker("worker-2")
        await play
        with pytest.raises(errors.InvalidStateError, match="WorkChain"):
            await edit
        (tmp_path / "go").touch()
        await handle.result()
        plays = [event.subject for event in await handle.history() if "paus" in event.subject]
    assert plays in (
        ["playing.pausing", "pausing.playing"],
        ["playing.pausing", "pausing.paused", "paused.playing"],
    )


async def test_a_timer_that_ends_while_it_is_looked_at_is_not_lost(
    daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not over when the runner looked, and was when the runner wrote down what wakes the process."""
    looked, settle = asyncio.Event(), Process.settle

    def look(process: Process, outcomes: Outcomes) -> tuple[Transition, ...]:
        looked.set()
        return settle(process, outcomes)

    monkeypatch.setattr(Process, "settle", look)
    monkeypatch.setattr(runner, "time", SimpleNamespace(time=lambda: time.time() + 3600 * looked.is_set()))
    handle = await daemon.controller.launch(features.Nap, {"seconds": 1800.0})
    record = await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    assert record.wake_at is not None
    await handle.kill()


async def test_the_clock_of_the_broker_may_be_ahead(tmp_path: Path) -> None:
    """What it wakes goes on, though by the clock of the worker it is not time yet."""
    ahead_s = 0.0
    async with LocalDaemon(clock=lambda: time.time() + ahead_s) as daemon:
        handle = await daemon.controller.launch(features.Nap, {"seconds": 3600.0})
        await until(handle, lambda row: row.state == "waiting" and row.owner is None)
        ahead_s = 3601.0
        daemon.broker.tick()
        assert (await handle.result()).value == "awake"
        assert [event.subject for event in await handle.history()].count("claimed") == 2


async def test_a_wait_for_nobody_is_a_failure(daemon: LocalDaemon) -> None:
    """The history goes from what everybody saw, and what it said is in its log."""
    handle = await daemon.controller.launch(features.WaitsForNobody)
    with pytest.raises(errors.ProcessExceptedError, match="not for nobody"):
        await handle.result()
    assert [event.subject for event in await handle.history()][1:] == ["created.running", "running.excepted"]
    assert "about to wait" in [line.text for line in await handle.log()]


async def test_what_can_t_be_saved_ends_a_pause_too(daemon: LocalDaemon, tmp_path: Path) -> None:
    """It was PAUSING; when it excepts it is PLAYING, and the history has both."""
    handle = await daemon.controller.launch(features.Spoiled, {"file": str(tmp_path / "go")})
    await until(handle, lambda row: row.owner is not None and row.state == "running")
    await handle.pause(quiesced=False)
    (tmp_path / "go").touch()
    with pytest.raises(errors.ProcessExceptedError, match="thing"):
        await handle.result()
    assert [event.subject for event in await handle.history()][2:] == [
        "playing.pausing",
        "running.excepted",
        "pausing.playing",
    ]


async def test_a_fork_before_an_effect_has_not_begun_it(daemon: LocalDaemon, tmp_path: Path) -> None:
    """The intent is that of the other process; this one asks nobody, and has an effect of its own."""
    file = tmp_path / "charges"
    handle = await daemon.controller.launch(features.Charge, {"file": str(file), "hang": False})
    await handle.result()
    forked = await handle.fork("run")
    assert (await forked.result()).value == "charged"
    assert file.read_text().split() == [f"{handle.pid}:1", f"{forked.pid}:1"]


async def test_one_message_is_not_used_twice_in_one_wait(daemon: LocalDaemon) -> None:
    """A wait that names it twice is refused, with what to do."""
    handle = await daemon.controller.launch(features.Twice)
    with pytest.raises(errors.ProcessExceptedError, match="waits for the message 'note' more than once in one wait"):
        await handle.result()
