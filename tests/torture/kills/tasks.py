"""Broker, workers and clients under load, while somebody kills them: what was confirmed is done, and done once.

A run is a number of cycles. In each, somebody is killed (SIGKILL) or stopped (SIGSTOP) at a random moment and started
again, and something new has to be confirmed after it. A worker that is stopped stays so for longer than its lease.
At the end everything has to drain, and the judge (`checker`) reads the journals and the database.

The seed decides who is struck and after how long; when exactly that is, is up to the machine.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from prunus.messaging import connect_sync
from prunus.persistence.database import find_damage
from prunus.runtime.profile import Config, Profile
from tests.torture.batch import Batch
from tests.torture.kills.checker import History, check
from tests.torture.kills.journal import Journals
from tests.torture.kills.zygote import Zygote

WORKERS = ("worker-1", "worker-2", "worker-3")
CLIENTS = ("client-1", "client-2")
BROKER = "broker"
LEASE_S = 2.5
"""More than the heartbeat of a client (2 s)."""
BEYOND_LEASE_S = 1.2
"""A stopped worker stays so for its lease and this; the broker looks at leases once a second."""
MAX_PAUSE_S = 0.08
"""The longest time between two strikes beside the time for recovering."""
PROGRESS_S = 20.0
"""Something new is confirmed so soon after each strike, or the run has failed."""
DRAIN_S = 40.0
"""So soon after the last strike all is settled."""
POLL_S = 0.005
STOPS_EVERY, STOPPED_CYCLES = 25, 10
"""In the first of so many cycles a worker is stopped; so many later it goes on, if its lease is over by then."""


class _FailureError(Exception):
    """The run can't go on."""


