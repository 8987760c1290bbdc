"""Durable checkpoints: each is on the disk (fsync) before the next step begins. Many at once share an fsync."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks.run import Report
from prunus.persistence import NewProcess, Save, SqlitePersister

SECONDS = 2.0
CHECKPOINT = b"x" * 500
"""About the size of the checkpoint of a small process."""


async def measure(report: Report) -> None:
    with tempfile.TemporaryDirectory(prefix="prunus-bench-") as folder:
        report.add("fsync of an appended block (the disk's own limit)", fsyncs(Path(folder) / "probe"), "/s")
        for at_once in (1, 8, 64):
            rate, commits = await checkpoints(Path(folder) / f"{at_once}.db", at_once)
            report.add(f"durable checkpoints, {at_once} processes at once ({commits:,.0f} commits/s)", rate, "/s")


def fsyncs(file: Path) -> float:
    """How often a second the disk confirms a small write."""
    with file.open("wb", buffering=0) as out:
        import os

        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < SECONDS / 2:
            out.write(CHECKPOINT)
            os.fdatasync(out.fileno())
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
