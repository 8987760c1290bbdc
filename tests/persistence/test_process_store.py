"""The process store decides who is runnable and who is called, and says so exactly when it becomes true."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from prunus.errors import BusyError, CheckpointNotFoundError, InvalidStateError, StaleOwnerError, StoreFullError
from prunus.persistence import sqlite
from prunus.persistence.persister import (
    PLAIN,
    Claim,
    Effects,
    Event,
    LogLine,
    Note,
    Query,
    Reply,
    Route,
    Save,
    Tell,
)
from prunus.persistence.sqlite import Blamed, ProcessStore, merge, open_database
from prunus.testing.persister_contract import new, save_of

NOTHING = Effects()
RUNNABLE = Effects(runnable=("p",))
NOW = 5.0
"""The time by the clock of the stores here."""
ENDS = ("finished", "excepted", "killed")


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(open_database(":memory:")) as connection:
        yield connection


@pytest.fixture
def store(connection: sqlite3.Connection) -> ProcessStore:
    return ProcessStore(connection, clock=lambda: NOW)


def started(store: ProcessStore, pid: str = "p", **changes: Any) -> Claim:
    store.create(new(pid, **changes))
    return store.claim(pid, "w", at=2.0)[0]


def end(store: ProcessStore, pid: str, state: str = "finished") -> Effects:
    return store.save(save_of(store.claim(pid, "w", at=2.0)[0], state))[1]


def parked(store: ProcessStore, pid: str = "p", **changes: Any) -> Effects:
    """The process waits, and nobody holds it."""
    return store.save(save_of(started(store, pid), "waiting", release=True, **changes))[1]


class TestRunnable:
    def test_a_new_process_is_runnable(self, store: ProcessStore) -> None:
        """Once: creating it again makes nothing true."""
        assert store.create(new())[1] == Effects(runnable=("p",))
        assert store.create(new())[1] == NOTHING

    def test_children_are_runnable(self, store: ProcessStore) -> None:
        """Those that are new."""
        claim = started(store)
        store.create(new("old"))
        assert store.save(save_of(claim, children=(new("a"), new("old"), new("b"))))[1] == Effects(runnable=("a", "b"))

    def test_who_is_given_back_is_runnable(self, store: ProcessStore) -> None:
        """By a release and by a save that releases; not by a save that goes on."""
        claim = started(store)
        assert store.save(save_of(claim))[1] == NOTHING
        assert store.save(save_of(claim, release=True))[1] == Effects(runnable=("p",))
        claim = store.claim("p", "w", at=3.0)[0]
        assert store.release("p", claim.epoch)[1] == Effects(runnable=("p",))

    @pytest.mark.parametrize("changes", [{"play": "paused"}, {"state": "waiting"}])
    def test_who_is_paused_or_suspended_is_parked(self, store: ProcessStore, changes: dict[str, Any]) -> None:
        """Only a letter calls it: a suspended process is one that waits and names nothing to wait for."""
        claim = started(store)
        assert store.save(save_of(claim, release=True, **changes))[1] == NOTHING
        assert store.unheld_work() == NOTHING
        assert store.post("p", b"play")[1] == Effects(called=("p",))

    def test_a_new_process_may_be_paused(self, store: ProcessStore) -> None:
        """Then nobody need look at it, whether it is created alone or as a child; a running one is runnable."""
        assert store.create(new("p", play="paused"))[1] == NOTHING
        claim = started(store, "parent")
        children = (new("a", play="paused"), new("b", state="running"), new("c", state="running", play="paused"))
        assert store.save(save_of(claim, children=children))[1] == Effects(runnable=("b",))
        assert store.unheld_work() == Effects(runnable=("b",))

    def test_the_end_of_the_last_child_wakes_its_waiter(self, store: ProcessStore) -> None:
        """However the children end, and not before the last one."""
        parked(store, children=(new("a"), new("b"), new("c")), waits=(("a", "b", "c"),))
        assert end(store, "a") == NOTHING
        assert end(store, "b", "killed") == NOTHING
        assert end(store, "c", "excepted") == Effects(runnable=("p",))

    def test_one_end_wakes_all_its_waiters(self, store: ProcessStore) -> None:
        """In the order in which they were made, but not those that are paused or wait for another one too."""
        store.create(new("a"))
        store.create(new("b"))
        parked(store, "p", waits=(("a",),))
        parked(store, "q", waits=(("a", "b"),))
        parked(store, "r", waits=(("a",),), play="paused")
        parked(store, "s", waits=(("a", "a"),))
        assert end(store, "a") == Effects(runnable=("p", "s"))

    def test_who_waits_for_what_has_ended_is_runnable_at_once(self, store: ProcessStore) -> None:
        """But not before all of a group have."""
        started(store, "a")
        end(store, "a")
        store.create(new("b"))
        assert parked(store, waits=(("a",),)) == RUNNABLE
        assert parked(store, "q", waits=(("a", "b"),)) == NOTHING

    def test_a_held_waiter_is_runnable_when_it_is_given_back(self, store: ProcessStore) -> None:
        """The end of its child while somebody holds it says nothing; the release does."""
        claim = started(store)
        store.save(save_of(claim, "waiting", children=(new("a"),), waits=(("a",),)))
        assert end(store, "a") == NOTHING
        assert store.release("p", claim.epoch)[1] == Effects(runnable=("p",))

    def test_a_paused_waiter_stays_parked_and_keeps_its_waits(self, store: ProcessStore) -> None:
        """A control worker that applies a pause declares them anew; played later, it is runnable."""
        parked(store, children=(new("a"),), waits=(("a",),))
        claim = store.claim("p", "w", at=3.0)[0]
        store.save(save_of(claim, "waiting", play="paused", waits=(("a",),), release=True))
        assert end(store, "a") == NOTHING
        claim = store.claim("p", "w", at=3.0)[0]
        assert claim.results == {"a": b"finished"}
        assert store.save(save_of(claim, "waiting", waits=(("a",),), release=True))[1] == Effects(runnable=("p",))

    def test_a_revived_child_is_waited_for_again(self, store: ProcessStore) -> None:
        """Its waiter, if it has not gone on yet, gets the new result."""
        parked(store, children=(new("a"),), waits=(("a",),))
        assert end(store, "a", "excepted") == Effects(runnable=("p",))
        record, effects = store.revive("a")
        assert (record.state, effects) == ("created", Effects(runnable=("a",)))
        assert store.unheld_work().runnable == ("a",)
        assert store.claim("p", "w", at=3.0)[0].results == {}
        store.release("p", store.load("p")[0].epoch)
        assert end(store, "a") == Effects(runnable=("p",))


class TestCalled:
    def test_a_letter_calls_somebody(self, store: ProcessStore) -> None:
        """For any unheld process that is not terminal, also a runnable one; the owner of a held one is nudged."""
        store.create(new())
        assert store.post("p", b"pause")[1] == Effects(called=("p",))
        claim = store.claim("p", "w", at=2.0)[0]
        assert store.post("p", b"play")[1] == Effects(nudged=(("w", "p"),))
        store.save(save_of(claim, "finished"))
        assert store.post("p", b"kill")[1] == NOTHING

    def test_who_is_given_back_with_letters_is_called(self, store: ProcessStore) -> None:
        """They came too late for the holder, or it did not deal with them."""
        claim = started(store)
        store.post("p", b"pause")
        assert store.release("p", claim.epoch)[1] == Effects(runnable=("p",), called=("p",))
        claim = store.claim("p", "w", at=3.0)[0]
        assert store.save(save_of(claim, play="paused", release=True))[1] == Effects(called=("p",))
        claim = store.claim("p", "w", at=4.0)[0]
        assert store.save(save_of(claim, play="paused", inbox_done=1, release=True))[1] == NOTHING

    def test_children_of_a_save_are_told_by_it(self, store: ProcessStore) -> None:
        """They are runnable and called at once."""
        save = save_of(started(store), children=(new("a", parent="p"),), tells=(Tell(b"pause"), Tell(b"play")))
        assert store.save(save)[1] == Effects(runnable=("a",), called=("a",), routes={"a": Route(depth=1)})
        assert store.load("a")[0].inbox_last == 2

    def test_a_child_that_is_told_need_not_have_room(
        self, store: ProcessStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What its parent says comes through though its inbox is full."""
        monkeypatch.setattr(sqlite, "MAX_LETTERS", 1)
        claim = started(store)
        store.create(new("a", parent="p"))
        store.post("a", b"one")
        with pytest.raises(BusyError):
            store.post("a", b"two")
        assert store.save(save_of(claim, "killed", tells=(Tell(b"kill"),)))[1].called == ("a",)
        assert [letter.body for letter in store.load("a")[0].inbox] == [b"one", b"kill"]

    def test_letters_of_a_save_call_their_receivers(self, store: ProcessStore) -> None:
        """A killed process takes its children along: the held ones by their owners."""
        claim = started(store)
        store.save(save_of(claim, children=(new("a", parent="p"), new("b", parent="p"))))
        store.claim("b", "w", at=3.0)
        save = save_of(claim, "killed", tells=(Tell(b"kill"),))
        assert store.save(save)[1] == Effects(called=("a",), nudged=(("w", "b"),))

    def test_who_is_aside_is_called_by_new_letters_only(self, store: ProcessStore) -> None:
        """Those that its last claimer had in hand call nobody, or it would be claimed and set aside for ever."""
        store.create(new())
        store.post("p", b"pause")
        claim = store.claim("p", "w", at=2.0)[0]
        assert store.set_aside("p", claim.epoch, "no class")[1] == NOTHING
        assert store.unheld_work() == NOTHING
        assert store.post("p", b"kill")[1] == Effects(called=("p",))
        assert store.unheld_work() == Effects(called=("p",))

    def test_a_letter_that_came_while_it_was_set_aside_is_not_lost(self, store: ProcessStore) -> None:
        """Its claimer has not seen it: somebody must look again."""
        claim = started(store)
        store.post("p", b"kill")
        assert store.set_aside("p", claim.epoch, "no class")[1] == Effects(called=("p",))

    def test_reviving_makes_runnable_and_called(self, store: ProcessStore) -> None:
        """The old letters count again."""
        store.create(new())
        store.post("p", b"pause")
        claim = store.claim("p", "w", at=2.0)[0]
        store.set_aside("p", claim.epoch, "no class")
        assert store.revive("p")[1] == Effects(runnable=("p",), called=("p",))


