"""A broker with blobs that kills itself: ``python blob_broker_program.py DATABASE ENDPOINT METHOD NUMBER``.

SIGKILL comes in the middle of the call NUMBER of ``put`` or ``read`` of its blob store (0: never). It prints ``ready``
when it serves.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from prunus.messaging.blobs import BlobStore
from prunus.messaging.doors import Connection
from prunus.messaging.exchange import Exchange
from prunus.messaging.liveness import boottime
from prunus.messaging.server import Server
from tests.messaging.broker_program import open_database


class Mortal(BlobStore):
    """It dies after the work of a call, before anybody hears of it."""

    def __init__(self, folder: Path, method: str, number: int) -> None:
        super().__init__(folder, boottime())
        self._method, self._left = method, number

    def put(self, now: float, session: str, digest: str, offset: int, total: int, chunk: bytes) -> int:
        size = super().put(now, session, digest, offset, total, chunk)
        self._count_down("put")
        return size

    def read(self, digest: str, offset: int, limit: int) -> tuple[int, bytes]:
        found = super().read(digest, offset, limit)
        self._count_down("read")
        return found

    def _count_down(self, method: str) -> None:
        if method == self._method:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def main(path: str, endpoint: str, method: str, number: str) -> None:
    blobs = Mortal(Path(path).with_name("blobs"), method, int(number))
    exchange: Exchange[Connection] = Exchange(open_database(path), blobs=blobs, now=boottime())
    with Server(exchange, endpoint) as server:
        print("ready", flush=True)
        server.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
