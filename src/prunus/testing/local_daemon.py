"""A daemon inside a test: the real broker core, store, workers and controller in one event loop.

Everything is real (messages are encoded, checkpoints are written, claims have epochs) except the network and the
disk: the database is in memory unless a connection is given. A worker can be stopped, or "killed": then it forgets
everything at once, as a process that got SIGKILL does, and the broker hears of its death.

::

    async with LocalDaemon(workers=2) as daemon:
        handle = await daemon.controller.launch(MyWorkflow, {"x": 1})
        result = await handle.result()
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import msgspec

from prunus.messaging.local import LocalBroker, LocalCommunicator
from prunus.persistence.sqlite import ProcessStore, open_database
from prunus.runtime.backend import ProcessService
from prunus.runtime.controller import ProcessController
from prunus.runtime.reconcile import TasksOf
from prunus.runtime.remote import Connections
from prunus.runtime.worker import Worker


class LocalDaemon:
    """A broker, workers and a controller without a network; an async context manager."""

    def __init__(
        self,
        *,
        workers: int = 1,
        slots: int = 8,
        grace_s: float = 1.0,
        connection: sqlite3.Connection | None = None,
        clock: Callable[[], float] = time.time,
        connections: Connections | None = None,
    ) -> None:
        """`clock` is the wall clock of the store and of its timers; move it and call ``daemon.broker.tick()``.

        `connections` are those that its processes may ask for, whichever of its workers they run on."""
        self.connection = connection if connection is not None else open_database(":memory:")
        self.store = ProcessStore(self.connection, clock=clock)
        tasks = TasksOf(lambda: self.broker.exchange)
        self.broker = LocalBroker(self.connection, service=ProcessService(self.store, self._counts, clock, tasks=tasks))
        self._wanted, self._slots, self._grace_s = workers, slots, grace_s
        self._connections = connections
        self._workers: dict[str, tuple[Worker, LocalCommunicator, asyncio.Task[None]]] = {}
        self.controller: ProcessController

    def _counts(self) -> dict[str, Any]:
        counts: dict[str, Any] = msgspec.to_builtins(self.broker.exchange.statistics())
        return counts

    async def __aenter__(self) -> LocalDaemon:
        self.controller = ProcessController(await self.broker.connect(name="controller"))
        for number in range(1, self._wanted + 1):
            await self.start_worker(f"worker-{number}")
        return self

    async def __aexit__(self, *_: object) -> None:
        for name in list(self._workers):
            await self.stop_worker(name)
        await self.controller.close()
        self.broker.close()
        self.connection.close()

    async def start_worker(self, name: str) -> None:
        """One more worker; returns when it takes processes (or was killed before)."""
        communicator = await self.broker.connect(name=name)
        worker = Worker(communicator, slots=self._slots, grace_s=self._grace_s, connections=self._connections)
        task = asyncio.create_task(worker.run(), name=name)
        self._workers[name] = worker, communicator, task
        ready = asyncio.create_task(worker.ready.wait())
        await asyncio.wait((ready, task), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()

    async def stop_worker(self, name: str) -> None:
        """Gracefully, as SIGTERM does."""
        worker, communicator, task = self._workers.pop(name)
        worker.stop()
        await task
        await communicator.close()

    async def kill_worker(self, name: str) -> None:
        """As SIGKILL does: nothing is given back, checkpointed or said any more."""
        _, communicator, task = self._workers.pop(name)
        self.broker.kill(communicator)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await communicator.close()
