"""A process and its driver's view of it: steps, control, transactions, snapshots."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from prunus.errors import Failure, InvalidInputError, InvalidStateError, ProcessExceptedError, SpecError
from prunus.processes import (
    Child,
    Continue,
    Kill,
    KillMessage,
    Outcomes,
    Pause,
    Play,
    Process,
    ProcessResult,
    ProcessSpec,
    ProcessState,
    Resume,
    Stop,
    Transition,
    Wait,
)
from prunus.processes.states import PlayState


class Adder(Process):
    """Two steps, with arguments between them."""

    @dataclass(frozen=True)
    class Inputs:
        x: int
        y: int = 1

    @dataclass(frozen=True)
    class Outputs:
        total: int
        note: str = "none"

    async def run(self) -> Continue:
        return Continue(self.finish, self.inputs.x, other=self.inputs.y)

    async def finish(self, one: int, *, other: int) -> Adder.Outputs:
        return self.Outputs(one + other)


class Returns(Process):
    """Its step returns, or raises, what it is told to."""

    run_sync_steps_in = "loop"
    value: Any = None

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.output("needed", valid_type=int, required=False)
        spec.output_namespace("group", dynamic=True, valid_type=int)

    def run(self, *args: Any) -> Any:
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value(self) if callable(self.value) else self.value

    def again(self, *args: Any) -> Any:
        return args


class Gated(Process):
    """A step that tells that it runs, and waits until it is let through."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.running, self.gate, self.cleaned = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run(self) -> Any:
        self.running.set()
        try:
            await self.gate.wait()
        finally:
            self.cleaned.set()
        return Continue(self.run)


async def started(process: Process) -> Process:
    await process.step()
    return process


async def stepping(process: Gated) -> asyncio.Task[tuple[Transition, ...]]:
    if process.state is ProcessState.CREATED:
        await process.step()
    process.running.clear()
    task = asyncio.create_task(process.step())
    await process.running.wait()
    return task


async def returning(value: Any) -> Process:
    process = Returns(pid="p")
    process.value = value
    await process.step()
    await process.step()
    return process


def subjects(transitions: tuple[Transition, ...]) -> list[str]:
    return [transition.subject for transition in transitions]


# --- steps ------------------------------------------------------------------------------------------


async def test_a_process_goes_from_step_to_step_to_its_end() -> None:
    """CREATED runs no user code; each step is one state change, named; outputs of the dataclass are emitted."""
    process = Adder({"x": 2})
    assert (process.state, process.next_step) == (ProcessState.CREATED, "run")
    assert subjects(await process.step()) == ["state_changed.created.running"]
    (change,) = await process.step()
    assert (change.subject, change.step) == ("state_changed.running.running", "run")
    assert process.next_step == "finish"
    assert subjects(await process.step()) == ["state_changed.running.finished"]
    result = process.result()
    assert result.outputs == {"total": 3, "note": "none"}
    assert result.successful
    with pytest.raises(InvalidStateError):
        await process.step()


def makes_child(process: Process) -> Any:
    return Wait(process.again, on=[process.submit(Adder, {"x": 1}, pid="c")])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "state", "status"),
    [
        (None, "finished", 0),
        (5, "finished", 0),
        (Stop("x"), "finished", 0),
        (Stop(exit_status=3, exit_message="no"), "finished", 3),
        (Kill("enough"), "killed", None),
        (Wait(), "waiting", None),
        (makes_child, "waiting", None),
        (Continue("again", 1), "running", None),
        (Continue("nowhere"), "excepted", None),
        (Wait("nowhere"), "excepted", None),
        (ValueError("bad"), "excepted", None),
        (StopIteration(), "excepted", None),
        (SystemExit(3), "excepted", None),
        (asyncio.CancelledError(), "excepted", None),
    ],
)
async def test_what_a_step_gives_says_where_it_goes(value: Any, state: str, status: int | None) -> None:
    """Commands, plain values, and whatever is raised: also SystemExit ends only this process."""
    process = await returning(value)
    assert process.state == state
    if process.has_terminated():
        assert process.result().exit_status == status


async def test_the_failure_tells_the_error_of_the_step() -> None:
    """With its type, its text and where it was raised."""
    failure = (await returning(ValueError("bad"))).result().failure
    assert failure is not None
    assert (failure.type, failure.message) == ("ValueError", "bad")
    assert "in run" in failure.traceback


