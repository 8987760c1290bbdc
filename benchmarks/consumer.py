"""The other OS processes of the messaging benchmarks; each ends when it is terminated.

==========================================  ======================================================================
``consumer tasks ENDPOINT``                 takes the tasks of a queue and answers questions
``consumer listeners ENDPOINT NAME COUNT``  so many peers, each with a broadcast subscription; asked as NAME, they say
                                            how late each broadcast was
``consumer crowd ENDPOINT COUNT EACH``      so many connected clients with so many subscriptions each, on one thread
``consumer echo ENDPOINT FILE``             a bare ZeroMQ socket that sends everything back, each after a block that
                                            is appended to the file and synced
==========================================  ======================================================================
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time

from prunus.messaging.client import ClientCore
from prunus.messaging.communicator import Broadcast, IncomingTask
from prunus.messaging.connecting import connect_to
from prunus.messaging.liveness import this_peer
from prunus.messaging.messages import BroadcastSubscribe
from prunus.messaging.unix import UnixTransport

QUEUE = "bench"
ECHO = "echo"
CROWD_SUBJECT = "crowd"
CREDIT = 200
BLOCK_BYTES = 4096


async def consume(endpoint: str) -> None:
    async with await connect_to(endpoint, name="consumer") as communicator:
        await communicator.add_task_subscriber(take, queue=QUEUE, credit=CREDIT)
        await communicator.add_rpc_subscriber(echo, ECHO)
        await terminated()


async def take(task: IncomingTask) -> None:
    """Done as soon as it is here."""


async def echo(body: bytes) -> bytes:
    return body


async def listen(endpoint: str, name: str, count: int) -> None:
    late_ms: list[float] = []

    async def hear(broadcast: Broadcast) -> None:
        late_ms.append((time.perf_counter() - float(broadcast.body)) * 1e3)

    async def tell(body: bytes) -> bytes:
        said = json.dumps(late_ms).encode()
        late_ms.clear()
        return said

    peers = [await connect_to(endpoint, name=f"listener-{number}") for number in range(count)]
    for peer in peers:
        await peer.add_broadcast_subscriber(hear, subject="bench.#")
    await peers[0].add_rpc_subscriber(tell, name)
    await terminated()
    for peer in peers:
        await peer.close()


def crowd(endpoint: str, count: int, each: int) -> None:
    """Connections and client cores as in `connect_to`, without a thread for each."""
    members: list[tuple[UnixTransport, ClientCore]] = []
    for number in range(count):
        transport, core = UnixTransport(endpoint), ClientCore(f"crowd-{number:06}-{'0' * 16}", this_peer())
        now = time.monotonic()
        transport.open()
        core.connect(now)
        for one in range(each):
            core.ask(
                now, lambda id, one=one: BroadcastSubscribe(id=id, subscription=one, subject=f"{CROWD_SUBJECT}.{one}")
            )  # type: ignore[misc]
        members.append((transport, core))
    while True:
        due = min(core.due() for _, core in members)
        time.sleep(max(0.05, min(1.0, due - time.monotonic())))
        for transport, core in members:
            frames, _ = transport.receive()
            now = time.monotonic()
            for frame in frames:
                core.on_frame(now, frame)
            if core.due() <= now:
                core.tick(now)
            for frame in core.take():
                transport.send(frame)
            transport.flush()


def echo_raw(endpoint: str, file: str) -> None:
    import zmq

    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(endpoint)
    with open(file, "wb", buffering=0) as out:
        while True:
            frames = router.recv_multipart()
            out.write(bytes(BLOCK_BYTES))
            os.fdatasync(out.fileno())
            router.send_multipart(frames)


async def terminated() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tasks", endpoint]:
            asyncio.run(consume(endpoint))
        case ["listeners", endpoint, name, count]:
            asyncio.run(listen(endpoint, name, int(count)))
        case ["crowd", endpoint, count, each]:
            crowd(endpoint, int(count), int(each))
        case ["echo", endpoint, file]:
            echo_raw(endpoint, file)
        case _:
            sys.exit(__doc__)
