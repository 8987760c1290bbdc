"""What may be said of a step, and what a step may say: threads, timeouts, heartbeats, reports, its name and its key."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest

from prunus.errors import ProcessExceptedError, SpecError
from prunus.processes import (
    Continue,
    Line,
    Process,
    ProcessListener,
    ProcessState,
    Stop,
    WorkChain,
    execute,
    if_,
    step,
)
from tests.processes.bench import Bench, reloaded

A_LITTLE_S = 0.02
"""A timeout that is meant to run out."""
LONG_S = 60.0
"""One that is not."""


class Hears(ProcessListener):
    """Remembers the lines and the progress of a process."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.progress: list[tuple[float | None, str | None]] = []

    def on_report(self, process: Process, line: Line) -> None:
        self.lines.append(line)

    def on_progress(self, process: Process, progress: float | None, detail: str | None) -> None:
        self.progress.append((progress, detail))


# --- where it runs ----------------------------------------------------------------------------------


class Places(Process):
    """Says in which thread its steps run."""

    async def run(self) -> Continue:
        return Continue(self.as_the_class_says, threading.get_ident())

    def as_the_class_says(self, loop: int) -> Continue:
        return Continue(self.inline, loop, threading.get_ident())

    @step(thread=False)
    def inline(self, loop: int, first: int) -> Continue:
        return Continue(self.threaded, loop, first, threading.get_ident())

    @step(thread=True)
    def threaded(self, loop: int, first: int, second: int) -> tuple[bool, bool, bool]:
        return first == loop, second == loop, threading.get_ident() == loop


class PlacesOnTheLoop(Places):
    """The class says: on the loop."""

    run_sync_steps_in = "loop"


@pytest.mark.parametrize(("kind", "on_loop"), [(Places, (False, True, False)), (PlacesOnTheLoop, (True, True, False))])
async def test_a_step_says_better_than_its_class_where_it_runs(kind: type[Process], on_loop: tuple[bool, ...]) -> None:
    """``thread=`` goes before `run_sync_steps_in`; without it a plain ``def`` runs in a worker thread."""
    assert (await execute(kind)).value == on_loop


async def test_a_plain_step_may_return_a_coroutine() -> None:
    """It is awaited, on the loop."""

    class Hands(Process):
        def run(self) -> Any:
            return asyncio.sleep(0, "slept")

    assert (await execute(Hands)).value == "slept"


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError("mine"), StopIteration("over")])
@pytest.mark.parametrize("in_thread", [False, True])
async def test_whatever_a_step_raises_ends_that_process_only(error: BaseException, in_thread: bool) -> None:
    """Also what would end a thread, a task or an interpreter is a failure of the step."""

    class Raises(Process):
        async def run(self) -> Any:
            return Continue("threaded") if in_thread else self.throw()

        def threaded(self) -> None:
            self.throw()

        def throw(self) -> None:
            raise error

    process = await Bench().run(Raises())
    assert process.state is ProcessState.EXCEPTED
    failure = process.result().failure
    assert failure is not None
    assert failure.type in (type(error).__qualname__, f"asyncio.exceptions.{type(error).__qualname__}", "RuntimeError")


# --- timeouts and heartbeats ------------------------------------------------------------------------


