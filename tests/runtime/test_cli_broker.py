"""``prunus broker`` and ``prunus tasks`` as people and scripts use them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from prunus.errors import ConnectionLostError, TaskRejectedError
from prunus.messaging.communicator import Communicator, IncomingTask
from prunus.runtime.cli.broker import HTTP_TIMEOUT_S
from prunus.runtime.controller import connect
from prunus.runtime.profile import Profile
from tests.runtime.shell import PROJECT, Shell, daemon_in, said_by
from tests.runtime.test_metrics import read


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell in a folder whose daemon runs, with one worker."""
    with daemon_in(tmp_path_factory.mktemp("live")) as shell:
        yield shell


@pytest.fixture
def queue(live: Shell, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a queue of this test alone, which is empty afterwards."""
    name = str(request.node.name)[:80]
    yield name
    live("broker", "limit", name, "--concurrency", "none", "--rate", "none", "--max-length", "none")
    live("tasks", "purge", name, "--yes")


def with_communicator(shell: Shell, work: Callable[[Communicator], Awaitable[Any]]) -> Any:
    """Do something as a peer of the daemon."""

    async def connected() -> Any:
        async with connect(Profile.load(shell.folder / ".prunus")) as controller:
            return await work(controller.communicator)

    return asyncio.run(connected())


def send(shell: Shell, queue: str, *bodies: bytes, **options: Any) -> list[str]:
    """The ids of new tasks."""

    async def work(communicator: Communicator) -> list[str]:
        return [(await communicator.task_send(body, queue=queue, **options)).id for body in bodies]

    ids: list[str] = with_communicator(shell, work)
    return ids


def listed(shell: Shell, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(shell("tasks", *words, "--json").stdout)
    return found


@contextlib.contextmanager
def held(shell: Shell, queue: str) -> Iterator[None]:
    """Somebody works on the first task of a queue, and does not end."""
    code = f"""
import asyncio, sys
from prunus.runtime.controller import connect
from prunus.runtime.profile import Profile
from pathlib import Path
async def work():
    async with connect(Profile.load(Path({str(shell.folder / ".prunus")!r}))) as controller:
        async def handler(task):
            print("held", flush=True)
            await asyncio.Event().wait()
        await controller.communicator.add_task_subscriber(handler, queue={queue!r})
        await asyncio.to_thread(sys.stdin.read)
asyncio.run(work())
"""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], env=shell.environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            yield
        finally:
            process.kill()


# --- tasks ------------------------------------------------------------------------------------------


def test_queues_and_who_works_on_what(live: Shell, queue: str) -> None:
    """A row a queue, and who holds tasks; for programs all of the broker's numbers."""
    send(live, queue, b"1", b"2")
    with held(live, queue):
        text = live("tasks").stdout
        assert re.search(rf"^queue +ready +delayed +blocked +held +dead .*\n(.*\n)*{queue} +1 +- +- +1 +- ", text)
        assert re.search(r"^controller +1$", text, re.MULTILINE)
        facts = json.loads(live("tasks", "--json").stdout)
        assert facts["queues"][queue]["ready"] == 1
        [task] = listed(live, queue, "--place", "held")
        assert re.search(
            rf"^{task['id']} +{queue} +held .*with controller for ", live("tasks", queue).stdout, re.MULTILINE
        )


def test_the_tasks_of_a_queue(live: Shell, queue: str) -> None:
    """The oldest first, so many; those of a place, of a key, of a queue with the name of a command."""
    first, second = send(live, queue, b"a", b"b", priority=3, subject="x.y")
    [third] = send(live, queue, b"c", key="k")
    lines = live("tasks", queue).stdout.splitlines()
    assert lines[0].split() == ["id", "queue", "place", "key", "subject", "priority", "size", "age"]
    assert [line.split()[0] for line in lines[1:]] == [first, second, third]
    assert lines[1].split()[2:6] == ["ready", "x.y", "3", "1"]
    assert lines[3].split()[2:5] == ["ready", "k", "0"]
    some = live("tasks", queue, "-n", "2")
    assert len(some.stdout.splitlines()) == 3
    assert "--limit shows more" in some.stderr
    assert [task["id"] for task in listed(live, queue)] == [first, second, third]
    assert [task["id"] for task in listed(live, queue, "--task-key", "k")] == [third]
    assert listed(live, queue, "--dead") == []
    assert "say one of them" in live.error("tasks", "--dead", "--place", "held", code=2)


def test_where_nothing_is_found_the_name_is_said(live: Shell, queue: str) -> None:
    """Which queue, place or key has no task, or that there is no such queue; and where to look."""
    [task] = send(live, queue, b"x", key="the key")
    look = "; `prunus tasks` lists the queues"
    for words, says in (
        (("no-such-queue",), f"There is no queue 'no-such-queue'{look}."),
        (("no-such-queue", "--dead"), f"There is no queue 'no-such-queue'{look}."),
        (("--queue", "show"), f"There is no queue 'show'{look}."),
        ((task,), f"There is no queue {task!r}: it is the id of a task, which `prunus tasks show {task}` shows."),
        (
            ("the key",),
            "There is no queue 'the key': it is the key of a task, which `prunus tasks --task-key 'the key'` shows.",
        ),
        (("--task-key", "other"), f"There is no task with the key 'other'{look}, with how many tasks each has."),
        ((queue, "--dead"), f"No task of the queue {queue!r} is dead{look}, with how many tasks each has."),
    ):
        ended = live("tasks", *words)
        assert (ended.stdout, ended.stderr) == ("", f"{says}\n")
    for line in ("purge no-such-queue -y", "bury --queue no-such-queue --all"):
        ended = live("tasks", *line.split())
        assert ended.stderr == f"There is no queue 'no-such-queue'{look}.\n"
        assert ended.stdout.endswith(": 0 tasks\n")
    assert live("tasks", "requeue", "--queue", queue, "--place", "dead").stderr == ""


def test_a_task_with_its_body(live: Shell, queue: str) -> None:
    """Text, JSON and MessagePack are read, other bytes are shown as such; --raw gives the bytes."""
    bodies = [b'{"a": 1}', b"two\nlines", msgspec.msgpack.encode({"scale": [0.9, 1.0]}), b"\x00\xff"]
    ids = send(live, queue, *bodies, max_attempts=3)
    texts = [live("tasks", "show", task).stdout for task in ids]
    for text, ending in zip(
        texts,
        [
            'body (JSON)\n{\n  "a": 1\n}\n',
            "body (text)\ntwo\nlines\n",
            "body (MessagePack)\nscale: [0.9, 1.0]\n",
            f"body (bytes)\n000000  00 ff{' ' * 44}..\n",
        ],
        strict=True,
    ):
        assert text.endswith(f"\n\n{ending}")
    assert re.search(rf"^id +{ids[0]}\nqueue +{queue}\nplace +ready\n", texts[0])
    assert "attempts  0 of 3" in texts[0]
    assert live.process("tasks", "show", ids[1], "--raw").stdout == "two\nlines"
    assert json.loads(live("tasks", "show", ids[3], "--json").stdout)["body"] == "AP8="
    assert "there is no task 'nonsense'" in live.error("tasks", "show", "nonsense")


def test_dead_letters_are_looked_at_and_offered_again(live: Shell, queue: str) -> None:
    """With the reason; one by its id, or all of a queue."""

    async def fail(communicator: Communicator) -> None:
        async def refuse(task: IncomingTask) -> None:
            raise TaskRejectedError("no licence is free")

        await communicator.add_task_subscriber(refuse, queue=queue, credit=5)
        for _ in range(3):
            await communicator.task_send(b"x", queue=queue, max_attempts=1)
        while (await communicator.statistics()).queues[queue].dead < 3:
            await asyncio.sleep(0.01)

    with_communicator(live, fail)
    text = live("tasks", "--dead", "--queue", queue).stdout
    assert text.count("no licence is free") == 3
    ids = [task["id"] for task in listed(live, queue, "--dead")]
    assert re.search(r"^reason +no licence is free$", live("tasks", "show", ids[0]).stdout, re.MULTILINE)
    assert f"3 dead letters in the queue {queue}" in live("doctor", code=None).stdout
    assert live("tasks", "requeue", ids[0]).stdout == "requeued: 1 task\n"
    assert live("tasks", "requeue", "--queue", queue, "--place", "dead").stdout == "requeued: 2 tasks\n"
    assert {task["place"] for task in listed(live, queue)} == {"ready"}


def test_tasks_are_buried_and_forgotten(live: Shell, queue: str) -> None:
    """By hand; what cannot be done is said for each, and the others are done."""
    ids = send(live, queue, *[b"x"] * 5)
    assert live("tasks", "bury", ids[0], ids[1]).stdout == "buried: 2 tasks\n"
    assert [task["id"] for task in listed(live, queue, "--dead")] == ids[:2]
    ended = live("tasks", "delete", ids[0], "nonsense", code=1)
    assert ended.stdout == "deleted: 1 task\n"
    assert ended.stderr == "Error: nonsense: there is no such task; `prunus tasks QUEUE` lists those of a queue\n"
    with held(live, queue):
        [task] = listed(live, queue, "--place", "held")
        ended = live("tasks", "delete", task["id"], code=1)
        assert ended.stdout == "deleted: 0 tasks\n"
        assert "controller works on it" in ended.stderr
        assert live("tasks", "purge", queue, "--yes").stdout == "deleted: 3 tasks\n"
        assert [task["place"] for task in listed(live, queue)] == ["held"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "say which tasks: ID..., or --queue QUEUE --place PLACE"),
        (("--queue", "q"), "add --place PLACE, or --all"),
        (("--place", "dead"), "add --queue QUEUE, or --all"),
        (("id", "--queue", "q"), "not both"),
        (("--all",), "say which tasks"),
        (("--queue", "q", "--place", "nowhere"), "'nowhere' is not one of"),
    ],
)
def test_nothing_is_changed_by_a_slip(live: Shell, words: tuple[str, ...], says: str) -> None:
    """Which tasks are meant must be said in full."""
    for command in ("requeue", "delete", "bury"):
        assert says in live.error("tasks", command, *words, code=2)


