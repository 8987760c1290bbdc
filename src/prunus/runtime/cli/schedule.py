"""``prunus schedule``: launch processes again and again, at times or at intervals.

A schedule is a process (`prunus.runtime.schedules`), so every other command takes it too; these know it by its name.
"""

from __future__ import annotations

import asyncio
import functools
import re
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from prunus.runtime.cli.connection import import_like_workers, with_controller
from prunus.runtime.cli.group import Group, Options

if TYPE_CHECKING:
    from zoneinfo import ZoneInfo

    from prunus.persistence.persister import Record
    from prunus.runtime.controller import ProcessController, ProcessHandle
    from prunus.runtime.timetable import Timetable

PREFIX = "schedule-"
"""The pid of a schedule begins so, and then comes its name."""
MAX_NAME_CHARS = 100
MAX_SAME_NAME = 1000
"""The most schedules that had the same name, one after the other."""
WIDE_COLUMNS = 160
"""On a terminal that is narrower, moments in a list are short."""
NEXT_SHOWN = 5
LAST_SHOWN = 5


class Seen(NamedTuple):
    """What is known of a schedule."""

    record: Record
    name: str
    inputs: dict[str, Any]
    context: dict[str, Any]
    timetable: Timetable
    zone: ZoneInfo
    runs: Sequence[Record]
    """Its newest runs, the newest first."""

    def next_runs(self, now_s: float, count: int) -> list[float]:
        """When its next runs begin."""
        from itertools import islice

        if self.record.is_terminal:
            return []
        left = count
        if (most := self.inputs["max_runs"]) is not None:
            left = min(count, most - self.context.get("runs", 0))
        begin_s = max(self.context.get("decided_s", int(self.record.created_at)), int(now_s - self.timetable.jitter_s))
        begins = map(self.timetable.begin_s, self.timetable.after(begin_s))
        return list(islice((at_s for at_s in begins if at_s > now_s), max(0, left)))

    @property
    def state(self) -> str:
        record = self.record
        if record.is_terminal:
            return record.state
        if record.aside is not None:
            return "set aside"
        return "on" if record.play == "playing" else record.play


@click.group(cls=Group)
def schedule() -> None:
    """Launch processes again and again."""


