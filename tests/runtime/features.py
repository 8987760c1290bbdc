"""Process classes that use what steps can wait for, retry, say and be asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from prunus import (
    DidNotHappen,
    Happened,
    Process,
    ProcessResult,
    ProcessSpec,
    RetryPolicy,
    Wait,
    WorkChain,
    message,
    query,
    sleep,
    step,
    update,
    while_,
)
from prunus.processes.fanout import MAX_LISTED_ITEMS
from tests.runtime.workflows import append


class Flaky(Process):
    """Fails until its `attempts` are used up."""

    keys: ClassVar[list[str]] = []

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("failures", valid_type=int)

    @step(retry=RetryPolicy(max_attempts=3, initial_interval_s=0.01, jitter=0))
    async def run(self) -> str:
        Flaky.keys.append(self.idempotency_key)
        if len(Flaky.keys) <= self.inputs.failures:
            raise ConnectionError(f"no answer to call {len(Flaky.keys)}")
        return self.idempotency_key


class Nap(Process):
    """Sleeps for some seconds, parked."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("seconds", valid_type=float)

    async def run(self) -> Wait:
        return Wait(sleep(self.inputs.seconds), then=self.awake)

    async def awake(self) -> str:
        return "awake"


class Review(Process):
    """Waits for a verdict, and can be asked and changed meanwhile."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("approve", valid_type=bool)
        spec.message("comment", valid_type=str)
        spec.input("limit", valid_type=int, default=3)
        spec.output("limit", valid_type=int)

    async def run(self) -> Wait:
        self.out("limit", self.inputs.limit)
        return Wait.any(approved=message("approve"), late=sleep(3600), then=self.decide)

    async def decide(self, approved: bool | None, late: None) -> str:
        return "approved" if approved else "refused"

    @query
    def limit_plus(self, more: int = 0) -> int:
        return int(self.outputs["limit"]) + more

    @update
    def set_limit(self, limit: int) -> int:
        if limit < 0:
            raise ValueError("a limit is not negative")
        before = int(self.outputs["limit"])
        self.out("limit", limit)
        return before


class Letters(Process):
    """Takes `count` comments, one at a time, in their order."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("comment", valid_type=str)
        spec.input("count", valid_type=int)

    async def run(self, so_far: str = "") -> Any:
        if len(so_far) == self.inputs.count:
            return so_far
        return Wait(message("comment"), then=self.take)

    async def take(self, comment: str) -> Any:
        self.set_status((self.status or "") + comment)
        return (
            (self.status or "")
            if len(self.status or "") == self.inputs.count
            else Wait(message("comment"), then=self.take)
        )


class Gated(Process):
    """Its step waits for a file; says how far it is."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("file", valid_type=str)
        spec.message("note", valid_type=str)

    async def run(self) -> str:
        self.report("waiting for the file")
        self.heartbeat(progress=0.5, detail="half of it")
        while not is_there(self.inputs.file):
            await asyncio.sleep(0.005)
        return "done"

    @query
    def where(self) -> str | None:
        return self.next_step


class Chain(WorkChain):
    """Three steps that add letters to the context."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("bad", valid_type=bool, default=False)
        spec.outline(cls.first, cls.second, cls.third)

    async def first(self) -> None:
        self.ctx.text = "a"

    async def second(self) -> None:
        self.ctx.text += "b"
        if self.inputs.bad and not self.ctx.get("mended"):
            raise ValueError("not mended")

    def third(self) -> Any:
        from prunus import Stop

        self.report("the end is near")
        return Stop(self.ctx.text + "c")


class Square(Process):
    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("x", valid_type=int)

    async def run(self) -> int:
        if self.inputs.x < 0:
            raise ValueError("negative")
        return int(self.inputs.x) ** 2


class SumOfSquares(Process):
    """Maps over a range, and sums up."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("count", valid_type=int)

    async def run(self) -> Wait:
        return self.map(Square, range(self.inputs.count), max_in_flight=4, then=self.add)

    async def add(self, results: Any) -> int:
        return sum([result.value async for result in results])


class AsTheyCome(Process):
    """Several waits with steps of their own."""

    async def run(self) -> list[Wait]:
        children = [self.submit(Square, {"x": x}) for x in range(4)]
        return [*self.as_completed(children, self.one), Wait(sleep(0.01), then=self.slept)]

    async def one(self, result: ProcessResult) -> None:
        self.set_status(f"{self.status or ''}{result.value},")

    async def slept(self) -> None:
        self.set_status(f"{self.status or ''}zzz,")


class Charge(Process):
    """An effect that must not be repeated: it appends to a file."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("file", valid_type=str)
        spec.input("hang", valid_type=bool, default=True)

    @step(effect="once")
    async def run(self) -> str:
        append(self.inputs.file, self.idempotency_key)
        if self.inputs.hang:
            await asyncio.Event().wait()
        return "charged"


class ChargeAndLook(Charge):
    """The same, but it can find out."""

    @step(effect="once", reconcile="look")
    async def run(self) -> str:
        return await super().run()

    async def look(self, key: str) -> Happened | DidNotHappen:
        return Happened("found") if key in lines_of(self.inputs.file) else DidNotHappen()


