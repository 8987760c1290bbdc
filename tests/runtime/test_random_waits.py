"""Waiting under chance: trees of all and any of children, times and messages, while workers and a broker come and go.

One seed is one run: a process waits for several trees at once, and what they wait for happens in any order, with
pauses, deaths and restarts in between. In the end each wait was over once, with a value that its tree allows, and each
message was used at most once, in its order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from prunus import ProcessResult, errors
from prunus.runtime.controller import ProcessHandle
from prunus.testing.local_daemon import LocalDaemon
from tests.runtime.waiting import until
from tests.runtime.workflows import Tangle

FIRST_SEED = int(os.environ.get("PRUNUS_FIRST_SEED", "0"))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("PRUNUS_SEEDS", "40")))
NAMES = ("first", "second", "third")
MAX_HOURS = 3
LATE = -1
"""The value of a message that did not come in time."""


def a_tree(chance: random.Random, children: int, names: list[str], depth: int = 2) -> list[Any]:
    """`names` are those of the messages that it does not wait for yet: one wait takes one message of a name."""
    kind = chance.choice(("child", "time", "message", "all", "any") if depth else ("child", "time", "message"))
    match kind if names or kind != "message" else "time":
        case "child":
            return ["child", chance.randrange(children)]
        case "time":
            return ["time", chance.randint(1, MAX_HOURS)]
        case "message":
            return ["message", names.pop(), chance.choice((None, 1, MAX_HOURS))]
        case _:
            return [kind, [a_tree(chance, children, names, depth - 1) for _ in range(chance.randint(1, 3))]]


def messages_of(tree: list[Any]) -> list[str]:
    match tree:
        case ["message", name, _]:
            return [name]
        case ["all" | "any", trees]:
            return [name for part in trees for name in messages_of(part)]
        case _:
            return []


def allows(tree: list[Any], value: Any, pid: str) -> bool:
    """Whether a wait for `tree` may end with `value`."""
    match tree:
        case ["child", number]:
            return isinstance(value, ProcessResult) and value.pid == f"{pid}-{number}"
        case ["time", _]:
            return value is None
        case ["message", _, hours]:
            return isinstance(value, int) and (value != LATE or hours is not None)
        case ["all", trees]:
            return value.keys() == names_of(trees) and all(
                allows(part, value[f"_{number}"], pid) for number, part in enumerate(trees)
            )
        case ["any", trees]:
            happened = [
                (part, value[f"_{number}"]) for number, part in enumerate(trees) if value[f"_{number}"] is not None
            ]
            return (
                value.keys() == names_of(trees)
                and all(allows(part, one, pid) for part, one in happened)
                and (bool(happened) or any(part[0] == "time" or part[0] == "any" for part in trees))
            )
        case _:
            raise AssertionError(tree)


def names_of(trees: list[Any]) -> set[str]:
    return {f"_{number}" for number in range(len(trees))}


def messages_in(value: Any) -> Iterator[int]:
    if isinstance(value, int) and value != LATE:
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from messages_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from messages_in(part)


@pytest.mark.parametrize("seed", SEEDS)
async def test_each_wait_is_over_once_and_with_a_value_that_fits(seed: int) -> None:
    """Whatever happens first, and whoever dies meanwhile."""
    chance = random.Random(seed)
    children = chance.randint(1, 3)
    trees = [
        a_tree(chance, children, chance.sample(("red", "green", "blue"), 3))
        for _ in range(chance.randint(1, len(NAMES)))
    ]
    wanted = [name for tree in trees for name in messages_of(tree)]
    ahead_s = 0.0
    workers = 1
    async with LocalDaemon(slots=1 + seed % 2, clock=lambda: time.time() + ahead_s) as daemon:
        controller = daemon.controller
        handle: ProcessHandle = await controller.launch(Tangle, {"trees": trees, "children": children})
        await until(handle, lambda row: row.state == "waiting" or row.is_terminal)
        happenings: list[tuple[str, Any]] = [("end", number) for number in range(children)]
        happenings += [("send", (name, number)) for number, name in enumerate(wanted)]
        happenings += [("hour", None)] * (MAX_HOURS + 1)
        happenings += chance.choices([("die", None), ("restart", None), ("pause", None), ("look", None)], k=4)
        chance.shuffle(happenings)
        sent: dict[str, list[int]] = {"red": [], "green": [], "blue": []}
        for what, fact in happenings:
            match what:
                case "end":
                    child = controller.handle(f"{handle.pid}-{fact}")
                    await until(child, lambda row: row.state == "waiting" or row.is_terminal)
                    await child.resume(fact)
                case "send":
                    with contextlib.suppress(errors.InvalidStateError):  # it has ended
                        await handle.send(*fact)
                        sent[fact[0]].append(fact[1])
                case "hour":
                    ahead_s += 3600.0
                    daemon.broker.tick()
                case "die":
                    await daemon.kill_worker(f"worker-{workers}")
                    workers += 1
                    await daemon.start_worker(f"worker-{workers}")
                case "restart":
                    daemon.broker.restart()
                case "pause":
                    await asyncio.gather(handle.pause(), handle.play(), return_exceptions=True)
                case _:
                    for _ in range(chance.randint(0, 50)):
                        await asyncio.sleep(0)
        with contextlib.suppress(errors.InvalidStateError):
            await handle.play()
        result = await handle.result()
    ended = result.outputs.ended
    what = f"seed {seed}: {trees} ended with {ended}"
    assert ended.keys() == set(NAMES[: len(trees)]), what
    for name, tree in zip(NAMES, trees, strict=False):
        assert len(ended[name]) == 1, what
        [value] = ended[name]
        if isinstance(value, list):
            value = value[0] if value else None
        assert allows(tree, value, handle.pid), what
    used = list(messages_in(list(ended.values())))
    assert len(used) == len(set(used)), what
    for numbers in sent.values():
        mine = set(used) & set(numbers)
        assert mine == set(numbers[: len(mine)]), f"{what}, and not the oldest of {numbers} first"
