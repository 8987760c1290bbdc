"""Many processes at once: `ProcessSelection`, what ``controller.processes(state="waiting")`` gives.

::

    waiting = controller.processes(state="waiting", tag="demo", older_than=3600)
    print(await waiting.count())
    report = await waiting.kill("nobody needs it any more")
    print(report)                       # 17 done, 2 skipped

Rules
- A selection is a question, not a list: each use of it asks anew. Nothing is held in memory but a few pages of rows.
- Pages are stable while things change: each process that matches when its page is read comes once, the newest first;
  those that are created meanwhile do not come.
- An operation acts on those that it can be meant for: `kill`, `pause` and `play` on those that have not ended, `delete`
  on those that have, `retry` on the excepted ones and those that are set aside. What it could not do it says in its
  `BulkReport`, with the reason; it raises only for what concerns all of them (the broker is away, its disk is full).
- Requests go in batches, one commit each, and no more than `IN_FLIGHT` processes are on their way at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import msgspec

from prunus.errors import (
    CheckpointNotFoundError,
    CommunicatorClosedError,
    ConnectionLostError,
    IndeterminateError,
    KeyRefusedError,
    NotDeliveredError,
    NotPermittedError,
    PrunusError,
    ShuttingDownError,
    StoreFullError,
)
from prunus.messaging.communicator import Broadcast, Communicator
from prunus.persistence import requests
from prunus.persistence.checkpoint import encode_value
from prunus.persistence.persister import QUERY_LIMIT, TERMINAL_STATES, Posted, Query, Record
from prunus.processes import Process, ProcessState, class_id
from prunus.processes.control import DEFAULT_GRACE_S, Kill, Message, Pause, Play
from prunus.runtime.letters import encode_letter

if TYPE_CHECKING:
    from prunus.runtime.controller import ProcessController, ProcessHandle

BATCH = 200
"""The most requests in one call to the broker, so in one commit of ours."""
BATCH_BYTES = 4 * 1024 * 1024
"""The most bytes of such a call, unless one request alone is larger."""
CALLS_AT_ONCE = 4
"""How many calls are on their way at a time."""
IN_FLIGHT = 1000
"""How many processes of a selection have been told something and have not dealt with it."""
RECHECK_S = 5.0
"""Broadcasts only say "look again" and may be missed: whoever waits looks at least this often."""

_OF_NO_REQUEST = (
    CommunicatorClosedError,
    ConnectionLostError,
    IndeterminateError,
    KeyRefusedError,
    NotDeliveredError,
    NotPermittedError,
    ShuttingDownError,
    StoreFullError,
)
"""Errors that would be those of every other request too."""

_LIVING = tuple(state.value for state in ProcessState if state.value not in TERMINAL_STATES)

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Filters(TypedDict, total=False):
    """Which processes: all that is said must hold. None is the same as nothing said."""

    state: str | Iterable[str] | None
    """One of ``created``, ``running``, ``waiting``, ``finished``, ``excepted``, ``killed``, or several."""
    unfinished: bool
    """Only those that have not ended."""
    cls: type[Process[Any, Any]] | str | None
    """Of this very class: itself, or ``module:QualName``."""
    tag: str | None
    parent: str | None
    """The children of this pid."""
    root: str | None
    """This pid, its children, their children and so on."""
    roots: bool
    """Only those without a parent."""
    queue: str | None
    key: str | None
    prefix: str | None
    """Pids that begin or end with this text."""
    older_than: float | timedelta | None
    """Launched so many seconds ago or earlier."""
    unchanged_for: float | timedelta | None
    """Nothing was saved or said of it for so many seconds; so of an ended one: it ended so long ago."""
    paused: bool | None
    """True: it is paused; False: it is playing. (One that is pausing is neither.)"""
    aside: bool | None
    """Whether it was set aside, because it could not be continued."""


@dataclass
class BulkReport:
    """What became of an operation on many processes."""

    done: list[str] = field(default_factory=list)
    """The pids of those that it was done to."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why it was not, by the pids of the others."""

    def __str__(self) -> str:
        return f"{len(self.done)} done, {len(self.skipped)} skipped"


Progress = Callable[[BulkReport], None]
"""Is told of the report each time it has grown; to show it, and no more."""
Verdict = Callable[[Record, bool], bool | str]
"""From the row of a process, and whether it has dealt with its letter: True, it is done; False, not yet; or why not."""


