"""Where the facts of ``prunus top`` come from: one `look` at the broker, at the services and at one process.

What is asked has a bound, whatever the number of processes: the rows that are on the screen and a few more, and counts
that the broker keeps anyway. A filter that the store does not know is applied to the newest `SCAN_ROWS`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from prunus.errors import DaemonError
from prunus.persistence.checkpoint import decode_data
from prunus.persistence.persister import QUERY_LIMIT, Query, Record
from prunus.processes import ProcessResult
from prunus.runtime import daemon
from prunus.runtime.backend import BrokerStatus
from prunus.runtime.controller import ProcessController
from prunus.runtime.display import peer, snapshot_of
from prunus.runtime.health import Load, state_of_missing, state_of_running
from prunus.runtime.selection import pages_of
from prunus.runtime.services import ServiceNote, read_notes
from prunus.runtime.top.model import (
    LINES_SHOWN,
    SORTS,
    Details,
    Look,
    Service,
    View,
    is_recent,
    merged,
)

if TYPE_CHECKING:
    from prunus.runtime.profile import Profile

LOOK_TIMEOUT_S = 3.0
"""A broker that has not answered by then is said to be away; it is asked again."""
RECENT_ROWS = 50
"""Of the newest processes so many are looked at for those that ended a moment ago."""
SCAN_ROWS = 5000
"""Among so many of the newest processes a filter looks."""
SORTED_ROWS = QUERY_LIMIT
"""Another order than by age is one of so many of the newest processes."""
USE_INTERVAL_S = 1.5
"""How often the memory and the time of the services are measured."""
MAX_EVENTS_KEPT = 10_000
"""Of the events of the selected process, the newest; only what is new is read."""
MAX_SHOWN_BYTES = 4_000_000
"""The inputs in a larger checkpoint are not shown."""
LONG_SILENCE_S = 10.0


class Source:
    """The facts, for one screen."""

    def __init__(
        self,
        controller: ProcessController,
        profile: Profile | None = None,
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Without a `profile` (a broker on a network) services are those that the broker knows as workers."""
        self._controller = controller
        self._profile = profile
        self._wall = wall
        self._usage = _Usage()
        self._details: Details | None = None

    async def look(self, view: View) -> Look:
        """All that the view needs. Raises `TimeoutError`, `MessagingError` (the broker is away) and other
        `PrunusError`."""
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            status = msgspec.convert(await self._controller.broker_statistics(), BrokerStatus)
            records, is_cut = await self._records(view)
            details = None if view.details_of is None else await self._read_details(view.details_of)
        return Look(
            at=self._wall(),
            status=status,
            services=await self._services(status),
            records=tuple(records),
            is_cut=is_cut,
            details=details,
        )

    async def _records(self, view: View) -> tuple[list[Record], bool]:
        now = self._wall()
        wanted = view.wanted if view.sort == next(iter(SORTS)) else max(view.wanted, SORTED_ROWS)
        if view.everything or any(word.startswith("state:") for word in view.filter.words):
            return await self._matching(view, Query(), wanted)
        live, is_cut = await self._matching(view, Query(unfinished=True), wanted)
        recent = await self._controller.find(view.filter.narrow(Query(limit=RECENT_ROWS)))
        ended = [row for row in recent if is_recent(row, now) and view.filter.holds(row)]
        return merged(ended, live), is_cut

    async def _matching(self, view: View, query: Query, wanted: int) -> tuple[list[Record], bool]:
        """The newest rows that match, and whether there may be more."""
        bound = max(SCAN_ROWS, wanted) if view.filter.words else wanted
        found: list[Record] = []
        scanned = 0
        async for page in pages_of(self._controller, view.filter.narrow(query), bound):
            scanned += len(page)
            found += [row for row in page if view.filter.holds(row)]
            if len(found) > wanted:
                break
        return found[:wanted], scanned >= bound or len(found) > wanted

    async def _read_details(self, pid: str) -> Details | None:
        handle = self._controller.handle(pid)
        record = await handle.record()
        lines = tuple(await handle.log(last=LINES_SHOWN))
        before = self._details
        if before is not None and (before.record.pid, before.record.created_at) != (pid, record.created_at):
            before = None
        if before is not None and before.record.seq == record.seq:
            self._details = dataclasses.replace(before, record=record, lines=lines)
            return self._details
        result = ProcessResult.from_data(decode_data(record.result)) if record.is_terminal and record.result else None
        size = len(record.checkpoint or b"")
        inputs = snapshot_of(record).get("inputs") if size <= MAX_SHOWN_BYTES else "too large for this screen"
        data = result.to_data() if result is not None else {}
        known = before.events[-MAX_EVENTS_KEPT:] if before is not None else ()
        self._details = Details(
            record=record,
            inputs=inputs,
            outputs=data.get("outputs") or data.get("value"),
            failure=result.failure.traceback or str(result.failure) if result and result.failure else None,
            events=(*known, *await handle.history(known[-1].seq if known else 0)),
            lines=lines,
        )
        return self._details

    async def _services(self, status: BrokerStatus) -> tuple[Service, ...]:
        if self._profile is None:
            return tuple(_workers(status))
        found = await asyncio.to_thread(self._usage.services, self._profile, self._wall())
        loads = {service.name: service for service in _workers(status)}
        return tuple(
            dataclasses.replace(service, held=loads[service.name].held, room=loads[service.name].room)
            if service.name in loads
            else service
            for service in found
        )


def _workers(status: BrokerStatus) -> list[Service]:
    """The workers as the broker knows them: sessions that take tasks. (Their room for letters is not told.)"""
    from prunus.runtime.worker import CONTROL_SLOTS

    found = []
    for name, session in sorted(status.sessions.items()):
        if session.held or session.credit or peer(name).startswith("worker"):
            is_heard = session.connected and session.silent_s < LONG_SILENCE_S
            found.append(
                Service(
                    name=peer(name),
                    state="running" if is_heard else "lost",
                    pid=session.pid if is_heard else None,
                    held=session.held,
                    room=max(0, session.credit - CONTROL_SLOTS),
                )
            )
    return found


class _Usage:
    """Time and memory of the services of a profile. Measured in another thread, and not at each look."""

    def __init__(self) -> None:
        self._load = Load()
        self._measured: dict[int, tuple[float | None, int, int]] = {}
        self._measured_s = float("-inf")

    def services(self, profile: Profile, now: float) -> tuple[Service, ...]:
        """The supervisor, the broker and the workers: those that run, and those that should. `now` is wall time."""
        try:
            status = daemon.status(profile)
        except DaemonError:  # a lock whose holder can't be named, for a moment
            return ()
        notes = read_notes(profile).services
        holders = {"daemon": status.daemon, **dict.fromkeys(status.wanted), **status.services}
        if time.monotonic() - self._measured_s >= USE_INTERVAL_S:
            self._measured_s = time.monotonic()
            self._measured = self._load.look(holder.pid for holder in holders.values() if holder is not None)
        services = []
        for name, holder in holders.items():
            note = notes.get(name, ServiceNote())
            if holder is None:
                services.append(Service(name, state_of_missing(note, now), restarts=note.restarts))
                continue
            uptime_s = max(0.0, now - holder.since)
            percent, memory, _ = self._measured.get(holder.pid, (None, None, 0))
            services.append(
                Service(
                    name,
                    state_of_running(name, status, note, uptime_s),
                    pid=holder.pid,
                    uptime_s=uptime_s,
                    cpu=None if percent is None else percent / 100,
                    memory=memory,
                    restarts=note.restarts,
                )
            )
        return tuple(services)
