"""Which task is next, and for whom: queues, keys, priorities, delays, limits, tokens, dead letters. No I/O, no clock.

A task knows everything but its body, which stays with whoever stores it. `BrokerCore` says what happened; what follows
for sessions is told by effects, what must be stored is collected until `take_changes`.

Rules
- A task is pending (ready, delayed or blocked), held by one session under an epoch that rises with every delivery,
  dead, or settled. Only the holder under the current epoch can settle it.
- It is given only against free credit of a subscription whose pattern matches its subject, within the limits of its
  queue and the tokens that it needs: highest priority first, of one priority the deepest, of these the oldest, to the
  subscription with the most free credit. Shared subscriptions of a session have one credit: what it holds by any of
  them takes room in all. A task that comes back keeps its place in that order.
- A session gets no more than it can say of itself after a reconnection (`MAX_HELD_BYTES`), whatever its credit, and of
  bodies no more at a time than can be on their way to it (`MAX_GIVEN_BYTES`): the rest when it has read them.
- Tokens of which nobody says how many there are can't be taken: what needs them waits until somebody does.
- **Keys**: at most one task of a (queue, key) is pending, at most one of a key is held. A pending one whose key is held
  waits for the holder. A held one that comes back while its equal is pending is merged into that one, which then
  expires when the last of both would have. A dead one has no key any more.
- A task that nobody wants now stands in nobody's way. Ready tasks with the same subject and the same needs form a
  **lane**; an **outlet** (the subscriptions of a queue with one pattern) sees the heads of its lanes only; and it is
  looked at again only when something changed for it: credit, a head, tokens, a limit, time. So what a delivery costs
  does not depend on how many tasks wait.
"""

from __future__ import annotations

import bisect
import copy
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from operator import attrgetter

import msgspec

from prunus.errors import (
    BusyError,
    DeadLetterError,
    IndeterminateError,
    ProtocolError,
    PrunusError,
    TaskDeletedError,
    UnknownResourceError,
)
from prunus.messaging.inventory import QueueLimits, QueueStatistics, ResourceStatistics, TaskInfo, TaskPlace
from prunus.messaging.messages import (
    MAX_HELD_BYTES,
    MAX_PRIORITY,
    BrokerMessage,
    Outcome,
    TaskResult,
    bytes_in_hello,
    encode,
    outcome_of,
)
from prunus.messaging.patterns import matcher

BACK_OFF_S = 0.05
"""A task that was rejected is offered again after this, doubled with each attempt ..."""
MAX_BACK_OFF_S = 5.0
"""... up to this."""
MAX_TASKS = 2_000_000
"""More are refused with `BusyError`."""
MAX_LANES = 100_000
"""Different subjects (with different needs) that wait in one queue; more are refused with `BusyError`."""
MAX_NEEDS = 256
"""Different sets of tokens that tasks of one queue ask for; more are refused with `BusyError`."""
MAX_RESOURCES = 1_000
"""Resources that can be configured."""
MAX_RESOURCE_NAMES_BYTES = 512 * 1024
"""Of all their names together, as JSON says them. With the bounds of queues and sessions this is what makes statistics
fit into a message (`inventory.MAX_STATISTICS_BYTES`)."""
MAX_QUEUES = 10_000
"""Whoever wants one more gets `BusyError`. The broker's own tasks and what was stored get theirs in any case."""
MAX_QUEUE_NAMES_BYTES = 2 * 1024 * 1024
"""Of all their names together, as JSON says them; what would be more is refused with `BusyError`."""
MAX_CONFIGURED_QUEUES = 10_000
"""Queues that can have limits."""
MAX_IDLE_LANES = 64
"""Empty lanes of a queue that are kept for the next task."""
MAX_IDLE_QUEUES = 1_000
"""Queues without tasks, subscribers and limits whose counts are kept. With `MAX_QUEUES` all of them make room."""
MAX_DEPTH = 255
"""A task that is deeper counts as if it were so deep."""
MAX_REASON_CHARS = 2_000
"""Of the reason of a rejected or dead task so much is kept."""
MAX_GIVEN_BYTES = 8 * 1024 * 1024
"""A session to which so much was given gets no more until somebody says that it reads (`TaskQueues.go_on`)."""
FRAME_COST_BYTES = 4 * 1024
"""What a message counts besides what it carries, so that not too many small ones are on their way either."""
RATE_WINDOW_S = 60.0
"""Over this time the rates of a queue are told."""
RATE_STEP_S = 5.0
"""How often they are measured."""

BURIED = "it was buried by hand"
EXPIRED = "it expired before anybody took it"
REPLACED = "replaced by a later task with its key"
DELETED = "deleted by hand"

Needs = tuple[tuple[str, int], ...]
"""(resource, tokens), by name."""
_PENDING = ("ready", "delayed", "blocked")
_OVER = ("", "settled", "dead")


class Hold(msgspec.Struct, frozen=True, gc=False):
    """Who holds a task."""

    session: str
    pattern: str | None
    """The subject pattern of the subscription whose credit it takes."""
    epoch: int
    since: float
    """Monotonic time."""


class Task(msgspec.Struct, order=True, gc=False):
    """A task that was accepted. The first three fields are its rank: what is less goes first."""

    urgency: int
    """Of its priority and its depth (see `urgency_of`); 0 is the most urgent."""
    order: int
    """Rises with each accepted task; one that replaces another takes over that one's."""
    number: int
    """Under which it is stored; never used again."""
    id: str
    queue: str
    key: str | None
    subject: str | None
    size: int
    """Bytes of its body; if it is settled, of its outcome."""
    sent_at: float
    """Wall-clock time, as `not_before` and `expires_at` (0: none)."""
    needs: Needs = ()
    not_before: float = 0.0
    """Of a dead letter: when it died; of a held task: when it was given to its holder."""
    expires_at: float = 0.0
    max_attempts: int = 0
    attempt: int = 0
    place: TaskPlace | str = ""
    """Empty: it is not there yet, or no more."""
    hold: Hold | None = None
    waiters: tuple[str, ...] = ()
    """Sessions that wait for its result."""
    outcome: bytes | None = None
    """The frame of its `TaskResult` if it was settled in this batch, and somebody waits for it; then it is stored."""
    reason: str | None = None
    retry_at: float = 0.0
    """Monotonic time at which it is offered again after it was rejected."""
    is_stored: bool = False
    """There is a row of it."""
    is_changed: bool = False
    """It is among the changes that are to be stored."""
    blob: str | None = None
    """The digest of the blob that is its body."""


# --- effects ----------------------------------------------------------------------------------------


class Keep(msgspec.Struct, frozen=True):
    """The body of a new task, which has to be stored with it."""

    number: int
    body: bytes


class Deliver(msgspec.Struct, frozen=True):
    """Send the task with its body to its holder, after the commit."""

    task: Task


class Send(msgspec.Struct, frozen=True):
    """Send after the commit. To a session without a connection it is dropped: all is said again after its `Hello`."""

    session: str
    message: BrokerMessage | bytes


TaskEffect = Keep | Deliver | Send


# --- the queues -------------------------------------------------------------------------------------


