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
* Letters (pause, play, kill ...) are read from the inbox of the process at every safe point, and when a nudge says
  that there is one. What a save says is dealt with is dealt with; nothing else is. A letter that need not wait for the
  end of the step is answered while it runs: the checkpoint of that moment is the one from before the step, with what
  is now wanted of the process.
* A store that is full, or a broker that is away for long, is an error of the step's surroundings, not of the process:
  the runner waits and tries again, and does not run on in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import msgspec

from prunus.errors import (
    BusyError,
    CheckpointNotFoundError,
    Failure,
    IndeterminateError,
    InvalidStateError,
    MessageTooLargeError,
    MessagingError,
    NotDeliveredError,
    PersistenceError,
    ProcessClassNotFoundError,
    ProtocolError,
    PrunusError,
    StaleOwnerError,
    StoreFullError,
    UnsavableValueError,
)
from prunus.messaging.communicator import IncomingTask
from prunus.persistence import requests
from prunus.persistence.checkpoint import (
    LoadType,
    decode_data,
    decode_value,
    encode_checkpoint,
    encode_data,
    encode_value,
)
from prunus.persistence.persister import Claim, Event, Letter, LogLine, NewProcess, Note, Reply, Save, Saved, Tell
from prunus.processes import Effects, Line, Mail, Outcomes, PlayState, Process, ProcessResult, ProcessState, Transition
from prunus.processes.control import Kill
from prunus.processes.loading import load_class
from prunus.processes.stack import clean_context
from prunus.processes.waits import value_of
from prunus.runtime.backend import CONTROL_LANE, Backend
from prunus.runtime.letters import decode_letter, encode_answer, encode_letter

SAVE_RETRY_S = (0.1, 5.0)
"""First and longest pause before a checkpoint is tried again."""
SAYING_INTERVAL_S = 0.5
"""How often what a running step says (its log, its progress) is passed on."""
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
        created_at=process.created_at,
        state=process.state.value,
        play=process.play_state.value,
        step=process.next_step,
        status=process.status,
        parent_close=process.parent_close,
        queue=process.queue,
        priority=process.priority,
        resources=dict(process.resources),
        key=process.key,
    )


def checkpoint_of(process: Process) -> bytes:
    """`process` as bytes."""
    return encode_checkpoint(process.snapshot(), class_id=process.class_id, class_version=process.version)


