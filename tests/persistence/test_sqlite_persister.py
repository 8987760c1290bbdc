"""A persister over its own file: group commit, a full disk, a broken one, a kill -9, a fork, and the end."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from prunus.errors import CheckpointNotFoundError, ForkedProcessError, PersistenceError, StoreFullError
from prunus.persistence import MemoryPersister, SqlitePersister, sqlite
from prunus.persistence.database import open_database, wal_bytes
from prunus.persistence.persister import Created, Effects, Query
from prunus.testing.persister_contract import new, save_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "processes.db"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[sqlite3.Connection]:
    """The connections that persisters open, so that a test can put obstacles in their way."""
    connections: list[sqlite3.Connection] = []

    def open_and_tell(path: str) -> sqlite3.Connection:
        connections.append(open_database(path))
        return connections[-1]

    monkeypatch.setattr(sqlite, "open_database", open_and_tell)
    return connections


def store_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prunus-store")]


class TestGroupCommit:
    async def test_saves_that_arrive_together_are_one_commit(self, path: Path) -> None:
        """64 at once need a few commits (each an fsync), not 64."""
        async with SqlitePersister(path) as persister:
            await asyncio.gather(*(persister.create(new(f"p{i}")) for i in range(64)))
            claims = await asyncio.gather(*(persister.claim(f"p{i}", "w", at=0.0) for i in range(64)))
            before = persister.statistics()
            await asyncio.gather(*(persister.save(save_of(claim)) for claim in claims))
            after = persister.statistics()
        assert after.requests - before.requests == 64
        assert after.commits - before.commits <= 8

    async def test_one_that_is_refused_does_not_disturb_the_others(self, path: Path) -> None:
        """It leaves no trace in the commit that it shares."""
        async with SqlitePersister(path) as persister:
            await persister.create(new("p"))
            claim = await persister.claim("p", "w", at=0.0)
            answers = await asyncio.gather(
                persister.create(new("a")),
                persister.save(save_of(claim, "waiting", waits=(("nobody",),), children=(new("c"),))),
                persister.create(new("b")),
                return_exceptions=True,
            )
            assert (answers[0], answers[2]) == (Created("a", is_new=True), Created("b", is_new=True))
            assert isinstance(answers[1], CheckpointNotFoundError)
            assert [record.pid for record in await persister.query(Query())] == ["b", "a", "p"]

    async def test_what_arrives_in_order_is_done_in_order(self, path: Path) -> None:
        """Also within one commit."""
        async with SqlitePersister(path) as persister:
            await asyncio.gather(*(persister.create(new(f"p{i:03}")) for i in range(300)))
            records = await persister.query(Query(limit=300))
            assert [record.pid for record in records] == [f"p{i:03}" for i in reversed(range(300))]

    async def test_the_log_is_kept_short(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Over its bound it is copied back."""
        monkeypatch.setattr(sqlite, "WAL_LIMIT_BYTES", 100_000)
        async with SqlitePersister(path) as persister:
            for i in range(20):
                await persister.create(new(f"p{i}", checkpoint=bytes(20_000)))
            assert wal_bytes(path) <= 200_000
            assert path.stat().st_size > 200_000  # noqa: ASYNC240


class TestEffects:
    @pytest.mark.parametrize(
        "make", [lambda path, **k: SqlitePersister(path, **k), lambda path, **k: MemoryPersister(**k)]
    )
    async def test_effects_are_told_in_the_loop_after_the_commit(
        self, path: Path, make: Callable[..., SqlitePersister | MemoryPersister]
    ) -> None:
        """Who is told finds it to be true; nothing is told when nothing became runnable or called."""
        told: list[tuple[Effects, threading.Thread]] = []
        async with make(
            path, on_effects=lambda effects: told.append((effects, threading.current_thread()))
        ) as persister:
            await persister.create(new("p"))
            await persister.create(new("p"))
            await persister.post("p", b"x")
            await persister.claim("p", "w", at=0.0)
        here = threading.current_thread()
        assert told == [(Effects(runnable=("p",)), here), (Effects(called=("p",)), here)]


