"""What a client remembers and says again: no event loop, no broker."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest

from prunus.errors import (
    BusyError,
    Failure,
    IndeterminateError,
    KeyRefusedError,
    MessageTooLargeError,
    NotDeliveredError,
    ProtocolError,
    PrunusError,
    UnroutableError,
)
from prunus.messaging import client
from prunus.messaging.client import (
    HEARTBEAT_S,
    PATIENCE_S,
    REFUSED_PAUSE_S,
    SILENCE_S,
    WELCOME_S,
    Answered,
    ClientCore,
    Ended,
    Event,
    Failed,
    NameTaken,
    Reconnect,
    TaskLost,
    TurnedAway,
    Up,
)
from prunus.messaging.inventory import QueueLimits
from prunus.messaging.messages import (
    LEASE_S,
    MAGIC,
    MAX_FRAME_BYTES,
    MAX_HELD_BYTES,
    MAX_NAME_CHARS,
    PROTOCOL,
    Alive,
    BlobGet,
    BlobPut,
    BroadcastSend,
    BroadcastSubscribe,
    BroadcastUnsubscribe,
    BrokerMessage,
    Call,
    CallDone,
    ClientMessage,
    Done,
    Goodbye,
    Heartbeat,
    Hello,
    HelloNeeded,
    Peer,
    QueueConfigure,
    Refused,
    Request,
    ResourceConfigure,
    ResultSeen,
    RpcAnswer,
    RpcDelivery,
    RpcDone,
    RpcRequest,
    RpcSubscribe,
    RpcUnsubscribe,
    StatisticsAsk,
    TaskAck,
    TaskDelivery,
    TaskEdit,
    TaskList,
    TaskNack,
    TaskResult,
    TaskSend,
    TaskStored,
    TaskSubscribe,
    TaskUnsubscribe,
    Unwelcome,
    Violation,
    Welcome,
    bytes_in_hello,
    decode_from_client,
    encode,
    outcome_of,
)


class Line:
    """A client and what passes between it and a broker."""

    def __init__(self) -> None:
        self.core = ClientCore("me", Peer())
        self.now = 100.0
        self.core.connect(self.now)

    def said(self) -> list[ClientMessage]:
        return [decode_from_client(frame) for frame in self.core.take()]

    def hear(self, *messages: BrokerMessage) -> list[Event]:
        return [event for message in messages for event in self.core.on_frame(self.now, encode(message))]

    def wait(self, seconds: float) -> list[Event]:
        self.now += seconds
        return self.core.tick(self.now)

    def up(self, epoch: int = 1) -> list[Event]:
        return self.hear(Welcome(broker_epoch=epoch))

    def reconnect(self, epoch: int = 1) -> Hello:
        """What it says first on a new connection; the broker has greeted it then."""
        self.core.connect(self.now)
        [hello] = self.said()
        assert isinstance(hello, Hello)
        self.up(epoch)
        return hello

    def send(self, body: bytes = b"", want_result: bool = False, key: str | None = None) -> int:
        return self.core.ask(
            self.now, lambda id: TaskSend(id=id, task=f"t{id}", body=body, want_result=want_result, key=key)
        )

    def ask(self, timeout_s: float = 10.0) -> int:
        return self.core.ask(
            self.now, lambda id: RpcRequest(id=id, recipient="name", body=b"", timeout_s=timeout_s), timeout_s
        )


@pytest.fixture
def line() -> Line:
    """A client that is connected."""
    line = Line()
    line.up()
    line.said()
    return line


def delivery(epoch: int, task: str = "t") -> TaskDelivery:
    return TaskDelivery(task=task, queue="q", key=None, body=b"", epoch=epoch, attempt=1)


# --- the connection ---


def test_hello_comes_first() -> None:
    """Nothing is said before the broker knows who speaks; then everything is, in order."""
    line = Line()
    line.send(), line.ask()
    [hello] = line.said()
    assert hello == Hello(session="me", peer=Peer(), seen=1, turn=1)
    assert line.up() == [Up(again=False)]
    assert [type(message) for message in line.said()] == [TaskSend, RpcRequest]


def test_all_is_stated_again(line: Line) -> None:
    """`Hello` on a new connection has every subscription and every task in hand."""
    line.core.ask(line.now, lambda id: TaskSubscribe(id=id, queue="q", credit=3))
    line.core.ask(line.now, lambda id: TaskSubscribe(id=id, queue="gone", credit=3))
    line.core.ask(line.now, lambda id: TaskUnsubscribe(id=id, queue="gone"))
    line.core.ask(line.now, lambda id: RpcSubscribe(id=id, identifier="name"))
    line.core.ask(line.now, lambda id: BroadcastSubscribe(id=id, subscription=7, sender="s*"))
    line.core.ask(line.now, lambda id: TaskSubscribe(id=id, queue="q", credit=2, subject="a.*"))
    line.core.ask(line.now, lambda id: TaskSubscribe(id=id, queue="q", credit=2, subject="gone"))
    line.core.ask(line.now, lambda id: TaskUnsubscribe(id=id, queue="q", subject="gone"))
    line.hear(*(Done(id=number) for number in range(1, 9)), delivery(5))
    hello = line.reconnect()
    assert hello.queues == (("q", 3),)
    assert hello.filtered == (("q", "a.*", 2),)
    assert hello.identifiers == (("name", 1),)
    assert hello.patterns == ((7, "s*", None),)
    assert hello.held == (("t", 5),)
    assert hello.seen == 9
    assert line.said() == []
    line.core.ask(line.now, lambda id: RpcUnsubscribe(id=id, identifier="name"))
    assert line.reconnect().identifiers == ()


def test_what_was_not_answered_is_said_again(line: Line) -> None:
    """In order, and only that; the answer ends it."""
    first, second, third = line.send(b"1"), line.send(b"2"), line.send(b"3")
    line.said()
    [answered] = line.hear(TaskStored(id=second, task="t2", stored=True))
    assert isinstance(answered, Answered)
    assert (answered.id, answered.message) == (second, TaskStored(id=second, task="t2", stored=True))
    assert isinstance(answered.request, TaskSend)
    assert line.reconnect().seen == first
    assert [message.id for message in line.said() if isinstance(message, TaskSend)] == [first, third]
    assert line.hear(TaskStored(id=second, task="t2", stored=True)) == []


def test_a_broker_that_does_not_know_us(line: Line) -> None:
    """`HelloNeeded` (it restarted, or forgot us) is answered by `Hello` on the same connection, once."""
    number = line.send()
    line.said()
    line.hear(HelloNeeded(), HelloNeeded())
    [hello] = line.said()
    assert isinstance(hello, Hello)
    assert line.hear(delivery(5)) == []
    assert line.up(2) == [Up(again=True)]
    assert [message.id for message in line.said() if isinstance(message, TaskSend)] == [number]


def test_a_session_has_a_secret() -> None:
    """Each `Hello` says it, so that nobody else can speak for this session."""
    core = ClientCore("me", Peer(), secret="s3cret")
    for _ in range(2):
        core.connect(100.0)
        [hello] = [decode_from_client(frame) for frame in core.take()]
        assert isinstance(hello, Hello)
        assert hello.secret == "s3cret"


def test_the_round_trip_is_measured(line: Line) -> None:
    """From a heartbeat to its answer; said with the next one. What answers nothing measures nothing."""
    assert line.wait(HEARTBEAT_S) == []
    assert line.said() == [Heartbeat(seen=1, round_trip_s=0.0)]
    line.now += 0.25
    line.hear(Alive())
    line.now += 1.0
    line.hear(Alive())
    assert line.core.round_trip_s == 0.25
    line.wait(HEARTBEAT_S)
    assert line.said() == [Heartbeat(seen=1, round_trip_s=0.25)]
    line.reconnect()
    line.now += 1.0
    line.hear(Alive())
    assert line.core.round_trip_s == 0.25


def test_who_stood_still_says_nothing_under_old_epochs(line: Line) -> None:
    """After a gap longer than a lease nothing is said on the old connection, not even what was posted meanwhile; first
    comes `Hello`, then what was lost, then the rest."""
    line.hear(delivery(5))
    line.core.answer("c", 1, b"late")
    line.now += LEASE_S + 1
    [reconnect] = line.core.wake(line.now)
    assert isinstance(reconnect, Reconnect)
    line.core.ask(line.now, lambda id: TaskAck(id=id, task="t", epoch=5))
    assert line.hear(delivery(6, "other")) == [], "it was said to who we were"
    assert line.said() == []
    line.core.connect(line.now)
    [hello] = line.said()
    assert isinstance(hello, Hello)
    assert hello.held == (("t", 5),)
    assert line.hear(Welcome(broker_epoch=1, lost=("t",))) == [TaskLost("t"), Up(again=True)]
    assert [type(message) for message in line.said()] == [TaskAck]
    assert line.core.held == {}


def test_a_short_gap_is_none(line: Line) -> None:
    """Within a lease nothing was taken away: the connection stays."""
    for _ in range(3):
        line.now += LEASE_S
        assert line.core.wake(line.now) == []
        line.hear(Alive())
        assert line.core.tick(line.now) == []
    assert line.core.up
    assert [type(message) for message in line.said()] == [Heartbeat] * 3


def test_a_lease_is_counted_from_the_last_sign_of_life(line: Line) -> None:
    """What was heard since then, and that somebody looked at the clock, proves nothing to the broker."""
    line.now += HEARTBEAT_S - 0.1
    line.hear(delivery(5))
    assert line.core.wake(line.now) == []
    line.now += LEASE_S - HEARTBEAT_S + 0.2
    assert [type(event) for event in line.core.wake(line.now)] == [Reconnect]
    assert line.hear(delivery(6, "other")) == [], "it was said to who we were"


def test_the_broker_says_how_long_its_lease_is(line: Line) -> None:
    """With a short one signs of life come more often, and who was silent for longer than it believes nothing."""
    line.core.connect(line.now)
    line.hear(Welcome(broker_epoch=1, lease_s=3.0))
    line.said()
    assert line.core.due() == line.now + 1.0
    line.wait(1.0)
    assert line.said() == [Heartbeat(seen=1)]
    line.now += 3.1
    assert [type(event) for event in line.core.wake(line.now)] == [Reconnect]


def test_heartbeats(line: Line) -> None:
    """Every `HEARTBEAT_S`, with what was seen; silence of the broker makes a new connection."""
    assert line.core.due() == line.now + HEARTBEAT_S
    assert line.wait(HEARTBEAT_S) == []
    assert line.said() == [Heartbeat(seen=1)]
    line.hear(Alive())
    for _ in range(int(SILENCE_S / HEARTBEAT_S)):
        assert line.wait(HEARTBEAT_S) == []
    [reconnect] = line.wait(HEARTBEAT_S)
    assert isinstance(reconnect, Reconnect)


def test_no_welcome() -> None:
    """A `Hello` without a `Welcome` makes a new connection."""
    line = Line()
    assert line.core.due() == line.now + WELCOME_S
    assert line.wait(WELCOME_S) == []
    [reconnect] = line.wait(0.1)
    assert isinstance(reconnect, Reconnect)


def test_nonsense_from_the_broker(line: Line) -> None:
    """Bytes that are no message raise; a complaint of the broker is passed on."""
    with pytest.raises(ProtocolError):
        line.core.on_frame(line.now, b"nonsense")
    assert line.hear(Violation(reason="what?")) == [Violation(reason="what?")]


# --- tasks ---


def test_an_echo_is_ignored(line: Line) -> None:
    """A delivery with an epoch not above the highest one seen for that task is none."""
    assert line.hear(delivery(5)) == [delivery(5)]
    assert line.hear(delivery(5), delivery(4)) == []
    line.core.held["old"] = 7  # held for so long that ten thousand others came since
    assert line.hear(delivery(7, "old")) == []
    assert line.hear(delivery(6)) == [delivery(6)]
    assert line.core.held == {"t": 6, "old": 7}


@pytest.mark.parametrize("kind", [TaskAck, TaskNack])
def test_in_hand_until_confirmed(line: Line, kind: type[TaskAck] | type[TaskNack]) -> None:
    """A task that was settled is stated as held until the broker said that it knows."""
    line.hear(delivery(5))
    number = line.core.ask(line.now, lambda id: kind(id=id, task="t", epoch=5))
    assert line.reconnect().held == (("t", 5),)
    line.hear(Done(id=number))
    assert line.reconnect().held == ()


def test_a_call_that_acknowledges(line: Line) -> None:
    """Its tasks leave the hand when it is answered, not when it is refused."""
    line.hear(delivery(5))
    refused = Refused(id=1, failure=outcome_of(BusyError("no")))
    for answer, held in ((refused, {"t": 5}), (CallDone(id=2, answers=()), {})):
        line.core.ask(line.now, lambda id: Call(id=id, requests=(), acks=(("t", 5),)))
        line.hear(answer)
        assert line.core.held == held


# --- who is refused ---


BUSY, REVOKED = BusyError("too many"), KeyRefusedError("tcp://x:1", "does not know this key")


def unwelcome(error: PrunusError) -> Unwelcome:
    return Unwelcome(failure=Failure.of(error))


def ends(events: list[Event]) -> PrunusError:
    [ended] = events
    assert isinstance(ended, Ended)
    return ended.error


@pytest.mark.parametrize("error", [BUSY, REVOKED, ProtocolError("not yours")])
def test_who_is_refused_at_first_ends(error: PrunusError) -> None:
    """Whatever the reason is: whoever connects should know it at once."""
    found = ends(Line().hear(unwelcome(error)))
    assert (type(found), str(found)) == (type(error), str(error))


@pytest.mark.parametrize("error", [REVOKED, ProtocolError("not yours")])
def test_who_is_refused_for_good_ends(line: Line, error: PrunusError) -> None:
    """Also if the broker knew it before; only what passes is waited for."""
    line.core.connect(line.now)
    assert type(ends(line.hear(unwelcome(error)))) is type(error)


def test_a_bound_of_the_broker_is_waited_for(line: Line) -> None:
    """`Hello` is said again on the same connection, more and more slowly; what is asked meanwhile is not lost."""
    line.core.connect(line.now)
    line.said()
    assert [type(event) for event in line.hear(unwelcome(BUSY))] == [TurnedAway]
    line.send()
    for pause_s in (1.0, 2.0, 4.0, 8.0, 10.0, 10.0):
        assert line.core.due() == line.now + pause_s
        assert line.wait(pause_s - 0.1) == []
        assert line.said() == []
        assert line.wait(0.1) == []
        assert [type(message) for message in line.said()] == [Hello]
        assert line.hear(unwelcome(BUSY)) == [], "it is told once"
    line.wait(10.0)
    line.said()
    line.up()
    assert [type(message) for message in line.said()] == [TaskSend]
    line.core.connect(line.now)
    assert [type(event) for event in line.hear(unwelcome(BUSY))] == [TurnedAway]
    assert line.core.due() == line.now + REFUSED_PAUSE_S[0], "it was welcome in between"


def test_a_hello_that_is_said_again_needs_an_answer(line: Line) -> None:
    """Without one the connection is made anew, as for the first."""
    line.core.connect(line.now)
    line.hear(unwelcome(BUSY))
    assert line.wait(REFUSED_PAUSE_S[0]) == []
    assert [type(event) for event in line.wait(WELCOME_S + 0.1)] == [Reconnect]


def test_requests_of_who_is_refused_end_in_time(line: Line) -> None:
    """What was never said with the reason for that, what was with `IndeterminateError`."""
    said = line.send()
    line.core.connect(line.now)
    line.hear(unwelcome(BUSY))
    unsaid = line.send()
    events = []
    while not events:
        events = line.wait(1.0)
        line.hear(unwelcome(BUSY))
    assert [(event.id, type(event.error)) for event in events if isinstance(event, Failed)] == [
        (said, IndeterminateError),
        (unsaid, BusyError),
    ]


def test_another_language_is_the_end(line: Line) -> None:
    """In place of a welcome; so is an answer that says that nobody understands us."""
    for frame in (bytes((MAGIC, PROTOCOL + 1)), b"HTTP", encode(Violation(reason="what?"))):
        for one in (Line(), line):
            one.core.connect(one.now)
            assert isinstance(ends(one.core.on_frame(one.now, frame)), ProtocolError)


def test_only_the_answer_to_a_hello_counts(line: Line) -> None:
    """A refusal that is about something else, from before this program stood still, ends nothing."""
    line.now += LEASE_S + 1
    [reconnect] = line.core.wake(line.now)
    assert isinstance(reconnect, Reconnect)
    assert line.hear(Violation(reason="out of place"), unwelcome(REVOKED)) == []
    assert isinstance(line.reconnect(), Hello)
    assert line.core.up
    assert line.hear(unwelcome(REVOKED)) == []


def test_lost_tasks_and_names(line: Line) -> None:
    """What the broker gave to others while we were away is told, and no longer stated."""
    line.hear(delivery(5))
    line.core.ask(line.now, lambda id: RpcSubscribe(id=id, identifier="name"))
    line.hear(Done(id=1))
    line.core.connect(line.now)
    assert line.hear(Welcome(broker_epoch=1, lost=("t", "x"), taken=("name", "y"))) == [
        TaskLost("t"),
        NameTaken("name"),
        Up(again=True),
    ]
    hello = line.reconnect()
    assert (hello.held, hello.identifiers) == ((), ())


def test_results(line: Line) -> None:
    """A result is waited for from the moment of sending, taken once, and confirmed."""
    number = line.send(want_result=True)
    assert line.reconnect().expected == ("t1",)
    stored, result = TaskStored(id=number, task="t1", stored=True), TaskResult(task="t1", outcome=b"42")
    line.said()
    assert line.hear(result) == [], "it was faster than the answer to its sending"
    [answered, told] = line.hear(stored)
    assert isinstance(answered, Answered)
    assert (answered.message, told) == (stored, result)
    assert line.said() == [ResultSeen(task="t1")]
    assert line.hear(result) == []
    assert line.reconnect().awaited == ()


def test_the_result_of_an_equal(line: Line) -> None:
    """If a pending task with the same key took the place of ours, its result is waited for."""
    line.hear(TaskStored(id=line.send(want_result=True), task="other", stored=False))
    assert line.reconnect().awaited == ("other",)
    assert line.hear(TaskResult(task="other", outcome=b"42")) == [TaskResult(task="other", outcome=b"42")]


def test_the_results_of_sends_that_joined(line: Line) -> None:
    """A result may come before it is known who waits for it: each send gets it, and the broker keeps it as long."""
    first, second = (line.send(want_result=True, key="k") for _ in range(2))
    result = TaskResult(task="other", outcome=b"42")
    line.said()
    assert line.hear(result) == []
    assert line.hear(TaskStored(id=first, task="other", stored=False))[1:] == [result]
    assert line.said() == [], "the second may have joined it too"
    assert line.hear(TaskStored(id=second, task="other", stored=False))[1:] == [result]
    assert line.said() == [ResultSeen(task="other")]
    assert line.reconnect().awaited == ()


def test_a_result_that_nobody_waits_for(line: Line) -> None:
    """The broker may forget it."""
    line.said()
    assert line.hear(TaskResult(task="other", outcome=b"42")) == []
    assert line.said() == [ResultSeen(task="other")]


def test_early_results_have_a_bound(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest are kept, and no longer than the sends that were there when they came."""
    monkeypatch.setattr(client, "MAX_REMEMBERED", 2)
    first = line.send(want_result=True, key="k")
    line.said()
    for number in range(3):
        line.hear(TaskResult(task=f"r{number}", outcome=b""))
    assert line.said() == [ResultSeen(task="r0")]
    later = line.send(want_result=True, key="k")
    line.hear(TaskStored(id=first, task="t1", stored=True))
    assert [one for one in line.said() if isinstance(one, ResultSeen)] == [
        ResultSeen(task="r1"),
        ResultSeen(task="r2"),
    ]
    assert line.core._early_bytes == 0
    assert later in line.core._unanswered


