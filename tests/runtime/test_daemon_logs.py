"""Logs: no line is lost when they are rotated, and each can be read again, by people and by programs."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunus import Process
from prunus.runtime import daemon, logs
from prunus.runtime.logs import Follower, JsonFormatter, last_lines, last_words, open_log, parse, put_aside
from prunus.runtime.profile import Config, Profile


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "worker-1.log"


WRITER = """
import logging, os, subprocess, sys
from pathlib import Path
from prunus.runtime import logs
logs.MAX_LOG_BYTES = 500
logs.LOOK_INTERVAL_S = 1000
logs.configure(Path(sys.argv[1]), "worker-1")
child = subprocess.Popen(["sh", "-c", "read go; echo of a program"], stdin=subprocess.PIPE)
log = logging.getLogger("a")
keeper = logs.LogKeeper(Path(sys.argv[1]) / "logs" / "worker-1.log")
for number in range(100):
    log.info("record %d", number)
    print("print", number, flush=True)
    os.write(2, b"raw %d\\n" % number)
    if number in (24, 49, 74):
        keeper.look()
child.communicate(b"go\\n")
os.abort()
"""


def test_what_a_service_writes_is_all_in_its_logs(tmp_path: Path) -> None:
    """Records, prints, what goes past Python, what a program says that it started, and the stack of its own death:
    over several rotations while it runs."""
    profile = Profile.create(tmp_path / "profile", Config())
    with open_log(profile.log("worker-1")) as output:
        done = subprocess.run(
            [sys.executable, "-c", WRITER, str(profile.path)], stdout=output, stderr=output, timeout=25, check=False
        )
    assert done.returncode == -6
    files = sorted(profile.log_folder.iterdir())
    assert [file.name for file in files] == [f"worker-1.log{end}" for end in ("", ".1", ".2", ".3")]
    text = "".join(file.read_text() for file in reversed(files))
    for number in range(100):
        for what in ("record", "print", "raw"):
            assert f"{what} {number}\n" in text
    assert "of a program\n" in text
    assert "Fatal Python error: Aborted" in files[0].read_text()


def test_a_service_looks_after_its_log_by_itself(tmp_path: Path) -> None:
    """Also one that only prints."""
    profile = Profile.create(tmp_path / "profile", Config())
    program = (
        "import sys\nfrom pathlib import Path\nfrom prunus.runtime import logs\n"
        "logs.MAX_LOG_BYTES, logs.LOOK_INTERVAL_S = 100, 0.01\n"
        "folder = Path(sys.argv[1])\nlogs.configure(folder, 'worker-1')\n"
        "while not (folder / 'logs' / 'worker-1.log.1').exists():\n    print('a line', flush=True)\n"
    )
    with open_log(profile.log("worker-1")) as output:
        subprocess.run([sys.executable, "-c", program, str(profile.path)], stdout=output, timeout=25, stderr=output)


def test_a_log_that_somebody_else_moved_is_begun_anew(tmp_path: Path) -> None:
    """As logrotate does it."""
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom prunus.runtime import logs\n"
        "path = Path(sys.argv[1])\nkeeper = logs.LogKeeper(path)\n"
        "print('one', flush=True)\nkeeper.look()\npath.rename(path.with_name('moved'))\nkeeper.look()\n"
        "print('two', flush=True)\n"
    )
    path = tmp_path / "broker.log"
    with open_log(path) as output:
        subprocess.run([sys.executable, "-c", program, str(path)], stdout=output, stderr=output, timeout=25, check=True)
    assert (tmp_path / "moved").read_text() == "one\n"
    assert path.read_text() == "two\n"


def test_only_so_many_old_logs_are_kept(log: Path) -> None:
    """The oldest one goes."""
    for number in range(6):
        log.write_text(f"{number}\n")
        put_aside(log)
    assert sorted(file.read_text() for file in log.parent.iterdir()) == ["3\n", "4\n", "5\n"]


def test_a_terminal_is_left_alone(tmp_path: Path) -> None:
    """In the foreground nothing is rotated, and the file is not touched."""
    profile = Profile.create(tmp_path / "profile", Config())
    program = (
        "import logging, sys, threading\nfrom pathlib import Path\nfrom prunus.runtime import logs\n"
        "logs.configure(Path(sys.argv[1]), 'broker')\nlogging.getLogger('a').warning('hello')\n"
        "assert threading.active_count() == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(profile.path)], capture_output=True, text=True, timeout=25, check=True
    )
    assert done.stderr.endswith(" WARNING a: hello\n")
    assert not list(profile.log_folder.iterdir())


# --- JSON -------------------------------------------------------------------------------------------


def a_record(**extra: object) -> logging.LogRecord:
    try:
        raise ValueError("no\nway")
    except ValueError:
        record = logging.getLogger("prunus.x").makeRecord(
            "prunus.x", logging.ERROR, __file__, 1, "%d of\n%s", (1, "two"), sys.exc_info(), extra=extra
        )
    record.created = 1_700_000_000.123
    return record


def test_a_record_as_json_is_one_line_with_all_facts() -> None:
    """Also what JSON does not know, and the extra fields; none of these takes the place of a fact."""
    line = JsonFormatter("worker-1").format(a_record(pid="abc", path=Path("/x"), service="no", level="no"))
    assert "\n" not in line
    facts = json.loads(line)
    assert "ValueError: no\nway" in facts.pop("exception")
    assert facts == {
        "time": "2023-11-14T22:13:20.123Z",
        "level": "ERROR",
        "service": "worker-1",
        "logger": "prunus.x",
        "message": "1 of\ntwo",
        "pid": "abc",
        "path": "/x",
    }


def test_what_a_step_logs_names_its_process(capsys: pytest.CaptureFixture[str]) -> None:
    """Through whatever logger, and from the thread of a plain step."""

    class Speaker(Process):
        def run(self) -> None:
            logging.getLogger("a.library").warning("hello")

    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter("worker-1"))
    logging.getLogger("a.library").addHandler(handler)
    try:
        result = asyncio.run(Speaker().execute())
    finally:
        logging.getLogger("a.library").removeHandler(handler)
    assert json.loads(capsys.readouterr().err)["pid"] == result.pid


def test_both_formats_are_read_again() -> None:
    """With their time, level and logger; what was printed is no record."""
    record = a_record()
    in_json = parse(JsonFormatter("worker-1").format(record))
    in_text = parse(logging.Formatter(logs.TEXT_FORMAT).format(record).splitlines()[0])
    assert in_json is not None
    assert in_text is not None
    assert (in_json.level, in_json.logger, in_json.text) == ("ERROR", "prunus.x", "1 of\ntwo")
    assert (in_text.level, in_text.logger, in_text.text) == ("ERROR", "prunus.x", "1 of")
    assert in_json.at == pytest.approx(record.created, abs=0.001)
    assert in_json.severity == logging.ERROR
    for line in ("", "Traceback (most recent call last):", "{", '{"time": 1}', "a b ERROR c", "[1]", "one two three"):
        assert parse(line) is None


def test_services_log_in_json_if_the_profile_says_so(tmp_path: Path) -> None:
    """The whole way from config.yaml to the file; a profile that can't be read is no reason to be silent."""
    profile = Profile.create(tmp_path / "profile", Config(log_format="json"))
    program = (
        "import logging, sys\nfrom pathlib import Path\nfrom prunus.runtime import logs\n"
        "logs.configure(Path(sys.argv[1]), 'broker')\nlogging.getLogger('a').error('hello', extra={'pid': 'p'})\n"
    )
    ran = [
        subprocess.run(
            [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=25, check=True
        )
        for path in (profile.path, tmp_path / "nowhere")
    ]
    facts = json.loads(ran[0].stderr)
    assert (facts["message"], facts["pid"], facts["service"]) == ("hello", "p", "broker")
    assert ran[1].stderr.endswith("ERROR   a: hello\n")


@pytest.mark.parametrize("formatter", [JsonFormatter("broker"), logging.Formatter(logs.TEXT_FORMAT)])
def test_a_broker_that_gave_up_is_recognized(log: Path, formatter: logging.Formatter) -> None:
    """In both formats: `prunus daemon start` does not wait for it in vain."""
    record = a_record()
    record.levelname = "CRITICAL"
    log.write_text(f"{formatter.format(record)}\nIt is CRITICAL to look\n" * 3)
    assert daemon._gave_up(log, 0) == 3


# --- reading ----------------------------------------------------------------------------------------


def test_the_last_lines_go_back_over_a_rotation(log: Path) -> None:
    """A log that was begun a moment ago tells as much as an old one; `since` is about the newest only."""
    log.write_text("1\n2\n3\n")
    assert last_lines(log, 2) == ["2", "3"]
    put_aside(log)
    log.write_text("4\n5\n")
    assert last_lines(log, 3) == ["3", "4", "5"]
    assert last_lines(log, 3, since=2) == ["5"]
    assert last_lines(log, 0) == []
    assert last_lines(log.with_name("other.log"), 3) == []


FAULTY = """
import ctypes, threading, time
def meet_a_fault():
    ctypes.string_at(0)
print("about to begin")
for _ in range(30):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
if {in_thread}:
    threading.Thread(target=meet_a_fault).start()
    time.sleep(60)
meet_a_fault()
"""


@pytest.mark.parametrize("in_thread", [False, True])
def test_the_last_words_are_those_of_the_thread_that_failed(log: Path, in_thread: bool) -> None:
    """Not those of thirty others, which the interpreter writes too; and what was said before is there."""
    with log.open("w") as file:
        program = [sys.executable, "-uXfaulthandler", "-c", FAULTY.format(in_thread=in_thread)]
        assert subprocess.run(program, stdout=file, stderr=file, check=False).returncode == -signal.SIGSEGV
    words = last_words(log, 20)
    assert len(last_lines(log, 200)) > 100
    assert words[:2] == ["about to begin", "Fatal Python error: Segmentation fault"]
    assert words[2].startswith("Current thread")
    assert "in meet_a_fault" in "".join(words)
    assert words == last_words(log, len(words))
    assert last_words(log, 2) == words[1:3]
    assert last_words(log, 20, since=log.stat().st_size) == []


def test_the_last_words_without_a_fault_are_the_last_lines(log: Path) -> None:
    log.write_text("1\n2\n3\n")
    assert last_words(log, 2) == ["2", "3"]
    assert last_words(log, 0) == []


@pytest.fixture
def follower(log: Path) -> Iterator[Follower]:
    log.write_text("before\n")
    follower = Follower(log)
    yield follower
    follower.close()


def test_a_follower_misses_nothing_over_rotations(log: Path, follower: Follower) -> None:
    """What came before each rotation, and after it, in order: also if there were two of them since the last look."""
    assert list(follower.lines()) == []
    with log.open("a") as writer:
        writer.write("1\nhal")
        writer.flush()
        assert list(follower.lines()) == ["1"]
        put_aside(log)
        writer.write("f\n2\n")  # it still has the old file
    log.write_text("3\n")
    put_aside(log)
    log.write_text("4\n")
    assert list(follower.lines()) == ["half", "2", "3", "4"]
    put_aside(log)
    assert list(follower.lines()) == []
    log.write_text("5\n")
    assert list(follower.lines()) == ["5"]


def test_a_follower_of_a_log_that_comes_later(log: Path) -> None:
    """It reads it from its start; a log that is emptied is begun anew."""
    follower = Follower(log)
    assert list(follower.lines()) == []
    log.write_text("1\n2\n")
    assert list(follower.lines()) == ["1", "2"]
    os.truncate(log, 0)
    assert list(follower.lines()) == []
    log.write_text("3\n")
    assert list(follower.lines()) == ["3"]
    follower.close()
