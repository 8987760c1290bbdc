"""What a broker sees of the ways in: doors, and the connections of peers that came through them."""

from __future__ import annotations

import logging
import math
import selectors
from abc import ABC, abstractmethod
from collections.abc import Callable

from prunus.errors import BusyError, Failure
from prunus.messaging.access import Principal
from prunus.messaging.liveness import boottime
from prunus.messaging.messages import Unwelcome

MAX_BATCH = 256
"""About so many frames of one door are done in one commit ..."""
MAX_BATCH_BYTES = 32 * 1024 * 1024
"""... and about their bytes."""
REFUSAL_LOGGED_EACH_S = 5.0
"""Of the connections that are refused for one reason the log tells one in so much time; all are counted."""

logger = logging.getLogger(__name__)


def woken(events: int) -> None:
    """For a descriptor in a selector that only says "look around": being awake is enough."""


class Connection(ABC):
    """One connection of a peer, as long as it lasts; what the exchange calls a route."""

    __slots__ = ("door", "principal", "retry_at")

    def __init__(self, door: Door, principal: Principal) -> None:
        self.door, self.principal = door, principal
        self.retry_at = math.inf
        """When `flush` is to be called again, if nothing says before that there is room."""

    @property
    @abstractmethod
    def waiting_frames(self) -> int:
        """How many frames wait to be sent ..."""

    @property
    @abstractmethod
    def waiting_bytes(self) -> int:
        """... and their bytes, about."""

    @abstractmethod
    def add(self, frame: bytes) -> None:
        """One more frame to be sent."""

    @abstractmethod
    def flush(self, now: float) -> None:
        """Send what waits, as far as there is room for it. Never waits."""


class Door(ABC):
    """A way in."""

    def __init__(self) -> None:
        self.writable: list[Connection] = []
        """Those that have room again."""
        self.on_refused: Callable[[], None] = lambda: None
        """Called for each connection that is refused."""
        self._logged_at: dict[str, float] = {}
        """When the log was last told of each reason."""

    def refuse(self, reason: str, *details: object) -> None:
        """Count a connection that is refused; the log is not filled by those that come again and again."""
        self.on_refused()
        now = boottime()
        if now >= self._logged_at.get(reason, -math.inf) + REFUSAL_LOGGED_EACH_S:
            self._logged_at[reason] = now
            logger.warning(reason, *details)

    @property
    @abstractmethod
    def endpoints(self) -> list[str]:
        """Where it is."""

    @abstractmethod
    def watch(self, selector: selectors.BaseSelector) -> None:
        """Register all that may bring news; the data of each key is called with the events."""

    def has_news(self) -> bool:
        """Whether something is there of which the selector will not tell."""
        return False

    def due(self) -> float:
        """When `look` has something to do next."""
        return math.inf

    def look(self, now: float) -> None:  # noqa: B027 (most have nothing to do)
        """Do what is due."""

    @abstractmethod
    def receive(self, frames: list[tuple[Connection, bytes]]) -> bool:
        """Take what came, up to a batch; whether that was all."""

    @abstractmethod
    def departed(self) -> list[Connection]:
        """Those that have left, and whose last words were heard; each is named once."""

    def revoked(self) -> list[Connection]:
        """Those whose keys are not what they were."""
        return []

    @abstractmethod
    def forget(self, connection: Connection) -> None:
        """It is gone. Nothing happens if that is known."""

    @abstractmethod
    def hang_up(self, connection: Connection) -> None:
        """End it."""

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""


def too_many_connections(bound: int | None = None) -> Unwelcome:
    """What a peer is told for which there is no room; `bound` is how many connections there may be."""
    number = "as many connections as it may have" if bound is None else f"{bound:,} connections, as many as it may have"
    return Unwelcome(failure=Failure.of(BusyError(f"it has {number}; close some, or try again later")))