def test_why_nothing_was_done_to_a_task(live: Shell, queue: str) -> None:
    """Of each task that was named and is as it was, the reason is said, and the exit code is 1; the rest is done."""
    ready, dead, last = send(live, queue, b"x", b"y", b"z")
    [old] = send(live, queue, b"k", key="the key")
    live("tasks", "bury", dead, old)
    [new] = send(live, queue, b"k", key="the key")
    for words, done, why in (
        (("requeue", ready), "requeued", "it is ready already"),
        (
            ("requeue", old),
            "requeued",
            "another task with its key the key is pending; `prunus tasks --task-key 'the key'`",
        ),
        (("bury", dead), "buried", "it is a dead letter already"),
        (("bury", "nonsense"), "buried", "there is no such task"),
    ):
        ended = live("tasks", *words, code=1)
        assert ended.stdout == f"{done}: 0 tasks\n"
        assert ended.stderr.startswith(f"Error: {words[1]}: {why}")
        assert ended.stderr.count("\n") == 1
    ended = live("tasks", "requeue", ready, dead, dead, code=1)
    assert (ended.stdout, ended.stderr.count("Error: ")) == ("requeued: 1 task\n", 1)
    live("tasks", "bury", last, new)
    assert live("tasks", "requeue", old).stdout == "requeued: 1 task\n"


