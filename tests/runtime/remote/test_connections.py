"""Which connections a process has, and what the configuration may say of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import prunus
from prunus.errors import EndpointUnavailableError, ProfileError
from prunus.processes import KillMessage, Process, ProcessState, Wait, sleep
from prunus.runtime.profile import Config, Profile
from prunus.runtime.remote import Connections
from prunus.runtime.remote.endpoints import SSHEndpoint, read_endpoints
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime.waiting import until


class Asks(Process):
    """Runs a command on a host."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("endpoint", valid_type=str, default="here")

    async def run(self) -> Any:
        async with prunus.connection(self.inputs.endpoint) as host:  # type: ignore[attr-defined]
            return (await host.run("pwd -P")).check().stdout.strip()


class Cleans(Process):
    """Has something to do there when it is killed."""

    async def run(self) -> Any:
        return Wait(on=sleep(3600))

    async def on_kill(self, message: str | None) -> None:
        async with prunus.connection("here") as host:
            await host.write("cleaned", f"{message}")


class Stays(Process):
    """Waits for a connection that nobody opens, for hours."""

    async def run(self) -> Any:
        async with prunus.connection("gone"):
            raise AssertionError


def real(folder: Path) -> str:
    """As `pwd -P` says it."""
    return os.path.realpath(folder)


@contextlib.asynccontextmanager
async def closing(connections: Connections) -> AsyncIterator[None]:
    """Closes them; they are not those of the code inside."""
    try:
        yield
    finally:
        await connections.close()


GONE = {"transport": "ssh", "host": "127.0.0.1", "port": 1, "max_attempts": 1}


def here(folder: Path) -> dict[str, dict[str, Any]]:
    """This machine as an endpoint."""
    return {"here": {"transport": "local", "folder": str(folder)}}


async def test_a_process_of_a_worker_has_the_connections_of_its_worker(tmp_path: Path) -> None:
    """All processes share them."""
    connections = Connections(here(tmp_path))
    async with closing(connections), LocalDaemon(connections=connections) as daemon:
        handles = [await daemon.controller.launch(Asks) for _ in range(5)]
        results = [await handle.result() for handle in handles]
        assert {result.value for result in results} == {real(tmp_path)}
        assert connections.statistics()["here"].openings == 1


async def test_without_a_connection_the_process_is_paused_with_the_reason(tmp_path: Path) -> None:
    """In a daemon; the history shows it, and each play tries again."""
    connections = Connections(here(tmp_path))
    async with closing(connections), LocalDaemon(connections=connections) as daemon:
        handle = await daemon.controller.launch(Asks, {"endpoint": "there"})
        record = await until(handle, lambda row: row.play == "paused")
        assert (record.state, record.owner) == ("running", None)
        assert "no connection to 'there': there is no such endpoint (there are: here)" in (record.status or "")
        await handle.play()
        await until(handle, lambda row: row.play == "paused" and row.epoch > record.epoch)
        events = [event.subject for event in await handle.history()]
        assert events.count("blocked") == 2
        await handle.kill()


async def test_a_kill_wakes_a_process_from_the_wait_for_a_connection() -> None:
    """Whatever pause its endpoint makes between two attempts."""
    connections = Connections({"gone": {**GONE, "max_attempts": 9, "initial_interval_s": 86_400}})
    async with closing(connections), LocalDaemon(connections=connections) as daemon:
        handle = await daemon.controller.launch(Stays)
        while connections.statistics()["gone"].failures == 0:
            await asyncio.sleep(0.001)
        await handle.kill()
        assert (await handle.record()).state == "killed"
        assert connections.statistics()["gone"].waiting == 0


async def test_a_killed_process_takes_its_last_step_in_the_daemon(tmp_path: Path) -> None:
    """It was parked, so nobody held it; when the kill is done, so is the step."""
    connections = Connections(here(tmp_path))
    async with closing(connections), LocalDaemon(connections=connections) as daemon:
        handle = await daemon.controller.launch(Cleans)
        await until(handle, lambda row: row.state == "waiting" and row.owner is None)
        await handle.kill("enough")
        assert (tmp_path / "cleaned").read_text() == "enough"
        record = await handle.record()
        assert (record.state, record.play) == ("killed", "playing")
        steps = [(event.subject, event.step) for event in await handle.history()]
        assert steps[-1] == ("running.killed", "on_kill")


