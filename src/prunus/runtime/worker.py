"""A worker: one event loop that holds up to `slots` processes, and a communicator.

**Slots.** A worker of several queues has one number of slots for all of them: its subscriptions share their credit, so
the broker, which alone knows what waits where, gives a free slot to the first queue (in the order in which they were
named) that has work. Nothing is fetched ahead: what is not in a slot stays with the broker, for whoever is free first.
Letters to processes that nobody holds come on a lane of their own.

The order of a stop (SIGTERM, SIGINT, SIGUSR1, its `Walltime` or `Worker.stop`), and why:

1. take no new tasks (credit 0): the broker offers them to others at once;
2. every process in hand is checkpointed and given back when its step ends; connections stay up meanwhile;
3. after `grace_s` (at once, when it is told a second time) the steps that still run are cancelled and their processes
   given back as they were checkpointed last: those steps run again elsewhere;
4. only then the communicator closes.

A worker that is killed does none of this. Its tasks go to others as soon as the broker knows that it is dead, and
its processes continue from their last checkpoints. So do those of a worker whose loop has not turned for `MAX_BLOCK_S`:
it lives, but nobody could tell it anything; it stops renewing its lease.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prunus.errors import BusyError, ConnectionLostError, MessagingError, ProfileError, PrunusError
from prunus.messaging.communicator import DEFAULT_QUEUE, Communicator, IncomingTask
from prunus.processes import Process
from prunus.runtime.backend import CONTROL_LANE, Backend, letter_subject
from prunus.runtime.idle import until_idle
from prunus.runtime.launcher import Launcher
from prunus.runtime.remote import Connections
from prunus.runtime.walltime import Walltime
from prunus.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from prunus.messaging.keys import ClientKey
    from prunus.messaging.threaded import ThreadedCommunicator
    from prunus.runtime.profile import Profile

BROKER_PATIENCE_S = 60.0
"""How long a worker waits for its broker when it starts: services may be started in any order."""
QUIET_S = 3.0
"""A wait that takes longer is said in the log."""
BUSY_PAUSE_S = 2.0
"""How soon a worker asks again whether a full broker has room."""
THREAD_PREFIX = "prunus-step"
THREADS_INTERVAL_S = 0.02
LAST_THREADS_S = 1.0
"""How long a stopped worker waits for plain steps that still run in their threads."""
GIVE_BACK_S = 2.0
"""How long a stopping worker waits for the broker's word that a process was given back."""
MAX_STEP_THREADS = 256
"""How many plain steps run at the same time in one worker, if it has as many slots."""
CONTROL_SLOTS = 4
"""How many processes may be activated at the same time just to read their letters."""
MAX_BLOCK_S = 600.0
"""A worker whose loop does not turn for so long loses its processes to others."""
CLOCK_INTERVAL_S = 30.0
"""How often the wall clock is looked at, which may have been set."""
HOME_INTERVAL_S = 2.0
"""How often it is looked whether the profile is still there."""

