"""``prunus daemon``: the broker and the workers of a profile."""

from __future__ import annotations

import asyncio
import shlex
import sys
from typing import TYPE_CHECKING

import click

from prunus.runtime.cli.connection import run
from prunus.runtime.cli.group import Group, Options
from prunus.runtime.cli.patience import patience
from prunus.runtime.terminals import can_redraw

if TYPE_CHECKING:
    from prunus.runtime.daemon import DaemonStatus, ReloadProgress, StopProgress
    from prunus.runtime.health import Health
    from prunus.runtime.logs import Follower
    from prunus.runtime.profile import Profile

FOLLOW_INTERVAL_S = 0.2
REFRESH_S = 1.0


@click.group(cls=Group)
def daemon() -> None:
    """Start, stop and look at the daemon: a broker and its workers."""


_workers = click.option("-w", "--workers", type=click.IntRange(0, 1024), help="How many workers (else as configured).")


@daemon.command()
@_workers
@click.pass_obj
def start(options: Options, workers: int | None) -> None:
    """Start the broker and the workers, and return when they are ready."""
    from prunus.runtime import daemon

    profile = options.find_profile()
    _say_running(profile, run(daemon.start(profile, workers), "waiting for the broker and the workers"))


@daemon.command(name="run")
@_workers
@click.pass_obj
def run_(options: Options, workers: int | None) -> None:
    """Be the daemon, in the foreground: for a terminal, a container, another supervisor.

    Ctrl-C or SIGTERM stops the workers, then the broker. It says on the standard error what it does; the services
    have their logs as ever.
    """
    from prunus.runtime import daemon, supervisor

    profile = options.find_profile()
    if workers is not None:
        daemon.wish_workers(profile, workers)
    sys.exit(supervisor.main(["--profile", str(profile.path)]))


@daemon.command()
@click.pass_obj
def stop(options: Options) -> None:
    """Stop gracefully; nothing is lost.

    Running steps get their grace (see config.yaml); what has not ended by then runs again after the next start.
    """
    options.refuse_key()
    from prunus.runtime import daemon
    from prunus.runtime.profile import Profile

    profile, wrong = Profile.find_to_stop(options.profile)
    if wrong is not None:
        click.echo(f"Warning: mend this before the next start: {wrong}", err=True)
    stopped = asyncio.run(_stop(profile))
    if not stopped:
        click.echo("No daemon was running.")
    elif (wrong_with_it := daemon.what_is_wrong(profile)) is None:
        click.echo("The daemon has stopped; nothing is lost.")
    else:
        click.echo("The daemon has stopped.")
        click.echo(f"Warning: {wrong_with_it}", err=True)


@daemon.command()
@_workers
@click.pass_obj
def restart(options: Options, workers: int | None) -> None:
    """Stop and start, with as many workers as before.

    `prunus daemon reload` replaces the workers while work goes on; this also replaces the broker and the supervisor.
    """
    from prunus.runtime import daemon, wish

    profile = options.find_profile()
    before = wish.read_wish(profile)
    number = workers if workers is not None or before is None else before.workers
    profile.check_keys()  # what could not start again is not stopped

    async def again() -> daemon.DaemonStatus:
        await _stop(profile)
        async with patience("waiting for the broker and the workers"):
            return await daemon.start(profile, number)

    _say_running(profile, asyncio.run(again()))


@daemon.command()
@click.option("--broker", is_flag=True, help="Replace the broker too, before the workers.")
@click.option("--no-wait", is_flag=True, help="Return at once; `prunus daemon status` shows how far it is.")
@click.pass_obj
def reload(options: Options, broker: bool, no_wait: bool) -> None:
    """Replace the workers one by one, so that they run new code.

    Each gives its processes back at their next checkpoints; the next worker follows when the replacement of the last
    one takes processes. Nothing is lost, and the broker serves all the time. Settings in config.yaml take effect for
    the new workers. If a replacement does not come up, the others go on with the old code.
    """
    from prunus.runtime import daemon

    profile = options.find_profile()

    async def replace() -> None:
        async with patience("waiting for the workers to be replaced", doing="are new") as meter:

            def say(progress: ReloadProgress) -> None:
                meter.done, meter.total = progress.done, progress.total
                meter.waiting_for = f"waiting for {'the ' if progress.current == 'broker' else ''}{progress.current}"

            await daemon.reload(profile, broker=broker, say=say, wait=not no_wait)

    asyncio.run(replace())
    if no_wait:
        click.echo("The daemon replaces its workers; `prunus daemon status` shows how far it is.")
        return
    what = "a new broker and " if broker else ""
    click.echo(f"The daemon has {what}new workers: {_count_workers(daemon.status(profile))}.")


@daemon.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("-w", "--watch", is_flag=True, help="Go on until Ctrl-C.")
@click.pass_obj
def status(options: Options, as_json: bool, watch: bool) -> None:
    """Show what runs, since when, what it does, and what is wrong.

    The exit code is 1 if something is wrong: a sentence says what, and what to do.
    """
    if watch and as_json:
        raise click.UsageError("--watch is for people, and --json for programs: say one of them")
    asyncio.run(_status(options.find_profile(), as_json, watch))


