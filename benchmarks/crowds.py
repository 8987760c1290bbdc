"""Very many processes at once: parked, waiting for children, alive when their worker dies, there when all starts.

What is promised of each stands beside it. The parked ones are written as workers would have left them
(`benchmarks.parked.fill`); all else happens to real services.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks import parked, workload
from benchmarks.clock import percentile
from benchmarks.daemon import Daemon, cpu_s, running, started, until
from benchmarks.run import Report
from benchmarks.services import PROJECT, Services
from prunus.persistence.persister import QUERY_LIMIT, TERMINAL_STATES, Query
from prunus.runtime import daemon as prunus_daemon
from prunus.runtime.controller import ProcessHandle

FEW, MILLION = 10_000, 1_000_000
WOKEN = 200
"""Processes whose wake-up is timed, of each kind."""
NAP_S, APART_S = 3.0, 0.05
"""When the first timer fires, and how far apart they are: a wake-up is not to wait for that before it."""
LISTINGS = 9
IDLE_S = 62.0
"""A broker looks at all processes once a minute: that is in it."""
PARENTS = 10_000
LIVE = 1_000
STEPS, PACE_S = 3, 5.0
"""Of each that lives when its worker is killed. (A thousand of them take 200 steps in a second.)"""
SHORT_STEPS, SHORT_PACE_S = 6, 1.5
"""Of each that lives when the daemon is stopped."""
NON_TERMINAL = 100_000
RUNNABLE = 50_000
"""Of these; the others are parked."""
PATIENCE_S = 900.0
MIB = 2**20


async def measure(report: Report) -> None:
    await waiting_parents(report)
    await killed_worker(report)
    await stop(report)
    await restart(report)
    await crowd(report)


# --- parked -------------------------------------------------------------------------------------------


class Figures(NamedTuple):
    """What a daemon with two workers costs that so many are parked, and does all the same."""

    serving_s: float
    cold_s: float
    worker_mib: float
    message_ms: Sequence[float]
    timer_ms: Sequence[float]
    list_ms: float
    list_used_ms: float
    idle_percent: float
    by_service: str


async def crowd(report: Report) -> None:
    few = await parked_figures(report, FEW)
    many = await parked_figures(report, MILLION)
    name = f"Prunus, {FEW:,}"
    what = f"{MILLION:,} parked: "
    report.add(what + "daemon start to the broker's first answer", many.serving_s, "s", few.serving_s, name, limit=5)
    cold = what + "the same with nothing of the database in memory"
    report.add(cold, many.cold_s, "s", few.cold_s, name, limit=5)
    report.add(what + "memory of a worker", many.worker_mib, "MiB", few.worker_mib, name, limit=few.worker_mib * 1.05)
    for cause, ours, theirs in (
        ("a message", many.message_ms, few.message_ms),
        ("a timer", many.timer_ms, few.timer_ms),
    ):
        for share, limit in ((0.5, 20.0), (0.99, None)):
            report.add(
                f"{what}one is woken by {cause}, to its next step, p{share * 100:.0f}",
                percentile(ours, share),
                "ms",
                percentile(theirs, share),
                name,
                limit=limit,
            )
    report.add(what + "`prunus list` of the newest 50, median", many.list_ms, "ms", few.list_ms, name, limit=300)
    report.add("the same, its processor time", many.list_used_ms, "ms", few.list_used_ms, name)
    report.add(f"{what}idle daemon, of one core ({many.by_service})", many.idle_percent, "%", few.idle_percent, name)
    report.add(f"{FEW:,} parked: idle daemon, of one core ({few.by_service})", few.idle_percent, "%", limit=1)


async def parked_figures(report: Report, count: int) -> Figures:
    with Services(workers=2) as services:
        report.doing(f"{count:,} processes are parked")
        await asyncio.to_thread(parked.fill, services.profile.database, count)
        async with started(services, workers=2) as daemon:
            serving_s = daemon.serving_s
            message_ms = await woken_by_message_ms(daemon)
            timer_ms = await woken_by_timer_ms(daemon)
            workers = [pid for name, pid in services.pids().items() if name.startswith("worker")]
            worker_mib = max(psutil.Process(pid).memory_info().rss for pid in workers) / MIB
            listings = [list_newest_ms(services) for _ in range(LISTINGS)]
            list_ms, list_used_ms = (percentile(times, 0.5) for times in zip(*listings, strict=True))
            report.doing(f"doing nothing for {IDLE_S:g} s")
            before = {name: cpu_s(pid) for name, pid in services.pids().items()}
            idle = await daemon.idle_percent(IDLE_S)
            used = {name: (cpu_s(pid) - before[name]) / IDLE_S * 100 for name, pid in services.pids().items()}
            by_service = ", ".join(f"{name} {share:.2f}" for name, share in used.items())
        services.kill_all()
        forget_cached(services.profile.database)
        async with started(services, workers=2) as daemon:
            cold_s = daemon.serving_s
        return Figures(serving_s, cold_s, worker_mib, message_ms, timer_ms, list_ms, list_used_ms, idle, by_service)


async def woken_by_message_ms(daemon: Daemon) -> list[float]:
    """One after the other: from the call that sends the message to the step that takes it."""
    rows = await daemon.controller.find(Query(limit=QUERY_LIMIT))
    children = {pid for row in rows for pid in row.waits}
    listening = [row.pid for row in rows if row.class_id.endswith(":Listening") and row.pid not in children]
    times = []
    for pid in listening[: WOKEN + 5]:
        handle = daemon.controller.handle(pid)
        begun_ns = time.monotonic_ns()
        await handle.send("go", True)
        times.append(((await handle.result(PATIENCE_S)).value - begun_ns) / 1e6)
    return times[5:]  # the first ones import


async def woken_by_timer_ms(daemon: Daemon) -> list[float]:
    """From the moment for which they wait to their next step; the moments are apart."""
    begun, handles = time.monotonic(), []
    for number in range(WOKEN):
        seconds = NAP_S + number * APART_S - (time.monotonic() - begun)
        handles.append(await daemon.controller.launch(workload.Nap, {"seconds": seconds}))
    return [(await handle.result(PATIENCE_S)).outputs.late_s * 1e3 for handle in handles]


def list_newest_ms(services: Services) -> tuple[float, float]:
    """The whole program, as it is typed: how long it takes, and its processor time."""
    command = [sys.executable, "-m", "prunus.runtime.cli", "--profile", str(services.profile.path), "list"]
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    taken, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return taken * 1e3, used * 1e3


def forget_cached(database: Path) -> None:
    """Let the system forget what it has in memory of a file that nobody has open."""
    for file in (database, Path(f"{database}-wal")):
        if file.exists():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


# --- waiting for children -----------------------------------------------------------------------------


async def waiting_parents(report: Report) -> None:
    """All of them wait at the same time, for children that wait too, and there is one slot."""
    report.doing(f"{PARENTS:,} parents and their children, one worker, one slot")
    async with running(workers=1, slots=1) as daemon:
        begun = time.perf_counter()
        await daemon.controller.launch_many([(parked.Parent, None)] * PARENTS)
        await daemon.until_counted(2 * PARENTS, "waiting", patience_s=PATIENCE_S)
        report.add(f"{PARENTS:,} parents launched, until all wait", PARENTS / (time.perf_counter() - begun), "/s")
        begun = time.perf_counter()
        sent = await daemon.controller.processes(cls=parked.Listening).send("go", True)
        assert not sent.skipped, sent.skipped
        await daemon.until_counted(2 * PARENTS, *TERMINAL_STATES, patience_s=PATIENCE_S)
        taken_s = time.perf_counter() - begun
        finished = await daemon.count("finished")
        report.add(f"{PARENTS:,} parents and their children woken, until all have ended", 2 * PARENTS / taken_s, "/s")
        report.add("of them and their children completed", finished, "", limit=2 * PARENTS, at_least=True)


# --- alive --------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A step that began."""

    pid: str
    number: int
    worker: int
    at_s: float


