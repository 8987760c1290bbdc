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
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from prunus.errors import (
    InvalidStateError,
    PersistenceError,
    ProcessClassNotFoundError,
)
from prunus.messaging.communicator import Broadcast, Communicator
from prunus.persistence.checkpoint import checkpoint_as_yaml, decode_data
from prunus.persistence.persister import QUERY_LIMIT, Event, Query, Record
from prunus.processes import Process, ProcessResult
from prunus.processes.control import Kill, Message, Pause, Play, Resume, encode_message
from prunus.processes.loading import load_class
from prunus.runtime.backend import Backend
from prunus.runtime.runner import new_process

if TYPE_CHECKING:
    from prunus.runtime.profile import Profile

RECHECK_S = 5.0
"""Broadcasts only say "look again" and may be missed: whoever waits looks at least this often."""

EVENTS_BOUND = 10_000
"""A slow reader of `events` loses the oldest ones beyond this number, and is told to look again."""

T = TypeVar("T")


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

    async def launch(
        self,
        process_class: type[Process] | str,
        inputs: Any = None,
        *,
        pid: str | None = None,
        tags: Sequence[str] = (),
    ) -> ProcessHandle:
        """Have a process run by the workers; returns when it would survive a power cut (G1).

        `inputs` is a mapping or the class's ``Inputs``. With a `pid` that exists already nothing is launched again
        and the handle is that process's (G6).

        Raises `InvalidInputError` (naming every wrong port), `UnsavableValueError` and `ProcessClassNotFoundError`
        before anything is sent, `StoreFullError` if the broker's disk is full.
        """
        if isinstance(process_class, str):
            process_class = load_class(process_class)
        process = process_class(inputs, pid=pid, tags=tags)
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

    async def _tell(self, pid: str, message: Message) -> Record:
        """Post a letter and wait until it is dealt with. The row then; unchanged if it had ended."""
        persister = self._backend.persister
        posted = await persister.post(pid, encode_message(message))
        if not posted.seq:
            return await persister.load(pid)

        def is_left_aside(row: Record) -> bool:
            # Somebody looked at it after the letter was there (a kill needs no more than that), and could not go on.
            return row.aside is not None and row.owner is None and row.epoch > posted.epoch

        record = await self._until(
            pid, lambda row: row.is_terminal or row.inbox_done >= posted.seq or is_left_aside(row)
        )
        if not record.is_terminal and record.inbox_done < posted.seq:
            raise InvalidStateError("set aside", f"continued first (`prunus retry {pid}`): {record.aside}")
        return record

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


class ProcessHandle:
    """One process, from outside."""

    def __init__(self, pid: str, controller: ProcessController) -> None:
        self.pid = pid
        self._controller = controller
        self._persister = controller._backend.persister

    async def record(self) -> Record:
        """What is known of it now. Raises `CheckpointNotFoundError` if there is no such process."""
        return await self._persister.load(self.pid)

    async def result(self, timeout_s: float | None = None) -> ProcessResult:
        """Wait until it has ended. Raises `ProcessKilledError`, `ProcessExceptedError`, and `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            record = await self._controller._until(self.pid, lambda row: row.is_terminal)
        result = _result(record)
        result.raise_for_state()
        return result

    async def pause(self, reason: str | None = None) -> None:
        """Stop between two steps; returns when it is paused. Raises `InvalidStateError` if it has ended."""
        record = await self._controller._tell(self.pid, Pause(reason=reason))
        if record.is_terminal:
            raise InvalidStateError(record.state, "not ended, to be paused")

    async def play(self) -> None:
        """Go on after a pause. Raises `InvalidStateError` if it has ended."""
        record = await self._controller._tell(self.pid, Play())
        if record.is_terminal:
            raise InvalidStateError(record.state, "not ended, to be played")

    async def kill(self, message: str | None = None, *, force: bool = False) -> None:
        """End it, and its children; returns when it is KILLED. Killing a killed process changes nothing.

        The running step is cancelled at its next await and may clean up for a grace period; `force` does not wait.
        Raises `InvalidStateError` if it ended in another way before.
        """
        record = await self._controller._tell(self.pid, Kill(message=message, force=force))
        if record.state != "killed":
            raise InvalidStateError(record.state, "not ended, to be killed")

    async def resume(self, value: Any = None) -> None:
        """Continue a process that waits for a message, with `value` (JSON-like).

        Raises `InvalidStateError` if it has ended or is not waiting for one.
        """
        record = await self.record()
        if record.state != "waiting" or record.waits:
            raise InvalidStateError(record.state, "waiting for a message")
        await self._controller._tell(self.pid, Resume(value=value, has_value=True))

    async def retry(self) -> None:
        """Continue an excepted or set-aside process from its last good checkpoint; else `InvalidStateError`."""
        await self._persister.revive(self.pid)

    async def history(self) -> Sequence[Event]:
        """What happened to it, oldest first."""
        return await self._persister.history(self.pid)

    async def outcome(self) -> ProcessResult | None:
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

    def launch(
        self,
        process_class: type[Process] | str,
        inputs: Mapping[str, Any] | object | None = None,
        *,
        pid: str | None = None,
        tags: Sequence[str] = (),
    ) -> BlockingHandle:
        handle = self._call(lambda: self._controller.launch(process_class, inputs, pid=pid, tags=tags))
        return BlockingHandle(handle, self._call)

    def handle(self, pid: str) -> BlockingHandle:
        return BlockingHandle(self._controller.handle(pid), self._call)

    def find(self, query: Query | None = None) -> Sequence[Record]:
        rows: Sequence[Record] = self._call(lambda: self._controller.find(query))
        return rows


class BlockingHandle:
    """`ProcessHandle` for scripts."""

    def __init__(self, handle: ProcessHandle, call: Callable[..., Any]) -> None:
        self._handle = handle
        self._call = call
        self.pid = handle.pid

    def record(self) -> Record:
        row: Record = self._call(self._handle.record)
        return row

    def result(self, timeout_s: float | None = None) -> ProcessResult:
        result: ProcessResult = self._call(lambda: self._handle.result(timeout_s))
        return result

    def pause(self, reason: str | None = None) -> None:
        self._call(lambda: self._handle.pause(reason))

    def play(self) -> None:
        self._call(self._handle.play)

    def kill(self, message: str | None = None, *, force: bool = False) -> None:
        self._call(lambda: self._handle.kill(message, force=force))

    def resume(self, value: Any = None) -> None:
        self._call(lambda: self._handle.resume(value))

    def retry(self) -> None:
        self._call(self._handle.retry)

    def history(self) -> Sequence[Event]:
        events: Sequence[Event] = self._call(self._handle.history)
        return events


@contextlib.contextmanager
def connect_sync(profile: Profile | Path | str | None = None) -> Iterator[BlockingController]:
    """`connect` for scripts without an event loop: it runs in a thread of its own."""
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(connect(profile)) as controller:
        yield BlockingController(controller, portal.call)
