"""The seam behind which processes are kept: what can be asked of a store, and what it answers.

A store keeps one row a process. The process itself is opaque bytes (the checkpoint); beside them the row
holds the few facts that a store needs to find processes and to decide **who is runnable**:

===============  ==========================================================================================
fact             meaning
===============  ==========================================================================================
state, play      the two state machines, as text, for queries and for the decision below
epoch, owner     who may write. Every claim raises the epoch; a save under a lower one is refused
                 (`StaleOwnerError`, G4). `owner` is None while nobody holds the process
waits            *groups* of pids. A group is complete when **all** in it have ended; **any** complete group that
                 the process has not looked at yet makes it ready
wake_at          the wall-clock time at which it becomes ready
names, listens   the mail that it waits for, and for which of these names mail makes it ready
ready            it could take a step. A created or running process always could; a waiting one after one of the
                 three things above, until a save says anew what it waits for
inbox            *letters* to the process (pause, play, kill, resume ...), durable and in order. They stay
                 until a save says up to which one they are dealt with (`inbox_done`), so none is ever lost
mail             *named* messages to the process. They stay until a save says that it used them (`consumed`), and
                 call nobody unless the process waits for that name
aside            why the process can't be continued for now (its class is gone, its checkpoint is damaged)
===============  ==========================================================================================

Nobody holds an *unheld* process. It is then in one of four situations, and the store decides which:

* **terminal**: finished, excepted or killed;
* **runnable**: ready, playing and not set aside: somebody must claim it and step;
* **called**: it has letters in its inbox: somebody must claim it, apply them and let it go again (G10);
* **parked**: everything else; it costs nothing until a letter, or what it waits for, changes that (G11). A waiting
  process that names nothing to wait for is *suspended*: only a letter changes that.

Each operation answers with `Effects`: the pids that *became* runnable or called by it, and whose letters are news to
a holder. Whoever runs the store turns these into tasks and messages, in the same commit if it can. A task says no
more than "look at this pid"; all truth is here. The store has no clock of its own that rings: whoever runs it asks for
the next `wake_at` and has the timers fired.

Beside the row a process has a history (events), a log (lines), answers to letters (replies) and a few of its past
checkpoints, each of them bounded.

Requests and answers are plain data, so that the same ones go to a store in this thread, in another thread
or behind a broker. `Persister` is the asynchronous face that the runtime uses;
`prunus.testing.PersisterContract` is its contract as a runnable suite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

TERMINAL_STATES = frozenset({"finished", "excepted", "killed"})
QUERY_LIMIT = 1000
"""The most rows that one query answers with."""
LOG_LIMIT = 1000
"""The most lines of a log that one answer holds."""
MAX_LETTERS = 10_000
"""The most letters that wait in the inbox of one process; one more is refused."""
MAX_MAIL = 10_000
"""The most mail that one process has not consumed; more is refused."""
MAX_REPLIES = 1000
"""How many answers to its letters are kept of a process: the newest."""
MAX_LOG_LINES = 10_000
"""How many lines are kept of the log of a process: the newest (and at times up to a tenth more)."""
MAX_EVENTS = 10_000
"""How many events are kept of the history of a process (and at times up to a tenth more): the `FIRST_EVENTS` first and
the newest. Where some are left out, a last one of those (``thinned``) says how many."""
FIRST_EVENTS = 100
KEPT_STEPS = 64
"""How many past checkpoints are kept of a process: the newest."""

SECTIONS = ("mail", "replies", "steps", "events", "lines")
"""What belongs to a process beside its row, in the order in which it is copied."""
PORTION_BYTES = 1024 * 1024
"""A portion of a copy holds no more, unless one thing in it alone is larger."""
MAX_ARRIVAL_BYTES = 512 * 1024 * 1024
"""Of parcels that wait for `Persister.adopt`, all together."""
ARRIVAL_TIME_S = 3600.0
"""What arrived and was not adopted for so long is forgotten."""


DEFAULT_QUEUE = "default"
"""The queue of a process that names none."""
MAX_PRIORITY = 9
"""Goes first."""
MAX_NAME_CHARS = 255
"""Of a queue, a resource and a key."""
MAX_TOKENS = 2**31 - 1
"""Of one resource that one process holds."""


class NewProcess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A process to be kept from now on. Creating a pid or a key that exists changes nothing (G6)."""

    pid: str
    class_id: str
    """``module:QualName`` of its class."""
    checkpoint: bytes
    parent: str | None = None
    tags: tuple[str, ...] = ()
    parent_close: str = "kill"
    """What the end of its parent means for it: ``kill``, ``abandon`` or ``wait``. The store only compares it
    (`Tell.to`)."""
    created_at: float
    """Wall clock, seconds since 1970; for showing only."""
    state: str = "created"
    """``created``, or ``running`` if it goes on from the past checkpoint of another one."""
    play: str = "playing"
    """One that is not playing is not runnable."""
    step: str | None = None
    """The step that is next, for people."""
    status: str | None = None
    """A line for people."""
    queue: str = DEFAULT_QUEUE
    """Only workers that take this queue step it."""
    priority: int = 0
    """0 to `MAX_PRIORITY`, which goes first. Within one priority the deeper process does, then the older one."""
    resources: dict[str, int] = {}
    """The tokens (of resources that the broker counts) that it holds while a worker has it; parked it holds none."""
    key: str | None = None
    """A second name that its caller chose, for as long as the process is kept. Children have none: their parent may
    wait for the pid that it gave them."""


