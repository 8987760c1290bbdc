"""``make bench``: what Prunus costs, beside what plumpy and kiwipy cost for the same work in the same run.

Microseconds are those of the best of several rounds (theirs and ours), rates are what one steady run of some seconds
gave. This machine, its disk and its other users are part of each figure: compare the ratios, and figures of one run
with each other. Peers take part where they can do the same work without a server.
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

from rich.console import Console
from rich.table import Table

from prunus.persistence.database import file_system_of

SECTIONS = ("imports", "processes", "checkpoints", "messaging", "daemon")
NO_DISK = ("tmpfs", "ramfs")
"""File systems on which fsync does nothing."""


@dataclass
class Report:
    """Rows of: what was measured, ours, theirs, how many times better we are."""

    rows: list[tuple[str, str, str, str] | None] = field(default_factory=list)

    def section(self, name: str) -> None:
        print(f"{name} ...", flush=True)
        self.rows.append(None)

    def doing(self, what: str) -> None:
        """Something that takes seconds begins."""
        print(f"    ({what})", flush=True)

    def add(self, what: str, value: float, unit: str, peer: float | None = None, peer_name: str = "") -> None:
        """One row. Where a peer did the same work, how many times better we are (below 1: worse)."""
        rate = unit.endswith("/s")
        ratio = "" if peer is None else f"{shown(value / peer if rate else peer / value)} x"
        theirs = "" if peer is None else f"{shown(peer)} {unit} ({peer_name})"
        self.rows.append((what, f"{shown(value)} {unit}", theirs, ratio))
        print(f"  {what}: {shown(value)} {unit}" + (f"; {theirs}: {ratio}" if theirs else ""), flush=True)

    def show(self) -> None:
        table = Table("measured", "Prunus", "peer", "better by", title="make bench")
        for column in (1, 2, 3):
            table.columns[column].justify = "right"
        for row in self.rows:
            if row is None:
                table.add_section()
            else:
                table.add_row(*row)
        Console(width=132).print(table)


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
    print(f"It took {time.monotonic() - begun:.0f} s.")


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
