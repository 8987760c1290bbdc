"""What people see of processes: pure functions from rows to text, tables and trees.

A pid is shown by its last `SHORT` characters (the beginnings of pids that were made at about the same time are
alike). Output that is not a terminal gets no colours and is never cut to a width; glyphs that the terminal
can't write are replaced by plain ones.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import measure_renderables
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree

from prunus.errors import PrunusError
from prunus.persistence.checkpoint import decode_checkpoint
from prunus.persistence.persister import DEFAULT_QUEUE, Event, LogLine, Record
from prunus.processes import waits

UUID_LENGTH = 36
SHORT = 8
"""How many characters of a pid are shown."""
BAR_WIDTH = 12
"""How many characters long a bar is."""
MAX_CHILDREN_SHOWN = 12
"""Of more children those are shown that people want to see, and the others are only counted."""
MIN_FAILED_SHOWN = 4
"""So many of them may be failed ones, also if others run."""
YAML_WIDTH = 90
UNBOUNDED_WIDTH = 10_000
COLUMN_GAP = 2
READABLE_WIDTH = 24
"""Texts in a column that is narrower are hard to read."""

_TRACEBACK = "Traceback (most recent call last):\n"
_OUR_FRAMES = re.compile(r'(?:  File "[^"]*[/\\]prunus[/\\]processes[/\\]\w+\.py", line .*\n(?:    .*\n)*)+')

_STYLES = {
    "created": "dim",
    "running": "cyan",
    "waiting": "blue",
    "finished": "green",
    "excepted": "red",
    "killed": "magenta",
}
_GLYPHS = {"created": "○", "running": "●", "waiting": "◌", "finished": "✓", "excepted": "✗", "killed": "✗"}
_PLAIN_GLYPHS = {"created": ".", "running": ">", "waiting": "-", "finished": "+", "excepted": "x", "killed": "x"}

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal would obey."""
_CONTROL_OR_LINE = re.compile(rf"{CONTROL.pattern}|[\t\n]")


@dataclass(frozen=True)
class Family:
    """A process and those that it submitted, oldest first."""

    record: Record
    children: tuple[Family, ...] = ()
    """Those that are shown, each with its own children; ..."""
    others: tuple[Record, ...] = ()
    """... and those that are only counted."""
    to_come: int = 0
    """How many children its fan-outs have yet to begin."""
    is_cut: bool = False
    """There are more children than were read. Those that were not read have ended."""

    def members(self) -> Iterable[Record]:
        """All rows that are shown, parents before children."""
        yield self.record
        for child in self.children:
            yield from child.members()

    def own_children(self) -> list[Record]:
        """The rows of its children, shown or not."""
        return [*(child.record for child in self.children), *self.others]

    @property
    def unread(self) -> int:
        """How many children were not read, as far as the numbers of the items of a fan-out tell."""
        if not self.is_cut:
            return 0
        numbers: dict[str, list[int]] = {}
        for child in self.own_children():
            prefix, _, number = child.pid.rpartition(".")
            if re.fullmatch(rf"{re.escape(self.record.pid)}\.[0-9]+", prefix) and number.isdecimal():
                numbers.setdefault(prefix, []).append(int(number))
        return sum(max(found) + 1 - len(found) for found in numbers.values())


class FittingTable(Table):
    """A table without lines that leaves out what matters least where there is no room for all of it: one column after
    another of `dispensable`, those in which nothing stands before the others."""

    def __init__(self, *columns: Column, dispensable: Sequence[str] = ()) -> None:
        super().__init__(*columns, box=None, pad_edge=False, padding=(0, COLUMN_GAP, 0, 0), header_style="bold")
        self.dispensable = dispensable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(self.columns)
        expendable = [column for name in self.dispensable for column in columns if column.header == name]
        for column in sorted(expendable, key=_says_something):
            if sum(_readable_width(each, console, options) for each in columns) <= options.max_width + COLUMN_GAP:
                break
            columns.remove(column)
        fitting = FittingTable(*(column.copy() for column in columns))
        for cells in zip(*(column.cells for column in columns), strict=True):
            fitting.add_row(*cells)
        yield from Table.__rich_console__(fitting, console, options)


def _says_something(column: Column) -> bool:
    return any(str(cell) not in ("", "-") for cell in column.cells)


def _readable_width(column: Column, console: Console, options: ConsoleOptions) -> int:
    """How wide a column must be to be read well, with the gap behind it."""
    cells = [column.header, *column.cells]
    width = measure_renderables(console, options.update(max_width=UNBOUNDED_WIDTH), cells).maximum
    return (width if column.no_wrap else min(width, READABLE_WIDTH)) + COLUMN_GAP


