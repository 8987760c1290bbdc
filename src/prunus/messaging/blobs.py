"""What is too large for a message, as files on the broker's disk that are named by the SHA-256 of their bytes.

::

    blobs/ab/cdef...        the blob abcdef...
    blobs/unfinished/7      one that is still being put; nobody's any more when a broker starts

Rules
- A blob is there as a whole or not at all: it is written to a file of its own, compared with its name, put on the
  disk, and only then gets that name. So it never changes, and putting it again is nothing.
- Putting is idempotent: pieces come in order, the answer to each says how far the blob is, and whoever puts goes on
  from there (after a restart of the broker, or when it was dropped, from the beginning).
- An upload that does not fit as a whole is refused before it takes space that others need. What came of one that is
  refused is dropped before its session hears of that; what came of one that does not go on, after `UPLOAD_IDLE_S`.
- Who reads a blob looks at the digest of what he got (`Digester`): damaged bytes are an error, and never handed out.
  `find_damaged` looks at all of them, and one that was `set_aside` can be put again.
- A blob is kept as long as somebody refers to it, which the store asks its caller, and for `GRACE_S` after it was last
  put (after a restart: after that). `sweep` removes the others, a few at a time.

One store at a time owns a folder. A store makes its folder when the first blob comes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import os
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from prunus.errors import (
    BlobDamagedError,
    BlobNotFoundError,
    BusyError,
    MessageTooLargeError,
    PersistenceError,
    ProtocolError,
    StoreFullError,
)
from prunus.messaging.communicator import MAX_BLOB_BYTES
from prunus.messaging.messages import CHUNK_BYTES

GRACE_S = 3600.0
"""A blob to which nobody refers is kept for so long after it was last put."""
MAX_BLOBS = 100_000
"""More are refused with `BusyError`."""
MAX_UPLOADS_PER_SESSION = 32
"""Blobs that one session puts at the same time; more are refused with `BusyError`."""
MAX_UPLOADS = 1_000
"""The same for all sessions together."""
MAX_UNFINISHED_BYTES = 16 * 1024 * 1024 * 1024
"""What has come of all of them; more is refused with `BusyError`."""
UPLOAD_IDLE_S = 120.0
"""An unfinished blob of which nothing more comes for so long is dropped."""
SYNC_BYTES = 64 * 1024 * 1024
"""After so much a file is put on the disk, so that the end of a large one takes no longer than this."""
SWEEP_STEPS = 200
"""Files and folders that one `sweep` looks at."""
SWEEP_PAUSE_S = 30.0
"""The pause between two rounds through all blobs."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PLACE, _NAME = re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{62}")
_UNFINISHED = "unfinished"
_FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)


class Digester:
    """Compares bytes, as they come, with the digest that they should have."""

    def __init__(self, digest: str) -> None:
        self._digest, self._hash = digest, hashlib.sha256()

    def add(self, chunk: bytes | memoryview) -> None:
        self._hash.update(chunk)

    @property
    def is_right(self) -> bool:
        return self._hash.hexdigest() == self._digest

    def finish(self) -> None:
        """Raises `BlobDamagedError` if they do not have it."""
        if not self.is_right:
            raise BlobDamagedError(self._digest)


@dataclass(slots=True)
class _Upload:
    """A blob that is being put."""

    path: Path
    total: int
    digester: Digester
    touched: float
    size: int = 0
    """Bytes that came."""
    synced: int = 0
    """Bytes that are certainly on the disk."""


