"""From an endpoint or a key to a communicator."""

from __future__ import annotations

import asyncio
import os

from prunus.errors import ConnectionLostError, KeyRefusedError, ProfileError
from prunus.messaging.arguments import check_patience, check_peer_name
from prunus.messaging.communicator import CONNECT_TIMEOUT_S
from prunus.messaging.keys import ClientKey
from prunus.messaging.threaded import ThreadedCommunicator, Transport
from prunus.messaging.unix import UnixTransport


async def connect_to(
    endpoint: str | os.PathLike[str] | ClientKey, *, name: str = "peer", timeout_s: float = CONNECT_TIMEOUT_S
) -> ThreadedCommunicator:
    """A communicator at the broker that serves `endpoint`; leave it with `close` or ``async with``.

    `endpoint` is ``ipc://`` and a path; or the key for a broker on a network, or the file of one. `name` is how its
    session begins in statistics: up to 167 of the letters A to Z and a to z, digits, and ``_.:-``. Raises
    `ConnectionLostError` if no broker answers within `timeout_s`, and as soon as one answers `KeyRefusedError` if it
    does not take this key, `BusyError` if one of its bounds is reached, `ProtocolError` if it speaks another language;
    `ProfileError` for an impossible endpoint or a file that is no key.
    """
    check_peer_name(name)
    check_patience(timeout_s)
    if not isinstance(endpoint, str | os.PathLike | ClientKey):
        raise TypeError(
            f"a broker is named by its endpoint (ipc:// and a path), a key or the file of one, not by {endpoint!r:.100}"
        )
    if isinstance(endpoint, str) and endpoint.startswith("tcp://"):
        raise ProfileError(
            f"a broker on a network, as {endpoint}, is reached with a key, which says where it is: give the file that "
            "`prunus key add` wrote"
        )
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
