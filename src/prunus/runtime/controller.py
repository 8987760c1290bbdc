"""The hand that holds processes from outside: launch, look, wait, pause, play, kill, resume, retry.

A `ProcessController` belongs to an event loop; `connect` makes one, `connect_sync` a blocking face for scripts.
A `ProcessHandle` is one process; it is the same whether you launched it or looked it up.

Control (see `docs/adr/0002-control-is-a-letter.md`): a pause, play, kill or resume is a letter in the inbox of the
process, durable before anything else happens, so it is never lost and reaches a process that nobody holds (G10).
The call returns when a checkpoint says that the letter was dealt with.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import msgspec

from prunus.errors import (
    BusyError,
    IndeterminateError,
    InvalidStateError,
    NotDeliveredError,
    PersistenceError,
    ProcessClassNotFoundError,
    UnroutableError,
)
from prunus.messaging.communicator import Broadcast, Communicator
from prunus.persistence.checkpoint import (
    checkpoint_as_yaml,
    decode_checkpoint,
    decode_data,
    encode_data,
    encode_value,
    type_loader,
)
from prunus.persistence.persister import QUERY_LIMIT, Event, LogLine, Past, Query, Record
from prunus.processes import Process, ProcessResult
from prunus.processes.control import (
    DEFAULT_GRACE_S,
    EditContext,
    Kill,
    Message,
    Pause,
    PauseAt,
    Play,
    Resume,
    Settle,
    Update,
)
from prunus.processes.generics import InputsT, OutputsT
from prunus.processes.loading import load_class
from prunus.processes.machine import OnException
from prunus.runtime.backend import Backend
from prunus.runtime.launcher import NOT_HERE
from prunus.runtime.letters import decode_answer, encode_letter
from prunus.runtime.runner import new_process

if TYPE_CHECKING:
    from prunus.runtime.profile import Profile

RECHECK_S = 5.0
"""Broadcasts only say "look again" and may be missed: whoever waits looks at least this often."""

EVENTS_BOUND = 10_000
"""A slow reader of `events` loses the oldest ones beyond this number, and is told to look again."""

QUERY_ATTEMPTS = 50
"""How often a query looks for a process that changes hands, ..."""
QUERY_PAUSE_S = 0.02
"""... and the pause in between."""

T = TypeVar("T")
_NOTHING = object()


class ProcessEvent(msgspec.Struct, frozen=True):
    """Something became true of a process. With `pid` None: events may have been missed, look again."""

    pid: str | None
    subject: str
    """``state_changed.<from>.<to>``, ``play_changed.<from>.<to>``, ``answered``, ``set_aside`` or ``missed``."""


MISSED = ProcessEvent(None, "missed")


class _EventStream:
    """Events in order. Waiting for the next one may be given up and begun again."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[ProcessEvent] = asyncio.Queue()

    def put(self, event: ProcessEvent) -> None:
        if self._queue.qsize() >= EVENTS_BOUND:
            self._queue = asyncio.Queue()
            event = MISSED
        self._queue.put_nowait(event)

    def __aiter__(self) -> AsyncIterator[ProcessEvent]:
        return self

    async def __anext__(self) -> ProcessEvent:
        return await self._queue.get()


