"""kiwipy's communicator over a real broker: what kiwipy documents, and what becomes of what goes wrong."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import gc
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kiwipy
import pytest
import yaml

import prunus
from prunus.compat import kiwipy as prunus_kiwipy
from prunus.compat.kiwipy import PrunusCommunicator, codec, wire
from prunus.compat.kiwipy import communicator as communicator_module
from prunus.errors import ConnectionLostError, ForkedProcessError, ProfileError, RemoteError
from prunus.messaging import CONNECT_TIMEOUT_S, MAX_BODY_BYTES, QueueLimits
from prunus.runtime.profile import Profile
from tests.compat.parts import WAIT_S, Broker, Stack, result
from tests.messaging.test_network import Server

BROKER_PROGRAM = Path(__file__).parents[1] / "messaging" / "broker_program.py"


def echo(_: Any, message: Any) -> Any:
    return message


def depths(future: kiwipy.Future) -> int:
    """How many futures are in this one."""
    value = future.result(WAIT_S)
    return 1 + depths(value) if isinstance(value, kiwipy.Future) else 0


def resolved(value: Any) -> kiwipy.Future:
    future = kiwipy.Future()
    future.set_result(value)
    return future


def nested(depth: int, innermost: kiwipy.Future) -> Any:
    for _ in range(depth - 1):
        innermost = resolved(innermost)
    return innermost


@contextmanager
def other_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


# --- questions ---


def test_a_question_and_its_answer(connect: Stack) -> None:
    """From one communicator to another; the subscriber gets its communicator and the message."""
    asked, asker = connect(), connect()
    calls = []

    def answer(communicator: Any, message: Any) -> Any:
        calls.append((communicator, message))
        return {"answer": (1, {2})}

    assert asked.add_rpc_subscriber(answer, "name") == "name"
    assert asker.rpc_send("name", [uuid.UUID(int=7), None]).result(WAIT_S) == {"answer": (1, {2})}
    assert calls == [(asked, [uuid.UUID(int=7), None])]


def test_identifiers(communicator: PrunusCommunicator) -> None:
    """One is made if none is given; they need not be texts; each is there once."""
    made = communicator.add_rpc_subscriber(echo)
    assert communicator.rpc_send(made, 1).result(WAIT_S) == 1
    assert communicator.add_rpc_subscriber(echo, 5) == 5
    assert communicator.rpc_send(5, 2).result(WAIT_S) == 2
    for add in (communicator.add_rpc_subscriber, communicator.add_task_subscriber):
        assert [add(echo, 0), add(echo, "")] == [0, ""]
    assert communicator.add_broadcast_subscriber(echo, 0) == 0
    assert communicator.rpc_send(0, 3).result(WAIT_S) == 3
    assert made != communicator.add_rpc_subscriber(echo)
    with pytest.raises(kiwipy.DuplicateSubscriberIdentifier, match=made):
        communicator.add_rpc_subscriber(echo, made)


def test_an_identifier_is_one_subscribers_on_all_communicators(connect: Stack) -> None:
    """With kiwipy two could have the same one, and both were called."""
    first, second = connect(), connect()
    first.add_rpc_subscriber(echo, "name")
    with pytest.raises(kiwipy.DuplicateSubscriberIdentifier):
        second.add_rpc_subscriber(echo, "name")
    first.remove_rpc_subscriber("name")
    second.add_rpc_subscriber(echo, "name")


def test_names_of_files_that_are_not_utf8(connect: Stack) -> None:
    """They travel as what they are in bodies, results, senders and subjects. Identifiers, queues and exchanges they can
    not be: the error says so, and nothing else suffers."""
    receiver, sender = connect(), connect()
    name = os.fsdecode(b"caf\xe9.dat")
    receiver.add_rpc_subscriber(lambda _, message: (message, {name: message}), "name")
    receiver.add_task_subscriber(lambda _, message: [message == name, message])
    assert sender.rpc_send("name", [name]).result(WAIT_S) == ([name], {name: [name]})
    assert sender.task_send(name).result(WAIT_S) == [True, name]
    heard = [kiwipy.Future() for _ in range(3)]
    filters: list[dict[str, Any]] = [{}, {"subject": name, "sender": name}, {"subject": "caf*", "sender": "c*\udce9*"}]
    for future, wanted in zip(heard, filters, strict=True):
        hear = kiwipy.BroadcastFilter(lambda *arguments, future=future: future.set_result(arguments[1:]), **wanted)
        receiver.add_broadcast_subscriber(hear)
    sender.broadcast_send(name, sender=name, subject=name)
    assert [future.result(WAIT_S) for future in heard] == [(name, name, name, None)] * 3
    for use in (
        lambda: sender.rpc_send(name, 1),
        lambda: receiver.add_rpc_subscriber(echo, name),
        lambda: sender.task_queue(name),
        lambda: connect(message_exchange=name),
    ):
        with pytest.raises(ValueError, match=r"caf\\udce9\.dat' can't be said in UTF-8") as error:
            use()
        assert not isinstance(error.value, UnicodeError)
    assert sender.rpc_send("name", 1).result(WAIT_S) == (1, {name: 1})


def test_what_is_nested_deeply_or_contains_itself(connect: Stack) -> None:
    """The call refuses it; with YAML, kiwipy's own encoding, it arrives as it was."""
    own = connect(message_exchange="own")
    dump, load = functools.partial(yaml.dump, encoding="utf-8"), functools.partial(yaml.load, Loader=yaml.FullLoader)
    with_yaml = connect(encoder=dump, decoder=load)
    endless: list[Any] = [1]
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(codec.MAX_DEPTH + 1):
        deep = [deep]
    for value in (endless, deep):
        with pytest.raises(ValueError, match="send it flat, or give `connect` an encoder and a decoder"):
            own.task_send(value)
    for communicator in (own, with_yaml):
        communicator.add_rpc_subscriber(echo, "name")
    assert with_yaml.rpc_send("name", deep).result(WAIT_S) == deep
    cycle = with_yaml.rpc_send("name", endless).result(WAIT_S)
    assert cycle[1] is cycle
    one = [1]
    twice = [communicator.rpc_send("name", [one, one]).result(WAIT_S) for communicator in (own, with_yaml)]
    assert twice == [[one, one]] * 2
    assert [first is second for first, second in twice] == [False, True]


def test_nobody_listens(communicator: PrunusCommunicator) -> None:
    """The call itself raises, before there is a subscriber and after there was one."""
    with pytest.raises(kiwipy.UnroutableError, match="name"):
        communicator.rpc_send("name", 1)
    communicator.add_rpc_subscriber(echo, "name")
    communicator.remove_rpc_subscriber("name")
    with pytest.raises(kiwipy.UnroutableError):
        communicator.rpc_send("name", 1)
    with pytest.raises(ValueError, match="name"):
        communicator.remove_rpc_subscriber("name")


def test_rpc_subscribers_come_and_go(connect: Stack) -> None:
    """An identifier is free again for whoever comes next."""
    asked, asker = connect(), connect()
    for answer in ("first", "second"):
        asked.add_rpc_subscriber(lambda *_, answer=answer: answer, "name")
        assert asker.rpc_send("name", None).result(WAIT_S) == answer
        asked.remove_rpc_subscriber("name")
        with pytest.raises(kiwipy.UnroutableError):
            asker.rpc_send("name", None)


def test_one_identifier_for_different_things(communicator: PrunusCommunicator) -> None:
    """A subscriber of questions is in nobody's way who subscribes to tasks or broadcasts: kiwipy's `LocalCommunicator`
    refuses it."""
    heard: list[Any] = []
    communicator.add_rpc_subscriber(lambda *_: "answer", "name")
    communicator.add_task_subscriber(lambda *_: "done", "name")
    communicator.add_broadcast_subscriber(lambda _, body, *_rest: heard.append(body), "name")
    assert communicator.rpc_send("name", None).result(WAIT_S) == "answer"
    assert communicator.task_send(None).result(WAIT_S) == "done"
    communicator.broadcast_send("news")
    assert heard == ["news"]


