"""What people see of a broker, from its statistics alone."""

from __future__ import annotations

import io
import json
import re

import msgspec
import pytest
from rich.console import Console, RenderableType

from prunus.messaging.inventory import QueueLimits, QueueStatistics, TaskInfo, TaskPlace
from prunus.persistence.persister import Record
from prunus.runtime import display, overview
from prunus.runtime.cli.tasks import PLACES
from tests.runtime.brokers import HERE, NOW, session, status, task

UUID = "01a1fe56-938c-794d-a81d-48daba94997f"


def drawn(what: RenderableType, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def rows(what: RenderableType) -> list[list[str]]:
    """The cells of a table, by the two spaces between them."""
    return [re.split(r"  +", line.strip()) for line in drawn(what).splitlines() if line.strip()]


def test_a_queue_is_a_row() -> None:
    """What is in it by its place, the oldest, for how long one is held, rates, free places, and its limits."""
    head, mail, render = rows(overview.queue_table(status()))
    assert head[:6] == ["queue", "ready", "delayed", "blocked", "held", "dead"]
    assert head[6:] == ["oldest", "held for", "in/s", "out/s", "room", "limits"]
    assert render[:6] == ["render", "1,200", "3", "2", "4", "5"]
    assert render[6:] == ["1 min 15 s", "2 h 0 min", "12.3", "5.0", "6", "8 at once, 2.5/s (burst 3), 10,000 long"]
    assert mail == ["mail", "1", "-", "-", "-", "-", "0.0", "0.0", "nobody"]


def test_a_narrow_terminal_leaves_out_what_says_least() -> None:
    """Of queues and of tasks no cell is cut at 80 columns: first go the columns in which nothing stands."""
    wide = status().queues["render"]
    queues = {"render": msgspec.structs.replace(wide, blocked=0, limits=QueueLimits()), "mail": QueueStatistics()}
    head, *_ = rows(what := overview.queue_table(status(queues=queues)))
    assert {"delayed", "blocked", "limits"} <= set(head)
    narrow = drawn(what, 80)
    assert narrow.split("\n")[0].split()[:5] == ["queue", "ready", "delayed", "held", "dead"]
    assert "\u2026" not in narrow
    assert max(map(len, narrow.splitlines())) <= 80
    limited = {"render": msgspec.structs.replace(wide, delayed=0, blocked=0, limits=QueueLimits(concurrency=8))}
    assert "8 at once" in drawn(overview.queue_table(status(queues=limited)), 80)
    limits = QueueLimits(concurrency=2, max_length=1000)
    idle = {"render": msgspec.structs.replace(wide, delayed=0, blocked=0, held=0, longest_held_s=None, limits=limits)}
    assert "2 at once, 1,000 long" in drawn(overview.queue_table(status(queues=idle)), 80)
    held = [
        task(id=f"b17fb9e1d96baaaa9557-{n}", key=UUID, subject="a", place="held", attempt=1, holder="w-1", held_s=754.0)
        for n in range(2)
    ]
    tasks = overview.task_table(held, NOW, {UUID: process()})
    assert re.search(r"id +queue +place +key +subject +attempt +process +size +age +what", drawn(tasks))
    text = drawn(tasks, 80)
    assert text.count("with w-1 for 12 min 34 s") == 2, "who holds it, and for how long, is what is asked for"
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (QueueLimits(), ""),
        (QueueLimits(concurrency=0), "0 at once"),
        (QueueLimits(rate_per_s=0.5), "0.5/s"),
        (QueueLimits(max_length=5), "5 long"),
    ],
)
def test_limits_in_words(limits: QueueLimits, text: str) -> None:
    """Only those that there are."""
    assert overview.limits_text(limits) == text


def test_who_holds_most_comes_first() -> None:
    """With the role, the key, where it runs, its round trip, and how long nothing was heard of it."""
    head, worker, controller, laptop = rows(overview.session_table(status(), HERE))
    assert head == ["session", "role", "key", "where", "held", "room", "round trip", "heard"]
    assert worker == ["worker-1", "owner", "pid 4712", "4", "6", "1.2 ms", "0.3 s ago"]
    assert controller == ["controller", "owner", "pid 4711", "-", "-", "1.2 ms", "0.3 s ago"]
    assert laptop == ["laptop", "viewer", "anna", "pid 4711 on deadbeef", "-", "-", "not connected, 14 s ago"]
    assert rows(overview.holder_table(status())) == [["session", "held"], ["worker-1", "4"]]


def test_the_whole_picture() -> None:
    """Facts, queues, resources and sessions; trouble only if there is some."""
    text = drawn(overview.broker_picture(status(), HERE))
    assert "pid 99, epoch 7, up for 1 h 1 min" in text
    assert "12.3 MB" in text
    assert "2 running, 1,000 finished" in text
    assert re.search(r"gpu +2 +1 +17", text)
    assert "full" not in text
    assert "trouble" not in text
    bad = drawn(overview.broker_picture(status(disk_full=True, protocol_errors=3, refused_connections=1), HERE))
    assert "full: new work is refused" in bad
    assert "3 frames that were no message, 1 refused connections" in bad
    assert "No queue yet" in drawn(overview.broker_picture(status(queues={}, resources={}), HERE))


