"""A class that has changed since its process was saved: renamed steps, migrated checkpoints, and what can't go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from prunus.errors import SpecError
from prunus.processes import Continue, Outcomes, Process, ProcessState, RetryPolicy, Stop, Wait, WorkChain, sleep, step
from tests.processes.bench import Bench, reloaded


class Old(Process):
    """As it was."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("x", valid_type=int, default=1)

    async def run(self) -> Continue:
        return Continue(self.middle, 2)

    async def middle(self, number: int) -> list[Wait]:
        return [Wait(sleep(10), then=self.late), Wait(sleep(20), then=self.late)]

    @step(retry=RetryPolicy(jitter=0))
    async def late(self) -> Any:
        if self.status is None:
            self.set_status("tried")
            raise OSError("busy")
        return Stop("old") if self.status == "last" else self.set_status("last")


async def at(stage: int) -> Process:
    """An old process: at `middle`, waiting, waiting for the next attempt, about to take it."""
    process = Old(pid="p")
    await process.step()
    await process.step()
    if stage > 0:
        await process.step()
    if stage > 1:
        process.settle(Outcomes(process.wakes(0.0).at_s or 0.0))
        await process.step()
    if stage > 2:
        process.settle(Outcomes(process.wakes(0.0).at_s or 0.0))
    return process


def changed(name: str, base: type[Process], **members: Any) -> Any:
    return type(name, (base,), members)


@pytest.mark.parametrize("stage", range(4))
async def test_a_renamed_step_is_found_wherever_a_checkpoint_names_it(stage: int) -> None:
    """As the next one, in each of the waits, and between two attempts."""

    class New(Process):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.input("x", valid_type=int, default=1)

        async def run(self) -> None: ...

        @step(renamed_from="middle")
        async def second(self, number: int) -> list[Wait]:
            assert number == 2
            return [Wait(sleep(10), then=self.third), Wait(sleep(20), then=self.third)]

        @step(name="third", renamed_from=("later", "late"))
        async def third(self) -> Any:
            self.set_status(f"{self.status or ''}!")

    process = reloaded(await at(stage), New)
    assert process.next_step == ("second" if stage == 0 else "third")
    process = await Bench(crashes=True).run(process)
    assert process.state is ProcessState.FINISHED
    assert process.status == ("!!" if stage < 2 else "tried!!")


@pytest.mark.parametrize("stage", range(4))
async def test_a_step_that_is_gone_is_told_with_what_to_do(stage: int) -> None:
    """Instead of running something else."""
    gone = "middle" if stage == 0 else "late"

    class New(Process):
        async def run(self) -> None: ...

    with pytest.raises(SpecError) as caught:
        reloaded(await at(stage), New)
    assert str(caught.value).endswith(
        f"New has no step '{gone}'; was it renamed? Say @step(renamed_from='{gone}') at the step that it is now"
    )


async def test_a_process_that_has_ended_needs_no_steps() -> None:
    """Its result can be read although nothing of its class is left."""

    class New(Process):
        async def run(self) -> None: ...

    process = await Bench().run(Old())
    assert reloaded(process, New).result().value == process.result().value == "old"


# --- outlines ---------------------------------------------------------------------------------------


class OldChain(WorkChain):
    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.outline(cls.one, cls.two)

    async def one(self) -> None:
        self.ctx.trace = "one"

    async def two(self) -> Stop:
        return Stop(self.ctx.trace)


async def chain_at_two() -> OldChain:
    process = OldChain()
    await process.step()
    await process.step()
    return process


async def test_a_renamed_step_of_an_outline_is_found() -> None:
    """At the place where it stood."""

    class NewChain(WorkChain):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.outline(cls.first, cls.second, cls.third)

        async def first(self) -> None: ...

        @step(renamed_from="two")
        async def second(self) -> None:
            self.ctx.trace += " second"

        async def third(self) -> Stop:
            return Stop(self.ctx.trace)

    assert (await Bench().run(reloaded(await chain_at_two(), NewChain))).result().value == "one second"


