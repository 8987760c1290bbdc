"""What comes for the handlers of one communicator, and what becomes of it. The core's side only, but for `cancel`.

- **Tasks.** The broker knows one subscription for each (queue, subject pattern) of a session; its credit is the sum of
  what the local ones (`Lane`) give. A task goes to the lane with the most room. One for which there is no room any more
  goes back as not attempted.
- **Questions** are answered with `BusyError` when too many are in hand, by number or by bytes.
- **Broadcasts** that a subscription can't take are dropped and counted, those that the broker dropped too; it is told
  how many as soon as it caught up by half (`on_missed`), together with `on_reconnect` callbacks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import CancelledError as FutureCancelledError
from typing import TYPE_CHECKING, Protocol

import msgspec

from prunus.errors import (
    BusyError,
    DuplicateSubscriberError,
    Failure,
    IndeterminateError,
    MessageTooLargeError,
    NotDeliveredError,
    PrunusError,
    TaskRejectedError,
    UnroutableError,
    speakable,
)
from prunus.messaging.client import OVER, Answered, ClientCore
from prunus.messaging.communicator import (
    MAX_BODY_BYTES,
    MAX_BROADCASTS_IN_HAND,
    MAX_QUESTIONS_IN_HAND,
    BroadcastHandler,
    RpcHandler,
    TaskHandler,
)
from prunus.messaging.handover import Callback, Handler, Handover, Job, Jobs, NotRunError, Waiter
from prunus.messaging.messages import (
    MAX_CREDIT,
    BroadcastDelivery,
    BroadcastSubscribe,
    BroadcastUnsubscribe,
    Done,
    Outcome,
    Request,
    RpcDelivery,
    RpcSubscribe,
    RpcUnsubscribe,
    TaskAck,
    TaskDelivery,
    TaskNack,
    TaskSubscribe,
    TaskUnsubscribe,
    outcome_of,
)
from prunus.messaging.patterns import matcher

if TYPE_CHECKING:
    from prunus.messaging.peer import PeerCommunicator

MAX_QUESTION_BYTES_IN_HAND = 256 * 1024 * 1024
"""The bodies of the questions in hand; more are answered with `BusyError`."""
MAX_BROADCAST_BYTES_IN_HAND = 64 * 1024 * 1024
"""Their bodies, for all subscriptions together. One larger than what is left is dropped and counted."""
MAX_REASON_CHARS = 1000
"""A longer reason for which a task is given back keeps its beginning."""
NO_BODY = "its body could not be fetched: {}"
"""The reason for which such a task is given back."""

_CANCELLED = (asyncio.CancelledError, FutureCancelledError)

logger = logging.getLogger(__name__)


class Incoming(msgspec.Struct, frozen=True, kw_only=True):
    """An `IncomingTask`."""

    id: str
    key: str | None
    queue: str
    subject: str | None
    body: bytes
    epoch: int
    attempt: int


class Heard(msgspec.Struct, frozen=True):
    """A `Broadcast`."""

    body: bytes
    sender: str | None
    subject: str | None


class Deliveries:
    """See the module."""

    def __init__(self, core: ClientCore, jobs: Jobs, handover: Handover) -> None:
        self.core, self.jobs, self.handover = core, jobs, handover
        self.lanes: dict[tuple[str, str | None], list[Lane]] = {}
        self.rpcs: dict[str, RpcSubscription] = {}
        self.broadcasts: dict[int, BroadcastSubscription] = {}
        self.reconnected: dict[int, Callback] = {}
        self.in_hand: dict[str, TaskInHand] = {}
        """By task: who works on it."""
        self.settling: dict[int, TaskDelivery] = {}
        """By request: what handlers have done, until the broker has confirmed it."""
        self.questions_in_hand = self.question_bytes = self.broadcast_bytes = 0
        self._behind: dict[BroadcastSubscription, None] = {}
        """Those that missed something and were not yet told."""

    # --- tasks ---

    def credit_request(self, id: int, key: tuple[str, str | None]) -> Request:
        """Say what the lanes of this (queue, subject pattern) have room for."""
        queue, subject = key
        staying = [lane for lane in self.lanes.get(key, ()) if not lane.leaving]
        if staying:
            credit = min(sum(lane.credit for lane in staying), MAX_CREDIT)
            shared = any(lane.shared for lane in staying)
            return TaskSubscribe(id=id, queue=queue, subject=subject, credit=credit, shared=shared)
        if not self.lanes.get(key):
            self.lanes.pop(key, None)
        return TaskUnsubscribe(id=id, queue=queue, subject=subject)

    def say_credit(self, now: float, key: tuple[str, str | None]) -> None:
        self.core.ask(now, lambda id: self.credit_request(id, key))

    def task_came(self, now: float, delivery: TaskDelivery) -> None:
        lanes = self.lanes.get((delivery.queue, delivery.pattern), ())
        lane = max(lanes, key=lambda lane: lane.room) if len(lanes) > 1 else next(iter(lanes), None)
        if lane is None or lane.room <= 0:
            self.give_back(now, delivery, "the receiver had no room for it", attempted=False)
            return
        lane.busy += 1
        self.in_hand[delivery.task] = in_hand = lane.take(now, delivery)
        in_hand.lane = lane

    def give_back(self, now: float, task: TaskDelivery, reason: str, *, attempted: bool) -> None:
        reason = as_reason(reason)
        self.core.ask(
            now,
            lambda id: TaskNack(id=id, task=task.task, epoch=task.epoch, reason=reason, attempted=attempted),
        )

    def settled(self, acks: Iterable[tuple[str, int]]) -> None:
        """A call acknowledged these tasks: they are not in hand any more, though their handlers may still end."""
        for task, epoch in acks:
            in_hand = self.in_hand.get(task)
            if in_hand is not None and in_hand.delivery.epoch == epoch:
                self.let_go(in_hand)

    def give_up_places(self, now: float, acks: Iterable[tuple[str, int]]) -> None:
        """A call is about to acknowledge these tasks: those that were fetched give up their places first."""
        for task, epoch in acks:
            in_hand = self.in_hand.get(task)
            if isinstance(in_hand, PulledTask) and in_hand.delivery.epoch == epoch:
                in_hand.pull.close(now)

    def lost(self, now: float, task: str) -> None:
        """Somebody else has this task now: nobody wants what comes of it here."""
        in_hand = self.in_hand.get(task)
        if in_hand is not None:
            self.let_go(in_hand)
            in_hand.was_lost(now)

    def was_settled(self, event: Answered) -> PrunusError | None:
        """The answer to the acknowledgement of a task came; why it does not count, if it does not."""
        delivery = self.settling.pop(event.id, None)
        if not (isinstance(event.message, Done) and event.message.stale and isinstance(event.request, TaskAck)):
            return None
        if event.unsure and event.message.over:
            return None  # it was said on a connection that broke, and did it
        if delivery is not None:
            logger.warning(
                "somebody else has %s meanwhile; what its handler came to is dropped",
                _named(delivery),
                extra={"task": delivery.task},
            )
        return TaskRejectedError(f"the task {event.request.task} is somebody else's meanwhile")

    def let_go(self, in_hand: TaskInHand) -> bool:
        """It takes no room any more; whether it did."""
        lane, in_hand.lane = in_hand.lane, None
        if lane is None:
            return False
        lane.busy -= 1
        if self.in_hand.get(in_hand.delivery.task) is in_hand:
            del self.in_hand[in_hand.delivery.task]
        return True

    # --- questions ---

    def question_came(self, question: RpcDelivery) -> None:
        subscription = self.rpcs.get(question.identifier)
        if subscription is None:
            self.answer(question, outcome_of(UnroutableError(question.identifier)))
        elif (
            self.questions_in_hand >= MAX_QUESTIONS_IN_HAND
            or self.question_bytes + len(question.body) > MAX_QUESTION_BYTES_IN_HAND
        ):
            busy = BusyError(f"{question.identifier!r} has {self.questions_in_hand:,} questions in hand; ask later")
            self.answer(question, outcome_of(busy))
        else:
            self.questions_in_hand += 1
            self.question_bytes += len(question.body)
            self.jobs.start(_QuestionJob(self, subscription, question))

    def answer(self, question: RpcDelivery, outcome: Outcome) -> None:
        self.core.answer(question.caller, question.id, outcome)

    # --- broadcasts ---

    def broadcast_came(self, message: BroadcastDelivery) -> None:
        heard: Heard | None = None
        for subscription in self.broadcasts.values():
            if not (subscription.sender(message.sender) and subscription.subject(message.subject)):
                continue
            size = len(message.body)
            if (
                subscription.in_hand >= MAX_BROADCASTS_IN_HAND
                or self.broadcast_bytes + size > MAX_BROADCAST_BYTES_IN_HAND
            ):
                self._missed(subscription, 1)
                continue
            heard = heard or Heard(message.body, message.sender, message.subject)
            subscription.in_hand += 1
            self.broadcast_bytes += size
            self.jobs.start(_BroadcastJob(self, subscription, heard))

    def missed(self, count: int) -> None:
        """The broker dropped so many; for which of the subscriptions they were nobody knows."""
        for subscription in self.broadcasts.values():
            self._missed(subscription, count)
        if not self.broadcasts:
            self.tell_reconnected()

    def _missed(self, subscription: BroadcastSubscription, count: int) -> None:
        if subscription not in self._behind:
            logger.warning("broadcasts come faster than they are handled; some are dropped, and told as missed")
            self._behind[subscription] = None
        subscription.on_missed.gather(count)

    def tell_missed(self) -> None:
        """Tell those that caught up how many they missed."""
        told = False
        for subscription in list(self._behind):
            if subscription.in_hand <= MAX_BROADCASTS_IN_HAND // 2:
                subscription.on_missed.call(self.handover)
                if not subscription.on_missed.gathered:
                    del self._behind[subscription]
                    told = True
        if told:
            self.tell_reconnected()  # who asks for no numbers: something was missed, as in a reconnection

    def tell_reconnected(self) -> None:
        for callback in list(self.reconnected.values()):
            callback.gather(1)
            callback.call(self.handover)

    # --- the whole ---

    def subscriptions(self) -> list[TaskSubscription | RpcSubscription | BroadcastSubscription]:
        """Those with a handler. On any side: it looks at copies."""
        lanes = [lane for lanes in list(self.lanes.values()) for lane in list(lanes)]
        tasks = [lane for lane in lanes if isinstance(lane, TaskSubscription)]
        return [*tasks, *list(self.rpcs.values()), *list(self.broadcasts.values())]

    def look_for_closed_loops(self, now: float) -> None:
        """A loop that was closed will never end what runs in it, and its subscriptions are over."""
        self.jobs.strand_those_of_closed_loops()
        for subscription in self.subscriptions():
            if subscription.handler.loop.is_closed():
                logger.warning("an event loop was closed before its subscriptions were cancelled; they end now")
                self.core.ask(now, subscription.leave)

    def forget(self, subscription: BroadcastSubscription) -> None:
        self._behind.pop(subscription, None)

    def waiting_lanes(self) -> Iterator[Pull]:
        for lanes in self.lanes.values():
            for lane in lanes:
                if isinstance(lane, Pull):
                    yield lane


# --- subscriptions ----------------------------------------------------------------------------------


class BaseSubscription(ABC):
    """A `Subscription`."""

    def __init__(self, communicator: PeerCommunicator) -> None:
        communicator._check_use()
        self.communicator = communicator

    @abstractmethod
    def __str__(self) -> str:
        """To what it subscribes."""

    @abstractmethod
    def _is_active(self) -> bool:
        """Things are delivered to it."""

    def __repr__(self) -> str:
        state = "" if self._is_active() and not self.communicator._closing else ", cancelled"
        return f"<{type(self).__name__} {self} of {self.communicator.session}{state}>"

    @abstractmethod
    def enter(self, id: int) -> Request:
        """On the core's side: be known here, and what to tell the broker."""

    @abstractmethod
    def leave(self, id: int) -> Request:
        """On the core's side: deliver nothing more, and what to tell the broker."""

    async def cancel(self) -> None:
        with contextlib.suppress(*OVER, NothingToDoError):
            await self.communicator._request(self.leave, nothing)

    async def set_credit(self, credit: int) -> None:
        raise TypeError("only a task subscription has a credit")


