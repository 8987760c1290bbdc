"""Process classes that the tests of the runtime launch."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any, ClassVar

from prunus import (
    Child,
    Continue,
    Process,
    ProcessResult,
    ProcessSpec,
    RetryPolicy,
    Stop,
    Wait,
    WorkChain,
    append_,
    message,
    query,
    sleep,
    step,
    update,
    while_,
)


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


class Heavy(Process):
    """Something about it is too large for a checkpoint."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("what", valid_type=str)
        spec.output("small")
        spec.output("thing", required=False)

    async def run(self) -> Any:
        self.out("small", "something")
        much = "x" * (17 * 1024 * 1024)
        match self.inputs.what:
            case "output":
                self.out("thing", much)
            case "result":
                return Stop(much)
            case "effect":
                await self.do("compute", lambda: much)
            case "argument":
                return Continue(self.run, much)
            case "log":
                self.report(much)
            case _:
                raise AssertionError(self.inputs.what)
        return None


class HeavyContext(WorkChain):
    """Its context becomes too large for a checkpoint."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.outline(cls.collect, cls.never)

    async def collect(self) -> None:
        self.ctx.few = "something"
        self.ctx.points = [b"x" * 2**20] * 17

    async def never(self) -> None:
        raise AssertionError


class Carrier(WorkChain):
    """Waits for a child whose output is too large."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.output("heard")
        spec.outline(cls.submit_it, cls.look)

    async def submit_it(self) -> None:
        self.to_context(child=self.submit(Heavy, {"what": "output"}))

    async def look(self) -> None:
        self.out("heard", str(self.ctx.child.failure))


