"""How a daemon is, on one screen: what runs, since when, what it does, and what is wrong.

`look` gathers the facts (locks, notes of the supervisor, processes of the system, the broker's own numbers, ends of
logs), `problems_of` judges them, `picture` shows them. The last two are pure. Nothing here asks the supervisor: what
is true can be seen also if there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal

import msgspec
import psutil
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import prunus
from prunus.errors import ProfileError, PrunusError
from prunus.messaging.liveness import this_peer
from prunus.persistence.persister import Query, Record
from prunus.runtime import logs
from prunus.runtime.backend import BrokerStatus
from prunus.runtime.controller import connect
from prunus.runtime.daemon import DaemonStatus, status
from prunus.runtime.display import class_name, count, facts_table, moment, peer, plain, plain_table, short, span, word
from prunus.runtime.locks import Holder
from prunus.runtime.overview import SILENT_S, queue_table, size
from prunus.runtime.profile import Profile
from prunus.runtime.roster import BROKER, HEALTHY_S, WORKER_PREFIX, in_order
from prunus.runtime.services import End, Notes, ServiceNote, read_notes
from prunus.runtime.wish import Wish, read_wish

ASK_TIMEOUT_S = 2.0
"""A broker that does not answer within this time does not answer."""
SAMPLE_S = 0.2
"""Over what time the load of the processors is measured, if it is looked at only once."""
CALL_S = 10.0
"""A worker that has not called the broker so long after its start is a problem."""
LITTLE_SPACE_BYTES = 1024**3
MANY_RESTARTS = 3
"""So many ends that nobody asked for, within `RECENT_S`, are a problem even if the service runs."""
RECENT_S = 600.0
MAX_IN_HAND = 3
"""So many of the processes of a worker are named, the newest."""
MAX_READ = 500
"""Of so many running processes it is looked who has them."""
MAX_UNSERVED = 50
"""Of so many queues that nobody serves it is looked whether their tasks are processes."""
MAX_SAID = 5
"""So many lines of the logs are shown."""
REASON_LINES = 3
WARNING, ERROR = 30, 40

ServiceState = Literal["running", "starting", "ending", "flapping", "not running", "on its own"]
_STYLES = {"running": "green", "not running": "red", "flapping": "red"}


class InHand(msgspec.Struct, frozen=True, kw_only=True):
    """A process that a worker drives now."""

    pid: str
    class_id: str
    step: str | None
    since: float
    """When it was saved last (wall clock)."""


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """The broker, a worker, or the supervisor itself (which is called daemon)."""

    name: str
    state: ServiceState
    pid: int | None = None
    since: float | None = None
    """Wall clock, seconds since 1970, as all times here."""
    restarts: int = 0
    """How often it ended without being asked, since the daemon was started ..."""
    recent_restarts: int = 0
    """... and in the last `RECENT_S`."""
    cpu_percent: float | None = None
    """Of one processor, of it and all programs that it started."""
    memory_bytes: int | None = None
    """Resident, of it and all programs that it started."""
    programs: int = 0
    """How many processes of the system these are."""
    last_end: End | None = None
    last_fault: str | None = None
    """How it ended when it last did so without being asked ..."""
    is_mended: bool = False
    """... and it was replaced since, because somebody asked for that."""
    reason: tuple[str, ...] = ()
    """The last lines that it wrote before it ended without being asked, if it does not run since."""
    start_at: float | None = None
    """When it is tried again."""
    is_old: bool = False
    """A reload has yet to replace it."""
    slots: int | None = None
    used: int | None = None
    """How many processes a worker has in hand; None if the broker does not say."""
    silent_s: float | None = None
    """How long the broker has not heard it."""
    queues: tuple[str, ...] = ()
    in_hand: tuple[InHand, ...] = ()
    log: str = ""


class Said(msgspec.Struct, frozen=True):
    """A warning or an error in a log."""

    at: float
    service: str
    level: str
    text: str


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """All facts. The names of its fields are those of ``--json``."""

    profile: str
    """Its folder."""
    name: str
    version: str
    """Of Prunus, that looks."""
    daemon: int | None
    """The pid of the supervisor."""
    since: float | None
    daemon_version: str | None
    services: dict[str, Service]
    """Those that run, the broker first."""
    missing: dict[str, Service]
    """Those that should."""
    supervisor: Service | None
    broker: BrokerStatus | None
    """What it says of itself; None if it does not answer, or does not run."""
    process_queues: tuple[str, ...] = ()
    """Those queues that nobody serves, with something ready, whose tasks are processes."""
    broker_error: str | None = None
    network_error: str | None = None
    """What is wrong with how the broker listens on a network, or would after its next start."""
    disk_free_bytes: int
    database_bytes: int
    reloading: int = 0
    """How many services a reload has yet to replace."""
    other_workers: int = 0
    """How many workers there are that this daemon did not start (`prunus worker`) ..."""
    others: dict[str, Service] = {}
    """... and what is known of each."""
    said: tuple[Said, ...] = ()
    """The last warnings and errors in the logs."""
    problems: tuple[str, ...] = ()
    """What is wrong and what to do, the worst first. Nothing: all is well."""

    @property
    def is_well(self) -> bool:
        return not self.problems


# --- looking ----------------------------------------------------------------------------------------


class Load:
    """The processors and the memory that processes use: needs two looks to tell of processors."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[float, float]] = {}

    def look(self, pids: Iterable[int]) -> dict[int, tuple[float | None, int, int]]:
        """For each of these processes: the processors that it and its programs used since the last look (percent of
        one; None at the first look), their resident bytes, and how many they are."""
        members: dict[int, list[psutil.Process]] = {pid: [] for pid in pids}
        parents: dict[int, int] = {}
        processes = list(psutil.process_iter(["ppid"]))
        for process in processes:
            parents[process.pid] = process.info["ppid"]
        for process in processes:
            if (owner := _owner(process.pid, members, parents)) is not None:
                members[owner].append(process)
        found = {}
        now = time.monotonic()
        for pid, group in members.items():
            used, memory, programs = 0.0, 0, 0
            for process in group:
                with contextlib.suppress(psutil.Error):
                    with process.oneshot():
                        times = process.cpu_times()
                        memory += process.memory_info().rss
                    used += times.user + times.system
                    programs += 1
            before = self._before.get(pid)
            percent = (
                None if before is None or now <= before[0] else 100 * max(0.0, used - before[1]) / (now - before[0])
            )
            self._before[pid] = now, used
            found[pid] = percent, memory, programs
        return found


