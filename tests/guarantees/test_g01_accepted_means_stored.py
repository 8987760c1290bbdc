"""G1: a send is confirmed only when the task would survive a power cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunus.messaging.exchange import Exchange
from prunus.messaging.messages import Hello, Peer, TaskSend, TaskStored, Welcome, decode_from_broker, encode
from prunus.persistence import open_database
from tests.guarantees.real_daemon import RealDaemon
from tests.runtime import features, workflows

ROUTE = "route"


class PowerCut(BaseException):
    """The machine stops at this point."""


def opened(path: Path, dies_at: str | None = None) -> Exchange[str]:
    def failpoint(name: str) -> None:
        if name == dies_at:
            raise PowerCut

    exchange: Exchange[str] = Exchange(open_database(path, exclusive=False), failpoint=failpoint)
    return exchange


def hello(exchange: Exchange[str]) -> None:
    exchange.failpoint, kept = (lambda name: None), exchange.failpoint
    [(_, frame)] = exchange.process(0.0, [(ROUTE, encode(Hello(session="client", peer=Peer())))])
    assert isinstance(decode_from_broker(frame), Welcome)
    exchange.failpoint = kept


def send(exchange: Exchange[str]) -> list[object]:
    frames = exchange.process(1.0, [(ROUTE, encode(TaskSend(id=1, task="t1", body=b"work")))])
    return [decode_from_broker(frame) for _, frame in frames]


def tasks(exchange: Exchange[str]) -> list[str]:
    return [name for [name] in exchange._connection.execute("SELECT id FROM broker_task")]


@pytest.mark.parametrize(("dies_at", "survives"), [("before_commit", []), ("after_commit", ["t1"])])
def test_nothing_is_confirmed_before_the_commit(tmp_path: Path, dies_at: str, survives: list[str]) -> None:
    """Whenever the machine stops, the client has heard nothing; said again, the task is stored once and confirmed."""
    path = tmp_path / "prunus.db"
    exchange = opened(path, dies_at)
    hello(exchange)
    with pytest.raises(PowerCut):
        send(exchange)
    exchange._connection.close()
    again = opened(path)
    assert tasks(again) == survives
    hello(again)
    assert send(again) == [TaskStored(id=1, task="t1", stored=True)]
    assert tasks(again) == ["t1"]
    again._connection.close()


def test_a_commit_is_on_the_disk(tmp_path: Path) -> None:
    """`synchronous` is FULL (2), in WAL mode: SQLite returns from COMMIT after fsync."""
    connection = open_database(tmp_path / "prunus.db")
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


@pytest.mark.timeout(90)
async def test_every_accepted_launch_survives_the_death_of_its_broker(short_folder: Path) -> None:
    """SIGKILL the moment that a launch is accepted, five times: all of them are there, and run."""
    async with RealDaemon(short_folder, workers=0) as daemon:
        handles = []
        for number in range(5):
            handles.append(await daemon.controller.launch(workflows.Add, {"a": number}))
            daemon.kill("broker")
            daemon.start("broker")
        assert {row.pid for row in await daemon.controller.find()} == {handle.pid for handle in handles}
        daemon.start("worker-1")
        assert [(await handle.result()).outputs.sum for handle in handles] == [1, 2, 3, 4, 5], daemon.logs()


@pytest.mark.timeout(60)
async def test_every_message_survives_the_death_of_its_broker(short_folder: Path) -> None:
    """SIGKILL the moment that `send` has returned, three times: all are there, in their order, and are used once."""
    journal = short_folder / "journal"
    async with RealDaemon(short_folder, workers=0) as daemon:
        handle = await daemon.controller.launch(features.Ledger, {"file": str(journal), "count": 6})
        for number in range(3):
            await handle.send("entry", 2 * number)
            await handle.send("entry", 2 * number + 1)
            daemon.kill("broker")
            daemon.start("broker")
        assert (await handle.record()).mail == 6
        daemon.start("worker-1")
        assert (await handle.result()).outputs.entries == [0, 1, 2, 3, 4, 5], daemon.logs()
        assert (await handle.record()).mail == 0
    assert len(journal.read_text().splitlines()) == 6
