"""The reference of the command line, drawn from the commands themselves.

``python -m prunus.runtime.cli.reference`` prints it as Markdown; with the name of a page as an argument it puts it into
the page, between `BEGIN` and `END`. A test compares the page with the commands.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from prunus.runtime.cli import cli
from prunus.runtime.cli.group import EXIT_CODES, sections

BEGIN = "<!-- what follows is made by `python -m prunus.runtime.cli.reference docs/commands.md` -->"
END = "<!-- the end of what is made -->"


def reference_as_markdown() -> str:
    """Every command with its arguments and options, in the order and under the titles of ``prunus --help``."""
    context = click.Context(cli, info_name="prunus")
    parts = ["## Exit codes", _table("code", "meaning", [(f"{code}", text) for code, text in EXIT_CODES.items()])]
    parts += ["## Options of every command", _options(cli, context)]
    for title, commands in sections(cli).items():
        parts.append(f"## {title}")
        for name, command in commands.items():
            parts += _described(command, click.Context(command, info_name=name, parent=context))
    return "\n\n".join(parts)


def _described(command: click.Command, context: click.Context) -> Iterator[str]:
    """The heading, the usage, the text and the options of a command, and those of the commands in it."""
    yield f"### {context.command_path}"
    yield f"```console\n$ {' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        verbatim = paragraph.removeprefix("\b\n")
        yield paragraph if verbatim == paragraph else f"```text\n{verbatim}\n```"
    yield from filter(None, [_options(command, context)])
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            if not below.hidden:
                yield from _described(below, click.Context(below, info_name=name, parent=context))


def _options(command: click.Command, context: click.Context) -> str:
    records = [
        option.get_help_record(context)
        for option in command.get_params(context)
        if isinstance(option, click.Option) and "--help" not in option.opts
    ]
    rows = [(f"`{flags}`", text) for flags, text in filter(None, records)]
    return _table("option", "", rows) if rows else ""


def _table(first: str, second: str, rows: list[tuple[str, str]]) -> str:
    cells = [f"| {left.replace('|', chr(92) + '|')} | {' '.join(right.split())} |" for left, right in rows]
    return "\n".join([f"| {first} | {second} |", "|---|---|", *cells])


def put_into(page: str) -> str:
    """The text of a page with the reference in its place; `ValueError` if it has no place for it."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for the reference: a line {BEGIN!r} and a line {END!r}")
    return f"{head}{BEGIN}\n\n{reference_as_markdown()}\n\n{END}{tail}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        file = Path(sys.argv[1])
        file.write_text(put_into(file.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(reference_as_markdown())
