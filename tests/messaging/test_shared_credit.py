"""Shared subscriptions: several queues, one credit."""

from __future__ import annotations

import asyncio
import random

import pytest

from prunus.messaging.communicator import IncomingTask
from prunus.messaging.local import LocalBroker
from prunus.messaging.messages import Hello, Peer, ResourceConfigure, TaskSubscribe, TaskUnsubscribe
from tests.messaging.test_queues import Floor, Sends

QUEUES = ("gpu", "default", "late")


class SharedFloor(Floor):
    def share(self, name: str, credit: int, *queues: str) -> list[str]:
        """Subscribe to these queues with one credit; the tasks that come at once."""
        if name not in self.core.sessions():
            self.hello(name)
        given = []
        for queue in queues:
            message = TaskSubscribe(id=self.next(), queue=queue, credit=credit, shared=True)
            given += [task for _, task in self.given(self.say(name, message))]
        return given

    def free(self, name: str) -> int:
        return self.core.statistics().sessions[name].credit


@pytest.fixture
def floor() -> SharedFloor:
    return SharedFloor()


def test_all_queues_together_fill_the_credit_once(floor: SharedFloor) -> None:
    """Two queues with plenty of work, and a worker with room for three: it gets three."""
    for number in range(5):
        floor.add(f"g{number}", queue="gpu")
        floor.add(f"d{number}", queue="default")
    assert floor.share("bob", 3, "gpu", "default") == ["g0", "g1", "g2"]
    assert floor.free("bob") == 0


def test_any_of_the_queues_can_have_all_of_the_credit(floor: SharedFloor) -> None:
    """No part of it is kept for a queue without work."""
    floor.share("bob", 3, "gpu", "default")
    given = [task for number in range(5) for _, task in floor.given(floor.add(f"d{number}", queue="default"))]
    assert given == ["d0", "d1", "d2"]
    assert floor.given(floor.add("g0", queue="gpu")) == []


def test_a_free_place_goes_to_the_first_queue_that_has_work(floor: SharedFloor) -> None:
    """The order of the subscriptions is the order of preference, whatever came first."""
    for number in range(3):
        floor.add(f"l{number}", queue="late")
    for number in range(2):
        floor.add(f"d{number}", queue="default")
    floor.share("bob", 1, *QUEUES)
    floor.add("g0", queue="gpu")
    order = ["d0"]
    while order[-1] != "l2":
        [(_, task)] = floor.given(floor.ack(order[-1]))
        order.append(task)
    assert order == ["d0", "g0", "d1", "l0", "l1", "l2"]


def test_what_else_becomes_free_does_not_change_the_order(floor: SharedFloor) -> None:
    """Also when a token is given back with the place, for which tasks of the last queue wait."""
    floor.say("ann", ResourceConfigure(id=floor.next(), resource="licence", capacity=1))
    floor.share("bob", 1, *QUEUES)
    for number in range(2):
        floor.add(f"l{number}", queue="late", resources=(("licence", 1),))
    floor.add("g0", queue="gpu")
    assert floor.given(floor.ack("l0")) == [("bob", "g0")]
    floor.add("g1", queue="gpu", resources=(("licence", 1),))
    floor.add("g2", queue="gpu", resources=(("licence", 1),))
    assert floor.given(floor.ack("g0")) == [("bob", "g1")]
    floor.add("d0", queue="default")
    assert floor.given(floor.ack("g1")) == [("bob", "g2")]


def test_the_roomiest_of_several_sharers_is_served(floor: SharedFloor) -> None:
    """What one holds from the one queue counts when the other queue looks for room."""
    floor.share("bob", 4, "gpu", "default")
    floor.share("cid", 4, "default", "gpu")
    for number in range(3):
        floor.add(f"g{number}", queue="gpu")
    floor.ack("g0")
    floor.ack("g2")  # bob and cid had g0, g1, g2 in turns
    loads = {"bob": 4 - floor.free("bob"), "cid": 4 - floor.free("cid")}
    roomier = min(loads, key=lambda name: loads[name])
    assert floor.given(floor.add("d0", queue="default")) == [(roomier, "d0")]


