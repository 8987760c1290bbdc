"""A file system of 1 MiB, really full, in a mount namespace of its own: nobody else sees it.

Once with a broker that looks at the free space: it comes up, says that there is none, refuses what would change
something and answers the rest; with more space it works. Once with one that does not look, so that SQLite finds the end
of the disk in the middle of a commit: that ends it with a sentence, and the next one finds all that was confirmed.

As a program, inside the namespace: ``small_disk FOLDER SEED`` prints a `Batch`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from prunus.errors import PersistenceError, PrunusError, StoreFullError
from prunus.messaging.communicator import Communicator
from prunus.messaging.connecting import connect_to
from prunus.messaging.exchange import BrokerStoppedError
from prunus.runtime.broker import DiskGuard, Space
from prunus.runtime.profile import Config, Profile
from tests.torture.batch import Batch, CanNotRunError, environment
from tests.torture.disk.script import SAID, Script, judge_copy

SIZE, MORE = "1m", "64m"
MANY_STEPS = 10_000
"""More than there is room for."""
AFTERWARDS = 20
PATIENCE_S = 20.0


class BlindGuard(DiskGuard):
    """Believes that there is always room."""

    def is_scarce(self, size: int, now: float) -> bool:
        return False

    def room_for(self, size: int, now: float) -> Space:
        return Space.NEW_WORK


def resize(folder: Path, size: str, *, new: bool = False) -> None:
    """Mount a file system of this size, or give the one that is there this size."""
    options = f"size={size},mode=0700" if new else f"remount,size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)


def in_the_middle_of_a_commit(folder: Path, outside: Path, seed: int) -> list[str]:
    """A broker that does not look at the space."""
    (folder / SAID).symlink_to(outside / SAID)  # what was said must be known, full disk or not
    script = Script(folder, seed, guard=BlindGuard)
    try:
        script.run(MANY_STEPS)
    except BrokerStoppedError as error:
        failures = [] if error.full else [f"it does not say that the disk is full: {error}"]
    except StoreFullError:
        failures = []
    except PersistenceError as error:  # SQLite has no space for the files beside the database when it is opened
        failures = [] if "free some space" in str(error) else [f"it does not say what to do: {error}"]
    except Exception as error:
        failures = [f"not an error of ours: {error!r}"]
    else:
        failures = ["the disk was not full"]
    script.abandon()
    resize(folder, MORE)
    failures += judge_copy(folder)
    following = Script(folder, seed + 1)
    try:
        following.run(AFTERWARDS)
    except PrunusError as error:
        failures.append(f"it does not go on when there is space: {error}")
    following.abandon()
    return failures + judge_copy(folder)


def with_its_eyes_open(folder: Path, outside: Path, seed: int) -> list[str]:
    """A real broker process."""
    profile = Profile.create(folder / "p", Config(workers=0))
    command = [sys.executable, "-m", "prunus.runtime.broker", "--profile", str(profile.path)]
    broker = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)
    failures: list[str] = []
    try:
        asyncio.run(_refused_and_taken(folder, profile, broker, failures))
    finally:
        broker.terminate()
        _, said = broker.communicate(timeout=PATIENCE_S)
    if b"free some space" not in said:
        failures.append(f"it does not say what to do: {said.decode()}")
    if b"Traceback" in said:
        failures.append(f"it broke: {said.decode()}")
    return failures


async def _refused_and_taken(
    folder: Path, profile: Profile, broker: subprocess.Popen[bytes], failures: list[str]
) -> None:
    async with await connect_to(profile.endpoint, timeout_s=PATIENCE_S) as communicator:
        try:
            await communicator.task_send(b"work")
            failures.append("it took a task, though there is no room")
        except StoreFullError as error:
            if str(profile.database) not in str(error):
                failures.append(f"it does not name its disk: {error}")
        await _ask(communicator)
        resize(folder, MORE)
        give_up = time.monotonic() + PATIENCE_S
        while not await _taken(communicator):
            if time.monotonic() > give_up:
                failures.append("it takes nothing, though there is room now")
                break
    if broker.poll() is not None:
        failures.append(f"it ended, with the code {broker.returncode}")


async def _ask(communicator: Communicator) -> None:
    """Questions go on."""

    async def answer(body: bytes) -> bytes:
        return body

    subscription = await communicator.add_rpc_subscriber(answer, "echo")
    assert await communicator.rpc_send("echo", b"hello") == b"hello"
    await subscription.cancel()


async def _taken(communicator: Communicator) -> bool:
    try:
        await communicator.task_send(b"work")
    except StoreFullError:
        return False
    return True


def main(folder: Path, seed: int) -> Batch:
    failures: list[str] = []
    for attempt in (in_the_middle_of_a_commit, with_its_eyes_open):
        outside = Path(tempfile.mkdtemp(dir=folder))
        disk = outside / "d"
        disk.mkdir()
        resize(disk, SIZE, new=True)
        failures += [f"{attempt.__name__}: {failure}" for failure in attempt(disk, outside, seed)]
    return Batch.of(2, failures)


def run(seed: int, size: int) -> Batch:
    """`size` times both. Raises `CanNotRunError`."""
    unshare = shutil.which("unshare")
    if unshare is None:
        raise CanNotRunError("there is no program `unshare` here")
    space = [unshare, "--mount"] if os.getuid() == 0 else [unshare, "--mount", "--map-root-user"]
    can = subprocess.run([*space, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    if can.returncode:
        raise CanNotRunError(f"a file system can't be mounted here: {can.stderr.strip()}")
    total = Batch.of(0)
    for number in range(size):
        with tempfile.TemporaryDirectory(prefix="pr-") as folder:
            program = [sys.executable, "-m", "tests.torture.disk.small_disk", folder, str(seed + number)]
            said = subprocess.run([*space, *program], check=True, env=environment(), stdout=subprocess.PIPE)
            total += msgspec.json.decode(said.stdout, type=Batch)
    return total


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(main(Path(sys.argv[1]), int(sys.argv[2]))))
