"""What a process can wait for, as data: the end of children, a time, a message, a fan-out, and all or any of these.

A `Condition` is a small tree of frozen data. It is written into the checkpoint, it says what the store must register
so that the process is woken (`wakes_of`), and it says from the outcomes that are known whether it holds and with what
value (`value_of`). All of that is pure: the time is an argument.

What the value of a condition is: of a child its `ProcessResult`; of a message what was sent (or the default, when its
time is over); of a time None; of several in a list the list of their values; of several by name a dictionary, in which
those that did not happen (only with `any`) are None.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, assert_never

from prunus.processes.fanout import FanOut, MapResults
from prunus.processes.ports import MISSING

if TYPE_CHECKING:
    from prunus.processes.result import ProcessResult


@dataclass(frozen=True, slots=True)
class OnChild:
    """The end of the process `pid`."""

    pid: str


@dataclass(frozen=True, slots=True)
class OnTime:
    """The wall-clock time `at_s`, in seconds since 1970."""

    at_s: float


@dataclass(frozen=True, slots=True)
class OnMessage:
    """A message of this name; or, if `until_s` comes first, `default` in its place."""

    name: str
    until_s: float | None = None
    default: Any = None
    schema: Any = field(default=MISSING, compare=False, repr=False)
    """What the step that waits takes its value to be. The class declares it; that they agree is looked at once, when
    the wait begins, so this stands in no checkpoint."""


@dataclass(frozen=True, slots=True)
class AllOf:
    """Every one of `items`."""

    items: tuple[Condition, ...]
    names: tuple[str, ...] | None = None
    """The name of each, if they have names."""


@dataclass(frozen=True, slots=True)
class AnyOf:
    """The first one of `items`."""

    items: tuple[Condition, ...]
    names: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class OnMap:
    """The end of a fan-out."""

    fan: FanOut
    name: str | None = None
    """Under which its results are handed on."""


Condition = OnChild | OnTime | OnMessage | AllOf | AnyOf | OnMap


@dataclass(frozen=True, slots=True)
class Child:
    """A handle to a submitted process: what `Process.submit` gives and what can be waited for."""

    pid: str
    class_id: str


class HasPid(Protocol):
    """A handle to a process."""

    @property
    def pid(self) -> str: ...


class HasCondition(Protocol):
    """A `Wait`."""

    @property
    def on(self) -> Condition | None: ...


Waitable = Condition | str | timedelta | datetime | HasPid | HasCondition | Iterable["Waitable"]
"""What `condition_of` makes a condition of."""


# --- what the user writes ---------------------------------------------------------------------------


def sleep(delay: timedelta | float) -> OnTime:
    """A wait of `delay` (a timedelta, or seconds) from now on, by the wall clock.

    It is durable: when nothing runs at that time it is over as soon as something runs again.
    """
    seconds = delay.total_seconds() if isinstance(delay, timedelta) else float(delay)
    return OnTime(time.time() + seconds)


def until(moment: datetime) -> OnTime:
    """A wait until `moment`, which must say its time zone. Raises `ValueError` for one without."""
    if moment.tzinfo is None:
        raise ValueError(f"until({moment!r}): a moment without a time zone is not one moment; give it a tzinfo")
    return OnTime(moment.timestamp())


def message(
    name: str, *, schema: Any = MISSING, timeout: timedelta | float | None = None, default: Any = None
) -> OnMessage:
    """A wait for a message `name`; after `timeout` (a timedelta, or seconds) its value is `default`.

    The class must declare the message, in a nested `Messages` or by ``spec.message(name, valid_type=...)``: what is
    sent is checked against that type and converted to it, also before anybody waits. `schema` says the type once more
    where it is waited for, for the reader; a step whose `schema` is not the declared type fails with `SpecError`.
    """
    return OnMessage(name, None if timeout is None else sleep(timeout).at_s, default, schema)


def condition_of(what: Any) -> Condition:
    """The condition that `what` means: a condition, a child, a pid, or a list of these (all of them).

    Raises `TypeError` for anything else.
    """
    if isinstance(what, (OnChild, OnTime, OnMessage, AllOf, AnyOf, OnMap)):
        return what
    if isinstance(what, str):
        return OnChild(what)
    if isinstance(inner := getattr(what, "on", None), (OnChild, OnTime, OnMessage, AllOf, AnyOf)):
        return inner  # a `Wait` inside another one
    pid = getattr(what, "pid", None)
    if isinstance(pid, str):
        return OnChild(pid)
    if isinstance(what, (timedelta, datetime)):
        return sleep(what) if isinstance(what, timedelta) else until(what)
    if isinstance(what, Mapping):
        return AllOf(tuple(condition_of(item) for item in what.values()), tuple(what))
    if isinstance(what, Iterable):
        return AllOf(tuple(part_of(item) for item in what))
    raise TypeError(
        f"one can wait for a child, sleep(...), until(...), message(...) and for lists of these, not for {what!r}"
    )


def part_of(what: Any) -> Condition:
    """The condition that `what` means, as one of several; `TypeError` for one that must stand alone."""
    condition = condition_of(what)
    if isinstance(condition, OnMap):
        raise TypeError("a fan-out can't be a part of another wait; return what self.map gives, in a list with others")
    return condition


def names_of_values(condition: Condition) -> tuple[str, ...] | None:
    """The names of the items of the value of `condition`, if that is a dictionary."""
    match condition:
        case AllOf(names=names) | AnyOf(names=names):
            return names
        case OnMap(name=str(name)):
            return (name,)
        case _:
            return None


# --- does it hold? ----------------------------------------------------------------------------------


class Mail(NamedTuple):
    """A message that was sent to a process and not used up yet."""

    seq: int
    name: str
    value: Any
    sender: str | None = None


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What has happened, as far as it is known to who asks."""

    now_s: float
    results: Mapping[str, ProcessResult] = field(default_factory=dict)
    """Of those that have ended, in the order in which they did."""
    mail: Sequence[Mail] = ()
    """The oldest first."""


