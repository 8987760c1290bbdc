"""The text format of Prometheus, read by its grammar.

https://prometheus.io/docs/instrumenting/exposition_formats/#text-format-details
"""

from __future__ import annotations

import math
import re

import msgspec
import pytest

from prunus.messaging.inventory import QueueLimits, QueueStatistics, SessionStatistics
from prunus.runtime.backend import BrokerStatus
from prunus.runtime.metrics import as_prometheus
from tests.runtime.brokers import session, status

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'(?P<name>[a-zA-Z_][a-zA-Z0-9_]*)="(?P<value>(?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
SAMPLE = re.compile(rf"(?P<name>{NAME})(?:\{{(?P<labels>.*)\}})? (?P<value>\S+)")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(text: str) -> tuple[Samples, dict[str, str]]:
    """The samples and the type of each family. Fails for what is no text of this format."""
    samples: Samples = {}
    types: dict[str, str] = {}
    helps: set[str] = set()
    family = ""
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if found := re.fullmatch(rf"# HELP ({NAME}) (?:[^\\]|\\[\\n])*", line):
            assert found[1] not in helps, "one HELP for a name, before its samples"
            helps.add(found[1])
        elif found := re.fullmatch(rf"# TYPE ({NAME}) (counter|gauge)", line):
            family = found[1]
            assert family not in types, "all lines of a metric come as one group"
            assert family in helps
            types[family] = found[2]
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert match["name"] == family
            labels = match["labels"] or ""
            pairs = [(label["name"], unescaped(label["value"])) for label in LABEL.finditer(labels)]
            assert "".join(label[0] for label in LABEL.finditer(labels)) == labels, line
            key = match["name"], tuple(pairs)
            assert key not in samples, "a sample is there once"
            samples[key] = float(match["value"].replace("Inf", "inf"))
    return samples, types


def unescaped(value: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), value)


def test_all_numbers_are_there() -> None:
    """Those of the broker, of each queue, resource and role, and of the processes."""
    samples, types = read(as_prometheus(status()))
    render = (("queue", "render"),)
    for name, value in {
        "prunus_queue_ready": 1200,
        "prunus_queue_delayed": 3,
        "prunus_queue_blocked": 2,
        "prunus_queue_held": 4,
        "prunus_queue_dead": 5,
        "prunus_queue_credit": 6,
        "prunus_queue_oldest_seconds": 75,
        "prunus_queue_longest_held_seconds": 7200,
        "prunus_queue_accepted_total": 2000,
        "prunus_queue_settled_total": 700,
        "prunus_queue_rejected_total": 9,
        "prunus_queue_limit_concurrency": 8,
        "prunus_queue_limit_rate_per_s": 2.5,
        "prunus_queue_limit_max_length": 10_000,
        "prunus_queue_limit_burst": 3,
    }.items():
        assert samples[name, render] == value, name
    assert samples["prunus_broker_uptime_seconds", ()] == 3700
    assert samples["prunus_broker_database_bytes", ()] == 12_345_678
    assert samples["prunus_broker_accepted_total", ()] == 2001
    assert samples["prunus_resource_taken", (("resource", "gpu"),)] == 1
    assert samples["prunus_resource_waiting", (("resource", "gpu"),)] == 17
    assert samples["prunus_sessions", (("role", "owner"), ("connected", "true"))] == 2
    assert samples["prunus_sessions", (("role", "viewer"), ("connected", "false"))] == 1
    assert samples["prunus_processes", (("state", "finished"),)] == 1000
    anna = (("session", "laptop"), ("role", "viewer"), ("key", "anna"))
    assert samples["prunus_session_silent_seconds", anna] == 14
    assert ("prunus_session_round_trip_seconds", anna) not in samples
    worker = (("session", "worker-1"), ("role", "owner"), ("key", ""))
    assert (samples["prunus_session_held", worker], samples["prunus_session_round_trip_seconds", worker]) == (4, 0.0012)
    assert {name for name, kind in types.items() if kind == "counter"} == {
        name for name in types if name.endswith("_total")
    }


