"""The command line as people and scripts use it: what it prints where, and its exit codes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import prunus
from prunus.runtime.cli import cli
from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Profile

PROJECT = Path(prunus.__file__).parents[2]
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"

FLOW = """
from prunus import Process

class Local(Process):
    async def run(self):
        return None

class Late(Process):
    async def run(self):
        return None
"""


class Shell:
    """A folder in which `prunus` is called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PYTHONPATH": f"{Path(prunus.__file__).parents[1]}{os.pathsep}{PROJECT}",
            "XDG_DATA_HOME": str(folder / "data"),
            "PYTHONWARNINGS": "error",
        }
        self.environment.pop("PRUNUS_PROFILE", None)

    def __call__(self, *words: str, code: int | None = 0, below: str = ".") -> Result:
        """Call it, in this Python process; its exit code must be `code`."""
        path, modules = list(sys.path), set(sys.modules)
        try:
            with contextlib.chdir(self.folder / below):
                ended = CliRunner().invoke(
                    cli, words, env={**self.environment, "PRUNUS_PROFILE": None}, prog_name="prunus"
                )
        finally:
            sys.path[:] = path
            for name in ("late", "broken", "flow"):
                if name not in modules:
                    sys.modules.pop(name, None)
        assert code is None or ended.exit_code == code, f"{words}: {ended.exit_code}\n{ended.output}"
        assert "Traceback" not in ended.stderr
        return ended

    def process(self, *words: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Call it as a process of its own."""
        with self.begin(*words) as process:
            out, error = process.communicate(timeout=25)
        assert code is None or process.returncode == code, f"{words}: {process.returncode}\n{out}{error}"
        return subprocess.CompletedProcess(words, process.returncode, out, error)

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Call it and go on; to be used as a context manager."""
        command = [sys.executable, "-m", "prunus.runtime.cli", *words]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def error(self, *words: str, code: int = 1) -> str:
        """What it says when it fails, and that it says nothing else."""
        ended = self(*words, code=code)
        assert ended.stdout == ""
        if code == 1:
            assert ended.stderr.startswith("Error: ")
        return ended.stderr

    def launch(self, name: str, *words: str) -> str:
        return self("launch", f"tests.runtime.workflows:{name}", *words).stdout.strip()

    def __repr__(self) -> str:
        return f"Shell({str(self.folder)!r})"

    def record(self, pid: str) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self("show", "--json", pid).stdout)
        return facts

    def until(self, pid: str, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The facts of a process as soon as a condition holds of them."""
        while not holds(facts := self.record(pid)):
            pass
        return facts


# --- without a daemon -------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_help_is_quick_and_names_every_command(shell: Shell) -> None:
    """It imports click and none of what a command needs."""
    text = shell.process("--help").stdout
    assert list(cli.commands) == re.findall(r"^  (\w+) +\S", text.partition("Commands:")[2], re.MULTILINE)
    for command in cli.commands:
        shell(command, "--help")
    assert "..." not in text.partition("Commands:")[2]
    code = (
        "import sys, prunus.runtime.cli; sys.exit(str({'zmq', 'yaml', 'rich', 'psutil', 'anyio'} & set(sys.modules)))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], env=shell.environment, capture_output=True, text=True, check=False
    )
    assert ended.stderr.strip() == "set()"


def test_the_version(shell: Shell) -> None:
    """It is the package's."""
    assert shell("--version").stdout == f"prunus {prunus.__version__}\n"


def test_init_makes_the_profile_of_a_folder(shell: Shell) -> None:
    """Once; the second time it says that there is one."""
    text = shell("init", "-w", "3").stdout
    assert str(shell.folder / ".prunus") in text
    assert "prunus daemon start" in text
    assert Profile.load(shell.folder / ".prunus").config.workers == 3
    assert "there is a profile already" in shell.error("init")


def test_init_makes_a_profile_of_the_users_own(shell: Shell) -> None:
    """Its workers import from the folder in which it was made."""
    shell("init", "--profile", "mine")
    profile = Profile.load(shell.folder / "data" / "prunus" / "profiles" / "mine")
    assert profile.import_folders == [shell.folder]
    assert "mine" in shell("--profile", "mine", "daemon", "status", code=1).stdout
    assert "mine" in shell("daemon", "status", "--profile", "mine", code=1).stdout
    assert "no profile" in shell.error("--profile", "other", "list")


def test_without_a_profile_everything_says_how_to_make_one(shell: Shell) -> None:
    """One sentence, exit code 1."""
    for words in ["list"], ["show", "x"], ["watch"], ["tasks"], ["daemon", "start"], ["launch", "a:B"], ["kill", "x"]:
        assert "`prunus init` makes one" in shell.error(*words)


def test_without_a_daemon_everything_says_how_to_start_one(shell: Shell) -> None:
    """At once, without waiting for an answer that can't come."""
    shell("init")
    for words in ["list"], ["show", "x"], ["watch"], ["tasks"], ["pause", "--all"]:
        assert "`prunus daemon start` starts it" in shell.error(*words)
    assert "no daemon runs here" in shell.error("daemon", "scale", "2")
    assert shell("daemon", "stop").stdout == "No daemon was running.\n"
    assert "not running" in shell("daemon", "status", code=1).stdout
    status = json.loads(shell("daemon", "status", "--json", code=1).stdout)
    assert (status["daemon"], status["services"]) == (None, {})
    assert "daemon     not running" in shell("doctor", code=1).stdout


def test_a_command_that_is_written_wrongly_is_a_usage_error(shell: Shell) -> None:
    """Exit code 2, and what was meant."""
    shell("init")
    for words, complaint in [
        (["launch", "a:B", "x"], "'x' is not of the form key=value"),
        (["pause"], "say which processes"),
        (["kill", "x", "--all"], "say which processes"),
        (["resume", "x", "["], "VALUE: this is not valid YAML"),
        (["list", "--state", "happy"], "'happy' is not one of"),
        (["daemon", "scale", "-1"], "scale"),
        (["daemon", "logs", "nobody"], "there is no log 'nobody'"),
        (["lsit"], "No such command 'lsit'"),
    ]:
        assert complaint in shell.error(*words, code=2)


def test_a_wrong_configuration_is_said_by_everybody(shell: Shell) -> None:
    """Also by the daemon's start, before anything is started."""
    shell("init")
    (shell.folder / ".prunus" / "config.yaml").write_text("workers: many\n")
    assert "workers: expected int" in shell.error("daemon", "start")
    assert "workers: expected int" in shell("doctor", code=1).stdout


def test_a_class_that_cannot_be_loaded_is_said_before_anything_is_sent(shell: Shell) -> None:
    """Whatever the reason; the daemon is not asked."""
    shell("init")
    (shell.folder / "broken.py").write_text("1 / 0\n")
    assert "no module 'nowhere'" in shell.error("launch", "nowhere:Cls")
    assert "ZeroDivisionError" in shell.error("launch", "broken:Cls")
    assert "package.module:Class" in shell.error("launch", "broken")
    config = shell.folder / ".prunus" / "config.yaml"
    config.write_text(config.read_text().replace('["*"]', '["mine.*"]'))
    assert "not among those allowed here (mine.*)" in shell.error("launch", "broken:Cls")


def test_a_traceback_is_shown_when_asked_for(shell: Shell) -> None:
    """--debug, before or after the command."""
    for words in ["--debug", "list"], ["list", "--debug"]:
        with shell.begin(*words) as process:
            _, error = process.communicate(timeout=20)
        assert "Traceback" in error
        assert "ProfileError" in error


# --- with a daemon ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell in a folder whose daemon runs, with one worker."""
    shell = Shell(tmp_path_factory.mktemp("live"))
    (shell.folder / "flow.py").write_text(FLOW)
    shell("init", "-w", "1")
    config = shell.folder / ".prunus" / "config.yaml"
    config.write_text(config.read_text().replace('[".."]', f'["..", "{PROJECT}"]').replace("10.0", "1.0"))
    try:
        assert shell.process("daemon", "start").stdout.startswith("The daemon runs (pid ")
        yield shell
    finally:
        assert shell.process("daemon", "stop").stdout == "The daemon has stopped; nothing is lost.\n"


def test_launch_prints_the_pid_alone(live: Shell) -> None:
    """So that a script can use it; launching a pid again changes nothing."""
    pid = live.launch("Add", "a=3", "b=4", "--tag", "sums")
    assert re.fullmatch(UUID, pid)
    assert live.launch("Add", "a=3", "--pid", pid) == pid
    facts = live.until(pid, lambda facts: facts["state"] == "finished")
    assert facts["outputs"] == {"sum": 7}
    assert facts["inputs"] == {"a": 3, "b": 4}
    assert facts["tags"] == ["sums"]


def test_launch_with_wait_shows_progress_and_prints_outputs(live: Shell) -> None:
    """Progress on stderr, a line a change where nobody looks at a terminal; outputs as YAML on stdout."""
    ended = live("launch", "tests.runtime.workflows:Fan", "count=3", "--wait")
    assert ended.stdout == "total: 6\n"
    assert re.search(r"\d\d:\d\d:\d\d  [0-9a-f]{8}  Fan  finished", ended.stderr)
    assert len(re.findall(r"Add  finished", ended.stderr)) == 3
    assert "\x1b" not in ended.stderr


def test_launch_with_wait_fails_if_the_process_does(live: Shell) -> None:
    """Exit code 1, the error, and where to read more."""
    ended = live("launch", "tests.runtime.workflows:Boom", "--wait", code=1)
    assert ended.stdout == ""
    assert re.search(r"Error: .* is EXCEPTED \(ZeroDivisionError: no good\)\n`prunus show [0-9a-f]{8}`", ended.stderr)
    pid = re.search(UUID, ended.stderr)
    assert pid
    text = live("show", pid[0]).stdout
    assert 'raise ZeroDivisionError("no good")' in text
    assert re.search(r"running\.excepted +run +worker-1 +ZeroDivisionError: no good\n", text)


def test_wrong_inputs_are_all_named_before_anything_is_sent(live: Shell) -> None:
    """Every wrong port in one message, and no process."""
    error = live.error("launch", "tests.runtime.workflows:Add", "a=x", "c=3", "--tag", "wrong")
    assert "a: expected int" in error
    assert "c: " in error
    assert "No process" in live("list", "--all", "--tag", "wrong").stderr


def test_a_class_from_the_current_folder(live: Shell) -> None:
    """The folder is on the path, of the command and of the workers."""
    pid = live("launch", "flow:Local").stdout.strip()
    live.until(pid, lambda facts: facts["state"] == "finished")


def test_list_show_and_watch(live: Shell) -> None:
    """Tables without colours or trailing spaces; JSON with every fact; a watch that ends with its process."""
    pid = live.launch("Fan", "count=2", "--tag", "listed")
    assert live("watch", pid[-8:]).stdout.rstrip().endswith("Fan  finished")
    table = live("list", "--all", "--tag", "listed").stdout
    assert re.fullmatch(rf"pid +class +state +step +status +age\n{pid[-8:]}  Fan +finished +\S+ s\n", table)
    [row] = json.loads(live("list", "--state", "finished", "--tag", "listed", "--json").stdout)
    assert (row["pid"], row["state"], row["class_id"]) == (pid, "finished", "tests.runtime.workflows:Fan")
    text = live("show", pid).stdout
    for part in (pid, "finished", "count: 2", "total: 3", "children", "history", "created.running"):
        assert part in text
    assert text.count("Add") == 2
    assert not re.search(r" $|\x1b", text + table, re.MULTILINE)
    assert "snapshot:" in live("show", "--checkpoint", pid).stdout
    assert "No process" in live("list", "--tag", "listed").stderr
    limited = live("list", "--all", "--limit", "1")
    assert len(limited.stdout.splitlines()) == 2
    assert "--limit shows more" in limited.stderr


def test_control_from_the_command_line(live: Shell) -> None:
    """pause, play, resume and kill, by the end of a pid; what can't be done is said for that process alone."""
    pid, other = live.launch("Ask"), live.launch("Ask")
    live.until(pid, lambda facts: facts["state"] == "waiting")
    assert live("pause", pid[-8:], other[-8:], "-m", "look").stdout.splitlines() == [f"paused {pid}", f"paused {other}"]
    assert live.record(pid)["play"] == "paused"
    assert pid[-8:] in live("list", "--state", "paused").stdout
    live("play", pid)
    live("resume", pid, "{x: [1, No]}")
    assert live.until(pid, lambda facts: facts["outputs"])["outputs"] == {"answer": {"x": [1, "No"]}}
    ended = live("kill", pid, other, "-m", "enough", code=1)
    assert ended.stdout == f"killed {other}\n"
    assert re.match(rf"Error: {pid[-8:]}: the process is FINISHED", ended.stderr)
    assert live.record(other)["exit_message"] == "enough"


def test_all_at_once(live: Shell) -> None:
    """--all takes those to which it applies."""
    pids = {live.launch("Ask"), live.launch("Ask")}
    assert set(live("pause", "--all").stdout.split()) >= pids
    assert set(live("play", "--all").stdout.split()) >= pids
    assert set(live("kill", "--all").stdout.split()) >= pids
    assert live("list").stdout == ""


def test_retry_continues_what_excepted(live: Shell) -> None:
    """From its last good checkpoint, once the cause is gone."""
    file = live.folder / "cause"
    pid = live.launch("Heal", f"file={file}")
    live.until(pid, lambda facts: facts["state"] == "excepted")
    file.touch()
    assert live("retry", pid[-8:]).stdout == f"continued {pid}\n"
    live.until(pid, lambda facts: facts["outputs"] == {"healed": True})
    assert "Error: " in live("retry", pid, code=1).stderr


def test_a_pid_must_mean_one_process(live: Shell) -> None:
    """Unknown or not unique: what there is."""
    first, second = live.launch("Add", "a=1", "--pid", "twin-1"), live.launch("Add", "a=1", "--pid", "twin-2")
    error = live.error("show", "twin-")
    assert "of 2 pids" in error
    assert first in error
    assert second in error
    assert live.record("win-1")["pid"] == first
    assert "there is no process nobody" in live.error("show", "nobody")
    assert "there is no process" in live.error("kill", "")


def test_a_process_whose_class_is_gone_is_found_by_the_doctor(live: Shell) -> None:
    """It is set aside with the reason and what to do, the doctor's exit code is 1; mended, it goes on."""
    elsewhere = live.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "late.py").write_text(FLOW)
    launched = live("launch", "late:Late", below="elsewhere")
    assert f"Warning: workers do not import from {elsewhere}" in launched.stderr
    pid = launched.stdout.strip()
    live.until(pid, lambda facts: facts["aside"])
    assert pid[-8:] in live("list", "--state", "aside").stdout
    findings = live("doctor", code=1).stdout
    assert re.search(rf"problem  {pid[-8:]} +Late is set aside: .*no module 'late'", findings)
    assert f"`prunus retry {pid[-8:]}`" in findings
    (elsewhere / "late.py").rename(live.folder / "late.py")
    live("retry", pid)
    live.until(pid, lambda facts: facts["state"] == "finished")
    assert "All is well" in live("doctor").stdout


