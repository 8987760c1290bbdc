"""The broker with its disk: the core, its task store and a service, behind one commit barrier.

`process` takes the frames that arrived together, lets the core and the service decide, writes what they decided,
commits **once**, and only then returns what is to be sent. So nothing is said that a power cut could take back (G1),
and a checkpoint, the acknowledgement of its task and the tasks that it causes are one transaction (G2).

It is crash-only: whatever SQLite refuses raises `BrokerStoppedError`, nothing of that batch is sent, and the caller
ends its process. A new one starts from the disk, and the clients say again what was not confirmed.

Nothing here knows what the service keeps; the service shares the connection, and leaves transactions to the exchange.
The service may have timers, by a clock of its own (the wall clock, which jumps): how long the next one has to wait is
asked after every batch and every tick, so at least once a second, and those that are late fire at once.
"""

from __future__ import annotations

import logging
import math
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import msgspec

from prunus.errors import MessagingError, NotDeliveredError, ProtocolError, PrunusError, StoreFullError
from prunus.messaging.broker import (
    LEASE_S,
    BrokerCore,
    DropAnswers,
    Effect,
    ForgetSession,
    ReleaseTask,
    SaveSession,
    Send,
    Statistics,
)
from prunus.messaging.messages import (
    BrokerMessage,
    Call,
    CallDone,
    Hello,
    HelloNeeded,
    Peer,
    Refused,
    Violation,
    decode_from_client,
    encode,
    outcome_of,
)
from prunus.messaging.taskstore import TaskStore

MAX_PROTOCOL_ERRORS = 10
"""A connection that sent so much nonsense is not listened to any more."""
MAX_OFFENDERS = 1000
"""How many connections that sent nonsense are remembered."""

logger = logging.getLogger(__name__)
_REGAINED = SaveSession | ForgetSession | DropAnswers | ReleaseTask
"""What a broker that starts again learns from its clients, so that it need not be written to a full disk."""
Route = TypeVar("Route", bound=Hashable)
"""What the transport calls a connection."""


class NewTask(msgspec.Struct, frozen=True, kw_only=True):
    """A task that the service wants to exist, in the commit of the request that caused it."""

    queue: str
    key: str | None = None
    body: bytes = b""
    priority: int = 0


class NewBroadcast(msgspec.Struct, frozen=True, kw_only=True):
    """Something to be told to whoever listens, once the commit of the request that made it true is done."""

    sender: str | None
    subject: str | None
    body: bytes = b""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What the service made of a request."""

    answer: bytes
    tasks: tuple[NewTask, ...] = ()
    broadcasts: tuple[NewBroadcast, ...] = ()


class Service(Protocol):
    """What is kept behind the broker, in the same database."""

    def execute(self, request: bytes, session: str) -> Served:
        """Answer a request of `session`, inside the open transaction. A `PrunusError` undoes the whole call."""
        ...

    def left(self, session: str) -> Iterable[NewTask]:
        """`session` is gone for good, and so are its claims on anything; in the commit that says so."""
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


class ExchangeStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the start, and what the core has in hand."""

    broker: Statistics
    frames: int
    calls: int
    commits: int
    protocol_errors: int


