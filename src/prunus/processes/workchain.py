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
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import msgspec

from prunus.errors import InvalidStepError, SpecError
from prunus.processes import stack
from prunus.processes.attempts import Attempt, Outcome, at_once
from prunus.processes.commands import Command, Stop, Wait
from prunus.processes.generics import InputsT, OutputsT
from prunus.processes.machine import StepCall, _NotYet
from prunus.processes.namespaces import AttributeDict
from prunus.processes.outline import End, Outline, Path, Place, Question, Return, Step, compile_outline
from prunus.processes.process import Process, names_of
from prunus.processes.result import ProcessResult
from prunus.processes.spec import NoStepsError, ProcessSpec
from prunus.processes.states import Pending, Running, Waiting
from prunus.processes.steps import StepOptions
from prunus.processes.waits import AllOf, Answer, Child, OnMessage, names_of_values

MAX_QUESTIONS = 10_000
"""So many questions between two steps of an outline mean that it would never come to a step."""


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
        if not self.instructions:
            raise NoStepsError(f"the outline of {self.name} has no steps")
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


class _Memo(msgspec.Struct, eq=False):
    """What a step of a work chain may write, beside outputs and children."""

    position: Path
    context: AttributeDict
    awaited: tuple[_Awaited, ...]
    asked: int = 0
    """How many questions came since the last step."""

    def copy(self) -> _Memo:
        return _Memo(self.position, AttributeDict(dict.copy(self.context)), self.awaited)


