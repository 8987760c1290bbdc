"""Uploads on a disk that is full: an error to the one who puts, and to nobody else; their space comes back.

With brokers on a real file system that is small (this needs the right to mount one).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from prunus.errors import StoreFullError
from prunus.messaging.blobs import GRACE_S, SWEEP_PAUSE_S, UPLOAD_IDLE_S
from prunus.messaging.communicator import MAX_BODY_BYTES, Communicator
from prunus.messaging.connecting import connect_to
from prunus.messaging.doors import Connection
from prunus.messaging.liveness import boottime
from prunus.messaging.messages import (
    CHUNK_BYTES,
    BlobHeld,
    BlobPut,
    BrokerMessage,
    Call,
    CallDone,
    ClientMessage,
    Hello,
    Peer,
    Refused,
    TaskSend,
    TaskStored,
    decode_from_broker,
    encode,
)
from prunus.runtime import upkeep
from prunus.runtime.broker import CHECK_INTERVAL_S, Broker
from prunus.runtime.upkeep import BackUp
from tests.disks import small_file_system
from tests.faults.parts import Services
from tests.faults.test_full_disk import fill, nearly_fill

MIB = 1024 * 1024
DISK = 80 * MIB
LARGE = 32 * MIB
"""One such blob fits, and two do not."""
SOME = 10 * MIB


@pytest.fixture
def disk(short_folder: Path) -> Iterator[Path]:
    """A small file system."""
    with small_file_system(short_folder / "disk", DISK) as folder:
        yield folder


def unfinished(folder: Path) -> list[int]:
    """The sizes of the uploads that are on the disk."""
    return [file.stat().st_size for file in (folder / "blobs" / "unfinished").glob("*")]


# --- with a broker process --------------------------------------------------------------------------


@pytest.mark.timeout(60)
async def test_a_blob_that_is_larger_than_the_disk(disk: Path) -> None:
    """It is refused to the one who puts it, again and again, and leaves nothing. Who sends tasks meanwhile, and puts
    what fits, notices nothing of it."""
    too_large, sent = bytes(DISK + 1), 0

    async def send(communicator: Communicator) -> None:
        nonlocal sent
        while not putting.done():
            await communicator.task_send(b"small", queue=f"queue-{sent}")
            sent += 1

    async def put(communicator: Communicator) -> None:
        for _ in range(10):
            with pytest.raises(StoreFullError, match=r"prunus\.db is full; free some space and try again"):
                await communicator.blob_put(too_large)
            assert unfinished(folder) == []

    async with Services(disk, workers=0) as services:
        folder, endpoint = services.profile.path, services.profile.endpoint
        async with await connect_to(endpoint) as greedy, await connect_to(endpoint) as modest:
            putting = asyncio.create_task(put(greedy))
            await asyncio.gather(putting, send(modest), send(modest))
            assert sent > 10
            body = os.urandom(MAX_BODY_BYTES + 1)
            await modest.task_send(body)
            async with await greedy.next_task() as task:
                assert task.body == body


@pytest.mark.timeout(60)
async def test_two_blobs_that_do_not_fit_together(disk: Path) -> None:
    """One of them is put, and the other one is refused, and leaves nothing: they do not hinder each other in vain."""
    bodies = [bytes(LARGE), bytes(LARGE + 1)]
    async with Services(disk, workers=0) as services:
        endpoint = services.profile.endpoint
        async with await connect_to(endpoint) as one, await connect_to(endpoint) as other:
            came = await asyncio.gather(one.blob_put(bodies[0]), other.blob_put(bodies[1]), return_exceptions=True)
            [refused] = [error for error in came if isinstance(error, BaseException)]
            assert isinstance(refused, StoreFullError)
            [ref] = [ref for ref in came if not isinstance(ref, BaseException)]
            assert unfinished(services.profile.path) == []
            assert await one.blob_get(ref) in bodies


# --- with a broker whose clock is the test's --------------------------------------------------------


class Desk:
    """A broker, two sessions that put and send, and the time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = Broker(folder / "prunus.db")
        self.now = boottime()
        self._requests = iter(range(1, 1_000_000))
        self._digests: dict[str, str] = {}
        for session in ("a", "b"):
            self._say(session, Hello(session=session, peer=Peer()))
            self._digests[session] = hashlib.sha256(session.encode() * LARGE).hexdigest()

    def put(self, session: str, offset: int) -> BrokerMessage:
        """A piece of the large blob of this session, which consists of its name."""
        chunk = session.encode() * CHUNK_BYTES
        return self._say(session, BlobPut(next(self._requests), self._digests[session], offset, LARGE, chunk))

    def put_whole(self, body: bytes) -> Path:
        """A small blob; where it is."""
        digest = hashlib.sha256(body).hexdigest()
        assert held(self._say("a", BlobPut(next(self._requests), digest, 0, len(body), body))) == len(body)
        return self.folder / "blobs" / digest[:2] / digest[2:]

    def put_some(self, session: str) -> None:
        for offset in range(0, SOME, CHUNK_BYTES):
            assert held(self.put(session, offset)) == offset + CHUNK_BYTES

    def send(self, session: str) -> BrokerMessage:
        """A small task."""
        number = next(self._requests)
        return self._say(session, TaskSend(id=number, task=f"task-{number}", body=b"small"))

    def back_up(self, file: Path) -> BrokerMessage:
        return self._say("a", Call(next(self._requests), (upkeep.encode(BackUp(file=str(file))),)))

    def look_after(self, seconds: float) -> None:
        """So much later."""
        self.now += seconds
        self.broker.look_after(self.now, put=lambda tasks: None)

    def close(self) -> None:
        self.broker.close()

    def _say(self, session: str, message: ClientMessage) -> BrokerMessage:
        route: Connection = session  # type: ignore[assignment]
        answers = self.broker.exchange.process(self.now, [(route, encode(message))])
        return decode_from_broker(answers[0][1])


