"""A broker as a program of its own, for tests that kill it: ``python broker_program.py DATABASE ENDPOINT``.

It prints ``ready`` when it serves.
"""

from __future__ import annotations

import sqlite3
import sys

from prunus.messaging.exchange import Exchange
from prunus.messaging.zeromq import ZmqServer
from prunus.testing.communicator_contract import ContractService


def open_database(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def main(path: str, endpoint: str) -> None:
    connection = open_database(path)
    with ZmqServer(Exchange(connection, service=ContractService(connection)), endpoint) as server:
        print("ready", flush=True)
        server.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