def test_exchanges_are_apart(connect: Stack) -> None:
    """What is said on one is not heard on another, be it a question or a broadcast."""
    here, there = connect(message_exchange="a"), connect(message_exchange="ab")
    heard = []
    here.add_rpc_subscriber(echo, "name")
    here.add_broadcast_subscriber(lambda *arguments: heard.append(arguments))
    with pytest.raises(kiwipy.UnroutableError):
        there.rpc_send("name", 1)
    there.add_rpc_subscriber(echo, "name")
    there.broadcast_send("not for you")
    here.broadcast_send("for you")
    assert [arguments[1] for arguments in heard] == ["for you"]


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("kind", ["question", "task", "task of a queue"])
def test_futures_in_futures(connect: Stack, kind: str, depth: int, early: bool) -> None:
    """The sender gets one future for each that the subscriber returned, also before the last is resolved."""
    receiver, sender = connect(), connect()
    innermost = kiwipy.Future()
    answer = nested(depth, innermost) if depth else "value"
    if early:
        innermost.set_result("value")
    if kind == "question":
        receiver.add_rpc_subscriber(lambda *_: answer, "name")
        future = sender.rpc_send("name", None)
    elif kind == "task":
        receiver.add_task_subscriber(lambda *_: answer)
        future = sender.task_send(None)
    else:
        receiver.task_queue("q").add_task_subscriber(lambda *_: answer)
        future = sender.task_queue("q").task_send(None)
    if not early:
        for _ in range(depth):
            future = future.result(WAIT_S)
            assert isinstance(future, kiwipy.Future)
        innermost.set_result("value")
        depth = 0
    assert depths(future) == depth
    assert result(future) == "value"


def test_a_future_of_itself(communicator: PrunusCommunicator) -> None:
    """It has no end, and is an error after as many futures as there may be."""
    endless = kiwipy.Future()
    endless.set_result(endless)
    answers = {"endless": endless, "deepest": nested(wire.MAX_FUTURES, resolved("at last"))}
    communicator.add_rpc_subscriber(lambda _, name: answers[name], "name")
    assert result(communicator.rpc_send("name", "deepest")) == "at last"
    with pytest.raises(kiwipy.RemoteException, match="more than 1000 futures, or of itself"):
        result(communicator.rpc_send("name", "endless"))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_error_after_futures(communicator: PrunusCommunicator, depth: int) -> None:
    """It is the outcome of the innermost future, and has the text of the error."""

    def answer(*_: Any) -> Any:
        innermost = kiwipy.Future()
        innermost.set_exception(ZeroDivisionError("infinite"))
        return nested(depth, innermost) if depth else innermost.result()

    communicator.add_rpc_subscriber(answer, "name")
    future = communicator.rpc_send("name", None)
    for _ in range(depth):
        future = future.result(WAIT_S)
    with pytest.raises(kiwipy.RemoteException, match=r"^infinite$"):
        future.result(WAIT_S)


def test_a_remote_error_has_all_of_it(connect: Stack) -> None:
    """Its cause has the type, the traceback and the causes, which kiwipy loses."""

    def fail(*_: Any) -> None:
        try:
            raise KeyError("a")
        except KeyError as error:
            raise ZeroDivisionError("infinite") from error

    connect().add_rpc_subscriber(fail, "name")
    error = connect().rpc_send("name", None).exception(WAIT_S)
    assert type(error) is kiwipy.RemoteException
    assert isinstance(error.__cause__, RemoteError)
    failure = error.__cause__.failure
    assert (failure.type, failure.message) == ("ZeroDivisionError", "infinite")
    assert "in fail" in failure.traceback
    assert failure.cause is not None
    assert failure.cause.type == "KeyError"


