"""A broker and workers as real OS processes, without the supervisor, so that a test can kill each of them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from prunus.runtime.controller import ProcessController, connect
from prunus.runtime.profile import Config, Profile

PROJECT = Path(__file__).parents[2]
POLL_S = 0.02


class RealDaemon:
    """The services of one profile; an async context manager. `controller` is connected to it."""

    def __init__(self, folder: Path, *, workers: int = 2, slots: int = 4, grace_s: float = 1.0) -> None:
        config = Config(workers=workers, slots=slots, grace_s=grace_s, import_from=[str(PROJECT)])
        self.profile = Profile.create(folder / "profile", config)
        self.services: dict[str, subprocess.Popen[bytes]] = {}
        self._workers = workers
        self._connection = connect(self.profile)
        self.controller: ProcessController

    async def __aenter__(self) -> RealDaemon:
        self.start("broker")
        for number in range(1, self._workers + 1):
            self.start(f"worker-{number}")
        self.controller = await self._connection.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.__aexit__(None, None, None)
        for name in sorted(self.services, reverse=True):  # workers first, then the broker
            service = self.services.pop(name)
            service.terminate()
            await asyncio.to_thread(service.wait, 20)

    def start(self, name: str, *more: str) -> None:
        """Start a service, with `more` options; it need not be ready when this returns."""
        module, *options = ("broker",) if name == "broker" else ("worker", "--name", name)
        options += ["--profile", str(self.profile.path), *more]
        command = [sys.executable, "-m", f"prunus.runtime.{module}", *options]
        with self.profile.log(name).open("ab") as log:
            self.services[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        """SIGKILL, and wait until it is gone."""
        service = self.services.pop(name)
        service.send_signal(signal.SIGKILL)
        service.wait(10)

    def stop_for_a_while(self, name: str) -> None:
        """SIGSTOP: it is there, and does nothing."""
        os.kill(self.services[name].pid, signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        os.kill(self.services[name].pid, signal.SIGCONT)

    def logs(self) -> str:
        """What the services said, for the message of a failed assertion."""
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in sorted(self.profile.log_folder.iterdir()))


def steps_in_order(lines: list[str]) -> bool:
    """Of each process: once a step has begun, no earlier one begins again (its checkpoint was confirmed, G5)."""
    last: dict[str, int] = {}
    for line in lines:
        pid, _, number = line.rpartition(":")
        if int(number) < last.get(pid, 0):
            return False
        last[pid] = int(number)
    return True