class Answer(NamedTuple):
    """A condition holds."""

    value: Any
    used: tuple[int, ...] = ()
    """The messages that it uses up."""
    rank: int = -1
    """The place in `Outcomes.results` of the last child that was needed."""


def value_of(condition: Condition, outcomes: Outcomes) -> Answer | None:
    """The value of `condition` if it holds; None if it does not hold yet."""
    match condition:
        case OnChild(pid):
            result = outcomes.results.get(pid)
            return None if result is None else Answer(result, (), list(outcomes.results).index(pid))
        case OnTime(at_s):
            return Answer(None) if outcomes.now_s >= at_s else None
        case OnMessage(name, until_s, default):
            for mail in outcomes.mail:
                if mail.name == name:
                    return Answer(mail.value, (mail.seq,))
            return Answer(default) if until_s is not None and outcomes.now_s >= until_s else None
        case AllOf(items, names):
            return _all(items, names, outcomes)
        case AnyOf(items, names):
            answers = [value_of(item, outcomes) for item in items]
            happened = [answer for answer in answers if answer is not None]
            if not happened:
                return None
            first = min(happened, key=lambda answer: answer.rank)
            used = tuple(dict.fromkeys(seq for answer in happened for seq in answer.used))
            if names is None:
                return Answer(first.value, first.used, first.rank)
            values = {
                name: None if answer is None else answer.value for name, answer in zip(names, answers, strict=True)
            }
            return Answer(values, used, first.rank)
        case OnMap(fan, name):
            results = MapResults(fan.prefix, fan.count)
            return Answer(results if name is None else {name: results}) if fan.is_done else None
        case _:
            assert_never(condition)


def _all(items: tuple[Condition, ...], names: tuple[str, ...] | None, outcomes: Outcomes) -> Answer | None:
    if all(isinstance(item, OnChild) for item in items):  # the common case, and it may be thousands of them
        results = outcomes.results
        pids = [item.pid for item in items if isinstance(item, OnChild)]
        if any(pid not in results for pid in pids):
            return None
        values = [results[pid] for pid in pids]
        places = {pid: place for place, pid in enumerate(results)}
        rank = max((places[pid] for pid in pids), default=-1)
        return Answer(values if names is None else dict(zip(names, values, strict=True)), (), rank)
    answers = []
    for item in items:
        answer = value_of(item, outcomes)
        if answer is None:
            return None
        answers.append(answer)
    values = [answer.value for answer in answers]
    return Answer(
        values if names is None else dict(zip(names, values, strict=True)),
        tuple(dict.fromkeys(seq for answer in answers for seq in answer.used)),
        max((answer.rank for answer in answers), default=-1),
    )


