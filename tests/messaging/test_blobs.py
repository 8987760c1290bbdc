"""What is too large for a message: the store alone, behind an exchange, and from peer to peer."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sqlite3
import stat
import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from prunus.errors import (
    BlobDamagedError,
    BlobNotFoundError,
    BusyError,
    MessageTooLargeError,
    NotDeliveredError,
    PersistenceError,
    ProtocolError,
    PrunusError,
    StoreFullError,
)
from prunus.messaging import BlockingCommunicator, blobs, exchange, peer, transfers
from prunus.messaging.blobs import GRACE_S, SWEEP_PAUSE_S, UPLOAD_IDLE_S, BlobStore, find_damaged, set_aside
from prunus.messaging.communicator import MAX_BLOB_BYTES, MAX_BODY_BYTES, BlobRef, Communicator
from prunus.messaging.connecting import connect_to
from prunus.messaging.exchange import MAX_PARTS_BYTES, Exchange
from prunus.messaging.local import LocalBroker
from prunus.messaging.messages import (
    CHUNK_BYTES,
    BlobGet,
    BlobHeld,
    BlobPart,
    BlobPut,
    BrokerMessage,
    ClientMessage,
    Goodbye,
    Hello,
    Peer,
    Refused,
    TaskAck,
    TaskDelivery,
    TaskList,
    TaskSend,
    TasksListed,
    TaskStored,
    TaskSubscribe,
    decode_from_broker,
    encode,
)
from prunus.testing.communicator_contract import Inbox
from tests.disks import small_file_system

BODY = os.urandom(3 * CHUNK_BYTES + 7)
DIGEST = hashlib.sha256(BODY).hexdigest()
HERE = Path(__file__).parent
LATER = GRACE_S + 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "blobs"


@pytest.fixture
def store(folder: Path) -> BlobStore:
    return BlobStore(folder, 0.0)


def put(store: BlobStore, body: bytes, session: str = "s", now: float = 0.0) -> str:
    """All of it, piece by piece; its digest."""
    digest = hashlib.sha256(body).hexdigest()
    size = store.put(now, session, digest, 0, len(body), b"")
    while size < len(body):
        size = store.put(now, session, digest, size, len(body), body[size : size + CHUNK_BYTES])
    return digest


def file_of(folder: Path, digest: str) -> Path:
    return folder / digest[:2] / digest[2:]


def unfinished(folder: Path) -> list[Path]:
    return list((folder / "unfinished").iterdir())


def sweep(store: BlobStore, now: float, *needed: str) -> int:
    """A whole round, also if the last one has just ended; how many were removed."""
    return sum(store.sweep(now + turn * SWEEP_PAUSE_S, needed.__contains__) for turn in range(2))


# --- the store alone --------------------------------------------------------------------------------


def test_what_was_put_can_be_read(store: BlobStore, folder: Path) -> None:
    """Under the name of its digest, for its owner alone, and nothing is left beside it; also after a restart."""
    assert store.size(DIGEST) is None
    assert put(store, BODY) == DIGEST
    file = file_of(folder, DIGEST)
    assert file.read_bytes() == BODY
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (folder, file.parent, file)]
    assert modes == [0o700, 0o700, 0o600]
    assert unfinished(folder) == []
    for reader in (store, BlobStore(folder, 0.0)):
        assert reader.size(DIGEST) == len(BODY)
        assert b"".join(reader.chunks(DIGEST)) == BODY
        assert reader.read(DIGEST, 5, 10) == (len(BODY), BODY[5:15])
        assert reader.read(DIGEST, len(BODY), 10) == (len(BODY), b"")
    empty = put(store, b"")
    assert list(store.chunks(empty)) == []


def test_a_blob_is_on_the_disk_before_it_has_its_name(
    store: BlobStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file first, then its name, then the folder with that name: a power cut leaves all of it or nothing."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(file: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        fsync(file)

    def note_rename(before: Path, after: Path) -> None:
        done.append("rename")
        rename(before, after)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    put(store, BODY)
    assert done == ["file", "folder", "rename", "folder"]
    done.clear()
    monkeypatch.setattr(blobs, "SYNC_BYTES", CHUNK_BYTES)
    put(store, BODY[1:])
    assert done[:4] == ["file"] * 4, "the end of a large one has little left to write"


def test_pieces_that_come_twice_or_too_early(store: BlobStore) -> None:
    """The answer is always how far it is; only what continues that is taken."""

    def say(offset: int, end: int) -> int:
        return store.put(0.0, "s", DIGEST, offset, len(BODY), BODY[offset:end])

    assert say(100, 200) == 0, "nobody began it"
    assert say(0, 100) == 100
    assert say(0, 100) == 100
    assert say(200, 300) == 100
    assert say(50, 150) == 150
    assert say(0, 0) == 150
    assert say(150, len(BODY)) == len(BODY)
    assert say(0, 100) == len(BODY), "it is there"
    assert b"".join(store.chunks(DIGEST)) == BODY


def test_two_who_put_the_same(store: BlobStore, folder: Path) -> None:
    """Each has an upload of its own; whoever is second finds it there, and nothing is left of his."""
    half = len(BODY) // 2
    for session in ("a", "b"):
        assert store.put(0.0, session, DIGEST, 0, len(BODY), BODY[:half]) == half
    assert len(unfinished(folder)) == 2
    assert store.put(0.0, "b", DIGEST, half, len(BODY), BODY[half:]) == len(BODY)
    assert store.put(0.0, "a", DIGEST, half, len(BODY), BODY[half:]) == len(BODY)
    assert unfinished(folder) == []
    assert b"".join(store.chunks(DIGEST)) == BODY


def test_a_torn_upload_is_nothing(store: BlobStore, folder: Path) -> None:
    """What was not finished when the broker ended is no blob; it is removed, and to be put from the beginning."""
    store.put(0.0, "s", DIGEST, 0, len(BODY), BODY[:CHUNK_BYTES])
    again = BlobStore(folder, 0.0)
    assert unfinished(folder) == []
    assert again.size(DIGEST) is None
    assert again.put(0.0, "s", DIGEST, CHUNK_BYTES, len(BODY), BODY[CHUNK_BYTES:]) == 0
    assert again.size(DIGEST) is None
    assert put(again, BODY) == DIGEST


@pytest.mark.parametrize(
    ("total", "sent", "says"),
    [
        (len(BODY), BODY[:-1] + b"x", "not those of the blob"),
        (len(BODY) - 1, BODY[:-1], "not those of the blob"),
        (10, BODY, "more came"),
    ],
)
def test_other_bytes_never_get_the_name(store: BlobStore, folder: Path, total: int, sent: bytes, says: str) -> None:
    """Bytes without this digest are refused, and forgotten."""
    with pytest.raises(ProtocolError, match=says):
        store.put(0.0, "s", DIGEST, 0, total, sent)
    assert store.size(DIGEST) is None
    assert unfinished(folder) == []
    assert put(store, BODY) == DIGEST


def test_a_damaged_blob_is_not_handed_out(store: BlobStore, folder: Path) -> None:
    """One bit is enough. One that is cut short can be put again."""
    file = file_of(folder, put(store, BODY))
    damaged = bytearray(BODY)
    damaged[CHUNK_BYTES + 5] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(BlobDamagedError, match=DIGEST):
        list(store.chunks(DIGEST))
    other = BlobStore(folder.with_name("other"), 0.0)
    with pytest.raises(BlobDamagedError, match=DIGEST):
        other.copy_from(store, DIGEST)
    file.write_bytes(BODY[:-1])
    with pytest.raises(BlobDamagedError, match=DIGEST):
        list(store.chunks(DIGEST))
    put(store, BODY)
    other.copy_from(store, DIGEST)
    assert b"".join(other.chunks(DIGEST)) == BODY
    file.unlink()
    for act in (lambda: list(store.chunks(DIGEST)), lambda: store.read(DIGEST, 0, 1)):
        with pytest.raises(BlobNotFoundError, match=DIGEST):
            act()


def test_damaged_blobs_are_found_and_set_aside(store: BlobStore, folder: Path) -> None:
    """Whatever is wrong with them, and only those; unfinished ones and those that go meanwhile are none. One that was
    set aside can be put again, also while the store goes on."""
    assert list(find_damaged(folder)) == []
    good, short, changed = put(store, BODY), put(store, b"short"), put(store, b"changed")
    gone = put(store, b"gone")
    store.put(0.0, "s", hashlib.sha256(b"unfinished").hexdigest(), 0, 100, b"unf")
    file_of(folder, short).write_bytes(b"shor")
    file_of(folder, changed).write_bytes(b"Changed")
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        file_of(folder, gone).unlink(missing_ok=True)

    assert set(find_damaged(folder, progress)) <= {file_of(folder, one) for one in (short, changed)}
    damaged = set(find_damaged(folder))
    assert damaged == {file_of(folder, short), file_of(folder, changed)}
    assert seen == sorted(seen)
    assert seen[-1][0] <= seen[-1][1] == len(BODY + b"shor" + b"changed" + b"gone")
    for file in damaged:
        assert set_aside(file).read_bytes() in (b"shor", b"Changed")
    assert list(find_damaged(folder)) == []
    assert store.size(changed) is None
    put(store, b"changed")
    assert b"".join(store.chunks(changed)) == b"changed"
    assert b"".join(store.chunks(good)) == BODY
    with pytest.raises(PersistenceError, match="can't be set aside: No such file"):
        set_aside(file_of(folder, short))


def test_a_name_is_no_path(store: BlobStore, tmp_path: Path) -> None:
    """Only digests name blobs: nobody reads another file."""
    (tmp_path / "secret").write_text("x")
    for name in ("../secret", "..", "", "A" * 64, "a" * 64 + "\n"):
        assert store.size(name) is None
        with pytest.raises(BlobNotFoundError):
            store.read(name, 0, 10)


def test_uploads_have_bounds(store: BlobStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a session, of all together, in bytes, in number and in size: each is an error to the one who reached it."""
    monkeypatch.setattr(blobs, "MAX_UPLOADS_PER_SESSION", 2)
    monkeypatch.setattr(blobs, "MAX_UPLOADS", 3)
    monkeypatch.setattr(blobs, "MAX_UNFINISHED_BYTES", 100)
    names = [f"{number:064x}" for number in range(9)]

    def begin(session: str, name: str, body: bytes = b"") -> int:
        return store.put(0.0, session, name, 0, 1000, body)

    begin("a", names[0])
    begin("a", names[1], bytes(60))
    with pytest.raises(BusyError, match="this session puts 2 blobs"):
        begin("a", names[2])
    begin("b", names[2])
    with pytest.raises(BusyError, match="3 blobs are being put"):
        begin("c", names[3])
    with pytest.raises(BusyError, match="100 bytes of unfinished"):
        begin("b", names[2], bytes(41))
    store.forget_session("a")
    assert unfinished(folder) == []
    assert begin("b", names[2], bytes(100)) == 100, "what was given up does not count"
    store.forget_session("b")
    with pytest.raises(MessageTooLargeError) as caught:
        store.put(0.0, "a", names[0], 0, MAX_BLOB_BYTES + 1, b"")
    assert (caught.value.size, caught.value.limit) == (MAX_BLOB_BYTES + 1, MAX_BLOB_BYTES)
    monkeypatch.setattr(blobs, "MAX_BLOBS", 1)
    put(store, b"1")
    for full in (store, BlobStore(folder, 0.0)):
        with pytest.raises(BusyError, match="has 1 blobs already"):
            put(full, b"2")
        assert put(full, b"1")
    file_of(folder, hashlib.sha256(b"1").hexdigest()).write_bytes(b"")
    monkeypatch.setattr(blobs, "MAX_BLOBS", 2)
    assert put(store, b"1"), "in the place of the damaged one"
    assert put(store, b"2")
    sweep(store, LATER)
    assert put(store, b"3", now=LATER)


