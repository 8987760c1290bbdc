"""One process in memory: create and run it, one step of an outline, one checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import prunus
from benchmarks.clock import per_call_us
from benchmarks.run import Report
from prunus.persistence.checkpoint import decode_checkpoint, encode_checkpoint

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
    peer = Plumpy() if _has("plumpy") else None
    name = "plumpy 0.26" if peer else ""

    async def ours() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for _ in range(500):
            await Trivial().execute()
        trivial = (loop.time() - begun) / 500
        begun = loop.time()
        for _ in range(10):
            await Counter().execute()
        return trivial * 1e6, (loop.time() - begun) / 10 / OUTLINE_STEPS * 1e6

    rounds = [asyncio.run(ours()) for _ in range(5)]
    trivial, step = (sorted(values)[2] for values in zip(*rounds, strict=True))
    report.add("create and run a trivial process", trivial, "us", peer and peer.trivial_us(), name)
    report.add("one step of an outline", step, "us", peer and peer.step_us(), name)

    process = Inputs()
    data = encode_checkpoint(process.snapshot(), class_id=process.class_id, class_version=process.version)
    report.add(
        "checkpoint: process to bytes",
        per_call_us(lambda: encode_checkpoint(process.snapshot(), class_id=process.class_id, class_version=1), 500),
        "us",
        peer and peer.save_us(),
        name,
    )
    report.add(
        "checkpoint: bytes to process",
        per_call_us(lambda: Inputs.restore(decode_checkpoint(data).snapshot()), 500),
        "us",
        peer and peer.load_us(),
        name,
    )


class Plumpy:
    """The same work by plumpy."""

    def __init__(self) -> None:
        import plumpy

        class Trivial(plumpy.Process):  # type: ignore[misc]
            def run(self) -> None:
                pass

        class Counter(plumpy.WorkChain):  # type: ignore[misc]
            @classmethod
            def define(cls, spec: Any) -> None:
                super().define(spec)
                spec.outline(cls.begin, plumpy.while_(cls.more)(cls.count))

            def begin(self) -> None:
                self.ctx.left = OUTLINE_STEPS

            def more(self) -> bool:
                return bool(self.ctx.left > 0)

            def count(self) -> None:
                self.ctx.left -= 1

        class Inputs(plumpy.Process):  # type: ignore[misc]
            @classmethod
            def define(cls, spec: Any) -> None:
                super().define(spec)
                for name in "abcdefghij":
                    spec.input(name, default=1.5)

        globals()["PlumpyInputs"] = Inputs
        Inputs.__name__ = Inputs.__qualname__ = "PlumpyInputs"
        self.plumpy, self.Trivial, self.Counter, self.Inputs = plumpy, Trivial, Counter, Inputs
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)

    def trivial_us(self) -> float:
        return self._timed(lambda: self.Trivial(loop=self.loop), 300)

    def step_us(self) -> float:
        return self._timed(lambda: self.Counter(loop=self.loop), 5) / OUTLINE_STEPS

    def save_us(self) -> float:
        """A Bundle, and its form as text: plumpy's Bundle alone is not bytes yet."""
        import yaml

        process = self.Inputs(loop=self.loop)
        return per_call_us(lambda: yaml.dump(self.plumpy.Bundle(process)), 20)

    def load_us(self) -> float:
        import yaml

        asyncio.set_event_loop(self.loop)  # plumpy's futures take the current one
        text = yaml.dump(self.plumpy.Bundle(self.Inputs(loop=self.loop)))
        context = self.plumpy.LoadSaveContext(loop=self.loop)
        return per_call_us(lambda: yaml.load(text, yaml.UnsafeLoader).unbundle(context), 20)

    def _timed(self, make: Callable[[], Any], calls: int) -> float:
        async def run() -> None:
            for _ in range(calls):
                await make().step_until_terminated()

        def once() -> None:
            self.loop.run_until_complete(run())

        return per_call_us(once, 1) / calls


def _has(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None
