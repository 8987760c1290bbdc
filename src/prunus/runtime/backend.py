"""What a worker and a controller stand on: a communicator, and the processes behind it.

The broker keeps the queue and the processes in one database, so one request can hold a checkpoint, the
acknowledgement of the task that caused it and the tasks that it causes (G2). What became true is told to whoever
listens when that commit is done, by the broker itself (G3): nobody else has to announce anything, and nothing is
told too early or forgotten.

`ProcessService` is the half in the broker, `Backend` the half in every other program.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from prunus.errors import StoreFullError
from prunus.messaging.communicator import DEFAULT_QUEUE, Communicator, IncomingTask
from prunus.messaging.exchange import ExchangeStatistics, NewBroadcast, NewTask, Served
from prunus.persistence import requests
from prunus.persistence.persister import Effects, Save
from prunus.persistence.sqlite import ProcessStore
from prunus.processes import PlayState

RUN_LANE = DEFAULT_QUEUE
"""Tasks for processes that can step."""
CONTROL_LANE = "control"
"""Tasks for processes that nobody holds and that have a letter: never behind long work (G10)."""

ANSWERED, SET_ASIDE, REVIVED, PROGRESS, MAIL = "answered", "set_aside", "revived", "progress", "mail"
"""Subjects of broadcasts that are no transitions: letters were dealt with; the process was set aside, or is back; its
running step said something; it got mail."""

STATISTICS_REQUEST = b"statistics"
_PLAY_STATES = frozenset(state.value for state in PlayState)


def letter_subject(owner: str) -> str:
    """The subject of the broadcast that tells `owner`: a process that you hold has a letter."""
    return f"letter.{owner}"


class ProcessService:
    """The process store as the service behind a broker: who became runnable or called gets a task, in that commit.

    Its timers are those of the processes, by the wall `clock` (seconds since 1970).
    """

    def __init__(
        self,
        store: ProcessStore,
        broker_statistics: Callable[[], dict[str, Any]] = dict,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._broker_statistics = broker_statistics
        self._clock = clock
        self.refuse_new: str | None = None
        """The path of the database whose disk is full: nothing new is created then, everything else goes on ..."""
        self.refuse_changes: str | None = None
        """... and with this one nothing is changed."""

    def execute(self, request: bytes, session: str) -> Served:
        """Answer one request of the peer `session`; raises what the store raises."""
        if request == STATISTICS_REQUEST:
            statistics = {**self._broker_statistics(), "processes": self._store.statistics()}
            return Served(answer=msgspec.json.encode(statistics))
        decoded = requests.decode_request(request)
        if self.refuse_new is not None and isinstance(decoded, requests.CreateRequest):
            raise StoreFullError(self.refuse_new)
        if self.refuse_changes is not None and not isinstance(decoded, requests.READING):
            raise StoreFullError(self.refuse_changes)
        answer, effects = requests.perform(self._store, decoded, session)
        return Served(
            answer=requests.encode_answer(answer),
            tasks=tasks_for(effects),
            broadcasts=(*news_of(decoded), *nudges_of(effects)),
        )

    def left(self, session: str) -> tuple[NewTask, ...]:
        """`session` is gone for good: what it held goes to others, and letters need not wait for that."""
        return tasks_for(self._store.release_all(session))

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


# --- what the broker makes of what the store did ----------------------------------------------------


def tasks_for(effects: Effects) -> tuple[NewTask, ...]:
    """The tasks that say "look at this process": one key a process, so that one worker at a time looks (G4)."""
    return (
        *(NewTask(queue=CONTROL_LANE, key=pid) for pid in effects.called),
        *(NewTask(queue=RUN_LANE, key=pid) for pid in effects.runnable),
    )


def missing_tasks(store: ProcessStore, has_task: Callable[[str], bool]) -> list[NewTask]:
    """A task for every process that somebody has to look at and that has none (G12).

    That is what is runnable or called, and what is held: its holder has a task for it, as long as it lives.
    """
    unheld = store.unheld_work()
    effects = Effects(runnable=(*unheld.runnable, *store.held()), called=unheld.called)
    return [task for task in tasks_for(effects) if task.key is not None and not has_task(task.key)]


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


def broker_counts(statistics: ExchangeStatistics) -> dict[str, Any]:
    """The counts of a broker as plain data: its tasks by queue and by holder, its sessions and more."""
    counts: dict[str, Any] = msgspec.to_builtins(statistics)
    return {**counts.pop("broker"), **counts}
