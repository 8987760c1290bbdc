"""The command line: ``prunus``.

Only `click` is imported at the top, so that ``--help`` and the completion of a shell are quick; a command imports
what it needs. Rules: what a program may want to read goes to stdout and everything else to stderr; an error is one
sentence and exit code 1 (2: the command was written wrongly), a traceback needs ``--debug``; Ctrl-C is quiet.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from prunus.persistence.persister import LogLine, Record
    from prunus.processes import Process, ProcessResult
    from prunus.runtime.controller import ProcessController, ProcessHandle
    from prunus.runtime.profile import Profile

T = TypeVar("T")

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
PATIENCE_S = 2.0
"""A command that takes longer says what it waits for."""
FOLLOW_INTERVAL_S = 0.2
MAX_LINES_SHOWN = 40
"""Of inputs, outputs and a history, each, on a terminal."""


@dataclass
class Options:
    """The options that every command takes."""

    profile: str | None = None
    debug: bool = False

    def find_profile(self) -> Profile:
        from prunus.runtime.profile import Profile

        return Profile.find(self.profile)


def main() -> None:
    """The program ``prunus``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to fail
    cli(prog_name="prunus")


class _Command(click.Command):
    """A command that takes the options of `Options` too, wherever they stand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not any("--profile" in parameter.opts for parameter in self.params):
            self.params.append(
                click.Option(["--profile"], metavar="NAME|PATH", expose_value=False, callback=_keep, hidden=True)
            )
        self.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, callback=_keep, hidden=True))


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value and parameter.name:
        setattr(context.ensure_object(Options), parameter.name, value)


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from prunus import __version__

        click.echo(f"prunus {__version__}")
        context.exit()


class _Group(click.Group):
    """Commands in the order in which they are written here; errors as one sentence."""

    command_class = _Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.parent is not None:
            return super().invoke(ctx)
        from prunus.errors import PrunusError

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except (click.exceptions.Exit, click.Abort, click.ClickException, BrokenPipeError):
            raise
        except Exception as error:  # the outermost place: nobody else can say it to the user
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            if ctx.ensure_object(Options).debug:
                raise
            if isinstance(error, PrunusError):
                raise click.ClickException(_with_hint(error, ctx.ensure_object(Options))) from error
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise click.ClickException(f"{what} (this should not happen; --debug shows where)") from error


_Group.group_class = _Group


def _with_hint(error: Exception, options: Options) -> str:
    """What to do about a broker that does not answer depends on whether somebody restarts it."""
    from prunus.errors import ConnectionLostError, PrunusError
    from prunus.runtime.locks import read_holder

    if not isinstance(error, ConnectionLostError):
        return str(error)
    try:
        has_daemon = read_holder(options.find_profile().lock("daemon")) is not None
    except PrunusError:
        has_daemon = False
    if has_daemon:
        return f"{error}\nThe daemon starts the broker again; `prunus daemon logs broker` tells why it ended."
    return f"{error}\n`prunus daemon start` starts one."


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--profile", metavar="NAME|PATH", expose_value=False, callback=_keep, help="Which profile: a name, or a path with a slash. Otherwise $PRUNUS_PROFILE, the nearest .prunus, or the user's default.")  # fmt: skip  # noqa: E501
@click.option("--debug", is_flag=True, expose_value=False, callback=_keep, help="Show tracebacks.")
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show it.")
@click.pass_context
def cli(context: click.Context) -> None:
    """Run workflows that survive: launch, watch and control processes."""
    context.ensure_object(Options)


# --- the profile and its daemon ---------------------------------------------------------------------


@cli.command()
@click.option("--profile", "name", metavar="NAME|PATH", help="The user's own profile NAME, or the folder PATH.")
@click.option("-w", "--workers", type=click.IntRange(0, 1024), help="How many workers the daemon starts.")
@click.pass_obj
def init(options: Options, name: str | None, workers: int | None) -> None:
    """Make a profile: in ./.prunus, or the user's own one NAME."""
    import msgspec

    from prunus.runtime.profile import FOLDER_NAME, Config, Profile

    name = name or options.profile
    path = Path(FOLDER_NAME) if name is None else Profile.path_of(name)
    config = Config() if path.name == FOLDER_NAME else Config(import_from=[str(Path.cwd())])
    if workers is not None:
        config = msgspec.structs.replace(config, workers=workers)
    profile = Profile.create(path, config)
    option = "" if name is None else f" --profile {name}"
    click.echo(f"A new profile: {profile.path}")
    click.echo(f"Workers import classes from {', '.join(map(str, profile.import_folders))} (see config.yaml there).")
    click.echo(f"Next: prunus{option} daemon start")


@cli.group()
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
    _say_running(profile, _run(daemon.start(profile, workers), "waiting for the broker and the workers"))


