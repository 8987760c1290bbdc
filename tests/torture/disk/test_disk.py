"""The small dose of what a disk can do: power cuts, failing calls, no space (``make torture`` has the large one)."""

from __future__ import annotations

import random

import pytest

from tests.torture.batch import Batch, CanNotRunError
from tests.torture.disk import io_errors, power_cuts, small_disk
from tests.torture.disk.power_cuts import SECTOR, Disk, Operation

SEED = 3
STATES = 300
PAGE = bytes(range(256)) * 8


def cut(seed: int, states: int, synchronous: str = "") -> Batch:
    try:
        return power_cuts.run(seed, states, synchronous)
    except CanNotRunError as error:
        pytest.skip(str(error))


@pytest.mark.timeout(110)
def test_no_power_cut_takes_back_what_was_confirmed() -> None:
    """Whatever the disk keeps of what was not synchronised: the broker starts, and all that was said holds."""
    batch = cut(SEED, STATES)
    assert batch.failures == (), f"seed {SEED}"
    assert batch.done == STATES
    assert batch.counts["of these synchronisations"] > 10


@pytest.mark.timeout(60)
@pytest.mark.parametrize("synchronous", ["NORMAL", "OFF"])
def test_the_rig_sees_a_missing_synchronisation(synchronous: str) -> None:
    """With less than FULL the same states show loss: nobody may turn it off unseen."""
    assert cut(SEED, 60, synchronous).counts["bad states"] > 10


@pytest.mark.timeout(90)
def test_every_call_that_fails_is_survived_or_said() -> None:
    """EIO at each write and at each synchronisation of a short run, until one ends without."""
    try:
        batch = io_errors.run(SEED, 2, (("w", "i", False), ("s", "i", False)))
    except CanNotRunError as error:
        pytest.skip(str(error))
    assert batch.failures == (), f"seed {SEED}"
    assert batch.done > 50
    assert batch.counts["ended with an error of ours"] > 30


@pytest.mark.timeout(90)
def test_a_file_system_of_one_mebibyte() -> None:
    """Full before the first task, and full in the middle of a commit: nothing is lost, and with space it goes on."""
    try:
        batch = small_disk.run(SEED, 1)
    except CanNotRunError as error:
        pytest.skip(str(error))
    assert batch.failures == ()
    assert batch.done == 2


# --- the model of a disk ----------------------------------------------------------------------------

DB = "prunus.db"


def states(*operations: Operation, name: str = DB) -> set[bytes | None]:
    """All that a cut may leave of a file, as far as 300 seeds find it."""
    disk = Disk()
    for operation in operations:
        disk.apply(operation)
    return {disk.state(random.Random(seed)).get(name) for seed in range(300)}


def write(offset: int, data: bytes) -> Operation:
    return Operation("w", DB, offset, data)


CREATE, SYNC, REMOVE = (Operation(kind, DB, 0, b"") for kind in "csu")
FOLDER = Operation("d", "/", 0, b"")


def test_what_was_synchronised_stays() -> None:
    """Whatever else happens to the file."""
    assert states(CREATE, write(0, b"ab"), SYNC) == {b"ab"}
    assert states(CREATE, write(0, b"ab"), SYNC, write(1, b"x")) == {b"ab", b"ax"}


def test_what_was_not_may_be_there_in_any_combination() -> None:
    """The later one without the earlier one, too; a hole reads as zeros."""
    found = states(CREATE, SYNC, write(0, b"a"), write(1, b"b"))
    assert found == {b"", b"a", b"ab", b"\0b"}


def test_a_write_may_reach_the_disk_in_part() -> None:
    """By sectors, as disks write them."""
    found = {state for state in states(CREATE, SYNC, write(0, PAGE)) if state}
    assert PAGE in found
    assert bytes(SECTOR) + PAGE[SECTOR : 2 * SECTOR] in found
    for state in found:
        for place in range(0, len(state), SECTOR):
            assert state[place : place + SECTOR] in (PAGE[place : place + SECTOR], bytes(SECTOR))


def test_names_are_certain_only_when_their_folder_is() -> None:
    """A new file may be missing until then, a removed one may be back."""
    assert None in states(CREATE, write(0, b"ab"))
    assert None not in states(CREATE, write(0, b"ab"), FOLDER)
    assert states(CREATE, write(0, b"ab"), SYNC, REMOVE) == {b"ab", None}
    assert states(CREATE, write(0, b"ab"), SYNC, REMOVE, FOLDER) == {None}
