"""Saved and read back: every state, every play state, every kind of wait; and random outlines that crash everywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.errors import Failure
from prunus.persistence.checkpoint import decode_value, encode_value
from prunus.processes import (
    AttributeDict,
    Child,
    Continue,
    DidNotHappen,
    EditContext,
    KillMessage,
    Pause,
    PauseAt,
    Process,
    ProcessResult,
    ProcessState,
    RetryPolicy,
    Stop,
    Wait,
    WorkChain,
    append_,
    if_,
    message,
    return_,
    sleep,
    step,
    while_,
)
from prunus.processes.fanout import FanOut
from prunus.processes.states import (
    Created,
    Excepted,
    Finished,
    Killed,
    Pending,
    Running,
    State,
    Waiting,
    from_data,
    to_data,
)
from prunus.processes.waits import AllOf, AnyOf, OnChild, OnMap, OnMessage, OnTime
from tests.processes.bench import Bench, checkpoint_of, reloaded

# --- a state, as data -------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3) | st.tuples(inner, inner)
    ),
    max_leaves=6,
)
names = st.sampled_from(["run", "fetch", "größe", "x"])
leaves = (
    st.builds(OnChild, st.text(max_size=5))
    | st.builds(OnTime, st.floats(0, 1e10))
    | st.builds(OnMessage, names, st.none() | st.floats(0, 1e10), values)
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        *(st.lists(inner, max_size=3).map(tuple).map(kind) for kind in (AllOf, AnyOf)),
        *(
            st.lists(inner, max_size=3).map(tuple).map(lambda items, kind=kind: kind(items, tuple("abc"[: len(items)])))
            for kind in (AllOf, AnyOf)
        ),
    ),
    max_leaves=5,
)
fans = st.builds(
    FanOut,
    st.just("m:C"),
    st.text(max_size=5),
    st.tuples(st.just("items"), st.lists(values, max_size=3))
    | st.just(("range", 0, 3))
    | st.tuples(st.just("method"), names),
    st.integers(0, 10**9),
    st.integers(1, 50),
    st.sampled_from(["collect", "fail"]),
    st.integers(0, 10**9),
    st.lists(st.integers(0, 100), max_size=3).map(tuple),
)
kwargs = st.dictionaries(names, values, max_size=2)
args = st.lists(values, max_size=2).map(tuple)
effects = st.sampled_from(["", "begun", "unknown"])
pendings = st.builds(
    Pending,
    st.none() | trees | st.builds(OnMap, fans, st.none() | names),
    st.none() | names,
    args,
    kwargs,
    st.none() | st.text(max_size=5),
    values,
    st.integers(1, 9),
    effects,
)
several = st.lists(pendings, max_size=3).map(tuple)
failures = st.recursive(
    st.builds(Failure, st.text(max_size=5), st.text(max_size=5), st.text(max_size=5)),
    lambda inner: st.builds(Failure, st.text(max_size=5), st.text(max_size=5), st.text(max_size=5), inner),
    max_leaves=3,
)
all_states: st.SearchStrategy[State] = st.one_of(
    st.builds(Created, names, args, kwargs),
    st.builds(Running, names, args, kwargs, st.integers(1, 9), effects, several),
    st.builds(Waiting, several),
    st.builds(Finished, values, st.integers(0, 999), st.none() | st.text(max_size=5)),
    st.builds(Excepted, failures),
    st.builds(Killed, st.none() | st.text(max_size=5)),
)


@given(all_states)
def test_a_state_survives_its_checkpoint(state: State) -> None:
    """Whatever is in it, through the codec, and back: equal, and of the same types."""
    assert repr(from_data(decode_value(encode_value(to_data(state))))) == repr(state)


# --- a process, in every state ----------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A value of the user's."""

    x: float
    tags: tuple[str, ...] = ()


class Leaf(Process):
    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("x", default=0)

    async def run(self) -> Stop:
        return Stop(self.inputs.x)


