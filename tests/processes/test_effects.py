"""Steps whose effect must not be repeated: what is durable when, and what comes of a worker that dies anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from prunus.processes import (
    Continue,
    DidNotHappen,
    Happened,
    KillMessage,
    Play,
    Process,
    ProcessState,
    RetryPolicy,
    Settle,
    Stop,
    WorkChain,
    step,
)
from tests.processes.bench import Bench, reloaded

PAID = "receipt"


class Pay(Process):
    """Pays, with arguments and outputs, and can't find out whether it has."""

    bank: dict[str, str]
    """What was paid, by key: the world outside, which no crash touches."""
    answer: Any = None
    """What `look` says; an exception is raised."""
    hangs = False

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.output("paid", required=False)
        spec.output("looked", required=False)

    async def run(self) -> Continue:
        return Continue(self.pay, 5, to="Ann")

    @step(effect="once")
    async def pay(self, amount: int, *, to: str) -> Any:
        return await self.do_pay(f"{amount} to {to}")

    async def do_pay(self, what: str) -> Any:
        assert self.idempotency_key not in self.bank
        self.bank[self.idempotency_key] = what
        self.out("paid", what)
        if self.hangs:
            await asyncio.Event().wait()
        return Continue(self.finish, PAID)

    async def finish(self, receipt: str) -> Stop:
        return Stop(receipt)


class PayAndLook(Pay):
    """It can find out."""

    @step(effect="once", reconcile="look")
    async def pay(self, amount: int, *, to: str) -> Any:
        return await self.do_pay(f"{amount} to {to}")

    async def look(self, key: str) -> Any:
        assert key == self.idempotency_key
        assert Process.current() is self
        self.out("looked", key)
        return told(self.answer)


class PayAndLookInThread(PayAndLook):
    def look(self, key: str) -> Any:  # type: ignore[override]
        self.out("looked", key)
        return told(self.answer)


def told(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


def of(kind: type[Pay], **facts: Any) -> Pay:
    """A process of a class of its own, so that what the test says of it survives crashes."""
    made: type[Pay] = type(kind.__name__, (kind,), {"bank": {}, **facts})
    return made(pid="p")


async def about_to_pay(process: Pay) -> Pay:
    """Up to the checkpoint with the intent."""
    for _ in range(3):
        await process.step()
    return process


async def crashed_in_step(process: Pay) -> Pay:
    """Up to the middle of the step, where its worker dies."""
    process = await about_to_pay(process)
    kind = type(process)
    kind.hangs = True
    dying = asyncio.create_task(process.step())
    while not kind.bank:
        await asyncio.sleep(0)
    survivor = reloaded(process)
    dying.cancel()
    await asyncio.gather(dying, return_exceptions=True)
    kind.hangs = False
    return survivor


# --- when nobody dies -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Pay, PayAndLook])
async def test_the_intent_is_durable_before_the_step_begins(kind: type[Pay]) -> None:
    """It is a change of its own, so there is a checkpoint between it and the effect; the step runs once."""
    process = of(kind)
    await process.step()
    await process.step()
    assert process.snapshot()["state"].get("effect") is None
    (change,) = await process.step()
    assert (change.event, change.note) == ("running.running", "pay is about to begin")
    assert process.snapshot()["state"]["effect"] == "begun"
    assert process.bank == {}
    await process.step()
    assert process.bank == {"p:2": "5 to Ann"}
    assert "effect" not in process.snapshot()["state"]
    process = await Bench().run(process)
    assert (process.result().value, process.outputs) == (PAID, {"paid": "5 to Ann"})


async def test_a_worker_that_dies_before_the_intent_changes_nothing() -> None:
    """Nothing has begun, so nobody is asked."""
    process = of(PayAndLook, answer=AssertionError("asked"))
    await process.step()
    await process.step()
    process = await Bench().run(reloaded(process))
    assert (process.result().value, process.bank) == (PAID, {"p:2": "5 to Ann"})


async def test_a_worker_that_dies_after_the_step_changes_nothing() -> None:
    """It has been seen to end, so nobody is asked."""
    process = await about_to_pay(of(PayAndLook, answer=AssertionError("asked")))
    await process.step()
    process = await Bench(crashes=True).run(reloaded(process))
    assert (process.result().value, process.bank) == (PAID, {"p:2": "5 to Ann"})


# --- when somebody does -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PayAndLook, PayAndLookInThread])
@pytest.mark.parametrize("die", [about_to_pay, crashed_in_step])
async def test_what_reconcile_has_found_is_what_the_step_returned(kind: type[Pay], die: Callable[..., Any]) -> None:
    """`Happened(value)`: the step does not run, and the process goes where that value leads."""
    process = reloaded(await die(of(kind, answer=Happened(Continue("finish", "found")))))
    paid = dict(process.bank)
    process = await Bench(crashes=True).run(process)
    assert process.result().value == "found"
    assert process.outputs == {"looked": "p:2"}
    assert process.bank == paid


@pytest.mark.parametrize("kind", [PayAndLook, PayAndLookInThread])
async def test_what_did_not_happen_is_done(kind: type[Pay]) -> None:
    """`DidNotHappen()`: the step runs, with its arguments and under the same key."""
    process = reloaded(await about_to_pay(of(kind, answer=DidNotHappen())))
    process = await Bench().run(process)
    assert (process.result().value, process.bank) == (PAID, {"p:2": "5 to Ann"})


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (None, "`look` can't tell"),
        (OSError("no line"), "`look` raised OSError('no line')"),
        (True, "`look` returned True, no verdict"),
        (Happened, "`look` returned <class 'prunus.processes.steps.Happened'>, no verdict"),
    ],
)
async def test_without_a_verdict_the_process_is_paused_with_the_reason(answer: Any, why: str) -> None:
    """Whatever it was that kept `reconcile` from one; and it stays so over restarts."""
    process = await crashed_in_step(of(PayAndLook, answer=answer))
    bench = Bench()
    process = reloaded(await bench.run(process))
    assert (process.state, process.paused, process.next_step) == (ProcessState.RUNNING, True, "pay")
    reason = (
        f"the step pay began and nobody saw it end; whether it took effect is unknown ({why}): "
        "look, and then play to run it again, or settle it with what it returned"
    )
    assert process.status == reason
    assert [(change.event, change.note) for change in bench.history] == [("playing.paused", reason)]
    assert process.outputs == {}
    assert process.bank == {"p:2": "5 to Ann"}


