"""What users write is checked by mypy and by pyright, both strict: right programs pass, each wrong line is found."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from prunus import ProcessResult
from tests.typing import accepted

ROOT = Path(__file__).resolve().parents[2]
REJECTED = "tests/typing/rejected.py"
RIGHT = [
    "tests/typing/accepted.py",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.py")),
]
MARK = "  # wrong: "
CHECK_TIMEOUT_S = 60


class Fault(NamedTuple):
    """What a checker finds."""

    file: str
    line: int
    message: str


@cache
def mypy() -> tuple[Fault, ...]:
    """What mypy finds, with the settings of the project."""
    shown = output_of("mypy", "--strict", "--output=json", *RIGHT, REJECTED)
    found = [json.loads(line) for line in shown.splitlines()]
    return tuple(Fault(each["file"], each["line"], each["message"]) for each in found if each["severity"] == "error")


@cache
def pyright() -> tuple[Fault, ...]:
    """What pyright finds, with the settings of the project."""
    options = ("--project", "pyproject.toml", "--pythonpath", sys.executable, "--outputjson")
    found = json.loads(output_of("basedpyright", *options, *RIGHT, REJECTED))
    assert found["summary"]["filesAnalyzed"] == len([*RIGHT, REJECTED])
    return tuple(
        Fault(Path(each["file"]).relative_to(ROOT).as_posix(), each["range"]["start"]["line"] + 1, each["message"])
        for each in found["generalDiagnostics"]
        if each["severity"] in ("error", "warning")
    )


def output_of(module: str, *arguments: str) -> str:
    """What a checker prints; it may find what it wants, but not fail."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


both_checkers = pytest.mark.parametrize("checker", [mypy, pyright])


@pytest.mark.timeout(2 * CHECK_TIMEOUT_S)
@both_checkers
def test_right_programs_pass(checker: Callable[[], tuple[Fault, ...]]) -> None:
    """Nothing is found in the programs that use all of the public face, nor in the examples."""
    assert [fault for fault in checker() if fault.file in RIGHT] == []


@pytest.mark.timeout(2 * CHECK_TIMEOUT_S)
@both_checkers
def test_each_wrong_line_is_found(checker: Callable[[], tuple[Fault, ...]]) -> None:
    """And no other line of that file."""
    lines = (ROOT / REJECTED).read_text(encoding="utf-8").splitlines()
    wrong = {number: line for number, line in enumerate(lines, 1) if MARK in line}
    found = {fault.line: fault.message for fault in checker() if fault.file == REJECTED}
    assert {line: text for line, text in wrong.items() if line not in found} == {}, "wrong, and not found"
    assert {line: text for line, text in found.items() if line not in wrong} == {}, "found, and not wrong"


@pytest.mark.parametrize("path", RIGHT)
def test_right_programs_need_no_ignores(path: str) -> None:
    """No comment tells a checker to look away."""
    text = (ROOT / path).read_text(encoding="utf-8")
    assert [word for word in ("type: ignore", "pyright:", "cast(") if word in text] == []


async def test_right_programs_run() -> None:
    """What the checkers accept does what its types say."""
    results = await accepted.run_alone()
    ended = [result for result in results if isinstance(result, ProcessResult)]
    assert len(ended) == 12
    assert all(result.successful for result in ended)
    assert "third: Cu" in results


def test_right_scripts_run() -> None:
    """Without an event loop too."""
    assert accepted.run_in_a_script() == 8.0
