"""The command line in a terminal: what people see, are asked and type."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import pytest

from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Profile
from tests.runtime.shell import Shell, daemon_in
from tests.runtime.terminal import terminal


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell in a folder whose daemon runs, with one worker."""
    with daemon_in(tmp_path_factory.mktemp("live")) as shell:
        yield shell


def widths(text: str) -> list[int]:
    return [len(line) for line in text.splitlines()]


def test_a_list_fits_into_a_narrow_terminal(live: Shell) -> None:
    """In 60 columns and in 120: no line is longer, every age is there, and the last line says how many they are."""
    pid = live("launch", "flow:Stubborn", "--tag", "narrow", "--priority", "3").stdout.strip()
    live.until(pid, lambda facts: facts["state"] == "waiting")
    for columns in (60, 120):
        with terminal(live, "list", "--tag", "narrow", columns=columns) as shown:
            text = shown.end()
        assert max(widths(text)) <= columns
        header, row, number = text.splitlines()
        assert re.fullmatch(r"pid +class +state +priority +step +status +age *", header)
        assert re.fullmatch(rf"{pid[-8:]}  .*  3  .* s *", row)
        assert number == "1 process"
        assert "\x1b[1m" in shown.raw
    live("kill", pid)


def test_a_wide_list_is_not_cut(live: Shell) -> None:
    """The terminal breaks its lines; without --wide they are cut."""
    pid = live("launch", "flow:Stubborn", "--tag", "wide").stdout.strip()
    live.until(pid, lambda facts: facts["state"] == "waiting")
    with terminal(live, "list", "--wide", "--tag", "wide", columns=60) as shown:
        text = shown.end()
    assert re.search(rf"^{pid}  flow:Stubborn  waiting.*  wide ", text, re.MULTILINE)
    assert live("show", pid[-8:-2]).stdout.startswith("pid ")  # also the beginning of what a list shows
    live("kill", pid)


def test_a_watch_draws_the_tree_until_it_ends(live: Shell) -> None:
    """With a bar of the children that have ended, and the exit code of the end."""
    file = live.folder / "gate"
    with terminal(live, "launch", "flow:Family", f"file={file}", "--wait") as shown:
        pid = shown.until(r"launched ([0-9a-f-]{36})")[1]
        shown.until(r"Family .*waiting .* 0 of 2 ended")
        shown.until(r"── ● Gated [0-9a-f]{8}  running  run  ██████░░░░░░ 50% half of it")
        file.touch()
        text = shown.end()
    assert re.search(rf"✓ Family {pid[-8:]}  finished  2 of 2 ended", text)
    failing = live.launch("Boom")
    with terminal(live, "watch", failing) as shown:
        assert "ZeroDivisionError: no good" in shown.end(1)


def test_ctrl_c_leaves_a_watch_quietly(live: Shell) -> None:
    """Exit code 130, no traceback, and the process goes on."""
    pid = live.launch_feature("Gated", f"file={live.folder / 'never'}")
    for words, what in [(["watch", pid], "Gated"), (["watch"], "Gated"), (["logs", "-f", pid], "waiting for the file")]:
        with terminal(live, *words) as shown:
            shown.until(what)
            shown.interrupt()
            assert "Traceback" not in shown.end(130)
    assert live.record(pid)["state"] == "running"
    live("kill", pid)


def test_a_watch_says_that_the_broker_does_not_answer(live: Shell) -> None:
    """And goes on when it does again."""
    pid = live.launch_feature("Gated", f"file={live.folder / 'never-2'}")
    holder = read_holder(Profile.load(live.folder / ".prunus").lock("broker"))
    assert holder is not None
    with terminal(live, "watch", pid) as shown:
        shown.until("Gated")
        os.kill(holder.pid, signal.SIGSTOP)
        try:
            shown.until(r"The broker has not answered for 3\.\d s; waiting for it")
        finally:
            os.kill(holder.pid, signal.SIGCONT)
        live("kill", pid)
        assert re.search(r"killed", shown.end(1))


