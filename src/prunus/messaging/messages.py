"""What clients and the broker say to each other: two closed unions of frozen messages, and their bytes.

A message is one frame: `MAGIC`, the protocol version, then the fields in msgpack. Bodies are opaque. Nothing in a
message has authority by itself: who speaks is decided by the session that said `Hello` on that connection.

Rules
- Bytes that are no message raise `ProtocolError` and nothing else; the decoder never imports or calls anything.
- A frame over `MAX_FRAME_BYTES` is refused (`MessageTooLargeError`) before it is sent.
- Each request carries an `id` that its client chose, rising by one. Saying a request again (after a reconnection) is
  harmless: the broker answers as it did the first time.
- Fields are only ever added at the end and with a default; anything else raises `PROTOCOL`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import msgspec

from prunus.errors import Failure, MessageTooLargeError, ProtocolError, speakable
from prunus.messaging.communicator import DEFAULT_QUEUE, MAX_BODY_BYTES
from prunus.messaging.inventory import MAX_LISTED, QueueLimits, Statistics, TaskInfo, TaskPlace

PROTOCOL = 1
"""The version of the language; both sides must speak the same one."""
MAGIC = 0xB5
"""The first byte of each frame."""
MAX_FRAME_BYTES = MAX_BODY_BYTES + 1024 * 1024
"""A frame may be this much larger than the largest body: names, ids, lists of held tasks."""
FORWARD_BYTES = 64 * 1024
"""What the broker passes on may be this much larger than what it got: it says who asked."""
MAX_NAME_CHARS = 1024
"""The longest session, queue, key, identifier, sender or subject."""
CHUNK_BYTES = 1024 * 1024
"""A blob travels in pieces of up to this."""
MAX_PRIORITY = 9
MAX_CREDIT = 1_000_000
"""Tasks of one queue that a session may ask for at once."""
MAX_TASK_SUBSCRIPTIONS = 1_000
"""Of one session."""
MAX_PATTERNS = 10_000
"""Broadcast subscriptions of one session."""
MAX_IDENTIFIERS = 10_000
"""Names under which one session answers."""
MAX_STATED_BYTES = 8 * 1024 * 1024
"""What all subscriptions of a session may take in its `Hello`; ..."""
MAX_HELD_BYTES = 4 * 1024 * 1024
"""... the tasks that it holds (see `bytes_in_hello`): with more it is offered none, whatever its credit; ..."""
MAX_AWAITED_BYTES = 4 * 1024 * 1024
"""... and those whose results it waits for. All of it together is less than a frame."""

Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
SessionName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:-]{1,200}\Z")]
Credit = Annotated[int, msgspec.Meta(ge=0, le=MAX_CREDIT)]
Priority = Annotated[int, msgspec.Meta(ge=0, le=MAX_PRIORITY)]
LEASE_S = 15.0
"""A session of which nothing was heard for so long is gone, unless its broker was told otherwise."""

Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
MAX_MOMENT = 1e11
"""In the year 5138."""
Moment = Annotated[float, msgspec.Meta(ge=0.0, le=MAX_MOMENT)]
"""Wall-clock time, in seconds since 1970."""
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""The SHA-256 of a blob, which is its name."""
Chunk = Annotated[bytes, msgspec.Meta(max_length=CHUNK_BYTES)]
Outcome = bytes | Failure | None
"""What a handler made of a message: a result, an error, or nothing to say."""


class Peer(msgspec.Struct, frozen=True, array_like=True):
    """Which operating system process a session lives in, so that its death can be proved.

    `host` names the boot and the PID namespace (empty: unknown, nothing can be proved), `started` the start time of
    `pid` in clock ticks, which tells a process from a later one with the same number.
    """

    host: Name = ""
    pid: Number = 0
    started: Number = 0


