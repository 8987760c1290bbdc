"""A peer behind a network, for tests that cut it: ``python network_program.py KEY_FILE QUEUE``.

It holds what it gets from the queue until it is asked ``finish``, then all of it is done. It prints ``held <body>`` for
each task, ``away`` when it gives up a connection and ``back`` when it has a new one. It notices a silence sooner than a
real peer, so that a test need not wait so long.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from prunus.messaging import client
from prunus.messaging.communicator import IncomingTask
from prunus.messaging.connecting import connect_to

SILENCE_S = 2.0
HEARTBEAT_S = 0.5


class SayAway(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "connecting again":
            print("away", flush=True)


async def main(file: str, queue: str) -> None:
    client.SILENCE_S, client.HEARTBEAT_S = SILENCE_S, HEARTBEAT_S
    logging.basicConfig(level=logging.INFO, handlers=[SayAway()])
    finish = asyncio.Event()

    async def hold(task: IncomingTask) -> bytes:
        print("held", task.body.decode(), flush=True)
        await finish.wait()
        return b"done"

    async def answer(body: bytes) -> bytes:
        if body == b"finish":
            finish.set()
        return body

    async with await connect_to(file, name="program", timeout_s=20) as communicator:
        communicator.on_reconnect(lambda: print("back", flush=True))
        await communicator.add_rpc_subscriber(answer, queue)
        await communicator.add_task_subscriber(hold, queue=queue, credit=10)
        print("ready", flush=True)
        await asyncio.get_running_loop().create_future()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
