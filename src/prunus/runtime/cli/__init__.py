"""The command line: ``prunus``.

Rules: what a program may want to read goes to stdout and everything else to stderr; an error is one sentence and exit
code 1 (2: the command was written wrongly), a traceback needs ``--debug``; Ctrl-C is quiet, from the first moment on.

This module imports nothing of ours, so that `main` is there before anybody can press a key; the commands are in
`prunus.runtime.cli.commands`. Only `click` is imported at the top of their modules, so that ``--help`` and the
completion of a shell are quick; a command imports what it needs.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.runtime.cli.commands import cli

__all__ = ["cli", "main"]


def main() -> None:
    """The program ``prunus``."""
    hears_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # (else it is ignored: stay so)
    if hears_ctrl_c:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is under way: there is nothing to unwind
    from prunus.runtime.cli import commands

    if hears_ctrl_c:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        commands.main()
    finally:
        if hears_ctrl_c:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is done: let the interpreter end quickly, too


def __getattr__(name: str) -> Any:
    if name == "cli":
        from prunus.runtime.cli import commands

        return commands.cli
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
