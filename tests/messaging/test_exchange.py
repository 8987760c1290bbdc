"""Core, store and service behind one commit: what is durable when something is sent, and what is undone."""

from __future__ import annotations

import sqlite3
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from prunus.errors import (
    BusyError,
    DeadLetterError,
    Failure,
    InvalidStateError,
    MessageTooLargeError,
    NotDeliveredError,
    ProtocolError,
    RemoteError,
    StoreFullError,
)
from prunus.messaging import broker, exchange, queues
from prunus.messaging.access import Principal, Role
from prunus.messaging.blobs import BlobStore
from prunus.messaging.communicator import MAX_BODY_BYTES
from prunus.messaging.exchange import (
    MAX_ANSWERS_BYTES,
    MAX_PROTOCOL_ERRORS,
    REFUSAL_LOGGED_EACH_S,
    BrokerStoppedError,
    Exchange,
    NewBroadcast,
    NewTask,
    Served,
)
from prunus.messaging.inventory import MAX_HOST_CHARS, QueueLimits, fitting, shown_host
from prunus.messaging.liveness import this_peer
from prunus.messaging.messages import (
    MAX_FRAME_BYTES,
    Alive,
    BroadcastDelivery,
    BroadcastSend,
    BroadcastSubscribe,
    BrokerMessage,
    Call,
    CallDone,
    ClientMessage,
    Done,
    Goodbye,
    Heartbeat,
    Hello,
    HelloNeeded,
    Missed,
    Peer,
    QueueConfigure,
    Refused,
    ResourceConfigure,
    RpcRequest,
    RpcSubscribe,
    StatisticsAsk,
    StatisticsTold,
    TaskAck,
    TaskDelivery,
    TaskEdit,
    TaskList,
    TaskNack,
    TaskResult,
    TaskSend,
    TasksListed,
    TaskStored,
    TaskSubscribe,
    Unwelcome,
    Violation,
    Welcome,
    decode_answers,
    decode_from_broker,
    encode,
)
from prunus.messaging.queues import MAX_GIVEN_BYTES
from prunus.messaging.taskstore import TaskStore
from prunus.testing.communicator_contract import ContractService


class Crashed(Exception):
    """A failpoint: here the process ends."""


class Desk:
    """An exchange over a database file, and routes that say things to it."""

    def __init__(self, path: Path, fail_at: str = "") -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.fail_at = fail_at
        self.passed: list[str] = []
        self.wall = 1_000_000.0
        """The time by the clock of the service."""
        self.exchange: Exchange[str] = Exchange(
            self.connection,
            service=ContractService(self.connection, clock=lambda: self.wall),
            failpoint=self._failpoint,
        )

    def _failpoint(self, name: str) -> None:
        self.passed.append(name)
        if name == self.fail_at:
            raise Crashed(name)

    def say(self, *said: tuple[str, ClientMessage | bytes], now: float = 0.0) -> list[tuple[str, BrokerMessage]]:
        frames = [(route, one if isinstance(one, bytes) else encode(one)) for route, one in said]
        return [(route, decode_from_broker(frame)) for route, frame in self.exchange.process(now, frames)]

    def hello(self, route: str, session: str, **stated: object) -> list[tuple[str, BrokerMessage]]:
        return self.say((route, Hello(session=session, peer=Peer(), **stated)))  # type: ignore[arg-type]

    def words(self) -> list[str]:
        return [word for (word,) in self.connection.execute("SELECT word FROM word ORDER BY rowid")]

    def tasks(self) -> set[str]:
        return {one.id for one in TaskStore(self.connection).load().tasks}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.db"


@pytest.fixture
def desk(path: Path) -> Iterator[Desk]:
    desk = Desk(path)
    yield desk
    desk.connection.close()


def send(number: int) -> TaskSend:
    return TaskSend(id=number, task=f"t{number}", body=b"")


# --- the barrier ---


def test_what_came_together_is_one_commit(desk: Desk) -> None:
    """Any number of frames in one batch cost one commit; a batch that changes nothing costs none."""
    desk.hello("r", "ann")
    desk.passed.clear()
    said = desk.say(*(("r", send(number)) for number in range(1, 101)))
    assert [message for _, message in said] == [
        TaskStored(id=number, task=f"t{number}", stored=True) for number in range(1, 101)
    ]
    assert desk.passed == ["before_commit", "after_commit"]
    desk.say(("r", Heartbeat()), ("r", Call(id=200, requests=(b"words",))))
    assert desk.passed == ["before_commit", "after_commit"]
    assert desk.exchange.statistics().commits == 2


@pytest.mark.parametrize("where", ["before_commit", "after_commit"])
def test_a_crash_around_the_commit(path: Path, where: str) -> None:
    """Before the commit nothing is kept, after it everything; the request that is said again is done exactly once."""
    desk = Desk(path)
    desk.hello("r", "ann")
    desk.fail_at = where
    request = Call(id=2, requests=(b"add once", b"task q k"))
    with pytest.raises(Crashed):
        desk.say(("r", send(1)), ("r", request))
    desk.connection.close()

    again = Desk(path)
    kept = where == "after_commit"
    assert again.words() == (["once"] if kept else [])
    assert ("t1" in again.tasks()) is kept
    again.hello("r", "ann")
    said = again.say(("r", send(1)), ("r", request))
    assert said == [("r", TaskStored(id=1, task="t1", stored=True)), ("r", CallDone(id=2, answers=(b"1", b"")))]
    assert again.words() == ["once"]
    assert len(again.tasks()) == 2
    again.connection.close()


def test_each_start_raises_the_epoch(path: Path) -> None:
    """The broker epoch of a database rises with every start, and is durable before anything is said."""
    for expected in (1, 2, 3):
        desk = Desk(path)
        assert desk.exchange.broker_epoch == expected
        desk.connection.close()


def test_an_error_of_the_database_stops_everything(desk: Desk) -> None:
    """Nothing of that batch is sent, and nothing is done any more: the process must end."""
    desk.hello("r", "ann")
    desk.connection.execute("DROP TABLE broker_task")
    for _ in range(2):
        with pytest.raises(BrokerStoppedError, match="broker_task"):
            desk.say(("r", send(1)))


def test_an_error_of_the_database_inside_a_call_stops_everything(desk: Desk) -> None:
    """It is no answer of the service: nobody is told that his call was refused."""
    desk.hello("r", "ann")
    desk.connection.execute("DROP TABLE word")
    with pytest.raises(BrokerStoppedError):
        desk.say(("r", Call(id=1, requests=(b"add a",))))


def test_a_connection_that_commits_by_itself_is_needed() -> None:
    """The exchange begins and commits; a connection with implicit transactions is misuse."""
    connection = sqlite3.connect(":memory:")
    with pytest.raises(ValueError, match="isolation_level"):
        Exchange(connection)
    connection.close()


