"""What a command says when it takes longer than a second.

On a terminal it is one line that changes, and is gone when the command ends: a bar with n of m, or for how long it
waits. Elsewhere, and on a dumb terminal, it is one line, once. All of it goes to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator

import click

from prunus.runtime.terminals import can_redraw

PATIENCE_S = 1.0
"""A command that takes longer says what it waits for."""
REDRAW_S = 0.2
BAR_WIDTH = 20
CLEAR = "\r\x1b[2K"
"""To the beginning of the line, which is then empty."""


class Meter:
    """How far a command is. What else it prints goes through `say`, so that the two do not get mixed up."""

    def __init__(self, waiting_for: str, total: int | None = None, doing: str = "") -> None:
        self.total = total
        self.done = 0
        self.waiting_for, self._doing = waiting_for, doing
        self._begun_s = time.monotonic()
        self._is_said = self._is_drawn = False

    def say(self, line: str, *, err: bool = False) -> None:
        """Print a line."""
        self.clear()
        click.echo(line, err=err)

    def draw(self) -> None:
        """Show how far it is now."""
        if not can_redraw(sys.stderr):
            if not self._is_said:
                click.echo(f"{self.waiting_for} ...", err=True)
            self._is_said = True
            return
        width = shutil.get_terminal_size().columns
        sys.stderr.write(f"{CLEAR}{self.text()[: width - 1]}")
        sys.stderr.flush()
        self._is_drawn = True

    def text(self) -> str:
        """The line."""
        waited = f"{self.waiting_for} ({time.monotonic() - self._begun_s:.0f} s) ..."
        if self.total is None or self.total < 2:
            return waited
        part = int(self.done / self.total * BAR_WIDTH)
        encoding = (sys.stderr.encoding or "").lower()
        full, empty = ("█", "░") if encoding.startswith("utf") else ("#", "-")
        bar = full * part + empty * (BAR_WIDTH - part)
        return f"{bar}  {self.done:,} of {self.total:,} {self._doing}; {waited}"

    def clear(self) -> None:
        """Take the line away again."""
        if self._is_drawn:
            sys.stderr.write(CLEAR)
            sys.stderr.flush()
            self._is_drawn = False


@contextlib.asynccontextmanager
async def patience(waiting_for: str, total: int | None = None, doing: str = "") -> AsyncIterator[Meter]:
    """Say what a command waits for, once it has taken longer than `PATIENCE_S`.

    `total` is how much there is to do, and `doing` the word behind the numbers: ``12 of 40 paused``.
    """
    meter = Meter(waiting_for, total, doing)

    async def tick() -> None:
        await asyncio.sleep(PATIENCE_S)
        while True:
            meter.draw()
            await asyncio.sleep(REDRAW_S)

    ticking = asyncio.ensure_future(tick())
    try:
        yield meter
    finally:
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        meter.clear()


def agrees(question: str) -> bool:
    """Whether the answer is yes. Ctrl-C is a `KeyboardInterrupt` at once, also where an event loop runs; the end of
    the input is a `click.Abort`."""
    is_interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal is_interrupted
        is_interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        return click.confirm(question, err=True)
    except click.Abort:  # click takes either for it
        if is_interrupted:
            click.echo(err=True)
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """For work that tells how much of how much is done: a bar on a terminal that can draw one, nothing anywhere else.
    Nothing else is to be printed meanwhile."""
    from prunus.runtime import display

    if not can_redraw(sys.stderr):
        yield lambda done, total: None
        return
    from rich.progress import Progress

    with Progress(console=display.console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total or None)
