"""What can go wrong, on one screen, and `Failure`: an error as data.

::

    PrunusError
      ProcessError        InvalidTransitionError · InvalidStateError · InvalidInputError · SpecError
                          InvalidStepError · StepTimeoutError · ProcessKilledError · ProcessExceptedError
                          StepBlockedError (it can't go on for now) · EndpointUnavailableError
      PersistenceError    CheckpointNotFoundError · CheckpointCorruptError · CheckpointIncompatibleError
                          UnsavableValueError · StaleOwnerError · StoreFullError · ArchiveError
      MessagingError      CommunicatorClosedError (you closed it) · ConnectionLostError (it broke)
                          UnroutableError · BusyError · TaskRejectedError
                          NotDeliveredError (no effect) · IndeterminateError (may have happened)
                          DuplicateSubscriberError · ProtocolError · MessageTooLargeError · RemoteError
                          DeadLetterError · TaskDeletedError · UnknownResourceError · NotPermittedError
                          KeyRefusedError · BlobNotFoundError · BlobDamagedError
      RuntimeFailure      ProcessClassNotFoundError · ProfileError · DaemonError · ShuttingDownError
                          ForkedProcessError · TransportError · TransportLostError · CommandFailedError

Library code raises only these (and ``TypeError``/``ValueError`` for misuse at a call site). A kill passes
through user code as `asyncio.CancelledError`, a ``BaseException``, so that ``except Exception`` can't
swallow it.

Every error keeps its facts as attributes. The names of the attributes are the names of the constructor's
arguments, so that an error of this tree survives the wire: `Failure.of` takes the facts along and
`Failure.to_exception` builds the same error on the other side. Any other exception comes back as a
`RemoteError`: nothing is imported or called on the word of a message.
"""

from __future__ import annotations

import copyreg
import traceback as _traceback
from collections.abc import Mapping
from typing import Any

import msgspec

MAX_CAUSES = 8
"""How many links of a chain of causes a `Failure` keeps."""

MAX_MESSAGE_CHARS = 32_000
"""A longer text of an error keeps its beginning."""
MAX_TRACEBACK_CHARS = 32_000
"""A longer traceback keeps its end, where the reason stands."""


class PrunusError(Exception):
    """The base of every error that Prunus raises on purpose."""

    def facts(self) -> dict[str, Any]:
        """The constructor's arguments by name, all of them JSON-like."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


# --- processes --------------------------------------------------------------------------------------


class ProcessError(PrunusError):
    """Something about one process."""


class InvalidTransitionError(ProcessError):
    """The state machine has no such move; nothing was changed."""

    def __init__(self, state: str, command: str) -> None:
        self.state, self.command = state, command
        super().__init__(f"a process that is {state.upper()} can't {command}")


class InvalidStateError(ProcessError):
    """The operation needs the process to be in another state."""

    def __init__(self, state: str, needed: str) -> None:
        self.state, self.needed = state, needed
        super().__init__(f"the process is {state.upper()}; it has to be {needed}")


class InvalidInputError(ProcessError):
    """Values do not fit a spec: every problem at once, by dotted port (``inputs.cell.a``)."""

    def __init__(self, process_class: str, problems: Mapping[str, str]) -> None:
        self.process_class, self.problems = process_class, dict(problems)
        lines = "".join(f"\n  {port}: {problem}" for port, problem in self.problems.items())
        super().__init__(f"{process_class} does not accept these values:{lines}")


class SpecError(ProcessError):
    """A process class is defined wrongly: its ports, its outline or its steps."""


class InvalidStepError(ProcessError):
    """A step, a predicate or a follow-up did what it must not: which one, of which class, and what was expected."""

    def __init__(self, process_class: str, step: str, problem: str) -> None:
        self.process_class, self.step, self.problem = process_class, step, problem
        super().__init__(f"{process_class}.{step} {problem}")


class StepTimeoutError(ProcessError):
    """A step was cancelled because it took too long, or was silent for too long."""

    def __init__(self, step: str, timeout_s: float, problem: str) -> None:
        self.step, self.timeout_s, self.problem = step, timeout_s, problem
        super().__init__(f"the step {step} was cancelled: {problem} within {timeout_s:g} s")


class StepBlockedError(ProcessError):
    """Raised by a step that can't go on for now, through no fault of its own: the process is paused with the reason.

    It stays intact, before that step, and `play` takes the step again. It is no failed attempt of a `RetryPolicy`.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class EndpointUnavailableError(StepBlockedError):
    """No connection to a host could be opened, in several attempts."""

    def __init__(self, endpoint: str, attempts: int, reason: str) -> None:
        super().__init__(reason)
        self.endpoint, self.attempts = endpoint, attempts
        times = {0: "", 1: " in one attempt"}.get(attempts, f" in {attempts} attempts")
        self.args = (f"no connection to {endpoint!r}{times}: {reason}",)


