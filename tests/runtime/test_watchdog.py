"""The watchdog: what it says of a loop that does not turn, and that a worker's claims outlive a block, to a bound."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prunus import Process, ProcessListener
from prunus.runtime.watchdog import Watchdog
from tests.guarantees.real_daemon import RealDaemon
from tests.runtime import blocking
from tests.runtime.waiting import file_has

LIMIT_S = 0.1
PATIENCE_S = 20.0


class Noticed(logging.Handler):
    """Lets a block go on until the watchdog has said so."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []
        self.warned, self.over = threading.Event(), threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        (self.over if "turns again" in record.getMessage() else self.warned).set()

    @property
    def texts(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@contextmanager
def noticed() -> Iterator[Noticed]:
    handler, logger = Noticed(), logging.getLogger("prunus.runtime.watchdog")
    logger.addHandler(handler)
    try:
        with Watchdog(LIMIT_S):
            yield handler
    finally:
        logger.removeHandler(handler)


def wait_here(handler: Noticed) -> None:
    assert handler.warned.wait(PATIENCE_S)


class Lines(ProcessListener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_report(self, process: Process, line: object) -> None:
        self.texts.append(getattr(line, "text", ""))


async def said_of(process: Process, handler: Noticed) -> list[str]:
    """Run the process, and let the watchdog finish; what went into its log."""
    lines = Lines()
    process.add_listener(lines)
    await process.execute()
    assert await asyncio.to_thread(handler.over.wait, PATIENCE_S)
    return lines.texts


async def test_a_step_that_blocks_is_named_with_its_stack() -> None:
    """Once with process, step and the line where it is, once with the whole time; both in the log of the process."""
    with noticed() as handler:

        class Greedy(Process):
            async def run(self) -> None:
                self.dig()

            def dig(self) -> None:
                wait_here(handler)

        process = Greedy()
        own = await said_of(process, handler)
    warning, end = handler.texts
    assert f"the step 'run' of process {process.pid}" in warning
    assert "in dig" in warning
    assert "asyncio/base_events" not in warning
    assert "stood still for" in end
    assert [record.__dict__["pid"] for record in handler.records] == [process.pid] * 2
    assert [text.partition(" the loop of its worker for ")[0] for text in own] == ["blocks", "blocked"]


async def test_a_plain_step_on_the_loop_is_named_too() -> None:
    """`run_sync_steps_in = "loop"` asks for it."""
    with noticed() as handler:

        class Inline(Process):
            run_sync_steps_in = "loop"

            def run(self) -> None:
                wait_here(handler)

        process = Inline()
        await said_of(process, handler)
    assert f"the step 'run' of process {process.pid}" in handler.texts[0]


async def test_a_process_within_a_process_is_the_one_that_is_named() -> None:
    """The innermost step has the loop."""
    with noticed() as handler:

        class Inner(Process):
            async def run(self) -> None:
                wait_here(handler)

        class Outer(Process):
            async def run(self) -> None:
                await self.call(Inner)

        process = Outer()
        await process.execute()
    assert "Inner.run" in handler.texts[0] or "in run" in handler.texts[0]
    assert process.pid not in handler.texts[0]


async def test_what_is_no_step_is_shown_by_its_stack() -> None:
    """A callback of the loop, say."""
    with noticed() as handler:
        wait_here(handler)
        assert await asyncio.to_thread(handler.over.wait, PATIENCE_S)
    assert "no step of a process" in handler.texts[0]
    assert "in wait_here" in handler.texts[0]


async def test_a_loop_that_turns_is_left_in_peace() -> None:
    """A plain step that takes long runs in its thread; the watchdog goes on asking meanwhile."""
    with noticed() as handler, Watchdog(PATIENCE_S) as patient:
        answered = threading.Event()

        def look() -> None:
            while patient.silent_s() > 0.2:
                pass
            answered.set()

        await asyncio.to_thread(look)
        assert answered.is_set()
    assert handler.texts == [] or "no step" in handler.texts[0]


class Clumsy(logging.Handler):
    """A handler that fails at the first report, as what reads a stack may."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.failed, self.went_on = threading.Event(), threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self.failed.is_set():
            self.went_on.set()
            return
        self.failed.set()
        raise RuntimeError("no stack today")


async def test_a_report_that_fails_does_not_end_the_watch() -> None:
    """Else nobody would see any more that the loop turns, and the worker would lose its lease for it."""
    clumsy, logger = Clumsy(), logging.getLogger("prunus.runtime.watchdog")
    logger.addHandler(clumsy)
    try:
        with Watchdog(LIMIT_S) as watchdog:
            assert clumsy.failed.wait(PATIENCE_S)
            assert clumsy.went_on.wait(PATIENCE_S)
            silent_s = watchdog.silent_s()
            async with asyncio.timeout(PATIENCE_S):
                while watchdog.silent_s() >= silent_s:
                    await asyncio.sleep(0.01)
    finally:
        logger.removeHandler(clumsy)


async def test_leaving_does_not_wait_for_an_answer() -> None:
    """It is left in the loop that it waits for."""
    with Watchdog(PATIENCE_S):
        pass


class LateClear(threading.Event):
    """Is cleared only after it was set."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()

    def clear(self) -> None:
        self.begun.set()
        self.wait(PATIENCE_S)
        super().clear()


async def test_leaving_while_the_next_question_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The word that it is over comes between two steps of the thread: a worker hung here at its end, seldom."""
    watchdog, late = Watchdog(LIMIT_S), LateClear()
    monkeypatch.setattr(watchdog, "_answered", late)
    with watchdog:
        assert late.begun.wait(PATIENCE_S)


@pytest.mark.timeout(120)
async def test_a_block_keeps_the_claim(tmp_path: Path) -> None:
    """The broker goes on hearing from a worker whose loop stands still, and its log names the step."""
    begun, go = tmp_path / "begun", tmp_path / "go"
    async with RealDaemon(tmp_path, workers=1) as daemon:
        handle = await daemon.controller.launch(blocking.Blocks, {"begun": str(begun), "go": str(go)})
        await file_has(begun, 1)
        communicator = daemon.controller._backend.communicator
        heard, before = 0, 0.0
        while heard < 2:
            sessions = (await communicator.statistics()).sessions
            silent_s = next(one.silent_s for name, one in sessions.items() if name.startswith("worker-1"))
            heard, before = heard + (silent_s < before), silent_s
            await asyncio.sleep(0.05)
        go.touch()
        await handle.result()
        history = [event.subject for event in await handle.history()]
        logs = [line.text for line in await handle.log()]
    assert history.count("claimed") == 1
    assert any(text.startswith("blocks the loop of its worker") for text in logs)
    assert "the step 'run' of process" in daemon.profile.log("worker-1").read_text()


class ShortLease(RealDaemon):
    """Its broker and its first worker are impatient."""

    def start(self, name: str, *more: str) -> None:
        options = {"broker": ("--lease", "3"), "worker-1": ("--max-block", "0.5")}
        super().start(name, *options.get(name, ()), *more)


@pytest.mark.timeout(120)
async def test_a_worker_that_blocks_for_too_long_loses_its_processes(tmp_path: Path) -> None:
    """Another one runs the step; what the first one makes of it then counts for nothing, and it goes on working."""
    begun, go = tmp_path / "begun", tmp_path / "go"
    async with ShortLease(tmp_path, workers=1, slots=1) as daemon:
        handle = await daemon.controller.launch(blocking.Blocks, {"begun": str(begun), "go": str(go), "only": 1})
        await file_has(begun, 1)
        daemon.start("worker-2")
        assert (await handle.result()).outputs.attempt == 2
        daemon.kill("worker-2")
        go.touch()
        again = await daemon.controller.launch(blocking.Blocks, {"begun": str(tmp_path / "again"), "go": str(go)})
        assert (await again.result()).outputs.attempt == 1
        assert (await handle.result()).outputs.attempt == 2
    assert "its lease ends" in daemon.profile.log("worker-1").read_text()
