"""A process that takes down its workers is set aside with the evidence, and no innocent one is."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from prunus.errors import NotPermittedError, ProtocolError
from prunus.messaging.access import Role
from prunus.messaging.connecting import connect_to
from prunus.messaging.liveness import this_peer
from prunus.messaging.messages import Peer
from prunus.persistence.persister import Query
from prunus.persistence.sqlite import ProcessStore, open_database
from prunus.runtime import crashes
from prunus.runtime.backend import SET_ASIDE, ProcessService
from prunus.runtime.controller import ProcessController
from prunus.runtime.crashes import EVIDENCE_CHARS, EVIDENCE_LINES, MAX_TOLD, Deaths, Evidence, Messenger
from prunus.runtime.profile import Config, Profile
from prunus.runtime.roster import service_names
from prunus.runtime.supervisor import Supervisor
from prunus.testing.local_daemon import LocalDaemon
from prunus.testing.persister_contract import new, save_of
from tests.guarantees.real_daemon import PROJECT
from tests.runtime import features, workflows
from tests.runtime.waiting import until

INNOCENTS = 20
SLOTS = 32

LAB = '''
import asyncio
import ctypes
import os
import signal

from prunus import Process


class Long(Process):
    """A step that takes its time."""

    async def run(self):
        await asyncio.sleep(0.5)
        return "done"


class Poison(Process):
    """Ends its worker, as a defect in compiled code does."""

    async def run(self):
        await asyncio.sleep(0.2)
        {crime}
'''

# --- what a broker remembers ------------------------------------------------------------------------


@pytest.fixture
def store() -> ProcessStore:
    return ProcessStore(open_database(":memory:"), clock=lambda: 5.0)


def run_step(store: ProcessStore, worker: str, *pids: str) -> None:
    """`worker` holds these processes, each in its step."""
    for pid in pids:
        store.create(new(pid))
        claim = store.claim(pid, worker, at=1.0)[0]
        if claim.record.step is None:
            store.save(save_of(claim, step="run", keep_as="run"))


def die(store: ProcessStore, deaths: Deaths, worker: str, number: int) -> tuple[str, ...]:
    blamed = store.blame_all(worker, f"{worker}, pid {number}")
    deaths.noticed(Peer("here", number, 1), blamed.steps, blamed.aside)
    return blamed.aside


def evidence_of(number: int, *log: str) -> Evidence:
    return Evidence(host="here", pid=number, worker="worker-1", how="by SIGSEGV", log=log, at=9.0)


def give(deaths: Deaths, evidence: Evidence) -> None:
    deaths.testify(crashes.encode(evidence).removeprefix(crashes.PREFIX))


def crashes_of(store: ProcessStore, pid: str) -> int:
    return store.load(pid)[0].crashes


def test_those_that_died_with_the_guilty_one_are_pardoned(store: ProcessStore) -> None:
    """Once it is known who it was; deaths in which it had no part still count."""
    store.max_crashes = 3
    deaths = Deaths(store)
    run_step(store, "w1", "innocent")
    assert die(store, deaths, "w1", 1) == ()
    for number in (2, 3):
        run_step(store, "w2", "poison", "innocent" if number == 2 else "other")
        assert die(store, deaths, "w2", number) == ()
    assert (crashes_of(store, "innocent"), crashes_of(store, "other")) == (2, 1)
    run_step(store, "w2", "poison")
    assert die(store, deaths, "w2", 4) == ("poison",)
    assert (crashes_of(store, "poison"), crashes_of(store, "innocent"), crashes_of(store, "other")) == (3, 1, 0)


@pytest.mark.parametrize("evidence_first", [False, True])
def test_the_evidence_goes_to_the_logs_of_those_that_are_blamed(store: ProcessStore, evidence_first: bool) -> None:
    """Whichever comes first; said again it is not written twice, and a process that is gone meanwhile is no matter."""
    deaths = Deaths(store)
    run_step(store, "w1", "p", "q", "gone")
    store.create(new("bystander"))
    evidence = evidence_of(7, "Fatal Python error: Segmentation fault", "File lab.py, line 7 in run")
    if evidence_first:
        give(deaths, evidence)
        assert store.log("p")[0] == []
    die(store, deaths, "w1", 7)
    for _ in range(2):
        give(deaths, evidence)
    for pid in ("p", "q"):
        assert [line.text for line in store.log(pid)[0]] == [
            "worker-1 (pid 7) ended by SIGSEGV; it ran the step 'run' and the steps of 2 other processes. The end of "
            "its log:",
            "    Fatal Python error: Segmentation fault",
            "    File lab.py, line 7 in run",
        ]
        assert {(line.source, line.level, line.step) for line in store.log(pid)[0]} == {("supervisor", "ERROR", "run")}
    assert store.log("bystander")[0] == []


def test_a_number_that_another_process_has_later_is_another_death(store: ProcessStore) -> None:
    """What is known of the first one is not told of the second."""
    deaths = Deaths(store)
    for number, pid in enumerate(("p", "q"), 1):
        run_step(store, "w1", pid)
        die(store, deaths, "w1", 7)
        give(deaths, evidence_of(7, f"death {number}"))
    assert [line.text.strip() for line in store.log("p")[0]][1:] == ["death 1"]
    assert [line.text.strip() for line in store.log("q")[0]][1:] == ["death 2"]


def test_the_evidence_is_bounded(store: ProcessStore) -> None:
    """The end of a long log, and of many processes only the first get more than one line."""
    lines = [f"line {number}" for number in range(1000)]
    assert Evidence.of("worker-1", 1, "by SIGKILL", lines).log == tuple(lines[-EVIDENCE_LINES:])
    long = Evidence.of("worker-1", 1, "by SIGKILL", ["x" * 10 * EVIDENCE_CHARS, "the end"]).log
    assert long[-1] == "the end"
    assert sum(map(len, long)) < EVIDENCE_CHARS
    deaths = Deaths(store)
    pids = [f"p{number}" for number in range(MAX_TOLD + 1)]
    run_step(store, "w1", *pids)
    die(store, deaths, "w1", 7)
    give(deaths, evidence_of(7, "more"))
    assert [len(store.log(pid)[0]) for pid in pids] == [2] * MAX_TOLD + [1]


def test_what_is_remembered_is_bounded(store: ProcessStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest deaths and the oldest evidence are forgotten."""
    monkeypatch.setattr(crashes, "MAX_BLAMED", 4)
    deaths = Deaths(store)
    for number in range(4):
        run_step(store, "w1", "p", "q")
        die(store, deaths, "w1", number)
    for number in (0, 3):
        give(deaths, evidence_of(number))
    assert len(store.log("p")[0]) == 1
    assert "(pid 3)" in store.log("p")[0][0].text