@schedule.command()
@click.argument("words", metavar='["CRON"] pkg.mod:Class [KEY=VALUE]...', nargs=-1, required=True)
@click.option("--every", metavar="INTERVAL", help="Not at times, but every 90s, 15min, 6h or 1d.")
@click.option("--anchor", metavar="TIME", help="The first fire time of an interval (else one interval from now).")
@click.option("--name", help="What to call it (else like the class).")
@click.option("--timezone", metavar="ZONE", help="Whose times they are: Europe/Zurich, UTC ... (else those of here).")
@click.option("--jitter", metavar="TIME", help="Each run begins up to so much later: 90s, 5min ...")
@click.option("--late", metavar="TIME", help="A run that begins up to so much late is not missed (60s).")
@click.option("--catch-up", type=click.Choice(["skip", "last", "all"]), help="What becomes of missed runs: nothing (the default), the last one has a run, or all have.")  # fmt: skip  # noqa: E501
@click.option("--overlap", type=click.Choice(["skip", "queue", "allow", "replace"]), help="What becomes of a run while the one before it goes on: it is left out (the default), waits, runs too, or takes its place.")  # fmt: skip  # noqa: E501
@click.option("--until", metavar="TIME", help="It ends then: 2026-12-31T18:00.")
@click.option("--max-runs", type=click.IntRange(1), help="It ends after so many runs.")
@click.option("--tag", "tags", multiple=True, help="A tag of each run; may be given often.")
@click.option("--queue", help="Which workers take the runs.")
@click.option("--priority", type=click.IntRange(0, 9), help="Of each run; 9 goes first.")
@click.option("--resource", "resources", metavar="NAME=N", multiple=True, help="Tokens that each run holds; may be given often.")  # fmt: skip  # noqa: E501
@click.pass_obj
def add(options: Options, /, words: tuple[str, ...], name: str | None, **given: Any) -> None:
    """Launch a process at the times of a cron expression, or at an interval.

    \b
    prunus schedule add "30 2 * * MON-FRI" mylab.backup:Backup folder=/data
    prunus schedule add --every 15min mylab.watch:Look

    The five fields are minute, hour, day of the month, month and day of the week. The class and the inputs are checked
    now. Prints the name.
    """
    from prunus.processes.loading import load_class
    from prunus.runtime.cli.processes import _warn_if_workers_lack
    from prunus.runtime.cli.values import read_inputs_of, read_tokens
    from prunus.runtime.schedules import Schedule

    every, anchor = given.pop("every"), given.pop("anchor")
    cron, identifier, inputs = _read_words(words, every)
    extra: dict[str, Any] = {
        "jitter_s": _seconds("--jitter", given.pop("jitter")),
        "late_s": _seconds("--late", given.pop("late")),
        "tags": list(given.pop("tags")) or None,
        "resources": read_tokens(given.pop("resources")) or None,
        **given,
    }
    if cron is None:
        extra["anchor"] = anchor
    elif anchor is not None:
        raise click.UsageError("--anchor goes with --every; a cron expression names its times itself")
    if name is not None and not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{MAX_NAME_CHARS - 1}}}", name):
        raise click.UsageError(f"--name: {name!r} is no name; take letters, digits, -, _ and .")
    _check_times(cron, every, extra)
    values = read_inputs_of(inputs)
    profile = options.local_profile()
    import_like_workers(profile)
    scheduled = load_class(identifier, ["*"] if profile is None else profile.config.modules)
    if profile is not None:
        _warn_if_workers_lack(scheduled, profile)
    # Wrong inputs are told at once, whether a daemon runs or not.
    if cron is None:
        written = Schedule.every(every, scheduled, values, **extra)
    else:
        written = Schedule.cron(cron, scheduled, values, **extra)

    async def go(controller: ProcessController) -> None:
        called, handle = await _launch(controller, written, name, _kebab(scheduled.__name__))
        click.echo(called)
        [seen] = await _look(controller, [await handle.record()], runs=0)
        begins = seen.next_runs(time.time(), 1)
        when = f"; its first run begins at {_moment(begins[0], seen.zone)}" if begins else ""
        click.echo(f"{seen.timetable.rhythm.words}{when}", err=True)

    with_controller(options, go, "waiting for the broker")


