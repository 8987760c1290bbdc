"""What the broker decides: a pure machine. Messages, ticks and losses go in; effects come out.

It owns no socket, clock, file or randomness: `now` (seconds, monotone) and the broker epoch are given to it, and the
same calls give the same effects. Whoever runs it carries out the store effects, commits, and only then sends.

Rules
- A **session** is a peer, named by itself, the same across its connections. It is gone when it says so, when it was
  silent for `LEASE_S`, or when somebody proves it dead (`expired`). A lost connection proves nothing: `disconnected`
  only stops deliveries until the next `Hello`.
- A **task** is pending or held by one session under an epoch that rises with every delivery. Only the holder under the
  current epoch can settle it. It is given only against free credit, to the subscriber with the most of it: highest
  priority first, oldest first within one. A task that comes back keeps its place in that order.
- **Keys**: at most one task of a (queue, key) is pending, at most one of a key is held. A pending one whose key is held
  waits for the holder. A held one that comes back while its equal is pending is merged into that one.
- **Saying it again changes nothing**: a task id is stored once; the answers to what changed something are kept, in the
  same commit, until the client has seen them.
- After a restart the sessions on disk keep their tasks for one lease, so that live ones find their work untouched.
- **Questions** are routed to the one subscriber of a name, or refused at once. They are not stored: the caller says an
  unanswered one again to a new broker, the one who was asked recognises it and gives the same answer.
"""

from __future__ import annotations

import heapq
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import assert_never

import msgspec

from prunus.errors import (
    BusyError,
    DuplicateSubscriberError,
    Failure,
    IndeterminateError,
    PrunusError,
    StoreFullError,
    UnroutableError,
)
from prunus.messaging.messages import (
    Alive,
    BroadcastDelivery,
    BroadcastSend,
    BroadcastSubscribe,
    BroadcastUnsubscribe,
    BrokerMessage,
    Call,
    ClientMessage,
    Done,
    Goodbye,
    Heartbeat,
    Hello,
    HelloNeeded,
    Outcome,
    Peer,
    Refused,
    ResultSeen,
    RpcAnswer,
    RpcDelivery,
    RpcDone,
    RpcRequest,
    RpcSubscribe,
    RpcUnsubscribe,
    TaskAck,
    TaskDelivery,
    TaskNack,
    TaskResult,
    TaskSend,
    TaskStored,
    TaskSubscribe,
    TaskUnsubscribe,
    Violation,
    Welcome,
    encode,
)

LEASE_S = 15.0
"""A session of which nothing was heard for so long is gone."""
PAUSE_S = 5.0
"""If the broker itself did not look at its clock for so long, everybody gets a new lease."""
BACK_OFF_S = 0.05
"""A task that was rejected is offered again after this, doubled with each attempt ..."""
MAX_BACK_OFF_S = 5.0
"""... up to this."""
MAX_TASKS = 1_000_000
"""More are refused with `BusyError`."""
MAX_QUESTIONS = 10_000
"""Unanswered questions of one session; more are refused with `BusyError`."""
MAX_ANSWERS = 10_000
"""Answers kept for a session that has not said that it saw them."""
MAX_RETIRED = 256
"""Silent sessions whose answers are kept in case they come back."""
QUESTION_SLACK_S = 5.0
"""A question is forgotten so long after the caller stopped waiting."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it was accepted."""

    id: str
    queue: str
    key: str | None
    priority: int
    body: bytes
    order: int
    """Rises with each accepted task: the oldest first."""


class StoredTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it is on disk."""

    task: Task
    attempt: int = 0
    holder: str | None = None
    epoch: int = 0
    waiters: tuple[str, ...] = ()
    outcome: bytes | None = None
    """The frame of its `TaskResult`, once it is settled and as long as somebody waits for it."""


class StoredState(msgspec.Struct, frozen=True, kw_only=True):
    """All that survives the broker."""

    tasks: tuple[StoredTask, ...] = ()
    sessions: tuple[tuple[str, Peer], ...] = ()
    answers: tuple[tuple[str, int, bytes], ...] = ()
    """(session, request id, frame)"""


# --- effects ----------------------------------------------------------------------------------------


class _Effect(msgspec.Struct, frozen=True):
    pass


class StoreTask(_Effect, frozen=True):
    """Insert a pending task."""

    task: Task
    waiters: tuple[str, ...]


class HoldTask(_Effect, frozen=True):
    """The task is held by `session` under `epoch`."""

    task: str
    session: str
    epoch: int
    attempt: int


class ReleaseTask(_Effect, frozen=True):
    """The task is pending again."""

    task: str


class SetWaiters(_Effect, frozen=True):
    """Who waits for the result of the task."""

    task: str
    waiters: tuple[str, ...]


class SettleTask(_Effect, frozen=True):
    """The task is done; its result is kept for those who wait for it."""

    task: str
    outcome: bytes


class DeleteTask(_Effect, frozen=True):
    task: str


class SaveSession(_Effect, frozen=True):
    session: str
    peer: Peer


class ForgetSession(_Effect, frozen=True):
    session: str


class SaveAnswer(_Effect, frozen=True):
    """Keep the answer to a request that changed something."""

    session: str
    request: int
    frame: bytes


class DropAnswers(_Effect, frozen=True):
    """Forget the answers of `session` to its requests below `below`."""

    session: str
    below: int


class Send(_Effect, frozen=True):
    """Send after the commit. To a session without a connection it is dropped: all is said again after its `Hello`."""

    session: str
    message: BrokerMessage | bytes


StoreEffect = (
    StoreTask
    | HoldTask
    | ReleaseTask
    | SetWaiters
    | SettleTask
    | DeleteTask
    | SaveSession
    | ForgetSession
    | SaveAnswer
    | DropAnswers
)
Effect = StoreEffect | Send


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What the broker has in hand; for people and for tests."""

    broker_epoch: int
    sessions: int
    connected: int
    pending: dict[str, int]
    """Tasks by queue."""
    held: dict[str, int]
    """Tasks by session."""
    questions: int
    identifiers: int
    broadcast_subscriptions: int
    answers_kept: int
    accepted: int
    settled: int
    delivered: int
    """Since the broker started."""


# --- the core ---------------------------------------------------------------------------------------


