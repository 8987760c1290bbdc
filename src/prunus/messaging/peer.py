"""`Communicator` over a `ClientCore`: everything that does not depend on how frames travel.

There are two sides. The **users' side** is the public methods, in any event loop: each posts a command and awaits a
future of its own loop. The **core's side** is `_step`, run by whoever moves the frames (see `threaded` and `local`),
one at a time: it alone touches the core and the tables of subscriptions, so nothing in here needs a lock. Commands are
carried out in the order in which they were posted: a subscription and the question that follows it go out in that order
without waiting for each other.

What comes for handlers is in `deliveries`, how it crosses to their loops and back in `handover`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any, Literal, TypeVar, assert_never

from prunus.errors import (
    BlobNotFoundError,
    BusyError,
    CommunicatorClosedError,
    ConnectionLostError,
    Failure,
    ForkedProcessError,
    ProtocolError,
    PrunusError,
    TaskRejectedError,
)
from prunus.messaging.arguments import (
    as_bytes,
    check_callback,
    check_if_pending,
    check_limits,
    check_names,
    check_number,
    check_optional_names,
    check_page,
    check_patience,
    check_peer_name,
    check_place,
    check_priority,
    check_seconds,
    check_tasks,
    checked_body,
    checked_digest,
    checked_resources,
    wall_clock,
)
from prunus.messaging.client import (
    Answered,
    ClientCore,
    Ended,
    Event,
    Failed,
    NameTaken,
    Reconnect,
    TaskLost,
    TurnedAway,
    Up,
    result_or_raise,
)
from prunus.messaging.communicator import (
    DEFAULT_QUEUE,
    MAX_BODY_BYTES,
    RPC_TIMEOUT_S,
    BlobRef,
    BroadcastHandler,
    IncomingTask,
    RpcHandler,
    TaskHandler,
)
from prunus.messaging.deliveries import (
    NO_BODY,
    BaseSubscription,
    BroadcastSubscription,
    Deliveries,
    NothingToDoError,
    Pull,
    PulledTask,
    RpcSubscription,
    TaskSubscription,
    as_reason,
    nothing,
)
from prunus.messaging.handover import Callback, Handover, Job, Jobs, Waiter, serving
from prunus.messaging.inventory import QueueLimits, Statistics, TaskInfo, TaskPlace
from prunus.messaging.liveness import this_peer
from prunus.messaging.messages import (
    CHUNK_BYTES,
    BlobGet,
    BlobHeld,
    BlobPart,
    BlobPut,
    BroadcastDelivery,
    BroadcastSend,
    Call,
    CallDone,
    Edited,
    Goodbye,
    Missed,
    Outcome,
    QueueConfigure,
    Request,
    ResourceConfigure,
    RpcDelivery,
    RpcDone,
    RpcRequest,
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
    Violation,
    decode_answers,
    outcome_of,
)
from prunus.messaging.transfers import download_bytes, download_file, upload

CLOSE_TIMEOUT_S = 2.0
"""How long `close` waits for the broker to hear it; a broker that does not will find out by itself."""
LAST_CALL_S = 0.2
"""How long it waits for a connection that is just being made anew, so as not to be taken for somebody who is there."""
LAST_WORD_S = 1.0
"""How long `next_task` waits, when its time is over, for a broker that is there to say that no task is on its way."""
LOOK_FOR_CLOSED_LOOPS_S = 2.0
"""How often handlers are looked for whose loop was closed."""

logger = logging.getLogger(__name__)
S = TypeVar("S", bound=BaseSubscription)
T = TypeVar("T")
Command = Callable[[float], None]


class PeerCommunicator(ABC):
    """A `prunus.messaging.communicator.Communicator`; how its frames travel is up to the subclass."""

    def __init__(self, endpoint: str, name: str = "peer") -> None:
        check_peer_name(name)
        self.endpoint = endpoint
        self._session = f"{name}-{secrets.token_hex(16)}"
        self._prefix = secrets.token_hex(10)
        """What the ids of its tasks begin with: nobody else's do."""
        self._os_pid = os.getpid()
        self._closing = False
        self._commands: deque[Command] = deque()
        self._closers: list[Waiter] = []
        self._numbers = itertools.count(1)
        # From here on: the core's side only.
        self._core = ClientCore(self._session, this_peer(), secret=secrets.token_hex(16), endpoint=endpoint)
        self._handover = Handover()
        self._jobs = Jobs(self._handover, self._job_ended)
        self._deliveries = Deliveries(self._core, self._jobs, self._handover)
        self._finished = False
        self.failure: PrunusError | None = None
        """Why this has ended, if it was not closed: the broker refuses it for good. Whatever is asked raises it."""
        self._goodbye: int | None = None
        self._finish_at: float | None = None
        self._closing_jobs: list[Job] = []
        """The handlers that close us: they are not cancelled by that."""
        self._look_at = 0.0
        self._waiters: dict[int, _Asked] = {}
        self._up_waiters: list[Waiter] = []
        self._end_waiters: list[Waiter] = []
        self._results: dict[str, Awaited] = {}

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
        subject: str | None = None,
        if_pending: Literal["join", "replace"] = "join",
        not_before: datetime | None = None,
        expires_at: datetime | None = None,
        max_attempts: int = 0,
        resources: Mapping[str, int] | None = None,
    ) -> Receipt:
        check_names(queue)
        check_optional_names(key, subject)
        check_priority(priority)
        check_if_pending(if_pending)
        check_number("max_attempts", max_attempts)
        tokens = checked_resources(resources) if resources else ()
        start, end = wall_clock("not_before", not_before), wall_clock("expires_at", expires_at)
        task, body = f"{self._prefix}-{next(self._numbers):x}", as_bytes(body)
        in_message, blob = (body, None) if len(body) <= MAX_BODY_BYTES else (b"", await self.blob_put(body))

        def make(id: int) -> TaskSend:
            return TaskSend(
                id=id,
                task=task,
                body=in_message,
                queue=queue,
                key=key,
                priority=priority,
                want_result=bool(want_result),
                subject=subject,
                replace=if_pending == "replace",
                not_before=start,
                expires_at=end,
                max_attempts=max_attempts,
                resources=tokens,
                blob=None if blob is None else blob.digest,
            )

        convert = self._awaited_receipt if want_result else _receipt
        try:
            return await self._request(make, convert)
        except BlobNotFoundError:  # it came so late that the blob was forgotten
            await self.blob_put(body)
            return await self._request(make, convert)

    async def rpc_send(self, recipient: str, body: bytes, *, timeout_s: float = RPC_TIMEOUT_S) -> bytes:
        check_names(recipient)
        check_seconds(timeout_s)
        body = checked_body(body)
        outcome = await self._request(
            lambda id: RpcRequest(id=id, recipient=recipient, body=body, timeout_s=timeout_s),
            _outcome,
            timeout_s,
        )
        return result_or_raise(outcome)

    async def broadcast_send(self, body: bytes, *, sender: str | None = None, subject: str | None = None) -> None:
        check_optional_names(sender, subject)
        body = checked_body(body)
        await self._request(lambda id: BroadcastSend(id=id, body=body, sender=sender, subject=subject), nothing)

    async def add_task_subscriber(
        self,
        handler: TaskHandler,
        *,
        queue: str = DEFAULT_QUEUE,
        credit: int = 1,
        subject: str | None = None,
        shared: bool = False,
    ) -> TaskSubscription:
        check_names(queue)
        check_optional_names(subject)
        check_number("credit", credit)
        return await self._subscribe(TaskSubscription(self, handler, queue, subject, credit, bool(shared)))

    async def next_task(
        self, *, queue: str = DEFAULT_QUEUE, subject: str | None = None, timeout_s: float | None = None
    ) -> Taken:
        check_names(queue)
        check_optional_names(subject)
        check_patience(timeout_s)
        pull = Pull(self, queue, subject)
        came = pull.waiter.future
        try:
            try:
                await self._await_task(pull, timeout_s)
            except TimeoutError:
                if not came.done():
                    raise TimeoutError(
                        f"no task came from the queue {queue!r} within {timeout_s:g} s"
                        + ("" if self._core.up else f", and no broker answers at {self.endpoint}")
                    ) from None
            return await self._fetched(came.result())
        except BaseException:
            if not came.cancel() and not came.cancelled():
                came.exception()  # asked for, so that nobody complains
            with contextlib.suppress(PrunusError):
                self._post(pull.abandon)
            raise

    async def add_rpc_subscriber(self, handler: RpcHandler, identifier: str) -> RpcSubscription:
        check_names(identifier)
        return await self._subscribe(RpcSubscription(self, handler, identifier))

    async def add_broadcast_subscriber(
        self,
        handler: BroadcastHandler,
        *,
        sender: str | None = None,
        subject: str | None = None,
        on_missed: Callable[[int], None] | None = None,
    ) -> BroadcastSubscription:
        check_optional_names(sender, subject)
        if on_missed is not None:
            check_callback(on_missed)
        number = next(self._numbers)
        return await self._subscribe(BroadcastSubscription(self, number, handler, (sender, subject), on_missed))

    async def tasks(
        self,
        queue: str | None = None,
        *,
        place: TaskPlace | None = None,
        task: str | None = None,
        key: str | None = None,
        after: int = 0,
        limit: int = 100,
        bodies: bool = False,
    ) -> list[TaskInfo]:
        check_optional_names(queue, task, key)
        check_place(place)
        check_page(after, limit)

        def make(id: int) -> TaskList:
            return TaskList(
                id=id, queue=queue, place=place, task=task, key=key, after=after, limit=limit, bodies=bool(bodies)
            )

        return await self._request(make, _listed)

    async def requeue(self, *tasks: str, queue: str | None = None, place: TaskPlace | None = None) -> int:
        return await self._edit("requeue", tasks, queue, place)

    async def bury(self, *tasks: str, queue: str | None = None, place: TaskPlace | None = None) -> int:
        return await self._edit("bury", tasks, queue, place)

    async def delete(self, *tasks: str, queue: str | None = None, place: TaskPlace | None = None) -> int:
        return await self._edit("delete", tasks, queue, place)

    async def purge(self, queue: str) -> int:
        return await self._edit("delete", (), queue, None)

    async def configure_queue(self, queue: str, limits: QueueLimits) -> None:
        check_names(queue)
        check_limits(limits)
        await self._request(lambda id: QueueConfigure(id=id, queue=queue, limits=limits), nothing)

    async def configure_resource(self, resource: str, capacity: int | None) -> None:
        check_names(resource)
        if capacity is not None:
            check_number("capacity", capacity)
        await self._request(lambda id: ResourceConfigure(id=id, resource=resource, capacity=capacity), nothing)

    async def statistics(self) -> Statistics:
        return await self._request(lambda id: StatisticsAsk(id=id), _statistics)

    async def blob_put(self, data: bytes | Path) -> BlobRef:
        return await upload(self._put_piece, data)

    async def blob_get(self, ref: BlobRef) -> bytes:
        return await self._fetch(checked_digest(ref))

    async def blob_save(self, ref: BlobRef, path: Path) -> None:
        await download_file(self._get_piece, checked_digest(ref), Path(path))

    async def call(
        self, requests: Sequence[bytes], *, acks: Sequence[IncomingTask] = (), holding: Sequence[IncomingTask] = ()
    ) -> list[bytes]:
        bodies = tuple(checked_body(request) for request in requests)
        check_tasks(*acks, *holding)
        settled = tuple((task.id, task.epoch) for task in acks)
        if settled:
            self._post(lambda now: self._deliveries.give_up_places(now, settled))
        held = tuple((task.id, task.epoch) for task in holding)
        done: CallDone = await self._request(
            lambda id: Call(id=id, requests=bodies, acks=settled, holding=held), _as_it_is
        )
        return list(done.answers) if done.blob is None else decode_answers(await self._fetch(done.blob))

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._check_use()
        check_callback(callback)
        number = next(self._numbers)
        callbacks = self._deliveries.reconnected
        callbacks[number] = Callback(lambda _: callback())

        def forget() -> None:
            callbacks.pop(number, None)

        return forget

    async def close(self) -> None:
        if os.getpid() != self._os_pid:
            return  # the parent's connection lives on; there is nothing here that could be closed
        self._check_caller()
        waiter = Waiter()
        self._closing = True
        caller = serving()
        self._commands.append(lambda now: self._begin_close(now, waiter, caller))
        if self._wake(at_once=True):
            await waiter.future
        self._joined()

    async def __aenter__(self) -> PeerCommunicator:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "" if not self._closing else ", closed" if self.failure is None else ", refused"
        return f"<{type(self).__name__} {self._session} at {self.endpoint}{state}>"

    # --- what a subclass does ---

    @abstractmethod
    def _wake(self, *, at_once: bool = False) -> bool:
        """Have `_step` run soon; thread-safe. False if it will never run again. `at_once`: nothing that would be better
        said together with it is about to come."""

    def _check_caller(self) -> None:  # noqa: B027 (not every subclass has a thread of its own)
        """Raise if the caller would wait for itself."""

    def _joined(self) -> None:  # noqa: B027
        """Called in `close` after everything ended."""

    # --- the users' side ---

    def loops(self) -> set[asyncio.AbstractEventLoop]:
        """Those in which its handlers run."""
        return {one.handler.loop for one in self._deliveries.subscriptions()}

    async def connected(self, timeout_s: float) -> None:
        """Wait until the broker knows us. Raises `ConnectionLostError`, and at once what the broker refuses us with."""
        waiter = Waiter()

        def wait(now: float) -> None:
            if self._finished:
                self._resolve(waiter, self._end())
            elif self._core.up:
                self._resolve(waiter, None)
            else:
                self._up_waiters.append(waiter)

        self._post(wait)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.future
        except TimeoutError:
            raise ConnectionLostError(self.endpoint) from None

    async def ended(self) -> None:
        """Wait until this has ended: it was closed, or there is a `failure`."""
        waiter = Waiter()

        def wait(now: float) -> None:
            if self._finished:
                self._resolve(waiter, None)
            else:
                self._end_waiters.append(waiter)

        self._commands.append(wait)
        if self._wake(at_once=True):
            await waiter.future

    async def _request(
        self,
        make: Callable[[int], Request],
        convert: Callable[[Any], T],
        timeout_s: float | None = None,
    ) -> T:
        """Say a request; what `convert` makes of its answer, on the core's side."""
        self._check_use()
        asked = _Asked(self, make, convert, timeout_s)
        self._enqueue(asked.ask)
        answer: T = await asked.future
        return answer

    async def _put_piece(self, digest: str, offset: int, total: int, piece: bytes) -> int:
        return await self._request(
            lambda id: BlobPut(id=id, digest=digest, offset=offset, total=total, chunk=piece), _held
        )

    async def _get_piece(self, digest: str, offset: int) -> BlobPart:
        return await self._request(
            lambda id: BlobGet(id=id, digest=digest, offset=offset, limit=CHUNK_BYTES), _as_it_is
        )

    async def _fetch(self, digest: str) -> bytes:
        """All of a blob; raises as `blob_get`."""
        return await download_bytes(self._get_piece, digest)

    async def _await_task(self, pull: Pull, timeout_s: float | None) -> None:
        """Until it came. Raises `TimeoutError`: the broker has said then that none is on its way, or did not answer."""
        loop = asyncio.get_running_loop()
        ends_at = None if timeout_s is None else loop.time() + max(timeout_s, 0)
        async with asyncio.timeout_at(None if ends_at is None else ends_at + self._last_word_s()):
            await self._subscribe(pull)
        await asyncio.wait([pull.waiter.future], timeout=None if ends_at is None else max(ends_at - loop.time(), 0))
        if not pull.waiter.future.done():
            async with asyncio.timeout(self._last_word_s()):
                await self._request(pull.withdraw, pull.withdrawn)
            if not pull.waiter.future.done():
                raise TimeoutError

    def _last_word_s(self) -> float:
        return LAST_WORD_S if self._core.up else 0.0

    async def _fetched(self, pulled: PulledTask) -> Taken:
        """A task that came, with its body. If that can't be fetched it goes back, and why is raised."""
        if pulled.delivery.blob is None:
            return Taken(self, pulled, pulled.delivery.body)
        try:
            return Taken(self, pulled, await self._fetch(pulled.delivery.blob))
        except PrunusError as error:
            await Taken(self, pulled, b"").reject(NO_BODY.format(error))
            raise

    async def _subscribe(self, subscription: S) -> S:
        try:
            await self._request(subscription.enter, nothing)
        except BaseException:  # refused, or nobody waits for it any more: then it must not stay

            def take_back(now: float) -> None:
                with contextlib.suppress(PrunusError, ValueError, TypeError):  # what can't be said was not said before
                    self._core.ask(now, subscription.leave)

            with contextlib.suppress(PrunusError):
                self._post(take_back)
            raise
        return subscription

    async def _edit(
        self,
        action: Literal["requeue", "bury", "delete"],
        tasks: tuple[str, ...],
        queue: str | None,
        place: TaskPlace | None,
    ) -> int:
        check_names(*tasks)
        check_optional_names(queue)
        check_place(place)
        if not tasks and queue is None and place is None:
            raise ValueError(f"say which tasks to {action}: by their ids, or all of a queue or a place")
        return await self._request(
            lambda id: TaskEdit(id=id, action=action, tasks=tasks, queue=queue, place=place), _changed
        )

    def _check_use(self) -> None:
        if os.getpid() != self._os_pid:
            raise ForkedProcessError("communicator")
        self._check_caller()
        if self._closing:
            raise self._end()

    def _post(self, command: Command) -> None:
        self._check_use()
        self._enqueue(command)

    def _enqueue(self, command: Command) -> None:
        self._commands.append(command)
        if not self._wake(at_once=self._core.is_idle):
            raise self._end()

    def _end(self) -> PrunusError:
        """What is raised for whatever is asked of it now."""
        return CommunicatorClosedError() if self.failure is None else self.failure.with_traceback(None)

    def _job_ended(self) -> None:
        self._wake(at_once=len(self._jobs) == 1)

    # --- the core's side ---

    def _step(self, now: float, frames: Iterable[bytes]) -> str | None:
        """Take what came and what was asked. The reason why the connection must be made anew, or None."""
        reconnect: str | None = None
        for event in self._core.wake(now):
            reconnect = self._act(now, event) or reconnect
        while self._commands:
            self._commands.popleft()(now)
        if self._jobs.ended:
            self._jobs.collect(now)
        try:
            for frame in frames:
                for event in self._core.on_frame(now, frame):
                    reconnect = self._act(now, event) or reconnect
        except ProtocolError as error:
            reconnect = str(error)
        for event in self._core.tick(now):
            reason = self._act(now, event)
            reconnect = reconnect or reason
        self._deliveries.tell_missed()
        if now >= self._look_at:
            self._look_at = now + LOOK_FOR_CLOSED_LOOPS_S
            self._deliveries.look_for_closed_loops(now)
        if self._finish_at is not None and now >= self._finish_at:
            self._finish()
        self._handover.send()
        return None if self._finished else reconnect

    def _due(self) -> float:
        return min(self._core.due(), self._finish_at) if self._finish_at is not None else self._core.due()

    def _act(self, now: float, event: Event) -> str | None:
        match event:
            case Answered():
                if isinstance(event.request, Call):
                    self._deliveries.settled(event.request.acks)
                self._settle(event.id, self._deliveries.was_settled(event) or event.message)
                if event.id == self._goodbye:
                    self._finish_at = now
            case TaskDelivery():
                self._deliveries.task_came(now, event)
            case RpcDelivery():
                self._deliveries.question_came(event)
            case BroadcastDelivery():
                self._deliveries.broadcast_came(event)
            case TaskResult():
                if (result := self._results.pop(event.task, None)) is not None:
                    result.came(event.outcome, self._resolve)
            case Failed():
                self._deliveries.settling.pop(event.id, None)
                self._settle(event.id, event.error)
            case Missed():
                self._deliveries.missed(event.count)
            case TaskLost():
                self._deliveries.lost(now, event.task)
            case NameTaken():
                logger.warning(
                    "somebody else answers as %r now", event.identifier, extra={"identifier": event.identifier}
                )
                self._deliveries.rpcs.pop(event.identifier, None)
            case Up():
                for waiter in self._up_waiters:
                    self._resolve(waiter, None)
                self._up_waiters.clear()
                if event.again:
                    self._deliveries.tell_reconnected()
            case TurnedAway():
                logger.warning(
                    "the broker at %s refuses this client for now: %s; it comes again, what it is asked for waits",
                    self.endpoint,
                    event.error,
                )
            case Ended():
                self._fail(event.error)
            case Violation():
                logger.error("the broker refused what this client said: %s", event.reason)
            case Reconnect():
                return event.reason
            case _:
                assert_never(event)
        return None

    def _settle(self, request: int, outcome: object) -> None:
        asked = self._waiters.pop(request, None)
        if asked is not None:
            if not isinstance(outcome, BaseException):
                outcome = asked.convert(outcome)
            self._resolve(asked, outcome)

    def _resolve(self, waiter: Waiter, outcome: object) -> None:
        waiter.outcome = outcome
        self._handover.add(waiter.loop, waiter)

    def _awaited_receipt(self, answer: TaskStored) -> Receipt:
        return Receipt(answer.task, answer.stored, self._results.setdefault(answer.task, Awaited()))

    # --- the end ---

    def _fail(self, error: PrunusError) -> None:
        """The broker refuses us for good."""
        if isinstance(error, BusyError | ProtocolError):  # it does not know by which way we came
            error = type(error)(f"the broker at {self.endpoint} refuses this client: {error.reason}")
        self.failure = error
        if self._core.broker_epoch:  # else it is told to who connects
            logger.error("%s; everything that waits for it ends with this error", error)
        self._finish()

    def _begin_close(self, now: float, waiter: Waiter, caller: Job | None) -> None:
        self._closers.append(waiter)
        if caller is not None:
            self._closing_jobs.append(caller)
        if self._finished:
            self._resolve(waiter, None)
            self._handover.send()
        if self._finish_at is not None:
            return
        self._finish_at = now + (CLOSE_TIMEOUT_S if self._core.up else LAST_CALL_S)
        self._goodbye = self._core.ask(now, lambda id: Goodbye(id=id))

    def _finish(self) -> None:
        """Whatever still waits ends now."""
        if self._finished:
            return
        self._finished = self._closing = True
        closed = self._end()
        for waiter in (*self._waiters.values(), *self._up_waiters):
            self._resolve(waiter, closed)
        for pull in self._deliveries.waiting_lanes():
            pull.resolve(closed)
        for result in self._results.values():
            result.came(closed, self._resolve)
        self._waiters.clear()
        self._results.clear()
        self._jobs.cancel_all(but=self._closing_jobs)
        for waiter in (*self._closers, *self._end_waiters):
            self._resolve(waiter, None)
        self._handover.send()


