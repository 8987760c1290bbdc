"""The endpoints of a profile: what stands under ``endpoints`` in its ``config.yaml``, checked.

::

    endpoints:
      cluster: {transport: ssh, host: login.cluster.org, user: ann, safe_interval_s: 10}
      here: {transport: local, folder: /scratch}

Each has the settings of its transport, and those of `prunus.runtime.remote.sharing.Limits`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from prunus.errors import ProfileError
from prunus.runtime.remote.local import LocalTransport
from prunus.runtime.remote.sharing import Limits
from prunus.runtime.remote.ssh import KEEPALIVE_S, connect_ssh
from prunus.runtime.remote.transport import Transport

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class LocalEndpoint(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``transport: local``"""

    folder: Text | None = None
    """Where paths that are not absolute begin; the home folder."""

    async def open(self, name: str, base: Path) -> Transport:
        """Open a connection."""
        return LocalTransport(name, None if self.folder is None else _path(base, self.folder))


class SSHEndpoint(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``transport: ssh``"""

    host: Text
    port: Annotated[int, msgspec.Meta(ge=1, le=65_535)] = 22
    user: Text | None = None
    """This one, or what ``~/.ssh/config`` says."""
    key_file: Text | None = None
    """A private key without a passphrase; else the agent, and the usual keys of the user."""
    known_hosts: Text | None = None
    """Else ``~/.ssh/known_hosts``."""
    check_host_key: bool = True
    """False: any host may claim to be this one."""
    jump: Text | None = None
    """``user@host:port`` of a host on the way."""
    folder: str = ""
    """Where paths that are not absolute begin; the home folder of the login."""
    keepalive_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = KEEPALIVE_S
    safe_interval_s: Annotated[float, msgspec.Meta(ge=0, le=30 * 86_400)] = 5.0

    async def open(self, name: str, base: Path) -> Transport:
        """Open a connection."""

        return await connect_ssh(
            name,
            self.host,
            port=self.port,
            user=self.user,
            key_file=None if self.key_file is None else _path(base, self.key_file),
            known_hosts=None if self.known_hosts is None else _path(base, self.known_hosts),
            check_host_key=self.check_host_key,
            jump=self.jump,
            folder=self.folder,
            keepalive_s=self.keepalive_s,
        )


Endpoint = LocalEndpoint | SSHEndpoint
KINDS: Mapping[str, type[LocalEndpoint] | type[SSHEndpoint]] = {"local": LocalEndpoint, "ssh": SSHEndpoint}


def read_endpoints(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Endpoint]:
    """Check what a profile says; raises `ProfileError` that names every wrong key at once."""
    if problems := problems_with(found):
        raise ProfileError("config.yaml: " + "".join(f"\n  {line}" for line in problems).lstrip())
    return {
        name: msgspec.convert({key: value for key, value in settings.items() if key != "transport"}, _kind_of(settings))
        for name, settings in found.items()
    }


def problems_with(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the endpoints of a profile: a line for each key."""
    problems = []
    for name, settings in found.items():
        kind = _kind_of(settings)
        if kind is None:
            transport = settings.get("transport")
            problems.append(f"endpoints.{name}.transport: expected one of {', '.join(KINDS)}; it is {transport!r}")
        else:
            problems += [f"endpoints.{name}.{problem}" for problem in _problems_of(kind, settings)]
    return problems


def opener_of(name: str, endpoint: Endpoint, base: Path) -> Callable[[], Awaitable[Transport]]:
    """What opens a connection to it; paths in the settings begin in `base`."""
    return lambda: endpoint.open(name, base)


def _path(base: Path, text: str) -> Path:
    return base / Path(text).expanduser()


def _kind_of(settings: Mapping[str, Any]) -> Any:
    transport = settings.get("transport")
    return KINDS.get(transport) if isinstance(transport, str) else None


def _problems_of(kind: type[LocalEndpoint] | type[SSHEndpoint], values: Mapping[str, Any]) -> list[str]:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    problems = []
    for key, value in values.items():
        if key == "transport":
            continue
        if key not in fields:
            problems.append(f"{key}: there is no such setting (there are transport, {', '.join(fields)})")
            continue
        try:
            msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError as error:
            text = str(error).partition(" - at ")[0].replace("`", "")
            problems.append(f"{key}: {text[:1].lower()}{text[1:]}; it is {value!r}")
    problems += [f"{name}: is missing" for name, field in fields.items() if field.required and name not in values]
    return problems