class _FromClient(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    pass


class _FromBroker(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    pass


# --- client -> broker -------------------------------------------------------------------------------


class Hello(_FromClient, frozen=True, tag=1):
    """The first message of a connection: who I am, and all that should be true of me. Said again it changes nothing.

    Tasks that the broker thinks I hold and that are not in `held` never reached me: they are queued again.
    """

    session: SessionName
    peer: Peer
    held: tuple[tuple[Name, Number], ...] = ()
    """(task, epoch) of each task in hand."""
    awaited: tuple[Name, ...] = ()
    """Tasks whose result I wait for."""
    queues: tuple[tuple[Name, Credit], ...] = ()
    """(queue, credit) of each task subscription that takes every subject."""
    identifiers: tuple[tuple[Name, Number], ...] = ()
    """(identifier, the `Done.since` with which it became mine, or 0)"""
    patterns: tuple[tuple[Number, Name | None, Name | None], ...] = ()
    """(subscription, sender, subject) of each broadcast subscription."""
    seen: Number = 0
    """All my requests below this id are answered."""
    expected: tuple[Name, ...] = ()
    """Tasks that I may have sent and whose result I shall wait for; I shall send them again."""
    filtered: tuple[tuple[Name, Name, Credit], ...] = ()
    """(queue, subject pattern, credit) of each other task subscription."""
    secret: Name = ""
    """Known to this session and the broker alone: nobody else can speak as this session."""
    shared: tuple[tuple[Name, Name | None], ...] = ()
    """(queue, subject pattern) of each task subscription that is shared."""
    epoch: Number = 0
    """The `broker_epoch` of my last `Welcome`; 0: there was none."""
    turn: Number = 0
    """Rises with each that I say. One that comes after a later one, from a connection that is gone, is not listened to;
    0: I do not count them."""


class Heartbeat(_FromClient, frozen=True, tag=2):
    """I live; answered by `Alive`."""

    seen: Number = 0
    round_trip_s: Seconds = 0.0
    """How long the last `Heartbeat` took to its `Alive`; 0: unknown."""


class Goodbye(_FromClient, frozen=True, tag=3):
    """I leave for good: give my tasks to others and forget me."""

    id: Number


class TaskSend(_FromClient, frozen=True, tag=4):
    """Store a task; answered by `TaskStored` when it is durable."""

    id: Number
    task: Name
    body: bytes
    queue: Name = DEFAULT_QUEUE
    key: Name | None = None
    priority: Priority = 0
    want_result: bool = False
    subject: Name | None = None
    """What it is about: subscribers may ask for some subjects only."""
    replace: bool = False
    """Take the place of a pending task with the same key; else that one stands and this one is superfluous."""
    not_before: Moment = 0.0
    """Not to be delivered before this wall-clock time (seconds since 1970); 0: at once."""
    expires_at: Moment = 0.0
    """Dead, if it is still pending at this wall-clock time; 0: never."""
    max_attempts: Number = 0
    """Dead after so many deliveries that came to nothing; 0: no limit."""
    resources: tuple[tuple[Name, Number], ...] = ()
    """(resource, tokens) that are taken while it is held."""
    blob: Digest | None = None
    """Its body is this blob, which is there already; `body` is empty."""


class TaskSubscribe(_FromClient, frozen=True, tag=5):
    """Let me hold up to `credit` tasks of `queue` whose subject matches (0: take nothing new).

    A session has one subscription for each (queue, subject pattern); said again it changes the credit.
    """

    id: Number
    queue: Name
    credit: Credit
    subject: Name | None = None
    shared: bool = False
    """Tasks that I hold by any of my shared subscriptions count against the credit of each of them."""


class TaskUnsubscribe(_FromClient, frozen=True, tag=6):
    id: Number
    queue: Name
    subject: Name | None = None


class TaskAck(_FromClient, frozen=True, tag=7):
    """The task that I hold under `epoch` is done with."""

    id: Number
    task: Name
    epoch: Number
    outcome: Outcome = None


class TaskNack(_FromClient, frozen=True, tag=8):
    """I don't want the task that I hold under `epoch`: offer it again, a little later."""

    id: Number
    task: Name
    epoch: Number
    reason: str = ""
    """Why; kept as the reason if this was its last attempt."""
    attempted: bool = True
    """False: nobody tried it (the receiver had no room, or leaves); this delivery does not count."""


class ResultSeen(_FromClient, frozen=True, tag=9):
    """I have the result of this task; forget it."""

    task: Name


class RpcSubscribe(_FromClient, frozen=True, tag=10):
    id: Number
    identifier: Name


class RpcUnsubscribe(_FromClient, frozen=True, tag=11):
    id: Number
    identifier: Name


class RpcRequest(_FromClient, frozen=True, tag=12):
    """A question; answered by `RpcDone` or `Refused`."""

    id: Number
    recipient: Name
    body: bytes
    timeout_s: Seconds
    since: Number = 0
    """The broker epoch under which it was first said."""


class RpcAnswer(_FromClient, frozen=True, tag=13):
    """My answer to question `id` of `caller`."""

    caller: Name
    id: Number
    outcome: Outcome


class BroadcastSubscribe(_FromClient, frozen=True, tag=14):
    id: Number
    subscription: Number
    sender: Name | None = None
    subject: Name | None = None


class BroadcastUnsubscribe(_FromClient, frozen=True, tag=15):
    id: Number
    subscription: Number


class BroadcastSend(_FromClient, frozen=True, tag=16):
    id: Number
    body: bytes
    sender: Name | None = None
    subject: Name | None = None


class Call(_FromClient, frozen=True, tag=17):
    """Requests to the service and acknowledgements, as one transaction; answered by `CallDone`."""

    id: Number
    requests: tuple[bytes, ...]
    acks: tuple[tuple[Name, Number], ...] = ()
    holding: tuple[tuple[Name, Number], ...] = ()
    """Do nothing unless I hold these tasks, each under this epoch, when it comes to that."""


class TaskList(_FromClient, frozen=True, tag=18):
    """Which tasks are there? Oldest first; answered by `TasksListed`."""

    id: Number
    queue: Name | None = None
    place: TaskPlace | None = None
    task: Name | None = None
    key: Name | None = None
    after: Number = 0
    """Only those with a greater `order` (the last one of the page before)."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_LISTED)] = 100
    bodies: bool = False
    """With their bodies, as many as fit into a frame."""


class TaskEdit(_FromClient, frozen=True, tag=19):
    """Do something to tasks that nobody holds; answered by `Edited`. Those that are named, or all of a queue and place.

    ``requeue``: offer it again at once, as if it were new (dead and delayed ones). ``bury``: to the dead letters.
    ``delete``: forget it; whoever waits for its result gets `TaskDeletedError`.
    """

    id: Number
    action: Literal["requeue", "bury", "delete"]
    tasks: tuple[Name, ...] = ()
    queue: Name | None = None
    place: TaskPlace | None = None


class QueueConfigure(_FromClient, frozen=True, tag=20):
    """Set the limits of a queue (all of them; None: no limit), for now and after a restart; answered by `Done`."""

    id: Number
    queue: Name
    limits: QueueLimits


class ResourceConfigure(_FromClient, frozen=True, tag=21):
    """There are so many tokens of this resource (None: no new task may ask for it any more); answered by `Done`."""

    id: Number
    resource: Name
    capacity: Number | None


class StatisticsAsk(_FromClient, frozen=True, tag=22):
    """How is the broker? Answered by `StatisticsTold`."""

    id: Number


class BlobPut(_FromClient, frozen=True, tag=23):
    """A piece of a blob of `total` bytes; answered by `BlobHeld`. Pieces come in order, from offset 0 on; an empty one
    asks how much is there already."""

    id: Number
    digest: Digest
    offset: Number
    total: Number
    chunk: Chunk


class BlobGet(_FromClient, frozen=True, tag=24):
    """Give me up to `limit` bytes of a blob; answered by `BlobPart`."""

    id: Number
    digest: Digest
    offset: Number
    limit: Annotated[int, msgspec.Meta(ge=1, le=CHUNK_BYTES)]


ClientMessage = (
    Hello
    | Heartbeat
    | Goodbye
    | TaskSend
    | TaskSubscribe
    | TaskUnsubscribe
    | TaskAck
    | TaskNack
    | ResultSeen
    | RpcSubscribe
    | RpcUnsubscribe
    | RpcRequest
    | RpcAnswer
    | BroadcastSubscribe
    | BroadcastUnsubscribe
    | BroadcastSend
    | Call
    | TaskList
    | TaskEdit
    | QueueConfigure
    | ResourceConfigure
    | StatisticsAsk
    | BlobPut
    | BlobGet
)
Request = (
    Goodbye
    | TaskSend
    | TaskSubscribe
    | TaskUnsubscribe
    | TaskAck
    | TaskNack
    | RpcSubscribe
    | RpcUnsubscribe
    | RpcRequest
    | BroadcastSubscribe
    | BroadcastUnsubscribe
    | BroadcastSend
    | Call
    | TaskList
    | TaskEdit
    | QueueConfigure
    | ResourceConfigure
    | StatisticsAsk
    | BlobPut
    | BlobGet
)
"""The messages with an `id`, which are said again until they are answered."""


# --- broker -> client -------------------------------------------------------------------------------


class Welcome(_FromBroker, frozen=True, tag=1):
    """You are known. `lost` are tasks that you no longer hold, `taken` identifiers that are somebody else's now."""

    broker_epoch: Number
    lost: tuple[Name, ...] = ()
    taken: tuple[Name, ...] = ()
    since: Number = 0
    """If not 0: your identifiers may have been somebody else's meanwhile, and are yours since then."""
    lease_s: Seconds = LEASE_S
    """Who shows no life for longer is taken for dead."""


class HelloNeeded(_FromBroker, frozen=True, tag=2):
    """I don't know this connection: say `Hello`."""


class Alive(_FromBroker, frozen=True, tag=3):
    """The answer to a heartbeat."""


class Done(_FromBroker, frozen=True, tag=4):
    """The request is done. `stale`: it was about a task that you do not hold, and changed nothing; `over`: nobody does,
    it is done with."""

    id: Number
    stale: bool = False
    since: Number = 0
    """Of an `RpcSubscribe`: what to say of the identifier in each `Hello`."""
    over: bool = False


class Refused(_FromBroker, frozen=True, tag=5):
    """The request was not done, or (`IndeterminateError`) nobody knows."""

    id: Number
    failure: Failure


class TaskStored(_FromBroker, frozen=True, tag=6):
    id: Number
    task: Name
    stored: bool
    """False: `task` is a pending one with the same key."""


class CallDone(_FromBroker, frozen=True, tag=7):
    id: Number
    answers: tuple[bytes, ...] = ()
    blob: Digest | None = None
    """Of a blob that is the list of the answers, in msgpack: they are too large for a message."""


class RpcDone(_FromBroker, frozen=True, tag=8):
    id: Number
    outcome: Outcome


class TaskDelivery(_FromBroker, frozen=True, tag=9):
    """You hold this task now, under `epoch`."""

    task: Name
    queue: Name
    key: Name | None
    body: bytes
    epoch: Number
    attempt: Number
    subject: Name | None = None
    pattern: Name | None = None
    """The subject pattern of the subscription whose credit it takes."""
    blob: Digest | None = None
    """Its body is this blob: get it."""


class TaskResult(_FromBroker, frozen=True, tag=10):
    """What became of a task whose result you wait for; say `ResultSeen`."""

    task: Name
    outcome: Outcome


class RpcDelivery(_FromBroker, frozen=True, tag=11):
    """A question to `identifier`, named by its caller and the caller's id. May be said again; then so is its answer."""

    caller: Name
    id: Number
    identifier: Name
    body: bytes


class BroadcastDelivery(_FromBroker, frozen=True, tag=12):
    body: bytes
    sender: Name | None
    subject: Name | None


class Violation(_FromBroker, frozen=True, tag=13):
    """You sent something that is no message of ours, or that was out of place; it changed nothing."""

    reason: str


class TasksListed(_FromBroker, frozen=True, tag=14):
    """`more`: there are others; ask again with ``after`` the order of the last one."""

    id: Number
    tasks: tuple[TaskInfo, ...]
    more: bool


class Edited(_FromBroker, frozen=True, tag=15):
    """So many tasks were changed. `held`: so many were not, because somebody works on them."""

    id: Number
    changed: Number
    held: Number = 0


class StatisticsTold(_FromBroker, frozen=True, tag=16):
    id: Number
    statistics: Statistics


class Missed(_FromBroker, frozen=True, tag=17):
    """You read too slowly: so many broadcasts for you were dropped since the last one that you got."""

    count: Number


class BlobHeld(_FromBroker, frozen=True, tag=18):
    """So many bytes of the blob are here, from the first one on: go on from there. If it is all, they are durable."""

    id: Number
    size: Number


class BlobPart(_FromBroker, frozen=True, tag=19):
    """Bytes of a blob that has `total`; fewer than asked for at its end, or if that is enough for now."""

    id: Number
    total: Number
    chunk: Chunk


class Unwelcome(_FromBroker, frozen=True, tag=20):
    """The answer to a `Hello` that is refused; nothing is kept of it. `BusyError`: a bound is reached, try again later.
    Anything else stays so."""

    failure: Failure


BrokerMessage = (
    Welcome
    | HelloNeeded
    | Alive
    | Done
    | Refused
    | TaskStored
    | CallDone
    | RpcDone
    | TaskDelivery
    | TaskResult
    | RpcDelivery
    | BroadcastDelivery
    | Violation
    | TasksListed
    | Edited
    | StatisticsTold
    | Missed
    | BlobHeld
    | BlobPart
    | Unwelcome
)

# --- bytes ------------------------------------------------------------------------------------------


def encode(message: ClientMessage | BrokerMessage) -> bytes:
    """The frame of a message. Raises `MessageTooLargeError`."""
    frame = _HEADER + _encoder.encode(message)
    if len(frame) > MAX_FRAME_BYTES:
        limit = MAX_FRAME_BYTES if isinstance(message, _FromClient) else MAX_FRAME_BYTES + FORWARD_BYTES
        if len(frame) > limit:
            raise MessageTooLargeError(len(frame), limit)
    return frame


def decode_from_client(frame: bytes) -> ClientMessage:
    """The message in a frame that a client sent. Raises `ProtocolError` and nothing else."""
    return _decode(_from_client, frame, MAX_FRAME_BYTES)


def decode_from_broker(frame: bytes) -> BrokerMessage:
    """The message in a frame that the broker sent. Raises `ProtocolError` and nothing else."""
    return _decode(_from_broker, frame, MAX_FRAME_BYTES + FORWARD_BYTES)


def encode_answers(answers: Sequence[bytes]) -> bytes:
    """The answers of a call as the bytes of a blob."""
    return _encoder.encode(answers)


def decode_answers(data: bytes) -> list[bytes]:
    return msgspec.msgpack.decode(data, type=list[bytes])


def bytes_in_hello(task: str) -> int:
    """What a task takes in a `Hello`, at most: its id, its epoch and what is around them."""
    return len(task.encode()) + 16


def outcome_of(error: BaseException) -> Failure:
    """`error` as data that certainly fits into a message: facts that have no form there are left out."""
    failure = Failure.of(error)
    try:
        return failure if len(_encoder.encode(failure)) < MAX_FRAME_BYTES // 4 else Failure(failure.type, "(too large)")
    except (TypeError, ValueError, OverflowError, RecursionError):
        return Failure(failure.type, speakable(failure.message), speakable(failure.traceback))


_HEADER = bytes((MAGIC, PROTOCOL))
_M = TypeVar("_M")
_encoder = msgspec.msgpack.Encoder()
_from_client: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_from_broker: msgspec.msgpack.Decoder[BrokerMessage] = msgspec.msgpack.Decoder(BrokerMessage)
_DECODER_ERRORS = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError)
"""What hostile bytes make the decoder raise: bad fields, bad UTF-8, unhashable keys, huge numbers, deep nesting."""


def _decode(decoder: msgspec.msgpack.Decoder[_M], frame: bytes, limit: int) -> _M:
    if len(frame) > limit:
        raise ProtocolError(f"a frame of {len(frame):,} bytes is over the limit of {limit:,}")
    if frame[:2] != _HEADER:
        if frame[:1] == _HEADER[:1] and len(frame) > 1:
            raise ProtocolError(f"the other side speaks protocol {frame[1]}, this one {PROTOCOL}; use the same Prunus")
        raise ProtocolError("these bytes are no message of Prunus")
    try:
        return decoder.decode(memoryview(frame)[2:])
    except _DECODER_ERRORS as error:
        raise ProtocolError(f"this message can't be read: {error}") from None
