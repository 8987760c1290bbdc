"""Process control against a small model: any sequence of steps, messages, crashes and cancelled drivers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prunus.errors import InvalidInputError, InvalidStateError
from prunus.processes import (
    Continue,
    EditContext,
    KillMessage,
    Message,
    Pause,
    PauseAt,
    Play,
    Process,
    ProcessSpec,
    Resume,
    Stop,
    Transition,
    Update,
    Wait,
    update,
)

TERMINAL = ("finished", "excepted", "killed")

names = st.sampled_from(["run", "other"])
orders = st.tuples(
    st.sampled_from([*["continue"] * 8, *["wait"] * 8, *["nothing"] * 2, "fail", "stop"]),
    st.lists(names, min_size=1, max_size=3),
)
acts = st.sampled_from([*["drive"] * 16, *["message"] * 16, *["cancel"] * 6, *["crash"] * 2, "kill"])
messages = (
    st.just(Play())
    | st.just(Pause())
    | st.builds(PauseAt, st.none() | names)
    | st.just(Resume(1, True))
    | st.builds(Update, st.just("add"), st.lists(st.integers(-1, 3), min_size=1, max_size=1))
    | st.builds(Update, st.sampled_from(["add", "subtract"]), st.just(["one", "two"]))
    | st.just(EditContext({"x": 1}))
)
seldom = st.sampled_from([False, False, True])


class Scripted(Process):
    """Each step does what it is told to from outside."""

    order: asyncio.Future[Any]

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.output("count", valid_type=int, required=False)

    async def run(self, *_: Any) -> Any:
        self.order = asyncio.get_running_loop().create_future()
        order = await self.order
        if isinstance(order, Exception):
            raise order
        return order

    async def other(self, *_: Any) -> Any:
        return await self.run()

    @update
    def add(self, number: int) -> int:
        count: int = self.outputs.get("count", 0) + number
        self.out("count", count)
        if number < 0:
            raise ValueError("a negative number")
        return count


class Control(RuleBasedStateMachine):
    """The model: what is wanted, what is waited for, whether a step runs, who waits for an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.process = Scripted()
        self.state, self.next = "created", "run"
        self.pause, self.kill = False, False
        self.pause_at: str | None = None
        self.pending: list[str] = []
        """The steps that come after the resumes that are waited for."""
        self.task: asyncio.Task[tuple[Transition, ...]] | None = None
        self.ending: list[str] = []
        self.count = 0
        self.deferred: list[tuple[Message, int]] = []
        self.tokens = 0
        self.answers: dict[int, Any] = {}
        """What the model has answered, and the process is to answer in the same step of the machine."""

    @initialize(created=seldom)
    def begin(self, created: bool) -> None:
        if not created:
            self.start_step()

    def teardown(self) -> None:
        async def stop() -> None:
            if self.task is not None:
                self.task.cancel()
                await asyncio.wait([self.task])

        self.runner.run(stop())
        self.runner.close()

    # --- the model ----------------------------------------------------------------------------------

    @property
    def play(self) -> str:
        if not self.pause or self.kill or self.state in TERMINAL:
            return "playing"
        return "paused" if self.task is None else "pausing"

    @property
    def ready(self) -> bool:
        return self.task is None and self.play == "playing" and self.state in ("created", "running")

    def enter(self, state: str, play: str, next: str | None = None) -> list[str]:
        """What changes when it goes to `state`, if it is in the play state `play` until then."""
        change = f"state_changed.{self.state}.{state}"
        self.state = state
        if next is not None:
            self.next = next
            self.look_for_breakpoint()
        if state in TERMINAL:
            for _, token in self.deferred:
                self.answers[token] = "ended"
            self.deferred = []
        return [change, *self.turned(play)]

    def look_for_breakpoint(self) -> None:
        if self.pause_at == self.next:
            self.pause_at, self.pause = None, True

    def turned(self, play: str) -> list[str]:
        return [] if play == self.play else [f"play_changed.{play}.{self.play}"]

    def answer(self, message: Message, token: int) -> list[str]:
        """What changes by a message that is dealt with between two steps, or at once."""
        match message:
            case Resume():
                if self.state != "waiting":
                    self.answers[token] = "not suspended"
                    return []
                self.answers[token] = None
                return self.enter("running", self.play, self.pending.pop(0))
            case Update(args=[number]):
                if number < 0:
                    self.answers[token] = "failed"
                    return []
                self.count += number
                self.answers[token] = self.count
                return ["updated"]
            case Update():
                self.answers[token] = "invalid"
                return []
            case EditContext():
                self.answers[token] = "no context"
                return []
        raise AssertionError(message)

    def ended(self, changes: tuple[Transition, ...], target: str, next: str | None = None) -> None:
        """The step has ended and led to `target`; what has waited for that is dealt with now, in its order."""
        play, self.task = self.play, None
        expected = self.enter(target, play, next)
        deferred, self.deferred = self.deferred, []
        for message, token in deferred:
            expected += self.answer(message, token)
        assert [change.subject for change in changes] == expected

    def send(self, message: Message) -> tuple[int, list[str]]:
        """Hand it to the process; its token and what has changed."""
        self.tokens += 1

        async def call() -> tuple[Transition, ...]:
            return self.process.receive(message, self.tokens)

        changes = self.runner.run(call())
        if self.state in TERMINAL:
            self.answers[self.tokens] = "ended"
            assert changes == ()
        return self.tokens, [change.subject for change in changes]

    # --- steps --------------------------------------------------------------------------------------

    @rule(order=orders, message=messages, act=acts, killed=seldom)
    def act(self, order: tuple[str, list[str]], message: Message, act: str, killed: bool) -> None:
        """One rule, so that a run is a mixture of everything."""
        match act:
            case "drive":
                self.drive(order)
            case "message":
                self.tell(message)
            case "kill" if killed:
                self.kill_it(force=order[0] == "wait")
            case "crash":
                self.crash_and_restore()
            case "cancel" if self.task is not None:
                self.cancel_step(killed)

    def drive(self, order: tuple[str, list[str]]) -> None:
        """Begin a step, or end the one that runs as it is told to, or be refused."""
        if self.task is not None:
            self.end_step(*order)
        elif self.ready:
            self.start_step()
        else:
            self.step_is_refused()

    def start_step(self) -> None:
        async def start() -> asyncio.Task[tuple[Transition, ...]]:
            task = asyncio.create_task(self.process.step())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            return task

        task = self.runner.run(start())
        if self.kill:
            self.ended(task.result(), "killed")
        elif self.state == "created":
            self.ended(task.result(), "running", "run")
        else:
            self.task = task

    def step_is_refused(self) -> None:
        async def step() -> None:
            with pytest.raises(InvalidStateError):
                await self.process.step()

        self.runner.run(step())

    def end_step(self, what: str, names: list[str]) -> None:
        async def end(order: Any) -> tuple[Transition, ...]:
            assert self.task is not None
            self.process.order.set_result(order)
            return await self.task

        match what:
            case "continue":
                self.ended(self.runner.run(end(Continue(names[0]))), "running", names[0])
            case "wait":
                waits = [Wait(then=name) for name in names]
                self.pending += names
                self.ended(self.runner.run(end(waits if len(waits) > 1 else waits[0])), "waiting")
            case "nothing":
                self.ended(self.runner.run(end(None)), "waiting" if self.pending else "finished")
            case "stop":
                self.ended(self.runner.run(end(Stop())), "finished")
            case _:
                self.ended(self.runner.run(end(ValueError("bad"))), "excepted")

    # --- drivers that go away -----------------------------------------------------------------------

    def cancel_step(self, killed: bool) -> None:
        async def cancel() -> None:
            assert self.task is not None
            if killed:
                self.process.receive(KillMessage())
            self.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await self.task

        self.runner.run(cancel())
        self.task = None
        self.kill = self.kill or killed

    def crash_and_restore(self) -> None:
        """The new one goes on from the last snapshot; whoever waited for the end of a step asks again."""

        async def lose() -> None:
            assert task is not None
            task.cancel()
            await asyncio.wait([task])

        old, task = self.process, self.task
        self.process, self.task, self.deferred = Scripted.restore(old.snapshot()), None, []
        before = self.process.snapshot()
        if task is None:
            assert before == old.snapshot()
        else:
            self.runner.run(lose())
            assert self.process.snapshot() == before

    # --- messages -----------------------------------------------------------------------------------

    def kill_it(self, force: bool) -> None:
        play, runs = self.play, self.task is not None
        _, changes = self.send(KillMessage(force=force))
        if runs:
            assert changes == []

            async def wait() -> tuple[Transition, ...]:
                assert self.task is not None
                return await self.task

            self.ended(self.runner.run(wait()), "killed")
        elif self.state not in TERMINAL:
            assert changes == self.enter("killed", play)

    def tell(self, message: Message) -> None:
        play, ready = self.play, self.ready
        token, changes = self.send(message)
        if self.state in TERMINAL:
            assert changes == []
            return
        match message:
            case Pause():
                self.pause = True
            case Play():
                self.pause = False
            case PauseAt(step):
                self.pause_at = step
                if ready and self.state == "running":
                    self.look_for_breakpoint()
            case _:
                if self.task is not None and not (isinstance(message, Resume) and not self.pending):
                    self.deferred.append((message, token))
                    assert changes == []
                else:
                    assert changes == self.answer(message, token)
                return
        assert changes == self.turned(play)

    # --- what is always true ------------------------------------------------------------------------

    @invariant()
    def process_is_as_the_model_says(self) -> None:
        process = self.process
        assert (process.state.value, process.play_state.value) == (self.state, self.play)
        assert process.has_terminated() == (self.state in TERMINAL)
        assert process.can_step == self.ready
        assert process.suspended == (self.state == "waiting")
        assert process.has_deferred == bool(self.deferred)
        assert process.outputs.get("count", 0) == self.count
        if self.state == "running":
            assert process.next_step == self.next
        if self.state in TERMINAL:
            self.ending = self.ending or [self.state]
            assert self.ending == [self.state], "terminal is final"
        else:
            assert process.register.pause == self.pause
            assert process.register.pause_at == self.pause_at

    @invariant()
    def everybody_gets_one_answer(self) -> None:
        replies = self.process.take_effects().replies
        assert len(replies) == len({reply.token for reply in replies})
        told: dict[int, Any] = {}
        for reply in replies:
            error = None if reply.failure is None else reply.failure.to_exception()
            match error:
                case None:
                    told[reply.token] = reply.value
                case InvalidStateError(needed="alive"):
                    told[reply.token] = "ended"
                case InvalidStateError(needed=needed) if needed.startswith("suspended"):
                    told[reply.token] = "not suspended"
                case InvalidStateError(needed=needed) if needed.startswith("of a WorkChain"):
                    told[reply.token] = "no context"
                case InvalidInputError():
                    told[reply.token] = "invalid"
                case _:
                    assert "ValueError: a negative number" in str(error)
                    told[reply.token] = "failed"
        assert told == self.answers
        self.answers = {}


Control.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestControl = Control.TestCase
