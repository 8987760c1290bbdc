"""A communicator with its own thread: frames and heartbeats go on while the loops of its users are busy.

The thread waits in one place (`Transport.wait`) for frames, for a wake-up or for the next deadline, and runs the core's
side of `PeerCommunicator`. No user code runs on it.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Protocol

from prunus.errors import ForkedProcessError
from prunus.messaging.peer import CLOSE_TIMEOUT_S, PeerCommunicator

logger = logging.getLogger(__name__)


class Transport(Protocol):
    """Moves frames to and from one broker. All but `wake` is called on one thread."""

    def open(self) -> None:
        """A fresh connection, in place of the one that may be open. Never waits for the other side."""
        ...

    def send(self, frame: bytes) -> None:
        """Never waits."""
        ...

    def wait(self, timeout_s: float) -> tuple[list[bytes], str | None]:
        """Until frames came, `wake` was called, the connection broke (the reason) or the time is over."""
        ...

    def wake(self) -> None:
        """End the `wait` of now or the next one. Thread-safe."""
        ...

    def close(self) -> None: ...


class ThreadedCommunicator(PeerCommunicator):
    """See the module. The thread is started by the constructor; `close` ends it."""

    def __init__(self, transport: Transport, endpoint: str, name: str = "peer") -> None:
        super().__init__(endpoint, name)
        self._transport = transport
        self._awake = False
        self._gone = False
        self._thread = threading.Thread(target=self._run, name=f"prunus-communicator-{name}", daemon=True)
        self._thread.start()

    def _wake(self) -> bool:
        if self._gone:
            return False
        if not self._awake:  # one wake-up is enough for all commands until the thread looks
            self._awake = True
            self._transport.wake()
        return True

    def _check_caller(self) -> None:
        if threading.get_ident() == self._thread.ident:
            raise RuntimeError("this is the communicator's own thread: it would wait for itself")

    def _joined(self) -> None:
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._transport.open()
            self._core.connect(time.monotonic())
            while not self._finished:
                for frame in self._core.take():
                    self._transport.send(frame)
                frames, broken = self._transport.wait(max(0.0, self._due() - time.monotonic()))
                self._awake = False
                broken = self._step(time.monotonic(), frames) or broken
                if broken is not None and not self._finished:
                    logger.info("connecting again", extra={"endpoint": self.endpoint, "reason": broken})
                    self._transport.open()
                    self._core.connect(time.monotonic())
        except ForkedProcessError:  # pragma: no cover (threads do not survive a fork)
            pass
        except Exception:  # the outermost loop of the thread: whoever waits must hear of it
            logger.exception("the communicator broke; everything that waits for it ends with an error")
        finally:
            self._finish()
            self._gone = True  # from here on nobody can post, and what was posted before is told so:
            self._step_last()
            self._transport.close()

    def _step_last(self) -> None:
        while self._commands:
            self._commands.popleft()(time.monotonic())