def largest_part(process: Process, save: Save) -> str:
    """What takes up most of a save of `process`: its dotted name, and its size."""
    sizes = {f"the child {child.pid}": len(child.checkpoint) for child in save.children}
    sizes["its answers"] = sum(len(reply.body) for reply in save.replies)
    sizes["its log"] = _log_chars(save)
    for name, value in process.snapshot().items():
        parts = value if isinstance(value, Mapping) else {"": value}
        sizes |= {f"{name}.{part}".rstrip("."): len(encode_value(inner)) for part, inner in parts.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    return f"{largest} ({sizes[largest]:,} bytes)"


def _log_chars(save: Save) -> int:
    return sum(len(line.text) for line in save.lines)


class Runner:
    """Drives one process from a claim until it ends, parks, or is asked to be given back."""

    def __init__(
        self,
        process: Process,
        claim: Claim,
        task: IncomingTask,
        backend: Backend,
        load_type: LoadType | None = None,
        *,
        may_begin: Callable[[Process], bool] | None = None,
    ) -> None:
        """`may_begin` says whether the next step may begin here, else it is given back before it (None: each)."""
        self.process = process
        self._may_begin = may_begin
        self._claim = claim
        self._epoch = claim.epoch
        self._task = task
        self._backend = backend
        self._load_type = load_type
        self._may_run_steps = task.queue != CONTROL_LANE
        self._released = False
        self.has_progressed = False
        """A step has ended here, and that is durable."""
        self._results: dict[str, ProcessResult] = {}
        """Of those that it waits for, as far as they had ended when it was claimed."""
        self._mail: list[Mail] = []
        self._seen = claim.record.inbox_done
        """The last letter that the process has received; ..."""
        self._answered = self._seen
        """... and the last one that a checkpoint says is dealt with."""
        self._waits_from: int | None = None
        """The first letter that waits for the end of the step that runs."""
        self._shown = claim.record.state, claim.record.play
        """The state and the play state that everybody sees."""
        self._unsaved: list[Transition] = self._change_of_play()
        """What happened since the last save, in order. (A step that a pause waited for runs no more.)"""
        self._looked = 0.0, -1
        """When it was last looked whether its waits are over, and at which revision of the process."""
        self._lines: list[Line] = []
        """What it has said and nobody knows yet."""
        self._saying: asyncio.Task[None] | None = None
        self._errands: set[asyncio.Task[Any]] = set()
        self._is_stepping = self._is_killed = False
        self._safe_point = asyncio.Lock()
        self._running: asyncio.Task[None] | None = None
        process.driver = self

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
            pid = self.process.pid
            logger.warning("another worker claimed process %s; this one stops and forgets it", pid, extra={"pid": pid})
            raise
        except asyncio.CancelledError:
            # The worker is leaving and the step did not end in its grace period: it will run again elsewhere.
            await asyncio.shield(self._give_back())
            raise
        finally:
            self.process.driver = None
            for errand in (*self._errands, *([self._saying] if self._saying else [])):
                errand.cancel()

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
                while self._is_stepping and not self._is_killed and self._dealt_with() > self._answered:
                    await self._save_in_step()
            except StaleOwnerError:
                self._stop_at_once()

    # --- for the process ----------------------------------------------------------------------------

    def changed(self) -> None:
        """The loop looks at it in any case: only letters change it, and only `_read` delivers them."""

    def said(self) -> None:
        if self._saying is None and not self._released:
            self._saying = asyncio.create_task(self._pass_on(), context=clean_context())

    def deliver(self, name: str, value: Any) -> None:
        body = encode_value(value, name)
        pid = self.process.pid
        self._run_errand(self._backend.persister.send(pid, name, body, sender=pid, at=time.time()))

    def check(self, values: Mapping[str, Any]) -> None:
        encode_value(values, self.process.pid)

    async def keep(self) -> None:
        async with self._safe_point:
            if not self._released:
                await self._save_in_step()

    async def results(self, pids: Sequence[str]) -> list[ProcessResult]:
        rows = await asyncio.gather(*(self._backend.persister.load(pid) for pid in pids))
        for row in rows:
            if row.result is None:
                raise InvalidStateError(row.state, f"ended to have a result (it is {row.pid})")
        return [self._decode_result(row.result) for row in rows if row.result is not None]

    def load_class(self, identifier: str) -> type[Process]:
        if self._load_type is not None:
            self._load_type(identifier)  # it knows which modules may be imported here
        return load_class(identifier)

    # --- the parts of the loop ----------------------------------------------------------------------

    async def _begin(self) -> None:
        """Deliver what came while nobody held the process; give it back at once if that leaves nothing to step."""
        self._results = {pid: self._decode_result(body) for pid, body in self._claim.results.items()}
        self._mail = [self._decode_mail(mail) for mail in self._claim.mail]
        self._settle()
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

    def _settle(self) -> None:
        """If it waits for something that has happened already, it goes on.

        Not together with letters: a process that excepts keeps its last checkpoint, and what they changed is in none.
        """
        process = self.process
        if process.state is not ProcessState.WAITING or process.paused or not self._may_run_steps:
            return
        if self._seen > self._answered or self._looked[1] == process.revision:
            return
        # If the clock of the broker, which has woken it, is ahead of ours, then that one counts.
        now_s = max(time.time(), self._claim.record.updated_at)
        self._unsaved += process.settle(Outcomes(now_s, self._results, self._mail))
        self._looked = now_s, process.revision

    def _may_step(self) -> bool:
        if not self._may_run_steps or self._released or not self.process.can_step:
            return False
        return self._may_begin is None or self._may_begin(self.process)

    def _read(self, letters: Sequence[Letter]) -> None:
        """Hand unread letters to the process, in their order. It acts at once, or when its step ends."""
        if self._released:
            return  # whoever claims the process next reads them
        for letter in letters:
            if letter.seq <= self._seen:
                continue
            self._seen = letter.seq
            try:
                message = decode_letter(letter.body, self._load_type)
            except ProtocolError as error:
                pid = self.process.pid
                logger.warning(
                    "process %s got a letter that can't be read (%s): dropped", pid, error, extra={"pid": pid}
                )
                continue
            self._is_killed = self._is_killed or isinstance(message, Kill)
            self._unsaved += self.process.receive(message, letter.seq)
            if self.process.has_deferred and self._waits_from is None:
                self._waits_from = letter.seq

    def _dealt_with(self) -> int:
        """The last letter that a checkpoint of this moment deals with."""
        if not self.process.has_deferred:
            self._waits_from = None
        return self._seen if self._waits_from is None else self._waits_from - 1

    async def _checkpoint(self) -> None:
        """Make a safe point: what happened since the last one, and all that belongs to it, becomes durable."""
        async with self._safe_point:
            self._settle()
            made, self._unsaved = tuple(self._unsaved), []
            save = self._describe(made)
            self._released = save.release
            saved = await self._commit(save)
            self.has_progressed = self.has_progressed or save.keep_as is not None
            self._answered = save.inbox_done
            self._read(saved.inbox)
        if self._seen > self._answered and not self._released:  # a letter came: what it changed is saved as well
            await self._checkpoint()

    async def _save_in_step(self) -> None:
        """Write what is true while a step runs. The state is that from before the step."""
        process = self.process
        checkpoint = checkpoint_of(process)  # may raise: nothing is taken out before it
        made, self._unsaved = self._unsaved, []
        effects = process.take_effects()
        self._lines += effects.lines
        save = Save(
            pid=process.pid,
            epoch=self._epoch,
            state=process.state.value,
            play=process.play_state.value,
            checkpoint=checkpoint,
            status=process.status,
            step=process.next_step,
            events=_events(made),
            inbox_done=self._dealt_with(),
            replies=_replies(effects),
            tells=_tells(effects),
            lines=self._take_lines(),
            progress=process.progress,
            detail=process.detail,
        )
        saved = await self._commit(save)
        self._answered = save.inbox_done
        self._read(saved.inbox)

    def _stop_at_once(self) -> None:
        """Somebody else has the process: a step that still runs is of no use to anybody."""
        if self._running is not None and self._is_stepping:
            self._running.cancel()

    def _describe(self, made: Sequence[Transition]) -> Save:
        """The save for where the process stands now. What can't be saved makes it that of an excepted process."""
        process = self.process
        terminal = process.has_terminated()
        effects = process.take_effects()
        self._lines += effects.lines
        try:
            # The last good checkpoint of an excepted process stays: `retry` continues from it.
            checkpoint = None if process.state is ProcessState.EXCEPTED else checkpoint_of(process)
            result = encode_data(process.result().to_data()) if terminal else None
            children = tuple(new_process(child) for child in effects.children)
        except UnsavableValueError as error:
            answered = tuple(reply.token for reply in effects.replies)
            return self._excepted(error, self._shown, answered, _tells(effects), self._take_lines())
        begins = process.state is ProcessState.RUNNING and any(change.target == "running" for change in made)
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
            inbox_done=self._dealt_with(),
            children=children,
            tells=_tells(effects),
            replies=_replies(effects),
            lines=self._take_lines(),
            keep_as=process.next_step if begins else None,
            release=terminal or not self._may_step(),
            **self._wakes(effects),
        )

    def _wakes(self, effects: Effects) -> dict[str, Any]:
        """What is to wake it, if it waits."""
        used = effects.used_mail
        if used:
            self._mail = [mail for mail in self._mail if mail.seq not in used]
        if self.process.state is not ProcessState.WAITING:
            return {"consumed": used} if used else {}
        looked_at_s, revision = self._looked
        if self.process.revision != revision:
            # Nobody has looked whether its waits are over. So everything is news to it, what happened long ago too.
            seen: tuple[str, ...] = ()
            wakes, here, now_s = self.process.wakes(0.0), set[str](), time.time()
            is_over = any(value_of(wait, Outcomes(now_s)) is not None for wait in self.process.waits_for)
            wake_at = now_s if is_over else wakes.at_s
        else:
            wakes, here = self.process.wakes(looked_at_s), {mail.name for mail in self._mail}
            seen, wake_at = tuple(pid for pid in wakes.pids if pid in self._results), wakes.at_s
        return {
            "waits": wakes.groups,
            "seen": seen,
            "wake_at": wake_at,
            "names": wakes.names,
            "listens": tuple(name for name in wakes.names if name not in here),
            "consumed": used,
        }

    def _excepted(
        self,
        error: PrunusError,
        shown: tuple[str, str],
        answered: Sequence[int],
        tells: tuple[Tell, ...],
        lines: tuple[LogLine, ...],
    ) -> Save:
        """What was done can't be kept: the process excepts, and its last good checkpoint stays.

        `shown` are the states that it had for everybody else, `answered` the letters whose answers are now this error.
        """
        process, failure = self.process, Failure.of(error)
        state, play = shown
        changes = [Transition(kind="state", source=state, target="excepted", note=str(failure))]
        if play != PlayState.PLAYING:
            changes.append(Transition(kind="play", source=play, target=PlayState.PLAYING))
        result: ProcessResult[Any] = ProcessResult(pid=process.pid, state=ProcessState.EXCEPTED, failure=failure)
        return Save(
            pid=process.pid,
            epoch=self._epoch,
            state=ProcessState.EXCEPTED.value,
            result=encode_data(result.to_data()),
            status=process.status,
            events=_events(changes),
            inbox_done=self._dealt_with(),
            replies=tuple(Reply(seq=seq, body=encode_answer(failure=failure)) for seq in answered),
            tells=tells,
            lines=lines,
            release=True,
        )

    def _excepted_instead(self, save: Save, error: PrunusError, shown: tuple[str, str]) -> Save:
        """The save of a process that excepts because this one was refused."""
        self._released = True
        return self._excepted(error, shown, tuple(reply.seq for reply in save.replies), save.tells, save.lines)

    async def _commit(self, save: Save) -> Saved:
        pause_s, longest_s = SAVE_RETRY_S
        shown, self._shown = self._shown, (save.state, save.play)
        while True:
            try:
                if not save.release:
                    return await self._backend.persister.save(save)
                saved: Saved = await self._backend.settle(requests.SaveRequest(save), self._task)
                return saved
            except CheckpointNotFoundError as error:
                if error.pid == save.pid:
                    raise
                failure = InvalidStateError(save.state, f"waiting for processes that exist, not for {error.pid}")
                save = self._excepted_instead(save, failure, shown)
            except MessageTooLargeError as error:
                if save.state == ProcessState.EXCEPTED:
                    raise
                too_large = MessageTooLargeError(error.size, error.limit, largest_part(self.process, save))
                if self._is_stepping:
                    raise too_large from None  # it is the step that wanted this to be saved
                if _log_chars(save) > error.limit // 4:
                    save = msgspec.structs.replace(save, lines=())
                save = self._excepted_instead(save, too_large, shown)
            except _TRY_AGAIN as error:
                logger.error(
                    "%s; process %s waits and tries again in %.1f s", error, save.pid, pause_s, extra={"pid": save.pid}
                )
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, longest_s)

    def _change_of_play(self) -> list[Transition]:
        """From the play state that everybody sees to the one that it has now."""
        play, now = self._shown[1], self.process.play_state
        return [] if play == now else [Transition("play", play, now)]

    async def _give_back(self) -> None:
        if not self._released:
            self._released = True
            request: requests.Request = requests.ReleaseRequest(self.process.pid, self._epoch)
            # (A kill is not saved before it is done: whoever asked for it would be told that it failed.)
            if not self._is_killed and (settled := self._change_of_play()):
                request = requests.SaveRequest(msgspec.structs.replace(self._describe(settled), release=True))
            # Somebody else's, or nobody hears us: then we give nothing back, and the broker takes it when we are gone.
            with contextlib.suppress(PersistenceError, MessagingError):
                await self._backend.settle(request, self._task)

    # --- what it says -------------------------------------------------------------------------------

    async def _pass_on(self) -> None:
        """A moment later, so that many lines are one message."""
        await asyncio.sleep(SAYING_INTERVAL_S)
        self._saying = None
        process = self.process
        self._lines += process.take_lines()
        async with self._safe_point:
            if self._released or not self._is_stepping:
                return  # the checkpoint of its end says it
            lines = self._take_lines()
            note = Note(
                pid=process.pid,
                epoch=self._epoch,
                lines=lines,
                progress=process.progress,
                detail=process.detail,
                status=process.status,
            )
            try:
                await self._backend.persister.note(note)
            except (PersistenceError, MessagingError) as error:
                pid = process.pid
                logger.info("what process %s says is not passed on for now: %s", pid, error, extra={"pid": pid})

    def _take_lines(self) -> tuple[LogLine, ...]:
        lines, self._lines = self._lines, []
        return tuple(
            LogLine(at=line.at, text=line.text, level=line.level, source=line.source, step=line.step) for line in lines
        )

    def _run_errand(self, errand: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(errand, context=clean_context())
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    # --- decoding -----------------------------------------------------------------------------------

    def _decode_result(self, body: bytes) -> ProcessResult:
        return ProcessResult.from_data(decode_data(body, self._load_type))

    def _decode_mail(self, mail: Any) -> Mail:
        try:
            value = decode_value(mail.body, self._load_type)
        except (PersistenceError, ProcessClassNotFoundError) as error:
            value = error  # it is dropped, with a line that says why
        return Mail(mail.seq, mail.name, value, mail.sender)


def _events(transitions: Sequence[Transition]) -> tuple[Event, ...]:
    now = time.time()
    return tuple(Event(subject=change.event, at=now, step=change.step, note=change.note) for change in transitions)


def _replies(effects: Effects) -> tuple[Reply, ...]:
    return tuple(Reply(seq=reply.token, body=encode_answer(reply.value, reply.failure)) for reply in effects.replies)


def _tells(effects: Effects) -> tuple[Tell, ...]:
    return tuple(Tell(body=encode_letter(message), to=policies) for message, policies in effects.tells)