def test_other_tables_are_left_alone(desk: Desk) -> None:
    """All tables of the broker carry its name; the service's live beside them."""
    names = {name for (name,) in desk.connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert {name for name in names if not name.startswith("broker_")} == {"word", "timer"}


# --- calls ---


def call_with_task(desk: Desk, *requests: bytes) -> tuple[list[tuple[str, BrokerMessage]], TaskDelivery]:
    """``bob`` holds a task with key k and acknowledges it in a call."""
    desk.hello("b", "bob", queues=(("default", 5),))
    [_, (_, delivery)] = desk.say(("b", TaskSend(id=1, task="t1", body=b"", key="k")))
    assert isinstance(delivery, TaskDelivery)
    return desk.say(("b", Call(id=2, requests=requests, acks=(("t1", delivery.epoch),)))), delivery


def test_checkpoint_acknowledgement_and_new_task_are_one(desk: Desk) -> None:
    """The acknowledgement frees the key, so the new task of the same key is delivered in the same breath."""
    said, _ = call_with_task(desk, b"add a", b"task default k")
    [(_, answer), (_, following)] = sorted(said, key=lambda one: isinstance(one[1], TaskDelivery))
    assert answer == CallDone(id=2, answers=(b"1", b""))
    assert isinstance(following, TaskDelivery)
    assert following.key == "k"
    assert desk.tasks() == {following.task}


@pytest.mark.parametrize(("request_", "error"), [(b"refuse", InvalidStateError), (b"break", RemoteError)])
def test_a_refused_call_did_nothing(desk: Desk, request_: bytes, error: type[Exception]) -> None:
    """Neither the requests before it, nor the acknowledgement, nor the new tasks: the task is still held."""
    [(_, refused)], delivery = call_with_task(desk, b"add a", b"task default z", request_)
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), error)
    assert desk.words() == []
    assert desk.tasks() == {"t1"}
    assert desk.say(("b", TaskAck(id=3, task="t1", epoch=delivery.epoch))) == [("b", Done(id=3))]


def test_a_refused_call_undoes_only_itself(desk: Desk) -> None:
    """Other requests of the same batch are committed."""
    desk.hello("r", "ann")
    desk.say(
        ("r", Call(id=1, requests=(b"add a",))),
        ("r", Call(id=2, requests=(b"add b", b"refuse"))),
        ("r", Call(id=3, requests=(b"add c",))),
    )
    assert desk.words() == ["a", "c"]


def test_a_call_that_is_said_again_is_done_once(desk: Desk) -> None:
    """Also on another connection; a refused one, which did nothing, is tried again."""
    desk.hello("r", "ann")
    request = Call(id=1, requests=(b"add a",))
    first = desk.say(("r", request))
    assert desk.say(("r", request)) == first
    desk.hello("r2", "ann")
    assert desk.say(("r2", request)) == [("r2", CallDone(id=1, answers=(b"1",)))]
    assert desk.words() == ["a"]


class Answering:
    """What a service is that only answers."""

    def left(self, session: str, lost: object) -> tuple[NewTask, ...]:
        return ()

    def due(self) -> None:
        return None

    def tick(self) -> tuple[NewTask, ...]:
        return ()


class Flood(Answering):
    """A service that answers with so many bytes."""

    def __init__(self, size: int) -> None:
        self._answer = b"x" * size
        self.executed = 0

    def execute(self, request: bytes, session: str, role: Role) -> Served:
        self.executed += 1
        return Served(answer=self._answer)


def answered_with(
    size: int,
    path: Path,
    blobs: BlobStore | None,
    role: Role = Role.OWNER,
    number: int = 2,
    service: Flood | None = None,
) -> BrokerMessage:
    connection = sqlite3.connect(path, isolation_level=None)
    exchange: Exchange[str] = Exchange(
        connection, service=service or Flood(size), blobs=blobs, principal_of=lambda route: Principal(None, role)
    )
    exchange.process(0.0, [("r", encode(Hello(session="s", peer=Peer())))])
    [(_, frame)] = exchange.process(0.0, [("r", encode(Call(id=1, requests=(b"",) * number)))])
    connection.close()
    return decode_from_broker(frame)


def test_answers_that_are_too_large_for_a_message_travel_as_a_blob(path: Path) -> None:
    """A claim may have all that the children of a process came to."""
    blobs = BlobStore(path.parent / "blobs", 0.0)
    small = answered_with(MAX_BODY_BYTES // 2, path, blobs)
    assert isinstance(small, CallDone)
    assert [len(answer) for answer in small.answers] == [MAX_BODY_BYTES // 2] * 2
    assert small.blob is None
    large = answered_with(MAX_BODY_BYTES // 2 + 1, path, blobs)
    assert isinstance(large, CallDone)
    assert large.answers == ()
    assert large.blob is not None
    assert decode_answers(b"".join(blobs.chunks(large.blob))) == [b"x" * (MAX_BODY_BYTES // 2 + 1)] * 2


@pytest.mark.parametrize(
    ("size", "role", "has_blobs"),
    [
        (MAX_FRAME_BYTES, Role.OWNER, False),
        (MAX_FRAME_BYTES, Role.VIEWER, True),
        (MAX_ANSWERS_BYTES // 2 + 1, Role.OWNER, True),
    ],
)
def test_an_answer_that_is_too_large_undoes_the_call(size: int, role: Role, has_blobs: bool, path: Path) -> None:
    """Nobody could be told what was done, so it is not done."""
    refused = answered_with(size, path, BlobStore(path.parent / "blobs", 0.0) if has_blobs else None, role)
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), MessageTooLargeError)


@pytest.mark.parametrize(("role", "limit"), [(Role.OWNER, MAX_ANSWERS_BYTES), (Role.VIEWER, MAX_FRAME_BYTES)])
def test_no_more_is_answered_than_somebody_could_be_told(role: Role, limit: int, path: Path) -> None:
    """Many small requests for what is large take no more memory than one answer may have: the rest is not executed."""
    size, number = limit // 4 + 1, 100
    service = Flood(size)
    refused = answered_with(size, path, BlobStore(path.parent / "blobs", 0.0), role, number, service)
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), MessageTooLargeError)
    assert service.executed == 4


def test_what_may_be_large_waits_until_its_peer_has_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its order, and `Goodbye` behind it; other requests of that peer and all of others do not wait."""
    monkeypatch.setattr(exchange, "MAX_TOLD_BYTES", 1)
    stuck: set[str] = set()
    desk.exchange.is_stuck = lambda route: route in stuck
    desk.hello("r", "s")
    desk.hello("other", "o")

    def told(*said: tuple[str, ClientMessage]) -> list[tuple[str, int]]:
        return [(route, getattr(answer, "id", -1)) for route, answer in desk.say(*said)]

    def ask(number: int) -> Call:
        return Call(id=number, requests=(b"words",))

    said = told(("r", ask(1)), ("r", TaskList(id=2)), ("r", send(3)), ("r", Goodbye(id=4)), ("other", ask(1)))
    assert said == [("r", 1), ("r", 3), ("other", 1)]
    assert desk.exchange.due() <= 0.0
    stuck.add("r")
    assert desk.exchange.due() > 0.0
    assert told(("other", ask(2))) == [("other", 2)]
    stuck.clear()
    assert [getattr(decode_from_broker(frame), "id", -1) for _, frame in desk.exchange.tick(0.0)] == [2]
    assert told() == [("r", 4)]
    assert desk.exchange.due() > 0.0


@pytest.mark.parametrize(
    ("bound", "value"), [("MAX_LATER", 2), ("MAX_LATER_BYTES", 2 * len(encode(StatisticsAsk(id=1))))]
)
def test_what_waits_until_its_peer_has_read_has_a_bound(
    bound: str, value: int, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more is refused; with the connection all of it is gone, and said again."""
    monkeypatch.setattr(exchange, bound, value)
    desk.hello("r", "s")
    desk.exchange.is_stuck = lambda route: True
    [(_, refused)] = desk.say(*(("r", StatisticsAsk(id=number)) for number in (1, 2, 3)))
    assert isinstance(refused, Refused)
    assert refused.id == 3
    assert isinstance(refused.failure.to_exception(), BusyError)
    desk.exchange.drop_route("r")
    desk.exchange.is_stuck = lambda route: False
    assert desk.exchange.due() > 0.0
    assert desk.say() == []


def test_answers_take_no_space_that_others_need(path: Path) -> None:
    """On a disk that would be full with them the call is undone; what comes after it is done."""
    connection = sqlite3.connect(path, isolation_level=None)

    def full_with(size: int) -> str | None:
        return "the disk" if size > MAX_BODY_BYTES else None

    blobs = BlobStore(path.parent / "blobs", 0.0, full_with)
    desk: Exchange[str] = Exchange(connection, service=Flood(MAX_BODY_BYTES), blobs=blobs)
    desk.process(0.0, [("r", encode(Hello(session="s", peer=Peer())))])
    frames = [encode(Call(id=1, requests=(b"", b""))), encode(send(2))]
    [(_, refused), (_, stored)] = desk.process(0.0, [("r", frame) for frame in frames])
    connection.close()
    refused, stored = decode_from_broker(refused), decode_from_broker(stored)
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), StoreFullError)
    assert isinstance(stored, TaskStored)
    assert not [one for one in (path.parent / "blobs").rglob("*") if one.is_file()]


