"""``prunus top`` on a screen of a test's own, over a real broker with real workers; and once in a real terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static

from prunus.persistence.persister import QUERY_LIMIT
from prunus.runtime.top import app as top_app
from prunus.runtime.top.app import Help, ProcessTable, Question, TopApp
from prunus.runtime.top.model import Filter, View
from prunus.runtime.top.source import Source
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.real_daemon import RealDaemon
from tests.runtime import features, workflows
from tests.runtime.shell import Shell, daemon_in
from tests.runtime.waiting import file_has, until

Screen = Pilot[None]
SIZE = (120, 40)


@asynccontextmanager
async def screen(daemon: Any, size: tuple[int, int] = SIZE, **facts: Any) -> AsyncIterator[tuple[TopApp, Screen]]:
    """The program, once it has had its first look."""
    app = TopApp(daemon.controller, place="here", **facts)
    async with app.run_test(size=size) as pilot:
        await shows(pilot, lambda: app.last_look is not None)
        yield app, pilot


async def shows(pilot: Screen, holds: Callable[[], Any]) -> None:
    """Wait until a condition holds of the screen."""
    while not holds():
        await pilot.pause(0.01)


def picture(app: TopApp) -> str:
    """The letters on the screen."""
    size = app.size
    strips = app.screen._compositor.render_strips(size)
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)


def table(app: TopApp) -> ProcessTable:
    return app.screen_stack[0].query_one(ProcessTable)


def pids(app: TopApp) -> list[str]:
    return [row.record.pid for row in table(app).rows]


async def wait_for_message(daemon: LocalDaemon, count: int) -> list[str]:
    """So many processes that wait for a person, the oldest first."""
    handles = [await daemon.controller.launch(features.Patient) for _ in range(count)]
    for handle in handles:
        await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    return [handle.pid for handle in handles]


# --- what is shown ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (180, 50), (40, 12)])
async def test_it_shows_workers_queues_and_processes(daemon: LocalDaemon, size: tuple[int, int]) -> None:
    """On small screens too; a process that is launched appears by itself."""
    async with screen(daemon, size) as (app, pilot):
        [pid] = await wait_for_message(daemon, 1)
        await shows(pilot, lambda: pid[-8:] in picture(app) and "waiting" in picture(app))
        text = picture(app)
        assert ("worker-1" in text) is (size[0] > 64)
        assert ("default" in text) is (size[1] > 16)
        assert "here" in text
        assert "Patie" in text


async def test_news_are_shown_when_they_come(daemon: LocalDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only when it is time to look again."""
    monkeypatch.setattr(top_app, "REFRESH_S", 3600.0)
    async with screen(daemon) as (app, pilot):
        [pid] = await wait_for_message(daemon, 1)
        await shows(pilot, lambda: pids(app) == [pid] and "waiting" in picture(app))
        await daemon.controller.handle(pid).kill()
        await shows(pilot, lambda: "✗ killed" in picture(app))


async def test_it_tells_how_far_a_step_is(daemon: LocalDaemon, tmp_path: Path) -> None:
    """As the step says itself, with who does it."""
    handle = await daemon.controller.launch(features.Gated, {"file": str(tmp_path / "go")})
    async with screen(daemon) as (app, pilot):
        await shows(pilot, lambda: "half of it" in picture(app))
        line = next(line for line in picture(app).splitlines() if "half of it" in line)
        assert "━━━━────  50%" in line
        assert "worker-1" in line
        (tmp_path / "go").touch()
        await handle.result()
        await shows(pilot, lambda: "✓ finished" in picture(app))


async def test_children_are_below_their_parent_until_the_tree_is_flat(daemon: LocalDaemon, tmp_path: Path) -> None:
    """Tree or list: one key."""
    parent = await daemon.controller.launch(workflows.Nest, {"begun": str(tmp_path / "begun")})
    await file_has(tmp_path / "begun", 1)
    async with screen(daemon) as (app, pilot):
        await shows(pilot, lambda: "└ Endless" in picture(app))
        assert pids(app)[0] == parent.pid
        await pilot.press("t")
        await shows(pilot, lambda: "└" not in " ".join(row.guide for row in table(app).rows))
        assert "Endless" in picture(app)
        assert pids(app)[1] == parent.pid
    await parent.kill()


async def test_without_letters_beyond_ascii_it_does_without(daemon: LocalDaemon) -> None:
    """For terminals that have no others."""
    await wait_for_message(daemon, 1)
    async with screen(daemon, utf8=False) as (app, pilot):
        await shows(pilot, lambda: "waiting" in picture(app))
        inside = "\n".join(line[2:-2] for line in picture(app).splitlines() if "Patient" in line or "pause" in line)
        assert inside.isascii()


