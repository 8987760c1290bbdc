"""The process store behind a broker: who is woken by its timers, and what is told of what was done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing

import msgspec
import pytest

from prunus.errors import StoreFullError
from prunus.messaging.exchange import NewTask
from prunus.messaging.local import LocalBroker
from prunus.persistence import NewProcess, Note, ProcessStore, Reply, Save, open_database, requests
from prunus.persistence.persister import Event
from prunus.runtime.backend import ANSWERED, CONTROL_LANE, MAIL, PROGRESS, RUN_LANE, Backend, ProcessService, news_of
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
            service.execute(requests.encode_request(request), "s")
        for request in (requests.NoteRequest(Note(pid="p", epoch=1)), requests.SendRequest("p", "m", b"", 1.0)):
            with pytest.raises(StoreFullError):
                service.execute(requests.encode_request(request), "s")

    def test_letters_go_to_the_lane_of_control(self, service: ProcessService, store: ProcessStore) -> None:
        """Never behind long work."""
        store.create(new())
        served = service.execute(requests.encode_request(requests.PostRequest("p", b"pause")), "s")
        assert served.tasks == (NewTask(queue=CONTROL_LANE, key="p"),)
