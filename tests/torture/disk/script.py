"""What the disk rigs have a broker do, what was said to its clients, and what must be there after a restart.

A `Script` is a client, a worker and a controller at one exchange, driven frame by frame: it sends tasks, acknowledges
some, gives others back, creates processes, posts letters, restarts the broker. It is decided by its seed. All that is
wanted and all that is confirmed goes to a file beside the database, as lines, at the moment when a real client would
know. `judge` opens a database as the broker does and compares.

As a program, with the shim: ``script FOLDER SEED STEPS TRACE [SYNCHRONOUS]`` runs one and has it traced; with another
`synchronous` than the broker's own, to see what becomes of that.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prunus.errors import PrunusError
from prunus.messaging.messages import (
    BrokerMessage,
    Call,
    CallDone,
    ClientMessage,
    Done,
    Heartbeat,
    Hello,
    Peer,
    TaskAck,
    TaskDelivery,
    TaskNack,
    TaskSend,
    TaskStored,
    TaskSubscribe,
    decode_from_broker,
    encode,
)
from prunus.persistence import NewProcess, requests
from prunus.persistence.database import find_damage
from prunus.runtime.broker import Broker, DiskGuard
from tests.torture.disk.shim import Shim

DATABASE = "prunus.db"
SAID = "said"
QUEUE = "work"
ROUTE: Any = "route"
SESSION = "script"
CREDIT = 6
MANY = 1_000_000
MAX_BODY = 9000
"""Some bodies need pages of their own."""
RESTART_EVERY = 12
"""Steps between two orderly restarts: the log is copied back, and a new one begins."""


class Script:
    """See the module. `folder` must exist; a script on the database of another one goes on there."""

    def __init__(
        self, folder: Path, seed: int, *, guard: Callable[[Path], DiskGuard] = DiskGuard, synchronous: str = ""
    ) -> None:
        self._folder = folder
        self._guard = guard
        self._synchronous = synchronous
        self._seed = seed
        self._choice = random.Random(seed)
        self._said = os.open(folder / SAID, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._now = 0.0
        self._request = seed * MANY
        self._numbers = iter(range(MANY))
        self._held: dict[str, int] = {}
        self._wanted: dict[int, str] = {}
        """What will be true when this request is answered."""
        self._processes: list[str] = []
        self._letters: dict[str, int] = {}
        self._broker = self._open()

    def run(self, steps: int) -> None:
        """Raises what the broker raises."""
        for step in range(1, steps + 1):
            self._now += 0.1
            self._exchange(self._something())
            if step % RESTART_EVERY == 0:
                self._broker.close()
                self._broker = self._open()
        self._broker.close()

    def abandon(self) -> None:
        """Let go of the files."""
        broker = getattr(self, "_broker", None)
        if broker is not None:
            with contextlib.suppress(sqlite3.Error):
                broker.abandon()
        os.close(self._said)

    def _open(self) -> Broker:
        database = self._folder / DATABASE
        self._broker = broker = Broker(database, self._guard(database))
        if self._synchronous:
            broker._store._connection.execute(f"PRAGMA synchronous = {self._synchronous}").fetchall()
        held = tuple(self._held.items())
        seen = self._request + 1
        hello = Hello(session=SESSION, peer=Peer(), held=held, queues=((QUEUE, CREDIT),), seen=seen)
        self._exchange([hello])
        return broker

    def _something(self) -> list[ClientMessage]:
        messages: list[ClientMessage] = []
        for _ in range(self._choice.randint(0, 4)):
            name = f"task-{self._seed}-{next(self._numbers)}"
            body = body_of(name)
            messages.append(TaskSend(id=self._want(f"stored {name}"), task=name, body=body, queue=QUEUE))
        for task in self._choice.sample(sorted(self._held), self._choice.randint(0, len(self._held))):
            epoch = self._held.pop(task)
            if self._choice.random() < 0.7:
                self._say(f"acking {task}")
                messages.append(TaskAck(id=self._want(f"settled {task}"), task=task, epoch=epoch))
            else:
                messages.append(TaskNack(id=self._want(""), task=task, epoch=epoch))
        if self._choice.random() < 0.4:
            messages.append(self._call())
        if self._choice.random() < 0.3:
            messages.append(Heartbeat(seen=self._request + 1))
        return messages

    def _call(self) -> Call:
        if not self._processes or self._choice.random() < 0.5:
            pid = f"process-{self._seed}-{next(self._numbers)}"
            self._processes.append(pid)
            process = NewProcess(pid=pid, class_id="a:B", checkpoint=body_of(pid), created_at=0.0)
            request, said = requests.encode_request(requests.CreateRequest(process)), f"created {pid}"
        else:
            pid = self._choice.choice(self._processes)
            self._letters[pid] = self._letters.get(pid, 0) + 1
            said = f"posted {pid} {self._letters[pid]}"
            request = requests.encode_request(requests.PostRequest(pid, body_of(said)))
        return Call(id=self._want(said), requests=(request,))

    def _want(self, said: str) -> int:
        self._request += 1
        self._wanted[self._request] = said
        return self._request

    def _exchange(self, messages: Iterable[ClientMessage]) -> None:
        frames = [(ROUTE, encode(message)) for message in messages]
        for _, frame in self._broker.exchange.process(self._now, frames):
            self._hear(decode_from_broker(frame))

    def _hear(self, message: BrokerMessage) -> None:
        match message:
            case TaskStored(id=request) | CallDone(id=request) | Done(id=request):
                if said := self._wanted.pop(request, ""):
                    self._say(said)
            case TaskDelivery(task=task, epoch=epoch):
                self._held[task] = epoch
            case _:
                pass

    def _say(self, line: str) -> None:
        os.write(self._said, f"{line}\n".encode())


def body_of(name: str) -> bytes:
    """The bytes that belong to a name: what is stored can be recognised."""
    number = zlib.crc32(name.encode())
    return random.Random(number).randbytes(number % (MAX_BODY if number % 4 == 0 else 300))


# --- afterwards -------------------------------------------------------------------------------------


def judge(folder: Path, said: Iterable[str]) -> list[str]:
    """Open the database in `folder` as a broker does; what is wrong, given the lines that were said by then."""
    try:
        broker = Broker(folder / DATABASE)
    except PrunusError as error:
        return [f"it can't be opened: {error}"]
    try:
        return _compared(broker, list(said), folder)
    finally:
        broker.abandon()


def _compared(broker: Broker, said: list[str], folder: Path) -> list[str]:
    words = [line.split() for line in said]
    stored = {rest[0] for kind, *rest in words if kind == "stored"}
    acking = {rest[0] for kind, *rest in words if kind == "acking"}
    settled = {rest[0] for kind, *rest in words if kind == "settled"}
    # The same session, without anything in hand: all that there is comes back to it.
    hello = Hello(session=SESSION, peer=Peer(), queues=((QUEUE, MANY),), seen=2**62)
    subscribe = TaskSubscribe(id=2**62, queue=QUEUE, credit=MANY)
    answers = broker.exchange.process(0.0, [(ROUTE, encode(hello)), (ROUTE, encode(subscribe))])
    answers += broker.exchange.tick(3600.0)  # what was given back waits for a moment
    found = {}
    for _, frame in answers:
        message = decode_from_broker(frame)
        if isinstance(message, TaskDelivery):
            found[message.task] = message.body
    complaints = [f"lost: task {task}" for task in sorted(stored - acking - found.keys())]
    complaints += [f"settled, and there again: task {task}" for task in sorted(settled & found.keys())]
    complaints += [f"another body: task {task}" for task, body in sorted(found.items()) if body != body_of(task)]
    connection = broker._store._connection
    letters = dict(connection.execute("SELECT pid, inbox_last FROM process"))
    for kind, *rest in words:
        if kind == "created" and rest[0] not in letters:
            complaints.append(f"lost: process {rest[0]}")
        if kind == "posted" and letters.get(rest[0], 0) < int(rest[1]):
            complaints.append(f"lost: letter {rest[1]} to {rest[0]}")
    return complaints + [f"damaged: {line}" for line in find_damage(connection)]


def judge_copy(folder: Path) -> list[str]:
    """The same with the lines in `folder`, and without a trace: the session of the script can go on."""
    with tempfile.TemporaryDirectory(prefix="copy-", dir=folder.parent) as parent:
        copy = Path(parent, "d")
        shutil.copytree(folder, copy)
        return judge(copy, said_in(copy))


def said_in(folder: Path) -> list[str]:
    """The lines of a script that ended, or was ended."""
    file = folder / SAID
    return file.read_text().splitlines() if file.exists() else []


# --- the program ------------------------------------------------------------------------------------


def main(folder: Path, seed: int, steps: int, trace: Path, synchronous: str = "") -> None:
    Shim().trace(folder, trace)
    Script(folder, seed, synchronous=synchronous).run(steps)


if __name__ == "__main__":
    where, seed, steps, trace, *more = sys.argv[1:]
    main(Path(where), int(seed), int(steps), Path(trace), *more)
