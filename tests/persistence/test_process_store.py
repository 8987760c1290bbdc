"""The process store decides who is runnable and who is called, and says so exactly when it becomes true."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from prunus.errors import CheckpointNotFoundError, InvalidStateError, StaleOwnerError, StoreFullError
from prunus.persistence import sqlite
from prunus.persistence.persister import Claim, Effects, Event, NewProcess, Query, Save
from prunus.persistence.sqlite import ProcessStore, merge, open_database
from prunus.testing.persister_contract import new, save_of

NOTHING = Effects()
ENDS = ("finished", "excepted", "killed")


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(open_database(":memory:")) as connection:
        yield connection


@pytest.fixture
def store(connection: sqlite3.Connection) -> ProcessStore:
    return ProcessStore(connection, clock=lambda: 5.0)


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

    @pytest.mark.parametrize("changes", [{"play": "paused"}, {"state": "waiting", "suspended": True}])
    def test_who_is_paused_or_suspended_is_parked(self, store: ProcessStore, changes: dict[str, Any]) -> None:
        """Only a message changes that."""
        claim = started(store)
        assert store.save(save_of(claim, release=True, **changes))[1] == NOTHING
        assert store.unheld_work() == NOTHING
        assert store.post("p", b"play")[1] == Effects(called=("p",))

    def test_suspended_counts_only_while_waiting(self, store: ProcessStore) -> None:
        """A running process is not suspended, whatever its save says."""
        assert store.save(save_of(started(store), suspended=True, release=True))[1] == Effects(runnable=("p",))

    def test_the_end_of_the_last_child_wakes_its_waiter(self, store: ProcessStore) -> None:
        """However the children end, and not before the last one."""
        parked(store, children=(new("a"), new("b"), new("c")), waits=("a", "b", "c"))
        assert end(store, "a") == NOTHING
        assert end(store, "b", "killed") == NOTHING
        assert end(store, "c", "excepted") == Effects(runnable=("p",))

    def test_one_end_wakes_all_its_waiters(self, store: ProcessStore) -> None:
        """In the order in which they were made, but not those that are paused or wait for another one too."""
        store.create(new("a"))
        store.create(new("b"))
        parked(store, "p", waits=("a",))
        parked(store, "q", waits=("a", "b"))
        parked(store, "r", waits=("a",), play="paused")
        parked(store, "s", waits=("a", "a"))
        assert end(store, "a") == Effects(runnable=("p", "s"))

    def test_who_waits_for_what_has_ended_is_runnable_at_once(self, store: ProcessStore) -> None:
        """Also one that waits for nothing."""
        started(store, "a")
        end(store, "a")
        assert parked(store, waits=("a",)) == Effects(runnable=("p",))
        assert parked(store, "q") == Effects(runnable=("q",))

    def test_a_held_waiter_is_runnable_when_it_is_given_back(self, store: ProcessStore) -> None:
        """The end of its child while somebody holds it says nothing; the release does."""
        claim = started(store)
        store.save(save_of(claim, "waiting", children=(new("a"),), waits=("a",)))
        assert end(store, "a") == NOTHING
        assert store.release("p", claim.epoch)[1] == Effects(runnable=("p",))

    def test_a_paused_waiter_stays_parked_and_keeps_its_waits(self, store: ProcessStore) -> None:
        """A control worker that applies a pause declares them anew; played later, it is runnable."""
        parked(store, children=(new("a"),), waits=("a",))
        claim = store.claim("p", "w", at=3.0)[0]
        store.save(save_of(claim, "waiting", play="paused", waits=("a",), release=True))
        assert end(store, "a") == NOTHING
        claim = store.claim("p", "w", at=3.0)[0]
        assert claim.results == {"a": b"finished"}
        assert store.save(save_of(claim, "waiting", waits=("a",), release=True))[1] == Effects(runnable=("p",))

    def test_a_revived_child_is_waited_for_again(self, store: ProcessStore) -> None:
        """Its waiter, if it has not gone on yet, gets the new result."""
        parked(store, children=(new("a"),), waits=("a",))
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

    def test_letters_of_a_save_call_their_receivers(self, store: ProcessStore) -> None:
        """A killed process takes its children along: the held ones by their owners."""
        claim = started(store)
        store.save(save_of(claim, children=(new("a"), new("b"))))
        store.claim("b", "w", at=3.0)
        save = save_of(claim, "killed", letters=(("a", b"kill"), ("b", b"kill"), ("gone", b"kill")))
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


class TestWhole:
    def test_what_is_to_be_done_can_be_looked_up(self, store: ProcessStore) -> None:
        """Everything that is runnable, called or held, for who starts up on what is there."""
        parked(store, "parked", children=(new("a"),), waits=("a",))
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
        store.save(save_of(claim, "waiting", waits=("p",)))
        end(store, "p")
        store.delete("p")
        tables = [name for [name] in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        tables = [name for name in tables if name != "fence"]
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
        assert sum("TEMP B-TREE" in line for line in plan) <= 1 + len(query.states)

    @pytest.mark.parametrize("name", ["_FIND", "_FIND_WAITERS", "_FIND_UNHELD", "_FIND_HELD", "_RESULTS_WAITED_FOR"])
    def test_no_statement_reads_all_processes(
        self, store: ProcessStore, connection: sqlite3.Connection, name: str
    ) -> None:
        """An index leads to the rows; whether a process waits is one step into another."""
        statement = getattr(sqlite, name)
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", ["x"] * statement.count("?"))]
        assert all("USING" in line for line in plan if line.startswith(("SCAN", "SEARCH"))), plan
        if "EXISTS" in statement:
            assert "SEARCH wait USING PRIMARY KEY (waiter=? AND done=?)" in plan


class StoreMachine(RuleBasedStateMachine):
    """Random workers on random processes, beside a queue that knows only what the effects told it."""

    claims = Bundle("claims")
    pids = st.sampled_from(["a", "b", "c", "d"])

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
        self.told_runnable.update(effects.runnable)
        self.told_called.update(effects.called)
        return answer

    @rule(pid=pids)
    def create(self, pid: str) -> None:
        self.do(self.store.create, new(pid))

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
        waits=st.lists(pids, max_size=2),
        children=st.lists(pids, max_size=2),
        letters=st.lists(pids, max_size=1),
        suspended=st.booleans(),
        release=st.booleans(),
        done=st.integers(0, 3),
    )
    def save(
        self,
        claim: Claim,
        state: str,
        play: str,
        waits: list[str],
        children: list[str],
        letters: list[str],
        suspended: bool,
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
                waits=tuple(waits),
                children=tuple(NewProcess(pid=pid, class_id="x", checkpoint=b"", created_at=0.0) for pid in children),
                letters=tuple((pid, b"letter") for pid in letters),
                suspended=suspended,
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

    @rule(pid=pids)
    def delete(self, pid: str) -> None:
        self.do(self.store.delete, pid)

    @invariant()
    def whoever_can_go_on_was_told(self) -> None:
        """G12: what is runnable or called now has a task, by effects alone."""
        now = self.store.unheld_work()
        assert set(now.runnable) <= self.told_runnable
        assert set(now.called) <= self.told_called

    @invariant()
    def a_wait_is_done_exactly_while_its_target_is_terminal(self) -> None:
        for state, done in self.connection.execute("SELECT state, done FROM wait JOIN process ON n = target"):
            assert bool(done) == (state in ENDS)

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
        parked(store, waits=("child", "other"))
        store.post("p", b"letter")
    with closing(open_database(path)) as connection:
        store = ProcessStore(connection)
        assert store.unheld_work() == Effects(runnable=("child",), called=("p",))
        assert end(store, "child") == Effects(runnable=("p",))