def test_how_many_tasks_of_a_queue_were_left_and_why(live: Shell, queue: str) -> None:
    """Of one the same is said as if it had been named."""
    keys = ("a", "b")
    dead = [send(live, queue, b"x", key=key)[0] for key in keys]
    live("tasks", "bury", *dead)
    other = send(live, queue, b"y")
    live("tasks", "bury", *other)
    [pending] = send(live, queue, b"x", key="a")
    send(live, queue, b"x", key="b")
    all_dead = ("--queue", queue, "--place", "dead")
    ended = live("tasks", "requeue", *all_dead)
    assert ended.stdout == "requeued: 1 task\n"
    assert ended.stderr == (
        "2 were left: other tasks with their keys are pending; "
        f"`prunus tasks list --queue {queue} --place dead` lists them\n"
    )
    assert "dead letters already" in live("tasks", "bury", *all_dead).stderr
    live("tasks", "delete", dead[1])
    for words in (all_dead, ("--queue", queue, "--all")):
        ended = live("tasks", "requeue", *words)
        assert ended.stdout == "requeued: 0 tasks\n"
        assert ended.stderr == (
            "1 was left: another task with its key a is pending; `prunus tasks --task-key a` shows it\n"
        )
    assert live("tasks", "requeue", "--queue", queue, "--place", "ready").stderr.startswith("3 were left: they are rea")
    live("tasks", "delete", pending)
    ended = live("tasks", "requeue", *all_dead)
    assert (ended.stdout, ended.stderr) == ("requeued: 1 task\n", "")
    with held(live, queue):
        assert re.fullmatch("1 was left: .* works on it, .*\n", live("tasks", "purge", queue, "--yes").stderr)


