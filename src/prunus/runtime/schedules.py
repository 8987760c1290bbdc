"""A schedule is a process: it waits for its next fire time, submits the scheduled process, and waits again.

So it has what every process has, and nothing else was needed for it: it is durable, and parked between two runs
(it costs a row); `pause` stops it and `play` lets it go on; its history says what it did; `kill` removes it; when it
fires next is the time for which it is parked. ::

    from prunus.runtime.schedules import Schedule

    nightly = Schedule.cron("0 2 * * *", Backup, {"folder": "/data"}, timezone="Europe/Zurich")
    await controller.launch(Schedule, nightly, pid="schedule-backup")

Rules:

* The pid of a run is made of the pid of the schedule and the fire time (``schedule-backup@2026-11-21T01:00Z``). When a
  worker dies at the moment of firing, another one does it again: the same pid is the same run (G6).
* The runs are children that it abandons: when a schedule is killed, a run of it goes on to its end.
* Which fire times are due, which were missed and whose turn it is are pure questions (`prunus.runtime.timetable`).
* What it remembers does not grow: the last fire time, a few counts, the run that is there, and those that wait for
  their turn (`MAX_CATCH_UP` at most). It waits for the end of a run only if another one waits for that.
* What can't be launched (the class is gone, its inputs do not fit any more) pauses the schedule, with the reason.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, Literal
from zoneinfo import ZoneInfo

from prunus.errors import (
    CheckpointCorruptError,
    CheckpointNotFoundError,
    InvalidStateError,
    MessagingError,
    ProcessClassNotFoundError,
)
from prunus.processes import Process, ProcessResult, ProcessSpec, RetryPolicy, Stop, Wait, WorkChain, step, update
from prunus.processes.control import Kill
from prunus.processes.loading import class_id, load_class
from prunus.processes.options import OnException, read_priority, read_queue, read_resources, read_tags
from prunus.processes.waits import Condition, OnChild, OnTime
from prunus.runtime.timetable import (
    CATCH_UPS,
    DEFAULT_LATE_S,
    MAX_CATCH_UP,
    MAX_JITTER_S,
    OVERLAPS,
    Interval,
    Timetable,
    due,
    local_zone_name,
    read_moment,
    read_rhythm,
    read_zone,
    stamp,
    take_turn,
)

BROKER_IS_AWAY = RetryPolicy(max_attempts=1000, max_interval_s=60.0, retry_on=MessagingError)
"""For the step that asks whether a run has ended: about 16 hours."""

ScheduleInputs = dict[str, Any]
"""The inputs of a `Schedule`: what `Schedule.cron` and `Schedule.every` make."""


class Schedule(WorkChain):
    """Launches a process again and again; see the module, and ``docs/schedules.md``."""

    on_exception: ClassVar[OnException] = "pause"

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("when", valid_type=str, help="a cron expression (0 2 * * *), or an interval (every 15min)")
        spec.input("timezone", valid_type=str, default=local_zone_name, validator=_says(read_zone), help="in whose time; the name of a time zone")  # fmt: skip  # noqa: E501
        spec.input("anchor", valid_type=str | None, default=None, help="a fire time of the interval, the first one; else it counts from the moment of its launch")  # fmt: skip  # noqa: E501
        spec.input("process_class", valid_type=str, validator=_is_class_id, help="package.module:Class")
        spec.input("inputs", valid_type=dict, default=dict, help="of each run")
        spec.input("tags", valid_type=list[str], default=list, validator=_says(read_tags), help="of each run")
        spec.input("queue", valid_type=str | None, default=None, validator=_says(read_queue), help="of each run, if not as its class says")  # fmt: skip  # noqa: E501
        spec.input("priority", valid_type=int | None, default=None, validator=_says(read_priority), help="of each run, if not as its class says")  # fmt: skip  # noqa: E501
        spec.input("resources", valid_type=dict | None, default=None, validator=_says(read_resources), help="of each run, if not as its class says")  # fmt: skip  # noqa: E501
        spec.input("jitter_s", valid_type=(float, int), default=0.0, validator=_is_jitter, help="a run begins up to so many seconds after its fire time")  # fmt: skip  # noqa: E501
        spec.input("late_s", valid_type=(float, int), default=DEFAULT_LATE_S, validator=_is_not_negative, help="a run that begins up to so many seconds late is not missed")  # fmt: skip  # noqa: E501
        spec.input("catch_up", valid_type=Literal[CATCH_UPS], default="skip", help="what becomes of missed runs")
        spec.input("overlap", valid_type=Literal[OVERLAPS], default="skip", help="what becomes of a run while the one before it has not ended")  # fmt: skip  # noqa: E501
        spec.input("until", valid_type=str | None, default=None, help="no fire time is after this moment")
        spec.input("max_runs", valid_type=int | None, default=None, validator=_is_positive, help="it ends after so many runs")  # fmt: skip  # noqa: E501
        spec.input("name", valid_type=str | None, default=None, help="what people call it")
        spec.inputs.validator = _find_fault
        spec.output("runs", valid_type=int, help="how many it has launched")
        spec.output("missed", valid_type=int, help="how many were missed")
        spec.output("skipped", valid_type=int, help="how many were left out because another one was in their way")
        spec.outline(cls.begin)

    # --- how to write one ---------------------------------------------------------------------------

    @classmethod
    def cron(
        cls,
        expression: str,
        process_class: type[Process[Any, Any]] | str,
        inputs: Any = None,
        *,
        timezone: str | None = None,
        **options: Any,
    ) -> ScheduleInputs:
        """The inputs of a schedule that follows a cron expression in a time zone (that of this computer, else).

        `inputs` are those of each run: a mapping or the class's ``Inputs``. `options` are the other inputs of
        `Schedule`: ``tags``, ``queue``, ``priority``, ``resources``, ``jitter_s``, ``late_s``, ``catch_up``,
        ``overlap``, ``until``, ``max_runs``, ``name``. Raises `InvalidInputError` for what the class does not take,
        `ProcessClassNotFoundError` for a class that workers could not find.
        """
        if timezone is not None:
            options["timezone"] = timezone
        return cls._write(expression, process_class, inputs, options)

    @classmethod
    def every(
        cls,
        interval: str,
        process_class: type[Process[Any, Any]] | str,
        inputs: Any = None,
        *,
        anchor: datetime | str | None = None,
        **options: Any,
    ) -> ScheduleInputs:
        """The inputs of a schedule that fires every ``90s``, ``15min``, ``6h`` or ``1d``; see `cron`.

        The first fire time is the `anchor`, or one interval after the launch.
        """
        if anchor is not None:
            options["anchor"] = anchor
        return cls._write(f"every {interval}", process_class, inputs, options)

    @classmethod
    def _write(
        cls, when: str, process_class: type[Process[Any, Any]] | str, inputs: Any, options: Mapping[str, Any]
    ) -> ScheduleInputs:
        if isinstance(process_class, str):
            process_class = load_class(process_class)
        identifier = class_id(process_class)
        if load_class(identifier) is not process_class:
            raise ProcessClassNotFoundError(identifier, "another class goes by this name; rename one of them")
        run = process_class(inputs)  # wrong inputs are told here, and not in the night
        texts = {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in options.items()
            if value is not None
        }
        given: ScheduleInputs = {"when": when, "process_class": identifier, "inputs": _given(run, inputs), **texts}
        cls(given)
        return given

    # --- its steps ----------------------------------------------------------------------------------

    async def begin(self) -> Any:
        """From now on."""
        ctx = self.ctx
        ctx.decided_s = int(self.created_at)
        ctx.runs = ctx.missed = ctx.skipped = 0
        ctx.running = ctx.wake_s = None
        ctx.queued = []
        return self._rest(timetable_of(self.pid, self.created_at, self.inputs))

    @step(retry=BROKER_IS_AWAY)
    async def look(self, at: None = None, ended: ProcessResult[Any] | None = None) -> Any:
        """It is time, or the run that was in the way has ended."""
        ctx = self.ctx
        timetable = timetable_of(self.pid, self.created_at, self.inputs)
        # If the clock of the broker, which says that it is time, is ahead of this one, then that one counts.
        now_s = time.time() if ended is not None or ctx.wake_s is None else max(time.time(), ctx.wake_s)
        found = due(timetable, ctx.decided_s, now_s)
        is_busy = ctx.running is not None and not await self._has_ended(ctx.running)
        overlap = self.inputs.overlap
        turn = take_turn(overlap, is_busy, ctx.queued, found.launch, self._room())
        launch = turn.launch if self.inputs.max_runs is None else turn.launch[: self.inputs.max_runs - ctx.runs]
        if launch:
            await self._launch(launch)
        if turn.replaces:
            self._want("tells", (Kill("the next run of its schedule takes its place"), ("abandon",)))
            self.report(f"kills {ctx.running}: the next run takes its place")
        if found.missed:
            self.report(f"{found.missed} missed, up to {stamp(found.decided_s)}")
        if turn.skipped:
            self.report(f"{turn.skipped} skipped, for another run has not ended")
        if not is_busy:
            ctx.running = None
        if launch and overlap != "allow":
            ctx.running = self._pid_of(launch[-1])
        ctx.runs += len(launch)
        ctx.missed += found.missed
        ctx.skipped += turn.skipped
        ctx.queued = list(turn.queued)
        ctx.decided_s = found.decided_s
        return self._rest(timetable)

    def _rest(self, timetable: Timetable) -> Wait | Stop:
        """Until it fires next, or the run ends for which another one waits; or its end."""
        ctx, on = self.ctx, dict[str, Condition]()
        is_over = self.inputs.max_runs is not None and ctx.runs >= self.inputs.max_runs
        next_s = None if is_over else timetable.next_after(ctx.decided_s)
        ctx.wake_s = None if next_s is None else timetable.begin_s(next_s)
        if ctx.wake_s is not None:
            on["at"] = OnTime(ctx.wake_s)
        if ctx.queued and not is_over:
            on["ended"] = OnChild(ctx.running)
        if not on:
            self.out_many({name: ctx[name] for name in ("runs", "missed", "skipped")})
            return Stop()
        zone = read_zone(self.inputs.timezone)
        message = "its last run waits" if ctx.wake_s is None else f"next run {moment_text(ctx.wake_s, zone)}"
        return Wait.any(**on, then=self.look, msg=message)

    async def _launch(self, fires: Sequence[int]) -> None:
        # A scientific library takes seconds to import; meanwhile the others of this worker go on.
        assert self.driver is not None, "somebody drives it"
        process_class = await asyncio.to_thread(self.driver.load_class, self.inputs.process_class)
        for fire_s in fires:
            self._submit(process_class, self._pid_of(fire_s))

    def _submit(self, process_class: type[Process[Any, Any]], pid: str) -> None:
        given = self.inputs
        options = {name: given[name] for name in ("queue", "priority", "resources") if given[name] is not None}
        self.submit(
            process_class, dict(given.inputs), pid=pid, tags=list(given.tags), parent_close="abandon", **options
        )
        self.report(f"launched {pid}")

    def _pid_of(self, fire_s: int) -> str:
        return f"{self.pid}@{stamp(fire_s)}"

    def _room(self) -> int:
        return MAX_CATCH_UP if self.inputs.catch_up == "all" else 1

    async def _has_ended(self, pid: str) -> bool:
        assert self.driver is not None, "somebody drives it"
        try:
            await self.driver.results([pid])
        except InvalidStateError:
            return False
        except (CheckpointNotFoundError, CheckpointCorruptError, ProcessClassNotFoundError):
            return True  # it was forgotten, as only those are that have ended; or its result can't be read here
        return True

    # --- what can be asked of it --------------------------------------------------------------------

    @update
    def run_now(self) -> str:
        """Launch a run at once, beside those of the timetable and whatever else runs; answers its pid."""
        pid = f"{self.pid}@now-{stamp(int(time.time()))}"
        assert self.driver is not None, "somebody drives it"
        self._submit(self.driver.load_class(self.inputs.process_class), pid)
        return pid


def timetable_of(pid: str, created_at: float, inputs: Mapping[str, Any]) -> Timetable:
    """When a schedule fires, from its pid, the moment of its creation and its inputs."""
    zone = read_zone(inputs["timezone"])
    anchor = inputs["anchor"]
    anchor_s = int(created_at) if anchor is None else int(read_moment(anchor, zone))
    until = inputs["until"]
    return Timetable(
        read_rhythm(inputs["when"], zone, anchor_s),
        seed=pid,
        jitter_s=float(inputs["jitter_s"]),
        late_s=float(inputs["late_s"]),
        catch_up=inputs["catch_up"],
        until_s=None if until is None else read_moment(until, zone),
    )


def moment_text(at_s: float, zone: ZoneInfo) -> str:
    """A moment in a time zone, for people: ``2026-11-22 02:00 CET``, with seconds only if there are some."""
    moment = datetime.fromtimestamp(int(at_s), zone)
    return f"{moment:%Y-%m-%d %H:%M}{f':{moment:%S}' if moment.second else ''} {moment:%Z}"


# --- what its inputs must be --------------------------------------------------------------------------


def _says(read: Callable[[Any], object]) -> Callable[[Any], str | None]:
    """A validator that lets `read` judge."""

    def judge(value: Any) -> str | None:
        if value is not None:
            read(value)  # its `ValueError` is the answer
        return None

    return judge


def _is_class_id(identifier: str) -> str | None:
    module, _, name = identifier.partition(":")
    return None if module and name else f"write it as package.module:Class, not {identifier!r}"


def _is_jitter(jitter_s: float) -> str | None:
    return None if 0 <= jitter_s <= MAX_JITTER_S else f"a jitter is 0 to {MAX_JITTER_S:.0f} seconds, not {jitter_s:g}"


def _is_not_negative(seconds: float) -> str | None:
    return None if seconds >= 0 else f"it is 0 seconds or more, not {seconds:g}"


def _is_positive(number: int | None) -> str | None:
    return None if number is None or number >= 1 else f"it is 1 or more, not {number}"


def _find_fault(inputs: Mapping[str, Any]) -> str | None:
    """What of the inputs does not go together (each of them alone is right)."""
    timetable = timetable_of("", 0.0, inputs)  # raises for a wrong expression, anchor or end
    rhythm = timetable.rhythm
    if timetable.next_after(time.time()) is None:
        return f"when: after now, {inputs['when']!r} never comes" + (
            f" until {inputs['until']}" if inputs["until"] else ""
        )
    if not isinstance(rhythm, Interval):
        return (
            None if inputs["anchor"] is None else "anchor: only an interval has one, and a cron expression names times"
        )
    if inputs["jitter_s"] > rhythm.every_s:
        return f"jitter_s: {inputs['jitter_s']:g} s is longer than the interval, which is {rhythm.every_s} s"
    return None


def _given(run: Process[Any, Any], inputs: Any) -> dict[str, Any]:
    """The inputs of a run as they are to be given each time; the defaults of the class are left to the class."""
    if inputs is None:
        return {}
    if isinstance(inputs, Mapping):
        return dict(inputs)
    values: dict[str, Any] = run.snapshot()["inputs"]
    return dict(values)
