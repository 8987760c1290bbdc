"""The brokers of our peers, doing the same work in the same run: durable tasks and questions between two OS processes.

=========  ==================================================================================================
AiiDA      its ZeroMQ broker (aiida-core 2.9), started by us as an OS process. It does not fsync
kiwipy     over the RabbitMQ at ``127.0.0.1:5672`` (set ``AMQP_URL`` for another one), which must be running
=========  ==================================================================================================

``python -m benchmarks.rivals serve FOLDER`` is AiiDA's broker, ``... consume NAME ENDPOINT`` the other end of either.
Only the files of AiiDA's broker are imported, not the rest of that package (its dependencies are not needed).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import importlib.util
import os
import secrets
import signal
import sys
import threading
import time
import types
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.clock import percentile
from benchmarks.services import Services

AMQP_URL = os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/")
ECHO, COUNT = "echo", "count"
CREDIT = 200
READY_S = 20.0
LOOK_S = 0.005


def load(module: str) -> Any:
    """A module of ``aiida.brokers.zeromq`` without the packages around it."""
    folder = folder_of_aiida()
    if folder is None:
        raise ImportError("aiida-core is not installed")
    for name in ("aiida", "aiida.brokers", "aiida.brokers.zeromq"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules.setdefault(name, package)
    return importlib.import_module(f"aiida.brokers.zeromq.{module}")


@functools.cache  # `load` takes the place of the package, which then can't be found any more
def folder_of_aiida() -> Path | None:
    """Where its package is; None: its broker can't be measured."""
    spec = importlib.util.find_spec("aiida")
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])


def has_rabbitmq() -> bool:
    """Whether kiwipy finds a RabbitMQ."""
    if importlib.util.find_spec("kiwipy") is None:
        return False
    import socket
    from urllib.parse import urlsplit

    url = urlsplit(AMQP_URL)
    with contextlib.suppress(OSError), socket.create_connection((url.hostname or "127.0.0.1", url.port or 5672), 1.0):
        return True
    return False


# --- the other OS processes -------------------------------------------------------------------------


def serve(folder: str) -> None:
    """AiiDA's broker until it is terminated."""
    server = load("server").ZeromqBrokerServer(storage_path=Path(folder) / "tasks", sockets_path=Path(folder))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server.start()
    while not stop.is_set():
        server.run_once(1.0)
    server.stop()


def aiida_endpoint(folder: Path) -> str:
    return f"ipc://{folder}/router.sock"


def connected(name: str, endpoint: str) -> Any:
    """A communicator with kiwipy's interface for threads."""
    if name == "aiida":
        communicator = load("communicator").ZeromqCommunicator(endpoint, task_prefetch_count=CREDIT)
        communicator.start()
        return communicator
    import kiwipy.rmq

    return kiwipy.rmq.RmqThreadCommunicator.connect(
        {"url": AMQP_URL}, **names_of(endpoint), task_prefetch_count=CREDIT, testing_mode=False
    )


def names_of(endpoint: str) -> dict[str, str]:
    """What kiwipy uses of the RabbitMQ, for nobody else."""
    prefix = f"prunus-bench-{endpoint}"
    return {
        "message_exchange": f"{prefix}.messages",
        "task_exchange": f"{prefix}.tasks",
        "task_queue": f"{prefix}.queue",
    }


def consume(name: str, endpoint: str) -> None:
    done = [0]

    def take(_communicator: object, _task: object) -> bool:
        done[0] += 1
        return True

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    communicator = connected(name, endpoint)
    communicator.add_task_subscriber(take)
    communicator.add_rpc_subscriber(lambda _communicator, message: message, ECHO)
    communicator.add_rpc_subscriber(lambda _communicator, _message: done[0], COUNT)
    while not stop.wait(0.2):
        pass
    communicator.close()


# --- this one ---------------------------------------------------------------------------------------


