"""`Communicator` over a `ClientCore`: everything that does not depend on how frames travel.

There are two sides. The **users' side** is the public methods, in any event loop: each posts a command and awaits a
future of its own loop. The **core's side** is `_step`, run by whoever moves the frames (a thread, see `threaded`, or
the broker's loop, see `local`): it alone touches the core and the tables of subscriptions, so nothing needs a lock.
Commands are carried out in the order in which they were posted: a subscription and the question that follows it go
out in that order without waiting for each other.

Handlers run in the loop of their subscriber. Each ends in exactly one answer: its result, its exception or its
cancellation.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, assert_never

import msgspec

from prunus.errors import (
    BusyError,
    CommunicatorClosedError,
    ConnectionLostError,
    DuplicateSubscriberError,
    Failure,
    ForkedProcessError,
    MessageTooLargeError,
    ProtocolError,
    PrunusError,
    TaskRejectedError,
    UnroutableError,
)
from prunus.messaging.broker import matcher
from prunus.messaging.client import (
    Answered,
    ClientCore,
    Event,
    Failed,
    NameTaken,
    Reconnect,
    TaskLost,
    Up,
    result_or_raise,
)
from prunus.messaging.communicator import (
    DEFAULT_QUEUE,
    MAX_BODY_BYTES,
    RPC_TIMEOUT_S,
    BroadcastHandler,
    IncomingTask,
    RpcHandler,
    TaskHandler,
)
from prunus.messaging.liveness import this_peer
from prunus.messaging.messages import (
    MAX_NAME_CHARS,
    MAX_PRIORITY,
    BroadcastDelivery,
    BroadcastSend,
    BroadcastSubscribe,
    BroadcastUnsubscribe,
    Call,
    CallDone,
    Goodbye,
    Outcome,
    Request,
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
    outcome_of,
)

CLOSE_TIMEOUT_S = 2.0
"""How long `close` waits for the broker to hear it; a broker that does not will find out by itself."""
MAX_QUESTIONS_IN_HAND = 1000
"""Questions that handlers of one communicator work on; more are answered with `BusyError`."""
MAX_BROADCASTS_IN_HAND = 10_000
"""Broadcasts that wait for the handlers of one communicator; more are dropped, and told as a reconnection."""

logger = logging.getLogger(__name__)
T = TypeVar("T")
S = TypeVar("S", bound="_Subscription")
Command = Callable[[float], None]


class PeerCommunicator(ABC):
    """A `prunus.messaging.communicator.Communicator`; how its frames travel is up to the subclass."""

    def __init__(self, endpoint: str, name: str = "peer") -> None:
        self.endpoint = endpoint
        self._session = f"{name}-{secrets.token_hex(16)}"
        self._os_pid = os.getpid()
        self._closing = False
        self._commands: deque[Command] = deque()
        self._closers: list[_Waiter] = []
        # From here on: the core's side only.
        self._core = ClientCore(self._session, this_peer())
        self._finished = False
        self._goodbye: int | None = None
        self._finish_at: float | None = None
        self._waiters: dict[int, tuple[_Waiter, Callable[[Any], Any]]] = {}
        self._up_waiters: list[_Waiter] = []
        self._results: dict[str, Future[Outcome]] = {}
        self._tasks: dict[str, list[_TaskSubscription]] = {}
        self._rpcs: dict[str, _RpcSubscription] = {}
        self._broadcasts: dict[int, _BroadcastSubscription] = {}
        self._numbers = itertools.count(1)
        self._callbacks: dict[int, tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = {}
        self._in_hand: dict[_Job, Future[Any]] = {}
        self._questions_in_hand = self._broadcasts_in_hand = 0
        self._overflowed = False

    # --- for users: see the protocol ---

    @property
    def session(self) -> str:
        return self._session

    async def task_send(
        self,
        body: bytes,
        *,
        queue: str = DEFAULT_QUEUE,
        key: str | None = None,
        priority: int = 0,
        want_result: bool = False,
    ) -> Receipt:
        _check_names(queue, key)
        if not 0 <= priority <= MAX_PRIORITY:
            raise ValueError(f"a priority is from 0 to {MAX_PRIORITY}, not {priority}")
        task, body = secrets.token_hex(16), _checked_body(body)

        def receipt(answer: TaskStored) -> Receipt:
            result = self._results.setdefault(answer.task, Future()) if want_result else None
            return Receipt(answer.task, answer.stored, result)

        return await self._request(
            lambda id: TaskSend(
                id=id, task=task, body=body, queue=queue, key=key, priority=priority, want_result=want_result
            ),
            receipt,
        )

    async def rpc_send(self, recipient: str, body: bytes, *, timeout_s: float = RPC_TIMEOUT_S) -> bytes:
        _check_names(recipient)
        body = _checked_body(body)
        outcome: Outcome = await self._request(
            lambda id: RpcRequest(id=id, recipient=recipient, body=body, timeout_s=timeout_s),
            _outcome,
            timeout_s=timeout_s,
        )
        return result_or_raise(outcome)

    async def broadcast_send(self, body: bytes, *, sender: str | None = None, subject: str | None = None) -> None:
        _check_names(sender, subject)
        body = _checked_body(body)
        await self._request(lambda id: BroadcastSend(id=id, body=body, sender=sender, subject=subject), _nothing)

    async def call(self, requests: Sequence[bytes], *, acks: Sequence[IncomingTask] = ()) -> list[bytes]:
        bodies = tuple(_checked_body(request) for request in requests)
        settled = tuple((task.id, task.epoch) for task in acks)
        return await self._request(lambda id: Call(id=id, requests=bodies, acks=settled), _answers)

    async def add_task_subscriber(
        self, handler: TaskHandler, *, queue: str = DEFAULT_QUEUE, credit: int = 1
    ) -> _TaskSubscription:
        _check_names(queue)
        subscription = _TaskSubscription(self, queue, handler, _checked_credit(credit))

        def add(id: int) -> Request:
            self._tasks.setdefault(queue, []).append(subscription)
            return self._credit_request(id, queue)

        return await self._subscribe(subscription, add)

    async def add_rpc_subscriber(self, handler: RpcHandler, identifier: str) -> _RpcSubscription:
        _check_names(identifier)
        subscription = _RpcSubscription(self, identifier, handler)

        def add(id: int) -> Request:
            if identifier in self._rpcs:
                raise DuplicateSubscriberError(identifier)
            self._rpcs[identifier] = subscription
            return RpcSubscribe(id=id, identifier=identifier)

        return await self._subscribe(subscription, add)

    async def add_broadcast_subscriber(
        self, handler: BroadcastHandler, *, sender: str | None = None, subject: str | None = None
    ) -> _BroadcastSubscription:
        _check_names(sender, subject)
        number = next(self._numbers)
        subscription = _BroadcastSubscription(self, number, handler, sender, subject)

        def add(id: int) -> Request:
            self._broadcasts[number] = subscription
            return BroadcastSubscribe(id=id, subscription=number, sender=sender, subject=subject)

        return await self._subscribe(subscription, add)

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._check_use()
        number, loop = next(self._numbers), asyncio.get_running_loop()
        self._callbacks[number] = loop, callback

        def forget() -> None:
            self._callbacks.pop(number, None)

        return forget

    async def close(self) -> None:
        if os.getpid() != self._os_pid:
            return  # the parent's connection lives on; there is nothing here that could be closed
        self._check_caller()
        waiter = _Waiter.here()
        self._closing = True
        caller = _SERVING.get()
        self._commands.append(lambda now: self._begin_close(now, waiter, caller))
        if not self._wake():
            return
        await waiter.future
        self._joined()

    async def __aenter__(self) -> PeerCommunicator:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._session} at {self.endpoint}>"

    # --- what a subclass does ---

    @abstractmethod
    def _wake(self) -> bool:
        """Have `_step` run soon; thread-safe. False if it will never run again."""

    def _check_caller(self) -> None:  # noqa: B027 (not every subclass has a thread of its own)
        """Raise if the caller would wait for itself."""

    def _joined(self) -> None:  # noqa: B027
        """Called in `close` after everything ended."""

    # --- the users' side ---

    async def connected(self, timeout_s: float) -> None:
        """Wait until the broker knows us. Raises `ConnectionLostError`."""
        waiter = _Waiter.here()

        def wait(now: float) -> None:
            if self._core.up:
                waiter.resolve(None)
            else:
                self._up_waiters.append(waiter)

        self._post(wait)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.future
        except TimeoutError:
            raise ConnectionLostError(self.endpoint) from None

    async def _request(
        self, make: Callable[[int], Request], convert: Callable[[Any], T], timeout_s: float | None = None
    ) -> T:
        self._check_use()
        waiter = _Waiter.here()

        def start(now: float) -> None:
            try:
                if self._finished:
                    raise CommunicatorClosedError
                request = self._core.ask(now, make, timeout_s)
            except (PrunusError, ValueError, TypeError) as error:
                waiter.resolve(error)
            else:
                self._waiters[request] = waiter, convert

        self._post(start)
        result: T = await waiter.future
        return result

    async def _subscribe(self, subscription: S, add: Callable[[int], Request]) -> S:
        try:
            await self._request(add, _nothing)
        except BaseException:  # refused, or nobody waits for it any more: then it must not stay

            def take_back(now: float) -> None:
                with contextlib.suppress(PrunusError):
                    self._core.ask(now, subscription.leave)

            with contextlib.suppress(PrunusError):
                self._post(take_back)
            raise
        return subscription

    def _check_use(self) -> None:
        if os.getpid() != self._os_pid:
            raise ForkedProcessError("communicator")
        self._check_caller()
        if self._closing:
            raise CommunicatorClosedError

    def _post(self, command: Command) -> None:
        self._check_use()
        self._commands.append(command)
        if not self._wake():
            raise CommunicatorClosedError

    # --- the core's side ---

    def _step(self, now: float, frames: Iterable[bytes]) -> str | None:
        """Take what came and what was asked. The reason why the connection must be made anew, or None."""
        reconnect: str | None = None
        while self._commands:
            self._commands.popleft()(now)
        try:
            for frame in frames:
                for event in self._core.on_frame(now, frame):
                    reconnect = self._act(now, event) or reconnect
        except ProtocolError as error:
            reconnect = str(error)
        for event in self._core.tick(now):
            reconnect = self._act(now, event) or reconnect
        if self._finish_at is not None and now >= self._finish_at:
            self._finish()
        return None if self._finished else reconnect

    def _due(self) -> float:
        return min(self._core.due(), self._finish_at) if self._finish_at is not None else self._core.due()

    def _act(self, now: float, event: Event) -> str | None:
        match event:
            case Answered():
                self._settle(event.id, event.message)
                if event.id == self._goodbye:
                    self._finish_at = now
            case Failed():
                self._settle(event.id, event.error)
            case TaskDelivery():
                self._task_came(now, event)
            case TaskResult():
                if (result := self._results.pop(event.task, None)) is not None:
                    result.set_result(event.outcome)
            case TaskLost():
                logger.warning("somebody else has this task now; its end here is ignored", extra={"task": event.task})
            case RpcDelivery():
                self._question_came(event)
            case BroadcastDelivery():
                self._broadcast_came(now, event)
            case NameTaken():
                logger.warning("somebody else answers under this name now", extra={"identifier": event.identifier})
                self._rpcs.pop(event.identifier, None)
            case Up():
                for waiter in self._up_waiters:
                    waiter.resolve(None)
                self._up_waiters.clear()
                if event.again:
                    self._tell_reconnected()
            case Violation():
                logger.error("the broker does not understand us; use the same Prunus", extra={"reason": event.reason})
            case Reconnect():
                return event.reason
            case _:
                assert_never(event)
        return None

    def _settle(self, request: int, outcome: object) -> None:
        waiter, convert = self._waiters.pop(request, (None, _nothing))
        if waiter is not None:
            waiter.resolve(outcome if isinstance(outcome, BaseException) else convert(outcome))

    def _tell_reconnected(self) -> None:
        for loop, callback in list(self._callbacks.values()):
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(callback)

    def _credit_request(self, id: int, queue: str) -> Request:
        subscriptions = self._tasks.get(queue)
        if not subscriptions:
            return TaskUnsubscribe(id=id, queue=queue)
        return TaskSubscribe(id=id, queue=queue, credit=sum(one.credit for one in subscriptions))

    def _task_came(self, now: float, delivery: TaskDelivery) -> None:
        candidates = self._tasks.get(delivery.queue, ())
        for one in candidates:  # what a call has settled is not in hand any more, though its handler may still end
            one.in_hand = {task: epoch for task, epoch in one.in_hand.items() if self._core.held.get(task) == epoch}
        subscription = max(candidates, key=lambda one: one.credit - len(one.in_hand), default=None)
        if subscription is None or len(subscription.in_hand) >= subscription.credit:
            self._core.ask(now, lambda id: TaskNack(id=id, task=delivery.task, epoch=delivery.epoch))
            return
        subscription.in_hand[delivery.task] = delivery.epoch
        task = Incoming(
            id=delivery.task,
            key=delivery.key,
            queue=delivery.queue,
            body=delivery.body,
            epoch=delivery.epoch,
            attempt=delivery.attempt,
        )

        def done(now: float, future: Future[Any]) -> None:
            if subscription.in_hand.get(delivery.task) == delivery.epoch:
                del subscription.in_hand[delivery.task]
            if self._core.held.get(delivery.task) == delivery.epoch:
                self._settle_task(now, delivery, future)

        self._serve(subscription.loop, subscription.handler, task, done)

    def _settle_task(self, now: float, delivery: TaskDelivery, future: Future[Any]) -> None:
        """The handler ended and the task was not settled by a call."""
        task, epoch = delivery.task, delivery.epoch
        error = _error_of(future)
        if isinstance(error, asyncio.CancelledError | FutureCancelledError | TaskRejectedError | _NotRunError):
            self._core.ask(now, lambda id: TaskNack(id=id, task=task, epoch=epoch))
            return
        outcome: Outcome = _bytes_or_failure(None if error else future.result(), error, optional=True)
        if isinstance(outcome, Failure):
            logger.warning(
                "a task's handler failed; the task is done with, and its sender gets the error",
                extra={"task": task, "failure": str(outcome)},
                exc_info=error,
            )
        self._core.ask(now, lambda id: TaskAck(id=id, task=task, epoch=epoch, outcome=outcome))

    def _question_came(self, question: RpcDelivery) -> None:
        subscription = self._rpcs.get(question.identifier)
        refusal: PrunusError | None = None
        if subscription is None:
            refusal = UnroutableError(question.identifier)
        elif self._questions_in_hand >= MAX_QUESTIONS_IN_HAND:
            refusal = BusyError(f"{question.identifier!r} has {MAX_QUESTIONS_IN_HAND:,} questions in hand")
        if subscription is None or refusal is not None:
            self._core.answer(question.caller, question.id, outcome_of(refusal or UnroutableError(question.identifier)))
            return
        self._questions_in_hand += 1

        def done(now: float, future: Future[Any]) -> None:
            self._questions_in_hand -= 1
            error = _error_of(future)
            outcome = _bytes_or_failure(None if error else future.result(), error, optional=False)
            self._core.answer(question.caller, question.id, outcome)

        self._serve(subscription.loop, subscription.handler, question.body, done)

    def _broadcast_came(self, now: float, message: BroadcastDelivery) -> None:
        for subscription in list(self._broadcasts.values()):
            if not (subscription.sender(message.sender) and subscription.subject(message.subject)):
                continue
            if self._broadcasts_in_hand >= MAX_BROADCASTS_IN_HAND:
                if not self._overflowed:
                    logger.warning("broadcasts come faster than they are handled; some are dropped")
                    self._overflowed = True
                return
            self._broadcasts_in_hand += 1
            heard = Heard(body=message.body, sender=message.sender, subject=message.subject)
            self._serve(subscription.loop, subscription.handler, heard, self._broadcast_done)

    def _broadcast_done(self, now: float, future: Future[Any]) -> None:
        self._broadcasts_in_hand -= 1
        if self._overflowed and self._broadcasts_in_hand < MAX_BROADCASTS_IN_HAND // 2:
            self._overflowed = False
            self._tell_reconnected()  # something was missed: for the user it is the same
        error = _error_of(future)
        if isinstance(error, Exception):
            logger.warning("a broadcast's handler failed; other handlers go on", exc_info=error)

    def _serve(
        self,
        loop: asyncio.AbstractEventLoop,
        handler: Callable[[Any], Awaitable[Any]],
        argument: object,
        done: Callable[[float, Future[Any]], None],
    ) -> None:
        """Run `handler(argument)` in `loop`; then `done` here, exactly once, whatever it comes to."""
        job = _Job()
        coroutine = _run(handler, argument, job)
        try:
            future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, loop)
        except RuntimeError as error:  # that loop is closed: nobody will ever run it
            coroutine.close()
            future = Future()
            future.set_exception(_NotRunError(str(error)))
        self._in_hand[job] = future

        def ended(future: Future[Any]) -> None:
            def finish(now: float) -> None:
                del self._in_hand[job]
                done(now, future)

            self._commands.append(finish)
            self._wake()

        future.add_done_callback(ended)

    # --- the end ---

    def _begin_close(self, now: float, waiter: _Waiter, caller: _Job | None) -> None:
        self._closers.append(waiter)
        if caller is not None:
            self._in_hand.pop(caller, None)  # the handler that closes us is not cancelled by that
        if self._finished:
            waiter.resolve(None)
        if self._finish_at is not None:
            return
        self._finish_at = now + CLOSE_TIMEOUT_S if self._core.up else now
        self._goodbye = self._core.ask(now, lambda id: Goodbye(id=id))

    def _finish(self) -> None:
        """Whatever still waits ends now."""
        if self._finished:
            return
        self._finished = self._closing = True
        closed = CommunicatorClosedError()
        for waiter, _ in self._waiters.values():
            waiter.resolve(closed)
        for waiter in self._up_waiters:
            waiter.resolve(closed)
        for result in self._results.values():
            result.set_exception(closed)
        self._waiters.clear()
        self._results.clear()
        for future in list(self._in_hand.values()):
            future.cancel()
        for waiter in self._closers:
            waiter.resolve(None)


# --- what users get ---------------------------------------------------------------------------------


class Incoming(msgspec.Struct, frozen=True, kw_only=True):
    """An `IncomingTask`."""

    id: str
    key: str | None
    queue: str
    body: bytes
    epoch: int
    attempt: int


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """A `Broadcast`."""

    body: bytes
    sender: str | None
    subject: str | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """A `TaskReceipt`."""

    id: str
    stored: bool
    _result: Future[Outcome] | None = field(repr=False, default=None)

    async def result(self) -> bytes:
        if self._result is None:
            raise ValueError("send the task with want_result=True to wait for its result")
        return result_or_raise(await asyncio.shield(asyncio.wrap_future(self._result)))


class _Subscription(ABC):
    """A handler, and the loop in which it runs."""

    def __init__(self, communicator: PeerCommunicator) -> None:
        communicator._check_use()
        self.communicator = communicator
        self.loop = asyncio.get_running_loop()

    @abstractmethod
    def leave(self, id: int) -> Request:
        """On the core's side: deliver nothing more, and what to tell the broker."""

    async def cancel(self) -> None:
        with contextlib.suppress(CommunicatorClosedError, _NothingToDoError):
            await self.communicator._request(self.leave, _nothing)

    async def set_credit(self, credit: int) -> None:
        raise TypeError("only a task subscription has a credit")


