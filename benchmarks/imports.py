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
    run_ms(HELP)  # compiles
    # In turn, so that whatever else this machine does is in both.
    pairs = [(run_ms("import asyncio"), run_ms("import asyncio, prunus")) for _ in range(ROUNDS)]
    report.add("import prunus, beyond import asyncio", statistics.median(ours - bare for bare, ours in pairs), "ms")
    report.add("prunus --help", statistics.median(run_ms(HELP) for _ in range(ROUNDS)), "ms")


def run_ms(code: str) -> float:
    """Wall time of a fresh interpreter that runs `code`."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - begun) * 1e3
