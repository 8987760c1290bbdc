"""Queues, one promise at a time: what goes in, who gets it, and when."""

from __future__ import annotations

import math
import random
import sqlite3
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import BusyError, DeadLetterError, ProtocolError, TaskDeletedError, UnknownResourceError
from prunus.messaging import broker, queues
from prunus.messaging.inventory import QueueLimits, TaskInfo
from prunus.messaging.messages import (
    BrokerMessage,
    Done,
    Edited,
    Heartbeat,
    Peer,
    QueueConfigure,
    ResourceConfigure,
    ResultSeen,
    TaskAck,
    TaskDelivery,
    TaskEdit,
    TaskNack,
    TaskSend,
    TaskStored,
    TaskSubscribe,
    TaskUnsubscribe,
    Unwelcome,
    Welcome,
    bytes_in_hello,
)
from prunus.messaging.queues import MAX_BACK_OFF_S, MAX_DEPTH, depth_of, needs_of, priority_of, urgency_of
from prunus.messaging.taskstore import TaskStore
from tests.messaging.test_broker import EPOCH, WALL, Bench, outcomes, refusal

Sends = list[tuple[str, BrokerMessage]]


class Floor(Bench):
    """A bench with numbered requests: ``ann`` sends, others take and settle."""

    def __init__(
        self, state: broker.StoredState | None = None, epoch: int = EPOCH, awaited: Iterable[str] = ()
    ) -> None:
        super().__init__(state, epoch)
        self.hello("ann", awaited=tuple(awaited))
        self.requests = 1000
        self.held: dict[str, TaskDelivery] = {}

    def next(self) -> int:
        self.requests += 1
        return self.requests

    def take(self, effects: list[broker.Effect]) -> Sends:
        sends = super().take(effects)
        for _, delivery in self.deliveries(sends):
            self.held[delivery.task] = delivery
        return sends

    def add(self, task: str, **fields: object) -> Sends:
        fields.setdefault("queue", "q")
        return self.say("ann", TaskSend(id=self.next(), task=task, body=task.encode(), **fields))  # type: ignore[arg-type]

    def worker(self, name: str, credit: int = 1, subject: str | None = None, queue: str = "q") -> list[tuple[str, str]]:
        if name not in self.core.sessions():
            self.hello(name)
        return self.given(self.say(name, TaskSubscribe(id=self.next(), queue=queue, credit=credit, subject=subject)))

    def given(self, sends: Sends) -> list[tuple[str, str]]:
        """(session, task) of each delivery."""
        return [(session, delivery.task) for session, delivery in self.deliveries(sends)]

    def holder(self, task: str) -> str:
        holder = self.info(task).holder
        assert holder is not None
        return holder

    def ack(self, task: str, outcome: bytes | None = None) -> Sends:
        message = TaskAck(id=self.next(), task=task, epoch=self.held[task].epoch, outcome=outcome)
        return self.say(self.holder(task), message)

    def nack(self, task: str, reason: str = "", *, attempted: bool = True) -> Sends:
        epoch = self.held[task].epoch
        message = TaskNack(id=self.next(), task=task, epoch=epoch, reason=reason, attempted=attempted)
        return self.say(self.holder(task), message)

    def edit(self, action: str, *tasks: str, **where: object) -> tuple[int, int, Sends]:
        """Changed, held, and what else was said."""
        sends = self.say("ann", TaskEdit(id=self.next(), action=action, tasks=tasks, **where))  # type: ignore[arg-type]
        [edited] = [one for _, one in sends if isinstance(one, Edited)]
        return edited.changed, edited.held, [one for one in sends if one[1] is not edited]

    def limit(self, queue: str = "q", **limits: object) -> Sends:
        message = QueueConfigure(id=self.next(), queue=queue, limits=QueueLimits(**limits))  # type: ignore[arg-type]
        return self.say("ann", message)

    def tokens(self, resource: str, capacity: int | None) -> Sends:
        return self.say("ann", ResourceConfigure(id=self.next(), resource=resource, capacity=capacity))

    def pass_time(self, seconds: float, step: float = 1.0) -> Sends:
        """Everybody lives meanwhile."""
        sends: Sends = []
        end = self.now + seconds
        while self.now < end - 1e-9:
            sends += self.wait(min(step, end - self.now))
            for name, one in self.core.statistics().sessions.items():
                if one.connected:
                    self.say(name, Heartbeat())
        return sends


@pytest.fixture
def floor() -> Floor:
    return Floor()


# --- order ---


def test_the_highest_priority_first_and_the_oldest_within_one(floor: Floor) -> None:
    """0 to 9; within one the order in which they were accepted, whatever their subjects."""
    for number, priority in enumerate((0, 9, 3, 9, 0, 3)):
        floor.add(f"{priority}.{number}", priority=priority, subject=str(number % 2))
    given = floor.worker("bob", 10)
    assert [task for _, task in given] == ["9.1", "9.3", "3.2", "3.5", "0.0", "0.4"]


def test_of_one_priority_the_deepest_first(floor: Floor) -> None:
    """Inner before outer, so that trees finish; the priority goes before the depth, and the age comes after it."""
    for number, (priority, depth) in enumerate(((0, 0), (0, 2), (0, 1), (0, 2), (1, 0), (0, 300), (0, 255))):
        name = f"{priority}.{depth}.{number}"
        floor.take(floor.core.put(f"broker:{name}", "q", name, b"", priority, depth))
    assert (floor.info("broker:0.300.5").priority, floor.info("broker:1.0.4").priority) == (0, 1)
    given = [task.removeprefix("broker:") for _, task in floor.worker("bob", 10)]
    assert given == ["1.0.4", "0.300.5", "0.255.6", "0.2.1", "0.2.3", "0.1.2", "0.0.0"]


@given(st.integers(0, 9), st.integers(0, 1000))
def test_an_urgency_is_a_priority_and_a_depth(priority: int, depth: int) -> None:
    """Both can be told from it, the depth as far as it counts."""
    urgency = urgency_of(priority, depth)
    assert (priority_of(urgency), depth_of(urgency)) == (priority, min(depth, MAX_DEPTH))
    assert 0 <= urgency < 10 * (MAX_DEPTH + 1)


def test_the_roomiest_gets_the_next_one(floor: Floor) -> None:
    """Most free credit first; of equals the one that was served longest ago."""
    floor.worker("bob", 3)
    floor.worker("cat", 2)
    given = [floor.given(floor.add(f"t{number}"))[0][0] for number in range(5)]
    assert given == ["bob", "cat", "bob", "cat", "bob"]
    floor.ack("t1")
    assert floor.given(floor.add("t5")) == [("cat", "t5")]


def test_nobody_gets_more_than_its_credit(floor: Floor) -> None:
    """Also when it is lowered; and an acknowledgement makes room for one."""
    floor.worker("bob", 2)
    for number in range(5):
        floor.add(f"t{number}")
    assert floor.tasks("held") == ["t0", "t1"]
    floor.worker("bob", 1)
    assert floor.given(floor.ack("t0")) == []
    assert floor.given(floor.ack("t1")) == [("bob", "t2")]


# --- subjects ---


def test_a_subscription_sees_only_its_subjects(floor: Floor) -> None:
    """``*`` stays within a word, ``#`` does not; without a pattern everything matches, also what has no subject."""
    for subject in ("a.b", "a.b.c", "x", None):
        floor.add(str(subject), subject=subject)
    assert floor.worker("star", 9, "a.*") == [("star", "a.b")]
    assert floor.worker("hash", 9, "a.#") == [("hash", "a.b.c")]
    assert floor.worker("all", 9) == [("all", "x"), ("all", "None")]
    assert floor.held["a.b"].pattern == "a.*"
    assert floor.held["x"].pattern is None


