"""Letters, messages, queries and updates that go wrong: somebody is told, and the process goes on as if nothing was."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from prunus import errors
from prunus.persistence.checkpoint import encode_data, encode_value
from prunus.runtime.controller import ProcessHandle
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import features
from tests.runtime.waiting import until

WRONG_LETTERS: dict[str, dict[str, Any]] = {
    "no type": {"reason": "none"},
    "an unknown type": {"type": "dance"},
    "a type that is none": {"type": 3},
    "an unknown fact": {"type": "pause", "colour": "red"},
    "a reason that is no text": {"type": "pause", "reason": 3},
    "a grace that is no number": {"type": "kill", "grace_s": "soon"},
    "a force that is no bool": {"type": "kill", "force": "very"},
    "a step that is no text": {"type": "pause_at", "step": ["run"]},
    "arguments that are no list": {"type": "update", "name": "fails", "args": 3},
    "values that are no dictionary": {"type": "edit_context", "values": [1]},
}


async def shaky(daemon: LocalDaemon, **inputs: Any) -> ProcessHandle:
    """It waits, and nobody holds it."""
    handle = await daemon.controller.launch(features.Shaky, inputs)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    return handle


async def test_letters_that_are_wrong_in_any_fact_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Each is well encoded and says what can't be: none sets the process aside, changes it, or comes again."""
    async with LocalDaemon() as daemon:
        handle = await shaky(daemon)
        persister = daemon.controller._backend.persister
        for name, letter in WRONG_LETTERS.items():
            caplog.clear()
            posted = await persister.post(handle.pid, encode_data(letter))
            record = await until(handle, lambda row, seq=posted.seq: row.inbox_done >= seq or row.aside is not None)
            assert (record.aside, record.state, record.play) == (None, "waiting", "playing"), name
            assert "got a letter that can't be read" in caplog.text, name
        await handle.resume()
        assert (await handle.result()).successful


async def test_an_answer_to_a_letter_that_fits_nothing_is_an_error() -> None:
    """A resume of what is not suspended, a settle without an effect, an update and an edit that it does not have."""
    async with LocalDaemon() as daemon:
        handle = await shaky(daemon, listens=True)
        with pytest.raises(errors.InvalidStateError, match="suspended"):
            await handle.resume()
        with pytest.raises(errors.InvalidStateError, match="took effect"):
            await handle.settle()
        with pytest.raises(errors.InvalidInputError, match="no such query or update"):
            await handle.update("dances")
        with pytest.raises(errors.InvalidInputError, match="it is a query"):
            await handle.update("number")
        with pytest.raises(errors.InvalidInputError, match="it is an update"):
            await handle.query("fails")
        await handle.send("note", "the end")
        assert (await handle.result()).outputs.thing == "the end"


POINT = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Point:
    x: int
"""


async def test_messages_that_can_t_be_decoded_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that mean nothing, and a value whose class is gone: a line in the log of the process says so, the next
    message is taken."""
    (tmp_path / "short_lived.py").write_text(POINT)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    value = encode_value(importlib.import_module("short_lived").Point(3))
    (tmp_path / "short_lived.py").unlink()
    del sys.modules["short_lived"]
    importlib.invalidate_caches()
    async with LocalDaemon() as daemon:
        handle = await shaky(daemon, listens=True)
        for body in (b"", b"\xff\xc1", value):
            await daemon.controller._backend.persister.send(handle.pid, "note", body, at=0.0)
        await handle.send("note", "good")
        assert (await handle.result()).outputs.thing == "good"
        dropped = [line.text for line in await handle.log() if "a message was dropped" in line.text]
        assert (await handle.record()).mail == 0
    assert len(dropped) == 3
    assert "short_lived" in dropped[2]


async def test_a_message_of_another_type_is_dropped() -> None:
    """Its sender could not import the class, and so could not see that it does not fit."""
    async with LocalDaemon() as daemon:
        handle = await daemon.controller.launch(features.Review)
        await until(handle, lambda row: row.state == "waiting" and row.owner is None)
        await daemon.controller._backend.persister.send(handle.pid, "approve", encode_value("yes"), at=0.0)
        await handle.send("approve", True)
        assert (await handle.result()).value == "approved"
        [line] = await handle.log()
    assert "a message was dropped" in line.text
    assert "messages.approve" in line.text


async def test_a_query_that_goes_wrong_disturbs_nobody(tmp_path: Path) -> None:
    """Of a process that a worker holds, and of a parked one: its caller is told, the process does not notice."""
    async with LocalDaemon() as daemon:
        parked = await shaky(daemon)
        held = await daemon.controller.launch(Stuck, {"file": str(tmp_path / "go")})
        await until(held, lambda row: row.owner is not None and row.state == "running")
        with pytest.raises(LookupError, match="it is not here"):
            await parked.query("raises")
        with pytest.raises(errors.RemoteError, match="it is not here") as caught:
            await held.query("raises")
        assert caught.value.failure.type.endswith("LookupError")
        with pytest.raises(errors.UnsavableValueError, match="object"):
            await held.query("says_nothing_savable")
        assert await parked.query("number") == 1
        assert (await held.record()).state == "running"
        (tmp_path / "go").touch()
        await held.result()


class Stuck(features.Gated):
    """Its queries go wrong while it is in a step."""

    raises = features.Shaky.raises
    says_nothing_savable = features.Shaky.says_nothing_savable


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("fails", errors.RemoteError, "it does not work"),
        ("answers_nothing_savable", errors.UnsavableValueError, "answer"),
        ("spoils_the_context", errors.UnsavableValueError, r"ctx\.number"),
        ("spoils_an_output", errors.UnsavableValueError, r"outputs\.thing"),
    ],
)
async def test_an_update_that_goes_wrong_changes_nothing(name: str, error: type[Exception], words: str) -> None:
    """It raises, or leaves or answers what can't be saved: its caller is told, and the process is as it was."""
    async with LocalDaemon() as daemon:
        handle = await shaky(daemon)
        with pytest.raises(error, match=words):
            await handle.update(name)
        assert await handle.query("number") == 1
        assert "updated" not in [event.subject for event in await handle.history()]
        await handle.resume()
        result = await handle.result()
        assert result.successful
        assert result.outputs.thing is None
