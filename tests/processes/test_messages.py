"""What comes from outside while a process lives: messages that it declares, queries and updates."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest

from prunus.errors import Failure, InvalidInputError, InvalidStateError, SpecError
from prunus.processes import (
    EditContext,
    Mail,
    Outcomes,
    Process,
    ProcessState,
    Stop,
    Update,
    Wait,
    WorkChain,
    message,
    query,
    sleep,
    update,
)
from tests.processes.bench import Bench, reloaded


@dataclass(frozen=True)
class Verdict:
    """A value of a message that has fields."""

    good: bool
    why: str = ""


class Review(Process):
    """Two messages by a nested class, one by the spec."""

    @dataclass(frozen=True)
    class Messages:
        verdict: Verdict
        comment: str

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.message("count", valid_type=int)
        spec.output("limit", valid_type=int, required=False)

    async def run(self) -> Wait:
        self.out("limit", 3)
        return Wait(message("verdict"), then=self.decide)

    async def decide(self, verdict: Verdict) -> Stop:
        return Stop([type(verdict).__name__, verdict])

    # --- what can be asked ---

    @query
    def limit_plus(self, more: int = 0, *, times: float = 1) -> float:
        return float((self.outputs["limit"] + more) * times)

    @query
    def broken(self) -> None:
        raise KeyError("broken")

    @update
    def set_limit(self, limit: int) -> int:
        before = self.outputs.get("limit", 0)
        self.out("limit", limit)
        if limit < 0:
            raise ValueError("a limit is not negative")
        if limit > 1_000:
            raise SystemExit("a limit is not large")
        assert Process.current() is self
        assert Process.current_step() == "set_limit"
        return int(before)


async def waiting(kind: type[Process] = Review) -> Any:
    process = kind(pid="p")
    await process.step()
    await process.step()
    process.take_effects()
    return process


# --- messages ---------------------------------------------------------------------------------------


def waits_with(name: str, schema: Any, *, beside: bool = False) -> type[Process]:
    """A class that says the type of a message where it waits for it."""

    class Waits(Review):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.message("any_kind")

        async def run(self) -> Wait:
            waiting = message(name, schema=schema)
            return Wait.any(sleep(60), Wait.all(waiting, sleep(1))) if beside else Wait(waiting, then=self.decide)

    return Waits


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("name", "schema"), [("verdict", Verdict), ("count", int), ("any_kind", Any)])
async def test_the_type_of_a_message_may_be_said_where_it_is_waited_for(name: str, schema: Any, beside: bool) -> None:
    """It is the declared one, by a nested class or by the spec; nothing of it stands in the checkpoint."""
    process = await waiting(waits_with(name, schema, beside=beside))
    assert process.state is ProcessState.WAITING
    again = reloaded(process)
    assert again.waits_for == process.waits_for
    if not beside:
        process.settle(Outcomes(0.0, mail=[Mail(1, name, {"good": True} if schema is Verdict else 5)]))
        assert process.state is ProcessState.RUNNING


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("name", "schema", "told"),
    [
        ("verdict", int, "message 'verdict' with schema=int, and declares it with the type Verdict"),
        ("count", int | None, "message 'count' with schema=int | None, and declares it with the type int"),
        ("any_kind", int, "message 'any_kind' with schema=int, and declares it with the type Any"),
    ],
)
async def test_another_type_than_the_declared_one_is_an_error_of_the_step(
    name: str, schema: Any, told: str, beside: bool
) -> None:
    """It names the class, the message and both types, and says what to do."""
    process = await waiting(waits_with(name, schema, beside=beside))
    failure = process.result().failure
    assert failure is not None
    assert failure.type == "prunus.errors.SpecError"
    assert f"Waits waits for the {told}; say the same in both places, or leave schema= away" in failure.message


async def test_saying_the_type_does_not_declare_a_message() -> None:
    """Who sends it must know it before anybody waits: the error says how to declare it."""
    process = await waiting(waits_with("approve", Verdict))
    failure = process.result().failure
    assert failure is not None
    assert failure.type == "prunus.errors.InvalidInputError"
    assert "declare it: spec.message('approve', valid_type=Verdict)" in failure.message


@pytest.mark.parametrize("crashes", [False, True])
async def test_a_message_is_converted_to_its_type(crashes: bool) -> None:
    """As a mapping, as it comes over the wire, or as what it is; also one that came before it was waited for."""
    for value in ({"good": True, "why": "it is"}, Verdict(True, "it is")):
        bench = Bench(crashes=crashes)
        bench.deliver("comment", "early")
        bench.deliver("verdict", value)
        process = await bench.run(Review())
        assert process.result().value == ["Verdict", Verdict(True, "it is")]
        assert [mail.value for mail in bench.mail] == ["early"]


async def test_a_message_that_does_not_fit_is_dropped_and_a_line_says_so() -> None:
    """It is used up, so it is not looked at again; the process waits on for one that fits."""
    process = await waiting()
    mail = [Mail(1, "verdict", "good"), Mail(2, "verdit", True), Mail(3, "comment", "kept")]
    before = process.revision
    assert process.settle(Outcomes(0.0, {}, mail)) == ()
    assert process.revision > before
    effects = process.take_effects()
    assert effects.used_mail == (1, 2)
    wrong, unknown = effects.lines
    assert (wrong.level, unknown.level) == ("WARNING", "WARNING")
    assert wrong.text.startswith("a message was dropped: Review does not accept these values:\n  messages.verdict: ")
    assert "\n  messages.verdit: there is no such message; did you mean 'verdict'?" in unknown.text
    process.settle(Outcomes(0.0, {}, [*mail[2:], Mail(4, "verdict", Verdict(False))]))
    assert process.take_effects().used_mail == (4,)
    assert process.state is ProcessState.RUNNING


async def test_messages_are_taken_one_by_one_in_their_order() -> None:
    """Each wait takes the oldest of its name; those that nobody waited for are left."""

    class Sums(Review):
        async def run(self, total: Any = 0) -> Any:
            return Wait.any(add=message("count"), end=message("comment"), then=self.add)

        async def add(self, add: int | None, end: str | None) -> Any:
            self.set_status(f"{self.status or ''}{add}{end} ")
            return Stop() if end else Wait.any(add=message("count"), end=message("comment"), then=self.add)

    bench = Bench(crashes=True)
    for value in (1, 2, 3):
        bench.deliver("count", value)
    process = await bench.run(Sums())
    assert (process.state, process.status) == (ProcessState.WAITING, "1None 2None 3None ")
    bench.deliver("comment", "end")
    bench.deliver("count", 4)
    process = await bench.run(process)
    assert process.status == "1None 2None 3None 4end "
    assert bench.mail == []


async def test_a_message_can_be_sent_where_the_process_runs() -> None:
    """`send` checks it at once; a process that does not run here can't get one."""
    process = Review()
    with pytest.raises(InvalidStateError, match="running here to get a message"):
        process.send("comment", "x")
    with pytest.raises(InvalidInputError, match=r"messages\.komment: there is no such message; did you mean 'comment'"):
        process.send("komment", "x")
    with pytest.raises(InvalidInputError, match=r"Review does not accept these values:\n  messages\.count: "):
        process.send("count", "many")
    task = asyncio.create_task(process.execute())
    while process.state is not ProcessState.WAITING:
        await asyncio.sleep(0)
    process.send("verdict", {"good": False})
    assert (await task).value == ["Verdict", Verdict(False)]
    with pytest.raises(InvalidStateError, match="FINISHED"):
        process.send("verdict", {"good": False})


