"""From a task that says "look at this process" to a runner for it: the same code for a first launch and a recovery.

A process that can't be continued (its class is gone, its checkpoint is damaged or newer than this Prunus) is
set aside with the reason: it is neither lost nor tried again and again. `prunus doctor` lists it, `prunus retry`
continues it once the cause is mended.

A *suspect* is one step away from being set aside because its workers died: its step runs on a worker that has no other
suspect in hand, so that only the guilty one is there when that happens once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence

from prunus.errors import (
    BusyError,
    CheckpointNotFoundError,
    CommunicatorClosedError,
    ConnectionLostError,
    Failure,
    IndeterminateError,
    KeyRefusedError,
    NotDeliveredError,
    PersistenceError,
    ProcessClassNotFoundError,
    ShuttingDownError,
    SpecError,
    StaleOwnerError,
    StoreFullError,
    TaskRejectedError,
)
from prunus.messaging.broker import OWN_TASKS
from prunus.messaging.communicator import Broadcast, IncomingTask
from prunus.persistence import requests
from prunus.persistence.checkpoint import decode_checkpoint, decode_data, type_loader
from prunus.persistence.persister import Claim, Record
from prunus.processes import Process
from prunus.processes.loading import load_class
from prunus.runtime.backend import CONTROL_LANE, Backend
from prunus.runtime.kills import find_kill, killed
from prunus.runtime.letters import encode_answer
from prunus.runtime.runner import Runner

logger = logging.getLogger(__name__)

OWN_MODULES = "prunus.*"
"""Processes of Prunus itself (`prunus.runtime.schedules`) are always allowed."""
NOT_HERE = b""
"""The answer of a worker that does not hold the process (any more)."""
NO_PROCESS = "it is about no process, and workers run nothing else; subscribe to its queue, or delete it"
"""Why a task that somebody sent by hand goes back."""
APART = "workers died in its step, and in that of another process that runs here now"
"""Why a worker does not take a process just now."""
UNFIT_PAUSE_S = 0.25
"""So long a slot is busy with a process whose next step does not fit into what is left of this worker's time. It goes
back untouched, is offered a little later, first to the worker with the most free slots, and could be here again."""


class Launcher:
    """The task handler of a worker."""

    def __init__(
        self,
        backend: Backend,
        *,
        modules: Sequence[str] = ("*",),
        may_begin: Callable[[Process], bool] | None = None,
    ) -> None:
        """`may_begin` says whether the next step of a process may begin here (None: each)."""
        self._backend = backend
        self._may_begin = may_begin
        self._modules = (*modules, OWN_MODULES)
        self._load_type = type_loader(modules)
        self._stopping = False
        self.runners: dict[str, Runner] = {}
        """The processes that this worker holds now, by pid."""
        self._suspect: IncomingTask | None = None
        """The task of the one that is in hand."""
        self._nudges = 0
        """How many were heard: a process that is claimed just now has no runner yet that would hear its own."""

    def stop(self) -> None:
        """Start nothing new; every process in hand is given back at its next safe point."""
        self._stopping = True
        for runner in self.runners.values():
            runner.stop()

    async def nudged(self, nudge: Broadcast) -> None:
        """The broker says that there is a letter for a process that this worker holds."""
        self._nudges += 1
        runner = self.runners.get(nudge.sender or "")
        if runner is not None:
            await runner.read_letters()

    async def read_all_letters(self) -> None:
        """Nudges may have been missed: look for every process in hand."""
        self._nudges += 1
        for runner in list(self.runners.values()):
            with contextlib.suppress(*_NOT_ITS_FAULT):  # then at its next safe point
                await runner.read_letters()

    async def asked(self, question: bytes) -> bytes:
        """Answer a query of a process that this worker holds, from the living object."""
        asked = decode_data(question, self._load_type)
        runner = self.runners.get(asked["pid"])
        if runner is None:
            return NOT_HERE
        try:
            return encode_answer(runner.process.query(asked["name"], *asked["args"], **asked["kwargs"]))
        except Exception as error:  # the user's query: its caller is told
            return encode_answer(failure=Failure.of(error))

    async def handle(self, task: IncomingTask) -> None:
        """Look at the process that `task` is about, and drive it as far as it goes.

        Raises `TaskRejectedError` if nobody knows how that ended, or if it is about no process: the task stays, for who
        can do something with it, and the next look will show it.
        """
        pid = task.key
        if pid is None:
            raise TaskRejectedError(NO_PROCESS)
        if self._stopping:
            raise TaskRejectedError(str(ShuttingDownError("worker")))
        backend, nudges = self._backend, self._nudges
        try:
            if self._may_begin is not None and task.queue != CONTROL_LANE:
                await self._leave_what_does_not_fit(pid, self._may_begin)
            may_step = task.queue != CONTROL_LANE
            if may_step and (task.attempt > 1 or self._has_suspect()):
                await self._look_for_suspect(task)
            claim = await backend.claim(pid, task)
            if may_step and claim.record.suspect and claim.record.aside is None and self._suspect is not task:
                if self._has_suspect():
                    await self._leave_suspect(claim)
                self._suspect = task
            if not claim.record.is_terminal:
                await self._continue(claim, task, nudges)
        except CheckpointNotFoundError:
            if not task.id.startswith(OWN_TASKS):
                raise TaskRejectedError(NO_PROCESS) from None
            logger.info("process %s was deleted before it was run", pid, extra={"pid": pid})
        except TaskRejectedError:
            raise
        except Exception as error:  # the worker's outermost loop: a task that is acknowledged too early is forgotten
            raise TaskRejectedError(f"{type(error).__name__}: {error}") from error
        finally:
            if self._suspect is task:
                self._suspect = None

    def _has_suspect(self) -> bool:
        """Whether one is in hand, and still in the step in which workers died."""
        if self._suspect is None:
            return False
        runner = self.runners.get(self._suspect.key or "")
        return runner is None or not runner.has_progressed

    async def _look_for_suspect(self, task: IncomingTask) -> None:
        """Is the process of this task one? It is the only one here then, or raise `TaskRejectedError`: it is offered a
        little later, first to the worker with the most free slots. It is not even claimed, for who holds it is blamed.
        """
        record = await self._backend.persister.load(task.key or "")
        if record.suspect and record.aside is None and not record.is_terminal:
            if self._has_suspect():
                raise TaskRejectedError(APART)
            self._suspect = task

    async def _leave_suspect(self, claim: Claim) -> None:
        """Give back at once one that came as if it were none, and have it offered a little later."""
        await self._backend.persister.release(claim.record.pid, claim.epoch)
        await asyncio.sleep(UNFIT_PAUSE_S)
        raise TaskRejectedError(APART)

    async def _continue(self, claim: Claim, task: IncomingTask, nudges: int) -> None:
        pid, aside = claim.record.pid, claim.record.aside
        try:
            if claim.record.suspect and aside is not None:  # its code is not even loaded: that may be what ends workers
                await self._set_aside(claim, task, aside)
                return
            process = await self._load(claim.record)
            runner = Runner(process, claim, task, self._backend, self._load_type, may_begin=self._may_begin)
            await self._drive(runner, nudges)
        except _NOT_ITS_FAULT:
            raise
        except _CANT_CONTINUE as error:
            await self._set_aside(claim, task, str(error))
        except Exception as error:  # the worker's outermost loop: a defect must not leave the process with nobody
            logger.exception("driving process %s failed; it is set aside", pid, extra={"pid": pid})
            await self._set_aside(claim, task, f"driving it failed with {type(error).__name__}: {error}")

    async def _drive(self, runner: Runner, nudges: int) -> None:
        pid = runner.process.pid
        self.runners[pid] = runner
        try:
            if self._stopping:
                runner.stop()
            if self._nudges != nudges:  # one of them may have been for this process
                await runner.read_letters()
            await runner.run()
        finally:
            # The next task for this process may have been here before we are done.
            if self.runners.get(pid) is runner:
                del self.runners[pid]

    async def _leave_what_does_not_fit(self, pid: str, may_begin: Callable[[Process], bool]) -> None:
        """Raise `TaskRejectedError` for a process whose next step may not begin here: it is not even claimed."""
        record = await self._backend.persister.load(pid)
        try:
            fits = record.is_terminal or may_begin(await self._load(record))
        except _CANT_CONTINUE:
            return  # that is found out again, and dealt with, under a claim
        if not fits:
            await asyncio.sleep(UNFIT_PAUSE_S)
            raise TaskRejectedError(f"the step {record.step!r} may take longer than is left of this worker's time")

    async def _load(self, record: Record) -> Process:
        data = record.checkpoint
        if data is None:
            raise PersistenceError(f"process {record.pid} has no checkpoint")
        checkpoint = decode_checkpoint(data)
        if checkpoint.class_id.partition(":")[0] not in sys.modules:
            # A scientific library takes seconds to import; meanwhile the others of this worker go on.
            await asyncio.to_thread(load_class, checkpoint.class_id, self._modules)
        process_class = load_class(checkpoint.class_id, self._modules)
        return process_class.restore(checkpoint.snapshot(self._load_type))

    async def _set_aside(self, claim: Claim, task: IncomingTask, reason: str) -> None:
        """Keep what can't be continued; but a kill does not need its code."""
        pid = claim.record.pid
        kill = find_kill(claim.inbox)
        if kill is not None:
            save = killed(claim.record, claim.epoch, kill, time.time())
            await self._backend.settle(requests.SaveRequest(save), task)
            return
        if claim.record.aside != reason:
            said = "process %s is set aside: %s; once that is mended, `prunus retry` goes on"
            logger.warning(said, pid, reason, extra={"pid": pid})
        await self._backend.settle(requests.SetAsideRequest(pid, claim.epoch, reason), task)


_CANT_CONTINUE = (ProcessClassNotFoundError, PersistenceError, SpecError)
"""Why a checkpoint can't be continued: its class, its bytes, or a class that has lost the step that is next."""

_NOT_ITS_FAULT = (
    BusyError,
    CommunicatorClosedError,
    ConnectionLostError,
    IndeterminateError,
    KeyRefusedError,
    NotDeliveredError,
    StaleOwnerError,
    StoreFullError,
)
"""Why nobody could continue a process at the moment: the broker is away, or somebody else has it."""