class Created(msgspec.Struct, frozen=True):
    """The process that is kept now."""

    pid: str
    """The one that was asked for, or the one that has the key."""
    is_new: bool
    """Or it was there already, and nothing changed."""


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


class Reply(msgspec.Struct, frozen=True):
    """The answer to the letter `seq` of the process that is saved, opaque."""

    seq: int
    body: bytes


class Tell(msgspec.Struct, frozen=True, omit_defaults=True):
    """A letter for each child of the process that is saved, as long as the child has not ended."""

    body: bytes
    to: tuple[str, ...] = ("kill", "abandon", "wait")
    """To those whose `parent_close` is one of these."""


class LogLine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the log of a process: what its steps say."""

    at: float
    """Wall clock, seconds since 1970; for showing only."""
    text: str
    level: str = "REPORT"
    source: str | None = None
    step: str | None = None
    seq: int = 0
    """Its number in the log of the process, from 1 (given by the store)."""


class Save(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A checkpoint and all that becomes true together with it."""

    pid: str
    epoch: int
    state: str
    play: str = "playing"
    checkpoint: bytes | None = None
    """None keeps the last one: of an excepted process, for `retry`; or while a step runs, to say something else."""
    keep_as: str | None = None
    """The name of a step: `checkpoint` is also kept under it, among the `KEPT_STEPS` newest of the process, so that a
    new process can go on from there. Without a checkpoint it is a `ValueError`."""
    result: bytes | None = None
    """The encoded `ProcessResult`; a terminal state without one is a `ValueError`."""
    status: str | None = None
    """A line for people."""
    step: str | None = None
    """The step that is next, for people."""
    progress: float | None = None
    """How far the running step is, 0 to 1, for people."""
    detail: str | None = None
    """What the running step does just now, for people."""
    events: tuple[Event, ...] = ()
    lines: tuple[LogLine, ...] = ()
    """Appended to its log."""
    inbox_done: int = 0
    """The letters up to this number are dealt with."""
    replies: tuple[Reply, ...] = ()
    """Answers to letters, for who posted them; the newest `MAX_REPLIES` of the process are kept."""
    consumed: tuple[int, ...] = ()
    """The numbers of the mail that is used up."""
    children: tuple[NewProcess, ...] = ()
    """Created in the same commit; they become runnable unless they are paused."""
    tells: tuple[Tell, ...] = ()
    """Letters for its children, those of this very save too, posted in the same commit. They are taken also by a full
    inbox. Each costs three statements, whatever the number of children: about 3 us a child that is told (0.3 s for
    100,000), and less than 1 us for one that has ended."""
    waits: tuple[tuple[str, ...], ...] = ()
    """With state ``waiting``: the groups of pids that it waits for. Waiting for a pid that does not exist is refused
    (`CheckpointNotFoundError`); a group without a pid is a `ValueError`. Saying the same ones again costs no write."""
    seen: tuple[str, ...] = ()
    """Of these the saver knows that they have ended. A complete group of which it has seen all does not make it ready:
    it looked at that one already, and something else is missing. A complete group with news does, at once."""
    wake_at: float | None = None
    """With state ``waiting``: it becomes ready at this wall time (seconds since 1970), at once if that is over."""
    names: tuple[str, ...] = ()
    """With state ``waiting``: the names of the mail that it waits for. A claim brings the oldest of each."""
    listens: tuple[str, ...] = ()
    """Those of `names` for which mail, there already or to come, makes it ready; others are a `ValueError`."""
    release: bool = False
    """Give up the claim. A terminal state gives it up in any case."""


