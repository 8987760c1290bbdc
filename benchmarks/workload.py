"""The process classes that the daemon runs."""

from __future__ import annotations

import asyncio
import os
import random
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


class Nap(prunus.WorkChain):
    """Parks for a while; says how late it was woken."""

    @classmethod
    def define(cls, spec: prunus.ProcessSpec) -> None:
        super().define(spec)
        spec.input("seconds", valid_type=float)
        spec.output("late_s", valid_type=float)
        spec.outline(cls.sleep, cls.wake)

    async def sleep(self) -> prunus.Wait:
        self.ctx.due = time.time() + self.inputs.seconds
        return prunus.Wait(prunus.sleep(self.inputs.seconds))

    async def wake(self) -> None:
        self.out("late_s", time.time() - self.ctx.due)


class Lived(prunus.WorkChain):
    """Some steps that wait a little; each notes when it began (monotonic clock), and in which OS process."""

    @classmethod
    def define(cls, spec: prunus.ProcessSpec) -> None:
        super().define(spec)
        spec.input("file", valid_type=str)
        spec.input("steps", valid_type=int)
        spec.input("pace_s", valid_type=float)
        spec.outline(cls.begin, prunus.while_(cls.more)(cls.live))

    async def begin(self) -> None:
        self.ctx.taken = 0

    def more(self) -> bool:
        return bool(self.ctx.taken < self.inputs.steps)

    async def live(self) -> None:
        self.ctx.taken += 1
        line = f"{self.pid} {self.ctx.taken} {os.getpid()} {time.monotonic_ns()}\n"
        descriptor = os.open(self.inputs.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
        await asyncio.sleep(random.uniform(0.5, 1.5) * self.inputs.pace_s)
