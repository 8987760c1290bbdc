"""Programs as users write them: mypy and pyright, both strict, find nothing wrong here, and know the types.

What `assert_type` says is checked by both. No line needs an ignore. `tests/typing/test_typing.py` runs the checkers,
and the program too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, assert_type

import msgspec
import pydantic

import prunus
from prunus import (
    BlockingHandle,
    BulkReport,
    Child,
    Continue,
    DidNotHappen,
    ExitCode,
    Happened,
    Kill,
    LaunchOptions,
    Line,
    MapResults,
    Process,
    ProcessHandle,
    ProcessListener,
    ProcessResult,
    ProcessSelection,
    ProcessSpec,
    RetryPolicy,
    Stop,
    ToContext,
    Transition,
    Wait,
    WatchEvent,
    WorkChain,
    WorkChainSpec,
    append_,
    if_,
    message,
    process,
    query,
    return_,
    sleep,
    step,
    until,
    update,
    while_,
)


@dataclass(frozen=True)
class Crystal:
    element: str
    scale: float = 1.0


@dataclass(frozen=True)
class Energy:
    volume: float  # Å³ per atom
    energy: float  # eV per atom


class Scan(msgspec.Struct, frozen=True):
    element: str
    scales: list[float]


class Curve(msgspec.Struct, frozen=True):
    lowest: float
    count: int


class Lattice(pydantic.BaseModel):
    element: str
    a: float = pydantic.Field(default=3.6, gt=0)


class Volume(pydantic.BaseModel):
    volume: float


# --- a process: typed by dataclasses, and steps with and without options ------------------------------------


class EnergyAtScale(Process[Crystal, Energy]):
    """Its inputs and outputs are said once, and known everywhere."""

    version = 2
    run_sync_steps_in = "loop"
    on_exception = "pause"
    queue = "gpu"
    priority = 5
    resources = {"licence": 1}  # noqa: RUF012 (as users write it)

    @step(retry=RetryPolicy(max_attempts=3, retry_on=OSError), timeout=60.0)
    async def run(self) -> Continue:
        assert_type(self.inputs, Crystal)
        assert_type(self.inputs.scale, float)
        return Continue(self.compute, 3, label="third")

    @step
    def compute(self, power: int, label: str = "") -> Energy:
        self.report(f"{label}: {self.inputs.element}")
        self.heartbeat(0.5, "half of it")
        volume = self.inputs.scale**power
        return Energy(volume=volume, energy=(self.inputs.scale - 1) ** 2)


class Resumed(Process):
    """It says nothing of its types to the checkers. Its first step may have parameters."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("anything")

    async def run(self, again: bool = False) -> Continue | Wait | Stop:
        if again:
            return Stop(self.inputs.anything, exit_status=0)
        return Continue(self.run, again=True) if self.inputs.anything else Wait(self.go_on, "a moment", on=sleep(0.01))

    async def go_on(self) -> Continue:
        return Continue("run", again=True)


class Nested(Process):
    """Nested classes are read too; only the checkers do not see them in `inputs`."""

    @dataclass(frozen=True)
    class Inputs:
        x: int = 1

    @dataclass(frozen=True)
    class Outputs:
        y: int

    def run(self) -> Outputs:
        return self.Outputs(y=2 * self.inputs.x)


class VolumeOf(Process[Lattice, Volume]):
    """Models of pydantic are read as well."""

    async def run(self) -> Volume:
        assert_type(self.inputs.a, float)
        return Volume(volume=self.inputs.a**3)


