"""What all tests share: short temporary folders, and the check that a test leaves nothing behind."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

JOIN_S = 2.0
"""How long a thread of ours may take to end after the test that started it."""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder whose path is short: the path of a Unix socket in it stays under 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="pr-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Every thread of Prunus (they are named so) ends with the test that started it."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("prunus")]
    for thread in left:
        thread.join(JOIN_S)
    assert not [thread.name for thread in left if thread.is_alive()]


@pytest.fixture(autouse=True)
def _logging_stays_on() -> Iterator[None]:
    """Who turns logging off turns it on again: other tests read what is logged."""
    yield
    assert logging.root.manager.disable == 0


@pytest.fixture(scope="session", autouse=True)
def _no_process_is_left() -> Iterator[None]:
    """Every process that the tests start ends with them."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [child for child in set(psutil.Process().children(recursive=True)) - before if child.is_running()]
    assert not [child.cmdline() for child in left if child.status() != psutil.STATUS_ZOMBIE]
