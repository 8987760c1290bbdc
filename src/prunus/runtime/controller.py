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
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Unpack, overload

import msgspec

from prunus.errors import (
    BusyError,
    IndeterminateError,
    InvalidStateError,
    NotDeliveredError,
    PersistenceError,
    ProcessClassNotFoundError,
    PrunusError,
    UnroutableError,
)
from prunus.messaging.communicator import Broadcast, Communicator
from prunus.persistence import requests
from prunus.persistence.checkpoint import (
    checkpoint_as_yaml,
    decode_checkpoint,
    decode_data,
    encode_data,
    encode_value,
    type_loader,
)
from prunus.persistence.persister import Event, LogLine, Past, Query, Record
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
from prunus.processes.options import BatchOptions, LaunchOptions
from prunus.runtime.backend import Backend
from prunus.runtime.following import WatchEvent, follow
from prunus.runtime.launcher import NOT_HERE
from prunus.runtime.letters import decode_answer, encode_letter
from prunus.runtime.runner import new_process
from prunus.runtime.selection import (
    RECHECK_S,
    Filters,
    ProcessSelection,
    ask_all,
    is_left_aside,
    listening,
    pages_of,
    query_of,
    warn_of_unread,
)

if TYPE_CHECKING:
    from prunus.runtime.profile import Profile

EVENTS_BOUND = 10_000
"""A slow reader of `events` loses the oldest ones beyond this number, and is told to look again."""

