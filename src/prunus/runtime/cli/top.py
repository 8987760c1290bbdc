"""``prunus top``: the daemon, its queues and its processes on one live screen."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from prunus.runtime.cli.connection import with_controller
from prunus.runtime.cli.group import Command, Options

if TYPE_CHECKING:
    from prunus.runtime.controller import ProcessController


@click.command(cls=Command)
@click.pass_obj
def top(options: Options) -> None:
    """Watch the daemon, its queues and its processes on one screen.

    Keys pause, play, kill and retry the selected process; ? shows all of them, q quits.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("`prunus top` needs a terminal; in a pipe use `prunus list` or `prunus broker status`")
    from prunus.runtime.top.app import TopApp

    profile = options.local_profile()
    place = profile.name if profile is not None else options.key or ""

    async def show(controller: ProcessController) -> None:
        utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
        await TopApp(controller, profile, place=place, utf8=utf8).run_async()

    with_controller(options, show)
