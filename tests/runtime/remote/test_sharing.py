"""The decisions about a shared connection, in virtual time."""

from __future__ import annotations

import itertools
import random

import pytest

from prunus.runtime.remote.sharing import Close, GiveUp, Grant, Limits, LookAgain, Open, Share, decide

LIMITS = Limits(safe_interval_s=10, idle_s=30, max_users=2, initial_interval_s=4, max_attempts=3, jitter=0)


def test_nobody_asks_for_nothing() -> None:
    """Without anybody who waits no connection is opened."""
    assert decide(Share(), LIMITS, 100) is None


def test_the_first_who_asks_gets_it_opened_at_once() -> None:
    """The safe interval is one between two openings."""
    assert decide(Share(waiting=1), LIMITS, 0) == Open()


def test_the_next_opening_waits_for_the_safe_interval() -> None:
    """It counts from the beginning of the one before, however that ended."""
    share = Share(waiting=3, began_opening_s=100)
    assert decide(share, LIMITS, 109.9) == LookAgain(110)
    assert decide(share, LIMITS, 110) == Open()


def test_all_share_one_opening() -> None:
    """While one is under way there is nothing to decide."""
    assert decide(Share(waiting=5, is_opening=True), LIMITS, 0) is None


def test_an_open_connection_has_so_many_users() -> None:
    """The rest wait until one leaves."""
    assert decide(Share(waiting=5, is_open=True), LIMITS, 0) == Grant(2)
    assert decide(Share(waiting=3, users=2, is_open=True), LIMITS, 0) is None
    assert decide(Share(waiting=3, users=1, is_open=True), LIMITS, 0) == Grant(1)
    assert decide(Share(waiting=3, users=7, is_open=True), Limits(), 0) == Grant(3)


def test_an_idle_connection_is_closed_in_time() -> None:
    """From the moment at which the last user left."""
    share = Share(is_open=True, idle_since_s=100)
    assert decide(share, LIMITS, 129) == LookAgain(130)
    assert decide(share, LIMITS, 130) == Close()


def test_a_broken_connection_serves_nobody() -> None:
    """It is forgotten although others still hold it, and a new one is opened for those who wait."""
    share = Share(waiting=1, users=1, is_open=True, is_broken=True)
    assert decide(share, LIMITS, 0) == Close()
    assert decide(Share(waiting=1), LIMITS, 0) == Open()


def test_failures_are_followed_by_longer_and_longer_pauses() -> None:
    """Up to a longest one, spread by the jitter."""
    limits = Limits(initial_interval_s=4, backoff=3, max_interval_s=30, jitter=0.5)
    assert [limits.delay_s(failures, 0.5) for failures in (1, 2, 3, 4000)] == [4, 12, 30, 30]
    assert (limits.delay_s(1, 0.0), limits.delay_s(1, 1.0)) == (2, 6)
    assert decide(Share(waiting=1, failures=1, try_again_s=50), LIMITS, 49) == LookAgain(50)
    assert decide(Share(waiting=1, failures=1, try_again_s=50), LIMITS, 50) == Open()


def test_after_so_many_failures_all_are_told() -> None:
    """And at once if there is no hope."""
    assert decide(Share(waiting=9, failures=3), LIMITS, 0) == GiveUp()
    assert decide(Share(waiting=9, failures=1, is_hopeless=True), LIMITS, 0) == GiveUp()
    assert decide(Share(waiting=0, failures=3), LIMITS, 0) is None


@pytest.mark.parametrize("seed", range(20))
def test_in_any_history_the_rules_hold(seed: int) -> None:
    """Random users and failures, for hours: openings keep their distance, nobody is over the cap, all are served."""
    chance = random.Random(seed)
    share, now_s, opened_s = Share(), 0.0, [-1000.0]
    asked = served = told = 0
    for _ in itertools.repeat(None, 3000):
        now_s += chance.choice((0.0, 0.5, 3.0, 40.0))
        match chance.randrange(6):
            case 0 | 1:
                share.waiting, asked = share.waiting + 1, asked + 1
            case 2 if share.users:
                share.users, share.idle_since_s = share.users - 1, now_s
            case 3 if share.is_opening:
                share.is_opening = False
                if chance.random() < 0.5:
                    share.is_open, share.failures, share.idle_since_s = True, 0, now_s
                else:
                    share.failures += 1
                    share.try_again_s = now_s + LIMITS.delay_s(share.failures, chance.random())
            case 4 if share.is_open and chance.random() < 0.1:
                share.is_broken = True
        while True:
            match decide(share, LIMITS, now_s):
                case Open():
                    assert not share.is_open
                    assert not share.is_opening
                    assert now_s - opened_s[-1] >= LIMITS.safe_interval_s
                    opened_s.append(now_s)
                    share.is_opening, share.began_opening_s = True, now_s
                case Grant(number):
                    assert share.is_open
                    assert not share.is_broken
                    share.waiting, share.users, served = share.waiting - number, share.users + number, served + number
                    assert share.users <= 2
                case Close():
                    assert share.is_broken or not share.users
                    share.is_open, share.is_broken, share.users = False, False, 0
                case GiveUp():
                    told, share.waiting, share.failures = told + share.waiting, 0, 0
                case LookAgain(at_s):
                    assert at_s > now_s
                    break
                case None:
                    break
    assert asked == served + told + share.waiting
    assert served
    assert told
