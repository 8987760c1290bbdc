"""Bugs that are planted to see that the worlds find them.

Each is an edit of the real code, made at runtime in this process alone, and taken back. Where the code has changed so
that an edit does not fit any more, that is an error: then it has to be written anew.
"""

from __future__ import annotations
import __future__

import importlib
import inspect
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.torture.sim import campaign
from tests.torture.sim.nemesis import FAULTS
from tests.torture.sim.world import Outcome, Settings

_ANNOTATIONS = __future__.annotations.compiler_flag


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug. `seed` is known to find it, quickly."""

    name: str
    where: str
    """``module:Class.method``"""
    edits: tuple[tuple[str, str], ...]
    seed: int
    world: str = "messaging"
    without: frozenset[str] = frozenset()
    """Faults that would only hide it."""
    breaks: str = ""
    """The invariant of which the complaints must speak; none: any."""

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The code has this bug."""
        module_name, _, path = self.where.partition(":")
        owner: Any = importlib.import_module(module_name)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        function = inspect.getattr_static(owner, name)
        setattr(owner, name, self._edited(function, name))
        try:
            yield
        finally:
            setattr(owner, name, function)

    def run(self, seed: int) -> Outcome:
        """One run with this bug."""
        with self.planted():
            return self.run_without(seed)

    def is_found(self, seed: int) -> bool:
        """Whether this seed shows it, as what it is."""
        complaints = self.run(seed).complaints
        return any(f"{self.breaks}: " in complaint for complaint in complaints) if self.breaks else bool(complaints)

    def run_without(self, seed: int) -> Outcome:
        """The same run of the code as it is."""
        return campaign.WORLDS[self.world](seed, Settings(without=self.without))

    def _edited(self, function: Any, name: str) -> Any:
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in self.edits:
            if source.count(old) != 1:
                raise LookupError(f"the mutant {self.name!r} does not fit {self.where} any more: {old!r}")
            source = source.replace(old, new)
        found: dict[str, Any] = {}
        code = compile(source, f"<mutant: {self.name}>", "exec", flags=_ANNOTATIONS, dont_inherit=True)
        exec(code, function.__globals__, found)  # our own source, with one line changed
        return found[name]


_BROKER = "prunus.messaging.broker:BrokerCore"
_CLIENT = "prunus.messaging.client:ClientCore"
_EXCHANGE = "prunus.messaging.exchange:Exchange"
_QUEUES = "prunus.messaging.queues:TaskQueues"
_STORE = "prunus.messaging.taskstore:TaskStore"
_PROCESSES = "prunus.persistence.sqlite:ProcessStore"


_ONLY_PARTITIONS = frozenset(FAULTS) - {"late", "partition", "pause_peer", "reset", "slow"}


def _mutant(
    name: str,
    where: str,
    *edits: tuple[str, str],
    seed: int,
    world: str = "messaging",
    without: frozenset[str] = frozenset(),
    breaks: str = "",
) -> Mutant:
    return Mutant(name, where, edits, seed, world, without, breaks)