# --- keys -------------------------------------------------------------------------------------------


async def test_details_follow_the_selection(daemon: LocalDaemon) -> None:
    """The story of the selected process, and its news while one looks."""
    old, new = await wait_for_message(daemon, 2)
    async with screen(daemon) as (app, pilot):
        await shows(pilot, lambda: len(pids(app)) == 2)
        await pilot.press("enter")
        await shows(pilot, lambda: new in picture(app) and "created.running" in picture(app))
        await pilot.press("down")
        await shows(pilot, lambda: old in picture(app))
        await daemon.controller.handle(old).pause("a look at it")
        await shows(pilot, lambda: "playing.paused" in picture(app))
        await pilot.press("enter")
        await shows(pilot, lambda: "playing.paused" not in picture(app))


async def test_the_log_of_a_process_is_followed(daemon: LocalDaemon, tmp_path: Path) -> None:
    """With its inputs above it."""
    handle = await daemon.controller.launch(features.Gated, {"file": str(tmp_path / "go")})
    async with screen(daemon, (160, 50)) as (app, pilot):
        await shows(pilot, lambda: pids(app) == [handle.pid])
        await pilot.press("enter")
        await shows(pilot, lambda: "waiting for the file" in picture(app))
        assert "inputs" in picture(app)
        (tmp_path / "go").touch()
        await handle.result()
        await shows(pilot, lambda: "running.finished" in picture(app))
        assert "done" in picture(app)


async def test_pause_play_and_kill_with_a_key(daemon: LocalDaemon) -> None:
    """A kill asks first, and what was done is said in the last line."""
    [pid] = await wait_for_message(daemon, 1)
    handle = daemon.controller.handle(pid)
    async with screen(daemon) as (app, pilot):
        await shows(pilot, lambda: pids(app) == [pid])
        await pilot.press("p")
        await until(handle, lambda row: row.play == "paused")
        await shows(pilot, lambda: "‖ paused" in picture(app) and f"paused Patient {pid[-8:]}" in picture(app))
        await pilot.press("P")
        await until(handle, lambda row: row.play == "playing")
        await shows(pilot, lambda: "◌ waiting" in picture(app))
        await pilot.press("k")
        await shows(pilot, lambda: isinstance(app.screen, Question))
        assert f"Kill Patient {pid[-8:]}" in picture(app)
        await pilot.press("n")
        await shows(pilot, lambda: not isinstance(app.screen, Question))
        assert (await handle.record()).state == "waiting"
        await pilot.press("k")
        await shows(pilot, lambda: isinstance(app.screen, Question))
        await pilot.press("y")
        await shows(pilot, lambda: "✗ killed" in picture(app))
        assert (await handle.record()).state == "killed"
        await pilot.press("k")
        await shows(pilot, lambda: "a process that has ended can't be killed" in picture(app))


async def test_a_wish_that_can_not_be_granted_is_a_sentence(daemon: LocalDaemon) -> None:
    """And the program goes on."""
    handle = await daemon.controller.launch(workflows.Add, {"a": 1})
    await handle.result()
    async with screen(daemon) as (app, pilot):
        await shows(pilot, lambda: pids(app) == [handle.pid])
        await pilot.press("r")
        await shows(pilot, lambda: "to be excepted or set aside" in picture(app).splitlines()[-1])
        await pilot.press("p")
        await shows(pilot, lambda: "alive to be paused" in picture(app).splitlines()[-1])


async def test_retry_continues_what_failed(daemon: LocalDaemon, tmp_path: Path) -> None:
    """From its last good checkpoint."""
    handle = await daemon.controller.launch(workflows.Heal, {"file": str(tmp_path / "cure")})
    await until(handle, lambda row: row.state == "excepted")
    (tmp_path / "cure").touch()
    async with screen(daemon) as (app, pilot):
        await shows(pilot, lambda: "✗ excepted" in picture(app))
        await pilot.press("r")
        await shows(pilot, lambda: "✓ finished" in picture(app))


async def test_a_filter_is_applied_while_it_is_typed(daemon: LocalDaemon) -> None:
    """Enter keeps it, Escape takes it away; its letters are no commands meanwhile."""
    [pid] = await wait_for_message(daemon, 1)
    other = await daemon.controller.launch(workflows.Ask)
    await until(other, lambda row: row.state == "waiting")
    async with screen(daemon) as (app, pilot):
        await shows(pilot, lambda: len(pids(app)) == 2)
        await pilot.press("slash", *"pat")
        await shows(pilot, lambda: pids(app) == [pid])
        await pilot.press("q", "backspace", "enter")
        assert app.is_running
        await shows(pilot, lambda: "filter: pat" in picture(app))
        assert app.focused is table(app)
        await pilot.press("slash")
        app.screen.query_one(Input).value = "state:excepted"
        await shows(pilot, lambda: pids(app) == [])
        await pilot.press("escape")
        await shows(pilot, lambda: len(pids(app)) == 2)