# --- questions ---


def test_a_question_that_comes_twice(line: Line) -> None:
    """Its handler runs once; when it is answered, the same answer is said again."""
    question = RpcDelivery(caller="c", id=3, identifier="name", body=b"?")
    assert line.hear(question) == [question]
    assert line.hear(question) == []
    assert line.said() == []
    line.core.answer("c", 3, b"!")
    assert line.hear(question) == []
    assert line.said() == [RpcAnswer(caller="c", id=3, outcome=b"!")] * 2


def test_an_answer_that_is_too_large(line: Line) -> None:
    """It becomes the error that says so."""
    line.core.answer("c", 3, bytes(MAX_FRAME_BYTES))
    [answer] = line.said()
    assert isinstance(answer, RpcAnswer)
    assert isinstance(answer.outcome, client.Failure)


def test_an_answer_while_disconnected(line: Line) -> None:
    """It waits for the question to be said again."""
    question = RpcDelivery(caller="c", id=3, identifier="name", body=b"?")
    line.hear(question)
    line.core.connect(line.now)
    line.said()
    line.core.answer("c", 3, b"!")
    line.up()
    assert line.said() == []
    line.hear(question)
    assert line.said() == [RpcAnswer(caller="c", id=3, outcome=b"!")]


def test_a_question_said_to_another_broker(line: Line) -> None:
    """It names the broker epoch under which it was said first."""
    line.ask()
    [first] = line.said()
    line.reconnect(2)
    [second] = line.said()
    line.reconnect(3)
    [third] = line.said()
    assert [message.since for message in (first, second, third) if isinstance(message, RpcRequest)] == [0, 1, 1]


