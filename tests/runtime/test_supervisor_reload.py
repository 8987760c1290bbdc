"""Reloads: the workers are replaced one by one, whatever happens meanwhile."""

import asyncio
import os
import random as randomness
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prunus
from prunus.errors import DaemonError
from prunus.runtime import daemon
from prunus.runtime.locks import ServiceLock
from prunus.runtime.profile import Config, Profile
from prunus.runtime.roster import BROKER, MANY_ENDS, RECENT_S, Decision, Roster, service_names
from prunus.runtime.services import Notes, ServiceNote, read_notes, write_notes
from prunus.runtime.wish import Wish, change_wish, read_wish, write_wish
from tests.runtime.stage import Stage, until

W1, W2, W3 = "worker-1", "worker-2", "worker-3"

# --- deciding ---------------------------------------------------------------------------------------


def running(workers: int) -> Roster:
    """A roster whose services run since long."""
    it = Roster(10.0)
    it.want(service_names(workers))
    for pid, name in enumerate(it.wanted, 1):
        it.started(name, pid, 0.0)
    return it


def reload(it: Roster, generation: int = 1, broker: int = 0) -> None:
    it.want(it.wanted, workers_generation=generation, broker_generation=broker)


def replace(it: Roster, name: str, now: float) -> None:
    """It ends as it was asked to, and its replacement serves."""
    it.ended(name, now)
    assert it.decide(now).start == (name,)
    it.started(name, 100, now)
    assert it.decide(now).terminate == ()
    it.serves(name)


def test_workers_are_replaced_one_by_one() -> None:
    """The next one is asked when the replacement of the last one serves; the broker stays."""
    it = running(2)
    reload(it)
    assert it.decide(1.0).check == (BROKER,)
    it.serves(BROKER)
    assert it.decide(1.0).terminate == (W1,)
    assert it.decide(1.0).terminate == ()
    it.ended(W1, 2.0)
    assert it.decide(2.0) == Decision(start=(W1,))
    it.started(W1, 9, 2.0)
    assert it.decide(2.0) == Decision(check=(W1,))
    it.serves(W1)
    assert it.decide(3.0).terminate == (W2,)
    replace(it, W2, 4.0)
    assert it.decide(5.0) == Decision()


def test_a_reload_of_the_broker_replaces_it_first() -> None:
    """While the workers are there: they say again to the new one what the old one did not confirm."""
    it = running(2)
    reload(it, broker=1)
    for name in (BROKER, W1, W2):
        assert it.decide(1.0).terminate == (name,)
        replace(it, name, 1.0)
    assert it.decide(2.0) == Decision()


def test_a_replacement_that_does_not_come_up_stops_the_reload() -> None:
    """Be it that it ends, or that it never serves: the others go on with their old code; a mended one goes on."""
    it = running(2)
    reload(it)
    it.serves(BROKER)
    it.decide(0.0)
    it.ended(W1, 1.0)
    for now in range(1, 8):
        it.started(W1, 9, float(now))
        assert it.decide(float(now)).terminate == ()
        it.ended(W1, float(now))
        assert it.decide(float(now)).terminate == ()
    reload(it, 2)  # mended: it is tried at once
    assert it.decide(8.0).start == (W1,)
    it.started(W1, 10, 8.0)
    assert it.decide(8.0) == Decision(check=(W1,))
    it.serves(W1)
    assert it.decide(9.0).terminate == (W2,)


def test_a_reload_during_a_reload_replaces_the_new_ones_too() -> None:
    """All are newer than the last request when it is done."""
    it = running(2)
    reload(it)
    it.serves(BROKER)
    it.decide(0.0)
    replace(it, W1, 1.0)
    reload(it, 2)
    assert it.decide(2.0).terminate == (W1,)
    replace(it, W1, 2.0)
    assert it.decide(3.0).terminate == (W2,)
    replace(it, W2, 3.0)
    assert it.decide(4.0) == Decision()


