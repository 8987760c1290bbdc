"""The process store behind a broker: who is woken by its timers, and what is told of what was done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing

import msgspec
import pytest

from prunus.errors import BusyError, NotPermittedError, StoreFullError, UnknownResourceError
from prunus.messaging.access import Role
from prunus.messaging.communicator import IncomingTask
from prunus.messaging.exchange import NewTask
from prunus.messaging.inventory import QueueLimits
from prunus.messaging.local import LocalBroker
from prunus.persistence import NewProcess, Note, ProcessStore, Reply, Save, open_database, requests
from prunus.persistence.persister import Created, Event, Query
from prunus.runtime.backend import (
    ANSWERED,
    CONTROL_LANE,
    MAIL,
    PROGRESS,
    RUN_LANE,
    Backend,
    ProcessService,
    missing_tasks,
    news_of,
    who_may_ask,
)
from prunus.testing.communicator_contract import Inbox


class Clock:
    """A wall clock that tests move."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Iterator[ProcessStore]:
    with closing(open_database(":memory:")) as connection:
        yield ProcessStore(connection, clock=clock)


@pytest.fixture
def service(store: ProcessStore, clock: Clock) -> ProcessService:
    return ProcessService(store, clock=clock)


def new(pid: str = "p") -> NewProcess:
    return NewProcess(pid=pid, class_id="lab:Work", checkpoint=b"c", created_at=1.0)


def parked_until(store: ProcessStore, wake_at: float, pid: str = "p") -> None:
    store.create(new(pid))
    epoch = store.claim(pid, "w", at=1.0)[0].epoch
    store.save(Save(pid=pid, epoch=epoch, state="waiting", checkpoint=b"c", wake_at=wake_at, release=True))


class TestTimers:
    def test_what_is_due_is_a_matter_of_the_wall_clock(
        self, service: ProcessService, store: ProcessStore, clock: Clock
    ) -> None:
        """The seconds until the next one, less than none when it is late."""
        assert service.due() is None
        parked_until(store, clock.now + 30)
        parked_until(store, clock.now + 10, "q")
        assert service.due() == 10
        clock.now += 15
        assert service.due() == -5

    def test_a_timer_makes_a_task(self, service: ProcessService, store: ProcessStore, clock: Clock) -> None:
        """For who can step then, in the lane of those that step; not for who is held."""
        parked_until(store, clock.now + 10)
        parked_until(store, clock.now + 10, "held")
        store.claim("held", "w", at=1.0)
        assert service.tick() == ()
        clock.now += 10
        assert service.tick() == (NewTask(queue=RUN_LANE, key="p"),)
        assert service.due() is None

    async def test_a_process_is_woken_by_the_broker(self) -> None:
        """A timer of a day, over a real broker core, with a clock that is a day later; also after a restart."""
        clock = Clock()
        async with serving(clock) as (broker, backend):
            inbox = Inbox()
            await backend.communicator.add_task_subscriber(inbox, credit=2)
            await park(backend, "p", clock.now + 86400)
            await park(backend, "q", clock.now + 2 * 86400)
            broker.tick()
            assert inbox.came.empty()
            clock.now += 86400
            broker.tick()
            assert (await inbox.next()).key == "p"
            clock.now += 86400
            broker.restart()
            assert (await inbox.next()).key == "q"

    async def test_a_timer_fires_in_time(self) -> None:
        """Though nobody says anything, and by the clock of the machine."""
        loop = asyncio.get_running_loop()
        async with serving(lambda: 1e9 + loop.time()) as (_, backend):
            inbox = Inbox()
            await backend.communicator.add_task_subscriber(inbox)
            wake_at = 1e9 + loop.time() + 0.2
            await park(backend, "p", wake_at)
            assert (await inbox.next()).key == "p"
            late_s = 1e9 + loop.time() - wake_at
            assert 0 <= late_s < 0.5


@asynccontextmanager
async def serving(clock: Callable[[], float]) -> AsyncIterator[tuple[LocalBroker, Backend]]:
    with closing(open_database(":memory:")) as connection:
        service = ProcessService(ProcessStore(connection, clock=clock), clock=clock)
        broker = LocalBroker(connection, service=service)
        async with await broker.connect() as communicator:
            yield broker, Backend(communicator)
        broker.close()


async def park(backend: Backend, pid: str, wake_at: float) -> None:
    """It begins paused, so that there is no task for it before its timer makes one."""
    await backend.persister.create(msgspec.structs.replace(new(pid), play="paused"))
    epoch = (await backend.persister.claim(pid, "w", at=1.0)).epoch
    save = Save(pid=pid, epoch=epoch, state="waiting", checkpoint=b"c", wake_at=wake_at, release=True)
    await backend.persister.save(save)