class TaskRig:
    """One run in `folder`."""

    def __init__(self, folder: Path, zygote: Zygote, seed: int) -> None:
        self._choice = random.Random(seed)
        self._zygote = zygote
        self._folder = folder
        self._profile = Profile.create(folder / "p", Config(workers=0))
        self._journals = Journals(folder)
        self._pids: dict[str, int] = {}
        self._stopped: str | None = None
        self._stopped_until = 0.0
        self._in_hand: dict[str, int] = {}
        self.counts: dict[str, int] = {}

    def run(self, cycles: int) -> Batch:
        """So many strikes, the end, and the judgement."""
        done = 0
        try:
            for name in (BROKER, *WORKERS, *CLIENTS):
                self._start(name)
            self._wait_for_progress("at the start")
            for done in range(1, cycles + 1):
                self._strike(done % STOPS_EVERY)
            self._heal()
            failures = self._judge()
        except _FailureError as failure:
            self._journals.read()
            history = History(self._journals.events)
            failures = [str(failure), *check(history, left=history.tasks.keys() | history.confirmed.values())]
        finally:
            for pid in self._pids.values():
                if self._zygote.poll(pid) is None:
                    os.kill(pid, signal.SIGKILL)
                    self._zygote.wait(pid)
        return Batch.of(done, failures, self.counts)

    # --- strikes ---

    def _strike(self, cycle: int) -> None:
        time.sleep(self._choice.uniform(0, MAX_PAUSE_S))
        if cycle == 1:
            self._stop(self._choice.choice(WORKERS))
            return
        if cycle == 1 + STOPPED_CYCLES:
            self._continue()
        worker = self._choice.choice([name for name in WORKERS if name != self._stopped])
        client = self._choice.choice(CLIENTS)
        # A new broker gives everybody a new lease: while one has to run out, the broker lives.
        ways = [(BROKER,), (BROKER,), (BROKER, worker), (BROKER, client), (worker,), (client,)]
        victims = self._choice.choice(ways if self._stopped is None else ways[-2:])
        for name in victims:
            self._kill(name)
        for name in victims:
            self._start(name)
        self._wait_for_progress(f"after the death of {' and '.join(victims)}")

    def _kill(self, name: str) -> None:
        self._must_live()
        pid = self._pids.pop(name)
        os.kill(pid, signal.SIGKILL)
        self._zygote.wait(pid)
        self._count(f"{name.partition('-')[0]} killed")

    def _stop(self, name: str) -> None:
        self._wait(f"{name} stands still with a task in hand", lambda: self._caught_at_work(name), PROGRESS_S)
        self._stopped, self._stopped_until = name, time.monotonic() + LEASE_S + BEYOND_LEASE_S
        self._count("worker stopped")

    def _caught_at_work(self, name: str) -> bool:
        """Stop it, and let it go on if that was between two tasks."""
        os.kill(self._pids[name], signal.SIGSTOP)
        self._wait(f"{name} stands still", lambda: stands_still(self._pids[name]), PROGRESS_S)
        self._journals.read()
        self._in_hand = History(self._journals.events).in_hand(name)
        if not self._in_hand:
            os.kill(self._pids[name], signal.SIGCONT)
        return bool(self._in_hand)

    def _continue(self) -> None:
        if self._stopped is None:
            return
        time.sleep(max(0.0, self._stopped_until - time.monotonic()))
        self._wait("others have what the stopped worker had in hand", self._taken_over, PROGRESS_S)
        self._count("tasks taken over from a stopped worker", len(self._in_hand))
        os.kill(self._pids[self._stopped], signal.SIGCONT)
        self._stopped = None

    def _taken_over(self) -> bool:
        self._journals.read()
        tasks = History(self._journals.events).tasks
        return all(max(tasks[task].epochs) > epoch for task, epoch in self._in_hand.items())

    # --- the end ---

    def _heal(self) -> None:
        """Nobody is struck any more: clients end what they began, and the rest drains."""
        self._continue()
        for name in CLIENTS:
            os.kill(self._pids[name], signal.SIGTERM)
        self._wait("the clients have ended", lambda: all(self._has_ended(name) for name in CLIENTS), DRAIN_S)
        for name in CLIENTS:
            self._end(name)
        self._wait("all is settled", self._all_settled, DRAIN_S)
        with connect_sync(self._profile.endpoint) as peer:  # what was sent and never confirmed has to end as well
            self._wait("nothing is left", lambda: not peer.tasks(limit=1), DRAIN_S)
        for name in (*WORKERS, BROKER):
            os.kill(self._pids[name], signal.SIGTERM)
            self._end(name)

    def _all_settled(self) -> bool:
        return not self._journals.read() and not History(self._journals.events).unsettled()

    def _has_ended(self, name: str) -> bool:
        return self._zygote.poll(self._pids[name]) is not None

    def _end(self, name: str) -> None:
        code = self._zygote.wait(self._pids.pop(name))
        if code not in (0, -signal.SIGTERM):  # that: it had only just begun, and nothing to end
            raise _FailureError(f"{name} ended with the code {code} instead of 0: {self._last_words(name)}")

    def _judge(self) -> list[str]:
        self._journals.read()
        history = History(self._journals.events)
        connection = sqlite3.connect(self._profile.database)
        try:
            left = [task for [task] in connection.execute("SELECT id FROM broker_task")]
            damage = find_damage(connection)
        finally:
            connection.close()
        self._count("tasks confirmed", len(history.confirmed))
        self._count("tasks delivered again", sum(len(task.epochs) > 1 for task in history.tasks.values()))
        self._count("late acknowledgements refused", history.stale)
        never_settled = [f"never settled: task {task} is left in the database" for task in left]
        return [*(f"damaged: {line}" for line in damage), *check(history, left), *never_settled]

    # --- processes ---

    def _start(self, name: str) -> None:
        if name == BROKER:
            role, arguments = BROKER, ["--profile", str(self._profile.path), "--lease", str(LEASE_S)]
        else:
            role = "client" if name in CLIENTS else "task worker"
            journal = self._folder / f"{name}.journal"
            seed = str(self._choice.getrandbits(32))
            arguments = [name, self._profile.endpoint, str(journal), seed]
        self._pids[name] = self._zygote.start(role, *arguments, log=self._folder / f"{name}.log")

    def _must_live(self) -> None:
        for name, pid in self._pids.items():
            if (code := self._zygote.poll(pid)) is not None:
                del self._pids[name]
                raise _FailureError(f"{name} ended by itself, with the code {code}: {self._last_words(name)}")

    def _wait_for_progress(self, when: str) -> None:
        self._journals.read()
        self._wait(f"something is confirmed {when}", self._progressed, PROGRESS_S)

    def _progressed(self) -> bool:
        return any(event.kind == "ok" for event in self._journals.read())

    def _wait(self, what: str, holds: Callable[[], bool], limit_s: float) -> None:
        give_up = time.monotonic() + limit_s
        while not holds():
            if time.monotonic() > give_up:
                raise _FailureError(f"not within {limit_s:g} s: {what}; the broker said: {self._last_words(BROKER)}")
            time.sleep(POLL_S)

    def _last_words(self, name: str) -> str:
        log = self._folder / f"{name}.log"
        return " | ".join(log.read_text(errors="replace").splitlines()[-5:]) if log.exists() else "nothing"

    def _count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number


def stands_still(pid: int) -> bool:
    """Whether a signal stopped all threads of a process (SIGSTOP returns before they all are)."""
    states = [file.read_text().rpartition(")")[2].split()[0] for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


def run(seed: int, size: int) -> Batch:
    """`size` cycles in a folder of their own."""
    with tempfile.TemporaryDirectory(prefix="pr-") as folder, Zygote() as zygote:
        return TaskRig(Path(folder), zygote, seed).run(size)
