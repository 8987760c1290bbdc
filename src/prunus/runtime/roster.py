"""What a daemon decides: whom to start, to terminate, to kill, and whom to ask whether it serves.

`Roster` is told what is wanted and what happened. It knows no process, no clock and no file. Its rules:

* a service that ends without being asked is started again, after a pause that doubles with each end that comes too
  soon (`MIN_PAUSE_S` .. `MAX_PAUSE_S`) and starts over when it was healthy for `HEALTHY_S`;
* it is *flapping* after `FLAPPING` ends that came too soon, or `MANY_ENDS` within `RECENT_S`;
* a service that is not wanted any more is asked to end (SIGTERM) and, after its grace and `KILL_MARGIN_S`, killed;
* the broker is asked last, when no worker is left that could need it;
* a *reload* is a higher generation of what is wanted: services of a lower one are replaced one at a time, the broker
  first. The next one is asked to end only when all that are wanted run, and those of the new generation serve. So a
  replacement that does not come up stops the reload, and the others go on with their old code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

BROKER = "broker"
WORKER_PREFIX = "worker-"
MIN_PAUSE_S = 0.05
MAX_PAUSE_S = 30.0
"""The pause before a service is started again: doubled with each end that comes too soon."""
HEALTHY_S = 5.0
"""A service that ran this long was healthy: its next end is the first one."""
FLAPPING = 5
"""After so many ends in a row that came too soon it is said what follows from it ..."""
MANY_ENDS = 10
"""... and after so many that were not asked for, soon or late, ..."""
RECENT_S = 300.0
"""... within this time."""
KILL_MARGIN_S = 5.0
"""What a service gets on top of the grace that it gives to running steps, before it is killed."""


@dataclass
class Service:
    """What the roster knows of one service. Times are of one monotonic clock, in seconds."""

    name: str
    pid: int | None = None
    generation: int = 0
    ready: bool = False
    """It serves: it was seen by the broker, or answers if it is the broker."""
    started_at: float = 0.0
    asked_at: float | None = None
    """When it was asked to end."""
    killed: bool = False
    too_soon: int = 0
    """How often it ended too soon, in a row."""
    ends: tuple[float, ...] = ()
    """When it ended without being asked, of the last `RECENT_S`."""
    start_at: float = 0.0
    """It is not started before."""


@dataclass(frozen=True)
class Ended:
    """What an end means: how long the service ran, and when it is started again (None: it is not wanted)."""

    asked: bool
    ran_s: float
    pause_s: float | None
    flapping: bool


@dataclass(frozen=True)
class Decision:
    """What is to be done now. `wake_at`: when to ask again, if nothing happens before. `done`: all have ended."""

    start: tuple[str, ...] = ()
    terminate: tuple[str, ...] = ()
    kill: tuple[str, ...] = ()
    check: tuple[str, ...] = ()
    """Those of whom a reload must know whether they serve; `ready` is to be said of them when they do."""
    wake_at: float | None = None
    done: bool = False


@dataclass
class Roster:
    """What is wanted and what is, of all services: decides what to do."""

    grace_s: float
    wanted: tuple[str, ...] = ()
    services: dict[str, Service] = field(default_factory=dict)
    workers_generation: int = 0
    broker_generation: int = 0

    def want(self, names: Iterable[str], *, workers_generation: int = 0, broker_generation: int = 0) -> None:
        """From now on these, and no others, shall run, and not with an older generation than this one. A generation
        never sinks; with a new one those that are between two tries are tried at once."""
        before = self.workers_generation, self.broker_generation
        self.wanted = tuple(names)
        self.workers_generation = max(self.workers_generation, workers_generation)
        self.broker_generation = max(self.broker_generation, broker_generation)
        if before != (self.workers_generation, self.broker_generation):
            for service in self.services.values():
                if service.pid is None:
                    service.start_at, service.too_soon = 0.0, 0

    def generation(self, name: str) -> int:
        """The generation that a service of this name has, if it is started now."""
        return self.broker_generation if name == BROKER else self.workers_generation

    def started(self, name: str, pid: int, now: float, *, generation: int | None = None, ready: bool = False) -> None:
        """It runs: it was started just now, or adopted with the `generation` that it was started in."""
        service = self.services.setdefault(name, Service(name))
        service.pid, service.started_at, service.asked_at, service.killed = pid, now, None, False
        service.generation = self.generation(name) if generation is None else generation
        service.ready = ready

    def serves(self, name: str) -> None:
        """It was seen to serve since it was started."""
        self.services[name].ready = True

    def failed(self, name: str, now: float) -> Ended:
        """It could not be started at all."""
        self.services.setdefault(name, Service(name)).started_at = now
        return self.ended(name, now)

    def ended(self, name: str, now: float) -> Ended:
        """It does not run any more."""
        service = self.services[name]
        asked, ran_s = service.asked_at is not None, now - service.started_at
        service.too_soon = 0 if asked else 1 if ran_s >= HEALTHY_S else service.too_soon + 1
        if not asked:
            recent = [at for at in service.ends if at > now - RECENT_S]
            service.ends = (*recent, now)[-MANY_ENDS:]
        pause_s = min(MIN_PAUSE_S * 2 ** (service.too_soon - 1), MAX_PAUSE_S) if service.too_soon else 0.0
        service.pid, service.asked_at, service.killed, service.ready = None, None, False, False
        service.start_at = now + pause_s
        flapping = not asked and (service.too_soon >= FLAPPING or len(service.ends) >= MANY_ENDS)
        return Ended(asked, ran_s, pause_s if name in self.wanted else None, flapping)

    def decide(self, now: float) -> Decision:
        """What to do now. What is to be terminated or killed counts as done; `started` or `failed` must be said of
        what is to be started."""
        running = [service for service in self.services.values() if service.pid is not None]
        start, terminate, kill, times = [], [], [], []
        for name in self.wanted:
            service = self.services.get(name, Service(name))
            if service.pid is None and service.start_at <= now:
                start.append(name)
            elif service.pid is None:
                times.append(service.start_at)
        if (replaced := self._next_to_replace()) is not None:
            replaced.asked_at = now
            terminate.append(replaced.name)
        for service in running:
            if service.asked_at is None:
                is_needed = service.name == BROKER and len(running) > 1
                if service.name not in self.wanted and not is_needed:
                    service.asked_at = now
                    terminate.append(service.name)
            if service.asked_at is not None and not service.killed:
                deadline = service.asked_at + self.grace_s + KILL_MARGIN_S
                if deadline <= now:
                    service.killed = True
                    kill.append(service.name)
                else:
                    times.append(deadline)
        return Decision(
            start=tuple(start),
            terminate=tuple(terminate),
            kill=tuple(kill),
            check=tuple(service.name for service in self._wanted_services() if self._is_to_check(service)),
            wake_at=min(times, default=None),
            done=not self.wanted and not running,
        )

    def _wanted_services(self) -> list[Service]:
        return [self.services.get(name, Service(name)) for name in self.wanted]

    def _next_to_replace(self) -> Service | None:
        """The next service of an old generation, if none of the others is just being replaced."""
        wanted = self._wanted_services()
        if any(each.pid is None or each.asked_at is not None or self._is_to_check(each) for each in wanted):
            return None
        return next((each for each in wanted if each.generation < self.generation(each.name)), None)

    def _is_to_check(self, service: Service) -> bool:
        has_reloads = self.workers_generation > 0 or self.broker_generation > 0
        is_current = service.generation >= self.generation(service.name)
        return has_reloads and is_current and service.pid is not None and service.asked_at is None and not service.ready


def service_names(workers: int) -> tuple[str, ...]:
    """The services of a daemon with so many workers, in the order in which they start."""
    return (BROKER, *(f"{WORKER_PREFIX}{number}" for number in range(1, workers + 1)))


def is_service(name: str) -> bool:
    """Whether this is the name of a broker or worker of a daemon."""
    return name == BROKER or name.startswith(WORKER_PREFIX)


def in_order(name: str) -> tuple[bool, int, str]:
    """Sorts the broker first, then the workers by their numbers."""
    number = name.removeprefix(WORKER_PREFIX)
    return name != BROKER, int(number) if number.isdecimal() else 0, name
