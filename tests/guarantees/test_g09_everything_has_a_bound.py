"""G9: credits, sizes and queues have bounds, and each bound says what happens there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunus import Process, errors
from prunus.messaging.communicator import MAX_BODY_BYTES
from prunus.persistence.persister import (
    KEPT_STEPS,
    MAX_LETTERS,
    MAX_LOG_LINES,
    MAX_MAIL,
    MAX_REPLIES,
    QUERY_LIMIT,
    LogLine,
    NewProcess,
    Query,
    Reply,
    Save,
)
from prunus.persistence.sqlite import ProcessStore, open_database
from prunus.processes.fanout import MAX_LISTED_ITEMS
from prunus.processes.machine import MAX_UNTOLD_LINES
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import features, workflows
from tests.runtime.waiting import file_has


async def test_a_worker_never_holds_more_than_its_slots(tmp_path: Path) -> None:
    """Ten endless processes, three slots: three have begun, seven wait in the queue."""
    file = tmp_path / "begun"
    async with LocalDaemon(workers=1, slots=3) as daemon:
        handles = [await daemon.controller.launch(workflows.Endless, {"begun": str(file)}) for _ in range(10)]
        await file_has(file, 3)
        statistics = await daemon.controller.broker_statistics()
        queue = statistics["queues"]["default"]
        assert (queue["held"], queue["ready"]) == (3, 7)
        assert statistics["delivered"] == 3, "more are not even offered"
        await asyncio.gather(*(handle.kill() for handle in handles))


async def test_an_input_that_is_too_large_is_refused_before_it_is_sent() -> None:
    """The size and the limit are named, and nothing is launched."""
    async with LocalDaemon() as daemon:
        with pytest.raises(errors.MessageTooLargeError) as caught:
            await daemon.controller.launch(workflows.Journal, {"file": "x" * (MAX_BODY_BYTES + 2**21)})
        assert caught.value.size > caught.value.limit
        assert not await daemon.controller.find()


@pytest.mark.parametrize(
    ("process_class", "inputs", "named"),
    [
        (workflows.Heavy, {"what": "output"}, r"outputs\.thing \(17,825,797 bytes\)"),
        (workflows.Heavy, {"what": "result"}, r"state\.result"),
        (workflows.Heavy, {"what": "effect"}, r"done\.compute"),
        (workflows.Heavy, {"what": "argument"}, r"state\.args"),
        (workflows.Heavy, {"what": "log"}, "its log"),
        (workflows.HeavyContext, {}, r"context\.points"),
    ],
)
async def test_what_is_too_large_for_a_checkpoint_excepts_the_process(
    process_class: type[Process], inputs: dict[str, str], named: str
) -> None:
    """What it is, how large it is and what to do is in its error; it is not set aside."""
    async with LocalDaemon() as daemon:
        handle = await daemon.controller.launch(process_class, inputs)
        with pytest.raises(errors.ProcessExceptedError, match=f"{named}.*keep the data in a file"):
            await handle.result()
        record = await handle.record()
        assert (record.aside, record.owner) == (None, None)


async def test_a_parent_learns_of_a_child_that_was_too_large_for_its_checkpoint() -> None:
    """It does not wait for ever."""
    async with LocalDaemon() as daemon:
        handle = await daemon.controller.launch(workflows.Carrier)
        assert "outputs.thing" in (await handle.result()).outputs.heard


async def test_a_parent_whose_children_are_too_large_together_excepts() -> None:
    """What they came to reaches it, and is then too large for its own checkpoint: it does not wait for ever."""
    async with LocalDaemon() as daemon:
        handle = await daemon.controller.launch(workflows.Convoy)
        with pytest.raises(errors.ProcessExceptedError, match=r"state\.args.*keep the data in a file"):
            await handle.result()


async def test_a_body_of_one_byte_too_many_is_refused() -> None:
    """Of a question, a broadcast and a call: before it is sent, and with the same limit."""
    async with LocalDaemon(workers=0) as daemon:
        communicator = daemon.controller._backend.communicator
        body = bytes(MAX_BODY_BYTES + 1)
        sends = [
            communicator.rpc_send("nobody", body),
            communicator.broadcast_send(body),
            communicator.call([body]),
        ]
        for send in sends:
            with pytest.raises(errors.MessageTooLargeError) as caught:
                await send
            assert (caught.value.size, caught.value.limit) == (MAX_BODY_BYTES + 1, MAX_BODY_BYTES)


async def test_a_query_has_a_limit() -> None:
    """More than the bound can't be asked for at once."""
    async with LocalDaemon() as daemon:
        with pytest.raises(ValueError, match=str(QUERY_LIMIT)):
            await daemon.controller.find(Query(limit=QUERY_LIMIT + 1))


