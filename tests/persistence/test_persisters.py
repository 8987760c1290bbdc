"""Every persister of Prunus keeps the contract of the seam."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from prunus.errors import ArchiveError, BusyError, Failure, PrunusError
from prunus.persistence import MemoryPersister, Portion, ProcessStore, RequestPersister, SqlitePersister, open_database
from prunus.persistence.persister import PORTION_BYTES, Persister
from prunus.persistence.requests import execute
from prunus.testing import PersisterContract
from prunus.testing.persister_contract import new, save_of


class TestMemoryPersister(PersisterContract):
    @pytest.fixture
    async def persister(self) -> AsyncIterator[Persister]:
        async with MemoryPersister() as persister:
            yield persister


class TestSqlitePersister(PersisterContract):
    @pytest.fixture
    async def persister(self, tmp_path: Path) -> AsyncIterator[Persister]:
        async with SqlitePersister(tmp_path / "processes.db") as persister:
            yield persister


class TestRequestPersister(PersisterContract):
    """Over a store that is reached by bytes alone, as behind a broker; errors cross as `Failure`s."""

    @pytest.fixture
    async def persister(self) -> AsyncIterator[Persister]:
        connection = open_database(":memory:")
        store = ProcessStore(connection)

        async def send(request: bytes) -> bytes:
            connection.execute("BEGIN")
            try:
                answer, _ = execute(store, request)
            except PrunusError as error:
                connection.execute("ROLLBACK")
                raise Failure.of(error).to_exception() from None
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
            return answer

        yield RequestPersister(send)
        connection.close()


async def test_what_is_refused_is_said_with_what_to_do() -> None:
    """The contract wants the type of the error and the name of what is wrong; these are our words."""
    async with MemoryPersister() as persister:
        await persister.create(new())
        claim = await persister.claim("p", "w", at=2.0)
        for number in range(2):
            await persister.send("p", "m", bytes(PORTION_BYTES), at=float(number))
        first = await persister.export("p")
        assert first.kept is not None
        await persister.save(save_of(claim, consumed=(1,)))
        with pytest.raises(BusyError, match="try again, or pause it first"):
            await persister.export("p", first.next)
        asleep = replace(first.kept, record=replace(first.kept.record, pid="q", state="asleep"))
        await persister.stage("arrival", 0, [Portion(pid="q", kept=asleep)])
        with pytest.raises(ArchiveError, match="does not fit together; export it again"):
            await persister.adopt("arrival", 1, "far")