class TaskQueues:
    """See the module. Sessions are known by `join`; every effect goes to `emit`."""

    def __init__(self, broker_epoch: int, now: float, emit: Callable[[TaskEffect], None]) -> None:
        self.now = now
        self.wall = 0.0
        """Wall-clock time: for `not_before` and `expires_at`, and for showing."""
        self.hold_back = False
        """No task is delivered: whoever got one now could do nothing with it."""
        self.accepted = self.settled = self.delivered = 0
        """Counts since the start."""
        self._broker_epoch = broker_epoch
        self._emit = emit
        self._numbers = 0
        self._tasks: dict[str, Task] = {}
        self._changes: list[Task] = []
        self._queues: dict[str, _Queue] = {}
        self._queue_names_bytes = 0
        self._looked_for_idle_at = -math.inf
        """The `now` at which idle queues made room: looking at all queues for each of many refused tasks takes time."""
        self._awake: dict[str, _Queue] = {}
        self._members: dict[str, _Member] = {}
        self._waits: dict[str, dict[str, Task]] = {}
        """By session, the tasks whose result it waits for: also of one that is gone, until `forget_waits`."""
        self.to_read: dict[str, None] = {}
        """Sessions to which as much was given as can be on its way."""
        self._held_keys: dict[str, Task] = {}
        self._blocked: dict[str, list[Task]] = {}
        self._resources: dict[str, _Resource] = {}
        self._rejected = _Timers(lambda at, task: task.place == "delayed" and task.retry_at == at)
        self._scheduled = _Timers(lambda at, task: task.place == "delayed" and not task.retry_at)
        self._expiring = _Timers(lambda at, task: task.expires_at == at and task.place not in ("", "dead", "settled"))
        self._throttled: dict[str, float] = {}
        """When the next delivery of a queue is within its rate."""
        self._measured_at = now
        self._serials = 0

    # --- sessions ---

    def join(self, session: str) -> None:
        """A session is known; it is away until `connect`."""
        self._members[session] = _Member(session)

    def connect(self, session: str) -> None:
        """It can be given tasks."""
        member = self._members[session]
        self.to_read.pop(session, None)
        was_away = not member.connected or member.must_read
        member.connected, member.given_bytes = True, 0
        if was_away:
            self._credit_changed(member)

    def go_on(self, session: str) -> None:
        """It has read what was given to it, or most of that, and can be given more."""
        if session in self.to_read:
            self.connect(session)

    def disconnect(self, session: str) -> None:
        """Nothing is given to it until `connect`."""
        self._members[session].connected = False
        self.to_read.pop(session, None)

    def leave(self, session: str, *, lost: bool = True) -> None:
        """It is gone: what it held is offered to others, with an attempt less. It still waits for its results. Not
        `lost`: it said goodbye."""
        member = self._members.pop(session)
        self.to_read.pop(session, None)
        member.connected = False
        for task in list(member.held.values()):
            self._come_back(task, member, reason=None, tried=True, ending="was lost" if lost else "left it undone")
        for subscriber in member.subscribers.values():
            self._drop_subscriber(subscriber)

    def subscribe(self, session: str, queue: str, pattern: str | None, credit: int, *, shared: bool = False) -> None:
        """From now on it holds at most `credit` tasks for this subscription; `shared`: for all of its shared ones.

        The queue is made if it is not there: `check_queues` says whether it should be."""
        member = self._members[session]
        subscriber = member.subscribers.get((queue, pattern))
        if subscriber is None:
            outlet = self._outlet(self._queue(queue), pattern)
            subscriber = member.subscribers[outlet.queue.name, pattern] = _Subscriber(member, outlet, self._serial())
            subscriber.busy = sum(
                task.hold is not None and task.hold.pattern == pattern
                for task in member.held.values()
                if task.queue == queue
            )
            outlet.subscribers[session] = subscriber
        subscriber.credit = credit
        if shared or subscriber.shared:
            subscriber.shared = shared
            member.count_shared()
            self._credit_changed(member)
        else:
            self._has_room(subscriber)

    def unsubscribe(self, session: str, queue: str, pattern: str | None) -> None:
        member = self._members[session]
        subscriber = member.subscribers.pop((queue, pattern), None)
        if subscriber is not None:
            self._drop_subscriber(subscriber)
            if subscriber.shared:
                member.count_shared()
                self._credit_changed(member)

    def subscriptions(self, session: str) -> list[tuple[str, str | None]]:
        """(queue, pattern) of each."""
        return list(self._members[session].subscribers)

    def held_by(self, session: str) -> Mapping[str, Task]:
        return self._members[session].held

    def awaited_by(self, session: str) -> Mapping[str, Task]:
        """The tasks whose result it waits for; those that are over have a result to `tell`."""
        return self._waits.get(session, {})

    def waiting(self) -> AbstractSet[str]:
        """Those who wait for results."""
        return self._waits.keys()

    def forget_waits(self, session: str) -> None:
        """It waits for nothing any more."""
        for task in list(self.awaited_by(session).values()):
            self._forget_waiter(task, session)

    # --- the life of a task ---

    def get(self, task: str) -> Task | None:
        return self._tasks.get(task)

    def pending(self, queue: str, key: str | None) -> Task | None:
        """The pending task with this key."""
        found = self._queues.get(queue)
        return found.keys.get(key) if found is not None and key is not None else None

    def has_key(self, key: str) -> bool:
        """Whether a task with this key is pending or held."""
        return key in self._held_keys or any(key in queue.keys for queue in self._queues.values())

    def pending_with(self, key: str) -> list[Task]:
        """The pending tasks with this key, of all queues."""
        return [queue.keys[key] for queue in self._queues.values() if key in queue.keys]

    def is_served(self, queue: str) -> bool:
        """Whether anybody subscribes to this queue; they may be away for the moment, or have no room."""
        return queue in self._queues and bool(self._queues[queue].outlets)

    def pending_keys(self) -> Iterator[tuple[str, Task]]:
        """The keys of pending tasks, and these."""
        for queue in self._queues.values():
            yield from queue.keys.items()

    def check_room(self, queue: str, subject: str | None, needs: Needs, *, new: bool) -> None:
        """Raise `BusyError` or `UnknownResourceError` if a task can't be accepted. `new`: it replaces no other."""
        self.check_needs(needs)
        if len(self._tasks) >= MAX_TASKS:
            raise BusyError(f"the broker has {MAX_TASKS:,} tasks already; try again when some are done")
        found = self._queues.get(queue)
        if found is None:
            self.check_queues((queue,))
            return
        limit = found.limits.max_length
        if new and limit is not None and found.length() >= limit:
            raise BusyError(f"the queue {queue!r} has {limit:,} tasks, which is its limit; try again later")
        if (
            len(found.lanes) >= MAX_LANES
            and not any((subject, needs, urgency_of(each)) in found.lanes for each in range(MAX_PRIORITY + 1))
            and not self._drop_idle_lanes(found)
        ):
            raise BusyError(f"tasks with {MAX_LANES:,} different subjects wait in the queue {queue!r}; try again later")
        if needs not in found.needs and len(found.needs) >= MAX_NEEDS and not self._drop_idle_lanes(found):
            raise BusyError(f"tasks of the queue {queue!r} need {MAX_NEEDS:,} different sets of resources already")

    def check_queues(self, names: Iterable[str]) -> None:
        """Raise `BusyError` if those of `names` that are not there would be too many queues. Idle ones make room."""
        wanted = dict.fromkeys(names)
        if self._has_room_for_queues(wanted):
            return
        if self._looked_for_idle_at < self.now:
            self._looked_for_idle_at = self.now
            for name in self._idle_queues():
                self._drop_queue(name)
            if self._has_room_for_queues(wanted):
                return
        new = next(name for name in wanted if name not in self._queues)
        raise BusyError(
            f"the queue {new!r:.100} would be too many: the broker has {len(self._queues):,} (up to {MAX_QUEUES:,}), "
            f"with {self._queue_names_bytes:,} bytes of names (up to {MAX_QUEUE_NAMES_BYTES:,}); "
            "use one of these, or try again when some have no tasks, subscribers and limits any more"
        )

    def check_needs(self, needs: Needs) -> None:
        """Raise `UnknownResourceError` if a task with these needs would wait until somebody configures a resource."""
        for name, wanted in needs:
            resource = self._resources.get(name)
            capacity = None if resource is None else resource.capacity
            if capacity is None or wanted > capacity:
                raise UnknownResourceError(name, wanted, capacity)

    def put(
        self,
        id: str,
        queue: str,
        body: bytes,
        *,
        key: str | None = None,
        priority: int = 0,
        depth: int = 0,
        subject: str | None = None,
        needs: Needs = (),
        not_before: float = 0.0,
        expires_at: float = 0.0,
        max_attempts: int = 0,
        waiter: str | None = None,
        replaced: Task | None = None,
        blob: str | None = None,
        size: int | None = None,
    ) -> Task:
        """A new task, whose body may be a blob of `size` bytes. Of one priority the deeper goes first. It takes the
        place of `replaced`, which is pending and has its key, with that one's priority and depth."""
        into = self._queue(queue)
        self._numbers += 1
        number = order = self._numbers
        urgency = urgency_of(priority, depth)
        if replaced is not None:
            urgency, order = replaced.urgency, replaced.order
            self._take_out(into, replaced)
            if replaced.waiters:  # they have yet to be told: it goes on under another order
                replaced = self._reordered(into, replaced, number)
            self._end(into, replaced, TaskDeletedError(replaced.id, REPLACED))
        lane = self._lane(into, (subject, needs, urgency))
        task = Task(
            urgency, order, number, id, into.name, key, lane.subject, len(body) if size is None else size, self.wall,
            lane.needs, not_before, expires_at, max_attempts, blob=blob,
        )  # fmt: skip
        self._tasks[id] = task
        into.add(task)
        self.accepted += 1
        into.accepted += 1
        if waiter is not None:
            self._wait(task, waiter)
        if expires_at:
            self._expiring.add(expires_at, task)
        self._emit(Keep(number, body))
        self._offer(into, task, lane)
        return task

    def wait_for(self, task: Task, session: str) -> None:
        """`session` wants to know what becomes of it."""
        if session not in task.waiters:
            self._wait(task, session)
            self._note(task)

    def forget_waiter(self, task: Task, session: str) -> None:
        """`session` has its result, or does not want it any more."""
        if session in task.waiters:
            self._forget_waiter(task, session)

    def held(self, session: str, task_id: str, epoch: int) -> Task | None:
        """The task, if `session` holds it under this epoch."""
        task = self._tasks.get(task_id)
        if task is None or task.hold is None or task.hold.epoch != epoch or task.hold.session != session:
            return None
        return task

    def settle(self, task: Task, outcome: Outcome) -> None:
        """Its holder is done with it."""
        queue = self._queues[task.queue]
        self._let_go(queue, task, self._members[task.hold.session] if task.hold else None)
        self.settled += 1
        queue.settled += 1
        self._end(queue, task, outcome)

    def reject(self, task: Task, reason: str, *, attempted: bool) -> None:
        """Its holder does not want it. It is offered again a little later; `attempted`: that counts."""
        queue = self._queues[task.queue]
        queue.rejected += 1
        self._come_back(task, None, reason=reason[:MAX_REASON_CHARS], tried=attempted, later=True)

    def come_back(self, task: Task) -> None:
        """It never reached its holder: it is offered again at once, as if it had not been given away."""
        self._come_back(task, None, reason=None, tried=False)

    def damaged(self, task: Task, reason: str) -> None:
        """Its body can't be read: its holder never gets it."""
        queue = self._queues[task.queue]
        self._let_go(queue, task, self._members[task.hold.session] if task.hold else None)
        self._bury(queue, task, reason)

    def tick(self) -> None:
        """Time went on: offer what is due, bury what expired."""
        for task in self._rejected.due(self.now):
            self._offer_again(task)
        for task in self._scheduled.due(self.wall):
            self._offer_again(task)
        for task in self._expiring.due(self.wall):
            if task.place in _PENDING:
                queue = self._queues[task.queue]
                self._take_out(queue, task)
                self._bury(queue, task, EXPIRED)
        for name, at in list(self._throttled.items()):
            if at <= self.now:
                del self._throttled[name]
                self._wake_queue(name)
        if self.now - self._measured_at >= RATE_STEP_S:
            self._measure()

    def due(self) -> float:
        """The monotonic time at which something is due, unless the wall clock is set meanwhile; infinite if nothing
        is."""
        by_wall = self.now + max(0.0, min(self._scheduled.next(), self._expiring.next()) - self.wall)
        return min(self._rejected.next(), min(self._throttled.values(), default=math.inf), by_wall)

    def dispatch(self) -> None:
        """Give out tasks as long as somebody has room."""
        if self.hold_back:
            return
        while self._awake:
            _, queue = self._awake.popitem()
            self._dispatch(queue)

    # --- for people ---

    def select(
        self,
        queue: str | None = None,
        place: TaskPlace | None = None,
        task: str | None = None,
        key: str | None = None,
        after: int = 0,
    ) -> Iterator[Task]:
        """The tasks to which all of this applies, in the order in which they were accepted."""
        queues = [one for name, one in self._queues.items() if queue in (None, name)]
        chosen: Iterable[Task]
        if task is not None:
            chosen = [self._tasks[task]] if task in self._tasks else []
        elif key is not None:
            found = [one.keys[key] for one in queues if key in one.keys]
            found += [self._held_keys[key]] if key in self._held_keys else []
            found += [over for one in queues for end in ("dead", "settled") for over in one.places[end].values()]
            chosen = sorted(found, key=_order)
        else:
            lists = [
                # A few tasks are sorted faster than they are found among all.
                one.after(after)
                if place in (None, "ready") or 4 * len(one.places[place]) > len(one.all)
                else sorted(one.places[place].values(), key=_order)
                for one in queues
            ]
            chosen = lists[0] if len(lists) == 1 else heapq.merge(*lists, key=_order)
        return (
            one
            for one in chosen
            if one.order > after
            and (queue is None or one.queue == queue)
            and (place is None or one.place == place)
            and (key is None or one.key == key)
        )

    def info(self, task: Task) -> TaskInfo:
        due_at = None
        if task.place == "delayed":
            due_at = self.wall + task.retry_at - self.now if task.retry_at else task.not_before
        return TaskInfo(
            id=task.id,
            queue=task.queue,
            key=task.key,
            subject=task.subject,
            priority=priority_of(task.urgency),
            place=task.place,  # type: ignore[arg-type]
            order=task.order,
            attempt=task.attempt,
            max_attempts=task.max_attempts,
            size=task.size,
            sent_at=task.sent_at,
            due_at=due_at,
            expires_at=task.expires_at or None,
            holder=task.hold.session if task.hold else None,
            held_s=self.now - task.hold.since if task.hold else None,
            resources=dict(task.needs),
            reason=task.reason,
            blob=task.blob,
        )

    def requeue(self, task: Task) -> bool:
        """Offer a dead or delayed task as if it were new; False if it is neither, or its key is pending meanwhile."""
        queue = self._queues[task.queue]
        if task.place == "dead":
            if task.key is not None and task.key in queue.keys:
                return False
        elif task.place == "delayed":
            self._take_out(queue, task)
        else:
            return False
        task.attempt, task.reason, task.not_before, task.expires_at, task.retry_at = 0, None, 0.0, 0.0, 0.0
        self._offer(queue, task)
        return True

    def bury(self, task: Task) -> bool:
        """Make a pending task a dead letter; False if it is none."""
        if task.place not in _PENDING:
            return False
        queue = self._queues[task.queue]
        self._take_out(queue, task)
        self._bury(queue, task, BURIED)
        return True

    def forget_dead(self, before: float, limit: int) -> int:
        """Forget dead letters that died before this wall-clock time, up to `limit`; how many."""
        dead = (task for queue in self._queues.values() for task in queue.places["dead"].values())
        old = list(itertools.islice((task for task in dead if task.not_before < before), limit))
        for task in old:
            self.delete(task)
        return len(old)

    def delete(self, task: Task) -> bool:
        """Forget a task that nobody holds; False if somebody does, or if it is over and kept for who waits for its
        result."""
        if task.place in ("held", "settled"):
            return False
        queue = self._queues[task.queue]
        if task.place in _PENDING:
            self._take_out(queue, task)
        self._end(queue, task, TaskDeletedError(task.id, DELETED))
        return True

    def configure_queue(self, name: str, limits: QueueLimits) -> None:
        """Raises `ProtocolError` for limits that make no sense, `BusyError` for too many queues.

        A change gives no deliveries away: what its rate allows at once is what it allowed before, up to the new burst.
        Only a queue that had no rate begins with all of its burst."""
        if (wrong := limits.what_is_wrong()) is not None:
            raise ProtocolError(wrong)
        if limits != QueueLimits() and len(self._queues) >= MAX_CONFIGURED_QUEUES:
            configured = self.limits()
            if name not in configured and len(configured) >= MAX_CONFIGURED_QUEUES:
                raise BusyError(f"{MAX_CONFIGURED_QUEUES:,} queues have limits already")
        self.check_queues((name,))
        queue = self._queue(name)
        tokens = math.inf if queue.limits.rate_per_s is None else queue.tokens_by(self.now)
        queue.limits = limits
        queue.tokens, queue.filled_at = min(tokens, float(limits.burst)), self.now
        self._throttled.pop(name, None)
        self._wake_queue(name)

    def configure_resource(self, name: str, capacity: int | None) -> None:
        """Raises `BusyError` for too many resources."""
        if name not in self._resources and len(self._resources) >= MAX_RESOURCES:
            raise BusyError(f"{MAX_RESOURCES:,} resources are configured already")
        if name not in self._resources and sum(map(_bytes_of, (name, *self._resources))) > MAX_RESOURCE_NAMES_BYTES:
            raise BusyError(f"the names of all resources together would be over {MAX_RESOURCE_NAMES_BYTES:,} bytes")
        resource = self._resource(name)
        resource.capacity = capacity
        self._drop_resource(name)
        self._wake_for(resource)

    def limits(self) -> dict[str, QueueLimits]:
        """Of each queue that has some."""
        return {name: queue.limits for name, queue in self._queues.items() if queue.limits != QueueLimits()}

    def queue_statistics(self) -> dict[str, QueueStatistics]:
        return {name: self._statistics_of(queue) for name, queue in self._queues.items()}

    def resource_statistics(self) -> dict[str, ResourceStatistics]:
        waiting: dict[str, int] = dict.fromkeys(self._resources, 0)
        for queue in self._queues.values():
            if any(queue.needs):
                for lane in queue.lanes.values():
                    for name, _ in lane.needs:
                        waiting[name] += lane.ready
        return {
            name: ResourceStatistics(capacity=one.capacity, taken=one.taken, waiting=waiting[name])
            for name, one in self._resources.items()
        }

    def credit_of(self, session: str) -> int:
        """The free places of its subscriptions."""
        subscribers = self._members[session].subscribers.values()
        shared = max((one.free() for one in subscribers if one.shared), default=0)
        return sum(max(0, one.free()) for one in subscribers if not one.shared) + max(0, shared)

    # --- what must be stored, and what was ---

    def take_changes(self, *, lasting: bool = False) -> list[Task]:
        """The tasks that changed since the last time. `lasting`: those only that are over; the rest stays for later."""
        changes, self._changes = self._changes, []
        if lasting:
            self._changes = [task for task in changes if task.place not in _OVER]
            changes = [task for task in changes if task.place in _OVER]
        for task in changes:
            task.is_changed = False
        return changes

    def restore(
        self, tasks: Iterable[Task], limits: Mapping[str, QueueLimits], resources: Mapping[str, int | None]
    ) -> None:
        """Go on with what was stored, after all sessions have joined."""
        for name, one in limits.items():
            queue = self._queue(name)
            queue.limits, queue.tokens = one, float(one.burst)
        for name, capacity in resources.items():
            self._resource(name).capacity = capacity
        others: list[Task] = []
        into: _Queue | None = None
        for task in tasks:
            if into is None or into.name != task.queue:
                into = self._queue(task.queue)
            task.queue, task.is_stored = into.name, True
            self._tasks[task.id] = task
            into.all.append(task)
            if task.place or task.key or task.hold or task.waiters or task.not_before or task.expires_at:
                others.append(task)
                continue
            kind = (task.subject, task.needs, task.urgency)
            lane = into.lanes.get(kind) or self._lane(into, kind)
            task.subject, task.needs, task.place = lane.subject, lane.needs, "ready"
            into.ready += 1
            lane.add(task)
        others.sort(key=_number)
        pending = [task for task in others if not self._restore_placed(self._queues[task.queue], task)]
        over = [task for task in others if task.place == "settled" and not task.waiters]
        over += [task for task in pending if not self._restore_pending(self._queues[task.queue], task)]
        for queue in self._queues.values():
            queue.places["held"] = {task.id: task for task in sorted(queue.places["held"].values(), key=_held_since)}
            queue.all.sort(key=_order)
            if queue.all:
                self._numbers = max(self._numbers, queue.all[-1].order, max(map(_number, queue.all)))
        for task in over:
            self._remove(self._queues[task.queue], task)

    def _restore_placed(self, queue: _Queue, task: Task) -> bool:
        """Whether it is held or over, and so put there."""
        for waiter in task.waiters:
            self._waits.setdefault(waiter, {})[task.id] = task
        if task.place in ("dead", "settled"):
            queue.places[task.place][task.id] = task
            return True
        if task.hold is None or task.hold.session not in self._members:
            return False
        held_s = max(0.0, self.wall - task.not_before) if task.not_before else 0.0  # (older versions did not store it)
        task.place, task.hold = "held", msgspec.structs.replace(task.hold, since=self.now - held_s)
        queue.places["held"][task.id] = task
        self._members[task.hold.session].take(task)
        if task.key is not None:
            self._held_keys[task.key] = task
        for name, tokens in task.needs:
            self._resource(name).taken += tokens
        return True

    def _restore_pending(self, queue: _Queue, task: Task) -> bool:
        """Whether it is offered: not if another one with its key is."""
        is_lost = task.hold is not None  # by a session that nobody knows any more
        if is_lost:
            task.hold, task.not_before = None, 0.0
        if task.key is not None and task.key in queue.keys:
            return False
        if task.expires_at:
            self._expiring.add(task.expires_at, task)
        task.is_changed = True  # so that it is not noted: this is what is stored
        self._offer(queue, task)
        task.is_changed = False
        if is_lost or task.place == "dead":
            self._note(task)
        return True

    # --- moving tasks ---

    def _note(self, task: Task) -> None:
        if not task.is_changed:
            task.is_changed = True
            self._changes.append(task)

    def _move(self, queue: _Queue, task: Task, place: TaskPlace | str) -> None:
        before = task.place
        if before == "ready":
            queue.ready -= 1
        elif before:
            del queue.places[before][task.id]
        task.place = place
        if place == "ready":
            queue.ready += 1
        elif place:
            queue.places[place][task.id] = task
        if not task.is_changed:
            task.is_changed = True
            self._changes.append(task)

    def _offer(self, queue: _Queue, task: Task, lane: _Lane | None = None) -> None:
        """A task is pending: find out where."""
        if task.expires_at and task.expires_at <= self.wall:
            self._bury(queue, task, EXPIRED)
            return
        if task.key is not None:
            queue.keys[task.key] = task
        if task.retry_at > self.now:
            self._move(queue, task, "delayed")
            self._rejected.add(task.retry_at, task)
        elif task.not_before > self.wall:
            task.retry_at = 0.0
            self._move(queue, task, "delayed")
            self._scheduled.add(task.not_before, task)
        else:
            task.retry_at = 0.0
            if task.key is not None and task.key in self._held_keys:
                self._block(queue, task)
            else:
                self._move(queue, task, "ready")
                if lane is None:
                    lane = self._lane(queue, (task.subject, task.needs, task.urgency))
                task.subject, task.needs = lane.subject, lane.needs
                if lane.add(task) and lane.head() is task:
                    self._announce(queue, lane, task)

    def _offer_again(self, task: Task) -> None:
        queue = self._queues[task.queue]
        if task.key is not None:
            del queue.keys[task.key]
        self._offer(queue, task)

    def _block(self, queue: _Queue, task: Task) -> None:
        assert task.key is not None, "only a task with a key can be blocked"
        self._move(queue, task, "blocked")
        self._blocked.setdefault(task.key, []).append(task)

    def _take_out(self, queue: _Queue, task: Task) -> None:
        """A pending task is offered no more."""
        if task.key is not None:
            del queue.keys[task.key]
        if task.place == "ready":
            lane = queue.lanes[task.subject, task.needs, task.urgency]
            lane.ready -= 1
            was_head = lane.head() is task
            self._move(queue, task, "")
            lane.compact()
            if was_head and (head := lane.head()) is not None:
                self._announce(queue, lane, head)
            return
        if task.place == "blocked" and task.key is not None:
            others = self._blocked[task.key]
            others[:] = [one for one in others if one is not task]
            if not others:
                del self._blocked[task.key]
        self._move(queue, task, "")

    def _let_go(self, queue: _Queue, task: Task, member: _Member | None) -> None:
        """The holder has it no more; those that waited for its key, its tokens and its place are offered."""
        assert task.hold is not None, "only a held task can be let go"
        assert member is not None, "a holder is a session that is known"
        hold, task.hold = task.hold, None
        self._move(queue, task, "")
        was_full = member.is_full
        member.give_up(task)
        subscriber = member.subscribers.get((queue.name, hold.pattern))
        if subscriber is not None:
            subscriber.busy -= 1
            if not subscriber.shared:
                self._has_room(subscriber)
        if queue.limits.concurrency is not None and queue.awake:
            self._awake[queue.name] = queue
        for name, tokens in task.needs:
            resource = self._resources[name]
            resource.taken -= tokens
            self._wake_for(resource)
        if task.key is not None:
            del self._held_keys[task.key]
            for blocked in self._blocked.pop(task.key, ()):
                self._offer_again(blocked)
        if subscriber is not None and subscriber.shared:  # at last, so that the order of its queues counts
            member.shared_busy -= 1
            self._credit_changed(member)
        elif was_full:  # all of its subscriptions have room again
            self._credit_changed(member)

    def _come_back(
        self,
        task: Task,
        member: _Member | None,
        *,
        reason: str | None,
        tried: bool,
        later: bool = False,
        ending: str = "was lost",
    ) -> None:
        """A held task is pending again, or it was its last attempt. `ending`: what its worker did, if it gave no
        reason."""
        assert task.hold is not None, "only a held task can come back"
        queue = self._queues[task.queue]
        self._let_go(queue, task, member or self._members[task.hold.session])
        task.not_before = 0.0
        if reason:
            task.reason = reason
        if not tried:
            task.attempt -= 1
        elif task.max_attempts and task.attempt >= task.max_attempts:
            self._bury(queue, task, task.reason or f"its worker {ending} {_times(task.attempt)}")
            return
        if task.key is not None and (pending := queue.keys.get(task.key)) is not None:
            # It says the same: one of them is enough.
            if not pending.max_attempts:
                pending.attempt = max(pending.attempt, task.attempt)
            if pending.expires_at and not 0.0 < task.expires_at <= pending.expires_at:  # not given up before either was
                pending.expires_at = task.expires_at
                if pending.expires_at:
                    self._expiring.add(pending.expires_at, pending)
            self._note(pending)
            self._end(queue, task, IndeterminateError(f"task {task.id}"))
            return
        if task.expires_at:  # its timer may have passed while it was held
            self._expiring.add(task.expires_at, task)
        if later:
            task.retry_at = self.now + min(BACK_OFF_S * 2 ** min(max(task.attempt - 1, 0), 20), MAX_BACK_OFF_S)
        self._offer(queue, task)

    def _bury(self, queue: _Queue, task: Task, reason: str) -> None:
        task.reason, task.not_before = reason[:MAX_REASON_CHARS], self.wall
        self._move(queue, task, "dead")
        if task.waiters:
            frame = dead_letter(task)
            for waiter in task.waiters:
                self._emit(Send(waiter, frame))

    def _end(self, queue: _Queue, task: Task, outcome: Outcome | PrunusError) -> None:
        """It is over: its result is kept for those who wait for it."""
        if not task.waiters:
            self._remove(queue, task)
            return
        result = outcome_of(outcome) if isinstance(outcome, PrunusError) else outcome
        task.outcome, task.blob = encode(TaskResult(task=task.id, outcome=result)), None
        task.size = len(task.outcome)
        self._move(queue, task, "settled")
        for waiter in task.waiters:
            self._emit(Send(waiter, task.outcome))

    def _remove(self, queue: _Queue, task: Task) -> None:
        self._move(queue, task, "")
        del self._tasks[task.id]
        queue.discard()
        for waiter in task.waiters:
            self._wait_no_more(task, waiter)

    def _reordered(self, queue: _Queue, task: Task, order: int) -> Task:
        """The same task under another order. The old object stays behind, as no task, where it is still listed."""
        twin = copy.copy(task)
        task.is_stored, twin.order, twin.is_changed = False, order, False
        self._tasks[twin.id] = twin
        for waiter in twin.waiters:
            self._waits[waiter][twin.id] = twin
        queue.discard()
        queue.add(twin)
        self._note(twin)
        return twin

    def _wait(self, task: Task, session: str) -> None:
        self._waits.setdefault(session, {})[task.id] = task
        task.waiters += (self._members[session].name,)

    def _wait_no_more(self, task: Task, session: str) -> None:
        waits = self._waits.get(session)
        if waits is not None and waits.pop(task.id, None) is not None and not waits:
            del self._waits[session]

    def _forget_waiter(self, task: Task, session: str) -> None:
        self._wait_no_more(task, session)
        task.waiters = tuple(waiter for waiter in task.waiters if waiter != session)
        if task.place == "settled" and not task.waiters:
            self._remove(self._queues[task.queue], task)
        else:
            self._note(task)

    # --- giving them out ---

    def _dispatch(self, queue: _Queue) -> None:
        moves = 0
        candidates: list[tuple[Task, int, _Outlet, _Lane, int]] = []
        """(best task, serial, outlet, its lane, after how many moves this was so)"""
        for serial, outlet in queue.awake.items():
            if (found := outlet.best(self._resources)) is not None:
                candidates.append((found[0], serial, outlet, found[1], 0))
        heapq.heapify(candidates)
        queue.awake.clear()
        while candidates:
            task, serial, outlet, lane, after = candidates[0]
            if after != moves:
                if (found := outlet.best(self._resources)) is None:
                    heapq.heappop(candidates)
                    continue
                if found[0] is not task:
                    heapq.heapreplace(candidates, (found[0], serial, outlet, found[1], moves))
                    continue
            moves += 1
            if (task.key is not None and task.key in self._held_keys) or 0 < task.expires_at <= self.wall:
                self._pass_over(queue, task)
            elif self._admit(queue):
                self._give(queue, lane, task)
            else:
                queue.awake.update((entry[1], entry[2]) for entry in candidates)
                return

    def _pass_over(self, queue: _Queue, task: Task) -> None:
        """The head of a lane can't be given to anybody: its key is held, or it expired."""
        expired = 0 < task.expires_at <= self.wall
        self._take_out(queue, task)
        if expired:
            self._bury(queue, task, EXPIRED)
        elif task.key is not None:
            queue.keys[task.key] = task
            self._block(queue, task)

    def _admit(self, queue: _Queue) -> bool:
        """Whether its limits allow a delivery now, which is then counted."""
        limits = queue.limits
        if limits.concurrency is not None and len(queue.places["held"]) >= limits.concurrency:
            return False
        if limits.rate_per_s is not None:
            queue.tokens, queue.filled_at = queue.tokens_by(self.now), self.now
            if queue.tokens < 1.0 - _TINY:
                self._throttled[queue.name] = self.now + (1.0 - queue.tokens) / limits.rate_per_s
                return False
            queue.tokens -= 1.0
        return True

    def _give(self, queue: _Queue, lane: _Lane, task: Task) -> None:
        """The head of `lane` goes to whoever has the most room; of equals to the one that was served longest ago."""
        chosen = None
        for outlet in lane.outlets:
            one = outlet.roomiest()
            if one is not None and (chosen is None or (-one.free(), one.served) < (-chosen.free(), chosen.served)):
                chosen = one
        assert chosen is not None, "an outlet offers its best only if it has room"
        member = chosen.member
        lane.ready -= 1
        self._move(queue, task, "held")
        if (head := lane.head()) is not None:
            for outlet in lane.outlets:  # none of them need be woken: those that have room are looked at now
                outlet.add_head(lane, head)
        if task.key is not None:
            del queue.keys[task.key]
            self._held_keys[task.key] = task
        for name, tokens in task.needs:
            self._resources[name].taken += tokens
        member.take(task)
        member.given_bytes += FRAME_COST_BYTES + (task.size if task.blob is None else 0)
        if member.must_read:
            self.to_read[member.name] = None
        self.delivered += 1
        chosen.busy += 1
        chosen.served = self.delivered
        chosen.outlet.offer(chosen)
        if chosen.shared:
            member.shared_busy += 1
            for one in member.subscribers.values():
                if one.shared:  # it has less room now
                    one.outlet.offer(one)
        task.attempt += 1
        task.hold = Hold(member.name, chosen.outlet.pattern, (self._broker_epoch << 32) + self.delivered, self.now)
        task.not_before = self.wall
        self._emit(Deliver(task))

    def _announce(self, queue: _Queue, lane: _Lane, head: Task) -> None:
        """A lane has another head."""
        for outlet in lane.outlets:
            outlet.add_head(lane, head)
            if outlet.serial not in queue.awake:
                queue.awake[outlet.serial] = outlet
                self._awake[queue.name] = queue

    def _has_room(self, subscriber: _Subscriber) -> None:
        if subscriber.free() > 0:
            outlet = subscriber.outlet
            outlet.offer(subscriber)
            queue = outlet.queue
            if outlet.serial not in queue.awake or queue.name not in self._awake:
                queue.awake[outlet.serial] = outlet
                self._awake[queue.name] = queue

    def _credit_changed(self, member: _Member) -> None:
        # The queue that is woken last is dispatched first: of shared ones that which it subscribed to first.
        for subscriber in reversed(member.subscribers.values()):
            name = subscriber.outlet.queue.name
            if subscriber.shared and name in self._awake:
                self._awake[name] = self._awake.pop(name)
            self._has_room(subscriber)

    def _wake_queue(self, name: str) -> None:
        queue = self._queues[name]
        for outlet in queue.outlets.values():
            queue.awake[outlet.serial] = outlet
        if queue.awake:
            self._awake[name] = queue

    def _wake_for(self, resource: _Resource) -> None:
        for name in resource.queues:
            self._wake_queue(name)

    # --- finding, and tidying up ---

    def _serial(self) -> int:
        self._serials += 1
        return self._serials

    def _queue(self, name: str) -> _Queue:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = _Queue(name, self.now)
            self._queue_names_bytes += _bytes_of(name)
        return queue

    def _has_room_for_queues(self, names: Iterable[str]) -> bool:
        """Whether those that are not there may be made."""
        new = [name for name in names if name not in self._queues]
        return not new or (
            len(self._queues) + len(new) <= MAX_QUEUES
            and self._queue_names_bytes + sum(map(_bytes_of, new)) <= MAX_QUEUE_NAMES_BYTES
        )

    def _idle_queues(self) -> list[str]:
        """Those without tasks, subscribers and limits."""
        return [
            name
            for name, queue in self._queues.items()
            if not queue.outlets and not queue.count() and queue.limits == QueueLimits()
        ]

    def _drop_queue(self, name: str) -> None:
        """Forget an idle queue."""
        self._drop_idle_lanes(self._queues[name])
        self._throttled.pop(name, None)
        self._awake.pop(name, None)
        del self._queues[name]
        self._queue_names_bytes -= _bytes_of(name)

    def _resource(self, name: str) -> _Resource:
        resource = self._resources.get(name)
        if resource is None:
            resource = self._resources[name] = _Resource()
        return resource

    def _drop_resource(self, name: str) -> None:
        """Forget a resource that nobody configured, takes or waits for."""
        resource = self._resources[name]
        if resource.capacity is None and not resource.taken and not resource.queues:
            del self._resources[name]

    def _lane(self, queue: _Queue, key: tuple[str | None, Needs, int]) -> _Lane:
        lane = queue.lanes.get(key)
        if lane is None:
            if len(queue.lanes) >= queue.lanes_limit:
                self._drop_idle_lanes(queue)
                queue.lanes_limit = 2 * len(queue.lanes) + MAX_IDLE_LANES
            subject, needs, _ = key
            lane = queue.lanes[key] = _Lane(self._serial(), subject, needs)
            lane.outlets = [outlet for outlet in queue.outlets.values() if outlet.matches(subject)]
            queue.needs[needs] = queue.needs.get(needs, 0) + 1
            for name, _ in needs:
                self._resource(name).queues[queue.name] = None
        return lane

    def _drop_idle_lanes(self, queue: _Queue) -> int:
        idle = [(key, lane) for key, lane in queue.lanes.items() if not lane.ready]
        for key, lane in idle:
            del queue.lanes[key]
            queue.needs[lane.needs] -= 1
            if not queue.needs[lane.needs]:
                del queue.needs[lane.needs]
        for outlet in queue.outlets.values():
            for needs in [needs for needs in outlet.heads if needs not in queue.needs]:
                del outlet.heads[needs]
        wanted = {name for needs in queue.needs for name, _ in needs}
        for name, resource in list(self._resources.items()):
            if queue.name in resource.queues and name not in wanted:
                del resource.queues[queue.name]
                self._drop_resource(name)
        return len(idle)

    def _outlet(self, queue: _Queue, pattern: str | None) -> _Outlet:
        outlet = queue.outlets.get(pattern)
        if outlet is None:
            outlet = queue.outlets[pattern] = _Outlet(self._serial(), queue, pattern)
            for lane in queue.lanes.values():
                if outlet.matches(lane.subject):
                    lane.outlets.append(outlet)
                    if (head := lane.head()) is not None:
                        outlet.add_head(lane, head)
        return outlet

    def _drop_subscriber(self, subscriber: _Subscriber) -> None:
        subscriber.credit = 0
        outlet = subscriber.outlet
        del outlet.subscribers[subscriber.member.name]
        if outlet.subscribers:
            return
        queue = outlet.queue
        del queue.outlets[outlet.pattern]
        queue.awake.pop(outlet.serial, None)
        for lane in queue.lanes.values():
            if outlet in lane.outlets:
                lane.outlets.remove(outlet)

    def _measure(self) -> None:
        self._measured_at = self.now
        for queue in self._queues.values():
            queue.history.append((self.now, queue.accepted, queue.settled))
        idle = self._idle_queues()
        for name in idle[: max(0, len(idle) - MAX_IDLE_QUEUES)]:
            self._drop_queue(name)

    def _statistics_of(self, queue: _Queue) -> QueueStatistics:
        at, accepted, settled = queue.history[0]
        elapsed = max(self.now - at, 1.0)
        heads = (lane.head() for lane in queue.lanes.values())
        oldest = min((head.sent_at for head in heads if head is not None), default=None)
        longest_held = next(iter(queue.places["held"].values()), None)  # they stand there in the order of their holds
        subscribers = [one for outlet in queue.outlets.values() for one in outlet.subscribers.values()]
        return QueueStatistics(
            ready=queue.ready,
            delayed=len(queue.places["delayed"]),
            blocked=len(queue.places["blocked"]),
            held=len(queue.places["held"]),
            dead=len(queue.places["dead"]),
            credit=sum(max(0, one.free()) for one in subscribers),
            subscribers=len(subscribers),
            accepted=queue.accepted,
            settled=queue.settled,
            rejected=queue.rejected,
            accepted_per_s=(queue.accepted - accepted) / elapsed,
            settled_per_s=(queue.settled - settled) / elapsed,
            oldest_s=None if oldest is None else max(0.0, self.wall - oldest),
            limits=queue.limits,
            longest_held_s=self.now - longest_held.hold.since if longest_held and longest_held.hold else None,
        )