def test_a_deaf_worker_holds_a_reload_up_for_its_grace_only() -> None:
    """Then it is killed, like one that is not wanted any more."""
    it = running(1)
    reload(it)
    it.serves(BROKER)
    wake_at = it.decide(0.0).wake_at
    assert wake_at is not None
    assert it.decide(wake_at).kill == (W1,)


def test_scaling_during_a_reload() -> None:
    """What is started is new; what is superfluous goes, without a replacement."""
    it = running(2)
    reload(it)
    it.serves(BROKER)
    assert it.decide(0.0).terminate == (W1,)
    it.want(service_names(3), workers_generation=1)
    assert it.decide(0.0).start == (W3,)
    it.started(W3, 9, 0.0)
    it.want(service_names(1), workers_generation=1)
    assert it.decide(0.0).terminate == (W2, W3)
    it.ended(W1, 1.0)
    assert it.decide(1.0).start == (W1,)


def test_without_a_reload_nobody_is_asked_whether_it_serves() -> None:
    """The broker has better things to do."""
    assert running(3).decide(0.0) == Decision()


def test_many_ends_are_flapping_also_if_each_comes_late() -> None:
    """A worker that the kernel kills every twenty seconds is not well, though it was healthy each time."""
    it, now, flapping = running(1), 0.0, []
    for _ in range(MANY_ENDS):
        now += 20.0
        flapping.append(it.ended(W1, now).flapping)
        it.started(W1, 9, now)
    assert flapping == [False] * (MANY_ENDS - 1) + [True]
    assert not it.ended(W1, now + RECENT_S).flapping


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(0, 4), st.sampled_from(["end", "tick", "reload", "reload broker", "serve"])), max_size=40
    ),
    st.randoms(),
)
def test_whatever_happens_all_are_new_in_the_end(events: list[Any], random: randomness.Random) -> None:
    """From any past of starts, ends, scales and reloads, services that obey and serve come to what is wanted, newer
    than the last request; and as long as nobody scales, at most one that should run is asked to end at a time."""
    it, now = Roster(10.0), 0.0
    generations = [0, 0]
    alive = set[str]()
    names = service_names(2)

    def want() -> None:
        it.want(names, workers_generation=generations[0], broker_generation=generations[1])

    def look() -> Decision:
        decision = it.decide(now)
        asked = [name for name in it.wanted if name in alive and it.services[name].asked_at is not None]
        replaced = [name for name in decision.terminate if name in it.wanted]
        assert len(replaced) <= 1
        assert not replaced or asked == replaced
        for name in decision.start:
            it.started(name, 1, now)
            alive.add(name)
        return decision

    def end(name: str) -> None:
        it.ended(name, now)
        alive.discard(name)

    want()
    for event in events:
        now += random.choice([0.0, 0.01, 1.0, 40.0])
        if isinstance(event, int):
            names = service_names(event)
        elif event == "end" and alive:
            end(random.choice(sorted(alive)))
        elif event == "serve":
            for name in it.decide(now).check:
                it.serves(name)
        elif event in ("reload", "reload broker"):
            generations[0] += 1
            generations[1] += event == "reload broker"
        want()
        look()
    for _ in range(60):
        for name in [name for name in sorted(alive) if it.services[name].asked_at is not None]:
            end(name)
        decision = look()
        for name in decision.check:
            it.serves(name)
        now = max(now, decision.wake_at or now)
    assert alive == set(it.wanted)
    assert all(it.services[name].generation >= it.generation(name) for name in it.wanted)
    assert look() == Decision()


# --- the wish and the notes -------------------------------------------------------------------------


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    return Profile.create(tmp_path / "profile", Config(grace_s=0.2))


def test_a_wish_is_changed_by_one_at_a_time(profile: Profile) -> None:
    """Two reloads at the same time are two; a wish that can't be read is begun anew."""

    async def both() -> None:
        add = asyncio.to_thread(change_wish, profile, lambda wish: Wish(wish.workers, wish.reloads + 1))
        other = asyncio.to_thread(change_wish, profile, lambda wish: Wish(wish.workers, wish.reloads + 1))
        await asyncio.gather(add, other)

    asyncio.run(both())
    assert read_wish(profile) == Wish(None, 2)
    (profile.run_folder / "daemon.json").write_text("{")
    assert change_wish(profile, lambda wish: Wish(3, wish.reloads)) == Wish(3) == read_wish(profile)


