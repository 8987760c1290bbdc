"""The process world: real communicators, workers, launchers, runners, processes and store; everything may fail.

Callers launch, pause, play, kill, write to and ask processes, while workers, the broker, the network and the disk
fail. After the last fault everything is played to its end, and looked at: no launch that was confirmed is lost, no
process ends twice, no step that was checkpointed runs again, every call is answered, nothing is left in the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import zlib
from asyncio import events as asyncio_events
from collections.abc import Coroutine, Iterable, Iterator
from itertools import pairwise
from typing import Any, ClassVar
from unittest import mock

from prunus import ProcessSpec, Wait, WorkChain, append_, message, sleep, while_
from prunus.errors import (
    CheckpointNotFoundError,
    CommunicatorClosedError,
    IndeterminateError,
    InvalidStateError,
    NotDeliveredError,
    ProcessKilledError,
    RemoteError,
    UnroutableError,
)
from prunus.messaging.peer import PeerCommunicator
from prunus.persistence.checkpoint import decode_data
from prunus.persistence.persister import TERMINAL_STATES, Query
from prunus.persistence.sqlite import ProcessStore, open_database
from prunus.processes import pids
from prunus.processes.states import STATE_TABLE
from prunus.runtime.backend import ProcessService
from prunus.runtime.controller import ProcessController
from prunus.runtime.worker import Worker
from tests.torture.sim.broker_node import BrokerNode
from tests.torture.sim.network import Connection, Network
from tests.torture.sim.timeline import Clock, Node, Timeline
from tests.torture.sim.virtual_loop import VirtualLoop
from tests.torture.sim.world import USUAL, Outcome, Settings, World

DRAIN_S = 400.0
"""By then everything must have ended after the last fault; each process waits some times for some seconds."""
PLAY_INTERVAL_S = 3.0
"""How often what is paused is played in the end."""
DEEDS = (6, 25)
AUDIT_SHARE = 0.3
MAY_ANSWER = (
    InvalidStateError,
    ProcessKilledError,
    IndeterminateError,
    NotDeliveredError,
    CommunicatorClosedError,
    CheckpointNotFoundError,
    RemoteError,
    UnroutableError,
    TimeoutError,
)
"""Errors that a call may end with in a world where everything fails."""
EDGES = frozenset((source.value, target.value) for (source, _), targets in STATE_TABLE.items() for target in targets)
ROWS = "SELECT pid, state, epoch FROM process"
LEFT = {
    "tasks": "SELECT key FROM broker_task",
    "claims": "SELECT pid FROM process WHERE owner IS NOT NULL",
    "set aside": "SELECT pid || ': ' || aside FROM process WHERE aside IS NOT NULL",
    "timers": "SELECT pid FROM process WHERE wake_at IS NOT NULL",
}
"""What must not be in the database when everything has ended."""


class Trip(WorkChain):
    """Each step does one of the things that a step can do; `seed` says which, the same in each attempt."""

    run_sync_steps_in = "loop"
    journal: ClassVar[list[str]] = []
    """The idempotency key of each step that began."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("note", valid_type=str)
        spec.input("seed", valid_type=int)
        spec.input("steps", valid_type=int)
        spec.input("depth", valid_type=int, default=1)
        spec.output("path")
        spec.outline(cls.begin, while_(cls.more)(cls.move), cls.arrive)

    async def begin(self) -> None:
        self.ctx.path = []

    def more(self) -> bool:
        return bool(len(self.ctx.path) < self.inputs.steps)

    async def move(self) -> Wait | None:
        self.journal.append(self.idempotency_key)
        number = len(self.ctx.path) + 1
        self.ctx.path.append(number)
        chance = random.Random(f"{self.inputs.seed} {number}")
        kind = chance.randrange(8)
        if kind < 3:
            await asyncio.sleep(chance.choice((0.0, 0.1, 1.0, 5.0, 25.0)) * chance.random())
        elif kind == 3:
            self.report("on the way")
            self.set_status(f"has made {number} steps")
        elif kind == 4:
            return Wait(sleep(3.0 * chance.random()))
        elif kind == 5:
            return Wait(message("note", timeout=2.0, default=""), then=self.noted)
        elif kind == 6 and self.inputs.depth:
            for child in range(chance.randint(1, 2)):
                inputs = {"seed": self.inputs.seed + number, "steps": 2, "depth": self.inputs.depth - 1}
                # (It is the same child in each attempt of this step.)
                self.to_context(children=append_(self.submit(Trip, inputs, pid=f"{self.pid}.{number}.{child}")))
        return None

    async def noted(self, note: str) -> None:
        self.ctx.noted = note

    async def arrive(self) -> None:
        self.out("path", self.ctx.path)


