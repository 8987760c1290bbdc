"""Messages between peers: durable tasks, questions, broadcasts, and calls to the service behind the broker.

===============  ==========================================================================================
module           what it is
===============  ==========================================================================================
`communicator`   the seam: what a program sees of its peers
`messages`       what is said between a client and the broker, and its bytes
`inventory`      what a broker has in hand, as data
`patterns`       patterns of senders and subjects
`broker`         what the broker decides: a pure machine
`taskstore`      the broker's memory on disk
`blobs`          what is too large for a message, in files; `transfers`: how it gets there and back
`exchange`       core, disk and service behind one commit
`client`         what a client remembers and says again: a pure machine
`peer`           the communicator over it; `threaded` over a socket, `local` in a loop
`deliveries`     what comes for the handlers of a communicator, and what becomes of it
`handover`       how handlers are run in the loops of their subscribers
`blocking`       the communicator for scripts and threads
`server`         the broker's turns, and what it keeps for peers that do not read
`doors`          the ways in: `unix` on one host, `zeromq` over a network with keys (each with the peer's side of it)
`connecting`     from an endpoint or a key to a communicator
`liveness`       the proof that a peer's process died
===============  ==========================================================================================

How one connects: `connect` or `connect_sync` to a broker at an endpoint, or `LocalBroker` for a broker in this process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunus.messaging.blocking import BlockingCommunicator
from prunus.messaging.communicator import (
    CONNECT_TIMEOUT_S,
    DEFAULT_QUEUE,
    MAX_BLOB_BYTES,
    MAX_BODY_BYTES,
    RPC_TIMEOUT_S,
    BlobRef,
    Broadcast,
    BroadcastHandler,
    Communicator,
    IncomingTask,
    RpcHandler,
    Subscription,
    TakenTask,
    TaskHandler,
    TaskReceipt,
)
from prunus.messaging.exchange import BrokerStoppedError, Exchange, NewTask, Served, Service
from prunus.messaging.inventory import QueueLimits, QueueStatistics, Statistics, TaskInfo, TaskPlace
from prunus.messaging.local import LocalBroker, LocalCommunicator
from prunus.messaging.peer import PeerCommunicator

if TYPE_CHECKING:
    from prunus.messaging.keys import ClientKey

__all__ = [
    "DEFAULT_QUEUE",
    "MAX_BLOB_BYTES",
    "MAX_BODY_BYTES",
    "RPC_TIMEOUT_S",
    "BlobRef",
    "BlockingCommunicator",
    "Broadcast",
    "BroadcastHandler",
    "BrokerStoppedError",
    "Communicator",
    "Exchange",
    "IncomingTask",
    "LocalBroker",
    "LocalCommunicator",
    "NewTask",
    "QueueLimits",
    "QueueStatistics",
    "RpcHandler",
    "Served",
    "Service",
    "Statistics",
    "Subscription",
    "TakenTask",
    "TaskHandler",
    "TaskInfo",
    "TaskPlace",
    "TaskReceipt",
    "connect",
    "connect_sync",
]


async def connect(
    endpoint: str | ClientKey, *, name: str = "peer", timeout_s: float = CONNECT_TIMEOUT_S
) -> PeerCommunicator:
    """A communicator at the broker at `endpoint`; leave it with ``async with`` or `close`.

    `endpoint` is ``ipc://`` and a path, or the key for a broker on a network. Raises `ConnectionLostError` if no broker
    answers within `timeout_s`, `KeyRefusedError` or `BusyError` (a bound is reached) if one does and refuses this
    client, `ProfileError` for an impossible endpoint.
    """
    from prunus.messaging.connecting import connect_to

    return await connect_to(endpoint, name=name, timeout_s=timeout_s)


def connect_sync(
    endpoint: str | ClientKey, *, name: str = "peer", timeout_s: float = CONNECT_TIMEOUT_S
) -> BlockingCommunicator:
    """The same for scripts and threads: its methods wait for their answers; leave it with ``with`` or `close`."""
    return BlockingCommunicator(lambda: connect(endpoint, name=name, timeout_s=timeout_s), name)
