"""The other OS process: takes the tasks of a queue and answers questions until it is terminated.

``python -m benchmarks.consumer ENDPOINT``
"""

from __future__ import annotations

import asyncio
import signal
import sys

from prunus.messaging.communicator import IncomingTask
from prunus.messaging.zeromq import connect_zmq

QUEUE = "bench"
ECHO = "echo"
CREDIT = 64


async def consume(endpoint: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with await connect_zmq(endpoint, name="consumer") as communicator:
        await communicator.add_task_subscriber(take, queue=QUEUE, credit=CREDIT)
        await communicator.add_rpc_subscriber(echo, ECHO)
        await stop.wait()


async def take(task: IncomingTask) -> None:
    """Done as soon as it is here."""


async def echo(body: bytes) -> bytes:
    return body


if __name__ == "__main__":
    asyncio.run(consume(sys.argv[1]))
