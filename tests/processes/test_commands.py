"""What a step returns, and the messages to a process."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import ProtocolError, SpecError
from prunus.processes import Child, Continue, Stop, Wait, control
from prunus.processes.control import Kill, Message, Pause, Play, Resume, decode_message, encode_message


class Steps:
    def fit(self) -> None: ...


def test_a_step_is_kept_by_its_name() -> None:
    """A bound method, the function of the class and the name are the same step; keyword arguments are kept."""
    for step in (Steps().fit, Steps.fit, "fit"):
        command = Continue(step, 1, step=2, x=3)
        assert (command.step, command.args, command.kwargs) == ("fit", (1,), {"step": 2, "x": 3})


@pytest.mark.parametrize("step", [lambda: None, 3, "not a name", None])
def test_what_has_no_name_is_no_step(step: object) -> None:
    """A lambda can't be found again from a checkpoint, so it is refused at once."""
    with pytest.raises(SpecError, match="must be a method"):
        Continue(step)  # type: ignore[arg-type]


def test_a_wait_names_pids_or_is_suspended() -> None:
    """Children are named by handle or pid; no `on` at all is something else than an empty one."""
    assert Wait(on=[Child("p1", "m:C"), "p2"]).on == ("p1", "p2")
    assert Wait().on is None
    assert Wait(on=[]).on == ()


def test_an_unsuccessful_stop_has_an_exit_status() -> None:
    """`successful` is a short form of an exit status of 0 or 1."""
    assert Stop().exit_status == 0
    assert Stop("x", False).exit_status == 1
    assert Stop(exit_status=12, exit_message="no").exit_status == 12


messages = (
    st.builds(Pause, st.none() | st.text())
    | st.builds(Play)
    | st.builds(Kill, st.none() | st.text(), st.booleans(), st.floats(0, 100))
    | st.builds(Resume, st.none() | st.integers(-(2**63), 2**63) | st.lists(st.text()), st.booleans())
)


@given(messages)
def test_a_message_survives_the_way(message: Message) -> None:
    """`decode_message(encode_message(m))` is the message again."""
    assert decode_message(encode_message(message)) == message


@given(st.binary(max_size=50))
def test_other_bytes_are_a_protocol_error(body: bytes) -> None:
    """Whatever the bytes are, the answer is a message or a `ProtocolError`."""
    try:
        message = decode_message(body)
    except ProtocolError:
        return
    assert isinstance(message, control.Message)
