"""Real services whose surroundings can be broken, and the command line as a program of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

import prunus
from prunus.persistence.persister import Record
from prunus.runtime.controller import ProcessHandle, connect
from prunus.runtime.profile import Profile
from tests.guarantees.real_daemon import PROJECT, RealDaemon
from tests.runtime.waiting import until

POLL_S = 0.01
PROGRAM_TIMEOUT_S = 20
_ENVIRONMENT = os.environ | {"PYTHONPATH": f"{Path(prunus.__file__).parents[1]}{os.pathsep}{PROJECT}"}
_ENVIRONMENT.pop("PRUNUS_PROFILE", None)


class Services(RealDaemon):
    """A `RealDaemon` whose workers import from more folders, and whose services take more options."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 1,
        slots: int = 4,
        grace_s: float = 1.0,
        import_from: Sequence[Path] = (),
        broker_options: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, workers=workers, slots=slots, grace_s=grace_s)
        config = msgspec.structs.replace(self.profile.config, import_from=[str(PROJECT), *map(str, import_from)])
        (self.profile.path / "config.yaml").write_text(config.to_text())
        self.profile = Profile.load(self.profile.path)
        self._connection = connect(self.profile)
        self._broker_options = broker_options

    def start(self, name: str) -> None:
        options = self._broker_options if name == "broker" else ("--name", name)
        with self.profile.log(name).open("ab") as log:
            self.services[name] = subprocess.Popen(
                service_command("broker" if name == "broker" else "worker", self.profile.path, *options),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_ENVIRONMENT,
            )

    def log(self, name: str) -> str:
        return self.profile.log(name).read_text()

    async def said(self, name: str, words: str, times: int = 1) -> None:
        """Wait until the log of a service holds these words so often."""
        while self.log(name).count(words) < times:
            await asyncio.sleep(POLL_S)


def service_command(module: str, profile: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", f"prunus.runtime.{module}", "--profile", str(profile), *options]


@dataclass(frozen=True)
class Ended:
    """A program that has ended."""

    code: int
    out: str
    err: str


async def run(command: Sequence[str], folder: Path) -> Ended:
    """Run a program to its end."""
    ended = await asyncio.to_thread(
        subprocess.run,
        command,
        cwd=folder,
        env=_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PROGRAM_TIMEOUT_S,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


async def command_line(profile: Path, *words: str) -> Ended:
    """``prunus WORDS`` with this profile."""
    command = [sys.executable, "-m", "prunus.runtime.cli", "--profile", str(profile), *words]
    return await run(command, profile.parent if profile.parent.is_dir() else Path.cwd())


async def complaint(profile: Path, *words: str) -> str:
    """What ``prunus WORDS`` says when it fails: exit code 1, nothing on stdout, and no traceback."""
    ended = await command_line(profile, *words)
    assert ended.code == 1, ended
    assert ended.out == ""
    assert "Traceback" not in ended.err
    said, error, words_of_it = ended.err.partition("Error: ")
    assert error, ended.err
    assert not said or said.startswith("waiting for "), said
    return error + words_of_it


async def set_aside(handle: ProcessHandle) -> str:
    """Wait until a process is set aside; the reason."""
    record: Record = await until(handle, lambda row: row.aside is not None)
    assert record.aside is not None
    assert record.owner is None
    return record.aside


async def claims(handle: ProcessHandle) -> int:
    """How often somebody looked at the process."""
    return [event.subject for event in await handle.history()].count("claimed")