@daemon.command()
@click.argument("workers", type=click.IntRange(0, 1024))
@click.pass_obj
def scale(options: Options, workers: int) -> None:
    """Have so many WORKERS from now on.

    Superfluous ones finish their running steps, give their processes back and end.
    """
    from prunus.runtime import daemon, display

    daemon.scale(options.find_profile(), workers)
    click.echo(f"The daemon has {display.count(workers, 'worker')} from now on.")


@daemon.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0), default=30, show_default=True, help="How many of each log.")
@click.pass_obj
def logs(options: Options, name: str | None, follow: bool, lines: int) -> None:
    """The last lines of all logs, or of one.

    NAME is daemon, broker, worker-1 ...
    """
    from prunus.runtime.logs import Follower, last_lines

    profile = options.find_profile()
    names = sorted(file.stem for file in profile.log_folder.glob("*.log"))
    if name is not None and name not in names:
        raise click.UsageError(f"there is no log {name!r}; there are: {', '.join(names) or 'none yet'}")
    chosen = [name] if name else names
    followers = {each: Follower(profile.log(each)) for each in chosen} if follow else {}
    for each in chosen:
        if len(chosen) > 1:
            click.secho(f"==> {each}", bold=True)
        for line in last_lines(profile.log(each), lines):
            click.echo(line)
    if follow:
        _follow(profile, followers, only=name is not None)


@daemon.command()
@click.option("--system", is_flag=True, help="A unit of the system, that starts at boot; else one of yours.")
@click.pass_obj
def unit(options: Options, system: bool) -> None:
    """Print a unit file for systemd.

    It is for this profile, this Python and the current PATH. What to do with it is said beside it.
    """
    from prunus.runtime import supervisor, systemd

    profile = options.find_profile()
    click.echo(systemd.unit_text(profile, supervisor.working_folder(profile), system=system), nl=False)
    name = systemd.unit_name(profile)
    folder, manager = ("/etc/systemd/system", "sudo systemctl")
    if not system:
        folder, manager = ("~/.config/systemd/user", "systemctl --user")
    write = f"--system | sudo tee {folder}/{name}" if system else f"> {folder}/{name}"
    lines = [
        *([] if system else [f"mkdir -p {folder}"]),
        f"prunus --profile {shlex.quote(str(profile.path))} daemon unit {write}",
        f"{manager} daemon-reload",
        f"{manager} enable --now {name}",
        *([] if system else ["loginctl enable-linger    # so that it runs while you are not logged in"]),
    ]
    click.echo("\nTo have systemd run it (stop a daemon that runs first):", err=True)
    for line in lines:
        click.echo(f"  {line}", err=True)


# --- parts ------------------------------------------------------------------------------------------


def _say_running(profile: Profile, now: DaemonStatus) -> None:
    assert now.daemon is not None, "this is said of a daemon that has just started"
    click.echo(f"The daemon runs (pid {now.daemon.pid}): a broker and {_count_workers(now)}.")


def _count_workers(now: DaemonStatus) -> str:
    from prunus.runtime import display

    return display.count(sum(name in now.wanted and name != "broker" for name in now.services), "worker")


async def _stop(profile: Profile) -> bool:
    """Stop it, and say what is waited for."""
    from prunus.runtime import daemon, display

    async with patience("waiting for running steps to end") as meter:

        def say(left: StopProgress) -> None:
            if not left.workers:
                meter.waiting_for = "waiting for the broker to end"
                return
            workers = display.count(left.workers, "worker")
            steps = f" with {display.count(left.processes, 'process')}" if left.processes else ""
            meter.waiting_for = f"waiting for {workers}{steps} to end"

        return await daemon.stop(profile, say)


async def _status(profile: Profile, as_json: bool, watch: bool) -> None:
    import time

    from rich.live import Live

    from prunus.runtime import display, health

    console = display.console()
    if watch and not can_redraw(console.file):
        raise click.UsageError("--watch needs a terminal, and not a dumb one; --json is for programs")
    load = health.Load()
    async with patience("waiting for the broker"):
        load.look(health.watched(profile))
        await asyncio.sleep(health.SAMPLE_S)
        now = await health.look(profile, load)
    if watch:
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while True:
                live.update(health.picture(now, time.time()), refresh=True)
                await asyncio.sleep(REFRESH_S)
                now = await health.look(profile, load)
    if as_json:
        click.echo(display.as_json(now))
    else:
        display.show(console, health.picture(now, time.time()))
    sys.exit(_code(now))


def _code(now: Health) -> int:
    return 0 if now.is_well else 1


def _follow(profile: Profile, followers: dict[str, Follower], only: bool) -> None:
    """Print what is added to these logs, until Ctrl-C; also to those that are begun meanwhile, unless it is one."""
    import time

    from prunus.runtime.logs import Follower

    while True:
        if not only:
            for name in sorted(file.stem for file in profile.log_folder.glob("*.log")):
                followers.setdefault(name, Follower(profile.log(name), from_start=True))
        for name, follower in followers.items():
            for line in follower.lines():
                click.echo(line if only else f"{click.style(name, bold=True)} | {line}")
        sys.stdout.flush()
        time.sleep(FOLLOW_INTERVAL_S)
