"""The judge of a soak: what the callers did and heard, what the steps wrote, and what the rows say in the end.

It knows nothing of how the daemon works. What must hold:

- what was launched is there, once, and has ended;
- killed is what somebody killed, or whose parent was killed, and nothing else; what was answered as killed is killed;
- excepted is what should fail, and nothing else;
- what finished took all of its steps; the messages that it took are those that were accepted, each once and in the
  order of their sender; each update that was accepted has changed it, once;
- no step begins again whose successor has begun;
- a schedule launched as many runs as it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Heard = Literal["ok", "refused", "unknown"]
"""What a caller was answered: it is done, it had no effect, or it may have happened."""


@dataclass
class Told:
    """What was said to one process from outside."""

    launched: Heard = "unknown"
    fails: bool = False
    steps: int | None = None
    """That it has to take; None: it is a schedule."""
    kills: list[Heard] = field(default_factory=list)
    notes: dict[int, list[tuple[str, Heard]]] = field(default_factory=dict)
    """By sender, in the order in which they were sent."""
    updates: list[tuple[str, Heard]] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """How a process stands in the end."""

    pid: str
    state: str
    parent: str | None = None
    outputs: Mapping[str, Any] = field(default_factory=dict)


def judge(told: Mapping[str, Told], ends: Sequence[End], steps: Mapping[str, Sequence[int]]) -> list[str]:
    """What is wrong, as sentences. `steps` are the numbers of the steps that began, by process, in their order."""
    rows = {end.pid: end for end in ends}
    wrong = [
        f"doubled: {pid} is there {times} times" for pid, times in Counter(e.pid for e in ends).items() if times > 1
    ]
    wrong += [f"lost: {pid} was launched, and is not there" for pid, said in told.items() if _is_lost(pid, said, rows)]
    for end in ends:
        wrong += _wrong_end(end, told.get(end.pid), rows, told)
    for pid, numbers in steps.items():
        wrong += _wrong_steps(pid, numbers)
        if pid not in rows:
            wrong.append(f"invented: {pid} took steps, and is not there")
    return wrong


def _is_lost(pid: str, said: Told, rows: Mapping[str, End]) -> bool:
    return said.launched == "ok" and pid not in rows


def _wrong_end(end: End, said: Told | None, rows: Mapping[str, End], told: Mapping[str, Told]) -> Iterable[str]:
    if said is None and end.parent is None:
        yield f"invented: nobody launched {end.pid}"
    if said is not None and said.launched == "refused":
        yield f"refused, yet there: {end.pid}"
    kills = said.kills if said is not None else []
    is_to_fail = said is not None and said.fails
    match end.state:
        case "killed":
            if not {"ok", "unknown"} & set(kills) and not _has_killed_parent(end, rows):
                yield f"killed by nobody: {end.pid}"
        case "excepted":
            if not is_to_fail:
                yield f"excepted without a reason: {end.pid}"
        case "finished":
            if is_to_fail:
                yield f"finished, and should have failed: {end.pid}"
            if said is not None:
                yield from _wrong_outputs(end, said)
        case state:
            yield f"has not ended: {end.pid} is {state}"
    if "ok" in kills and end.state != "killed":
        yield f"answered as killed, and {end.state}: {end.pid}"


def _has_killed_parent(end: End, rows: Mapping[str, End]) -> bool:
    return end.parent is not None and end.parent in rows and rows[end.parent].state == "killed"


def _wrong_outputs(end: End, said: Told) -> Iterable[str]:
    outputs = end.outputs
    if said.steps is None:
        return
    if outputs.get("taken") != said.steps:
        yield f"finished after {outputs.get('taken')} of {said.steps} steps: {end.pid}"
    used = list(outputs.get("notes", ()))
    for sender, sent in said.notes.items():
        names = [name for name, _ in sent]
        mine = [note for note in used if note in names]
        if mine != sorted(set(mine), key=names.index):
            yield f"messages doubled or out of order: {end.pid} took {mine} of caller {sender}"
        passed = names.index(mine[-1]) if mine else -1
        skipped = [name for name, heard in sent[: passed + 1] if heard == "ok" and name not in mine]
        if skipped:
            yield f"a message was lost: {end.pid} did not take {skipped}, but later ones"
        if refused := [name for name, heard in sent if heard == "refused" and name in mine]:
            yield f"a message was refused, yet taken: {end.pid}: {refused}"
    if invented := set(used) - {name for sent in said.notes.values() for name, _ in sent}:
        yield f"messages of nobody: {end.pid}: {sorted(invented)}"
    applied = list(outputs.get("applied", ()))
    if len(applied) != len(set(applied)):
        yield f"an update was applied twice: {end.pid}: {applied}"
    for what, heard in said.updates:
        if (heard == "ok" and what not in applied) or (heard == "refused" and what in applied):
            yield f"the update {what} of {end.pid} was answered as {heard}, and applied is {applied}"


def _wrong_steps(pid: str, numbers: Sequence[int]) -> Iterable[str]:
    highest = 0
    for number in numbers:
        if number < highest:
            yield f"a step that was checkpointed ran again: {pid}: {list(numbers)}"
            return
        highest = number


def missed_runs(schedule: End, ends: Iterable[End]) -> list[str]:
    """Runs that a finished schedule says it has launched, and that are not there, or are more."""
    runs = [end for end in ends if end.parent == schedule.pid]
    said = schedule.outputs.get("runs")
    wrong = [f"a run of a schedule is {run.state}: {run.pid}" for run in runs if run.state != "finished"]
    if said != len(runs):
        wrong.append(f"the schedule {schedule.pid} launched {said} runs, and {len(runs)} are there")
    return wrong
