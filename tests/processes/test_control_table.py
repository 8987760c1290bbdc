"""Two messages, back to back: what becomes of the process, and what its senders are told.

`TABLE` is the whole truth about all pairs of pause, play, kill and resume, in each situation that a process can be in.
The rows are the first message, the columns the second; both are handed to `Process.receive`, each with a token of its
own and no await between them, and then a step that runs is let go. A cell is the end: the state, the play state, and
one mark for each of the two senders.

====  ==================================================================================================
mark  the answer
====  ==================================================================================================
✓     done
✗     refused, changing nothing: the process does not wait for anybody to resume it
†     refused, changing nothing: the process has ended
====  ==================================================================================================

What an answer is. Of a resume: one `Reply` with its token, without a failure (✓) or with one. Of a pause, a play and
a kill: what they want is in the register, and there is no `Reply` (✓); or there is one, with the failure. Nobody gets
two.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest

from prunus.errors import InvalidStateError
from prunus.processes import Continue, KillMessage, Outcomes, Pause, Play, Process, Reply, Resume, Wait
from prunus.processes.control import Message, merge

MESSAGES: dict[str, Pause | Play | KillMessage | Resume] = {
    "pause": Pause(),
    "play": Play(),
    "kill": KillMessage(),
    "resume": Resume(1, True),
}

RUNNING = """
        | pause             | play               | kill              | resume
pause   | running paused ✓✓ | running playing ✓✓ | killed playing ✓✓ | running paused ✓✗
play    | running paused ✓✓ | running playing ✓✓ | killed playing ✓✓ | running playing ✓✗
kill    | killed playing ✓✓ | killed playing ✓✓  | killed playing ✓✓ | killed playing ✓✗
resume  | running paused ✗✓ | running playing ✗✓ | killed playing ✗✓ | running playing ✗✗
"""

TERMINAL = """
        | pause             | play              | kill              | resume
pause   | {0} playing ††    | {0} playing ††    | {0} playing ††    | {0} playing ††
play    | {0} playing ††    | {0} playing ††    | {0} playing ††    | {0} playing ††
kill    | {0} playing ††    | {0} playing ††    | {0} playing ††    | {0} playing ††
resume  | {0} playing ††    | {0} playing ††    | {0} playing ††    | {0} playing ††
"""

TABLE: dict[str, str] = {
    "created": """
        | pause             | play               | kill              | resume
pause   | created paused ✓✓ | created playing ✓✓ | killed playing ✓✓ | created paused ✓✗
play    | created paused ✓✓ | created playing ✓✓ | killed playing ✓✓ | created playing ✓✗
kill    | killed playing ✓† | killed playing ✓†  | killed playing ✓† | killed playing ✓†
resume  | created paused ✗✓ | created playing ✗✓ | killed playing ✗✓ | created playing ✗✗
""",
    "between two steps": """
        | pause             | play               | kill              | resume
pause   | running paused ✓✓ | running playing ✓✓ | killed playing ✓✓ | running paused ✓✗
play    | running paused ✓✓ | running playing ✓✓ | killed playing ✓✓ | running playing ✓✗
kill    | killed playing ✓† | killed playing ✓†  | killed playing ✓† | killed playing ✓†
resume  | running paused ✗✓ | running playing ✗✓ | killed playing ✗✓ | running playing ✗✗
""",
    "in an `async def` step": RUNNING,
    "in a plain `def` step, in its thread": RUNNING,
    "in a step, pausing": """
        | pause             | play               | kill              | resume
pause   | running paused ✓✓ | running playing ✓✓ | killed playing ✓✓ | running paused ✓✗
play    | running paused ✓✓ | running playing ✓✓ | killed playing ✓✓ | running playing ✓✗
kill    | killed playing ✓✓ | killed playing ✓✓  | killed playing ✓✓ | killed playing ✓✗
resume  | running paused ✗✓ | running playing ✗✓ | killed playing ✗✓ | running paused ✗✗
""",
    "in a step, while it waits for somebody too": """
        | pause             | play               | kill              | resume
pause   | waiting paused ✓✓ | waiting playing ✓✓ | killed playing ✓✓ | running paused ✓✓
play    | waiting paused ✓✓ | waiting playing ✓✓ | killed playing ✓✓ | running playing ✓✓
kill    | killed playing ✓✓ | killed playing ✓✓  | killed playing ✓✓ | killed playing ✓†
resume  | running paused ✓✓ | running playing ✓✓ | killed playing †✓ | running playing ✓✗
""",
    "waiting for a child": """
        | pause             | play               | kill              | resume