@pytest.mark.parametrize("error", [StopIteration(1), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_errors_that_end_others(communicator: PrunusCommunicator, error: BaseException) -> None:
    """Whatever a subscriber raises is an answer, and the communicator goes on: kiwipy's is dead after a SystemExit."""

    def fail(_: Any, message: Any) -> Any:
        if message:
            raise error
        return "well"

    communicator.add_rpc_subscriber(fail, "name")
    with pytest.raises(kiwipy.RemoteException):
        communicator.rpc_send("name", True).result(WAIT_S)
    assert communicator.rpc_send("name", False).result(WAIT_S) == "well"


def test_a_cancelled_future_cancels_the_callers(communicator: PrunusCommunicator) -> None:
    """With kiwipy the caller waits for ever."""
    innermost = kiwipy.Future()
    innermost.cancel()
    communicator.add_rpc_subscriber(lambda *_: nested(2, innermost), "name")
    future = communicator.rpc_send("name", None)
    last = future.result(WAIT_S).result(WAIT_S)
    with pytest.raises(kiwipy.CancelledError):
        last.result(WAIT_S)
    assert kiwipy.wait([last], WAIT_S).done == {last}


@pytest.mark.parametrize("late", [True, False])
def test_futures_of_an_event_loop(communicator: PrunusCommunicator, late: bool) -> None:
    """A subscriber may return an asyncio future, of whatever loop."""
    with other_loop() as loop:
        futures: list[asyncio.Future[Any]] = [loop.create_future() for _ in range(2)]
        loop.call_soon_threadsafe(futures[0].set_result, futures[1])
        if not late:
            loop.call_soon_threadsafe(futures[1].set_result, "value")
        communicator.add_rpc_subscriber(lambda *_: futures[0], "name")
        future = communicator.rpc_send("name", None)
        future = future.result(WAIT_S).result(WAIT_S)
        if late:
            loop.call_soon_threadsafe(futures[1].set_result, "value")
        assert future.result(WAIT_S) == "value"


def test_coroutines_may_subscribe(communicator: PrunusCommunicator) -> None:
    """To anything, also if it is a plain function that returns one. A call that waits raises there at once."""
    heard, filtered = kiwipy.Future(), kiwipy.Future()

    async def answer(_: Any, message: Any) -> Any:
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="wait for itself: make the subscriber a plain `def`"):
            communicator.rpc_send("name", 1)
        if message is None:
            raise ZeroDivisionError("infinite")
        return message

    async def hear(_: Any, body: Any, *_rest: Any) -> None:
        heard.set_result(body)

    async def hear_filtered(_: Any, body: Any, *_rest: Any) -> None:
        filtered.set_result(body)

    communicator.add_rpc_subscriber(answer, "name")
    communicator.add_rpc_subscriber(lambda *arguments: answer(*arguments), "plain")
    communicator.add_task_subscriber(answer)
    communicator.add_broadcast_subscriber(hear)
    communicator.add_broadcast_subscriber(kiwipy.BroadcastFilter(hear_filtered))
    assert communicator.rpc_send("name", 1).result(WAIT_S) == 1
    assert communicator.rpc_send("plain", 1).result(WAIT_S) == 1
    assert communicator.task_send(2).result(WAIT_S) == 2
    communicator.broadcast_send(3)
    assert heard.result(WAIT_S) == filtered.result(WAIT_S) == 3
    for name in ("name", "plain"):
        with pytest.raises(kiwipy.RemoteException, match="infinite"):
            communicator.rpc_send(name, None).result(WAIT_S)


def test_a_coroutine_that_is_cancelled(communicator: PrunusCommunicator) -> None:
    """By itself: that is what it came to. The caller's future is cancelled, a task goes back."""

    async def give_up(*_: Any) -> None:
        raise asyncio.CancelledError

    communicator.add_rpc_subscriber(give_up, "name")
    communicator.add_rpc_subscriber(lambda *_: give_up(), "plain")
    for name in ("name", "plain"):
        with pytest.raises(kiwipy.CancelledError):
            communicator.rpc_send(name, None).result(WAIT_S)


def test_calls_in_subscribers(communicator: PrunusCommunicator) -> None:
    """kiwipy's would wait for itself until the time is over."""

    def ask(called: Any, number: int) -> Any:
        called.broadcast_send("on my way")
        called.add_rpc_subscriber(echo, "third")
        called.remove_rpc_subscriber("third")
        return called.rpc_send("second", number).result(WAIT_S) + called.task_send(number).result(WAIT_S)

    communicator.add_rpc_subscriber(ask, "first")
    communicator.add_rpc_subscriber(lambda _, number: number + 1, "second")
    communicator.add_task_subscriber(lambda _, number: number * 10)
    assert communicator.rpc_send("first", 1).result(WAIT_S) == 12


def test_calls_in_callbacks_of_futures(communicator: PrunusCommunicator) -> None:
    """Whoever waits for a future may use the communicator when it is resolved."""
    communicator.add_rpc_subscriber(echo, "name")
    second = kiwipy.Future()

    def ask_again(first: kiwipy.Future) -> None:
        kiwipy.chain(communicator.rpc_send("name", first.result() + 1), second)

    communicator.rpc_send("name", 1).add_done_callback(ask_again)
    assert second.result(WAIT_S) == 2


def test_callbacks_that_wait_for_answers_need_no_free_thread(communicator: PrunusCommunicator) -> None:
    """As many as run at once, and more: each gets the answer that it waits for, of futures in futures too."""
    count = communicator_module.MAX_ANSWER_THREADS
    go_on, all_ask, answers = threading.Event(), threading.Barrier(count), [kiwipy.Future() for _ in range(count + 4)]

    def answer(_: Any, number: int) -> int:
        go_on.wait(WAIT_S)
        return number

    def ask_again(first: kiwipy.Future) -> None:
        number = first.result()
        if number < count:
            all_ask.wait(WAIT_S)
        with kiwipy.capture_exceptions(answers[number]):
            answers[number].set_result(result(communicator.rpc_send("later", number)))

    communicator.add_rpc_subscriber(answer, "name")
    communicator.add_rpc_subscriber(lambda _, number: resolved(resolved(-number)), "later")
    for number in range(len(answers)):
        communicator.rpc_send("name", number).add_done_callback(ask_again)
    go_on.set()
    assert [answer.result(WAIT_S) for answer in answers] == [-number for number in range(len(answers))]


def test_one_at_a_time_and_in_order(connect: Stack) -> None:
    """One subscriber gets one message at a time, in the order in which they were sent; others do not wait for it."""
    receiver, sender = connect(), connect()
    go, calls = threading.Event(), []
    running = []

    def slow(_: Any, number: int) -> None:
        running.append(number)
        assert len(running) == 1
        assert go.wait(WAIT_S)
        calls.append(number)
        running.clear()

    receiver.add_rpc_subscriber(slow, "slow")
    receiver.add_rpc_subscriber(echo, "quick")
    futures = [sender.rpc_send("slow", number) for number in range(20)]
    assert sender.rpc_send("quick", 1).result(WAIT_S) == 1
    go.set()
    assert [future.result(WAIT_S) for future in futures] == [None] * 20
    assert calls == list(range(20))


def test_a_future_that_nobody_wants_any_more(communicator: PrunusCommunicator) -> None:
    """Cancelling it says nothing to the other side; its answer is dropped."""
    go = threading.Event()
    communicator.add_rpc_subscriber(lambda *_: go.wait(WAIT_S), "name")
    future = communicator.rpc_send("name", None)
    assert future.cancel()
    go.set()
    assert communicator.rpc_send("name", None).result(WAIT_S)
    assert future.cancelled()


def test_who_was_asked_is_gone(connect: Stack) -> None:
    """kiwipy would wait for ever."""
    asked, asker = connect(), connect()
    pending = kiwipy.Future()
    asked.add_rpc_subscriber(lambda *_: pending, "name")
    future = asker.rpc_send("name", None).result(WAIT_S)
    asked.close()
    with pytest.raises(kiwipy.DeliveryFailed, match=r"^no answer came for 'name' on .* may or may not have happened$"):
        future.result(WAIT_S)


def test_nothing_is_kept_of_what_is_over(communicator: PrunusCommunicator) -> None:
    """kiwipy's leaks a queue for each subscriber that was removed, and memory for each refused question."""
    for number in range(50):
        name = communicator.add_rpc_subscriber(echo)
        communicator.add_task_subscriber(echo, "worker")
        assert communicator.rpc_send(name, number).result(WAIT_S) == number
        assert communicator.task_send(number).result(WAIT_S) == number
        communicator.remove_rpc_subscriber(name)
        communicator.remove_task_subscriber("worker")
        with pytest.raises(kiwipy.UnroutableError):
            communicator.rpc_send(name, number)
    assert communicator._chains == {}
    assert not communicator._rpcs
    statistics = communicator.call("statistics", communicator.communicator.statistics)
    assert (statistics.identifiers, statistics.questions) == (0, 0)
    assert all(queue.subscribers == queue.held == queue.ready == 0 for queue in statistics.queues.values())


def test_errors_speak_of_what_one_knows(connect: Stack) -> None:
    """Of identifiers and exchanges as they were given, not of names on the wire; each has a text."""
    one, other = connect(message_exchange="an exchange"), connect(message_exchange="an exchange")
    one.add_rpc_subscriber(echo, "na me")
    with pytest.raises(kiwipy.UnroutableError, match=r"^nobody listens as 'no body' on the exchange 'an exchange'$"):
        one.rpc_send("no body", None)
    for communicator in (one, other):
        with pytest.raises(
            kiwipy.DuplicateSubscriberIdentifier,
            match=r"^there is a subscriber 'na me' on the exchange 'an exchange' already$",
        ):
            communicator.add_rpc_subscriber(echo, "na me")
    one.add_broadcast_subscriber(echo, "name")
    with pytest.raises(kiwipy.DuplicateSubscriberIdentifier, match=r"^there is a subscriber 'name' already$"):
        one.add_broadcast_subscriber(echo, "name")
    one.close()
    with pytest.raises(kiwipy.CommunicatorClosed, match=r"^this communicator was closed$"):
        one.rpc_send("name", None)


# --- values ---


class Unencodable:
    """What the default encoder has no form for."""


def test_a_value_that_can_not_be_sent(communicator: PrunusCommunicator) -> None:
    """The sender hears of it at once, and nothing was sent."""
    communicator.add_rpc_subscriber(echo, "name")
    for send in (
        functools.partial(communicator.rpc_send, "name"),
        communicator.task_send,
        communicator.broadcast_send,
        communicator.task_queue("q").task_send,
    ):
        with pytest.raises(TypeError, match="Unencodable can't be sent"):
            send(Unencodable())
    assert list(communicator.task_queue("kiwipy.tasks")) == []


@pytest.mark.parametrize("kind", ["question", "task"])
def test_a_result_that_can_not_be_sent(communicator: PrunusCommunicator, kind: str) -> None:
    """It is an error to the caller: kiwipy never answers. So is one that is too large."""
    values = {"odd": Unencodable(), "large": bytes(MAX_BODY_BYTES)}
    communicator.add_rpc_subscriber(lambda _, name: values[name], "name")
    communicator.add_task_subscriber(lambda _, name: values[name])
    send = functools.partial(communicator.rpc_send, "name") if kind == "question" else communicator.task_send
    with pytest.raises(kiwipy.RemoteException, match="can't be sent"):
        send("odd").result(WAIT_S)
    with pytest.raises(kiwipy.RemoteException, match="over the limit"):
        send("large").result(WAIT_S)


def test_a_message_that_is_too_large(communicator: PrunusCommunicator) -> None:
    with pytest.raises(kiwipy.DeliveryFailed, match="over the limit"):
        communicator.rpc_send("name", bytes(MAX_BODY_BYTES)).result(WAIT_S)


def test_encoders_of_ones_own(connect: Stack) -> None:
    """Any two functions, from a value to bytes or text, and from bytes to a value."""
    communicator = connect(encoder=repr, decoder=lambda data: eval(data, {"__builtins__": {}}))
    communicator.add_rpc_subscriber(echo, "name")
    heard = kiwipy.Future()
    communicator.add_broadcast_subscriber(lambda _, *message: heard.set_result(message))
    communicator.add_task_subscriber(echo)
    assert communicator.rpc_send("name", 1 + 2j).result(WAIT_S) == 1 + 2j
    assert communicator.task_send((1,)).result(WAIT_S) == (1,)
    communicator.broadcast_send(2j, sender=3, subject="s", correlation_id=4)
    assert heard.result(WAIT_S) == (2j, 3, "s", 4)


def refuse(data: bytes) -> Any:
    raise LookupError("unreadable")


def test_encoders_that_do_not_fit(connect: Stack) -> None:
    """Who has another one is told what to do."""
    asked, asker = connect(), connect(encoder=lambda value: b"\xc1", decoder=bytes)
    asked.add_rpc_subscriber(echo, "name")
    with pytest.raises(kiwipy.RemoteException, match="give all communicators the same encoder and decoder"):
        asker.rpc_send("name", 1).result(WAIT_S)


def test_what_can_not_be_decoded(connect: Stack) -> None:
    """Its sender gets the error: kiwipy never answers, and keeps the slot of a task."""
    receiver, sender = connect(decoder=refuse), connect()
    receiver.add_rpc_subscriber(echo, "name")
    receiver.add_task_subscriber(echo)
    for future in (sender.rpc_send("name", 1), sender.task_send(1)):
        with pytest.raises(kiwipy.RemoteException, match="unreadable"):
            future.result(WAIT_S)
    sender.add_rpc_subscriber(echo, "sender")
    with pytest.raises(LookupError):
        receiver.rpc_send("sender", 1).result(WAIT_S)


def test_a_task_that_can_not_be_decoded_and_that_nobody_waits_for(connect: Stack) -> None:
    """It is put back, for somebody who can; so is one that was fetched."""
    refused = threading.Semaphore(0)

    def refuse_and_tell(data: bytes) -> Any:
        refused.release()
        return refuse(data)

    receiver, sender = connect(decoder=refuse_and_tell), connect()
    queue = receiver.task_queue("kiwipy.tasks")
    sender.task_send("fetched", no_reply=True)
    with pytest.raises(ValueError, match="unreadable"), queue.next_task():
        pass
    assert refused.acquire(timeout=WAIT_S)
    receiver.add_task_subscriber(echo)
    for _ in range(2):
        assert refused.acquire(timeout=WAIT_S)
    receiver.close()
    with sender.task_queue("kiwipy.tasks").next_task() as task:
        assert task.body == "fetched"
        task.process().set_result(None)


# --- tasks ---


def test_a_task_waits_for_somebody(connect: Stack) -> None:
    """It is stored when the call returns, be there a subscriber or not."""
    sender = connect()
    future = sender.task_send("work")
    receiver = connect()
    tasks = []

    def work(communicator: Any, task: Any) -> str:
        tasks.append((communicator, task))
        return "done"

    receiver.add_task_subscriber(work)
    assert future.result(WAIT_S) == "done"
    assert tasks == [(receiver, "work")]


def test_a_task_that_is_not_taken(communicator: PrunusCommunicator) -> None:
    """Whatever the reason is, nobody rejected it: kiwipy says so of any failure to send."""
    queue = communicator.task_queue("q")
    peer, limits = communicator.communicator, QueueLimits(max_length=1)
    communicator.call("configure_queue", lambda: peer.configure_queue(wire.queue_name("q"), limits))
    queue.task_send(0, no_reply=True)
    for no_reply in (True, False):
        with pytest.raises(kiwipy.DeliveryFailed, match="which is its limit"):
            queue.task_send(1, no_reply)
    assert communicator._chains == {}


def test_no_reply(communicator: PrunusCommunicator) -> None:
    """There is no future, and nothing is kept for the result."""
    done = kiwipy.Future()
    communicator.add_task_subscriber(lambda _, task: done.set_result(task))
    assert communicator.task_send(1, no_reply=True) is None
    assert done.result(WAIT_S) == 1


def test_an_error_ends_a_task(connect: Stack) -> None:
    """The sender gets it, and no other subscriber the task: kiwipy went on to the next."""
    communicator = connect()
    calls = []

    def fail(_: Any, task: Any) -> None:
        calls.append("first")
        raise ZeroDivisionError("infinite")

    communicator.add_task_subscriber(fail)
    communicator.add_task_subscriber(lambda *_: calls.append("second"))
    with pytest.raises(kiwipy.RemoteException, match="infinite"):
        communicator.task_send(1).result(WAIT_S)
    assert list(communicator.task_queue("kiwipy.tasks")) == []
    assert calls == ["first"]


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def failed(error: BaseException) -> Callable[..., Any]:
    """The same in a future."""

    def fail(*_: Any) -> Any:
        future = kiwipy.Future()
        future.set_exception(error)
        return future

    return fail


@pytest.mark.parametrize("reject", [raising(kiwipy.TaskRejected()), failed(kiwipy.TaskRejected())])
def test_a_rejected_task_goes_to_the_next_subscriber(
    communicator: PrunusCommunicator, reject: Callable[..., Any]
) -> None:
    communicator.add_task_subscriber(reject)
    communicator.add_task_subscriber(reject)
    communicator.add_task_subscriber(echo)
    assert result(communicator.task_send("work")) == "work"


def cancelled(*_: Any) -> kiwipy.Future:
    future = kiwipy.Future()
    future.cancel()
    return future


@pytest.mark.parametrize("reject", [raising(kiwipy.TaskRejected()), raising(kiwipy.CancelledError()), cancelled])
def test_a_task_that_nobody_here_wants(connect: Stack, reject: Callable[..., Any]) -> None:
    """One that all subscribers rejected, or one cancelled, is offered to others, after a pause that grows: kiwipy
    turned it over hundreds of times in a second, or lost its slot."""
    picky, sender = connect(), connect()
    offers = threading.Semaphore(0)

    def count(*arguments: Any) -> Any:
        offers.release()
        return reject(*arguments)

    picky.add_task_subscriber(count)
    future = sender.task_send("work")
    for _ in range(3):
        assert offers.acquire(timeout=WAIT_S)
    connect().add_task_subscriber(echo)
    assert result(future) == "work"


def test_prefetch_count(connect: Stack) -> None:
    """So many tasks are in hand at most, those that are futures included."""
    communicator = connect(task_prefetch_count=2)
    futures: list[kiwipy.Future] = []
    came = threading.Semaphore(0)

    def take(*_: Any) -> kiwipy.Future:
        futures.append(kiwipy.Future())
        came.release()
        return futures[-1]

    communicator.add_task_subscriber(take)
    sent = [communicator.task_send(number) for number in range(4)]
    assert came.acquire(timeout=WAIT_S)
    assert came.acquire(timeout=WAIT_S)
    communicator.rpc_send(communicator.add_rpc_subscriber(echo), None).result(WAIT_S)
    assert len(futures) == 2
    futures[0].set_result("done")
    assert came.acquire(timeout=WAIT_S)
    assert result(sent[0]) == "done"
    assert len(futures) == 3
    with pytest.raises(ValueError, match="prefetch_count"):
        communicator.task_queue("q", prefetch_count=-1)
    with pytest.raises(ValueError, match="prefetch_size"):
        communicator.task_queue("q", prefetch_size=1)


def test_tasks_in_hand_go_back_when_the_communicator_is_closed(connect: Stack) -> None:
    receiver, sender = connect(), connect()
    taken = threading.Event()

    def take(*_: Any) -> kiwipy.Future:
        taken.set()
        return kiwipy.Future()

    receiver.add_task_subscriber(take)
    future = sender.task_send("work")
    assert taken.wait(WAIT_S)
    receiver.close()
    sender.add_task_subscriber(echo)
    assert result(future) == "work"


def test_task_subscribers_come_and_go(communicator: PrunusCommunicator) -> None:
    queue = communicator.task_queue("q")
    assert communicator.add_task_subscriber(echo, "name") == "name"
    name = queue.add_task_subscriber(lambda *_: "there")
    assert queue.task_send("here").result(WAIT_S) == "there"
    with pytest.raises(kiwipy.DuplicateSubscriberIdentifier, match="name"):
        communicator.add_task_subscriber(echo, "name")
    queue.remove_task_subscriber(name)
    future = queue.task_send("later")
    communicator.remove_task_subscriber("name")
    for remove in (queue.remove_task_subscriber, communicator.remove_task_subscriber):
        with pytest.raises(ValueError, match="no subscriber"):
            remove(name)
    assert not future.done()
    with communicator.task_queue("q") as queue:
        queue.add_task_subscriber(echo)
        assert future.result(WAIT_S) == "later"
    queue.close()
    future = queue.task_send("stays")
    assert [task.body for task in queue] == ["stays"]


@pytest.mark.parametrize("add", ["add_rpc_subscriber", "add_task_subscriber", "add_broadcast_subscriber"])
def test_what_is_no_function_can_not_subscribe(communicator: PrunusCommunicator, add: str) -> None:
    with pytest.raises(TypeError, match="subscriber"):
        getattr(communicator, add)("not a function")


# --- queues ---


def test_next_task(communicator: PrunusCommunicator) -> None:
    """It is processed with a future or in a block; each state says so."""
    queue = communicator.task_queue("q")
    futures = [queue.task_send(number) for number in range(2)]
    with queue.next_task() as task:
        assert (task.body, task.no_reply, task.state) == (0, False, "pending")
        outcome = task.process()
        assert task.state == "processing"
        outcome.set_result("zero")
        assert task.state == "finished"
    with queue.next_task(timeout=1.0, fail=True) as task, task.processing() as outcome:
        assert (task.body, task.state) == (1, "processing")
        outcome.set_result("one")
    assert [future.result(WAIT_S) for future in futures] == ["zero", "one"]
    queue.task_send(2, no_reply=True)
    with queue.next_task() as task:
        assert task.no_reply


def test_an_empty_queue(communicator: PrunusCommunicator) -> None:
    """`kiwipy.QueueEmpty` after the time given, or None."""
    queue = communicator.task_queue("q")
    with pytest.raises(kiwipy.QueueEmpty, match="'q'"), queue.next_task(timeout=0.0):
        pass
    with queue.next_task(timeout=0.0, fail=False) as task:
        assert task is None


def test_a_task_comes_while_somebody_waits(connect: Stack) -> None:
    """`next_task` waits for it."""
    queue, sender = connect().task_queue("q"), connect().task_queue("q")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(queue._take, None)
        future = sender.task_send(1)
        waiting.result(WAIT_S).process().set_result(2)
    assert future.result(WAIT_S) == 2


def test_a_task_that_was_not_processed_goes_back(communicator: PrunusCommunicator) -> None:
    """At the end of its block, at once; also if it was put back by hand, or its outcome cancelled."""
    queue = communicator.task_queue("q")
    future = queue.task_send(1)
    with queue.next_task() as task:
        pass
    assert task.state == "requeued"
    with queue.next_task(timeout=0.0) as task:
        task.requeue()
        assert task.state == "requeued"
        with queue.next_task(timeout=0.0) as again:
            again.process().cancel()
            assert again.state == "pending"
            cancelled = again.process()
    cancelled.cancel()
    assert again.state == "requeued"
    with queue.next_task() as task, task.processing():
        pass
    assert task.state == "requeued"
    with queue.next_task() as task:
        task.process().set_result("at last")
    assert future.result(WAIT_S) == "at last"


def test_an_outcome_that_was_forgotten(communicator: PrunusCommunicator) -> None:
    """Its task goes back when the future is let go of."""
    queue = communicator.task_queue("q")
    future = queue.task_send(1)
    with queue.next_task() as task:
        outcome = task.process()
    with pytest.raises(kiwipy.QueueEmpty), queue.next_task(timeout=0.0):
        pass
    del outcome
    gc.collect()
    with queue.next_task() as task:
        task.process().set_result("done")
    assert future.result(WAIT_S) == "done"


def test_an_error_in_the_block(communicator: PrunusCommunicator) -> None:
    """The sender gets it, and it goes on; what is no `Exception` puts the task back."""
    queue = communicator.task_queue("q")
    future = queue.task_send(1)
    with pytest.raises(KeyboardInterrupt), queue.next_task() as task, task.processing():
        raise KeyboardInterrupt
    assert task.state == "requeued"
    with pytest.raises(ZeroDivisionError), queue.next_task() as task, task.processing():
        raise ZeroDivisionError("infinite")
    with pytest.raises(kiwipy.RemoteException, match="infinite"):
        future.result(WAIT_S)
    assert list(queue) == []


def test_a_task_is_processed_once(communicator: PrunusCommunicator) -> None:
    queue = communicator.task_queue("q")
    queue.task_send(1)
    with queue.next_task() as task:
        task.process().set_result(None)
        for use in (task.process, task.requeue, task.processing().__enter__):
            with pytest.raises(asyncio.InvalidStateError, match="finished"):
                use()


def test_no_ack(communicator: PrunusCommunicator) -> None:
    """The task is done with as soon as it is here."""
    queue = communicator.task_queue("q")
    future = queue.task_send(1)
    with queue.next_task(no_ack=True) as task:
        assert (task.body, task.state) == (1, "finished")
        assert future.result(WAIT_S) is None
    assert list(queue) == []


def test_iterating(communicator: PrunusCommunicator) -> None:
    """Each task that waits comes once; those that were not processed are there again when it is over."""
    queue = communicator.task_queue("q")
    futures = [queue.task_send(number) for number in range(6)]
    seen = []
    for task in queue:
        seen.append(task.body)
        if task.body % 2:
            task.process().set_result(task.body * 10)
    assert seen == list(range(6))
    assert [future.result(WAIT_S) for future in futures[1::2]] == [10, 30, 50]
    for _ in queue:
        break
    assert sorted(task.body for task in queue) == [0, 2, 4]
    for task in queue:
        with task.processing() as outcome:
            outcome.set_result(task.body)
    assert [future.result(WAIT_S) for future in futures[::2]] == [0, 2, 4]
    assert list(queue) == []


def test_queues_cost_nothing(communicator: PrunusCommunicator) -> None:
    """kiwipy's connection was full after 1,023 of them."""
    for number in range(2000):
        assert communicator.task_queue("q").name == "q"
        if number % 500 == 0:
            assert list(communicator.task_queue("q")) == []
    statistics = communicator.call("statistics", communicator.communicator.statistics)
    assert len(statistics.sessions) == 1


def test_queues_have_their_own_tasks(connect: Stack) -> None:
    """By name, over all communicators, whatever their exchanges are."""
    one, other = connect(task_exchange="a", message_exchange="a"), connect(task_exchange="b", message_exchange="b")
    one.task_queue("first").task_send(1)
    assert list(other.task_queue("second")) == []
    assert [task.body for task in other.task_queue("first")] == [1]


# --- broadcasts ---


def test_a_broadcast(connect: Stack) -> None:
    """All who listen get the body, the sender, the subject and the correlation id, as they were."""
    sender, other = connect(), connect()
    listeners, futures = [sender, sender, other], [kiwipy.Future() for _ in range(3)]
    for listener, future in zip(listeners, futures, strict=True):
        listener.add_broadcast_subscriber(lambda *arguments, future=future: future.set_result(arguments))
    message = {"body": {"a": (1,)}, "sender": uuid.UUID(int=1), "subject": "s", "correlation_id": 7}
    assert sender.broadcast_send(**message) is True
    heard = [future.result(WAIT_S) for future in futures]
    assert [arguments[1:] for arguments in heard] == [tuple(message.values())] * 3
    assert [arguments[0] for arguments in heard] == listeners


def test_nobody_hears_a_broadcast(communicator: PrunusCommunicator) -> None:
    assert communicator.broadcast_send("into the ether") is True


def test_ones_own_broadcasts_are_heard_when_the_call_returns(communicator: PrunusCommunicator) -> None:
    """In order, by each subscriber."""
    heard: list[Any] = []
    communicator.add_broadcast_subscriber(lambda _, body, *_rest: heard.append(body))
    for number in range(100):
        communicator.broadcast_send(number)
        assert heard == list(range(number + 1))


def test_the_call_waits_for_ones_own_subscribers(connect: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(communicator_module, "OWN_BROADCASTS_S", WAIT_S)
    communicator = connect()
    began, go, events = threading.Event(), threading.Event(), []

    def hear(*_: Any) -> None:
        began.set()
        assert go.wait(WAIT_S)
        events.append("heard")

    def send() -> None:
        communicator.broadcast_send(None)
        events.append("returned")

    communicator.add_broadcast_subscriber(hear)
    sending = threading.Thread(target=send)
    sending.start()
    assert began.wait(WAIT_S)
    for _ in range(3):  # whoever did not wait would have returned by now
        communicator.remove_rpc_subscriber(communicator.add_rpc_subscriber(echo))
    go.set()
    sending.join()
    assert events == ["heard", "returned"]


def test_a_slow_subscriber_holds_up_nobody(connect: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the sender, for long, nor other subscribers; one that fails harms nobody."""
    monkeypatch.setattr(communicator_module, "OWN_BROADCASTS_S", 0.01)
    communicator, go, heard = connect(), threading.Event(), threading.Semaphore(0)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    communicator.add_broadcast_subscriber(lambda *_: go.wait(WAIT_S))
    communicator.add_broadcast_subscriber(fail)
    communicator.add_broadcast_subscriber(lambda *_: heard.release())
    for _ in range(3):
        assert communicator.broadcast_send(None)
        assert heard.acquire(timeout=WAIT_S)
    go.set()


def test_a_broadcast_in_a_subscriber_of_broadcasts(connect: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for itself."""
    monkeypatch.setattr(communicator_module, "OWN_BROADCASTS_S", WAIT_S)
    communicator = connect()
    done = kiwipy.Future()

    def again(communicator: Any, body: int, *_: Any) -> None:
        if body < 10:
            communicator.broadcast_send(body + 1)
        else:
            done.set_result(body)

    communicator.add_broadcast_subscriber(again)
    communicator.broadcast_send(0)
    assert done.result(WAIT_S) == 10


LONG = 300 * "purchase."
"""More than goes into a name."""
SUBJECTS = [None, "purchase.car", "purchase.piano", "purchaser", "sell.car", "a.purchase.car", LONG, 400 * "*"]
SENDERS = [None, "bob.jones", "alice.jones", "bob.smith", 300 * "bob.", 5, 6, 10**600]


@pytest.mark.parametrize(
    ("senders", "subjects"),
    [
        ([], []),
        ([], ["purchase.car"]),
        ([], ["purchase"]),
        ([], ["purchase.*"]),
        (["*.jones"], []),
        (["*.jones"], ["*.car"]),
        ([5], []),
        ([5], ["purchase.*", "sell.*"]),
        (["bob.*"], ["purchase.*"]),
        ([10**600], [LONG]),
        ([], [re.compile("^(?!purchase).*")]),
        ([re.compile("(bob|alice)[.]jones")], ["purchase.[cp]"]),
        (["bob.*", "alice.jones"], [re.compile("purchase")]),
    ],
)
def test_filters(connect: Stack, senders: list[Any], subjects: list[Any]) -> None:
    """Exactly what kiwipy's filter lets through arrives, once and in order."""
    communicator, heard = connect(), []
    subscriber = kiwipy.BroadcastFilter(lambda _, _body, sender, subject, _id: heard.append((sender, subject)))
    for one in senders:
        subscriber.add_sender_filter(one)
    for one in subjects:
        subscriber.add_subject_filter(one)
    communicator.add_broadcast_subscriber(subscriber)
    texts = all(isinstance(one, int) for one in senders)
    combinations = [(a, b) for a in SENDERS for b in SUBJECTS if texts or not isinstance(a, int)]
    for sender, subject in combinations:
        communicator.broadcast_send(None, sender=sender, subject=subject)
    assert heard == [names for names in combinations if not subscriber.is_filtered(*names)]


def test_filters_that_are_added_later(communicator: PrunusCommunicator) -> None:
    """They narrow what arrives; what the broker was not told about at first it does not send."""
    heard: list[Any] = []
    subscriber = kiwipy.BroadcastFilter(lambda _, _body, sender, subject, _id: heard.append((sender, subject)))
    subscriber.add_subject_filter("a.*")
    name = communicator.add_broadcast_subscriber(subscriber)
    subscriber.add_sender_filter("me")
    subscriber.add_subject_filter("b.*")
    for sender, subject in [("me", "a.a"), ("you", "a.a"), ("me", "b.b")]:
        communicator.broadcast_send(None, sender=sender, subject=subject)
    communicator.remove_broadcast_subscriber(name)
    communicator.add_broadcast_subscriber(subscriber)
    communicator.broadcast_send(None, sender="me", subject="b.c")
    assert heard == [("me", "a.a"), ("me", "b.c")]


def test_broadcast_subscribers_come_and_go(communicator: PrunusCommunicator) -> None:
    heard: list[Any] = []
    name = communicator.add_broadcast_subscriber(lambda _, body, *_rest: heard.append(body))
    communicator.broadcast_send(1)
    with pytest.raises(kiwipy.DuplicateSubscriberIdentifier, match=name):
        communicator.add_broadcast_subscriber(print, name)
    communicator.remove_broadcast_subscriber(name)
    communicator.broadcast_send(2)
    communicator.add_broadcast_subscriber(lambda _, body, *_rest: heard.append(body), name)
    communicator.broadcast_send(3)
    assert heard == [1, 3]
    communicator.remove_broadcast_subscriber(name)
    with pytest.raises(ValueError, match=name):
        communicator.remove_broadcast_subscriber(name)


# --- the communicator itself ---


@pytest.mark.parametrize(
    "use",
    [
        lambda one: one.rpc_send("name", 1),
        lambda one: one.add_rpc_subscriber(echo),
        lambda one: one.remove_rpc_subscriber("name"),
        lambda one: one.task_send(1),
        lambda one: one.add_task_subscriber(echo),
        lambda one: one.remove_task_subscriber("name"),
        lambda one: one.broadcast_send(1),
        lambda one: one.add_broadcast_subscriber(echo),
        lambda one: one.remove_broadcast_subscriber("name"),
        lambda one: one.task_queue("q"),
        lambda one: one.add_close_callback(echo),
        lambda one: one.loop(),
        lambda one: one.server_properties,
    ],
)
def test_after_close_there_is_nothing(communicator: PrunusCommunicator, use: Callable[[Any], Any]) -> None:
    """But to close it again, and to ask whether it is closed. Its queues have nothing either."""
    queue = communicator.task_queue("q")
    communicator.close()
    communicator.close()
    queue.close()
    assert communicator.is_closed()
    for one in (use, lambda _: queue.task_send(1), lambda _: list(queue)):
        with pytest.raises(kiwipy.CommunicatorClosed):
            one(communicator)


def test_closing(connect: Stack) -> None:
    """As often as one likes; whoever still waits hears of it: kiwipy leaves them waiting."""
    with connect() as communicator:
        assert not communicator.is_closed()
        queue = communicator.task_queue("q")
        pending = kiwipy.Future()
        connect().add_rpc_subscriber(lambda *_: pending, "name")
        own = communicator.add_rpc_subscriber(lambda *_: pending)
        waiting = [queue.task_send(1), *(communicator.rpc_send(one, 1).result(WAIT_S) for one in ("name", own))]
        loop = communicator.loop()
        assert loop.is_running()
    assert communicator.is_closed()
    communicator.close()
    queue.close()
    for future in waiting:
        with pytest.raises(kiwipy.CommunicatorClosed, match=r"^this communicator was closed$"):
            future.result(WAIT_S)
    assert loop.is_closed()


def test_futures_that_were_given_up(broker: Broker) -> None:
    """Nothing is said of them when the communicator is closed, wherever one waited for them."""
    script = (
        "import asyncio, gc, sys, kiwipy\nfrom prunus.compat import kiwipy as prunus_kiwipy\n"
        "async def give_up(communicator):\n"
        "    for future in (communicator.task_send(1), communicator.rpc_send('name', 1)):\n"
        "        try:\n            await asyncio.wait_for(asyncio.wrap_future(future), 0)\n"
        "        except TimeoutError:\n            pass\n"
        "for end in ('close', 'cancel', 'leave'):\n"
        "    communicator = prunus_kiwipy.connect(sys.argv[1])\n"
        "    pending = kiwipy.Future()\n"
        "    communicator.add_rpc_subscriber(lambda *_: pending, 'name')\n"
        "    asyncio.run(give_up(communicator))\n"
        "    for future in (communicator.task_send(1), communicator.rpc_send('name', 1)):\n"
        "        if end == 'cancel':\n            future.cancel()\n"
        "    if end == 'leave':\n        del future\n        gc.collect()\n"
        "    communicator.close()\n    gc.collect()\nprint('the end')"
    )
    command = [sys.executable, "-c", script, broker.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert (done.stdout, done.stderr) == ("the end\n", "")


def test_what_was_asked_before_closing_is_still_answered(connect: Stack) -> None:
    """Whoever was asked has the question when the call returns, be it the one who leaves."""
    for _ in range(20):
        asked = kiwipy.Future()
        with connect() as communicator:
            communicator.add_rpc_subscriber(lambda _, message, asked=asked: asked.set_result(message), "name")
            communicator.rpc_send("name", "question")
        assert asked.result(0) == "question"


def test_a_task_that_is_being_done_when_the_communicator_is_closed(connect: Stack) -> None:
    """Its subscriber ends, and so does the task; those that did not begin go back."""
    receiver, sender = connect(), connect()
    began, go = threading.Event(), threading.Event()

    def work(*_: Any) -> str:
        began.set()
        assert go.wait(WAIT_S)
        return "done"

    receiver.add_task_subscriber(work)
    first, second = sender.task_send(1), sender.task_send(2)
    assert began.wait(WAIT_S)
    closing = threading.Thread(target=receiver.close)
    closing.start()
    while not receiver._closing:
        pass
    go.set()
    closing.join()
    assert first.result(WAIT_S) == "done"
    sender.add_task_subscriber(lambda *_: "elsewhere")
    assert second.result(WAIT_S) == "elsewhere"


def test_a_subscriber_may_close_its_communicator(connect: Stack) -> None:
    communicator, sender = connect(), connect()
    closed = threading.Event()

    def close(communicator: Any, *_: Any) -> None:
        communicator.close()
        closed.set()

    communicator.add_task_subscriber(close)
    sender.task_send(None, no_reply=True)
    assert closed.wait(WAIT_S)
    assert communicator.is_closed()


def test_ctrl_c_while_it_closes(connect: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not want to wait for a subscriber that is being called: it is closed all the same."""
    communicator = connect(async_task_timeout=WAIT_S)
    waiting = communicator.task_send(None)
    main = threading.main_thread().ident
    assert main is not None

    async def interrupt(_wait: bool) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        await asyncio.Event().wait()

    monkeypatch.setattr(communicator, "_before_close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        communicator.close()
    assert communicator.is_closed()
    with pytest.raises(kiwipy.CommunicatorClosed):
        result(waiting)


def test_after_a_fork_the_child_has_none(communicator: PrunusCommunicator) -> None:
    """There every use raises; leaving it does nothing."""
    communicator.add_rpc_subscriber(echo, "name")
    child = os.fork()
    if child == 0:
        try:
            communicator.rpc_send("name", 1)
        except ForkedProcessError:
            communicator.close()
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert communicator.rpc_send("name", 1).result(WAIT_S) == 1


def test_closing_in_the_loop(communicator: PrunusCommunicator) -> None:
    """It would wait for itself: it says so, and goes on."""

    async def close(*_: Any) -> None:
        communicator.close()

    communicator.add_rpc_subscriber(close, "name")
    for _ in range(2):
        with pytest.raises(kiwipy.RemoteException, match="wait for itself"):
            communicator.rpc_send("name", None).result(WAIT_S)
    assert not communicator.is_closed()


def test_a_script_that_does_not_close(broker: Broker) -> None:
    """It ends all the same."""
    script = (
        "import sys\nfrom prunus.compat import kiwipy\ncommunicator = kiwipy.connect(sys.argv[1])\n"
        "communicator.add_rpc_subscriber(lambda _, text: text, 'name')\n"
        "print(communicator.rpc_send('name', 'well').result())"
    )
    command = [sys.executable, "-c", script, broker.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert (done.stdout, done.stderr) == ("well\n", "")


def test_a_program_does_not_wait_for_its_subscribers(broker: Broker) -> None:
    """Nor for callbacks of futures: what never returns does not keep it from ending."""
    script = (
        "import sys, threading\nfrom prunus.compat import kiwipy\n"
        "communicator = kiwipy.connect(sys.argv[1], async_task_timeout=0.1)\nbegun = threading.Barrier(3)\n"
        "def stay(*_):\n    begun.wait()\n    threading.Event().wait()\n"
        "communicator.add_rpc_subscriber(stay, 'name')\ncommunicator.rpc_send('name', None)\n"
        "communicator.add_rpc_subscriber(lambda *_: go_on.wait(), 'later')\ngo_on = threading.Event()\n"
        "communicator.rpc_send('later', None).add_done_callback(stay)\ngo_on.set()\n"
        "begun.wait()\nif sys.argv[2] == 'close':\n    communicator.close()\nprint('the end')"
    )
    for end in ("close", "leave"):
        command = [sys.executable, "-c", script, broker.endpoint, end]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True)
        assert (done.stdout, done.stderr) == ("the end\n", "")


async def test_in_a_notebook(broker: Broker) -> None:
    """There an event loop runs already, in the thread of the cells."""
    with prunus_kiwipy.connect(broker.endpoint) as communicator:
        communicator.add_rpc_subscriber(echo, "name")
        assert communicator.rpc_send("name", "hello").result(WAIT_S) == "hello"
        communicator.add_task_subscriber(echo)
        assert communicator.task_send("task").result(WAIT_S) == "task"


def test_close_callbacks(connect: Stack) -> None:
    """They are called once, with the communicator; a weak one only while somebody keeps it."""
    calls: list[Any] = []

    class Listener:
        def closed(self, *arguments: Any) -> None:
            calls.append(arguments)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    def weakly(*_: Any) -> None:
        calls.append("weakly")

    communicator = connect()
    kept, gone = Listener(), Listener()
    communicator.add_close_callback(fail)
    communicator.add_close_callback(kept.closed, weak=True)
    communicator.add_close_callback(gone.closed, weak=True)
    communicator.add_close_callback(weakly, weak=True)
    communicator.add_close_callback(lambda *arguments: calls.append(arguments))
    del gone
    communicator.close()
    communicator.close()
    assert calls == [(communicator, None), "weakly", (communicator, None)]


def test_server_properties(communicator: PrunusCommunicator) -> None:
    """Those that kiwipy has; the broker is no RabbitMQ and does not say so."""
    properties = communicator.server_properties
    assert properties["product"] == "Prunus"
    assert properties["version"] == prunus.__version__
    assert properties["platform"].startswith(platform.python_implementation())
    assert "kiwipy" in repr(communicator)


def test_many_threads(connect: Stack) -> None:
    """One communicator can be used from all of them."""
    communicator = connect()
    communicator.add_rpc_subscriber(echo, "name")
    communicator.add_task_subscriber(echo)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        questions = pool.map(lambda number: communicator.rpc_send("name", number).result(WAIT_S), range(100))
        tasks = pool.map(lambda number: communicator.task_send(number).result(WAIT_S), range(100))
        assert list(questions) == list(tasks) == list(range(100))


# --- the broker comes and goes ---


def test_the_broker_is_started_anew(connect: Stack, broker: Broker) -> None:
    """Subscriptions, tasks and results are there again; close callbacks hear of the loss."""
    receiver, sender = connect(), connect()
    lost: list[kiwipy.Future] = [kiwipy.Future(), kiwipy.Future()]
    receiver.add_close_callback(lambda _, error: lost[0].done() or lost[0].set_result(error))
    sender.add_close_callback(lambda _, error: lost[1].done() or lost[1].set_result(error))
    pending, taken = kiwipy.Future(), threading.Event()
    runs = []

    def work(_: Any, task: Any) -> Any:
        runs.append(task)
        taken.set()
        return pending

    receiver.add_task_subscriber(work)
    receiver.add_rpc_subscriber(echo, "name")
    heard = kiwipy.Future()
    receiver.add_broadcast_subscriber(
        kiwipy.BroadcastFilter(lambda _, body, *_rest: heard.set_result(body), subject="a.*")
    )
    future = sender.task_send("work")
    assert taken.wait(WAIT_S)
    broker.stop()
    pending.set_result("done meanwhile")
    broker.start()
    assert result(future) == "done meanwhile"
    assert runs == ["work"]
    for error in (one.result(WAIT_S) for one in lost):
        assert isinstance(error, ConnectionError)
        assert str(error) == f"the broker at {broker.endpoint} was lost for a while; it is back"
    assert sender.rpc_send("name", 1).result(WAIT_S) == 1
    sender.broadcast_send(2, subject="a.b")
    assert heard.result(WAIT_S) == 2


def test_no_broker(connect: Stack, broker: Broker) -> None:
    """A call that waits for it ends with an error that names the call."""
    communicator = connect(async_task_timeout=0.2)
    broker.stop()
    try:
        for name, use in {
            "task_send": lambda: communicator.task_send(1),
            "broadcast_send": lambda: communicator.broadcast_send(1),
            "rpc_send": lambda: communicator.rpc_send("name", 1),
            "add_rpc_subscriber": lambda: communicator.add_rpc_subscriber(echo, "name"),
        }.items():
            with pytest.raises(kiwipy.TimeoutError, match=name):
                use()
    finally:
        broker.start()
    assert communicator.add_rpc_subscriber(echo, "name") == "name"


@contextmanager
def broker_process(database: Path, endpoint: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A broker as a process of its own; it is killed at the end."""
    command = [sys.executable, str(BROKER_PROGRAM), str(database), endpoint, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.send_signal(signal.SIGKILL)


def test_the_broker_is_killed(short_folder: Path) -> None:
    """What was sent is there, after a SIGKILL too."""
    database, endpoint = short_folder / "b.db", f"ipc://{short_folder}/run/s"
    with broker_process(database, endpoint):
        sender = prunus_kiwipy.connect(endpoint)
        futures = [sender.task_send(number) for number in range(10)]
    with broker_process(database, endpoint):
        sender.add_task_subscriber(lambda _, number: number * 2)
        assert [future.result(WAIT_S) for future in futures] == [number * 2 for number in range(10)]
        sender.close()


def stopped_with_a_task(folder: Path, script: str) -> tuple[str, str, str]:
    """A program that fetches a task from the queue q is stopped for longer than its lease, when it has said "taken"; it
    goes on when somebody else has done the task. What it printed and logged, and the id of the task."""
    endpoint, pipe = f"ipc://{folder}/run/s", subprocess.PIPE
    command = [sys.executable, "-c", script, endpoint]
    with broker_process(folder / "b.db", endpoint, "1.0"), prunus_kiwipy.connect(endpoint) as other:
        queue = other.task_queue("q")
        future = queue.task_send("first")
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as stopped:
            assert stopped.stdout is not None
            assert stopped.stdout.readline() == "taken\n"
            stopped.send_signal(signal.SIGSTOP)
            with queue.next_task(timeout=WAIT_S) as again:
                again.process().set_result("elsewhere")
            stopped.send_signal(signal.SIGCONT)
            queue.task_send("second", no_reply=True)
            out, err = stopped.communicate("go on\n", timeout=WAIT_S)
        assert future.result(WAIT_S) == "elsewhere"
    return out, err, again._taken.id


def test_a_fetched_task_that_was_lost(short_folder: Path) -> None:
    """Who was stopped for longer than its lease is warned that what it made of its task does not count, and goes on."""
    script = (
        "import sys\nfrom prunus.compat import kiwipy\nwith kiwipy.connect(sys.argv[1]) as communicator:\n"
        "    queue = communicator.task_queue('q')\n"
        "    with queue.next_task() as task:\n        print('taken', flush=True)\n        sys.stdin.readline()\n"
        "        task.process().set_result('late')\n    print(task.state)\n"
        "    with queue.next_task() as task, task.processing() as outcome:\n        outcome.set_result('well')\n"
        "    print(task.state)"
    )
    out, err, lost = stopped_with_a_task(short_folder, script)
    assert out == "requeued\nfinished\n"
    assert f"the task {lost} of the queue 'q' was processed, but can't be acknowledged any more" in err


def test_a_fetched_task_that_can_not_be_read_and_was_lost(short_folder: Path) -> None:
    """It is an error that it can't be read; whose it is by then is none."""
    script = (
        "import sys\nfrom prunus.compat import kiwipy\n"
        "def decode(data):\n    print('taken', flush=True)\n    sys.stdin.readline()\n    raise ZeroDivisionError\n"
        "with kiwipy.connect(sys.argv[1], decoder=decode) as communicator:\n"
        "    try:\n        communicator.task_queue('q').next_task(timeout=60).__enter__()\n"
        "    except Exception as error:\n        print(repr(error))"
    )
    out, _, lost = stopped_with_a_task(short_folder, script)
    assert out == f'ValueError("the task {lost} can\'t be decoded here: ")\n'


def test_a_subscription_that_took_too_long_is_none(short_folder: Path) -> None:
    """When the broker answers again its identifier is free: kiwipy's may be taken, by nobody whom one could remove."""
    endpoint = f"ipc://{short_folder}/run/s"
    with (
        broker_process(short_folder / "b.db", endpoint) as broker,
        prunus_kiwipy.connect(endpoint) as other,
        prunus_kiwipy.connect(endpoint, async_task_timeout=0.1) as hasty,
    ):
        broker.send_signal(signal.SIGSTOP)
        with pytest.raises(kiwipy.TimeoutError, match="add_rpc_subscriber"):
            hasty.add_rpc_subscriber(echo, "name")
        broker.send_signal(signal.SIGCONT)
        hasty.timeout_s = WAIT_S
        hasty.broadcast_send(None)  # what was said before has happened now
        with pytest.raises(kiwipy.UnroutableError):
            other.rpc_send("name", None)
        other.add_rpc_subscriber(echo, "name")
        assert hasty.rpc_send("name", "well").result(WAIT_S) == "well"


# --- connecting ---


def test_connecting_to_a_profile(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its folder, or without a word where it is; and what is said if there is none, or no broker."""
    profile = Profile.create(short_folder / ".prunus")
    with broker_process(short_folder / "b.db", profile.endpoint):
        prunus_kiwipy.connect(profile.path).close()
        prunus_kiwipy.connect(str(profile.path)).close()
        monkeypatch.chdir(short_folder)
        monkeypatch.delenv("PRUNUS_PROFILE", raising=False)
        prunus_kiwipy.connect().close()
    with pytest.raises(ProfileError, match="no profile"):
        prunus_kiwipy.connect(short_folder / "nothing")


@pytest.mark.parametrize("kind", [kiwipy.TimeoutError, ConnectionError])
def test_connecting_to_nothing(short_folder: Path, kind: type[Exception]) -> None:
    """It is an error of kiwipy's, and as well the one of the library under it; it comes when the time given is over."""
    began = time.monotonic()
    with pytest.raises(kind, match=r"no broker answers at .*/nobody; is the daemon running") as error:
        prunus_kiwipy.connect(f"ipc://{short_folder}/nobody", async_task_timeout=0.1)
    assert isinstance(error.value.__cause__, ConnectionLostError)
    assert time.monotonic() - began < CONNECT_TIMEOUT_S


def test_connecting_with_impossible_options() -> None:
    with pytest.raises(ProfileError, match=r"tcp://127\.0\.0\.1:1"):
        prunus_kiwipy.connect("tcp://127.0.0.1:1")
    with pytest.raises(ProfileError, match="is that of a RabbitMQ") as error:
        prunus_kiwipy.connect("amqp://guest:secret@localhost/")
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="prefetch_size"):
        prunus_kiwipy.connect("ipc:///nowhere", task_prefetch_size=1)
    with pytest.raises(ValueError, match="prefetch_count"):
        prunus_kiwipy.connect("ipc:///nowhere", task_prefetch_count=-1)


@pytest.mark.parametrize("option", ["connection_params", "connection_factory", "queue_expires"])
def test_connecting_with_what_is_about_rabbitmq(connect: Stack, option: str) -> None:
    """An option that is not there here says so; None is nothing."""
    with pytest.raises(TypeError, match=f"^{option} .*RabbitMQ") as error:
        prunus_kiwipy.connect(**{option: "amqp://guest:secret@localhost/"})  # type: ignore[arg-type]
    assert "secret" not in str(error.value)
    with pytest.raises(TypeError, match="a dict does not say where a broker is"):
        prunus_kiwipy.connect({"host": "localhost"})  # type: ignore[arg-type]
    assert not connect(**{option: None}).is_closed()


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("encoder", None, TypeError),
        ("decoder", None, TypeError),
        ("decoder", "yaml", TypeError),
        ("async_task_timeout", "x", TypeError),
        ("async_task_timeout", 0, ValueError),
        ("async_task_timeout", -1.0, ValueError),
        ("async_task_timeout", float("nan"), ValueError),
        ("async_task_timeout", float("inf"), ValueError),
        ("message_exchange", None, TypeError),
        ("task_prefetch_count", "x", TypeError),
    ],
)
def test_options_are_checked_where_they_are_given(option: str, value: Any, kind: type[Exception]) -> None:
    """Not when a message is sent."""
    name = option.removeprefix("task_")
    with pytest.raises(kind, match=f"{name} .*not {str(value)!r}|{name} .*not {value!r}"):
        prunus_kiwipy.connect("ipc:///nowhere", **{option: value})


def test_no_bound_on_calls(connect: Stack, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """With None, as in kiwipy, a call waits as long as it takes. To connect and to close are bounded all the same."""
    monkeypatch.setattr(PrunusCommunicator, "TASK_TIMEOUT", 0.1)
    with pytest.raises(kiwipy.TimeoutError, match="nobody"):
        prunus_kiwipy.connect(f"{broker.endpoint}/nobody", async_task_timeout=None)
    communicator = prunus_kiwipy.connect(
        broker.endpoint,
        async_task_timeout=None,
        task_prefetch_count=None,
        task_prefetch_size=None,
        testing_mode=True,
    )
    broker.stop()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sending = pool.submit(communicator.task_send, 1)
        broker.start()
        future = sending.result(WAIT_S)
    with communicator.task_queue("kiwipy.tasks").next_task(timeout=None) as task, task.processing() as outcome:
        outcome.set_result(task.body)
    assert future.result(WAIT_S) == 1
    broker.stop()
    communicator.close()  # which has a queue to empty
    assert communicator.is_closed()
    broker.start()


def test_the_bound_of_calls_has_kiwipys_name() -> None:
    """What is not said otherwise can be asked for, and used in one's own."""
    assert PrunusCommunicator.TASK_TIMEOUT == 5.0
    assert prunus_kiwipy.connect.__kwdefaults__["async_task_timeout"] == PrunusCommunicator.TASK_TIMEOUT


def test_connecting_with_what_is_no_key(short_folder: Path) -> None:
    """A file is a key file, or an error that says that it is none."""
    file = short_folder / "laptop.key"
    file.write_text("no key")
    with pytest.raises(ProfileError, match=r"laptop\.key"):
        prunus_kiwipy.connect(file)


def test_connecting_with_a_key_that_is_refused(short_folder: Path) -> None:
    """It is no matter of time, and the text says whom to ask."""
    server = Server(short_folder)
    try:
        server.key("mine")
        server.keys.revoke("mine")
        with pytest.raises(ConnectionRefusedError, match="ask its owner for a key"):
            prunus_kiwipy.connect(short_folder / "mine.key", async_task_timeout=WAIT_S)
    finally:
        server.close()


def test_testing_mode(connect: Stack) -> None:
    """What is left in the queues that were used is deleted at the end."""
    with connect(testing_mode=True) as communicator:
        communicator.task_send(1)
        communicator.task_queue("q").task_send(2, no_reply=True)
    after = connect()
    assert [list(after.task_queue(name)) for name in ("q", "kiwipy.tasks")] == [[], []]


def test_the_default_codec_is_ours() -> None:
    """No YAML that makes objects, no pickle."""
    defaults = prunus_kiwipy.connect.__kwdefaults__
    assert (defaults["encoder"], defaults["decoder"]) == (codec.encode, codec.decode)


def test_nothing_of_rabbitmq_is_needed() -> None:
    """Its client libraries are not even imported."""
    code = "import sys, prunus.compat.kiwipy; print({'aio_pika', 'aiormq', 'pamqp', 'pytray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert done.stdout == "set()\n"