# --- what it remembers ------------------------------------------------------------------------------


class _Member:
    """A session, as far as tasks go."""

    __slots__ = ("connected", "given_bytes", "held", "held_bytes", "name", "shared_busy", "subscribers")

    def __init__(self, name: str) -> None:
        self.name = name
        self.connected = False
        self.subscribers: dict[tuple[str, str | None], _Subscriber] = {}
        """By (queue, pattern)."""
        self.held: dict[str, Task] = {}
        self.held_bytes = 0
        """What these take in its `Hello`."""
        self.given_bytes = 0
        """Of tasks, since it last had room for more."""
        self.shared_busy = 0
        """How many it holds by its shared subscriptions."""

    @property
    def must_read(self) -> bool:
        """Whether there is no room for more on the way to it."""
        return self.given_bytes >= MAX_GIVEN_BYTES

    @property
    def is_full(self) -> bool:
        """Whether it could not say of more that it holds it."""
        return self.held_bytes >= MAX_HELD_BYTES

    def take(self, task: Task) -> None:
        self.held[task.id] = task
        self.held_bytes += bytes_in_hello(task.id)

    def give_up(self, task: Task) -> None:
        del self.held[task.id]
        self.held_bytes -= bytes_in_hello(task.id)

    def count_shared(self) -> None:
        """It has other shared subscriptions than before."""
        self.shared_busy = sum(one.busy for one in self.subscribers.values() if one.shared)