class Paid(Process[Crystal, Any]):
    """A step whose effect must not be repeated, and exit codes."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.output("receipt", valid_type=str, required=False)
        spec.exit_code(300, "ERROR_NO_MONEY", "there is no money for {element}")

    def look(self, idempotency_key: str) -> Happened | DidNotHappen | None:
        return Happened("receipt") if idempotency_key else None

    @step(effect="once", reconcile=look, renamed_from="buy")
    async def run(self) -> ExitCode | Kill | None:
        if self.inputs.scale < 0:
            return Kill("a negative scale")
        if self.inputs.scale > 2:
            return self.exit_codes.ERROR_NO_MONEY.format(element=self.inputs.element)
        self.out("receipt", "number 1")
        return None


# --- waits of all kinds, messages, questions and updates ----------------------------------------------------


class Patient(Process[Scan, Curve]):
    """Waits for children, times, messages and people."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("approve", valid_type=bool, help="whether it may go on")

    async def run(self) -> Wait:
        children = [self.submit(EnergyAtScale, Crystal(self.inputs.element, scale)) for scale in self.inputs.scales]
        assert_type(children, list[Child])
        return Wait(children, then=self.wait_more)

    async def wait_more(self, results: Sequence[ProcessResult[Energy]]) -> list[Wait]:
        assert_type(results[0].outputs.energy, float)
        child = self.submit(EnergyAtScale, {"element": "Cu"}, tags=["extra"], parent_close="wait")
        return [
            Wait(child, then=self.note),
            Wait(sleep(timedelta(milliseconds=1)), then="slept", msg="a moment"),
            Wait(until(datetime.now(UTC)), then=self.slept),
            Wait([child, sleep(0.001), message("approve", timeout=0.001, default=False)], then=self.note),
            Wait(timedelta(milliseconds=1), then=self.slept),
            Wait(self.note, "as in plumpy", on=[child]),
            *self.as_completed([child], self.note),
        ]

    async def note(self, result: Any) -> None:
        self.set_status(str(result))

    async def slept(self) -> Wait | None:
        if self.status == "enough":
            return None
        self.set_status("enough")
        return Wait.any(
            approved=message("approve", schema=bool),
            late=sleep(0.001),
            both=Wait.all(sleep(0.001), sleep(0.002)),
            then=self.decide,
        )

    async def decide(self, approved: bool | None, late: None, both: object) -> Wait:
        return self.map(EnergyAtScale, [Crystal("Cu"), Crystal("Al")], max_in_flight=2, then=self.collect)

    async def collect(self, results: MapResults) -> Wait:
        energies = [result.outputs.energy async for result in results]
        first = await results.get(0)
        self.out_many({"lowest": min(energies), "count": len(results) if first.successful else 0})
        return self.map(Nested, range(3), then=self.end)

    async def end(self, results: MapResults) -> Wait:
        return self.map(Nested, self.item, count=2, on_error="fail", then=self.last)

    def item(self, number: int) -> dict[str, int]:
        return {"x": number}

    def last(self, results: MapResults) -> None:
        assert [result.outputs.y for result in results] == [0, 2]

    @query
    def how_far(self) -> str | None:
        return self.status

    @update
    def set_how_far(self, text: str) -> None:
        self.set_status(text)


# --- calling within a step, and doing once ------------------------------------------------------------------


def build_cell(element: str, scale: float = 1.0) -> list[str]:
    return [element] * round(scale)


async def measure(cell: list[str]) -> int:
    return len(cell)


@process
async def relax(self: Process, element: str, scale: float = 1.0) -> int:
    """A process of one function."""
    cell = await self.do("cell", build_cell, element, scale=scale)
    assert_type(cell, list[str])
    size = await self.do("size", measure, cell)
    assert_type(size, int)
    return size


@process
@step(timeout=10)
def plain(self: Process, element: str) -> Energy:
    return Energy(volume=float(len(element)), energy=0.0)


class Caller(Process[Crystal, Energy]):
    """Runs others in its own steps."""

    async def run(self) -> Continue:
        result = await self.call(EnergyAtScale, self.inputs)
        assert_type(result, ProcessResult[Energy])
        assert_type(result.outputs, Energy)
        sized = await self.call(relax, {"element": self.inputs.element})
        self.logger.info("the size is %s", sized.value)
        return Continue(Caller.compute, result.outputs.energy)

    def compute(self, energy: float) -> Energy:
        called = self.call(EnergyAtScale, Crystal("Al")).result()
        return Energy(volume=called.outputs.volume, energy=energy)


# --- a work chain --------------------------------------------------------------------------------------------


