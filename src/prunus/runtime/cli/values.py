"""What is typed as a value, read; and values as they are printed. Wrong ones are usage errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from prunus.processes import Process

END_OF_INTEGERS = 2**63
"""Whole numbers below it fit into messages and into the database."""
MAX_DIGITS = 1000
"""Python reads no number that is much longer; all that are so long are too large."""


class FiniteRange(click.FloatRange):
    """A number between two others. (`click.FloatRange` takes "nan", which is neither below nor above any.)"""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def read_value_of(what: str, text: str) -> Any:
    """One value, in YAML; `what` is its name in a complaint."""
    from prunus.runtime.inputs import read_value

    try:
        return read_value(text)
    except ValueError as error:
        raise click.UsageError(f"{what}: {error}") from error


def read_inputs_of(words: Sequence[str]) -> dict[str, Any]:
    """The values of ``KEY=VALUE`` words."""
    from prunus.runtime.inputs import read_inputs

    try:
        return read_inputs(words)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def read_tokens(words: Sequence[str]) -> dict[str, int]:
    """The numbers of ``NAME=NUMBER`` words; without a number it is 1."""
    tokens: dict[str, int] = {}
    for word in words:
        name, equals, number = word.partition("=")
        if not name or (equals and not number.isdecimal()) or name in tokens:
            raise click.UsageError(f"--resource: {word!r} is not of the form name=number, once for each name")
        tokens[name] = int(number[:MAX_DIGITS]) if equals else 1
        if tokens[name] >= END_OF_INTEGERS:
            raise click.UsageError(f"--resource: {name}: the number has to be below 2**63")
    return tokens


def yaml_document(value: Any) -> str:
    """Any value as YAML; a single number or word without the mark that ends its document."""
    from prunus.runtime import display

    return display.as_yaml(value).removesuffix("\n...")


def check_step(option: str, process_class: type[Process], step: str | None) -> None:
    """Refuse a step that a class does not have: nobody would ever stop there."""
    import difflib

    from prunus.errors import InvalidInputError
    from prunus.processes import Process
    from prunus.processes.describe import describe

    if step is None:
        return
    description = describe(process_class)
    names = list(description["steps"])
    is_method = callable(getattr(process_class, step, None)) and not hasattr(Process, step)
    if step in names or (is_method and not description["outline"]):
        return
    near = difflib.get_close_matches(step, names, 1)
    known = f"there are: {', '.join(names)}" if description["outline"] else "it must be the name of a method"
    hint = f"did you mean {near[0]!r}?" if near else known
    raise InvalidInputError(process_class.__qualname__, {option: f"there is no step {step!r}; {hint}"})
