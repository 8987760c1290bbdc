"""A driver for one process on the table: its time is virtual, and it can lose the process after each step.

A `Bench` does what a worker does, in the same order: a step, then the checkpoint, then all the rest. With ``crashes``
the process that goes on is always the one that was read back from its checkpoint, by the real codec; the object that
took the step is thrown away. Time stands still. When there is nothing else to do it is, for once, the next moment that
the process waits for, so a test of an hour takes no time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeVar

from prunus.persistence.checkpoint import decode_checkpoint, encode_checkpoint
from prunus.processes import Line, Mail, Outcomes, Process, ProcessResult, Reply, Transition

P = TypeVar("P", bound=Process)


def checkpoint_of(process: Process) -> bytes:
    """The process as bytes."""
    return encode_checkpoint(process.snapshot(), class_id=process.class_id, class_version=process.version)


def reloaded(process: P, as_class: type[P] | None = None) -> P:
    """The process as the next worker finds it; `as_class` is its class, which may have changed meanwhile."""
    return (as_class or type(process)).restore(decode_checkpoint(checkpoint_of(process)).snapshot())


class Bench:
    """See the module. Children are run to their ends one after the other, in the order of their submission."""

    def __init__(self, *, crashes: bool = False) -> None:
        self.crashes = crashes
        self.now_s = time.time()
        self.ended: dict[str, ProcessResult] = {}
        self.children: list[Process] = []
        """Those that have not begun."""
        self.most_children = 0
        """How many children were unfinished at the same time, at most."""
        self.mail: list[Mail] = []
        self.history: list[Transition] = []
        self.lines: list[Line] = []
        self.replies: list[Reply] = []
        self.kept: list[bytes] = []
        """Checkpoints that were written in the middle of steps."""
        self._moment_s = 0.0
        self._letters = 0
        self._on_it: Process | None = None

    async def run(self, process: P) -> P:
        """Until it has ended, or nothing but somebody else can make it go on; returns the object that is left."""
        self.take(process)
        while not process.has_terminated() and await self.turn(process):
            if self.crashes:
                process = reloaded(process)
        return process

    async def turn(self, process: Process) -> bool:
        """One step, or whatever else makes the process go on; False if there is nothing."""
        process.driver, self._on_it = self, process
        revision = process.revision
        if process.can_step:
            self.history += await process.step()
        elif not process.paused:
            moment_s = max(self.now_s, self._moment_s)
            self.history += process.settle(Outcomes(moment_s, dict(self.ended), list(self.mail)))
        if process.revision == revision:
            return await self._time_goes_by(process)
        self._moment_s = 0.0
        self.take(process)
        return True

    def take(self, process: Process) -> None:
        """What the process wants to become true."""
        effects = process.take_effects()
        self.children += effects.children
        self.most_children = max(self.most_children, len(self.children))
        self.lines += effects.lines
        self.replies += effects.replies
        self.mail = [mail for mail in self.mail if mail.seq not in effects.used_mail]

    async def _time_goes_by(self, process: Process) -> bool:
        if process.paused:
            return False
        if self.children:
            child = self.children[0]
            bench = Bench(crashes=self.crashes)
            self.ended[child.pid] = (await bench.run(child)).result()
            self.children.remove(child)
            return True
        at_s = process.wakes(max(self.now_s, self._moment_s)).at_s
        self._moment_s = at_s or 0.0
        return at_s is not None

    # --- for the process ----------------------------------------------------------------------------

    def changed(self) -> None:
        """It is looked at in any case."""

    def said(self) -> None:
        """Lines are taken after the step."""

    def deliver(self, name: str, value: Any) -> None:
        self._letters += 1
        self.mail.append(Mail(self._letters, name, value))

    async def keep(self) -> None:
        assert self._on_it is not None
        self.kept.append(checkpoint_of(self._on_it))

    async def results(self, pids: Sequence[str]) -> list[ProcessResult]:
        return [self.ended[pid] for pid in pids]
