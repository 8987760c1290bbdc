"""Tasks, questions and broadcasts between OS processes through the real broker: this one sends, `consumer` receives.

A task is counted when it was stored (fsync, confirmed to the sender), delivered, acknowledged, and the
acknowledgement was stored as well. AiiDA's broker and kiwipy over RabbitMQ do the same work in the same run (see
`rivals`): AiiDA's does not fsync, RabbitMQ is a server that was started before.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import psutil

from benchmarks import rivals
from benchmarks.clock import ROUNDS, percentile
from benchmarks.consumer import ECHO, QUEUE
from benchmarks.processes import has_peers
from benchmarks.run import Report
from benchmarks.services import Services
from prunus.errors import UnroutableError
from prunus.messaging.communicator import Communicator
from prunus.messaging.connecting import connect_to
from prunus.messaging.local import LocalBroker

SECONDS = 6.0
BODY = b"x" * 300
IN_FLIGHT = 200
TASK_TURNS = 3
QUESTIONS, TURNS = 2000, 20
BESIDE = "the same, beside a peer"
MOST_OF_THE_LEAST = 1.5
"""So many times the least that it could be may a confirmation take."""
LISTENERS, LISTENING_PROCESSES, BROADCASTS = 100, 4, 200
CLIENTS, SUBSCRIPTIONS_EACH = 1000, 10
IDLE_S = 10.0
READY_S = 60.0
LOOK_S = 0.005


async def measure(report: Report) -> None:
    with Services() as services:
        broker = services.start("prunus.runtime.broker")
        endpoint = services.profile.endpoint
        services.spawn(consumer("tasks", endpoint), "consumer")
        async with await connect_to(endpoint, name="bench", timeout_s=READY_S) as communicator:
            await somebody_answers(communicator, ECHO)
            async with the_rivals(services) as theirs:
                await many_tasks(report, communicator, theirs)
                await tasks_one_by_one(report, communicator, theirs)
                await questions(report, communicator, theirs)
            await one_confirmation(report, communicator, services)
            report.doing(f"{LISTENERS} subscribers in {LISTENING_PROCESSES} OS processes")
            late = await broadcasts_ms(communicator, services)
            report.add(f"broadcast to {LISTENERS} subscribers, p50", percentile(late, 0.5), "ms")
            report.add(f"broadcast to {LISTENERS} subscribers, p99", percentile(late, 0.99), "ms", limit=20)
            report.doing(
                f"{CLIENTS:,} clients with {SUBSCRIPTIONS_EACH} subscriptions each do nothing for {IDLE_S:g} s"
            )
            idle = await crowd_percent(communicator, services, broker.pid)
            report.add(
                f"broker with {CLIENTS:,} idle clients, {CLIENTS * SUBSCRIPTIONS_EACH:,} subscriptions, of one core",
                idle,
                "%",
                limit=2,
            )
    # Not the same work: kiwipy's local communicator calls the subscriber as a function. Ours is its whole broker in
    # this process: messages are encoded, routed, answered once, and may time out.
    function_call = None
    if has_peers():
        from benchmarks.peers import kiwipy_rpc_us

        function_call = await asyncio.to_thread(kiwipy_rpc_us)
    report.add(
        "RPC in one OS process; theirs: a function call", await local_rpc_us(), "us", function_call, "kiwipy 0.9"
    )


@dataclass(frozen=True)
class Peer:
    """One of them, and how many times better than it we want to be."""

    rival: rivals.Rival
    title: str
    tasks: float | None = None
    tasks_of_a_thread: float | None = None
    questions: float | None = None


@contextlib.asynccontextmanager
async def the_rivals(services: Services) -> AsyncIterator[list[Peer]]:
    """Those that can be measured here. We and they do the same by turns: the machine may change its mind."""
    with contextlib.ExitStack() as stack:
        peers = []
        try:
            if rivals.folder_of_aiida():
                aiida = await asyncio.to_thread(stack.enter_context, rivals.rival(services, "aiida"))
                peers.append(Peer(aiida, "AiiDA 2.9 ZeroMQ", tasks=5))
            if rivals.has_rabbitmq():
                kiwipy = await asyncio.to_thread(stack.enter_context, rivals.rival(services, "rabbitmq"))
                peers.append(Peer(kiwipy, "kiwipy + RabbitMQ", tasks_of_a_thread=20, questions=5))
            yield peers
        finally:
            await asyncio.to_thread(stack.close)


async def many_tasks(report: Report, communicator: Communicator, peers: list[Peer]) -> None:
    body, seconds = BODY.decode(), SECONDS / TASK_TURNS
    ours, commits = list[float](), list[float]()
    theirs = {peer.title: list[float]() for peer in peers}
    by_a_thread = {peer.title: list[float]() for peer in peers if peer.tasks_of_a_thread}
    for _ in range(TASK_TURNS):
        rate, committed = await tasks(communicator, IN_FLIGHT, seconds)
        ours.append(rate)
        commits.append(committed)
        for peer in peers:
            theirs[peer.title].append(await asyncio.to_thread(peer.rival.tasks, body, IN_FLIGHT, seconds))
            if peer.tasks_of_a_thread:
                by_a_thread[peer.title].append(await asyncio.to_thread(peer.rival.tasks_of_a_thread, body, seconds))
    rate = mean(ours)
    report.add(f"durable tasks, {IN_FLIGHT} in flight ({mean(commits):,.0f} commits/s)", rate, "/s", limit=8000)
    for peer in peers:
        report.add(BESIDE, rate, "/s", mean(theirs[peer.title]), peer.title, aim=peer.tasks)
        if peer.tasks_of_a_thread:
            name = f"{peer.title}, its interface for threads"
            report.add(BESIDE, rate, "/s", mean(by_a_thread[peer.title]), name, aim=peer.tasks_of_a_thread)


async def tasks_one_by_one(report: Report, communicator: Communicator, peers: list[Peer]) -> None:
    seconds = SECONDS / TASK_TURNS
    ours, theirs = list[float](), {peer.title: list[float]() for peer in peers}
    for _ in range(TASK_TURNS):
        ours.append((await tasks(communicator, 1, seconds))[0])
        for peer in peers:
            theirs[peer.title].append(await asyncio.to_thread(peer.rival.tasks, BODY.decode(), 1, seconds))
    report.add("durable tasks, each sent after the confirmation of the last", mean(ours), "/s")
    for peer in peers:
        report.add(BESIDE, mean(ours), "/s", mean(theirs[peer.title]), peer.title)


async def questions(report: Report, communicator: Communicator, peers: list[Peer]) -> None:
    ours, theirs = list[float](), {peer.title: list[float]() for peer in peers}
    for _ in range(TURNS):
        ours += await questions_ms(communicator, QUESTIONS // TURNS)
        for peer in peers:
            theirs[peer.title] += await asyncio.to_thread(peer.rival.questions_ms, QUESTIONS // TURNS)
    for share, limit in ((0.5, 0.6), (0.99, 3.0)):
        ms = percentile(ours, share)
        report.add(f"RPC round trip, p{share * 100:.0f}", ms, "ms", limit=limit)
        for peer in peers:
            aim = peer.questions if share == 0.5 else None
            report.add(BESIDE, ms, "ms", percentile(theirs[peer.title], share), peer.title, aim=aim)


def consumer(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.consumer", *arguments]


async def somebody_answers(communicator: Communicator, name: str) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            try:
                await communicator.rpc_send(name, b"")
                return
            except UnroutableError:
                await asyncio.sleep(LOOK_S)


async def tasks(communicator: Communicator, in_flight: int, seconds: float) -> tuple[float, float]:
    """Tasks and commits per second."""
    before = await communicator.statistics()
    begun = time.perf_counter()
    end = begun + seconds
    count = itertools.count()

    async def send() -> None:
        while time.perf_counter() < end:
            await communicator.task_send(BODY, queue=QUEUE)
            next(count)

    await asyncio.gather(*(send() for _ in range(in_flight)))
    sent = next(count)
    while (now := await communicator.statistics()).settled - before.settled < sent:  # noqa: ASYNC110 (no event says so)
        await asyncio.sleep(LOOK_S)
    taken = time.perf_counter() - begun
    return sent / taken, (now.commits - before.commits) / taken


async def one_confirmation(report: Report, communicator: Communicator, services: Services) -> None:
    """How long a sender waits for one confirmation, beside the least that it could be: a round trip to a program that
    only appends a block to a file, syncs it, and answers. All are asked by turns: the machine may change its mind."""
    ours, over_zmq, plain = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory(prefix="prunus-bench-") as folder, contextlib.ExitStack() as stack:
        endpoint = f"ipc://{folder}/echo"
        services.spawn(consumer("echo", endpoint, f"{folder}/over-zmq"), "echo")
        ask_over_zmq = stack.enter_context(zmq_asker(endpoint))
        ask_plainly = stack.enter_context(plain_asker(Path(folder) / "plain"))
        for _ in range(TURNS):
            for _ in range(QUESTIONS // TURNS):
                begun = time.perf_counter()
                await communicator.task_send(BODY, queue="nobody takes these")
                ours.append((time.perf_counter() - begun) * 1e3)
            over_zmq += await asyncio.to_thread(times_ms, ask_over_zmq)
            plain += await asyncio.to_thread(times_ms, ask_plainly)
    await communicator.purge("nobody takes these")
    for how, least, aim in (("over ZeroMQ", over_zmq, 1 / MOST_OF_THE_LEAST), ("over a plain socket", plain, None)):
        report.add(
            "a task confirmed, p50; the least: one ipc round trip with one fsync in it",
            percentile(ours, 0.5),
            "ms",
            percentile(least, 0.5),
            how,
            aim=aim,
        )


def times_ms(ask: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(QUESTIONS // TURNS):
        begun = time.perf_counter()
        ask()
        times.append((time.perf_counter() - begun) * 1e3)
    return times


@contextlib.contextmanager
def zmq_asker(endpoint: str) -> Iterator[Callable[[], object]]:
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.connect(endpoint)

        def ask() -> None:
            dealer.send(BODY)
            dealer.recv()

        ask()
        yield ask


@contextlib.contextmanager
def plain_asker(file: Path) -> Iterator[Callable[[], object]]:
    """Two OS processes, one socket, nothing else."""
    ours, its = socket.socketpair()
    with ours, its:
        echo = subprocess.Popen(
            [sys.executable, "-c", ECHO_PROGRAM, str(its.fileno()), str(file)],
            pass_fds=[its.fileno()],
            start_new_session=True,
        )

        def ask() -> None:
            ours.send(BODY)
            ours.recv(1000)

        try:
            ask()
            yield ask
        finally:
            echo.kill()
            echo.wait()


ECHO_PROGRAM = """
import os, socket, sys
peer = socket.socket(fileno=int(sys.argv[1]))
with open(sys.argv[2], "wb", buffering=0) as file:
    while data := peer.recv(1000):
        file.write(bytes(4096))
        os.fdatasync(file.fileno())
        peer.send(data)
