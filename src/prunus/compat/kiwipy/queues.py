"""Task queues, and the tasks that one fetches from them, as kiwipy's thread communicator has them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import kiwipy

from prunus.compat.kiwipy import wire
from prunus.compat.kiwipy.futures import Outcome
from prunus.errors import PrunusError, TaskRejectedError
from prunus.messaging.communicator import IncomingTask, Subscription, TakenTask

if TYPE_CHECKING:
    from prunus.compat.kiwipy.communicator import PrunusCommunicator, Subscriber

TASK_FETCH_TIMEOUT_S = 5.0
"""How long `next_task` waits for a task, if the caller says nothing else."""
NO_LIMIT = 10_000
"""What ``prefetch_count=0`` means: tasks that one queue object has in hand at most."""

logger = logging.getLogger(__name__)


class PrunusTaskQueue:
    """A queue by its name. Made by `PrunusCommunicator.task_queue`; a context manager, though nothing needs to be
    closed: what it holds is its subscribers."""

    def __init__(self, communicator: PrunusCommunicator, name: str, prefetch_count: int | None = 0) -> None:
        if prefetch_count is not None and not isinstance(prefetch_count, int):
            raise TypeError(f"a prefetch_count is a whole number, not {prefetch_count!r:.100}")
        if prefetch_count is not None and prefetch_count < 0:
            raise ValueError(f"a prefetch_count is 0 (no limit) or more, not {prefetch_count}")
        self.name = name
        self._communicator = communicator
        self._queue = wire.queue_name(name)
        self._credit = prefetch_count or NO_LIMIT
        self._subscribers: dict[str, Subscriber] = {}
        self._subscription: Subscription | None = None
        self._changing = asyncio.Lock()

    def __enter__(self) -> PrunusTaskQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[PrunusIncomingTask]:
        """The tasks that wait, one after the other. Those that were not processed are put back when it is over."""
        tasks = []
        try:
            while (task := self._take(0.0)) is not None:
                tasks.append(task)
                yield task
        finally:
            for task in tasks:
                task.leave()

    def task_send(self, task: Any, no_reply: bool = False) -> kiwipy.Future | None:
        """Put a task into this queue; when this returns it is stored. None with ``no_reply=True``."""
        body = self._communicator.encode(task)
        return self._communicator.call("task_send", lambda: self._communicator.send_task(self._queue, body, no_reply))

    def add_task_subscriber(self, subscriber: Callable[..., Any], identifier: Any = None) -> Any:
        """Have ``subscriber(communicator, task)`` called for each task. Of several, the first that does not raise
        `kiwipy.TaskRejected` has it; if all do, it is offered again later, to others too."""
        return self._communicator.call("add_task_subscriber", lambda: self._add(subscriber, new_identifier(identifier)))

    def remove_task_subscriber(self, identifier: Any) -> None:
        """Raises `ValueError` for one that is not there."""
        self._communicator.call("remove_task_subscriber", lambda: self._remove(identifier))

    @contextmanager
    def next_task(
        self, timeout: float | None = TASK_FETCH_TIMEOUT_S, fail: bool = True, no_ack: bool = False
    ) -> Iterator[PrunusIncomingTask | None]:
        """Fetch a task, waiting at most `timeout` seconds for it; it is put back at the end, unless it was processed.

        If there is none: `kiwipy.QueueEmpty`, or None with ``fail=False``. With ``no_ack=True`` it is done with as soon
        as it is here.
        """
        task = self._take(timeout)
        if task is None:
            if fail:
                raise kiwipy.QueueEmpty(f"no task came from the queue {self.name!r} within {timeout} s")
            yield None
            return
        if no_ack:
            task.process().set_result(None)
        try:
            yield task
        finally:
            task.leave()

    def close(self) -> None:
        """Take nothing more. Tasks in hand are still settled. Idempotent, and superfluous before the communicator's."""
        if not self._communicator.is_closed():
            self._communicator.call("close", self._clear)

    # --- inside ---

    def _take(self, timeout: float | None) -> PrunusIncomingTask | None:
        return self._communicator.call("next_task", lambda: self._next(timeout), timeout)

    async def _next(self, timeout_s: float | None) -> PrunusIncomingTask | None:
        try:
            taken = await self._communicator.communicator.next_task(queue=self._queue, timeout_s=timeout_s)
        except TimeoutError:
            return None
        try:
            envelope, body = self._decoded(taken)
        except _UnreadableError as unreadable:
            with contextlib.suppress(TaskRejectedError):  # others have it by now, and find the same
                if unreadable.reply is None:
                    await taken.reject(str(unreadable))
                else:
                    await taken.acknowledge(unreadable.reply)
            raise ValueError(str(unreadable)) from unreadable.__cause__
        return PrunusIncomingTask(self._communicator, self.name, taken, envelope, body)

    async def _add(self, function: Callable[..., Any], identifier: Any) -> Any:
        from prunus.compat.kiwipy.communicator import Subscriber

        subscriber = Subscriber(function)
        async with self._changing:
            if str(identifier) in self._subscribers:
                raise kiwipy.DuplicateSubscriberIdentifier(f"there is a subscriber {identifier!r} already")
            self._subscribers[str(identifier)] = subscriber
            if self._subscription is None:
                try:
                    self._subscription = await self._communicator.communicator.add_task_subscriber(
                        self._handle, queue=self._queue, credit=self._credit
                    )
                except BaseException:
                    del self._subscribers[str(identifier)]
                    raise
        return identifier

    async def _remove(self, identifier: Any) -> None:
        async with self._changing:
            if self._subscribers.pop(str(identifier), None) is None:
                raise ValueError(f"there is no subscriber {identifier!r}")
            if not self._subscribers:
                await self._unsubscribe()

    async def _clear(self) -> None:
        async with self._changing:
            self._subscribers.clear()
            await self._unsubscribe()

    async def _unsubscribe(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.cancel()

    async def _handle(self, task: IncomingTask) -> bytes:
        try:
            envelope, body = self._decoded(task)
        except _UnreadableError as unreadable:
            if unreadable.reply is None:
                raise TaskRejectedError(str(unreadable)) from unreadable.__cause__
            return unreadable.reply
        for subscriber in list(self._subscribers.values()):
            outcome = await self._communicator.run(subscriber, envelope, self._communicator, body)
            if isinstance(outcome.error, kiwipy.TaskRejected):
                continue
            if outcome.cancelled:
                raise TaskRejectedError("the subscriber cancelled it")
            if outcome.error is not None:
                logger.warning(
                    "a subscriber failed; the task is done with, and its sender gets the error, if it wants a reply",
                    extra={"task": task.id, "queue": self.name},
                    exc_info=outcome.error,
                )
            return self._communicator.reply_to(outcome)
        raise TaskRejectedError("every subscriber rejected it")

    def _decoded(self, task: IncomingTask) -> tuple[wire.Envelope, Any]:
        envelope: wire.Envelope | None = None
        try:
            envelope = wire.unpack_envelope(task.body)
            return envelope, self._communicator.decode(envelope.body)
        except Exception as error:  # the user's decoder
            waits = envelope is not None and envelope.reply_to
            logger.warning(
                "a task can't be read; %s",
                "its sender gets the error" if waits else "it is put back, as nobody would hear of it",
                extra={"task": task.id, "queue": self.name},
                exc_info=error,
            )
            reply = self._communicator.reply_to(Outcome(0, error=error)) if waits else None
            raise _UnreadableError(f"the task {task.id} can't be decoded here: {error}", reply) from error


class PrunusIncomingTask:
    """A task that was fetched: nobody else has it until it is processed, put back, or this communicator is gone."""

    def __init__(
        self, communicator: PrunusCommunicator, queue: str, taken: TakenTask, envelope: wire.Envelope, body: Any
    ) -> None:
        self._communicator, self._queue = communicator, queue
        self._taken = taken
        self._envelope = envelope
        self.body = body
        self._state = "pending"
        self._entered = True
        self._lock = threading.RLock()
        self._outcome: weakref.ref[kiwipy.Future] | None = None
        self._settling: kiwipy.Future | None = None

    @property
    def no_reply(self) -> bool:
        """Whether its sender wants no result."""
        return not self._envelope.reply_to

    @property
    def state(self) -> str:
        """pending, processing, finished or requeued; the last also if it was lost, and so not finished here."""
        return self._state

    def process(self) -> kiwipy.Future:
        """The future whose result, or exception, is that of the task. If it is cancelled, or let go of without either,
        the task is put back."""
        outcome = kiwipy.Future()
        with self._lock:
            self._begin()
            self._outcome = weakref.ref(outcome, self._forgotten)
        outcome.add_done_callback(self._done)
        return outcome

    @contextmanager
    def processing(self) -> Iterator[kiwipy.Future]:
        """The same for a block: at its end the task is done with, or put back if nothing was set. An exception in it is
        that of the task, and goes on."""
        with self._lock:
            self._begin()
        outcome = kiwipy.Future()
        try:
            yield outcome
        except Exception as error:
            if not outcome.done():
                outcome.set_exception(error)
            raise
        finally:
            if outcome.done() and not outcome.cancelled():
                self._finish(outcome)
                self._wait()
            else:
                self.requeue()

    def requeue(self) -> None:
        """Put it back; when this returns others can have it."""
        with self._lock:
            if self._state not in ("pending", "processing"):
                raise asyncio.InvalidStateError(f"the task is {self._state}")
            self._state, self._outcome = "requeued", None
        self._communicator.call("requeue", self._put_back)

    def leave(self) -> None:
        """The block in which it was fetched is over: put it back if nobody processes it, wait until it is settled."""
        with self._lock:
            self._entered = False
            pending = self._state == "pending"
        if pending:
            self.requeue()
        else:
            self._wait()

    # --- inside ---

    def _begin(self) -> None:
        if self._state != "pending":
            raise asyncio.InvalidStateError(f"the task is {self._state}")
        self._state = "processing"

    def _done(self, outcome: kiwipy.Future) -> None:
        """Called where the outcome was set."""
        with self._lock:
            if self._state != "processing":
                return
            self._outcome = None
            if outcome.cancelled() and self._entered:
                self._state = "pending"  # whoever has it may yet process it, or leave
                return
            if outcome.cancelled():
                self._state = "requeued"
        if outcome.cancelled():
            self._communicator.post(self._put_back)
        else:
            self._finish(outcome)

    def _forgotten(self, _: object) -> None:
        """The outcome is gone and was never set: memory is being collected, so nothing here may wait."""
        if self._outcome is not None:
            self._state, self._outcome = "requeued", None
            self._communicator.post(self._put_back)

    def _finish(self, outcome: kiwipy.Future) -> None:
        self._state = "finished"
        error = outcome.exception()
        came_to = Outcome(0, None if error else outcome.result(), error)
        reply = self._communicator.reply_to(came_to)
        self._settling = settled = kiwipy.Future()

        async def acknowledge() -> None:
            try:
                await self._taken.acknowledge(reply)
            except PrunusError as error:
                if isinstance(error, TaskRejectedError):  # it is somebody else's
                    with self._lock:
                        self._state = "requeued"
                logger.warning(
                    "the task %s of the queue %r was processed, but can't be acknowledged any more, so it may be done "
                    "again: %s",
                    self._taken.id,
                    self._queue,
                    error,
                    extra={"task": self._taken.id, "queue": self._queue},
                )
            finally:
                settled.set_result(None)

        self._communicator.post(acknowledge)

    def _wait(self) -> None:
        if self._settling is not None:
            with contextlib.suppress(TimeoutError):
                self._settling.result(self._communicator.timeout_s)

    async def _put_back(self) -> None:
        with contextlib.suppress(PrunusError):  # who is closed, or lost it, has it no more
            await self._taken.reject("it was put back")
            await self._communicator.communicator.requeue(self._taken.id)  # untouched, so there is nothing to wait for


def new_identifier(identifier: Any) -> Any:
    """The one that was given, or a new one."""
    return uuid.uuid4().hex if identifier is None else identifier


class _UnreadableError(Exception):
    """A task of which nothing can be made here. `reply`: what to tell its sender, if it wants a reply."""

    def __init__(self, text: str, reply: bytes | None) -> None:
        super().__init__(text)
        self.reply = reply
