"""Processes in a file: they go on elsewhere where they were, and nothing bad comes out of a file."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import pickle
import stat
import struct
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from prunus import Process, ProcessSpec, Wait, WorkChain, message
from prunus.errors import ArchiveError, BusyError, CheckpointNotFoundError, StoreFullError
from prunus.persistence import encode_checkpoint
from prunus.persistence.persister import Cursor, Kept, NewProcess, Portion, Query, Record
from prunus.runtime import archive
from prunus.runtime.archive import MANIFEST, Manifest, import_archive, read_manifest, write_archive
from prunus.runtime.backend import Backend
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime import features, workflows
from tests.runtime.waiting import file_has, until


class Council(WorkChain):
    """Asks two people, and puts together what they say."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.output("said", valid_type=str)
        spec.outline(cls.ask, cls.conclude)

    async def ask(self) -> None:
        self.ctx.limit = 1.5
        for name in ("first", "second"):
            self.to_context(**{name: self.submit(workflows.Ask, tags=[name])})

    async def conclude(self) -> None:
        self.out("said", f"{self.ctx.first.outputs.answer} and {self.ctx.second.outputs.answer}")


class Orphaned(Process):
    """Ends before its child does."""

    async def run(self) -> None:
        self.submit(workflows.Ask, parent_close="abandon")


