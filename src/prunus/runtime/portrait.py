"""All that is known of one process, as people read it: pure functions from its row, its history and its family.

The history of a process is a list of transitions; what people ask is which *steps* it took, how long each took, how
long it waited behind it, and which failed. `step_runs` reads that from the transitions: an attempt at a step begins
when the process is running (or when a worker claims one that is), and ends with the first event that names a step. An
attempt whose worker was lost ends with the release; its name is that of the next attempt, which is at the same step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table
from rich.text import Text

from prunus.errors import Failure
from prunus.persistence.persister import DEFAULT_QUEUE, Event, Record
from prunus.processes import ProcessResult, waits
from prunus.runtime.display import (
    awaited,
    class_name,
    clock,
    count,
    duration,
    how_to_continue,
    lifetime,
    moment,
    one_line,
    peer,
    plain_table,
    progress_text,
    record_as_data,
    short,
    snapshot_of,
    span,
    state,
    trouble,
    without_our_frames,
)


@dataclass(frozen=True)
class Portrait:
    """What is read of a process to show it."""

    record: Record
    """With its checkpoint and its result."""
    result: ProcessResult | None
    history: Sequence[Event]


@dataclass(frozen=True)
class StepRun:
    """One attempt at a step."""

    step: str
    began_at: float
    """Wall clock, seconds since 1970."""
    took_s: float
    """Until now, if it runs."""
    outcome: str
    """``done``, ``failed``, ``interrupted`` or ``running``."""
    attempt: int = 1
    """Each that failed counts; one that was interrupted is taken again under its number."""
    waited_s: float | None = None
    """How long the process waited behind it, until it went on or ended."""
    note: str | None = None
    by: str | None = None
    """The worker."""


def step_runs(record: Record, history: Sequence[Event], now: float) -> list[StepRun]:
    """The steps that it took and takes, the oldest first."""
    runs: list[StepRun] = []
    state_now, began, waiting, by = "created", None, False, None
    unnamed: list[int] = []
    """Where the name of a step is still missing."""

    def begin(at: float) -> float:
        nonlocal waiting
        if waiting and runs:
            last = runs[-1]
            runs[-1] = replace(last, waited_s=max(0.0, at - last.began_at - last.took_s))
        waiting = False
        return at

    def end(step: str | None, event: Event, outcome: str) -> None:
        began_at = event.at if began is None else began
        if step is None:
            unnamed.append(len(runs))
        else:
            for number in unnamed:
                runs[number] = replace(runs[number], step=step)
            unnamed.clear()
        attempt = _attempt(runs, step)
        took_s = max(0.0, event.at - began_at)
        note = None if outcome == "done" and event.subject.startswith("running.running") else event.note
        runs.append(
            StepRun(step or "", began_at, took_s, outcome, attempt=attempt, note=note, by=peer(event.by or by) or None)
        )

    for event in history:
        source, _, target = event.subject.partition(".")
        if event.step is not None and (source in ("running", "failed")):
            failed = source == "failed" or target == "excepted" or _is_retry(event)
            end(event.step, event, "failed" if failed else "interrupted" if target == "killed" else "done")
            began = event.at if target == "running" else None
            waiting = target == "waiting"
            state_now = target or state_now
        elif event.subject == "claimed":
            by = event.by
            if state_now == "running" and began is None:
                began = event.at
        elif event.subject in ("released", "set_aside"):
            if began is not None and event.subject == "released":
                end(None, event, "interrupted")
            began = None
        elif event.subject == "revived":  # (it may go on waiting; then the next event says so)
            state_now, waiting = "running", False
        elif event.subject == "thinned":
            began, waiting = None, False
        elif target == "paused":
            began = None
        elif source == "paused" and target == "playing":
            began = event.at if state_now == "running" else None
        elif target == "running":
            began, state_now = begin(event.at), "running"
        elif target in ("finished", "excepted", "killed", "waiting"):
            if target != "waiting":
                begin(event.at)
            began, state_now = None, target
    for number in unnamed:
        runs[number] = replace(runs[number], step=record.step or "?")
    if not record.is_terminal:
        if waiting:
            begin(now)
        if began is not None and record.owner is not None and record.state == "running":
            attempt = _attempt(runs, record.step)
            took_s, note = max(0.0, now - began), progress_text(record) or None
            runs.append(
                StepRun(record.step or "?", began, took_s, "running", attempt, note=note, by=peer(record.owner))
            )
    return runs


def _attempt(runs: Sequence[StepRun], step: str | None) -> int:
    """The number of the next attempt, as the engine counts: one that was interrupted is taken again."""
    last = runs[-1] if runs else None
    if last is None or last.outcome not in ("failed", "interrupted") or step not in (None, last.step):
        return 1
    return last.attempt + (last.outcome == "failed")


def step_table(runs: Sequence[StepRun], now: float) -> Table:
    """One row an attempt at a step."""
    has_attempts, has_waits = any(run.attempt > 1 for run in runs), any(run.waited_s is not None for run in runs)
    columns = ["step", *["attempt"] * has_attempts, "began", "took", *["waited"] * has_waits, "by", "outcome"]
    table = plain_table(*columns, elastic="outcome")
    for column in table.columns:
        if column.header in ("attempt", "took", "waited"):
            column.justify = "right"
    styles = {"failed": "red", "interrupted": "yellow", "running": "cyan"}
    for run in runs:
        cells: list[str | Text] = [
            run.step,
            *[str(run.attempt)] * has_attempts,
            clock(run.began_at, now),
            duration(run.took_s),
        ]
        cells += ["" if run.waited_s is None else duration(run.waited_s)] * has_waits
        said = one_line(run.note) if run.note and run.outcome != "done" else run.outcome
        table.add_row(*cells, run.by or "", Text(said, styles.get(run.outcome, "")))
    return table


def facts(portrait: Portrait, now: float) -> dict[str, str | Text | None]:
    """What there is to say of it in a line each; None is left out."""
    record, result = portrait.record, portrait.result
    found = trouble(record, portrait.history)
    status = result.exit_status if result else None
    return {
        "pid": record.pid,
        "class": record.class_id,
        "state": state(record),
        "exit status": f"{status}  {result.exit_message or ''}".rstrip() if result and status is not None else None,
        "why": found.why if found and record.is_terminal else result.exit_message if result and not status else None,
        "set aside": record.aside if not record.is_terminal else None,
        "status": record.status,
        "what to do": found.advice if found else how_to_continue(record),
        "next step": record.step if not record.is_terminal else None,
        "progress": progress_text(record) or None,
        "waits for": waits_for(record, now) or None,
        "messages": f"{record.mail} not used yet" if record.mail else None,
        "worker": peer(record.owner) or None,
        "queue": queue_text(record),
        "resources": ", ".join(f"{number} {name}" for name, number in record.resources.items()) or None,
        "key": record.key,
        "crashes": f"{count(record.crashes, 'worker')} lost while they held it" if record.crashes else None,
        "parent": record.parent,
        "tags": ", ".join(record.tags) or None,
        "created": f"{moment(record.created_at)}  ({span(now - record.created_at)} ago)",
        "ran for" if record.is_terminal else "changed": lifetime(record, now)
        if record.is_terminal
        else f"{span(now - record.updated_at)} ago",
    }


def queue_text(record: Record) -> str | None:
    """Its queue and its priority, as far as they are not what they are of most."""
    parts = [record.queue] if record.queue != DEFAULT_QUEUE or record.priority else []
    return ", ".join([*parts, *[f"priority {record.priority}"] * bool(record.priority)]) or None


def waits_for(record: Record, now: float) -> str:
    """What it waits for, in words; "" if it does not wait. `record` is as `load` gives it."""
    if record.state != "waiting":
        return ""
    pending = snapshot_of(record).get("state", {}).get("pending", ())
    try:
        conditions = [waits.from_data(item["on"]) for item in pending if item.get("on")]
    except (LookupError, TypeError, ValueError):  # written by another version: the row knows the most of it
        conditions = []
    said = "; ".join(_in_words(each, now, False) for each in conditions) or awaited(record, now)
    return said or "somebody who resumes it"


def _in_words(condition: waits.Condition, now: float, inside: bool) -> str:
    match condition:
        case waits.OnChild(pid=pid):
            return f"process {short(pid)}"
        case waits.OnTime(at_s=at_s):
            return f"the time {moment(at_s)} ({_in(at_s - now)})"
        case waits.OnMessage(name=name, until_s=until_s):
            until = "" if until_s is None else f" (until {moment(until_s)}, {_in(until_s - now)})"
            return f"the message {name}{until}"
        case waits.OnMap(fan=fan):
            return f"a fan-out: {fan.next} of {fan.count} {class_name(fan.class_id)} begun, {len(fan.pids)} live"
        case waits.AllOf(items=items) | waits.AnyOf(items=items):
            one_of = isinstance(condition, waits.AnyOf)
            children = [item for item in items if isinstance(item, waits.OnChild)]
            parts = [_in_words(item, now, True) for item in items if item not in children or len(children) == 1]
            if len(children) > 1:
                parts.insert(0, f"{'one of ' if one_of else ''}{len(children)} processes")
            text = (" or " if one_of else " and ").join(parts)
            return f"({text})" if inside and len(parts) > 1 else text


def _in(seconds: float) -> str:
    return f"in {span(seconds)}" if seconds >= 0 else "now"


def context_of(record: Record) -> Mapping[str, Any]:
    """The context of a work chain; of children that have ended what they gave. `record` is as `load` gives it."""
    context = snapshot_of(record).get("context")
    return {} if not isinstance(context, Mapping) else {str(name): _told(value) for name, value in context.items()}


def _told(value: Any) -> Any:
    """A value with the results in it in short: their pid, and outputs or what else became of them."""
    match value:
        case ProcessResult():
            data = value.to_data()
            kept = {name: data.get(name) for name in ("outputs", "value", "exit_status", "exit_message")}
            return {"pid": value.pid, "state": value.state.value} | {name: part for name, part in kept.items() if part}
        case dict():
            return {name: _told(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_told(inner) for inner in value]
        case _:
            return value


def failure_text(failure: Failure) -> str:
    """The traceback, behind that of its cause."""
    text = without_our_frames(failure.traceback).rstrip() or str(failure)
    return f"{failure_text(failure.cause)}\n\nThe cause of:\n\n{text}" if failure.cause else text


def as_data(portrait: Portrait, children: Sequence[str], now: float) -> dict[str, Any]:
    """Everything, for programs. The names stay; more may come."""
    record, result = portrait.record, portrait.result
    snapshot = snapshot_of(record)
    data = result.to_data() if result else {}
    return record_as_data(record) | {
        "inputs": snapshot.get("inputs"),
        "context": context_of(record) or None,
        "waits_for": waits_for(record, now) or None,
        "steps": [asdict(run) for run in step_runs(record, portrait.history, now)],
        "children": list(children),
        "history": portrait.history,
        "outputs": data.get("outputs") if result else snapshot.get("outputs") or None,
        "value": data.get("value"),
        "exit_status": result.exit_status if result else None,
        "exit_message": result.exit_message if result else None,
        "failure": result.failure if result else None,
    }


def _is_retry(event: Event) -> bool:
    """The engine says so in the note of the transition to the wait between two attempts."""
    return event.subject == "running.waiting" and (event.note or "").startswith("attempt ")
