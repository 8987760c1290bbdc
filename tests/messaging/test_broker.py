"""The broker's core, one rule at a time: what goes in, what comes out, no event loop."""

from __future__ import annotations

import pytest

from prunus.errors import (
    BusyError,
    DuplicateSubscriberError,
    Failure,
    IndeterminateError,
    StoreFullError,
    UnroutableError,
)
from prunus.messaging import broker
from prunus.messaging.broker import (
    BACK_OFF_S,
    LEASE_S,
    MAX_BACK_OFF_S,
    BrokerCore,
    DeleteTask,
    DropAnswers,
    Effect,
    ForgetSession,
    HoldTask,
    ReleaseTask,
    SaveAnswer,
    SaveSession,
    Send,
    SettleTask,
    StoredState,
    StoredTask,
    StoreTask,
    Task,
    matcher,
)
from prunus.messaging.messages import (
    Alive,
    BroadcastDelivery,
    BroadcastSend,
    BroadcastSubscribe,
    BroadcastUnsubscribe,
    BrokerMessage,
    Call,
    ClientMessage,
    Done,
    Heartbeat,
    Hello,
    HelloNeeded,
    Peer,
    Refused,
    ResultSeen,
    RpcAnswer,
    RpcDelivery,
    RpcDone,
    RpcRequest,
    RpcSubscribe,
    TaskAck,
    TaskDelivery,
    TaskNack,
    TaskResult,
    TaskSend,
    TaskStored,
    TaskSubscribe,
    Violation,
    Welcome,
    decode_from_broker,
)

EPOCH = 7


class Bench:
    """A core, the clock, and who said what to whom."""

    def __init__(self, state: StoredState | None = None, epoch: int = EPOCH) -> None:
        self.core = BrokerCore(epoch, 0.0, state)
        self.now = 0.0
        self.stored: list[Effect] = []

    def take(self, effects: list[Effect]) -> list[tuple[str, BrokerMessage]]:
        sends = []
        for effect in effects:
            if isinstance(effect, Send):
                message = effect.message
                sends.append((effect.session, decode_from_broker(message) if isinstance(message, bytes) else message))
            else:
                self.stored.append(effect)
        return sends

    def say(self, session: str, message: ClientMessage) -> list[tuple[str, BrokerMessage]]:
        return self.take(self.core.handle(self.now, session, message))

    def hello(self, session: str, **stated: object) -> list[tuple[str, BrokerMessage]]:
        return self.say(session, Hello(session=session, peer=Peer("h", 1, 2), **stated))  # type: ignore[arg-type]

    def wait(self, seconds: float) -> list[tuple[str, BrokerMessage]]:
        self.now += seconds
        return self.take(self.core.tick(self.now))

    def deliveries(self, sends: list[tuple[str, BrokerMessage]]) -> list[tuple[str, TaskDelivery]]:
        return [(session, message) for session, message in sends if isinstance(message, TaskDelivery)]


@pytest.fixture
def bench() -> Bench:
    """A broker with three peers: ``ann`` sends, ``bob`` takes two tasks of the default queue, ``cat`` does nothing."""
    bench = Bench()
    bench.hello("ann")
    bench.hello("bob", queues=(("default", 2),))
    bench.hello("cat")
    bench.stored.clear()
    return bench


def send(number: int, **fields: object) -> TaskSend:
    return TaskSend(id=number, task=f"t{number}", body=b"%d" % number, **fields)  # type: ignore[arg-type]


# --- sessions ---


def test_only_those_who_said_hello_are_served() -> None:
    """A message of an unknown session is answered with `HelloNeeded` and does nothing."""
    bench = Bench()
    assert bench.say("ann", send(1)) == [("ann", HelloNeeded())]
    assert bench.stored == []
    assert bench.hello("ann") == [("ann", Welcome(broker_epoch=EPOCH))]
    assert bench.stored == [SaveSession("ann", Peer("h", 1, 2))]
    assert bench.say("ann", Heartbeat()) == [("ann", Alive())]


