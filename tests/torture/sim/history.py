"""What the programs of a world saw: who asked for what, what was answered, who worked on what. `check` judges it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Ending = Literal["open", "ok", "fail", "info"]
"""Of a request: still waiting; done; certainly not done; nobody knows (its client died, or gave up)."""


@dataclass(slots=True)
class Sent:
    """A task that a client sent."""

    number: int
    """Rises with each that is sent."""
    task: str
    session: str
    queue: str
    key: str | None
    priority: int
    want_result: bool
    plain: bool
    """Nothing but its place in the queue decides when it is delivered."""
    invoked: float
    subject: str | None = None
    replace: bool = False
    not_before: float = 0.0
    expires_at: float = 0.0
    max_attempts: int = 0
    ended: float = 0.0
    ending: Ending = "open"
    error: str = ""
    joined: str | None = None
    """The pending task with its key that made it superfluous."""


@dataclass(slots=True)
class Delivered:
    """A task that reached a worker."""

    task: str
    epoch: int
    attempt: int
    session: str
    at: float
    ending: Literal["open", "acked", "stale", "nacked", "lost", "unknown", "dead"] = "open"
    """`unknown`: it said that it is done, and heard nothing any more."""
    ended: float = 0.0


@dataclass(slots=True)
class Asked:
    """A question."""

    body: str
    session: str
    invoked: float
    deadline: float
    ended: float = 0.0
    ending: Ending = "open"
    error: str = ""
    answer: str | None = None
    runs: list[str] = field(default_factory=list)
    """Sessions whose handler ran for it."""


@dataclass(slots=True)
class Written:
    """A write into the ledger behind the broker."""

    pid: str
    epoch: int
    value: str
    session: str
    ending: Ending = "open"
    error: str = ""


@dataclass(slots=True)
class Said:
    """A broadcast."""

    session: str
    number: int
    subject: str | None
    invoked: float
    ending: Ending = "open"
    ended: float = 0.0


class History:
    """See the module."""

    def __init__(self) -> None:
        self.sent: dict[str, Sent] = {}
        self.delivered: dict[tuple[str, int], list[Delivered]] = {}
        """By task and epoch: each at most once."""
        self.dispatched: dict[str, tuple[int, float]] = {}
        """The epoch and the time at which the broker gave a task away first."""
        self.last_delivery: dict[str, Delivered] = {}
        self.acked: dict[str, Delivered] = {}
        """The delivery under which a task was accepted as done."""
        self.results: dict[tuple[str, str], list[str]] = {}
        """By session and task."""
        self.results_due: dict[tuple[str, str], None] = {}
        """Those that wait, with a confirmed task."""
        self.left: set[str] = set()
        """Sessions that said goodbye: nothing is kept for them from then on."""
        self.waiting: Counter[tuple[str, str]] = Counter()
        """How many sends of a session wait or waited for the result of a task: its own, and those that joined it."""
        self.asked: dict[str, Asked] = {}
        self.written: list[Written] = []
        self.said: dict[tuple[str, int], Said] = {}
        self.heard: dict[tuple[str, str], list[int]] = {}
        """By listener and sender."""
        self.listening: dict[str, float] = {}
        """Since when a session certainly hears what is for it."""
        self.missed: Counter[str] = Counter()
        """How many broadcasts a session was told that it missed."""
        self.resenders: set[str] = set()
        """Sessions that were connected more than once: they may have said something again."""
        self.edited: dict[str, set[str]] = {}
        """Tasks that somebody tried to delete, bury or requeue, and which of it."""
        self.counts: Counter[str] = Counter()
        self.complaints: list[str] = []
        """What is wrong, as soon as it was seen."""

    def complain(self, text: str) -> None:
        self.complaints.append(text)