# --- what users get ---------------------------------------------------------------------------------


class Awaited:
    """What a task came to, for all who wait for it, in whichever loops."""

    __slots__ = ("_lock", "_waiters", "outcome")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: set[Waiter] = set()
        self.outcome: Outcome | PrunusError | EllipsisType = ...
        """Not there yet, if it is an ellipsis."""

    def came(self, outcome: Outcome | PrunusError, resolve: Callable[[Waiter, object], None]) -> None:
        """On the core's side."""
        with self._lock:
            self.outcome = outcome
            waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            resolve(waiter, None)

    async def get(self) -> bytes:
        """Waits for it, if it is not there. Who waits no longer leaves nothing behind."""
        if self.outcome is ...:  # else there is no need to wait, not even for a turn of the loop
            waiter = Waiter()
            with self._lock:
                if self.outcome is ...:
                    self._waiters.add(waiter)
            try:
                while self.outcome is ...:
                    await waiter.future
            finally:
                with self._lock:
                    self._waiters.discard(waiter)
        outcome = self.outcome
        assert not isinstance(outcome, EllipsisType), "it came"
        if isinstance(outcome, PrunusError):
            raise outcome.with_traceback(None)
        return result_or_raise(outcome)


@dataclass(frozen=True, slots=True)
class Receipt:
    """A `TaskReceipt`."""

    id: str
    stored: bool
    _result: Awaited | None = field(repr=False, default=None)

    async def result(self) -> bytes:
        if self._result is None:
            raise ValueError("send the task with want_result=True to wait for its result")
        return await self._result.get()