class TestGroups:
    def test_any_complete_group_wakes(self, store: ProcessStore) -> None:
        """One of ("a" and "b") or "c": a alone does not, c does; the second complete one tells nobody again."""
        children = (new("a"), new("b"), new("c"))
        parked(store, children=children, waits=(("a", "b"), ("c",)))
        assert end(store, "a") == NOTHING
        assert end(store, "c") == RUNNABLE
        assert end(store, "b") == NOTHING
        assert store.unheld_work() == RUNNABLE

    def test_a_group_that_was_looked_at_does_not_wake_again(self, store: ProcessStore) -> None:
        """Something else is missing: the next end of another group wakes."""
        parked(store, children=(new("a"), new("b")), waits=(("a",), ("b",)))
        assert end(store, "a") == RUNNABLE
        claim = store.claim("p", "w", at=3.0)[0]
        groups = (("a",), ("b",))
        assert store.save(save_of(claim, "waiting", waits=groups, seen=("a",), release=True))[1] == NOTHING
        assert end(store, "b") == RUNNABLE

    def test_news_in_a_complete_group_wakes_at_once(self, store: ProcessStore) -> None:
        """Though the saver has seen another one of it; an incomplete group with news does not."""
        for pid in "abc":
            store.create(new(pid))
        end(store, "a")
        end(store, "b")
        assert parked(store, "p", waits=(("a", "b"),), seen=("a",)) == RUNNABLE
        assert parked(store, "q", waits=(("a", "b", "c"),), seen=("a",)) == NOTHING
        assert parked(store, "r", waits=(("a", "b"),), seen=("a", "b")) == NOTHING

    def test_what_one_group_was_looked_at_for_counts_for_all(self, store: ProcessStore) -> None:
        """`seen` is of processes, not of groups."""
        for pid in "ab":
            store.create(new(pid))
        end(store, "a")
        assert parked(store, waits=(("a",), ("a", "b")), seen=("a",)) == NOTHING
        assert end(store, "b") == RUNNABLE

    def test_only_an_end_can_be_seen(self, store: ProcessStore) -> None:
        """Who says that it has seen the end of one that lives is woken by that end all the same."""
        store.create(new("a"))
        assert parked(store, waits=(("a",),), seen=("a", "nobody")) == NOTHING
        assert end(store, "a") == RUNNABLE

    def test_an_end_between_claim_and_save_is_not_lost(self, store: ProcessStore) -> None:
        """The saver can't have seen it: it is runnable at once."""
        parked(store, children=(new("a"), new("b")), waits=(("a",), ("b",)))
        end(store, "a")
        claim = store.claim("p", "w", at=3.0)[0]
        assert end(store, "b") == NOTHING
        save = save_of(claim, "waiting", waits=(("a",), ("b",)), seen=tuple(claim.results), release=True)
        assert store.save(save)[1] == RUNNABLE

    def test_a_save_that_has_not_seen_is_looked_at_again(self, store: ProcessStore) -> None:
        """A control worker that knows nothing of ends declares the groups without `seen`: nothing is lost by that."""
        parked(store, children=(new("a"),), waits=(("a",),))
        end(store, "a")
        claim = store.claim("p", "w", at=3.0)[0]
        assert store.save(save_of(claim, "waiting", waits=(("a",),), seen=("a",)))[1] == NOTHING
        assert store.save(save_of(claim, "waiting", waits=(("a",),), release=True))[1] == RUNNABLE

    def test_a_revival_takes_back_what_its_end_did(self, store: ProcessStore) -> None:
        """The group is not complete any more, and its next end is news, also to who had seen the one before."""
        parked(store, "p", children=(new("a"), new("b")), waits=(("a", "b"),))
        parked(store, "q", waits=(("a",), ("b",)))
        end(store, "b", "excepted")
        assert end(store, "a").runnable == ("p",)
        store.revive("b")
        assert store.unheld_work().runnable == ("b", "q")
        claim = store.claim("q", "w", at=3.0)[0]
        store.save(save_of(claim, "waiting", waits=(("a",), ("b",)), seen=("a", "b"), release=True))
        assert store.unheld_work().runnable == ("b",)
        assert end(store, "b").runnable == ("p", "q")

    @pytest.mark.parametrize("by", ["timer", "mail", "revival"])
    def test_a_revival_takes_back_nothing_else(self, store: ProcessStore, by: str) -> None:
        """Who is ready for another reason as well stays so."""
        wakes = {"wake_at": 9.0, "names": ("m",), "listens": ("m",)}
        parked(store, children=(new("a"),), waits=(("a",),), **wakes)
        assert end(store, "a", "excepted") == RUNNABLE
        match by:
            case "timer":
                store.fire_timers(9.0)
            case "mail":
                store.send("p", "m", b"", at=0.0)
            case "revival":
                store.set_aside("p", store.claim("p", "w", at=3.0)[0].epoch, "why")
                store.revive("p")
        store.revive("a")
        assert set(store.unheld_work().runnable) == {"p", "a"}

    def test_a_revived_waiter_is_ready_once(self, store: ProcessStore) -> None:
        """It excepted after a wait, or was set aside in one: somebody must look at what it waits for."""
        store.create(new("a"))
        claim = started(store)
        store.save(save_of(claim, "waiting", waits=(("a",),)))
        store.save(save_of(claim, "excepted", checkpoint=None))
        record, effects = store.revive("p")
        assert (record.state, effects) == ("waiting", RUNNABLE)
        claim = store.claim("p", "w", at=3.0)[0]
        assert store.save(save_of(claim, "waiting", waits=(("a",),), release=True))[1] == NOTHING
        store.set_aside("p", store.claim("p", "w", at=4.0)[0].epoch, "why")
        assert store.revive("p")[1] == RUNNABLE

    def test_saying_the_same_groups_again_writes_none(
        self, store: ProcessStore, connection: sqlite3.Connection
    ) -> None:
        """A parent of a thousand that wakes at each end writes what changed: the group that is gone."""
        pids = [f"c{number}" for number in range(1000)]
        children = tuple(new(pid) for pid in pids)
        claim = started(store)
        store.save(save_of(claim, "waiting", children=children, waits=tuple((pid,) for pid in pids)))
        end(store, pids[0])
        before = connection.total_changes
        store.save(save_of(claim, "waiting", waits=tuple((pid,) for pid in pids[1:])))
        assert connection.total_changes - before <= 4
        before = connection.total_changes
        store.save(save_of(claim, "waiting", waits=(*((pid,) for pid in reversed(pids[1:])), ("c1", "c2"))))
        assert connection.total_changes - before <= 5
        assert store.load("p")[0].waits == tuple(pids[1:])