def held(answer: BrokerMessage) -> int:
    assert isinstance(answer, BlobHeld), answer
    return answer.size


def is_refused(answer: BrokerMessage) -> bool:
    return isinstance(answer, Refused) and isinstance(answer.failure.to_exception(), StoreFullError)


@pytest.fixture
def desk(disk: Path) -> Iterator[Desk]:
    desk = Desk(disk)
    with closing(desk):
        yield desk


def test_somebody_else_takes_the_space(desk: Desk) -> None:
    """Whose next piece comes is refused and loses what came, so that others have its space. He goes on: the answer is
    that nothing is there. When there is space he begins anew."""
    desk.put_some("a")
    desk.put_some("b")
    fillers = [desk.folder / name for name in ("filler", "another")]
    nearly_fill(fillers[0])
    assert is_refused(desk.put("a", SOME))
    assert unfinished(desk.folder) == [SOME], "that of the other one"
    assert isinstance(desk.send("b"), TaskStored)
    assert held(desk.put("a", SOME + CHUNK_BYTES)) == 0
    assert is_refused(desk.put("a", 0)), "there is space for tasks, and not for all of it"
    nearly_fill(fillers[1])
    assert is_refused(desk.put("b", SOME))
    assert unfinished(desk.folder) == []
    for filler in fillers:
        filler.unlink()
    for offset in range(0, LARGE, CHUNK_BYTES):
        assert held(desk.put("a", offset)) == offset + CHUNK_BYTES
    assert unfinished(desk.folder) == []


def test_idle_uploads_go_while_nothing_may_be_changed(desk: Desk) -> None:
    """Also if their owners are there and say nothing. Their space is for others then; what was put as a whole stays."""
    desk.put_some("a")
    desk.put_some("b")
    fill(desk.folder / "filler")
    desk.look_after(CHECK_INTERVAL_S)
    fill(desk.folder / "filler")  # what was given up
    desk.look_after(CHECK_INTERVAL_S)
    assert desk.broker.exchange.refuse_changes is not None
    assert is_refused(desk.send("a"))
    desk.look_after(UPLOAD_IDLE_S - 3 * CHECK_INTERVAL_S)
    assert unfinished(desk.folder) == [SOME, SOME]
    desk.look_after(2 * CHECK_INTERVAL_S)
    assert unfinished(desk.folder) == []
    assert isinstance(desk.send("a"), TaskStored)
    assert held(desk.put("a", SOME)) == 0


def test_idle_uploads_go_during_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may take long. What was put as a whole stays: it may be what the backup has to copy yet."""
    with closing(Desk(tmp_path)) as desk:
        desk.put_some("a")
        whole = desk.put_whole(b"whole")
        monkeypatch.setattr(upkeep, "TURN_S", 0.0)  # it does not get on
        assert isinstance(desk.back_up(tmp_path / "backup.db"), CallDone)
        desk.look_after(UPLOAD_IDLE_S + 1)
        assert unfinished(tmp_path) == []
        for seconds in (GRACE_S, SWEEP_PAUSE_S, SWEEP_PAUSE_S):
            desk.look_after(seconds)
        assert whole.exists()
        monkeypatch.undo()
        while whole.exists():  # the backup gets on, and then nobody needs it
            desk.look_after(SWEEP_PAUSE_S)
