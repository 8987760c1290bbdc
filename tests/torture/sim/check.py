"""What must hold, whatever happened: the invariants I1-I15 and the bounds L1-L5 of the reliability reference.

`release` looks at the disk when the broker speaks, `Auditor` at its tables after commits, `delivery` at each task as it
comes, `death` at what a dead worker held, `after_heal` at everybody when all should work again, and `at_the_end` at the
whole history. Each complaint names the invariant. (Where each is checked, here and elsewhere: docs/how-we-test.md.)
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from prunus.messaging.exchange import Exchange
from prunus.messaging.messages import LEASE_S, TaskDelivery
from tests.torture.sim.disk import Disk
from tests.torture.sim.history import Delivered, History, Sent

if TYPE_CHECKING:
    from tests.torture.sim.messaging import MessagingWorld
    from tests.torture.sim.peers import SimPeer

DEADLINE_SLACK_S = 1.0
"""How much later than its deadline a question may end."""
CLOCK_SLACK_S = 0.01
LET_GO_S = 1.0
"""What a dead worker held is let go so soon after the proof, or after the end of its lease."""
NOTICE_S = 0.1
"""How long that proof, or a batch, takes at most."""
HELD_KEYS = """
    SELECT key, count(*) FROM broker_task WHERE holder IS NOT NULL AND key IS NOT NULL AND outcome IS NULL
    GROUP BY key HAVING count(*) > 1"""
HELD_BY = "SELECT id FROM broker_task WHERE holder = ? AND outcome IS NULL AND NOT dead"
HELD = "SELECT id, queue, holder, epoch, resources FROM broker_task WHERE holder IS NOT NULL"
LEFT = "SELECT id, queue, key, holder, attempt, outcome FROM broker_task WHERE NOT dead"
DEAD = "SELECT id, reason, attempt, max_attempts, expires_at FROM broker_task WHERE dead"
LEDGER_LEFT = "SELECT pid FROM ledger WHERE NOT closed"
LEDGER_LOG = "SELECT pid, epoch, value FROM ledger_log ORDER BY n"
NO_EFFECT = ("NotDeliveredError", "BusyError", "StoreFullError", "UnknownResourceError", "UnroutableError")
"""Errors that say: it certainly did not happen."""


class Dead(NamedTuple):
    """A dead letter."""

    task: str
    reason: str | None
    attempt: int
    max_attempts: int
    expires_at: float


def release(disk: Disk) -> str | None:
    """The broker is about to speak: what it says must follow from commits that succeeded (I7)."""
    if disk.connection.in_transaction:
        return "I7: the broker speaks before it has committed"
    return "I7: the broker speaks after a commit that failed" if disk.has_refused else None


class Auditor:
    """What the tables say, commit by commit."""

    def __init__(self, disk: Disk, history: History) -> None:
        self._disk, self._history = disk, history
        self._epochs: dict[str, int] = {}
        self._held_before: dict[str, int] = {}

    def look(self, exchange: Exchange[int]) -> None:
        for key, count in self._disk.connection.execute(HELD_KEYS).fetchall():
            self._history.complain(f"keys: {count} tasks of {key!r} are held")
        in_queue: Counter[str] = Counter()
        taken: Counter[str] = Counter()
        for task, queue, holder, epoch, resources in self._disk.connection.execute(HELD).fetchall():
            in_queue[queue] += 1
            taken.update(dict(json.loads(resources or "[]")))
            if epoch < self._epochs.get(task, 0):
                self._history.complain(f"I3: the epoch of {task} went from {self._epochs[task]} to {epoch}")
            self._epochs[task] = epoch
            end = self._history.acked.get(task)
            if end is not None:
                self._history.complain(f"I8: {task} is held by {holder}, and ended under {end.epoch}")
        statistics = exchange.statistics()
        for name, one in statistics.queues.items():
            limit = one.limits.concurrency
            held = max(in_queue[name], one.held)
            # (More may have been held before there was a limit.)
            if limit is not None and held > max(limit, self._held_before.get(name, held)):
                self._history.complain(f"I13: {held} tasks of {name!r} are held, of {limit}")
            if limit is not None:
                self._held_before[name] = held
        for name, tokens in statistics.resources.items():
            if tokens.capacity is not None and taken[name] > tokens.capacity:
                self._history.complain(f"I13: {taken[name]} of {tokens.capacity} {name!r} are taken")
            if tokens.taken < taken[name]:
                self._history.complain(f"{taken[name]} {name!r} are taken, and the broker believes {tokens.taken}")

    def is_empty(self) -> bool:
        return not self.left()

    def left(self) -> list[tuple[object, ...]]:
        """Tasks that somebody should still work on, and pids that are not closed."""
        rows = self._disk.connection.execute(LEFT).fetchall()
        return rows + self._disk.connection.execute(LEDGER_LEFT).fetchall()

    def dead(self) -> list[Dead]:
        """The dead letters."""
        return [Dead(*row) for row in self._disk.connection.execute(DEAD).fetchall()]


def delivery(world: MessagingWorld, sent: Sent, record: Delivered, message: TaskDelivery) -> None:
    """A task that a client sent has come to a worker."""
    if sent.ending == "fail":
        world.complain(f"I15: {sent.task} is delivered, and its sender was told {sent.error}")
    if sent.joined is not None and sent.joined != sent.task:
        world.complain(f"I2: {sent.task} is delivered, and its sender was told that {sent.joined} stands for it")
    if message.body != sent.task.encode() or (message.queue, message.key) != (sent.queue, sent.key):
        world.complain(f"{sent.task} is delivered as something else: {message}")
    if sent.max_attempts and record.attempt > sent.max_attempts and sent.task not in world.history.edited:
        world.complain(f"I12: {sent.task} is delivered for the {record.attempt}th time of {sent.max_attempts}")
    if "wall_jump" in world.profile or "skew" in world.profile:
        return
    wall = world.broker.clock.wall(world.timeline.now)
    if sent.not_before > wall + CLOCK_SLACK_S and sent.task not in world.history.edited:
        world.complain(f"{sent.task} is delivered {sent.not_before - wall:.3f} s before its time")


def death(world: MessagingWorld, peer: SimPeer) -> None:
    """A worker has just died. L2: soon nothing is held by it any more, so that others can have it.

    Only where one broker lives and is awake all the while: a new one gives everybody a new lease, and so does one that
    stood still.
    """
    broker, died_at = world.broker, world.timeline.now
    starts = len(broker.epochs)
    last_words = [one.up_at for one in world.network.connections.values() if one.endpoint is peer]
    patience_s = LET_GO_S + (LEASE_S if "no_proof" in world.profile else 0.0)

    def look() -> None:
        was_there = broker.exchange is not None and len(broker.epochs) == starts
        if not was_there or broker.paused_until > died_at:
            return
        world.count("deaths of workers looked at")
        if held := world.disk.connection.execute(HELD_BY, (peer.session,)).fetchall():
            world.complain(f"L2: {peer.session} is dead since {died_at:.4f}, and still holds {held}")

    world.timeline.at(max(died_at, *last_words) + patience_s / broker.clock.rate + NOTICE_S, None, look)


def after_heal(world: MessagingWorld) -> None:
    """L3: soon after the last fault everybody is connected again, and served."""
    for peer in world.peers.values():
        if not peer.core.up and not peer.leaving:
            world.complain(f"L3: {peer.session} is not connected 5 s after the last fault")


def at_the_end(world: MessagingWorld) -> None:
    """Everything that the history must not show."""
    _epochs(world)
    _tasks(world)
    _order(world)
    _results(world)
    _questions(world)
    _ledger(world)
    _broadcasts(world)


def _epochs(world: MessagingWorld) -> None:
    for before, after in pairwise(world.broker.epochs):
        if after <= before:
            world.complain(f"I11: the broker epoch went from {before} to {after}")


def _tasks(world: MessagingWorld) -> None:
    history, dead = world.history, {one.task: one for one in world.auditor.dead()}
    runs = [one for same in history.delivered.values() for one in same]
    ended = {one.task for one in runs if one.ending in ("acked", "unknown")}
    # Whoever says an acknowledgement again that has had its effect is told that it is stale.
    ended |= {one.task for one in runs if one.ending == "stale" and one.session in history.resenders}
    merged = _merged(world)
    for sent in history.sent.values():
        if sent.ending == "ok" and sent.joined is None and sent.task not in ended:
            if sent.task in dead or sent.task in merged or "delete" in history.edited.get(sent.task, ()):
                continue
            world.complain(f"I1: {sent.task} ({sent.queue}, {sent.key}) was confirmed, and is lost: never done")
        if sent.joined is not None:
            other = history.sent.get(sent.joined)
            if other is not None and (other.queue, other.key) != (sent.queue, sent.key):
                world.complain(f"I2: {sent.task} was joined with {sent.joined}, which has another key")
    for one in dead.values():
        world.count("dead letters")
        if not one.reason:
            world.complain(f"L4: {one.task} is a dead letter without a reason")
        spent = 0 < one.max_attempts <= one.attempt
        if not spent and not one.expires_at and one.task not in history.edited:
            world.complain(f"I12: {one.task} is dead ({one.reason}) after {one.attempt} of {one.max_attempts} attempts")
        if one.task in history.acked and one.task not in history.edited:
            world.complain(f"I8: {one.task} is dead ({one.reason}), and ended before")


def _merged(world: MessagingWorld) -> set[str]:
    """Tasks that may have ended in another one of their key: those that came back while their equal was pending, and
    those that were replaced."""
    equals: dict[tuple[str, str], list[str]] = {}
    for sent in world.history.sent.values():
        if sent.key is not None and sent.ending != "fail":
            equals.setdefault((sent.queue, sent.key), []).append(sent.task)
    return {task for tasks in equals.values() if len(tasks) > 1 for task in tasks}


def _order(world: MessagingWorld) -> None:
    """Oldest first within a priority, and higher priorities first: in the order of the epochs of the first deliveries.

    Only where no broker died: one that dies between a commit and a send has given away what nobody heard of.
    """
    history = world.history
    if world.broker.deaths or world.broker.stops:
        return
    plain = [
        (*history.dispatched[sent.task], sent)
        for sent in history.sent.values()
        if sent.plain and sent.ending == "ok" and sent.task in history.dispatched and sent.task not in history.edited
    ]
    plain.sort(key=lambda one: one[0])
    for position, (_, _, later) in enumerate(plain):
        for _, given_at, earlier in plain[:position]:
            if earlier.queue != later.queue or earlier.priority > later.priority:
                continue
            if later.priority > earlier.priority:
                was_there = later.ended < given_at
            else:
                was_there = later.ended < earlier.invoked
                was_there |= later.session == earlier.session and later.number < earlier.number
            if was_there:
                world.complain(f"order: {earlier.task} was given away before {later.task}, which was there before it")


def _results(world: MessagingWorld) -> None:
    history = world.history
    for (session, task), results in history.results.items():
        if len(results) > history.waiting[session, task]:
            world.complain(f"{session} got {len(results)} results of {task}: {results}")
        sent = history.sent.get(task)
        stayed = "sleep" not in world.profile and session not in history.left
        if stayed and results[0] == "failure IndeterminateError" and sent is not None and sent.key is None:
            world.complain(f"{session} was not away for so long, and is told that nobody knows what became of {task}")
        end = history.acked.get(task)
        if end is not None and results[0] != f"done {task} {end.epoch}" and results[0].startswith("done"):
            world.complain(f"{session} got {results[0]!r}, and {task} ended under {end.epoch}")


def _questions(world: MessagingWorld) -> None:
    for asked in world.history.asked.values():
        if len(asked.runs) > 1:
            world.complain(f"I9: {asked.body} was handled {len(asked.runs)} times: {asked.runs}")
        if asked.ending == "open":
            world.complain(f"I9: {asked.body} was never answered")
        answers = [f"answer {asked.body} {run}" for run in asked.runs]
        if asked.ending == "ok" and asked.answer not in answers and not (asked.answer or "").startswith("failure"):
            world.complain(f"I9: {asked.body} was answered with {asked.answer!r}, and handled by {asked.runs}")
        if asked.ending == "fail" and asked.error in NO_EFFECT and asked.runs:
            world.complain(f"I15: {asked.body} was handled by {asked.runs}, and its caller was told {asked.error}")
        paused = "pause_peer" in world.profile or "sleep" in world.profile
        if asked.ending in ("ok", "fail") and not paused and asked.ended > asked.deadline + DEADLINE_SLACK_S:
            world.complain(f"I9: {asked.body} ended {asked.ended - asked.deadline:.1f} s after its deadline")


def _ledger(world: MessagingWorld) -> None:
    history = world.history
    log = world.disk.connection.execute(LEDGER_LOG).fetchall()
    epochs: dict[str, int] = {}
    for pid, epoch, value in log:
        if epoch < epochs.get(pid, 0):
            world.complain(f"I3: {pid} was written under {epoch} ({value}) after {epochs[pid]}")
        epochs[pid] = max(epoch, epochs.get(pid, 0))
    values = [value for _, _, value in log]
    there = set(values)
    if len(there) != len(values):
        world.complain(f"I4: written twice: {sorted(value for value in there if values.count(value) > 1)}")
    for written in history.written:
        if written.ending == "ok" and written.value not in there:
            world.complain(f"I1: {written.value} of {written.pid} was confirmed, and is lost")
        if written.ending == "fail" and written.value in there:
            world.complain(f"I15: {written.value} of {written.pid} is there, and its writer was told {written.error}")


def _broadcasts(world: MessagingWorld) -> None:
    history = world.history
    for (listener, sender), numbers in history.heard.items():
        if sender in history.resenders:
            continue  # what it said again may be heard again, and in another order
        if any(after <= before for before, after in pairwise(numbers)):
            world.complain(f"I10: {listener} heard {sender} in this order: {numbers}")
    for peer in world.peers.values():
        if peer.session in history.listening and peer.session not in history.resenders and not peer.leaving:
            _holes(world, peer)


def _holes(world: MessagingWorld, peer: SimPeer) -> None:
    """Who was connected all the while has heard what was for him, or was told how many he missed."""
    history = world.history
    mine = [said for said in history.said.values() if peer.wants(said.session.rpartition(".")[0], said.subject)]
    holes = [said for said in mine if said.number not in history.heard.get((peer.session, said.session), ())]
    since = history.listening[peer.session]
    least = sum(said.ending == "ok" and said.invoked >= since for said in holes)
    # What is said again after a reconnection may be missed twice, or heard and missed.
    most = float("inf") if any(said.session in history.resenders for said in mine) else len(holes)
    world.count("listeners whose holes were counted")
    told = history.missed[peer.session]
    if not least <= told <= most:
        world.complain(f"I10: {peer.session} did not hear {least} to {most} broadcasts, and is told of {told}")
