"""A broker as a program of its own, for tests that kill it: ``python broker_program.py DATABASE ENDPOINT [LEASE_S]``.

It prints ``ready`` when it serves.
"""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

from prunus.messaging.blobs import BlobStore
from prunus.messaging.doors import Connection
from prunus.messaging.exchange import Exchange
from prunus.messaging.liveness import boottime
from prunus.messaging.messages import LEASE_S
from prunus.messaging.server import Server
from prunus.testing.communicator_contract import ContractService


def open_database(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def main(path: str, endpoint: str, lease_s: str = str(LEASE_S)) -> None:
    connection = open_database(path)
    exchange: Exchange[Connection] = Exchange(
        connection,
        service=ContractService(connection),
        blobs=BlobStore(Path(path).with_name("blobs"), boottime()),
        now=boottime(),
        lease_s=float(lease_s),
    )
    with Server(exchange, endpoint) as server:
        print("ready", flush=True)
        server.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