class TestTimers:
    def test_a_timer_makes_ready(self, store: ProcessStore) -> None:
        """When its time has come, once; the earliest is next."""
        assert store.next_wake() is None
        parked(store, "p", wake_at=20.0)
        parked(store, "q", wake_at=10.0)
        assert store.next_wake() == 10.0
        assert store.fire_timers(9.99) == NOTHING
        assert store.fire_timers(10.0) == Effects(runnable=("q",))
        assert store.next_wake() == 20.0
        assert store.fire_timers(100.0) == RUNNABLE
        assert store.fire_timers(100.0) == NOTHING
        assert store.next_wake() is None

    @pytest.mark.parametrize("wake_at", [NOW, NOW - 1, -1e9, float("-inf")])
    def test_a_time_that_is_over_makes_ready_at_once(self, store: ProcessStore, wake_at: float) -> None:
        """Nothing has to be fired for it."""
        assert parked(store, wake_at=wake_at) == RUNNABLE
        assert store.next_wake() is None

    def test_many_timers_fire_in_parts(self, store: ProcessStore, monkeypatch: pytest.MonkeyPatch) -> None:
        """The earliest first; who calls it sees by `next_wake` that there are more."""
        monkeypatch.setattr(sqlite, "MAX_TIMERS", 2)
        for number in range(5):
            parked(store, f"p{number}", wake_at=100.0 - number)
        fired = [store.fire_timers(200.0).runnable for _ in range(4)]
        assert fired == [("p4", "p3"), ("p2", "p1"), ("p0",), ()]

    def test_who_is_held_or_paused_or_aside_is_ready_later(self, store: ProcessStore) -> None:
        """Its timer fires, and it is runnable as soon as nothing else is in the way."""
        held = started(store, "held")
        store.save(save_of(held, "waiting", wake_at=10.0))
        parked(store, "paused", play="paused", wake_at=10.0)
        parked(store, "aside", wake_at=10.0)
        store.set_aside("aside", store.claim("aside", "w", at=3.0)[0].epoch, "why")
        assert store.fire_timers(10.0) == NOTHING
        assert store.next_wake() is None
        assert store.release("held", held.epoch)[1] == Effects(runnable=("held",))
        assert store.revive("aside")[1] == Effects(runnable=("aside",))
        claim = store.claim("paused", "w", at=3.0)[0]
        assert store.save(save_of(claim, "waiting", wake_at=NOW, release=True))[1].runnable == ("paused",)

    @pytest.mark.parametrize("state", ["running", *ENDS])
    def test_who_goes_on_has_no_timer(self, store: ProcessStore, state: str) -> None:
        """It fires for nobody."""
        parked(store, wake_at=10.0)
        store.save(save_of(store.claim("p", "w", at=3.0)[0], state, wake_at=10.0))
        assert store.next_wake() is None

    def test_who_is_ready_already_is_not_told_again(self, store: ProcessStore) -> None:
        """There is a task for it."""
        parked(store, children=(new("a"),), waits=(("a",),), wake_at=10.0, names=("m",), listens=("m",))
        assert end(store, "a") == RUNNABLE
        assert store.fire_timers(10.0) == store.send("p", "m", b"", at=0.0)[1] == NOTHING


