"""A worker: one event loop that holds up to `slots` processes, and a communicator with its own thread.

The order of a stop (SIGTERM, SIGINT or `Worker.stop`), and why:

1. take no new tasks (credit 0): the broker offers them to others at once;
2. every process in hand is checkpointed and given back when its step ends; connections stay up meanwhile;
3. after `grace_s` the steps that still run are cancelled and their processes given back as they were checkpointed
   last: those steps run again elsewhere;
4. only then the communicator closes.

A worker that is killed does none of this. Its tasks go to others as soon as the broker knows that it is dead, and
its processes continue from their last checkpoints.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prunus.errors import ConnectionLostError, PrunusError
from prunus.messaging.communicator import Communicator, IncomingTask
from prunus.runtime.backend import CONTROL_LANE, RUN_LANE, Backend, letter_subject
from prunus.runtime.launcher import Launcher

BROKER_PATIENCE_S = 60.0
"""How long a worker waits for its broker when it starts: services may be started in any order."""
QUIET_S = 1.0
"""A wait that takes longer is said in the log."""
LAST_THREADS_S = 1.0
"""How long a stopped worker waits for plain steps that still run in their threads."""
GIVE_BACK_S = 2.0
"""How long a stopping worker waits for the broker's word that a process was given back."""
MAX_STEP_THREADS = 256
"""How many plain steps run at the same time in one worker, if it has as many slots."""
CONTROL_SLOTS = 4
"""How many processes may be activated at the same time just to read their letters."""

logger = logging.getLogger(__name__)


class Worker:
    """Takes tasks from both lanes until it is stopped."""

    def __init__(
        self, communicator: Communicator, *, slots: int, grace_s: float, modules: Sequence[str] = ("*",)
    ) -> None:
        self._communicator = communicator
        self._slots = slots
        self._grace_s = grace_s
        self._launcher = Launcher(Backend(communicator), modules=modules)
        self._stop = asyncio.Event()
        self.ready = asyncio.Event()
        """Set when the broker knows that this worker takes processes."""
        self._handling: set[asyncio.Task[None]] = set()
        self._reading: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Begin the graceful stop; `run` returns when it is done. Idempotent."""
        self._stop.set()

    async def run(self) -> None:
        """Work until `stop`. The caller closes the communicator then: with it the subscriptions end."""
        communicator = self._communicator
        await communicator.add_broadcast_subscriber(self._launcher.nudged, subject=letter_subject(communicator.session))
        await communicator.add_rpc_subscriber(self._launcher.asked, communicator.session)
        forget = communicator.on_reconnect(self._reconnected)
        lanes = [
            await communicator.add_task_subscriber(self._handle, queue=RUN_LANE, credit=self._slots),
            await communicator.add_task_subscriber(self._handle, queue=CONTROL_LANE, credit=CONTROL_SLOTS),
        ]
        logger.info("taking processes: %d slots", self._slots)
        self.ready.set()
        try:
            await self._stop.wait()
        finally:
            self._launcher.stop()
            logger.info("stopping: %d processes are given back as their steps end", len(self._launcher.runners))
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
        try:
            await self._launcher.handle(task)
        finally:
            self._handling.discard(current)

    async def _drain(self) -> None:
        if not self._handling:
            return
        _, late = await asyncio.wait(self._handling, timeout=self._grace_s)
        for task in late:
            task.cancel()
        if late:
            logger.warning(
                "%d steps did not end within %.1f s: they will run again elsewhere", len(late), self._grace_s
            )
            await asyncio.wait(late, timeout=GIVE_BACK_S)


async def serve(profile: Path, name: str, *, patience_s: float = BROKER_PATIENCE_S) -> None:
    """Run the worker `name` of a profile until SIGTERM or SIGINT.

    Raises `ConnectionLostError` if no broker answers within `patience_s`.
    """
    from prunus.runtime.profile import Profile

    where = Profile.load(profile)
    for folder in reversed(where.import_folders):
        sys.path.insert(0, str(folder))
    communicator = await _connect(where.endpoint, name, patience_s)
    config = where.config
    worker = Worker(communicator, slots=config.slots, grace_s=config.grace_s, modules=config.modules)
    loop = asyncio.get_running_loop()
    threads = ThreadPoolExecutor(min(config.slots, MAX_STEP_THREADS), thread_name_prefix="step")
    loop.set_default_executor(threads)  # where plain `def` steps run
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, worker.stop)
    try:
        await worker.run()
    finally:
        await communicator.close()
        _leave_threads(threads)


async def _connect(endpoint: str, name: str, patience_s: float) -> Communicator:
    from prunus.messaging.zeromq import connect_zmq

    try:
        return await connect_zmq(endpoint, name=name, timeout_s=min(QUIET_S, patience_s))
    except ConnectionLostError:
        if patience_s <= QUIET_S:
            raise
    logger.warning("no broker answers at %s yet; waiting for one, for up to %.0f s", endpoint, patience_s)
    return await connect_zmq(endpoint, name=name, timeout_s=patience_s - QUIET_S)


def _leave_threads(threads: ThreadPoolExecutor) -> None:
    """A thread can't be cancelled. One that is still in a step would keep this process alive for as long as it likes,
    though its process was given back: the process ends without it."""
    waiting = threading.Thread(target=threads.shutdown, name="prunus-last-threads", daemon=True)
    waiting.start()
    waiting.join(LAST_THREADS_S)
    if waiting.is_alive():
        logger.warning("a plain step still runs in its thread; it ends with this worker, and runs again elsewhere")
        logging.shutdown()
        os._exit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m prunus.runtime.worker --profile FOLDER --name worker-1``."""
    from prunus.runtime.locks import ServiceLock
    from prunus.runtime.profile import Profile

    parser = argparse.ArgumentParser(prog="prunus-worker")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--name", default="worker-1")
    parser.add_argument("--patience", type=float, default=BROKER_PATIENCE_S, help="seconds to wait for the broker")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    try:
        with ServiceLock(Profile.load(options.profile).lock(options.name)):
            asyncio.run(serve(options.profile, options.name, patience_s=options.patience))
    except PrunusError as error:
        logger.critical("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
