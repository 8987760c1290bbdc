"""The documentation is true: its transcripts run as printed and its links lead somewhere.

A page may hold two kinds of blocks that are taken by their word. They are worked off in their order, in an
empty folder for each page:

* ```` ```python file=NAME ````: the text of a file;
* ```` ```console run ````: lines that begin with ``$`` are typed into a shell, the lines below each are what it
  prints (``...`` stands for anything). The page owns a home folder and, if it starts one, a daemon.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest

from prunus.processes.states import PLAY_TABLE, STATE_TABLE, Event, PlayEvent, diagram
from prunus.runtime.cli import cli
from prunus.runtime.profile import Config
from tests.messaging.wire_reference import tables_as_markdown
from tests.processes.test_control_table import table_as_markdown

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = sorted((ROOT / "docs" / "tutorial").glob("*.md"))
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*/*.md")],
    key=lambda page: page.relative_to(ROOT).as_posix(),
)
BLOCK = re.compile(r"^```(?P<info>[^\n`]+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?P<target>[^)\s]+)\)")
COMMAND_TIMEOUT_S = 25
WAITING = re.compile(r"^waiting for .* \.\.\.\n", re.MULTILINE)
"""What a command says when the machine is busy."""


def names(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def transcripts() -> list[Path]:
    return [page for page in PAGES if "```console run" in page.read_text(encoding="utf-8")]


def exchanges(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a transcript and what each prints."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def anchors(page: Path) -> set[str]:
    """The names of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def shell(short_folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """An empty folder, and the environment of a user who has nothing but `prunus` and `python` on the path."""
    programs, home, folder = (short_folder / name for name in ("bin", "home", "work"))
    for made in (programs, home, folder):
        made.mkdir()
    prunus = programs / "prunus"
    prunus.write_text(f"#!/bin/sh\nexec '{sys.executable}' -P -m prunus.runtime.cli \"$@\"\n")
    prunus.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PRUNUS", "XDG", "PYTEST"))}
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    source = {"PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "error"}
    environment = inherited | source | {"PATH": path, "HOME": str(home), "COLUMNS": "200"}
    yield folder, environment
    subprocess.run([prunus, "daemon", "stop"], cwd=folder, env=environment, check=False, capture_output=True)


@pytest.mark.timeout(90)
@pytest.mark.parametrize("page", transcripts(), ids=names)
def test_transcripts_come_out_as_printed(page: Path, shell: tuple[Path, dict[str, str]]) -> None:
    """Whoever types what a page shows sees what the page says."""
    folder, environment = shell
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        language, _, option = block["info"].partition(" ")
        if option.startswith("file="):
            (folder / option.removeprefix("file=")).write_text(block["text"], encoding="utf-8")
        elif (language, option) == ("console", "run"):
            for command, expected in exchanges(block["text"]):
                done = subprocess.run(
                    ["bash", "-c", command],
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=COMMAND_TIMEOUT_S,
                    check=False,
                )
                printed = WAITING.sub("", done.stdout)
                same = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
                assert same, f"$ {command}\nprints:\n{printed}\nbut the page says:\n{expected}"


@pytest.mark.parametrize("page", TUTORIAL, ids=names)
def test_nothing_in_a_tutorial_is_only_for_show(page: Path) -> None:
    """Each block is a transcript, or a file that a later block runs, launches or imports."""
    blocks = list(BLOCK.finditer(page.read_text(encoding="utf-8")))
    assert any(block["info"] == "console run" for block in blocks)
    for number, block in enumerate(blocks):
        _, _, option = block["info"].partition(" ")
        assert block["info"] == "console run" or option.startswith("file="), f"not run: {block['text']}"
        if option.startswith("file="):
            name = Path(option.removeprefix("file=")).stem
            later = "".join(after["text"] for after in blocks[number + 1 :])
            assert re.search(rf"\b{name}(\.py\b|:| import\b)", later), f"nothing uses {name}"


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    """Each link to a file of the repository, and to a heading of a page, has its target."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.finditer(text):
        path, _, anchor = link["target"].partition("#")
        if path.startswith(("http:", "https:")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{names(page)} links to {link['target']}"
        assert not anchor or anchor in anchors(target), f"{names(page)} links to {link['target']}"


def test_every_page_can_be_found() -> None:
    """Links lead from the index to every page of the documentation."""
    found, unread = set[Path](), [ROOT / "docs" / "index.md"]
    while unread:
        page = unread.pop()
        found.add(page)
        links = LINK.finditer(BLOCK.sub("", page.read_text(encoding="utf-8")))
        targets = {(page.parent / link["target"].partition("#")[0]).resolve() for link in links}
        unread += [target for target in targets - found if target.suffix == ".md" and target.is_file()]
    assert not [names(page) for page in (ROOT / "docs").rglob("*.md") if page not in found]


def test_the_migration_page_has_every_pair_of_control_calls() -> None:
    """It says of each two of pause, play, kill and resume in a row what becomes of them."""
    calls = ("pause", "play", "kill", "resume")
    shown = [row[0] for row in table_rows("migrating-from-plumpy.md")]
    assert [f"{first}, {second}" for first in calls for second in calls if f"{first}, {second}" not in shown] == []


def table_rows(page: str) -> list[list[str]]:
    """The rows of all tables of a page, without Markdown's quotes."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]


def test_the_documented_transitions_are_the_tables() -> None:
    """The page on states shows exactly the transitions that the code allows."""
    known = {str(event) for event in [*Event, *PlayEvent]}
    shown = {
        (row[0], row[1]): set(row[2].split(", "))
        for row in table_rows("states-and-control.md")
        if row[1] in known and len(row) == 3
    }
    coded = [*STATE_TABLE.items(), *PLAY_TABLE.items()]
    assert shown == {(str(source), str(event)): {str(t) for t in targets} for (source, event), targets in coded}


def test_the_documented_pairs_of_commands_are_the_table_of_the_tests() -> None:
    """What two commands back to back lead to is what the tests of the processes run."""
    page = (ROOT / "docs" / "states-and-control.md").read_text(encoding="utf-8")
    assert table_as_markdown().strip() in page


def test_the_documented_diagram_is_drawn_from_the_table() -> None:
    """The picture of the states."""
    page = (ROOT / "docs" / "states-and-control.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{diagram()}\n```" in page


def test_the_documented_messages_are_those_of_the_wire() -> None:
    """The page on the protocol has every message with its fields (`python -m tests.messaging.wire_reference`)."""
    page = (ROOT / "docs" / "wire-protocol.md").read_text(encoding="utf-8")
    assert tables_as_markdown() in page


@pytest.mark.parametrize(("page", "least"), [("README.md", 10), ("docs/guarantees.md", 30), ("docs/for-aiida.md", 30)])
def test_the_tests_that_a_promise_names_are_there(page: str, least: int) -> None:
    """Each of them, in the file where it is said to be."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py|contract)(?:::(test_\w+))?`", text)
    assert len(named) >= least
    for file, test in named:
        path = ROOT / ("src/prunus/testing/communicator_contract.py" if file == "contract" else file)
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), f"{file}::{test}"
        assert path.is_file(), file


def test_the_documented_settings_are_the_fields() -> None:
    """The page on configuration names every setting with its default, and no other."""
    shown = {row[0]: row[1] for row in table_rows("configuration.md") if row[0].isidentifier() and row[0] != "key"}
    assert shown == {name: json.dumps(value) for name, value in msgspec.to_builtins(Config()).items()}


def test_every_command_is_documented() -> None:
    """The page on commands names every command of `prunus`."""
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    missing = [path for path in command_paths(cli, "prunus") if path not in text]
    assert not missing


def command_paths(command: click.Command, path: str) -> Iterator[str]:
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from command_paths(below, f"{path} {name}")
    else:
        yield path