class ProcessController:
    """All processes of a profile."""

    def __init__(self, communicator: Communicator) -> None:
        self._backend = Backend(communicator)
        self._load_type = type_loader()

    @overload
    async def launch(
        self,
        process_class: type[Process[InputsT, OutputsT]],
        inputs: InputsT | Mapping[str, Any] | None = None,
        *,
        pid: str | None = None,
        tags: Sequence[str] = (),
        on_exception: OnException | None = None,
        paused: str | bool = False,
        pause_at: str | None = None,
    ) -> ProcessHandle[OutputsT]: ...
    @overload
    async def launch(
        self,
        process_class: str,
        inputs: Any = None,
        *,
        pid: str | None = None,
        tags: Sequence[str] = (),
        on_exception: OnException | None = None,
        paused: str | bool = False,
        pause_at: str | None = None,
    ) -> ProcessHandle: ...
    async def launch(
        self,
        process_class: type[Process[Any, Any]] | str,
        inputs: Any = None,
        *,
        pid: str | None = None,
        tags: Sequence[str] = (),
        on_exception: OnException | None = None,
        paused: str | bool = False,
        pause_at: str | None = None,
    ) -> ProcessHandle[Any]:
        """Have a process run by the workers; returns when it would survive a power cut (G1).

        `inputs` is a mapping or the class's ``Inputs``. With a `pid` that exists already nothing is launched again
        and the handle is that process's (G6). `on_exception` is ``"fail"`` or ``"pause"``, if not as the class says.
        With `paused` (True, or the reason) it waits for a `play` before its first step; with `pause_at` it pauses
        before that step.

        Raises `InvalidInputError` (naming every wrong port), `UnsavableValueError` and `ProcessClassNotFoundError`
        before anything is sent, `StoreFullError` if the broker's disk is full.
        """
        if isinstance(process_class, str):
            process_class = load_class(process_class)
        process = process_class(inputs, pid=pid, tags=tags, on_exception=on_exception)
        if paused:
            process.receive(Pause(None if paused is True else paused))
        if pause_at is not None:
            process.receive(PauseAt(pause_at))
        if load_class(process.class_id) is not process_class:
            raise ProcessClassNotFoundError(
                process.class_id, "another class goes by this name, and workers would find that one; rename one of them"
            )
        await self._backend.persister.create(new_process(process))
        return ProcessHandle(process.pid, self)

    def handle(self, pid: str) -> ProcessHandle:
        """The process `pid`; nothing is asked or checked yet."""
        return ProcessHandle(pid, self)

    async def find(self, query: Query | None = None) -> Sequence[Record]:
        """The processes that match, newest first."""
        return await self._backend.persister.query(query or Query())

    async def pause_all(self, reason: str | None = None) -> list[str]:
        """Pause every process that is playing; returns their pids when all are paused or ended."""
        return await self._tell_all(Pause(reason=reason), Query(unfinished=True, play="playing", limit=QUERY_LIMIT))

    async def play_all(self) -> list[str]:
        """Play every paused process."""
        return await self._tell_all(Play(), Query(unfinished=True, play="paused", limit=QUERY_LIMIT))

    async def kill_all(self, message: str | None = None, *, force: bool = False) -> list[str]:
        """Kill every process that has not ended."""
        return await self._tell_all(Kill(message=message, force=force), Query(unfinished=True, limit=QUERY_LIMIT))

    @contextlib.asynccontextmanager
    async def events(self, pid: str | None = None) -> AsyncIterator[AsyncIterator[ProcessEvent]]:
        """What happens to `pid`, or to all processes, from now on::

        async with controller.events() as events:
            async for event in events: ...
        """
        stream = _EventStream()

        async def heard(broadcast: Broadcast) -> None:
            stream.put(ProcessEvent(broadcast.sender, broadcast.subject or ""))

        communicator = self._backend.communicator
        forget = communicator.on_reconnect(lambda: stream.put(MISSED))
        subscription = await communicator.add_broadcast_subscriber(heard, sender=pid)
        try:
            yield stream
        finally:
            forget()
            await subscription.cancel()

    async def broker_statistics(self) -> dict[str, Any]:
        """Counts of the broker's sessions, queues and processes, as plain data."""
        return await self._backend.statistics()

    async def close(self) -> None:
        """Leave. Processes go on without us."""
        await self._backend.communicator.close()

    async def __aenter__(self) -> ProcessController:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- what handles are made of -------------------------------------------------------------------

    async def _until(self, pid: str, holds: Callable[[Record], bool]) -> Record:
        """Wait until a condition holds of the row of `pid`, and return the row."""
        async with self.events(pid) as events:
            while True:
                record = await self._backend.persister.load(pid)
                if holds(record):
                    return record
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RECHECK_S):
                        await anext(events)

    async def _tell(self, pid: str, message: Message) -> tuple[Record, int]:
        """Post a letter and wait until it is dealt with. The row then, and the letter's number; 0 if it had ended."""
        persister = self._backend.persister
        posted = await persister.post(pid, encode_letter(message))
        if not posted.seq:
            return await persister.load(pid), 0

        def is_left_aside(row: Record) -> bool:
            # Somebody looked at it after the letter was there (a kill needs no more than that), and could not go on.
            return row.aside is not None and row.owner is None and row.epoch > posted.epoch

        record = await self._until(
            pid, lambda row: row.is_terminal or row.inbox_done >= posted.seq or is_left_aside(row)
        )
        if not record.is_terminal and record.inbox_done < posted.seq:
            raise InvalidStateError("set aside", f"continued first (`prunus retry {pid}`): {record.aside}")
        return record, posted.seq

    async def _ask(self, pid: str, message: Message) -> Any:
        """Post a letter and wait for its answer; raises what was answered, `InvalidStateError` if it has ended."""
        record, seq = await self._tell(pid, message)
        answer = await self._backend.persister.reply(pid, seq) if seq else None
        if answer is None:
            raise InvalidStateError(record.state, f"not ended, to be told {message.type!r}")
        return decode_answer(answer, self._load_type)

    async def _until_quiet(self, pid: str) -> None:
        """Wait until every descendant of `pid` has dealt with what its parent told it, and runs no step."""
        children: list[Record] = []
        while page := await self.find(
            Query(parent=pid, unfinished=True, limit=QUERY_LIMIT, before=children[-1].pid if children else None)
        ):
            children += page

        async def quiet(child: Record) -> None:
            told = (await self._backend.persister.load(child.pid)).inbox_last
            await self._until(
                child.pid,
                lambda row: (
                    row.is_terminal or row.aside is not None or (row.inbox_done >= told and row.play != "pausing")
                ),
            )
            await self._until_quiet(child.pid)

        async with asyncio.TaskGroup() as group:
            for child in children:
                group.create_task(quiet(child))

    def _find_class(self, class_id: str) -> type[Process] | None:
        """The class of a process, if it can be imported here."""
        try:
            return load_class(class_id)
        except ProcessClassNotFoundError:
            return None

    def _restore(self, data: bytes | None) -> Process:
        if data is None:
            raise PersistenceError("this process has no checkpoint")
        checkpoint = decode_checkpoint(data)
        return load_class(checkpoint.class_id).restore(checkpoint.snapshot(self._load_type))

    async def _tell_all(self, message: Message, query: Query) -> list[str]:
        told: list[str] = []
        rows: list[Record] = []
        while page := await self.find(msgspec.structs.replace(query, before=rows[-1].pid if rows else None)):
            rows += page

        async def tell(pid: str) -> None:
            with contextlib.suppress(InvalidStateError, PersistenceError):  # it ended or was set aside meanwhile
                await self._tell(pid, message)
                told.append(pid)

        async with asyncio.TaskGroup() as group:
            for row in rows:
                group.create_task(tell(row.pid))
        return told


