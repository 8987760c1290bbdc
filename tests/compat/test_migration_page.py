"""What the page for kiwipy's users says is what the tests show."""

from __future__ import annotations

from pathlib import Path

from tests.compat import test_kiwipy

PAGE = Path(__file__).parents[2] / "docs" / "migrating-from-kiwipy.md"


def test_each_row_of_the_comparison_is_a_test() -> None:
    """The last column names it."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    named = [row[-1] for row in rows if len(row) == 4 and row[-1] != "test"]
    assert len(named) > 30
    assert [name for name in named if not hasattr(test_kiwipy, name)] == []