def _owner(pid: int, members: dict[int, list[psutil.Process]], parents: dict[int, int]) -> int | None:
    """Whose program this is: that of the nearest of `members` above it, or of the leader of its session."""
    seen, each = set(), pid
    while each and each not in seen:
        if each in members:
            return each
        seen.add(each)
        each = parents.get(each, 0)
    try:
        leader = os.getsid(pid)
    except OSError:
        return None
    return leader if leader in members else None


def watched(profile: Profile) -> list[int]:
    """The pids of the daemon and its services, for a first look of `Load`."""
    now = status(profile)
    return [holder.pid for holder in (now.daemon, *now.services.values()) if holder is not None]


async def look(profile: Profile, load: Load) -> Health:
    """How the daemon of this profile is now. With a `load` that has looked before, the processors are known too."""
    now, notes = status(profile), read_notes(profile)
    broker, records, broker_error = None, list[Record](), None
    process_queues: tuple[str, ...] = ()
    if BROKER in now.services:
        try:
            broker, records, process_queues = await _ask(profile)
        except (PrunusError, TimeoutError, OSError) as error:
            broker_error = str(error) or f"it does not answer within {ASK_TIMEOUT_S:.0f} s"
    holders = {**({"daemon": now.daemon} if now.daemon is not None else {}), **now.services}
    loads = load.look(holder.pid for holder in holders.values())
    wish = _wish(profile)
    services = {
        name: _service(profile, name, holder, now, notes, loads[holder.pid], broker, records, wish)
        for name, holder in holders.items()
    }
    supervisor = services.pop("daemon", None)
    missing = {name: _missing(profile, name, notes.services.get(name, ServiceNote())) for name in now.wanted}
    missing = {name: service for name, service in missing.items() if name not in now.services}
    others = _others(broker, [holder.pid for holder in now.services.values()], records)
    health = Health(
        profile=str(profile.path),
        name=profile.name,
        version=prunus.__version__,
        daemon=now.daemon.pid if now.daemon else None,
        since=now.daemon.since if now.daemon else None,
        daemon_version=notes.version or None if now.daemon else None,
        services=services,
        missing=missing,
        supervisor=supervisor,
        broker=broker,
        process_queues=process_queues,
        broker_error=broker_error,
        network_error=network_error(profile, is_running=broker is not None),
        disk_free_bytes=shutil.disk_usage(profile.path).free,
        database_bytes=profile.database.stat().st_size if profile.database.exists() else 0,
        other_workers=len(others),
        others=others,
        reloading=sum(service.is_old for service in services.values()),
        said=tuple(_said(profile, ["daemon", *now.services, *missing], now.daemon.since if now.daemon else 0.0)),
    )
    return msgspec.structs.replace(health, problems=tuple(problems_of(health, time.time())))