def test_without_a_service(path: Path) -> None:
    """A call to a broker that has no service had no effect; one without requests is still good for acknowledgements."""
    connection = sqlite3.connect(path, isolation_level=None)
    exchange: Exchange[str] = Exchange(connection)
    exchange.process(0.0, [("r", encode(Hello(session="s", peer=Peer())))])
    said = exchange.process(0.0, [("r", encode(Call(id=1, requests=(b"x",)))), ("r", encode(Call(id=2, requests=())))])
    refused, done = (decode_from_broker(frame) for _, frame in said)
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), NotDeliveredError)
    assert done == CallDone(id=2, answers=())
    connection.close()


def test_tasks_of_the_brokers_own(desk: Desk) -> None:
    """`put` stores tasks, each unless its key is pending, with ids that no later start uses again."""
    desk.exchange.put(0.0, [NewTask(queue="q", key="a"), NewTask(queue="q", key="a"), NewTask(queue="q", key="b")])
    assert len(desk.tasks()) == 2


def test_the_brokers_own_tasks_that_wait_in_vain_are_told_to_the_log(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """They are stored all the same; once for each resource, with what to do."""
    desk.exchange.put(0.0, [NewTask(queue="q", key=key, needs=(("gpu", 1),)) for key in "ab"])
    assert len(desk.tasks()) == 2
    [said] = [record.getMessage() for record in caplog.records]
    assert "prunus broker resource gpu" in said


# --- routes and sessions ---


def test_a_session_moves_to_its_newest_route(desk: Desk) -> None:
    """After `Hello` on another route the old one is a stranger, and everything is sent to the new one."""
    desk.hello("old", "bob", queues=(("default", 5),))
    desk.hello("ann", "ann")
    desk.hello("new", "bob", queues=(("default", 5),))
    assert desk.say(("old", Heartbeat())) == [("old", HelloNeeded())]
    assert [route for route, message in desk.say(("ann", send(1))) if isinstance(message, TaskDelivery)] == ["new"]


def test_a_route_that_changes_its_session(desk: Desk) -> None:
    """A connection speaks for the session that said `Hello` on it last; the other one is away, not gone."""
    desk.hello("r", "ann")
    desk.hello("r", "bob")
    assert set(desk.exchange.sessions()) == {"ann", "bob"}
    assert sum(one.connected for one in desk.exchange.statistics().sessions.values()) == 1


def test_news_of_sessions(desk: Desk) -> None:
    """`on_session` tells, after the commit, who came and who is gone."""
    news: list[tuple[str, Peer | None]] = []
    desk.exchange.on_session = lambda session, peer: news.append((session, peer))
    desk.hello("r", "ann")
    desk.hello("r", "ann")
    desk.hello("s", "bob")
    assert desk.say(("r", Goodbye(id=1))) == [("r", Done(id=1))]
    desk.exchange.expire(0.0, ["bob"])
    assert news == [("ann", Peer()), ("bob", Peer()), ("ann", None), ("bob", None)]
    assert desk.say(("r", Heartbeat())) == [("r", HelloNeeded())]


def test_a_dropped_route(desk: Desk) -> None:
    """Its session lives; what is meant for it is not sent."""
    desk.hello("r", "ann")
    desk.exchange.drop_route("r")
    desk.exchange.drop_route("r")
    assert set(desk.exchange.sessions()) == {"ann"}
    assert desk.hello("r", "ann") == [("r", Welcome(broker_epoch=1))]
    assert desk.say(("r", Heartbeat())) == [("r", Alive())]


def test_nonsense_is_counted_and_then_ignored(desk: Desk) -> None:
    """Each piece is answered with its reason and changes nothing; after too many the route is not heard any more."""
    desk.hello("r", "ann")
    for _ in range(MAX_PROTOCOL_ERRORS):
        [(_, violation)] = desk.say(("r", b"nonsense"))
        assert isinstance(violation, Violation)
    assert desk.say(("r", b"nonsense"), ("r", Heartbeat())) == []
    assert desk.exchange.statistics().protocol_errors == MAX_PROTOCOL_ERRORS
    assert desk.hello("other", "bob") == [("other", Welcome(broker_epoch=1))]


def test_what_a_call_made_true_is_told_after_its_commit(path: Path) -> None:
    """The service's broadcasts reach whoever listens; those of a call that was undone reach nobody."""

    class Announcer(Answering):
        def execute(self, request: bytes, session: str, role: Role) -> Served:
            if request == b"refuse":
                raise InvalidStateError("finished", "waiting")
            return Served(answer=b"", broadcasts=(NewBroadcast(sender="p", subject="s", body=request),))

    connection = sqlite3.connect(path, isolation_level=None)
    exchange: Exchange[str] = Exchange(connection, service=Announcer())
    hello = Hello(session="listener", peer=Peer(), patterns=((1, "p", "s"),))
    exchange.process(0.0, [("l", encode(hello)), ("r", encode(Hello(session="s", peer=Peer())))])
    calls = Call(id=1, requests=(b"a", b"refuse")), Call(id=2, requests=(b"b",), acks=(("t", 1),))
    said = exchange.process(0.0, [("r", encode(call)) for call in calls])
    heard = [decode_from_broker(frame) for route, frame in said if route == "l"]
    assert heard == [BroadcastDelivery(body=b"b", sender="p", subject="s")]
    connection.close()


def test_keys_that_have_a_task(desk: Desk) -> None:
    """A key has a task while one of it is pending or held."""
    assert not desk.exchange.has_task("k")
    desk.hello("b", "bob", queues=(("default", 5),))
    desk.exchange.put(0.0, [NewTask(queue="elsewhere", key="k")])
    assert desk.exchange.has_task("k")
    said = desk.say(("b", TaskSend(id=1, task="t1", body=b"", key="j")))
    assert desk.exchange.has_task("j")
    [delivery] = [message for _, message in said if isinstance(message, TaskDelivery)]
    desk.say(("b", TaskAck(id=2, task="t1", epoch=delivery.epoch)))
    assert not desk.exchange.has_task("j")


# --- timers of the service ---


def timer(number: int, seconds: float, queue: str = "q") -> ClientMessage:
    return Call(id=number, requests=(f"timer {seconds} {queue}".encode(),))


def test_a_timer_fires_in_a_tick_when_its_time_has_come(desk: Desk) -> None:
    """One commit, and not before; until then nobody is asked to look earlier than it is due."""
    desk.hello("r", "ann")
    desk.exchange.tick(10.0)
    desk.say(("r", timer(1, 0.5)), now=10.0)
    assert desk.exchange.due() == 10.5
    desk.wall += 0.4
    desk.passed.clear()
    desk.exchange.tick(10.4)
    assert (desk.tasks(), desk.passed) == (set(), [])
    desk.wall += 0.1
    desk.exchange.tick(10.5)
    assert (len(desk.tasks()), desk.passed) == (1, ["before_commit", "after_commit"])
    desk.exchange.tick(10.6)
    assert len(desk.tasks()) == 1


def test_without_a_service_nobody_looks_at_its_timers() -> None:
    """A broker that has nothing to do waits, instead of looking again and again."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    assert Exchange(connection, now=5.0).due() > 5.0
    connection.close()


def test_without_a_timer_nobody_is_woken_for_one(desk: Desk) -> None:
    """Nor for one that is far away: then `due` is what it is for the broker itself, and most ticks write nothing."""
    desk.hello("r", "ann")
    quiet = desk.exchange.due()
    desk.say(("r", timer(1, 1e6)))
    assert desk.exchange.due() == quiet
    desk.passed.clear()
    desk.exchange.tick(0.5)
    assert desk.passed == []


def test_a_jump_of_the_clock_is_seen_within_a_second(desk: Desk) -> None:
    """Forwards: what is late then fires at the next tick, which is due. Backwards: it waits longer."""
    desk.hello("r", "ann")
    desk.say(("r", timer(1, 3600)), now=10.0)
    desk.wall += 7200
    assert desk.exchange.due() <= 11.0
    desk.exchange.tick(11.0)
    assert len(desk.tasks()) == 1
    desk.say(("r", timer(2, 0.5)), now=12.0)
    desk.wall -= 3600
    desk.exchange.tick(12.5)
    assert len(desk.tasks()) == 1
    desk.wall += 3600.5
    desk.exchange.tick(13.5)
    assert len(desk.tasks()) == 2


def test_only_commits_and_ticks_look_at_the_timers(path: Path) -> None:
    """Not every batch: most of them can't have set one, and each look is a query."""

    class Counting(ContractService):
        looks = 0

        def due(self) -> float | None:
            self.looks += 1
            return super().due()

    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        service = Counting(connection, clock=lambda: wall)
        wall = 1_000_000.0
        exchange: Exchange[str] = Exchange(connection, service=service)
        exchange.process(0.0, [("r", encode(Hello(session="s", peer=Peer())))])
        exchange.process(0.0, [("r", encode(timer(1, 3600)))])
        exchange.tick(0.0)
        assert exchange.due() <= 1.0
        looks, ticks, now = service.looks, 0, 0.0
        read = [("r", encode(Heartbeat())), ("r", encode(Call(id=2, requests=(b"words",))))]
        for _ in range(400):
            now += 0.01
            exchange.process(now, read)
            if now >= exchange.due():
                ticks += 1
                exchange.tick(now)
        assert ticks <= 4
        assert service.looks - looks <= 2 * ticks
        wall += 3600.0
        jumped = now
        while not list(TaskStore(connection).load().tasks):
            now += 0.01
            exchange.process(now, read)
            if now >= exchange.due():
                exchange.tick(now)
        assert now - jumped <= 1.02, "within a second, whatever else is said"


def test_a_timer_that_a_jump_brings_near_fires_in_time(desk: Desk) -> None:
    """The tick that sees the jump knows how long is left."""
    desk.hello("r", "ann")
    desk.say(("r", timer(1, 3600)), now=10.0)
    desk.wall += 3599.75
    desk.exchange.tick(11.0)
    assert (desk.tasks(), desk.exchange.due()) == (set(), 11.25)


def test_a_late_timer_fires_after_a_restart(path: Path) -> None:
    """At once: a new broker is due at the moment of its start."""
    first = Desk(path)
    first.hello("r", "ann")
    first.say(("r", timer(1, 60)))
    first.connection.close()
    again = Desk(path)
    again.wall = first.wall + 61
    assert again.exchange.due() <= 0.0
    again.exchange.tick(0.0)
    assert len(again.tasks()) == 1
    again.connection.close()


def test_a_busy_broker_fires_timers_in_the_commit_of_a_batch(desk: Desk) -> None:
    """It may have no idle moment for a tick."""
    desk.hello("r", "ann")
    desk.say(("r", timer(1, 0.5)), now=10.0)
    desk.wall += 0.5
    desk.passed.clear()
    desk.say(("r", Heartbeat()), now=10.5)
    assert (len(desk.tasks()), desk.passed) == (1, ["before_commit", "after_commit"])


def test_on_a_full_disk_timers_wait(desk: Desk) -> None:
    """Nothing is changed, and nobody is woken in vain; with space again they are due at once."""
    desk.hello("r", "ann")
    desk.exchange.tick(10.0)
    desk.say(("r", timer(1, 0.5)), now=10.0)
    desk.wall += 1
    desk.exchange.refuse_changes = "somewhere"
    assert desk.exchange.due() > 10.5
    desk.exchange.tick(11.0)
    desk.say(("r", Heartbeat()), now=11.0)
    assert desk.tasks() == set()
    desk.exchange.refuse_changes = None
    assert desk.exchange.due() <= 11.0
    desk.exchange.tick(11.0)
    assert len(desk.tasks()) == 1


def test_a_disk_that_is_full_at_a_timer_stops_everything(path: Path) -> None:
    """It is the service's own doing, so nobody is there to be refused: this process must start again from the disk."""

    class Full(ContractService):
        def tick(self) -> tuple[NewTask, ...]:
            raise StoreFullError("somewhere")

    connection = sqlite3.connect(path, isolation_level=None)
    wall = 0.0
    exchange: Exchange[str] = Exchange(connection, service=Full(connection, clock=lambda: wall))
    exchange.process(0.0, [("r", encode(Hello(session="s", peer=Peer()))), ("r", encode(timer(1, 1)))])
    wall = 1.0
    for _ in range(2):
        with pytest.raises(BrokerStoppedError) as caught:
            exchange.tick(0.0)
        assert caught.value.full
    connection.close()


# --- what a broker that starts again knows ---


def restarted(desk: Desk, path: Path) -> Desk:
    desk.connection.close()
    return Desk(path)


def test_what_was_done_is_known_after_a_restart(path: Path) -> None:
    """A request that is said again is answered as the first time; one that was refused is tried again."""
    desk = Desk(path)
    desk.hello("r", "ann")
    joining = TaskSend(id=3, task="t3", body=b"", key="k")
    desk.say(("r", send(1)), ("r", TaskSend(id=2, task="t2", body=b"", key="k")), ("r", joining))
    desk.exchange.refuse_new = "somewhere"
    desk.say(("r", send(4)))
    desk.exchange.refuse_new = None
    desk.say(("r", send(5)))
    again = restarted(desk, path)
    again.hello("r", "ann", seen=1)
    before = again.tasks()
    said = again.say(("r", send(1)), ("r", joining), ("r", send(5)))
    assert [message for _, message in said] == [
        TaskStored(id=1, task="t1", stored=True),
        TaskStored(id=3, task="t2", stored=False),
        TaskStored(id=5, task="t5", stored=True),
    ]
    assert again.tasks() == before
    assert again.say(("r", send(4))) == [("r", TaskStored(id=4, task="t4", stored=True))]
    assert again.tasks() == before | {"t4"}
    again.connection.close()


def test_a_batch_of_tasks_is_no_row_of_its_client(desk: Desk) -> None:
    """What was done follows from a mark, which stands beside the last of them: a hundred tasks cost a hundred rows."""
    desk.hello("r", "ann")
    before = desk.connection.total_changes
    desk.say(*(("r", send(number)) for number in range(1, 101)))
    assert desk.connection.total_changes == before + 100


def test_a_task_that_comes_and_goes_in_a_batch_is_no_row(desk: Desk) -> None:
    """Only that it was done is written."""
    desk.hello("b", "bob", queues=(("default", 5),))
    epoch = (1 << 32) + 1
    before = desk.connection.total_changes
    desk.say(("b", send(1)), ("b", TaskAck(id=2, task="t1", epoch=epoch)))
    assert desk.connection.total_changes == before + 1
    assert desk.tasks() == set()


# --- sessions have secrets ---


@pytest.mark.parametrize("after", ["while it is there", "after its lease", "after a restart"])
def test_a_session_cannot_be_taken_over(path: Path, after: str) -> None:
    """A `Hello` with another secret is refused with the reason, and changes nothing."""
    desk = Desk(path)
    desk.hello("r", "ann", secret="hers", queues=(("default", 5),))
    if after == "after its lease":
        desk.exchange.expire(0.0, ["ann"])
    elif after == "after a restart":
        desk = restarted(desk, path)
    for secret in ("his", ""):
        [(route, unwelcome)] = desk.hello("thief", "ann", secret=secret)
        assert route == "thief"
        assert isinstance(unwelcome, Unwelcome)
        assert isinstance(unwelcome.failure.to_exception(), ProtocolError)
        assert "belongs to somebody else" in unwelcome.failure.message
        assert desk.say(("thief", Heartbeat())) == [("thief", HelloNeeded())]
    if after == "while it is there":
        assert desk.say(("r", Heartbeat())) == [("r", Alive())]
    [(_, welcome)] = desk.hello("r2", "ann", secret="hers")
    assert isinstance(welcome, Welcome)
    assert b"hers" not in path.read_bytes()
    desk.connection.close()


def test_who_left_for_good_does_nothing_twice(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not have heard the answer to what it said before its goodbye; so it is remembered for a while."""
    monkeypatch.setattr(broker, "MAX_RETIRED", 1)
    desk.hello("r", "ann", secret="hers")
    call = Call(id=2, requests=(b"add a",))
    said = desk.say(("r", send(1)), ("r", call), ("r", Goodbye(id=3)))
    desk.hello("r", "ann", secret="hers")
    assert desk.say(("r", send(1)), ("r", call)) == said[:2]
    assert (len(desk.tasks()), desk.words()) == (1, ["a"])
    for name in ("ann", "bob"):
        desk.hello(name, name, secret="x" if name == "bob" else "hers")
        desk.say((name, Goodbye(id=4)))
    assert desk.connection.execute("SELECT session FROM broker_client").fetchall() == [("bob",)]
    assert desk.connection.execute("SELECT * FROM broker_answer").fetchall() == []


def test_sessions_and_subscriptions_have_a_bound(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused to the one who asks; those that are there go on, and come back."""
    monkeypatch.setattr(broker, "MAX_SESSIONS", 1)
    for what in ("MAX_TASK_SUBSCRIPTIONS", "MAX_PATTERNS", "MAX_IDENTIFIERS"):
        monkeypatch.setattr(broker, what, 1)
    desk.hello("r", "ann")
    [(_, unwelcome)] = desk.hello("s", "bob")
    assert isinstance(unwelcome, Unwelcome)
    assert isinstance(unwelcome.failure.to_exception(), BusyError)
    assert list(desk.exchange.principals()) == ["ann"], "nothing is kept of who is refused"
    assert desk.say(("r", Heartbeat())) == [("r", Alive())]
    assert isinstance(desk.hello("r2", "ann")[0][1], Welcome)
    for number, (first, second) in enumerate(
        (
            (TaskSubscribe(id=1, queue="a", credit=1), TaskSubscribe(id=2, queue="b", credit=1)),
            (RpcSubscribe(id=3, identifier="a"), RpcSubscribe(id=4, identifier="b")),
            (BroadcastSubscribe(id=5, subscription=1), BroadcastSubscribe(id=6, subscription=2)),
        )
    ):
        said = [message for _, message in desk.say(("r2", first), ("r2", second), ("r2", first))]
        assert [type(message) for message in said] == [Done, Refused, Done], number
        assert isinstance(said[1], Refused)
        assert isinstance(said[1].failure.to_exception(), BusyError)
    for stated in (
        {"queues": (("a", 1), ("b", 1))},
        {"identifiers": (("a", 0), ("b", 0))},
        {"patterns": ((1, None, None), (2, None, None))},
    ):
        [(_, unwelcome)] = desk.hello("r2", "ann", **stated)
        assert isinstance(unwelcome, Unwelcome)
        assert "over the limit of 1" in unwelcome.failure.message


def test_a_session_that_is_refused_is_counted_and_told_to_the_log(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the bound that it reached; one that says it again and again does not fill the log."""
    monkeypatch.setattr(broker, "MAX_SESSIONS", 1)
    desk.hello("r", "ann")
    for number in range(5):
        hello = Hello(session=f"s{number}", peer=Peer())
        [(_, unwelcome)] = desk.say((f"r{number}", hello), now=REFUSAL_LOGGED_EACH_S * number / 4)
        assert isinstance(unwelcome, Unwelcome)
        assert unwelcome.failure.message == "the bound of 1 sessions is reached; try again when some are gone"
    told = [(record.getMessage(), record.session) for record in caplog.records]  # type: ignore[attr-defined]
    reason = "a session is refused: the bound of 1 sessions is reached; try again when some are gone"
    assert told == [(reason, "s0"), (reason, "s4")]
    assert desk.exchange.statistics().refused_connections == 5


# --- peers that do not read ---


def test_a_question_to_a_peer_that_does_not_read(desk: Desk) -> None:
    """`BusyError` to the caller at once; the same as soon as it reads again is asked."""
    stuck = {"b"}
    desk.exchange.is_stuck = lambda route: route in stuck
    desk.hello("b", "bob", identifiers=(("name", 0),))
    desk.hello("a", "ann")
    [(_, refused)] = desk.say(("a", RpcRequest(id=1, recipient="name", body=b"", timeout_s=1.0)))
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), BusyError)
    stuck.clear()
    [(route, _)] = desk.say(("a", RpcRequest(id=2, recipient="name", body=b"", timeout_s=1.0)))
    assert route == "b"


@pytest.mark.parametrize("told_by", ["tick", "broadcast"])
def test_broadcasts_that_were_missed_are_told(desk: Desk, told_by: str) -> None:
    """Those to a peer that does not read are dropped and counted; others get theirs."""
    stuck = {"b"}
    desk.exchange.is_stuck = lambda route: route in stuck
    desk.hello("b", "bob", patterns=((1, None, None),))
    desk.hello("c", "cat", patterns=((1, None, None),))
    for number in (1, 2, 3):
        said = desk.say(("c", BroadcastSend(id=number, body=b"%d" % number)))
        assert [route for route, _ in said] == ["c", "c"]
    assert desk.exchange.tick(1.0) == []
    stuck.clear()
    if told_by == "tick":
        [(_, frame)] = desk.exchange.tick(2.0)
        assert decode_from_broker(frame) == Missed(count=3)
    said = desk.say(("c", BroadcastSend(id=4, body=b"4")))
    heard = [message for route, message in said if route == "b"]
    missed = [] if told_by == "tick" else [Missed(count=3)]
    assert heard == [*missed, BroadcastDelivery(body=b"4", sender=None, subject=None)]
    assert desk.exchange.statistics().broadcasts_missed == 3


# --- bodies ---


def test_a_damaged_body_is_a_dead_letter(path: Path) -> None:
    """Its receiver gets the next one instead, who waits is told, and the body stays for who wants to look at it."""
    desk = Desk(path)
    desk.hello("a", "ann", secret="s")
    waiting = TaskSend(id=1, task="t1", body=b"good", want_result=True)
    desk.say(("a", waiting), ("a", TaskSend(id=2, task="t2", body=b"next")))
    desk.connection.execute("UPDATE broker_task SET body = x'ff' WHERE id = 't1'")
    again = restarted(desk, path)
    again.hello("a", "ann", awaited=("t1",), secret="s")
    said = again.hello("b", "bob", queues=(("default", 1),))
    [delivery] = [message for _, message in said if isinstance(message, TaskDelivery)]
    assert (delivery.task, delivery.body) == ("t2", b"next")
    [result] = [message for _, message in said if isinstance(message, TaskResult)]
    assert isinstance(result.outcome, Failure)
    assert isinstance(result.outcome.to_exception(), DeadLetterError)
    [(_, listed)] = again.say(("a", TaskList(id=3, place="dead", bodies=True)))
    assert isinstance(listed, TasksListed)
    [dead] = listed.tasks
    assert (dead.id, dead.body) == ("t1", b"\xff")
    assert "damaged" in (dead.reason or "")
    again.connection.close()


def test_what_a_session_said_before_is_not_true_any_more(desk: Desk) -> None:
    """A `Hello` of a connection that is gone may be read after that of the next one: it changes nothing, the session
    stays where it is."""
    desk.hello("first", "ann", turn=1)
    desk.hello("second", "ann", turn=2)
    desk.hello("b", "bob", queues=(("default", 1),))
    said = desk.say(("second", TaskSend(id=1, task="t1", body=b"", want_result=True)))
    [delivery] = [message for _, message in said if isinstance(message, TaskDelivery)]
    [told, _] = desk.say(("b", TaskAck(id=1, task="t1", epoch=delivery.epoch, outcome=b"one")))
    assert told == ("second", TaskResult(task="t1", outcome=b"one"))
    assert desk.hello("first", "ann", turn=1) == []
    assert desk.hello("other", "ann", turn=2) == []
    [_, again] = desk.hello("third", "ann", turn=3, awaited=("t1",))
    assert again == ("third", told[1])


def test_results_that_nobody_reads_take_no_memory(path: Path) -> None:
    """They are on the disk until their sender is there again, also over a restart."""
    number, size = 24, 1024 * 1024
    desk = Desk(path)
    desk.hello("a", "ann", secret="s")
    desk.hello("b", "bob", queues=(("default", number),))
    desk.exchange.drop_route("a")
    tracemalloc.start()
    try:
        for each in range(1, number + 1):
            desk.hello("a", "ann", secret="s", expected=tuple(f"t{one}" for one in range(each)))
            [(_, delivery)] = [
                one
                for one in desk.say(("a", TaskSend(id=each, task=f"t{each}", body=b"", want_result=True)))
                if isinstance(one[1], TaskDelivery)
            ]
            desk.exchange.drop_route("a")
            assert isinstance(delivery, TaskDelivery)
            desk.say(("b", TaskAck(id=each, task=delivery.task, epoch=delivery.epoch, outcome=b"x" * size)))
        del delivery
        assert tracemalloc.get_traced_memory()[0] < 3 * size
        desk = restarted(desk, path)
        assert tracemalloc.get_traced_memory()[0] < 3 * size
    finally:
        tracemalloc.stop()
    names = tuple(f"t{each}" for each in range(1, number + 1))
    told = [one for _, one in desk.hello("a", "ann", secret="s", awaited=names) if isinstance(one, TaskResult)]
    assert len(told) * size <= 2 * MAX_GIVEN_BYTES
    while len(told) < number:
        more = [decode_from_broker(frame) for _, frame in desk.exchange.tick(0.0)]
        assert more
        told += [one for one in more if isinstance(one, TaskResult)]
    assert {one.task: one.outcome for one in told} == dict.fromkeys(names, b"x" * size)
    desk.connection.close()


def test_very_many_damaged_bodies(path: Path) -> None:
    """All of them are dead letters, in the batch in which they would have been given out."""
    number = sys.getrecursionlimit()
    desk = Desk(path)
    desk.hello("a", "ann")
    desk.say(*(("a", send(each)) for each in range(1, number + 1)))
    desk.connection.execute("UPDATE broker_task SET body = x'ff'")
    again = restarted(desk, path)
    again.hello("b", "bob", queues=(("default", 1),))
    assert again.exchange.statistics().queues["default"].dead == number
    again.connection.close()


def test_a_damaged_body_whose_receiver_leaves_in_the_same_batch(path: Path) -> None:
    """Whoever would get it next does not get it either."""
    desk = Desk(path)
    desk.hello("a", "ann")
    desk.say(("a", send(1)))
    desk.connection.execute("UPDATE broker_task SET body = x'ff'")
    again = restarted(desk, path)
    again.hello("c", "cat")
    hello = Hello(session="bob", peer=Peer(), queues=(("default", 1),))
    again.say(("c", TaskSubscribe(id=1, queue="default", credit=0)), ("b", hello), ("b", Goodbye(id=1)))
    again.say(("c", TaskSubscribe(id=2, queue="default", credit=1)))
    assert again.exchange.statistics().queues["default"].dead == 1
    again.connection.close()


def test_tasks_are_listed_page_by_page(desk: Desk) -> None:
    """Oldest first, so many at a time; with their bodies as many as fit into a frame."""
    desk.hello("r", "ann")
    big = MAX_BODY_BYTES // 2 - 1000
    bodies = (b"1", b"2", bytes(big), bytes(big), bytes(big))
    for number, body in enumerate(bodies, start=1):
        desk.say(("r", TaskSend(id=number, task=f"t{number}", body=body, queue="q")))

    def page(**fields: object) -> tuple[list[str], bool]:
        [(_, listed)] = desk.say(("r", TaskList(id=9, **fields)))  # type: ignore[arg-type]
        assert isinstance(listed, TasksListed)
        assert all((task.body is not None) is bool(fields.get("bodies")) for task in listed.tasks)
        return [task.id for task in listed.tasks], listed.more

    assert page(queue="q", limit=3) == (["t1", "t2", "t3"], True)
    assert page(queue="q", limit=3, after=3) == (["t4", "t5"], False)
    assert page(queue="q", bodies=True) == (["t1", "t2", "t3", "t4"], True)
    assert page(queue="q", bodies=True, after=4) == (["t5"], False)
    assert page(task="t2") == (["t2"], False)
    assert page(queue="other") == ([], False)


def test_statistics_are_told(desk: Desk) -> None:
    """The counts of the exchange with those of the core."""
    desk.hello("r", "ann")
    desk.say(("r", send(1)), ("r", Call(id=2, requests=(b"words",))), ("r", b"nonsense"))
    [(_, told)] = desk.say(("r", StatisticsAsk(id=3)))
    assert isinstance(told, StatisticsTold)
    statistics = told.statistics
    assert (statistics.broker_epoch, statistics.accepted, statistics.frames) == (1, 1, 5)
    assert (statistics.commits, statistics.calls, statistics.protocol_errors) == (2, 1, 1)
    assert statistics.sessions["ann"].connected
    assert statistics.database_bytes > 0


def test_statistics_fit_into_a_message_whatever_was_done() -> None:
    """As many queues, resources and sessions as there may be, with the longest names and the largest numbers, fit both
    into the answer to a client and, as JSON, into that of the service; and nothing is left out."""
    core = broker.BrokerCore(2**40)
    host = '"' * 1024
    for number in range(broker.MAX_SESSIONS):
        core.handle(0.0, f"{number:0200}", Hello(session=f"{number:0200}", peer=Peer(host=host, pid=2**62)))
    assert core.refusal(Hello(session="one-more", peer=Peer())) is not None
    ann, effects = f"{0:0200}", list[broker.Effect]()
    limits = QueueLimits(concurrency=2**62, rate_per_s=1 / 3e-300, burst=queues.MAX_TASKS, max_length=2**62)
    name = queues.MAX_QUEUE_NAMES_BYTES // queues.MAX_QUEUES - 2
    for number in range(queues.MAX_QUEUES):
        effects += core.handle(0.0, ann, QueueConfigure(id=number + 1, queue=f"{number:0{name}}", limits=limits))
    name = queues.MAX_RESOURCE_NAMES_BYTES // queues.MAX_RESOURCES - 2
    for number in range(queues.MAX_RESOURCES):
        message = ResourceConfigure(id=10**6 + number, resource=f"{number:0{name}}", capacity=2**62)
        effects += core.handle(0.0, ann, message)
    assert all(isinstance(effect, broker.Send) and isinstance(effect.message, Done) for effect in effects)
    large = {"credit": 2**50, "questions": 2**50, "held": 2**50, "subscriptions": 2**50, "silent_s": 1e9 / 3}
    statistics = core.statistics(lambda session: ("controller", "k" * 64))
    sessions = {
        name: msgspec.structs.replace(one, **large, round_trip_s=1e9 / 7, connected=False)
        for name, one in statistics.sessions.items()
    }
    for number in range(2 * broker.MAX_RETIRED):  # these may come back whatever the bound is
        sessions[f"r{number:0199}"] = next(iter(sessions.values()))
    places = ("ready", "delayed", "blocked", "held", "dead", "subscribers")
    most = {
        **dict.fromkeys(places, queues.MAX_TASKS),
        **dict.fromkeys(("accepted", "settled", "rejected", "credit"), 2**50),
        **dict.fromkeys(("accepted_per_s", "settled_per_s", "oldest_s", "longest_held_s"), 1e9 / 7),
    }
    told = msgspec.structs.replace(
        statistics,
        sessions=sessions,
        queues={name: msgspec.structs.replace(one, **most) for name, one in statistics.queues.items()},
        resources={
            name: msgspec.structs.replace(one, taken=2**62, waiting=2**62) for name, one in statistics.resources.items()
        },
    )
    assert (len(told.queues), len(told.resources)) == (queues.MAX_QUEUES, queues.MAX_RESOURCES)
    assert fitting(told) is told
    assert len(encode(StatisticsTold(id=2**62, statistics=told))) < MAX_FRAME_BYTES
    assert len(encode(CallDone(id=2**62, answers=(msgspec.json.encode(told),)))) < MAX_FRAME_BYTES


def test_if_statistics_do_not_fit_the_empty_is_left_out_first(desk: Desk) -> None:
    """A broker may have more than there may be, by what was stored; then what is left out is counted."""
    desk.hello("r", "ann")
    desk.say(*(("r", TaskSend(id=1 + n, task=f"t{n}", body=b"", queue=f"q{n}")) for n in range(9)))
    desk.say(("r", TaskSend(id=10, task="more", body=b"", queue="q8")))
    desk.say(("r", TaskEdit(id=11, action="delete", tasks=("t0", "t1", "t2"))))
    desk.say(("r", ResourceConfigure(id=12, resource="gpu", capacity=1)))
    whole = desk.exchange.statistics()
    assert (len(whole.queues), whole.left_out) == (9, 0)
    size = len(msgspec.json.encode(whole))
    for max_bytes in (size, size - 1, size * 3 // 4, size // 2, size // 3, 0):
        part = fitting(whole, max_bytes)
        assert part.left_out == 9 + 1 + 1 - len(part.queues) - len(part.resources) - len(part.sessions)
        assert len(msgspec.json.encode(part)) <= max(max_bytes, 1000)
        if max_bytes == size - 1:
            assert {f"q{n}" for n in range(3, 9)} <= set(part.queues) < set(whole.queues)
            assert (part.sessions, part.resources) == (whole.sessions, whole.resources)
        elif max_bytes == size // 2:
            assert next(iter(part.queues)) == "q8", "the fullest is first"
            assert set(part.queues) < {f"q{n}" for n in range(3, 9)}
            assert set(part.sessions) == {"ann"}


def test_who_is_not_back_since_the_start_has_no_known_role(path: Path) -> None:
    """The key with which a session came is not stored: until it says who it is again, its role is `unknown`."""
    desk = Desk(path)
    with closing(desk.connection):
        desk.hello("r", "ann")
        assert desk.exchange.statistics().sessions["ann"].role == "owner"
    again = Desk(path)
    with closing(again.connection):
        [(name, ann)] = again.exchange.statistics().sessions.items()
        assert (name, ann.role, ann.key, ann.connected) == ("ann", "unknown", None, False)
        again.hello("r", "ann")
        ann = again.exchange.statistics().sessions["ann"]
        assert (ann.role, ann.connected) == ("owner", True)


def test_the_name_of_a_host_is_shown_if_it_is_one() -> None:
    """Whole, as `liveness` says it; a peer may say what it likes."""
    assert shown_host(this_peer().host) == this_peer().host
    assert shown_host("x" * 100) == "x" * MAX_HOST_CHARS
    assert shown_host("a\0") == shown_host("ü") == ""


def test_delays_follow_the_wall_clock(path: Path) -> None:
    """The one that the exchange was given."""
    wall = 1000.0
    connection = sqlite3.connect(path, isolation_level=None)
    exchange: Exchange[str] = Exchange(connection, wall_clock=lambda: wall)
    hello = Hello(session="s", peer=Peer(), queues=(("default", 1),))
    exchange.process(0.0, [("r", encode(hello)), ("r", encode(TaskSend(id=1, task="t", body=b"b", not_before=1002.0)))])
    assert exchange.tick(1.0) == []
    wall = 1002.5
    [(_, frame)] = exchange.tick(1.5)
    delivery = decode_from_broker(frame)
    assert isinstance(delivery, TaskDelivery)
    assert delivery.body == b"b"
    connection.close()


# --- a full disk ---


def test_what_can_wait_is_not_written_to_a_full_disk(path: Path) -> None:
    """Sessions and tasks that came back are written when there is space again; what was acknowledged is gone."""
    desk = Desk(path)
    desk.hello("b", "bob", queues=(("default", 5),))
    said = desk.say(("b", send(1)), ("b", send(2)))
    one, two = (message for _, message in said if isinstance(message, TaskDelivery))
    desk.exchange.refuse_changes = "somewhere"
    before = desk.connection.total_changes
    desk.hello("c", "cat")
    desk.say(("b", TaskNack(id=3, task="t1", epoch=one.epoch)))
    assert desk.connection.total_changes == before
    desk.say(("b", TaskAck(id=4, task="t2", epoch=two.epoch)))
    assert desk.tasks() == {"t1"}
    assert desk.connection.execute("SELECT holder FROM broker_task").fetchall() == [("bob",)]
    desk.exchange.refuse_changes = None
    desk.exchange.tick(0.0)
    assert desk.connection.execute("SELECT holder FROM broker_task").fetchall() == [(None,)]
    again = restarted(desk, path)
    assert set(again.exchange.sessions()) == {"bob", "cat"}
    again.connection.close()


def test_what_is_told_on_a_full_disk_is_on_it(path: Path) -> None:
    """A last attempt and what was buried are stored; what can't be is refused: nothing is told that a kill undoes."""
    desk = Desk(path)
    desk.hello("b", "bob", queues=(("default", 5),))
    [(_, last), _] = desk.say(("b", TaskSend(id=1, task="t1", body=b"", max_attempts=1)))[::-1]
    desk.say(
        ("b", TaskSend(id=2, task="t2", body=b"", queue="q")), ("b", TaskSend(id=3, task="t3", body=b"", queue="q"))
    )
    desk.say(("b", TaskEdit(id=4, action="bury", tasks=("t3",))))
    assert isinstance(last, TaskDelivery)
    desk.exchange.refuse_changes = desk.exchange.refuse_new = "somewhere"
    desk.say(("b", TaskNack(id=5, task="t1", epoch=last.epoch)))
    desk.say(("b", TaskEdit(id=6, action="bury", tasks=("t2",))))
    [(_, refused)] = desk.say(("b", TaskEdit(id=7, action="requeue", tasks=("t3",))))
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), StoreFullError)
    places = {task.id: task.place for task in TaskStore(desk.connection).load().tasks}
    assert places == {"t1": "dead", "t2": "dead", "t3": "dead"}
    desk.connection.close()


# --- defects that the simulation and the fuzzers found ---


def test_a_task_that_comes_and_is_replaced_in_one_batch(desk: Desk) -> None:
    """With somebody who waits for it: he is told, and one task is left."""
    desk.hello("r", "ann")
    first = TaskSend(id=1, task="t1", body=b"1", key="k", want_result=True)
    second = TaskSend(id=2, task="t2", body=b"2", key="k", replace=True)
    said = [message for _, message in desk.say(("r", first), ("r", second))]
    assert [type(message) for message in said] == [TaskStored, TaskResult, TaskStored]
    assert desk.connection.execute("SELECT id, body FROM broker_task ORDER BY number").fetchall() == [
        ("t1", b""),
        ("t2", b"2"),
    ]


@pytest.mark.parametrize("kind", ["send", "heartbeat", "edit"])
def test_the_greatest_numbers(path: Path, kind: str) -> None:
    """An id at the very end of the numbers costs its sender its answers, and nobody anything else."""
    desk = Desk(path)
    desk.hello("r", "ann")
    last = 2**63 - 1
    message = {
        "send": TaskSend(id=last, task="t", body=b""),
        "heartbeat": Heartbeat(seen=last),
        "edit": TaskEdit(id=last, action="delete", tasks=("t",)),
    }[kind]
    for _ in range(2):
        desk.say(("r", message), ("r", send(1)))
    again = restarted(desk, path)
    again.hello("r", "ann")
    again.connection.close()


def test_the_broker_has_ids_of_its_own(desk: Desk) -> None:
    """A client can't occupy the id of a task that the broker will make."""
    desk.exchange.put(0.0, [NewTask(queue="q", key="a")])
    [own] = desk.tasks()
    desk.hello("r", "ann")
    [(_, refused)] = desk.say(("r", TaskSend(id=1, task=own.replace("-1", "-2"), body=b"")))
    assert isinstance(refused, Refused)
    desk.exchange.put(0.0, [NewTask(queue="q", key="b")])
    assert len(desk.tasks()) == 2


# --- how long it is held ---


def test_a_restart_does_not_make_a_held_task_younger(path: Path) -> None:
    """A step of thirty days has its age, whichever broker is asked; the oldest hold is told for its queue."""
    wall = 1000.0
    connection = sqlite3.connect(path, isolation_level=None)

    def start() -> Exchange[str]:
        return Exchange(connection, wall_clock=lambda: wall)

    def ask(exchange: Exchange[str], *messages: ClientMessage, now: float = 0.0) -> list[BrokerMessage]:
        return [
            decode_from_broker(frame) for _, frame in exchange.process(now, [("r", encode(one)) for one in messages])
        ]

    exchange = start()
    hello = Hello(session="s", peer=Peer(), queues=(("default", 2),))
    sends = [TaskSend(id=number, task=f"t{number}", body=b"") for number in (1, 2)]
    first, second = (one for one in ask(exchange, hello, *sends) if isinstance(one, TaskDelivery))
    wall += 100.0
    ask(exchange, TaskNack(id=3, task="t1", epoch=first.epoch, reason="later"), now=100.0)
    again = [one for _, one in exchange.tick(101.0)]
    [first] = [one for one in map(decode_from_broker, again) if isinstance(one, TaskDelivery)]
    wall += 2_592_000.0
    held = (("t1", first.epoch), ("t2", second.epoch))
    exchange = start()
    [_, listed] = ask(exchange, msgspec.structs.replace(hello, held=held), TaskList(id=4))
    assert isinstance(listed, TasksListed)
    assert {task.id: task.held_s for task in listed.tasks} == {"t1": 2_592_000.0, "t2": 2_592_100.0}
    assert exchange.statistics().queues["default"].longest_held_s == 2_592_100.0
    wall -= 3_000_000.0  # the wall clock is put back: as if it had just been given
    assert start().statistics().queues["default"].longest_held_s == 0.0
    connection.close()


# --- retention ---


def test_old_dead_letters_are_forgotten(path: Path) -> None:
    """By the time of their death, which a restart does not change; so many at once; who still waits is told."""
    wall = 1000.0
    connection = sqlite3.connect(path, isolation_level=None)
    exchange: Exchange[str] = Exchange(connection, wall_clock=lambda: wall)

    def say(exchange: Exchange[str], *messages: ClientMessage) -> list[BrokerMessage]:
        return [
            decode_from_broker(frame) for _, frame in exchange.process(0.0, [("r", encode(one)) for one in messages])
        ]

    sends = [TaskSend(id=number, task=f"t{number}", body=b"", want_result=number == 1) for number in (1, 2, 3, 4)]
    say(exchange, Hello(session="s", peer=Peer()), *sends, TaskEdit(id=5, action="bury", tasks=("t1", "t2")))
    wall = 2000.0
    say(exchange, TaskEdit(id=6, action="bury", tasks=("t3",)))
    again: Exchange[str] = Exchange(connection, wall_clock=lambda: wall)
    say(again, Hello(session="s", peer=Peer(), awaited=("t1",)))
    assert again.forget_dead(0.0, before=1000.0, limit=9) == 0
    assert [again.forget_dead(0.0, before=2000.0, limit=1) for _ in range(3)] == [1, 1, 0]
    [told, _] = say(again, Heartbeat())
    assert isinstance(told, TaskResult)
    assert again.statistics().queues["default"].dead == 1
    assert again.statistics().queues["default"].ready == 1
    connection.close()