class Taken:
    """A `TakenTask`."""

    def __init__(self, communicator: PeerCommunicator, pulled: PulledTask, body: bytes) -> None:
        delivery = pulled.delivery
        self.id, self.epoch, self.attempt = delivery.task, delivery.epoch, delivery.attempt
        self.key, self.queue, self.subject, self.body = delivery.key, delivery.queue, delivery.subject, body
        self.pull, self._pulled = pulled.pull, pulled
        self._communicator = communicator
        self._said = False
        """Its receiver has said what becomes of it."""

    async def acknowledge(self, result: bytes | None = None) -> None:
        outcome = None if result is None else checked_body(result)
        await self._done(outcome)

    async def fail(self, error: BaseException) -> None:
        if not isinstance(error, BaseException):
            raise TypeError(f"a task fails with an exception, as ValueError('...'), not with {error!r:.100}")
        await self._done(outcome_of(error))

    async def reject(self, reason: str = "rejected") -> None:
        if not isinstance(reason, str):
            raise TypeError(f"the reason for which a task is given back is a text, not {reason!r:.100}")
        reason = as_reason(reason)
        await self._settle(lambda id: TaskNack(id=id, task=self.id, epoch=self.epoch, reason=reason))

    async def _done(self, outcome: Outcome) -> None:
        """Raises if that does not count, however often it is said."""
        try:
            await self._settle(lambda id: TaskAck(id=id, task=self.id, epoch=self.epoch, outcome=outcome))
        except TaskRejectedError:
            self._pulled.is_lost = True
        if self._pulled.is_lost:
            raise TaskRejectedError(
                f"somebody else has the task {self.id} of the queue {self.queue!r} meanwhile, because this session was "
                "silent for longer than its lease or was taken for dead: what it came to here does not count"
            )

    async def _settle(self, make: Callable[[int], TaskAck | TaskNack]) -> None:
        """Unless it was settled before: give up the place, then the task."""

        def start(id: int) -> Request:
            if not self._communicator._deliveries.let_go(self._pulled):
                raise NothingToDoError
            return make(id)

        self._said = True
        if self._pulled.lane is None:
            return
        self._communicator._post(self.pull.close)
        with contextlib.suppress(NothingToDoError):
            await self._communicator._request(start, nothing)

    async def __aenter__(self) -> Taken:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            if not self._said:
                await self.acknowledge()
            return
        with contextlib.suppress(PrunusError):  # it is the body's error that counts; who leaves gives its tasks back
            failure = Failure.of(error)
            await self.reject(failure.message if isinstance(error, TaskRejectedError) else str(failure))

    def __repr__(self) -> str:
        return f"<Taken {self.id} from {self.queue!r}, attempt {self.attempt}>"