class Reader(Process):
    """Waits for its mail."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.message("note", valid_type=str)
        spec.message("go")
        spec.output("notes")

    async def run(self) -> Wait:
        return Wait(message("go"), then=self.read)

    async def read(self, go: Any) -> Wait:
        return Wait(message("note"), then=self.end)

    async def end(self, note: str) -> None:
        self.out("notes", note)


@pytest.fixture
async def there() -> AsyncIterator[LocalDaemon]:
    """Another daemon, to which processes come."""
    async with LocalDaemon() as daemon:
        yield daemon


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "out.prunus"


async def waiting_council(daemon: LocalDaemon) -> tuple[Any, list[Any]]:
    """One that waits for two children, which wait for people."""
    council = await daemon.controller.launch(Council, tags=["demo"], key="ours")
    await until(council, lambda row: row.state == "waiting" and row.owner is None)
    children = await council.children()
    for child in children:
        await until(child, lambda row: row.state == "waiting" and row.owner is None)
    return council, children


def put(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def bytes_of(file: Path) -> bytes:
    return file.read_bytes()


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


# --- what comes, and how ----------------------------------------------------------------------------


async def test_an_ended_process_is_as_it_was(daemon: LocalDaemon, there: LocalDaemon, file: Path) -> None:
    """Result, log, history, steps; nobody has to play it."""
    handle = await daemon.controller.launch(features.Chain, tags=["a"])
    result = await handle.result()
    manifest = await write_archive(daemon.controller, [handle.pid], file)
    assert [(entry.pid, entry.state) for entry in manifest.processes] == [(handle.pid, "finished")]
    adopted = await import_archive(there.controller, file)
    assert adopted.pids == (handle.pid,)
    copy = there.controller.handle(handle.pid)
    assert await copy.result() == result
    assert await copy.log() == await handle.log()
    assert await copy.steps() == await handle.steps()
    history, told = await handle.history(), await copy.history()
    assert told[:-1] == history
    assert told[-1].subject == "imported"
    forked = await copy.fork((await copy.steps())[-1].step)
    assert (await forked.result()).outputs == result.outputs


async def test_a_living_tree_waits_to_be_played_and_goes_on(
    daemon: LocalDaemon, there: LocalDaemon, file: Path
) -> None:
    """A parent, parked, with its children; after a play it ends as it would have at home, and there it does too."""
    council, children = await waiting_council(daemon)
    rows = [await handle.record() for handle in (council, *children)]
    await write_archive(daemon.controller, [council.pid], file)
    assert [await handle.record() for handle in (council, *children)] == rows, "nothing was disturbed"

    adopted = await import_archive(there.controller, file)
    assert set(adopted.pids) == {row.pid for row in rows}
    copies = [there.controller.handle(row.pid) for row in rows]
    for row, copy in zip(rows, copies, strict=True):
        arrived = await copy.record()
        assert (arrived.state, arrived.play, arrived.owner) == ("waiting", "paused", None)
        assert "imported from" in (arrived.status or "")
        assert (arrived.tags, arrived.key, arrived.parent, arrived.waits) == (row.tags, row.key, row.parent, row.waits)
    await copies[0].play(cascade=True)
    for parts in ([council, *children], copies):
        for copy in parts[1:]:
            tag = (await copy.record()).tags[0]
            await copy.resume(tag)
        assert (await parts[0].result()).outputs.said == "first and second"


async def test_a_copy_stays_paused_until_it_is_played_whatever_it_gets(
    daemon: LocalDaemon, there: LocalDaemon, file: Path
) -> None:
    """A letter that calls it changes nothing: the pause is in its checkpoint."""
    handle = await daemon.controller.launch(workflows.Ask)
    await until(handle, lambda row: row.state == "waiting")
    await write_archive(daemon.controller, [handle.pid], file)
    await import_archive(there.controller, file)
    copy = there.controller.handle(handle.pid)
    await copy.pause("another reason")
    row = await copy.record()
    assert (row.state, row.play) == ("waiting", "paused")
    assert "imported from" in (row.status or ""), "the first reason stays"
    await copy.resume("x")
    assert (await until(copy, lambda row: row.owner is None)).play == "paused"
    await copy.play()
    assert (await copy.result()).outputs.answer == "x"


async def test_with_play_those_that_played_go_on_at_once(daemon: LocalDaemon, there: LocalDaemon, file: Path) -> None:
    """Those that were paused stay so, with the reason that they had."""
    council, children = await waiting_council(daemon)
    await children[0].pause("not yet")
    await write_archive(daemon.controller, [council.pid], file)
    await import_archive(there.controller, file, play=True)
    paused, playing = (there.controller.handle(child.pid) for child in children)
    row = await paused.record()
    assert (row.play, row.status) == ("paused", "not yet")
    await playing.resume("a")
    await playing.result()
    await paused.play()
    await paused.resume("b")
    assert (await there.controller.handle(council.pid).result()).outputs.said == "b and a"


async def test_a_running_step_is_not_disturbed_and_runs_again_elsewhere(
    daemon: LocalDaemon, there: LocalDaemon, file: Path, tmp_path: Path
) -> None:
    """The copy is from before the step."""
    begun = tmp_path / "begun"
    handle = await daemon.controller.launch(workflows.Endless, {"begun": str(begun)})
    await file_has(begun, 1)
    asked = asyncio.create_task(handle.pause("soon"))
    await until(handle, lambda row: row.play == "pausing")
    await write_archive(daemon.controller, [handle.pid], file)
    assert (await handle.record()).owner is not None
    await import_archive(there.controller, file, play=True)
    copy = there.controller.handle(handle.pid)
    assert ((await copy.record()).play, (await copy.record()).status) == ("paused", "soon")
    assert len(begun.read_text().splitlines()) == 1
    await copy.play()
    first, second = await file_has(begun, 2)
    assert first == second, "the same idempotency key"
    await asyncio.gather(handle.kill(), copy.kill())
    await asyncio.gather(asked, return_exceptions=True)


async def test_mail_that_nobody_has_read_comes_along(daemon: LocalDaemon, there: LocalDaemon, file: Path) -> None:
    """Also what came while it waited for something else."""
    handle = await daemon.controller.launch(Reader)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    await handle.send("note", "early")
    await write_archive(daemon.controller, [handle.pid], file)
    await import_archive(there.controller, file, play=True)
    copy = there.controller.handle(handle.pid)
    await copy.send("go", None)
    assert (await copy.result()).outputs.notes == "early"


async def test_no_class_is_needed_to_export_or_import(daemon: LocalDaemon, there: LocalDaemon, file: Path) -> None:
    """Also not those of the values in a checkpoint."""
    snapshot = {"pid": "lost", "where": Path("a"), "control": {"seq": 3}}
    checkpoint = encode_checkpoint(snapshot, class_id="nowhere:Gone", class_version=7)
    created = NewProcess(pid="lost", class_id="nowhere:Gone", checkpoint=checkpoint, created_at=1.0, queue="nobody")
    await Backend(daemon.controller.communicator).persister.create(created)
    await write_archive(daemon.controller, ["lost"], file)
    await import_archive(there.controller, file)
    row = await there.controller.handle("lost").record()
    assert (row.class_id, row.state, row.play) == ("nowhere:Gone", "created", "paused")
    assert "imported from" in await there.controller.handle("lost").checkpoint_yaml()


async def test_a_family_of_several_pages_comes_whole(
    daemon: LocalDaemon, there: LocalDaemon, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Children that have ended too, the oldest first; and each process once, however often it is named."""
    monkeypatch.setattr(archive, "QUERY_LIMIT", 2)
    monkeypatch.setattr(archive, "AT_ONCE", 3)
    family = await daemon.controller.launch(workflows.Fan, {"count": 4})
    await family.result()
    children = [child.pid for child in await family.children()]
    manifest = await write_archive(daemon.controller, [children[2], family.pid, family.pid], file)
    assert [entry.pid for entry in manifest.processes][:2] == [family.pid, children[2]]
    assert sorted(entry.pid for entry in manifest.processes) == sorted([family.pid, *children])
    adopted = await import_archive(there.controller, file)
    assert sorted(adopted.pids) == sorted([family.pid, *children])