def test_the_end_of_a_question(line: Line) -> None:
    """At its deadline nobody knows; a late answer is ignored. One that was never said had no effect."""
    number = line.ask(timeout_s=1.0)
    assert line.core.due() == line.now + 1.0
    [failed] = line.wait(1.0)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, IndeterminateError)
    assert line.hear(RpcDone(id=number, outcome=b"late")) == []
    line.core.connect(line.now)
    line.ask(timeout_s=1.0)
    [failed] = line.wait(1.0)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, NotDeliveredError)


def test_refused(line: Line) -> None:
    """The error of a refusal is the one that the broker named; a refused name is not stated."""
    number = line.core.ask(line.now, lambda id: RpcSubscribe(id=id, identifier="name"))
    [failed] = line.hear(Refused(id=number, failure=outcome_of(UnroutableError("x"))))
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, UnroutableError)
    assert line.reconnect().identifiers == ()


# --- bounds ---


def test_patience_ends(line: Line) -> None:
    """Without a broker a request ends after `PATIENCE_S`; an acknowledgement never does."""
    line.hear(delivery(5))
    said = line.send()
    line.core.ask(line.now, lambda id: TaskAck(id=id, task="t", epoch=5))
    line.core.connect(line.now)
    unsaid = line.send()
    line.wait(PATIENCE_S / 2)
    line.core.connect(line.now)
    events = [event for event in line.wait(PATIENCE_S / 2 + 1) if isinstance(event, Failed)]
    assert [(event.id, type(event.error)) for event in events] == [
        (said, IndeterminateError),
        (unsaid, NotDeliveredError),
    ]
    line.reconnect()
    assert [type(message) for message in line.said()] == [TaskAck]


