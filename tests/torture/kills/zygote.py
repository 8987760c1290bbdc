"""Starts processes quickly: a program that has imported everything, has no thread, and forks.

``python -m tests.torture.kills.zygote`` reads one order per line and answers with one line:

- ``{"start": ROLE, "arguments": [...], "log": FILE}``: the new process's id;
- ``{"poll": PID}``: its exit code, or null if it runs;
- ``{"wait": PID}``: its exit code, once it has ended.

When its input ends it kills what it started. What it started dies with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.torture.batch import environment

POLL_S = 0.005
PR_SET_PDEATHSIG = 1
"""prctl(2)"""


class Zygote:
    """The side of whoever gives the orders. A context manager."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.torture.kills.zygote"]
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.close()
        self._program.stdout.close()
        self._program.wait()

    def start(self, role: str, *arguments: str, log: Path) -> int:
        """A new process in this role; its id."""
        return int(self._order(start=role, arguments=arguments, log=str(log)))

    def poll(self, pid: int) -> int | None:
        code: int | None = self._order(poll=pid)
        return code

    def wait(self, pid: int) -> int:
        return int(self._order(wait=pid))

    def end(self, pid: int, patience_s: float) -> None:
        """Ask it to end (SIGTERM), and after `patience_s` make it."""
        give_up = time.monotonic() + patience_s
        if self.poll(pid) is None:
            os.kill(pid, signal.SIGTERM)
        while self.poll(pid) is None:
            if time.monotonic() > give_up:
                os.kill(pid, signal.SIGKILL)
                self.wait(pid)
            time.sleep(POLL_S)

    def _order(self, **order: Any) -> Any:
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(json.dumps(order).encode() + b"\n")
        self._program.stdin.flush()
        return json.loads(self._program.stdout.readline())


def roles() -> dict[str, Callable[[Sequence[str]], None]]:
    """What a process can be. Imported here, once for all of them."""
    from prunus.runtime import broker, worker
    from tests.torture.fuzz import attacker, network
    from tests.torture.kills import peers

    return {
        "broker": broker.main,
        "process worker": worker.main,
        "task worker": peers.worker,
        "client": peers.client,
        "attacker": attacker.main,
        "deaf": attacker.deaf,
        "network attacker": network.main,
        "network deaf": network.deaf,
    }


def serve() -> None:
    """Take orders until the input ends."""
    _die_with_the_parent()
    known = roles()
    gc.freeze()
    running: dict[int, int | None] = {}
    answer: int | None
    for line in sys.stdin.buffer:
        match json.loads(line):
            case {"start": role, "arguments": arguments, "log": log}:
                answer = os.fork()
                if answer == 0:
                    _become(known[role], arguments, log)
                running[answer] = None
            case {"poll": pid}:
                answer = _ended(running, pid, os.WNOHANG)
            case {"wait": pid}:
                answer = _ended(running, pid, 0)
            case order:
                raise ValueError(order)
        print(json.dumps(answer), flush=True)
    for pid in [pid for pid in running if _ended(running, pid, os.WNOHANG) is None]:
        os.kill(pid, signal.SIGKILL)
        _ended(running, pid, 0)


def _ended(running: dict[int, int | None], pid: int, flag: int) -> int | None:
    if running[pid] is None:
        found, status = os.waitpid(pid, flag)
        if found:
            running[pid] = os.waitstatus_to_exitcode(status)
    return running[pid]


def _die_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _become(role: Callable[[Sequence[str]], None], arguments: Sequence[str], log: str) -> None:
    """In the child: never returns."""
    code = 1
    with contextlib.suppress(BaseException):
        _die_with_the_parent()
        nothing = os.open(os.devnull, os.O_RDONLY)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(source, target)
        try:
            role(arguments)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
