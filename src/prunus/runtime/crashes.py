"""When a worker dies: which processes may have done it, and what is known of how it died.

The store counts, for each process, the workers that died in its step (`ProcessStore.blame_all`). Here is what only the
moment knows, in memory, with bounds; a broker that is started again has forgotten it:

* **who died together.** When one process is found guilty (its worker died so often that it is set aside), those that
  were in the same deaths are innocent of them and are pardoned: so one of a thousand is set aside, and the others need
  not go on one by one;
* **the evidence.** The supervisor sees how a worker ended, and the last lines that it wrote: the name of a signal, the
  stack of a segmentation fault. That goes to the logs of the processes that were blamed for this death, whether it
  comes before or after the broker has noticed the death.

`Deaths` is the side of the broker, `Messenger` that of the supervisor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from prunus.errors import ProtocolError, PrunusError
from prunus.messaging.liveness import this_peer
from prunus.persistence.persister import LogLine

if TYPE_CHECKING:
    from prunus.messaging.messages import Peer
    from prunus.persistence.sqlite import ProcessStore
    from prunus.runtime.profile import Profile

PREFIX = b"crash:"
"""What distinguishes this request from those about processes."""
EVIDENCE_LINES = 50
EVIDENCE_CHARS = 8_000
"""Of the end of a worker's log, not more than this is kept."""
MAX_DEATHS = 1000
"""So many deaths are remembered, the last ones, ..."""
MAX_BLAMED = 100_000
"""... with so many processes in all of them together."""
MAX_TOLD = 100
"""So many processes get the whole evidence of one death into their log; the others one line."""
MAX_WAITING = 20
"""So much evidence waits in a supervisor for a broker, the newest."""
TRIES = 30
TRY_INTERVAL_S = 1.0
TRY_TIMEOUT_S = 5.0
SOURCE = "supervisor"
"""Of these lines in a log."""

logger = logging.getLogger(__name__)


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker ended: the request of a supervisor to the broker, which may come before or after its own notice."""

    host: str
    """As in `Peer.host`: the boot and the PID namespace in which ..."""
    pid: int
    """... this is the number of the process that ended."""
    worker: str
    how: str
    """``by SIGSEGV``, ``with exit code 1``"""
    log: tuple[str, ...] = ()
    """The last lines that it wrote."""
    at: float
    """Wall clock, seconds since 1970."""

    @classmethod
    def of(cls, worker: str, pid: int, how: str, log: Sequence[str]) -> Evidence:
        """Of a process on this host that has just ended; the end of a log that is longer than the bounds."""
        kept: deque[str] = deque()
        left = EVIDENCE_CHARS
        for line in reversed(log[-EVIDENCE_LINES:]):
            if left <= 0:
                break
            kept.appendleft(line[-left:])
            left -= len(line) + 1
        return cls(host=this_peer().host, pid=pid, worker=worker, how=how, log=tuple(kept), at=time.time())


class Deaths:
    """What a broker remembers of the deaths of its workers."""

    def __init__(self, store: ProcessStore) -> None:
        self._store = store
        self._deaths: OrderedDict[tuple[str, int], Mapping[str, str | None]] = OrderedDict()
        """By host and pid: who was blamed for each, and in which step it was."""
        self._blamed = 0
        self._evidence: OrderedDict[tuple[str, int], Evidence] = OrderedDict()
        """What came before the broker noticed the death."""
        self._told: set[tuple[str, int]] = set()
        """The deaths whose evidence is in the logs."""

    def noticed(self, peer: Peer, blamed: Mapping[str, str | None], aside: Sequence[str]) -> None:
        """A worker died; `blamed` are the processes whose steps it ran, and which, `aside` those that are set aside for
        it."""
        key = peer.host, peer.pid
        self._forget(key)
        if blamed:
            self._deaths[key] = blamed
            self._blamed += len(blamed)
        evidence = self._evidence.pop(key, None)
        if evidence is not None:
            self._tell(key, evidence)
        for guilty in aside:
            for pids in self._deaths.values():
                if guilty in pids:
                    self._store.pardon(pid for pid in pids if pid not in aside)
        while self._deaths and (len(self._deaths) > MAX_DEATHS or self._blamed > MAX_BLAMED):
            self._forget(next(iter(self._deaths)))

    def testify(self, data: bytes) -> None:
        """Take the request of a supervisor. Raises `ProtocolError` for bytes that are none."""
        try:
            evidence = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProtocolError(f"these bytes are no evidence of a crash: {error}") from error
        key = evidence.host, evidence.pid
        if key in self._deaths:
            self._tell(key, evidence)
            return
        self._evidence[key] = evidence
        while len(self._evidence) > MAX_WAITING:
            self._evidence.popitem(last=False)

    def _tell(self, key: tuple[str, int], evidence: Evidence) -> None:
        """Put it into the logs, once."""
        if key in self._told:
            return
        blamed = self._deaths.get(key, {})
        if blamed:
            self._told.add(key)
        ended = f"{evidence.worker} (pid {evidence.pid}) ended {evidence.how}"
        others = len(blamed) - 1
        beside = f" and the steps of {others} other process{'' if others == 1 else 'es'}" if others else ""
        for number, (pid, step) in enumerate(blamed.items()):
            head = f"{ended}; it ran {f'the step {step!r}' if step else 'the first step'}{beside}"
            texts = [head]
            if number < MAX_TOLD and evidence.log:
                texts = [f"{head}. The end of its log:", *(f"    {line}" for line in evidence.log)]
            lines = [LogLine(at=evidence.at, text=text, level="ERROR", source=SOURCE, step=step) for text in texts]
            self._store.add_lines(pid, lines)

    def _forget(self, key: tuple[str, int]) -> None:
        self._told.discard(key)
        self._blamed -= len(self._deaths.pop(key, ()))


class Messenger:
    """Takes evidence to the broker, which may be away just now; nobody waits for it."""

    def __init__(self) -> None:
        self._waiting: deque[Evidence] = deque(maxlen=MAX_WAITING)
        self._going: asyncio.Task[None] | None = None

    def send(self, profile: Profile, evidence: Evidence) -> None:
        """In the event loop; returns at once."""
        self._waiting.append(evidence)
        if self._going is None or self._going.done():
            self._going = asyncio.create_task(self._go(profile))

    async def stop(self) -> None:
        """What is not there by now is not taken any more."""
        if self._going is not None:
            self._going.cancel()
            await asyncio.gather(self._going, return_exceptions=True)

    async def _go(self, profile: Profile) -> None:
        from prunus.runtime.connecting import communicator

        for _ in range(TRIES):
            try:
                async with asyncio.timeout(TRY_TIMEOUT_S):
                    async with await communicator(profile, name="supervisor") as broker:
                        while self._waiting:
                            await broker.call([encode(self._waiting[0])])
                            self._waiting.popleft()
                return
            except (PrunusError, OSError, TimeoutError) as error:
                logger.debug("the broker can't be told how a worker ended: %s", error)
            await asyncio.sleep(TRY_INTERVAL_S)
        logger.warning("the broker was not told how %d workers ended: no broker answers", len(self._waiting))
        self._waiting.clear()


def encode(evidence: Evidence) -> bytes:
    """The bytes that tell it a broker's service."""
    return PREFIX + msgspec.msgpack.encode(evidence)


_decoder = msgspec.msgpack.Decoder(Evidence)
