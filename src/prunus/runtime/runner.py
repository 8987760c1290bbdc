"""One claimed process on its way: step, checkpoint, announce.

::

    while not process.has_terminated():
        await process.step()                    # the user's code; none of our I/O
        await self._checkpoint()                # durable, and then told to whoever listens

Rules:

* A runner writes under the epoch of its claim. If the store refuses that (`StaleOwnerError`), somebody else has the
  process: the runner stops at once and says so in the log (G4).
* The last checkpoint of a runner gives the process back (or ends it) and acknowledges the runner's task, in one
  commit (G2). What is not checkpointed by then will be done again by the next runner (G5).
* Letters (pause, play, kill, resume) are read from the inbox of the process at every safe point, and when a nudge
  says that there is one. What a save says is dealt with is dealt with; nothing else is. A letter that asks nothing of
  the step that runs (a play, mostly) is answered while it runs.
* A store that is full, or a broker that is away for long, is an error of the step's surroundings, not of the process:
  the runner waits and tries again, and does not run on in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

from prunus.errors import (
    BusyError,
    Failure,
    IndeterminateError,
    MessagingError,
    NotDeliveredError,
    PersistenceError,
    ProtocolError,
    PrunusError,
    StaleOwnerError,
    StoreFullError,
    UnsavableValueError,
)
from prunus.messaging.communicator import IncomingTask
from prunus.persistence import requests
from prunus.persistence.checkpoint import decode_data, encode_checkpoint, encode_data
from prunus.persistence.persister import QUERY_LIMIT, Claim, Event, Letter, NewProcess, Query, Save, Saved
from prunus.processes import PlayState, Process, ProcessResult, ProcessState, Transition
from prunus.processes.control import Kill, decode_message, encode_message
from prunus.runtime.backend import CONTROL_LANE, Backend

SAVE_RETRY_S = (0.1, 5.0)
"""First and longest pause before a checkpoint is tried again."""
_TRY_AGAIN = (StoreFullError, BusyError, NotDeliveredError, IndeterminateError)
"""The checkpoint is not there, or nobody knows. Saying it again is harmless under the same claim."""

logger = logging.getLogger(__name__)


def new_process(process: Process) -> NewProcess:
    """The first checkpoint of `process`; raises `UnsavableValueError` naming the input that can't be saved."""
    return NewProcess(
        pid=process.pid,
        class_id=process.class_id,
        checkpoint=checkpoint_of(process),
        parent=process.parent,
        tags=tuple(process.tags),
        created_at=time.time(),
    )


def checkpoint_of(process: Process) -> bytes:
    """`process` as bytes."""
    return encode_checkpoint(process.snapshot(), class_id=process.class_id, class_version=process.version)


