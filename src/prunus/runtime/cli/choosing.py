"""Which processes a command is about: short pids, pids from the standard input, and filters.

A PID may be shortened to its beginning or its end, as long as that means one process. The items of a fan-out, whose
pids begin with that of their parent, do not make the parent ambiguous. ``-`` stands for the pids on the standard input.

The filters are the same for every command that takes several processes (`takes_processes`), and all of them must hold.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from prunus.persistence.persister import Query, Record
    from prunus.runtime.controller import ProcessController, ProcessHandle

STATES = ("created", "running", "waiting", "finished", "excepted", "killed", "paused", "aside")
"""What ``--state`` takes. The last two are no states, but what people ask for in the same breath."""
MAX_CANDIDATES_SHOWN = 10
NEAR = 200
"""Among so many of the newest processes a pid is looked for that was perhaps meant."""


@dataclass(frozen=True)
class Filters:
    """What was asked for; empty if nothing was."""

    everything: bool = False
    states: tuple[str, ...] = ()
    class_name: str | None = None
    tags: tuple[str, ...] = ()
    parent: str | None = None
    queue: str | None = None
    process_key: str | None = None
    older_than: float | None = None
    """Seconds."""
    roots: bool = False
    paused: bool = False
    aside: bool = False

    def __bool__(self) -> bool:
        return self != Filters()

    @property
    def has_states(self) -> bool:
        """Whether it says in which states processes are."""
        return bool(self.states or self.paused or self.aside)

    async def query(self, controller: ProcessController, **defaults: Any) -> Query:
        """These conditions. `defaults` hold unless states were asked for."""
        from prunus.persistence.persister import QUERY_LIMIT, Query

        named = [state for state in self.states if state not in ("paused", "aside")]
        chosen: dict[str, Any] = {} if self.has_states else defaults
        if self.has_states:
            is_paused, is_aside = self.paused or "paused" in self.states, self.aside or "aside" in self.states
            chosen = {"states": tuple(named), "play": "paused" if is_paused else None}
            chosen |= {"aside": True if is_aside else None, "unfinished": (is_paused or is_aside) and not named}
        return Query(
            **chosen,
            class_id=self.class_name if self.class_name and ":" in self.class_name else None,
            tag=self.tags[0] if self.tags else None,
            parent=None if self.parent is None else (await find_one(controller, self.parent)).pid,
            queue=self.queue,
            key=self.process_key,
            created_before=None if self.older_than is None else time.time() - self.older_than,
            roots=self.roots,
            limit=QUERY_LIMIT,
        )

    def admits(self, record: Record) -> bool:
        """Whether the conditions hold of a row that a store can't look for."""
        from prunus.runtime.display import class_name

        if self.class_name and self.class_name not in (record.class_id, class_name(record.class_id)):
            return False
        return set(self.tags) <= set(record.tags)

    @property
    def is_exact(self) -> bool:
        """Whether a store can look for all of it."""
        return len(self.tags) < 2 and (self.class_name is None or ":" in self.class_name)


