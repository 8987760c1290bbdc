"""Every write and every synchronisation of a run fails once: what was confirmed stays, and the broker says so.

For each kind of call and of failure the script runs again and again, with the first, the second, the third ... call
failing (that one alone, or all from there on), until it ends without having met a failure. After each run

- it has ended by itself, or with an error of ours that says what happened (`PrunusError`), and with nothing else;
- a broker that starts on what is there finds all that was confirmed (`script.judge`), and goes on from there.

There is no chance in the failures, since each call has its turn, and a complaint names the call. The seed decides the
script.

As a program, with the shim: ``io_errors FOLDER SEED STEPS SWEEP...`` prints a `Batch`.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from prunus.errors import PrunusError
from tests.torture.batch import Batch
from tests.torture.disk.power_cuts import FAST_FOLDERS
from tests.torture.disk.script import Script, judge_copy
from tests.torture.disk.shim import Call, How, Shim, build, environment_with

Sweep = tuple[Call, How, bool]
SWEEPS: tuple[Sweep, ...] = (
    ("w", "i", False),
    ("w", "i", True),
    ("w", "n", False),
    ("w", "n", True),
    ("w", "h", False),
    ("w", "h", True),
    ("s", "i", False),
    ("s", "i", True),
    ("s", "n", False),
)
NAMES = {"w": "write", "s": "sync", "i": "EIO", "n": "ENOSPC", "h": "half of it, then ENOSPC"}
MAX_CALLS = 100_000
"""No script has more; one that never ends would be a mistake of this rig."""
AFTERWARDS = 5
"""Steps that the next broker has to do."""


class _Ended(msgspec.Struct):
    """What the process that ran the script says."""

    failed: int
    """Calls that were made to fail."""
    said: str = ""
    """The error of ours with which it ended."""
    strange: str = ""
    """Any other."""


def sweep(folder: Path, shim: Shim, seed: int, steps: int, sweeps: Iterable[Sweep]) -> Batch:
    """All of `sweeps`, in children of this process. Of complaints that are alike the first one is kept."""
    total = Batch.of(0)
    known: set[str] = set()
    for kind in sweeps:
        for number in range(1, MAX_CALLS):
            work = folder / "run"
            work.mkdir()
            ended = _in_a_child(functools.partial(_attempt, work, shim, seed, steps, kind, number))
            complaints = _complaints(work, ended, seed)
            failures = [f"{_named(kind, number)}: {one}" for one in complaints if one not in known]
            known.update(complaints)
            shutil.rmtree(work)
            counts = {"ended with an error of ours": 1 if ended.said else 0, "complaints": len(complaints)}
            total += Batch.of(1, failures, counts)
            if not ended.failed:
                break
    return total


def _named(sweep: Sweep, number: int) -> str:
    call, how, lasting = sweep
    return f"{NAMES[how]} at {NAMES[call]} {number}{' and all later ones' if lasting else ''}"


def _attempt(work: Path, shim: Shim, seed: int, steps: int, sweep: Sweep, number: int) -> _Ended:
    call, how, lasting = sweep
    shim.fail(work, call, how, number, lasting)
    said = strange = ""
    try:
        Script(work, seed).run(steps)
    except PrunusError as error:
        said = str(error)
    except Exception as error:
        strange = " ".join(traceback.format_exception(error)[-2:])
    return _Ended(shim.failed, said, strange)


def _in_a_child(work: Callable[[], _Ended]) -> _Ended:
    """Run it in a process of its own, which ends without any tidying: a script that failed leaves all as it is."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        ended = _Ended(0, strange="it did not come to an end")
        try:
            ended = work()
        finally:
            os.write(write, msgspec.json.encode(ended))
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return msgspec.json.decode(answer, type=_Ended)


def _complaints(work: Path, ended: _Ended, seed: int) -> list[str]:
    complaints = [f"not an error of ours: {ended.strange}"] if ended.strange else []
    complaints += judge_copy(work)
    try:
        following = Script(work, seed + 1)
        following.run(AFTERWARDS)
    except Exception as error:
        complaints.append(f"the next broker does not go on: {error!r}")
    else:
        following.abandon()
        complaints += [f"afterwards: {one}" for one in judge_copy(work)]
    return complaints


def run(seed: int, size: int, sweeps: Iterable[Sweep] = SWEEPS) -> Batch:
    """Scripts of `size` steps, in a program with the shim. Raises `CanNotRunError`."""
    parent = next(folder for folder in FAST_FOLDERS if folder is None or Path(folder).is_dir())
    with tempfile.TemporaryDirectory(prefix="pr-", dir=parent) as folder:
        command = [sys.executable, "-m", "tests.torture.disk.io_errors", folder, str(seed), str(size)]
        command += [str(SWEEPS.index(sweep)) for sweep in sweeps]
        variables = environment_with(build(Path(folder)))
        said = subprocess.run(command, check=True, env=variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return msgspec.json.decode(said.stdout, type=Batch)


if __name__ == "__main__":
    where, seed, steps, *chosen = sys.argv[1:]
    batch = sweep(Path(where), Shim(), int(seed), int(steps), [SWEEPS[int(number)] for number in chosen])
    sys.stdout.buffer.write(msgspec.json.encode(batch))
