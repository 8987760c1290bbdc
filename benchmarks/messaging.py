"""Tasks and questions between two OS processes through the real broker: this one sends, `consumer` receives.

A task is counted when it was stored (fsync, confirmed to the sender), delivered, acknowledged, and the
acknowledgement was stored as well.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time

from benchmarks.clock import ROUNDS, percentile
from benchmarks.consumer import ECHO, QUEUE
from benchmarks.processes import has_peers
from benchmarks.run import Report
from benchmarks.services import Services
from prunus.errors import UnroutableError
from prunus.messaging.communicator import Communicator
from prunus.messaging.local import LocalBroker
from prunus.messaging.zeromq import connect_zmq
from prunus.runtime.backend import Backend

SECONDS = 3.0
BODY = b"x" * 100
QUESTIONS = 2000
READY_S = 20.0
LOOK_S = 0.005


async def measure(report: Report) -> None:
    with Services() as services:
        services.start("prunus.runtime.broker")
        endpoint = services.profile.endpoint
        services.spawn([sys.executable, "-m", "benchmarks.consumer", endpoint], "consumer")
        async with await connect_zmq(endpoint, name="bench", timeout_s=READY_S) as communicator:
            await consumer_is_ready(communicator)
            for in_flight in (64, 1):
                rate, commits = await tasks(communicator, in_flight)
                report.add(f"durable tasks, {in_flight} in flight ({commits:,.0f} commits/s)", rate, "/s")
            times = await questions_ms(communicator)
            report.add("RPC round trip, p50", percentile(times, 0.5), "ms")
            report.add("RPC round trip, p99", percentile(times, 0.99), "ms")
    # Not the same work: kiwipy's local communicator calls the subscriber as a function. Ours is its whole broker in
    # this process: messages are encoded, routed, answered once, and may time out.
    theirs = None
    if has_peers():
        from benchmarks.peers import kiwipy_rpc_us

        theirs = await asyncio.to_thread(kiwipy_rpc_us)
    report.add("RPC in one OS process; theirs: a function call", await local_rpc_us(), "us", theirs, "kiwipy 0.9")


async def consumer_is_ready(communicator: Communicator) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            try:
                await communicator.rpc_send(ECHO, b"")
                return
            except UnroutableError:
                await asyncio.sleep(LOOK_S)


async def tasks(communicator: Communicator, in_flight: int) -> tuple[float, float]:
    """Tasks and commits per second."""
    backend = Backend(communicator)
    before = await backend.statistics()
    begun = time.perf_counter()
    end = begun + SECONDS
    count = itertools.count()

    async def send() -> None:
        while time.perf_counter() < end:
            await communicator.task_send(BODY, queue=QUEUE)
            next(count)

    await asyncio.gather(*(send() for _ in range(in_flight)))
    sent = next(count)
    while (now := await backend.statistics())["settled"] - before["settled"] < sent:  # noqa: ASYNC110 (no event says so)
        await asyncio.sleep(LOOK_S)
    taken = time.perf_counter() - begun
    return sent / taken, (now["commits"] - before["commits"]) / taken


async def questions_ms(communicator: Communicator) -> list[float]:
    times = []
    for _ in range(QUESTIONS):
        begun = time.perf_counter()
        await communicator.rpc_send(ECHO, BODY)
        times.append((time.perf_counter() - begun) * 1e3)
    return times


async def local_rpc_us() -> float:
    """A question to a peer of the same `LocalBroker`."""

    async def echo(body: bytes) -> bytes:
        return body

    broker = LocalBroker()
    async with await broker.connect() as communicator:
        await communicator.add_rpc_subscriber(echo, ECHO)
        rounds = []
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            for _ in range(300):
                await communicator.rpc_send(ECHO, b"hello")
            rounds.append((time.perf_counter() - begun) / 300 * 1e6)
    broker.close()
    return min(rounds)