def test_silence_ends_a_session(bench: Bench) -> None:
    """After `LEASE_S` without a word its tasks go to others; who spoke is kept."""
    [(_, held), *_] = bench.deliveries(bench.say("ann", send(1)))
    for _ in range(4):
        bench.wait(LEASE_S / 4)
        for peer in ("ann", "cat"):
            bench.say(peer, Heartbeat())
    assert set(bench.core.sessions()) == {"ann", "bob", "cat"}
    bench.say("cat", TaskSubscribe(id=1, queue="default", credit=1))
    [(to, again)] = bench.deliveries(bench.wait(0.1))
    assert (to, again.task, again.attempt) == ("cat", "t1", 2)
    assert again.epoch > held.epoch
    assert ForgetSession("bob") in bench.stored


def test_a_broker_that_was_asleep_blames_nobody(bench: Bench) -> None:
    """If the broker itself did nothing for long, everybody gets a new lease."""
    bench.say("ann", send(1))
    bench.wait(LEASE_S * 10)
    assert set(bench.core.sessions()) == {"ann", "bob", "cat"}
    bench.now += LEASE_S * 10
    bench.say("ann", Heartbeat())
    bench.wait(0.1)
    assert set(bench.core.sessions()) == {"ann", "bob", "cat"}


def test_proof_of_death_needs_no_lease(bench: Bench) -> None:
    """`expired` gives its tasks to others in the same moment, and forgets all of it."""
    bench.say("cat", TaskSubscribe(id=1, queue="default", credit=1))
    [(to, _)] = bench.deliveries(bench.say("ann", send(1)))
    assert to == "bob"
    [(to, again)] = bench.deliveries(bench.take(bench.core.expired("bob")))
    assert (to, again.attempt) == ("cat", 2)
    assert bench.core.expired("bob") == []


def test_who_was_taken_for_dead_does_nothing_twice(bench: Bench) -> None:
    """If the proof was none, and it says a request again, it gets the answer of the first time."""
    bench.say("ann", send(1, queue="q"))
    bench.take(bench.core.expired("ann"))
    bench.hello("cat", queues=(("q", 1),))
    bench.say("cat", TaskAck(id=1, task="t1", epoch=(EPOCH << 32) + 1))
    bench.hello("ann")
    assert bench.say("ann", send(1, queue="q")) == [("ann", TaskStored(id=1, task="t1", stored=True))]
    assert bench.core.statistics().accepted == 1


def test_a_lost_connection_only_stops_deliveries(bench: Bench) -> None:
    """While it is away nothing is given to it and nothing is taken from it."""
    bench.say("ann", send(1))
    bench.take(bench.core.disconnected("bob"))
    assert bench.deliveries(bench.say("ann", send(2))) == []
    stated = {"held": (("t1", (EPOCH << 32) + 1),), "queues": (("default", 2),)}
    sends = bench.hello("bob", **stated)
    assert sends[0] == ("bob", Welcome(broker_epoch=EPOCH))
    assert [delivery.task for _, delivery in bench.deliveries(sends)] == ["t2"]


def test_what_never_arrived_is_queued_again(bench: Bench) -> None:
    """A held task that is not listed in `Hello` was lost on the way: the next attempt follows at once."""
    bench.say("ann", send(1))
    [(_, again)] = bench.deliveries(bench.hello("bob", queues=(("default", 2),)))
    assert (again.task, again.attempt) == ("t1", 2)


def test_what_is_no_longer_yours_is_named(bench: Bench) -> None:
    """A task that was given to somebody else meanwhile is in `lost`."""
    [(_, held)] = bench.deliveries(bench.say("ann", send(1)))
    bench.take(bench.core.expired("bob"))
    [(_, welcome), *_] = bench.hello("bob", held=(("t1", held.epoch), ("other", 3)))
    assert welcome == Welcome(broker_epoch=EPOCH, lost=("t1", "other"))


# --- tasks ---


