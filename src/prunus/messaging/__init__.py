"""Messages between peers: durable tasks, questions, broadcasts, and calls to the service behind the broker.

===============  ==========================================================================================
module           what it is
===============  ==========================================================================================
`communicator`   the seam: what a program sees of its peers
`messages`       what is said between a client and the broker, and its bytes
`broker`         what the broker decides: a pure machine
`taskstore`      the broker's memory on disk
`exchange`       core, disk and service behind one commit
`client`         what a client remembers and says again: a pure machine
`peer`           the communicator over it; `threaded` with its own thread, `local` in a loop
`zeromq`         server and transport over ZeroMQ (the only module that imports it)
`liveness`       the proof that a peer's process died
===============  ==========================================================================================
"""

from prunus.messaging.communicator import (
    DEFAULT_QUEUE,
    MAX_BODY_BYTES,
    RPC_TIMEOUT_S,
    Broadcast,
    BroadcastHandler,
    Communicator,
    IncomingTask,
    RpcHandler,
    Subscription,
    TaskHandler,
    TaskReceipt,
)
from prunus.messaging.exchange import BrokerStoppedError, Exchange, NewTask, Served, Service
from prunus.messaging.local import LocalBroker, LocalCommunicator

__all__ = [
    "DEFAULT_QUEUE",
    "MAX_BODY_BYTES",
    "RPC_TIMEOUT_S",
    "Broadcast",
    "BroadcastHandler",
    "BrokerStoppedError",
    "Communicator",
    "Exchange",
    "IncomingTask",
    "LocalBroker",
    "LocalCommunicator",
    "NewTask",
    "RpcHandler",
    "Served",
    "Service",
    "Subscription",
    "TaskHandler",
    "TaskReceipt",
]