class BrokerCore:
    """See the module. Every method that takes `now` returns the effects in the order in which they must happen."""

    def __init__(
        self, broker_epoch: int, now: float = 0.0, state: StoredState | None = None, *, lease_s: float = LEASE_S
    ) -> None:
        self.broker_epoch = broker_epoch
        self.refuse_new: str | None = None
        """The path of the full disk: new tasks are refused with `StoreFullError`, everything else goes on."""
        self.hold_back = False
        """No task is delivered: whoever got one now could do nothing with it."""
        self._lease_s = lease_s
        self._out: list[Effect] = []
        self._now = now
        self._deliveries = 0
        self._orders = 0
        self._accepted = self._settled = 0
        self._sessions: dict[str, _Session] = {}
        self._awaited: dict[str, None] = {}
        self._unrouted: dict[tuple[str, int], None] = {}
        self._answers: OrderedDict[str, _Answers] = OrderedDict()
        self._tasks: dict[str, _Task] = {}
        self._queues: dict[str, _Queue] = {}
        self._dirty: dict[str, None] = {}
        self._pending_keys: dict[tuple[str, str], str] = {}
        self._held_keys: dict[str, str] = {}
        self._blocked: dict[str, list[str]] = {}
        self._delayed: list[tuple[float, int, str]] = []
        self._identifiers: dict[str, tuple[str, int]] = {}
        self._questions: dict[tuple[str, int], _Question] = {}
        self._exact: dict[str, dict[tuple[str, int], _Pattern]] = {}
        self._patterns: dict[tuple[str, int], _Pattern] = {}
        if state is not None:
            self._restore(state, now)

    # --- what comes in ---

    def handle(self, now: float, session: str, message: ClientMessage) -> list[Effect]:
        """A message of `session`. All but `Hello` need a session that is known; `Call` is not for the core."""
        self._advance(now)
        known = self._sessions.get(session)
        if isinstance(message, Hello):
            self._hello(session, message)
        elif known is None or not known.connected:
            self._send(session, HelloNeeded())
        else:
            known.last_heard = self._now
            self._handle(session, known, message)
        return self._finish()

    def tick(self, now: float) -> list[Effect]:
        """Let time pass: leases end, rejected tasks are offered again, old questions are forgotten."""
        self._advance(now)
        for session in [name for name, known in self._sessions.items() if now - known.last_heard > self._lease_s]:
            self._leave(session, keep_answers=True)
        while self._delayed and self._delayed[0][0] <= now:
            _, _, task_id = heapq.heappop(self._delayed)
            task = self._tasks.get(task_id)
            if task is not None and task.place == "delayed":
                self._make_ready(task)
        for key in [key for key, question in self._questions.items() if question.forget_at <= now]:
            self._forget_question(key)
        return self._finish()

    def due(self) -> float:
        """When `tick` has something to do next, at the latest in a second."""
        return min(self._now + 1.0, self._delayed[0][0] if self._delayed else self._now + 1.0)

    def disconnected(self, session: str) -> list[Effect]:
        """Its connection is gone: nothing is delivered to it until it says `Hello` again."""
        known = self._sessions.get(session)
        if known is not None:
            known.connected = False
        return self._finish()

    def expired(self, session: str) -> list[Effect]:
        """It is certainly dead: its tasks go to others at once."""
        if session in self._sessions:
            self._leave(session, keep_answers=True)  # were it alive after all, nothing must be done twice
        return self._finish()

    # --- for whoever runs calls ---

    def heard(self, now: float, session: str) -> bool:
        """`session` made a call; whether it is known here."""
        self._advance(now)
        known = self._sessions.get(session)
        if known is None or not known.connected:
            return False
        known.last_heard = self._now
        return True

    def known_answer(self, session: str, request: int) -> Send | None:
        """What was said to this request before, if it changed something; `Refused` if that is forgotten."""
        kept = self._answers.get(session)
        if kept is None:
            return None
        if (frame := kept.frames.get(request)) is not None:
            return Send(session, frame)
        if request < kept.below:
            return Send(session, _refused(request, IndeterminateError(f"request {request}")))
        return None

    def answer(self, session: str, request: int, frame: bytes) -> list[Effect]:
        """Answer a request that changed something, and remember the answer."""
        self._answer(session, request, frame)
        return self._finish()

    def settle(self, session: str, task_id: str, epoch: int) -> list[Effect]:
        """`session` acknowledges a task as part of a call; a late one is ignored."""
        task = self._held(session, task_id, epoch)
        if task is not None:
            self._ack(task, None)
        return self._finish()

    def put(self, task_id: str, queue: str, key: str | None, body: bytes, priority: int) -> list[Effect]:
        """A new task of the broker's own making, in the same commit as what caused it."""
        self._put(task_id, queue, key, body, priority, ())
        return self._finish()

    def broadcast(self, body: bytes, sender: str | None, subject: str | None) -> list[Effect]:
        """A broadcast of the broker's own making; it leaves after the commit of what it is about."""
        self._broadcast(body, sender, subject)
        return self._finish()

    # --- what can be asked ---

    def sessions(self) -> dict[str, Peer]:
        """The sessions that are not gone."""
        return {name: known.peer for name, known in self._sessions.items()}

    def has_task(self, key: str) -> bool:
        """Whether a task with this key is pending or held."""
        return key in self._held_keys or any((queue, key) in self._pending_keys for queue in self._queues)

    def statistics(self) -> Statistics:
        pending: dict[str, int] = {}
        held: dict[str, int] = {}
        for task in self._tasks.values():
            if task.holder is not None:
                held[task.holder] = held.get(task.holder, 0) + 1
            elif task.outcome is None:
                pending[task.task.queue] = pending.get(task.task.queue, 0) + 1
        return Statistics(
            broker_epoch=self.broker_epoch,
            sessions=len(self._sessions),
            connected=sum(known.connected for known in self._sessions.values()),
            pending=pending,
            held=held,
            questions=len(self._questions),
            identifiers=len(self._identifiers),
            broadcast_subscriptions=sum(len(known.patterns) for known in self._sessions.values()),
            answers_kept=sum(len(kept.frames) for kept in self._answers.values()),
            accepted=self._accepted,
            settled=self._settled,
            delivered=self._deliveries,
        )

    # --- one message ---

    def _handle(self, session: str, known: _Session, message: ClientMessage) -> None:
        match message:
            case Heartbeat():
                self._drop_answers(session, message.seen)
                self._send(session, Alive())
            case Goodbye():
                self._send(session, Done(id=message.id))
                self._leave(session, keep_answers=False)
            case TaskSend():
                self._task_send(session, message)
            case TaskSubscribe():
                self._subscribe(session, known, message.queue, message.credit)
                self._send(session, Done(id=message.id))
            case TaskUnsubscribe():
                known.queues.pop(message.queue, None)
                self._queue(message.queue).subscribers.pop(session, None)
                self._send(session, Done(id=message.id))
            case TaskAck():
                task = self._held(session, message.task, message.epoch)
                if task is not None:
                    self._ack(task, message.outcome)
                self._send(session, Done(id=message.id, stale=task is None))
            case TaskNack():
                task = self._held(session, message.task, message.epoch)
                if task is not None:
                    back_off_s = min(BACK_OFF_S * 2 ** min(task.attempt - 1, 20), MAX_BACK_OFF_S)
                    self._give_back(task, self._now + back_off_s)
                self._send(session, Done(id=message.id, stale=task is None))
            case ResultSeen():
                if (task := self._tasks.get(message.task)) is not None:
                    self._forget_waiter(task, session)
            case RpcSubscribe():
                if self._take_identifier(session, known, message.identifier, 0):
                    self._send(session, Done(id=message.id))
                else:
                    self._send(session, _refused(message.id, DuplicateSubscriberError(message.identifier)))
            case RpcUnsubscribe():
                known.identifiers.pop(message.identifier, None)
                if self._identifiers.get(message.identifier, ("", 0))[0] == session:
                    del self._identifiers[message.identifier]
                self._send(session, Done(id=message.id))
            case RpcRequest():
                self._ask(session, known, message)
            case RpcAnswer():
                question = self._questions.get((message.caller, message.id))
                if question is not None and question.recipient == session:
                    self._forget_question((message.caller, message.id))
                    self._send(message.caller, RpcDone(id=message.id, outcome=message.outcome))
            case BroadcastSubscribe():
                self._add_pattern(session, known, message.subscription, message.sender, message.subject)
                self._send(session, Done(id=message.id))
            case BroadcastUnsubscribe():
                self._remove_pattern(session, known, message.subscription)
                self._send(session, Done(id=message.id))
            case BroadcastSend():
                self._broadcast(message.body, message.sender, message.subject)
                self._send(session, Done(id=message.id))
            case Call() | Hello():
                self._send(session, Violation(reason=f"{type(message).__name__} is out of place here"))
            case _:
                assert_never(message)

    # --- sessions ---

    def _hello(self, session: str, hello: Hello) -> None:
        known = self._sessions.get(session)
        if known is None:
            self._sessions[session] = known = _Session(hello.peer, self._now)
            self._out.append(SaveSession(session, hello.peer))
        known.connected, known.last_heard = True, self._now
        self._awaited.pop(session, None)
        self._drop_answers(session, hello.seen)

        stated = dict(hello.held)
        held = {task_id: self._tasks[task_id] for task_id in known.held}
        lost = [task_id for task_id, epoch in hello.held if task_id not in held or held[task_id].epoch != epoch]
        taken = []
        for identifier in [name for name in known.identifiers if name not in dict(hello.identifiers)]:
            del known.identifiers[identifier], self._identifiers[identifier]
        for identifier, since in hello.identifiers:
            if not self._take_identifier(session, known, identifier, since):
                taken.append(identifier)
        self._send(session, Welcome(broker_epoch=self.broker_epoch, lost=tuple(lost), taken=tuple(taken)))

        for task_id, task in held.items():
            if stated.get(task_id) != task.epoch:
                self._give_back(task)
        for queue in [name for name in known.queues if name not in dict(hello.queues)]:
            del known.queues[queue]
            self._queue(queue).subscribers.pop(session, None)
        for queue, credit in hello.queues:
            self._subscribe(session, known, queue, credit)
        for subscription in list(known.patterns):
            self._remove_pattern(session, known, subscription)
        for subscription, sender, subject in hello.patterns:
            self._add_pattern(session, known, subscription, sender, subject)
        self._say_results(session, known, hello)
        for key in list(known.asked):
            question = self._questions[key]
            self._send(session, _delivery(key, question))

    def _say_results(self, session: str, known: _Session, hello: Hello) -> None:
        for task_id in list(known.waits):
            task = self._tasks[task_id]
            if task.outcome is not None:
                if task_id in hello.awaited or task_id in hello.expected:
                    self._send(session, task.outcome)
                else:
                    self._forget_waiter(task, session)
        for task_id in hello.awaited:
            if task_id not in known.waits:
                outcome = Failure.of(IndeterminateError(f"task {task_id}"))
                self._send(session, TaskResult(task=task_id, outcome=outcome))

    def _leave(self, session: str, *, keep_answers: bool) -> None:
        known = self._sessions.pop(session)
        self._awaited.pop(session, None)
        for queue in known.queues:
            self._queue(queue).subscribers.pop(session, None)
        for identifier in known.identifiers:
            del self._identifiers[identifier]
        for subscription in list(known.patterns):
            self._remove_pattern(session, known, subscription)
        for task_id in list(known.waits):
            self._forget_waiter(self._tasks[task_id], session, known)
        for task_id in list(known.held):  # after that: one that is merged with its equal has no waiters here any more
            self._give_back(self._tasks[task_id], owner=known)
        for key in list(known.asked):
            question = self._questions[key]
            self._forget_question(key, known)
            self._send(key[0], _refused(key[1], IndeterminateError(question.identifier)))
        for key in [key for key in self._questions if key[0] == session]:
            self._forget_question(key)
        self._out.append(ForgetSession(session))
        if not keep_answers:
            self._drop_answers(session)
        while len(self._answers) > MAX_RETIRED + len(self._sessions):
            self._drop_answers(next(name for name in self._answers if name not in self._sessions))

    # --- answers that are kept ---

    def _answer(self, session: str, request: int, frame: bytes) -> None:
        kept = self._answers.setdefault(session, _Answers())
        kept.frames[request] = frame
        self._out.append(SaveAnswer(session, request, frame))
        self._out.append(Send(session, frame))
        if len(kept.frames) > MAX_ANSWERS:
            self._drop_answers(session, next(iter(kept.frames)) + 1)

    def _drop_answers(self, session: str, below: int | None = None) -> None:
        """Those below `below`, or all."""
        kept = self._answers.get(session)
        if kept is None:
            return
        if below is None:
            del self._answers[session]
            self._out.append(DropAnswers(session, 2**63 - 1))
            return
        gone = list(takewhile(lambda request: request < below, kept.frames))  # ids rise, so the oldest stand first
        for request in gone:
            del kept.frames[request]
        kept.below = max(kept.below, below)
        if gone:
            self._out.append(DropAnswers(session, below))

    # --- tasks ---

    def _task_send(self, session: str, message: TaskSend) -> None:
        if (said := self.known_answer(session, message.id)) is not None:
            self._out.append(said)
            return
        if message.task not in self._tasks:
            if self.refuse_new is not None:
                self._send(session, _refused(message.id, StoreFullError(self.refuse_new)))
                return
            if len(self._tasks) >= MAX_TASKS:
                self._send(session, _refused(message.id, BusyError(f"the broker has {MAX_TASKS:,} tasks already")))
                return
        waiters = (session,) if message.want_result else ()
        task_id = self._put(message.task, message.queue, message.key, message.body, message.priority, waiters)
        stored = TaskStored(id=message.id, task=task_id, stored=task_id == message.task)
        if stored.stored:
            self._answer(session, message.id, encode(stored))
        else:
            self._send(session, stored)

    def _put(
        self, task_id: str, queue: str, key: str | None, body: bytes, priority: int, waiters: tuple[str, ...]
    ) -> str:
        """Store a task, unless it or a pending one with the same key is there; the id of the one that is."""
        if task_id in self._tasks:
            return task_id
        if key is not None and (same := self._pending_keys.get((queue, key))) is not None:
            task = self._tasks[same]
            if added := tuple(waiter for waiter in waiters if waiter not in task.waiters):
                self._set_waiters(task, task.waiters + added)
            return same
        self._orders += 1
        self._accepted += 1
        data = Task(id=task_id, queue=queue, key=key, priority=priority, body=body, order=self._orders)
        task = self._tasks[task_id] = _Task(data)
        self._out.append(StoreTask(data, waiters))
        for waiter in waiters:
            task.waiters += (waiter,)
            self._sessions[waiter].waits[task_id] = None
        self._make_ready(task)
        return task_id

    def _held(self, session: str, task_id: str, epoch: int) -> _Task | None:
        task = self._tasks.get(task_id)
        return task if task is not None and task.holder == session and task.epoch == epoch else None

    def _ack(self, task: _Task, outcome: Outcome) -> None:
        self._let_go(task)
        self._settled += 1
        if not task.waiters:
            self._delete(task)
            return
        task.outcome = encode(TaskResult(task=task.task.id, outcome=outcome))
        task.place = "settled"
        self._out.append(SettleTask(task.task.id, task.outcome))
        for waiter in task.waiters:
            self._out.append(Send(waiter, task.outcome))

    def _give_back(self, task: _Task, not_before: float | None = None, owner: _Session | None = None) -> None:
        self._let_go(task, owner)
        key = task.task.key
        if key is not None and (same := self._pending_keys.get((task.task.queue, key))) is not None:
            pending = self._tasks[same]  # it says the same: one of them is enough
            outcome = TaskResult(task=task.task.id, outcome=Failure.of(IndeterminateError(f"task {task.task.id}")))
            for waiter in task.waiters:
                self._send(waiter, outcome)
            pending.attempt = max(pending.attempt, task.attempt)
            self._delete(task)
            return
        self._out.append(ReleaseTask(task.task.id))
        if not_before is None:
            self._make_ready(task)
            return
        task.place = "delayed"
        if key is not None:
            self._pending_keys[task.task.queue, key] = task.task.id
        heapq.heappush(self._delayed, (not_before, task.task.order, task.task.id))

    def _make_ready(self, task: _Task) -> None:
        data = task.task
        if data.key is not None:
            self._pending_keys[data.queue, data.key] = data.id
            if data.key in self._held_keys:
                task.place = "blocked"
                self._blocked.setdefault(data.key, []).append(data.id)
                return
        task.place = "ready"
        heapq.heappush(self._queue(data.queue).ready, (-data.priority, data.order, data.id))
        self._dirty[data.queue] = None

    def _let_go(self, task: _Task, owner: _Session | None = None) -> None:
        """The holder has it no more; those that waited for its key are offered."""
        assert task.holder is not None, "only a held task can be let go"
        holder, task.holder = task.holder, None
        data = task.task
        known = owner or self._sessions[holder]
        del known.held[data.id]
        known.busy[data.queue] -= 1
        self._dirty[data.queue] = None
        if data.key is not None:
            del self._held_keys[data.key]
            for blocked in self._blocked.pop(data.key, ()):
                self._make_ready(self._tasks[blocked])

    def _delete(self, task: _Task) -> None:
        del self._tasks[task.task.id]
        for waiter in task.waiters:
            if (known := self._sessions.get(waiter)) is not None:
                known.waits.pop(task.task.id, None)
        self._out.append(DeleteTask(task.task.id))

    def _set_waiters(self, task: _Task, waiters: tuple[str, ...]) -> None:
        for waiter in waiters:
            if (known := self._sessions.get(waiter)) is not None:
                known.waits[task.task.id] = None
        task.waiters = waiters
        self._out.append(SetWaiters(task.task.id, waiters))

    def _forget_waiter(self, task: _Task, session: str, owner: _Session | None = None) -> None:
        if session not in task.waiters:
            return
        known = owner or self._sessions[session]
        known.waits.pop(task.task.id, None)
        rest = tuple(waiter for waiter in task.waiters if waiter != session)
        if rest or task.outcome is None:
            self._set_waiters(task, rest)
        else:
            self._delete(task)

    def _subscribe(self, session: str, known: _Session, queue: str, credit: int) -> None:
        known.queues[queue] = credit
        self._queue(queue).subscribers.setdefault(session, 0)
        self._dirty[queue] = None

    def _queue(self, name: str) -> _Queue:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = _Queue()
        return queue

    def _dispatch(self, name: str) -> None:
        """Give out the tasks of a queue as long as somebody has room."""
        queue = self._queue(name)
        while queue.ready:
            _, _, task_id = queue.ready[0]
            task = self._tasks.get(task_id)
            if task is None or task.place != "ready":
                heapq.heappop(queue.ready)
                continue
            session = self._roomiest(name, queue)
            if session is None:
                return
            heapq.heappop(queue.ready)
            data = task.task
            if data.key is not None:
                if data.key in self._held_keys:
                    task.place = "blocked"
                    self._blocked.setdefault(data.key, []).append(task_id)
                    continue
                del self._pending_keys[name, data.key]
                self._held_keys[data.key] = task_id
            known = self._sessions[session]
            known.held[task_id] = None
            known.busy[name] = known.busy.get(name, 0) + 1
            self._deliveries += 1
            queue.subscribers[session] = self._deliveries
            task.place, task.holder = "held", session
            task.attempt += 1
            task.epoch = (self.broker_epoch << 32) + self._deliveries
            self._out.append(HoldTask(task_id, session, task.epoch, task.attempt))
            delivery = TaskDelivery(
                task=task_id, queue=name, key=data.key, body=data.body, epoch=task.epoch, attempt=task.attempt
            )
            self._send(session, delivery)

    def _roomiest(self, name: str, queue: _Queue) -> str | None:
        """The connected subscriber with the most free credit; of equals the one that was served longest ago."""
        best: tuple[int, int] = (0, 0)
        chosen = None
        for session, served in queue.subscribers.items():
            known = self._sessions[session]
            free = known.queues[name] - known.busy.get(name, 0) if known.connected else 0
            if free > 0 and (chosen is None or (free, -served) > best):
                best, chosen = (free, -served), session
        return chosen

    # --- questions ---

    def _take_identifier(self, session: str, known: _Session, identifier: str, since: int) -> bool:
        owner, mine_since = self._identifiers.get(identifier, (session, since or self.broker_epoch))
        if owner != session:
            known.identifiers.pop(identifier, None)
            return False
        self._identifiers[identifier] = session, mine_since
        known.identifiers[identifier] = None
        for key in [key for key in self._unrouted if self._questions[key].identifier == identifier]:
            self._route(key, self._questions[key])
        return True

    def _ask(self, session: str, known: _Session, message: RpcRequest) -> None:
        key = session, message.id
        if key in self._questions:
            return  # it was said again; its answer is on the way
        if known.questions >= MAX_QUESTIONS:
            self._send(session, _refused(message.id, BusyError(f"{MAX_QUESTIONS:,} of your questions are open")))
            return
        resent = message.since not in (0, self.broker_epoch)
        owner = self._identifiers.get(message.recipient)
        if owner is None and not self._awaited:
            self._send(session, _refused(message.id, UnroutableError(message.recipient)))
            return
        forget_at = self._now + message.timeout_s + QUESTION_SLACK_S
        question = _Question(message.recipient, message.body, forget_at, message.since if resent else None)
        self._questions[key] = question
        known.questions += 1
        self._unrouted[key] = None
        if owner is not None:
            self._route(key, question)

    def _route(self, key: tuple[str, int], question: _Question) -> None:
        session, since = self._identifiers[question.identifier]
        if question.since is not None and since > question.since:
            # Said to the broker before this one, and the name has changed hands: the one who was asked can't tell.
            self._forget_question(key)
            self._send(key[0], _refused(key[1], IndeterminateError(question.identifier)))
            return
        del self._unrouted[key]
        question.recipient = session
        self._sessions[session].asked[key] = None
        self._send(session, _delivery(key, question))

    def _forget_question(self, key: tuple[str, int], owner: _Session | None = None) -> None:
        question = self._questions.pop(key)
        self._unrouted.pop(key, None)
        if (caller := self._sessions.get(key[0])) is not None:
            caller.questions -= 1
        recipient = owner or self._sessions.get(question.recipient or "")
        if recipient is not None:
            recipient.asked.pop(key, None)

    # --- broadcasts ---

    def _add_pattern(
        self, session: str, known: _Session, subscription: int, sender: str | None, subject: str | None
    ) -> None:
        self._remove_pattern(session, known, subscription)
        known.patterns[subscription] = sender
        pattern = _Pattern(matcher(sender), matcher(subject))
        if sender is not None and "*" not in sender:
            self._exact.setdefault(sender, {})[session, subscription] = pattern
        else:
            self._patterns[session, subscription] = pattern

    def _remove_pattern(self, session: str, known: _Session, subscription: int) -> None:
        if subscription not in known.patterns:
            return
        sender = known.patterns.pop(subscription)
        if sender is not None and "*" not in sender:
            del self._exact[sender][session, subscription]
            if not self._exact[sender]:
                del self._exact[sender]
        else:
            del self._patterns[session, subscription]

    def _broadcast(self, body: bytes, sender: str | None, subject: str | None) -> None:
        candidates = [self._patterns]
        if sender is not None and sender in self._exact:
            candidates.append(self._exact[sender])
        receivers: dict[str, None] = {}
        for patterns in candidates:
            for (session, _), pattern in patterns.items():
                if session not in receivers and pattern.sender(sender) and pattern.subject(subject):
                    receivers[session] = None
        delivery = BroadcastDelivery(body=body, sender=sender, subject=subject)
        for session in receivers:
            self._send(session, delivery)

    # --- the rest ---

    def _restore(self, state: StoredState, now: float) -> None:
        for name, peer in state.sessions:
            self._sessions[name] = _Session(peer, now)
            self._awaited[name] = None
        for name, request, frame in state.answers:
            self._answers.setdefault(name, _Answers()).frames[request] = frame
        for stored in sorted(state.tasks, key=lambda stored: stored.task.order):
            data = stored.task
            self._orders = max(self._orders, data.order)
            task = self._tasks[data.id] = _Task(data, stored.attempt, stored.epoch, outcome=stored.outcome)
            task.waiters = tuple(waiter for waiter in stored.waiters if waiter in self._sessions)
            for waiter in task.waiters:
                self._sessions[waiter].waits[data.id] = None
            holder = self._sessions.get(stored.holder or "")
            if stored.outcome is not None:
                task.place = "settled"
                if not task.waiters:
                    self._delete(task)
            elif stored.holder is not None and holder is not None:
                task.place, task.holder = "held", stored.holder
                holder.held[data.id] = None
                holder.busy[data.queue] = holder.busy.get(data.queue, 0) + 1
                if data.key is not None:
                    self._held_keys[data.key] = data.id
            elif data.key is not None and (data.queue, data.key) in self._pending_keys:
                self._delete(task)
            else:
                if stored.holder is not None:
                    self._out.append(ReleaseTask(data.id))
                self._make_ready(task)
        for task in [task for task in self._tasks.values() if task.place == "ready" and task.task.key is not None]:
            if task.task.key in self._held_keys:
                task.place = "blocked"
                self._blocked.setdefault(task.task.key or "", []).append(task.task.id)

    def _advance(self, now: float) -> None:
        if now - self._now > PAUSE_S:  # nobody listened meanwhile: silence was ours
            for known in self._sessions.values():
                known.last_heard = now
        self._now = max(self._now, now)

    def _send(self, session: str, message: BrokerMessage | bytes) -> None:
        self._out.append(Send(session, message))

    def _finish(self) -> list[Effect]:
        if self._unrouted and not self._awaited:
            for key in list(self._unrouted):
                identifier = self._questions[key].identifier
                self._forget_question(key)
                self._send(key[0], _refused(key[1], UnroutableError(identifier)))
        while self._dirty and not self.hold_back:
            name, _ = self._dirty.popitem()
            self._dispatch(name)
        effects, self._out = self._out, []
        return effects


