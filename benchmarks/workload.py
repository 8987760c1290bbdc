"""The process classes that the daemon runs."""

from __future__ import annotations

import asyncio
import os
import time

import prunus


class Short(prunus.Process):
    """One step: says when it began, on the monotonic clock that all OS processes of this machine share."""

    @classmethod
    def define(cls, spec: prunus.ProcessSpec) -> None:
        super().define(spec)
        spec.output("begun_ns", valid_type=int)

    async def run(self) -> None:
        self.out("begun_ns", time.monotonic_ns())


class Steps(prunus.WorkChain):
    """Steps until `end`, and counts those that begin after `begin` (monotonic clock, seconds)."""

    @classmethod
    def define(cls, spec: prunus.ProcessSpec) -> None:
        super().define(spec)
        spec.input("begin", valid_type=float)
        spec.input("end", valid_type=float)
        spec.output("counted", valid_type=int)
        spec.outline(cls.start, prunus.while_(cls.has_time)(cls.count), cls.finish)

    async def start(self) -> None:
        self.ctx.counted = 0

    def has_time(self) -> bool:
        return bool(time.monotonic() < self.inputs.end)

    async def count(self) -> None:
        self.ctx.counted += time.monotonic() >= self.inputs.begin

    async def finish(self) -> None:
        self.out("counted", self.ctx.counted)


class Paced(prunus.WorkChain):
    """Endless short steps; its status is the OS process that runs it."""

    @classmethod
    def define(cls, spec: prunus.ProcessSpec) -> None:
        super().define(spec)
        spec.outline(prunus.while_(cls.always)(cls.nap))

    def always(self) -> bool:
        return True

    async def nap(self) -> None:
        self.set_status(str(os.getpid()))
        await asyncio.sleep(0.02)
