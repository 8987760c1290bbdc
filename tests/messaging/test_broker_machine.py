"""Random peers against the broker's core and its store: nothing is lost, nothing is held twice.

The effects go to a real `TaskStore`; a restart builds a new core from it. The model knows what was accepted and what
was settled by its holder; everything else follows from what the store says.
"""

from __future__ import annotations

import sqlite3

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from prunus.messaging.broker import LEASE_S, BrokerCore, DeleteTask, Effect, HoldTask, ReleaseTask, Send, SettleTask
from prunus.messaging.messages import (
    BrokerMessage,
    ClientMessage,
    Done,
    Goodbye,
    Heartbeat,
    Hello,
    HelloNeeded,
    Peer,
    TaskAck,
    TaskDelivery,
    TaskNack,
    TaskSend,
    TaskStored,
    TaskSubscribe,
    TaskUnsubscribe,
    Welcome,
    decode_from_broker,
)
from prunus.messaging.taskstore import TaskStore

QUEUES = st.sampled_from(["run", "control"])
KEYS = st.none() | st.sampled_from(["p", "q", "r"])
PRIORITIES = st.sampled_from([0, 0, 5])
RESULTS = st.booleans()
PEERS = [f"peer{number}" for number in range(3)]
NAMES = st.sampled_from(PEERS)


