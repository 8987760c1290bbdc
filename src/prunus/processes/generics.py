"""The types of a process: of its inputs, and of its outputs.

``class EnergyAtScale(Process[Inputs, Outputs])`` says them; type checkers then know what ``self.inputs`` is, what may
be given to `execute`, `submit` and `launch`, and what the ``outputs`` of the result are. For a class that says
nothing they are ``Any``.
"""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    InputsT = TypeVar("InputsT", default=Any)
    OutputsT = TypeVar("OutputsT", default=Any, covariant=True)
else:
    InputsT = typing.TypeVar("InputsT")
    OutputsT = typing.TypeVar("OutputsT", covariant=True)


def types_said(process_class: type) -> tuple[Any, Any]:
    """The types of inputs and outputs that a process class, or one of its bases, says; None where it says nothing."""
    from prunus.processes.process import Process

    for each in process_class.__mro__:
        for said in vars(each).get("__orig_bases__", ()):
            origin = typing.get_origin(said)
            if isinstance(origin, type) and issubclass(origin, Process):
                inputs, outputs = (None if _is_open(one) else one for one in typing.get_args(said))
                return inputs, outputs
    return None, None


def _is_open(argument: Any) -> bool:
    return argument is Any or argument is None or argument is type(None) or isinstance(argument, typing.TypeVar)
