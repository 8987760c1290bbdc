"""Processes as they change: a live picture on a terminal, a line a change anywhere else.

Broadcasts only say that something changed; what is shown is always read from the store. Many changes within
`GATHER_S` are read once, and at least every `REFRESH_S` somebody looks, so that a lost broadcast does no harm. A
picture shows how things are; lines tell also of the states that passed between two looks, from the histories.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.text import Text

from prunus.persistence import requests
from prunus.persistence.persister import QUERY_LIMIT, TERMINAL_STATES, Event, LogLine, Query, Record
from prunus.processes import PlayState, ProcessState
from prunus.runtime.controller import ProcessController
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
    span,
    still_to_begin,
    trouble,
)
from prunus.runtime.selection import ask_all, pages_of
from prunus.runtime.terminals import can_redraw

REFRESH_S = 2.0
GATHER_S = 0.05
MAX_LOAD = 0.25
"""What part of the time is spent with looking: if a look takes long, the next one comes later."""
MAX_PAUSE_S = 10.0
"""... but not later than this: a look that took long may have waited for the broker."""
MAX_CHILDREN_READ = 2000
"""Of more children of one process only the newest, and those that have not ended, are read."""
MAX_TROUBLES = 3
"""Of so many processes that do not go on it is said what to do."""
SILENCE_S = 3.0
"""A look that takes longer is one that the broker does not answer: it is told."""
ROOM_FOR_CTRL_C = 3
"""Columns that stay free at the right of a live picture: the ``^C`` of the terminal must not begin a line below it."""
RECENT_S = 60.0
"""Without a pid: how long a process that has ended is still shown."""

_STATES = frozenset(state.value for state in ProcessState)
_CHANGE = re.compile(rf"({'|'.join([*_STATES, *PlayState])})\.(\w+)")
"""The subject of an event that changes the state or the play state."""


async def watch_family(
    controller: ProcessController, pid: str, console: Console, *, since_launch: bool = False
) -> Record:
    """Show a process and its children until it has ended, or was set aside; returns its last row. `since_launch`:
    lines tell also what has happened already."""
    family, troubles = await read_family(controller, pid), list[Trouble]()
    utf8 = is_utf8(console)
    with _shown(controller, console, lambda: progress(family, time.time(), troubles, utf8=utf8), since_launch) as shown:
        async for _ in _looks(controller, shown.tell):
            family = await read_family(controller, pid)
            stuck = [] if family.record.is_terminal else [row for row in family.members() if is_stuck(row)]
            troubles = await read_troubles(controller, stuck[:MAX_TROUBLES])
            await shown.show(list(_noteworthy(family)), troubles)
            if has_stopped(family.record):
                break
    return family.record


def has_stopped(record: Record) -> bool:
    """Whether it has ended, or was set aside."""
    return record.is_terminal or (record.aside is not None and record.owner is None)


async def watch_all(controller: ProcessController, console: Console) -> None:
    """Show all processes that have not ended, and those that ended a moment ago, until cancelled."""
    records: list[Record] = []
    is_cut = False

    def picture() -> RenderableType:
        room = max(1, console.height - 3)
        urgent = sorted(records, key=lambda row: (row.is_terminal, row.parent is not None, -row.created_at))[:room]
        newest_first = sorted(urgent, key=lambda row: row.created_at, reverse=True)
        table = process_table(newest_first, time.time(), utf8=is_utf8(console))
        hidden = len(records) - room
        more = f"... and {'more than ' if is_cut else ''}{hidden:,} more"
        return table if hidden <= 0 else Group(table, Text(more, "dim"))

    with _shown(controller, console, picture) as shown:
        async for _ in _looks(controller, shown.tell):
            oldest = time.time() - RECENT_S
            unfinished = await controller.find(Query(unfinished=True, limit=QUERY_LIMIT))
            is_cut = len(unfinished) == QUERY_LIMIT
            recent = [row for row in await controller.find(Query(limit=50)) if row.updated_at > oldest]
            by_pid = {row.pid: row for row in (*unfinished, *recent)}
            records = sorted(by_pid.values(), key=lambda row: row.created_at, reverse=True)
            await shown.show([_News(row) for row in records], ())


async def read_family(controller: ProcessController, pid: str, *, complete: bool = False) -> Family:
    """A process and those of its descendants that are shown, with the numbers of the others; if `complete`, all that
    are read are shown."""

    async def below(record: Record) -> Family:
        rows, is_cut = await read_children(controller, record.pid)
        if not rows:
            return Family(record)
        if not record.is_terminal and record.checkpoint is None:
            record = await controller.handle(record.pid).record()
        chosen = {row.pid for row in rows} if complete else choose_children(rows)
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
    rows = [row async for page in pages_of(controller, query, MAX_CHILDREN_READ) for row in page]
    return rows, len(rows) >= MAX_CHILDREN_READ


async def read_troubles(controller: ProcessController, rows: Sequence[Record]) -> list[Trouble]:
    """Why each of these does not go on, and what to do."""
    found = []
    for row in rows:
        handle = controller.handle(row.pid)
        found.append(trouble(await handle.record(), await handle.history()))
    return [each for each in found if each is not None]


class LogReader:
    """Reads the log of a process, or of it and all below it, from where it was left."""

    def __init__(self, controller: ProcessController, pid: str, with_children: bool = False) -> None:
        self.pid = pid
        self.record: Record | None = None
        """The row of `pid`, read before the lines that were read last."""
        self._controller = controller
        self._with_children = with_children
        self._after: dict[str, int] = {}
        self._changed_at: dict[str, float] = {}
        """When each row had changed that was looked at. One that has not changed since has said nothing since ..."""
        self._parents = set[str]()
        """... and has submitted nothing, but what it has submitted before may have changed."""

    async def last(self, number: int) -> list[tuple[Record, LogLine]]:
        """The newest lines, the oldest first."""
        return (await self._read(number))[-number:]

    async def news(self) -> list[tuple[Record, LogLine]]:
        """The lines that came since, in the order of their times."""
        return await self._read(None)

    async def _read(self, last: int | None) -> list[tuple[Record, LogLine]]:
        self.record = await self._controller.handle(self.pid).record()
        found: list[tuple[Record, LogLine]] = []
        to_do = [self.record]
        while to_do:
            row = to_do.pop()
            has_changed = self._changed_at.get(row.pid) != row.updated_at
            self._changed_at[row.pid] = row.updated_at
            if has_changed or row.pid == self.pid:
                found += [(row, line) for line in await self._lines(row.pid, last)]
            if self._with_children and (has_changed or row.pid in self._parents):
                children, _ = await read_children(self._controller, row.pid)
                self._parents.update([row.pid] if children else [])
                to_do += children
        return sorted(found, key=lambda each: each[1].at)

    async def _lines(self, pid: str, last: int | None) -> list[LogLine]:
        handle, after, found = self._controller.handle(pid), self._after.get(pid, 0), list[LogLine]()
        while lines := await handle.log(after=after, last=last):
            found += lines
            after = lines[-1].seq
            if last is not None:
                break
        self._after[pid] = after
        return found


async def follow_log(
    controller: ProcessController,
    reader: LogReader,
    paused: Callable[[Trouble], None],
    tell: Callable[[str | None], None],
) -> AsyncIterator[tuple[Record, LogLine]]:
    """The lines that `reader` has not read yet, as they come, until its process has ended or was set aside.

    `paused` is called with each pause, and `tell` with a sentence while the broker does not answer, then with None.
    """
    is_told = False
    async for _ in _looks(controller, tell):
        for row, line in await reader.news():
            yield row, line
        record = reader.record
        assert record is not None, "it was read just now"
        if has_stopped(record):
            return
        if is_stuck(record) and not is_told:
            for found in await read_troubles(controller, [record]):
                paused(found)
        is_told = is_stuck(record)


def is_utf8(console: Console) -> bool:
    return console.encoding.startswith("utf")


class _News(NamedTuple):
    """A row that may be news, for who reads lines."""

    record: Record
    extra: str = ""
    """What there is to say beside the row."""
    is_followed: bool = True
    """Every change of it is told; else only how it is now."""


def _noteworthy(family: Family) -> Iterator[_News]:
    """The rows that lines are written about.

    Of many children only those that have failed or can't go on; their parent says how far they are, in tenths.
    """
    ended, total = how_far(family)
    if total <= MAX_CHILDREN_SHOWN:
        yield _News(family.record)
        for child in family.children:
            yield from _noteworthy(child)
        return
    yield _News(family.record, "" if family.record.is_terminal else f"{10 * ended // total * 10} % of {total} ended")
    for row in family.own_children():
        if is_stuck(row) or row.state in ("excepted", "killed"):
            yield _News(row, is_followed=False)


class Moment(NamedTuple):
    """How a process was after one of its changes."""

    at: float
    seq: int
    """The number of the event; 0: how it was launched."""
    state: str
    play: str
    step: str | None
    """The one that was next, or ran."""

    def is_of(self, record: Record) -> bool:
        return (self.state, self.play) == (record.state, record.play) and (
            record.is_terminal or self.step == record.step
        )


def moments_of(record: Record, events: Sequence[Event]) -> list[Moment]:
    """How the process of `record` was before the first of these events, and after each that changed its state or play
    state."""
    changes = [(event, found[1], found[2]) for event in events if (found := _CHANGE.fullmatch(event.subject))]
    steps = [record.step]
    for event, source, _ in reversed(changes):
        steps.append((event.step if source in _STATES else None) or steps[-1])
    state = next((source for _, source, _ in changes if source in _STATES), record.state)
    play = next((source for _, source, _ in changes if source not in _STATES), record.play)
    moments = [Moment(record.created_at, 0, state, play, steps.pop())]
    for event, source, target in changes:
        state, play = (target, play) if source in _STATES else (state, target)
        moments.append(Moment(event.at, event.seq, state, play, steps.pop()))
    return moments


async def _looks(controller: ProcessController, tell: Callable[[str | None], None]) -> AsyncIterator[None]:
    """Yields each time that it is time to look: at once, after changes, and now and then.

    `tell` is called, about once a second, with a sentence while a look gets no answer, and with None when it has.
    """
    async with controller.events() as events:
        change = asyncio.ensure_future(anext(events))
        try:
            begun_s = time.monotonic()
            with _told_of_silence(tell):
                yield
            while True:
                pause_s = max(GATHER_S, (time.monotonic() - begun_s) / MAX_LOAD)
                done, _ = await asyncio.wait([change], timeout=REFRESH_S)
                if done:
                    await asyncio.sleep(min(pause_s, MAX_PAUSE_S))
                    while change.done():
                        change.result()
                        change = asyncio.ensure_future(anext(events))
                        await asyncio.sleep(0)
                begun_s = time.monotonic()
                with _told_of_silence(tell):
                    yield
        finally:
            change.cancel()
            await asyncio.gather(change, return_exceptions=True)


@contextlib.contextmanager
def _told_of_silence(tell: Callable[[str | None], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    timer: asyncio.TimerHandle

    def say() -> None:
        nonlocal timer
        tell(f"The broker has not answered for {span(loop.time() - begun_s)}; waiting for it ...")
        timer = loop.call_later(1.0, say)

    timer = loop.call_later(SILENCE_S, say)
    try:
        yield
    finally:
        timer.cancel()
        tell(None)


class _Shown:
    """What is shown, and where: `show` is called after each look, `tell` with what keeps it from looking.

    Here it is lines, one for each change: those between two looks are read from the histories. What has happened
    before the first look is told only if `since_launch`.
    """

    def __init__(self, controller: ProcessController, console: Console, since_launch: bool) -> None:
        self.silence: str | None = None
        self._controller, self._console = controller, console
        self._tells_past = since_launch
        self._said: dict[str, str] = {}
        self._told: dict[str, tuple[float, int]] = {}
        """When the row that was told last had changed, and the number of the last event that was told."""
        self._advised: dict[str, str] = {}

    async def show(self, news: Sequence[_News], troubles: Sequence[Trouble]) -> None:
        """The rows that may be news, and those that do not go on."""
        histories = await self._histories(news)
        lines: list[tuple[float, str]] = []
        for each in sorted(news, key=lambda each: each.record.updated_at):
            lines += self._lines(each, histories.get(each.record.pid, ()))
        for at, line in sorted(lines, key=itemgetter(0)):
            self._print(f"{time.strftime('%H:%M:%S', time.localtime(at))}  {line}")
        self._tells_past = True
        advice = {each.record.pid: each.advice for each in troubles}  # (the lines say why)
        for pid, text in advice.items():
            if self._advised.get(pid) != text:
                self._print(f"-> {text}")
        self._advised = advice

    def tell(self, silence: str | None) -> None:
        """Say, once, that the broker does not answer; None: it does."""
        if silence is not None and self.silence is None:
            self._print(f"{time.strftime('%H:%M:%S')}  {silence}")
        self.silence = silence

    async def _histories(self, news: Sequence[_News]) -> dict[str, Sequence[Event]]:
        """What has happened to those that have changed since they were told of."""
        asked = [
            requests.HistoryRequest(row.pid, self._told.get(row.pid, (0.0, 0))[1])
            for row, _, is_followed in news
            if is_followed and self._told.get(row.pid, (None, 0))[0] != row.updated_at
        ]
        answers = await ask_all(self._controller.communicator, asked)
        return {
            request.pid: answer
            for request, answer in zip(asked, answers, strict=True)
            if not isinstance(answer, Exception)  # it is forgotten meanwhile
        }

    def _lines(self, news: _News, events: Sequence[Event]) -> Iterator[tuple[float, str]]:
        """What is new of a row: when, and the line. Events that are newer than the row are left to the next look."""
        row, last = news.record, self._told.get(news.record.pid, (0.0, 0))[1]
        moments = moments_of(row, events)
        present = next((number for number in reversed(range(len(moments))) if moments[number].is_of(row)), -1)
        now = moments[present]
        is_first = row.pid not in self._said
        if not is_first or self._tells_past:
            for moment in moments[:present] if is_first else moments[1:present]:
                yield moment.at, self._line(row, moment)
        line = self._line(row, now, news.extra, situation(row))
        if self._said.get(row.pid) != line or now.seq > last:
            self._said[row.pid] = line
            yield now.at if now.seq > last else row.updated_at if is_first else time.time(), line
        self._told[row.pid] = row.updated_at, max(now.seq, last)

    def _line(self, row: Record, moment: Moment, *more: str) -> str:
        name, play = class_name(row.class_id), "" if moment.play == "playing" else moment.play
        facts = () if moment.state in TERMINAL_STATES else (play, moment.step)
        return f"{short(row.pid)}  " + "  ".join(filter(None, [name, moment.state, *facts, *more]))

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


class _ShownLive(_Shown):
    """The same as a picture that changes."""

    def __init__(self, controller: ProcessController, console: Console, picture: Callable[[], RenderableType]) -> None:
        super().__init__(controller, console, since_launch=False)
        self._picture = picture
        self.live = Live(get_renderable=self._complete, console=console, refresh_per_second=8)

    async def show(self, news: Sequence[_News], troubles: Sequence[Trouble]) -> None:
        self.live.refresh()

    def tell(self, silence: str | None) -> None:
        if silence != self.silence:
            self.silence = silence
            self.live.refresh()

    def _complete(self) -> RenderableType:
        told = [] if self.silence is None else [Text(self.silence, "yellow")]
        return Constrain(Group(self._picture(), *told), self._console.width - ROOM_FOR_CTRL_C)


@contextlib.contextmanager
def _shown(
    controller: ProcessController, console: Console, picture: Callable[[], RenderableType], since_launch: bool = False
) -> Iterator[_Shown]:
    if not can_redraw(console.file):
        yield _Shown(controller, console, since_launch)
        return

    shown = _ShownLive(controller, console, picture)
    with shown.live:
        yield shown
        shown.live.vertical_overflow = "visible"
