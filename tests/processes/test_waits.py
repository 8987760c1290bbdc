"""What can be waited for: as pure data, by properties, and as a process that waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.persistence.checkpoint import decode_value, encode_value
from prunus.processes import (
    Continue,
    Mail,
    Outcomes,
    Process,
    ProcessResult,
    ProcessState,
    Resume,
    Stop,
    Wait,
    WorkChain,
    execute,
    message,
    sleep,
    until,
    waits,
)
from prunus.processes.fanout import FanOut, MapResults
from prunus.processes.waits import (
    AllOf,
    AnyOf,
    Condition,
    OnChild,
    OnMap,
    OnMessage,
    OnTime,
    condition_of,
    value_of,
    wakes_of,
)
from tests.processes.bench import Bench, reloaded

PIDS = ("a", "b", "c")
NAMES = ("yes", "no")
TIMES = (1.0, 2.0, 3.0)


def ended(pid: str, value: Any = None) -> ProcessResult:
    return ProcessResult(pid, ProcessState.FINISHED, exit_status=0, value=value)


# --- any condition ----------------------------------------------------------------------------------

leaves: st.SearchStrategy[Condition] = st.one_of(
    st.builds(OnChild, st.sampled_from(PIDS)),
    st.builds(OnTime, st.sampled_from(TIMES)),
    st.builds(OnMessage, st.sampled_from(NAMES), st.none() | st.sampled_from(TIMES), st.none() | st.integers(0, 3)),
)


def _several(items: st.SearchStrategy[Condition]) -> st.SearchStrategy[Condition]:
    listed = st.lists(items, min_size=1, max_size=4).map(tuple)
    named = listed.map(lambda several: (several, tuple(f"n{number}" for number in range(len(several)))))
    return st.one_of(
        listed.map(AllOf), listed.map(AnyOf), named.map(lambda pair: AllOf(*pair)), named.map(lambda pair: AnyOf(*pair))
    )


fans = st.builds(
    FanOut,
    class_id=st.just("m:C"),
    prefix=st.just("p.1"),
    source=st.sampled_from([("range", 0, 1), ("items", [1, 2, 3]), ("method", "item")]),
    count=st.just(3),
    max_in_flight=st.integers(1, 3),
    on_error=st.sampled_from(["collect", "fail"]),
    next=st.integers(0, 3),
    in_flight=st.lists(st.integers(0, 2), unique=True).map(tuple),
)
trees = st.recursive(leaves, _several, max_leaves=8)
conditions: st.SearchStrategy[Condition] = trees | st.builds(OnMap, fans, st.none() | st.just("name"))

events = st.lists(
    st.one_of(
        st.sampled_from([("child", pid) for pid in PIDS]),
        st.sampled_from([("mail", name) for name in NAMES]),
        st.sampled_from([("time", at_s) for at_s in TIMES]),
    ),
    max_size=12,
)
"""What happens, in its order."""


def history(happened: list[tuple[str, Any]]) -> Iterator[Outcomes]:
    """The outcomes that are known after each of these events, and before the first."""
    now_s, results, mail = 0.0, dict[str, ProcessResult](), list[Mail]()
    yield Outcomes(now_s, dict(results), list(mail))
    for kind, what in happened:
        if kind == "child":
            results.setdefault(what, ended(what))
        elif kind == "mail":
            mail.append(Mail(len(mail) + 1, what, f"mail {len(mail) + 1}"))
        else:
            now_s = max(now_s, what)
        yield Outcomes(now_s, dict(results), list(mail))


def holds(condition: Condition, outcomes: Outcomes) -> bool:
    """Whether it holds, said as simply as can be."""
    match condition:
        case OnChild(pid):
            return pid in outcomes.results
        case OnTime(at_s):
            return at_s <= outcomes.now_s
        case OnMessage(name, until_s):
            return name in {mail.name for mail in outcomes.mail} or (until_s is not None and until_s <= outcomes.now_s)
        case AllOf(items):
            return all(holds(item, outcomes) for item in items)
        case AnyOf(items):
            return any(holds(item, outcomes) for item in items)
        case OnMap(fan):
            return fan.is_done


@given(conditions)
def test_a_condition_survives_its_checkpoint(condition: Condition) -> None:
    """As plain data, through the codec, and back."""
    assert waits.from_data(decode_value(encode_value(waits.to_data(condition)))) == condition


@given(conditions, events)
def test_a_condition_holds_when_what_it_names_has_happened(condition: Condition, happened: list[Any]) -> None:
    """And once it holds it goes on to hold: what has happened is never taken back."""
    held = False
    for outcomes in history(happened):
        answer = value_of(condition, outcomes)
        assert (answer is not None) == holds(condition, outcomes)
        assert held <= (answer is not None)
        held = answer is not None


@given(trees, events)
def test_a_value_has_the_shape_of_its_condition(condition: Condition, happened: list[Any]) -> None:
    """A list for those in a list, a dictionary by name, the value of the first one; and its messages are used up."""
    for outcomes in history(happened):
        answer = value_of(condition, outcomes)
        if answer is None:
            continue
        assert set(answer.used) <= {mail.seq for mail in outcomes.mail}
        assert len(set(answer.used)) == len(answer.used)
        values = [value_of(item, outcomes) for item in getattr(condition, "items", ())]
        match condition:
            case AllOf(items, None):
                assert answer.value == [value.value for value in values if value is not None]
                assert len(answer.value) == len(items)
            case AllOf(_, names) | AnyOf(_, names) if names is not None:
                assert answer.value == {
                    name: None if value is None else value.value for name, value in zip(names, values, strict=True)
                }
            case AnyOf():
                assert answer.value in [value.value for value in values if value is not None]


@given(conditions, events)
def test_whoever_is_woken_by_its_wakes_misses_nothing(condition: Condition, happened: list[Any]) -> None:
    """From not holding to holding there is always an event that `wakes_of` has named."""
    before: Outcomes | None = None
    for outcomes in history(happened):
        if before is not None and value_of(condition, before) is None and value_of(condition, outcomes) is not None:
            wakes = wakes_of((condition,), before.now_s)
            groups = [group for group in wakes.groups if set(group) <= outcomes.results.keys()]
            by_child = any(not set(group) <= before.results.keys() for group in groups)
            by_mail = any(mail.name in wakes.names for mail in outcomes.mail[len(before.mail) :])
            by_time = wakes.at_s is not None and wakes.at_s <= outcomes.now_s
            assert by_child or by_mail or by_time
        before = outcomes


@given(trees, st.sampled_from([0.0, *TIMES]))
def test_a_time_that_is_over_wakes_nobody(condition: Condition, now_s: float) -> None:
    """So a process that goes on waiting is not woken for ever."""
    at_s = wakes_of((condition,), now_s).at_s
    assert at_s is None or at_s > now_s


@given(st.permutations(PIDS), st.permutations(PIDS))
def test_the_first_child_is_the_one_that_ended_first(asked: list[str], in_order: list[str]) -> None:
    """Not the one that stands first in the list; the rank of a list is that of its last child."""
    results = {pid: ended(pid) for pid in in_order}
    outcomes = Outcomes(0.0, results)
    first = value_of(AnyOf(tuple(OnChild(pid) for pid in asked)), outcomes)
    assert first is not None
    assert (first.value.pid, first.rank) == (in_order[0], 0)
    both = value_of(AllOf((OnChild(asked[0]), OnChild(asked[1]))), outcomes)
    assert both is not None
    assert both.rank == max(in_order.index(asked[0]), in_order.index(asked[1]))


def test_the_oldest_message_is_taken() -> None:
    """And only that one; the default comes when the time is over and there is none."""
    mail = [Mail(3, "no", 0), Mail(4, "yes", 1), Mail(5, "yes", 2)]
    assert value_of(OnMessage("yes"), Outcomes(0.0, {}, mail)) == (1, (4,), -1)
    assert value_of(OnMessage("yes", 1.0, "late"), Outcomes(9.0, {}, mail)) == (1, (4,), -1)
    assert value_of(OnMessage("yes", 1.0, "late"), Outcomes(9.0)) == ("late", (), -1)
    assert value_of(OnMessage("yes", 1.0, "late"), Outcomes(0.5)) is None


def test_of_several_messages_that_came_by_name_all_are_used_up() -> None:
    """The step is told of each; where they have no names only the one that it is told of is used up."""
    mail = [Mail(1, "no", "n"), Mail(2, "yes", "y")]
    either = (OnMessage("yes"), OnMessage("no"))
    assert value_of(AnyOf(either, ("yes", "no")), Outcomes(0.0, {}, mail)) == ({"yes": "y", "no": "n"}, (2, 1), -1)
    assert value_of(AnyOf(either), Outcomes(0.0, {}, mail)) == ("y", (2,), -1)


def test_children_that_are_waited_for_together_wake_together() -> None:
    """All of a list are one group; any of a list are one each; no group is there twice."""
    listed = AllOf((OnChild("a"), OnChild("b"), OnChild("a")))
    assert wakes_of((listed,), 0.0).groups == (("a", "b"),)
    assert wakes_of((AnyOf((OnChild("a"), OnChild("b"))), OnChild("a")), 0.0).groups == (("a",), ("b",))
    assert wakes_of((AllOf((OnChild("a"), OnTime(2.0), OnMessage("yes", 1.0))),), 0.0) == waits.Wakes(
        (("a",),), 1.0, ("yes",)
    )
    assert wakes_of((listed, OnChild("c")), 0.0).pids == ("a", "b", "c")


def test_what_is_no_condition_is_refused() -> None:
    """`ValueError` with what was found."""
    with pytest.raises(ValueError, match=r"this is no condition: \['moon'\]"):
        waits.from_data(["moon"])


# --- what the user writes ---------------------------------------------------------------------------


def test_what_can_be_waited_for() -> None:
    """Children by handle or pid, delays, moments, messages, lists of these, and conditions themselves."""
    child = waits.Child("a", "m:C")
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    assert condition_of(child) == condition_of("a") == OnChild("a")
    assert condition_of(ended("a")) == OnChild("a")
    assert condition_of([child, ["b", moment]]) == AllOf(
        (OnChild("a"), AllOf((OnChild("b"), OnTime(moment.timestamp()))))
    )
    assert condition_of(OnTime(1.0)) == OnTime(1.0)
    with pytest.raises(TypeError, match=r"one can wait for a child, sleep\(...\), .* not for 5"):
        condition_of(5)


def test_delays_and_moments_are_wall_clock_times() -> None:
    """A delay in seconds or as a timedelta; a moment in any time zone, but in one."""
    now_s = time.time()
    for condition in (sleep(60), sleep(timedelta(minutes=1)), condition_of(timedelta(minutes=1))):
        assert isinstance(condition, OnTime)
        assert now_s + 60 <= condition.at_s < now_s + 70
    zone = timezone(timedelta(hours=2))
    assert until(datetime(2030, 1, 1, 2, tzinfo=zone)) == until(datetime(2030, 1, 1, tzinfo=UTC))
    with pytest.raises(ValueError, match="a moment without a time zone is not one moment; give it a tzinfo"):
        until(datetime(2030, 1, 1))
    waiting = message("yes", timeout=timedelta(seconds=60), default=False)
    assert waiting.until_s is not None
    assert now_s + 60 <= waiting.until_s < now_s + 70
    assert message("yes") == OnMessage("yes", None, None)


def test_a_wait_can_be_written_in_several_ways() -> None:
    """What is waited for first, or the step first as in plumpy."""
    assert Wait("go", on="a") == Wait(on="a", then="go") == Wait(OnChild("a"), then="go")
    assert Wait.all("a", "b") == Wait.all(["a", "b"]) == Wait(on=["a", "b"])
    assert Wait.any(x="a", y="b").on == AnyOf((OnChild("a"), OnChild("b")), ("x", "y"))
    assert Wait.all(x="a", then="go", msg="why").on == AllOf((OnChild("a"),), ("x",))
    assert Wait().on is None


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda: Wait("go", then="on"), r"two steps can't both come next"),
        (lambda: Wait(OnTime(1.0), on="a"), r"as its first argument or as on=..., not as both"),
        (lambda: Wait.any(), r"Wait.any\(\) of nothing would never be over"),
        (lambda: Wait.all("a", x="b"), r"Wait.all\(...\): give a name to each of them, or to none"),
        (lambda: Wait(on=object()), r"one can wait for a child, sleep"),
    ],
)
def test_a_wait_that_makes_no_sense_is_refused(wrong: Any, text: str) -> None:
    """Where it is written."""
    with pytest.raises(TypeError, match=text):
        wrong()


# --- processes that wait ----------------------------------------------------------------------------


class Echo(Process):
    """Returns its input."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("value", default=None)

    async def run(self) -> Any:
        return Stop(self.inputs.value)


