"""A work chain: a process whose steps are laid out in its spec.

``spec.outline(...)`` says which methods run in which order (`prunus.processes.outline`). Between two of them the
process is checkpointed. They share the **context** ``self.ctx``, and they can make children and wait for them::

    def submit_all(self):
        for scale in self.inputs.scales:
            self.to_context(points=append_(self.submit(EnergyAtScale, {"scale": scale})))

    def collect(self):
        energies = [point.outputs.energy for point in self.ctx.points]

When a step has named children for the context, the outline goes on only when all of them have ended; the context
then holds one `ProcessResult` for each, those of ``append_`` in a list in the order of submission. What a step returns:
None to go on, `ToContext`, a command, an instance of the class's `Outputs`, or a number: the exit status (0 goes on).

A predicate is asked when the outline reaches it, on the loop: it looks at the context and answers True or False. One
that has to wait is an ``async def``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from prunus.errors import SpecError
from prunus.processes.commands import Child, Command, Continue, Stop, Wait
from prunus.processes.namespaces import AttributeDict
from prunus.processes.outline import End, Outline, Path, Question, Return, Step, compile_outline
from prunus.processes.process import Process, Transition, _Attempt, names_of
from prunus.processes.result import ProcessResult
from prunus.processes.spec import ProcessSpec
from prunus.processes.states import Waiting


@dataclass(frozen=True, slots=True)
class Append:
    """A child whose result is appended to a list in the context."""

    child: Child


def append_(child: Child) -> Append:
    """``to_context(points=append_(child))``: append its result to the list ``ctx.points``."""
    return Append(child)


class ToContext(dict[str, "Child | Append"]):
    """``return ToContext(relaxed=child)``: the same as ``self.to_context(relaxed=child)``."""


class WorkChainSpec(ProcessSpec):
    """A spec with an outline."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.instructions: tuple[Any, ...] = ()
        self.compiled: Outline

    def outline(self, *instructions: Any) -> None:
        """Lay out the steps; an outline that is defined later replaces an earlier one."""
        if self.inputs.frozen:
            raise SpecError("the spec is complete and can't be changed any more; define the outline in `define`")
        self.instructions = instructions

    def complete(self, process_class: type[Process]) -> None:
        self.compiled = compile_outline(self.instructions, process_class, f"the outline of {self.name}")
        super().complete(process_class)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "outline": self.compiled.described}


@dataclass(frozen=True, slots=True)
class _Awaited:
    """A child whose result belongs into the context."""

    key: str
    pid: str
    append: bool


class _Memo:
    """What a step of a work chain may write, beside outputs and children."""

    __slots__ = ("awaited", "context", "position")

    def __init__(self, position: Path, context: AttributeDict, awaited: tuple[_Awaited, ...]) -> None:
        self.position = position
        self.context = context
        self.awaited = awaited

    def copy(self) -> _Memo:
        return _Memo(self.position, self.context.copy(), self.awaited)