async def test_the_selection_stays_with_its_process(daemon: LocalDaemon) -> None:
    """Whatever appears above it; at the top it stays at the top."""
    [first, second] = await wait_for_message(daemon, 2)
    async with screen(daemon) as (app, pilot):
        await shows(pilot, lambda: pids(app) == [second, first])
        [third] = await wait_for_message(daemon, 1)
        await shows(pilot, lambda: pids(app) == [third, second, first])
        assert app.selected is not None
        assert app.selected.pid == third
        await pilot.press("down")
        [fourth] = await wait_for_message(daemon, 1)
        await shows(pilot, lambda: pids(app)[0] == fourth)
        assert app.selected.pid == second
        await pilot.press("end")
        assert app.selected.pid == first
        await pilot.press("home")
        assert app.selected.pid == fourth


async def test_the_selection_stays_on_the_screen(daemon: LocalDaemon) -> None:
    """Also when the details take half of it, and when there is more above it."""
    waiting = await wait_for_message(daemon, 25)
    async with screen(daemon, (80, 24)) as (app, pilot):
        await shows(pilot, lambda: len(pids(app)) == 25)
        await pilot.press("end", "enter")
        await shows(pilot, lambda: waiting[0] in picture(app) and f"│ {waiting[0][-8:]}" in picture(app))
        [new] = await wait_for_message(daemon, 1)
        await shows(pilot, lambda: pids(app)[0] == new)
        await shows(pilot, lambda: f"│ {waiting[0][-8:]}" in picture(app))


async def test_orders_everything_and_help(daemon: LocalDaemon) -> None:
    """`s` changes the order, `a` shows what ended long ago, `?` shows the keys, `q` ends the program."""
    async with screen(daemon) as (app, pilot):
        await pilot.press("s")
        await shows(pilot, lambda: "by last change" in picture(app))
        await pilot.press("a")
        await shows(pilot, lambda: "· all" in picture(app).replace("  ", " "))
        await pilot.press("question_mark")
        await shows(pilot, lambda: isinstance(app.screen, Help) and "after a question" in picture(app))
        await pilot.press("escape")
        await shows(pilot, lambda: not isinstance(app.screen, Help))
        await pilot.press("q")
        await shows(pilot, lambda: not app.is_running)


@pytest.mark.parametrize("before", ["", "slash", "question_mark"])
async def test_ctrl_c_ends_it(daemon: LocalDaemon, before: str) -> None:
    """As it ends every program, whatever is open."""
    async with screen(daemon) as (app, pilot):
        if before:
            await pilot.press(before)
        await pilot.press("ctrl+c")
        await shows(pilot, lambda: not app.is_running)


async def test_a_click_selects_a_process(daemon: LocalDaemon) -> None:
    """The one in that line."""
    [first, _] = await wait_for_message(daemon, 2)
    async with screen(daemon) as (app, pilot):
        await shows(pilot, lambda: len(pids(app)) == 2)
        await pilot.click(ProcessTable, offset=(5, 3))  # below the border, the heading and the first row
        await shows(pilot, lambda: app.selected is not None and app.selected.pid == first)


# --- bounds -----------------------------------------------------------------------------------------


