"""How commands reach the daemon of a profile, and import what its workers do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prunus.runtime.cli.group import Options
from prunus.runtime.cli.patience import patience

if TYPE_CHECKING:
    from prunus.errors import PrunusError
    from prunus.runtime.controller import ProcessController
    from prunus.runtime.profile import Profile

T = TypeVar("T")


def with_controller(
    options: Options, work: Callable[[ProcessController], Awaitable[T]], waiting_for: str | None = None
) -> T:
    """Do something with a controller of the profile's daemon (it says at once if there is none), or of the broker on a
    network that ``--key`` is for. What it waits for is said if it takes longer than a second (None: the work says so
    itself, or shows what it does)."""
    from prunus.errors import DaemonError
    from prunus.runtime.controller import connect
    from prunus.runtime.locks import read_holder

    profile = options.local_profile()
    if profile is not None and not any(read_holder(profile.lock(name)) for name in ("daemon", "broker")):
        raise DaemonError(f"no daemon runs for the profile {profile.name}; `prunus daemon start` starts it")

    async def connected() -> T:
        async with contextlib.AsyncExitStack() as stack:
            async with patience("waiting for the broker"):
                controller = await stack.enter_async_context(connect(profile, key=options.key))
            if waiting_for is not None:
                await stack.enter_async_context(patience(waiting_for))
            return await work(controller)

    with errors_told_once():
        return asyncio.run(connected())


@contextlib.contextmanager
def errors_told_once() -> Iterator[None]:
    """What ends the connection of a command ends the command, as its error: a log line that says so too is one too
    many."""
    peer = logging.getLogger("prunus.messaging.peer")
    peer.addFilter(_is_no_error)
    try:
        yield
    finally:
        peer.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def refusal(controller: ProcessController) -> PrunusError | None:
    """With what the broker has refused this command for good (its key was revoked, say); None if it has not."""
    from prunus.messaging.threaded import ThreadedCommunicator

    communicator = controller.communicator
    return communicator.failure if isinstance(communicator, ThreadedCommunicator) else None


@contextlib.asynccontextmanager
async def ended_by_refusal(controller: ProcessController, end: Callable[[], None]) -> AsyncIterator[None]:
    """For what goes on while a broker is away: when the broker refuses this command for good `end` is called, which
    has to end the block, and the refusal is raised behind it."""
    from prunus.messaging.threaded import ThreadedCommunicator

    async def wait() -> None:
        if isinstance(controller.communicator, ThreadedCommunicator):
            await controller.communicator.ended()
            end()

    waiting = asyncio.create_task(wait())
    try:
        yield
    finally:
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    if (error := refusal(controller)) is not None:
        raise error


def run(work: Coroutine[Any, Any, T], waiting_for: str) -> T:
    """Run it, and say what it waits for if it takes longer than a second."""

    async def patiently() -> T:
        async with patience(waiting_for):
            return await work

    return asyncio.run(patiently())


def import_like_workers(profile: Profile | None) -> None:
    """The current folder and the folders of the profile's workers can be imported from."""
    folders = [] if profile is None else reversed(profile.import_folders)
    for folder in [*folders, Path.cwd()]:
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