async def test_without_its_tree_only_what_has_ended_can_be_exported(
    daemon: LocalDaemon, there: LocalDaemon, file: Path
) -> None:
    """Or what needs nobody. The tree of one that has ended comes too unless it is left out."""
    council, children = await waiting_council(daemon)
    with pytest.raises(ArchiveError, match=r"needs .* leave out --no-tree"):
        await write_archive(daemon.controller, [council.pid], file, tree=False)
    assert list(file.parent.iterdir()) == []
    alone = await write_archive(daemon.controller, [children[0].pid], file, tree=False)
    assert len(alone.processes) == 1
    everybody = [child.pid for child in children] + [council.pid]
    manifest = await write_archive(daemon.controller, everybody, file, tree=False, replace=True)
    assert manifest.processes[0].pid == council.pid, "a parent goes first"

    orphaned = await daemon.controller.launch(Orphaned)
    await orphaned.result()
    assert len((await write_archive(daemon.controller, [orphaned.pid], file, replace=True)).processes) == 2
    await write_archive(daemon.controller, [orphaned.pid], file, replace=True, tree=False)
    assert (await import_archive(there.controller, file)).pids == (orphaned.pid,)


async def test_a_pid_that_is_here_is_refused_or_skipped(daemon: LocalDaemon, file: Path) -> None:
    """Refused: then nothing is imported."""
    pids = [(await daemon.controller.launch(workflows.Ask)).pid for _ in range(2)]
    await write_archive(daemon.controller, pids, file)
    await daemon.controller.handle(pids[0]).kill()
    await daemon.controller.handle(pids[0]).delete()
    with pytest.raises(ArchiveError, match=f"{pids[1]} is here already; nothing was imported"):
        await import_archive(daemon.controller, file)
    with pytest.raises(CheckpointNotFoundError):
        await daemon.controller.handle(pids[0]).record()
    adopted = await import_archive(daemon.controller, file, skip_existing=True)
    assert (adopted.pids, adopted.skipped) == ((pids[0],), (pids[1],))