async def test_waiting_for_a_message_that_nobody_declared_is_an_error_of_the_step() -> None:
    """Also deep inside of others; it says which there are."""

    class Lost(Review):
        async def run(self) -> Any:
            return Wait.any(sleep(1), Wait.all(message("verdict"), message("aprove")).on)

    process = await Bench().run(Lost())
    failure = process.result().failure
    assert failure is not None
    assert failure.message.endswith(
        "Lost does not accept these values:\n"
        "  messages.aprove: there is no such message; there are: verdict, comment, count"
    )


def test_a_message_needs_a_name() -> None:
    """One that can be a keyword argument of the next step."""
    with pytest.raises(SpecError, match="'not a name' can't be the name of a message; take an identifier"):

        class Wrong(Process):
            @classmethod
            def define(cls, spec: Any) -> None:
                super().define(spec)
                spec.message("not a name")

            async def run(self) -> None: ...


# --- queries ----------------------------------------------------------------------------------------


async def test_a_query_is_answered_by_the_living_and_by_the_restored() -> None:
    """In every state, with arguments by position or name, checked and converted by the annotations."""
    process = await waiting()
    for asked in (process, reloaded(process)):
        before = asked.snapshot()
        assert asked.query("limit_plus") == 3
        assert asked.query("limit_plus", 4) == 7
        assert asked.query("limit_plus", more=1, times=2) == 8
        assert asked.snapshot() == before
    bench = Bench()
    bench.deliver("verdict", Verdict(True))
    assert (await bench.run(process)).query("limit_plus", 1) == 4


async def test_a_wrong_query_says_what_is_wrong() -> None:
    """An unknown name, arguments that do not fit, an update in its place; what the query raises goes on as it is."""
    process = await waiting()
    with pytest.raises(
        InvalidInputError,
        match=r"Review .*\n  limit: there is no such query or update; there are: broken, limit_plus, set_limit",
    ):
        process.query("limit")
    with pytest.raises(InvalidInputError, match=r"Review.limit_plus does .*\n  more: expected int, got 'many'"):
        process.query("limit_plus", "many")
    with pytest.raises(InvalidInputError, match=r"Review.limit_plus does .*\n  less: "):
        process.query("limit_plus", less=1)
    with pytest.raises(InvalidInputError, match=r"set_limit: it is an update, which changes the process"):
        process.query("set_limit", 3)
    with pytest.raises(KeyError, match="broken"):
        process.query("broken")


