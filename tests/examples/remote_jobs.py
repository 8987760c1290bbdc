"""Remote jobs that are disturbed in ways that a test can't arrange from outside."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from prunus import RetryPolicy, connection, step
from prunus.runtime.remote import Completed
from remote_job import AGAIN, RemoteJob


class FollowedJob(RemoteJob):
    """Stays in a step, and in a command, while the job runs."""

    @step(retry=AGAIN)
    async def poll(self) -> Any:
        async with connection(self.inputs.endpoint) as host:
            waits = "echo $$ > following; until [ -e exit ]; do sleep 0.05; done; rm following"
            (await host.run(waits, cwd=self.folder)).check()
        return await super().poll()


class HastyJob(RemoteJob):
    """Does not try for long to cancel its job."""

    @step(retry=RetryPolicy(max_attempts=2, initial_interval_s=0.01))
    async def on_kill(self, message: str | None) -> None:
        await super().on_kill(message)


class OrphanedJob(RemoteJob):
    """Its worker dies when the job is submitted and nobody else knows, once."""

    def watch(self, submitted: Completed) -> Any:
        mark = Path(self.inputs.results).with_suffix(".died")
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().watch(submitted)
