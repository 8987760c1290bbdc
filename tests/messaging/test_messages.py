"""The messages and their bytes."""

from __future__ import annotations

import contextlib
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.errors import Failure, IndeterminateError, MessageTooLargeError, ProtocolError, UnroutableError
from prunus.messaging import messages
from prunus.messaging.inventory import (
    QueueLimits,
    QueueStatistics,
    ResourceStatistics,
    SessionStatistics,
    Statistics,
    TaskInfo,
)
from prunus.messaging.messages import (
    CHUNK_BYTES,
    MAGIC,
    MAX_FRAME_BYTES,
    PROTOCOL,
    BlobGet,
    BlobHeld,
    BlobPart,
    BlobPut,
    BrokerMessage,
    Call,
    CallDone,
    ClientMessage,
    Done,
    Edited,
    Heartbeat,
    Hello,
    Missed,
    Peer,
    QueueConfigure,
    ResourceConfigure,
    RpcDelivery,
    RpcRequest,
    StatisticsAsk,
    TaskAck,
    TaskDelivery,
    TaskEdit,
    TaskList,
    TaskNack,
    TaskResult,
    TaskSend,
    TasksListed,
    TaskSubscribe,
    Unwelcome,
    Violation,
    Welcome,
    decode_from_broker,
    decode_from_client,
    encode,
    outcome_of,
)

LIMITS = QueueLimits(concurrency=2, rate_per_s=0.5, burst=3, max_length=4)
TASK = TaskInfo(
    id="t",
    queue="q",
    key="k",
    subject="a.b",
    priority=3,
    place="dead",
    order=7,
    attempt=2,
    max_attempts=2,
    size=5,
    sent_at=1.5,
    resources={"gpu": 1},
    reason="no disk",
    body=b"bytes",
)
STATISTICS = Statistics(
    broker_epoch=1,
    uptime_s=2.5,
    queues={"q": QueueStatistics(ready=3, limits=LIMITS)},
    resources={"gpu": ResourceStatistics(capacity=None, taken=1, waiting=2)},
    sessions={
        "s": SessionStatistics(
            connected=True,
            host="h",
            pid=1,
            role="worker",
            key=None,
            silent_s=0.5,
            round_trip_s=None,
            held=1,
            credit=2,
            subscriptions=3,
            questions=0,
        )
    },
    questions=0,
    identifiers=0,
    broadcast_subscriptions=0,
    answers_kept=0,
    accepted=4,
    settled=5,
    delivered=6,
)
DIGEST = "ab" * 32
FROM_CLIENT = typing.get_args(ClientMessage)
FROM_BROKER = typing.get_args(BrokerMessage)


def example(kind: type) -> typing.Any:
    """Some message of a kind: every field without a default is filled in."""
    fields = {}
    for field in msgspec.structs.fields(kind):
        if field.required:
            info = msgspec.inspect.type_info(field.type)
            simple = {
                "IntType": 3,
                "StrType": "abc",
                "BytesType": b"body",
                "BoolType": True,
                "FloatType": 1.5,
                "VarTupleType": (TASK,) if field.name == "tasks" else (b"a",),
                "UnionType": None,
                "LiteralType": "requeue",
            }
            structs = {
                "failure": Failure("t", "m"),
                "digest": "ab" * 32,
                "peer": Peer("h", 1, 2),
                "limits": LIMITS,
                "statistics": STATISTICS,
            }
            fields[field.name] = structs.get(field.name, simple.get(type(info).__name__))
    return kind(**fields)


@pytest.mark.parametrize("kind", FROM_CLIENT, ids=lambda kind: kind.__name__)
def test_what_a_client_says_arrives(kind: type) -> None:
    """Every message of a client survives its bytes."""
    message = example(kind)
    assert decode_from_client(encode(message)) == message


@pytest.mark.parametrize("kind", FROM_BROKER, ids=lambda kind: kind.__name__)
def test_what_the_broker_says_arrives(kind: type) -> None:
    """Every message of the broker survives its bytes."""
    message = example(kind)
    assert decode_from_broker(encode(message)) == message


def test_a_failure_arrives_as_the_error_that_it_was() -> None:
    """A failure inside a message keeps its facts; a result is never mistaken for one."""
    refused = TaskResult(task="t", outcome=Failure.of(UnroutableError("x")))
    received = decode_from_broker(encode(refused))
    assert isinstance(received, TaskResult)
    assert isinstance(received.outcome, Failure)
    assert isinstance(received.outcome.to_exception(), UnroutableError)
    for outcome in (b"result", None):
        ack = TaskAck(id=1, task="t", epoch=2, outcome=outcome)
        assert decode_from_client(encode(ack)) == ack


