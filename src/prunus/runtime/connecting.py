"""Where the broker is, and messages between programs over it: `communicator`, and `communicator_sync` for scripts.

::

    async with await prunus.communicator() as peers:  # the broker of the profile of this folder or user
        await peers.task_send(b"...", queue="mail")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunus import messaging
from prunus.messaging.blocking import BlockingCommunicator
from prunus.messaging.peer import PeerCommunicator

if TYPE_CHECKING:
    from prunus.messaging.keys import ClientKey
    from prunus.runtime.profile import Profile


def find_broker(profile: Profile | Path | str | None = None, key: Path | str | None = None) -> str | ClientKey:
    """The endpoint of the broker of a profile: the given one, or that of this folder or user; or, with the file of a
    `key`, that of a broker on a network. Raises `ProfileError`."""
    from prunus.runtime.profile import Profile

    if profile is not None and key is not None:
        raise TypeError("say a profile, or a key: not both")
    if key is not None:
        from prunus.messaging.keys import ClientKey

        return ClientKey.read(Path(key))
    return profile.endpoint if isinstance(profile, Profile) else Profile.find(profile).endpoint


async def communicator(
    profile: Profile | Path | str | None = None, *, key: Path | str | None = None, name: str = "peer"
) -> PeerCommunicator:
    """Tasks, questions and broadcasts over the broker of a profile, or of a network (see `find_broker`).

    Leave it with ``async with`` or `close`. `name` begins the name of its session, for those who look at the broker.
    Raises `ProfileError`, `ConnectionLostError` (no broker runs), `BusyError` (it has as many clients as it may have)
    and `KeyRefusedError`.
    """
    return await messaging.connect(find_broker(profile, key), name=name)


def communicator_sync(
    profile: Profile | Path | str | None = None, *, key: Path | str | None = None, name: str = "peer"
) -> BlockingCommunicator:
    """`communicator` for scripts and threads: its methods wait for their answers; leave it with ``with`` or `close`."""
    return messaging.connect_sync(find_broker(profile, key), name=name)
