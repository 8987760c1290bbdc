"""Services that can't come up: each says why in one clear sentence, ends with an exit code, and harms nobody."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from prunus.persistence.database import APPLICATION_ID, SCHEMA_VERSION, open_database
from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Profile
from tests.faults.parts import POLL_S, PROJECT, Services, command_line, complaint, run, service_command
from tests.runtime import workflows
from tests.runtime.waiting import file_has

# --- a second one -----------------------------------------------------------------------------------


@pytest.mark.timeout(60)
async def test_a_second_broker_or_worker_is_refused(short_folder: Path) -> None:
    """It names the first one, which is not disturbed: no connection breaks, no step runs again."""
    journal = short_folder / "journal"
    async with Services(short_folder, workers=1) as services:
        inputs = {"file": str(journal), "steps": 100, "pace_s": 0.01}
        handle = await services.controller.launch(workflows.Journal, inputs)
        await file_has(journal, 2)
        profile = services.profile.path
        for name, options in {"broker": (), "worker-1": ("--name", "worker-1")}.items():
            ended = await run(service_command(name.partition("-")[0], profile, *options), short_folder)
            assert ended.code == 1
            [line] = ended.err.splitlines()
            pid = services.services[name].pid
            assert f"the {name} of this profile runs already (pid {pid}); `prunus daemon stop` stops it" in line
        assert (await handle.result()).outputs.written == 100
        assert len(journal.read_text().splitlines()) == 100
        assert [event.subject for event in await handle.history()].count("claimed") == 1


@pytest.mark.timeout(60)
async def test_a_second_daemon_is_refused(short_folder: Path) -> None:
    """Also by some at the same time on an empty profile: one runs, the others say so."""
    profile = Profile.create(short_folder / "profile")
    (profile.path / "config.yaml").write_text(f"workers: 1\nimport_from: ['{PROJECT}']\n")
    try:
        ended = await asyncio.gather(*(command_line(profile.path, "daemon", "start") for _ in range(3)))
        assert sorted(one.code for one in ended) == [0, 1, 1], ended
        for one in ended:
            assert "Traceback" not in one.err
            assert one.code == 0 or "the daemon of this profile runs already (pid " in one.err, one.err
        first = read_holder(profile.lock("daemon"))
        assert "runs already" in await complaint(profile.path, "daemon", "start", "-w", "3")
        assert read_holder(profile.lock("daemon")) == first
        status = await command_line(profile.path, "daemon", "status")
        assert status.code == 0
        assert "worker-2" not in status.out
    finally:
        stopped = await command_line(profile.path, "daemon", "stop")
    assert stopped.code == 0


# --- a profile that can't be used -------------------------------------------------------------------


async def test_a_profile_that_does_not_exist(tmp_path: Path) -> None:
    """Each command says so, and what makes one."""
    nowhere = tmp_path / "nowhere"
    for words in (["daemon", "start"], ["launch", "tests.runtime.workflows:Add", "a=1"]):
        error = await complaint(nowhere, *words)
        assert error == f"Error: there is no profile {nowhere}; `prunus init --profile {nowhere}` makes one\n"
    for module in ("broker", "worker", "supervisor"):
        ended = await run(service_command(module, nowhere), tmp_path)
        assert ended.code == 1
        assert f"{nowhere} is not a profile: it has no config.yaml (`prunus init` makes a profile)" in ended.err
        assert "Traceback" not in ended.err
    assert not nowhere.exists()


CONFIGS = {
    "workers: many": "workers: expected int",
    "slots: 0\ncolour: red": "colour: there is no such setting (there are workers, slots, ",
    "workers: [1": "is not valid YAML at line",
}


async def test_a_broken_configuration(tmp_path: Path) -> None:
    """The file, the setting and what was expected."""
    profile = Profile.create(tmp_path / "profile").path
    for text, words in CONFIGS.items():
        (profile / "config.yaml").write_text(text)
        error = await complaint(profile, "daemon", "start")
        assert f"{profile / 'config.yaml'}" in error
        assert words in error
    assert not (profile / "run" / "daemon.lock").exists()


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE music (title)")


def newer(path: Path) -> None:
    with closing(open_database(path)) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


def noise(path: Path) -> None:
    path.write_bytes(b"This is a letter to my aunt, not a database.\n" * 200)


DATABASES = {
    foreign: "is the database of another program; nothing was changed, choose another file",
    newer: f"was written by a newer Prunus (tables of version {SCHEMA_VERSION + 1}, this one knows {SCHEMA_VERSION})",
    noise: "is no database, or its beginning is damaged; nothing was changed: choose another file, or restore a backup",
    Path.mkdir: "can't be used as a database",
}


@pytest.mark.parametrize("make", DATABASES)
async def test_a_database_that_is_not_ours(short_folder: Path, make: Callable[[Path], None]) -> None:
    """The broker ends with a sentence; the file stays as it was."""
    profile = Profile.create(short_folder / "profile")
    make(profile.database)
    before = profile.database.read_bytes() if profile.database.is_file() else None
    ended = await run(service_command("broker", profile.path), short_folder)
    assert ended.code == 1
    [line] = ended.err.splitlines()
    assert f"{profile.database} {DATABASES[make]}" in line
    assert (profile.database.read_bytes() if before is not None else None) == before


@pytest.mark.timeout(60)
async def test_a_daemon_whose_broker_gives_up_says_why(short_folder: Path) -> None:
    """Within seconds, with the end of the broker's log; all that was started can be stopped."""
    profile = Profile.create(short_folder / "profile")
    (profile.path / "config.yaml").write_text("workers: 1\ngrace_s: 0\n")
    noise(profile.database)
    try:
        error = await asyncio.wait_for(complaint(profile.path, "daemon", "start"), 15)
        assert re.match(r"Error: the daemon is not ready after \d+ s: the broker does not run\. It goes on tr", error)
        assert "`prunus daemon stop` stops it\nThe end of " in error
        assert f"{profile.database} {DATABASES[noise]}" in error
        assert DATABASES[noise] in (await command_line(profile.path, "daemon", "logs", "broker")).out
    finally:
        stopped = await command_line(profile.path, "daemon", "stop")
    assert stopped.code == 0, stopped
    assert read_holder(profile.lock("worker-1")) is None