class ProcessHandle(Generic[OutputsT]):
    """One process, from outside."""

    def __init__(self, pid: str, controller: ProcessController) -> None:
        self.pid = pid
        self._controller = controller
        self._persister = controller._backend.persister

    async def record(self) -> Record:
        """What is known of it now. Raises `CheckpointNotFoundError` if there is no such process."""
        return await self._persister.load(self.pid)

    async def until(self, holds: Callable[[Record], bool], timeout_s: float | None = None) -> Record:
        """Wait until a condition holds of its row (``lambda row: row.play == "paused"``), and return the row.

        Raises `TimeoutError`.
        """
        async with asyncio.timeout(timeout_s):
            return await self._controller._until(self.pid, holds)

    async def result(self, timeout_s: float | None = None) -> ProcessResult[OutputsT]:
        """Wait until it has ended. Raises `ProcessKilledError`, `ProcessExceptedError`, and `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            record = await self._controller._until(self.pid, lambda row: row.is_terminal)
        result = _result(record)
        result.raise_for_state()
        return result

    async def pause(
        self, reason: str | None = None, *, quiesced: bool = True, cascade: bool = False, at: str | None = None
    ) -> None:
        """Take no further step.

        With `quiesced` it returns when no step of the process is running any more, else as soon as the process knows.
        `cascade` pauses its descendants too (and waits for them), also those that it is about to submit. `at` is the
        name of a step: it goes on until it is about to take that one. Raises `InvalidStateError` if it has ended.
        """
        wish: Message = Pause(reason, cascade=cascade) if at is None else PauseAt(at)
        record, seq = await self._controller._tell(self.pid, wish)
        if at is not None and not record.is_terminal:
            return
        if quiesced and not record.is_terminal:
            record = await self._controller._until(self.pid, lambda row: row.is_terminal or row.play != "pausing")
        if record.is_terminal and (not seq or not cascade):
            raise InvalidStateError(record.state, "not ended, to be paused")
        if quiesced and cascade:
            await self._controller._until_quiet(self.pid)

    async def play(self, *, cascade: bool = False, pause_at: str | None = None) -> None:
        """Go on after a pause, until it is about to take the step `pause_at`, if one is named.

        `cascade` plays its descendants too. Raises `InvalidStateError` if it has ended.
        """
        if pause_at is not None:
            await self._controller._tell(self.pid, PauseAt(pause_at))
        record, seq = await self._controller._tell(self.pid, Play(cascade=cascade))
        if record.is_terminal and not seq:  # (else it has ended since)
            raise InvalidStateError(record.state, "not ended, to be played")

    async def kill(self, message: str | None = None, *, force: bool = False, grace_s: float = DEFAULT_GRACE_S) -> None:
        """End it, and its children (unless they were submitted with another ``parent_close``).

        Returns when it is KILLED; killing a killed process changes nothing. The running step is cancelled at its next
        await and may clean up for `grace_s` seconds; `force` does not wait. Raises `InvalidStateError` if it ended in
        another way before.
        """
        record, _ = await self._controller._tell(self.pid, Kill(message, force=force, grace_s=grace_s))
        if record.state != "killed":
            raise InvalidStateError(record.state, "not ended, to be killed")

    async def resume(self, value: Any = _NOTHING) -> None:
        """Continue a process that is suspended, with `value` if one is given.

        Raises `InvalidStateError` if it has ended or is not suspended.
        """
        has_value = value is not _NOTHING
        await self._controller._ask(self.pid, Resume(value if has_value else None, has_value))

    async def send(self, name: str, value: Any = None) -> None:
        """Send it the message `name`; returns when that is stored, whether or not the process waits for it yet.

        Messages of one sender arrive in their order. Raises `InvalidInputError` if the class of the process does not
        declare such a message or `value` does not fit (as far as the class can be imported here), `InvalidStateError`
        if the process has ended, `BusyError` if too many wait there already.
        """
        record = await self.record()
        process_class = self._controller._find_class(record.class_id)
        if process_class is not None:
            value = process_class.spec().read_message(name, value)
        body = encode_value(value, f"the message {name!r}")
        posted = await self._persister.send(
            self.pid, name, body, sender=self._controller._backend.communicator.session, at=time.time()
        )
        if not posted.seq:
            raise InvalidStateError(posted.state, f"not ended, to get the message {name!r}")

    async def query(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Ask one of the ``@query`` methods of its class.

        The living process answers if a worker holds it, else its last checkpoint does, here: then its class must be
        importable here (`ProcessClassNotFoundError`). Raises `InvalidInputError` for what the query does not take.
        """
        controller = self._controller
        for _ in range(QUERY_ATTEMPTS):
            record = await self.record()
            if record.owner is None:
                process = controller._restore(record.checkpoint)
                return process.query(name, *args, **kwargs)
            question = {"pid": self.pid, "name": name, "args": list(args), "kwargs": kwargs}
            # (A question changes nothing: it is asked again also if it may have been heard.)
            with contextlib.suppress(UnroutableError, NotDeliveredError, IndeterminateError):
                answer = await controller._backend.communicator.rpc_send(record.owner, encode_data(question))
                if answer != NOT_HERE:
                    return decode_answer(answer, controller._load_type)
            await asyncio.sleep(QUERY_PAUSE_S)  # it changes hands at this moment
        raise BusyError(f"process {self.pid} changes hands all the time; ask again")

    async def update(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call one of the ``@update`` methods of its class, between two of its steps.

        Returns its value when the change is durable. Raises what the method raised (as a `RemoteError`),
        `InvalidInputError` for what it does not take, `InvalidStateError` if the process has ended.
        """
        record = await self.record()
        process_class = self._controller._find_class(record.class_id)
        if process_class is not None:
            kwargs, args = process_class.read_arguments(name, args, kwargs), ()
        return await self._controller._ask(self.pid, Update(name, list(args), kwargs))

    async def edit_context(self, **values: Any) -> None:
        """Set these names in the context of a work chain, between two of its steps; its history says so.

        Raises `InvalidStateError` if it has ended or is no work chain.
        """
        await self._controller._ask(self.pid, EditContext(values))

    async def settle(self, value: Any = None) -> None:
        """Say of a step that may have had its effect (``effect="once"``) that it had, and what it returned.

        Raises `InvalidStateError` unless the process is paused for that reason.
        """
        await self._controller._ask(self.pid, Settle(value))

    async def retry(self) -> None:
        """Continue an excepted or set-aside process from its last good checkpoint; else `InvalidStateError`."""
        await self._persister.revive(self.pid)

    async def steps(self) -> Sequence[Past]:
        """The steps from which a new process can be forked: the newest ones, the oldest first."""
        return await self._persister.past(self.pid)

    async def fork(self, at: str, *, pid: str | None = None, **changed_context: Any) -> ProcessHandle:
        """Start a new process that goes on from where this one was about to take the step `at`, the last time.

        It has the inputs, the outputs and the context of that moment, the context with `changed_context`. Raises
        `InvalidStateError` if no such step is on record.
        """
        controller = self._controller
        past = await self.steps()
        found = next((each for each in reversed(past) if each.step == at), None)
        if found is None:
            known = ", ".join(dict.fromkeys(each.step for each in past)) or "none"
            record = await self.record()
            raise InvalidStateError(record.state, f"past the step {at!r} to fork there; on record: {known}")
        process = controller._restore(await self._persister.past_checkpoint(self.pid, found.seq))
        forked = process.fork(pid, changed_context)
        await self._persister.create(new_process(forked))
        return ProcessHandle(forked.pid, controller)

    async def log(self, *, after: int = 0, last: int | None = None) -> Sequence[LogLine]:
        """The lines of its log: those after number `after`, or the `last` ones; the oldest first."""
        return await self._persister.log(self.pid, after=after, last=last)

    async def history(self) -> Sequence[Event]:
        """What happened to it, oldest first."""
        return await self._persister.history(self.pid)

    async def outcome(self) -> ProcessResult[OutputsT] | None:
        """Its result, also of a killed or excepted process; None if it has not ended."""
        record = await self.record()
        return _result(record) if record.is_terminal else None

    async def checkpoint_yaml(self) -> str:
        """Its last checkpoint, for people to read."""
        record = await self.record()
        return checkpoint_as_yaml(record.checkpoint or b"")

    def __repr__(self) -> str:
        return f"ProcessHandle({self.pid!r})"


@contextlib.asynccontextmanager
async def connect(profile: Profile | Path | str | None = None) -> AsyncIterator[ProcessController]:
    """A controller of the daemon of a profile: the given one, or that of this folder or user.

    Raises `ProfileError` and `ConnectionLostError` (no daemon runs).
    """
    from prunus.messaging.zeromq import connect_zmq
    from prunus.runtime.profile import Profile

    match profile:
        case None:
            where = Profile.find()
        case Profile():
            where = profile
        case _:
            where = Profile.find(profile)
    controller = ProcessController(await connect_zmq(where.endpoint, name="controller"))
    try:
        yield controller
    finally:
        await controller.close()


def _result(record: Record) -> ProcessResult:
    assert record.result is not None, "a terminal process has a result"
    return ProcessResult.from_data(decode_data(record.result))


# --- the blocking face ------------------------------------------------------------------------------


class BlockingController:
    """`ProcessController` for scripts: the same names, every call blocks until the answer is there."""

    def __init__(self, controller: ProcessController, call: Callable[..., Any]) -> None:
        self._controller = controller
        self._call = call

    @overload
    def launch(
        self,
        process_class: type[Process[InputsT, OutputsT]],
        inputs: InputsT | Mapping[str, Any] | None = None,
        *,
        pid: str | None = None,
        tags: Sequence[str] = (),
        on_exception: OnException | None = None,
        paused: str | bool = False,
        pause_at: str | None = None,
    ) -> BlockingHandle[OutputsT]: ...
    @overload
    def launch(
        self,
        process_class: str,
        inputs: Any = None,
        *,
        pid: str | None = None,
        tags: Sequence[str] = (),
        on_exception: OnException | None = None,
        paused: str | bool = False,
        pause_at: str | None = None,
    ) -> BlockingHandle: ...
    def launch(
        self, process_class: type[Process[Any, Any]] | str, inputs: Any = None, **options: Any
    ) -> BlockingHandle[Any]:
        """See `ProcessController.launch` for the options."""
        handle = self._call(lambda: self._controller.launch(process_class, inputs, **options))
        return BlockingHandle(handle, self._call)

    def handle(self, pid: str) -> BlockingHandle:
        return BlockingHandle(self._controller.handle(pid), self._call)

    def pause_all(self, reason: str | None = None) -> list[str]:
        pids: list[str] = self._call(lambda: self._controller.pause_all(reason))
        return pids

    def play_all(self) -> list[str]:
        pids: list[str] = self._call(self._controller.play_all)
        return pids

    def kill_all(self, message: str | None = None, *, force: bool = False) -> list[str]:
        pids: list[str] = self._call(lambda: self._controller.kill_all(message, force=force))
        return pids

    def find(self, query: Query | None = None) -> Sequence[Record]:
        rows: Sequence[Record] = self._call(lambda: self._controller.find(query))
        return rows


class BlockingHandle(Generic[OutputsT]):
    """`ProcessHandle` for scripts."""

    def __init__(self, handle: ProcessHandle[OutputsT], call: Callable[..., Any]) -> None:
        self._handle = handle
        self._call = call
        self.pid = handle.pid

    def record(self) -> Record:
        row: Record = self._call(self._handle.record)
        return row

    def until(self, holds: Callable[[Record], bool], timeout_s: float | None = None) -> Record:
        row: Record = self._call(lambda: self._handle.until(holds, timeout_s))
        return row

    def outcome(self) -> ProcessResult[OutputsT] | None:
        outcome: ProcessResult[OutputsT] | None = self._call(self._handle.outcome)
        return outcome

    def steps(self) -> Sequence[Past]:
        past: Sequence[Past] = self._call(self._handle.steps)
        return past

    def result(self, timeout_s: float | None = None) -> ProcessResult[OutputsT]:
        result: ProcessResult[OutputsT] = self._call(lambda: self._handle.result(timeout_s))
        return result

    def pause(
        self, reason: str | None = None, *, quiesced: bool = True, cascade: bool = False, at: str | None = None
    ) -> None:
        self._call(lambda: self._handle.pause(reason, quiesced=quiesced, cascade=cascade, at=at))

    def play(self, *, cascade: bool = False, pause_at: str | None = None) -> None:
        self._call(lambda: self._handle.play(cascade=cascade, pause_at=pause_at))

    def kill(self, message: str | None = None, *, force: bool = False, grace_s: float = DEFAULT_GRACE_S) -> None:
        self._call(lambda: self._handle.kill(message, force=force, grace_s=grace_s))

    def resume(self, value: Any = _NOTHING) -> None:
        self._call(lambda: self._handle.resume(value))

    def send(self, name: str, value: Any = None) -> None:
        self._call(lambda: self._handle.send(name, value))

    def query(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        return self._call(lambda: self._handle.query(name, *args, **kwargs))

    def update(self, name: str, /, *args: Any, **kwargs: Any) -> Any:
        return self._call(lambda: self._handle.update(name, *args, **kwargs))

    def edit_context(self, **values: Any) -> None:
        self._call(lambda: self._handle.edit_context(**values))

    def settle(self, value: Any = None) -> None:
        self._call(lambda: self._handle.settle(value))

    def retry(self) -> None:
        self._call(self._handle.retry)

    def fork(self, at: str, *, pid: str | None = None, **changed_context: Any) -> BlockingHandle:
        return BlockingHandle(self._call(lambda: self._handle.fork(at, pid=pid, **changed_context)), self._call)

    def log(self, *, after: int = 0, last: int | None = None) -> Sequence[LogLine]:
        lines: Sequence[LogLine] = self._call(lambda: self._handle.log(after=after, last=last))
        return lines

    def history(self) -> Sequence[Event]:
        events: Sequence[Event] = self._call(self._handle.history)
        return events


@contextlib.contextmanager
def connect_sync(profile: Profile | Path | str | None = None) -> Iterator[BlockingController]:
    """`connect` for scripts without an event loop: it runs in a thread of its own."""
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(connect(profile)) as controller:
        yield BlockingController(controller, portal.call)
