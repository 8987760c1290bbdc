"""What a power cut can leave on a disk, from the trace of a real run, and whether a broker that starts there is right.

A disk keeps what was synchronised. Of what was written to a file since its last synchronisation it keeps anything: all,
nothing, a beginning, any part of it; and of one write any of its sectors. A file that was created is there for certain
once it or its folder was synchronised, one that was removed is gone for certain once its folder was. So each place in
the trace has many states; the seed chooses among them. (That ext4 and others promise more is not made use of.)

What was said to clients before that place is known from the trace, too: the script writes it to a file.
"""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.torture.batch import Batch
from tests.torture.disk.script import DATABASE, SAID, judge
from tests.torture.disk.shim import build, environment_with

SECTOR = 512
HEADER = struct.Struct("=c63sqq")
FAST_FOLDERS = ("/dev/shm", None)
"""Where states are built: nothing is lost there by not writing to a disk."""
STEPS = 60
FATES = ("none", "all", "beginning", "any", "any", "torn", "torn")
"""What becomes of the writes that were not synchronised."""


class Operation(NamedTuple):
    """One record of the shim."""

    kind: str
    name: str
    offset: int
    data: bytes


@dataclass
class _File:
    durable: bytearray = field(default_factory=bytearray)
    exists: bool = False
    """For certain."""
    pending: list[Operation] = field(default_factory=list)
    """Since it was synchronised, its creation and removal too."""


class Disk:
    """The files as they certainly are, and what may be true of them besides."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self.said = bytearray()

    def apply(self, operation: Operation) -> None:
        """The program did this."""
        if operation.name == SAID:
            self.said += operation.data
            return
        if operation.kind == "d":
            for file in self._files.values():
                self._settle_names(file)
            return
        if not operation.name.startswith(DATABASE):
            return
        file = self._files.setdefault(operation.name, _File())
        file.pending.append(operation)
        if operation.kind == "s":
            for one in file.pending:
                _do(file, one)
            file.pending.clear()

    def state(self, choice: random.Random) -> dict[str, bytes]:
        """The files that the cut leaves."""
        left: dict[str, bytes] = {}
        for name, file in self._files.items():
            outcome = _File(bytearray(file.durable), file.exists)
            for operation in _fate(file.pending, choice):
                _do(outcome, operation)
            if outcome.exists:
                left[name] = bytes(outcome.durable)
        return left

    @staticmethod
    def _settle_names(file: _File) -> None:
        """Its folder was synchronised: it is there, or not, for certain; its content is another matter."""
        while (last := next((n for n, one in enumerate(file.pending) if one.kind == "u"), None)) is not None:
            del file.pending[: last + 1]
            file.durable, file.exists = bytearray(), False
        file.pending, created = [one for one in file.pending if one.kind != "c"], file.pending
        file.exists = file.exists or len(created) != len(file.pending)


def _do(file: _File, operation: Operation) -> None:
    match operation.kind:
        case "c":
            file.exists = True
        case "u":
            file.durable, file.exists = bytearray(), False
        case "t":
            size = len(file.durable)
            file.durable += bytes(max(0, operation.offset - size))
            del file.durable[operation.offset :]
        case "w":
            end = operation.offset + len(operation.data)
            file.durable += bytes(max(0, end - len(file.durable)))
            file.durable[operation.offset : end] = operation.data
        case _:
            pass


def _fate(pending: list[Operation], choice: random.Random) -> list[Operation]:
    match choice.choice(FATES):
        case "none":
            return []
        case "all":
            return pending
        case "beginning":
            return pending[: choice.randint(0, len(pending))]
        case "any":
            return [operation for operation in pending if choice.random() < 0.5 or operation.kind == "c"]
        case _:
            kept: list[Operation] = []
            for operation in pending:
                if operation.kind == "w" and choice.random() < 0.5:
                    kept += _sectors(operation, choice)
                elif choice.random() < 0.8 or operation.kind == "c":
                    kept.append(operation)
            return kept


def _sectors(write: Operation, choice: random.Random) -> Iterator[Operation]:
    """Those of its sectors that reached the disk."""
    start = write.offset
    while start < write.offset + len(write.data):
        end = min((start // SECTOR + 1) * SECTOR, write.offset + len(write.data))
        if choice.random() < 0.5:
            yield Operation("w", write.name, start, write.data[start - write.offset : end - write.offset])
        start = end


def read_trace(file: Path) -> list[Operation]:
    """What the shim wrote down."""
    raw = file.read_bytes()
    operations, place = [], 0
    while place < len(raw):
        kind, name, offset, size = HEADER.unpack_from(raw, place)
        place += HEADER.size
        operations.append(Operation(kind.decode(), name.rstrip(b"\0").decode(), offset, raw[place : place + size]))
        place += size
    return operations


def traced(folder: Path, seed: int, synchronous: str, steps: int = STEPS) -> list[Operation]:
    """What a script does. Raises `CanNotRunError`."""
    work = folder / "work"
    work.mkdir()
    trace = folder / "trace"
    command = [sys.executable, "-m", "tests.torture.disk.script", str(work), str(seed), str(steps), str(trace)]
    subprocess.run([*command, synchronous], check=True, env=environment_with(build(folder)))
    shutil.rmtree(work)
    return read_trace(trace)


def run(seed: int, size: int, synchronous: str = "") -> Batch:
    """`size` states of one run. Raises `CanNotRunError`."""
    parent = next(folder for folder in FAST_FOLDERS if folder is None or Path(folder).is_dir())
    with tempfile.TemporaryDirectory(prefix="pr-", dir=parent) as name:
        folder = Path(name)
        operations = traced(folder, seed, synchronous)
        choice = random.Random(seed)
        places = sorted(choice.randrange(1, len(operations) + 1) for _ in range(size))
        disk, applied = Disk(), 0
        failures: list[str] = []
        for number, place in enumerate(places):
            for operation in operations[applied:place]:
                disk.apply(operation)
            applied = place
            state = folder / "state"
            state.mkdir()
            for name, content in disk.state(choice).items():
                (state / name).write_bytes(content)
            said = disk.said.decode().splitlines()
            where = f"state {number} after operation {place} of {len(operations)}"
            if complaints := judge(state, said):
                failures.append(f"{where}: {'; '.join(complaints[:3])}")
            shutil.rmtree(state)
    synced = sum(operation.kind == "s" for operation in operations)
    counts = {"operations traced": len(operations), "of these synchronisations": synced, "bad states": len(failures)}
    return Batch.of(size, failures, counts)


def run_without_sync(seed: int, size: int) -> Batch:
    """The same with less than FULL: finding nothing is the failure. (A rig that sees no loss there would see none.)"""
    total = Batch.of(0)
    for synchronous in ("NORMAL", "OFF"):
        found = run(seed, size // 2, synchronous).counts["bad states"]
        failures = [] if found else [f"synchronous={synchronous}: no loss was found in {size // 2} states"]
        total += Batch.of(size // 2, failures, {f"bad states with {synchronous}": found})
    return total
