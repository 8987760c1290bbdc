"""Who did what, as each process saw it: one file per process, one line per event, whole or not there.

A line is one `write` to a file opened with ``O_APPEND``: what was written before a SIGKILL is there after it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

Kind = Literal["invoke", "ok", "fail", "unknown", "result", "delivery", "ack", "accepted", "stale"]
"""
=========  ==========================================================================================
invoke     a client begins to send the task with this body
ok         it was confirmed, under this task id
fail       it was refused: it had no effect
unknown    nobody knows
result     the client got the task's result
delivery   a worker got this task under this epoch
ack        a worker says that it is done (request `request` of its session)
accepted   the broker said to this acknowledgement: done
stale      the broker said: not yours, changed nothing
=========  ==========================================================================================
"""


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    kind: Kind
    who: str
    body: str = ""
    task: str = ""
    epoch: int = 0
    session: str = ""
    request: int = 0
    reason: str = ""


_decoder = msgspec.json.Decoder(Event)


class Journal:
    """The one of this process."""

    def __init__(self, file: Path, who: str) -> None:
        self.who = who
        self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, event: Event) -> None:
        os.write(self._descriptor, msgspec.json.encode(event) + b"\n")


class Journals:
    """All of a folder, read as they grow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.events: list[Event] = []

    def read(self) -> list[Event]:
        """What is new; it is in `events` from now on. The order within a file is that of its process."""
        new: list[Event] = []
        for file in sorted(self._folder.glob("*.journal")):
            with file.open("rb") as handle:
                handle.seek(self._read.get(file, 0))
                text = handle.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[file] = self._read.get(file, 0) + len(whole)
            new += [_decoder.decode(line) for line in whole.splitlines()]
        self.events += new
        return new
