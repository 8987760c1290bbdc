"""One process in memory: create and run it, one step of an outline, one checkpoint.

Each library does it in its own natural way: our steps are coroutines, plumpy's are functions; both run on one event
loop, neither stores or announces anything. Both outlines count down in a loop, so a step includes the loop's condition.

A checkpoint is of a process with ten inputs, to bytes and back to a process that could run on. plumpy's own persister
pickles its bundle, AiiDA writes it as YAML: both ways are measured. Pickle is built of C and neither checks nor
limits what it writes; ours also has a checksum and refuses what it can't bring back.
"""

from __future__ import annotations

import asyncio
import importlib.util
from itertools import zip_longest

import prunus
from benchmarks.clock import ROUNDS, per_call_us
from benchmarks.run import Report
from prunus.persistence.checkpoint import decode_checkpoint
from prunus.runtime.runner import checkpoint_of

OUTLINE_STEPS = 200


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
    trivial, step = (min(values) for values in zip(*rounds, strict=True))
    process = Inputs()
    data = checkpoint_of(process)
    save = per_call_us(lambda: checkpoint_of(process), 500)
    load = per_call_us(lambda: Inputs.restore(decode_checkpoint(data).snapshot()), 500)
    rows = {
        "create and run a trivial process": trivial,
        "one step of an outline": step,
        "checkpoint: process to bytes; theirs as pickle": save,
        "checkpoint: process to bytes; theirs as YAML": save,
        "checkpoint: bytes to process; theirs as pickle": load,
        "checkpoint: bytes to process; theirs as YAML": load,
    }
    theirs, name = by_plumpy()
    for (what, value), peer in zip_longest(rows.items(), theirs):
        report.add(what, value, "us", peer, name)


async def in_memory() -> tuple[float, float]:
    """Microseconds of a process, and of a step."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    for _ in range(500):
        await Trivial().execute()
    trivial = (loop.time() - begun) / 500
    begun = loop.time()
    for _ in range(10):
        await Counter().execute()
    return trivial * 1e6, (loop.time() - begun) / 10 / OUTLINE_STEPS * 1e6


def by_plumpy() -> tuple[list[float], str]:
    if not has_peers():
        return [], ""
    from benchmarks.peers import Plumpy, dump_pickle, dump_yaml, load_pickle, load_yaml

    with Plumpy() as plumpy:
        return [
            plumpy.trivial_us(),
            plumpy.step_us(),
            plumpy.save_us(dump_pickle),
            plumpy.save_us(dump_yaml),
            plumpy.load_us(dump_pickle, load_pickle),
            plumpy.load_us(dump_yaml, load_yaml),
        ], plumpy.name


def has_peers() -> bool:
    """Whether plumpy and kiwipy are installed here."""
    return all(importlib.util.find_spec(name) for name in ("plumpy", "kiwipy"))