class _Subscriber:
    """A subscription of a session to a queue."""

    __slots__ = ("busy", "credit", "member", "outlet", "serial", "served", "shared")

    def __init__(self, member: _Member, outlet: _Outlet, serial: int) -> None:
        self.member, self.outlet, self.serial = member, outlet, serial
        self.credit = self.busy = 0
        self.shared = False
        """What its session holds by other shared ones takes room here too."""
        self.served = 0
        """The number of its last delivery."""

    def free(self) -> int:
        member = self.member
        if not member.connected or member.is_full or member.must_read:
            return 0
        return self.credit - (member.shared_busy if self.shared else self.busy)


class _Lane:
    """Ready tasks of a queue with the same subject, needs and urgency; those that are not any more are skipped."""

    __slots__ = ("came", "came_back", "gone", "needs", "outlets", "ready", "serial", "subject")

    def __init__(self, serial: int, subject: str | None, needs: Needs) -> None:
        self.serial, self.subject, self.needs = serial, subject, needs
        self.outlets: list[_Outlet] = []
        """Those whose pattern matches."""
        self.came: list[Task] = []
        """In their order, which is that in which they came ..."""
        self.gone = 0
        """... but so many at the beginning are gone."""
        self.came_back: list[Task] = []
        """A heap of those that came out of their order."""
        self.ready = 0

    def add(self, task: Task) -> bool:
        """Whether it may be the head: not if all others that are ready came before it."""
        self.ready += 1
        if self.came and task.order < self.came[-1].order:
            heapq.heappush(self.came_back, task)
        else:
            self.came.append(task)
        return self.ready == 1 or bool(self.came_back)

    def head(self) -> Task | None:
        came, gone = self.came, self.gone
        while gone < len(came) and came[gone].place != "ready":
            gone += 1
        self.gone = gone
        if 2 * gone > len(came) + _SLACK:
            del came[:gone]
            self.gone = gone = 0
        first = came[gone] if gone < len(came) else None
        back = self.came_back
        while back and back[0].place != "ready":
            heapq.heappop(back)
        return back[0] if back and (first is None or back[0] < first) else first

    def compact(self) -> None:
        """Don't keep more of those that are not ready any more than there are others."""
        if len(self.came) - self.gone + len(self.came_back) > 2 * self.ready + _SLACK:
            ready = {task.number: task for task in (*self.came, *self.came_back) if task.place == "ready"}
            self.came, self.gone, self.came_back = sorted(ready.values()), 0, []


