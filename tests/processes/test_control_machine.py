"""Process control against a small model: any sequence of steps and messages."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prunus.errors import InvalidStateError
from prunus.processes import Continue, KillMessage, Pause, Play, Process, Resume, Stop, Transition, Wait

TERMINAL = ("finished", "excepted", "killed")


class Scripted(Process):
    """Each step does what it is told to from outside."""

    order: asyncio.Future[str]

    async def run(self, *_: Any) -> Any:
        self.order = asyncio.get_running_loop().create_future()
        match await self.order:
            case "continue":
                return Continue(self.run)
            case "wait":
                return Wait(self.run)
            case "stop":
                return Stop()
        raise ValueError("told to fail")


class Control(RuleBasedStateMachine):
    """The model: a state, a play state, whether a step runs, whether it was killed in it."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.process = Scripted()
        self.state, self.play = "created", "playing"
        self.task: asyncio.Task[tuple[Transition, ...]] | None = None
        self.ending: list[str] = []

    def teardown(self) -> None:
        async def stop() -> None:
            if self.task is not None:
                self.task.cancel()
                await asyncio.wait([self.task])

        self.runner.run(stop())
        self.runner.close()

    def receive(self, message: Any) -> list[str]:
        async def call() -> tuple[Transition, ...]:
            return self.process.receive(message)

        return [change.subject for change in self.runner.run(call())]

    @property
    def ready(self) -> bool:
        return self.task is None and self.play == "playing" and self.state in ("created", "running")

    @precondition(lambda self: self.ready)
    @rule()
    def start_step(self) -> None:
        async def start() -> None:
            self.task = asyncio.create_task(self.process.step())
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        self.runner.run(start())
        if self.state == "created":
            assert self.task is not None
            assert [change.subject for change in self.task.result()] == ["state_changed.created.running"]
            self.state, self.task = "running", None

    @precondition(lambda self: not self.ready)
    @rule()
    def step_is_refused(self) -> None:
        async def step() -> None:
            with pytest.raises(InvalidStateError):
                await self.process.step()

        self.runner.run(step())

    @precondition(lambda self: self.task is not None)
    @rule(order=st.sampled_from([*["continue"] * 5, *["wait"] * 3, "stop", "fail"]))
    def end_step(self, order: str) -> None:
        async def end() -> tuple[Transition, ...]:
            assert self.task is not None
            self.process.order.set_result(order)
            return await self.task

        target = {"continue": "running", "wait": "waiting", "stop": "finished", "fail": "excepted"}[order]
        self.ended(self.runner.run(end()), target)

    @precondition(lambda self: self.task is not None)
    @rule()
    def cancel_step(self) -> None:
        async def cancel() -> None:
            assert self.task is not None
            self.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await self.task

        self.runner.run(cancel())
        self.task = None
        if self.play == "pausing":
            self.play = "paused"

    @rule(force=st.booleans(), patience=st.integers(0, 7))
    def kill(self, force: bool, patience: int) -> None:
        if patience:  # else hardly any sequence would be long
            return
        changes = self.receive(KillMessage(force=force))
        if self.task is not None:
            assert changes == []

            async def wait() -> tuple[Transition, ...]:
                assert self.task is not None
                return await self.task

            self.ended(self.runner.run(wait()), "killed")
        elif self.state in TERMINAL:
            assert changes == []
        else:
            assert changes[0] == f"state_changed.{self.state}.killed"
            assert changes[1:] == ([] if self.play == "playing" else [f"play_changed.{self.play}.playing"])
            self.state, self.play = "killed", "playing"

    @rule()
    def pause(self) -> None:
        changes = self.receive(Pause())
        if self.play != "playing" or self.state in TERMINAL:
            assert changes == []
        else:
            self.play = "paused" if self.task is None else "pausing"
            assert changes == [f"play_changed.playing.{self.play}"]

    @rule()
    def unpause(self) -> None:
        changes = self.receive(Play())
        assert changes == ([] if self.play == "playing" else [f"play_changed.{self.play}.playing"])
        self.play = "playing"

    @rule()
    def resume(self) -> None:
        changes = self.receive(Resume(1, True))
        if self.state == "waiting":
            assert changes == ["state_changed.waiting.running"]
            self.state = "running"
        else:
            assert changes == []

    @precondition(lambda self: self.task is None)
    @rule()
    def crash_and_restore(self) -> None:
        restored = Scripted.restore(self.process.snapshot())
        assert restored.snapshot() == self.process.snapshot()
        self.process = restored

    def ended(self, changes: tuple[Transition, ...], target: str) -> None:
        expected = [f"state_changed.running.{target}"]
        if target in TERMINAL:
            expected += [] if self.play == "playing" else [f"play_changed.{self.play}.playing"]
            self.play = "playing"
        elif self.play == "pausing":
            expected += ["play_changed.pausing.paused"]
            self.play = "paused"
        assert [change.subject for change in changes] == expected
        self.state, self.task = target, None

    @invariant()
    def process_is_as_the_model_says(self) -> None:
        process = self.process
        assert (process.state.value, process.play_state.value) == (self.state, self.play)
        assert process.has_terminated() == (self.state in TERMINAL)
        assert process.can_step == self.ready
        assert process.suspended == (self.state == "waiting")
        if self.state in TERMINAL:
            self.ending = self.ending or [self.state]
            assert self.ending == [self.state], "terminal is final"


Control.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestControl = Control.TestCase
