"""What ``prunus top`` shows: pure functions from facts to rows, and from rows to lines of a given width.

Nothing here reads a clock, asks anybody or knows of a screen library: a line is a `rich.text.Text` of exactly the width
that it was asked for. What clients wrote is shown without anything that a terminal would obey (`display.plain`).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from rich.cells import cell_len
from rich.text import Text

from prunus.messaging.inventory import QueueStatistics
from prunus.persistence.persister import TERMINAL_STATES, Event, LogLine, Query, Record
from prunus.runtime.backend import BrokerStatus
from prunus.runtime.display import (
    as_yaml,
    awaited,
    class_name,
    how_to_continue,
    is_stuck,
    moment,
    peer,
    plain,
    short,
    trouble,
    without_our_frames,
)

RECENT_S = 60.0
"""How long a process that has ended stays among those that have not."""
SAMPLE_S = 1.0
"""A rate is measured over at least so long ..."""
SAMPLES = 60
"""... and so many of the last ones are kept."""
EVENTS_SHOWN = 12
LINES_SHOWN = 30
VALUES_SHOWN = 16
"""Lines of inputs, and of outputs."""
GIVE_WAY = ("starts", "cpu", "mem", "up")
"""The columns of the services that a narrow panel leaves out, in this order."""
ROOMY = 100
"""From so many columns on the services get the room that they need."""
MAX_CLASS_WIDTH = 32
MAX_PID_WIDTH = 15
MAX_GUIDE = 12
"""Of deeper rows only the last part of what leads to them is shown."""
STATE_WIDTH = len("! set aside")
WIDE = 100
"""From so many columns on there is room for bars and for the names of workers."""

PALETTE = {
    "created": "#8f8698",
    "running": "#8cc5d0",
    "waiting": "#8d9fd0",
    "finished": "#98bf96",
    "excepted": "#e08484",
    "killed": "#c284c6",
    "paused": "#dfb26c",
    "aside": "#e08484",
    "plum": "#c795bd",
    "dim": "#857c90",
    "faint": "#463f50",
    "text": "#ddd8e3",
    "good": "#98bf96",
    "warning": "#dfb26c",
    "bad": "#e08484",
}
"""Colours on a dark ground, by what they are for."""
_GLYPHS = {"created": "○", "running": "●", "waiting": "◌", "finished": "✓", "excepted": "✗", "killed": "✗"}
_PLAIN_GLYPHS = {"created": ".", "running": ">", "waiting": "-", "finished": "+", "excepted": "x", "killed": "x"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_PLAIN_BLOCKS = "_.:-=+*#"
_URGENCY = ("aside", "paused", "pausing", "excepted", "running", "waiting", "created", "killed", "finished")


# --- facts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Service:
    """The supervisor, the broker, or a worker."""

    name: str
    state: str
    """A `prunus.runtime.health.ServiceState` (``on its own``: no supervisor looks after it), or ``lost``: the
    broker does not hear it."""
    pid: int | None = None
    uptime_s: float | None = None
    cpu: float | None = None
    """In cores: 1.0 is one of them busy."""
    memory: int | None = None
    """Bytes."""
    restarts: int | None = None
    held: int | None = None
    """Tasks that it works on ..."""
    room: int | None = None
    """... and how many more it would take."""


@dataclass(frozen=True)
class Details:
    """All that is shown of one process."""

    record: Record
    inputs: object = None
    outputs: object = None
    failure: str | None = None
    """Why it failed, with the traceback."""
    events: tuple[Event, ...] = ()
    lines: tuple[LogLine, ...] = ()


@dataclass(frozen=True)
class Look:
    """What was true at one moment."""

    at: float
    """Wall clock, seconds since 1970."""
    status: BrokerStatus
    services: tuple[Service, ...] = ()
    records: tuple[Record, ...] = ()
    """Those that match the filter, the newest first."""
    is_cut: bool = False
    """There are more than these."""
    details: Details | None = None


# --- what is wished for -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Filter:
    """Which processes: every word must hold.

    ``state:waiting``, ``class:Eos``, ``tag:demo``, ``queue:gpu`` and ``worker:worker-1`` look there; any other word is
    looked for everywhere. Upper and lower case are the same; the beginning of a state is enough.
    """

    words: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> Filter:
        return cls(tuple(word for word in text.lower().split() if not word.endswith(":")))

    def holds(self, record: Record) -> bool:
        return all(_holds(word, record) for word in self.words)

    def narrow(self, query: Query) -> Query:
        """A query that the store can answer and that every matching process is among."""
        for word in self.words:
            name, colon, value = word.partition(":")
            if colon and name == "state":
                states = tuple(state for state in _GLYPHS if state.startswith(value))
                if states:
                    return msgspec.structs.replace(query, states=states)
        return query


def _holds(word: str, record: Record) -> bool:
    name, colon, value = word.partition(":")
    if colon and name in _FIELDS:
        return any(_matches(name, text.lower(), value) for text in _FIELDS[name](record))
    return any(word in text.lower() for read in _FIELDS.values() for text in read(record))


def _matches(name: str, text: str, value: str) -> bool:
    return text.startswith(value) if name == "state" else value in text


_FIELDS: dict[str, Callable[[Record], Iterable[str]]] = {
    "pid": lambda record: (record.pid,),
    "class": lambda record: (record.class_id,),
    "state": lambda record: (record.state, condition(record)),
    "step": lambda record: (record.step or "",),
    "tag": lambda record: record.tags,
    "queue": lambda record: (getattr(record, "queue", ""),),
    "worker": lambda record: (peer(record.owner),),
    "status": lambda record: (record.status or "", record.detail or "", record.aside or ""),
}

SORTS: dict[str, Callable[[Record], tuple[object, ...]]] = {
    "newest": lambda record: (-record.created_at,),
    "last change": lambda record: (-record.updated_at,),
    "state": lambda record: (_URGENCY.index(condition(record)), -record.created_at),
    "class": lambda record: (class_name(record.class_id).lower(), -record.created_at),
    "progress": lambda record: (-(record.progress if record.progress is not None else -1.0), -record.created_at),
}
"""The orders, by their names."""


def next_sort(name: str) -> str:
    """The one after it; after the last the first."""
    names = list(SORTS)
    return names[(names.index(name) + 1) % len(names)]


@dataclass(frozen=True)
class View:
    """What a person wants to see."""

    filter: Filter = field(default_factory=Filter)
    sort: str = "newest"
    tree: bool = True
    everything: bool = False
    """Also those that ended long ago."""
    wanted: int = 100
    """How many rows."""
    details_of: str | None = None
    """The pid of the process whose details are shown."""


# --- rows -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A process in its place."""

    record: Record
    guide: str = ""
    """What leads from its parent to it."""


