"""Much that is large at once: whoever reads gets all of it, bit by bit, and is not taken for one that does not read."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from prunus.messaging import broker, exchange, queues, server
from prunus.messaging.communicator import IncomingTask
from prunus.messaging.connecting import connect_to
from tests.messaging.served import serving

SIZE = 200 * 1024
NUMBER = 64
PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them smaller, in the same proportion."""
    monkeypatch.setattr(server, "STUCK_BYTES", SIZE)
    monkeypatch.setattr(server, "MAX_BACKLOG_BYTES", 8 * SIZE)
    monkeypatch.setattr(queues, "MAX_GIVEN_BYTES", SIZE)
    monkeypatch.setattr(broker, "MAX_GIVEN_BYTES", SIZE)
    monkeypatch.setattr(exchange, "MAX_TOLD_BYTES", SIZE)


async def test_tasks_that_are_large_together_reach_their_worker(
    short_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However much credit it gave: each is delivered once, and the connection holds."""
    attempts: Counter[tuple[str, int]] = Counter()
    is_done = asyncio.Event()

    async def work(task: IncomingTask) -> None:
        attempts[task.id, task.attempt] += 1
        if len(attempts) == NUMBER:
            is_done.set()

    endpoint = f"ipc://{short_folder}/s"
    with serving(endpoint):
        async with await connect_to(endpoint) as sender, await connect_to(endpoint) as worker:
            for number in range(NUMBER):
                await sender.task_send(bytes([number]) * SIZE, queue="bulk")
            await worker.add_task_subscriber(work, queue="bulk", credit=NUMBER)
            async with asyncio.timeout(PATIENCE_S):
                await is_done.wait()
    assert set(attempts.values()) == {1}
    assert {attempt for _, attempt in attempts} == {1}
    assert "does not read" not in caplog.text


async def test_answers_that_are_large_together_reach_who_asked(
    short_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """However many questions it asks at once."""
    endpoint = f"ipc://{short_folder}/s"
    body = b"x" * SIZE
    with serving(endpoint):
        async with await connect_to(endpoint) as client:
            async with asyncio.timeout(PATIENCE_S):
                await client.call([b"add " + body])
                answers = await asyncio.gather(*(client.call([b"words"]) for _ in range(NUMBER)))
                await client.task_send(body, queue="bulk")
                listed = await asyncio.gather(*(client.tasks(queue="bulk", bodies=True) for _ in range(NUMBER)))
    assert {answer for [answer] in answers} == {body}
    assert {one.body for [one] in listed} == {body}
    assert "does not read" not in caplog.text
