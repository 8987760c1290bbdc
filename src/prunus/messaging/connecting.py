"""From an endpoint or a key to a communicator."""

from __future__ import annotations

import asyncio
import os

from prunus.errors import ConnectionLostError, KeyRefusedError
from prunus.messaging.communicator import CONNECT_TIMEOUT_S
from prunus.messaging.keys import ClientKey
from prunus.messaging.threaded import ThreadedCommunicator, Transport
from prunus.messaging.unix import UnixTransport


async def connect_to(
    endpoint: str | os.PathLike[str] | ClientKey, *, name: str = "peer", timeout_s: float = CONNECT_TIMEOUT_S
) -> ThreadedCommunicator:
    """A communicator at the broker that serves `endpoint`; leave it with `close` or ``async with``.

    `endpoint` is ``ipc://`` and a path; or the key for a broker on a network, or the file of one. Raises
    `ConnectionLostError` if no broker answers within `timeout_s`, and as soon as one answers `KeyRefusedError` if it
    does not take this key, `BusyError` if one of its bounds is reached, `ProtocolError` if it speaks another language;
    `ProfileError` for an impossible endpoint or a file that is no key.
    """
    if isinstance(endpoint, str) and "://" in endpoint:
        return await _connected(UnixTransport(endpoint), endpoint, name, timeout_s)
    from prunus.messaging.zeromq import NetworkTransport  # here, so that who stays on one host needs no ZeroMQ

    key = endpoint if isinstance(endpoint, ClientKey) else ClientKey.read(endpoint)
    where, transport = ", ".join(key.endpoints), NetworkTransport(key)
    try:
        return await _connected(transport, where, name, timeout_s)
    except ConnectionLostError as error:
        if transport.refusal is not None:
            raise KeyRefusedError(where, transport.refusal) from error
        raise


async def _connected(transport: Transport, where: str, name: str, timeout_s: float) -> ThreadedCommunicator:
    """Once the broker knows it, or says that it will not."""
    communicator = ThreadedCommunicator(transport, where, name)
    try:
        await communicator.connected(timeout_s)
    except BaseException:  # also cancelled: the thread must not stay
        await asyncio.shield(communicator.close())
        raise
    return communicator
