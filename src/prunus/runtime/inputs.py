"""Inputs from a command line: ``element=Cu scales=[0.98,1,1.02] cell.a=3.6 structure=@file.yaml``.

A value is read as YAML with the core schema of YAML 1.2: true, false, null, whole numbers and floats (``1e-3`` too)
are what they look like and everything else is text. So ``No`` is an element and ``12:30`` is no number, unlike in
YAML 1.1. Quotes make text of anything (``code='"007"'`` in a shell).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 64 * 1024 * 1024

_CORE_SCHEMA = {
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
}


def read_inputs(words: Iterable[str]) -> dict[str, Any]:
    """The inputs that ``key=value`` words mean; ``ValueError`` that names the word and says what is wrong."""
    inputs: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        names = key.split(".")
        if not equals or not all(re.fullmatch(r"[^\W\d]\w*", name) for name in names):
            raise ValueError(f"{word!r} is not of the form key=value")
        try:
            value = _read_file(Path(text[1:])) if text.startswith("@") else read_value(text)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        place = inputs
        for name in names[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ValueError(f"{key}: {name} has a value already, so nothing can be put into it")
        if names[-1] in place:
            raise ValueError(f"{key} is given twice")
        place[names[-1]] = value
    return inputs


def read_value(text: str) -> Any:
    """One value; ``ValueError`` if it is not valid YAML."""
    import yaml

    try:
        return yaml.load(text, _loader())
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or error
        raise ValueError(f"this is not valid YAML ({problem}); quotes make text of it") from error


def _read_file(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes; give its path as the input instead")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text; give its path as the input instead") from error
    try:
        return read_value(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _loader() -> Any:
    import yaml

    class CoreLoader(yaml.SafeLoader):
        """A safe loader of the YAML 1.2 core schema."""

        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML copies it when one is added)

    def whole_number(loader: Any, node: Any) -> int:
        text = loader.construct_scalar(node)
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)

    for name, (pattern, first) in _CORE_SCHEMA.items():
        CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(pattern), first)
    CoreLoader.add_constructor("tag:yaml.org,2002:int", whole_number)
    return CoreLoader
