"""What can't be decoded: on the broker's socket, in an inbox, in a queue, in a request. Nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from pathlib import Path

import pytest

from prunus.errors import InvalidStateError, ProtocolError
from prunus.messaging.connecting import connect_to
from prunus.messaging.messages import MAGIC, PROTOCOL, Heartbeat, encode
from prunus.messaging.unix import socket_path
from prunus.runtime.backend import CONTROL_LANE, RUN_LANE
from tests.faults.parts import Services
from tests.messaging.raw import raw_peer
from tests.runtime import workflows
from tests.runtime.waiting import file_has, until

HEADER = bytes([MAGIC, PROTOCOL])
NOISE = random.Random(20)
FRAMES = [
    b"",
    b"hello",
    HEADER,
    HEADER + b"\xc1",
    HEADER + NOISE.randbytes(1000),
    bytes([MAGIC, PROTOCOL + 1]) + b"\x90",
    HEADER + b"\x91" * 10_000,
    HEADER + b"\xdf\xff\xff\xff\xff",
    encode(Heartbeat(seen=0)) + b"more",
    NOISE.randbytes(1024 * 1024),
]
STREAMS = [
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    NOISE.randbytes(100_000),
    b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + bytes(48),  # a client of ZeroMQ
    b"\x00",
    b"\x00\x10\x00\x00a frame that does not end",
    b"\xff\xff\xff\xff" + bytes(100_000),
]


def say_frames(endpoint: str) -> None:
    """Each frame on a connection of its own, and all on one: that one is not listened to any more."""
    for frames in [*([one] for one in FRAMES), FRAMES]:
        with raw_peer(endpoint) as peer:
            for frame in frames:
                peer.send(frame)
            assert peer.recv()[:1] == HEADER[:1], "the broker says in its language that it does not understand"


def say_streams(path: Path) -> list[socket.socket]:
    """Bytes that are not even frames; half of the connections stay open."""
    opened = []
    for stream in STREAMS * 2:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was hung up on: well so
            connection.sendall(stream)
        opened.append(connection)
    for connection in opened[::2]:
        connection.close()
    return opened[1::2]


@pytest.mark.timeout(60)
async def test_the_broker_goes_on(short_folder: Path) -> None:
    """Whoever may connect says anything: the same broker serves the others as before."""
    journal = short_folder / "journal"
    async with Services(short_folder, workers=1) as services:
        inputs = {"file": str(journal), "steps": 60, "pace_s": 0.01}
        handle = await services.controller.launch(workflows.Journal, inputs)
        await file_has(journal, 3)
        endpoint = services.profile.endpoint
        await asyncio.to_thread(say_frames, endpoint)
        left_open = await asyncio.to_thread(say_streams, socket_path(endpoint))
        assert (await handle.result()).outputs.written == 60
        assert len(journal.read_text().splitlines()) == 60, "no step ran again"
        assert [event.subject for event in await handle.history()].count("claimed") == 1
        statistics = await services.controller.broker_statistics()
        assert statistics["pid"] == services.services["broker"].pid
        assert statistics["protocol_errors"] >= len(FRAMES)
        assert "a connection sends nonsense; it is not listened to any more" in services.log("broker")
        assert "Traceback" not in services.log("broker")
        for connection in left_open:
            connection.close()


@pytest.mark.timeout(60)
async def test_letters_tasks_and_requests_that_mean_nothing(short_folder: Path) -> None:
    """A letter is dropped with a word in the log, a task is done with, a request is answered with the error."""
    journal = short_folder / "journal"
    async with Services(short_folder, workers=1) as services:
        asked = await services.controller.launch(workflows.Ask)
        running = await services.controller.launch(
            workflows.Journal, {"file": str(journal), "steps": 100_000, "pace_s": 0.01}
        )
        await until(asked, lambda row: row.state == "waiting" and row.owner is None)
        await file_has(journal, 2)
        async with await connect_to(services.profile.endpoint, name="stranger") as stranger:
            persister = services.controller._backend.persister
            for pid in (asked.pid, running.pid):
                for body in (b"", b"\xff\xc1", b'{"type": "dance"}', NOISE.randbytes(100)):
                    posted = await persister.post(pid, body)
                await until(services.controller.handle(pid), lambda row, seq=posted.seq: row.inbox_done >= seq)
                await services.said("worker-1", f"process {pid} got a letter that can't be read", times=4)

            for queue in (RUN_LANE, CONTROL_LANE):
                await stranger.task_send(b"no key", queue=queue)
                await stranger.task_send(NOISE.randbytes(100), queue=queue, key="nobody")
            await stranger.task_send(b"what", queue="a queue of nobody", key="x")

            for request in (b"", b"\xff\xc1", NOISE.randbytes(1000), b'{"type": "drop table"}', b"\x82\xa4type"):
                with pytest.raises(ProtocolError, match="no request to a process store"):
                    await stranger.call([request])
        await asked.resume("fine")
        assert (await asked.result()).outputs.answer == "fine"
        with pytest.raises(InvalidStateError):
            await asked.resume("again")
        await running.kill()
        statistics = await services.controller.broker_statistics()
        assert statistics["pid"] == services.services["broker"].pid
        assert statistics["queues"]["a queue of nobody"]["ready"] == 1