@dataclass(frozen=True)
class Trouble:
    """A process that does not go on by itself."""

    record: Record
    why: str
    advice: str
    """What a person can do."""


def console(*, stderr: bool = False, uncut: bool = False) -> Console:
    """Where to print to: as wide as the text needs if it is not a terminal; and if it is one, but nothing shall be cut
    (`uncut`): then it breaks the lines."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() and not uncut else UNBOUNDED_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=width is not None)


def show(console: Console, what: RenderableType, style: str | None = None) -> None:
    """Print it; without the spaces at the ends of lines if nobody can see them."""
    if console.is_terminal:
        console.print(what, style=style)
        return
    with console.capture() as capture:
        console.print(what, style=style)
    console.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def short(pid: str) -> str:
    """A pid as people see it: the end of a UUID (with the number of an item of a fan-out), any other as it is."""
    uuid, dot, item = pid.partition(".")
    return f"{uuid[-SHORT:]}{dot}{item}" if len(uuid) == UUID_LENGTH else pid


def word(text: str) -> str:
    """A text as one word of a command that people copy into a shell."""
    return shlex.quote(plain(text))


def peer(session: str | None) -> str:
    """A session as people see it: without the random part of its name."""
    return re.sub(r"-[0-9a-f]{32}$", "", session or "")


def class_name(class_id: str) -> str:
    return plain(class_id.rpartition(":")[2])


def span(seconds: float) -> str:
    """A duration in the two units that matter."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes} min {rest} s"
    days, hours = divmod(hours, 24)
    return f"{hours} h {minutes} min" if days == 0 else f"{days} d {hours} h"


def about(seconds: float) -> str:
    """The same in one unit where the second one does not matter: tables are narrow."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if 10 <= minutes < 60:
        return f"{minutes} min"
    return f"{hours} h" if 10 <= hours < 24 else span(seconds)


def duration(seconds: float) -> str:
    """The same, and milliseconds where they matter."""
    return f"{max(0.0, seconds) * 1000:.0f} ms" if seconds < 0.1 else span(seconds)


def count(number: int, noun: str) -> str:
    """``2,000 workers``, ``1 process``."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def clock(at: float, now: float) -> str:
    """A moment without its date, if it was today."""
    text = moment(at)
    return text[11:] if text[:10] == moment(now)[:10] else text


def lifetime(record: Record, now: float) -> str:
    """How long it has been there: until its end, or until now."""
    return span((record.updated_at if record.is_terminal else now) - record.created_at)


def state(record: Record, now: float | None = None) -> Text:
    """Its state, and what keeps it from going on; with `now` also how long its timer has to go."""
    text = _line("").append(record.state, _STYLES.get(record.state, ""))
    if record.is_terminal:
        return text
    if record.aside is not None:
        return text.append(", set aside", "bold red")
    if record.play != "playing":
        return text.append(f", {record.play}", "yellow")
    if now is not None and record.wake_at is not None:
        text.append(f", wakes in {about(record.wake_at - now)}")
    return text


def situation(record: Record) -> str:
    """What it says of itself, or why it does not go on. It changes only if the row does."""
    if record.aside is not None and not record.is_terminal:
        return one_line(record.aside)
    if record.status:
        return one_line(record.status)
    if not record.is_terminal and (record.waits or record.names):
        return f"waits for {awaited(msgspec.structs.replace(record, wake_at=None), 0.0)}"
    return ""


def awaited(record: Record, now: float) -> str:
    """What it waits for."""
    parts = []
    if record.waits:
        one = f"process {short(record.waits[0])}"
        parts.append(one if len(record.waits) == 1 else f"{len(record.waits)} processes")
    if record.names:
        parts.append(f"the message{'s' * (len(record.names) > 1)} {', '.join(record.names)}")
    if record.wake_at is not None:
        parts.append(f"the time {moment(record.wake_at)} (in {span(record.wake_at - now)})")
    return ", ".join(parts)


