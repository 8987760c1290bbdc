"""The broker's core, one rule at a time: what goes in, what comes out, no event loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from prunus.errors import (
    BusyError,
    DeadLetterError,
    DuplicateSubscriberError,
    Failure,
    IndeterminateError,
    StoreFullError,
    UnroutableError,
)
from prunus.messaging import broker, queues
from prunus.messaging.broker import (
    MAX_RETIRED,
    RESULTS_KEPT_S,
    BrokerCore,
    Came,
    Changes,
    Client,
    Effect,
    Left,
    Show,
    StoredState,
    Tell,
)
from prunus.messaging.inventory import TaskInfo
from prunus.messaging.messages import (
    LEASE_S,
    Alive,
    BroadcastDelivery,
    BroadcastSend,
    BroadcastSubscribe,
    BroadcastUnsubscribe,
    BrokerMessage,
    Call,
    ClientMessage,
    Done,
    Edited,
    Goodbye,
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
    RpcUnsubscribe,
    TaskAck,
    TaskDelivery,
    TaskEdit,
    TaskList,
    TaskNack,
    TaskResult,
    TaskSend,
    TaskStored,
    TaskSubscribe,
    Violation,
    Welcome,
    decode_from_broker,
)
from prunus.messaging.queues import (
    BACK_OFF_S,
    FRAME_COST_BYTES,
    MAX_BACK_OFF_S,
    MAX_GIVEN_BYTES,
    Deliver,
    Hold,
    Keep,
    Send,
    Task,
    dead_letter,
)

EPOCH = 7
WALL = 1_700_000_000.0


class Bench:
    """A core, the clocks, and who said what to whom."""

    def __init__(self, state: StoredState | None = None, epoch: int = EPOCH) -> None:
        self.core = BrokerCore(epoch, 0.0, state, wall=WALL)
        self.now = 0.0
        self.bodies: dict[int, bytes] = {}
        self.effects: list[Effect] = []
        """All that were no sends."""

    def take(self, effects: list[Effect]) -> list[tuple[str, BrokerMessage]]:
        sends = []
        for effect in effects:
            match effect:
                case Send():
                    message = effect.message
                    message = decode_from_broker(message) if isinstance(message, bytes) else message
                    sends.append((effect.session, message))
                case Deliver():
                    sends.append(self.delivery(effect.task))
                case Tell():
                    task = effect.task
                    sends.append((effect.session, decode_from_broker(task.outcome or dead_letter(task))))
                case Keep():
                    self.bodies[effect.number] = effect.body
                case _:
                    self.effects.append(effect)
        return sends

    def delivery(self, task: Task) -> tuple[str, TaskDelivery]:
        assert task.hold is not None
        delivery = TaskDelivery(
            task=task.id,
            queue=task.queue,
            key=task.key,
            body=self.bodies.get(task.number, b"?"),
            epoch=task.hold.epoch,
            attempt=task.attempt,
            subject=task.subject,
            pattern=task.hold.pattern,
        )
        return task.hold.session, delivery

    def changes(self) -> Changes:
        """What has to be stored; the tasks as after that."""
        changes = self.core.take_changes()
        for task in changes.tasks:
            task.is_stored = bool(task.place)
        return changes

    def tasks(self, place: str | None = None) -> list[str]:
        """Their ids, oldest first."""
        [show] = [
            one
            for one in self.core.handle(self.now, self.anybody(), TaskList(id=0, limit=1000))
            if isinstance(one, Show)
        ]
        return [task.id for task in show.tasks if place in (None, task.place)]

    def info(self, task: str) -> TaskInfo:
        [show] = [
            one
            for one in self.core.handle(self.now, self.anybody(), TaskList(id=0, task=task))
            if isinstance(one, Show)
        ]
        [found] = show.tasks
        return self.core.info(found)

    def anybody(self) -> str:
        return next(name for name, one in self.core.statistics().sessions.items() if one.connected)

    def say(self, session: str, message: ClientMessage) -> list[tuple[str, BrokerMessage]]:
        return self.take(self.core.handle(self.now, session, message))

    def hello(self, session: str, **stated: object) -> list[tuple[str, BrokerMessage]]:
        return self.say(session, Hello(session=session, peer=Peer("h", 1, 2), **stated))  # type: ignore[arg-type]

    def wait(self, seconds: float) -> list[tuple[str, BrokerMessage]]:
        self.now += seconds
        self.core.wall += seconds
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
    bench.changes()
    bench.effects.clear()
    return bench


def send(number: int, **fields: object) -> TaskSend:
    return TaskSend(id=number, task=f"t{number}", body=b"%d" % number, **fields)  # type: ignore[arg-type]


def refusal(sends: list[tuple[str, BrokerMessage]]) -> Exception:
    """The error that is the only answer."""
    [(_, refused)] = sends
    assert isinstance(refused, Refused)
    return refused.failure.to_exception()


def outcomes(sends: list[tuple[str, BrokerMessage]]) -> list[tuple[str, str, object]]:
    """The results that are told: to whom, of which task, and what (an error as an exception)."""
    return [
        (session, one.task, one.outcome.to_exception() if isinstance(one.outcome, Failure) else one.outcome)
        for session, one in sends
        if isinstance(one, TaskResult)
    ]


# --- sessions ---


def test_only_those_who_said_hello_are_served() -> None:
    """A message of an unknown session is answered with `HelloNeeded` and does nothing."""
    bench = Bench()
    assert bench.say("ann", send(1)) == [("ann", HelloNeeded())]
    assert not bench.changes()
    assert bench.hello("ann") == [("ann", Welcome(broker_epoch=EPOCH))]
    assert bench.effects == [Came("ann", Peer("h", 1, 2))]
    assert bench.changes().sessions == {"ann": Peer("h", 1, 2)}
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
    assert Left("bob", Peer("h", 1, 2)) in bench.effects
    assert bench.changes().sessions == {"bob": None}


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
    bench.core.disconnected("bob")
    assert bench.deliveries(bench.say("ann", send(2))) == []
    stated = {"held": (("t1", (EPOCH << 32) + 1),), "queues": (("default", 2),)}
    sends = bench.hello("bob", **stated)
    assert sends[0] == ("bob", Welcome(broker_epoch=EPOCH))
    assert [delivery.task for _, delivery in bench.deliveries(sends)] == ["t2"]


def test_what_never_arrived_is_queued_again(bench: Bench) -> None:
    """A held task that is not listed in `Hello` was lost on the way: nobody tried it, and it is offered at once."""
    bench.say("ann", send(1))
    [(_, again)] = bench.deliveries(bench.hello("bob", queues=(("default", 2),)))
    assert (again.task, again.attempt, again.epoch) == ("t1", 1, (EPOCH << 32) + 2)


def test_what_is_no_longer_yours_is_named(bench: Bench) -> None:
    """A task that was given to somebody else meanwhile is in `lost`."""
    [(_, held)] = bench.deliveries(bench.say("ann", send(1)))
    bench.take(bench.core.expired("bob"))
    [(_, welcome), *_] = bench.hello("bob", held=(("t1", held.epoch), ("other", 3)))
    assert welcome == Welcome(broker_epoch=EPOCH, lost=("t1", "other"))


# --- tasks ---


def test_stored_before_confirmed_and_delivered(bench: Bench) -> None:
    """The effects stand in the order in which they must happen, and all that changed is one task with its holder."""
    effects = bench.core.handle(0.0, "ann", send(1, key="k"))
    keep, confirm, deliver = effects
    assert keep == Keep(1, b"1")
    assert confirm == Send("ann", TaskStored(id=1, task="t1", stored=True))
    assert isinstance(deliver, Deliver)
    bench.take(effects)
    delivery = TaskDelivery(task="t1", queue="default", key="k", body=b"1", epoch=(EPOCH << 32) + 1, attempt=1)
    assert bench.delivery(deliver.task) == ("bob", delivery)
    changes = bench.changes()
    assert changes.tasks == [deliver.task]
    assert changes.marks["ann"].done == 2


def test_what_came_and_went_in_one_batch_leaves_no_row(bench: Bench) -> None:
    """A task that was settled before anything was written has no place, and was never stored."""
    [(_, held)] = bench.deliveries(bench.say("ann", send(1)))
    bench.say("bob", TaskAck(id=1, task="t1", epoch=held.epoch))
    [gone] = bench.changes().tasks
    assert (gone.place, gone.is_stored) == ("", False)


def test_said_again_is_stored_once(bench: Bench) -> None:
    """The same request, also after its task is done with, gets the same answer and does nothing."""
    said = bench.say("ann", send(1))
    assert said[0] == ("ann", TaskStored(id=1, task="t1", stored=True))
    [(_, held)] = bench.deliveries(said)
    bench.say("bob", TaskAck(id=1, task="t1", epoch=held.epoch))
    bench.changes()
    assert bench.say("ann", send(1)) == [("ann", TaskStored(id=1, task="t1", stored=True))]
    assert not bench.changes()


def test_a_task_has_one_id(bench: Bench) -> None:
    """Whoever sends it, a task that is there is not stored again."""
    bench.say("ann", send(1))
    bench.changes()
    assert bench.say("cat", send(1)) == [("cat", TaskStored(id=1, task="t1", stored=True))]
    assert not bench.changes().tasks


def test_seen_answers_are_forgotten(bench: Bench) -> None:
    """What the client has seen is dropped; asking for it again is answered with "nobody knows", never done again."""
    bench.say("ann", send(1, queue="q", key="k"))
    bench.say("ann", send(2, queue="q", key="k"))
    assert list(bench.changes().answers) == [("ann", 2)]
    bench.say("ann", Heartbeat(seen=3))
    assert bench.changes().dropped == {"ann": 3}
    for number in (1, 2):
        assert isinstance(refusal(bench.say("ann", send(number, key="other"))), IndeterminateError)
    bench.say("ann", Heartbeat(seen=3))
    assert not bench.changes()


def test_kept_answers_have_a_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest answers go when a client never says what it has seen; so does what was refused."""
    monkeypatch.setattr(broker, "MAX_ANSWERS", 3)
    for number in range(1, 7):
        bench.say("ann", send(number, queue="q", key="k"))
    assert bench.core.statistics().answers_kept == 3
    assert bench.say("ann", send(6, queue="q", key="k")) == [("ann", TaskStored(id=6, task="t1", stored=False))]
    assert isinstance(refusal(bench.say("ann", send(2, queue="q", key="k"))), IndeterminateError)
    bench.core.refuse_new = "/disk"
    for number in range(7, 12):
        bench.say("ann", send(number))
    bench.core.refuse_new = None
    assert isinstance(refusal(bench.say("ann", send(8))), IndeterminateError)
    assert bench.say("ann", send(9))[0] == ("ann", TaskStored(id=9, task="t9", stored=True))


