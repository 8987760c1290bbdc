"""A peer as a program of its own, for tests that kill it: ``python peer_program.py ENDPOINT QUEUE``.

It holds what it gets from the queue, answers questions to the name of the queue with its process id, except ``hang``,
and prints a line ``held <body>`` for each task and ``ready`` when it is subscribed.
"""

from __future__ import annotations

import asyncio
import os
import sys

from prunus.messaging.communicator import IncomingTask
from prunus.messaging.connecting import connect_to


async def main(endpoint: str, queue: str) -> None:
    for_ever = asyncio.get_running_loop().create_future()

    async def hold(task: IncomingTask) -> None:
        print("held", task.body.decode(), flush=True)
        await for_ever

    async def answer(body: bytes) -> bytes:
        if body == b"hang":
            print("asked", flush=True)
            await for_ever
        return str(os.getpid()).encode()

    async with await connect_to(endpoint, name="program") as communicator:
        await communicator.add_rpc_subscriber(answer, queue)
        await communicator.add_task_subscriber(hold, queue=queue, credit=10)
        print("ready", flush=True)
        await for_ever


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
