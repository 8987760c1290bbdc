"""The SSH transport against OpenSSH's server, where there is one (``PRUNUS_SSHD`` may say which)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from prunus.runtime.remote.ssh import SSHTransport, connect_ssh
from prunus.testing import TransportContract

SSHD = os.environ.get("PRUNUS_SSHD") or shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
TRIES, PAUSE_S = 100, 0.05


def sftp_server() -> str | None:
    """OpenSSH's, or none: then it has one inside."""
    known = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/libexec/sftp-server")
    return next((path for path in known if Path(path).exists()), None)


def free_port() -> int:
    """A port that is free now. (OpenSSH can't be given a socket.)"""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port: int = place.getsockname()[1]
        return port


@pytest.mark.skipif(SSHD is None, reason="there is no sshd here")
class TestOpenSSH(TransportContract):
    """A private server of this user, which forces its sessions into a folder."""

    @pytest.fixture
    def home(self, short_folder: Path) -> Path:
        """Where the endpoint's paths begin."""
        home = short_folder / "home"
        home.mkdir()
        return home

    @pytest.fixture
    async def transport(self, short_folder: Path, home: Path) -> AsyncIterator[SSHTransport]:
        """Open."""
        import asyncssh

        assert SSHD is not None
        host_key, key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
        host_key.write_private_key(str(short_folder / "host_key"))
        key.write_private_key(str(short_folder / "key"))
        key.write_public_key(str(short_folder / "authorized_keys"))
        for name in ("host_key", "key", "authorized_keys"):
            (short_folder / name).chmod(0o600)
        port = free_port()
        public = host_key.export_public_key().decode().strip()
        (short_folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
        (short_folder / "config").write_text(
            f"ListenAddress 127.0.0.1:{port}\nHostKey {short_folder}/host_key\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {short_folder}/authorized_keys\nPermitRootLogin yes\nPasswordAuthentication no\n"
            f"StrictModes no\nSubsystem sftp {sftp_server() or 'internal-sftp'}\nMaxSessions 50\n"
        )
        server = await asyncio.create_subprocess_exec(
            SSHD, "-D", "-e", "-f", str(short_folder / "config"), stderr=asyncio.subprocess.PIPE
        )
        try:
            transport = await self._connect(short_folder, port, str(home), server)
            yield transport
            await transport.close()
        finally:
            with contextlib.suppress(ProcessLookupError):
                server.terminate()
            await server.communicate()

    async def _connect(self, folder: Path, port: int, home: str, server: asyncio.subprocess.Process) -> SSHTransport:
        for _ in range(TRIES):
            try:
                return await connect_ssh(
                    "sshd",
                    "127.0.0.1",
                    port=port,
                    key_file=folder / "key",
                    known_hosts=folder / "known_hosts",
                    folder=home,
                )
            except OSError:
                if server.returncode is not None:
                    break
                await asyncio.sleep(PAUSE_S)
        assert server.stderr is not None
        pytest.fail(f"sshd does not serve: {(await server.stderr.read(10_000)).decode()}")