# --- saying it again ---


def restarted(bench: Bench, stored: list[Changes]) -> Bench:
    """A new core from what was stored."""
    clients: dict[str, Client] = {}
    answers: dict[tuple[str, int], bytes] = {}
    tasks: dict[int, Task] = {}
    for changes in stored:
        for name, client in {**changes.clients, **changes.marks}.items():
            assert client is not None
            clients[name] = Client(secret=client.secret, done=client.done, undone=dict(client.undone))
        answers |= changes.answers
        tasks |= {task.number: task for task in changes.tasks}
    state = StoredState(
        tasks=[task for task in tasks.values() if task.place],
        clients=tuple(clients.items()),
        answers=tuple((session, request, frame) for (session, request), frame in answers.items()),
    )
    return Bench(state, EPOCH + 1)


@pytest.mark.parametrize("with_restart", [False, True])
def test_a_refused_request_below_the_mark(bench: Bench, with_restart: bool) -> None:
    """It was not done, whatever was done after it: said again it is tried again, and those around it are not."""
    bench.say("ann", send(1, queue="q"))
    bench.core.refuse_new = "/disk"
    assert isinstance(refusal(bench.say("ann", send(2, queue="q"))), StoreFullError)
    bench.core.refuse_new = None
    bench.say("ann", send(3, queue="q"))
    stored = [bench.changes()]
    if with_restart:
        bench = restarted(bench, stored)
    bench.hello("ann", seen=1)
    accepted = bench.core.statistics().accepted
    for number in (1, 2, 3):
        assert bench.say("ann", send(number, queue="q")) == [
            ("ann", TaskStored(id=number, task=f"t{number}", stored=True))
        ]
    assert bench.core.statistics().accepted == accepted + 1
    assert bench.tasks() == ["t1", "t3", "t2"]


