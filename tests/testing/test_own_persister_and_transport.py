"""A persister and a transport that a user might bring keep the contracts, which ask for nothing of ours."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from prunus.errors import ArchiveError, BusyError
from prunus.persistence import MemoryPersister, Persister
from prunus.runtime.remote import Transport
from prunus.runtime.remote.local import LocalTransport
from prunus.testing import PersisterContract, TransportContract
from tests.testing.test_own_communicator import in_other_words


class OverAWire:
    """A `Persister` behind a wire of its own: each question and each answer passes as bytes, and what is refused is
    refused in other words."""

    def __init__(self, behind: Persister) -> None:
        self._behind = behind

    def __getattr__(self, name: str) -> Any:
        signature = signature_of(name)

        async def ask(*args: Any, **keywords: Any) -> Any:
            asked = signature.bind(self, *args, **keywords)
            for name_of_it, value in list(asked.arguments.items())[1:]:
                asked.arguments[name_of_it] = there(value, signature.parameters[name_of_it].annotation)
            try:
                answer = await getattr(self._behind, name)(*asked.args[1:], **asked.kwargs)
            except (ArchiveError, BusyError, ValueError) as error:
                raise type(error)(in_other_words(error)) from None
            return there(answer, signature.return_annotation)

        return ask


@functools.cache
def signature_of(name: str) -> inspect.Signature:
    """Of an operation of `Persister`; raises `AttributeError` for what is none."""
    return inspect.signature(getattr(Persister, name), eval_str=True)


def there(value: Any, kind: Any) -> Any:
    """What becomes of a value on the way."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=kind)


class TestOverAWire(PersisterContract):
    """The whole contract."""

    @pytest.fixture
    async def persister(self) -> AsyncIterator[OverAWire]:
        async with MemoryPersister() as behind:
            yield OverAWire(behind)


class OnlyATransport:
    """What `Transport` says of one, and nothing else."""

    def __init__(self, behind: Transport) -> None:
        self._behind = behind

    def __getattr__(self, name: str) -> Any:
        if name not in {*vars(Transport), *Transport.__annotations__}:
            raise AttributeError(f"a transport has no {name!r}")
        return getattr(self._behind, name)


class TestOnlyATransport(TransportContract):
    """The whole contract."""

    @pytest.fixture
    def home(self, short_folder: Path) -> Path:
        return short_folder

    @pytest.fixture
    async def transport(self, home: Path) -> AsyncIterator[OnlyATransport]:
        transport = OnlyATransport(LocalTransport("mine", home))
        yield transport
        await transport.close()
