"""Names of processes: UUIDs of version 7 (RFC 9562), so that they sort by the time of their creation.

`pid_from` is pure; `new_pid` reads the clock and the system's randomness. Within one Python process each pid is
greater than the one before, also when the clock stands still or goes back.
"""

from __future__ import annotations

import os
import random
import threading
import time

RANDOM_BITS = 74
_STEP_BITS = 32


def new_pid() -> str:
    """A new pid."""
    global _last
    with _lock:
        _last = advance(_last, time.time_ns() // 1_000_000, _chance.getrandbits(RANDOM_BITS))
        return pid_from(_last)


def advance(last: int, now_ms: int, randomness: int) -> int:
    """The number (48 bits of time in ms, 74 random bits) that comes after `last` at `now_ms`."""
    number = (now_ms << RANDOM_BITS) | (randomness & ((1 << RANDOM_BITS) - 1))
    if number > last:
        return number
    return last + 1 + (randomness & ((1 << _STEP_BITS) - 1))


def pid_from(number: int) -> str:
    """The number of `advance` as the text of a UUID, with version and variant in their places."""
    time_ms, high, low = number >> RANDOM_BITS, (number >> 62) & 0xFFF, number & ((1 << 62) - 1)
    digits = (time_ms << 80 | 7 << 76 | high << 64 | 1 << 63 | low).to_bytes(16, "big").hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


_chance = random.Random()
"""Seeded by the system, also in a forked child. A pid is a name, and no secret."""
os.register_at_fork(after_in_child=_chance.seed)
_last = 0
_lock = threading.Lock()
