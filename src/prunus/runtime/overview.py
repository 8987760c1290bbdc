"""What people see of a broker: pure functions from its statistics and tasks to tables and text.

Names, reasons and bodies come from clients: what of them a terminal would obey is shown as an escape sequence in
letters (`plain`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prunus.messaging.inventory import QueueLimits, QueueStatistics, SessionStatistics, TaskInfo
from prunus.persistence.persister import Record
from prunus.runtime import display
from prunus.runtime.backend import BrokerStatus
from prunus.runtime.display import (
    CONTROL,
    about,
    class_name,
    count,
    facts_table,
    moment,
    peer,
    plain,
    plain_table,
    short,
    span,
)

HEX_BYTES = 256
"""Of a body that is no text."""
BYTES_A_LINE = 16
SILENT_S = 10.0
"""A session that was not heard for so long is shown in another colour."""

_PLACE_STYLES = {"ready": "cyan", "delayed": "dim", "blocked": "dim", "held": "green", "dead": "red", "settled": "dim"}


def broker_picture(status: BrokerStatus, here: str) -> RenderableType:
    """Everything: facts, queues, resources, sessions. `here` is this host, as sessions name theirs."""
    parts: list[RenderableType] = [facts_table(broker_facts(status)), Text()]
    parts.append(queue_table(status) if status.queues else Text("No queue yet."))
    if status.resources:
        parts += [Text(), resource_table(status)]
    parts += [Text(), session_table(status, here)]
    return Group(*parts)


def broker_facts(status: BrokerStatus) -> dict[str, str | Text | None]:
    """What is true of the broker as a whole."""
    trouble = {
        "frames that were no message": status.protocol_errors,
        "refused connections": status.refused_connections,
        "messages beyond their role": status.not_permitted,
        "broadcasts missed": status.broadcasts_missed,
    }
    counts = ", ".join(f"{number:,} {state}" for state, number in status.processes.items() if number)
    return {
        "broker": f"pid {status.pid}, epoch {status.broker_epoch}, up for {span(status.uptime_s)}",
        "disk": Text("full: new work is refused; free some space", "bold red") if status.disk_full else None,
        "database": size(status.database_bytes),
        "processes": counts or None,
        "tasks": f"{status.accepted:,} accepted, {status.delivered:,} delivered, {status.settled:,} settled since then",
        "traffic": ", ".join(
            count(number, noun)
            for number, noun in ((status.frames, "frame"), (status.commits, "commit"), (status.calls, "call"))
        ),
        "questions": f"{status.questions:,} open, {count(status.identifiers, 'name')} that "
        f"{'answers' if status.identifiers == 1 else 'answer'}",
        "trouble": Text(", ".join(f"{number:,} {what}" for what, number in trouble.items() if number), "yellow")
        if any(trouble.values())
        else None,
    }


def queue_table(status: BrokerStatus) -> Table:
    """One row a queue."""
    numbers = ("ready", "delayed", "blocked", "held", "dead", "oldest", "held for", "in/s", "out/s", "room")
    table = plain_table(
        "queue", *numbers, "limits", elastic="limits", dispensable=("limits", "held for", "blocked", "delayed")
    )
    for column in table.columns[1:-1]:
        column.justify = "right"
    for name, queue in sorted(status.queues.items()):
        table.add_row(plain(name), *queue_cells(queue), limits_text(queue.limits))
    return table


def queue_cells(queue: QueueStatistics) -> list[str | Text]:
    stuck = queue.ready and not queue.subscribers
    return [
        Text(f"{queue.ready:,}", "yellow" if stuck else ""),
        _number(queue.delayed),
        _number(queue.blocked),
        _number(queue.held),
        Text(_number(queue.dead), "red" if queue.dead else ""),
        "" if queue.oldest_s is None else about(queue.oldest_s),
        "" if queue.longest_held_s is None else about(queue.longest_held_s),
        f"{queue.accepted_per_s:.1f}",
        f"{queue.settled_per_s:.1f}",
        Text("nobody", "yellow" if stuck else "dim") if not queue.subscribers else f"{queue.credit:,}",
    ]


def limits_text(limits: QueueLimits) -> str:
    """The limits of a queue in words; "" without any."""
    parts = []
    if limits.concurrency is not None:
        parts.append(f"{limits.concurrency:,} at once")
    if limits.rate_per_s is not None:
        parts.append(f"{limits.rate_per_s:g}/s" + (f" (burst {limits.burst})" if limits.burst != 1 else ""))
    if limits.max_length is not None:
        parts.append(f"{limits.max_length:,} long")
    return ", ".join(parts)


def resource_table(status: BrokerStatus) -> Table:
    """One row a resource."""
    table = plain_table("resource", "tokens", "taken", "tasks that wait for it")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, resource in sorted(status.resources.items()):
        capacity = "none" if resource.capacity is None else f"{resource.capacity:,}"
        table.add_row(plain(name), capacity, f"{resource.taken:,}", f"{resource.waiting:,}")
    return table


def holder_table(status: BrokerStatus) -> Table:
    """Who works on how many tasks."""
    table = plain_table("session", "held")
    for name, session in sorted(status.sessions.items(), key=lambda each: (-each[1].held, each[0])):
        if session.held:
            table.add_row(plain(peer(name)), f"{session.held:,}")
    return table


def session_table(status: BrokerStatus, here: str) -> Table:
    """One row a session, those that hold tasks first."""
    columns = ("session", "role", "key", "where", "held", "room", "round trip", "heard")
    table = plain_table(*columns, dispensable=("key", "room", "where", "role"))
    for column in table.columns[4:7]:
        column.justify = "right"
    for name, session in sorted(status.sessions.items(), key=lambda each: (-each[1].held, each[0])):
        trip = "" if session.round_trip_s is None else f"{session.round_trip_s * 1000:.1f} ms"
        table.add_row(
            plain(peer(name)),
            session.role,
            plain(session.key or ""),
            _where(session, here),
            _number(session.held),
            _number(session.credit),
            trip,
            _heard(session),
        )
    return table


def _where(session: SessionStatistics, here: str) -> str:
    """Hosts are random names of their last boot: nobody knows them by heart."""
    return f"pid {session.pid}" + ("" if session.host == here else f" on {plain(session.host[:8]) or 'another host'}")


def _heard(session: SessionStatistics) -> Text:
    if not session.connected:
        return Text(f"not connected, {span(session.silent_s)} ago", "yellow")
    return Text(f"{span(session.silent_s)} ago", "yellow" if session.silent_s > SILENT_S else "")


def task_table(tasks: Sequence[TaskInfo], now: float, processes: Mapping[str, Record]) -> Table:
    """One row a task. `processes` are those that keys are the pids of, as far as they are known."""
    has = {name: any(getattr(task, name) for task in tasks) for name in ("key", "subject", "priority", "attempt")}
    what = any(_situation(task, now) for task in tasks)
    columns = ["id", "queue", "place"]
    columns += [name for name in ("key", "subject", "priority", "attempt") if has[name]]
    columns += ["process"] if processes else []
    columns += ["size", "age"] + (["what"] if what else [])
    table = plain_table(
        *columns,
        elastic="what" if what else None,
        dispensable=("size", "attempt", "priority", "subject", "age", "queue", "process"),
    )
    for task in tasks:
        cells: list[str | Text] = [plain(task.id), plain(task.queue), Text(task.place, _PLACE_STYLES[task.place])]
        cells += [plain(short(task.key or ""))] if has["key"] else []
        cells += [plain(task.subject or "")] if has["subject"] else []
        cells += [str(task.priority)] if has["priority"] else []
        cells += [_attempts(task)] if has["attempt"] else []
        cells += [_process(processes.get(task.key or ""))] if processes else []
        cells += [size(task.size), span(now - task.sent_at)]
        cells += [_situation(task, now)] if what else []
        table.add_row(*cells)
    return table


def task_facts(task: TaskInfo, now: float, process: Record | None) -> dict[str, str | Text | None]:
    """All that is known of a task but its body."""
    return {
        "id": plain(task.id),
        "queue": plain(task.queue),
        "place": Text(task.place, _PLACE_STYLES[task.place]),
        "reason": plain(task.reason) if task.reason else None,
        "held by": f"{plain(peer(task.holder))}, for {span(task.held_s or 0.0)}" if task.holder else None,
        "key": plain(task.key) if task.key else None,
        "process": _process(process) if process else None,
        "subject": plain(task.subject) if task.subject else None,
        "priority": str(task.priority),
        "attempts": _attempts(task),
        "resources": ", ".join(f"{number} {plain(name)}" for name, number in task.resources.items()) or None,
        "sent": f"{moment(task.sent_at)}  ({span(now - task.sent_at)} ago)",
        "ready at": moment(task.due_at) if task.due_at is not None else None,
        "expires at": moment(task.expires_at) if task.expires_at else None,
        "size": size(task.size),
    }


def body_text(body: bytes) -> tuple[str, str]:
    """The format of a body, and the body as people can read it: JSON, text, MessagePack, or else its first bytes."""
    if not body:
        return "empty", ""
    try:
        text = body.decode()
        if text.lstrip()[:1] in ("{", "["):
            return "JSON", plain(json.dumps(json.loads(text), indent=2, ensure_ascii=False), lines=True)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        pass
    try:
        text = body.decode()
        if not CONTROL.search(text):
            return "text", text
    except UnicodeDecodeError:
        pass
    try:
        value = msgspec.msgpack.decode(body)
        if isinstance(value, dict | list):
            return "MessagePack", plain(display.as_yaml(_readable(value)), lines=True)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, TypeError, RecursionError):
        pass
    return "bytes", hex_lines(body[:HEX_BYTES]) + ("\n..." if len(body) > HEX_BYTES else "")


def hex_lines(data: bytes) -> str:
    """Address, bytes and letters, like ``hexdump -C``."""
    lines = []
    for at in range(0, len(data), BYTES_A_LINE):
        part = data[at : at + BYTES_A_LINE]
        letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{at:06x}  {part.hex(' '):<{3 * BYTES_A_LINE - 1}}  {letters}")
    return "\n".join(lines)


def size(number: float) -> str:
    """A number of bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return count(round(number), "byte") if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _number(number: int) -> str:
    """Nothing where there is nothing, so that what there is can be seen."""
    return f"{number:,}" if number else "-"


def _attempts(task: TaskInfo) -> str:
    return f"{task.attempt} of {task.max_attempts}" if task.max_attempts else str(task.attempt)


def _process(record: Record | None) -> Text:
    if record is None:
        return Text()
    return Text.assemble(f"{plain(class_name(record.class_id))}, ", display.state(record))


def _situation(task: TaskInfo, now: float) -> str:
    """Why it is where it is."""
    if task.holder is not None:
        return f"with {plain(peer(task.holder))} for {span(task.held_s or 0.0)}"
    parts = []
    if task.place == "delayed" and task.due_at is not None:
        parts.append(f"ready in {span(task.due_at - now)}")
    if task.reason:
        parts.append(plain(task.reason))
    if task.resources and task.place == "ready":
        parts.append("needs " + ", ".join(f"{number} {plain(name)}" for name, number in task.resources.items()))
    return "; ".join(parts)


def _readable(value: Any) -> Any:
    """Bytes inside of a value as text or hexadecimal digits."""
    match value:
        case bytes():
            return value.hex(" ") if len(value) <= HEX_BYTES else f"{value[:HEX_BYTES].hex(' ')} ..."
        case dict():
            return {_readable(key): _readable(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_readable(inner) for inner in value]
        case _:
            return value
