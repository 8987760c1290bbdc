"""This machine as a host: commands of ``/bin/sh``, and plain copies of files.

A command runs in a session of its own, so that it can be ended with all that it has started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from prunus.errors import TransportError, TransportLostError
from prunus.runtime.remote.transport import (
    END_GRACE_S,
    MAX_READ_BYTES,
    Command,
    Completed,
    as_bytes,
    part_name,
    read_output,
    shell_line,
    shell_script,
    together,
)

T = TypeVar("T")


class LocalTransport:
    """A `Transport` to this machine. Paths that are not absolute begin in `folder` (the home folder)."""

    def __init__(self, endpoint: str = "local", folder: Path | str | None = None) -> None:
        self.endpoint = endpoint
        self._folder = Path(folder).expanduser().absolute() if folder is not None else Path.home()
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    async def run(
        self,
        command: Command,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        input: str | bytes | None = None,
        timeout_s: float | None = None,
    ) -> Completed:
        self._check_open()
        script = shell_script(command, cwd, env)
        data = as_bytes(input)
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                "/bin/sh",
                "-c",
                script,
                stdin=asyncio.subprocess.PIPE if data else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=self._folder,
                start_new_session=True,
            )
        )
        try:
            process = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # It may run already. (To cancel the start itself would wait for ever for what it has started.)
            await asyncio.wait((starting,))
            if not starting.cancelled() and starting.exception() is None:
                await _end(starting.result())
            raise
        except OSError as error:
            raise TransportError(self.endpoint, f"no command can be started in {self._folder}: {error}") from error
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with asyncio.timeout(timeout_s):
                stdout, stderr, status, _ = await together(
                    read_output(process.stdout.read, self.endpoint),
                    read_output(process.stderr.read, self.endpoint),
                    process.wait(),
                    _feed(process, data),
                )
        except TimeoutError as error:
            await _end(process)
            raise TimeoutError(
                f"{self.endpoint}: `{shell_line(command)}` did not end within {timeout_s:g} s"
            ) from error
        except BaseException:
            await _end(process)
            raise
        status = status if status >= 0 else 128 - status
        line = shell_line(command)
        return Completed(self.endpoint, line, status, stdout.decode(errors="replace"), stderr.decode(errors="replace"))

    async def put(self, local: Path | str, remote: str) -> None:
        await self._in_thread(lambda: copy_into_place(Path(local), self._at(remote)))

    async def get(self, remote: str, local: Path | str) -> None:
        await self._in_thread(lambda: copy_into_place(self._at(remote), Path(local)))

    async def exists(self, path: str) -> bool:
        return await self._in_thread(lambda: os.path.lexists(self._at(path)))

    async def mkdir(self, path: str) -> None:
        await self._in_thread(lambda: self._at(path).mkdir(parents=True, exist_ok=True))

    async def list(self, path: str) -> list[str]:
        return await self._in_thread(lambda: sorted(os.listdir(self._at(path))))

    async def read(self, path: str) -> bytes:
        def read() -> bytes:
            with self._at(path).open("rb") as file:
                return file.read(MAX_READ_BYTES + 1)

        data = await self._in_thread(read)
        if len(data) > MAX_READ_BYTES:
            raise TransportError(self.endpoint, f"{path} is larger than {MAX_READ_BYTES:,} bytes; `get` it")
        return data

    async def write(self, path: str, data: bytes | str) -> None:
        def write() -> None:
            target = self._at(path)
            with new_part(target) as part:
                part.write_bytes(as_bytes(data))
                part.replace(target)

        await self._in_thread(write)

    async def remove(self, path: str) -> None:
        await self._in_thread(lambda: remove_tree(self._at(path)))

    async def close(self) -> None:
        self._is_closed = True

    def _at(self, path: str) -> Path:
        return self._folder / path

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransportLostError(self.endpoint, "this transport was closed")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        self._check_open()
        try:
            return await asyncio.to_thread(work)
        except (OSError, shutil.Error) as error:
            raise TransportError(self.endpoint, str(error)) from error


@contextlib.contextmanager
def new_part(target: Path) -> Iterator[Path]:
    """A name beside `target` for what is not complete yet; nothing of that name is left."""
    part = target.with_name(part_name(target.name, secrets.token_hex(4)))
    try:
        yield part
    finally:
        remove_tree(part)


def copy_into_place(source: Path, target: Path) -> None:
    """Copy a file or a folder (following links), and give it its name when it is complete."""
    with new_part(target) as part:
        if source.is_dir():
            shutil.copytree(source, part)
        else:
            shutil.copy2(source, part)
        move_into_place(part, target)


def move_into_place(part: Path, target: Path) -> None:
    """Give what is complete its name. A file is replaced in one go; a folder is moved aside first."""
    if target.is_dir() and not target.is_symlink():
        with new_part(target) as old:
            target.rename(old)
            part.rename(target)
    elif part.is_dir() and os.path.lexists(target):
        target.unlink()
        part.rename(target)
    else:
        part.replace(target)


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


async def _feed(process: asyncio.subprocess.Process, data: bytes) -> None:
    if process.stdin is None:
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it does not want to read it
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a command and its group: gently, and then not."""
    group = process.pid
    try:
        if process.returncode is None:
            os.killpg(group, signal.SIGTERM)
            async with asyncio.timeout(END_GRACE_S):
                await process.wait()
    except (ProcessLookupError, TimeoutError):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
    await process.wait()