class _TaskSubscription(_Subscription):
    def __init__(self, communicator: PeerCommunicator, queue: str, handler: TaskHandler, credit: int) -> None:
        super().__init__(communicator)
        self.queue, self.handler, self.credit = queue, handler, credit
        self.in_hand: dict[str, int] = {}
        """The epochs of the tasks that its handler works on."""

    def leave(self, id: int) -> Request:
        subscriptions = self.communicator._tasks.get(self.queue, [])
        if self not in subscriptions:
            raise _NothingToDoError
        subscriptions.remove(self)
        return self.communicator._credit_request(id, self.queue)

    async def set_credit(self, credit: int) -> None:
        credit = _checked_credit(credit)

        def change(id: int) -> Request:
            self.credit = credit
            return self.communicator._credit_request(id, self.queue)

        await self.communicator._request(change, _nothing)


class _RpcSubscription(_Subscription):
    def __init__(self, communicator: PeerCommunicator, identifier: str, handler: RpcHandler) -> None:
        super().__init__(communicator)
        self.identifier, self.handler = identifier, handler

    def leave(self, id: int) -> Request:
        if self.communicator._rpcs.get(self.identifier) is not self:
            raise _NothingToDoError
        del self.communicator._rpcs[self.identifier]
        return RpcUnsubscribe(id=id, identifier=self.identifier)


