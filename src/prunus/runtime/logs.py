"""Logs of services: written, kept short, read again.

A service logs to its standard error. Where that is its own log file (its supervisor opened it), a thread of
the service keeps the file short while it runs: when it is longer than `MAX_LOG_BYTES`, it becomes ``NAME.log.1``
(the ones before it ``.2`` and ``.3``), and a new file takes its place as standard output **and** standard error. So
whatever is written comes into a log: records, prints of steps, the traceback of a dying interpreter, and what the
programs say that a step started (those keep the file that they were given, under its new name). No line is lost,
because no byte is copied, and a full disk is no reason to end. The writer does it, not the supervisor: a supervisor
between a service and its log would take the log away when it dies. A file that somebody else moved
away (logrotate) is begun anew in the same way.

Two formats (``log_format`` in config.yaml): text, and JSON with one object a line:

=========  ==================================================================
time       UTC, ISO 8601 with milliseconds
level      ``INFO``, ``WARNING``, ``ERROR``, ``CRITICAL`` ...
service    ``broker``, ``worker-1``, ``daemon`` ...
logger     who says it
message    what it says
exception  a traceback, if there is one
pid        the process that it is about, or whose step says it, if there is one
...        the other extra fields of the record
=========  ==================================================================

What is printed past the logging (by a step, by an interpreter that dies) stays what it is in both.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import itertools
import json
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from prunus.errors import DaemonError, PrunusError
from prunus.files import why_refused
from prunus.runtime.profile import Profile

MAX_LOG_BYTES = 20 * 1024 * 1024
"""A longer log is put aside as ``NAME.log.1``."""
KEPT_LOGS = 3
"""So many are kept beside the newest one."""
LOOK_INTERVAL_S = 2.0
"""How often a service looks how long its log is."""
TAIL_BYTES = 65_536
"""No more is read from the end of a log."""
CHUNK_BYTES = 1024 * 1024

TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
Format = Literal["text", "json"]
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_LEVELS = logging.getLevelNamesMapping()
FAULT, CURRENT_THREAD = "Fatal Python error: ", "Current thread "
"""How `faulthandler` begins what it says of a fault, and the stack of the thread that had it."""


# --- writing ----------------------------------------------------------------------------------------


def configure(profile: Profile | Path | None, name: str, log_format: Format | None = None) -> None:
    """Let this process log as the service `name` of a profile (or of none), and keep its log short.

    A profile that can't be read is no error here: whoever needs it will say so, in this log. `log_format` stands
    above what the profile says.
    """
    if isinstance(profile, Path):
        try:
            profile = Profile.load(profile)
        except PrunusError:
            profile = None
    chosen = log_format or (profile.config.log_format if profile is not None else "text")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(name) if chosen == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError):  # no standard error
            faulthandler.enable(file=STANDARD_ERROR)
    if profile is not None and _is_open_as(STANDARD_ERROR, path := profile.log(name)):
        keeper = LogKeeper(path)
        threading.Thread(target=keeper.run, name="prunus-log-keeper", daemon=True).start()


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, service: str) -> None:
        super().__init__()
        from prunus.processes import stack  # a service that logs text need not know what a process is

        self._service = service
        self._process = stack.top

    def format(self, record: logging.LogRecord) -> str:
        time_ = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        facts: dict[str, Any] = {
            "time": time_.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {key: value for key, value in vars(record).items() if key not in _RECORD_FIELDS and key not in facts}
        if "pid" not in extra and (process := self._process()) is not None:  # a step says it
            extra["pid"] = process.pid
        if record.exc_info:
            facts["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            facts["stack"] = record.stack_info
        return json.dumps({**extra, **facts}, default=str, ensure_ascii=False)


class LogKeeper:
    """Keeps the log that is this process's standard error (and output) short."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self) -> None:
        """Look now and then, for ever."""
        while True:
            time.sleep(LOOK_INTERVAL_S)
            with contextlib.suppress(OSError):  # a full disk: it goes on in the file that there is
                self.look()

    def look(self) -> None:
        """Begin a new file if the log is too long, or if it is not at its place any more."""
        is_ours = _is_open_as(STANDARD_ERROR, self.path)
        if is_ours and os.fstat(STANDARD_ERROR).st_size <= MAX_LOG_BYTES:
            return
        streams = [number for number in (STANDARD_OUTPUT, STANDARD_ERROR) if _is_same(number, STANDARD_ERROR)]
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if is_ours:
            put_aside(self.path)
        new = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            for number in streams:
                os.dup2(new, number)
        finally:
            os.close(new)


def open_log(path: Path) -> IO[bytes]:
    """Open a log to append to; one that is too long is put aside first. `DaemonError` if it can't be written."""
    try:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > MAX_LOG_BYTES:
                put_aside(path)
        return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))
    except OSError as error:
        raise DaemonError(f"the log {path} can't be opened: {why_refused(path, error)}") from error


