"""One attempt at a step: steps that are killed, cancelled, too slow, silent, deaf, or blocked in a thread."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from typing import Any

import pytest

from prunus.errors import InvalidStateError
from prunus.processes import (
    Continue,
    KillMessage,
    Outcomes,
    Pause,
    Play,
    Process,
    ProcessSpec,
    ProcessState,
    RetryPolicy,
    Transition,
    Update,
    WorkChain,
    WorkChainSpec,
    attempts,
    if_,
    step,
    update,
)
from prunus.processes.control import DEFAULT_GRACE_S, KillLevel
from prunus.processes.listeners import ProcessListener
from prunus.processes.states import PlayState

SOON_S = 0.01
"""A time limit that a step in a test is to miss."""
PROMPT_S = 0.05
"""A forced kill takes no longer."""


class Base(Process):
    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.output("x", valid_type=int, required=False)


class Small(Process):
    async def run(self) -> None: ...


class Gated(Base):
    """A step that tells that it runs, and waits until it is let through."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.running, self.gate, self.cleaned = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.finish_cleaning = asyncio.Event()
        self.finish_cleaning.set()

    async def run(self) -> Any:
        self.running.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            await self.finish_cleaning.wait()
            self.cleaned.set()
            raise
        return Continue(self.run)


class Deaf(Gated):
    """Its step does not end when it is cancelled: only its gate ends it, and then it writes."""

    async def run(self) -> Any:
        self.out("x", 1)
        self.running.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            await self.gate.wait()
        self.set_status("late")
        self.out("x", 2)
        self.submit(Small)
        self.cleaned.set()
        return 5


class Threaded(Base):
    """A step in a thread that tells that it runs, and blocks until it is let through."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.running, self.gate, self.ended = threading.Event(), threading.Event(), threading.Event()

    def run(self) -> Any:
        self.running.set()
        try:
            self.gate.wait(10.0)
            self.out("x", 1)
            self.set_status("late")
        finally:
            self.ended.set()
        return 5


async def stepping(process: Gated | Threaded) -> asyncio.Task[tuple[Transition, ...]]:
    """The task of a step that runs."""
    if process.state is ProcessState.CREATED:
        await process.step()
    process.running.clear()
    task = asyncio.create_task(process.step())
    if isinstance(process, Threaded):
        await asyncio.to_thread(process.running.wait)
    else:
        await process.running.wait()
    return task


async def settled() -> None:
    """Every callback that is due has been called."""
    for _ in range(10):
        await asyncio.sleep(0)


def subjects(transitions: tuple[Transition, ...]) -> list[str]:
    return [transition.subject for transition in transitions]


@pytest.fixture
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is cancelled, but not killed, is given up soon."""
    monkeypatch.setattr(attempts, "CANCEL_GRACE_S", SOON_S)


KILLED = ["state_changed.running.killed"]


# --- kill -------------------------------------------------------------------------------------------


async def test_a_kill_cancels_the_step_and_lets_it_clean_up() -> None:
    """Only the step's task is cancelled; what calls `step` goes on. The history has the message."""
    process = Gated()
    process.finish_cleaning.clear()
    task = await stepping(process)
    assert process.receive(KillMessage("enough")) == ()
    await settled()
    assert not task.done()
    process.finish_cleaning.set()
    (change,) = await task
    assert (change.subject, change.note, change.step) == (*KILLED, "enough", "run")
    assert process.cleaned.is_set()
    assert process.result().exit_message == "enough"


def test_a_killed_step_may_clean_up_for_ten_seconds() -> None:
    """If the kill says nothing else."""
    assert KillMessage().grace_s == DEFAULT_GRACE_S == 10.0


