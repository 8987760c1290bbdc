"""The large doses, with a report: ``make torture``, or ``python -m tests.torture``.

Each campaign does batches of one rig, several at a time and each in a program of its own, until it has done what it is
meant to, or its share of the time (``--minutes``) is over. A batch is decided by its seed and size, and

    python -m tests.torture RIG --seed SEED --size SIZE

does it again. (Real kills happen when the machine says; their seeds decide who is struck and in which order.) A batch
that fails is kept (`kept`), and done first from then on.
"""

from __future__ import annotations

import argparse
import importlib
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import msgspec

from tests.torture import kept
from tests.torture.batch import PROJECT, Batch, CanNotRunError, environment

BATCH_LIMIT_S = 900
"""A batch that takes longer hangs. (One whose size is a time takes that time, too.)"""
SHORTEST_SOAK_S = 20
SHOWN_FAILURES = 10
WIDTH, INDENT = 120, " " * 30
SEEDS = 1_000_000
"""Where a run begins, if nobody says so."""


@dataclass(frozen=True)
class Campaign:
    """What is done of one rig."""

    rig: str
    function: str
    """``module:function`` under ``tests.torture``, of a seed and a size."""
    size: int
    """Of a batch, in what the rig counts its size in."""
    goal: int | None
    """None: one batch does all that there is."""
    unit: str
    share: float
    """Of the time, if it is short."""
    is_time: bool = False
    """Sizes are seconds: it is one batch, that lasts as long as there is time."""
    is_kept: bool = True
    """A batch that fails is kept. False: there is no chance in it, or each of its simulated worlds is kept."""


CAMPAIGNS = (
    Campaign(
        "kept-seeds", "simulated:run_kept", 1, None, "simulated worlds that found something once", 0.5, is_kept=False
    ),
    Campaign(
        "messaging-worlds", "simulated:run_messaging", 500, 200_000, "simulated worlds of peers", 8, is_kept=False
    ),
    Campaign(
        "process-worlds", "simulated:run_processes", 100, 5_000, "simulated worlds of processes", 3, is_kept=False
    ),
    Campaign("kills", "kills.tasks:run", 50, 2_000, "cycles of kills and stops", 5),
    Campaign("process-kills", "kills.processes:run", 20, 400, "cycles of kills under work chains", 2),
    Campaign("power-cuts", "disk.power_cuts:run", 1_000, 20_000, "states after a power cut", 2),
    Campaign(
        "power-cuts-unsynced", "disk.power_cuts:run_without_sync", 400, 2_000, "states that should show loss", 0.5
    ),
    Campaign("io-errors", "disk.io_errors:run", 2, 10_000, "runs with a failing call", 3),
    Campaign("full-disk", "disk.small_disk:run", 5, 40, "disks run full", 1),
    Campaign("codec", "fuzz.codec:run", 500_000, 14_000_000, "frames to the decoders", 3),
    Campaign("exchange", "fuzz.exchange:run", 100_000, 5_000_000, "frames to an exchange", 3),
    Campaign("sockets", "fuzz.sockets:run_local", 100_000, 1_000_000, "frames to a broker's socket", 1),
    Campaign("network", "fuzz.sockets:run_network", 50_000, 1_000_000, "messages to a broker's port", 1),
    Campaign(
        "deaf-peers", "fuzz.sockets:run_deaf_timed", 2_000, 400_000, "broadcasts that nobody reads", 0.5, is_kept=False
    ),
    Campaign("soak", "soak.soak:run", 1_800, 1_800, "seconds in the life of a daemon", 8, is_time=True),
)
MUTANTS = "mutants"
MUTANT_SEEDS, FEW_MUTANT_SEEDS = 300, 30
"""For each planted bug; the latter if the time is short."""


@dataclass
class _Result:
    """What came of a campaign."""

    name: str
    unit: str
    seconds: float = 0.0
    total: Batch = field(default_factory=lambda: Batch.of(0))
    again: list[str] = field(default_factory=list)
    """The commands of the batches that failed."""
    seeds: list[int] = field(default_factory=list)


def do(rig: str, seed: int, size: int) -> Batch:
    """One batch, here."""
    campaign = next(one for one in CAMPAIGNS if one.rig == rig)
    module, _, function = campaign.function.partition(":")
    try:
        batch: Batch = getattr(importlib.import_module(f"tests.torture.{module}"), function)(seed, size)
    except CanNotRunError as error:
        return Batch.of(0, not_run=str(error))
    return batch


def command_of(rig: str, seed: int, size: int) -> list[str]:
    return ["python", "-m", "tests.torture", rig, "--seed", str(seed), "--size", str(size)]