class TestMail:
    def test_mail_calls_nobody_who_does_not_listen(self, store: ProcessStore) -> None:
        """Not one that runs, waits for something else, or waits for that name without listening."""
        store.create(new("p"))
        assert store.send("p", "m", b"", at=0.0)[1] == NOTHING
        parked(store, "q", names=("m", "n"), listens=("n",))
        assert store.send("q", "m", b"", at=0.0)[1] == NOTHING
        assert store.unheld_work() == RUNNABLE

    def test_mail_wakes_who_listens(self, store: ProcessStore) -> None:
        """Once, until it has saved again; also if it is held or paused, when that is over."""
        parked(store, names=("m",), listens=("m",))
        assert store.send("p", "m", b"1", at=0.0)[1] == RUNNABLE
        assert store.send("p", "m", b"2", at=0.0)[1] == NOTHING
        claim = store.claim("p", "w", at=3.0)[0]
        save = save_of(claim, "waiting", names=("m",), listens=("m",), consumed=(1, 2))
        store.save(save)
        assert store.send("p", "m", b"3", at=0.0)[1] == NOTHING
        assert store.release("p", claim.epoch)[1] == RUNNABLE

    def test_mail_that_is_there_makes_ready_at_once(self, store: ProcessStore) -> None:
        """Unless this very save uses it up, or it was looked at already: waited for, but not listened to."""
        store.create(new("p"))
        store.send("p", "m", b"1", at=0.0)
        wakes = {"names": ("l", "m"), "listens": ("l", "m"), "release": True}
        claim = store.claim("p", "w", at=2.0)[0]
        assert store.save(save_of(claim, "waiting", **wakes))[1] == RUNNABLE
        claim = store.claim("p", "w", at=2.0)[0]
        assert store.save(save_of(claim, "waiting", **{**wakes, "listens": ("l",)}))[1] == NOTHING
        claim = store.claim("p", "w", at=2.0)[0]
        assert store.save(save_of(claim, "waiting", **wakes, consumed=(1,)))[1] == NOTHING


class TestEpochs:
    def test_epochs_are_above_the_floor(self, connection: sqlite3.Connection) -> None:
        """A broker that starts again gives higher ones than any before, although a restored disk knows less."""
        first = started(ProcessStore(connection, epoch_floor=1 << 32)).epoch
        assert first == 1 << 32
        again = ProcessStore(connection, epoch_floor=2 << 32)
        assert again.claim("p", "w", at=3.0)[0].epoch == 2 << 32
        assert again.claim("p", "w", at=3.0)[0].epoch == (2 << 32) + 1

    def test_a_lower_floor_does_not_lower_epochs(self, connection: sqlite3.Connection) -> None:
        """They only rise."""
        started(ProcessStore(connection, epoch_floor=9 << 32))
        assert ProcessStore(connection).claim("p", "w", at=3.0)[0].epoch == (9 << 32) + 1

    def test_a_pid_that_is_used_again_begins_above_its_old_epochs(self, connection: sqlite3.Connection) -> None:
        """Who held the deleted process can't write the new one, also after the store was opened again."""
        store = ProcessStore(connection)
        for _ in range(3):
            old = started(store)
        store.save(save_of(old, "finished"))
        store.delete("p")
        for again in (store, ProcessStore(connection)):
            again.create(new())
            assert again.claim("p", "w", at=3.0)[0].epoch > old.epoch
            end(again, "p")
            again.delete("p")
        store.create(new())
        with pytest.raises(StaleOwnerError):
            store.save(save_of(old, "finished"))

    def test_a_last_word_said_again_has_no_effects(self, store: ProcessStore) -> None:
        """The tasks that it caused were stored with it."""
        claim = started(store)
        last = save_of(claim, children=(new("a"),), release=True)
        assert store.save(last)[1] == Effects(runnable=("a", "p"))
        assert store.save(last)[1] == NOTHING
        assert store.release("p", claim.epoch)[1] == NOTHING


class TestRoutes:
    """Where a process goes when it becomes runnable."""

    def test_every_effect_says_it(self, store: ProcessStore) -> None:
        """Of those that are not plain: when they are created, given back, woken, called by mail or by a timer, revived,
        and looked through."""
        route = Route("gpu", 3, {"licence": 2}, 0)
        options = {"queue": "gpu", "priority": 3, "resources": {"licence": 2}}
        runnable = Effects(runnable=("p",), routes={"p": route})
        assert store.create(new(**options))[1] == runnable
        assert store.release("p", store.claim("p", "w", at=1.0)[0].epoch)[1] == runnable
        waits = {
            "group": ({"waits": (("c",),), "children": (new("c", parent="p"),)}, lambda: end(store, "c")),
            "mail": (
                {"names": ("m",), "listens": ("m",)},
                lambda: store.send("p", "m", b"", at=1.0)[1],
            ),
            "timer": ({"wake_at": 1e9}, lambda: store.fire_timers(2e9)),
            "worker": ({"wake_at": 0.0, "release": False}, lambda: store.release_all("w")),
        }
        for what, (fields, wake) in waits.items():
            save = save_of(store.claim("p", "w", at=1.0)[0], "waiting", **{"release": True, **fields})
            assert "p" not in store.save(save)[1].runnable, what
            assert wake() == runnable, what
        end(store, "p", "excepted")
        assert store.revive("p")[1] == runnable
        assert store.unheld_work() == runnable
        assert store.routes(["p", "c"]) == {"p": route, "c": Route(depth=1)}

    def test_the_plain_ones_cost_nothing(self, store: ProcessStore) -> None:
        """They are not named."""
        assert store.create(new())[1] == Effects(runnable=("p",))
        assert store.routes(["p"]) == {}