@pytest.mark.parametrize(
    "words",
    [
        ("tasks", "list", "NAME"),
        ("tasks", "--task-key", "NAME"),
        ("tasks", "show", "NAME"),
        ("tasks", "purge", "--yes", "NAME"),
        ("tasks", "requeue", "NAME"),
        ("broker", "limit", "NAME", "--max-length", "2"),
        ("broker", "resource", "NAME", "2"),
    ],
)
def test_a_name_that_is_too_long(live: Shell, words: tuple[str, ...]) -> None:
    """A sentence that says how long a name may be, and that is no fault of the program."""
    said = live.error(*("x" * 1025 if word == "NAME" else word for word in words))
    assert said.startswith("Error: a name is a text of up to 1024 characters")
    assert "should not happen" not in said


def test_what_is_for_good_is_asked_for(live: Shell, queue: str) -> None:
    """On a terminal; where nobody can be asked, --yes has to be there."""
    send(live, queue, b"x", b"y")
    for words in (("purge", queue), ("delete", "--queue", queue, "--place", "ready")):
        assert "add --yes" in live.error("tasks", *words, code=2)
    answers = on_terminal(live, "n", "tasks", "purge", queue)
    assert f"Forget every task of {queue}, its dead letters too? [y/N]" in answers
    assert len(listed(live, queue)) == 2
    assert "deleted: 2 tasks" in on_terminal(live, "y", "tasks", "delete", "--queue", queue, "--place", "ready")