WAITS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda self: Wait(then=self.got, data=Point(1.0), msg="for a person"),
    "child": lambda self: Wait(self.submit(Leaf), then=self.got),
    "time": lambda self: Wait(sleep(100), then=self.got),
    "message": lambda self: Wait(message("go", timeout=100, default=Point(2.0, ("x",))), then=self.got),
    "all": lambda self: Wait.all(self.submit(Leaf), message("go", timeout=5), then=self.got),
    "any": lambda self: Wait.any(sleep(100), message("go"), then=self.got),
    "all by name": lambda self: Wait.all(a=self.submit(Leaf), b=sleep(5), then=self.got),
    "any by name": lambda self: Wait.any(a=self.submit(Leaf), b=message("go"), then=self.got),
    "map": lambda self: self.map(Leaf, range(7), max_in_flight=2, then=self.got),
    "map by name": lambda self: self.map(Leaf, [{"x": Point(3.0)}] * 3, name="points", max_in_flight=2, then=self.got),
    "several": lambda self: [
        Wait(self.submit(Leaf), then=self.got),
        Wait(message("go", timeout=3), then=self.got),
        Wait(sleep(5), then=self.got),
        self.map(Leaf, range(3), max_in_flight=1, then=self.got),
    ],
    "another attempt": lambda self: self.stumble(),
    "another attempt beside others": lambda self: [Wait(sleep(0), then=self.flaky), Wait(sleep(30), then=self.got)],
}


class Base(Process):
    """Has something of everything that is saved; the kind of wait is its input."""

    version = 4

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("wait", valid_type=str)
        spec.input_namespace("more", dynamic=True)
        spec.output("point", required=False)
        spec.message("go")

    def stumble(self) -> Any:
        if self.status != "stumbled":
            self.set_status("stumbled")
            raise OSError("busy")
        return Continue(self.got, Point(4.0), by="name")

    @step(retry=RetryPolicy(max_attempts=3, initial_interval_s=20, jitter=0))
    async def flaky(self) -> Any:
        self.set_status(f"{self.status or ''}?")
        if self.status == "?":
            raise OSError("busy")

    @step(effect="once", reconcile="look")
    async def got(self, *args: Any, **kwargs: Any) -> Any:
        self.set_status(f"{self.status or ''}{len(args)}{sorted(kwargs)} ")

    def look(self, key: str) -> DidNotHappen:
        return DidNotHappen()


class Plain(Base):
    """In steps."""

    @step(retry=RetryPolicy(max_attempts=3, initial_interval_s=20, jitter=0))
    async def run(self) -> Any:
        self.out("point", Point(1.5, ("a",)))
        await self.do("point", lambda: Point(9.0))
        self.submit(Leaf, parent_close="wait")
        return WAITS[self.inputs.wait](self)


