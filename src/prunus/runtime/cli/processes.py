"""The commands that launch processes and look at them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prunus.runtime.cli.choosing import Filters, find_one, read_pids, rows_of, takes_processes
from prunus.runtime.cli.connection import import_like_workers, with_controller
from prunus.runtime.cli.group import Command, Options
from prunus.runtime.cli.patience import patience
from prunus.runtime.cli.values import check_step, read_inputs_of, read_tokens, yaml_document

if TYPE_CHECKING:
    from rich.console import Console

    from prunus.persistence.persister import LogLine, Query, Record
    from prunus.processes import ProcessResult
    from prunus.runtime.controller import ProcessController, ProcessHandle
    from prunus.runtime.display import Family
    from prunus.runtime.profile import Profile

MAX_LINES_SHOWN = 40
"""Of inputs, outputs, a context and the steps, each, on a terminal."""
MAX_EVENTS_SHOWN = 12
"""Of a history, on a terminal."""
LISTED = 50
"""How many processes a table shows, if nothing else is said."""
MAX_LISTED = 100_000
MAX_COUNTED = 10_000
"""Of more processes than that it is said that there are more."""


def _checked_pid(context: click.Context, parameter: click.Parameter, pid: str | None) -> str | None:
    if pid is None:
        return None
    from prunus.processes.options import read_pid

    try:
        return read_pid(pid)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from None


@click.command(cls=Command)
@click.argument("process_class", metavar="pkg.mod:Class")
@click.argument("inputs", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--pid", metavar="PID", callback=_checked_pid, help="The pid to give it. If it exists already, nothing is launched again.")  # fmt: skip  # noqa: E501
@click.option("--process-key", metavar="KEY", help="A name for what is to be done: if a process has it already, nothing is launched again, and its pid is printed.")  # fmt: skip  # noqa: E501
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="A tag to find it by; may be given often.")
@click.option("--queue", metavar="QUEUE", help="Which workers run it (else as its class says).")
@click.option("--priority", metavar="N", type=click.IntRange(0, 9), help="9 goes first (else as its class says).")
@click.option("--resource", "resources", metavar="NAME=N", multiple=True, help="Tokens that it takes while a worker has it; may be given often.")  # fmt: skip  # noqa: E501
@click.option("--on-exception", type=click.Choice(["fail", "pause"]), help="What becomes of it when a step raises (else as its class says).")  # fmt: skip  # noqa: E501
@click.option("--paused", is_flag=True, help="It waits to be played before its first step.")
@click.option("--pause-at", metavar="STEP", help="It pauses before it takes this step.")
@click.option("--wait", is_flag=True, help="Show its progress, wait for its end and print its outputs.")
@click.option("--json", "as_json", is_flag=True, help="For programs: its pid; with --wait, all that it gave.")
@click.pass_obj
def launch(
    options: Options,
    process_class: str,
    inputs: tuple[str, ...],
    pid: str | None,
    process_key: str | None,
    tags: tuple[str, ...],
    queue: str | None,
    priority: int | None,
    resources: tuple[str, ...],
    on_exception: Any,
    paused: bool,
    pause_at: str | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Have a process run by the workers, and print its pid.

    Values are YAML: x=1, name=Cu, scales=[0.98,1.0]. key=@file.yaml reads a file, a.b=1 sets b in the namespace a.
    """
    from prunus.processes.loading import load_class

    values = read_inputs_of(inputs)
    given = {"tags": tags, "queue": queue, "priority": priority, "resources": read_tokens(resources) or None}
    run_options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    profile = options.local_profile()
    import_like_workers(profile)
    loaded = load_class(process_class, ["*"] if profile is None else profile.config.modules)
    try:
        loaded(values, **run_options)  # wrong inputs are told at once, whether a daemon runs or not
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    check_step("--pause-at", loaded, pause_at)
    if profile is not None:
        _warn_if_workers_lack(loaded, profile)

    async def go(controller: ProcessController) -> tuple[Record, ProcessResult | None] | None:
        from prunus.runtime import display, watch

        handle = await controller.launch(
            loaded,
            values,
            pid=pid,
            key=process_key,
            on_exception=on_exception,
            paused=paused,
            pause_at=pause_at,
            **run_options,
        )
        if not wait:
            click.echo(display.as_json({"pid": handle.pid}) if as_json else handle.pid)
            return None
        click.echo(f"launched {handle.pid}", err=True)
        try:
            console = display.console(stderr=True)
            record = await watch.watch_family(controller, handle.pid, console, since_launch=True)
        except asyncio.CancelledError:
            click.echo(f"\nIt goes on without us: prunus watch {display.word(display.short(handle.pid))}", err=True)
            raise
        return record, await handle.outcome()

    end = with_controller(options, go)
    if end is not None:
        record, result = end
        if as_json:
            _print_result(record, result)
        else:
            _print_outputs(result)
        _fail_with(record, result)