class WorkChain(Process[InputsT, OutputsT]):
    """The base of all work chains. A subclass gives its spec an outline."""

    spec_class: ClassVar[type[ProcessSpec]] = WorkChainSpec
    _outline: Outline
    _memo: _Memo

    # --- for steps ----------------------------------------------------------------------------------

    @property
    def ctx(self) -> Any:
        """The context, by attribute and by item. What a step writes here is kept when the step ends well."""
        attempt = self._attempt
        if attempt is not None and stack.frames() is attempt.frames:  # (as it mostly is)
            return attempt.memo.context
        return self._my_memo().context

    def to_context(self, **children: Child | Append) -> None:
        """Wait for these children before the next step of the outline, and put their results into the context."""
        _expect(self._my_memo(), children)

    # --- the outline is the step `run`, over and over ---------------------------------------------------

    async def run(self, place: Return | End) -> Stop:
        """What comes when the outline has no step any more."""
        return _ending(place)

    async def _run_step(self, memo: _Memo, place: Step, step: Callable[[], Awaitable[Any]]) -> Any:
        """One step of the outline: do it, then ask until there is something to do again."""
        rest = self._leave(memo, place, await step())
        return await rest if inspect.iscoroutine(rest) else rest

    def _run_inline(self, memo: _Memo, place: Step, step: Callable[[], Any], is_async: bool) -> Any:
        """The same for a step that can't wait. What it returns may have to be awaited."""
        value = at_once(step) if is_async else step()
        if value is not None and not is_async and inspect.isawaitable(value):
            return self._run_step(memo, place, lambda: value)
        return self._leave(memo, place, value)

    def _leave(self, memo: _Memo, place: Step, value: Any) -> Any:
        """What a step's value becomes when the outline has gone on from it; a coroutine if that must be awaited."""
        if value is not None:
            if not _goes_on(value):
                self._refuse_awaitable(place.name, value)
                memo.position = place.then
                return value
            if value:
                _expect(memo, value)
        if memo.awaited:
            memo.position = place.then
            return None
        found = self._look(memo, place.then)
        if type(found) is Step:
            return None
        return self._look_on(memo, found) if isinstance(found, tuple) else _ending(found)

    async def _look_on(self, memo: _Memo, found: _Place | _Asked) -> Stop | None:
        """Wait for the answers that must be waited for. None if there is a step to do."""
        while isinstance(found, tuple):
            question, answer = found
            found = self._look(memo, self._decide(question, await answer))
        return None if type(found) is Step else _ending(found)

    def _look(self, memo: _Memo, position: Path) -> _Place | _Asked:
        """Move on from `position` to the first place that is not a question, or whose question must be waited for."""
        places, asked = self._outline.places, memo.asked
        while type(place := places[position]) is Question:
            asked += 1
            if asked > MAX_QUESTIONS:
                raise InvalidStepError(
                    type(self).__qualname__,
                    place.name,
                    f"was asked again and again: {MAX_QUESTIONS} questions without any step in between, so this "
                    "outline does not end",
                )
            answer = getattr(self, place.name)()
            if answer is not True and answer is not False and inspect.isawaitable(answer):
                memo.asked = asked
                return place, answer
            position = self._decide(place, answer)
        memo.position = position
        return place

    def _decide(self, question: Question, answer: Any) -> Path:
        """Where the answer to `question` leads."""
        if answer is True:
            return question.yes
        if answer is False:
            return question.no
        raise InvalidStepError(
            type(self).__qualname__, question.name, f"must answer True or False; it returned {answer!r}"
        )

    async def _ask_first(self, memo: _Memo) -> None:
        await self._look_on(memo, self._look(memo, memo.position))

    def _next_call(self, attempt: Attempt, state: Running) -> StepCall | None:
        if state.step != "run":
            return super()._next_call(attempt, state)
        memo: _Memo = attempt.memo
        place = self._outline.places[memo.position]
        if type(place) is Question:
            return None
        if type(place) is not Step:
            return _ENDING, self.run, (place,), _NO_ARGUMENTS
        options = self._options.get(place.name) or self._find_step(place.name)
        step = getattr(self, options.method)
        if options.is_inline:
            return options, self._run_inline, (memo, place, step, options.is_async), _NO_ARGUMENTS
        if not options.is_async:
            step = partial(attempt.call, step)
        return options, self._run_step, (memo, place, step), _NO_ARGUMENTS

    async def _find_place(self, attempt: Attempt) -> Outcome | _NotYet | None:
        memo: _Memo = attempt.memo
        name = attempt.step = self._outline.places[memo.position].name
        _, error = await attempt.run(StepOptions(name, "_ask_first"), self._ask_first, (memo,), {})
        if error is not None or attempt.is_killed:
            return None, error
        self._memo = memo.copy()  # with what the predicates have written: they are not asked again
        self._look_for_breakpoint()
        if self._register.pause:
            self.revision += 1
            self._attempt = None
            return _NotYet(self._show_play(self._register.reason))
        return None

    def _command(self, attempt: Attempt, value: Any, state: Running) -> Command | tuple[Wait, ...] | Running:
        memo: _Memo = attempt.memo
        if value is None or _goes_on(value):
            if value:
                _expect(memo, value)
            if memo.awaited:
                return (_wait_for(memo),)
            return () if state.pending else _RUN
        if type(value) is int:
            return Stop(exit_status=value)
        command = super()._command(attempt, value, state)
        if type(command) is tuple and memo.awaited:
            return (*command, _wait_for(memo))
        if isinstance(command, Stop) and command.result is value:
            raise InvalidStepError(
                type(self).__qualname__,
                attempt.step or "run",
                f"returned {value!r}; a step of an outline may return None, ToContext, a command, a list of waits, "
                "Outputs, an exit code or an exit status",
            )
        return command

    def _after(self, item: Pending, answer: Answer | None, left: tuple[Pending, ...]) -> Running:
        if item.step is not None and item.step != "run":
            return super()._after(item, answer, left)
        if answer is not None and item.on is not None:
            self._memo = self._memo.copy()
            if names_of_values(item.on) is not None:
                self._memo.context.update(answer.value)
            elif isinstance(item.on, OnMessage):
                self._memo.context[item.on.name] = answer.value
            elif isinstance(item.on, AllOf):
                _collect(self._memo, {one.pid: one for one in answer.value if isinstance(one, ProcessResult)})
        if left:  # the outline goes on when nothing is waited for any more
            return Running("_end", pending=left)
        return _RUN

    def _edit_context(self, values: Mapping[str, Any]) -> None:
        self._my_memo().context.update(values)

    def _settle_place(self, attempt: Attempt) -> None:
        memo: _Memo = attempt.memo
        state = self._state
        if isinstance(state, Running) and state.step == "run":
            place = self._outline.at(memo.position)
            if isinstance(place, Step):
                memo.position = place.then

    # --- state --------------------------------------------------------------------------------------

    @property
    def next_step(self) -> str | None:
        step = super().next_step
        is_outline = step == "run" or (step is None and isinstance(self._state, Waiting))
        return self._outline.at(self._memo.position).name if is_outline else step

    def _set_up(self, *args: Any) -> None:
        super()._set_up(*args)
        spec = self._spec
        assert isinstance(spec, WorkChainSpec)
        self._outline = spec.compiled
        self._memo = _Memo(self._outline.start, AttributeDict(), ())

    def _written(self, attempt: Attempt) -> dict[str, Any]:
        return {**super()._written(attempt), "ctx": dict(attempt.memo.context)}

    def _my_memo(self) -> _Memo:
        attempt = self._mine()
        memo: _Memo = self._memo if attempt is None else attempt.memo
        return memo

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
            if place.name != self._table.current_name(expected):
                raise SpecError(
                    f"the outline of {self._spec.name} has changed since this process was saved: what comes next was "
                    f"{expected!r}, and now {place.name!r} stands there"
                )
        awaited = tuple(_Awaited(key, pid, append) for key, pid, append in snapshot["awaited"])
        self._memo = _Memo(position, AttributeDict(snapshot["context"]), awaited)


