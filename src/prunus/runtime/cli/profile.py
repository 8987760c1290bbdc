"""``prunus init`` and ``prunus doctor``: a profile, made and examined."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from prunus.runtime.cli.connection import import_like_workers
from prunus.runtime.cli.group import Command, Options, say
from prunus.runtime.cli.keys import add_key, default_file, with_port
from prunus.runtime.cli.patience import bar

if TYPE_CHECKING:
    from prunus.runtime.profile import Profile

FIRST_KEYS = ("worker", "controller")
"""The client keys that a broker on a network has from the start: each is called as its role."""


@click.command(cls=Command)
@click.option("--profile", "name", metavar="NAME|PATH", help="The user's own profile NAME, or the folder PATH.")
@click.option("-w", "--workers", type=click.IntRange(0, 1024), help="How many workers the daemon starts.")
@click.option("--listen", multiple=True, metavar="tcp://ADDRESS:PORT", help="Clients with a key may come over a network.")  # fmt: skip  # noqa: E501
@click.pass_obj
def init(options: Options, name: str | None, workers: int | None, listen: tuple[str, ...]) -> None:
    """Make a profile: in ./.prunus, or the user's own one NAME.

    With --listen also the keys of its broker, and two for clients: worker.key for workers on other hosts, and
    controller.key for whoever launches and controls from elsewhere (`prunus key add` makes more). A port * is a free
    one, chosen once and for all.
    """
    options.refuse_key()
    import msgspec

    from prunus.runtime.profile import FOLDER_NAME, Config, Profile

    name = name or options.profile
    path = Path(FOLDER_NAME) if name is None else Profile.path_of(name)
    config = Config() if path.name == FOLDER_NAME else Config(import_from=[str(Path.cwd())])
    if workers is not None:
        config = msgspec.structs.replace(config, workers=workers)
    if listen:
        config = msgspec.structs.replace(config, listen=[with_port(place) for place in listen])
        if not os.path.exists(path / "config.yaml"):  # else that is what is wrong
            refuse_to_overwrite(map(default_file, FIRST_KEYS))
    profile = Profile.create(path, config)
    option = "" if name is None else f" --profile {shlex.quote(name)}"
    click.echo(f"A new profile: {profile.path}")
    say(f"Workers import classes from {', '.join(map(str, profile.import_folders))} (see config.yaml there).")
    if listen:
        say(
            f"Its broker will listen at {', '.join(profile.config.listen)}, for those who hold a key. "
            f"`prunus{option} key add NAME --role ROLE` makes more than these two:"
        )
        add_first_keys(profile, f"prunus{option}")
    click.echo(f"Next: prunus{option} daemon start")


@click.command(cls=Command)
@click.option("--check-checkpoints", is_flag=True, help="Load every live process with the code as it is now.")
@click.option("--check-blobs", is_flag=True, help="Read every blob, and compare it with its name.")
@click.option("--fix", is_flag=True, help="Repair what can be repaired safely, and say each thing.")
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON.")
@click.pass_obj
def doctor(options: Options, check_checkpoints: bool, check_blobs: bool, fix: bool, as_json: bool) -> None:
    """Say what is wrong, and what to do.

    With --fix, processes that nobody looks after are given to workers again: what the broker does by itself within
    a minute; and damaged blobs are set aside, so that they can be put again. The exit code is 1 if something is
    wrong, and was not repaired.
    """
    options.refuse_key()
    from prunus.runtime import display
    from prunus.runtime.doctor import Finding, examine, examine_blobs

    marks = {"ok": click.style("ok      ", fg="green"), "warning": click.style("warning ", fg="yellow")}
    marks["problem"] = click.style("problem ", fg="red", bold=True)
    marks["fixed"] = click.style("fixed   ", fg="cyan")
    console = display.console()

    found: list[Finding] = []

    def tell(finding: Finding) -> None:
        found.append(finding)
        if as_json:
            return
        click.echo(f"{marks[finding.level]} {finding.subject:<10} {finding.text}")
        if finding.advice:
            click.echo(f"{'':>9}{'':<11}-> {finding.advice}")

    async def look() -> None:
        if check_checkpoints:
            import_like_workers(options.find_profile())
        async for finding in examine(options.find_profile, check_checkpoints=check_checkpoints, fix=fix):
            tell(finding)

    asyncio.run(look())
    if check_blobs:
        with bar("blobs") as progress:
            of_blobs = examine_blobs(options.find_profile, fix=fix, progress=progress)
        for finding in of_blobs:
            tell(finding)
    is_well = all(finding.level != "problem" for finding in found)
    if as_json:
        click.echo(display.as_json(found))
    else:
        console.print("All is well." if is_well else "Something is wrong: see the lines above that say 'problem'.")
    sys.exit(0 if is_well else 1)


def refuse_to_overwrite(files: Iterable[Path]) -> None:
    """`ProfileError` if one of the files is there, before anything is made."""
    from prunus.errors import ProfileError

    if there := [str(file) for file in files if os.path.lexists(file)]:
        raise ProfileError(
            f"the keys for clients are written to this folder, and it has {' and '.join(there)} already; move that away"
        )


def add_first_keys(profile: Profile, program: str) -> None:
    from prunus.errors import ProfileError

    for role in FIRST_KEYS:
        try:
            add_key(profile, role, role, default_file(role))
        except ProfileError as error:
            add = f"{program} key add {role} --role {role}"
            raise ProfileError(f"the profile is made, but not its key for a {role}: {error}; later: {add}") from error
