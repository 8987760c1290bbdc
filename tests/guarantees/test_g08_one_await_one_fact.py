"""G8: no future resolves to a future. Every public method is called once, on real parts."""

from __future__ import annotations

import inspect
import sqlite3
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from prunus.messaging.communicator import IncomingTask, Subscription
from prunus.messaging.inventory import QueueLimits
from prunus.messaging.local import LocalBroker
from prunus.messaging.peer import PeerCommunicator
from prunus.persistence import MemoryPersister, Persister
from prunus.persistence.persister import NewProcess, Note, Query, Save
from prunus.runtime.controller import ProcessController, ProcessHandle
from prunus.testing.communicator_contract import ContractService
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import features, workflows
from tests.runtime.waiting import file_has, until

Calls = dict[str, Callable[[], Awaitable[Any]]]


def asynchronous(kind: type) -> set[str]:
    """The names of its public methods that have to be awaited."""
    methods = inspect.getmembers(kind, inspect.iscoroutinefunction)
    return {name for name, _ in methods if not name.startswith("_")}


async def each_is_a_fact(kind: type, calls: Calls) -> None:
    """One await of each gives something that can't be awaited again."""
    assert set(calls) == asynchronous(kind), "each public method is called here"
    for name, call in calls.items():
        answer = await call()
        assert not inspect.isawaitable(answer), name
        assert not isinstance(answer, Future), name
        if isinstance(answer, list | tuple):
            assert not any(inspect.isawaitable(item) for item in answer), name


async def test_a_persister_answers_with_facts() -> None:
    """All of the seam."""

    def new(pid: str) -> NewProcess:
        return NewProcess(pid=pid, class_id="a:B", checkpoint=b"x", created_at=0.0)

    async with MemoryPersister() as persister:
        for pid in ("released", "aside", "ended", "forked"):
            await persister.create(new(pid))
            await persister.claim(pid, "me", at=0.0)
        await persister.save(Save(pid="forked", epoch=1, state="running", checkpoint=b"x", keep_as="fit"))
        copy = await persister.export("forked")
        ended = Save(pid="ended", epoch=1, state="finished", result=b"r")
        calls: Calls = {
            "create": lambda: persister.create(new("new")),
            "claim": lambda: persister.claim("new", "me", at=time.time()),
            "save": lambda: persister.save(ended),
            "release": lambda: persister.release("released", 1),
            "set_aside": lambda: persister.set_aside("aside", 1, "why"),
            "revive": lambda: persister.revive("aside"),
            "post": lambda: persister.post("new", b"letter"),
            "reply": lambda: persister.reply("new", 1),
            "send": lambda: persister.send("new", "mail", b"body", at=time.time()),
            "note": lambda: persister.note(Note(pid="forked", epoch=1)),
            "log": lambda: persister.log("new"),
            "past": lambda: persister.past("forked"),
            "past_checkpoint": lambda: persister.past_checkpoint("forked", 1),
            "load": lambda: persister.load("new"),
            "query": lambda: persister.query(Query()),
            "history": lambda: persister.history("new"),
            "delete": lambda: persister.delete("ended"),
            "prune": lambda: persister.prune(Query()),
            "export": lambda: persister.export("forked"),
            "stage": lambda: persister.stage("copy", 0, [copy]),
            "adopt": lambda: persister.adopt("copy", 1, "elsewhere", skip_existing=True),
        }
        await each_is_a_fact(Persister, calls)


