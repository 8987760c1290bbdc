"""What a client remembers, so that a lost connection or a restarted broker changes nothing for its user.

A pure machine like the broker's core: frames, requests and time go in, events come out, and `take` hands over the
frames to send. It has no socket and no clock.

Rules
- `Hello` first, with all that should be true: subscriptions, tasks in hand, results waited for. After `Welcome`
  every request without an answer is said again, in order; the broker recognises what it did already.
- A delivery with an epoch not above the highest one seen for that task is an echo, and ignored.
- A task is in hand from its delivery until the broker confirmed that it is settled.
- A question that comes twice is answered twice with the same answer; its handler runs once.
- A heartbeat every `HEARTBEAT_S`, or three in a lease if that is short; after `SILENCE_S` without a sign of the broker
  the connection is made anew.
- Who has shown no life for longer than the broker's lease (a suspended machine, SIGSTOP) says nothing under what it
  knew before, and believes nothing that came meanwhile: it connects anew, and learns with the `Welcome` which of its
  tasks are somebody else's now.
- Nothing waits for ever: a question ends at its deadline, other requests after `PATIENCE_S` without a broker, as
  `NotDeliveredError` if it was never sent and `IndeterminateError` if it was.
- A broker that answers a `Hello` with no is believed. If one of its bounds is reached and it took this client before,
  that passes: `Hello` is said again, more and more slowly (`REFUSED_PAUSE_S`), and what is asked meanwhile waits as
  for a lost broker (with the `BusyError` as its end). Else the client has come to its end (`Ended`).
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar, assert_never

import msgspec

from prunus.errors import (
    BusyError,
    CommunicatorClosedError,
    Failure,
    IndeterminateError,
    KeyRefusedError,
    NotDeliveredError,
    ProtocolError,
    PrunusError,
    RemoteError,
    where_to_look,
)
from prunus.messaging.messages import (
    LEASE_S,
    MAX_AWAITED_BYTES,
    MAX_IDENTIFIERS,
    MAX_PATTERNS,
    MAX_STATED_BYTES,
    MAX_TASK_SUBSCRIPTIONS,
    Alive,
    BlobGet,
    BlobHeld,
    BlobPart,
    BlobPut,
    BroadcastDelivery,
    BroadcastSend,
    BroadcastSubscribe,
    BroadcastUnsubscribe,
    Call,
    CallDone,
    ClientMessage,
    Done,
    Edited,
    Goodbye,
    Heartbeat,
    Hello,
    HelloNeeded,
    Missed,
    Outcome,
    Peer,
    QueueConfigure,
    Refused,
    Request,
    ResourceConfigure,
    ResultSeen,
    RpcAnswer,
    RpcDelivery,
    RpcDone,
    RpcRequest,
    RpcSubscribe,
    RpcUnsubscribe,
    StatisticsAsk,
    StatisticsTold,
    TaskAck,
    TaskDelivery,
    TaskEdit,
    TaskList,
    TaskNack,
    TaskResult,
    TaskSend,
    TasksListed,
    TaskStored,
    TaskSubscribe,
    TaskUnsubscribe,
    Unwelcome,
    Violation,
    Welcome,
    bytes_in_hello,
    decode_from_broker,
    decode_from_client,
    encode,
    outcome_of,
)

HEARTBEAT_S = 2.0
"""How often a client shows that it lives."""
SILENCE_S = 10.0
"""A broker that says nothing for so long is lost."""
WELCOME_S = 3.0
"""How long a `Hello` waits for its `Welcome` before the connection is made anew."""
REFUSED_PAUSE_S = (1.0, 10.0)
"""How soon a client whose `Hello` was refused says it again, at first and at last."""
PATIENCE_S = 60.0
"""How long a request waits for a lost broker to come back."""
MAX_UNANSWERED = 10_000
"""Requests in flight; more are refused with `BusyError`."""
MAX_UNANSWERED_BYTES = 256 * 1024 * 1024
"""Their bytes; more are refused with `BusyError`."""
MAX_AWAITED = 100_000
"""Results that are waited for; `task_send` for one more is refused with `BusyError`."""
MAX_REMEMBERED = 10_000
"""Tasks whose highest epoch is remembered, and questions whose answer is."""
MAX_REMEMBERED_BYTES = 64 * 1024 * 1024
"""The bytes of these answers; the oldest are forgotten first."""

_SUBSCRIBES = (TaskSubscribe, RpcSubscribe, BroadcastSubscribe)
_UNSUBSCRIBES = (TaskUnsubscribe, RpcUnsubscribe, BroadcastUnsubscribe)
_UNLIMITED = (TaskAck, TaskNack, Goodbye, *_SUBSCRIBES, *_UNSUBSCRIBES)
"""Requests that give something back, for which the broker would wait, or that say what is true here already: they are
never refused."""
_IN_HAND = (TaskAck, TaskNack)
"""Requests that have time as long as their task is in hand."""

_K = TypeVar("_K")
_V = TypeVar("_V")


# --- events -----------------------------------------------------------------------------------------


class _Event(msgspec.Struct, frozen=True):
    pass


Answer = Done | TaskStored | CallDone | RpcDone | TasksListed | Edited | StatisticsTold | BlobHeld | BlobPart


class Answered(_Event, frozen=True):
    """The request is done."""

    id: int
    message: Answer
    request: Request
    unsure: bool = False
    """It was said on an earlier connection too: it may have been done then, and that answer was lost."""


class Failed(_Event, frozen=True):
    """The request is not done, or nobody knows."""

    id: int
    error: PrunusError


class TaskLost(_Event, frozen=True):
    """A task in hand is no longer ours: somebody else may have it."""

    task: str


class NameTaken(_Event, frozen=True):
    """While we were away somebody else subscribed under this name."""

    identifier: str


class Up(_Event, frozen=True):
    """The broker knows us (again)."""

    again: bool


class TurnedAway(_Event, frozen=True):
    """The broker refuses us for now; we come again until it does not."""

    error: BusyError


class Ended(_Event, frozen=True):
    """The broker refuses us for good: nothing more comes of this client."""

    error: PrunusError


OVER = (CommunicatorClosedError, KeyRefusedError, ProtocolError)
"""What is raised, whatever is asked, once the user or the broker has ended it."""


class Reconnect(_Event, frozen=True):
    """This connection is no good: make a new one and call `connect`."""

    reason: str


Event = (
    Answered
    | Failed
    | TaskDelivery
    | TaskResult
    | TaskLost
    | RpcDelivery
    | BroadcastDelivery
    | NameTaken
    | Up
    | TurnedAway
    | Ended
    | Reconnect
    | Violation
    | Missed
)


@dataclass(slots=True)
class _Unanswered:
    message: Request
    frame: bytes
    asked_at: float
    said_to: int = 0
    """The epoch of the broker to which it was said first; 0: not yet."""
    unsure: bool = False
    """It was said on a connection that broke: it may have been done."""


class ClientCore:
    """See the module. `take` after every call of another method."""

    def __init__(self, session: str, peer: Peer, secret: str = "", endpoint: str = "") -> None:
        """`secret` is known to this session and the broker alone (random; empty: anybody may speak for it). Errors name
        the `endpoint`."""
        self.session = session
        self._endpoint = endpoint
        self._turns = itertools.count(1)
        self.broker_epoch = 0
        self.round_trip_s = 0.0
        """How long the last heartbeat took to its answer; 0: unknown."""
        self.up = False
        self.held: dict[str, int] = {}
        """The epoch of each task in hand."""
        self._peer = peer
        self._secret = secret
        self._next_id = 1
        self._was_up = False
        self._unanswered: dict[int, _Unanswered] = {}
        self._unanswered_bytes = 0
        self._deadlines: list[tuple[float, int]] = []
        """A heap of (deadline, request); those that are answered meanwhile are skipped."""
        self._highest: OrderedDict[str, int] = OrderedDict()
        self._awaited: dict[str, None] = {}
        """Tasks whose result is waited for."""
        self._awaited_bytes = 0
        """What they take in a `Hello`."""
        self._expected: dict[str, tuple[int, bool]] = {}
        """The same before their `TaskSend` is answered: its id, and whether it may have joined another task."""
        self._may_join = 0
        """How many of these may name another task."""
        self._early: OrderedDict[str, tuple[TaskResult, int]] = OrderedDict()
        """Results that may be those of sends without an answer (ids below this); the broker keeps them too."""
        self._early_bytes = 0
        self._queues: dict[tuple[str, str | None], int] = {}
        """The credit of each (queue, subject pattern)."""
        self._shared: set[tuple[str, str | None]] = set()
        """Those of them that have one credit."""
        self._identifiers: dict[str, int] = {}
        self._patterns: dict[int, tuple[str | None, str | None]] = {}
        self._stated: dict[object, int] = {}
        """The bytes of each of these, by its name."""
        self._stated_bytes = 0
        self._asked: set[tuple[str, int]] = set()
        """Questions that are not answered yet."""
        self._answers: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._answers_bytes = 0
        self._out: list[bytes] = []
        self._is_greeting = False
        """A `Hello` waits for its answer."""
        self._turned_away: BusyError | None = None
        """Why the last one was refused ..."""
        self._pause_s = 0.0
        """... and how long after it the next one is said."""
        self._hello_at = self._heard_at = self._beat_at = self._lost_at = 0.0
        self._lease_s = LEASE_S
        """The broker's; how often a sign of life is due follows from it."""
        self._heartbeat_s = HEARTBEAT_S
        self._beat_unanswered = False

    # --- the connection ---

    def connect(self, now: float) -> None:
        """There is a fresh connection: nothing was said on it yet."""
        if self.up or not self._hello_at:
            self._lost_at = now
        for one in self._unanswered.values():
            one.unsure |= one.said_to != 0
        self.up = False
        self._out.clear()
        self._hello(now)

    def wake(self, now: float) -> list[Event]:
        """Look at the clock, before anything else is done: after a lease without a sign of life nothing is said or
        believed on the old connection."""
        silent_s = now - self._beat_at
        if not self.up or silent_s <= self._lease_s:
            return []
        self.up, self._is_greeting, self._lost_at = False, False, now
        self._out.clear()
        return [Reconnect(f"this process stood still: it showed no life for {silent_s:.0f} s")]

    def on_frame(self, now: float, frame: bytes) -> list[Event]:
        """What a frame of the broker means. Raises `ProtocolError` (make a new connection then)."""
        if not self.up:
            return self._greeted(now, frame)
        message = decode_from_broker(frame)
        self._heard_at = now
        match message:
            case TaskStored() | Done() | RpcDone() | CallDone() | TasksListed() | Edited() | StatisticsTold():
                return self._answered(message)
            case BlobHeld() | BlobPart():
                return self._answered(message)
            case TaskDelivery():
                if message.epoch <= max(self._highest.get(message.task, 0), self.held.get(message.task, 0)):
                    return []
                _remember(self._highest, message.task, message.epoch)
                self.held[message.task] = message.epoch
                return [message]
            case BroadcastDelivery() | Missed() | Violation():
                return [message]
            case RpcDelivery():
                key = message.caller, message.id
                if (answer := self._answers.get(key)) is not None:
                    self._out.append(answer)
                elif key not in self._asked:
                    self._asked.add(key)
                    return [message]
                return []
            case Refused():
                return self._fail(message.id, message.failure.to_exception())
            case TaskResult():
                return self._result(message)
            case Alive():
                if self._beat_unanswered:
                    self._beat_unanswered, self.round_trip_s = False, now - self._beat_at
                return []
            case HelloNeeded():  # a broker that does not know us, and did nothing of what we said: it forgot us
                self.up, self._lost_at = False, now
                self._hello(now)
                return []
            case Welcome() | Unwelcome():
                return []
            case _:
                assert_never(message)

    def tick(self, now: float) -> list[Event]:
        """Let time pass (see `due`)."""
        events: list[Event] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request = heapq.heappop(self._deadlines)
            if request in self._unanswered:
                events += self._give_up(now, request)
        if self.up:
            if now - self._heard_at > SILENCE_S:
                events.append(Reconnect(f"the broker was silent for {SILENCE_S:g} s"))
            elif now - self._beat_at >= self._heartbeat_s:
                self._beat_at, self._beat_unanswered = now, True
                self._say(Heartbeat(seen=self._seen(), round_trip_s=self.round_trip_s))
        else:
            for request, one in list(self._unanswered.items()):
                if isinstance(one.message, _IN_HAND):
                    continue
                if now - max(one.asked_at, self._lost_at) > PATIENCE_S:
                    events += self._give_up(now, request)
            if self._turned_away is not None and not self._is_greeting:
                if now - self._hello_at >= self._pause_s:
                    self._hello(now)
            elif now - self._hello_at > WELCOME_S:
                events.append(Reconnect(f"no welcome for {WELCOME_S:g} s"))
        return events

    def due(self) -> float:
        """When `tick` has something to do next, at the latest."""
        if self.up:
            next_sign = self._beat_at + self._heartbeat_s
        elif self._turned_away is not None and not self._is_greeting:
            next_sign = self._hello_at + self._pause_s
        else:
            next_sign = self._hello_at + WELCOME_S
        while self._deadlines and self._deadlines[0][1] not in self._unanswered:
            heapq.heappop(self._deadlines)
        return min(next_sign, self._deadlines[0][0]) if self._deadlines else next_sign

    @property
    def is_idle(self) -> bool:
        """No request waits for its answer."""
        return not self._unanswered

    def take(self) -> list[bytes]:
        """The frames to send, in order; they are handed over once."""
        frames, self._out = self._out, []
        return frames

    # --- requests ---

    def ask(self, now: float, make: Callable[[int], Request], timeout_s: float | None = None) -> int:
        """Say a request until it is answered, at most for `timeout_s`; its id.

        Raises `MessageTooLargeError`, `BusyError`, or `ValueError` if the broker would not understand it; nothing was
        said then.
        """
        message = make(self._next_id)
        try:
            frame = encode(message)
            decode_from_client(frame)  # as the broker will: what it takes for nonsense costs the connection
        except (ProtocolError, OverflowError) as error:
            raise ValueError(f"this can't be asked of the broker: {error}") from None
        if not isinstance(message, _UNLIMITED) and (
            len(self._unanswered) >= MAX_UNANSWERED or self._unanswered_bytes + len(frame) > MAX_UNANSWERED_BYTES
        ):
            raise BusyError(f"{len(self._unanswered):,} requests wait for the broker; try again later")
        if isinstance(message, _SUBSCRIBES):
            self._check_stated(message, _bytes_stated(message, frame))
        if (
            isinstance(message, TaskSend)
            and message.want_result
            and (len(self._awaited) >= MAX_AWAITED or self._awaited_bytes >= MAX_AWAITED_BYTES)
        ):
            raise BusyError(
                f"{len(self._awaited):,} results are waited for; send without want_result, or wait for some"
            )
        self._next_id += 1
        self._unanswered[message.id] = one = _Unanswered(message, frame, now)
        self._unanswered_bytes += len(frame)
        if timeout_s is not None:
            heapq.heappush(self._deadlines, (now + timeout_s, message.id))
        self._note(message, frame)
        if self.up:
            self._say_request(one)
        return message.id

    def answer(self, caller: str, question: int, outcome: Outcome) -> None:
        """Answer a question that came as `RpcDelivery`."""
        try:
            frame = encode(RpcAnswer(caller=caller, id=question, outcome=outcome))
        except PrunusError as error:  # too large: then that is the answer
            frame = encode(RpcAnswer(caller=caller, id=question, outcome=outcome_of(error)))
        self._asked.discard((caller, question))
        self._answers[caller, question] = frame
        self._answers_bytes += len(frame)
        while len(self._answers) > MAX_REMEMBERED or self._answers_bytes > MAX_REMEMBERED_BYTES:
            self._answers_bytes -= len(self._answers.popitem(last=False)[1])
        if self.up:
            self._out.append(frame)

    # --- inside ---

    def _greeted(self, now: float, frame: bytes) -> list[Event]:
        """What came before the broker knows us. Only its answer to our `Hello` counts; all else will be said again."""
        try:
            message = decode_from_broker(frame)
        except ProtocolError as error:  # it speaks another version of the language, or none
            return self._refused(error)
        self._heard_at = now
        match message:
            case Welcome():
                return self._welcome(now, message)
            case Unwelcome():
                return self._refused(message.failure.to_exception())
            case Violation():
                return self._refused(ProtocolError(message.reason))
            case _:
                return []

    def _refused(self, error: PrunusError) -> list[Event]:
        if not self._is_greeting:  # it is about something else, that was said on a connection which is no good any more
            return []
        self._is_greeting = False
        if not (isinstance(error, BusyError) and self._was_up):
            return [Ended(error)]
        first, last = REFUSED_PAUSE_S
        self._pause_s = min(2 * self._pause_s, last) if self._turned_away else first
        is_known, self._turned_away = self._turned_away is not None, error
        return [] if is_known else [TurnedAway(error)]

    def _check_stated(self, message: TaskSubscribe | RpcSubscribe | BroadcastSubscribe, size: int) -> None:
        """Raises `BusyError` if it is more than a `Hello` may say: the broker would refuse all of it."""
        known: Collection[object]
        match message:
            case TaskSubscribe():
                what, known, limit = "task subscriptions", self._queues, MAX_TASK_SUBSCRIPTIONS
            case RpcSubscribe():
                what, known, limit = "identifiers", self._identifiers, MAX_IDENTIFIERS
            case BroadcastSubscribe():
                what, known, limit = "broadcast subscriptions", self._patterns, MAX_PATTERNS
        if _name_of(message) not in known and len(known) >= limit:
            raise BusyError(f"this session has {limit:,} {what} already; cancel some")
        more = size - self._stated.get(_name_of(message), 0)
        if more > 0 and self._stated_bytes + more > MAX_STATED_BYTES:
            raise BusyError(
                f"{len(self._stated):,} subscriptions with names of {self._stated_bytes:,} bytes are there already; "
                "cancel some, or make their names shorter"
            )

    def _hello(self, now: float) -> None:
        self._is_greeting = True
        self._hello_at = self._heard_at = now
        self._beat_unanswered = False
        hello = Hello(
            session=self.session,
            peer=self._peer,
            held=tuple(self.held.items()),
            awaited=tuple(self._awaited),
            expected=tuple(self._expected),
            queues=tuple((queue, credit) for (queue, subject), credit in self._queues.items() if subject is None),
            identifiers=tuple(self._identifiers.items()),
            patterns=tuple((number, sender, subject) for number, (sender, subject) in self._patterns.items()),
            seen=self._seen(),
            filtered=tuple(
                (queue, subject, credit) for (queue, subject), credit in self._queues.items() if subject is not None
            ),
            secret=self._secret,
            shared=tuple(key for key in self._queues if key in self._shared),
            epoch=self.broker_epoch,
            turn=next(self._turns),
        )
        self._say(hello)

    def _welcome(self, now: float, message: Welcome) -> list[Event]:
        self.up, self._beat_at = True, now
        self._is_greeting, self._turned_away = False, None
        self._lease_s = message.lease_s
        self._heartbeat_s = min(HEARTBEAT_S, message.lease_s / 3)
        self.broker_epoch = message.broker_epoch
        events: list[Event] = []
        said = [one.message for one in self._unanswered.values() if one.said_to]
        settled = {message.task for message in said if isinstance(message, TaskAck | TaskNack)}
        for task in message.lost:
            if self.held.pop(task, None) is not None and task not in settled:  # else it may be lost, or just done with
                events.append(TaskLost(task))
        for identifier in message.taken:
            if self._identifiers.pop(identifier, None) is not None:
                self._state_no_more(identifier)
                events.append(NameTaken(identifier))
        if message.since:
            for identifier, since in self._identifiers.items():
                self._identifiers[identifier] = max(since, message.since) if since else 0
        for one in self._unanswered.values():
            self._say_request(one)
        events.append(Up(again=self._was_up))
        self._was_up = True
        return events

    def _say(self, message: ClientMessage) -> None:
        self._out.append(encode(message))

    def _say_request(self, one: _Unanswered) -> None:
        if one.said_to == 0:
            one.said_to = self.broker_epoch
        elif isinstance(one.message, RpcRequest) and one.message.since == 0:
            one.message = msgspec.structs.replace(one.message, since=one.said_to)
            self._unanswered_bytes -= len(one.frame)
            one.frame = encode(one.message)
            self._unanswered_bytes += len(one.frame)
        self._out.append(one.frame)

    def _seen(self) -> int:
        """All requests below this are answered."""
        return next(iter(self._unanswered), self._next_id)

    def _note(self, message: Request, frame: bytes) -> None:
        """What the request makes true is said in every `Hello` from now on."""
        if isinstance(message, _SUBSCRIBES):
            name, size = _name_of(message), _bytes_stated(message, frame)
            self._stated_bytes += size - self._stated.get(name, 0)
            self._stated[name] = size
        elif isinstance(message, _UNSUBSCRIBES):
            self._state_no_more(_name_of(message))
        match message:
            case TaskSend():
                if message.want_result:
                    self._expected[message.task] = message.id, message.key is not None
                    self._may_join += message.key is not None
            case TaskAck() | TaskNack():
                pass
            case TaskSubscribe():
                self._queues[message.queue, message.subject] = message.credit
                (self._shared.add if message.shared else self._shared.discard)((message.queue, message.subject))
            case TaskUnsubscribe():
                self._queues.pop((message.queue, message.subject), None)
            case RpcSubscribe():
                self._identifiers.setdefault(message.identifier, 0)
            case RpcUnsubscribe():
                self._identifiers.pop(message.identifier, None)
            case BroadcastSubscribe():
                self._patterns[message.subscription] = message.sender, message.subject
            case BroadcastUnsubscribe():
                self._patterns.pop(message.subscription, None)
            case _:
                pass

    def _state_no_more(self, name: object) -> None:
        self._stated_bytes -= self._stated.pop(name, 0)

    def _answered(self, answer: Answer) -> list[Event]:
        one = self._forget(answer.id)
        if one is None:
            return []
        events: list[Event] = [Answered(answer.id, answer, one.message, one.unsure)]
        match one.message:
            case TaskSend(want_result=True) if isinstance(answer, TaskStored):
                self._await(answer.task)
                if answer.task in self._early:
                    events += self._result(self._early[answer.task][0])
                self._expect_no_more(one.message.task)
            case TaskAck() | TaskNack():
                if self.held.get(one.message.task) == one.message.epoch:
                    del self.held[one.message.task]
            case Call():
                for task, epoch in one.message.acks:
                    if self.held.get(task) == epoch:
                        del self.held[task]
            case RpcSubscribe():
                if one.message.identifier in self._identifiers and isinstance(answer, Done):
                    self._identifiers[one.message.identifier] = answer.since or self.broker_epoch
            case _:
                pass
        return events

    def _result(self, message: TaskResult) -> list[Event]:
        """Hand it out if it is waited for. One that may be that of a send without an answer yet is kept until then."""
        is_awaited = message.task in self._awaited
        if is_awaited:
            del self._awaited[message.task]
            self._awaited_bytes -= bytes_in_hello(message.task)
        if not (self._may_join or message.task in self._expected):
            self._say(ResultSeen(task=message.task))
        elif message.task not in self._early:
            self._early[message.task] = message, self._next_id
            self._early_bytes += _size(message)
            while len(self._early) > MAX_REMEMBERED or self._early_bytes > MAX_REMEMBERED_BYTES:
                self._forget_early()
        return [message] if is_awaited else []

    def _await(self, task: str) -> None:
        if task not in self._awaited:
            self._awaited[task] = None
            self._awaited_bytes += bytes_in_hello(task)

    def _expect_no_more(self, task: str) -> None:
        """This send is answered: results that can't be those of the others are let go."""
        self._may_join -= self._expected.pop(task, (0, False))[1]
        oldest, _ = next(iter(self._expected.values()), (self._next_id, False))
        while self._early and next(iter(self._early.values()))[1] <= oldest:
            self._forget_early()

    def _forget_early(self) -> None:
        task, (result, _) = self._early.popitem(last=False)
        self._early_bytes -= _size(result)
        self._say(ResultSeen(task=task))

    def _fail(self, request: int, error: PrunusError, *, is_given_up: bool = False) -> list[Event]:
        one = self._forget(request)
        if one is None:
            return []
        if isinstance(one.message, TaskSend):
            self._expect_no_more(one.message.task)
        elif isinstance(one.message, _SUBSCRIBES) and not is_given_up:
            self._state_no_more(_name_of(one.message))
            match one.message:
                case RpcSubscribe():
                    self._identifiers.pop(one.message.identifier, None)
                case TaskSubscribe():
                    self._queues.pop((one.message.queue, one.message.subject), None)
                case BroadcastSubscribe():
                    self._patterns.pop(one.message.subscription, None)
        return [Failed(request, error)]

    def _give_up(self, now: float, request: int) -> list[Event]:
        """Nobody waits for it any longer. What a subscription stated stands until it is cancelled: the request may have
        been one of several about the same name."""
        one = self._unanswered[request]
        message, what = one.message, _words_for(one.message)
        name = message.recipient if isinstance(message, RpcRequest) else what
        if self.up:
            silence = f"no answer came within {now - one.asked_at:.3g} s"
        else:
            silence = (
                f"the broker at {self._endpoint} did not answer for {now - max(one.asked_at, self._lost_at):.3g} s"
            )
        if one.said_to:
            words = f"{what} may or may not have happened: {silence}; find out before you do it again"
            return self._fail(request, IndeterminateError(name, words), is_given_up=True)
        words = f"{what} was not done: {silence}; do it again when there is a broker: {where_to_look(self._endpoint)}"
        return self._fail(request, self._turned_away or NotDeliveredError(name, words), is_given_up=True)

    def _forget(self, request: int) -> _Unanswered | None:
        one = self._unanswered.pop(request, None)
        if one is not None:
            self._unanswered_bytes -= len(one.frame)
        return one