def absence(profile: Profile, name: str) -> str:
    """Why a service that should run does not, as far as that is known: how it ended, and what it said last."""
    note = read_notes(profile).services.get(name, ServiceNote())
    return _absence(_missing(profile, name, note), time.time())


def network_error(profile: Profile, *, is_running: bool) -> str | None:
    """What is wrong with how the broker listens on a network if it runs, or would after its next start."""
    try:
        profile.check_keys()
        if profile.config.listen:
            profile.keys.clients()
    except ProfileError as error:
        return str(error)
    wanted, listening = profile.config.listen, profile.listening()
    if not is_running or set(listening) == set(wanted):
        return None
    return (
        f"the broker listens at {', '.join(listening.values()) or 'no place on a network'}, but `listen` in "
        f"{profile.path / 'config.yaml'} was changed to {', '.join(wanted) or 'none'} since it was started; "
        "`prunus daemon restart` makes that take effect"
    )


async def _ask(profile: Profile) -> tuple[BrokerStatus, list[Record], tuple[str, ...]]:
    """What the broker says of itself, the processes that may run, and `Health.process_queues`."""
    async with asyncio.timeout(ASK_TIMEOUT_S), connect(profile) as controller:
        broker = msgspec.convert(await controller.broker_statistics(), BrokerStatus)
        records = await controller.find(Query(states=("running", "created"), limit=MAX_READ))
        queues = []
        for name in itertools.islice(_unserved(broker), MAX_UNSERVED):
            if await controller.find(Query(queue=name, unfinished=True, limit=1)):
                queues.append(name)
        return broker, list(records), tuple(queues)


def _unserved(broker: BrokerStatus) -> Iterator[str]:
    """The queues in which something is ready, and which nobody serves."""
    return (name for name, queue in sorted(broker.queues.items()) if queue.ready and not queue.subscribers)


def _wish(profile: Profile) -> Wish:
    with contextlib.suppress(PrunusError):
        return read_wish(profile) or Wish()
    return Wish()


def _service(
    profile: Profile,
    name: str,
    holder: Holder,
    now: DaemonStatus,
    notes: Notes,
    load: tuple[float | None, int, int],
    broker: BrokerStatus | None,
    records: Sequence[Record],
    wish: Wish,
) -> Service:
    """What is known of a service that runs."""
    note = notes.services.get(name, ServiceNote())
    uptime_s = time.time() - holder.since
    is_wanted = name in now.wanted or name == "daemon"
    state = state_of_running(name, now, note, uptime_s)
    wanted_generation = wish.broker_reloads if name == BROKER else wish.reloads
    generation = note.generation if note.is_about(holder) else 0
    service = Service(
        name=name,
        state=state,
        pid=holder.pid,
        since=holder.since,
        restarts=note.restarts,
        recent_restarts=_recent(note),
        cpu_percent=load[0],
        memory_bytes=load[1],
        programs=load[2],
        last_end=note.last_end,
        last_fault=note.evidence.how if note.evidence else None,
        is_mended=bool(note.evidence and note.last_end and note.last_end.asked and note.last_end.at > note.evidence.at),
        is_old=is_wanted and name != "daemon" and generation < wanted_generation,
        log=str(profile.log(name)),
    )
    if not name.startswith(WORKER_PREFIX):
        return service
    service = msgspec.structs.replace(service, slots=profile.config.slots, queues=tuple(profile.config.queues))
    here = this_peer().host
    for session, facts in (broker.sessions if broker else {}).items():
        if facts.pid == holder.pid and facts.host == here and facts.connected and (facts.held or facts.credit):
            in_hand = _in_hand(session, records)
            return msgspec.structs.replace(service, used=facts.held, silent_s=facts.silent_s, in_hand=in_hand)
    if state == "running" and (broker is not None or uptime_s < HEALTHY_S):  # (else nobody knows more of it)
        return msgspec.structs.replace(service, state="starting")
    return service