def test_stored_before_confirmed_and_delivered(bench: Bench) -> None:
    """The effects stand in the order in which they must happen."""
    effects = bench.core.handle(0.0, "ann", send(1, key="k"))
    task = Task(id="t1", queue="default", key="k", priority=0, body=b"1", order=1)
    epoch = (EPOCH << 32) + 1
    assert effects[0] == StoreTask(task, ())
    assert isinstance(effects[1], SaveAnswer)
    assert effects[3] == HoldTask("t1", "bob", epoch, 1)
    assert effects[4] == Send(
        "bob", TaskDelivery(task="t1", queue="default", key="k", body=b"1", epoch=epoch, attempt=1)
    )


def test_said_again_is_stored_once(bench: Bench) -> None:
    """The same request, also after its task is done with, gets the same answer and does nothing."""
    said = bench.say("ann", send(1))
    assert said[0] == ("ann", TaskStored(id=1, task="t1", stored=True))
    [(_, held)] = bench.deliveries(said)
    bench.say("bob", TaskAck(id=1, task="t1", epoch=held.epoch))
    bench.stored.clear()
    assert bench.say("ann", send(1)) == [("ann", TaskStored(id=1, task="t1", stored=True))]
    assert bench.stored == []


def test_a_task_has_one_id(bench: Bench) -> None:
    """Even if its answers are forgotten, a task that is there is not stored again."""
    bench.say("ann", send(1))
    bench.stored.clear()
    assert bench.say("cat", send(1)) == [("cat", TaskStored(id=1, task="t1", stored=True))]
    assert not [effect for effect in bench.stored if isinstance(effect, StoreTask)]


def test_seen_answers_are_forgotten(bench: Bench) -> None:
    """What the client has seen is dropped; asking for it again is answered with "nobody knows", never done again."""
    bench.say("ann", send(1))
    bench.stored.clear()
    bench.say("ann", Heartbeat(seen=2))
    assert bench.stored == [DropAnswers("ann", 2)]
    [(_, refused)] = bench.say("ann", send(1, key="other"))
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), IndeterminateError)
    bench.stored.clear()
    bench.say("ann", Heartbeat(seen=2))
    assert bench.stored == []


