"""Process control under chance: many callers, and workers and a broker that come and go at any moment.

One seed is one run (up to the clock): it launches, pauses, plays, kills, resumes and retries from several callers at
once, while workers start, stop, die and are taken for dead and the broker restarts. Then the world is healed, and
nothing may be lost, done twice or left without an answer.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from prunus import errors
from prunus.persistence.persister import TERMINAL_STATES, Event, Query, Record
from prunus.runtime.controller import RECHECK_S, ProcessController, ProcessHandle
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.audit import Auditor
from tests.guarantees.real_daemon import steps_in_order
from tests.runtime.workflows import Wander

FIRST_SEED = int(os.environ.get("PRUNUS_FIRST_SEED", "0"))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("PRUNUS_SEEDS", "40")))
"""``PRUNUS_FIRST_SEED=1000 PRUNUS_SEEDS=500`` looks further."""
DEEDS = 50
MAX_WORKERS = 3
LONGEST_NAP = 30
"""Turns of the event loop between two deeds."""
BOUND_S = RECHECK_S - 0.5
"""By then everybody has an answer. Who was not told that there is one looks again a little later, and is found out."""


class World:
    """A daemon in which things happen by chance."""

    def __init__(self, seed: int, daemon: LocalDaemon) -> None:
        self.chance = random.Random(seed)
        self.daemon = daemon
        self.controllers: list[ProcessController] = []
        self.workers = ["worker-1", "worker-2"]
        self.pids: list[str] = []
        self.calls: dict[asyncio.Task[object], str] = {}
        self.log: list[str] = []
        self._started = len(self.workers)

    async def live(self) -> None:
        """Many deeds, one after the other begun, none waited for."""
        for _ in range(3):
            self.controllers.append(ProcessController(await self.daemon.broker.connect(name="caller")))
        deeds = [self.launch] * 6 + [self.control] * 14 + [self.control_all, self.relaunch, self.retry]
        deeds += [self.start, self.stop, self.kill, self.expire, self.restart]
        for _ in range(DEEDS):
            self.chance.choice(deeds)()
            for _ in range(self.chance.randint(0, LONGEST_NAP)):
                await asyncio.sleep(0)

    # --- deeds --------------------------------------------------------------------------------------

    def call(self, name: str, coroutine: Coroutine[Any, Any, object]) -> None:
        self.log.append(name)
        self.calls[asyncio.create_task(coroutine)] = name

    def controller(self) -> ProcessController:
        return self.chance.choice(self.controllers)

    def handle(self) -> ProcessHandle:
        return self.controller().handle(self.chance.choice(self.pids))

    def launch(self) -> None:
        self.pids.append(f"p{len(self.pids) + 1}")
        self._launch(self.pids[-1])

    def relaunch(self) -> None:
        if self.pids:
            self._launch(self.chance.choice(self.pids))

    def _launch(self, pid: str) -> None:
        inputs = {"seed": self.chance.getrandbits(30), "steps": self.chance.randint(1, 8)}
        self.call(f"launch {pid}", self.controller().launch(Wander, inputs, pid=pid))

    def control(self) -> None:
        if self.pids:
            handle = self.handle()
            name = self.chance.choice(("pause", "play", "play", "kill", "resume"))
            self.call(f"{name} {handle.pid}", getattr(handle, name)())

    def retry(self) -> None:
        if self.pids:
            handle = self.handle()
            self.call(f"retry {handle.pid}", handle.retry())

    def control_all(self) -> None:
        name = self.chance.choice(("pause_all", "play_all"))
        self.call(name, getattr(self.controller(), name)())

    def start(self) -> None:
        if len(self.workers) < MAX_WORKERS:
            self._started += 1
            self.workers.append(f"worker-{self._started}")
            self.call(f"start {self.workers[-1]}", self.daemon.start_worker(self.workers[-1]))

    def stop(self) -> None:
        if name := self._a_running_worker():
            self.call(f"stop {name}", self.daemon.stop_worker(name))

    def kill(self) -> None:
        if name := self._a_running_worker():
            self.call(f"kill -9 {name}", self.daemon.kill_worker(name))

    def expire(self) -> None:
        sessions = [name for name in self.daemon.broker.exchange.sessions() if name.startswith("worker")]
        if sessions:
            session = self.chance.choice(sorted(sessions, key=lambda name: name.split("-")[1]))
            self.log.append(f"expire {session[:8]}")
            self.daemon.broker.expire(session)

    def restart(self) -> None:
        self.log.append("restart the broker")
        self.daemon.broker.restart()

    def _a_running_worker(self) -> str | None:
        running = [name for name in self.workers if name in self.daemon._workers]
        if not running:
            return None
        name = self.chance.choice(running)
        self.workers.remove(name)
        return name

    # --- the end ------------------------------------------------------------------------------------

    async def heal(self) -> list[str]:
        """Workers, then answers to all kills, then everything plays to its end. What is wrong then."""
        while len(self.workers) < 2:
            self.start()
        # Whoever waits for the end of a step (a pause does) waits for as long as the step lasts. All others do not.
        prompt = [task for task, name in self.calls.items() if name.split()[0] not in ("pause", "pause_all", "stop")]
        await asyncio.wait(prompt, timeout=BOUND_S)
        late = [self.calls[task] for task in prompt if not task.done()]
        Wander.gate.set()
        await asyncio.wait(self.calls, timeout=BOUND_S)
        late += [name for task, name in self.calls.items() if not task.done()]
        for task in self.calls:
            task.cancel()
        answers = await asyncio.gather(*self.calls, return_exceptions=True)
        wrong = [f"no answer: {name}" for name in dict.fromkeys(late)]
        wrong += [
            f"{name}: {answer!r}"
            for name, answer in zip(self.calls.values(), answers, strict=True)
            if isinstance(answer, BaseException)
            and not isinstance(answer, errors.InvalidStateError | asyncio.CancelledError)
            and not (isinstance(answer, errors.CheckpointNotFoundError) and not name.startswith("launch"))
        ]
        return wrong or await self._play_to_the_end()

    async def _play_to_the_end(self) -> list[str]:
        controller = self.controllers[0]
        try:
            async with asyncio.timeout(BOUND_S), controller.events() as events:
                while rows := await controller.find(Query(unfinished=True, limit=1000)):
                    await controller.play_all()
                    for row in rows:
                        if row.state == "waiting" and not row.waits and row.owner is None:
                            try:
                                await controller.handle(row.pid).resume()
                            except errors.InvalidStateError:
                                continue
                    await asyncio.wait([asyncio.ensure_future(anext(events))], timeout=0.05)
                while tasks := (await controller.broker_statistics())["pending"]:
                    await asyncio.sleep(0.01)  # a task that was rejected is looked at a little later
        except TimeoutError:
            return [f"does not end: {describe(row)}" for row in rows] or [f"tasks are left: {tasks}"]
        return []

    async def close(self) -> None:
        for controller in self.controllers:
            await controller.close()


def describe(row: Record) -> str:
    return f"{row.pid} {row.state} {row.play} step={row.step} owner={row.owner} waits={row.waits} aside={row.aside}"


def broken_links(history: Sequence[Event]) -> list[str]:
    """Transitions that do not begin where the one before them ended, and any after the end."""
    wrong: list[str] = []
    state, play = "created", "playing"
    for event in history:
        source, dot, target = event.subject.partition(".")
        if event.subject == "revived":
            state, play = "any", "any"
        elif dot and source in ("playing", "pausing", "paused"):
            if play not in (source, "any"):
                wrong.append(f"{event.subject} after {play}")
            play = target
        elif dot:
            if state not in (source, "any"):
                wrong.append(f"{event.subject} after {state}")
            state = target
    if state not in TERMINAL_STATES:
        wrong.append(f"the history ends with {state}")
    return wrong


@pytest.mark.parametrize("seed", SEEDS)
async def test_whatever_happens_everything_is_accounted_for(seed: int) -> None:
    """All processes end, each with a history without a gap; every call is answered; no commit is out of order."""
    Wander.journal.clear()
    Wander.gate = asyncio.Event()
    async with LocalDaemon(workers=2, slots=1 + seed % 4, grace_s=0.02) as daemon:
        auditor = Auditor(daemon.connection)
        daemon.broker._failpoint = daemon.broker.exchange.failpoint = auditor
        world = World(seed, daemon)
        await world.live()
        wrong = await world.heal()
        persister = world.controllers[0]._backend.persister
        rows = await persister.query(Query(limit=1000))
        for row in rows:
            history = await persister.history(row.pid)
            if not wrong and (links := broken_links(history)):
                wrong.append(f"{describe(row)}: {links} in {[event.subject for event in history]}")
        wrong += [f"{pid} is lost" for pid in set(world.pids) - {row.pid for row in rows}]
        wrong += [] if steps_in_order(Wander.journal) else ["a step that was checkpointed ran again"]
        await world.close()
    assert wrong + auditor.complaints == [], f"seed {seed}:\n" + "\n".join(world.log)
