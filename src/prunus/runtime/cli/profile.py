"""``prunus init`` and ``prunus doctor``: a profile, made and examined."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import click

from prunus.runtime.cli.connection import import_like_workers
from prunus.runtime.cli.group import Command, Options
from prunus.runtime.cli.patience import bar


@click.command(cls=Command)
@click.option("--profile", "name", metavar="NAME|PATH", help="The user's own profile NAME, or the folder PATH.")
@click.option("-w", "--workers", type=click.IntRange(0, 1024), help="How many workers the daemon starts.")
@click.option("--listen", multiple=True, metavar="tcp://ADDRESS:PORT", help="Clients with a key may come over a network.")  # fmt: skip  # noqa: E501
@click.pass_obj
def init(options: Options, name: str | None, workers: int | None, listen: tuple[str, ...]) -> None:
    """Make a profile: in ./.prunus, or the user's own one NAME."""
    options.refuse_key()
    import msgspec

    from prunus.runtime.profile import FOLDER_NAME, Config, Profile

    name = name or options.profile
    path = Path(FOLDER_NAME) if name is None else Profile.path_of(name)
    config = Config() if path.name == FOLDER_NAME else Config(import_from=[str(Path.cwd())])
    if workers is not None:
        config = msgspec.structs.replace(config, workers=workers)
    if listen:
        from prunus.messaging.keys import check_place

        for place in listen:
            check_place(place)
    profile = Profile.create(path, msgspec.structs.replace(config, listen=list(listen)))
    if listen:
        profile.keys.make()
    option = "" if name is None else f" --profile {name}"
    click.echo(f"A new profile: {profile.path}")
    click.echo(f"Workers import classes from {', '.join(map(str, profile.import_folders))} (see config.yaml there).")
    if listen:
        click.echo(
            f"Its broker will listen at {', '.join(listen)}, for those who hold a key: "
            f"prunus{option} key add NAME --role worker"
        )
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

    def say(finding: Finding) -> None:
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
            say(finding)

    asyncio.run(look())
    if check_blobs:
        with bar("blobs") as progress:
            of_blobs = examine_blobs(options.find_profile, fix=fix, progress=progress)
        for finding in of_blobs:
            say(finding)
    is_well = all(finding.level != "problem" for finding in found)
    if as_json:
        click.echo(display.as_json(found))
    else:
        console.print("All is well." if is_well else "Something is wrong: see the lines above that say 'problem'.")
    sys.exit(0 if is_well else 1)