@pytest.mark.parametrize("message", [KillMessage(force=True), KillMessage(grace_s=SOON_S)], ids=["force", "grace"])
async def test_a_step_that_does_not_end_is_abandoned(message: KillMessage, caplog: pytest.LogCaptureFixture) -> None:
    """`step` returns KILLED; the log says of which process, and what happens to the step."""
    process = Deaf()
    task = await stepping(process)
    process.receive(message)
    assert subjects(await task) == KILLED
    (warning,) = caplog.records
    assert "it is abandoned, and what it does from now on has no effect" in warning.message
    assert (warning.levelname, warning.__dict__["pid"]) == ("WARNING", process.pid)
    process.gate.set()
    await process.cleaned.wait()


async def test_a_forced_kill_waits_for_nothing() -> None:
    """A step that would need a minute to clean up does not hold the caller for 50 ms. (The best of five counts.)"""
    took_s = []
    for _ in range(5):
        process = Gated()
        process.finish_cleaning.clear()
        task = await stepping(process)
        begun_s = time.monotonic()
        process.receive(KillMessage(force=True))
        assert subjects(await task) == KILLED
        took_s.append(time.monotonic() - begun_s)
        process.finish_cleaning.set()
        await process.cleaned.wait()
        assert process.state is ProcessState.KILLED
    assert min(took_s) < PROMPT_S


async def test_a_forced_kill_of_a_step_that_listens_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """It ends at once, so nothing is abandoned."""
    process = Gated()
    task = await stepping(process)
    process.receive(KillMessage(force=True))
    assert subjects(await task) == KILLED
    assert process.cleaned.is_set()
    assert caplog.records == []


async def test_a_second_kill_may_force_the_first() -> None:
    """Somebody who has no patience left is obeyed; the first message stands."""
    process = Deaf()
    task = await stepping(process)
    process.receive(KillMessage("first"))
    process.receive(KillMessage("second", force=True))
    await task
    assert process.result().exit_message == "first"
    process.gate.set()
    await process.cleaned.wait()


async def test_killing_again_gives_the_step_no_more_time() -> None:
    """Somebody who asks again and again does not put off the end."""
    process = Deaf()
    task = await stepping(process)
    async with asyncio.timeout(5.0):
        while not task.done():
            process.receive(KillMessage(grace_s=SOON_S * 5))
            await asyncio.sleep(SOON_S)
    assert process.state is ProcessState.KILLED
    process.gate.set()
    await process.cleaned.wait()


async def test_what_an_abandoned_step_still_does_has_no_effect() -> None:
    """Outputs, status, children and the value of a killed process are what they were."""
    process = Deaf()
    task = await stepping(process)
    process.receive(KillMessage(force=True))
    await task
    process.take_effects()
    before = process.snapshot()
    process.gate.set()
    await process.cleaned.wait()
    await settled()
    assert process.snapshot() == before
    assert process.take_effects().children == ()
    assert (before["outputs"], process.status, process.state) == ({}, None, ProcessState.KILLED)


async def test_the_late_error_of_an_abandoned_step_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """With the pid, and it changes nothing."""

    class Fails(Deaf):
        async def run(self) -> Any:
            await super().run()
            raise ValueError("too late")

    process = Fails()
    task = await stepping(process)
    process.receive(KillMessage(force=True))
    await task
    process.gate.set()
    await process.cleaned.wait()
    await settled()
    assert f"a step of process {process.pid} that was abandoned has failed" in caplog.text
    assert "ValueError: too late" in caplog.text
    assert process.state is ProcessState.KILLED


@pytest.mark.parametrize("answer", ["value", "error"])
async def test_whatever_a_killed_step_makes_of_its_cancellation_it_is_killed(answer: str) -> None:
    """One that swallows it and returns, and one that raises something else; what it wrote is dropped."""

    class Stubborn(Gated):
        async def run(self) -> Any:
            self.out("x", 1)
            try:
                await super().run()
            except asyncio.CancelledError:
                if answer == "error":
                    raise ValueError("odd") from None
            return 5

    process = Stubborn()
    task = await stepping(process)
    process.receive(KillMessage("enough"))
    assert subjects(await task) == KILLED
    result = process.result()
    assert (result.exit_message, result.outputs, result.value, result.failure) == ("enough", {}, None, None)


