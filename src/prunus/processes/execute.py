"""The local driver: processes run here and now, without a daemon and without being stored.

`execute` drives one process to its end on the running loop, its children beside it as tasks of their own. It is the
same machine that a worker drives, so what works here works there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from prunus.errors import Failure, InvalidStateError
from prunus.processes.control import Kill
from prunus.processes.process import Process
from prunus.processes.result import ProcessResult
from prunus.processes.states import ProcessState


async def execute(
    process: Process | type[Process],
    inputs: Any = None,
    *,
    pid: str | None = None,
    tags: Iterable[str] = (),
) -> ProcessResult:
    """Run a process, or a new one of a class, to its end, and all children that it submits.

    Raises `ProcessExceptedError` or `ProcessKilledError` if it did not finish, `InvalidInputError` for wrong inputs.
    If the task that awaits this is cancelled, the process and its children are killed, and `CancelledError` goes on.
    Children that nobody waits for are waited for; when their parent is killed they are killed too.
    """
    if isinstance(process, type):
        process = process(inputs, pid=pid, tags=tags)
    family = _Family()
    return (await family.drive(process)).raise_for_state()


def run(process_class: type[Process], inputs: Any = None) -> ProcessResult:
    """`execute` for a script: blocks until the process has ended."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(execute(process_class, inputs))
    raise RuntimeError("there is a running event loop here: write `await prunus.execute(...)` instead of prunus.run")


class _Family:
    """A process that is executed and its descendants: one task for each child, and who has ended how."""

    def __init__(self) -> None:
        self._members: dict[str, asyncio.Event] = {}
        self._results: dict[str, ProcessResult] = {}

    async def drive(self, process: Process) -> ProcessResult:
        """Drive one of the family; returns when it and its own children have ended."""
        awake = self._members.setdefault(process.pid, asyncio.Event())
        process.on_change = awake.set
        children: dict[asyncio.Task[ProcessResult], Process] = {}
        try:
            while not process.has_terminated():
                if process.can_step:
                    await process.step()
                    for child in process.take_children():
                        self._members[child.pid] = asyncio.Event()
                        children[asyncio.create_task(self.drive(child), name=child.pid)] = child
                elif process.waiting_for and not process.resolve(self._results):
                    await self._wait_for_others(process, awake)
                else:
                    await awake.wait()
                awake.clear()
            result = self._results[process.pid] = process.result()
            if process.parent is not None:
                for other in self._members.values():
                    other.set()
            if children:
                if result.state is ProcessState.KILLED:
                    _kill(children, f"its parent {process.pid} was killed")
                await asyncio.wait(children)
            return result
        except asyncio.CancelledError:
            process.receive(Kill("the task that executed it was cancelled", force=True))
            raise
        finally:
            process.on_change = None
            if children:
                await _cancel(children)

    async def _wait_for_others(self, process: Process, awake: asyncio.Event) -> None:
        strangers = [pid for pid in process.waiting_for if pid not in self._members]
        if strangers:
            error = InvalidStateError("waiting", f"waiting for processes that run here, not for {', '.join(strangers)}")
            process.fail(Failure.of(error))
        else:
            await awake.wait()


async def _cancel(children: dict[asyncio.Task[ProcessResult], Process]) -> None:
    for task in children:
        task.cancel()
    await asyncio.wait(children)
    _kill(children, "the execution of its parent was cancelled")  # those whose task had not begun


def _kill(children: dict[asyncio.Task[ProcessResult], Process], why: str) -> None:
    for child in children.values():
        child.receive(Kill(why, force=True))
