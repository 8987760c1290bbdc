"""A real broker at whose socket somebody says anything, and an honest client who must not notice.

`run`: attackers in processes of their own say their frames; the broker lives, answers the honest client all the while,
takes its tasks, and its memory stays under `CEILING_BYTES`.

`run_deaf`: peers that subscribe to everything and never read, while everybody is told a lot; the questions of the
others are answered as before.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from prunus.messaging.communicator import Communicator
from prunus.messaging.connecting import connect_to
from prunus.messaging.unix import socket_path
from prunus.runtime.profile import Config, Profile
from tests.torture.batch import Batch
from tests.torture.kills.zygote import Zygote

CEILING_BYTES = 768 * 1024 * 1024
"""Of the broker: what `ATTACKERS` leave unfinished and unread fits many times."""
ATTACKERS = 2
PATIENCE_S = 30.0
"""Whoever waits longer for an answer has lost it."""
DEAF, TOLD_BYTES = 100, 10_000
"""Peers that never read, and the size of each broadcast: a few hundred are more than all buffers hold."""
ANSWER_S = 0.1
"""What 99 % of the others' questions may take meanwhile."""
QUESTIONS = "99 % of questions within ms"


class _Scene:
    """A broker and an honest client in `folder`."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.zygote = folder, zygote
        self.profile = Profile.create(folder / "p", Config(workers=0))
        self.socket = socket_path(self.profile.endpoint)
        self.client: Communicator
        self.rounds_s: list[float] = []
        self.most_bytes = 0
        self._broker = 0

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[_Scene]:
        self._broker = self.zygote.start("broker", "--profile", str(self.profile.path), log=self.folder / "broker.log")
        try:
            async with await connect_to(self.profile.endpoint, timeout_s=PATIENCE_S) as self.client:
                await self.client.add_rpc_subscriber(_echo, "echo")
                yield self
        finally:
            self.zygote.end(self._broker, PATIENCE_S)

    async def ask(self) -> list[str]:
        """One question and one task; what went wrong."""
        if (code := self.zygote.poll(self._broker)) is not None:
            return [f"the broker ended with the code {code}: {self._last_words()}"]
        self.most_bytes = max(self.most_bytes, psutil.Process(self._broker).memory_info().rss)
        begun = time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await self.client.rpc_send("echo", b"are you there?", timeout_s=PATIENCE_S)
                self.rounds_s.append(time.monotonic() - begun)
                receipt = await self.client.task_send(b"honest work", queue="honest")
        except Exception as error:
            return [f"an honest client got {error!r}; the broker said: {self._last_words()}"]
        return [] if answer == b"are you there?" and receipt.stored else ["an honest client got a wrong answer"]

    async def tell(self, news: bytes) -> list[str]:
        """Everybody hears it who can; what went wrong."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self.client.broadcast_send(news, sender="loud", subject="news")
        except Exception as error:
            return [f"an honest client could not tell its news: {error!r}; the broker said: {self._last_words()}"]
        return []

    def figures(self) -> dict[str, float]:
        slow = sorted(self.rounds_s)[int(len(self.rounds_s) * 0.99)] if self.rounds_s else 0.0
        return {"broker MiB": self.most_bytes / 2**20, QUESTIONS: slow * 1000}

    def judge(self, attacked: bool) -> list[str]:
        failures = []
        if self.most_bytes > CEILING_BYTES:
            failures.append(f"the broker had {self.most_bytes >> 20} MiB, {CEILING_BYTES >> 20} are allowed")
        if attacked and "sends nonsense" not in (self.folder / "broker.log").read_text(errors="replace"):
            failures.append("the broker heard no nonsense: this rig does not reach it")
        if "Traceback" in (said := (self.folder / "broker.log").read_text(errors="replace")):
            failures.append(f"the broker broke somewhere: {said[said.index('Traceback') :][:1000]}")
        return failures

    def _last_words(self) -> str:
        return " | ".join((self.folder / "broker.log").read_text(errors="replace").splitlines()[-5:])


async def _echo(body: bytes) -> bytes:
    return body


async def _attacked(folder: Path, zygote: Zygote, seed: int, size: int) -> Batch:
    async with _Scene(folder, zygote).opened() as scene:
        log = folder / "attackers.log"
        running = [
            zygote.start("attacker", str(scene.socket), str(seed * ATTACKERS + number), str(size // ATTACKERS), log=log)
            for number in range(ATTACKERS)
        ]
        failures: list[str] = []
        while not failures and any(zygote.poll(pid) is None for pid in running):
            failures += await scene.ask()
        for pid in running:
            if zygote.poll(pid) is None:
                os.kill(pid, signal.SIGKILL)
            if zygote.wait(pid) > 0:
                failures.append(f"an attacker could not go on: {log.read_text()[-500:]}")
        failures += await scene.ask()
        said = sum(int(line) for line in log.read_text().splitlines() if line.isdigit())
        failures += scene.judge(attacked=True)
    return Batch.of(said, failures, {"honest questions answered": len(scene.rounds_s)}, scene.figures())


async def _deaf(folder: Path, zygote: Zygote, told: int, strict: bool) -> Batch:
    async with _Scene(folder, zygote).opened() as scene:
        log = folder / "deaf.log"
        deaf = zygote.start("deaf", str(scene.socket), str(DEAF), log=log)
        failures: list[str] = []
        try:
            while "all are there" not in (log.read_text() if log.exists() else ""):
                await asyncio.sleep(0.01)
            for number in range(told):
                failures += await scene.tell(bytes(TOLD_BYTES))
                if number % 20 == 0 and not failures:
                    failures += await scene.ask()
                if failures:
                    break
        finally:
            os.kill(deaf, signal.SIGKILL)
            zygote.wait(deaf)
        failures += [] if failures else await scene.ask()
        failures += scene.judge(attacked=False)
        if (slow_ms := scene.figures()[QUESTIONS]) > ANSWER_S * 1000 and strict:
            failures.append(
                f"99 % of the questions were answered within {slow_ms:.0f} ms, {ANSWER_S * 1000:.0f} are allowed"
            )
    return Batch.of(told * DEAF, failures, {"questions answered meanwhile": len(scene.rounds_s)}, scene.figures())


def run(seed: int, size: int) -> Batch:
    """At least `size` hostile frames."""
    with tempfile.TemporaryDirectory(prefix="pr-") as folder, Zygote() as zygote:
        return asyncio.run(_attacked(Path(folder), zygote, seed, size))


def run_deaf(seed: int, size: int, strict: bool = False) -> Batch:
    """`size` broadcasts to peers that do not read them. `strict`: the others' answers must be quick, too."""
    with tempfile.TemporaryDirectory(prefix="pr-") as folder, Zygote() as zygote:
        return asyncio.run(_deaf(Path(folder), zygote, size, strict))


def run_deaf_timed(seed: int, size: int) -> Batch:
    """For a machine that does nothing else."""
    return run_deaf(seed, size, strict=True)