class TestTrouble:
    async def test_a_full_disk_refuses_and_recovers(self, path: Path, opened: list[sqlite3.Connection]) -> None:
        """What does not fit is refused with the path and leaves no trace; with space again, all goes on."""
        async with SqlitePersister(path) as persister:
            await persister.create(new("p"))
            claim = await persister.claim("p", "w", at=0.0)
            [connection] = opened
            [pages] = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages}")
            for _ in range(2):
                with pytest.raises(StoreFullError) as caught:
                    await persister.save(save_of(claim, checkpoint=bytes(100_000)))
                assert caught.value.path == str(path)
            assert (await persister.load("p")).checkpoint == b"first"
            connection.execute("PRAGMA max_page_count = 1000000")
            await persister.save(save_of(claim, checkpoint=bytes(100_000)))
            assert len((await persister.load("p")).checkpoint or b"") == 100_000

    async def test_after_a_failed_commit_nothing_is_answered_any_more(
        self, path: Path, opened: list[sqlite3.Connection]
    ) -> None:
        """Nobody knows what the disk holds: that request and all later ones fail, and nothing is done."""
        async with SqlitePersister(path) as persister:
            await persister.create(new("p"))
            [connection] = opened

            def deny_commit(action: int, argument: str | None, *_: object) -> int:
                commit = action == sqlite3.SQLITE_TRANSACTION and argument == "COMMIT"
                return sqlite3.SQLITE_DENY if commit else sqlite3.SQLITE_OK

            connection.set_authorizer(deny_commit)
            answers = await asyncio.gather(
                persister.create(new("a")), persister.create(new("b")), return_exceptions=True
            )
            assert all(isinstance(answer, PersistenceError) for answer in answers)
            connection.set_authorizer(None)
            with pytest.raises(PersistenceError, match="failed before"):
                await persister.create(new("c"))
        async with SqlitePersister(path) as persister:
            assert [record.pid for record in await persister.query(Query())] == ["p"]

    async def test_a_caller_that_gives_up_disturbs_nobody(self, path: Path) -> None:
        """Its request is done all the same: it may have happened, as always when one does not wait for the answer."""
        async with SqlitePersister(path) as persister:
            task = asyncio.create_task(persister.create(new("p")))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await persister.create(new("q"))).is_new
            assert len(await persister.query(Query())) == 2

    async def test_a_file_that_can_not_be_opened_is_said_at_once(self, path: Path) -> None:
        """And no thread is left."""
        path.write_text("dear diary" * 100)  # noqa: ASYNC240
        with pytest.raises(PersistenceError, match="no database"):
            async with SqlitePersister(path):
                raise AssertionError
        for thread in store_threads():
            thread.join(5)
        assert store_threads() == []

    async def test_what_was_confirmed_survives_kill_9(self, path: Path) -> None:
        """A program that saves as fast as it can is killed: the last confirmed save is there, or a later one."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            SAVING,
            str(path),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        )
        assert process.stdout is not None
        confirmed = 0
        while confirmed < 100:
            confirmed = int(await process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        for line in (await process.stdout.read()).split(b"\n")[:-1]:
            confirmed = int(line)
        await process.wait()
        async with SqlitePersister(path) as persister:
            record = await persister.load("p")
            assert confirmed <= record.seq <= confirmed + 1
            assert record.checkpoint == str(record.seq).encode()

    async def test_a_forked_child_can_not_use_it(self, path: Path) -> None:
        """The thread and the locks are the parent's."""
        async with SqlitePersister(path) as persister:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", DeprecationWarning
                )  # newer Pythons warn of forking with threads: just so
                child = os.fork()
            if child == 0:  # no event loop here: one step of each coroutine must be enough to be refused
                status = 1
                try:
                    for coroutine in (persister.load("p"), persister.close()):
                        try:
                            coroutine.send(None)
                        except ForkedProcessError:
                            continue
                        break
                    else:
                        status = 0
                finally:
                    os._exit(status)
            _, status = os.waitpid(child, 0)  # noqa: ASYNC222
            assert os.waitstatus_to_exitcode(status) == 0
            assert (await persister.create(new("p"))).is_new


SAVING = """
import asyncio, sys
from prunus.persistence import NewProcess, Save, SqlitePersister

async def main():
    async with SqlitePersister(sys.argv[1]) as persister:
        await persister.create(NewProcess(pid="p", class_id="a:B", checkpoint=b"", created_at=0.0))
        claim = await persister.claim("p", "w", at=0.0)
        number = 0
        while True:
            number += 1
            save = Save(pid="p", epoch=claim.epoch, state="running", checkpoint=str(number).encode())
            print((await persister.save(save)).seq, flush=True)

asyncio.run(main())
"""


class TestEnd:
    async def test_closing_finishes_what_was_asked(self, path: Path) -> None:
        """It is idempotent, leaves no thread and no log, and later requests are refused."""
        persister = SqlitePersister(path)
        with pytest.raises(PersistenceError, match="not open"):
            await persister.load("p")
        async with persister:
            asked = [asyncio.create_task(persister.create(new(f"p{i}"))) for i in range(600)]
            await asyncio.sleep(0)
            await asyncio.gather(persister.close(), persister.close())
        assert all(await asyncio.gather(*asked))
        for thread in store_threads():
            thread.join(5)
        assert store_threads() == []
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        with pytest.raises(PersistenceError, match="not open"):
            await persister.load("p1")

    async def test_what_was_kept_is_there_again(self, path: Path) -> None:
        """Also when the same object is opened again."""
        persister = SqlitePersister(path)
        async with persister:
            await persister.create(new("p"))
        async with persister:
            assert (await persister.load("p")).checkpoint == b"first"

    async def test_several_loops_may_use_it(self, path: Path) -> None:
        """Each gets its answers in its own."""
        async with SqlitePersister(path) as persister:
            made = await asyncio.to_thread(lambda: asyncio.run(persister.create(new("p"))))
            assert made.is_new
            assert (await persister.load("p")).pid == "p"
