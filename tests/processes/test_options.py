"""Queue, priority, resources and key: said by the class, by who makes the process, or by its parent."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from prunus import InvalidStateError, Process, ProcessSpec, Wait, execute, process
from prunus.errors import SpecError
from prunus.processes import Outcomes
from prunus.processes.options import MAX_NAME_CHARS
from tests.processes.bench import reloaded


class Plain(Process):
    """Its class says nothing."""

    @classmethod
    def define(cls, spec: ProcessSpec) -> None:
        super().define(spec)
        spec.input("x", valid_type=int, default=0)

    async def run(self) -> None: ...


class Heavy(Plain):
    """Its class says all."""

    queue = "gpu"
    priority = 5
    resources: ClassVar[dict[str, int]] = {"licence": 1}


class Heavier(Heavy):
    """A subclass has what its base says, but for what it says itself."""

    priority = 0


def options_of(one: Process) -> tuple[Any, ...]:
    return one.queue, one.priority, dict(one.resources), one.key


def test_the_class_says_how_it_is_run_and_the_launcher_otherwise() -> None:
    """The class's, if nothing is said for the process; if nothing is said at all, the default queue and no priority."""
    assert options_of(Plain()) == ("default", 0, {}, None)
    assert options_of(Heavy()) == ("gpu", 5, {"licence": 1}, None)
    assert options_of(Heavier()) == ("gpu", 0, {"licence": 1}, None)
    own = Heavy(queue="default", priority=9, resources={}, key="mine")
    assert options_of(own) == ("default", 9, {}, "mine")
    assert options_of(Heavy(queue=None, priority=None, resources=None, key=None)) == options_of(Heavy())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"priority": 10}, "a priority is a number from 0 to 9"),
        ({"priority": -1}, "a priority is a number from 0 to 9"),
        ({"priority": True}, "a priority is a number from 0 to 9"),
        ({"priority": 1.0}, "a priority is a number from 0 to 9"),
        ({"queue": ""}, "a queue is a text of 1 to 255 characters"),
        ({"queue": "q" * (MAX_NAME_CHARS + 1)}, "a queue is a text"),
        ({"queue": 3}, "a queue is a text"),
        ({"queue": "control"}, "choose another name"),
        ({"resources": {"licence": 0}}, "takes 1 to .* tokens, not 0"),
        ({"resources": {"licence": True}}, "tokens, not True"),
        ({"resources": {"": 1}}, "a resource is a text"),
        ({"resources": ["licence"]}, "tokens by name"),
        ({"key": ""}, "a key is a text"),
        ({"key": "one", "parent": "p"}, "a child has no key"),
        ({"tags": "demo"}, "tags are several texts"),
    ],
)
def test_what_can_not_be_meant_is_refused(options: Any, why: str) -> None:
    """Where the process is made, with what is wrong and what would be right."""
    with pytest.raises(ValueError, match=why):
        Plain(**options)


@pytest.mark.parametrize(
    "body", [{"priority": 11}, {"queue": ""}, {"queue": "control"}, {"resources": {"licence": 0}}, {"resources": 3}]
)
def test_a_class_that_says_what_can_not_be_meant_is_refused(body: dict[str, Any]) -> None:
    """Where it is defined."""
    with pytest.raises(SpecError, match="Wrong: "):
        type("Wrong", (Plain,), {**body, "__qualname__": "Wrong"})


def test_the_options_survive_a_restart() -> None:
    """A process has after it what it had before, and what it did not say itself its class says."""
    own = Heavy(priority=9, key="mine")
    assert options_of(reloaded(own)) == options_of(own)
    assert reloaded(own).snapshot() == own.snapshot()
    assert not {"queue", "resources"} & own.snapshot().keys()


def test_a_fork_keeps_all_but_the_key() -> None:
    """A key is one process's."""
    forked = Heavy(queue="other", priority=9, key="mine").fork("two", {})
    assert options_of(forked) == ("other", 9, {"licence": 1}, None)


class Parent(Process):
    """Makes children of all kinds."""

    async def run(self) -> None:
        self.submit(Plain, pid="plain")
        self.submit(Heavier, pid="class")
        self.submit(Heavy, pid="said", queue="other", priority=1, resources={"disk": 2}, tags=["demo"])


async def children_of(one: Process) -> dict[str, Process]:
    """Those that it makes in its first step."""
    await one.step()
    await one.step()
    return {child.pid: child for child in one.take_effects().children}


async def test_a_child_has_the_priority_of_its_parent_unless_somebody_says_another() -> None:
    """Not its queue and not its resources: those are for what the parent does."""
    children = await children_of(Parent(queue="gpu", priority=7, resources={"licence": 1}))
    assert options_of(children["plain"]) == ("default", 7, {}, None)
    assert options_of(children["class"]) == ("gpu", 0, {"licence": 1}, None)
    assert options_of(children["said"]) == ("other", 1, {"disk": 2}, None)
    assert children["said"].tags == ("demo",)


class Mapper(Process):
    """Fans out, one at a time."""

    async def run(self) -> Wait:
        return self.map(Plain, range(3), max_in_flight=1, queue="gpu", resources={"licence": 1}, tags=["mapped"])


async def test_all_children_of_a_fan_out_have_its_options() -> None:
    """The first ones and those that are made later, after a restart too; and the priority of their parent."""
    mapper = Mapper(pid="p", priority=3)
    [first] = (await children_of(mapper)).values()
    mapper = reloaded(mapper)
    await execute(first)
    mapper.settle(Outcomes(0.0, {first.pid: first.result()}))
    [second] = mapper.take_effects().children
    for child in (first, second):
        assert (*options_of(child), child.tags) == ("gpu", 3, {"licence": 1}, None, ("mapped",))


async def test_wrong_options_of_children_fail_the_step_that_says_them() -> None:
    """`submit` and `map` look at once."""

    class Wrong(Process):
        async def run(self) -> None:
            with pytest.raises(ValueError, match="priority"):
                self.submit(Plain, priority=10)
            with pytest.raises(ValueError, match="priority"):
                self.map(Plain, range(3), priority=10)
            with pytest.raises(TypeError):
                self.submit(Plain, label="x")  # type: ignore[call-arg]

    await execute(Wrong)
    with pytest.raises(InvalidStateError):
        Wrong().submit(Plain)


def test_a_function_says_it_too() -> None:
    """``@process`` with options is the same with them."""

    @process(queue="gpu", priority=2, resources={"licence": 1})
    def relax(self: Process) -> None: ...

    assert options_of(relax()) == ("gpu", 2, {"licence": 1}, None)
    with pytest.raises(SpecError, match="priority"):

        @process(priority=10)
        def wrong(self: Process) -> None: ...


async def test_alone_they_change_nothing() -> None:
    """Without a daemon there are no queues, and no tokens."""
    assert (await execute(Heavy(queue="nobody", resources={"unknown": 9}))).successful
