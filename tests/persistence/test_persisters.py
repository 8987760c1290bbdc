"""Every persister of Prunus keeps the contract of the seam."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from prunus.errors import Failure, PrunusError
from prunus.persistence import MemoryPersister, ProcessStore, RequestPersister, SqlitePersister, open_database
from prunus.persistence.persister import Persister
from prunus.persistence.requests import execute
from prunus.testing.persister_contract import PersisterContract


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