def test_a_restart_keeps_the_processes_and_the_number_of_workers(live: Shell) -> None:
    """All services are other ones, and what waited waits."""
    pid = live.launch("Ask")
    live.until(pid, lambda facts: facts["state"] == "waiting")
    before = json.loads(live("daemon", "status", "--json").stdout)["services"]
    live.process("daemon", "restart")
    after = json.loads(live("daemon", "status", "--json").stdout)["services"]
    assert list(after) == list(before) == ["broker", "worker-1"]
    assert not {service["pid"] for service in before.values()} & {service["pid"] for service in after.values()}
    assert live.record(pid)["state"] == "waiting"
    live("kill", pid)


def test_the_daemon_is_scaled_and_shown(live: Shell) -> None:
    """status names all services with their pids, and its exit code says whether all is well."""
    assert live("daemon", "scale", "2").stdout == "The daemon has 2 workers from now on.\n"
    while live("daemon", "status", code=None).exit_code:
        pass
    status = json.loads(live("daemon", "status", "--json").stdout)
    assert list(status["services"]) == ["broker", "worker-1", "worker-2"]
    table = live("daemon", "status").stdout
    assert re.search(rf"worker-2 +{status['services']['worker-2']['pid']} +running", table)
    live("daemon", "scale", "1")
    while "worker-2" in json.loads(live("daemon", "status", "--json").stdout)["services"]:
        pass
    assert "runs already" in live.error("daemon", "start")
    assert "All is well" in live("doctor").stdout
    assert "taking processes" in live("daemon", "logs", "worker-1").stdout
    assert "==> broker" in live("daemon", "logs").stdout
    assert "sessions: " in live("tasks").stdout
    assert "processes" in json.loads(live("tasks", "--json").stdout)


