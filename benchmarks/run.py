"""``make bench``: what Prunus costs, beside what plumpy and kiwipy cost for the same work in the same run.

Microseconds are those of the best of several rounds (theirs and ours), rates are what one steady run of some seconds
gave. This machine, its disk and its other users are part of each figure: compare the ratios, and figures of one run
with each other. Peers take part where they can do the same work without a server, or where theirs is there. A figure
that we promise stands beside its limit.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prunus.persistence.database import file_system_of

SECTIONS = ("imports", "processes", "checkpoints", "messaging", "queues", "parked", "daemon")
NO_DISK = ("tmpfs", "ramfs")
"""File systems on which fsync does nothing."""


class Row(NamedTuple):
    """What was measured, ours, what we promise, theirs, how many times better we are."""

    what: str
    ours: str
    limit: str
    theirs: str
    ratio: str


@dataclass
class Report:
    """Rows, and a rule (None) between the sections."""

    rows: list[Row | None] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    """The limits that do not hold."""
    limits: int = 0

    def section(self, name: str) -> None:
        print(f"{name} ...", flush=True)
        self.rows.append(None)

    def doing(self, what: str) -> None:
        """Something that takes seconds begins."""
        print(f"    ({what})", flush=True)

    def add(
        self,
        what: str,
        value: float,
        unit: str,
        peer: float | None = None,
        peer_name: str = "",
        *,
        limit: float | None = None,
        at_least: bool = False,
        aim: float | None = None,
    ) -> None:
        """One row. Where a peer did the same work, how many times better we are (below 1: worse), and how many times we
        want to be (`aim`). `limit` is the most that the value may be; of a rate, or with `at_least`, the least."""
        is_rate = unit.endswith("/s")
        ratio, promise = "", ""
        if peer is not None:
            times = value / peer if is_rate else peer / value
            ratio = f"{shown(times)} x"
            if aim is not None:
                ratio += self._judge(f"{what}, beside {peer_name}", times, aim, at_least=True)
        theirs = "" if peer is None else f"{shown(peer)} {unit} ({peer_name})"
        if limit is not None:
            promise = self._judge(what, value, limit, at_least=is_rate or at_least).strip()
        row = Row(what, f"{shown(value)} {unit}", promise, theirs, ratio)
        self.rows.append(row)
        said = f"  {what}: {row.ours}" + (f" {promise}" if promise else "")
        print(said + (f"; {theirs}: {ratio}" if theirs else ""), flush=True)

    def _judge(self, what: str, value: float, limit: float, *, at_least: bool) -> str:
        holds = value >= limit if at_least else value <= limit
        said = f"({'>=' if at_least else '<='} {shown(limit)}: {'holds' if holds else 'MISSED'})"
        self.limits += 1
        if not holds:
            self.missed.append(f"{what}: {shown(value)} {said}")
        return f" {said}"

    def show(self) -> None:
        table = Table("measured", "Prunus", "limit", "peer", "better by", title="make bench")
        for column in (1, 3, 4):
            table.columns[column].justify = "right"
        for row in self.rows:
            if row is None:
                table.add_section()
            else:
                table.add_row(*map(escape, row))
        Console(width=160).print(table)
        if self.limits:
            print(f"{self.limits - len(self.missed)} of {self.limits} limits hold.")
        for missed in self.missed:
            print(f"  missed: {missed}")


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)}; all if none is named")
    chosen = parser.parse_args().sections or SECTIONS
    for name in chosen:
        if name not in SECTIONS:
            sys.exit(f"there is no section {name!r}; there are {', '.join(SECTIONS)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # all that was started is ended, as with Ctrl-C
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else all that we start compiles itself each time
    system = f"{platform.system()} {platform.release()}"
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {system}, {disk()}")
    print(load())
    report, begun = Report(), time.monotonic()
    try:
        for name in chosen:
            report.section(name)
            measure: Callable[[Report], object] = importlib.import_module(f"benchmarks.{name}").measure
            result = measure(report)
            if inspect.iscoroutine(result):
                asyncio.run(result)
    except KeyboardInterrupt:
        sys.exit("interrupted; everything that was started has been ended")
    report.show()
    print(f"It took {time.monotonic() - begun:.0f} s. {load()}")


def load() -> str:
    """What else this machine does."""
    one, five, _ = os.getloadavg()
    return f"Load of the machine: {one:.1f}; in the last five minutes {five:.1f}."


def disk() -> str:
    """Where the durable figures come from."""
    folder = Path(tempfile.gettempdir()).resolve()
    try:
        kind = file_system_of(folder, Path("/proc/self/mounts").read_text(errors="surrogateescape"))
    except OSError:
        return f"files in {folder}"
    warning = "; NOT A DISK: set TMPDIR to a folder on one" if kind in NO_DISK else ""
    return f"files in {folder} ({kind}{warning})"


if __name__ == "__main__":
    main()
