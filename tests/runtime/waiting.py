"""Waiting for what other processes do, without guessing how long it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from prunus.persistence.persister import Record
from prunus.runtime.controller import ProcessHandle

POLL_S = 0.005


async def until(handle: ProcessHandle, holds: Callable[[Record], bool]) -> Record:
    """The row of a process as soon as a condition holds of it."""
    return await handle._controller._until(handle.pid, holds)


async def file_has(file: Path, lines: int) -> list[str]:
    """The lines of a file as soon as it has that many. A file has no event to wait for, so this looks again."""
    while len(found := _lines_of(file)) < lines:
        await asyncio.sleep(POLL_S)
    return found


def _lines_of(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