class ProcessSelection:
    """See the module. Made by `ProcessController.processes`."""

    def __init__(self, controller: ProcessController, query: Query, root: str | None = None) -> None:
        self._controller = controller
        self._communicator = controller.communicator
        self._query = query
        self._root = root

    # --- looking ------------------------------------------------------------------------------------

    async def __aiter__(self) -> AsyncIterator[ProcessHandle]:
        """Handles of the processes, the newest first."""
        async for page in self._pages(self._query):
            for row in page:
                yield self._controller.handle(row.pid)

    async def handles(self) -> list[ProcessHandle]:
        """All of them in one list."""
        return [handle async for handle in self]

    async def records(self, limit: int | None = None) -> list[Record]:
        """What is known of each now (without its checkpoint); of the `limit` newest, if that is given."""
        rows: list[Record] = []
        async for page in self._pages(self._query, limit):
            rows += page
        return rows[:limit]

    async def count(self) -> int:
        """How many they are. Costs a query for each thousand."""
        return sum([len(page) async for page in self._pages(self._query)])

    # --- acting -------------------------------------------------------------------------------------

    async def pause(
        self,
        reason: str | None = None,
        *,
        quiesced: bool = True,
        cascade: bool = False,
        progress: Progress | None = None,
    ) -> BulkReport:
        """Take no further step. With `quiesced` it returns when no step of them runs any more, else when they know."""

        def verdict(row: Record, dealt_with: bool) -> bool | str:
            if row.is_terminal:
                return f"it ended before ({row.state})"
            return dealt_with and not (quiesced and row.play == "pausing")

        return await self._tell(Pause(reason, cascade=cascade), verdict, progress)

    async def play(self, *, cascade: bool = False, progress: Progress | None = None) -> BulkReport:
        """Go on after a pause."""

        def verdict(row: Record, dealt_with: bool) -> bool | str:
            return dealt_with or row.is_terminal

        return await self._tell(Play(cascade=cascade), verdict, progress)

    async def kill(
        self,
        message: str | None = None,
        *,
        force: bool = False,
        grace_s: float = DEFAULT_GRACE_S,
        progress: Progress | None = None,
    ) -> BulkReport:
        """End them, and their children; returns when they are KILLED. See `ProcessHandle.kill`."""

        def verdict(row: Record, _: bool) -> bool | str:
            if row.is_terminal and row.state != "killed":
                return f"it ended before ({row.state})"
            return row.is_terminal

        return await self._tell(Kill(message, force=force, grace_s=grace_s), verdict, progress)

    async def send(self, name: str, value: Any = None, *, progress: Progress | None = None) -> BulkReport:
        """Send each of them the message `name`. What their classes declare is not checked here."""
        body, session = encode_value(value, f"the message {name!r}"), self._communicator.session
        at = time.time()
        living = [self._narrowed(_LIVING)]
        return await self._each(
            living, lambda pid: requests.SendRequest(pid, name, body, at, session), progress, _why_not_posted
        )

    async def retry(self, *, progress: Progress | None = None) -> BulkReport:
        """Continue the excepted ones, and those that are set aside, from their last good checkpoints."""
        aside = None if self._query.aside is False else self._narrowed(_LIVING, aside=True)
        excepted = None if self._query.unfinished or self._query.aside else self._narrowed(("excepted",))
        return await self._each([excepted, aside], requests.ReviveRequest, progress)

    async def delete(self, *, progress: Progress | None = None) -> BulkReport:
        """Forget those that have ended, with all that belongs to them; not those that somebody waits for."""
        ended = None if self._query.unfinished else self._narrowed(tuple(sorted(TERMINAL_STATES)))
        return await self._each([ended], requests.DeleteRequest, progress)

    def __repr__(self) -> str:
        said = msgspec.to_builtins(self._query)
        said.pop("limit", None)
        if self._root is not None:
            said["root"] = self._root
        return f"ProcessSelection({', '.join(f'{name}={value!r}' for name, value in said.items())})"

    # --- pages --------------------------------------------------------------------------------------

    def _narrowed(self, states: tuple[str, ...], aside: bool | None = None) -> Query | None:
        """Those in one of these states; None if there can be none."""
        left = tuple(state for state in self._query.states or states if state in states)
        if not left:
            return None
        changed: dict[str, Any] = {"states": left, "unfinished": False}
        return msgspec.structs.replace(self._query, **changed, **({} if aside is None else {"aside": aside}))

    async def _pages(self, query: Query | None, limit: int | None = None) -> AsyncIterator[list[Record]]:
        if query is None:
            return
        if self._root is not None:
            async for page in self._family_of(self._root, query):
                yield page
            return
        async for page in pages_of(self._controller, query, limit):
            yield page

    async def _family_of(self, root: str, query: Query) -> AsyncIterator[list[Record]]:
        """Those of a tree that match, a parent before its children."""
        first = await self._controller.handle(root).record()
        page = [msgspec.structs.replace(first, checkpoint=None, result=None, inbox=())]
        unread: deque[Query] = deque()
        while True:
            unread += [Query(parent=row.pid, limit=QUERY_LIMIT) for row in page]
            if matching := [row for row in page if matches(row, query)]:
                yield matching
            if not unread:
                return
            asked = [unread.popleft() for _ in range(min(len(unread), BATCH))]
            page = []
            for one, answer in zip(
                asked, await ask_all(self._communicator, map(requests.QueryRequest, asked)), strict=True
            ):
                if isinstance(answer, Exception):
                    if isinstance(answer, CheckpointNotFoundError):  # the place where a page began is gone
                        continue
                    raise answer
                page += answer
                if len(answer) == QUERY_LIMIT:
                    unread.append(msgspec.structs.replace(one, before=answer[-1].pid))

    # --- operations ---------------------------------------------------------------------------------

    async def _each(
        self,
        queries: Sequence[Query | None],
        make: Callable[[str], requests.Request],
        progress: Progress | None,
        refusal: Callable[[Any], str | None] = lambda _: None,
    ) -> BulkReport:
        """One request for each process."""
        report = BulkReport()

        async def ask(pids: Sequence[str]) -> None:
            for pid, answer in zip(pids, await ask_all(self._communicator, map(make, pids)), strict=True):
                why = str(answer) if isinstance(answer, Exception) else refusal(answer)
                if why is None:
                    report.done.append(pid)
                else:
                    report.skipped[pid] = why
            if progress is not None:
                progress(report)

        for query in queries:
            async for page in self._pages(query):
                pids = [row.pid for row in page]
                await in_turns(ask(pids[begin : begin + BATCH]) for begin in range(0, len(pids), BATCH))
        return report

    async def _tell(self, message: Message, verdict: Verdict, progress: Progress | None) -> BulkReport:
        """A letter to each of them, until all have dealt with it."""

        async def look() -> None:
            await telling.look()
            if progress is not None:
                progress(telling.report)

        telling = _Telling(self._communicator, message, verdict)
        async with listening(self._communicator, telling.heard, telling.look_at_all):
            async for page in self._pages(self._narrowed(_LIVING)):
                for begin in range(0, len(page), BATCH):
                    await telling.post([row.pid for row in page[begin : begin + BATCH]])
                    while telling.in_flight > IN_FLIGHT:
                        await look()
            while telling.in_flight:
                await look()
        return telling.report


