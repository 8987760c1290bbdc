"""Process classes that the tests of the runtime launch."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any, ClassVar

from prunus import Process, ProcessSpec, Stop, Wait, WorkChain, append_, while_


class Add(Process):
    """One step, one output."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("a", valid_type=int)
        spec.input("b", valid_type=int, default=1)
        spec.output("sum", valid_type=int)

    async def run(self) -> None:
        self.out("sum", self.inputs.a + self.inputs.b)


class Boom(Process):
    """Its step raises."""

    async def run(self) -> None:
        raise ZeroDivisionError("no good")


class Heal(Process):
    """Raises as long as a file does not exist."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("file", valid_type=str)
        spec.output("healed", valid_type=bool)

    def run(self) -> None:
        if not Path(self.inputs.file).exists():
            raise FileNotFoundError(self.inputs.file)
        self.out("healed", True)


class Unsavable(Process):
    """Its output has no form in a checkpoint."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.output("thing")

    async def run(self) -> None:
        self.out("thing", object())


class Endless(Process):
    """Its step ends only when it is cancelled; files say that it has begun and that it has cleaned up."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("begun", valid_type=str)

    async def run(self) -> None:
        append(self.inputs.begun, self.idempotency_key)
        try:
            await asyncio.Event().wait()
        finally:
            append(self.inputs.begun, "cleaned up")


class Ask(Process):
    """Waits for a message and gives it back."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.output("answer")

    async def run(self) -> Wait:
        return Wait(self.got, msg="waiting for a person")

    async def got(self, answer: Any = None) -> None:
        self.out("answer", answer)


class Fan(WorkChain):
    """Submits children and sums up what they say."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("count", valid_type=int, default=3)
        spec.output("total", valid_type=int)
        spec.outline(cls.scatter, cls.gather)

    async def scatter(self) -> None:
        for number in range(self.inputs.count):
            self.to_context(parts=append_(self.submit(Add, {"a": number})))

    async def gather(self) -> None:
        self.out("total", sum(part.outputs.sum for part in self.ctx.parts))


class Nest(WorkChain):
    """Waits for one endless child."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("begun", valid_type=str)
        spec.outline(cls.begin, cls.end)

    async def begin(self) -> None:
        self.to_context(child=self.submit(Endless, {"begun": self.inputs.begun}))

    async def end(self) -> Stop:
        return Stop(self.ctx.child.state.value)


class Wander(WorkChain):
    """Each step does one of the things that a step can do; `seed` says which, the same in each attempt.

    Steps write their idempotency keys into `Wander.journal`. Those that are stuck end when `Wander.gate` opens.
    """

    run_sync_steps_in = "loop"
    journal: ClassVar[list[str]] = []
    gate: ClassVar[asyncio.Event] = asyncio.Event()

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("seed", valid_type=int)
        spec.input("steps", valid_type=int, default=5)
        spec.input("depth", valid_type=int, default=1)
        spec.outline(cls.begin, while_(cls.more)(cls.wander))

    async def begin(self) -> None:
        self.ctx.taken = 0

    def more(self) -> bool:
        return bool(self.ctx.taken < self.inputs.steps)

    async def wander(self) -> Wait | None:
        choice = random.Random(f"{self.inputs.seed} {self.ctx.taken}")
        self.journal.append(self.idempotency_key)
        self.ctx.taken += 1
        for _ in range(choice.choice((0, 0, 1, 3, 30))):
            await asyncio.sleep(0)
        what = choice.random()
        if what < 0.15:
            return Wait(msg="for a message")
        if what < 0.3 and self.inputs.depth:
            for _ in range(choice.randint(1, 2)):
                inputs = {"seed": choice.getrandbits(30), "steps": 2, "depth": self.inputs.depth - 1}
                self.to_context(children=append_(self.submit(Wander, inputs)))
        elif what < 0.35:
            raise ZeroDivisionError("a step failed")
        elif what < 0.45:
            await self.gate.wait()
        return None


class Journal(WorkChain):
    """Appends a line under its idempotency key in each of `steps` steps: what ran how often can be read there."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("file", valid_type=str)
        spec.input("steps", valid_type=int, default=10)
        spec.input("pace_s", valid_type=float, default=0.0)
        spec.output("written", valid_type=int)
        spec.outline(cls.begin, while_(cls.more)(cls.write), cls.end)

    async def begin(self) -> None:
        self.ctx.written = 0

    def more(self) -> bool:
        return bool(self.ctx.written < self.inputs.steps)

    async def write(self) -> None:
        append(self.inputs.file, self.idempotency_key)
        self.ctx.written += 1
        await asyncio.sleep(self.inputs.pace_s)

    async def end(self) -> None:
        self.out("written", self.ctx.written)


def append(file: str, line: str) -> None:
    """One atomic line."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)
