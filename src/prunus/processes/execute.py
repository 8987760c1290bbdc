"""The local driver: processes run here and now, without a daemon and without being stored.

`execute` drives one process to its end on the running loop, its children beside it as tasks of their own. It is the
same machine that a worker drives, so what works here works there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import Any

from prunus.errors import CheckpointNotFoundError, Failure, InvalidStateError, StepBlockedError
from prunus.processes.control import Kill
from prunus.processes.generics import InputsT, OutputsT
from prunus.processes.listeners import Line
from prunus.processes.loading import load_class
from prunus.processes.machine import NO_EFFECTS, Effects
from prunus.processes.process import Process
from prunus.processes.result import ProcessResult
from prunus.processes.stack import clean_context
from prunus.processes.waits import Mail, Outcomes

MAX_TURN_S = 0.01
"""After so long somebody else may run, however little the steps wait."""


async def execute(
    process: Process[InputsT, OutputsT] | type[Process[InputsT, OutputsT]],
    inputs: InputsT | Mapping[str, Any] | None = None,
    *,
    pid: str | None = None,
    tags: Iterable[str] = (),
    caller: Process | None = None,
) -> ProcessResult[OutputsT]:
    """Run a process, or a new one of a class, to its end, and all children that it submits.

    Raises `ProcessExceptedError` or `ProcessKilledError` if it did not finish, `InvalidInputError` for wrong inputs.
    If the task that awaits this is cancelled, the process and its children are killed, and `CancelledError` goes on.
    Children that nobody waits for are waited for; when their parent is killed they are killed too, unless they are
    submitted with another ``parent_close``. `caller` is a process that calls this one in a step: it gets its lines.
    Nobody could play a process that is called, so where one would be paused its caller gets `StepBlockedError`.
    """
    if isinstance(process, type):
        process = process(inputs, pid=pid, tags=tags)
    result: ProcessResult[OutputsT] = await _Family(caller).join(process).drive()
    return result.raise_for_state()


def run(
    process_class: type[Process[InputsT, OutputsT]], inputs: InputsT | Mapping[str, Any] | None = None
) -> ProcessResult[OutputsT]:
    """`execute` for a script: blocks until the process has ended."""
    try:
        asyncio.get_running_loop()
        has_loop = True
    except RuntimeError:
        has_loop = False
    if has_loop:
        raise RuntimeError(
            "there is a running event loop here: write `await prunus.execute(...)` instead of prunus.run"
        )
    return asyncio.run(execute(process_class, inputs))


class _Family:
    """A process that is executed and its descendants: one task for each child, and who has ended how."""

    def __init__(self, caller: Process | None = None) -> None:
        self.caller = caller
        self.blocked: str | None = None
        """Why one of them is paused, if there is a caller."""
        self.members: dict[str, _Member] = {}
        self.results: dict[str, ProcessResult] = {}
        """In the order in which they ended."""

    def join(self, process: Process) -> _Member:
        member = self.members[process.pid] = _Member(self, process)
        return member

    def leave(self, process: Process) -> None:
        """It has ended. Whoever waits for it looks again."""
        del self.members[process.pid]
        process.driver = None
        if self.members:
            self.results[process.pid] = process.result()
            for member in self.members.values():
                if process.pid in member.awaited:
                    member.changed()


class _Member:
    """The driver of one process."""

    __slots__ = ("_awake", "_children", "_family", "_letters", "_looked_at_s", "_mail", "_process", "awaited")

    def __init__(self, family: _Family, process: Process) -> None:
        self._family = family
        self._process = process
        self._awake: asyncio.Future[None] | None = None
        self._children: dict[asyncio.Task[ProcessResult], Process] = {}
        self._mail: tuple[Mail, ...] = ()
        self._letters = 0
        self._looked_at_s = 0.0
        """When it was last looked whether its waits are over."""
        self.awaited: Sequence[str] = ()
        """The pids that it waits for."""
        process.driver = self

    async def drive(self) -> ProcessResult:
        """Drive it to its end; returns when its own children have ended too."""
        process, turn_ends_s = self._process, monotonic() + MAX_TURN_S
        try:
            while True:
                if process.can_step:
                    if process.begin_step() is None:
                        await process.end_step()
                    if monotonic() > turn_ends_s:  # steps that wait for nothing would let nobody else run
                        await asyncio.sleep(0)
                        turn_ends_s = monotonic() + MAX_TURN_S
                elif process.has_terminated():
                    break
                elif process.paused or not self._settle():
                    self._refuse_pause()
                    await self._sleep()
                if (effects := process.take_effects()) is not NO_EFFECTS:
                    self._carry_out(effects)
        except (asyncio.CancelledError, StepBlockedError) as error:
            is_blocked = isinstance(error, StepBlockedError)
            why = "a process that it belongs to is blocked" if is_blocked else "the task that executed it was cancelled"
            process.receive(Kill(why, force=True))
            await self._cancel_children()
            raise
        finally:
            self._family.leave(process)
        if self._children:
            try:
                await asyncio.wait(self._children)
            except asyncio.CancelledError:
                await self._cancel_children()
                raise
            if self._family.blocked is not None:
                self._look_at_children()
                raise StepBlockedError(self._family.blocked)
        return process.result()

    # --- for the process ----------------------------------------------------------------------------

    def changed(self) -> None:
        if self._awake is not None and not self._awake.done():
            self._awake.set_result(None)

    def said(self) -> None:
        self._hand_on(self._process.take_lines())

    def deliver(self, name: str, value: Any) -> None:
        self._letters += 1
        self._mail = (*self._mail, Mail(self._letters, name, value))
        self.changed()

    def check(self, values: Mapping[str, Any]) -> None:
        """Nothing is stored here."""

    async def keep(self) -> None:
        """Nothing is stored here."""

    async def results(self, pids: Sequence[str]) -> list[ProcessResult]:
        for pid in pids:
            if (member := self._family.members.get(pid)) is not None:
                raise InvalidStateError(member._process.state.value, f"ended to have a result (it is {pid})")
            if pid not in self._family.results:
                raise CheckpointNotFoundError(pid)
        return [self._family.results[pid] for pid in pids]

    def load_class(self, identifier: str) -> type[Process]:
        return load_class(identifier)

    # --- inside -------------------------------------------------------------------------------------

    def _refuse_pause(self) -> None:
        """Of a process that is called, and of those below it, nobody has a handle by which to play it."""
        family = self._family
        if family.caller is None:
            return
        if family.blocked is None and self._process.paused:
            family.blocked = self._process.status or f"process {self._process.pid} is paused"
            for member in family.members.values():
                member.changed()
        if family.blocked is not None:
            raise StepBlockedError(family.blocked)

    def _settle(self) -> bool:
        """Whether something has changed by what has happened of what it waits for."""
        process, family = self._process, self._family
        self.awaited = process.waiting_for
        strangers = [pid for pid in self.awaited if pid not in family.members and pid not in family.results]
        if strangers:
            error = InvalidStateError("waiting", f"waiting for processes that run here, not for {', '.join(strangers)}")
            process.fail(Failure.of(error))
            return True
        awaited, revision = set(self.awaited), process.revision
        results = {pid: result for pid, result in family.results.items() if pid in awaited}
        self._looked_at_s = time.time()
        process.settle(Outcomes(self._looked_at_s, results, self._mail))
        return process.revision != revision

    async def _sleep(self) -> None:
        """Until a message or the end of another process may have changed something, or it is time."""
        at_s = None if self._process.paused else self._process.wakes(self._looked_at_s).at_s
        loop = asyncio.get_running_loop()
        self._awake = loop.create_future()
        timer = None if at_s is None else loop.call_later(at_s - time.time(), self.changed)
        try:
            await self._awake
        finally:
            self._awake = None
            if timer is not None:
                timer.cancel()

    def _carry_out(self, effects: Effects) -> None:
        """What the process wants to become true."""
        if effects.lines:
            self._hand_on(effects.lines)
        for child in effects.children:
            if child.pid in self._family.members or child.pid in self._family.results:
                continue  # of a step that runs again
            driving = self._family.join(child).drive()
            task = asyncio.get_running_loop().create_task(driving, name=child.pid, context=clean_context())
            self._children[task] = child
        if effects.used_mail:
            self._mail = tuple(mail for mail in self._mail if mail.seq not in effects.used_mail)
        for message, policies in effects.tells:
            for child in self._children.values():
                if child.parent_close in policies:
                    child.receive(message)

    def _hand_on(self, lines: Sequence[Line]) -> None:
        """Nothing is kept here; who has called the process in a step gets its lines."""
        caller = self._family.caller
        if caller is None:
            return
        for line in lines:
            source = line.source or f"{type(self._process).__name__} {self._process.pid}"
            caller.write_line(line.level, line.text, source)

    async def _cancel_children(self) -> None:
        if not self._children:
            return
        for task in self._children:
            task.cancel()
        await asyncio.wait(self._children)
        self._look_at_children()
        for child in self._children.values():  # those whose task had not begun
            child.receive(Kill("the execution of its parent was cancelled", force=True))

    def _look_at_children(self) -> None:
        """What their tasks have raised is known: they are blocked as this one is."""
        for task in self._children:
            if not task.cancelled():
                task.exception()
