"""A blocking face for scripts and threads: the methods of `Communicator` by the same names, without ``await``.

::

    with connect_sync("ipc:///run/prunus/s") as communicator:
        receipt = communicator.task_send(b"...", want_result=True)
        print(receipt.result(timeout_s=60))

It has a thread with an event loop of its own. A call hands its coroutine to this loop and waits; so it can be used from
many threads at once, and Ctrl-C ends the wait. Plain ``def`` handlers run in worker threads and may call it; an ``async
def`` handler runs in that loop, where waiting for the loop would never end: there a call raises `RuntimeError` at once,
and `BlockingCommunicator.communicator` has the same methods to be awaited.

What each method does is said in `prunus.messaging.communicator`; the signatures are taken from there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from prunus.errors import CommunicatorClosedError, ForkedProcessError
from prunus.messaging.arguments import check_patience
from prunus.messaging.deliveries import BaseSubscription
from prunus.messaging.handover import serving, waiting
from prunus.messaging.peer import PeerCommunicator, Receipt, Taken

JOIN_S = 5.0
"""How long `close` waits for the thread, if an ``async def`` handler does not end though it was cancelled."""

P = ParamSpec("P")
R = TypeVar("R")
B = TypeVar("B")
A = TypeVar("A")


def _waits_for(
    method: Callable[Concatenate[PeerCommunicator, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[BlockingCommunicator, P], R]:
    """The same method, that waits for its answer."""

    @functools.wraps(method)
    def wait(self: BlockingCommunicator, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.wait_for(lambda: method(self.communicator, *args, **kwargs))

    return wait


def _waits_for_a(
    face: Callable[[BlockingCommunicator, A], B],
    method: Callable[Concatenate[PeerCommunicator, P], Coroutine[Any, Any, A]],
) -> Callable[Concatenate[BlockingCommunicator, P], B]:
    """The same method, that waits for its answer and gives it a blocking face."""

    @functools.wraps(method)
    def wait(self: BlockingCommunicator, /, *args: P.args, **kwargs: P.kwargs) -> B:
        return face(self, self.wait_for(lambda: method(self.communicator, *args, **kwargs)))

    return wait


class _Face(Generic[A]):
    """The blocking face of something that a communicator gave."""

    def __init__(self, communicator: BlockingCommunicator, behind: A) -> None:
        self._communicator, self._behind = communicator, behind

    def __repr__(self) -> str:
        return f"<blocking {self._behind!r}>"


class BlockingReceipt(_Face[Receipt]):
    """A `TaskReceipt`."""

    @property
    def id(self) -> str:
        return self._behind.id

    @property
    def stored(self) -> bool:
        return self._behind.stored

    def result(self, timeout_s: float | None = None) -> bytes:
        """As `TaskReceipt.result`; raises `TimeoutError` if it is not there in time (it can be asked for again)."""
        check_patience(timeout_s)

        async def within() -> bytes:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._behind.result()
            except TimeoutError:
                raise TimeoutError(
                    f"the result of the task {self.id} was not there within {timeout_s:g} s; it can be asked for again"
                ) from None

        return self._communicator.wait_for(within)


class BlockingSubscription(_Face[BaseSubscription]):
    """A `Subscription`."""

    def cancel(self) -> None:
        self._communicator.wait_for(self._behind.cancel)

    def set_credit(self, credit: int) -> None:
        self._communicator.wait_for(lambda: self._behind.set_credit(credit))


class BlockingTaken(_Face[Taken]):
    """A `TakenTask`. Leaving it as a context manager acknowledges it; an exception gives it back."""

    @property
    def id(self) -> str:
        return self._behind.id

    @property
    def key(self) -> str | None:
        return self._behind.key

    @property
    def queue(self) -> str:
        return self._behind.queue

    @property
    def subject(self) -> str | None:
        return self._behind.subject

    @property
    def body(self) -> bytes:
        return self._behind.body

    @property
    def epoch(self) -> int:
        return self._behind.epoch

    @property
    def attempt(self) -> int:
        return self._behind.attempt

    def acknowledge(self, result: bytes | None = None) -> None:
        self._communicator.wait_for(lambda: self._behind.acknowledge(result))

    def fail(self, error: BaseException) -> None:
        self._communicator.wait_for(lambda: self._behind.fail(error))

    def reject(self, reason: str = "rejected") -> None:
        self._communicator.wait_for(lambda: self._behind.reject(reason))

    def __enter__(self) -> BlockingTaken:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._communicator.wait_for(lambda: self._behind.__aexit__(kind, error, traceback))


class BlockingCommunicator:
    """See the module. Made by `prunus.messaging.connect_sync`, or from any function that connects."""

    def __init__(self, connect: Callable[[], Awaitable[PeerCommunicator]], name: str = "peer") -> None:
        """Call and await `connect` in the new thread; raises what it raises."""
        self._os_pid = os.getpid()
        self._connect = connect
        self._connected: concurrent.futures.Future[PeerCommunicator] = concurrent.futures.Future()
        self._closed = False
        self._waiting: set[concurrent.futures.Future[Any]] = set()
        """What other threads wait for now; at most one for each of them."""
        self._left: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name=f"prunus-blocking-{name}", daemon=True)
        self._thread.start()
        try:
            self.communicator = self._connected.result()
            """The same peer, to be awaited: for ``async def`` handlers."""
        except BaseException:  # also Ctrl-C: the thread must not stay
            self._connected.add_done_callback(lambda _: self._end())
            raise

    @property
    def session(self) -> str:
        return self.communicator.session

    task_send = _waits_for_a(BlockingReceipt, PeerCommunicator.task_send)
    rpc_send = _waits_for(PeerCommunicator.rpc_send)
    broadcast_send = _waits_for(PeerCommunicator.broadcast_send)
    add_task_subscriber = _waits_for_a(BlockingSubscription, PeerCommunicator.add_task_subscriber)
    next_task = _waits_for_a(BlockingTaken, PeerCommunicator.next_task)
    add_rpc_subscriber = _waits_for_a(BlockingSubscription, PeerCommunicator.add_rpc_subscriber)
    add_broadcast_subscriber = _waits_for_a(BlockingSubscription, PeerCommunicator.add_broadcast_subscriber)
    tasks = _waits_for(PeerCommunicator.tasks)
    requeue = _waits_for(PeerCommunicator.requeue)
    bury = _waits_for(PeerCommunicator.bury)
    delete = _waits_for(PeerCommunicator.delete)
    purge = _waits_for(PeerCommunicator.purge)
    configure_queue = _waits_for(PeerCommunicator.configure_queue)
    configure_resource = _waits_for(PeerCommunicator.configure_resource)
    statistics = _waits_for(PeerCommunicator.statistics)
    blob_put = _waits_for(PeerCommunicator.blob_put)
    blob_get = _waits_for(PeerCommunicator.blob_get)
    blob_save = _waits_for(PeerCommunicator.blob_save)
    call = _waits_for(PeerCommunicator.call)

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` in the communicator's loop each time the connection is up again: it must not wait there."""

        async def register() -> Callable[[], None]:
            return self.communicator.on_reconnect(callback)

        return self.wait_for(register)

    def close(self) -> None:
        """Leave: subscriptions end, tasks in hand are given back. Idempotent. A plain handler that still runs ends in
        its own time; so a handler may do this too."""
        if os.getpid() != self._os_pid:
            return  # the parent's connection lives on
        self._check_thread()
        if self._closed:
            return
        self._closed = True
        self._end()
        if serving() is None:
            self._thread.join(JOIN_S)

    def __enter__(self) -> BlockingCommunicator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<BlockingCommunicator of {self.communicator!r}{', closed' if self._closed else ''}>"

    # --- the two threads ---

    def wait_for(self, start: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """Run a coroutine in the communicator's loop and wait for what it comes to.

        Raises `RuntimeError` in a thread that would wait for itself.
        """
        if os.getpid() != self._os_pid:
            raise ForkedProcessError("communicator")
        self._check_thread()
        self.communicator._check_caller()
        if self._closed:
            raise CommunicatorClosedError
        coroutine = start()
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # it was closed a moment ago
            coroutine.close()
            raise CommunicatorClosedError from None
        self._waiting.add(future)
        try:
            if self._loop.is_closed():  # and what was handed to it may never be looked at
                raise CommunicatorClosedError
            with waiting():
                return future.result()
        except concurrent.futures.CancelledError:  # the loop ended meanwhile
            raise CommunicatorClosedError from None
        except BaseException:  # Ctrl-C: nobody waits for it any more
            future.cancel()
            raise
        finally:
            self._waiting.discard(future)

    def _check_thread(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # an ordinary thread, which may wait
            return
        if loop is self._loop or loop in self.communicator.loops():
            raise RuntimeError(
                "this loop serves handlers of this communicator, where a blocking call would wait for itself: "
                "await the method of `.communicator`, or make the handler a plain `def`"
            )

    def _end(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ended already
            self._loop.call_soon_threadsafe(self._left.set)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            for future in list(self._waiting):
                future.cancel()

    async def _serve(self) -> None:
        self._loop, self._left = asyncio.get_running_loop(), asyncio.Event()
        try:
            communicator = await self._connect()
        except BaseException as error:  # whoever waits for the connection hears of it
            self._connected.set_exception(error)
            return
        async with communicator:
            self._connected.set_result(communicator)
            await self._left.wait()