def arrange(
    records: Sequence[Record], sort: str, *, tree: bool, live_first: bool = False, utf8: bool = True
) -> list[Row]:
    """The rows in the order of `sort`; in a tree children are below their parent, if it is there, the oldest first.

    With `live_first` what has ended comes after what goes on, so that many short processes do not hide the others.
    """
    ordered = sorted(records, key=SORTS[sort])
    if live_first:
        ordered.sort(key=lambda record: record.is_terminal)
    if not tree:
        return [Row(record) for record in ordered]
    present = {record.pid for record in ordered}
    children: dict[str, list[Record]] = {}
    for record in ordered:
        if record.parent in present and record.parent is not None:
            children.setdefault(record.parent, []).append(record)
    branch, last, line = ("├ ", "└ ", "│ ") if utf8 else ("|-", "`-", "| ")
    rows: list[Row] = []
    roots = [Row(record) for record in ordered if record.parent not in present]
    waiting = roots[::-1]
    while waiting:  # (no recursion: a chain of children may be thousands long)
        row = waiting.pop()
        rows.append(row)
        below = sorted(children.get(row.record.pid, ()), key=lambda child: child.created_at)
        lead = row.guide.replace(branch, line).replace(last, "  ")
        placed = [Row(child, lead + (last if child is below[-1] else branch)) for child in below]
        waiting += placed[::-1]
    return rows


