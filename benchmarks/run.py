"""``make bench``: what Prunus costs, beside what plumpy and kiwipy cost for the same work in the same run.

Figures are medians of several rounds. This machine, its disk and its other users are part of each of them: compare
the ratios, and figures of one run with each other. Peers take part where they can do the same work without a server.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

SECTIONS = ("imports", "processes", "checkpoints", "messaging", "daemon")


@dataclass
class Report:
    """Rows of: what was measured, ours, theirs."""

    rows: list[tuple[str, str, str, str]] = field(default_factory=list)

    def add(self, what: str, value: float, unit: str, peer: float | None = None, peer_name: str = "") -> None:
        """One row. Where a peer did the same work, how many times better we are (below 1: worse)."""
        rate = unit.endswith("/s")
        ratio = "" if peer is None else f"{(value / peer if rate else peer / value):.1f} x"
        theirs = "" if peer is None else f"{shown(peer)} {unit} ({peer_name})"
        self.rows.append((what, f"{shown(value)} {unit}", theirs, ratio))
        print(f"  {what}: {shown(value)} {unit}" + (f"; {theirs}: {ratio}" if theirs else ""), flush=True)

    def show(self) -> None:
        table = Table("measured", "Prunus", "peer", "better by", title="make bench")
        for column in (1, 2, 3):
            table.columns[column].justify = "right"
        for row in self.rows:
            table.add_row(*row)
        Console(width=120).print(table)


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", default=SECTIONS, help=f"some of {', '.join(SECTIONS)}")
    chosen = parser.parse_args().sections
    report = Report()
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}")
    for section in chosen:
        if section not in SECTIONS:
            sys.exit(f"there is no section {section!r}; there are {', '.join(SECTIONS)}")
        print(f"{section} ...", flush=True)
        measure: Callable[[Report], object] = importlib.import_module(f"benchmarks.{section}").measure
        result = measure(report)
        if asyncio.iscoroutine(result):
            asyncio.run(result)
    report.show()


if __name__ == "__main__":
    main()