class EquationOfState(WorkChain[Scan, Curve]):
    """Typed as a process is; its context holds anything."""

    listeners = ()

    @classmethod
    def define(cls, spec: WorkChainSpec) -> None:
        super().define(spec)
        spec.exit_code(400, "ERROR_FLAT", "the curve is flat")
        spec.outline(
            cls.prepare,
            while_(cls.has_more)(cls.scan),
            if_(cls.is_flat)(return_(400)).elif_(cls.has_more)(return_).else_(cls.wait),
            cls.fit,
        )

    async def prepare(self) -> ToContext:
        self.ctx.scales = list(self.inputs.scales)
        return ToContext(first=self.submit(EnergyAtScale, Crystal(self.inputs.element)))

    def has_more(self) -> bool:
        return bool(self.ctx.scales)

    async def is_flat(self) -> bool:
        return not self.ctx.points

    @step(retry=RetryPolicy(max_attempts=2))
    async def scan(self) -> None:
        child = self.submit(EnergyAtScale, Crystal(self.inputs.element, self.ctx.scales.pop()))
        self.to_context(points=append_(child), last=child)

    async def wait(self) -> Wait:
        return Wait(sleep(0.001))

    def fit(self) -> Curve | ExitCode:
        points: list[ProcessResult[Energy]] = self.ctx.points
        energies = [point.outputs.energy for point in points]
        return Curve(lowest=min(energies), count=len(energies)) if energies else self.exit_codes.ERROR_FLAT


def twice_the_symbol(inputs: Any) -> float:
    return 2.0 * len(inputs.crystal.element)


def positive(value: float) -> str | None:
    return None if value > 0 else f"{value} is not above 0"


class Exposing(WorkChain):
    """Takes over what another class takes and gives."""

    @classmethod
    def define(cls, spec: WorkChainSpec) -> None:
        super().define(spec)
        spec.input("cutoff", valid_type=float, default=twice_the_symbol, validator=positive)
        spec.input_namespace("options", dynamic=True, valid_type=(int, str), required=False)
        spec.expose_inputs(EnergyAtScale, "crystal", exclude=["scale"])
        spec.expose_outputs(EnergyAtScale)
        spec.output("note", valid_type=str, required=False)
        spec.outline(cls.start, cls.end)

    async def start(self) -> ToContext:
        return ToContext(child=self.submit(EnergyAtScale, self.exposed_inputs(EnergyAtScale, "crystal")))

    async def end(self) -> None:
        self.out_many(self.exposed_outputs(self.ctx.child, EnergyAtScale))


# --- listeners -----------------------------------------------------------------------------------------------


