"""The peers that do the same work in the same run. Imported only where they are installed (see `peers`)."""

from __future__ import annotations

import asyncio
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import kiwipy
import plumpy
import yaml

from benchmarks.clock import per_call_us

OUTLINE_STEPS = 200


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

    def run(self) -> None:
        pass


class Plumpy:
    """The work by plumpy, in microseconds. For use outside of an event loop."""

    name = "plumpy 0.26"

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Plumpy:
        asyncio.set_event_loop(self._loop)  # plumpy's futures take the current one
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.set_event_loop(None)
        self._loop.close()

    def trivial_us(self) -> float:
        return self._run_us(lambda: Trivial(loop=self._loop), 300)

    def step_us(self) -> float:
        return self._run_us(lambda: Counter(loop=self._loop), 5) / OUTLINE_STEPS

    def save_us(self, dump: Callable[[Any], object]) -> float:
        """A process to a bundle to bytes."""
        process = Inputs(loop=self._loop)
        return per_call_us(lambda: dump(plumpy.Bundle(process)), 50)

    def load_us(self, dump: Callable[[Any], Any], load: Callable[[Any], Any]) -> float:
        """The way back."""
        data = dump(plumpy.Bundle(Inputs(loop=self._loop)))
        context = plumpy.LoadSaveContext(loop=self._loop)
        return per_call_us(lambda: load(data).unbundle(context), 50)

    def persist_us(self) -> float:
        """To a file, by plumpy's own persister. It leaves to chance when the disk gets it."""
        process = Inputs(loop=self._loop)
        with tempfile.TemporaryDirectory(prefix="prunus-bench-") as folder:
            persister = plumpy.PicklePersister(folder)
            return per_call_us(lambda: persister.save_checkpoint(process), 200)

    def _run_us(self, make: Callable[[], Any], calls: int) -> float:
        async def run() -> None:
            for _ in range(calls):
                await make().step_until_terminated()

        return per_call_us(lambda: self._loop.run_until_complete(run()), 1) / calls


def dump_yaml(bundle: Any) -> str:
    text: str = yaml.dump(bundle)
    return text


def load_yaml(text: str) -> Any:
    return yaml.load(text, yaml.UnsafeLoader)


dump_pickle, load_pickle = pickle.dumps, pickle.loads


def kiwipy_rpc_us() -> float:
    """A question to a subscriber of the same kiwipy `LocalCommunicator`."""
    communicator = kiwipy.LocalCommunicator()
    communicator.add_rpc_subscriber(lambda _, body: body, "echo")

    def ask() -> None:
        answer = communicator.rpc_send("echo", b"hello")
        while isinstance(answer, Future):
            answer = answer.result()

    return per_call_us(ask, 2000)
