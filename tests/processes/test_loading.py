"""From a class to its name and back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prunus.errors import ProcessClassNotFoundError
from prunus.processes import Process, class_id, load_class

MODULE = """
from prunus.processes import Process

class Good(Process):
    async def run(self): ...

    class Inner(Process):
        async def run(self): ...

class NoProcess: ...

value = 3
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with a good module and some bad ones."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "loadable.py").write_text(MODULE)
    (tmp_path / "exits.py").write_text("raise SystemExit(3)")
    (tmp_path / "raises.py").write_text("1 / 0")
    (tmp_path / "lacks.py").write_text("import a_module_that_is_not_there")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


@pytest.mark.usefixtures("modules")
def test_a_class_is_found_by_its_name() -> None:
    """Nested ones too; the name of what was loaded is the name it was loaded by."""
    for identifier in ("loadable:Good", "loadable:Good.Inner"):
        assert class_id(load_class(identifier)) == identifier
    assert load_class("loadable:Good", ("other", "load*")).__name__ == "Good"


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("identifier", "reason"),
    [
        ("nothing", "package.module:Class"),
        (":Good", "package.module:Class"),
        ("__main__:Good", "put the class into a module"),
        ("loadable:f.<locals>.Good", "top level"),
        ("not_there.at_all:Good", "there is no module 'not_there'"),
        ("loadable.inner:Good", "importing its module fails|there is no module"),
        ("loadable:Bad", "renamed or moved"),
        ("loadable:NoProcess", "no Process class"),
        ("loadable:value", "no Process class"),
        ("exits:Good", "SystemExit: 3"),
        ("raises:Good", "ZeroDivisionError"),
        ("lacks:Good", "a_module_that_is_not_there"),
    ],
)
def test_what_can_not_be_loaded_says_why(identifier: str, reason: str) -> None:
    """Whatever is wrong is one error, with what to do."""
    with pytest.raises(ProcessClassNotFoundError, match=reason) as raised:
        load_class(identifier)
    assert raised.value.identifier == identifier


@pytest.mark.usefixtures("modules")
def test_a_module_that_is_not_allowed_is_not_imported() -> None:
    """The patterns are looked at before anything runs."""
    with pytest.raises(ProcessClassNotFoundError, match="not among those allowed"):
        load_class("exits:Good", ("load*",))
    assert "exits" not in sys.modules


def test_a_local_class_has_a_name_that_nobody_can_load() -> None:
    """It can still be executed here, but the name tells that it is local."""

    class Local(Process):
        async def run(self) -> None: ...

    with pytest.raises(ProcessClassNotFoundError, match="top level"):
        load_class(class_id(Local))