@schedule.command("list")
@click.option("-a", "--all", "everything", is_flag=True, help="Also those that have ended or were removed.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def list_(options: Options, everything: bool, as_json: bool) -> None:
    """Show the schedules, and when each runs next."""
    from prunus.runtime import display

    async def read(controller: ProcessController) -> list[Seen]:
        return await _look(controller, await _find_all(controller, everything), runs=1)

    found = with_controller(options, read, "waiting for the list of schedules")
    now_s = time.time()
    if as_json:
        click.echo(display.as_json([_as_data(seen, now_s) for seen in found]))
        return
    if not found:
        click.echo('No schedule; `prunus schedule add "0 2 * * *" pkg.mod:Class` makes one.', err=True)
        return
    console = display.console()
    moment = _moment if console.width >= WIDE_COLUMNS else functools.partial(_short_moment, now_s=now_s)
    has_long_names = any(len(seen.name) > console.width // 2 for seen in found)
    has_reasons = any(_why(seen.record) for seen in found)
    table = display.plain_table(
        *("name", "class", "when", "state", *["why"] * has_reasons, "next run", "last run", "runs", "missed"),
        elastic=("when", "why", *["name"] * has_long_names),
        dispensable=("missed", "runs", "class", "when", "why", "last run"),
    )
    for seen in found:
        record, begins = seen.record, seen.next_runs(now_s, 1)
        next_run = moment(begins[0], seen.zone) if begins and seen.state == "on" else ""
        last = seen.runs[0] if seen.runs else None
        table.add_row(
            seen.name,
            display.class_name(seen.inputs["process_class"]),
            seen.timetable.rhythm.words,
            seen.state,
            *[display.one_line(_why(record) or "")] * has_reasons,
            next_run,
            f"{moment(last.created_at, seen.zone)}, {last.state}" if last is not None else "",
            str(seen.context.get("runs", 0)),
            _missed(seen),
        )
    display.show(console, table)


@schedule.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def show(options: Options, name: str, as_json: bool) -> None:
    """All that is known of a schedule: when it runs next, and how its last runs went."""
    from prunus.runtime import display
    from prunus.runtime.timetable import duration_text, local_zone_name, read_zone

    async def read(controller: ProcessController) -> Seen:
        handle = (await _find(controller, [name]))[0]
        [seen] = await _look(controller, [await handle.record()], runs=LAST_SHOWN)
        return seen

    seen, now_s = with_controller(options, read, "waiting for the schedule"), time.time()
    if as_json:
        click.echo(display.as_json(_as_data(seen, now_s)))
        return
    inputs, console, here = seen.inputs, display.console(), read_zone(local_zone_name())
    timetable = seen.timetable
    facts: dict[str, str | None] = {
        "name": seen.name,
        "pid": seen.record.pid,
        "launches": inputs["process_class"],
        "when": f"{inputs['when']}  ({timetable.rhythm.words})",
        "state": seen.state,
        "why": _why(seen.record),
        "jitter": f"up to {duration_text(timetable.jitter_s)}" if timetable.jitter_s else None,
        "late": f"up to {duration_text(timetable.late_s)} is not missed",
        "catch up": inputs["catch_up"],
        "overlap": inputs["overlap"],
        "until": inputs["until"],
        "max runs": None if inputs["max_runs"] is None else str(inputs["max_runs"]),
        "runs": str(seen.context.get("runs", 0)),
        "missed": _missed(seen),
        "waiting": display.count(len(seen.context["queued"]), "run") if seen.context.get("queued") else None,
        **{name: _plain(inputs[name]) for name in ("tags", "queue", "priority", "resources") if inputs[name]},
    }
    display.show(console, display.facts_table(facts))
    if inputs["inputs"]:
        display.show(console, "\ninputs", "bold")
        display.show(console, display.as_yaml(inputs["inputs"]))
    if begins := seen.next_runs(now_s, NEXT_SHOWN):
        display.show(
            console, "\nnext runs" + ("" if seen.state == "on" else f" (not while it is {seen.state})"), "bold"
        )
        columns = ["in", seen.zone.key, *([f"here ({here.key})"] if here.key != seen.zone.key else [])]
        table = display.plain_table(*columns)
        for at_s in begins:
            zones = [seen.zone, *([here] if here.key != seen.zone.key else [])]
            table.add_row(display.span(at_s - now_s), *(_moment(at_s, zone) for zone in zones))
        display.show(console, table)
    if seen.runs:
        display.show(console, "\nlast runs", "bold")
        table = display.plain_table("pid", "state", "began", "took")
        for run in seen.runs:
            took = display.span(run.updated_at - run.created_at) if run.is_terminal else ""
            table.add_row(run.pid, run.state, _moment(run.created_at, seen.zone), took)
        display.show(console, table)


_names = click.argument("names", metavar="NAME...", nargs=-1, required=True)


@schedule.command()
@_names
@click.option("-m", "--message", help="Why; it is kept in the history.")
@click.pass_obj
def pause(options: Options, names: tuple[str, ...], message: str | None) -> None:
    """Launch nothing until they are played. Runs that are there go on."""
    _each(options, "paused", names, lambda handle: handle.pause(message))


@schedule.command()
@_names
@click.pass_obj
def play(options: Options, names: tuple[str, ...]) -> None:
    """Let paused schedules go on. What was missed meanwhile is made up for as --catch-up says."""
    _each(options, "playing", names, lambda handle: handle.play())


@schedule.command()
@_names
@click.pass_obj
def remove(options: Options, names: tuple[str, ...]) -> None:
    """End schedules for good. Runs that are there go on, and the name is free again."""
    _each(options, "removed", names, lambda handle: handle.kill("removed"))


@schedule.command("run-now")
@click.argument("name")
@click.pass_obj
def run_now(options: Options, name: str) -> None:
    """Launch a run now, beside those of its times, and print its pid."""

    async def go(controller: ProcessController) -> None:
        [handle] = await _find(controller, [name])
        click.echo(await handle.update("run_now"))

    import_like_workers(options.local_profile())
    with_controller(options, go, "waiting for a worker")


# --- what was typed -----------------------------------------------------------------------------------


def _read_words(words: Sequence[str], every: str | None) -> tuple[str | None, str, Sequence[str]]:
    """The cron expression (None with an interval), the class, and the inputs."""
    if every is not None:
        if " " in words[0].strip():
            raise click.UsageError("say when either by a cron expression or by --every, and not by both")
        return None, words[0], words[1:]
    if " " not in words[0].strip() and not words[0].startswith("@"):
        raise click.UsageError(
            'say when: a cron expression in quotes first ("30 2 * * *" is 02:30 each day), or --every 15min'
        )
    if len(words) == 1:
        raise click.UsageError("say what to launch: pkg.mod:Class after the cron expression")
    return words[0], words[1], words[2:]


def _check_times(cron: str | None, every: str | None, extra: dict[str, Any]) -> None:
    """What is wrong with a time is told as what was typed, and before anything is imported."""
    from prunus.runtime.timetable import read_cron, read_interval, read_moment, read_zone

    def check(option: str, read: Callable[[], object]) -> None:
        try:
            read()
        except ValueError as error:
            raise click.UsageError(f"{option}{error}") from error

    if cron is not None:
        check("", lambda: read_cron(cron))
    if every is not None:
        check("--every: ", lambda: read_interval(every))
    zone = extra.get("timezone") or "UTC"
    check("--timezone: ", lambda: read_zone(zone))
    for option, name in (("--anchor: ", "anchor"), ("--until: ", "until")):
        if extra.get(name) is not None:
            check(option, lambda text=extra[name]: read_moment(text, read_zone(zone)))  # type: ignore[misc]


def _seconds(option: str, text: str | None) -> float | None:
    from prunus.runtime.profile import seconds_of

    if text is None:
        return None
    try:
        return seconds_of(text)
    except ValueError as error:
        raise click.UsageError(f"{option}: {error}") from error


def _kebab(class_name: str) -> str:
    """``NightlyBackup`` as a name: ``nightly-backup``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", class_name).lower()


# --- schedules by their names -------------------------------------------------------------------------


async def _launch(
    controller: ProcessController, written: dict[str, Any], name: str | None, wanted: str
) -> tuple[str, ProcessHandle]:
    """Launch it under a pid that says its name. A name is free if no schedule that has not ended has it."""
    from prunus.runtime.schedules import Schedule

    taken = {seen.name for seen in await _look(controller, await _find_all(controller), runs=0)}
    if name is not None and name in taken:
        raise click.ClickException(
            f"there is a schedule {name} already: take another --name, or `prunus schedule remove {name}` first"
        )
    called = name or next(_free(wanted, taken))
    given = {**written, "name": called}
    for number in range(1, MAX_SAME_NAME):
        pid = f"{PREFIX}{called}{f'-{number}' if number > 1 else ''}"
        if (await _state_of(controller, pid)) is not None:
            continue  # one that has ended, and is kept
        handle = await controller.launch(Schedule, given, pid=pid)
        [seen] = await _look(controller, [await handle.record()], runs=0)
        if {key: seen.inputs[key] for key in given} == given:
            return called, handle
        break  # somebody else was faster
    raise click.ClickException(f"the name {called} is taken; take another --name")


def _free(wanted: str, taken: set[str]) -> Any:
    from itertools import count

    return (name for number in count(1) if (name := f"{wanted}-{number}" if number > 1 else wanted) not in taken)


async def _state_of(controller: ProcessController, pid: str) -> str | None:
    from prunus.errors import CheckpointNotFoundError

    try:
        return (await controller.handle(pid).record()).state
    except CheckpointNotFoundError:
        return None


async def _find_all(controller: ProcessController, everything: bool = False) -> list[Record]:
    from prunus.runtime.schedules import Schedule

    return await controller.processes(cls=Schedule, unfinished=not everything).records()


async def _look(controller: ProcessController, records: Sequence[Record], *, runs: int) -> list[Seen]:
    """What is known of these, with the newest `runs` runs of each."""
    from prunus.persistence.persister import Query
    from prunus.runtime.display import short, snapshot_of
    from prunus.runtime.schedules import timetable_of
    from prunus.runtime.timetable import read_zone

    async def one(row: Record) -> Seen:
        record = row if row.checkpoint is not None else await controller.handle(row.pid).record()
        snapshot = snapshot_of(record)
        inputs = snapshot["inputs"]
        children = await controller.find(Query(parent=record.pid, limit=runs)) if runs else ()
        return Seen(
            record,
            inputs["name"] or short(record.pid),
            inputs,
            snapshot.get("context", {}),
            timetable_of(record.pid, snapshot["created_at"], inputs),
            read_zone(inputs["timezone"]),
            children,
        )

    return list(await asyncio.gather(*map(one, records)))


async def _find(controller: ProcessController, names: Sequence[str]) -> list[ProcessHandle]:
    """The schedules of these names (or pids); of those that have ended the newest."""
    living = await _look(controller, await _find_all(controller), runs=0)
    ended: list[Seen] | None = None
    found: dict[str, ProcessHandle] = {}
    for name in names:
        match = [seen for seen in living if name in (seen.name, seen.record.pid)]
        if not match:
            if ended is None:
                ended = await _look(controller, await _find_all(controller, everything=True), runs=0)
            match = [seen for seen in ended if name in (seen.name, seen.record.pid)][:1]
        if not match:
            known = ", ".join(sorted(seen.name for seen in living))
            raise click.ClickException(f"there is no schedule {name}; there are: {known or 'none'}")
        pid = match[0].record.pid
        found[pid] = controller.handle(pid)
    return list(found.values())


def _each(options: Options, done: str, names: Sequence[str], one: Callable[[ProcessHandle], Awaitable[None]]) -> None:
    """Do one thing to each schedule; a failure of one does not keep it from the others."""
    from prunus.errors import PrunusError

    async def tell(handle: ProcessHandle) -> bool:
        try:
            await one(handle)
        except PrunusError as error:
            click.echo(f"Error: {handle.pid}: {error}", err=True)
            return False
        click.echo(f"{done} {handle.pid}")
        return True

    async def go(controller: ProcessController) -> bool:
        return all(await asyncio.gather(*map(tell, await _find(controller, names))))

    if not with_controller(options, go, "waiting for a worker"):
        sys.exit(1)


# --- as people and programs see it ----------------------------------------------------------------------


def _moment(at_s: float, zone: ZoneInfo) -> str:
    from prunus.runtime.schedules import moment_text

    return moment_text(at_s, zone)


def _short_moment(at_s: float, zone: ZoneInfo, now_s: float) -> str:
    """The same without what goes without saying: this year, today (there and here), a zone that is as late as here."""
    from datetime import datetime

    moment, now = datetime.fromtimestamp(at_s, zone), datetime.fromtimestamp(now_s, zone)
    day, clock, zone_name = _moment(at_s, zone).split(" ", 2)
    date = "" if moment.date() == now.date() == now.astimezone().date() else day[5:] if moment.year == now.year else day
    is_here = moment.utcoffset() == moment.astimezone().utcoffset()
    return " ".join(filter(None, [date, clock, "" if is_here else zone_name]))


def _why(record: Record) -> str | None:
    """Why it does not go on."""
    if record.is_terminal or (record.aside is None and record.play == "playing"):
        return None
    status = record.status or ""
    return record.aside or (None if status.startswith("next run ") else status or None)


def _missed(seen: Seen) -> str:
    missed, skipped = seen.context.get("missed", 0), seen.context.get("skipped", 0)
    return f"{missed}" + (f" (and {skipped} skipped)" if skipped else "")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={number}" for name, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _as_data(seen: Seen, now_s: float) -> dict[str, Any]:
    from datetime import datetime

    def iso(at_s: float) -> str:
        return datetime.fromtimestamp(at_s, seen.zone).isoformat(timespec="seconds")

    record = seen.record
    return {
        "name": seen.name,
        "pid": record.pid,
        **{key: value for key, value in seen.inputs.items() if key != "name"},
        "words": seen.timetable.rhythm.words,
        "state": seen.state,
        "why": _why(record),
        **{key: seen.context.get(key, 0) for key in ("runs", "missed", "skipped")},
        "waiting": len(seen.context.get("queued", ())),
        "next_runs": [iso(at_s) for at_s in seen.next_runs(now_s, NEXT_SHOWN)],
        "last_runs": [{"pid": run.pid, "state": run.state, "created_at": iso(run.created_at)} for run in seen.runs],
    }