@pytest.mark.parametrize("die", [about_to_pay, crashed_in_step])
async def test_without_a_reconcile_the_process_is_paused(die: Callable[..., Any]) -> None:
    """It is not simply run again."""
    process = await Bench().run(reloaded(await die(of(Pay))))
    assert process.paused
    assert "(has no `reconcile` to find out)" in (process.status or "")
    assert len(process.bank) == (die is crashed_in_step)


@pytest.mark.parametrize("restart", [False, True])
async def test_a_play_runs_it_again(restart: bool) -> None:
    """Somebody has looked: it did not happen. The intent is durable before that attempt, too."""
    process = await Bench().run(await crashed_in_step(of(Pay)))
    process.bank.clear()
    process = reloaded(process) if restart else process
    process.receive(Play())
    process = reloaded(process) if restart else process
    bench = Bench()
    process = await bench.run(process)
    assert (process.result().value, process.bank) == (PAID, {"p:2": "5 to Ann"})
    assert [change.note for change in bench.history[:1]] == ["pay is about to begin"]


async def test_a_pause_and_a_play_from_elsewhere_are_no_verdict() -> None:
    """Only a play after the reason was shown says that it may run again."""
    process = await crashed_in_step(of(Pay))
    process.receive(Play())
    process = await Bench().run(process)
    assert process.paused
    assert process.bank == {"p:2": "5 to Ann"}


@pytest.mark.parametrize("restart", [False, True])
async def test_it_can_be_settled_with_what_the_step_returned(restart: bool) -> None:
    """Somebody has looked: it did happen. The process goes on as if the step had returned that."""
    process = await Bench().run(await crashed_in_step(of(Pay)))
    process = reloaded(process) if restart else process
    changes = process.receive(Settle(Stop("seen")), 7)
    assert [change.event for change in changes] == ["settled", "running.finished", "paused.playing"]
    assert (changes[0].step, process.result().value) == ("pay", "seen")
    (reply,) = process.take_effects().replies
    assert (reply.token, reply.failure) == (7, None)
    assert process.bank == {"p:2": "5 to Ann"}


@pytest.mark.parametrize("steps", [0, 1, 3])
async def test_nothing_else_can_be_settled(steps: int) -> None:
    """The sender is told so, and nothing changes."""
    process = of(Pay)
    for _ in range(steps):
        await process.step()
    before = process.snapshot()
    assert process.receive(Settle("x"), 7) == ()
    (reply,) = process.take_effects().replies
    assert reply.failure is not None
    assert "paused because nobody knows whether a step took effect" in reply.failure.message
    assert process.snapshot() == before


