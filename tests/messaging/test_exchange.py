"""Core, store and service behind one commit: what is durable when something is sent, and what is undone."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunus.errors import InvalidStateError, MessageTooLargeError, NotDeliveredError, RemoteError, StoreFullError
from prunus.messaging.exchange import (
    MAX_PROTOCOL_ERRORS,
    BrokerStoppedError,
    Exchange,
    NewBroadcast,
    NewTask,
    Served,
)
from prunus.messaging.messages import (
    FORWARD_BYTES,
    MAX_FRAME_BYTES,
    Alive,
    BroadcastDelivery,
    BrokerMessage,
    Call,
    CallDone,
    ClientMessage,
    Done,
    Goodbye,
    Heartbeat,
    Hello,
    HelloNeeded,
    Peer,
    Refused,
    TaskAck,
    TaskDelivery,
    TaskSend,
    TaskStored,
    Violation,
    Welcome,
    decode_from_broker,
    encode,
)
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
        return {one.task.id for one in TaskStore(self.connection).load().tasks}


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
    assert names == {"broker_task", "broker_session", "broker_answer", "broker_meta", "word", "timer"}


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


def test_an_answer_that_is_too_large_undoes_the_call(path: Path) -> None:
    """Nobody could be told what was done, so it is not done."""

    class Flood:
        def left(self, session: str) -> tuple[NewTask, ...]:
            return ()

        def due(self) -> None:
            return None

        def tick(self) -> tuple[NewTask, ...]:
            return ()

        def execute(self, request: bytes, session: str) -> Served:
            return Served(answer=bytes(MAX_FRAME_BYTES + FORWARD_BYTES))

    connection = sqlite3.connect(path, isolation_level=None)
    exchange: Exchange[str] = Exchange(connection, service=Flood())
    exchange.process(0.0, [("r", encode(Hello(session="s", peer=Peer())))])
    [(_, frame)] = exchange.process(0.0, [("r", encode(Call(id=1, requests=(b"",))))])
    refused = decode_from_broker(frame)
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), MessageTooLargeError)
    connection.close()


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
    assert desk.exchange.statistics().broker.connected == 1


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

    class Announcer:
        def left(self, session: str) -> tuple[NewTask, ...]:
            return ()

        def due(self) -> None:
            return None

        def tick(self) -> tuple[NewTask, ...]:
            return ()

        def execute(self, request: bytes, session: str) -> Served:
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