class TestDispatch:
    """Which tasks are made of what became true."""

    def test_who_can_step_goes_to_its_queue_with_its_tokens(self, service: ProcessService, store: ProcessStore) -> None:
        """By its priority and its depth; letters go to the lane of control and need nothing."""
        options = {"queue": "gpu", "priority": 5, "resources": {"licence": 2, "a": 1}}
        create = requests.CreateRequest(msgspec.structs.replace(new(), play="paused", **options))
        served = service.execute(requests.encode_request(create), "s", Role.OWNER)
        needs = (("a", 1), ("licence", 2))
        assert (served.tasks, served.begins) == ((), NewTask(queue="gpu", key="p", needs=needs))
        epoch = store.claim("p", "w", at=1.0)[0].epoch
        child = msgspec.structs.replace(new("c"), parent="p")
        save = Save(pid="p", epoch=epoch, state="running", checkpoint=b"c", children=(child,), release=True)
        served = service.execute(requests.encode_request(requests.SaveRequest(save)), "s", Role.OWNER)
        assert served.tasks == (
            NewTask(queue=RUN_LANE, key="c", depth=1),
            NewTask(queue="gpu", key="p", priority=5, needs=needs),
        )
        served = service.execute(requests.encode_request(requests.PostRequest("p", b"pause")), "s", Role.OWNER)
        assert served.tasks == (NewTask(queue=CONTROL_LANE, key="p"),)

    def test_what_has_no_task_gets_its_own(self, store: ProcessStore) -> None:
        """Held ones too: whoever gets them next must be one of their queue."""
        for pid in ("runnable", "held", "has"):
            store.create(msgspec.structs.replace(new(pid), queue="gpu"))
        store.claim("held", "w", at=1.0)
        assert missing_tasks(store, lambda pid: pid == "has") == [
            NewTask(queue="gpu", key="runnable"),
            NewTask(queue="gpu", key="held"),
        ]

    async def test_a_resource_that_is_not_there_refuses_the_launch(self) -> None:
        """And more of it than there is, and a full queue: nothing is stored. What is there already is answered."""
        async with serving(Clock()) as (_, backend):
            create = backend.persister.create
            needy = msgspec.structs.replace(new(), resources={"gpu": 2}, key="k")
            for play in ("playing", "paused"):
                for capacity in (None, 1):
                    await backend.communicator.configure_resource("gpu", capacity)
                    with pytest.raises(UnknownResourceError, match="prunus broker resource gpu"):
                        await create(msgspec.structs.replace(needy, play=play))
            assert await backend.persister.query(Query()) == []
            await backend.communicator.configure_resource("gpu", 2)
            assert (await create(needy)).is_new
            await backend.communicator.configure_resource("gpu", None)
            assert await create(needy) == Created("p", is_new=False)
            assert await create(msgspec.structs.replace(needy, pid="q")) == Created("p", is_new=False)
            await backend.communicator.configure_queue("default", QueueLimits(max_length=1))
            with pytest.raises(BusyError, match="limit"):
                await create(new("one more"))
            assert [record.pid for record in await backend.persister.query(Query())] == ["p"]

    async def test_tokens_are_held_while_a_worker_has_the_process(self) -> None:
        """Not while it is parked; limits that are changed meanwhile hold at once, and taken away for good they make it
        wait, after a restart too."""
        clock = Clock()
        async with serving(clock) as (broker, backend):
            inbox, communicator = Inbox(), backend.communicator
            await communicator.configure_resource("gpu", 1)
            await communicator.add_task_subscriber(inbox, queue="gpu", credit=9)
            for pid in ("a", "b", "c"):
                await backend.persister.create(
                    msgspec.structs.replace(new(pid), queue="gpu", resources={"gpu": 1}, priority=int(pid == "b"))
                )

            async def taken() -> tuple[int, int]:
                gpu = (await communicator.statistics()).resources["gpu"]
                return gpu.taken, gpu.waiting

            async def park(task: IncomingTask) -> None:
                assert task.key is not None
                epoch = (await backend.claim(task.key, task)).epoch
                save = Save(
                    pid=task.key, epoch=epoch, state="waiting", checkpoint=b"c", wake_at=clock.now + 10, release=True
                )
                await backend.settle(requests.SaveRequest(save), task)
                inbox.ack(task)

            first = await inbox.next()
            assert (first.key, await taken()) == ("a", (1, 2))
            await park(first)
            second = await inbox.next()
            assert (second.key, await taken()) == ("b", (1, 1))
            await communicator.configure_resource("gpu", 2)
            third = await inbox.next()
            assert (third.key, await taken()) == ("c", (2, 0))
            await communicator.configure_resource("gpu", 1)
            await park(second)
            await park(third)
            assert await taken() == (0, 0)
            await communicator.configure_resource("gpu", None)
            clock.now += 10
            broker.tick()
            assert (await communicator.statistics()).resources["gpu"].waiting == 3
            broker.restart()
            assert (await communicator.statistics()).resources["gpu"].waiting == 3
            assert inbox.came.empty()
            await communicator.configure_resource("gpu", 3)
            assert [(await inbox.next()).key for _ in range(3)] == ["b", "a", "c"]

    async def test_inner_processes_go_before_outer_ones(self) -> None:
        """So that trees finish instead of piling up: the child of the second comes before the third, which is older."""
        async with serving(Clock()) as (_, backend):
            for pid in ("a", "b", "c"):
                await backend.persister.create(new(pid))
            inbox = Inbox()
            await backend.communicator.add_task_subscriber(inbox)
            first = await inbox.next()
            claim = await backend.claim("a", first)
            child = msgspec.structs.replace(new("child"), parent="a")
            save = Save(
                pid="a", epoch=claim.epoch, state="waiting", checkpoint=b"c", children=(child,), waits=(("child",),),
                release=True,
            )  # fmt: skip
            await backend.settle(requests.SaveRequest(save), first)
            inbox.ack(first)
            order = []
            for _ in range(3):
                task = await inbox.next()
                order.append(task.key)
                inbox.ack(task)
            assert order == ["child", "b", "c"]

    @pytest.mark.parametrize(("role", "may"), [(Role.VIEWER, False), (Role.CONTROLLER, True), (Role.WORKER, True)])
    def test_who_may_forget(self, service: ProcessService, role: Role, may: bool) -> None:
        """Whoever may delete."""
        request = requests.encode_request(requests.PruneRequest(Query()))
        assert (role in who_may_ask(requests.DeleteRequest("p"))) == may
        if may:
            assert (
                requests.decode_answer(requests.PruneRequest(Query()), service.execute(request, "s", role).answer) == 0
            )
        else:
            with pytest.raises(NotPermittedError):
                service.execute(request, "s", role)