def test_what_was_given_up_is_said_in_words() -> None:
    """What was asked for, which broker did not answer and for how long, whether it had an effect, and what to do."""
    core = ClientCore("me", Peer(), endpoint="ipc:///run/s")
    core.connect(100.0)
    core.on_frame(100.0, encode(Welcome(broker_epoch=1)))
    core.ask(100.0, lambda id: TaskSend(id=id, task="t1", body=b"", queue="q"))
    core.ask(100.0, lambda id: RpcRequest(id=id, recipient="name", body=b"", timeout_s=3.0), 3.0)
    [said] = core.tick(103.0)
    core.connect(104.0)
    core.ask(104.0, lambda id: TaskSend(id=id, task="t2", body=b"", queue="q"))
    core.ask(104.0, lambda id: StatisticsAsk(id=id))
    errors = [event.error for event in (said, *core.tick(165.0)) if isinstance(event, Failed)]
    assert [str(error) for error in errors] == [
        "asking 'name' may or may not have happened: no answer came within 3 s; find out before you do it again",
        "sending the task t1 to the queue 'q' may or may not have happened: the broker at ipc:///run/s did not answer "
        "for 61 s; find out before you do it again",
        "sending the task t2 to the queue 'q' was not done: the broker at ipc:///run/s did not answer for 61 s; do it "
        "again when there is a broker: is the daemon running? (`prunus daemon status`)",
        "asking for the statistics was not done: the broker at ipc:///run/s did not answer for 61 s; do it "
        "again when there is a broker: is the daemon running? (`prunus daemon status`)",
    ]
    for error in errors:
        assert str(outcome_of(error).to_exception()) == str(error)
    assert errors[0].facts()["key"] == "name"