def trouble(record: Record, history: Sequence[Event]) -> Trouble | None:
    """Why a process does not go on by itself, and what to do. `record` is as `load` gives it."""
    pid = word(short(record.pid))
    if record.state == "excepted":
        why = next((event.note for event in reversed(history) if event.subject.endswith(".excepted")), None)
        advice = f"mend the cause, then `prunus retry {pid}` goes on from its last good checkpoint"
        return Trouble(record, why or "a step failed", advice)
    if record.is_terminal:
        return None
    if record.aside is not None:
        return Trouble(record, record.aside, f"mend the cause, then `prunus retry {pid}`")
    if record.play != "paused":
        return None
    pause = max((number for number, event in enumerate(history) if event.subject.endswith(".paused")), default=0)
    if snapshot_of(record).get("state", {}).get("effect") == "unknown":
        advice = f"`prunus play {pid}` runs the step again, `prunus settle {pid} [VALUE]` says what it returned"
    elif pause and history[pause - 1].subject == "failed":
        advice = f"`prunus logs {pid}` has the traceback; mend the cause, then `prunus play {pid}` tries again"
    else:
        advice = f"`prunus play {pid}` lets it go on"
    return Trouble(record, record.status or "", advice)


def how_to_continue(record: Record) -> str | None:
    """What makes a process go on that is held, or waits for somebody."""
    pid = word(short(record.pid))
    if record.is_terminal:
        return None
    if record.aside is not None:
        return f"`prunus retry {pid}` continues what is set aside"
    if record.play != "playing":
        return f"`prunus play {pid}` lets it go on"
    if record.names:
        commands = [f"`prunus send {pid} {word(name)} [VALUE]`" for name in record.names]
        return f"{' or '.join(commands)} sends what it waits for"
    return None


def snapshot_of(record: Record) -> dict[str, Any]:
    """Its last checkpoint as plain data, as far as it can be read here: the types of its values may be missing."""
    if record.checkpoint is None:
        return {}
    try:
        return decode_checkpoint(record.checkpoint).snapshot()
    except PrunusError:
        return {}


def still_to_begin(record: Record) -> int:
    """How many children its fan-outs have yet to begin."""
    if record.state != "waiting":
        return 0
    pending = snapshot_of(record).get("state", {}).get("pending", ())
    conditions = [waits.from_data(item["on"]) for item in pending if item.get("on")]
    return sum(each.fan.count - each.fan.next for each in conditions if isinstance(each, waits.OnMap))


def progress_text(record: Record) -> str:
    """What its running step says of itself: ``40 % relaxing``."""
    parts = [] if record.progress is None else [f"{record.progress:.0%}"]
    return " ".join([*parts, *([one_line(record.detail)] if record.detail else [])])


def progress_bar(record: Record, *, utf8: bool) -> str:
    """The same as a picture."""
    if record.progress is None:
        return one_line(record.detail or "")
    detail = one_line(record.detail or "")
    return " ".join(filter(None, [bar(record.progress, utf8=utf8), f"{record.progress:.0%}", detail]))


def bar(part: float, *, utf8: bool) -> str:
    """A part of 1 as a picture; it is full only at the end."""
    full, empty = ("█", "░") if utf8 else ("#", "-")
    done = int(min(1.0, max(0.0, part)) * BAR_WIDTH)
    return full * done + empty * (BAR_WIDTH - done)


def how_far(family: Family) -> tuple[int, int]:
    """How many of its children have ended, and how many it will have as far as is known."""
    children = family.own_children()
    ended = sum(child.is_terminal for child in children) + family.unread
    return ended, len(children) + family.unread + family.to_come


def children_text(family: Family) -> str:
    """How many of its children have ended, and how; "" without any."""
    children = family.own_children()
    ended, total = how_far(family)
    if not total:
        return ""
    if family.is_cut:
        return f"{ended} of {total} ended" if family.unread else f"more than {len(children)} children"
    failed = sum(child.state == "excepted" for child in children)
    return f"{ended} of {total} ended{f', {failed} excepted' if failed else ''}"


def log_line(line: LogLine, who: str = "") -> str:
    """One line of a process's log; `who` said it, if there are several."""
    where = "  ".join(filter(None, [line.step, line.source]))
    said = plain(f"{f'[{where}]  ' if where else ''}{without_our_frames(line.text).rstrip()}", lines=True)
    return f"{moment(line.at)}  {f'{who}  ' if who else ''}{line.level:<8}{said}"


def without_our_frames(traceback: str) -> str:
    """A traceback that begins where the user's code does: how the step was called is of no use to its author."""
    head, begin, rest = traceback.partition(_TRACEBACK)
    frames = _OUR_FRAMES.match(rest)
    if not begin or frames is None or not rest[frames.end() :].startswith("  File "):
        return traceback
    return f"{head}{begin}{rest[frames.end() :]}"


