"""Processes as they change: a live picture on a terminal, a line a change anywhere else.

Broadcasts only say that something changed; what is shown is always read from the store. Many changes within
`GATHER_S` are read once, and at least every `REFRESH_S` somebody looks, so that a lost broadcast does no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from prunus.persistence.persister import QUERY_LIMIT, LogLine, Query, Record
from prunus.runtime.controller import ProcessController, ProcessHandle
from prunus.runtime.display import (
    MAX_CHILDREN_SHOWN,
    Family,
    Trouble,
    choose_children,
    class_name,
    how_far,
    is_stuck,
    process_table,
    progress,
    short,
    situation,
    still_to_begin,
    trouble,
)

REFRESH_S = 2.0
GATHER_S = 0.05
MAX_LOAD = 0.25
"""What part of the time is spent with looking: if a look takes long, the next one comes later."""
MAX_CHILDREN_READ = 2000
"""Of more children of one process only the newest, and those that have not ended, are read."""
MAX_TROUBLES = 3
"""Of so many processes that do not go on it is said what to do."""
RECENT_S = 60.0
"""Without a pid: how long a process that has ended is still shown."""


async def watch_family(controller: ProcessController, pid: str, console: Console) -> Record:
    """Show a process and its children until it has ended, or was set aside; returns its last row."""
    family, troubles = await read_family(controller, pid), list[Trouble]()
    utf8 = is_utf8(console)
    with _shown(console, lambda: progress(family, time.time(), troubles, utf8=utf8)) as shown:
        async for _ in _looks(controller):
            family = await read_family(controller, pid)
            stuck = [] if family.record.is_terminal else [row for row in family.members() if is_stuck(row)]
            troubles = await read_troubles(controller, stuck[:MAX_TROUBLES])
            shown(_noteworthy(family), troubles)
            if has_stopped(family.record):
                break
    return family.record


def has_stopped(record: Record) -> bool:
    """Whether it has ended, or was set aside."""
    return record.is_terminal or (record.aside is not None and record.owner is None)


async def watch_all(controller: ProcessController, console: Console) -> None:
    """Show all processes that have not ended, and those that ended a moment ago, until cancelled."""
    records: list[Record] = []

    def picture() -> RenderableType:
        room = max(1, console.height - 3)
        urgent = sorted(records, key=lambda row: (row.is_terminal, row.parent is not None, -row.created_at))[:room]
        table = process_table(sorted(urgent, key=lambda row: row.created_at, reverse=True), time.time())
        hidden = len(records) - room
        return table if hidden <= 0 else Group(table, Text(f"... and {hidden} others", "dim"))

    with _shown(console, picture) as shown:
        async for _ in _looks(controller):
            oldest = time.time() - RECENT_S
            unfinished = await controller.find(Query(unfinished=True, limit=QUERY_LIMIT))
            recent = [row for row in await controller.find(Query(limit=50)) if row.updated_at > oldest]
            by_pid = {row.pid: row for row in (*unfinished, *recent)}
            records = sorted(by_pid.values(), key=lambda row: row.created_at, reverse=True)
            shown([(row, "") for row in records], ())


async def read_family(controller: ProcessController, pid: str) -> Family:
    """A process and those of its descendants that are shown, with the numbers of the others."""

    async def below(record: Record) -> Family:
        rows, is_cut = await read_children(controller, record.pid)
        if not rows:
            return Family(record)
        if not record.is_terminal and record.checkpoint is None:
            record = await controller.handle(record.pid).record()
        chosen = choose_children(rows)
        return Family(
            record,
            children=tuple([await below(row) for row in rows if row.pid in chosen]),
            others=tuple(row for row in rows if row.pid not in chosen),
            to_come=still_to_begin(record),
            is_cut=is_cut,
        )

    return await below(await controller.handle(pid).record())


async def read_children(controller: ProcessController, pid: str) -> tuple[list[Record], bool]:
    """The children of a process, the oldest first, and whether there are more that were not read."""
    rows, is_cut = await _read(controller, Query(parent=pid, limit=QUERY_LIMIT))
    if is_cut:
        live, _ = await _read(controller, Query(parent=pid, unfinished=True, limit=QUERY_LIMIT))
        known = {row.pid for row in rows}
        rows += [row for row in live if row.pid not in known]
    return rows[::-1], is_cut


async def _read(controller: ProcessController, query: Query) -> tuple[list[Record], bool]:
    """The newest rows, `MAX_CHILDREN_READ` at most, and whether there are more."""
    rows: list[Record] = []
    while page := await controller.find(query):
        rows += page
        if len(page) < query.limit:
            break
        if len(rows) >= MAX_CHILDREN_READ:
            return rows, True
        query = msgspec.structs.replace(query, before=page[-1].pid)
    return rows, False


async def read_troubles(controller: ProcessController, rows: Sequence[Record]) -> list[Trouble]:
    """Why each of these does not go on, and what to do."""
    found = []
    for row in rows:
        handle = controller.handle(row.pid)
        found.append(trouble(await handle.record(), await handle.history()))
    return [each for each in found if each is not None]


async def follow_log(
    controller: ProcessController, handle: ProcessHandle, after: int, paused: Callable[[Trouble], None]
) -> AsyncIterator[LogLine]:
    """The lines of a process's log after number `after`, as they come, until it has ended or was set aside.

    `paused` is called with each pause.
    """
    is_told = False
    async for _ in _looks(controller):
        record = await handle.record()
        while lines := await handle.log(after=after):
            for line in lines:
                yield line
            after = lines[-1].seq
        if has_stopped(record):
            return
        if is_stuck(record) and not is_told:
            for found in await read_troubles(controller, [record]):
                paused(found)
        is_told = is_stuck(record)


def is_utf8(console: Console) -> bool:
    return console.encoding.startswith("utf")


def _noteworthy(family: Family) -> Iterator[tuple[Record, str]]:
    """The rows that lines are written about, each with what there is to say beside the row itself.

    Of many children only those that have failed or can't go on; their parent says how far they are, in tenths.
    """
    ended, total = how_far(family)
    if total <= MAX_CHILDREN_SHOWN:
        yield family.record, ""
        for child in family.children:
            yield from _noteworthy(child)
        return
    yield family.record, "" if family.record.is_terminal else f"{10 * ended // total * 10} % of {total} ended"
    for row in family.own_children():
        if is_stuck(row) or row.state in ("excepted", "killed"):
            yield row, ""


async def _looks(controller: ProcessController) -> AsyncIterator[None]:
    """Yields each time that it is time to look: at once, after changes, and now and then."""
    async with controller.events() as events:
        change = asyncio.ensure_future(anext(events))
        try:
            begun_s = time.monotonic()
            yield
            while True:
                pause_s = max(GATHER_S, (time.monotonic() - begun_s) / MAX_LOAD)
                done, _ = await asyncio.wait([change], timeout=REFRESH_S)
                if done:
                    await asyncio.sleep(pause_s)
                    while change.done():
                        change.result()
                        change = asyncio.ensure_future(anext(events))
                        await asyncio.sleep(0)
                begun_s = time.monotonic()
                yield
        finally:
            change.cancel()
            await asyncio.gather(change, return_exceptions=True)


_Show = Callable[[Iterable[tuple[Record, str]], Sequence[Trouble]], None]


@contextlib.contextmanager
def _shown(console: Console, picture: Callable[[], RenderableType]) -> Iterator[_Show]:
    """Gives the function to call after each look: with the rows that may be news (each with what there is to say
    beside the row), and with those that do not go on."""
    if console.is_terminal:
        with Live(get_renderable=picture, console=console, refresh_per_second=8) as live:
            yield lambda rows, troubles: live.refresh()
            live.vertical_overflow = "visible"
        return
    said: dict[str, str] = {}
    advised: dict[str, str] = {}

    def say(rows: Iterable[tuple[Record, str]], troubles: Sequence[Trouble]) -> None:
        for row, extra in sorted(rows, key=lambda each: each[0].updated_at):
            facts = [] if row.is_terminal else [row.play] * (row.play != "playing") + [row.step or ""]
            line = "  ".join(filter(None, [class_name(row.class_id), row.state, *facts, extra, situation(row)]))
            if said.get(row.pid) != line:
                said[row.pid] = line
                console.print(f"{time.strftime('%H:%M:%S')}  {short(row.pid)}  {line}")
        advice = {each.record.pid: each.advice for each in troubles}  # (the lines say why)
        for pid, text in advice.items():
            if advised.get(pid) != text:
                console.print(f"-> {text}")
        advised.clear()
        advised.update(advice)

    yield say