def put_aside(path: Path) -> None:
    """Rename a log, and those that were put aside before it; the oldest one goes."""
    for number in range(KEPT_LOGS, 0, -1):
        with contextlib.suppress(FileNotFoundError):
            _aside(path, number - 1).replace(_aside(path, number))


def _aside(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def _is_open_as(descriptor: int, path: Path) -> bool:
    """Whether this descriptor is the file at `path`."""
    try:
        one, other = os.fstat(descriptor), path.stat()
    except OSError:
        return False
    return stat.S_ISREG(one.st_mode) and (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _is_same(one: int, other: int) -> bool:
    try:
        return os.path.sameopenfile(one, other)
    except OSError:
        return False


# --- reading ----------------------------------------------------------------------------------------


class Entry(msgspec.Struct, frozen=True):
    """A record in a log, as it was read."""

    at: float | None
    """Wall clock, seconds since 1970."""
    level: str
    logger: str
    text: str

    @property
    def severity(self) -> int:
        return _LEVELS.get(self.level, 0)


def parse(line: str) -> Entry | None:
    """The record that is this line of a log, in either format; None if it is none (a print, part of a traceback)."""
    if line.startswith("{"):
        try:
            facts = json.loads(line)
            at = datetime.datetime.fromisoformat(facts["time"]).timestamp()
            return Entry(at, str(facts["level"]), str(facts["logger"]), str(facts["message"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    day, _, rest = line.partition(" ")
    clock, _, rest = rest.partition(" ")
    level, _, text = rest.partition(" ")
    if level not in _LEVELS:
        return None
    try:
        at = datetime.datetime.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M:%S,%f").timestamp()
    except ValueError:
        return None
    logger, _, text = text.strip().partition(": ")
    return Entry(at, level, logger, text)


def last_lines(path: Path, count: int, since: int = 0) -> list[str]:
    """The last lines of a log from byte `since` on, and of the one that was put aside last if these are too few and
    `since` is 0; none if there is no such file."""
    lines = _tail(path, since)[-count:] if count else []
    if len(lines) < count and not since:
        lines = [*_tail(_aside(path, 1), 0)[len(lines) - count :], *lines]
    return lines


def last_words(path: Path, count: int, since: int = 0) -> list[str]:
    """The last lines of the log of a program that has ended, from byte `since` on. What a fault handler wrote is cut
    to the sentence that names the fault and the stack of the thread that had it: behind it come those of all other
    threads, which may be more than `count` lines."""
    lines = _tail(path, since)
    fault = next((at for at in reversed(range(len(lines))) if lines[at].startswith(FAULT)), None)
    if fault is None:
        return lines[-count:] if count else []
    current = next((at for at in range(fault, len(lines)) if lines[at].startswith(CURRENT_THREAD)), len(lines))
    stack = list(itertools.takewhile(str.strip, lines[current:]))
    words = [lines[fault], *stack][:count]
    return [*lines[max(0, fault - (count - len(words))) : fault], *words]


def _tail(path: Path, since: int) -> list[str]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(since if since <= size else 0, size - TAIL_BYTES)
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
            return lines[1:] if start and start > since else lines  # the first one is cut
    except OSError:
        return []


class Follower:
    """Reads what is added to a log, over every rotation: of `KEPT_LOGS` that come between two looks no line is
    missed."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._rest = b""
        with contextlib.suppress(FileNotFoundError):
            self._file = path.open("rb")
            if not from_start:
                self._file.seek(0, os.SEEK_END)

    def lines(self) -> Iterator[str]:
        """All whole lines that came since the last time."""
        while True:
            if self._file is None:
                try:
                    self._file = self.path.open("rb")
                except FileNotFoundError:
                    return
            is_last = _is_open_as(self._file.fileno(), self.path)  # asked before it is read to its end
            yield from self._read()
            if is_last:
                return
            if self._rest:
                yield self._rest.decode(errors="replace")
                self._rest = b""
            following = self._following()
            self._file.close()
            try:
                self._file = following.open("rb")
            except FileNotFoundError:
                self._file = None
                return

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> Iterator[str]:
        assert self._file is not None, "it is open"
        if os.fstat(self._file.fileno()).st_size < self._file.tell():  # somebody emptied it
            self._file.seek(0)
        while chunk := self._file.read(CHUNK_BYTES):
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")

    def _following(self) -> Path:
        """The log that took the place of ours."""
        assert self._file is not None, "it is open"
        for number in range(KEPT_LOGS, 0, -1):
            if _is_open_as(self._file.fileno(), _aside(self.path, number)):
                return _aside(self.path, number - 1)
        return self.path