def test_each_subscription_of_a_session_has_its_own_credit(floor: Floor) -> None:
    """One with a full pattern takes nothing more for it, but goes on for another."""
    floor.worker("bob", 1, "a")
    floor.worker("bob", 1, "b")
    given = [floor.given(floor.add(f"{subject}{number}", subject=subject)) for number in (1, 2) for subject in "ab"]
    assert given == [[("bob", "a1")], [("bob", "b1")], [], []]
    assert floor.given(floor.ack("b1")) == [("bob", "b2")]
    assert floor.given(floor.say("bob", TaskUnsubscribe(id=floor.next(), queue="q", subject="a"))) == []
    assert floor.given(floor.ack("a1")) == []


def test_a_task_that_nobody_wants_is_in_nobodys_way(floor: Floor) -> None:
    """No head-of-line blocking: others pass it, whatever its priority."""
    floor.add("unwanted", subject="x", priority=9)
    floor.add("wanted", subject="y")
    assert floor.worker("bob", 1, "y") == [("bob", "wanted")]


def test_what_two_patterns_match_is_given_once(floor: Floor) -> None:
    """To the roomier of both; and when that one is full, to the other."""
    floor.worker("bob", 1, "a.*")
    floor.worker("cat", 2, "#")
    given = [floor.given(floor.add(f"t{number}", subject="a.b")) for number in range(4)]
    assert given == [[("cat", "t0")], [("bob", "t1")], [("cat", "t2")], []]
    assert floor.given(floor.ack("t1")) == [("bob", "t3")]


