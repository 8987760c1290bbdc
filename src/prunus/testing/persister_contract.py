"""What every `Persister` must do, as a test class: inherit from it and give it a `persister`.

::

    class TestMine(PersisterContract):
        @pytest.fixture
        async def persister(self):
            async with MyPersister() as persister:
                yield persister

The persister must be empty. What a store takes and keeps at the most is said with `Persister`; of the errors a test
wants the type and the name of what is wrong, and leaves the words to you. Needs pytest and pytest-asyncio
(``asyncio_mode = "auto"``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from prunus.errors import ArchiveError, BusyError, CheckpointNotFoundError, InvalidStateError, StaleOwnerError
from prunus.persistence.persister import (
    FIRST_EVENTS,
    KEPT_STEPS,
    LOG_LIMIT,
    MAX_EVENTS,
    MAX_LETTERS,
    MAX_LOG_LINES,
    MAX_MAIL,
    MAX_REPLIES,
    PORTION_BYTES,
    QUERY_LIMIT,
    Adopted,
    Claim,
    Created,
    Event,
    Letter,
    LogLine,
    Mail,
    NewProcess,
    Note,
    Past,
    Persister,
    Portion,
    Query,
    Record,
    Reply,
    Save,
    Tell,
)


def new(pid: str = "p", **changes: Any) -> NewProcess:
    """A new process for a test."""
    fields: dict[str, Any] = {"class_id": "lab:Work", "checkpoint": b"first", "created_at": 1.0, **changes}
    return NewProcess(pid=pid, **fields)


def save_of(claim: Claim, state: str = "running", **changes: Any) -> Save:
    """A save under `claim`; a terminal one has a result."""
    fields: dict[str, Any] = {"checkpoint": b"next", **changes}
    if state in ("finished", "excepted", "killed"):
        fields.setdefault("result", state.encode())
    return Save(pid=claim.record.pid, epoch=claim.epoch, state=state, **fields)


class PersisterContract:
    """The rules of the seam, one test each."""

    @pytest.fixture
    def persister(self) -> Persister:
        raise NotImplementedError("give the contract a fixture `persister`")

    async def started(self, persister: Persister, pid: str = "p", **changes: Any) -> Claim:
        """A new process, claimed by worker ``w``."""
        await persister.create(new(pid, **changes))
        return await persister.claim(pid, "w", at=2.0)

    async def ended(self, persister: Persister, pid: str = "p", state: str = "finished", **changes: Any) -> Claim:
        claim = await self.started(persister, pid, **changes)
        await persister.save(save_of(claim, state))
        return claim

    # --- creating and loading -----------------------------------------------------------------------

    async def test_a_created_process_can_be_loaded(self, persister: Persister) -> None:
        """What `create` got is in the row, and the rest says that nothing has happened yet."""
        created = await persister.create(new(parent="q", tags=("z", "a"), created_at=1.5))
        assert created == Created("p", is_new=True)
        record = await persister.load("p")
        assert (record.pid, record.class_id, record.checkpoint, record.parent) == ("p", "lab:Work", b"first", "q")
        assert (record.tags, record.created_at) == (("z", "a"), 1.5)
        assert (record.state, record.play, record.epoch, record.seq) == ("created", "playing", 0, 0)
        assert (record.owner, record.result, record.aside, record.waits, record.inbox) == (None, None, None, (), ())
        assert not record.is_terminal

    async def test_creating_again_changes_nothing(self, persister: Persister) -> None:
        """A resent launch finds what is there (G6)."""
        await persister.create(new())
        again = await persister.create(new(checkpoint=b"other", class_id="lab:Other", tags=("t",), key="k"))
        assert again == Created("p", is_new=False)
        record = await persister.load("p")
        assert (record.checkpoint, record.class_id, record.tags, record.key) == (b"first", "lab:Work", (), None)

    async def test_creating_with_a_key_that_is_taken_answers_who_has_it(self, persister: Persister) -> None:
        """Whatever its state, as long as it is kept; nothing of the other one is stored. A pid goes before a key."""
        assert await persister.create(new(key="k")) == Created("p", is_new=True)
        for state in ("running", "finished"):
            assert await persister.create(new("q", key="k", tags=("t",))) == Created("p", is_new=False)
            await persister.save(save_of(await persister.claim("p", "w", at=2.0), state))
        await persister.create(new("r"))
        assert await persister.create(new("r", key="k")) == Created("r", is_new=False)
        assert self.pids(await persister.query(Query(key="k"))) == ["p"]
        assert await persister.query(Query(tag="t")) == []
        assert self.pids(await persister.query(Query())) == ["r", "p"]
        await persister.delete("p")
        assert await persister.create(new("q", key="k")) == Created("q", is_new=True)
        assert (await persister.load("q")).key == "k"

    async def test_how_it_is_dispatched_is_in_the_row(self, persister: Persister) -> None:
        """Queue, priority and resources, as they were given; also in the answer to a claim and after a save."""
        options: dict[str, Any] = {"queue": "gpu", "priority": 9, "resources": {"licence": 2, "ä": 1}, "key": "ours"}
        claim = await self.started(persister, **options)
        await persister.save(save_of(claim))
        for record in (claim.record, await persister.load("p"), (await persister.query(Query()))[0]):
            assert {name: getattr(record, name) for name in options} == options
        await persister.create(new("plain"))
        record = await persister.load("plain")
        assert (record.queue, record.priority, record.resources, record.key) == ("default", 0, {}, None)

    async def test_the_depth_counts_who_is_above(self, persister: Persister) -> None:
        """Of children that a save creates, and of others; 0 without a parent, or with one that is not kept."""
        claim = await self.started(persister, parent="gone")
        assert claim.record.depth == 0
        await persister.save(save_of(claim, children=(new("a", parent="p"),)))
        claim = await persister.claim("a", "w", at=2.0)
        await persister.save(save_of(claim, children=(new("b", parent="a"), new("other", parent="nobody"))))
        await persister.create(new("c", parent="b"))
        assert [(await persister.load(pid)).depth for pid in ("a", "b", "c", "other")] == [1, 2, 3, 0]

    async def test_a_child_has_no_key(self, persister: Persister) -> None:
        """Its parent may wait for its pid, which another process with that key does not have."""
        claim = await self.started(persister)
        with pytest.raises(ValueError, match="key"):
            await persister.save(save_of(claim, children=(new("c", parent="p", key="k"),)))
        assert (await persister.load("p")).seq == 0

    @pytest.mark.parametrize(
        "changes",
        [
            {"queue": ""},
            {"queue": "q" * 256},
            {"key": ""},
            {"priority": -1},
            {"priority": 10},
            {"resources": {"gpu": 0}},
            {"resources": {"": 1}},
        ],
        ids=repr,
    )
    async def test_options_that_can_not_be_meant_are_refused(
        self, persister: Persister, changes: dict[str, Any]
    ) -> None:
        """With a sentence; nothing is stored, of a child neither."""
        with pytest.raises(ValueError, match=r"queue|key|priority|resource|gpu"):
            await persister.create(new(**changes))
        claim = await self.started(persister, "parent")
        with pytest.raises(ValueError, match=r"queue|key|priority|resource|gpu"):
            await persister.save(save_of(claim, children=(new(parent="parent", **changes),)))
        assert self.pids(await persister.query(Query())) == ["parent"]

    async def test_who_does_not_exist_is_not_found(self, persister: Persister) -> None:
        """Every operation on an unknown pid raises `CheckpointNotFoundError` with the pid."""
        for operation in (
            persister.load("nobody"),
            persister.claim("nobody", "w", at=0.0),
            persister.save(Save(pid="nobody", epoch=1, state="running")),
            persister.release("nobody", 1),
            persister.set_aside("nobody", 1, "why"),
            persister.revive("nobody"),
            persister.note(Note(pid="nobody", epoch=1)),
            persister.post("nobody", b""),
            persister.reply("nobody", 1),
            persister.send("nobody", "name", b"", at=0.0),
            persister.history("nobody"),
            persister.log("nobody"),
            persister.past("nobody"),
            persister.past_checkpoint("nobody", 1),
            persister.delete("nobody"),
        ):
            with pytest.raises(CheckpointNotFoundError) as caught:
                await operation
            assert caught.value.pid == "nobody"

    async def test_a_process_can_be_created_where_another_one_was(self, persister: Persister) -> None:
        """It is RUNNING before a step then; or it is paused from the beginning."""
        await persister.create(
            new(state="running", play="paused", step="fit", status="a fork", parent="q", parent_close="abandon")
        )
        record = await persister.load("p")
        assert (record.state, record.play, record.step, record.status) == ("running", "paused", "fit", "a fork")
        assert record.parent_close == "abandon"
        claim = await persister.claim("p", "w", at=2.0)
        await persister.save(save_of(claim, "excepted", checkpoint=None))
        assert (await persister.revive("p")).state == "running"

    @pytest.mark.parametrize("state", ["waiting", "finished"])
    async def test_a_new_process_neither_waits_nor_has_ended(self, persister: Persister, state: str) -> None:
        """Nobody would ever look at it."""
        with pytest.raises(ValueError, match=state):
            await persister.create(new(state=state))
        with pytest.raises(CheckpointNotFoundError):
            await persister.load("p")

    # --- one writer (G4) ----------------------------------------------------------------------------

    async def test_a_claim_brings_all_that_is_needed_to_go_on(self, persister: Persister) -> None:
        """The checkpoint, the letters and a positive epoch; the owner is known from then on."""
        await persister.create(new())
        await persister.post("p", b"hello")
        claim = await persister.claim("p", "w", at=2.0)
        assert claim.epoch > 0
        assert (claim.record.checkpoint, claim.record.owner, claim.record.epoch) == (b"first", "w", claim.epoch)
        assert [letter.body for letter in claim.inbox] == [b"hello"]
        assert (await persister.load("p")).owner == "w"

    async def test_every_claim_raises_the_epoch(self, persister: Persister) -> None:
        """Also one by the same owner, and also after the process was given back."""
        claims = [await self.started(persister)]
        claims.append(await persister.claim("p", "w", at=3.0))
        await persister.release("p", claims[-1].epoch)
        claims.append(await persister.claim("p", "v", at=4.0))
        epochs = [claim.epoch for claim in claims]
        assert epochs == sorted(set(epochs))

    async def test_an_old_epoch_can_write_nothing(self, persister: Persister) -> None:
        """Who lost its claim is refused, whatever it wants to write, and changes nothing."""
        old = await self.started(persister)
        await persister.claim("p", "v", at=3.0)
        before = await persister.load("p")
        for operation in (
            persister.save(save_of(old, "finished")),
            persister.save(save_of(old, release=True, children=(new("c"),))),
            persister.note(Note(pid="p", epoch=old.epoch, progress=0.5, lines=(LogLine(at=3.0, text="late"),))),
            persister.release("p", old.epoch),
            persister.set_aside("p", old.epoch, "why"),
        ):
            with pytest.raises(StaleOwnerError) as caught:
                await operation
            assert (caught.value.pid, caught.value.epoch) == ("p", old.epoch)
        assert await persister.load("p") == before
        assert await persister.log("p") == []
        assert [record.pid for record in await persister.query(Query())] == ["p"]

    async def test_an_epoch_that_was_never_given_can_write_nothing(self, persister: Persister) -> None:
        """Neither a higher one nor, before the first claim, zero."""
        await persister.create(new())
        with pytest.raises(StaleOwnerError):
            await persister.save(Save(pid="p", epoch=0, state="running", checkpoint=b"x"))
        claim = await persister.claim("p", "w", at=2.0)
        with pytest.raises(StaleOwnerError):
            await persister.save(Save(pid="p", epoch=claim.epoch + 1, state="running", checkpoint=b"x"))

    async def test_who_gave_it_back_can_write_no_more(self, persister: Persister) -> None:
        """After a release the epoch is the newest still, but it has no owner."""
        claim = await self.started(persister)
        await persister.save(save_of(claim, release=True))
        for late in (save_of(claim), save_of(claim, "finished"), save_of(claim, checkpoint=b"late", release=True)):
            with pytest.raises(StaleOwnerError):
                await persister.save(late)
        with pytest.raises(StaleOwnerError):
            await persister.note(Note(pid="p", epoch=claim.epoch, progress=0.5))
        assert (await persister.load("p")).checkpoint == b"next"

    async def test_the_last_word_may_be_said_again(self, persister: Persister) -> None:
        """A last save, a release or a setting aside that got no answer is said again: it is answered, and done once."""
        for pid, save in (("end", {"state": "finished"}), ("back", {"release": True})):
            claim = await self.started(persister, pid)
            last = save_of(claim, events=(Event(subject="x.y", at=3.0),), **save)
            first = await persister.save(last)
            assert (await persister.save(last)).seq == first.seq
            assert [event.subject for event in await persister.history(pid)] == ["claimed", "x.y"]
        claim = await self.started(persister, "released")
        await persister.release("released", claim.epoch)
        await persister.release("released", claim.epoch)
        claim = await self.started(persister, "aside")
        await persister.set_aside("aside", claim.epoch, "why")
        await persister.set_aside("aside", claim.epoch, "why")
        assert len(await persister.history("aside")) == 2

    async def test_one_of_many_claims_at_once_is_the_last(self, persister: Persister) -> None:
        """Ten claim together: ten epochs, and only the highest can write."""
        await persister.create(new())
        claims = await asyncio.gather(*(persister.claim("p", f"w{i}", at=2.0) for i in range(10)))
        assert len({claim.epoch for claim in claims}) == 10
        answers = await asyncio.gather(*(persister.save(save_of(claim)) for claim in claims), return_exceptions=True)
        winners = [claim.epoch for claim, a in zip(claims, answers, strict=True) if not isinstance(a, BaseException)]
        assert winners == [max(claim.epoch for claim in claims)]

    # --- saving -------------------------------------------------------------------------------------

    async def test_a_save_replaces_what_was_there(self, persister: Persister) -> None:
        """State, play state, checkpoint, status and step are those of the last save; `seq` counts them."""
        claim = await self.started(persister)
        await persister.save(save_of(claim, status="busy", step="one"))
        saved = await persister.save(save_of(claim, "waiting", play="paused", checkpoint=b"two", step="two"))
        record = await persister.load("p")
        assert (record.state, record.play, record.checkpoint) == ("waiting", "paused", b"two")
        assert (record.status, record.step) == (None, "two")
        assert record.seq == saved.seq == 2
        assert record.owner == "w"

    async def test_a_save_without_a_checkpoint_keeps_the_last_good_one(self, persister: Persister) -> None:
        """That is what an excepted process is retried from."""
        claim = await self.started(persister)
        await persister.save(save_of(claim, checkpoint=b"good"))
        await persister.save(save_of(claim, "excepted", checkpoint=None, result=b"failure"))
        record = await persister.load("p")
        assert (record.state, record.checkpoint, record.result) == ("excepted", b"good", b"failure")

    async def test_a_terminal_state_gives_up_the_claim(self, persister: Persister) -> None:
        """Whether `release` is said or not; the result is kept."""
        await self.ended(persister)
        record = await persister.load("p")
        assert (record.owner, record.result, record.is_terminal) == (None, b"finished", True)

    async def test_a_terminal_process_is_not_claimed(self, persister: Persister) -> None:
        """Epoch 0 and the record with its result are the answer; nothing changes."""
        await self.ended(persister)
        before = await persister.load("p")
        claim = await persister.claim("p", "late", at=9.0)
        assert (claim.epoch, claim.record.result, claim.record.owner) == (0, b"finished", None)
        assert await persister.load("p") == before

    async def test_a_terminal_state_needs_a_result(self, persister: Persister) -> None:
        """Without one those that wait for it could never go on."""
        claim = await self.started(persister)
        with pytest.raises(ValueError, match="result"):
            await persister.save(save_of(claim, "finished", result=None))
        assert (await persister.load("p")).owner == "w"

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"keep_as": "run", "checkpoint": None}, "checkpoint"),
            ({"state": "waiting", "waits": ((),)}, "wait"),
            ({"state": "waiting", "wake_at": float("nan")}, "wake|nan|number"),
            ({"state": "waiting", "names": ("a",), "listens": ("a", "b")}, r"\bb\b"),
        ],
    )
    async def test_what_can_not_be_meant_is_refused(
        self, persister: Persister, changes: dict[str, Any], problem: str
    ) -> None:
        """With what is wrong, and nothing is changed."""
        claim = await self.started(persister)
        before = await persister.load("p")
        with pytest.raises(ValueError, match=problem):
            await persister.save(save_of(claim, **changes))
        assert await persister.load("p") == before

    async def test_a_release_keeps_the_last_checkpoint(self, persister: Persister) -> None:
        """The process is nobody's, as it was saved last, and anybody may claim it."""
        claim = await self.started(persister)
        await persister.save(save_of(claim, checkpoint=b"good"))
        await persister.release("p", claim.epoch)
        record = await persister.load("p")
        assert (record.owner, record.state, record.checkpoint) == (None, "running", b"good")
        assert (await persister.claim("p", "v", at=3.0)).record.checkpoint == b"good"

    async def test_children_are_born_with_the_save(self, persister: Persister) -> None:
        """They exist from that commit on, one after the other; a child that exists already is left as it is."""
        claim = await self.started(persister)
        await persister.create(new("c1", checkpoint=b"own"))
        children = (new("c1", parent="p"), new("c2", parent="p"), new("c3", parent="p"))
        await persister.save(save_of(claim, children=children))
        assert (await persister.load("c1")).checkpoint == b"own"
        assert [record.pid for record in await persister.query(Query(parent="p"))] == ["c3", "c2"]

    async def test_a_refused_save_leaves_no_trace(self, persister: Persister) -> None:
        """All or nothing: not even its children are there."""
        claim = await self.started(persister)
        before = await persister.load("p")
        with pytest.raises(CheckpointNotFoundError):
            await persister.save(
                save_of(
                    claim, "waiting", children=(new("c"),), waits=(("nobody",),), events=(Event(subject="x.y", at=1.0),)
                )
            )
        assert await persister.load("p") == before
        assert [event.subject for event in await persister.history("p")] == ["claimed"]
        with pytest.raises(CheckpointNotFoundError):
            await persister.load("c")

    # --- waiting ------------------------------------------------------------------------------------

    async def test_waits_shrink_as_their_targets_end(self, persister: Persister) -> None:
        """What has ended already never counts, and each end takes one away."""
        await self.ended(persister, "early")
        claim = await self.started(persister)
        children = (new("a"), new("b"))
        waits = (("early", "a", "b"),)
        await persister.save(save_of(claim, "waiting", children=children, waits=waits, release=True))
        assert (await persister.load("p")).waits == ("a", "b")
        await self.end(persister, "a")
        assert (await persister.load("p")).waits == ("b",)
        assert (await persister.query(Query(states=("waiting",))))[0].waits == ("b",)

    async def test_a_claim_brings_the_results_that_were_waited_for(self, persister: Persister) -> None:
        """By pid, also of one that had ended before the wait was declared, however it ended."""
        await self.ended(persister, "early", "killed")
        claim = await self.started(persister)
        await persister.save(save_of(claim, "waiting", children=(new("a"),), waits=(("early", "a"),), release=True))
        assert (await persister.claim("p", "w", at=3.0)).results == {"early": b"killed"}
        await self.end(persister, "a", "excepted")
        assert (await persister.claim("p", "w", at=4.0)).results == {"early": b"killed", "a": b"excepted"}

    async def test_results_come_in_the_order_in_which_they_came_about(self, persister: Persister) -> None:
        """Not in the order of their creation: who is told of several at once applies them one after the other."""
        claim = await self.started(persister)
        children = tuple(new(pid) for pid in "abc")
        groups = (("a",), ("b",), ("c",))
        await persister.save(save_of(claim, "waiting", children=children, waits=groups, release=True))
        for pid in "cab":
            await self.end(persister, pid)
        assert list((await persister.claim("p", "w", at=3.0)).results) == ["c", "a", "b"]

    async def test_results_come_until_the_waiter_goes_on(self, persister: Persister) -> None:
        """Who claims and dies before its first save has taken nothing away; who runs on has no waits."""
        claim = await self.started(persister)
        await persister.save(save_of(claim, "waiting", children=(new("a"),), waits=(("a",),), release=True))
        await self.end(persister, "a")
        for at in (3.0, 4.0):
            claim = await persister.claim("p", "w", at=at)
            assert claim.results == {"a": b"finished"}
        await persister.save(save_of(claim, "running", release=True))
        assert (await persister.claim("p", "w", at=5.0)).results == {}

    async def test_a_claim_brings_the_results_of_all_groups(self, persister: Persister) -> None:
        """Each once, also those that the last save had seen; `waits` names those that are left, each once."""
        claim = await self.started(persister)
        children = (new("a"), new("b"), new("c"))
        groups = (("a", "b"), ("a", "c"), ("b",))
        await persister.save(save_of(claim, "waiting", children=children, waits=groups, release=True))
        assert (await persister.load("p")).waits == ("a", "b", "c")
        await self.end(persister, "a")
        claim = await persister.claim("p", "w", at=3.0)
        assert claim.results == {"a": b"finished"}
        await persister.save(save_of(claim, "waiting", waits=groups, seen=("a",), release=True))
        await self.end(persister, "c", "killed")
        assert (await persister.load("p")).waits == ("b",)
        assert (await persister.claim("p", "w", at=4.0)).results == {"a": b"finished", "c": b"killed"}

    async def test_groups_can_be_said_anew(self, persister: Persister) -> None:
        """A save replaces those of the one before: what is gone is not waited for, what is new is."""
        claim = await self.started(persister)
        children = tuple(new(pid) for pid in "abcd")
        await persister.save(save_of(claim, "waiting", children=children, waits=(("a",), ("b", "c"))))
        await persister.save(save_of(claim, "waiting", waits=(("c", "b"), ("d",))))
        assert (await persister.load("p")).waits == ("b", "c", "d")
        await persister.save(save_of(claim, "waiting", waits=(("a",),)))
        assert (await persister.load("p")).waits == ("a",)
        await persister.save(save_of(claim, "running"))
        assert (await persister.load("p")).waits == ()

    async def test_a_timer_is_in_the_row_until_it_is_over(self, persister: Persister) -> None:
        """While the process waits, and as long as its time is to come."""
        claim = await self.started(persister)
        await persister.save(save_of(claim, "waiting", wake_at=1e11))
        assert (await persister.load("p")).wake_at == 1e11
        assert (await persister.query(Query()))[0].wake_at == 1e11
        await persister.save(save_of(claim, "waiting", wake_at=1.0))
        assert (await persister.load("p")).wake_at is None
        await persister.save(save_of(claim, "waiting", wake_at=1e11))
        await persister.save(save_of(claim, "running", wake_at=1e11))
        assert (await persister.load("p")).wake_at is None

    async def end(self, persister: Persister, pid: str, state: str = "finished") -> None:
        await persister.save(save_of(await persister.claim(pid, "other", at=2.0), state))

    # --- letters ------------------------------------------------------------------------------------

    async def test_letters_stay_until_they_are_dealt_with(self, persister: Persister) -> None:
        """In their order, numbered from 1, in every answer that a holder gets; claims and saves take none away."""
        claim = await self.started(persister)
        assert (await persister.post("p", b"one")).seq == 1
        assert (await persister.post("p", b"two")).seq == 2
        saved = await persister.save(save_of(claim))
        assert [(letter.seq, letter.body) for letter in saved.inbox] == [(1, b"one"), (2, b"two")]
        saved = await persister.save(save_of(claim, inbox_done=1))
        assert [letter.body for letter in saved.inbox] == [b"two"]
        again = await persister.claim("p", "v", at=3.0)
        assert again.inbox == saved.inbox == (await persister.load("p")).inbox
        assert (again.record.inbox_done, again.record.inbox_last) == (1, 2)
        assert (await persister.save(save_of(again, inbox_done=2))).inbox == ()
        assert (await persister.post("p", b"three")).seq == 3

    async def test_dealing_with_letters_never_goes_back(self, persister: Persister) -> None:
        """A save that says less than an earlier one, or more than there is, does no harm."""
        claim = await self.started(persister)
        await persister.post("p", b"one")
        await persister.save(save_of(claim, inbox_done=7))
        await persister.save(save_of(claim, inbox_done=0))
        await persister.post("p", b"two")
        assert [letter.body for letter in (await persister.load("p")).inbox] == [b"two"]

    async def test_posting_says_who_holds_the_process(self, persister: Persister) -> None:
        """So that the holder can be told at once."""
        await persister.create(new())
        assert (await persister.post("p", b"1")).owner is None
        await persister.claim("p", "w", at=2.0)
        posted = await persister.post("p", b"2")
        assert (posted.owner, posted.state) == ("w", "created")

    async def test_a_terminal_process_gets_no_letters(self, persister: Persister) -> None:
        """`seq` 0 and the state are the answer; letters that were in the inbox are answered by the end."""
        claim = await self.started(persister)
        await persister.post("p", b"too late")
        assert (await persister.save(save_of(claim, "finished"))).inbox == ()
        posted = await persister.post("p", b"later still")
        assert (posted.seq, posted.state) == (0, "finished")
        assert (await persister.load("p")).inbox == ()

    async def test_an_inbox_has_a_bound(self, persister: Persister) -> None:
        """A letter too many is refused by name; when one is dealt with there is room again."""
        claim = await self.started(persister)
        await asyncio.gather(*(persister.post("p", b"") for _ in range(MAX_LETTERS)))
        with pytest.raises(BusyError, match=r"\bp\b"):
            await persister.post("p", b"")
        assert (await persister.load("p")).inbox_last == MAX_LETTERS
        await persister.save(save_of(claim, inbox_done=1))
        assert (await persister.post("p", b"")).seq == MAX_LETTERS + 1

    async def test_a_letter_is_answered(self, persister: Persister) -> None:
        """By a save, for whoever asks for the answer by its number; also by the last save of the process."""
        claim = await self.started(persister)
        for number in (1, 2, 3):
            assert (await persister.post("p", b"?")).seq == number
        assert await persister.reply("p", 1) is None
        await persister.save(save_of(claim, inbox_done=2, replies=(Reply(1, b"one"), Reply(2, b""))))
        await persister.save(save_of(claim, "finished", replies=(Reply(3, b"three"),)))
        assert [await persister.reply("p", number) for number in (1, 2, 3, 4)] == [b"one", b"", b"three", None]

    async def test_the_newest_answers_are_kept(self, persister: Persister) -> None:
        """`MAX_REPLIES` of each process."""
        claim = await self.started(persister)
        replies = [Reply(seq, b"%d" % seq) for seq in range(1, 2 * MAX_REPLIES, 2)]
        await persister.save(save_of(claim, replies=tuple(replies)))
        assert await persister.reply("p", 1) == b"1"
        await persister.save(save_of(claim, replies=(Reply(2 * MAX_REPLIES, b"new"),)))
        assert await persister.reply("p", 1) is None
        assert await persister.reply("p", 3) == b"3"
        assert await persister.reply("p", 2 * MAX_REPLIES) == b"new"

    async def test_a_save_tells_the_children(self, persister: Persister) -> None:
        """Those that have not ended, by what their parent's end means for them; also those of this very save."""
        claim = await self.started(persister)
        kinds = {"k": "kill", "a": "abandon", "w": "wait", "e": "kill"}
        children = tuple(new(pid, parent="p", parent_close=kind) for pid, kind in kinds.items())
        await persister.save(save_of(claim, children=children))
        await persister.create(new("g", parent="k"))
        await persister.create(new("other", parent="q"))
        await self.end(persister, "e")
        tells = (Tell(b"pause"), Tell(b"kill", to=("kill", "wait")), Tell(b"nobody", to=()))
        await persister.save(save_of(claim, "killed", children=(new("n", parent="p"),), tells=tells))
        told = {pid: [letter.body for letter in (await persister.load(pid)).inbox] for pid in "kawengp"}
        assert told == {
            "k": [b"pause", b"kill"],
            "a": [b"pause"],
            "w": [b"pause", b"kill"],
            "e": [],
            "n": [b"pause", b"kill"],
            "g": [],
            "p": [],
        }
        assert (await persister.load("k")).inbox_last == 2
        assert (await persister.load("other")).inbox == ()

    # --- mail ---------------------------------------------------------------------------------------

    async def test_mail_stays_until_it_is_consumed(self, persister: Persister) -> None:
        """A claim brings the oldest of each name that the process waits for, again and again until a save used it."""
        claim = await self.started(persister)
        for name, body in (("a", b"a1"), ("b", b"b1"), ("a", b"a2"), ("c", b"c1")):
            await persister.send("p", name, body, at=2.5, sender="me" if name == "a" else None)
        await persister.save(save_of(claim, "waiting", names=("a", "b", "d"), release=True))
        record = await persister.load("p")
        assert (record.names, record.mail) == (("a", "b", "d"), 4)
        for at in (3.0, 4.0):
            claim = await persister.claim("p", "w", at=at)
            assert [(mail.seq, mail.name, mail.body, mail.at, mail.sender) for mail in claim.mail] == [
                (1, "a", b"a1", 2.5, "me"),
                (2, "b", b"b1", 2.5, None),
            ]
        await persister.save(save_of(claim, "waiting", names=("a",), consumed=(1, 7), release=True))
        assert [mail.body for mail in (await persister.claim("p", "w", at=5.0)).mail] == [b"a2"]
        assert (await persister.load("p")).mail == 3

    async def test_only_a_waiting_process_is_brought_mail(self, persister: Persister) -> None:
        """One that runs on has used what it was given; the rest waits for it."""
        claim = await self.started(persister)
        await persister.send("p", "a", b"a1", at=2.5)
        await persister.save(save_of(claim, "waiting", names=("a",)))
        await persister.save(save_of(claim, "running", names=("a",), release=True))
        record = await persister.load("p")
        assert (record.names, record.mail) == ((), 1)
        assert (await persister.claim("p", "w", at=3.0)).mail == ()

    async def test_sending_says_what_was_done(self, persister: Persister) -> None:
        """The number of the mail and who holds the process, or that it has ended."""
        claim = await self.started(persister)
        posted = await persister.send("p", "a", b"", at=2.5)
        assert (posted.seq, posted.state, posted.owner) == (1, "created", "w")
        await persister.save(save_of(claim, consumed=(1,)))
        assert (await persister.send("p", "a", b"", at=2.5)).seq == 2
        await persister.save(save_of(claim, "finished"))
        posted = await persister.send("p", "a", b"", at=2.5)
        assert (posted.seq, posted.state) == (0, "finished")
        assert (await persister.load("p")).mail == 0

    async def test_the_mail_of_an_excepted_process_is_there_when_it_is_revived(self, persister: Persister) -> None:
        """It had not used it."""
        claim = await self.started(persister)
        await persister.send("p", "a", b"a1", at=2.5)
        await persister.save(save_of(claim, "excepted", checkpoint=None))
        await persister.revive("p")
        claim = await persister.claim("p", "w", at=3.0)
        await persister.save(save_of(claim, "waiting", names=("a",), release=True))
        assert [mail.body for mail in (await persister.claim("p", "w", at=4.0)).mail] == [b"a1"]

    async def test_mail_has_a_bound(self, persister: Persister) -> None:
        """One too many is refused by name; when one is consumed there is room again."""
        claim = await self.started(persister)
        await asyncio.gather(*(persister.send("p", "a", b"", at=2.5) for _ in range(MAX_MAIL)))
        with pytest.raises(BusyError, match=r"\bp\b"):
            await persister.send("p", "b", b"", at=2.5)
        assert (await persister.load("p")).mail == MAX_MAIL
        await persister.save(save_of(claim, consumed=(5,)))
        assert (await persister.send("p", "b", b"", at=2.5)).seq == MAX_MAIL + 1

    # --- what a step says ---------------------------------------------------------------------------

    async def test_a_note_is_no_save(self, persister: Persister) -> None:
        """It tells of the running step; what it does not name stays, and the number of saves too."""
        claim = await self.started(persister)
        before = await persister.save(save_of(claim, status="busy"))
        await persister.note(Note(pid="p", epoch=claim.epoch, progress=0.25, detail="first quarter"))
        await persister.note(Note(pid="p", epoch=claim.epoch, progress=0.5))
        record = await persister.load("p")
        assert (record.progress, record.detail, record.status, record.seq) == (0.5, "first quarter", "busy", before.seq)
        await persister.note(Note(pid="p", epoch=claim.epoch, status="very busy", detail=""))
        record = await persister.load("p")
        assert (record.progress, record.detail, record.status) == (0.5, "", "very busy")
        assert (await persister.query(Query()))[0].progress == 0.5

    async def test_a_save_sets_progress_and_detail(self, persister: Persister) -> None:
        """The next step begins at nothing, if the save does not say otherwise."""
        claim = await self.started(persister)
        await persister.save(save_of(claim, progress=0.5, detail="half"))
        record = await persister.load("p")
        assert (record.progress, record.detail) == (0.5, "half")
        await persister.save(save_of(claim))
        record = await persister.load("p")
        assert (record.progress, record.detail) == (None, None)

    async def test_the_log_has_the_lines_of_saves_and_notes(self, persister: Persister) -> None:
        """In their order, numbered from 1; also when the process has ended."""
        claim = await self.started(persister)
        first = LogLine(at=2.0, text="one", level="INFO", source="lab", step="run")
        await persister.save(save_of(claim, lines=(first, LogLine(at=2.5, text="two"))))
        await persister.note(Note(pid="p", epoch=claim.epoch, lines=(LogLine(at=3.0, text="three"),)))
        await persister.save(save_of(claim, "finished", lines=(LogLine(at=4.0, text="four"),)))
        lines = await persister.log("p")
        assert [(line.seq, line.text) for line in lines] == [(1, "one"), (2, "two"), (3, "three"), (4, "four")]
        assert (lines[0].at, lines[0].level, lines[0].source, lines[0].step) == (2.0, "INFO", "lab", "run")
        assert (lines[1].level, lines[1].source, lines[1].step) == ("REPORT", None, None)

    async def test_a_log_is_read_in_parts(self, persister: Persister) -> None:
        """From a number on, so many lines, or the last ones."""
        claim = await self.started(persister)
        await persister.save(save_of(claim, lines=tuple(LogLine(at=1.0, text=str(i)) for i in range(1, 8))))
        for keywords, expected in (
            ({"after": 5}, [6, 7]),
            ({"limit": 2}, [1, 2]),
            ({"after": 2, "limit": 2}, [3, 4]),
            ({"last": 2}, [6, 7]),
            ({"last": 50}, [1, 2, 3, 4, 5, 6, 7]),
            ({"after": 6, "last": 2}, [7]),
            ({"after": 99}, []),
        ):
            assert [line.seq for line in await persister.log("p", **keywords)] == expected, keywords

    @pytest.mark.parametrize(
        "keywords", [{"after": -1}, {"limit": 0}, {"limit": LOG_LIMIT + 1}, {"last": 0}, {"last": LOG_LIMIT + 1}]
    )
    async def test_a_part_of_a_log_has_a_bound(self, persister: Persister, keywords: dict[str, int]) -> None:
        """No more than `LOG_LIMIT` lines at once, at least one, and from the beginning at the earliest."""
        await persister.create(new())
        with pytest.raises(ValueError, match=rf"after|limit|last|{LOG_LIMIT}"):
            await persister.log("p", **keywords)

    async def test_the_newest_lines_of_a_log_are_kept(self, persister: Persister) -> None:
        """`MAX_LOG_LINES`, and at most a tenth more."""
        claim = await self.started(persister)
        lines = tuple(LogLine(at=1.0, text="") for _ in range(MAX_LOG_LINES // 4))
        for _ in range(5):
            await persister.save(save_of(claim, lines=lines))
        total = 5 * len(lines)
        [oldest] = await persister.log("p", limit=1)
        assert MAX_LOG_LINES <= total - oldest.seq + 1 <= MAX_LOG_LINES + MAX_LOG_LINES // 10
        assert [line.seq for line in await persister.log("p", last=2)] == [total - 1, total]

    async def test_a_long_history_is_thinned_out(self, persister: Persister) -> None:
        """The first and the newest events are kept, and what is left out is said where it was."""
        claim = await self.started(persister)
        events = tuple(Event(subject="round", at=1.0) for _ in range(MAX_EVENTS // 4))
        for _ in range(6):
            await persister.save(save_of(claim, events=events))
        kept = await persister.history("p")
        total = kept[-1].seq
        assert total >= 6 * len(events)
        assert MAX_EVENTS <= len(kept) <= MAX_EVENTS + MAX_EVENTS // 10
        assert [event.seq for event in kept[:FIRST_EVENTS]] == list(range(1, FIRST_EVENTS + 1))
        note = kept[FIRST_EVENTS]
        assert (note.subject, kept[FIRST_EVENTS + 1].seq) == ("thinned", note.seq + 1)
        assert note.note is not None
        assert str(note.seq - FIRST_EVENTS) in note.note
        assert note.seq - FIRST_EVENTS == total - len(kept) + 1

    async def test_a_checkpoint_can_be_kept_under_the_name_of_a_step(self, persister: Persister) -> None:
        """It is there when others have replaced it, and when the process has ended; a name can come again."""
        claim = await self.started(persister)
        await persister.save(save_of(claim, checkpoint=b"1", keep_as="scan"))
        await persister.save(save_of(claim, checkpoint=b"2"))
        await persister.save(save_of(claim, checkpoint=b"3", keep_as="scan"))
        await persister.save(save_of(claim, "finished", checkpoint=b"4"))
        past = await persister.past("p")
        assert [(kept.seq, kept.step) for kept in past] == [(1, "scan"), (3, "scan")]
        assert all(isinstance(kept, Past) and kept.at > 0 for kept in past)
        assert [await persister.past_checkpoint("p", seq) for seq in (1, 3)] == [b"1", b"3"]
        with pytest.raises(InvalidStateError, match=r"\b2\b"):
            await persister.past_checkpoint("p", 2)

    async def test_the_newest_steps_are_kept(self, persister: Persister) -> None:
        """`KEPT_STEPS` of each process."""
        claim = await self.started(persister)
        for number in range(1, KEPT_STEPS + 3):
            await persister.save(save_of(claim, keep_as=f"step {number}"))
        past = await persister.past("p")
        assert [kept.seq for kept in past] == list(range(3, KEPT_STEPS + 3))
        with pytest.raises(InvalidStateError):
            await persister.past_checkpoint("p", 2)

    # --- aside, revive, delete ----------------------------------------------------------------------

    async def test_a_process_is_set_aside_with_the_reason(self, persister: Persister) -> None:
        """It is nobody's, and the history says why; it can be claimed (to be killed)."""
        claim = await self.started(persister)
        await persister.set_aside("p", claim.epoch, "no class")
        record = await persister.load("p")
        assert (record.owner, record.aside, record.state) == (None, "no class", "created")
        last = (await persister.history("p"))[-1]
        assert (last.subject, last.note, last.by) == ("set_aside", "no class", "w")
        again = await persister.claim("p", "w", at=3.0)
        assert (again.record.aside, again.record.checkpoint) == ("no class", b"first")
        await persister.save(save_of(again, "killed", checkpoint=None))
        assert (await persister.load("p")).aside is None

    async def test_reviving_takes_the_reason_away(self, persister: Persister) -> None:
        """A process that was set aside goes on where it was."""
        claim = await self.started(persister)
        await persister.set_aside("p", claim.epoch, "no class")
        record = await persister.revive("p")
        assert (record.aside, record.state) == (None, "created")

    async def test_reviving_continues_an_excepted_process(self, persister: Persister) -> None:
        """From its last good checkpoint, in the state of that one, without the result."""
        claim = await self.started(persister)
        await persister.save(save_of(claim, "running", checkpoint=b"good"))
        await persister.save(save_of(claim, "excepted", checkpoint=None))
        record = await persister.revive("p")
        assert (record.state, record.is_terminal, record.owner) == ("running", False, None)
        again = await persister.claim("p", "w", at=4.0)
        assert again.epoch > claim.epoch
        assert (again.record.checkpoint, again.record.result) == (b"good", None)

    async def test_only_what_failed_can_be_revived(self, persister: Persister) -> None:
        """Not what runs, has finished or was killed."""
        await persister.create(new("created"))
        await self.ended(persister, "finished", "finished")
        await self.ended(persister, "killed", "killed")
        for pid in ("created", "finished", "killed"):
            with pytest.raises(InvalidStateError) as caught:
                await persister.revive(pid)
            assert caught.value.state == pid

    async def test_a_terminal_process_can_be_deleted(self, persister: Persister) -> None:
        """With all that belongs to it; its pid is free again."""
        claim = await self.started(persister, tags=("t",))
        await persister.save(
            save_of(claim, keep_as="run", lines=(LogLine(at=1.0, text="x"),), replies=(Reply(1, b"y"),))
        )
        await persister.save(save_of(claim, "finished"))
        await persister.delete("p")
        assert await persister.query(Query(tag="t")) == []
        assert (await persister.create(new())).is_new
        assert (await persister.history("p"), await persister.log("p"), await persister.past("p")) == ([], [], [])
        assert await persister.reply("p", 1) is None

    async def test_what_is_needed_can_not_be_deleted(self, persister: Persister) -> None:
        """Neither a process that is not terminal, nor one whose result somebody waits for."""
        claim = await self.started(persister)
        with pytest.raises(InvalidStateError):
            await persister.delete("p")
        await persister.save(
            save_of(claim, "waiting", children=(new("a"), new("b")), waits=(("a", "b"),), release=True)
        )
        await self.end(persister, "a")
        with pytest.raises(InvalidStateError, match=r"\bp\b"):
            await persister.delete("a")
        await self.end(persister, "p", "killed")
        await persister.delete("a")

    async def test_pruning_forgets_what_ended_and_matches(self, persister: Persister) -> None:
        """The longest ended first, up to the limit; it says how many, and 0 when none is left."""
        for number, state in enumerate(("finished", "killed", "finished", "excepted", "finished")):
            await self.ended(persister, f"p{number}", state, tags=("odd",) if number % 2 else ())
        await persister.create(new("living"))
        assert await persister.prune(Query(states=("finished",), limit=2)) == 2
        assert self.pids(await persister.query(Query())) == ["living", "p4", "p3", "p1"]
        assert await persister.prune(Query(tag="odd", states=("killed", "created"))) == 1
        assert await persister.prune(Query(unfinished=True)) == 0
        assert await persister.prune(Query(updated_before=0.0)) == 0
        assert await persister.prune(Query()) == 2
        assert await persister.prune(Query()) == 0
        assert self.pids(await persister.query(Query())) == ["living"]

    async def test_what_is_needed_is_not_pruned(self, persister: Persister) -> None:
        """Somebody waits for it, or a child of it goes on; others behind it are found all the same."""
        claim = await self.started(persister)
        children = tuple(new(pid, parent="p") for pid in ("a", "b"))
        await persister.save(save_of(claim, "waiting", children=children, waits=(("a", "b"),), release=True))
        await self.end(persister, "a")
        await self.ended(persister, "other")
        assert await persister.prune(Query(limit=1)) == 1
        assert self.pids(await persister.query(Query())) == ["b", "a", "p"]
        await self.end(persister, "p", "killed")
        assert await persister.prune(Query()) == 1
        assert self.pids(await persister.query(Query())) == ["b", "p"]
        await self.end(persister, "b", "killed")
        assert await persister.prune(Query()) == 2

    async def test_pruning_has_no_pages(self, persister: Persister) -> None:
        """The next ones come with the next time."""
        await self.ended(persister)
        with pytest.raises(ValueError, match=r"pages|before"):
            await persister.prune(Query(before="p"))

    # --- finding ------------------------------------------------------------------------------------

    async def test_a_query_answers_newest_first_without_checkpoints(self, persister: Persister) -> None:
        """Newest means created last, whatever the pids and the clocks say."""
        for pid in ("b", "c", "a"):
            await persister.create(new(pid, created_at=1.0))
        records = await persister.query(Query())
        assert self.pids(records) == ["a", "c", "b"]
        assert all(record.checkpoint is None and record.result is None for record in records)

    async def test_all_conditions_of_a_query_must_hold(self, persister: Persister) -> None:
        """By state, play state, class, tag, parent, roots, aside and unfinished, alone and together."""
        await self.ended(persister, "done", tags=("x", "y"))
        claim = await self.started(persister, "paused", tags=("x",))
        await persister.save(save_of(claim, "waiting", play="paused", release=True))
        await persister.create(new("child", parent="paused", class_id="lab:Other"))
        claim = await self.started(persister, "aside")
        await persister.set_aside("aside", claim.epoch, "why")
        for query, expected in (
            (Query(states=("finished",)), ["done"]),
            (Query(states=("waiting", "finished")), ["paused", "done"]),
            (Query(states=("excepted",)), []),
            (Query(play="paused"), ["paused"]),
            (Query(play="playing"), ["aside", "child", "done"]),
            (Query(class_id="lab:Other"), ["child"]),
            (Query(tag="x"), ["paused", "done"]),
            (Query(tag="x", states=("finished", "waiting"), limit=1), ["paused"]),
            (Query(tag="nothing"), []),
            (Query(parent="paused"), ["child"]),
            (Query(roots=True), ["aside", "paused", "done"]),
            (Query(aside=True), ["aside"]),
            (Query(aside=False), ["child", "paused", "done"]),
            (Query(unfinished=True), ["aside", "child", "paused"]),
            (Query(unfinished=True, tag="x"), ["paused"]),
            (Query(unfinished=True, parent="paused", states=("created",)), ["child"]),
        ):
            assert self.pids(await persister.query(query)) == expected, query

    async def test_a_short_pid_is_its_beginning_or_its_end(self, persister: Persister) -> None:
        """However long; all to which that applies are found, whatever else they have."""
        pids = ("01f-aa-1234abcd", "01f-bb-5678abcd", "77abcd", "01f-bb-5678abcd.3", "x%_*", "é🙂", "a")
        for pid in pids:
            await persister.create(new(pid))
        texts = ("0", "01f-", "abcd", "d", "8abcd", "bb-5678abcd", "cd.3", "3", "%_*", "x%", "_", "🙂", "é", "ab")
        for text in ("", *texts):
            expected = [pid for pid in reversed(pids) if pid.startswith(text) or pid.endswith(text)]
            assert self.pids(await persister.query(Query(prefix=text))) == expected, text
        for pid in pids:
            assert pid in self.pids(await persister.query(Query(prefix=pid)))
        assert self.pids(await persister.query(Query(prefix="01f", limit=1))) == ["01f-bb-5678abcd.3"]
        assert await persister.query(Query(prefix="01f", states=("running",))) == []
        assert self.pids(await persister.query(Query(prefix="01f", before="01f-bb-5678abcd"))) == ["01f-aa-1234abcd"]

    async def test_a_query_asks_for_queues_keys_and_times(self, persister: Persister) -> None:
        """Alone and together with the others. Times are wall clocks; the moment itself is not before it."""
        await persister.create(new("a", created_at=10.0, queue="gpu", key="ka"))
        await persister.create(new("b", created_at=20.0))
        await persister.create(new("c", created_at=30.0, queue="gpu", tags=("t",)))
        touched = (await persister.load("b")).updated_at
        for query, expected in (
            (Query(queue="gpu"), ["c", "a"]),
            (Query(queue="default"), ["b"]),
            (Query(queue="gpu", tag="t", unfinished=True), ["c"]),
            (Query(queue="nobody"), []),
            (Query(key="ka"), ["a"]),
            (Query(key="ka", queue="default"), []),
            (Query(created_before=20.0), ["a"]),
            (Query(created_before=20.5, states=("created", "running")), ["b", "a"]),
            (Query(updated_before=touched, created_before=25.0), ["a"]),
            (Query(updated_before=touched + 1e9), ["c", "b", "a"]),
            (Query(updated_before=0.0), []),
        ):
            assert self.pids(await persister.query(query)) == expected, query

    async def test_a_query_goes_page_by_page(self, persister: Persister) -> None:
        """`before` continues after the last pid of a page, also for several states at once."""
        for i in range(7):
            claim = await self.started(persister, f"p{i}")
            await persister.save(save_of(claim, ("finished", "running", "killed")[i % 3]))
        found: list[str] = []
        states = ("finished", "killed")
        while page := await persister.query(Query(states=states, limit=2, before=found[-1] if found else None)):
            assert len(page) <= 2
            found += self.pids(page)
        assert found == ["p6", "p5", "p3", "p2", "p0"]

    async def test_a_query_has_a_bound(self, persister: Persister) -> None:
        """No more than `QUERY_LIMIT`, and at least one."""
        for limit in (0, QUERY_LIMIT + 1):
            with pytest.raises(ValueError, match="1 to"):
                await persister.query(Query(limit=limit))

    async def test_the_history_tells_all_in_order(self, persister: Persister) -> None:
        """Claims and the events of saves, numbered from 1, with who made them."""
        claim = await self.started(persister)
        await persister.save(
            save_of(
                claim,
                events=(Event(subject="created.running", at=3.0, step="run", note="n"), Event(subject="x", at=4.0)),
            )
        )
        events = await persister.history("p")
        assert [(event.seq, event.subject, event.at, event.by) for event in events] == [
            (1, "claimed", 2.0, "w"),
            (2, "created.running", 3.0, "w"),
            (3, "x", 4.0, "w"),
        ]
        assert (events[1].step, events[1].note) == ("run", "n")
        assert await persister.history("p", after=1) == events[1:]
        assert await persister.history("p", after=3) == []

    async def test_large_and_odd_bytes_come_back(self, persister: Persister) -> None:
        """A checkpoint is opaque: a megabyte of anything, and nothing at all."""
        data = bytes(range(256)) * 4096
        claim = await self.started(persister, checkpoint=b"")
        assert claim.record.checkpoint == b""
        await persister.save(save_of(claim, checkpoint=data))
        assert (await persister.load("p")).checkpoint == data

    # --- from one store to another ------------------------------------------------------------------

    async def copy_of(self, persister: Persister, pid: str) -> list[Portion]:
        """All portions of a process."""
        portions = [await persister.export(pid)]
        while (after := portions[-1].next) is not None:
            portions.append(await persister.export(pid, after))
        return portions

    async def adopted(self, persister: Persister, *portions: Portion, skip_existing: bool = False) -> Adopted:
        """They arrive one by one, and are adopted."""
        for number, portion in enumerate(portions):
            await persister.stage("ship", number, [portion])
        return await persister.adopt("ship", len(portions), "far", skip_existing=skip_existing)

    def renamed(self, portions: Sequence[Portion], pid: str, **changes: Any) -> list[Portion]:
        """A copy as that of another process."""
        replace = msgspec.structs.replace
        first, *others = portions
        assert first.kept is not None
        kept = replace(first.kept, record=replace(first.kept.record, **{"key": None, **changes, "pid": pid}))
        return [replace(first, pid=pid, kept=kept), *(replace(portion, pid=pid) for portion in others)]

    async def test_an_ended_process_comes_back_from_its_copy(self, persister: Persister) -> None:
        """Row, checkpoint, result, history, log, past checkpoints, answers; its history says from where."""
        claim = await self.started(persister, tags=("b", "a"), key="k", queue="gpu", priority=3, resources={"gpu": 1})
        await persister.post("p", b"letter")
        lines = (LogLine(at=1.0, text="said", source="me", step="run"),)
        replies = (Reply(1, b"answer"),)
        await persister.save(save_of(claim, keep_as="run", lines=lines, inbox_done=1, replies=replies, status="s"))
        events = (Event(subject="running.finished", at=3.0, step="run", note="n"),)
        await persister.save(save_of(claim, "finished", checkpoint=b"last", events=events))
        before = await persister.load("p")
        history, log, past = [await persister.history("p"), await persister.log("p"), await persister.past("p")]
        copy = await self.copy_of(persister, "p")
        assert await persister.load("p") == before
        await persister.delete("p")

        assert await self.adopted(persister, *copy) == Adopted(pids=("p",))
        after = await persister.load("p")
        assert after == msgspec.structs.replace(before, epoch=after.epoch)
        imported = (await persister.history("p"))[-1]
        assert (imported.subject, imported.note) == ("imported", "from far")
        assert [await persister.history("p"), await persister.log("p"), await persister.past("p")] == [
            [*history, imported],
            log,
            past,
        ]
        assert await persister.past_checkpoint("p", past[0].seq) == b"next"
        assert await persister.reply("p", 1) == b"answer"
        assert self.pids(await persister.query(Query(tag="a", queue="gpu", key="k", states=("finished",)))) == ["p"]

    async def test_an_excepted_copy_can_be_revived(self, persister: Persister) -> None:
        """From its last good checkpoint, in the state of that."""
        claim = await self.started(persister)
        await persister.save(save_of(claim, "running", checkpoint=b"good"))
        await persister.save(save_of(claim, "excepted", checkpoint=None))
        copy = await self.copy_of(persister, "p")
        await persister.delete("p")
        await self.adopted(persister, *copy)
        assert (await persister.revive("p")).state == "running"
        assert (await persister.claim("p", "w", at=9.0)).record.checkpoint == b"good"

    async def test_a_living_copy_goes_on(self, persister: Persister) -> None:
        """Whoever claims it gets its letters, its mail and the results of those that it waits for, and numbers go on
        where they were. It can be stepped though nothing has happened: somebody has to look at its waits."""
        await self.ended(persister, "child")
        await persister.create(new("other"))
        claim = await self.started(persister, play="playing")
        await persister.send("p", "used", b"1", at=1.0)
        await persister.send("p", "open", b"2", at=2.0, sender="me")
        await persister.post("p", b"dealt with")
        await persister.post("p", b"letter")
        waiting = save_of(
            claim,
            "waiting",
            waits=(("child", "other"),),
            names=("open",),
            listens=("open",),
            wake_at=4e9,
            consumed=(1,),
            inbox_done=1,
            keep_as="step",
        )
        await persister.save(waiting)
        copy = self.renamed(await self.copy_of(persister, "p"), "q")
        assert await self.adopted(persister, *copy) == Adopted(pids=("q",))
        row = await persister.load("q")
        assert (row.state, row.owner, row.waits, row.wake_at, row.names) == (
            "waiting",
            None,
            ("other",),
            4e9,
            ("open",),
        )
        assert (row.mail, row.inbox_done, row.inbox_last) == (1, 1, 2)
        claimed = await persister.claim("q", "v", at=9.0)
        assert claimed.inbox == (Letter(2, b"letter"),)
        assert claimed.mail == (Mail(2, "open", b"2", 2.0, "me"),)
        assert claimed.results == {"child": b"finished"}
        assert (await persister.post("q", b"new")).seq == 3
        assert (await persister.send("q", "open", b"3", at=3.0)).seq == 3
        assert (await persister.save(save_of(claimed, keep_as="more"))).seq == row.seq + 1
        assert [event.seq for event in await persister.history("q")] == [1, 2, 3]
        with pytest.raises(InvalidStateError):
            await persister.delete("other")

    async def test_a_large_process_is_copied_in_portions(self, persister: Persister) -> None:
        """Each of them is small unless one thing alone is large, and together they are all."""
        large = bytes(PORTION_BYTES // 2)
        claim = await self.started(persister, checkpoint=large)
        for number in range(4):
            await persister.send("p", "m", large, at=float(number))
        for number in range(3):
            await persister.save(save_of(claim, checkpoint=large, keep_as=f"step {number}"))
        await persister.save(save_of(claim, checkpoint=large * 3, keep_as="large"))
        copy = await self.copy_of(persister, "p")
        assert len(copy) > 5
        for portion in copy:
            items = len(portion.mail) + len(portion.steps) + (portion.kept is not None)
            assert len(msgspec.msgpack.encode(portion)) < PORTION_BYTES + 1000 or items == 1
        await self.adopted(persister, *self.renamed(copy, "q", play="paused"))
        assert (await persister.load("q")).mail == 4
        past = await persister.past("q")
        assert [each.step for each in past] == ["step 0", "step 1", "step 2", "large"]
        assert await persister.past_checkpoint("q", past[-1].seq) == large * 3

    async def test_a_copy_whose_mail_was_consumed_meanwhile_is_begun_again(self, persister: Persister) -> None:
        """Its checkpoint is from before that; `BusyError`. What is only added later is no harm."""
        large = bytes(PORTION_BYTES)
        claim = await self.started(persister)
        for number in range(3):
            await persister.send("p", "m", large, at=float(number))
        first = await persister.export("p")
        await persister.send("p", "m", large, at=9.0)
        assert (await persister.export("p", first.next)).mail
        await persister.save(save_of(claim, consumed=(1,)))
        with pytest.raises(BusyError, match=r"\bp\b"):
            await persister.export("p", first.next)

    async def test_all_that_arrives_is_there_or_none(self, persister: Persister) -> None:
        """Nothing is to be seen of what is staged, nor of what was refused, whatever the reason."""
        await self.ended(persister, "here", key="ours")
        await persister.create(new("lives"))
        await persister.save(save_of(await persister.claim("lives", "w", at=2.0), "waiting", waits=(("here",),)))
        good = self.renamed(await self.copy_of(persister, "here"), "good")
        other = self.renamed(await self.copy_of(persister, "here"), "other")
        waits = self.renamed(await self.copy_of(persister, "lives"), "waits")
        assert waits[0].kept is not None
        stray = msgspec.structs.replace(waits[0], kept=msgspec.structs.replace(waits[0].kept, groups=(("nobody",),)))
        before = self.pids(await persister.query(Query()))
        wrong: list[tuple[list[Portion], str]] = [
            ([*good, *await self.copy_of(persister, "here")], "here"),
            ([*good, *self.renamed(await self.copy_of(persister, "here"), "x", key="ours")], "ours"),
            ([*good, *good], "good"),
            ([*good, stray], "nobody"),
            ([*good, *self.renamed(good, "x", state="asleep")], "x"),
            ([*good, *self.renamed(good, "x", result=None)], "x"),
            ([*good, *self.renamed(waits, "x", play="pausing")], "x"),
            ([*good, *self.renamed(good, "x", priority=77)], "priority"),
            ([*good, msgspec.structs.replace(other[0], kept=None)], "other"),
        ]
        for portions, named in wrong:
            with pytest.raises(ArchiveError, match=rf"\b{named}\b"):
                await self.adopted(persister, *portions)
            assert self.pids(await persister.query(Query())) == before
        await persister.stage("half", 1, other)
        with pytest.raises(ArchiveError, match=r"\b2\b"):
            await persister.adopt("half", 2, "far")
        assert await self.adopted(persister, *good) == Adopted(pids=("good",))
        assert await self.adopted(persister, *other, *good, skip_existing=True) == Adopted(
            pids=("other",), skipped=("good",)
        )

    async def test_what_comes_from_elsewhere_is_old_enough_to_be_forgotten_later(self, persister: Persister) -> None:
        """It ends now, for whoever forgets what has ended long ago; people still see when it did."""
        await self.ended(persister, "p")
        copy = self.renamed(await self.copy_of(persister, "p"), "q", updated_at=5.0)
        await self.adopted(persister, *copy)
        assert (await persister.load("q")).updated_at == 5.0
        assert await persister.prune(Query(updated_before=6.0)) == 0

    @staticmethod
    def pids(records: Sequence[Record]) -> list[str]:
        return [record.pid for record in records]
