"""A full disk: new work is refused with a sentence, running work waits, reads are answered, nothing is lost.

Once with a real file system that is full (this needs the right to mount one), once with a database that may not grow,
and once with a disk that refuses to be written to.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunus.errors import StoreFullError
from prunus.persistence.database import WAL_LIMIT_BYTES, wal_bytes
from prunus.persistence.persister import Query
from prunus.runtime.broker import BALLAST_BYTES, LOW_SPACE_BYTES, NO_SPACE_BYTES
from prunus.runtime.controller import ProcessHandle
from tests.disks import small_file_system
from tests.faults.parts import POLL_S, Services, command_line, complaint
from tests.guarantees.real_daemon import steps_in_order
from tests.runtime import workflows
from tests.runtime.waiting import file_has

LITTLE_BYTES = 2 * NO_SPACE_BYTES
PROCESSES = 4


@pytest.fixture
def disk(short_folder: Path) -> Iterator[Path]:
    """A small file system."""
    size = LOW_SPACE_BYTES + 3 * BALLAST_BYTES + WAL_LIMIT_BYTES
    with small_file_system(short_folder / "disk", size) as folder:
        yield folder


def nearly_fill(file: Path) -> None:
    """Take all the space but a little, in one go."""
    status = os.statvfs(file.parent)
    with file.open("wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, status.f_bavail * status.f_frsize - LITTLE_BYTES)


def fill(file: Path) -> None:
    """Take all the space that is left, and that is given up meanwhile."""
    with file.open("ab", buffering=0) as handle, contextlib.suppress(OSError):
        while handle.write(bytes(64 * 1024)):
            pass
    with file.open("ab", buffering=0) as handle, contextlib.suppress(OSError):
        while handle.write(bytes(512)):
            pass


async def is_there(file: Path, wanted: bool = True) -> None:
    while file.exists() is not wanted:  # noqa: ASYNC240 (one look)
        await asyncio.sleep(POLL_S)


class Work:
    """Processes that write a journal until they are told that it is enough."""

    def __init__(self, services: Services, folder: Path) -> None:
        self.journal = folder / "journal"
        self.handles: list[ProcessHandle] = []
        self._services = services
        self._enough = folder / "enough"

    async def begin(self) -> None:
        """All of them are launched, and some steps were done."""
        inputs = {"file": str(self.journal), "enough": str(self._enough), "pace_s": 0.01}
        launch = self._services.controller.launch
        self.handles = [await launch(workflows.OpenJournal, inputs) for _ in range(PROCESSES)]
        await self.goes_on()

    async def goes_on(self) -> None:
        """Two steps for each process are done from now on."""
        written = len(await file_has(self.journal, 0))
        await file_has(self.journal, written + 2 * PROCESSES)

    async def end(self, *, killed: bool = False) -> None:
        """Every process finishes, with each step in order and, unless somebody was `killed`, once."""
        await self.goes_on()
        self._enough.touch()
        results = await asyncio.gather(*(handle.result() for handle in self.handles))
        lines = await file_has(self.journal, 1)
        done = sum(result.outputs.written for result in results)
        assert len(set(lines)) == done, self._services.logs()
        assert len(lines) == done or killed, "no step ran twice"
        assert steps_in_order(lines)


@pytest.mark.timeout(60)
async def test_a_full_file_system(short_folder: Path, disk: Path) -> None:
    """From the first sign of scarcity to nothing at all, and back."""
    filler = disk / "filler"
    async with Services(disk, workers=1, slots=PROCESSES) as services:
        profile, launch = services.profile.path, services.controller.launch
        ballast = services.profile.database.with_name("ballast")
        work = Work(services, short_folder)
        await work.begin()
        await is_there(ballast)

        nearly_fill(filler)
        with pytest.raises(StoreFullError, match="is full; free some space and try again, nothing was lost"):
            await launch(workflows.Add, {"a": 1})
        assert not ballast.exists(), "its space is for running work"
        await work.goes_on()

        fill(filler)
        await services.said("worker-1", "waits and tries again", times=PROCESSES)
        words = ("launch", "tests.runtime.workflows:Add", "a=1")
        assert f"the disk that holds {services.profile.database} is full" in await complaint(profile, *words)
        with pytest.raises(StoreFullError):
            await work.handles[0].pause()
        assert (await work.handles[0].record()).state == "running"
        listed = await command_line(profile, "list")
        assert (listed.code, listed.out.count("OpenJournal")) == (0, PROCESSES), "somebody new is answered too"
        doctor = await command_line(profile, "doctor")
        assert doctor.code == 1
        assert "the broker refuses new work because its disk is full" in doctor.out

        filler.unlink()
        await work.end()
        assert not await services.controller.find(Query(unfinished=True)), "nothing was launched but them"
        added = await launch(workflows.Add, {"a": 1})
        assert (await added.result()).outputs.sum == 2
        await is_there(ballast)
        assert services.services["broker"].poll() is None, "it never ended"
        assert "Traceback" not in services.log("broker") + services.log("worker-1")


@pytest.mark.timeout(60)
async def test_a_broker_that_starts_on_a_full_file_system(short_folder: Path, disk: Path) -> None:
    """It and its worker come up, answer, and go on when there is space."""
    filler = disk / "filler"
    async with Services(disk, workers=1, slots=PROCESSES) as services:
        work = Work(services, short_folder)
        await work.begin()
        await is_there(services.profile.database.with_name("ballast"))
        services.kill("broker")
        services.kill("worker-1")
        fill(filler)
        services.start("broker")
        services.start("worker-1")
        assert (await work.handles[0].record()).state == "running"
        with pytest.raises(StoreFullError):
            await services.controller.launch(workflows.Add, {"a": 1})
        filler.unlink()
        await work.end(killed=True)


async def launch_for_ever(services: Services) -> None:
    while True:
        await services.controller.launch(workflows.Add, {"a": 1})


class SmallServices(Services):
    """With the broker of `small_broker`."""

    def start(self, name: str) -> None:
        if name != "broker":
            super().start(name)
            return
        command = [sys.executable, "-m", "tests.faults.small_broker", "--profile", str(self.profile.path)]
        with self.profile.log(name).open("ab") as log:
            self.services[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@pytest.mark.timeout(60)
async def test_a_database_that_may_not_grow(short_folder: Path) -> None:
    """Though the file system says that there is space: the broker reads everything again, and does not end."""
    async with SmallServices(short_folder, workers=1, slots=PROCESSES) as services:
        work = Work(services, short_folder)
        await work.begin()
        broker = services.services["broker"]
        broker.send_signal(signal.SIGUSR1)
        with pytest.raises(StoreFullError):
            await launch_for_ever(services)
        await services.said("broker", "everything is read from it again")
        await services.said("worker-1", "waits and tries again", times=PROCESSES)
        assert (await command_line(services.profile.path, "list")).code == 0
        assert len(await services.controller.find(Query(states=("running",)))) >= PROCESSES

        broker.send_signal(signal.SIGUSR2)
        await work.end()
        assert broker.poll() is None, "it never ended"


@pytest.mark.timeout(60)
async def test_a_disk_that_refuses_ends_the_broker(short_folder: Path) -> None:
    """One sentence and exit code 1; what was confirmed is there, and the next broker goes on."""
    async with Services(short_folder, workers=1, slots=PROCESSES) as services:
        work = Work(services, short_folder)
        await work.begin()
        broker = services.services.pop("broker")
        wal = wal_bytes(services.profile.database)
        resource.prlimit(broker.pid, resource.RLIMIT_FSIZE, (wal, wal))
        assert await asyncio.to_thread(broker.wait, 20) == 1
        last = services.log("broker").splitlines()[-1]
        assert "CRITICAL" in last
        assert "the broker stops: disk I/O error; what was confirmed is safe, the rest will be said again" in last
        assert "Traceback" not in services.log("broker")
        services.start("broker")
        await work.end()
        assert not await services.controller.find(Query(unfinished=True))
