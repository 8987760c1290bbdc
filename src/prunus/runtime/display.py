"""What people see of processes: pure functions from rows to text, tables and trees.

A pid is shown by its last `SHORT` characters (the beginnings of pids that were made at about the same time are
alike). Output that is not a terminal gets no colours and is never cut to a width; glyphs that the terminal
can't write are replaced by plain ones.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from prunus.persistence.persister import Event, Record

SHORT = 8
"""How many characters of a pid are shown."""
MAX_CHILDREN_SHOWN = 12
"""Of more children, those that are done are only counted."""
UNBOUNDED_WIDTH = 10_000

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


@dataclass(frozen=True)
class Family:
    """A process and all that it submitted, oldest first."""

    record: Record
    children: tuple[Family, ...] = ()

    def members(self) -> Iterable[Record]:
        """All rows, parents before children."""
        yield self.record
        for child in self.children:
            yield from child.members()


def console(*, stderr: bool = False) -> Console:
    """Where to print to: as wide as the text needs if it is not a terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else UNBOUNDED_WIDTH
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
    """A pid as people see it: the end of a UUID, any other as it is."""
    return pid[-SHORT:] if len(pid) == 36 else pid


def peer(session: str | None) -> str:
    """A session as people see it: without the random part of its name."""
    return re.sub(r"-[0-9a-f]{32}$", "", session or "")


def class_name(class_id: str) -> str:
    return class_id.rpartition(":")[2]


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


def moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def lifetime(record: Record, now: float) -> str:
    """How long it has been there: until its end, or until now."""
    return span((record.updated_at if record.is_terminal else now) - record.created_at)


def state(record: Record) -> Text:
    """Its state, and what keeps it from going on."""
    text = Text(record.state, _STYLES.get(record.state, ""))
    if not record.is_terminal:
        if record.aside is not None:
            text.append(", set aside", "bold red")
        elif record.play != "playing":
            text.append(f", {record.play}", "yellow")
    return text


def situation(record: Record) -> str:
    """What it says of itself, or why it does not go on."""
    if record.aside is not None and not record.is_terminal:
        return _one_line(record.aside)
    if record.status:
        return _one_line(record.status)
    if record.waits and not record.is_terminal:
        return f"waits for {len(record.waits)} other{'s' if len(record.waits) > 1 else ''}"
    return ""


def process_table(records: Sequence[Record], now: float) -> Table:
    """One row a process; children are below their parent, if it is among the rows, the oldest first."""
    table = plain_table("pid", "class", "state", "step", "status", "age")
    present = {record.pid for record in records}
    children: dict[str | None, list[Record]] = {}
    for record in records:
        children.setdefault(record.parent if record.parent in present else None, []).append(record)

    def add(record: Record, depth: int) -> None:
        name = "  " * depth + class_name(record.class_id)
        step = "" if record.is_terminal else record.step or ""
        age = span(now - record.created_at)
        table.add_row(short(record.pid), name, state(record), step, situation(record), age)
        for child in reversed(children.get(record.pid, ())):
            add(child, depth + 1)

    for record in children.get(None, ()):
        add(record, 0)
    return table


def plain_table(*columns: str) -> Table:
    """A table without lines that would only be in the way of `grep` and `cut`."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    return table


def facts_table(facts: Mapping[str, str | Text | None]) -> Table:
    """Names and values; what is None is left out."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value is not None:
            table.add_row(name, value)
    return table


def history_table(events: Sequence[Event]) -> Table:
    """One row an event, with the time since the one before it."""
    table = plain_table("time", "after", "event", "step", "by", "note")
    before = events[0].at if events else 0.0
    for event in events:
        row = (event.subject, event.step or "", peer(event.by), _one_line(event.note or ""))
        table.add_row(moment(event.at), span(event.at - before), *row)
        before = event.at
    return table


def family_tree(family: Family, now: float, *, utf8: bool) -> Tree:
    """A process with its children below it; many that are done are counted only."""

    def label(record: Record) -> Text:
        glyphs = _GLYPHS if utf8 else _PLAIN_GLYPHS
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(glyphs.get(record.state, "?"), _STYLES.get(record.state, ""))
        text.append(f" {class_name(record.class_id)} ", "bold" if record.parent is None else "")
        text.append(f"{short(record.pid)}  ", "dim")
        text.append_text(state(record))
        if record.step and not record.is_terminal:
            text.append(f"  {record.step}")
        if what := situation(record):
            text.append(f"  {what}", "italic")
        return text.append(f"  {lifetime(record, now)}", "dim")

    def grow(branch: Tree, family: Family) -> None:
        hidden = 0
        for child in family.children:
            if len(family.children) > MAX_CHILDREN_SHOWN and child.record.state == "finished":
                hidden += 1
            else:
                grow(branch.add(label(child.record)), child)
        if hidden:
            glyph = (_GLYPHS if utf8 else _PLAIN_GLYPHS)["finished"]
            branch.add(Text(f"{glyph} {hidden} more have finished", "green"))

    tree = Tree(label(family.record), guide_style="dim")
    grow(tree, family)
    return tree


def progress(family: Family, now: float, *, utf8: bool) -> RenderableType:
    """The tree, and how far it is."""
    members = list(family.members())
    done = sum(record.is_terminal for record in members)
    return Group(family_tree(family, now, utf8=utf8), Text(f"{done} of {len(members)} have ended", "dim"))


def as_yaml(value: Any) -> str:
    """Any value as YAML that people can read; what YAML lacks is shown as its text."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """One line a key; lists of short values on one line."""

    def show_list(dumper: Any, items: list[Any]) -> Any:
        is_flat = not any(isinstance(item, list | dict) for item in items)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=is_flat)

    Dumper.add_representer(list, show_list)
    plain = msgspec.to_builtins(value, enc_hook=str, str_keys=True)
    return yaml.dump(plain, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100).rstrip()


def as_json(value: Any) -> str:
    """Any value as JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=str), indent=2).decode()


def record_as_data(record: Record) -> dict[str, Any]:
    """A row for programs: every fact under its name, also those that are empty."""
    hidden = {"checkpoint", "result", "inbox", "inbox_done", "inbox_last"}
    return {name: getattr(record, name) for name in record.__struct_fields__ if name not in hidden}


def _one_line(text: str) -> str:
    return " ".join(text.split())