def test_only_the_owner_of_the_profile_gives_evidence(store: ProcessStore) -> None:
    """And bytes that are none are refused."""
    service = ProcessService(store)
    for role in set(Role) - {Role.OWNER}:
        with pytest.raises(NotPermittedError):
            service.execute(crashes.encode(evidence_of(1)), "s", role)
    with pytest.raises(ProtocolError):
        service.execute(crashes.PREFIX + b"nonsense", "s", Role.OWNER)


def test_who_went_down_with_the_broker_or_said_goodbye_is_not_blamed(store: ProcessStore) -> None:
    """Only a session that this broker has heard, and that died or fell silent, counts."""
    service = ProcessService(store)
    run_step(store, "worker-1-abc", "p")
    service.left("worker-1-abc", None)
    assert crashes_of(store, "p") == 0
    run_step(store, "worker-1-abc", "p")
    service.left("worker-1-abc", this_peer())
    assert crashes_of(store, "p") == 1
    assert any(
        event.note == f"worker-1, pid {this_peer().pid} died in the step 'run'" for event in store.history("p")[0]
    )


# --- workers that are killed ------------------------------------------------------------------------


async def kill_twice(daemon: LocalDaemon, count: int) -> None:
    """Two workers die, each with all of so many processes in their steps."""
    for number in (1, 2):
        while len(daemon.store.held()) < count:
            await asyncio.sleep(0)
        await daemon.kill_worker(f"worker-{number}")
        await daemon.start_worker(f"worker-{number + 1}")


async def test_suspects_run_apart_and_all_of_them_end(tmp_path: Path) -> None:
    """Their workers died twice: no two of them are in a step at the same time on one worker, and others go on."""
    gate = tmp_path / "gate"
    async with LocalDaemon(slots=8) as daemon:
        daemon.store.max_crashes = 3
        handles = [await daemon.controller.launch(features.Gated, {"file": str(gate)}) for _ in range(3)]
        for handle in handles:
            await until(handle, lambda row: row.state == "running")
        await kill_twice(daemon, 3)
        together = []

        def look(failpoint: str) -> None:
            [held] = daemon.connection.execute(
                "SELECT count(*) FROM process WHERE owner IS NOT NULL AND crashes = 2"
            ).fetchone()
            together.append(held)

        while not daemon.store.held():
            await asyncio.sleep(0)
        daemon.broker.exchange.failpoint = look
        assert (await (await daemon.controller.launch(workflows.Add, {"a": 1})).result()).outputs.sum == 2
        gate.touch()
        for handle in handles:
            await handle.result()
            assert (await handle.record()).crashes == 0
        assert max(together) == 1


