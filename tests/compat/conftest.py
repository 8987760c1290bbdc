"""A broker for each test, and communicators at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prunus.compat.kiwipy import PrunusCommunicator
from tests.compat.parts import Broker, Stack


@pytest.fixture
def broker(short_folder: Path) -> Iterator[Broker]:
    broker = Broker(short_folder)
    yield broker
    broker.stop()


@pytest.fixture
def connect(broker: Broker) -> Iterator[Stack]:
    stack = Stack(broker.endpoint)
    yield stack
    stack.close()


@pytest.fixture
def communicator(connect: Stack) -> PrunusCommunicator:
    return connect()
