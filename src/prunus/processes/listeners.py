"""Listeners: who is told what happens in a process, where it runs.

A listener belongs to a living process object: it is added with `Process.add_listener`, or named in the class as
``listeners = (MyListener(),)`` so that it listens wherever a process of the class runs. It is never saved. One that
raises is logged and disturbs nobody. (From outside, and across restarts, listen to `ProcessController.events`.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.processes.machine import Transition
    from prunus.processes.process import Process


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the log of a process."""

    at: float
    """Wall clock, seconds since 1970."""
    level: str
    """``REPORT``, or a level of `logging`."""
    text: str
    step: str | None = None
    """The step that said it."""
    source: str | None = None
    """A process that was called inside the step, if that said it."""


class ProcessListener:
    """Override what you want to hear of. The methods are called where it happens, so they must be quick."""

    def on_transition(self, process: Process, transition: Transition) -> None:
        """The state or the play state has changed."""

    def on_output(self, process: Process, name: str, value: Any) -> None:
        """A step has emitted an output. (It counts when the step ends well.)"""

    def on_paused(self, process: Process) -> None:
        """It is PAUSED now."""

    def on_played(self, process: Process) -> None:
        """It is PLAYING again."""

    def on_report(self, process: Process, line: Line) -> None:
        """It has said something: `Process.report`, or its logger."""

    def on_progress(self, process: Process, progress: float | None, detail: str | None) -> None:
        """A step has said how far it is: `Process.heartbeat`."""