@pytest.mark.parametrize("waits", [False, True])
async def test_a_step_may_kill_its_own_process(waits: bool) -> None:
    """In its first lines, before it has waited for anything; it is cancelled when it does."""
    after: list[str] = []

    class Suicidal(Base):
        async def run(self) -> None:
            self.receive(KillMessage("by myself"))
            if waits:
                await asyncio.Event().wait()
            after.append("the end")

    process = Suicidal()
    await process.step()
    assert subjects(await process.step()) == KILLED
    assert process.result().exit_message == "by myself"
    assert after == ([] if waits else ["the end"])


async def test_a_kill_before_the_step_has_begun_does_not_wait() -> None:
    """The task that is to take the step exists, but has not run: there is nothing to clean up."""
    process = Gated()
    await process.step()
    task = asyncio.create_task(process.step())
    process.receive(KillMessage())
    async with asyncio.timeout(5.0):
        with pytest.raises(InvalidStateError, match="KILLED"):
            await task
    assert process.state is ProcessState.KILLED


async def test_a_kill_reaches_a_predicate_that_waits() -> None:
    """It is user code like a step."""
    asked = asyncio.Event()

    class Chain(WorkChain):
        @classmethod
        def define(cls, spec: WorkChainSpec) -> None:
            super().define(spec)
            spec.outline(if_(cls.ready)(cls.work))

        async def ready(self) -> bool:
            asked.set()
            await asyncio.Event().wait()
            return True

        async def work(self) -> None: ...

    process = Chain()
    await process.step()
    task = asyncio.create_task(process.step())
    await asked.wait()
    process.receive(KillMessage("enough"))
    (change,) = await task
    assert (change.subject, change.step) == (*KILLED, "ready")


async def test_an_update_that_waits_for_a_step_that_is_killed_is_refused() -> None:
    """Its sender is told, once, that the process has ended."""

    class Counts(Gated):
        @update
        def add(self) -> int:
            return 1

    process = Counts()
    task = await stepping(process)
    process.receive(Update("add"), token=7)
    assert process.has_deferred
    process.receive(KillMessage())
    await task
    (reply,) = process.take_effects().replies
    assert reply.token == 7
    assert reply.failure is not None
    assert "the process is KILLED; it has to be alive" in str(reply.failure)


# --- threads ----------------------------------------------------------------------------------------


async def test_a_killed_plain_step_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """A thread can't be stopped: the process is KILLED at once, what the step does and returns counts for nothing."""
    process = Threaded()
    task = await stepping(process)
    process.receive(KillMessage())
    assert subjects(await task) == KILLED
    (warning,) = caplog.records
    assert "a plain step can't be interrupted: it goes on in its thread" in warning.message
    assert (warning.__dict__["pid"], warning.__dict__["step"]) == (process.pid, "run")
    before = process.snapshot()
    process.gate.set()
    await asyncio.to_thread(process.ended.wait)
    await settled()
    assert process.snapshot() == before
    assert process.result().outputs == {}


async def test_a_plain_step_that_takes_too_long_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    """Its thread goes on, and what it returns is dropped."""

    class Slow(Threaded):
        @step(timeout=SOON_S)
        def run(self) -> Any:
            return super().run()

    process = Slow()
    task = await stepping(process)
    assert subjects(await task) == ["state_changed.running.excepted"]
    assert "the step run was cancelled: it did not end within 0.01 s" in str(process.result().failure)
    assert "can't be interrupted" in caplog.records[0].message
    process.gate.set()
    await asyncio.to_thread(process.ended.wait)
    assert process.result().outputs == {}


@pytest.mark.parametrize(
    ("where", "thread", "is_own"),
    [("thread", None, True), ("thread", False, False), ("loop", None, False), ("loop", True, True)],
)
async def test_where_a_plain_step_runs_is_said_by_the_step_or_else_by_its_class(
    where: Any, thread: bool | None, is_own: bool
) -> None:
    """In a thread of its own, or on the loop."""
    seen: list[threading.Thread] = []

    class Plain(Process):
        run_sync_steps_in = where

        @step(thread=thread)
        def run(self) -> None:
            seen.append(threading.current_thread())

    process = Plain()
    await process.step()
    await process.step()
    assert (seen[0] is not threading.current_thread()) == is_own


