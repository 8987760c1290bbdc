"""The small dose of hostile input: 200,000 frames (``make torture`` has the large one)."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing

import msgspec
import pytest

from prunus.messaging.exchange import Exchange
from prunus.messaging.messages import (
    BroadcastSubscribe,
    Hello,
    Peer,
    TaskSend,
    decode_from_broker,
    decode_from_client,
    encode,
)
from tests.torture.batch import Batch
from tests.torture.fuzz import codec, exchange, sockets
from tests.torture.fuzz.exchange import digest, is_readable
from tests.torture.fuzz.frames import Frames

SEED = 11
DECODED, EXCHANGED, SAID = 120_000, 60_000, 10_000
"""Together, and with each door of a broker, 200,000."""


@pytest.mark.timeout(90)
def test_the_decoders_raise_protocol_errors_only() -> None:
    """Whatever the bytes are, and without much memory, whatever lengths they claim."""
    batch = codec.run(SEED, DECODED)
    assert batch.failures == (), f"seed {SEED}"
    assert batch.done == DECODED
    assert DECODED // 20 < batch.counts["could be read"] < DECODED // 2, "some get through, as they should"


@pytest.mark.timeout(90)
def test_what_an_exchange_refuses_changes_nothing() -> None:
    """No error but the answer to whoever said it; its core and its tables are what they were."""
    batch = exchange.run(SEED, EXCHANGED)
    assert batch.failures == (), f"seed {SEED}"
    assert batch.counts["refused"] > EXCHANGED // 2
    assert batch.counts["could be read"] > EXCHANGED // 10
    assert batch.counts["violations by messages"]


@pytest.mark.timeout(90)
@pytest.mark.parametrize("attack", [sockets.run_local, sockets.run_network], ids=["socket", "network"])
def test_a_broker_with_hostile_peers_serves_the_others(attack: Callable[[int, int], Batch]) -> None:
    """Nonsense at every layer, from two processes; honest clients at both doors get their answers, the memory stays
    small, and what was refused is counted."""
    batch = attack(SEED, SAID)
    assert batch.failures == (), f"seed {SEED}: {batch.counts}"
    assert batch.done >= SAID
    assert batch.counts["honest questions answered"]


@pytest.mark.timeout(90)
def test_a_hundred_peers_that_never_read_stop_nobody() -> None:
    """At each door fifty, each of which should hear more than its buffers hold; the others' questions are answered."""
    batch = sockets.run_deaf(SEED, 600)
    assert batch.failures == ()
    for door in (sockets.LOCAL, sockets.NETWORK):
        assert batch.counts[f"questions over {door} answered meanwhile"] == 31
    assert batch.counts["broadcasts missed"]


# --- the rig itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["client", "broker"])
def test_the_corpus_holds_every_message(side: str) -> None:
    """Of each type some that can be read, and the same seed makes the same frames."""
    frames, decode = Frames(SEED, side), decode_from_client if side == "client" else decode_from_broker
    found = {type(decode(frame)) for frame in frames._valid}
    assert len(found) == len(frames._types)
    again = Frames(SEED, side)
    assert [frames.next() for _ in range(1000)] == [again.next() for _ in range(1000)]


def test_frames_are_spoiled_in_many_ways() -> None:
    """Most can't be read, some can, and few are alike."""
    frames = Frames(SEED)
    some = [frames.next() for _ in range(3000)]
    assert 0.5 < sum(not is_readable(frame) for frame in some) / len(some) < 0.95
    assert len(set(some)) > 2000


@pytest.mark.parametrize(
    "message",
    [
        TaskSend(id=1, task="t", body=b"x"),
        BroadcastSubscribe(id=1, subscription=1),
        Hello(session="other", peer=Peer()),
        Hello(session="fuzz", peer=Peer(), queues=(("default", 1),)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_the_digest_sees_a_change(message: msgspec.Struct) -> None:
    """In a table or in memory alone."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        one: Exchange[str] = Exchange(connection)
        one.process(0.0, [("route", encode(Hello(session="fuzz", peer=Peer())))])
        before = digest(one, connection)
        assert digest(one, connection) == before
        one.process(0.0, [("other" if isinstance(message, Hello) else "route", encode(message))])  # type: ignore[arg-type]
        assert digest(one, connection) != before