class _Peer:
    """A client that does as it is told, and remembers what it has in hand."""

    def __init__(self, session: str) -> None:
        self.session = session
        self.inbox: list[BrokerMessage] = []
        self.held: dict[str, int] = {}
        self.credit: dict[str, int] = {}
        self.said: list[TaskSend] = []
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
        self.core = BrokerCore(self.store.next_broker_epoch(), 0.0, self.store.load())
        self.now = 0.0
        self.peers = {name: _Peer(name) for name in PEERS}
        self.accepted: dict[str, tuple[str, str | None]] = {}
        self.settled: set[str] = set()
        self.merged: set[str] = set()
        self.settling: str | None = None
        self.holder: dict[str, tuple[str, int]] = {}
        self.epochs: dict[str, int] = {}
        self.made = 0
        self.deliveries: list[tuple[str, int]] = []
        """All that were heard of, also those that are long over."""

    def teardown(self) -> None:
        try:
            self._everything_left_is_delivered()
        finally:
            self.connection.close()

    # --- the world around the core ---

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                message = effect.message
                message = decode_from_broker(message) if isinstance(message, bytes) else message
                peer = self.peers[effect.session]
                if peer.connected:
                    peer.inbox.append(message)
                continue
            self.store.apply(effect)
            match effect:
                case HoldTask():
                    assert effect.task not in self.holder, "held twice"
                    assert effect.epoch > self.epochs.get(effect.task, 0), "the epoch must rise"
                    self.epochs[effect.task] = effect.epoch
                    self.holder[effect.task] = effect.session, effect.epoch
                    self._credit_is_kept(effect)
                case ReleaseTask():
                    del self.holder[effect.task]
                case SettleTask() | DeleteTask():
                    self._done_or_merged(effect.task)

    def _credit_is_kept(self, hold: HoldTask) -> None:
        queue, _ = self.accepted[hold.task]
        peer = self.peers[hold.session]
        assert peer.connected, "given to somebody who is not there"
        busy = [task for task, (session, _) in self.holder.items() if session == hold.session]
        assert len([task for task in busy if self.accepted[task][0] == queue]) <= peer.credit.get(queue, 0), (
            "more than asked for"
        )

    def _done_or_merged(self, task: str) -> None:
        self.holder.pop(task, None)
        if task == self.settling:
            self.settled.add(task)
        if task in self.settled:
            return  # now, or earlier: then nobody waits for its result any more
        queue, key = self.accepted.pop(task)
        self.merged.add(task)
        assert key is not None, "only its holder ends a task without a key"
        pending = [one.task.id for one in self.store.load().tasks if one.holder is None and one.task.id != task]
        assert any(self.accepted.get(other) == (queue, key) for other in pending), "lost"

    def _say(self, peer: _Peer, message: ClientMessage) -> None:
        self._carry_out(self.core.handle(self.now, peer.session, message))

    def _hello(self, peer: _Peer) -> None:
        peer.connected = True
        peer.inbox.clear()
        self._say(
            peer,
            Hello(
                session=peer.session,
                peer=Peer(),
                held=tuple(peer.held.items()),
                queues=tuple(peer.credit.items()),
            ),
        )
        welcome = peer.inbox[0]
        assert isinstance(welcome, Welcome)
        for task in welcome.lost:
            del peer.held[task]

    def _listen(self, peer: _Peer) -> None:
        for message in peer.inbox:
            match message:
                case TaskDelivery():
                    peer.held[message.task] = message.epoch
                    self.deliveries.append((message.task, message.epoch))
                case HelloNeeded():
                    peer.connected = False
                case TaskStored():
                    assert message.task in self.accepted.keys() | self.settled | self.merged
        peer.inbox.clear()
        if not peer.connected:
            self.core.disconnected(peer.session)
            self._hello(peer)

    # --- what may happen ---

    @initialize()
    def all_come(self) -> None:
        for peer in self.peers.values():
            peer.credit = {"run": 2, "control": 1}
            self._hello(peer)

    @rule(name=NAMES, hears=st.booleans())
    def connects(self, name: str, hears: bool) -> None:
        """Also while it is connected: then what was on the way to it is lost, unless it hears it before."""
        if hears:
            self._listen(self.peers[name])
        self._hello(self.peers[name])

    @rule(name=NAMES, queue=QUEUES, credit=st.none() | st.integers(0, 3))
    def subscribes(self, name: str, queue: str, credit: int | None) -> None:
        peer = self.peers[name]
        if not self._known(peer):
            return
        if credit is None:
            peer.credit.pop(queue, None)
            self._say(peer, TaskUnsubscribe(id=peer.next_id(), queue=queue))
        else:
            peer.credit[queue] = credit
            self._say(peer, TaskSubscribe(id=peer.next_id(), queue=queue, credit=credit))

    @rule(name=NAMES, queue=QUEUES, keys=st.lists(KEYS, min_size=1, max_size=4), priority=PRIORITIES, result=RESULTS)
    def sends(self, name: str, queue: str, keys: list[str | None], priority: int, result: bool) -> None:
        peer = self.peers[name]
        for key in keys if self._known(peer) else ():
            self.made += 1
            task = f"t{self.made}"
            message = TaskSend(
                id=peer.next_id(), task=task, body=b"", queue=queue, key=key, priority=priority, want_result=result
            )
            peer.said.append(message)
            self._send(peer, message)

    @rule(name=NAMES, which=st.integers(0, 100))
    def says_it_again(self, name: str, which: int) -> None:
        peer = self.peers[name]
        if self._known(peer) and peer.said:
            self._send(peer, peer.said[which % len(peer.said)])

    def _send(self, peer: _Peer, message: TaskSend) -> None:
        first = message.task not in self.accepted.keys() | self.settled | self.merged
        if first:
            self.accepted[message.task] = message.queue, message.key
        before = self.core.statistics().accepted
        self._say(peer, message)
        if first and self.core.statistics().accepted == before:
            del self.accepted[message.task]
        assert first or self.core.statistics().accepted == before, "stored twice"

    @rule(name=NAMES)
    def listens(self, name: str) -> None:
        self._listen(self.peers[name])

    @rule(name=NAMES, nack=st.booleans())
    def works(self, name: str, nack: bool) -> None:
        """Settles one of the tasks that it has in hand."""
        peer = self.peers[name]
        self._listen(peer)
        if peer.held:
            self._settle(peer, *next(iter(peer.held.items())), nack=nack)

    @rule(name=NAMES, which=st.integers(0, 100), nack=st.booleans())
    def meddles(self, name: str, which: int, nack: bool) -> None:
        """Settles whatever was ever delivered to anybody: mostly too late, or not its own."""
        if self.deliveries:
            self._settle(self.peers[name], *self.deliveries[which % len(self.deliveries)], nack=nack)

    def _settle(self, peer: _Peer, task: str, epoch: int, *, nack: bool) -> None:
        if not self._known(peer):
            return
        right = self.holder.get(task) == (peer.session, epoch)
        self.settling = task if right and not nack else None
        before = self.core.statistics()
        number = peer.next_id()
        self._say(peer, (TaskNack if nack else TaskAck)(id=number, task=task, epoch=epoch))
        self.settling = None
        if peer.held.get(task) == epoch:
            del peer.held[task]
        assert Done(id=number, stale=not right) in peer.inbox
        if not right:
            assert self.core.statistics() == before, "a late word changes nothing"

    @rule(name=NAMES)
    def loses_its_connection(self, name: str) -> None:
        self.peers[name].connected = False
        self.peers[name].inbox.clear()
        self._carry_out(self.core.disconnected(name))

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
        peer.credit = {"run": 2}
        self._hello(peer)

    def _gone(self, name: str) -> None:
        """A later peer in its place is a new process: it has nothing in hand and repeats nothing."""
        peer = self.peers[name]
        peer.connected = False
        peer.held, peer.credit, peer.said = {}, {}, []
        peer.inbox.clear()

    @rule(seconds=st.sampled_from([0.01, 0.1, 1.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._carry_out(self.core.tick(self.now))
        self._forget_the_silent()

    @rule(name=NAMES)
    def is_silent(self, name: str) -> None:
        """All others show that they live for longer than a lease."""
        for _ in range(5):
            self.now += LEASE_S / 4
            for peer in self.peers.values():
                if peer.session != name and self._known(peer):
                    self._say(peer, Heartbeat())
            self._carry_out(self.core.tick(self.now))
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
        self.core = BrokerCore(self.store.next_broker_epoch(), self.now, self.store.load())

    def _known(self, peer: _Peer) -> bool:
        return peer.connected and peer.session in self.core.sessions()

    # --- what is always true ---

    @invariant()
    def nothing_is_lost(self) -> None:
        kept = {one.task.id for one in self.store.load().tasks}
        assert set(self.accepted) - self.settled <= kept

    @invariant()
    def the_store_knows_who_holds_what(self) -> None:
        held = {one.task.id: (one.holder, one.epoch) for one in self.store.load().tasks if one.holder is not None}
        assert held == self.holder

    @invariant()
    def the_core_agrees_with_the_store(self) -> None:
        statistics, tasks = self.core.statistics(), self.store.load().tasks
        assert sum(statistics.held.values()) == len([one for one in tasks if one.holder is not None])
        pending = [one for one in tasks if one.holder is None and one.outcome is None]
        assert sum(statistics.pending.values()) == len(pending)

    @invariant()
    def keys_are_exclusive(self) -> None:
        tasks = [one for one in self.store.load().tasks if one.task.key is not None and one.outcome is None]
        held = [one.task.key for one in tasks if one.holder is not None]
        pending = [(one.task.queue, one.task.key) for one in tasks if one.holder is None]
        assert len(held) == len(set(held))
        assert len(pending) == len(set(pending))

    @invariant()
    def who_believes_to_hold_a_task_is_one(self) -> None:
        """Of several that believe it, only one has the current epoch."""
        for task, (session, epoch) in self.holder.items():
            believers = [peer.session for peer in self.peers.values() if peer.held.get(task) == epoch]
            assert believers in ([], [session])

    @invariant()
    def what_a_peer_holds_it_has_or_it_is_on_the_way(self) -> None:
        for peer in self.peers.values():
            if self._known(peer):
                here = set(peer.held.items())
                coming = {(one.task, one.epoch) for one in peer.inbox if isinstance(one, TaskDelivery)}
                theirs = {(task, epoch) for task, (session, epoch) in self.holder.items() if session == peer.session}
                assert theirs <= here | coming

    def _everything_left_is_delivered(self) -> None:
        """Whatever happened: when all others are gone, one that takes everything gets everything, once."""
        for name in PEERS:
            self._gone(name)
            self._carry_out(self.core.expired(name))
        last = self.peers[PEERS[0]]
        last.credit = {"run": 1000, "control": 1000}
        self._hello(last)
        left = set(self.accepted) - self.settled
        for _ in range(200):
            self._listen(last)
            for task, epoch in list(last.held.items()):
                self.settling = task
                self._say(last, TaskAck(id=last.next_id(), task=task, epoch=epoch))
                self.settling = None
                del last.held[task]
                left.discard(task)
            self.now += 1.0
            self._say(last, Heartbeat())
            self._carry_out(self.core.tick(self.now))
            left &= set(self.accepted)
            if not left:
                break
        assert not left, "stuck"
        assert not self.store.load().tasks, "the store is empty when all is settled"


TestBrokerMachine = BrokerMachine.TestCase
TestBrokerMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
