"""The unit file for systemd, and what a daemon tells its service manager."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import prunus
from prunus.runtime import systemd
from prunus.runtime.profile import Config, Profile
from prunus.runtime.roster import BROKER
from prunus.runtime.supervisor import working_folder
from prunus.runtime.wish import Wish, write_wish
from tests.runtime.shell import Shell
from tests.runtime.stage import Stage, until


@pytest.fixture
def profile(short_folder: Path) -> Profile:
    """Its path has what a unit file could misunderstand."""
    return Profile.create(short_folder / '50% of "my" $HOME' / ".prunus", Config(grace_s=30.0))


def settings_of(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_runs_this_python_with_this_profile(profile: Profile) -> None:
    """Quoted as systemd reads it; the time to stop is what the supervisor may take, and a margin."""
    text = systemd.unit_text(profile, working_folder(profile), system=False)
    found = settings_of(text)
    words = [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(found["ExecStart"])]
    assert words == [sys.executable, "-P", "-m", "prunus.runtime.supervisor", "--profile", str(profile.path)]
    assert found["WorkingDirectory"] == str(profile.path.parent).replace("%", "%%")
    assert float(found["TimeoutStopSec"]) > 2 * 30.0
    assert (found["Type"], found["KillMode"], found["OOMPolicy"]) == ("notify", "process", "continue")
    assert found["Restart"] == "on-failure"
    assert found["WantedBy"] == "default.target"
    assert "User" not in found


def test_a_unit_of_the_system_names_the_user(profile: Profile) -> None:
    """It is started at boot, without a session."""
    found = settings_of(systemd.unit_text(profile, working_folder(profile), system=True))
    assert found["User"]
    assert found["WantedBy"] == "multi-user.target"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
@pytest.mark.parametrize("system", [False, True])
def test_systemd_finds_nothing_to_complain_about(
    profile: Profile, short_folder: Path, monkeypatch: pytest.MonkeyPatch, system: bool
) -> None:
    """Not even a warning."""
    file = short_folder / systemd.unit_name(profile)
    file.write_text(systemd.unit_text(profile, working_folder(profile), system=system))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_folder))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--system" if system else "--user", str(file)],
        capture_output=True,
        text=True,
        timeout=25,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if file.name in line]
    assert (done.returncode, ours) == (0, [])


def test_the_name_of_a_unit_is_that_of_the_project(tmp_path: Path) -> None:
    """With letters that a unit may have."""
    made = [Profile.create(tmp_path / path, Config()) for path in ("my project/.prunus", "mine")]
    assert [systemd.unit_name(each) for each in made] == ["prunus-my-project.service", "prunus-mine.service"]


def test_the_command_prints_the_unit_and_says_what_to_do(tmp_path: Path) -> None:
    """The unit alone is on the standard output."""
    shell = Shell(tmp_path)
    shell("init")
    mine, system = shell("daemon", "unit"), shell("daemon", "unit", "--system")
    assert mine.stdout.startswith("[Unit]\n")
    assert mine.stdout.endswith("WantedBy=default.target\n")
    assert "systemctl --user enable --now prunus-" in mine.stderr
    assert "User=" in system.stdout
    assert "sudo tee /etc/systemd/system/prunus-" in system.stderr


def test_nobody_is_told_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a service manager, or with one that is gone."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/no/such/socket")
    assert not systemd.notify("READY=1")


@pytest.mark.parametrize("abstract", [False, True])
async def test_a_daemon_says_that_it_is_ready_and_that_it_stops(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    """The service manager waits for that; services are not told of its socket."""
    profile = Profile.create(short_folder / "profile", Config(grace_s=0.2))
    name = f"@{short_folder}" if abstract else str(short_folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("PYTHONPATH", str(Path(prunus.__file__).parents[1]))
        write_wish(profile, Wish(1))
        stage, told = Stage(profile, short_folder), list[bytes]()

        def heard() -> list[bytes]:
            with contextlib.suppress(BlockingIOError):
                told.append(manager.recv(1000))
            return told

        with stage.daemon_process() as process:
            await until(lambda: heard() == [b"READY=1"])
            await stage.running(BROKER, "worker-1")
            assert "NOTIFY_SOCKET" not in psutil.Process(stage.runs(BROKER)).environ()
            process.send_signal(signal.SIGTERM)
            await until(lambda: heard() == [b"READY=1", b"STOPPING=1"])
            await until(lambda: process.poll() is not None)
