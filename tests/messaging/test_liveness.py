"""The proof that a process died."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from prunus.messaging.liveness import Obituaries, boottime, this_peer
from prunus.messaging.messages import Peer


@pytest.fixture
def obituaries() -> Iterator[Obituaries]:
    obituaries = Obituaries()
    yield obituaries
    obituaries.close()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def peer_of(child: subprocess.Popen[bytes]) -> Peer:
    stat = Path(f"/proc/{child.pid}/stat").read_text()
    return Peer(this_peer().host, child.pid, int(stat.rpartition(")")[2].split()[19]))


def test_this_process_is_alive(obituaries: Obituaries) -> None:
    """It knows its own number, start and host, and nobody says that it is dead."""
    peer = this_peer()
    assert peer.pid == os.getpid()
    assert peer.host
    assert peer.started > 0
    obituaries.watch("me", peer)
    assert obituaries.dead() == []


def test_a_death_is_told_at_once(obituaries: Obituaries, child: subprocess.Popen[bytes]) -> None:
    """The descriptor becomes readable when a watched process ends, also before anybody waited for it."""
    obituaries.watch("child", peer_of(child))
    assert obituaries.dead() == []
    child.kill()
    descriptor = obituaries.fileno()
    assert descriptor is not None
    assert select.select([descriptor], [], [], 10)[0]
    assert obituaries.dead() == ["child"]
    assert obituaries.dead() == []


def test_the_forgotten_are_not_told(obituaries: Obituaries, child: subprocess.Popen[bytes]) -> None:
    """After `forget` a death is nobody's business."""
    obituaries.watch("child", peer_of(child))
    obituaries.forget("child")
    child.kill()
    child.wait()
    assert obituaries.dead() == []


def test_who_is_dead_already_is_told(obituaries: Obituaries, child: subprocess.Popen[bytes]) -> None:
    """Watching a process that ended, or whose number belongs to a later one, reports it at once."""
    peer = peer_of(child)
    obituaries.watch("reused", msgspec.structs.replace(peer, started=peer.started + 1))
    child.kill()
    child.wait()
    obituaries.watch("child", peer)
    assert sorted(obituaries.dead()) == ["child", "reused"]


def test_of_strangers_nothing_is_claimed(obituaries: Obituaries) -> None:
    """Another host, or an unknown one, can't be judged from here."""
    obituaries.watch("far", Peer("another host", 1, 1))
    obituaries.watch("unknown", Peer())
    assert obituaries.dead() == []


def test_the_clock_of_leases_goes_on_in_sleep() -> None:
    """Silence is measured by a clock that counts the time for which the machine was suspended, and that nobody sets."""
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    now = boottime()
    assert before <= now <= time.clock_gettime(time.CLOCK_BOOTTIME)
