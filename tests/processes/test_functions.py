"""Processes of one function, and what is done once in them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from prunus import process
from prunus.errors import InvalidInputError, InvalidStateError, SpecError
from prunus.persistence.checkpoint import decode_checkpoint
from prunus.processes import (
    Continue,
    Process,
    ProcessResult,
    ProcessState,
    RetryPolicy,
    Wait,
    class_id,
    execute,
    load_class,
    sleep,
    step,
)
from prunus.processes.waits import OnTime
from tests.processes.bench import Bench, checkpoint_of, reloaded

CALLS: list[str] = []
"""What was done, in the world outside."""


@pytest.fixture(autouse=True)
def _nothing_is_done() -> None:
    CALLS.clear()


def build(element: str, scale: float) -> str:
    CALLS.append("build")
    return f"{element}*{scale}"


async def measure(cell: str) -> int:
    CALLS.append("measure")
    await asyncio.sleep(0)
    return len(cell)


@process
async def relax(self: Process, element: str, scale: float = 1.0) -> int:
    """Builds and measures."""
    cell = await self.do("cell", build, element, scale)
    return int(await self.do("size", measure, cell))


@dataclass(frozen=True)
class Sizes:
    size: int
    unit: str = "A"


@process
def plain(self: Process, size: int) -> Sizes:
    return Sizes(size)


@process
async def untyped(self, anything, other=None):  # type: ignore[no-untyped-def]
    return [anything, other]


# --- a process of a function ------------------------------------------------------------------------


async def test_a_function_is_a_process_class() -> None:
    """It has its name, module and documentation; its parameters are the inputs, its value is that of the result."""
    assert issubclass(relax, Process)
    assert (relax.__name__, relax.__module__, relax.__doc__) == ("relax", __name__, "Builds and measures.")
    assert load_class(class_id(relax)) is relax
    result = await execute(relax, {"element": "Cu"})
    assert isinstance(result, ProcessResult)
    assert (result.value, result.successful) == (6, True)
    assert (await execute(relax, {"element": "Cu", "scale": 2.25})).value == 7


async def test_its_inputs_are_checked_by_its_annotations() -> None:
    """Missing, unknown and wrong ones are told together; without annotations anything goes."""
    with pytest.raises(InvalidInputError) as caught:
        relax({"scale": "big", "elemnt": "Cu"})
    assert sorted(caught.value.problems) == ["inputs.element", "inputs.elemnt", "inputs.scale"]
    assert (await execute(untyped, {"anything": [1]})).value == [[1], None]


async def test_a_dataclass_that_it_returns_is_its_outputs() -> None:
    """Declared as such, with their types."""
    result = await execute(plain, {"size": 3})
    assert result.outputs == {"size": 3, "unit": "A"}
    assert list(plain.spec().outputs.ports) == ["size", "unit"]


async def test_it_can_be_a_child_a_call_and_mapped_over() -> None:
    """Like any other class."""

    class Parent(Process):
        async def run(self) -> Wait:
            called = await self.call(relax, {"element": "C"})
            self.set_status(str(called.value))
            return Wait.all(child=self.submit(relax, {"element": "Cu"}), then=self.then)

        async def then(self, child: ProcessResult) -> Wait:
            self.set_status(f"{self.status} {child.value}")
            return self.map(plain, range(3), then=self.last)

        async def last(self, results: Any) -> str:
            return f"{self.status} {[result.outputs.size async for result in results]}"

    assert (await Bench(crashes=True).run(Parent())).result().value == "5 6 [0, 1, 2]"


def _no_self() -> Any:
    @process
    async def lost(element: str) -> None: ...


def _nothing() -> Any:
    @process
    async def lost() -> None: ...


def _args() -> Any:
    @process
    async def lost(self: Any, *elements: str) -> None: ...


def _kwargs() -> Any:
    @process
    async def lost(self: Any, **elements: str) -> None: ...


def _by_place() -> Any:
    @process
    async def lost(self: Any, element: str, /) -> None: ...


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (_no_self, "the first parameter of lost is self, the process that runs it"),
        (_nothing, "the first parameter of lost is self, the process that runs it"),
        (_args, r"lost can't take \*elements: .*; each input has a name of its own"),
        (_kwargs, r"lost can't take \*\*elements: .*; each input has a name of its own"),
        (_by_place, r"lost can't take element: .*; each input has a name of its own"),
    ],
)
def test_a_function_that_can_be_no_process_is_refused(wrong: Callable[[], Any], text: str) -> None:
    """Where it is decorated."""
    with pytest.raises(SpecError, match=text):
        wrong()


async def test_the_options_of_a_step_count_for_a_function_too() -> None:
    """``@process`` over ``@step``: the function is the one step of the process."""

    @process
    @step(retry=RetryPolicy(max_attempts=2, jitter=0), timeout=60)
    async def flaky(self: Process) -> str:
        CALLS.append("attempt")
        if len(CALLS) == 1:
            raise OSError("busy")
        return "done"

    assert flaky.steps()["run"].timeout_s == 60
    assert (await Bench(crashes=True).run(flaky())).result().value == "done"
    assert CALLS == ["attempt"] * 2


# --- what is done once ------------------------------------------------------------------------------


async def test_what_is_done_is_kept_at_once() -> None:
    """Before the function goes on, in a checkpoint of its own: the driver is asked for one after each call."""
    bench = Bench()
    await bench.run(relax({"element": "Cu"}))
    kept = [decode_checkpoint(checkpoint).snapshot() for checkpoint in bench.kept]
    assert [snapshot["done"] for snapshot in kept] == [{"cell": "Cu*1.0"}, {"cell": "Cu*1.0", "size": 6}]
    assert {snapshot["state"]["state"] for snapshot in kept} == {"running"}


@pytest.mark.parametrize("crash_after", [0, 1])
async def test_what_was_done_before_a_crash_is_not_done_again(crash_after: int) -> None:
    """The function runs from its beginning, and gets what is known already."""
    bench = Bench()
    await bench.run(relax({"element": "Cu"}, pid="p"))
    survivor = relax.restore(decode_checkpoint(bench.kept[crash_after]).snapshot())
    CALLS.clear()
    survivor = await Bench().run(survivor)
    assert survivor.result().value == 6
    assert ["measure", "build"][: 1 - crash_after] == CALLS


async def test_what_was_done_is_kept_for_the_next_attempt() -> None:
    """A step that is tried again goes on where it was; the next step begins anew."""

    class Twice(Process):
        @step(retry=RetryPolicy(max_attempts=3))
        async def run(self) -> Any:
            number = await self.do("number", self.count)
            if len(CALLS) == 1 and self.status is None:
                self.set_status("failed once")
                raise OSError("busy")
            return number if self.status == "again" else self.once_more()

        def once_more(self) -> Any:
            self.set_status("again")
            return Continue(self.run)

        def count(self) -> int:
            CALLS.append("count")
            return len(CALLS)

    for crashes in (False, True):
        CALLS.clear()
        finished = await Bench(crashes=crashes).run(Twice())
        assert finished.result().value == 2


async def test_one_name_is_one_value_in_one_step() -> None:
    """Whatever function is given the second time; also when both are asked for at once."""
    gate = asyncio.Event()

    async def slow(value: int) -> int:
        CALLS.append("slow")
        await gate.wait()
        return value

    class Asks(Process):
        async def run(self) -> Any:
            both = asyncio.gather(self.do("x", slow, 1), self.do("x", slow, 2))
            await asyncio.sleep(0)
            gate.set()
            return [*await both, await self.do("x", measure, "never called")]

    value = (await execute(Asks)).value
    assert value == [value[0]] * 3
    assert CALLS == ["slow"]


async def test_what_fails_is_not_kept() -> None:
    """The error goes to the function, which may try again."""

    class Tries(Process):
        async def run(self) -> Any:
            with pytest.raises(LookupError):
                await self.do("x", self.give_up)
            return await self.do("x", measure, "12")

        def give_up(self) -> None:
            raise LookupError("no")

    assert (await execute(Tries)).value == 2


async def test_a_plain_function_is_done_in_a_thread() -> None:
    """So it blocks nobody; what it asks of the process is right there."""

    def where() -> tuple[bool, bool]:
        return threading.current_thread() is threading.main_thread(), Process.current() is not None

    class Asks(Process):
        async def run(self) -> Any:
            return await self.do("where", where)

    assert (await execute(Asks)).value == (False, True)


async def test_only_a_step_can_do_something_once() -> None:
    """There is nothing to keep it with in between."""
    with pytest.raises(InvalidStateError, match="in a step to do something once"):
        await relax({"element": "Cu"}).do("x", build, "Cu", 1.0)


async def test_a_value_that_can_not_be_kept_is_an_error_of_the_step() -> None:
    """It is told where it is done, and the process can be saved all the same."""

    class Keeps(Bench):
        async def keep(self) -> None:
            assert self._on_it is not None
            checkpoint_of(self._on_it)

    class Odd(Process):
        on_exception = "pause"

        async def run(self) -> Any:
            return await self.do("x", lambda: object())

    odd = await Keeps().run(Odd())
    assert odd.paused
    assert "done.x holds a value of type object" in (odd.status or "")
    assert reloaded(odd).paused


async def test_a_function_may_return_a_command() -> None:
    """Such as a wait; without a step after it the process finishes."""

    @process
    async def naps(self: Process) -> Wait:
        return Wait(sleep(60))

    napping = naps()
    await napping.step()
    await napping.step()
    assert napping.state is ProcessState.WAITING
    assert isinstance(napping.waits_for[0], OnTime)
    assert (await Bench().run(napping)).result().successful
