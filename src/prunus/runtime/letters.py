"""Control messages and their answers as bytes: the bodies of letters, of replies, and of questions to a worker.

The form is that of the checkpoint codec, so that every value which a process can keep can also be sent to it.
"""

from __future__ import annotations

from typing import Any

from prunus.errors import Failure, PersistenceError, ProcessClassNotFoundError, ProtocolError
from prunus.persistence.checkpoint import LoadType, decode_data, encode_data
from prunus.processes import Message, control


def encode_letter(message: Message) -> bytes:
    """Raises `UnsavableValueError` for a value that has no form."""
    return encode_data(control.to_data(message), where=message.type)


def decode_letter(body: bytes, load_type: LoadType | None = None) -> Message:
    """What `encode_letter` has encoded; `ProtocolError` for any other bytes."""
    try:
        return control.from_data(decode_data(body, load_type))
    except (PersistenceError, ProcessClassNotFoundError) as error:
        raise ProtocolError(f"this is no message to a process: {error}") from error


def encode_answer(value: Any = None, failure: Failure | None = None) -> bytes:
    """A value or a failure. A value that has no form becomes the failure that says so."""
    try:
        return encode_data({"value": value, "failure": failure}, where="the answer")
    except PersistenceError as error:
        return encode_data({"value": None, "failure": Failure.of(error)})


def decode_answer(body: bytes, load_type: LoadType | None = None) -> Any:
    """The value that was answered; raises the failure."""
    answer = decode_data(body, load_type)
    failure = answer["failure"]
    if failure is not None:
        raise failure.to_exception()
    return answer["value"]
