"""The whole way: a supervisor, a broker and workers as OS processes, and this one as the controller.

Every launch, every step and every end is on the disk before anybody is told of it. What very many processes cost is
measured in `benchmarks.crowds`, what other engines do in `benchmarks.engines`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import engines, workload
from benchmarks.clock import percentile
from benchmarks.run import Report
from benchmarks.services import Services
from prunus.errors import ConnectionLostError
from prunus.runtime.controller import ProcessController, ProcessHandle, connect
from prunus.runtime.roster import HEALTHY_S

READY_S = 30.0
LOOK_S = 0.02
STEPS_WARM_UP_S, STEPS_S = 0.7, 2.0
FIRST_STEPS = 300
SHORT_PROCESSES = 3000
LAUNCHES_AT_ONCE = 64
MANY_SLOTS, WARM_UP = 128, 200
REST_S, IDLE_S = 1.0, 5.0
PACED = 8
WORKER_KILLS = 5
BROKER_KILLS = 4
"""With a pause of `HEALTHY_S` before each: a broker that dies too often is started again more and more slowly."""


async def measure(report: Report) -> None:
    theirs = await asyncio.to_thread(the_engines, report)
    report.doing("a daemon with one worker starts")
    async with running(workers=1, slots=64) as daemon:
        for at_once in (1, 8, 64):
            rate, commits = await daemon.steps(at_once)
            report.add(f"steps with durable checkpoints, {at_once} at once ({commits:,.0f} commits/s)", rate, "/s")
    report.doing("a daemon with two workers starts")
    async with running(workers=2) as daemon:
        waits = await daemon.first_steps_ms()
        report.add("launch to first step, idle daemon, p50", percentile(waits, 0.5), "ms", limit=10)
        report.add("launch to first step, idle daemon, p99", percentile(waits, 0.99), "ms", limit=50)
        await short_processes(report, daemon, "with 16 slots each", {})
        report.doing(f"doing nothing for {IDLE_S:g} s")
        report.add("idle daemon, of one core", await daemon.idle_percent(), "%")
        report.doing(f"killing workers, {WORKER_KILLS} times")
        both(report, "worker killed to its processes claimed by another", await daemon.worker_kills_ms())
        report.doing(f"killing the broker, {BROKER_KILLS} times")
        both(report, "broker killed to first request answered", await daemon.broker_kills_ms())
    async with running(workers=2, slots=MANY_SLOTS) as daemon:
        await short_processes(report, daemon, f"with {MANY_SLOTS} slots each", theirs)
    from benchmarks import crowds

    await crowds.measure(report)


async def short_processes(report: Report, daemon: Daemon, workers: str, theirs: dict[str, float]) -> None:
    """Launched to finished, all of it durable; beside the peers, if any are given."""
    await daemon.short_processes(daemon.launch_each, WARM_UP)
    for launched, launch in (("one by one", daemon.launch_each), ("together", daemon.launch_together)):
        rate, commits = await daemon.short_processes(launch)
        what = f"short processes, two workers {workers}, launched {launched}"
        report.add(f"{what} ({commits:,.0f} commits/s)", rate, "/s", limit=1000)
        report.doing(f"processor time of each: {daemon.processor_ms}")
        if launched == "one by one":
            for name, peer in theirs.items():
                report.add("the same, beside a peer", rate, "/s", peer, name, aim=10)


def the_engines(report: Report) -> dict[str, float]:
    """Short processes in a second, by the peers that are here."""
    theirs = {}
    if engines.has_plumpy():
        report.doing(f"plumpy with {engines.WORKERS} workers, over RabbitMQ")
        theirs["plumpy + kiwipy + RabbitMQ"] = engines.plumpy_per_s()
    if engines.has_dbos():
        report.doing("DBOS with SQLite, in four ways")
        rates = engines.dbos_per_s()
        report.doing("DBOS: " + "; ".join(f"{way} {rate:,.0f}/s" for way, rate in rates.items()))
        best = max(rates, key=lambda way: rates[way])
        theirs[f"DBOS, SQLite, {best}"] = rates[best]
    return theirs


def both(report: Report, what: str, values: list[float]) -> None:
    report.add(f"{what}, median", statistics.median(values), "ms")
    report.add(f"{what}, worst of {len(values)}", max(values), "ms")


@contextlib.asynccontextmanager
async def running(**config: Any) -> AsyncIterator[Daemon]:
    """A daemon of so many workers; all of it ends with the context."""
    with Services(**config) as services:
        async with started(services, config["workers"]) as daemon:
            yield daemon


@contextlib.asynccontextmanager
async def started(services: Services, workers: int) -> AsyncIterator[Daemon]:
    """Start the daemon of a profile, and look at it until the end of the context."""
    begun = time.perf_counter()
    services.start("prunus.runtime.supervisor")
    async with contextlib.AsyncExitStack() as stack:
        async with asyncio.timeout(READY_S):
            while True:
                try:
                    controller = await stack.enter_async_context(connect(services.profile))
                    break
                except ConnectionLostError:
                    continue
        daemon = Daemon(services, controller, workers)
        await controller.broker_statistics()
        daemon.serving_s = time.perf_counter() - begun
        await daemon.all_workers_are_there()
        daemon.ready_s = time.perf_counter() - begun
        yield daemon


@dataclass
class Daemon:
    services: Services
    controller: ProcessController
    workers: int
    serving_s: float = 0.0
    """From its start to the first answer of the broker, and ..."""
    ready_s: float = 0.0
    """... until it knew all workers."""
    processor_ms: str = ""
    """What each of the `short_processes` took of the processor, by service."""

    async def all_workers_are_there(self) -> None:
        async def there() -> bool:
            sessions = (await self.controller.broker_statistics())["sessions"].values()
            return sum(session["connected"] for session in sessions) == self.workers + 1

        await until(there)

    # --- how much ---

    async def steps(self, at_once: int) -> tuple[float, float]:
        """Steps and commits per second."""
        begin = time.monotonic() + STEPS_WARM_UP_S
        inputs = {"begin": begin, "end": begin + STEPS_S}
        handles = await asyncio.gather(*(self.controller.launch(workload.Steps, inputs) for _ in range(at_once)))
        await asyncio.sleep(begin - time.monotonic())
        before = await self.controller.broker_statistics()
        await asyncio.sleep(begin + STEPS_S - time.monotonic())
        after = await self.controller.broker_statistics()
        results = await asyncio.gather(*(handle.result(READY_S) for handle in handles))
        total = sum(result.outputs.counted for result in results)
        return total / STEPS_S, (after["commits"] - before["commits"]) / STEPS_S

    async def first_steps_ms(self) -> list[float]:
        """One after the other, each when the one before has ended."""
        waits = []
        for _ in range(FIRST_STEPS):
            begun_ns = time.monotonic_ns()
            handle = await self.controller.launch(workload.Short)
            result = await handle.result(READY_S)
            waits.append((result.outputs.begun_ns - begun_ns) / 1e6)
        return waits[10:]  # the first ones import

    async def short_processes(
        self, launch: Callable[[int], Awaitable[object]], count: int = SHORT_PROCESSES
    ) -> tuple[float, float]:
        """Processes and commits per second, from the first launch to the last end."""
        before = await self.controller.broker_statistics()
        pids = {**self.services.pids(), "this one": os.getpid()}
        used_s = {name: cpu_s(pid) for name, pid in pids.items()}
        begun = time.perf_counter()
        await launch(count)
        await self.until_counted(before["processes"].get("finished", 0) + count, "finished")
        taken = time.perf_counter() - begun
        used_ms = {name: (cpu_s(pid) - used_s[name]) / count * 1e3 for name, pid in pids.items()}
        self.processor_ms = ", ".join(f"{name} {ms:.2f} ms" for name, ms in used_ms.items())
        after = await self.controller.broker_statistics()
        return count / taken, (after["commits"] - before["commits"]) / taken

    async def launch_each(self, count: int) -> None:
        left = iter(range(count))

        async def launch() -> None:
            for _ in left:
                await self.controller.launch(workload.Short)

        await asyncio.gather(*(launch() for _ in range(LAUNCHES_AT_ONCE)))

    async def launch_together(self, count: int) -> None:
        await self.controller.launch_many([(workload.Short, None)] * count)

    async def until_counted(self, count: int, *states: str, patience_s: float = READY_S) -> None:
        """Wait until so many processes are in one of these states."""

        async def are_there() -> bool:
            return await self.count(*states) >= count

        await until(are_there, patience_s)

    async def count(self, *states: str) -> int:
        """How many processes are in one of these states."""
        counts = (await self.controller.broker_statistics())["processes"]
        return sum(counts.get(state, 0) for state in states)

    # --- doing nothing ---

    async def idle_percent(self, seconds: float = IDLE_S) -> float:
        """What supervisor, broker and workers use of one core, after a moment in which they come to rest."""
        await asyncio.sleep(REST_S)
        pids = self.services.pids().values()
        before = sum(map(cpu_s, pids))
        await asyncio.sleep(seconds)
        return (sum(map(cpu_s, pids)) - before) / seconds * 100

    # --- after a kill -9 ---

    async def worker_kills_ms(self) -> list[float]:
        """Of each kill: until the last process of that worker was claimed by another one."""
        handles = [await self.controller.launch(workload.Paced) for _ in range(PACED)]
        times = [await self._kill_worker(handles) for _ in range(WORKER_KILLS)]
        await self.controller.kill_all(force=True)
        return times

    async def _kill_worker(self, handles: list[ProcessHandle]) -> float:
        held: list[ProcessHandle] = []
        victim = 0

        async def all_run() -> bool:
            nonlocal held, victim
            statuses = [(await handle.record()).status for handle in handles]
            pids = [int(status) for status in statuses if status]
            victim = max(pids, key=pids.count, default=0)
            held = [handle for handle, status in zip(handles, statuses, strict=True) if status == str(victim)]
            return len(pids) == len(handles) and victim in self.services.pids().values()

        await self.all_workers_are_there()
        await until(all_run)
        killed_at = time.time()
        os.kill(victim, signal.SIGKILL)
        claimed: list[float] = []

        async def all_claimed() -> bool:
            claimed.clear()
            for handle in held:
                claimed.extend(e.at for e in await handle.history() if e.subject == "claimed" and e.at > killed_at)
            return len(claimed) >= len(held)

        await until(all_claimed)
        return (max(claimed) - killed_at) * 1e3

    async def broker_kills_ms(self) -> list[float]:
        """Of each kill: until a request that was made at once is answered."""
        times = []
        for _ in range(BROKER_KILLS):
            await asyncio.sleep(HEALTHY_S + 0.1)
            begun = time.perf_counter()
            os.kill(self.services.pids()["broker"], signal.SIGKILL)
            await self.controller.broker_statistics()
            times.append((time.perf_counter() - begun) * 1e3)
        return times


def cpu_s(pid: int) -> float:
    """The processor time that an OS process has used, as exactly as can be known here."""
    try:  # Linux: in ns, for each of its threads
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9
    except OSError:  # in ticks of 10 ms
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)


async def until(holds: Callable[[], Awaitable[bool]], patience_s: float = READY_S) -> None:
    async with asyncio.timeout(patience_s):
        while not await holds():  # noqa: ASYNC110 (what is waited for is in other OS processes)
            await asyncio.sleep(LOOK_S)
