"""Steps that are tried again: the policy, and what an attempt leaves behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.processes import (
    Continue,
    Outcomes,
    Play,
    Process,
    ProcessState,
    RetryPolicy,
    Stop,
    Wait,
    WorkChain,
    append_,
    message,
    sleep,
    step,
)
from tests.processes.bench import Bench, reloaded

QUIET = RetryPolicy(max_attempts=3, initial_interval_s=10, backoff=3, jitter=0)
"""Pauses of 10 s, then 30 s."""


# --- the policy -------------------------------------------------------------------------------------


@given(
    initial_s=st.floats(0, 1e6),
    backoff=st.floats(1, 1e6),
    longest_s=st.floats(0, 1e6),
    jitter=st.floats(0, 1),
    attempt=st.integers(1, 10_000),
    chance=st.floats(0, 1),
)
def test_a_pause_grows_up_to_its_bound(
    initial_s: float, backoff: float, longest_s: float, jitter: float, attempt: int, chance: float
) -> None:
    """It is within the jitter of ``initial * backoff ** (attempt - 1)``, or of the longest one, whatever they are."""
    policy = RetryPolicy(initial_interval_s=initial_s, backoff=backoff, max_interval_s=longest_s, jitter=jitter)
    plain = RetryPolicy(initial_interval_s=initial_s, backoff=backoff, max_interval_s=longest_s, jitter=0)
    base = plain.delay_s(attempt, chance)
    assert 0 <= base <= longest_s
    assert base <= plain.delay_s(attempt + 1, chance)
    assert base * (1 - jitter) * 0.999 <= policy.delay_s(attempt, chance) <= base * (1 + jitter) * 1.001


def test_the_pauses_of_the_default_policy() -> None:
    """One second, two, four ..., at most 100, spread by a tenth."""
    policy = RetryPolicy()
    assert [policy.delay_s(attempt, 0.5) for attempt in (1, 2, 3, 8, 5000)] == [1, 2, 4, 100, 100]
    assert (policy.delay_s(1, 0.0), policy.delay_s(1, 1.0)) == (0.9, 1.1)


@pytest.mark.parametrize(
    ("policy", "error", "wanted"),
    [
        (RetryPolicy(), OSError(), True),
        (RetryPolicy(), KeyboardInterrupt(), False),
        (RetryPolicy(max_attempts=1), OSError(), False),
        (RetryPolicy(retry_on=OSError), ConnectionError(), True),
        (RetryPolicy(retry_on=(OSError, KeyError)), ValueError(), False),
        (RetryPolicy(give_up_on=ConnectionError), ConnectionResetError(), False),
        (RetryPolicy(retry_on=OSError, give_up_on=(ConnectionError, KeyError)), FileNotFoundError(), True),
    ],
)
def test_which_errors_are_worth_another_attempt(policy: RetryPolicy, error: BaseException, wanted: bool) -> None:
    """Those of `retry_on` and their subclasses, but for those of `give_up_on`, while there are attempts left."""
    assert policy.wants(error, 1) is wanted
    assert not policy.wants(error, policy.max_attempts)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"initial_interval_s": -1},
        {"max_interval_s": -1},
        {"backoff": 0.5},
        {"jitter": 1.5},
        {"retry_on": "OSError"},
        {"retry_on": (OSError, OSError("an instance"))},
        {"give_up_on": [ValueError]},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    """Where it is written, and not when a step has failed."""
    with pytest.raises(ValueError, match=r"RetryPolicy\(.*max_attempts and backoff are at least 1"):
        RetryPolicy(**wrong)


# --- attempts ---------------------------------------------------------------------------------------


class Flaky(Process):
    """Fails until the attempt that is told; writes to all that a step can write to."""

    good_attempt = 3
    keys: list[str]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[tuple[Any, ...]] = []

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.output("x", required=False)
        spec.output("y", required=False)

    async def run(self) -> Continue:
        self.out("y", "from before")
        return Continue(self.fetch, "a", b="c")

    @step(retry=QUIET)
    async def fetch(self, a: str, *, b: str) -> str:
        attempt = int(self.status or 0) + 1
        self.set_status(str(attempt))
        assert dict(self.outputs) == {"y": "from before"}
        self.out("x", attempt)
        if attempt < self.good_attempt:
            self.submit(Flaky)
            raise OSError(f"attempt {attempt} of {a} and {b}")
        return self.idempotency_key


@pytest.mark.parametrize("crashes", [False, True])
async def test_each_attempt_begins_with_what_the_first_one_had(crashes: bool) -> None:
    """Arguments and key are the same; outputs and children of failed attempts are dropped; restarts change nothing."""
    bench = Bench(crashes=crashes)
    process = await bench.run(Flaky(pid="p"))
    assert process.result().value == "p:2"
    assert process.outputs == {"x": 3, "y": "from before"}
    assert bench.ended == {}
    assert [(change.event, change.step) for change in bench.history[2:]] == [
        ("running.waiting", "fetch"),
        ("waiting.running", None),
        ("running.waiting", "fetch"),
        ("waiting.running", None),
        ("running.finished", "fetch"),
    ]


async def test_the_failures_of_the_attempts_are_in_the_transitions() -> None:
    """With their numbers and pauses; the last one says how many there were, and the process shows why it waits."""

    class Hopeless(Flaky):
        good_attempt = 99

    bench = Bench()
    process = Hopeless()
    for _ in range(3):
        await process.step()
    process.set_status(None)
    assert process.state is ProcessState.WAITING
    assert process.status == "attempt 1 of 3 failed (OSError: attempt 1 of a and c); again in 10 s"
    assert process.next_step == "fetch"
    process.set_status("1")
    await bench.run(process)
    assert process.state is ProcessState.EXCEPTED
    assert [change.note for change in bench.history if change.note] == [
        "attempt 2 of 3 failed (OSError: attempt 2 of a and c); again in 30 s",
        "attempt 3 failed as well: OSError: attempt 3 of a and c",
    ]
    failure = process.result().failure
    assert failure is not None
    assert failure.message == "attempt 3 of a and c"


async def test_between_two_attempts_it_is_parked() -> None:
    """It waits for the time, holds nothing, and goes on no sooner; also one that was reloaded."""
    process = Flaky()
    for _ in range(3):
        await process.step()
    for waiting in (process, reloaded(process)):
        at_s = waiting.wakes(0.0).at_s
        assert at_s is not None
        assert not waiting.can_step
        assert not waiting.suspended
        assert waiting.settle(Outcomes(at_s - 0.01)) == ()
        (change,) = waiting.settle(Outcomes(at_s))
        assert change.event == "waiting.running"
        assert waiting.can_step


@pytest.mark.parametrize("crashes", [False, True])
async def test_when_all_attempts_have_failed_the_class_says_what_comes(crashes: bool) -> None:
    """With ``on_exception = "pause"`` it is paused and intact, and a play gives it all its attempts anew."""

    class Careful(Flaky):
        on_exception = "pause"
        good_attempt = 5

    bench = Bench(crashes=crashes)
    process = await bench.run(Careful(pid="p"))
    assert (process.state, process.paused, process.next_step) == (ProcessState.RUNNING, True, "fetch")
    assert process.status == "the step fetch failed: OSError: attempt 3 of a and c"
    assert process.outputs == {"y": "from before"}
    process.receive(Play())
    process = await bench.run(process)
    assert process.result().value == "p:2"
    assert process.outputs["x"] == 5


async def test_a_step_that_takes_too_long_is_tried_again() -> None:
    """A timeout is a failure like others."""

    class Slow(Process):
        @step(retry=RetryPolicy(max_attempts=2, jitter=0), timeout=0.02)
        async def run(self) -> str:
            if self.status is None:
                self.set_status("hangs")
                await asyncio.Event().wait()
            return "this time"

    bench = Bench(crashes=True)
    assert (await bench.run(Slow())).result().value == "this time"
    assert bench.history[1].note == (
        "attempt 1 of 2 failed (StepTimeoutError: the step run was cancelled: it did not end within 0.02 s); "
        "again in 1 s"
    )


async def test_an_error_to_give_up_on_ends_it_at_once() -> None:
    """Nothing is said of attempts, as there was one."""

    class Refused(Process):
        @step(retry=RetryPolicy(give_up_on=PermissionError))
        async def run(self) -> None:
            raise PermissionError("no key")

    bench = Bench()
    process = await bench.run(Refused())
    assert process.state is ProcessState.EXCEPTED
    assert [change.note for change in bench.history] == [None, "PermissionError: no key"]


async def test_a_value_that_makes_no_sense_is_a_failure_of_the_step_too() -> None:
    """A step that names a step that is not there, or waits for what nobody declared, is tried again like others."""

    class Lost(Process):
        @step(retry=RetryPolicy(max_attempts=2))
        async def run(self) -> Any:
            return Continue("nowhere")

    bench = Bench()
    process = await bench.run(Lost())
    assert process.state is ProcessState.EXCEPTED
    assert [change.event for change in bench.history] == [
        "created.running",
        "running.waiting",
        "waiting.running",
        "running.excepted",
    ]


class FlakyChain(WorkChain):
    """The second step of its outline, and a step that follows a wait, fail once each."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.outline(cls.first, cls.second, cls.third)

    async def first(self) -> None:
        self.ctx.trace = ["first"]

    @step(retry=QUIET, name="the_second")
    async def second(self) -> Any:
        self.ctx.trace = [*self.ctx.trace, "second"]
        self.to_context(children=append_(self.submit(Quick)))
        self.fail_once("second")
        return Wait(sleep(5), then=self.after)

    @step(retry=QUIET)
    def after(self) -> None:
        self.ctx.trace = [*self.ctx.trace, "after"]
        self.fail_once("after")

    async def third(self) -> Stop:
        return Stop([self.ctx.trace, [child.value for child in self.ctx.children]])

    def fail_once(self, name: str) -> None:
        if name not in (self.status or ""):
            self.set_status(f"{self.status} {name}")
            raise OSError(name)


