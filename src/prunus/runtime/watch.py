"""Processes as they change: a live picture on a terminal, a line a change anywhere else.

Broadcasts only say that something changed; what is shown is always read from the store. Many changes within
`GATHER_S` are read once, and at least every `REFRESH_S` somebody looks, so that a lost broadcast does no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from rich.console import Console, RenderableType
from rich.live import Live

from prunus.persistence.persister import QUERY_LIMIT, Query, Record
from prunus.runtime.controller import ProcessController
from prunus.runtime.display import Family, class_name, process_table, progress, short, situation

REFRESH_S = 2.0
GATHER_S = 0.05
MAX_MEMBERS = 2000
"""Of a larger family the rest is not read."""
RECENT_S = 60.0
"""Without a pid: how long a process that has ended is still shown."""


async def watch_family(controller: ProcessController, pid: str, console: Console) -> Record:
    """Show a process and its children until it has ended; returns its last row."""
    family = await read_family(controller, pid)
    utf8 = is_utf8(console)
    with _shown(console, lambda: progress(family, time.time(), utf8=utf8)) as shown:
        async for _ in _looks(controller):
            family = await read_family(controller, pid)
            shown(family.members())
            if family.record.is_terminal:
                break
    return family.record


async def watch_all(controller: ProcessController, console: Console) -> None:
    """Show all processes that have not ended, and those that ended a moment ago, until cancelled."""
    records: list[Record] = []
    with _shown(console, lambda: process_table(records, time.time())) as shown:
        async for _ in _looks(controller):
            oldest = time.time() - RECENT_S
            unfinished = await controller.find(Query(unfinished=True, limit=QUERY_LIMIT))
            recent = [row for row in await controller.find(Query(limit=50)) if row.updated_at > oldest]
            by_pid = {row.pid: row for row in (*unfinished, *recent)}
            records = sorted(by_pid.values(), key=lambda row: row.created_at, reverse=True)
            shown(records)


async def read_family(controller: ProcessController, pid: str) -> Family:
    """A process and all below it."""
    left = MAX_MEMBERS

    async def below(record: Record) -> Family:
        nonlocal left
        children: list[Family] = []
        if left > 0:
            rows = await controller.find(Query(parent=record.pid, limit=min(left, QUERY_LIMIT)))
            left -= len(rows)
            children = [await below(row) for row in reversed(rows)]
        return Family(record, tuple(children))

    return await below(await controller.handle(pid).record())


def is_utf8(console: Console) -> bool:
    return console.encoding.startswith("utf")


async def _looks(controller: ProcessController) -> AsyncIterator[None]:
    """Yields each time that it is time to look: at once, after changes, and now and then."""
    async with controller.events() as events:
        change = asyncio.ensure_future(anext(events))
        try:
            yield
            while True:
                done, _ = await asyncio.wait([change], timeout=REFRESH_S)
                if done:
                    await asyncio.sleep(GATHER_S)
                    while change.done():
                        change.result()
                        change = asyncio.ensure_future(anext(events))
                        await asyncio.sleep(0)
                yield
        finally:
            change.cancel()
            await asyncio.gather(change, return_exceptions=True)


@contextlib.contextmanager
def _shown(console: Console, picture: Callable[[], RenderableType]) -> Iterator[Callable[[Iterable[Record]], None]]:
    """Gives the function to call with the rows after each look."""
    if console.is_terminal:
        with Live(get_renderable=picture, console=console, refresh_per_second=8) as live:
            yield lambda rows: live.refresh()
            live.vertical_overflow = "visible"
        return
    said: dict[str, str] = {}

    def say(rows: Iterable[Record]) -> None:
        for row in sorted(rows, key=lambda row: row.updated_at):
            extra = [] if row.is_terminal else [row.play] * (row.play != "playing") + [row.step or ""]
            line = "  ".join(filter(None, [class_name(row.class_id), row.state, *extra, situation(row)]))
            if said.get(row.pid) != line:
                said[row.pid] = line
                console.print(f"{time.strftime('%H:%M:%S')}  {short(row.pid)}  {line}")

    yield say
