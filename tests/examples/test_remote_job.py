"""A batch job on a host that is reached by SSH, by real workers, with everything that may go wrong on the way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import prunus
from prunus.persistence.persister import Record
from prunus.runtime.profile import Config
from prunus.runtime.remote import Connections
from prunus.testing.ssh_server import SSHServer
from prunus.testing.transport_contract import gone, is_alive
from remote_job import RemoteJob
from tests.examples.remote_jobs import FollowedJob, HastyJob, OrphanedJob
from tests.guarantees.real_daemon import PROJECT, RealDaemon
from tests.runtime.waiting import POLL_S, until

DEMO = PROJECT / "examples" / "remote_job" / "remote_demo.py"
WAITS = "echo $$ > shell; until [ -e go ]; do sleep 0.05; done; echo done with $(cat data); echo 42 > answer"
"""A job that ends when it is told to."""


class Lab:
    """A host, a daemon that knows it as "cluster", and what a test asks of them."""

    def __init__(self, folder: Path, server: SSHServer, daemon: RealDaemon) -> None:
        self.folder, self.server, self.daemon = folder, server, daemon
        (folder / "data").write_text("the data")

    async def launch(self, kind: type[RemoteJob] = RemoteJob, **more: Any) -> prunus.ProcessHandle:
        inputs = {"script": WAITS, "results": str(self.folder / "results"), "poll_s": 0.1, **more}
        return await self.daemon.controller.launch(kind, {"files": {"data": str(self.folder / "data")}, **inputs})

    def job_folder(self, handle: prunus.ProcessHandle) -> Path:
        return self.server.home / "prunus-jobs" / handle.pid

    async def begun(self, handle: prunus.ProcessHandle, name: str = "shell") -> int:
        """The process that runs the job, as soon as it does."""
        file = self.job_folder(handle) / name
        while not (file.exists() and file.read_text().strip()):
            await asyncio.sleep(POLL_S)
        return int(file.read_text())

    def let_end(self, handle: prunus.ProcessHandle) -> None:
        (self.job_folder(handle) / "go").touch()

    def submitted(self) -> int:
        """How many jobs have begun on the host, ever."""
        return len((self.server.home / "prunus-jobs" / "tiny_queue.log").read_text().splitlines())


@pytest.fixture
async def lab(short_folder: Path) -> AsyncIterator[Lab]:
    """With two workers."""
    async with SSHServer(short_folder / "ssh") as server:
        daemon = RealDaemon(short_folder)
        endpoint = server.endpoint(initial_interval_s=0.05, max_attempts=3)
        folders = [str(PROJECT), str(PROJECT / "examples" / "remote_job")]
        config = Config(workers=2, slots=4, grace_s=1.0, import_from=folders, endpoints={"cluster": endpoint})
        (daemon.profile.path / "config.yaml").write_text(config.to_text())
        async with daemon:
            yield Lab(short_folder, server, daemon)
        for job in server.home.glob("prunus-jobs/*/job-*"):  # those of a test that has failed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(job.read_text()), signal.SIGKILL)


async def subjects(handle: prunus.ProcessHandle) -> list[str]:
    return [event.subject for event in await handle.history()]


async def test_a_job_is_uploaded_submitted_watched_and_fetched(lab: Lab) -> None:
    """While it runs the process is parked; in the end its files are here, and nothing of it is there."""
    handle = await lab.launch()
    await lab.begun(handle)
    record = await until(handle, lambda row: row.state == "waiting")
    assert record.owner is None or record.state == "waiting"
    lab.let_end(handle)
    result = await handle.result()
    assert result.outputs.output == "done with the data\n"
    assert (lab.folder / "results" / "answer").read_text() == "42\n"
    assert not lab.job_folder(handle).exists()
    assert lab.submitted() == 1
    assert lab.server.logins <= 2  # (one for each worker, however often it looks)


async def test_a_job_that_fails_is_an_exit_code(lab: Lab) -> None:
    """What it has left is fetched all the same."""
    handle = await lab.launch(script="echo oops >&2; exit 7")
    result = await handle.result()
    assert result.exit_status == 300
    assert (lab.folder / "results" / "errors").read_text() == "oops\n"


async def test_a_kill_ends_the_job_of_a_parked_process(lab: Lab) -> None:
    """The process is woken for its last step; when the kill is done the job is gone."""
    handle = await lab.launch(poll_s=3600)
    shell = await lab.begun(handle)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    await handle.kill("changed my mind")
    await gone(shell)
    with pytest.raises(prunus.ProcessKilledError, match="changed my mind"):
        await handle.result()


async def test_a_kill_ends_the_job_of_a_running_step(lab: Lab) -> None:
    """The command that runs in the step is ended, and then the job."""
    handle = await lab.launch(FollowedJob)
    shell, following = await lab.begun(handle), await lab.begun(handle, "following")
    await handle.kill()
    await gone(shell)
    await gone(following)
    assert (await handle.record()).state == "killed"


async def test_a_connection_that_breaks_is_opened_again(lab: Lab) -> None:
    """In the middle of a command; the job goes on meanwhile, and the process finds it again."""
    handle = await lab.launch(FollowedJob)
    shell = await lab.begun(handle)
    await lab.begun(handle, "following")
    await lab.server.drop()
    await until(handle, lambda row: row.state == "waiting")
    assert any("attempt 1 of 5 failed" in (event.note or "") for event in await handle.history())
    assert is_alive(shell)
    lab.let_end(handle)
    assert (await handle.result()).outputs.output == "done with the data\n"
    assert lab.submitted() == 1


async def test_without_the_host_the_process_is_paused_until_it_is_played(lab: Lab) -> None:
    """It is neither failed nor lost, and its status says why."""

    def is_paused(row: Record) -> bool:
        return row.play == "paused"

    await lab.server.stop()
    handle = await lab.launch()
    record = await until(handle, is_paused)
    assert record.state == "running"
    assert "the step run is blocked: no connection to 'cluster' in 3 attempts" in (record.status or "")
    await handle.play()
    await until(handle, lambda row: row.play == "playing")
    await until(handle, is_paused)  # still nobody there: another series
    await lab.server.start()
    await handle.play()
    await lab.begun(handle)
    lab.let_end(handle)
    await handle.result()
    assert (await subjects(handle)).count("blocked") == 2
    assert lab.submitted() == 1


async def test_a_worker_that_dies_after_submitting_submits_nothing_twice(lab: Lab) -> None:
    """kill -9 between the submission and the checkpoint: the next worker finds the job by its name."""
    handle = await lab.launch(OrphanedJob)
    await lab.begun(handle)
    while not (lab.folder / "results.died").exists():
        await asyncio.sleep(POLL_S)
    lab.let_end(handle)
    assert (await handle.result()).outputs.output == "done with the data\n"
    assert lab.submitted() == 1
    assert len([event for event in await handle.history() if event.step == "submit_job"]) >= 1


async def test_a_job_that_is_gone_is_an_exit_code(lab: Lab) -> None:
    """Its host has lost it."""
    handle = await lab.launch()
    await lab.begun(handle)
    (job,) = lab.job_folder(handle).glob("job-*")
    os.killpg(int(job.read_text()), signal.SIGKILL)
    assert (await handle.result()).exit_status == 301


async def test_without_the_host_a_kill_comes_to_its_end_all_the_same(lab: Lab) -> None:
    """The job goes on there, and the history says that it could not be cancelled."""
    handle = await lab.launch(HastyJob, poll_s=3600)
    shell = await lab.begun(handle)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    await lab.server.stop()
    await handle.kill()
    assert is_alive(shell)
    assert (await subjects(handle))[-2:] == ["failed", "running.killed"]
    lab.let_end(handle)


async def test_a_job_runs_without_a_daemon(tmp_path: Path) -> None:
    """`prunus.execute` alone is enough, on this machine too."""
    (tmp_path / "home").mkdir()
    endpoint = {"transport": "local", "folder": str(tmp_path / "home")}
    inputs = {"script": "echo alone", "results": str(tmp_path / "results"), "poll_s": 0.05}
    async with Connections({"cluster": endpoint}):
        result = await prunus.execute(RemoteJob, inputs)
    assert result.outputs.output == "alone\n"


@pytest.mark.timeout(120)
@pytest.mark.timeout(120)
def test_the_demonstration_ends_well() -> None:
    """What its README promises."""
    done = subprocess.run(
        [sys.executable, DEMO], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("All is well")
