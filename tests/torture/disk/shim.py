"""The C half of the disk rigs: built with the compiler of this machine, loaded before everything else.

It must be loaded by the program that is looked at (``LD_PRELOAD``): `environment_with` gives the variables for that,
`Shim` is its face inside.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

from tests.torture.batch import CanNotRunError, environment

VARIABLE = "PRUNUS_DISK_SHIM"
SOURCE = Path(__file__).with_name("shim.c")
COMPILERS = ("cc", "gcc", "clang")

Call = Literal["w", "s"]
"""write, sync"""
How = Literal["i", "n", "h"]
"""EIO, ENOSPC, half of it and then ENOSPC"""


def build(folder: Path) -> Path:
    """The shared library, in `folder`. Raises `CanNotRunError`."""
    if not sys.platform.startswith("linux"):
        raise CanNotRunError("the shim is for Linux")
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise CanNotRunError(f"there is no C compiler here (looked for {', '.join(COMPILERS)})")
    library = folder / "shim.so"
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run([*command, "-ldl"], check=True)
    return library


def environment_with(library: Path) -> dict[str, str]:
    """For a program that has the shim."""
    return environment(LD_PRELOAD=str(library), **{VARIABLE: str(library)})


class Shim:
    """In a program that was started with `environment_with`."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ[VARIABLE])
        self._library.shim_calls.restype = ctypes.c_long
        self._library.shim_failed.restype = ctypes.c_long

    def trace(self, folder: Path, file: Path) -> None:
        """Write down what is done to the files of `folder`."""
        self._library.shim_trace(os.fsencode(folder), os.fsencode(file))

    def fail(self, folder: Path, call: Call, how: How, number: int, lasting: bool) -> None:
        """Have the `number`-th call on the database in `folder` fail (and, if `lasting`, all later ones)."""
        kinds = (ctypes.c_char(call.encode()), ctypes.c_char(how.encode()))
        self._library.shim_fail(os.fsencode(folder), *kinds, ctypes.c_long(number), ctypes.c_long(lasting))

    @property
    def failed(self) -> int:
        """How many calls were made to fail."""
        return int(self._library.shim_failed())
