"""The keeper of a broker: what keeps it from starting one, and when it tries again."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from prunus.runtime import foreground
from prunus.runtime.foreground import BrokerKeeper
from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Profile
from tests.runtime.stage import until


@pytest.fixture
def profile(short_folder: Path) -> Profile:
    return Profile.create(short_folder / "profile")


async def test_what_keeps_a_broker_from_starting_is_said_and_tried_again(
    profile: Profile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that refuses the log is no end of the looking after: as soon as it does not, the broker is started."""
    monkeypatch.setattr(foreground, "BROKER_PAUSE_S", (0.01, 0.01))
    monkeypatch.setattr(foreground, "LOOK_INTERVAL_S", 0.01)
    said: list[str] = []
    profile.log("broker").mkdir()
    keeper = BrokerKeeper(profile, said.append)
    keeping = asyncio.create_task(keeper.keep())
    try:
        await until(lambda: caplog.text.count("the broker can't be looked after") >= 2)
        assert not said
        profile.log("broker").rmdir()
        await until(lambda: keeping.done() or read_holder(profile.lock("broker")) is not None)
        assert len(said) == 1
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await keeper.leave()
    assert read_holder(profile.lock("broker")) is None


async def test_the_pause_grows_and_starts_over_after_a_healthy_while(
    profile: Profile, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that ends at once is tried less and less often; one that ran for long is started again soon."""

    class Clock:
        now = 1000.0

        def time(self) -> float:
            return self.now

    class Ended:
        """A broker that has ended at once."""

        pid, returncode = 4711, 1

        def poll(self) -> int:
            return 1

    clock = Clock()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    monkeypatch.setattr(foreground.subprocess, "Popen", lambda *args, **kwargs: Ended())
    caplog.set_level(logging.ERROR)
    keeper = BrokerKeeper(profile, lambda text: None)

    def pauses() -> list[str]:
        return [record.getMessage().split("again in ")[1].split(" s")[0] for record in caplog.records]

    for _ in range(8):
        keeper.look()  # starts it
        clock.now += 0.1
        keeper.look()  # sees that it has ended
        clock.now += 60.0
    assert pauses() == ["1", "2", "4", "8", "16", "32", "60", "60"]
    keeper.look()
    clock.now += 3600.0
    keeper.look()
    assert pauses()[-1] == "1"