class _Outlet:
    """All subscriptions of a queue with one pattern, and the heads of the lanes that it matches."""

    __slots__ = ("heads", "matches", "pattern", "queue", "room", "serial", "subscribers")

    def __init__(self, serial: int, queue: _Queue, pattern: str | None) -> None:
        self.serial, self.queue, self.pattern = serial, queue, pattern
        self.matches = matcher(pattern)
        self.subscribers: dict[str, _Subscriber] = {}
        """By session."""
        self.room: list[tuple[int, int, int, _Subscriber]] = []
        """A heap of (-free, served, serial, subscriber). Entries that are not true any more are skipped."""
        self.heads: dict[Needs, list[tuple[Task, int, _Lane]]] = {}
        """For each set of needs a heap of (head, serial, lane). Entries that are not true any more are skipped."""

    def offer(self, subscriber: _Subscriber) -> None:
        """The room of a subscriber is another one now."""
        free = subscriber.free()
        if free <= 0:
            return
        heapq.heappush(self.room, (-free, subscriber.served, subscriber.serial, subscriber))
        if len(self.room) > 2 * len(self.subscribers) + _SLACK:
            self.room = [
                (-one.free(), one.served, one.serial, one) for one in self.subscribers.values() if one.free() > 0
            ]
            heapq.heapify(self.room)

    def roomiest(self) -> _Subscriber | None:
        """Who has the most free credit; of equals the one that was served longest ago."""
        room = self.room
        while room:
            free, served, _, subscriber = room[0]
            if -free == subscriber.free() and served == subscriber.served:
                return subscriber
            heapq.heappop(room)
        return None

    def add_head(self, lane: _Lane, head: Task) -> None:
        """A lane has another head."""
        heads = self.heads.get(lane.needs)
        if heads is None:
            heads = self.heads[lane.needs] = []
        heapq.heappush(heads, (head, lane.serial, lane))
        if len(heads) > 2 * len(self.queue.lanes) + _SLACK:
            heads[:] = [
                (first, one.serial, one)
                for one in self.queue.lanes.values()
                if one.needs == lane.needs and self in one.outlets and (first := one.head()) is not None
            ]
            heapq.heapify(heads)

    def best(self, resources: Mapping[str, _Resource]) -> tuple[Task, _Lane] | None:
        """The first task, and its lane, that somebody here has room for, and for which there are tokens."""
        if self.roomiest() is None:
            return None
        best: tuple[Task, _Lane] | None = None
        for needs, heads in self.heads.items():
            if needs and not all(resources[name].has(tokens) for name, tokens in needs):
                continue
            while heads:
                head, _, lane = heads[0]
                if lane.head() is head:
                    if best is None or head < best[0]:
                        best = head, lane
                    break
                heapq.heappop(heads)
        return best