REQUESTS: list[Request] = [
    TaskSend(id=1, task="t", body=b""),
    TaskAck(id=1, task="t", epoch=1),
    TaskNack(id=1, task="t", epoch=1, reason=""),
    TaskSubscribe(id=1, queue="q", credit=1),
    TaskUnsubscribe(id=1, queue="q"),
    RpcRequest(id=1, recipient="name", body=b"", timeout_s=1.0),
    RpcSubscribe(id=1, identifier="name"),
    RpcUnsubscribe(id=1, identifier="name"),
    BroadcastSend(id=1, body=b"", sender=None, subject="news"),
    BroadcastSubscribe(id=1, subscription=1, sender=None, subject=None),
    BroadcastUnsubscribe(id=1, subscription=1),
    Call(id=1, requests=(), acks=()),
    TaskList(id=1),
    TaskEdit(id=1, action="requeue", tasks=("t",)),
    QueueConfigure(id=1, queue="q", limits=QueueLimits()),
    ResourceConfigure(id=1, resource="gpu", capacity=1),
    StatisticsAsk(id=1),
    BlobPut(id=1, digest="0" * 64, offset=0, total=1, chunk=b"x"),
    BlobGet(id=1, digest="0" * 64, offset=0, limit=1),
    Goodbye(id=1),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: type(one).__name__)
