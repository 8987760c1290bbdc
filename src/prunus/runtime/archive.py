"""Processes in a file: what ``prunus export`` writes and ``prunus import`` reads.

An archive is a zip with

* ``manifest.json``: the `FORMAT`, from where and when it is, and for each process its parts with size and SHA-256;
* ``NNNNNN-NNNNNN.msgpack``: the parts, each a `Portion` of a process as its store gave it: row, checkpoint, result,
  letters, mail, answers, past checkpoints, history, log.

Rules
- A file appears whole or not at all, and nobody else may read it.
- Writing changes nothing and stops nothing: each process is as it was at one moment, a parent at an earlier one than
  its children. So a copy is consistent by itself; that of a process that goes on is soon out of date.
- A file is not trusted. It is read within bounds, nothing of it becomes a path, no class is loaded and no code runs.
  All of it is checked before anything is sent; then all of its processes are there in one commit, or none.
- What had ended is as it was. What had not is paused, unless it is to play: then two may do the same work.
- What a process waits for comes with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import socket
import struct
import tempfile
import time
import uuid
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

import msgspec

import prunus
from prunus.errors import ArchiveError, BusyError, CheckpointCorruptError
from prunus.messaging.messages import MAX_FRAME_BYTES
from prunus.persistence import requests
from prunus.persistence.checkpoint import amend_checkpoint, decode_checkpoint
from prunus.persistence.persister import QUERY_LIMIT, SECTIONS, Adopted, Kept, Portion, Query, Record
from prunus.runtime.backend import Backend
from prunus.runtime.controller import ProcessController
from prunus.runtime.selection import BATCH_BYTES, ask_all

FORMAT = 1
"""The format that is written; older ones are read."""
MAX_ARCHIVE_BYTES = 256 * 1024 * 1024
"""Of all parts of a file together, before they are compressed: the broker takes them in one commit."""
MAX_PARTS = 20_000
"""In one file; each process has one at least."""
MAX_PART_BYTES = MAX_FRAME_BYTES
"""Of one part."""
MAX_MANIFEST_BYTES = 32 * 1024 * 1024
MAX_DIRECTORY_BYTES = 16 * 1024 * 1024
"""Of the table of contents of a zip, which is read into memory."""
PARCEL_BYTES = 1024 * 1024
"""So much is sent as one piece, unless one part is larger."""
AT_ONCE = 16
"""So many processes are asked for at a time."""
COPY_ATTEMPTS = 5
"""How often the copy of a process that goes on meanwhile is begun."""

MANIFEST = "manifest.json"
_COMPRESSION = zipfile.ZIP_DEFLATED
_LEVEL = 1
_READ_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_IS_ENCRYPTED = 0x1
_END_OF_ZIP = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\x05\x06"
_LARGE_ZIP_SIGNATURE, _LARGE_ZIP_BYTES = b"PK\x06\x07", 20
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, struct.error, OSError, RuntimeError, ValueError)
"""What `zipfile` raises for bytes that are no zip, or one of a kind that it does not know."""
_FIRST_TIME = (1980, 1, 1, 0, 0, 0)
"""What a zip says of times that are not told."""

Progress = Callable[[int, int], None]
"""Is told how many are done, of how many that are known by now."""


class Part(msgspec.Struct, frozen=True):
    """A file in the zip."""

    size: int
    sha256: str


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A process in an archive."""

    pid: str
    class_id: str
    state: str
    parts: tuple[Part, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is in an archive."""

    format: int
    prunus: str
    """The version that wrote it."""
    host: str
    at: float
    """Wall clock, seconds since 1970; for showing only."""
    processes: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of all parts, before they are compressed."""
        return sum(part.size for entry in self.processes for part in entry.parts)


# --- writing ----------------------------------------------------------------------------------------


async def write_archive(
    controller: ProcessController,
    pids: Sequence[str],
    file: Path,
    *,
    tree: bool = True,
    replace: bool = False,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Copy these processes to `file`; with `tree` also those that they submitted, and so on, and wait for.

    Raises `CheckpointNotFoundError`; `ArchiveError` if the file is there (without `replace`) or would be too large, or
    if without `tree` one has not ended that waits for others, or has children that have not; `OSError`.
    """
    with _appears_whole(file, replace) as stream, _Writer(stream) as writer:
        await _copy_all(controller, pids, tree, writer, progress)
        return await asyncio.to_thread(writer.finish)


class _Writer:
    """A zip that is being written."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(stream, "w", _COMPRESSION, compresslevel=_LEVEL, allowZip64=False)
        self._entries: list[Entry] = []
        self._size = self._parts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def add(self, record: Record, portions: Sequence[Portion]) -> None:
        """A process."""
        parts = []
        for number, portion in enumerate(portions):
            data = msgspec.msgpack.encode(portion)
            self._size, self._parts = self._size + len(data), self._parts + 1
            if self._size > MAX_ARCHIVE_BYTES or self._parts > MAX_PARTS:
                raise ArchiveError(
                    f"these processes are more than {MAX_ARCHIVE_BYTES:,} bytes or {MAX_PARTS:,} parts; export them to "
                    "several files"
                )
            self._write(_part_name(len(self._entries), number), data)
            parts.append(Part(len(data), hashlib.sha256(data).hexdigest()))
        self._entries.append(Entry(pid=record.pid, class_id=record.class_id, state=record.state, parts=tuple(parts)))

    def finish(self) -> Manifest:
        manifest = Manifest(
            format=FORMAT,
            prunus=prunus.__version__,
            host=socket.gethostname(),
            at=time.time(),
            processes=tuple(self._entries),
        )
        self._write(MANIFEST, msgspec.json.encode(manifest))
        self._zip.close()
        return manifest

    def _write(self, name: str, data: bytes) -> None:
        info = zipfile.ZipInfo(name, _FIRST_TIME)
        info.compress_type = _COMPRESSION
        self._zip.writestr(info, data, compresslevel=_LEVEL)


async def _copy_all(
    controller: ProcessController, pids: Sequence[str], tree: bool, writer: _Writer, progress: Progress
) -> None:
    """These, then what they submitted, and so on: a parent before its children."""
    communicator = controller.communicator
    first = await _all_of(controller, map(requests.LoadRequest, dict.fromkeys(pids)))
    first.sort(key=lambda record: (record.depth, record.created_at))
    known = {record.pid: None for record in first}
    unread = deque(known)
    copied = 0
    needed: dict[str, str] = {}
    """Without `tree`: who has to be there too, and for whom."""
    while unread:
        batch = [unread.popleft() for _ in range(min(AT_ONCE, len(unread)))]
        beginnings = await ask_all(communicator, map(requests.ExportRequest, batch))
        copies: list[Kept] = []
        for pid, beginning in zip(batch, beginnings, strict=True):
            if isinstance(beginning, Exception):
                raise beginning
            portions = await _portions_of(controller, pid, beginning)
            kept = portions[0].kept
            assert kept is not None, "the first portion has the row"
            await asyncio.to_thread(writer.add, kept.record, portions)
            copies.append(kept)
        # Only now: a child that one of them knows was there before its parent was copied.
        families = await asyncio.gather(*(_family_of(controller, kept, tree) for kept in copies))
        for kept, family in zip(copies, families, strict=True):
            if tree:
                fresh = [pid for pid in dict.fromkeys(family) if pid not in known]
                known.update(dict.fromkeys(fresh))
                unread += fresh
            else:
                needed.update(dict.fromkeys(family, kept.record.pid))
        copied += len(batch)
        progress(copied, len(known))
    if missing := [(other, pid) for other, pid in needed.items() if other not in known]:
        other, pid = missing[0]
        raise ArchiveError(
            f"process {pid} has not ended, and needs {other} (and {len(missing) - 1} more); leave out --no-tree"
            if len(missing) > 1
            else f"process {pid} has not ended, and needs {other}; leave out --no-tree"
        )


async def _portions_of(controller: ProcessController, pid: str, beginning: Portion) -> list[Portion]:
    """All of one process. What it did after the first portion was read is left out."""
    persister = Backend(controller.communicator).persister
    for attempt in range(COPY_ATTEMPTS):
        portions = [beginning if attempt == 0 else await persister.export(pid)]
        size = 0
        try:
            while (after := portions[-1].next) is not None:
                portions.append(await persister.export(pid, after))
                size += len(msgspec.msgpack.encode(portions[-1]))
                if size > MAX_ARCHIVE_BYTES:
                    raise ArchiveError(f"process {pid} is larger than {MAX_ARCHIVE_BYTES:,} bytes")
        except BusyError:
            if attempt == COPY_ATTEMPTS - 1:
                raise
        else:
            break
    kept = portions[0].kept
    assert kept is not None, "the first portion has the row"
    return [
        msgspec.structs.replace(
            portion,
            steps=tuple(step for step in portion.steps if step.seq <= kept.record.seq),
            events=tuple(event for event in portion.events if event.seq <= kept.events_last),
            lines=tuple(line for line in portion.lines if line.seq <= kept.lines_last),
        )
        for portion in portions
    ]


async def _family_of(controller: ProcessController, kept: Kept, tree: bool) -> list[str]:
    """What it waits for and submitted; without `tree` only those that it can't do without."""
    waited_for = [pid for group in kept.groups for pid in group]
    if not tree and kept.record.is_terminal:
        return waited_for
    return waited_for + await _children_of(controller, kept.record.pid, unfinished=not tree)


async def _children_of(controller: ProcessController, pid: str, *, unfinished: bool) -> list[str]:
    """The oldest first."""
    found: list[str] = []
    page: Sequence[Record] = ()
    while not found or len(page) == QUERY_LIMIT:
        before = page[-1].pid if page else None
        page = await controller.find(Query(parent=pid, unfinished=unfinished, limit=QUERY_LIMIT, before=before))
        if not page:
            break
        found += [row.pid for row in page]
    return found[::-1]


async def _all_of(controller: ProcessController, asked: Any) -> list[Any]:
    """The answers to all of these; raises the first error."""
    answers = await ask_all(controller.communicator, asked)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


@contextlib.contextmanager
def _appears_whole(file: Path, replace: bool) -> Iterator[IO[bytes]]:
    """What is written becomes `file` when it is complete and on the disk; after an error nothing is left."""
    if not replace and file.exists():
        raise ArchiveError(f"{file} exists; --force replaces it")
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if replace:
            temporary.replace(file)
        else:
            _rename_to_new(temporary, file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _rename_to_new(temporary: Path, file: Path) -> None:
    """Raises `ArchiveError` if somebody made `file` meanwhile."""
    try:
        os.link(temporary, file)
    except FileExistsError as error:
        raise ArchiveError(f"{file} exists; --force replaces it") from error
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):  # a file system without links
            raise
        temporary.replace(file)


# --- reading ----------------------------------------------------------------------------------------


def read_manifest(file: Path) -> Manifest:
    """What is in `file`, all of which is read and checked. Raises `ArchiveError` and `OSError`."""
    with _opened(file) as archive:
        for _ in archive.portions():
            pass
        return archive.manifest


async def import_archive(
    controller: ProcessController,
    file: Path,
    *,
    play: bool = False,
    skip_existing: bool = False,
    progress: Progress = lambda done, total: None,
) -> Adopted:
    """Keep the processes of `file` here, all of them or none; those that have not ended are paused unless `play`.

    Raises `ArchiveError` if the file is damaged or none of ours, if a pid is here already (without `skip_existing`) or
    a key is, or something is missing that one of them waits for; `OSError`. Nothing was changed then.
    """
    await asyncio.to_thread(read_manifest, file)
    communicator, arrival, number = controller.communicator, uuid.uuid4().hex, 0
    with _opened(file) as archive:
        manifest = archive.manifest
        reason = None if play else f"imported from {shown_host(manifest)}, played by nobody yet"
        total, sent = manifest.size, 0
        page: list[bytes] = []
        for parcel in _parcels(archive.portions(), reason):
            body = requests.encode_request(requests.StageRequest(arrival, number, tuple(parcel)))
            number += 1
            if page and sum(map(len, page)) + len(body) > BATCH_BYTES:
                await communicator.call(page)
                sent += sum(map(len, page))
                progress(min(sent, total), total)
                page = []
            page.append(body)
        adopt = requests.AdoptRequest(arrival, number, shown_host(manifest), skip_existing)
        if sum(map(len, page)) > BATCH_BYTES:
            await communicator.call(page)
            page = []
        *_, answer = await communicator.call([*page, requests.encode_request(adopt)])
        progress(total, total)
    adopted: Adopted = requests.decode_answer(adopt, answer)
    return adopted


def shown_host(manifest: Manifest) -> str:
    """Where it is from, fit to be shown."""
    return re.sub(r"[^\w.:-]", "?", manifest.host, flags=re.ASCII)[:100] or "nowhere"


def _parcels(portions: Iterator[Portion], reason: str | None) -> Iterator[list[Portion]]:
    """Several small ones at a time."""
    parcel: list[Portion] = []
    size = 0
    for portion in portions:
        ready = (
            portion
            if portion.kept is None
            else msgspec.structs.replace(portion, kept=_as_it_arrives(portion.kept, reason))
        )
        length = len(msgspec.msgpack.encode(ready))
        if parcel and size + length > PARCEL_BYTES:
            yield parcel
            parcel, size = [], 0
        parcel.append(ready)
        size += length
    if parcel:
        yield parcel


def _as_it_arrives(kept: Kept, reason: str | None) -> Kept:
    """One that has not ended is paused with this `reason` (None: it plays if it did). One that was about to pause is
    paused in any case: no step of it runs any more."""
    record = kept.record
    assert record.checkpoint is not None, "it was checked"
    if record.is_terminal or record.play == "paused" or (record.play == "playing" and reason is None):
        return kept
    why = reason

    def hold(snapshot: dict[str, Any]) -> None:
        nonlocal why
        wanted = dict(snapshot.get("control") or {})
        if wanted.get("pause"):  # the first reason stays
            why = wanted.get("reason", why)
            return
        wanted |= {"pause": True, "seq": wanted.get("seq", 0) + 1}
        if why is not None:
            wanted["reason"] = why
        snapshot["control"] = wanted

    checkpoint = amend_checkpoint(record.checkpoint, hold)
    held = msgspec.structs.replace(record, checkpoint=checkpoint, play="paused", status=why or record.status)
    return msgspec.structs.replace(kept, record=held, is_held_back=True)


class _UnfitError(Exception):
    """What is wrong with a file."""


class _Archive:
    """A file that is being read. `manifest` is checked, each portion when it is read."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._zip = file
        names = file.namelist()
        if len(names) != len(set(names)) or MANIFEST not in names:
            raise _UnfitError("it has no manifest, or a file twice")
        self._infos = {info.filename: info for info in file.infolist()}
        try:
            self.manifest = msgspec.json.decode(self._read(MANIFEST, MAX_MANIFEST_BYTES), type=Manifest)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _UnfitError(f"its manifest can't be read: {error}") from error
        if not 1 <= self.manifest.format <= FORMAT:
            raise _UnfitError(
                f"it has format {self.manifest.format}, this Prunus reads up to format {FORMAT}; upgrade Prunus"
            )
        parts = {
            _part_name(number, part)
            for number, entry in enumerate(self.manifest.processes)
            for part in range(len(entry.parts))
        }
        if {MANIFEST, *parts} != set(names) or not all(entry.parts for entry in self.manifest.processes):
            raise _UnfitError("its files are not those of its manifest")
        if self.manifest.size > MAX_ARCHIVE_BYTES or any(
            not 0 < part.size <= MAX_PART_BYTES for entry in self.manifest.processes for part in entry.parts
        ):
            raise _UnfitError(f"it holds more than {MAX_ARCHIVE_BYTES:,} bytes")

    def portions(self) -> Iterator[Portion]:
        """All, in their order."""
        for number, entry in enumerate(self.manifest.processes):
            for index, part in enumerate(entry.parts):
                data = self._read(_part_name(number, index), part.size)
                if len(data) != part.size or hashlib.sha256(data).hexdigest() != part.sha256:
                    raise _UnfitError(f"process {entry.pid} is damaged: a checksum does not match")
                try:
                    portion = _PORTION_DECODER.decode(data)
                    _check(portion, entry, index)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise _UnfitError(f"process {entry.pid} can't be read: {error}") from error
                yield portion

    def _read(self, name: str, limit: int) -> bytes:
        info = self._infos[name]
        if info.compress_type not in _READ_COMPRESSIONS or info.flag_bits & _IS_ENCRYPTED:
            raise _UnfitError("it is packed in a way that Prunus does not write")
        try:
            with self._zip.open(info) as stream:
                data = stream.read(limit + 1)
        except _BAD_ZIP as error:
            raise _UnfitError(f"{name} can't be read: {error}") from error
        if len(data) > limit:
            raise _UnfitError(f"{name} is larger than it says")
        return data


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[_Archive]:
    """Raises `ArchiveError` that names the file, whatever is wrong with it."""
    try:
        with file.open("rb") as stream:
            _check_directory(stream)
            try:
                opened = zipfile.ZipFile(stream)
            except _BAD_ZIP as error:
                raise _UnfitError(f"its table of contents can't be read: {error}") from error
            with opened:  # (which is only read, and never extracted)
                yield _Archive(opened)
    except (_UnfitError, CheckpointCorruptError) as error:
        raise ArchiveError(f"{file} is no archive of processes, or damaged: {error}") from error


def _check_directory(stream: IO[bytes]) -> None:
    """Refuse what would take much memory to be opened. (A zip of ours has no comment, and needs no large numbers.)"""
    size = stream.seek(0, os.SEEK_END)
    if size > MAX_ARCHIVE_BYTES + MAX_MANIFEST_BYTES + MAX_DIRECTORY_BYTES:
        raise _UnfitError(f"it is larger than any archive of processes: {size:,} bytes")
    stream.seek(max(0, size - _END_OF_ZIP.size - _LARGE_ZIP_BYTES))
    end = stream.read()
    if len(end) < _END_OF_ZIP.size:
        raise _UnfitError("it is too short")
    signature, *_, directory_bytes, _, comment = _END_OF_ZIP.unpack(end[-_END_OF_ZIP.size :])
    if signature != _END_SIGNATURE or comment or end.startswith(_LARGE_ZIP_SIGNATURE):
        raise _UnfitError("it does not end as one does")
    if directory_bytes > MAX_DIRECTORY_BYTES:
        raise _UnfitError(f"its table of contents has {directory_bytes:,} bytes")
    stream.seek(0)


def _check(portion: Portion, entry: Entry, index: int) -> None:
    """Raises `_UnfitError` unless this can be the part `index` of a process."""
    is_last = index == len(entry.parts) - 1
    if (
        portion.pid != entry.pid
        or (portion.kept is None) != (index > 0)
        or (portion.next is None) != is_last
        or (portion.next is not None and portion.next.section not in SECTIONS)
    ):
        raise _UnfitError(f"the parts of process {entry.pid} do not fit together")
    if portion.kept is None:
        return
    record = portion.kept.record
    if record.checkpoint is None or (record.pid, record.class_id, record.state) != (
        entry.pid,
        entry.class_id,
        entry.state,
    ):
        raise _UnfitError(f"process {entry.pid} is another one than the manifest says")

    def compare(snapshot: dict[str, Any]) -> None:
        if snapshot.get("pid") != entry.pid:
            raise _UnfitError(f"the checkpoint of process {entry.pid} is that of another one")

    amend_checkpoint(record.checkpoint, compare)
    if decode_checkpoint(record.checkpoint).class_id != record.class_id:
        raise _UnfitError(f"the checkpoint of process {entry.pid} is that of another class")
    if record.result is not None and not isinstance(msgspec.msgpack.decode(record.result), dict):
        raise _UnfitError(f"the result of process {entry.pid} can't be read")


def _part_name(process: int, part: int) -> str:
    return f"{process:06}-{part:06}.msgpack"


_PORTION_DECODER = msgspec.msgpack.Decoder(Portion)
