"""Kill -9 the supervisor of a real daemon, again and again, and its broker and workers in between."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from prunus.persistence.persister import Query
from prunus.runtime.controller import connect
from prunus.runtime.locks import Holder, read_holder, start_time
from prunus.runtime.profile import Config, Profile
from tests.faults.parts import POLL_S, PROJECT, Ended, command_line
from tests.guarantees.real_daemon import steps_in_order
from tests.runtime import workflows
from tests.runtime.waiting import file_has

STEPS = 60
PROCESSES = 3
"""So many before each kill, and one more after it."""
VICTIMS = ("daemon", "broker", "daemon", "worker-1", "daemon", "worker-2")
SERVICES = ("broker", "worker-1", "worker-2")
SERVING_AGAIN_S = 10.0
"""On a busy machine; the supervisor's first pause is 50 ms."""


def holder(profile: Profile, name: str) -> Holder:
    found = read_holder(profile.lock(name))
    assert found is not None, name
    return found


async def kill(profile: Profile, name: str) -> Holder:
    """SIGKILL, and wait until it is gone."""
    victim = holder(profile, name)
    os.kill(victim.pid, signal.SIGKILL)
    while start_time(victim.pid) == victim.started:
        await asyncio.sleep(POLL_S)
    return victim


async def is_another(profile: Profile, name: str, before: Holder) -> None:
    async with asyncio.timeout(SERVING_AGAIN_S):
        while (now := read_holder(profile.lock(name))) is None or now.pid == before.pid:
            await asyncio.sleep(POLL_S)


def running(profile: Profile) -> list[str]:
    """The programs of this profile that run."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if str(profile.path) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(words))
    return found


@pytest.mark.timeout(90)
async def test_a_daemon_survives_the_death_of_any_of_its_parts(short_folder: Path) -> None:
    """Work goes on without a supervisor, the next one takes all over as it is; every step is there, once confirmed."""
    journal = short_folder / "journal"
    profile = Profile.create(
        short_folder / "profile", Config(workers=2, slots=4, grace_s=1.0, import_from=[str(PROJECT)])
    )

    async def prunus(*words: str) -> Ended:
        return await command_line(profile.path, *words)

    assert (await prunus("daemon", "start")).code == 0
    try:
        async with connect(profile) as controller:
            inputs = {"file": str(journal), "steps": STEPS, "pace_s": 0.02}
            handles = []
            early = await controller.launch(workflows.Add, {"a": 1})
            assert (await early.result()).outputs.sum == 2
            for victim in VICTIMS:
                handles += [await controller.launch(workflows.Journal, inputs) for _ in range(PROCESSES)]
                written = len(await file_has(journal, 1))
                await file_has(journal, written + 2 * PROCESSES)
                before = {name: holder(profile, name) for name in SERVICES}
                killed = await kill(profile, victim)
                handles.append(await controller.launch(workflows.Journal, inputs))
                if victim == "daemon":
                    written = len(await file_has(journal, 1))
                    await file_has(journal, written + PROCESSES)
                    assert (await prunus("daemon", "status")).code == 1
                    started = await prunus("daemon", "start")
                    assert started.code == 0, started
                    assert {name: holder(profile, name) for name in SERVICES} == before, "adopted, not started anew"
                else:
                    await is_another(profile, victim, killed)
            results = await asyncio.gather(*(handle.result() for handle in handles))
            assert {result.outputs.written for result in results} == {STEPS}
            assert [event.subject for event in await early.history()].count("running.finished") == 1
            assert not await controller.find(Query(unfinished=True))
            lines = journal.read_text().splitlines()
            assert len(set(lines)) == STEPS * len(handles)
            assert steps_in_order(lines)

            await kill(profile, "daemon")  # what a killed supervisor left behind is stopped as well
    finally:
        stopped = await prunus("daemon", "stop")
    assert stopped.code == 0, stopped
    assert running(profile) == []
    assert not list(profile.run_folder.glob("*.sock"))
    assert (await prunus("daemon", "stop")).out == "No daemon was running.\n"
