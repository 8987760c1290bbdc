"""Commands that a daemon runs when something happens (``hooks`` in config.yaml).

A hook is a program with its arguments; no shell reads them. What happened is in its environment:

==================  ==================================================================================
PRUNUS_EVENT        ``started``, ``worker_ended``, ``broker_ended``, ``flapping`` or ``stopped``
PRUNUS_PROFILE      the folder of the profile
PRUNUS_SERVICE      which service: ``worker-1`` ... (not with ``started`` and ``stopped``)
PRUNUS_PID          the process that it was
PRUNUS_EXIT         how it ended: the name of a signal, or an exit code; empty if nobody knows
PRUNUS_RAN_S        for how many seconds it ran
PRUNUS_RESTART_S    in how many seconds it is started again
PRUNUS_LOG          its log
==================  ==================================================================================

``worker_ended`` and ``broker_ended`` are for ends that nobody asked for, ``flapping`` for the moment in which a
service becomes so. A hook gets `HOOK_TIMEOUT_S`, then it is killed with all that it started; at most `MAX_HOOKS` run at
the same time. A hook that fails is a warning in the log of the daemon, where its output goes too. Supervision
never waits for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Mapping, Sequence

from prunus.runtime.profile import HookEvent

HOOK_TIMEOUT_S = 10.0
"""A hook that runs longer is killed."""
MAX_HOOKS = 8
"""So many run at the same time; what happens meanwhile is not told to any hook."""

log = logging.getLogger("prunus.supervisor")


class Hooks:
    """The hooks of a daemon. Used from one event loop."""

    def __init__(
        self, commands: Mapping[HookEvent, Sequence[str]], facts: Mapping[str, str], folder: os.PathLike[str]
    ) -> None:
        """`facts` are told with every event; hooks run in `folder`."""
        self.commands = dict(commands)
        self._facts = dict(facts)
        self._folder = folder
        self._running: set[asyncio.Task[None]] = set()

    def run(self, event: HookEvent, **facts: object) -> None:
        """Run the hook of this event, if there is one; does not wait for it. `facts` become ``PRUNUS_...``."""
        command = self.commands.get(event)
        if not command:
            return
        if len(self._running) >= MAX_HOOKS:
            log.warning("the hook for %s is left out: %d hooks run already", event, MAX_HOOKS)
            return
        told = {**self._facts, "event": event, **facts}
        environment = {f"PRUNUS_{name.upper()}": str(fact) for name, fact in told.items()}
        task = asyncio.create_task(self._run(event, list(command), {**os.environ, **environment}))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def finish(self) -> None:
        """Wait for those that run: not longer than `HOOK_TIMEOUT_S`."""
        while self._running:
            await asyncio.gather(*self._running)

    async def _run(self, event: HookEvent, command: list[str], environment: dict[str, str]) -> None:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                cwd=self._folder,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            log.warning("the hook for %s can't be run (%s): %s", event, command[0], error)
            return
        try:
            async with asyncio.timeout(HOOK_TIMEOUT_S):
                code = await process.wait()
        except TimeoutError:
            log.warning("the hook for %s (%s) ran for %.0f s: it is killed", event, command[0], HOOK_TIMEOUT_S)
        else:
            if code:
                log.warning("the hook for %s (%s) ended with exit code %d", event, command[0], code)
            return
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
