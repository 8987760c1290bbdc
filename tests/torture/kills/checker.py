"""The independent judge: from the journals of clients and workers, and from what is left in the database.

It knows nothing of how the broker works. Every body is unique, so one pass over the events is enough. What must hold:

- a confirmed task is settled, or still in the database (nothing confirmed is lost);
- a refused task is never delivered, and what is delivered was sent (nothing is invented);
- one body is one task (saying it again stores it once);
- a delivery has an epoch that no other delivery of that task has (one holder at a time);
- at most one acknowledgement of a task is accepted, and it is that of the last delivery (nothing is settled twice, or
  by a holder whose time was over);
- a result is that of a settled task.

An acknowledgement that was sent and never heard to be accepted may have been: its worker or its broker died, and an
answer that is asked for again says "stale".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from tests.torture.kills.journal import Event


@dataclass
class _Task:
    body: str
    epochs: Counter[int] = field(default_factory=Counter)
    acked: set[int] = field(default_factory=set)
    """Epochs under which an acknowledgement left."""
    accepted: list[int] = field(default_factory=list)
    holder: str = ""
    """Who got it last."""


class History:
    """What the events say, put together."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.sent: set[str] = set()
        self.confirmed: dict[str, str] = {}
        self.refused: set[str] = set()
        self.results: set[str] = set()
        self.tasks: dict[str, _Task] = {}
        self.stale = 0
        acks: dict[tuple[str, int], tuple[str, int]] = {}
        answered: set[tuple[str, int]] = set()
        for event in events:
            request = event.session, event.request
            match event.kind:
                case "invoke":
                    self.sent.add(event.body)
                case "ok":
                    self.confirmed[event.body] = event.task
                case "fail":
                    self.refused.add(event.body)
                case "result":
                    self.results.add(event.body)
                case "delivery":
                    seen = self.tasks.setdefault(event.task, _Task(event.body))
                    if event.epoch >= max(seen.epochs, default=0):
                        seen.holder = event.who
                    seen.epochs[event.epoch] += 1
                case "ack":
                    acks[request] = event.task, event.epoch
                    self.tasks[event.task].acked.add(event.epoch)
                case "accepted":
                    if request in acks and request not in answered:
                        task, epoch = acks[request]
                        self.tasks[task].accepted.append(epoch)
                    answered.add(request)
                case "stale":
                    self.stale += 1
                    answered.add(request)
                case "unknown":
                    pass

    def unsettled(self) -> list[str]:
        """The confirmed bodies of whose end nothing is known."""
        ended = {task for task, seen in self.tasks.items() if max(seen.epochs) in seen.acked}
        return [body for body, task in self.confirmed.items() if task not in ended]

    def in_hand(self, worker: str) -> dict[str, int]:
        """The confirmed tasks that it got last and did not acknowledge, with their epochs."""
        last = {task: max(seen.epochs) for task, seen in self.tasks.items() if seen.holder == worker}
        confirmed = set(self.confirmed.values())
        return {
            task: epoch for task, epoch in last.items() if task in confirmed and epoch not in self.tasks[task].acked
        }


def check(history: History, left: Collection[str]) -> list[str]:
    """What is wrong, as sentences; `left` are the tasks in the database at the end."""
    complaints = []
    unsettled = set(history.unsettled())
    for body, task in history.confirmed.items():
        if body in unsettled and task not in left:
            complaints.append(f"lost: {body} (task {task}) was confirmed, is not settled and not in the database")
    ids: dict[str, list[str]] = {}
    for task, seen in history.tasks.items():
        ids.setdefault(seen.body, []).append(task)
        last = max(seen.epochs)
        if seen.body not in history.sent:
            complaints.append(f"invented: task {task} with the body {seen.body} was delivered, and nobody sent it")
        if seen.body in history.refused:
            complaints.append(f"refused, yet done: {seen.body} was delivered as task {task}")
        if len(seen.accepted) > 1:
            complaints.append(f"settled twice: task {task} ({seen.body}) under the epochs {seen.accepted}")
        for epoch in seen.accepted:
            if epoch != last:
                complaints.append(
                    f"doubled past an epoch: task {task} ({seen.body}) was settled under {epoch}, "
                    f"and was delivered under {last}"
                )
        for epoch, times in seen.epochs.items():
            if times > 1:
                complaints.append(f"delivered twice under one epoch: task {task} ({seen.body}), {times} x {epoch}")
    for body, tasks in ids.items():
        if len(tasks) > 1:
            complaints.append(f"doubled: {body} was stored as the tasks {', '.join(tasks)}")
    for body in history.results:
        task = history.confirmed.get(body, "")
        if task not in history.tasks or not history.tasks[task].acked:
            complaints.append(f"a result of nobody: {body} (task {task}) has one, and nobody acknowledged it")
    return complaints
