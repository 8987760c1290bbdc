"""The broker with its disk: the core, its task store and a service, behind one commit barrier.

`process` takes the frames that arrived together, lets the core and the service decide, writes what changed (each task
once), commits **once**, and only then returns what is to be sent. So nothing is said that a power cut could take back
(G1), and a checkpoint, the acknowledgement of its task and the tasks that it causes are one transaction (G2).

It is crash-only: whatever SQLite refuses raises `BrokerStoppedError`, nothing of that batch is sent, and the caller
ends its process. A new one starts from the disk, and the clients say again what was not confirmed.

Nothing here knows what the service keeps; the service shares the connection, and leaves transactions to the exchange.
The service may have timers, by a clock of its own (the wall clock, which jumps): how long the next one has to wait is
asked anew after every commit and every tick, so at least once a second, and those that are late fire at once.
"""

from __future__ import annotations

import hashlib
import logging
import math
import sqlite3
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, assert_never

import msgspec

from prunus.errors import (
    BusyError,
    IndeterminateError,
    MessageTooLargeError,
    MessagingError,
    NotDeliveredError,
    NotPermittedError,
    PersistenceError,
    ProtocolError,
    PrunusError,
    StoreFullError,
    TaskRejectedError,
    UnknownResourceError,
)
from prunus.messaging.access import OWNER, SENDING, Principal, Role, reduced, what, who_may_say
from prunus.messaging.blobs import BlobStore
from prunus.messaging.broker import OWN_TASKS, BrokerCore, Came, Describe, Effect, Left, Show, Tell
from prunus.messaging.communicator import MAX_BODY_BYTES
from prunus.messaging.inventory import Statistics, TaskInfo, fitting
from prunus.messaging.messages import (
    LEASE_S,
    MAX_FRAME_BYTES,
    BlobGet,
    BlobHeld,
    BlobPart,
    BlobPut,
    BrokerMessage,
    Call,
    CallDone,
    ClientMessage,
    Goodbye,
    Hello,
    HelloNeeded,
    Peer,
    Refused,
    StatisticsAsk,
    StatisticsTold,
    TaskDelivery,
    TaskList,
    TaskResult,
    TasksListed,
    Unwelcome,
    Violation,
    decode_from_client,
    encode,
    encode_answers,
    outcome_of,
)
from prunus.messaging.queues import Deliver, Hold, Keep, Needs, Send, Task, dead_letter
from prunus.messaging.taskstore import TaskStore

MAX_PROTOCOL_ERRORS = 10
"""A connection that sent so much nonsense is not listened to any more."""
MAX_OFFENDERS = 1000
"""How many connections that sent nonsense are remembered."""
MAX_UNKNOWN = 1000
"""So many resources that tasks of the broker's own wait for in vain are told to the log, each once."""
MAX_ANSWERS_BYTES = 256 * 1024 * 1024
"""What the answers of one call may have in all; those that are too large for a message travel as a blob."""
REFUSAL_LOGGED_EACH_S = 5.0
"""Of the sessions that are refused the log tells one in so much time; all are counted."""
MAX_TOLD_BYTES = 8 * 1024 * 1024
"""A connection that was told so much in one batch, or does not read, has to read before more of what may be large is
done for it ..."""
MAX_LATER = 10_000
"""... and so many of its requests wait for that; more are refused with `BusyError` ..."""
MAX_LATER_BYTES = 64 * 1024 * 1024
"""... and so many bytes."""
MAX_PARTS_BYTES = 8 * 1024 * 1024
"""What one session gets of blobs in one batch; then it gets none, and asks again."""

logger = logging.getLogger(__name__)
Route = TypeVar("Route", bound=Hashable)
"""What the transport calls a connection."""


class NewTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task that the service wants to exist, in the commit of the request that caused it."""

    queue: str
    key: str | None = None
    body: bytes = b""
    priority: int = 0
    depth: int = 0
    """Of one priority the deeper goes first; more than 255 counts as 255."""
    needs: Needs = ()
    """It waits until there are so many tokens, also if nobody has said that there are any."""


class NewBroadcast(msgspec.Struct, frozen=True, kw_only=True):
    """Something to be told to whoever listens, once the commit of the request that made it true is done."""

    sender: str | None
    subject: str | None
    body: bytes = b""


class Over(msgspec.Struct, frozen=True):
    """Nothing is left to be done about this key: the pending tasks with it that the service wanted go."""

    key: str


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What the service made of a request."""

    answer: bytes
    tasks: tuple[NewTask, ...] = ()
    over: tuple[Over, ...] = ()
    broadcasts: tuple[NewBroadcast, ...] = ()
    wrote: bool = False
    """It changed the file, though no row of it: that is committed too."""
    begins: NewTask | None = None
    """What the request begins will need such a task, now or later. If its sender would be refused (the queue is full, a
    resource is not there), the whole call is."""


class Service(Protocol):
    """What is kept behind the broker, in the same database."""

    def execute(self, request: bytes, session: str, role: Role) -> Served:
        """Answer a request of `session`, inside the open transaction. A `PrunusError` undoes the whole call.

        What `role` may not do is refused with `NotPermittedError`.
        """
        ...

    def left(self, session: str, lost: Peer | None) -> Iterable[NewTask | Over | NewBroadcast]:
        """`session` is gone for good, and so are its claims on anything; in the commit that says so. `lost` is the
        process in which it died or fell silent; None: it said goodbye, or this broker never heard it."""
        ...

    def due(self) -> float | None:
        """The seconds until its next timer fires, 0 or less if that is late; None if it has none. Called often."""
        ...

    def tick(self) -> Iterable[NewTask]:
        """Fire the timers that are due, or a good part of them, inside the open transaction."""
        ...


class BrokerStoppedError(MessagingError):
    """The database refused something: nothing was sent, this process must end and start again from the disk."""

    def __init__(self, reason: str, full: bool = False) -> None:
        self.reason, self.full = reason, full
        super().__init__(f"the broker stops: {reason}; what was confirmed is safe, the rest will be said again")

    @classmethod
    def of(cls, error: sqlite3.Error) -> BrokerStoppedError:
        """What SQLite said. `full`: the disk is full; with space again the same would be done."""
        return cls(str(error), full=getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL)


@dataclass(slots=True)
class _Later:
    """Requests of a connection that wait until it has read, and their bytes."""

    frames: deque[bytes] = field(default_factory=deque)
    size: int = 0


