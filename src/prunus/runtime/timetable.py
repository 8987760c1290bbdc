"""When a schedule fires: cron expressions and intervals as fire times. All of it is pure; the time is an argument.

A **fire time** is a whole second since 1970. What a `Timetable` says of them is the same for everybody who asks, at any
time, on any machine: the pid of a run is made of its fire time, so a run that is launched twice is launched once.

Cron expressions (five fields: minute, hour, day of the month, month, day of the week) are read by `cronsim`, as
Debian's cron reads them. What a time zone makes of them is decided here, for any zone, also for those whose clocks
are not set by whole hours (`cronsim` alone loses runs in these):

* **Fixed times** (``30 2 * * *``: neither the minute nor the hour begins with a star) fire once for each time that the
  clock is to show. One that the clock leaps over in spring fires when it has leapt; of one that the clock shows twice
  in autumn the first counts.
* **Every so often** (``*/15 * * * *``, ``0 * * * *``) follows the clock: what it leaps over does not fire, what it
  shows twice fires twice.
* An interval (``every 6h``) knows no zones: it is so many seconds, counted from its anchor, always.

`due` decides which fire times are to be launched now; invariants: what it launches rises strictly, is after the last
fire time that was decided and not in the future, and of all fire times up to the one that it names as decided each is
launched or counted as missed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from pathlib import Path
from typing import Literal, NamedTuple, get_args
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

MIN_INTERVAL_S = 1
"""The shortest interval."""
MAX_JITTER_S = 86_400.0
"""The longest jitter; that of an interval is also not longer than the interval."""
DEFAULT_LATE_S = 60.0
"""A run that begins up to so many seconds late is not missed, if nobody says otherwise."""
MAX_CATCH_UP = 100
"""The most missed runs that are made up for at once, and the most that wait for their turn: the newest."""
MAX_COUNTED = 5000
"""The most fire times of a cron expression that are looked at one by one; of more missed runs only so many are counted
(those of an interval are always counted exactly)."""

CatchUp = Literal["skip", "last", "all"]
Overlap = Literal["skip", "queue", "allow", "replace"]
CATCH_UPS: tuple[str, ...] = get_args(CatchUp)
OVERLAPS: tuple[str, ...] = get_args(Overlap)

_EPOCH = datetime(1970, 1, 1)
_DAY_S = 86_400
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": _DAY_S}
_FIELDS = (
    ("minute", "0 to 59, say 30 or */15"),
    ("hour", "0 to 23, say 2 or 8-18"),
    ("day of the month", "1 to 31, or L for the last one, in one of the months that are named; say 1 or 1,15"),
    ("month", "1 to 12 or JAN to DEC, say */3"),
    ("day of the week", "0 to 7 (0 and 7 are Sunday) or SUN to SAT, say MON-FRI"),
)
"""The fields of a cron expression in their order, and what may stand there."""
_ALIASES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


# --- rhythms ----------------------------------------------------------------------------------------


class Between(NamedTuple):
    """The fire times in an interval of time."""

    number: int
    newest: tuple[int, ...]
    """Oldest first."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The anchor, and every `every_s` seconds after it."""

    every_s: int
    anchor_s: int

    @property
    def words(self) -> str:
        """What it means, for people."""
        return f"every {duration_text(self.every_s)}"

    def after(self, at_s: float) -> Iterator[int]:
        """The fire times after `at_s`, without an end."""
        number = max(0, int((at_s - self.anchor_s) // self.every_s) + 1)
        while True:
            yield self.anchor_s + number * self.every_s
            number += 1

    def between(self, after_s: int, to_s: int, keep: int) -> Between:
        """The fire times after `after_s` up to `to_s`; the newest `keep` of them by name."""
        first = next(self.after(after_s))
        if first > to_s:
            return Between(0, ())
        count = (to_s - first) // self.every_s + 1
        last = first + (count - 1) * self.every_s
        return Between(count, tuple(range(last - (min(count, keep) - 1) * self.every_s, last + 1, self.every_s)))


@dataclass(frozen=True, slots=True)
class Cron:
    """The times at which the clocks of `zone` show what `expression` says."""

    expression: str
    zone: ZoneInfo

    @property
    def words(self) -> str:
        """What it means, for people."""
        text: str = CronSim(self.expression, _EPOCH).explain()
        return f"{text[:1].lower()}{text[1:]}, {self.zone.key}"

    @property
    def is_fixed(self) -> bool:
        """Whether it names times, and not "every so often"."""
        minute, hour, *_ = self.expression.split()
        return not minute.startswith("*") and not hour.startswith("*")

    def after(self, at_s: float) -> Iterator[int]:
        """The fire times after `at_s`. They end if there is none in 50 years."""
        return self._fixed_times(int(at_s // 1)) if self.is_fixed else self._every_so_often(int(at_s // 1))

    def between(self, after_s: int, to_s: int, keep: int) -> Between:
        """The fire times after `after_s` up to `to_s`; the newest `keep` of them by name."""
        times = list(islice(self._up_to(after_s, to_s), MAX_COUNTED))
        if len(times) < MAX_COUNTED:
            return Between(len(times), tuple(times[-keep:]))
        span_s = 3600  # so many that the newest ones are near
        while True:
            begin_s = max(after_s, to_s - span_s)
            newest = deque(self._up_to(begin_s, to_s), maxlen=keep)
            if len(newest) == keep or begin_s == after_s:
                return Between(MAX_COUNTED, tuple(newest))
            span_s *= 4

    def _up_to(self, after_s: int, to_s: int) -> Iterator[int]:
        return takewhile(lambda at_s: at_s <= to_s, self.after(after_s))

    def _fixed_times(self, at_s: int) -> Iterator[int]:
        """For each time that matches the first moment at which the clock shows it, or a later time."""
        walls = CronSim(self.expression, _wall(at_s, _offset_s(self.zone, at_s)))
        for wall in _until_the_calendar_ends(walls):
            shown_s = self._first_shown(wall)
            if shown_s > at_s:
                yield shown_s
                at_s = shown_s

    def _first_shown(self, wall: datetime) -> int:
        shown_s = int(wall.replace(tzinfo=self.zone).timestamp())
        offset_s = _offset_s(self.zone, shown_s)
        leapt_s = _seconds(_wall(shown_s, offset_s)) - _seconds(wall)
        if leapt_s == 0:
            return shown_s
        # The clock never shows it: then when it leaps over it. (`timestamp` took the offset from before that.)
        change_s = _first_change(self.zone, shown_s - leapt_s, shown_s)
        return shown_s if change_s is None else change_s

    def _every_so_often(self, at_s: int) -> Iterator[int]:
        """Between two changes of its offset the clock of a zone goes evenly: walk from change to change."""
        while True:
            begin_s, change_s = at_s + 1, None
            offset_s = _offset_s(self.zone, begin_s)
            for wall in _until_the_calendar_ends(CronSim(self.expression, _wall(at_s, offset_s))):
                shown_s = _seconds(wall) - offset_s
                change_s = _first_change(self.zone, begin_s, shown_s)
                if change_s is not None:
                    at_s = change_s - 1
                    break
                yield shown_s
                begin_s = shown_s
            if change_s is None:
                return


def read_rhythm(when: str, zone: ZoneInfo, anchor_s: int) -> Cron | Interval:
    """What ``0 2 * * *`` or ``every 15min`` means. Raises `ValueError` that says which part is wrong."""
    words = when.split()
    if words[:1] == ["every"]:
        return Interval(read_interval(" ".join(words[1:])), anchor_s)
    return Cron(read_cron(when), zone)


def read_interval(text: str) -> int:
    """``90s``, ``15min``, ``6h`` or ``1d`` as seconds; `ValueError` for anything else."""
    found = re.fullmatch(r"([0-9]{1,9})\s*(s|min|h|d)", text)
    if found is None:
        raise ValueError(f"{text!r} is no interval: write a whole number with s, min, h or d, say 90s, 15min, 6h or 1d")
    every_s = int(found[1]) * _UNITS[found[2]]
    if every_s < MIN_INTERVAL_S:
        raise ValueError(f"an interval of {text} is too short: the shortest is {MIN_INTERVAL_S}s")
    return every_s


def read_cron(expression: str) -> str:
    """A cron expression in its plain form. Raises `ValueError` that says which field is wrong, and what it may be."""
    fields = expression.split()
    if len(fields) != 5:
        alias = _ALIASES.get(expression.strip().lower())
        hint = f"for {expression.strip()} write {alias!r}" if alias else "'30 2 * * MON-FRI' is 02:30 on working days"
        names = ", ".join(name for name, _ in _FIELDS)
        raise ValueError(
            f"{expression!r} has {len(fields)} field{'s' * (len(fields) != 1)}, and a cron expression has five "
            f"({names}): {hint}"
        )
    plain = " ".join(fields)
    try:
        CronSim(plain, _EPOCH)
    except CronSimError as error:
        for number, (name, allowed) in enumerate(_FIELDS):
            if _is_wrong(fields, number):
                raise ValueError(f"the {name} {fields[number]!r} in {plain!r} is wrong: it is {allowed}") from error
        raise ValueError(f"{plain!r} is no cron expression ({error})") from error
    return plain


def _is_wrong(fields: list[str], number: int) -> bool:
    """Whether this field is one that no other could mend."""
    alone = ["*"] * 5
    alone[number] = fields[number]
    if number == 2:  # whether there is such a day is a question to the months too
        alone[3] = fields[3]
        if _is_wrong(fields, 3):
            alone[3] = "*"
    try:
        CronSim(" ".join(alone), _EPOCH)
    except CronSimError:
        return True
    return False


def _until_the_calendar_ends(walls: CronSim) -> Iterator[datetime]:
    """All that the clock is to show, up to the year 9999."""
    with contextlib.suppress(OverflowError):
        yield from walls


def _wall(at_s: int, offset_s: int) -> datetime:
    """What a clock that is ahead by `offset_s` shows."""
    return _EPOCH + timedelta(seconds=at_s + offset_s)


def _seconds(wall: datetime) -> int:
    return int((wall - _EPOCH).total_seconds())


def _offset_s(zone: ZoneInfo, at_s: int) -> int:
    offset = datetime.fromtimestamp(at_s, zone).utcoffset()
    return 0 if offset is None else int(offset.total_seconds())


def _first_change(zone: ZoneInfo, begin_s: int, end_s: int) -> int | None:
    """The first second after `begin_s` up to `end_s` at which the offset is not the one of `begin_s`, if there is one.

    (Zones whose offset changes and changes back within a day do not exist.)
    """
    offset_s = _offset_s(zone, begin_s)
    low_s = begin_s
    while low_s < end_s:
        high_s = min(low_s + _DAY_S, end_s)
        if _offset_s(zone, high_s) != offset_s:
            while high_s - low_s > 1:
                middle_s = (low_s + high_s) // 2
                if _offset_s(zone, middle_s) == offset_s:
                    low_s = middle_s
                else:
                    high_s = middle_s
            return high_s
        low_s = high_s
    return None


# --- which are due ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timetable:
    """When a schedule fires, and what becomes of the fire times that nobody was there for."""

    rhythm: Cron | Interval
    seed: str = ""
    """Of the jitter: the pid of the schedule."""
    jitter_s: float = 0.0
    late_s: float = DEFAULT_LATE_S
    catch_up: CatchUp = "skip"
    until_s: float | None = None
    """No fire time is after this moment."""

    def after(self, at_s: float) -> Iterator[int]:
        """The fire times after `at_s`."""
        times = self.rhythm.after(at_s)
        until_s = self.until_s
        return times if until_s is None else takewhile(lambda fire_s: fire_s <= until_s, times)

    def next_after(self, at_s: float) -> int | None:
        """The first fire time after `at_s`; None if there is none any more."""
        return next(self.after(at_s), None)

    def begin_s(self, fire_s: int) -> float:
        """The moment at which the run of a fire time begins: a part of the jitter later, always the same part."""
        if not self.jitter_s:
            return float(fire_s)
        digest = hashlib.sha256(f"{self.seed}@{fire_s}".encode()).digest()
        return fire_s + self.jitter_s * int.from_bytes(digest[:8], "big") / 2**64


class Due(NamedTuple):
    """What `due` has decided."""

    launch: tuple[int, ...]
    """The fire times whose runs begin now, oldest first."""
    missed: int
    """How many others have passed, and will have no run."""
    decided_s: int
    """The newest fire time about which it is decided."""
    next_s: int | None
    """The next one; None if there is none any more."""


def due(timetable: Timetable, decided_s: int, now_s: float) -> Due:
    """What is to be launched at `now_s`, if all up to the fire time `decided_s` is decided already.

    Fire times are decided in their order: one whose jitter is long makes those behind it wait. One that is late by more
    than ``late_s`` was missed; what becomes of it is said by ``catch_up``:

    * ``skip``: nothing. Of several that are not late the newest has a run.
    * ``last``: the newest has a run, however late it is.
    * ``all``: each has one; of more than `MAX_CATCH_UP` the newest.
    """
    to_s = int(now_s // 1) if timetable.until_s is None else int(min(now_s, timetable.until_s) // 1)
    surely_s = int((to_s - timetable.jitter_s) // 1)  # up to here no jitter keeps anything
    passed = timetable.rhythm.between(decided_s, surely_s, MAX_CATCH_UP) if surely_s > decided_s else Between(0, ())
    count, newest = passed.number, deque(passed.newest, maxlen=MAX_CATCH_UP)
    for fire_s in timetable.after(max(decided_s, surely_s)):
        if fire_s > to_s or timetable.begin_s(fire_s) > now_s:
            break
        newest.append(fire_s)
        count += 1
    if not newest:
        return Due((), 0, decided_s, timetable.next_after(decided_s))
    launch: tuple[int, ...]
    match timetable.catch_up:
        case "skip":
            launch = (newest[-1],) if now_s - timetable.begin_s(newest[-1]) <= timetable.late_s else ()
        case "last":
            launch = (newest[-1],)
        case "all":
            launch = tuple(newest)
    return Due(launch, count - len(launch), newest[-1], timetable.next_after(newest[-1]))


class Turn(NamedTuple):
    """What becomes of fire times whose turn it is."""

    launch: tuple[int, ...]
    queued: tuple[int, ...]
    """These wait for the end of the run that is there."""
    skipped: int
    """How many have no run, because another one was in their way."""
    replaces: bool = False
    """The run that is there is to be killed."""


def take_turn(overlap: Overlap, is_busy: bool, queued: Iterable[int], fires: Iterable[int], room: int) -> Turn:
    """Which runs begin now. `is_busy`: a run of before has not ended. At most `room` wait: the newest.

    * ``skip``: while there is a run no other one begins.
    * ``queue``: they run one after the other.
    * ``allow``: they run at the same time.
    * ``replace``: the run that is there is killed; the newest begins when it has ended.
    """
    fires, line = tuple(fires), (*queued, *fires)
    match overlap:
        case "allow":
            return Turn(line, (), 0)
        case "skip":
            launch = () if is_busy else line[-1:]
            return Turn(launch, (), len(line) - len(launch))
        case "queue":
            launch, waiting = ((), line) if is_busy else (line[:1], line[1:])
            kept = waiting[max(0, len(waiting) - room) :]
            return Turn(launch, kept, len(waiting) - len(kept))
        case "replace":
            newest = line[-1:]
            skipped = len(line) - len(newest)
            return Turn((), newest, skipped, bool(fires)) if is_busy else Turn(newest, (), skipped)


# --- texts ------------------------------------------------------------------------------------------


def stamp(fire_s: int) -> str:
    """A fire time as part of a pid: ``2026-11-21T02:00Z``, with seconds only if there are some."""
    return f"{datetime.fromtimestamp(fire_s, UTC):{'%Y-%m-%dT%H:%M' if fire_s % 60 == 0 else '%Y-%m-%dT%H:%M:%S'}}Z"


def duration_text(seconds: float) -> str:
    """``90s``, ``15min``, ``6h``, ``1d``: the largest unit of which it is a whole number."""
    for unit in ("d", "h", "min"):
        if seconds >= _UNITS[unit] and seconds % _UNITS[unit] == 0:
            return f"{int(seconds // _UNITS[unit])}{unit}"
    return f"{seconds:g}s"


def read_moment(text: str, zone: ZoneInfo) -> float:
    """A date and time in the form of ISO 8601 (``2026-11-21T02:00``, ``2026-11-21``), in `zone` if it names none, in
    seconds since 1970. Raises `ValueError`."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no date or time: write it like 2026-11-21T02:00 or 2026-11-21") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=zone)).timestamp()


def read_zone(name: str) -> ZoneInfo:
    """A time zone by its name. Raises `ValueError`."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        hint = (
            "" if available_timezones() else " (none at all: install the package tzdata of this computer, or of Python)"
        )
        raise ValueError(
            f"{name!r} is no time zone that is known here{hint}; say its name, like Europe/Zurich or America/New_York"
        ) from None


def local_zone_name(environment: dict[str, str] | None = None, root: Path = Path("/")) -> str:
    """The name of the time zone of this computer; ``UTC`` if it can't be found out."""
    candidates = [(os.environ if environment is None else environment).get("TZ", "").removeprefix(":")]
    link = root / "etc" / "localtime"
    if link.is_symlink():
        candidates.append(str(link.resolve()).partition("/zoneinfo/")[2])
    file = root / "etc" / "timezone"
    if file.is_file():
        candidates.append(file.read_text(encoding="utf-8", errors="replace").strip())
    for name in candidates:
        if name:
            try:
                return read_zone(name).key
            except ValueError:
                continue
    return "UTC"
