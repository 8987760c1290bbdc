"""Who may say what: the roles of keys, as a table over the language.

==========  ==================================================================================================
viewer      looks: broadcasts, statistics, lists of tasks without their bodies, requests that change nothing
controller  also sends tasks and blobs, asks questions, broadcasts, makes requests, and edits queues and limits
worker      takes tasks and answers questions, and may say everything else but what administers the broker
owner       everything: whoever reaches the broker's socket in its private folder is its owner
==========  ==================================================================================================

A key fixes the role. The broker looks at each message before it does anything with it; what a request to the service
behind the broker means, only that service knows: it gets the role and decides (`Service.execute`).

What a `Hello` asks for beyond its role is left out of it (`reduced`) instead of refusing it all: the request that led
to it is said again after the `Hello`, and its refusal tells the client what it may not do.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import assert_never

import msgspec

from prunus.messaging.messages import (
    BlobGet,
    BlobPut,
    BroadcastSend,
    BroadcastSubscribe,
    BroadcastUnsubscribe,
    Call,
    ClientMessage,
    Goodbye,
    Heartbeat,
    Hello,
    QueueConfigure,
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
)


class Role(enum.StrEnum):
    """What a peer is there for; see the module."""

    VIEWER = "viewer"
    CONTROLLER = "controller"
    WORKER = "worker"
    OWNER = "owner"


@dataclass(frozen=True)
class Principal:
    """Who speaks on a connection: the name of the key that it came with (None: none is needed there) and its role."""

    key: str | None
    role: Role

    def __str__(self) -> str:
        return f"the key {self.key!r}" if self.key is not None else "the owner of the profile"


OWNER = Principal(None, Role.OWNER)
"""Whoever may open the broker's socket in its private folder."""

ALL = frozenset(Role)
SENDING = frozenset({Role.CONTROLLER, Role.WORKER, Role.OWNER})
WORKING = frozenset({Role.WORKER, Role.OWNER})
ADMINISTERING = frozenset({Role.CONTROLLER, Role.OWNER})


def who_may_say(message: ClientMessage) -> frozenset[Role]:
    """The roles that may say this."""
    match message:
        case Hello() | Heartbeat() | Goodbye() | BroadcastSubscribe() | BroadcastUnsubscribe() | StatisticsAsk():
            return ALL
        case TaskList(bodies=bodies):
            return SENDING if bodies else ALL
        case Call(acks=acks):
            return WORKING if acks else ALL
        case TaskSend() | ResultSeen() | RpcRequest() | BroadcastSend() | BlobPut() | BlobGet():
            return SENDING
        case TaskSubscribe() | TaskUnsubscribe() | TaskAck() | TaskNack():
            return WORKING
        case RpcSubscribe() | RpcUnsubscribe() | RpcAnswer():
            return WORKING
        case TaskEdit() | QueueConfigure() | ResourceConfigure():
            return ADMINISTERING
        case _:
            assert_never(message)


def reduced(role: Role, hello: Hello) -> Hello:
    """What this role may ask for of all that a `Hello` says."""
    if role not in SENDING:
        hello = msgspec.structs.replace(hello, awaited=(), expected=())
    if role not in WORKING:
        hello = msgspec.structs.replace(hello, held=(), queues=(), identifiers=(), filtered=())
    return hello


def what(message: ClientMessage) -> str:
    """Words for what a message asks for, in an error."""
    match message:
        case TaskList():
            return "to read the bodies of tasks"
        case Call():
            return "to acknowledge tasks"
        case TaskSend():
            return "to send tasks"
        case BlobPut():
            return "to put blobs"
        case BlobGet():
            return "to read blobs, which are bodies of tasks"
        case RpcRequest():
            return "to ask questions"
        case BroadcastSend():
            return "to broadcast"
        case TaskSubscribe() | TaskUnsubscribe() | TaskAck() | TaskNack():
            return "to work on tasks"
        case RpcSubscribe() | RpcUnsubscribe() | RpcAnswer():
            return "to answer questions"
        case TaskEdit():
            return "to edit tasks"
        case QueueConfigure() | ResourceConfigure():
            return "to set limits"
        case _:
            return f"to say {type(message).__name__}"
