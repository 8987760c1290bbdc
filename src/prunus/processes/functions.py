"""A process made of one function: ``@process``.

::

    @process
    async def relax(self, element: str, scale: float = 1.0) -> float:
        cell = await self.do("cell", build_cell, element, scale)
        return await self.do("energy", compute, cell)

    result = await execute(relax, {"element": "Cu"})
    result.value

The parameters are the inputs, checked by their annotations. What the function returns is the value of the result, or,
if it is annotated with a dataclass, its outputs. A function is one step: after a crash it runs again from its
beginning, and `Process.do` returns at once what was done already, by its name. ``@process`` over ``@step(retry=...)``
says more of that step, ``@process(queue="gpu", priority=5)`` more of the class (see `prunus.processes.options`).
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, overload

from prunus.errors import SpecError
from prunus.processes.commands import Command
from prunus.processes.process import Process
from prunus.processes.spec import ExitCode
from prunus.processes.steps import with_options_of


@overload
def process(function: Callable[Concatenate[Process, ...], Any], /) -> type[Process]: ...
@overload
def process(
    *, queue: str | None = None, priority: int | None = None, resources: Mapping[str, int] | None = None
) -> Callable[[Callable[Concatenate[Process, ...], Any]], type[Process]]: ...
def process(function: Any = None, /, **options: Any) -> Any:
    """The process class that runs `function`; raises `SpecError` if no class can be made of it.

    With options it is a decorator: `queue`, `priority` and `resources` are those of the class.
    """
    said = {name: value for name, value in options.items() if value is not None}
    if function is None:
        return lambda decorated: _class_of(decorated, said)
    return _class_of(function, said)


def _class_of(function: Callable[..., Any], options: Mapping[str, Any]) -> type[Process]:
    name = function.__name__
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].name != "self":
        raise SpecError(f"@process: the first parameter of {name} is self, the process that runs it")
    for parameter in parameters[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise SpecError(f"@process: {name} can't take {parameter}; each input has a name of its own")

    def annotations() -> dict[str, Any]:
        try:
            return typing.get_type_hints(function, include_extras=True)
        except Exception as error:  # evaluating annotations runs the user's expressions
            raise SpecError(f"@process: an annotation of {name} can't be read ({error})") from error

    def define(cls: Any, spec: Any) -> None:
        types_by_name = annotations()
        for parameter in parameters[1:]:
            options = {} if parameter.default is parameter.empty else {"default": parameter.default}
            spec.input(parameter.name, valid_type=types_by_name.get(parameter.name, Any), **options)

    if inspect.iscoroutinefunction(function):

        async def run(self: Process) -> Any:
            return await function(self, **self._values)

    else:

        def run(self: Process) -> Any:  # type: ignore[misc]
            return function(self, **self._values)

    body: dict[str, Any] = {
        "__doc__": function.__doc__,
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
        "define": classmethod(define),
        "run": with_options_of(function, run),
        **options,
    }
    returned = signature.return_annotation
    if isinstance(returned, str):
        returned = vars(sys.modules[function.__module__]).get(returned)
    if (
        isinstance(returned, type)
        and hasattr(returned, "__dataclass_fields__")
        and not issubclass(returned, (*typing.get_args(Command), ExitCode))
    ):
        body["Outputs"] = returned
    made: type[Process] = types.new_class(name, (Process,), exec_body=lambda namespace: namespace.update(body))
    return made
