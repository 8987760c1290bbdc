"""Virtual time: one heap of events for the whole world. Time jumps to the next event; nothing ever waits.

Every event belongs to a node, or to the world itself. The events of a node that is stopped (SIGSTOP) are kept, in
their order, until it goes on; those of a dead node are dropped. A node reads the time from its own clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WALL_EPOCH_S = 1_800_000_000.0
"""The wall-clock time (seconds since 1970) at which every world begins."""


@dataclass(slots=True)
class Clock:
    """What a node sees of time: a clock that runs since the boot of its machine, also while that is suspended, with its
    own origin and rate; and a wall clock that may be wrong."""

    origin_s: float = 1000.0
    rate: float = 1.0
    wall_error_s: float = 0.0

    def boottime(self, now: float) -> float:
        return self.origin_s + self.rate * now

    def wall(self, now: float) -> float:
        return WALL_EPOCH_S + now + self.wall_error_s

    def world_time(self, boottime: float) -> float:
        """The inverse of `boottime`."""
        return (boottime - self.origin_s) / self.rate


class Node:
    """A program in the world."""

    def __init__(self, name: str, clock: Clock) -> None:
        self.name, self.clock = name, clock
        self.paused_until = 0.0
        self.dead = False


class Timeline:
    """See the module."""

    def __init__(self) -> None:
        self.now = 0.0
        self.node: Node | None = None
        """Whose event runs now."""
        self._heap: list[tuple[float, int, Node | None, Callable[..., object], tuple[Any, ...]]] = []
        self._number = 0

    def at(self, when: float, node: Node | None, action: Callable[..., object], *arguments: Any) -> None:
        """Call `action` at `when` (at once, if that is past), after all that was put there before."""
        self._number += 1
        heapq.heappush(self._heap, (max(when, self.now), self._number, node, action, arguments))

    def step(self) -> bool:
        """Run the next event; False if there is none."""
        if not self._heap:
            return False
        when, number, node, action, arguments = heapq.heappop(self._heap)
        if node is not None:
            if node.dead:
                return True
            if node.paused_until > when:
                heapq.heappush(self._heap, (node.paused_until, number, node, action, arguments))
                return True
        self.now, self.node = when, node
        action(*arguments)
        self.node = None
        return True

    def run(self, until: float, done: Callable[[], bool] = lambda: False) -> None:
        """Everything up to `until`, or until `done`."""
        while not done() and self._heap and self._heap[0][0] <= until:
            self.step()
        if not done():
            self.now = max(self.now, until)

    def wall_time(self) -> float:
        """``time.time()`` of the program that runs now."""
        return self.node.clock.wall(self.now) if self.node is not None else WALL_EPOCH_S + self.now

    def wall_time_ns(self) -> int:
        """``time.time_ns()`` of the program that runs now."""
        return int(self.wall_time() * 1e9)

    def boottime(self) -> float:
        """``time.monotonic()`` of the program that runs now."""
        return self.node.clock.boottime(self.now) if self.node is not None else self.now