@pytest.mark.parametrize("with_restart", [False, True])
def test_a_request_that_was_lost_on_the_way(bench: Bench, with_restart: bool) -> None:
    """A gap in the ids is no proof that it was done: it is done when it is said again."""
    bench.say("ann", send(1, queue="q"))
    bench.say("ann", send(4, queue="q"))
    stored = [bench.changes()]
    if with_restart:
        bench = restarted(bench, stored)
    bench.hello("ann", seen=1)
    for number in (1, 2, 3, 4):
        bench.say("ann", send(number, queue="q"))
    assert sorted(bench.tasks()) == ["t1", "t2", "t3", "t4"]


@pytest.mark.parametrize("with_restart", [False, True])
def test_a_joined_request_said_again(bench: Bench, with_restart: bool) -> None:
    """It gets the answer of the first time, also when the task that it joined is over meanwhile."""
    bench.say("ann", send(1, queue="q", key="k"))
    bench.say("ann", send(2, queue="q", key="k"))
    bench.say("ann", send(3, queue="q"))
    bench.say("ann", TaskEdit(id=4, action="delete", tasks=("t1",)))
    stored = [bench.changes()]
    if with_restart:
        bench = restarted(bench, stored)
    bench.hello("ann", seen=1)
    assert bench.say("ann", send(2, queue="q", key="k")) == [("ann", TaskStored(id=2, task="t1", stored=False))]
    assert bench.tasks() == ["t3"]


def test_a_hostile_gap_costs_nothing(bench: Bench) -> None:
    """An id far ahead is no reason to remember all those below it."""
    bench.say("ann", send(2**60, queue="q"))
    bench.say("ann", send(2**61, queue="q"))
    assert len(bench.changes().marks["ann"].undone) <= broker.MAX_ANSWERS


# --- settling ---


def test_only_the_holder_settles_and_only_now(bench: Bench) -> None:
    """An acknowledgement of another session, or under another epoch, is confirmed as stale and changes nothing."""
    [(_, held)] = bench.deliveries(bench.say("ann", send(1)))
    bench.changes()
    for session, epoch in (("cat", held.epoch), ("bob", held.epoch - 1), ("bob", held.epoch + 1)):
        for kind in (TaskAck, TaskNack):
            assert bench.say(session, kind(id=9, task="t1", epoch=epoch)) == [(session, Done(id=9, stale=True))]
    assert not bench.changes()
    assert bench.say("bob", TaskAck(id=9, task="t1", epoch=held.epoch)) == [("bob", Done(id=9))]
    assert [(task.id, task.place) for task in bench.changes().tasks] == [("t1", "")]
    again = bench.say("bob", TaskAck(id=9, task="t1", epoch=held.epoch))
    assert again == [("bob", Done(id=9, stale=True, over=True))]


def test_a_task_whose_result_waits_is_over(bench: Bench) -> None:
    """For who acknowledges it again; a dead letter is not."""
    sends = bench.say("ann", send(1, want_result=True)) + bench.say("ann", send(2, max_attempts=1))
    one, two = (held for _, held in bench.deliveries(sends))
    bench.say("bob", TaskAck(id=1, task="t1", epoch=one.epoch))
    bench.say("bob", TaskNack(id=2, task="t2", epoch=two.epoch))
    again = [TaskAck(id=3, task="t1", epoch=one.epoch), TaskAck(id=4, task="t2", epoch=two.epoch)]
    said = [bench.say("bob", ack) for ack in again]
    assert said == [[("bob", Done(id=3, stale=True, over=True))], [("bob", Done(id=4, stale=True))]]


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
    sends = bench.say("bob", TaskNack(id=1, task="t1", epoch=held.epoch))
    bench.say("ann", ResultSeen(task="t1"))
    assert bench.tasks() == ["t2"]
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
    assert bench.core.statistics().queues["default"].ready == 1


