"""`prunus` as it is called in a shell."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

import prunus
from prunus.runtime.cli import cli

PROJECT = Path(prunus.__file__).parents[2]
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"

FLOW = '''
import os
import signal

from prunus import Process, RetryPolicy, Wait, WorkChain, message, query, step

class Local(Process):
    async def run(self):
        return None

class Late(Process):
    async def run(self):
        return None

class Stubborn(Process):
    """Its first attempt fails, and the second is an hour away."""

    @step(retry=RetryPolicy(max_attempts=3, initial_interval_s=3600, max_interval_s=3600, jitter=0))
    async def run(self):
        raise ConnectionError("no licence is free")

class Family(WorkChain):
    """Two children that wait for a file."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.input("file", valid_type=str)
        spec.outline(cls.begin, cls.end)

    def begin(self):
        from tests.runtime.features import Gated

        self.ctx.begun = [1, 2]
        for name in ("first", "second"):
            self.to_context(**{name: self.submit(Gated, {"file": self.inputs.file})})

    def end(self):
        self.report(f"{self.ctx.first.value} and {self.ctx.second.value}")

class Speaker(Process):
    """Says what it is sent."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.message("say", valid_type=str)

    async def run(self):
        return Wait(message("say"), then=self.say)

    async def say(self, text):
        self.report(text)
        return None if text == "the end" else Wait(message("say"), then=self.say)

class Hall(WorkChain):
    """One child that speaks."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.outline(cls.begin, cls.end)

    def begin(self):
        self.to_context(speaker=self.submit(Speaker))

    def end(self):
        self.report("silence")

class Dying(Process):
    """Its worker dies in the middle of a step whose effect must not be repeated."""

    @step(effect="once")
    async def run(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Talk(Process):
    """Returns a text of several lines, and can be asked."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.message("go")

    async def run(self):
        return Wait(message("go"), then=self.end)

    async def end(self, go):
        return "one\\ntwo"

    @query
    def nothing(self):
        return None

    @query
    def table(self):
        return [{"name": "Cu", "scales": (0.9, 1.0)}]
'''


def said_by(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What is left of its standard output and of its standard error, to its end. (`communicate` loses what was read
    ahead of the lines that were asked for; and how long it takes is for the time limit of the test to judge.)"""
    stdout, stderr = process.stdout, process.stderr
    assert stdout is not None
    assert stderr is not None
    errors: list[str] = []
    reading = threading.Thread(target=lambda: errors.append(stderr.read()), daemon=True)
    reading.start()
    out = stdout.read()
    reading.join()
    process.wait()
    return out, errors[0]


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

    def __call__(self, *words: str, code: int | None = 0, below: str = ".", typed: str | None = None) -> Result:
        """Call it, in this Python process; its exit code must be `code`. `typed` is its standard input."""
        path, modules = list(sys.path), set(sys.modules)
        try:
            with contextlib.chdir(self.folder / below):
                ended = CliRunner().invoke(
                    cli, words, env={**self.environment, "PRUNUS_PROFILE": None}, prog_name="prunus", input=typed
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
            out, error = said_by(process)
        assert code is None or process.returncode == code, f"{words}: {process.returncode}\n{out}{error}"
        return subprocess.CompletedProcess(words, process.returncode, out, error)

    @contextlib.contextmanager
    def begin(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """Call it and go on; it does not outlive the block."""
        command = [sys.executable, "-m", "prunus.runtime.cli", *words]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=pipe, stderr=pipe, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def error(self, *words: str, code: int = 1) -> str:
        """What it says when it fails, and that it says nothing else."""
        ended = self(*words, code=code)
        assert ended.stdout == ""
        if code == 1:
            assert ended.stderr.startswith("Error: ")
        return ended.stderr

    def launch(self, name: str, *words: str) -> str:
        return self("launch", f"tests.runtime.workflows:{name}", *words).stdout.strip()

    def launch_feature(self, name: str, *words: str) -> str:
        return self("launch", f"tests.runtime.features:{name}", *words).stdout.strip()

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


@contextlib.contextmanager
def daemon_in(folder: Path) -> Iterator[Shell]:
    """A shell in a folder whose daemon runs, with one worker."""
    shell = Shell(folder)
    (shell.folder / "flow.py").write_text(FLOW)
    shell("init", "-w", "1")
    config = shell.folder / ".prunus" / "config.yaml"
    config.write_text(config.read_text().replace('[".."]', f'["..", "{PROJECT}"]').replace("10.0", "1.0"))
    try:
        assert shell.process("daemon", "start").stdout.startswith("The daemon runs (pid ")
        yield shell
    finally:
        assert shell.process("daemon", "stop").stdout == "The daemon has stopped; nothing is lost.\n"
