"""``prunus key``: who may come to this profile's broker over a network."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prunus.runtime.cli.group import Group, Options, say

if TYPE_CHECKING:
    from prunus.runtime.profile import Profile

ROLES = ("viewer", "controller", "worker", "owner")
USED_AT = {
    "viewer": "the computer of whoever looks on",
    "controller": "the computer that launches and controls",
    "worker": "each host that runs workers",
    "owner": "the computer that everything is done from",
}
"""By its role: where a key is used ..."""
FIRST_COMMAND = {"worker": "worker"}
"""... and what is done there first, if it is not ``list``."""
FREE_PORTS = range(20_000, 32_768)
"""Above the ports of well-known services, and below those that systems give to connections that go out."""
PORT_TRIES = 100


@click.group(cls=Group)
def key() -> None:
    """Who may come over a network, and as what."""


@key.command()
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), required=True, help="What it allows: to look; also to send, launch and edit; to work; everything.")  # fmt: skip  # noqa: E501
@click.option("--out", "file", type=click.Path(path_type=Path), help="The file for the client (NAME.key).")
@click.option("--at", "places", multiple=True, metavar="tcp://HOST:PORT", help="Where the client finds the broker, if not where it listens.")  # fmt: skip  # noqa: E501
@click.pass_obj
def add(options: Options, name: str, role: str, file: Path | None, places: tuple[str, ...]) -> None:
    """Let a new client come, and write the one file that it needs.

    Whoever has the file may do what its role allows: bring it to the client as you would bring a password.
    """
    from prunus.messaging.keys import check_place
    from prunus.runtime.locks import read_holder

    profile = options.find_profile()
    for place in places:
        check_place(place)
    add_key(profile, name, role, file or default_file(name), places)
    if read_holder(profile.lock("broker")) is not None and set(profile.listening()) != set(profile.config.listen):
        click.echo("The broker does not listen there yet: prunus daemon restart")


@key.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def list_(options: Options, as_json: bool) -> None:
    """Show the keys that are valid."""
    import msgspec

    from prunus.runtime import display

    known = options.find_profile().keys.clients().values()
    if as_json:
        click.echo(display.as_json(msgspec.to_builtins(list(known))))
        return
    table = display.plain_table("name", "role", "since", "public key", dispensable=("public key",))
    for one in known:
        table.add_row(one.name, one.role.value, display.moment(one.added_at), one.public_key)
    display.show(display.console(), table if table.row_count else "No key: nobody comes over a network.")


@key.command()
@click.argument("name")
@click.pass_obj
def revoke(options: Options, name: str) -> None:
    """Make a key worthless, at once: who came with it is hung up on."""
    revoked = options.find_profile().keys.revoke(name)
    click.echo(f"The key {revoked.name} ({revoked.role.value}) is worth nothing from now on.")


def add_key(profile: Profile, name: str, role: str, file: Path, places: Sequence[str] = ()) -> None:
    """Let a new client come, write the file that it needs, and say what to do with it. `places`: where the client finds
    the broker, if not where that listens."""
    from prunus.messaging.access import Role

    if profile.config.listen:  # then the broker needs its own keys to start, whatever becomes of this one
        profile.keys.make()
    client = profile.keys.add(name, Role(role), places or places_for_clients(profile), file)
    copy = f"scp {shlex.quote(str(file))} HOST:"
    use = f"prunus --key {shlex.quote(file.name)} {FIRST_COMMAND.get(role, 'list')}"
    say(f"The key {name} ({role}) is in {file}: copy it to {USED_AT[role]} ({copy}), and let nobody else read it.")
    say(f"There: {use}   (the broker is looked for at {', '.join(client.endpoints)})")


def default_file(name: str) -> Path:
    """Where the file for the client of this key is written, if nothing else is said."""
    return Path(f"{name.replace('/', '_')}.key")


def places_for_clients(profile: Profile) -> list[str]:
    """Where clients find the broker: where it listens, and for "everywhere" the name of this host."""
    import socket

    from prunus.errors import ProfileError

    places, listening = [], profile.listening()
    for asked in profile.config.listen:
        host, port = _host_and_port(asked)
        if port in ("0", "*"):
            _, port = _host_and_port(listening.get(asked, asked))
        if port in ("0", "*"):
            raise ProfileError(
                "the broker never ran, so its port is not known: start the daemon first, or say it: --at"
            )
        host = socket.getfqdn() if host in ("*", "0.0.0.0", "[::]") else host
        places.append(f"tcp://{host}:{port}")
    if not places:
        raise ProfileError(
            f"the broker of the profile {profile.name} listens on no network: set `listen` in "
            f"{profile.path / 'config.yaml'}, or say where it can be reached: --at tcp://HOST:PORT"
        )
    return places


def with_port(place: str) -> str:
    """The same place to listen at; with a port that is free now in place of ``*``, so that clients can be told, and
    find the broker there also when it starts again. `ProfileError` if it is no place, or if no port is found."""
    import random
    import socket

    from prunus.errors import ProfileError
    from prunus.messaging.keys import check_place

    check_place(place)
    host, port = _host_and_port(place)
    if port not in ("0", "*"):
        return place
    with contextlib.suppress(OSError):  # of the name of a host
        family, kind, protocol, _, address = socket.getaddrinfo(
            None if host == "*" else host.strip("[]"), 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        for number in random.sample(FREE_PORTS, PORT_TRIES):
            with socket.socket(family, kind, protocol) as trial, contextlib.suppress(OSError):
                trial.bind((address[0], number, *address[2:]))
                return f"tcp://{host}:{number}"
    raise ProfileError(f"no free port can be found for {place}; say one, as in tcp://{host}:5010")


def _host_and_port(place: str) -> tuple[str, str]:
    host, _, port = place.removeprefix("tcp://").rpartition(":")
    return host, port
