"""A batch job on another host, as a process: upload, submit, watch, fetch.

What may go wrong on the way, and what becomes of it:

* the connection breaks: the step is tried again a little later, on a new connection;
* the host is not there for long: the process is paused with the reason, and ``prunus play`` goes on;
* the worker dies after the job was submitted, but before anybody has written that down: the next worker looks for the
  job by the name that it has, and finds it. No job is ever submitted twice;
* the process is killed, whether it runs or is parked: the job is cancelled (`RemoteJob.on_kill`).

While the job runs the process is parked: it holds no connection, no slot and no memory. `tiny_queue.sh` stands for the
batch system; with a real one the commands are ``sbatch --job-name NAME``, ``squeue --name NAME`` and ``scancel``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunus import (
    Continue,
    DidNotHappen,
    ExitCode,
    Happened,
    Process,
    RetryPolicy,
    TransportLostError,
    Wait,
    connection,
    sleep,
    step,
)
from prunus.runtime.remote import Completed, Transport

QUEUE = Path(__file__).with_name("tiny_queue.sh")
AGAIN = RetryPolicy(
    max_attempts=5, initial_interval_s=1, max_interval_s=60, retry_on=(TransportLostError, TimeoutError)
)
"""A connection that breaks is no reason to give up."""
COMMAND_TIMEOUT_S = 60.0
"""A command of the batch system that takes longer has failed."""


@dataclass(frozen=True)
class Job:
    """What is to be done, and where."""

    script: str
    """What ``/bin/sh`` runs there."""
    results: str
    """The folder here that gets what the job has made there."""
    files: dict[str, str] = field(default_factory=dict)
    """Files that the job finds in its folder: their names there, and where they are here."""
    endpoint: str = "cluster"
    poll_s: float = 10.0


@dataclass(frozen=True)
class JobEnd:
    """What is left of a job when it has ended well."""

    output: str
    """What the job has said."""


class RemoteJob(Process[Job, JobEnd]):
    """Runs a script on a host."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.exit_code(300, "JOB_FAILED", message="the job ended with an exit status that is not 0")
        spec.exit_code(301, "JOB_GONE", message="the job is gone: it was cancelled, or its host has forgotten it")

    @property
    def folder(self) -> str:
        """Where the job lives, on its host."""
        return f"prunus-jobs/{self.pid}"

    # --- the steps ------------------------------------------------------------------------------------

    @step(retry=AGAIN)
    async def run(self) -> Any:
        async with connection(self.inputs.endpoint) as host:
            await host.mkdir(self.folder)
            await host.put(QUEUE, "prunus-jobs/tiny_queue.sh")
            await host.write(f"{self.folder}/job.sh", self.inputs.script)
            for name, here in self.inputs.files.items():
                await host.put(here, f"{self.folder}/{name}")
        return Continue(self.submit_job)

    @step(retry=AGAIN, effect="once", reconcile="find")
    async def submit_job(self) -> Any:
        async with connection(self.inputs.endpoint) as host:
            done = await self.batch(host, "submit", self.job_name(self.idempotency_key))
        return self.watch(done.check())

    async def find(self, key: str) -> Any:
        """Whether the job was submitted by a worker that did not live to tell."""
        async with connection(self.inputs.endpoint) as host:
            done = await self.batch(host, "find", self.job_name(key))
        return DidNotHappen() if done.exit_status == 3 else Happened(self.watch(done.check()))

    @step(retry=AGAIN)
    async def poll(self) -> Any:
        async with connection(self.inputs.endpoint) as host:
            done = await self.batch(host, "status")
        match done.check().stdout.split():
            case ["running"]:
                return self.wait()
            case ["done", status]:
                return Continue(self.fetch, int(status))
            case _:
                return self.exit_codes.JOB_GONE

    @step(retry=AGAIN)
    async def fetch(self, status: int) -> Any:
        results = Path(self.inputs.results)
        async with connection(self.inputs.endpoint) as host:
            await host.get(self.folder, results)
            output = await host.read(f"{self.folder}/output")
            await host.remove(self.folder)
        return JobEnd(output.decode(errors="replace")) if status == 0 else self.failed(status)

    @step(retry=RetryPolicy(max_attempts=3, initial_interval_s=5), timeout=60)
    async def on_kill(self, message: str | None) -> None:
        async with connection(self.inputs.endpoint) as host:
            if await host.exists(self.folder):
                (await self.batch(host, "cancel")).check()
        self.report("the job was cancelled")

    # --- what they share ------------------------------------------------------------------------------

    def job_name(self, key: str) -> str:
        """The name of the job: the same for each attempt to submit it."""
        return key.replace(":", "-")

    def watch(self, submitted: Completed) -> Wait:
        """The job is there: look after it from time to time."""
        self.set_status(f"job {submitted.stdout.strip()} on {self.inputs.endpoint}")
        return self.wait()

    def wait(self) -> Wait:
        return Wait(on=sleep(self.inputs.poll_s), then=self.poll)

    def failed(self, status: int) -> ExitCode:
        self.report(f"the job ended with exit status {status}; what it has left is in {self.inputs.results}")
        return self.exit_codes.JOB_FAILED

    async def batch(self, host: Transport, command: str, *more: str) -> Completed:
        """A command of the batch system, about this job."""
        line = ["sh", "prunus-jobs/tiny_queue.sh", command, self.folder, *more]
        return await host.run(line, timeout_s=COMMAND_TIMEOUT_S)