@click.command("list", cls=Command)
@takes_processes("Also those that have ended.", pids=False)
@click.option("-n", "--limit", metavar="N", type=click.IntRange(1, MAX_LISTED), help=f"The newest so many; without it {LISTED}, with --quiet and --json all.")  # fmt: skip  # noqa: E501
@click.option("--sort", type=click.Choice(["created", "changed", "class", "state", "priority"]), help="Sort those that are shown; children are not put below their parents then.")  # fmt: skip  # noqa: E501
@click.option("-w", "--wide", is_flag=True, help="Full pids and classes, queues, priorities, tags, keys and workers.")
@click.option("-q", "--quiet", is_flag=True, help="Only the pids, one a line: for xargs.")
@click.option("--json", "as_json", is_flag=True, help="For programs: an array with every fact of each.")
@click.pass_obj
def list_(
    options: Options,
    filters: Filters,
    limit: int | None,
    sort: str | None,
    wide: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """The processes that have not ended, the newest first."""
    import time

    from prunus.runtime import display

    wanted = limit or (MAX_LISTED if quiet or as_json else LISTED)

    async def look(controller: ProcessController) -> tuple[list[Record], str | None]:
        query = await filters.query(controller, unfinished=not filters.everything)
        rows = [row async for row in rows_of(controller, filters, query, wanted)]
        is_cut = len(rows) == wanted and not (quiet or as_json)
        return rows, await _how_many(controller, filters, query) if is_cut else None

    rows, total = with_controller(options, look, "waiting for the list of processes")
    if sort is not None:
        rows.sort(key=_order(sort), reverse=sort != "class")
    if quiet:
        for row in rows:
            click.echo(row.pid)
    elif as_json:
        click.echo(display.as_json([display.record_as_data(row) for row in rows]))
    elif rows:
        console = display.console(uncut=wide)
        table = display.process_table(
            rows, time.time(), nested=sort is None, wide=wide, utf8=console.encoding.startswith("utf")
        )
        display.show(console, table)
        if total is not None and total != str(len(rows)):
            click.echo(f"{len(rows)} of {total} processes; --limit shows more.", err=True)
        elif console.is_terminal:
            click.secho(display.count(len(rows), "process"), err=True, dim=True)
    else:
        may_have_ended = not filters.everything and not filters.has_states
        hint = "; with --all those that have ended are looked at too" if may_have_ended and filters else ""
        hint = "; `prunus list --all` shows those that have ended" if not filters else hint
        click.echo(f"No process{hint}.", err=True)


def _order(sort: str) -> Any:
    from prunus.runtime.display import class_name

    return {
        "created": lambda row: row.created_at,
        "changed": lambda row: row.updated_at,
        "class": lambda row: class_name(row.class_id),
        "state": lambda row: row.state,
        "priority": lambda row: row.priority,
    }[sort]


async def _how_many(controller: ProcessController, filters: Filters, query: Query) -> str:
    """How many match, as text: the broker keeps count of the states, all else is counted up to `MAX_COUNTED`."""
    import msgspec

    from prunus.persistence.persister import TERMINAL_STATES, Query

    plain = Query(states=query.states, unfinished=query.unfinished, limit=query.limit)
    if query == plain and filters.is_exact and filters.class_name is None:
        counts = (await controller.broker_statistics()).get("processes", {})
        wanted = query.states or [state for state in counts if not query.unfinished or state not in TERMINAL_STATES]
        return f"{sum(counts.get(state, 0) for state in wanted):,}"
    number = 0
    async for _ in rows_of(controller, filters, msgspec.structs.replace(query, before=None), MAX_COUNTED):
        number += 1
    return f"{number:,}" if number < MAX_COUNTED else f"more than {MAX_COUNTED:,}"


@click.command(cls=Command)
@click.argument("pids", metavar="PID...", nargs=-1, required=True)
@click.option("--checkpoint", is_flag=True, help="Its last checkpoint as YAML, and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="For programs: an object; of several processes one behind another.")  # fmt: skip  # noqa: E501
@click.pass_obj
def show(options: Options, pids: tuple[str, ...], checkpoint: bool, as_json: bool) -> None:
    """All that is known of a process.

    Facts, inputs, context, outputs or failure, children, steps with their durations, and the history.
    """

    words = read_pids(pids)

    async def look(controller: ProcessController) -> None:
        for number, pid in enumerate(words):
            handle = await find_one(controller, pid)
            if checkpoint:
                click.echo((await handle.checkpoint_yaml()).rstrip())
            else:
                await _show(controller, handle, as_json, is_first=number == 0)

    import_like_workers(options.local_profile())
    with_controller(options, look)


@click.command(cls=Command)
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
        handle = await find_one(controller, pid)
        return await watch.watch_family(controller, handle.pid, display.console()), await handle.outcome()

    import_like_workers(options.local_profile())
    end = with_controller(options, look)
    if end is not None:
        _fail_with(*end)


@click.command(cls=Command)
@click.argument("pids", metavar="[PID]...", nargs=-1)
@click.option("-a", "--all", "everything", is_flag=True, help="Every child; without it, of many only those that people look for.")  # fmt: skip  # noqa: E501
@click.option("-n", "--limit", metavar="N", type=click.IntRange(1, 1000), default=20, show_default=True, help="Without PID: so many trees.")  # fmt: skip  # noqa: E501
@click.option("--json", "as_json", is_flag=True, help="For programs: an array; each process has its children.")
@click.pass_obj
def tree(options: Options, pids: tuple[str, ...], everything: bool, limit: int, as_json: bool) -> None:
    """Processes with their children, as they are now.

    Without PID: all that have not ended and that no other process submitted.
    """
    import time

    from prunus.runtime import display

    words = read_pids(pids)

    async def look(controller: ProcessController) -> tuple[list[Family], bool]:
        from prunus.persistence.persister import Query
        from prunus.runtime.watch import read_family

        if pids:
            roots = [(await find_one(controller, word)).pid for word in words]
        else:
            query = Query(unfinished=True, roots=True, limit=limit)
            roots = [row.pid for row in await controller.find(query)]
        complete = everything or as_json
        return [await read_family(controller, pid, complete=complete) for pid in roots], len(roots) == limit

    import_like_workers(options.local_profile())
    families, is_cut = with_controller(options, look, "waiting for the processes")
    if as_json:
        click.echo(display.as_json([display.family_as_data(family) for family in families]))
        return
    console, now = display.console(), time.time()
    for family in families:
        display.show(console, display.family_tree(family, now, utf8=console.encoding.startswith("utf")))
    if not pids and not families:
        click.echo("No process; `prunus tree PID` shows one that has ended.", err=True)
    elif not pids and is_cut:
        click.echo(f"The newest {limit} are shown; --limit shows more.", err=True)


@click.command("logs", cls=Command)
@click.argument("pid")
@click.option("-f", "--follow", is_flag=True, help="Go on until it has ended, or Ctrl-C.")
@click.option("-t", "--tree", "with_children", is_flag=True, help="Also what all below it say.")
@click.option(
    "-n", "--lines", metavar="N", type=click.IntRange(1, 1000), default=100, show_default=True, help="The last so many."
)
@click.option("--json", "as_json", is_flag=True, help="For programs: one object a line.")
@click.pass_obj
def logs_(options: Options, pid: str, follow: bool, with_children: bool, lines: int, as_json: bool) -> None:
    """What a process has said, and why its steps failed."""
    import msgspec

    from prunus.runtime import display, watch

    colours = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}

    def say(record: Record, line: LogLine) -> None:
        if as_json:
            facts = {name: getattr(line, name) for name in line.__struct_fields__}
            click.echo(msgspec.json.encode({"pid": record.pid, "class_id": record.class_id} | facts))
            return
        who = f"{display.short(record.pid)} {display.class_name(record.class_id)}" if with_children else ""
        click.secho(display.log_line(line, who), fg=colours.get(line.level))

    def paused(trouble: display.Trouble) -> None:
        click.echo(display.trouble_text(trouble).plain, err=True)

    is_silent = False

    def silent(why: str | None) -> None:
        nonlocal is_silent
        if why is not None and not is_silent:
            click.echo(why, err=True)
        is_silent = why is not None

    async def look(controller: ProcessController) -> Record:
        handle = await find_one(controller, pid)
        reader = watch.LogReader(controller, handle.pid, with_children)
        async with patience("waiting for the log"):
            said = await reader.last(lines)
        for record, line in said:
            say(record, line)
        if follow:
            async for record, line in watch.follow_log(controller, reader, paused, silent):
                say(record, line)
        elif not said:
            click.echo("It has said nothing yet.", err=True)
        return await handle.record()

    record = with_controller(options, look)
    if follow and not record.is_terminal:
        _fail_with(record, None)


@click.command(cls=Command)
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
        import_like_workers(options.local_profile())
    except ProfileError:  # a class can be described without any
        sys.path.insert(0, str(Path.cwd()))
    description = describe(load_class(process_class))
    if as_json:
        click.echo(display.as_json(description))
    else:
        click.echo((draw(description) if as_mermaid else as_markdown(description)).rstrip())


# --- parts ------------------------------------------------------------------------------------------


async def _show(controller: ProcessController, handle: ProcessHandle, as_json: bool, *, is_first: bool) -> None:
    import time

    from prunus.runtime import display, portrait, watch

    async with patience("waiting for the process"):
        shown = portrait.Portrait(await handle.record(), await handle.outcome(), await handle.history())
        if as_json:
            children = [row.pid for row in (await watch.read_children(controller, handle.pid))[0]]
        else:
            family = await watch.read_family(controller, handle.pid)
    now = time.time()
    if as_json:
        click.echo(display.as_json(portrait.as_data(shown, children, now)))
        return
    console = display.console()
    if not is_first:
        display.show(console, "\n" + "-" * 80)
    _draw(console, shown, family, now)


def _draw(console: Console, shown: Any, family: Family, now: float) -> None:
    from prunus.runtime import display, portrait

    def section(title: str, body: Any) -> None:
        display.show(console, f"\n{title}", "bold")
        display.show(console, body)

    def values(title: str, found: Any) -> None:
        if found:
            section(title, _shortened(display.as_yaml(found), console.is_terminal))

    def last(what: Sequence[Any], most: int) -> tuple[Sequence[Any], str]:
        if not console.is_terminal or len(what) <= most:
            return what, ""
        return what[-most:], f", the last {most} of {len(what)}"

    display.show(console, display.facts_table(portrait.facts(shown, now)))
    record, result = shown.record, shown.result
    snapshot, data = display.snapshot_of(record), result.to_data() if result else {}
    values("inputs", snapshot.get("inputs"))
    values("context", portrait.context_of(record))
    values("outputs" if result else "outputs so far", data.get("outputs") if result else snapshot.get("outputs"))
    if data.get("value") is not None:
        section("returned", _shortened(yaml_document(data["value"]), console.is_terminal))
    if result and result.failure:
        section("failure", portrait.failure_text(result.failure))
    if family.own_children():
        section("children", display.children_tree(family, now, utf8=console.encoding.startswith("utf")))
    if steps := portrait.step_runs(record, shown.history, now):
        some, which = last(steps, MAX_LINES_SHOWN)
        section(f"steps{which}", portrait.step_table(some, now))
    if shown.history:
        some, which = last(shown.history, MAX_EVENTS_SHOWN)
        section(f"history{which and f'{which} events'}", display.history_table(some))


def _shortened(text: str, is_terminal: bool) -> str:
    """The beginning of a long text, for who looks at a terminal."""
    lines = text.splitlines()
    if not is_terminal or len(lines) <= MAX_LINES_SHOWN:
        return text
    hidden = len(lines) - MAX_LINES_SHOWN
    return "\n".join([*lines[:MAX_LINES_SHOWN], f"... {hidden} more lines; in a pipe (`| less`) nothing is left out"])


def _print_outputs(result: ProcessResult | None) -> None:
    from prunus.runtime import display

    if result is None:
        return
    data = result.to_data()
    if data["outputs"]:
        click.echo(display.as_yaml(data["outputs"]))
    elif data["value"] is not None:
        click.echo(yaml_document(data["value"]))


def _print_result(record: Record, result: ProcessResult | None) -> None:
    """The end of a process for programs."""
    from prunus.runtime import display

    data = result.to_data() if result else {}
    names = ("outputs", "value", "exit_status", "exit_message", "failure")
    facts = {"pid": record.pid, "state": record.state, "aside": record.aside}
    click.echo(display.as_json(facts | {name: data.get(name) for name in names}))


def _fail_with(record: Record, result: ProcessResult | None) -> None:
    """The exit code and the last words of a command that waited for the end of a process."""
    from prunus.runtime.display import short, word

    pid = word(short(record.pid))
    if result is None:
        raise click.ClickException(
            f"process {record.pid} is set aside: {record.aside}\nMend the cause, then `prunus retry {pid}`."
        )
    if not result.successful:
        hint = f"\n`prunus show {pid}` shows more." if result.failure else ""
        raise click.ClickException(f"{result}{hint}")


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