def test_the_header_names_the_protocol() -> None:
    """The first bytes are the same for ever; another version is named in the error."""
    frame = encode(Done(id=1))
    assert frame[:2] == bytes((MAGIC, PROTOCOL))
    with pytest.raises(ProtocolError, match=f"protocol {PROTOCOL + 1}"):
        decode_from_broker(bytes((MAGIC, PROTOCOL + 1)) + frame[2:])


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ("b5019a01a17393a0000090909090900090", Hello(session="s", peer=Peer())),
        ("b501980401a174c401ffa764656661756c74c000c2", TaskSend(id=1, task="t", body=b"\xff")),
        ("b50194110591c401619192a17403", Call(id=5, requests=(b"a",), acks=(("t", 3),))),
        (
            "b5019c01a17393a00000909090909000909193a171a3612e2a02a178",
            Hello(session="s", peer=Peer(), filtered=(("q", "a.*", 2),), secret="x"),
        ),
        ("b501930201cb3fe0000000000000", Heartbeat(seen=1, round_trip_s=0.5)),
        (
            "b5019e0401a174c400a764656661756c74c000c2a161c3cb3ff8000000000000cb4004000000000000039192a367707501",
            TaskSend(
                id=1,
                task="t",
                body=b"",
                subject="a",
                replace=True,
                not_before=1.5,
                expires_at=2.5,
                max_attempts=3,
                resources=(("gpu", 1),),
            ),
        ),
        ("b501950501a17102a3612e23", TaskSubscribe(id=1, queue="q", credit=2, subject="a.#")),
        ("b501960801a17402a26e6fc2", TaskNack(id=1, task="t", epoch=2, reason="no", attempted=False)),
        ("b501991201a171a464656164c0c0050ac3", TaskList(id=1, queue="q", place="dead", after=5, limit=10, bodies=True)),
        ("b501961301a77265717565756591a174c0c0", TaskEdit(id=1, action="requeue", tasks=("t",))),
        (
            "b501941401a17184ab636f6e63757272656e637901aa726174655f7065725f73c0a5627572737401aa6d61785f6c656e677468c0",
            QueueConfigure(id=1, queue="q", limits=QueueLimits(concurrency=1)),
        ),
        ("b501941501a367707502", ResourceConfigure(id=1, resource="gpu", capacity=2)),
        ("b501921601", StatisticsAsk(id=1)),
        (
            f"b5019f0401a174c400a764656661756c74c000c2c0c2cb0000000000000000cb00000000000000000090d940{DIGEST.encode().hex()}",
            TaskSend(id=1, task="t", body=b"", blob=DIGEST),
        ),
        (
            f"b501961701d940{DIGEST.encode().hex()}0203c40178",
            BlobPut(id=1, digest=DIGEST, offset=2, total=3, chunk=b"x"),
        ),
        (f"b501951801d940{DIGEST.encode().hex()}0203", BlobGet(id=1, digest=DIGEST, offset=2, limit=3)),
    ],
)
def test_old_frames_of_clients_are_read_for_ever(frame: str, message: ClientMessage) -> None:
    """These bytes were written by protocol 1."""
    assert decode_from_client(bytes.fromhex(frame)) == message


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ("b5019401019090", Welcome(broker_epoch=1)),
        ("b5019709a174a171c0c401000101", TaskDelivery(task="t", queue="q", key=None, body=b"\0", epoch=1, attempt=1)),
        ("b501950401c300c3", Done(id=1, stale=True, over=True)),
        ("b501940401c300", Done(id=1, stale=True)),
        ("b50193070291c40162", CallDone(id=2, answers=(b"b",))),
        (
            "b5019909a174a171c0c4000101a161a12a",
            TaskDelivery(task="t", queue="q", key=None, body=b"", epoch=1, attempt=1, subject="a", pattern="*"),
        ),
        ("b501940e0190c3", TasksListed(id=1, tasks=(), more=True)),
        ("b501940f010203", Edited(id=1, changed=2, held=3)),
        ("b501921104", Missed(count=4)),
        (
            f"b5019a09a174a171c0c4000101c0c0d940{DIGEST.encode().hex()}",
            TaskDelivery(task="t", queue="q", key=None, body=b"", epoch=1, attempt=1, blob=DIGEST),
        ),
        ("b50193120102", BlobHeld(id=1, size=2)),
        ("b50194130102c40178", BlobPart(id=1, total=2, chunk=b"x")),
        ("b501921482a474797065a145a76d657373616765a16d", Unwelcome(failure=Failure("E", "m"))),
    ],
)
def test_old_frames_of_the_broker_are_read_for_ever(frame: str, message: BrokerMessage) -> None:
    """These bytes were written by protocol 1."""
    assert decode_from_broker(bytes.fromhex(frame)) == message


def test_unknown_fields_at_the_end_are_skipped() -> None:
    """A later version may add fields at the end; this one ignores them."""
    frame = encode(Done(id=1))[:2] + msgspec.msgpack.encode([4, 1, True, 0, True, "new"])
    assert decode_from_broker(frame) == Done(id=1, stale=True, over=True)