class Lane(BaseSubscription):
    """Who takes tasks of one queue whose subject matches one pattern."""

    def __init__(
        self, communicator: PeerCommunicator, queue: str, subject: str | None, credit: int, shared: bool = False
    ) -> None:
        super().__init__(communicator)
        self.key = queue, subject
        self.credit = credit
        self.shared = shared
        self.busy = 0
        self.leaving = False
        """It asks for nothing more, but takes what is on its way."""

    @property
    def room(self) -> int:
        return self.credit - self.busy

    def __str__(self) -> str:
        queue, subject = self.key
        return f"{queue!r}" + ("" if subject is None else f", subject {subject!r}") + f", credit {self.credit}"

    def _is_active(self) -> bool:
        return self in self.communicator._deliveries.lanes.get(self.key, ())

    @abstractmethod
    def take(self, now: float, delivery: TaskDelivery) -> TaskInHand: ...

    def enter(self, id: int) -> Request:
        deliveries = self.communicator._deliveries
        deliveries.lanes.setdefault(self.key, []).append(self)
        return deliveries.credit_request(id, self.key)

    def leave(self, id: int) -> Request:
        deliveries = self.communicator._deliveries
        lanes = deliveries.lanes.get(self.key, [])
        if self not in lanes:
            raise NothingToDoError
        lanes.remove(self)
        return deliveries.credit_request(id, self.key)


