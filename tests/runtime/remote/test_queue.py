"""The queue for shared connections: who waits, who shares, who is told, and what is left behind."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from prunus.errors import EndpointUnavailableError, ShuttingDownError
from prunus.runtime.remote import Limits, ResourceQueue

QUICK = Limits(idle_s=3600, initial_interval_s=0, jitter=0, max_attempts=3)


class Line:
    """Something to share."""

    def __init__(self) -> None:
        self.is_closed = False

    async def close(self) -> None:
        self.is_closed = True


class Host:
    """Where lines lead to: `down` or not; an opening waits while `gate` is closed."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.asked = 0
        self.down: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def open(self) -> Line:
        self.asked += 1
        await self.gate.wait()
        if self.down is not None:
            raise self.down
        self.lines.append(Line())
        return self.lines[-1]


Make = Callable[..., ResourceQueue[Line]]


@pytest.fixture
async def host() -> Host:
    """One that is there."""
    return Host()


@pytest.fixture
async def make(host: Host) -> AsyncIterator[Make]:
    """Makes queues to the host, and closes them."""
    queues: list[ResourceQueue[Line]] = []

    def make(limits: Limits = QUICK, **options: Any) -> ResourceQueue[Line]:
        queues.append(ResourceQueue({"host": (host.open, limits)}, **options))
        return queues[-1]

    yield make
    for queue in queues:
        await queue.close()


async def turns(number: int = 10) -> None:
    """Let everybody else do what they can do now."""
    for _ in range(number):
        await asyncio.sleep(0)


async def use(queue: ResourceQueue[Line], work: Callable[[Line], Awaitable[Any]]) -> Any:
    """Do something with a connection."""
    async with queue.request("host") as line:
        return await work(line)


async def same(line: Line) -> Line:
    return line


async def test_all_share_one_connection(make: Make, host: Host) -> None:
    """A hundred that ask at the same time wait for one opening, and those who come later find it open."""
    queue = make()
    assert host.asked == 0
    host.gate.clear()
    users = [asyncio.create_task(use(queue, same)) for _ in range(100)]
    await turns()
    assert queue.statistics()["host"].state == "opening"
    assert queue.statistics()["host"].waiting == 100
    host.gate.set()
    lines = set(await asyncio.gather(*users))
    assert lines | {await use(queue, same)} == set(host.lines)
    usage = queue.statistics()["host"]
    assert (usage.state, usage.users, usage.waiting, usage.openings) == ("open", 0, 0, 1)


async def test_a_request_can_be_awaited_and_released(make: Make) -> None:
    """Without `async with`; to release it twice is the same as once."""
    queue = make()
    request = queue.request("host")
    line = await request
    assert not line.is_closed
    assert queue.statistics()["host"].users == 1
    with pytest.raises(RuntimeError, match="in use"):
        await request
    for _ in range(2):
        request.release()
    assert queue.statistics()["host"].users == 0


async def test_only_so_many_use_it_at_a_time(make: Make) -> None:
    """First come, first served."""
    queue = make(Limits(max_users=2, idle_s=3600))
    order: list[int] = []
    doors = [asyncio.Event() for _ in range(5)]

    async def visit(number: int) -> None:
        async with queue.request("host"):
            order.append(number)
            await doors[number].wait()

    visitors = [asyncio.create_task(visit(number)) for number in range(5)]
    await turns()
    assert order == [0, 1]
    doors[1].set()
    await turns()
    assert order == [0, 1, 2]
    for door in doors:
        door.set()
    await asyncio.gather(*visitors)
    assert order == [0, 1, 2, 3, 4]


async def test_the_last_one_to_leave_closes(make: Make, host: Host) -> None:
    """With no time to be idle, at once; the next opens a new one."""
    queue = make(Limits(idle_s=0))
    async with queue.request("host") as first:
        async with queue.request("host") as second:
            assert first is second
        await turns()
        assert not first.is_closed
    await turns()
    assert first.is_closed
    assert queue.statistics()["host"].state == "closed"
    async with queue.request("host") as third:
        assert third is host.lines[1]


async def test_a_connection_that_is_idle_is_closed_by_the_clock(make: Make, host: Host) -> None:
    """Nobody need ask for that."""
    queue = make(Limits(idle_s=0.01))
    await use(queue, same)
    while not host.lines[0].is_closed:
        await asyncio.sleep(0.005)


async def test_openings_keep_their_distance(make: Make, host: Host) -> None:
    """Who asks too early waits, and those who ask meanwhile share that wait."""
    now_s = 1000.0
    queue = make(Limits(safe_interval_s=60, idle_s=0), clock=lambda: now_s)
    await use(queue, same)
    users = [asyncio.create_task(use(queue, same)) for _ in range(3)]
    await turns()
    assert host.asked == 1
    assert queue.statistics()["host"].state == "backing off"
    now_s += 60
    users.append(asyncio.create_task(use(queue, same)))  # (whoever comes makes it look at the clock)
    assert len(set(await asyncio.gather(*users))) == 1
    assert host.asked == 2


async def test_a_failure_is_tried_again(make: Make, host: Host) -> None:
    """Those who wait hear nothing of it."""
    queue = make()
    host.down = OSError("refused")

    async def mend() -> None:
        while host.asked < 2:
            await asyncio.sleep(0)
        host.down = None

    mending = asyncio.create_task(mend())
    assert not (await use(queue, same)).is_closed
    await mending
    assert queue.statistics()["host"].failures == 0


