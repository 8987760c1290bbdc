"""``prunus export``, ``prunus import`` and ``prunus prune``: processes into a file, out of one, and forgotten."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prunus.runtime.cli.choosing import Filters, find_one, read_pids, rows_of
from prunus.runtime.cli.connection import with_controller
from prunus.runtime.cli.group import Command, Options
from prunus.runtime.cli.patience import agrees, patience

if TYPE_CHECKING:
    from prunus.persistence.persister import Query
    from prunus.runtime.controller import ProcessController

ENDS = ("finished", "excepted", "killed")
FORGOTTEN_AT_ONCE = 200
"""In one commit, so that the broker does other things in between."""

_yes = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


@click.command(cls=Command)
@click.argument("pids", metavar="PID...", nargs=-1, required=True)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--tree/--no-tree", default=True, help="Also all below them (the default), or only them.")
@click.option("-f", "--force", is_flag=True, help="Replace FILE if it exists.")
@click.pass_obj
def export(options: Options, pids: tuple[str, ...], file: Path, tree: bool, force: bool) -> None:
    """Copy processes to FILE, for another profile or host.

    All that belongs to them is in it: checkpoint, result, messages, history, log, past steps. They go on as if nothing
    had happened.
    """
    from prunus.runtime import display, overview
    from prunus.runtime.archive import Manifest, write_archive

    words, target = read_pids(pids), file.absolute()

    async def copy(controller: ProcessController) -> Manifest:
        async with patience("exporting", 0, "processes") as meter:

            def show(done: int, total: int) -> None:
                meter.done, meter.total = done, total

            found = [(await find_one(controller, word)).pid for word in words]
            return await write_archive(controller, found, target, tree=tree, replace=force, progress=show)

    manifest = with_controller(options, copy)
    number = display.count(len(manifest.processes), "process")
    click.echo(f"{file}: {number}, {overview.size(file.stat().st_size)}")


@click.command("import", cls=Command)
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--play", is_flag=True, help="Let those that have not ended go on at once, if they did where they are from.")  # fmt: skip  # noqa: E501
@click.option("--skip-existing", is_flag=True, help="Leave out those that are here already. Otherwise nothing is imported if one is.")  # fmt: skip  # noqa: E501
@click.option("-n", "--dry-run", is_flag=True, help="Only check FILE, and list what is in it.")
@click.pass_obj
def import_(options: Options, file: Path, play: bool, skip_existing: bool, dry_run: bool) -> None:
    """Bring processes here from FILE, all of them or none.

    Those that have not ended are paused until somebody plays them.
    """
    from prunus.persistence.persister import Adopted
    from prunus.runtime import display
    from prunus.runtime.archive import import_archive, read_manifest

    if dry_run:
        _show_contents(file)
        return

    async def bring(controller: ProcessController) -> Adopted:
        async with patience("importing", 0, "bytes") as meter:

            def show(done: int, total: int) -> None:
                meter.done, meter.total = done, total

            return await import_archive(controller, file, play=play, skip_existing=skip_existing, progress=show)

    adopted = with_controller(options, bring)
    for pid in adopted.pids:
        click.echo(f"imported {pid}")
    for pid in adopted.skipped:
        click.echo(f"skipped {pid}: it is here already", err=True)
    states = {entry.pid: entry.state for entry in read_manifest(file).processes}
    living = sum(states[pid] not in ENDS for pid in adopted.pids)
    click.echo(f"imported: {display.count(len(adopted.pids), 'process')}", err=True)
    if living and not play:
        click.echo(f"{living:,} of them had not ended, and wait for `prunus play`", err=True)


@click.command(cls=Command)
@click.option("--older-than", metavar="AGE", help="Only those that ended longer ago, say 12h or 30d.")
@click.option("-a", "--all", "everything", is_flag=True, help="However short ago they ended.")
@click.option("-s", "--state", "states", multiple=True, type=click.Choice(ENDS), help="Only those; may be given often.")
@click.option("--class", "class_name", metavar="CLASS", help="Only those of this class: its name, or pkg.mod:Class.")
@click.option("--tag", metavar="TAG", help="Only those with this tag.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say how many they are.")
@_yes
@click.pass_obj
def prune(
    options: Options,
    older_than: str | None,
    everything: bool,
    states: tuple[str, ...],
    class_name: str | None,
    tag: str | None,
    dry_run: bool,
    yes: bool,
) -> None:
    """Forget processes that ended long ago.

    Their histories, logs and results go with them. Those that another process waits for, and those with children that
    have not ended, are kept. The setting `retention` does the same by itself.
    """
    from prunus.persistence.persister import Query
    from prunus.runtime.profile import seconds_of

    if (older_than is None) != everything:
        raise click.UsageError("say --older-than AGE, or --all")
    try:
        ended_before = None if older_than is None else time.time() - seconds_of(older_than)
    except ValueError as error:
        raise click.UsageError(f"--older-than: {error}") from error
    if not (yes or dry_run or sys.stdin.isatty()):
        raise click.UsageError("nobody can be asked here: add --yes")
    query = Query(states=states or ENDS, tag=tag, updated_before=ended_before, limit=FORGOTTEN_AT_ONCE)
    with_controller(options, lambda controller: _prune(controller, query, class_name, dry_run, yes))


async def _prune(controller: ProcessController, query: Query, class_name: str | None, dry_run: bool, yes: bool) -> None:
    import msgspec

    from prunus.runtime import display
    from prunus.runtime.backend import Backend

    async with patience("looking for processes"):
        classes, number = await _look(controller, query, class_name)
    if dry_run or not number:
        click.echo(f"would forget: {display.count(number, 'process')}" if number else "Nothing to forget.", err=True)
        return
    question = f"Forget {display.count(number, 'process')}, with their histories, logs and results, for good?"
    if not yes and not agrees(question):
        raise click.Abort
    persister = Backend(controller.communicator).persister
    forgotten = 0
    async with patience("forgetting", number, "processes") as meter:
        for class_id in classes:
            narrowed = msgspec.structs.replace(query, class_id=class_id)
            while gone := await persister.prune(narrowed):
                forgotten += gone
                meter.done = min(forgotten, number)
    click.echo(f"forgotten: {display.count(forgotten, 'process')}", err=True)
    if forgotten < number:
        kept = display.count(number - forgotten, "process")
        click.echo(f"kept: {kept} that others wait for, or whose children have not ended", err=True)


async def _look(controller: ProcessController, query: Query, class_name: str | None) -> tuple[list[str | None], int]:
    """The classes that are meant (None: all), and how many processes match."""
    import msgspec

    from prunus.persistence.persister import QUERY_LIMIT

    found: dict[str | None, None] = {}
    number = 0
    paged = msgspec.structs.replace(query, limit=QUERY_LIMIT)
    async for row in rows_of(controller, Filters(class_name=class_name), paged):
        found[None if class_name is None else row.class_id] = None
        number += 1
    return list(found), number


def _show_contents(file: Path) -> None:
    from prunus.runtime import display
    from prunus.runtime.archive import read_manifest, shown_host

    manifest = read_manifest(file)
    table = display.plain_table("pid", "class", "state")
    for entry in manifest.processes:
        table.add_row(*map(display.plain, (entry.pid, display.class_name(entry.class_id), entry.state)))
    display.show(display.console(), table)
    number, age = display.count(len(manifest.processes), "process"), display.span(max(0.0, time.time() - manifest.at))
    click.echo(
        f"{number}, exported {age} ago on {shown_host(manifest)} by Prunus {display.plain(manifest.prunus)}", err=True
    )