def process_table(
    records: Sequence[Record], now: float, *, nested: bool = True, wide: bool = False, utf8: bool = True
) -> Table:
    """One row a process. If `nested`, children are below their parent if it is among the rows, the oldest first.

    Queues and priorities have columns if one of the processes has others than most have; `wide` adds tags, keys and
    workers, and shows pids and classes in full.
    """
    has_queues = wide or any(record.queue != DEFAULT_QUEUE for record in records)
    has_priorities = wide or any(record.priority for record in records)
    columns = ["pid", "class", "state", *["queue"] * has_queues, *["priority"] * has_priorities, "step", "status"]
    table = plain_table(*columns, *["tags", "key", "worker"] * wide, "age", elastic=("class", "state", "status"))
    for column in table.columns:
        if column.header == "priority":
            column.justify = "right"
    present = {record.pid for record in records} if nested else set()
    children: dict[str | None, list[Record]] = {}
    for record in records:
        children.setdefault(record.parent if record.parent in present else None, []).append(record)

    def add(record: Record, depth: int) -> None:
        name = "  " * depth + (record.class_id if wide else class_name(record.class_id))
        cells: list[str | Text] = [record.pid if wide else short(record.pid), _line(name), state(record, now)]
        cells += [record.queue] * has_queues + [str(record.priority or "-")] * has_priorities
        cells += ["" if record.is_terminal else record.step or "", _line(what_of(record, utf8=utf8))]
        cells += [", ".join(record.tags), record.key or "", peer(record.owner)] * wide
        table.add_row(*cells, span(now - record.created_at))
        for child in reversed(children.get(record.pid, ())):
            add(child, depth + 1)

    for record in children.get(None, ()):
        add(record, 0)
    return table


def what_of(record: Record, *, utf8: bool) -> str:
    """What there is to say beside its state: how far its running step is, or its situation."""
    told = situation(record)
    if record.state == "running" and record.aside is None and (record.progress is not None or record.detail):
        return "  ".join(filter(None, [progress_bar(record, utf8=utf8), told]))
    return told


def plain_table(
    *columns: str, elastic: str | Sequence[str] | None = None, dispensable: Sequence[str] = ()
) -> FittingTable:
    """A table without lines that would only be in the way of `grep` and `cut`.

    On a terminal that is too narrow the columns `dispensable` are left out (see `FittingTable`); if that is not enough
    the columns `elastic` give way, the widest first, down to their titles.
    """
    table = FittingTable(dispensable=dispensable)
    give_way = (elastic,) if isinstance(elastic, str) else elastic or ()
    for column in columns:
        if column in give_way:
            table.add_column(column, overflow="fold", min_width=len(column))
        else:
            table.add_column(column, no_wrap=True, overflow="ellipsis")
    return table


