"""What the broker decides: a pure machine. Messages, ticks and losses go in; effects come out.

It owns no socket, clock, file or randomness: `now` (seconds, monotone), the wall-clock time and the broker epoch are
given to it, and the same calls give the same effects. Whoever runs it writes what `take_changes` hands over, commits,
and only then sends what it was told to send.

Rules
- A **session** is a peer, named by itself, the same across its connections. It is gone when it says so, when it was
  silent for `LEASE_S`, or when somebody proves it dead (`expired`). A lost connection proves nothing: `disconnected`
  only stops deliveries until the next `Hello`. The secret of its first `Hello` is asked of every later one.
- **Tasks** are the business of `queues`: who gets which, and when.
- **Saying it again changes nothing**: a client's requests have rising ids, and it says all that are unanswered again
  after each `Hello`. For each client the broker remembers below which id every `TaskSend` was done, and which of them
  were not (refused, or lost on the way): what the answer to a done one was, follows. Other answers to what changed
  something are kept. All of it is written in the commit of what it is about, and forgotten when the client has seen it.
- After a restart the sessions on disk keep their tasks for one lease, so that live ones find their work untouched.
- **Questions** are routed to the one subscriber of a name, or refused at once. They are not stored: the caller says an
  unanswered one again to a new broker, the one who was asked recognises it and gives the same answer.
- **A peer that does not read** gets no questions (their callers are told at once) and no broadcasts; how many it missed
  it is told when it reads again.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import assert_never

import msgspec

from prunus.errors import (
    BlobNotFoundError,
    BusyError,
    DuplicateSubscriberError,
    Failure,
    IndeterminateError,
    ProtocolError,
    PrunusError,
    StoreFullError,
    UnroutableError,
)
from prunus.messaging.inventory import QueueLimits, SessionStatistics, Statistics, TaskInfo, shown_host
from prunus.messaging.messages import (
    LEASE_S,
    MAX_IDENTIFIERS,
    MAX_PATTERNS,
    MAX_TASK_SUBSCRIPTIONS,
    Alive,
    BlobGet,
    BlobPut,
    BroadcastDelivery,
    BroadcastSend,
    BroadcastSubscribe,
    BroadcastUnsubscribe,
    BrokerMessage,
    Call,
    ClientMessage,
    Done,
    Edited,
    Goodbye,
    Heartbeat,
    Hello,
    HelloNeeded,
    Missed,
    Peer,
    QueueConfigure,
    Refused,
    ResourceConfigure,
    ResultSeen,
    RpcAnswer,
    RpcDelivery,
    RpcDone,
    RpcRequest,
    RpcSubscribe,
    RpcUnsubscribe,
    StatisticsAsk,
    TaskAck,
    TaskEdit,
    TaskList,
    TaskNack,
    TaskResult,
    TaskSend,
    TaskStored,
    TaskSubscribe,
    TaskUnsubscribe,
    Unwelcome,
    Violation,
    Welcome,
    decode_from_broker,
    encode,
)
from prunus.messaging.patterns import is_exact, matcher
from prunus.messaging.queues import (
    FRAME_COST_BYTES,
    MAX_GIVEN_BYTES,
    Deliver,
    Keep,
    Needs,
    Send,
    Task,
    TaskQueues,
    dead_letter,
    needs_of,
)

PAUSE_S = 5.0
"""If the broker itself did not look at its clock for so long, everybody gets a new lease."""
TICK_S = 1.0
"""How often clocks are looked at, at least."""
MAX_SESSIONS = 10_000
"""A `Hello` of one more is refused with `BusyError`."""
MAX_FORMER_NAMES = 100_000
"""Identifiers of which is remembered that somebody had and left them; with more, every one is taken for such."""
MAX_QUESTIONS = 10_000
"""Unanswered questions of one session; more are refused with `BusyError`."""
MAX_ANSWERS = 10_000
"""Answers kept for a client that has not said that it saw them, and requests of which is known that they were not done.
"""
MAX_RETIRED = 256
"""Clients that were silent for too long, but are remembered in case they come back ..."""
RESULTS_KEPT_S = 7 * 86_400.0
"""... and so long the results for which they waited are kept."""
EDITED_AT_ONCE = 1_000
"""Of an edit of more tasks so many are done in one go, and then others have their turn."""
MAX_EDITS = 4
"""Edits of more tasks that go on at the same time; one more is refused with `BusyError`."""
OWN_TASKS = "broker:"
"""How the ids of the broker's own tasks begin, and those of nobody else."""
QUESTION_SLACK_S = 5.0
"""A question is forgotten so long after the caller stopped waiting."""


class Client(msgspec.Struct):
    """What is remembered of a client, also when its session is gone."""

    secret: bytes | None = None
    """The digest of its secret; None: it did not yet say one."""
    done: int = 1
    """Each `TaskSend` below this id was done ..."""
    undone: dict[int, None] = {}
    """... but not these."""
    answers: dict[int, bytes] = {}
    """By request, the frames of answers that do not follow from this."""
    below: int = 0
    """The answers to requests below this were seen, or are forgotten."""
    asked: dict[int, str] = {}
    """The session to which each of its questions went."""

    turn: int = 0
    """Of its last `Hello` in the life of this broker: what comes from an earlier life comes on no connection."""

    def joined(self) -> Iterator[str]:
        """The tasks that stand for some of its own, of which it may not have heard."""
        for frame in self.answers.values():
            if isinstance(answer := decode_from_broker(frame), TaskStored):
                yield answer.task