pause   | waiting paused ✓✓ | waiting playing ✓✓ | killed playing ✓✓ | waiting paused ✓✗
play    | waiting paused ✓✓ | waiting playing ✓✓ | killed playing ✓✓ | waiting playing ✓✗
kill    | killed playing ✓† | killed playing ✓†  | killed playing ✓† | killed playing ✓†
resume  | waiting paused ✗✓ | waiting playing ✗✓ | killed playing ✗✓ | waiting playing ✗✗
""",
    "waiting for somebody": """
        | pause             | play               | kill              | resume
pause   | waiting paused ✓✓ | waiting playing ✓✓ | killed playing ✓✓ | running paused ✓✓
play    | waiting paused ✓✓ | waiting playing ✓✓ | killed playing ✓✓ | running playing ✓✓
kill    | killed playing ✓† | killed playing ✓†  | killed playing ✓† | killed playing ✓†
resume  | running paused ✓✓ | running playing ✓✓ | killed playing ✓✓ | running playing ✓✗
""",
    "created, paused": """
        | pause             | play               | kill              | resume
pause   | created paused ✓✓ | created playing ✓✓ | killed playing ✓✓ | created paused ✓✗
play    | created paused ✓✓ | created playing ✓✓ | killed playing ✓✓ | created playing ✓✗
kill    | killed playing ✓† | killed playing ✓†  | killed playing ✓† | killed playing ✓†
resume  | created paused ✗✓ | created playing ✗✓ | killed playing ✗✓ | created paused ✗✗
""",
    "waiting for a child, paused": """
        | pause             | play               | kill              | resume
pause   | waiting paused ✓✓ | waiting playing ✓✓ | killed playing ✓✓ | waiting paused ✓✗
play    | waiting paused ✓✓ | waiting playing ✓✓ | killed playing ✓✓ | waiting playing ✓✗
kill    | killed playing ✓† | killed playing ✓†  | killed playing ✓† | killed playing ✓†
resume  | waiting paused ✗✓ | waiting playing ✗✓ | killed playing ✗✓ | waiting paused ✗✗
""",
    "waiting for somebody, paused": """
        | pause             | play               | kill              | resume
pause   | waiting paused ✓✓ | waiting playing ✓✓ | killed playing ✓✓ | running paused ✓✓
play    | waiting paused ✓✓ | waiting playing ✓✓ | killed playing ✓✓ | running playing ✓✓
kill    | killed playing ✓† | killed playing ✓†  | killed playing ✓† | killed playing ✓†
resume  | running paused ✓✓ | running playing ✓✓ | killed playing ✓✓ | running paused ✓✗
""",
    "finished": TERMINAL.replace("{0}", "finished"),
    "excepted": TERMINAL.replace("{0}", "excepted"),
    "killed": TERMINAL.replace("{0}", "killed"),
}


@dataclass(frozen=True)
class End:
    """A cell of the table."""

    state: str
    play: str
    marks: str


def read(grid: str) -> dict[tuple[str, str], End]:
    """The cells of a grid by their two messages."""
    (_, *columns), *rows = [[cell.strip() for cell in line.split("|")] for line in grid.strip("\n").split("\n")]
    return {
        (first, second): End(*cell.split())
        for first, *cells in rows
        for second, cell in zip(columns, cells, strict=True)
    }


def table_as_markdown() -> str:
    """The table as it stands in the documentation: four rows for each situation; equal ones stand together."""
    titles: dict[str, list[str]] = {}
    for title, grid in TABLE.items():
        key = TERMINAL if grid in [TABLE[name] for name in ("finished", "excepted", "killed")] else grid
        titles.setdefault(key, []).append(title)
    lines = [
        "| situation | first | then `pause` | then `play` | then `kill` | then `resume` |",
        "|---|---|---|---|---|---|",
    ]
    for grid, together in titles.items():
        cells = read(grid.replace("{0}", "unchanged"))
        for number, first in enumerate(MESSAGES):
            row = [f"`{first}`", *(_shown(cells[first, second]) for second in MESSAGES)]
            lines.append(f"| {'' if number else '; '.join(together)} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _shown(end: End) -> str:
    return f"{end.state if end.play == 'playing' else f'{end.state}, {end.play}'} {end.marks}"


# --- the situations ---------------------------------------------------------------------------------


class Stays(Process):
    """Two steps and no end of them."""

    async def run(self) -> Continue:
        return Continue(self.run)

    async def answered(self, value: Any) -> None: ...


class Gated(Stays):
    """Tells when its step runs, and waits in it until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.running, self.gate = asyncio.Event(), asyncio.Event()

    async def run(self) -> Any:
        self.running.set()
        await self.gate.wait()
        return Continue(self.run)