async def test_a_missing_output_makes_a_success_an_exit_status() -> None:
    """Status 11 names the output, and is decided before the transition; a stop with an exit status owes none."""

    class Owes(Process):
        @classmethod
        def define(cls, spec: ProcessSpec) -> None:
            spec.input("status", default=0)
            spec.output("energy", valid_type=float)

        async def run(self) -> Stop:
            return Stop(exit_status=self.inputs.status)

    process = await started(Owes())
    (change,) = await process.step()
    assert (change.subject, process.result().exit_status) == ("state_changed.running.finished", 11)
    assert process.result().exit_message == "the process did not emit the required output energy" == change.note
    process = await started(Owes({"status": 2}))
    await process.step()
    assert (process.state, process.result().exit_status) == (ProcessState.FINISHED, 2)


async def test_outputs_are_checked_where_they_are_emitted() -> None:
    """A wrong one is the error of the step that emits it; dotted names reach into namespaces."""

    def emit(process: Process) -> None:
        process.out("group.a", 1)
        process.out("needed", 2)
        with pytest.raises(InvalidInputError, match=r"outputs\.needed: expected int"):
            process.out("needed", "x")
        with pytest.raises(InvalidInputError, match="no such port"):
            process.out("nothing", 1)
        with pytest.raises(InvalidInputError, match="not a namespace"):
            process.out("needed.deep", 1)
        assert process.outputs["group"].a == 1

    assert (await returning(emit)).result().outputs == {"group": {"a": 1}, "needed": 2}


async def test_a_plain_step_runs_in_a_thread_with_its_context() -> None:
    """It knows its process there, and what it raises arrives; StopIteration too."""
    seen: list[Any] = []

    class Threaded(Process):
        def run(self) -> Any:
            seen.extend([threading.current_thread() is threading.main_thread(), Process.current()])
            return Continue(self.second)

        def second(self) -> None:
            raise StopIteration("odd")

    process = await started(Threaded())
    await process.step()
    assert seen == [False, process]
    await process.step()
    failure = process.result().failure
    assert failure is not None
    assert failure.cause is not None
    assert failure.cause.type == "StopIteration"


async def test_steps_can_not_overlap() -> None:
    """A second call of `step` while one is under way is refused and disturbs nothing."""
    process = Gated()
    task = await stepping(process)
    with pytest.raises(InvalidStateError):
        await process.step()
    with pytest.raises(InvalidStateError):
        process.fail(Failure("X", "y"))
    process.gate.set()
    assert subjects(await task) == ["state_changed.running.running"]


async def test_a_driver_can_fail_a_process() -> None:
    """For reasons outside of its steps, such as a value that can't be saved."""
    process = Adder({"x": 1})
    assert subjects(process.fail(Failure("X", "y"))) == ["state_changed.created.excepted"]
    assert process.result().failure == Failure("X", "y")


async def test_the_idempotency_key_belongs_to_a_step_not_to_an_attempt() -> None:
    """The same after a restore and after a cancelled attempt; another one for the next step."""
    keys: list[str] = []
    running = asyncio.Event()

    class Keyed(Process):
        async def run(self, n: int = 0) -> Any:
            keys.append(self.idempotency_key)
            running.set()
            if len(keys) == 1:
                await asyncio.Event().wait()
            return Continue(self.run, n + 1) if n < 2 else None

    process = await started(Keyed())
    task = asyncio.create_task(process.step())
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    snapshot = process.snapshot()
    await process.step()
    process = Keyed.restore(snapshot)
    while not process.has_terminated():
        await process.step()
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys)) == 3


# --- children and waiting ---------------------------------------------------------------------------


async def test_children_are_made_in_a_step_and_taken_once() -> None:
    """They are validated at once, know their parent, and wait for the driver to take them."""
    process = await returning(makes_child)
    (child,) = process.take_effects().children
    assert process.take_effects().children == ()
    assert (child.pid, child.parent, child.state) == ("c", "p", ProcessState.CREATED)
    assert process.waiting_for == ("c",)
    assert not process.suspended
    assert process.settle(Outcomes(0.0)) == ()
    result = ProcessResult("c", ProcessState.KILLED)
    known = Outcomes(0.0, {"c": result, "other": result})
    assert subjects(process.settle(known)) == ["state_changed.waiting.running"]
    assert process.settle(known) == ()
    await process.step()
    assert process.result().value == ([result],)


