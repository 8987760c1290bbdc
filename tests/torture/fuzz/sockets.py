"""A real broker to which somebody says anything, at each of its doors, and honest clients who must not notice.

The doors are its socket on this host and its port on a network, where CURVE asks for a key (`attacker` and `network`
say what comes there). Honest clients are at both.

`run_local`, `run_network`: attackers in processes of their own say their frames; the broker lives, answers the honest
clients all the while, takes their tasks, counts what it refuses, and its memory stays under `CEILING_BYTES`.

`run_deaf`: peers at both doors that subscribe to everything and never read, while everybody is told a lot; the
questions of the others are answered as before. There is no chance in it: the seed decides nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil

from prunus.messaging.access import Role
from prunus.messaging.communicator import Communicator
from prunus.messaging.connecting import connect_to
from prunus.messaging.inventory import Statistics
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
"""What 99 % of the others' questions may take meanwhile, at each door."""
REFUSED_SHARE = 0.25
"""Of the strangers at least so many are refused: the others are silent, or leave in the middle of a word."""
LOCAL, NETWORK = "the socket", "the network"


class _Scene:
    """A broker in `folder`, and an honest client at each of its doors."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.zygote = folder, zygote
        self.profile = Profile.create(folder / "p", Config(workers=0, listen=["tcp://127.0.0.1:0"]))
        self.profile.keys.make()
        self.socket = socket_path(self.profile.endpoint)
        self.clients: dict[str, Communicator] = {}
        self.rounds_s: dict[str, list[float]] = {LOCAL: [], NETWORK: []}
        self.most_bytes = 0
        self._broker = 0

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[_Scene]:
        self._broker = self.zygote.start("broker", "--profile", str(self.profile.path), log=self.folder / "broker.log")
        try:
            async with AsyncExitStack() as stack:
                for door in self.rounds_s:
                    where = self.profile.endpoint if door == LOCAL else self.key("honest")
                    client = await connect_to(where, timeout_s=PATIENCE_S)
                    self.clients[door] = await stack.enter_async_context(client)
                await self.clients[LOCAL].add_rpc_subscriber(_echo, "echo")
                yield self
        finally:
            self.zygote.end(self._broker, PATIENCE_S)

    def key(self, name: str) -> Path:
        """The file of a key that was not there before."""
        file = self.folder / f"{name}.key"
        self.profile.keys.add(name, Role.OWNER, [*self.profile.listening().values()], file)
        return file

    async def ask(self) -> list[str]:
        """One question and one task at each door; what went wrong."""
        if (code := self.zygote.poll(self._broker)) is not None:
            return [f"the broker ended with the code {code}: {self._last_words()}"]
        self.most_bytes = max(self.most_bytes, psutil.Process(self._broker).memory_info().rss)
        for door, client in self.clients.items():
            begun = time.monotonic()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    answer = await client.rpc_send("echo", b"are you there?", timeout_s=PATIENCE_S)
                    self.rounds_s[door].append(time.monotonic() - begun)
                    receipt = await client.task_send(b"honest work", queue="honest")
            except Exception as error:
                return [f"an honest client at {door} got {error!r}; the broker said: {self._last_words()}"]
            if answer != b"are you there?" or not receipt.stored:
                return [f"an honest client at {door} got a wrong answer"]
        return []

    async def tell(self, news: bytes) -> list[str]:
        """Everybody hears it who can; what went wrong."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self.clients[LOCAL].broadcast_send(news, sender="loud", subject="news")
        except Exception as error:
            return [f"an honest client could not tell its news: {error!r}; the broker said: {self._last_words()}"]
        return []

    async def statistics(self) -> Statistics:
        return await self.clients[LOCAL].statistics()

    def slow_ms(self) -> dict[str, float]:
        """What 99 % of the questions took at most, by door."""
        return {door: sorted(took)[int(len(took) * 0.99)] * 1000 for door, took in self.rounds_s.items() if took}

    def figures(self) -> dict[str, float]:
        slow = {f"99 % of questions over {door} within ms": slow_ms for door, slow_ms in self.slow_ms().items()}
        return {"broker MiB": self.most_bytes / 2**20, **slow}

    def judge(self) -> list[str]:
        failures = []
        if self.most_bytes > CEILING_BYTES:
            failures.append(f"the broker had {self.most_bytes >> 20} MiB, {CEILING_BYTES >> 20} are allowed")
        if "Traceback" in (said := (self.folder / "broker.log").read_text(errors="replace")):
            failures.append(f"the broker broke somewhere: {said[said.index('Traceback') :][:1000]}")
        return failures

    def _last_words(self) -> str:
        return " | ".join((self.folder / "broker.log").read_text(errors="replace").splitlines()[-5:])


