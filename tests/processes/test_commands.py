"""What a step returns, and the messages to a process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import ProtocolError, SpecError
from prunus.processes import Child, Continue, Stop, Wait, control
from prunus.processes.control import (
    EditContext,
    Kill,
    Message,
    Pause,
    PauseAt,
    Play,
    Resume,
    Settle,
    Update,
    from_data,
    to_data,
)
from prunus.processes.waits import AllOf, AnyOf, OnChild, OnMessage


class Steps:
    def fit(self) -> None: ...


def test_a_step_is_kept_by_its_name() -> None:
    """A bound method, the function of the class and the name are the same step; keyword arguments are kept."""
    references: list[Any] = [Steps().fit, Steps.fit, "fit"]
    for step in references:
        command = Continue(step, 1, step=2, x=3)
        assert (command.step, command.args, command.kwargs) == ("fit", (1,), {"step": 2, "x": 3})


@pytest.mark.parametrize("step", [lambda: None, 3, "not a name", None])
def test_what_has_no_name_is_no_step(step: Any) -> None:
    """A lambda can't be found again from a checkpoint, so it is refused at once."""
    with pytest.raises(SpecError, match="must be a method"):
        Continue(step)


def test_a_wait_names_pids_or_is_suspended() -> None:
    """Children are named by handle or pid; no `on` at all is something else than an empty one."""
    assert Wait(on=[Child("p1", "m:C"), "p2"]).on == AllOf((OnChild("p1"), OnChild("p2")))
    assert Wait(Child("p1", "m:C")).on == OnChild("p1")
    assert Wait().on is None
    assert Wait(on=[]).on == AllOf(())


def test_a_wait_may_name_its_step_first_or_by_name() -> None:
    """As in plumpy the step may come first; what is waited for may come first too, and then the step is `then`."""
    first = Wait(Steps.fit, "for them", on=["p1"])
    assert first == Wait(["p1"], "for them", then="fit") == Wait("fit", "for them", None, ["p1"])
    assert (first.callback, first.msg) == ("fit", "for them")


def test_a_wait_for_all_or_any_may_give_names() -> None:
    """Each of them has a name, or none has."""
    approve = OnMessage("approve")
    assert Wait.all("p1", "p2").on == Wait.all(["p1", "p2"]).on == Wait(on=["p1", "p2"]).on
    assert Wait.any(approved=approve, child="p1", then="fit").on == AnyOf(
        (approve, OnChild("p1")), ("approved", "child")
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Wait("fit", then="other"), "two steps can't both come next"),
        (lambda: Wait(["p1"], on=["p2"]), "not as both"),  # type: ignore[call-overload]
        (lambda: Wait(3), "one can wait for a child"),  # type: ignore[call-overload]
        (lambda: Wait.any(), "would never be over"),
        (lambda: Wait.all("p1", other="p2"), "a name to each of them, or to none"),
    ],
)
def test_a_wait_that_makes_no_sense_is_refused_where_it_is_made(wrong: Callable[[], Wait], message: str) -> None:
    """The error says what is wrong with it."""
    with pytest.raises(TypeError, match=message):
        wrong()


def test_an_unsuccessful_stop_has_an_exit_status() -> None:
    """`successful` is a short form of an exit status of 0 or 1."""
    assert Stop().exit_status == 0
    assert Stop("x", False).exit_status == 1
    assert Stop(exit_status=12, exit_message="no").exit_status == 12


values = st.none() | st.integers() | st.lists(st.text())
messages = (
    st.builds(Pause, st.none() | st.text(), st.booleans())
    | st.builds(Play, st.booleans())
    | st.builds(PauseAt, st.none() | st.text())
    | st.builds(Kill, st.none() | st.text(), st.booleans(), st.floats(0, 100))
    | st.builds(Resume, values, st.booleans())
    | st.builds(Update, st.text(), st.lists(values), st.dictionaries(st.text(), values))
    | st.builds(EditContext, st.dictionaries(st.text(), values))
    | st.builds(Settle, values)
)


@given(messages)
def test_a_message_survives_being_plain_data(message: Message) -> None:
    """`from_data(to_data(m))` is the message again, and says itself of what type it is."""
    data = to_data(message)
    assert data["type"] == message.type
    assert from_data(data) == message


@given(
    st.none()
    | st.integers()
    | st.text()
    | st.lists(st.integers())
    | st.dictionaries(st.just("type"), st.sampled_from(["pause", "kill", "odd"]) | st.integers())
    | st.dictionaries(st.sampled_from(["type", "reason", "odd"]), st.sampled_from(["pause", "resume"]))
)
def test_other_data_is_a_protocol_error(data: object) -> None:
    """Whatever it is, the answer is a message or a `ProtocolError` that says so."""
    try:
        outcome: object = from_data(data)
    except ProtocolError as error:
        outcome = error.reason
    assert isinstance(outcome, control.Message) or "no message to a process" in str(outcome)
