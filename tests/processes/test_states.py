"""The two state machines, without a process."""

from __future__ import annotations

import itertools
from typing import Any

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
    Pending,
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
from prunus.processes.waits import AllOf, OnChild, OnTime

SAMPLES: dict[ProcessState, Any] = {
    ProcessState.CREATED: Created("run"),
    ProcessState.RUNNING: Running("fit", (1, [2]), {"a": None}, 2, "begun", (Pending(None, "later"),)),
    ProcessState.WAITING: Waiting(
        (
            Pending(AllOf((OnChild("p1"), OnChild("p2"))), "collect", message="for them", data={"k": 1}),
            Pending(OnTime(1.5), "fit", (1, [2]), {"a": None}, attempt=2, effect="unknown"),
            Pending(None),
        )
    ),
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
        assert enter(source, event, target) is target
    else:
        with pytest.raises(InvalidTransitionError) as raised:
            enter(source, event, target)
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


def test_a_waiting_process_is_suspended_if_somebody_may_resume_it() -> None:
    """One of its waits is for nothing that happens by itself."""
    child = Pending(OnChild("p1"), message="for a child")
    assert not Waiting((child,)).suspended
    assert Waiting((child, Pending(None))).suspended


def test_the_first_wait_that_has_a_line_for_people_says_it() -> None:
    """Others may have none."""
    assert Waiting((Pending(None), Pending(None, message="for a person"))).message == "for a person"
    assert Waiting((Pending(None),)).message is None


@pytest.mark.parametrize("children", [["p1", "p2"], []])
def test_a_waiting_state_as_prunus_0_1_wrote_it_is_read(children: list[str]) -> None:
    """Children are waited for together; none at all meant suspended."""
    old = {"state": "waiting", "step": "collect", "message": "for them", "data": 1, "children": children}
    on = AllOf(tuple(OnChild(pid) for pid in children)) if children else None
    assert from_data(old) == Waiting((Pending(on, "collect", message="for them", data=1),))


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