class TestCrashes:
    """How many workers were lost with a process."""

    def test_each_worker_that_is_lost_counts_until_a_step_ends(self, store: ProcessStore) -> None:
        """A save in the middle of the step, for a letter, is no progress; the next step begins anew."""
        for count in (1, 2):
            claim = started(store) if count == 1 else store.claim("p", "w", at=2.0)[0]
            store.save(save_of(claim, keep_as="run" if count == 1 else None, step="run"))
            assert store.blame_all("w", "w").steps == {"p": "run"}
            assert store.load("p")[0].crashes == count
        claim = store.claim("p", "w", at=3.0)[0]
        assert claim.record.crashes == 2
        store.save(save_of(claim, inbox_done=0))
        assert store.load("p")[0].crashes == 2
        store.save(save_of(claim, keep_as="next"))
        assert store.load("p")[0].crashes == 0

    def test_who_gives_back_is_not_lost(self, store: ProcessStore) -> None:
        """A worker that leaves in order costs nothing, also if it left something undone."""
        store.release("p", started(store).epoch)
        assert store.blame_all("w", "w") == Blamed(NOTHING, {}, ())
        store.claim("p", "w", at=2.0)
        assert store.release_all("w") == Effects(runnable=("p",))
        assert store.load("p")[0].crashes == 0

    @pytest.mark.parametrize("fields", [{"play": "paused"}, {"state": "waiting"}])
    def test_who_is_held_for_a_letter_alone_is_not_blamed(self, store: ProcessStore, fields: dict[str, str]) -> None:
        """It takes no step: what ended the worker was something else."""
        store.save(save_of(started(store), **{"release": True, "state": "running", **fields}))
        store.post("p", b"hello")
        store.claim("p", "w", at=2.0)
        assert store.blame_all("w", "w") == Blamed(Effects(called=("p",)), {}, ())
        assert store.load("p")[0].crashes == 0

    def test_too_many_set_it_aside_until_somebody_retries_it(self, store: ProcessStore) -> None:
        """With the step, the last worker and the count; one before that it is a suspect."""
        store.max_crashes = 3
        store.save(save_of(started(store), keep_as="run", step="run"))
        for number, suspect in ((1, False), (2, False), (3, True)):
            assert store.claim("p", "w", at=2.0)[0].record.suspect == suspect
            blamed = store.blame_all("w", f"worker-{number}, pid 471{number}")
        assert blamed == Blamed(NOTHING, {"p": "run"}, ("p",))
        assert store.unheld_work() == NOTHING
        record = store.load("p")[0]
        assert record.aside == "its worker died 3 times in the step 'run' (last: worker-3, pid 4713)"
        assert record.suspect
        said = [(event.subject, event.note, event.step) for event in store.history("p")[0][-4:]]
        assert said == [
            ("claimed", None, None),
            ("crashed", "worker-3, pid 4713 died in the step 'run'", "run"),
            ("set_aside", record.aside, None),
            ("released", "its worker is gone", None),
        ]
        assert store.revive("p")[1] == Effects(runnable=("p",))
        record = store.load("p")[0]
        assert (record.aside, record.crashes, record.suspect) == (None, 0, False)

    def test_without_a_limit_nothing_is_set_aside(self, store: ProcessStore) -> None:
        """0 says: try it for ever."""
        started(store)
        for _ in range(20):
            assert store.blame_all("w", "w").aside == ()
            assert not store.claim("p", "w", at=2.0)[0].record.suspect
        assert store.load("p")[0].crashes == 20

    def test_a_pardon_takes_back_one_death(self, store: ProcessStore) -> None:
        """Not below zero, and not from those that are aside."""
        store.max_crashes = 2
        started(store)
        store.pardon(["p", "nobody"])
        assert store.load("p")[0].crashes == 0
        store.blame_all("w", "w")
        store.pardon(["p"])
        assert store.load("p")[0].crashes == 0
        for _ in range(2):
            store.claim("p", "w", at=2.0)
            store.blame_all("w", "w")
        store.pardon(["p"])
        assert store.load("p")[0].crashes == 2

    @pytest.mark.parametrize("state", ["waiting", *ENDS])
    def test_where_it_parks_or_ends_it_begins_anew(self, store: ProcessStore, state: str) -> None:
        """The step that took the workers down is over."""
        started(store)
        store.blame_all("w", "w")
        store.save(save_of(store.claim("p", "w", at=3.0)[0], state, wake_at=9.0 if state == "waiting" else None))
        assert store.load("p")[0].crashes == 0

    def test_a_revived_process_begins_anew(self, store: ProcessStore) -> None:
        """Somebody has looked at it."""
        started(store)
        store.blame_all("w", "w")
        claim = store.claim("p", "w", at=3.0)[0]
        store.set_aside("p", claim.epoch, "its worker was lost")
        assert store.load("p")[0].crashes == 1
        store.revive("p")
        assert store.load("p")[0].crashes == 0


class TestForgetting:
    """What ended is forgotten some at a time, by who looks after the store."""

    def test_a_batch_looks_at_so_many(self, connection: sqlite3.Connection) -> None:
        """The longest ended first, and goes on where the last one ended, also behind those that are needed."""
        ticks = itertools.count(10)
        store = ProcessStore(connection, clock=lambda: float(next(ticks)))
        children = tuple(new(f"c{number}") for number in range(5))
        claim, waits = started(store), (tuple(child.pid for child in children),)
        store.save(save_of(claim, "waiting", children=children, waits=waits, release=True))
        for child in children:
            end(store, child.pid)
        end_of = {child.pid: (store.load(child.pid)[0].updated_at, n) for n, child in enumerate(children, 2)}
        assert store.forget_ended("finished", 1e9, (0.0, 0), 2) == (0, end_of["c1"])
        store.save(save_of(store.claim("p", "w", at=1.0)[0], "waiting", waits=(("c0",), ("c3",)), release=True))
        assert store.forget_ended("finished", 1e9, (0.0, 0), 2) == (1, end_of["c1"])
        assert store.forget_ended("finished", 1e9, end_of["c1"], 10) == (2, None)
        assert [record.pid for record in store.query(Query())[0]] == ["c3", "c0", "p"]

    def test_what_ended_lately_is_kept(self, store: ProcessStore) -> None:
        """And what ended otherwise."""
        started(store)
        end(store, "p")
        assert store.forget_ended("finished", NOW, (0.0, 0), 9) == (0, None)
        assert store.forget_ended("killed", NOW + 1, (0.0, 0), 9) == (0, None)
        assert store.forget_ended("finished", NOW + 1, (0.0, 0), 9) == (1, None)

    def test_a_pid_that_was_pruned_begins_above_its_old_epochs(self, connection: sqlite3.Connection) -> None:
        """As after `delete`."""
        store = ProcessStore(connection)
        old = started(store)
        store.save(save_of(old, "finished"))
        assert store.prune(Query())[0] == 1
        for again in (store, ProcessStore(connection)):
            again.create(new())
            assert again.claim("p", "w", at=3.0)[0].epoch > old.epoch

    @pytest.mark.parametrize("query", [Query(), Query(states=("killed",), updated_before=9.0)], ids=repr)
    def test_no_living_process_is_passed(
        self, store: ProcessStore, connection: sqlite3.Connection, query: Query
    ) -> None:
        """Those that ended have an index of their own."""
        for state in query.states or ENDS:
            statement, values = sqlite._prune_statement(query, state)
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)]
            assert plan[0].startswith("SEARCH process USING INDEX process_ended (state=?"), plan