class Exchange(Generic[Route]):
    """See the module. One thread; `connection` is in autocommit mode (``isolation_level=None``) and nobody else's."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        service: Service | None = None,
        now: float = 0.0,
        lease_s: float = LEASE_S,
        failpoint: Callable[[str], None] = lambda name: None,
        on_session: Callable[[str, Peer | None], None] = lambda session, peer: None,
        before_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        """Read what is on disk and raise the broker epoch (one commit).

        `failpoint` is called with ``before_commit``, ``after_commit`` and (by the server) ``after_send``;
        `on_session` when a session is known (with its process) or gone (None); `before_batch` with the bytes that
        came, before anything is done with them.
        """
        if connection.isolation_level is not None:
            raise ValueError("open the connection with isolation_level=None: the exchange begins and commits itself")
        self._connection = connection
        self._service = service
        self.failpoint = failpoint
        self.on_session = on_session
        self.before_batch = before_batch
        self._refuse_changes: str | None = None
        self._unsaved: set[str] = set()
        """Sessions that came or went while the disk was full."""
        self._routes: dict[str, Route] = {}
        self._sessions: dict[Route, str] = {}
        self._offences: OrderedDict[Route, int] = OrderedDict()
        self._sends: list[tuple[Route, bytes]] = []
        self._news: list[tuple[str, Peer | None]] = []
        self._gone: list[str] = []
        """Sessions that the service has to be told are gone."""
        self._written = False
        self._timer_due = now
        """The `now` at which the service's timers are to be looked at."""
        self._stopped: BrokerStoppedError | None = None
        self._encoded: tuple[object, bytes] = None, b""
        self._made = self._frames = self._calls = self._commits = self._protocol_errors = 0
        try:
            self._begin()
            self._store = TaskStore(connection)
            self._core = BrokerCore(self._store.next_broker_epoch(), now, self._store.load(), lease_s=lease_s)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise BrokerStoppedError.of(error) from error

    # --- what happens ---

    def process(self, now: float, frames: Iterable[tuple[Route, bytes]]) -> list[tuple[Route, bytes]]:
        """Deal with frames that arrived together; what to send, all of it durable. Raises `BrokerStoppedError`."""
        frames = list(frames)
        self.before_batch(sum(len(frame) for _, frame in frames))

        def work() -> None:
            for route, frame in frames:
                self._take(now, route, frame)
            if now >= self._timer_due:  # a busy broker has no idle moment for a `tick`
                self._fire()

        return self._behind_the_barrier(work, now)

    def tick(self, now: float) -> list[tuple[Route, bytes]]:
        """Let time pass (see `due`)."""

        def work() -> None:
            self._apply(self._core.tick(now))
            self._fire()

        return self._behind_the_barrier(work, now)

    def expire(self, now: float, sessions: Iterable[str]) -> list[tuple[Route, bytes]]:
        """These sessions are certainly dead: their processes ended."""

        def work() -> None:
            for session in sessions:
                self._apply(self._core.expired(session))

        return self._behind_the_barrier(work, now)

    def put(self, now: float, tasks: Iterable[NewTask]) -> list[tuple[Route, bytes]]:
        """Store tasks of the broker's own making, each unless one with its key is pending."""
        return self._behind_the_barrier(lambda: self._put(tasks), now)

    def drop_route(self, route: Route) -> None:
        """A connection is gone. Its session is not: it may come back on another one."""
        session = self._sessions.pop(route, None)
        if session is not None:
            del self._routes[session]
            self._core.disconnected(session)

    def due(self) -> float:
        """The `now` at which `tick` must be called, at the latest."""
        return self._core.due() if self._refuse_changes is not None else min(self._core.due(), self._timer_due)

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
        if path is None and self._unsaved:
            known = self._core.sessions()
            unsaved, self._unsaved = self._unsaved, set()
            self._behind_the_barrier(
                lambda: self._apply(
                    [SaveSession(one, known[one]) if one in known else ForgetSession(one) for one in sorted(unsaved)]
                )
            )

    @property
    def broker_epoch(self) -> int:
        """How often this database was opened by a broker."""
        return self._core.broker_epoch

    def sessions(self) -> dict[str, Peer]:
        """The sessions that are not gone, with their processes; also those from before a restart."""
        return self._core.sessions()

    def has_task(self, key: str) -> bool:
        """Whether a task with this key is pending or held."""
        return self._core.has_task(key)

    def statistics(self) -> ExchangeStatistics:
        return ExchangeStatistics(
            broker=self._core.statistics(),
            frames=self._frames,
            calls=self._calls,
            commits=self._commits,
            protocol_errors=self._protocol_errors,
        )

    # --- the barrier ---

    def _behind_the_barrier(self, work: Callable[[], None], now: float | None = None) -> list[tuple[Route, bytes]]:
        if self._stopped is not None:
            raise self._stopped
        try:
            work()
            self._let_go()
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
        self._written = False
        if now is not None and self._service is not None:
            due = self._service.due()
            self._timer_due = math.inf if due is None else now + due
        sends, self._sends = self._sends, []
        news, self._news = self._news, []
        for session, peer in news:
            self.on_session(session, peer)
        return sends

    def _let_go(self) -> None:
        """Whoever is gone in this batch holds nothing any more, in the service too."""
        if self._service is None or self._refuse_changes is not None:
            return
        gone, self._gone = self._gone, []
        for session in gone:
            self._begin()
            self._written = True
            self._put(self._service.left(session))

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

    def _apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                route = self._routes.get(effect.session)
                if route is not None:
                    self._sends.append((route, self._frame(effect.message)))
                continue
            if self._refuse_changes is None or not isinstance(effect, _REGAINED):
                self._begin()
                self._written = True
                self._store.apply(effect)
            elif isinstance(effect, SaveSession | ForgetSession):
                self._unsaved.add(effect.session)
            if isinstance(effect, SaveSession):
                self._news.append((effect.session, effect.peer))
            elif isinstance(effect, ForgetSession):
                self._news.append((effect.session, None))
                self._gone.append(effect.session)
                route = self._routes.pop(effect.session, None)
                if route is not None:
                    del self._sessions[route]

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
        if isinstance(message, Hello):
            self._bind(route, message.session)
        session = self._sessions.get(route)
        if session is None:
            self._sends.append((route, self._frame(HelloNeeded())))
        elif isinstance(message, Call):
            self._call(now, session, message)
        else:
            self._apply(self._core.handle(now, session, message))

    def _bind(self, route: Route, session: str) -> None:
        """From now on this session speaks on this route."""
        before = self._sessions.get(route)
        if before == session:
            return
        if before is not None:
            self.drop_route(route)
        if (old := self._routes.get(session)) is not None:
            del self._sessions[old]
        self._routes[session], self._sessions[route] = route, session

    def _offence(self, route: Route, error: ProtocolError) -> None:
        self._protocol_errors += 1
        self._offences[route] = self._offences.get(route, 0) + 1
        if self._offences[route] == MAX_PROTOCOL_ERRORS:
            logger.warning("a connection sends nonsense; it is not listened to any more", extra={"reason": str(error)})
        while len(self._offences) > MAX_OFFENDERS:
            self._offences.popitem(last=False)
        self._sends.append((route, self._frame(Violation(reason=str(error)))))

    # --- calls ---

    def _call(self, now: float, session: str, call: Call) -> None:
        """All requests, then the acknowledgements (so that they free their keys), then the new tasks; or nothing."""
        if not self._core.heard(now, session):
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
            served = [self._execute(request, session) for request in call.requests]
            frame = encode(CallDone(id=call.id, answers=tuple(one.answer for one in served)))
            if self._refuse_changes is not None and (call.acks or self._connection.total_changes != changes):
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
        if self._connection.total_changes == changes and not call.acks and not tasks:
            self._apply([Send(session, frame)])  # nothing was changed: asking again is harmless
            return
        self._written = True
        # The answer is the first to leave: it frees the place of a task that may be delivered in this very commit.
        self._apply(self._core.answer(session, call.id, frame))
        for task_id, epoch in call.acks:
            self._apply(self._core.settle(session, task_id, epoch))
        self._put(tasks)
        for one in served:
            for news in one.broadcasts:
                self._apply(self._core.broadcast(news.body, news.sender, news.subject))

    def _execute(self, request: bytes, session: str) -> Served:
        if self._service is None:
            raise NotDeliveredError("the service: this broker has none")
        return self._service.execute(request, session)

    def _put(self, tasks: Iterable[NewTask]) -> None:
        for task in tasks:
            self._made += 1
            task_id = f"{self._core.broker_epoch:x}-{self._made:x}"
            self._apply(self._core.put(task_id, task.queue, task.key, task.body, task.priority))
