"""Prunus: workflow state machines that survive.

::

    from prunus import Process, WorkChain, run

    class Double(Process):
        @classmethod
        def define(cls, spec):
            super().define(spec)
            spec.input("x", valid_type=int)
            spec.output("y", valid_type=int)

        async def run(self):
            self.out("y", 2 * self.inputs.x)

    print(run(Double, {"x": 21}).outputs.y)     # alone, in this thread

    async with prunus.connect() as controller:  # by the daemon: survives this script, and a crash
        handle = await controller.launch(Double, {"x": 21})
        print((await handle.result()).outputs.y)

All that defines and runs a process alone is imported at once. What talks to a daemon (`connect`,
`connect_sync`, `Profile` ...) brings the transport and the configuration along, so it is imported when
it is first used: a script that only defines processes does not pay for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from prunus.errors import (
    BusyError,
    CheckpointCorruptError,
    CheckpointIncompatibleError,
    CheckpointNotFoundError,
    CommunicatorClosedError,
    ConnectionLostError,
    DaemonError,
    DuplicateSubscriberError,
    Failure,
    ForkedProcessError,
    IndeterminateError,
    InvalidInputError,
    InvalidStateError,
    InvalidStepError,
    InvalidTransitionError,
    MessageTooLargeError,
    MessagingError,
    NotDeliveredError,
    PersistenceError,
    ProcessClassNotFoundError,
    ProcessError,
    ProcessExceptedError,
    ProcessKilledError,
    ProfileError,
    ProtocolError,
    PrunusError,
    RemoteError,
    RuntimeFailure,
    ShuttingDownError,
    SpecError,
    StaleOwnerError,
    StepTimeoutError,
    StoreFullError,
    TaskRejectedError,
    UnroutableError,
    UnsavableValueError,
)
from prunus.processes import (
    AttributeDict,
    Child,
    Continue,
    DidNotHappen,
    ExitCode,
    Happened,
    InputPort,
    Kill,
    Line,
    MapResults,
    OutputPort,
    PlayState,
    PortNamespace,
    Process,
    ProcessListener,
    ProcessResult,
    ProcessSpec,
    ProcessState,
    RetryPolicy,
    Stop,
    ToContext,
    Transition,
    Wait,
    WorkChain,
    WorkChainSpec,
    append_,
    execute,
    if_,
    message,
    query,
    return_,
    run,
    sleep,
    step,
    until,
    update,
    while_,
)
from prunus.processes.functions import process

if TYPE_CHECKING:
    from prunus.messaging.communicator import Communicator
    from prunus.runtime.controller import ProcessController, ProcessHandle, connect, connect_sync
    from prunus.runtime.profile import Profile

__version__ = "0.1.0"

_LAZY = {
    "Communicator": "prunus.messaging.communicator",
    "ProcessController": "prunus.runtime.controller",
    "ProcessHandle": "prunus.runtime.controller",
    "Profile": "prunus.runtime.profile",
    "connect": "prunus.runtime.controller",
    "connect_sync": "prunus.runtime.controller",
}
"""Public names that are imported when they are first used, and where they live."""

__all__ = [
    "AttributeDict",
    "BusyError",
    "CheckpointCorruptError",
    "CheckpointIncompatibleError",
    "CheckpointNotFoundError",
    "Child",
    "Communicator",
    "CommunicatorClosedError",
    "ConnectionLostError",
    "Continue",
    "DaemonError",
    "DidNotHappen",
    "DuplicateSubscriberError",
    "ExitCode",
    "Failure",
    "ForkedProcessError",
    "Happened",
    "IndeterminateError",
    "InputPort",
    "InvalidInputError",
    "InvalidStateError",
    "InvalidStepError",
    "InvalidTransitionError",
    "Kill",
    "Line",
    "MapResults",
    "MessageTooLargeError",
    "MessagingError",
    "NotDeliveredError",
    "OutputPort",
    "PersistenceError",
    "PlayState",
    "PortNamespace",
    "Process",
    "ProcessClassNotFoundError",
    "ProcessController",
    "ProcessError",
    "ProcessExceptedError",
    "ProcessHandle",
    "ProcessKilledError",
    "ProcessListener",
    "ProcessResult",
    "ProcessSpec",
    "ProcessState",
    "Profile",
    "ProfileError",
    "ProtocolError",
    "PrunusError",
    "RemoteError",
    "RetryPolicy",
    "RuntimeFailure",
    "ShuttingDownError",
    "SpecError",
    "StaleOwnerError",
    "StepTimeoutError",
    "Stop",
    "StoreFullError",
    "TaskRejectedError",
    "ToContext",
    "Transition",
    "UnroutableError",
    "UnsavableValueError",
    "Wait",
    "WorkChain",
    "WorkChainSpec",
    "__version__",
    "append_",
    "connect",
    "connect_sync",
    "execute",
    "if_",
    "message",
    "process",
    "query",
    "return_",
    "run",
    "sleep",
    "step",
    "until",
    "update",
    "while_",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