class Loaded(Process):
    """Its output is large, but not too large."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.output("thing")

    async def run(self) -> None:
        self.out("thing", b"x" * (6 * 2**20))


class Convoy(Process):
    """Waits for three of these: all they are is too much for one message."""

    async def run(self) -> Wait:
        return Wait.all(*(self.submit(Loaded) for _ in range(3)), then=self.look)

    async def look(self, *results: object) -> None:
        raise AssertionError


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


class Rent(Process):
    """Has something elsewhere that it gives back when it is killed, and waits for a person."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("returned", valid_type=str)
        spec.output("flat")

    async def run(self) -> Any:
        self.out("flat", Path("a/flat"))
        return Wait(msg="a tenant")

    def on_kill(self, message: str | None) -> None:
        Path(self.inputs.returned).write_text(f"{message}\n")


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

    Steps write their idempotency keys into `Wander.journal`. Those that are stuck end when `Wander.gate` opens. What
    was applied to it, and the messages that it took, are in its context.
    """

    run_sync_steps_in = "loop"
    journal: ClassVar[list[str]] = []
    gate: ClassVar[asyncio.Event] = asyncio.Event()

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("note", valid_type=str)
        spec.input("seed", valid_type=int)
        spec.input("steps", valid_type=int, default=5)
        spec.input("depth", valid_type=int, default=1)
        spec.outline(cls.begin, while_(cls.more)(cls.wander))

    async def begin(self) -> None:
        self.ctx.taken = 0

    def more(self) -> bool:
        return bool(self.ctx.taken < self.inputs.steps)

    async def wander(self) -> Any:
        choice = self.chance()
        self.ctx.taken += 1
        for _ in range(choice.choice((0, 0, 1, 3, 30))):
            await asyncio.sleep(0)
        kinds = [self.say, self.sleep, self.listen, self.wait_for_any, self.wait_for_all, self.be_stuck, self.suspend]
        kinds += [self.fail_at_times, lambda _: None, lambda _: None, lambda _: Continue(self.flaky)]
        kinds += [lambda _: Continue(self.pay)]
        if self.inputs.depth:
            kinds += [self.have_children] * 2 + [self.wait_for_several, self.fan_out]
        done = choice.choice(kinds)(choice)
        return await done if asyncio.iscoroutine(done) else done

    def chance(self) -> random.Random:
        """Of this step; and its key goes into the journal."""
        self.journal.append(self.idempotency_key)
        return random.Random(f"{self.inputs.seed} {self.idempotency_key.rpartition(':')[2]}")

    # --- what a step may do -------------------------------------------------------------------------

    def say(self, choice: random.Random) -> None:
        self.report(f"step {self.ctx.taken}")
        self.logger.warning("about %s", self.ctx.taken)
        self.heartbeat(progress=choice.random(), detail="wandering")
        self.set_status(f"has said {self.ctx.taken}")

    def sleep(self, choice: random.Random) -> Wait:
        return Wait(sleep(choice.choice((0.0, 0.001, 0.005))), then=choice.choice((None, self.rested)))

    def listen(self, choice: random.Random) -> Wait:
        return Wait(message("note", timeout=choice.choice((None, 0.0, 0.002, 0.01)), default=""), then=self.noted)

    def wait_for_any(self, choice: random.Random) -> Wait:
        on = {"note": message("note"), "rest": sleep(choice.choice((0.001, 0.004)))}
        if self.inputs.depth and choice.random() < 0.5:
            on["child"] = self.child(choice)
        return Wait.any(**on, then=self.noted)

    def wait_for_all(self, choice: random.Random) -> Wait:
        return Wait.all(note=message("note", timeout=0.003, default=""), rest=sleep(0.001), then=self.noted)

    def suspend(self, choice: random.Random) -> Wait:
        return Wait(msg="for somebody")

    async def be_stuck(self, choice: random.Random) -> None:
        self.heartbeat(progress=0.5)
        await self.gate.wait()

    def fail_at_times(self, choice: random.Random) -> None:
        """So often, and then no more."""
        if self.journal.count(self.idempotency_key) <= choice.choice((1, 2, 4)):
            raise ZeroDivisionError("a step failed")

    def have_children(self, choice: random.Random) -> None:
        for _ in range(choice.randint(1, 2)):
            self.to_context(children=append_(self.child(choice)))

    def wait_for_several(self, choice: random.Random) -> list[Wait]:
        several = self.as_completed([self.child(choice) for _ in range(choice.randint(0, 2))], self.took)
        several += [
            Wait(sleep(0.002), then=self.rested),
            Wait(message("note", timeout=0.01, default=""), then=self.noted),
        ]
        several += [Wait(msg="for somebody", then=self.rested)] if choice.random() < 0.3 else []
        return choice.sample(several, choice.randint(1, len(several)))

    def fan_out(self, choice: random.Random) -> Wait:
        how = {"on_error": choice.choice(("collect", "collect", "fail")), "max_in_flight": choice.randint(1, 2)}
        if choice.random() < 0.5:
            return self.map(Wander, [self.item(number) for number in range(2)], then=self.gathered, **how)
        return self.map(Wander, self.item, count=choice.randint(0, 4), then=self.gathered, **how)

    def item(self, number: int) -> dict[str, int]:
        return {"seed": self.inputs.seed + number, "steps": 1, "depth": 0}

    def child(self, choice: random.Random) -> Child:
        inputs = {"seed": choice.getrandbits(30), "steps": choice.randint(0, 2), "depth": self.inputs.depth - 1}
        return self.submit(
            Wander,
            inputs,
            pid=f"{self.idempotency_key}-{choice.getrandbits(20)}",
            parent_close=choice.choice(("kill", "abandon", "wait")),
            on_exception=choice.choice((None, None, "pause")),
        )

    # --- further steps ------------------------------------------------------------------------------

    @step(retry=RetryPolicy(max_attempts=3, initial_interval_s=0.001, backoff=1, jitter=1))
    async def flaky(self) -> None:
        self.fail_at_times(self.chance())

    @step(effect="once")
    async def pay(self) -> None:
        self.chance()
        await asyncio.sleep(0)

    async def rested(self) -> None:
        self.chance()

    async def noted(self, note: str | None = None, rest: None = None, child: Any = None) -> None:
        self.chance()
        if note:
            self.ctx.notes = [*self.ctx.get("notes", ()), note]

    async def took(self, result: ProcessResult) -> None:
        self.chance()
        self.ctx.results = [*self.ctx.get("results", ()), result.pid]

    async def gathered(self, results: Any) -> None:
        self.chance()
        self.ctx.gathered = [result.pid async for result in results]

    # --- from outside -------------------------------------------------------------------------------

    @update
    def apply(self, what: str, fails: bool = False) -> int:
        self.ctx.applied = [*self.ctx.get("applied", ()), what]
        if fails:
            raise ValueError("this update fails")
        return len(self.ctx.applied)

    @query
    def facts(self) -> dict[str, Any]:
        return dict(self.ctx)


class Tangle(Process):
    """Several waits at once, each a tree of all and any of children, times and messages, and a step for each.

    A tree is ``["child", n]``, ``["time", hours]``, ``["message", name, hours or None]``, ``["all", trees]`` or
    ``["any", trees]``; those in a tree have names, ``_0``, ``_1`` ...
    """

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        for name in ("red", "green", "blue"):
            spec.message(name, valid_type=int)
        spec.input("trees", valid_type=list)
        spec.input("children", valid_type=int)
        spec.output("ended", valid_type=dict, default=dict)

    async def run(self) -> list[Wait]:
        for number in range(self.inputs.children):
            self.submit(Ask, pid=f"{self.pid}-{number}")
        steps = (self.first, self.second, self.third)
        return [Wait(on=self.wait_of(tree), then=then) for tree, then in zip(self.inputs.trees, steps, strict=False)]

    def wait_of(self, tree: list[Any]) -> Any:
        match tree:
            case ["child", number]:
                return f"{self.pid}-{number}"
            case ["time", hours]:
                return sleep(3600.0 * hours)
            case ["message", name, hours]:
                return message(name, timeout=None if hours is None else 3600.0 * hours, default=-1)
            case ["all" | "any" as kind, trees]:
                named = {f"_{number}": self.wait_of(part) for number, part in enumerate(trees)}
                return Wait.all(**named) if kind == "all" else Wait.any(**named)
            case _:
                raise ValueError(tree)

    async def first(self, *values: Any, **named: Any) -> None:
        self.note("first", values, named)

    async def second(self, *values: Any, **named: Any) -> None:
        self.note("second", values, named)

    async def third(self, *values: Any, **named: Any) -> None:
        self.note("third", values, named)

    def note(self, name: str, values: tuple[Any, ...], named: dict[str, Any]) -> None:
        ended = dict(self.outputs.get("ended", {}))
        self.out("ended", {**ended, name: [*ended.get(name, ()), named or list(values)]})


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


class OpenJournal(Journal):
    """Goes on until the file `enough` is there: it is at work whenever a test looks, however long that took."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("enough", valid_type=str)

    def more(self) -> bool:
        return not Path(self.inputs.enough).exists()


def append(file: str, line: str) -> None:
    """One atomic line."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)
