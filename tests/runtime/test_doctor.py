"""What the doctor makes of what the broker says; the rest of it is tested where its findings come from."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import prunus
from prunus.messaging.blobs import BlobStore
from prunus.runtime import doctor, reconcile
from prunus.runtime.display import span
from prunus.runtime.doctor import MAX_SHOWN, Finding, examine
from prunus.runtime.locks import ServiceLock
from prunus.runtime.profile import Profile
from prunus.runtime.services import End, Evidence, Notes, ServiceNote, write_notes
from prunus.testing.local_daemon import LocalDaemon
from prunus.testing.persister_contract import new
from tests.runtime import features
from tests.runtime.waiting import until


def report(**changes: object) -> reconcile.Report:
    return reconcile.Report(**{"now": 1000.0, "newest": 999.0, "version": prunus.__version__, **changes})  # type: ignore[arg-type]


def said(changes: dict[str, object]) -> list[str]:
    return [f"{one.subject}: {one.text}" for one in doctor._broker_itself(report(**changes), 1000.0, 1000.1)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"now": 1001.5, "newest": None}, []),
        ({"version": "0.0.1"}, [f"version: the broker runs Prunus 0.0.1, and this is {prunus.__version__}"]),
        ({"now": 900.0, "newest": 899.0}, ["clock: the broker's is 100 s behind ours"]),
        ({"now": 1100.1}, ["clock: the broker's is 100 s ahead of ours"]),
        ({"newest": 1000.0 + 3600}, [f"clock: it was set back: the newest process was created {span(3600)} from now"]),
    ],
)
def test_versions_and_clocks_are_compared(changes: dict[str, object], expected: list[str]) -> None:
    """Those of the broker with ours, and with what is in its database; small differences are none."""
    found = said(changes)
    assert len(found) == len(expected)
    assert all(text.startswith(begin) for text, begin in zip(found, expected, strict=True))


def test_of_many_findings_some_are_shown() -> None:
    """The others are counted."""
    found = [reconcile.Finding("no task", f"p{number}", "could go on") for number in range(MAX_SHOWN + 5)]
    shown = list(doctor._unlooked(found, fixed=False))
    assert len(shown) == MAX_SHOWN + 1
    assert shown[-1] == Finding("problem", "processes", "5 more of the kind")
    assert {one.level for one in doctor._unlooked(found, fixed=True)} == {"fixed"}


async def test_it_asks_the_broker_until_it_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slice by slice, and with --fix until nothing is left."""
    monkeypatch.setattr(reconcile, "MAX_FOUND", 3)
    async with LocalDaemon(workers=0) as daemon:
        for number in range(10):
            daemon.store.create(new(f"p{number}"))
        daemon.connection.execute("UPDATE process SET ready = 0 WHERE n % 2")
        found = [one async for one in doctor._looked_after(daemon.controller, fix=False)]
        assert sum("has lost that it can run" in one.text for one in found) == 5
        fixed = [one async for one in doctor._looked_after(daemon.controller, fix=True)]
        assert {one.level for one in fixed} == {"fixed"}
        assert [one.subject async for one in doctor._looked_after(daemon.controller, fix=True)] == ["looked after"]
        assert all(daemon.broker.exchange.has_task(f"p{number}") for number in range(10))


async def test_a_process_that_ended_its_workers_leads_to_its_log() -> None:
    """The advice names the evidence, the mending and the retry."""
    async with LocalDaemon() as daemon:
        daemon.store.max_crashes = 1
        handle = await daemon.controller.launch(features.Gated, {"file": "/nowhere/gate"})
        await until(handle, lambda row: row.state == "running")
        await daemon.kill_worker("worker-1")
        [one] = doctor._asides([await handle.record()])
        short = handle.pid[-8:]
        assert one.advice is not None
        assert f"`prunus logs {short}` shows what the workers said last" in one.advice
        assert one.advice.endswith(f"`prunus retry {short}`")
        assert "its worker died once in the step 'run'" in one.text


async def test_a_profile_that_is_not_there_is_one_finding() -> None:
    """And a sentence."""

    def find() -> Profile:
        raise prunus.ProfileError("there is no profile here")

    assert [one async for one in examine(find)] == [Finding("problem", "profile", "there is no profile here")]
    assert doctor.examine_blobs(find, fix=False) == [Finding("problem", "blobs", "there is no profile here")]


def test_damaged_blobs_are_a_problem_until_they_are_set_aside(tmp_path: Path) -> None:
    """It says which file it is and what to do; with --fix they can be put again."""
    profile = Profile.create(tmp_path / "profile")
    assert doctor.examine_blobs(lambda: profile, fix=False) == [Finding("ok", "blobs", "each is what was put")]
    store, body = BlobStore(profile.blobs, 0.0), b"body"
    digest = hashlib.sha256(body).hexdigest()
    store.put(0.0, "s", digest, 0, len(body), body)
    file = profile.blobs / digest[:2] / digest[2:]
    file.write_bytes(b"Body")
    [found] = doctor.examine_blobs(lambda: profile, fix=False)
    assert (found.level, found.text) == ("problem", f"{file} is damaged")
    assert "--check-blobs --fix" in str(found.advice)
    [found] = doctor.examine_blobs(lambda: profile, fix=True)
    assert (found.level, found.text) == ("fixed", f"{file} was damaged, and is now {file.name}.damaged")
    store.put(0.0, "s", digest, 0, len(body), body)
    assert doctor.examine_blobs(lambda: profile, fix=False) == [Finding("ok", "blobs", "each is what was put")]


async def test_of_a_service_that_does_not_run_it_is_said_why(tmp_path: Path) -> None:
    """How it ended, and what it said last: as in `prunus daemon status`."""
    profile = Profile.create(tmp_path / "p")
    end = End(at=0.0, pid=1, how="with exit code 1", code=1, ran_s=2.0, asked=False)
    evidence = Evidence(at=0.0, pid=1, how=end.how, log="CRITICAL: prunus.db is gone\n")
    write_notes(profile, Notes(services={"broker": ServiceNote(last_end=end, evidence=evidence)}))
    with ServiceLock(profile.lock("daemon")):
        [broker] = [one async for one in examine(lambda: profile) if one.subject == "broker"]
    assert broker.level == "problem"
    assert "broker does not run: it ended with exit code 1" in broker.text
    assert "It said last: 'CRITICAL: prunus.db is gone'" in broker.text