def bobs_deeds(bench: Bench) -> dict[str, int]:
    """Four tasks whose result ann wants, two of which bob has, and ann was silent for too long: their epochs."""
    sends = [bench.say("ann", send(number, want_result=True)) for number in (1, 2, 3, 4)]
    for _ in range(5):
        bench.wait(LEASE_S / 4)
        bench.say("bob", Heartbeat())
        bench.say("cat", Heartbeat())
    assert "ann" not in bench.core.sessions()
    return {one.task: one.epoch for some in sends for _, one in bench.deliveries(some)}


def test_who_was_silent_for_too_long_gets_its_results(bench: Bench) -> None:
    """A sender that slept is told what came of its tasks: of those that ended meanwhile, and those that end later."""
    epochs = bobs_deeds(bench)
    bench.say("cat", TaskEdit(id=1, action="bury", tasks=("t4",)))
    assert outcomes(bench.say("bob", TaskAck(id=1, task="t1", epoch=epochs["t1"], outcome=b"one"))) == [
        ("ann", "t1", b"one")  # there is no connection: it is dropped
    ]
    told = outcomes(bench.hello("ann", awaited=("t1", "t2", "t3", "t4")))
    assert [(task, str(what)) for _, task, what in told] == [
        ("t1", "b'one'"),
        ("t4", "task t4 is a dead letter: it was buried by hand; look at it with: prunus tasks --dead"),
    ]
    bench.say("ann", ResultSeen(task="t1"))
    assert bench.tasks("settled") == []
    said = bench.say("bob", TaskAck(id=2, task="t2", epoch=epochs["t2"], outcome=b"two"))
    assert outcomes(said) == [("ann", "t2", b"two")]


def test_results_for_the_silent_survive_a_restart(bench: Bench) -> None:
    """Also of the broker that kept them."""
    epochs = bobs_deeds(bench)
    bench.say("bob", TaskAck(id=1, task="t1", epoch=epochs["t1"], outcome=b"one"))
    changes = bench.changes()
    clients = tuple((name, client) for name, client in changes.clients.items() if client is not None)
    clients += (("ann", Client(done=5)),)
    for task in changes.tasks:
        task.place = "settled" if task.outcome else ""
    again = Bench(StoredState(tasks=changes.tasks, clients=clients), EPOCH + 1)
    assert outcomes(again.hello("ann", awaited=("t1",))) == [("ann", "t1", b"one")]


@pytest.mark.parametrize("end", ["proof", "a week", "others"])
def test_results_are_not_kept_for_ever(end: str, bench: Bench) -> None:
    """Not for who is proven dead, not for longer than a week, and not for more clients than are remembered."""
    epochs = bobs_deeds(bench)
    for number in (1, 2):
        bench.say("bob", TaskAck(id=number, task=f"t{number}", epoch=epochs[f"t{number}"], outcome=b"done"))
    assert bench.tasks("settled") == ["t1", "t2"]
    match end:
        case "proof":
            bench.take(bench.core.expired("ann"))
        case "a week":
            bench.wait(RESULTS_KEPT_S - 2 * LEASE_S)
            bench.hello("cat")
            assert bench.tasks("settled") == ["t1", "t2"]
            bench.wait(2 * LEASE_S + 1.0)
            bench.hello("cat")
        case _:
            for number in range(MAX_RETIRED):
                bench.hello(f"other{number}")
                bench.take(bench.core.expired(f"other{number}"))
    assert bench.tasks("settled") == []
    [(_, _, error)] = outcomes(bench.hello("ann", awaited=("t1",)))
    assert isinstance(error, IndeterminateError)


def test_who_was_wrongly_taken_for_dead_gets_what_is_still_known(bench: Bench) -> None:
    """What is over by then is not known any more; a dead letter is, and what is to be done will be."""
    epochs = bobs_deeds(bench)
    bench.take(bench.core.expired("ann"))
    bench.say("bob", TaskAck(id=1, task="t1", epoch=epochs["t1"]))
    bench.say("cat", TaskEdit(id=1, action="bury", tasks=("t4",)))
    told = {task: what for _, task, what in outcomes(bench.hello("ann", awaited=("t1", "t2", "t4")))}
    assert {task: type(what) for task, what in told.items()} == {"t1": IndeterminateError, "t4": DeadLetterError}
    said = bench.say("bob", TaskAck(id=2, task="t2", epoch=epochs["t2"], outcome=b"two"))
    assert outcomes(said) == [("ann", "t2", b"two")]


def test_who_did_not_hear_that_its_task_was_joined_gets_the_result(bench: Bench) -> None:
    """It knows only the id of its own; the answer that says which task stands for that one was lost on its way."""
    bench.say("cat", send(1, queue="q", key="k"))
    bench.say("ann", send(2, queue="q", key="k", want_result=True))
    bench.core.disconnected("ann")
    [(_, held)] = bench.deliveries(bench.say("bob", TaskSubscribe(id=1, queue="q", credit=1)))
    bench.say("bob", TaskAck(id=2, task="t1", epoch=held.epoch, outcome=b"one"))
    assert outcomes(bench.hello("ann", expected=("t2",))) == [("ann", "t1", b"one")]


