"""``prunus worker``: a worker in the foreground."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from prunus.runtime.cli.group import Command, Options
from prunus.runtime.cli.values import FiniteRange

if TYPE_CHECKING:
    from prunus.messaging.keys import ClientKey
    from prunus.runtime.profile import Profile

ENDED = ("finished", "excepted", "killed")


def read_until(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    """Reads a time or a duration as seconds since 1970."""
    if value is None:
        return None
    from datetime import datetime

    from prunus.runtime.walltime import read_end

    try:
        return read_end(value, datetime.now().astimezone())
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def read_queues(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    from prunus.processes.options import RESERVED_QUEUES

    if any(not name or name in RESERVED_QUEUES for name in value):
        raise click.BadParameter(
            "this is not the name of a queue for processes (each worker serves the lane `control`)"
        )
    return value


def read_name(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        raise click.BadParameter("use letters, digits, '.', '_' and '-'")
    return value


@click.command(cls=Command)
@click.option("-q", "--queue", "queues", callback=read_queues, multiple=True, metavar="QUEUE", help="Take processes from this queue; several in the order of preference (as the profile says).")  # fmt: skip  # noqa: E501
@click.option("--slots", type=click.IntRange(1, 100_000), metavar="N", help="How many processes at once (as the profile says).")  # fmt: skip  # noqa: E501
@click.option("--name", callback=read_name, help="What it is called among the workers.")
@click.option("--grace", "grace_s", type=FiniteRange(0, 86_400), metavar="SECONDS", help="What running steps get to end when it stops (as the profile says).")  # fmt: skip  # noqa: E501
@click.option("--until", "ends_at", callback=read_until, metavar="TIME", help="It has to be gone by then: 2h, 18:30 or 2026-10-02T18:30. In a Slurm job its end is known.")  # fmt: skip  # noqa: E501
@click.option("--until-idle", is_flag=True, help="End when nothing is ready or running any more in its queues.")
@click.option("--idle-grace", "idle_grace_s", type=FiniteRange(0, 86_400), metavar="SECONDS", help="How long there has to be nothing (1).")  # fmt: skip  # noqa: E501
@click.pass_obj
def worker(
    options: Options,
    queues: tuple[str, ...],
    slots: int | None,
    name: str | None,
    grace_s: float | None,
    ends_at: float | None,
    until_idle: bool,
    idle_grace_s: float | None,
) -> None:
    """Work on processes, here in the foreground.

    Beside the workers of a daemon, or in place of a daemon: where no broker runs, it starts one, and stops it when it
    ends. With --key FILE it works for the broker on another host, and needs nothing else of it: classes are imported
    from the current folder.

    Ctrl-C (SIGTERM, SIGUSR1) stops it: steps that run get a grace period, all processes are given back. A second one
    gives them back at once.
    """
    from prunus.errors import PrunusError
    from prunus.messaging.keys import ClientKey
    from prunus.runtime import foreground, logs
    from prunus.runtime.idle import IDLE_GRACE_S
    from prunus.runtime.worker import Settings, leave_threads, threads_with_steps

    if idle_grace_s is not None and not until_idle:
        raise click.UsageError("--idle-grace is how long --until-idle waits; say that too")
    place: Profile | ClientKey
    place = options.find_profile() if options.key is None else ClientKey.read(_path(options.key))
    changes: dict[str, Any] = {"slots": slots, "grace_s": grace_s, "queues": queues or None}
    changes = {key: value for key, value in changes.items() if value is not None}
    changes["ends_at"] = ends_at if ends_at is not None else end_of_this_job()
    changes["idle_grace_s"] = (IDLE_GRACE_S if idle_grace_s is None else idle_grace_s) if until_idle else None
    sys.path[:0] = [str(folder) for folder in foreground.import_folders(place)]
    if isinstance(place, ClientKey):
        settings, lock = Settings(**changes), None
        name = name or _name_here()
        logs.configure(None, name)
    else:
        settings, lock = Settings.of(place, **changes), foreground.free_lock(place, name)
        name = lock.path.stem
        logs.configure(None, name, place.config.log_format)
    try:
        working = foreground.work(place, name, settings, lock=lock, say=lambda text: click.echo(text, err=True))
        ended, counts = asyncio.run(working)
    except PrunusError as error:
        if threads_with_steps():  # else they would keep this program alive
            click.echo(f"Error: {error}", err=True)
            leave_threads(1)
        raise
    finally:
        if lock is not None:
            lock.release()
    if ended == "idle":
        click.echo(f"Nothing is left to do in {' and '.join(settings.queues)}; {left(counts)}.")
    elif ended == "walltime":
        click.echo(f"The time of this worker is over; {left(counts)}.")
    else:
        click.echo(f"Stopped; {left(counts)}.")
    leave_threads(0)


def left(counts: Mapping[str, int] | None) -> str:
    """What is still there, in words."""
    if counts is None:
        return "how much is left is not known"
    parts = [f"{count:,} {state}" for state, count in counts.items() if count and state not in ENDED]
    if parts:
        return f"not ended: {', '.join(parts)}"
    return "all processes have ended"


def end_of_this_job() -> float | None:
    """When the batch job ends that this command runs in, if it says so."""
    import time

    from prunus.runtime.walltime import SLURM_END, end_of_job

    ends_at = end_of_job(os.environ)
    if ends_at is not None and ends_at <= time.time():
        click.echo(f"{SLURM_END} is over already: it is not of this job, and is ignored", err=True)
        return None
    return ends_at


def _path(text: str) -> Any:
    from pathlib import Path

    return Path(text)


def _name_here() -> str:
    import socket

    return "worker-" + (re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:100] or "far")