class Heard(ProcessListener):
    """Hears everything, wherever a process of the class runs."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def on_transition(self, process: Process, transition: Transition) -> None:
        self.events.append(transition.event)

    def on_report(self, process: Process, line: Line) -> None:
        self.events.append(line.text)


class Listened(EnergyAtScale):
    """A subclass is typed as its base."""

    listeners = (Heard(),)

    def on_terminated(self) -> None:
        self.set_status("ended")


# --- running alone, and by a daemon --------------------------------------------------------------------------


async def run_alone() -> list[Any]:
    """Everything above, in this process."""
    heard = Heard()
    one = Listened(Crystal("Cu", 2.0), pid="one", tags=["a"])
    one.add_listener(heard)
    result = await one.execute()
    assert_type(result, ProcessResult[Energy])
    assert_type(one.result().outputs.volume, float)
    assert_type((await prunus.execute(EnergyAtScale, Crystal("Cu"))).outputs, Energy)
    curve = await prunus.execute(EquationOfState, Scan("Cu", [0.9, 1.1]))
    assert_type(curve.outputs, Curve)
    patient = await prunus.execute(Patient, {"element": "Cu", "scales": [1.0]}, tags=["demo"])
    assert_type(patient.outputs.count, int)
    called = await prunus.execute(Caller, Crystal("Cu"))
    volume = await prunus.execute(VolumeOf, Lattice(element="Cu"))
    assert_type(volume.outputs.volume, float)
    anything: list[ProcessResult] = [
        await prunus.execute(Resumed, {"anything": 1}),
        await prunus.execute(Resumed, {"anything": 0}),
        await prunus.execute(Nested),
        await prunus.execute(Paid, Crystal("Cu")),
        await prunus.execute(relax, {"element": "Cu", "scale": 3.0}),
        await prunus.execute(plain, {"element": "Cu"}),
        await prunus.execute(Exposing, {"crystal": {"element": "Cu"}}),
    ]
    return [*heard.events, result, curve, patient, called, volume, *anything]


def run_in_a_script() -> float:
    return prunus.run(EnergyAtScale, Crystal("Cu", 2.0)).outputs.volume


async def use_a_daemon() -> None:
    async with prunus.connect() as controller:
        handle = await controller.launch(EnergyAtScale, Crystal("Cu"), tags=["demo"], on_exception="pause")
        assert_type(handle, ProcessHandle[Energy])
        assert_type((await handle.result(timeout_s=60)).outputs.energy, float)
        outcome = await handle.outcome()
        assert_type(outcome, ProcessResult[Energy] | None)
        by_name = await controller.launch("accepted:EnergyAtScale", {"element": "Cu"}, paused="looking")
        await by_name.play(pause_at="compute")
        await by_name.pause("looking", cascade=True)
        await by_name.send("approve", True)
        await by_name.update("set_how_far", text="far")
        assert_type(await by_name.query("how_far"), Any)
        await by_name.resume()
        await by_name.kill("enough", force=True, grace_s=1.0)
        forked = await handle.fork("compute", pid="two", scales=[1.0])
        handles: dict[str, ProcessHandle] = {"one": handle, "two": forked}
        await asyncio.gather(*(each.result() for each in handles.values()))
        async with controller.events(handle.pid) as events:
            async for event in events:
                print(event.subject)
        await controller.pause_all("lunch")
        options: LaunchOptions = {"queue": "gpu", "priority": 5, "resources": {"licence": 1}, "key": "Cu-1"}
        await controller.launch(EnergyAtScale, Crystal("Cu"), **options)
        many = await controller.launch_many(
            [(EnergyAtScale, Crystal("Cu", scale)) for scale in (0.9, 1.1)], tags=["scan"], paused=True
        )
        assert_type(many, list[ProcessHandle[Energy]])
        await controller.launch_many([("accepted:EnergyAtScale", {"element": "Cu"}, {"key": "Cu-2"})])
        async for watched in handle.watch(tree=True):
            assert_type(watched, WatchEvent)
        assert_type(await handle.children(), list[ProcessHandle])
        assert_type(await handle.parent(), ProcessHandle | None)
        waiting = controller.processes(state=["waiting"], cls=EnergyAtScale, older_than=timedelta(hours=1), paused=True)
        assert_type(waiting, ProcessSelection)
        assert_type(await waiting.play(), BulkReport)
        print([one.pid async for one in waiting], (await waiting.kill("enough")).skipped, await waiting.count())
        await handle.delete()


def use_a_daemon_from_a_script() -> None:
    with prunus.connect_sync("production") as controller:
        handle = controller.launch(EquationOfState, Scan("Cu", [1.0]), tags=["demo"])
        assert_type(handle.result(timeout_s=60).outputs, Curve)
        handle.pause("looking", at="fit")
        handle.send("approve", True)
        print([line.text for line in handle.log(last=3)], [event.at for event in handle.history()])
        print([row.pid for row in controller.find() if row.is_terminal], controller.handle("one").record().state)
        assert_type(handle, BlockingHandle[Curve])
        assert_type(handle.until(lambda row: row.is_terminal, 60).state, str)
        assert_type(handle.history(after=3)[0].subject, str)
        several = controller.launch_many([(EquationOfState, Scan("Cu", [1.0]))] * 3, queue="gpu")
        assert_type(several[0].result().outputs, Curve)
        for event in handle.watch():
            assert_type(event, WatchEvent)
        report = controller.processes(tag="demo").pause("lunch", quiesced=False)
        assert_type(report, BulkReport)
        assert_type(controller.processes(tag="demo").count(), int)
        assert_type([each.pid for each in controller.processes(root=handle.pid)], list[str])
