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

Each name is imported when it is first used: what talks to a daemon (`connect`, `connect_sync`, `Profile` ...)
brings the transport and the configuration along, and a script that only defines processes does not pay for it;
the command line does not pay for processes that it does not run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.errors import (
        BlobDamagedError,
        BlobNotFoundError,
        BusyError,
        CheckpointCorruptError,
        CheckpointIncompatibleError,
        CheckpointNotFoundError,
        CommandFailedError,
        CommunicatorClosedError,
        ConnectionLostError,
        DaemonError,
        DeadLetterError,
        DuplicateSubscriberError,
        EndpointUnavailableError,
        Failure,
        ForkedProcessError,
        IndeterminateError,
        InvalidInputError,
        InvalidStateError,
        InvalidStepError,
        InvalidTransitionError,
        KeyRefusedError,
        MessageTooLargeError,
        MessagingError,
        NotDeliveredError,
        NotPermittedError,
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
        StepBlockedError,
        StepTimeoutError,
        StoreFullError,
        TaskDeletedError,
        TaskRejectedError,
        TransportError,
        TransportLostError,
        UnknownResourceError,
        UnroutableError,
        UnsavableValueError,
    )
    from prunus.messaging.communicator import Communicator
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
    from prunus.processes.options import BatchOptions, LaunchOptions
    from prunus.runtime.blocking import BlockingController, BlockingHandle, BlockingSelection, connect_sync
    from prunus.runtime.connecting import communicator, communicator_sync
    from prunus.runtime.controller import ProcessController, ProcessHandle, connect
    from prunus.runtime.following import WatchEvent
    from prunus.runtime.profile import Profile
    from prunus.runtime.remote import connection
    from prunus.runtime.schedules import Schedule
    from prunus.runtime.selection import BulkReport, ProcessSelection

__version__ = "0.1.0"

_HOMES: dict[str, tuple[str, ...]] = {
    "prunus.errors": (
        "BlobDamagedError",
        "BlobNotFoundError",
        "BusyError",
        "CheckpointCorruptError",
        "CheckpointIncompatibleError",
        "CheckpointNotFoundError",
        "CommandFailedError",
        "CommunicatorClosedError",
        "ConnectionLostError",
        "DaemonError",
        "DeadLetterError",
        "DuplicateSubscriberError",
        "EndpointUnavailableError",
        "Failure",
        "ForkedProcessError",
        "IndeterminateError",
        "InvalidInputError",
        "InvalidStateError",
        "InvalidStepError",
        "InvalidTransitionError",
        "KeyRefusedError",
        "MessageTooLargeError",
        "MessagingError",
        "NotDeliveredError",
        "NotPermittedError",
        "PersistenceError",
        "ProcessClassNotFoundError",
        "ProcessError",
        "ProcessExceptedError",
        "ProcessKilledError",
        "ProfileError",
        "ProtocolError",
        "PrunusError",
        "RemoteError",
        "RuntimeFailure",
        "ShuttingDownError",
        "SpecError",
        "StaleOwnerError",
        "StepBlockedError",
        "StepTimeoutError",
        "StoreFullError",
        "TaskDeletedError",
        "TaskRejectedError",
        "TransportError",
        "TransportLostError",
        "UnknownResourceError",
        "UnroutableError",
        "UnsavableValueError",
    ),
    "prunus.messaging.communicator": ("Communicator",),
    "prunus.processes": (
        "AttributeDict",
        "Child",
        "Continue",
        "DidNotHappen",
        "ExitCode",
        "Happened",
        "InputPort",
        "Kill",
        "Line",
        "MapResults",
        "OutputPort",
        "PlayState",
        "PortNamespace",
        "Process",
        "ProcessListener",
        "ProcessResult",
        "ProcessSpec",
        "ProcessState",
        "RetryPolicy",
        "Stop",
        "ToContext",
        "Transition",
        "Wait",
        "WorkChain",
        "WorkChainSpec",
        "append_",
        "execute",
        "if_",
        "message",
        "query",
        "return_",
        "run",
        "sleep",
        "step",
        "until",
        "update",
        "while_",
    ),
    "prunus.processes.functions": ("process",),
    "prunus.processes.options": (
        "BatchOptions",
        "LaunchOptions",
    ),
    "prunus.runtime.blocking": (
        "BlockingController",
        "BlockingHandle",
        "BlockingSelection",
        "connect_sync",
    ),
    "prunus.runtime.connecting": (
        "communicator",
        "communicator_sync",
    ),
    "prunus.runtime.controller": (
        "ProcessController",
        "ProcessHandle",
        "connect",
    ),
    "prunus.runtime.following": ("WatchEvent",),
    "prunus.runtime.profile": ("Profile",),
    "prunus.runtime.remote": ("connection",),
    "prunus.runtime.schedules": ("Schedule",),
    "prunus.runtime.selection": (
        "BulkReport",
        "ProcessSelection",
    ),
}
"""The modules of the public names."""

_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("errors", "processes")
"""Modules that are there without an import of their own."""

__all__ = [
    "AttributeDict",
    "BatchOptions",
    "BlobDamagedError",
    "BlobNotFoundError",
    "BlockingController",
    "BlockingHandle",
    "BlockingSelection",
    "BulkReport",
    "BusyError",
    "CheckpointCorruptError",
    "CheckpointIncompatibleError",
    "CheckpointNotFoundError",
    "Child",
    "CommandFailedError",
    "Communicator",
    "CommunicatorClosedError",
    "ConnectionLostError",
    "Continue",
    "DaemonError",
    "DeadLetterError",
    "DidNotHappen",
    "DuplicateSubscriberError",
    "EndpointUnavailableError",
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
    "KeyRefusedError",
    "Kill",
    "LaunchOptions",
    "Line",
    "MapResults",
    "MessageTooLargeError",
    "MessagingError",
    "NotDeliveredError",
    "NotPermittedError",
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
    "ProcessSelection",
    "ProcessSpec",
    "ProcessState",
    "Profile",
    "ProfileError",
    "ProtocolError",
    "PrunusError",
    "RemoteError",
    "RetryPolicy",
    "RuntimeFailure",
    "Schedule",
    "ShuttingDownError",
    "SpecError",
    "StaleOwnerError",
    "StepBlockedError",
    "StepTimeoutError",
    "Stop",
    "StoreFullError",
    "TaskDeletedError",
    "TaskRejectedError",
    "ToContext",
    "Transition",
    "TransportError",
    "TransportLostError",
    "UnknownResourceError",
    "UnroutableError",
    "UnsavableValueError",
    "Wait",
    "WatchEvent",
    "WorkChain",
    "WorkChainSpec",
    "__version__",
    "append_",
    "communicator",
    "communicator_sync",
    "connect",
    "connect_sync",
    "connection",
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
    if name in _MODULES:
        return importlib.import_module(f"prunus.{name}")
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