@daemon.command()
@click.pass_obj
def stop(options: Options) -> None:
    """Stop gracefully; nothing is lost.

    Running steps get their grace (see config.yaml); what has not ended by then runs again after the next start.
    """
    from prunus.runtime import daemon

    profile = options.find_profile()
    stopped = _run(daemon.stop(profile), "waiting for running steps to end")
    click.echo("The daemon has stopped; nothing is lost." if stopped else "No daemon was running.")


@daemon.command()
@_workers
@click.pass_obj
def restart(options: Options, workers: int | None) -> None:
    """Stop and start, with as many workers as before."""
    from prunus.runtime import daemon, supervisor

    profile = options.find_profile()
    wish = supervisor.read_wish(profile)

    async def again() -> daemon.DaemonStatus:
        await daemon.stop(profile)
        return await daemon.start(profile, workers if workers is not None or wish is None else wish.workers)

    _say_running(profile, _run(again(), "waiting for running steps to end, then for the new workers"))


@daemon.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def status(options: Options, as_json: bool) -> None:
    """Who runs.

    The exit code is 1 if somebody does not run who should.
    """
    import time

    from prunus.runtime import daemon, display

    profile = options.find_profile()
    now = daemon.status(profile)
    if as_json:
        services = {name: {"pid": holder.pid, "since": holder.since} for name, holder in now.services.items()}
        pid = now.daemon.pid if now.daemon else None
        facts = {"profile": str(profile.path), "daemon": pid, "services": services, "missing": now.missing}
        click.echo(display.as_json(facts))
        sys.exit(0 if now.is_healthy else 1)
    table = display.plain_table("service", "pid", "state", "since", "memory", "log")
    holders = {"daemon": now.daemon, **dict.fromkeys(now.wanted), **now.services}
    for name, holder in holders.items():
        if holder is None:
            table.add_row(name, "", "not running", "", "", str(profile.log(name)), style="red")
            continue
        state = (
            "running" if name == "daemon" or name in now.wanted else "on its own" if now.daemon is None else "ending"
        )
        since, memory = display.span(time.time() - holder.since), _memory(holder.pid)
        table.add_row(name, str(holder.pid), state, since, memory, str(profile.log(name)))
    click.echo(f"profile {profile.name}", err=True)
    display.show(display.console(), table)
    if now.daemon is None:
        what = "takes over what runs" if now.services else "starts it"
        click.echo(f"No daemon runs; `prunus daemon start` {what}.", err=True)
    elif now.missing:
        names = ", ".join(now.missing)
        click.echo(f"The daemon tries to start {names}; `prunus daemon logs {now.missing[0]}` may say why.", err=True)
    sys.exit(0 if now.is_healthy else 1)


@daemon.command()
@click.argument("workers", type=click.IntRange(0, 1024))
@click.pass_obj
def scale(options: Options, workers: int) -> None:
    """Have so many WORKERS from now on.

    Superfluous ones finish their running steps, give their processes back and end.
    """
    from prunus.runtime import daemon

    daemon.scale(options.find_profile(), workers)
    click.echo(f"The daemon has {_count(workers, 'worker')} from now on.")


@daemon.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0), default=30, show_default=True, help="How many of each log.")
@click.pass_obj
def logs(options: Options, name: str | None, follow: bool, lines: int) -> None:
    """The last lines of all logs, or of one.

    NAME is daemon, broker, worker-1 ...
    """
    from prunus.runtime.daemon import last_lines

    profile = options.find_profile()
    names = sorted(file.stem for file in profile.log_folder.glob("*.log"))
    if name is not None and name not in names:
        raise click.UsageError(f"there is no log {name!r}; there are: {', '.join(names) or 'none yet'}")
    chosen = [name] if name else names
    places = {each: _size(profile.log(each)) for each in chosen}
    for each in chosen:
        if len(chosen) > 1:
            click.secho(f"==> {each}", bold=True)
        for line in last_lines(profile.log(each), lines):
            click.echo(line)
    if follow:
        _follow(profile, places)


# --- processes --------------------------------------------------------------------------------------


