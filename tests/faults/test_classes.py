"""A class that a worker can't import: its process is set aside with the reason, and goes on when that is mended."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.parts import Services, claims, command_line, set_aside
from tests.runtime import workflows
from tests.runtime.waiting import file_has

GOOD = """
from prunus import Process

class Fragile(Process):
    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.output("whole")

    async def run(self):
        self.out("whole", True)
"""

BROKEN = {
    "it is not there": (None, "there is no module 'fragile' here"),
    "it raises": (f"1 / 0\n{GOOD}", "ZeroDivisionError: division by zero"),
    "it needs what is not there": (f"import not_installed\n{GOOD}", "No module named 'not_installed'"),
    "it ends the program": (f"import sys\nsys.exit(3)\n{GOOD}", "SystemExit: 3"),
    "it is no Python": (f"class\n{GOOD}", "SyntaxError"),
    "it has lost the class": (GOOD.replace("Fragile", "Solid"), "no 'Fragile'"),
    "it has another thing by that name": ("Fragile = 3", "it is no Process class"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Who launches can import the class."""
    (tmp_path / "fragile.py").write_text(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    sys.modules.pop("fragile", None)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("here")
async def test_it_is_set_aside_and_goes_on_when_mended(short_folder: Path) -> None:
    """Whatever is wrong with the module: one look, a reason, the doctor's advice; nobody else is affected."""
    there, journal = short_folder / "there", short_folder / "journal"
    there.mkdir()
    module = there / "fragile.py"
    async with Services(short_folder, workers=1, slots=16, import_from=[there]) as services:
        profile, launch = services.profile.path, services.controller.launch
        other = await launch(workflows.Journal, {"file": str(journal), "steps": 100_000, "pace_s": 0.01})
        handles = []
        for number, (source, reason) in enumerate(BROKEN.values()):
            module.unlink(missing_ok=True)
            if source is not None:  # of a different length each: a stale .pyc is told by size and time
                module.write_text(source + "#" * number)
            handles.append(await launch("fragile:Fragile"))
            assert reason in await set_aside(handles[-1])
            if number == 5:  # this module could be imported: it stays until the worker is another one
                services.kill("worker-1")
                services.start("worker-1")
        written = len(await file_has(journal, 1))
        await file_has(journal, written + 20)
        assert [await claims(handle) for handle in handles] == [1] * len(handles), "no hot loop"

        doctor = await command_line(profile, "doctor")
        assert doctor.code == 1
        for handle in handles:
            assert "Fragile is set aside: the class 'fragile:Fragile' can't be loaded" in doctor.out
            assert f"mend the cause, then `prunus retry {handle.pid[-8:]}`" in doctor.out
        await handles[0].retry()
        assert "no Process class" in await set_aside(handles[0]), "it is not mended yet"

        module.write_text(GOOD)
        services.kill("worker-1")
        services.start("worker-1")
        retried = await command_line(profile, "retry", *(handle.pid for handle in handles))
        assert retried.code == 0, retried
        for handle in handles:
            assert (await handle.result()).outputs.whole is True
        assert [await claims(handle) for handle in handles] == [3] + [2] * (len(handles) - 1)
        assert (await other.record()).state == "running"
        await other.kill()


@pytest.mark.usefixtures("here")
async def test_a_class_that_is_gone_can_be_killed_all_the_same(short_folder: Path) -> None:
    """A kill does not need its code."""
    async with Services(short_folder, workers=1) as services:
        handle = await services.controller.launch("fragile:Fragile")
        await set_aside(handle)
        killed = await command_line(services.profile.path, "kill", handle.pid, "-m", "no use")
        assert killed.code == 0, killed
        assert (await handle.record()).state == "killed"


async def test_a_module_that_is_not_allowed_is_not_imported(short_folder: Path) -> None:
    """The profile says which modules may be imported; the reason says so."""
    async with Services(short_folder, workers=0) as services:
        config = services.profile.path / "config.yaml"
        config.write_text(config.read_text().replace('modules: ["*"]', 'modules: ["elsewhere.*"]'))
        services.start("worker-1")
        handle = await services.controller.launch(workflows.Add, {"a": 1})
        assert "not among those allowed here (elsewhere.*, prunus.*)" in await set_aside(handle)
