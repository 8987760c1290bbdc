"""Every command, put together. A new one is registered here, with a line of its own."""

from __future__ import annotations

from prunus.runtime.cli import (
    archive,
    broker,
    completion,
    control,
    daemon,
    keys,
    processes,
    profile,
    schedule,
    tasks,
    top,
    worker,
)
from prunus.runtime.cli.group import cli, main

__all__ = ["cli", "main"]

for _command in (  # in the order of ``prunus --help``
    profile.init,
    daemon.daemon,
    processes.launch,
    processes.list_,
    processes.show,
    processes.watch,
    processes.tree,
    control.pause,
    control.play,
    control.kill,
    control.resume,
    control.send,
    control.query,
    control.update,
    control.edit,
    control.settle,
    control.fork,
    processes.logs_,
    processes.describe,
    control.retry,
    control.delete,
    archive.prune,
    archive.export,
    archive.import_,
    schedule.schedule,
    tasks.tasks,
    top.top,
    broker.broker,
    worker.worker,
    keys.key,
    profile.doctor,
    completion.completion,
):
    cli.add_command(_command)

completion.attach(cli)
