"""What the tests of the communicator for kiwipy's users share: a real broker, and small things to wait with."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kiwipy

from prunus.compat import kiwipy as prunus_kiwipy
from prunus.compat.kiwipy import PrunusCommunicator
from prunus.messaging.exchange import Exchange
from prunus.messaging.server import Server

WAIT_S = 10.0
"""More than anything takes; a test that waits so long fails."""

Connect = Callable[..., PrunusCommunicator]


class Broker:
    """A real server on a real socket, in a thread, that can be stopped and started again on its database."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/run/s"
        self._database = folder / "broker.db"
        self.start()

    def start(self) -> None:
        serving = threading.Event()

        def serve() -> None:
            connection = sqlite3.connect(self._database, isolation_level=None)
            try:
                self.exchange: Any = Exchange(connection)
                with Server(self.exchange, self.endpoint) as self._server:
                    serving.set()
                    self._server.run()
            finally:
                connection.close()

        self._thread = threading.Thread(target=serve, name="prunus-broker")
        self._thread.start()
        assert serving.wait(WAIT_S)

    def stop(self) -> None:
        self._server.stop()
        self._thread.join()


class Stack:
    """Connects, and closes what it connected."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._open: list[PrunusCommunicator] = []

    def __call__(self, **options: Any) -> PrunusCommunicator:
        communicator = prunus_kiwipy.connect(self._endpoint, **options)
        self._open.append(communicator)
        return communicator

    def close(self) -> None:
        for communicator in self._open:
            communicator.close()


def result(future: Any) -> Any:
    """What a future comes to, through all the futures in it."""
    while isinstance(future, kiwipy.Future):
        future = future.result(WAIT_S)
    return future