class _Resource:
    __slots__ = ("capacity", "queues", "taken")

    def __init__(self) -> None:
        self.capacity: int | None = None
        self.taken = 0
        self.queues: dict[str, None] = {}
        """Where tasks may wait for it."""

    def has(self, tokens: int) -> bool:
        return self.capacity is not None and self.taken + tokens <= self.capacity


class _Queue:
    __slots__ = (
        "accepted", "all", "awake", "filled_at", "gone", "history", "keys", "lanes", "lanes_limit", "limits",
        "name", "needs", "outlets", "places", "ready", "rejected", "settled", "tokens",
    )  # fmt: skip

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.limits = QueueLimits()
        self.tokens, self.filled_at = 0.0, now
        """Of its rate limit: deliveries that are possible at once, and when that was so."""
        self.all: list[Task] = []
        """By order. Those without a place are skipped."""
        self.gone = 0
        """How many these are."""
        self.keys: dict[str, Task] = {}
        """Pending tasks by key."""
        self.ready = 0
        self.places: dict[str, dict[str, Task]] = {place: {} for place in _KEPT_BY_PLACE}
        """Tasks by place and id; those that are ready stand in the lanes."""
        self.lanes: dict[tuple[str | None, Needs, int], _Lane] = {}
        """By (subject, needs, urgency)."""
        self.lanes_limit = MAX_IDLE_LANES
        """When there are so many, look for empty ones."""
        self.needs: dict[Needs, int] = {}
        """How many lanes have them."""
        self.outlets: dict[str | None, _Outlet] = {}
        """By pattern."""
        self.awake: dict[int, _Outlet] = {}
        """Outlets for which something changed, by serial."""
        self.accepted = self.settled = self.rejected = 0
        self.history: deque[tuple[float, int, int]] = deque([(now, 0, 0)], maxlen=round(RATE_WINDOW_S / RATE_STEP_S))
        """(now, accepted, settled), one entry each `RATE_STEP_S`."""

    def length(self) -> int:
        """Tasks that are not dead or settled."""
        return self.ready + len(self.places["held"]) + len(self.places["delayed"]) + len(self.places["blocked"])

    def count(self) -> int:
        """All tasks."""
        return len(self.all) - self.gone

    def tokens_by(self, now: float) -> float:
        """Deliveries that its rate allows at once by now, up to its burst."""
        rate = self.limits.rate_per_s or 0.0
        return min(float(self.limits.burst), self.tokens + (now - self.filled_at) * rate)

    def add(self, task: Task) -> None:
        if self.all and task.order < self.all[-1].order:
            bisect.insort(self.all, task, key=_order)
        else:
            self.all.append(task)

    def discard(self) -> None:
        """One has no place any more."""
        self.gone += 1
        if 2 * self.gone > len(self.all) + _SLACK:
            self.all = [task for task in self.all if task.place]
            self.gone = 0

    def after(self, order: int) -> Iterator[Task]:
        """Those with a greater order."""
        start = bisect.bisect_right(self.all, order, key=_order)
        return (task for task in (self.all[index] for index in range(start, len(self.all))) if task.place)