class Journal:
    """What live processes wrote, read as it grows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: list[Line] = []
        self._read = 0

    def look(self) -> list[Line]:
        if self.file.exists():
            with self.file.open("rb") as file:
                file.seek(self._read)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read += len(whole)
            for pid, number, worker, at_ns in map(bytes.split, whole.splitlines()):
                self.lines.append(Line(pid.decode(), int(number), int(worker), int(at_ns) / 1e9))
        return self.lines


async def launch_live(daemon: Daemon, journal: Journal, steps: int, pace_s: float) -> list[ProcessHandle]:
    """`LIVE` processes, each in its first step when this returns."""
    inputs = {"file": str(journal.file), "steps": steps, "pace_s": pace_s}
    handles = await daemon.controller.launch_many([(workload.Lived, inputs)] * LIVE)

    async def all_live() -> bool:
        return len({line.pid for line in journal.look()}) == LIVE

    await until(all_live, PATIENCE_S)
    return handles


async def killed_worker(report: Report) -> None:
    """The worker that has all of them; a second one is there, and the first is started again."""
    report.doing(f"a worker with {LIVE:,} live processes is killed")
    async with running(workers=1, slots=LIVE) as daemon:
        services = daemon.services
        journal = Journal(services.profile.path / "journal")
        handles = await launch_live(daemon, journal, STEPS, PACE_S)
        prunus_daemon.scale(services.profile, 2)
        daemon.workers = 2
        await daemon.all_workers_are_there()
        victim = services.pids()["worker-1"]
        os.kill(victim, signal.SIGKILL)
        killed_s, killed_at = time.monotonic(), time.time()
        ended_before = await daemon.count("finished")
        again: dict[str, float] = {}

        async def all_again() -> bool:
            again.clear()
            for line in journal.look():
                if line.worker != victim:
                    again.setdefault(line.pid, line.at_s)
            return len(again) + ended_before >= LIVE

        await until(all_again, PATIENCE_S)
        times = [at_s - killed_s for at_s in again.values()]
        report.add(
            f"worker killed with {LIVE:,} live processes, until one continues, p50",
            percentile(times, 0.5),
            "s",
            limit=3,
        )
        report.add("the same, until the last continues", max(times), "s", limit=10)
        for handle in handles:
            await handle.result(PATIENCE_S)
        once = await continued_once(journal.look(), handles, victim, killed_at)
        report.add("of them continued on one worker, no checkpointed step again", once, "", limit=LIVE, at_least=True)


async def continued_once(lines: Sequence[Line], handles: Sequence[ProcessHandle], victim: int, killed_at: float) -> int:
    """How many processes were claimed once after the kill, began each step once, and again only the one that died."""
    begun: dict[str, list[Line]] = {}
    for line in lines:
        begun.setdefault(line.pid, []).append(line)
    once = 0
    for handle in handles:
        mine = begun[handle.pid]
        numbers = [line.number for line in mine]
        last_of_victim = max((line.number for line in mine if line.worker == victim), default=0)
        doubled = {number for number, times in Counter(numbers).items() if times > 1}
        claims = [event for event in await handle.history() if event.subject == "claimed" and event.at > killed_at]
        in_order = numbers == sorted(numbers) and set(numbers) == set(range(1, STEPS + 1))
        once += in_order and len(claims) <= 1 and doubled <= {last_of_victim} and len(mine) <= STEPS + 1
    return once


async def stop(report: Report) -> None:
    """Of a daemon with the grace that a profile has if nobody says anything."""
    report.doing(f"a daemon with {LIVE:,} live processes is stopped")
    with Services(workers=2, slots=LIVE // 2, grace_s=10.0) as services:
        journal = Journal(services.profile.path / "journal")
        async with started(services, workers=2) as daemon:
            await launch_live(daemon, journal, SHORT_STEPS, SHORT_PACE_S)
        begun = time.perf_counter()
        await prunus_daemon.stop(services.profile)
        what = (
            f"daemon stopped with {LIVE:,} live processes (steps of {SHORT_PACE_S / 2:g} to {SHORT_PACE_S * 1.5:g} s)"
        )
        report.add(what, time.perf_counter() - begun, "s", limit=5)
        async with started(services, workers=2) as daemon:
            await daemon.until_counted(LIVE, *TERMINAL_STATES, patience_s=PATIENCE_S)
            finished = await daemon.count("finished")
        report.add("of them finished after the next start", finished, "", limit=LIVE, at_least=True)
        doubled = len(journal.look()) - LIVE * SHORT_STEPS
        report.add("of their steps began twice", doubled, "", limit=0)


# --- everything starts --------------------------------------------------------------------------------


async def restart(report: Report) -> None:
    what = f"{NON_TERMINAL:,} non-terminal processes"
    report.doing(f"{what}, {RUNNABLE:,} of them can run")
    with Services(workers=2) as services:
        await asyncio.to_thread(parked.fill, services.profile.database, NON_TERMINAL, runnable=RUNNABLE)
        for title in ("start with %s, no task is there yet", "all killed and started with %s"):
            begun = time.perf_counter()
            async with started(services, workers=2) as daemon:
                queued_s = daemon.serving_s  # the reconciler is done before the broker serves
                counts = await daemon.controller.broker_statistics()
                queue, states = counts["queues"]["default"], counts["processes"]
                live = states.get("created", 0) + states.get("running", 0)
                missing = live - queue["ready"] - queue["held"]
                before = states.get("waiting", 0)

                async def one_ran(before: int = before, daemon: Daemon = daemon) -> bool:
                    return await daemon.count("waiting") > before

                await until(one_ran)
                taken_s = time.perf_counter() - begun
                report.add(f"{title % what}, until all that should are queued", queued_s, "s", limit=10)
                report.add("the same, until the first runs", taken_s, "s", limit=10)
                report.add("of them that should be queued and are not", max(0, missing), "", limit=0)
            services.kill_all()