class Chain(Base, WorkChain):
    """The same in an outline, with a context."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.outline(cls.first, while_(cls.is_not_done)(cls.second), cls.third)

    async def first(self) -> None:
        self.ctx.points = [Point(1.0)]
        self.ctx.nested = {"a": AttributeDict(b=1)["b"]}

    def is_not_done(self) -> bool:
        return "done" not in self.ctx

    @step(retry=RetryPolicy(max_attempts=3, initial_interval_s=20, jitter=0))
    async def second(self) -> Any:
        self.ctx.done = True
        self.to_context(child=self.submit(Leaf), children=append_(self.submit(Leaf)))
        return WAITS[self.inputs.wait](self)

    async def third(self) -> Stop:
        return Stop([self.ctx.points, self.ctx.child.value, len(self.ctx.children)])


INPUTS = {"more": {"point": Point(0.5), "b": b"\x00", "t": (1, 2)}}
WISHES = [
    (),
    (Pause("why", cascade=True),),
    (PauseAt("got"),),
    (PauseAt("third"), EditContext({"edited": Point(7.0)})),
]


def same(process: Process, other: Process) -> None:
    """Nothing that can be asked tells them apart."""
    assert checkpoint_of(process) == checkpoint_of(other)
    assert process.snapshot() == other.snapshot()
    assert repr(process) == repr(other)
    for name in [
        "pid",
        "parent",
        "tags",
        "created_at",
        "state",
        "play_state",
        "status",
        "next_step",
        "idempotency_key",
        "waits_for",
        "suspended",
        "can_step",
        "register",
        "inputs",
        "outputs",
        "parent_close",
    ]:
        assert getattr(process, name) == getattr(other, name), name
    assert process.wakes(0.0) == other.wakes(0.0)
    if process.has_terminated():
        assert process.result() == other.result()


async def life(kind: type[Process], wait: str, wish: tuple[Any, ...], stop_after: int | None) -> Process:
    """A process with these wishes, reloaded once, after so many changes, and run to its end."""
    bench = Bench()
    process = kind(
        {"wait": wait, **INPUTS}, pid="p", tags=("a", "b"), parent="q", parent_close="abandon", on_exception="pause"
    )

    for message_ in wish:
        process.receive(message_)
    for turn in itertools.count():
        if turn == stop_after:
            bench.take(process)
            copy = reloaded(process)
            same(process, copy)
            process = copy
        if process.has_terminated() or not await bench.turn(process):
            break
    same(process, reloaded(process))
    return process


@pytest.mark.parametrize("wish", WISHES, ids=["calm", "paused", "breakpoint", "edited"])
@pytest.mark.parametrize("kind", [Plain, Chain])
@pytest.mark.parametrize("wait", WAITS)
async def test_a_process_that_was_reloaded_is_the_same_and_ends_the_same(
    kind: type[Process], wait: str, wish: tuple[Any, ...]
) -> None:
    """In each of its states, play states and waits: the copy can't be told from it, and comes to the same end."""
    whole = await life(kind, wait, wish, None)
    for stop_after in range(14):
        broken = await life(kind, wait, wish, stop_after)
        assert (broken.state, broken.play_state, broken.next_step) == (whole.state, whole.play_state, whole.next_step)
        assert (broken.status, broken.outputs) == (whole.status, whole.outputs)
        if whole.has_terminated():
            assert broken.result() == whole.result()


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("end", ["killed", "excepted", "finished"])
async def test_a_process_that_has_ended_is_the_same_when_it_is_reloaded(wait: str, end: str) -> None:
    """Whatever it waited for, and however it ended."""
    process = Chain({"wait": wait, **INPUTS}, pid="p")
    for _ in range(3):
        await process.step()
    match end:
        case "killed":
            process.receive(KillMessage("enough", force=True))
        case "excepted":
            process.fail(Failure("ValueError", "x", cause=Failure("KeyError", "y")))
        case _:
            process = await Bench().run(process)
    assert process.has_terminated() or process.suspended
    same(process, reloaded(process))
    same(process, reloaded(reloaded(process)))


def test_a_snapshot_is_of_its_moment() -> None:
    """Later changes of the process do not reach it, and neither do changes of the snapshot reach the process."""
    process = Chain({"wait": "time"})
    snapshot = process.snapshot()
    before = encode_value(snapshot)
    process.receive(EditContext({"a": 1}))
    process.out("point", 1)
    assert encode_value(snapshot) == before
    snapshot["context"]["b"] = 2
    assert "b" not in process.ctx


# --- random outlines --------------------------------------------------------------------------------


class Steps(WorkChain):
    """Methods for random outlines: each leaves its mark in the trace. (A subclass has an outline of them.)"""

    program: ClassVar[list[Any]] = []
    seed: ClassVar[int] = 0

    def mark(self, name: str) -> int:
        """A mark in the trace, and a number that depends on all marks before it."""
        self.ctx.trace = [*self.ctx.get("trace", ()), name]
        return hash((self.seed, len(self.ctx.trace))) % 4

    async def plain(self) -> None:
        self.mark("plain")

    def threaded(self) -> None:
        self.mark("threaded")

    async def waits(self) -> Wait:
        self.mark("waits")
        return Wait(sleep(10), then=self.waited)

    async def waited(self) -> None:
        self.mark("waited")

    async def children(self) -> None:
        self.mark("children")
        self.to_context(**{f"child{len(self.ctx.trace)}": self.submit(Leaf, {"x": len(self.ctx.trace)})})
        self.to_context(all=append_(self.submit(Leaf)))

    async def several(self) -> list[Wait]:
        self.mark("several")
        children: list[Child] = [self.submit(Leaf, {"x": x}) for x in (1, 2)]
        return [*self.as_completed(children, self.one), Wait(sleep(5), then=self.waited)]

    async def one(self, result: ProcessResult) -> None:
        self.mark(f"one {result.value}")

    @step(retry=RetryPolicy(max_attempts=3, jitter=0))
    async def flaky(self) -> None:
        self.mark("flaky")
        key = self.idempotency_key
        if not (self.status or "").startswith(key):
            self.set_status(key)
            raise OSError("busy")

    @step(retry=RetryPolicy(max_attempts=2, jitter=0))
    async def does(self) -> None:
        number = await self.do("number", lambda: len(self.ctx.get("trace", ())))
        if self.status != f"does {number}":
            self.set_status(f"does {number}")
            raise OSError("busy")
        self.mark(f"does {number}")

    @step(name="stable", effect="once", reconcile="look")
    async def once(self) -> None:
        self.mark("once")

    def look(self, key: str) -> DidNotHappen:
        return DidNotHappen()

    # --- predicates: loops end, as they count ---

    def maybe(self) -> bool:
        return self.mark("maybe?") < 2

    async def maybe_later(self) -> bool:
        return self.mark("later?") < 2

    def again(self) -> bool:
        return self.mark("again?") < 2 and len(self.ctx.trace) < 40