def test_a_forgotten_client_that_sends_again_gets_the_result(bench: Bench) -> None:
    """The task is there: it is confirmed, and its sender waits for it."""
    bench.say("ann", send(1, queue="q", want_result=True))
    bench.take(bench.core.expired("ann"))
    for number in range(MAX_RETIRED):
        bench.hello(f"other{number}")
        bench.take(bench.core.expired(f"other{number}"))
    bench.hello("ann")
    bench.say("ann", send(1, queue="q", want_result=True))
    [(_, held)] = bench.deliveries(bench.say("bob", TaskSubscribe(id=1, queue="q", credit=1)))
    said = bench.say("bob", TaskAck(id=2, task="t1", epoch=held.epoch, outcome=b"one"))
    assert outcomes(said) == [("ann", "t1", b"one")]


def test_who_says_goodbye_waits_for_nothing(bench: Bench) -> None:
    """Whatever comes of its tasks is kept for nobody."""
    [(_, delivery)] = bench.deliveries(bench.say("ann", send(1, want_result=True)))
    bench.say("ann", Goodbye(id=2))
    assert outcomes(bench.say("bob", TaskAck(id=1, task="t1", epoch=delivery.epoch))) == []
    assert bench.tasks() == []


def test_who_leaves_its_task_undone_is_not_called_lost(bench: Bench) -> None:
    """A worker that says goodbye with a task in hand has had its attempt; what it says of a last one is true."""
    bench.say("ann", send(1, max_attempts=1))
    bench.say("ann", send(2, max_attempts=1))
    bench.say("bob", Goodbye(id=1))
    assert bench.info("t1").reason == "its worker left it undone once"
    bench.hello("bob", queues=(("default", 2),))
    bench.say("ann", send(3, max_attempts=1))
    bench.take(bench.core.expired("bob"))
    assert bench.info("t3").reason == "its worker was lost once"


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
    monkeypatch.setattr(queues, "MAX_TASKS", 1)
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
    assert bench.tasks("settled") == ["t1"]
    assert ("ann", result) in bench.hello("ann", awaited=("t1",))
    assert ("ann", result) in bench.hello("ann", expected=("t1",))
    bench.say("ann", ResultSeen(task="t1"))
    assert bench.tasks() == []
    sends = bench.hello("ann", awaited=("t1",))
    assert isinstance(sends[-1][1], TaskResult)
    assert isinstance(sends[-1][1].outcome, Failure)


def test_a_result_is_not_lost_by_deleting_its_task(bench: Bench) -> None:
    """A task that is over can't be deleted any more: what it came to belongs to who waits for it."""
    [(_, held)] = bench.deliveries(bench.say("ann", send(1, want_result=True)))
    bench.say("bob", TaskAck(id=1, task="t1", epoch=held.epoch, outcome=b"42"))
    edited = bench.say("bob", TaskEdit(id=2, action="delete", tasks=("t1",)))
    assert edited == [("bob", Edited(id=2, changed=0, held=0))]
    assert ("ann", TaskResult(task="t1", outcome=b"42")) in bench.hello("ann", awaited=("t1",))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("over", [False, True])
def test_a_sender_that_was_taken_for_dead_does_not_wait_for_ever(bench: Bench, joined: bool, over: bool) -> None:
    """Said again, the same answer; and its result, or, if that is over, that nobody knows it any more."""
    bench.say("cat", send(1, key="k", queue="q"))
    task, message = ("t1" if joined else "t2"), send(2, key="k" if joined else None, queue="q", want_result=True)
    bench.say("ann", message)
    bench.take(bench.core.expired("ann"))
    if over:
        bench.say("cat", TaskEdit(id=2, action="delete", queue="q"))
    bench.hello("ann", expected=("t2",))
    sends = bench.say("ann", message)
    assert sends[0] == ("ann", TaskStored(id=2, task=task, stored=not joined))
    if over:
        [(_, told, error)] = outcomes(sends)
        assert told == task
        assert isinstance(error, IndeterminateError)
        return
    assert outcomes(sends) == []
    given = bench.deliveries(bench.say("bob", TaskSubscribe(id=7, queue="q", credit=2)))
    [held] = [delivery for _, delivery in given if delivery.task == task]
    sends = bench.say("bob", TaskAck(id=8, task=task, epoch=held.epoch, outcome=b"42"))
    assert outcomes(sends) == [("ann", task, b"42")]


