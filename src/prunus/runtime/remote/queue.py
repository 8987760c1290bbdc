"""A queue for shared connections: processes ask by the name of an endpoint, and get the one that all of them use.

`prunus.runtime.remote.sharing` decides; here is what it decides about. A `ResourceQueue` belongs to one event loop.

Guarantees
- Who is cancelled while it waits leaves no trace; who is cancelled while it uses a connection has left it.
- A user of a connection that breaks gets the error of its own call. The next request opens a new connection.
- An opening is bounded by ``open_timeout_s``, a closing by `CLOSE_TIMEOUT_S`.
- No connection keeps the context of who asked first: a finished process is not kept alive by it.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from typing import Any, Generic, Literal, Protocol, TypeVar, assert_never

import msgspec

from prunus.errors import EndpointUnavailableError, ShuttingDownError
from prunus.runtime.remote.sharing import Close, GiveUp, Grant, Limits, LookAgain, Open, Share, decide

CLOSE_TIMEOUT_S = 10.0
"""A connection that does not close within this time is forgotten."""

logger = logging.getLogger(__name__)


class Resource(Protocol):
    """What can be shared."""

    @property
    def is_closed(self) -> bool:
        """Whether it is of no use any more: closed, or broken."""
        ...

    async def close(self) -> None:
        """End it."""
        ...


ResourceT = TypeVar("ResourceT", bound=Resource)
Opener = Callable[[], Awaitable[ResourceT]]
"""Opens a connection. What it raises is a reason to try again later; `EndpointUnavailableError` is one not to."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What goes on at one endpoint."""

    state: Literal["closed", "opening", "open", "backing off"]
    users: int
    waiting: int
    openings: int
    """Since the queue was made."""
    failures: int
    """Of the attempts that those who wait have seen."""
    reason: str | None
    """Of the last failure, until an opening succeeds."""


