"""Requests to a store as bytes: closed, checked, and answered with what their type says."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest

from prunus.errors import CheckpointNotFoundError, ProtocolError
from prunus.persistence import requests
from prunus.persistence.persister import (
    Claim,
    Created,
    Cursor,
    Effects,
    Event,
    LogLine,
    Note,
    Persister,
    Portion,
    Query,
    Reply,
    Save,
    Tell,
)
from prunus.persistence.requests import ANSWERS, decode_answer, decode_request, encode_request, execute
from prunus.persistence.sqlite import ProcessStore, open_database
from prunus.testing.persister_contract import new

EXAMPLES: list[requests.Request] = [
    requests.CreateRequest(new(parent="q", tags=("a",), queue="gpu", priority=9, resources={"licence": 2}, key="ours")),
    requests.ClaimRequest("p", "w", 1.0),
    requests.SaveRequest(
        Save(
            pid="p",
            epoch=1,
            state="waiting",
            events=(Event(subject="a.b", at=1.0),),
            children=(new("c"),),
            tells=(Tell(b"x", to=("wait",)),),
            replies=(Reply(1, b"y"),),
            waits=(("a", "b"), ("c",)),
            seen=("c",),
            wake_at=1.5,
            names=("m", "n"),
            listens=("m",),
        )
    ),
    requests.NoteRequest(Note(pid="p", epoch=1, progress=0.5, lines=(LogLine(at=1.0, text="x"),))),
    requests.ReleaseRequest("p", 1),
    requests.SetAsideRequest("p", 1, "why"),
    requests.ReviveRequest("p"),
    requests.PostRequest("p", b"\xff"),
    requests.ReplyRequest("p", 1),
    requests.SendRequest("p", "name", b"\xff", 1.0, "me"),
    requests.LoadRequest("p"),
    requests.QueryRequest(Query(states=("running",))),
    requests.HistoryRequest("p", 7),
    requests.LogRequest("p", 5, 10, 3),
    requests.PastRequest("p"),
    requests.PastCheckpointRequest("p", 1),
    requests.DeleteRequest("p"),
    requests.PruneRequest(Query(states=("finished",), updated_before=1.5)),
    requests.ExportRequest("p", Cursor("mail", 3, 7)),
    requests.StageRequest("ship", 2, (Portion(pid="p", replies=(Reply(1, b"x"),), next=Cursor("lines", 0, 7)),)),
    requests.AdoptRequest("ship", 3, "far", True),
]


@pytest.fixture
def store() -> Iterator[ProcessStore]:
    with closing(open_database(":memory:")) as connection:
        yield ProcessStore(connection)


@pytest.mark.parametrize("request_", EXAMPLES, ids=lambda request: type(request).__name__)
def test_requests_cross_as_bytes(request_: requests.Request) -> None:
    """What is decoded is what was encoded."""
    assert decode_request(encode_request(request_)) == request_


def test_there_is_a_request_for_each_operation_of_the_seam() -> None:
    """And an answer, and an example here, for each request."""
    kinds = set(typing.get_args(requests.Request))
    assert kinds == set(ANSWERS) == {type(example) for example in EXAMPLES}
    operations = {name for name, _ in inspect.getmembers(Persister, inspect.isfunction) if not name.startswith("_")}
    assert {kind.__struct_config__.tag for kind in kinds} == operations


def test_a_peer_claims_for_itself_only(store: ProcessStore) -> None:
    """The session that asks is the owner, whatever the request says."""
    store.create(new())
    request = requests.ClaimRequest("p", "somebody else", 1.0)
    answer, effects = execute(store, encode_request(request), "session-1")
    claim = decode_answer(request, answer)
    assert isinstance(claim, Claim)
    assert (claim.record.owner, effects) == ("session-1", Effects())


def test_effects_come_beside_the_answer(store: ProcessStore) -> None:
    """They are for the owner of the store, not for the peer."""
    request = requests.CreateRequest(new())
    answer, effects = execute(store, encode_request(request))
    assert (decode_answer(request, answer), effects) == (Created("p", is_new=True), Effects(runnable=("p",)))


def test_the_stores_errors_are_raised(store: ProcessStore) -> None:
    """Who carries the answer carries them too."""
    with pytest.raises(CheckpointNotFoundError):
        execute(store, encode_request(requests.LoadRequest("nobody")))


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"\xc0",
        b"{}",
        b"\xa1\xff",
        msgspec.msgpack.encode({"type": "drop"}),
        msgspec.msgpack.encode({"type": "load"}),
    ],
)
def test_noise_is_no_request_and_no_answer(store: ProcessStore, noise: bytes) -> None:
    """It is refused before anything is done."""
    with pytest.raises(ProtocolError, match="no request"):
        execute(store, noise)
    with pytest.raises(ProtocolError, match="no answer"):
        decode_answer(requests.LoadRequest("p"), noise)
