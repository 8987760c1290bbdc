"""A daemon runs jobs on a host that is reached by SSH, and everything that can go wrong on the way does.

    python remote_demo.py

The host is a private SSH server on this machine. Exit code 0 if all came out well; else 1.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import prunus
from prunus.persistence.persister import Record
from prunus.runtime.profile import Config, Profile
from prunus.testing import SSHServer
from remote_job import RemoteJob

HERE = Path(__file__).resolve().parent
TIME_LIMIT_S = 55.0
SCRIPT = "echo begun > begun; until [ -e go ]; do sleep 0.1; done; echo $((6 * 7)) > answer; echo the answer is there"
"""A job that ends when somebody says so."""


async def main() -> int:
    with tempfile.TemporaryDirectory(prefix="prunus-demo-") as name:
        folder = Path(name)
        async with SSHServer(folder / "ssh") as server:
            endpoint = server.endpoint(initial_interval_s=0.2, max_attempts=3)
            config = Config(import_from=[str(HERE)], endpoints={"cluster": endpoint})
            profile = Profile.create(folder / "profile", config)
            print(f"A private SSH server on port {server.port}, a profile that calls it 'cluster', and a daemon:")
            try:
                await prunus_command(profile, "daemon", "start", "-w", "2")
                async with asyncio.timeout(TIME_LIMIT_S):
                    is_well = await disturbed_jobs(folder, profile, server)
            except (OSError, TimeoutError, subprocess.CalledProcessError, prunus.PrunusError) as error:
                print(f"!! {type(error).__name__}: {error}", flush=True)
                is_well = False
            finally:
                await prunus_command(profile, "daemon", "stop")
    print()
    print(
        "All is well: two jobs, each submitted once, and one that was killed." if is_well else "!! Something is wrong."
    )
    return 0 if is_well else 1


async def disturbed_jobs(folder: Path, profile: Profile, server: SSHServer) -> bool:
    """True if all is as it should be."""
    began = time.monotonic()

    def tell(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    jobs = server.home / "prunus-jobs"
    async with prunus.connect(profile) as controller:

        async def launch(results: str) -> prunus.ProcessHandle:
            inputs = {"script": SCRIPT, "results": str(folder / results), "poll_s": 0.5}
            return await controller.launch(RemoteJob, inputs)

        async def until(handle: prunus.ProcessHandle, holds: Callable[[Record], bool]) -> Record:
            async with controller.events(handle.pid) as events:
                while not holds(record := await handle.record()):
                    await anext(events)
            return record

        async def played_to_its_end(handle: prunus.ProcessHandle) -> None:
            """Play it as often as the absence of the host pauses it."""
            while not (await until(handle, lambda row: row.is_terminal or row.play == "paused")).is_terminal:
                await handle.play()

        async def begun(handle: prunus.ProcessHandle) -> None:
            while not (jobs / handle.pid / "begun").exists():  # noqa: ASYNC110 (the host sets no event)
                await asyncio.sleep(0.05)

        first, second = await launch("first"), await launch("second")
        await asyncio.gather(begun(first), begun(second))
        tell("two jobs run on the cluster")
        await until(first, lambda row: row.state == "waiting")
        tell("their processes are parked, and look after them from time to time")

        await server.drop()
        tell("all connections are broken; the jobs go on")
        await until(first, lambda row: row.state == "waiting")

        await second.kill("not needed any more")
        tell(f"killed the second process: it is {(await second.record()).state}, and so is its job")
        is_cancelled = (jobs / second.pid / "cancelled").exists()

        await server.stop()
        third = await launch("third")
        record = await until(third, lambda row: row.play == "paused")
        tell(f"the cluster is down, so a third process is paused: {record.status}")
        await server.start()
        playing = [asyncio.create_task(played_to_its_end(handle)) for handle in (first, third)]
        await begun(third)
        tell("the cluster is back; played, the third job runs too")

        for handle in (first, third):
            (jobs / handle.pid / "go").touch()
        await asyncio.gather(*playing)
        results = await asyncio.gather(first.result(), third.result())
        answers = [(folder / name / "answer").read_text().strip() for name in ("first", "third")]
        tell(f"both have ended; the answers are {' and '.join(answers)}")
        submitted = len((jobs / "tiny_queue.log").read_text().splitlines())
        tell(f"the cluster has seen {submitted} jobs")
        said = all(result.outputs.output == "the answer is there\n" for result in results)
        return said and is_cancelled and answers == ["42", "42"] and submitted == 3


async def prunus_command(profile: Profile, *arguments: str) -> None:
    """What a user would type."""
    print("$ prunus", *arguments, flush=True)
    command = [sys.executable, "-m", "prunus.runtime.cli", *arguments]
    environment = os.environ | {"PRUNUS_PROFILE": str(profile.path)}
    await asyncio.to_thread(subprocess.run, command, check=True, env=environment)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