class ResourceQueue(Generic[ResourceT]):
    """See the module. `endpoints` says of each name how to open a connection, and with which limits."""

    def __init__(
        self,
        endpoints: Mapping[str, tuple[Opener[ResourceT], Limits]],
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._lines = {name: _Line(name, opener, limits, clock, chance) for name, (opener, limits) in endpoints.items()}

    def request(self, endpoint: str) -> Request[ResourceT]:
        """Ask for a connection: ``async with queue.request("cluster") as connection:``.

        Waits for its turn. Raises `EndpointUnavailableError` if there is no such endpoint or its connection can't be
        opened, and `ShuttingDownError` when the queue is closed.
        """
        return Request(endpoint, self._lines)

    def statistics(self) -> dict[str, Usage]:
        """What goes on, by endpoint."""
        return {name: line.usage() for name, line in self._lines.items()}

    async def close(self) -> None:
        """Close everything. Whoever waits gets `ShuttingDownError`. Idempotent."""
        await asyncio.gather(*(line.close() for line in self._lines.values()))


class Request(Generic[ResourceT]):
    """One use of a shared connection: ``async with`` it, or ``await`` it and `release` it."""

    def __init__(self, endpoint: str, lines: Mapping[str, _Line[ResourceT]]) -> None:
        self.endpoint = endpoint
        self._lines = lines
        self._held: _Held[ResourceT] | None = None

    async def __aenter__(self) -> ResourceT:
        if self._held is not None:
            raise RuntimeError(f"this request for {self.endpoint!r} is in use; make another one")
        line = self._lines.get(self.endpoint)
        if line is None:
            known = ", ".join(sorted(self._lines)) or "none"
            reason = f"there is no such endpoint (there are: {known}); name it in config.yaml under endpoints"
            raise EndpointUnavailableError(self.endpoint, 0, reason)
        self._held = await line.acquire()
        return self._held.resource

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def __await__(self) -> Generator[Any, None, ResourceT]:
        return self.__aenter__().__await__()

    def release(self) -> None:
        """Leave the connection to the others. Idempotent."""
        held, self._held = self._held, None
        if held is not None:
            self._lines[self.endpoint].leave(held)


class _Held(Generic[ResourceT]):
    """One connection, and how many use it."""

    def __init__(self, resource: ResourceT) -> None:
        self.resource = resource
        self.users = 0


class _Line(Generic[ResourceT]):
    """The connection to one endpoint, and those who wait for it."""

    def __init__(
        self,
        name: str,
        opener: Opener[ResourceT],
        limits: Limits,
        clock: Callable[[], float],
        chance: Callable[[], float],
    ) -> None:
        self._name, self._opener, self._limits = name, opener, limits
        self._clock, self._chance = clock, chance
        self._share = Share()
        self._held: _Held[ResourceT] | None = None
        self._waiting: dict[asyncio.Future[_Held[ResourceT]], None] = {}
        """In the order in which they came."""
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._openings = 0
        self._reason: str | None = None
        self._is_shut = False

    # --- for those who ask ----------------------------------------------------------------------------

    async def acquire(self) -> _Held[ResourceT]:
        if self._is_shut:
            raise ShuttingDownError("queue for connections")
        future: asyncio.Future[_Held[ResourceT]] = asyncio.get_running_loop().create_future()
        self._waiting[future] = None
        self._go_on()
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled() and future.exception() is None:  # granted at the same moment
                self.leave(future.result())
            raise
        finally:
            if future in self._waiting:
                del self._waiting[future]
                self._go_on()

    def leave(self, held: _Held[ResourceT]) -> None:
        held.users -= 1
        if held is self._held:
            self._share.idle_since_s = self._clock()
        self._go_on()

    def usage(self) -> Usage:
        share = self._share
        if self._held is not None:
            state: Literal["closed", "opening", "open", "backing off"] = "open"
        elif share.is_opening:
            state = "opening"
        else:
            state = "backing off" if self._waiting else "closed"
        return Usage(
            state=state,
            users=0 if self._held is None else self._held.users,
            waiting=len(self._waiting),
            openings=self._openings,
            failures=share.failures,
            reason=self._reason,
        )

    async def close(self) -> None:
        self._is_shut = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for future in self._waiting:
            if not future.done():
                future.set_exception(ShuttingDownError("queue for connections"))
        self._waiting.clear()
        if self._share.is_opening:
            for task in self._tasks:
                task.cancel()
        held, self._held = self._held, None
        if held is not None:
            self._start(self._end(held.resource))
        while self._tasks:
            await asyncio.wait(self._tasks)

    # --- what is decided ------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Do what is to be done now."""
        if self._is_shut:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        share, held = self._share, self._held
        while True:
            share.waiting = len(self._waiting)
            share.users = 0 if held is None else held.users
            share.is_open = held is not None
            share.is_broken = held is not None and held.resource.is_closed
            if not share.waiting:  # the next one who asks begins a new series
                share.failures, share.is_hopeless = 0, False
            match decide(share, self._limits, self._clock()):
                case Grant(number):
                    assert held is not None
                    for _ in range(number):
                        self._grant(held)
                case Open():
                    share.is_opening, share.began_opening_s = True, self._clock()
                    self._openings += 1
                    self._start(self._open())
                case Close():
                    assert held is not None
                    self._start(self._end(held.resource))
                    self._held = held = None
                case GiveUp():
                    self._give_up()
                case LookAgain(at_s):
                    loop = asyncio.get_running_loop()
                    delay_s = at_s - self._clock()
                    self._timer = loop.call_later(delay_s, self._go_on, context=contextvars.Context())
                    return
                case None:
                    return
                case decision:
                    assert_never(decision)

    def _grant(self, held: _Held[ResourceT]) -> None:
        future = next(iter(self._waiting))
        del self._waiting[future]
        if not future.done():  # (one that is cancelled has not woken yet)
            held.users += 1
            future.set_result(held)

    def _give_up(self) -> None:
        logger.warning(
            "no connection to %r in %d attempts (%s): the %d processes that wait for it are paused",
            self._name,
            self._share.failures,
            self._reason,
            len(self._waiting),
        )
        for future in self._waiting:
            if not future.done():
                error = EndpointUnavailableError(self._name, self._share.failures, self._reason or "")
                future.set_exception(error)
        self._waiting.clear()
        self._share.try_again_s = -math.inf

    async def _open(self) -> None:
        share, limits = self._share, self._limits
        try:
            async with asyncio.timeout(limits.open_timeout_s):
                resource = await self._opener()
        except Exception as error:  # whatever it raises is why there is no connection
            share.failures += 1
            if isinstance(error, EndpointUnavailableError):
                self._reason, share.is_hopeless = error.reason, True
            elif isinstance(error, TimeoutError) and not str(error):
                self._reason = f"it was not open within {limits.open_timeout_s:g} s"
            else:
                self._reason = str(error) or type(error).__name__
            delay_s = limits.delay_s(share.failures, self._chance())
            share.try_again_s = self._clock() + delay_s
            if share.failures < limits.max_attempts and not share.is_hopeless and self._waiting:
                logger.warning(
                    "no connection to %r: %s; it is tried again in %.1f s", self._name, self._reason, delay_s
                )
        else:
            share.failures, self._reason = 0, None
            share.idle_since_s = self._clock()
            if self._is_shut:
                await self._end(resource)
            else:
                self._held = _Held(resource)
                logger.info("connected to %r", self._name)
        finally:
            share.is_opening = False
        self._go_on()

    async def _end(self, resource: ResourceT) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await resource.close()
        except Exception as error:  # it is of no use any more in any case
            logger.info("the connection to %r did not close well: %r", self._name, error)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        # In a context of its own: what stands in that of a process must not live as long as its connection.
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
