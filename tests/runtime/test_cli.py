"""The command line as people and scripts use it: what it prints where, and its exit codes."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import prunus
from prunus.runtime.cli import cli
from prunus.runtime.cli.group import EXIT_CODES, OTHER_NAMES
from prunus.runtime.locks import ServiceLock, read_holder
from prunus.runtime.profile import Profile
from tests.runtime.shell import FLOW, UUID, Shell, daemon_in, said_by

# --- without a daemon -------------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_help_is_quick_and_names_every_command(shell: Shell) -> None:
    """It imports click and none of what a command needs."""
    text = shell.process("--help").stdout
    listed, _, epilog = text.partition("Processes:")[2].partition("Exit codes:")
    assert sorted(cli.commands) == sorted(re.findall(r"^  (\w+) +\S", listed, re.MULTILINE))
    for command in cli.commands:
        shell(command, "--help")
    assert "..." not in listed
    assert all(f"{code}: " in epilog for code in EXIT_CODES)
    heavy = {"zmq", "yaml", "rich", "psutil", "anyio", "prunus.processes"}
    code = f"import sys, prunus.runtime.cli.commands; sys.exit(str({heavy} & set(sys.modules)))"
    ended = subprocess.run(
        [sys.executable, "-c", code], env=shell.environment, capture_output=True, text=True, check=False
    )
    assert ended.stderr.strip() == "set()"


@pytest.mark.parametrize(
    ("module", "code"), [("prunus.runtime.cli.daemon", -signal.SIGINT), ("prunus.runtime.connecting", 130)]
)
def test_ctrl_c_is_quiet_from_the_beginning(shell: Shell, module: str, code: int) -> None:
    """While commands are imported it just ends; later its exit code says so. There is never a traceback."""
    program = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Pressed:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Pressed())
from prunus.runtime.cli import main
sys.argv = ["prunus", "broker", "limit", "default"]
main()
"""
    shell("init")
    with ServiceLock(Profile.load(shell.folder / ".prunus").lock("broker")):  # as if one ran
        ended = subprocess.run(
            [sys.executable, "-c", program],
            cwd=shell.folder,
            env=shell.environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", "")


def test_the_words_of_other_tools_lead_to_ours(shell: Shell) -> None:
    """`prunus ps` is no command, and says which one it is here; each one that is named exists."""
    assert "No such command 'ps'. Here it is `prunus list`." in shell.error("ps", code=2)
    assert "`prunus schedule remove`" in shell.error("schedule", "rm", "x", code=2)
    assert "Did you mean 'list'?" in shell.error("lst", code=2)
    for group, names in OTHER_NAMES.items():
        known = cli if group is None else cli.commands[group]
        assert isinstance(known, click.Group)
        assert not set(names) & set(known.commands), group
        for told in names.values():
            for words in re.findall(r"prunus ([a-z -]+)", told):
                command: click.Command = cli
                for word in words.split():
                    if word.startswith("-"):
                        break
                    assert isinstance(command, click.Group), told
                    command = command.commands[word]


def test_a_pid_is_one_word(shell: Shell) -> None:
    """Lists of pids are lines, and words of a shell."""
    shell("init")
    for pid in ("a b", "a\nb", "", "\x1b[2J"):
        assert "a pid is a text without spaces" in shell.error("launch", "--pid", pid, "a:B", code=2)


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
        (["send", "x", "note", "["], "VALUE: this is not valid YAML"),
        (["query", "x", "where", "y"], "'y' is not of the form key=value"),
        (["edit", "x"], "Missing argument 'KEY=VALUE...'"),
        (["pause", "--all", "--at", "run"], "--at goes with PID..."),
        (["play", "--all", "--until", "run"], "--until goes with PID..."),
        (["fork", "x", "a=1"], "`--at STEP` is missing"),
        (["lsit"], "No such command 'lsit'"),
    ]:
        assert complaint in shell.error(*words, code=2)


OF_THIS_HOST = (
    *(f"daemon {name}" for name in ("start", "run", "stop", "restart", "reload", "status", "scale 2", "logs", "unit")),
    *("key add x --role viewer", "key list", "key revoke x"),
    *("broker run", "broker backup x.db", "broker restore x.db", "broker vacuum"),
    *("init", "init --profile ./other", "doctor", "doctor --fix"),
)