class Rival:
    """One of them, with its consumer."""

    def __init__(self, name: str, endpoint: str) -> None:
        self.name, self._endpoint = name, endpoint
        self._communicator = connected(name, endpoint)

    def wait_for_consumer(self) -> None:
        """Until it answers."""
        end = time.monotonic() + READY_S
        while True:
            try:
                self._communicator.rpc_send(ECHO, "").result(1.0)
                return
            except Exception:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def count(self) -> int:
        return int(self._communicator.rpc_send(COUNT, "").result(READY_S))

    def questions_ms(self, number: int) -> list[float]:
        times = []
        for _ in range(number):
            begun = time.perf_counter()
            self._communicator.rpc_send(ECHO, "hello").result(READY_S)
            times.append((time.perf_counter() - begun) * 1e3)
        return times

    def tasks(self, body: str, in_flight: int, seconds: float) -> float:
        """Tasks per second: confirmed to the sender, delivered, handled."""
        return self._rate(lambda: asyncio.run(self._send_for(body, in_flight, seconds)))

    def tasks_of_a_thread(self, body: str, seconds: float) -> float:
        """The same from one thread by kiwipy's interface for threads, which waits for each confirmation: what programs
        do that are written for it (AiiDA, plumpy)."""

        def send() -> int:
            sent, end = 0, time.perf_counter() + seconds
            while time.perf_counter() < end:
                self._communicator.task_send(body, no_reply=True)
                sent += 1
            return sent

        return self._rate(send)

    def _rate(self, send: Callable[[], int]) -> float:
        """How many of those that `send` sent were handled in a second."""
        before = self.count()
        begun = time.perf_counter()
        sent = send()
        while self.count() - before < sent:
            time.sleep(LOOK_S)
        return sent / (time.perf_counter() - begun)

    async def _send_for(self, body: str, in_flight: int, seconds: float) -> int:
        end = time.perf_counter() + seconds
        sent = 0

        async def sender(send: Callable[[], Awaitable[object]]) -> None:
            nonlocal sent
            while time.perf_counter() < end:
                await send()
                sent += 1

        if self.name == "aiida":

            async def one() -> None:
                await asyncio.wrap_future(self._communicator.task_send(body))

            await asyncio.gather(*(sender(one) for _ in range(in_flight)))
            return sent
        # kiwipy's interface for threads waits for each confirmation; its interface for coroutines is the faster one.
        import kiwipy.rmq

        communicator = await kiwipy.rmq.async_connect({"url": AMQP_URL}, **names_of(self._endpoint))
        try:
            await asyncio.gather(
                *(sender(lambda: communicator.task_send(body, no_reply=True)) for _ in range(in_flight))
            )
        finally:
            await communicator.disconnect()
        return sent

    def close(self) -> None:
        self._communicator.close()


@contextlib.contextmanager
def rival(services: Services, name: str) -> Iterator[Rival]:
    """AiiDA's broker (``aiida``) or kiwipy over RabbitMQ (``rabbitmq``), with a consumer in another OS process."""
    program = [sys.executable, "-m", "benchmarks.rivals"]
    endpoint = secrets.token_hex(4)
    if name == "aiida":
        folder = services.profile.run_folder.parent / "aiida"
        folder.mkdir()
        services.spawn([*program, "serve", str(folder)], "aiida-broker")
        endpoint = aiida_endpoint(folder)
    services.spawn([*program, "consume", name, endpoint], f"{name}-consumer")
    one = Rival(name, endpoint)
    try:
        one.wait_for_consumer()
        yield one
    finally:
        one.close()
        if name == "rabbitmq":
            asyncio.run(forget(endpoint))


async def forget(endpoint: str) -> None:
    """Leave nothing at the RabbitMQ."""
    import aio_pika

    names = names_of(endpoint)
    connection = await aio_pika.connect(AMQP_URL)
    async with connection:
        channel = await connection.channel()
        with contextlib.suppress(Exception):
            await channel.queue_delete(names["task_queue"])
        for exchange in ("message_exchange", "task_exchange"):
            with contextlib.suppress(Exception):
                await channel.exchange_delete(names[exchange])


def summary(times: list[float]) -> tuple[float, float]:
    return percentile(times, 0.5), percentile(times, 0.99)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        consume(sys.argv[2], sys.argv[3])