def test_kept_answers_have_a_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest answers go when a client never says what it has seen."""
    monkeypatch.setattr(broker, "MAX_ANSWERS", 3)
    for number in range(1, 6):
        bench.say("ann", send(number))
    assert bench.core.statistics().answers_kept == 3
    [(_, answer)] = bench.say("ann", send(5))
    assert answer == TaskStored(id=5, task="t5", stored=True)


def test_only_the_holder_settles_and_only_now(bench: Bench) -> None:
    """An acknowledgement of another session, or under another epoch, is confirmed as stale and changes nothing."""
    [(_, held)] = bench.deliveries(bench.say("ann", send(1)))
    bench.stored.clear()
    for session, epoch in (("cat", held.epoch), ("bob", held.epoch - 1), ("bob", held.epoch + 1)):
        for kind in (TaskAck, TaskNack):
            assert bench.say(session, kind(id=9, task="t1", epoch=epoch)) == [(session, Done(id=9, stale=True))]
    assert bench.stored == []
    assert bench.say("bob", TaskAck(id=9, task="t1", epoch=held.epoch)) == [("bob", Done(id=9))]
    assert bench.stored == [DeleteTask("t1")]
    assert bench.say("bob", TaskAck(id=9, task="t1", epoch=held.epoch)) == [("bob", Done(id=9, stale=True))]


def test_a_rejected_task_comes_back_slower_and_slower(bench: Bench) -> None:
    """Each rejection doubles the pause, up to a bound: no hot loop."""
    [(_, held)] = bench.deliveries(bench.say("ann", send(1)))
    pauses = []
    for _ in range(10):
        assert bench.deliveries(bench.say("bob", TaskNack(id=1, task="t1", epoch=held.epoch))) == []
        rejected = bench.now
        while not (again := bench.deliveries(bench.wait(BACK_OFF_S / 2))):
            for peer in ("ann", "bob", "cat"):
                bench.say(peer, Heartbeat())
        pauses.append(bench.now - rejected)
        held = again[0][1]
    assert pauses[:4] == pytest.approx([BACK_OFF_S * factor for factor in (1, 2, 4, 8)], abs=BACK_OFF_S / 2 + 1e-9)
    assert max(pauses) == pytest.approx(MAX_BACK_OFF_S, abs=BACK_OFF_S)
    assert held.attempt == 11


def test_due_follows_the_back_off(bench: Bench) -> None:
    """The core asks for its tick when a rejected task is to be offered again."""
    [(_, held)] = bench.deliveries(bench.say("ann", send(1)))
    assert bench.core.due() == bench.now + 1.0
    bench.say("bob", TaskNack(id=1, task="t1", epoch=held.epoch))
    assert bench.core.due() == pytest.approx(bench.now + BACK_OFF_S)


def test_a_returned_task_keeps_its_place(bench: Bench) -> None:
    """What comes back is offered before what was accepted later, but not before a higher priority."""
    [(_, first)] = bench.deliveries(bench.say("ann", send(1)))
    [(_, second)] = bench.deliveries(bench.say("ann", send(2)))
    bench.say("ann", send(3))
    bench.say("ann", send(4, priority=1))
    assert (first.task, second.task) == ("t1", "t2")
    bench.take(bench.core.expired("bob"))
    sends = bench.say("cat", TaskSubscribe(id=1, queue="default", credit=9))
    assert [delivery.task for _, delivery in bench.deliveries(sends)] == ["t4", "t1", "t2", "t3"]


def test_a_returned_task_is_merged_with_its_equal(bench: Bench) -> None:
    """A held task that comes back while one with its key is pending is one with it; who waits for it is told."""
    [(_, held)] = bench.deliveries(bench.say("ann", send(1, key="k", want_result=True)))
    bench.say("cat", send(2, key="k"))
    bench.stored.clear()
    sends = bench.say("bob", TaskNack(id=1, task="t1", epoch=held.epoch))
    assert DeleteTask("t1") in bench.stored
    [result] = [message for session, message in sends if isinstance(message, TaskResult)]
    assert isinstance(result.outcome, Failure)
    assert isinstance(result.outcome.to_exception(), IndeterminateError)
    [(_, delivery)] = bench.deliveries(sends)
    assert (delivery.task, delivery.attempt) == ("t2", 2)


def test_who_leaves_may_wait_for_what_is_merged(bench: Bench) -> None:
    """A session that waits for the result of a task that it holds, and that has an equal, can be gone too."""
    bench.say("bob", send(1, key="k", want_result=True))
    bench.say("bob", send(2, key="k", want_result=True))
    bench.take(bench.core.expired("bob"))
    assert bench.core.statistics().pending == {"default": 1}


def test_a_full_disk_refuses_new_tasks_only(bench: Bench) -> None:
    """With `refuse_new` a task is refused; acknowledgements, and a request that is said again, are not."""
    [(_, held)] = bench.deliveries(bench.say("ann", send(1)))
    bench.core.refuse_new = "/disk"
    [(_, refused)] = bench.say("ann", send(2))
    assert isinstance(refused, Refused)
    error = refused.failure.to_exception()
    assert isinstance(error, StoreFullError)
    assert error.path == "/disk"
    assert bench.say("ann", send(1))[0] == ("ann", TaskStored(id=1, task="t1", stored=True))
    assert bench.say("bob", TaskAck(id=1, task="t1", epoch=held.epoch)) == [("bob", Done(id=1))]


def test_the_queue_has_a_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many tasks are refused with `BusyError`."""
    monkeypatch.setattr(broker, "MAX_TASKS", 1)
    bench.say("ann", send(1))
    [(_, refused)] = bench.say("ann", send(2))
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), BusyError)


# --- results ---


