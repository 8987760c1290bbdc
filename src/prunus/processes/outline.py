"""The outline of a work chain, as data, and where one stands in it, as data.

::

    spec.outline(
        cls.prepare,
        while_(cls.not_converged)(cls.relax, cls.inspect),
        if_(cls.is_metal)(cls.smear).elif_(cls.is_magnetic)(cls.polarise).else_(cls.plain),
        if_(cls.failed)(return_(12)),
        cls.finish,
    )

An outline is compiled to a table of **places**. A **position** is the path to a place, a tuple of numbers: an index
into a block, then, for an ``if_``, the number of the branch, then an index into the block of that branch or loop, and
so on; ``(1, 0)`` is ``relax`` above. A place is a `Step` to run, a `Question` (a predicate to ask), a `Return` or the
`End`, and it names the positions that follow it. So a position can be written down at any moment, and going on from it
is the same as never having stopped; a question that has been answered is not asked again inside the body it guards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from prunus.errors import SpecError
from prunus.processes.steps import options_of

Path = tuple[int, ...]


# --- what the user writes ---------------------------------------------------------------------------


class if_:
    """``if_(predicate)(steps...).elif_(predicate)(steps...).else_(steps...)``."""

    def __init__(self, predicate: Any) -> None:
        self.branches: list[tuple[Any, tuple[Any, ...]]] = []
        self._asked: Any = predicate
        self._complete = False

    def __call__(self, *instructions: Any) -> if_:
        if self._asked is None:
            raise SpecError("this branch has its steps already; write .elif_(predicate)(...) or .else_(...)")
        self.branches.append((self._asked, instructions))
        self._asked = None
        return self

    def elif_(self, predicate: Any) -> if_:
        self._next_branch("elif_")
        self._asked = predicate
        return self

    def else_(self, *instructions: Any) -> if_:
        self._next_branch("else_")
        self._complete = True
        self.branches.append((None, instructions))
        return self

    def _next_branch(self, word: str) -> None:
        if self._complete:
            raise SpecError(f"there can be no {word} after else_")
        self.check()

    def check(self) -> None:
        if self._asked is not None:
            raise SpecError(f"if_({_name(self._asked)}) has no steps; write if_(predicate)(steps...)")


class while_:
    """``while_(predicate)(steps...)``."""

    def __init__(self, predicate: Any) -> None:
        self.predicate = predicate
        self.body: tuple[Any, ...] | None = None

    def __call__(self, *instructions: Any) -> while_:
        if self.body is not None:
            raise SpecError(f"while_({_name(self.predicate)}) has its steps already")
        self.body = instructions
        return self


class return_:
    """``return_`` ends the outline here, ``return_(code)`` with that exit status."""

    def __init__(self, code: int = 0) -> None:
        if isinstance(code, bool) or not isinstance(code, int):
            raise SpecError(f"return_ takes an exit status, a number; got {code!r}")
        self.code = code


# --- what it is compiled to -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """Run this method, then go on at `then`."""

    name: str
    then: Path


@dataclass(frozen=True, slots=True)
class Question:
    """Ask this predicate, then go on at `yes` or at `no`."""

    name: str
    yes: Path
    no: Path


@dataclass(frozen=True, slots=True)
class Return:
    """End the outline with this exit status."""

    code: int
    name: ClassVar[str] = "return_"


@dataclass(frozen=True, slots=True)
class End:
    """Behind the last place."""

    name: ClassVar[str] = "the end"


Place = Step | Question | Return | End


@dataclass(frozen=True, slots=True)
class Outline:
    """An outline, compiled."""

    start: Path
    places: Mapping[Path, Place]
    described: list[Any]
    """For people: steps are names, the others small dictionaries."""

    def at(self, path: Path) -> Place:
        """What stands at `path`; `SpecError` if the outline has no such place."""
        try:
            return self.places[path]
        except KeyError:
            raise SpecError(
                f"the outline has no position {path}; was it changed since the process was saved?"
            ) from None


def compile_outline(instructions: tuple[Any, ...], process_class: type, where: str = "the outline") -> Outline:
    """The outline that `instructions` describe; `SpecError` if they are not one."""
    compiler = _Compiler(process_class)
    end = (len(instructions),)
    compiler.places[end] = End()
    described = compiler.block(instructions, (), end, where)
    return Outline(_entry(instructions, ()), MappingProxyType(compiler.places), described)


def advance(outline: Outline, path: Path, ask: Callable[[str], bool]) -> Path:
    """From a finished step to the next step, return or end, asking what must be asked on the way."""
    place = outline.at(path)
    return seek(outline, place.then if isinstance(place, Step) else path, ask)


def seek(outline: Outline, path: Path, ask: Callable[[str], bool]) -> Path:
    """From `path` to the first position that is not a question."""
    while isinstance(place := outline.at(path), Question):
        path = place.yes if ask(place.name) else place.no
    return path


class _Compiler:
    """Fills the table, block by block."""

    def __init__(self, process_class: type) -> None:
        self._process_class = process_class
        self.places: dict[Path, Place] = {}

    def block(self, instructions: tuple[Any, ...], prefix: Path, exit: Path, where: str) -> list[Any]:
        """Compile a block whose places begin with `prefix`, and behind which `exit` comes."""
        if not instructions:
            raise SpecError(f"{where} has no steps")
        described = []
        for index, instruction in enumerate(instructions):
            if index and _always_returns(instructions[index - 1]):
                raise SpecError(
                    f"in {where} nothing can come after {_title(instructions[index - 1])}: it always ends the outline"
                )
            is_last = index + 1 == len(instructions)
            follow = exit if is_last else _entry(instructions[index + 1 :], prefix, index + 1)
            described.append(self._instruction(instruction, (*prefix, index), follow))
        return described

    def _instruction(self, instruction: Any, path: Path, follow: Path) -> Any:
        match instruction:
            case if_():
                return self._if(instruction, path, follow)
            case while_():
                name, body = self._method(instruction.predicate), instruction.body or ()
                described = self.block(body, path, path, f"while_({name})")
                self.places[path] = Question(name, _entry(body, path), follow)
                return {f"while {name}": described}
            case return_():
                self.places[path] = Return(instruction.code)
                return {"return": instruction.code}
        if instruction is return_:
            return self._instruction(return_(), path, follow)
        name = self._step(instruction)
        self.places[path] = Step(name, follow)
        return name

    def _if(self, instruction: if_, path: Path, follow: Path) -> dict[str, Any]:
        instruction.check()
        described = {}
        otherwise = follow
        for number, (predicate, body) in reversed(list(enumerate(instruction.branches))):
            here = (*path, number)
            name = None if predicate is None else self._method(predicate)
            title = "else" if name is None else f"{'elif' if number else 'if'} {name}"
            described[title] = self.block(body, here, follow, title)
            if name is None:
                otherwise = _entry(body, here)
            else:
                self.places[here] = Question(name, _entry(body, here), otherwise)
                otherwise = here
        return dict(reversed(described.items()))

    def _step(self, function: Any) -> str:
        """The stable name of a step."""
        name = self._method(function)
        options = options_of(getattr(self._process_class, name))
        return name if options is None else options.name

    def _method(self, function: Any) -> str:
        name = _name(function)
        method = getattr(self._process_class, name, None)
        if not callable(method):
            raise SpecError(f"{name} in an outline is no method of {self._process_class.__qualname__}; write cls.name")
        if not _takes_self_only(method):
            raise SpecError(
                f"{self._process_class.__qualname__}.{name} stands in an outline, so it must take no argument but self"
            )
        return name


def _entry(instructions: tuple[Any, ...], prefix: Path, index: int = 0) -> Path:
    """Where a block is entered at its instruction number `index`, the first of `instructions`."""
    path = (*prefix, index)
    return (*path, 0) if instructions and isinstance(instructions[0], if_) else path


def _always_returns(instruction: Any) -> bool:
    """Whether nothing behind `instruction` is ever reached."""
    match instruction:
        case return_():
            return True
        case if_():
            has_else = bool(instruction.branches) and instruction.branches[-1][0] is None
            return has_else and all(body and _always_returns(body[-1]) for _, body in instruction.branches)
        case _:
            return instruction is return_


def _title(instruction: Any) -> str:
    if isinstance(instruction, if_):
        return f"if_({_name(instruction.branches[0][0])})...else_(...)"
    return f"return_({instruction.code})" if isinstance(instruction, return_) else "return_"


def _takes_self_only(method: Any) -> bool:
    try:
        parameters = list(inspect.signature(method).parameters.values())[1:]
    except (TypeError, ValueError):  # nothing that Python can look into
        return True
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return all(parameter.default is not parameter.empty or parameter.kind in optional for parameter in parameters)


def _name(function: Any) -> str:
    return function if isinstance(function, str) else str(getattr(function, "__name__", repr(function)))