class _Telling:
    """A letter on its way to many processes."""

    def __init__(self, communicator: Communicator, message: Message, verdict: Verdict) -> None:
        self.report = BulkReport()
        self._communicator, self._verdict = communicator, verdict
        self._message, self._body = message, encode_letter(message)
        self._posted: dict[str, Posted | None] = {}
        """Those that have not dealt with it; None while the letter is being posted."""
        self._changed: dict[str, None] = {}
        """Those of them that something happened to, in the order in which it did."""
        self._news = asyncio.Event()

    @property
    def in_flight(self) -> int:
        return len(self._posted)

    def heard(self, broadcast: Broadcast) -> None:
        if broadcast.sender in self._posted:
            self._changed[broadcast.sender] = None
            self._news.set()

    def look_at_all(self) -> None:
        self._changed.update(dict.fromkeys(self._posted))
        self._news.set()

    async def post(self, pids: Sequence[str]) -> None:
        self._posted.update(dict.fromkeys(pids))
        asked = [requests.PostRequest(pid, self._body) for pid in pids]
        answers = await ask_all(self._communicator, asked)
        warn_of_unread(self._message, [each for each in answers if isinstance(each, Posted)])
        for pid, posted in zip(pids, answers, strict=True):
            if isinstance(posted, Exception):
                self._end(pid, str(posted))
            elif not posted.seq:
                row = _row_of(pid, posted)
                self._end(pid, self._verdict(row, False) or f"it ended before ({row.state})")
            else:
                self._posted[pid] = posted

    async def look(self) -> None:
        """At those that something happened to; if nothing does, at all."""
        if not self._changed:
            try:
                async with asyncio.timeout(RECHECK_S):
                    await self._news.wait()
            except TimeoutError:
                self.look_at_all()
        self._news.clear()
        pids = [pid for pid, _ in zip(list(self._changed), range(BATCH), strict=False)]
        for pid in pids:
            del self._changed[pid]
        pids = [pid for pid in pids if self._posted.get(pid) is not None]
        for pid, row in zip(pids, await ask_all(self._communicator, map(requests.LoadRequest, pids)), strict=True):
            if isinstance(row, Exception):
                self._end(pid, str(row))
                continue
            posted = self._posted[pid]
            assert posted is not None
            verdict = self._verdict(row, row.inbox_done >= posted.seq)
            if verdict is False and is_left_aside(row, posted):
                verdict = f"it is set aside: {row.aside}"
            if verdict is not False:
                self._end(pid, verdict)

    def _end(self, pid: str, verdict: bool | str) -> None:
        del self._posted[pid]
        self._changed.pop(pid, None)
        if verdict is True:
            self.report.done.append(pid)
        else:
            self.report.skipped[pid] = str(verdict)