class TaskSubscription(Lane):
    """Tasks go to a handler."""

    def __init__(
        self,
        communicator: PeerCommunicator,
        handler: TaskHandler,
        queue: str,
        subject: str | None,
        credit: int,
        shared: bool,
    ) -> None:
        super().__init__(communicator, queue, subject, credit, shared)
        self.handler = Handler(handler)

    def take(self, now: float, delivery: TaskDelivery) -> TaskInHand:
        deliveries = self.communicator._deliveries
        job = _TaskJob(deliveries, self.handler, delivery, self.communicator._fetch)
        deliveries.jobs.start(job)
        return job

    async def set_credit(self, credit: int) -> None:
        if not isinstance(credit, int) or isinstance(credit, bool) or credit < 0:
            raise ValueError(f"a credit is a whole number from 0 on, not {credit!r:.100}")

        def change(id: int) -> Request:
            self.credit = credit
            return self.communicator._deliveries.credit_request(id, self.key)

        await self.communicator._request(change, nothing)


class Pull(Lane):
    """One task goes to the caller of `next_task`. Its place is given up before the task is settled, so that the broker
    never fills it again."""

    def __init__(self, communicator: PeerCommunicator, queue: str, subject: str | None) -> None:
        super().__init__(communicator, queue, subject, 1)
        self.waiter = Waiter()
        self.took: PulledTask | None = None

    def take(self, now: float, delivery: TaskDelivery) -> TaskInHand:
        self.took = PulledTask(self, delivery)
        if self.leaving:  # it was on its way: then it keeps its place
            self.leaving = False
            self.communicator._deliveries.say_credit(now, self.key)
        self.resolve(self.took)
        return self.took

    def resolve(self, outcome: object) -> None:
        self.waiter.outcome = outcome
        self.communicator._deliveries.handover.add(self.waiter.loop, self.waiter)

    @property
    def room(self) -> int:
        return 0 if self.took is not None else 1

    def withdraw(self, id: int) -> Request:
        """Ask the broker for nothing more. What is already on its way here is taken all the same."""
        self.leaving = self.took is None
        return self.communicator._deliveries.credit_request(id, self.key)

    def withdrawn(self, _: object) -> None:
        """The broker knows: nothing is on its way any more."""
        if self.leaving:
            self.close(None)

    def close(self, now: float | None) -> None:
        """Give up the place, and tell the broker if `now` is given."""
        deliveries = self.communicator._deliveries
        lanes = deliveries.lanes.get(self.key, [])
        if self in lanes:
            lanes.remove(self)
            if now is not None:
                deliveries.say_credit(now, self.key)
            elif not lanes:
                del deliveries.lanes[self.key]

    def abandon(self, now: float) -> None:
        """Nobody waits for it any more: a task that came all the same goes back untouched."""
        self.close(now)
        if self.took is not None and self.communicator._deliveries.let_go(self.took):
            reason = "the receiver did not wait for it"
            self.communicator._deliveries.give_back(now, self.took.delivery, reason, attempted=False)


