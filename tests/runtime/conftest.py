"""A daemon without a network, for the tests of the runtime."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from prunus.testing.local_daemon import LocalDaemon


@pytest.fixture
async def daemon() -> AsyncIterator[LocalDaemon]:
    """One worker and a controller."""
    async with LocalDaemon() as daemon:
        yield daemon
