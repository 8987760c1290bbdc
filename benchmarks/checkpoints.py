"""Durable checkpoints: each is on the disk (fsync) before the next step begins. Many at once share an fsync.

Here straight into a database file, without a broker and without processes; `daemon` measures the whole way.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path

from benchmarks.processes import Inputs, has_peers
from benchmarks.run import Report
from prunus.persistence import NewProcess, Save, SqlitePersister
from prunus.runtime.runner import checkpoint_of

SECONDS = 2.0
CHECKPOINT = b"x" * 500
"""About the size of the checkpoint of a small process."""


def measure(report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="prunus-bench-") as folder:
        report.add("fsync of an appended block (the disk's own limit)", fsyncs(Path(folder) / "probe"), "/s")
        for at_once in (1, 8, 64):
            rate, commits = asyncio.run(checkpoints(Path(folder) / f"{at_once}.db", at_once))
            report.add(f"durable checkpoints, {at_once} at once ({commits:,.0f} commits/s)", rate, "/s")
        ours = asyncio.run(encode_and_save_us(Path(folder) / "one.db"))
        theirs, name = by_plumpy()
        report.add("process to bytes to disk, one by one; theirs never fsyncs", ours, "us", theirs, name)


def fsyncs(file: Path) -> float:
    """How often a second the disk confirms a small write."""
    with file.open("wb", buffering=0) as out:
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < SECONDS / 2:
            out.write(CHECKPOINT)
            os.fdatasync(out.fileno()) if hasattr(os, "fdatasync") else os.fsync(out.fileno())
            count += 1
        return count / (time.perf_counter() - begun)


async def checkpoints(file: Path, at_once: int) -> tuple[float, float]:
    """Saves and commits per second."""
    async with SqlitePersister(file) as persister:
        epochs = {}
        for number in range(at_once):
            pid = f"p{number}"
            await persister.create(NewProcess(pid=pid, class_id="b:B", checkpoint=CHECKPOINT, created_at=0.0))
            epochs[pid] = (await persister.claim(pid, "bench", at=0.0)).epoch
        before = persister.statistics().commits
        begun = time.perf_counter()
        end = begun + SECONDS

        async def run(pid: str) -> int:
            count = 0
            while time.perf_counter() < end:
                await persister.save(Save(pid=pid, epoch=epochs[pid], state="running", checkpoint=CHECKPOINT))
                count += 1
            return count

        total = sum(await asyncio.gather(*(run(pid) for pid in epochs)))
        taken = time.perf_counter() - begun
        return total / taken, (persister.statistics().commits - before) / taken


async def encode_and_save_us(file: Path) -> float:
    """The same work as plumpy's `PicklePersister.save_checkpoint`, and an fsync."""
    process = Inputs()
    async with SqlitePersister(file) as persister:
        new = NewProcess(pid="p", class_id="b:B", checkpoint=checkpoint_of(process), created_at=0.0)
        await persister.create(new)
        epoch = (await persister.claim("p", "bench", at=0.0)).epoch
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < SECONDS / 2:
            await persister.save(Save(pid="p", epoch=epoch, state="running", checkpoint=checkpoint_of(process)))
            count += 1
        return (time.perf_counter() - begun) / count * 1e6


def by_plumpy() -> tuple[float | None, str]:
    if not has_peers():
        return None, ""
    from benchmarks.peers import Plumpy

    with Plumpy() as plumpy:
        return plumpy.persist_us(), plumpy.name