def _in_a_program(campaign: Campaign, seed: int, size: int) -> Batch:
    command = [sys.executable, *command_of(campaign.rig, seed, size)[1:], "--json"]
    limit_s = BATCH_LIMIT_S + (2 * size if campaign.is_time else 0)
    try:
        said = subprocess.run(command, env=environment(), cwd=PROJECT, capture_output=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return Batch.of(0, [f"it had not ended after {limit_s} s"])
    if said.returncode:
        return Batch.of(0, [f"the rig itself broke: {said.stderr.decode(errors='replace')[-2000:]}"])
    return msgspec.json.decode(said.stdout, type=Batch)


def run_campaign(campaign: Campaign, first_seed: int, processes: int, limit_s: float) -> _Result:
    """Batches, `processes` at a time, until the goal or the limit; at least one. Those that failed once come first."""
    result = _Result(campaign.rig, campaign.unit)
    begun = time.monotonic()
    running: dict[Future[Batch], tuple[int, int]] = {}
    batches = batches_of(campaign, first_seed, limit_s)
    with ThreadPoolExecutor(processes) as pool:
        while True:
            started = result.total.done + sum(size for _, size in running.values())
            is_less = campaign.goal is None or campaign.is_time or started < campaign.goal
            go_on = is_less and time.monotonic() - begun < limit_s and not result.total.not_run
            if go_on and len(running) < processes and not result.again and (batch_of := next(batches, None)):
                running[pool.submit(_in_a_program, campaign, *batch_of)] = batch_of
                result.seeds.append(batch_of[0])
                continue
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                (seed, size), batch = running.pop(future), future.result()
                result.total += batch
                if batch.failures:
                    result.again.append(" ".join(command_of(campaign.rig, seed, size)))
                    if campaign.is_kept:
                        kept.keep(campaign.rig, seed, str(size), batch.failures[0])
            result.seconds = time.monotonic() - begun
            _show_progress(campaign, result)
    return result


def batches_of(campaign: Campaign, first_seed: int, limit_s: float) -> Iterator[tuple[int, int]]:
    """The seed and the size of each: first those that failed once (if they are no longer than there is time), then new
    ones."""
    for one in kept.kept(campaign.rig):
        if not campaign.is_time or int(one.how) <= limit_s:
            yield one.seed, int(one.how)
    size = max(SHORTEST_SOAK_S, int(min(campaign.size, limit_s))) if campaign.is_time else campaign.size
    number = 1 if campaign.goal is None or campaign.is_time else SEEDS
    yield from ((seed, size) for seed in range(first_seed, first_seed + number))


def run_mutants(seeds: int) -> _Result:
    """The bugs that are planted into the simulated worlds, and the seed that finds each: a table of its own."""
    result = _Result(MUTANTS, "table of planted bugs (it stands above)")
    begun = time.monotonic()
    command = ["-m", "tests.torture.sim", "mutants", "--seeds", str(seeds)]
    ended = subprocess.run([sys.executable, *command], env=environment(), cwd=PROJECT, check=False)
    result.seconds = time.monotonic() - begun
    failures = ["not every planted bug was found"] if ended.returncode else []
    result.total = Batch.of(1, failures)
    result.again = [" ".join(["python", *command])] if failures else []
    return result


def _show_progress(campaign: Campaign, result: _Result) -> None:
    failed = f", {len(result.total.failures)} FAILURES" if result.total.failures else ""
    of = "" if campaign.goal is None else f" of {campaign.goal:,}"
    what = result.total.not_run or f"{result.total.done:>12,}{of} {campaign.unit}{failed}"
    print(f"{campaign.rig:20} {result.seconds:7.0f} s {what}", flush=True)


def report(results: Sequence[_Result]) -> str:
    """What ran, how much of it, what was seen on the way, and what failed first."""
    lines = ["", "=" * WIDTH]
    for result in results:
        total = result.total
        verdict = "not run" if total.not_run else "FAILED" if result.again else "ok"
        lines.append(f"{result.name:20} {verdict:8} {total.done:>12,} {result.unit}, {result.seconds:.0f} s")
        if total.not_run:
            lines.append(f"{INDENT}{total.not_run}")
        if result.seeds:
            lines.append(f"{INDENT}seeds {min(result.seeds)} to {max(result.seeds)}")
        seen = [f"{what}: {number:,}" for what, number in total.counts.items()]
        seen += [f"{what}: {figure:,.1f} at worst" for what, figure in total.worst.items()]
        lines += textwrap.wrap("; ".join(seen), WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
    failed = [result for result in results if result.again]
    for result in failed:
        lines += ["", f"{result.name}: the first failures"]
        lines += [f"  - {failure}" for failure in result.total.failures[:SHOWN_FAILURES]]
        lines += ["  again with"] + [f"  $ {command}" for command in result.again[:SHOWN_FAILURES]]
    lines += ["=" * WIDTH, f"{len(failed)} of {len(results)} campaigns failed" if failed else "nothing failed"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=(__doc__ or "").partition("\n")[0])
    names = [campaign.rig for campaign in CAMPAIGNS]
    parser.add_argument("rig", nargs="?", choices=[*names, MUTANTS], help="only this one")
    parser.add_argument("--seed", type=int, help="where seeds begin (without --size), or the seed of one batch")
    parser.add_argument("--size", type=int, help="do one batch of this size, here")
    parser.add_argument("--minutes", type=float, help="stop after about so long; without it all goals are reached")
    parser.add_argument("--processes", type=int, default=2, help="batches at a time (default: 2)")
    parser.add_argument("--json", action="store_true", help="print the batch as JSON")
    options = parser.parse_args(arguments)
    if options.size is not None:
        if options.rig in (None, MUTANTS) or options.seed is None:
            parser.error("one batch needs a rig and a --seed")
        batch = do(options.rig, options.seed, options.size)
        sys.stdout.buffer.write(
            msgspec.json.format(msgspec.json.encode(batch), indent=0 if options.json else 2) + b"\n"
        )
        return 0 if options.json or not batch.failures else 1

    seed = random.SystemRandom().randrange(SEEDS) if options.seed is None else options.seed
    chosen = [campaign for campaign in CAMPAIGNS if options.rig in (None, campaign.rig)]
    shares = sum(campaign.share for campaign in chosen)
    a_share_s = float("inf") if options.minutes is None or not shares else options.minutes * 60 / shares
    print(f"seeds from {seed}, {options.processes} batches at a time", flush=True)
    results = [run_campaign(one, seed, options.processes, one.share * a_share_s) for one in chosen]
    if options.rig in (None, MUTANTS):
        results.append(run_mutants(MUTANT_SEEDS if options.minutes is None else FEW_MUTANT_SEEDS))
    print(report(results))
    return 1 if any(result.again for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