class Threaded(Stays):
    """The same in a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.running, self.gate = threading.Event(), threading.Event()

    def run(self) -> Any:
        self.running.set()
        self.gate.wait()
        return Continue(self.run)


class Beside(Gated):
    """Waits for somebody to resume it, and works meanwhile."""

    async def run(self) -> Any:
        return [Wait(then=self.answered), Wait([], then=self.work)]

    async def work(self, _: Any) -> None:
        self.running.set()
        await self.gate.wait()


class ForChild(Stays):
    async def run(self) -> Any:
        return Wait(["child"], then=self.answered)


class ForSomebody(Stays):
    async def run(self) -> Any:
        return Wait(then=self.answered)


class Ends(Stays):
    async def run(self) -> Any:
        return None


class Fails(Stays):
    async def run(self) -> Any:
        raise ValueError("bad")


async def after(process: Process, steps: int, *messages: Message) -> Process:
    for _ in range(steps):
        await process.step()
    for message in messages:
        process.receive(message)
    return process


async def beside() -> Process:
    process = await after(Beside(), 2)
    process.settle(Outcomes(0.0))
    return process


SITUATIONS: dict[str, Callable[[], Awaitable[Process]]] = {
    "created": lambda: after(Stays(), 0),
    "between two steps": lambda: after(Stays(), 2),
    "in an `async def` step": lambda: after(Gated(), 1),
    "in a plain `def` step, in its thread": lambda: after(Threaded(), 1),
    "in a step, pausing": lambda: after(Gated(), 1),
    "in a step, while it waits for somebody too": beside,
    "waiting for a child": lambda: after(ForChild(), 2),
    "waiting for somebody": lambda: after(ForSomebody(), 2),
    "created, paused": lambda: after(Stays(), 0, Pause()),
    "waiting for a child, paused": lambda: after(ForChild(), 2, Pause()),
    "waiting for somebody, paused": lambda: after(ForSomebody(), 2, Pause()),
    "finished": lambda: after(Ends(), 2),
    "excepted": lambda: after(Fails(), 2),
    "killed": lambda: after(Stays(), 1, KillMessage()),
}


@asynccontextmanager
async def situation(title: str) -> AsyncIterator[Process]:
    """A process in that situation; at the end its step is let go."""
    process = await SITUATIONS[title]()
    if not isinstance(process, (Gated, Threaded)):
        yield process
        return
    task = asyncio.create_task(process.step())
    if isinstance(process, Threaded):
        await asyncio.to_thread(process.running.wait)
    else:
        await process.running.wait()
    if "pausing" in title:
        process.receive(Pause())
    try:
        yield process
    finally:
        process.gate.set()
        await task


def mark(message: Message, taken: bool, replies: list[Reply]) -> str:
    """What the sender is told; see above."""
    if not replies:
        assert taken
        assert not isinstance(message, Resume)
        return "✓"
    (reply,) = replies
    if reply.failure is None:
        assert isinstance(message, Resume)
        return "✓"
    error = reply.failure.to_exception()
    assert isinstance(error, InvalidStateError)
    if error.needed == "alive":
        assert error.state in ("finished", "excepted", "killed")
        return "†"
    assert isinstance(message, Resume)
    assert error.needed == "suspended, waiting for somebody to resume it"
    return "✗"


# --- the test ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), list(itertools.product(MESSAGES, MESSAGES)))
@pytest.mark.parametrize("title", TABLE)
async def test_two_messages_end_as_the_table_says(title: str, first: str, second: str) -> None:
    """One documented state, and one answer for each of the two senders."""
    sent = [MESSAGES[first], MESSAGES[second]]
    taken = []
    async with situation(title) as process:
        process.take_effects()
        for token, message in enumerate(sent):
            before = process.register
            process.receive(message, token)
            wanted = before if isinstance(message, Resume) else merge(before, message)
            taken.append(replace(process.register, seq=0) == replace(wanted, seq=0))
    replies = process.take_effects().replies
    marks = [
        mark(message, taken[token], [reply for reply in replies if reply.token == token])
        for token, message in enumerate(sent)
    ]
    end = End(process.state.value, process.play_state.value, "".join(marks))
    assert end == read(TABLE[title])[first, second]


def test_the_table_has_every_pair_in_every_situation() -> None:
    """Sixteen cells each, with one mark for each of the two."""
    assert TABLE.keys() == SITUATIONS.keys()
    for grid in TABLE.values():
        cells = read(grid)
        assert cells.keys() == set(itertools.product(MESSAGES, MESSAGES))
        assert all(len(end.marks) == 2 and set(end.marks) <= set("✓✗†") for end in cells.values())


def test_the_table_can_be_written_down() -> None:
    """As Markdown, with the situations that are alike in one place."""
    lines = table_as_markdown().splitlines()
    assert "| created | `pause` | created, paused ✓✓ | created ✓✓ | killed ✓✓ | created, paused ✓✗ |" in lines
    assert (
        "| finished; excepted; killed | `pause` | unchanged †† | unchanged †† | unchanged †† | unchanged †† |" in lines
    )
    assert all(line.count("|") == 7 for line in lines)
