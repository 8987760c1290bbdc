"""``prunus broker``: how the broker is, its limits, its numbers for other programs, its database."""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prunus.runtime.cli.connection import errors_told_once, refusal, with_controller
from prunus.runtime.cli.group import Group, Options
from prunus.runtime.cli.patience import bar
from prunus.runtime.cli.values import END_OF_INTEGERS, FiniteRange
from prunus.runtime.terminals import can_redraw

if TYPE_CHECKING:
    from prunus.runtime.backend import BrokerStatus
    from prunus.runtime.controller import ProcessController
    from prunus.runtime.profile import Profile

REFRESH_S = 1.0
HTTP_TIMEOUT_S = 5.0
"""How long somebody who asks for the numbers may say nothing."""
ANSWER_TIMEOUT_S = 2.0
"""How long the broker gets for them."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NONE = "none"
MAX_SHOWN_CHARS = 40
"""Of a wrong number, in a complaint about it."""


def bound(
    kind: type[int] | type[float], least: float, *, or_none: bool = True
) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Reads a number that the broker can take: a whole one is below 2**63. Or "none", if that means something."""

    range_ = f"from {least:g} on, below 2**63" if kind is int else f"from {least:g} on"
    choice = f", nor {NONE!r}" if or_none else ""

    def read(context: click.Context, parameter: click.Parameter, value: str | None) -> int | float | str | None:
        if value is None or (or_none and value == NONE):
            return value
        shown = value if len(value) <= MAX_SHOWN_CHARS else f"{value[:MAX_SHOWN_CHARS]}..."
        try:
            number = kind(value)
        except ValueError:  # also for more digits than Python reads
            number = -1
        if not least <= number < (END_OF_INTEGERS if kind is int else float("inf")):
            raise click.BadParameter(f"{shown!r} is not a number {range_}{choice}")
        return number

    return read


