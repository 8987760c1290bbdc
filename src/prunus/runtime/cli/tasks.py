"""``prunus tasks``: what waits in the queues, who works on what, and what nobody could do."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from prunus.runtime.cli.broker import read_status
from prunus.runtime.cli.connection import with_controller
from prunus.runtime.cli.group import Group, Options
from prunus.runtime.cli.patience import agrees

if TYPE_CHECKING:
    from prunus.messaging.communicator import Communicator
    from prunus.messaging.inventory import TaskInfo, TaskPlace
    from prunus.persistence.persister import Record
    from prunus.runtime.controller import ProcessController

MAX_LINES_SHOWN = 40
"""Of a body, on a terminal."""
PLACES = ("ready", "delayed", "blocked", "held", "dead", "settled")


class _Tasks(Group):
    """Without the name of a command it lists: ``prunus tasks``, ``prunus tasks QUEUE``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Tasks, subcommand_metavar="[COMMAND] [ARGS]...")
def tasks() -> None:
    """What waits in the queues, who works on what, and dead letters."""


@tasks.command("list")
@click.argument("queue", required=False)
@click.option("--queue", "queue_too", metavar="QUEUE", help="The same, for a queue with the name of a command.")
@click.option("-p", "--place", type=click.Choice(PLACES), help="Only tasks that are there.")
@click.option("--dead", is_flag=True, help="Only dead letters: the same as --place dead.")
@click.option("--task-key", metavar="KEY", help="Only tasks with this key, say the pid of a process.")
@click.option("-n", "--limit", type=click.IntRange(1, 100_000), default=100, show_default=True, help="The oldest so many.")  # fmt: skip  # noqa: E501
@click.option("--json", "as_json", is_flag=True, help="For programs: every fact of each.")
@click.pass_obj
def list_(
    options: Options,
    queue: str | None,
    queue_too: str | None,
    place: Any,
    dead: bool,
    task_key: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List the queues, or the tasks of one.

    With QUEUE or a place: its tasks, the oldest first.
    """
    if dead and place not in (None, "dead"):
        raise click.UsageError("--dead is --place dead: say one of them")
    if queue and queue_too:
        raise click.UsageError("QUEUE is said twice")
    queue, place = queue or queue_too, "dead" if dead else place

    async def look(controller: ProcessController) -> None:
        if queue is None and place is None and task_key is None:
            await _show_queues(controller, as_json)
        else:
            await _show_tasks(controller, queue, place, task_key, limit, as_json)

    with_controller(options, look)


@tasks.command()
@click.argument("task", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="For programs: the body in base64.")
@click.option("--raw", is_flag=True, help="The bytes of the body, and nothing else.")
@click.pass_obj
def show(options: Options, task: str, as_json: bool, raw: bool) -> None:
    """Show a task with its body."""

    async def look(controller: ProcessController) -> None:
        found = await controller.communicator.tasks(task=task, limit=1, bodies=True)
        if not found:
            raise click.ClickException(f"there is no task {task!r}; `prunus tasks QUEUE` lists those of a queue")
        await _show_task(controller, found[0], as_json, raw)

    with_controller(options, look)


_ids = click.argument("ids", metavar="[ID]...", nargs=-1)
_queue = click.option("--queue", metavar="QUEUE", help="All of this queue (with --place or --all).")
_place = click.option("-p", "--place", type=click.Choice(PLACES), help="All that are there (with --queue or --all).")
_all = click.option("-a", "--all", "everything", is_flag=True, help="All of a queue or of a place.")
_yes = click.option("-y", "--yes", is_flag=True, help="Do not ask.")


@tasks.command()
@_ids
@_queue
@_place
@_all
@click.pass_obj
def requeue(options: Options, ids: tuple[str, ...], queue: str | None, place: Any, everything: bool) -> None:
    """Offer dead or delayed tasks again, at once, as if they were new."""
    _check_choice(ids, queue, place, everything)
    _edit(
        options,
        "requeued",
        ids,
        queue,
        place,
        lambda communicator, some: communicator.requeue(*some, queue=queue, place=place),
    )


@tasks.command()
@_ids
@_queue
@_place
@_all
@_yes
@click.pass_obj
def delete(options: Options, ids: tuple[str, ...], queue: str | None, place: Any, everything: bool, yes: bool) -> None:
    """Forget tasks that nobody works on, for good."""
    _check_choice(ids, queue, place, everything)
    if not ids:
        _confirm(f"Forget all {place or ''} tasks{f' of {queue}' if queue else ''}".replace("  ", " "), yes)
    _edit(
        options,
        "deleted",
        ids,
        queue,
        place,
        lambda communicator, some: communicator.delete(*some, queue=queue, place=place),
    )


@tasks.command()
@_ids
@_queue
@_place
@_all
@click.pass_obj
def bury(options: Options, ids: tuple[str, ...], queue: str | None, place: Any, everything: bool) -> None:
    """Put tasks that nobody works on to the dead letters."""
    _check_choice(ids, queue, place, everything)
    _edit(
        options,
        "buried",
        ids,
        queue,
        place,
        lambda communicator, some: communicator.bury(*some, queue=queue, place=place),
    )


@tasks.command()
@click.argument("queue")
@_yes
@click.pass_obj
def purge(options: Options, queue: str, yes: bool) -> None:
    """Empty a queue, its dead letters too.

    Tasks that somebody works on stay.
    """
    _confirm(f"Forget every task of {queue}, its dead letters too", yes)
    _edit(options, "deleted", (), queue, None, lambda communicator, _: communicator.purge(queue))


# --- parts ------------------------------------------------------------------------------------------


async def _show_queues(controller: ProcessController, as_json: bool) -> None:
    from rich.text import Text

    from prunus.runtime import display, overview

    status = await read_status(controller)
    if as_json:
        click.echo(display.as_json(status))
        return
    console = display.console()
    display.show(console, overview.queue_table(status) if status.queues else "No queue yet: no task was ever sent.")
    holders = sum(session.held > 0 for session in status.sessions.values())
    if holders:
        display.show(console, Text())
        display.show(console, overview.holder_table(status))
    counts = ", ".join(f"{count} {state}" for state, count in status.processes.items() if count)
    if counts:
        click.echo(f"\nprocesses: {counts}")


async def _show_tasks(
    controller: ProcessController,
    queue: str | None,
    place: TaskPlace | None,
    key: str | None,
    limit: int,
    as_json: bool,
) -> None:
    import time

    from prunus.messaging.inventory import MAX_LISTED
    from prunus.runtime import display, overview

    found: list[TaskInfo] = []
    while len(found) < limit:
        page = await controller.communicator.tasks(
            queue,
            place=place,
            key=key,
            after=found[-1].order if found else 0,
            limit=min(MAX_LISTED, limit - len(found)),
        )
        found += page
        if not page:
            break
    if as_json:
        click.echo(display.as_json(found))
    elif found:
        processes = await _processes(controller, found)
        display.show(display.console(), overview.task_table(found, time.time(), processes))
        if len(found) == limit:
            click.echo(f"The oldest {limit} are shown; --limit shows more.", err=True)
    else:
        click.echo(await _why_none(controller, queue, place, key), err=True)


async def _why_none(controller: ProcessController, queue: str | None, place: TaskPlace | None, key: str | None) -> str:
    """That there are no such tasks, and where to look."""
    if queue is not None and (unknown := await _unknown(controller, queue)) is not None:
        return unknown
    what = "task" + (f" of the queue {queue!r}" if queue else "") + (f" with the key {key!r}" if key else "")
    none = f"There is no {what}" if place is None else f"No {what} is {place}"
    return f"{none}; `prunus tasks` lists the queues, with how many tasks each has."


async def _unknown(controller: ProcessController, queue: str) -> str | None:
    """That there is no such queue, and what may have been meant; None if there is one."""
    from prunus.runtime.display import word

    status = await read_status(controller)
    if queue in status.queues or status.left_out:
        return None
    none = f"There is no queue {queue!r}"
    if await controller.communicator.tasks(task=queue, limit=1):
        return f"{none}: it is the id of a task, which `prunus tasks show {word(queue)}` shows."
    if await controller.communicator.tasks(key=queue, limit=1):
        return f"{none}: it is the key of a task, which `prunus tasks --task-key {word(queue)}` shows."
    return f"{none}; `prunus tasks` lists the queues."


async def _show_task(controller: ProcessController, task: TaskInfo, as_json: bool, raw: bool) -> None:
    import time

    from prunus.messaging import BlobRef
    from prunus.runtime import display, overview

    body = task.body or b""
    if raw:
        if task.blob is not None:
            body = await controller.communicator.blob_get(BlobRef(task.blob, task.size))
        click.echo(body, nl=False)
        return
    if as_json:
        click.echo(display.as_json(task))
        return
    console = display.console()
    process = (await _processes(controller, [task])).get(task.key or "")
    display.show(console, display.facts_table(overview.task_facts(task, time.time(), process)))
    if task.blob is not None:
        display.show(console, "\nbody (a blob; --raw gives its bytes)", "bold")
        click.echo(f"SHA-256 {task.blob}")
        return
    kind, text = overview.body_text(body)
    display.show(console, f"\nbody ({kind})", "bold")
    lines = text.splitlines()
    if console.is_terminal and len(lines) > MAX_LINES_SHOWN:
        hidden = len(lines) - MAX_LINES_SHOWN
        lines = [*lines[:MAX_LINES_SHOWN], f"... {hidden} more lines; in a pipe (`| less`) nothing is left out"]
    for line in lines:
        click.echo(line)


async def _processes(controller: ProcessController, tasks: Sequence[TaskInfo]) -> dict[str, Record]:
    """The processes whose pids are the keys of these tasks. A queue may have tasks of theirs and others: those of
    processes have no body."""
    import asyncio
    import contextlib

    from prunus.errors import PrunusError

    found: dict[str, Record] = {}

    async def read(pid: str) -> None:
        with contextlib.suppress(PrunusError):
            found[pid] = await controller.handle(pid).record()

    pids = dict.fromkeys(task.key for task in tasks if task.key and not task.size and task.subject is None)
    await asyncio.gather(*map(read, pids))
    return found


def _check_choice(ids: Sequence[str], queue: str | None, place: str | None, everything: bool) -> None:
    if ids and (queue or place or everything):
        raise click.UsageError("say which tasks by their ids, or by --queue and --place: not both")
    if ids or (queue and place):
        return
    if not queue and not place:
        raise click.UsageError("say which tasks: ID..., or --queue QUEUE --place PLACE")
    if not everything:
        missing = "--place PLACE" if queue else "--queue QUEUE"
        what = "of the queue, wherever they are" if queue else "that are there, of all queues"
        raise click.UsageError(f"add {missing}, or --all for all tasks {what}")


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("nobody can be asked here: add --yes")
    if not agrees(f"{question}?"):
        raise click.Abort


Change = Callable[["Communicator", tuple[str, ...]], Awaitable[int]]
"""Does something to the tasks with these ids, or to those that options name if there are none; to how many."""


def _edit(
    options: Options, done: str, ids: Sequence[str], queue: str | None, place: TaskPlace | None, change: Change
) -> None:
    """Do it, and say of each of those that were named to which nothing was done why; then the exit code is 1. Without
    any, all of `queue` and `place`: how many are left there is said, and also that there is no such queue."""
    from prunus.runtime.display import count, plain

    async def work(controller: ProcessController) -> bool:
        communicator = controller.communicator
        if not ids:
            number = await change(communicator, ())
            if not number and queue is not None and (unknown := await _unknown(controller, queue)) is not None:
                click.echo(unknown, err=True)
            click.echo(f"{done}: {count(number, 'task')}")
            if (left := await _what_is_left(communicator, done, queue, place or _STAYS[done])) is not None:
                click.echo(left, err=True)
            return True
        changed, is_well = 0, True
        for task in dict.fromkeys(ids):
            if await change(communicator, (task,)):
                changed += 1
                continue
            is_well = False
            found = await communicator.tasks(task=task, limit=1)
            click.echo(f"Error: {plain(task)}: {_why_not(done, found[0] if found else None)}", err=True)
        click.echo(f"{done}: {count(changed, 'task')}")
        return is_well

    if not with_controller(options, work):
        sys.exit(1)


_STAYS: dict[str, TaskPlace] = {"requeued": "dead", "deleted": "held", "buried": "held"}
"""Where a task stays to which that can't be done, though it should be to all of a queue."""


async def _what_is_left(communicator: Communicator, done: str, queue: str | None, place: TaskPlace) -> str | None:
    """How many tasks are there to which it could not be `done`, and why; None: none is."""
    from prunus.messaging.inventory import MAX_LISTED
    from prunus.runtime.display import word

    match done, place:
        case _, "held":
            why = "somebody works on each, and will settle it"
        case _, "settled":
            why = "they are done, and kept until their results are fetched"
        case "requeued", "dead":
            why = "other tasks with their keys are pending"
        case "requeued", "ready":
            why = "they are ready already, for the next who has room"
        case "requeued", "blocked":
            why = "they wait already, behind other tasks with their keys"
        case "buried", "dead":
            why = "they are dead letters already"
        case _:  # it can be done to every task there
            return None
    found = await communicator.tasks(queue, place=place, limit=MAX_LISTED)
    more = " or more" if len(found) == MAX_LISTED else ""
    if (done, place) == ("requeued", "dead"):
        found = [task for task in found if task.key is not None]  # any other died only now
    if not found:
        return None
    if len(found) == 1:
        return f"1 was left: {_why_not(done, found[0])}"
    where = f"--place {place}" if queue is None else f"--queue {word(queue)} --place {place}"
    return f"{len(found):,}{more} were left: {why}; `prunus tasks list {where}` lists them"


def _why_not(done: str, task: TaskInfo | None) -> str:
    """Why a task was not `done` ("requeued", "deleted" or "buried"), from where it is now."""
    from prunus.runtime.display import peer, plain, word

    if task is None:
        return "there is no such task; `prunus tasks QUEUE` lists those of a queue"
    key = plain(task.key or "")
    match task.place:
        case "held":
            return f"{plain(peer(task.holder))} works on it, and will settle it"
        case "settled":
            return "it is done, and kept until its result is fetched"
        case "dead" if done == "buried":
            return "it is a dead letter already"
        case "dead" if done == "requeued" and task.key is not None:
            return f"another task with its key {key} is pending; `prunus tasks --task-key {word(task.key)}` shows it"
        case "ready" if done == "requeued":
            return "it is ready already, for the next who has room"
        case "blocked" if done == "requeued":
            return f"it waits already, behind another task with its key {key}"
    return f"it is {task.place} now; try again"
