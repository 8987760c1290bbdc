"""What a broker has in hand, as data: tasks, queues, resources, sessions. For people, for metrics and for tests.

All of it is a view: nothing is decided by it. Times in seconds; wall-clock times since 1970.

Statistics fit into one message, also as JSON: the bounds of queues, resources and sessions see to that. If a broker has
more all the same (it takes over whatever was stored), the least important entries are left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, TypeVar

import msgspec

MAX_LISTED = 1000
"""Tasks in one answer to a question for tasks."""

MAX_STATISTICS_BYTES = 16 * 1024 * 1024
"""Statistics as JSON are not longer; with what a broker adds to them they fit into a message."""
MAX_BURST = 2_000_000
"""As many as all tasks that there may be."""
MAX_HOST_CHARS = 64
"""Of the name of a host. What `liveness` says has less."""

TaskPlace = Literal["ready", "delayed", "blocked", "held", "dead", "settled"]
"""Where a task is.

===========  =====================================================================================
ready        to be given to the next subscriber with room; it may wait for a limit or a resource
delayed      before its time, or rejected a moment ago
blocked      another task with its key is held
held         a session works on it
dead         a dead letter: expired, out of attempts, or buried by hand; it stays until it is requeued or deleted
settled      done; somebody has not yet fetched its result
===========  =====================================================================================
"""


_Entry = TypeVar("_Entry")


class QueueLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a queue is allowed; None: no limit of its own."""

    concurrency: int | None = None
    """Tasks that may be held at once, by all sessions together."""
    rate_per_s: float | None = None
    """Deliveries in a second, in the long run."""
    burst: int = 1
    """Deliveries at once after a quiet time (with `rate_per_s`)."""
    max_length: int | None = None
    """Tasks that are not dead or settled; more are refused with `BusyError`."""

    def what_is_wrong(self) -> str | None:
        """Why they make no sense; None if they do."""
        for name, value in (("concurrency", self.concurrency), ("max_length", self.max_length)):
            if value is not None and value < 0:
                return f"{name} is {value}; it must be 0 or more"
        if self.rate_per_s is not None and not 0 < self.rate_per_s < math.inf:
            return f"rate_per_s is {self.rate_per_s}; it must be more than 0 (concurrency=0 stops a queue)"
        if not 1 <= self.burst <= MAX_BURST:
            return f"burst is {self.burst}; it must be from 1 to {MAX_BURST:,}"
        return None


class TaskInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A task, as it is seen from outside."""

    id: str
    queue: str
    key: str | None
    subject: str | None
    priority: int
    place: TaskPlace
    order: int
    """Rises with each accepted task."""
    attempt: int
    """How often it was delivered."""
    max_attempts: int
    size: int
    """Bytes of its body."""
    sent_at: float
    """Wall-clock time."""
    due_at: float | None = None
    """Of a delayed task: the wall-clock time at which it becomes ready."""
    expires_at: float | None = None
    holder: str | None = None
    """The session that holds it ..."""
    held_s: float | None = None
    """... and for how long; after a restart of the broker counted from there."""
    resources: dict[str, int] = {}
    reason: str | None = None
    """Why it is dead, or was rejected last."""
    body: bytes | None = None
    """If it was asked for, and is no blob."""
    blob: str | None = None
    """The digest of the blob that is its body."""


class QueueStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A queue, now and since the broker started."""

    ready: int = 0
    delayed: int = 0
    blocked: int = 0
    held: int = 0
    dead: int = 0
    credit: int = 0
    """Free places of its connected subscribers."""
    subscribers: int = 0
    accepted: int = 0
    settled: int = 0
    rejected: int = 0
    accepted_per_s: float = 0.0
    """Over the last minute, as `settled_per_s`."""
    settled_per_s: float = 0.0
    oldest_s: float | None = None
    """The age of the oldest ready task."""
    limits: QueueLimits = QueueLimits()
    longest_held_s: float | None = None
    """For how long a session has worked on the task that is held longest; after a restart of the broker counted from
    there."""


class ResourceStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that tasks take while they are held."""

    capacity: int | None
    taken: int
    waiting: int
    """Ready tasks that wait for it."""


class SessionStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A client."""

    connected: bool
    host: str
    pid: int
    role: str
    """viewer, controller, worker or owner (see `access`)."""
    key: str | None
    """The name of the key with which it came; None: over the socket of this user on this host."""
    silent_s: float
    """Since it was heard last."""
    round_trip_s: float | None
    held: int
    credit: int
    subscriptions: int
    questions: int


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """A broker."""

    broker_epoch: int
    """How often it was started on this database."""
    uptime_s: float
    queues: dict[str, QueueStatistics]
    resources: dict[str, ResourceStatistics]
    sessions: dict[str, SessionStatistics]
    questions: int
    identifiers: int
    broadcast_subscriptions: int
    answers_kept: int
    accepted: int
    settled: int
    delivered: int
    """Since the start, as the rest of the counts."""
    frames: int = 0
    commits: int = 0
    calls: int = 0
    protocol_errors: int = 0
    refused_connections: int = 0
    """Connections with an unknown or revoked key, connections over the bound, and sessions that were refused."""
    broadcasts_missed: int = 0
    database_bytes: int = 0
    not_permitted: int = 0
    """Messages that the role of their key does not allow."""
    left_out: int = 0
    """Queues, resources and sessions for which there is no room in `MAX_STATISTICS_BYTES`."""


def shown_host(host: str) -> str:
    """The name of a host as statistics say it: one that is too long or not plain is cut, or empty."""
    host = host[:MAX_HOST_CHARS]
    return host if host.isascii() and host.isprintable() else ""


def fitting(statistics: Statistics, max_bytes: int = MAX_STATISTICS_BYTES) -> Statistics:
    """As much of it as fits into `max_bytes` of JSON: sessions first, then resources that are configured, then queues
    with something in them, the fullest first, and at last what is empty."""
    if len(msgspec.json.encode(statistics)) <= max_bytes:
        return statistics
    sessions: dict[str, SessionStatistics] = {}
    resources: dict[str, ResourceStatistics] = {}
    queues: dict[str, QueueStatistics] = {}
    rest = msgspec.structs.replace(statistics, queues=queues, resources=resources, sessions=sessions, left_out=2**60)
    left_out, room = 0, max_bytes - len(msgspec.json.encode(rest))

    def take(kept: dict[str, _Entry], entries: Iterable[tuple[str, _Entry]]) -> None:
        nonlocal left_out, room
        for name, entry in entries:
            size = len(msgspec.json.encode({name: entry}))  # its braces are as long as a comma, and more
            if size <= room:
                kept[name] = entry
                room -= size
            else:
                left_out += 1

    by_weight = sorted(statistics.queues.items(), key=lambda item: -_weight(item[1]))
    full = [item for item in by_weight if _weight(item[1])]
    take(sessions, statistics.sessions.items())
    take(resources, (item for item in statistics.resources.items() if item[1].capacity is not None))
    take(queues, full)
    take(resources, (item for item in statistics.resources.items() if item[1].capacity is None))
    take(queues, by_weight[len(full) :])
    return msgspec.structs.replace(rest, left_out=left_out)


def _weight(queue: QueueStatistics) -> int:
    """How much there is in it."""
    tasks = queue.ready + queue.delayed + queue.blocked + queue.held + queue.dead
    return tasks + queue.subscribers + (queue.limits != QueueLimits())
