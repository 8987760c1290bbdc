"""What happens to a process, from its past through now: behind `ProcessHandle.watch`.

The history of a process is numbered from 1, durable, and written in the same commits as the process. So a reader needs
no more than the number of the last event that it has seen: it asks for what comes after that one, and there is neither
a gap nor a duplicate, whatever the connection does. Broadcasts only say that it is time to ask again. They may be
missed; so after a reconnection, and after `RECHECK_S` without any, it asks in any case.

Between two looks only the pids of those that something happened to are kept: a slow reader costs nothing, and reads
what happened meanwhile in one answer. (A store keeps `MAX_EVENTS` of a process. Who is further behind than that finds
the event ``thinned`` in the place of those that were left out, which says how many.)
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from prunus.errors import BusyError, CheckpointNotFoundError, IndeterminateError, NotDeliveredError
from prunus.messaging.communicator import Broadcast, Communicator
from prunus.persistence import requests
from prunus.persistence.persister import QUERY_LIMIT, TERMINAL_STATES, Event, Query
from prunus.processes import ProcessState
from prunus.runtime.selection import RECHECK_S, ask_all, listening

LOOKED_AT = 50
"""How many processes of a tree are looked at in one go."""
CHILDREN = 50
"""How many of the newest children of a process one answer holds."""
RETRY_S = 1.0
"""The pause before the broker is asked again, when it was away for longer than a request has patience."""

_STATES = frozenset(state.value for state in ProcessState)

logger = logging.getLogger(__name__)


class WatchEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the history of a process."""

    pid: str
    seq: int
    """Its number in the history of that process, from 1."""
    subject: str
    """``created.running``, ``playing.paused``, ``claimed``, ``set_aside``, ``revived`` ..."""
    at: float
    """Wall clock, seconds since 1970; for showing only."""
    step: str | None = None
    """The name of the step that led to it."""
    note: str | None = None
    by: str | None = None
    """The worker that made it."""

    @property
    def ends(self) -> bool:
        """Whether the process was finished, excepted or killed with this."""
        source, _, target = self.subject.partition(".")
        return target in TERMINAL_STATES and source in _STATES


class _Member(msgspec.Struct):
    """How far one process has been read."""

    last: int = 0
    """The number of the last event."""
    lives: bool = True


async def follow(
    communicator: Communicator, root: str, after: int = 0, *, tree: bool = False
) -> AsyncGenerator[WatchEvent, None]:
    """The events of `root` with a number above `after`, as they are written, until it has ended; with `tree` those of
    its descendants too, until all have ended. Raises `CheckpointNotFoundError` if `root` is (or becomes) unknown."""
    family = {root: _Member(after)}
    changed = {root: None}
    news = asyncio.Event()

    def heard(broadcast: Broadcast) -> None:
        if broadcast.sender in family:
            changed[broadcast.sender] = None
            news.set()

    def missed() -> None:
        changed.update(dict.fromkeys(family))
        news.set()

    async with listening(communicator, heard, missed, None if tree else root):
        if after:
            [record] = await ask_all(communicator, [requests.LoadRequest(root)])
            if isinstance(record, Exception):
                raise record
            family[root].lives = not record.is_terminal
        while True:
            if not changed:
                try:
                    async with asyncio.timeout(RECHECK_S):
                        await news.wait()
                except TimeoutError:
                    changed.update({pid: None for pid, member in family.items() if member.lives})
            news.clear()
            pids = list(changed)[:LOOKED_AT]
            for pid in pids:
                del changed[pid]
            try:
                found = await _look(communicator, {pid: family[pid].last for pid in pids}, tree)
            except (BusyError, IndeterminateError, NotDeliveredError) as error:
                logger.info("%s; the history of %s is asked for again in %.1f s", error, root, RETRY_S)
                changed.update(dict.fromkeys(pids))
                await asyncio.sleep(RETRY_S)
                continue
            streams = []
            for pid, (events, children) in found.items():
                member = family[pid]
                if isinstance(events, Exception):
                    if pid == root or not isinstance(events, CheckpointNotFoundError):
                        raise events
                    member.lives = False  # it is forgotten
                    continue
                streams.append([_watched(pid, event) for event in events])
                for child in await _all_new(communicator, pid, children, family) if tree else ():
                    family[child] = _Member()
                    changed[child] = None
            for event in heapq.merge(*streams, key=lambda event: event.at):
                member = family[event.pid]
                member.last = event.seq
                if event.ends or event.subject == "revived":
                    member.lives = not event.ends
                yield event
            if not changed and not any(member.lives for member in family.values()):
                return


async def _look(communicator: Communicator, last: dict[str, int], tree: bool) -> dict[str, tuple[Any, Any]]:
    """The new events of each process (or why there are none) and its newest children, both as of the same moment."""
    asked: list[requests.Request] = []
    for pid, seq in last.items():
        asked.append(requests.HistoryRequest(pid, seq))
        if tree:
            asked.append(requests.QueryRequest(Query(parent=pid, limit=CHILDREN)))
    answers = await ask_all(communicator, asked)
    if not tree:
        return {pid: (events, ()) for pid, events in zip(last, answers, strict=True)}
    return dict(zip(last, zip(answers[::2], answers[1::2], strict=True), strict=True))


async def _all_new(communicator: Communicator, pid: str, newest: Any, family: dict[str, _Member]) -> list[str]:
    """The children that are not known yet, of which `newest` are the newest."""
    new: dict[str, None] = {}
    page, limit = newest, CHILDREN
    while True:
        if isinstance(page, CheckpointNotFoundError):  # the place where a page began is gone: from the newest again
            before = None
        elif isinstance(page, Exception):
            raise page
        else:
            unknown = [row.pid for row in page if row.pid not in family]
            new.update(dict.fromkeys(unknown))
            if len(unknown) < limit:
                return list(new)
            before = unknown[-1]
        limit = QUERY_LIMIT
        [page] = await ask_all(communicator, [requests.QueryRequest(Query(parent=pid, limit=limit, before=before))])


def _watched(pid: str, event: Event) -> WatchEvent:
    return WatchEvent(
        pid=pid,
        seq=event.seq,
        subject=event.subject,
        at=event.at,
        step=event.step,
        note=event.note,
        by=event.by,
    )
