"""The seam behind which processes are kept: what can be asked of a store, and what it answers.

A store keeps one row a process. The process itself is opaque bytes (the checkpoint); beside them the row
holds the few facts that a store needs to find processes and to decide **who is runnable**:

===============  ==========================================================================================
fact             meaning
===============  ==========================================================================================
state, play      the two state machines, as text, for queries and for the decision below
epoch, owner     who may write. Every claim raises the epoch; a save under a lower one is refused
                 (`StaleOwnerError`, G4). `owner` is None while nobody holds the process
waits            the pids that a WAITING process waits for and that have not terminated yet
inbox            messages to the process (pause, play, kill, resume ...), durable and in order. They stay
                 until a save says up to which one they are dealt with (`inbox_done`), so none is ever lost
aside            why the process can't be continued for now (its class is gone, its checkpoint is damaged)
===============  ==========================================================================================

Nobody holds an *unheld* process. It is then in one of four situations, and the store decides which:

* **terminal**: finished, excepted or killed;
* **runnable**: not terminal, playing, nothing left to wait for and not set aside: somebody must claim it and step;
* **called**: it has messages in its inbox: somebody must claim it, apply them and let it go again (G10);
* **parked**: everything else; it costs nothing until a message or the end of a child changes that (G11).

Each operation answers with `Effects`: the pids that *became* runnable or called by it, and whose letters are news to
a holder. Whoever runs the store turns these into tasks and messages, in the same commit if it can. A task says no
more than "look at this pid"; all truth is here.

Requests and answers are plain data, so that the same ones go to a store in this thread, in another thread
or behind a broker. `Persister` is the asynchronous face that the runtime uses; `prunus.testing` has its
contract as a runnable suite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

TERMINAL_STATES = frozenset({"finished", "excepted", "killed"})
QUERY_LIMIT = 1000
"""The most rows that one query answers with."""


class NewProcess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A process to be kept from now on. Creating a pid that exists changes nothing (G6)."""

    pid: str
    class_id: str
    """``module:QualName`` of its class."""
    checkpoint: bytes
    parent: str | None = None
    tags: tuple[str, ...] = ()
    created_at: float
    """Wall clock, seconds since 1970; for showing only."""


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the history of a process: a transition of its state or of its play state, or a note."""

    subject: str
    """``created.running``, ``playing.paused``, ``set_aside`` ..."""
    at: float
    """Wall clock, seconds since 1970; for showing only."""
    step: str | None = None
    """The name of the step that led to it."""
    note: str | None = None
    by: str | None = None
    """The worker that made it (filled in by the store from the owner of the claim)."""
    seq: int = 0
    """Its number in the history of the process, from 1 (given by the store)."""


class Save(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A checkpoint and all that becomes true together with it."""

    pid: str
    epoch: int
    state: str
    play: str = "playing"
    checkpoint: bytes | None = None
    """None keeps the last one: of an excepted process, for `retry`; or while a step runs, to say something else."""
    result: bytes | None = None
    """The encoded `ProcessResult`; a terminal state without one is a `ValueError`."""
    status: str | None = None
    """A line for people."""
    step: str | None = None
    """The step that is next, for people."""
    events: tuple[Event, ...] = ()
    inbox_done: int = 0
    """The messages up to this number are dealt with."""
    children: tuple[NewProcess, ...] = ()
    """Created in the same commit; they become runnable."""
    waits: tuple[str, ...] = ()
    """With state ``waiting``: the pids that it waits for (those that have terminated already don't count).
    Waiting for a pid that does not exist is refused (`CheckpointNotFoundError`)."""
    letters: tuple[tuple[str, bytes], ...] = ()
    """Messages for the inboxes of other processes (pid, body), posted in the same commit; those to processes that
    are terminal or unknown are dropped."""
    suspended: bool = False
    """With state ``waiting``: it waits for a message (`resume`), so it is not runnable without one."""
    release: bool = False
    """Give up the claim. A terminal state gives it up in any case."""


