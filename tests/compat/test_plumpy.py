"""plumpy 0.26 itself, over our broker: what it wrote for kiwipy on RabbitMQ works without a change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import kiwipy
import plumpy
import pytest

from prunus.compat.kiwipy import PrunusCommunicator
from tests.compat.parts import WAIT_S, Stack, result

KINDS = ["thread", "coroutine"]


class Add(plumpy.Process):  # type: ignore[misc]
    """Ends at once."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("a", valid_type=int)
        spec.output("sum", valid_type=int)

    def run(self) -> None:
        self.out("sum", self.inputs.a + 1)


class Sleeper(plumpy.Process):  # type: ignore[misc]
    """Waits until somebody does something to it."""

    def run(self) -> Any:
        return plumpy.Wait(self.woken)

    def woken(self) -> None:
        return None


class Failing(plumpy.Process):  # type: ignore[misc]
    def run(self) -> None:
        raise ZeroDivisionError("infinite")


@pytest.fixture(autouse=True)
async def _a_loop_that_is_never_idle() -> AsyncIterator[None]:
    """plumpy's `LoopCommunicator` adds a callback to a future of the loop from another thread. If the future is done by
    then, the loop is not woken for it (asyncio says that this is not allowed), and an idle one sleeps on, whatever the
    communicator is: without one, 140 of 3,000 calls of `convert_to_comm` never came back. A loop that wakes by itself
    goes on."""

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.01)

    ticking = asyncio.get_running_loop().create_task(tick())
    yield
    ticking.cancel()


@pytest.fixture
def persister() -> plumpy.InMemoryPersister:
    return plumpy.InMemoryPersister()


@pytest.fixture
async def worker(connect: Stack, persister: plumpy.InMemoryPersister) -> PrunusCommunicator:
    """A process launcher on a communicator of its own, in this event loop."""
    communicator = connect()
    loop = asyncio.get_running_loop()
    wrapped = plumpy.wrap_communicator(communicator, loop)
    context = plumpy.LoadSaveContext(loop=loop, communicator=communicator)
    wrapped.add_task_subscriber(plumpy.ProcessLauncher(loop, persister=persister, load_context=context))
    return communicator


@pytest.fixture
def sender(connect: Stack) -> PrunusCommunicator:
    """The communicator of a controller: another one."""
    return connect()


async def wait_for(future: Any) -> Any:
    """What a thread controller's future comes to, while this loop runs processes."""
    while isinstance(future, kiwipy.Future):
        future = await asyncio.wait_for(asyncio.wrap_future(future), WAIT_S)
    return future


class Controller:
    """plumpy's two controllers by the same name."""

    def __init__(self, kind: str, communicator: PrunusCommunicator) -> None:
        thread = kind == "thread"
        self.inner = (plumpy.RemoteProcessThreadController if thread else plumpy.RemoteProcessController)(communicator)
        self._thread = thread

    async def __call__(self, method: str, *arguments: Any, **options: Any) -> Any:
        answer = getattr(self.inner, method)(*arguments, **options)
        return await (wait_for(answer) if self._thread else asyncio.wait_for(answer, WAIT_S))


@pytest.fixture(params=KINDS)
def controller(request: pytest.FixtureRequest, sender: PrunusCommunicator) -> Controller:
    return Controller(request.param, sender)


@pytest.fixture
async def start(worker: PrunusCommunicator) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Run a sleeper that listens on the worker's communicator."""
    running: list[tuple[Any, asyncio.Task[None]]] = []

    async def start() -> Any:
        process = Sleeper(communicator=worker)
        task = asyncio.get_running_loop().create_task(process.step_until_terminated())
        running.append((process, task))
        while process.state != plumpy.ProcessState.WAITING:
            await asyncio.sleep(0)
        return process

    yield start
    for process, task in running:
        if not process.has_terminated():
            process.kill()
            await asyncio.wait_for(task, WAIT_S)


# --- launching ---


async def test_launch(worker: PrunusCommunicator, controller: Controller) -> None:
    """A process is made where the launcher is, and its outputs come back."""
    outputs = await controller("launch_process", Add, init_kwargs={"inputs": {"a": 1}})
    assert outputs == {"sum": 2}


