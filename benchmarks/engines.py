"""Whole engines of our peers that do the same work in the same run: short processes, created, run and ended durably.

======  =============================================================================================================
plumpy  two workers as its documentation builds them: a `ProcessLauncher` with a `PicklePersister` behind kiwipy's
        communicator and the RabbitMQ of `benchmarks.rivals.AMQP_URL`. Each process is a launch task with
        ``persist=True``: the broker keeps the task, the worker pickles the created process and says how it ended. That
        is one checkpoint (ours: each), without an fsync, and nothing is kept of the end
DBOS    with SQLite as its system database, in the two ways in which its users run workflows: one OS process that
        starts them in its own threads, and a client that enqueues for two worker processes. Each is measured as it is
        and with the database in WAL mode (which DBOS leaves as it finds it); the best of the four is what counts
======  =============================================================================================================

``python -m benchmarks.engines plumpy ENDPOINT FOLDER`` is a worker of the first, ``... dbos URL NAME`` of the second,
``... dbos-alone URL COUNT`` starts so many workflows itself and prints how many it did in a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import rivals
from benchmarks.services import Services

WORKERS = 2
IN_FLIGHT = 64
"""Processes of plumpy that are launched and not ended."""
DBOS_CONCURRENCY = 50
"""Workflows that one worker of DBOS runs at a time."""
WARM_UP = 20
PLUMPY_PROCESSES = 600
DBOS_WORKFLOWS = {"delete": 80, "wal": 400}
"""By the mode of the database."""
DBOS_THREADS = 8
"""More of them make a SQLite database no faster: one writes at a time."""
DBOS_POLLING_S = 0.01
"""How often a worker looks into its queue (DBOS's own choice: 1 s)."""
QUEUE = "bench"
LOOK_S = 0.02
READY_S = 60.0


def has_plumpy() -> bool:
    """Whether it is installed, and its RabbitMQ is there."""
    return importlib.util.find_spec("plumpy") is not None and rivals.has_rabbitmq()


def has_dbos() -> bool:
    return importlib.util.find_spec("dbos") is not None


def program(*words: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.engines", *words]


# --- plumpy ------------------------------------------------------------------------------------------


def plumpy_per_s() -> float:
    """Processes in a second: launched by this OS process, run by two others, each end heard of."""
    endpoint = secrets.token_hex(4)
    with Services() as services:
        folder = services.profile.path / "pickles"
        folder.mkdir()
        for number in range(WORKERS):
            services.spawn(program("plumpy", endpoint, str(folder)), f"plumpy-{number}")
        try:
            return asyncio.run(_launch_plumpy(endpoint))
        finally:
            asyncio.run(rivals.forget(endpoint))


async def _launch_plumpy(endpoint: str) -> float:
    import kiwipy.rmq
    from plumpy.process_comms import create_launch_body

    from benchmarks.peers import Trivial

    body = create_launch_body(Trivial, persist=True, nowait=False)
    communicator = await kiwipy.rmq.async_connect({"url": rivals.AMQP_URL}, **rivals.names_of(endpoint))
    try:

        async def launch(count: int) -> None:
            left = iter(range(count))

            async def one_after_the_other() -> None:
                for _ in left:
                    await (await communicator.task_send(body))

            await asyncio.gather(*(one_after_the_other() for _ in range(IN_FLIGHT)))

        async with asyncio.timeout(READY_S):
            await launch(WARM_UP * WORKERS)
            begun = time.perf_counter()
            await launch(PLUMPY_PROCESSES)
            return PLUMPY_PROCESSES / (time.perf_counter() - begun)
    finally:
        await communicator.disconnect()


def plumpy_worker(endpoint: str, folder: str) -> None:
    """Until it is terminated."""
    import plumpy
    from plumpy.process_comms import ProcessLauncher

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.add_signal_handler(signal.SIGTERM, loop.stop)
    launcher = ProcessLauncher(loop=loop, persister=plumpy.PicklePersister(folder))
    communicator = rivals.connected("rabbitmq", endpoint)
    plumpy.wrap_communicator(communicator, loop).add_task_subscriber(launcher)
    loop.run_forever()
    communicator.close()


# --- DBOS --------------------------------------------------------------------------------------------


def dbos_per_s() -> dict[str, float]:
    """Workflows in a second, by the way in which they are run."""
    rates = {}
    for mode, count in DBOS_WORKFLOWS.items():
        title = ", WAL" if mode == "wal" else ""
        with _database(mode) as (services, url):
            alone = services.spawn(program("dbos-alone", url, str(count)), "dbos")
            alone.wait(READY_S)
            rates[f"threads{title}"] = float(services.profile.log("dbos").read_text().split()[-1])
        with _database(mode) as (services, url):
            rates[f"queue{title}"] = _enqueue_dbos(services, url, count)
    return rates


@contextlib.contextmanager
def _database(mode: str) -> Iterator[tuple[Services, str]]:
    with Services() as services:
        file = services.profile.path / "dbos.sqlite"
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute(f"PRAGMA journal_mode={mode}")
        yield services, f"sqlite:///{file}"


def _enqueue_dbos(services: Services, url: str, count: int) -> float:
    from dbos import DBOSClient

    _migrate(url)
    client = DBOSClient(system_database_url=url)
    client.register_queue(QUEUE, worker_concurrency=DBOS_CONCURRENCY, polling_interval_sec=DBOS_POLLING_S)
    for number in range(WORKERS):
        services.spawn(program("dbos", url, f"worker-{number}"), f"dbos-{number}")
    try:
        _enqueue(client, WARM_UP * WORKERS)
        _until_ended(url, WARM_UP * WORKERS)
        begun = time.perf_counter()
        _enqueue(client, count)
        _until_ended(url, WARM_UP * WORKERS + count)
        return count / (time.perf_counter() - begun)
    finally:
        client.destroy()


def _enqueue(client: Any, count: int) -> None:
    left = iter(range(count))
    lock = threading.Lock()

    def one_after_the_other() -> None:
        while True:
            with lock:
                if next(left, None) is None:
                    return
            client.enqueue({"queue_name": QUEUE, "workflow_name": "short", "app_version": "bench"})

    threads = [threading.Thread(target=one_after_the_other) for _ in range(DBOS_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _until_ended(url: str, count: int) -> None:
    """(Looking costs them less than asking for each result.)"""
    end = time.monotonic() + READY_S
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"), timeout=READY_S)) as connection:
        while True:
            [ended] = connection.execute("SELECT count(*) FROM workflow_status WHERE status = 'SUCCESS'").fetchone()
            if ended >= count:
                return
            if time.monotonic() > end:
                raise TimeoutError(f"{ended} of {count} workflows of DBOS ended in {READY_S:g} s")
            time.sleep(LOOK_S)


def _dbos(url: str, name: str) -> Any:
    """Its class, launched in this OS process; with the workflow ``short``."""
    from dbos import DBOS

    DBOS(
        config={
            "name": "bench",
            "system_database_url": url,
            "application_version": "bench",
            "executor_id": name,
            "log_level": "WARNING",
        }
    )
    return DBOS


def _short(DBOS: Any) -> Any:
    @DBOS.step()  # type: ignore[untyped-decorator]
    def one() -> int:
        return time.monotonic_ns()

    @DBOS.workflow(name="short")  # type: ignore[untyped-decorator]
    def short() -> int:
        return int(one())

    return short


def _migrate(url: str) -> None:
    """Tables are made by the first that is launched: both workers at once would wait for each other."""
    command = program("dbos-alone", url, "0")
    subprocess.run(command, check=True, capture_output=True, timeout=READY_S)


def dbos_worker(url: str, name: str) -> None:
    """Until it is terminated."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    DBOS = _dbos(url, name)
    _short(DBOS)
    DBOS.launch()
    while not stop.wait(0.2):
        pass
    DBOS.destroy()


def dbos_alone(url: str, count: int) -> None:
    DBOS = _dbos(url, "alone")
    short = _short(DBOS)
    DBOS.launch()
    rate = 0.0

    def run(number: int) -> None:
        def one_after_the_other(share: Sequence[int]) -> None:
            for _ in share:
                DBOS.start_workflow(short).get_result(polling_interval_sec=DBOS_POLLING_S)

        threads = [
            threading.Thread(target=one_after_the_other, args=(range(number)[begin::DBOS_THREADS],))
            for begin in range(DBOS_THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    if count:
        run(WARM_UP)
        begun = time.perf_counter()
        run(count)
        rate = count / (time.perf_counter() - begun)
    DBOS.destroy()
    print(rate, flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["plumpy", endpoint, folder]:
            plumpy_worker(endpoint, folder)
        case ["dbos", url, name]:
            dbos_worker(url, name)
        case ["dbos-alone", url, count]:
            dbos_alone(url, int(count))
        case _:
            sys.exit(__doc__)