STEPS = ["plain", "threaded", "waits", "children", "several", "flaky", "does", "once"]


def _blocks(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    block = st.lists(inner, min_size=1, max_size=3)
    predicate = st.sampled_from(["maybe", "maybe_later"])
    return st.one_of(
        st.tuples(st.just("if"), st.lists(st.tuples(predicate, block), min_size=1, max_size=3), st.none() | block),
        st.tuples(st.just("while"), block.map(lambda steps: ["plain", *steps])),  # (a loop must do something)
        st.tuples(st.just("return if"), predicate, st.integers(0, 9)),
    )


programs = st.lists(st.recursive(st.sampled_from(STEPS), _blocks, max_leaves=8), min_size=1, max_size=5)


def instruction(program: Any) -> Any:
    """What one writes in `spec.outline` for it."""
    match program:
        case str():
            return program
        case ("while", block):
            return while_("again")(*map(instruction, block))
        case ("return if", predicate, code):
            return if_(predicate)(return_(code))
        case ("if", branches, otherwise):
            (predicate, block), *others = branches
            made = if_(predicate)(*map(instruction, block))
            for predicate, block in others:
                made = made.elif_(predicate)(*map(instruction, block))
            return made if otherwise is None else made.else_(*map(instruction, otherwise))
    raise AssertionError(program)


def chain_of(program: list[Any], seed: int) -> type[Steps]:
    def define(cls: Any, spec: Any) -> None:
        super(Steps, cls).define(spec)
        spec.outline(*map(instruction, program))

    return type("Random", (Steps,), {"define": classmethod(define), "program": program, "seed": seed})


@dataclass
class Machine:
    """What an outline does, said as simply as can be: a Python program that runs in one go."""

    seed: int
    trace: list[str] = field(default_factory=list)

    def mark(self, name: str) -> int:
        self.trace.append(name)
        return hash((self.seed, len(self.trace))) % 4

    def run(self, block: list[Any]) -> int | None:
        for program in block:
            match program:
                case str():
                    self.step(program)
                    code = None
                case ("while", body):
                    code = None
                    while code is None and self.mark("again?") < 2 and len(self.trace) < 40:
                        code = self.run(body)
                case ("return if", predicate, number):
                    code = number if self.ask(predicate) else None
                case ("if", branches, otherwise):
                    body = next((body for predicate, body in branches if self.ask(predicate)), otherwise or [])
                    code = self.run(body)
            if code is not None:
                return code
        return None

    def ask(self, predicate: str) -> bool:
        return self.mark({"maybe": "maybe?", "maybe_later": "later?"}[predicate]) < 2

    def step(self, name: str) -> None:
        match name:
            case "waits":
                self.trace += ["waits", "waited"]
            case "several":
                self.trace += ["several", "one 1", "one 2", "waited"]
            case "does":
                self.trace.append(f"does {len(self.trace)}")
            case _:
                self.trace.append(name)


@settings(max_examples=60, deadline=None)
@given(programs, st.integers(0, 1000))
async def test_an_outline_that_crashes_after_each_step_does_what_it_says(program: list[Any], seed: int) -> None:
    """Reloaded after each step or run in one go, with waits, retries and children: the trace is that of a program."""
    machine = Machine(seed)
    code = machine.run(program)
    for crashes in (False, True):
        process = await Bench(crashes=crashes).run(chain_of(program, seed)(pid="p"))
        assert (process.state, process.result().exit_status) == (ProcessState.FINISHED, code or 0), process.result()
        assert process.ctx.get("trace", []) == machine.trace
