"""A profile that is closed, somebody else's, or has a configuration that can't be read: what commands say, and that a
daemon can be stopped in any case."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunus.files import why_refused
from prunus.messaging.access import Role
from prunus.messaging.keys import ClientKey
from prunus.runtime import daemon
from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Config, Profile
from prunus.runtime.services import Notes, read_notes, write_notes
from prunus.runtime.wish import Wish, write_wish
from tests.runtime.shell import Shell

IS_ROOT = os.getuid() == 0
WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if IS_ROOT else []
"""Root may do everything, unless it gives that up."""
STRANGER = 12345

if IS_ROOT and shutil.which("setpriv") is None:
    pytest.skip("root can't give up what it may do here", allow_module_level=True)


@pytest.fixture
def shell(short_folder: Path) -> Iterator[Shell]:
    shell = Shell(short_folder)
    yield shell
    for folder in (short_folder, *(each for each in short_folder.glob("**/") if each.is_dir())):
        folder.chmod(0o700)  # so that it can be removed
    shell("daemon", "stop", code=None)


def call(shell: Shell, *words: str) -> subprocess.CompletedProcess[str]:
    """Call it as somebody whom the modes of files stop."""
    command = [*WITHOUT_PRIVILEGES, sys.executable, "-m", "prunus.runtime.cli", *words]
    return subprocess.run(
        command, cwd=shell.folder, env=shell.environment, capture_output=True, text=True, timeout=60, check=False
    )


def error(shell: Shell, *words: str) -> str:
    """The sentence with which it fails."""
    done = call(shell, *words)
    assert (done.returncode, done.stdout) == (1, ""), done.stdout + done.stderr
    assert done.stderr.startswith("Error: ")
    assert "should not happen" not in done.stderr
    return done.stderr


@contextlib.contextmanager
def closed(*folders: Path) -> Iterator[None]:
    """Nobody may write there."""
    for folder in folders:
        folder.chmod(0o500)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o700)


# --- closed folders ---------------------------------------------------------------------------------


def test_a_profile_that_may_not_be_written_says_what_opens_it(shell: Shell) -> None:
    """Whatever would write to it names the folder that is closed, and the command; the others work."""
    shell("init", "-w", "0")
    profile = shell.folder / ".prunus"
    with closed(profile, profile / "run", profile / "logs"):
        for words in ("daemon start", "daemon run", "daemon restart", "broker run", "worker", "broker backup x.db"):
            assert f"Permission denied; `chmod u+rwx {profile / 'run'}` allows it" in error(shell, *words.split())
        added = error(shell, "key", "add", "a", "--role", "worker", "--at", "tcp://10.0.0.1:5010")
        assert f"`chmod u+rwx {profile}` allows it" in added
        assert "`prunus daemon start` starts it" in error(shell, "list")
        assert "no daemon runs" in call(shell, "daemon", "status").stdout
    with closed(profile / "logs"):
        assert f"`chmod u+rwx {profile / 'logs'}` allows it" in error(shell, "daemon", "start")


def test_a_profile_that_may_not_be_entered_says_what_opens_it(shell: Shell) -> None:
    """Every command; and none takes it for a folder without a profile."""
    shell("init")
    profile = shell.folder / ".prunus"
    profile.chmod(0)
    for words in ("init", "list", "daemon start", "daemon stop", "daemon status", "launch a:B", "key list"):
        assert f"Permission denied; `chmod u+rwx {profile}` allows it" in error(shell, *words.split())
    assert f"`chmod u+rwx {profile}` allows it" in call(shell, "doctor").stdout


def test_keys_that_may_not_be_touched_say_what_opens_them(shell: Shell) -> None:
    """Those of the broker in their folder, and that of a client."""
    shell("init", "--listen", "tcp://10.0.0.1:5010")
    keys, client = shell.folder / ".prunus" / "keys", shell.folder / "worker.key"
    client.chmod(0)
    assert f"Permission denied; `chmod u+rw {client}` allows it" in error(shell, "--key", "worker.key", "list")
    with closed(keys):
        assert f"Permission denied; `chmod u+rwx {keys}` allows it" in error(shell, "key", "revoke", "worker")
    keys.chmod(0)
    for words in ("key list", "key revoke worker", "daemon start"):
        assert f"Permission denied; `chmod u+rwx {keys}` allows it" in error(shell, *words.split())


def test_a_folder_in_which_nothing_can_be_made_says_what_opens_it(shell: Shell) -> None:
    """It gets no profile. A profile elsewhere is made, without the keys that were to be written here: they can be made
    later, by the command that is said."""
    folder = shell.folder / "folder"
    folder.mkdir()
    there = Shell(folder)
    elsewhere = shell.folder / "p"
    with closed(folder):
        assert f".prunus can't be made: Permission denied; `chmod u+rwx {folder}` allows it" in error(there, "init")
        said = call(there, "init", "--profile", str(elsewhere), "--listen", "tcp://10.0.0.1:5010").stderr
    add = f"prunus --profile {elsewhere} key add worker --role worker"
    assert "the profile is made, but not its key for a worker: " in said
    assert f"`chmod u+rwx {folder}` allows it; later: {add}" in said
    there(*add.split()[1:])
    assert ClientKey.read(folder / "worker.key").role is Role.WORKER


def test_a_daemon_in_a_folder_that_was_closed_can_be_stopped(shell: Shell) -> None:
    """What is asked of it by files is refused with a sentence; it is stopped all the same."""
    shell("init", "-w", "0")
    profile = Profile.load(shell.folder / ".prunus")
    assert call(shell, "daemon", "start").returncode == 0
    with closed(profile.path, profile.run_folder, profile.log_folder):
        for words in ("daemon scale 1", "daemon reload"):
            assert f"`chmod u+rwx {profile.run_folder}` allows it" in error(shell, *words.split())
        assert call(shell, "list").returncode == 0
        stopped = call(shell, "daemon", "stop")
    assert (stopped.returncode, stopped.stdout) == (0, "The daemon has stopped; nothing is lost.\n")
    assert "services.json can't be removed: Permission denied" in stopped.stderr
    assert "Traceback" not in profile.log("daemon").read_text()
    assert daemon.status(profile).services == {}


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a file away")
def test_a_folder_of_another_user_is_named_with_its_owner(shell: Shell) -> None:
    """There is nothing that opens it."""
    shell("init")
    profile = shell.folder / ".prunus"
    os.chown(profile, STRANGER, STRANGER)
    for words in ("init", "list", "daemon start"):
        said = error(shell, *words.split())
        assert f"Permission denied: {profile} belongs to the user {STRANGER}" in said
        assert "chmod" not in said


def test_a_profile_of_another_user_is_refused(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it can be read, and also for a stop."""
    shell("init")
    monkeypatch.setattr("os.getuid", lambda: STRANGER)
    for words in ("list", "daemon start", "daemon stop", "key list"):
        assert "belongs to another user; make your own: prunus init --profile NAME" in shell.error(*words.split())


