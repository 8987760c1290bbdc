"""A real broker behind a real socket, in a thread of the tests."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunus.messaging.blobs import BlobStore
from prunus.messaging.doors import Connection
from prunus.messaging.exchange import Exchange
from prunus.messaging.liveness import boottime
from prunus.messaging.messages import LEASE_S
from prunus.messaging.server import Server
from prunus.testing.communicator_contract import ContractService


@contextmanager
def serving(endpoint: str, database: str = ":memory:", lease_s: float = LEASE_S) -> Iterator[Server]:
    """What it keeps is in `database`: by default gone at the end, but for blobs, which are beside its socket."""
    connection = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    blobs = BlobStore(Path(endpoint.removeprefix("ipc://")).with_name("blobs"), boottime())
    exchange: Exchange[Connection] = Exchange(
        connection, service=ContractService(connection), blobs=blobs, now=boottime(), lease_s=lease_s
    )
    with Server(exchange, endpoint) as server:
        thread = threading.Thread(target=server.run, name="prunus-broker")
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()
    connection.close()