def test_a_result_waits_until_it_is_seen(bench: Bench) -> None:
    """It is stored, said again after each `Hello`, and deleted when its receiver has it."""
    [(_, held)] = bench.deliveries(bench.say("ann", send(1, want_result=True)))
    sends = bench.say("bob", TaskAck(id=1, task="t1", epoch=held.epoch, outcome=b"42"))
    result = TaskResult(task="t1", outcome=b"42")
    assert ("ann", result) in sends
    assert isinstance(bench.stored[-1], SettleTask)
    assert ("ann", result) in bench.hello("ann", awaited=("t1",))
    assert ("ann", result) in bench.hello("ann", expected=("t1",))
    bench.say("ann", ResultSeen(task="t1"))
    assert bench.stored[-1] == DeleteTask("t1")
    sends = bench.hello("ann", awaited=("t1",))
    assert isinstance(sends[-1][1], TaskResult)
    assert isinstance(sends[-1][1].outcome, Failure)


def test_a_result_for_nobody_is_not_kept(bench: Bench) -> None:
    """If its receiver is gone, or no longer waits, the result goes with the task."""
    for number, away in enumerate((lambda: bench.take(bench.core.expired("ann")), lambda: bench.hello("ann"))):
        bench.hello("ann")
        [(_, held)] = bench.deliveries(bench.say("ann", send(number + 1, want_result=True)))
        bench.say("bob", TaskAck(id=1, task=held.task, epoch=held.epoch, outcome=b"42"))
        bench.stored.clear()
        away()
        assert DeleteTask(held.task) in bench.stored


# --- questions ---


def ask(number: int = 1, since: int = 0) -> RpcRequest:
    return RpcRequest(id=number, recipient="name", body=b"?", timeout_s=10.0, since=since)


def test_a_question_and_its_answer(bench: Bench) -> None:
    """It goes to the one who has the name; only that one can answer, once."""
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    delivery = RpcDelivery(caller="ann", id=1, identifier="name", body=b"?")
    assert bench.say("ann", ask()) == [("bob", delivery)]
    assert bench.say("ann", ask()) == []
    answer = RpcAnswer(caller="ann", id=1, outcome=b"!")
    assert bench.say("cat", answer) == []
    assert bench.say("bob", answer) == [("ann", RpcDone(id=1, outcome=b"!"))]
    assert bench.say("bob", answer) == []


def test_a_question_to_nobody(bench: Bench) -> None:
    """`UnroutableError`, in the same moment."""
    [(_, refused)] = bench.say("ann", ask())
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), UnroutableError)


def test_a_name_of_another(bench: Bench) -> None:
    """A name has one owner as long as its session lives; said again by the owner it is confirmed."""
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    assert bench.say("bob", RpcSubscribe(id=1, identifier="name")) == [("bob", Done(id=1))]
    [(_, refused)] = bench.say("ann", RpcSubscribe(id=1, identifier="name"))
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), DuplicateSubscriberError)
    [(_, welcome), *_] = bench.hello("ann", identifiers=(("name", 0),))
    assert welcome == Welcome(broker_epoch=EPOCH, taken=("name",))
    bench.take(bench.core.expired("bob"))
    assert bench.say("ann", RpcSubscribe(id=2, identifier="name")) == [("ann", Done(id=2))]


def test_the_one_who_was_asked_is_gone(bench: Bench) -> None:
    """Its callers are told that nobody knows."""
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    bench.say("ann", ask())
    [(to, refused)] = bench.take(bench.core.expired("bob"))
    assert to == "ann"
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), IndeterminateError)
    assert bench.core.statistics().questions == 0


def test_a_question_is_said_again_to_one_who_came_back(bench: Bench) -> None:
    """What was on the way when the connection broke is sent once more; the one who is asked recognises it."""
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    bench.say("ann", ask())
    bench.take(bench.core.disconnected("bob"))
    sends = bench.hello("bob", identifiers=(("name", EPOCH),))
    assert sends[-1] == ("bob", RpcDelivery(caller="ann", id=1, identifier="name", body=b"?"))


