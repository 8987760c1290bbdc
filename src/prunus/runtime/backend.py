"""What a worker and a controller stand on: a communicator, and the processes behind it.

The broker keeps the queue and the processes in one database, so one request can hold a checkpoint, the
acknowledgement of the task that caused it and the tasks that it causes (G2). What became true is told to whoever
listens when that commit is done, by the broker itself (G3): nobody else has to announce anything, and nothing is
told too early or forgotten.

`ProcessService` is the half in the broker, `Backend` the half in every other program.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

import prunus
from prunus.errors import NotPermittedError, StoreFullError
from prunus.messaging.access import ADMINISTERING, ALL, SENDING, WORKING, Role
from prunus.messaging.communicator import DEFAULT_QUEUE, Communicator, IncomingTask
from prunus.messaging.exchange import NewBroadcast, NewTask, Over, Served
from prunus.messaging.inventory import Statistics
from prunus.messaging.messages import Peer
from prunus.messaging.queues import needs_of
from prunus.persistence import requests
from prunus.persistence.persister import TERMINAL_STATES, Claim, Effects, Route, Save
from prunus.persistence.sqlite import ProcessStore, merge
from prunus.processes import PlayState
from prunus.runtime import crashes, reconcile, upkeep
from prunus.runtime.crashes import Deaths
from prunus.runtime.kills import find_kill, killed, needs_its_code
from prunus.runtime.upkeep import Upkeep

RUN_LANE = DEFAULT_QUEUE
"""Tasks for processes that can step and name no queue of their own."""
CONTROL_LANE = "control"
"""Tasks for processes that nobody holds and that have a letter: never behind long work (G10)."""

ANSWERED, SET_ASIDE, REVIVED, PROGRESS, MAIL = "answered", "set_aside", "revived", "progress", "mail"
"""Subjects of broadcasts that are no transitions: letters were dealt with; the process was set aside, or is back; its
running step said something; it got mail."""

STATISTICS_REQUEST = b"statistics"
NOTHING = Effects()
logger = logging.getLogger(__name__)
_PLAY_STATES = frozenset(state.value for state in PlayState)


def letter_subject(owner: str) -> str:
    """The subject of the broadcast that tells `owner`: a process that you hold has a letter."""
    return f"letter.{owner}"


class BrokerStatus(Statistics, frozen=True, kw_only=True):
    """A broker with its disk and the processes behind it."""

    pid: int = 0
    version: str = ""
    """Of Prunus, that it runs."""
    disk_full: bool = False
    """New work is refused for want of space."""
    processes: dict[str, int] = msgspec.field(default_factory=dict)
    """How many are in each state."""


class ProcessService:
    """The process store as the service behind a broker: who became runnable or called gets a task, in that commit.

    Its timers are those of the processes, by the wall `clock` (seconds since 1970).
    """

    def __init__(
        self,
        store: ProcessStore,
        broker_statistics: Callable[[], dict[str, Any]] = dict,
        clock: Callable[[], float] = time.time,
        upkeep: Upkeep | None = None,
        tasks: reconcile.Tasks | None = None,
    ) -> None:
        """`tasks` is what the broker knows: with it the owner of the profile may have everything checked and mended."""
        self._store = store
        self._tasks = tasks
        self._deaths = Deaths(store)
        self._broker_statistics = broker_statistics
        self._upkeep = upkeep
        self._clock = clock
        self.refuse_new: str | None = None
        """The path of the database whose disk is full: nothing new is created then, everything else goes on ..."""
        self.refuse_changes: str | None = None
        """... and with this one nothing is changed."""
        self._is_left_to_workers = True
        """There may be letters that a worker was to read. When the last one is gone somebody has to look."""

    def execute(self, request: bytes, session: str, role: Role) -> Served:
        """Answer one request of the peer `session`; raises what the store raises, and `NotPermittedError`."""
        if request == STATISTICS_REQUEST:
            statistics = {**self._broker_statistics(), "processes": self._store.statistics()}
            return Served(answer=msgspec.json.encode(statistics))
        if self._upkeep is not None and request.startswith(upkeep.PREFIX):
            _only_owner(role, "to look after the database")
            return self._upkeep.execute(request.removeprefix(upkeep.PREFIX))
        if request.startswith(crashes.PREFIX):
            _only_owner(role, "to say how a worker ended")
            if self.refuse_changes is None:
                self._deaths.testify(request.removeprefix(crashes.PREFIX))
            return Served(answer=b"")
        if self._tasks is not None and request.startswith(reconcile.PREFIX):
            _only_owner(role, "to have processes checked and mended")
            return self._reconcile(request.removeprefix(reconcile.PREFIX), self._tasks)
        decoded = requests.decode_request(request)
        if role not in who_may_ask(decoded):
            raise NotPermittedError(role, f"the request {type(decoded).__struct_config__.tag!r} about a process")
        if self.refuse_new is not None and isinstance(decoded, (requests.CreateRequest, *requests.ARRIVING)):
            raise StoreFullError(self.refuse_new)
        if self.refuse_changes is not None and not isinstance(decoded, requests.READING):
            raise StoreFullError(self.refuse_changes)
        answer, effects = requests.perform(self._store, decoded, session)
        ends, effects = self._end_killed(effects)
        begins = None
        if isinstance(decoded, requests.CreateRequest) and answer.is_new:
            process = decoded.process
            begins = NewTask(queue=process.queue, key=process.pid, needs=needs_of(process.resources.items()))
        elif isinstance(decoded, requests.PostRequest) and answer.seq and answer.owner is None:
            answer = msgspec.structs.replace(answer, nobody_reads=self._nobody_reads and not ends)
        made = (decoded, *ends)
        return Served(
            answer=requests.encode_answer(answer),
            tasks=tasks_for(effects),
            over=over_with(made),
            broadcasts=(*(news for each in made for news in news_of(each)), *nudges_of(effects)),
            begins=begins,
        )

    def left(self, session: str, lost: Peer | None) -> tuple[NewTask | Over | NewBroadcast, ...]:
        """`session` is gone for good: what it held goes to others, and letters need not wait for that. If it died, the
        processes whose steps it ran are blamed, and may be set aside for it."""
        aside: Sequence[str] = ()
        if lost is None:
            effects = self._store.release_all(session)
        else:
            worker = session.rpartition("-")[0] or session
            effects, blamed, aside = self._store.blame_all(session, f"{worker}, pid {lost.pid}")
            self._deaths.noticed(lost, blamed, aside)
        for pid in aside:
            logger.error("process %s is set aside: its step ended so many workers", pid, extra={"pid": pid})
        if self._is_left_to_workers and self._nobody_reads:
            self._is_left_to_workers = False
            effects = merge([effects, Effects(called=self._store.called())])
        ends, effects = self._end_killed(effects)
        return (
            *tasks_for(effects),
            *over_with(ends),
            *(news for end in ends for news in news_of(end)),
            *(NewBroadcast(sender=pid, subject=SET_ASIDE) for pid in aside),
        )

    @property
    def _nobody_reads(self) -> bool:
        """Whether there is no worker that would read letters to unheld processes."""
        return self._tasks is not None and not self._tasks.is_served(CONTROL_LANE)

    def _end_killed(self, effects: Effects) -> tuple[list[requests.SaveRequest], Effects]:
        """Nobody reads letters: end those of the called processes that are told to die, and their children, if none of
        their code is needed for it. How, and what is left of the effects."""
        if not effects.called:
            return [], effects
        if not self._nobody_reads:
            self._is_left_to_workers = True
            return [], effects
        ends: list[requests.SaveRequest] = []
        caused, called, at = [effects], list(effects.called), self._clock()
        for pid in called:  # it grows
            record, _ = self._store.load(pid)
            kill = find_kill(record.inbox)
            if kill is None or needs_its_code(record, kill):
                continue
            claim, _ = self._store.claim(pid, "broker", at=at)
            end = requests.SaveRequest(killed(claim.record, claim.epoch, kill, at))
            _, more = requests.perform(self._store, end)
            ends.append(end)
            caused.append(more)
            called += more.called
        effects = merge(caused)
        ended = {end.save.pid for end in ends}
        living, unread = (tuple(pid for pid in pids if pid not in ended) for pids in (effects.runnable, effects.called))
        return ends, msgspec.structs.replace(effects, runnable=living, called=unread)

    def _reconcile(self, data: bytes, tasks: reconcile.Tasks) -> Served:
        """Check the processes behind a place, or mend them too."""
        request = reconcile.decode_request(data)
        found, after = reconcile.look(self._store, tasks, request.after, time.monotonic)
        if request.after is None:
            found += reconcile.look_on(self._store, tasks, self._clock())
        effects = NOTHING
        if isinstance(request, reconcile.Mend):
            if self.refuse_changes is not None:
                raise StoreFullError(self.refuse_changes)
            effects = reconcile.mend(self._store, tasks, found, self._clock())
        report = reconcile.Report(
            found=tuple(found), after=after, now=self._clock(), newest=self._store.newest(), version=prunus.__version__
        )
        return Served(answer=reconcile.encode(report), tasks=tasks_for(effects))

    def due(self) -> float | None:
        """The seconds until a process is to be woken by its timer, 0 or less if that is late."""
        wake_at = self._store.next_wake()
        return None if wake_at is None else wake_at - self._clock()

    def tick(self) -> tuple[NewTask, ...]:
        """Wake those whose time has come, many at once."""
        return tasks_for(self._store.fire_timers(self._clock()))


class Backend:
    """A communicator, and the persister behind its broker."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.persister = requests.RequestPersister(self._send)

    async def claim(self, pid: str, task: IncomingTask) -> Claim:
        """Become the owner of a process, unless `task` has gone to somebody else meanwhile (`TaskRejectedError`): a
        claim that comes late would hold a process that nobody drives."""
        request = requests.ClaimRequest(pid, self.communicator.session, time.time())
        [answer] = await self.communicator.call([requests.encode_request(request)], holding=[task])
        claim: Claim = requests.decode_answer(request, answer)
        return claim

    async def settle(self, request: requests.Request, task: IncomingTask) -> Any:
        """Do `request` and acknowledge `task` in one commit (G2), and return the store's answer."""
        [answer] = await self.communicator.call([requests.encode_request(request)], acks=[task])
        return requests.decode_answer(request, answer)

    async def statistics(self) -> dict[str, Any]:
        """Counts of the broker and of the store, as plain data."""
        answer = await self._send(STATISTICS_REQUEST)
        return msgspec.json.decode(answer, type=dict[str, Any])

    async def _send(self, request: bytes) -> bytes:
        [answer] = await self.communicator.call([request])
        return answer


