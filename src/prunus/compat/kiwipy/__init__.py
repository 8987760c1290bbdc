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
from prunus.compat.kiwipy.communicator import PrunusCommunicator, check_prefetch_size, check_timeout
from prunus.compat.kiwipy.queues import PrunusIncomingTask, PrunusTaskQueue
from prunus.errors import ProfileError
from prunus.messaging.keys import ClientKey
from prunus.runtime.connecting import find_broker

__all__ = ["PrunusCommunicator", "PrunusIncomingTask", "PrunusTaskQueue", "connect"]

_WHERE = (
    "this is the communicator of a profile: leave it out for that of this folder or user (`prunus init`, "
    "`prunus daemon start`), or give a folder"
)


def connect(
    broker: str | os.PathLike[str] | None = None,
    *,
    message_exchange: str = "kiwipy.messages",
    task_exchange: str = "kiwipy.tasks",
    task_queue: str = "kiwipy.tasks",
    task_prefetch_size: int | None = 0,
    task_prefetch_count: int | None = 0,
    encoder: Callable[[Any], bytes | str] = codec.encode,
    decoder: Callable[[bytes], Any] = codec.decode,
    testing_mode: bool = False,
    async_task_timeout: float | None = PrunusCommunicator.TASK_TIMEOUT,
    connection_params: None = None,
    connection_factory: None = None,
    queue_expires: None = None,
) -> PrunusCommunicator:
    """A communicator at `broker`: an endpoint (``ipc://...``), a profile (its folder or name), or a key file. None:
    the profile of this folder or user.

    Who listens on one `message_exchange` does not hear what is said on another. Queues are found by their name alone,
    so `task_exchange` means nothing here. `async_task_timeout` (seconds) bounds each call that waits for the broker;
    with None only connecting and closing are bounded, by `PrunusCommunicator.TASK_TIMEOUT`. In `testing_mode` the tasks
    that are left in the queues that were used are deleted at the end. The last three are about RabbitMQ: not None, they
    are refused.

    Raises `prunus.ProfileError` for a profile that is not there, `TypeError` or `ValueError` for an impossible option.
    If no broker answers, the error is a `kiwipy.TimeoutError` and a `ConnectionError`; one that refuses the key is a
    `ConnectionRefusedError`.
    """
    if connection_params is not None:
        raise TypeError(f"connection_params say where a RabbitMQ is, and {_WHERE}, as the first argument")
    for option, value in {"connection_factory": connection_factory, "queue_expires": queue_expires}.items():
        if value is not None:
            raise TypeError(f"{option} is about RabbitMQ, and there is none: leave it out")
    check_prefetch_size(task_prefetch_size)
    check_timeout(async_task_timeout)
    connect_timeout_s = PrunusCommunicator.TASK_TIMEOUT if async_task_timeout is None else async_task_timeout

    return PrunusCommunicator(
        lambda: messaging.connect(_place(broker), name="kiwipy", timeout_s=connect_timeout_s),
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
        raise ProfileError(f"an {broker.partition(':')[0]} address is that of a RabbitMQ, and {_WHERE}")
    if not isinstance(broker, str | os.PathLike | None):
        raise TypeError(f"a {type(broker).__name__} does not say where a broker is, and {_WHERE}")
    if broker is None or (isinstance(broker, str) and "://" in broker):
        return broker or find_broker()
    path = Path(broker).expanduser()
    return find_broker(key=path) if path.is_file() else find_broker(os.fspath(broker))
