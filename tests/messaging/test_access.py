"""Who may say what: every message and every request to the processes, for every role."""

from __future__ import annotations

import sqlite3
from typing import Any, get_args

import msgspec
import pytest

from prunus.errors import NotPermittedError, PrunusError
from prunus.messaging.access import OWNER, Principal, Role, reduced, who_may_say
from prunus.messaging.exchange import Exchange, Served
from prunus.messaging.inventory import QueueLimits
from prunus.messaging.messages import (
    BlobGet,
    BlobPut,
    BroadcastSend,
    BroadcastSubscribe,
    BroadcastUnsubscribe,
    BrokerMessage,
    Call,
    CallDone,
    ClientMessage,
    Goodbye,
    Heartbeat,
    Hello,
    Peer,
    QueueConfigure,
    Refused,
    ResourceConfigure,
    ResultSeen,
    RpcAnswer,
    RpcRequest,
    RpcSubscribe,
    RpcUnsubscribe,
    StatisticsAsk,
    TaskAck,
    TaskEdit,
    TaskList,
    TaskNack,
    TaskSend,
    TaskSubscribe,
    TaskUnsubscribe,
    Unwelcome,
    Violation,
    Welcome,
    decode_from_broker,
    encode,
)
from prunus.persistence import requests
from prunus.runtime.backend import who_may_ask

V, C, W, OWN = Role.VIEWER, Role.CONTROLLER, Role.WORKER, Role.OWNER
EVERYBODY, SENDERS, WORKERS, ADMINISTRATORS = {V, C, W, OWN}, {C, W, OWN}, {W, OWN}, {C, OWN}
TABLE: list[tuple[ClientMessage, set[Role]]] = [
    (Hello(session="s", peer=Peer()), EVERYBODY),
    (Heartbeat(), EVERYBODY),
    (BroadcastSubscribe(id=1, subscription=1), EVERYBODY),
    (BroadcastUnsubscribe(id=1, subscription=1), EVERYBODY),
    (StatisticsAsk(id=1), EVERYBODY),
    (TaskList(id=1), EVERYBODY),
    (TaskList(id=1, bodies=True), SENDERS),
    (Call(id=1, requests=(b"look",)), EVERYBODY),
    (Call(id=1, requests=(), acks=(("t", 1),)), WORKERS),
    (TaskSend(id=1, task="t", body=b""), SENDERS),
    (BlobPut(id=1, digest="a" * 64, offset=0, total=1, chunk=b""), SENDERS),
    (BlobGet(id=1, digest="a" * 64, offset=0, limit=1), SENDERS),
    (ResultSeen(task="t"), SENDERS),
    (RpcRequest(id=1, recipient="r", body=b"", timeout_s=1.0), SENDERS),
    (BroadcastSend(id=1, body=b""), SENDERS),
    (TaskSubscribe(id=1, queue="q", credit=1), WORKERS),
    (TaskUnsubscribe(id=1, queue="q"), WORKERS),
    (TaskAck(id=1, task="t", epoch=1), WORKERS),
    (TaskNack(id=1, task="t", epoch=1), WORKERS),
    (RpcSubscribe(id=1, identifier="i"), WORKERS),
    (RpcUnsubscribe(id=1, identifier="i"), WORKERS),
    (RpcAnswer(caller="c", id=1, outcome=b""), WORKERS),
    (TaskEdit(id=1, action="delete", tasks=("t",)), ADMINISTRATORS),
    (QueueConfigure(id=1, queue="q", limits=QueueLimits()), ADMINISTRATORS),
    (ResourceConfigure(id=1, resource="r", capacity=1), ADMINISTRATORS),
    (Goodbye(id=1), EVERYBODY),
]


class Readable:
    """A service that tells the role with which it is asked."""

    def execute(self, request: bytes, session: str, role: Role) -> Served:
        return Served(answer=role.value.encode())

    def left(self, session: str, lost: object) -> tuple[()]:
        return ()

    def due(self) -> None:
        return None

    def tick(self) -> tuple[()]:
        return ()


