"""From a task that says "look at this process" to a runner for it: the same code for a first launch and a recovery.

A process that can't be continued (its class is gone, its checkpoint is damaged or newer than this Prunus) is
set aside with the reason: it is neither lost nor tried again and again. `prunus doctor` lists it, `prunus retry`
continues it once the cause is mended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from prunus.errors import (
    BusyError,
    CheckpointNotFoundError,
    CommunicatorClosedError,
    ConnectionLostError,
    Failure,
    IndeterminateError,
    NotDeliveredError,
    PersistenceError,
    ProcessClassNotFoundError,
    ProtocolError,
    ShuttingDownError,
    SpecError,
    StaleOwnerError,
    StoreFullError,
    TaskRejectedError,
)
from prunus.messaging.communicator import Broadcast, IncomingTask
from prunus.persistence import requests
from prunus.persistence.checkpoint import decode_checkpoint, decode_data, encode_data, type_loader
from prunus.persistence.persister import Claim, Event, Letter, Save, Tell
from prunus.processes import Process, ProcessResult, ProcessState
from prunus.processes.control import Kill
from prunus.processes.loading import load_class
from prunus.runtime.backend import Backend
from prunus.runtime.letters import decode_letter, encode_answer, encode_letter
from prunus.runtime.runner import Runner

logger = logging.getLogger(__name__)

NOT_HERE = b""
"""The answer of a worker that does not hold the process (any more)."""


class Launcher:
    """The task handler of a worker."""

    def __init__(self, backend: Backend, *, modules: Sequence[str] = ("*",)) -> None:
        self._backend = backend
        self._modules = tuple(modules)
        self._load_type = type_loader(modules)
        self._stopping = False
        self.runners: dict[str, Runner] = {}
        """The processes that this worker holds now, by pid."""
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

        Raises `TaskRejectedError` if nobody knows how that ended: the task stays, and the next look will show it.
        """
        pid = task.key
        if pid is None:
            raise ProtocolError("a task for a worker names its process as the key")
        if self._stopping:
            raise TaskRejectedError(str(ShuttingDownError("worker")))
        backend, nudges = self._backend, self._nudges
        try:
            claim = await backend.persister.claim(pid, backend.communicator.session, at=time.time())
            if not claim.record.is_terminal:
                await self._continue(claim, task, nudges)
        except CheckpointNotFoundError:
            logger.info("process %s was deleted before it was run", pid)
        except Exception as error:  # the worker's outermost loop: a task that is acknowledged too early is forgotten
            raise TaskRejectedError(f"{type(error).__name__}: {error}") from error

    async def _continue(self, claim: Claim, task: IncomingTask, nudges: int) -> None:
        pid = claim.record.pid
        try:
            await self._drive(Runner(await self._load(claim), claim, task, self._backend, self._load_type), nudges)
        except _NOT_ITS_FAULT:
            raise
        except _CANT_CONTINUE as error:
            await self._set_aside(claim, task, str(error))
        except Exception as error:  # the worker's outermost loop: a defect must not leave the process with nobody
            logger.exception("driving process %s failed; it is set aside", pid)
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

    async def _load(self, claim: Claim) -> Process:
        data = claim.record.checkpoint
        if data is None:
            raise PersistenceError(f"process {claim.record.pid} has no checkpoint")
        checkpoint = decode_checkpoint(data)
        if checkpoint.class_id.partition(":")[0] not in sys.modules:
            # A scientific library takes seconds to import; meanwhile the others of this worker go on.
            await asyncio.to_thread(load_class, checkpoint.class_id, self._modules)
        process_class = load_class(checkpoint.class_id, self._modules)
        return process_class.restore(checkpoint.snapshot(self._load_type))

    async def _set_aside(self, claim: Claim, task: IncomingTask, reason: str) -> None:
        """Keep what can't be continued; but a kill does not need its code."""
        pid = claim.record.pid
        kill = _find_kill(claim)
        if kill is None:
            logger.warning("process %s is set aside: %s; once that is mended, `prunus retry` goes on", pid, reason)
            await self._backend.settle(requests.SetAsideRequest(pid, claim.epoch, reason), task)
            return
        letter, message = kill
        event = Event(subject=f"{claim.record.state}.killed", at=time.time(), note=message)
        result: ProcessResult[Any] = ProcessResult(pid=pid, state=ProcessState.KILLED, outputs={}, exit_message=message)
        save = Save(
            pid=pid,
            epoch=claim.epoch,
            state=ProcessState.KILLED.value,
            result=encode_data(result.to_data()),
            events=(event,),
            inbox_done=letter.seq,
            tells=(Tell(body=encode_letter(Kill(message=f"its parent {pid} was killed")), to=("kill",)),),
            release=True,
        )
        await self._backend.settle(requests.SaveRequest(save), task)


def _find_kill(claim: Claim) -> tuple[Letter, str | None] | None:
    """The letter that asks for the end of the process, and what it says."""
    for letter in claim.inbox:
        with contextlib.suppress(ProtocolError):  # a letter that nobody can read asks for nothing
            match decode_letter(letter.body):
                case Kill(message=message):
                    return letter, message
                case _:
                    pass
    return None


_CANT_CONTINUE = (ProcessClassNotFoundError, PersistenceError, SpecError)
"""Why a checkpoint can't be continued: its class, its bytes, or a class that has lost the step that is next."""

_NOT_ITS_FAULT = (
    BusyError,
    CommunicatorClosedError,
    ConnectionLostError,
    IndeterminateError,
    NotDeliveredError,
    StaleOwnerError,
    StoreFullError,
)
"""Why nobody could continue a process at the moment: the broker is away, or somebody else has it."""