async def test_of_many_processes_only_a_page_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one when the end of it is near; a filter looks further."""
    monkeypatch.setattr(top_app, "PAGE", 20)
    async with LocalDaemon(workers=0) as daemon:
        launched = [(await daemon.controller.launch(workflows.Add, {"a": n})).pid for n in range(70)]
        async with screen(daemon) as (app, pilot):
            await shows(pilot, lambda: len(pids(app)) == 50)  # a page, and those that ended or began a moment ago
            assert "the first 50 shown" in picture(app)
            await pilot.press("end", "end", "end")
            await shows(pilot, lambda: len(pids(app)) == 70)
            await pilot.press("slash")
            app.screen.query_one(Input).value = launched[0]
            await shows(pilot, lambda: pids(app) == [launched[0]])


async def test_a_look_asks_for_no_more_than_it_shows(daemon: LocalDaemon) -> None:
    """A page of the newest; for another order the newest `QUERY_LIMIT`; for a word the pages until there are enough."""
    asked: list[int] = []
    find = daemon.controller.find

    async def noted(query: Any = None) -> Any:
        asked.append(query.limit)
        return await find(query)

    daemon.controller.find = noted  # type: ignore[method-assign]
    source = Source(daemon.controller)
    await source.look(View(wanted=30))
    assert asked == [30, 50]
    asked.clear()
    await source.look(View(wanted=30, everything=True))
    assert asked == [30]
    asked.clear()
    await source.look(View(wanted=30, everything=True, sort="state"))
    assert asked == [QUERY_LIMIT]
    asked.clear()
    await source.look(View(wanted=30, everything=True, filter=Filter.read("x")))
    assert asked == [QUERY_LIMIT]


# --- a broker that goes away ------------------------------------------------------------------------


@pytest.mark.timeout(120)
async def test_it_survives_a_broker_that_is_killed(short_folder: Path) -> None:
    """The last picture stays with a word in the first line, and it goes on when the broker is there again."""
    async with RealDaemon(short_folder, workers=0) as daemon:
        handle = await daemon.controller.launch(workflows.Ask)
        async with screen(daemon, profile=daemon.profile) as (app, pilot):
            await shows(pilot, lambda: pids(app) == [handle.pid])
            daemon.kill("broker")
            await shows(pilot, lambda: "reconnecting" in picture(app).splitlines()[0])
            assert handle.pid[-8:] in picture(app)
            daemon.start("broker")
            await shows(pilot, lambda: "reconnecting" not in picture(app).splitlines()[0])
            another = await daemon.controller.launch(workflows.Ask)
            await shows(pilot, lambda: pids(app) == [another.pid, handle.pid])


async def test_the_services_of_a_profile_have_their_use(short_folder: Path) -> None:
    """Those that run with their memory; that no supervisor looks after them is said."""
    async with RealDaemon(short_folder, workers=1) as daemon, screen(daemon, profile=daemon.profile) as (app, pilot):
        await shows(pilot, lambda: "worker-1" in picture(app))
        services = {service.name: service for service in app.last_look.services} if app.last_look else {}
        assert services["broker"].state == "on its own"
        assert (services["broker"].memory or 0) > 1_000_000
        assert services["daemon"].state == "not running"
        panel = str(app.screen.query_one("#services", Static).render())
        assert "not running" in panel


# --- in a terminal ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with daemon_in(tmp_path_factory.mktemp("top")) as shell:
        yield shell


def test_in_a_terminal_it_starts_shows_and_leaves_no_trace(shell: Shell) -> None:
    """`q` gives the terminal back as it was: the alternate screen, the cursor, the mouse and the line discipline."""
    pid = shell("launch", "flow:Talk").stdout.strip()
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(follower)
    environment = shell.environment | {"TERM": "xterm-256color", "LANG": "C.UTF-8", "COLORTERM": "truecolor"}
    environment.pop("PYTHONWARNINGS")
    command = [sys.executable, "-m", "prunus.runtime.cli", "top"]
    child = subprocess.Popen(
        command, cwd=shell.folder, env=environment, stdin=follower, stdout=follower, stderr=follower
    )
    try:
        text = _read_until(leader, lambda said: pid[-8:] in said and "worker-1" in said)
        assert "\x1b[?1049h" in text
        os.write(leader, b"q")
        text += _read_until(leader, lambda said: "\x1b[?1049l" in said)
        while child.poll() is None:
            text += _read_some(leader)
        while said := _read_some(leader):  # its last words
            text += said
        assert child.returncode == 0
        assert termios.tcgetattr(follower) == before
        for switch in ("1049", "1000", "1006", "2004"):
            switched = re.findall(rf"\x1b\[\?{switch}([hl])", text)
            assert switched[-1:] in ([], ["l"]), switch
        assert re.findall(r"\x1b\[\?25([hl])", text)[-1] == "h"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        os.close(leader)
        os.close(follower)


def test_without_a_terminal_it_says_what_to_use_instead(shell: Shell) -> None:
    """Exit code 2, for a pipe can't be drawn on."""
    ended = shell.process("top", code=2)
    assert "`prunus list`" in ended.stderr
    assert ended.stdout == ""


def _read_some(leader: int) -> str:
    readable, _, _ = select.select([leader], [], [], 0.05)
    return os.read(leader, 65_536).decode(errors="replace") if readable else ""


def _read_until(leader: int, holds: Callable[[str], bool]) -> str:
    """What the program writes, until a condition holds of the letters in it."""
    said = ""
    while not holds(said):
        said += _read_some(leader)
    return said