async def test_what_a_thread_raises_is_the_error_of_the_step() -> None:
    """Also what would end the thread."""

    class Exits(Process):
        def run(self) -> None:
            raise SystemExit(3)

    process = Exits()
    await process.step()
    await process.step()
    failure = process.result().failure
    assert failure is not None
    assert (failure.type, failure.message) == ("SystemExit", "3")


@pytest.mark.parametrize("in_thread", [True, False])
async def test_a_keyboard_interrupt_of_a_step_is_its_error(in_thread: bool) -> None:
    """Where the loop handles SIGINT, as in a worker: nobody has pressed a key."""

    class Interrupts(Process):
        run_sync_steps_in = "thread" if in_thread else "loop"

        def run(self) -> None:
            raise KeyboardInterrupt

    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGINT)
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    try:
        process = Interrupts()
        await process.step()
        await process.step()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
    failure = process.result().failure
    assert failure is not None
    assert failure.type == "KeyboardInterrupt"


async def raises_at_once(self: Process) -> None:
    raise GeneratorExit("no more")


async def raises_later(self: Process) -> None:
    await asyncio.sleep(0)
    raise GeneratorExit("no more")


def raises_plainly(self: Process) -> None:
    raise GeneratorExit("no more")


@pytest.mark.parametrize("run", [raises_at_once, raises_later, raises_plainly])
@pytest.mark.parametrize("plain_steps", ["thread", "loop"])
async def test_a_generator_exit_of_a_step_is_its_error(run: Any, plain_steps: str) -> None:
    """Nobody has closed the step: it is raised like any other, and ends the attempt."""
    raising = type("Raising", (Process,), {"run": run, "run_sync_steps_in": plain_steps})
    process = raising()
    await process.step()
    await process.step()
    failure = process.result().failure
    assert failure is not None
    assert (failure.type, failure.message) == ("GeneratorExit", "no more")


async def test_a_process_that_a_killed_thread_has_called_is_killed() -> None:
    """The thread is not left to wait for ever."""
    called: list[Process] = []
    running, told = asyncio.Event(), threading.Event()

    class Inner(Process):
        async def run(self) -> None:
            called.append(self)
            running.set()
            await asyncio.Event().wait()

    class Outer(Process):
        def run(self) -> None:
            try:
                self.call(Inner).result()
            finally:
                told.set()

    process = Outer()
    await process.step()
    task = asyncio.create_task(process.step())
    await running.wait()
    process.receive(KillMessage())
    assert subjects(await task) == KILLED
    await asyncio.to_thread(told.wait)
    await settled()
    assert [inner.state for inner in called] == [ProcessState.KILLED]


# --- too slow, too silent -----------------------------------------------------------------------------


async def test_a_step_that_takes_too_long_has_failed() -> None:
    """It is cancelled and may clean up; the error names the step and its time."""

    class Slow(Gated):
        @step(timeout=SOON_S)
        async def run(self) -> Any:
            return await super().run()

    process = Slow()
    task = await stepping(process)
    (change,) = await task
    assert change.subject == "state_changed.running.excepted"
    assert change.note == "StepTimeoutError: the step run was cancelled: it did not end within 0.01 s"
    assert process.cleaned.is_set()


async def test_a_step_in_time_is_not_disturbed() -> None:
    """Its timer goes with it."""

    class Quick(Gated):
        @step(timeout=60.0, heartbeat_timeout=60.0)
        async def run(self) -> Any:
            return await super().run()

    process = Quick()
    task = await stepping(process)
    process.gate.set()
    assert subjects(await task) == ["state_changed.running.running"]


