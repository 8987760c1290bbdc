"""One process in memory: create and run it, one step of an outline, one checkpoint, and its size while it waits.

Each library does it in its own natural way: our steps are coroutines, plumpy's are functions on the loop, which ours
can be too; neither stores or announces anything. The outlines count down in a loop, so a step includes the loop's
condition. An ``async def`` with an ``await`` in it has a task of its own, so it is measured too; it has not to wait.

A checkpoint is of a process with ten inputs, to bytes and back to a process that could run on. plumpy's own persister
pickles its bundle, AiiDA writes it as YAML: both ways are measured. Pickle is built of C and neither checks nor
limits what it writes; ours also has a checksum and refuses what it can't bring back.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import tracemalloc
from itertools import zip_longest

import prunus
from benchmarks.clock import ROUNDS, per_call_us
from benchmarks.run import Report
from prunus.persistence.checkpoint import decode_checkpoint
from prunus.runtime.runner import checkpoint_of

OUTLINE_STEPS = 200
WAITING = 5000


class Trivial(prunus.Process):
    async def run(self) -> None:
        pass


class Counter(prunus.WorkChain):
    @classmethod
    def define(cls, spec: prunus.ProcessSpec) -> None:
        super().define(spec)
        spec.outline(cls.begin, prunus.while_(cls.more)(cls.count))

    async def begin(self) -> None:
        self.ctx.left = OUTLINE_STEPS

    def more(self) -> bool:
        return bool(self.ctx.left > 0)

    async def count(self) -> None:
        self.ctx.left -= 1


class AwaitingCounter(Counter):
    """The same with steps that may wait, but need not."""

    async def count(self) -> None:
        await self.take()

    async def take(self) -> None:
        self.ctx.left -= 1


class PlainCounter(prunus.WorkChain):
    """The first one with plain functions on the loop, as plumpy has them."""

    run_sync_steps_in = "loop"

    @classmethod
    def define(cls, spec: prunus.ProcessSpec) -> None:
        super().define(spec)
        spec.outline(cls.begin, prunus.while_(cls.more)(cls.count))

    def begin(self) -> None:
        self.ctx.left = OUTLINE_STEPS

    def more(self) -> bool:
        return bool(self.ctx.left > 0)

    def count(self) -> None:
        self.ctx.left -= 1


class Waits(prunus.Process):
    """Waits for somebody to resume it."""

    @classmethod
    def define(cls, spec: prunus.ProcessSpec) -> None:
        super().define(spec)
        spec.input("x", valid_type=int)

    async def run(self) -> prunus.Wait:
        return prunus.Wait()


class Inputs(prunus.Process):
    @classmethod
    def define(cls, spec: prunus.ProcessSpec) -> None:
        super().define(spec)
        for name in "abcdefghij":
            spec.input(name, default=1.5)

    async def run(self) -> None:
        pass


def measure(report: Report) -> None:
    rounds = [asyncio.run(in_memory()) for _ in range(ROUNDS)]
    trivial, step, awaiting_step, plain_step = (min(values) for values in zip(*rounds, strict=True))
    process = Inputs()
    data = checkpoint_of(process)
    save = per_call_us(lambda: checkpoint_of(process), 500)
    load = per_call_us(lambda: Inputs.restore(decode_checkpoint(data).snapshot()), 500)
    rows = {
        "create and run a trivial process": trivial,
        "one step of an outline, async def; theirs def": step,
        "one step of an outline, with an await; theirs def": awaiting_step,
        "one step of an outline, def on the loop": plain_step,
        "checkpoint: process to bytes; theirs as pickle": save,
        "checkpoint: process to bytes; theirs as YAML": save,
        "checkpoint: bytes to process; theirs as pickle": load,
        "checkpoint: bytes to process; theirs as YAML": load,
    }
    theirs, name = by_plumpy()
    for (what, value), peer in zip_longest(rows.items(), theirs):
        report.add(what, value, "us", peer, name)
    report.add("memory of a process that waits, driven", asyncio.run(memory_of_waiting()) / 1000, "kB")


async def in_memory() -> tuple[float, float, float, float]:
    """Microseconds of a process, of a step, of one that may wait, and of a plain one."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for _ in range(500):
        await prunus.execute(Trivial)
    trivial = (loop.time() - begun) / 500
    steps = []
    for chain in (Counter, AwaitingCounter, PlainCounter):
        begun = loop.time()
        for _ in range(10):
            await prunus.execute(chain)
        steps.append((loop.time() - begun) / 10 / OUTLINE_STEPS)
    return trivial * 1e6, steps[0] * 1e6, steps[1] * 1e6, steps[2] * 1e6


async def memory_of_waiting() -> float:
    """Bytes that one process takes which is executed and waits, with its input and its task."""
    tracemalloc.start()
    waiting = [asyncio.create_task(prunus.execute(Waits, {"x": number})) for number in range(WAITING)]
    for _ in range(3):
        await asyncio.sleep(0)
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    return size / WAITING


def by_plumpy() -> tuple[list[float], str]:
    if not has_peers():
        return [], ""
    from benchmarks.peers import Plumpy, dump_pickle, dump_yaml, load_pickle, load_yaml

    with Plumpy() as plumpy:
        return [
            plumpy.trivial_us(),
            plumpy.step_us(),
            plumpy.step_us(),
            plumpy.step_us(),
            plumpy.save_us(dump_pickle),
            plumpy.save_us(dump_yaml),
            plumpy.load_us(dump_pickle, load_pickle),
            plumpy.load_us(dump_yaml, load_yaml),
        ], plumpy.name


def has_peers() -> bool:
    """Whether plumpy and kiwipy are installed here."""
    return all(importlib.util.find_spec(name) for name in ("plumpy", "kiwipy"))
