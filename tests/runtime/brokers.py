"""A broker's statistics, made up."""

from __future__ import annotations

from typing import Any

from prunus.messaging.inventory import (
    QueueLimits,
    QueueStatistics,
    ResourceStatistics,
    SessionStatistics,
    TaskInfo,
)
from prunus.runtime.backend import BrokerStatus

HERE = "6f9619ff/pid:[1]"
NOW = 1_000_000.0


def session(**facts: Any) -> SessionStatistics:
    given: dict[str, Any] = {
        "connected": True,
        "host": HERE,
        "pid": 4711,
        "role": "owner",
        "key": None,
        "silent_s": 0.3,
        "round_trip_s": 0.0012,
        "held": 0,
        "credit": 0,
        "subscriptions": 0,
        "questions": 0,
    }
    return SessionStatistics(**given | facts)


def task(**facts: Any) -> TaskInfo:
    given: dict[str, Any] = {
        "id": "t-1",
        "queue": "render",
        "key": None,
        "subject": None,
        "priority": 0,
        "place": "ready",
        "order": 1,
        "attempt": 0,
        "max_attempts": 0,
        "size": 1500,
        "sent_at": NOW - 90,
    }
    return TaskInfo(**given | facts)


def status(**facts: Any) -> BrokerStatus:
    """Two queues, a resource, three sessions."""
    given: dict[str, Any] = {
        "broker_epoch": 7,
        "uptime_s": 3700.0,
        "queues": {
            "render": QueueStatistics(
                ready=1200,
                delayed=3,
                blocked=2,
                held=4,
                dead=5,
                credit=6,
                subscribers=2,
                accepted=2000,
                settled=700,
                rejected=9,
                accepted_per_s=12.34,
                settled_per_s=5.0,
                oldest_s=75.0,
                longest_held_s=7200.0,
                limits=QueueLimits(concurrency=8, rate_per_s=2.5, burst=3, max_length=10_000),
            ),
            "mail": QueueStatistics(ready=1),
        },
        "resources": {"gpu": ResourceStatistics(capacity=2, taken=1, waiting=17)},
        "sessions": {
            f"controller-{'0' * 32}": session(),
            f"worker-1-{'1' * 32}": session(held=4, credit=6, pid=4712),
            f"laptop-{'2' * 32}": session(
                connected=False, host="deadbeef-0000", role="viewer", key="anna", silent_s=14.0, round_trip_s=None
            ),
        },
        "questions": 2,
        "identifiers": 3,
        "broadcast_subscriptions": 4,
        "answers_kept": 5,
        "accepted": 2001,
        "settled": 700,
        "delivered": 710,
        "frames": 9000,
        "commits": 800,
        "calls": 70,
        "database_bytes": 12_345_678,
        "pid": 99,
        "processes": {"running": 2, "finished": 1000},
    }
    return BrokerStatus(**given | facts)
