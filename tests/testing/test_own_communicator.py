"""A communicator that a user might bring keeps the contract: `CommunicatorContract` asks for nothing of ours.

`Remote` shares no class with our communicators. A user writes such a thing for a program whose loops are busy: broker
and connection live in the loop of another thread. It runs handlers itself, has bounds and words of its own, and what it
hands out has what the protocols say and nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import pytest

from prunus import Communicator, Process, ProcessController, ProcessSpec
from prunus.errors import BusyError, TaskRejectedError
from prunus.messaging import (
    BlobRef,
    Broadcast,
    IncomingTask,
    LocalBroker,
    QueueLimits,
    Statistics,
    Subscription,
    TakenTask,
    TaskInfo,
    TaskReceipt,
)
from prunus.runtime.worker import Worker
from prunus.testing import CommunicatorContract, ContractService, LocalDaemon
from prunus.testing.communicator_contract import TakeForDead

P = ParamSpec("P")
T = TypeVar("T")

MAX_QUESTIONS = 20
"""Of the handler of one name of a `Remote`."""
MAX_BROADCASTS = 20
"""Of the handler of one subscription of a `Remote`."""
LOOK_S = 0.1
"""How often it is looked whether a loop was closed that has something to say."""


def in_other_words(error: Exception) -> str:
    """The words of an error in another order: what a contract looks for are names, not sentences."""
    return " ".join(sorted(str(error).split()))


class LoopClosedError(Exception):
    """A loop was closed before it came to an end of what it was given."""


async def in_loop(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine comes to in a loop of another thread."""
    try:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
    except RuntimeError as error:
        coroutine.close()
        raise LoopClosedError from error
    ended = asyncio.wrap_future(future)
    try:
        while not ended.done():
            await asyncio.wait((ended,), timeout=LOOK_S)
            if loop.is_closed() and not future.done():
                coroutine.close()
                raise LoopClosedError
        return ended.result()
    finally:
        ended.cancel()