def test_a_task_is_a_row() -> None:
    """Columns that say nothing about any of them are left out."""
    assert rows(overview.task_table([task()], NOW, {})) == [
        ["id", "queue", "place", "size", "age"],
        ["t-1", "render", "ready", "1.5 kB", "1 min 30 s"],
    ]
    full = [
        task(key=UUID, subject="a.b", priority=3, attempt=2, max_attempts=5, place="held", holder="w-1", held_s=3.0),
        task(id="t-2", place="dead", reason="no licence\nis free"),
        task(id="t-3", place="delayed", due_at=NOW + 30, reason="busy"),
        task(id="t-4", resources={"gpu": 2}),
    ]
    head, first, second, third, fourth = rows(overview.task_table(full, NOW, {UUID: process()}))
    assert head == [
        "id", "queue", "place", "key", "subject", "priority", "attempt", "process", "size", "age", "what",
    ]  # fmt: skip
    assert first[3:8] == ["ba94997f", "a.b", "3", "2 of 5", "Cls, running"]
    assert first[-1] == "with w-1 for 3.0 s"
    assert second[-1] == r"no licence\nis free"
    assert third[-1] == "ready in 30 s; busy"
    assert fourth[-1] == "needs 2 gpu"


def process() -> Record:
    return Record(
        pid=UUID, class_id="m:Cls", state="running", play="playing", created_at=NOW, updated_at=NOW, epoch=1, seq=1
    )


def test_all_of_a_task() -> None:
    """What is not there is not shown."""
    shown = drawn(display.facts_table(overview.task_facts(task(), NOW, None)))
    assert "key" not in shown
    assert re.search(r"attempts +0 *$", shown, re.MULTILINE)
    dead = task(place="dead", reason="why", holder="w", held_s=2.0, key=UUID, expires_at=NOW + 5, due_at=NOW)
    text = drawn(display.facts_table(overview.task_facts(dead, NOW, process())))
    for part in (
        "reason +why",
        "held by +w, for 2.0 s",
        f"key +{UUID}",
        "process +Cls, running",
        "expires at",
        "ready",
    ):
        assert re.search(part, text), part


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (b"", "empty", ""),
        (b"hello\nworld \xc3\xa9", "text", "hello\nworld é"),
        (b'{"a": [1]}', "JSON", '{\n  "a": [\n    1\n  ]\n}'),
        (b'{"a": ', "text", '{"a": '),
        (b"12", "text", "12"),
        (msgspec.msgpack.encode({"a": b"\x00\x01", "b": [1, 2]}), "MessagePack", "a: 00 01\nb: [1, 2]"),
        (b"\xff\x00A", "bytes", "000000  ff 00 41" + " " * 41 + "..A"),
    ],
)
def test_a_body_is_shown_as_what_it_is(body: bytes, kind: str, text: str) -> None:
    """JSON, text, MessagePack, or bytes."""
    assert overview.body_text(body) == (kind, text)


def test_long_bytes_are_cut() -> None:
    """After the first `HEX_BYTES`."""
    _, text = overview.body_text(bytes(10_000))
    assert text.splitlines()[-1] == "..."
    assert len(text.splitlines()) == 1 + overview.HEX_BYTES // overview.BYTES_A_LINE


@pytest.mark.parametrize(
    "body",
    [
        b"\x1b[2J",
        json.dumps({"a": "\x1b[2J\u202e"}, ensure_ascii=False).encode(),
        msgspec.msgpack.encode({"\x1b]0;title\x07": "\x9b2J"}),
        msgspec.msgpack.encode([[[[[1]]]]] * 3),
        b"[" * 100_000,
        b"\x91" * 100_000,
        b"\xc1",
        '"\ud800"'.encode("utf-8", "surrogatepass"),
    ],
)
def test_no_body_reaches_the_terminal_as_a_command(body: bytes) -> None:
    """Whatever it is, it becomes text without control characters."""
    _, text = overview.body_text(body)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)


def test_names_are_shown_in_letters() -> None:
    """Queues, subjects, reasons and sessions are words of clients."""
    nasty = "a\x1b[2J\nb"
    texts = [
        drawn(overview.queue_table(status(queues={nasty: QueueStatistics()}))),
        drawn(overview.session_table(status(sessions={nasty: session(key=nasty, host=nasty)}), HERE)),
        drawn(overview.task_table([task(id=nasty, queue=nasty, key=nasty, subject=nasty, reason=nasty)], NOW, {})),
        drawn(display.facts_table(overview.task_facts(task(id=nasty, reason=nasty, resources={nasty: 1}), NOW, None))),
    ]
    for text in texts:
        assert "\x1b" not in text
        assert r"a\x1b[2J\nb" in text


def test_the_places_are_those_of_the_broker() -> None:
    """The command line does not import them, to be quick."""
    assert set(PLACES) == set(TaskPlace.__args__)
    assert all(isinstance(task(place=place), TaskInfo) for place in PLACES)
    assert set(overview._PLACE_STYLES) == set(PLACES)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2e9, "2.0 GB"), (5e13, "50.0 TB")]
)
def test_sizes(number: float, text: str) -> None:
    """In the unit that fits."""
    assert overview.size(number) == text
