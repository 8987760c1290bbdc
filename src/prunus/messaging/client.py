"""What a client remembers, so that a lost connection or a restarted broker changes nothing for its user.

A pure machine like the broker's core: frames, requests and time go in, events come out, and `take` hands over the
frames to send. It has no socket and no clock.

Rules
- `Hello` first, with all that should be true: subscriptions, tasks in hand, results waited for. After `Welcome`
  every request without an answer is said again, in order; the broker recognises what it did already.
- A delivery with an epoch not above the highest one seen for that task is an echo, and ignored.
- A task is in hand from its delivery until the broker confirmed that it is settled.
- A question that comes twice is answered twice with the same answer; its handler runs once.
- A heartbeat every `HEARTBEAT_S`; after `SILENCE_S` without a sign of the broker the connection is made anew.
- Nothing waits for ever: a question ends at its deadline, other requests after `PATIENCE_S` without a broker, as
  `NotDeliveredError` if it was never sent and `IndeterminateError` if it was.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, assert_never

import msgspec

from prunus.errors import BusyError, Failure, IndeterminateError, NotDeliveredError, PrunusError
from prunus.messaging.messages import (
    Alive,
    BroadcastDelivery,
    BroadcastSend,
    BroadcastSubscribe,
    BroadcastUnsubscribe,
    Call,
    CallDone,
    ClientMessage,
    Done,
    Goodbye,
    Heartbeat,
    Hello,
    HelloNeeded,
    Outcome,
    Peer,
    Refused,
    Request,
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
    decode_from_broker,
    encode,
    outcome_of,
)

HEARTBEAT_S = 2.0
"""How often a client shows that it lives."""
SILENCE_S = 10.0
"""A broker that says nothing for so long is lost."""
WELCOME_S = 3.0
"""How long a `Hello` waits for its `Welcome` before the connection is made anew."""
PATIENCE_S = 60.0
"""How long a request waits for a lost broker to come back."""
MAX_UNANSWERED = 10_000
"""Requests in flight; more are refused with `BusyError`."""
MAX_UNANSWERED_BYTES = 256 * 1024 * 1024
"""Their bytes; more are refused with `BusyError`."""
MAX_REMEMBERED = 10_000
"""Tasks whose highest epoch is remembered, and questions whose answer is."""

_K = TypeVar("_K")
_V = TypeVar("_V")


# --- events -----------------------------------------------------------------------------------------


class _Event(msgspec.Struct, frozen=True):
    pass


class Answered(_Event, frozen=True):
    """The request is done."""

    id: int
    message: Done | TaskStored | CallDone | RpcDone


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
    | Reconnect
    | Violation
)


@dataclass(slots=True)
class _Unanswered:
    message: Request
    frame: bytes
    asked_at: float
    said_to: int = 0
    """The epoch of the broker to which it was said first; 0: not yet."""


class ClientCore:
    """See the module. `take` after every call of another method."""

    def __init__(self, session: str, peer: Peer) -> None:
        self.session = session
        self.broker_epoch = 0
        self.up = False
        self.held: dict[str, int] = {}
        """The epoch of each task in hand."""
        self._peer = peer
        self._next_id = 1
        self._was_up = False
        self._unanswered: dict[int, _Unanswered] = {}
        self._unanswered_bytes = 0
        self._deadlines: list[tuple[float, int]] = []
        """A heap of (deadline, request); those that are answered meanwhile are skipped."""
        self._highest: OrderedDict[str, int] = OrderedDict()
        self._awaited: dict[str, None] = {}
        """Tasks whose result is waited for."""
        self._expected: dict[str, TaskResult | None] = {}
        """The same before their `TaskSend` is answered. The result may be here already."""
        self._queues: dict[str, int] = {}
        self._identifiers: dict[str, int] = {}
        self._patterns: dict[int, tuple[str | None, str | None]] = {}
        self._answers: OrderedDict[tuple[str, int], bytes | None] = OrderedDict()
        self._out: list[bytes] = []
        self._hello_at = self._heard_at = self._beat_at = self._lost_at = 0.0

    # --- the connection ---

    def connect(self, now: float) -> None:
        """There is a fresh connection: nothing was said on it yet."""
        if self.up or not self._hello_at:
            self._lost_at = now
        self.up = False
        self._out.clear()
        self._hello(now)

    def on_frame(self, now: float, frame: bytes) -> list[Event]:
        """What a frame of the broker means. Raises `ProtocolError` (make a new connection then)."""
        message = decode_from_broker(frame)
        self._heard_at = now
        match message:
            case HelloNeeded():
                if self.up:  # a broker that does not know us: it restarted, or forgot us
                    self.up, self._lost_at = False, now
                    self._hello(now)
                return []
            case Violation():
                return [message]
            case Welcome():
                return [] if self.up else self._welcome(now, message)
        if not self.up:
            return []  # an echo from before our Hello; what matters will be said again
        match message:
            case Alive():
                return []
            case Done() | TaskStored() | CallDone() | RpcDone():
                return self._answered(message)
            case Refused():
                return self._fail(message.id, message.failure.to_exception())
            case TaskDelivery():
                if message.epoch <= self._highest.get(message.task, 0):
                    return []
                _remember(self._highest, message.task, message.epoch)
                self.held[message.task] = message.epoch
                return [message]
            case TaskResult():
                return self._result(message)
            case RpcDelivery():
                key = message.caller, message.id
                if key not in self._answers:
                    _remember(self._answers, key, None)
                    return [message]
                if (answer := self._answers[key]) is not None:
                    self._out.append(answer)
                return []
            case BroadcastDelivery():
                return [message]
            case _:
                assert_never(message)

    def tick(self, now: float) -> list[Event]:
        """Let time pass (see `due`)."""
        events: list[Event] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request = heapq.heappop(self._deadlines)
            if request in self._unanswered:
                events += self._give_up(request)
        if self.up:
            if now - self._heard_at > SILENCE_S:
                events.append(Reconnect(f"the broker was silent for {SILENCE_S:g} s"))
            elif now - self._beat_at >= HEARTBEAT_S:
                self._beat_at = now
                self._say(Heartbeat(seen=self._seen()))
        else:
            for request, one in list(self._unanswered.items()):
                if isinstance(one.message, TaskAck | TaskNack):
                    continue  # they have time as long as the task is in hand
                if now - max(one.asked_at, self._lost_at) > PATIENCE_S:
                    events += self._give_up(request)
            if now - self._hello_at > WELCOME_S:
                events.append(Reconnect(f"no welcome for {WELCOME_S:g} s"))
        return events

    def due(self) -> float:
        """When `tick` has something to do next, at the latest."""
        next_sign = self._beat_at + HEARTBEAT_S if self.up else self._hello_at + WELCOME_S
        while self._deadlines and self._deadlines[0][1] not in self._unanswered:
            heapq.heappop(self._deadlines)
        return min(next_sign, self._deadlines[0][0]) if self._deadlines else next_sign

    def take(self) -> list[bytes]:
        """The frames to send, in order; they are handed over once."""
        frames, self._out = self._out, []
        return frames

    # --- requests ---

    def ask(self, now: float, make: Callable[[int], Request], timeout_s: float | None = None) -> int:
        """Say a request until it is answered, at most for `timeout_s`; its id.

        Raises `MessageTooLargeError` or `BusyError`; nothing was said then.
        """
        message = make(self._next_id)
        frame = encode(message)
        if not isinstance(message, TaskAck | TaskNack | Goodbye) and (
            len(self._unanswered) >= MAX_UNANSWERED or self._unanswered_bytes + len(frame) > MAX_UNANSWERED_BYTES
        ):
            raise BusyError(f"{len(self._unanswered):,} requests wait for the broker; try again later")
        self._next_id += 1
        self._unanswered[message.id] = one = _Unanswered(message, frame, now)
        self._unanswered_bytes += len(frame)
        if timeout_s is not None:
            heapq.heappush(self._deadlines, (now + timeout_s, message.id))
        self._note(message)
        if self.up:
            self._say_request(one)
        return message.id

    def answer(self, caller: str, question: int, outcome: Outcome) -> None:
        """Answer a question that came as `RpcDelivery`."""
        try:
            frame = encode(RpcAnswer(caller=caller, id=question, outcome=outcome))
        except PrunusError as error:  # too large: then that is the answer
            frame = encode(RpcAnswer(caller=caller, id=question, outcome=outcome_of(error)))
        _remember(self._answers, (caller, question), frame)
        if self.up:
            self._out.append(frame)

    # --- inside ---

    def _hello(self, now: float) -> None:
        self._hello_at = self._heard_at = now
        hello = Hello(
            session=self.session,
            peer=self._peer,
            held=tuple(self.held.items()),
            awaited=tuple(self._awaited),
            expected=tuple(self._expected),
            queues=tuple(self._queues.items()),
            identifiers=tuple(self._identifiers.items()),
            patterns=tuple((number, sender, subject) for number, (sender, subject) in self._patterns.items()),
            seen=self._seen(),
        )
        self._say(hello)

    def _welcome(self, now: float, message: Welcome) -> list[Event]:
        self.up, self._beat_at = True, now
        self.broker_epoch = message.broker_epoch
        events: list[Event] = []
        for task in message.lost:
            if self.held.pop(task, None) is not None:
                events.append(TaskLost(task))
        for identifier in message.taken:
            if self._identifiers.pop(identifier, None) is not None:
                events.append(NameTaken(identifier))
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

    def _note(self, message: Request) -> None:
        """What the request makes true is said in every `Hello` from now on."""
        match message:
            case TaskSubscribe():
                self._queues[message.queue] = message.credit
            case TaskUnsubscribe():
                self._queues.pop(message.queue, None)
            case RpcSubscribe():
                self._identifiers.setdefault(message.identifier, 0)
            case RpcUnsubscribe():
                self._identifiers.pop(message.identifier, None)
            case BroadcastSubscribe():
                self._patterns[message.subscription] = message.sender, message.subject
            case BroadcastUnsubscribe():
                self._patterns.pop(message.subscription, None)
            case TaskSend():
                if message.want_result:
                    self._expected[message.task] = None
            case TaskAck() | TaskNack() | RpcRequest() | BroadcastSend() | Call() | Goodbye():
                pass
            case _:
                assert_never(message)

    def _answered(self, answer: Done | TaskStored | CallDone | RpcDone) -> list[Event]:
        one = self._forget(answer.id)
        if one is None:
            return []
        events: list[Event] = [Answered(answer.id, answer)]
        match one.message:
            case TaskSend(want_result=True) if isinstance(answer, TaskStored):
                early = self._expected.pop(one.message.task, None)
                self._awaited[answer.task] = None
                if early is not None:
                    events += self._result(early)
            case TaskAck() | TaskNack():
                if self.held.get(one.message.task) == one.message.epoch:
                    del self.held[one.message.task]
            case Call():
                for task, epoch in one.message.acks:
                    if self.held.get(task) == epoch:
                        del self.held[task]
            case RpcSubscribe():
                if one.message.identifier in self._identifiers:
                    self._identifiers[one.message.identifier] = self.broker_epoch
            case _:
                pass
        return events

    def _result(self, message: TaskResult) -> list[Event]:
        if message.task in self._expected:
            self._expected[message.task] = message
        if message.task not in self._awaited:
            return []
        del self._awaited[message.task]
        self._say(ResultSeen(task=message.task))
        return [message]

    def _fail(self, request: int, error: PrunusError) -> list[Event]:
        one = self._forget(request)
        if one is None:
            return []
        match one.message:
            case RpcSubscribe():
                self._identifiers.pop(one.message.identifier, None)
            case TaskSubscribe():
                self._queues.pop(one.message.queue, None)
            case BroadcastSubscribe():
                self._patterns.pop(one.message.subscription, None)
            case TaskSend():
                self._expected.pop(one.message.task, None)
            case _:
                pass
        return [Failed(request, error)]

    def _give_up(self, request: int) -> list[Event]:
        one = self._unanswered[request]
        name = one.message.recipient if isinstance(one.message, RpcRequest) else type(one.message).__name__
        return self._fail(request, IndeterminateError(name) if one.said_to else NotDeliveredError(name))

    def _forget(self, request: int) -> _Unanswered | None:
        one = self._unanswered.pop(request, None)
        if one is not None:
            self._unanswered_bytes -= len(one.frame)
        return one


def result_or_raise(outcome: Outcome) -> bytes:
    """The result in an outcome; raises the error in it."""
    if isinstance(outcome, Failure):
        raise outcome.to_exception()
    return outcome or b""


def _remember(memory: OrderedDict[_K, _V], key: _K, value: _V) -> None:
    memory[key] = value
    memory.move_to_end(key)
    while len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)