# --- what wakes the process -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wakes:
    """What a store must register for a process that waits."""

    groups: tuple[tuple[str, ...], ...] = ()
    """When all of one group have ended, it is worth another look."""
    at_s: float | None = None
    """The next time that is worth another look."""
    names: tuple[str, ...] = ()
    """The messages that it waits for."""

    @property
    def pids(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(pid for group in self.groups for pid in group))


def wakes_of(conditions: Iterable[Condition], now_s: float) -> Wakes:
    """What may make one of `conditions` hold. A time that is over wakes nobody any more."""
    groups: dict[tuple[str, ...], None] = {}
    times: list[float] = []
    names: dict[str, None] = {}
    for condition in conditions:
        _gather(condition, groups, times, names)
    ahead = [at_s for at_s in times if at_s > now_s]
    return Wakes(tuple(groups), min(ahead, default=None), tuple(names))


def repeated_message(condition: Condition) -> str | None:
    """The name of a message that stands more than once in `condition`; None if there is no such name."""
    known: set[str] = set()
    for each in messages_of(condition):
        if each.name in known:
            return each.name
        known.add(each.name)
    return None


def messages_of(condition: Condition) -> Iterator[OnMessage]:
    """Every message that stands in `condition`."""
    match condition:
        case OnMessage():
            yield condition
        case AllOf(items) | AnyOf(items):
            for item in items:
                yield from messages_of(item)
        case _:
            pass


def _gather(
    condition: Condition, groups: dict[tuple[str, ...], None], times: list[float], names: dict[str, None]
) -> None:
    match condition:
        case OnChild(pid):
            groups[pid,] = None
        case OnTime(at_s):
            times.append(at_s)
        case OnMessage(name, until_s):
            names[name] = None
            if until_s is not None:
                times.append(until_s)
        case AllOf(items):
            together = tuple(dict.fromkeys(item.pid for item in items if isinstance(item, OnChild)))
            if together:
                groups[together] = None
            for item in items:
                if not isinstance(item, OnChild):
                    _gather(item, groups, times, names)
        case AnyOf(items):
            for item in items:
                _gather(item, groups, times, names)
        case OnMap(fan):
            groups.update(dict.fromkeys((pid,) for pid in fan.pids))
        case _:
            assert_never(condition)


# --- as plain data ----------------------------------------------------------------------------------


def to_data(condition: Condition) -> list[Any]:
    """The condition as lists, texts, numbers and the user's own default values."""
    match condition:
        case OnChild(pid):
            return ["child", pid]
        case OnTime(at_s):
            return ["time", at_s]
        case OnMessage(name, until_s, default):
            return ["message", name, until_s, default]
        case AllOf(items, names):
            return ["all", [to_data(item) for item in items], None if names is None else list(names)]
        case AnyOf(items, names):
            return ["any", [to_data(item) for item in items], None if names is None else list(names)]
        case OnMap(fan, name):
            return ["map", {each.name: getattr(fan, each.name) for each in fields(fan)}, name]
        case _:
            assert_never(condition)


def from_data(data: Sequence[Any]) -> Condition:
    """The condition that `to_data` has described; `ValueError` for anything else."""
    match data:
        case ["child", pid]:
            return OnChild(pid)
        case ["time", at_s]:
            return OnTime(at_s)
        case ["message", name, until_s, default]:
            return OnMessage(name, until_s, default)
        case ["all" | "any" as kind, items, names]:
            several = AllOf if kind == "all" else AnyOf
            return several(tuple(from_data(item) for item in items), None if names is None else tuple(names))
        case ["map", fan, name]:
            facts = {**fan, "source": tuple(fan["source"]), "in_flight": tuple(fan["in_flight"])}
            return OnMap(FanOut(**facts), name)
        case _:
            raise ValueError(f"this is no condition: {data!r}")
