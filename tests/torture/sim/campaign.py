"""Many seeds: in this process, or in several.

::

    python -m tests.torture.sim messaging --seeds 200000 --jobs 2
    python -m tests.torture.sim processes --seeds 5000 --jobs 2
    python -m tests.torture.sim mutants
    python -m tests.torture.sim show messaging 4711
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from tests.torture import kept
from tests.torture.sim import messaging, processes
from tests.torture.sim.nemesis import FAULTS
from tests.torture.sim.world import USUAL, Outcome, Settings

WORLDS: dict[str, Callable[[int, Settings], Outcome]] = {"messaging": messaging.run, "processes": processes.run}
EVERY_FAULT = "all"
"""Instead of the faults that a kept seed needs."""
CHUNK = 50
PROGRESS_S = 5.0
MAX_SHOWN = 20
"""Failing seeds of which the complaints are printed."""


@dataclass(slots=True)
class Tally:
    """What came of many runs."""

    runs: int = 0
    virtual_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[int, list[str]] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.runs += other.runs
        self.virtual_s += other.virtual_s
        self.counts.update(other.counts)
        self.failures.update(other.failures)

    def report(self) -> str:
        """The failures, for people."""
        shown = [f"seed {seed}: {'; '.join(text[:3])}" for seed, text in sorted(self.failures.items())[:MAX_SHOWN]]
        return "\n".join([f"{len(self.failures)} of {self.runs} seeds failed", *shown])


def found_before(world: str) -> list[tuple[int, Settings]]:
    """The seeds of a world that have found something once, and the faults with which they did."""
    found = []
    for one in kept.kept(world):
        only = frozenset(FAULTS if one.how == EVERY_FAULT else one.how.split(","))
        found.append((one.seed, Settings(without=frozenset(FAULTS) - only)))
    return found


def run_found(world: str) -> Tally:
    """The seeds that have found something once."""
    tally = Tally()
    for seed, settings in found_before(world):
        tally.add(run_seeds(world, [seed], settings))
    return tally


def run_seeds(world: str, seeds: Iterable[int], settings: Settings = USUAL) -> Tally:
    """These, one after the other."""
    tally = Tally()
    for seed in seeds:
        outcome = WORLDS[world](seed, settings)
        tally.runs += 1
        tally.virtual_s += outcome.virtual_s
        tally.counts.update(outcome.counts)
        if outcome.complaints:
            tally.failures[seed] = outcome.complaints
    return tally


def smaller(world: str, seed: int, settings: Settings) -> Settings:
    """Settings with fewer faults and deeds under which the seed still fails."""
    for fault in sorted(frozenset(FAULTS) - settings.without):
        less = replace(settings, without=settings.without | {fault})
        if WORLDS[world](seed, less).complaints:
            settings = less
    deeds = 100
    while deeds > 0 and WORLDS[world](seed, replace(settings, deeds=deeds)).complaints:
        settings = replace(settings, deeds=deeds)
        deeds = deeds * 2 // 3
    return settings


def _chunk(work: tuple[str, Sequence[int]]) -> Tally:
    logging.disable(logging.CRITICAL)
    return run_seeds(*work)


def _campaign(world: str, first: int, number: int, jobs: int) -> int:
    before = run_found(world)
    print(f"{world}: of {before.runs} seeds that found something once {len(before.failures)} failed", flush=True)
    seeds = range(first, first + number)
    chunks = [(world, seeds[start : start + CHUNK]) for start in range(0, len(seeds), CHUNK)]
    tally, begun, said = before, time.monotonic(), 0.0
    for part in _in_parallel(chunks, jobs):
        tally.add(part)
        for seed, complaints in part.failures.items():
            kept.keep(world, seed, EVERY_FAULT, complaints[0])
            print(f"seed {seed} (kept in {kept.FILE.name}): {'; '.join(complaints[:3])}", flush=True)
        if time.monotonic() - said > PROGRESS_S or tally.runs >= len(seeds):
            said = time.monotonic()
            rate = tally.runs / (said - begun)
            print(
                f"{world}: {tally.runs:,} of {len(seeds):,} seeds, {rate:.0f}/s, {tally.virtual_s / 3600:,.0f} h of "
                f"virtual time, {len(tally.failures)} failed",
                flush=True,
            )
    for what, count in sorted(tally.counts.items()):
        print(f"  {count:12,} {what}")
    print(tally.report())
    return 1 if tally.failures else 0


def _in_parallel(chunks: Sequence[tuple[str, Sequence[int]]], jobs: int) -> Iterator[Tally]:
    if jobs == 1:
        yield from map(_chunk, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(_chunk, chunks)


def _show(world: str, seed: int) -> int:
    settings = dict(found_before(world)).get(seed, Settings())
    if WORLDS[world](seed, settings).complaints:
        settings = smaller(world, seed, settings)
    print(f"{world} {seed}: without {sorted(settings.without)}, deeds: {settings.deeds or 'all'}")
    outcome = WORLDS[world](seed, replace(settings, trace=True))
    print("\n".join([*outcome.trace, "", *outcome.complaints]))
    return 1 if outcome.complaints else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    from tests.torture.sim import mutants

    parser = argparse.ArgumentParser(prog="python -m tests.torture.sim")
    commands = parser.add_subparsers(dest="command", required=True)
    for world in WORLDS:
        command = commands.add_parser(world, help=f"run seeds of the {world} world")
        command.add_argument("--first", type=int, default=0)
        command.add_argument("--seeds", type=int, default=2000)
        command.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    command = commands.add_parser("mutants", help="plant bugs, and print which seed finds each")
    command.add_argument("--seeds", type=int, default=300)
    command.add_argument("names", nargs="*")
    command = commands.add_parser("show", help="print what happens in a seed, with as few faults as it needs to fail")
    command.add_argument("world", choices=sorted(WORLDS))
    command.add_argument("seed", type=int)
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    if options.command == "mutants":
        return mutants.print_table(options.seeds, options.names)
    if options.command == "show":
        return _show(options.world, options.seed)
    return _campaign(options.command, options.first, options.seeds, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
