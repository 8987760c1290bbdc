"""G7: a failure crosses wires and restarts as what it is, and is a different type from success."""

from __future__ import annotations

import pickle

import msgspec
import pytest

from prunus import errors
from prunus.errors import Failure
from prunus.processes import Process
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import workflows

EXAMPLES: list[errors.PrunusError] = [
    errors.InvalidTransitionError("killed", "play"),
    errors.InvalidStateError("waiting", "playing"),
    errors.InvalidInputError("pkg:Cls", {"inputs.a": "is missing", "inputs.b.c": "is not an int"}),
    errors.SpecError("an outline without a step"),
    errors.ProcessKilledError("pid", "enough"),
    errors.ProcessExceptedError("pid", Failure(type="ValueError", message="no", traceback="tb")),
    errors.InvalidStepError("Cls", "fit", "returned nonsense"),
    errors.StepTimeoutError("fit", 2.5, "it did not end"),
    errors.CheckpointNotFoundError("pid"),
    errors.CheckpointCorruptError("checksum"),
    errors.CheckpointIncompatibleError(9, 1),
    errors.UnsavableValueError("outputs.x", "object"),
    errors.StaleOwnerError("pid", 3),
    errors.StoreFullError("prunus.db"),
    errors.CommunicatorClosedError(),
    errors.ConnectionLostError("ipc://somewhere"),
    errors.UnroutableError("nobody"),
    errors.BusyError("too many"),
    errors.TaskRejectedError("not mine"),
    errors.NotDeliveredError("nobody"),
    errors.IndeterminateError("key"),
    errors.DuplicateSubscriberError("name"),
    errors.ProtocolError("nonsense"),
    errors.MessageTooLargeError(17, 16),
    errors.ProcessClassNotFoundError("pkg:Cls", "it is gone"),
    errors.ProfileError("no profile"),
    errors.DaemonError("no daemon"),
    errors.ShuttingDownError("worker"),
    errors.ForkedProcessError("communicator"),
    errors.DeadLetterError("task", "out of attempts"),
    errors.TaskDeletedError("task", "deleted by hand"),
    errors.UnknownResourceError("gpu", 2, None),
    errors.NotPermittedError("viewer", "send tasks"),
    errors.KeyRefusedError("tcp://broker:1", "does not know the key"),
    errors.BlobNotFoundError("ab" * 32),
    errors.BlobDamagedError("ab" * 32),
    errors.EndpointUnavailableError("cluster", 5, "no route"),
    errors.ArchiveError("it is no archive"),
    errors.TransportLostError("cluster", "the connection broke"),
    errors.CommandFailedError("cluster", "squeue", 1, "no such option"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_of_the_tree_survives_the_wire(error: errors.PrunusError) -> None:
    """Same type, same text, same facts."""
    data = msgspec.msgpack.encode(Failure.of(error))
    again = msgspec.msgpack.decode(data, type=Failure).to_exception()
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.facts() == error.facts()


@pytest.mark.parametrize(
    "error", [*EXAMPLES, errors.RemoteError(Failure("ValueError", "no"))], ids=lambda error: type(error).__name__
)
def test_an_error_of_the_tree_can_be_pickled(error: errors.PrunusError) -> None:
    """A program that computes in several processes of its own may return it, or raise it there."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.args, again.facts()) == (str(error), error.args, error.facts())


def test_every_error_of_the_tree_has_an_example() -> None:
    """The list above is complete (`RemoteError` is what the others become)."""
    concrete = {kind for kind in errors._BY_NAME.values() if not kind.__subclasses__()}
    assert concrete - {type(error) for error in EXAMPLES} == {errors.RemoteError}


def test_any_other_error_becomes_a_remote_error_with_its_causes() -> None:
    """Type, message, traceback and the chain of causes; nothing is imported on the word of a message."""
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise OSError("outer") from inner
    except OSError as outer:
        failure = Failure.of(outer)
    error = failure.to_exception()
    assert isinstance(error, errors.RemoteError)
    assert error.failure.cause is not None
    assert (error.failure.type, error.failure.cause.type) == ("OSError", "KeyError")
    assert "raise KeyError" in error.failure.cause.traceback


def test_a_forged_failure_calls_nothing() -> None:
    """A name that is not in our tree, or facts that do not fit, give a `RemoteError`."""
    for kind in ("os.system", "prunus.errors.Failure", "prunus.errors.nothing", "builtins.eval"):
        assert isinstance(Failure(type=kind, message="x").to_exception(), errors.RemoteError)
    assert isinstance(Failure(type="prunus.errors.StaleOwnerError", message="").to_exception(), errors.RemoteError)


def test_an_error_that_cant_be_shown_is_still_an_error() -> None:
    """A broken `__str__` does not hide the failure."""

    class Rude(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    assert "can't be shown" in Failure.of(Rude()).message


@pytest.mark.parametrize("text", ["x" * 20_000_000, "can't read \udcff"], ids=["long", "surrogate"])
async def test_an_error_with_any_text_ends_its_process(text: str) -> None:
    """One that is too long for a message, and one that UTF-8 can't say, are cut or escaped: nothing waits for ever."""

    class Fails(Process):
        async def run(self) -> None:
            raise ValueError(text)

    process = Fails()
    await process.step()
    await process.step()
    failure = process.result().failure
    assert failure is not None
    assert failure.type == "ValueError"
    assert failure.message.startswith(text[:10])
    assert len(msgspec.msgpack.encode(failure)) < 100_000


async def test_a_failed_process_stays_failed_for_everybody() -> None:
    """Its result raises, its outcome has the failure, and no caller gets None for it."""
    async with LocalDaemon() as daemon:
        handle = await daemon.controller.launch(workflows.Boom)
        with pytest.raises(errors.ProcessExceptedError):
            await handle.result()
        outcome = await handle.outcome()
    assert outcome is not None
    assert outcome.failure is not None
    assert not outcome.successful