async def test_children_of_a_step_that_failed_are_dropped() -> None:
    """A step is done as a whole or not at all."""

    def fails(process: Process) -> None:
        process.submit(Adder, {"x": 1})
        raise ValueError

    assert (await returning(fails)).take_effects().children == ()


async def test_wrong_inputs_of_a_child_are_an_error_of_the_step_that_makes_it() -> None:
    """The error names the ports of the child."""
    process = await returning(lambda process: process.submit(Adder, {"x": "one"}))
    assert "inputs.x: expected int" in str(process.result().failure)
    with pytest.raises(InvalidStateError, match="in a step"):
        Adder({"x": 1}).submit(Adder, {"x": 1})


async def test_waiting_for_no_children_is_over_at_once() -> None:
    """An empty list is something else than no list."""
    process = await returning(lambda process: Wait(process.again, on=[]))
    assert process.state is ProcessState.RUNNING
    await process.step()
    assert process.result().value == ([],)


@pytest.mark.parametrize(
    ("message", "value"), [(Resume(), ()), (Resume(None, True), (None,)), (Resume([1], has_value=True), ([1],))]
)
async def test_a_suspended_process_goes_on_by_a_message(message: Resume, value: Any) -> None:
    """Its callback gets the value, if there is one."""
    process = await returning(Wait("again", "for a person"))
    assert process.suspended
    with pytest.raises(InvalidStateError):
        await process.step()
    assert subjects(process.receive(message)) == ["state_changed.waiting.running"]
    await process.step()
    assert process.result().value == value


async def test_a_wait_without_a_callback_finishes() -> None:
    """There is nothing left to do."""
    process = await returning(Wait())
    process.receive(Resume(3, True))
    await process.step()
    assert process.state is ProcessState.FINISHED


# --- pause, play, kill ------------------------------------------------------------------------------


async def test_a_pause_between_steps_is_at_once() -> None:
    """And nothing steps until it is played again."""
    process = Adder({"x": 1})
    (change,) = process.receive(Pause("looking"))
    assert (change.subject, change.note) == ("play_changed.playing.paused", "looking")
    assert process.paused
    with pytest.raises(InvalidStateError, match="PAUSED"):
        await process.step()
    assert process.receive(Pause()) == ()
    assert subjects(process.receive(Play())) == ["play_changed.paused.playing"]
    assert process.receive(Play()) == ()
    await process.step()


async def test_a_pause_during_a_step_takes_effect_when_it_ends() -> None:
    """The step is not disturbed; a play before that takes the pause back."""
    process = Gated()
    task = await stepping(process)
    assert subjects(process.receive(Pause("why"))) == ["play_changed.playing.pausing"]
    assert type(process).restore(process.snapshot()).paused, "restored, there is no step to wait for"
    process.gate.set()
    changes = await task
    assert subjects(changes) == ["state_changed.running.running", "play_changed.pausing.paused"]
    assert changes[1].note == "why"
    process.receive(Play())
    process.gate.clear()
    task = await stepping(process)
    process.receive(Pause())
    assert subjects(process.receive(Play())) == ["play_changed.pausing.playing"]
    process.gate.set()
    assert subjects(await task) == ["state_changed.running.running"]


async def test_a_process_that_ends_while_pausing_is_not_paused() -> None:
    """A terminal process is PLAYING."""
    process = Gated()
    task = await stepping(process)
    process.receive(Pause())
    process.receive(KillMessage())
    assert subjects(await task) == ["state_changed.running.killed", "play_changed.pausing.playing"]
    assert process.receive(Pause()) == ()


async def test_a_kill_between_steps_is_at_once_and_final() -> None:
    """Nothing changes a terminal process."""
    process = Adder({"x": 1})
    (change,) = process.receive(KillMessage("enough"))
    assert (change.subject, change.note) == ("state_changed.created.killed", "enough")
    for message in (KillMessage("again"), Pause(), Play(), Resume()):
        assert process.receive(message) == ()
    assert process.result().exit_message == "enough"


async def test_a_cancelled_driver_leaves_the_process_as_it_was() -> None:
    """The step is cancelled too, and may be taken again."""
    process = Gated()
    task = await stepping(process)
    process.receive(Pause())
    before = process.snapshot()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert process.cleaned.is_set()
    assert process.snapshot() == before
    assert process.play_state is PlayState.PAUSED
    process.receive(Play())
    process.gate.set()
    assert subjects(await process.step()) == ["state_changed.running.running"]