def facts_table(facts: Mapping[str, str | Text | None]) -> Table:
    """Names and values; what is None is left out."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, COLUMN_GAP, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, value)
    return table


def history_table(events: Sequence[Event]) -> Table:
    """One row an event, with the time since the one before it.

    A worker that claims a process and finds that it has to wait on leaves nothing but the claim: of such only the last.
    """
    table = plain_table("time", "after", "event", "step", "by", "note", elastic="note")
    before = events[0].at if events else 0.0
    claims = 0
    for event, after in zip(events, [*events[1:], None], strict=True):
        claims = claims + 1 if event.subject == "claimed" else 0
        if claims and after is not None and after.subject == "claimed":
            continue
        note = f"the last of {claims} times" if claims > 1 else one_line(event.note or "")
        table.add_row(moment(event.at), span(event.at - before), event.subject, event.step or "", peer(event.by), note)
        before = event.at
    return table


def choose_children(rows: Sequence[Record]) -> set[str]:
    """The pids of the children that are shown, `MAX_CHILDREN_SHOWN` at most: all, or else those that people look for.

    First those that can't go on, then what runs or waits and what has failed.
    """
    if len(rows) <= MAX_CHILDREN_SHOWN:
        return {row.pid for row in rows}
    stuck = [row for row in rows if is_stuck(row)]
    live = [row for row in rows if row.state in ("running", "waiting") and not is_stuck(row)]
    failed = [row for row in rows if row.state in ("excepted", "killed")]
    room = max(0, MAX_CHILDREN_SHOWN - len(stuck))
    failures = failed[-min(room, max(MIN_FAILED_SHOWN, room - len(live))) :] if room else []
    shown = [*stuck[:MAX_CHILDREN_SHOWN], *failures, *live[: room - len(failures)]]
    return {row.pid for row in shown}


def is_stuck(record: Record) -> bool:
    """Whether somebody has to do something before it can go on."""
    return not record.is_terminal and (record.aside is not None or record.play == "paused")


def family_tree(family: Family, now: float, *, utf8: bool) -> Tree:
    """A process with its children below it; of many some are counted only."""
    glyphs = _GLYPHS if utf8 else _PLAIN_GLYPHS

    def label(family: Family) -> Text:
        record = family.record
        text = _line("")
        text.append(glyphs.get(record.state, "?"), _STYLES.get(record.state, ""))
        text.append(f" {class_name(record.class_id)} ", "bold" if record.parent is None else "")
        text.append(f"{short(record.pid)}  ", "dim")
        text.append_text(state(record, now))
        if not record.is_terminal:
            if record.step:
                text.append(f"  {record.step}")
            if picture := progress_bar(record, utf8=utf8):
                text.append(f"  {picture}", "cyan")
        if children := children_text(family):
            ended, total = how_far(family)
            if not record.is_terminal and (family.unread or not family.is_cut):
                text.append(f"  {bar(ended / total, utf8=utf8)}", "cyan")
            text.append(f"  {children}")
        text.append(f"  {lifetime(record, now)}", "dim")
        if what := situation(record):
            text.append(f"  {what}", "italic")
        return text

    def grow(branch: Tree, family: Family) -> Tree:
        for child in family.children:
            grow(branch.add(label(child)), child)
        if others := _others(family, glyphs):
            branch.add(others)
        return branch

    return grow(Tree(label(family), guide_style="dim"), family)


def children_tree(family: Family, now: float, *, utf8: bool) -> RenderableType:
    """Its children, each with its own below it, and how many there are."""
    trees: list[RenderableType] = [family_tree(child, now, utf8=utf8) for child in family.children]
    if family.others or family.to_come or family.is_cut:
        trees += [_others(family, _GLYPHS if utf8 else _PLAIN_GLYPHS), Text(children_text(family), "dim")]
    return Group(*trees)


def _others(family: Family, glyphs: Mapping[str, str]) -> Text:
    """How many children are not shown."""
    counts = Counter(record.state for record in family.others)
    found = [(name, style) for name, style in _STYLES.items() if counts[name]]
    texts = [Text(f"{glyphs[name]} {counts[name]} more {name}", style) for name, style in found]
    if family.is_cut:
        texts.append(Text(f"and {family.unread or 'some'} older ones that have ended", "dim"))
    return Text("  ").join(texts)


def progress(family: Family, now: float, troubles: Sequence[Trouble], *, utf8: bool) -> RenderableType:
    """The tree, and what to do about those that do not go on."""
    return Group(family_tree(family, now, utf8=utf8), *map(trouble_text, troubles))


def trouble_text(trouble: Trouble) -> Text:
    """Which process does not go on, why, and what to do."""
    record = trouble.record
    what = "is set aside" if record.aside is not None else f"is {record.play}"
    why = f": {one_line(trouble.why)}" if trouble.why else ""
    return Text.assemble(f"{short(record.pid)} {what}{why}\n", (f"-> {trouble.advice}", "bold"))


def as_yaml(value: Any) -> str:
    """Any value as YAML that people can read; what YAML lacks is shown as its text."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """One line a key; lists of short values on one line."""

    def show_list(dumper: Any, items: list[Any] | tuple[Any, ...]) -> Any:
        is_flat = not any(isinstance(item, list | tuple | dict) for item in items)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=is_flat)

    def show_text(dumper: Any, text: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(list, show_list)
    Dumper.add_representer(tuple, show_list)
    Dumper.add_representer(str, show_text)
    plain = msgspec.to_builtins(value, enc_hook=str, str_keys=True)
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=YAML_WIDTH).rstrip()


def as_json(value: Any) -> str:
    """Any value as JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode()


def record_as_data(record: Record) -> dict[str, Any]:
    """A row for programs: every fact under its name, also those that are empty."""
    hidden = {"checkpoint", "result", "inbox", "inbox_done", "inbox_last"}
    return {name: getattr(record, name) for name in record.__struct_fields__ if name not in hidden}


def family_as_data(family: Family) -> dict[str, Any]:
    """A process for programs, with its children in it."""
    return record_as_data(family.record) | {
        "children": [family_as_data(child) for child in family.children],
        "children_to_come": family.to_come,
        "children_not_read": family.unread,
    }


def _line(text: str) -> Text:
    """One line, cut where the terminal ends."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def plain(text: str, *, lines: bool = False) -> str:
    """The text without anything that a terminal would obey; with `lines` its ends of lines and tabs stay."""
    pattern = CONTROL if lines else _CONTROL_OR_LINE
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """The text without its line breaks, and without anything that a terminal would obey."""
    return plain(" ".join(text.split()))