async def test_a_killed_process_takes_its_last_step_after_the_death_of_its_worker(tmp_path: Path) -> None:
    """The kill is on the disk: whoever continues the process continues with that step."""
    connections = Connections(here(tmp_path))
    async with closing(connections), LocalDaemon(workers=1, connections=connections) as daemon:
        handle = await daemon.controller.launch(Cleans)
        await until(handle, lambda row: row.state == "waiting" and row.owner is None)
        await daemon.kill_worker("worker-1")
        killing = asyncio.create_task(handle.kill("enough"))
        await daemon.start_worker("worker-2")
        await killing
        assert (tmp_path / "cleaned").read_text() == "enough"


async def test_who_is_executed_alone_has_those_of_the_code_around(tmp_path: Path) -> None:
    """`async with Connections(...)`; they are closed at its end."""
    async with Connections(here(tmp_path)) as connections:
        assert (await prunus.execute(Asks)).value == real(tmp_path)
        assert connections.statistics()["here"].state == "open"
    assert connections.statistics()["here"].state == "closed"


def test_a_script_has_those_of_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in it begin in the profile; when the event loop ends, they are closed."""
    profile = Profile.create(tmp_path / "profile", Config(endpoints={"here": {"transport": "local", "folder": "run"}}))
    monkeypatch.setenv("PRUNUS_PROFILE", str(profile.path))
    assert prunus.run(Asks).value == str(profile.path / "run")


async def test_a_killed_process_that_is_executed_alone_takes_its_last_step(tmp_path: Path) -> None:
    """As in a daemon."""
    async with Connections(here(tmp_path)):
        process = Cleans()
        running = asyncio.create_task(prunus.execute(process))
        while process.state is not ProcessState.WAITING:
            await asyncio.sleep(0)
        process.receive(KillMessage("enough"))
        with pytest.raises(prunus.ProcessKilledError):
            await running
        assert (tmp_path / "cleaned").read_text() == "enough"


async def test_a_host_that_is_not_there_says_why() -> None:
    """The reason names the host and the port."""
    async with Connections({"gone": GONE}) as connections:
        with pytest.raises(EndpointUnavailableError, match=r"'gone' in one attempt: 127\.0\.0\.1:1: "):
            await connections.request("gone")


def test_wrong_settings_are_named_all_at_once() -> None:
    """By endpoint and key, with what was expected; by every command that reads the profile."""
    endpoints: dict[str, dict[str, Any]] = {
        "a": {"transport": "ssh"},
        "b": {"transport": "carrier pigeon"},
        "c": {"transport": "local", "port": 22, "idle_s": -1},
        "d": {},
    }
    with pytest.raises(ProfileError) as caught:
        read_endpoints(endpoints)
    text = str(caught.value)
    for line in (
        "endpoints.a.host: is missing",
        "endpoints.b.transport: expected one of local, ssh; it is 'carrier pigeon'",
        "endpoints.c.port: there is no such setting",
        "endpoints.c.idle_s: expected float >= 0.0; it is -1",
        "endpoints.d.transport: expected one of local, ssh; it is None",
    ):
        assert line in text
    with pytest.raises(ProfileError, match=r"endpoints\.a\.host: is missing"):
        Config.from_mapping({"endpoints": endpoints}, "config.yaml")


def test_ssh_is_careful_unless_it_is_told_otherwise() -> None:
    """The key of the host is checked, and no host is asked more often than once in five seconds."""
    found = read_endpoints({"a": {"transport": "ssh", "host": "a"}})["a"]
    assert isinstance(found, SSHEndpoint)
    assert (found.check_host_key, found.safe_interval_s, found.port) == (True, 5.0, 22)