class Letter(msgspec.Struct, frozen=True):
    """A message in the inbox of a process: its number and its opaque body."""

    seq: int
    body: bytes


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One row: what the store knows of a process."""

    pid: str
    class_id: str
    state: str
    play: str
    created_at: float
    updated_at: float
    epoch: int
    seq: int
    """How often it was saved."""
    parent: str | None = None
    owner: str | None = None
    status: str | None = None
    step: str | None = None
    aside: str | None = None
    tags: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()
    inbox_done: int = 0
    inbox_last: int = 0
    checkpoint: bytes | None = None
    """Only in the answers to `load` and `claim`."""
    result: bytes | None = None
    """Only in the answers to `load` and `claim`."""
    inbox: tuple[Letter, ...] = ()
    """The messages that are not dealt with yet; only in the answer to `load`."""

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL_STATES


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The right to write a process, and all that is needed to continue it."""

    record: Record
    """With its checkpoint. If the process is terminal nothing was claimed: `epoch` is 0. A process that was set
    aside can be claimed (to be killed, or to be set aside again)."""
    epoch: int
    inbox: tuple[Letter, ...] = ()
    results: dict[str, bytes] = {}
    """The encoded results of those that it waited for and that have terminated, by pid."""


class Saved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A save is durable."""

    seq: int
    inbox: tuple[Letter, ...] = ()
    """The messages that are not dealt with yet: a runner learns of them at each of its safe points."""


class Posted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message is durable in an inbox (`seq` > 0), or the process was terminal already (`seq` = 0)."""

    seq: int
    state: str
    owner: str | None = None
    """Who holds the process."""
    epoch: int = 0
    """Of its last claim: who claims it from now on gets a higher one, and the message."""


class Effects(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an operation made true of unheld processes."""

    runnable: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    nudged: tuple[tuple[str, str], ...] = ()
    """(owner, pid) of each held process that got a letter: its owner should read it now."""


class Query(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which processes: all conditions must hold; newest first. An empty tuple is no condition."""

    states: tuple[str, ...] = ()
    play: str | None = None
    class_id: str | None = None
    tag: str | None = None
    parent: str | None = None
    roots: bool = False
    """Only those without a parent."""
    aside: bool | None = None
    unfinished: bool = False
    """Only those that are not terminal."""
    limit: int = 50
    """1 to `QUERY_LIMIT`."""
    before: str | None = None
    """Only pids created before this one: the next page."""

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= QUERY_LIMIT:
            raise ValueError(f"a query answers with 1 to {QUERY_LIMIT} processes, not {self.limit}")


class Persister(Protocol):
    """Keeps processes. Every method is durable when it returns (for a store that is durable at all).

    Raises `StaleOwnerError` (save, release, set_aside under an old epoch), `CheckpointNotFoundError` (no
    such pid), `StoreFullError` (nothing was changed).
    """

    async def create(self, process: NewProcess) -> bool:
        """Keep a new process. False if the pid exists: then nothing changes."""
        ...

    async def claim(self, pid: str, owner: str, *, at: float) -> Claim:
        """Become its only writer, whoever was it before (G4). The history notes ``claimed`` at the wall time `at`."""
        ...

    async def save(self, save: Save) -> Saved:
        """Write a checkpoint and what belongs to it, all or nothing."""
        ...

    async def release(self, pid: str, epoch: int) -> None:
        """Give the process back as its last checkpoint has it; the unfinished step will run again."""
        ...

    async def set_aside(self, pid: str, epoch: int, reason: str) -> None:
        """It can't be continued for now: keep it, with the reason, until `revive`. Letters in its inbox stay there and
        do not call anybody (only a new one does)."""
        ...

    async def revive(self, pid: str) -> Record:
        """Continue an excepted or set-aside process from its last good checkpoint; else `InvalidStateError`."""
        ...

    async def post(self, pid: str, body: bytes) -> Posted:
        """Put a message into its inbox; it survives until the process has dealt with it."""
        ...

    async def load(self, pid: str) -> Record:
        """The row with checkpoint and result."""
        ...

    async def query(self, query: Query) -> Sequence[Record]:
        """The matching rows, newest first, without checkpoints."""
        ...

    async def history(self, pid: str) -> Sequence[Event]:
        """Its events, oldest first."""
        ...

    async def delete(self, pid: str) -> None:
        """Forget a terminal process that nobody waits for; else `InvalidStateError`."""
        ...