def who_may_ask(request: requests.Request) -> frozenset[Role]:
    """The roles that may make this request of the process store."""
    if isinstance(request, requests.READING):
        return ALL
    if isinstance(request, requests.ARRIVING):
        return ADMINISTERING
    return WORKING if isinstance(request, requests.HOLDING) else SENDING


def over_with(made: Iterable[requests.Request]) -> tuple[Over, ...]:
    """The processes of which nobody has to take care any more once these requests are committed: they have ended."""
    return tuple(
        Over(request.save.pid)
        for request in made
        if isinstance(request, requests.SaveRequest) and request.save.state in TERMINAL_STATES
    )


def _only_owner(role: Role, what: str) -> None:
    """Raise if this is not the owner, who alone may have things done on the broker's host."""
    if role is not Role.OWNER:
        raise NotPermittedError(role, what)


# --- what the broker makes of what the store did ----------------------------------------------------


def tasks_for(effects: Effects) -> tuple[NewTask, ...]:
    """The tasks that say "look at this process": one key a process, so that one worker at a time looks (G4).

    Who can step goes to the queue of its own, with its tokens: so it holds them while a worker has it, and not while it
    is parked. Letters need none.
    """
    routes = effects.routes
    return (
        *(NewTask(queue=CONTROL_LANE, key=pid) for pid in effects.called),
        *(_run_task(pid, routes.get(pid)) for pid in effects.runnable),
    )