def condition(record: Record) -> str:
    """The one word for how it is: its state, or why it does not go on."""
    if record.is_terminal:
        return record.state
    if record.aside is not None:
        return "aside"
    return record.state if record.play == "playing" else record.play


def what(record: Record, now: float) -> str:
    """What it says of itself, why it does not go on, or what it waits for."""
    if record.aside is not None and not record.is_terminal:
        return plain(" ".join(record.aside.split()))
    parts = [record.detail if not record.is_terminal else None, record.status]
    text = "  ".join(" ".join(part.split()) for part in parts if part)
    if text or record.is_terminal:
        return plain(text)
    if record.wake_at is not None and not record.waits and not record.names:
        return f"wakes in {brief(record.wake_at - now)}"
    return plain(f"waits for {awaited(record, now)}") if record.waits or record.names else ""


@dataclass(frozen=True)
class Columns:
    """How wide each column of the processes is; 0: it is not shown."""

    pid: int
    name: int
    state: int
    step: int
    bar: int
    age: int
    worker: int
    what: int
    width: int
    """Of all together."""

    @classmethod
    def fit(cls, width: int, rows: Sequence[Row]) -> Columns:
        """The columns for these rows, with a blank between them, on `width`."""
        pid = min(MAX_PID_WIDTH, max([8, *(len(short(row.record.pid)) for row in rows)]))
        longest = max(
            [5, *(min(MAX_GUIDE, len(row.guide)) + cell_len(class_name(row.record.class_id)) for row in rows)]
        )
        name = min(longest, MAX_CLASS_WIDTH if width >= WIDE else 18)
        steps = max([4, *(cell_len(row.record.step or "") for row in rows if not row.record.is_terminal)])
        step = min(steps, 18 if width >= WIDE else 10)
        has_progress = any(row.record.progress is not None for row in rows)
        bar = (13 if width >= WIDE else 5) if has_progress else 0
        owners = max([0, *(len(peer(row.record.owner)) for row in rows)])
        worker = min(owners, 12) if width >= WIDE else 0
        age = 6
        for _ in range(3):  # on a very narrow screen the step gives way, then the age, then the name
            fixed = [pid, name, STATE_WIDTH, step, bar, age, worker]
            left = width - sum(column + 1 for column in fixed if column)
            if left >= 0:
                break
            if step:
                step = 0
            elif age:
                age = 0
            else:
                name = max(5, name + left)
        return cls(pid, name, STATE_WIDTH, step, bar, age, worker, max(0, left), width)


def process_heading(columns: Columns) -> Text:
    """The names of the columns."""
    cells = [
        ("pid", columns.pid, False),
        ("class", columns.name, False),
        ("state", columns.state, False),
        ("step", columns.step, False),
        ("done", columns.bar, False),
        ("age", columns.age, True),
        ("worker", columns.worker, False),
        ("", columns.what, False),
    ]
    texts = (fitted(Text(text, PALETTE["dim"]), width, right=right) for text, width, right in cells if width)
    return fitted(_joined(texts), columns.width)


