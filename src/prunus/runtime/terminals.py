"""What can be done on the terminal that a command writes to. Free of `rich`, so that asking costs nothing."""

from __future__ import annotations

import os
from typing import IO

DUMB = ("dumb", "unknown")
"""Terminals (by `TERM`) that know neither colours nor movements of a cursor."""


def is_dumb() -> bool:
    return os.environ.get("TERM", "").lower() in DUMB


def can_redraw(stream: IO[str]) -> bool:
    """Whether what was written to it can be written over: it is a terminal, and not a dumb one."""
    return stream.isatty() and not is_dumb()
