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
    StoreFullError,
    TaskRejectedError,
    UnroutableError,
    UnsavableValueError,
)
from prunus.processes import (
    AttributeDict,
    Child,
    Continue,
    InputPort,
    Kill,
    OutputPort,
    PlayState,
    PortNamespace,
    Process,
    ProcessResult,
    ProcessSpec,
    ProcessState,
    Stop,
    ToContext,
    Wait,
    WorkChain,
    WorkChainSpec,
    append_,
    execute,
    if_,
    return_,
    run,
    while_,
)

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
    "DuplicateSubscriberError",
    "Failure",
    "ForkedProcessError",
    "IndeterminateError",
    "InputPort",
    "InvalidInputError",
    "InvalidStateError",
    "InvalidTransitionError",
    "Kill",
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
    "ProcessResult",
    "ProcessSpec",
    "ProcessState",
    "Profile",
    "ProfileError",
    "ProtocolError",
    "PrunusError",
    "RemoteError",
    "RuntimeFailure",
    "ShuttingDownError",
    "SpecError",
    "StaleOwnerError",
    "Stop",
    "StoreFullError",
    "TaskRejectedError",
    "ToContext",
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
    "return_",
    "run",
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
