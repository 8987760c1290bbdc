"""What a command says when it takes longer than a second."""

from __future__ import annotations

import asyncio
import io

import pytest

from prunus.runtime.cli import patience as module
from prunus.runtime.cli.patience import CLEAR, Meter, patience


class Screen(io.StringIO):
    """A stream that may be a terminal; `written` is set with each write."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal
        self.written = asyncio.Event()

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str, /) -> int:
        self.written.set()
        return super().write(text)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.usefixtures("impatient")
async def test_the_line_is_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, where it says how far things are."""
    screen = Screen(is_terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    async with patience("waiting for them", 4, "paused") as meter:
        meter.done = 1
        await screen.written.wait()
    assert screen.getvalue().startswith(f"{CLEAR}#####---------------  1 of 4 paused; waiting for them (0 s) ...")
    assert screen.getvalue().endswith(CLEAR)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("is_terminal", [False, True])
async def test_elsewhere_it_is_said_once(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    """A line without anything that moves a cursor: in a pipe, and on a dumb terminal."""
    screen = Screen(is_terminal)
    monkeypatch.setattr("sys.stderr", screen)
    if is_terminal:
        monkeypatch.setenv("TERM", "dumb")
    async with patience("waiting for them", 4, "paused") as meter:
        await screen.written.wait()
        meter.draw()
    assert screen.getvalue() == "waiting for them ...\n"


async def test_what_is_quick_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that it is quick."""
    screen = Screen(is_terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    async with patience("waiting for them"):
        pass
    assert screen.getvalue() == ""


def test_one_thing_has_no_bar() -> None:
    """It says for how long it waits."""
    for total in (None, 1):
        assert Meter("waiting for it", total, "paused").text() == "waiting for it (0 s) ..."
