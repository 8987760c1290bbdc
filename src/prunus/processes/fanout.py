"""Fan out over many items with a bound: one child an item, at most so many at a time.

`Process.map` gives a wait on a `FanOut`. Its items are not kept but asked for one by one: from a ``range``, a short
list, or a method of the process that is given the number of the item. A child's pid follows from its parent, the step
and the number, so neither the checkpoint nor the memory grows with the number of items, and a step that runs again
finds the children that it had. The results are read when they are asked for: `MapResults`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from prunus.errors import InvalidStateError
from prunus.processes import loading, stack

if TYPE_CHECKING:
    from prunus.processes.machine import Machine
    from prunus.processes.process import Process
    from prunus.processes.result import ProcessResult

MAX_LISTED_ITEMS = 10_000
"""A longer list does not belong into a checkpoint: give a method instead."""
DEFAULT_IN_FLIGHT = 50
PAGE = 50
"""How many results are read at a time."""


@dataclass(frozen=True, slots=True)
class FanOut:
    """How far a fan-out is."""

    class_id: str
    prefix: str
    """The pids are ``<prefix>.<number>``."""
    source: tuple[Any, ...]
    """``("range", start, step)``, ``("items", list)`` or ``("method", name)``."""
    count: int
    max_in_flight: int
    on_error: Literal["collect", "fail"]
    next: int = 0
    """The number of the next item."""
    in_flight: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """What is said of each child beside its inputs: its queue, its tags ..."""

    def pid(self, number: int) -> str:
        return f"{self.prefix}.{number}"

    @property
    def pids(self) -> tuple[str, ...]:
        """Of the children that have not ended, as far as is known."""
        return tuple(self.pid(number) for number in self.in_flight)

    @property
    def is_done(self) -> bool:
        return self.next >= self.count and not self.in_flight

    def without(self, ended: Sequence[str]) -> FanOut:
        """These have ended."""
        return replace(self, in_flight=tuple(number for number in self.in_flight if self.pid(number) not in ended))

    def more(self) -> tuple[FanOut, range]:
        """The numbers of the items that may begin now, and the fan-out when they have."""
        begin = range(self.next, min(self.count, self.next + self.max_in_flight - len(self.in_flight)))
        return replace(self, next=self.next + len(begin), in_flight=(*self.in_flight, *begin)), begin


def source_of(process: Machine, items: Any, count: int | None) -> tuple[tuple[Any, ...], int]:
    """`FanOut.source` for what `Process.map` was given, and how many items that are."""
    if isinstance(items, range):
        return ("range", items.start, items.step), len(items)
    if isinstance(items, (list, tuple)):
        if len(items) > MAX_LISTED_ITEMS:
            raise ValueError(
                f"map over a list of {len(items)} items: more than {MAX_LISTED_ITEMS} do not belong into a checkpoint; "
                "give a method that returns one by its number, and count="
            )
        return ("items", list(items)), len(items)
    name = getattr(items, "__name__", None)
    if not callable(items) or not isinstance(name, str) or not callable(getattr(process, name, None)):
        raise TypeError(f"map over {items!r}: give a list, a range, or a method of {type(process).__qualname__}")
    if count is None:
        raise TypeError(f"map over the method {name}: say count=, how many items there are")
    return ("method", name), count


def children_of(process: Machine, fan: FanOut, numbers: range) -> list[Process]:
    """The children of `process` for the items of these numbers. Raises what the user's method raises."""
    if not numbers:
        return []
    process_class = process._mapped.get(fan.class_id) or loading.load_class(fan.class_id)
    only_port = next(iter(process_class.spec().inputs.ports), None)
    children = []
    for number in numbers:
        match fan.source:
            case ("range", start, step):
                inputs: Any = {only_port: start + number * step}
            case ("items", listed):
                inputs = listed[number]
            case ("method", name):
                inputs = getattr(process, name)(number)
            case _:
                raise ValueError(f"no source of items: {fan.source!r}")
        children.append(process._make_child(process_class, inputs, fan.pid(number), fan.options))
    return children


@dataclass(frozen=True)
class MapResults:
    """The results of a fan-out in the order of its items, read as they are asked for.

    ``async for result in results`` in an ``async def`` step, ``for result in results`` in a plain one;
    ``await results.get(3)`` reads one. Only inside a step of a process of the same family.
    """

    prefix: str
    count: int

    def __len__(self) -> int:
        return self.count

    @property
    def pids(self) -> Iterator[str]:
        return (f"{self.prefix}.{number}" for number in range(self.count))

    async def get(self, number: int) -> ProcessResult:
        """One result by the number of its item. Raises `IndexError`."""
        if not 0 <= number < self.count:
            raise IndexError(f"there are results 0 to {self.count - 1}, not {number}")
        [result] = await self._read(range(number, number + 1))
        return result

    async def __aiter__(self) -> AsyncIterator[ProcessResult]:
        for begin in range(0, self.count, PAGE):
            for result in await self._read(range(begin, min(begin + PAGE, self.count))):
                yield result

    def __iter__(self) -> Iterator[ProcessResult]:
        process = stack.top()
        for begin in range(0, self.count, PAGE):
            if process is None:
                raise InvalidStateError("outside of any step", "in a step to read the results of its fan-out")
            yield from process._from_thread(self._read(range(begin, min(begin + PAGE, self.count))))

    async def _read(self, numbers: range) -> list[ProcessResult]:
        process = stack.top()
        if process is None or process.driver is None:
            raise InvalidStateError("outside of any step", "in a step to read the results of its fan-out")
        return await process.driver.results([f"{self.prefix}.{number}" for number in numbers])