async def _echo(body: bytes) -> bytes:
    return body


async def _attacked(folder: Path, zygote: Zygote, door: str, seed: int, size: int) -> Batch:
    async with _Scene(folder, zygote).opened() as scene:
        log = folder / "attackers.log"
        role, where = ("attacker", scene.socket) if door == LOCAL else ("network attacker", scene.key("hostile"))
        running = [
            zygote.start(role, str(where), str(seed * ATTACKERS + number), str(size // ATTACKERS), log=log)
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
        lines = log.read_text().splitlines()
        said = sum(int(line) for line in lines if line.isdigit())
        strangers = sum(int(line.split()[0]) for line in lines if line.endswith(" strangers"))
        counts = {"strangers": strangers, "honest questions answered": sum(map(len, scene.rounds_s.values()))}
        if not failures:
            statistics = await scene.statistics()
            counts["frames refused"], refused = statistics.protocol_errors, statistics.refused_connections
            counts["connections refused"] = refused
            if not statistics.protocol_errors or refused < strangers * REFUSED_SHARE:
                failures.append(f"the broker did not count the nonsense, or this rig does not reach it: {counts}")
        failures += scene.judge()
    return Batch.of(said, failures, counts, scene.figures())


async def _deaf(folder: Path, zygote: Zygote, told: int, strict: bool) -> Batch:
    async with _Scene(folder, zygote).opened() as scene:
        places: Mapping[str, Path] = {"deaf": scene.socket, "network deaf": scene.key("deaf")}
        logs = {role: folder / f"{role}.log" for role in places}
        deaf = [
            zygote.start(role, str(where), str(DEAF // len(places)), log=logs[role]) for role, where in places.items()
        ]
        failures: list[str] = []
        try:
            while not all(log.exists() and "all are there" in log.read_text() for log in logs.values()):
                await asyncio.sleep(0.01)
            for number in range(told):
                failures += await scene.tell(bytes(TOLD_BYTES))
                if number % 20 == 0 and not failures:
                    failures += await scene.ask()
                if failures:
                    break
        finally:
            for pid in deaf:
                os.kill(pid, signal.SIGKILL)
                zygote.wait(pid)
        failures += [] if failures else await scene.ask()
        missed = 0 if failures else (await scene.statistics()).broadcasts_missed
        failures += scene.judge()
        failures += [
            f"99 % of the questions over {door} took up to {slow_ms:.0f} ms, {ANSWER_S * 1000:.0f} are allowed"
            for door, slow_ms in scene.slow_ms().items()
            if strict and slow_ms > ANSWER_S * 1000
        ]
    counts = {f"questions over {door} answered meanwhile": len(took) for door, took in scene.rounds_s.items()}
    return Batch.of(told * DEAF, failures, {**counts, "broadcasts missed": missed}, scene.figures())


def run_local(seed: int, size: int) -> Batch:
    """At least `size` hostile frames to the socket."""
    with tempfile.TemporaryDirectory(prefix="pr-") as folder, Zygote() as zygote:
        return asyncio.run(_attacked(Path(folder), zygote, LOCAL, seed, size))


def run_network(seed: int, size: int) -> Batch:
    """At least `size` hostile messages, or streams that are none, to the port."""
    with tempfile.TemporaryDirectory(prefix="pr-") as folder, Zygote() as zygote:
        return asyncio.run(_attacked(Path(folder), zygote, NETWORK, seed, size))


def run_deaf(seed: int, size: int, strict: bool = False) -> Batch:
    """`size` broadcasts to peers that do not read them. `strict`: the others' answers must be quick, too."""
    with tempfile.TemporaryDirectory(prefix="pr-") as folder, Zygote() as zygote:
        return asyncio.run(_deaf(Path(folder), zygote, size, strict))


def run_deaf_timed(seed: int, size: int) -> Batch:
    """For a machine that does nothing else."""
    return run_deaf(seed, size, strict=True)