def test_results_that_are_large_together_are_told_bit_by_bit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a `Hello` as much as can be on its way, and more when that was read; what was seen meanwhile is not."""
    monkeypatch.setattr(broker, "MAX_GIVEN_BYTES", 1)
    reads = True
    bench.core.is_stuck = lambda session: not reads
    names = tuple(f"t{number}" for number in range(1, 5))
    for number in range(1, 5):
        [(_, held)] = bench.deliveries(bench.say("ann", send(number, want_result=True)))
        bench.say("bob", TaskAck(id=number, task=held.task, epoch=held.epoch, outcome=b"done"))
    assert [task for _, task, _ in outcomes(bench.hello("ann", awaited=names))] == ["t1"]
    assert bench.core.due() <= bench.now
    reads = False
    assert bench.core.due() > bench.now
    assert outcomes(bench.take(bench.core.go_on())) == []
    bench.say("ann", ResultSeen(task="t2"))
    reads = True
    assert outcomes(bench.take(bench.core.go_on())) == [("ann", "t3", b"done")]
    bench.core.disconnected("ann")
    assert outcomes(bench.take(bench.core.go_on())) == []
    assert outcomes(bench.hello("ann", awaited=("t3", "t4"))) == [("ann", "t3", b"done")]
    assert outcomes(bench.take(bench.core.go_on())) == [("ann", "t4", b"done")]
    assert bench.core.due() > bench.now
    bench.hello("ann", awaited=("t3", "t4"))
    bench.core.expired("ann")
    assert bench.core.go_on() == []


def test_a_result_for_nobody_is_not_kept(bench: Bench) -> None:
    """If its receiver is gone, or no longer waits, the result goes with the task."""
    for number, away in enumerate((lambda: bench.take(bench.core.expired("ann")), lambda: bench.hello("ann"))):
        bench.hello("ann")
        [(_, held)] = bench.deliveries(bench.say("ann", send(number + 1, want_result=True)))
        bench.say("bob", TaskAck(id=1, task=held.task, epoch=held.epoch, outcome=b"42"))
        away()
        bench.hello("cat")
        assert bench.tasks() == []


# --- questions ---


def ask(number: int = 1, since: int = 0, recipient: str = "name") -> RpcRequest:
    return RpcRequest(id=number, recipient=recipient, body=b"?", timeout_s=10.0, since=since)


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


def test_what_waits_for_its_owner_is_asked_once(bench: Bench) -> None:
    """Questions that came before the one who answers was back: after its welcome, each once, as much as it can read."""
    state = StoredState(sessions=(("bob", Peer("h", 1, 2)), ("ann", Peer("h", 1, 2))))
    again = Bench(state, EPOCH + 1)
    again.hello("ann")
    number = 3 * MAX_GIVEN_BYTES // FRAME_COST_BYTES // 2
    for request in range(1, number + 1):
        assert again.say("ann", ask(request)) == []
    welcome, *asked = again.hello("bob", identifiers=(("name", EPOCH),))
    assert isinstance(welcome[1], Welcome)
    assert len(asked) <= MAX_GIVEN_BYTES // FRAME_COST_BYTES
    assert again.say("ann", ask(number + 1)) == [], "it comes after those that wait already"
    asked += again.take(again.core.go_on())
    assert [question.id for _, question in asked if isinstance(question, RpcDelivery)] == [*range(1, number + 2)]


class Long(tuple[Any, ...]):
    """It is not to be looked through for each of many things."""

    looks = 0

    def __contains__(self, item: object) -> bool:
        raise AssertionError("it is searched")

    def __iter__(self) -> Iterator[Any]:
        self.looks += 1
        return super().__iter__()


def test_what_a_hello_says_is_not_searched(bench: Bench) -> None:
    """A session that waits for very many results, under very many names, comes back in a moment."""
    names = Long((f"name{number}", EPOCH) for number in range(20))
    bench.hello("ann", identifiers=names)
    [(_, held)] = bench.deliveries(bench.say("ann", send(2, want_result=True)))
    bench.say("bob", TaskAck(id=1, task="t2", epoch=held.epoch))
    names.looks = 0
    [_, told] = bench.hello("ann", awaited=Long(["t2"]), expected=Long(["t2"]), identifiers=names)
    assert isinstance(told[1], TaskResult)
    assert names.looks < len(names)


def test_a_name_of_another(bench: Bench) -> None:
    """A name has one owner as long as its session lives; said again by the owner it is confirmed."""
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    assert bench.say("bob", RpcSubscribe(id=1, identifier="name")) == [("bob", Done(id=1, since=EPOCH))]
    [(_, refused)] = bench.say("ann", RpcSubscribe(id=1, identifier="name"))
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), DuplicateSubscriberError)
    [(_, welcome), *_] = bench.hello("ann", identifiers=(("name", 0),))
    assert welcome == Welcome(broker_epoch=EPOCH, taken=("name",))
    bench.take(bench.core.expired("bob"))
    assert bench.say("ann", RpcSubscribe(id=2, identifier="name")) == [("ann", Done(id=2, since=EPOCH + 1))]


def test_the_one_who_was_asked_is_gone(bench: Bench) -> None:
    """Its callers are told that nobody knows."""
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    bench.say("ann", ask())
    [(to, refused)] = bench.take(bench.core.expired("bob"))
    assert to == "ann"
    assert isinstance(refused, Refused)
    assert isinstance(refused.failure.to_exception(), IndeterminateError)
    assert bench.core.statistics().questions == 0


def test_questions_that_are_large_together_are_said_again_bit_by_bit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as can be on its way, and more when that was read; what was answered meanwhile is not."""
    monkeypatch.setattr(broker, "MAX_GIVEN_BYTES", 1)
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    for number in range(1, 5):
        bench.say("ann", ask(number))
    again = {"identifiers": (("name", EPOCH),)}

    def asked(sends: list[tuple[str, BrokerMessage]]) -> list[int]:
        return [message.id for _, message in sends if isinstance(message, RpcDelivery)]

    assert asked(bench.hello("bob", **again)) == [1]
    bench.say("bob", RpcAnswer(caller="ann", id=2, outcome=b"!"))
    assert asked(bench.take(bench.core.go_on())) == [3]
    assert asked(bench.hello("bob", **again)) == [1]
    assert [asked(bench.take(bench.core.go_on())) for _ in range(3)] == [[3], [4], []]


