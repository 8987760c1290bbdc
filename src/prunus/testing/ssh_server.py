"""A private SSH server for tests and demonstrations: on the loopback, on a port that is free, for one key.

It is asyncssh's server in the event loop of the test. Commands run in ``/bin/sh`` as this user, in the server's own
home folder, and relative paths of SFTP begin there too. It can be stopped and started again under the same port, and
break its connections. Needs ``pip install prunus[ssh]``.

::

    async with SSHServer(folder) as server:
        async with Connections({"host": server.endpoint()}):
            result = await prunus.execute(MyRemoteJob, {...})
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import posixpath
import signal as _signal
import socket
from pathlib import Path
from typing import Any

import asyncssh

END_S = 5.0
"""How long the commands of a server that is closed may take to end."""


class SSHServer:
    """See the module; an async context manager. What it needs, and its home folder, is made in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.key_file = folder / "client_key"
        self.known_hosts = folder / "known_hosts"
        self.port = 0
        self.logins = 0
        """How many connections were accepted."""
        self.commands: list[str] = []
        """Those that were run."""
        self._place: socket.socket | None = None
        self._acceptor: asyncssh.SSHAcceptor | None = None
        self.connections: set[asyncssh.SSHServerConnection] = set()
        """Those that are open."""
        self._running: set[asyncio.Task[None]] = set()
        self._host_key = asyncssh.generate_private_key("ssh-ed25519")

    async def __aenter__(self) -> SSHServer:
        self.home.mkdir(parents=True)
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(str(self.key_file))
        self.key_file.chmod(0o600)
        key.write_public_key(str(self.folder / "authorized_keys"))
        # A socket that only holds the port, so that the server finds it free when it is started again.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._place.bind(("127.0.0.1", 0))
        self.port = self._place.getsockname()[1]
        public = self._host_key.export_public_key().decode().strip()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public}\n")
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=END_S)
        if self._place is not None:
            self._place.close()

    def endpoint(self, **settings: Any) -> dict[str, Any]:
        """This server as an endpoint of ``config.yaml``, with more `settings`."""
        return {
            "transport": "ssh",
            "host": "127.0.0.1",
            "port": self.port,
            "key_file": str(self.key_file),
            "known_hosts": str(self.known_hosts),
            "safe_interval_s": 0,
            **settings,
        }

    async def start(self) -> None:
        """Accept connections. It does so when the context begins."""
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", self.port))
        self._acceptor = await asyncssh.listen(
            sock=listening,
            server_host_keys=[self._host_key],
            authorized_client_keys=str(self.folder / "authorized_keys"),
            server_factory=lambda: _Guest(self),
            encoding=None,
        )

    async def stop(self) -> None:
        """Accept no connections, and break those that are there."""
        if self._acceptor is not None:
            self._acceptor.close()
            await self._acceptor.wait_closed()
            self._acceptor = None
        await self.drop()

    async def drop(self) -> None:
        """Break every connection. What they run may go on."""
        connections, self.connections = self.connections, set()
        for connection in connections:
            connection.abort()
        for connection in connections:
            await connection.wait_closed()

    async def run(self, session: _Session) -> None:
        """Run the command of a session, and pass on what it says."""
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        command = session.command or "exit"
        self.commands.append(command)
        child = session.child = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self.home,
            env=os.environ | {"HOME": str(self.home)},
            start_new_session=True,
        )
        assert child.stdout is not None
        assert child.stderr is not None
        feeding = asyncio.create_task(_feed(session, child))
        try:
            await asyncio.gather(_pass_on(child.stdout, session.stdout), _pass_on(child.stderr, session.stderr))
            status = await child.wait()
        except asyncio.CancelledError:
            session.signal_received("KILL")
            await child.wait()
            raise
        finally:
            feeding.cancel()
            await asyncio.wait((feeding,))
            if child.stdin is not None:
                child.stdin.close()
            self._running.discard(task)
        with contextlib.suppress(OSError):  # nobody is there any more
            if status < 0:
                session.exit_with_signal(_signal.Signals(-status).name.removeprefix("SIG"))
            else:
                session.exit(status)


class _Session(asyncssh.SSHServerProcess[bytes]):
    """One command, or one client of SFTP."""

    def __init__(self, server: SSHServer) -> None:
        self.child: asyncio.subprocess.Process | None = None
        super().__init__(lambda _: server.run(self), lambda channel: _Files(channel, server.home), 3, False)

    def signal_received(self, signal: str) -> None:
        """For all that the command has started."""
        number = getattr(_signal, f"SIG{signal}", None)
        if self.child is not None and number is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, number)


class _Guest(asyncssh.SSHServer):
    """One connection."""

    def __init__(self, server: SSHServer) -> None:
        self._server = server
        self._connection: asyncssh.SSHServerConnection | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        self._server.connections.add(conn)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._connection is not None:
            self._server.connections.discard(self._connection)

    def auth_completed(self) -> None:
        self._server.logins += 1

    def session_requested(self) -> Any:
        return _Session(self._server)


class _Files(asyncssh.SFTPServer):
    """Relative paths begin in the home folder."""

    def __init__(self, channel: Any, home: Path) -> None:
        super().__init__(channel)
        self._home = os.fsencode(home)

    def map_path(self, path: bytes) -> bytes:
        return posixpath.join(self._home, path)


async def _feed(session: _Session, child: asyncio.subprocess.Process) -> None:
    """Pass on the input."""
    assert child.stdin is not None
    with contextlib.suppress(asyncssh.Error, OSError):  # the connection broke, or the command does not want it
        while data := await session.stdin.read(64 * 1024):
            child.stdin.write(data)
            await child.stdin.drain()
    child.stdin.close()


async def _pass_on(source: asyncio.StreamReader, target: asyncssh.SSHWriter[bytes]) -> None:
    while data := await source.read(64 * 1024):
        with contextlib.suppress(asyncssh.Error, OSError):  # nobody listens any more: the command goes on
            target.write(data)
            await target.drain()
