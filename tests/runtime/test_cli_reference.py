"""The page on commands is drawn from the commands."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from prunus.runtime.cli import cli
from prunus.runtime.cli.reference import BEGIN, END, put_into, reference_as_markdown
from tests.runtime.shell import PROJECT


def test_the_page_has_the_reference_of_now() -> None:
    """If this fails: `python -m prunus.runtime.cli.reference docs/commands.md`."""
    page = (PROJECT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert put_into(page) == page


def test_every_option_that_people_see_is_in_it() -> None:
    """Of every command, also of those in groups; hidden ones are not."""
    text = reference_as_markdown()

    def check(command: click.Command, path: str) -> None:
        part = text.partition(f"### {path}\n")[2].partition("\n### ")[0] if path != "prunus" else text
        assert part
        for option in command.params:
            if isinstance(option, click.Option):
                assert (f"`{option.opts[0]}" in part) is not option.hidden
        if isinstance(command, click.Group):
            for name, below in command.commands.items():
                check(below, f"{path} {name}")

    check(cli, "prunus")


def test_the_module_prints_it() -> None:
    """And puts it only where there is a place for it."""
    ended = subprocess.run(
        [sys.executable, "-m", "prunus.runtime.cli.reference"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.rstrip("\n") == reference_as_markdown()
    assert put_into(f"a\n{BEGIN}\nold\n{END}\nb").endswith(f"\n\n{END}\nb")
    with pytest.raises(ValueError, match="has no place for the reference"):
        put_into("a page")