class Elsewhere:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="prunus-elsewhere")
        self._thread.start()

    async def do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return await in_loop(self.loop, coroutine)
        except (TypeError, ValueError) as error:  # misuse
            raise type(error)(in_other_words(error)) from None

    async def close(self) -> None:
        await self.do(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Handling:
    """A handler of a `Remote`: it runs in the loop in which it was subscribed, or in a thread."""

    def __init__(self, handler: Callable[..., Any], face: Callable[[Any], object]) -> None:
        self._handler, self._face = checked(handler), face
        self._loop = asyncio.get_running_loop()
        self._is_async = any(map(inspect.iscoroutinefunction, (handler, type(handler).__call__)))
        self.subscription: Subscription

    async def __call__(self, argument: object) -> Any:
        if self._is_async:
            return await self._await(lambda: self._handler(self._face(argument)))
        result = await asyncio.to_thread(self._call, argument)
        return await self._await(lambda: result) if inspect.isawaitable(result) else result

    def _call(self, argument: object) -> Any:
        try:
            return self._handler(self._face(argument))
        except StopIteration as error:  # which no future can hold
            raise RuntimeError(repr(error)) from error

    async def _await(self, begin: Callable[[], Awaitable[Any]]) -> Any:
        async def wait() -> Any:
            return await begin()

        try:
            return await in_loop(self._loop, wait())
        except LoopClosedError:
            await self.subscription.cancel()
            raise TaskRejectedError("the loop of its handler was closed") from None


class Bounded:
    """A handler that works on so many at the same time; `full` is called for another one."""

    def __init__(self, handle: Handling, most: int, full: Callable[[], None], rests: Callable[[], None]) -> None:
        self._handle, self._most, self._full, self._rests = handle, most, full, rests
        self._in_hand = 0

    async def __call__(self, argument: object) -> Any:
        if self._in_hand == self._most:
            return self._full()
        self._in_hand += 1
        try:
            return await self._handle(argument)
        finally:
            self._in_hand -= 1
            if not self._in_hand:
                self._rests()


class RemoteReceipt:
    """A `TaskReceipt`."""

    def __init__(self, there: Elsewhere, receipt: TaskReceipt) -> None:
        self.id, self.stored = receipt.id, receipt.stored
        self._there, self._receipt = there, receipt

    async def result(self) -> bytes:
        return await self._there.do(self._receipt.result())


class RemoteSubscription:
    """A `Subscription`."""

    def __init__(self, there: Elsewhere, subscription: Subscription) -> None:
        self._there, self._subscription = there, subscription

    async def cancel(self) -> None:
        await self._there.do(self._subscription.cancel())

    async def set_credit(self, credit: int) -> None:
        await self._there.do(self._subscription.set_credit(credit))


class RemoteTask:
    """An `IncomingTask`."""

    def __init__(self, task: IncomingTask) -> None:
        self.id, self.key, self.queue, self.subject = task.id, task.key, task.queue, task.subject
        self.body, self.epoch, self.attempt = task.body, task.epoch, task.attempt
        self._task = task


class RemoteTaken(RemoteTask):
    """A `TakenTask`."""

    def __init__(self, there: Elsewhere, task: TakenTask) -> None:
        super().__init__(task)
        self._there, self._taken = there, task

    async def acknowledge(self, result: bytes | None = None) -> None:
        await self._there.do(self._taken.acknowledge(result))

    async def fail(self, error: BaseException) -> None:
        await self._there.do(self._taken.fail(error))

    async def reject(self, reason: str = "rejected") -> None:
        await self._there.do(self._taken.reject(reason))

    async def __aenter__(self) -> TakenTask:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._there.do(self._taken.__aexit__(kind, error, traceback))


class RemoteBroadcast:
    """A `Broadcast`."""

    def __init__(self, broadcast: Broadcast) -> None:
        self.body, self.sender, self.subject = broadcast.body, broadcast.sender, broadcast.subject


class Remote:
    """A `Communicator` whose work another one does in a loop elsewhere; handlers run where they were subscribed."""

    def __init__(self, there: Elsewhere, behind: Communicator) -> None:
        self._there, self._behind = there, behind
        self._again: list[Callable[[], None]] = []

    @property
    def session(self) -> str:
        return self._behind.session

    async def task_send(self, body: bytes, **options: Any) -> TaskReceipt:
        return RemoteReceipt(self._there, await self._there.do(self._behind.task_send(body, **options)))

    async def rpc_send(self, recipient: str, body: bytes, **options: Any) -> bytes:
        return await self._there.do(self._behind.rpc_send(recipient, body, **options))

    async def broadcast_send(self, body: bytes, **options: Any) -> None:
        await self._there.do(self._behind.broadcast_send(body, **options))

    async def add_task_subscriber(self, handler: Callable[..., Any], **options: Any) -> Subscription:
        handle = Handling(handler, RemoteTask)
        return await self._subscribe(handle, self._behind.add_task_subscriber(handle, **options))

    async def add_rpc_subscriber(self, handler: Callable[..., Any], identifier: str) -> Subscription:
        def refuse() -> None:
            raise BusyError(f"{identifier} works on {MAX_QUESTIONS} questions; ask later")

        handle = Handling(handler, bytes)
        bounded = Bounded(handle, MAX_QUESTIONS, refuse, lambda: None)
        return await self._subscribe(handle, self._behind.add_rpc_subscriber(bounded, identifier))

    async def add_broadcast_subscriber(
        self, handler: Callable[..., Any], *, on_missed: Callable[[int], None] | None = None, **options: Any
    ) -> Subscription:
        missed: list[None] = []

        def tell() -> None:
            if missed:
                told(len(missed))
                missed.clear()
                for again in list(self._again):
                    again()

        told = here(on_missed if on_missed is not None else lambda count: None)
        handle = Handling(handler, RemoteBroadcast)
        bounded = Bounded(handle, MAX_BROADCASTS, lambda: missed.append(None), tell)
        subscribing = self._behind.add_broadcast_subscriber(bounded, on_missed=told, **options)
        return await self._subscribe(handle, subscribing)

    async def next_task(self, **options: Any) -> TakenTask:
        async def fetch() -> asyncio.Task[TakenTask]:
            fetching.append(asyncio.create_task(self._behind.next_task(**options)))
            await asyncio.wait(fetching)
            return fetching[0]

        async def give_up() -> None:
            fetching[0].cancel()

        fetching: list[asyncio.Task[TakenTask]] = []
        ended = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(fetch(), self._there.loop))
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:  # which may come too late: then the task is the caller's all the same
            await self._there.do(give_up())
            if (await ended).cancelled():
                raise
        return RemoteTaken(self._there, (await ended).result())

    async def tasks(self, queue: str | None = None, **options: Any) -> list[TaskInfo]:
        return await self._there.do(self._behind.tasks(queue, **options))

    async def requeue(self, *tasks: str, **options: Any) -> int:
        return await self._there.do(self._behind.requeue(*tasks, **options))

    async def bury(self, *tasks: str, **options: Any) -> int:
        return await self._there.do(self._behind.bury(*tasks, **options))

    async def delete(self, *tasks: str, **options: Any) -> int:
        return await self._there.do(self._behind.delete(*tasks, **options))

    async def purge(self, queue: str) -> int:
        return await self._there.do(self._behind.purge(queue))

    async def configure_queue(self, queue: str, limits: QueueLimits) -> None:
        await self._there.do(self._behind.configure_queue(queue, limits))

    async def configure_resource(self, resource: str, capacity: int | None) -> None:
        await self._there.do(self._behind.configure_resource(resource, capacity))

    async def statistics(self) -> Statistics:
        return await self._there.do(self._behind.statistics())

    async def blob_put(self, data: bytes | Path) -> BlobRef:
        return await self._there.do(self._behind.blob_put(data))

    async def blob_get(self, ref: BlobRef) -> bytes:
        return await self._there.do(self._behind.blob_get(ref))

    async def blob_save(self, ref: BlobRef, path: Path) -> None:
        await self._there.do(self._behind.blob_save(ref, path))

    async def call(
        self, requests: Sequence[bytes], *, acks: Sequence[IncomingTask] = (), holding: Sequence[IncomingTask] = ()
    ) -> list[bytes]:
        settled, held = ([task._task for task in tasks] for tasks in (acks, holding))  # type: ignore[attr-defined]
        return await self._there.do(self._behind.call(requests, acks=settled, holding=held))

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        again = here(callback)
        self._again.append(again)
        forget = self._behind.on_reconnect(again)

        def forget_both() -> None:
            forget()
            self._again = [other for other in self._again if other is not again]

        return forget_both

    async def close(self) -> None:
        await self._there.do(self._behind.close())

    async def _subscribe(self, handle: Handling, subscribing: Coroutine[Any, Any, Subscription]) -> Subscription:
        handle.subscription = await self._there.do(subscribing)
        return RemoteSubscription(self._there, handle.subscription)