def process_line(row: Row, columns: Columns, now: float, *, utf8: bool = True) -> Text:
    """One process."""
    record, kind = row.record, condition(row.record)
    ended = record.is_terminal
    glyph = (_GLYPHS if utf8 else _PLAIN_GLYPHS).get(record.state, "?")
    if kind in ("aside", "paused", "pausing"):
        glyph = {"aside": "!", "paused": "‖", "pausing": "‖"}[kind] if utf8 else "!"
    colour = PALETTE.get("paused" if kind == "pausing" else kind, PALETTE["text"])
    name = Text.assemble(
        (row.guide[-MAX_GUIDE:], PALETTE["dim"]),
        (plain(class_name(record.class_id)), PALETTE["dim"] if ended else "" if row.guide else "bold"),
    )
    state = Text(f"{glyph} {'set aside' if kind == 'aside' else kind}", colour)
    lasted = (record.updated_at if ended else now) - record.created_at
    cells = [
        fitted(Text(plain(short(record.pid)), PALETTE["dim"]), columns.pid),
        fitted(name, columns.name),
        fitted(state, columns.state),
        fitted(Text("" if ended else plain(record.step or "")), columns.step),
        fitted(_done(record, columns.bar, utf8=utf8), columns.bar),
        fitted(Text(brief(lasted), PALETTE["dim"]), columns.age, right=True),
        fitted(Text(plain(peer(record.owner)), PALETTE["dim"]), columns.worker),
        fitted(Text(what(record, now), PALETTE["paused"] if is_stuck(record) else PALETTE["dim"]), columns.what),
    ]
    return fitted(_joined(cell for cell in cells if cell.plain), columns.width)


def _done(record: Record, width: int, *, utf8: bool) -> Text:
    if record.progress is None or record.is_terminal or not width:
        return Text()
    number = f"{min(1.0, max(0.0, record.progress)):>4.0%}"
    room = width - len(number) - 1
    if room < 4:
        return Text(number, PALETTE["running"])
    full = int(min(1.0, max(0.0, record.progress)) * room)
    on, off = ("━", "─") if utf8 else ("#", "-")
    return Text.assemble((on * full, PALETTE["running"]), (off * (room - full), PALETTE["faint"]), f" {number}")


def process_counts(look: Look, shown: int) -> str:
    """How many processes there are of each state, and how many are shown."""
    counts = {state: number for state, number in look.status.processes.items() if number}
    parts = [f"{counts[state]:,} {state}" for state in _GLYPHS if counts.get(state)]
    more = f"the first {shown:,} shown" if look.is_cut else ""
    return " · ".join(filter(None, [*parts, more])) or "none yet"


# --- queues and services ----------------------------------------------------------------------------


class Rates:
    """How much was done a second in each of the last `SAMPLES` stretches of time, by name.

    It is fed with counters. A counter that is lower than before (another broker counts now) begins anew.
    """

    def __init__(self) -> None:
        self._rates: dict[str, deque[float]] = {}
        self._last: dict[str, tuple[float, int]] = {}

    def observe(self, at_s: float, counters: Mapping[str, int]) -> None:
        """Take note of the counters at a time; times do not go back."""
        for name in [name for name in self._last if name not in counters]:
            del self._last[name], self._rates[name]
        for name, count in counters.items():
            before_s, before = self._last.get(name, (at_s, count))
            if count < before:
                self._last[name] = at_s, count
            elif at_s - before_s >= SAMPLE_S:
                self._rates.setdefault(name, deque(maxlen=SAMPLES)).append((count - before) / (at_s - before_s))
                self._last[name] = at_s, count
            else:
                self._last.setdefault(name, (before_s, before))
                self._rates.setdefault(name, deque(maxlen=SAMPLES))

    def of(self, name: str) -> list[float]:
        """The oldest first."""
        return list(self._rates.get(name, ()))


def sparkline(rates: Sequence[float], width: int, *, utf8: bool = True) -> str:
    """The newest rates as a picture of `width` columns, the newest at the right end."""
    blocks = _BLOCKS if utf8 else _PLAIN_BLOCKS
    shown = list(rates)[-width:] if width > 0 else []
    top = max([*shown, 1e-9])
    picture = "".join(blocks[min(len(blocks) - 1, int(rate / top * (len(blocks) - 1) + 0.5))] for rate in shown)
    return picture.rjust(max(0, width))