def state_of_running(name: str, now: DaemonStatus, note: ServiceNote, uptime_s: float) -> ServiceState:
    """The state of a service that runs."""
    if now.daemon is None:
        return "on its own"
    if name != "daemon" and name not in now.wanted:
        return "ending"
    return "flapping" if note.flapping and uptime_s < HEALTHY_S else "running"


def state_of_missing(note: ServiceNote, now: float) -> ServiceState:
    """The state of a service that should run and does not, at the wall-clock time `now`."""
    if note.last_end is not None and note.last_end.asked and note.last_end.at > now - CALL_S:
        return "starting"  # it is just being replaced
    return "flapping" if note.flapping else "not running"


def _missing(profile: Profile, name: str, note: ServiceNote) -> Service:
    """What is known of a service that should run and does not."""
    return Service(
        name=name,
        state=state_of_missing(note, time.time()),
        restarts=note.restarts,
        recent_restarts=_recent(note),
        last_end=note.last_end,
        reason=tuple(_telling(note.evidence.log) if note.evidence else ()),
        start_at=note.start_at,
        log=str(profile.log(name)),
    )


def _others(broker: BrokerStatus | None, pids: Collection[int], records: Sequence[Record]) -> dict[str, Service]:
    """The workers that are no service of this daemon, by their names; those of other hosts are told apart by a part
    of the host's name."""
    from prunus.runtime.worker import CONTROL_SLOTS

    here, found = this_peer().host, dict[str, Service]()
    for session, facts in sorted(broker.sessions.items() if broker else ()):
        is_ours = facts.host == here and facts.pid in pids
        if is_ours or not facts.connected or not (facts.credit or facts.held):
            continue
        name = peer(session)
        if name in found or facts.host != here:
            name = f"{name} on {facts.host[:8]}"
        found[name if name not in found else session] = Service(
            name=name,
            state="on its own",
            pid=facts.pid,
            slots=max(facts.held, facts.held + facts.credit - CONTROL_SLOTS),
            used=facts.held,
            silent_s=facts.silent_s,
            in_hand=_in_hand(session, records),
        )
    return found


def _in_hand(session: str, records: Sequence[Record]) -> tuple[InHand, ...]:
    held = [row for row in records if row.owner == session][:MAX_IN_HAND]
    return tuple(InHand(pid=row.pid, class_id=row.class_id, step=row.step, since=row.updated_at) for row in held)


def _recent(note: ServiceNote) -> int:
    return sum(at > time.time() - RECENT_S for at in note.ends)


