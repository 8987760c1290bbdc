"""The clients and workers that are killed: small programs that write down all they do.

What a worker is told about its acknowledgements is written down where it passes by, at the transport: so nothing that
the communicator makes of it stands between the broker and the judge.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunus.errors import BusyError, NotDeliveredError, PrunusError, StoreFullError, TaskRejectedError
from prunus.messaging.communicator import Communicator, IncomingTask
from prunus.messaging.connecting import connect_to
from prunus.messaging.messages import (
    Done,
    Hello,
    TaskAck,
    TaskDelivery,
    decode_from_broker,
    decode_from_client,
)
from prunus.messaging.threaded import ThreadedCommunicator
from prunus.messaging.unix import UnixTransport
from tests.torture.kills.journal import Event, Journal

IN_FLIGHT = 16
"""Tasks that one client sends, and mostly waits for, at once."""
CREDIT = 8
PATIENCE_S = 30.0
"""How long a peer waits for its broker."""
MAX_WORK_S, SLOW_WORK_S = 0.004, 1.5
"""The work of most tasks, and of those that `is_slow`: whoever is stopped has some of these in hand, and is back
while somebody else works on them."""
SLOW = 0.015
REJECTED, WAITED_FOR = 0.05, 0.7
"""How many of the tasks, as `SLOW`."""
NO_EFFECT = (BusyError, StoreFullError, NotDeliveredError)


class RecordingTransport(UnixTransport):
    """Writes down deliveries, acknowledgements, and what is said to these."""

    def __init__(self, endpoint: str, journal: Journal) -> None:
        super().__init__(endpoint)
        self._journal = journal
        self._session = ""
        self._acks: set[int] = set()

    def send(self, frame: bytes) -> None:
        match decode_from_client(frame):
            case Hello(session=session):
                self._session = session
            case TaskAck(id=request, task=task, epoch=epoch):
                self._acks.add(request)
                self._note("ack", request=request, task=task, epoch=epoch)
            case _:
                pass
        super().send(frame)

    def receive(self) -> tuple[list[bytes], str | None]:
        frames, broken = super().receive()
        for frame in frames:
            match decode_from_broker(frame):
                case TaskDelivery(task=task, epoch=epoch, body=body):
                    self._note("delivery", task=task, epoch=epoch, body=body.decode())
                case Done(id=request, stale=stale) if request in self._acks:
                    self._acks.discard(request)
                    self._note("stale" if stale else "accepted", request=request)
                case _:
                    pass
        return frames, broken

    def _note(self, kind: Any, **facts: Any) -> None:
        self._journal.write(Event(kind, self._journal.who, session=self._session, **facts))


def worker(arguments: Sequence[str]) -> None:
    """``worker NAME ENDPOINT JOURNAL SEED``: works on tasks until SIGTERM."""
    name, endpoint, file, seed = arguments
    asyncio.run(_work(endpoint, Journal(Path(file), name), random.Random(int(seed))))


async def _work(endpoint: str, journal: Journal, choice: random.Random) -> None:
    stop = _stop_event()
    communicator = ThreadedCommunicator(RecordingTransport(endpoint, journal), endpoint, journal.who)
    await communicator.connected(PATIENCE_S)

    async def take(task: IncomingTask) -> bytes:
        await asyncio.sleep(SLOW_WORK_S if is_slow(task.body) else choice.uniform(0, MAX_WORK_S))
        if choice.random() < REJECTED:
            raise TaskRejectedError("not now")
        return task.body

    async with communicator:
        await communicator.add_task_subscriber(take, credit=CREDIT)
        await stop.wait()


def client(arguments: Sequence[str]) -> None:
    """``client NAME ENDPOINT JOURNAL SEED``: sends tasks until SIGTERM, then waits for what it has sent."""
    name, endpoint, file, seed = arguments
    asyncio.run(_send(endpoint, Journal(Path(file), name), random.Random(int(seed))))


async def _send(endpoint: str, journal: Journal, choice: random.Random) -> None:
    stop = _stop_event()
    numbers = itertools.count()
    async with await connect_to(endpoint, name=journal.who, timeout_s=PATIENCE_S) as communicator:

        async def go_on() -> None:
            while not stop.is_set():
                body = f"{communicator.session}:{next(numbers)}"
                await _one(communicator, journal, body, choice.random() < WAITED_FOR)

        await asyncio.gather(*(go_on() for _ in range(IN_FLIGHT)))


async def _one(communicator: Communicator, journal: Journal, body: str, want_result: bool) -> None:
    def write(kind: Any, **facts: Any) -> None:
        journal.write(Event(kind, journal.who, body, **facts))

    write("invoke")
    try:
        # All of one priority: what a stopped worker had must not wait behind ever new tasks of a higher one.
        receipt = await communicator.task_send(body.encode(), want_result=want_result)
    except PrunusError as error:
        write("fail" if isinstance(error, NO_EFFECT) else "unknown", reason=repr(error))
        return
    write("ok", task=receipt.id)
    if want_result:
        try:
            result = await receipt.result()
        except PrunusError as error:  # for example: nobody knows
            write("unknown", reason=repr(error))
        else:
            write("result" if result.decode() == body else "unknown", reason=f"the result {result!r}")


def is_slow(body: bytes) -> bool:
    """The same for everybody who gets it."""
    return zlib.crc32(body) < SLOW * 2**32


def _stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    return stop
