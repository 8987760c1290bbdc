"""The seeds that found something once: they are kept in ``seeds.txt``, and run first.

A line is a rig (or a simulated world), a seed, with what it found it (the size of the batch; of a world the faults that
it needs, or "all"), and what it found, for people.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("seeds.txt")


class Kept(NamedTuple):
    """One of them."""

    rig: str
    seed: int
    how: str
    found: str


def kept(rig: str) -> list[Kept]:
    """Those of a rig, the oldest first."""
    lines = [line.split(maxsplit=3) for line in FILE.read_text().splitlines() if not line.startswith("#")]
    return [Kept(name, int(seed), how, found) for name, seed, how, found in lines if name == rig]


def keep(rig: str, seed: int, how: str, found: str) -> None:
    """From now on it runs first."""
    if all((seed, how) != (known.seed, known.how) for known in kept(rig)):
        with FILE.open("a") as file:
            file.write(f"{rig} {seed} {how} {' '.join(found.split()) or '?'}\n")