@pytest.mark.parametrize("words", OF_THIS_HOST)
def test_a_key_is_never_ignored(shell: Shell, words: str) -> None:
    """What is about a profile of this host refuses a key, says which profile it would have been, and touches none."""
    shell("init", "-w", "1")
    before = {file: file.stat().st_mtime_ns for file in shell.folder.rglob("*") if file.is_file()}
    for line in (["--key", "some.key", *words.split()], [*words.split(), "--key", "some.key"]):
        said = shell.error(*line, code=2)
        assert f"is about a profile of the host on which it runs (here {shell.folder / '.prunus'})" in said
        assert "run it on the broker's own host" in said
        assert "not with --key" in said
    assert {file: file.stat().st_mtime_ns for file in shell.folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("option", ["--key", "--profile"])
def test_a_place_that_is_empty_is_none(shell: Shell, option: str) -> None:
    """A variable of the shell that is not set must not lead to the profile of this folder."""
    assert "it is empty" in shell.error(option, "", "list", code=2)


def test_a_key_is_refused_where_there_is_no_profile(shell: Shell) -> None:
    """It is the key that is wrong there, not the lack of a profile."""
    assert "`prunus daemon stop` is about a profile" in shell.error("daemon", "stop", "--key", "some.key", code=2)


def test_which_commands_are_about_a_profile_of_this_host() -> None:
    """Those that ask for it are those that are tested to refuse a key."""

    def leaves(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
        for name, command in group.commands.items():
            if isinstance(command, click.Group):
                yield from leaves(command, f"{path}{name} ")
            else:
                yield f"{path}{name}", command

    asking = {
        path
        for path, command in leaves(cli, "")
        if command.callback is not None and re.search(r"find_profile|refuse_key", inspect.getsource(command.callback))
    }
    asking.remove("worker")  # which takes either
    assert asking == {
        path for path in dict(leaves(cli, "")) if any(f"{each} ".startswith(f"{path} ") for each in OF_THIS_HOST)
    }


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
            _, error = said_by(process)
        assert "Traceback" in error
        assert "ProfileError" in error


# --- with a daemon ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell in a folder whose daemon runs, with one worker."""
    with daemon_in(tmp_path_factory.mktemp("live")) as shell:
        yield shell


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


def test_in_a_pipe_each_change_is_a_line(live: Shell) -> None:
    """Of a launch that is waited for: from its beginning on, however quickly a state has passed."""
    words = ("launch", "tests.runtime.workflows:Add", "a=1", "--pid", "piped", "--wait")
    live(*words)
    ended = live(*words)  # it has ended before anybody looks
    assert re.findall(r"^\d\d:\d\d:\d\d  \S+  Add  (.*)$", ended.stderr, re.MULTILINE) == [
        "created  run",
        "running  run",
        "finished",
    ]


def test_control_from_the_command_line(live: Shell) -> None:
    """pause, play, resume and kill, by the end of a pid; what can't be done is said for that process alone."""
    pid, other = live.launch("Ask"), live.launch("Ask")
    live.until(pid, lambda facts: facts["state"] == "waiting")
    paused = live("pause", pid[-8:], other[-8:], "-m", "look").stdout.splitlines()  # each as soon as it is true
    assert sorted(paused) == [f"paused {pid}", f"paused {other}"]
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


def test_messages_queries_and_updates(live: Shell) -> None:
    """Answers are YAML; what does not fit is refused with what would; a message is kept until it is used."""
    pid = live.launch_feature("Review")
    live.until(pid, lambda facts: facts["names"])
    assert live("query", pid[-8:], "limit_plus", "more=2").stdout == "5\n"
    assert "there are: limit_plus, set_limit" in live.error("query", pid, "limit")
    assert "expected int, got 'x' (str)" in live.error("query", pid, "limit_plus", "more=x")
    assert live("update", pid, "set_limit", "limit=7").stdout == "3\n"
    assert live.error("update", pid, "set_limit", "limit=-1") == "Error: ValueError: a limit is not negative\n"
    assert "did you mean 'approve'?" in live.error("send", pid, "aprove", "true")
    assert "expected bool, got 'maybe' (str)" in live.error("send", pid, "approve", "maybe")
    assert live("send", pid, "comment", "well").stdout == f"sent to {pid}\n"
    text = live("show", pid).stdout
    assert re.search(r"^state +waiting\n", text, re.MULTILINE)
    assert re.search(r"^waits for +the message approve or the time \d{4}-.* \(in \d+ min \d+ s\)$", text, re.MULTILINE)
    assert re.search(r"^messages +1 not used yet$", text, re.MULTILINE)
    assert re.search(rf"^what to do +`prunus send {pid[-8:]} approve \[VALUE\]` sends", text, re.MULTILINE)
    assert re.search(r"waiting, wakes in 59 min  decide  waits for the message approve ", live("list").stdout)
    assert f"`prunus send {pid[-8:]} approve [VALUE]`" in live.error("resume", pid, "1")
    live("send", pid, "approve", "true")
    assert live.until(pid, lambda facts: facts["state"] == "finished")["value"] == "approved"
    assert "alive" in live.error("send", pid, "approve", "true")
    for words in (["send", "nobody", "x"], ["query", "nobody", "x"], ["fork", "nobody"], ["logs", "nobody"]):
        assert "there is no process nobody" in live.error(*words)


def test_answers_and_values_of_every_form(live: Shell) -> None:
    """None is null, a table is YAML, and what the last step returned is the output of a process without outputs."""
    pid = live("launch", "flow:Talk").stdout.strip()
    live.until(pid, lambda facts: facts["names"])
    assert live("query", pid, "nothing").stdout == "null\n"
    assert live("query", pid, "table").stdout == "- name: Cu\n  scales: [0.9, 1.0]\n"
    with live.begin("launch", "flow:Talk", "--pid", pid, "--wait") as process:
        live("send", pid, "go")
        out, _ = said_by(process)
    assert (process.returncode, out) == (0, "|-\n  one\n  two\n")
    assert "\nreturned\n|-\n  one\n  two\n" in live("show", pid).stdout


def test_a_process_between_two_attempts(live: Shell) -> None:
    """It says which attempt failed, why, and when the next one begins; the log has the traceback."""
    pid = live("launch", "flow:Stubborn").stdout.strip()
    live.until(pid, lambda facts: facts["state"] == "waiting")
    said = "attempt 1 of 3 failed (ConnectionError: no licence is free); again in 3600 s"
    assert re.search(rf"waiting, wakes in 59 min  run   {re.escape(said)}  ", live("list").stdout)
    text = live("show", pid).stdout
    assert re.search(rf"^status +{re.escape(said)}$", text, re.MULTILINE)
    assert re.search(r"^waits for +the time ", text, re.MULTILINE)
    log = live("logs", pid).stdout
    assert re.match(r"\S+ \S+  ERROR   \[run\]  Traceback \(most recent call last\):\n  File \".*flow.py\", line", log)
    assert log.endswith("ConnectionError: no licence is free\n")
    live("kill", pid)


def test_a_step_that_failed_pauses_and_says_what_to_do(live: Shell) -> None:
    """show, watch, launch --wait and logs -f say why and how to go on; the doctor knows of it; and so it goes on."""
    file = live.folder / "careful"
    with live.begin("launch", "tests.runtime.features:Careful", f"file={file}", "--wait") as waiting:
        assert waiting.stderr
        lines = iter(waiting.stderr)
        pid = next(lines).split()[1]
        short = pid[-8:]
        why = "the step run failed: FileNotFoundError: it is not there yet"
        advice = f"-> `prunus logs {short}` has the traceback; mend the cause, then `prunus play {short}` tries again"
        assert any(f"Careful  running  paused  run  {why}" in line for line in lines)
        assert next(lines) == f"{advice}\n"
        text = live("show", short).stdout
        assert re.search(rf"^what to do +{re.escape(advice[3:])}$", text, re.MULTILINE)
        findings = live("doctor").stdout
        assert re.search(r"^warning +paused +1 process will not go on until somebody plays it$", findings, re.MULTILINE)
        with live.begin("logs", "-f", short) as following:
            assert following.stdout
            assert following.stderr
            assert next(following.stderr) == f"{short} is paused: {why}\n"
            assert next(following.stderr) == f"{advice}\n"
            file.touch()
            live("play", short)
            out, error = said_by(following)
        assert (following.returncode, error) == (0, "")
        assert "FileNotFoundError: it is not there yet" in out
        out, _ = said_by(waiting)
    assert (waiting.returncode, out) == (0, "found\n")


def test_a_step_of_unknown_effect_is_settled(live: Shell) -> None:
    """It is not run again by itself: it says so, and both ways to go on."""
    pid = live("launch", "flow:Dying").stdout.strip()
    live.until(pid, lambda facts: facts["play"] == "paused")
    text = live("show", pid).stdout
    assert "nobody saw it end; whether it took effect is unknown" in text
    assert re.search(
        rf"^what to do +`prunus play {pid[-8:]}` runs the step again, `prunus settle {pid[-8:]} \[VALUE\]`",
        text,
        re.MULTILINE,
    )
    assert live("settle", pid, "[1, No]").stdout == f"settled {pid}\n"
    assert live.until(pid, lambda facts: facts["state"] == "finished")["value"] == [1, "No"]
    assert "alive" in live.error("settle", pid, "1")


def test_what_is_set_aside_ends_the_wait_for_it(live: Shell) -> None:
    """launch --wait, watch and logs -f say so and fail, instead of waiting for ever."""
    elsewhere = live.folder / "apart"
    elsewhere.mkdir()
    (elsewhere / "broken.py").write_text("from prunus import Process\nclass Apart(Process):\n    def run(self): ...\n")
    ended = live("launch", "broken:Apart", "--wait", below="apart", code=1)
    said = rf"Error: process ({UUID}) is set aside: .*no module 'broken'.*\nMend the cause, then "
    match = re.search(said, ended.stderr)
    assert match, ended.stderr
    pid = match[1]
    assert ended.stderr.endswith(f"`prunus retry {pid[-8:]}`.\n")
    for words in ["watch", pid], ["logs", "-f", pid]:
        assert f"Mend the cause, then `prunus retry {pid[-8:]}`." in live(*words, code=1).stderr
    assert re.search(
        rf"^what to do +mend the cause, then `prunus retry {pid[-8:]}`$", live("show", pid).stdout, re.MULTILINE
    )
    assert "set aside" in live.error("resume", pid)
    live("kill", pid)


def test_a_watch_fails_like_what_it_watches(live: Shell) -> None:
    """So that a script can rely on it; the reason is the last that it says."""
    pid = live.launch("Boom")
    ended = live("watch", pid, code=1)
    assert ended.stderr.startswith(f"Error: process {pid} is EXCEPTED (ZeroDivisionError: no good)\n")
    text = live("show", pid).stdout
    assert re.search(r"^why +ZeroDivisionError: no good$", text, re.MULTILINE)
    assert re.search(rf"^what to do +mend the cause, then `prunus retry {pid[-8:]}` goes on", text, re.MULTILINE)
    assert "attempts.py" not in text


def test_progress_and_log_of_a_running_step(live: Shell) -> None:
    """show says how far it is; a log is followed to the end of its process, and one without a word says so."""
    file = live.folder / "gate"
    pid = live.launch_feature("Gated", f"file={file}")
    live.until(pid, lambda facts: facts["progress"])
    assert re.search(r"^progress +50% half of it$", live("show", pid).stdout, re.MULTILINE)
    assert live("pause", pid, "--no-wait").stdout == f"pausing {pid}\n"
    assert live.record(pid)["play"] == "pausing"
    live("play", pid)
    with live.begin("logs", "-f", pid) as process:
        assert process.stdout
        assert next(process.stdout).endswith("REPORT  [run]  waiting for the file\n")
        file.touch()
        out, error = said_by(process)
    assert (process.returncode, out, error) == (0, "", "")
    quiet = live.launch("Add", "a=1")
    live("watch", quiet)
    assert "said nothing yet" in live("logs", quiet).stderr


def test_breakpoints_edits_and_forks(live: Shell) -> None:
    """A breakpoint is a step that exists; the context is changed while it holds; a fork begins at a step on record."""
    chain = "tests.runtime.features:Chain"
    assert "no step 'secnd'; did you mean 'second'?" in live.error("launch", chain, "--pause-at", "secnd")
    pid = live("launch", chain, "bad=true", "--paused", "--tag", "chained").stdout.strip()
    assert live.record(pid)["state"] == "created"
    assert "there is no step 'x'; there are: first, second, third" in live("pause", pid, "--at", "x", code=1).stderr
    assert live("pause", pid, "--at", "second").stdout == f"will pause before second: {pid}\n"
    live("play", pid, "--until", "second")
    facts = live.until(pid, lambda facts: facts["play"] == "paused" and facts["step"] == "second")
    assert facts["status"] == "breakpoint before the step second"
    assert live("edit", pid, "mended=true", "text=A").stdout == f"edited {pid}\n"
    live("play", pid)
    assert live.until(pid, lambda facts: facts["state"] == "finished")["value"] == "Abc"
    assert live("logs", pid).stdout.endswith("REPORT  [third]  the end is near\n")
    table = live("fork", pid).stdout
    assert re.fullmatch(r"step +before\n(\w+ +\S+ s ago\n)+", table)
    assert re.findall(r"^(\w+) .*ago$", table, re.MULTILINE) == ["first", "second", "third"]
    forked = live("fork", pid, "--at", "third", "text=x").stdout.strip()
    assert live.until(forked, lambda facts: facts["state"] == "finished")["value"] == "xc"
    assert "on record: first, second" in live.error("fork", pid, "--at", "x")
    assert "None of its steps is on record" in live("fork", live("launch", chain, "--paused").stdout.strip()).stderr
    live("kill", "--all")


def test_the_items_of_a_fan_out(live: Shell) -> None:
    """Found by their short form, of which their parent has the first part; of many only some are shown."""
    pid = live.launch_feature("SumOfSquares", "count=30")
    ended = live("watch", pid)
    assert not re.search("Square  ", ended.stdout.replace("SumOfSquares", ""))
    short = f"{pid[-8:]}.1.17"
    assert live.record(short)["value"] == 289
    assert live.record(pid[:-4])["pid"] == pid
    assert len(live.record(pid)["children"]) == 30
    text = live("show", pid[-8:]).stdout
    assert "✓ 30 more finished\n30 of 30 ended\n" in text
    assert re.search(rf"^{re.escape(short)} +Square +finished", live("list", "--all").stdout, re.MULTILINE)


def test_a_pause_of_a_whole_family(live: Shell) -> None:
    """--cascade takes the children too, in both directions."""
    begun = live.folder / "nested"
    pid = live.launch("Nest", f"begun={begun}")
    while not begun.exists():
        pass
    [child] = live.record(pid)["children"]
    live("pause", pid, "--cascade", "--no-wait")
    live.until(child, lambda facts: facts["play"] == "pausing")
    live("play", pid, "--cascade")
    live.until(child, lambda facts: facts["play"] == "playing")
    live("kill", pid, "--force")
    live.until(child, lambda facts: facts["state"] == "killed")


def test_a_class_is_described_without_a_daemon(shell: Shell) -> None:
    """As Markdown, as JSON, and its outline as a diagram; no profile is needed."""
    chain = "tests.runtime.features:Chain"
    shell.folder.joinpath("flow.py").write_text(FLOW)
    assert "| `second` |" in shell("describe", chain).stdout
    assert shell("describe", chain, "--mermaid").stdout.startswith("flowchart TD\n")
    assert list(json.loads(shell("describe", chain, "--json").stdout)["steps"]) == ["first", "second", "third"]
    assert "`nothing()`" in shell("describe", "flow:Talk").stdout
    assert "no module 'nowhere'" in shell.error("describe", "nowhere:X")


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


@pytest.mark.timeout(120)
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
    assert re.search(r"^queue +ready +delayed", live("tasks").stdout) or "No queue" in live("tasks").stdout
    assert "processes" in json.loads(live("tasks", "--json").stdout)


def test_ctrl_c_is_quiet(live: Shell) -> None:
    """A watch without an end is left by it, without a traceback."""
    with live.begin("watch") as process:
        pid = live.launch("Add", "a=1")
        assert process.stdout
        assert any(pid[-8:] in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, error = said_by(process)
    assert (process.returncode, error) == (130, "")


def test_leaving_a_wait_does_not_end_the_process(live: Shell) -> None:
    """It says how to come back."""
    with live.begin("launch", "tests.runtime.workflows:Ask", "--wait") as process:
        assert process.stderr
        lines = iter(process.stderr)
        pid = next(lines).split()[1]
        assert any("waiting" in line for line in lines)
        process.send_signal(signal.SIGINT)
        _, error = said_by(process)
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
