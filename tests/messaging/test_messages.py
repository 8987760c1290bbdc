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
from prunus.messaging.messages import (
    MAGIC,
    MAX_FRAME_BYTES,
    PROTOCOL,
    BrokerMessage,
    Call,
    CallDone,
    ClientMessage,
    Done,
    Hello,
    Peer,
    RpcDelivery,
    RpcRequest,
    TaskAck,
    TaskDelivery,
    TaskResult,
    TaskSend,
    Violation,
    Welcome,
    decode_from_broker,
    decode_from_client,
    encode,
    outcome_of,
)

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
                "StructType": Failure("t", "m") if field.name == "failure" else Peer("h", 1, 2),
                "VarTupleType": (b"a",),
                "UnionType": None,
            }
            fields[field.name] = simple[type(info).__name__]
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
        ("b50193070291c40162", CallDone(id=2, answers=(b"b",))),
    ],
)
def test_old_frames_of_the_broker_are_read_for_ever(frame: str, message: BrokerMessage) -> None:
    """These bytes were written by protocol 1."""
    assert decode_from_broker(bytes.fromhex(frame)) == message


def test_unknown_fields_at_the_end_are_skipped() -> None:
    """A later version may add fields at the end; this one ignores them."""
    frame = encode(Done(id=1))[:2] + msgspec.msgpack.encode([4, 1, True, "new"])
    assert decode_from_broker(frame) == Done(id=1, stale=True)


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
@given(st.integers(0, 20), st.lists(_data, max_size=9), st.integers(0, 40))
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
    """A negative id, a priority of 10, an endless name and a strange session are refused."""
    good = TaskSend(id=1, task="t", body=b"")
    for bad in (
        msgspec.structs.replace(good, id=-1),
        msgspec.structs.replace(good, priority=10),
        msgspec.structs.replace(good, queue="q" * 1025),
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