def checked(handler: Callable[P, T]) -> Callable[P, T]:
    if not callable(handler):
        raise TypeError(f"{handler!r} can't be called: it is no handler")
    return handler


def here(callback: Callable[P, None]) -> Callable[P, None]:
    """Calls it in this loop."""
    loop = asyncio.get_running_loop()
    checked(callback)

    def call(*arguments: P.args, **keywords: P.kwargs) -> None:
        loop.call_soon_threadsafe(lambda: callback(*arguments, **keywords))

    return call


class TestRemote(CommunicatorContract):
    """The whole contract."""

    max_questions_in_hand = MAX_QUESTIONS
    max_broadcasts_in_hand = MAX_BROADCASTS

    @pytest.fixture
    async def take_for_dead(self, connect: Callable[[], Awaitable[Communicator]]) -> TakeForDead:
        async def expire(session: str) -> None:
            self.broker.expire(session)

        async def take_for_dead(peer: Communicator) -> None:
            assert isinstance(peer, Remote)
            await peer._there.do(expire(peer.session))

        return take_for_dead

    @pytest.fixture
    async def connect(self) -> AsyncIterator[Callable[[], Awaitable[Communicator]]]:
        there = Elsewhere()
        database, broker = await there.do(start())
        self.broker = broker
        async with contextlib.AsyncExitStack() as peers:

            async def connect() -> Communicator:
                peer: Communicator = Remote(there, await there.do(broker.connect()))
                peers.push_async_callback(peer.close)
                return peer

            yield connect
        await there.do(stop(database, broker))
        await there.close()


async def start() -> tuple[sqlite3.Connection, LocalBroker]:
    database = sqlite3.connect(":memory:", isolation_level=None)
    return database, LocalBroker(database, service=ContractService(database))


async def stop(database: sqlite3.Connection, broker: LocalBroker) -> None:
    broker.close()
    database.close()


class Twice(Process):
    """A process with an input and an output."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("x", valid_type=int)
        spec.output("y", valid_type=int)

    async def run(self) -> None:
        self.out("y", 2 * self.inputs.x)


async def test_what_keeps_the_contract_can_be_given_to_a_controller_and_to_a_worker() -> None:
    """A process is launched by the one and run by the other, and its result comes back."""
    there = Elsewhere()
    daemon = LocalDaemon(workers=0)

    async def connect(name: str) -> Communicator:
        return Remote(there, await there.do(daemon.broker.connect(name)))

    await there.do(daemon.__aenter__())
    worker_side = await connect("worker")
    controller, worker = ProcessController(await connect("me")), Worker(worker_side, slots=2, grace_s=1.0)
    running = asyncio.create_task(worker.run())
    handle = await controller.launch(Twice, {"x": 21})
    assert (await handle.result()).outputs.y == 42
    worker.stop()
    await running
    await worker_side.close()
    await controller.close()
    await there.do(daemon.__aexit__())
    await there.close()