async def test_a_step_that_takes_too_long_is_cancelled_and_has_failed() -> None:
    """It can clean up; the failure names the step and the seconds."""
    cleaned = []

    class Slow(Process):
        @step(timeout=A_LITTLE_S, name="long_one")
        async def run(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cleaned.append(True)

    with pytest.raises(ProcessExceptedError) as caught:
        await execute(Slow)
    assert cleaned == [True]
    assert str(caught.value).endswith("StepTimeoutError: the step long_one was cancelled: it did not end within 0.02 s")
    assert caught.value.failure.facts == {"step": "long_one", "timeout_s": A_LITTLE_S, "problem": "it did not end"}


async def test_a_step_that_swallows_its_timeout_has_failed_all_the_same() -> None:
    """What it returns then is dropped, and so is what it has emitted."""

    class Deaf(Process):
        @step(timeout=A_LITTLE_S)
        async def run(self) -> Any:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.set_status("swallowed it")
            return Stop("fine")

    process = await Bench().run(Deaf())
    assert (process.state, process.status) == (ProcessState.EXCEPTED, "swallowed it")


async def test_a_step_that_ends_in_time_is_not_disturbed() -> None:
    """Neither during the step nor afterwards: the next one may take its time."""

    class Quick(Process):
        @step(timeout=LONG_S, heartbeat_timeout=LONG_S)
        async def run(self) -> Continue:
            await asyncio.sleep(0)
            return Continue(self.then)

        async def then(self) -> str:
            await asyncio.sleep(0)
            return "done"

    assert (await execute(Quick)).value == "done"


async def test_a_silent_step_is_noticed() -> None:
    """Without a heartbeat for so long it has failed."""

    class Silent(Process):
        @step(heartbeat_timeout=A_LITTLE_S, timeout=LONG_S, name="quiet_one")
        async def run(self) -> None:
            await asyncio.Event().wait()

    with pytest.raises(
        ProcessExceptedError, match=r"the step quiet_one was cancelled: it gave no heartbeat within 0.02 s"
    ):
        await execute(Silent)


async def test_a_step_that_gives_heartbeats_may_take_longer_than_their_timeout() -> None:
    """Each one starts the time anew; the timeout of the whole step counts all the same."""

    class Alive(Process):
        @step(heartbeat_timeout=0.5, timeout=LONG_S)
        async def run(self) -> str:
            loop = asyncio.get_running_loop()
            end_s = loop.time() + 0.7
            while loop.time() < end_s:
                self.heartbeat()
                await asyncio.sleep(0.01)
            return "alive"

    assert (await execute(Alive)).value == "alive"


async def test_a_hanging_thread_is_given_up_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A thread can't be stopped; the process goes on without it, and what it returns or writes is dropped."""
    gate, ended = threading.Event(), threading.Event()

    class Hangs(Process):
        @step(timeout=A_LITTLE_S)
        def run(self) -> str:
            gate.wait(10)
            self.set_status("still here")
            ended.set()
            return "late"

    process = await Bench().run(Hangs())
    assert process.state is ProcessState.EXCEPTED
    gate.set()
    assert await asyncio.to_thread(ended.wait, 10)
    assert process.status is None
    assert process.result().value is None
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "a plain step can't be interrupted: it goes on in its thread, and what it returns is dropped"
    ]


async def test_heartbeats_say_how_far_it_is() -> None:
    """From coroutines and threads; the process shows it until the step ends, and a repeated one says nothing new."""
    heard = Hears()

    class Counts(Process):
        async def run(self) -> Any:
            self.heartbeat(progress=0.25, detail="a quarter")
            self.heartbeat(progress=0.25, detail="a quarter")
            self.heartbeat()
            assert (self.progress, self.detail) == (0.25, "a quarter")
            return Continue(self.threaded)

        def threaded(self) -> None:
            assert (self.progress, self.detail) == (None, None)
            self.heartbeat(0.5)

    process = Counts()
    process.add_listener(heard)
    process.heartbeat(0.1)
    await process.execute()
    assert heard.progress == [(0.25, "a quarter"), (0.5, None)]
    assert (process.progress, process.detail) == (None, None)


# --- what it says -----------------------------------------------------------------------------------


class Speaks(WorkChain):
    """Reports from all kinds of places."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.outline(if_(cls.asked)(cls.on_loop, cls.in_thread))

    def asked(self) -> bool:
        self.report("asked")
        return True

    async def on_loop(self) -> None:
        self.report("100 % on the loop")
        await asyncio.create_task(self.beside())
        self.logger.info("%s and %s", "this", "that")
        self.logger.debug("not for people")

    async def beside(self) -> None:
        self.report("in a task")

    @step(name="threaded")
    def in_thread(self) -> None:
        self.report("in a thread")
        self.logger.warning("be careful")


async def test_reports_and_logs_are_lines_of_the_process(caplog: pytest.LogCaptureFixture) -> None:
    """In their order, with the step that said them; what goes to the logger goes to its module's logger as well."""
    bench = Bench()
    with caplog.at_level(logging.DEBUG, logger=__name__):
        await bench.run(Speaks(pid="p"))
    assert [(line.level, line.text, line.step) for line in bench.lines] == [
        ("REPORT", "asked", "asked"),
        ("REPORT", "100 % on the loop", "on_loop"),
        ("REPORT", "in a task", "on_loop"),
        ("INFO", "this and that", "on_loop"),
        ("REPORT", "in a thread", "threaded"),
        ("WARNING", "be careful", "threaded"),
    ]
    assert [line.source for line in bench.lines] == [None] * 6
    records = [record for record in caplog.records if record.name == __name__]
    assert [record.message for record in records] == ["this and that", "not for people", "be careful"]
    assert {vars(record)["pid"] for record in records} == {"p"}