QUERY_ATTEMPTS = 50
"""How often a query looks for a process that changes hands, ..."""
QUERY_PAUSE_S = 0.02
"""... and the pause in between."""
JOBS_IN_A_TURN = 100
"""So many processes are made before somebody else on the loop may run."""

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
        **options: Unpack[LaunchOptions],
    ) -> ProcessHandle[OutputsT]: ...
    @overload
    async def launch(
        self, process_class: str, inputs: Any = None, **options: Unpack[LaunchOptions]
    ) -> ProcessHandle: ...
    async def launch(
        self, process_class: type[Process[Any, Any]] | str, inputs: Any = None, **options: Unpack[LaunchOptions]
    ) -> ProcessHandle[Any]:
        """Have a process run by the workers; returns when it would survive a power cut (G1).

        `inputs` is a mapping or the class's ``Inputs``. The `options` (see `prunus.processes.options`):

        - ``pid``, ``key``: if a process with that pid exists, or one with that key is kept, in whatever state, nothing
          is launched and the handle is that process's (G6).
        - ``tags``, ``queue``, ``priority``, ``resources``, ``on_exception``: if not as the class says.
        - ``paused`` (True, or the reason): it waits for a `play` before its first step; ``pause_at``: it pauses before
          the step of this name.
        - ``parent`` makes it a child of that process, which does not wait for it; ``parent_close`` says whether it is
          killed with it (``"kill"``) or not (``"abandon"``).

        Raises `InvalidInputError` (naming every wrong port), `UnsavableValueError`, `ProcessClassNotFoundError` and
        `ValueError` (a wrong option) before anything is sent, `UnknownResourceError`, `InvalidStateError` if the parent
        has ended, `StoreFullError` if the broker's disk is full.
        """
        process = _new(process_class, inputs, options)
        if process.parent is not None:
            await self._expect_living_parent(process.parent)
        created = await self._backend.persister.create(new_process(process))
        handle = ProcessHandle[Any](created.pid, self)
        if process.parent is not None and created.is_new and process.parent_close == "kill":
            parent = await self._backend.persister.load(process.parent)
            if parent.state == "killed":  # and could not know of this child
                await handle.kill("its parent was killed")
        return handle

    @overload
    async def launch_many(
        self,
        jobs: Iterable[
            tuple[type[Process[InputsT, OutputsT]], InputsT | Mapping[str, Any] | None]
            | tuple[type[Process[InputsT, OutputsT]], InputsT | Mapping[str, Any] | None, LaunchOptions]
        ],
        **options: Unpack[BatchOptions],
    ) -> list[ProcessHandle[OutputsT]]: ...
    @overload
    async def launch_many(self, jobs: Iterable[Job], **options: Unpack[BatchOptions]) -> list[ProcessHandle]: ...
    async def launch_many(self, jobs: Iterable[Any], **options: Unpack[BatchOptions]) -> list[ProcessHandle[Any]]:
        """Launch many processes at the price of few: ``[(Relax, inputs), ...]``; their handles, in that order.

        `options` are for all of them. A job may have options of its own as a third item: ``(Relax, inputs, {"key":
        "Cu-1"})``. Everything is checked before anything is sent (and `launch` says what is raised then, with the
        number of the job); after that they go in batches, each of which is launched whole or not at all. If one fails,
        those before it may run: with a ``pid`` or ``key`` each, all of it can simply be said again.
        """
        made: list[requests.Request] = []
        for number, (process_class, inputs, *own) in enumerate(jobs):
            try:
                process = _new(process_class, inputs, {**options, **(own[0] if own else {})})
                if process.parent is not None:
                    raise ValueError("children are launched one by one, or submitted by their parent")
                made.append(requests.CreateRequest(new_process(process)))
            except (PrunusError, ValueError, TypeError) as error:
                error.add_note(f"(job number {number})")
                raise
            if number % JOBS_IN_A_TURN == JOBS_IN_A_TURN - 1:
                await asyncio.sleep(0)
        answers = await ask_all(self._backend.communicator, made)
        for number, created in enumerate(answers):
            if isinstance(created, Exception):
                created.add_note(f"(job number {number})")
                raise created
        return [ProcessHandle[Any](created.pid, self) for created in answers]

    def handle(self, pid: str) -> ProcessHandle:
        """The process `pid`; nothing is asked or checked yet."""
        return ProcessHandle(pid, self)

    async def find(self, query: Query | None = None) -> Sequence[Record]:
        """The rows of all processes that match, newest first; of the `Query.limit` newest, if the query has one.

        Without a limit they are read page by page: see `processes` for so many that they need not be in one list.
        """
        query = query or Query()
        if query.limit is not None:
            return await self._backend.persister.query(query)
        return [row async for page in pages_of(self, query) for row in page]

    def processes(self, **filters: Unpack[Filters]) -> ProcessSelection:
        """The processes that match, to look at or to act on all of them (see `prunus.runtime.selection`)::

            await controller.processes(state="waiting", tag="demo", older_than=3600).pause()

        Nothing is asked yet. Ages count from now. Raises `ValueError` for what can't be meant.
        """
        return ProcessSelection(self, query_of(filters, time.time()), filters.get("root"))

    async def pause_all(self, reason: str | None = None) -> list[str]:
        """Pause every process that is playing; the pids of those that know."""
        return (await self.processes(unfinished=True, paused=False).pause(reason, quiesced=False)).done

    async def play_all(self) -> list[str]:
        """Play every paused process."""
        return (await self.processes(unfinished=True, paused=True).play()).done

    async def kill_all(self, message: str | None = None, *, force: bool = False) -> list[str]:
        """Kill every process that has not ended."""
        return (await self.processes(unfinished=True).kill(message, force=force)).done

    @contextlib.asynccontextmanager
    async def events(self, pid: str | None = None) -> AsyncIterator[AsyncIterator[ProcessEvent]]:
        """What happens to `pid`, or to all processes, from now on::

        async with controller.events() as events:
            async for event in events: ...
        """
        stream = _EventStream()

        def heard(broadcast: Broadcast) -> None:
            stream.put(ProcessEvent(broadcast.sender, broadcast.subject or ""))

        async with listening(self._backend.communicator, heard, lambda: stream.put(MISSED), pid):
            yield stream

    @property
    def communicator(self) -> Communicator:
        """What it speaks through: for tasks, questions and broadcasts of your own."""
        return self._backend.communicator

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
        warn_of_unread(message, [posted])
        if not posted.seq:
            return await persister.load(pid), 0

        record = await self._until(
            pid, lambda row: row.is_terminal or row.inbox_done >= posted.seq or is_left_aside(row, posted)
        )
        if not record.is_terminal and record.inbox_done < posted.seq:
            raise InvalidStateError("set aside", f"continued first (`prunus retry {pid}`): {record.aside}")
        return record, posted.seq

    async def _ask(self, pid: str, message: Message) -> Any:
        """Post a letter and wait for its answer; raises what was answered, `InvalidStateError` if it has ended."""
        record, seq = await self._tell(pid, message)
        answer = await self._backend.persister.reply(pid, seq) if seq else None
        if answer is None:
            raise InvalidStateError(record.state, f"alive to be told {message.type!r}")
        return decode_answer(answer, self._load_type)

    async def _until_quiet(self, pid: str) -> None:
        """Wait until every descendant of `pid` has dealt with what its parent told it, and runs no step."""
        children = await self.processes(parent=pid, unfinished=True).records()

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

    async def _expect_living_parent(self, pid: str) -> None:
        parent = await self._backend.persister.load(pid)
        if parent.is_terminal:
            raise InvalidStateError(parent.state, "alive to get a child")


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
            raise InvalidStateError(record.state, "alive to be paused")
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
            raise InvalidStateError(record.state, "alive to be played")

    async def kill(self, message: str | None = None, *, force: bool = False, grace_s: float = DEFAULT_GRACE_S) -> None:
        """End it, and its children (unless they were submitted with another ``parent_close``).

        Returns when it is KILLED; killing a killed process changes nothing. The running step is cancelled at its next
        await and may clean up for `grace_s` seconds; `force` does not wait. Raises `InvalidStateError` if it ended in
        another way before.
        """
        record, _ = await self._controller._tell(self.pid, Kill(message, force=force, grace_s=grace_s))
        if not record.is_terminal:  # it has a last step to take
            record = await self._controller._until(self.pid, lambda row: row.is_terminal or row.aside is not None)
        if record.state != "killed":
            raise InvalidStateError(record.state, "alive to be killed")

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
            raise InvalidStateError(posted.state, f"alive to get the message {name!r}")

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

    async def edit_context(self, /, **values: Any) -> None:
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

    async def fork(self, at: str, *, pid: str | None = None, **changed_context: Any) -> ProcessHandle[OutputsT]:
        """Start a new process that goes on from where this one was about to take the step `at`, the last time.

        It has the queue, the priority and the resources of this one (and no key), and the inputs, the outputs and the
        context of that moment, the context with `changed_context`. Raises `InvalidStateError` if no such step is on
        record.
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

    async def history(self, after: int = 0) -> Sequence[Event]:
        """What happened to it, oldest first; only the events with a number above `after`, if that is given."""
        return await self._persister.history(self.pid, after)

    async def watch(self, *, after: int = 0, tree: bool = False) -> AsyncIterator[WatchEvent]:
        """Everything that happens to it, from its past (the events with a number above `after`) through now, as it
        happens: each event exactly once, in order, whatever the connection and the broker do meanwhile::

            async for event in handle.watch():
                print(event.subject, event.step)

        It ends after the event that ends the process. (A `retry` later begins another life of it, which is watched
        from here on: ``watch(after=event.seq)``; what lies in the past already is told through all its lives.) With
        `tree` the events of its descendants are in between, each process's in order, and it ends when all of them have
        ended. Raises `CheckpointNotFoundError` if there is no such process (any more).
        """
        async with contextlib.aclosing(follow(self._controller.communicator, self.pid, after, tree=tree)) as events:
            async for event in events:
                yield event

    async def children(self) -> list[ProcessHandle]:
        """Its children, in the order in which they were made. To act on them: ``controller.processes(parent=pid)``."""
        return (await self._controller.processes(parent=self.pid).handles())[::-1]

    async def parent(self) -> ProcessHandle | None:
        """The process that submitted it; None if nobody did."""
        parent = (await self.record()).parent
        return None if parent is None else ProcessHandle(parent, self._controller)

    async def delete(self) -> None:
        """Forget it, with all that belongs to it. Raises `InvalidStateError` unless it has ended and nobody waits for
        it."""
        await self._persister.delete(self.pid)

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
async def connect(
    profile: Profile | Path | str | None = None, *, key: Path | str | None = None
) -> AsyncIterator[ProcessController]:
    """A controller of the daemon of a profile: the given one, or that of this folder or user; or, with the file of a
    `key`, of the daemon on a network that the key is for.

    Raises `ProfileError`, `ConnectionLostError` (no daemon runs), `BusyError` (the broker has as many clients as it may
    have) and `KeyRefusedError`.
    """
    from prunus.runtime.connecting import communicator

    controller = ProcessController(await communicator(profile, key=key, name="controller"))
    try:
        yield controller
    finally:
        await controller.close()


def _result(record: Record) -> ProcessResult:
    assert record.result is not None, "a terminal process has a result"
    return ProcessResult.from_data(decode_data(record.result))


Job = tuple[type[Process[Any, Any]] | str, Any] | tuple[type[Process[Any, Any]] | str, Any, LaunchOptions]
"""What `ProcessController.launch_many` launches: a class, its inputs, and options of its own."""


def _new(process_class: type[Process[Any, Any]] | str, inputs: Any, options: LaunchOptions) -> Process[Any, Any]:
    """The process that is to be launched; raises as `ProcessController.launch` does before anything is sent."""
    if isinstance(process_class, str):
        process_class = load_class(process_class)
    said: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    paused, pause_at = said.pop("paused", False), said.pop("pause_at", None)
    if said.get("parent_close") == "wait" and "parent" in said:
        raise ValueError('parent_close="wait": only the parent itself can wait for a child; it would have to submit it')
    process = process_class(inputs, **said)
    if paused:
        process.receive(Pause(None if paused is True else paused))
    if pause_at is not None:
        process.receive(PauseAt(pause_at))
    if load_class(process.class_id) is not process_class:
        raise ProcessClassNotFoundError(
            process.class_id, "another class goes by this name, and workers would find that one; rename one of them"
        )
    return process