class RpcSubscription(BaseSubscription):
    """Questions to one name go to a handler."""

    def __init__(self, communicator: PeerCommunicator, handler: RpcHandler, identifier: str) -> None:
        super().__init__(communicator)
        self.identifier, self.handler = identifier, Handler(handler)

    def __str__(self) -> str:
        return f"{self.identifier!r}"

    def _is_active(self) -> bool:
        return self.communicator._deliveries.rpcs.get(self.identifier) is self

    def enter(self, id: int) -> Request:
        rpcs = self.communicator._deliveries.rpcs
        if self.identifier in rpcs:
            raise DuplicateSubscriberError(self.identifier, here=True)
        rpcs[self.identifier] = self
        return RpcSubscribe(id=id, identifier=self.identifier)

    def leave(self, id: int) -> Request:
        rpcs = self.communicator._deliveries.rpcs
        if rpcs.get(self.identifier) is not self:
            raise NothingToDoError
        del rpcs[self.identifier]
        return RpcUnsubscribe(id=id, identifier=self.identifier)


class BroadcastSubscription(BaseSubscription):
    """Broadcasts whose sender and subject match go to a handler."""

    def __init__(
        self,
        communicator: PeerCommunicator,
        number: int,
        handler: BroadcastHandler,
        names: tuple[str | None, str | None],
        on_missed: Callable[[int], object] | None,
    ) -> None:
        super().__init__(communicator)
        self.number, self.handler, self.names = number, Handler(handler), names
        self.sender, self.subject = matcher(names[0]), matcher(names[1])
        self.on_missed = Callback(on_missed or (lambda count: None))
        self.in_hand = 0

    def __str__(self) -> str:
        sender, subject = self.names
        named = (("sender", sender), ("subject", subject))
        return ", ".join(f"{what} {name!r}" for what, name in named if name is not None) or "all"

    def _is_active(self) -> bool:
        return self.communicator._deliveries.broadcasts.get(self.number) is self

    def enter(self, id: int) -> Request:
        self.communicator._deliveries.broadcasts[self.number] = self
        return BroadcastSubscribe(id=id, subscription=self.number, sender=self.names[0], subject=self.names[1])

    def leave(self, id: int) -> Request:
        deliveries = self.communicator._deliveries
        if deliveries.broadcasts.pop(self.number, None) is None:
            raise NothingToDoError
        deliveries.forget(self)
        return BroadcastUnsubscribe(id=id, subscription=self.number)


