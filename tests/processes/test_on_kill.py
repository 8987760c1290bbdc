"""The last step of a process that is killed: what it has begun elsewhere ends with it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prunus import ProcessKilledError, StepBlockedError
from prunus.processes import (
    Continue,
    Kill,
    KillMessage,
    Pause,
    Process,
    ProcessState,
    RetryPolicy,
    Wait,
    WorkChain,
    execute,
    sleep,
    step,
)
from tests.processes.bench import Bench, reloaded


class Rents(Process):
    """Has something elsewhere that it must give back."""

    log: list[str]

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.output("given_back", required=False)

    async def run(self) -> Any:
        return Continue(self.rent)

    async def rent(self) -> Any:
        return Wait(on=sleep(3600))

    async def on_kill(self, message: str | None) -> Any:
        await asyncio.sleep(0)
        self.log.append(f"gave back: {message}")
        self.out("given_back", True)


class RentsInStep(Rents):
    async def rent(self) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            self.log.append("cancelled")


class RentsInOutline(WorkChain):
    log: list[str]

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.outline(cls.rent, cls.never)

    async def rent(self) -> Any:
        self.ctx.rented = "a flat"
        self.to_context(child=self.submit(Rents))

    async def never(self) -> None:
        raise AssertionError

    async def on_kill(self, message: str | None) -> None:
        await asyncio.sleep(0)
        self.log.append(f"gave back {self.ctx.rented}: {message}")


@pytest.fixture(autouse=True)
def log() -> list[str]:
    """What was done."""
    Rents.log = RentsInOutline.log = []
    return Rents.log


async def begun(process: Process, bench: Bench) -> Any:
    """Until it has taken two steps."""
    for _ in range(3):
        await bench.turn(process)
    return process


@pytest.mark.parametrize("is_paused", [False, True])
async def test_a_kill_wakes_a_waiting_process_for_its_last_step(log: list[str], is_paused: bool) -> None:
    """It is RUNNING for that one step, whether it was paused or not, also after a crash; then it is KILLED."""
    bench = Bench()
    process = await begun(Rents(), bench)
    assert process.state is ProcessState.WAITING
    if is_paused:
        process.receive(Pause())
    process.receive(KillMessage("enough"))
    assert (process.state, process.paused, process.next_step) == (ProcessState.RUNNING, False, "on_kill")
    process = await bench.run(reloaded(process))
    assert process.state is ProcessState.KILLED
    assert process.result().exit_message == "enough"
    assert process.outputs["given_back"]
    assert log == ["gave back: enough"]


async def test_a_kill_ends_the_running_step_first(log: list[str]) -> None:
    """The step may clean up, what it wrote is lost, and then comes the last step."""
    bench, process = Bench(), RentsInStep()
    process.driver = bench
    await process.step()
    await process.step()
    running = asyncio.create_task(process.step())
    await asyncio.sleep(0)
    process.receive(KillMessage("enough"))
    await running
    assert process.next_step == "on_kill"
    assert (await bench.run(process)).state is ProcessState.KILLED
    assert log == ["cancelled", "gave back: enough"]


async def test_a_work_chain_has_its_context(log: list[str]) -> None:
    """What the outline has kept is there, and its children are killed too."""
    chain = RentsInOutline()
    running = asyncio.create_task(execute(chain))
    while chain.state is not ProcessState.WAITING:
        await asyncio.sleep(0)
    chain.receive(KillMessage("enough"))
    with pytest.raises(ProcessKilledError):
        await running
    assert log[0] == "gave back a flat: enough"


async def test_what_has_not_begun_has_nothing_to_give_back(log: list[str]) -> None:
    """A process that is CREATED is killed at once."""
    process = Rents()
    process.receive(KillMessage())
    assert process.state is ProcessState.KILLED
    assert log == []


async def test_force_does_without_it(log: list[str]) -> None:
    """Also when it runs already, or waits for its next attempt; a second gentle kill disturbs nothing."""
    process = await begun(Rents(), Bench())
    process.receive(KillMessage(force=True))
    assert process.state is ProcessState.KILLED

    class Hangs(Rents):
        async def on_kill(self, message: str | None) -> None:
            self.log.append("begins")
            await asyncio.Event().wait()

    process = await begun(Hangs(), Bench())
    process.receive(KillMessage(grace_s=3600))
    running = asyncio.create_task(process.step())
    await asyncio.sleep(0)
    process.receive(KillMessage())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not running.done()
    process.receive(KillMessage(force=True))
    await running
    assert process.state is ProcessState.KILLED
    assert log == ["begins"]


async def test_its_time_is_the_grace_period_of_the_kill(log: list[str]) -> None:
    """A last step that does not end is cancelled, and the history says so."""

    class Hangs(Rents):
        async def on_kill(self, message: str | None) -> None:
            await asyncio.Event().wait()

    bench = Bench()
    process = await begun(Hangs(), bench)
    process.receive(KillMessage(grace_s=0.01))
    process = await bench.run(process)
    assert process.state is ProcessState.KILLED
    assert any(change.subject == "failed" and "0.01 s" in (change.note or "") for change in bench.history)


@pytest.mark.parametrize("error", [RuntimeError("no line"), StepBlockedError("no line")])
@pytest.mark.parametrize("crashes", [False, True])
async def test_it_is_tried_again_as_its_retry_policy_says(log: list[str], error: Exception, crashes: bool) -> None:
    """Being blocked counts as a failure here: a kill always comes to its end."""

    class Fails(Rents):
        @step(retry=RetryPolicy(max_attempts=3, initial_interval_s=60))
        async def on_kill(self, message: str | None) -> None:
            self.log.append(f"attempt for {message}")
            raise error

    bench = Bench(crashes=crashes)
    process = await begun(Fails(), bench)
    process.receive(KillMessage("enough"))
    process = await bench.run(process)
    assert process.state is ProcessState.KILLED
    assert process.result().exit_message == "enough"
    assert log == ["attempt for enough"] * 3


async def test_a_process_that_ends_itself_takes_it_too(log: list[str]) -> None:
    """A step that returns `Kill` says that the process is to be killed."""

    class EndsItself(Rents):
        async def rent(self) -> Any:
            return Kill("by itself")

    process = await Bench().run(EndsItself())
    assert process.state is ProcessState.KILLED
    assert log == ["gave back: by itself"]