class Quick(Process):
    async def run(self) -> str:
        return "quick"


@pytest.mark.parametrize("crashes", [False, True])
async def test_steps_of_an_outline_are_tried_again_as_they_were(crashes: bool) -> None:
    """The context is that from before the step; its children are made once; also for a step that follows a wait."""
    bench = Bench(crashes=crashes)
    process = await bench.run(FlakyChain())
    assert process.result().value == [["first", "second", "after"], ["quick"]]
    assert len(bench.ended) == 1
    failed = [change for change in bench.history if change.note and "failed" in change.note]
    assert [change.step for change in failed] == ["the_second", "after"]


class FlakyAndBusy(Process):
    """One of several steps that follow waits is tried again, while the others could go on."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.message("go")

    async def run(self) -> list[Wait]:
        return [Wait(sleep(1), then=self.flaky), Wait(message("go"), then=self.other), Wait(then=self.resumed)]

    @step(retry=QUIET)
    async def flaky(self) -> None:
        key, count = self.idempotency_key, await self.do("count", self.count)
        self.set_status(f"{self.status or ''}{key}({count}) ")
        if (self.status or "").count(key) < 3:
            raise OSError("not yet")

    def count(self) -> int:
        return (self.status or "").count("(")

    async def other(self, value: Any) -> None:
        self.set_status(f"{self.status or ''}{self.idempotency_key}[{value}] ")

    async def resumed(self) -> None:
        self.set_status(f"{self.status or ''}{self.idempotency_key}! ")


@pytest.mark.parametrize("crashes", [False, True])
async def test_no_other_step_comes_between_the_attempts_of_one(crashes: bool) -> None:
    """So its key stays the same, and so does what `do` has done; what was waited for meanwhile comes next."""
    bench = Bench(crashes=crashes)
    process = FlakyAndBusy(pid="p")
    await process.step()
    await process.step()
    process.settle(Outcomes(bench.now_s + 2))
    await process.step()
    assert process.state is ProcessState.WAITING
    bench.deliver("go", "early")
    process = await bench.run(process)
    assert process.status == "p:2(0) p:2(0) p:2(0) p:3[early] "
    assert process.suspended
