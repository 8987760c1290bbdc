"""`prunus` as people call it: in a terminal of a certain size, which they read and type into."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

from tests.runtime.shell import Shell

PATIENCE_S = 25.0
"""For what a terminal is expected to show."""
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()][A-Z0-9]|\x1b[=>]")


class Terminal:
    """A terminal in which a command runs."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self.raw = ""
        """All that was written to it."""
        self._descriptor = descriptor
        self._bytes = b""

    @property
    def text(self) -> str:
        """The same without colours and movements of the cursor."""
        return _ESCAPE.sub("", self.raw).replace("\r\n", "\n")

    def until(self, pattern: str) -> re.Match[str]:
        """Wait until it shows something."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            found = re.search(pattern, self.text, re.MULTILINE)
            if found:
                return found
            assert time.monotonic() < deadline_s, f"{pattern!r} does not come:\n{self.text}"
            assert self._read(), f"it ended without {pattern!r}:\n{self.text}"

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.type("\x03")

    def interrupt_until_it_ends(self) -> None:
        """Ctrl-C; once more if it came in the moment before it began to wait for a key, so that it was not noticed."""
        while True:
            self.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
                return

    def end(self, code: int = 0) -> str:
        """Wait for its end; its exit code must be `code`. All that it showed."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self._read():
            assert time.monotonic() < deadline_s, f"it does not end:\n{self.text}"
        assert self.process.wait(PATIENCE_S) == code, self.text
        return self.text

    def _read(self) -> bool:
        """Read what is there, or wait for it a little; False at its end."""
        if select.select([self._descriptor], [], [], 0.5)[0]:
            try:
                chunk = os.read(self._descriptor, 65536)
            except OSError:  # the end of a terminal
                return False
            if not chunk:
                return False
            self._bytes += chunk
            self.raw = self._bytes.decode(errors="replace")
        return True


@contextlib.contextmanager
def terminal(shell: Shell, *words: str, columns: int = 100, lines: int = 30, **variables: str) -> Iterator[Terminal]:
    """A command of `prunus` in a terminal, with these environment variables; it does not outlive the block."""
    descriptor, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    environment = {name: value for name, value in shell.environment.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    environment.pop("NO_COLOR", None)
    environment |= variables

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with subprocess.Popen(
        [sys.executable, "-m", "prunus.runtime.cli", *words],
        cwd=shell.folder,
        env=environment,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        preexec_fn=take_terminal,
    ) as process:
        os.close(inner)
        try:
            yield Terminal(process, descriptor)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            os.close(descriptor)