class WorkChain(Process):
    """The base of all work chains. A subclass gives its spec an outline."""

    spec_class: ClassVar[type[ProcessSpec]] = WorkChainSpec

    # --- for steps ----------------------------------------------------------------------------------

    @property
    def ctx(self) -> Any:
        """The context, by attribute and by item. What a step writes here is kept when the step ends well."""
        return self._my_memo().context

    def to_context(self, **children: Child | Append) -> None:
        """Wait for these children before the next step of the outline, and put their results into the context."""
        _expect(self._my_memo(), children)

    # --- the outline is the step `run`, over and over ---------------------------------------------------

    async def run(self, *_: Any) -> Any:
        """One step of the outline: ask until there is something to do, do it, ask what follows."""
        memo = self._my_memo()
        if memo.awaited:
            return None
        place = await self._seek(memo)
        if not isinstance(place, Step):
            return _ending(place)
        value = await self._call(self._method(place.name))
        memo.position = place.then
        if not _goes_on(value):
            return value
        if isinstance(value, ToContext):
            _expect(memo, value)
        if not memo.awaited:
            place = await self._seek(memo)
            if not isinstance(place, Step):
                return _ending(place)
        return None

    async def _seek(self, memo: _Memo) -> Step | Return | End:
        """Move on to the first place that is not a question."""
        outline = self._outline
        while isinstance(place := outline.at(memo.position), Question):
            yes = self._method(place.name)()
            if inspect.isawaitable(yes):
                yes = await yes
            if not isinstance(yes, bool):
                raise SpecError(f"the predicate {place.name} must answer True or False; it returned {yes!r}")
            memo.position = place.yes if yes else place.no
        return place

    def _command(self, attempt: _Attempt, value: Any) -> Command:
        memo: _Memo = attempt.memo
        if _goes_on(value):
            if isinstance(value, ToContext):
                _expect(memo, value)
            if memo.awaited:
                return Wait("run", "waits for its children", on=dict.fromkeys(item.pid for item in memo.awaited))
            return _NEXT
        if isinstance(value, Wait) and value.callback is None:
            return Wait("run", value.msg, value.data, value.on)
        if isinstance(value, int) and not isinstance(value, bool):
            return Stop(exit_status=value)
        command = super()._command(attempt, value)
        if isinstance(command, Stop) and command.result is value:
            raise TypeError(
                f"a step of an outline returned {value!r}; it may return None, ToContext, a command, Outputs or an "
                "exit status"
            )
        return command

    def _collect(self, results: Mapping[str, ProcessResult]) -> None:
        memo = self._memo
        for item in memo.awaited:
            if item.pid in results:
                result = results[item.pid]
                old = memo.context.get(item.key)
                memo.context[item.key] = [*(old or ()), result] if item.append else result
        memo.awaited = tuple(item for item in memo.awaited if item.pid not in results)

    def _go_on(self, args: tuple[Any, ...]) -> tuple[Transition, ...]:
        # `run` finds what it needs in the context.
        return super()._go_on(() if isinstance(self._state, Waiting) and self._state.step == "run" else args)

    # --- state --------------------------------------------------------------------------------------

    @property
    def next_step(self) -> str | None:
        step = super().next_step
        if step != "run":
            return step
        return self._outline.at(self._memo.position).name

    def _set_up(self, *args: Any) -> None:
        super()._set_up(*args)
        assert isinstance(self._spec, WorkChainSpec)
        self._outline: Outline = self._spec.compiled
        self._memo = _Memo(self._outline.start, AttributeDict(), ())

    def _new_attempt(self, number: int) -> _Attempt:
        attempt = super()._new_attempt(number)
        attempt.memo = self._memo.copy()
        return attempt

    def _commit(self, attempt: _Attempt) -> None:
        super()._commit(attempt)
        self._memo = attempt.memo

    def _my_memo(self) -> _Memo:
        attempt = self._mine()
        return self._memo if attempt is None else attempt.memo

    def snapshot(self) -> dict[str, Any]:
        memo = self._memo
        return {
            **super().snapshot(),
            "context": dict(memo.context),
            "position": list(memo.position),
            "place": self._outline.at(memo.position).name,
            "awaited": [[item.key, item.pid, item.append] for item in memo.awaited],
        }

    def _load(self, snapshot: Mapping[str, Any]) -> None:
        super()._load(snapshot)
        position = tuple(snapshot["position"])
        if not self.has_terminated():
            place, expected = self._outline.at(position), snapshot["place"]
            if place.name != expected:
                raise SpecError(
                    f"the outline of {self._spec.name} has changed since this process was saved: what comes next was "
                    f"{expected!r}, and now {place.name!r} stands there"
                )
        awaited = tuple(_Awaited(key, pid, append) for key, pid, append in snapshot["awaited"])
        self._memo = _Memo(position, AttributeDict(snapshot["context"]), awaited)


WorkChain._reserved = Process._reserved | names_of(WorkChain) | {"run"}

_NEXT = Continue("run")


def _goes_on(value: Any) -> bool:
    """Whether the value of a step means: to the next one."""
    return value is None or isinstance(value, ToContext) or (value == 0 and type(value) is int)


def _ending(place: Return | End) -> Stop:
    return Stop(exit_status=place.code) if isinstance(place, Return) else Stop()


def _expect(memo: _Memo, children: Mapping[str, Child | Append]) -> None:
    """Write down whose results are to come into the context."""
    for key, child in children.items():
        handle = child.child if isinstance(child, Append) else child
        if not isinstance(handle, Child):
            raise TypeError(f"to_context({key}=...) takes what self.submit gives, or append_ of it; got {child!r}")
        if isinstance(child, Append) and not isinstance(memo.context.get(key, []), list):
            raise TypeError(f"to_context({key}=append_(...)): ctx.{key} is there already, and is no list")
        memo.awaited += (_Awaited(key, handle.pid, isinstance(child, Append)),)
