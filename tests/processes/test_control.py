"""The register: what is wanted of a process, and how wishes are merged into it."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.processes import Continue, Process
from prunus.processes.control import (
    CALM,
    DEFAULT_GRACE_S,
    Kill,
    KillLevel,
    Pause,
    PauseAt,
    Play,
    Register,
    merge,
    register_from_data,
    register_to_data,
)
from prunus.processes.states import PlayState

Wish = Pause | Play | PauseAt | Kill

reasons = st.none() | st.sampled_from(["one", "two"])
pauses = st.builds(Pause, reasons, st.booleans())
plays = st.builds(Play, st.booleans())
breakpoints = st.builds(PauseAt, reasons)
kills = st.builds(Kill, reasons, st.booleans(), st.floats(0, 100))
wishes: st.SearchStrategy[Wish] = pauses | plays | breakpoints | kills
several = st.lists(wishes, max_size=8)


def merged(wishes: list[Wish], register: Register = CALM) -> Register:
    return reduce(merge, wishes, register)


def wanted(register: Register) -> Register:
    """The register without the count of its wishes."""
    return replace(register, seq=0)


@given(several, wishes)
def test_saying_something_twice_is_saying_it_once(before: list[Wish], wish: Wish) -> None:
    """Whatever was wanted before; only the count of the wishes tells the difference."""
    once = merged([*before, wish])
    twice = merge(once, wish)
    assert wanted(twice) == wanted(once)
    assert twice.seq == once.seq + 1 == len(before) + 2


@given(several, several, st.data())
def test_a_kill_is_never_taken_back(before: list[Wish], after: list[Wish], data: st.DataObject) -> None:
    """Whatever comes after it: force beats graceful, and graceful beats everything else."""
    kill = data.draw(kills)
    register = merged([*before, kill, *after])
    levels = [wish.force for wish in (*before, kill, *after) if isinstance(wish, Kill)]
    assert register.kill is (KillLevel.FORCE if any(levels) else KillLevel.GRACEFUL)


@given(several)
def test_the_first_kill_says_why_and_how_long(wishes: list[Wish]) -> None:
    """A later one may be more urgent, but the reason that people read is the first."""
    register = merged(wishes)
    first = next((wish for wish in wishes if isinstance(wish, Kill)), Kill())
    assert (register.message, register.grace_s) == (first.message, first.grace_s)


@given(several)
def test_the_last_of_pause_and_play_counts(wishes: list[Wish]) -> None:
    """The reason is that of the first pause since; a play takes it back."""
    register = merged(wishes)
    since: list[Pause] = []
    for wish in wishes:
        if isinstance(wish, Pause):
            since.append(wish)
        elif isinstance(wish, Play):
            since = []
    assert register.pause == bool(since)
    assert register.reason == (since[0].reason if since else None)
    assert register.cascade == any(pause.cascade for pause in since)


@given(several)
def test_a_play_takes_back_a_pause_and_nothing_else(before: list[Wish]) -> None:
    """A breakpoint and a kill stay."""
    register = merged(before)
    played = merge(register, Play())
    assert wanted(played) == replace(register, pause=False, reason=None, cascade=False, seq=0)


@given(several)
def test_the_last_breakpoint_counts(wishes: list[Wish]) -> None:
    """There is one at a time; None takes it back."""
    steps = [wish.step for wish in wishes if isinstance(wish, PauseAt)]
    assert merged(wishes).pause_at == (steps[-1] if steps else None)


@given(st.lists(st.builds(Pause) | st.builds(Kill, st.none(), st.booleans()), max_size=6), st.randoms())
def test_the_order_of_a_pause_and_kills_makes_no_difference(wishes: list[Wish], random: object) -> None:
    """What is the strongest is the same from whichever side one comes."""
    shuffled = list(wishes)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert merged(wishes) == merged(shuffled)


@given(several, several)
def test_merging_one_by_one_is_merging_on_top_of_what_was_saved(before: list[Wish], after: list[Wish]) -> None:
    """A restart in between loses no wish: not one, and not its place."""
    saved = register_from_data(register_to_data(merged(before)))
    assert merged(after, saved) == merged([*before, *after])


@given(several)
def test_a_register_survives_being_plain_data(wishes: list[Wish]) -> None:
    """`register_from_data(register_to_data(r))` is the register again, by way of JSON too."""
    register = merged(wishes)
    data = register_to_data(register)
    assert register_from_data(data) == register
    assert register_from_data(msgspec.json.decode(msgspec.json.encode(data))) == register


def test_a_register_that_nobody_has_touched_is_nothing() -> None:
    """The checkpoints of most processes have none."""
    assert register_to_data(CALM) == {}
    assert register_from_data({}) == CALM == Register(grace_s=DEFAULT_GRACE_S)


# --- what a process makes of it ---------------------------------------------------------------------


class Counts(Process):
    """Counts to three in as many steps."""

    async def run(self) -> Continue:
        return Continue(self.one)

    async def one(self) -> Continue:
        return Continue(self.two)

    async def two(self) -> None: ...


@given(st.lists(pauses | plays | breakpoints, max_size=8))
def test_a_process_holds_what_was_merged(wishes: list[Wish]) -> None:
    """Its register is the merge of the wishes, its play state follows from it, and its checkpoint has both."""
    process = Counts()
    for wish in wishes:
        process.receive(wish)
    register = merged(wishes)
    assert wanted(process.register) == wanted(register)
    assert process.play_state is (PlayState.PAUSED if register.pause else PlayState.PLAYING)
    restored = Counts.restore(process.snapshot())
    assert (restored.register, restored.play_state) == (process.register, process.play_state)


def test_a_wish_that_is_the_case_changes_nothing() -> None:
    """It costs no checkpoint."""
    process = Counts()
    process.receive(Pause("looking"))
    register, revision = process.register, process.revision
    for wish in (Pause(), Pause("other"), PauseAt(None)):
        assert process.receive(wish) == ()
    assert (process.register, process.revision) == (register, revision)
    assert process.status == "looking"


async def test_a_breakpoint_pauses_before_its_step_once() -> None:
    """The reason names the step; when it is played the step is taken, and the breakpoint is gone."""
    process = Counts()
    process.receive(PauseAt("one"))
    await process.step()
    assert not process.paused
    changes = await process.step()
    assert [change.subject for change in changes] == ["state_changed.running.running", "play_changed.playing.paused"]
    assert changes[1].note == process.status == "breakpoint before the step one"
    assert process.next_step == "one"
    process.receive(Play())
    while not process.has_terminated():
        assert process.can_step
        await process.step()


async def test_a_breakpoint_before_the_first_step_is_met() -> None:
    """None of the code of the process has run then."""
    process = Counts()
    process.receive(PauseAt("run"))
    await process.step()
    assert (process.state, process.paused, process.next_step) == ("running", True, "run")


async def test_a_breakpoint_before_the_step_that_is_next_pauses_at_once() -> None:
    """Somebody sets it when the process is already there, between two steps."""
    process = Counts()
    await process.step()
    assert process.next_step == "run"
    (change,) = process.receive(PauseAt("run"))
    assert (change.subject, change.note) == ("play_changed.playing.paused", "breakpoint before the step run")
    assert process.register.pause_at is None


async def test_a_breakpoint_survives_a_restart_and_can_be_taken_back() -> None:
    """It stands in the register."""
    process = Counts()
    process.receive(PauseAt("two"))
    process = Counts.restore(process.snapshot())
    assert process.register.pause_at == "two"
    process.receive(PauseAt(None))
    while not process.has_terminated():
        await process.step()
    assert process.result().successful


@pytest.mark.parametrize(("pause", "text"), [(Pause("by hand"), "by hand"), (Pause(), "counting")])
def test_a_status_survives_pause_and_play(pause: Pause, text: str) -> None:
    """A pause with a reason hides it; after the play, and after a restart, it is there again."""
    process = Counts()
    process.set_status("counting")
    process.receive(pause)
    assert process.status == Counts.restore(process.snapshot()).status == text
    process.receive(Play())
    assert process.status == Counts.restore(process.snapshot()).status == "counting"
