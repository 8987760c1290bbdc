"""`kiwipy.Communicator` over a communicator of ours.

There is one event loop, in the thread of a `BlockingCommunicator`. Calls from any thread are carried out there, and
wait. A subscriber that is a plain function is called in a worker thread, so it may use the communicator as it likes;
one that is an ``async def`` runs in the loop, and may not wait there. A plain one gets one message at a time, in the
order in which they came; different subscribers are called at the same time.

Whoever sent gets a `kiwipy.Future`, and as many futures in it as the subscriber returned (see `futures`). They are
resolved in threads of their own: what waits for one of them may use the communicator too.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import logging
import os
import platform
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import ContextVar
from numbers import Real
from typing import Any, TypeVar

import kiwipy

import prunus
from prunus.compat.kiwipy import wire
from prunus.compat.kiwipy.futures import Chain, Outcome, outcome_of_awaiting, unwrap
from prunus.compat.kiwipy.queues import PrunusTaskQueue, new_identifier
from prunus.compat.kiwipy.threads import Threads
from prunus.errors import (
    BusyError,
    CommunicatorClosedError,
    ConnectionLostError,
    DuplicateSubscriberError,
    IndeterminateError,
    KeyRefusedError,
    MessageTooLargeError,
    MessagingError,
    PrunusError,
    RemoteError,
    StoreFullError,
    TaskRejectedError,
    UnroutableError,
)
from prunus.messaging import MAX_BODY_BYTES, BlockingCommunicator, Broadcast, Subscription
from prunus.messaging.messages import outcome_of
from prunus.messaging.peer import PeerCommunicator

MAX_CALLBACK_THREADS = 64
"""Plain subscribers that are called at once."""
MAX_ANSWER_THREADS = 16
"""Callbacks of futures that run at once."""
MAX_AWAITED = 100_000
"""Tasks and questions whose answer one communicator waits for; more are refused with `kiwipy.DeliveryFailed`."""
ANSWER_TIMEOUT_S = 1e9
"""A question waits for its answer as long as the one who was asked lives: kiwipy knows no other end."""
OWN_BROADCASTS_S = 0.5
"""How long `broadcast_send` waits for subscribers of the same communicator to have had the broadcast."""

logger = logging.getLogger(__name__)
T = TypeVar("T")
_CALLED_BY: ContextVar[object] = ContextVar("prunus_kiwipy_called_by", default=None)
"""The communicator whose subscriber runs in this thread."""


class BrokerUnreachableError(ConnectionError, kiwipy.TimeoutError):  # type: ignore[misc]  # kiwipy has no types
    """No broker answers. For kiwipy that is a `kiwipy.TimeoutError`, for the library under it a `ConnectionError`."""


class Subscriber:
    """A function that gets messages, one at a time."""

    def __init__(self, function: Callable[..., Any]) -> None:
        if not callable(function):
            raise TypeError(f"a subscriber is a function or an object that can be called, not {function!r:.100}")
        self.function = function
        self.is_async = inspect.iscoroutinefunction(function)
        self.turn = asyncio.Lock()


class PrunusCommunicator(kiwipy.Communicator):  # type: ignore[misc]  # kiwipy has no types
    """See the module, and `kiwipy.Communicator` for the methods. Made by `connect`; safe to use from any thread."""

    TASK_TIMEOUT = 5.0
    """Seconds that a call waits for the broker, unless `connect` was told otherwise."""

    def __init__(
        self,
        open: Callable[[], Awaitable[PeerCommunicator]],
        *,
        message_exchange: str,
        task_queue: str,
        task_prefetch_count: int | None,
        encoder: Callable[[Any], bytes | str],
        decoder: Callable[[bytes], Any],
        async_task_timeout: float | None,
        testing_mode: bool = False,
    ) -> None:
        """`open` connects; what it raises is raised here, an error of ours as the one that kiwipy has for it."""
        self._os_pid = os.getpid()
        self._default_queue = PrunusTaskQueue(self, task_queue, task_prefetch_count)
        self._exchange = wire.checked_exchange(message_exchange)
        _check_codec("encoder", encoder)
        _check_codec("decoder", decoder)
        self._encoder, self.decode = encoder, decoder
        check_timeout(async_task_timeout)
        self.timeout_s = async_task_timeout
        self._testing = testing_mode
        self._closed = self._closing = False
        self._close_lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._chains: dict[int, Chain] = {}
        self._rpcs: dict[str, Subscription] = {}
        self._broadcasts: dict[str, tuple[Subscriber, list[Subscription]]] = {}
        self._queues: set[str] = set()
        self._running: set[asyncio.Future[Any]] = set()
        self._close_callbacks: list[Callable[[], Callable[..., Any] | None]] = []
        self._callbacks = Threads(MAX_CALLBACK_THREADS, "prunus-kiwipy-callback")
        self._answers = Threads(MAX_ANSWER_THREADS, "prunus-kiwipy-answer")
        self._spawned: set[asyncio.Task[Any]] = set()
        try:
            self._face = BlockingCommunicator(lambda: self._open(open), "kiwipy")
        except BaseException as error:
            self._shut_down()
            if isinstance(error, MessagingError):
                raise translated(error) from error
            raise

    async def _open(self, open: Callable[[], Awaitable[PeerCommunicator]]) -> PeerCommunicator:
        self._loop = asyncio.get_running_loop()
        self.communicator = communicator = await open()
        try:
            self._reply_name = wire.reply_name(communicator.session)
            await communicator.add_broadcast_subscriber(self._on_pending, sender=self._reply_name)
            communicator.on_reconnect(self._on_reconnect)
        except BaseException:
            await communicator.close()
            raise
        return communicator

    # --- the communicator itself ---

    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Leave: tasks in hand are given back, whoever still waits gets `kiwipy.CommunicatorClosed`. Subscribers that
        are being called are waited for, at most as long as any call is. Idempotent."""
        if os.getpid() != self._os_pid:
            return  # the parent's connection lives on
        self._check_thread()
        with self._close_lock:
            if self._closing:
                return
            self._closing = True
        wait = _CALLED_BY.get() is not self
        try:
            with contextlib.suppress(CommunicatorClosedError):
                self._face.wait_for(lambda: self._before_close(wait))
        finally:  # also after Ctrl-C
            self._face.close()
            self._closed = True
            self._shut_down()
        self._tell_closed(None)

    def add_close_callback(self, callback: Callable[..., Any], weak: bool = False) -> None:
        """Have ``callback(communicator, error)`` called when this communicator was closed (`error` is None), and each
        time when its connection was lost, once it is there again. With ``weak=True`` the callback is not kept alive."""
        self._check_open()
        if not weak:
            self._close_callbacks.append(lambda: callback)
        elif inspect.ismethod(callback):
            self._close_callbacks.append(weakref.WeakMethod(callback))
        else:
            self._close_callbacks.append(weakref.ref(callback))

    @property
    def server_properties(self) -> dict[str, Any]:
        """What the broker is: `product`, `version` and `platform`, as kiwipy has them of RabbitMQ."""
        self._check_open()
        runs_on = f"{platform.python_implementation()} {platform.python_version()}"
        return {"product": "Prunus", "version": prunus.__version__, "platform": runs_on}

    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of this communicator."""
        self._check_open()
        return self._loop

    # --- questions ---

    def rpc_send(self, recipient_id: Any, msg: Any) -> kiwipy.Future:
        """Ask. Raises `kiwipy.UnroutableError` at once if nobody listens."""
        body = self.encode(msg)
        return self.call("rpc_send", lambda: self._ask(wire.recipient_name(self._exchange, recipient_id), body))

    def add_rpc_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        return self.call("add_rpc_subscriber", lambda: self._add_rpc(subscriber, new_identifier(identifier)))

    def remove_rpc_subscriber(self, identifier: Any) -> None:
        subscription = self._taken(self._rpcs, identifier)
        self.call("remove_rpc_subscriber", subscription.cancel)

    # --- tasks ---

    def task_send(self, task: Any, no_reply: bool = False) -> kiwipy.Future | None:
        """Put a task into the default queue; when this returns it is stored. None with ``no_reply=True``."""
        self._check_open()
        return self._default_queue.task_send(task, no_reply)

    def add_task_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        self._check_open()
        return self._default_queue.add_task_subscriber(subscriber, identifier)

    def remove_task_subscriber(self, identifier: Any) -> None:
        self._check_open()
        self._default_queue.remove_task_subscriber(identifier)

    def task_queue(
        self, queue_name: str, prefetch_size: int | None = 0, prefetch_count: int | None = 0
    ) -> PrunusTaskQueue:
        """A queue by its name; it costs nothing to ask for one often. `prefetch_count` tasks are in hand at most."""
        self._check_open()
        check_prefetch_size(prefetch_size)
        return PrunusTaskQueue(self, queue_name, prefetch_count)

    # --- broadcasts ---

    def broadcast_send(self, body: Any, sender: Any = None, subject: Any = None, correlation_id: Any = None) -> bool:
        """Tell all who listen, now. Subscribers of this communicator have heard it when this returns, unless they take
        longer than `OWN_BROADCASTS_S`."""
        message = {"body": body, "sender": sender, "subject": subject, "correlation_id": correlation_id}
        data = self.encode(message)
        wait = _CALLED_BY.get() is not self
        self.call("broadcast_send", lambda: self._broadcast(data, sender, subject, wait))
        return True

    def add_broadcast_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """Of a `kiwipy.BroadcastFilter` the filters that it has now are told to the broker."""
        return self.call(
            "add_broadcast_subscriber", lambda: self._add_broadcast(subscriber, new_identifier(identifier))
        )

    def remove_broadcast_subscriber(self, identifier: Any) -> None:
        _, subscriptions = self._taken(self._broadcasts, identifier)
        self.call("remove_broadcast_subscriber", lambda: _cancel_all(subscriptions))

    # --- for the parts of this package, in any thread ---

    def call(self, name: str, make: Callable[[], Coroutine[Any, Any, T]], timeout_s: float | None = 0.0) -> T:
        """What a coroutine of the loop returns; an error of ours is raised as the one that kiwipy has for it.

        It may take `timeout_s` (None: for ever) longer than any call; then it is cancelled, and `kiwipy.TimeoutError`
        raised.
        """
        self._check_open()
        self._check_thread()
        limit_s = None if timeout_s is None or self.timeout_s is None else self.timeout_s + timeout_s
        try:
            return self._face.wait_for(lambda: asyncio.wait_for(make(), limit_s))
        except TimeoutError:
            raise kiwipy.TimeoutError(
                f"{name} was not done after {limit_s:g} seconds: the broker does not answer; it may yet have happened"
            ) from None
        except PrunusError as error:
            raise translated(error) from error

    def post(self, make: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Have a coroutine run in the loop soon, if it is still there. Never waits, and may be called anywhere, even
        while memory is collected."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.spawn, make)

    def encode(self, value: Any) -> bytes:
        """Raises what the encoder raises."""
        data = self._encoder(value)
        return data.encode() if isinstance(data, str) else data

    def reply_to(self, outcome: Outcome) -> bytes:
        """An outcome for the wire: one that can't be encoded, or is too large, is an error."""
        error = outcome.error
        if outcome.cancelled:
            return wire.pack(wire.Reply("cancelled", outcome.depth))
        if error is None:
            try:
                data = wire.pack(wire.Reply("result", outcome.depth, self.encode(outcome.value)))
                if len(data) <= MAX_BODY_BYTES:
                    return data
                error = MessageTooLargeError(len(data), MAX_BODY_BYTES)
            except Exception as refused:  # the user's encoder: whatever it raises is the answer
                error = refused
        return wire.pack(wire.Reply("exception", outcome.depth, failure=outcome_of(error)))

    # --- for the parts of this package, in the loop ---

    def spawn(self, make: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Have a coroutine run on its own."""
        task = self._loop.create_task(make())
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)
        return task

    async def run(self, subscriber: Subscriber, envelope: wire.Envelope, *arguments: Any) -> Outcome:
        """Call a subscriber, and wait for all the futures that it returns."""
        value, error = await self._called(subscriber, *arguments)
        return await unwrap(value, error, lambda depth: self._tell_pending(envelope, depth))

    async def send_task(self, queue: str, body: bytes, no_reply: bool) -> kiwipy.Future | None:
        if self._testing:
            self._queues.add(queue)
        if no_reply:
            await self.communicator.task_send(wire.pack(wire.Envelope(body, "", 0)), queue=queue)
            return None
        number, chain = self._expect()
        try:
            task = wire.pack(wire.Envelope(body, self._reply_name, number))
            receipt = await self.communicator.task_send(task, queue=queue, want_result=True)
        except BaseException:
            del self._chains[number]
            raise
        self.spawn(lambda: self._answer(number, chain, receipt.result()))
        return chain.first

    # --- inside ---

    def _check_open(self) -> None:
        if self._closing:
            raise translated(CommunicatorClosedError())

    def _check_thread(self) -> None:
        if _loop_here() is self._loop:
            raise RuntimeError(
                "an `async def` subscriber runs in the loop of its communicator, where this call would wait for "
                "itself: make the subscriber a plain `def`"
            )

    def _taken(self, table: dict[str, T], identifier: Any) -> T:
        self._check_open()
        try:
            return table.pop(str(identifier))
        except KeyError:
            raise ValueError(f"there is no subscriber {identifier!r}") from None

    def _expect(self) -> tuple[int, Chain]:
        if len(self._chains) >= MAX_AWAITED:
            raise BusyError(f"{MAX_AWAITED:,} tasks and questions of this communicator wait for their answers already")
        number, chain = next(self._numbers), Chain(self._answers.submit)
        self._chains[number] = chain
        return number, chain

    async def _ask(self, recipient: str, body: bytes) -> kiwipy.Future:
        number, chain = self._expect()
        question = wire.pack(wire.Envelope(body, self._reply_name, number))
        sending = self.communicator.rpc_send(recipient, question, timeout_s=ANSWER_TIMEOUT_S)
        answer = self.spawn(lambda: self._answer(number, chain, sending))
        try:
            await asyncio.sleep(0)  # now it was said ...
            await self.communicator.call(())  # ... and now the broker has routed it: a refusal came before this
            await asyncio.sleep(0)
        except BaseException:
            answer.cancel()
            raise
        if answer.done() and (refusal := answer.result()) is not None:
            raise refusal
        return chain.first

    async def _answer(self, number: int, chain: Chain, awaited: Awaitable[bytes]) -> PrunusError | None:
        """Resolve the futures of a task or a question; why there is no answer, or None."""
        try:
            reply = wire.unpack_reply(await awaited)
        except PrunusError as error:
            its_own_end = self._closing and isinstance(error, IndeterminateError)  # it asked itself, and is gone
            failure = translated(CommunicatorClosedError() if its_own_end else error)
            failure.__cause__ = error
            chain.fail(failure)
            return error
        except asyncio.CancelledError:
            chain.fail(translated(CommunicatorClosedError()))
            raise
        finally:
            self._chains.pop(number, None)
        chain.finish(reply, self.decode, _remote_exception)
        return None

    async def _on_pending(self, note: Broadcast) -> None:
        pending = wire.unpack_pending(note.body)
        if (chain := self._chains.get(pending.number)) is not None:
            chain.deepen(pending.depth)

    def _tell_pending(self, envelope: wire.Envelope, depth: int) -> None:
        """A note on the way: if it is lost, the answer says the same later."""

        async def tell() -> None:
            with contextlib.suppress(PrunusError):
                note = wire.pack(wire.Pending(envelope.number, depth))
                await self.communicator.broadcast_send(note, sender=envelope.reply_to)

        if envelope.reply_to:
            self.spawn(tell)

    async def _called(self, subscriber: Subscriber, *arguments: Any) -> tuple[Any, BaseException | None]:
        """What the subscriber returned, or raised."""
        if subscriber.is_async:
            return await outcome_of_awaiting(subscriber.function(*arguments))
        await subscriber.turn.acquire()
        if self._closing:
            subscriber.turn.release()
            raise asyncio.CancelledError
        running = self._loop.run_in_executor(self._callbacks, self._called_here, subscriber.function, arguments)
        self._running.add(running)

        def ended(_: object) -> None:
            self._running.discard(running)
            subscriber.turn.release()

        running.add_done_callback(ended)
        return await asyncio.shield(running)  # a thread can't be cancelled: its turn lasts until it ends

    def _called_here(self, function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Any, BaseException | None]:
        token = _CALLED_BY.set(self)
        try:
            return function(*arguments), None
        except BaseException as error:  # the user's function: whatever it raises is the answer, and ends nobody
            return None, error
        finally:
            _CALLED_BY.reset(token)

    async def _add_rpc(self, function: Callable[..., Any], identifier: Any) -> Any:
        subscriber = Subscriber(function)

        async def answer(question: bytes) -> bytes:
            envelope = wire.unpack_envelope(question)
            try:
                message = self.decode(envelope.body)
            except Exception as error:  # the user's decoder
                return self.reply_to(Outcome(0, error=error))
            return self.reply_to(await self.run(subscriber, envelope, self, message))

        name = wire.recipient_name(self._exchange, identifier)
        self._rpcs[str(identifier)] = await self.communicator.add_rpc_subscriber(answer, name)
        return identifier

    async def _add_broadcast(self, function: Callable[..., Any], identifier: Any) -> Any:
        if str(identifier) in self._broadcasts:
            raise kiwipy.DuplicateSubscriberIdentifier(f"there is a subscriber {identifier!r} already")
        subscriber = Subscriber(function)
        subscriptions: list[Subscription] = []
        self._broadcasts[str(identifier)] = subscriber, subscriptions

        async def hear(broadcast: Broadcast) -> None:
            message = self.decode(broadcast.body)
            sender, subject = message["sender"], message["subject"]
            if isinstance(function, kiwipy.BroadcastFilter) and function.is_filtered(sender, subject):
                return  # it is asked here to spare a thread
            arguments = message["body"], sender, subject, message["correlation_id"]
            value, error = await self._called(subscriber, self, *arguments)
            if inspect.iscoroutine(value):  # of an `async def` in a filter, say
                _, error = await outcome_of_awaiting(value)
            if error is not None:
                logger.warning("a subscriber of broadcasts failed; others go on", exc_info=error)

        try:
            for sender, subject in wire.patterns(self._exchange, function):
                subscriptions.append(
                    await self.communicator.add_broadcast_subscriber(
                        hear, sender=sender, subject=subject, on_missed=_warn_of_missed
                    )
                )
        except BaseException:
            del self._broadcasts[str(identifier)]
            await asyncio.shield(_cancel_all(subscriptions))
            raise
        return identifier

    async def _broadcast(self, data: bytes, sender: Any, subject: Any, wait: bool) -> None:
        await self.communicator.broadcast_send(
            data, sender=wire.sender_name(sender), subject=wire.subject_name(self._exchange, subject)
        )
        # What this communicator gets of it came before the confirmation, so its subscribers have their turn by now.
        turns = [subscriber.turn for subscriber, _ in self._broadcasts.values() if subscriber.turn.locked()]
        if wait and turns:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(OWN_BROADCASTS_S):
                    for turn in turns:
                        async with turn:
                            pass

    def _on_reconnect(self) -> None:
        lost = BrokerUnreachableError(f"the broker at {self.communicator.endpoint} was lost for a while; it is back")
        self._callbacks.submit(self._tell_closed, lost)

    def _tell_closed(self, error: Exception | None) -> None:
        for reference in list(self._close_callbacks):
            callback = reference()
            if callback is None:
                self._close_callbacks.remove(reference)
                continue
            try:
                callback(self, error)
            except Exception:  # a listener of the user; the others are told all the same
                logger.warning("a close callback failed", exc_info=True)

    async def _before_close(self, wait: bool) -> None:
        with contextlib.suppress(PrunusError, TimeoutError):  # no broker: nobody there needs to hear of it
            async with asyncio.timeout(self.TASK_TIMEOUT if self.timeout_s is None else self.timeout_s):
                if wait and self._running:
                    await asyncio.wait(self._running)
                    await self.communicator.call(())  # what they came to is said before the goodbye
                for queue in self._queues:
                    await self.communicator.purge(queue)

    def _shut_down(self) -> None:
        self._callbacks.shutdown()
        self._answers.shutdown()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.communicator.session
        return f"<{type(self).__name__} {state}>"


def translated(error: PrunusError) -> Exception:
    """The error that kiwipy has for one of ours, in words of its users; ours itself if it has none."""
    text = str(error)
    match error:
        case CommunicatorClosedError():
            return kiwipy.CommunicatorClosed(text)  # type: ignore[no-any-return]
        case ConnectionLostError():
            return BrokerUnreachableError(text)
        case KeyRefusedError():
            return ConnectionRefusedError(text)
        case UnroutableError(recipient=recipient):
            return kiwipy.UnroutableError(f"nobody listens as {wire.spoken(recipient)}")  # type: ignore[no-any-return]
        case DuplicateSubscriberError(identifier=identifier):
            return kiwipy.DuplicateSubscriberIdentifier(  # type: ignore[no-any-return]
                f"there is a subscriber {wire.spoken(identifier)} already"
            )
        case IndeterminateError(key=key, reason=None):
            return kiwipy.DeliveryFailed(  # type: ignore[no-any-return]
                f"no answer came for {wire.spoken(key)}: it may or may not have happened"
            )
        case TaskRejectedError():
            return kiwipy.TaskRejected(text)  # type: ignore[no-any-return]
        case MessagingError() | StoreFullError():
            return kiwipy.DeliveryFailed(text)  # type: ignore[no-any-return]
        case _:
            return error


def check_prefetch_size(size: int | None) -> None:
    if size:
        raise ValueError("there is no prefetch_size (nor has RabbitMQ one); limit the number with prefetch_count")


def check_timeout(timeout_s: float | None) -> None:
    if timeout_s is None:
        return
    if not isinstance(timeout_s, Real):
        raise TypeError(f"async_task_timeout is a number of seconds, or None for no bound, not {timeout_s!r:.100}")
    if not 0 < timeout_s <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"async_task_timeout is above 0 and at most {threading.TIMEOUT_MAX:g} seconds, not {timeout_s}; None is no "
            "bound"
        )


def _check_codec(option: str, function: Callable[..., Any]) -> None:
    if not callable(function):
        raise TypeError(f"{option} is a function, not {function!r:.100}; leave it out for plain data")


def _remote_exception(reply: wire.Reply) -> Exception:
    """As kiwipy's: it has the text of the error. Its cause has the rest: the type, the traceback, the causes."""
    if reply.failure is None:
        return kiwipy.RemoteException()  # type: ignore[no-any-return]
    error: Exception = kiwipy.RemoteException(reply.failure.message)
    error.__cause__ = RemoteError(reply.failure)
    return error


async def _cancel_all(subscriptions: Sequence[Subscription]) -> None:
    for subscription in subscriptions:
        await subscription.cancel()


def _warn_of_missed(count: int) -> None:
    logger.warning("a subscriber of broadcasts was too slow and missed some", extra={"missed": count})


def _loop_here() -> asyncio.AbstractEventLoop | None:
    """The one that runs in this thread, if any does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
