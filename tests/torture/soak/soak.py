"""A daemon lives for a while: callers do what can be done to processes, services die, come and go; then it is healed.

Everything is real: the supervisor, the broker (with an auditor, see `tests.torture.soak.services`), the workers, the
clocks and the disk. The seed decides the plan (`tests.torture.soak.plan`); the machine decides in the middle of what a
strike falls. In the end

- every call has an answer, all processes play to their ends, and the judge (`tests.torture.soak.judge`) finds nothing;
- each history has no gap (G4, G12), the database has nothing left behind, and no commit that was looked at left
  somebody unwatched or gave a process up without its task (G2, G12);
- the services of the second half did not grow; after the stop no process, no socket and no blob is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil

from prunus import errors
from prunus.persistence.checkpoint import decode_data
from prunus.persistence.persister import Query, Record
from prunus.processes import ProcessResult
from prunus.runtime import daemon
from prunus.runtime.controller import ProcessController, ProcessHandle, connect
from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Config, Profile
from prunus.runtime.reconcile import TasksOnDisk, violations
from prunus.runtime.schedules import Schedule
from tests.guarantees.audit import OWNERS, UNWATCHED
from tests.runtime.test_random_control import broken_links, left_behind
from tests.torture.batch import PROJECT, Batch, quiet
from tests.torture.kills.processes import returned
from tests.torture.soak import leaks, services
from tests.torture.soak.judge import End, Heard, Told, judge, missed_runs
from tests.torture.soak.plan import CALLERS, MAX_WORKERS, SPARED, Deed, Plan, Strike, plan_of
from tests.torture.soak.walks import SUFFIX, Tick, Walk

SLOTS = 8
GRACE_S = 2.0
HOLD_S = 1.0
MANY = 12
"""Launched together."""
SAMPLE_EVERY_S = 0.5
HEAL_S, HEAL_EACH_S = 60.0, 0.2
"""All ends are there so soon after the last strike, and a little later for each process that has not ended by then."""
HEALED_AT_ONCE = 200
LEFT_FILES = ("*.flock", "*.lock", "listening")
"""What may be left in the folder ``run`` of a stopped daemon."""
LAST_END_S = 10.0
"""A supervisor gives its lock back, and then it ends."""
BOUND = leaks.Bound(rss_mib=16.0, files=6.0, threads=SLOTS)
"""For as long as it is watched: caches fill, a worker starts a thread for each slot. (What grows by a little with each
process, grows by more in half an hour.)"""
NO_EFFECT = (errors.InvalidStateError, errors.NotDeliveredError, errors.CheckpointNotFoundError, errors.BusyError)
UNKNOWN = (errors.IndeterminateError, errors.ConnectionLostError)
LOOK_S = 0.02


class Soak:
    """One of them, in `folder`."""

    def __init__(self, folder: Path, seed: int, seconds: float) -> None:
        self._folder, self._seed = folder, seed
        self.plan: Plan = plan_of(seed, seconds)
        # The workers are killed from outside: no process is to blame for that.
        config = Config(workers=2, slots=SLOTS, grace_s=GRACE_S, max_crashes=0, import_from=[str(PROJECT)])
        self._profile = Profile.create(folder / "p", config)
        self._journals = folder / "steps"
        self._journals.mkdir()
        self._command = services.command("daemon", self._profile.path)
        self._controllers: list[ProcessController] = []
        self._told: dict[str, Told] = {}
        self._walks: list[str] = []
        self._calls: dict[asyncio.Task[Any], str] = {}
        self._workers = 2
        self._is_watching = False
        self._samples: dict[str, list[leaks.Sample]] = {}
        self.counts: Counter[str] = Counter()
        self.worst: dict[str, float] = {}
        self.wrong: list[str] = []

    async def run(self) -> None:
        await self._start()
        try:
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(CALLERS):
                    self._controllers.append(await stack.enter_async_context(connect(self._profile)))
                watching = asyncio.create_task(self._watch())
                calling = asyncio.create_task(self._call_all())
                try:
                    for strike in self.plan.strikes:
                        await self._until(strike.at_s)
                        await self._strike(strike)
                    await calling
                finally:
                    watching.cancel()
                    calling.cancel()
                    await asyncio.gather(watching, calling, return_exceptions=True)
                self._judge_leaks()
                await self._heal()
                await self._judge_processes()
        finally:
            await self._stop()
        self._judge_what_is_left()

    # --- what the callers do ------------------------------------------------------------------------

    async def _until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, self._begun_s + at_s - time.monotonic()))

    async def _call_all(self) -> None:
        for deed in self.plan.deeds:
            await self._until(deed.at_s)
            self._do(deed)

    def _call(
        self, name: str, coroutine: Coroutine[Any, Any, Any], heard: Callable[[Heard], None] | None = None
    ) -> None:
        """Begin something whose answer is looked at later."""

        async def go_on() -> None:
            begun = time.monotonic()
            answer: Heard = "unknown"
            try:
                await coroutine
                answer = "ok"
            except NO_EFFECT:
                answer = "refused"
                self.counts["calls refused"] += 1
            except UNKNOWN:
                self.counts["calls whose effect is not known"] += 1
            except errors.RemoteError as error:
                self.wrong.append(f"{name}: {error!r}")
            finally:
                if heard is not None:
                    heard(answer)
                self._note_worst("seconds until a call was answered", time.monotonic() - begun)

        task = asyncio.create_task(go_on())
        self._calls[task] = name
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        name = self._calls.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.wrong.append(f"{name}: {error!r}")

    def _do(self, deed: Deed) -> None:
        controller = self._controllers[deed.caller]
        self.counts[f"deeds: {deed.what}"] += 1
        match deed.what:
            case "launch" | "launch many":
                self._launch(controller, deed)
            case "schedule":
                self._schedule(controller, deed)
            case _ if not self._walks:
                pass
            case "list":
                self._call("list", controller.find(Query(limit=50)))
            case "play all":
                self._call("play all", controller.play_all())
            case _:
                self._control(controller, deed)

    def _launch(self, controller: ProcessController, deed: Deed) -> None:
        inputs, told = self._walk(deed.number)
        names = [f"w{len(self._walks) + number}" for number in range(MANY if deed.what == "launch many" else 1)]
        for pid in names:
            self._walks.append(pid)
            self._told[pid] = Told(fails=told.fails, steps=told.steps)
        if deed.what == "launch many":
            jobs: Any = [(Walk, inputs, {"pid": pid}) for pid in names]
            self._call("launch many", controller.launch_many(jobs), lambda answer: self._launched(names, answer))
        else:
            coroutine = controller.launch(Walk, inputs, pid=names[0], priority=deed.number % 3)
            self._call(f"launch {names[0]}", coroutine, lambda answer: self._launched(names, answer))

    def _walk(self, number: int) -> tuple[dict[str, Any], Told]:
        steps, fails = number % 8 + 1, number % 19 == 0
        inputs = {"folder": str(self._journals), "seed": number, "steps": steps, "fails": fails}
        return inputs, Told(fails=fails, steps=steps)

    def _launched(self, pids: Iterable[str], answer: Heard) -> None:
        for pid in pids:
            if answer != "refused":  # (of a batch some may be there)
                self._told[pid].launched = answer if self._told[pid].launched != "ok" else "ok"

    def _schedule(self, controller: ProcessController, deed: Deed) -> None:
        pid = f"schedule-{deed.number}"
        self._told[pid] = Told()
        inputs = Schedule.every(
            "1s", Tick, {"folder": str(self._journals)}, max_runs=deed.number % 4 + 1, catch_up="all", overlap="allow"
        )
        launch = controller.launch(Schedule, inputs, pid=pid)
        self._call(f"launch {pid}", launch, lambda answer: self._launched([pid], answer))

    def _control(self, controller: ProcessController, deed: Deed) -> None:
        pid = self._walks[deed.number % len(self._walks)]
        handle, told = controller.handle(pid), self._told[pid]
        name = f"{deed.what} {pid}"
        match deed.what:
            case "pause":
                self._call(name, handle.pause(quiesced=deed.number % 2 == 0, cascade=deed.number % 5 == 0))
            case "play":
                self._call(name, handle.play(cascade=deed.number % 5 == 0))
            case "kill":
                place = len(told.kills)
                told.kills.append("unknown")
                kill = handle.kill("by chance", force=deed.number % 3 == 0)
                self._call(name, kill, lambda answer: _put(told.kills, place, answer))
            case "send":
                sent = told.notes.setdefault(deed.caller, [])
                note, place = f"{pid} {deed.caller} {len(sent)}", len(sent)
                sent.append((note, "unknown"))
                self._call(name, handle.send("note", note), lambda answer: _put(sent, place, (note, answer)))
            case "update":
                what, place = f"{pid} {len(told.updates)}", len(told.updates)
                told.updates.append((what, "unknown"))
                update = handle.update("apply", what)
                self._call(name, update, lambda answer: _put(told.updates, place, (what, answer)))
            case "resume" | "retry":
                self._call(name, getattr(handle, deed.what)())
            case "ask":
                self._call(name, handle.query("how_far"))
            case "relaunch":
                inputs, _ = self._walk(deed.number)
                again = controller.launch(Walk, {**inputs, "steps": told.steps, "fails": told.fails}, pid=pid)
                self._call(name, again, lambda answer: self._launched([pid], answer))
            case other:
                raise ValueError(other)

    # --- what falls on the services -----------------------------------------------------------------

    async def _start(self) -> None:
        await daemon.start(self._profile, self._workers, command=self._command)
        self._begun_s = time.monotonic() - getattr(self, "_lived_s", 0.0)

    async def _strike(self, strike: Strike) -> None:
        self.counts[f"strikes: {strike.what}"] += 1
        begun = time.monotonic()
        match strike.what:
            case "kill a worker":
                await self._kill(self._a_worker(strike.number))
            case "kill another worker":
                await self._kill(self._a_worker(strike.number, spared=SPARED))
            case "kill all workers":
                for name in self._running_workers():
                    await self._kill(name)
            case "kill the broker":
                await self._kill("broker")
            case "kill broker and worker":
                await self._kill("broker")
                await self._kill(self._a_worker(strike.number))
            case "kill the supervisor":
                await self._kill("daemon")
                await asyncio.sleep(strike.number % 3 / 2)
                await daemon.start(self._profile, command=self._command)
            case "scale up" | "scale down":
                self._workers += 1 if strike.what == "scale up" else -1
                self._workers = min(max(self._workers, 1), MAX_WORKERS)
                daemon.scale(self._profile, self._workers)
            case "reload":
                await daemon.reload(self._profile, broker=strike.number % 2 == 0, wait=False)
            case "stop a worker for a moment":
                await self._hold(self._a_worker(strike.number))
            case "stop and start":
                await daemon.stop(self._profile)
                self.wrong += [f"after a stop: {line}" for line in self._look_at_file()]
                await daemon.start(self._profile, self._workers, command=self._command)
            case other:
                raise ValueError(other)
        self._note_worst(f"seconds of: {strike.what}", time.monotonic() - begun)

    def _running_workers(self) -> list[str]:
        return sorted(name for name in daemon.status(self._profile).services if name.startswith("worker-"))

    def _a_worker(self, number: int, spared: str = "") -> str | None:
        names = [name for name in self._running_workers() if name != spared]
        return names[number % len(names)] if names else None

    async def _kill(self, name: str | None) -> None:
        """SIGKILL, and wait until it is gone."""
        holder = read_holder(self._profile.lock(name)) if name is not None else None
        if name is None or holder is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder.pid, signal.SIGKILL)
        while read_holder(self._profile.lock(name)) == holder:
            await asyncio.sleep(LOOK_S)

    async def _hold(self, name: str | None) -> None:
        """SIGSTOP, for less than its lease."""
        holder = read_holder(self._profile.lock(name)) if name is not None else None
        if holder is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder.pid, signal.SIGSTOP)
                await asyncio.sleep(HOLD_S)
                os.kill(holder.pid, signal.SIGCONT)

    # --- leaks --------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """In the second half: each service, as long as it is the same."""
        await self._until(self.plan.seconds / 2)
        pids: dict[str, int] = {}
        while True:
            now = daemon.status(self._profile)
            holders = {**now.services, **({"supervisor": now.daemon} if now.daemon is not None else {})}
            for name, holder in holders.items():
                if name not in ("broker", "supervisor", SPARED):
                    continue
                if pids.setdefault(name, holder.pid) != holder.pid:
                    self._samples.pop(name, None)
                    pids[name] = holder.pid
                if (seen := leaks.sample(holder.pid, time.monotonic())) is not None:
                    self._samples.setdefault(name, []).append(seen)
            await asyncio.sleep(max(SAMPLE_EVERY_S, self.plan.seconds / 1000))

    def _judge_leaks(self) -> None:
        for name, samples in self._samples.items():
            watched_s = samples[-1].at_s - samples[0].at_s
            self.counts["services watched for leaks"] += 1
            for what, by in leaks.growth(samples)._asdict().items():
                self._note_worst(f"growth of the {name} in {watched_s:.0f} s: {what}", by)
            self._note_worst(f"memory of the {name}, MiB", max(each.rss_mib for each in samples))
        if len(self._samples) < 3:
            self.wrong.append(f"only {sorted(self._samples)} were watched for leaks")
        self.wrong += leaks.complaints(self._samples, BOUND)

    # --- the end ------------------------------------------------------------------------------------

    async def _heal(self) -> None:
        """Two workers; everything plays to its end; every call is answered."""
        daemon.scale(self._profile, 2)
        controller = self._controllers[0]
        for pid, told in self._told.items():
            if told.launched == "unknown" and pid in self._walks:  # to say it again is harmless (G6)
                inputs = {"folder": str(self._journals), "seed": 1, "steps": told.steps, "fails": told.fails}
                self._call(
                    f"launch {pid}", controller.launch(Walk, inputs, pid=pid), lambda a, p=pid: self._launched([p], a)
                )  # type: ignore[misc]
        begun = time.monotonic()
        left = (await controller.broker_statistics())["processes"]
        many = sum(count for state, count in left.items() if state in ("created", "running", "waiting"))
        self.counts["processes that had not ended when the last strike had fallen"] += many
        try:
            async with asyncio.timeout(HEAL_S + HEAL_EACH_S * many):
                while rows := await controller.find(Query(unfinished=True, limit=1000)):
                    await controller.play_all()
                    await _each(rows, lambda row: self._wake(controller.handle(row.pid), row))
                while self._calls:
                    await asyncio.wait(list(self._calls))
        except TimeoutError:
            self.wrong += [f"does not end: {_shown(row)}" for row in rows[:5]]
            self.wrong += [f"no answer: {name}" for name in list(self._calls.values())[:5]]
        for task in list(self._calls):
            task.cancel()
        self._note_worst("seconds until all had ended", time.monotonic() - begun)

    async def _wake(self, handle: ProcessHandle, row: Record) -> None:
        """Whatever it waits for that only somebody else can give."""
        with contextlib.suppress(*NO_EFFECT):
            if row.aside is not None:
                self.counts["processes set aside, and continued"] += 1
                await handle.retry()
            elif row.state == "waiting" and row.owner is None and row.wake_at is None and not row.waits:
                if row.names and not row.mail:
                    told = self._told.setdefault(row.pid, Told())
                    sent = told.notes.setdefault(-1, [])
                    sent.append((f"{row.pid} end {len(sent)}", "unknown"))
                    await handle.send("note", sent[-1][0])
                elif not row.names:
                    await handle.resume()

    async def _judge_processes(self) -> None:
        controller = self._controllers[0]
        ends: list[End] = []
        async for handle in controller.processes():
            ends.append(End(handle.pid, ""))
        self.counts["processes"] = len(ends)
        found: list[End] = []

        async def look(end: End) -> None:
            handle = controller.handle(end.pid)
            record, history = await handle.record(), await handle.history()
            outputs: Mapping[str, Any] = {}
            if record.result is not None:
                outputs = dict(ProcessResult.from_data(decode_data(record.result)).outputs)
            found.append(End(record.pid, record.state, record.parent, outputs))
            self.counts[f"processes: {record.state}"] += 1
            self.counts["claims"] += sum(event.subject == "claimed" for event in history)
            self.wrong += [f"{end.pid}: {what}" for what in broken_links(history)]
            self.wrong += [f"{end.pid}: {who} wrote after somebody else had claimed it" for who in returned(history)]

        await _each(ends, look)
        steps = self._steps()
        self.counts["steps"] = sum(map(len, steps.values()))
        again = sum(len(numbers) - len(set(numbers)) for numbers in steps.values())
        self.counts["steps that ran again (cut off by a kill, or to be retried)"] = again
        callers = {
            pid: told for pid, told in self._told.items() if told.steps is not None or pid.startswith("schedule")
        }
        self.wrong += judge(callers, found, steps)
        for end in found:
            if end.pid.startswith("schedule-") and end.parent is None:
                self.wrong += missed_runs(end, found)

    def _steps(self) -> dict[str, list[int]]:
        return {
            file.name.removesuffix(SUFFIX): [int(line.rpartition(":")[2]) for line in file.read_text().splitlines()]
            for file in self._journals.glob(f"*{SUFFIX}")
        }

    async def _stop(self) -> None:
        try:
            await daemon.stop(self._profile)
        except errors.PrunusError as error:
            self.wrong.append(f"the daemon does not stop: {error}")

    def _judge_what_is_left(self) -> None:
        self.wrong += self._look_at_file()
        if not self.wrong:
            with contextlib.closing(sqlite3.connect(self._profile.database)) as connection:
                self.wrong += left_behind(connection)
        end = time.monotonic() + LAST_END_S
        while (programs := self._programs()) and time.monotonic() < end:
            time.sleep(LOOK_S)
        self.wrong += [f"still there: {program}" for program in programs]
        files = [file for file in self._profile.run_folder.iterdir() if not any(map(file.match, LEFT_FILES))]
        self.wrong += [f"left in run/: {file.name}" for file in files]
        if self._profile.blobs.exists() and (
            blobs := [file for file in self._profile.blobs.rglob("*") if file.is_file()]
        ):
            self.wrong.append(f"{len(blobs)} blobs are left")
        audit = self._profile.path / services.FILE
        for line in audit.read_text().splitlines() if audit.exists() else ():
            if line.startswith("looked "):
                self.counts["commits looked at"] += int(line.split()[1])
            else:
                self.wrong.append(f"after a commit: {line}")

    def _look_at_file(self) -> list[str]:
        """What must hold of the database of a daemon that has stopped."""
        with contextlib.closing(sqlite3.connect(self._profile.database)) as connection:
            unwatched = [f"nobody watches {row}" for row in connection.execute(UNWATCHED)]
            unwatched += violations(connection, TasksOnDisk(connection))
            return unwatched + [f"somebody holds {row}" for row in connection.execute(OWNERS)]

    def _programs(self) -> list[str]:
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if str(self._profile.path) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(" ".join(words))
        return found

    def kill_all(self) -> None:
        """Whatever happened: nothing of it goes on."""
        for process in psutil.process_iter(["cmdline"]):
            if str(self._profile.path) in (process.info["cmdline"] or []):
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def logs(self) -> list[str]:
        """The last warnings of each service."""
        lines = []
        for file in sorted(self._profile.log_folder.iterdir()):
            bad = [
                line
                for line in file.read_text(errors="replace").splitlines()
                if " CRITICAL " in line or "Traceback" in line
            ]
            lines += [f"log of {file.stem}: {line}" for line in bad[-3:]]
        return lines

    def _note_worst(self, what: str, value: float) -> None:
        self.worst[what] = max(value, self.worst.get(what, value))


def _shown(row: Record) -> str:
    names = ("pid", "state", "play", "step", "owner", "waits", "names", "wake_at", "aside")
    return ", ".join(f"{name}={value!r}" for name in names if (value := getattr(row, name)))


def _put(values: list[Any], place: int, value: Any) -> None:
    values[place] = value


async def _each(things: Iterable[Any], act: Callable[[Any], Awaitable[None]]) -> None:
    """With all of them, some at a time."""
    left = iter(things)

    async def some() -> None:
        for thing in left:
            await act(thing)

    await asyncio.gather(*(some() for _ in range(HEALED_AT_ONCE)))


def run(seed: int, size: int) -> Batch:
    """A soak of `size` seconds, and some more until all has ended."""
    with quiet(), tempfile.TemporaryDirectory(prefix="pr-", ignore_cleanup_errors=True) as folder:
        soak = Soak(Path(folder), seed, float(size))
        try:
            asyncio.run(soak.run())
        except Exception as error:
            soak.wrong.append(f"the soak ended with {error!r}")
        finally:
            logs = soak.logs() if soak.wrong else []
            soak.kill_all()
    return Batch.of(size, [*soak.wrong, *logs], dict(sorted(soak.counts.items())), dict(sorted(soak.worst.items())))