def on_terminal(shell: Shell, answer: str, *words: str) -> str:
    """What a terminal shows on which a command is called and answered."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "prunus.runtime.cli", *words]
    with subprocess.Popen(
        command, cwd=shell.folder, env=shell.environment, stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        os.write(controller, f"{answer}\n".encode())
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while chunk := os.read(controller, 4096):
                shown += chunk
        process.wait(20)
    os.close(controller)
    return shown.decode()


def test_a_task_of_a_process_shows_the_process(live: Shell) -> None:
    """Its class and its state, beside the pid."""
    pid = live.launch("Endless", f"begun={live.folder / 'begun'}")
    live.until(pid, lambda facts: facts["state"] == "running")
    shown = live("tasks", "default").stdout
    assert re.search(rf"held +{pid[-8:]} .*Endless, running", shown)
    [task] = listed(live, "default", "--task-key", pid)
    assert "process   Endless, running" in live("tasks", "show", task["id"]).stdout
    live("kill", pid)


def test_tasks_of_processes_in_a_queue_of_their_own(live: Shell, queue: str) -> None:
    """They show their processes too, beside tasks of others."""
    pid = live.launch("Add", "a=1", "b=2", "--queue", queue)
    send(live, queue, b"x")
    _, own, other = live("tasks", queue).stdout.splitlines()
    assert re.search(rf" {pid[-8:]} +Add, created ", own)
    assert "Add" not in other
    [task] = listed(live, queue, "--task-key", pid)
    assert re.search(r"^process +Add, created$", live("tasks", "show", task["id"]).stdout, re.MULTILINE)
    live("kill", pid)


# --- the broker -------------------------------------------------------------------------------------


def test_the_broker_at_a_glance(live: Shell, queue: str) -> None:
    """Itself, its queues, its resources and its sessions."""
    send(live, queue, b"x")
    live("broker", "resource", "gpu", "2")
    text = live("broker", "status").stdout
    assert re.search(r"^broker +pid \d+, epoch \d+, up for ", text)
    assert re.search(rf"^{queue} +1 ", text, re.MULTILINE)
    assert re.search(r"^gpu +2 +0 +0$", text, re.MULTILINE)
    assert re.search(r"^worker-1 +owner +pid \d+ ", text, re.MULTILINE)
    facts = json.loads(live("broker", "status", "--json").stdout)
    assert facts["resources"]["gpu"]["capacity"] == 2
    assert facts["database_bytes"] > 0
    assert "say one of them" in live.error("broker", "status", "--watch", "--json", code=2)
    assert "needs a terminal" in live.error("broker", "status", "--watch", code=2)
    live("broker", "resource", "gpu", "none")


def test_a_queue_that_nobody_serves(live: Shell, queue: str) -> None:
    """The advice is a command that can be copied; a worker is none for tasks that are no processes."""
    pid = live.launch("Add", "a=1", "--queue", "two words")
    send(live, queue, b"x")
    told = " ".join(live("daemon", "status", code=1).stdout.split())
    assert "1 task of the queue two words waits for a worker" in told
    assert "`prunus worker -q 'two words'`" in told
    assert f"1 task of the queue {queue} waits for a program that takes them" in told
    assert f"`prunus tasks --queue {queue}` lists them" in told
    live("kill", pid)
    live("tasks", "purge", "--yes", queue)


def test_the_broker_is_watched(live: Shell) -> None:
    """On a terminal, until Ctrl-C."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "prunus.runtime.cli", "broker", "status", "--watch"]
    with subprocess.Popen(
        command, cwd=live.folder, env=live.environment, stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        shown = b""
        while shown.count(b"epoch") < 2:
            shown += os.read(controller, 4096)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):
            while chunk := os.read(controller, 4096):
                shown += chunk
        assert process.wait(20) == 130
    os.close(controller)
    assert b"Traceback" not in shown


def test_a_queue_is_limited_while_it_works(live: Shell, queue: str) -> None:
    """What is not said stays; none takes a limit away; without options they are shown."""
    assert live("broker", "limit", queue).stdout == f"{queue}: no limits\n"
    live("broker", "limit", queue, "--concurrency", "2", "--rate", "0.5", "--burst", "3")
    assert (
        live("broker", "limit", queue, "--max-length", "1").stdout == f"{queue}: 2 at once, 0.5/s (burst 3), 1 long\n"
    )
    send(live, queue, b"x")
    with pytest.raises(Exception, match="1"):
        send(live, queue, b"y")
    limits = json.loads(live("broker", "limit", queue, "--rate", "none", "--json").stdout)
    assert limits == {"concurrency": 2, "rate_per_s": None, "burst": 3, "max_length": 1}
    without_rate = live.error("broker", "limit", queue, "--burst", "2", code=2)
    assert f"--burst says how a rate begins, and '{queue}' has none then: say --rate R too" in without_rate
    assert "--rate" in live.error("broker", "limit", queue, "--rate", "none", "--burst", "2", code=2)
    assert json.loads(live("broker", "limit", queue, "--json").stdout) == limits
    for word in ("some", "-1", "nan", "inf"):
        assert "a number" in live.error("broker", "limit", queue, f"--rate={word}", code=2)
    assert json.loads(live("broker", "resource", "licence", "3", "--json").stdout) == {
        "resource": "licence",
        "capacity": 3,
    }
    assert live("broker", "resource", "licence", "1").stdout == "licence: 1 token\n"
    assert "no task may ask for it" in live("broker", "resource", "licence", "none").stdout