async def test_a_large_archive_comes_in_many_calls_and_appears_at_once(
    daemon: LocalDaemon, there: LocalDaemon, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is to be seen before its last one."""
    monkeypatch.setattr(archive, "BATCH_BYTES", 4000)
    monkeypatch.setattr(archive, "PARCEL_BYTES", 1500)
    jobs = [(workflows.Add, {"a": number}) for number in range(40)]
    handles = await daemon.controller.launch_many(jobs)
    for handle in handles:
        await handle.result()
    await write_archive(daemon.controller, [handle.pid for handle in handles], file)
    seen: list[int] = []
    visible: list[dict[str, int]] = []

    def look(done: int, total: int) -> None:
        seen.append(done)
        if done < total:
            visible.append(there.store.statistics())

    adopted = await import_archive(there.controller, file, progress=look)
    assert set(map(str, visible)) == {"{}"}
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert len(adopted.pids) == await there.controller.processes().count() == 40


async def test_what_is_too_large_for_a_file_is_refused(
    daemon: LocalDaemon, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to do, and no file is left behind."""
    handle = await daemon.controller.launch(workflows.Ask)
    for name, value in (("MAX_ARCHIVE_BYTES", 100), ("MAX_PARTS", 0)):
        with monkeypatch.context() as patch:
            patch.setattr(archive, name, value)
            with pytest.raises(ArchiveError, match="several files"):
                await write_archive(daemon.controller, [handle.pid], file)
    assert list(file.parent.iterdir()) == []


async def test_a_copy_that_mail_overtakes_is_begun_again(daemon: LocalDaemon) -> None:
    """The first portion is of another moment than the second would be: both are read anew."""
    handle = await daemon.controller.launch(workflows.Ask)
    await until(handle, lambda row: row.state == "waiting" and row.owner is None)
    persister = Backend(daemon.controller.communicator).persister
    old = msgspec.structs.replace(await persister.export(handle.pid), next=Cursor("mail", 0, 77))
    with pytest.raises(BusyError, match="went on"):
        await persister.export(handle.pid, old.next)
    [portion] = await archive._portions_of(daemon.controller, handle.pid, old)
    assert portion == await persister.export(handle.pid)


async def test_a_file_appears_whole_and_for_its_owner_only(daemon: LocalDaemon, file: Path) -> None:
    """One that is there is kept unless it is to be replaced; an error leaves nothing."""
    handle = await daemon.controller.launch(workflows.Ask)
    await write_archive(daemon.controller, [handle.pid], file)
    assert mode_of(file) == 0o600
    before = bytes_of(file)
    with pytest.raises(ArchiveError, match="--force"):
        await write_archive(daemon.controller, [handle.pid], file)
    with pytest.raises(CheckpointNotFoundError):
        await write_archive(daemon.controller, [handle.pid, "nobody"], file, replace=True)
    assert bytes_of(file) == before
    assert list(file.parent.iterdir()) == [file]


async def test_a_full_disk_takes_nothing_from_elsewhere(daemon: LocalDaemon, there: LocalDaemon, file: Path) -> None:
    """It is new work."""
    handle = await daemon.controller.launch(workflows.Ask)
    await write_archive(daemon.controller, [handle.pid], file)
    there.broker.exchange._service.refuse_new = "x.db"  # type: ignore[union-attr]
    with pytest.raises(StoreFullError):
        await import_archive(there.controller, file)


# --- files that are not what they say ---------------------------------------------------------------


def portion_of(pid: str = "p", **changes: Any) -> Portion:
    checkpoint = encode_checkpoint({"pid": pid}, class_id="lab:Work", class_version=1)
    facts: dict[str, Any] = {"checkpoint": checkpoint, "state": "created", "play": "playing", **changes}
    record = Record(pid=pid, class_id="lab:Work", created_at=1.0, updated_at=1.0, epoch=0, seq=0, **facts)
    return Portion(pid=pid, kept=Kept(record=record, good_state="created"))


def pack(
    parts: dict[str, bytes],
    entries: Any = None,
    *,
    extra: Callable[[zipfile.ZipFile], None] | None = None,
    **facts: Any,
) -> bytes:
    """A zip with a manifest that fits to its parts, as far as `facts` do not say otherwise."""
    if entries is None:
        entries = [entry_of(*parts.values())]
    manifest = {"format": 1, "prunus": "0.1", "host": "far", "at": 1.0, "processes": entries, **facts}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)
        file.writestr(MANIFEST, json.dumps(manifest))
        if extra is not None:
            extra(file)
    return stream.getvalue()


