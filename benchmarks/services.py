"""The real services of one profile in a temporary folder, as OS processes that end with their context."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Config, Profile
from prunus.runtime.supervisor import module_command

PROJECT = Path(__file__).parents[1]
END_S = 15.0
"""How long a service may take to end before it is killed."""


class Services:
    """A profile, and what runs in it::

    with Services() as services:
        services.start("prunus.runtime.broker")
    """

    def __init__(self, **config: Any) -> None:
        self._config = Config(**{"grace_s": 1.0, "import_from": [str(PROJECT)], **config})
        self._folder = tempfile.TemporaryDirectory(prefix="prunus-bench-", ignore_cleanup_errors=True)
        self._children: list[subprocess.Popen[bytes]] = []
        self.profile: Profile

    def __enter__(self) -> Services:
        self.profile = Profile.create(Path(self._folder.name) / "profile", self._config)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            for child in reversed(self._children):  # the broker came first: it ends last
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(END_S)
        finally:
            self._kill_the_rest()
            if isinstance(error, Exception):
                print(self._logs(), file=sys.stderr)
            self._folder.cleanup()

    def start(self, module: str, *options: str) -> subprocess.Popen[bytes]:
        """Start one of our modules on this profile; it need not be ready when this returns."""
        return self.spawn(module_command(module, self.profile, *options), "services")

    def spawn(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        """Start a program, out of reach of the terminal's Ctrl-C: we end it ourselves."""
        with self.profile.log(log).open("ab") as out:
            child = subprocess.Popen(
                command,
                cwd=PROJECT,
                env={**os.environ, "PYTHONPATH": f"{PROJECT / 'src'}{os.pathsep}{PROJECT}"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def kill_all(self) -> None:
        """SIGKILL for all that runs here, as when the power goes."""
        for pid in self.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for child in self._children:
            child.kill()
            child.wait()

    def pids(self) -> dict[str, int]:
        """The OS processes that run now, by service: ``daemon``, ``broker``, ``worker-1`` ..."""
        holders = {file.stem: read_holder(file) for file in sorted(self.profile.run_folder.glob("*.lock"))}
        return {name: holder.pid for name, holder in holders.items() if holder is not None}

    def _kill_the_rest(self) -> None:
        for child in self._children:
            child.kill()
            child.wait()
        for pid in self.pids().values():  # left behind by a supervisor that was killed
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _logs(self) -> str:
        files = sorted(self.profile.log_folder.iterdir())
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)