async def test_a_log_call_never_breaks_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging formats as `logging` does: a mapping by its names, and a wrong format disturbs nobody."""
    monkeypatch.setattr(logging.getLogger(__name__), "propagate", False)
    monkeypatch.setattr(logging, "raiseExceptions", False)

    class Logs(Process):
        async def run(self) -> str:
            self.logger.info("%(name)s: %(count)d", {"name": "atoms", "count": 3})
            self.logger.info("%d atoms", "three")
            return "done"

    bench = Bench()
    process = await bench.run(Logs())
    assert process.result().value == "done"
    assert bench.lines[0].text == "atoms: 3"
    assert "three" in bench.lines[1].text


async def test_the_error_of_a_step_is_a_line_too() -> None:
    """With its traceback."""

    class Fails(Process):
        async def run(self) -> None:
            raise ValueError("no such element")

    bench = Bench()
    await bench.run(Fails())
    (line,) = bench.lines
    assert (line.level, line.step) == ("ERROR", "run")
    assert line.text.startswith("Traceback")
    assert line.text.endswith("ValueError: no such element\n")


async def test_the_oldest_lines_are_lost_when_nobody_takes_them() -> None:
    """There is a bound on what waits for the driver."""

    class Chatters(Process):
        @step(thread=False)
        def run(self) -> None:
            for number in range(10_005):
                self.report(str(number))

    process = Chatters()
    await process.step()
    await process.step()
    lines = process.take_lines()
    assert (len(lines), lines[0].text, lines[-1].text) == (10_000, "5", "10004")
    assert process.take_lines() == ()


async def test_the_status_is_kept_with_the_process() -> None:
    """It survives a restart, and is None again when it is set to that."""

    class Says(Process):
        async def run(self) -> Continue:
            self.set_status("half of it")
            return Continue(self.then)

        async def then(self) -> None:
            assert self.status == "half of it"
            self.set_status(None)

    process = Says()
    await process.step()
    await process.step()
    process = reloaded(process)
    assert process.status == "half of it"
    assert (await Bench().run(process)).status is None


# --- which one it is --------------------------------------------------------------------------------


async def test_the_code_of_a_step_can_ask_where_it_is() -> None:
    """`Process.current` and `Process.current_step`, in coroutines, tasks and threads; outside there is none."""
    found: list[tuple[bool, str | None]] = []

    class Asks(Process):
        async def run(self) -> Continue:
            look(self)
            await asyncio.create_task(asyncio.to_thread(look, self))
            return Continue(self.again)

        @step(name="second")
        def again(self) -> None:
            look(self)

    def look(process: Process) -> None:
        found.append((Process.current() is process, Process.current_step()))

    await execute(Asks)
    assert found == [(True, "run"), (True, "run"), (True, "second")]
    assert (Process.current(), Process.current_step()) == (None, None)


async def test_the_key_is_the_same_for_each_attempt_of_a_step_and_another_for_each_other_step() -> None:
    """Also for a step that comes again, and whether or not the process was reloaded in between."""

    class Keys(Process):
        async def run(self, *keys: str) -> Any:
            mine = (*keys, self.idempotency_key)
            return mine if len(mine) == 4 else Continue(self.run, *mine)

    keys = [(await Bench(crashes=crashes).run(Keys(pid="p"))).result().value for crashes in (False, True)]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 4
    process = Keys(pid="p")
    await process.step()
    assert (process.idempotency_key, reloaded(process).idempotency_key) == (keys[0][0], keys[0][0])


async def test_a_step_stands_in_checkpoints_and_changes_under_its_stable_name() -> None:
    """In both kinds of processes; it can be named by its method, by that name and by its method's name."""

    class Named(Process):
        @step(name="first")
        async def run(self) -> Continue:
            return Continue(self.second_method)

        @step(name="second")
        async def second_method(self, how: int = 0) -> Any:
            return [Continue("second", 1), Continue("second_method", 2), Stop("ends")][how]

    bench = Bench(crashes=True)
    process = await bench.run(Named())
    assert process.result().value == "ends"
    assert [change.step for change in bench.history] == [None, "first", "second", "second", "second"]

    class Chain(WorkChain):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.outline(cls.method)

        @step(name="stable")
        async def method(self) -> None: ...

    chain = Chain()
    assert (chain.next_step, chain.snapshot()["place"]) == ("stable", "stable")
    assert list(Chain.steps()) == ["stable"]
    assert Chain.steps()["stable"].method == "method"


