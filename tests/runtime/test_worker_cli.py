"""``prunus worker`` and ``prunus broker run``: as programs in the foreground."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunus.runtime.cli.worker import end_of_this_job
from prunus.runtime.locks import read_holder
from prunus.runtime.profile import Profile
from tests.runtime.shell import Shell, said_by

pytestmark = pytest.mark.timeout(120)  # several programs a test, each of which imports all of it

FLOWS = '''
import asyncio
import threading
from pathlib import Path

from prunus import Process, Wait, WorkChain, append_, message, step


class Quick(Process):
    async def run(self):
        return None


class Parent(WorkChain):
    """It waits for its children, whoever runs them."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.outline(cls.begin, cls.end)

    async def begin(self):
        for _ in range(3):
            self.to_context(children=append_(self.submit(Quick)))

    async def end(self):
        assert len(self.ctx.children) == 3


class Asks(Process):
    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.message("go")

    async def run(self):
        return Wait(message("go"), then=self.end)

    async def end(self, go):
        return None


class Endless(Process):
    """Writes a line each time that it begins."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.input("file", valid_type=str)

    async def run(self):
        with Path(self.inputs.file).open("a") as file:
            file.write("begun\\n")
        await asyncio.get_running_loop().create_future()


class Stuck(Process):
    """A plain step that can't be interrupted."""

    @classmethod
    def define(cls, spec):
        super().define(spec)
        spec.input("file", valid_type=str)

    def run(self):
        Path(self.inputs.file).write_text("begun\\n")
        threading.Event().wait()


class Hour(Process):
    @step(timeout=3600)
    async def run(self):
        return None