def takes_processes(
    all_help: str = "All that it applies to.", *, pids: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command takes PID... (as `pids`) and the filters (as `filters`, a `Filters`)."""
    one_class = "Only those of this class: its name, or pkg.mod:Class."
    launched = "Only those launched longer ago, say 30min, 12h or 2d."
    options = [
        click.option("-a", "--all", "everything", is_flag=True, help=all_help),
        click.option(
            "-s", "--state", "states", multiple=True, type=click.Choice(STATES), help="Only those; may be given often."
        ),
        click.option("--class", "class_name", metavar="CLASS", help=one_class),
        click.option(
            "--tag", "tags", metavar="TAG", multiple=True, help="Only those with this tag; of several, with each."
        ),
        click.option("--parent", metavar="PID", help="Only those that this process submitted."),
        click.option("--queue", metavar="QUEUE", help="Only those of this queue."),
        click.option("--process-key", metavar="KEY", help="Only the one that was launched with this key."),
        click.option(
            "--older-than",
            metavar="AGE",
            callback=_read_age,
            help=launched,
        ),
        click.option("--roots", is_flag=True, help="Only those that no other process submitted."),
        click.option("--paused", is_flag=True, help="Only paused ones: the same as --state paused."),
        click.option("--aside", is_flag=True, help="Only those that are set aside: the same as --state aside."),
    ]
    names = [field.name for field in fields(Filters)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(*args: Any, **kwargs: Any) -> None:
            filters = Filters(**{name: kwargs.pop(name) for name in names})
            command(*args, filters=filters, **kwargs)

        wrapped: Callable[..., None] = called
        for option in reversed(options):
            wrapped = option(wrapped)
        return click.argument("pids", metavar="[PID]...", nargs=-1)(wrapped) if pids else wrapped

    return decorate


def _read_age(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    from prunus.runtime.profile import seconds_of

    try:
        return None if value is None else seconds_of(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def read_pids(words: Sequence[str]) -> list[str]:
    """The words, with those of the standard input in the place of ``-``."""
    found: list[str] = []
    for word in words:
        found += sys.stdin.read().split() if word == "-" else [word]
    return list(dict.fromkeys(found))


async def rows_of(
    controller: ProcessController, filters: Filters, query: Query, limit: int | None = None
) -> AsyncIterator[Record]:
    """The rows that match, the newest first; of more than `limit` the newest."""
    from prunus.runtime.selection import pages_of

    found = 0
    async for page in pages_of(controller, query, limit if filters.is_exact else None):
        for row in page:
            if filters.admits(row):
                found += 1
                yield row
                if found == limit:
                    return


async def find_one(controller: ProcessController, text: str) -> ProcessHandle:
    """The process whose pid is `text`, or the only one whose pid ends or begins with it; or, among the newest, whose
    pid as `list` shows it begins with it.

    Raises `CheckpointNotFoundError` or, if it means several, a `click.ClickException` that lists them.
    """
    from prunus.errors import CheckpointNotFoundError
    from prunus.persistence.persister import QUERY_LIMIT, Query
    from prunus.runtime.display import class_name, short

    found: list[Record] = []
    if text:
        try:
            await controller.handle(text).record()
            return controller.handle(text)
        except CheckpointNotFoundError:
            found = list(await controller.find(Query(prefix=text, limit=QUERY_LIMIT)))
            if not found:
                newest = await controller.find(Query(limit=QUERY_LIMIT))
                found = [row for row in newest if short(row.pid).startswith(text)]
    if not found:
        raise click.ClickException(await _unknown(controller, text))
    family = [row for row in found if all(each.pid.startswith(f"{row.pid}.") for each in found if each is not row)]
    if len(found) > 1 and not family:
        number = f"{len(found)}" if len(found) < QUERY_LIMIT else f"{len(found)} or more"
        shown = "".join(
            f"\n  {row.pid}  {class_name(row.class_id)}, {row.state}" for row in found[:MAX_CANDIDATES_SHOWN]
        )
        hidden = len(found) - MAX_CANDIDATES_SHOWN
        more = f"\n  and {hidden} more" if hidden > 0 else ""
        raise click.ClickException(f"{text!r} is the end or the beginning of {number} pids:{shown}{more}")
    return controller.handle((family or found)[0].pid)


async def _unknown(controller: ProcessController, text: str) -> str:
    """That there is no such process, and which one was perhaps meant."""
    import difflib

    from prunus.persistence.persister import Query
    from prunus.runtime.display import class_name, short

    rows = {short(row.pid): row for row in await controller.find(Query(limit=NEAR))}
    near = difflib.get_close_matches(text, rows, 1, cutoff=0.7)
    if text and near:
        row = rows[near[0]]
        return f"there is no process {text}; did you mean {near[0]} ({class_name(row.class_id)}, {row.state})?"
    return f"there is no process {text or repr(text)}; `prunus list --all` shows those that exist"
