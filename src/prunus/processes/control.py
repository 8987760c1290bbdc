"""Messages to a process: pause, play, kill, resume.

They are the body of a letter in the inbox of a process and the argument of `Process.receive`. On the way they are
opaque bytes: `encode_message` and `decode_message`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from prunus.errors import ProtocolError

DEFAULT_GRACE_S = 10.0
"""How long a killed step may clean up before it is abandoned."""


class Pause(msgspec.Struct, frozen=True, tag="pause", omit_defaults=True):
    """Take no further step. A step that runs is not interrupted."""

    reason: str | None = None


class Play(msgspec.Struct, frozen=True, tag="play", omit_defaults=True):
    """Go on after a pause; undoes a pause that has not taken effect yet."""


class Kill(msgspec.Struct, frozen=True, tag="kill", omit_defaults=True):
    """End the process as KILLED. A step that runs is cancelled at its next await."""

    message: str | None = None
    force: bool = False
    """Do not wait for the step to clean up."""
    grace_s: float = DEFAULT_GRACE_S
    """Seconds that the step has to clean up."""


class Resume(msgspec.Struct, frozen=True, tag="resume", omit_defaults=True):
    """End the wait of a suspended process. Its callback gets `value` if the message has one."""

    value: Any = None
    has_value: bool = False


Message = Pause | Play | Kill | Resume

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode_message(message: Message) -> bytes:
    """The message as bytes. Raises `TypeError` if the value of a `Resume` is not made of plain data."""
    return _encoder.encode(message)


def decode_message(body: bytes) -> Message:
    """The message that `encode_message` has encoded; `ProtocolError` for any other bytes."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"this is no message to a process: {error}") from error