async def test_an_outline_that_has_changed_there_is_told() -> None:
    """With what was expected and what stands there now."""

    class Swapped(OldChain):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.outline(cls.two, cls.one)

    class Shorter(OldChain):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.outline(cls.one)

    class Empty(OldChain):
        async def only(self) -> None: ...

        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.outline(cls.only)

    for kind, text in (
        (Swapped, r"Swapped has changed since this process was saved: what comes next was 'two', and now 'one' stands"),
        (Shorter, r"Shorter has changed since .* what comes next was 'two', and now 'the end' stands there"),
    ):
        with pytest.raises(SpecError, match=text):
            reloaded(await chain_at_two(), kind)
    process = await chain_at_two()
    snapshot = {**process.snapshot(), "position": [7]}
    with pytest.raises(SpecError, match=r"the outline has no position \(7,\); was it changed since"):
        Empty.restore(snapshot)


# --- versions ---------------------------------------------------------------------------------------


class Third(Process):
    """Version 3: its input has another name, and its step too."""

    version = 3
    seen: ClassVar[list[int]] = []

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("y", valid_type=int)

    @classmethod
    def migrate(cls, checkpoint: dict[str, Any], from_version: int) -> dict[str, Any]:
        cls.seen.append(from_version)
        if from_version < 2:
            checkpoint["inputs"] = {"y": checkpoint["inputs"]["x"] * 10}
        if from_version < 3 and checkpoint["state"].get("step") == "middle":
            checkpoint["state"] = {**checkpoint["state"], "step": "centre"}
        return checkpoint

    async def run(self) -> None: ...

    async def centre(self, number: int) -> Stop:
        return Stop([self.inputs.y, number])


async def test_a_checkpoint_of_an_older_version_is_migrated() -> None:
    """Once: what goes on is saved under the version that the class has now."""
    Third.seen.clear()
    process = reloaded(await at(0), Third)
    assert (process.inputs.y, process.next_step, process.snapshot()["version"]) == (10, "centre", 3)
    process = await Bench(crashes=True).run(process)
    assert process.result().value == [10, 2]
    assert Third.seen == [1]


async def test_a_migration_leaves_the_checkpoint_that_it_was_given() -> None:
    """The dictionary that it may change is its own."""
    snapshot = (await at(0)).snapshot()
    before = dict(snapshot)
    Third.restore(snapshot)
    assert snapshot == before


async def test_without_a_migration_an_older_checkpoint_is_taken_as_it_is() -> None:
    """A class may raise its version although the old checkpoints fit."""

    class Second(Old):
        version = 2

    process = await Bench(crashes=True).run(reloaded(await at(1), Second))
    assert process.result().value == "old"


def _raises(cls: type, checkpoint: dict[str, Any], from_version: int) -> dict[str, Any]:
    raise KeyError("z")


def _returns_nothing(cls: type, checkpoint: dict[str, Any], from_version: int) -> None:
    checkpoint["inputs"] = {}


def _breaks(cls: type, checkpoint: dict[str, Any], from_version: int) -> dict[str, Any]:
    del checkpoint["state"]
    return checkpoint


@pytest.mark.parametrize(
    ("migrate", "text"),
    [
        (_raises, r"Second\.migrate failed from version 1: KeyError\('z'\)"),
        (
            _returns_nothing,
            r"Second\.migrate must return the checkpoint, a dictionary, from version 1; it returned None",
        ),
        (_breaks, r"this is no checkpoint of a Second: KeyError\('state'\)"),
    ],
)
async def test_a_migration_that_fails_is_told(migrate: Callable[..., Any], text: str) -> None:
    """With the class, the versions and the reason."""
    second = changed("Second", Old, version=2, migrate=classmethod(migrate))
    with pytest.raises(SpecError, match=text):
        reloaded(await at(0), second)


async def test_an_older_class_does_not_take_a_newer_checkpoint() -> None:
    """It could only guess what is in there."""
    process = Third({"y": 1})
    with pytest.raises(
        SpecError, match="Old is of version 1, and this checkpoint of version 3: a newer class wrote it"
    ):
        reloaded(process, Old)