class _Timers:
    """Tasks by the time at which they are due. One for which that is not true any more is skipped."""

    def __init__(self, is_true: Callable[[float, Task], bool]) -> None:
        self._is_true = is_true
        self._heap: list[tuple[float, Task]] = []
        self._limit = _SLACK

    def add(self, at: float, task: Task) -> None:
        heapq.heappush(self._heap, (at, task))
        if len(self._heap) > self._limit:
            self._heap = [entry for entry in self._heap if self._is_true(*entry)]
            heapq.heapify(self._heap)
            self._limit = 2 * len(self._heap) + _SLACK

    def next(self) -> float:
        """When the first is due; infinite if there is none."""
        while self._heap:
            at, task = self._heap[0]
            if self._is_true(at, task):
                return at
            heapq.heappop(self._heap)
        return math.inf

    def due(self, now: float) -> Iterator[Task]:
        """Those that are due, each taken out."""
        while self.next() <= now:
            yield heapq.heappop(self._heap)[1]


_KEPT_BY_PLACE = ("delayed", "blocked", "held", "dead", "settled")
_SLACK = 64
"""So many entries may be out of date before it is worth to look for them."""
_TINY = 1e-9
_order = attrgetter("order")
_number = attrgetter("number")
_held_since = attrgetter("hold.since")