class Broker:
    """A real exchange to which peers with different keys speak. A route is the key and a number."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.exchange: Exchange[tuple[Principal, int]] = Exchange(
            connection, service=Readable(), principal_of=lambda route: route[0]
        )

    def say(self, route: tuple[Principal, int], *messages: ClientMessage) -> list[BrokerMessage]:
        sends = self.exchange.process(1.0, [(route, encode(message)) for message in messages])
        return [decode_from_broker(frame) for to, frame in sends if to == route]


@pytest.fixture
def broker() -> Any:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    yield Broker(connection)
    connection.close()


def named(pair: tuple[ClientMessage, set[Role]]) -> str:
    return type(pair[0]).__name__


def test_the_table_is_complete() -> None:
    """There is a decision about every message of a client, and here is what it should be."""
    assert {type(message) for message, _ in TABLE} == set(get_args(ClientMessage))


@pytest.mark.parametrize("pair", TABLE, ids=named)
@pytest.mark.parametrize("role", Role)
def test_roles_and_messages(role: Role, pair: tuple[ClientMessage, set[Role]], broker: Broker) -> None:
    """What a role may not say changes nothing: the one who asked is told, by the id of its request if it has one."""
    message, allowed = pair
    assert who_may_say(message) == allowed
    route = Principal("key", role), 1
    [welcome] = broker.say(route, Hello(session="s", peer=Peer()))
    assert isinstance(welcome, Welcome)
    before = broker.exchange.sessions()
    answers = broker.say(route, message)
    refusals = [
        one
        for one in answers
        if (isinstance(one, Refused) and isinstance(one.failure.to_exception(), NotPermittedError))
        or isinstance(one, Violation)
    ]
    if role in allowed:
        assert not refusals
    else:
        assert answers == refusals
        assert len(refusals) == 1
        if isinstance(refusals[0], Refused):
            assert refusals[0].id == message.id  # type: ignore[union-attr]
            assert f"a {role.value} may not do that: to " in refusals[0].failure.message
        assert broker.exchange.sessions() == before


def test_a_hello_gives_no_more_than_its_role() -> None:
    """What a `Hello` asks for beyond its role is left out."""
    full = Hello(
        session="s",
        peer=Peer(),
        held=(("t", 1),),
        awaited=("a",),
        queues=(("q", 1),),
        identifiers=(("i", 0),),
        patterns=((1, None, None),),
        seen=3,
        expected=("e",),
        filtered=(("q", "*", 1),),
        secret="x",
    )
    bare = Hello(session="s", peer=Peer(), patterns=((1, None, None),), seen=3, secret="x")
    assert reduced(V, full) == bare
    assert reduced(C, full) == msgspec.structs.replace(bare, awaited=("a",), expected=("e",))
    assert reduced(W, full) == reduced(OWN, full) == full
    assert set(Hello.__struct_fields__) == set(full.__struct_fields__), "a new field of Hello needs a decision"


def test_a_viewer_gets_no_task_by_its_hello(broker: Broker) -> None:
    """A subscription in a `Hello` is no way around the role."""
    viewer, sender = (Principal("v", V), 1), (Principal("c", C), 2)
    broker.say(viewer, Hello(session="v", peer=Peer(), queues=(("q", 10),), identifiers=(("i", 0),)))
    broker.say(sender, Hello(session="c", peer=Peer()))
    sends = broker.exchange.process(2.0, [(sender, encode(TaskSend(id=1, task="t", body=b"", queue="q")))])
    assert [route for route, _ in sends] == [sender]
    [unroutable] = broker.say(sender, RpcRequest(id=2, recipient="i", body=b"", timeout_s=1.0))
    assert isinstance(unroutable, Refused)


def test_a_session_belongs_to_its_key(broker: Broker) -> None:
    """Another key can't speak as a session that it knows the name of, and its owner notices nothing."""
    owner, thief = (Principal("mine", W), 1), (Principal("other", OWN), 2)
    broker.say(owner, Hello(session="s", peer=Peer(), queues=(("q", 1),), secret="x"))
    [unwelcome] = broker.say(thief, Hello(session="s", peer=Peer(), secret="x"))
    assert isinstance(unwelcome, Unwelcome)
    assert "came with another key" in unwelcome.failure.message
    sends = broker.exchange.process(2.0, [(owner, encode(TaskSend(id=1, task="t", body=b"", queue="q")))])
    assert {route for route, _ in sends} == {owner}
    again = Principal("mine", W), 3
    answers = broker.say(again, Hello(session="s", peer=Peer(), held=(), queues=(("q", 1),), secret="x"))
    assert isinstance(answers[0], Welcome), "the same key may: its connection broke"


def test_the_service_learns_the_role(broker: Broker) -> None:
    """What a request means only the service knows: it is told who asks."""
    for number, role in enumerate(Role):
        route = Principal(f"key-{role}", role), number
        broker.say(route, Hello(session=f"s-{role}", peer=Peer()))
        assert broker.say(route, Call(id=1, requests=(b"",))) == [CallDone(id=1, answers=(role.value.encode(),))]
    local = OWNER, 9
    broker.say(local, Hello(session="local", peer=Peer()))
    assert broker.say(local, Call(id=1, requests=(b"",))) == [CallDone(id=1, answers=(b"owner",))]


PROCESS_TABLE: dict[Any, set[Role]] = {
    requests.CreateRequest: SENDERS,
    requests.ClaimRequest: WORKERS,
    requests.SaveRequest: WORKERS,
    requests.NoteRequest: WORKERS,
    requests.ReleaseRequest: WORKERS,
    requests.SetAsideRequest: WORKERS,
    requests.ReviveRequest: SENDERS,
    requests.PostRequest: SENDERS,
    requests.SendRequest: SENDERS,
    requests.DeleteRequest: SENDERS,
    requests.PruneRequest: SENDERS,
    requests.StageRequest: ADMINISTRATORS,
    requests.AdoptRequest: ADMINISTRATORS,
    **dict.fromkeys(requests.READING, EVERYBODY),
}


def test_who_may_ask_for_what_about_processes() -> None:
    """A viewer reads, a controller also creates and controls, only a worker holds, and it does not bring processes from
    elsewhere."""
    assert set(PROCESS_TABLE) == set(get_args(requests.Request))
    for kind, allowed in PROCESS_TABLE.items():
        blank = kind(**dict.fromkeys(kind.__struct_fields__))
        assert who_may_ask(blank) == allowed, kind


def test_the_errors_cross_the_wire() -> None:
    """`NotPermittedError` arrives as itself."""
    from prunus.errors import Failure, KeyRefusedError

    for error in (NotPermittedError("viewer", "to send tasks"), KeyRefusedError("tcp://x:1", "does not know this key")):
        came: PrunusError = Failure.of(error).to_exception()
        assert (type(came), str(came)) == (type(error), str(error))