async def test_a_driver_that_is_cancelled_leaves_the_question_open() -> None:
    """The same object knows no better than a new one whether the step that was cut short took effect."""
    process = await about_to_pay(of(PayAndLook, answer=Happened(Stop("found")), hangs=True))
    step_task = asyncio.create_task(process.step())
    while not process.bank:
        await asyncio.sleep(0)
    step_task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step_task
    process = await Bench().run(process)
    assert process.result().value == "found"


async def test_a_kill_while_it_is_looked_is_obeyed() -> None:
    """`reconcile` is cancelled as a step would be."""
    looking = asyncio.Event()

    class Waits(PayAndLook):
        async def look(self, key: str) -> Any:
            looking.set()
            await asyncio.Event().wait()

    process = reloaded(await about_to_pay(of(Waits)))
    task = asyncio.create_task(process.step())
    await looking.wait()
    process.receive(KillMessage("enough"))
    (change,) = await task
    assert (change.event, process.result().exit_message) == ("running.killed", "enough")
    assert process.bank == {}


# --- with other options -----------------------------------------------------------------------------


class Retried(Pay):
    """The step raises after its effect, the first time."""

    @step(effect="once", reconcile="look", retry=RetryPolicy(max_attempts=3, jitter=0))
    async def pay(self, amount: int, *, to: str) -> Any:
        done = await self.do_pay(f"{amount} to {to}")
        if not self.status:
            self.set_status("the line broke")
            raise OSError("the line broke")
        return done

    def look(self, key: str) -> Any:
        return Happened(Stop(f"found {self.bank[key]}")) if key in self.bank else DidNotHappen()


@pytest.mark.parametrize("crashes", [False, True])
async def test_an_attempt_that_failed_may_have_had_its_effect(crashes: bool) -> None:
    """So before the next one `reconcile` is asked, on the same worker too."""
    process = await Bench(crashes=crashes).run(of(Retried))
    assert process.result().value == "found 5 to Ann"
    assert process.bank == {"p:2": "5 to Ann"}


class PayChain(WorkChain):
    """Pays in the middle of an outline."""

    paid: list[str]
    verdict: Any = None

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.outline(cls.before, cls.pay, cls.after)

    async def before(self) -> None:
        self.ctx.trace = ["before"]

    @step(effect="once", reconcile="look")
    def pay(self) -> None:
        self.paid.append(self.idempotency_key)
        self.ctx.trace = [*self.ctx.trace, "pay"]

    def look(self, key: str) -> Any:
        self.ctx.trace = [*self.ctx.trace, "look"]
        return self.verdict

    async def after(self) -> Stop:
        return Stop(self.ctx.trace)


async def chain_about_to_pay(verdict: Any) -> PayChain:
    kind: type[PayChain] = type("PayChain", (PayChain,), {"paid": [], "verdict": verdict})
    process = kind(pid="p")
    for _ in range(3):
        await process.step()
    return reloaded(process)


async def test_a_step_of_an_outline_that_happened_is_done() -> None:
    """The outline goes on behind it, and never comes back to it."""
    process = await Bench(crashes=True).run(await chain_about_to_pay(Happened()))
    assert (process.result().value, process.paid) == (["before", "look"], [])


async def test_a_step_of_an_outline_that_did_not_happen_runs() -> None:
    """It runs once, with the context that it would have had."""
    process = await Bench().run(await chain_about_to_pay(DidNotHappen()))
    assert (process.result().value, process.paid) == (["before", "look", "pay"], ["p:2"])


async def test_a_step_of_an_outline_can_be_settled() -> None:
    """The outline goes on behind it."""
    process = await Bench().run(await chain_about_to_pay(None))
    assert (process.paused, process.next_step) == (True, "pay")
    process.receive(Settle())
    assert (process.paused, process.next_step) == (False, "after")
    process = await Bench(crashes=True).run(process)
    assert (process.result().value, process.paid) == (["before"], [])


async def test_a_step_of_an_outline_crashes_between_intent_and_end_each_time() -> None:
    """However often the worker dies there, the effect takes place as often as `reconcile` lets it: once."""

    class Honest(PayChain):
        paid: list[str] = []  # noqa: RUF012 (the world outside)

        def look(self, key: str) -> Any:
            return Happened() if key in self.paid else DidNotHappen()

    process = reloaded(await Bench(crashes=True).run(Honest(pid="p")))
    assert (process.result().value, process.paid) == (["before", "pay"], ["p:2"])