async def test_a_broken_hook_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Hooks are called in their order; what they raise is logged with the pid."""
    calls: list[str] = []

    class Hooked(Adder):
        def on_paused(self) -> None:
            calls.append("paused")
            raise ValueError("broken hook")

        def on_playing(self) -> None:
            calls.append("playing")

        def on_terminated(self) -> None:
            calls.append("terminated")
            raise ValueError("broken hook")

    process = Hooked({"x": 1})
    process.receive(Pause())
    process.receive(Play())
    while not process.has_terminated():
        await process.step()
    assert calls == ["paused", "playing", "terminated"]
    assert process.result().successful
    assert "broken hook" in caplog.text
    assert f"a hook of process {process.pid} failed" in caplog.text


# --- snapshots --------------------------------------------------------------------------------------


async def in_state(name: str) -> Process:
    match name:
        case "created":
            return Adder({"x": 1}, tags=["a", "b"], parent="q")
        case "running":
            return await started(Adder({"x": 1}))
        case "second step":
            process = await started(Adder({"x": 1}))
            await process.step()
            return process
        case "waiting":
            return await returning(makes_child)
        case "suspended":
            return await returning(Wait("again", "msg", {"k": [1]}))
        case "finished":
            return await returning(Stop([1], exit_status=2, exit_message="x"))
        case "excepted":
            return await returning(ValueError("bad"))
    return await returning(Kill("enough"))


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize(
    "name", ["created", "running", "second step", "waiting", "suspended", "finished", "excepted", "killed"]
)
async def test_a_process_survives_its_snapshot_in_every_state(name: str, paused: bool) -> None:
    """The restored one has the same snapshot, and the same result when both go on."""
    process = await in_state(name)
    if paused:
        process.receive(Pause())
    restored = type(process).restore(process.snapshot())
    assert restored.snapshot() == process.snapshot()
    assert restored.inputs == process.inputs
    assert restored.play_state is process.play_state
    for one in (process, restored):
        one.receive(Play())
        one.settle(Outcomes(0.0, {"c": ProcessResult("c", ProcessState.KILLED)}))
        one.receive(Resume(3, True))
        while not one.has_terminated():
            await one.step()
    assert restored.result() == process.result()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["state"].update(step="gone"), "no step 'gone'; was it renamed"),
        (lambda data: data.pop("state"), "no checkpoint of a Adder"),
        (lambda data: data["state"].update(state="odd"), "no checkpoint of a Adder"),
        (lambda data: data["inputs"].update(gone=1), "Inputs does not take"),
        (lambda data: data["inputs"].pop("x"), "Inputs does not take"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_class_says_so(
    change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    """A step or an input that is gone is told by its name."""
    data = Adder({"x": 1}).snapshot()
    change(data)
    with pytest.raises(SpecError, match=message):
        Adder.restore(data)


def test_a_new_optional_input_does_not_break_old_checkpoints() -> None:
    """It gets its default."""
    data = Adder({"x": 1}).snapshot()
    del data["inputs"]["y"]
    assert Adder.restore(data).inputs == Adder.Inputs(1, 1)


def test_what_the_process_needs_for_itself_can_not_be_taken() -> None:
    """A step called `fail` or `step` would be called by the driver; so it is told where the class is made."""
    with pytest.raises(SpecError, match="Clashes defines fail, which Process needs for itself"):

        class Clashes(Process):
            async def run(self) -> None: ...

            async def fail(self) -> None: ...  # type: ignore[override]


def test_a_handle_names_the_child() -> None:
    """Pid and class, no more."""
    assert Child("p", "m:C") == Child("p", "m:C")


async def test_a_method_of_ours_is_no_step() -> None:
    """Going on with one would be a way into the engine."""

    class Sly(Process):
        async def run(self) -> Continue:
            return Continue("receive")

    process = Sly()
    await process.step()
    await process.step()
    with pytest.raises(ProcessExceptedError, match="receive is a method of Process, and can't be a step"):
        process.result().raise_for_state()


async def test_what_was_done_once_is_forgotten_when_the_step_has_ended() -> None:
    """It is kept for the attempts of the step, and in no later checkpoint."""

    class Does(Process):
        async def run(self) -> Wait:
            await self.do("number", lambda: 1)
            return Wait(self.run)

    process = Does()
    await process.step()
    await process.step()
    assert "done" not in process.snapshot()