def test_each_request_has_words(request_: Request) -> None:
    """No class of ours, but what it is about."""
    words = client._words_for(request_)
    assert type(request_).__name__ not in words
    assert words[0].islower()


def test_all_requests_have_words() -> None:
    """None is forgotten above."""
    assert {type(one) for one in REQUESTS} == set(get_args(Request))


@pytest.mark.parametrize(
    "subscribe",
    [
        lambda id: TaskSubscribe(id=id, queue="q", credit=2),
        lambda id: RpcSubscribe(id=id, identifier="name"),
        lambda id: BroadcastSubscribe(id=id, subscription=1, sender=None, subject=None),
    ],
)
def test_what_was_given_up_takes_no_other_subscription_away(line: Line, subscribe: Callable[[int], Request]) -> None:
    """Of two about one name the later one counts: what is true ends with its end, not when patience does."""
    line.core.ask(line.now, subscribe)
    line.core.connect(line.now)
    events = line.wait(PATIENCE_S + 1)
    assert [type(event.error) for event in events if isinstance(event, Failed)] == [IndeterminateError]
    line.said()
    hello = line.reconnect()
    assert (*hello.queues, *hello.identifiers, *hello.patterns) != ()


def test_who_may_have_done_it_already(line: Line) -> None:
    """An answer tells whether the request was said on an earlier connection too; not if a broker said there that it
    does not know us, and so did nothing."""
    line.hear(delivery(5), delivery(6, "u"), delivery(7, "v"))
    first = line.core.ask(line.now, lambda id: TaskAck(id=id, task="t", epoch=5))
    line.reconnect()
    second = line.core.ask(line.now, lambda id: TaskAck(id=id, task="u", epoch=6))
    line.hear(HelloNeeded(), Welcome(broker_epoch=1))
    third = line.core.ask(line.now, lambda id: TaskAck(id=id, task="v", epoch=7))
    events = line.hear(*(Done(id=id, stale=True) for id in (first, second, third)))
    assert [event.unsure for event in events if isinstance(event, Answered)] == [True, False, False]