class ProcessKilledError(ProcessError):
    """The result was asked for, but the process was killed."""

    def __init__(self, pid: str, message: str | None = None) -> None:
        self.pid, self.message = pid, message
        super().__init__(f"process {pid} was killed" + (f": {message}" if message else ""))


class ProcessExceptedError(ProcessError):
    """The result was asked for, but a step of the process raised."""

    def __init__(self, pid: str, failure: Failure) -> None:
        self.pid, self.failure = pid, failure
        super().__init__(f"process {pid} excepted: {failure}")


# --- persistence ------------------------------------------------------------------------------------


class PersistenceError(PrunusError):
    """Something about saving, loading or owning a process."""


class CheckpointNotFoundError(PersistenceError):
    """There is no process with this pid."""

    def __init__(self, pid: str) -> None:
        self.pid = pid
        super().__init__(f"there is no process {pid}; `prunus list` shows those that exist")


class CheckpointCorruptError(PersistenceError):
    """The bytes are not what was written: damaged on the way or on the disk."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the checkpoint is damaged ({reason}); restore it from a backup")


class CheckpointIncompatibleError(PersistenceError):
    """The checkpoint was written in a format that this version does not read."""

    def __init__(self, found: int, readable: int) -> None:
        self.found, self.readable = found, readable
        super().__init__(
            f"the checkpoint has format {found}, this Prunus reads up to format {readable}; upgrade Prunus"
        )


class UnsavableValueError(PersistenceError):
    """A value has no form in a checkpoint; raised before anything is written."""

    def __init__(self, where: str, type: str) -> None:
        self.where, self.type = where, type
        super().__init__(
            f"{where} holds a value of type {type}, which a checkpoint can't hold; "
            "keep a path, a number, a text, a dataclass or a collection of these instead"
        )


class StaleOwnerError(PersistenceError):
    """Another worker claimed the process since; this one must stop at once."""

    def __init__(self, pid: str, epoch: int) -> None:
        self.pid, self.epoch = pid, epoch
        super().__init__(f"process {pid} is no longer held under epoch {epoch}: another worker claimed it")


class StoreFullError(PersistenceError):
    """The disk is full: new work is refused, running work is kept."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"the disk that holds {path} is full; free some space and try again, nothing was lost")


class ArchiveError(PersistenceError):
    """Processes can't be exported or imported like this; nothing was changed."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


# --- messaging --------------------------------------------------------------------------------------


class MessagingError(PrunusError):
    """Something between two peers."""


class CommunicatorClosedError(MessagingError):
    """You closed this communicator."""

    def __init__(self) -> None:
        super().__init__("this communicator was closed")


class ConnectionLostError(MessagingError):
    """The broker does not answer."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        super().__init__(f"no broker answers at {endpoint}; {where_to_look(endpoint)}")


class UnroutableError(MessagingError):
    """Nobody is subscribed under this name; nothing was delivered."""

    def __init__(self, recipient: str) -> None:
        self.recipient = recipient
        super().__init__(f"nobody listens as {recipient!r}")


class BusyError(MessagingError):
    """A bound was reached; nothing was done. Try again later."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class TaskRejectedError(MessagingError):
    """Raised by a task's handler: not mine, give it to somebody else."""

    def __init__(self, reason: str = "rejected") -> None:
        self.reason = reason
        super().__init__(reason)


class NotDeliveredError(MessagingError):
    """The message was not delivered: it had no effect."""

    def __init__(self, recipient: str, reason: str | None = None) -> None:
        """`reason`: all of it in words."""
        self.recipient, self.reason = recipient, reason
        super().__init__(reason or f"the message to {recipient!r} was not delivered; it had no effect")


