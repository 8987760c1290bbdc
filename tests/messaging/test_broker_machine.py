"""Random peers against the broker's core and its store: nothing is lost, nothing is held twice.

What changed goes to a real `TaskStore` after each step; a restart builds a new core from it. The model knows what was
accepted, what was settled by its holder, and what was deleted or replaced; all else follows from what the store says.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from typing import Literal

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prunus.messaging.broker import BrokerCore, Effect, Tell
from prunus.messaging.inventory import QueueLimits
from prunus.messaging.messages import (
    LEASE_S,
    BrokerMessage,
    ClientMessage,
    Done,
    Edited,
    Goodbye,
    Heartbeat,
    Hello,
    HelloNeeded,
    Peer,
    QueueConfigure,
    Refused,
    ResourceConfigure,
    ResultSeen,
    TaskAck,
    TaskDelivery,
    TaskEdit,
    TaskNack,
    TaskResult,
    TaskSend,
    TaskStored,
    TaskSubscribe,
    TaskUnsubscribe,
    Unwelcome,
    Welcome,
    decode_from_broker,
)
from prunus.messaging.patterns import matcher
from prunus.messaging.queues import Deliver, Keep, Send, Task, dead_letter
from prunus.messaging.taskstore import TaskStore

WALL = 1_000_000.0
QUEUES = st.sampled_from(["run", "control"])
KEYS = st.none() | st.sampled_from(["p", "q", "r"])
PRIORITIES = st.sampled_from([0, 0, 5])
SUBJECTS = st.none() | st.sampled_from(["a.b", "a.c", "x"])
PATTERNS = st.none() | st.sampled_from(["a.*", "x", "#"])
PEERS = [f"peer{number}" for number in range(3)]
NAMES = st.sampled_from(PEERS)
GPUS = 2


class _Peer:
    """A client that does as it is told, and remembers what it has in hand."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.inbox: list[BrokerMessage] = []
        self.held: dict[str, int] = {}
        self.credit: dict[tuple[str, str | None], int] = {}
        self.said: dict[int, TaskSend] = {}
        self.answers: dict[int, BrokerMessage] = {}
        """What was first said to each of these."""
        self.awaited: dict[str, None] = {}
        self.requests = 0
        self.connected = False

    def next_id(self) -> int:
        self.requests += 1
        return self.requests


class BrokerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.store = TaskStore(self.connection)
        self.now = 0.0
        self.wall = WALL
        self.core = self._new_core()
        self.peers = {name: _Peer(name) for name in PEERS}
        self.accepted: dict[str, TaskSend] = {}
        self.over: set[str] = set()
        """Settled, deleted, replaced, or merged with an equal."""
        self.meant: set[str] = set()
        """What this step may end."""
        self.hurried: set[str] = set()
        """Tasks that were requeued: they wait for nothing."""
        self.epochs: dict[str, int] = {}
        self.limits: dict[str, QueueLimits] = {}
        self.rows: dict[str, Task] = {}
        self.made = 0
        self.deliveries: list[tuple[str, int]] = []
        """All that were heard of, also those that are long over."""

    def teardown(self) -> None:
        try:
            self._everything_left_is_delivered()
        finally:
            self.connection.close()

    def _new_core(self) -> BrokerCore:
        store = self.store = TaskStore(self.connection)
        return BrokerCore(store.next_broker_epoch(), self.now, store.load(), wall=self.wall)

    # --- the world around the core ---

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Keep():
                    self.store.keep(effect.number, effect.body)
                case Send():
                    message = effect.message
                    self._arrive(effect.session, decode_from_broker(message) if isinstance(message, bytes) else message)
                case Deliver():
                    self._deliver(effect.task)
                case Tell():
                    task = effect.task
                    frame = dead_letter(task) if task.place == "dead" else self.store.outcome(task.number)
                    assert frame is not None
                    self._arrive(effect.session, decode_from_broker(frame))
        self._write()

    def _write(self) -> None:
        self.store.write(self.core.take_changes())
        before, self.rows = self.rows, {task.id: task for task in TaskStore(self.connection).load().tasks}
        for task in self.rows.values():
            if task.place == "settled":
                self._ended(task.id)
        for task_id in before.keys() - self.rows.keys():
            self._ended(task_id)
        self.meant.clear()

    def _ended(self, task_id: str) -> None:
        if task_id in self.over:
            return
        self.over.add(task_id)
        if task_id in self.meant:
            return
        sent = self.accepted[task_id]
        assert sent.key is not None, "only its holder ends a task without a key"
        equals = [one for one in self.rows.values() if one.key == sent.key and one.queue == sent.queue]
        assert any(one.id != task_id and one.place != "settled" for one in equals), "lost"

    def _arrive(self, session: str, message: BrokerMessage) -> None:
        peer = self.peers[session]
        if peer.connected:
            peer.inbox.append(message)

    def _deliver(self, task: Task) -> None:
        assert task.hold is not None
        peer, sent = self.peers[task.hold.session], self.accepted[task.id]
        assert peer.connected, "given to somebody who is not there"
        assert task.id not in self.over, "given out after its end"
        was_due = sent.not_before <= self.wall or task.id in self.epochs or task.id in self.hurried
        assert was_due, "too early"
        assert task.hold.epoch > self.epochs.get(task.id, 0), "the epoch must rise"
        self.epochs[task.id] = task.hold.epoch
        assert matcher(task.hold.pattern)(sent.subject)
        assert not task.expires_at or task.expires_at > self.wall, "too late"
        assert not sent.max_attempts or task.attempt <= sent.max_attempts
        assert self.store.body(task.number) == sent.body
        self._arrive(
            task.hold.session,
            TaskDelivery(
                task=task.id, queue=task.queue, key=task.key, body=b"", epoch=task.hold.epoch, attempt=task.attempt
            ),
        )

    def _say(self, peer: _Peer, message: ClientMessage) -> None:
        self.core.wall = self.wall
        self._carry_out(self.core.handle(self.now, peer.session, message))

    def _tick(self) -> None:
        self.core.wall = self.wall
        self._carry_out(self.core.tick(self.now))

    def _hello(self, peer: _Peer) -> None:
        peer.connected = True
        peer.inbox.clear()
        self._say(
            peer,
            Hello(
                session=peer.session,
                peer=Peer(),
                secret=peer.session,
                held=tuple(peer.held.items()),
                awaited=tuple(peer.awaited),
                queues=tuple((queue, credit) for (queue, pattern), credit in peer.credit.items() if pattern is None),
                filtered=tuple((queue, pattern, credit) for (queue, pattern), credit in peer.credit.items() if pattern),
            ),
        )
        welcome = peer.inbox[0]
        assert isinstance(welcome, Welcome)
        for task in welcome.lost:
            del peer.held[task]

    def _listen(self, peer: _Peer) -> None:
        inbox, peer.inbox = peer.inbox, []
        for message in inbox:
            match message:
                case TaskDelivery():
                    peer.held[message.task] = message.epoch
                    self.deliveries.append((message.task, message.epoch))
                case HelloNeeded():
                    peer.connected = False
                case TaskResult():
                    peer.awaited.pop(message.task, None)
                    self._say(peer, ResultSeen(task=message.task))
        if not peer.connected:
            self.core.disconnected(peer.session)
            self._hello(peer)

    # --- what may happen ---

    @initialize()
    def all_come(self) -> None:
        for peer in self.peers.values():
            peer.credit = {("run", None): 2, ("control", None): 1}
            self._hello(peer)
        self.configures_the_resource(GPUS)

    @rule(name=NAMES, hears=st.booleans())
    def connects(self, name: str, hears: bool) -> None:
        """Also while it is connected: then what was on the way to it is lost, unless it hears it before."""
        if hears:
            self._listen(self.peers[name])
        self._hello(self.peers[name])

    @rule(name=NAMES, secret=st.sampled_from(["", "x"]))
    def is_imitated(self, name: str, secret: str) -> None:
        """Somebody else says hello in its name: that changes nothing."""
        before = self._counts()
        hello = Hello(session=name, peer=Peer(), secret=secret)
        assert self.core.refusal(hello) is not None
        [answer] = self.core.handle(self.now, name, hello)
        assert isinstance(answer, Send)
        assert isinstance(answer.message, Unwelcome)
        assert self._counts() == before

    @rule(name=NAMES, queue=QUEUES, pattern=PATTERNS, credit=st.none() | st.integers(0, 3))
    def subscribes(self, name: str, queue: str, pattern: str | None, credit: int | None) -> None:
        peer = self.peers[name]
        if not self._known(peer):
            return
        if credit is None:
            peer.credit.pop((queue, pattern), None)
            self._say(peer, TaskUnsubscribe(id=peer.next_id(), queue=queue, subject=pattern))
        else:
            peer.credit[queue, pattern] = credit
            self._say(peer, TaskSubscribe(id=peer.next_id(), queue=queue, credit=credit, subject=pattern))

    @rule(
        name=NAMES,
        queue=QUEUES,
        keys=st.lists(KEYS, min_size=1, max_size=4),
        priority=PRIORITIES,
        result=st.booleans(),
        subject=SUBJECTS,
        replace=st.booleans(),
        delay=st.sampled_from([0.0, 0.0, 0.0, 0.5, 3.0]),
        life=st.sampled_from([0.0, 0.0, 0.0, 1.0, 5.0]),
        attempts=st.sampled_from([0, 0, 1, 2]),
        gpus=st.sampled_from([0, 0, 0, 1, 2, 3]),
    )
    def sends(
        self,
        name: str,
        queue: str,
        keys: list[str | None],
        priority: int,
        result: bool,
        subject: str | None,
        replace: bool,
        delay: float,
        life: float,
        attempts: int,
        gpus: int,
    ) -> None:
        peer = self.peers[name]
        for key in keys if self._known(peer) else ():
            self.made += 1
            message = TaskSend(
                id=peer.next_id(),
                task=f"t{self.made}",
                body=b"%d" % self.made,
                queue=queue,
                key=key,
                priority=priority,
                want_result=result,
                subject=subject,
                replace=replace,
                not_before=self.wall + delay if delay else 0.0,
                expires_at=self.wall + life if life else 0.0,
                max_attempts=attempts,
                resources=(("gpu", gpus),),
            )
            peer.said[message.id] = message
            self._send(peer, message)

    @rule(name=NAMES, which=st.integers(0, 100))
    def says_it_again(self, name: str, which: int) -> None:
        peer = self.peers[name]
        if self._known(peer) and peer.said:
            self._send(peer, list(peer.said.values())[which % len(peer.said)])

    def _send(self, peer: _Peer, message: TaskSend) -> None:
        done = isinstance(peer.answers.get(message.id), TaskStored)
        replaced = [
            one
            for one in self.rows.values()
            if message.replace and (one.queue, one.key) == (message.queue, message.key)
        ]
        self.meant = set() if done else {one.id for one in replaced if one.hold is None and one.place != "dead"}
        self.accepted.setdefault(message.task, message)
        before = self.core.statistics().accepted
        self._say(peer, message)
        grown = self.core.statistics().accepted - before
        [answer] = [one for one in peer.inbox if isinstance(one, TaskStored | Refused) and one.id == message.id][-1:]
        if done:
            assert answer == peer.answers[message.id], "another answer than the first time"
            assert grown == 0, "stored twice"
        if not grown and message.task not in self.rows and message.task not in self.over:
            del self.accepted[message.task]
        if isinstance(answer, TaskStored):
            assert answer.stored is (answer.task == message.task)
            if message.want_result and not done:
                peer.awaited[answer.task] = None
        else:
            assert grown == 0
        peer.answers[message.id] = answer

    @rule(name=NAMES)
    def listens(self, name: str) -> None:
        self._listen(self.peers[name])

    @rule(name=NAMES, nack=st.booleans(), attempted=st.booleans())
    def works(self, name: str, nack: bool, attempted: bool) -> None:
        """Settles one of the tasks that it has in hand."""
        peer = self.peers[name]
        self._listen(peer)
        if peer.held:
            self._settle(peer, *next(iter(peer.held.items())), nack=nack, attempted=attempted)

    @rule(name=NAMES, which=st.integers(0, 100), nack=st.booleans())
    def meddles(self, name: str, which: int, nack: bool) -> None:
        """Settles whatever was ever delivered to anybody: mostly too late, or not its own."""
        if self.deliveries:
            self._settle(self.peers[name], *self.deliveries[which % len(self.deliveries)], nack=nack)

    def _settle(self, peer: _Peer, task: str, epoch: int, *, nack: bool, attempted: bool = True) -> None:
        if not self._known(peer):
            return
        right = self._holders().get(task) == (peer.session, epoch)
        over = not right and not nack and (task not in self.rows or self.rows[task].place == "settled")
        self.meant = {task} if right and not nack else set()
        before = self._counts()
        number = peer.next_id()
        if nack:
            self._say(peer, TaskNack(id=number, task=task, epoch=epoch, reason="no", attempted=attempted))
        else:
            self._say(peer, TaskAck(id=number, task=task, epoch=epoch))
        if peer.held.get(task) == epoch:
            del peer.held[task]
        assert Done(id=number, stale=not right, over=over) in peer.inbox
        if not right:
            assert self._counts() == before, "a late word changes nothing"

    @rule(
        name=NAMES,
        action=st.sampled_from(["requeue", "bury", "delete"]),
        which=st.lists(st.integers(0, 100), max_size=3),
        queue=QUEUES,
    )
    def edits(self, name: str, action: Literal["requeue", "bury", "delete"], which: list[int], queue: str) -> None:
        """Some tasks, or all of a queue."""
        peer = self.peers[name]
        if not self._known(peer):
            return
        ids = list(self.rows)
        named = tuple(ids[number % len(ids)] for number in which) if ids else ()
        touched = set(named) if named else {one.id for one in self.rows.values() if one.queue == queue}
        held = self._holders().keys() & touched
        self.meant = touched - held if action == "delete" else set()
        if action == "requeue":
            self.hurried |= touched
        edit = TaskEdit(id=peer.next_id(), action=action, tasks=named, queue=None if named else queue)
        self._say(peer, edit)
        [edited] = [one for one in peer.inbox if isinstance(one, Edited) and one.id == edit.id]
        assert edited.held == len(held)
        before = self._counts()
        self._say(peer, edit)
        assert peer.inbox[-1] == edited
        assert self._counts() == before

    @rule(
        queue=QUEUES,
        concurrency=st.none() | st.integers(0, 2),
        rate=st.none() | st.just(2.0),
        length=st.none() | st.just(3),
    )
    def configures_a_queue(self, queue: str, concurrency: int | None, rate: float | None, length: int | None) -> None:
        peer = next((peer for peer in self.peers.values() if self._known(peer)), None)
        if peer is not None:
            limits = QueueLimits(concurrency=concurrency, rate_per_s=rate, max_length=length)
            self.limits[queue] = limits
            self._say(peer, QueueConfigure(id=peer.next_id(), queue=queue, limits=limits))

    @rule(capacity=st.integers(1, 3))
    def configures_the_resource(self, capacity: int) -> None:
        peer = next((peer for peer in self.peers.values() if self._known(peer)), None)
        if peer is not None:
            self._say(peer, ResourceConfigure(id=peer.next_id(), resource="gpu", capacity=capacity))

    @rule(name=NAMES)
    def loses_its_connection(self, name: str) -> None:
        self.peers[name].connected = False
        self.peers[name].inbox.clear()
        self.core.disconnected(name)

    @rule(name=NAMES, proof=st.booleans())
    def ends(self, name: str, proof: bool) -> None:
        """It dies, or it leaves; a new one comes in its place."""
        peer = self.peers[name]
        number = peer.next_id()
        known = self._known(peer)
        self._gone(name)
        if proof or not known:
            self._carry_out(self.core.expired(name))
        else:
            peer.connected = True
            self._say(peer, Goodbye(id=number))
            assert peer.inbox[-1] == Done(id=number)
        peer.credit = {("run", None): 2}
        self._hello(peer)

    def _gone(self, name: str) -> None:
        """A later peer in its place is a new process: it has nothing in hand and repeats nothing."""
        peer = self.peers[name]
        peer.connected = False
        peer.held, peer.credit, peer.said, peer.answers, peer.awaited = {}, {}, {}, {}, {}
        peer.inbox.clear()

    @rule(seconds=st.sampled_from([0.01, 0.1, 1.0, 4.0]), jump=st.sampled_from([0.0, 0.0, 0.0, -2.0, 2.0]))
    def time_passes(self, seconds: float, jump: float) -> None:
        """And the wall clock may be set."""
        self.now += seconds
        self.wall += seconds + jump
        self._tick()
        self._forget_the_silent()

    @rule(name=NAMES)
    def is_silent(self, name: str) -> None:
        """All others show that they live for longer than a lease."""
        for _ in range(5):
            self.now += LEASE_S / 4
            self.wall += LEASE_S / 4
            for peer in self.peers.values():
                if peer.session != name and self._known(peer):
                    self._say(peer, Heartbeat())
            self._tick()
        assert name not in self.core.sessions()
        self._forget_the_silent()

    def _forget_the_silent(self) -> None:
        for name, peer in self.peers.items():
            if name not in self.core.sessions():
                peer.connected = False
                peer.inbox.clear()

    @rule()
    def the_broker_restarts(self) -> None:
        for peer in self.peers.values():
            peer.connected = False
            peer.inbox.clear()
        self.core = self._new_core()
        self._write()

    def _known(self, peer: _Peer) -> bool:
        return peer.connected and peer.session in self.core.sessions()

    def _counts(self) -> tuple[object, ...]:
        """What a word that means nothing must not change."""
        now = self.core.statistics()
        return now.queues, now.resources, now.sessions.keys(), now.accepted, now.settled, now.delivered

    def _holders(self) -> dict[str, tuple[str, int]]:
        return {one.id: (one.hold.session, one.hold.epoch) for one in self.rows.values() if one.hold is not None}

    # --- what is always true ---

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.accepted.keys() - self.over <= self.rows.keys()

    @invariant()
    def what_is_dead_has_a_reason(self) -> None:
        for task in self.rows.values():
            if task.place == "dead":
                assert task.reason
                assert task.hold is None

    @invariant()
    def the_core_agrees_with_the_store(self) -> None:
        statistics = self.core.statistics()
        rows = [one for one in self.rows.values() if one.place != "settled"]
        queues = statistics.queues.values()
        assert sum(one.held for one in queues) == len([one for one in rows if one.hold is not None])
        assert sum(one.dead for one in queues) == len([one for one in rows if one.place == "dead"])
        assert sum(one.ready + one.delayed + one.blocked + one.held + one.dead for one in queues) == len(rows)
        assert {name: one.held for name, one in statistics.sessions.items() if one.held} == Counter(
            session for session, _ in self._holders().values()
        )

    @invariant()
    def nobody_has_more_than_its_credit(self) -> None:
        """As far as it was given under this credit: what is held is never more than what was ever allowed."""
        for name, one in self.core.statistics().sessions.items():
            assert one.credit <= sum(self.peers[name].credit.values())

    @invariant()
    def nobody_with_room_waits_for_what_is_ready(self) -> None:
        """Unless the limits of its queue, or tokens, keep it back."""
        holds = [(one.queue, one.hold) for one in self.rows.values() if one.hold is not None]
        held = Counter((hold.session, queue, hold.pattern) for queue, hold in holds)
        gpu = self.core.statistics().resources.get("gpu")
        free = 0 if gpu is None or gpu.capacity is None else gpu.capacity - gpu.taken
        for task in self.core._queues.select(place="ready"):
            limits = self.limits.get(task.queue, QueueLimits())
            is_limited = limits.concurrency is not None or limits.rate_per_s is not None
            if is_limited or sum(tokens for _, tokens in task.needs) > free:
                continue
            for name, peer in self.peers.items():
                for (queue, pattern), credit in peer.credit.items() if self._known(peer) else ():
                    wants = queue == task.queue and matcher(pattern)(task.subject)
                    assert not wants or held[name, queue, pattern] >= credit, f"{name} does not get {task.id}"

    @invariant()
    def keys_are_exclusive(self) -> None:
        tasks = [one for one in self.rows.values() if one.key is not None and one.place not in ("settled", "dead")]
        held = [one.key for one in tasks if one.hold is not None]
        pending = [(one.queue, one.key) for one in tasks if one.hold is None]
        assert len(held) == len(set(held))
        assert len(pending) == len(set(pending))

    @invariant()
    def tokens_are_counted(self) -> None:
        held = [one for one in self.rows.values() if one.hold is not None]
        taken = sum(tokens for one in held for _, tokens in one.needs)
        gpu = self.core.statistics().resources.get("gpu")
        assert (gpu.taken if gpu is not None else 0) == taken
        assert taken <= 3

    @invariant()
    def who_believes_to_hold_a_task_is_one(self) -> None:
        """Of several that believe it, only one has the current epoch."""
        for task, (session, epoch) in self._holders().items():
            believers = [peer.session for peer in self.peers.values() if peer.held.get(task) == epoch]
            assert believers in ([], [session])

    @invariant()
    def what_a_peer_holds_it_has_or_it_is_on_the_way(self) -> None:
        for peer in self.peers.values():
            if self._known(peer):
                here = set(peer.held.items())
                coming = {(one.task, one.epoch) for one in peer.inbox if isinstance(one, TaskDelivery)}
                theirs = {
                    (task, epoch) for task, (session, epoch) in self._holders().items() if session == peer.session
                }
                assert theirs <= here | coming

    def _everything_left_is_delivered(self) -> None:
        """Whatever happened: when all others are gone, one that takes everything gets everything, once."""
        for name in PEERS:
            self._gone(name)
            self._carry_out(self.core.expired(name))
        self.hurried |= self.rows.keys()
        last = self.peers[PEERS[0]]
        last.credit = {("run", None): 1000, ("control", None): 1000}
        self._hello(last)
        for queue in self.limits:
            self._say(last, QueueConfigure(id=last.next_id(), queue=queue, limits=QueueLimits()))
        self._say(last, ResourceConfigure(id=last.next_id(), resource="gpu", capacity=3))
        for _ in range(200):
            self._say(last, TaskEdit(id=last.next_id(), action="requeue", place="dead"))
            self._listen(last)
            for task, epoch in list(last.held.items()):
                self.meant = {task}
                self._say(last, TaskAck(id=last.next_id(), task=task, epoch=epoch))
                del last.held[task]
            self.now += 1.0
            self.wall += 1.0
            self._say(last, Heartbeat(seen=last.requests + 1))
            self._tick()
            if not self.rows:
                break
        assert not self.accepted.keys() - self.over, "stuck"
        assert not self.rows, "the store is empty when all is settled"


TestBrokerMachine = BrokerMachine.TestCase
TestBrokerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