@pytest.fixture
def store() -> Iterator[ProcessStore]:
    """With a process that is held under epoch 1."""
    connection = open_database(":memory:")
    store = ProcessStore(connection)
    store.create(NewProcess(pid="p", class_id="a:B", checkpoint=b"0", created_at=0.0))
    store.claim("p", "worker", at=0.0)
    yield store
    connection.close()


def saved(store: ProcessStore, **facts: Any) -> None:
    store.save(Save(pid="p", epoch=1, state="running", checkpoint=b"1", **facts))


def count(store: ProcessStore, table: str) -> int:
    [number] = store._connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(number)


def test_letters_and_messages_have_a_bound_and_more_are_refused(store: ProcessStore) -> None:
    """The error names the process and the number; one that is dealt with makes room for another."""
    for _ in range(MAX_LETTERS):
        store.post("p", b"letter")
    with pytest.raises(errors.BusyError, match=f"process p has {MAX_LETTERS} letters"):
        store.post("p", b"one more")
    for _ in range(MAX_MAIL):
        store.send("p", "note", b"mail", at=0.0)
    with pytest.raises(errors.BusyError, match=f"process p has {MAX_MAIL} messages"):
        store.send("p", "note", b"one more", at=0.0)
    assert (count(store, "inbox"), count(store, "mail")) == (MAX_LETTERS, MAX_MAIL)
    saved(store, inbox_done=1, consumed=(1,))
    store.post("p", b"one more")
    store.send("p", "note", b"one more", at=0.0)


def test_of_lines_answers_and_steps_the_newest_are_kept(store: ProcessStore) -> None:
    """A process that runs for years says what it says, and the database does not grow."""
    for block in range(12):
        lines = tuple(LogLine(at=0.0, text=f"{block}.{number}") for number in range(MAX_LOG_LINES // 10))
        saved(store, lines=lines)
    assert MAX_LOG_LINES <= count(store, "line") <= MAX_LOG_LINES * 1.1
    [last], _ = store.log("p", last=1)
    assert last.text == f"11.{MAX_LOG_LINES // 10 - 1}"
    for number in range(1, MAX_REPLIES + 11):
        saved(store, replies=(Reply(seq=number, body=b"answer"),))
    assert count(store, "reply") == MAX_REPLIES
    assert store.reply("p", 10)[0] is None
    assert store.reply("p", 11)[0] == b"answer"
    for number in range(KEPT_STEPS + 10):
        saved(store, keep_as=f"step {number}")
    assert [past.step for past in store.past("p")[0]] == [f"step {number}" for number in range(10, KEPT_STEPS + 10)]


async def test_a_list_that_is_mapped_over_has_a_bound() -> None:
    """It would be in every checkpoint; the error names the bound and what to do instead."""
    async with LocalDaemon() as daemon:
        handle = await daemon.controller.launch(features.TooMany)
        with pytest.raises(errors.ProcessExceptedError, match=f"more than {MAX_LISTED_ITEMS} .* give a method"):
            await handle.result()


async def test_what_a_process_says_before_anybody_listens_has_a_bound() -> None:
    """The oldest lines are lost first."""
    process = workflows.Add({"a": 1})
    for number in range(MAX_UNTOLD_LINES + 5):
        process.report(f"line {number}")
    lines = process.take_lines()
    assert len(lines) == MAX_UNTOLD_LINES
    assert lines[0].text == "line 5"