async def test_only_the_one_that_is_there_the_third_time_is_set_aside(tmp_path: Path) -> None:
    """It is told to whoever watches; a kill ends it without its code being loaded, a retry tries it again."""
    gate = tmp_path / "gate"
    async with LocalDaemon(slots=8) as daemon:
        daemon.store.max_crashes = 3
        heard = asyncio.Event()

        async def hear(_: object) -> None:
            heard.set()

        await daemon.controller.communicator.add_broadcast_subscriber(hear, subject=SET_ASIDE)
        handles = [await daemon.controller.launch(features.Gated, {"file": str(gate)}) for _ in range(3)]
        for handle in handles:
            await until(handle, lambda row: row.state == "running")
        await kill_twice(daemon, 3)
        while len(daemon.store.held()) != 1:
            await asyncio.sleep(0)
        [guilty] = daemon.store.held()
        await daemon.kill_worker("worker-3")
        await heard.wait()
        assert [row.pid for row in await daemon.controller.find(Query(aside=True))] == [guilty]
        record = await daemon.controller.handle(guilty).record()
        assert (record.aside or "").startswith("its worker died 3 times in the step 'run' (last: worker-3, pid ")
        gate.touch()
        await daemon.start_worker("worker-4")
        for handle in handles:
            if handle.pid != guilty:
                await handle.result()
        assert (await daemon.controller.handle(guilty).record()).state == "running", "it is not tried again"
        await daemon.controller.handle(guilty).retry()
        await daemon.controller.handle(guilty).result()
        asides = [one for one in await daemon.controller.handle(guilty).history() if one.subject == "set_aside"]
        assert len(asides) == 1


# --- real workers, under a real supervisor ----------------------------------------------------------


@asynccontextmanager
async def supervised(folder: Path) -> AsyncIterator[tuple[Supervisor, ProcessController]]:
    config = Config(workers=2, slots=SLOTS, grace_s=5.0, import_from=[str(folder), str(PROJECT)])
    profile = Profile.create(folder / "profile", config)
    supervisor = Supervisor(profile)
    supervisor.want(service_names(2))
    running = asyncio.create_task(supervisor.run())
    try:
        await supervisor.up.wait()
        async with connect_patiently(profile) as controller:
            yield supervisor, controller
    finally:
        supervisor.want(())
        await running


@asynccontextmanager
async def connect_patiently(profile: Profile) -> AsyncIterator[ProcessController]:
    """The broker was started a moment ago."""
    controller = ProcessController(await connect_to(profile.endpoint, name="controller", timeout_s=20.0))
    try:
        yield controller
    finally:
        await controller.close()


@pytest.mark.timeout(110)
@pytest.mark.parametrize(
    ("crime", "signal"), [("ctypes.string_at(0)", "SIGSEGV"), ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL")]
)
async def test_a_poison_among_innocents_is_set_aside_and_goes_on_when_mended(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch, crime: str, signal: str
) -> None:
    """After exactly three deaths, with how they ended in its log; the others all finish; mended, it does too."""
    lab = short_folder / "lab.py"
    lab.write_text(LAB.format(crime=crime))
    monkeypatch.syspath_prepend(str(short_folder))
    monkeypatch.delitem(sys.modules, "lab", raising=False)
    async with supervised(short_folder) as (supervisor, controller):
        handles = [await controller.launch("lab:Long") for _ in range(INNOCENTS)]
        poison = await controller.launch("lab:Poison")
        record = await until(poison, lambda row: row.aside is not None)
        assert record.crashes == 3
        assert sum(event.subject == "crashed" for event in await poison.history()) == 3
        for handle in handles:
            assert (await handle.result()).value == "done"
        assert [row.pid for row in await controller.find(Query(aside=True))] == [poison.pid]
        # The supervisor tells it a moment after the broker has noticed the death.
        while sum(f"ended by {signal}" in line.text for line in await poison.log()) < 3:
            await asyncio.sleep(0.01)
        text = "\n".join(line.text for line in await poison.log())
        assert "it ran the step 'run'" in text
        assert ("lab.py" in text and "Segmentation fault" in text) == (signal == "SIGSEGV")
        lab.write_text(LAB.format(crime='return "cured"'))
        supervisor.want(service_names(2), reloads=1)
        await poison.retry()
        assert (await poison.result()).value == "cured"
        assert (await poison.record()).crashes == 0


async def test_evidence_waits_for_a_broker_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for it meanwhile, and whoever stops does not either."""
    profile = Profile.create(tmp_path / "profile", Config())
    monkeypatch.setattr(crashes, "TRY_INTERVAL_S", 0.01)
    monkeypatch.setattr(crashes, "TRY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(crashes, "TRIES", 2)
    messenger = Messenger()
    messenger.send(profile, evidence_of(1))
    messenger.send(profile, evidence_of(2))
    assert messenger._going is not None
    await messenger._going
    assert "the broker was not told how 2 workers ended" in caplog.text
    messenger.send(profile, evidence_of(3))
    await messenger.stop()
