"""What importing costs, and the command line's first answer."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.run import Report

ROUNDS = 9
HELP = "import sys; sys.argv = ['prunus', '--help']; from prunus.runtime.cli import main; main()"


def measure(report: Report) -> None:
    bare = run_ms("import asyncio")
    report.add("import prunus, beyond import asyncio", run_ms("import asyncio, prunus") - bare, "ms")
    report.add(
        "prunus --help",
        run_ms("import sys; sys.argv = ['prunus', '--help']; from prunus.runtime.cli import main; main()"),
        "ms",
    )


def run_ms(code: str) -> float:
    """Median wall time of a fresh interpreter that runs `code`."""
    taken = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken) * 1e3