STATEMENTS = [
    name
    for name, value in vars(sqlite).items()
    if name.startswith("_") and isinstance(value, str) and value.split()[:1] in (["SELECT"], ["UPDATE"], ["DELETE"])
    if name not in ("_FACTS", "_RECORD", "_HAS_TABLES", "_COUNT_STATES", "_DELETED_EPOCH", "_FORGET_COUNTS")
]
OWN_ROWS = ("SCAN (subquery-2)",)


def plan_of(connection: sqlite3.Connection, statement: str) -> list[str]:
    count = max(statement.count("?"), 1) if "?1" not in statement else 2
    values = ["x"] * (count if "?" in statement else 0)
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)]


class TestWhole:
    def test_what_is_to_be_done_can_be_looked_up(self, store: ProcessStore) -> None:
        """Everything that is runnable, called or held, for who starts up on what is there."""
        parked(store, "parked", children=(new("a"),), waits=(("a",),))
        started(store, "held")
        store.save(save_of(started(store, "paused"), play="paused", release=True))
        store.post("paused", b"play")
        started(store, "done")
        end(store, "done")
        assert store.unheld_work() == Effects(runnable=("a",), called=("paused",))
        assert store.held() == ("held",)
        assert store.statistics() == {"created": 2, "finished": 1, "running": 1, "waiting": 1}

    def test_deleting_leaves_nothing_behind(self, store: ProcessStore, connection: sqlite3.Connection) -> None:
        """No row in any table."""
        claim = started(store, tags=("t",))
        store.post("p", b"x")
        store.send("p", "m", b"x", at=0.0)
        store.note(Note(pid="p", epoch=claim.epoch, lines=(LogLine(at=0.0, text="x"),)))
        store.save(save_of(claim, "waiting", waits=(("p",),), keep_as="run", replies=(Reply(1, b"x"),)))
        end(store, "p", "excepted")
        store.delete("p")
        tables = [name for [name] in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        tables = [name for name in tables if name not in ("fence", "tally")]
        assert store.statistics() == {}
        assert {name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables} == (
            dict.fromkeys(tables, 0)
        )

    def test_who_is_created_again_is_the_newest(self, store: ProcessStore) -> None:
        """The order is that of creation, whatever was deleted."""
        started(store, "a")
        end(store, "a")
        store.delete("a")
        store.create(new("b"))
        store.create(new("a"))
        assert [record.pid for record in store.query(Query())[0]] == ["a", "b"]

    def test_a_full_disk_is_said_with_the_path(self, store: ProcessStore, connection: sqlite3.Connection) -> None:
        """By whatever operation meets it."""
        claim = started(store)
        [pages] = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreFullError) as caught:
            store.save(save_of(claim, checkpoint=bytes(100_000)))
        assert caught.value.path == ":memory:"

    def test_what_can_not_be_kept_is_misuse(self, store: ProcessStore) -> None:
        """And no reason to stop the store: a time that is no number, too many states, a number over 64 bits."""
        with pytest.raises(ValueError, match="can't keep"):
            store.create(new(created_at=float("nan")))
        with pytest.raises(ValueError, match="states"):
            store.query(Query(states=("running",) * 33))
        started(store)
        with pytest.raises(StaleOwnerError):
            store.release("p", 2**80)

    def test_effects_are_merged_without_repetition(self) -> None:
        """In their order."""
        nudge = (("w", "n"),)
        merged = merge([NOTHING, Effects(("a", "b"), (), nudge), Effects(("b", "c"), ("a",)), Effects(nudged=nudge)])
        assert merged == Effects(("a", "b", "c"), ("a",), nudge)
        assert merge([]) == NOTHING

    @pytest.mark.parametrize(
        "query",
        [
            Query(),
            Query(states=("waiting", "running")),
            Query(unfinished=True),
            Query(play="paused"),
            Query(class_id="x"),
            Query(tag="x"),
            Query(parent="x"),
            Query(roots=True),
            Query(aside=True),
            Query(states=("finished",), before="p"),
            Query(prefix="x"),
            Query(prefix="x", unfinished=True),
            Query(key="x"),
            Query(queue="x"),
            Query(queue="default", unfinished=True),
            Query(states=("waiting",), created_before=1.0),
        ],
        ids=repr,
    )
    def test_no_query_reads_all_processes(
        self, store: ProcessStore, connection: sqlite3.Connection, query: Query
    ) -> None:
        """Each walks along an index (or the rows themselves) from its end, and sorts no more than what it answers."""
        store.create(new())
        statement, values = sqlite._query_statement(query, None if query.before is None else 1)
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", values)]
        inner = [line for line in plan if not line.startswith(("SCAN (", "CO-ROUTINE", "MERGE", "LEFT", "RIGHT"))]
        first = inner[0]
        if query == Query():
            assert first == "SCAN process"
        else:
            assert "USING" in first, plan
        assert plan[-1].startswith("USE TEMP B-TREE FOR ORDER BY")
        parts = 3 if query.unfinished else len(query.states)
        assert sum("TEMP B-TREE" in line for line in plan) <= 1 + parts

    @pytest.mark.parametrize("name", STATEMENTS)
    def test_no_statement_reads_all_of_a_table(
        self, store: ProcessStore, connection: sqlite3.Connection, name: str
    ) -> None:
        """An index leads to the rows, or the row is known by its number."""
        for line in plan_of(connection, getattr(sqlite, name)):
            if line.startswith(("SCAN", "SEARCH")):
                assert "USING" in line or "VIRTUAL TABLE" in line or line in OWN_ROWS, line

    @pytest.mark.parametrize(
        ("name", "step"),
        [
            ("_FIND_RUNNABLE", "SCAN process USING INDEX process_runnable"),
            ("_FIND_CALLED", "SCAN process USING INDEX process_called"),
            ("_FIND_HELD", "SEARCH process USING INDEX process_held (owner>?)"),
            ("_FIND_HELD_BY", "SEARCH process USING INDEX process_held (owner=?)"),
            ("_FIND_DUE", "SEARCH process USING INDEX process_timer (wake_at<?)"),
            ("_NEXT_WAKE", "SEARCH process USING COVERING INDEX process_timer (wake_at>?)"),
            ("_FIND_COMPLETED", "SEARCH member USING COVERING INDEX wait_for_target (target=?)"),
            ("_FIND_COMPLETED", "SEARCH wait USING PRIMARY KEY (waiter=? AND ended=? AND grp=?)"),
            ("_TAKE_BACK", "SEARCH member USING PRIMARY KEY (waiter=? AND ended=?)"),
            ("_RESULTS_WAITED_FOR", "SEARCH wait USING PRIMARY KEY (waiter=? AND ended>?)"),
            ("_FIND_TOLD", "SEARCH process USING INDEX process_living_child (parent=?)"),
            ("_ADD_LETTERS", "SEARCH process USING INDEX process_living_child (parent=?)"),
            ("_COUNT_LETTERS", "SEARCH process USING INDEX process_living_child (parent=?)"),
            ("_OLDEST_MAIL", "SEARCH mail USING INDEX mail_by_name (process=? AND name=?)"),
            ("_ANY_MAIL", "SEARCH mail USING COVERING INDEX mail_by_name (process=? AND name=?)"),
            ("_FIND_ENDED", "SEARCH process USING INDEX process_ended (state=? AND ended_at>? AND ended_at<?)"),
            ("_FIND_ENDED", "SEARCH wait USING COVERING INDEX wait_for_target (target=?)"),
            ("_TAKEN", "SEARCH process USING INDEX process_by_key (key=?)"),
            ("_LOG", "SEARCH line USING PRIMARY KEY (process=? AND seq>?)"),
            ("_LOG_END", "SEARCH line USING PRIMARY KEY (process=? AND seq>?)"),
        ],
    )
    def test_each_index_is_there_for_a_statement(
        self, store: ProcessStore, connection: sqlite3.Connection, name: str, step: str
    ) -> None:
        """What is parked is not in the index of what is runnable, called, held or due: it costs nothing to look."""
        assert step in plan_of(connection, getattr(sqlite, name))

    def test_looking_for_work_does_not_pass_the_parked(
        self, store: ProcessStore, connection: sqlite3.Connection
    ) -> None:
        """A thousand more of them are not one step more for SQLite."""
        store.create(new("a"))

        def steps() -> int:
            count = 0

            def progress() -> int:
                nonlocal count
                count += 1
                return 0

            connection.set_progress_handler(progress, 1)
            assert store.unheld_work() == Effects(runnable=("a",))
            assert store.next_wake() is not None
            connection.set_progress_handler(None, 0)
            return count

        parked(store, "first", waits=(("a",),), wake_at=1e9)
        before = steps()
        for number in range(1000):
            parked(store, f"p{number}", waits=(("a",),), wake_at=2e9, names=("m",), listens=("m",))
        assert steps() == before


