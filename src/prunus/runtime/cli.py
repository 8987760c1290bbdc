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
    from prunus.persistence.persister import Record
    from prunus.processes import ProcessResult
    from prunus.runtime.controller import ProcessController, ProcessHandle
    from prunus.runtime.profile import Profile

T = TypeVar("T")

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
PATIENCE_S = 2.0
"""A command that takes longer says what it waits for."""
FOLLOW_INTERVAL_S = 0.2


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
@click.pass_obj
def launch(
    options: Options, process_class: str, inputs: tuple[str, ...], pid: str | None, tags: tuple[str, ...], wait: bool
) -> None:
    """Have a process run by the workers, and print its pid.

    Values are YAML: x=1, name=Cu, scales=[0.98,1.0]. key=@file.yaml reads a file, a.b=1 sets b in the namespace a.
    """
    from prunus.processes.loading import load_class
    from prunus.runtime.inputs import read_inputs

    try:
        values = read_inputs(inputs)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    profile = options.find_profile()
    _import_like_workers(profile)
    loaded = load_class(process_class, profile.config.modules)
    loaded(values, tags=tags)  # wrong inputs are told at once, whether a daemon runs or not
    _warn_if_workers_lack(loaded, profile)

    async def go(controller: ProcessController) -> ProcessResult | None:
        from prunus.runtime import display, watch

        handle = await controller.launch(loaded, values, pid=pid, tags=tags)
        if not wait:
            click.echo(handle.pid)
            return None
        click.echo(f"launched {handle.pid}", err=True)
        try:
            await watch.watch_family(controller, handle.pid, display.console(stderr=True))
        except asyncio.CancelledError:
            click.echo(f"\nIt goes on without us: prunus watch {display.short(handle.pid)}", err=True)
            raise
        return await handle.outcome()

    result = _with_controller(options, go)
    if result is not None:
        _print_result(result)


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

    With PID: it and its children, until it has ended. Without: all processes, until Ctrl-C.
    """
    from prunus.runtime import display, watch

    async def look(controller: ProcessController) -> None:
        if pid is None:
            await watch.watch_all(controller, display.console())
        else:
            await watch.watch_family(controller, (await _find(controller, pid)).pid, display.console())

    _with_controller(options, look)


_pids = click.argument("pids", metavar="PID...", nargs=-1)
_all = click.option("-a", "--all", "everything", is_flag=True, help="All that it applies to.")


@cli.command()
@_pids
@_all
@click.option("-m", "--message", help="Why; it is kept in the history.")
@click.pass_obj
def pause(options: Options, pids: tuple[str, ...], everything: bool, message: str | None) -> None:
    """Stop processes between two steps, until they are played."""
    _control(
        options,
        "paused",
        pids,
        everything,
        lambda handle: handle.pause(message),
        lambda controller: controller.pause_all(message),
    )


@cli.command()
@_pids
@_all
@click.pass_obj
def play(options: Options, pids: tuple[str, ...], everything: bool) -> None:
    """Let paused processes go on."""
    _control(
        options,
        "playing",
        pids,
        everything,
        lambda handle: handle.play(),
        lambda controller: controller.play_all(),
    )


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
    """Continue a process that waits for a message, with VALUE (YAML)."""
    from prunus.runtime.inputs import read_value

    try:
        read = None if value is None else read_value(value)
    except ValueError as error:
        raise click.UsageError(f"VALUE: {error}") from error
    _control(options, "resumed", (pid,), False, lambda handle: handle.resume(read), None)


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
@click.pass_obj
def doctor(options: Options) -> None:
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
        async for finding in examine(options.find_profile):
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
    """The process whose pid is `text`, or the only one whose pid ends or begins with it."""
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
    if len(found) > 1:
        shown = "".join(f"\n  {row.pid}  {class_name(row.class_id)}, {row.state}" for row in found[:10])
        more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
        raise click.ClickException(f"{text!r} is the end or the beginning of {len(found)} pids:{shown}{more}")
    return controller.handle(found[0].pid)


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


async def _show(controller: ProcessController, handle: ProcessHandle, as_json: bool) -> None:
    import time

    from prunus.runtime import display, watch

    family = await watch.read_family(controller, handle.pid)
    record = await handle.record()
    result = await handle.outcome()
    history = await handle.history()
    inputs = _inputs_of(record)
    outputs = result.to_data()["outputs"] if result else None
    if as_json:
        facts = display.record_as_data(record) | {
            "inputs": inputs,
            "children": [child.record.pid for child in family.children],
            "history": history,
            "outputs": outputs,
            "exit_status": result.exit_status if result else None,
            "exit_message": result.exit_message if result else None,
            "failure": result.failure if result else None,
        }
        click.echo(display.as_json(facts))
        return
    console, now = display.console(), time.time()
    status = result.exit_status if result else None
    facts_shown = {
        "pid": record.pid,
        "class": record.class_id,
        "state": display.state(record),
        "exit status": f"{status}  {result.exit_message or ''}".rstrip() if result and status is not None else None,
        "why": result.exit_message if result and status is None else None,
        "set aside": record.aside if not record.is_terminal else None,
        "status": record.status,
        "next step": record.step if not record.is_terminal else None,
        "waits for": ", ".join(map(display.short, record.waits)) or None,
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
        section("inputs", display.as_yaml(inputs))
    if outputs:
        section("outputs", display.as_yaml(outputs))
    if result and result.failure:
        section("failure", _failure_text(result.failure))
    if family.children:
        from rich.console import Group

        utf8 = watch.is_utf8(console)
        section("children", Group(*(display.family_tree(child, now, utf8=utf8) for child in family.children)))
    if history:
        section("history", display.history_table(history))


def _print_result(result: ProcessResult) -> None:
    from prunus.runtime import display

    if result.outputs:
        click.echo(display.as_yaml(result.to_data()["outputs"]))
    if not result.successful:
        hint = f"\n`prunus show {display.short(result.pid)}` shows more." if result.failure else ""
        raise click.ClickException(f"{result}{hint}")


def _inputs_of(record: Record) -> dict[str, Any] | None:
    """Its inputs, as far as they can be read here: the types of their values may be missing."""
    from prunus.errors import PrunusError
    from prunus.persistence.checkpoint import decode_checkpoint

    if record.checkpoint is None:
        return None
    try:
        inputs = decode_checkpoint(record.checkpoint).snapshot()["inputs"]
    except (PrunusError, KeyError):
        return None
    return dict(inputs)


def _failure_text(failure: Any) -> str:
    text = failure.traceback.rstrip() or str(failure)
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