class IndeterminateError(MessagingError):
    """No answer came: the operation may or may not have happened."""

    def __init__(self, key: str, reason: str | None = None) -> None:
        """`reason`: all of it in words."""
        self.key, self.reason = key, reason
        super().__init__(reason or f"no answer came for {key!r}: it may or may not have happened")


class DuplicateSubscriberError(MessagingError):
    """This name has a subscriber already."""

    def __init__(self, identifier: str, here: bool = False) -> None:
        """`here`: in the same communicator."""
        self.identifier, self.here = identifier, here
        who = "this communicator is subscribed as {!r} already; cancel that subscription first"
        super().__init__((who if here else "somebody else is subscribed as {!r}").format(identifier))


class ProtocolError(MessagingError):
    """Bytes that are no message of ours, or a message that is out of place."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class MessageTooLargeError(MessagingError):
    """A message is over the limit; it was not sent."""

    def __init__(self, size: int, limit: int, largest: str | None = None) -> None:
        """`largest`: the part of a checkpoint that takes most of it, if it is one."""
        self.size, self.limit, self.largest = size, limit, largest
        what = f"a message of {size:,} bytes is"
        if largest is not None:
            what = f"{largest} is too much for a checkpoint: with it, {size:,} bytes are to be saved, which is"
        super().__init__(f"{what} over the limit of {limit:,}; keep the data in a file")


class DeadLetterError(MessagingError):
    """The task whose result was waited for is a dead letter: expired, out of attempts, or buried by hand."""

    def __init__(self, task: str, reason: str) -> None:
        self.task, self.reason = task, reason
        super().__init__(f"task {task} is a dead letter: {reason}; look at it with: prunus tasks --dead")


class TaskDeletedError(MessagingError):
    """The task whose result was waited for was deleted, or replaced by a later one with its key."""

    def __init__(self, task: str, reason: str) -> None:
        self.task, self.reason = task, reason
        super().__init__(f"task {task} was not done: it was {reason}")


class UnknownResourceError(MessagingError):
    """A task asks for a resource of which nobody has said how much there is, or for more than there is."""

    def __init__(self, resource: str, wanted: int, capacity: int | None) -> None:
        self.resource, self.wanted, self.capacity = resource, wanted, capacity
        known = "nobody has said how much of it there is" if capacity is None else f"there are {capacity}"
        super().__init__(
            f"a task asks for {wanted} of the resource {resource!r}, but {known}; "
            f"set it with: prunus broker resource {resource} NUMBER"
        )


class NotPermittedError(MessagingError):
    """The key with which this peer came does not allow that."""

    def __init__(self, role: str, what: str) -> None:
        self.role, self.what = role, what
        super().__init__(f"a {role} may not do that: {what}; use a key with another role (prunus key add --role ...)")


class KeyRefusedError(MessagingError):
    """A broker on a network is there, but does not take the key with which this peer came."""

    def __init__(self, endpoint: str, reason: str) -> None:
        self.endpoint, self.reason = endpoint, reason
        super().__init__(f"the broker at {endpoint} {reason}; ask its owner for a key (prunus key add NAME --role ...)")


class BlobNotFoundError(MessagingError):
    """The broker has no such blob: it was never put, or it was forgotten because no task referred to it."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        super().__init__(f"there is no blob {digest}; put it again, and send a task that refers to it within the hour")


class BlobDamagedError(MessagingError):
    """What is on the broker's disk under the name of this blob is not what was put; nobody gets it."""

    def __init__(self, digest: str) -> None:
        self.digest = digest
        super().__init__(
            f"the blob {digest} is damaged on the disk of the broker; restore it from a backup, or have it set aside "
            "(`prunus doctor --check-blobs --fix`) and put it again"
        )


class RemoteError(MessagingError):
    """The other side failed with an error that is not one of ours."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(str(failure))


# --- runtime ----------------------------------------------------------------------------------------


class RuntimeFailure(PrunusError):
    """Something about running processes: classes, profiles, daemons."""


class ProcessClassNotFoundError(RuntimeFailure):
    """A class that a process or one of its values needs can't be loaded here."""

    def __init__(self, identifier: str, reason: str) -> None:
        self.identifier, self.reason = identifier, reason
        super().__init__(f"the class {identifier!r} can't be loaded: {reason}")


