"""A host that is reached by SSH: commands in channels of one connection, files by SFTP.

Needs ``pip install prunus[ssh]`` (asyncssh). The key of the host is checked against ``known_hosts``. A connection that
says nothing for a while is asked whether it lives (keep-alive), so that a broken one is known to be broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import posixpath
import secrets
import shlex
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.errors import EndpointUnavailableError, TransportError, TransportLostError
from prunus.runtime.remote.local import move_into_place, new_part
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

if TYPE_CHECKING:
    import asyncssh

KEEPALIVE_S = 15.0
"""How long a connection may be silent before it is asked whether it lives; after three questions it is broken."""


class SSHTransport:
    """A `Transport` over an open connection of asyncssh, which it closes; see `connect_ssh`."""

    def __init__(self, endpoint: str, connection: asyncssh.SSHClientConnection, folder: str = "") -> None:
        self.endpoint = endpoint
        self._connection = connection
        self._folder = folder
        self._sftp: asyncssh.SFTPClient | None = None
        self._opening = asyncio.Lock()

    @property
    def is_closed(self) -> bool:
        return self._connection.is_closed()

    async def run(
        self,
        command: Command,
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        input: str | bytes | None = None,
        timeout_s: float | None = None,
    ) -> Completed:
        line = shell_line(command)
        where = self._at(cwd or "") or None
        # The first line says which process group this is: not every server passes signals on.
        script = "exec /bin/sh -c " + shlex.quote(f"echo {_GROUP} $$ >&2\n{shell_script(command, where, env)}")
        try:
            async with asyncio.timeout(timeout_s), self._errors():
                stdout, stderr, status = await self._run(script, as_bytes(input))
        except TimeoutError as error:
            raise TimeoutError(f"{self.endpoint}: `{line}` did not end within {timeout_s:g} s") from error
        return Completed(self.endpoint, line, status, stdout.decode(errors="replace"), stderr.decode(errors="replace"))

    async def put(self, local: Path | str, remote: str) -> None:
        async with self._errors():
            sftp = await self._files()
            target = self._at(remote)
            part = self._beside(target)
            try:
                is_folder = await asyncio.to_thread(os.path.isdir, local)
                await sftp.put(str(local), part, recurse=is_folder, preserve=True, follow_symlinks=True)
                await self._move_into_place(sftp, part, target)
            except BaseException:
                await self._clear(part)
                raise

    async def get(self, remote: str, local: Path | str) -> None:
        async with self._errors():
            sftp = await self._files()
            source = self._at(remote)
            is_folder = await sftp.isdir(source)
            with new_part(Path(local)) as part:
                await sftp.get(source, str(part), recurse=is_folder, preserve=True, follow_symlinks=True)
                await asyncio.to_thread(move_into_place, part, Path(local))

    async def exists(self, path: str) -> bool:
        async with self._errors():
            return await (await self._files()).lexists(self._at(path))

    async def mkdir(self, path: str) -> None:
        async with self._errors():
            await (await self._files()).makedirs(self._at(path), exist_ok=True)

    async def list(self, path: str) -> list[str]:
        async with self._errors():
            names = await (await self._files()).listdir(self._at(path) or ".")
            return sorted(name for name in map(str, names) if name not in (".", ".."))

    async def read(self, path: str) -> bytes:
        async with self._errors():
            sftp = await self._files()
            async with sftp.open(self._at(path), "rb") as file:
                data = as_bytes(await file.read(MAX_READ_BYTES + 1))
        if len(data) > MAX_READ_BYTES:
            raise TransportError(self.endpoint, f"{path} is larger than {MAX_READ_BYTES:,} bytes; `get` it")
        return data

    async def write(self, path: str, data: bytes | str) -> None:
        async with self._errors():
            sftp = await self._files()
            target = self._at(path)
            part = self._beside(target)
            try:
                async with sftp.open(part, "wb") as file:
                    await file.write(as_bytes(data))
                await sftp.posix_rename(part, target)
            except BaseException:
                await self._clear(part)
                raise

    async def remove(self, path: str) -> None:
        async with self._errors():
            await self._remove(await self._files(), self._at(path))

    async def close(self) -> None:
        self._connection.close()
        await self._connection.wait_closed()

    # --- commands -----------------------------------------------------------------------------------

    async def _run(self, script: str, data: bytes) -> tuple[bytes, bytes, int]:
        started = _Started()
        starting = asyncio.ensure_future(self._connection.create_process(script, encoding=None))
        try:
            process: asyncssh.SSHClientProcess[bytes] = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # It may run already: without its group nobody could end it.
            await self._end_what_starts(starting, started)
            raise
        try:
            stdout, stderr, _, _ = await together(
                read_output(process.stdout.read, self.endpoint),
                started.read(process.stderr, self.endpoint),
                process.wait_closed(),
                _feed(process, data),
            )
        except BaseException:
            await self._end(process, started.group)
            raise
        if process.exit_signal is not None:
            number = getattr(signal, f"SIG{process.exit_signal[0]}", signal.SIGKILL)
            return stdout, stderr, 128 + number
        if process.exit_status is None or process.exit_status < 0:
            raise TransportLostError(
                self.endpoint, "the connection broke while a command ran: it may have ended or not"
            )
        return stdout, stderr, process.exit_status

    async def _end_what_starts(
        self, starting: asyncio.Future[asyncssh.SSHClientProcess[bytes]], started: _Started
    ) -> None:
        """End a command whose start was cancelled."""
        import asyncssh

        with contextlib.suppress(OSError, asyncssh.Error, TimeoutError):
            async with asyncio.timeout(END_GRACE_S):
                process = await starting
        if not starting.done() or starting.cancelled() or starting.exception() is not None:
            return
        with contextlib.suppress(OSError, asyncssh.Error, TimeoutError):
            async with asyncio.timeout(END_GRACE_S):
                await started.learn(process.stderr)
        await self._end(process, started.group)

    async def _end(self, process: asyncssh.SSHClientProcess[bytes], group: int | None) -> None:
        """End a command and its group: gently, and then not."""
        import asyncssh

        async def send(name: str) -> None:
            with contextlib.suppress(OSError, asyncssh.Error, TimeoutError):  # it has ended, or the connection has
                if group is None:
                    process.send_signal(name)
                else:
                    async with asyncio.timeout(END_GRACE_S):
                        await self._connection.run(f"/bin/sh -c 'kill -s {name} -- -{group}'", encoding=None)

        try:
            await send("TERM")
            with contextlib.suppress(OSError, asyncssh.Error, TimeoutError):
                async with asyncio.timeout(END_GRACE_S):
                    await process.wait_closed()
        finally:
            await send("KILL")
            process.close()

    # --- files --------------------------------------------------------------------------------------

    async def _files(self) -> asyncssh.SFTPClient:
        async with self._opening:
            if self._sftp is None:
                self._sftp = await self._connection.start_sftp_client()
            return self._sftp

    def _at(self, path: str) -> str:
        return posixpath.join(self._folder, path) if self._folder else path

    def _beside(self, target: str) -> str:
        folder, name = posixpath.split(target)
        return posixpath.join(folder, part_name(name, secrets.token_hex(4)))

    async def _move_into_place(self, sftp: asyncssh.SFTPClient, part: str, target: str) -> None:
        """A file is replaced in one go; a folder is moved aside first."""
        if await sftp.isdir(target) and not await sftp.islink(target):
            old = self._beside(target)
            await sftp.posix_rename(target, old)
            await sftp.posix_rename(part, target)
            await self._remove(sftp, old)
        else:
            if await sftp.isdir(part) and await sftp.lexists(target):
                await sftp.remove(target)
            await sftp.posix_rename(part, target)

    async def _remove(self, sftp: asyncssh.SFTPClient, path: str) -> None:
        if not await sftp.lexists(path):
            return
        if await sftp.isdir(path) and not await sftp.islink(path):
            await sftp.rmtree(path)
        else:
            await sftp.remove(path)

    async def _clear(self, part: str) -> None:
        """Leave nothing half done, as far as the connection allows."""
        if self._sftp is None or self.is_closed:
            return
        with contextlib.suppress(Exception):  # there is an error to be raised already
            async with asyncio.timeout(END_GRACE_S):
                await self._remove(self._sftp, part)

    @contextlib.asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        """What asyncssh raises, as errors of ours."""
        import asyncssh

        if self.is_closed:
            raise TransportLostError(self.endpoint, "the connection is closed")
        try:
            yield
        except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, asyncssh.DisconnectError) as error:
            raise TransportLostError(self.endpoint, f"the connection broke: {error}") from error
        except TimeoutError:
            raise
        except (asyncssh.Error, OSError) as error:
            if self.is_closed:
                raise TransportLostError(self.endpoint, f"the connection broke: {error}") from error
            raise TransportError(self.endpoint, str(error)) from error


class _Started:
    """What a command says of itself before all else."""

    def __init__(self) -> None:
        self.group: int | None = None

    async def read(self, stderr: asyncssh.SSHReader[bytes], endpoint: str) -> bytes:
        """All that it says to stderr, but for that."""
        return await self.learn(stderr) + await read_output(stderr.read, endpoint)

    async def learn(self, stderr: asyncssh.SSHReader[bytes]) -> bytes:
        """Read so far; what was there before it."""
        before = b""
        while self.group is None and (line := await stderr.readline()):
            word, _, number = line.decode(errors="replace").strip().partition(" ")
            if word == _GROUP and number.isdigit():
                self.group = int(number)
            else:  # of a login shell
                before += line
        return before


async def connect_ssh(
    endpoint: str,
    host: str,
    *,
    port: int = 22,
    user: str | None = None,
    key_file: Path | None = None,
    known_hosts: Path | None = None,
    check_host_key: bool = True,
    jump: str | None = None,
    folder: str = "",
    keepalive_s: float = KEEPALIVE_S,
) -> SSHTransport:
    """Connect to `host`, as `user` (this one), with the key in `key_file` (the agent, and the usual keys).

    The key of the host must be in `known_hosts` (``~/.ssh/known_hosts``). `jump` is ``user@host:port`` of a host on the
    way. Settings of ``~/.ssh/config`` count. Raises `EndpointUnavailableError` where trying again is of no use (it
    refuses the key, it is not the host that it should be, asyncssh is not installed), and asyncssh's errors, `OSError`.
    """
    try:
        import asyncssh
    except ImportError as error:
        reason = "SSH needs asyncssh; install it where the workers run: pip install 'prunus[ssh]'"
        raise EndpointUnavailableError(endpoint, 1, reason) from error
    if logging.getLogger("asyncssh").level == logging.NOTSET:  # it says a line for each file and command
        asyncssh.set_log_level(logging.WARNING)
    options: dict[str, Any] = {"port": port, "keepalive_interval": keepalive_s, "keepalive_count_max": 3}
    if user is not None:
        options["username"] = user
    if key_file is not None:
        options["client_keys"] = [str(key_file)]
    if not check_host_key:
        options["known_hosts"] = None
    elif known_hosts is not None:
        options["known_hosts"] = str(known_hosts)
    if jump is not None:
        options["tunnel"] = jump
    try:
        connection = await asyncssh.connect(host, **options)
    except (asyncssh.PermissionDenied, asyncssh.HostKeyNotVerifiable, asyncssh.KeyImportError) as error:
        raise EndpointUnavailableError(endpoint, 1, f"{host}: {error}") from error
    except OSError as error:  # its text does not always say which host
        raise OSError(f"{host}:{port}: {error.strerror or error}") from error
    return SSHTransport(endpoint, connection, folder)


_GROUP = "prunus-group"


async def _feed(process: asyncssh.SSHClientProcess[bytes], data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it does not want to read it
        if data:
            process.stdin.write(data)
            await process.stdin.drain()
        process.stdin.write_eof()
