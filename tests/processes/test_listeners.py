"""Who is told what happens in a process, and that a process which has ended is gone."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from typing import Any, ClassVar

import pytest

from prunus.processes import (
    Continue,
    KillMessage,
    Pause,
    Play,
    Process,
    ProcessListener,
    ProcessState,
    Stop,
    Transition,
    Wait,
    WorkChain,
    append_,
    execute,
    sleep,
    stack,
)
from prunus.processes.listeners import Line
from tests.processes.bench import Bench, reloaded


class Hears(ProcessListener):
    """Writes down everything, in its order."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_transition(self, process: Process, transition: Transition) -> None:
        self.heard.append(transition.event)
        assert process.state.value in transition.event or transition.kind != "state"

    def on_output(self, process: Process, name: str, value: Any) -> None:
        self.heard.append((name, value))

    def on_paused(self, process: Process) -> None:
        assert process.paused
        self.heard.append("paused")

    def on_played(self, process: Process) -> None:
        assert not process.paused
        self.heard.append("played")

    def on_report(self, process: Process, line: Line) -> None:
        self.heard.append(line.text)

    def on_progress(self, process: Process, progress: float | None, detail: str | None) -> None:
        self.heard.append((progress, detail))


class Eventful(Process):
    """Does one of everything."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.output_namespace("group", dynamic=True)

    async def run(self) -> Continue:
        self.report("hello")
        self.out("group.x", 1)
        self.heartbeat(0.5)
        return Continue(self.then)

    def then(self) -> Wait:
        self.out_many({"group.y": 2})
        return Wait(sleep(1))


async def test_each_kind_of_event_has_its_method() -> None:
    """In the order in which they happen; what a step emits counts when the step ends."""
    heard = Hears()
    process = Eventful()
    process.add_listener(heard)
    await process.step()
    process.receive(Pause("why"))
    process.receive(Play())
    await Bench().run(process)
    assert heard.heard == [
        "created.running",
        "playing.paused",
        "paused",
        "paused.playing",
        "played",
        "hello",
        ("group.x", 1),
        (0.5, None),
        "running.running",
        ("group.y", 2),
        "running.waiting",
        "waiting.running",
        "running.finished",
    ]


async def test_a_listener_of_the_class_hears_every_process_of_it() -> None:
    """Of its subclasses too, and those that were restored; it is never saved."""
    everywhere = Hears()

    class Listened(Process):
        listeners: ClassVar[Any] = (everywhere,)

        async def run(self) -> Any:
            return Continue(self.then)

        async def then(self) -> None: ...

    class Sub(Listened):
        pass

    await execute(Listened)
    process = Sub()
    await process.step()
    process = reloaded(process)
    await process.execute()
    assert everywhere.heard == ["created.running", "running.running", "running.finished"] * 2
    assert "listeners" not in process.snapshot()


async def test_a_listener_that_was_taken_away_hears_no_more() -> None:
    """Taking away one that is not there does nothing; a listener added twice hears twice."""
    heard = Hears()
    process = Eventful()
    process.remove_listener(heard)
    process.add_listener(heard)
    process.add_listener(heard)
    await process.step()
    process.remove_listener(heard)
    await Bench().run(process)
    assert heard.heard == ["created.running"] * 2


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
async def test_a_broken_listener_disturbs_nobody(error: type[BaseException], caplog: pytest.LogCaptureFixture) -> None:
    """It is logged with the pid; the process and the other listeners go on."""

    class Broken(ProcessListener):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                raise error("broken")
            return super().__getattribute__(name)

    heard = Hears()
    process = Eventful(pid="p")
    process.add_listener(Broken())
    process.add_listener(heard)
    process.receive(Pause())
    process.receive(Play())
    with caplog.at_level(logging.ERROR):
        await Bench().run(process)
    assert process.state is ProcessState.FINISHED
    assert len(caplog.records) == len(heard.heard) == 13
    assert {vars(record)["pid"] for record in caplog.records} == {"p"}
    assert all("failed; the process goes on" in record.message for record in caplog.records)


async def test_hooks_are_called_after_the_change_and_their_errors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """`on_paused`, `on_playing` and `on_terminated` of the class."""
    called: list[str] = []

    class Hooked(Process):
        async def run(self) -> None: ...

        def on_paused(self) -> None:
            called.append(f"paused {self.play_state}")

        def on_playing(self) -> None:
            called.append(f"playing {self.play_state}")

        def on_terminated(self) -> None:
            called.append(f"terminated {self.state}")
            raise RuntimeError("late")

    process = Hooked(pid="p")
    process.receive(Pause())
    process.receive(Play())
    await process.execute()
    assert called == ["paused paused", "playing playing", "terminated finished"]
    assert process.state is ProcessState.FINISHED
    (record,) = caplog.records
    assert vars(record)["pid"] == "p"
    process = Hooked()
    process.receive(KillMessage())
    assert called[-1] == "terminated killed"


# --- nothing is left --------------------------------------------------------------------------------


class Leaf(Process):
    """Ends in each of the ways, and leaves tasks and contexts behind."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("number", valid_type=int)

    async def run(self) -> Any:
        alive.add(self)
        self.report("hello")
        match self.inputs.number % 4:
            case 0:
                return Continue(self.then)
            case 1:
                raise ValueError("an error holds its frames, and they hold the process")
            case 2:
                return Wait(sleep(0))
            case _:
                self.receive(KillMessage())
                await asyncio.sleep(0)
                return None

    async def then(self) -> Stop:
        contexts.append(asyncio.get_running_loop().call_later(3600, print))
        return Stop(self.inputs.number)


class Branch(WorkChain):
    """Has children."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("number", valid_type=int)
        spec.outline(cls.branch, cls.collect)

    async def branch(self) -> None:
        alive.add(self)
        for number in range(9):
            self.to_context(leaves=append_(self.submit(Leaf, {"number": self.inputs.number + number})))

    async def collect(self) -> Stop:
        return Stop(len(self.ctx.leaves))


class Tree(Process):
    """A thousand branches, fifty at a time."""

    async def run(self) -> Wait:
        alive.add(self)
        return self.map(Branch, range(1000), then=self.last)

    async def last(self, results: Any) -> Stop:
        return Stop(sum([result.value async for result in results]))


alive: weakref.WeakSet[Process] = weakref.WeakSet()
contexts: list[asyncio.TimerHandle] = []


@pytest.mark.timeout(120)
async def test_ten_thousand_finished_processes_leave_no_object_alive() -> None:
    """However they ended, and though callbacks that hold their contexts are still there."""
    assert not alive
    result = await execute(Tree)
    assert result.value == 9000
    await asyncio.sleep(0)
    gc.collect()
    try:
        assert len(contexts) > 2000
        assert not list(alive)
    finally:
        for handle in contexts:
            handle.cancel()
        contexts.clear()


async def test_what_the_runtime_starts_begins_in_a_clean_context() -> None:
    """A called process stands on the stack of its caller, as it is a part of that step; its children do not."""
    depths: dict[str, int] = {}

    class Inner(Process):
        async def run(self) -> None:
            depths["child of the called"] = stack.depth()
            assert Process.current() is self

    class Called(Process):
        async def run(self) -> Wait:
            depths["called"] = stack.depth()
            return Wait(self.submit(Inner))

    class Outer(Process):
        async def run(self) -> None:
            depths["outer"] = stack.depth()
            await self.call(Called)

    await execute(Outer)
    assert depths == {"outer": 1, "called": 2, "child of the called": 1}