# --- what it remembers ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Session:
    peer: Peer
    last_heard: float
    connected: bool = False
    queues: dict[str, int] = field(default_factory=dict)
    """Credit by queue."""
    busy: dict[str, int] = field(default_factory=dict)
    """How many tasks of a queue it holds."""
    held: dict[str, None] = field(default_factory=dict)
    waits: dict[str, None] = field(default_factory=dict)
    """Tasks whose result it waits for."""
    identifiers: dict[str, None] = field(default_factory=dict)
    patterns: dict[int, str | None] = field(default_factory=dict)
    """The sender pattern of each broadcast subscription: where to find it in the index."""
    asked: dict[tuple[str, int], None] = field(default_factory=dict)
    """Questions that it has to answer."""
    questions: int = 0
    """How many it asked itself."""


@dataclass(slots=True)
class _Task:
    task: Task
    attempt: int = 0
    epoch: int = 0
    place: str = ""
    """ready, blocked (its key is held), delayed (it was rejected), held or settled"""
    holder: str | None = None
    waiters: tuple[str, ...] = ()
    outcome: bytes | None = None


@dataclass(slots=True)
class _Queue:
    ready: list[tuple[int, int, str]] = field(default_factory=list)
    """A heap of (-priority, order, id). An entry whose task is elsewhere meanwhile is skipped."""
    subscribers: dict[str, int] = field(default_factory=dict)
    """session -> the number of its last delivery"""