class Runner:
    """Drives one process from a claim until it ends, parks, or is asked to be given back."""

    def __init__(self, process: Process, claim: Claim, task: IncomingTask, backend: Backend) -> None:
        self.process = process
        self._claim = claim
        self._epoch = claim.epoch
        self._task = task
        self._backend = backend
        self._may_run_steps = task.queue != CONTROL_LANE
        self._released = False
        self._seen = claim.record.inbox_done
        """The last letter that the process has received; ..."""
        self._answered = self._seen
        """... and the last one that a checkpoint says is dealt with."""
        self._answerable = self._seen
        """The last one that no running step has to end for, ..."""
        self._settled = 0
        """... and how many of the unsaved transitions are from before it."""
        self._unsaved: list[Transition] = []
        """What happened since the last save, in order."""
        self._is_stepping = self._is_killed = False
        self._safe_point = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until the process is given back or terminal. Raises `StaleOwnerError` if it is somebody else's by now."""
        self._running = asyncio.current_task()
        try:
            await self._begin()
            while not self._released:
                if self._may_step():
                    await self._step()
                await self._checkpoint()
        except StaleOwnerError:
            logger.warning("another worker claimed process %s; this one stops and forgets it", self.process.pid)
            raise
        except asyncio.CancelledError:
            # The worker is leaving and the step did not end in its grace period: it will run again elsewhere.
            await asyncio.shield(self._give_back())
            raise

    def stop(self) -> None:
        """Give the process back at its next safe point."""
        self._may_run_steps = False

    async def read_letters(self) -> None:
        """Look into the inbox now; a nudge said that there is something."""
        async with self._safe_point:
            record = await self._backend.persister.load(self.process.pid)
            if record.epoch != self._epoch or record.owner is None:
                self._stop_at_once()
                return
            self._read(record.inbox)
            try:
                while self._is_stepping and self._answerable > self._answered:
                    await self._answer()
            except StaleOwnerError:
                self._stop_at_once()

    # --- the parts of the loop ----------------------------------------------------------------------

    async def _begin(self) -> None:
        """Deliver what came while nobody held the process; give it back at once if that leaves nothing to step."""
        process, results = self.process, self._claim.results
        if process.waiting_for and all(pid in results for pid in process.waiting_for):
            outcomes = {pid: ProcessResult.from_data(decode_data(results[pid])) for pid in process.waiting_for}
            self._unsaved += process.resolve(outcomes)
        self._read(self._claim.inbox)
        if self._unsaved or self._seen > self._answered:
            await self._checkpoint()

    async def _step(self) -> None:
        self._is_stepping = True
        try:
            transitions = await self.process.step()  # (the list may be another one by then)
            self._unsaved += transitions
        finally:
            self._is_stepping = False

    def _may_step(self) -> bool:
        return (
            self._may_run_steps
            and not self._released
            and not self.process.paused
            and self.process.state in (ProcessState.CREATED, ProcessState.RUNNING)
        )

    def _read(self, letters: Sequence[Letter]) -> None:
        """Hand unread letters to the process, in their order. It acts at once, or when its step ends."""
        if self._released:
            return  # whoever claims the process next reads them
        for letter in letters:
            if letter.seq <= self._seen:
                continue
            self._seen = letter.seq
            try:
                message = decode_message(letter.body)
            except ProtocolError as error:
                logger.warning("process %s got a letter that can't be read (%s): dropped", self.process.pid, error)
            else:
                self._is_killed = self._is_killed or isinstance(message, Kill)
                self._unsaved += self.process.receive(message)
            if self.process.play_state is PlayState.PLAYING and not self._is_killed:
                self._answerable, self._settled = letter.seq, len(self._unsaved)

    async def _checkpoint(self) -> None:
        """Make a safe point: what happened since the last one, and all that belongs to it, becomes durable."""
        async with self._safe_point:
            made, self._unsaved = tuple(self._unsaved), []
            save = await self._describe(made)
            self._released = save.release
            saved = await self._commit(save)
            self._answered = save.inbox_done
            self._read(saved.inbox)
        if self._seen > self._answered and not self._released:  # a letter came: what it changed is saved as well
            await self._checkpoint()

    async def _answer(self) -> None:
        """Say that these letters are dealt with. The checkpoint stays: it is from before the step that runs."""
        process = self.process
        made, self._unsaved = self._unsaved[: self._settled], self._unsaved[self._settled :]
        self._settled = 0
        save = Save(
            pid=process.pid,
            epoch=self._epoch,
            state=process.state.value,
            play=PlayState.PLAYING.value,
            status=process.status,
            step=process.next_step,
            events=_events(made),
            inbox_done=self._answerable,
        )
        saved = await self._commit(save)
        self._answered = save.inbox_done
        self._read(saved.inbox)

    def _stop_at_once(self) -> None:
        """Somebody else has the process: a step that still runs is of no use to anybody."""
        if self._running is not None and self._is_stepping:
            self._running.cancel()

    async def _describe(self, made: Sequence[Transition]) -> Save:
        """The save for where the process stands now. What can't be saved makes it that of an excepted process."""
        process = self.process
        terminal = process.has_terminated()
        try:
            # The last good checkpoint of an excepted process stays: `retry` continues from it.
            checkpoint = None if process.state is ProcessState.EXCEPTED else checkpoint_of(process)
            result = encode_data(process.result().to_data()) if terminal else None
            children = tuple(new_process(child) for child in process.take_children())
        except UnsavableValueError as error:
            return self._excepted(error, made)
        return Save(
            pid=process.pid,
            epoch=self._epoch,
            state=process.state.value,
            play=process.play_state.value,
            checkpoint=checkpoint,
            result=result,
            status=process.status,
            step=process.next_step,
            events=_events(made),
            inbox_done=self._seen,
            children=children,
            letters=await self._last_words() if process.state is ProcessState.KILLED else (),
            waits=tuple(process.waiting_for),
            suspended=process.suspended,
            release=terminal or not self._may_step(),
        )

    def _excepted(self, error: PrunusError, made: Sequence[Transition]) -> Save:
        """The step was done, but it can't be kept: the process excepts, and its last good checkpoint stays."""
        process, failure = self.process, Failure.of(error)
        source = made[0].source if made else process.state.value
        excepted = Transition(kind="state", source=source, target="excepted", note=str(failure))
        result = ProcessResult(pid=process.pid, state=ProcessState.EXCEPTED, failure=failure)
        return Save(
            pid=process.pid,
            epoch=self._epoch,
            state=ProcessState.EXCEPTED.value,
            result=encode_data(result.to_data()),
            status=process.status,
            events=_events([excepted]),
            inbox_done=self._seen,
            release=True,
        )

    async def _last_words(self) -> tuple[tuple[str, bytes], ...]:
        """A killed process takes its children along."""
        children = await self._backend.persister.query(
            Query(parent=self.process.pid, unfinished=True, limit=QUERY_LIMIT)
        )
        body = encode_message(Kill(message=f"its parent {self.process.pid} was killed"))
        return tuple((child.pid, body) for child in children)

    async def _commit(self, save: Save) -> Saved:
        pause_s, longest_s = SAVE_RETRY_S
        while True:
            try:
                if not save.release:
                    return await self._backend.persister.save(save)
                saved: Saved = await self._backend.settle(requests.SaveRequest(save), self._task)
                return saved
            except _TRY_AGAIN as error:
                logger.error("%s; process %s waits and tries again in %.1f s", error, save.pid, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, longest_s)

    async def _give_back(self) -> None:
        if not self._released:
            self._released = True
            # Somebody else's, or nobody hears us: then we give nothing back, and the broker takes it when we are gone.
            with contextlib.suppress(PersistenceError, MessagingError):
                await self._backend.settle(requests.ReleaseRequest(self.process.pid, self._epoch), self._task)


def _events(transitions: Sequence[Transition]) -> tuple[Event, ...]:
    now = time.time()
    return tuple(
        Event(subject=f"{change.source}.{change.target}", at=now, step=change.step, note=change.note)
        for change in transitions
    )