class StoredState(msgspec.Struct, frozen=True, kw_only=True):
    """All that survives the broker."""

    tasks: Iterable[Task] = ()
    sessions: tuple[tuple[str, Peer], ...] = ()
    clients: tuple[tuple[str, Client], ...] = ()
    answers: tuple[tuple[str, int, bytes], ...] = ()
    """(session, request id, frame)"""
    limits: Mapping[str, QueueLimits] = {}
    resources: Mapping[str, int | None] = {}


class Changes(msgspec.Struct, kw_only=True):
    """What has to be stored. None: it is to be forgotten."""

    tasks: list[Task] = []
    """Those without a place are gone."""
    sessions: dict[str, Peer | None] = {}
    clients: dict[str, Client | None] = {}
    marks: dict[str, Client] = {}
    """Those of which only what they have done is new."""
    dropped: dict[str, int] = {}
    """By session: forget the answers to its requests below this ..."""
    answers: dict[tuple[str, int], bytes] = {}
    """... and then keep these, by session and request."""
    limits: dict[str, QueueLimits] = {}
    resources: dict[str, int | None] = {}

    def __bool__(self) -> bool:
        return bool(
            self.tasks
            or self.sessions
            or self.clients
            or self.marks
            or self.dropped
            or self.answers
            or self.limits
            or self.resources
        )


# --- effects ----------------------------------------------------------------------------------------


class Came(msgspec.Struct, frozen=True):
    """A session is known from now on."""

    session: str
    peer: Peer


class Left(msgspec.Struct, frozen=True):
    """A session is gone."""

    session: str
    lost: Peer | None = None
    """Where it lived, if it was lost: it died, or was silent for too long. None: it said goodbye, or this broker has
    never heard it (then they may have gone down together)."""


class Show(msgspec.Struct, frozen=True):
    """Answer a question for tasks."""

    session: str
    request: int
    tasks: list[Task]
    more: bool
    bodies: bool


class Tell(msgspec.Struct, frozen=True):
    """Send what came of a task that is over, which only the store may know."""

    session: str
    task: Task


class Describe(msgspec.Struct, frozen=True):
    """Answer a question for statistics."""

    session: str
    request: int


Effect = Send | Keep | Deliver | Came | Left | Show | Tell | Describe


# --- the core ---------------------------------------------------------------------------------------


