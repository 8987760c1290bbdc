"""From an endpoint or a key to a communicator."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from prunus.errors import ConnectionLostError, KeyRefusedError
from prunus.messaging.communicator import CONNECT_TIMEOUT_S
from prunus.messaging.keys import ClientKey
from prunus.messaging.threaded import ThreadedCommunicator, Transport
from prunus.messaging.unix import UnixTransport

if TYPE_CHECKING:
    from prunus.messaging.zeromq import NetworkTransport


async def connect_to(
    endpoint: str | os.PathLike[str] | ClientKey, *, name: str = "peer", timeout_s: float = CONNECT_TIMEOUT_S
) -> ThreadedCommunicator:
    """A communicator at the broker that serves `endpoint`; leave it with `close` or ``async with``.

    `endpoint` is ``ipc://`` and a path; or the key for a broker on a network, or the file of one. Raises
    `ConnectionLostError` if no broker answers within `timeout_s`, `KeyRefusedError` if one does but does not take this
    key, `ProfileError` for an impossible endpoint or a file that is no key.
    """
    if isinstance(endpoint, str) and "://" in endpoint:
        return await _connected(UnixTransport(endpoint), endpoint, name, timeout_s)
    from prunus.messaging.zeromq import NetworkTransport  # here, so that who stays on one host needs no ZeroMQ

    key = endpoint if isinstance(endpoint, ClientKey) else ClientKey.read(endpoint)
    where, transport = ", ".join(key.endpoints), NetworkTransport(key)
    try:
        return await _connected(transport, where, name, timeout_s, transport)
    except ConnectionLostError as error:
        if transport.refusal is not None:
            raise KeyRefusedError(where, transport.refusal) from error
        raise


async def _connected(
    transport: Transport, where: str, name: str, timeout_s: float, network: NetworkTransport | None = None
) -> ThreadedCommunicator:
    """Once the broker knows it; at once `ConnectionLostError` if the broker of a network says that it will not."""
    loop, unknown = asyncio.get_running_loop(), asyncio.Event()

    def on_unknown_key() -> None:
        loop.call_soon_threadsafe(unknown.set)

    if network is not None:
        network.on_unknown_key = on_unknown_key
    communicator = ThreadedCommunicator(transport, where, name)
    connected = asyncio.ensure_future(communicator.connected(timeout_s))
    refused = asyncio.ensure_future(unknown.wait())
    try:
        await asyncio.wait([connected, refused], return_when=asyncio.FIRST_COMPLETED)
        if not connected.done():
            raise ConnectionLostError(where)
        await connected
    except BaseException:  # also cancelled: the thread must not stay
        connected.cancel()
        await asyncio.shield(communicator.close())
        raise
    finally:
        refused.cancel()
        if network is not None:
            network.on_unknown_key = lambda: None
    return communicator