def result_or_raise(outcome: Outcome) -> bytes:
    """The result in an outcome; raises the error in it. If that is one of our tree which was raised by a handler, its
    cause is the `RemoteError` that carries the traceback and the causes which it had there."""
    if isinstance(outcome, Failure):
        error = outcome.to_exception()
        was_raised = outcome.cause is not None or outcome.traceback.startswith("Traceback")
        raise error from RemoteError(outcome) if was_raised and not isinstance(error, RemoteError) else None
    return outcome or b""


def _words_for(message: Request) -> str:
    """What was asked for."""
    match message:
        case TaskSend():
            return f"sending the task {message.task} to the queue {message.queue!r}"
        case TaskAck():
            return f"acknowledging the task {message.task}"
        case TaskNack():
            return f"giving back the task {message.task}"
        case TaskSubscribe():
            return f"subscribing to the queue {message.queue!r}"
        case TaskUnsubscribe():
            return f"ending the subscription to the queue {message.queue!r}"
        case RpcRequest():
            return f"asking {message.recipient!r}"
        case RpcSubscribe():
            return f"subscribing as {message.identifier!r}"
        case RpcUnsubscribe():
            return f"ending the subscription as {message.identifier!r}"
        case BroadcastSend():
            return "sending a broadcast" + ("" if message.subject is None else f" about {message.subject!r}")
        case BroadcastSubscribe():
            return "subscribing to broadcasts"
        case BroadcastUnsubscribe():
            return "ending a subscription to broadcasts"
        case Call():
            return f"a call with {len(message.requests)} requests to the service behind the broker"
        case TaskList():
            return "listing tasks"
        case TaskEdit():
            return {"requeue": "requeuing", "bury": "burying", "delete": "deleting"}[message.action] + " tasks"
        case QueueConfigure():
            return f"setting the limits of the queue {message.queue!r}"
        case ResourceConfigure():
            return f"setting the capacity of the resource {message.resource!r}"
        case StatisticsAsk():
            return "asking for the statistics"
        case BlobPut():
            return f"putting the blob {message.digest}"
        case BlobGet():
            return f"getting the blob {message.digest}"
        case Goodbye():
            return "leaving"
        case _:
            assert_never(message)


def _name_of(message: Request) -> object:
    """What a subscription and its end have in common."""
    match message:
        case TaskSubscribe() | TaskUnsubscribe():
            return message.queue, message.subject
        case RpcSubscribe() | RpcUnsubscribe():
            return message.identifier
        case BroadcastSubscribe() | BroadcastUnsubscribe():
            return message.subscription
        case _:
            raise TypeError(f"{type(message).__name__} is about no subscription")


def _bytes_stated(message: Request, frame: bytes) -> int:
    """What a subscription takes in a `Hello`, at most: of a shared one the names stand there twice."""
    return 2 * len(frame) if isinstance(message, TaskSubscribe) and message.shared else len(frame)


def _size(result: TaskResult) -> int:
    return len(result.outcome) if isinstance(result.outcome, bytes) else 0


def _remember(memory: OrderedDict[_K, _V], key: _K, value: _V) -> None:
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)
