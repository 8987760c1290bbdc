"""``prunus key``: who may come to this profile's broker over a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from prunus.runtime.cli.group import Group, Options

if TYPE_CHECKING:
    from prunus.runtime.profile import Profile

ROLES = ("viewer", "controller", "worker", "owner")


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
    from prunus.messaging.access import Role
    from prunus.messaging.keys import check_place

    profile = options.find_profile()
    for place in places:
        check_place(place)
    file = file or Path(f"{name.replace('/', '_')}.key")
    client = profile.keys.add(name, Role(role), places or places_for_clients(profile), file)
    click.echo(f"The key {name} ({role}) is in {file}: bring it to the client, and let nobody else read it.")
    click.echo(f"There: prunus --key {file.name} list   (the broker is looked for at {', '.join(client.endpoints)})")


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
    table = display.plain_table("name", "role", "since", "public key")
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


def places_for_clients(profile: Profile) -> list[str]:
    """Where clients find the broker: where it listens, and for "everywhere" the name of this host."""
    import socket

    from prunus.errors import ProfileError

    places = []
    asked, found = profile.config.listen, profile.listening()
    for place, bound in zip(asked, found if len(found) == len(asked) else asked, strict=True):
        host, _, port = place.removeprefix("tcp://").rpartition(":")
        if port in ("0", "*"):
            port = bound.rpartition(":")[2]
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
