"""Both transports do what a transport must; and what only one of them has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from prunus.errors import EndpointUnavailableError, TransportError, TransportLostError
from prunus.runtime.remote.local import LocalTransport
from prunus.runtime.remote.ssh import SSHTransport, connect_ssh
from prunus.runtime.remote.transport import MAX_OUTPUT_BYTES, Transport
from prunus.testing import SSHServer, TransportContract
from prunus.testing.transport_contract import gone, there

BUSY_S = 0.02
"""How long a loop is busy with something else; a command is ahead of it meanwhile."""


class TestLocal(TransportContract):
    """This machine."""

    @pytest.fixture
    def home(self, short_folder: Path) -> Path:
        """Where its paths begin."""
        return short_folder

    @pytest.fixture
    async def transport(self, home: Path) -> AsyncIterator[LocalTransport]:
        """Open."""
        transport = LocalTransport("here", home)
        yield transport
        await transport.close()

    async def test_a_command_that_is_cancelled_while_it_starts_is_ended(
        self, transport: LocalTransport, home: Path
    ) -> None:
        """Also before the loop knows that it runs: with what it has started by then, and at once."""
        await cancel_starts(transport, home, range(12))

    async def test_who_says_too_much_is_told_what_to_do(self, transport: LocalTransport) -> None:
        """The contract only wants it to be refused; these are our words."""
        with pytest.raises(TransportError, match="have it write to a file and `get` that"):
            await transport.run(f"head -c {MAX_OUTPUT_BYTES + 1} /dev/zero")


async def cancel_starts(transport: Transport, home: Path, turns_of_the_loop: Iterable[int]) -> None:
    """Begin a command and cancel it after so many turns of the loop, again and again: none of them goes on."""
    line = f"cd {home}; sleep 1000 & echo $! > child; echo $$ > shell; wait"
    for turns in turns_of_the_loop:
        for name in ("child", "shell"):
            (home / name).unlink(missing_ok=True)
        running = asyncio.create_task(transport.run(line))
        for _ in range(turns):
            await asyncio.sleep(0)
        time.sleep(BUSY_S)  # noqa: ASYNC251 (that is the point)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        for name in ("child", "shell"):
            if (home / name).exists() and (pid := (home / name).read_text()).endswith("\n"):
                await gone(int(pid))


@pytest.fixture
async def server(short_folder: Path) -> AsyncIterator[SSHServer]:
    """A private server."""
    async with SSHServer(short_folder / "ssh") as server:
        yield server


async def connect(server: SSHServer, **options: object) -> SSHTransport:
    """A transport to it."""
    facts = {"port": server.port, "key_file": server.key_file, "known_hosts": server.known_hosts, **options}
    return await connect_ssh("host", "127.0.0.1", **facts)  # type: ignore[arg-type]


class TestSSH(TransportContract):
    """A host that is reached by SSH."""

    @pytest.fixture
    def home(self, server: SSHServer) -> Path:
        """Where its paths begin."""
        return server.home

    @pytest.fixture
    async def transport(self, server: SSHServer) -> AsyncIterator[SSHTransport]:
        """Open."""
        transport = await connect(server)
        yield transport
        await transport.close()

    async def test_a_command_that_is_cancelled_while_it_starts_is_ended(
        self, transport: SSHTransport, home: Path
    ) -> None:
        """Also before anybody here knows how to end it."""
        await cancel_starts(transport, home, range(0, 60, 6))


async def test_a_host_that_is_not_the_one_it_should_be_is_refused(server: SSHServer) -> None:
    """Its key is not the one that is known: no command is sent to it, and it is of no use to try again."""
    other = server.folder / "other_hosts"
    other.write_text("")
    with pytest.raises(EndpointUnavailableError, match=r"127\.0\.0\.1"):
        await connect(server, known_hosts=other)
    trusting = await connect(server, known_hosts=other, check_host_key=False)
    await trusting.close()


async def test_a_key_that_is_not_accepted_is_not_tried_again(server: SSHServer) -> None:
    """The error says which host refuses."""
    import asyncssh

    asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(server.folder / "other"))
    with pytest.raises(EndpointUnavailableError, match=r"127\.0\.0\.1.*[Pp]ermission"):
        await connect(server, key_file=server.folder / "other")


async def test_nobody_there_is_an_error_that_names_the_place(server: SSHServer) -> None:
    """It may be tried again."""
    await server.stop()
    with pytest.raises(OSError, match=f"127.0.0.1:{server.port}"):
        await connect(server)


async def test_who_runs_a_command_when_the_connection_breaks_is_told(server: SSHServer) -> None:
    """Whether the command has ended is not known; the transport is of no use any more."""
    transport = await connect(server)
    running = asyncio.create_task(transport.run("echo x > begun; sleep 1000"))
    await there(server.home / "begun")
    await server.drop()
    with pytest.raises(TransportLostError):
        await running
    assert transport.is_closed
    with pytest.raises(TransportLostError):
        await transport.run("true")
    await transport.close()


async def test_who_copies_a_file_when_the_connection_breaks_is_told(server: SSHServer, tmp_path: Path) -> None:
    """And the file does not appear under its name."""
    transport = await connect(server)
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(200_000_000)
    copying = asyncio.create_task(transport.put(big, "big"))
    while not any(server.home.iterdir()):
        await asyncio.sleep(0)
    await server.drop()
    with pytest.raises(TransportLostError):
        await copying
    assert not (server.home / "big").exists()
    await transport.close()


async def test_a_copy_that_is_cancelled_leaves_nothing(server: SSHServer, tmp_path: Path) -> None:
    """Neither under its name nor beside it."""
    transport = await connect(server)
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(200_000_000)
    copying = asyncio.create_task(transport.put(big, "big"))
    while not any(server.home.iterdir()):
        await asyncio.sleep(0)
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert list(server.home.iterdir()) == []
    await transport.close()