@cli.command()
@click.argument("process_class", metavar="pkg.mod:Class")
@click.argument("inputs", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--pid", help="The pid to give it. If it exists already, nothing is launched again.")
@click.option("--tag", "tags", multiple=True, help="A tag to find it by; may be given often.")
@click.option("--wait", is_flag=True, help="Show its progress, wait for its end and print its outputs.")
@click.option("--on-exception", type=click.Choice(["fail", "pause"]), help="What becomes of it when a step raises (else as its class says).")  # fmt: skip  # noqa: E501
@click.option("--paused", is_flag=True, help="It waits to be played before its first step.")
@click.option("--pause-at", metavar="STEP", help="It pauses before it takes this step.")
@click.pass_obj
def launch(
    options: Options,
    process_class: str,
    inputs: tuple[str, ...],
    pid: str | None,
    tags: tuple[str, ...],
    wait: bool,
    on_exception: Any,
    paused: bool,
    pause_at: str | None,
) -> None:
    """Have a process run by the workers, and print its pid.

    Values are YAML: x=1, name=Cu, scales=[0.98,1.0]. key=@file.yaml reads a file, a.b=1 sets b in the namespace a.
    """
    from prunus.processes.loading import load_class

    values = _read_inputs(inputs)
    profile = options.find_profile()
    _import_like_workers(profile)
    loaded = load_class(process_class, profile.config.modules)
    loaded(values, tags=tags)  # wrong inputs are told at once, whether a daemon runs or not
    _check_step("--pause-at", loaded, pause_at)
    _warn_if_workers_lack(loaded, profile)

    async def go(controller: ProcessController) -> tuple[Record, ProcessResult | None] | None:
        from prunus.runtime import display, watch

        handle = await controller.launch(
            loaded, values, pid=pid, tags=tags, on_exception=on_exception, paused=paused, pause_at=pause_at
        )
        if not wait:
            click.echo(handle.pid)
            return None
        click.echo(f"launched {handle.pid}", err=True)
        try:
            record = await watch.watch_family(controller, handle.pid, display.console(stderr=True))
        except asyncio.CancelledError:
            click.echo(f"\nIt goes on without us: prunus watch {display.short(handle.pid)}", err=True)
            raise
        return record, await handle.outcome()

    end = _with_controller(options, go)
    if end is not None:
        _print_outputs(end[1])
        _fail_with(*end)


@cli.command("list")
@click.option("-s", "--state", "states", multiple=True, type=click.Choice(["created", "running", "waiting", "finished", "excepted", "killed", "paused", "aside"]), help="Only those; may be given often.")  # fmt: skip  # noqa: E501
@click.option("-a", "--all", "everything", is_flag=True, help="Also those that have ended.")
@click.option("--roots", is_flag=True, help="Only those that no other process submitted.")
@click.option("--tag", help="Only those with this tag.")
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="The newest so many.")
@click.option("--json", "as_json", is_flag=True, help="For programs: every fact of each.")
@click.pass_obj
def list_(
    options: Options,
    states: tuple[str, ...],
    everything: bool,
    roots: bool,
    tag: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """The processes that have not ended, the newest first."""
    import time

    from prunus.persistence.persister import Query
    from prunus.runtime import display

    query = Query(
        states=tuple(state for state in states if state not in ("paused", "aside")),
        play="paused" if "paused" in states else None,
        aside=True if "aside" in states else None,
        unfinished=not everything and not states,
        roots=roots,
        tag=tag,
        limit=limit,
    )
    records = _with_controller(options, lambda controller: controller.find(query))
    if as_json:
        click.echo(display.as_json([display.record_as_data(record) for record in records]))
    elif records:
        display.show(display.console(), display.process_table(records, time.time()))
        if len(records) == limit:
            click.echo(f"Only the newest {limit} are shown; --limit shows more.", err=True)
    else:
        hint = "; `prunus list --all` shows those that have ended" if query.unfinished and not tag else ""
        click.echo(f"No process{hint}.", err=True)


@cli.command()
@click.argument("pid")
@click.option("--checkpoint", is_flag=True, help="Its last checkpoint as YAML, and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def show(options: Options, pid: str, checkpoint: bool, as_json: bool) -> None:
    """All that is known of a process.

    Facts, inputs, outputs or failure, children, and the history.
    """

    async def look(controller: ProcessController) -> None:
        handle = await _find(controller, pid)
        if checkpoint:
            click.echo((await handle.checkpoint_yaml()).rstrip())
        else:
            await _show(controller, handle, as_json)

    _import_like_workers(options.find_profile())
    _with_controller(options, look)


@cli.command()
@click.argument("pid", required=False)
@click.pass_obj
def watch(options: Options, pid: str | None) -> None:
    """Watch a process, or all, as they change.

    With PID: it and its children, until it has ended. The exit code is 1 if it failed, was killed, or was set aside.
    Without: all processes, until Ctrl-C.
    """
    from prunus.runtime import display, watch

    async def look(controller: ProcessController) -> tuple[Record, ProcessResult | None] | None:
        if pid is None:
            await watch.watch_all(controller, display.console())
            return None
        handle = await _find(controller, pid)
        return await watch.watch_family(controller, handle.pid, display.console()), await handle.outcome()

    _import_like_workers(options.find_profile())
    end = _with_controller(options, look)
    if end is not None:
        _fail_with(*end)


_pids = click.argument("pids", metavar="PID...", nargs=-1)
_all = click.option("-a", "--all", "everything", is_flag=True, help="All that it applies to.")
_cascade = click.option("-c", "--cascade", is_flag=True, help="Also all below them.")


@cli.command()
@_pids
@_all
@click.option("-m", "--message", help="Why; it is kept in the history.")
@_cascade
@click.option("--no-wait", is_flag=True, help="Do not wait for the end of the steps that run.")
@click.option("--at", metavar="STEP", help="A breakpoint: not now, but before it takes this step.")
@click.pass_obj
def pause(
    options: Options,
    pids: tuple[str, ...],
    everything: bool,
    message: str | None,
    cascade: bool,
    no_wait: bool,
    at: str | None,
) -> None:
    """Stop processes between two steps, until they are played."""
    if at is not None and (everything or cascade or message):
        raise click.UsageError("--at goes with PID..., and not with --all, --cascade or --message")

    async def one(handle: ProcessHandle) -> None:
        await _check_step_of("--at", handle, at)
        await handle.pause(message, quiesced=not no_wait, cascade=cascade, at=at)

    _import_like_workers(options.find_profile())
    done = "paused" if not no_wait else "pausing"
    _control(
        options,
        done if at is None else f"will pause before {at}:",
        pids,
        everything,
        one,
        lambda controller: controller.pause_all(message),
    )


@cli.command()
@_pids
@_all
@_cascade
@click.option("--until", metavar="STEP", help="They pause again before they take this step.")
@click.pass_obj
def play(options: Options, pids: tuple[str, ...], everything: bool, cascade: bool, until: str | None) -> None:
    """Let paused processes go on."""
    if until is not None and everything:
        raise click.UsageError("--until goes with PID..., and not with --all")

    async def one(handle: ProcessHandle) -> None:
        await _check_step_of("--until", handle, until)
        await handle.play(cascade=cascade, pause_at=until)

    _import_like_workers(options.find_profile())
    _control(options, "playing", pids, everything, one, lambda controller: controller.play_all())


@cli.command()
@_pids
@_all
@click.option("-f", "--force", is_flag=True, help="Do not let the running step clean up.")
@click.option("-m", "--message", help="Why; it is kept in the history.")
@click.pass_obj
def kill(options: Options, pids: tuple[str, ...], everything: bool, force: bool, message: str | None) -> None:
    """End processes, and their children, for good."""
    _control(
        options,
        "killed",
        pids,
        everything,
        lambda handle: handle.kill(message, force=force),
        lambda controller: controller.kill_all(message, force=force),
    )


@cli.command()
@click.argument("pid")
@click.argument("value", required=False)
@click.pass_obj
def resume(options: Options, pid: str, value: str | None) -> None:
    """Continue a suspended process, with VALUE (YAML)."""
    given = () if value is None else (_read_value("VALUE", value),)

    async def one(handle: ProcessHandle) -> None:
        from prunus.errors import InvalidStateError
        from prunus.runtime.display import how_to_continue

        try:
            await handle.resume(*given)
        except InvalidStateError as error:
            hint = how_to_continue(await handle.record())
            raise InvalidStateError(error.state, f"{error.needed} ({hint})") if hint else error from None

    _control(options, "resumed", (pid,), False, one, None)


@cli.command()
@click.argument("pid")
@click.argument("message")
@click.argument("value", required=False)
@click.pass_obj
def send(options: Options, pid: str, message: str, value: str | None) -> None:
    """Send a process a message that its class declares.

    MESSAGE is its name, VALUE is YAML. It is kept until the process waits for it.
    """
    read = None if value is None else _read_value("VALUE", value)
    _import_like_workers(options.find_profile())
    _control(options, "sent to", (pid,), False, lambda handle: handle.send(message, read), None)


@cli.command()
@click.argument("pid")
@click.argument("name")
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.pass_obj
def query(options: Options, pid: str, name: str, arguments: tuple[str, ...]) -> None:
    """Ask a process a question, and print the answer.

    NAME is one of the queries of its class; values and the answer are YAML.
    """
    _ask(options, pid, arguments, lambda handle, values: handle.query(name, **values))


@cli.command()
@click.argument("pid")
@click.argument("name")
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.pass_obj
def update(options: Options, pid: str, name: str, arguments: tuple[str, ...]) -> None:
    """Change a process by one of its updates.

    NAME is one of the updates of its class. The answer is printed when the change is durable; all values are YAML.
    """
    _ask(options, pid, arguments, lambda handle, values: handle.update(name, **values))


@cli.command()
@click.argument("pid")
@click.argument("values", metavar="KEY=VALUE...", nargs=-1, required=True)
@click.pass_obj
def edit(options: Options, pid: str, values: tuple[str, ...]) -> None:
    """Set names in the context of a work chain.

    It takes effect between two of its steps, and its history says so. Values are YAML.
    """
    read = _read_inputs(values)
    _control(options, "edited", (pid,), False, lambda handle: handle.edit_context(**read), None)


@cli.command()
@click.argument("pid")
@click.argument("value", required=False)
@click.pass_obj
def settle(options: Options, pid: str, value: str | None) -> None:
    """Say that a step of unknown effect took place.

    VALUE (YAML) is what it returned. For a process that is paused because its worker died in a step with effect="once".
    """
    read = None if value is None else _read_value("VALUE", value)
    _control(options, "settled", (pid,), False, lambda handle: handle.settle(read), None)


@cli.command()
@click.argument("pid")
@click.option("--at", "step", metavar="STEP", help="The step to go on with; without it the steps on record are listed.")
@click.argument("changes", metavar="[KEY=VALUE]...", nargs=-1)
@click.pass_obj
def fork(options: Options, pid: str, step: str | None, changes: tuple[str, ...]) -> None:
    """Start a new process from a step of another one.

    Its pid is printed. KEY=VALUE changes the context.
    """
    import time

    from prunus.runtime import display

    values = _read_inputs(changes)
    if step is None and values:
        raise click.UsageError(f"`--at STEP` is missing: where to go on; `prunus fork {pid}` lists the steps on record")

    async def go(controller: ProcessController) -> None:
        handle = await _find(controller, pid)
        if step is not None:
            click.echo((await handle.fork(step, **values)).pid)
            return
        last = {past.step: past.at for past in await handle.steps()}  # a fork goes on from the last time
        if not last:
            click.echo("None of its steps is on record.", err=True)
            return
        table, now = display.plain_table("step", "before"), time.time()
        for name, at in sorted(last.items(), key=lambda each: each[1]):
            table.add_row(name, f"{display.span(now - at)} ago")
        display.show(display.console(), table)

    _import_like_workers(options.find_profile())
    _with_controller(options, go)


@cli.command("logs")
@click.argument("pid")
@click.option("-f", "--follow", is_flag=True, help="Go on until it has ended, or Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(1, 1000), default=100, show_default=True, help="The last so many.")
@click.pass_obj
def logs_(options: Options, pid: str, follow: bool, lines: int) -> None:
    """What a process has said, and why its steps failed."""
    from prunus.runtime import display, watch

    colours = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}

    def say(line: LogLine) -> None:
        click.secho(display.log_line(line), fg=colours.get(line.level))

    def paused(trouble: display.Trouble) -> None:
        click.echo(display.trouble_text(trouble).plain, err=True)

    async def look(controller: ProcessController) -> Record:
        handle = await _find(controller, pid)
        said = await handle.log(last=lines)
        for line in said:
            say(line)
        if follow:
            async for line in watch.follow_log(controller, handle, said[-1].seq if said else 0, paused):
                say(line)
        elif not said:
            click.echo("It has said nothing yet.", err=True)
        return await handle.record()

    record = _with_controller(options, look)
    if follow and not record.is_terminal:
        _fail_with(record, None)


@cli.command()
@click.argument("process_class", metavar="pkg.mod:Class")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--mermaid", "as_mermaid", is_flag=True, help="Its outline as a Mermaid diagram.")
@click.pass_obj
def describe(options: Options, process_class: str, as_json: bool, as_mermaid: bool) -> None:
    """What a process class takes, gives and does."""
    from prunus.errors import ProfileError
    from prunus.processes import load_class
    from prunus.processes.describe import as_markdown, describe
    from prunus.processes.describe import as_mermaid as draw
    from prunus.runtime import display

    try:
        _import_like_workers(options.find_profile())
    except ProfileError:  # a class can be described without any
        sys.path.insert(0, str(Path.cwd()))
    description = describe(load_class(process_class))
    if as_json:
        click.echo(display.as_json(description))
    else:
        click.echo((draw(description) if as_mermaid else as_markdown(description)).rstrip())


@cli.command()
@_pids
@click.pass_obj
def retry(options: Options, pids: tuple[str, ...]) -> None:
    """Continue excepted or set-aside processes.

    They go on from their last good checkpoint.
    """
    _control(options, "continued", pids, False, lambda handle: handle.retry(), None)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: all of the broker's counts.")
@click.pass_obj
def tasks(options: Options, as_json: bool) -> None:
    """What waits in the queues, and who works on what."""
    from prunus.runtime import display

    statistics = _with_controller(options, lambda controller: controller.broker_statistics())
    if as_json:
        click.echo(display.as_json(statistics))
        return
    pending, held = statistics.get("pending"), statistics.get("held")
    table = display.plain_table("queue", "waiting")
    for name, count in pending.items() if isinstance(pending, dict) else ():
        table.add_row(name, str(count))
    display.show(display.console(), table if table.row_count else "No task waits for a worker.")
    table = display.plain_table("session", "holds")
    for name, count in held.items() if isinstance(held, dict) else ():
        table.add_row(display.peer(name), str(count))
    if table.row_count:
        display.show(display.console(), table)
    counts = statistics.get("processes")
    if isinstance(counts, dict) and counts:
        click.echo("processes: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    if "sessions" in statistics:
        click.echo(f"sessions: {statistics['sessions']} (this one is one of them)")


@cli.command()
@click.option("--check-checkpoints", is_flag=True, help="Load every live process with the code as it is now.")
@click.pass_obj
def doctor(options: Options, check_checkpoints: bool) -> None:
    """Say what is wrong, and what to do.

    The exit code is 1 if something is wrong.
    """
    from prunus.runtime import display
    from prunus.runtime.doctor import examine

    marks = {"ok": click.style("ok      ", fg="green"), "warning": click.style("warning ", fg="yellow")}
    marks["problem"] = click.style("problem ", fg="red", bold=True)
    console = display.console()

    async def look() -> bool:
        is_well = True
        if check_checkpoints:
            _import_like_workers(options.find_profile())
        async for finding in examine(options.find_profile, check_checkpoints=check_checkpoints):
            is_well = is_well and finding.level != "problem"
            click.echo(f"{marks[finding.level]} {finding.subject:<10} {finding.text}")
            if finding.advice:
                click.echo(f"{'':>9}{'':<11}-> {finding.advice}")
        return is_well

    is_well = asyncio.run(look())
    console.print("All is well." if is_well else "Something is wrong: see the lines above that say 'problem'.")
    sys.exit(0 if is_well else 1)


# --- parts ------------------------------------------------------------------------------------------


def _with_controller(options: Options, work: Callable[[ProcessController], Awaitable[T]]) -> T:
    """Do something with a controller of the profile's daemon; says at once if there is none."""
    from prunus.errors import DaemonError
    from prunus.runtime.controller import connect
    from prunus.runtime.locks import read_holder

    profile = options.find_profile()
    if not any(read_holder(profile.lock(name)) for name in ("daemon", "broker")):
        raise DaemonError(f"no daemon runs for the profile {profile.name}; `prunus daemon start` starts it")

    async def connected() -> T:
        async with connect(profile) as controller:
            return await work(controller)

    return asyncio.run(connected())


def _run(work: Coroutine[Any, Any, T], waiting_for: str) -> T:
    """Run it, and say what it waits for if it takes long."""

    async def patiently() -> T:
        task = asyncio.ensure_future(work)
        done, _ = await asyncio.wait([task], timeout=PATIENCE_S)
        if not done:
            click.echo(f"{waiting_for} ...", err=True)
        return await task

    return asyncio.run(patiently())


async def _find(controller: ProcessController, text: str) -> ProcessHandle:
    """The process whose pid is `text`, or the only one whose pid ends or begins with it.

    The items of a fan-out, whose pids begin with that of their parent, do not make the parent ambiguous.
    """
    from prunus.errors import CheckpointNotFoundError
    from prunus.persistence.persister import QUERY_LIMIT, Query
    from prunus.runtime.display import class_name

    try:
        await controller.handle(text).record()
        return controller.handle(text)
    except CheckpointNotFoundError:
        pass
    found: list[Record] = []
    before: str | None = None
    while True:
        rows = await controller.find(Query(limit=QUERY_LIMIT, before=before))
        found += [row for row in rows if row.pid.endswith(text) or row.pid.startswith(text)]
        if len(rows) < QUERY_LIMIT:
            break
        before = rows[-1].pid
    if not text or not found:
        raise CheckpointNotFoundError(text)
    family = [row for row in found if all(each.pid.startswith(f"{row.pid}.") for each in found if each is not row)]
    if len(found) > 1 and not family:
        shown = "".join(f"\n  {row.pid}  {class_name(row.class_id)}, {row.state}" for row in found[:10])
        more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
        raise click.ClickException(f"{text!r} is the end or the beginning of {len(found)} pids:{shown}{more}")
    return controller.handle((family or found)[0].pid)


def _control(
    options: Options,
    done: str,
    pids: Sequence[str],
    everything: bool,
    one: Callable[[ProcessHandle], Awaitable[None]],
    all_: Callable[[ProcessController], Awaitable[list[str]]] | None,
) -> None:
    """Do one thing to each process, all at the same time; a failure of one does not keep it from the others."""
    from prunus.errors import PrunusError
    from prunus.runtime.display import short

    if bool(pids) == everything:
        raise click.UsageError("say which processes: PID... or --all" if all_ else "say which processes: PID...")

    async def tell(handle: ProcessHandle) -> bool:
        try:
            await one(handle)
        except PrunusError as error:
            click.echo(f"Error: {short(handle.pid)}: {error}", err=True)
            return False
        click.echo(f"{done} {handle.pid}")
        return True

    async def work(controller: ProcessController) -> bool:
        if everything and all_:
            told = await all_(controller)
            for pid in told:
                click.echo(f"{done} {pid}")
            click.echo(f"{done}: {_count(len(told), 'process')}", err=True)
            return True
        handles = {handle.pid: handle for handle in [await _find(controller, pid) for pid in pids]}
        return all(await asyncio.gather(*map(tell, handles.values())))

    async def patiently(controller: ProcessController) -> bool:
        task = asyncio.ensure_future(work(controller))
        finished, _ = await asyncio.wait([task], timeout=PATIENCE_S)
        if not finished:
            click.echo("waiting for running steps to end (Ctrl-C: it will happen all the same) ...", err=True)
        return await task

    if not _with_controller(options, patiently):
        sys.exit(1)


async def _check_step_of(option: str, handle: ProcessHandle, step: str | None) -> None:
    """Refuse a step that the class of a process does not have, as far as the class can be imported here."""
    import contextlib

    from prunus.errors import ProcessClassNotFoundError
    from prunus.processes import load_class

    if step is not None:
        with contextlib.suppress(ProcessClassNotFoundError):
            _check_step(option, load_class((await handle.record()).class_id), step)


def _check_step(option: str, process_class: type[Process], step: str | None) -> None:
    """Refuse a step that a class does not have: nobody would ever stop there."""
    import difflib

    from prunus.errors import InvalidInputError
    from prunus.processes import Process
    from prunus.processes.describe import describe

    if step is None:
        return
    description = describe(process_class)
    names = list(description["steps"])
    is_method = callable(getattr(process_class, step, None)) and not hasattr(Process, step)
    if step in names or (is_method and not description["outline"]):
        return
    near = difflib.get_close_matches(step, names, 1)
    known = f"there are: {', '.join(names)}" if description["outline"] else "it must be the name of a method"
    hint = f"did you mean {near[0]!r}?" if near else known
    raise InvalidInputError(process_class.__qualname__, {option: f"there is no step {step!r}; {hint}"})


def _read_value(what: str, text: str) -> Any:
    from prunus.runtime.inputs import read_value

    try:
        return read_value(text)
    except ValueError as error:
        raise click.UsageError(f"{what}: {error}") from error


def _read_inputs(words: Sequence[str]) -> dict[str, Any]:
    from prunus.runtime.inputs import read_inputs

    try:
        return read_inputs(words)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _ask(
    options: Options,
    pid: str,
    arguments: Sequence[str],
    ask: Callable[[ProcessHandle, dict[str, Any]], Awaitable[Any]],
) -> None:
    """Ask a process something, and print the answer."""
    values = _read_inputs(arguments)

    async def go(controller: ProcessController) -> Any:
        return await ask(await _find(controller, pid), values)

    _import_like_workers(options.find_profile())
    click.echo(_yaml_document(_with_controller(options, go)))


async def _show(controller: ProcessController, handle: ProcessHandle, as_json: bool) -> None:
    import time

    from prunus.runtime import display, watch

    record = await handle.record()
    result = await handle.outcome()
    history = await handle.history()
    inputs = display.snapshot_of(record).get("inputs")
    data = result.to_data() if result else {}
    if as_json:
        children, _ = await watch.read_children(controller, handle.pid)
        facts = display.record_as_data(record) | {
            "inputs": inputs,
            "children": [child.pid for child in children],
            "history": history,
            "outputs": data.get("outputs"),
            "value": data.get("value"),
            "exit_status": result.exit_status if result else None,
            "exit_message": result.exit_message if result else None,
            "failure": result.failure if result else None,
        }
        click.echo(display.as_json(facts))
        return
    family = await watch.read_family(controller, handle.pid)
    console, now = display.console(), time.time()
    trouble = display.trouble(record, history)
    status = result.exit_status if result else None
    facts_shown = {
        "pid": record.pid,
        "class": record.class_id,
        "state": display.state(record),
        "exit status": f"{status}  {result.exit_message or ''}".rstrip() if result and status is not None else None,
        "why": trouble.why
        if trouble and record.is_terminal
        else result.exit_message
        if result and not status
        else None,
        "set aside": record.aside if not record.is_terminal else None,
        "status": record.status,
        "what to do": (trouble.advice if trouble else display.how_to_continue(record)),
        "next step": record.step if not record.is_terminal else None,
        "progress": display.progress_text(record) or None,
        "waits for": display.awaited(record, now) or None,
        "messages": f"{record.mail} not used yet" if record.mail else None,
        "held by": display.peer(record.owner) or None,
        "parent": record.parent,
        "tags": ", ".join(record.tags) or None,
        "created": f"{display.moment(record.created_at)}  ({display.span(now - record.created_at)} ago)",
        "ran for" if record.is_terminal else "changed": display.lifetime(record, now)
        if record.is_terminal
        else f"{display.span(now - record.updated_at)} ago",
    }
    display.show(console, display.facts_table(facts_shown))

    def section(title: str, body: Any) -> None:
        display.show(console, f"\n{title}", "bold")
        display.show(console, body)

    if inputs:
        section("inputs", _shortened(display.as_yaml(inputs), console.is_terminal))
    if data.get("outputs"):
        section("outputs", _shortened(display.as_yaml(data["outputs"]), console.is_terminal))
    if data.get("value") is not None:
        section("returned", _shortened(_yaml_document(data["value"]), console.is_terminal))
    if result and result.failure:
        section("failure", _failure_text(result.failure))
    if family.own_children():
        section("children", display.children_tree(family, now, utf8=watch.is_utf8(console)))
    if history:
        shown = history[-MAX_LINES_SHOWN:] if console.is_terminal else history
        more = f", the last {len(shown)} of {len(history)} events" if len(shown) < len(history) else ""
        section(f"history{more}", display.history_table(shown))


def _shortened(text: str, is_terminal: bool) -> str:
    """The beginning of a long text, for who looks at a terminal."""
    lines = text.splitlines()
    if not is_terminal or len(lines) <= MAX_LINES_SHOWN:
        return text
    hidden = len(lines) - MAX_LINES_SHOWN
    return "\n".join([*lines[:MAX_LINES_SHOWN], f"... {hidden} more lines; in a pipe (`| less`) nothing is left out"])


def _yaml_document(value: Any) -> str:
    """Any value as YAML; a single number or word without the mark that ends its document."""
    from prunus.runtime import display

    return display.as_yaml(value).removesuffix("\n...")


def _print_outputs(result: ProcessResult | None) -> None:
    from prunus.runtime import display

    if result is None:
        return
    data = result.to_data()
    if data["outputs"]:
        click.echo(display.as_yaml(data["outputs"]))
    elif data["value"] is not None:
        click.echo(_yaml_document(data["value"]))


def _fail_with(record: Record, result: ProcessResult | None) -> None:
    """The exit code and the last words of a command that waited for the end of a process."""
    from prunus.runtime.display import short

    pid = short(record.pid)
    if result is None:
        raise click.ClickException(
            f"process {record.pid} is set aside: {record.aside}\nMend the cause, then `prunus retry {pid}`."
        )
    if not result.successful:
        hint = f"\n`prunus show {pid}` shows more." if result.failure else ""
        raise click.ClickException(f"{result}{hint}")


def _failure_text(failure: Any) -> str:
    from prunus.runtime.display import without_our_frames

    text = without_our_frames(failure.traceback).rstrip() or str(failure)
    return f"{_failure_text(failure.cause)}\n\nThe cause of:\n\n{text}" if failure.cause else text


def _import_like_workers(profile: Profile) -> None:
    """The current folder and the folders of the workers can be imported from."""
    for folder in [*reversed(profile.import_folders), Path.cwd()]:
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def _warn_if_workers_lack(process_class: type, profile: Profile) -> None:
    """A class from the current folder is of no use to workers that do not import from there."""
    here = Path.cwd().resolve()
    if here in profile.import_folders:
        return
    top = sys.modules.get(process_class.__module__.partition(".")[0])
    places = [getattr(top, "__file__", None), *getattr(top, "__path__", [])]
    if any(place and Path(place).resolve().parent == here for place in places):
        click.echo(
            f"Warning: workers do not import from {here}; add it to import_from in {profile.path / 'config.yaml'} "
            "and restart the daemon.",
            err=True,
        )


def _say_running(profile: Profile, now: Any) -> None:
    workers = sum(name.startswith("worker-") for name in now.services)
    click.echo(f"The daemon runs (pid {now.daemon.pid}): a broker and {_count(workers, 'worker')}.")


def _memory(pid: int) -> str:
    import psutil

    try:
        return f"{psutil.Process(pid).memory_info().rss / 1e6:.0f} MB"
    except psutil.Error:
        return ""


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _follow(profile: Profile, places: dict[str, int]) -> None:
    """Print what is added to these logs, until Ctrl-C."""
    import time

    is_one = len(places) == 1
    while True:
        names = list(places) if is_one else sorted(file.stem for file in profile.log_folder.glob("*.log"))
        for name in names:
            path = profile.log(name)
            size, place = _size(path), places.get(name, 0)
            if size < place:  # it was put aside and begun anew
                place = 0
            if size > place:
                with path.open("rb") as file:
                    file.seek(place)
                    chunk = file.read(size - place)
                end = chunk.rfind(b"\n") + 1
                for line in chunk[:end].decode(errors="replace").splitlines():
                    click.echo(line if is_one else f"{click.style(name, bold=True)} | {line}")
                place += end
            places[name] = place
        sys.stdout.flush()
        time.sleep(FOLLOW_INTERVAL_S)


if __name__ == "__main__":
    main()