MUTANTS: tuple[Mutant, ...] = (
    # --- what is durable, and when it is said ---
    _mutant(
        "reply before commit",
        f"{_EXCHANGE}._behind_the_barrier",
        ('self._connection.execute("COMMIT")\n', "pass\n"),
        ("work()\n", 'self._connection.in_transaction and self._connection.execute("COMMIT")\n        work()\n'),
        seed=0,
        breaks="I7",
    ),
    _mutant(
        "continue after a failed commit",
        f"{_EXCHANGE}._behind_the_barrier",
        (
            "self._stopped = BrokerStoppedError.of(error)\n        raise self._stopped from error\n",
            'self._connection.in_transaction and self._connection.execute("ROLLBACK")\n',
        ),
        seed=35,
        breaks="I7",
    ),
    _mutant(
        "results are forgotten with the session",
        f"{_BROKER}._leave",
        ("if for_good:\n        self._queues.forget_waits(session)\n", "self._queues.forget_waits(session)\n"),
        seed=280,
    ),
    _mutant("epoch reset at restart", f"{_STORE}.next_broker_epoch", ("return int(epoch)", "return 1"), seed=0),
    _mutant(
        "a done task stays in the store",
        f"{_STORE}.write",
        ("(DELETE_TASK, deleted), ", ""),
        seed=0,
    ),
    _mutant(
        "what clients have done is not looked for beside tasks",
        f"{_STORE}._load_clients",
        ("in rows(LOAD_MARKS, (self._sunk,)):", "in ():"),
        seed=26,
    ),
    _mutant(
        "a mark goes with the task beside which it stands",
        f"{_STORE}._write_clients",
        ("or (deleted and self._afloat and max(deleted)[0] > self._sunk)", ""),
        seed=192,
    ),
    _mutant(
        "a call that fails is not undone",
        f"{_EXCHANGE}._call",
        ('self._connection.execute("ROLLBACK TO call")', "self._written = True"),
        seed=4,
    ),
    # --- connections ---
    _mutant(
        "no subscriptions in Hello",
        f"{_CLIENT}._hello",
        (
            "for (queue, subject), credit in self._queues.items() if subject is None",
            "for (queue, subject), credit in ()",
        ),
        seed=0,
    ),
    _mutant(
        "held tasks not restated in Hello", f"{_CLIENT}._hello", ("held=tuple(self.held.items())", "held=()"), seed=0
    ),
    _mutant(
        "awaited results not restated in Hello",
        f"{_CLIENT}._hello",
        ("awaited=tuple(self._awaited)", "awaited=()"),
        seed=14,
    ),
    _mutant(
        "unanswered requests not said again",
        f"{_CLIENT}._welcome",
        ("for one in self._unanswered.values():", "for one in ():"),
        seed=0,
    ),
    _mutant(
        "no tombstone: an old delivery is accepted",
        f"{_CLIENT}.on_frame",
        ("if message.epoch <= max(self._highest.get(message.task, 0), self.held.get(message.task, 0)):", "if False:"),
        seed=0,
    ),
    _mutant(
        "a question runs each time that it comes",
        f"{_CLIENT}.on_frame",
        ("elif key not in self._asked:", "else:"),
        ("if (answer := self._answers.get(key)) is not None:", "if (answer := None) is not None:"),
        seed=0,
    ),
    # --- sessions ---
    _mutant(
        "no deduplication of calls",
        f"{_BROKER}.known_answer",
        ("if (frame := client.answers.get(request)) is not None:", "if (frame := None) is not None:"),
        seed=5,
    ),
    _mutant(
        "no deduplication of sends",
        f"{_BROKER}._task_send",
        ("if request < client.done and request not in client.undone:", "if False:"),
        seed=19,
    ),
    _mutant(
        "the high-water mark covers a request that was refused",
        f"{_BROKER}._task_send",
        ("client.undone[request] = None\n", "pass\n"),
        seed=50,
    ),
    _mutant(
        "a lease never ends",
        f"{_BROKER}.tick",
        ("if now - known.last_heard > self._lease_s", "if False"),
        seed=3,
        breaks="L2",
    ),
    _mutant(
        "the proof that a worker died is not believed",
        f"{_BROKER}.expired",
        ("if session in self._sessions:", "if False:"),
        seed=24,
        breaks="L2",
    ),
    _mutant(
        "a busy broker does not look at its clock",
        f"{_BROKER}.due",
        ("self._ticked + TICK_S", "self._now + TICK_S"),
        seed=8,
    ),
    _mutant(
        "a session can be taken over",
        f"{_BROKER}.refusal",
        ("if not hmac.compare_digest", "if False and hmac.compare_digest"),
        seed=1,
    ),
    _mutant(
        "a timer that fires makes no task",
        f"{_EXCHANGE}._fire",
        ("self._put(self._service.tick())", "self._service.tick()"),
        seed=0,
    ),
    # --- broadcasts ---
    _mutant(
        "a slow listener is told of one hole for many",
        f"{_BROKER}._broadcast",
        ("self._missed[session] = self._missed.get(session, 0) + 1", "self._missed[session] = 1"),
        seed=148,
        breaks="I10",
    ),
    _mutant(
        "a slow listener is told of no hole",
        f"{_BROKER}._say_missed",
        ("self._send(session, Missed(count=self._missed.pop(session)))", "self._missed.pop(session)"),
        seed=148,
        breaks="I10",
    ),
    # --- tasks ---
    _mutant(
        "an acknowledgement of a stranger is accepted",
        f"{_QUEUES}.held",
        (" or task.hold.epoch != epoch or task.hold.session != session", ""),
        seed=20,
    ),
    _mutant(
        "waiters dropped when tasks are joined",
        f"{_BROKER}._accept",
        ("self._queues.wait_for(pending, waiter)", "pass"),
        seed=9,
    ),
    _mutant("waiters forgotten by the store", f"{_STORE}._others", ("waiters.split(_WAITER_SEPARATOR)", "()"), seed=3),
    _mutant("a key is not freed", f"{_QUEUES}._let_go", ("self._blocked.pop(task.key, ())", "()"), seed=0),
    _mutant("a token is not given back", f"{_QUEUES}._let_go", ("resource.taken -= tokens", "pass"), seed=1),
    _mutant("a token is not taken", f"{_QUEUES}._give", ("self._resources[name].taken += tokens", "pass"), seed=1),
    _mutant(
        "dead letters one attempt too late",
        f"{_QUEUES}._come_back",
        ("task.attempt >= task.max_attempts", "task.attempt > task.max_attempts"),
        seed=13,
    ),
    _mutant(
        "one more than the limit of the queue",
        f"{_QUEUES}._admit",
        (">= limits.concurrency", "> limits.concurrency"),
        seed=2,
    ),
    _mutant("credit is not counted", f"{_QUEUES}._give", ("chosen.busy += 1", "pass"), seed=0),
    _mutant(
        "priorities ignored", f"{_QUEUES}.put", ("urgency = urgency_of(priority, depth)\n", "urgency = 0\n"), seed=10
    ),
    _mutant(
        "a rejected task is forgotten", f"{_QUEUES}._offer", ("self._rejected.add(task.retry_at, task)", "pass"), seed=3
    ),
    _mutant(
        "a delay is forgotten",
        f"{_QUEUES}.tick",
        ("for task in self._scheduled.due(self.wall):", "for task in ():"),
        seed=1,
    ),
    _mutant(
        "a stale claim counts",
        f"{_PROCESSES}._must_own",
        ("if row.epoch == epoch and row.owner is not None:", "if True:"),
        seed=1,
        world="processes",
        without=_ONLY_PARTITIONS,
    ),
    _mutant(
        "a process is acknowledged before its end",
        "prunus.runtime.launcher:Launcher.handle",
        ("if not claim.record.is_terminal:", "if not claim.record.is_terminal and claim.epoch < 2:"),
        seed=0,
        world="processes",
    ),
)


def print_table(number: int, names: Sequence[str] = ()) -> int:
    """For each mutant the first seed that finds it, and which part of all seeds do. 1 if one is not found."""
    print(f"{'mutant':60} {'world':10} {'breaks':6} {'first seed':>10} {'found in':>9} {'seeds':>6} {'s':>6}")
    missed = 0
    for mutant in MUTANTS:
        if names and mutant.name not in names:
            continue
        begun = time.monotonic()
        found: list[int] = []
        seeds = [mutant.seed, *range(number)] if mutant.world == "messaging" else [mutant.seed, *range(number // 4)]
        for seed in seeds:
            if mutant.is_found(seed):
                found.append(seed)
        missed += not found
        first = min(found[1:] or found) if found else None
        print(
            f"{mutant.name:60} {mutant.world:10} {mutant.breaks:6} {first if found else 'NEVER':>10} "
            f"{len(found) / len(seeds):>9.1%} "
            f"{len(seeds):>6} {time.monotonic() - begun:>6.1f}",
            flush=True,
        )
    return 1 if missed else 0
