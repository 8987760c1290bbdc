"""What the words of a command line mean as inputs."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.runtime.inputs import read_inputs, read_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Cu", "Cu"),
        ("No", "No"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("null", None),
        ("", None),
        ("7", 7),
        ("-7", -7),
        ("007", 7),
        ("0x10", 16),
        ("0o10", 8),
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1.5E+3", -1500.0),
        ("-.inf", -math.inf),
        ("1_000", "1_000"),
        ("'7'", "7"),
        ('"007"', "007"),
        ("[1, 2.0, No]", [1, 2.0, "No"]),
        ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}),
        ("a=b", "a=b"),
        ("pkg.mod:Class", "pkg.mod:Class"),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, value: Any) -> None:
    """Of the same type too; what looks like nothing else is text."""
    found = read_value(text)
    assert found == value
    assert type(found) is type(value)


def test_words_become_inputs(tmp_path: Path) -> None:
    """Dotted keys make namespaces; a file is read after an @."""
    file = tmp_path / "cell.yaml"
    file.write_text("a: 3.6\nsymbols: [Cu, No]\n")
    assert read_inputs(["element=Cu", f"cell=@{file}", "opt.tol=1e-3", "opt.deep.n=2", "note="]) == {
        "element": "Cu",
        "cell": {"a": 3.6, "symbols": ["Cu", "No"]},
        "opt": {"tol": 1e-3, "deep": {"n": 2}},
        "note": None,
    }


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["Cu"], "'Cu' is not of the form key=value"),
        (["=Cu"], "not of the form"),
        (["a..b=1"], "not of the form"),
        (["1a=1"], "not of the form"),
        (["a=1", "a=2"], "a is given twice"),
        (["a=1", "a.b=2"], r"a\.b: a has a value already"),
        (["a.b=2", "a=1"], "a is given twice"),
        (["a=[1"], "a: this is not valid YAML"),
        (["a=!!python/name:os.system"], "a: this is not valid YAML"),
        (["a=@/no/such/file"], "a: /no/such/file can't be read: No such file"),
        (["a=@/"], "a: / can't be read: Is a directory"),
        (["a=" + "[" * 5000], "a: this is not valid YAML"),
    ],
)
def test_a_wrong_word_is_named(words: list[str], complaint: str) -> None:
    """With what is wrong about it."""
    with pytest.raises(ValueError, match=complaint):
        read_inputs(words)


@given(st.text())
def test_no_text_breaks_it(text: str) -> None:
    """Any value is a value or a ``ValueError``."""
    try:
        read_value(text)
    except ValueError as error:
        assert "YAML" in str(error)  # noqa: PT017 (most texts raise nothing)