def test_what_is_no_matter_of_permission_is_what_the_system_says(tmp_path: Path) -> None:
    """As that the disk is full."""
    assert why_refused(tmp_path, OSError(28, "No space left on device")) == "No space left on device"


# --- a configuration that can't be read -------------------------------------------------------------


@pytest.mark.parametrize("damage", ["grace_s: [", "wrokers: 2", None])
def test_a_daemon_can_be_stopped_whatever_its_configuration_says(shell: Shell, damage: str | None) -> None:
    """A stop needs the run files only, and none of what is damaged; what is wrong is a warning. Nothing else works, and
    a restart does not stop what could not start again."""
    shell("init", "-w", "1")
    profile = Profile.load(shell.folder / ".prunus")
    shell.process("daemon", "start")
    holder = read_holder(profile.lock("daemon"))
    file = profile.path / "config.yaml"
    file.unlink()
    if damage is not None:
        file.write_text(damage)
    (profile.run_folder / "daemon.json").write_text("{")
    for words in (["daemon", "restart"], ["daemon", "status"], ["list"]):
        assert str(profile.path) in shell.error(*words)
    assert read_holder(profile.lock("daemon")) == holder
    stopped = shell("daemon", "stop")
    assert stopped.stdout == "The daemon has stopped; nothing is lost.\n"
    assert stopped.stderr.startswith(f"Warning: mend this before the next start: {profile.path}")
    assert daemon.status(profile) == daemon.DaemonStatus(None, {}, ())
    assert shell("daemon", "stop").stdout == "No daemon was running.\n"


def test_a_folder_without_anything_of_a_profile_is_none_to_stop(shell: Shell) -> None:
    """It says so, as to any other command."""
    (shell.folder / ".prunus").mkdir(mode=0o700)
    assert "is not a profile" in shell.error("daemon", "stop")


def test_a_stop_gives_the_grace_that_the_daemon_runs_with(shell: Shell) -> None:
    """Not that of a file that was changed or damaged since."""
    shell("init", "-w", "0")
    file = shell.folder / ".prunus" / "config.yaml"
    file.write_text(file.read_text().replace("grace_s: 10.0", "grace_s: 40.0"))
    shell.process("daemon", "start")
    profile = Profile.load(shell.folder / ".prunus")
    assert read_notes(profile).grace_s == 40.0
    file.write_text("{")
    found, wrong = Profile.find_to_stop(profile.path)
    assert wrong is not None
    assert found.config == Config()
    assert daemon.as_it_runs(found).config.grace_s == 40.0
    write_notes(profile, Notes())  # of a daemon that ran before there was such a note
    assert daemon.as_it_runs(found) == found


def test_a_changed_grace_is_noted_when_the_daemon_reads_it(shell: Shell) -> None:
    """With the next signal that tells it to."""
    shell("init", "-w", "0")
    shell.process("daemon", "start")
    profile = Profile.load(shell.folder / ".prunus")
    (profile.path / "config.yaml").write_text("workers: 0\ngrace_s: 3.0\n")
    write_wish(profile, Wish(workers=0))
    shell("daemon", "scale", "0")
    while read_notes(profile).grace_s != 3.0:
        pass