class Waits(Process):
    """Waits for what a subclass says, and finishes with what the next step got."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.message("yes")
        spec.message("no")

    async def run(self) -> Any:
        return self.wait(self.child("a"), self.child("b"))

    def child(self, name: str) -> waits.Child:
        return self.submit(Echo, {"value": name}, pid=f"{self.pid}.{name}")

    def wait(self, a: waits.Child, b: waits.Child) -> Any:
        raise NotImplementedError

    async def got(self, *args: Any, **kwargs: Any) -> Stop:
        return Stop([self.plain(args), self.plain(kwargs)])

    def plain(self, value: Any) -> Any:
        match value:
            case ProcessResult():
                return value.value
            case dict():
                return {name: self.plain(item) for name, item in value.items()}
            case list() | tuple():
                return [self.plain(item) for item in value]
            case _:
                return value


A_WAIT: list[tuple[str, Any, Any]] = [
    ("a child", lambda self, a, b: Wait(a, then=self.got), [["a"], {}]),
    ("a pid", lambda self, a, b: Wait(self.got, on=b.pid), [["b"], {}]),
    ("a list", lambda self, a, b: Wait([a, b], then=self.got), [[["a", "b"]], {}]),
    ("nothing", lambda self, a, b: Wait([], then=self.got), [[[]], {}]),
    ("all", lambda self, a, b: Wait.all(b, a, then=self.got), [[["b", "a"]], {}]),
    ("all by name", lambda self, a, b: Wait.all(x=a, y=b, then=self.got), [[], {"x": "a", "y": "b"}]),
    ("any", lambda self, a, b: Wait.any(b, a, then=self.got), [["a"], {}]),
    ("any by name", lambda self, a, b: Wait.any(x=b, y=a, then=self.got), [[], {"x": None, "y": "a"}]),
    ("a time", lambda self, a, b: Wait(sleep(3600), then=self.got), [[], {}]),
    ("a time that is over", lambda self, a, b: Wait(sleep(-3600), then=self.got), [[], {}]),
    (
        "a moment by name",
        lambda self, a, b: Wait.all(x=until(datetime(2001, 1, 1, tzinfo=UTC)), y=a, then=self.got),
        [[], {"x": None, "y": "a"}],
    ),
    ("no message", lambda self, a, b: Wait(message("yes", timeout=60, default=7), then=self.got), [[7], {}]),
    (
        "a list of a list",
        lambda self, a, b: Wait([[a], Wait.any(b, sleep(1)).on], then=self.got),
        [[[["a"], "b"]], {}],
    ),
    ("nothing to do", lambda self, a, b: Wait([a, b]), None),
]


@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize(("wait", "got"), [case[1:] for case in A_WAIT], ids=[case[0] for case in A_WAIT])
async def test_what_was_waited_for_is_handed_to_the_next_step(wait: Any, got: Any, crashes: bool) -> None:
    """By position, or by name where it has names; a time has no value; over restarts too."""
    kind: type[Process] = type("WaitsSo", (Waits,), {"wait": wait})
    process = await Bench(crashes=crashes).run(kind(pid="p"))
    assert process.result().value == got


async def test_real_clocks_wake_it() -> None:
    """`execute` waits for the moment, and for no longer."""

    class Naps(Waits):
        def wait(self, a: Any, b: Any) -> Any:
            return Wait(sleep(0.02), then=self.got)

    begun_s = time.time()
    assert (await execute(Naps)).value == [[], {}]
    assert 0.02 <= time.time() - begun_s < 10


async def test_a_late_time_fires_at_once() -> None:
    """A process that slept while nothing ran goes on when something does."""

    class Naps(Waits):
        def wait(self, a: Any, b: Any) -> Any:
            return Wait(sleep(-1), then=self.got)

    process = Naps()
    await process.step()
    await process.step()
    process = reloaded(process)
    assert process.wakes(time.time()).at_s is None
    assert process.settle(Outcomes(time.time()))[0].event == "waiting.running"


class Several(Process):
    """Several waits with steps of their own, one of which waits for more."""

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.message("go")

    async def run(self) -> list[Wait]:
        self.set_status("")
        children = [self.submit(Echo, {"value": name}, pid=f"{self.pid}.{name}") for name in "ab"]
        return [
            *self.as_completed(children, self.child_ended),
            Wait(sleep(100), then=self.time_over),
            Wait(message("go"), then=self.went),
            Wait(msg="waits for a person", then=self.resumed),
        ]

    def note(self, text: str) -> None:
        self.set_status(f"{self.status}{text} ")

    async def child_ended(self, result: ProcessResult) -> Any:
        self.note(result.value)
        return Wait(sleep(1000), then=self.later) if result.value == "a" else None

    async def time_over(self) -> None:
        self.note("100s")

    async def later(self) -> None:
        self.note("1000s")

    def went(self, value: Any) -> None:
        self.note(f"go({value})")

    async def resumed(self, value: Any) -> None:
        self.note(f"resumed({value})")


@pytest.mark.parametrize("crashes", [False, True])
async def test_several_waits_go_on_each_with_its_own_step(crashes: bool) -> None:
    """One at a time, as they happen; a step may add another one; the process ends when none is left."""
    bench = Bench(crashes=crashes)
    process = await bench.run(Several(pid="p"))
    assert process.status == "a b 100s 1000s "
    assert process.suspended
    bench.deliver("go", 1)
    process = await bench.run(process)
    assert process.status == "a b 100s 1000s go(1) "
    process.receive(Resume("x", True))
    process = await bench.run(process)
    assert (process.state, process.status) == (ProcessState.FINISHED, "a b 100s 1000s go(1) resumed(x) ")


@pytest.mark.parametrize("crashes", [False, True])
async def test_what_happens_meanwhile_is_not_lost(crashes: bool) -> None:
    """Everything has happened when it is looked at: each step runs once, children in the order in which they ended."""
    bench = Bench(crashes=crashes)
    process = Several(pid="p")
    await process.step()
    await process.step()
    process.take_effects()
    bench.ended = {"p.b": ended("p.b", "b"), "p.a": ended("p.a", "a")}
    bench.deliver("go", 1)
    bench.now_s += 200
    process = await bench.run(process)
    assert process.status == "100s go(1) b a 1000s "


async def test_a_resume_during_another_step_waits_for_its_end() -> None:
    """It belongs to the wait without a condition, which is still there."""
    gate, running = asyncio.Event(), asyncio.Event()

    class Busy(Process):
        async def run(self) -> list[Wait]:
            return [Wait(then=self.resumed), Wait(sleep(0), then=self.slow)]

        async def slow(self) -> None:
            running.set()
            await gate.wait()
            self.set_status(f"slow {self.status}")

        async def resumed(self, value: Any) -> Stop:
            return Stop(f"{self.status}, then {value}")

    process = Busy()
    task = asyncio.create_task(process.execute())
    await running.wait()
    process.receive(Resume("me", True), 1)
    gate.set()
    assert (await task).value == "slow None, then me"


async def test_an_outline_goes_on_when_nothing_is_waited_for_any_more() -> None:
    """Its steps may return several waits; named values, messages and children of `to_context` are in the context."""

    class Chain(WorkChain):
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.message("go")
            spec.outline(cls.first, cls.none, cls.last)

        async def first(self) -> Any:
            self.ctx.trace = []
            a, b, c = (self.submit(Echo, {"value": name}) for name in "abc")
            self.to_context(c=c)
            return [
                *self.as_completed([a, b], self.one),
                Wait.all(x=a, y=sleep(5)),
                Wait(message("go", timeout=10, default="late")),
            ]

        async def one(self, result: ProcessResult) -> None:
            self.ctx.trace = [*self.ctx.trace, result.value]

        async def none(self) -> list[Wait]:
            return self.as_completed([], self.one)

        async def last(self) -> Stop:
            return Stop([self.ctx.trace, self.ctx.x.value, self.ctx.y, self.ctx.go, self.ctx.c.value])

    for crashes in (False, True):
        process = await Bench(crashes=crashes).run(Chain())
        assert process.result().value == [["a", "b"], "a", None, "late", "c"]


@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize("kind", [Process, WorkChain])
async def test_a_process_does_not_end_before_the_children_that_it_is_to_wait_for(
    kind: type[Process], crashes: bool
) -> None:
    """Those with ``parent_close="wait"``, submitted in any of its steps; its end is the one that it had decided on."""

    class Parent(kind):  # type: ignore[valid-type,misc]
        @classmethod
        def define(cls, spec: Any) -> None:
            super().define(spec)
            spec.output("x", required=False)
            if kind is WorkChain:
                spec.outline(cls.first, cls.last)

        async def first(self) -> Any:
            self.submit(Echo, pid="early", parent_close="wait")
            return None if kind is WorkChain else Continue(self.last)

        async def last(self) -> Stop:
            self.submit(Echo, pid="late", parent_close="wait")
            self.submit(Echo, pid="other")
            self.out("x", 1)
            return Stop("mine", exit_status=4, exit_message="so it is")

        if kind is Process:
            run = first

    bench = Bench(crashes=crashes)
    process = Parent(pid="p")
    for _ in range(3):
        await process.step()
        bench.take(process)
        process = reloaded(process) if crashes else process
    assert (process.state, process.status) == (ProcessState.WAITING, "waits for its children before it ends")
    assert process.waiting_for == ("early", "late")
    process = await bench.run(process)
    assert {"early", "late"} <= bench.ended.keys()
    result = process.result()
    assert (result.value, result.exit_status, result.exit_message) == ("mine", 4, "so it is")
    assert result.outputs == {"x": 1}


async def test_it_says_what_it_waits_for() -> None:
    """In its status, its next step, its pids and its wakes."""

    class Says(Waits):
        def wait(self, a: Any, b: Any) -> Any:
            return [Wait(a, then=self.got, msg="for a"), Wait.any(b, message("yes"), sleep(60))]

    process = Says(pid="p")
    await process.step()
    (change,) = await process.step()
    assert (change.event, change.note) == ("running.waiting", "for a")
    assert (process.status, process.next_step, process.waiting_for) == ("for a", "got", ("p.a", "p.b"))
    assert len(process.waits_for) == 2
    wakes = process.wakes(0.0)
    assert (wakes.groups, wakes.names) == ((("p.a",), ("p.b",)), ("yes",))
    assert wakes.at_s is not None


async def test_settling_a_process_that_does_not_wait_changes_nothing() -> None:
    """Whatever is said to have happened."""
    process = Echo()
    assert process.settle(Outcomes(time.time(), {"p": ended("p")})) == ()
    await process.execute()
    assert process.settle(Outcomes(time.time())) == ()


def test_results_of_a_map_are_a_value_of_a_condition_too() -> None:
    """When all its children have ended, by its name if it has one."""
    done = FanOut("m:C", "p.1", ("range", 0, 1), 3, 2, "collect", next=3)
    assert value_of(OnMap(done), Outcomes(0.0)) == (MapResults("p.1", 3), (), -1)
    assert value_of(OnMap(done, "x"), Outcomes(0.0)) == ({"x": MapResults("p.1", 3)}, (), -1)
    assert wakes_of((OnMap(FanOut("m:C", "p.1", ("range", 0, 1), 3, 2, "fail", 2, (0, 1))),), 0.0).pids == (
        "p.1.0",
        "p.1.1",
    )


def test_a_mapping_is_waited_for_by_its_names() -> None:
    """Its keys are the names, and no pids."""
    condition = condition_of({"a": OnChild("p1"), "b": OnChild("p2")})
    assert condition == AllOf((OnChild("p1"), OnChild("p2")), ("a", "b"))