class _BroadcastSubscription(_Subscription):
    def __init__(
        self,
        communicator: PeerCommunicator,
        number: int,
        handler: BroadcastHandler,
        sender: str | None,
        subject: str | None,
    ) -> None:
        super().__init__(communicator)
        self.number, self.handler = number, handler
        self.sender, self.subject = matcher(sender), matcher(subject)

    def leave(self, id: int) -> Request:
        if self.communicator._broadcasts.pop(self.number, None) is None:
            raise _NothingToDoError
        return BroadcastUnsubscribe(id=id, subscription=self.number)


# --- helpers ----------------------------------------------------------------------------------------


class _Job:
    """One run of a handler."""


_SERVING: ContextVar[_Job | None] = ContextVar("prunus_handler", default=None)


class _NotRunError(PrunusError):
    """The loop of the handler is closed."""


class _NothingToDoError(PrunusError):
    """The subscription is cancelled already."""


@dataclass(slots=True)
class _Waiter:
    """A future, and the loop that alone may touch it."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]

    @classmethod
    def here(cls) -> _Waiter:
        loop = asyncio.get_running_loop()
        return cls(loop, loop.create_future())

    def resolve(self, outcome: object) -> None:
        with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self._set, outcome)

    def _set(self, outcome: object) -> None:
        if self.future.done():
            return
        if isinstance(outcome, BaseException):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


async def _run(handler: Callable[[Any], Awaitable[Any]], argument: object, job: _Job) -> Any:
    _SERVING.set(job)
    return await handler(argument)


def _error_of(future: Future[Any]) -> BaseException | None:
    try:
        return future.exception()
    except FutureCancelledError as error:
        return error


def _bytes_or_failure(result: object, error: BaseException | None, *, optional: bool) -> Outcome:
    if error is None and not (isinstance(result, bytes) or (optional and result is None)):
        error = TypeError(f"a handler must return bytes, not {type(result).__name__}")
    if error is None and isinstance(result, bytes) and len(result) > MAX_BODY_BYTES:
        error = MessageTooLargeError(len(result), MAX_BODY_BYTES)
    if error is not None:
        return outcome_of(error)
    return result if isinstance(result, bytes) else None


def _checked_body(body: bytes) -> bytes:
    if not isinstance(body, bytes | bytearray | memoryview):
        raise TypeError(f"a body is bytes, not {type(body).__name__}")
    body = bytes(body)
    if len(body) > MAX_BODY_BYTES:
        raise MessageTooLargeError(len(body), MAX_BODY_BYTES)
    return body


def _check_names(*names: str | None) -> None:
    for name in names:
        if name is not None and not (isinstance(name, str) and len(name) <= MAX_NAME_CHARS):
            raise ValueError(f"a name is a text of up to {MAX_NAME_CHARS} characters, not {name!r:.100}")


def _checked_credit(credit: int) -> int:
    if credit < 0:
        raise ValueError(f"a credit is 0 or more, not {credit}")
    return credit


def _nothing(answer: object) -> None:
    return None


def _outcome(answer: RpcDone) -> Outcome:
    return answer.outcome


def _answers(answer: CallDone) -> list[bytes]:
    return list(answer.answers)