@dataclass(slots=True)
class _Question:
    identifier: str
    body: bytes
    forget_at: float
    since: int | None
    """The epoch of the broker to which it was said before this one."""
    recipient: str | None = None
    """None: nobody has the name yet, but sessions are still expected back."""


@dataclass(slots=True)
class _Answers:
    frames: dict[int, bytes] = field(default_factory=dict)
    below: int = 0
    """The answers to requests below this were seen, or are forgotten."""


@dataclass(slots=True)
class _Pattern:
    sender: Callable[[str | None], object]
    subject: Callable[[str | None], object]


def matcher(pattern: str | None) -> Callable[[str | None], object]:
    """Says whether a sender or a subject matches `pattern`: ``*`` is any run of characters, None matches everything."""
    if pattern is None:
        return lambda _: True
    if "*" not in pattern:
        return lambda text: text == pattern
    match_all = re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL).fullmatch
    return lambda text: text is not None and match_all(text)


def _refused(request: int, error: PrunusError) -> Refused:
    return Refused(
        id=request, failure=Failure(f"{PrunusError.__module__}.{type(error).__name__}", str(error), facts=error.facts())
    )


def _delivery(key: tuple[str, int], question: _Question) -> RpcDelivery:
    return RpcDelivery(caller=key[0], id=key[1], identifier=question.identifier, body=question.body)