def test_open_questions_have_a_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many of one session are refused, and old ones are forgotten."""
    monkeypatch.setattr(broker, "MAX_QUESTIONS", 1)
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    bench.say("ann", ask(1))
    [(_, refused)] = bench.say("ann", ask(2))
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), BusyError)
    for _ in range(4):
        bench.wait(4.0)
        for peer in ("ann", "bob", "cat"):
            bench.say(peer, Heartbeat())
    assert bench.core.statistics().questions == 0
    assert bench.say("ann", ask(3)) != []


# --- broadcasts ---


def test_one_delivery_a_session(bench: Bench) -> None:
    """However many of its subscriptions match, a session gets a broadcast once, and so does its sender."""
    bench.say("cat", BroadcastSubscribe(id=1, subscription=1, sender="s"))
    bench.say("cat", BroadcastSubscribe(id=2, subscription=2, subject="a.*"))
    bench.say("ann", BroadcastSubscribe(id=1, subscription=1))
    sends = bench.say("ann", BroadcastSend(id=2, body=b"x", sender="s", subject="a.b"))
    delivery = BroadcastDelivery(body=b"x", sender="s", subject="a.b")
    assert sorted(sends, key=repr) == sorted([("ann", delivery), ("cat", delivery), ("ann", Done(id=2))], key=repr)
    bench.say("cat", BroadcastUnsubscribe(id=3, subscription=2))
    bench.say("cat", BroadcastUnsubscribe(id=4, subscription=1))
    sends = bench.say("ann", BroadcastSend(id=3, body=b"x", sender="s", subject="a.b"))
    assert [to for to, _ in sends] == ["ann", "ann"]


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        (None, [None, "", "x"], []),
        ("x", ["x"], [None, "", "xx", "X"]),
        ("*", ["", "x", "x\ny"], [None]),
        ("a.*.c", ["a.b.c", "a..c", "a.b.b.c"], ["a.c", "xa.b.c", "a.b.cx"]),
        ("a.*", ["a.", "a.b"], ["a", "ab"]),
        ("(*)+", ["()+", "(x)+"], ["x", "(x)"]),
    ],
)
def test_patterns(pattern: str | None, matching: list[str | None], others: list[str | None]) -> None:
    """``*`` is any run of characters, everything else is itself."""
    match = matcher(pattern)
    assert all(match(text) for text in matching)
    assert not any(match(text) for text in others)


# --- a restart ---


def held_by_bob(key: str | None = None) -> StoredState:
    task = Task(id="t1", queue="default", key=key, priority=0, body=b"1", order=5)
    return StoredState(
        tasks=(StoredTask(task=task, attempt=1, holder="bob", epoch=(EPOCH << 32) + 1),),
        sessions=(("bob", Peer("h", 1, 2)),),
    )


def test_after_a_restart_the_holder_keeps_its_task() -> None:
    """It is not given to anybody else; the holder's word under the old epoch counts."""
    bench = Bench(held_by_bob(), EPOCH + 1)
    bench.hello("cat", queues=(("default", 5),))
    assert bench.hello("bob", held=(("t1", (EPOCH << 32) + 1),)) == [("bob", Welcome(broker_epoch=EPOCH + 1))]
    assert bench.say("bob", TaskAck(id=1, task="t1", epoch=(EPOCH << 32) + 1)) == [("bob", Done(id=1))]


def test_after_a_restart_the_holder_has_one_lease() -> None:
    """If it does not come back, its task goes to others, under an epoch above all old ones."""
    bench = Bench(held_by_bob(), EPOCH + 1)
    bench.hello("cat", queues=(("default", 5),))
    for _ in range(4):
        assert bench.deliveries(bench.wait(LEASE_S / 4)) == []
        bench.say("cat", Heartbeat())
    [(to, again)] = bench.deliveries(bench.wait(0.1))
    assert (to, again.attempt) == ("cat", 2)
    assert again.epoch > (EPOCH << 32) + 1