async def test_a_communicator_answers_with_facts(tmp_path: Path) -> None:
    """All of the seam, and what a receipt and subscriptions can be asked."""

    async def echo(body: bytes) -> bytes:
        return body

    async def work(task: IncomingTask) -> bytes:
        return task.body

    async def heard(_: object) -> None: ...

    broker = LocalBroker(service=ContractService(connection := sqlite3.connect(":memory:", isolation_level=None)))
    async with await broker.connect() as communicator, await broker.connect() as other:
        calls: Calls = {
            "connected": lambda: communicator.connected(1.0),
            "add_task_subscriber": lambda: communicator.add_task_subscriber(work),
            "add_rpc_subscriber": lambda: communicator.add_rpc_subscriber(echo, "echo"),
            "add_broadcast_subscriber": lambda: communicator.add_broadcast_subscriber(heard),
            "task_send": lambda: communicator.task_send(b"body"),
            "rpc_send": lambda: communicator.rpc_send("echo", b"body"),
            "broadcast_send": lambda: communicator.broadcast_send(b"body"),
            "call": lambda: communicator.call([b"words"]),
            "next_task": lambda: communicator.next_task(queue="pulled"),
            "tasks": communicator.tasks,
            "requeue": lambda: communicator.requeue(queue="other", place="dead"),
            "bury": lambda: communicator.bury("nothing"),
            "delete": lambda: communicator.delete("nothing"),
            "purge": lambda: communicator.purge("other"),
            "configure_queue": lambda: communicator.configure_queue("other", QueueLimits()),
            "configure_resource": lambda: communicator.configure_resource("gpu", 2),
            "statistics": communicator.statistics,
            "blob_put": lambda: communicator.blob_put(b"large"),
            "blob_get": lambda: communicator.blob_get(blob),
            "blob_save": lambda: communicator.blob_save(blob, tmp_path / "blob"),
            "close": communicator.close,
            "ended": communicator.ended,
        }
        blob = await other.blob_put(b"large")
        subscription = await other.add_task_subscriber(work, queue="other", credit=1)
        receipt = await other.task_send(b"body", queue="other", want_result=True)
        await each_is_a_fact(type(receipt), {"result": receipt.result})
        lane: Calls = {"set_credit": lambda: subscription.set_credit(2), "cancel": subscription.cancel}
        await each_is_a_fact(Subscription, lane)
        for _ in range(4):
            await other.task_send(b"body", queue="pulled")
        tasks = [await other.next_task(queue="pulled") for _ in range(3)]
        taken: Calls = {
            "acknowledge": tasks[0].acknowledge,
            "fail": lambda: tasks[1].fail(ValueError()),
            "reject": tasks[2].reject,
        }
        await each_is_a_fact(type(tasks[0]), taken)
        await each_is_a_fact(PeerCommunicator, calls)
    broker.close()
    connection.close()


async def test_a_controller_and_its_handles_answer_with_facts(tmp_path: Path) -> None:
    """Launch, look, wait and control: what comes back is the handle, the row, the result, or nothing."""
    async with LocalDaemon() as daemon:
        controller = ProcessController(await daemon.broker.connect())
        calls: Calls = {
            "launch": lambda: controller.launch(workflows.Ask, pid="ask"),
            "launch_many": lambda: controller.launch_many([(workflows.Add, {"a": 1})]),
            "find": controller.find,
            "pause_all": controller.pause_all,
            "play_all": controller.play_all,
            "kill_all": controller.kill_all,
            "broker_statistics": controller.broker_statistics,
            "close": controller.close,
        }
        await each_is_a_fact(ProcessController, calls)

        ask = await daemon.controller.launch(workflows.Ask)
        await until(ask, lambda row: row.state == "waiting")
        doomed = await daemon.controller.launch(workflows.Ask)
        cure = tmp_path / "cure"
        heal = await daemon.controller.launch(workflows.Heal, {"file": str(cure)})
        await until(heal, lambda row: row.state == "excepted")
        chain = await daemon.controller.launch(features.Chain)
        await chain.result()
        review = await daemon.controller.launch(features.Review)
        await until(review, lambda row: row.state == "waiting")
        editable = await daemon.controller.launch(features.Chain, paused=True)
        charge = await daemon.controller.launch(features.Charge, {"file": str(tmp_path / "charge")})
        await file_has(tmp_path / "charge", 1)
        await daemon.kill_worker("worker-1")
        await daemon.start_worker("worker-2")
        await until(charge, lambda row: row.play == "paused")
        calls = {
            "send": lambda: review.send("comment", "good"),
            "query": lambda: review.query("limit_plus"),
            "update": lambda: review.update("set_limit", 2),
            "edit_context": lambda: editable.edit_context(text="x"),
            "settle": lambda: charge.settle("charged"),
            "until": lambda: chain.until(lambda row: row.is_terminal),
            "steps": chain.steps,
            "fork": lambda: chain.fork("second"),
            "log": chain.log,
            "record": ask.record,
            "checkpoint_yaml": ask.checkpoint_yaml,
            "pause": ask.pause,
            "play": ask.play,
            "resume": lambda: ask.resume("an answer"),
            "result": ask.result,
            "outcome": ask.outcome,
            "history": ask.history,
            "kill": doomed.kill,
            "retry": heal.retry,
            "children": chain.children,
            "parent": chain.parent,
            "delete": chain.delete,
        }
        await each_is_a_fact(ProcessHandle, calls)
