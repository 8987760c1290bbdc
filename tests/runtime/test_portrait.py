"""What is told of one process, from its row and its history alone."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from prunus import Process, ProcessResult, ProcessSpec, ProcessState, Wait, WorkChain, message
from prunus.persistence.checkpoint import decode_checkpoint
from prunus.persistence.persister import Event
from prunus.processes import Outcomes
from prunus.runtime import portrait
from prunus.runtime.display import snapshot_of
from prunus.runtime.portrait import StepRun, step_runs
from prunus.runtime.runner import checkpoint_of
from tests.runtime.test_display import NOW, UUID, drawn, row


def event(subject: str, at: float, step: str | None = None, note: str | None = None, by: str = "worker-1") -> Event:
    return Event(subject=subject, at=at, step=step, note=note, by=by)


def told(runs: list[StepRun]) -> list[tuple[Any, ...]]:
    return [(run.step, run.attempt, run.took_s, run.waited_s, run.outcome) for run in runs]


def test_steps_are_read_from_the_transitions() -> None:
    """How long each took, and how long the process waited behind it; a claim in between costs no step."""
    history = [
        event("claimed", 0),
        event("created.running", 0),
        event("running.waiting", 1, "scatter", "waits for its children"),
        event("claimed", 4),
        event("waiting.running", 5),
        event("running.running", 7, "fit"),
        event("running.finished", 10, "report"),
    ]
    runs = step_runs(row(state="finished"), history, 99)
    assert told(runs) == [
        ("scatter", 1, 1, 4, "done"),
        ("fit", 1, 2, None, "done"),
        ("report", 1, 3, None, "done"),
    ]
    assert [run.began_at for run in runs] == [0, 5, 7]
    assert {run.by for run in runs} == {"worker-1"}


def test_attempts_are_counted() -> None:
    """Those that failed, and one whose worker was lost: its step is that of the next attempt."""
    history = [
        event("created.running", 0),
        event("running.waiting", 1, "run", "attempt 1 of 3 failed (OSError: no); again in 1 s"),
        event("waiting.running", 2),
        Event(subject="released", at=5, note="its worker is gone", by="worker-1"),
        event("claimed", 6, by="worker-2"),
        event("running.excepted", 8, "run", "attempt 2 failed as well: OSError: no", "worker-2"),
    ]
    runs = step_runs(row(state="excepted"), history, 99)
    assert told(runs) == [
        ("run", 1, 1, 1, "failed"),
        ("run", 2, 3, None, "interrupted"),
        ("run", 2, 2, None, "failed"),
    ]
    assert [run.by for run in runs] == ["worker-1", "worker-1", "worker-2"]
    text = drawn(portrait.step_table(runs, NOW), 120)
    assert "attempt" in text
    assert text.index("its worker is gone") < text.index("attempt 2 failed as well")


def test_the_step_that_runs_is_the_last_one() -> None:
    """Until now, with what it says of itself; an attempt that was interrupted before it has its number."""
    history = [event("created.running", 0), event("released", 3), event("claimed", 5)]
    record = row(step="relax", owner="worker-2-" + "0" * 32, progress=0.5, detail="half")
    assert told(step_runs(record, history, 9)) == [
        ("relax", 1, 3, None, "interrupted"),
        ("relax", 1, 4, None, "running"),
    ]
    last = step_runs(record, history, 9)[-1]
    assert (last.by, last.note) == ("worker-2", "50% half")
    unheld = row(step="relax")
    assert told(step_runs(unheld, [event("created.running", 0)], 9)) == []


def test_a_pause_is_not_counted_as_a_step() -> None:
    """Neither between two steps nor behind one that failed; nor is a play in a wait."""
    history = [
        event("created.running", 0),
        event("running.running", 1, "first"),
        event("playing.paused", 1),
        event("claimed", 50),
        event("paused.playing", 60),
        event("failed", 63, "second", "ValueError: no"),
        event("playing.paused", 63),
        event("paused.playing", 70),
        event("running.waiting", 72, "second"),
        event("playing.paused", 75),
        event("paused.playing", 80),
        event("released", 81),
        event("waiting.running", 90),
        event("running.killed", 91, "third"),
    ]
    assert told(step_runs(row(state="killed"), history, 99)) == [
        ("first", 1, 1, None, "done"),
        ("second", 1, 3, None, "failed"),
        ("second", 2, 2, 18, "done"),
        ("third", 1, 1, None, "interrupted"),
    ]


def test_a_retry_begins_a_new_attempt() -> None:
    """It begins when a worker claims the process, not when it was continued."""
    history = [
        event("created.running", 0),
        event("running.excepted", 2, "run", "OSError: no"),
        event("revived", 50),
        event("claimed", 51),
        event("running.killed", 55),
    ]
    assert told(step_runs(row(state="killed"), history, 99)) == [("run", 1, 2, None, "failed")]
    again = [*history[:4], event("running.finished", 55, "run")]
    assert told(step_runs(row(state="finished"), again, 99))[1:] == [("run", 2, 4, None, "done")]


def test_a_history_with_a_gap_claims_nothing_about_it() -> None:
    """Behind events that were left out the next step has no beginning that is known."""
    history = [event("created.running", 0), event("thinned", 1), event("running.running", 50, "loop")]
    [run] = step_runs(row(state="waiting"), history, 60)
    assert (run.began_at, run.took_s) == (50, 0)


def test_a_wait_that_goes_on_is_counted_until_now() -> None:
    """And one that ends by a kill until then."""
    history = [event("created.running", 0), event("running.waiting", 1, "run")]
    assert told(step_runs(row(state="waiting"), history, 9)) == [("run", 1, 1, 8, "done")]
    killed = [*history, event("waiting.killed", 4)]
    assert told(step_runs(row(state="killed"), killed, 9)) == [("run", 1, 1, 3, "done")]


class Several(Process):
    """Waits for several things at once."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("go")
        spec.input("what", valid_type=str)

    async def run(self) -> Any:
        moment = datetime.fromtimestamp(NOW + 90, UTC)
        conditions: dict[str, Any] = {
            "message": Wait(message("go"), then=self.end),
            "any": Wait.any(go=message("go"), late=moment, then=self.end),
            "both": Wait.all(a="pid-a", b="pid-b", go=message("go"), then=self.end),
            "nested": Wait.all(go=message("go"), one=Wait.any("pid-a", "pid-b"), then=self.end),
            "map": self.map(Several, [{"what": "x"}] * 7, max_in_flight=3, then=self.end),
            "person": Wait(msg="for somebody"),
        }
        return conditions[self.inputs.what]

    async def end(self, *_: Any, **__: Any) -> None:
        """It does not come to this."""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("message", "the message go"),
        ("any", "the message go or the time "),
        ("both", "2 processes and the message go"),
        ("nested", "the message go and one of 2 processes"),
        ("map", "a fan-out: 3 of 7 Several begun, 3 live"),
        ("person", "somebody who resumes it"),
    ],
)
async def test_what_it_waits_for_in_words(what: str, said: str) -> None:
    """And, or, and how far a fan-out is; a suspended process waits for a person."""
    process = Several({"what": what}, pid="several")
    while process.can_step:
        await process.step()
    process.settle(Outcomes(NOW))
    record = row("several", process.state.value, checkpoint=checkpoint_of(process))
    text = portrait.waits_for(record, NOW)
    assert text.startswith(said)
    assert text.endswith(said if what != "any" else " (in 1 min 30 s)")


