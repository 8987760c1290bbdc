"""Which connections the code that asks has: those of its worker, or of the profile that is meant here.

A worker makes its `Connections` from the configuration of its profile, and every process that it drives asks them. A
process that is executed alone (`Process.execute`, `prunus.run`) asks those of the profile of this folder or user, which
are made when they are first asked, and closed with the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import weakref
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

from prunus.runtime.remote.endpoints import opener_of, read_endpoints
from prunus.runtime.remote.queue import Request, ResourceQueue
from prunus.runtime.remote.transport import Transport


class Connections(ResourceQueue[Transport]):
    """The endpoints of a profile. ``async with Connections({...}):`` makes them those of the code inside.

    `endpoints` is what `prunus.runtime.remote.endpoints` describes; raises `ProfileError` for what is wrong with it.
    Paths in it begin in `base`.
    """

    def __init__(self, endpoints: Mapping[str, Mapping[str, Any]], base: Path | None = None) -> None:
        folder = base or Path.cwd()
        read = read_endpoints(endpoints)
        super().__init__({name: (opener_of(name, endpoint, folder), endpoint) for name, endpoint in read.items()})
        self._tokens: list[contextvars.Token[Connections | None]] = []

    def use(self) -> contextvars.Token[Connections | None]:
        """Make them those of this context, and of all that begins in it."""
        return _current.set(self)

    async def __aenter__(self) -> Connections:
        self._tokens.append(self.use())
        return self

    async def __aexit__(self, *_: object) -> None:
        _current.reset(self._tokens.pop())
        await self.close()


def connection(endpoint: str) -> Request[Transport]:
    """Ask for the connection to an endpoint: ``async with prunus.connection("cluster") as host:``, in an async step.

    Waits for its turn. If the connection can't be opened it raises `EndpointUnavailableError`; a step that lets that
    pass is blocked: the process is paused with the reason, and `play` tries again.
    """
    return (_current.get() or _of_this_loop()).request(endpoint)


_current: contextvars.ContextVar[Connections | None] = contextvars.ContextVar("prunus.connections", default=None)

_of_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Connections, AsyncGenerator[None, None]]]
_of_loops = weakref.WeakKeyDictionary()
"""Those of code that no worker runs, and what closes them when their loop is closed."""


def _of_this_loop() -> Connections:
    from prunus.runtime.profile import Profile

    loop = asyncio.get_running_loop()
    found = _of_loops.get(loop)
    if found is None:
        profile = Profile.find()
        connections = Connections(profile.config.endpoints, profile.path)
        closing = _close_with_loop(connections)
        # A loop that shuts down closes the asynchronous generators that have begun in it.
        with contextlib.suppress(StopIteration):
            closing.__anext__().send(None)
        found = _of_loops[loop] = connections, closing
    return found[0]


async def _close_with_loop(connections: Connections) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await connections.close()