class SimCommunicator(PeerCommunicator):
    """The real communicator; its frames travel through the simulated network."""

    def __init__(self, network: Network, node: Node, timeline: Timeline) -> None:
        super().__init__("simulated", node.name)
        self.node, self._network, self._timeline = node, network, timeline
        self._frames: list[bytes] = []
        self._is_awake = self._is_dead = False
        self._break: str | None = None
        self._timer = 0
        self._connection = network.open(self)
        self._core.connect(self._now)
        self._wake()

    @property
    def _now(self) -> float:
        return self.node.clock.boottime(self._timeline.now)

    def received(self, connection: Connection, frame: bytes) -> None:
        if connection is self._connection:
            self._frames.append(frame)
            self._wake()

    def broken(self, connection: Connection) -> None:
        if connection is self._connection:
            self._frames.clear()
            self._break = "the connection broke"
            self._wake()

    def die(self) -> None:
        """It says nothing more, to the broker or to anybody."""
        self._network.close(self._connection)
        self._is_dead = True
        self._finish()

    def _wake(self, *, at_once: bool = False) -> bool:
        if self._is_dead:
            return False
        if not self._is_awake:
            self._is_awake = True
            self._timeline.at(self._timeline.now, self.node, self._pump)
        return True

    def _pump(self) -> None:
        if self._is_dead:
            return
        self._is_awake = False
        frames, self._frames = self._frames, []
        broken, self._break = self._break, None
        broken = self._step(self._now, frames) or broken
        if self._finished:
            self._is_dead = True
            self._network.close(self._connection)
            return
        if broken is not None:
            self._network.close(self._connection)
            self._connection = self._network.open(self)
            self._core.connect(self._now)
        for frame in self._core.take():
            self._network.say(self._connection, frame)
        self._timer += 1
        due = max(self.node.clock.world_time(self._due()), self._timeline.now + 0.001)
        self._timeline.at(due, self.node, self._timer_fired, self._timer)

    def _timer_fired(self, timer: int) -> None:
        if timer == self._timer:
            self._wake()


class Program(Node):
    """A worker or a caller: a node with a communicator."""

    def __init__(self, world: ProcessWorld, name: str, clock: Clock) -> None:
        super().__init__(name, clock)
        self.world = world
        self.communicator: SimCommunicator | None = None
        self.worker: Worker | None = None
        self.controller: ProcessController | None = None

    def start_worker(self) -> None:
        self.communicator = SimCommunicator(self.world.network, self, self.world.timeline)
        self.worker = Worker(self.communicator, slots=self.world.chance.randint(1, 4), grace_s=1.0)
        self.world.spawn(self._work())

    def start_caller(self) -> None:
        self.communicator = SimCommunicator(self.world.network, self, self.world.timeline)
        self.controller = ProcessController(self.communicator)

    async def _work(self) -> None:
        assert self.worker is not None
        assert self.communicator is not None
        with contextlib.suppress(CommunicatorClosedError):
            await self.worker.run()
            await self.communicator.close()
        self.world.ended(self)