# --- helpers ----------------------------------------------------------------------------------------


def warn_of_unread(message: Message, posted: Iterable[Posted]) -> None:
    """Say it if there is no worker that could read some of these letters: who posted them is about to wait for one."""
    unread = sum(each.nobody_reads for each in posted)
    if unread:
        logger.warning(
            "no worker runs: the %s of %s is kept until one does (`prunus daemon start`)%s",
            message.type,
            "1 process" if unread == 1 else f"{unread:,} processes",
            ", for it has a last step to take; a kill by force does without" if isinstance(message, Kill) else "",
        )


def query_of(filters: Filters, now: float) -> Query:
    """The query for what was asked at the wall-clock time `now`; raises `ValueError` for what can't be meant."""
    given: dict[str, Any] = {name: value for name, value in filters.items() if value is not None}
    given.pop("root", None)
    said: dict[str, Any] = {}
    if (state := given.pop("state", None)) is not None:
        said["states"] = tuple(ProcessState(each).value for each in ([state] if isinstance(state, str) else state))
        if not said["states"]:
            raise ValueError("state=[] names no state: no process could match; leave it out to mean all of them")
    if (cls := given.pop("cls", None)) is not None:
        said["class_id"] = cls if isinstance(cls, str) else class_id(cls)
    if (paused := given.pop("paused", None)) is not None:
        said["play"] = "paused" if paused else "playing"
    for name, column in (("older_than", "created_before"), ("unchanged_for", "updated_before")):
        if (age := given.pop(name, None)) is not None:
            said[column] = now - (age.total_seconds() if isinstance(age, timedelta) else float(age))
    for name in ("unfinished", "tag", "parent", "roots", "queue", "key", "prefix", "aside"):
        if name in given:
            said[name] = given.pop(name)
    if given:
        raise TypeError(f"processes are not selected by {', '.join(sorted(given))}")
    return Query(**said)


async def pages_of(
    controller: ProcessController, query: Query, limit: int | None = None
) -> AsyncIterator[list[Record]]:
    """The rows that match, page by page, the newest first; of more than `limit` the newest (and perhaps a few more).
    What is forgotten meanwhile does no harm."""
    size = QUERY_LIMIT if limit is None else max(1, min(limit, QUERY_LIMIT))
    query = msgspec.structs.replace(query, limit=size)
    page, left = list(await controller.find(query)), limit
    while page:
        left = None if left is None else left - len(page)
        is_last = len(page) < size or (left is not None and left <= 0)
        # The next page is read before anything is done to this one: then the place where it begins is still there.
        following = [] if is_last else await _page_after(controller, page, query)
        yield page
        page = following