def test_after_a_restart_keys_are_still_held() -> None:
    """A pending task whose key is held waits, also if it was accepted before the restart."""
    state = held_by_bob("k")
    pending = StoredTask(task=Task(id="t2", queue="default", key="k", priority=0, body=b"2", order=1))
    bench = Bench(StoredState(tasks=(*state.tasks, pending), sessions=state.sessions), EPOCH + 1)
    assert bench.deliveries(bench.hello("cat", queues=(("default", 5),))) == []
    bench.hello("bob", held=(("t1", (EPOCH << 32) + 1),))
    sends = bench.say("bob", TaskAck(id=1, task="t1", epoch=(EPOCH << 32) + 1))
    assert [(to, delivery.task) for to, delivery in bench.deliveries(sends)] == [("cat", "t2")]


def test_after_a_restart_new_tasks_come_after_old_ones() -> None:
    """The order in which tasks were accepted goes on."""
    bench = Bench(held_by_bob(), EPOCH + 1)
    bench.hello("ann")
    bench.say("ann", send(9))
    [stored] = [effect for effect in bench.stored if isinstance(effect, StoreTask)]
    assert stored.task.order == 6


def test_a_held_task_without_a_session_is_pending() -> None:
    """Should the store know a holder but not its session, the task is free."""
    state = held_by_bob()
    bench = Bench(StoredState(tasks=state.tasks), EPOCH + 1)
    [(to, delivery)] = bench.deliveries(bench.hello("cat", queues=(("default", 1),)))
    assert (to, delivery.task) == ("cat", "t1")
    assert ReleaseTask("t1") in bench.stored


def test_after_a_restart_a_question_waits_for_those_who_are_expected() -> None:
    """As long as a known session is not back, a name without an owner is not refused."""
    bench = Bench(held_by_bob(), EPOCH + 1)
    bench.hello("ann")
    assert bench.say("ann", ask(1)) == []
    assert bench.say("ann", RpcRequest(id=2, recipient="other", body=b"", timeout_s=10.0)) == []
    sends = bench.hello("bob", identifiers=(("name", EPOCH),))
    assert ("bob", RpcDelivery(caller="ann", id=1, identifier="name", body=b"?")) in sends
    [refused] = [message for _, message in sends if isinstance(message, Refused)]
    assert refused.id == 2
    assert isinstance(refused.failure.to_exception(), UnroutableError)


def test_after_a_restart_a_question_is_not_asked_of_somebody_else() -> None:
    """One that was said to the broker before may have been heard by the owner of that time; a new one is not asked."""
    bench = Bench(epoch=EPOCH + 1)
    bench.hello("ann")
    bench.hello("cat", identifiers=(("name", 0),))
    [(_, refused)] = bench.say("ann", ask(1, since=EPOCH))
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), IndeterminateError)
    assert len(bench.say("ann", ask(2))) == 1
    bench.hello("bob", identifiers=(("old", EPOCH - 1),))
    old = RpcRequest(id=3, recipient="old", body=b"", timeout_s=10.0, since=EPOCH)
    assert [to for to, _ in bench.say("ann", old)] == ["bob"]


# --- the rest ---


def test_out_of_place(bench: Bench) -> None:
    """A call is not for the core."""
    [(_, violation)] = bench.say("ann", Call(id=1, requests=()))
    assert isinstance(violation, Violation)


def test_the_same_calls_give_the_same_effects() -> None:
    """The core is deterministic: no clock, no randomness, no order of a set."""

    def run() -> list[Effect]:
        core, effects = BrokerCore(1), []
        for name in ("a", "b", "c"):
            effects += core.handle(0.0, name, Hello(session=name, peer=Peer(), queues=(("q", 2), ("r", 1))))
        for number in range(1, 20):
            effects += core.handle(
                number / 10, "a", send(number, queue="qr"[number % 2], key="kl"[number % 2], priority=number % 3)
            )
        effects += core.expired("b")
        return effects + core.tick(100.0)

    assert run() == run()