def entry_of(*datas: bytes, pid: str = "p", **changes: Any) -> dict[str, Any]:
    parts = [{"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for data in datas]
    return {"pid": pid, "class_id": "lab:Work", "state": "created", "parts": parts, **changes}


GOOD = msgspec.msgpack.encode(portion_of())
NAME = "000000-000000.msgpack"


def packed(portion: Portion, **changes: Any) -> bytes:
    data = msgspec.msgpack.encode(portion)
    return pack({NAME: data}, [entry_of(data, **changes)])


def bomb() -> bytes:
    """A part that says that it is small, and is not."""
    stream = io.BytesIO()
    manifest = {"format": 1, "prunus": "0.1", "host": "far", "at": 1.0, "processes": [entry_of(GOOD)]}
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(NAME, bytes(50_000_000))
        file.writestr(MANIFEST, json.dumps(manifest))
    return stream.getvalue()


def with_large_directory() -> bytes:
    """One whose end says that its table of contents is huge."""
    data = bytearray(pack({NAME: GOOD}))
    struct.pack_into("<L", data, len(data) - 10, archive.MAX_DIRECTORY_BYTES + 1)
    return bytes(data)


class Trap:
    """Unpickling it would be seen."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


def hostile() -> dict[str, tuple[bytes, str]]:
    escape = {"../../escape": b"x", NAME: GOOD}
    other = encode_checkpoint({"pid": "q"}, class_id="lab:Work", class_version=1)
    foreign = encode_checkpoint({"pid": "p"}, class_id="lab:Other", class_version=1)
    deep = b"\x91" * 200_000
    torn = bytearray(portion_of().kept.record.checkpoint or b"")  # type: ignore[union-attr]
    torn[-1] ^= 0xFF
    return {
        "nothing": (b"", "no archive"),
        "text": (b"hello" * 100, "no archive"),
        "a pickle": (pickle.dumps(Trap()), "no archive"),
        "a pickle inside": (pack({NAME: pickle.dumps(Trap())}), "can't be read"),
        "cut": (pack({NAME: GOOD})[:-30], "no archive"),
        "a comment": (pack({NAME: GOOD}, extra=lambda file: setattr(file, "comment", b"x")), "no archive"),
        "a huge table": (with_large_directory(), "table of contents"),
        "no manifest": (zip_of({NAME: GOOD}), "no manifest"),
        "a broken manifest": (zip_of({MANIFEST: b"{"}), "manifest can't be read"),
        "a deep manifest": (zip_of({MANIFEST: b"[" * 100_000}), "manifest can't be read"),
        "another format": (pack({NAME: GOOD}, format=2), "upgrade Prunus"),
        "a path": (pack(escape, [entry_of(GOOD)]), "not those of its manifest"),
        "a part too few": (pack({NAME: GOOD}, [entry_of(GOOD, GOOD)]), "not those of its manifest"),
        "no part": (pack({}, [entry_of()]), "not those of its manifest"),
        "a part that is larger than it says": (bomb(), "larger than it says"),
        "too much": (pack({NAME: GOOD}, [{**entry_of(GOOD), "parts": [{"size": 10**10, "sha256": ""}]}]), "holds more"),
        "a negative size": (
            pack({NAME: GOOD}, [{**entry_of(GOOD), "parts": [{"size": -5, "sha256": ""}]}]),
            "holds more",
        ),
        "a flipped bit": (pack({NAME: GOOD[:-1] + b"x"}, [entry_of(GOOD)]), "checksum"),
        "noise": (pack({NAME: b"\xc1\xc1"}), "can't be read"),
        "depth": (pack({NAME: deep}), "can't be read"),
        "another pid": (packed(portion_of("q"), pid="p"), "do not fit together"),
        "another state": (packed(portion_of(), state="finished"), "another one than the manifest says"),
        "another's checkpoint": (packed(portion_of(checkpoint=other)), "that of another one"),
        "another class": (packed(portion_of(checkpoint=foreign)), "another class"),
        "a torn checkpoint": (packed(portion_of(checkpoint=bytes(torn))), "damaged"),
        "no checkpoint": (packed(portion_of(checkpoint=None)), "another one than"),
        "a result of noise": (packed(portion_of(state="finished", result=b"\xc1"), state="finished"), "can't be read"),
        "a result that is a number": (packed(portion_of(state="finished", result=b"1"), state="finished"), "result of"),
        "no beginning": (packed(Portion(pid="p")), "do not fit together"),
    }


def zip_of(parts: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return stream.getvalue()


@pytest.mark.parametrize("kind", hostile())
async def test_a_file_that_is_not_what_it_says_is_refused(daemon: LocalDaemon, file: Path, kind: str) -> None:
    """The error names the file; nothing is written, loaded, or imported."""
    data, why = hostile()[kind]
    put(file, data)
    with pytest.raises(ArchiveError, match=why) as caught:
        await import_archive(daemon.controller, file)
    assert str(file) in str(caught.value)
    assert await daemon.controller.find(Query()) == []
    assert list(file.parent.iterdir()) == [file]


async def test_what_was_changed_into_such_a_file_can_be_imported(daemon: LocalDaemon, file: Path) -> None:
    """So it is not for another reason that the others are refused."""
    put(file, pack({NAME: GOOD}))
    assert (await import_archive(daemon.controller, file)).pids == ("p",)


def test_flipped_bytes_are_found(tmp_path: Path) -> None:
    """Whichever: a file is refused, or says the same."""
    sound = pack({NAME: GOOD})
    file = tmp_path / "f"
    file.write_bytes(sound)
    manifest = read_manifest(file)
    for place in range(0, len(sound), 3):
        changed = bytearray(sound)
        changed[place] ^= 0x41
        file.write_bytes(bytes(changed))
        try:
            found = read_manifest(file)
        except ArchiveError:
            continue
        assert [entry.parts for entry in found.processes] == [entry.parts for entry in manifest.processes]


def test_a_host_is_shown_without_what_a_terminal_obeys() -> None:
    """It comes from the file."""
    manifest = Manifest(format=1, prunus="1", host="a\x1b[2J b\n", at=0.0, processes=())
    assert archive.shown_host(manifest) == "a??2J?b?"
    assert archive.shown_host(msgspec.structs.replace(manifest, host="")) == "nowhere"