def test_the_class_knows_its_queries_and_updates() -> None:
    """By their names, inherited ones too; an override keeps the mark only if it says so itself."""

    class Sub(Review):
        @query
        def more(self) -> int:
            return 1

    assert sorted(Sub.queries()) == ["broken", "limit_plus", "more"]
    assert list(Sub.updates()) == ["set_limit"]
    assert Sub.queries()["more"] is Sub.more


@pytest.mark.parametrize("mark", [query, update])
def test_a_query_or_an_update_waits_for_nothing(mark: Any) -> None:
    """So an ``async def`` is refused, where it is written."""

    async def ask(self: Any) -> None: ...

    with pytest.raises(SpecError, match=rf"the {mark.__name__} ask is an async def"):
        mark(ask)


# --- updates ----------------------------------------------------------------------------------------


async def test_an_update_changes_the_process_and_answers() -> None:
    """Its change is in the next checkpoint, and in the history."""
    process = await waiting()
    (note,) = process.receive(Update("set_limit", [7]), "token")
    assert (note.event, note.note) == ("updated", "set_limit")
    (reply,) = process.take_effects().replies
    assert (reply.token, reply.value, reply.failure) == ("token", 3, None)
    assert reloaded(process).outputs == {"limit": 7}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (Update("set_limit", [-1]), "a limit is not negative"),
        (Update("set_limit", [1_001]), "a limit is not large"),
        (Update("set_limit", ["x"]), "Review.set_limit does not accept these values:\n  limit: expected int, got 'x'"),
        (Update("set_limit"), "Review.set_limit does not accept these values:\n  limit: "),
        (Update("set_limits", [1]), "there is no such query or update"),
        (Update("limit_plus", [1]), "limit_plus: it is a query, and changes nothing"),
        (EditContext({"a": 1}), "of a WorkChain, which has a context; Review is none"),
    ],
)
async def test_an_update_that_fails_changes_nothing(wrong: Any, text: str) -> None:
    """All of it or nothing: also what it had changed before it failed. Who sent it is told."""
    process = await waiting()
    before = process.snapshot()
    assert process.receive(wrong, 1) == ()
    assert process.snapshot() == before
    (reply,) = process.take_effects().replies
    assert isinstance(reply.failure, Failure)
    assert text in reply.failure.message
    assert process.receive(wrong) == ()
    assert process.take_effects().replies == ()


async def test_an_update_waits_for_the_end_of_the_step() -> None:
    """It sees what the step has written, and so does the next step of it; the process may end before."""
    running, gate = asyncio.Event(), asyncio.Event()

    class Busy(Review):
        async def run(self) -> Any:
            self.out("limit", 10)
            running.set()
            await gate.wait()
            return Wait(message("verdict"), then=self.decide) if not self.status else Stop()

    for ends in (False, True):
        process = Busy()
        process.set_status("ends" if ends else None)
        await process.step()
        running.clear()
        gate.clear()
        task = asyncio.create_task(process.step())
        await running.wait()
        assert process.receive(Update("set_limit", [5]), 1) == ()
        assert process.has_deferred
        gate.set()
        await task
        (reply,) = process.take_effects().replies
        assert not process.has_deferred
        if ends:
            assert reply.failure is not None
            assert reply.failure.message == "the process is FINISHED; it has to be alive"
        else:
            assert (reply.value, process.outputs) == (10, {"limit": 5})


async def test_an_update_may_make_children() -> None:
    """They are launched with the checkpoint of the update."""

    class Parent(Review):
        @update
        def add(self) -> str:
            return self.submit(Review).pid

    process = await waiting(Parent)
    process.receive(Update("add"), 1)
    effects = process.take_effects()
    assert [child.pid for child in effects.children] == [effects.replies[0].value]


async def test_the_context_can_be_edited_between_two_steps() -> None:
    """With a note in the history; the next step finds it so, over a restart too."""

    class Chain(WorkChain):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.outline(cls.first, cls.second)

        async def first(self) -> None:
            self.ctx.x = 1

        async def second(self) -> Stop:
            return Stop([self.ctx.x, self.ctx.y])

    process = Chain()
    await process.step()
    await process.step()
    (note,) = process.receive(EditContext({"x": 2, "y": 3}))
    assert (note.event, note.note) == ("context_edited", "x, y")
    assert (await Bench().run(reloaded(process))).result().value == [2, 3]
