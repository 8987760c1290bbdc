"""G6: the caller chooses the pid; a launch that is said again continues what is there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunus.processes.pids import new_pid
from prunus.testing.local_daemon import LocalDaemon
from tests.guarantees.real_daemon import RealDaemon
from tests.runtime import workflows


async def test_ten_launches_of_one_pid_are_one_process() -> None:
    """All get the handle of the same process, which ran once."""
    async with LocalDaemon(workers=2) as daemon:
        pid = new_pid()
        launches = (daemon.controller.launch(workflows.Add, {"a": number}, pid=pid) for number in range(10))
        handles = await asyncio.gather(*launches)
        results = await asyncio.gather(*(handle.result() for handle in handles))
        assert len({result.outputs.sum for result in results}) == 1
        assert len(await daemon.controller.find()) == 1
        history = await handles[0].history()
    assert [event.subject for event in history].count("running.finished") == 1


async def test_a_launch_of_what_has_ended_changes_nothing() -> None:
    """The row and the history stay as they were, to the letter."""
    async with LocalDaemon() as daemon:
        handle = await daemon.controller.launch(workflows.Add, {"a": 1}, pid="mine")
        await handle.result()
        before = await handle.record(), await handle.history()
        again = await daemon.controller.launch(workflows.Add, {"a": 2}, pid="mine")
        assert (await again.record(), await again.history()) == before


async def test_a_letter_that_is_said_again_is_one_letter() -> None:
    """The broker dies after the commit and before its answer: it knows the request when it comes again."""
    async with LocalDaemon(workers=0) as daemon:
        handle = await daemon.controller.launch(workflows.Ask)
        with dying_once(daemon, "after_commit"):
            await daemon.controller._backend.persister.post(handle.pid, b"letter")
        assert (await handle.record()).inbox_last == 1


@pytest.mark.parametrize("turns", range(8))
async def test_a_launch_that_a_restarting_broker_swallows_is_said_again(turns: int) -> None:
    """At any moment on its way: the caller gets one answer, and there is one process that ran once."""
    async with LocalDaemon() as daemon:
        launching = asyncio.create_task(daemon.controller.launch(workflows.Add, {"a": 1}, pid="mine"))
        for _ in range(turns):
            await asyncio.sleep(0)
        daemon.broker.restart()
        handle = await launching
        assert (await handle.result()).outputs.sum == 2
        assert [row.pid for row in await daemon.controller.find()] == ["mine"]
        assert [event.subject for event in await handle.history()].count("running.finished") == 1


@pytest.mark.parametrize("moment", ["before_commit", "after_commit"])
async def test_a_broker_that_dies_with_the_answer_on_its_lips(moment: str) -> None:
    """Before the commit nothing was launched, after it everything was: said again, it is one process in both cases."""
    async with LocalDaemon() as daemon:
        with dying_once(daemon, moment):
            handle = await daemon.controller.launch(workflows.Add, {"a": 1}, pid="mine")
        assert (await handle.result()).outputs.sum == 2
        assert [row.pid for row in await daemon.controller.find()] == ["mine"]
        assert [event.subject for event in await handle.history()].count("running.finished") == 1


@pytest.mark.timeout(60)
async def test_a_launch_that_a_killed_broker_swallows_is_said_again(short_folder: Path) -> None:
    """A real broker gets SIGKILL with launches on their way; each is accepted once, and runs once."""
    journal = short_folder / "journal"
    async with RealDaemon(short_folder, workers=1) as daemon:
        launch = daemon.controller.launch
        inputs = {"file": str(journal), "steps": 1}
        for number in range(3):
            launching = [
                asyncio.create_task(launch(workflows.Journal, inputs, pid=f"{number}-{one}")) for one in range(10)
            ]
            await asyncio.sleep(0)
            daemon.kill("broker")
            daemon.start("broker")
            for handle in await asyncio.gather(*launching):
                assert (await handle.result()).outputs.written == 1, daemon.logs()
        assert len(await daemon.controller.find()) == 30
    assert sorted(journal.read_text().split()) == sorted(f"{n}-{one}:2" for n in range(3) for one in range(10))


@contextlib.contextmanager
def dying_once(daemon: LocalDaemon, moment: str) -> Iterator[None]:
    """The broker dies at the next failpoint `moment`, and starts again."""
    deaths = 0

    def die(failpoint: str) -> None:
        if failpoint == moment and not deaths:
            raise ConnectionAbortedError

    def restart(*_: object) -> None:
        nonlocal deaths
        deaths += 1
        daemon.broker.restart()

    daemon.broker.exchange.failpoint = die
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(restart)
    yield
    loop.set_exception_handler(None)
    assert deaths == 1


async def test_pids_are_in_the_order_of_their_making() -> None:
    """A pid is a UUIDv7: sorting by it sorts by time."""
    pids = [new_pid() for _ in range(1000)]
    assert pids == sorted(pids)
    assert len(set(pids)) == 1000