class NothingToDoError(PrunusError):
    """The subscription is cancelled already."""


# --- what is in hand --------------------------------------------------------------------------------


class TaskInHand(Protocol):
    """A task that somebody here works on."""

    delivery: TaskDelivery
    lane: Lane | None
    """Whose room it takes; None: nobody's any more."""

    def was_lost(self, now: float) -> None:
        """Somebody else has it now."""
        ...


class PulledTask:
    """It is with the caller of `next_task`."""

    __slots__ = ("delivery", "is_lost", "lane", "pull")

    def __init__(self, pull: Pull, delivery: TaskDelivery) -> None:
        self.pull, self.delivery = pull, delivery
        self.lane: Lane | None = None
        self.is_lost = False
        """Somebody else has it."""

    def was_lost(self, now: float) -> None:
        self.pull.close(now)
        self.is_lost = True
        logger.warning(
            "somebody else has %s now, which was fetched here; what is said about it here does not count",
            _named(self.delivery),
            extra={"task": self.delivery.task},
        )


class _TaskJob(Job):
    __slots__ = ("_deliveries", "_fetch", "delivery", "lane")

    def __init__(
        self,
        deliveries: Deliveries,
        handler: Handler,
        delivery: TaskDelivery,
        fetch: Callable[[str], Awaitable[bytes]],
    ) -> None:
        task = Incoming(
            id=delivery.task,
            key=delivery.key,
            queue=delivery.queue,
            subject=delivery.subject,
            body=delivery.body,
            epoch=delivery.epoch,
            attempt=delivery.attempt,
        )
        super().__init__(deliveries.jobs, handler, task)
        self._deliveries, self.delivery, self._fetch = deliveries, delivery, fetch
        self.lane: Lane | None = None

    async def _prepare(self, argument: Incoming) -> Incoming:
        if self.delivery.blob is None:
            return argument
        try:
            body = await self._fetch(self.delivery.blob)
        except PrunusError as error:
            logger.warning(
                "%s is given back: its body could not be fetched: %s",
                _named(self.delivery),
                error,
                extra={"task": argument.id},
            )
            raise TaskRejectedError(NO_BODY.format(error)) from error
        if self.lane is None:
            raise NotRunError("somebody else has this task meanwhile")
        return msgspec.structs.replace(argument, body=body)

    def was_lost(self, now: float) -> None:
        stopped = self._deliveries.jobs.cancel(self)
        logger.warning(
            "somebody else has this task now; its handler %s: %s",
            "is cancelled" if stopped else "can't be stopped, and what it returns is dropped",
            _named(self.delivery),
            extra={"task": self.delivery.task},
        )

    def finish(self, now: float) -> None:
        deliveries, task, error = self._deliveries, self.delivery, self.error
        if not deliveries.let_go(self):
            return  # a call settled it, or it was lost
        if isinstance(error, _CANCELLED):
            deliveries.give_back(now, task, "its handler was cancelled", attempted=True)
        elif error is not None and not isinstance(error, Exception):  # the end of its program, not of the task
            deliveries.give_back(now, task, f"its handler was ended by {Failure.of(error)}", attempted=True)
        elif isinstance(error, TaskRejectedError):
            deliveries.give_back(now, task, Failure.of(error).message, attempted=True)
        elif isinstance(error, NotRunError):
            deliveries.look_for_closed_loops(now)  # before it is offered again
            deliveries.give_back(now, task, str(error), attempted=self.task is not None)
        else:
            outcome = _bytes_or_failure(self.result, error, optional=True)
            if isinstance(outcome, Failure):
                logger.warning(
                    "a handler failed; %s is done with, and its sender gets the error",
                    _named(task),
                    extra={"task": task.task, "failure": str(outcome)},
                    exc_info=error,
                )
            request = deliveries.core.ask(
                now, lambda id: TaskAck(id=id, task=task.task, epoch=task.epoch, outcome=outcome)
            )
            deliveries.settling[request] = task