def test_an_upload_that_does_not_go_on_is_dropped(store: BlobStore, folder: Path) -> None:
    """Its bytes are given back, and who goes on after all begins again."""
    store.put(0.0, "s", DIGEST, 0, len(BODY), BODY[:10])
    store.drop_idle(UPLOAD_IDLE_S)
    assert len(unfinished(folder)) == 1
    store.drop_idle(UPLOAD_IDLE_S + 1)
    assert unfinished(folder) == []
    assert store.put(200.0, "s", DIGEST, 10, len(BODY), BODY[10:20]) == 0


def test_what_nobody_needs_is_forgotten(store: BlobStore, folder: Path) -> None:
    """An hour after it was put last; not while somebody needs it; and not in the first hour after a start."""
    old, put_again, needed = put(store, b"old"), put(store, b"again"), put(store, b"needed")
    put(store, b"again", now=GRACE_S)
    assert sweep(store, GRACE_S - SWEEP_PAUSE_S) == 0
    assert sweep(store, LATER, needed) == 1
    assert [store.size(digest) for digest in (old, put_again, needed)] == [None, 5, 6]
    assert sweep(store, GRACE_S + LATER, needed) == 1
    assert [store.size(digest) for digest in (put_again, needed)] == [None, 6]
    again = BlobStore(folder, 10_000.0)
    assert sweep(again, 10_000.0 + GRACE_S - SWEEP_PAUSE_S) == 0
    assert sweep(again, 10_000.0 + LATER) == 1
    assert again.size(needed) is None