async def test_a_database_that_somebody_else_has_open(short_folder: Path) -> None:
    """The broker ends with a sentence; nobody breaks the other one's lock."""
    profile = Profile.create(short_folder / "profile")
    with closing(open_database(profile.database)):
        ended = await run(service_command("broker", profile.path), short_folder)
    assert ended.code == 1
    [line] = ended.err.splitlines()
    assert f"another program has {profile.database} open" in line


async def test_without_a_daemon_commands_say_how_to_start_one(short_folder: Path) -> None:
    """At once: nobody holds the lock of a daemon or of a broker."""
    profile = Profile.create(short_folder / "profile").path
    error = await complaint(profile, "list")
    assert error == f"Error: no daemon runs for the profile {profile}; `prunus daemon start` starts it\n"


# --- in any order -----------------------------------------------------------------------------------


@pytest.mark.timeout(60)
async def test_a_worker_waits_for_its_broker(short_folder: Path) -> None:
    """Started first, it says what it waits for, and works as soon as there is one."""
    async with Services(short_folder, workers=0) as services:
        services.kill("broker")
        services.start("worker-1")
        await services.said("worker-1", "no broker answers at ipc://")
        assert "waiting for a broker, for up to 60 s" in services.log("worker-1")
        services.start("broker")
        handle = await services.controller.launch(workflows.Add, {"a": 1})
        assert (await handle.result()).outputs.sum == 2


async def test_a_worker_gives_up_in_the_end(short_folder: Path) -> None:
    """After its patience: one clear line, exit code 1."""
    profile = Profile.create(short_folder / "profile").path
    ended = await run(service_command("worker", profile, "--patience", "0.2"), short_folder)
    assert ended.code == 1
    [line] = ended.err.splitlines()
    assert f"no broker answers at ipc://{profile}/run/broker.sock; is the daemon running?" in line


async def test_a_worker_that_waits_can_be_stopped(short_folder: Path) -> None:
    """SIGTERM ends it at once."""
    profile = Profile.create(short_folder / "profile")
    command = service_command("worker", profile.path)
    with subprocess.Popen(command, stderr=subprocess.PIPE) as worker:  # noqa: ASYNC220 (a short call)
        while read_holder(profile.lock("worker-1")) is None:
            await asyncio.sleep(POLL_S)
        os.kill(worker.pid, signal.SIGTERM)
        await asyncio.to_thread(worker.wait, 5)
        assert worker.stderr is not None
        assert b"Traceback" not in worker.stderr.read()
    assert read_holder(profile.lock("worker-1")) is None
