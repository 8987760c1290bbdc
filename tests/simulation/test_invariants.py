"""The invariants are looked at by those who are said to: the table in docs/how-we-test.md is true."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from typing import NamedTuple

import pytest

from tests.torture.batch import PROJECT
from tests.torture.sim.mutants import MUTANTS

INVARIANTS = [*(f"I{number}" for number in range(1, 16)), *(f"L{number}" for number in range(1, 6))]
ROW = re.compile(r"^\| \*\*(?P<name>[IL]\d+)\*\* \| [^|]+ \| (?P<worlds>[^|]+) \| (?P<also>[^|]+) \|$", re.MULTILINE)
CHECKER = re.compile(r"`(?P<file>tests/[\w/]+\.py|contract)(?:::(?P<name>[\w.]+))?`")
CONTRACT = "prunus.testing.communicator_contract"


class Row(NamedTuple):
    """Of the table."""

    invariant: str
    worlds: str
    also: str


ROWS = [Row(*found.groups()) for found in ROW.finditer((PROJECT / "docs" / "how-we-test.md").read_text("utf-8"))]


def sources(cell: str) -> list[str]:
    """The source of each checker that is named, which has to be there."""
    found = []
    for file, name in CHECKER.findall(cell):
        module = importlib.import_module(CONTRACT if file == "contract" else file.removesuffix(".py").replace("/", "."))
        owner: object = module.CommunicatorContract if file == "contract" else module
        found.append(inspect.getsource(functools.reduce(getattr, name.split("."), owner) if name else module))  # type: ignore[arg-type]
    return found


def test_every_invariant_has_its_row() -> None:
    """Once, in their order."""
    assert [row.invariant for row in ROWS] == INVARIANTS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.invariant)
def test_whoever_looks_at_an_invariant_names_it(row: Row) -> None:
    """Each function that is named is there; those of the simulated worlds complain in the name of the invariant."""
    worlds = sources(row.worlds)
    assert worlds
    for source in worlds:
        assert re.search(rf"""f?"{row.invariant}: """, source), source
    assert sources(row.also)


@pytest.mark.parametrize("invariant", ["I7", "I10", "L2"])
def test_a_planted_bug_breaks_it(invariant: str) -> None:
    """Of these invariants no other one tells: a bug is planted for each of them."""
    assert [mutant for mutant in MUTANTS if mutant.breaks == invariant]