@settings(max_examples=400)
@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: bytes((MAGIC, PROTOCOL)) + tail))
def test_any_bytes_are_a_message_or_a_protocol_error(frame: bytes) -> None:
    """Whatever arrives: a message, or `ProtocolError`, and no other exception."""
    for decode in (decode_from_client, decode_from_broker):
        with contextlib.suppress(ProtocolError):
            decode(frame)


_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=400)
@given(st.integers(0, 24), st.lists(_data, max_size=9), st.integers(0, 40))
def test_any_fields_are_a_message_or_a_protocol_error(tag: int, fields: list[object], cut: int) -> None:
    """Well-formed data under a known tag, also cut short: a message or `ProtocolError`."""
    frame = bytes((MAGIC, PROTOCOL)) + msgspec.msgpack.encode([tag, *fields])
    for decode in (decode_from_client, decode_from_broker):
        for bytes_ in (frame, frame[: len(frame) - cut]):
            with contextlib.suppress(ProtocolError):
                decode(bytes_)


@pytest.mark.parametrize(
    "payload",
    [
        b"\x93\x04\xa1\xff\x01",  # no UTF-8
        b"\x91" * 5000,  # deep nesting
        b"\x94\x07\x01\xa1t\x02" + b"\x84\xa4type\xa1t\xa7message\xa1m\xa5cause" * 2000,
        b"\x95\x07\x01\xa1t\x02\x83\xa4type\xa1t\xa7message\xa1m\xa5facts\x81\x80\x80",
    ],
)
def test_hostile_bytes(payload: bytes) -> None:
    """Bad text, deep nesting and unhashable keys are protocol errors too."""
    for decode in (decode_from_client, decode_from_broker):
        with pytest.raises(ProtocolError):
            decode(bytes((MAGIC, PROTOCOL)) + payload)


def test_numbers_and_names_have_bounds() -> None:
    """A negative id, a priority of 10, an endless name, a strange digest or session are refused."""
    good = TaskSend(id=1, task="t", body=b"")
    for bad in (
        msgspec.structs.replace(good, id=-1),
        msgspec.structs.replace(good, priority=10),
        msgspec.structs.replace(good, queue="q" * 1025),
        msgspec.structs.replace(good, blob="../" + "a" * 61),
        BlobPut(id=1, digest="A" * 64, offset=0, total=1, chunk=b""),
        BlobPut(id=1, digest="a" * 64, offset=0, total=1, chunk=bytes(CHUNK_BYTES + 1)),
        BlobGet(id=1, digest="a" * 64, offset=0, limit=CHUNK_BYTES + 1),
        BlobGet(id=1, digest="a" * 64 + "\n", offset=0, limit=1),
        Hello(session="two\nlines", peer=Peer()),
        Hello(session="", peer=Peer()),
        RpcRequest(id=1, recipient="r", body=b"", timeout_s=float("nan")),
    ):
        with pytest.raises(ProtocolError):
            decode_from_client(encode(bad))


def test_too_large_is_said_before_sending() -> None:
    """A frame over the limit is refused by `encode` and by the decoder; the broker may add a little when passing on."""
    body = bytes(MAX_FRAME_BYTES)
    with pytest.raises(MessageTooLargeError) as error:
        encode(TaskSend(id=1, task="t", body=body))
    assert error.value.size > error.value.limit == MAX_FRAME_BYTES
    with pytest.raises(ProtocolError, match="over the limit"):
        decode_from_client(bytes(MAX_FRAME_BYTES + 1))
    passed_on = RpcDelivery(caller="c", id=1, identifier="i", body=body[:-10])
    assert decode_from_broker(encode(passed_on)) == passed_on


def test_an_outcome_always_fits() -> None:
    """An error whose facts have no form, or are huge, still becomes an outcome."""
    strange = IndeterminateError("k")
    strange.extra = object()  # type: ignore[attr-defined]
    huge = UnroutableError("x" * MAX_FRAME_BYTES)
    for error in (strange, huge):
        outcome = outcome_of(error)
        assert decode_from_client(encode(TaskAck(id=1, task="t", epoch=1, outcome=outcome)))
        assert outcome.type.endswith(type(error).__name__)


def test_each_tag_has_one_meaning() -> None:
    """No two messages of one direction share a tag, and every message belongs to a union."""
    for union in (FROM_CLIENT, FROM_BROKER):
        tags = [kind.__struct_config__.tag for kind in union]
        assert len(set(tags)) == len(tags)
    defined = {
        kind
        for kind in vars(messages).values()
        if isinstance(kind, type) and issubclass(kind, (messages._FromClient, messages._FromBroker))
    } - {messages._FromClient, messages._FromBroker}
    assert defined == set(FROM_CLIENT) | set(FROM_BROKER)
    assert Violation in defined
