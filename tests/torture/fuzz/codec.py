"""Hostile frames against the decoders: a message or a `ProtocolError`, and never much memory.

As a program: ``codec SEED SIZE`` limits its own memory and prints a `Batch`.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import msgspec

from prunus.errors import ProtocolError
from prunus.messaging.messages import decode_from_broker, decode_from_client
from tests.torture.batch import Batch, environment
from tests.torture.fuzz.frames import Frames

MORE_MEMORY_BYTES = 512 * 1024 * 1024
"""Of address space, beyond what the program has at its start. An allocation that a length in a frame asks for (up to
4 GiB) fails there, and that is seen."""
MAX_GROWTH_BYTES = 128 * 1024 * 1024
"""Of memory that is really used: a few times the largest frame."""


def fuzz(seed: int, size: int) -> Batch:
    """`size` frames, half of them for each side."""
    before = memory_bytes()
    failures, read = [], 0
    for side, decode, share in (
        ("client", decode_from_client, size - size // 2),
        ("broker", decode_from_broker, size // 2),
    ):
        frames = Frames(seed, side)
        for number in range(share):
            frame = frames.next()
            try:
                decode(frame)
            except ProtocolError:
                continue
            except BaseException as error:  # MemoryError, too
                failures.append(f"frame {number} from the {side}: {error!r}; it was {frame[:100].hex()}")
            else:
                read += 1
    growth = memory_bytes() - before
    if growth > MAX_GROWTH_BYTES:
        failures.append(f"the memory grew by {growth >> 20} MiB")
    return Batch.of(size, failures, {"could be read": read}, {"memory grew by MiB": growth / 2**20})


def memory_bytes() -> int:
    """The most that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory() -> None:
    """From here on this process gets `MORE_MEMORY_BYTES`, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def in_a_program(module: str, seed: int, size: int) -> Batch:
    """What ``module SEED SIZE`` prints."""
    command = [sys.executable, "-m", module, str(seed), str(size)]
    said = subprocess.run(command, check=True, env=environment(), stdout=subprocess.PIPE)
    return msgspec.json.decode(said.stdout, type=Batch)


def run(seed: int, size: int) -> Batch:
    return in_a_program("tests.torture.fuzz.codec", seed, size)


if __name__ == "__main__":
    limit_memory()
    sys.stdout.buffer.write(msgspec.json.encode(fuzz(int(sys.argv[1]), int(sys.argv[2]))))