def test_notes_that_cannot_be_read_are_none(profile: Profile) -> None:
    """They are for showing: what is broken is begun anew."""
    assert read_notes(profile) == Notes()
    write_notes(profile, Notes("1", {W1: ServiceNote(restarts=3)}))
    assert read_notes(profile).services[W1].restarts == 3
    (profile.run_folder / "services.json").write_text("[")
    assert read_notes(profile) == Notes()


def test_notes_that_cannot_be_written_are_a_warning(profile: Profile, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk does not stop supervision."""
    (profile.run_folder / "services.json").mkdir()
    write_notes(profile, Notes())
    assert "may not be up to date" in caplog.text
    assert [file.name for file in profile.run_folder.iterdir()] == ["services.json"]


# --- acting -----------------------------------------------------------------------------------------


@pytest.fixture
def stage(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("PYTHONPATH", str(Path(prunus.__file__).parents[1]))  # services run in another folder
    return Stage(profile, tmp_path)


@asynccontextmanager
async def _locked(profile: Profile) -> AsyncIterator[None]:
    """Be the daemon."""
    with ServiceLock(profile.lock("daemon")):
        yield


def wish_reload(profile: Profile) -> Wish:
    return change_wish(profile, lambda wish: Wish(wish.workers, wish.reloads + 1, wish.broker_reloads))


async def test_a_reload_of_real_processes(stage: Stage) -> None:
    """Each worker is another process then, in turn; the broker is the same. Progress is said; it is done when `reload`
    returns."""
    write_wish(stage.profile, Wish(2))
    said = []
    with stage.daemon_process():
        before = await stage.running("daemon", *service_names(2))
        await daemon.reload(stage.profile, say=said.append)
        after = await stage.running("daemon", *service_names(2))
        assert (after["daemon"], after[BROKER]) == (before["daemon"], before[BROKER])
        assert not {after[W1], after[W2]} & {before[W1], before[W2]}
        story = stage.lines[stage.lines.index(f"{W1} asked") :]
        assert story == [f"{W1} asked", f"{W1} ended", f"{W1} runs {after[W1]}",
                         f"{W2} asked", f"{W2} ended", f"{W2} runs {after[W2]}"]  # fmt: skip
        assert [progress.current for progress in said][-1] == W2
        assert {progress.total for progress in said} == {3}
        await daemon.reload(stage.profile, broker=True)
        assert (await stage.running(BROKER))[BROKER] != before[BROKER]
        notes = read_notes(stage.profile).services
        assert (notes[W1].generation, notes[BROKER].generation, notes[W1].restarts) == (2, 1, 0)
        assert await daemon.stop(stage.profile)
    assert read_notes(stage.profile) == Notes()


async def test_what_was_replaced_is_not_replaced_again_by_the_next_supervisor(stage: Stage) -> None:
    """Killed in the middle of a reload, its successor adopts the new worker and replaces the old one only."""
    write_wish(stage.profile, Wish(2))
    with stage.daemon_process() as first:
        before = await stage.running("daemon", *service_names(2))
        first.kill()  # between the replacement of the first and of the second worker, as its notes say
        first.wait()
        wish_reload(stage.profile)
        notes = read_notes(stage.profile)
        noted = {name: ServiceNote(pid=note.pid, started=note.started, generation=int(name == W1), ready=name == W1)
                 for name, note in notes.services.items()}  # fmt: skip
        write_notes(stage.profile, Notes(notes.version, noted))
        async with stage.supervised() as supervisor:
            supervisor.obey(Wish(2, 1))
            await until(lambda: daemon.reload_progress(stage.profile, Wish(2, 1)) is None)
            after = await stage.running(*service_names(2))
    assert (after[BROKER], after[W1]) == (before[BROKER], before[W1])
    assert after[W2] != before[W2]


async def test_a_replacement_that_never_serves(stage: Stage) -> None:
    """The second worker is left alone until it does."""
    async with stage.supervised(*service_names(2)) as supervisor:
        before = await stage.running(*service_names(2))
        stage.mute = {W1}
        supervisor.obey(Wish(2, 1))
        write_wish(stage.profile, Wish(2, 1))
        await until(lambda: stage.runs(W1) not in (None, before[W1]))
        progress = daemon.reload_progress(stage.profile, Wish(2, 1))
        assert progress is not None
        assert (progress.current, progress.done) == (W1, 1)
        assert stage.runs(W2) == before[W2]
        stage.mute = set()
        await until(lambda: daemon.reload_progress(stage.profile, Wish(2, 1)) is None)
        assert stage.runs(W2) != before[W2]


async def test_a_reload_with_broken_code_says_so(stage: Stage) -> None:
    """The error names the worker and the end of its log; the other worker goes on as it is."""
    write_wish(stage.profile, Wish(2))
    async with _locked(stage.profile), stage.supervised(*service_names(2)) as supervisor:
        before = await stage.running(*service_names(2))
        stage.modes = {W1: "broken", W2: "broken"}
        wish = wish_reload(stage.profile)
        supervisor.obey(wish)
        with pytest.raises(DaemonError, match=r"(?s)worker-1 does not come up.*1 of 3.*this one is broken"):
            await daemon._until_reloaded(stage.profile, wish, lambda progress: None)
        assert stage.runs(W2) == before[W2]
        stage.modes = {}
        wish = wish_reload(stage.profile)
        supervisor.obey(wish)
        await daemon._until_reloaded(stage.profile, wish, lambda progress: None)
        assert stage.runs(W2) != before[W2]


async def test_settings_are_read_again(stage: Stage) -> None:
    """With the wish; settings that can't be read are an error in the log, and change nothing."""
    config = stage.profile.path / "config.yaml"
    with stage.daemon_process() as process:
        await stage.running("daemon", *service_names(2))
        text = config.read_text()
        config.write_text(text.replace("workers: 2", "workers: many"))
        process.send_signal(signal.SIGHUP)
        await until(lambda: "the settings stay as they were" in stage.profile.log("daemon").read_text())
        config.write_text(text.replace("workers: 2", "workers: 3"))
        process.send_signal(signal.SIGHUP)
        await stage.running(*service_names(3))
        assert await daemon.stop(stage.profile)


async def test_without_a_daemon_nothing_is_reloaded(profile: Profile) -> None:
    """A sentence, and no wish for the next daemon."""
    with pytest.raises(DaemonError, match="daemon start"):
        await daemon.reload(profile)
    assert read_wish(profile) is None


async def test_what_is_known_of_an_end(stage: Stage) -> None:
    """How it ended, when, what it said last, how often so far: on the disk, and counted on by the next supervisor."""
    write_wish(stage.profile, Wish(1))
    with stage.daemon_process() as first:
        before = await stage.running("daemon", BROKER, W1)
        os.kill(before[W1], signal.SIGKILL)
        await until(lambda: stage.runs(W1) not in (None, before[W1]))
        await until(lambda: read_notes(stage.profile).services[W1].pid == stage.runs(W1))
        note = read_notes(stage.profile).services[W1]
        assert note.last_end is not None
        assert (note.last_end.signal, note.last_end.pid, note.last_end.asked) == ("SIGKILL", before[W1], False)
        assert note.evidence is not None
        assert (note.evidence.how, note.evidence.log) == ("by SIGKILL", "a line in the log")
        assert (note.restarts, len(note.ends)) == (1, 1)
        first.kill()
        first.wait()
        async with stage.supervised(BROKER, W1) as supervisor:
            await until(lambda: W1 in supervisor._running)
            second = (await stage.running(W1))[W1]
            os.kill(second, signal.SIGKILL)
            await until(lambda: stage.runs(W1) not in (None, second))
        assert read_notes(stage.profile).services[W1].restarts == 2
