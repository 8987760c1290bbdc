"""What can be asked of a process store, as data: a closed union with one struct for each operation of the seam.

`perform` does a request in a store, `execute` does the same from bytes to bytes: that is what stands behind a broker.
`PersisterOfRequests` is the seam over any way to have a request answered, and `RequestPersister` the one over a
function that carries bytes to a broker and back.

Neither `perform` nor `execute` begins or ends a transaction: several requests, and what a broker keeps for itself, can
become durable together. If one raises, its transaction (or savepoint) has to be rolled back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, assert_never

import msgspec

from prunus.errors import ProtocolError
from prunus.persistence.persister import (
    LOG_LIMIT,
    Adopted,
    Claim,
    Created,
    Cursor,
    Effects,
    Event,
    LogLine,
    NewProcess,
    Note,
    Past,
    Portion,
    Posted,
    Query,
    Record,
    Save,
    Saved,
)

if TYPE_CHECKING:
    from prunus.persistence.sqlite import ProcessStore


class CreateRequest(msgspec.Struct, frozen=True, tag="create"):
    process: NewProcess


class ClaimRequest(msgspec.Struct, frozen=True, tag="claim"):
    pid: str
    owner: str
    at: float


class SaveRequest(msgspec.Struct, frozen=True, tag="save"):
    save: Save


class NoteRequest(msgspec.Struct, frozen=True, tag="note"):
    note: Note


class ReleaseRequest(msgspec.Struct, frozen=True, tag="release"):
    pid: str
    epoch: int


class SetAsideRequest(msgspec.Struct, frozen=True, tag="set_aside"):
    pid: str
    epoch: int
    reason: str


class ReviveRequest(msgspec.Struct, frozen=True, tag="revive"):
    pid: str


class PostRequest(msgspec.Struct, frozen=True, tag="post"):
    pid: str
    body: bytes


class ReplyRequest(msgspec.Struct, frozen=True, tag="reply"):
    pid: str
    seq: int


class SendRequest(msgspec.Struct, frozen=True, tag="send"):
    pid: str
    name: str
    body: bytes
    at: float
    sender: str | None = None


class LoadRequest(msgspec.Struct, frozen=True, tag="load"):
    pid: str


class QueryRequest(msgspec.Struct, frozen=True, tag="query"):
    query: Query


class HistoryRequest(msgspec.Struct, frozen=True, tag="history"):
    pid: str
    after: int = 0


class LogRequest(msgspec.Struct, frozen=True, tag="log"):
    pid: str
    after: int = 0
    limit: int = LOG_LIMIT
    last: int | None = None


class PastRequest(msgspec.Struct, frozen=True, tag="past"):
    pid: str


class PastCheckpointRequest(msgspec.Struct, frozen=True, tag="past_checkpoint"):
    pid: str
    seq: int


class DeleteRequest(msgspec.Struct, frozen=True, tag="delete"):
    pid: str


class PruneRequest(msgspec.Struct, frozen=True, tag="prune"):
    query: Query


class ExportRequest(msgspec.Struct, frozen=True, tag="export"):
    pid: str
    after: Cursor | None = None


class StageRequest(msgspec.Struct, frozen=True, tag="stage"):
    arrival: str
    number: int
    portions: tuple[Portion, ...]


class AdoptRequest(msgspec.Struct, frozen=True, tag="adopt"):
    arrival: str
    parcels: int
    source: str
    skip_existing: bool = False


Request = (
    CreateRequest
    | ClaimRequest
    | SaveRequest
    | NoteRequest
    | ReleaseRequest
    | SetAsideRequest
    | ReviveRequest
    | PostRequest
    | ReplyRequest
    | SendRequest
    | LoadRequest
    | QueryRequest
    | HistoryRequest
    | LogRequest
    | PastRequest
    | PastCheckpointRequest
    | DeleteRequest
    | PruneRequest
    | ExportRequest
    | StageRequest
    | AdoptRequest
)

READING = (
    ReplyRequest,
    LoadRequest,
    QueryRequest,
    HistoryRequest,
    LogRequest,
    PastRequest,
    PastCheckpointRequest,
    ExportRequest,
)
"""Those that change nothing."""
HOLDING = (ClaimRequest, SaveRequest, NoteRequest, ReleaseRequest, SetAsideRequest)
"""Those that the holder of a process makes, or who becomes it."""
ARRIVING = (StageRequest, AdoptRequest)
"""Those that bring processes from elsewhere, in whatever state: no worker makes them."""

ANSWERS: dict[type, Any] = {
    CreateRequest: Created,
    ClaimRequest: Claim,
    SaveRequest: Saved,
    NoteRequest: None,
    ReleaseRequest: None,
    SetAsideRequest: None,
    ReviveRequest: Record,
    PostRequest: Posted,
    ReplyRequest: bytes | None,
    SendRequest: Posted,
    LoadRequest: Record,
    QueryRequest: list[Record],
    HistoryRequest: list[Event],
    LogRequest: list[LogLine],
    PastRequest: list[Past],
    PastCheckpointRequest: bytes,
    DeleteRequest: None,
    PruneRequest: int,
    ExportRequest: Portion,
    StageRequest: None,
    AdoptRequest: Adopted,
}
"""What each request is answered with."""


def perform(store: ProcessStore, request: Request, session: str | None = None) -> tuple[Any, Effects]:
    """Do `request` in the caller's transaction; raises what the store raises.

    A peer (`session`) claims for itself only, whatever its request says; None believes the request.
    """
    match request:
        case CreateRequest(process):
            return store.create(process)
        case ClaimRequest(pid, owner, at):
            return store.claim(pid, owner if session is None else session, at=at)
        case SaveRequest(save):
            return store.save(save)
        case NoteRequest(note):
            return store.note(note)
        case ReleaseRequest(pid, epoch):
            return store.release(pid, epoch)
        case SetAsideRequest(pid, epoch, reason):
            return store.set_aside(pid, epoch, reason)
        case ReviveRequest(pid):
            return store.revive(pid)
        case PostRequest(pid, body):
            return store.post(pid, body)
        case ReplyRequest(pid, seq):
            return store.reply(pid, seq)
        case SendRequest(pid, name, body, at, sender):
            return store.send(pid, name, body, at=at, sender=sender)
        case LoadRequest(pid):
            return store.load(pid)
        case QueryRequest(query):
            return store.query(query)
        case HistoryRequest(pid, after):
            return store.history(pid, after)
        case LogRequest(pid, after, limit, last):
            return store.log(pid, after, limit, last=last)
        case PastRequest(pid):
            return store.past(pid)
        case PastCheckpointRequest(pid, seq):
            return store.past_checkpoint(pid, seq)
        case DeleteRequest(pid):
            return store.delete(pid)
        case PruneRequest(query):
            return store.prune(query)
        case ExportRequest(pid, after):
            return store.export(pid, after)
        case StageRequest(arrival, number, portions):
            return store.stage(arrival, number, portions)
        case AdoptRequest(arrival, parcels, source, skip_existing):
            return store.adopt(arrival, parcels, source, skip_existing=skip_existing)
        case _:
            assert_never(request)


def execute(store: ProcessStore, request: bytes, owner: str | None = None) -> tuple[bytes, Effects]:
    """`perform` from bytes to bytes. Raises `ProtocolError` as well, for bytes that are no request."""
    answer, effects = perform(store, decode_request(request), owner)
    return encode_answer(answer), effects


def encode_request(request: Request) -> bytes:
    return _ENCODER.encode(request)


def decode_request(data: bytes) -> Request:
    """Raises `ProtocolError` for bytes that are no request."""
    try:
        return _REQUEST_DECODER.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"these bytes are no request to a process store: {error}") from error


def encode_answer(answer: Any) -> bytes:
    return _ENCODER.encode(answer)


def decode_answer(request: Request, answer: bytes) -> Any:
    """The answer to `request`, of the type that `ANSWERS` says. Raises `ProtocolError` for other bytes."""
    try:
        return _ANSWER_DECODERS[type(request)].decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"these bytes are no answer to a {type(request).__name__}: {error}") from error


class PersisterOfRequests:
    """The `Persister` seam: each method makes a request and has it answered by `ask`, which a subclass gives."""

    async def ask(self, request: Request) -> Any:
        """Have `request` done, durably, and return its answer."""
        raise NotImplementedError

    async def create(self, process: NewProcess) -> Created:
        answer: Created = await self.ask(CreateRequest(process))
        return answer

    async def claim(self, pid: str, owner: str, *, at: float) -> Claim:
        answer: Claim = await self.ask(ClaimRequest(pid, owner, at))
        return answer

    async def save(self, save: Save) -> Saved:
        answer: Saved = await self.ask(SaveRequest(save))
        return answer

    async def note(self, note: Note) -> None:
        await self.ask(NoteRequest(note))

    async def release(self, pid: str, epoch: int) -> None:
        await self.ask(ReleaseRequest(pid, epoch))

    async def set_aside(self, pid: str, epoch: int, reason: str) -> None:
        await self.ask(SetAsideRequest(pid, epoch, reason))

    async def revive(self, pid: str) -> Record:
        answer: Record = await self.ask(ReviveRequest(pid))
        return answer

    async def post(self, pid: str, body: bytes) -> Posted:
        answer: Posted = await self.ask(PostRequest(pid, body))
        return answer

    async def reply(self, pid: str, seq: int) -> bytes | None:
        answer: bytes | None = await self.ask(ReplyRequest(pid, seq))
        return answer

    async def send(self, pid: str, name: str, body: bytes, *, at: float, sender: str | None = None) -> Posted:
        answer: Posted = await self.ask(SendRequest(pid, name, body, at, sender))
        return answer

    async def load(self, pid: str) -> Record:
        answer: Record = await self.ask(LoadRequest(pid))
        return answer

    async def query(self, query: Query) -> Sequence[Record]:
        answer: Sequence[Record] = await self.ask(QueryRequest(query))
        return answer

    async def history(self, pid: str, after: int = 0) -> Sequence[Event]:
        answer: Sequence[Event] = await self.ask(HistoryRequest(pid, after))
        return answer

    async def log(
        self, pid: str, after: int = 0, limit: int = LOG_LIMIT, *, last: int | None = None
    ) -> Sequence[LogLine]:
        answer: Sequence[LogLine] = await self.ask(LogRequest(pid, after, limit, last))
        return answer

    async def past(self, pid: str) -> Sequence[Past]:
        answer: Sequence[Past] = await self.ask(PastRequest(pid))
        return answer

    async def past_checkpoint(self, pid: str, seq: int) -> bytes:
        answer: bytes = await self.ask(PastCheckpointRequest(pid, seq))
        return answer

    async def delete(self, pid: str) -> None:
        await self.ask(DeleteRequest(pid))

    async def prune(self, query: Query) -> int:
        answer: int = await self.ask(PruneRequest(query))
        return answer

    async def export(self, pid: str, after: Cursor | None = None) -> Portion:
        answer: Portion = await self.ask(ExportRequest(pid, after))
        return answer

    async def stage(self, arrival: str, number: int, portions: Sequence[Portion]) -> None:
        await self.ask(StageRequest(arrival, number, tuple(portions)))

    async def adopt(self, arrival: str, parcels: int, source: str, *, skip_existing: bool = False) -> Adopted:
        answer: Adopted = await self.ask(AdoptRequest(arrival, parcels, source, skip_existing))
        return answer


class RequestPersister(PersisterOfRequests):
    """The seam over `send`, which carries an encoded request to a store and brings back the encoded answer.

    The errors of the store arrive as exceptions that `send` raises.
    """

    def __init__(self, send: Callable[[bytes], Awaitable[bytes]]) -> None:
        self._send = send

    async def ask(self, request: Request) -> Any:
        return decode_answer(request, await self._send(encode_request(request)))


_ENCODER = msgspec.msgpack.Encoder()
_REQUEST_DECODER: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_ANSWER_DECODERS = {kind: msgspec.msgpack.Decoder(answer) for kind, answer in ANSWERS.items()}
