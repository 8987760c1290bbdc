"""What a transport can do on a host: run commands, and move files there and back.

`prunus.runtime.remote.local` and `prunus.runtime.remote.ssh` are the shipped ones;
`prunus.testing.TransportContract` is what each of them must do. Paths that are not absolute begin in the home folder
of the login (or where the endpoint's ``folder`` says).

Errors: `TransportError` for what can't be done (a file that is not there), `TransportLostError` when the connection
broke: then what was under way may or may not have happened.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from prunus.errors import CommandFailedError, TransportError

MAX_OUTPUT_BYTES = 16 * 1024 * 1024
"""Of the output of a command, each of stdout and stderr; a command that says more is ended."""
MAX_READ_BYTES = 64 * 1024 * 1024
"""Of a file that is read into memory; a larger one is to be fetched with `get`."""
END_GRACE_S = 2.0
"""How long a command that is ended may clean up (SIGTERM) before it is killed (SIGKILL)."""

Command = str | Sequence[str]
"""A line for ``/bin/sh``, or a program and its arguments, which no shell looks at."""


@dataclass(frozen=True, slots=True)
class Completed:
    """How a command ended."""

    endpoint: str
    command: str
    exit_status: int
    """128 and the number of a signal if that ended it."""
    stdout: str
    stderr: str

    def check(self) -> Completed:
        """This, if the exit status is 0; else raises `CommandFailedError`."""
        if self.exit_status:
            raise CommandFailedError(self.endpoint, self.command, self.exit_status, self.stderr)
        return self


class Transport(Protocol):
    """A connection to a host."""

    endpoint: str
    """Its name, for messages."""

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or is broken."""
        ...

    async def run(
        self,
        command: Command,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        input: str | bytes | None = None,
        timeout_s: float | None = None,
    ) -> Completed:
        """Run a command and wait for its end.

        If the caller is cancelled, or after `timeout_s` (`TimeoutError`), the command and what it has started in its
        group is ended. What it has sent into a session of its own (``setsid``) goes on. Text is UTF-8; what is not is
        replaced.
        """
        ...

    async def put(self, local: Path | str, remote: str) -> None:
        """Copy a file or a folder there. It appears under its name when it is complete, in place of what was there."""
        ...

    async def get(self, remote: str, local: Path | str) -> None:
        """Copy a file or a folder from there. It appears under its name when it is complete."""
        ...

    async def exists(self, path: str) -> bool:
        """Whether there is something of this name."""
        ...

    async def mkdir(self, path: str) -> None:
        """Make a folder, and those above it. Nothing happens if it is there."""
        ...

    async def list(self, path: str) -> list[str]:
        """The names in a folder, sorted."""
        ...

    async def read(self, path: str) -> bytes:
        """What a file holds, up to `MAX_READ_BYTES`."""
        ...

    async def write(self, path: str, data: bytes | str) -> None:
        """Write a file, complete or not at all."""
        ...

    async def remove(self, path: str) -> None:
        """Remove a file, or a folder with all that is in it. Nothing happens if it is not there."""
        ...

    async def close(self) -> None:
        """End the connection. Idempotent."""
        ...


# --- what both transports need ----------------------------------------------------------------------


def shell_line(command: Command) -> str:
    """A command as a line for a shell."""
    return command if isinstance(command, str) else shlex.join(command)


def shell_script(command: Command, cwd: str | None, env: Mapping[str, str] | None) -> str:
    """The text that ``/bin/sh`` runs. A folder that is not there is an exit status of 1."""
    lines = [] if cwd is None else [f"cd -- {shlex.quote(cwd)} || exit 1"]
    for name, value in (env or {}).items():
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not a name for a variable of the environment")
        lines.append(f"export {name}={shlex.quote(value)}")
    return "\n".join([*lines, shell_line(command)])


def as_bytes(data: bytes | str | None) -> bytes:
    return data.encode() if isinstance(data, str) else data or b""


def part_name(name: str, token: str) -> str:
    """The name of what is not complete yet, beside what it will be."""
    return f".{name[:100]}.{token}.part"


async def read_output(read: Callable[[int], Awaitable[bytes]], endpoint: str) -> bytes:
    """All that a command says; `TransportError` if that is too much."""
    found = bytearray()
    while chunk := await read(64 * 1024):
        found += chunk
        if len(found) > MAX_OUTPUT_BYTES:
            reason = f"a command said more than {MAX_OUTPUT_BYTES:,} bytes; have it write to a file and `get` that"
            raise TransportError(endpoint, reason)
    return bytes(found)


async def together(*parts: Coroutine[Any, Any, Any]) -> list[Any]:
    """Do all of them at the same time; if one raises, or the caller is cancelled, none goes on."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