def test_a_question_is_said_again_to_one_who_came_back(bench: Bench) -> None:
    """What was on the way when the connection broke is sent once more; the one who is asked recognises it."""
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    bench.say("ann", ask())
    bench.core.disconnected("bob")
    sends = bench.hello("bob", identifiers=(("name", EPOCH),))
    assert sends[-1] == ("bob", RpcDelivery(caller="ann", id=1, identifier="name", body=b"?"))


def test_a_question_is_not_asked_of_two(bench: Bench) -> None:
    """Its answer was lost and the name has changed hands: said again, nobody knows; the same one answers again."""
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    bench.say("ann", ask())
    bench.say("bob", RpcAnswer(caller="ann", id=1, outcome=b"!"))
    assert [to for to, _ in bench.say("ann", ask(since=EPOCH))] == ["bob"]
    bench.say("bob", RpcAnswer(caller="ann", id=1, outcome=b"!"))
    bench.take(bench.core.expired("bob"))
    assert isinstance(refusal(bench.say("ann", ask(since=EPOCH))), IndeterminateError)
    bench.say("cat", RpcSubscribe(id=1, identifier="name"))
    assert isinstance(refusal(bench.say("ann", ask(since=EPOCH))), IndeterminateError)
    bench.say("ann", Heartbeat(seen=2))
    assert [to for to, _ in bench.say("ann", ask(2))] == ["cat"]


def test_a_question_that_an_older_broker_may_have_passed_on(bench: Bench) -> None:
    """If nobody has the name now, that does not say that it had no effect."""
    assert isinstance(refusal(bench.say("ann", ask(1, since=EPOCH - 1))), IndeterminateError)
    assert isinstance(refusal(bench.say("ann", ask(2))), UnroutableError)


@pytest.mark.parametrize("remembered", [10, 0])
def test_a_name_that_changed_hands_before_a_restart(monkeypatch: pytest.MonkeyPatch, remembered: int) -> None:
    """Its new owner was not the one who was asked: to the next broker it says a stamp that shows that."""
    monkeypatch.setattr(broker, "MAX_FORMER_NAMES", remembered)
    bench, after = Bench(), Bench(epoch=EPOCH + 1)
    for session in ("ann", "bob", "cat"):
        bench.hello(session)
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    bench.say("ann", ask())
    bench.say("bob", RpcUnsubscribe(id=2, identifier="name"))
    [(_, taken)] = bench.say("cat", RpcSubscribe(id=1, identifier="name"))
    assert isinstance(taken, Done)
    after.hello("cat", identifiers=(("name", taken.since),))
    after.hello("ann")
    assert isinstance(refusal(after.say("ann", ask(since=EPOCH))), IndeterminateError)
    assert [to for to, _ in after.say("ann", ask(2))] == ["cat"]


def test_who_was_asked_is_remembered_within_a_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the caller does not say what it has seen."""
    monkeypatch.setattr(broker, "MAX_ANSWERS", 3)
    bench.say("bob", RpcSubscribe(id=1, identifier="name"))
    for number in range(1, 9):
        bench.say("ann", ask(number))
        bench.say("bob", RpcAnswer(caller="ann", id=number, outcome=b"!"))
    assert len(bench.core._clients["ann"].asked) == 3


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


# --- a restart ---


def task_row(number: int, order: int, key: str | None = None) -> Task:
    return Task(9, order, number, f"t{number}", "default", key, None, 1, WALL, is_stored=True)


def held_by_bob(key: str | None = None) -> StoredState:
    task = task_row(1, 5, key)
    task.attempt, task.hold = 1, Hold("bob", None, (EPOCH << 32) + 1, 0.0)
    return StoredState(tasks=(task,), sessions=(("bob", Peer("h", 1, 2)),))


def test_after_a_restart_the_holder_keeps_its_task() -> None:
    """It is not given to anybody else; the holder's word under the old epoch counts."""
    bench = Bench(held_by_bob(), EPOCH + 1)
    bench.hello("cat", queues=(("default", 5),))
    assert bench.hello("bob", held=(("t1", (EPOCH << 32) + 1),)) == [("bob", Welcome(broker_epoch=EPOCH + 1))]
    assert bench.say("bob", TaskAck(id=1, task="t1", epoch=(EPOCH << 32) + 1)) == [("bob", Done(id=1))]


def test_after_a_restart_what_nobody_holds_is_offered() -> None:
    """Its holder is not among the sessions; also if the wall clock was put back since it got the task."""
    state = held_by_bob()
    for task in state.tasks:
        task.not_before = WALL + 50.0
    bench = Bench(StoredState(tasks=state.tasks), EPOCH + 1)
    [(to, _)] = bench.deliveries(bench.hello("cat", queues=(("default", 5),)))
    assert to == "cat"


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
    pending = task_row(2, 1, "k")
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
    assert bench.info("t9").order == 6


