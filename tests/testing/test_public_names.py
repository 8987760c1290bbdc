"""What `prunus.testing` offers, and what it needs for it."""

from __future__ import annotations

from pathlib import Path

import pytest

import prunus.testing
from prunus.runtime.remote import Completed
from prunus.testing import TransportContract
from tests.test_imports import run_alone


def test_every_public_name_exists() -> None:
    """Each name can be imported from the package and is listed by `dir`."""
    missing = [name for name in prunus.testing.__all__ if not hasattr(prunus.testing, name)]
    assert not missing
    assert set(prunus.testing.__all__) <= set(dir(prunus.testing))


def test_every_module_of_the_package_has_a_public_name() -> None:
    """What is for users is not only to be found by those who know the file."""
    modules = {path.stem for path in Path(prunus.testing.__file__).parent.glob("[!_]*.py")}
    assert modules == {getattr(prunus.testing, name).__module__.rpartition(".")[2] for name in prunus.testing.__all__}


def test_nobody_needs_what_he_does_not_use() -> None:
    """The package imports nothing; a daemon inside a test needs neither pytest nor asyncssh."""
    loaded = set(run_alone("import prunus.testing, sys; print(*sys.modules)").split())
    assert loaded.isdisjoint({"pytest", "asyncssh", "prunus.messaging", "prunus.runtime"})
    missing = "import sys; sys.modules.update(pytest=None, asyncssh=None)"
    assert run_alone(f"{missing}\nfrom prunus.testing import LocalDaemon; print(LocalDaemon.__name__)") == "LocalDaemon"


@pytest.mark.parametrize(
    ("name", "missing", "install"),
    [
        ("CommunicatorContract", "pytest", "pytest pytest-asyncio"),
        ("PersisterContract", "pytest", "pytest pytest-asyncio"),
        ("TransportContract", "pytest", "pytest pytest-asyncio"),
        ("SSHServer", "asyncssh", "prunus[ssh]"),
    ],
)
def test_what_is_missing_is_said_with_what_to_install(name: str, missing: str, install: str) -> None:
    """And for which name it is needed."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
try:
    from prunus.testing import {name}
except ImportError as error:
    print(error)
"""
    assert run_alone(code) == f"prunus.testing.{name} needs {missing}: pip install {install}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As in every other module."""
    with pytest.raises(AttributeError, match=r"'prunus\.testing' has no attribute 'nothing'"):
        _ = prunus.testing.nothing


async def test_a_contract_that_fails_shows_the_values() -> None:
    """pytest says of an assertion of a contract what it says of those in a user's own test."""

    class Careless:
        async def run(self, command: object) -> Completed:
            return Completed("careless", str(command), exit_status=0, stdout="", stderr="")

    with pytest.raises(AssertionError, match="assert 0 == 127"):
        await TransportContract().test_a_program_that_is_not_there_is_an_exit_status(Careless())  # type: ignore[arg-type]
