"""Supervisors over programs that stand in for broker and workers, and write down what happens to them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from prunus.runtime.locks import read_holder, start_time
from prunus.runtime.profile import Profile
from prunus.runtime.roster import is_service
from prunus.runtime.supervisor import Supervisor

STAND_IN = """
import os, signal, sys, time

path, name, story, mode = sys.argv[1:]
if mode == "broken":  # soon, also on a busy machine
    sys.exit("this one is broken")

from pathlib import Path
from prunus.runtime.locks import ServiceLock
from prunus.runtime.profile import Profile

def say(what):
    with open(story, "a") as file:
        file.write(f"{name} {what}\\n")

def end(*_):
    say("asked")
    if mode != "deaf":
        say("ended")
        sys.exit(0)

signal.signal(signal.SIGTERM, end)
if mode == "leaves-a-child":
    import subprocess
    say(f"child {subprocess.Popen(['sleep', '60']).pid}")
print("a line in the log", flush=True)
with ServiceLock(Profile.load(Path(path)).lock(name)):
    say(f"runs {os.getpid()}")
    while True:
        time.sleep(60)
"""

DAEMON = """
import sys
from prunus.runtime import roster, supervisor
from prunus.runtime.locks import read_holder
script, path, story, *modes = sys.argv[1:]
modes = dict(mode.split("=") for mode in modes)
if "deaf" in modes.values():
    roster.KILL_MARGIN_S = 1.0
def command_for(name):
    return [sys.executable, script, path, name, story, modes.get(name, "good")]
async def who_serves(profile):
    holders = [read_holder(file) for file in profile.run_folder.glob("*.lock")]
    return frozenset(holder.pid for holder in holders if holder)
sys.exit(supervisor.main(["--profile", path], command_for, who_serves))
"""


class Stage:
    """A profile with services that write what happens to them into one file."""

    def __init__(self, profile: Profile, folder: Path, **modes: str) -> None:
        self.profile, self.story = profile, folder / "story"
        self.modes = {name.replace("_", "-"): mode for name, mode in modes.items()}
        self.mute = set[str]()
        """Those that run, and never serve."""
        self.script, self.daemon = folder / "stand_in.py", folder / "daemon.py"
        self.script.write_text(STAND_IN)
        self.daemon.write_text(DAEMON)
        self.story.touch()

    def command_for(self, name: str) -> list[str]:
        mode = self.modes.get(name, "good")
        return [sys.executable, str(self.script), str(self.profile.path), name, str(self.story), mode]

    async def who_serves(self, profile: Profile) -> frozenset[int]:
        """Who has called the broker: who holds its lock."""
        names = [file.stem for file in profile.run_folder.glob("*.lock") if is_service(file.stem)]
        return frozenset(self.runs(name) or 0 for name in names if name not in self.mute)

    @property
    def daemon_command(self) -> list[str]:
        modes = [f"{name}={mode}" for name, mode in self.modes.items()]
        return [sys.executable, str(self.daemon), str(self.script), str(self.profile.path), str(self.story), *modes]

    @property
    def lines(self) -> list[str]:
        return self.story.read_text().splitlines()

    def runs(self, name: str) -> int | None:
        holder = read_holder(self.profile.lock(name))
        return holder.pid if holder else None

    async def running(self, *names: str) -> dict[str, int]:
        """The pids of these services, as soon as all of them run."""
        await until(lambda: all(self.runs(name) for name in names))
        return {name: self.runs(name) or 0 for name in names}

    @asynccontextmanager
    async def supervised(self, *names: str) -> AsyncIterator[Supervisor]:
        """A supervisor in this process; at the end it stops all."""
        supervisor = Supervisor(self.profile, self.command_for, self.who_serves)
        supervisor.want(names)
        task = asyncio.create_task(supervisor.run())
        try:
            yield supervisor
        finally:
            supervisor.want(())
            await task

    @contextmanager
    def daemon_process(self) -> Iterator[subprocess.Popen[bytes]]:
        """A supervisor in a process of its own; at the end it, and all that it left behind, is gone."""
        with self.profile.log("daemon").open("ab") as log:
            process = subprocess.Popen(self.daemon_command, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for file in self.profile.run_folder.glob("*.lock"):
                if pid := self.runs(file.stem):
                    os.kill(pid, signal.SIGKILL)


async def until(holds: Callable[[], Any]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    return start_time(pid) is not None
