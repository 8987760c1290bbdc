"""A peer of a world: the real client core, and a script that sends, works, asks, answers and listens by chance."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prunus.errors import Failure, ProtocolError, PrunusError
from prunus.messaging.client import (
    Answer,
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
    BroadcastDelivery,
    BroadcastSend,
    BroadcastSubscribe,
    Call,
    CallDone,
    Done,
    Edited,
    Goodbye,
    Missed,
    Outcome,
    Peer,
    QueueConfigure,
    Request,
    ResourceConfigure,
    RpcDelivery,
    RpcDone,
    RpcRequest,
    RpcSubscribe,
    TaskAck,
    TaskDelivery,
    TaskEdit,
    TaskNack,
    TaskResult,
    TaskSend,
    TaskStored,
    TaskSubscribe,
    Violation,
)
from prunus.messaging.patterns import matcher
from tests.torture.sim import ledger
from tests.torture.sim.history import Asked, Delivered, Ending, Said, Sent, Written
from tests.torture.sim.network import Connection
from tests.torture.sim.timeline import Clock, Node

if TYPE_CHECKING:
    from tests.torture.sim.messaging import MessagingWorld

QUEUES = ("a", "b")
SHARED_NAME = "shared"
BURST = 6
RESOURCE, RESOURCE_CAPACITY = "gpu", 2
LIMITED_QUEUE, QUEUE_CONCURRENCY = "b", 3
UNKNOWN = ("IndeterminateError",)
"""Errors that say: nobody knows whether it happened."""


@dataclass(slots=True)
class Job:
    """A task in hand."""

    delivery: TaskDelivery
    record: Delivered

    def is_in_hand(self) -> bool:
        return self.record.ending == "open"


class SimPeer(Node):
    """See the module. It is an `Endpoint` of the network."""

    def __init__(self, world: MessagingWorld, name: str, life: int, clock: Clock) -> None:
        super().__init__(name, clock)
        self.world = world
        self.session = f"{name}.{life}"
        self.core = ClientCore(self.session, Peer(), secret=f"secret of {self.session}")
        self.chance = random.Random(f"{world.seed} {self.session}")
        everything = name in ("p0", "p1")
        self.credit: dict[tuple[str, str | None], int] = {}
        """By queue and subject pattern."""
        for queue in (*QUEUES, ledger.QUEUE):
            pattern = self.chance.choice((None, None, "s.*", "s.1")) if world.settings.special else None
            if everything or self.chance.random() < 0.5:
                pattern = None if everything or queue == ledger.QUEUE else pattern
                self.credit[queue, pattern] = self.chance.randint(1, 3)
        self.leaving = False
        self._connection: Connection | None = None
        self._wake_at = float("inf")
        self._waiting: dict[int, Callable[[Answer | PrunusError], None]] = {}
        self._jobs: dict[str, Job] = {}
        self._names: set[str] = set()
        self._pattern: tuple[str | None, str | None] = self.chance.choice(
            ((None, None), ("p1", None), (None, "s.*"), (None, "s.#"), (None, "t.1"))
        )
        self._broadcasts = 0
        self._reconnect()
        for (queue, pattern), credit in self.credit.items():
            self._subscribe(queue, pattern, credit)
        self._take_name(name)
        if self.chance.random() < 0.5:
            self._take_name(SHARED_NAME)
        if everything and world.settings.special:
            limits = QueueLimits(concurrency=QUEUE_CONCURRENCY)
            self.ask(lambda id: ResourceConfigure(id=id, resource=RESOURCE, capacity=RESOURCE_CAPACITY))
            self.ask(lambda id: QueueConfigure(id=id, queue=LIMITED_QUEUE, limits=limits))
        sender, subject = self._pattern
        self.ask(lambda id: BroadcastSubscribe(id=id, subscription=1, sender=sender, subject=subject), self._listens)

    @property
    def node(self) -> Node:
        return self

    @property
    def now(self) -> float:
        return self.clock.boottime(self.world.timeline.now)

    @property
    def is_idle(self) -> bool:
        """It waits for nobody, and nobody for it."""
        return not self._waiting and not self._jobs and not self.core.held and self.core.up

    def describe(self) -> str:
        return f"{self.session}: up={self.core.up} waits={len(self._waiting)} jobs={list(self._jobs)}"

    # --- the connection ---

    def received(self, connection: Connection, frame: bytes) -> None:
        if connection is not self._connection:
            return
        if events := self.core.wake(self.now):
            self._act(events)
            return
        try:
            events = self.core.on_frame(self.now, frame)
        except ProtocolError as error:
            self.world.complain(f"{self.session} does not understand the broker: {error}")
            return
        self._act(events)
        self._turn()

    def broken(self, connection: Connection) -> None:
        if connection is self._connection:
            self._reconnect()

    def die(self) -> None:
        """SIGKILL."""
        self.dead = True
        assert self._connection is not None, "it connects when it is made"
        self.world.network.close(self._connection)
        self._over()

    def _over(self) -> None:
        history = self.world.history
        for job in self._jobs.values():
            if job.record.ending == "open":
                job.record.ending = "dead"
        for sent in history.sent.values():
            if sent.session == self.session and sent.ending == "open":
                sent.ending = "info"
        for asked in history.asked.values():
            if asked.session == self.session and asked.ending == "open":
                asked.ending = "info"
        for said in history.said.values():
            if said.session == self.session and said.ending == "open":
                said.ending = "info"
        for written in history.written:
            if written.session == self.session and written.ending == "open":
                written.ending = "info"
        for key in [key for key in history.results_due if key[0] == self.session]:
            del history.results_due[key]

    def _reconnect(self) -> None:
        if self._connection is not None:
            self.world.network.close(self._connection)
            self.world.count("reconnections")
        self._connection = self.world.network.open(self)
        self.core.connect(self.now)
        self._send()

    def _turn(self) -> None:
        self._act(self.core.wake(self.now))
        self._act(self.core.tick(self.now))
        self._send()

    def _send(self) -> None:
        if self.dead:
            return
        assert self._connection is not None, "it connects when it is made"
        for frame in self.core.take():
            self.world.network.say(self._connection, frame)
        due = max(self.clock.world_time(self.core.due()), self.world.timeline.now + 0.001)
        if due < self._wake_at:
            self._wake_at = due
            self.world.timeline.at(due, self, self._wake, due)

    def _wake(self, due: float) -> None:
        if due == self._wake_at:
            self._wake_at = float("inf")
            self._turn()

    def ask(
        self,
        make: Callable[[int], Request],
        then: Callable[[Answer | PrunusError], None] | None = None,
        timeout_s: float | None = None,
    ) -> int:
        number = self.core.ask(self.now, make, timeout_s)
        self._waiting[number] = then or _ignore
        return number

    def later(self, seconds: float, action: Callable[..., object], *arguments: object) -> None:
        self.world.timeline.at(self.world.timeline.now + seconds, self, self._do, action, *arguments)

    def _do(self, action: Callable[..., object], *arguments: object) -> None:
        self._act(self.core.wake(self.now))
        action(*arguments)
        self._send()

    def _act(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Answered():
                    self._waiting.pop(event.id, _ignore)(event.message)
                case Failed():
                    self._waiting.pop(event.id, _ignore)(event.error)
                case TaskDelivery():
                    self._task_came(event)
                case TaskResult():
                    self._result_came(event)
                case TaskLost():
                    self.world.count("tasks lost")
                    if (job := self._jobs.get(event.task)) is not None and job.record.ending == "open":
                        job.record.ending = "lost"
                case RpcDelivery():
                    self._question_came(event)
                case BroadcastDelivery():
                    self._broadcast_came(event)
                case NameTaken():
                    self.world.count("names taken")
                    self._names.discard(event.identifier)
                case Up():
                    if event.again:
                        self.world.history.resenders.add(self.session)
                        self.world.count("sessions resumed")
                case Reconnect():
                    self.world.count("silences")
                    self._reconnect()
                case TurnedAway() | Ended():
                    self.world.complain(f"{self.session} is refused: {event.error}")
                case Violation():
                    self.world.complain(f"{self.session} is told of a violation: {event.reason}")
                case Missed():
                    self.world.count("missed broadcasts told")
                    self.world.history.missed[self.session] += event.count

    # --- sending ---

    def act(self) -> None:
        """Do something, now."""
        self._act(self.core.wake(self.now))
        deeds: list[Callable[[], None]] = (
            [self.send] * 9 + [self.send_many] + [self.question] * 5 + [self.broadcast] * 3
        )
        deeds += [self.open] * 3 + [self.read]
        if self.world.settings.editing:
            deeds += [self.edit]
        if "meddle" in self.world.profile and not self.world.network.calm:
            deeds += [self.meddle] * 2
        self.chance.choice(deeds)()
        self._send()

    def send(self) -> None:
        world, chance = self.world, self.chance
        task = world.unique("t")
        key = f"k{chance.randrange(4)}" if chance.random() < 0.3 else None
        queue = chance.choice(QUEUES)
        special = world.settings.special and chance.random() < 0.5
        options = self._special(key) if special else {}
        priority = chance.choice((0, 0, 0, 5, 9))
        wants = chance.random() < 0.4
        plain = key is None and not options and not (world.settings.special and queue == LIMITED_QUEUE)
        sent = Sent(len(world.history.sent), task, self.session, queue, key, priority, wants, plain, world.timeline.now)
        for name in ("subject", "replace", "not_before", "expires_at", "max_attempts"):
            if name in options:
                setattr(sent, name, options[name])
        world.history.sent[task] = sent

        def ended(answer: Answer | PrunusError) -> None:
            sent.ended = world.timeline.now
            if isinstance(answer, TaskStored):
                sent.ending = "ok"
                if not answer.stored:
                    sent.joined = answer.task
                    world.count("tasks joined")
                if wants:
                    world.history.results_due[self.session, answer.task] = None
                    world.history.waiting[self.session, answer.task] += 1
            else:
                sent.ending, sent.error = _ending(answer)
                world.count(f"send: {sent.error}")

        self.ask(
            lambda id: TaskSend(
                id=id,
                task=task,
                body=task.encode(),
                queue=queue,
                key=key,
                priority=priority,
                want_result=wants,
                **options,
            ),
            ended,
        )

    def _special(self, key: str | None) -> dict[str, Any]:
        chance, wall = self.chance, self.world.timeline.wall_time()
        options: dict[str, Any] = {}
        if chance.random() < 0.3:
            options["subject"] = chance.choice(("s.1", "s.2", "t.1"))
        if chance.random() < 0.2:
            options["not_before"] = wall + chance.uniform(0.0, 5.0)
        if chance.random() < 0.15:
            options["expires_at"] = wall + chance.uniform(0.0, 10.0)
        if chance.random() < 0.3:
            options["max_attempts"] = chance.randint(1, 3)
        if chance.random() < 0.2:
            resource = RESOURCE if chance.random() < 0.7 else "unknown"
            options["resources"] = ((resource, chance.randint(1, RESOURCE_CAPACITY)),)
        if key is not None and chance.random() < 0.5:
            options["replace"] = True
        return options

    def send_many(self) -> None:
        """More than anybody has room for."""
        for _ in range(BURST):
            self.send()

    def question(self) -> None:
        world, chance = self.world, self.chance
        body = world.unique("q")
        recipient = chance.choice((*world.peers, SHARED_NAME, "nobody"))
        timeout_s = chance.choice((1.0, 5.0, 20.0))
        asked = Asked(body, self.session, world.timeline.now, world.timeline.now + timeout_s / self.clock.rate)
        world.history.asked[body] = asked

        def ended(answer: Answer | PrunusError) -> None:
            asked.ended = world.timeline.now
            if asked.ending != "open":
                world.complain(f"I9: {self.session} got two answers to {body}")
            if isinstance(answer, RpcDone):
                asked.ending = "ok"
                asked.answer = _text(answer.outcome)
            else:
                asked.ending, asked.error = _ending(answer)
                world.count(f"question: {asked.error}")

        self.ask(
            lambda id: RpcRequest(id=id, recipient=recipient, body=body.encode(), timeout_s=timeout_s), ended, timeout_s
        )

    def broadcast(self) -> None:
        world = self.world
        self._broadcasts += 1
        number = self._broadcasts
        subject = self.chance.choice(("s.1", "s.1.x", "t.1", None))
        said = world.history.said[self.session, number] = Said(self.session, number, subject, world.timeline.now)

        def ended(answer: Answer | PrunusError) -> None:
            said.ended = world.timeline.now
            said.ending = "ok" if isinstance(answer, Done) else _ending(answer)[0]

        body = f"{self.session} {number}".encode()
        self.ask(lambda id: BroadcastSend(id=id, body=body, sender=self.name, subject=subject), ended)

    def open(self) -> None:
        self._call([f"open {self.world.unique('l')}"], lambda answer: None)

    def read(self) -> None:
        self._call([f"read {self.chance.choice(('l1', 'nothing'))}"], lambda answer: None)

    def edit(self) -> None:
        """Requeue, bury or delete a task of which it knows."""
        history = self.world.history
        known = [task for task, sent in history.sent.items() if sent.ending == "ok"]
        if not known:
            return
        task = self.chance.choice(known[-10:])
        actions: tuple[Literal["requeue", "bury", "delete"], ...] = ("requeue", "bury", "delete")
        action = self.chance.choice(actions)
        history.edited.setdefault(task, set()).add(action)

        def ended(answer: Answer | PrunusError) -> None:
            if isinstance(answer, Edited) and answer.changed:
                self.world.count(f"tasks edited: {action}")

        self.ask(lambda id: TaskEdit(id=id, action=action, tasks=(task,)), ended)

    def meddle(self) -> None:
        """Settle a task that somebody else holds, or write under the claim of somebody else."""
        claims = [(one.pid, one.epoch) for one in self.world.history.written if one.session != self.session]
        if claims and self.chance.random() < 0.3:
            pid, epoch = self.chance.choice(claims[-5:])
            value = self.world.unique("w")
            self._write([(f"write {pid} {epoch} {value}", epoch, value)], _ignore)
            return
        others = [one for one in self.world.history.last_delivery.values() if one.session != self.session]
        if not others:
            return
        one = self.chance.choice(others[-10:])
        if one.task in self.core.held:
            return
        kind = self.chance.choice((TaskAck, TaskNack))

        def ended(answer: Answer | PrunusError) -> None:
            if isinstance(answer, Done):
                self.world.count("settled by a stranger, refused")
                if not answer.stale:
                    self.world.complain(f"{self.session} settled {one.task} of {one.session} under epoch {one.epoch}")

        self.ask(lambda id: kind(id=id, task=one.task, epoch=one.epoch), ended)

    def leave(self) -> None:
        """A goodbye; then it is over, whatever happens."""
        if self.leaving:
            return
        self.leaving = True
        self.world.history.left.add(self.session)
        done: list[object] = []

        def over(*_: object) -> None:
            if not done:
                done.append(None)
                self.world.left(self)

        for job in self._jobs.values():
            if job.record.ending == "open":
                job.record.ending = "dead"
        self.ask(lambda id: Goodbye(id=id), over)
        self.later(2.0, over)
        self._send()

    # --- working ---

    def _task_came(self, delivery: TaskDelivery) -> None:
        world = self.world
        record = Delivered(delivery.task, delivery.epoch, delivery.attempt, self.session, world.timeline.now)
        world.delivered(record, delivery)
        place = delivery.queue, delivery.pattern
        mine = sum(
            (job.delivery.queue, job.delivery.pattern) == place
            for job in self._jobs.values()
            if job.is_in_hand() and job.delivery.task != delivery.task  # this one takes the place of an older one
        )
        limit = self.credit.get(place, 0)
        if not matcher(delivery.pattern)(delivery.subject):
            world.complain(f"{self.session} gets {delivery.task} about {delivery.subject} for {delivery.pattern}")
        if mine >= limit and not self.leaving:
            world.complain(f"I13: {self.session} holds {mine + 1} tasks of {place}, and gave credit for {limit}")
        job = self._jobs[delivery.task] = Job(delivery, record)
        work_s = self.chance.choice((0.0, 0.05, 0.3, 0.3, 1.0, 1.0, 4.0, 18.0 if not world.network.calm else 0.1))
        self.later(work_s * self.chance.random(), self._fenced if delivery.queue == ledger.QUEUE else self._worked, job)

    def _worked(self, job: Job) -> None:
        task, epoch = job.delivery.task, job.delivery.epoch
        if self.core.held.get(task) != epoch and self.chance.random() < 0.7:
            self._forget(job)
            return  # somebody else has it by now. Some say so all the same: that must be harmless.
        if self.chance.random() < (0.15 if not self.world.network.calm else 0.0):
            self._nack(job)
            return
        outcome = f"done {task} {epoch}".encode()
        self._settling(job)
        self.ask(
            lambda id: TaskAck(id=id, task=task, epoch=epoch, outcome=outcome),
            lambda answer: self._settled(job, answer),
        )

    def _nack(self, job: Job) -> None:
        task, epoch = job.delivery.task, job.delivery.epoch
        attempted = self.chance.random() < 0.8
        if job.record.ending == "open":
            job.record.ending = "nacked"
        self.world.count("tasks rejected")
        self.ask(
            lambda id: TaskNack(id=id, task=task, epoch=epoch, reason="no", attempted=attempted),
            lambda answer: self._forget(job),
        )

    def _settling(self, job: Job) -> None:
        if job.record.ending in ("open", "dead"):  # (also one who is leaving says so, and may be heard)
            job.record.ending = "unknown"

    def _settled(self, job: Job, answer: Answer | PrunusError) -> None:
        self._forget(job)
        job.record.ended = self.world.timeline.now
        if isinstance(answer, Done) and answer.stale:
            job.record.ending = "stale"
            self.world.count("stale acknowledgements")
        elif isinstance(answer, Done):
            self.world.acked(job.record)
        else:  # in a call an acknowledgement that comes too late is ignored
            job.record.ending = "unknown"

    def _forget(self, job: Job) -> None:
        if self._jobs.get(job.delivery.task) is job:
            del self._jobs[job.delivery.task]

    def _fenced(self, job: Job) -> None:
        """Claim, write, and write the end together with the acknowledgement."""
        pid = job.delivery.key

        def claimed(answer: Answer | PrunusError) -> None:
            if not isinstance(answer, CallDone):
                self._nack(job)
            elif answer.answers == (b"closed",):
                self._settling(job)
                self._call([], lambda answer: self._settled(job, answer), acks=[job])
            else:
                self.later(self.chance.random(), write, int(answer.answers[0]), self.chance.randint(0, 2))

        def write(epoch: int, times: int) -> None:
            if times:
                value = self.world.unique("w")
                fails = ["read nothing"] if self.chance.random() < 0.1 and not self.world.network.calm else []
                request = f"write {pid} {epoch} {value}"
                self._write([(request, epoch, value)], lambda answer: written(answer, epoch, times), more=fails)
                return
            value = self.world.unique("w")
            parks = self.chance.random() < 0.3 and not self.world.network.calm
            request = (
                f"park {pid} {epoch} {value} {self.chance.uniform(0.0, 5.0)}"
                if parks
                else f"close {pid} {epoch} {value}"
            )
            self._settling(job)
            self._write([(request, epoch, value)], ended, acks=[job])

        def written(answer: Answer | PrunusError, epoch: int, times: int) -> None:
            if isinstance(answer, CallDone):
                self.later(self.chance.random() * self.chance.choice((1.0, 1.0, 20.0)), write, epoch, times - 1)
            else:
                self._nack(job)

        def ended(answer: Answer | PrunusError) -> None:
            if isinstance(answer, CallDone):
                self._settled(job, answer)
            else:
                self._nack(job)

        self._call([f"claim {pid}"], claimed, holding=[job])

    def _write(
        self,
        requests: list[tuple[str, int, str]],
        then: Callable[[Answer | PrunusError], None],
        acks: Sequence[Job] = (),
        more: Sequence[str] = (),
    ) -> None:
        records = [Written(request.split()[1], epoch, value, self.session) for request, epoch, value in requests]
        self.world.history.written += records

        def ended(answer: Answer | PrunusError) -> None:
            for record in records:
                record.ending, record.error = ("ok", "") if isinstance(answer, CallDone) else _ending(answer)
            if any(record.error == "PersistenceError" for record in records):
                self.world.count("calls undone")
            if any(record.error == "StaleOwnerError" for record in records):
                self.world.count("fenced writes refused")
            then(answer)

        self._call([*(request for request, _, _ in requests), *more], ended, acks)

    def _call(
        self,
        requests: Sequence[str],
        then: Callable[[Answer | PrunusError], None],
        acks: Sequence[Job] = (),
        holding: Sequence[Job] = (),
    ) -> None:
        bodies = tuple(request.encode() for request in requests)
        settled, held = (tuple((job.delivery.task, job.delivery.epoch) for job in jobs) for jobs in (acks, holding))
        self.ask(lambda id: Call(id=id, requests=bodies, acks=settled, holding=held), then)

    # --- answering and listening ---

    def _result_came(self, result: TaskResult) -> None:
        history, key = self.world.history, (self.session, result.task)
        history.results_due.pop(key, None)
        history.results.setdefault(key, []).append(_text(result.outcome))

    def _subscribe(self, queue: str, pattern: str | None, credit: int) -> None:
        self.ask(lambda id: TaskSubscribe(id=id, queue=queue, credit=credit, subject=pattern))

    def _take_name(self, name: str) -> None:
        def taken(answer: Answer | PrunusError) -> None:
            if isinstance(answer, Done):
                self._names.add(name)
            else:
                self.world.count("names refused")

        self.ask(lambda id: RpcSubscribe(id=id, identifier=name), taken)

    def _question_came(self, question: RpcDelivery) -> None:
        body = question.body.decode()
        asked = self.world.history.asked[body]
        asked.runs.append(self.session)
        self.later(
            self.chance.choice((0.0, 0.0, 0.1, 3.0)) * self.chance.random(),
            lambda: self.core.answer(question.caller, question.id, f"answer {body} {self.session}".encode()),
        )

    def _listens(self, answer: Answer | PrunusError) -> None:
        if isinstance(answer, Done):
            self.world.history.listening[self.session] = self.world.timeline.now

    def wants(self, sender: str | None, subject: str | None) -> bool:
        """Whether it listens to this."""
        return all(matcher(pattern)(text) for pattern, text in zip(self._pattern, (sender, subject), strict=True))

    def _broadcast_came(self, message: BroadcastDelivery) -> None:
        if not self.wants(message.sender, message.subject):
            self.world.complain(
                f"{self.session} hears {message.sender} {message.subject}, and listens to {self._pattern}"
            )
        session, number = message.body.decode().split()
        self.world.history.heard.setdefault((self.session, session), []).append(int(number))


def _ignore(answer: Answer | PrunusError) -> None:
    pass


def _ending(answer: object) -> tuple[Ending, str]:
    name = type(answer).__name__
    return ("info" if name in UNKNOWN else "fail"), name


def _text(outcome: Outcome) -> str:
    if isinstance(outcome, Failure):
        return f"failure {outcome.type.rpartition('.')[2]}"
    return (outcome or b"").decode()
