"""A broker's numbers in the text format of Prometheus.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/. Times are in seconds, sizes in bytes; what
ends in ``_total`` counts from the start of the broker (`prunus_broker_uptime_seconds`).

Labels are names that people gave, and a few words: a series for each program that ever connected would be too many for
Prometheus (https://prometheus.io/docs/practices/naming/#labels). So sessions that have the same name without its random
part (`peer`), role and key are counted together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Literal

from prunus.messaging.inventory import QueueStatistics, SessionStatistics
from prunus.runtime.backend import BrokerStatus
from prunus.runtime.display import peer

Labels = dict[str, str]
Sample = tuple[Labels, float | None]
Kind = Literal["gauge", "counter"]


def as_prometheus(status: BrokerStatus) -> str:
    """All metrics of a broker; what is not known (no oldest task, no limit) is left out."""
    return "".join(line for family in _families(status) for line in _lines(*family))


def _families(status: BrokerStatus) -> Iterator[tuple[str, Kind, str, Iterable[Sample]]]:
    def one(value: float) -> list[Sample]:
        return [({}, value)]

    yield "prunus_broker_epoch", "gauge", "How often a broker was started on this database.", one(status.broker_epoch)
    yield "prunus_broker_uptime_seconds", "gauge", "Time since the broker started.", one(status.uptime_s)
    yield "prunus_broker_disk_full", "gauge", "1 if new work is refused for want of space.", one(status.disk_full)
    yield "prunus_broker_database_bytes", "gauge", "Size of the database with its log.", one(status.database_bytes)
    for name, text in _COUNTERS.items():
        yield f"prunus_broker_{name}_total", "counter", text, one(getattr(status, name))
    for name, text in _GAUGES.items():
        yield f"prunus_broker_{name}", "gauge", text, one(getattr(status, name))
    for name, text in _QUEUE_GAUGES.items():
        yield f"prunus_queue_{name}", "gauge", text, _of_queues(status, attrgetter(name))
    oldest = _of_queues(status, attrgetter("oldest_s"))
    yield "prunus_queue_oldest_seconds", "gauge", "Age of the oldest ready task.", oldest
    longest = _of_queues(status, attrgetter("longest_held_s"))
    yield "prunus_queue_longest_held_seconds", "gauge", "Time for which a session has worked on one task.", longest
    for name, text in _QUEUE_COUNTERS.items():
        yield f"prunus_queue_{name}_total", "counter", text, _of_queues(status, attrgetter(name))
    for name, text in _LIMITS.items():
        yield f"prunus_queue_limit_{name}", "gauge", text, _of_queues(status, attrgetter(f"limits.{name}"))
    bursts = _of_queues(status, lambda queue: None if queue.limits.rate_per_s is None else queue.limits.burst)
    yield "prunus_queue_limit_burst", "gauge", "Deliveries at once after a quiet time.", bursts
    for name, text in _RESOURCE_GAUGES.items():
        resources = sorted(status.resources.items())
        samples: list[Sample] = [({"resource": key}, getattr(resource, name)) for key, resource in resources]
        yield f"prunus_resource_{name}", "gauge", text, samples
    yield (
        "prunus_sessions",
        "gauge",
        "Known sessions.",
        [
            ({"role": role, "connected": "true" if connected else "false"}, count)
            for (role, connected), count in sorted(_count_sessions(status).items())
        ],
    )
    namesakes = _by_name(status)
    for name, (field, text) in _SESSION_SUMS.items():
        yield f"prunus_session_{name}", "gauge", text, _of_sessions(namesakes, field, sum)
    for name, (field, text) in _SESSION_MAXIMA.items():
        yield f"prunus_session_{name}", "gauge", text, _of_sessions(namesakes, field, max)
    yield (
        "prunus_processes",
        "gauge",
        "Processes by state.",
        [({"state": state}, count) for state, count in status.processes.items()],
    )


_COUNTERS = {
    "accepted": "Tasks accepted.",
    "delivered": "Deliveries of tasks.",
    "settled": "Tasks done with.",
    "frames": "Frames received.",
    "commits": "Commits.",
    "calls": "Calls to the service behind the broker.",
    "protocol_errors": "Frames that were no message.",
    "refused_connections": "Connections and sessions refused: an unknown key, another user, nonsense, too many.",
    "not_permitted": "Messages that the role of their key does not allow.",
    "broadcasts_missed": "Broadcasts dropped because their receiver was too slow.",
}
_GAUGES = {
    "questions": "Questions not answered yet.",
    "identifiers": "Names that answer questions.",
    "broadcast_subscriptions": "Subscriptions to broadcasts.",
    "left_out": "Queues, resources and sessions that are not here, because they are too many.",
    "answers_kept": "Answers kept until their receiver has seen them.",
}
_QUEUE_GAUGES = {
    "ready": "Tasks that can be given to a subscriber.",
    "delayed": "Tasks before their time.",
    "blocked": "Tasks behind another one with their key.",
    "held": "Tasks that a session works on.",
    "dead": "Dead letters.",
    "credit": "Free places of subscribers.",
    "subscribers": "Subscribers.",
}
_QUEUE_COUNTERS = {
    "accepted": "Tasks accepted into the queue.",
    "settled": "Tasks of the queue done with.",
    "rejected": "Tasks given back by subscribers.",
}
_LIMITS = {
    "concurrency": "Tasks that may be held at once.",
    "rate_per_s": "Deliveries per second, in the long run.",
    "max_length": "Tasks that the queue may have.",
}
_RESOURCE_GAUGES = {
    "capacity": "Tokens that there are.",
    "taken": "Tokens taken by held tasks.",
    "waiting": "Ready tasks that wait for the resource.",
}


_SESSION_SUMS = {
    "held": ("held", "Tasks that the sessions of this name work on."),
    "credit": ("credit", "Free places of their subscriptions."),
    "subscriptions": (
        "subscriptions",
        "Their subscriptions to queues and broadcasts, and the names under which they answer.",
    ),
    "questions": ("questions", "Questions that they wait for."),
}
_SESSION_MAXIMA = {
    "silent_seconds": ("silent_s", "Time since a session of this name was heard last; the longest."),
    "round_trip_seconds": ("round_trip_s", "How long a message took to a session of this name and back; the longest."),
}


def _by_name(status: BrokerStatus) -> list[tuple[Labels, list[SessionStatistics]]]:
    """The sessions without the random parts of their names."""
    found: dict[tuple[str, str, str], list[SessionStatistics]] = {}
    for name, session in status.sessions.items():
        found.setdefault((peer(name), session.role, session.key or ""), []).append(session)
    return [({"session": name, "role": role, "key": key}, found[name, role, key]) for name, role, key in sorted(found)]


def _of_sessions(
    namesakes: list[tuple[Labels, list[SessionStatistics]]], field: str, together: Callable[[list[float]], float]
) -> list[Sample]:
    samples: list[Sample] = []
    for labels, sessions in namesakes:
        known = [value for session in sessions if (value := getattr(session, field)) is not None]
        samples.append((labels, together(known) if known else None))
    return samples


def _of_queues(status: BrokerStatus, read: Callable[[QueueStatistics], float | None]) -> list[Sample]:
    return [({"queue": name}, read(queue)) for name, queue in sorted(status.queues.items())]


def _count_sessions(status: BrokerStatus) -> dict[tuple[str, bool], int]:
    counts: dict[tuple[str, bool], int] = {}
    for session in status.sessions.values():
        key = session.role, session.connected
        counts[key] = counts.get(key, 0) + 1
    return counts


def _lines(name: str, kind: Kind, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    known = [(labels, value) for labels, value in samples if value is not None]
    if not known:
        return
    yield f"# HELP {name} {_escaped(text)}\n"
    yield f"# TYPE {name} {kind}\n"
    for labels, value in known:
        inner = ",".join(f'{key}="{_escaped(label, quoted=True)}"' for key, label in labels.items())
        yield f"{name}{{{inner}}} {_shown(value)}\n" if inner else f"{name} {_shown(value)}\n"


def _escaped(text: str, *, quoted: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quoted else text


def _shown(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value) if isinstance(value, float) else str(int(value))