class ProcessWorld(World):
    """See the module."""

    horizons_s = (10.0, 90.0)
    never = frozenset({"rogue", "meddle"})
    rate_error = 0.05
    wall_error_s = 10.0

    def __init__(self, seed: int, settings: Settings) -> None:
        super().__init__(seed, settings)
        self.disk.connection.deserialize(_empty_database())
        self.loop = VirtualLoop(self.timeline, random.Random(f"{seed} turns"), self._loop_complains)  # type: ignore[abstract]  # no sockets, no processes
        self.store: ProcessStore | None = None
        self.workers: dict[str, Program] = {}
        self.callers: dict[str, Program] = {}
        self.launched: dict[str, asyncio.Task[object]] = {}
        self.calls: dict[asyncio.Task[object], str] = {}
        self._epochs: dict[str, int] = {}
        self._ends: dict[str, str] = {}

    def _everybody(self) -> Iterable[Program]:
        return (*self.workers.values(), *self.callers.values())

    # --- for all who are in it ---

    def spawn(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.loop.create_task(coroutine)

    def ended(self, program: Program) -> None:
        """A worker came to its end by itself; another one comes."""
        if self.workers.get(program.name) is program:
            del self.workers[program.name]
            self._bear_worker(program.name)

    def _loop_complains(self, context: dict[str, Any]) -> None:
        self.complain(f"in the loop: {context.get('message')}: {context.get('exception')!r}")

    def _service(self, node: BrokerNode) -> ProcessService:
        self.store = ProcessStore(self.disk.connection, clock=lambda: node.clock.wall(self.timeline.now))
        return ProcessService(self.store, dict, lambda: node.clock.wall(self.timeline.now))

    # --- the run ---

    def run(self) -> Outcome:
        Trip.journal.clear()
        with _seeded(self.seed), _running(self.loop):
            return super().run()

    def _live(self) -> None:
        profile, timeline, chance = self.profile, self.timeline, self.chance
        self.broker.start()
        for number in range(chance.randint(1, 3)):
            self._bear_worker(f"worker{number}")
        for number in range(chance.randint(1, 2)):
            self._bear_caller(f"caller{number}")
        deeds = sorted(chance.uniform(0.0, profile.heal_at_s * 0.8) for _ in range(chance.randint(*DEEDS)))
        for when in deeds[: self.settings.deeds]:
            timeline.at(when, None, self._deed)
        self._plan_faults()
        timeline.run(profile.heal_at_s)
        self._heal()
        for when in range(int(DRAIN_S / PLAY_INTERVAL_S)):
            timeline.at(timeline.now + when * PLAY_INTERVAL_S, None, self._play_all)
        timeline.run(timeline.now + DRAIN_S, self._is_over)
        if not self._is_over():
            self.complain(
                f"L1: not over {DRAIN_S:g} s after the last fault: {self._unfinished()}; {self._open_calls()}"
            )
            return
        timeline.run(timeline.now + 5.0)
        self._look_at_everything()

    def _leave(self) -> None:
        """Everybody ends, and every task with them."""
        self.network.calm = True
        for program in (*self.workers.values(), *self.callers.values()):
            self._mute(program)
        for task in list(self._all_tasks()):
            task.cancel()
        self.broker.dead = True
        self.timeline.run(self.timeline.now + 60.0, lambda: not self._all_tasks())
        for task in self.calls:
            if task.done() and not task.cancelled():
                task.exception()

    def _all_tasks(self) -> set[asyncio.Task[Any]]:
        return {task for task in asyncio.all_tasks(self.loop) if not task.done()}

    def _bear_worker(self, name: str) -> None:
        if self.workers.get(name) is None:
            self._lives[name] = self._lives.get(name, 0) + 1
            program = self.workers[name] = Program(self, name, self._clock())
            self.timeline.at(self.timeline.now, program, program.start_worker)

    def _bear_caller(self, name: str) -> None:
        program = self.callers[name] = Program(self, name, self._clock())
        self.timeline.at(self.timeline.now, program, program.start_caller)

    # --- deeds ---

    def _deed(self) -> None:
        caller = self.callers[self.chance.choice(sorted(self.callers))]
        deed = self.chance.choice(("launch",) * 4 + ("pause", "play", "send", "send", "ask", "kill"))
        if deed != "launch" and not self.launched:
            return
        pid = f"t{len(self.launched)}" if deed == "launch" else self.chance.choice(sorted(self.launched))
        self.timeline.at(self.timeline.now, caller, self._call, caller, deed, pid)

    def _call(self, caller: Program, deed: str, pid: str) -> None:
        controller = caller.controller
        if controller is None:
            return
        handle = controller.handle(pid)
        self.count(f"deed: {deed}")
        if deed == "launch":
            inputs = {"seed": self.chance.getrandbits(20), "steps": self.chance.randint(1, 6)}
            self.launched[pid] = self._track(f"launch {pid}", controller.launch(Trip, inputs, pid=pid))
        elif deed == "send":
            self._track(f"send {pid}", handle.send("note", f"note {len(self.calls)}"))
        elif deed == "ask":
            self._track(f"result {pid}", handle.result())
        else:
            self._track(f"{deed} {pid}", getattr(handle, deed)())

    def _track(self, name: str, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[object]:
        task = self.spawn(coroutine)
        self.calls[task] = name
        return task

    def _play_all(self) -> None:
        paused = self.disk.connection.execute(
            "SELECT pid FROM process WHERE play <> 'playing' AND state NOT IN ('finished', 'excepted', 'killed')"
        ).fetchall()
        caller = self.callers[min(self.callers)]
        for (pid,) in paused:
            self.timeline.at(self.timeline.now, caller, self._call, caller, "play", pid)

    # --- faults ---

    def _somebody(self) -> Program:
        everybody = {**self.workers, **self.callers}
        return everybody[self.chance.choice(sorted(everybody))]

    def _fault_partition(self) -> None:
        """Mostly of a worker, and often for longer than its lease."""
        until = self.timeline.now + self.chance.choice((2.0, 20.0, 40.0)) * self.chance.uniform(0.5, 1.0)
        up, down = self.chance.choice(((True, True), (True, True), (True, False), (False, True)))
        who = self._a_worker() if self.chance.random() < 0.8 else self._somebody()
        self.network.cut(who.name, min(until, self.profile.heal_at_s), up=up, down=down)

    def _a_worker(self) -> Program:
        return self.workers[self.chance.choice(sorted(self.workers))] if self.workers else self._somebody()

    def _fault_kill_peer(self) -> None:
        """SIGKILL of a worker."""
        if not self.workers:
            return
        program = self.workers.pop(self.chance.choice(sorted(self.workers)))
        session = program.communicator.session if program.communicator is not None else None
        self._mute(program)
        if session is not None and "no_proof" not in self.profile:
            self.broker.died(session)
        self.timeline.at(self.timeline.now + self.chance.uniform(0.0, 2.0), None, self._bear_worker, program.name)

    def _mute(self, program: Program) -> None:
        """It is killed: whatever of it still runs in this process can reach nobody."""
        program.paused_until = 0.0
        mine = [task for task, node in self._owners().items() if node is program]

        def end() -> None:
            if program.communicator is not None:
                program.communicator.die()
            for task in mine:
                task.cancel()

        self.timeline.at(self.timeline.now, program, end)

    def _owners(self) -> dict[asyncio.Task[Any], Node | None]:
        return {task: self.loop.owners.get(task) for task in self._all_tasks()}

    def _fault_leave(self) -> None:
        """A graceful stop of a worker."""
        if self.workers:
            program = self.workers[self.chance.choice(sorted(self.workers))]
            if program.worker is not None:
                self.timeline.at(self.timeline.now, program, program.worker.stop)

    def _fault_pause_peer(self) -> None:
        self._pause(self._a_worker())

    def _fault_sleep(self) -> None:
        wake_at = min(self.timeline.now + self.chance.choice((5.0, 30.0, 3600.0)), self.profile.heal_at_s)
        for node in (*self.workers.values(), *self.callers.values(), self.broker):
            node.paused_until = max(node.paused_until, wake_at)

    def _fault_wall_jump(self) -> None:
        node = self.chance.choice((self.broker, self._somebody()))
        node.clock.wall_error_s = self.chance.uniform(-30.0, 30.0)

    # --- what must hold ---

    def _audit(self, exchange: object, failpoint: str) -> None:
        if failpoint == "after_commit":
            self.checksum = zlib.crc32(repr(self.timeline.now).encode(), self.checksum)
            if self._auditing.random() < AUDIT_SHARE:
                self._look_at_rows()

    def _look_at_rows(self) -> None:
        for pid, state, epoch in self.disk.connection.execute(ROWS).fetchall():
            if epoch < self._epochs.get(pid, 0):
                self.complain(f"I3: the epoch of {pid} went from {self._epochs[pid]} to {epoch}")
            self._epochs[pid] = epoch
            if self._ends.get(pid, state) != state:
                self.complain(f"I5: {pid} was {self._ends[pid]}, and is {state}")
            if state in TERMINAL_STATES:
                self._ends[pid] = state

    def _unfinished(self) -> list[tuple[object, ...]]:
        return (
            self.disk.connection.execute(
                "SELECT pid, state, play, owner, epoch, aside, wake_at FROM process "
                "WHERE state NOT IN ('finished', 'excepted', 'killed')"
            ).fetchall()
            + self.disk.connection.execute("SELECT key, queue, holder FROM broker_task").fetchall()
        )

    def _open_calls(self) -> list[str]:
        return [name for task, name in self.calls.items() if not task.done()]

    def _is_over(self) -> bool:
        return self.broker.exchange is not None and not self._open_calls() and not self._unfinished()

    def _look_at_everything(self) -> None:
        self._look_at_rows()
        for task, name in self.calls.items():
            error = None if task.cancelled() else task.exception()
            if error is not None and not isinstance(error, MAY_ANSWER):
                self.complain(f"{name}: {error!r}")
        assert self.store is not None, "the broker runs"
        rows, _ = self.store.query(Query(limit=1000))
        there = {row.pid: row for row in rows}
        for pid, task in self.launched.items():
            if not task.cancelled() and task.exception() is None and pid not in there:
                self.complain(f"I1: the launch of {pid} was confirmed, and it is lost")
        for what, statement in LEFT.items():
            if left := self.disk.connection.execute(statement).fetchall():
                self.complain(f"L5: {what} are left: {left}")
        for pid, row in there.items():
            self.count(f"processes {row.state}")
            if row.state == "excepted":
                self.complain(f"{pid} excepted: {row.status}")
            elif row.state == "finished" and row.result is not None:
                path = decode_data(row.result)["outputs"]["path"]
                if path != list(range(1, len(path) + 1)):
                    self.complain(f"I4: the steps of {pid} are {path}")
            self._look_at_history(pid)
        self._look_at_journal()

    def _look_at_history(self, pid: str) -> None:
        assert self.store is not None
        history, _ = self.store.history(pid)
        states = [event.subject.split(".") for event in history if event.subject.count(".") == 1]
        states = [pair for pair in states if pair[0] not in ("playing", "pausing", "paused")]
        for before, after in states:
            if (before, after) not in EDGES:
                self.complain(f"I6: {pid} went from {before} to {after}, and nothing leads there")
        for before, after in pairwise(states):
            if before[1] != after[0]:
                self.complain(f"I6: the history of {pid} has a gap: {before} and then {after}")
            if before[1] in TERMINAL_STATES:
                self.complain(f"I5: {pid} goes on after its end: {before} and then {after}")

    def _look_at_journal(self) -> None:
        last: dict[str, int] = {}
        for line in Trip.journal:
            pid, _, number = line.rpartition(":")
            if int(number) < last.get(pid, 0):
                self.complain(f"I4: a step of {pid} that was checkpointed runs again: {number} after {last[pid]}")
            if int(number) == last.get(pid):
                self.history.counts["steps run again"] += 1
            last[pid] = int(number)


_EMPTY: list[bytes] = []


def _empty_database() -> bytes:
    """The image of a database with all tables and nothing in them. Made once."""
    if not _EMPTY:
        connection = open_database(":memory:")
        ProcessStore(connection)
        _EMPTY.append(connection.serialize())
        connection.close()
    return _EMPTY[0]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All chance in the product follows from the seed."""
    chance = random.Random(f"{seed} secrets")
    with (
        mock.patch.object(secrets, "token_hex", lambda size=32: chance.randbytes(size).hex()),
        mock.patch.object(secrets, "token_bytes", chance.randbytes),
        mock.patch.object(random, "random", chance.random),
        mock.patch.object(pids, "_chance", chance),
        mock.patch.object(pids, "_last", 0),
    ):
        yield


@contextlib.contextmanager
def _running(loop: VirtualLoop) -> Iterator[None]:
    """`loop` is the running one."""
    asyncio_events._set_running_loop(loop)
    try:
        yield
    finally:
        asyncio_events._set_running_loop(None)


def run(seed: int, settings: Settings = USUAL) -> Outcome:
    """One run."""
    return ProcessWorld(seed, settings).run()
