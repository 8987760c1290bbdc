"""Threads for what users want called, for which the program does not wait at its end.

An executor of the standard library does wait: a subscriber that never returns would keep its program from ending.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads(Executor):
    """At most `most` of them, which are started as they are needed and then kept."""

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._started = 0
        self._is_over = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have it called soon. Raises `RuntimeError` after `shutdown`."""
        future: Future[T] = Future()
        with self._lock:
            if self._is_over:
                raise RuntimeError(f"the threads {self._name} were shut down")
            self._work.put((future, partial(fn, *args, **kwargs)))
            if not self._idle.acquire(blocking=False) and self._started < self._most:
                self._started += 1
                threading.Thread(target=self._run, name=f"{self._name}-{self._started}", daemon=True).start()
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """What was submitted is still called; nobody waits for it, whatever the arguments say. Idempotent."""
        with self._lock:
            self._is_over = True
            for _ in range(self._started):
                self._work.put(None)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            _call(*item)
            del item  # or it would be kept until the next one comes
            self._idle.release()


def _call(future: Future[Any], function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:  # whatever it is, it is what came of it, and ends no thread
        future.set_exception(error)
    else:
        future.set_result(result)