class TestNews:
    def test_answers_are_told_beside_the_transitions(self) -> None:
        """Who waits for one looks again, whatever else the save says; without answers a transition is enough."""
        event = Event(subject="created.running", at=1.0)
        save = Save(pid="p", epoch=1, state="running", events=(event,))
        assert subjects(requests.SaveRequest(save)) == ["state_changed.created.running"]
        save = Save(pid="p", epoch=1, state="running", events=(event,), replies=(Reply(1, b"x"),))
        assert subjects(requests.SaveRequest(save)) == ["state_changed.created.running", ANSWERED]
        save = Save(pid="p", epoch=1, state="running", replies=(Reply(1, b"x"),))
        assert subjects(requests.SaveRequest(save)) == [ANSWERED]

    def test_notes_and_mail_are_told(self) -> None:
        """By the process that they are about."""
        assert subjects(requests.NoteRequest(Note(pid="p", epoch=1, progress=0.5))) == [PROGRESS]
        assert subjects(requests.SendRequest("p", "name", b"", 1.0)) == [MAIL]


def subjects(request: requests.Request) -> list[str | None]:
    news = news_of(request)
    assert {one.sender for one in news} == {"p"}
    return [one.subject for one in news]


class TestFullDisk:
    def test_what_only_reads_goes_on(self, service: ProcessService, store: ProcessStore) -> None:
        """Replies, logs and past checkpoints too; notes and mail are refused like all that changes something."""
        store.create(new())
        service.refuse_changes = "somewhere"
        reading = (
            requests.ReplyRequest("p", 1),
            requests.LogRequest("p"),
            requests.PastRequest("p"),
            requests.LoadRequest("p"),
        )
        for request in reading:
            service.execute(requests.encode_request(request), "s", Role.OWNER)
        for request in (requests.NoteRequest(Note(pid="p", epoch=1)), requests.SendRequest("p", "m", b"", 1.0)):
            with pytest.raises(StoreFullError):
                service.execute(requests.encode_request(request), "s", Role.OWNER)

    def test_letters_go_to_the_lane_of_control(self, service: ProcessService, store: ProcessStore) -> None:
        """Never behind long work."""
        store.create(new())
        served = service.execute(requests.encode_request(requests.PostRequest("p", b"pause")), "s", Role.OWNER)
        assert served.tasks == (NewTask(queue=CONTROL_LANE, key="p"),)