Ended = Literal["stopped", "idle", "walltime"]
"""Why a worker ended: it was told to, there was nothing left to do, or its time was over."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a worker works."""

    slots: int = 16
    grace_s: float = 10.0
    modules: Sequence[str] = ("*",)
    queues: Sequence[str] = (DEFAULT_QUEUE,)
    """In the order of preference."""
    ends_at: float | None = None
    """When it has to be gone (wall clock, seconds since 1970)."""
    idle_grace_s: float | None = None
    """It ends when it was idle for so long (see `idle`); None: it does not."""
    max_block_s: float = MAX_BLOCK_S
    endpoints: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Hosts that its processes may ask for a connection to; ..."""
    base: Path | None = None
    """... paths in these begin here."""

    @classmethod
    def of(cls, profile: Profile, **changes: Any) -> Settings:
        """Those of a profile, but for some; `ProfileError` for a queue that is none."""
        config = profile.config
        if CONTROL_LANE in config.queues:
            raise ProfileError(
                f"{profile.path / 'config.yaml'}: queues: {CONTROL_LANE!r} is no queue for processes; leave it out: "
                "each worker serves it"
            )
        said: dict[str, Any] = {
            "slots": config.slots,
            "grace_s": config.grace_s,
            "modules": config.modules,
            "queues": config.queues,
            "endpoints": config.endpoints,
            "base": profile.path,
        }
        return cls(**said | changes)


class Worker:
    """Takes tasks from its queues and from the control lane until it is stopped."""

    def __init__(
        self,
        communicator: Communicator,
        *,
        slots: int,
        grace_s: float,
        modules: Sequence[str] = ("*",),
        queues: Sequence[str] = (DEFAULT_QUEUE,),
        walltime: Walltime | None = None,
        clock: Callable[[], float] = time.time,
        connections: Connections | None = None,
    ) -> None:
        """`clock` is the wall clock that the `walltime` is measured by. `connections` are those that its processes may
        ask for; they are its caller's to close."""
        self._communicator = communicator
        self._slots = slots
        self._grace_s = grace_s
        self._queues = tuple(dict.fromkeys(queues))
        self._walltime, self._clock = walltime, clock
        self._connections = connections
        may_begin = None if walltime is None else self._fits
        self._launcher = Launcher(Backend(communicator), modules=modules, may_begin=may_begin)
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()
        self.ready = asyncio.Event()
        """Set when the broker knows that this worker takes processes."""
        self.ended: Ended = "stopped"
        """Why it stops."""
        self._handling: set[asyncio.Task[None]] = set()
        self._reading: set[asyncio.Task[None]] = set()

    @property
    def in_hand(self) -> int:
        """How many tasks it works on."""
        return len(self._handling)

    def stop(self, reason: Ended = "stopped") -> None:
        """Begin the graceful stop; `run` returns when it is done. Idempotent: the first reason counts."""
        if not self._stop.is_set():
            self.ended = reason
            self._stop.set()

    def hurry(self) -> None:
        """Stop, and give no time to steps that still run."""
        self.stop()
        self._hurry.set()

    def signalled(self) -> None:
        """Stop; when it is said again, in a hurry."""
        if self._stop.is_set():
            self.hurry()
        self.stop()

    async def run(self) -> None:
        """Work until `stop`. The caller closes the communicator then: with it the subscriptions end."""
        communicator, queues = self._communicator, self._queues
        await communicator.add_broadcast_subscriber(self._launcher.nudged, subject=letter_subject(communicator.session))
        await communicator.add_rpc_subscriber(self._launcher.asked, communicator.session)
        forget = communicator.on_reconnect(self._reconnected)
        share = len(queues) > 1
        lanes = [
            await communicator.add_task_subscriber(self._handle, queue=queue, credit=self._slots, shared=share)
            for queue in queues
        ]
        lanes.append(await communicator.add_task_subscriber(self._handle, queue=CONTROL_LANE, credit=CONTROL_SLOTS))
        logger.info("taking processes from %s: %d slots", ", ".join(queues), self._slots)
        self.ready.set()
        try:
            async with _beside(self._end_in_time()):
                await self._stop.wait()
        finally:
            self._launcher.stop()
            grace_s = 0.0 if self._hurry.is_set() else self._grace_s
            logger.info("stopping: %s", _what_is_given_back(len(self._launcher.runners), grace_s))
            # Said, but not waited for: there may be no broker now, and the steps' time runs.
            telling = [asyncio.create_task(lane.set_credit(0)) for lane in lanes]
            await self._drain()
            for task in telling:
                task.cancel()
            await asyncio.gather(*telling, return_exceptions=True)
            forget()

    def _reconnected(self) -> None:
        reading = asyncio.create_task(self._launcher.read_all_letters())
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)

    async def _handle(self, task: IncomingTask) -> None:
        current = asyncio.current_task()
        assert current is not None, "handlers run in tasks"
        self._handling.add(current)
        if self._connections is not None:
            self._connections.use()
        try:
            await self._launcher.handle(task)
        finally:
            self._handling.discard(current)

    async def _drain(self) -> None:
        handling = set(self._handling)
        if not handling:
            return
        ending = asyncio.create_task(asyncio.wait(handling, timeout=self._grace_s))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((ending, hurry), return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        hurry.cancel()
        late = {task for task in handling if not task.done()}
        for task in late:
            task.cancel()
        if late:
            why = "was told to hurry" if self._hurry.is_set() else f"waited for {self._grace_s:.1f} s"
            number = "1 step has" if len(late) == 1 else f"{len(late)} steps have"
            logger.warning("%s not ended, and this worker %s: what was cut off runs again elsewhere", number, why)
            await asyncio.wait(late, timeout=GIVE_BACK_S)

    # --- its time -----------------------------------------------------------------------------------

    async def _end_in_time(self) -> None:
        if (walltime := self._walltime) is None:
            return
        while (left_s := walltime.left_s(self._clock())) > 0:  # noqa: ASYNC110 (nothing tells that the clock was set)
            await asyncio.sleep(min(left_s, CLOCK_INTERVAL_S))
        now = self._clock()
        self._grace_s = walltime.grace_s(self._grace_s, now)
        logger.info(
            "this worker has to be gone in %.0f s: it takes no more processes", max(0.0, walltime.ends_at - now)
        )
        self.stop("walltime")

    def _fits(self, process: Process) -> bool:
        """Whether the next step of a process ends in time, as far as it says how long it takes."""
        assert self._walltime is not None, "asked only if there is one"
        options = type(process).steps().get(process.next_step or "")
        return self._walltime.fits(None if options is None else options.timeout_s, self._clock())


# --- the program ------------------------------------------------------------------------------------


async def serve(
    place: Profile | ClientKey, name: str, settings: Settings, *, patience_s: float = BROKER_PATIENCE_S
) -> tuple[Ended, Mapping[str, int] | None]:
    """Be the worker `name` of a profile, or of the broker on a network that a key is for, until a signal, idleness or
    the end of its time. Returns why it ended, and how many processes are in each state (None: nobody says).

    Raises `ConnectionLostError` if no broker answers within `patience_s`, what the broker refuses this worker with (say
    `KeyRefusedError`, also if the key is revoked meanwhile), and `ProfileError` if the profile is deleted meanwhile.
    The caller ends with `leave_threads`.
    """
    from prunus.messaging.keys import ClientKey

    loop, me = asyncio.get_running_loop(), asyncio.current_task()
    assert me is not None, "this runs in a task"
    is_told = False

    def leave() -> None:
        nonlocal is_told
        is_told = True
        me.cancel()

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    for signum in signals:
        loop.add_signal_handler(signum, leave)
    try:
        communicator = await wait_for_broker(
            place if isinstance(place, ClientKey) else place.endpoint, name, patience_s
        )
    except BaseException as error:
        for signum in signals:
            loop.remove_signal_handler(signum)
        if is_told and isinstance(error, asyncio.CancelledError):
            return "stopped", None
        raise
    connections = Connections(settings.endpoints, settings.base)
    now = time.time()
    walltime = None if settings.ends_at is None else Walltime.of(settings.ends_at, settings.grace_s, now)
    worker = Worker(
        communicator,
        slots=settings.slots,
        grace_s=settings.grace_s,
        modules=settings.modules,
        queues=settings.queues,
        walltime=walltime,
        connections=connections,
    )
    threads = _StepThreads(min(settings.slots, MAX_STEP_THREADS), thread_name_prefix=THREAD_PREFIX)
    loop.set_default_executor(threads)  # where plain `def` steps run
    for signum in signals:
        loop.add_signal_handler(signum, worker.signalled)
    try:
        with Watchdog() as watchdog:
            communicator.speak_only_while(lambda: watchdog.silent_s() < settings.max_block_s)
            async with contextlib.AsyncExitStack() as beside:
                deleted = asyncio.Event()
                if not isinstance(place, ClientKey):
                    await beside.enter_async_context(_beside(_until_deleted(place.path, deleted, worker)))
                if settings.idle_grace_s is not None:
                    await beside.enter_async_context(_beside(_end_when_idle(worker, communicator, settings)))
                await beside.enter_async_context(_beside(_until_refused(communicator, worker)))
                await worker.run()
                if communicator.failure is not None:
                    raise communicator.failure
                if deleted.is_set():
                    raise ProfileError("the profile of this worker was deleted: there is nothing left to work for")
            return worker.ended, await _counts(communicator)
    finally:
        for signum in signals:
            loop.remove_signal_handler(signum)
        try:
            await connections.close()
        finally:
            await communicator.close()
            await threads.end()


async def _end_when_idle(worker: Worker, communicator: Communicator, settings: Settings) -> None:
    await worker.ready.wait()
    queues = (*settings.queues, CONTROL_LANE)
    await until_idle(communicator, queues, settings.idle_grace_s or 0.0, has_work=lambda: worker.in_hand > 0)
    worker.stop("idle")


async def _until_refused(communicator: ThreadedCommunicator, worker: Worker) -> None:
    """Stop the worker when the broker wants no more of it: its processes are those of others by then."""
    await communicator.ended()
    worker.hurry()


async def _until_deleted(folder: Path, deleted: asyncio.Event, worker: Worker) -> None:
    """Stop the worker when this folder is gone, or is another one."""
    found = _which(folder)
    while _which(folder) in (found, None):  # noqa: ASYNC110 (a folder has no event)
        await asyncio.sleep(HOME_INTERVAL_S)
    deleted.set()
    worker.hurry()


def _which(folder: Path) -> tuple[int, int] | None:
    """Which folder this is: (0, 0) if there is none, None if that can't be seen at the moment."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return (0, 0)
    except OSError:
        return None
    return status.st_dev, status.st_ino


async def _counts(communicator: Communicator) -> Mapping[str, int] | None:
    try:
        async with asyncio.timeout(GIVE_BACK_S):
            counts: dict[str, int] = (await Backend(communicator).statistics())["processes"]
            return counts
    except (MessagingError, TimeoutError):
        return None


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Do something else meanwhile; it ends with the block. If it fails the log says so, and the block goes on."""
    task = asyncio.create_task(work)
    task.add_done_callback(_say_failure)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _what_is_given_back(number: int, grace_s: float) -> str:
    """What a worker that stops still has to do."""
    if not number:
        return "no process is in hand"
    if not grace_s:
        return f"{'1 process in hand is' if number == 1 else f'{number} processes in hand are'} let go at once"
    which = "1 process is given back when its step ends" if number == 1 else f"{number} processes are given back as "
    which += "" if number == 1 else "their steps end"
    return f"{which}, within {grace_s:g} s; a second signal gives back at once"


def _say_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("this worker goes on without %s", task.get_coro(), exc_info=error)


async def wait_for_broker(place: str | ClientKey, name: str, patience_s: float) -> ThreadedCommunicator:
    """As soon as there is a broker that has room. Raises what the last attempt raised."""
    from prunus.messaging.connecting import connect_to

    end_s, timeout_s = time.monotonic() + patience_s, min(QUIET_S, patience_s)
    while True:
        try:
            return await connect_to(place, name=name, timeout_s=timeout_s)
        except (BusyError, ConnectionLostError) as error:
            timeout_s = end_s - time.monotonic()
            pause_s = BUSY_PAUSE_S if isinstance(error, BusyError) else 0.0
            if timeout_s <= pause_s:
                raise
            logger.warning("%s; waiting for a broker, for up to %.0f s in all", error, patience_s)
            await asyncio.sleep(pause_s)


class _StepThreads(ThreadPoolExecutor):
    """The threads in which plain `def` steps run. They can't be cancelled, so nobody waits for them for ever."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)

    async def end(self) -> None:
        """Give those that still run a moment."""
        self.shutdown()
        deadline = time.monotonic() + LAST_THREADS_S
        while threads_with_steps() and time.monotonic() < deadline:  # noqa: ASYNC110 (a thread sets no event)
            await asyncio.sleep(THREADS_INTERVAL_S)


def threads_with_steps() -> list[threading.Thread]:
    """Those of a stopped worker in which a plain step still runs."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_PREFIX)]


def leave_threads(code: int) -> None:
    """End this process with this exit code if a plain step of a stopped worker still runs in its thread: that would
    keep it alive for as long as it likes, though its process was given back. Otherwise nothing happens."""
    if threads_with_steps():
        logger.warning("a plain step still runs in its thread; it ends with this worker, and runs again elsewhere")
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m prunus.runtime.worker --profile FOLDER --name worker-1``: a worker of a daemon."""
    from prunus.runtime import logs
    from prunus.runtime.locks import ServiceLock
    from prunus.runtime.profile import Profile

    parser = argparse.ArgumentParser(prog="prunus-worker")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--name", default="worker-1")
    parser.add_argument("--patience", type=float, default=BROKER_PATIENCE_S, help="seconds to wait for the broker")
    parser.add_argument("--max-block", type=float, default=MAX_BLOCK_S, help="seconds that its loop may stand still")
    options = parser.parse_args(arguments)
    logs.configure(options.profile, options.name)
    try:
        profile = Profile.load(options.profile)
        for folder in reversed(profile.import_folders):
            sys.path.insert(0, str(folder))
        with ServiceLock(profile.lock(options.name)) as lock:
            settings = Settings.of(profile, max_block_s=options.max_block)
            asyncio.run(lock.kept(serve(profile, options.name, settings, patience_s=options.patience)))
    except PrunusError as error:
        logger.critical("%s", error)
        leave_threads(1)
        sys.exit(1)
    leave_threads(0)


if __name__ == "__main__":
    main()