def read_name(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if not value:
        raise click.BadParameter("it needs a name, not an empty text")
    return value


@click.group(cls=Group)
def broker() -> None:
    """Look at the broker, limit queues, and look after its database."""


@broker.command()
@click.option("--lease", "lease_s", type=FiniteRange(0.1, 3600), metavar="SECONDS", help="Who is silent for longer loses what it holds (15).")  # fmt: skip  # noqa: E501
@click.pass_obj
def run(options: Options, lease_s: float | None) -> None:
    """Be the broker of a profile, here in the foreground.

    For those who have a supervisor of their own; a daemon starts its broker itself. Ctrl-C (SIGTERM) ends it: nothing
    is lost, and workers and clients connect again to the next one.
    """
    from prunus.messaging.messages import LEASE_S
    from prunus.runtime import logs
    from prunus.runtime.broker import serve
    from prunus.runtime.locks import ServiceLock

    profile = options.find_profile()
    logs.configure(profile, "broker")
    with ServiceLock(profile.lock("broker")) as lock:
        serve(profile, lease_s=LEASE_S if lease_s is None else lease_s, lock=lock)


@broker.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("-w", "--watch", is_flag=True, help="Go on until Ctrl-C.")
@click.pass_obj
def status(options: Options, as_json: bool, watch: bool) -> None:
    """Show queues, resources and sessions."""
    from prunus.messaging.liveness import this_peer
    from prunus.runtime import display, overview

    if watch and as_json:
        raise click.UsageError("--watch is for people, and --json for programs: say one of them")

    here = this_peer().host

    async def look(controller: ProcessController) -> None:
        now = await read_status(controller)
        if as_json:
            click.echo(display.as_json(now))
        elif not watch:
            display.show(display.console(), overview.broker_picture(now, here))
        else:
            await _watch(controller, now, here)

    with_controller(options, look)


@broker.command()
@click.argument("queue", callback=read_name)
@click.option("--concurrency", metavar="N|none", callback=bound(int, 0), help="How many of its tasks may run at once.")
@click.option("--rate", metavar="R|none", callback=bound(float, 1e-6), help="Deliveries per second, in the long run.")
@click.option(
    "--burst", metavar="N", callback=bound(int, 1, or_none=False), help="Deliveries at once after a quiet time."
)
@click.option("--max-length", metavar="N|none", callback=bound(int, 0), help="How many tasks it may have.")
@click.option("--json", "as_json", is_flag=True, help="For programs: the limits as they are then.")
@click.pass_obj
def limit(
    options: Options,
    queue: str,
    concurrency: int | str | None,
    rate: float | str | None,
    burst: int | None,
    max_length: int | str | None,
    as_json: bool,
) -> None:
    """Limit a queue, at once and for good.

    What is not said stays as it is. Without any option the limits are shown.
    """
    import msgspec

    from prunus.messaging.inventory import QueueLimits
    from prunus.runtime import display, overview

    said = {"concurrency": concurrency, "rate_per_s": rate, "burst": burst, "max_length": max_length}
    changes = {name: None if value == NONE else value for name, value in said.items() if value is not None}

    async def change(controller: ProcessController) -> QueueLimits:
        queues = (await controller.communicator.statistics()).queues
        limits = queues[queue].limits if queue in queues else QueueLimits()
        if changes:
            limits = msgspec.structs.replace(limits, **changes)
            if burst is not None and limits.rate_per_s is None:
                raise click.UsageError(f"--burst says how a rate begins, and {queue!r} has none then: say --rate R too")
            await controller.communicator.configure_queue(queue, limits)
        return limits

    limits = with_controller(options, change)
    if as_json:
        click.echo(display.as_json(limits))
    else:
        click.echo(f"{display.plain(queue)}: {overview.limits_text(limits) or 'no limits'}")


@broker.command()
@click.argument("name", callback=read_name)
@click.argument("tokens", metavar="N|none", callback=bound(int, 0))
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def resource(options: Options, name: str, tokens: int | str, as_json: bool) -> None:
    """Say how many tokens of a resource there are.

    Tasks that need some of them run only while they are free. "none": no task may ask for it any more.
    """
    from prunus.runtime import display

    capacity = None if isinstance(tokens, str) else tokens
    with_controller(options, lambda controller: controller.communicator.configure_resource(name, capacity))
    if as_json:
        click.echo(display.as_json({"resource": name, "capacity": capacity}))
    elif capacity is None:
        click.echo(f"{display.plain(name)}: no task may ask for it from now on")
    else:
        click.echo(f"{display.plain(name)}: {display.count(capacity, 'token')}")


@broker.command()
@click.option("--serve", metavar="ADDRESS:PORT", help="Answer GET /metrics there (on this host only), until Ctrl-C.")
@click.pass_obj
def metrics(options: Options, serve: str | None) -> None:
    """Print all numbers in the text format of Prometheus."""
    from prunus.runtime.metrics import as_prometheus

    if serve is None:
        click.echo(as_prometheus(with_controller(options, read_status)), nl=False)
        return
    host, _, port = serve.rpartition(":")
    if host.strip("[]") not in LOOPBACK or not port.isdecimal() or int(port) > 65_535:
        raise click.UsageError(f"--serve needs an address of this host and a port, say 127.0.0.1:9464, not {serve!r}")
    _serve_metrics(options, host.strip("[]"), int(port))


# --- its database -----------------------------------------------------------------------------------


@broker.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-f", "--force", is_flag=True, help="Replace FILE if it exists.")
@click.pass_obj
def backup(options: Options, file: Path, force: bool) -> None:
    """Copy the database to FILE, while everything goes on.

    All that was confirmed before is in it. Without a running broker the file is copied directly. Bodies of tasks that
    are too large for the database go to the folder FILE.blobs. What is no file, and what the profile has for itself, is
    never replaced.
    """
    from prunus.runtime import overview, upkeep

    profile, target = options.find_profile(), file.absolute()
    with bar("backup") as progress:
        if _serves(profile):
            size = with_controller(options, lambda controller: _back_up(controller, target, force, progress))
        else:
            size = upkeep.back_up(profile, target, replace=force, progress=progress)
    click.echo(f"{target}: {overview.size(size)}")
    if (blobs := upkeep.blobs_of_backup(target)).is_dir():
        click.echo(f"{blobs}: the bodies of large tasks, which belong to it")


@broker.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_obj
def restore(options: Options, file: Path) -> None:
    """Put a backup in the place of the database.

    Only while no daemon runs. The database that was there is kept beside it.
    """
    from prunus.runtime import upkeep

    profile = options.find_profile()
    aside = upkeep.restore(profile, file.absolute())
    click.echo(f"{profile.database} is the backup {file} now.")
    if aside is not None:
        click.echo(f"What was there is in {aside}; delete it when you do not need it any more.")
    click.echo("`prunus daemon start` goes on from there.", err=True)


@broker.command()
@click.pass_obj
def vacuum(options: Options) -> None:
    """Give free space of the database back to the file system.

    The broker does so by itself when much is free. A file of an older version is written anew, which needs a stopped
    daemon and once more its size on the disk.
    """
    from prunus.runtime import overview, upkeep

    profile = options.find_profile()
    if _serves(profile):
        with bar("vacuum") as progress:
            given = with_controller(options, lambda controller: _give_back(controller, progress))
        click.echo(f"{overview.size(given)} were given back.")
    else:
        before, after = upkeep.vacuum(profile)
        click.echo(f"{profile.database}: {overview.size(before)} before, {overview.size(after)} now.")


# --- parts ------------------------------------------------------------------------------------------


async def read_status(controller: ProcessController) -> BrokerStatus:
    """How the broker is now."""
    import msgspec

    from prunus.runtime.backend import BrokerStatus

    return msgspec.convert(await controller.broker_statistics(), BrokerStatus)


async def _watch(controller: ProcessController, now: BrokerStatus, here: str) -> None:
    """Show it again and again."""
    from rich.live import Live

    from prunus.runtime import display, overview

    console = display.console()
    if not can_redraw(console.file):
        raise click.UsageError("--watch needs a terminal, and not a dumb one; --json is for programs")
    with Live(overview.broker_picture(now, here), console=console, auto_refresh=False, transient=False) as live:
        while True:
            await asyncio.sleep(REFRESH_S)
            live.update(overview.broker_picture(await read_status(controller), here), refresh=True)


def _serve_metrics(options: Options, host: str, port: int) -> None:
    """Answer until Ctrl-C; each request in a thread of its own, so that a slow one keeps nobody waiting."""
    from concurrent.futures import CancelledError
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from anyio.from_thread import BlockingPortal, start_blocking_portal

    from prunus.errors import PrunusError
    from prunus.runtime.controller import connect
    from prunus.runtime.metrics import as_prometheus

    async def ask() -> str:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            return as_prometheus(await read_status(controller))

    class Handler(BaseHTTPRequestHandler):
        timeout = HTTP_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/", "/metrics"):
                self.answer(404, "the numbers are at /metrics\n")
                return
            try:
                text = portal.call(ask)
            except TimeoutError:
                self.answer(503, f"the broker did not answer within {ANSWER_TIMEOUT_S:g} s\n")
            except PrunusError as error:
                self.answer(503, f"the broker does not answer: {error}\n")
            else:
                self.answer(200, text, "; version=0.0.4")

        def answer(self, code: int, text: str, version: str = "") -> None:
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", f"text/plain{version}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: somebody asks every few seconds."""

    class Server(ThreadingHTTPServer):
        address_family = _family(host)

        def service_actions(self) -> None:
            """Between two questions, and twice a second: a broker that is away comes back, a key that was revoked does
            not."""
            if (error := refusal(controller)) is not None:
                raise error

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing of those who left before they were answered, nor of those whom Ctrl-C cuts off."""
            if not isinstance(sys.exception(), OSError | CancelledError):
                super().handle_error(request, client_address)

    address = f"[{host}]" if ":" in host else host
    try:
        server = Server((host, port), Handler)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "another program does: stop that one" if taken else error.strerror
        raise click.ClickException(
            f"can't listen at {address}:{port}: {why}, or say another port (0: a free one)"
        ) from error
    portal: BlockingPortal
    with (
        errors_told_once(),
        server,
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(connect(options.local_profile(), key=options.key)) as controller,
    ):
        click.echo(f"http://{address}:{server.server_port}/metrics (Ctrl-C ends it)", err=True)
        server.serve_forever()


def _family(host: str) -> Any:
    import socket

    return socket.AF_INET6 if ":" in host else socket.AF_INET


async def _back_up(
    controller: ProcessController, target: Path, replace: bool, progress: Callable[[int, int], None]
) -> int:
    from prunus.runtime import upkeep

    ask = controller.communicator.call
    request: upkeep.Request = upkeep.BackUp(file=str(target), replace=replace)
    while True:
        copying = upkeep.decode_copying((await ask([upkeep.encode(request)]))[0])
        upkeep.raise_failure(copying)
        progress(copying.done, copying.total)
        if copying.size is not None:
            return copying.size
        await asyncio.sleep(upkeep.ASK_INTERVAL_S)
        request = upkeep.CopyAsk()


async def _give_back(controller: ProcessController, progress: Callable[[int, int], None]) -> int:
    from prunus.runtime import upkeep

    given = 0
    while True:
        [answer] = await controller.communicator.call([upkeep.encode(upkeep.GiveBack())])
        space = upkeep.decode_space(answer)
        if not space.gives_back:
            raise click.ClickException(
                "this database was made by an older version: `prunus daemon stop`, then `prunus broker vacuum` writes "
                "it anew; after that it gives back space while it serves"
            )
        given += space.given
        progress(given, given + space.free_pages)
        if not space.given:
            return space.page_bytes * given
        await asyncio.sleep(0)


def _serves(profile: Profile) -> bool:
    from prunus.runtime.locks import read_holder

    return any(read_holder(profile.lock(name)) for name in ("daemon", "broker"))