def queue_lines(status: BrokerStatus, rates: Rates, width: int, height: int, *, utf8: bool = True) -> list[Text]:
    """A heading and a line for each queue, those with the most to do first; of too many the others are counted."""
    numbers = ("ready", "delayed", "running", "dead")
    queues = sorted(status.queues.items(), key=lambda each: (-_load(each[1]), each[0]))
    name_width = min(16, max([5, *(cell_len(plain(name)) for name, _ in queues)]))
    spark = min(24, width - name_width - 4 * 8 - 10)
    if spark < 4:
        spark = 0
    tight = width - name_width - 4 * 8 - 9 < 0
    cell = 6 if tight else 7
    names = ("ready", "delay", "run", "dead") if tight else numbers
    heading = [fitted(Text("queue", PALETTE["dim"]), name_width)]
    heading += [fitted(Text(name, PALETTE["dim"]), cell, right=True) for name in names]
    heading += [fitted(Text("rate", PALETTE["dim"]), 8, right=True)]
    lines = [fitted(_joined(heading), width)]
    shown = queues if len(queues) < height else queues[: max(0, height - 2)]
    for name, queue in shown:
        stuck = queue.ready and not queue.subscribers
        cells = [fitted(Text(plain(name), "bold"), name_width)]
        cells += [
            fitted(_number(queue.ready, PALETTE["warning"] if stuck else PALETTE["text"]), cell, right=True),
            fitted(_number(queue.delayed + queue.blocked, PALETTE["text"]), cell, right=True),
            fitted(_number(queue.held, PALETTE["running"]), cell, right=True),
            fitted(_number(queue.dead, PALETTE["bad"]), cell, right=True),
            fitted(Text(f"{queue.settled_per_s:.1f}/s"), 8, right=True),
        ]
        if spark:
            found = rates.of(name)
            cells.append(Text(sparkline(found, spark, utf8=utf8), PALETTE["plum" if any(found) else "faint"]))
        lines.append(fitted(_joined(cells), width))
    if len(shown) < len(queues):
        lines.append(fitted(Text(f"and {len(queues) - len(shown)} more queues", PALETTE["dim"]), width))
    if not queues:
        lines.append(fitted(Text("no task was ever sent", PALETTE["dim"]), width))
    return lines


def service_lines(services: Sequence[Service], width: int, height: int, *, utf8: bool = True) -> list[Text]:
    """A heading and a line for each service; of too many those that need somebody come first."""
    heading = _service_heading(services)
    for name in GIVE_WAY:
        if _width_of(heading) > width:
            heading = [column for column in heading if column[0] != name]
    cells = [fitted(Text(name, PALETTE["dim"]), room, right=number > 0) for number, (name, room) in enumerate(heading)]
    lines = [fitted(_joined(cells), width)]
    kept = list(services)
    if len(kept) >= height:
        urgent = [service for service in kept if service.state != "running"]
        kept = [*urgent, *(service for service in kept if service.state == "running")][: max(0, height - 2)]
        kept.sort(key=list(services).index)
    for service in kept:
        lines.append(fitted(_joined(_service_cells(service, heading, utf8=utf8)), width))
    if len(kept) < len(services):
        lines.append(fitted(Text(f"and {len(services) - len(kept)} more", PALETTE["dim"]), width))
    return lines