def test_requests_have_a_bound(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many, or too many bytes, are refused before they are said; what is given back, or is true already, is not."""
    monkeypatch.setattr(client, "MAX_UNANSWERED", 1)
    line.send()
    with pytest.raises(BusyError):
        line.send()
    line.core.ask(line.now, lambda id: TaskAck(id=id, task="t", epoch=5))
    line.core.ask(line.now, lambda id: TaskSubscribe(id=id, queue="q", credit=1))
    line.core.ask(line.now, lambda id: TaskUnsubscribe(id=id, queue="q"))
    line.core.ask(line.now, lambda id: RpcSubscribe(id=id, identifier="i"))
    line.core.ask(line.now, lambda id: RpcUnsubscribe(id=id, identifier="i"))
    line.core.ask(line.now, lambda id: BroadcastSubscribe(id=id, subscription=1))
    line.core.ask(line.now, lambda id: BroadcastUnsubscribe(id=id, subscription=1))
    line.core.ask(line.now, lambda id: Goodbye(id=id))
    monkeypatch.setattr(client, "MAX_UNANSWERED", 10)
    monkeypatch.setattr(client, "MAX_UNANSWERED_BYTES", 1000)
    with pytest.raises(BusyError):
        line.send(bytes(1000))
    with pytest.raises(MessageTooLargeError):
        line.send(bytes(MAX_FRAME_BYTES))
    assert [type(message) for message in line.said()] == [
        TaskSend, TaskAck, TaskSubscribe, TaskUnsubscribe, RpcSubscribe, RpcUnsubscribe, BroadcastSubscribe,
        BroadcastUnsubscribe, Goodbye,
    ]  # fmt: skip


def test_what_a_hello_says_has_a_bound(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subscriptions that could not be said again after a reconnection are refused; what ends makes room."""
    monkeypatch.setattr(client, "MAX_STATED_BYTES", 500)

    def subscribe(number: int) -> int:
        return line.core.ask(line.now, lambda id: BroadcastSubscribe(id=id, subscription=number, subject="s" * 200))

    subscribe(1)
    second = subscribe(2)
    with pytest.raises(BusyError, match="2 subscriptions"):
        subscribe(3)
    with pytest.raises(BusyError, match="2 subscriptions"):
        line.core.ask(line.now, lambda id: RpcSubscribe(id=id, identifier="i" * 200))
    line.send()
    line.core.ask(line.now, lambda id: BroadcastUnsubscribe(id=id, subscription=1))
    line.core.ask(line.now, lambda id: TaskSubscribe(id=id, queue="q" * 200, credit=1))
    line.core.ask(line.now, lambda id: TaskSubscribe(id=id, queue="q" * 200, credit=2))
    with pytest.raises(BusyError, match="2 subscriptions"):
        line.core.ask(line.now, lambda id: TaskSubscribe(id=id, queue="r" * 200, credit=1))
    line.hear(Refused(id=second, failure=outcome_of(BusyError("no"))))
    subscribe(3)


@pytest.mark.parametrize(
    ("bound", "subscribe"),
    [
        ("MAX_TASK_SUBSCRIPTIONS", lambda number, id: TaskSubscribe(id=id, queue=f"q{number}", credit=1)),
        ("MAX_IDENTIFIERS", lambda number, id: RpcSubscribe(id=id, identifier=f"i{number}")),
        ("MAX_PATTERNS", lambda number, id: BroadcastSubscribe(id=id, subscription=number)),
    ],
)
def test_the_broker_is_not_asked_for_more_than_it_gives(
    line: Line, monkeypatch: pytest.MonkeyPatch, bound: str, subscribe: Callable[[int, int], Request]
) -> None:
    """Else one subscription too many, asked for while the connection is away, would have every `Hello` refused."""
    monkeypatch.setattr(client, bound, 2)
    for number in (1, 2, 1):
        line.core.ask(line.now, lambda id, number=number: subscribe(number, id))
    with pytest.raises(BusyError, match=r"this session has 2 .* already; cancel some"):
        line.core.ask(line.now, lambda id: subscribe(3, id))
    hello = line.reconnect()
    assert len(hello.queues) + len(hello.identifiers) + len(hello.patterns) == 2


def test_the_largest_hello_fits_into_a_frame(line: Line) -> None:
    """With as much as a session may have of everything, and the longest names."""
    name = "\U0001f41b" * (MAX_NAME_CHARS - 8)
    held = math.ceil(MAX_HELD_BYTES / bytes_in_hello(f"{name}{0:08}"))
    line.hear(*(delivery(2**63 - 1, f"{name}{number:08}") for number in range(held)))
    with contextlib.suppress(BusyError):
        for number in range(held + 1):
            line.hear(TaskStored(id=line.send(want_result=True, key="k"), task=f"{name}{number:08}", stored=False))
    with contextlib.suppress(BusyError):
        for number in range(10_000):
            line.core.ask(
                line.now,
                lambda id, n=f"{name}{number:08}": TaskSubscribe(id=id, queue=n, subject=n, credit=1, shared=True),
            )
    line.said()
    hello = line.reconnect()
    assert len(hello.held) == len(hello.awaited) == held
    assert len(hello.filtered) == len(hello.shared) > 500
    assert len(encode(hello)) > MAX_FRAME_BYTES * 0.9


@pytest.mark.parametrize("wrong", [{"priority": True}, {"max_attempts": 2**70}, {"queue": None}, {"expires_at": 1e12}])
def test_what_the_broker_would_not_understand_is_not_said(line: Line, wrong: dict[str, Any]) -> None:
    """A `ValueError` for who asks; nothing of it is kept, and the connection lives on."""
    with pytest.raises(ValueError, match="can't be asked"):
        line.core.ask(line.now, lambda id: TaskSend(**{"id": id, "task": "t", "body": b"", **wrong}))
    assert line.said() == []
    assert line.core.is_idle


def test_awaited_results_have_a_bound(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused before it is sent; without a result it goes."""
    monkeypatch.setattr(client, "MAX_AWAITED", 1)
    line.hear(TaskStored(id=line.send(want_result=True), task="t1", stored=True))
    with pytest.raises(BusyError, match="results"):
        line.send(want_result=True)
    line.send()
    line.hear(TaskResult(task="t1", outcome=None))
    line.send(want_result=True)


def test_memory_has_a_bound(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest epochs are remembered for the latest tasks only, and for those in hand."""
    monkeypatch.setattr(client, "MAX_REMEMBERED", 2)
    line.hear(*(delivery(5, f"t{number}") for number in range(3)))
    line.core.held.clear()
    assert line.hear(delivery(5, "t2")) == []
    assert line.hear(delivery(5, "t0")) != []


@pytest.mark.parametrize(("bound", "value"), [("MAX_REMEMBERED", 2), ("MAX_REMEMBERED_BYTES", 100)])
def test_given_answers_have_a_bound(line: Line, monkeypatch: pytest.MonkeyPatch, bound: str, value: int) -> None:
    """The oldest are forgotten first, by number and by bytes; a question without an answer never is."""
    monkeypatch.setattr(client, bound, value)
    questions = [RpcDelivery(caller="c", id=number, identifier="name", body=b"?") for number in range(4)]
    for question in questions:
        line.hear(question)
    for question in questions[1:]:
        line.core.answer("c", question.id, bytes(40))
    line.said()
    assert line.hear(questions[0]) == [], "it is being answered"
    assert line.hear(questions[3]) == []
    assert len(line.said()) == 1
    assert line.hear(questions[1]) == [questions[1]], "its answer was forgotten"