def urgency_of(priority: int, depth: int = 0) -> int:
    """What is less goes first: the higher priority, and within one the deeper task."""
    return (MAX_PRIORITY - priority) * (MAX_DEPTH + 1) + MAX_DEPTH - min(depth, MAX_DEPTH)


def priority_of(urgency: int) -> int:
    return MAX_PRIORITY - urgency // (MAX_DEPTH + 1)


def depth_of(urgency: int) -> int:
    """Up to `MAX_DEPTH`."""
    return MAX_DEPTH - urgency % (MAX_DEPTH + 1)


def needs_of(resources: Iterable[tuple[str, int]]) -> Needs:
    """The tokens that a task asks for, in the one way in which they are compared."""
    needs: dict[str, int] = {}
    for name, tokens in resources:
        needs[name] = needs.get(name, 0) + tokens
    return tuple(sorted((name, tokens) for name, tokens in needs.items() if tokens))


def dead_letter(task: Task) -> bytes:
    """What those who wait for the result of a dead task are told."""
    return encode(TaskResult(task=task.id, outcome=outcome_of(DeadLetterError(task.id, task.reason or BURIED))))


def _bytes_of(name: str) -> int:
    """What a name takes in JSON, in which a control character is six bytes."""
    return len(msgspec.json.encode(name))


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