class Exchange(Generic[Route]):
    """See the module. One thread; `connection` is in autocommit mode (``isolation_level=None``) and nobody else's."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        service: Service | None = None,
        blobs: BlobStore | None = None,
        now: float = 0.0,
        wall_clock: Callable[[], float] = time.time,
        lease_s: float = LEASE_S,
        failpoint: Callable[[str], None] = lambda name: None,
        on_session: Callable[[str, Peer | None], None] = lambda session, peer: None,
        before_batch: Callable[[int], None] = lambda size: None,
        principal_of: Callable[[Route], Principal] = lambda route: OWNER,
    ) -> None:
        """Read what is on disk and raise the broker epoch (one commit).

        `blobs` keeps what is too large for a message (None: that is refused).

        `now` is monotonic and comes with every call; `wall_clock` gives seconds since 1970, for delays and expiry.

        `failpoint` is called with ``before_commit``, ``after_commit`` and (by the server) ``after_send``;
        `on_session` when a session is known (with its process) or gone (None); `before_batch` with the bytes that
        came, before anything is done with them. `principal_of` says who speaks on a connection.
        """
        if connection.isolation_level is not None:
            raise ValueError("open the connection with isolation_level=None: the exchange begins and commits itself")
        self._connection = connection
        self._service = service
        self._blobs = blobs
        self._wall_clock = wall_clock
        self.failpoint = failpoint
        self.on_session = on_session
        self.before_batch = before_batch
        self.principal_of = principal_of
        self.is_stuck: Callable[[Route], bool] = lambda route: False
        """Whether a connection should get no more of what can be refused or dropped: its peer does not read."""
        self.refused_connections = 0
        """Counted by the server; those whose `Hello` is refused are counted here."""
        self._refusal_due = -math.inf
        """When the log may speak of a refused session again."""
        self._refuse_changes: str | None = None
        self._routes: dict[str, Route] = {}
        self._sessions: dict[Route, str] = {}
        self._principals: dict[str, Principal] = {}
        """Who said `Hello` as each session: nobody else can speak for it."""
        self._offences: OrderedDict[Route, int] = OrderedDict()
        self._sends: list[tuple[Route, bytes]] = []
        self._news: list[tuple[str, Peer | None]] = []
        self._gone: list[tuple[str, Peer | None]] = []
        """Sessions that the service has to be told are gone."""
        self._parts_bytes: dict[str, int] = {}
        """What each session got of blobs in this batch."""
        self._damaged: list[tuple[Task, Hold, str]] = []
        """Tasks that were given out in this batch and can't be delivered, and why."""
        self._told_bytes: dict[Route, int] = {}
        """What each connection was told in this batch, by answers that may be large."""
        self._later: dict[Route, _Later] = {}
        """Requests that wait until their peer has read more of the answers to others."""
        self._written = False
        self._timer_due = math.inf if service is None else now
        """The `now` at which the service's timers are to be looked at ..."""
        self._timers_asked_at: float | None = None
        """... unless the service has to be asked anew, since what happened at this `now`."""
        self._unknown: set[str] = set()
        """Resources of which the log says that something waits for them in vain."""
        self._stopped: BrokerStoppedError | None = None
        self._encoded: tuple[object, bytes] = None, b""
        self._made = self._frames = self._calls = self._commits = self._protocol_errors = self._not_permitted = 0
        try:
            self._begin()
            self._store = TaskStore(connection)
            self._core = BrokerCore(
                self._store.next_broker_epoch(), now, self._store.load(), wall=wall_clock(), lease_s=lease_s
            )
            self._core.is_stuck = self._does_not_read
            if blobs is not None:
                self._core.blob_size = blobs.size
            self._store.write(self._core.take_changes())
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise BrokerStoppedError.of(error) from error

    # --- what happens ---

    def process(self, now: float, frames: Iterable[tuple[Route, bytes]]) -> list[tuple[Route, bytes]]:
        """Deal with frames that arrived together; what to send, all of it durable. Raises `BrokerStoppedError`."""
        frames = list(frames)
        self._parts_bytes.clear()
        self._told_bytes.clear()
        self.before_batch(sum(len(frame) for _, frame in frames))

        def work() -> None:
            self._take_later(now)
            for route, frame in frames:
                self._take(now, route, frame)
            self._apply(self._core.go_on())
            if now >= self._next_timer():  # a busy broker has no idle moment for a `tick`
                self._fire()

        return self._behind_the_barrier(work, now)

    def tick(self, now: float) -> list[tuple[Route, bytes]]:
        """Let time pass (see `due`)."""
        self._told_bytes.clear()

        def work() -> None:
            self._take_later(now)
            self._apply(self._core.tick(now))
            self._apply(self._core.go_on())
            self._fire()

        return self._behind_the_barrier(work, now, ticked=True)

    def expire(self, now: float, sessions: Iterable[str]) -> list[tuple[Route, bytes]]:
        """These sessions are certainly dead: their processes ended."""

        def work() -> None:
            for session in sessions:
                self._apply(self._core.expired(session))

        return self._behind_the_barrier(work, now)

    def put(self, now: float, tasks: Iterable[NewTask]) -> list[tuple[Route, bytes]]:
        """Store tasks of the broker's own making, each unless one with its key is pending."""
        return self._behind_the_barrier(lambda: self._put(tasks), now)

    def forget_dead(self, now: float, *, before: float, limit: int) -> int:
        """Forget dead letters that died before this wall-clock time, up to `limit`, in one commit; how many. Whoever
        still waits for one of them is told with the next batch."""
        forgotten = 0

        def work() -> None:
            nonlocal forgotten
            forgotten, effects = self._core.forget_dead(before, limit)
            self._apply(effects)

        self._sends = self._behind_the_barrier(work, now)
        return forgotten

    def sweep_blobs(self, now: float, *, keep_finished: bool = False) -> None:
        """Drop idle uploads, also on a full disk, where that frees space. Then remove some of the blobs that no task
        refers to, unless these are to be kept for now. Between two batches: what refers to one is committed."""
        if self._blobs is None:
            return
        self._blobs.drop_idle(now)
        if self._refuse_changes is None and not keep_finished:
            try:
                self._blobs.sweep(now, self._store.needs_blob)
            except sqlite3.Error as error:
                self._stopped = BrokerStoppedError.of(error)
                raise self._stopped from error

    def drop_route(self, route: Route) -> None:
        """A connection is gone. Its session is not: it may come back on another one."""
        self._offences.pop(route, None)
        self._later.pop(route, None)
        session = self._sessions.pop(route, None)
        if session is not None:
            del self._routes[session]
            self._core.disconnected(session)

    def due(self) -> float:
        """The `now` at which `tick` must be called, at the latest."""
        if any(not self.is_stuck(route) for route in self._later):
            return 0.0
        return self._core.due() if self._refuse_changes is not None else min(self._core.due(), self._next_timer())

    # --- what can be asked ---

    @property
    def refuse_new(self) -> str | None:
        """The path of the full disk: `task_send` is refused with `StoreFullError`, everything else goes on."""
        return self._core.refuse_new

    @refuse_new.setter
    def refuse_new(self, path: str | None) -> None:
        self._core.refuse_new = path

    @property
    def refuse_changes(self) -> str | None:
        """The path of the disk on which nothing fits any more: calls that would change something are refused with
        `StoreFullError`, no task is delivered, and timers wait. What only reads goes on."""
        return self._refuse_changes

    @refuse_changes.setter
    def refuse_changes(self, path: str | None) -> None:
        self._refuse_changes = path
        self._core.hold_back = path is not None

    @property
    def broker_epoch(self) -> int:
        """How often this database was opened by a broker."""
        return self._core.broker_epoch

    def sessions(self) -> dict[str, Peer]:
        """The sessions that are not gone, with their processes; also those from before a restart."""
        return self._core.sessions()

    def principals(self) -> dict[str, Principal]:
        """Who speaks for each session that said `Hello` to this broker."""
        return dict(self._principals)

    def has_task(self, key: str) -> bool:
        """Whether a task with this key is pending or held."""
        return self._core.has_task(key)

    def is_served(self, queue: str) -> bool:
        """Whether anybody subscribes to this queue, who may be away for the moment."""
        return self._core.is_served(queue)

    def own_tasks(self, limit: int) -> list[str]:
        """The keys of up to `limit` pending tasks of the broker's own making."""
        return self._core.own_tasks(limit)

    def statistics(self) -> Statistics:
        """Queues, resources, sessions and counts, as they are now; as much of it as fits into a message."""
        [[pages]] = self._connection.execute("PRAGMA page_count").fetchall()
        [[page_bytes]] = self._connection.execute("PRAGMA page_size").fetchall()
        statistics = msgspec.structs.replace(
            self._core.statistics(self._who),
            frames=self._frames,
            commits=self._commits,
            calls=self._calls,
            protocol_errors=self._protocol_errors,
            refused_connections=self.refused_connections,
            not_permitted=self._not_permitted,
            database_bytes=pages * page_bytes,
        )
        return fitting(statistics)

    # --- the barrier ---

    def _behind_the_barrier(
        self, work: Callable[[], None], now: float | None = None, *, ticked: bool = False
    ) -> list[tuple[Route, bytes]]:
        if self._stopped is not None:
            raise self._stopped
        self._core.wall = self._wall_clock()
        try:
            work()
            self._let_go()
            self._bury_damaged()
            changes = self._core.take_changes(lasting=self._refuse_changes is not None)
            if changes:
                self._begin()
                self._written = True
                self._store.write(changes)
            if self._connection.in_transaction:
                if self._written:
                    self.failpoint("before_commit")
                    self._connection.execute("COMMIT")
                    self._commits += 1
                    self.failpoint("after_commit")
                else:
                    self._connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            self._stopped = BrokerStoppedError.of(error)
            raise self._stopped from error
        except StoreFullError as error:  # of the service, on its own behalf: nobody is there to be refused
            self._stopped = BrokerStoppedError(str(error), full=True)
            raise self._stopped from error
        except BrokerStoppedError as error:
            self._stopped = error
            raise
        committed, self._written = self._written, False
        if now is not None and (committed or ticked):
            # Only a commit sets a timer, and only the wall clock can bring one nearer: each tick looks at that.
            self._timers_asked_at = now
        sends, self._sends = self._sends, []
        news, self._news = self._news, []
        for session, peer in news:
            self.on_session(session, peer)
        return sends

    def _next_timer(self) -> float:
        """The service is asked when somebody wants to know, which is after what was committed has been said."""
        if self._timers_asked_at is not None and self._service is not None:
            due = self._service.due()
            self._timer_due = math.inf if due is None else self._timers_asked_at + due
            self._timers_asked_at = None
        return self._timer_due

    def _let_go(self) -> None:
        """Whoever is gone in this batch holds nothing any more, in the service too."""
        if self._service is None or self._refuse_changes is not None:
            return
        gone, self._gone = self._gone, []
        for session, lost in gone:
            self._begin()
            self._written = True
            came = list(self._service.left(session, lost))
            self._drop(over for over in came if isinstance(over, Over))
            self._put(task for task in came if isinstance(task, NewTask))
            for news in came:
                if isinstance(news, NewBroadcast):
                    self._apply(self._core.broadcast(news.body, news.sender, news.subject))

    def _fire(self) -> None:
        """The service's timers that are due, in the commit of this batch."""
        if self._service is None or self._refuse_changes is not None:
            return
        due = self._service.due()
        if due is not None and due <= 0:
            self._begin()
            self._written = True
            self._put(self._service.tick())

    def _begin(self) -> None:
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")

    def _apply(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    route = self._routes.get(effect.session)
                    if route is not None:
                        self._sends.append((route, self._frame(effect.message)))
                case Deliver():
                    self._deliver(effect.task)
                case Keep():
                    self._store.keep(effect.number, effect.body)
                case Came():
                    self._news.append((effect.session, effect.peer))
                case Left():
                    self._news.append((effect.session, None))
                    self._gone.append((effect.session, effect.lost))
                    self._principals.pop(effect.session, None)
                    if self._blobs is not None:
                        self._blobs.forget_session(effect.session)
                    route = self._routes.pop(effect.session, None)
                    if route is not None:
                        del self._sessions[route]
                case Show():
                    self._show(effect)
                case Tell():
                    self._apply([Send(effect.session, self._result_of(effect.task))])
                case Describe():
                    self._answer(effect.session, StatisticsTold(id=effect.request, statistics=self.statistics()))
                case _:
                    assert_never(effect)

    def _deliver(self, task: Task) -> None:
        """Send a task with its body. If that is not what was stored, the task is a dead letter."""
        hold = task.hold
        assert hold is not None, "what is delivered is held"
        try:
            if task.blob is not None and self._core.blob_size(task.blob) != task.size:
                raise PersistenceError(f"its body, the blob {task.blob}, is gone from the disk, or damaged")
            body = self._store.body(task.number)
        except PersistenceError as error:
            logger.error("a task is a dead letter: %s", error, extra={"task": task.id, "queue": task.queue})
            self._damaged.append((task, hold, str(error)))
            return
        self._store.forget_body(task.number)
        route = self._routes.get(hold.session)
        if route is not None:
            delivery = TaskDelivery(
                task=task.id,
                queue=task.queue,
                key=task.key,
                body=body,
                epoch=hold.epoch,
                attempt=task.attempt,
                subject=task.subject,
                pattern=hold.pattern,
                blob=task.blob,
            )
            self._sends.append((route, encode(delivery)))

    def _bury_damaged(self) -> None:
        """Others may be given out in their place, and be damaged too."""
        while self._damaged:
            task, hold, reason = self._damaged.pop()
            if task.hold is hold:
                self._apply(self._core.damaged(task, reason))

    def _show(self, show: Show) -> None:
        """Answer a question for tasks; with their bodies as many as fit into a frame."""
        tasks: list[TaskInfo] = []
        more, size = show.more, 0
        for task in show.tasks:
            info = self._core.info(task)
            if show.bodies and task.blob is None:
                body = self._store.body(task.number, checked=False)
                size += len(body)
                if tasks and size > MAX_BODY_BYTES:
                    more = True
                    break
                info = msgspec.structs.replace(info, body=body)
            tasks.append(info)
        self._answer(show.session, TasksListed(id=show.request, tasks=tuple(tasks), more=more))

    def _result_of(self, task: Task) -> bytes:
        if task.place == "dead":
            return dead_letter(task)
        if (frame := task.outcome or self._store.outcome(task.number)) is not None:
            return frame
        return encode(TaskResult(task=task.id, outcome=outcome_of(IndeterminateError(f"task {task.id}"))))

    def _answer(self, session: str, message: TasksListed | StatisticsTold) -> None:
        """Answer a question about what is there; it may be too much for a frame."""
        try:
            frame = encode(message)
        except MessageTooLargeError as error:
            frame = encode(Refused(id=message.id, failure=outcome_of(error)))
        self._apply([Send(session, frame)])

    def _who(self, session: str) -> tuple[str, str | None]:
        principal = self._principals.get(session)
        return ("unknown", None) if principal is None else (principal.role, principal.key)  # not back since the start

    def _does_not_read(self, session: str) -> bool:
        route = self._routes.get(session)
        return route is not None and self.is_stuck(route)

    def _frame(self, message: BrokerMessage | bytes) -> bytes:
        """Its bytes; a broadcast is encoded once for all of its receivers."""
        if isinstance(message, bytes):
            return message
        if message is not self._encoded[0]:
            self._encoded = message, encode(message)
        return self._encoded[1]

    # --- one frame ---

    def _take(self, now: float, route: Route, frame: bytes) -> None:
        if self._offences.get(route, 0) >= MAX_PROTOCOL_ERRORS:
            return
        self._frames += 1
        try:
            message = decode_from_client(frame)
        except ProtocolError as error:
            self._offence(route, error)
            return
        principal = self.principal_of(route)
        if isinstance(message, Hello):
            message = reduced(principal.role, message)
            if (refusal := self._core.refusal(message)) is not None:
                self._refuse(now, route, message.session, refusal)
                return
            if self._core.is_late(message):
                return
            if not self._bind(route, message.session, principal):
                return
        session = self._sessions.get(route)
        if session is None:
            self._sends.append((route, self._frame(HelloNeeded())))
        elif principal.role is not Role.OWNER and principal.role not in who_may_say(message):
            self._not_allowed(route, principal, message)
        elif isinstance(message, BlobPut | BlobGet):
            self._blob(now, session, message)
        elif isinstance(message, Call | TaskList | StatisticsAsk):
            if self._is_told_enough(route):
                self._put_off(now, session, route, frame, message.id)
                return
            before = len(self._sends)
            if isinstance(message, Call):
                self._call(now, session, message)
            else:
                self._apply(self._core.handle(now, session, message))
            told = sum(len(said) for to, said in self._sends[before:] if to == route)
            self._told_bytes[route] = self._told_bytes.get(route, 0) + told
        elif isinstance(message, Goodbye) and route in self._later:  # what it asked for before comes first
            self._put_off(now, session, route, frame, message.id)
        else:
            self._apply(self._core.handle(now, session, message))

    def _is_told_enough(self, route: Route) -> bool:
        """Whether answers that may be large have to wait until this peer has read others."""
        return route in self._later or self._told_bytes.get(route, 0) >= MAX_TOLD_BYTES or self.is_stuck(route)

    def _put_off(self, now: float, session: str, route: Route, frame: bytes, request: int) -> None:
        later = self._later.setdefault(route, _Later())
        if len(later.frames) < MAX_LATER and later.size + len(frame) <= MAX_LATER_BYTES:
            later.frames.append(frame)
            later.size += len(frame)
            return
        busy = BusyError(
            f"{len(later.frames):,} of your requests wait until you have read the answers to others; read them"
        )
        if self._core.heard(now, session, request):
            self._apply([Send(session, Refused(id=request, failure=outcome_of(busy)))])

    def _take_later(self, now: float) -> None:
        """What was put off, of those who have read meanwhile."""
        for route in [route for route in self._later if not self.is_stuck(route)]:
            later = self._later.pop(route)
            while later.frames and self._told_bytes.get(route, 0) < MAX_TOLD_BYTES:
                frame = later.frames.popleft()
                later.size -= len(frame)
                self._take(now, route, frame)
            if later.frames:
                self._later[route] = later

    def _refuse(self, now: float, route: Route, session: str, error: PrunusError) -> None:
        """Say no to a `Hello`. The log is not filled by one who says it again and again."""
        self.refused_connections += 1
        if now >= self._refusal_due:
            self._refusal_due = now + REFUSAL_LOGGED_EACH_S
            logger.warning("a session is refused: %s", error, extra={"session": session})
        self._sends.append((route, self._frame(Unwelcome(failure=outcome_of(error)))))

    def _not_allowed(self, route: Route, principal: Principal, message: ClientMessage) -> None:
        self._not_permitted += 1
        error = NotPermittedError(principal.role, what(message))
        request = getattr(message, "id", None)
        refusal = Violation(reason=str(error)) if request is None else Refused(id=request, failure=outcome_of(error))
        self._sends.append((route, self._frame(refusal)))

    def _bind(self, route: Route, session: str, principal: Principal) -> bool:
        """From now on this session speaks on this route, unless it is that of another key."""
        if self._principals.setdefault(session, principal).key != principal.key:
            self._not_permitted += 1
            error = ProtocolError(f"the session {session!r} came with another key; only that one can speak as it")
            self._sends.append((route, self._frame(Unwelcome(failure=outcome_of(error)))))
            return False
        self._principals[session] = principal
        before = self._sessions.get(route)
        if before == session:
            return True
        if before is not None:
            self.drop_route(route)
        if (old := self._routes.get(session)) is not None:
            del self._sessions[old]
        self._routes[session], self._sessions[route] = route, session
        return True

    def _offence(self, route: Route, error: ProtocolError) -> None:
        self._protocol_errors += 1
        self._offences[route] = self._offences.get(route, 0) + 1
        if self._offences[route] == MAX_PROTOCOL_ERRORS:
            logger.warning("a connection sends nonsense; it is not listened to any more", extra={"reason": str(error)})
        while len(self._offences) > MAX_OFFENDERS:
            self._offences.popitem(last=False)
        self._sends.append((route, self._frame(Violation(reason=str(error)))))

    # --- blobs ---

    def _blob(self, now: float, session: str, message: BlobPut | BlobGet) -> None:
        """Asking again is harmless: no answer is remembered."""
        if not self._core.heard(now, session, message.id):
            self._apply([Send(session, HelloNeeded())])
            return
        answer: BrokerMessage
        try:
            if self._blobs is None:
                raise NotDeliveredError("the blob store: this broker has none")
            if isinstance(message, BlobGet):
                limit = 0 if self._does_not_read(session) else message.limit
                limit = min(limit, MAX_PARTS_BYTES - self._parts_bytes.get(session, 0))
                total, chunk = self._blobs.read(message.digest, message.offset, limit)
                self._parts_bytes[session] = self._parts_bytes.get(session, 0) + len(chunk)
                answer = BlobPart(id=message.id, total=total, chunk=chunk)
            else:
                if (full := self.refuse_new or self._refuse_changes) is not None:
                    self._blobs.drop(session, message.digest)
                    raise StoreFullError(full)
                size = self._blobs.put(now, session, message.digest, message.offset, message.total, message.chunk)
                answer = BlobHeld(id=message.id, size=size)
        except PrunusError as error:
            answer = Refused(id=message.id, failure=outcome_of(error))
        self._apply([Send(session, answer)])

    # --- calls ---

    def _call(self, now: float, session: str, call: Call) -> None:
        """All requests, then the acknowledgements (so that they free their keys), then the new tasks; or nothing."""
        if not self._core.heard(now, session, call.id):
            self._apply([Send(session, HelloNeeded())])
            return
        if (said := self._core.known_answer(session, call.id)) is not None:
            self._apply([said])
            return
        self._calls += 1
        self._begin()
        self._connection.execute("SAVEPOINT call")
        changes = self._connection.total_changes
        try:
            role = self._principals[session].role
            if not all(self._core.holds(session, task_id, epoch) for task_id, epoch in call.holding):
                raise TaskRejectedError("you do not hold the task of this call any more")
            served = self._serve(call, session, role)
            for one in served:
                if one.begins is not None:
                    self._core.check_room(one.begins.queue, one.begins.needs)
            frame = encode(self._call_done(now, session, call, tuple(one.answer for one in served)))
            wrote = self._connection.total_changes != changes or any(one.wrote for one in served)
            if self._refuse_changes is not None and (call.acks or wrote):
                raise StoreFullError(self._refuse_changes)
        except sqlite3.Error:
            raise
        except Exception as error:  # the service's error is an answer to its caller, whatever it is
            if not self._connection.in_transaction:  # on a full disk SQLite undoes the whole batch, not this call alone
                raise BrokerStoppedError(str(error), full=isinstance(error, StoreFullError)) from error
            if not isinstance(error, PrunusError):
                logger.exception("the service failed; the call was undone and its caller is told")
            self._connection.execute("ROLLBACK TO call")
            self._connection.execute("RELEASE call")
            self._apply([Send(session, Refused(id=call.id, failure=outcome_of(error)))])
            return
        self._connection.execute("RELEASE call")
        tasks = [task for one in served for task in one.tasks]
        if not wrote and not call.acks and not tasks:
            self._apply([Send(session, frame)])  # nothing was changed: asking again is harmless
            return
        self._written = True
        # The answer is the first to leave: it frees the place of a task that may be delivered in this very commit.
        self._apply(self._core.answer(session, call.id, frame))
        for task_id, epoch in call.acks:
            self._apply(self._core.settle(session, task_id, epoch))
        self._drop(over for one in served for over in one.over)
        self._put(tasks)  # only then are places given away that these acknowledgements freed: a child goes first
        for one in served:
            for news in one.broadcasts:
                self._apply(self._core.broadcast(news.body, news.sender, news.subject))

    def _call_done(self, now: float, session: str, call: Call, answers: tuple[bytes, ...]) -> CallDone:
        """With answers that are too large for a message as a blob, for those who may read one."""
        if self._blobs is None or sum(map(len, answers)) <= MAX_BODY_BYTES or not self._may_read_blobs(session):
            return CallDone(id=call.id, answers=answers)
        data = encode_answers(answers)
        if (full := self.refuse_new or self._refuse_changes) is not None:
            raise StoreFullError(full)
        digest = hashlib.sha256(data).hexdigest()
        self._blobs.put(now, session, digest, 0, len(data), data)
        return CallDone(id=call.id, blob=digest)

    def _may_read_blobs(self, session: str) -> bool:
        return self._blobs is not None and self._principals[session].role in SENDING

    def _serve(self, call: Call, session: str, role: Role) -> list[Served]:
        """Execute its requests, as long as somebody could be told the answers: small requests may have large ones."""
        served, size = [], 0
        limit = MAX_ANSWERS_BYTES if self._may_read_blobs(session) else MAX_FRAME_BYTES
        for request in call.requests:
            served.append(self._execute(request, session, role))
            size += len(served[-1].answer)
            if size > limit:
                raise MessageTooLargeError(size, limit)
        return served

    def _execute(self, request: bytes, session: str, role: Role) -> Served:
        if self._service is None:
            raise NotDeliveredError("the service: this broker has none")
        return self._service.execute(request, session, role)

    def _drop(self, keys: Iterable[Over]) -> None:
        for over in keys:
            self._apply(self._core.drop(over.key))

    def _put(self, tasks: Iterable[NewTask]) -> None:
        for task in tasks:
            if task.needs:
                self._warn_of(task)
            self._made += 1
            task_id = f"{OWN_TASKS}{self._core.broker_epoch:x}-{self._made:x}"
            self._apply(
                self._core.put(
                    task_id, task.queue, task.key, task.body, task.priority, depth=task.depth, needs=task.needs
                )
            )
        self._apply(self._core.dispatch())

    def _warn_of(self, task: NewTask) -> None:
        """It is put in any case, but somebody should know that nobody will get it."""
        try:
            self._core.check_needs(task.needs)
        except UnknownResourceError as error:
            if error.resource not in self._unknown and len(self._unknown) < MAX_UNKNOWN:
                self._unknown.add(error.resource)
                logger.warning("a task waits: %s", error, extra={"queue": task.queue, "key": task.key})