class ProfileError(RuntimeFailure):
    """The profile does not exist, or can't be used as it is."""


class DaemonError(RuntimeFailure):
    """The daemon can't do what was asked."""


class ShuttingDownError(RuntimeFailure):
    """This part is stopping and takes nothing new."""

    def __init__(self, part: str) -> None:
        self.part = part
        super().__init__(f"the {part} is shutting down")


class ForkedProcessError(RuntimeFailure):
    """A handle was used in a forked child of the process that opened it."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"this {what} belongs to the parent of this forked process; open a new one here")


class TransportError(RuntimeFailure):
    """Something on a host that is reached by a transport failed: a file that is not there, a folder in the way."""

    def __init__(self, endpoint: str, reason: str) -> None:
        self.endpoint, self.reason = endpoint, reason
        super().__init__(f"{endpoint}: {reason}")


class TransportLostError(TransportError):
    """The connection to a host broke: what was under way there may or may not have happened."""


class CommandFailedError(RuntimeFailure):
    """A command on a host ended with an exit status that is not 0."""

    def __init__(self, endpoint: str, command: str, exit_status: int, stderr: str) -> None:
        self.endpoint, self.command, self.exit_status, self.stderr = endpoint, command, exit_status, stderr
        told = f": {stderr.strip()}" if stderr.strip() else ""
        super().__init__(f"{endpoint}: `{command}` ended with exit status {exit_status}{told}")


# --- errors as data ---------------------------------------------------------------------------------


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error that crosses wires and restarts; its own type, never mistaken for a result.

    `type` is ``module.QualName`` (just the name for built-ins), `facts` the attributes of an error of this
    tree, `cause` the error that led to it.
    """

    type: str
    message: str
    traceback: str = ""
    cause: Failure | None = None
    facts: dict[str, Any] = {}

    @classmethod
    def of(cls, error: BaseException, _depth: int = 0) -> Failure:
        """Describe `error`, its traceback and the chain of its causes. Never raises."""
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        try:
            message = str(error)
        except Exception:  # a user's broken __str__ must not hide the error
            message = "(the error's text can't be shown)"
        text = "".join(_traceback.format_exception(kind, error, error.__traceback__, chain=False))
        if len(message) > MAX_MESSAGE_CHARS:
            message = f"{message[:MAX_MESSAGE_CHARS]}... ({len(message):,} characters)"
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        facts = error.facts() if isinstance(error, PrunusError) and kind.__name__ in _BY_NAME else {}
        return cls(
            type=name,
            message=speakable(message),
            traceback=speakable(text[-MAX_TRACEBACK_CHARS:]),
            cause=cls.of(cause, _depth + 1) if cause is not None and _depth < MAX_CAUSES else None,
            facts=facts,
        )

    def to_exception(self) -> PrunusError:
        """The error of our tree that this describes, or a `RemoteError` that carries it."""
        module, _, name = self.type.rpartition(".")
        kind = _BY_NAME.get(name) if module == __name__ else None
        if kind is None:
            return RemoteError(self)
        facts = dict(self.facts)
        try:
            if "failure" in facts and not isinstance(facts["failure"], Failure):
                facts["failure"] = msgspec.convert(facts["failure"], Failure)
            return kind(**facts) if facts or kind.__init__ is CommunicatorClosedError.__init__ else kind(self.message)
        except (TypeError, msgspec.ValidationError):  # a peer of another version has other facts
            return RemoteError(self)

    def __str__(self) -> str:
        return f"{self.type.rpartition('.')[2]}: {self.message}" if self.message else self.type


def where_to_look(endpoint: str) -> str:
    """Why a broker may not answer."""
    if endpoint.startswith("tcp://"):
        return "does it run, and does the network let you reach its host?"
    return "is the daemon running? (`prunus daemon status`)"


def speakable(text: str) -> str:
    """`text` without what UTF-8 can't say, as in the name of a file that was written in another encoding."""
    return text.encode("utf-8", "backslashreplace").decode()


_BY_NAME: dict[str, type[PrunusError]] = {
    name: kind for name, kind in list(globals().items()) if isinstance(kind, type) and issubclass(kind, PrunusError)
}
"""Every error of the tree by name: the closed set that a message may rebuild."""
