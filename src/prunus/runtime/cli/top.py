"""``prunus top``: the daemon, its queues and its processes on one live screen."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from prunus.runtime.cli.connection import ended_by_refusal, with_controller
from prunus.runtime.cli.group import Command, Options

if TYPE_CHECKING:
    from prunus.runtime.controller import ProcessController


@click.command(cls=Command)
@click.pass_obj
def top(options: Options) -> None:
    """Watch the daemon, its queues and its processes on one screen.

    Keys pause, play, kill and retry the selected process; ? shows all of them, q quits.
    """
    from prunus.runtime.terminals import can_redraw

    if not (sys.stdin.isatty() and can_redraw(sys.stdout)):
        raise click.UsageError(
            "`prunus top` needs a terminal, and not a dumb one; elsewhere use `prunus list` or `prunus broker status`"
        )
    from prunus.runtime.top.app import TopApp

    profile = options.local_profile()
    place = profile.name if profile is not None else options.key or ""

    async def show(controller: ProcessController) -> None:
        utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
        app = TopApp(controller, profile, place=place, utf8=utf8)
        async with ended_by_refusal(controller, app.exit):
            await app.run_async()

    with_controller(options, show)