def test_a_held_task_without_a_session_is_pending() -> None:
    """Should the store know a holder but not its session, the task is free."""
    state = held_by_bob()
    bench = Bench(StoredState(tasks=state.tasks), EPOCH + 1)
    [(to, delivery)] = bench.deliveries(bench.hello("cat", queues=(("default", 1),)))
    assert (to, delivery.task) == ("cat", "t1")
    assert [task.id for task in bench.changes().tasks] == ["t1"]


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


@pytest.mark.parametrize(
    ("stored", "epoch", "asked"),
    [
        pytest.param(("bob",), EPOCH, True, id="it was here then and is here now"),
        pytest.param(("bob",), EPOCH - 1, False, id="it was not here then: somebody else may have had its name"),
        pytest.param((), EPOCH, False, id="it was given up then: somebody else may have had its name"),
    ],
)
def test_who_asks_again_after_a_restart(stored: tuple[str, ...], epoch: int, asked: bool) -> None:
    """A question is said again to the owner of its name only if nobody else can have been asked before."""
    peer = Peer("h", 1, 2)
    bench = Bench(epoch=EPOCH + 1, state=StoredState(sessions=tuple((name, peer) for name in stored)))
    bench.hello("ann")
    [(_, welcome)] = bench.hello("bob", identifiers=(("old", EPOCH - 1),), epoch=epoch)
    assert isinstance(welcome, Welcome)
    assert welcome.since == (0 if asked else EPOCH + 2), "from when on its name counts as its own"
    [(to, answer)] = bench.say("ann", ask(3, since=EPOCH, recipient="old"))
    assert to == ("bob" if asked else "ann")
    assert isinstance(answer, RpcDelivery if asked else Refused)
    assert [to for to, _ in bench.say("ann", ask(4, recipient="old"))] == ["bob"], "one that is new"


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


# --- edits of many tasks ---


@pytest.fixture
def many(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Five tasks, of which an edit does two at once."""
    monkeypatch.setattr(broker, "EDITED_AT_ONCE", 2)
    for number in range(1, 6):
        bench.say("ann", send(number, queue="q"))
    return bench


def test_an_edit_of_many_tasks_lets_others_have_their_turn(many: Bench) -> None:
    """It is answered at its end; said again meanwhile it does not begin again."""
    purge = TaskEdit(id=1, action="delete", queue="q")
    assert many.say("cat", purge) == []
    assert many.tasks() == ["t3", "t4", "t5"]
    assert many.core.due() <= many.now, "it goes on at once"
    assert many.say("ann", send(6, queue="q")) == [("ann", TaskStored(id=6, task="t6", stored=True))]
    assert many.take(many.core.go_on()) == []
    assert many.hello("cat") == [("cat", Welcome(broker_epoch=EPOCH))]
    assert many.say("cat", purge) == []
    assert many.take(many.core.go_on()) == [("cat", Edited(id=1, changed=5, held=0))]
    assert many.tasks() == ["t6"], "it was not there when the edit began"
    assert many.core.due() > many.now
    assert many.take(many.core.go_on()) == []
    assert many.say("cat", purge) == [("cat", Edited(id=1, changed=5, held=0))]


def test_what_became_of_a_task_meanwhile_counts(many: Bench) -> None:
    """One that is held by now is left alone, one that is over is not there, one that went elsewhere is not meant."""
    many.say("cat", TaskEdit(id=1, action="bury", queue="q", place="ready"))
    [(_, third), (_, fourth)] = many.deliveries(many.say("bob", TaskSubscribe(id=1, queue="q", credit=2)))
    many.say("bob", TaskSubscribe(id=2, queue="q", credit=0))
    many.say("bob", TaskAck(id=3, task=third.task, epoch=third.epoch))
    many.say("ann", TaskEdit(id=7, action="bury", tasks=("t5",)))
    many.take(many.core.go_on())
    assert many.take(many.core.go_on()) == [("cat", Edited(id=1, changed=2, held=0))]
    assert many.tasks("dead") == ["t1", "t2", "t5"]
    assert many.tasks("held") == [fourth.task]


def test_an_edit_ends_with_its_session(many: Bench) -> None:
    many.say("cat", TaskEdit(id=1, action="delete", queue="q"))
    many.say("cat", Goodbye(id=2))
    assert many.core.due() > many.now
    assert many.take(many.core.go_on()) == []
    assert many.tasks() == ["t3", "t4", "t5"]


def test_edits_of_many_tasks_have_a_bound(many: Bench) -> None:
    """Each keeps in mind what it has still to look at."""
    for number in range(broker.MAX_EDITS):
        assert many.say("cat", TaskEdit(id=number, action="requeue", queue="q")) == []
    assert isinstance(refusal(many.say("ann", TaskEdit(id=7, action="delete", queue="q"))), BusyError)
    assert many.say("ann", TaskEdit(id=8, action="delete", tasks=("t5",))) == [("ann", Edited(id=8, changed=1, held=0))]
    answers = [one for _ in range(20) for one in many.take(many.core.go_on())]
    assert answers == [("cat", Edited(id=number, changed=0, held=0)) for number in range(broker.MAX_EDITS)]


def test_an_edit_waits_while_the_disk_is_full(many: Bench) -> None:
    """What it would change could not be stored."""
    many.say("cat", TaskEdit(id=1, action="delete", queue="q"))
    many.core.hold_back = True
    assert many.take(many.core.go_on()) == []
    assert many.core.due() > many.now
    assert many.tasks() == ["t3", "t4", "t5"]
    many.core.hold_back = False
    assert many.core.due() <= many.now