def services_width(services: Sequence[Service], width: int) -> int:
    """How wide the panel of the services is on a screen of this width: as it needs, if the queues have room too."""
    usual = (width * 2) // 5
    return usual if width < ROOMY else max(usual, min(_width_of(_service_heading(services)) + 4, width // 2))


def _service_heading(services: Sequence[Service]) -> list[tuple[str, int]]:
    """The columns that there is something to say in, with their widths."""
    name_width = min(14, max([7, *(len(service.name) + 2 for service in services)]))
    heading: list[tuple[str, int]] = [("service", name_width)]
    if any(service.memory is not None for service in services):
        heading += [("cpu", 5), ("mem", 6)]
    heading += [("up", 6)]
    if any(service.restarts for service in services):
        heading += [("starts", 6)]
    if any(service.held is not None for service in services):
        heading += [("works on", 8)]
    return heading


def _width_of(heading: Sequence[tuple[str, int]]) -> int:
    return _joined([Text(" " * room) for _, room in heading]).cell_len


def _service_cells(service: Service, heading: Sequence[tuple[str, int]], *, utf8: bool) -> list[Text]:
    colours = {"running": PALETTE["good"], **dict.fromkeys(("starting", "ending", "on its own"), PALETTE["warning"])}
    colour = colours.get(service.state, PALETTE["bad"])
    glyph = ("●" if service.pid is not None else "○") if utf8 else ("*" if service.pid is not None else "-")
    if service.state not in ("running", "on its own", "ending"):
        return [Text.assemble((f"{glyph} ", colour), plain(service.name), (f"  {service.state}", colour))]
    load = "" if service.held is None else f"{service.held}"
    if service.held is not None and service.room is not None:
        load += f" of {service.held + service.room}"
    values = {
        "cpu": "" if service.cpu is None else f"{service.cpu:.0%}",
        "mem": "" if service.memory is None else size(service.memory),
        "up": "" if service.uptime_s is None else brief(service.uptime_s),
        "starts": "" if not service.restarts else f"+{service.restarts}",
        "works on": load,
    }
    busy = PALETTE["running"] if service.held else PALETTE["dim"]
    cells = [fitted(Text.assemble((f"{glyph} ", colour), plain(service.name)), heading[0][1])]
    styles = {"works on": busy, "starts": PALETTE["warning"]}
    for name, room in heading[1:]:
        cells.append(fitted(Text(values[name], styles.get(name, PALETTE["text"])), room, right=True))
    return cells


def headline(look: Look | None, place: str, trouble: str | None, width: int) -> Text:
    """The first line: which daemon, how it is, and the time of day."""
    left = Text.assemble((" prunus ", f"bold {PALETTE['plum']}"), (plain(place), "bold"))
    if trouble is not None:
        left.append(f"   {trouble}", f"bold {PALETTE['warning']}")
    elif look is None:
        left.append("   connecting ...", PALETTE["dim"])
    else:
        status = look.status
        parts = [f"broker up {brief(status.uptime_s)}", size(status.database_bytes) if status.database_bytes else ""]
        left.append("   " + "  ·  ".join(filter(None, parts)), PALETTE["dim"])
        if status.disk_full:
            left.append("   disk full: new work is refused", f"bold {PALETTE['bad']}")
    clock = "" if look is None else moment(look.at)[-8:] + " "
    return Text.assemble(fitted(left, max(0, width - len(clock))), (clock, PALETTE["dim"]))


# --- one process ------------------------------------------------------------------------------------


def details_text(details: Details, now: float, *, utf8: bool = True) -> Text:
    """All that is shown of one process, as text that may be wrapped."""
    record = details.record
    kind = condition(record)
    text = Text(overflow="fold")
    glyph = (_GLYPHS if utf8 else _PLAIN_GLYPHS).get(record.state, "?")
    text.append(f"{glyph} ", PALETTE.get(kind, ""))
    text.append(plain(class_name(record.class_id)), f"bold {PALETTE['plum']}")
    text.append(f"  {plain(record.pid)}\n", PALETTE["dim"])
    problem = trouble(record, details.events)
    lasted = (record.updated_at if record.is_terminal else now) - record.created_at
    state = record.state if kind == record.state else f"{record.state}, {'set aside' if kind == 'aside' else kind}"
    facts: dict[str, str | None] = {
        "state": state,
        "why": problem.why if problem else None,
        "what to do": problem.advice if problem else how_to_continue(record),
        "step": record.step if not record.is_terminal else None,
        "doing": " ".join(filter(None, [_percent(record), record.detail])) if not record.is_terminal else None,
        "status": record.status if not problem else None,
        "waits for": awaited(record, now) if not record.is_terminal else None,
        "worker": peer(record.owner),
        "begun": f"{moment(record.created_at)}, {'lasted' if record.is_terminal else 'here for'} {brief(lasted)}",
        "parent": short(record.parent) if record.parent else None,
        "tags": ", ".join(record.tags),
        "queue": _queue(record),
    }
    for name, value in facts.items():
        if value:
            text.append(f"{name:<11}", PALETTE["dim"])
            text.append(plain(" ".join(value.split())), PALETTE["paused"] if name == "what to do" else "")
            text.append("\n")
    _section(text, "inputs", _values(details.inputs))
    _section(text, "outputs", _values(details.outputs))
    _section(text, "failure", plain((details.failure or "").rstrip(), lines=True), PALETTE["bad"])
    events = [each for each in details.events if each.subject != "claimed"]
    if events:
        text.append("\nhistory\n", f"bold {PALETTE['plum']}")
        for event in events[-EVENTS_SHOWN:]:
            note = plain(" ".join((event.note or "").split()))
            text.append(f"{moment(event.at)[-8:]}  ", PALETTE["dim"])
            text.append(f"{plain(event.subject):<18}")
            text.append(f"{plain(event.step or ''):<12}{note}".rstrip() + "\n", PALETTE["dim"])
    if details.lines:
        text.append("\nlog\n", f"bold {PALETTE['plum']}")
        for line in details.lines[-LINES_SHOWN:]:
            bad = line.level in ("ERROR", "CRITICAL", "WARNING")
            text.append(f"{moment(line.at)[-8:]}  ", PALETTE["dim"])
            text.append(plain(without_our_frames(line.text).rstrip(), lines=True), PALETTE["warning"] if bad else "")
            text.append("\n")
    text.rstrip()
    return text


def _section(text: Text, name: str, content: str, style: str = "") -> None:
    if content:
        text.append(f"\n{name}\n", f"bold {PALETTE['plum']}")
        text.append(f"{content}\n", style)


def _values(value: object) -> str:
    if not value:
        return ""
    lines = plain(as_yaml(value), lines=True).splitlines()
    hidden = len(lines) - VALUES_SHOWN
    return "\n".join([*lines[:VALUES_SHOWN], *([f"... {hidden} more lines"] if hidden > 0 else [])])


def _percent(record: Record) -> str:
    return "" if record.progress is None else f"{record.progress:.0%}"


def _queue(record: Record) -> str | None:
    """Where its tasks go, if that is not what it is for all."""
    queue, priority = getattr(record, "queue", "default"), getattr(record, "priority", 0)
    resources = getattr(record, "resources", None) or {}
    parts = [queue if queue != "default" else "", f"priority {priority}" if priority else ""]
    parts += [f"{number} {name}" for name, number in resources.items()]
    return ", ".join(filter(None, parts)) or None


# --- text -------------------------------------------------------------------------------------------


def brief(seconds: float) -> str:
    """A duration in at most six characters."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days >= 1000:
        return f"{days // 365}y"
    if days:
        return f"{days}d{hours}h" if days < 100 else f"{days}d"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def size(number: float) -> str:
    """A number of bytes in at most six characters."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.0f} TB"


def fitted(text: Text, width: int, *, right: bool = False) -> Text:
    """The text on exactly `width` columns: cut with an ellipsis, or filled up."""
    if width <= 0:
        return Text()
    text = text.copy()
    if cell_len(text.plain) > width:
        text.truncate(width, overflow="ellipsis")
    missing = width - cell_len(text.plain)
    if missing and right:
        text.pad_left(missing)
    elif missing:
        text.pad_right(missing)
    return text


def _joined(cells: Iterable[Text]) -> Text:
    return Text(" ").join(cells)


def _number(number: int, style: str) -> Text:
    return Text(f"{number:,}", style) if number else Text("-", PALETTE["dim"])


def _load(queue: QueueStatistics) -> int:
    return queue.ready + queue.held + queue.delayed + queue.dead


def is_recent(record: Record, now: float) -> bool:
    """Whether it belongs to what goes on: it has not ended, or a moment ago."""
    return record.state not in TERMINAL_STATES or now - record.updated_at < RECENT_S


def merged(*pages: Iterable[Record]) -> list[Record]:
    """The rows of several answers, each process once (as the last one knows it), the newest first."""
    by_pid = {record.pid: record for record in itertools.chain(*pages)}
    return sorted(by_pid.values(), key=lambda record: record.created_at, reverse=True)
