"""The seam between a program and its peers: tasks, questions (RPC), broadcasts, and calls to the broker.

Bodies are opaque bytes. Handlers are called in the event loop in which they were subscribed, never on the
communicator's own thread. Every await is one fact: what comes back is the answer, never another future.

============  ===========================================================================================
`task_send`   durable; returns when the task would survive a power cut (G1). Delivered to one subscriber of
              its queue at a time, within the credit that it gave, until one acknowledges it
`rpc_send`    a question to the one who subscribed under a name: an answer, or `UnroutableError` at once,
              or `RemoteError`/an error of our tree, or `IndeterminateError` when the time is over
`broadcast`   to all whose filter matches, now; not stored
`call`        requests to the service behind the broker (where the broker keeps processes, that is the
              persister), together with acknowledgements: one transaction, all or nothing
============  ===========================================================================================

`prunus.testing` has the contract of this seam as a runnable suite.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

DEFAULT_QUEUE = "default"
RPC_TIMEOUT_S = 10.0
"""How long a question waits for its answer, if the caller says nothing else."""
MAX_BODY_BYTES = 16 * 1024 * 1024
"""A larger message is refused with `MessageTooLargeError` before it is sent."""


class IncomingTask(Protocol):
    """A task that this peer holds: nobody else has it until it is settled or this peer is gone."""

    @property
    def id(self) -> str: ...
    @property
    def key(self) -> str | None: ...
    @property
    def queue(self) -> str: ...
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
        """What the handler returned; raises what it raised. Only for a task sent with ``want_result=True``."""
        ...


TaskHandler = Callable[[IncomingTask], Awaitable[bytes | None]]
"""Returning acknowledges the task (with that result, if the sender wants it), raising `TaskRejectedError` gives
it back, any other exception acknowledges it with the failure. A task that was already settled by
``call(..., acks=[task])`` is left alone."""
RpcHandler = Callable[[bytes], Awaitable[bytes]]
BroadcastHandler = Callable[["Broadcast"], Awaitable[None]]


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
    ) -> TaskReceipt:
        """Store a task. At most one task of a `(queue, key)` is pending, and at most one of a key is held: a second
        pending one is not stored again. `priority` 0 to 9, the highest first; oldest first within one."""
        ...

    async def rpc_send(self, recipient: str, body: bytes, *, timeout_s: float = RPC_TIMEOUT_S) -> bytes: ...

    async def broadcast_send(self, body: bytes, *, sender: str | None = None, subject: str | None = None) -> None: ...

    async def add_task_subscriber(
        self, handler: TaskHandler, *, queue: str = DEFAULT_QUEUE, credit: int = 1
    ) -> Subscription: ...

    async def add_rpc_subscriber(self, handler: RpcHandler, identifier: str) -> Subscription:
        """Answer questions to `identifier`; `DuplicateSubscriberError` if another session does."""
        ...

    async def add_broadcast_subscriber(
        self, handler: BroadcastHandler, *, sender: str | None = None, subject: str | None = None
    ) -> Subscription:
        """`sender` and `subject` are patterns in which ``*`` stands for any run of characters; None matches all."""
        ...

    async def call(self, requests: Sequence[bytes], *, acks: Sequence[IncomingTask] = ()) -> list[bytes]:
        """The service's answers, after the commit that holds all of them and the acknowledgements. If the service
        refuses one, nothing is done (the tasks stay held) and its error is raised."""
        ...

    def on_reconnect(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` in this loop each time the connection is up again (what is broadcast meanwhile is missed).
        Returns the function that takes it back."""
        ...

    async def close(self) -> None:
        """Leave: subscriptions end, tasks in hand are given back. Idempotent."""
        ...
