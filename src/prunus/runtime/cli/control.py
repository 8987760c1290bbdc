"""The commands that tell processes something: pause, play, kill, retry, delete, and the letters of a class.

Those that take several processes take pids or filters (see `choosing`), do it to `AT_ONCE` of them at a time, print a
line for each, and end with the exit code 1 if one of them could not. What can't be taken back is asked before it is
done to processes that were chosen by filters.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from prunus.runtime.cli.choosing import Filters, find_one, read_pids, rows_of, takes_processes
from prunus.runtime.cli.connection import import_like_workers, with_controller
from prunus.runtime.cli.group import Command, Options
from prunus.runtime.cli.patience import agrees, patience
from prunus.runtime.cli.values import check_step, read_inputs_of, read_value_of, yaml_document

if TYPE_CHECKING:
    from prunus.runtime.cli.patience import Meter, agrees
    from prunus.runtime.controller import ProcessController, ProcessHandle
    from prunus.runtime.selection import BulkReport, ProcessSelection, Progress

AT_ONCE = 200
"""So many processes are told something at the same time."""
WAITING = "waiting for running steps to end (Ctrl-C: it will happen all the same)"
ENDED = ("finished", "excepted", "killed")

_cascade = click.option("-c", "--cascade", is_flag=True, help="Also all below them.")
_message = click.option("-m", "--message", metavar="WHY", help="Why; it is kept in the history.")
_yes = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


@click.command(cls=Command)
@takes_processes()
@_message
@_cascade
@click.option("--wait/--no-wait", default=True, help="Wait for the end of the steps that run (the default), or do not.")
@click.option("--at", metavar="STEP", help="A breakpoint: not now, but before it takes this step.")
@click.pass_obj
def pause(
    options: Options,
    pids: tuple[str, ...],
    filters: Filters,
    message: str | None,
    cascade: bool,
    wait: bool,
    at: str | None,
) -> None:
    """Stop processes between two steps, until they are played."""
    if at is not None and (filters or cascade or message):
        raise click.UsageError("--at goes with PID..., and not with filters, --cascade or --message")

    async def one(handle: ProcessHandle) -> None:
        await _check_step_of("--at", handle, at)
        await handle.pause(message, quiesced=wait, cascade=cascade, at=at)

    import_like_workers(options.local_profile())
    done = "paused" if wait else "pausing"
    each(
        options,
        done if at is None else f"will pause before {at}:",
        pids,
        filters,
        one,
        [{"unfinished": True, "play": "playing"}],
        bulk=lambda selection, progress: selection.pause(message, quiesced=wait, cascade=cascade, progress=progress),
    )


@click.command(cls=Command)
@takes_processes()
@_cascade
@click.option("--until", metavar="STEP", help="They pause again before they take this step.")
@click.pass_obj
def play(options: Options, pids: tuple[str, ...], filters: Filters, cascade: bool, until: str | None) -> None:
    """Let paused processes go on."""
    if until is not None and filters:
        raise click.UsageError("--until goes with PID..., and not with filters")

    async def one(handle: ProcessHandle) -> None:
        await _check_step_of("--until", handle, until)
        await handle.play(cascade=cascade, pause_at=until)

    import_like_workers(options.local_profile())
    each(
        options,
        "playing",
        pids,
        filters,
        one,
        [{"unfinished": True, "play": "paused"}],
        bulk=lambda selection, progress: selection.play(cascade=cascade, progress=progress),
    )


@click.command(cls=Command)
@takes_processes("All that have not ended.")
@click.option("-f", "--force", is_flag=True, help="Do not let the running step clean up.")
@_message
@_yes
@click.pass_obj
def kill(
    options: Options, pids: tuple[str, ...], filters: Filters, force: bool, message: str | None, yes: bool
) -> None:
    """End processes, and their children, for good."""
    each(
        options,
        "killed",
        pids,
        filters,
        lambda handle: handle.kill(message, force=force),
        [{"unfinished": True}],
        bulk=lambda selection, progress: selection.kill(message, force=force, progress=progress),
        question=None if yes or not sys.stdin.isatty() else "Kill {number}, and their children, for good",
    )


@click.command(cls=Command)
@takes_processes("All that excepted or are set aside.")
@click.pass_obj
def retry(options: Options, pids: tuple[str, ...], filters: Filters) -> None:
    """Continue excepted or set-aside processes.

    They go on from their last good checkpoint.
    """
    each(
        options,
        "continued",
        pids,
        filters,
        lambda handle: handle.retry(),
        [{"states": ("excepted",)}, {"unfinished": True, "aside": True}],
        bulk=lambda selection, progress: selection.retry(progress=progress),
    )


@click.command(cls=Command)
@takes_processes("All that have ended.")
@_yes
@click.pass_obj
def delete(options: Options, pids: tuple[str, ...], filters: Filters, yes: bool) -> None:
    """Forget processes that have ended, for good.

    Their histories, logs and results go with them. One that has not ended, or that another one waits for, is not
    forgotten. By filters it takes only those that have ended.
    """
    if filters and not yes and not sys.stdin.isatty():
        raise click.UsageError("nobody can be asked here: add --yes")
    each(
        options,
        "deleted",
        pids,
        filters,
        lambda handle: handle.delete(),
        [{"states": ENDED}],
        bulk=lambda selection, progress: selection.delete(progress=progress),
        question=None if yes else "Forget {number}, with their histories, logs and results, for good",
    )


@click.command(cls=Command)
@click.argument("pid")
@click.argument("value", required=False)
@click.pass_obj
def resume(options: Options, pid: str, value: str | None) -> None:
    """Continue a suspended process, with VALUE (YAML)."""
    given = () if value is None else (read_value_of("VALUE", value),)

    async def one(handle: ProcessHandle) -> None:
        from prunus.errors import InvalidStateError
        from prunus.runtime.display import how_to_continue

        try:
            await handle.resume(*given)
        except InvalidStateError as error:
            hint = how_to_continue(await handle.record())
            raise InvalidStateError(error.state, f"{error.needed} ({hint})") if hint else error from None

    each(options, "resumed", (pid,), Filters(), one)


@click.command(cls=Command)
@click.argument("pid")
@click.argument("message")
@click.argument("value", required=False)
@click.pass_obj
def send(options: Options, pid: str, message: str, value: str | None) -> None:
    """Send a process a message that its class declares.

    MESSAGE is its name, VALUE is YAML. It is kept until the process waits for it.
    """
    read = None if value is None else read_value_of("VALUE", value)
    import_like_workers(options.local_profile())
    each(options, "sent to", (pid,), Filters(), lambda handle: handle.send(message, read))


@click.command(cls=Command)
@click.argument("pid")
@click.argument("name")
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.pass_obj
def query(options: Options, pid: str, name: str, arguments: tuple[str, ...]) -> None:
    """Ask a process a question, and print the answer.

    NAME is one of the queries of its class; values and the answer are YAML.
    """
    _ask(options, pid, arguments, lambda handle, values: handle.query(name, **values))


@click.command(cls=Command)
@click.argument("pid")
@click.argument("name")
@click.argument("arguments", metavar="[KEY=VALUE]...", nargs=-1)
@click.pass_obj
def update(options: Options, pid: str, name: str, arguments: tuple[str, ...]) -> None:
    """Change a process by one of its updates.

    NAME is one of the updates of its class. The answer is printed when the change is durable; all values are YAML.
    """
    _ask(options, pid, arguments, lambda handle, values: handle.update(name, **values))


@click.command(cls=Command)
@click.argument("pid")
@click.argument("values", metavar="KEY=VALUE...", nargs=-1, required=True)
@click.pass_obj
def edit(options: Options, pid: str, values: tuple[str, ...]) -> None:
    """Set names in the context of a work chain.

    It takes effect between two of its steps, and its history says so. Values are YAML.
    """
    read = read_inputs_of(values)
    each(options, "edited", (pid,), Filters(), lambda handle: handle.edit_context(**read))


@click.command(cls=Command)
@click.argument("pid")
@click.argument("value", required=False)
@click.pass_obj
def settle(options: Options, pid: str, value: str | None) -> None:
    """Say that a step of unknown effect took place.

    VALUE (YAML) is what it returned. For a process that is paused because its worker died in a step with effect="once".
    """
    read = None if value is None else read_value_of("VALUE", value)
    each(options, "settled", (pid,), Filters(), lambda handle: handle.settle(read))


@click.command(cls=Command)
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

    values = read_inputs_of(changes)
    if step is None and values:
        lists = f"`prunus fork {display.word(pid)}` lists the steps on record"
        raise click.UsageError(f"`--at STEP` is missing: where to go on; {lists}")

    async def go(controller: ProcessController) -> None:
        handle = await find_one(controller, pid)
        if step is not None:
            click.echo((await handle.fork(step, **values)).pid)
            return
        last = {past.step: past.at for past in await handle.steps()}  # a fork goes on from the last time
        if not last:
            click.echo("None of its steps is on record.", err=True)
            return
        table, now = display.plain_table("step", "before"), time.time()
        for name, at in sorted(last.items(), key=lambda item: item[1]):
            table.add_row(name, f"{display.span(now - at)} ago")
        display.show(display.console(), table)

    import_like_workers(options.local_profile())
    with_controller(options, go, "waiting for the process")


# --- parts ------------------------------------------------------------------------------------------


def each(
    options: Options,
    done: str,
    pids: Sequence[str],
    filters: Filters,
    one: Callable[[ProcessHandle], Awaitable[None]],
    applies_to: Sequence[Mapping[str, Any]] = (),
    *,
    bulk: Callable[[ProcessSelection, Progress], Awaitable[BulkReport]] | None = None,
    question: str | None = None,
) -> None:
    """Do one thing to each process; a failure of one does not keep it from the others. Exit code 1 if one failed.

    `applies_to` are the queries for those that filters choose from, as long as they do not say in which states these
    are; `bulk` does the same to all that a query finds, in fewer calls. `question` is asked first about those that
    filters have chosen.
    """
    if bool(pids) == bool(filters):
        raise click.UsageError(f"say which processes: PID...{', or --all or another filter' if applies_to else ''}")
    words = read_pids(pids)

    async def work(controller: ProcessController) -> bool:
        chosen, missing = _Chosen(), 0
        async with patience("waiting for the list of processes"):
            if filters:
                chosen = await _choose(controller, filters, applies_to, bulk is not None)
            else:
                pids_found, missing = await _named(controller, words)
                chosen = _Chosen(pids=pids_found)
        if question is not None and filters and chosen.number and not _agrees(question, chosen.number):
            raise click.Abort
        waiting_for = WAITING if chosen.number <= AT_ONCE and not chosen.selections else "waiting for the processes"
        async with patience(waiting_for, chosen.number, done) as meter:
            report = _Report(done, meter)
            for selection in chosen.selections:
                report.begin()
                assert bulk is not None, "else nothing is left to a selection"
                report.show(await bulk(selection, report.show))
            await _tell(controller, chosen.pids, one, report)
        failed = missing + report.failed
        _sum_up(done, report.succeeded, failed, bool(filters))
        return failed == 0

    if not with_controller(options, work):
        sys.exit(1)


@dataclass
class _Chosen:
    """Which processes it is done to: those of the selections, and these."""

    selections: list[ProcessSelection] = field(default_factory=list)
    pids: list[str] = field(default_factory=list)
    number: int = 0

    def __post_init__(self) -> None:
        self.number = self.number or len(self.pids)


class _Report:
    """Prints a line for each process."""

    def __init__(self, done: str, meter: Meter) -> None:
        self.succeeded = self.failed = 0
        self._done, self._meter = done, meter
        self._shown = (0, 0)

    def say(self, pid: str, why_not: str | None) -> None:
        from prunus.runtime.display import short

        self._meter.done += 1
        if why_not is None:
            self.succeeded += 1
            self._meter.say(f"{self._done} {pid}")
        else:
            self.failed += 1
            self._meter.say(f"Error: {short(pid)}: {why_not}", err=True)

    def begin(self) -> None:
        """Another selection has a report of its own."""
        self._shown = (0, 0)

    def show(self, report: BulkReport) -> None:
        """What is new in the report of a selection."""
        done, skipped = self._shown
        self._shown = len(report.done), len(report.skipped)
        for pid in report.done[done:]:
            self.say(pid, None)
        for pid, why in itertools.islice(report.skipped.items(), skipped, None):
            self.say(pid, why)


async def _choose(
    controller: ProcessController, filters: Filters, applies_to: Sequence[Mapping[str, Any]], in_bulk: bool
) -> _Chosen:
    """Those that the filters mean. What a store can look for is left to selections."""
    from prunus.runtime.selection import ProcessSelection

    queries = [
        await filters.query(controller, **defaults)
        for defaults in (applies_to[:1] if filters.has_states else applies_to)
    ]
    if in_bulk and filters.is_exact:
        selections = [ProcessSelection(controller, query) for query in queries]
        return _Chosen(selections, number=sum([await selection.count() for selection in selections]))
    found: dict[str, None] = {}
    for query in queries:
        async for row in rows_of(controller, filters, query):
            found[row.pid] = None
    return _Chosen(pids=list(found))


async def _named(controller: ProcessController, words: Sequence[str]) -> tuple[list[str], int]:
    """The pids that words mean, and how many words mean none: why is said."""
    found: dict[str, None] = {}
    missing = 0
    for word in words:
        try:
            found[(await find_one(controller, word)).pid] = None
        except click.ClickException as error:
            click.echo(f"Error: {error.format_message()}", err=True)
            missing += 1
    return list(found), missing


async def _tell(
    controller: ProcessController,
    pids: Sequence[str],
    one: Callable[[ProcessHandle], Awaitable[None]],
    report: _Report,
) -> None:
    """Tell each of them, `AT_ONCE` at a time."""
    from prunus.errors import PrunusError

    left: Iterator[str] = iter(pids)

    async def tell() -> None:
        for pid in left:
            try:
                await one(controller.handle(pid))
            except PrunusError as error:
                report.say(pid, str(error))
            else:
                report.say(pid, None)

    await asyncio.gather(*(tell() for _ in range(min(AT_ONCE, len(pids)))))


def _agrees(question: str, number: int) -> bool:
    from prunus.runtime.display import count

    return agrees(f"{question.format(number=count(number, 'process'))}?")


def _sum_up(done: str, number: int, failed: int, by_filters: bool) -> None:
    """The last line, if there is more than one to sum up."""
    from prunus.runtime.display import count

    if by_filters or number + failed > 1:
        could_not = f", {failed:,} could not" if failed else ""
        click.echo(f"{done.removesuffix(':')}: {count(number, 'process')}{could_not}", err=True)


def _ask(
    options: Options,
    pid: str,
    arguments: Sequence[str],
    ask: Callable[[ProcessHandle, dict[str, Any]], Awaitable[Any]],
) -> None:
    """Ask a process something, and print the answer."""
    values = read_inputs_of(arguments)

    async def go(controller: ProcessController) -> Any:
        return await ask(await find_one(controller, pid), values)

    import_like_workers(options.local_profile())
    click.echo(yaml_document(with_controller(options, go, "waiting for the answer")))


async def _check_step_of(option: str, handle: ProcessHandle, step: str | None) -> None:
    """Refuse a step that the class of a process does not have, as far as the class can be imported here."""
    import contextlib

    from prunus.errors import ProcessClassNotFoundError
    from prunus.processes import load_class

    if step is not None:
        with contextlib.suppress(ProcessClassNotFoundError):
            check_step(option, load_class((await handle.record()).class_id), step)