WorkChain._reserved = Process._reserved | names_of(WorkChain) | {"run"}

_Place = Step | Question | Return | End
_Asked = tuple[Question, Awaitable[Any]]
"""A question, and what will be its answer."""
_NO_ARGUMENTS: Mapping[str, Any] = {}
_RUN = Running("run")
"""Of every step of an outline."""
_ENDING = StepOptions("run", "run", is_async=True)
"""Behind the last place of an outline there is nothing of the user's."""


def _goes_on(value: Any) -> bool:
    """Whether the value of a step means: to the next one. (`as_completed` of nothing is a list of no waits.)"""
    return value is None or type(value) is ToContext or (type(value) in (int, list) and not value)


def _ending(place: Place) -> Stop:
    return Stop(exit_status=place.code) if isinstance(place, Return) else Stop()


def _wait_for(memo: _Memo) -> Wait:
    pids = dict.fromkeys(item.pid for item in memo.awaited)
    return Wait("run", "waits for its children", on=list(pids))


def _collect(memo: _Memo, results: Mapping[str, ProcessResult]) -> None:
    """Put the results of children into the context, where they were expected."""
    for item in memo.awaited:
        if item.pid in results:
            result = results[item.pid]
            old = memo.context.get(item.key)
            memo.context[item.key] = [*(old or ()), result] if item.append else result
    memo.awaited = tuple(item for item in memo.awaited if item.pid not in results)


def _expect(memo: _Memo, children: Mapping[str, Child | Append]) -> None:
    """Write down whose results are to come into the context."""
    for key, child in children.items():
        handle = child.child if isinstance(child, Append) else child
        if not isinstance(handle, Child):
            raise TypeError(f"to_context({key}=...) takes what self.submit gives, or append_ of it; got {child!r}")
        if isinstance(child, Append) and not isinstance(memo.context.get(key, []), list):
            raise TypeError(f"to_context({key}=append_(...)): ctx.{key} is there already, and is no list")
        memo.awaited += (_Awaited(key, handle.pid, isinstance(child, Append)),)