async def test_launch_and_go_on(worker: PrunusCommunicator, controller: Controller) -> None:
    """With ``nowait`` the pid comes back, with the type that it has."""
    pid = await controller("launch_process", Add, init_kwargs={"inputs": {"a": 1}, "pid": 17}, nowait=True)
    assert pid == 17


async def test_a_process_that_fails(worker: PrunusCommunicator, controller: Controller) -> None:
    with pytest.raises(kiwipy.RemoteException, match="infinite"):
        await controller("launch_process", Failing)


async def test_continue(
    worker: PrunusCommunicator, controller: Controller, persister: plumpy.InMemoryPersister
) -> None:
    """From a checkpoint."""
    process = Add(inputs={"a": 4})
    persister.save_checkpoint(process)
    assert await controller("continue_process", process.pid) == {"sum": 5}


async def test_execute(worker: PrunusCommunicator, controller: Controller) -> None:
    """A task that creates and one that continues. The thread controller sends the second in the callback of a future,
    where kiwipy's communicator would wait for itself."""
    assert await controller("execute_process", Add, init_kwargs={"inputs": {"a": 5}}) == {"sum": 6}


async def test_without_a_reply(worker: PrunusCommunicator, sender: PrunusCommunicator) -> None:
    """Nobody waits; that it ran is known by its broadcast."""
    finished = kiwipy.Future()
    sender.add_broadcast_subscriber(
        kiwipy.BroadcastFilter(lambda *_: finished.set_result(True), subject="state_changed.*.finished")
    )
    process = Add(inputs={"a": 1}, communicator=worker)
    task = asyncio.get_running_loop().create_task(process.step_until_terminated())
    assert await wait_for(finished)
    await task
    launch = plumpy.RemoteProcessThreadController(sender).launch_process
    assert launch(Add, init_kwargs={"inputs": {"a": 1}}, no_reply=True) is None


# --- controlling ---


async def test_pause_play_status_kill(start: Callable[[], Awaitable[Any]], controller: Controller) -> None:
    """Each answers when it is done, through the futures that plumpy puts into one another."""
    process = await start()
    status = await controller("get_status", process.pid)
    assert "ProcessState.WAITING" in str(status)
    assert await controller("pause_process", process.pid, "because") is True
    assert process.paused
    assert process.status == "because"
    assert await controller("play_process", process.pid) is True
    assert not process.paused
    assert await controller("kill_process", process.pid, "enough") is True
    assert process.killed()
    assert process.killed_msg()["message"] == "enough"


async def test_all_at_once(start: Callable[[], Awaitable[Any]], sender: PrunusCommunicator) -> None:
    """Broadcasts reach every process."""
    processes = [await start() for _ in range(3)]
    controller = plumpy.RemoteProcessThreadController(sender)
    for act, done in (
        (lambda: controller.pause_all("because"), lambda one: one.paused),
        (controller.play_all, lambda one: not one.paused),
        (lambda: controller.kill_all("enough"), lambda one: one.killed()),
    ):
        act()
        async with asyncio.timeout(WAIT_S):
            while not all(map(done, processes)):
                await asyncio.sleep(0)


async def test_a_process_that_is_gone(start: Callable[[], Awaitable[Any]], sender: PrunusCommunicator) -> None:
    """It is unroutable at once, as AiiDA relies on."""
    process = await start()
    process.kill()
    process.close()
    with pytest.raises(kiwipy.UnroutableError):
        plumpy.RemoteProcessThreadController(sender).get_status(process.pid)


async def test_a_loop_communicator(connect: Stack) -> None:
    """plumpy's wrapper, which adds a future to each answer, for a process too."""
    loop = asyncio.get_running_loop()
    process = Sleeper(communicator=plumpy.wrap_communicator(connect(), loop))
    task = loop.create_task(process.step_until_terminated())
    controller = plumpy.RemoteProcessThreadController(connect())
    assert await wait_for(controller.kill_process(process.pid, "enough")) is True
    await asyncio.wait_for(task, WAIT_S)
    assert process.killed()


# --- what plumpy's users write themselves ---


@pytest.fixture
def sums(connect: Stack) -> None:
    connect().add_task_subscriber(lambda _, task: sum(task["numbers"]))


def test_other_tasks(sums: None, sender: PrunusCommunicator) -> None:
    controller = plumpy.RemoteProcessThreadController(sender)
    assert result(controller.task_send({"numbers": [1, 2, 3]})) == 6