def test_other_subscriptions_of_the_session_have_their_own_credit(floor: SharedFloor) -> None:
    """The lane for control is never full because of work."""
    floor.share("bob", 1, "gpu", "default")
    floor.worker("bob", 2, queue="control")
    floor.add("g0", queue="gpu")
    assert floor.given(floor.add("c0", queue="control")) == [("bob", "c0")]
    assert floor.free("bob") == 1


def test_a_larger_credit_and_a_queue_less_take_effect_at_once(floor: SharedFloor) -> None:
    """What was held by a subscription that is gone takes no more room in the others."""
    floor.share("bob", 1, "gpu", "default")
    floor.add("g0", queue="gpu")
    floor.add("d0", queue="default")
    floor.add("d1", queue="default")
    assert floor.share("bob", 2, "gpu", "default") == ["d0"]
    assert floor.given(floor.say("bob", TaskUnsubscribe(id=floor.next(), queue="gpu"))) == [("bob", "d1")]


def test_a_broker_that_forgot_the_session_learns_it_with_the_hello(floor: SharedFloor) -> None:
    """All that is true of a session is in its `Hello`."""
    for number in range(3):
        floor.add(f"g{number}", queue="gpu")
        floor.add(f"d{number}", queue="default")
    hello = Hello(
        session="bob", peer=Peer(), queues=(("gpu", 2), ("default", 2)), shared=(("gpu", None), ("default", None))
    )
    assert [task for _, task in floor.given(floor.say("bob", hello))] == ["g0", "g1"]


async def test_a_communicator_says_it_again_after_a_restart_of_the_broker() -> None:
    """Real peers: the bound holds before and after, and a larger credit is filled at once."""
    broker = LocalBroker()
    arrived: asyncio.Queue[str] = asyncio.Queue()

    async def hold(task: IncomingTask) -> None:
        arrived.put_nowait(task.id)
        await asyncio.get_running_loop().create_future()

    try:
        async with await broker.connect(name="worker") as worker, await broker.connect(name="sender") as sender:
            lanes = [await worker.add_task_subscriber(hold, queue=queue, credit=2, shared=True) for queue in QUEUES]
            for _ in range(3):
                for queue in QUEUES:
                    await sender.task_send(b"", queue=queue)
            taken = {await arrived.get(), await arrived.get()}
            broker.restart()
            for lane in lanes:
                await lane.set_credit(3)
            assert {task.id for task in await sender.tasks(place="held")} == taken | {await arrived.get()}
    finally:
        broker.close()


@pytest.mark.parametrize("seed", range(20))
def test_at_random_nothing_is_over_filled_and_nothing_idle(floor: SharedFloor, seed: int) -> None:
    """After each step: no worker holds more than its credit, and no task is ready that one has room for."""
    chance = random.Random(seed)
    credits = {"bob": 3, "cid": 2, "dan": 1}
    queues = {name: chance.sample(QUEUES, chance.randint(1, 3)) for name in credits}
    for name, credit in credits.items():
        floor.share(name, credit, *queues[name])
    held: set[str] = set()
    for number in range(200):
        sends: Sends = []
        if held and chance.random() < 0.5:
            task = chance.choice(sorted(held))
            held.discard(task)
            sends = floor.ack(task) if chance.random() < 0.8 else floor.nack(task, attempted=False)
        elif chance.random() < 0.9:
            sends = floor.add(f"t{number}", queue=chance.choice(QUEUES))
        else:
            name = chance.choice(sorted(credits))
            credits[name] = chance.randint(0, 4)
            held |= set(floor.share(name, credits[name], *queues[name]))
        held |= {task for _, task in floor.given(sends)}
        counts = {name: sum(floor.holder(task) == name for task in held) for name in credits}
        statistics = floor.core.statistics()
        for name, credit in credits.items():
            free = credit - counts[name]
            assert floor.free(name) == max(0, free)
            assert free <= 0 or not any(statistics.queues[queue].ready for queue in queues[name])
