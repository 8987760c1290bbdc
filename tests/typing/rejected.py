"""Programs that are wrong: both mypy and pyright, strict, must find exactly the lines that say so in a comment.

It is only read by the checkers and never imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
import pydantic

import prunus
from prunus import (
    Child,
    Continue,
    Happened,
    MapResults,
    Process,
    ProcessHandle,
    ProcessListener,
    ProcessResult,
    ProcessSpec,
    RetryPolicy,
    Stop,
    ToContext,
    Wait,
    WorkChain,
    WorkChainSpec,
    append_,
    message,
    process,
    query,
    return_,
    sleep,
    step,
    until,
)


@dataclass(frozen=True)
class Crystal:
    element: str
    scale: float = 1.0


class Energy(msgspec.Struct, frozen=True):
    energy: float


class Lattice(pydantic.BaseModel):
    a: float


class Volume(Process[Lattice, Energy]):
    async def run(self) -> Energy:
        return Energy(energy=self.inputs.b)  # wrong: there is no such input


class EnergyAtScale(Process[Crystal, Energy]):
    async def run(self) -> Energy:
        return Energy(energy=self.inputs.scale)


# --- inputs and outputs --------------------------------------------------------------------------------------


class ReadsInputs(Process[Crystal, Energy]):
    async def run(self) -> Energy:
        print(self.inputs.elemnt)  # wrong: there is no such input
        factor: str = self.inputs.scale  # wrong: it is a float
        self.inputs.scale = 2.0  # wrong: inputs never change
        self.inputs = Crystal("Cu")  # wrong: inputs never change
        return Energy(energy=factor)  # wrong: the energy is a float


def makes_processes() -> None:
    EnergyAtScale(Energy(energy=1.0))  # wrong: these are outputs
    EnergyAtScale(Crystal("Cu", scale="big"))  # wrong: the scale is a float
    Volume(Lattice(a="Cu"))  # wrong: a number
    Volume(Crystal("Cu"))  # wrong: inputs are a Lattice or a mapping
    EnergyAtScale("Cu")  # wrong: inputs are a Crystal or a mapping
    EnergyAtScale(element="Cu")  # wrong: inputs are one argument
    EnergyAtScale(Crystal("Cu"), parent_close="stop")  # wrong: kill, abandon or wait
    EnergyAtScale(Crystal("Cu"), on_exception="ignore")  # wrong: fail or pause


def reads_results(result: ProcessResult[Energy]) -> None:
    print(result.outputs.enrgy)  # wrong: there is no such output
    text: str = result.outputs.energy  # wrong: it is a float
    result.outputs.energy = 1.0  # wrong: results never change
    print(result.output, text)  # wrong: it is called outputs
    print(EnergyAtScale(Crystal("Cu")).result().outputs.scale)  # wrong: there is no such output


async def executes() -> None:
    await prunus.execute(EnergyAtScale, Energy(energy=1.0))  # wrong: these are outputs
    result = await prunus.execute(EnergyAtScale, Crystal("Cu"))
    print(result.outputs.volume)  # wrong: there is no such output
    await prunus.execute(EnergyAtScale, Crystal("Cu"), label="one")  # wrong: there is no such option
    await prunus.execute(Crystal("Cu"))  # wrong: this is no process
    prunus.run(EnergyAtScale, ["Cu"])  # wrong: inputs are a Crystal or a mapping
    print(prunus.run(EnergyAtScale, Crystal("Cu")).outputs.volume)  # wrong: there is no such output
    print(prunus.execute(EnergyAtScale, Crystal("Cu")).outputs)  # wrong: it is not awaited


# --- steps ---------------------------------------------------------------------------------------------------


class HasSteps(Process[Crystal, Energy]):
    version = "2"  # wrong: a number
    queue = 3  # wrong: a name
    priority = "high"  # wrong: a number
    resources = ("licence",)  # wrong: tokens by name
    run_sync_steps_in = "process"  # wrong: thread or loop

    @step(timeout="60")  # wrong: seconds
    async def run(self) -> Continue:
        return Continue(self.fit)  # wrong: fit takes a number

    @step(retry=3)  # wrong: a RetryPolicy
    async def second(self) -> Continue:
        return Continue(self.fit, "one")  # wrong: fit takes a number

    @step(repeat=True)  # wrong: there is no such option
    async def third(self) -> Continue:
        return Continue(HasSteps.fit, 1, lable="x")  # wrong: it is called label

    @step(effect="never")  # wrong: repeatable or once
    async def fourth(self) -> Continue:
        return Continue(3)  # wrong: a step is a method or its name

    def fit(self, power: int, label: str = "") -> Stop:
        return Stop(power, exit_status="bad")  # wrong: a number

    async def missing(self) -> Continue:
        return Continue(self.fitt, 3)  # wrong: there is no such step

    async def does(self) -> None:
        size: str = await self.do("size", len, "Cu")  # wrong: len gives a number
        await self.do("size", len)  # wrong: len of what?
        await self.do(len, "Cu")  # wrong: it needs a name
        await self.do("fit", self.fit, size)  # wrong: fit takes a number

    async def says(self) -> None:
        self.heartbeat("half")  # wrong: a number from 0 to 1
        self.out(3, "energy")  # wrong: the name comes first
        self.out_many(energy=3)  # wrong: a mapping
        self.set_status(3)  # wrong: a line of text
        self.exit_codes.ERROR_FLAT.formatted()  # wrong: it is called format

    @step(effect="once", reconcile=3)  # wrong: a method or its name
    def pay(self) -> Happened:
        return Happened("receipt", "twice")  # wrong: one value


def makes_policies() -> None:
    RetryPolicy(attempts=3)  # wrong: it is called max_attempts
    RetryPolicy(retry_on="OSError")  # wrong: an exception class
    step(3)  # wrong: no method
    query(3)  # wrong: no method
    return_("now")  # wrong: a number


@process(queue=3)  # wrong: a name
def nowhere(self: Process) -> None: ...


@process  # wrong: the first parameter is the process
def takes_nothing() -> None: ...


@process  # wrong: the first parameter is the process
async def takes_no_process(element: str) -> None: ...


# --- waits, children, calls ----------------------------------------------------------------------------------


class Waits(Process[Crystal, Energy]):
    async def run(self, child: Child) -> None:
        Wait(3.5)  # wrong: write sleep(3.5)
        Wait([child, 3])  # wrong: one can't wait for a number
        Wait(child, then=3)  # wrong: a step is a method or its name
        Wait(child, self.take)  # wrong: the step is then=...
        Wait(self.take, then=self.take)  # wrong: two steps can't both come next
        Wait(child, on=child)  # wrong: only one place for what it waits for
        Wait.any(approved=3, then=self.take)  # wrong: one can't wait for a number
        Wait.all(child, object(), then=self.take)  # wrong: one can't wait for anything
        sleep("1 hour")  # wrong: seconds or a timedelta
        until("tomorrow")  # wrong: a datetime
        until(datetime)  # wrong: a datetime
        message(3)  # wrong: a name
        message("go", timeout="1 hour")  # wrong: seconds or a timedelta
        self.as_completed(child, self.take)  # wrong: several children
        self.as_completed([child])  # wrong: with which step?

    def take(self, value: Any) -> None: ...

    async def submits(self) -> None:
        self.submit(EnergyAtScale, Energy(energy=1.0))  # wrong: these are outputs
        self.submit(EnergyAtScale(Crystal("Cu")))  # wrong: a class and its inputs
        self.submit(Crystal, {"element": "Cu"})  # wrong: this is no process
        self.submit(EnergyAtScale, Crystal("Cu"), parent_close="stop")  # wrong: kill, abandon or wait
        self.submit(EnergyAtScale, Crystal("Cu"), priority="high")  # wrong: a number
        self.submit(EnergyAtScale, Crystal("Cu"), key="one")  # wrong: a child has no key
        print(self.submit(EnergyAtScale, Crystal("Cu")).outputs)  # wrong: it has not even begun
        await self.submit(EnergyAtScale, Crystal("Cu"))  # wrong: a child is waited for with Wait

    async def calls(self) -> None:
        await self.call(EnergyAtScale, Energy(energy=1.0))  # wrong: these are outputs
        result = await self.call(EnergyAtScale, Crystal("Cu"))
        print(result.outputs.volume)  # wrong: there is no such output
        print(self.call(EnergyAtScale, Crystal("Cu")).outputs)  # wrong: it is not awaited
        print(self.call(EnergyAtScale, Crystal("Cu")).result().outputs.volume)  # wrong: there is no such output

    async def maps(self) -> None:
        self.map(EnergyAtScale, [Energy(energy=1.0)])  # wrong: these are outputs
        self.map(EnergyAtScale, 5)  # wrong: a range, a list or a method
        self.map(EnergyAtScale, self.name_of, count=3)  # wrong: it gives no inputs
        self.map(EnergyAtScale, range(3), on_error="skip")  # wrong: collect or fail
        self.map(EnergyAtScale, range(3), queue=3)  # wrong: a name
        self.map(Crystal, range(3))  # wrong: this is no process

    def name_of(self, number: int) -> str:
        return str(number)

    def takes(self, results: MapResults) -> None:
        results.get("first")  # wrong: the number of an item
        print(results[0])  # wrong: it is asked for with get


# --- work chains ---------------------------------------------------------------------------------------------


class Chain(WorkChain[Crystal, Energy]):
    on_exception = "ignore"  # wrong: fail or pause

    @classmethod
    def define(cls, spec: WorkChainSpec) -> None:
        spec.input("scale", valid_tpye=float)  # wrong: it is called valid_type
        spec.input("scale", float)  # wrong: options have names
        spec.input(3)  # wrong: a name
        spec.output("energy", validator="positive")  # wrong: a function
        spec.exit_code("400", "ERROR_FLAT", "it is flat")  # wrong: the status is a number
        spec.exit_code(400, "ERROR_FLAT")  # wrong: it needs a message
        spec.expose_inputs(Crystal)  # wrong: this is no process
        spec.expose_outputs(EnergyAtScale, include=3)  # wrong: names
        spec.message("go", type=bool)  # wrong: it is called valid_type
        spec.inptu("scale")  # wrong: there is no such method
        spec.outline(cls.scan, cls.fit)  # wrong: there is no such step

    async def scan(self) -> ToContext:
        child = self.submit(EnergyAtScale, {"element": "Cu"})
        self.to_context(child)  # wrong: it needs a name
        self.to_context(points=append_(3))  # wrong: a child
        self.to_context(points=[child])  # wrong: one child, or append_ of it
        self.ctx = {}  # wrong: write into it
        return ToContext(points=EnergyAtScale)  # wrong: a child


def defines(spec: ProcessSpec) -> None:
    spec.outline(1).steps()  # wrong: it gives nothing


# --- listeners -----------------------------------------------------------------------------------------------


class Deaf(ProcessListener):
    def on_report(self, process: Process, line: str) -> None: ...  # wrong: it gets a Line

    def on_paused(self) -> None: ...  # wrong: it gets the process


class Listened(EnergyAtScale):
    listeners = (Crystal("Cu"),)  # wrong: this is no listener


def listens(one: EnergyAtScale) -> None:
    one.add_listener(Crystal("Cu"))  # wrong: this is no listener
    one.send("approve", True, 3)  # wrong: one value


# --- by a daemon ---------------------------------------------------------------------------------------------


async def uses_a_daemon() -> None:
    async with prunus.connect(3) as controller:  # wrong: a profile, a folder or a name
        await controller.launch(EnergyAtScale, Energy(energy=1.0))  # wrong: these are outputs
        await controller.launch(Crystal, {"element": "Cu"})  # wrong: this is no process
        await controller.launch("energies:EnergyAtScale", pids=["one"])  # wrong: there is no such option
        handle = await controller.launch(EnergyAtScale, Crystal("Cu"))
        other: ProcessHandle[Crystal] = handle  # wrong: its outputs are no Crystal
        print((await handle.result()).outputs.volume, other)  # wrong: there is no such output
        await handle.result(timeout=3)  # wrong: it is called timeout_s
        await handle.kill(grace=3)  # wrong: it is called grace_s
        await handle.pause(quiesced="yes")  # wrong: true or false
        await handle.send(3)  # wrong: a name
        await handle.update()  # wrong: which one?
        print(handle.result().outputs)  # wrong: it is not awaited
        await controller.launch(EnergyAtScale, Crystal("Cu"), priority="high")  # wrong: a number
        await controller.launch("energies:EnergyAtScale", resources=["licence"])  # wrong: tokens by name
        await controller.launch_many([(EnergyAtScale, Crystal("Cu"))], pid="one")  # wrong: a pid is one process's
        await controller.launch_many([EnergyAtScale])  # wrong: with its inputs
        controller.processes(status="waiting")  # wrong: it is called state
        controller.processes(older_than="1 hour")  # wrong: seconds or a timedelta
        controller.processes(tag="demo").launch()  # wrong: there is no such operation
        print(controller.processes(tag="demo").count() + 1)  # wrong: it is not awaited
        async for event in handle.watch(after="yesterday"):  # wrong: the number of an event
            print(event.state)  # wrong: it is called subject
    with prunus.connect():  # wrong: async with
        pass


def uses_a_daemon_from_a_script() -> None:
    with prunus.connect_sync() as controller:
        controller.launch(EnergyAtScale, Energy(energy=1.0))  # wrong: these are outputs
        controller.launch(EnergyAtScale, Crystal("Cu"), tag="demo")  # wrong: it is called tags
        handle = controller.launch(EnergyAtScale, Crystal("Cu"))
        print(handle.result().outputs.volume)  # wrong: there is no such output
        handle.edit_context({"scale": 2.0})  # wrong: names and values
        handle.kill(grace=3)  # wrong: it is called grace_s
        handle.pause(quiesced="yes")  # wrong: true or false
        print(handle.record().stat)  # wrong: it is called state
        controller.processes(tags=["demo"])  # wrong: it is called tag
        controller.processes(tag="demo").pause(3)  # wrong: a reason
