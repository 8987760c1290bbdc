"""The blocking face of the controller, for scripts and prompts without an event loop: `connect_sync`.

::

    with prunus.connect_sync() as controller:
        handle = controller.launch(Relax, {"element": "Cu"})
        print(handle.result().outputs)

The same names with the same parameters as in `prunus.runtime.controller`; each call returns when the answer is there.
The event loop is in a thread of its own. Nothing is done here: most members are the asynchronous ones, seen through
`waits_for`, which keeps their parameters and what they give; those that give handles wrap them.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from functools import update_wrapper
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, Unpack, overload

from prunus.processes import Process, ProcessResult
from prunus.processes.generics import InputsT, OutputsT
from prunus.processes.options import BatchOptions, LaunchOptions
from prunus.runtime.controller import Job, ProcessController, ProcessEvent, ProcessHandle, connect
from prunus.runtime.following import WatchEvent
from prunus.runtime.selection import Filters, ProcessSelection

if TYPE_CHECKING:
    from prunus.runtime.profile import Profile

P = ParamSpec("P")
T = TypeVar("T")
Call = Callable[[Callable[[], Awaitable[Any]]], Any]
"""Runs something in the loop and waits for what it gives."""


class _Face(Protocol):
    """What every class here has."""

    _call: Call
    _face_of: Any
    """The asynchronous one."""


class waits_for(Generic[P, T]):
    """The blocking form of an asynchronous method: same parameters, same value, same documentation."""

    def __init__(self, method: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> None:
        def waiting(face: _Face, *args: P.args, **kwargs: P.kwargs) -> T:
            value: T = face._call(lambda: method(face._face_of, *args, **kwargs))
            return value

        self._waiting = update_wrapper(waiting, method)

    @overload
    def __get__(self, face: None, owner: type) -> Callable[Concatenate[Any, P], T]: ...
    @overload
    def __get__(self, face: _Face, owner: type) -> Callable[P, T]: ...
    def __get__(self, face: _Face | None, owner: type) -> Callable[..., T]:
        return self._waiting if face is None else MethodType(self._waiting, face)


class BlockingController:
    """`ProcessController` for scripts."""

    def __init__(self, controller: ProcessController, call: Call) -> None:
        self._face_of = controller
        self._call = call

    find = waits_for(ProcessController.find)
    pause_all = waits_for(ProcessController.pause_all)
    play_all = waits_for(ProcessController.play_all)
    kill_all = waits_for(ProcessController.kill_all)
    broker_statistics = waits_for(ProcessController.broker_statistics)

    @overload
    def launch(
        self,
        process_class: type[Process[InputsT, OutputsT]],
        inputs: InputsT | Mapping[str, Any] | None = None,
        **options: Unpack[LaunchOptions],
    ) -> BlockingHandle[OutputsT]: ...
    @overload
    def launch(self, process_class: str, inputs: Any = None, **options: Unpack[LaunchOptions]) -> BlockingHandle: ...
    def launch(
        self, process_class: type[Process[Any, Any]] | str, inputs: Any = None, **options: Unpack[LaunchOptions]
    ) -> BlockingHandle[Any]:
        """See `ProcessController.launch`."""
        launch: Any = self._face_of.launch
        return BlockingHandle(self._call(lambda: launch(process_class, inputs, **options)), self._call)

    @overload
    def launch_many(
        self,
        jobs: Iterable[
            tuple[type[Process[InputsT, OutputsT]], InputsT | Mapping[str, Any] | None]
            | tuple[type[Process[InputsT, OutputsT]], InputsT | Mapping[str, Any] | None, LaunchOptions]
        ],
        **options: Unpack[BatchOptions],
    ) -> list[BlockingHandle[OutputsT]]: ...
    @overload
    def launch_many(self, jobs: Iterable[Job], **options: Unpack[BatchOptions]) -> list[BlockingHandle]: ...
    def launch_many(self, jobs: Iterable[Any], **options: Unpack[BatchOptions]) -> list[BlockingHandle[Any]]:
        """See `ProcessController.launch_many`."""
        handles = self._call(lambda: self._face_of.launch_many(jobs, **options))
        return [BlockingHandle(handle, self._call) for handle in handles]

    def handle(self, pid: str) -> BlockingHandle:
        """The process `pid`; nothing is asked or checked yet."""
        return BlockingHandle(self._face_of.handle(pid), self._call)

    def processes(self, **filters: Unpack[Filters]) -> BlockingSelection:
        """See `ProcessController.processes`."""
        return BlockingSelection(self._face_of.processes(**filters), self._call)

    def events(self, pid: str | None = None) -> contextlib.AbstractContextManager[Iterator[ProcessEvent]]:
        """See `ProcessController.events`."""
        return self._events(pid)

    @contextlib.contextmanager
    def _events(self, pid: str | None) -> Iterator[Iterator[ProcessEvent]]:
        context = self._face_of.events(pid)
        events = self._call(context.__aenter__)
        try:
            yield _one_by_one(events, self._call)
        finally:
            self._call(lambda: context.__aexit__(None, None, None))


class BlockingHandle(Generic[OutputsT]):
    """`ProcessHandle` for scripts."""

    def __init__(self, handle: ProcessHandle[OutputsT], call: Call) -> None:
        self._face_of = handle
        self._call = call
        self.pid = handle.pid

    record = waits_for(ProcessHandle.record)
    until = waits_for(ProcessHandle.until)
    pause = waits_for(ProcessHandle.pause)
    play = waits_for(ProcessHandle.play)
    kill = waits_for(ProcessHandle.kill)
    resume = waits_for(ProcessHandle.resume)
    send = waits_for(ProcessHandle.send)
    query = waits_for(ProcessHandle.query)
    update = waits_for(ProcessHandle.update)
    edit_context = waits_for(ProcessHandle.edit_context)
    settle = waits_for(ProcessHandle.settle)
    retry = waits_for(ProcessHandle.retry)
    delete = waits_for(ProcessHandle.delete)
    steps = waits_for(ProcessHandle.steps)
    log = waits_for(ProcessHandle.log)
    history = waits_for(ProcessHandle.history)
    checkpoint_yaml = waits_for(ProcessHandle.checkpoint_yaml)

    def result(self, timeout_s: float | None = None) -> ProcessResult[OutputsT]:
        """See `ProcessHandle.result`."""
        result: ProcessResult[OutputsT] = self._call(lambda: self._face_of.result(timeout_s))
        return result

    def outcome(self) -> ProcessResult[OutputsT] | None:
        """See `ProcessHandle.outcome`."""
        outcome: ProcessResult[OutputsT] | None = self._call(self._face_of.outcome)
        return outcome

    def fork(self, at: str, *, pid: str | None = None, **changed_context: Any) -> BlockingHandle[OutputsT]:
        """See `ProcessHandle.fork`."""
        return BlockingHandle(self._call(lambda: self._face_of.fork(at, pid=pid, **changed_context)), self._call)

    def watch(self, *, after: int = 0, tree: bool = False) -> Iterator[WatchEvent]:
        """See `ProcessHandle.watch`."""
        return _one_by_one(self._face_of.watch(after=after, tree=tree), self._call)

    def children(self) -> list[BlockingHandle]:
        """See `ProcessHandle.children`."""
        return [BlockingHandle(child, self._call) for child in self._call(self._face_of.children)]

    def parent(self) -> BlockingHandle | None:
        """See `ProcessHandle.parent`."""
        parent = self._call(self._face_of.parent)
        return None if parent is None else BlockingHandle(parent, self._call)

    def __repr__(self) -> str:
        return f"BlockingHandle({self.pid!r})"


class BlockingSelection:
    """`ProcessSelection` for scripts."""

    def __init__(self, selection: ProcessSelection, call: Call) -> None:
        self._face_of = selection
        self._call = call

    records = waits_for(ProcessSelection.records)
    count = waits_for(ProcessSelection.count)
    pause = waits_for(ProcessSelection.pause)
    play = waits_for(ProcessSelection.play)
    kill = waits_for(ProcessSelection.kill)
    send = waits_for(ProcessSelection.send)
    retry = waits_for(ProcessSelection.retry)
    delete = waits_for(ProcessSelection.delete)

    def __iter__(self) -> Iterator[BlockingHandle]:
        for handle in _one_by_one(aiter(self._face_of), self._call):
            yield BlockingHandle(handle, self._call)

    def handles(self) -> list[BlockingHandle]:
        """See `ProcessSelection.handles`."""
        return list(self)

    def __repr__(self) -> str:
        return repr(self._face_of)


@contextlib.contextmanager
def connect_sync(
    profile: Profile | Path | str | None = None, *, key: Path | str | None = None
) -> Iterator[BlockingController]:
    """`connect` for scripts without an event loop: it runs in a thread of its own."""
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(connect(profile, key=key)) as controller:
        yield BlockingController(controller, portal.call)


def _one_by_one(items: AsyncIterator[T], call: Call) -> Iterator[T]:
    """What an asynchronous iterator gives; it is closed when nobody reads on."""
    end: Any = object()

    async def following() -> T:
        return await anext(items, end)

    try:
        while (item := call(following)) is not end:
            yield item
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it all that was read in it
                call(close)
