"""A communicator over a socket: moved by the loop that made it, and by a thread of its own when that loop is busy.

The loop in which a communicator is made is its *home*: there the socket is read and written, so that a message needs no
other thread on its way. A loop may be busy for long, though, and frames and heartbeats have to go on: a thread looks
after the clock, and stands in when something has come and the home did not take it for `LATE_S`, until it is back. A
communicator that is used from anywhere else than its home, or whose transport can be moved by one thread only, is the
thread's alone. Whoever moves the frames holds the lock and runs the core's side of `PeerCommunicator`: one *turn*. No
user code runs in it.

That the thread lives is no proof that its program does: a worker whose loop stands still for long says so by
`speak_only_while`. Then the thread does nothing at all, so that the lease runs out; when it may speak again it stood
still, and learns what it has lost, as after a suspended machine.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from prunus.messaging.handover import running_loop
from prunus.messaging.liveness import boottime
from prunus.messaging.peer import CLOSE_TIMEOUT_S, PeerCommunicator

SILENT_POLL_S = 0.25
"""How often a communicator that may not speak looks whether it may again."""

BROKE = "the communicator broke; everything that waits for it ends with an error"
LATE_S = 0.25
"""The thread stands in for a home that does not take for so long what has come."""

logger = logging.getLogger(__name__)


class Transport(Protocol):
    """Moves frames to and from one broker. One thread at a time; but `wait` and `wake` may be called meanwhile."""

    @property
    def descriptor(self) -> int | None:
        """What an event loop may watch: it can be read when `receive` or `flush` has something to do. The same for
        good; None: all is to be called on one thread."""
        ...

    def open(self) -> None:
        """A fresh connection, in place of the one that may be open. Never waits for the other side."""
        ...

    def receive(self) -> tuple[list[bytes], str | None]:
        """What came, and the reason if the connection broke. Never waits."""
        ...

    def send(self, frame: bytes) -> None:
        """With the next `flush`."""
        ...

    def flush(self) -> None:
        """What is to be sent, as far as there is room for it. Never waits."""
        ...

    def wait(self, timeout_s: float, *, for_frames: bool = True) -> bool:
        """Until `wake` was called or the time is over, and if it is `for_frames` until there is something to receive or
        room to send. False: the time is over."""
        ...

    def has_news(self) -> bool:
        """Whether there is something to receive, or room to send."""
        ...

    def wake(self) -> None:
        """End the `wait` of now or the next one. Thread-safe."""
        ...

    def close(self) -> None:
        """All but the `descriptor`."""
        ...

    def close_descriptor(self) -> None: ...


class ThreadedCommunicator(PeerCommunicator):
    """See the module. The thread is started by the constructor; `close` ends it."""

    def __init__(self, transport: Transport, endpoint: str, name: str = "peer") -> None:
        """Its home is the loop that runs here, if one does."""
        super().__init__(endpoint, name)
        self._transport = transport
        self._lock = threading.Lock()
        """Held by who makes a turn."""
        self._turns = 0
        self._due_at = self._looks_at = 0.0
        """When the next turn has to be made, whatever comes; and when the thread looks up, at the latest."""
        self._is_called = self._is_awake = False
        """The home, or the thread, was told that commands wait."""
        self._interrupted = False
        """A turn was left in its midst: what it had in hand is said again on a new connection."""
        self._gone = False
        self._may_speak: Callable[[], bool] = _always
        descriptor = transport.descriptor
        self._home = running_loop() if descriptor is not None else None
        """The loop that watches the descriptor."""
        self._alone = self._home is None
        """From now on the thread moves the frames, for good ..."""
        self._stands_in = False
        """... or until its home is back."""
        if self._home is not None and descriptor is not None:
            self._home.add_reader(descriptor, self._on_readable)
        self._thread = threading.Thread(target=self._run, name=f"prunus-communicator-{name}", daemon=True)
        self._thread.start()
        self._ident = self._thread.ident

    def speak_only_while(self, is_alive: Callable[[], bool]) -> None:
        """Say nothing, and show no life to the broker, as long as this is False. It is called on the own thread."""
        self._may_speak = is_alive

    def _wake(self, *, at_once: bool = False) -> bool:
        if self._gone:
            return False
        if not self._alone:
            home = running_loop()
            if home is not None and home is self._home:
                if self._is_called:  # once is enough for all commands of this turn of the loop
                    return True
                if at_once and self._lock.acquire(blocking=False):  # else a turn is being made, perhaps by our caller
                    try:
                        self._turn_at_home(receive=False)
                    finally:
                        self._lock.release()
                else:
                    self._is_called = True
                    home.call_soon(self._on_commands)
                return True
            self._alone = True
        if not self._is_awake:
            self._is_awake = True
            self._transport.wake()
        return True

    def _check_caller(self) -> None:
        if threading.get_ident() == self._ident:
            raise RuntimeError("this is the communicator's own thread: it would wait for itself")

    def _joined(self) -> None:
        self._thread.join(CLOSE_TIMEOUT_S)

    # --- a turn, with the lock ---

    def _turn(self, *, receive: bool) -> None:
        """Take what came and what was asked, and say what follows. A defect in that ends everything that waits, before
        anybody makes another turn."""
        self._turns += 1
        try:
            frames, broken = self._transport.receive() if receive else ([], None)
            if self._interrupted:
                self._interrupted, broken = False, "a turn was interrupted"
            broken = self._step(boottime(), frames) or broken
            if self._finished:
                return
            if broken is not None:
                logger.info("connecting again", extra={"endpoint": self.endpoint, "reason": broken})
                self._connect()
            self._say()
        except Exception:
            self._finish()
            logger.exception(BROKE)

    def _connect(self) -> None:
        self._transport.open()
        self._core.connect(boottime())

    def _say(self) -> None:
        for frame in self._core.take():
            self._transport.send(frame)
        self._transport.flush()
        self._due_at = self._due()

    # --- at home ---

    def _on_commands(self) -> None:
        self._is_called = False
        with self._lock:
            self._turn_at_home(receive=False)

    def _on_readable(self) -> None:
        if self._alone:
            self._leave_home()
        else:
            with self._lock:
                self._turn_at_home(receive=True)

    def _turn_at_home(self, *, receive: bool) -> None:
        if self._finished:
            return
        try:
            self._turn(receive=receive)
        except BaseException:  # Ctrl-C
            self._interrupted = True
            self._transport.wake()
            raise
        if self._finished:
            self._leave_home()
        if self._finished or not self._core.up or self._due_at < self._looks_at:
            self._transport.wake()

    def _leave_home(self) -> None:
        """Nothing is watched there any more."""
        home, self._home, self._alone = self._home, None, True
        if home is not None and (descriptor := self._transport.descriptor) is not None:
            home.remove_reader(descriptor)

    def _be_back(self) -> None:
        self._stands_in = False
        self._transport.wake()

    # --- on the thread ---

    def _run(self) -> None:
        try:
            with self._lock:
                self._connect()
                self._say()
            while not self._finished:
                self._wait_for_a_turn()
                if not self._may_speak():
                    self._keep_silent()
                with self._lock:
                    if not self._finished:
                        self._turn(receive=True)
        except Exception:  # the outermost loop of the thread: whoever waits must hear of it
            logger.exception(BROKE)
        finally:
            with self._lock:
                self._finish()
                self._gone = True  # from here on nobody can post, and what was posted before is told so:
                self._step_last()
                self._transport.close()
            self._leave_descriptor()

    def _wait_for_a_turn(self) -> None:
        while not (self._alone or self._stands_in) and self._core.up:
            turns, self._looks_at = self._turns, boottime() + LATE_S
            woken = self._transport.wait(max(0.0, min(self._looks_at, self._due_at) - boottime()), for_frames=False)
            if woken or self._interrupted or boottime() >= self._due_at:
                break
            with self._lock:
                if turns == self._turns and self._transport.has_news():
                    self._stand_in()
        else:
            self._transport.wait(max(0.0, self._due_at - boottime()))
        self._is_awake = False

    def _stand_in(self) -> None:
        """Until the home has time again; for good if it is closed."""
        home = self._home
        if home is None:
            return
        self._stands_in = True
        try:
            home.call_soon_threadsafe(self._be_back)
        except RuntimeError:
            self._alone = True

    def _leave_descriptor(self) -> None:
        """Close it, after its home has forgotten it: its number may be that of something else then."""
        home = self._home
        if home is not None:
            with contextlib.suppress(RuntimeError):  # that loop is closed
                home.call_soon_threadsafe(self._leave_home_and_descriptor)
                return
        self._transport.close_descriptor()

    def _leave_home_and_descriptor(self) -> None:
        self._leave_home()
        self._transport.close_descriptor()

    def _keep_silent(self) -> None:
        logger.error("nothing shows that this program goes on: its lease ends, and others get its work")
        while not (self._may_speak() or self._closing):
            time.sleep(SILENT_POLL_S)
        logger.warning("this program goes on; it asks what is still its own")

    def _step_last(self) -> None:
        while self._commands:
            self._commands.popleft()(boottime())
        self._handover.send()


def _always() -> bool:
    return True