class BlobStore:
    """See the module. One thread; `now` is monotonic and comes with every call that needs it."""

    def __init__(self, folder: Path, now: float, full_with: Callable[[int], str | None] = lambda size: None) -> None:
        """Use this folder, and forget what was unfinished in it. Raises `PersistenceError`.

        `full_with` gives the path of the disk if so many bytes more of a blob have no room on it.
        """
        self._folder, self._full_with = folder, full_with
        self._unfinished = folder / _UNFINISHED
        self._started = now
        self._uploads: dict[tuple[str, str], _Upload] = {}
        """By session and digest."""
        self._unfinished_bytes = 0
        self._put_at: OrderedDict[str, float] = OrderedDict()
        """When blobs were put, those of the last hour, the oldest first."""
        self._names = itertools.count()
        self._round: Iterator[str | None] = iter(())
        self._next_round = now
        with self._errors():
            with contextlib.suppress(FileNotFoundError):
                for left in os.listdir(self._unfinished):
                    os.unlink(self._unfinished / left)
            self._count = sum(digest is not None for digest in _walk(self._folder))

    # --- putting ---

    def put(self, now: float, session: str, digest: str, offset: int, total: int, chunk: bytes) -> int:
        """Take a piece of a blob of `total` bytes. How many are here, from the first one on; if it is all, they are
        durable. What does not continue that is ignored.

        Raises `MessageTooLargeError`, `BusyError`, `StoreFullError`, `ProtocolError` (these are not the bytes of that
        digest) and `PersistenceError`; what came of the blob is forgotten then.
        """
        if total > MAX_BLOB_BYTES:
            raise MessageTooLargeError(total, MAX_BLOB_BYTES)
        found = self.size(digest)
        if found == total:
            self.drop(session, digest)
            self._touch(now, digest)
            return total
        upload = self._uploads.get((session, digest))
        if upload is None or upload.total != total:
            if offset:
                return 0
            self.drop(session, digest)
            upload = self._begin(now, session, digest, total)
        upload.touched = now
        if offset > upload.size:
            return upload.size
        try:
            with self._errors():
                if (full := self._full_with(total - upload.size)) is not None:
                    raise StoreFullError(full)
                self._write(upload, memoryview(chunk)[upload.size - offset :], digest)
                if upload.size < total:
                    return upload.size
                self._finish(upload, digest)
        except BaseException:
            self.drop(session, digest)
            raise
        self._forget(session, digest)
        self._count += found is None
        self._touch(now, digest)
        return total

    def drop(self, session: str, digest: str) -> None:
        """What came from `session` of this blob is worth nothing more: its space is free at once, and whoever goes on
        begins anew. What other sessions put is not touched."""
        upload = self._forget(session, digest)
        if upload is not None:
            with contextlib.suppress(OSError):
                os.unlink(upload.path)

    def drop_idle(self, now: float) -> None:
        """Drop the uploads of which nothing came for `UPLOAD_IDLE_S`. This needs no space, and no look at the tasks."""
        for key, upload in list(self._uploads.items()):
            if now - upload.touched > UPLOAD_IDLE_S:
                self.drop(*key)

    def forget_session(self, session: str) -> None:
        """It is gone, and will not go on with what it began to put."""
        for key in [key for key in self._uploads if key[0] == session]:
            self.drop(*key)

    def _begin(self, now: float, session: str, digest: str, total: int) -> _Upload:
        own = sum(key[0] == session for key in self._uploads)
        if own >= MAX_UPLOADS_PER_SESSION:
            raise BusyError(f"this session puts {own} blobs already; wait until some are there")
        if len(self._uploads) >= MAX_UPLOADS:
            raise BusyError(f"{MAX_UPLOADS:,} blobs are being put already; try again later")
        if self._count >= MAX_BLOBS:
            raise BusyError(f"the broker has {MAX_BLOBS:,} blobs already; try again when some tasks are done")
        with self._errors():
            for folder in (self._folder, self._unfinished):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(mode=0o700, parents=True)
            path = self._unfinished / f"{next(self._names)}"
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        upload = self._uploads[session, digest] = _Upload(path, total, Digester(digest), now)
        return upload

    def _write(self, upload: _Upload, chunk: memoryview, digest: str) -> None:
        if upload.size + len(chunk) > upload.total:
            raise ProtocolError(f"the blob {digest} was said to have {upload.total:,} bytes, and more came")
        if self._unfinished_bytes + len(chunk) > MAX_UNFINISHED_BYTES:
            raise BusyError(f"{MAX_UNFINISHED_BYTES:,} bytes of unfinished blobs are here already; try again later")
        file = os.open(upload.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            written = 0
            while written < len(chunk):
                written += os.pwrite(file, chunk[written:], upload.size + written)
            upload.digester.add(chunk)
            upload.size += len(chunk)
            self._unfinished_bytes += len(chunk)
            if upload.size - upload.synced >= SYNC_BYTES or upload.size == upload.total:
                os.fsync(file)
                upload.synced = upload.size
        finally:
            os.close(file)

    def _finish(self, upload: _Upload, digest: str) -> None:
        """It is all here, and on the disk: give it its name."""
        if not upload.digester.is_right:
            raise ProtocolError(f"the bytes that came are not those of the blob {digest}; put it again, unchanged")
        path = self._path(digest)
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700)
            _sync_folder(self._folder)
        os.rename(upload.path, path)
        _sync_folder(path.parent)

    def _touch(self, now: float, digest: str) -> None:
        self._put_at[digest] = now
        self._put_at.move_to_end(digest)

    def _forget(self, session: str, digest: str) -> _Upload | None:
        upload = self._uploads.pop((session, digest), None)
        if upload is not None:
            self._unfinished_bytes -= upload.size
        return upload

    # --- reading ---

    def size(self, digest: str) -> int | None:
        """How many bytes it has; None: there is no such blob."""
        try:
            return os.stat(self._path(digest), follow_symlinks=False).st_size
        except (OSError, BlobNotFoundError):
            return None

    def read(self, digest: str, offset: int, limit: int) -> tuple[int, bytes]:
        """The size of a blob, and up to `limit` of its bytes. Raises `BlobNotFoundError` and `PersistenceError`."""
        with self._errors():
            try:
                file = os.open(self._path(digest), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                raise BlobNotFoundError(digest) from None
            try:
                total = os.fstat(file).st_size
                return total, os.pread(file, limit, offset) if offset < total else b""
            finally:
                os.close(file)

    def chunks(self, digest: str) -> Iterator[bytes]:
        """All of it, in pieces of `CHUNK_BYTES`. Raises as `read`, and at its end `BlobDamagedError`: what came before
        is worth nothing then."""
        digester, offset = Digester(digest), 0
        while True:
            total, chunk = self.read(digest, offset, CHUNK_BYTES)
            if not chunk:
                break
            digester.add(chunk)
            offset += len(chunk)
            yield chunk
            if offset >= total:
                break
        digester.finish()

    def copy_from(self, other: BlobStore, digest: str, each_chunk: Callable[[int], None] = lambda size: None) -> None:
        """Have a blob that another store has; raises as `chunks` and `put`. `each_chunk` is told how many bytes come
        next, and ends it by raising."""
        size = other.size(digest)
        if size is None:
            raise BlobNotFoundError(digest)
        if self.size(digest) == size:
            return
        session = secrets.token_hex(8)
        offset = self.put(0.0, session, digest, 0, size, b"")
        try:
            for chunk in other.chunks(digest):
                each_chunk(len(chunk))
                offset = self.put(0.0, session, digest, offset, size, chunk)
        except ProtocolError:
            raise BlobDamagedError(digest) from None
        finally:
            self.forget_session(session)

    # --- forgetting ---

    def sweep(self, now: float, is_needed: Callable[[str], bool]) -> int:
        """Remove some of the blobs that nobody needs; how many. `is_needed` says whether somebody refers to one, by
        what is on the disk: whatever goes here is gone."""
        while self._put_at and now - next(iter(self._put_at.values())) > GRACE_S:
            self._put_at.popitem(last=False)
        if now - self._started <= GRACE_S or now < self._next_round:
            return 0
        removed = 0
        try:
            for _ in range(SWEEP_STEPS):
                digest = next(self._round, "")
                if digest == "":
                    self._round, self._next_round = _walk(self._folder), now + SWEEP_PAUSE_S
                    break
                if digest is not None and digest not in self._put_at and not is_needed(digest):
                    os.unlink(self._path(digest))
                    self._count -= 1
                    removed += 1
        except OSError as error:
            logger.warning("blobs can't be removed, and are tried again: %s", error)
            self._round, self._next_round = _walk(self._folder), now + SWEEP_PAUSE_S
        if removed:
            logger.info("%d blobs that no task needs any more were removed", removed)
        return removed

    def keep_only(self, digests: Container[str]) -> None:
        """Remove all others. Raises `PersistenceError`."""
        with self._errors():
            for digest in _walk(self._folder):
                if digest is not None and digest not in digests:
                    os.unlink(self._path(digest))
                    self._count -= 1

    # --- inside ---

    def _path(self, digest: str) -> Path:
        if not is_digest(digest):
            raise BlobNotFoundError(digest)
        return _file(self._folder, digest)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise StoreFullError(str(self._folder)) from error
            raise PersistenceError(f"the blobs in {self._folder} can't be used: {error.strerror}") from error


def is_digest(text: object) -> bool:
    """Whether it can be the name of a blob."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def find_damaged(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[Path]:
    """The blobs in `folder` that are not what was put, by their files. Reads all of them, also beside a broker that
    goes on with them; `progress` is told how many bytes of how many are read. Raises `PersistenceError`."""
    sizes: dict[str, int] = {}
    for digest in _walk(folder):
        if digest is not None:
            with contextlib.suppress(FileNotFoundError):  # swept meanwhile
                sizes[digest] = os.stat(_file(folder, digest), follow_symlinks=False).st_size
    done, total = 0, sum(sizes.values())
    for digest, size in sizes.items():
        file, digester = _file(folder, digest), Digester(digest)
        try:
            with open(file, "rb", buffering=0, opener=_opener) as blob:
                while chunk := blob.read(CHUNK_BYTES):
                    digester.add(chunk)
                    progress(done := done + len(chunk), total)
        except FileNotFoundError:
            done += size
        except OSError as error:
            raise PersistenceError(f"the blob {file} can't be read: {error.strerror}") from error
        else:
            if not digester.is_right:
                yield file


def set_aside(file: Path) -> Path:
    """Take the name from a damaged blob, so that it can be put again; where its file is now. Raises
    `PersistenceError`."""
    aside = file.with_name(f"{file.name}.damaged")
    try:
        os.rename(file, aside)
        _sync_folder(file.parent)
    except OSError as error:
        raise PersistenceError(f"the blob {file} can't be set aside: {error.strerror}") from error
    return aside


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _walk(folder: Path) -> Iterator[str | None]:
    """All blobs; None for each folder of them, which is looked at as a whole."""
    for place in _listed(folder, _PLACE):
        yield None
        for name in _listed(folder / place, _NAME):
            yield place + name


def _file(folder: Path, digest: str) -> Path:
    return folder / digest[:2] / digest[2:]


def _listed(folder: Path, name: re.Pattern[str]) -> list[str]:
    try:
        return [entry for entry in os.listdir(folder) if name.fullmatch(entry)]
    except FileNotFoundError:
        return []


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