def test_a_program_that_is_started_again_goes_on_in_its_series() -> None:
    """The random part of its session is no label; sessions of one name, role and key are one sample: their sum, or for
    times the longest that is known."""
    samples, _ = read(
        as_prometheus(
            status(
                sessions={
                    f"peer-{'a' * 32}": session(held=2, silent_s=3.0, round_trip_s=0.5),
                    f"peer-{'b' * 32}": session(held=3, silent_s=1.0, round_trip_s=None),
                    f"peer-{'c' * 32}": session(held=7, key="anna"),
                    f"peer-{'d' * 32}": session(held=9, role="viewer", key="anna"),
                }
            )
        )
    )
    assert {labels: value for (name, labels), value in samples.items() if name == "prunus_session_held"} == {
        (("session", "peer"), ("role", "owner"), ("key", "")): 5,
        (("session", "peer"), ("role", "owner"), ("key", "anna")): 7,
        (("session", "peer"), ("role", "viewer"), ("key", "anna")): 9,
    }
    peers = (("session", "peer"), ("role", "owner"), ("key", ""))
    assert samples["prunus_session_silent_seconds", peers] == 3.0
    assert samples["prunus_session_round_trip_seconds", peers] == 0.5
    assert samples["prunus_sessions", (("role", "owner"), ("connected", "true"))] == 3


def test_no_number_is_forgotten() -> None:
    """Whatever the broker counts has a metric: each number changes the text when it changes."""
    plain = as_prometheus(status())
    for field in msgspec.structs.fields(BrokerStatus):
        if field.type in (int, float, bool) and field.name != "pid":
            changed = msgspec.structs.replace(status(), **{field.name: 77_777_777})
            assert as_prometheus(changed) != plain, field.name
    for field in msgspec.structs.fields(SessionStatistics):
        if field.type in (int, float, float | None):
            changed = {"s": msgspec.structs.replace(session(), **{field.name: 77_777_777})}
            if field.name != "pid":
                assert as_prometheus(status(sessions=changed)) != as_prometheus(status(sessions={"s": session()})), (
                    field
                )
    for field in msgspec.structs.fields(QueueLimits):
        limits = msgspec.structs.replace(QueueLimits(rate_per_s=1.0), **{field.name: 77_777_777})
        queues = [{"q": QueueStatistics(limits=each)} for each in (QueueLimits(rate_per_s=1.0), limits)]
        assert as_prometheus(status(queues=queues[0])) != as_prometheus(status(queues=queues[1])), field.name
    for field in msgspec.structs.fields(QueueStatistics):
        if field.name not in ("limits", "accepted_per_s", "settled_per_s"):  # rates are made of the totals
            queue = msgspec.structs.replace(status().queues["render"], **{field.name: 77_777_777})
            assert as_prometheus(status(queues={"render": queue, "mail": QueueStatistics(ready=1)})) != plain, (
                field.name
            )


def test_refused_connections_are_not_only_those_with_a_wrong_key() -> None:
    """The help text says what is counted: everybody who was refused or hung up on."""
    [line] = [line for line in as_prometheus(status()).split("\n") if line.startswith("# HELP prunus_broker_refused_c")]
    assert "too many" in line


def test_what_is_not_known_is_left_out() -> None:
    """A queue without limits, or without tasks, has no such sample; and a metric without samples is not named."""
    samples, types = read(as_prometheus(status(resources={}, queues={"mail": QueueStatistics()})))
    unknown = re.compile("limit|oldest|longest|resource")
    assert not [name for name, _ in samples if unknown.search(name)]
    assert not [name for name in types if unknown.search(name)]


@pytest.mark.parametrize("name", ['say "hi"', "a\\b", "two\nlines", 'x",evil="1', "é ü", ""])
def test_names_are_escaped(name: str) -> None:
    """Whatever a queue is called, it stays inside of its label."""
    samples, _ = read(as_prometheus(status(queues={name: QueueStatistics(ready=3)})))
    assert samples["prunus_queue_ready", (("queue", name),)] == 3


@pytest.mark.parametrize("number", [0.0, 1e300, math.inf, -math.inf, 0.1 + 0.2])
def test_numbers_are_read_back_the_same(number: float) -> None:
    """To the last digit."""
    samples, _ = read(as_prometheus(status(uptime_s=number, sessions={"s": session()})))
    assert samples["prunus_broker_uptime_seconds", ()] == number