def _run_task(pid: str, route: Route | None) -> NewTask:
    if route is None:
        return NewTask(queue=RUN_LANE, key=pid)
    needs = needs_of(route.resources.items())
    return NewTask(queue=route.queue, key=pid, priority=route.priority, depth=route.depth, needs=needs)


def missing_tasks(store: ProcessStore, has_task: Callable[[str], bool]) -> list[NewTask]:
    """A task for every process that somebody has to look at and that has none (G12)."""
    return list(tasks_for(reconcile.without_task(store, has_task)))


def nudges_of(effects: Effects) -> tuple[NewBroadcast, ...]:
    """What tells the holders of processes that there are letters."""
    return tuple(NewBroadcast(sender=pid, subject=letter_subject(owner)) for owner, pid in effects.nudged)


def news_of(request: requests.Request) -> tuple[NewBroadcast, ...]:
    """What everybody may know once `request` is committed."""
    match request:
        case requests.SaveRequest(save):
            return tuple(NewBroadcast(sender=save.pid, subject=subject) for subject in _subjects(save))
        case requests.NoteRequest(note):
            return (NewBroadcast(sender=note.pid, subject=PROGRESS),)
        case requests.SendRequest(pid=pid):
            return (NewBroadcast(sender=pid, subject=MAIL),)
        case requests.SetAsideRequest(pid=pid):
            return (NewBroadcast(sender=pid, subject=SET_ASIDE),)
        case requests.ReviveRequest(pid=pid):
            return (NewBroadcast(sender=pid, subject=REVIVED),)
        case _:
            return ()


def _subjects(save: Save) -> list[str]:
    subjects = []
    for event in save.events:
        kind = "play" if event.subject.partition(".")[0] in _PLAY_STATES else "state"
        subjects.append(f"{kind}_changed.{event.subject}")
    # Whoever waits for an answer looks at the row; most transitions are no answer, but then this costs one look.
    return [*subjects, ANSWERED] if save.replies or not subjects else subjects