async def _page_after(controller: ProcessController, page: Sequence[Record], query: Query) -> list[Record]:
    for row in reversed(page):
        with contextlib.suppress(CheckpointNotFoundError):  # it was forgotten at this moment
            return list(await controller.find(msgspec.structs.replace(query, before=row.pid)))
    # All of them: then by the clock, which may leave out those of the same instant.
    return list(await controller.find(msgspec.structs.replace(query, created_before=page[-1].created_at)))


def matches(row: Record, query: Query) -> bool:
    """Whether the store would answer `query` with this row."""
    return (
        (not query.states or row.state in query.states)
        and (not query.unfinished or not row.is_terminal)
        and query.play in (None, row.play)
        and query.class_id in (None, row.class_id)
        and (query.tag is None or query.tag in row.tags)
        and query.parent in (None, row.parent)
        and (not query.roots or row.parent is None)
        and (query.prefix is None or row.pid.startswith(query.prefix) or row.pid.endswith(query.prefix))
        and query.queue in (None, row.queue)
        and query.key in (None, row.key)
        and (query.aside is None or query.aside == (row.aside is not None))
        and (query.created_before is None or row.created_at < query.created_before)
        and (query.updated_before is None or row.updated_at < query.updated_before)
    )


def is_left_aside(row: Record, posted: Posted) -> bool:
    """Whether somebody looked at it after the letter was there (a kill needs no more than that), and could not go
    on."""
    return row.aside is not None and row.owner is None and row.epoch > posted.epoch


async def ask_all(communicator: Communicator, asked: Iterable[requests.Request]) -> list[Any]:
    """The answer to each request, or the error with which it was refused; in few calls.

    Raises what would be the error of every other request too: the broker is away, its disk is full.
    """
    encoded = [(request, requests.encode_request(request)) for request in asked]
    pages: list[list[tuple[requests.Request, bytes]]] = []
    size = 0
    for one in encoded:
        if not pages or len(pages[-1]) == BATCH or size + len(one[1]) > BATCH_BYTES:
            pages.append([])
            size = 0
        pages[-1].append(one)
        size += len(one[1])
    answers = await in_turns(_ask_page(communicator, page) for page in pages)
    return [answer for page in answers for answer in page]


async def _ask_page(communicator: Communicator, page: Sequence[tuple[requests.Request, bytes]]) -> list[Any]:
    """In one call. If that is refused nothing of it was done, and each half is asked by itself."""
    try:
        answers = await communicator.call([body for _, body in page])
    except _OF_NO_REQUEST:
        raise
    except (PrunusError, ValueError) as error:
        if len(page) == 1:
            return [error]
        middle = len(page) // 2
        return [*await _ask_page(communicator, page[:middle]), *await _ask_page(communicator, page[middle:])]
    return [requests.decode_answer(request, answer) for (request, _), answer in zip(page, answers, strict=True)]


async def in_turns(work: Iterable[Awaitable[T]], width: int = CALLS_AT_ONCE) -> list[T]:
    """What each of these gives, in their order; `width` of them are done at a time. The first error ends it."""
    running: deque[asyncio.Future[T]] = deque()
    results: list[T] = []
    try:
        for one in work:
            running.append(asyncio.ensure_future(one))
            if len(running) == width:
                results.append(await running.popleft())
        while running:
            results.append(await running.popleft())
    finally:
        for left in running:
            left.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return results


@contextlib.asynccontextmanager
async def listening(
    communicator: Communicator,
    heard: Callable[[Broadcast], None],
    missed: Callable[[], None],
    sender: str | None = None,
) -> AsyncIterator[None]:
    """Call `heard` with what is broadcast of the process `sender`, or of all, and `missed` when something may have
    been missed."""

    async def hear(broadcast: Broadcast) -> None:
        heard(broadcast)

    forget = communicator.on_reconnect(missed)
    try:
        subscription = await communicator.add_broadcast_subscriber(hear, sender=sender, on_missed=lambda _: missed())
        try:
            yield
        finally:
            await subscription.cancel()
    finally:
        forget()


def _why_not_posted(posted: Posted) -> str | None:
    return None if posted.seq else f"it ended before ({posted.state})"


def _row_of(pid: str, posted: Posted) -> Record:
    """What is known of a process that had ended when it was told."""
    return Record(pid=pid, class_id="", state=posted.state, play="playing", created_at=0, updated_at=0, epoch=0, seq=0)
