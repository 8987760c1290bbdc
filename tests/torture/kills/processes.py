"""Work chains on real workers with real checkpoints, while broker and workers are killed.

Every chain appends a line to a journal in each of its steps. Whoever dies: each chain finishes with all of its steps,
in their order, and once a step has begun no earlier one begins again (its checkpoint was confirmed). In the history of
each, who wrote under one claim never writes again after somebody else has claimed it.

A worker that is stopped (SIGSTOP) may be about to begin a step in that moment, and does so when it goes on, whoever has
the process by then: it can't know. This one step is all that it may do: what comes of it is refused.
"""

from __future__ import annotations

import asyncio
import bisect
import os
import random
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prunus.errors import PrunusError
from prunus.persistence.persister import Event, Query
from prunus.runtime.controller import ProcessController, ProcessHandle, connect
from prunus.runtime.profile import Config, Profile
from tests.runtime import workflows
from tests.torture.batch import PROJECT, Batch
from tests.torture.kills.zygote import Zygote

BROKER, WORKERS = "broker", ("worker-1", "worker-2")
LEASE_S = 3.0
"""More than the heartbeat of a client (2 s)."""
STEPS, PACE_S = 20, 0.01
MAX_PAUSE_S = 0.3
FINISH_S = 60.0
"""So soon after the last strike every chain has finished."""
STOPS_EVERY = 10
"""In one of so many cycles a worker is stopped beyond its lease, instead of a kill."""


class ProcessRig:
    """One run in `folder`."""

    def __init__(self, folder: Path, zygote: Zygote, seed: int) -> None:
        self._choice = random.Random(seed)
        self._zygote = zygote
        self._folder = folder
        self._profile = Profile.create(
            folder / "p", Config(workers=0, slots=8, max_crashes=0, import_from=[str(PROJECT)])
        )
        self._journal = folder / "journal"
        self._pids: dict[str, int] = {}
        self._resumed: list[int] = []
        """How many lines the journal had each time that a stopped worker went on."""
        self.counts: dict[str, int] = {}

    async def run(self, cycles: int) -> Batch:
        """So many strikes, with a new chain or two before each, the end, and the judgement."""
        for name in (BROKER, *WORKERS):
            self._start(name)
        done, failures = 0, []
        try:
            async with connect(self._profile) as controller:
                handles = []
                for done in range(1, cycles + 1):
                    handles += [await self._launch(controller) for _ in range(self._choice.randint(1, 2))]
                    await self._strike(done)
                failures = await self._judge(controller, handles)
        except PrunusError as error:
            failures = [f"{error!r}; the services said: {self._last_words()}"]
        except TimeoutError:
            failures = [f"not all had finished {FINISH_S:g} s after the last strike: {self._last_words()}"]
        finally:
            for pid in self._pids.values():
                if self._zygote.poll(pid) is None:
                    os.kill(pid, signal.SIGKILL)
                    self._zygote.wait(pid)
        return Batch.of(done, failures, self.counts)

    async def _launch(self, controller: ProcessController) -> ProcessHandle:
        inputs = {"file": str(self._journal), "steps": STEPS, "pace_s": PACE_S}
        handle: ProcessHandle = await controller.launch(workflows.Journal, inputs)
        return handle

    async def _strike(self, cycle: int) -> None:
        await asyncio.sleep(self._choice.uniform(0, MAX_PAUSE_S))
        if cycle % STOPS_EVERY == 0:
            name = self._choice.choice(WORKERS)
            os.kill(self._pids[name], signal.SIGSTOP)
            await asyncio.sleep(LEASE_S + 1.5)
            self._resumed.append(len(self._lines()))
            os.kill(self._pids[name], signal.SIGCONT)
            self._count("worker stopped")
            return
        victims = self._choice.choice([(BROKER,), ("worker-1",), ("worker-2",), (BROKER, "worker-1"), WORKERS])
        for name in victims:
            pid = self._pids.pop(name)
            os.kill(pid, signal.SIGKILL)
            self._zygote.wait(pid)
            self._count(f"{name.partition('-')[0]} killed")
        for name in victims:
            self._start(name)

    async def _judge(self, controller: ProcessController, handles: Sequence[ProcessHandle]) -> list[str]:
        async with asyncio.timeout(FINISH_S):
            results = [await handle.result() for handle in handles]
        failures = [f"{one.pid} ended as {one.state}" for one in results if one.outputs.get("written") != STEPS]
        lines = self._lines()
        if len(set(lines)) != STEPS * len(handles):
            failures.append(f"{len(set(lines))} different steps ran, not {STEPS * len(handles)}")
        if late := begun_late(lines, self._resumed):
            failures.append(f"steps ran again whose checkpoints were confirmed: {', '.join(late)}")
        for handle in handles:
            if writers := returned(await handle.history()):
                failures.append(f"{handle.pid}: wrote after somebody else had claimed it: {', '.join(writers)}")
        unfinished = await controller.find(Query(unfinished=True))
        failures += [f"never finished: {record.pid} is {record.state}" for record in unfinished]
        self._count("chains finished", len(results))
        self._count("steps that ran twice", len(lines) - len(set(lines)))
        return failures

    def _lines(self) -> list[str]:
        return self._journal.read_text().splitlines() if self._journal.exists() else []

    def _start(self, name: str) -> None:
        arguments = ["--profile", str(self._profile.path)]
        role, more = (BROKER, ["--lease", str(LEASE_S)]) if name == BROKER else ("process worker", ["--name", name])
        self._pids[name] = self._zygote.start(role, *arguments, *more, log=self._folder / f"{name}.log")

    def _last_words(self) -> str:
        ends = [log.read_text(errors="replace").splitlines()[-3:] for log in sorted(self._folder.glob("*.log"))]
        return " | ".join(line for end in ends for line in end)

    def _count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number


def begun_late(lines: Sequence[str], resumed: Sequence[int]) -> list[str]:
    """The steps (``PID:NUMBER``) that began again after a later one had, but for one of each process each time that a
    stopped worker went on; `resumed` says at which lines that was."""
    last: dict[str, int] = {}
    spared: dict[str, int] = {}
    late = []
    for at, line in enumerate(lines):
        pid, _, number = line.rpartition(":")
        if int(number) >= last.get(pid, 0):
            last[pid] = int(number)
        elif spared.get(pid, 0) < (times := bisect.bisect_right(resumed, at)):
            spared[pid] = times
        else:
            late.append(line)
    return late


def returned(history: Sequence[Event]) -> list[str]:
    """Who wrote again after another worker had written, without having claimed the process anew."""
    order: list[str] = []
    guilty = []
    for event in history:
        if event.by is None or (order and order[-1] == event.by):
            continue
        if event.by in order and event.subject != "claimed":
            guilty.append(event.by)
        order.append(event.by)
    return guilty


def run(seed: int, size: int) -> Batch:
    """`size` cycles in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="pr-") as folder, Zygote() as zygote:
        return asyncio.run(ProcessRig(Path(folder), zygote, seed).run(size))
