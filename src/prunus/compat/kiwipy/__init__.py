"""kiwipy's communicator, over the broker of Prunus: no RabbitMQ is needed. Needs the extra ``prunus[kiwipy]``.

An application that was written for kiwipy's thread communicator changes the line that connects, and nothing else::

    from prunus.compat import kiwipy as prunus_kiwipy

    with prunus_kiwipy.connect() as communicator:    # the profile of this folder, or of this user
        communicator.add_rpc_subscriber(lambda _, numbers: sum(numbers), "sum")
        print(communicator.rpc_send("sum", [1, 2, 3]).result())

What comes back is a `kiwipy.Communicator`; errors are kiwipy's, futures are `kiwipy.Future`. Where kiwipy loses, hangs
or leaks, this does what kiwipy's documentation says.

===============  ==================================================================================
module           what it is
===============  ==================================================================================
`communicator`   questions and broadcasts, and how subscribers are called
`queues`         task queues, and tasks that are fetched from them
`futures`        futures in futures, on both sides
`threads`        where subscribers, and callbacks of futures, are called
`wire`           how all this is said in messages of ours
`codec`          values as bytes, if the user brings no encoder
===============  ==================================================================================
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunus import messaging
from prunus.compat.kiwipy import codec
from prunus.compat.kiwipy.communicator import PrunusCommunicator, check_prefetch_size
from prunus.compat.kiwipy.queues import PrunusIncomingTask, PrunusTaskQueue
from prunus.errors import ProfileError
from prunus.messaging.keys import ClientKey
from prunus.runtime.connecting import find_broker

__all__ = ["PrunusCommunicator", "PrunusIncomingTask", "PrunusTaskQueue", "connect"]


def connect(
    broker: str | os.PathLike[str] | None = None,
    *,
    message_exchange: str = "kiwipy.messages",
    task_exchange: str = "kiwipy.tasks",
    task_queue: str = "kiwipy.tasks",
    task_prefetch_size: int = 0,
    task_prefetch_count: int = 0,
    encoder: Callable[[Any], bytes | str] = codec.encode,
    decoder: Callable[[bytes], Any] = codec.decode,
    testing_mode: bool = False,
    async_task_timeout: float = 5.0,
) -> PrunusCommunicator:
    """A communicator at `broker`: an endpoint (``ipc://...``), a profile (its folder or name), or a key file. None:
    the profile of this folder or user.

    Who listens on one `message_exchange` does not hear what is said on another. Queues are found by their name alone,
    so `task_exchange` means nothing here. `async_task_timeout` (seconds) bounds each call that waits for the broker. In
    `testing_mode` the tasks that are left in the queues that were used are deleted at the end.

    Raises `prunus.ProfileError` for a profile that is not there. If no broker answers, the error is a
    `kiwipy.TimeoutError` and a `ConnectionError`; one that refuses the key is a `ConnectionRefusedError`.
    """
    check_prefetch_size(task_prefetch_size)

    return PrunusCommunicator(
        lambda: messaging.connect(_place(broker), name="kiwipy", timeout_s=async_task_timeout),
        message_exchange=message_exchange,
        task_queue=task_queue,
        task_prefetch_count=task_prefetch_count,
        encoder=encoder,
        decoder=decoder,
        async_task_timeout=async_task_timeout,
        testing_mode=testing_mode,
    )


def _place(broker: str | os.PathLike[str] | None) -> str | ClientKey:
    if isinstance(broker, str) and broker.startswith(("amqp://", "amqps://")):
        raise ProfileError(
            f"an {broker.partition(':')[0]} address is that of a RabbitMQ, and this is the communicator of a profile: "
            "leave it out for that of this folder or user (`prunus init`, `prunus daemon start`), or give a folder"
        )
    if broker is None or (isinstance(broker, str) and "://" in broker):
        return broker or find_broker()
    path = Path(broker).expanduser()
    return find_broker(key=path) if path.is_file() else find_broker(os.fspath(broker))
