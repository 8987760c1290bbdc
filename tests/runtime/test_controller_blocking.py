"""The blocking face: the same controller, for code without an event loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunus import BlockingController, BlockingHandle, BlockingSelection, WatchEvent, connect_sync, errors
from prunus.runtime.controller import ProcessController, ProcessHandle
from prunus.runtime.profile import Profile
from prunus.runtime.selection import ProcessSelection
from tests.guarantees.real_daemon import RealDaemon
from tests.runtime import workflows

ONLY_ASYNCHRONOUS = {"close", "communicator"}
"""A script leaves with ``with``, and has a communicator of its own."""


@pytest.mark.parametrize(
    ("face", "blocking"),
    [
        (ProcessController, BlockingController),
        (ProcessHandle, BlockingHandle),
        (ProcessSelection, BlockingSelection),
    ],
)
def test_it_has_every_member_with_the_same_parameters(face: type, blocking: type) -> None:
    """Whoever knows one knows the other."""
    public = {name for name in vars(face) if not name.startswith("_")} - ONLY_ASYNCHRONOUS
    assert public - vars(blocking).keys() == set()
    for name in public:
        shown, known = getattr(blocking, name), getattr(face, name)
        assert list(inspect.signature(shown).parameters) == list(inspect.signature(known).parameters), name
        assert shown.__doc__, name


async def test_a_script_does_all_of_it(tmp_path: Path) -> None:
    """Launch, look, wait, control, watch, bulk: against a daemon."""
    async with RealDaemon(tmp_path, workers=1) as daemon:
        await asyncio.to_thread(script, daemon.profile)


def script(profile: Profile) -> None:
    left_open: list[Iterator[WatchEvent]] = []
    with connect_sync(profile) as controller:
        handle = controller.launch(workflows.Add, {"a": 1, "b": 2}, tags=["demo"], key="three")
        assert handle.result(timeout_s=20).outputs.sum == 3
        assert controller.launch(workflows.Add, {"a": 5}, key="three").pid == handle.pid
        watched = list(handle.watch())
        assert [event.seq for event in watched] == [event.seq for event in handle.history()]
        assert isinstance(watched[0], WatchEvent)

        several = controller.launch_many([(workflows.Ask, None)] * 3, tags=["asks"])
        asks = controller.processes(tag="asks", unfinished=True)
        assert {each.pid for each in asks} == {each.pid for each in several}
        for one in several:
            one.until(lambda row: row.state == "waiting" and row.owner is None, 20)
        assert sorted(asks.pause("lunch").done) == sorted(each.pid for each in several)
        assert asks.count() == 3
        assert str(asks.play()) == "3 done, 0 skipped"
        several[0].resume("yes")
        outcome = several[0].result(20)
        assert outcome.outputs.answer == "yes"
        with pytest.raises(errors.InvalidStateError):
            several[0].pause()
        watching = several[1].watch()
        assert next(watching).subject == "claimed"
        watching.close()  # type: ignore[attr-defined]
        left_open.append(several[1].watch())
        next(left_open[0])
        with controller.events(several[1].pid) as events:
            several[1].kill()
            assert next(events).pid == several[1].pid
        assert asks.kill().done == [several[2].pid]

        family = controller.launch("tests.runtime.workflows:Fan", {"count": 2})
        family.result(20)
        children = family.children()
        parent = children[0].parent()
        assert parent is not None
        assert (len(children), parent.pid, family.parent()) == (2, family.pid, None)
        assert controller.processes(root=family.pid).delete().skipped == {}
        assert controller.broker_statistics()["processes"].get("finished") == 2
    left_open.clear()  # what was read last is let go when its loop is gone: nobody complains