'''

STARTED = "this worker has started one"


@pytest.fixture
def shell(short_folder: Path) -> Shell:
    """A folder with a profile and no daemon."""
    shell = Shell(short_folder)
    shell.environment.pop("SLURM_JOB_END_TIME", None)
    (short_folder / "flows.py").write_text(FLOWS)
    shell("init", "-w", "1")
    return shell


def profile_of(shell: Shell) -> Profile:
    return Profile.load(shell.folder / ".prunus")


@contextlib.contextmanager
def broker_of(shell: Shell) -> Iterator[subprocess.Popen[str]]:
    """``prunus broker run``, until Ctrl-C."""
    with shell.begin("broker", "run") as broker:
        wait_for_line(broker, "serving at")
        yield broker
        broker.send_signal(signal.SIGINT)
        _, error = said_by(broker)
        assert broker.returncode == 0, error


def wait_for_line(process: subprocess.Popen[str], text: str) -> str:
    """The first line on its standard error that has this text."""
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"it ended without saying {text!r}")


def wait_for_file(file: Path, lines: int) -> None:
    while not file.exists() or len(file.read_text().splitlines()) < lines:
        time.sleep(0.01)


def wait_until_gone(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = said_by(process)
    return process.returncode, out, error


def test_a_worker_ends_when_nothing_is_left_to_do(shell: Shell) -> None:
    """Parents with children are work; who waits for a message is not, and is named among what is left."""
    with broker_of(shell):
        done = [shell("launch", "flows:Parent").stdout.strip() for _ in range(3)]
        shell("launch", "flows:Asks")
        ended = shell.process("worker", "--until-idle", "--idle-grace", "0.3", "--slots", "1")
        assert ended.stdout == "Nothing is left to do in default; not ended: 1 waiting.\n"
        assert STARTED not in ended.stderr
        assert {shell.record(pid)["state"] for pid in done} == {"finished"}


def test_a_worker_without_a_broker_starts_one_for_its_time(shell: Shell) -> None:
    """It says so, commands reach it, and it is gone when the worker is."""
    profile = profile_of(shell)
    with shell.begin("worker") as worker:
        assert "No broker runs" in wait_for_line(worker, STARTED)
        wait_for_line(worker, "taking processes")
        pid = shell("launch", "--wait", "flows:Quick").stderr
        assert pid is not None
        assert read_holder(profile.lock("broker")) is not None
        worker.send_signal(signal.SIGTERM)
        code, out, error = wait_until_gone(worker)
    assert (code, out) == (0, "Stopped; all processes have ended.\n"), error
    assert read_holder(profile.lock("broker")) is None
    assert read_holder(profile.lock("foreground-1")) is None


def test_the_broker_outlives_the_worker_that_started_it_if_there_is_another(shell: Shell) -> None:
    """The other one starts a new broker, and what is queued is done."""
    with shell.begin("worker") as first:
        wait_for_line(first, "taking processes")
        with shell.begin("worker", "--name", "second") as second:
            wait_for_line(second, "taking processes")
            first.send_signal(signal.SIGTERM)
            assert wait_until_gone(first)[0] == 0
            wait_for_line(second, STARTED)
            while True:
                launched = shell("launch", "flows:Quick", code=None)
                if launched.exit_code == 0:
                    break
            shell.until(launched.stdout.strip(), lambda facts: facts["state"] == "finished")
            second.send_signal(signal.SIGTERM)
            assert wait_until_gone(second)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=["SIGUSR1", "SIGINT"])
def test_a_signal_gives_back_what_is_in_hand(shell: Shell, tmp_path: Path, number: signal.Signals) -> None:
    """With no grace at once; the process is there for the next worker."""
    begun = tmp_path / "begun"
    with broker_of(shell), shell.begin("worker", "--grace", "0") as worker:
        pid = shell("launch", "flows:Endless", f"file={begun}").stdout.strip()
        wait_for_file(begun, 1)
        worker.send_signal(number)
        code, out, error = wait_until_gone(worker)
        assert (code, out) == (0, "Stopped; not ended: 1 running.\n"), error
        assert shell.record(pid)["owner"] is None
        assert "runs again elsewhere" in error


def test_a_plain_step_that_does_not_end_keeps_nothing_alive(shell: Shell, tmp_path: Path) -> None:
    """The worker ends without it, and so does the broker that it has started."""
    begun, profile = tmp_path / "begun", profile_of(shell)
    with shell.begin("worker", "--grace", "0") as worker:
        wait_for_line(worker, "taking processes")
        shell("launch", "flows:Stuck", f"file={begun}")
        wait_for_file(begun, 1)
        worker.send_signal(signal.SIGTERM)
        code, out, error = wait_until_gone(worker)
    assert (code, out) == (0, "Stopped; not ended: 1 running.\n"), error
    assert "it ends with this worker" in error
    assert read_holder(profile.lock("broker")) is None


def test_a_second_signal_does_not_wait_for_the_grace(shell: Shell, tmp_path: Path) -> None:
    """The grace is a day here."""
    begun = tmp_path / "begun"
    with broker_of(shell), shell.begin("worker", "--grace", "86400") as worker:
        shell("launch", "flows:Endless", f"file={begun}")
        wait_for_file(begun, 1)
        worker.send_signal(signal.SIGTERM)
        wait_for_line(worker, "stopping:")
        worker.send_signal(signal.SIGTERM)
        code, _, error = wait_until_gone(worker)
    assert code == 0, error
    assert "was told to hurry" in error


def test_a_worker_knows_when_it_has_to_be_gone(shell: Shell) -> None:
    """It stops in time; what can't end in time stays queued, untouched."""
    with broker_of(shell):
        pid = shell("launch", "flows:Hour").stdout.strip()
        ended = shell.process("worker", "--until", "2s")
        assert ended.stdout == "The time of this worker is over; not ended: 1 created.\n"
        assert [event["subject"] for event in shell.record(pid)["history"]].count("claimed") == 0
        ended = shell.process("worker", "--until-idle", "--idle-grace", "0")
        assert ended.stdout == "Nothing is left to do in default; all processes have ended.\n"


def test_a_worker_in_a_slurm_job_knows_when_that_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A time that is over is that of another job, which the environment still tells of."""
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert end_of_this_job() is None
    later = int(time.time()) + 3600
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(later))
    assert end_of_this_job() == later
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000000000")
    assert capsys.readouterr().err == ""
    assert end_of_this_job() is None
    assert "SLURM_JOB_END_TIME is over already" in capsys.readouterr().err


def test_a_worker_on_another_host_needs_a_key_and_its_classes(short_folder: Path) -> None:
    """Over TCP, from a folder that has nothing of the profile: only the key, and the module."""
    home, far = Shell(short_folder / "home"), Shell(short_folder / "far")
    for shell in (home, far):
        shell.folder.mkdir()
    shutil.copy(write_flows(short_folder), home.folder)
    home("init", "-w", "1", "--listen", "tcp://127.0.0.1:*")
    with broker_of(home):
        home("key", "add", "cluster", "--role", "worker", "--out", str(far.folder / "cluster.key"))
        home("key", "add", "desk", "--role", "viewer", "--out", str(far.folder / "desk.key"))
        pid = home("launch", "flows:Parent").stdout.strip()
        asks = home("launch", "flows:Asks").stdout.strip()
        shutil.move(home.folder / "flows.py", far.folder)
        ended = far.process("--key", "cluster.key", "worker", "--until-idle")
        assert ended.stdout == "Nothing is left to do in default; not ended: 1 waiting.\n"
        home("send", asks, "go")
        far.process("--key", "cluster.key", "worker", "--until-idle")
        for one in (pid, asks):
            assert home.record(one)["state"] == "finished"
        refused = far.process("--key", "desk.key", "worker", code=1)
        assert "viewer" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not (far.folder / ".prunus").exists()


def test_a_worker_whose_key_is_revoked_ends_with_a_sentence(short_folder: Path) -> None:
    """At once, also in the midst of a step, which runs again elsewhere: its process is not its own any more."""
    home, far, begun = Shell(short_folder / "home"), Shell(short_folder / "far"), short_folder / "begun"
    for shell in (home, far):
        shell.folder.mkdir()
    shutil.copy(write_flows(short_folder), far.folder)
    shutil.copy(far.folder / "flows.py", home.folder)
    home("init", "-w", "1", "--listen", "tcp://127.0.0.1:*")
    with broker_of(home):
        home("key", "add", "cluster", "--role", "worker", "--out", str(far.folder / "cluster.key"))
        with far.begin("--key", "cluster.key", "worker", "--grace", "86400") as worker:
            pid = home("launch", "flows:Endless", f"file={begun}").stdout.strip()
            wait_for_file(begun, 1)
            home("key", "revoke", "cluster")
            code, _, error = wait_until_gone(worker)
        assert code == 1, error
        assert "stopping: 1 process in hand is let go at once" in error
        assert re.fullmatch(
            r"Error: the broker at tcp://127.0.0.1:\d+ does not know this key, or it was revoked; "
            r"ask its owner for a key \(prunus key add NAME --role ...\)",
            error.splitlines()[-1],
        ), error
        assert "Traceback" not in error
        with home.begin("worker", "--grace", "0") as other:
            wait_for_file(begun, 2)
            assert home.record(pid)["state"] == "running"
            other.send_signal(signal.SIGINT)
            wait_until_gone(other)


def write_flows(folder: Path) -> Path:
    file = folder / "flows.py"
    file.write_text(FLOWS)
    return file


def test_a_worker_whose_profile_is_deleted_ends_with_a_sentence(shell: Shell) -> None:
    """It does not look for its broker for ever."""
    with shell.begin("broker", "run") as broker:
        wait_for_line(broker, "serving at")
        with shell.begin("worker") as worker:
            wait_for_line(worker, "taking processes")
            shutil.rmtree(shell.folder / ".prunus")
            code, _, error = wait_until_gone(worker)
        broker.kill()
    assert code == 1
    assert error.splitlines()[-1] == (
        "Error: the profile of this worker was deleted: there is nothing left to work for"
    )


def test_names_are_free_or_refused(shell: Shell) -> None:
    """Two workers do not have one name; what is no name is told so."""
    with broker_of(shell), shell.begin("worker", "--name", "gpu") as worker:
        wait_for_line(worker, "taking processes")
        assert re.search(r"foreground-gpu .*runs already", shell.error("worker", "--name", "gpu"))
    assert "not the name of a queue" in shell.error("worker", "-q", "control", code=2)
    assert "use letters" in shell.error("worker", "--name", "../x", code=2)
    assert "write a duration" in shell.error("worker", "--until", "soon", code=2)
    assert "say that too" in shell.error("worker", "--idle-grace", "3", code=2)


def test_a_worker_whose_lock_was_removed_holds_it_again(shell: Shell) -> None:
    """Its name is not given to another one."""
    path = profile_of(shell).lock("foreground-gpu")
    with broker_of(shell), shell.begin("worker", "--name", "gpu") as worker:
        wait_for_line(worker, "taking processes")
        path.unlink()
        while (holder := read_holder(path)) is None:
            time.sleep(0.01)
        assert holder.pid == worker.pid
        assert re.search(r"foreground-gpu .*runs already", shell.error("worker", "--name", "gpu"))


def test_a_broker_that_runs_is_not_run_again(shell: Shell) -> None:
    """`prunus broker run` is for those without a daemon; the lock decides."""
    with broker_of(shell):
        assert "runs already" in shell.process("broker", "run", code=1).stderr


def test_classes_are_imported_from_the_profile_and_from_here(shell: Shell) -> None:
    """As with the workers of the daemon, and the current folder before them."""
    (shell.folder / "below").mkdir()
    with broker_of(shell):
        pid = shell("launch", "flows:Quick").stdout.strip()
        below = Shell(shell.folder / "below")
        below.environment = shell.environment
        below.process("worker", "--until-idle", "--idle-grace", "0")
        assert shell.record(pid)["state"] == "finished"
