"""What users' tests and authors of plug-ins need.

=======================  ==================================================================================
`CommunicatorContract`   what every `Communicator` must do; `ContractService` is the service it talks to
`PersisterContract`      what every `Persister` must do
`TransportContract`      what every `Transport` must do
`LocalDaemon`            a whole daemon inside a test
`SSHServer`              a private SSH server. Needs ``pip install prunus[ssh]``
=======================  ==================================================================================

The contracts are test classes: inherit from one in a test module, and give it the fixture that it asks for. They need
``pip install pytest pytest-asyncio`` and ``asyncio_mode = "auto"``. Each name is imported when it is first used, so
that nobody needs what he does not use.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.testing.communicator_contract import CommunicatorContract, ContractService
    from prunus.testing.local_daemon import LocalDaemon
    from prunus.testing.persister_contract import PersisterContract
    from prunus.testing.ssh_server import SSHServer
    from prunus.testing.transport_contract import TransportContract

_CONTRACTS = {
    "CommunicatorContract": "prunus.testing.communicator_contract",
    "ContractService": "prunus.testing.communicator_contract",
    "PersisterContract": "prunus.testing.persister_contract",
    "TransportContract": "prunus.testing.transport_contract",
}
_HOME = {
    **_CONTRACTS,
    "LocalDaemon": "prunus.testing.local_daemon",
    "SSHServer": "prunus.testing.ssh_server",
}
_NEEDED = {"pytest": "pytest pytest-asyncio", "asyncssh": "prunus[ssh]"}
"""What is to be installed for a module that is not there."""

__all__ = [
    "CommunicatorContract",
    "ContractService",
    "LocalDaemon",
    "PersisterContract",
    "SSHServer",
    "TransportContract",
]

if (pytest := sys.modules.get("pytest")) is not None:  # so that a contract that fails shows the values, as any test
    pytest.register_assert_rewrite(*sorted(set(_CONTRACTS.values())))


def __getattr__(name: str) -> Any:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (needed := _NEEDED.get(error.name or "")) is None:
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs {error.name}: pip install {needed}", name=error.name
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