class StoreMachine(RuleBasedStateMachine):
    """Random workers on random processes, beside a queue that knows only what the effects told it."""

    claims = Bundle("claims")
    pids = st.sampled_from(["a", "b", "c", "d"])
    names = st.sampled_from(["m", "n"])

    def __init__(self) -> None:
        super().__init__()
        self.connection = open_database(":memory:")
        ticks = itertools.count()
        self.store = ProcessStore(self.connection, clock=lambda: float(next(ticks)))
        self.told_runnable: set[str] = set()
        self.told_called: set[str] = set()
        self.epochs: dict[str, int] = {}

    def teardown(self) -> None:
        self.connection.close()

    def route_of(self, pid: str) -> Route:
        record = self.store.load(pid)[0]
        return Route(record.queue, record.priority, record.resources, record.depth)

    def do(self, operation: Any, *arguments: Any, **keywords: Any) -> Any:
        """As its owner runs the store: in a transaction, undone if it is refused. What it tells must be true."""
        self.connection.execute("BEGIN")
        try:
            answer, effects = operation(*arguments, **keywords)
        except (CheckpointNotFoundError, InvalidStateError, StaleOwnerError) as error:
            self.connection.execute("ROLLBACK")
            return error
        self.connection.execute("COMMIT")
        now = self.store.unheld_work()
        assert set(effects.runnable) <= set(now.runnable)
        assert set(effects.called) <= set(now.called)
        routes = {pid: route for pid in effects.runnable if (route := self.route_of(pid)) != PLAIN}
        assert effects.routes == routes
        assert now.routes.items() >= routes.items()
        self.told_runnable.update(effects.runnable)
        self.told_called.update(effects.called)
        return answer

    @rule(pid=pids, queue=st.sampled_from(["default", "default", "gpu"]), key=st.sampled_from([None, None, "k"]))
    def create(self, pid: str, queue: str, key: str | None) -> None:
        known = {record.pid: record.key for record in self.store.query(Query(limit=10))[0]}
        holder = next((each for each, its in known.items() if key is not None and its == key), None)
        created = self.do(self.store.create, new(pid, queue=queue, key=key))
        assert created.is_new == (pid not in known and holder is None)
        assert created.pid == (pid if pid in known or holder is None else holder)

    @rule(pid=pids, target=claims)
    def claim(self, pid: str) -> Any:
        claim = self.do(self.store.claim, pid, "w", at=0.0)
        if not isinstance(claim, Claim) or claim.epoch == 0:
            return multiple()
        self.told_runnable.discard(pid)
        self.told_called.discard(pid)
        assert claim.epoch > self.epochs.get(pid, 0)
        self.epochs[pid] = claim.epoch
        return claim

    @rule(
        claim=claims,
        state=st.sampled_from(["running", "waiting", "waiting", *ENDS]),
        play=st.sampled_from(["playing", "playing", "paused"]),
        waits=st.lists(st.lists(pids, min_size=1, max_size=2), max_size=3),
        seen=st.lists(pids, max_size=2),
        wake_at=st.sampled_from([None, None, 0.0, 1e6, 2e6]),
        names=st.lists(names, max_size=2, unique=True),
        listening=st.integers(0, 2),
        consumed=st.lists(st.integers(1, 4), max_size=2),
        children=st.lists(pids, max_size=2),
        tells=st.lists(st.sampled_from([("kill",), ("abandon", "wait"), ()]), max_size=1),
        release=st.booleans(),
        done=st.integers(0, 3),
    )
    def save(
        self,
        claim: Claim,
        state: str,
        play: str,
        waits: list[list[str]],
        seen: list[str],
        wake_at: float | None,
        names: list[str],
        listening: int,
        consumed: list[int],
        children: list[str],
        tells: list[tuple[str, ...]],
        release: bool,
        done: int,
    ) -> None:
        answer = self.do(
            self.store.save,
            Save(
                pid=claim.record.pid,
                epoch=claim.epoch,
                state=state,
                play=play,
                checkpoint=None if state == "excepted" else b"c",
                result=b"r" if state in ENDS else None,
                waits=tuple(map(tuple, waits)),
                seen=tuple(seen),
                wake_at=wake_at,
                names=tuple(names),
                listens=tuple(names[:listening]),
                consumed=tuple(consumed),
                children=tuple(new(pid, parent=claim.record.pid, parent_close="kill") for pid in children),
                tells=tuple(Tell(b"letter", to=to) for to in tells),
                release=release,
                inbox_done=done,
                events=(Event(subject="x", at=0.0),),
            ),
        )
        if claim.epoch < self.epochs[claim.record.pid]:
            assert isinstance(answer, StaleOwnerError | CheckpointNotFoundError)

    @rule(claim=consumes(claims))
    def release(self, claim: Claim) -> None:
        self.do(self.store.release, claim.record.pid, claim.epoch)

    @rule(claim=claims)
    def set_aside(self, claim: Claim) -> None:
        self.do(self.store.set_aside, claim.record.pid, claim.epoch, "why")

    @rule(pid=pids)
    def revive(self, pid: str) -> None:
        self.do(self.store.revive, pid)

    @rule(pid=pids)
    def post(self, pid: str) -> None:
        self.do(self.store.post, pid, b"letter")

    @rule(pid=pids, name=names)
    def send(self, pid: str, name: str) -> None:
        self.do(self.store.send, pid, name, b"mail", at=0.0)

    @rule(now=st.sampled_from([1e6, 2e6]))
    def fire_timers(self, now: float) -> None:
        self.do(lambda: (None, self.store.fire_timers(now)))

    @rule(pid=pids)
    def delete(self, pid: str) -> None:
        self.do(self.store.delete, pid)

    @rule(states=st.sampled_from([(), ("finished",)]), limit=st.integers(1, 2))
    def prune(self, states: tuple[str, ...], limit: int) -> None:
        before = {record.pid: record for record in self.store.query(Query(limit=10))[0]}
        count = self.do(self.store.prune, Query(states=states, limit=limit))
        gone = [before[pid] for pid in before.keys() - self.pids_there()]
        assert len(gone) == count <= limit
        for record in gone:
            assert record.state in (states or ENDS)
            assert not any(record.pid in other.waits for other in before.values())
            assert all(other.is_terminal for other in before.values() if other.parent == record.pid)

    @rule()
    def lose_the_worker(self) -> None:
        self.do(lambda: (None, self.store.release_all("w")))

    def pids_there(self) -> set[str]:
        return {record.pid for record in self.store.query(Query(limit=10))[0]}

    @invariant()
    def who_ended_has_a_time(self) -> None:
        for state, ended_at, updated_at in self.connection.execute("SELECT state, ended_at, updated_at FROM process"):
            assert ended_at == (updated_at if state in ENDS else None)

    @invariant()
    def the_tally_is_right(self) -> None:
        counted = self.connection.execute("SELECT state, count(*) FROM process GROUP BY state").fetchall()
        assert self.store.statistics() == dict(counted)

    @invariant()
    def whoever_can_go_on_was_told(self) -> None:
        """G12: what is runnable or called now has a task, by effects alone."""
        now = self.store.unheld_work()
        assert set(now.runnable) <= self.told_runnable
        assert set(now.called) <= self.told_called

    @invariant()
    def a_wait_has_ended_exactly_while_its_target_is_terminal(self) -> None:
        for state, ended in self.connection.execute("SELECT state, ended FROM wait JOIN process ON n = target"):
            assert bool(ended) == (state in ENDS)

    @invariant()
    def who_is_ready_has_a_reason(self) -> None:
        """`ready` is what can be told from the rest, as far as it can be."""
        groups: dict[int, dict[int, list[int]]] = {}
        for waiter, grp, ended in self.connection.execute("SELECT waiter, grp, ended FROM wait"):
            groups.setdefault(waiter, {}).setdefault(grp, []).append(ended)
        mail: dict[int, list[str]] = {}
        for process, name in self.connection.execute("SELECT process, name FROM mail"):
            mail.setdefault(process, []).append(name)
        columns = "n, state, ready, wake_at, names, listens, mail_count"
        for n, state, ready, wake_at, names, listens, count in self.connection.execute(
            f"SELECT {columns} FROM process"
        ):
            assert count == len(mail.get(n, []))
            if state != "waiting":
                assert ready == (0 if state in ENDS else 2)
                assert (groups.get(n), wake_at, names, listens) == (None, None, None, None)
            else:
                has_news = any(min(ended) == 1 for ended in groups.get(n, {}).values())
                assert ready == 2 or ready == has_news
                assert ready or not set(msgspec.json.decode(listens or "[]")) & set(mail.get(n, []))

    @invariant()
    def nobody_is_in_two_situations(self) -> None:
        held, now = set(self.store.held()), self.store.unheld_work()
        assert not held & {*now.runnable, *now.called}
        for record in self.store.query(Query(limit=10))[0]:
            assert not (record.is_terminal and (record.owner or record.waits or record.inbox_done < record.inbox_last))


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_database_in_which_somebody_waits_is_sound_when_it_is_opened_again(tmp_path: Path) -> None:
    """Every table has rows when the file is checked: waits, letters, tags, history, results."""
    path = tmp_path / "prunus.db"
    with closing(open_database(path)) as connection:
        store = ProcessStore(connection)
        store.create(new("child", tags=("t",)))
        store.create(new("other"))
        end(store, "other")
        parked(store, waits=(("child", "other"),))
        store.post("p", b"letter")
    with closing(open_database(path)) as connection:
        store = ProcessStore(connection)
        assert store.unheld_work() == Effects(runnable=("child",), called=("p",))
        assert end(store, "child") == Effects(runnable=("p",))
