"""What a terminated process leaves behind, and the names of processes."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import Failure, ProcessExceptedError, ProcessKilledError
from prunus.processes import AttributeDict, ProcessResult, ProcessState, new_pid, pids

FINISHED: ProcessResult[Any] = ProcessResult("p1", ProcessState.FINISHED, {"a": 1, "n": {"b": 2}}, 0)
EXCEPTED: ProcessResult[Any] = ProcessResult(
    "p2", ProcessState.EXCEPTED, {}, failure=Failure("ValueError", "too small")
)
KILLED: ProcessResult[Any] = ProcessResult("p3", ProcessState.KILLED, exit_message="enough")


def test_outputs_are_read_by_attribute_and_item() -> None:
    """Nested namespaces too."""
    assert FINISHED.outputs.n.b == FINISHED.outputs["n"]["b"] == 2
    assert FINISHED.outputs == {"a": 1, "n": {"b": 2}}


def test_a_missing_output_says_why_it_is_missing() -> None:
    """Which process, what became of it, and for what reason; from both ways of access."""
    with pytest.raises(AttributeError, match=r"process p2 is EXCEPTED \(ValueError: too small\) and has no 'volume'"):
        _ = EXCEPTED.outputs.volume
    with pytest.raises(KeyError, match="too small"):
        _ = EXCEPTED.outputs["volume"]
    with pytest.raises(KeyError, match="there are: b"):
        _ = FINISHED.outputs["n"]["c"]


@pytest.mark.parametrize("result", [FINISHED, EXCEPTED, KILLED], ids=lambda result: result.state.value)
def test_it_survives_being_plain_data(result: ProcessResult) -> None:
    """`from_data(to_data(result))` is the result again."""
    data = result.to_data()
    assert ProcessResult.from_data(data) == result
    assert type(data["outputs"]) is dict


def test_the_state_can_be_raised() -> None:
    """Each way to end has its error, with the reason in it."""
    assert FINISHED.raise_for_state() is FINISHED
    with pytest.raises(ProcessExceptedError, match="too small"):
        EXCEPTED.raise_for_state()
    with pytest.raises(ProcessKilledError, match="enough"):
        KILLED.raise_for_state()


def test_success_is_to_have_finished_with_status_0() -> None:
    """A process that stopped with another status has finished, but not successfully."""
    assert FINISHED.successful
    assert not ProcessResult("p", ProcessState.FINISHED, {}, 3).successful
    assert not EXCEPTED.successful


def test_the_context_is_a_dictionary_with_attributes() -> None:
    """What can't be reached as an attribute can't be set as one."""
    context: Any = AttributeDict(a=1)
    context.b = 2
    del context.a
    assert context == {"b": 2}
    with pytest.raises(AttributeError, match="is a method here"):
        context.items = 3
    with pytest.raises(AttributeError, match="there are: b"):
        _ = context.c


def test_a_dictionary_with_attributes_may_have_a_subclass() -> None:
    """Its methods are found, and its items too."""

    class Totals(AttributeDict):
        def total(self) -> float:
            return float(sum(self.values()))

    totals: Any = Totals(a=1, b=2)
    assert (totals.total(), totals.a, totals.get("c"), totals.__class__) == (3.0, 1, None, Totals)
    assert type(totals.copy()) is AttributeDict
    assert not hasattr(totals, "c")


@given(st.lists(st.tuples(st.integers(0, 2**48 - 1), st.integers(0, 2**80)), min_size=2, max_size=20))
def test_pids_rise_whatever_the_clock_does(draws: list[tuple[int, int]]) -> None:
    """Also when it goes back or stands still: later is greater, as numbers and as texts, and each is a UUIDv7."""
    last, texts = 0, []
    for now_ms, randomness in draws:
        number = pids.advance(last, now_ms, randomness)
        assert number > last
        last = number
        texts.append(pids.pid_from(number))
    if last < 1 << 122:
        assert texts == sorted(texts)
        assert all(uuid.UUID(text).version == 7 for text in texts)
        assert all(uuid.UUID(text).variant == uuid.RFC_4122 for text in texts)


def test_new_pids_are_unique_and_in_order() -> None:
    """Many in one millisecond."""
    made = [new_pid() for _ in range(2000)]
    assert made == sorted(set(made))