async def test_a_step_that_falls_silent_has_failed() -> None:
    """The time counts from its last heartbeat, not from its beginning."""
    beats = 5
    silence_s = 0.1

    class Silent(Gated):
        @step(heartbeat_timeout=silence_s)
        async def run(self) -> Any:
            for _ in range(beats):
                self.heartbeat()
                await asyncio.sleep(silence_s / 2)
            await super().run()

    process = Silent()
    begun_s = time.monotonic()
    task = await stepping(process)
    await task
    assert time.monotonic() - begun_s >= silence_s * beats / 2 + silence_s / 2
    assert "the step run was cancelled: it gave no heartbeat within 0.1 s" in str(process.result().failure)


async def test_a_thread_may_beat() -> None:
    """A plain step that says that it lives is not given up."""
    silence_s = 0.2

    class Works(Process):
        @step(heartbeat_timeout=silence_s)
        def run(self) -> str:
            end_s = time.monotonic() + 2 * silence_s
            while time.monotonic() < end_s:
                self.heartbeat()
                time.sleep(silence_s / 20)
            return "done"

    process = Works()
    await process.step()
    await process.step()
    assert process.result().value == "done"


@pytest.mark.usefixtures("_short_grace")
async def test_a_deaf_step_that_takes_too_long_is_abandoned(caplog: pytest.LogCaptureFixture) -> None:
    """Its failure is the timeout; of what it does later nothing is left, of what it had emitted the result tells."""

    class Slow(Deaf):
        @step(timeout=SOON_S)
        async def run(self) -> Any:
            return await super().run()

    process = Slow()
    task = await stepping(process)
    assert subjects(await task) == ["state_changed.running.excepted"]
    assert "StepTimeoutError" in str(process.result().failure)
    assert "abandoned" in caplog.records[0].message
    process.gate.set()
    await process.cleaned.wait()
    await settled()
    assert (process.status, process.result().outputs, process.take_effects().children) == (None, {"x": 1}, ())


async def test_a_kill_beats_a_timeout() -> None:
    """A step that is too slow, and is killed while it cleans up, was killed."""

    class Slow(Gated):
        @step(timeout=SOON_S)
        async def run(self) -> Any:
            try:
                await asyncio.Event().wait()
            finally:
                self.running.set()
                await self.finish_cleaning.wait()

    process = Slow()
    process.finish_cleaning.clear()
    task = await stepping(process)
    process.receive(KillMessage("enough"))
    process.finish_cleaning.set()
    assert subjects(await task) == KILLED
    assert process.result().failure is None


async def test_a_step_that_takes_too_long_is_tried_again_if_its_class_says_so() -> None:
    """The timeout is an error like others: the process is parked, and the history has the attempt."""

    class Slow(Base):
        @step(timeout=SOON_S, retry=RetryPolicy(max_attempts=2, initial_interval_s=60.0, jitter=0.0))
        async def run(self) -> None:
            self.out("x", 1)
            await asyncio.Event().wait()

    process = Slow()
    await process.step()
    key = process.idempotency_key
    (change,) = await process.step()
    assert change.subject == "state_changed.running.waiting"
    assert change.note == (
        "attempt 1 of 2 failed (StepTimeoutError: the step run was cancelled: it did not end within 0.01 s); "
        "again in 60 s"
    )
    process = Slow.restore(process.snapshot())
    at_s = process.wakes(0.0).at_s
    assert at_s is not None
    assert process.settle(Outcomes(at_s - 1.0)) == ()
    assert subjects(process.settle(Outcomes(at_s))) == ["state_changed.waiting.running"]
    assert (process.idempotency_key, process.outputs) == (key, {})
    (change,) = await process.step()
    assert change.subject == "state_changed.running.excepted"
    assert change.note is not None
    assert change.note.startswith("attempt 2 failed as well: StepTimeoutError")


