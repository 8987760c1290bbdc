"""Hooks: told what happened, bounded, and never in the way."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

import prunus
from prunus.runtime import hooks
from prunus.runtime.hooks import Hooks
from prunus.runtime.locks import start_time
from prunus.runtime.profile import Config, HookEvent, Profile
from prunus.runtime.roster import BROKER
from tests.runtime.stage import Stage, until

W1 = "worker-1"


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told"


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def hook(*words: str) -> dict[HookEvent, Sequence[str]]:
    return {"started": words}


def python(program: str, *words: str) -> list[str]:
    return [sys.executable, "-S", "-c", program, *words]


TELL = """
import os, sys
facts = {name: value for name, value in sorted(os.environ.items()) if name.startswith("PRUNUS_")}
with open(sys.argv[1], "a") as file:
    file.write(" ".join(f"{name.removeprefix('PRUNUS_')}={value}" for name, value in facts.items()) + "\\n")
"""


async def test_a_hook_is_told_what_happened_without_a_shell(told: Path, tmp_path: Path) -> None:
    """Its words are taken as they are; the facts are in its environment."""
    it = Hooks(hook(*python(TELL, str(told))), {"profile": "/p $(x)"}, tmp_path)
    it.run("started", service="worker-1", exit="SIGKILL")
    it.run("stopped")  # nobody wants to know
    await it.finish()
    [line] = lines(told)
    for fact in ("EVENT=started", "PROFILE=/p $(x)", "SERVICE=worker-1", "EXIT=SIGKILL"):
        assert fact in line


async def test_a_hook_that_hangs_is_killed_with_its_programs(
    told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After its time; nobody waits longer than that."""
    monkeypatch.setattr(hooks, "HOOK_TIMEOUT_S", 3.0)
    command = ["sh", "-c", f"sleep 60 & echo $! > {told}; wait"]
    it = Hooks(hook(*command), {}, tmp_path)
    it.run("started")
    await it.finish()
    assert "it is killed" in caplog.text
    child = int(lines(told)[0])
    await until(lambda: start_time(child) is None)


async def test_a_hook_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whether it ends badly or does not exist."""
    it = Hooks({"started": python("raise SystemExit(3)"), "stopped": ["/no/such/hook"]}, {}, tmp_path)
    it.run("started")
    it.run("stopped")
    await it.finish()
    assert "ended with exit code 3" in caplog.text
    assert "can't be run" in caplog.text
    assert {record.levelname for record in caplog.records} == {"WARNING"}


async def test_hooks_are_bounded_in_number(
    told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A service that ends again and again does not fill the machine with its hooks."""
    monkeypatch.setattr(hooks, "MAX_HOOKS", 2)
    it = Hooks(hook(*python(TELL, str(told))), {}, tmp_path)
    for _ in range(5):
        it.run("started")
    await it.finish()
    assert len(lines(told)) == 2
    assert caplog.text.count("is left out") == 3


async def test_the_daemon_tells_its_hooks(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a worker, of the broker, its own start and stop; not the ends that somebody asked for."""
    events: tuple[HookEvent, ...] = ("started", "worker_ended", "broker_ended", "flapping", "stopped")
    command = python(TELL, str(told))
    profile = Profile.create(tmp_path / "profile", Config(workers=1, grace_s=0.2))
    config = msgspec.structs.replace(profile.config, hooks=dict.fromkeys(events, command))
    (profile.path / "config.yaml").write_text(config.to_text())
    monkeypatch.setenv("PYTHONPATH", str(Path(prunus.__file__).parents[1]))
    stage = Stage(Profile.load(profile.path), tmp_path)

    def heard() -> list[str]:
        words = [word for line in lines(told) for word in line.split()]
        return [word.removeprefix("EVENT=") for word in words if word.startswith("EVENT=")]

    with stage.daemon_process() as process:
        before = await stage.running("daemon", BROKER, W1)
        await until(lambda: "started" in heard())
        os.kill(before[W1], signal.SIGKILL)
        await until(lambda: "worker_ended" in heard())
        os.kill(before[BROKER], signal.SIGKILL)
        await until(lambda: "broker_ended" in heard())
        await until(lambda: stage.runs(BROKER) not in (None, before[BROKER]) and stage.runs(W1))
        process.terminate()
        await until(lambda: process.poll() is not None)
    assert heard() == ["started", "worker_ended", "broker_ended", "stopped"]
    ended = lines(told)[1]
    for fact in (f"SERVICE={W1}", f"PID={before[W1]}", "EXIT=SIGKILL", f"PROFILE={profile.path}", "RESTART_S=0.050"):
        assert fact in ended


async def test_flapping_is_told_once(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with each of the ends that follow."""
    profile = Profile.create(tmp_path / "profile", Config(hooks={"flapping": python(TELL, str(told))}))
    monkeypatch.setenv("PYTHONPATH", str(Path(prunus.__file__).parents[1]))
    monkeypatch.setattr("prunus.runtime.roster.MIN_PAUSE_S", 0.001)
    monkeypatch.setattr("prunus.runtime.roster.HEALTHY_S", 3600.0)  # a busy machine takes its time
    stage = Stage(profile, tmp_path, worker_1="broken")
    async with stage.supervised(BROKER, W1) as supervisor:
        await until(lambda: supervisor._roster.services.get(W1) and supervisor._roster.services[W1].too_soon >= 7)
        await supervisor.hooks.finish()
    assert ["EVENT=flapping" in line for line in lines(told)] == [True]
