"""The seam between a program and its peers: tasks, questions (RPC), broadcasts, and calls to the broker.

Bodies are opaque bytes. Handlers are ``async def`` (run in the event loop in which they were subscribed) or plain
``def`` (run in a worker thread, so that they block nobody), never on the communicator's own thread. Each delivery
ends in exactly one answer: a result, an error or a cancellation. Every await is one fact: what comes back is the
answer, never another future. A handler may use its communicator freely. Operations go out in the order in which they
were begun. What is misused is refused before it is sent, with a `ValueError` or `TypeError` that says what.

============  ===========================================================================================
`task_send`   durable; returns when the task would survive a power cut (G1). Delivered to one subscriber of
              its queue at a time, within the credit that it gave, until one acknowledges it
`rpc_send`    a question to the one who subscribed under a name: an answer, or `UnroutableError` at once,
              or `RemoteError`/an error of our tree, or `IndeterminateError` when the time is over
`broadcast`   to all whose filter matches, now; not stored
`call`        requests to the service behind the broker (where the broker keeps processes, that is the
              persister), together with acknowledgements: one transaction, all or nothing
============  ===========================================================================================

What happens at a bound
- tasks: a subscriber never holds more than its credit; the rest waits at the broker.
- questions: a subscriber with `MAX_QUESTIONS_IN_HAND` (or that does not read) refuses further ones with `BusyError`.
- broadcasts: those that a slow subscriber can't take (`MAX_BROADCASTS_IN_HAND` are in its handler, or wait for it) are
  dropped, and it is told how many (`on_missed`).

What is too large for a message is a **blob**: bytes that the broker keeps in a file, named by their SHA-256. The body
of a task becomes one by itself. Who puts blobs and sends their references in bodies of his own (`blob_put`) should know
that the broker can't see these: it keeps a blob while a task has it as its body, and for an hour after it was put.

`prunus.testing.CommunicatorContract` is the contract of this seam as a runnable suite.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from prunus.messaging.inventory import QueueLimits, Statistics, TaskInfo, TaskPlace

DEFAULT_QUEUE = "default"
CONNECT_TIMEOUT_S = 5.0
"""How long who connects waits for a broker, if the caller says nothing else."""
RPC_TIMEOUT_S = 10.0
"""How long a question waits for its answer, if the caller says nothing else."""
MAX_BODY_BYTES = 16 * 1024 * 1024
"""A larger message is refused with `MessageTooLargeError` before it is sent; a larger task becomes a blob."""
MAX_BLOB_BYTES = 4 * 1024 * 1024 * 1024
"""A larger blob, and so a larger task, is refused with `MessageTooLargeError`."""
MAX_QUESTIONS_IN_HAND = 1000
"""Questions that the handlers of one communicator work on; more are answered with `BusyError`."""
MAX_BROADCASTS_IN_HAND = 1000
"""Broadcasts that wait for the handler of one subscription, or are in it; more are dropped and counted."""


@dataclass(frozen=True)
class BlobRef:
    """What stands for a blob: whoever has it can get the bytes."""

    digest: str
    """Their SHA-256, in 64 small hexadecimal digits."""
    size: int
    """How many they are."""


class IncomingTask(Protocol):
    """A task that this peer holds: nobody else has it until it is settled or this peer is gone."""

    @property
    def id(self) -> str: ...
    @property
    def key(self) -> str | None: ...
    @property
    def queue(self) -> str: ...
    @property
    def subject(self) -> str | None: ...
    @property
    def body(self) -> bytes: ...
    @property
    def epoch(self) -> int:
        """Rises with every delivery of this task; an acknowledgement under an older one is ignored."""
        ...

    @property
    def attempt(self) -> int:
        """1 for the first delivery."""
        ...


class TakenTask(IncomingTask, Protocol):
    """A task that was fetched with `next_task`. Leaving it as a context manager acknowledges it, unless it was said
    before what becomes of it; an exception gives it back.

    What is said first counts; saying more is harmless. But who was silent for longer than its lease, or was taken for
    dead, does not hold its tasks any more: then `acknowledge` and `fail` (and so the end of the block) raise
    `TaskRejectedError`, each time, and what they were given is dropped.
    """

    async def acknowledge(self, result: bytes | None = None) -> None:
        """It is done, with this result for its sender."""
        ...

    async def fail(self, error: BaseException) -> None:
        """It is done, and this error is its result."""
        ...

    async def reject(self, reason: str = "rejected") -> None:
        """Give it back: it is offered again, a little later. Harmless if somebody else has it meanwhile."""
        ...

    async def __aenter__(self) -> TakenTask: ...
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Subscription(Protocol):
    """What `add_*_subscriber` returns."""

    async def cancel(self) -> None:
        """No more deliveries. Tasks in hand are still settled by their handlers. Idempotent."""
        ...

    async def set_credit(self, credit: int) -> None:
        """Of a task subscription: hold at most this many tasks from now on (0: take nothing new)."""
        ...


class TaskReceipt(Protocol):
    """What `task_send` returns when the task is stored."""

    @property
    def id(self) -> str: ...
    @property
    def stored(self) -> bool:
        """False if a pending task with the same key made this one superfluous (`id` is then that one's)."""
        ...

    async def result(self) -> bytes:
        """What the handler returned; raises what it raised, `DeadLetterError` or `TaskDeletedError`. Only for a task
        sent with ``want_result=True``."""
        ...


TaskHandler = Callable[[IncomingTask], Awaitable[bytes | None] | bytes | None]
"""What becomes of the task is decided by how its handler ends.

================================  ================================================================================
it returns bytes or None          the task is acknowledged, with that result if its sender wants it
it raises `TaskRejectedError`     the task is given back, for this reason
it raises another `Exception`     the task is acknowledged: this error is its result. It is not done again
it is cancelled                   the task is given back
it raises `SystemExit`,           the task is given back: its program ends, the task has not. An error that ends a
`KeyboardInterrupt` or another    program goes on to do so if the loop of the handler runs in the main thread, also
`BaseException`                   that of a plain handler; in another thread it ends the handler only
its loop is closed                the task is given back
================================  ================================================================================

What is given back is offered again, a little later, as its next attempt. A task that was settled meanwhile by
``call(..., acks=[task])`` is left alone. So is one that somebody else has by then, because this session was silent for
longer than its lease: what the handler came to is dropped, and the log says so."""
RpcHandler = Callable[[bytes], Awaitable[bytes] | bytes]
BroadcastHandler = Callable[["Broadcast"], Awaitable[None] | None]


class Broadcast(Protocol):
    """A message to whoever listens."""

    @property
    def body(self) -> bytes: ...
    @property
    def sender(self) -> str | None: ...
    @property
    def subject(self) -> str | None: ...


class Communicator(Protocol):
    """A peer among peers. Made by a context manager or closed with `close`; safe to use from any event loop."""

    @property
    def session(self) -> str:
        """The name of this peer: random, the same across reconnections."""
        ...

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
    ) -> TaskReceipt:
        """Store a task.

        - `body` up to `MAX_BLOB_BYTES`; what is over `MAX_BODY_BYTES` is put as a blob first. Who receives it fetches
          it before the handler is called, and then has all of it in memory: so many bodies as its credit allows.
        - `priority` 0 to 9, the highest first; oldest first within one.
        - `key`: at most one task of a `(queue, key)` is pending, and at most one of a key is held. A second pending
          one *joins* the first (its sender gets that one's result; whatever else it says, as its body, its times and
          its priority, does not count) or *replaces* it, with its place in the queue and its priority.
        - `not_before`, `expires_at` (with a time zone): by the wall clock of the broker. No task expires by itself.
        - `max_attempts`: after so many deliveries that came to nothing it is a dead letter (0: no limit).
        - `resources`: tokens that it takes while it is held (see `configure_resource`).

        Raises `BusyError` (the queue is full), `StoreFullError`, `UnknownResourceError`, `MessageTooLargeError`.
        """
        ...

    async def rpc_send(self, recipient: str, body: bytes, *, timeout_s: float = RPC_TIMEOUT_S) -> bytes: ...

    async def broadcast_send(self, body: bytes, *, sender: str | None = None, subject: str | None = None) -> None: ...

    async def add_task_subscriber(
        self,
        handler: TaskHandler,
        *,
        queue: str = DEFAULT_QUEUE,
        credit: int = 1,
        subject: str | None = None,
        shared: bool = False,
    ) -> Subscription:
        """Work on tasks of `queue`, at most `credit` at once (and never more than about 100,000 in all). `subject` is a
        pattern (see `patterns`); None: all. The `shared` subscriptions of a communicator have one credit: what it holds
        by any of them takes room in all, and a free place goes to the one that was made first, if there is a task for
        it."""
        ...

    async def next_task(
        self, *, queue: str = DEFAULT_QUEUE, subject: str | None = None, timeout_s: float | None = None
    ) -> TakenTask:
        """Fetch one task, waiting at most `timeout_s` for it (0: only if one is there; None: as long as it takes).

        Raises `TimeoutError`; nothing was taken then.
        """
        ...

    async def add_rpc_subscriber(self, handler: RpcHandler, identifier: str) -> Subscription:
        """Answer questions to `identifier`; `DuplicateSubscriberError` if another session does."""
        ...

    async def add_broadcast_subscriber(
        self,
        handler: BroadcastHandler,
        *,
        sender: str | None = None,
        subject: str | None = None,
        on_missed: Callable[[int], None] | None = None,
    ) -> Subscription:
        """`sender` and `subject` are patterns (see `patterns`), evaluated at the broker; None matches all.
        `on_missed` is called in this loop with how many were dropped because this peer was too slow, once it caught up:
        exactly for those that were dropped here, at most for those that the broker dropped."""
        ...

    # --- looking into queues, and changing them ---
    # What changes many tasks does so some at a time, while others are served. Tasks that come after it began are not
    # meant. If the broker is killed meanwhile it goes on, but tells only how many were changed after that.

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
        """The tasks of a queue (None: of all) in the order in which they were accepted, `limit` at a time: the next
        page is ``after`` the last one's `order`. With ``bodies=True`` they come with their bodies (a page may then be
        shorter). Nothing is taken."""
        ...

    async def requeue(self, *tasks: str, queue: str | None = None, place: TaskPlace | None = None) -> int:
        """Offer these tasks (or all of a queue and place, say the dead ones) again, as if they were new; how many."""
        ...

    async def bury(self, *tasks: str, queue: str | None = None, place: TaskPlace | None = None) -> int:
        """Make dead letters of these tasks, though nothing is wrong with them; how many. One that is held is left
        alone."""
        ...

    async def delete(self, *tasks: str, queue: str | None = None, place: TaskPlace | None = None) -> int:
        """Forget these tasks; how many. One that is held is left alone: its holder settles it."""
        ...

    async def purge(self, queue: str) -> int:
        """Forget every task of a queue that nobody holds, its dead letters too; how many. Tasks that come after it
        began stay, unless the broker is killed meanwhile: then it begins anew, and counts only that."""
        ...

    async def configure_queue(self, queue: str, limits: QueueLimits) -> None:
        """Limit a queue, at once and for good (`QueueLimits()`: not at all)."""
        ...

    async def configure_resource(self, resource: str, capacity: int | None) -> None:
        """There are `capacity` tokens of a resource, at once and for good; None: nobody may ask for it any more, and
        what waits for some waits until there are any."""
        ...

    async def statistics(self) -> Statistics:
        """Queues, resources, sessions and counts of the broker, as they are now."""
        ...

    # --- what is too large for a message ---

    async def blob_put(self, data: bytes | Path) -> BlobRef:
        """Have the broker keep these bytes (or those of a file) as a blob; durable when this returns.

        What it has already is not sent again. It is kept while a task has it as its body, and for an hour after it was
        last put. Raises `MessageTooLargeError`, `StoreFullError`, `BusyError`, `OSError` (the file can't be read).
        """
        ...

    async def blob_get(self, ref: BlobRef) -> bytes:
        """The bytes of a blob, all in memory. Raises `BlobNotFoundError`, `BlobDamagedError`."""
        ...

    async def blob_save(self, ref: BlobRef, path: Path) -> None:
        """Write the bytes of a blob to a file, a few MiB at a time: it appears under its name (and replaces what is
        there) when it is whole. Raises as `blob_get`, and `OSError`."""
        ...

    # --- the service behind the broker ---

    async def call(
        self, requests: Sequence[bytes], *, acks: Sequence[IncomingTask] = (), holding: Sequence[IncomingTask] = ()
    ) -> list[bytes]:
        """The service's answers, after the commit that holds all of them and the acknowledgements. If the service
        refuses one, nothing is done (the tasks stay held) and its error is raised. So does a call that comes when this
        peer does not hold the tasks of `holding` any more: it raises `TaskRejectedError`."""
        ...

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` in this loop each time the connection is up again (what is broadcast meanwhile is missed), or
        broadcasts were dropped because this peer was too slow. Returns the function that takes it back."""
        ...

    async def close(self) -> None:
        """Leave: subscriptions end; tasks in hand are given back, and have had an attempt. Idempotent."""
        ...