async def test_a_step_that_fails_may_leave_its_process_paused_and_intact() -> None:
    """`on_exception = "pause"`: it stands before that step, with the reason, and a play takes the step again."""

    class Slow(Gated):
        on_exception = "pause"

        @step(timeout=SOON_S)
        async def run(self) -> Any:
            self.out("x", 1)
            return await super().run()

    process = Slow()
    task = await stepping(process)
    before = process.snapshot()
    assert subjects(await task) == ["failed", "play_changed.playing.paused"]
    assert process.status == (
        "the step run failed: StepTimeoutError: the step run was cancelled: it did not end within 0.01 s"
    )
    after = process.snapshot()
    assert {**after, "control": None} == {**before, "control": None}
    process.receive(Play())
    process.gate.set()
    assert subjects(await process.step()) == ["state_changed.running.running"]


# --- what a step says of itself -----------------------------------------------------------------------


async def test_a_heartbeat_tells_how_far_the_step_is() -> None:
    """Whoever listens is told of each change; when the step has ended nothing is left of it."""
    told: list[tuple[float | None, str | None]] = []

    class Hears(ProcessListener):
        def on_progress(self, process: Process, progress: float | None, detail: str | None) -> None:
            told.append((progress, detail))

    class Works(Gated):
        async def run(self) -> Any:
            self.heartbeat(0.4, "mixing")
            self.heartbeat(0.4, "mixing")
            self.heartbeat()
            return await super().run()

    process = Works()
    process.add_listener(Hears())
    process.heartbeat(0.1, "nobody works")
    task = await stepping(process)
    assert (process.progress, process.detail) == (0.4, "mixing")
    process.gate.set()
    await task
    assert (process.progress, process.detail) == (None, None)
    assert told == [(0.4, "mixing")]


# --- a driver that goes away ----------------------------------------------------------------------------


async def test_a_cancelled_driver_gives_the_step_time_to_end() -> None:
    """The next attempt must not meet this one."""
    process = Gated()
    process.finish_cleaning.clear()
    task = await stepping(process)
    task.cancel()
    await settled()
    assert not task.done()
    process.finish_cleaning.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (process.cleaned.is_set(), process.can_step) == (True, True)


@pytest.mark.usefixtures("_short_grace")
async def test_an_abandoned_attempt_does_not_meet_the_next_one() -> None:
    """The first attempt still runs when the second one does: what it writes counts for nothing."""
    first_done, second_runs, second_gate = asyncio.Event(), asyncio.Event(), asyncio.Event()
    numbers = iter((1, 2))

    class Twice(Deaf):
        async def run(self) -> Any:
            if next(numbers) == 1:
                await super().run()
                self.heartbeat(0.5)
                first_done.set()
                return "first"
            second_runs.set()
            await second_gate.wait()
            return "second"

    process = Twice()
    task = await stepping(process)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    task = asyncio.create_task(process.step())
    await second_runs.wait()
    process.gate.set()
    await first_done.wait()
    assert (process.progress, process.status) == (None, None)
    second_gate.set()
    await task
    result = process.result()
    assert (result.value, result.outputs) == ("second", {})
    assert process.take_effects().children == ()


@pytest.mark.parametrize("paused", [False, True])
async def test_a_kill_is_not_lost_when_the_driver_goes_away_too(paused: bool) -> None:
    """It stands in the register: whoever drives the process next finds it there, and no step runs again."""
    runs: list[asyncio.Event] = []
    running, finish_cleaning = asyncio.Event(), asyncio.Event()

    class Cleans(Process):
        async def run(self) -> None:
            runs.append(running)
            running.set()
            try:
                await asyncio.Event().wait()
            finally:
                await finish_cleaning.wait()

    process = Cleans()
    await process.step()
    task = asyncio.create_task(process.step())
    await running.wait()
    if paused:
        process.receive(Pause())
    process.receive(KillMessage("enough"))
    in_step = process.snapshot()
    task.cancel()
    finish_cleaning.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert process.register.kill is KillLevel.GRACEFUL
    for one in (process, Cleans.restore(process.snapshot()), Cleans.restore(in_step)):
        assert (one.can_step, one.play_state) == (True, PlayState.PLAYING)
        assert subjects(await one.step()) == KILLED
        assert one.result().exit_message == "enough"
    assert len(runs) == 1
