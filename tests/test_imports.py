"""What `import prunus` brings along, and what it leaves for later."""

from __future__ import annotations

import subprocess
import sys

import prunus

HEAVY = {"zmq", "yaml", "rich", "click", "anyio", "psutil", "sqlite3", "prunus.runtime", "prunus.messaging"}
"""Modules that a script which only defines processes does not need."""


def run_alone(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()


def test_importing_prunus_imports_no_heavy_module() -> None:
    """`import prunus` costs little: transport, store, configuration and command line come when they are used."""
    loaded = set(run_alone("import prunus, sys; print(*sys.modules)").split())
    assert loaded.isdisjoint(HEAVY), loaded & HEAVY


def test_every_public_name_exists() -> None:
    """Each name of `prunus.__all__` can be got and is listed by `dir(prunus)`."""
    missing = [name for name in prunus.__all__ if not hasattr(prunus, name)]
    assert not missing
    assert set(prunus.__all__) <= set(dir(prunus))


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A wrong name fails as it does in every other module."""
    code = "import prunus\ntry: prunus.nothing\nexcept AttributeError as error: print(error)"
    assert run_alone(code) == "module 'prunus' has no attribute 'nothing'"


def test_a_name_brings_only_what_it_needs() -> None:
    """The errors are there without the processes; both modules are there without an import of their own."""
    code = "import prunus, sys; prunus.errors.PrunusError; prunus.DaemonError; print('prunus.processes' in sys.modules)"
    assert run_alone(code) == "False"
    assert run_alone("import prunus; print(prunus.processes.Process is prunus.Process)") == "True"