def test_ctrl_c_is_quiet(live: Shell) -> None:
    """A watch without an end is left by it, without a traceback."""
    with live.begin("watch") as process:
        pid = live.launch("Add", "a=1")
        assert process.stdout
        assert any(pid[-8:] in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "")


def test_leaving_a_wait_does_not_end_the_process(live: Shell) -> None:
    """It says how to come back."""
    with live.begin("launch", "tests.runtime.workflows:Ask", "--wait") as process:
        assert process.stderr
        lines = iter(process.stderr)
        pid = next(lines).split()[1]
        assert any("waiting" in line for line in lines)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"It goes on without us: prunus watch {pid[-8:]}" in error
    assert live.record(pid)["state"] == "waiting"
    live("kill", pid)


def test_a_broker_that_is_killed_comes_back(live: Shell) -> None:
    """The daemon starts it again, and what was accepted is there."""
    pid = live.launch("Ask")
    live.until(pid, lambda facts: facts["state"] == "waiting")
    lock = Profile.load(live.folder / ".prunus").lock("broker")
    before = read_holder(lock)
    assert before
    os.kill(before.pid, signal.SIGKILL)
    assert live.record(pid)["state"] == "waiting"
    after = read_holder(lock)
    assert after
    assert after.pid != before.pid
    live("kill", pid)