@pytest.mark.timeout(120)
def test_killing_by_filters_is_asked_first(live: Shell) -> None:
    """On a terminal; the answer no, or none at all, leaves them alone; --yes does not ask, nor do pids."""
    pids = {live.launch("Ask", "--tag", "asked") for _ in range(3)}
    for pid in pids:
        live.until(pid, lambda facts: facts["state"] == "waiting")
    with terminal(live, "kill", "--tag", "asked") as shown:
        shown.until(r"Kill 3 processes, and their children, for good\? \[y/N\]")
        shown.type("n\n")
        assert "Aborted" in shown.end(1)
    assert set(live("list", "--tag", "asked", "-q").stdout.split()) == pids
    first, *others = sorted(pids)
    with terminal(live, "kill", first) as shown:
        assert shown.end() == f"killed {first}\n"
    with terminal(live, "kill", "--tag", "asked") as shown:
        shown.until(r"Kill 2 processes")
        shown.type("y\n")
        text = shown.end()
    assert {f"killed {pid}" for pid in others} <= set(text.splitlines())
    assert text.splitlines()[-1] == "killed: 2 processes"
    with terminal(live, "delete", "--tag", "asked", "-y") as shown:
        assert shown.end().splitlines()[-1] == "deleted: 3 processes"
    assert live("list", "--all", "--tag", "asked", "-q").stdout == ""


def test_ctrl_c_at_a_question_is_no_answer(live: Shell) -> None:
    """Exit code 130, no traceback, and they live."""
    pids = {live.launch("Ask", "--tag", "spared") for _ in range(2)}
    for pid in pids:
        live.until(pid, lambda facts: facts["state"] == "waiting")
    for words in ["kill", "--tag", "spared"], ["tasks", "delete", "--queue", "spared", "--all"]:
        with terminal(live, *words) as shown:
            shown.until(r"\? \[y/N\]: ")
            shown.interrupt_until_it_ends()
            text = shown.end(130)
        assert re.search(r"\? \[y/N\]: (\^C)+\n", text)  # once is enough, unless it came before it waited for a key
        assert "Traceback" not in text
    assert set(live("list", "--tag", "spared", "-q").stdout.split()) == pids
    live("kill", *pids)


def test_a_dumb_terminal_is_written_to_like_a_pipe(live: Shell) -> None:
    """Lines without colours or movements of a cursor: those of a watch, too. What has to draw says that it can't."""
    with terminal(live, "launch", "tests.runtime.workflows:Add", "a=1", "--wait", TERM="dumb") as shown:
        text = shown.end()
    assert re.findall(r"  Add  (\w+)", text) == ["created", "running", "finished"]
    assert "\x1b" not in shown.raw
    failing = live.launch("Boom")
    live("watch", failing, code=1)
    for words in ["list", "--all"], ["logs", failing]:
        with terminal(live, *words, TERM="dumb") as shown:
            shown.end()
        assert "\x1b" not in shown.raw
    with terminal(live, "logs", failing, NO_COLOR="1") as shown:
        assert "ZeroDivisionError" in shown.end()
    assert "\x1b" not in shown.raw
    for words in ["top"], ["broker", "status", "--watch"], ["daemon", "status", "--watch"]:
        with terminal(live, *words, TERM="dumb") as shown:
            assert "needs a terminal, and not a dumb one" in " ".join(shown.end(2).split())


def test_what_takes_long_says_how_far_it_is(live: Shell) -> None:
    """A bar while running steps end, which is gone when they have."""
    files = [live.folder / f"step-{number}" for number in range(2)]
    for file in files:
        pid = live.launch_feature("GatedChain", f"file={file}", "--tag", "slow")
        live.until(pid, lambda facts: facts["step"] == "wait")
    with terminal(live, "pause", "--tag", "slow") as shown:
        shown.until(r"░{20}  0 of 2 paused; waiting for [^(]*\(\d+ s\) \.\.\.")
        files[0].touch()
        shown.until(r"██████████░{10}  1 of 2 paused")
        files[1].touch()
        shown.end()
    assert shown.raw.rstrip().rpartition("\x1b[2K")[2].strip().endswith("paused: 2 processes")
    live("kill", "--tag", "slow")


def test_show_leaves_out_what_is_long(live: Shell) -> None:
    """Forty lines of steps and twelve events on a terminal; everything in a pipe."""
    file = live.folder / "journal"
    pid = live.launch("Journal", f"file={file}", "steps=60")
    live.until(pid, lambda facts: facts["state"] == "finished")
    with terminal(live, "show", pid) as shown:
        text = shown.end()
    assert re.search(r"^steps, the last 40 of 6\d$", text, re.MULTILINE)
    assert re.search(r"^history, the last 12 of \d+ events$", text, re.MULTILINE)
    piped = live("show", pid).stdout
    assert len(re.findall(r"^write  ", piped, re.MULTILINE)) >= 60
    assert "\nsteps\n" in piped
