"""Fan out over many items with a bound: the bound, the order, the errors, restarts, and what it costs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import InvalidStateError, ProcessExceptedError
from prunus.processes import (
    MapResults,
    Outcomes,
    Process,
    ProcessResult,
    ProcessState,
    Stop,
    Wait,
    WorkChain,
    execute,
)
from prunus.processes.fanout import FanOut
from tests.processes.bench import Bench, checkpoint_of, reloaded


@dataclass(frozen=True)
class Cell:
    """A value with fields, as an input."""

    a: float
    name: str = "cell"


class Square(Process):
    """One integer."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("x", valid_type=int)

    async def run(self) -> Any:
        x = self.inputs.x
        if x < 0:
            raise ValueError(f"negative: {x}")
        return Stop(x * x, exit_status=0 if x < 1000 else 3)


class Measure(Process):
    """One value with fields."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("cell", valid_type=Cell)

    async def run(self) -> Any:
        return Stop([type(self.inputs.cell).__name__, self.inputs.cell.a])


class Maps(Process):
    """Maps over what a subclass says, and collects the values."""

    async def run(self) -> Any:
        return self.fan_out()

    def fan_out(self) -> Any:
        return self.map(Square, range(5), max_in_flight=2, then=self.collect)

    def item(self, number: int) -> dict[str, int]:
        return {"x": 10 + number}

    async def collect(self, results: MapResults) -> Stop:
        return Stop([result.value if result.successful else str(result.state) async for result in results])

    def collect_in_thread(self, results: MapResults) -> Stop:
        return Stop([result.value for result in results])

    async def by_name(self, *, squares: MapResults) -> Stop:
        return Stop([len(squares), (await squares.get(2)).value, list(squares.pids)[-1]])


def maps(**methods: Any) -> type[Maps]:
    return type("MapsSo", (Maps,), methods)


# --- how far it is, as data -------------------------------------------------------------------------


@given(count=st.integers(0, 60), bound=st.integers(1, 10), order=st.randoms(use_true_random=False))
def test_every_item_begins_once_and_never_more_than_the_bound(count: int, bound: int, order: Any) -> None:
    """In whatever order the children end; the data stays as small as the bound."""
    fan, begun, running = FanOut("m:C", "p.1", ("range", 0, 1), count, bound, "collect"), [], set[int]()
    while not fan.is_done:
        fan, numbers = fan.more()
        begun += numbers
        running |= set(numbers)
        assert set(fan.in_flight) == running
        assert len(running) <= bound
        assert len(running) == min(bound, count - (len(begun) - len(running)))
        if running:
            ended = order.sample(sorted(running), order.randint(1, len(running)))
            running -= set(ended)
            fan = fan.without([fan.pid(number) for number in ended])
    assert begun == list(range(count))


# --- what can be mapped over ------------------------------------------------------------------------

SOURCES: list[tuple[str, Any, Any]] = [
    ("a range", lambda self: self.map(Square, range(5), max_in_flight=2, then=self.collect), [0, 1, 4, 9, 16]),
    ("a range with a step", lambda self: self.map(Square, range(7, 0, -3), then=self.collect), [49, 16, 1]),
    ("a list", lambda self: self.map(Square, [{"x": 3}, {"x": 1}], max_in_flight=1, then=self.collect), [9, 1]),
    ("a tuple", lambda self: self.map(Square, ({"x": 3},), then=self.collect), [9]),
    ("a method", lambda self: self.map(Square, self.item, count=3, then=self.collect), [100, 121, 144]),
    ("nothing", lambda self: self.map(Square, [], then=self.collect), []),
    (
        "in a thread",
        lambda self: self.map(Square, range(120), then=self.collect_in_thread),
        [n * n for n in range(120)],
    ),
    (
        "values with fields",
        lambda self: self.map(Measure, [{"cell": Cell(1.0)}, {"cell": Cell(2.0)}], max_in_flight=1, then=self.collect),
        [["Cell", 1.0], ["Cell", 2.0]],
    ),
    ("by name", lambda self: self.map(Square, range(4), then=self.by_name, name="squares"), [4, 4, "p.1.3"]),
    ("failures", lambda self: self.map(Square, range(-1, 2), then=self.collect), ["excepted", 0, 1]),
    ("bad status", lambda self: self.map(Square, [{"x": 1000}], then=self.collect), ["finished"]),
]


@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize(("fan_out", "values"), [case[1:] for case in SOURCES], ids=[case[0] for case in SOURCES])
async def test_the_results_come_in_the_order_of_the_items(fan_out: Any, values: Any, crashes: bool) -> None:
    """Whatever the items come from, and wherever a worker dies; a child that fails is a result like the others."""
    process = await Bench(crashes=crashes).run(maps(fan_out=fan_out)(pid="p"))
    assert process.result().value == values


async def test_values_in_a_list_of_items_keep_their_types_in_the_checkpoint() -> None:
    """What is there before a restart is there after it."""
    process = maps(fan_out=SOURCES[7][1])(pid="p")
    await process.step()
    await process.step()
    assert reloaded(process).snapshot() == process.snapshot()
    assert reloaded(process).waits_for == process.waits_for


@pytest.mark.parametrize("bound", [1, 3, 50])
async def test_no_more_children_than_the_bound_at_a_time(bound: int) -> None:
    """Those that can begin do; one that ends lets the next one begin."""
    kind = maps(fan_out=lambda self: self.map(Square, range(20), max_in_flight=bound, then=self.collect))
    bench = Bench()
    await bench.run(kind())
    assert bench.most_children == min(bound, 20)
    assert len(bench.ended) == 20


async def test_children_of_a_fan_out_run_beside_one_another() -> None:
    """As many as the bound, in `execute` too."""
    running, most = 0, 0

    class Counts(Square):
        async def run(self) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            for _ in range(3):
                await asyncio.sleep(0)
            running -= 1

    kind = maps(fan_out=lambda self: self.map(Counts, range(30), max_in_flight=4))
    await execute(kind)
    assert most == 4


@pytest.mark.parametrize("crashes", [False, True])
async def test_with_on_error_fail_the_first_failure_ends_the_process(crashes: bool) -> None:
    """No further item begins; the error says which child it was and why, and an exit status is a failure too."""
    for items, why in ((range(-2, 50), "ValueError: negative: -2"), (range(1000, 1050), "with exit status 3")):
        kind = maps(
            fan_out=lambda self, items=items: self.map(
                Square, items, max_in_flight=2, on_error="fail", then=self.collect
            )
        )
        bench = Bench(crashes=crashes)
        process = await bench.run(kind(pid="p"))
        failure = process.result().failure
        assert failure is not None
        assert failure.message.startswith("MapsSo.collect maps over items, and process p.1.0 is ")
        assert why in failure.message
        assert len(bench.ended) == 1


@pytest.mark.parametrize("crashes", [False, True])
async def test_a_step_may_fan_out_several_times(crashes: bool) -> None:
    """The children of one are not taken for those of the other."""

    class Twice(Maps):
        def fan_out(self) -> Any:
            return [
                self.map(Square, range(3), then=self.note),
                self.map(Square, range(10, 12), then=self.note),
                self.map(Measure, [{"cell": Cell(5.0)}], then=self.note),
            ]

        async def note(self, results: MapResults) -> None:
            self.set_status(f"{self.status or ''}{[result.value async for result in results]} ")

    bench = Bench(crashes=crashes)
    process = await bench.run(Twice(pid="p"))
    assert process.status == "[0, 1, 4] [100, 121] [['Cell', 5.0]] "
    assert len(bench.ended) == 6


@pytest.mark.parametrize("crashes", [False, True])
async def test_an_outline_has_the_results_in_its_context(crashes: bool) -> None:
    """By the name of the fan-out; they are read in any later step."""

    class Chain(WorkChain):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.outline(cls.scan, cls.between, cls.add)

        async def scan(self) -> Wait:
            return self.map(Square, self.scale, count=3, name="squares")

        def scale(self, number: int) -> dict[str, int]:
            return {"x": number + 1}

        async def between(self) -> None: ...

        async def add(self) -> Stop:
            return Stop(sum([result.value async for result in self.ctx.squares]))

    assert (await Bench(crashes=crashes).run(Chain())).result().value == 14


# --- what it costs ----------------------------------------------------------------------------------


async def test_a_million_items_are_neither_in_the_checkpoint_nor_in_memory() -> None:
    """The checkpoint is as long at the beginning as far into it, and as for a hundred items; few children are made."""

    def million(count: int) -> Maps:
        return maps(fan_out=lambda self: self.map(Square, self.item, count=count, max_in_flight=10))(pid="p")

    process, small = million(1_000_000), million(100)
    for each in (process, small):
        await each.step()
        await each.step()
    lengths = {len(checkpoint_of(small)), len(checkpoint_of(process))}
    for _ in range(100):
        children = process.take_effects().children
        assert len(children) == 10
        process.settle(
            Outcomes(0.0, {child.pid: ProcessResult(child.pid, ProcessState.FINISHED) for child in children})
        )
        lengths.add(len(checkpoint_of(process)))
    assert max(lengths) - min(lengths) < 100


async def test_a_list_of_many_items_is_refused() -> None:
    """With what to do instead."""
    process = await Bench().run(maps(fan_out=lambda self: self.map(Square, [{"x": 1}] * 10_001))())
    assert process.result().failure.message == (
        "map over a list of 10001 items: more than 10000 do not belong into a checkpoint; give a method that returns "
        "one by its number, and count="
    )


# --- wrong uses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fan_out", "text"),
    [
        (lambda self: self.map(Square, 5), "map over 5: give a list, a range, or a method of MapsSo"),
        (lambda self: self.map(Square, iter([1])), "give a list, a range, or a method of MapsSo"),
        (lambda self: self.map(Square, lambda number: {}, count=1), "give a list, a range, or a method of MapsSo"),
        (lambda self: self.map(Square, self.item), "map over the method item: say count=, how many items there are"),
        (lambda self: self.map(Square, range(3), max_in_flight=0), "at least one child must run at a time"),
        (lambda self: self.map(Square, range(3), on_error="skip"), "on_error is one of 'collect', 'fail', not 'skip'"),
        (lambda self: self.map(Square, [{"y": 1}]), "Square does not accept these values:\n  inputs.x: "),
        (lambda self: self.map(Maps, range(3)), "map over a range: Maps has no input to give its numbers to"),
        (lambda self: self.map(Square, range(3), then="nowhere"), "has no step 'nowhere'"),
        (lambda self: Wait.all(self.map(Square, range(3)).on), "a fan-out can't be a part of another wait"),
        (lambda self: Wait([self.map(Square, range(3)).on]), "a fan-out can't be a part of another wait"),
    ],
)
async def test_a_fan_out_that_makes_no_sense_is_an_error_of_the_step(fan_out: Any, text: str) -> None:
    """It says what was given and what was expected; no child has begun."""
    bench = Bench()
    process = await bench.run(maps(fan_out=fan_out)())
    failure = process.result().failure
    assert failure is not None
    assert text in failure.message
    assert not bench.ended


@pytest.mark.parametrize("crashes", [False, True])
async def test_a_method_that_fails_later_ends_the_process(crashes: bool) -> None:
    """When its item would begin: the error is the method's."""

    def item(self: Any, number: int) -> Any:
        if number == 3:
            raise LookupError("there is no item 3")
        return {"x": number}

    kind = maps(
        item=item, fan_out=lambda self: self.map(Square, self.item, count=9, max_in_flight=2, then=self.collect)
    )
    process = await Bench(crashes=crashes).run(kind())
    failure = process.result().failure
    assert failure is not None
    assert (process.state, failure.type, failure.message) == (
        ProcessState.EXCEPTED,
        "LookupError",
        "there is no item 3",
    )


async def test_results_are_read_in_a_step_only() -> None:
    """Outside there is no driver to read them."""
    results = MapResults("p.1", 2)
    with pytest.raises(InvalidStateError, match="in a step to read the results of its fan-out"):
        next(iter(results))
    with pytest.raises(InvalidStateError, match="in a step to read the results of its fan-out"):
        await results.get(0)
    with pytest.raises(IndexError, match="there are results 0 to 1, not 2"):
        await results.get(2)


async def test_an_async_step_reads_them_with_async_for() -> None:
    """A plain loop would block the event loop that is to read them: the error says what to write."""

    class Blocks(Maps):
        async def collect(self, results: MapResults) -> Stop:
            return Stop([result.value for result in results])

    with pytest.raises(ProcessExceptedError, match=r"this would block the event loop .* write `await`"):
        await execute(Blocks)