@pytest.mark.parametrize(
    "words",
    [
        ("limit", "q", "--concurrency", "N"),
        ("limit", "q", "--max-length", "N"),
        ("limit", "q", "--burst", "N"),
        ("resource", "gpu", "N"),
    ],
)
@pytest.mark.parametrize("number", [str(2**63), "9" * 23, "9" * 5000])
def test_numbers_that_no_message_can_have(tmp_path: Path, words: tuple[str, ...], number: str) -> None:
    """A usage error names the bound."""
    said = Shell(tmp_path).error("broker", *(number if word == "N" else word for word in words), code=2)
    assert re.search(r" is not a number from [01] on, below 2\*\*63", said)
    assert len(said) < 400


@pytest.mark.parametrize("number", ["nan", "-nan", "inf", "-inf", "1e400"])
def test_a_lease_is_a_finite_number(tmp_path: Path, number: str) -> None:
    """With any other a broker would start, and refuse everybody."""
    shell = Shell(tmp_path)
    shell("init")
    said = shell.error("broker", "run", f"--lease={number}", code=2)
    assert "Invalid value for '--lease'" in said
    assert "nan' is not a finite number." in said or "is not in the range 0.1<=x<=3600" in said


def test_the_largest_number(live: Shell, queue: str) -> None:
    """It is taken."""
    most = str(2**63 - 1)
    limits = json.loads(live("broker", "limit", queue, f"--concurrency={most}", "--json").stdout)
    assert limits["concurrency"] == 2**63 - 1
    assert "below 2**63" in live.error("launch", "--resource", f"gpu={2**63}", "a:B", code=2)
    assert "below 2**63" in live.error("launch", "--resource", f"gpu={'9' * 5000}", "a:B", code=2)
    assert "must be from 1 to " in live.error("broker", "limit", queue, "--rate=1", f"--burst={most}")


def test_a_name_that_is_empty(tmp_path: Path) -> None:
    """No queue and no resource is called so."""
    for words in (("limit", "", "--burst", "2"), ("resource", "", "1")):
        assert "not an empty text" in Shell(tmp_path).error("broker", *words, code=2)


def test_a_place_that_is_taken(live: Shell) -> None:
    """Numbers can't be served there: the sentence names it, and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = f"127.0.0.1:{other.getsockname()[1]}"
        said = live.error("broker", "metrics", "--serve", place)
    assert f"can't listen at {place}: another program does: stop that one, or say another port" in said


def test_a_broker_that_runs_and_says_nothing(live: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks for the end of one that has not ended."""

    async def communicator(*_: object, **__: object) -> None:
        raise ConnectionLostError("ipc:///there")

    broker = json.loads(live("broker", "status", "--json").stdout)["pid"]
    monkeypatch.setattr("prunus.runtime.connecting.communicator", communicator)
    said = live.error("list")
    assert f"Its process runs (pid {broker}), but is stopped, or has too much to do; `prunus daemon restart` " in said
    assert "ended" not in said


@pytest.fixture
def served(live: Shell) -> Iterator[int]:
    """The port at which numbers are served; nothing is said there that nobody asked for."""
    with live.begin("broker", "metrics", "--serve", "127.0.0.1:0") as process:
        assert process.stderr is not None
        found = re.match(r"http://127.0.0.1:(\d+)/metrics ", process.stderr.readline())
        assert found
        yield int(found[1])
        process.send_signal(signal.SIGINT)
        _, said = said_by(process)
        assert (process.returncode, said) == (130, "")


