"""The small dose of the soak (``make torture`` has the large one), its judge, its plan, and how it sees a leak."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import pytest

from prunus.persistence.database import open_database
from prunus.persistence.persister import NewProcess
from prunus.persistence.sqlite import ProcessStore
from tests.torture.soak import leaks, services, soak
from tests.torture.soak.judge import End, Heard, Told, judge, missed_runs
from tests.torture.soak.plan import DEEDS_PER_S, LATE_STRIKES, STRIKES, plan_of

SEED = 7


@pytest.mark.timeout(180)
def test_twenty_seconds_of_a_daemon() -> None:
    """Everything that can strike it strikes once, and in the end all is accounted for and nothing is left."""
    batch = soak.run(SEED, 20)
    assert batch.failures == (), f"seed {SEED}: {batch.counts}"
    for strike in {*STRIKES, *LATE_STRIKES}:
        assert batch.counts[f"strikes: {strike}"], strike
    for what in ("processes: finished", "processes: killed", "processes: excepted", "commits looked at"):
        assert batch.counts[what], f"{what}: there were none, so nothing was shown; {batch.counts}"
    assert batch.counts["services watched for leaks"] == 3


# --- the plan -----------------------------------------------------------------------------------------


def test_one_seed_is_one_plan() -> None:
    """Another seed is another one."""
    assert plan_of(1, 60.0) == plan_of(1, 60.0)
    assert plan_of(1, 60.0) != plan_of(2, 60.0)


@pytest.mark.parametrize("seconds", [20.0, 600.0])
def test_every_plan_has_everything(seconds: float) -> None:
    """Each strike, the shortest plan too; in the second half none falls on what is watched there."""
    plan = plan_of(SEED, seconds)
    early = {strike.what for strike in plan.strikes if strike.at_s < seconds / 2}
    late = {strike.what for strike in plan.strikes if strike.at_s >= seconds / 2}
    assert early == set(STRIKES)
    assert late == set(LATE_STRIKES)
    for things in (plan.deeds, plan.strikes):
        times = [thing.at_s for thing in things]
        assert times == sorted(times)
        assert 0 <= times[0] <= times[-1] < seconds
    assert 0.5 < len(plan.deeds) / (DEEDS_PER_S * seconds) < 2


# --- the judge ----------------------------------------------------------------------------------------


def walk(launched: Heard = "ok", steps: int = 3, **more: object) -> Told:
    return Told(launched=launched, steps=steps, **more)  # type: ignore[arg-type]


def end(pid: str = "a", state: str = "finished", parent: str | None = None, **outputs: object) -> End:
    return End(pid, state, parent, {"taken": 3, **outputs} if state == "finished" else {})


GOOD = (end(),)


def test_a_good_end_is_accepted() -> None:
    """What may be: a kill that nobody heard of, a child of a killed one, a message that was used or was not."""
    sent: dict[int, list[tuple[str, Heard]]] = {1: [("1", "ok"), ("2", "unknown"), ("3", "ok"), ("4", "ok")]}
    told = {
        "a": walk(notes=sent, updates=[("x", "ok"), ("y", "refused"), ("z", "unknown")]),
        "b": walk(kills=["unknown"]),
        "c": walk(kills=["ok", "refused"]),
        "d": walk(fails=True),
        "e": walk("unknown"),
    }
    ends = [end("a", notes=["1", "3"], applied=["x"]), end("b"), end("c", "killed"), end("f", "killed", "c")]
    ends += [end("d", "excepted"), end("g", "finished", "a")]
    assert judge(told, ends, {"a": [1, 2, 2, 3], "g": []}) == []


@pytest.mark.parametrize(
    ("crime", "told", "ends"),
    [
        ("lost", walk(), []),
        ("doubled", walk(), [*GOOD, *GOOD]),
        ("invented: nobody launched", walk(), [*GOOD, end("b")]),
        ("refused, yet there", walk("refused"), GOOD),
        ("killed by nobody", walk(), [end(state="killed")]),
        ("killed by nobody: b", walk(), [*GOOD, end("b", "killed", "a")]),
        ("killed by nobody", walk(kills=["refused"]), [end(state="killed")]),
        ("answered as killed", walk(kills=["ok"]), GOOD),
        ("excepted without a reason", walk(), [end(state="excepted")]),
        ("finished, and should have failed", walk(fails=True), GOOD),
        ("has not ended", walk(), [end(state="waiting")]),
        ("finished after 3 of 4 steps", walk(steps=4), GOOD),
        ("messages doubled or out of order", walk(notes={1: [("1", "ok")]}), [end(notes=["1", "1"])]),
        ("messages doubled or out of order", walk(notes={1: [("1", "ok"), ("2", "ok")]}), [end(notes=["2", "1"])]),
        ("a message was lost", walk(notes={1: [("1", "ok"), ("2", "ok")]}), [end(notes=["2"])]),
        ("a message was refused, yet taken", walk(notes={1: [("1", "refused")]}), [end(notes=["1"])]),
        ("messages of nobody", walk(), [end(notes=["1"])]),
        ("an update was applied twice", walk(updates=[("x", "ok")]), [end(applied=["x", "x"])]),
        ("the update x of a was answered as ok", walk(updates=[("x", "ok")]), GOOD),
        ("the update x of a was answered as refused", walk(updates=[("x", "refused")]), [end(applied=["x"])]),
    ],
)
def test_each_crime_is_seen(crime: str, told: Told, ends: Iterable[End]) -> None:
    """And named, with the process."""
    complaints = judge({"a": told}, list(ends), {})
    assert any(one.startswith(crime) for one in complaints), complaints


def test_steps_that_go_back_are_seen() -> None:
    """A step may begin again, but not after its successor; and whoever takes steps is there."""
    assert judge({"a": walk()}, GOOD, {"a": [1, 1, 2, 3, 3]}) == []
    assert "checkpointed ran again: a" in judge({"a": walk()}, GOOD, {"a": [1, 2, 1]})[0]
    assert judge({"a": walk()}, GOOD, {"b": [1]}) == ["invented: b took steps, and is not there"]


def test_runs_of_a_schedule_are_counted() -> None:
    """As many as it says, and each has finished."""
    schedule = End("s", "finished", None, {"runs": 2})
    runs = [end("s@1", parent="s"), end("s@2", parent="s"), end("other", parent="a")]
    assert missed_runs(schedule, runs) == []
    assert missed_runs(schedule, runs[:1]) == ["the schedule s launched 2 runs, and 1 are there"]
    assert "is killed: s@3" in missed_runs(schedule, [*runs, end("s@3", "killed", "s")])[0]


# --- leaks and commits --------------------------------------------------------------------------------


def samples(rise: float, count: int = 100) -> list[leaks.Sample]:
    """Of a service whose memory goes up and down a little, and rises by so much (MiB) over all."""
    wave = itertools.cycle([0.0, 0.5, -0.5])
    return [leaks.Sample(float(n), 50 + rise * n / count + next(wave), 10, 4) for n in range(count)]


def test_a_leak_is_seen_and_a_wave_is_not() -> None:
    """The line through the samples counts; what happens in the warm-up does not."""
    bound = leaks.Bound(5.0, 2.0, 2.0)
    assert leaks.complaints({"broker": samples(0.0)}, bound) == []
    [complaint] = leaks.complaints({"broker": samples(20.0)}, bound)
    assert complaint.startswith("broker leaks: rss_mib grew by 15.")
    warm = [leaks.Sample(float(n), 50.0 + min(n, 15), 10, 4) for n in range(100)]
    assert leaks.complaints({"broker": warm}, bound) == []
    files = [leaks.Sample(float(n), 50.0, n, 4) for n in range(100)]
    assert ["files" in one for one in leaks.complaints({"broker": files}, bound)] == [True]


def test_a_commit_that_forgets_somebody_is_seen(tmp_path: Path) -> None:
    """The auditor of the soak's broker looks at some commits, lets some pass, looks again, and writes down both."""
    with closing(open_database(tmp_path / "prunus.db")) as connection:
        store, file = ProcessStore(connection), tmp_path / services.FILE
        connection.execute("CREATE TABLE broker_task (id, key, holder, epoch, outcome)")
        failpoint = services.SomeCommits(connection, file)
        for _ in range(services.LOOKED_AT):
            failpoint("after_commit")
        assert file.read_text() == f"looked {services.LOOKED_AT} 0\n"
        store.create(NewProcess(pid="forgotten", class_id="a:B", checkpoint=b"", created_at=0.0, step="run"))
        for _ in range(services.LET_PASS):
            failpoint("after_commit")
        assert "forgotten" not in file.read_text()
        failpoint("after_commit")
        assert "nobody watches ('forgotten'" in file.read_text()