def test_the_steps_of_a_base_are_inherited() -> None:
    """With what is said of them; an override says it anew."""

    class Base(Process):
        @step(timeout=1)
        async def run(self) -> None: ...

        @step(timeout=2)
        async def other(self) -> None: ...

    class Sub(Base):
        async def run(self) -> None: ...

    assert {name: options.timeout_s for name, options in Base.steps().items()} == {"run": 1, "other": 2}
    assert {name: options.timeout_s for name, options in Sub.steps().items()} == {"other": 2}


def _two_of_one_name() -> None:
    class Twice(Process):
        async def run(self) -> None: ...

        @step(name="same")
        async def one(self) -> None: ...

        @step(name="same")
        async def two(self) -> None: ...


def _two_of_one_old_name() -> None:
    class Twice(Process):
        async def run(self) -> None: ...

        @step(renamed_from="old")
        async def one(self) -> None: ...

        @step(renamed_from=("older", "old"))
        async def two(self) -> None: ...


def _old_name_in_use() -> None:
    class Twice(Process):
        async def run(self) -> None: ...

        @step(renamed_from="two")
        async def one(self) -> None: ...

        @step
        async def two(self) -> None: ...


def _no_reconcile() -> None:
    class Lost(Process):
        @step(effect="once", reconcile="look")
        async def run(self) -> None: ...


async def _body(self: Any) -> None: ...


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (_two_of_one_name, r"Twice: the steps one and two have the same name 'same'"),
        (_two_of_one_old_name, r"Twice: two steps claim the old name 'old'"),
        (_old_name_in_use, r"Twice: two steps claim the old name 'two'"),
        (_no_reconcile, r"Lost has no method 'look' to reconcile run"),
        (lambda: step(timeout=0)(_body), r"the step _body: timeout is a number of seconds above 0, not 0"),
        (lambda: step(heartbeat_timeout=-1)(_body), r"the step _body: heartbeat_timeout is a number .* not -1"),
        (lambda: step(retry=3)(_body), r"the step _body: retry is a RetryPolicy, not 3"),  # type: ignore[call-overload]
        (lambda: step(effect="twice")(_body), r"effect is 'repeatable' or 'once', not 'twice'"),  # type: ignore[call-overload]
        (lambda: step(reconcile="look")(_body), r"the step _body: reconcile is for effect='once'"),
        (lambda: step(name="not a name")(_body), r"the step _body: 'not a name' can't be the name of a step"),
        (lambda: step(renamed_from="a-b")(_body), r"the step _body: 'a-b' can't be the name of a step"),
        (lambda: step(lambda self: None), r"@step marks a method of a process class, not <function"),
        (lambda: step(5), r"@step marks a method of a process class, not 5"),  # type: ignore[call-overload]
    ],
)
def test_options_that_make_no_sense_are_refused_where_they_are_written(wrong: Callable[[], Any], text: str) -> None:
    """At the import of the module, with the class, the step and what was expected."""
    with pytest.raises(SpecError, match=text):
        wrong()