def test_a_slow_scraper_keeps_nobody_waiting(served: int) -> None:
    """The next one is answered while it still says its question."""
    with socket.create_connection(("127.0.0.1", served)) as slow:
        slow.sendall(b"GET /met")
        begun = time.monotonic()
        with urllib.request.urlopen(f"http://127.0.0.1:{served}/metrics", timeout=10) as answer:
            assert answer.status == 200
        assert time.monotonic() < begun + HTTP_TIMEOUT_S


def test_a_scraper_that_leaves(served: int) -> None:
    """Nothing is said of it (see the fixture), and the next one is answered."""
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", served)) as hasty:
            hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no farewell
            hasty.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
    with urllib.request.urlopen(f"http://127.0.0.1:{served}/metrics", timeout=10) as answer:
        assert answer.status == 200


def test_numbers_of_a_broker_that_says_nothing(live: Shell, served: int) -> None:
    """503 with a reason, soon; and the numbers as soon as it speaks again."""
    broker = json.loads(live("broker", "status", "--json").stdout)["pid"]
    os.kill(broker, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{served}/metrics", timeout=20)
        assert time.monotonic() < begun + 4
        with caught.value as answer:
            assert (answer.code, answer.read()) == (503, b"the broker did not answer within 2 s\n")
    finally:
        os.kill(broker, signal.SIGCONT)
    with urllib.request.urlopen(f"http://127.0.0.1:{served}/metrics", timeout=20) as answer:
        assert answer.status == 200


def test_numbers_for_prometheus(live: Shell, queue: str) -> None:
    """Printed, or answered to whoever asks on this host."""
    send(live, queue, b"x")
    samples, _ = read(live("broker", "metrics").stdout)
    assert samples["prunus_queue_ready", (("queue", queue),)] == 1
    with live.begin("broker", "metrics", "--serve", "127.0.0.1:0") as process:
        assert process.stderr is not None
        found = re.match(r"(http://127.0.0.1:\d+)/metrics ", process.stderr.readline())
        assert found
        with urllib.request.urlopen(f"{found[1]}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            samples, _ = read(answer.read().decode())
        assert samples["prunus_queue_ready", (("queue", queue),)] == 1
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{found[1]}/other", timeout=10)
        assert caught.value.code == 404
        caught.value.close()
        process.send_signal(signal.SIGINT)
        _, said = said_by(process)
        assert (process.returncode, said) == (130, "")
    for place in ("0.0.0.0:9464", "9464", "127.0.0.1:x", "127.0.0.1:99999"):
        assert "address of this host" in live.error("broker", "metrics", "--serve", place, code=2)


def test_a_backup_from_the_command_line(live: Shell) -> None:
    """Beside the running daemon; a file that is there is not replaced without --force."""
    assert re.fullmatch(r".*/copy\.db: [\d.]+ .B\n", live("broker", "backup", "copy.db").stdout)
    assert "exists already" in live.error("broker", "backup", "copy.db")
    live("broker", "backup", "--force", "copy.db")
    assert "no folder" in live.error("broker", "backup", "nowhere/copy.db")
    assert "runs already" in live.error("broker", "restore", "copy.db")
    assert live("broker", "vacuum").stdout.endswith(" were given back.\n")

    async def fill() -> None:
        async with connect(Profile.find(str(live.folder / ".prunus"))) as controller:
            for _ in range(20):
                await controller.communicator.task_send(bytes(200_000), queue="much")
            await controller.communicator.purge("much")

    asyncio.run(fill())
    assert re.search(r"^[3-9][\d.]+ MB were given back\.$", live("broker", "vacuum").stdout)
    assert "not with --key" in live.error("broker", "backup", "x.db", "--key", "some.key", code=2)


def test_a_backup_does_not_take_the_place_of_the_profile(live: Shell) -> None:
    """--force is for an older backup: the daemon goes on, with all that it has."""
    profile = live.folder / ".prunus"
    os.mkfifo(live.folder / "fifo")
    before = {name: (profile / name).stat().st_ino for name in ("prunus.db", "prunus.db-wal", "config.yaml")}
    own = {path for path in profile.rglob("*") if path.relative_to(profile).parts[0] != "backups"}
    assert {profile / "prunus.db-mark", profile / "ballast", profile / "logs" / "broker.log"} < own
    for path in own:
        said = live.error("broker", "backup", "--force", str(path))
        assert f"{path} is, or would be, a file of the profile {profile} itself; nothing was changed" in said
    assert "fifo is a FIFO" in live.error("broker", "backup", "--force", "fifo")
    assert before == {name: (profile / name).stat().st_ino for name in before}
    (profile / "backups").mkdir()
    for _ in range(2):
        live("broker", "backup", "--force", ".prunus/backups/copy.db")
    assert [name for name in os.listdir(profile) if "rescued" in name] == []


def test_a_backup_is_restored(tmp_path: Path) -> None:
    """What happened after it is gone, what was before goes on; the database that was there is kept."""
    with daemon_in(tmp_path) as shell:
        before = shell.launch("Add", "a=1", "b=2")
        shell.until(before, lambda facts: facts["state"] == "finished")
        shell("broker", "backup", "copy.db")
        after = shell.launch("Add", "a=3", "b=4")
        shell.process("daemon", "stop")
        assert "pages are sound" in shell("doctor", code=1).stdout
        text = shell("broker", "restore", "copy.db").stdout
        assert "is the backup copy.db now" in text
        [aside] = (shell.folder / ".prunus").glob("prunus.db.before-restore-*")
        assert str(aside) in text
        shell.process("daemon", "start")
        assert shell.record(before)["outputs"] == {"sum": 3}
        assert "no process" in shell.error("show", after).lower()
        assert shell.until(shell.launch("Add", "a=5", "b=6"), lambda facts: facts["state"] == "finished")


def test_the_database_of_a_stopped_daemon(tmp_path: Path) -> None:
    """It is backed up, vacuumed and examined directly; a damaged one is found, and nothing is done to it."""
    shell = Shell(tmp_path)
    shell("init")
    database = tmp_path / ".prunus" / "prunus.db"
    assert "there is no database" in shell.error("broker", "backup", "copy.db")
    with contextlib.ExitStack() as stack:
        stack.callback(shell.process, "daemon", "stop", code=None)
        shell.process("daemon", "start")
    assert re.search(r"copy\.db: [\d.]+ .B$", shell("broker", "backup", "copy.db").stdout)
    assert re.search(r": [\d.]+ .B before, [\d.]+ .B now\.$", shell("broker", "vacuum").stdout)
    with database.open("r+b") as file:
        file.seek(2 * 4096)
        file.write(b"\xff" * 4096)
    found = shell("doctor", code=1).stdout
    assert re.search(r"problem +database .*can't be used", found)
    assert "prunus broker restore" in found
    assert "can't be used" in shell.error("broker", "backup", "other.db")
    shell("broker", "restore", "copy.db")
    assert "pages are sound" in shell("doctor", code=1).stdout
    assert "each is what was put" in shell("doctor", "--check-blobs", code=1).stdout
    assert json.loads(shell("doctor", "--check-blobs", "--json", code=1).stdout)[-1]["subject"] == "blobs"


def test_without_a_daemon_there_is_nothing_to_see(tmp_path: Path) -> None:
    """One sentence says so."""
    shell = Shell(tmp_path)
    shell("init")
    for words in (
        ("broker", "status"),
        ("tasks",),
        ("tasks", "show", "x"),
        ("broker", "limit", "q"),
        ("broker", "metrics"),
    ):
        assert "no daemon runs" in shell.error(*words)
    assert PROJECT.is_dir()