def test_what_can_not_be_read_is_told_by_the_row() -> None:
    """A checkpoint that is damaged hides neither the message nor the process that is waited for."""
    record = row(state="waiting", names=("go",), waits=(UUID,), checkpoint=b"damaged")
    assert portrait.waits_for(record, NOW) == "process ba94997f, the message go"
    assert portrait.waits_for(row(), NOW) == ""


class Chain(WorkChain):
    """Has a context."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.outline(cls.begin, cls.end)

    def begin(self) -> Wait:
        self.ctx.number = 3
        self.ctx.child = ProcessResult(pid="c", state=ProcessState.FINISHED, outputs={"y": 4}, exit_status=0)
        self.ctx.several = [self.ctx.child]
        return Wait(msg="for somebody")

    def end(self) -> None:
        """It does not come to this."""


async def test_a_context_shows_what_children_gave() -> None:
    """In short: who, how it ended, and its outputs."""
    process = Chain(pid="chain")
    while process.can_step:
        await process.step()
    record = row("chain", "waiting", checkpoint=checkpoint_of(process))
    child = {"pid": "c", "state": "finished", "outputs": {"y": 4}}
    assert portrait.context_of(record) == {"number": 3, "child": child, "several": [child]}
    assert portrait.context_of(row()) == {}
    assert decode_checkpoint(record.checkpoint or b"").snapshot() == snapshot_of(record)


def test_queues_and_priorities_are_told_if_they_are_not_as_of_most() -> None:
    """Nothing is said of the default queue alone."""
    assert portrait.queue_text(row()) is None
    assert portrait.queue_text(row(priority=2)) == "default, priority 2"
    assert portrait.queue_text(row(queue="gpu")) == "gpu"
    facts = portrait.facts(portrait.Portrait(row(crashes=2, resources={"licence": 1}, key="k"), None, ()), NOW)
    assert facts["crashes"] == "2 workers lost while they held it"
    assert facts["resources"] == "1 licence"
    assert facts["key"] == "k"