class _QuestionJob(Job):
    __slots__ = ("_deliveries", "_question")

    def __init__(self, deliveries: Deliveries, subscription: RpcSubscription, question: RpcDelivery) -> None:
        super().__init__(deliveries.jobs, subscription.handler, question.body)
        self._deliveries, self._question = deliveries, question

    def finish(self, now: float) -> None:
        self._deliveries.questions_in_hand -= 1
        self._deliveries.question_bytes -= len(self._question.body)
        self._deliveries.answer(self._question, _bytes_or_failure(self.result, self.error, optional=False))


class _BroadcastJob(Job):
    __slots__ = ("_deliveries", "_size", "_subscription")

    is_answered = False

    def __init__(self, deliveries: Deliveries, subscription: BroadcastSubscription, heard: Heard) -> None:
        super().__init__(deliveries.jobs, subscription.handler, heard)
        self._deliveries, self._subscription, self._size = deliveries, subscription, len(heard.body)

    def finish(self, now: float) -> None:
        self._subscription.in_hand -= 1
        self._deliveries.broadcast_bytes -= self._size
        if isinstance(self.error, Exception):
            logger.warning("a broadcast's handler failed; other handlers go on", exc_info=self.error)


def as_reason(text: str) -> str:
    return speakable(text[:MAX_REASON_CHARS])


def nothing(answer: object) -> None:
    """What is made of an answer that says only that it is done."""


def _named(task: TaskDelivery) -> str:
    return f"the task {task.task} of the queue {task.queue!r}"


def _bytes_or_failure(result: object, error: BaseException | None, *, optional: bool) -> Outcome:
    if error is None:
        if isinstance(result, bytes):  # or was made of a bytearray, or a memoryview, when the handler ended
            if len(result) <= MAX_BODY_BYTES:
                return bytes(result)  # of a subclass (numpy has one) too
            error = MessageTooLargeError(len(result), MAX_BODY_BYTES)
        elif optional and result is None:
            return None
        else:
            error = TypeError(f"a handler must return bytes, not {type(result).__name__}")
    failure = outcome_of(error)
    if isinstance(error, _OF_A_MESSAGE):
        failure = msgspec.structs.replace(failure, type=f"prunus.{type(error).__name__}")
    return failure


_OF_A_MESSAGE = (NotDeliveredError, IndeterminateError, UnroutableError)
"""What these say, they say of a message. Raised by a handler that is another one than that which led to the handler:
whoever sent that one gets them as a `RemoteError`."""