class Parent(WorkChain):
    """One child of each way to close."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("file", valid_type=str)
        spec.input("end", valid_type=bool, default=False)
        spec.outline(cls.begin, cls.wait)

    async def begin(self) -> None:
        for policy in ("kill", "abandon", "wait"):
            self.submit(Gated, {"file": self.inputs.file}, pid=f"{self.pid}-{policy}", parent_close=policy)  # type: ignore[arg-type]

    async def wait(self) -> Any:
        return None if self.inputs.end else Wait(msg="suspended")


class Careful(Process):
    """Pauses when its step raises."""

    on_exception = "pause"

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("file", valid_type=str)

    async def run(self) -> str:
        if not is_there(self.inputs.file):
            raise FileNotFoundError("it is not there yet")
        return "found"


def is_there(file: str) -> bool:
    return Path(file).exists()


def lines_of(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if is_there(file) else []


class Ledger(WorkChain):
    """Enters `count` numbers that are sent to it, one in each step; each entry is a line in a file."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("entry", valid_type=int)
        spec.input("file", valid_type=str)
        spec.input("count", valid_type=int)
        spec.output("entries", valid_type=list)
        spec.outline(while_(cls.more)(cls.listen), cls.close)

    def more(self) -> bool:
        return len(self.ctx.get("entries", ())) < int(self.inputs.count)

    async def listen(self) -> Wait:
        return Wait(message("entry"), then=self.enter)

    async def enter(self, entry: int) -> None:
        append(self.inputs.file, self.idempotency_key)
        self.ctx.entries = [*self.ctx.get("entries", ()), entry]

    async def close(self) -> None:
        self.out("entries", self.ctx.entries)


class Stubborn(Process):
    """Fails in each of its three attempts, with an hour and then three in between."""

    keys: ClassVar[list[str]] = []

    @step(retry=RetryPolicy(max_attempts=3, initial_interval_s=3600, backoff=3, max_interval_s=1e6, jitter=0))
    async def run(self) -> None:
        Stubborn.keys.append(self.idempotency_key)
        raise ConnectionError(f"attempt {len(Stubborn.keys)}")


class Crowd(Process):
    """A parent of many."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("count", valid_type=int)

    async def run(self) -> Wait:
        for _ in range(self.inputs.count):
            self.submit(Patient)
        return Wait(msg="its children are out")


class Patient(Process):
    """Waits for somebody."""

    async def run(self) -> Wait:
        return Wait(msg="waiting for somebody")


class Shaky(WorkChain):
    """Suspended; its queries and updates go wrong in several ways."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("note")
        spec.input("listens", valid_type=bool, default=False)
        spec.output("thing", required=False)
        spec.outline(cls.begin, cls.end)

    async def begin(self) -> Wait:
        self.ctx.number = 1
        return Wait(message("note"), then=self.heard) if self.inputs.listens else Wait(msg="for somebody")

    async def heard(self, note: Any) -> None:
        self.ctx.note = note

    async def end(self) -> None:
        self.out("thing", self.ctx.get("note"))

    @query
    def number(self) -> int:
        return int(self.ctx.number)

    @query
    def raises(self) -> None:
        raise LookupError("it is not here")

    @query
    def says_nothing_savable(self) -> object:
        return object()

    @update
    def fails(self) -> None:
        self.ctx.number = 2
        raise LookupError("it does not work")

    @update
    def answers_nothing_savable(self) -> object:
        self.ctx.number = 3
        return object()

    @update
    def spoils_the_context(self) -> None:
        self.ctx.number = object()

    @update
    def spoils_an_output(self) -> None:
        self.out("thing", object())


class Asked(Gated):
    """Something happens while it answers."""

    hook: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    @query
    def much(self) -> str:
        Asked.hook()
        return "an answer"


class WaitsForNobody(Process):
    """Nobody has this pid."""

    async def run(self) -> Wait:
        self.report("about to wait")
        return Wait(on="nobody")


class Spoiled(Gated):
    """What it puts out can't be saved."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.output("thing")

    async def run(self) -> None:
        await super().run()
        self.out("thing", object())


class TooMany(Process):
    """Maps over a list that is too long for a checkpoint."""

    async def run(self) -> Wait:
        return self.map(Square, [{"x": 1}] * (MAX_LISTED_ITEMS + 1))


class GatedChain(WorkChain):
    """Its second step waits for a file, and then it waits for somebody."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("file", valid_type=str)
        spec.outline(cls.begin, cls.wait, cls.rest)

    async def begin(self) -> None:
        self.ctx.text = "begun"

    async def rest(self) -> Wait:
        return Wait(msg="for somebody")

    async def wait(self) -> None:
        while not is_there(self.inputs.file):
            await asyncio.sleep(0.005)


class Twice(Process):
    """Waits for two messages of one name in one wait."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("note", valid_type=str)

    async def run(self) -> Wait:
        return Wait.all(one=message("note"), other=Wait.any(message("note"), sleep(1)), then=self.heard)

    async def heard(self, one: str, other: str) -> None:
        """It never comes to this."""