async def test_after_so_many_failures_all_who_wait_are_told(make: Make, host: Host) -> None:
    """Each with an error of its own that says why; the next who asks begins a new series at once."""
    queue = make(Limits(initial_interval_s=0, max_attempts=3))
    host.down = OSError("refused")
    told = await asyncio.gather(*(use(queue, same) for _ in range(3)), return_exceptions=True)
    assert len({id(error) for error in told}) == 3
    for error in told:
        assert isinstance(error, EndpointUnavailableError)
        assert (error.endpoint, error.attempts, error.reason) == ("host", 3, "refused")
    assert host.asked == 3
    host.down = None
    assert not (await use(queue, same)).is_closed


async def test_a_new_series_does_not_wait_for_the_pause_of_the_old_one(make: Make, host: Host) -> None:
    """Who plays a paused process does not wait for minutes."""
    queue = make(Limits(initial_interval_s=3600, max_attempts=1))
    host.down = OSError("refused")
    with pytest.raises(EndpointUnavailableError):
        await use(queue, same)
    host.down = None
    assert not (await use(queue, same)).is_closed


async def test_what_trying_again_does_not_mend_is_not_tried_again(make: Make, host: Host) -> None:
    """An opening says so by the error that it raises."""
    queue = make()
    host.down = EndpointUnavailableError("host", 1, "the key is refused")
    with pytest.raises(EndpointUnavailableError, match="the key is refused"):
        await use(queue, same)
    assert host.asked == 1


async def test_an_opening_that_hangs_has_failed(make: Make, host: Host) -> None:
    """After `open_timeout_s`."""
    queue = make(Limits(open_timeout_s=0.01, max_attempts=1))
    host.gate.clear()
    with pytest.raises(EndpointUnavailableError, match=r"not open within 0\.01 s"):
        await use(queue, same)


async def test_an_unknown_endpoint_names_the_known_ones(make: Make) -> None:
    """It is something that a person mends, so it blocks the step as other reasons do."""
    with pytest.raises(EndpointUnavailableError, match="there are: host"):
        await make().request("hots")


async def test_who_is_cancelled_while_it_waits_leaves_no_trace(make: Make, host: Host) -> None:
    """A kill wakes it from any pause at once; with nobody left nothing more is tried."""
    queue = make(Limits(initial_interval_s=3600))
    host.down = OSError("refused")
    user = asyncio.create_task(use(queue, same))
    while queue.statistics()["host"].failures == 0:
        await asyncio.sleep(0)
    user.cancel()
    with pytest.raises(asyncio.CancelledError):
        await user
    usage = queue.statistics()["host"]
    assert (usage.state, usage.waiting, usage.failures) == ("closed", 0, 0)
    assert host.asked == 1


async def test_a_connection_that_nobody_wants_any_more_is_closed(make: Make, host: Host) -> None:
    """Also if it was being opened when the last one went."""
    queue = make(Limits(idle_s=0))
    host.gate.clear()
    user = asyncio.create_task(use(queue, same))
    await turns()
    user.cancel()
    await turns()
    host.gate.set()
    await turns()
    assert [line.is_closed for line in host.lines] == [True]


async def test_who_is_cancelled_at_the_moment_of_its_turn_has_left(make: Make, host: Host) -> None:
    """The place goes to the next one."""
    queue = make(Limits(max_users=1, idle_s=3600))
    first = queue.request("host")
    await first
    second = asyncio.create_task(use(queue, same))
    third = asyncio.create_task(use(queue, same))
    await turns()
    first.release()  # the second has its turn, and does not know it yet
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (await third) is host.lines[0]
    assert queue.statistics()["host"].users == 0


async def test_a_broken_connection_is_replaced(make: Make, host: Host) -> None:
    """Who uses it finds out by itself; the next request opens a new one, and who has the old one may leave any time."""
    queue = make()
    old = queue.request("host")
    broken = await old
    broken.is_closed = True
    async with queue.request("host") as fresh:
        assert fresh is host.lines[1]
        old.release()
        await turns()
        assert not fresh.is_closed
        assert queue.statistics()["host"].users == 1


async def test_closing_wakes_all_and_ends_all(make: Make, host: Host) -> None:
    """Those who wait, also in the middle of an opening; a closed queue takes nobody."""
    queue = make()
    held = await queue.request("host")
    host.gate.clear()
    held.is_closed = True
    waiting = asyncio.create_task(use(queue, same))
    await turns()
    await queue.close()
    await queue.close()
    with pytest.raises(ShuttingDownError):
        await waiting
    with pytest.raises(ShuttingDownError):
        await queue.request("host")
    assert len(asyncio.all_tasks()) == 1


async def test_a_connection_keeps_no_process_alive(make: Make) -> None:
    """The context of who asked first is not that of the connection."""
    queue = make()

    class Thing:
        pass

    variable: contextvars.ContextVar[Thing] = contextvars.ContextVar("thing")

    async def first() -> weakref.ref[Thing]:
        thing = Thing()
        variable.set(thing)
        await use(queue, same)
        return weakref.ref(thing)

    alive = await asyncio.create_task(first())
    await turns()
    gc.collect()
    assert queue.statistics()["host"].state == "open"
    assert alive() is None


async def test_a_thousand_waiters_cost_little(make: Make, host: Host) -> None:
    """They are granted in one go, and cancelled ones are found at once."""
    queue = make()
    host.gate.clear()
    users = [asyncio.create_task(use(queue, same)) for _ in range(10_000)]
    await turns()
    for user in users[::2]:
        user.cancel()
    await turns()
    assert queue.statistics()["host"].waiting == 5_000
    host.gate.set()
    done = await asyncio.gather(*users, return_exceptions=True)
    assert sum(isinstance(each, Line) for each in done) == 5_000
    assert host.asked == 1