def test_a_session_holds_no_more_than_it_can_say(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever subscription and credit; when it has done one it gets the next of any. Others are not concerned."""
    monkeypatch.setattr(queues, "MAX_HELD_BYTES", 2 * bytes_in_hello("a1"))
    for queue in ("a", "b", "c"):
        floor.worker("bob", 10, queue=queue)
    given = [floor.given(floor.add(task, queue=task[0])) for task in ("a1", "b1", "a2", "c1", "b2")]
    assert given == [[("bob", "a1")], [("bob", "b1")], [], [], []]
    assert floor.core.statistics().sessions["bob"].credit == 0
    assert [len(floor.given(floor.ack(task))) for task in ("a1", "b1")] == [1, 1], "also those of other queues"
    assert len(floor.tasks("held")) == 2
    assert floor.worker("cat", 10, queue="a") + floor.worker("cat", 10, queue="b") + floor.worker("cat", 10, queue="c")
    assert floor.tasks("ready") == []
    for task in floor.tasks("held"):
        floor.ack(task)
    assert floor.tasks() == []
    assert floor.core.statistics().sessions["bob"].credit == 30


@pytest.mark.parametrize("shared", [False, True])
def test_a_full_session_gets_what_it_has_room_for_again(
    floor: Floor, monkeypatch: pytest.MonkeyPatch, *, shared: bool
) -> None:
    """Also if that waits in another queue than the one in which it has done something, or if it unsubscribed there."""
    monkeypatch.setattr(queues, "MAX_HELD_BYTES", bytes_in_hello("a1"))
    floor.hello("bob", queues=(("a", 10), ("b", 10)), shared=(("a", None), ("b", None)) if shared else ())
    assert floor.given(floor.add("a1", queue="a")) == [("bob", "a1")]
    assert floor.given(floor.add("b1", queue="b")) == []
    floor.say("bob", TaskUnsubscribe(id=floor.next(), queue="a"))
    assert floor.given(floor.ack("a1")) == [("bob", "b1")]
    assert floor.given(floor.add("b2", queue="b")) == []
    assert floor.given(floor.nack("b1", attempted=False)) == [("bob", "b2")]


def test_a_dispatch_does_not_look_at_what_waits(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 500 subjects that nobody wants, a delivery asks no more lanes than with none."""
    looked = 0
    head = queues._Lane.head

    def counted(lane: queues._Lane) -> queues.Task | None:
        nonlocal looked
        looked += 1
        return head(lane)

    floor.worker("bob", 1, "wanted")
    monkeypatch.setattr(queues._Lane, "head", counted)

    def cost(task: str) -> int:
        nonlocal looked
        before = looked
        [(_, delivery)] = floor.deliveries(floor.add(task, subject="wanted"))
        floor.say("bob", TaskAck(id=floor.next(), task=task, epoch=delivery.epoch))
        return looked - before

    cost("warm")
    alone = cost("first")
    for number in range(500):
        floor.add(f"u{number}", subject=f"unwanted.{number}")
    assert cost("second") == alone


# --- times ---


def test_a_delayed_task_waits_for_its_time(floor: Floor) -> None:
    """By the wall clock, looked at at least once a second; meanwhile later ones pass it."""
    floor.worker("bob", 9)
    floor.add("later", not_before=WALL + 5)
    assert floor.given(floor.add("now")) == [("bob", "now")]
    info = floor.info("later")
    assert (info.place, info.due_at) == ("delayed", WALL + 5)
    assert floor.given(floor.pass_time(4.0)) == []
    assert floor.given(floor.pass_time(1.0)) == [("bob", "later")]


@pytest.mark.parametrize(("field", "place"), [("not_before", "ready"), ("expires_at", "dead")])
def test_times_are_kept_to_the_moment(field: str, place: str, floor: Floor) -> None:
    """The broker is awake when a task is due or expires, not up to a second later."""
    floor.pass_time(1.0)
    floor.add("a", **{field: floor.core.wall + 0.25})
    assert floor.core.due() == pytest.approx(floor.now + 0.25)
    floor.wait(0.25)
    assert floor.info("a").place == place
    assert floor.core.due() == floor.now + 1.0


def test_a_delayed_task_follows_the_wall_clock_when_it_jumps(floor: Floor) -> None:
    """Forwards: due at the next tick. Backwards: it waits longer."""
    floor.worker("bob", 9)
    floor.add("a", not_before=WALL + 3600)
    floor.core.wall += 3600
    assert floor.core.due() <= floor.now + 1.0
    assert floor.given(floor.wait(0.5)) == [("bob", "a")]
    floor.add("b", not_before=floor.core.wall + 2)
    floor.core.wall -= 3600
    assert floor.given(floor.pass_time(10.0)) == []


def test_an_expired_task_is_a_dead_letter(floor: Floor) -> None:
    """Pending, delayed or blocked; who waits for it is told; a held one is safe however long it takes."""
    floor.worker("bob", 1)
    floor.add("held", expires_at=WALL + 5, key="k")
    floor.add("ready", expires_at=WALL + 5, want_result=True)
    floor.add("delayed", expires_at=WALL + 5, not_before=WALL + 9)
    floor.add("blocked", expires_at=WALL + 5, key="k")
    floor.add("lasting")
    told = outcomes(floor.pass_time(6.0))
    assert floor.tasks("dead") == ["ready", "delayed", "blocked"]
    [(to, task, error)] = told
    assert (to, task) == ("ann", "ready")
    assert isinstance(error, DeadLetterError)
    assert error.reason == queues.EXPIRED
    assert floor.ack("held")[0][1] == Done(id=floor.requests)


def test_a_task_that_expired_meanwhile_is_not_given(floor: Floor) -> None:
    """Even before the clock is looked at again; one that comes back too late is dead too."""
    floor.add("a", expires_at=WALL + 1)
    floor.core.wall += 2
    assert floor.worker("bob", 1) == []
    assert floor.tasks("dead") == ["a"]
    floor.add("b", expires_at=floor.core.wall + 1)
    floor.core.wall += 2
    floor.nack("b")
    assert floor.tasks("dead") == ["a", "b"]


def test_no_task_expires_by_itself(floor: Floor) -> None:
    """A task in progress for 30 days is as safe as one of 30 ms, and so is a pending one."""
    floor.worker("bob", 1)
    floor.add("held")
    floor.add("pending")
    floor.core.wall += 30 * 86_400
    floor.pass_time(20.0)
    assert floor.tasks("dead") == []
    assert floor.given(floor.ack("held")) == [("bob", "pending")]


# --- keys ---


def test_a_second_task_of_a_key_joins_the_pending_one(floor: Floor) -> None:
    """Its sender gets that one's result; another queue has its own."""
    floor.add("a", key="k", want_result=True)
    floor.hello("cat")
    joined = TaskSend(id=1, task="b", body=b"", queue="q", key="k", want_result=True)
    assert floor.say("cat", joined) == [("cat", TaskStored(id=1, task="a", stored=False))]
    floor.add("c", key="k", queue="other")
    floor.worker("bob", 1)
    assert outcomes(floor.ack("a", b"42")) == [("ann", "a", b"42"), ("cat", "a", b"42")]


def test_a_later_task_replaces_the_pending_one(floor: Floor) -> None:
    """It takes over its place and priority, whatever its own is; who waits for the old one is told, until he has seen
    it."""
    floor.add("first", priority=3)
    floor.add("old", key="k", priority=3, want_result=True)
    floor.add("last", priority=3)
    order = floor.info("old").order
    told = floor.add("new", key="k", replace=True, priority=9)
    assert ("ann", TaskStored(id=floor.requests, task="new", stored=True)) in told
    [(to, task, error)] = outcomes(told)
    assert (to, task) == ("ann", "old")
    assert isinstance(error, TaskDeletedError)
    assert error.reason == "replaced by a later task with its key"
    assert (floor.info("new").order, floor.info("new").priority) == (order, 3)
    again = outcomes(floor.hello("ann", awaited=("old",)))
    assert [one[1] for one in again] == ["old"]
    assert floor.tasks() == ["first", "new", "last", "old"]
    floor.say("ann", ResultSeen(task="old"))
    assert [task for _, task in floor.worker("bob", 9)] == ["first", "new", "last"]
    assert floor.held["new"].body == b"new"


@pytest.mark.parametrize("place", ["ready", "delayed", "blocked"])
def test_whatever_a_pending_task_waits_for_it_can_be_replaced(floor: Floor, place: str) -> None:
    """One row takes the place of another, and only the new one is done."""
    if place == "blocked":
        floor.worker("bob", 1)
        floor.add("holder", key="k")
    floor.add("old", key="k", not_before=WALL + 100 if place == "delayed" else 0.0)
    assert floor.info("old").place == place
    floor.add("new", key="k", replace=True)
    assert "old" not in floor.tasks()
    if place == "blocked":
        assert floor.given(floor.ack("holder")) == [("bob", "new")]
    else:
        assert floor.worker("bob", 9) == [("bob", "new")]
    floor.changes()


def test_a_task_whose_key_is_held_waits_behind_it(floor: Floor) -> None:
    """In any queue, with join and with replace; the holder's end frees the key."""
    floor.worker("bob", 5)
    floor.worker("bob", 5, queue="other")
    floor.add("a", key="k")
    for task, queue, replace in (("b", "q", False), ("c", "other", True)):
        assert floor.given(floor.add(task, key="k", queue=queue, replace=replace)) == []
        assert floor.info(task).place == "blocked"
    [(_, one)] = floor.given(floor.ack("a"))
    [(_, two)] = floor.given(floor.ack(one))
    assert {one, two} == {"b", "c"}


def test_a_dead_task_has_no_key(floor: Floor) -> None:
    """Another with its key is accepted; and while that one is pending the dead one can't be requeued."""
    floor.add("a", key="k")
    floor.edit("bury", "a")
    assert not floor.core.has_task("k")
    floor.add("b", key="k")
    assert floor.edit("requeue", "a")[:2] == (0, 0)
    assert floor.tasks("dead") == ["a"]
    floor.edit("delete", "b")
    assert floor.edit("requeue", "a")[:2] == (1, 0)
    assert floor.core.has_task("k")


# --- attempts and dead letters ---


def test_after_max_attempts_a_task_is_dead_with_the_last_reason(floor: Floor) -> None:
    """Each rejection counts; who waits gets `DeadLetterError`, also after a reconnection, until he has seen it."""
    floor.worker("bob", 1)
    floor.add("a", max_attempts=2, want_result=True)
    assert outcomes(floor.nack("a", "no disk")) == []
    assert floor.info("a").reason == "no disk"
    floor.pass_time(1.0, 0.1)
    [(to, task, error)] = outcomes(floor.nack("a", "no memory"))
    assert (to, task) == ("ann", "a")
    assert isinstance(error, DeadLetterError)
    assert error.reason == "no memory"
    assert floor.tasks("dead") == ["a"]
    assert [one[1] for one in outcomes(floor.hello("ann", awaited=("a",)))] == ["a"]
    floor.say("ann", ResultSeen(task="a"))
    assert outcomes(floor.hello("ann")) == []
    assert floor.tasks("dead") == ["a"]


def test_a_lost_worker_costs_an_attempt(floor: Floor) -> None:
    """And the reason says how often that happened."""
    floor.add("a", max_attempts=3)
    for _ in range(3):
        floor.worker("bob", 1)
        floor.take(floor.core.expired("bob"))
    info = floor.info("a")
    assert (info.place, info.attempt, info.reason) == ("dead", 3, "its worker was lost 3 times")


def test_what_nobody_tried_does_not_count(floor: Floor) -> None:
    """A receiver without room, and a delivery that never arrived: the task has all its attempts."""
    floor.worker("bob", 1)
    floor.add("a", max_attempts=1)
    floor.nack("a", "no room", attempted=False)
    assert floor.info("a").place == "delayed"
    floor.pass_time(1.0)
    assert floor.info("a").attempt == 1
    floor.hello("bob", queues=(("q", 1),))
    assert (floor.info("a").place, floor.info("a").attempt) == ("held", 1)
    floor.nack("a", "broken")
    assert floor.tasks("dead") == ["a"]


def test_without_max_attempts_there_is_no_end(floor: Floor) -> None:
    """It comes back for ever, ever slower."""
    floor.worker("bob", 1)
    floor.add("a")
    for _ in range(12):
        floor.nack("a")
        floor.pass_time(5.0)
    assert (floor.info("a").place, floor.info("a").attempt) == ("held", 13)


def test_a_task_that_all_reject_is_not_offered_in_a_hot_loop(floor: Floor) -> None:
    """Among two workers too: after each rejection there is a pause, and others are given out meanwhile."""
    floor.worker("bob", 1)
    floor.worker("cat", 1)
    floor.add("a")
    assert floor.given(floor.nack("a")) == []
    assert floor.given(floor.add("b")) != []
    assert floor.given(floor.nack("b")) == []
    assert floor.core.due() == pytest.approx(floor.now + queues.BACK_OFF_S)


def test_a_requeued_dead_letter_is_as_new(floor: Floor) -> None:
    """No attempt, no reason, no date of expiry; in its old place."""
    floor.worker("bob", 1)
    floor.add("a", max_attempts=1, expires_at=WALL + 1)
    floor.nack("a", "broken")
    floor.add("b")
    floor.add("c")
    floor.pass_time(5.0)
    changed, held, _ = floor.edit("requeue", queue="q", place="dead")
    assert (changed, held) == (1, 0)
    info = floor.info("a")
    assert (info.place, info.attempt, info.reason, info.expires_at) == ("ready", 0, None, None)
    assert floor.given(floor.ack("b")) == [("bob", "a")]
    assert floor.held["a"].attempt == 1


# --- editing ---


def test_what_can_be_done_to_which_task(floor: Floor) -> None:
    """A table of actions and places; a held one is left to its holder."""
    floor.worker("bob", 1)

    def one_of_each() -> None:
        floor.add("held", key="h")
        floor.add("ready")
        floor.add("delayed", not_before=WALL + 100)
        floor.add("blocked", key="h")
        floor.add("dead")
        floor.edit("bury", "dead")

    names = ("held", "ready", "delayed", "blocked", "dead")
    possible = {
        "requeue": {"delayed", "dead"},
        "bury": {"ready", "delayed", "blocked"},
        "delete": {"ready", "delayed", "blocked", "dead"},
    }
    for action, good in possible.items():
        one_of_each()
        assert {name: floor.info(name).place for name in names} == {name: name for name in names}
        assert {name: floor.edit(action, name)[:2] for name in names} == {
            name: (int(name in good), int(name == "held")) for name in names
        }
        floor.edit("delete", queue="q")
        floor.ack("held")
        floor.edit("delete", queue="q")
        assert floor.tasks() == []


def test_who_waits_for_a_deleted_task_is_told(floor: Floor) -> None:
    """`TaskDeletedError`, also after a reconnection; then it is forgotten."""
    floor.add("a", want_result=True)
    _, _, told = floor.edit("delete", "a", "a", "unknown")
    [(to, task, error)] = outcomes(told)
    assert (to, task) == ("ann", "a")
    assert isinstance(error, TaskDeletedError)
    assert [one[1] for one in outcomes(floor.hello("ann", awaited=("a",)))] == ["a"]
    floor.say("ann", ResultSeen(task="a"))
    assert floor.tasks() == []


def test_an_edit_said_again_is_done_once(floor: Floor) -> None:
    """It gets the answer of the first time."""
    floor.add("a")
    edit = TaskEdit(id=5000, action="bury", tasks=("a",))
    assert floor.say("ann", edit) == [("ann", Edited(id=5000, changed=1))]
    floor.edit("requeue", "a")
    assert floor.say("ann", edit) == [("ann", Edited(id=5000, changed=1))]
    assert floor.tasks("ready") == ["a"]


def test_an_edit_of_nothing_in_particular_does_nothing(floor: Floor) -> None:
    """Without a name, a queue or a place: that can't be meant."""
    floor.add("a")
    assert floor.edit("delete")[:2] == (0, 0)


def test_many_edits_leave_nothing_behind(floor: Floor) -> None:
    """However often a task is buried and requeued, what is kept for it stays small."""
    for number in range(20):
        floor.add(f"t{number}")
    for _ in range(200):
        floor.edit("bury", queue="q")
        floor.edit("requeue", queue="q", place="dead")
    queue = floor.core._queues._queues["q"]
    assert sum(len(lane.came) + len(lane.came_back) for lane in queue.lanes.values()) <= 200
    assert len(queue.all) <= 200
    assert [task for _, task in floor.worker("bob", 99)] == [f"t{number}" for number in range(20)]


def test_outlets_that_nobody_serves_do_not_grow(floor: Floor) -> None:
    """A subscription without credit sees heads pass by; and credit that comes and goes leaves no trail."""
    floor.worker("idle", 0, "a*")
    floor.worker("bob", 1)
    for number in range(500):
        floor.add(f"t{number}", subject="a", expires_at=WALL + 1e6)
        floor.ack(f"t{number}")
    queue = floor.core._queues._queues["q"]
    for outlet in queue.outlets.values():
        assert sum(len(heads) for heads in outlet.heads.values()) <= 200
        assert len(outlet.room) <= 200
    assert len(floor.core._queues._expiring._heap) <= 200
    assert len(queue.all) <= 200


# --- limits ---


def test_concurrency_of_a_queue(floor: Floor) -> None:
    """At most so many are held, by all sessions together; changed while it runs; 0 stops the queue."""
    floor.limit(concurrency=2)
    floor.worker("bob", 5)
    floor.worker("cat", 5)
    for number in range(6):
        floor.add(f"t{number}")
    assert floor.tasks("held") == ["t0", "t1"]
    assert len(floor.given(floor.ack("t0"))) == 1
    assert len(floor.given(floor.limit(concurrency=3))) == 1
    assert floor.given(floor.limit(concurrency=0)) == []
    assert floor.given(floor.ack("t1")) == []
    assert len(floor.given(floor.limit())) == 2
    assert floor.given(floor.add("elsewhere", queue="free")) == []
    assert floor.worker("bob", 1, queue="free") == [("bob", "elsewhere")]


def test_rate_of_a_queue(floor: Floor) -> None:
    """A token bucket: `burst` at once, then `rate_per_s`; the core says when it has to look again."""
    floor.limit(rate_per_s=2.0, burst=3)
    for number in range(10):
        floor.add(f"t{number}")
    assert len(floor.worker("bob", 99)) == 3
    assert floor.core.due() == pytest.approx(floor.now + 0.5)
    assert len(floor.given(floor.pass_time(0.5, 0.5))) == 1
    assert len(floor.given(floor.pass_time(2.0, 0.5))) == 4
    floor.edit("delete", queue="q")
    floor.pass_time(60.0)
    for number in range(10):
        floor.add(f"u{number}")
    assert len([task for task in floor.tasks("held") if task.startswith("u")]) == 3


def test_a_change_of_limits_gives_no_deliveries_away(floor: Floor) -> None:
    """What may be given at once is what was left, up to the new burst; only a first rate begins with all of it."""
    floor.worker("bob", 99)
    floor.limit(concurrency=50)
    floor.pass_time(10.0)
    floor.limit(rate_per_s=0.1, burst=5)
    for number in range(30):
        floor.add(f"t{number}")
    assert len(floor.tasks("held")) == 5
    assert floor.given(floor.limit(rate_per_s=0.1, burst=5, max_length=100)) == []
    assert floor.given(floor.limit(rate_per_s=0.1, burst=9)) == []
    assert len(floor.given(floor.pass_time(10.0))) == 1
    floor.pass_time(5.0)
    assert floor.given(floor.limit(rate_per_s=0.5, burst=9)) == [], "half a token was there, and stays"
    assert len(floor.given(floor.pass_time(1.0))) == 1
    floor.limit(rate_per_s=0.5, burst=9, concurrency=0)
    floor.pass_time(60.0)
    assert len(floor.given(floor.limit(rate_per_s=0.5, burst=2))) == 2, "nine were there, two are allowed"
    floor.limit()
    assert len(floor.tasks("held")) == 30


def test_length_of_a_queue(floor: Floor) -> None:
    """Too much is refused to its sender alone; what joins, what replaces and what is dead does not count."""
    floor.limit(max_length=2)
    floor.add("a", key="k")
    floor.add("b")
    error = refusal(floor.add("c"))
    assert isinstance(error, BusyError)
    assert "'q'" in error.reason
    assert floor.add("d", key="k")[0][1] == TaskStored(id=floor.requests, task="a", stored=False)
    assert floor.add("e", key="k", replace=True)[0][1] == TaskStored(id=floor.requests, task="e", stored=True)
    floor.add("other", queue="r")
    floor.edit("bury", "b")
    assert isinstance(floor.add("f")[0][1], TaskStored)
    assert floor.take(floor.core.put("own", "q", None, b"", 0)) == []
    assert "own" in floor.tasks("ready"), "the broker's own tasks are never refused"


@pytest.mark.parametrize(
    "limits",
    [
        {"concurrency": -1},
        {"max_length": -1},
        {"rate_per_s": 0.0},
        {"rate_per_s": math.nan},
        {"rate_per_s": math.inf},
        {"burst": 0},
    ],
)
def test_limits_that_make_no_sense(floor: Floor, limits: dict[str, object]) -> None:
    """Refused with what is wrong; nothing is changed."""
    floor.limit(concurrency=1)
    floor.changes()
    assert isinstance(refusal(floor.limit(**limits)), ProtocolError)
    assert not floor.changes()


def test_what_is_configured_lasts(floor: Floor) -> None:
    """It is stored, and taken back as well."""
    floor.limit(concurrency=1)
    floor.tokens("gpu", 2)
    changes = floor.changes()
    assert (changes.limits, changes.resources) == ({"q": QueueLimits(concurrency=1)}, {"gpu": 2})
    again = Bench(broker.StoredState(limits=changes.limits, resources=changes.resources))
    statistics = again.core.statistics()
    assert statistics.queues["q"].limits == QueueLimits(concurrency=1)
    assert statistics.resources["gpu"].capacity == 2


# --- resources ---


def test_tokens_of_a_resource(floor: Floor) -> None:
    """Taken while the task is held, across queues; what needs none passes what waits for some."""
    floor.tokens("gpu", 2)
    floor.worker("bob", 9)
    floor.worker("bob", 9, queue="r")
    floor.add("a", resources=(("gpu", 2),), priority=9)
    floor.add("b", resources=(("gpu", 1),), priority=9)
    floor.add("c", resources=(("gpu", 1),), queue="r")
    floor.add("d")
    assert floor.tasks("held") == ["a", "d"]
    gpu = floor.core.statistics().resources["gpu"]
    assert (gpu.capacity, gpu.taken, gpu.waiting) == (2, 2, 2)
    assert {task for _, task in floor.given(floor.ack("a"))} == {"b", "c"}


def test_a_big_task_does_not_hide_a_small_one(floor: Floor) -> None:
    """Tokens that do not suffice for the first are given to the next."""
    floor.tokens("gpu", 2)
    floor.worker("bob", 9)
    floor.add("one", resources=(("gpu", 1),))
    floor.add("two", resources=(("gpu", 2),))
    assert floor.given(floor.add("three", resources=(("gpu", 1),))) == [("bob", "three")]
    assert floor.given(floor.ack("one")) == []
    assert floor.given(floor.ack("three")) == [("bob", "two")]


@pytest.mark.parametrize("end", ["ack", "nack", "lost", "unheard"])
def test_no_token_is_lost(floor: Floor, end: str) -> None:
    """However a task ends or comes back, its tokens are free again."""
    floor.tokens("gpu", 1)
    floor.worker("bob", 1)
    floor.add("a", resources=(("gpu", 1),), max_attempts=1)
    match end:
        case "ack":
            floor.ack("a")
        case "nack":
            floor.nack("a")
        case "lost":
            floor.take(floor.core.expired("bob"))
        case "unheard":
            floor.hello("bob")
    assert floor.core.statistics().resources["gpu"].taken == 0


@pytest.mark.parametrize(("capacity", "wanted"), [(None, 1), (2, 3)])
def test_tokens_that_will_never_be_there(floor: Floor, capacity: int | None, wanted: int) -> None:
    """Refused at once, with what is there."""
    if capacity is not None:
        floor.tokens("gpu", capacity)
    error = refusal(floor.add("a", resources=(("gpu", wanted),)))
    assert isinstance(error, UnknownResourceError)
    assert error.facts() == {"resource": "gpu", "wanted": wanted, "capacity": capacity}


def test_tokens_can_be_changed_while_it_runs(floor: Floor) -> None:
    """More free what waits; fewer let go on what is held; none at all: what waits goes on waiting until there are some
    again, and nobody may ask for it."""
    floor.tokens("gpu", 1)
    floor.worker("bob", 9)
    for task in "abcd":
        floor.add(task, resources=(("gpu", 1),))
    assert floor.given(floor.tokens("gpu", 2)) == [("bob", "b")]
    assert floor.given(floor.tokens("gpu", 1)) == []
    assert floor.given(floor.ack("a")) == []
    assert floor.given(floor.tokens("gpu", None)) == []
    assert floor.given(floor.ack("b")) == []
    assert isinstance(refusal(floor.add("e", resources=(("gpu", 1),))), UnknownResourceError)
    assert floor.core.statistics().resources["gpu"].waiting == 2
    assert floor.given(floor.tokens("gpu", 9)) == [("bob", "c"), ("bob", "d")]


def test_the_brokers_own_tasks_wait_for_tokens_that_nobody_configured(floor: Floor) -> None:
    """They are taken whatever there is, and given as soon as there is enough."""
    floor.worker("bob", 9)
    assert floor.take(floor.core.put("broker:1", "q", "p", b"", 0, needs=(("gpu", 2),))) == []
    floor.tokens("gpu", 1)
    assert floor.tasks("ready") == ["broker:1"]
    assert floor.given(floor.tokens("gpu", 2)) == [("bob", "broker:1")]
    assert floor.core.statistics().resources["gpu"].taken == 2


def test_a_resource_that_nobody_needs_any_more_is_forgotten(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a trace where tasks are looked for: the next one is given as if it had never been."""
    monkeypatch.setattr(queues, "MAX_NEEDS", 1)
    floor.worker("bob", 9)
    for name in ("gpu", "cpu"):
        floor.tokens(name, 1)
        floor.add(name, resources=((name, 1),))
        floor.ack(name)
    floor.tokens("gpu", None)
    assert floor.given(floor.add("next")) == [("bob", "next")]
    assert list(floor.core.statistics().resources) == ["cpu"]


def test_needs_have_one_form() -> None:
    """Order and repetition make no difference; none is none."""
    assert needs_of((("b", 1), ("a", 2), ("b", 1), ("c", 0))) == (("a", 2), ("b", 2))


# --- bounds ---


def test_subjects_and_needs_have_a_bound(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused to its sender; what is there goes on, and makes room."""
    monkeypatch.setattr(queues, "MAX_LANES", 3)
    monkeypatch.setattr(queues, "MAX_NEEDS", 2)
    floor.tokens("gpu", 9)
    for subject in "abc":
        floor.add(subject, subject=subject)
    assert isinstance(refusal(floor.add("d", subject="d")), BusyError)
    assert isinstance(floor.add("a2", subject="a")[0][1], TaskStored)
    floor.worker("bob", 2)
    floor.ack("a")
    assert isinstance(floor.add("d", subject="d")[0][1], TaskStored)
    floor.edit("delete", queue="q")
    for number in (1, 2):
        assert isinstance(floor.add(f"gpu{number}", resources=(("gpu", number),))[0][1], TaskStored)
    assert isinstance(refusal(floor.add("gpu3", resources=(("gpu", 3),))), BusyError)
    floor.edit("delete", "gpu1")
    assert isinstance(floor.add("gpu3", resources=(("gpu", 3),))[0][1], TaskStored)


def test_queues_and_resources_have_a_bound(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that are configured."""
    monkeypatch.setattr(queues, "MAX_CONFIGURED_QUEUES", 1)
    monkeypatch.setattr(queues, "MAX_RESOURCES", 1)
    for configure in (
        lambda name: floor.limit(name, concurrency=1),
        lambda name: floor.tokens(name, 1),
    ):
        assert configure("a") == [("ann", Done(id=floor.requests))]
        assert configure("a") == [("ann", Done(id=floor.requests))]
        assert isinstance(refusal(configure("b")), BusyError)


def test_the_number_of_queues_has_a_bound(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused to whoever sends to it, subscribes to it or configures it; all others go on, and what nobody
    uses makes room."""
    floor.add("a", queue="a")
    floor.worker("bob", 1, queue="b")
    floor.limit("c", concurrency=1)
    monkeypatch.setattr(queues, "MAX_QUEUES", 3)
    floor.changes()
    for said in (
        floor.add("d", queue="d"),
        floor.say("bob", TaskSubscribe(id=floor.next(), queue="d", credit=1)),
        floor.limit("d", concurrency=1),
    ):
        error = refusal(said)
        assert isinstance(error, BusyError)
        assert "'d' would be too many: the broker has 3 (up to 3)" in error.reason
    for stated in ({"queues": (("a", 1), ("d", 1))}, {"filtered": (("d", "s", 1),)}):
        [(_, unwelcome)] = floor.hello("cat", **stated)
        assert isinstance(unwelcome, Unwelcome)
        error = unwelcome.failure.to_exception()
        assert isinstance(error, BusyError)
        assert "'d' would be too many" in error.reason
    assert not floor.changes()
    assert "cat" not in floor.core.sessions()
    assert sorted(floor.core.statistics().queues) == ["a", "b", "c"]
    for queue in "abc":
        assert isinstance(floor.add(f"{queue}2", queue=queue)[0][1], TaskStored)
    assert isinstance(floor.hello("cat", queues=(("c", 1),))[0][1], Welcome)
    floor.edit("delete", "a", "a2")
    floor.pass_time(0.1)
    assert isinstance(floor.add("d", queue="d")[0][1], TaskStored)
    assert sorted(floor.core.statistics().queues) == ["b", "c", "d"]
    floor.take(floor.core.put("broker:own", "e", None, b"", 0))
    assert "broker:own" in floor.tasks("ready"), "the broker's own tasks are never refused"
    with pytest.raises(BusyError):
        floor.core.check_room("f", ())


def test_the_names_of_queues_have_a_bound(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all together, as they are written in JSON; what is forgotten does not count any more."""
    monkeypatch.setattr(queues, "MAX_QUEUE_NAMES_BYTES", 100)
    assert isinstance(floor.add("a", queue="a" * 60)[0][1], TaskStored)
    assert isinstance(refusal(floor.add("b", queue="b" * 60)), BusyError)
    assert isinstance(refusal(floor.add("c", queue="\0" * 10)), BusyError)
    assert isinstance(floor.add("d", queue="d" * 10)[0][1], TaskStored)
    for number in range(5):
        floor.edit("delete", *floor.tasks())
        floor.pass_time(0.1)
        assert isinstance(floor.add(f"e{number}", queue=str(number) * 98)[0][1], TaskStored)


def test_more_queues_than_there_may_be_are_served_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with tasks and limits are stored; who was here gets its subscriptions again; others get no new ones."""
    floor = Floor()
    floor.hello("bob")
    for number in range(3):
        floor.add(f"t{number}", queue=f"q{number}")
        floor.limit(f"l{number}", concurrency=1)
    changes = floor.changes()
    monkeypatch.setattr(queues, "MAX_QUEUES", 1)
    monkeypatch.setattr(queues, "MAX_CONFIGURED_QUEUES", 1)
    for task in changes.tasks:
        task.place = ""
    sessions = tuple((name, peer) for name, peer in changes.sessions.items() if peer is not None)
    again = Floor(broker.StoredState(tasks=changes.tasks, sessions=sessions, limits=changes.limits), EPOCH + 1)
    assert len(again.core.statistics().queues) == 6
    given = again.given(again.hello("bob", queues=(("q0", 1), ("q1", 1), ("q2", 1), ("mine", 1))))
    assert sorted(given) == [("bob", "t0"), ("bob", "t1"), ("bob", "t2")]
    assert again.given(again.add("m", queue="mine")) == [("bob", "m")]
    assert isinstance(refusal(again.add("new", queue="new")), BusyError)
    assert again.limit("l0", concurrency=2) == [("ann", Done(id=again.requests))]
    assert isinstance(again.hello("cat", queues=(("new", 1),))[0][1], Unwelcome)


def test_the_names_of_resources_have_a_bound(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all together; those that are there can be changed."""
    monkeypatch.setattr(queues, "MAX_RESOURCE_NAMES_BYTES", 10)
    assert floor.tokens("gpu", 1) == [("ann", Done(id=floor.requests))]
    assert isinstance(refusal(floor.tokens("licence", 1)), BusyError)
    assert floor.tokens("gpu", 2) == [("ann", Done(id=floor.requests))]


def test_queues_that_nobody_uses_are_forgotten(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names come and go; only so many empty ones are kept."""
    monkeypatch.setattr(queues, "MAX_IDLE_QUEUES", 2)
    for number in range(10):
        floor.worker("bob", 1, queue=f"q{number}")
        floor.add(f"t{number}", queue=f"q{number}")
        floor.ack(f"t{number}")
        floor.say("bob", TaskUnsubscribe(id=floor.next(), queue=f"q{number}"))
    floor.pass_time(10.0)
    assert len(floor.core.statistics().queues) == 2


# --- looking ---


def test_statistics_of_a_queue(floor: Floor) -> None:
    """Where its tasks are, who could take more, what came and went, and how old the oldest is."""
    floor.worker("bob", 2)
    floor.worker("cat", 3, "never")
    floor.add("done")
    floor.ack("done")
    floor.add("held", key="k")
    floor.add("blocked", key="k")
    floor.add("delayed", not_before=WALL + 1000)
    floor.add("dead")
    floor.nack("dead")
    floor.edit("bury", "dead")
    floor.worker("bob", 1)
    floor.add("ready")
    floor.pass_time(30.0)
    queue = floor.core.statistics().queues["q"]
    assert (queue.ready, queue.delayed, queue.blocked, queue.held, queue.dead) == (1, 1, 1, 1, 1)
    assert (queue.credit, queue.subscribers) == (3, 2)
    assert (queue.accepted, queue.settled, queue.rejected) == (6, 1, 1)
    assert queue.accepted_per_s == pytest.approx(6 / 30)
    assert queue.settled_per_s == pytest.approx(1 / 30)
    assert queue.oldest_s == 30.0


def test_the_longest_held_task_is_told(floor: Floor) -> None:
    """For how long a session has worked on it; when it is done, or comes back, the next longest is told."""

    def longest() -> float | None:
        return floor.core.statistics().queues["q"].longest_held_s

    floor.worker("bob", 3)
    assert longest() is None
    floor.add("first")
    floor.pass_time(10.0)
    floor.add("second")
    floor.pass_time(10.0)
    floor.add("third")
    floor.pass_time(5.0)
    assert longest() == 25.0
    floor.nack("first")
    floor.pass_time(1.0)
    assert floor.holder("first") == "bob", "it was given out again, and is the youngest now"
    assert longest() == 16.0
    floor.ack("second")
    assert longest() == 6.0
    floor.ack("third")
    floor.ack("first")
    assert longest() is None


def test_rates_are_those_of_the_last_minute(floor: Floor) -> None:
    """What was before does not count any more."""
    for number in range(60):
        floor.add(f"t{number}")
    floor.pass_time(120.0)
    assert floor.core.statistics().queues["q"].accepted_per_s == 0.0


def test_statistics_of_a_session(floor: Floor) -> None:
    """Its process, its round trip, what it holds, and what it could still take."""
    floor.worker("bob", 3)
    floor.add("a")
    floor.say("bob", Heartbeat(round_trip_s=0.25))
    floor.now += 2.0
    floor.core.tick(floor.now)
    bob = floor.core.statistics(lambda session: ("viewer", session.upper())).sessions["bob"]
    assert (bob.connected, bob.host, bob.pid, bob.role, bob.key) == (True, "h", 1, "viewer", "BOB")
    assert (bob.silent_s, bob.round_trip_s, bob.held, bob.credit, bob.subscriptions) == (2.0, 0.25, 1, 2, 1)


def test_a_lower_credit_is_a_credit(floor: Floor) -> None:
    """Who asked for less still gets that much."""
    floor.worker("bob", 10)
    floor.worker("bob", 2)
    assert [floor.given(floor.add(name)) for name in "abc"] == [[("bob", "a")], [("bob", "b")], []]


@pytest.mark.parametrize("meanwhile", ["a restart", "the wall clock is put back"])
def test_what_comes_back_expires_in_its_time(meanwhile: str, floor: Floor) -> None:
    """Also if its time passed while it was held, or the broker that gave it away is gone."""
    floor.worker("bob", 1)
    floor.add("a", expires_at=WALL + 10)
    epoch = floor.held["a"].epoch
    if meanwhile == "a restart":
        changes = floor.changes()
        sessions = tuple((name, peer) for name, peer in changes.sessions.items() if peer is not None)
        for task in changes.tasks:
            task.place = ""
        floor = Floor(broker.StoredState(tasks=changes.tasks, sessions=sessions), EPOCH + 1)
        floor.hello("bob", held=(("a", epoch),))
    else:
        floor.pass_time(11.0)
        floor.core.wall -= 10.0
        floor.say("bob", TaskUnsubscribe(id=floor.next(), queue="q"))
    floor.say("bob", TaskNack(id=floor.next(), task="a", epoch=epoch))
    floor.pass_time(8.0)
    assert floor.info("a").place == "ready"
    floor.pass_time(3.0)
    assert floor.info("a").place == "dead"


@pytest.mark.parametrize(("held", "pending", "is_dead_at"), [(0, 5, None), (20, 5, 20), (5, 20, 20), (5, 0, None)])
def test_of_two_that_are_merged_none_is_given_up_early(
    held: int, pending: int, is_dead_at: int | None, floor: Floor
) -> None:
    """The one that stays stands for both: it expires when the last of them would have."""
    floor.worker("bob", 1)
    floor.add("a", key="k", expires_at=WALL + held if held else 0.0)
    floor.add("b", key="k", expires_at=WALL + pending if pending else 0.0)
    floor.take(floor.core.expired("bob"))
    assert floor.tasks() == ["b"]
    for _ in range(30):
        floor.pass_time(1.0)
        is_dead = is_dead_at is not None and floor.now >= is_dead_at
        assert floor.info("b").place == ("dead" if is_dead else "ready")


def test_no_more_tasks_are_given_than_can_be_on_their_way(floor: Floor) -> None:
    """However small they are: a peer is hung up on when too many messages wait for it to read."""
    number = 3 * queues.MAX_GIVEN_BYTES // queues.FRAME_COST_BYTES // 2
    floor.core.is_stuck = lambda session: False
    for each in range(number):
        floor.add(f"t{each}")
    first = floor.worker("bob", number)
    assert len(first) <= queues.MAX_GIVEN_BYTES // queues.FRAME_COST_BYTES
    assert len(first) + len(floor.given(floor.take(floor.core.go_on()))) == number


def test_what_was_due_once_stays_due(floor: Floor) -> None:
    """A delayed task that was given to somebody and comes back is not delayed anew when the wall clock is put back."""
    floor.worker("bob", 1)
    floor.add("a", not_before=WALL + 5)
    floor.pass_time(6.0)
    assert floor.holder("a") == "bob"
    floor.core.wall -= 3600
    floor.nack("a")
    floor.pass_time(1.0)
    assert floor.holder("a") == "bob"


def test_after_a_restart_everything_is_where_it_was(floor: Floor) -> None:
    """Places, attempts, holders, patterns, delays, limits, tokens: from what was stored."""
    floor.tokens("gpu", 1)
    floor.worker("bob", 1, "s")
    floor.add("held", subject="s", resources=(("gpu", 1),), key="k")
    floor.add("blocked", key="k")
    floor.add("waits", resources=(("gpu", 1),))
    floor.add("delayed", not_before=WALL + 50, expires_at=WALL + 99)
    floor.add("dead", max_attempts=4, priority=2)
    floor.edit("bury", "dead")
    before = {task: floor.info(task) for task in floor.tasks()}
    changes = floor.changes()
    state = broker.StoredState(
        tasks=[task for task in changes.tasks if task.place],
        sessions=tuple((name, peer) for name, peer in changes.sessions.items() if peer is not None),
        resources=changes.resources,
    )
    for task in changes.tasks:
        if task.place in ("ready", "delayed", "blocked", "held"):
            task.place = ""
    again = Bench(state, EPOCH + 1)
    again.hello("ann")
    assert {task: again.info(task) for task in again.tasks()} == before
    held = (("held", before["held"].attempt and (EPOCH << 32) + 1),)
    sends = again.hello("bob", held=held, filtered=(("q", "s", 1),))
    assert again.deliveries(sends) == []
    again.hello("cat", queues=(("q", 9),))
    sends = again.say("bob", TaskAck(id=1, task="held", epoch=(EPOCH << 32) + 1))
    assert {delivery.task for _, delivery in again.deliveries(sends)} == {"blocked", "waits"}


def test_after_a_restart_a_full_session_is_full(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it held counts."""
    monkeypatch.setattr(queues, "MAX_HELD_BYTES", 2 * bytes_in_hello("t1"))
    floor.worker("bob", 9)
    for number in (1, 2, 3):
        floor.add(f"t{number}")
    changes = floor.changes()
    sessions = tuple((name, peer) for name, peer in changes.sessions.items() if peer is not None)
    held = tuple((task.id, task.hold.epoch) for task in changes.tasks if task.hold is not None)
    for task in changes.tasks:
        task.place = ""
    again = Floor(broker.StoredState(tasks=changes.tasks, sessions=sessions), EPOCH + 1)
    assert again.given(again.hello("bob", queues=(("q", 9),), held=held)) == []
    acknowledged = again.say("bob", TaskAck(id=1, task="t1", epoch=held[0][1]))
    assert again.given(acknowledged) == [("bob", "t3")]


@pytest.mark.parametrize("seed", range(8))
def test_after_a_restart_it_goes_on_as_if_there_had_been_none(seed: int) -> None:
    """Any mixture of tasks, written and read by the real store: each is where it was, the counts are right, all are
    given out in the order in which they would have been, and what comes then comes last."""
    rng = random.Random(seed)
    floor, connection = Floor(), sqlite3.connect(":memory:", isolation_level=None)
    store = TaskStore(connection)
    floor.tokens("gpu", 3)
    for name, queue in (("bob", "q"), ("cat", "r")):
        floor.worker(name, 5, "a", queue)
    for number in range(200):
        floor.add(f"t{number}", **some_fields(rng))
        if floor.held and rng.random() < 0.2:
            task = rng.choice([*floor.held])
            rng.choice([floor.ack, floor.nack, floor.nack])(task)
            del floor.held[task]
        if rng.random() < 0.05:
            floor.edit("bury", *rng.sample(floor.tasks(), 1))
        if rng.random() < 0.2:
            written(floor, store)
    floor.pass_time(MAX_BACK_OFF_S + 1.0)  # when a rejected task is offered again is not stored
    written(floor, store)

    awaited = [task for (task,) in connection.execute("SELECT id FROM broker_task WHERE waiters = 'ann'")]
    again = Floor(TaskStore(connection).load(), EPOCH + 1, awaited=awaited)
    again.core.wall, again.requests = floor.core.wall, floor.requests
    for name, queue in (("bob", "q"), ("cat", "r")):
        held = tuple((task, floor.held[task].epoch) for task in floor.tasks("held") if floor.holder(task) == name)
        again.hello(name, held=held, filtered=((queue, "a", 5),))
    assert {task: placed(again, task) for task in again.tasks()} == {
        task: placed(floor, task) for task in floor.tasks()
    }
    assert {place: again.tasks(place) for place in PLACES} == {place: floor.tasks(place) for place in PLACES}
    assert counts(again) == counts(floor)
    written(again, TaskStore(connection))

    for one in (floor, again):
        one.core.wall += 1.5e6
        one.pass_time(1.0)
        one.tokens("gpu", None)
        one.add("last", queue="q")
    assert {place: again.tasks(place) for place in PLACES} == {place: floor.tasks(place) for place in PLACES}
    for queue in ("q", "r", "s"):
        assert again.worker("eve", 1000, queue=queue) == floor.worker("eve", 1000, queue=queue) != []
    given = [task for task in floor.tasks("held") if floor.holder(task) == "eve"]
    assert [outcomes(again.ack(task)) for task in given] == [outcomes(floor.ack(task)) for task in given]
    written(again, TaskStore(connection))
    rows = connection.execute("SELECT id FROM broker_task ORDER BY id").fetchall()
    assert [task for (task,) in rows] == sorted(again.tasks())
    connection.close()


PLACES = ("ready", "delayed", "blocked", "held", "dead", "settled")


def some_fields(rng: random.Random) -> dict[str, object]:
    """A task that has nothing, or some of all that a task can have."""
    fields: dict[str, object] = {"queue": rng.choice("qqrs"), "subject": rng.choice(["a", "b", None])}
    if rng.random() < 0.5:
        return fields
    some = {
        "key": f"{fields['queue']}{rng.randrange(6)}",
        "replace": True,
        "priority": rng.randrange(3),
        "resources": (("gpu", rng.randrange(1, 3)),),
        "not_before": WALL + rng.choice([10.0, 1e6, 2e6]),
        "expires_at": WALL + rng.choice([1e6, 2e6]),
        "max_attempts": rng.randrange(1, 4),
        "want_result": True,
    }
    return fields | {name: some[name] for name in rng.sample(sorted(some), rng.randrange(1, 5))}


def written(floor: Floor, store: TaskStore) -> None:
    changes = floor.core.take_changes()
    for number, body in floor.bodies.items():
        store.keep(number, body)
    floor.bodies.clear()
    store.write(changes)


def placed(floor: Floor, task: str) -> TaskInfo:
    return msgspec.structs.replace(floor.info(task), held_s=None)


def counts(floor: Floor) -> list[tuple[object, ...]]:
    queues = floor.core.statistics().queues
    return [(name, one.ready, one.delayed, one.blocked, one.held, one.dead) for name, one in sorted(queues.items())]


@pytest.mark.parametrize("first", [1, 2])
def test_a_key_of_the_past(first: int) -> None:
    """The store may know two pending tasks of a key (an older broker merged them later): the older one is enough."""
    tasks = [queues.Task(9, number, number, f"t{number}", "q", "k", None, 1, WALL) for number in (first, 3 - first)]
    again = Bench(broker.StoredState(tasks=tasks))
    again.hello("ann")
    assert again.tasks() == ["t1"]
    assert [task.id for task in again.changes().tasks] == ["t2"]


def test_what_nobody_waits_for_is_forgotten_at_a_restart() -> None:
    """A settled task is there for those who wait for its result; a dead one stays."""
    kinds: list[tuple[str, str, tuple[str, ...]]] = [
        ("lost", "settled", ("zoe",)),
        ("over", "settled", ()),
        ("kept", "settled", ("ann",)),
        ("dead", "dead", ()),
        ("open", "", ("zoe",)),
    ]
    tasks = [
        queues.Task(9, number, number, name, "q", None, None, 0, WALL, place=place, waiters=waiters)
        for number, (name, place, waiters) in enumerate(kinds, 1)
    ]
    again = Floor(broker.StoredState(tasks=tasks, sessions=(("ann", Peer("h", 1, 2)),)), awaited=["kept"])
    places = {place: again.tasks(place) for place in ("ready", "settled", "dead")}
    assert places == {"ready": ["open"], "settled": ["kept"], "dead": ["dead"]}
    assert {task.id for task in again.changes().tasks} == {"lost", "over", "open"}
    assert again.worker("bob") == [("bob", "open")]
    assert again.ack("open", b"result") == [("bob", Done(id=again.requests))]
    assert again.tasks() == ["kept", "dead"]


def test_no_number_is_given_twice_over_a_restart(floor: Floor) -> None:
    """Not that of a task which took over the order of an older one."""
    floor.add("a", key="k")
    floor.add("b", key="k", replace=True)
    [task] = [task for task in floor.changes().tasks if task.place]
    assert task.number > task.order
    task.place = ""
    again = Floor(broker.StoredState(tasks=[task]), EPOCH + 1)
    again.add("c")
    [new] = again.changes().tasks
    assert (new.id, new.number) == ("c", task.number + 1)


# --- what is on its way ---


def test_no_more_bodies_are_given_than_can_be_on_their_way(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest follows when they are read; meanwhile others get it, and what they held before counts for nothing."""
    monkeypatch.setattr(queues, "MAX_GIVEN_BYTES", 2 * queues.FRAME_COST_BYTES + 4)
    reads = {"bob": False, "cat": False}
    floor.core.is_stuck = lambda session: not reads.get(session, True)
    for number in range(10):
        floor.add(f"t{number}")
    assert floor.worker("bob", 10) == [("bob", "t0"), ("bob", "t1")]
    assert floor.ack("t0") != []
    assert floor.given(floor.wait(1.0)) == []
    assert floor.worker("cat", 10) == [("cat", "t2"), ("cat", "t3")]
    reads["bob"] = True
    assert floor.core.due() <= floor.now
    assert floor.given(floor.take(floor.core.go_on())) == [("bob", "t4"), ("bob", "t5")]
    reads["bob"] = False
    assert floor.core.due() > floor.now
    floor.core.disconnected("bob")
    reads["bob"] = True
    assert floor.given(floor.take(floor.core.go_on())) == []
    held = [(task, delivery.epoch) for task, delivery in floor.held.items() if task in ("t1", "t4", "t5")]
    again = floor.hello("bob", held=tuple(held), queues=(("q", 10),))
    assert floor.given(again) == [("bob", "t6"), ("bob", "t7")]
