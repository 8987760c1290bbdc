"""When a worker has nothing left to do: what ``prunus worker --until-idle`` waits for.

Idle means that in the queues of the worker no process is ready or in hand, be it in those of another worker, and that
nobody is called to read a letter. The broker knows, and tells it as of one moment: a process that ends and the parent
that it wakes change places in one commit, so there is no moment between them. What waits for a time, a message, a
person, or for something that waits itself, is not waited for. Neither is what nobody could take: a queue whose
concurrency is 0, and a task that is put off for longer than `SOON_S` and than the worker is ready to wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from prunus.errors import MessagingError
from prunus.messaging.communicator import Communicator
from prunus.messaging.inventory import MAX_LISTED, QueueStatistics, Statistics
from prunus.messaging.queues import MAX_BACK_OFF_S

IDLE_GRACE_S = 1.0
"""Idleness counts if it lasts so long, if nothing else is said."""
SOON_S = 1.2 * MAX_BACK_OFF_S
"""A task that a worker rejected is offered again sooner than this: it is work."""
LOOK_INTERVAL_S = 0.25
"""How often the broker is asked, while this worker has nothing in hand."""

logger = logging.getLogger(__name__)


def busy_queues(statistics: Statistics, queues: Sequence[str]) -> list[str]:
    """Those of `queues` in which somebody works, or could."""
    found = ((name, statistics.queues.get(name, QueueStatistics())) for name in queues)
    return [name for name, queue in found if queue.held or (queue.limits.concurrency != 0 and _pending(queue))]


def _pending(queue: QueueStatistics) -> int:
    return queue.ready + queue.blocked + queue.delayed


async def until_idle(
    communicator: Communicator,
    queues: Sequence[str],
    grace_s: float = IDLE_GRACE_S,
    *,
    has_work: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until these queues are idle for `grace_s`. While `has_work` the broker is not asked."""
    idle_since: float | None = None
    while idle_since is None or time.monotonic() - idle_since < grace_s:
        if has_work() or not await _is_idle(communicator, queues, grace_s):
            idle_since = None
        elif idle_since is None:
            idle_since = time.monotonic()
            if grace_s <= 0:
                return
        await asyncio.sleep(LOOK_INTERVAL_S if idle_since is None else min(LOOK_INTERVAL_S, grace_s))


async def _is_idle(communicator: Communicator, queues: Sequence[str], grace_s: float) -> bool:
    try:
        statistics = await communicator.statistics()
        for name in busy_queues(statistics, queues):
            queue = statistics.queues[name]
            if queue.delayed != _pending(queue) + queue.held or queue.delayed > MAX_LISTED:
                return False
            # Only what is put off: it is work if it comes back soon.
            delayed = await communicator.tasks(name, place="delayed", limit=MAX_LISTED)
            soon = time.time() + max(grace_s, SOON_S)
            if any(task.due_at is None or task.due_at <= soon for task in delayed) or len(delayed) != queue.delayed:
                return False
    except MessagingError as error:
        logger.info("the broker does not say whether there is work: %s", error)
        return False
    return True
