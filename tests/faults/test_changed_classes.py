"""A class that has changed since its process was saved: what does not fit is set aside with the reason, and goes on
when that is mended."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import indent

import pytest

from prunus import errors
from prunus.runtime.controller import ProcessHandle
from prunus.testing.local_daemon import LocalDaemon
from tests.faults.parts import claims, set_aside
from tests.runtime.waiting import until

FIRST = """
from prunus import Process, Wait, message, query, step, update

class Changing(Process):
    version = 2

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.message("note", valid_type=str)
        spec.output("note")

    async def run(self):
        return Wait(message("note"), then=self.heard)

    async def heard(self, note):
        self.out("note", note)

    @query
    def question(self):
        return "answered"

    @update
    def change(self):
        return "changed"
"""


def migrate(body: str) -> str:
    return "\n    @classmethod\n    def migrate(cls, checkpoint, from_version):\n" + indent(body, " " * 8) + "\n"


CHANGES = {
    "a step is gone": (
        FIRST.replace("heard", "told"),
        "Changing has no step 'heard'; was it renamed? Say @step(renamed_from='heard')",
    ),
    "an older class": (
        FIRST.replace("version = 2", "version = 1"),
        "Changing is of version 1, and this checkpoint of version 2: a newer class wrote it",
    ),
    "a migration that fails": (
        FIRST.replace("version = 2", "version = 3") + migrate("return checkpoint['no such thing']"),
        "Changing.migrate failed from version 2: KeyError('no such thing')",
    ),
    "a migration that returns nothing": (
        FIRST.replace("version = 2", "version = 3") + migrate("checkpoint.clear()\nreturn 3"),
        "Changing.migrate must return the checkpoint, a dictionary, from version 2; it returned 3",
    ),
}

MENDED = {
    "the step has another name": FIRST.replace(
        "    async def heard", "    @step(renamed_from='heard')\n    async def told"
    ).replace("then=self.heard", "then=self.told"),
    "a migration that works": FIRST.replace("version = 2", "version = 3").replace("heard", "told")
    + migrate("assert from_version == 2\ncheckpoint['state']['pending'][0]['step'] = 'told'\nreturn checkpoint"),
}


@pytest.fixture
def rewrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Have the module `changing` be of this source, from the next import on."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(source: str) -> None:
        (tmp_path / "changing.py").write_text(source)
        sys.modules.pop("changing", None)
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("changing", None)


async def parked(daemon: LocalDaemon) -> ProcessHandle:
    handle = await daemon.controller.launch("changing:Changing")
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    return handle


@pytest.mark.parametrize("change", CHANGES)
async def test_what_does_not_fit_any_more_is_set_aside(change: str, rewrite: Callable[[str], None]) -> None:
    """One look, and the reason. Control says so at once; a kill needs no code; mended, it goes on with its message."""
    source, reason = CHANGES[change]
    rewrite(FIRST)
    async with LocalDaemon() as daemon:
        handle, doomed = await parked(daemon), await parked(daemon)
        rewrite(source)
        await handle.send("note", "kept")
        assert reason in await set_aside(handle)
        assert await claims(handle) == 2
        for call in (handle.pause, handle.resume, lambda: handle.update("change")):
            with pytest.raises(errors.InvalidStateError, match="prunus retry"):
                await call()
        with pytest.raises(errors.SpecError):
            await handle.query("question")
        await doomed.kill("no use")
        assert (await doomed.record()).state == "killed"
        rewrite(FIRST)
        assert await handle.query("question") == "answered"
        await handle.retry()
        record = await until(handle, lambda row: row.is_terminal or row.play == "paused")
        if not record.is_terminal:  # the letters that came meanwhile were kept too
            await handle.play()
        assert (await handle.result()).outputs.note == "kept"


@pytest.mark.parametrize("name", MENDED)
async def test_a_class_that_says_how_it_has_changed_goes_on(name: str, rewrite: Callable[[str], None]) -> None:
    """Its steps have other names; old checkpoints find them."""
    rewrite(FIRST)
    async with LocalDaemon() as daemon:
        handle = await parked(daemon)
        rewrite(MENDED[name])
        await handle.send("note", "found")
        assert (await handle.result()).outputs.note == "found"
        assert (await handle.record()).aside is None
