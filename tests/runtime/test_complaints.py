"""What the users of earlier engines ran into again and again, and what becomes of it here.

`docs/for-aiida.md` lists the complaints with the tests that answer them; here are those that no guarantee has in its
own file.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from prunus import Process, ProcessSpec, WorkChain, while_
from prunus.runtime.controller import connect
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.real_daemon import RealDaemon
from tests.runtime import workflows

DEPTH = 10
MANY = 500
LOOPS = 1500


class Deep(WorkChain):
    """Waits for a child that waits for a child ... `depth` levels down."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("depth", valid_type=int)
        spec.output("levels", valid_type=int)
        spec.outline(cls.descend, cls.count)

    async def descend(self) -> None:
        if self.inputs.depth:
            self.to_context(child=self.submit(Deep, {"depth": self.inputs.depth - 1}))

    async def count(self) -> None:
        self.out("levels", self.ctx.child.outputs.levels + 1 if self.inputs.depth else 0)


class Loop(WorkChain):
    """Counts in a `while_`."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("times", valid_type=int)
        spec.output("count", valid_type=int)
        spec.outline(while_(cls.more)(cls.count), cls.end)

    async def more(self) -> bool:
        return bool(self.ctx.get("count", 0) < self.inputs.times)

    async def count(self) -> None:
        self.ctx.count = self.ctx.get("count", 0) + 1

    async def end(self) -> None:
        self.out("count", self.ctx.count)


class Block(Process):
    """A plain step that holds its thread until the gate opens."""

    began: ClassVar[threading.Event] = threading.Event()
    gate: ClassVar[threading.Event] = threading.Event()

    def run(self) -> str:
        Block.began.set()
        return "let go" if Block.gate.wait(20) else "forgotten"


@pytest.mark.parametrize("trees", [1, 5])
async def test_nested_workflows_do_not_starve_each_other(trees: int) -> None:
    """One worker with one slot, and trees of ten levels: every level waits, none is in the way, all complete."""
    async with LocalDaemon(workers=1, slots=1) as daemon:
        handles = [await daemon.controller.launch(Deep, {"depth": DEPTH}) for _ in range(trees)]
        results = await asyncio.gather(*(handle.result() for handle in handles))
    assert [result.outputs.levels for result in results] == [DEPTH] * trees


async def test_a_loop_has_no_depth() -> None:
    """Fifteen hundred turns of a `while_` are no recursion, and leave nothing in the context."""
    result = await Loop({"times": LOOPS}).execute()
    assert result.outputs.count == LOOPS


async def test_plain_code_that_blocks_is_in_nobodys_way() -> None:
    """While a plain step holds its thread, the same worker finishes others, and answers for this one."""
    Block.began.clear()
    Block.gate.clear()
    async with LocalDaemon(workers=1, slots=2) as daemon:
        blocked = await daemon.controller.launch(Block)
        await asyncio.to_thread(Block.began.wait, 20)
        other = await daemon.controller.launch(workflows.Add, {"a": 1})
        assert (await other.result()).outputs.sum == 2
        await blocked.pause("looking", quiesced=False)
        await blocked.play()
        Block.gate.set()
        assert (await blocked.result()).value == "let go"


@pytest.mark.parametrize("workers", [1, 4])
async def test_many_submissions_at_once_are_all_accepted(workers: int) -> None:
    """Hundreds of launches, none waited for: back-pressure, and no time-out; with more workers too."""
    async with LocalDaemon(workers=workers, slots=8) as daemon:
        handles = await asyncio.gather(
            *(daemon.controller.launch(workflows.Add, {"a": number, "b": 0}) for number in range(MANY))
        )
        results = await asyncio.gather(*(handle.result() for handle in handles))
    assert [result.outputs.sum for result in results] == list(range(MANY))


async def test_open_files_do_not_grow_with_the_work(short_folder: Path) -> None:
    """Broker, worker and controller have as many files open after a hundred processes as after one."""
    async with RealDaemon(short_folder, workers=1) as daemon:
        await work(daemon, 1)
        before = open_files(daemon)
        await work(daemon, 100)
        for _ in range(20):
            async with connect(daemon.profile) as another:
                await another.find()
        # Who has just left is about to be forgotten; what is never given back is waited for in vain.
        while any(number > before[name] + 1 for name, number in open_files(daemon).items()):
            await asyncio.sleep(0.02)


async def work(daemon: RealDaemon, count: int) -> None:
    handles = await asyncio.gather(*(daemon.controller.launch(workflows.Fan, {"count": 1}) for _ in range(count)))
    await asyncio.gather(*(handle.result() for handle in handles))


def open_files(daemon: RealDaemon) -> dict[str, int]:
    """The file descriptors of each service, and of this process."""
    services = {name: psutil.Process(service.pid).num_fds() for name, service in daemon.services.items()}
    return {**services, "here": psutil.Process().num_fds()}