# --- helpers ----------------------------------------------------------------------------------------


class _Asked(Waiter):
    """A request, and who waits for its answer."""

    __slots__ = ("_communicator", "_make", "_timeout_s", "convert")

    def __init__(
        self,
        communicator: PeerCommunicator,
        make: Callable[[int], Request],
        convert: Callable[[Any], Any],
        timeout_s: float | None,
    ) -> None:
        super().__init__()
        self._communicator, self._make, self._timeout_s = communicator, make, timeout_s
        self.convert = convert

    def ask(self, now: float) -> None:
        """On the core's side."""
        communicator = self._communicator
        try:
            if communicator._finished:
                raise communicator._end()
            request = communicator._core.ask(now, self._make, self._timeout_s)
        except Exception as error:  # it is the asker's, who waits for it: nobody else must suffer
            communicator._resolve(self, error)
        else:
            communicator._waiters[request] = self


def _receipt(answer: TaskStored) -> Receipt:
    return Receipt(answer.task, answer.stored)


def _outcome(answer: RpcDone) -> Outcome:
    return answer.outcome


def _listed(answer: TasksListed) -> list[TaskInfo]:
    return list(answer.tasks)


def _changed(answer: Edited) -> int:
    return answer.changed


def _held(answer: BlobHeld) -> int:
    return answer.size


def _as_it_is(answer: T) -> T:
    return answer


def _statistics(answer: StatisticsTold) -> Statistics:
    return answer.statistics