def _telling(text: str) -> list[str]:
    """The lines that tell most: the last ones."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-REASON_LINES:]


def _said(profile: Profile, names: Iterable[str], since: float) -> list[Said]:
    """The last warnings and errors in the logs."""
    said = []
    for name in dict.fromkeys(names):
        for line in logs.last_lines(profile.log(name), 1000):
            entry = logs.parse(line)
            if entry is not None and entry.severity >= WARNING and (entry.at or 0.0) >= since:
                said.append(Said(entry.at or 0.0, name, entry.level, entry.text))
    return sorted(said, key=lambda each: each.at)[-MAX_SAID:]


# --- judging ----------------------------------------------------------------------------------------


def problems_of(health: Health, now: float) -> list[str]:
    """What is wrong and what to do: a sentence each, the worst first."""
    problems = []
    is_alone = health.daemon is None and health.broker is not None and set(health.services) <= {BROKER}
    if health.daemon is None and not (is_alone and health.others):  # (`prunus worker` alone is enough)
        what = "takes over what runs" if health.services else "starts it"
        problems.append(f"No daemon runs; `prunus daemon start` {what}.")
    problems += [_absence(service, now) for service in health.missing.values() if service.state != "starting"]
    if health.broker_error is not None:
        problems.append(f"The broker does not answer ({health.broker_error}); `prunus daemon logs broker` may say why.")
    if health.network_error is not None:
        problems.append(f"{health.network_error[:1].upper()}{health.network_error[1:]}.")
    if health.broker is not None and health.broker.disk_full:
        problems.append("The disk is full: new work is refused until there is more space; free some.")
    elif health.disk_free_bytes < LITTLE_SPACE_BYTES:
        problems.append(f"Only {size(health.disk_free_bytes)} are free on the disk of the profile; free some space.")
    return problems + warnings_of(health, now)


def warnings_of(health: Health, now: float) -> list[str]:
    """What is wrong with what runs: a sentence each."""
    problems = []
    for service in health.services.values():
        problems += _troubles(service, health, now)
    if health.broker is not None:
        has_workers = any(each.used is not None for each in health.services.values())
        for name in _unserved(health.broker) if has_workers else ():
            problems.append(_nobody_serves(name, health.broker.queues[name].ready, name in health.process_queues))
    if health.daemon_version not in (None, health.version):
        problems.append(
            f"The daemon runs Prunus {health.daemon_version}, and this is {health.version}; `prunus daemon restart` "
            "makes it the same."
        )
    return problems


def _nobody_serves(queue: str, ready: int, of_processes: bool) -> str:
    wait = f"{count(ready, 'task')} of the queue {plain(queue)} {'waits' if ready == 1 else 'wait'} for"
    if not of_processes:
        return f"{wait} a program that takes them: start it; `prunus tasks --queue {word(queue)}` lists them."
    return (
        f"{wait} a worker that takes it: add it to `queues` in config.yaml and `prunus daemon reload`, or start one "
        f"with `prunus worker -q {word(queue)}`."
    )


def _absence(service: Service, now: float) -> str:
    end = service.last_end
    text = f"{service.name} does not run"
    if end is not None:
        text += f": it ended {end.how} {span(now - end.at)} ago, after {span(end.ran_s)}"
        if service.restarts > 1:
            text += f" ({service.restarts} times so far)"
    text += "."
    if service.reason:
        text += f" It said last: {plain(service.reason[-1].strip())!r}."
    if service.start_at is not None and service.start_at > now + 0.5:
        text += f" It is tried again in {span(service.start_at - now)}."
    return f"{text} Look at `prunus daemon logs {service.name}`."


def _troubles(service: Service, health: Health, now: float) -> list[str]:
    troubles = []
    name, uptime_s = service.name, now - (service.since or now)
    has_notes = f"`prunus daemon logs {name}` may say why"
    if service.state == "flapping" or (service.recent_restarts >= MANY_RESTARTS and not service.is_mended):
        how = f", last {service.last_fault}" if service.last_fault else ""
        times = f"{service.recent_restarts} times in the last {RECENT_S / 60:.0f} minutes"
        troubles.append(f"{name} ended {times}{how}; {has_notes}.")
    is_worker, is_known = name.startswith(WORKER_PREFIX), health.broker is not None
    if is_worker and is_known and service.used is None and uptime_s > CALL_S and service.state != "ending":
        troubles.append(f"{name} runs, but is not connected to the broker; {has_notes}.")
    if service.silent_s is not None and service.silent_s > SILENT_S:
        troubles.append(
            f"{name} (pid {service.pid}) was not heard for {span(service.silent_s)}: it is stopped or blocked. Its "
            f"processes go to others when its lease is over; `kill -9 {service.pid}` makes that happen now."
        )
    return troubles


# --- showing ----------------------------------------------------------------------------------------


def picture(health: Health, now: float) -> RenderableType:
    """The screen; what is wrong stands before what may not fit on it."""
    parts: list[RenderableType] = [facts_table(_facts(health, now))]
    if health.problems:
        parts += [Text(), *(Text(f"! {problem}", "red") for problem in health.problems)]
    parts += [Text(), _service_table(health, now)]
    if any(service.slots is not None for service in (*health.services.values(), *health.others.values())):
        parts += [Text(), _work_table(health)]
    if health.broker is not None and health.broker.queues:
        parts += [Text(), queue_table(health.broker)]
    if health.said:
        parts += [Text(), *_said_lines(health, now)]
    return Group(*parts)


def _facts(health: Health, now: float) -> dict[str, str | Text | None]:
    daemon: str | Text = Text("no daemon runs", "red" if health.problems else "")
    if health.daemon is not None and health.since is not None:
        daemon = f"pid {health.daemon}, up for {span(now - health.since)}, since {moment(health.since)}"
    broker = health.broker
    facts: dict[str, str | Text | None] = {
        "profile": health.name,
        "daemon": daemon,
        "version": f"Prunus {health.daemon_version or health.version}",
        "reload": f"{count(health.reloading, 'service')} to be replaced yet" if health.reloading else None,
    }
    if broker is not None:
        settled = sum(queue.settled_per_s for queue in broker.queues.values())
        states = ", ".join(f"{number:,} {state}" for state, number in broker.processes.items() if number)
        facts["processes"] = states or "none"
        facts["broker"] = (
            f"{count(sum(each.connected for each in broker.sessions.values()), 'session')}, "
            f"{settled:.1f} tasks/s done in the last minute"
        )
        facts["other workers"] = str(health.other_workers) if health.other_workers else None
    database = broker.database_bytes if broker is not None else health.database_bytes
    facts["disk"] = f"{size(database)} database, {size(health.disk_free_bytes)} free"
    return facts


def _service_table(health: Health, now: float) -> Table:
    """One row a service, also those that should run and do not."""
    everyone = [*([health.supervisor] if health.supervisor else []), *health.services.values()]
    everyone += health.missing.values()
    has_news = any(service.pid is None for service in everyone)
    columns = ["service", "pid", "state", "up for", "restarts", "CPU", "memory", *(["last"] if has_news else [])]
    table = plain_table(*columns, elastic="last")
    for column in table.columns[4:7]:
        column.justify = "right"
    if health.supervisor is None:
        table.add_row("daemon", "", Text("not running", "red"))
    for service in sorted(everyone, key=_place):
        up = "" if service.since is None else span(now - service.since)
        cpu = "" if service.cpu_percent is None else f"{service.cpu_percent:.0f} %"
        memory = "" if service.memory_bytes is None else size(service.memory_bytes)
        state = Text(service.state + (" (old)" if service.is_old else ""), _STYLES.get(service.state, "yellow"))
        cells: list[str | Text] = [service.name, str(service.pid or ""), state, up, str(service.restarts or "-"), cpu]
        table.add_row(*cells, memory, *([_news(service, now)] if has_news else []))
    return table


def _place(service: Service) -> tuple[bool, tuple[bool, int, str]]:
    return service.name != "daemon", in_order(service.name)


def _news(service: Service, now: float) -> Text:
    """What became of a service that does not run."""
    if service.pid is not None:
        return Text()
    parts = []
    if (end := service.last_end) is not None:
        parts.append(f"ended {end.how}, {span(now - end.at)} ago")
    if service.start_at is not None and service.start_at > now:
        parts.append(f"next try in {span(service.start_at - now)}")
    return Text("; ".join(parts), "red")


def _work_table(health: Health) -> Table:
    """One row a worker: what it does."""
    table = plain_table("worker", "slots", "queues", "works on", elastic="works on")
    table.columns[1].justify = "right"
    others = sorted(health.others.values(), key=lambda each: each.name)
    for service in [*sorted(health.services.values(), key=_place), *others]:
        if service.slots is not None:
            slots = f"{'?' if service.used is None else service.used}/{service.slots}"
            table.add_row(plain(service.name), slots, plain(", ".join(service.queues)), _works_on(service))
    return table


def _works_on(service: Service) -> str:
    parts = [
        f"{plain(class_name(each.class_id))} {plain(short(each.pid))}" + (f" ({plain(each.step)})" if each.step else "")
        for each in service.in_hand
    ]
    others = (service.used or 0) - len(parts)
    if others > 0:
        parts.append(f"{others} more" if parts else count(others, "process"))
    if service.programs > 1:
        parts.append(count(service.programs - 1, "program"))
    return ", ".join(parts)


def _said_lines(health: Health, now: float) -> list[Text]:
    return [
        Text(f"{span(now - each.at)} ago  {each.service}: {plain(each.text)}", "yellow" if _is_mild(each) else "red")
        for each in health.said
    ]


def _is_mild(said: Said) -> bool:
    return logs.Entry(None, said.level, "", "").severity < ERROR