class Note(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a running step says, without a checkpoint. None leaves what was said before."""

    pid: str
    epoch: int
    lines: tuple[LogLine, ...] = ()
    """Appended to its log."""
    progress: float | None = None
    detail: str | None = None
    status: str | None = None


class Letter(msgspec.Struct, frozen=True):
    """A control message in the inbox of a process: its number and its opaque body."""

    seq: int
    body: bytes


class Mail(msgspec.Struct, frozen=True):
    """A named message to a process that it has not consumed yet."""

    seq: int
    """Its number among the mail of the process, from 1."""
    name: str
    body: bytes
    at: float
    """Wall clock of the sender, seconds since 1970; for showing only."""
    sender: str | None = None


class Past(msgspec.Struct, frozen=True):
    """A checkpoint that is kept under the name of the step that was next."""

    seq: int
    """The number of its save."""
    step: str
    at: float
    """Wall clock, seconds since 1970; for showing only."""


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
    parent_close: str = "kill"
    owner: str | None = None
    status: str | None = None
    step: str | None = None
    progress: float | None = None
    detail: str | None = None
    aside: str | None = None
    tags: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()
    """The pids that it waits for and that have not ended yet."""
    wake_at: float | None = None
    """When its timer fires; None if it has none, or it has fired."""
    names: tuple[str, ...] = ()
    """The names of the mail that it waits for."""
    mail: int = 0
    """How much mail it has not consumed."""
    queue: str = DEFAULT_QUEUE
    priority: int = 0
    resources: dict[str, int] = {}
    key: str | None = None
    depth: int = 0
    """How many processes are above it: 0 without a parent, else one more than its parent has."""
    crashes: int = 0
    """How many workers died in its step, since it began the step."""
    suspect: bool = False
    """One more of these sets it aside: its step runs on a worker that has no other such one. Only in the answers to
    `load` and `claim`."""
    inbox_done: int = 0
    inbox_last: int = 0
    checkpoint: bytes | None = None
    """Only in the answers to `load` and `claim`."""
    result: bytes | None = None
    """Only in the answers to `load` and `claim`."""
    inbox: tuple[Letter, ...] = ()
    """The letters that are not dealt with yet; only in the answer to `load`."""

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
    """The encoded results of those in its groups that have ended, by pid, in the order in which they did."""
    mail: tuple[Mail, ...] = ()
    """For each name that it waits for the oldest mail that it has not consumed, if there is any."""


class Saved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A save is durable."""

    seq: int
    inbox: tuple[Letter, ...] = ()
    """The letters that are not dealt with yet: a runner learns of them at each of its safe points."""


class Posted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A letter or mail is durable (`seq` > 0), or the process had ended already (`seq` = 0)."""

    seq: int
    state: str
    owner: str | None = None
    """Who holds the process."""
    epoch: int = 0
    """Of its last claim: who claims it from now on gets a higher one, and the letter."""
    nobody_reads: bool = False
    """Nobody holds the process, and there is no worker that would read the letter to it. Only a broker knows that."""


class Cursor(msgspec.Struct, frozen=True):
    """Where the copy of a process goes on."""

    section: str
    """One of `SECTIONS`."""
    after: int
    """The number of the last one of it that is copied."""
    save: int
    """`Record.seq` when the copy began."""


class Kept(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The heart of a process that is copied: what has to be of one moment."""

    record: Record
    """With its checkpoint, its result and the letters that are not dealt with."""
    good_state: str
    """The state of the last checkpoint that is no end: `revive` leads to it."""
    groups: tuple[tuple[str, ...], ...] = ()
    """The pids that it waits for, also those that have ended."""
    listens: tuple[str, ...] = ()
    mail_last: int = 0
    """The number of its newest mail."""
    events_last: int = 0
    """The number of the newest event; a copy that is made slowly may have later ones."""
    lines_last: int = 0
    """The same of its log."""
    is_held_back: bool = False
    """It is paused only because it came from elsewhere: its history says so, with `Record.status` as the reason."""


class PastStep(msgspec.Struct, frozen=True):
    """A past checkpoint, whole."""

    seq: int
    step: str
    at: float
    checkpoint: bytes


class Portion(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of the copy of a process, in the order of the fields; the first one alone has `kept`."""

    pid: str
    kept: Kept | None = None
    mail: tuple[Mail, ...] = ()
    replies: tuple[Reply, ...] = ()
    steps: tuple[PastStep, ...] = ()
    events: tuple[Event, ...] = ()
    lines: tuple[LogLine, ...] = ()
    next: Cursor | None = None
    """Where the next portion begins; None: this was the last one."""


class Adopted(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of processes that came from elsewhere."""

    pids: tuple[str, ...] = ()
    """They are kept now."""
    skipped: tuple[str, ...] = ()
    """These were there already, and are as they were."""


class Route(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a runnable process goes, and when."""

    queue: str = DEFAULT_QUEUE
    priority: int = 0
    resources: dict[str, int] = {}
    depth: int = 0


PLAIN = Route()
"""That of most processes without a parent."""


class Effects(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an operation made true of unheld processes."""

    runnable: tuple[str, ...] = ()
    called: tuple[str, ...] = ()
    nudged: tuple[tuple[str, str], ...] = ()
    """(owner, pid) of each held process that got a letter: its owner should read it now."""
    routes: dict[str, Route] = {}
    """Of those that are runnable, as far as they are not `PLAIN`."""


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
    limit: int | None = None
    """At most so many, 1 to `QUERY_LIMIT`. None: as many as one answer of a store holds, which is `QUERY_LIMIT`."""
    before: str | None = None
    """Only pids created before this one: the next page."""
    prefix: str | None = None
    """Only pids that begin or end with this text: what a short pid may mean."""
    queue: str | None = None
    key: str | None = None
    created_before: float | None = None
    """Wall clock, seconds since 1970."""
    updated_before: float | None = None
    """Wall clock, seconds since 1970: nothing was saved or said of it since. For one that has ended: it did before."""

    def __post_init__(self) -> None:
        if not 1 <= self.at_most <= QUERY_LIMIT:
            raise ValueError(f"a query answers with 1 to {QUERY_LIMIT} processes, not {self.limit}")

    @property
    def at_most(self) -> int:
        """How many processes an answer of a store has at most."""
        return QUERY_LIMIT if self.limit is None else self.limit


class Persister(Protocol):
    """Keeps processes. Every method is durable when it returns (for a store that is durable at all).

    Raises `StaleOwnerError` (save, note, release, set_aside under an old epoch), `CheckpointNotFoundError` (no
    such pid), `StoreFullError` (nothing was changed), `ValueError` for what can't be meant.
    """

    async def create(self, process: NewProcess) -> Created:
        """Keep a new process. If its pid exists, or a process that is kept has its key (whatever its state), nothing
        changes, and that one is the answer.

        `UnknownResourceError` if it needs a resource that the broker does not have (so much of).
        """
        ...

    async def claim(self, pid: str, owner: str, *, at: float) -> Claim:
        """Become its only writer, whoever was it before (G4). The history notes ``claimed`` at the wall time `at`."""
        ...

    async def save(self, save: Save) -> Saved:
        """Write a checkpoint and what belongs to it, all or nothing."""
        ...

    async def note(self, note: Note) -> None:
        """Say something of the running step. No save: `Record.seq` stays as it is."""
        ...

    async def release(self, pid: str, epoch: int) -> None:
        """Give the process back as its last checkpoint has it; the unfinished step will run again."""
        ...

    async def set_aside(self, pid: str, epoch: int, reason: str) -> None:
        """It can't be continued for now: keep it, with the reason, until `revive`. Letters in its inbox stay there and
        do not call anybody (only a new one does)."""
        ...

    async def revive(self, pid: str) -> Record:
        """Continue an excepted or set-aside process from its last good checkpoint; else `InvalidStateError`.

        If it was waiting then, it is ready once, so that somebody looks at its waits again. Those that wait for it
        themselves wait again, until its next end.
        """
        ...

    async def post(self, pid: str, body: bytes) -> Posted:
        """Put a letter into its inbox; it survives until the process has dealt with it. `BusyError` if `MAX_LETTERS`
        are there."""
        ...

    async def reply(self, pid: str, seq: int) -> bytes | None:
        """The answer to its letter `seq`; None if there is none (yet, or no more)."""
        ...

    async def send(self, pid: str, name: str, body: bytes, *, at: float, sender: str | None = None) -> Posted:
        """Send it the mail `name`; it is kept until the process has consumed it, also while nobody waits for it.
        `BusyError` if `MAX_MAIL` are there. The mail of an excepted process is kept for its revival, that of one that
        finished or was killed is not."""
        ...

    async def load(self, pid: str) -> Record:
        """The row with checkpoint and result."""
        ...

    async def query(self, query: Query) -> Sequence[Record]:
        """The matching rows, newest first, without checkpoints."""
        ...

    async def history(self, pid: str, after: int = 0) -> Sequence[Event]:
        """Its events with a number above `after`, oldest first, as far as they are kept (`MAX_EVENTS`)."""
        ...

    async def log(
        self, pid: str, after: int = 0, limit: int = LOG_LIMIT, *, last: int | None = None
    ) -> Sequence[LogLine]:
        """Of the lines of its log with a number above `after` the first `limit`, or the `last` newest; oldest first.
        One answer holds 1 to `LOG_LIMIT` lines."""
        ...

    async def past(self, pid: str) -> Sequence[Past]:
        """The past checkpoints that are kept of it (`Save.keep_as`), oldest first."""
        ...

    async def past_checkpoint(self, pid: str, seq: int) -> bytes:
        """One of these; `InvalidStateError` if it is not kept (any more)."""
        ...

    async def delete(self, pid: str) -> None:
        """Forget a terminal process that nobody waits for; else `InvalidStateError`."""
        ...

    async def prune(self, query: Query) -> int:
        """Forget up to `query.limit` of the matching processes that have ended, that nobody waits for and whose
        children have all ended; how many it were. The longest ended go first. `query.before` is a `ValueError`."""
        ...

    async def export(self, pid: str, after: Cursor | None = None) -> Portion:
        """The copy of a process, portion by portion; `after` is the `Portion.next` of the one before.

        Nothing is changed by it, and the process goes on. `BusyError` if it went on so far that its mail does not fit
        to its checkpoint any more: begin again.
        """
        ...

    async def stage(self, arrival: str, number: int, portions: Sequence[Portion]) -> None:
        """Put down a parcel of what is to be adopted under the name `arrival`, the `number`th from 0 on. It is no
        process yet, and is forgotten after `ARRIVAL_TIME_S`. Saying it again is harmless. `BusyError` if
        `MAX_ARRIVAL_BYTES` are there."""
        ...

    async def adopt(self, arrival: str, parcels: int, source: str, *, skip_existing: bool = False) -> Adopted:
        """Keep the processes of which all these parcels were staged, all of them or none.

        They are as they were, `source` is noted in their histories, and nobody holds them. A living one that is not
        playing waits for a `play`; one that is playing is runnable, also to look at its waits. For whoever forgets
        what has ended long ago they end now.

        `ArchiveError` if something is missing or can't be meant, if a key is taken, or a pid is (with `skip_existing`
        that one is left as it is).
        """
        ...