class BrokerCore:
    """See the module. Every method that takes `now` returns the effects in the order in which they must happen."""

    def __init__(
        self,
        broker_epoch: int,
        now: float = 0.0,
        state: StoredState | None = None,
        *,
        wall: float = 0.0,
        lease_s: float = LEASE_S,
    ) -> None:
        self.broker_epoch = broker_epoch
        self.wall = wall
        """Wall-clock time in seconds since 1970, to be set before every call."""
        self.refuse_new: str | None = None
        """The path of the full disk: new tasks are refused with `StoreFullError`, everything else goes on."""
        self.is_stuck: Callable[[str], bool] = lambda session: False
        """Whether a session does not read what is sent to it."""
        self.blob_size: Callable[[str], int | None] = lambda digest: None
        """The size of a blob; None: it is not there."""
        self._lease_s = lease_s
        self._out: list[Effect] = []
        self._now = self._started = self._ticked = now
        self._sessions: dict[str, _Session] = {}
        self._awaited: dict[str, None] = {}
        self._unrouted: dict[tuple[str, int], None] = {}
        self._clients: dict[str, Client] = {}
        self._retired: dict[str, float] = {}
        """Clients whose session ended by itself, and when, in this order ..."""
        self._departed: dict[str, None] = {}
        """... and those that said goodbye."""
        self._identifiers: dict[str, tuple[str, int]] = {}
        self._former_names: set[str] | None = set()
        """Identifiers that somebody had and left since the start; None: too many to be told apart."""
        self._questions: dict[tuple[str, int], _Question] = {}
        self._exact: dict[str, dict[tuple[str, int], _Pattern]] = {}
        self._patterns: dict[tuple[str, int], _Pattern] = {}
        self._missed: dict[str, int] = {}
        """Broadcasts that were dropped and of which their receiver does not know yet."""
        self._missed_count = 0
        self._untold: dict[str, deque[str | tuple[str, int]]] = {}
        """By session, the tasks whose results it is to be told, and the questions, when it has read others."""
        self._edits: deque[_EditInHand] = deque()
        """Those of many tasks that go on, in turn."""
        self._changes = Changes()
        self._queues = TaskQueues(broker_epoch, now, self._out.append)
        self._queues.wall = wall
        if state is not None:
            self._restore(state)

    # --- what comes in ---

    def handle(self, now: float, session: str, message: ClientMessage) -> list[Effect]:
        """A message of `session`. All but `Hello` need a session that is known; calls and blobs are not for
        the core."""
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

    def refusal(self, hello: Hello) -> BusyError | ProtocolError | None:
        """Why this `Hello` is refused; None if it is not. A session belongs to whoever said its first one."""
        client = self._clients.get(hello.session)
        if client is not None and client.secret is not None:
            if not hmac.compare_digest(client.secret, _digest(hello.secret)):
                return ProtocolError(f"the session {hello.session!r} belongs to somebody else; choose another name")
        elif hello.session not in self._sessions and len(self._sessions) >= MAX_SESSIONS:
            return BusyError(f"the bound of {MAX_SESSIONS:,} sessions is reached; try again when some are gone")
        for what, number, limit in (
            ("task subscriptions", len(hello.queues) + len(hello.filtered), MAX_TASK_SUBSCRIPTIONS),
            ("broadcast subscriptions", len(hello.patterns), MAX_PATTERNS),
            ("identifiers", len(hello.identifiers), MAX_IDENTIFIERS),
        ):
            if number > limit:
                return BusyError(f"{number:,} {what} are over the limit of {limit:,}; cancel some")
        if hello.session not in self._awaited:  # who was here before the restart gets back what it had
            try:
                self._queues.check_queues((*(one[0] for one in hello.queues), *(one[0] for one in hello.filtered)))
            except BusyError as error:
                return error.with_traceback(None)
        return None

    def is_late(self, hello: Hello) -> bool:
        """Whether what it says is not true any more: the same session has said a later one."""
        client = self._clients.get(hello.session)
        return client is not None and 0 < hello.turn <= client.turn

    def tick(self, now: float) -> list[Effect]:
        """Let time pass: leases end, tasks are due or expire, old questions are forgotten."""
        self._advance(now)
        self._ticked = now
        for session in [name for name, known in self._sessions.items() if now - known.last_heard > self._lease_s]:
            self._leave(session)
        for session, since in self._retired.items():
            if now - since <= RESULTS_KEPT_S:
                break
            self._queues.forget_waits(session)
        self._queues.tick()
        for key in [key for key, question in self._questions.items() if question.forget_at <= now]:
            self._forget_question(key)
        for session in list(self._missed):
            self._say_missed(session)
        return self._finish()

    def go_on(self) -> list[Effect]:
        """Give more to those who have read what they were given, and do some more of an edit that is not done yet."""
        have_read = self._have_read()
        for session in have_read:
            if session in self._untold:
                self._tell_more(session)
            else:
                self._queues.go_on(session)
        if not self._has_more():
            return self._finish() if have_read else []
        edit = self._edits.popleft()
        if not self._continue_edit(edit):
            self._edits.append(edit)
        return self._finish()

    def due(self) -> float:
        """When `tick` or `go_on` has something to do next, at the latest a second after the last tick, however much is
        said meanwhile (and the wall clock may jump)."""
        return self._now if self._has_more() or self._have_read() else min(self._ticked + TICK_S, self._queues.due())

    def disconnected(self, session: str) -> None:
        """Its connection is gone: nothing is delivered to it until it says `Hello` again."""
        known = self._sessions.get(session)
        if known is not None:
            known.connected = False
            self._untold.pop(session, None)
            self._queues.disconnect(session)

    def expired(self, session: str) -> list[Effect]:
        """It is certainly dead: its tasks go to others at once, and no result is kept for it."""
        self._queues.forget_waits(session)
        if session in self._sessions:
            self._leave(session)  # were it alive after all, nothing must be done twice: its client is remembered
        return self._finish()

    def forget_dead(self, before: float, limit: int) -> tuple[int, list[Effect]]:
        """Forget dead letters that died before this wall-clock time, up to `limit`; how many."""
        return self._queues.forget_dead(before, limit), self._finish()

    def damaged(self, task: Task, reason: str) -> list[Effect]:
        """The body of a task that was to be delivered can't be read: it is a dead letter."""
        self._queues.damaged(task, reason)
        return self._finish()

    @property
    def hold_back(self) -> bool:
        """No task is delivered: whoever got one now could do nothing with it."""
        return self._queues.hold_back

    @hold_back.setter
    def hold_back(self, yes: bool) -> None:
        self._queues.hold_back = yes

    def take_changes(self, *, lasting: bool = False) -> Changes:
        """What has to be written before anything is sent. `lasting`: only what a broker that starts again can't learn
        from its clients; the rest stays for later."""
        changes, self._changes = self._changes, Changes()
        changes.tasks = self._queues.take_changes(lasting=lasting)
        if lasting:
            self._changes.sessions, changes.sessions = changes.sessions, {}
            self._changes.clients, changes.clients = changes.clients, {}
            self._changes.marks, changes.marks = changes.marks, {}
            self._changes.dropped, changes.dropped = changes.dropped, {}
        return changes

    # --- for whoever runs calls ---

    def heard(self, now: float, session: str, request: int) -> bool:
        """`session` made a call; whether it is known here."""
        self._advance(now)
        known = self._sessions.get(session)
        if known is None or not known.connected:
            return False
        known.last_heard = self._now
        self._count(session, self._clients[session], request)
        return True

    def known_answer(self, session: str, request: int) -> Send | None:
        """What was said to this request before, if it changed something; `Refused` if that is forgotten."""
        client = self._clients[session]
        if (frame := client.answers.get(request)) is not None:
            return Send(session, frame)
        if request < client.below:
            return Send(session, _refused(request, IndeterminateError(f"request {request}")))
        return None

    def answer(self, session: str, request: int, frame: bytes) -> list[Effect]:
        """Answer a request that changed something, and remember the answer."""
        self._answer(session, request, frame)
        return self._finish()

    def holds(self, session: str, task_id: str, epoch: int) -> bool:
        """Whether `session` holds this task under this epoch."""
        return self._queues.held(session, task_id, epoch) is not None

    def settle(self, session: str, task_id: str, epoch: int) -> list[Effect]:
        """`session` acknowledges a task as part of a call; a late one is ignored. What this frees is given away by
        `dispatch`, or by whatever happens next."""
        task = self._queues.held(session, task_id, epoch)
        if task is not None:
            self._queues.settle(task, None)
        return self._gathered()

    def put(
        self,
        task_id: str,
        queue: str,
        key: str | None,
        body: bytes,
        priority: int,
        depth: int = 0,
        needs: Needs = (),
    ) -> list[Effect]:
        """A new task of the broker's own making, in the same commit as what caused it; not if its key is pending. It is
        taken whatever the limits are, and waits if nobody has what it needs. `dispatch` gives it away, once all are
        there of which one may be more urgent."""
        if self._queues.pending(queue, key) is None:
            self._queues.put(task_id, queue, body, key=key, priority=priority, depth=depth, needs=needs)
        return self._gathered()

    def drop(self, key: str) -> list[Effect]:
        """Nothing is left to be done about `key`: of the pending tasks with it those of the broker's own making go."""
        for task in self._queues.pending_with(key):
            if task.id.startswith(OWN_TASKS):
                self._queues.delete(task)
        return self._gathered()

    def is_served(self, queue: str) -> bool:
        """Whether anybody subscribes to this queue, who may be away for the moment."""
        return self._queues.is_served(queue)

    def dispatch(self) -> list[Effect]:
        """Give out tasks as long as somebody has room."""
        return self._finish()

    def check_room(self, queue: str, needs: Needs) -> None:
        """Raises what a sender of such a task would be refused with: `BusyError`, `UnknownResourceError`."""
        self._queues.check_room(queue, None, needs, new=True)

    def check_needs(self, needs: Needs) -> None:
        """Raises `UnknownResourceError` if a task with these needs would wait until somebody configures a resource."""
        self._queues.check_needs(needs)

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
        return self._queues.has_key(key)

    def own_tasks(self, limit: int) -> list[str]:
        """The keys of up to `limit` pending tasks of the broker's own making."""
        return list(islice((key for key, task in self._queues.pending_keys() if task.id.startswith(OWN_TASKS)), limit))

    def info(self, task: Task) -> TaskInfo:
        """A task, as it is seen from outside."""
        return self._queues.info(task)

    def statistics(self, who: Callable[[str], tuple[str, str | None]] = lambda session: ("worker", None)) -> Statistics:
        """What the broker has in hand. `who` says the role of a session and the key with which it came."""
        sessions = {}
        for name, known in self._sessions.items():
            role, key = who(name)
            subscriptions = len(self._queues.subscriptions(name)) + len(known.patterns) + len(known.identifiers)
            sessions[name] = SessionStatistics(
                connected=known.connected,
                host=shown_host(known.peer.host),
                pid=known.peer.pid,
                role=role,
                key=key,
                silent_s=self._now - known.last_heard,
                round_trip_s=known.round_trip_s or None,
                held=len(self._queues.held_by(name)),
                credit=self._queues.credit_of(name),
                subscriptions=subscriptions,
                questions=known.questions,
            )
        return Statistics(
            broker_epoch=self.broker_epoch,
            uptime_s=self._now - self._started,
            queues=self._queues.queue_statistics(),
            resources=self._queues.resource_statistics(),
            sessions=sessions,
            questions=len(self._questions),
            identifiers=len(self._identifiers),
            broadcast_subscriptions=sum(len(known.patterns) for known in self._sessions.values()),
            answers_kept=sum(len(client.answers) for client in self._clients.values()),
            accepted=self._queues.accepted,
            settled=self._queues.settled,
            delivered=self._queues.delivered,
            broadcasts_missed=self._missed_count,
        )

    # --- one message ---

    def _handle(self, session: str, known: _Session, message: ClientMessage) -> None:
        if isinstance(message, TaskSend):
            self._task_send(session, message)
            return
        if (request := getattr(message, "id", None)) is not None and not isinstance(message, RpcAnswer):
            self._count(session, self._clients[session], request)
        match message:
            case TaskAck():
                task = self._queues.held(session, message.task, message.epoch)
                if task is not None:
                    self._queues.settle(task, message.outcome)
                    self._send(session, Done(id=message.id))
                else:
                    there = self._queues.get(message.task)
                    over = there is None or there.place == "settled"
                    self._send(session, Done(id=message.id, stale=True, over=over))
            case TaskNack():
                task = self._queues.held(session, message.task, message.epoch)
                if task is not None:
                    self._queues.reject(task, message.reason, attempted=message.attempted)
                self._send(session, Done(id=message.id, stale=task is None))
            case Heartbeat():
                known.round_trip_s = message.round_trip_s
                self._seen(session, self._clients[session], message.seen)
                self._send(session, Alive())
            case Goodbye():
                self._send(session, Done(id=message.id))
                self._leave(session, for_good=True)
            case TaskSubscribe():
                subscriptions = self._queues.subscriptions(session)
                if (message.queue, message.subject) not in subscriptions and self._over(
                    session, message.id, "task subscriptions", len(subscriptions), MAX_TASK_SUBSCRIPTIONS
                ):
                    return
                try:
                    self._queues.check_queues((message.queue,))
                except BusyError as error:
                    self._send(session, _refused(message.id, error))
                    return
                self._queues.subscribe(session, message.queue, message.subject, message.credit, shared=message.shared)
                self._send(session, Done(id=message.id))
            case TaskUnsubscribe():
                self._queues.unsubscribe(session, message.queue, message.subject)
                self._send(session, Done(id=message.id))
            case ResultSeen():
                if (task := self._queues.get(message.task)) is not None:
                    self._queues.forget_waiter(task, session)
            case RpcSubscribe():
                if message.identifier not in known.identifiers and self._over(
                    session, message.id, "identifiers", len(known.identifiers), MAX_IDENTIFIERS
                ):
                    return
                if self._take_identifier(session, known, message.identifier, 0):
                    self._send(session, Done(id=message.id, since=self._identifiers[message.identifier][1]))
                else:
                    self._send(session, _refused(message.id, DuplicateSubscriberError(message.identifier)))
            case RpcUnsubscribe():
                known.identifiers.pop(message.identifier, None)
                if self._identifiers.get(message.identifier, ("", 0))[0] == session:
                    self._free_identifier(message.identifier)
                self._send(session, Done(id=message.id))
            case RpcRequest():
                self._ask(session, known, message)
            case RpcAnswer():
                question = self._questions.get((message.caller, message.id))
                if question is not None and question.recipient == session:
                    self._forget_question((message.caller, message.id))
                    self._send(message.caller, RpcDone(id=message.id, outcome=message.outcome))
            case BroadcastSubscribe():
                if message.subscription not in known.patterns and self._over(
                    session, message.id, "broadcast subscriptions", len(known.patterns), MAX_PATTERNS
                ):
                    return
                self._add_pattern(session, known, message.subscription, message.sender, message.subject)
                self._send(session, Done(id=message.id))
            case BroadcastUnsubscribe():
                self._remove_pattern(session, known, message.subscription)
                self._send(session, Done(id=message.id))
            case BroadcastSend():
                self._broadcast(message.body, message.sender, message.subject)
                self._send(session, Done(id=message.id))
            case TaskList():
                found = self._queues.select(message.queue, message.place, message.task, message.key, message.after)
                tasks = list(islice(found, message.limit))
                more = next(found, None) is not None
                self._out.append(Show(session, message.id, tasks, more, message.bodies))
            case TaskEdit():
                self._edit(session, message)
            case QueueConfigure():
                self._configure(session, message)
            case ResourceConfigure():
                self._configure(session, message)
            case StatisticsAsk():
                self._out.append(Describe(session, message.id))
            case Call() | BlobPut() | BlobGet() | Hello():
                self._send(session, Violation(reason=f"{type(message).__name__} is out of place here"))
            case _:
                assert_never(message)

    # --- sessions ---

    def _hello(self, session: str, hello: Hello) -> None:
        if (error := self.refusal(hello)) is not None:
            self._send(session, Unwelcome(failure=Failure.of(error)))
            return
        known = self._sessions.get(session)
        # Who was not here in the life before this one, or was given up, can't know who had its identifiers meanwhile.
        was_away = known is None or hello.epoch + 1 < self.broker_epoch
        floor = self.broker_epoch + 1 if was_away and any(since for _, since in hello.identifiers) else 0
        if known is None:
            self._sessions[session] = known = _Session(hello.peer, self._now)
            self._queues.join(session)
            self._changes.sessions[session] = hello.peer
            self._out.append(Came(session, hello.peer))
        client = self._clients.get(session)
        if client is None:
            client = self._clients[session] = Client()
        if client.secret is None:
            client.secret = _digest(hello.secret)
            self._changes.clients[session] = client
        client.turn = hello.turn
        self._retired.pop(session, None)
        self._departed.pop(session, None)
        known.connected, known.last_heard = True, self._now
        self._awaited.pop(session, None)
        self._seen(session, client, hello.seen)

        self._untold[session] = deque()  # it is told nothing before it is welcome
        stated = dict(hello.held)
        held = dict(self._queues.held_by(session))
        lost = [task_id for task_id, epoch in hello.held if task_id not in held or _epoch(held[task_id]) != epoch]
        taken = []
        for identifier in known.identifiers.keys() - {name for name, _ in hello.identifiers}:
            del known.identifiers[identifier]
            self._free_identifier(identifier)
        for identifier, since in hello.identifiers:
            if not self._take_identifier(session, known, identifier, max(since, floor) if since else 0):
                taken.append(identifier)
        welcome = Welcome(
            broker_epoch=self.broker_epoch,
            lost=tuple(lost),
            taken=tuple(taken),
            since=floor,
            lease_s=self._lease_s,
        )
        self._send(session, welcome)

        for task_id, task in held.items():
            if stated.get(task_id) != _epoch(task):
                self._queues.come_back(task)
        subscriptions: dict[tuple[str, str | None], int] = {(queue, None): credit for queue, credit in hello.queues}
        subscriptions.update({(queue, pattern): credit for queue, pattern, credit in hello.filtered})
        for queue, pattern in self._queues.subscriptions(session):
            if (queue, pattern) not in subscriptions:
                self._queues.unsubscribe(session, queue, pattern)
        shared = frozenset(hello.shared)
        for (queue, pattern), credit in subscriptions.items():
            self._queues.subscribe(session, queue, pattern, credit, shared=(queue, pattern) in shared)
        self._queues.connect(session)
        for subscription in list(known.patterns):
            self._remove_pattern(session, known, subscription)
        for subscription, sender, subject in hello.patterns:
            self._add_pattern(session, known, subscription, sender, subject)
        self._untold[session] = deque()
        self._say_results(session, hello)
        self._untold[session].extend(known.asked)
        self._tell_more(session)

    def _say_results(self, session: str, hello: Hello) -> None:
        over = [task for task in self._queues.awaited_by(session).values() if task.place in ("dead", "settled")]
        wanted = {*hello.awaited, *hello.expected}
        if not all(task.id in wanted for task in over):  # it may not know yet with which task one of its own was joined
            wanted.update(self._clients[session].joined())
        for task in over:
            if task.id in wanted:
                self._untold[session].append(task.id)
            else:
                self._queues.forget_waiter(task, session)
        for task_id in hello.awaited:
            self._wait_again(session, task_id)

    def _tell_more(self, session: str) -> None:
        """As much as can be on its way; of what ended meanwhile nothing."""
        waits, asked = self._queues.awaited_by(session), self._sessions[session].asked
        untold, size = self._untold[session], 0
        while untold and size < MAX_GIVEN_BYTES:
            one = untold.popleft()
            if isinstance(one, str):
                if (task := waits.get(one)) is not None:
                    size += FRAME_COST_BYTES + task.size
                    self._out.append(Tell(session, task))
            elif one in asked:
                question = self._questions[one]
                size += FRAME_COST_BYTES + len(question.body)
                self._send(session, _delivery(one, question))
        if not untold:
            del self._untold[session]

    def _leave(self, session: str, *, for_good: bool = False) -> None:
        known = self._sessions.pop(session)
        was_heard = session not in self._awaited
        self._awaited.pop(session, None)
        self._missed.pop(session, None)
        self._untold.pop(session, None)
        for identifier in known.identifiers:
            self._free_identifier(identifier)
        for subscription in list(known.patterns):
            self._remove_pattern(session, known, subscription)
        if for_good:
            self._queues.forget_waits(session)
        self._queues.leave(session, lost=not for_good)
        self._edits = deque(edit for edit in self._edits if edit.session != session)
        for key in list(known.asked):
            question = self._questions[key]
            self._forget_question(key, known)
            self._send(key[0], _refused(key[1], IndeterminateError(question.identifier)))
        for key in [key for key in self._questions if key[0] == session]:
            self._forget_question(key)
        self._changes.sessions[session] = None
        self._out.append(Left(session, known.peer if was_heard and not for_good else None))
        # Who said goodbye may not have heard the answers to what it said before.
        if for_good:
            self._departed[session] = None
        else:
            self._retired[session] = self._now
        for without in (self._departed, self._retired):
            while len(without) > MAX_RETIRED:
                self._forget_client(next(iter(without)))

    # --- what was done before ---

    def _count(self, session: str, client: Client, request: int) -> None:
        """A request came; those between it and the last one did not."""
        if request > client.done:
            self._seen(session, client, request - MAX_ANSWERS)
            client.undone.update(dict.fromkeys(range(client.done, request)))
        if request >= client.done:
            client.done = min(request + 1, _LAST)

    def _answer(self, session: str, request: int, frame: bytes) -> None:
        client = self._clients[session]
        client.answers[request] = frame
        self._changes.answers[session, request] = frame
        self._send(session, frame)
        if len(client.answers) > MAX_ANSWERS:
            self._seen(session, client, next(iter(client.answers)) + 1)

    def _seen(self, session: str, client: Client, below: int) -> None:
        """Nobody asks for the answers below this any more."""
        below = min(below, _LAST)
        if below <= client.below:
            return
        client.below = below
        client.done = max(client.done, below)
        for known in (client.undone, client.asked):
            for request in list(takewhile(lambda request: request < below, known)):
                del known[request]
        gone = list(takewhile(lambda request: request < below, client.answers))  # ids rise, so the oldest stand first
        for request in gone:
            del client.answers[request]
            self._changes.answers.pop((session, request), None)
        if gone:
            self._changes.dropped[session] = below

    def _forget_client(self, session: str) -> None:
        self._retired.pop(session, None)
        self._departed.pop(session, None)
        self._queues.forget_waits(session)
        client = self._clients.pop(session)
        for request in client.answers:
            self._changes.answers.pop((session, request), None)
        if client.answers:
            self._changes.dropped[session] = _LAST
        self._changes.clients[session] = None
        self._changes.marks.pop(session, None)

    # --- tasks ---

    def _task_send(self, session: str, message: TaskSend) -> None:
        client, request = self._clients[session], message.id
        if (said := self.known_answer(session, request)) is not None:
            self._out.append(said)
            if request in client.answers and message.want_result:
                answer = decode_from_broker(client.answers[request])
                self._wait_again(session, answer.task if isinstance(answer, TaskStored) else message.task)
            return
        if request < client.done and request not in client.undone:
            self._send(session, TaskStored(id=request, task=message.task, stored=True))
            if message.want_result:
                self._wait_again(session, message.task)
            return
        self._count(session, client, request)
        try:
            task, stored = self._accept(session, message)
        except PrunusError as error:
            client.undone[request] = None
            if (excess := len(client.undone) - MAX_ANSWERS) > 0:
                self._seen(session, client, list(client.undone)[excess])
            self._send(session, _refused(request, error))
            return
        client.undone.pop(request, None)
        confirmation = TaskStored(id=request, task=task.id, stored=stored)
        if stored:
            self._changes.marks[session] = client
            self._send(session, confirmation)
        else:
            self._answer(session, request, encode(confirmation))

    def _wait_again(self, session: str, task_id: str) -> None:
        """A sender that was taken for dead, and was not, still wants the result. If the task is over, and nobody kept
        the result for it, what came of it is not known."""
        if task_id in self._queues.awaited_by(session):
            return
        task = self._queues.get(task_id)
        if task is None or task.place == "settled":
            outcome = Failure.of(IndeterminateError(f"task {task_id}"))
            self._send(session, TaskResult(task=task_id, outcome=outcome))
            return
        self._queues.wait_for(task, session)
        if task.place == "dead":
            self._send(session, dead_letter(task))

    def _accept(self, session: str, message: TaskSend) -> tuple[Task, bool]:
        """The task as which it is stored, and whether that is its own."""
        waiter = session if message.want_result else None
        same = self._queues.get(message.task)
        if same is not None:
            if waiter is not None:
                self._queues.wait_for(same, waiter)
            return same, True
        if message.task.startswith(OWN_TASKS):
            raise ProtocolError(f"the id {message.task!r} is one of the broker's own; choose another")
        if self.refuse_new is not None:
            raise StoreFullError(self.refuse_new)
        pending = self._queues.pending(message.queue, message.key)
        if pending is not None and not message.replace:
            if waiter is not None:
                self._queues.wait_for(pending, waiter)
            return pending, False
        size = len(message.body) if message.blob is None else self.blob_size(message.blob)
        if size is None:
            raise BlobNotFoundError(message.blob or "")
        needs: Needs = needs_of(message.resources) if message.resources else ()
        self._queues.check_room(message.queue, message.subject, needs, new=pending is None)
        task = self._queues.put(
            message.task,
            message.queue,
            message.body,
            key=message.key,
            priority=message.priority,
            subject=message.subject,
            needs=needs,
            not_before=message.not_before,
            expires_at=message.expires_at,
            max_attempts=message.max_attempts,
            waiter=waiter,
            replaced=pending,
            blob=message.blob,
            size=size,
        )
        return task, True

    def _edit(self, session: str, message: TaskEdit) -> None:
        if (said := self.known_answer(session, message.id)) is not None:
            self._out.append(said)
            return
        if any(one.session == session and one.message.id == message.id for one in self._edits):
            return  # it was said before, and goes on
        if message.action == "requeue" and self.hold_back:
            self._send(session, _refused(message.id, StoreFullError(self.refuse_new or "the disk of the broker")))
            return
        if message.tasks:
            named = [self._queues.get(task) for task in dict.fromkeys(message.tasks)]
            tasks = [task for task in named if task is not None]
        elif message.queue is None and message.place is None:
            tasks = []
        else:
            tasks = list(self._queues.select(message.queue, message.place))
        if len(tasks) >= EDITED_AT_ONCE and len(self._edits) >= MAX_EDITS:
            busy = BusyError(f"{MAX_EDITS} edits of many tasks go on already; try again when one is done")
            self._send(session, _refused(message.id, busy))
            return
        edit = _EditInHand(session, message, iter(tasks))
        if not self._continue_edit(edit):
            self._edits.append(edit)

    def _has_more(self) -> bool:
        """Whether an edit can go on."""
        return bool(self._edits) and not self.hold_back

    def _have_read(self) -> list[str]:
        """The sessions that were told as much as can be on its way, of those that read what is sent to them."""
        return [session for session in {**self._untold, **self._queues.to_read} if not self.is_stuck(session)]

    def _continue_edit(self, edit: _EditInHand) -> bool:
        """Do the next tasks of it; whether that was all. Meanwhile each may have become what the edit is not about."""
        queues, message = self._queues, edit.message
        do = {"requeue": queues.requeue, "bury": queues.bury, "delete": queues.delete}[message.action]
        some = list(islice(edit.tasks, EDITED_AT_ONCE))
        for task in some:
            if (
                queues.get(task.id) is task
                and message.queue in (None, task.queue)
                and message.place in (None, task.place)
            ):
                edit.held += task.place == "held"
                edit.changed += do(task)
        if len(some) == EDITED_AT_ONCE:
            return False
        answer = encode(Edited(id=message.id, changed=edit.changed, held=edit.held))
        self._answer(edit.session, message.id, answer)
        return True

    def _configure(self, session: str, message: QueueConfigure | ResourceConfigure) -> None:
        try:
            if isinstance(message, QueueConfigure):
                self._queues.configure_queue(message.queue, message.limits)
                self._changes.limits[message.queue] = message.limits
            else:
                self._queues.configure_resource(message.resource, message.capacity)
                self._changes.resources[message.resource] = message.capacity
        except PrunusError as error:
            self._send(session, _refused(message.id, error))
        else:
            self._send(session, Done(id=message.id))

    def _over(self, session: str, request: int, what: str, number: int, limit: int) -> bool:
        """Whether one more would be too many; then that was said."""
        if number < limit:
            return False
        self._send(session, _refused(request, BusyError(f"this session has {limit:,} {what} already")))
        return True

    # --- questions ---

    def _take_identifier(self, session: str, known: _Session, identifier: str, since: int) -> bool:
        owner, mine_since = self._identifiers.get(identifier, (session, since))
        if owner != session:
            known.identifiers.pop(identifier, None)
            return False
        if not mine_since:
            # Whoever was asked under this name before, in this life of the broker, was somebody else: to a question
            # that is said again in the next life, this owner is as one that took the name in that life.
            is_former = self._former_names is None or identifier in self._former_names
            mine_since = self.broker_epoch + is_former
        self._identifiers[identifier] = session, mine_since
        known.identifiers[identifier] = None
        for key in [key for key in self._unrouted if self._questions[key].identifier == identifier]:
            self._route(key, self._questions[key])
        return True

    def _free_identifier(self, identifier: str) -> None:
        del self._identifiers[identifier]
        if self._former_names is not None:
            self._former_names.add(identifier)
            if len(self._former_names) > MAX_FORMER_NAMES:
                self._former_names = None

    def _ask(self, session: str, known: _Session, message: RpcRequest) -> None:
        key = session, message.id
        if key in self._questions:
            return  # it was said again; its answer is on the way
        if known.questions >= MAX_QUESTIONS:
            self._send(session, _refused(message.id, BusyError(f"{MAX_QUESTIONS:,} of your questions are open")))
            return
        resent = message.since not in (0, self.broker_epoch)
        owner = self._identifiers.get(message.recipient)
        before = self._clients[session].asked.get(message.id)
        if before is not None and (owner is None or owner[0] != before):
            # Said before, and the name has changed hands: the one who was asked can't tell any more.
            self._send(session, _refused(message.id, IndeterminateError(message.recipient)))
            return
        if owner is None and not self._awaited:
            self._send(session, _nobody(message.id, message.recipient, message.since if resent else None))
            return
        if owner is not None and not message.since and self.is_stuck(owner[0]):  # said again it may have had an effect
            busy = BusyError(f"{message.recipient!r} does not read what it is sent; try again later")
            self._send(session, _refused(message.id, busy))
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
        asked = self._clients[key[0]].asked
        asked[key[1]] = session
        if len(asked) > MAX_ANSWERS:
            del asked[next(iter(asked))]
        self._sessions[session].asked[key] = None
        if (untold := self._untold.get(session)) is not None:
            untold.append(key)  # after what it has yet to read
        else:
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
        if is_exact(sender) and sender is not None:
            self._exact.setdefault(sender, {})[session, subscription] = pattern
        else:
            self._patterns[session, subscription] = pattern

    def _remove_pattern(self, session: str, known: _Session, subscription: int) -> None:
        if subscription not in known.patterns:
            return
        sender = known.patterns.pop(subscription)
        if is_exact(sender) and sender is not None:
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
            if not self._sessions[session].connected:
                continue
            if self.is_stuck(session):
                self._missed[session] = self._missed.get(session, 0) + 1
                self._missed_count += 1
                continue
            if session in self._missed:
                self._say_missed(session)
            self._send(session, delivery)

    def _say_missed(self, session: str) -> None:
        """A peer that reads again is told how many broadcasts it missed."""
        if self._sessions[session].connected and not self.is_stuck(session):
            self._send(session, Missed(count=self._missed.pop(session)))

    # --- the rest ---

    def _restore(self, state: StoredState) -> None:
        for name, peer in state.sessions:
            self._sessions[name] = _Session(peer, self._now)
            self._awaited[name] = None
            self._queues.join(name)
        for name, client in state.clients:
            self._clients[name] = client
        for name in self._sessions:
            self._clients.setdefault(name, Client())
        for name, request, frame in state.answers:
            self._clients.setdefault(name, Client()).answers[request] = frame
        self._retired = dict.fromkeys((name for name in self._clients if name not in self._sessions), self._now)
        self._queues.restore(state.tasks, state.limits, state.resources)
        for stranger in self._queues.waiting() - self._clients.keys():
            self._queues.forget_waits(stranger)

    def _advance(self, now: float) -> None:
        if now - self._now > PAUSE_S:  # nobody listened meanwhile: silence was ours
            for known in self._sessions.values():
                known.last_heard = now
        self._now = self._queues.now = max(self._now, now)
        self._queues.wall = self.wall

    def _send(self, session: str, message: BrokerMessage | bytes) -> None:
        self._out.append(Send(session, message))

    def _finish(self) -> list[Effect]:
        if self._unrouted and not self._awaited:
            for key in list(self._unrouted):
                question = self._questions[key]
                self._forget_question(key)
                self._send(key[0], _nobody(key[1], question.identifier, question.since))
        self._queues.dispatch()
        return self._gathered()

    def _gathered(self) -> list[Effect]:
        effects = self._out[:]
        self._out.clear()
        return effects