def test_a_round_goes_on_in_portions(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker stands still for none of them."""
    monkeypatch.setattr(blobs, "SWEEP_STEPS", 5)
    for number in range(20):
        put(store, b"%d" % number)
    store.sweep(LATER, lambda digest: False)
    removed = [store.sweep(LATER + SWEEP_PAUSE_S, lambda digest: False) for _ in range(12)]
    assert max(removed) <= 5
    assert sum(removed) == 20


@pytest.fixture
def small_disk(short_folder: Path) -> Iterator[Path]:
    """A file system with room for a part of a blob."""
    with small_file_system(short_folder / "small", 2 * 1024 * 1024) as folder:
        yield folder


def test_a_full_disk(small_disk: Path) -> None:
    """It is an error to the one who puts, nothing is left of it, and what fits goes on."""
    store = BlobStore(small_disk / "blobs", 0.0)
    with pytest.raises(StoreFullError):
        put(store, BODY)
    assert unfinished(small_disk / "blobs") == []
    assert b"".join(store.chunks(put(store, BODY[:CHUNK_BYTES]))) == BODY[:CHUNK_BYTES]


def test_an_upload_that_does_not_fit(folder: Path) -> None:
    """It is refused before it begins, or when the rest of it does not fit any more; and dropped then, unlike what
    another session has of the same blob. Whoever goes on hears that nothing is there, and can begin anew."""
    space = len(BODY) - 1
    store = BlobStore(folder, 0.0, lambda size: "the disk" if size > space else None)
    half = len(BODY) // 2

    def say(session: str, begin: int, end: int) -> int:
        return store.put(0.0, session, DIGEST, begin, len(BODY), BODY[begin:end])

    with pytest.raises(StoreFullError, match="the disk"):
        say("a", 0, 0)
    assert unfinished(folder) == []
    space = len(BODY)
    assert say("a", 0, half) == half
    assert say("b", 0, half + 1) == half + 1
    space = len(BODY) - half - 1
    with pytest.raises(StoreFullError, match="the disk"):
        say("a", half, len(BODY))
    assert [file.stat().st_size for file in unfinished(folder)] == [half + 1]
    assert say("a", half, len(BODY)) == 0
    assert say("b", half + 1, len(BODY)) == len(BODY)
    assert say("a", 0, 0) == len(BODY), "it is there, and needs no space"
    assert unfinished(folder) == []


# --- behind an exchange -----------------------------------------------------------------------------


class Desk:
    """An exchange over a database file and a folder with blobs, and routes that say things to it."""

    def __init__(self, folder: Path, *, keeps_blobs: bool = True, failpoint: str = "") -> None:
        self.folder = folder / "blobs"
        self.connection = sqlite3.connect(folder / "broker.db", isolation_level=None)
        self.now = 0.0

        def fail(name: str) -> None:
            if name == failpoint:
                raise InterruptedError(name)

        self.exchange: Exchange[str] = Exchange(
            self.connection, blobs=BlobStore(self.folder, 0.0) if keeps_blobs else None, failpoint=fail
        )

    def say(self, route: str, *messages: ClientMessage) -> list[BrokerMessage]:
        """What it answers to them, which come together."""
        sends = self.exchange.process(self.now, [(route, encode(message)) for message in messages])
        return [decode_from_broker(frame) for to, frame in sends if to == route]

    def hello(self, *routes: str) -> None:
        for route in routes:
            self.say(route, Hello(session=route, peer=Peer()))

    def put(self, body: bytes = BODY) -> list[BrokerMessage]:
        digest, total = hashlib.sha256(body).hexdigest(), len(body)
        offsets = range(0, total, CHUNK_BYTES)
        return self.say(
            "a",
            *(
                BlobPut(id=100 + at, digest=digest, offset=at, total=total, chunk=body[at : at + CHUNK_BYTES])
                for at in offsets
            ),
        )

    def sweep(self) -> None:
        self.now += LATER
        for turn in range(2):
            self.exchange.sweep_blobs(self.now + turn * SWEEP_PAUSE_S)

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    desk.hello("a", "b")
    yield desk
    desk.close()


def error_of(answer: BrokerMessage) -> PrunusError:
    assert isinstance(answer, Refused)
    return answer.failure.to_exception()


SEND = TaskSend(id=9_000_000, task="t", body=b"", blob=DIGEST)


def test_a_task_refers_to_a_blob_that_is_there(desk: Desk) -> None:
    """Else it is refused. Its size is that of the blob; and whoever gets the task gets the digest."""
    assert isinstance(error_of(desk.say("a", SEND)[0]), BlobNotFoundError)
    assert desk.put()[-1] == BlobHeld(id=100 + 3 * CHUNK_BYTES, size=len(BODY))
    [stored] = desk.say("a", TaskSend(id=9_000_001, task="t", body=b"", blob=DIGEST))
    assert isinstance(stored, TaskStored)
    [listed] = desk.say("a", TaskList(id=9_000_002, bodies=True))
    assert isinstance(listed, TasksListed)
    assert [(one.size, one.blob, one.body) for one in listed.tasks] == [(len(BODY), DIGEST, None)]
    delivery = desk.say("b", TaskSubscribe(id=1, queue="default", credit=1))[-1]
    assert isinstance(delivery, TaskDelivery)
    assert (delivery.blob, delivery.body) == (DIGEST, b"")


def test_a_blob_lives_as_long_as_its_task(desk: Desk, tmp_path: Path) -> None:
    """Pending, held, after a restart: it is there. When the task is done with, it is removed, also while somebody has
    still to fetch the result."""
    desk.put()
    desk.say("a", TaskSend(id=9_000_000, task="t", body=b"", blob=DIGEST, want_result=True))
    file = file_of(desk.folder, DIGEST)
    desk.sweep()
    assert file.exists()
    desk.close()
    desk = Desk(tmp_path)
    desk.say("a", Hello(session="a", peer=Peer(), awaited=("t",)))
    desk.hello("b")
    delivery = desk.say("b", TaskSubscribe(id=1, queue="default", credit=1))[-1]
    assert isinstance(delivery, TaskDelivery)
    assert delivery.blob == DIGEST
    desk.sweep()
    assert file.exists()
    desk.say("b", TaskAck(id=2, task="t", epoch=delivery.epoch, outcome=b"r"))
    rows = desk.connection.execute("SELECT outcome IS NULL, blob FROM broker_task").fetchall()
    assert rows == [(0, None)], "there is a result to fetch"
    desk.sweep()
    assert not file.exists()
    desk.close()


def test_a_crash_leaves_garbage_at_most(tmp_path: Path) -> None:
    """Killed after the blob was put and before its task was committed: the blob is swept some day. Killed after the
    task was deleted: the same."""
    desk = Desk(tmp_path)
    desk.hello("a")
    desk.put()
    desk.exchange.failpoint = _stop
    with pytest.raises(InterruptedError):
        desk.say("a", SEND)
    desk.close()
    desk = Desk(tmp_path)
    assert file_of(desk.folder, DIGEST).exists()
    desk.sweep()
    assert not file_of(desk.folder, DIGEST).exists()
    desk.close()


def _stop(name: str) -> None:
    if name == "before_commit":
        raise InterruptedError(name)


def test_a_task_whose_blob_is_gone_is_a_dead_letter(desk: Desk) -> None:
    """With a reason that names it; and the next task is delivered."""
    desk.put()
    desk.say("a", SEND, TaskSend(id=9_000_001, task="u", body=b"next"))
    file_of(desk.folder, DIGEST).write_bytes(BODY[:-1])
    deliveries = desk.say("b", TaskSubscribe(id=1, queue="default", credit=1))
    assert [one.task for one in deliveries if isinstance(one, TaskDelivery)] == ["u"]
    [listed] = desk.say("a", TaskList(id=9_000_002, place="dead"))
    assert isinstance(listed, TasksListed)
    [dead] = listed.tasks
    assert dead.id == "t"
    assert DIGEST in (dead.reason or "")


def test_nobody_gets_too_much_at_once(desk: Desk) -> None:
    """One session gets so many bytes in one batch, then nothing, and asks again; another one is not touched by that."""
    desk.put()
    get = BlobGet(id=1, digest=DIGEST, offset=0, limit=CHUNK_BYTES)
    frames = [("a", encode(get))] * 20 + [("b", encode(get))]
    answers = [(to, decode_from_broker(frame)) for to, frame in desk.exchange.process(0.0, frames)]
    assert all(isinstance(part, BlobPart) and part.total == len(BODY) for _, part in answers)
    got = {to: sum(len(part.chunk) for name, part in answers if name == to) for to in ("a", "b")}  # type: ignore[union-attr]
    assert got == {"a": MAX_PARTS_BYTES, "b": CHUNK_BYTES}
    [again] = desk.say("a", get)
    assert again == BlobPart(id=1, total=len(BODY), chunk=BODY[:CHUNK_BYTES])
    desk.exchange.is_stuck = lambda route: route == "a"
    assert desk.say("a", get) == [BlobPart(id=1, total=len(BODY), chunk=b"")], "who does not read gets nothing"


def test_a_full_disk_refuses_pieces(desk: Desk) -> None:
    """As it refuses new tasks; what is there can be read."""
    desk.put()
    for name in ("refuse_new", "refuse_changes"):
        setattr(desk.exchange, name, "/the/disk")
        piece = BlobPut(id=1, digest="0" * 64, offset=0, total=5, chunk=b"12345")
        assert isinstance(error_of(desk.say("b", piece)[0]), StoreFullError)
        [part] = desk.say("b", BlobGet(id=2, digest=DIGEST, offset=0, limit=5))
        assert part == BlobPart(id=2, total=len(BODY), chunk=BODY[:5])
        setattr(desk.exchange, name, None)
    assert unfinished(desk.folder) == []


@pytest.mark.parametrize("name", ["refuse_new", "refuse_changes"])
def test_what_came_is_dropped_when_the_disk_is_full(desk: Desk, name: str) -> None:
    """Of the one who is refused, before he hears of it. The pieces that he has sent already take no space either, and
    when there is some again he begins anew; meanwhile somebody else can go on with the same blob."""
    total = 3 * CHUNK_BYTES
    body = BODY[:total]
    digest = hashlib.sha256(body).hexdigest()
    pieces = [
        BlobPut(id=number, digest=digest, offset=at, total=total, chunk=body[at : at + CHUNK_BYTES])
        for number, at in enumerate(range(0, total, CHUNK_BYTES), 1)
    ]
    for route in ("a", "b"):
        assert desk.say(route, pieces[0]) == [BlobHeld(id=1, size=CHUNK_BYTES)]
    setattr(desk.exchange, name, "/the/disk")
    assert isinstance(error_of(desk.say("a", pieces[1])[0]), StoreFullError)
    assert len(unfinished(desk.folder)) == 1, "that of the other one"
    setattr(desk.exchange, name, None)
    assert desk.say("a", pieces[2]) == [BlobHeld(id=3, size=0)]
    assert desk.say("b", *pieces[1:])[-1] == BlobHeld(id=3, size=total)
    assert desk.say("a", pieces[0]) == [BlobHeld(id=1, size=total)]
    assert unfinished(desk.folder) == []


@pytest.mark.parametrize(("full", "keep"), [("/the/disk", False), (None, True)])
def test_idle_uploads_go_while_finished_ones_are_kept(desk: Desk, full: str | None, keep: bool) -> None:
    """Because the disk is full, or for a backup. What was put as a whole stays, needed or not, until that is over."""
    desk.put()
    desk.say("a", BlobPut(id=1, digest="0" * 64, offset=0, total=5, chunk=b"1"))
    desk.exchange.refuse_changes = full
    desk.exchange.sweep_blobs(UPLOAD_IDLE_S, keep_finished=keep)
    assert len(unfinished(desk.folder)) == 1
    desk.exchange.sweep_blobs(UPLOAD_IDLE_S + 1, keep_finished=keep)
    assert unfinished(desk.folder) == []
    for turn in range(2):
        desk.exchange.sweep_blobs(LATER + turn * SWEEP_PAUSE_S, keep_finished=keep)
    assert file_of(desk.folder, DIGEST).exists()
    desk.exchange.refuse_changes = None
    desk.sweep()
    assert not file_of(desk.folder, DIGEST).exists()


def test_who_leaves_takes_his_uploads_along(desk: Desk) -> None:
    desk.say("b", BlobPut(id=1, digest="0" * 64, offset=0, total=5, chunk=b"1"))
    assert len(unfinished(desk.folder)) == 1
    desk.say("b", Goodbye(id=2))
    assert unfinished(desk.folder) == []


def test_a_broker_without_a_store(tmp_path: Path) -> None:
    """It says so: to who puts, to who gets, and to a task that refers to one."""
    with closing(Desk(tmp_path, keeps_blobs=False)) as desk:
        desk.hello("a")
        answers = desk.say(
            "a",
            BlobPut(id=1, digest=DIGEST, offset=0, total=5, chunk=b""),
            BlobGet(id=2, digest=DIGEST, offset=0, limit=5),
            SEND,
        )
        errors = [error_of(answer) for answer in answers]
        assert [type(error) for error in errors] == [NotDeliveredError, NotDeliveredError, BlobNotFoundError]
        assert "this broker has none" in str(errors[0])
        desk.exchange.sweep_blobs(0.0)


# --- from peer to peer ------------------------------------------------------------------------------


@pytest.fixture
async def broker(folder: Path) -> AsyncIterator[LocalBroker]:
    broker = LocalBroker(blobs=folder)
    yield broker
    broker.close()


@pytest.fixture
async def connected(broker: LocalBroker) -> AsyncIterator[Communicator]:
    async with await broker.connect() as communicator:
        yield communicator


LARGE = os.urandom(MAX_BODY_BYTES + 5)
LARGE_DIGEST = hashlib.sha256(LARGE).hexdigest()


async def frames(communicator: Communicator) -> int:
    return (await communicator.statistics()).frames


async def test_what_is_there_is_not_sent_again(connected: Communicator) -> None:
    """One question instead of all the pieces."""
    before = await frames(connected)
    first = await connected.blob_put(LARGE)
    between = await frames(connected)
    assert await connected.blob_put(LARGE) == first
    after = await frames(connected)
    assert between - before > len(LARGE) // CHUNK_BYTES
    assert after - between == 2, "the piece that asks, and the question for these numbers"


async def test_files(connected: Communicator, tmp_path: Path) -> None:
    """A file becomes a blob and a blob a file, which takes the place of another one only when it is whole."""
    (tmp_path / "from").write_bytes(BODY)
    ref = await connected.blob_put(tmp_path / "from")
    assert ref == BlobRef(DIGEST, len(BODY))
    await connected.blob_save(ref, tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == BODY
    with pytest.raises(BlobNotFoundError):
        await connected.blob_save(BlobRef("0" * 64, 1), tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == BODY
    assert sorted(os.listdir(tmp_path)) == ["blobs", "from", "to"]


async def test_what_is_no_blob(connected: Communicator, tmp_path: Path) -> None:
    """It is said before anything is sent."""
    before = await frames(connected)
    with pytest.raises(TypeError, match="not of str"):
        await connected.blob_put("text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no file"):
        await connected.blob_put(tmp_path)
    with pytest.raises(FileNotFoundError):
        await connected.blob_put(tmp_path / "nothing")
    for ref in ("a" * 64, BlobRef("../x", 1)):
        with pytest.raises(ValueError, match="no reference to a blob"):
            await connected.blob_get(ref)  # type: ignore[arg-type]
    assert await frames(connected) == before + 1


async def test_more_than_a_blob_can_have(connected: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size and the limit are named; nothing is sent."""
    monkeypatch.setattr(transfers, "MAX_BLOB_BYTES", len(LARGE) - 1)
    before = await frames(connected)
    for send in (connected.task_send(LARGE), connected.blob_put(LARGE)):
        with pytest.raises(MessageTooLargeError) as caught:
            await send
        assert (caught.value.size, caught.value.limit) == (len(LARGE), len(LARGE) - 1)
    assert await frames(connected) == before + 1


async def test_a_damaged_body_reaches_no_handler(connected: Communicator, folder: Path) -> None:
    """The task goes back with a reason that names the blob; when that is whole again, the task comes."""
    await connected.task_send(LARGE)
    file = file_of(folder, LARGE_DIGEST)
    file.write_bytes(LARGE[:-1] + bytes([LARGE[-1] ^ 1]))
    with pytest.raises(BlobDamagedError, match=LARGE_DIGEST):
        await connected.blob_get(BlobRef(LARGE_DIGEST, len(LARGE)))
    with pytest.raises(BlobDamagedError, match=LARGE_DIGEST):
        await connected.next_task()
    [back] = await connected.tasks()
    assert (back.place, back.attempt) == ("delayed", 1)
    assert LARGE_DIGEST in (back.reason or "")
    inbox = Inbox()
    await connected.add_task_subscriber(inbox)
    while (await connected.tasks())[0].attempt < 3:
        await asyncio.sleep(0.01)
    file.write_bytes(LARGE)
    task = await inbox.next()
    assert task.body == LARGE
    assert task.attempt >= 3


async def test_a_blob_that_was_forgotten_meanwhile_is_put_again(connected: Communicator, folder: Path) -> None:
    """Between the last piece and the task that refers to it."""
    putting = peer.PeerCommunicator.blob_put
    calls: list[BlobRef] = []

    class Forgetful(type(connected)):  # type: ignore[misc]
        async def blob_put(self, data: bytes | Path) -> BlobRef:
            calls.append(ref := await putting(self, data))
            if len(calls) == 1:
                file_of(folder, ref.digest).unlink()
            return ref

    connected.__class__ = Forgetful
    await connected.task_send(LARGE)
    assert len(calls) == 2
    assert (await connected.next_task()).body == LARGE


@pytest.mark.parametrize("after_sends", [2, 4])
async def test_a_restart_amid_an_upload_and_a_download(folder: Path, after_sends: int) -> None:
    """The broker forgets what was not finished; the client notices, and goes on by itself."""
    sends = 0

    def count(name: str) -> None:
        nonlocal sends
        if name == "after_send":
            sends += 1
            if sends == restart_at:
                asyncio.get_running_loop().call_soon(broker.restart)

    restart_at = 0
    with closing(LocalBroker(blobs=folder, failpoint=count)) as broker:
        async with await broker.connect() as communicator:
            restart_at = sends + after_sends
            await communicator.task_send(LARGE)
            assert broker.exchange.broker_epoch == 2
            restart_at = sends + after_sends
            task = await communicator.next_task()
            assert broker.exchange.broker_epoch == 3
            assert task.body == LARGE
            await task.acknowledge()
        assert unfinished(folder) == []


@pytest.mark.parametrize("after_sends", [1, 3])
async def test_a_disk_that_fills_amid_an_upload(folder: Path, after_sends: int) -> None:
    """Whoever puts is told, nothing is left of it, and the same can be put anew; two puts of one body do not disturb
    each other."""
    sends, full_at = 0, 0

    def count(name: str) -> None:
        nonlocal sends
        if name == "after_send":
            sends += 1
            if sends == full_at:
                broker.exchange.refuse_new = "/the/disk"

    with closing(LocalBroker(blobs=folder, failpoint=count)) as broker:
        async with await broker.connect() as communicator:
            full_at = sends + after_sends
            came = await asyncio.gather(
                communicator.blob_put(LARGE), communicator.blob_put(LARGE), return_exceptions=True
            )
            assert [type(error) for error in came] == [StoreFullError, StoreFullError]
            assert unfinished(folder) == []
            broker.exchange.refuse_new = None
            ref = await communicator.blob_put(LARGE)
            assert await communicator.blob_get(ref) == LARGE
        assert unfinished(folder) == []


async def test_a_broker_that_hands_out_nothing(broker: LocalBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for so long, and then given up."""
    monkeypatch.setattr(transfers, "STALL_S", 0.0)
    async with await broker.connect() as communicator:
        ref = await communicator.blob_put(BODY)
        broker.exchange.is_stuck = lambda route: True
        with pytest.raises(BusyError, match=DIGEST):
            await communicator.blob_get(ref)
        broker.exchange.is_stuck = lambda route: False
        assert await communicator.blob_get(ref) == BODY


async def test_pieces_may_be_short(connected: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker with much to do gives less than was asked for, in the middle of a blob too: it is asked for the rest."""
    monkeypatch.setattr(exchange, "MAX_PARTS_BYTES", CHUNK_BYTES + 7)
    assert await connected.blob_get(await connected.blob_put(BODY)) == BODY

    async def sometimes_short(digest: str, offset: int) -> BlobPart:
        limit = 100 if offset == CHUNK_BYTES else CHUNK_BYTES
        return BlobPart(id=1, total=len(BODY), chunk=BODY[offset : offset + limit])

    assert await transfers.download_bytes(sometimes_short, DIGEST) == BODY, "what comes after a short one waits"


async def test_a_temporary_broker_leaves_no_file() -> None:
    """Without a folder of the user's there is one of its own, as long as it is open."""
    with closing(LocalBroker()) as broker:
        assert not broker._blobs.exists(), "not before it is needed"
        async with await broker.connect() as communicator:
            await communicator.blob_put(b"x")
        assert broker._blobs.exists()
    assert not broker._blobs.exists()


def test_the_blocking_face(folder: Path, tmp_path: Path) -> None:
    """The same methods."""

    async def connect() -> peer.PeerCommunicator:
        return await LocalBroker(blobs=folder).connect()

    with BlockingCommunicator(connect) as communicator:
        ref = communicator.blob_put(BODY)
        assert communicator.blob_get(ref) == BODY
        communicator.blob_save(ref, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == BODY
        communicator.task_send(LARGE)
        with communicator.next_task() as task:
            assert task.body == LARGE


# --- with a broker process --------------------------------------------------------------------------


@asynccontextmanager
async def serving(folder: Path, method: str = "put", number: int = 0) -> AsyncIterator[Process]:
    """A broker that kills itself in that call of its store."""
    process = await create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.messaging.blob_broker_program",
        str(folder / "broker.db"),
        f"ipc://{folder}/run/s",
        method,
        str(number),
        stdout=PIPE,
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parents[1]), *sys.path]))},
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_forty_mebibytes_and_two_kills(short_folder: Path) -> None:
    """SIGKILL of the broker in the middle of the upload, and in the middle of the download: the body arrives, once, and
    nothing unfinished is left."""
    body = os.urandom(40 * 1024 * 1024)
    endpoint = f"ipc://{short_folder}/run/s"
    async with serving(short_folder, "put", 20) as broker:
        sender, worker = await connect_to(endpoint), await connect_to(endpoint)
        sending = asyncio.create_task(sender.task_send(body, want_result=True))
        assert await broker.wait() == -signal.SIGKILL
        assert len(unfinished(short_folder / "blobs")) == 1
    async with sender, worker:
        inbox = Inbox()
        async with serving(short_folder, "read", 20) as broker:
            receipt = await sending
            await worker.add_task_subscriber(inbox)
            assert await broker.wait() == -signal.SIGKILL
        async with serving(short_folder):
            task = await inbox.next()
            assert task.body == body
            inbox.ack(task, b"done")
            assert await receipt.result() == b"done"
            assert inbox.came.empty()
            assert unfinished(short_folder / "blobs") == []
            assert await sender.tasks() == []