"""


async def questions_ms(communicator: Communicator, number: int) -> list[float]:
    times = []
    for _ in range(number):
        begun = time.perf_counter()
        await communicator.rpc_send(ECHO, BODY)
        times.append((time.perf_counter() - begun) * 1e3)
    return times


async def broadcasts_ms(communicator: Communicator, services: Services) -> list[float]:
    """How long after it was sent each subscriber had each broadcast."""
    names = [f"listeners-{number}" for number in range(LISTENING_PROCESSES)]
    listeners = [
        services.spawn(consumer("listeners", services.profile.endpoint, name, str(LISTENERS // len(names))), name)
        for name in names
    ]
    for name in names:
        await somebody_answers(communicator, name)
    late: list[float] = []
    for number in range(BROADCASTS):
        await communicator.broadcast_send(str(time.perf_counter()).encode(), subject=f"bench.{number}")
        await asyncio.sleep(0.02)
    while len(late) < BROADCASTS * LISTENERS:
        for name in names:
            late += json.loads(await communicator.rpc_send(name, b""))
    for listener in listeners:
        listener.terminate()
    return late


async def crowd_percent(communicator: Communicator, services: Services, broker_pid: int) -> float:
    crowd = services.spawn(consumer("crowd", services.profile.endpoint, str(CLIENTS), str(SUBSCRIPTIONS_EACH)), "crowd")
    async with asyncio.timeout(READY_S):
        while (await communicator.statistics()).broadcast_subscriptions < CLIENTS * SUBSCRIPTIONS_EACH:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    broker = psutil.Process(broker_pid)
    before, begun = cpu_s(broker), time.perf_counter()
    await asyncio.sleep(IDLE_S)
    percent = (cpu_s(broker) - before) / (time.perf_counter() - begun) * 100
    crowd.kill()
    return percent


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


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
