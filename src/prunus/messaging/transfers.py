"""How blobs get to the broker and back: the client's side.

Both ways in rounds of `WINDOW_CHUNKS` requests, so that not every piece waits for the answer to the one before. What is
read, compared with the digest and written is so in a worker thread. A connection that breaks, or a broker that starts
again, is nothing special: the client core says unanswered requests again, and the answers tell from where to go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import io
import os
import secrets
import stat
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import anyio.to_thread

from prunus.errors import BlobDamagedError, BusyError, MessageTooLargeError
from prunus.messaging.blobs import Digester
from prunus.messaging.communicator import MAX_BLOB_BYTES, BlobRef
from prunus.messaging.messages import CHUNK_BYTES, BlobPart

WINDOW_CHUNKS = 4
"""Pieces of one blob that are on their way at the same time."""
MAX_STALLS = 100
"""So often a round may bring nothing (the broker started again, or has too much to do) ..."""
STALL_S = 0.05
"""... and the pause after each of them."""

Put = Callable[[str, int, int, bytes], Awaitable[int]]
"""Sends (digest, offset, total, piece); how many bytes the broker has then."""
Get = Callable[[str, int], Awaitable[BlobPart]]
"""Asks for a piece at (digest, offset)."""
Read = Callable[[int, int], bytes]
"""Reads at an offset, up to a limit."""


async def upload(put: Put, data: bytes | Path) -> BlobRef:
    """Put a blob; see `Communicator.blob_put`."""
    with _opened(data) as (read, total):
        if total > MAX_BLOB_BYTES:
            raise MessageTooLargeError(total, MAX_BLOB_BYTES)
        digest = await anyio.to_thread.run_sync(_digest_of, read, total)
        stalls, size = 0, await put(digest, 0, total, b"")
        while size < total:
            pieces = await anyio.to_thread.run_sync(_pieces, read, size, total)
            last = (await asyncio.gather(*(put(digest, offset, total, piece) for offset, piece in pieces)))[-1]
            if last <= size:
                stalls = await _stalled(stalls, digest)
            size = last
    return BlobRef(digest, total)


async def download(get: Get, digest: str, write: Callable[[bytes], object]) -> None:
    """Hand all bytes of a blob to `write`, in order, in a worker thread.

    Raises `BlobNotFoundError`, `BlobDamagedError` (then what was written is worth nothing) and `BusyError`.
    """
    digester, offset, stalls = Digester(digest), 0, 0

    def take(parts: Sequence[BlobPart]) -> int:
        """Those that follow what is there already; where the next one begins."""
        at = offset
        for number, part in enumerate(parts):
            if at != offset + number * CHUNK_BYTES:
                break
            digester.add(part.chunk)
            write(part.chunk)
            at += len(part.chunk)
        return at

    total = CHUNK_BYTES
    while offset < total:
        end = min(total, offset + WINDOW_CHUNKS * CHUNK_BYTES)
        parts = await asyncio.gather(*(get(digest, start) for start in range(offset, end, CHUNK_BYTES)))
        total = parts[0].total
        if total > MAX_BLOB_BYTES:
            raise BlobDamagedError(digest)
        before, offset = offset, await anyio.to_thread.run_sync(take, parts)
        if offset == before and offset < total:
            stalls = await _stalled(stalls, digest)
    digester.finish()


async def download_bytes(get: Get, digest: str) -> bytes:
    """All of it in memory; raises as `download`."""
    sink = io.BytesIO()
    await download(get, digest, sink.write)
    return sink.getvalue()


async def download_file(get: Get, digest: str, path: Path) -> None:
    """Into a file, which appears when it is whole and on the disk; raises as `download`, and `OSError`."""
    if await anyio.to_thread.run_sync(path.is_dir):  # else that would be said when all of it is here
        raise IsADirectoryError(errno.EISDIR, "this is a folder; name a file in it", os.fspath(path))
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            await download(get, digest, file.write)
            file.flush()
            await anyio.to_thread.run_sync(os.fsync, file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


async def _stalled(stalls: int, digest: str) -> int:
    if stalls >= MAX_STALLS:
        raise BusyError(f"the blob {digest} does not get on: the broker has too much to do; try again later")
    await asyncio.sleep(STALL_S)
    return stalls + 1


@contextlib.contextmanager
def _opened(data: bytes | Path) -> Iterator[tuple[Read, int]]:
    """How to read it, and how many bytes it has."""
    if isinstance(data, os.PathLike):
        file = os.open(data, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{os.fspath(data)} is no file")
            yield (lambda offset, limit: os.pread(file, limit, offset)), status.st_size
        finally:
            os.close(file)
    elif isinstance(data, (bytes, bytearray, memoryview)):
        body = bytes(data)
        yield (lambda offset, limit: body[offset : offset + limit]), len(body)
    else:
        raise TypeError(f"a blob is made of bytes or of the file at a Path, not of {type(data).__name__}")


def _digest_of(read: Read, total: int) -> str:
    found = hashlib.sha256()
    for offset in range(0, total, CHUNK_BYTES):
        found.update(read(offset, min(CHUNK_BYTES, total - offset)))
    return found.hexdigest()


def _pieces(read: Read, start: int, total: int) -> list[tuple[int, bytes]]:
    end = min(total, start + WINDOW_CHUNKS * CHUNK_BYTES)
    return [(offset, read(offset, min(CHUNK_BYTES, total - offset))) for offset in range(start, end, CHUNK_BYTES)]
