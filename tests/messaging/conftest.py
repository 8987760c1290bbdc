"""A local broker, and peers of it."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from prunus.messaging.local import LocalBroker, LocalCommunicator
from prunus.testing.communicator_contract import ContractService


@pytest.fixture
async def broker() -> AsyncIterator[LocalBroker]:
    """With everything in memory, and the service of the contract."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    broker = LocalBroker(connection, service=ContractService(connection))
    yield broker
    broker.close()
    connection.close()


@pytest.fixture
async def peers(broker: LocalBroker) -> AsyncIterator[Callable[[], Awaitable[LocalCommunicator]]]:
    """Each call is one more; they are closed at the end."""
    async with AsyncExitStack() as stack:

        async def connect() -> LocalCommunicator:
            communicator = await broker.connect()
            stack.push_async_callback(communicator.close)
            return communicator

        yield connect
