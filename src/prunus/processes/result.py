"""What a terminated process leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic

import msgspec

from prunus.errors import Failure, ProcessExceptedError, ProcessKilledError
from prunus.processes.generics import OutputsT
from prunus.processes.namespaces import FrozenNamespace, freeze, thaw
from prunus.processes.states import ProcessState


class ProcessResult(msgspec.Struct, Generic[OutputsT], frozen=True):
    """The end of a process, as its parent, its launcher and its history see it.

    `outputs` may be read by attribute and by item, nested namespaces too. What is missing there raises an error that
    says why: the process may have excepted before it made that output.
    """

    pid: str
    state: ProcessState
    outputs: OutputsT = None  # type: ignore[assignment]
    """A `FrozenNamespace` (any mapping becomes one), with the attributes that the type of the outputs has."""
    exit_status: int | None = None
    """0 is a success; None if the process did not finish."""
    exit_message: str | None = None
    """With a process that was killed: why."""
    failure: Failure | None = None
    value: Any = None
    """What the last step returned, or the `result` of its `Stop`."""

    def __post_init__(self) -> None:
        if type(self.outputs) is not FrozenNamespace:
            outputs: Any = self.outputs or {}
            about = _About(self.pid, self.state, self.exit_status, self.exit_message, self.failure)
            msgspec.structs.force_setattr(self, "outputs", freeze(outputs, about))

    @property
    def successful(self) -> bool:
        """Whether it finished with exit status 0."""
        return self.state is ProcessState.FINISHED and self.exit_status == 0

    def raise_for_state(self) -> ProcessResult[OutputsT]:
        """Itself if the process finished; raises `ProcessExceptedError` or `ProcessKilledError` otherwise."""
        if self.state is _FINISHED:
            return self
        if self.state is ProcessState.KILLED:
            raise ProcessKilledError(self.pid, self.exit_message)
        if self.state is ProcessState.EXCEPTED:
            raise ProcessExceptedError(self.pid, self.failure or Failure(type="unknown", message=""))
        return self

    def to_data(self) -> dict[str, Any]:
        """Plain dictionaries, texts and numbers, and the user's own values in `outputs` and `value`."""
        outputs: Any = self.outputs
        return {
            "pid": self.pid,
            "state": self.state.value,
            "outputs": thaw(outputs),
            "exit_status": self.exit_status,
            "exit_message": self.exit_message,
            "failure": None if self.failure is None else msgspec.to_builtins(self.failure),
            "value": self.value,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> ProcessResult:
        """The result that `to_data` has described."""
        failure = data.get("failure")
        return cls(
            pid=data["pid"],
            state=ProcessState(data["state"]),
            outputs=data["outputs"],
            exit_status=data.get("exit_status"),
            exit_message=data.get("exit_message"),
            failure=None if failure is None else msgspec.convert(failure, Failure),
            value=data.get("value"),
        )

    def __str__(self) -> str:
        return _told(self.pid, self.state, self.exit_status, self.exit_message, self.failure)


_FINISHED = ProcessState.FINISHED  # (each result is asked for it; see `machine`)


class _About(msgspec.Struct, frozen=True):
    """How the error for an output that is missing begins; most results are never asked for one."""

    pid: str
    state: ProcessState
    exit_status: int | None
    exit_message: str | None
    failure: Failure | None

    def __str__(self) -> str:
        return f"{_told(*msgspec.structs.astuple(self))} and"


def _told(
    pid: str, state: ProcessState, exit_status: int | None, exit_message: str | None, failure: Failure | None
) -> str:
    why = f" ({failure})" if failure else f" ({exit_message})" if exit_message else ""
    status = f" with exit status {exit_status}" if exit_status else ""
    return f"process {pid} is {state.value.upper()}{status}{why}"
