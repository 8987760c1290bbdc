"""The two state machines, without a process."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import Failure, InvalidTransitionError
from prunus.processes import states
from prunus.processes.states import (
    PLAY_TABLE,
    STATE_TABLE,
    TERMINAL,
    Created,
    Event,
    Excepted,
    Finished,
    Killed,
    PlayEvent,
    PlayState,
    ProcessState,
    Running,
    Waiting,
    enter,
    from_data,
    to_data,
    turn,
)

SAMPLES: dict[ProcessState, states.State] = {
    ProcessState.CREATED: Created("run"),
    ProcessState.RUNNING: Running("fit", (1, [2]), {"a": None}),
    ProcessState.WAITING: Waiting("collect", "for them", {"k": 1}, ("p1", "p2")),
    ProcessState.FINISHED: Finished([1], 3, "no"),
    ProcessState.EXCEPTED: Excepted(Failure(type="ValueError", message="bad", cause=Failure("KeyError", "'x'"))),
    ProcessState.KILLED: Killed("enough"),
}

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize(
    ("source", "event", "target"), list(itertools.product(ProcessState, Event, ProcessState)), ids=str
)
def test_only_the_moves_of_the_table_are_legal(source: ProcessState, event: Event, target: ProcessState) -> None:
    """Every move that the table does not have raises, and names the state and the command."""
    if target in STATE_TABLE.get((source, event), ()):
        assert enter(SAMPLES[source], event, SAMPLES[target]) is SAMPLES[target]
    else:
        with pytest.raises(InvalidTransitionError) as raised:
            enter(SAMPLES[source], event, SAMPLES[target])
        assert raised.value.state == source
        assert raised.value.command == event


@pytest.mark.parametrize(
    ("source", "event", "target"), list(itertools.product(PlayState, PlayEvent, PlayState)), ids=str
)
def test_only_the_moves_of_the_play_table_are_legal(source: PlayState, event: PlayEvent, target: PlayState) -> None:
    """The same for pausing and playing."""
    if target in PLAY_TABLE.get((source, event), ()):
        assert turn(source, event, target) is target
    else:
        with pytest.raises(InvalidTransitionError):
            turn(source, event, target)


def test_nothing_leads_out_of_a_terminal_state() -> None:
    """Terminal is final, by the table itself; every other state can be killed and can fail."""
    assert {state for state, _ in STATE_TABLE} == set(ProcessState) - TERMINAL
    for state in set(ProcessState) - TERMINAL:
        assert ProcessState.KILLED in STATE_TABLE[state, Event.KILL]
        assert ProcessState.EXCEPTED in STATE_TABLE[state, Event.FAIL]


def test_each_state_can_be_reached_from_created() -> None:
    """No state of the table is out of reach."""
    reached = {ProcessState.CREATED}
    while more := {t for (s, _), targets in STATE_TABLE.items() if s in reached for t in targets} - reached:
        reached |= more
    assert reached == set(ProcessState)


@pytest.mark.parametrize("state", SAMPLES.values(), ids=lambda state: state.kind.value)
def test_a_state_survives_being_plain_data(state: states.State) -> None:
    """`from_data(to_data(state))` is the state again."""
    assert from_data(to_data(state)) == state


@given(args=st.lists(plain, max_size=3), kwargs=st.dictionaries(st.text(), plain, max_size=3))
def test_the_arguments_of_a_step_survive_being_plain_data(args: list[object], kwargs: dict[str, object]) -> None:
    """Positional and keyword arguments are kept, whatever they hold."""
    state = Running("step", tuple(args), kwargs)
    assert from_data(to_data(state)) == state


def test_the_values_are_those_that_people_know() -> None:
    """The texts of the states are part of the format of checkpoints and of the subjects of broadcasts."""
    assert [state.value for state in ProcessState] == [
        "created",
        "running",
        "waiting",
        "finished",
        "excepted",
        "killed",
    ]
    assert [state.value for state in PlayState] == ["playing", "pausing", "paused"]
