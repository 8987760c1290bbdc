"""Completion in a shell: what the real program answers to one, and in a real bash."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from prunus.runtime import display
from prunus.runtime.cli import cli
from prunus.runtime.cli.completion import find_classes, short_pid
from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Profile
from tests.runtime.shell import Shell, daemon_in


def complete(shell: Shell, line: str, kind: str = "zsh", *options: str, timeout_s: float = 20.0) -> dict[str, str]:
    """What could stand at the end of a line, with what is said of it."""
    asked = {"_PRUNUS_COMPLETE": f"{kind}_complete", "PRUNUS_COMPLETION_TIMEOUT_S": str(timeout_s)}
    words = line.split()
    position = len(words) - (0 if line.endswith(" ") else 1)
    ended = subprocess.run(
        [sys.executable, *options, "-m", "prunus.runtime.cli"],
        cwd=shell.folder,
        env=shell.environment | {"COMP_WORDS": line, "COMP_CWORD": str(position)} | asked,
        capture_output=True,
        text=True,
        check=True,
        timeout=25,
    )
    if options:
        return dict.fromkeys(ended.stderr.splitlines(), "")
    assert ended.stderr == ""
    lines = ended.stdout.splitlines()
    if kind == "bash":
        return {value.partition(",")[2]: "" for value in lines if value}
    return {lines[at + 1]: lines[at + 2] for at in range(0, len(lines) - 2, 3)}


# --- without a daemon -------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_commands_and_options_are_completed(alone: Shell) -> None:
    """With the first sentence of their help."""
    assert complete(alone, "prunus laun")["launch"].startswith("Have a process run")
    assert "--tag" in complete(alone, "prunus launch --t", "bash")
    assert {"start", "stop", "status"} <= set(complete(alone, "prunus daemon "))


def test_without_a_profile_or_a_daemon_nothing_is_completed_and_nothing_is_said(alone: Shell) -> None:
    """A shell has no place for errors."""
    assert complete(alone, "prunus show ") == {}
    assert complete(alone, "prunus daemon logs ") == {}
    alone("init")
    assert complete(alone, "prunus show ") == {}
    assert complete(alone, "prunus list --tag ") == {}
    assert complete(alone, "prunus tasks list ") == {}


def test_the_own_profiles_are_completed(alone: Shell) -> None:
    """By their names."""
    alone("init", "--profile", "mine")
    assert list(complete(alone, "prunus --profile m")) == ["mine"]
    assert list(complete(alone, "prunus list --profile ")) == ["mine"]


def test_classes_are_found_without_running_any_code(tmp_path: Path) -> None:
    """In files and packages of the folder, derived from ours directly or not."""
    (tmp_path / "flow.py").write_text(
        "from prunus import Process, WorkChain\nraise SystemExit('this was run')\n"
        "class Relax(Process[int, str]):\n    class Inner(Process): ...\n"
        "class Scan(\n    prunus.WorkChain,\n): ...\nclass Better(Relax): ...\nclass Other(dict): ...\n"
    )
    package = tmp_path / "lib"
    package.mkdir()
    (package / "__init__.py").write_text("class Top(Process): ...\n")
    (package / "deep.py").write_text("class Deep(WorkChain): ...\n")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "no.py").write_text("class No(Process): ...\n")
    assert list(find_classes(tmp_path, "", seconds=20)) == [
        "flow:Relax",
        "flow:Scan",
        "flow:Better",
        "lib:Top",
        "lib.deep:Deep",
    ]
    assert list(find_classes(tmp_path, "lib.deep:", seconds=20)) == ["lib.deep:Deep"]
    assert list(find_classes(tmp_path, "lib:T", seconds=20)) == ["lib:Top"]
    assert list(find_classes(tmp_path, "no.such:", seconds=20)) == []
    assert {name.partition(":")[0] for name in find_classes(tmp_path, "", seconds=-1)} == {"flow"}


def test_a_short_pid_is_the_one_that_is_shown() -> None:
    """Whatever the pid."""
    for pid in ("01a1ff77-8a12-7064-9104-37d1a40b3495", "01a1ff77-8a12-7064-9104-37d1a40b3495.1.17", "mine", "a.b"):
        assert short_pid(pid) == display.short(pid)


def test_every_pid_of_every_command_is_completed() -> None:
    """Also of commands that are added later: by the name of the parameter."""

    def parameters(command: click.Command, path: str) -> Iterator[tuple[str, click.Parameter]]:
        for parameter in command.params:
            yield f"{path} {parameter.name}", parameter
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                yield from parameters(inner, f"{path} {name}")

    found = {path: "shell_complete" in vars(parameter) for path, parameter in parameters(cli, "prunus")}
    wanted = [path for path in found if path.endswith((" pid", " pids", " queue", " tags", " tag", " process_class"))]
    assert len(wanted) > 20
    ours = [path for path in wanted if path != "prunus launch pid"]  # that one is a new pid
    assert [path for path in ours if not found[path]] == []


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_printed(alone: Shell, name: str) -> None:
    """With the line that sets it up; the shell itself accepts it, if it is here."""
    script = alone.process("completion", name).stdout
    assert script.startswith("# ")
    assert f"prunus completion {name}" in script.splitlines()[0]
    assert f"_PRUNUS_COMPLETE={name}_complete" in script
    program = shutil.which(name)
    if program is not None:
        subprocess.run([program, "-n"], input=script, text=True, check=True)


# --- with a daemon ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    with daemon_in(tmp_path_factory.mktemp("completion")) as shell:
        yield shell


@pytest.fixture(scope="module")
def waiting(shell: Shell) -> str:
    """A process that waits for a message."""
    pid: str = shell("launch", "flow:Talk", "--tag", "demo").stdout.strip()
    shell.until(pid, lambda facts: facts["state"] == "waiting")
    return pid


@pytest.fixture(scope="module")
def ended(shell: Shell) -> str:
    pid: str = shell("launch", "flow:Local").stdout.strip()
    shell.until(pid, lambda facts: facts["state"] == "finished")
    return pid


def test_pids_are_completed(shell: Shell, waiting: str, ended: str) -> None:
    """By their end, or their beginning, with what they are; those that were named already are left out."""
    end = waiting[-8:]
    assert complete(shell, f"prunus pause {end[:3]}") == {end: "Talk: waiting"}
    assert waiting in complete(shell, f"prunus show {waiting[:20]}")
    assert complete(shell, f"prunus pause {end} ") == {}


def test_the_pids_are_those_that_a_command_is_for(shell: Shell, waiting: str, ended: str) -> None:
    """The newest first."""
    end = waiting[-8:]
    assert complete(shell, "prunus pause ", "bash") == {end: ""}
    assert list(complete(shell, "prunus show ")) == [ended[-8:], end]
    assert complete(shell, "prunus play ") == {}
    assert complete(shell, "prunus retry ") == {}


def test_tags_queues_and_services_are_completed(shell: Shell, waiting: str) -> None:
    """From what the daemon knows."""
    assert list(complete(shell, "prunus list --tag ")) == ["demo"]
    assert {"control", "default"} <= set(complete(shell, "prunus tasks list "))
    assert {"control", "default", "requeue", "purge"} <= set(complete(shell, "prunus tasks "))
    assert {"broker", "daemon", "worker-1"} <= set(complete(shell, "prunus daemon logs "))


def test_messages_and_classes_are_completed(shell: Shell, waiting: str) -> None:
    """Those that the process waits for, and classes from the files of this folder."""
    assert list(complete(shell, f"prunus send {waiting[-8:]} ")) == ["go"]
    assert {"flow:Local", "flow:Stubborn", "flow:Talk"} <= set(complete(shell, "prunus launch flow:"))
    assert complete(shell, "prunus launch flow:St", "bash") == {"flow:Stubborn": ""}


def test_what_draws_is_not_imported(shell: Shell, waiting: str) -> None:
    """Each tenth of a second is felt after the Tab key."""
    imported = complete(shell, "prunus show ", "zsh", "-X", "importtime")
    names = {line.rpartition("|")[2].strip() for line in imported}
    assert "prunus.messaging" in names
    assert not names & {"rich", "rich.console", "textual", "psutil", "asyncssh", "prunus.runtime.controller"}


def test_a_broker_that_says_nothing_is_not_waited_for(shell: Shell, waiting: str) -> None:
    """And what needs no broker is completed all the same."""
    holder = read_holder(Profile.load(shell.folder / ".prunus").lock("broker"))
    assert holder is not None
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        assert complete(shell, "prunus show ", timeout_s=0.2) == {}
        assert "flow:Talk" in complete(shell, "prunus launch flow:", timeout_s=0.2)
    finally:
        os.kill(holder.pid, signal.SIGCONT)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
def test_in_a_real_bash_the_words_with_colons_are_completed(shell: Shell, waiting: str) -> None:
    """Bash ends words at colons and wants only what comes after them."""
    folder = shell.folder / "bin"
    folder.mkdir(exist_ok=True)
    program = folder / "prunus"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -m prunus.runtime.cli \"$@\"\n")
    program.chmod(0o755)
    script = """
        eval "$(prunus completion bash)"
        try() {
            COMP_LINE="$1" COMP_POINT=${#1} COMPREPLY=()
            _prunus_completion prunus
            echo "${COMPREPLY[*]}"
        }
        try "prunus launch flow:St"
        try "prunus laun"
        try "prunus pause "
    """
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=shell.folder,
        env=shell.environment | {"PATH": path, "COMP_WORDBREAKS": " \t\n:=", "PRUNUS_COMPLETION_TIMEOUT_S": "20"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.splitlines() == ["Stubborn", "launch", waiting[-8:]]