# --- what it remembers ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Session:
    peer: Peer
    last_heard: float
    connected: bool = False
    round_trip_s: float = 0.0
    """How long a heartbeat takes; 0: unknown."""
    identifiers: dict[str, None] = field(default_factory=dict)
    patterns: dict[int, str | None] = field(default_factory=dict)
    """The sender pattern of each broadcast subscription: where to find it in the index."""
    asked: dict[tuple[str, int], None] = field(default_factory=dict)
    """Questions that it has to answer."""
    questions: int = 0
    """How many it asked itself."""


@dataclass(slots=True)
class _EditInHand:
    """An edit, the tasks that it still has to look at, and what it came to so far."""

    session: str
    message: TaskEdit
    tasks: Iterator[Task]
    changed: int = 0
    held: int = 0


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
class _Pattern:
    sender: Callable[[str | None], object]
    subject: Callable[[str | None], object]


def _refused(request: int, error: PrunusError) -> Refused:
    return Refused(
        id=request, failure=Failure(f"{PrunusError.__module__}.{type(error).__name__}", str(error), facts=error.facts())
    )


def _nobody(request: int, identifier: str, since: int | None) -> Refused:
    """Nobody has the name. If it was said to the broker `since` before this one, somebody may have had it then."""
    return _refused(request, UnroutableError(identifier) if since is None else IndeterminateError(identifier))


def _delivery(key: tuple[str, int], question: _Question) -> RpcDelivery:
    return RpcDelivery(caller=key[0], id=key[1], identifier=question.identifier, body=question.body)


_LAST = 2**63 - 1
"""The greatest number that the store takes."""


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _epoch(task: Task) -> int:
    """Under which it is held."""
    return task.hold.epoch if task.hold is not None else 0
