"""The processes of a soak: `Walk` does in each of its steps one of the things that a step can do, `Tick` is scheduled.

Each step begins with a line in the journal of its process (a file of its own in `folder`, so that it is cheap to ask
how often a step has begun). What chance says depends on the seed and the number of the step alone: it is the same in
every attempt.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any

from prunus import (
    Continue,
    Process,
    ProcessSpec,
    RetryPolicy,
    Wait,
    WorkChain,
    append_,
    message,
    query,
    sleep,
    step,
    while_,
)
from prunus import update as update_

SUFFIX = ".steps"


class Walk(WorkChain):
    """`steps` steps, then the end; with `fails` the last of them raises."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("note", valid_type=str)
        spec.input("folder", valid_type=str)
        spec.input("seed", valid_type=int)
        spec.input("steps", valid_type=int)
        spec.input("depth", valid_type=int, default=1)
        spec.input("fails", valid_type=bool, default=False)
        spec.output("taken", valid_type=int)
        spec.output("notes", valid_type=list)
        spec.output("applied", valid_type=list)
        spec.outline(cls.begin, while_(cls.more)(cls.walk), cls.finish)

    async def begin(self) -> None:
        self.ctx.taken = 0  # and nothing else: an update may have been there before the first step

    def more(self) -> bool:
        return bool(self.ctx.taken < self.inputs.steps)

    async def walk(self) -> Any:
        self.begun()
        self.ctx.taken += 1
        if self.inputs.fails and self.ctx.taken == self.inputs.steps:
            raise ZeroDivisionError("this one fails, as it should")
        choice = random.Random(f"{self.inputs.seed} {self.ctx.taken}")
        ways = [self.hurry] * 3 + [self.linger, self.say, self.sleep, self.listen, self.wait_for_any, self.wait_for_all]
        ways += [self.suspend, self.think, self.try_again]
        if self.inputs.depth:
            ways += [self.have_children, self.fan_out]
        return await choice.choice(ways)(choice)

    async def finish(self) -> None:
        self.begun()
        self.out("taken", self.ctx.taken)
        for name in ("notes", "applied"):
            self.out(name, list(self.ctx.get(name, ())))

    def begun(self) -> int:
        """A line in the journal; how many there are of this step."""
        file = Path(self.inputs.folder) / f"{self.pid}{SUFFIX}"
        key = self.idempotency_key
        descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, f"{key}\n".encode())
            return os.pread(descriptor, 1_000_000, 0).decode().splitlines().count(key)
        finally:
            os.close(descriptor)

    # --- what a step may do -------------------------------------------------------------------------

    async def hurry(self, choice: random.Random) -> None:
        pass

    async def linger(self, choice: random.Random) -> None:
        await asyncio.sleep(choice.uniform(0.0, 0.5))

    async def say(self, choice: random.Random) -> None:
        self.report(f"step {self.ctx.taken}")
        self.heartbeat(progress=choice.random(), detail="walking")
        self.set_status(f"has said {self.ctx.taken}")
        await asyncio.sleep(choice.uniform(0.0, 0.1))

    async def sleep(self, choice: random.Random) -> Wait:
        return Wait(sleep(choice.choice((0.0, 0.1, 0.5, 2.0))), then=choice.choice((None, self.rested)))

    async def listen(self, choice: random.Random) -> Wait:
        return Wait(message("note", timeout=choice.choice((None, 0.0, 1.0)), default=""), then=self.noted)

    async def wait_for_any(self, choice: random.Random) -> Wait:
        on: dict[str, Any] = {"note": message("note"), "rest": sleep(choice.uniform(0.0, 1.0))}
        return Wait.any(**on, then=self.noted)

    async def wait_for_all(self, choice: random.Random) -> Wait:
        return Wait.all(note=message("note", timeout=0.5, default=""), rest=sleep(0.1), then=self.noted)

    async def suspend(self, choice: random.Random) -> Wait:
        return Wait(msg="for somebody")

    async def think(self, choice: random.Random) -> Continue:
        return Continue(self.thought)

    async def try_again(self, choice: random.Random) -> Continue:
        return Continue(self.flaky)

    async def have_children(self, choice: random.Random) -> None:
        for number in range(choice.randint(1, 2)):
            inputs = self.of_child(choice.getrandbits(30), choice.randint(0, 2))
            self.to_context(children=append_(self.submit(Walk, inputs, pid=f"{self.pid}-{self.ctx.taken}-{number}")))

    async def fan_out(self, choice: random.Random) -> Wait:
        items = [self.of_child(choice.getrandbits(30), 1) for _ in range(choice.randint(0, 6))]
        return self.map(Walk, items, max_in_flight=choice.randint(1, 4), then=self.gathered)

    def of_child(self, seed: int, steps: int) -> dict[str, Any]:
        return {"folder": self.inputs.folder, "seed": seed, "steps": steps, "depth": self.inputs.depth - 1}

    # --- further steps ------------------------------------------------------------------------------

    def thought(self) -> None:
        """In a thread."""
        self.begun()
        time.sleep(0.02)

    @step(retry=RetryPolicy(max_attempts=4, initial_interval_s=0.1, backoff=2, jitter=1))
    async def flaky(self) -> None:
        if self.begun() <= 2:
            raise ConnectionError("not yet")

    async def rested(self) -> None:
        self.begun()

    async def noted(self, note: str | None = None, rest: None = None) -> None:
        self.begun()
        if note:
            self.ctx.notes = [*self.ctx.get("notes", ()), note]

    async def gathered(self, results: Any) -> None:
        self.begun()
        self.ctx.gathered = [result.pid async for result in results]

    # --- from outside -------------------------------------------------------------------------------

    @update_
    def apply(self, what: str) -> int:
        self.ctx.applied = [*self.ctx.get("applied", ()), what]
        return len(self.ctx.applied)

    @query
    def how_far(self) -> int:
        return int(self.ctx.get("taken", 0))


class Tick(Process):
    """A run of a schedule."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("folder", valid_type=str)

    async def run(self) -> None:
        file = Path(self.inputs.folder) / f"{self.pid.replace('/', '_')}{SUFFIX}"
        with file.open("a") as journal:
            journal.write(f"{self.idempotency_key}\n")
