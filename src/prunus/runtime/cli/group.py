"""The root of the command line: options that every command takes, and errors as sentences."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from prunus.runtime.terminals import is_dumb

if TYPE_CHECKING:
    from prunus.runtime.profile import Profile

INTERRUPTED = 130
"""The exit code after Ctrl-C."""
EXIT_CODES = {
    0: "it is done; what was waited for has ended well",
    1: "it failed, in part or whole, or what was waited for did; one sentence says why and what to do",
    2: "the command was written wrongly; nothing was done",
    INTERRUPTED: "Ctrl-C",
}
"""All that a command ends with."""
SECTIONS = {
    "Processes": ("launch", "list", "show", "watch", "tree", "logs", "top", "describe"),
    "Control": ("pause", "play", "kill", "retry", "resume", "send", "query", "update", "edit", "settle", "fork"),
    "Schedules": ("schedule",),
    "The profile and its daemon": ("init", "daemon", "worker", "broker", "tasks", "key", "doctor"),
    "Looking after it": ("delete", "prune", "export", "import", "backup"),
}
"""How ``prunus --help`` is divided. What is not named here stands at the end."""
OTHERS = "Others"
OTHER_NAMES: dict[str | None, dict[str, str]] = {
    None: {
        "help": "prunus --help",
        "version": "prunus --version",
        "ps": "prunus list",
        "ls": "prunus list",
        "rm": "prunus delete",
        "remove": "prunus delete",
        "report": "prunus logs",
        "status": "prunus show PID` or `prunus daemon status",
        "inspect": "prunus show",
        "run": "prunus launch",
        "submit": "prunus launch",
        "cancel": "prunus kill",
        "attach": "prunus watch",
        "follow": "prunus logs -f",
        "start": "prunus daemon start",
        "stop": "prunus kill PID` or `prunus daemon stop",
        "restart": "prunus retry PID` or `prunus daemon restart",
        "reload": "prunus daemon reload",
        "scale": "prunus daemon scale",
        "unit": "prunus daemon unit",
        "queue": "prunus tasks",
        "queues": "prunus tasks list",
        "task": "prunus tasks",
        "cron": "prunus schedule",
        "schedules": "prunus schedule list",
        "keys": "prunus key list",
        "workers": "prunus daemon status",
        "backup": "prunus broker backup",
        "restore": "prunus broker restore",
        "metrics": "prunus broker metrics",
    },
    "daemon": {"ps": "prunus daemon status", "list": "prunus daemon status", "kill": "prunus daemon stop"},
    "schedule": {
        "ls": "prunus schedule list",
        "rm": "prunus schedule remove",
        "delete": "prunus schedule remove",
        "create": "prunus schedule add",
        "new": "prunus schedule add",
        "run": "prunus schedule run-now",
        "trigger": "prunus schedule run-now",
        "resume": "prunus schedule play",
    },
    "tasks": {"ls": "prunus tasks list", "rm": "prunus tasks delete", "remove": "prunus tasks delete"},
    "key": {
        "ls": "prunus key list",
        "rm": "prunus key revoke",
        "remove": "prunus key revoke",
        "delete": "prunus key revoke",
        "create": "prunus key add",
        "new": "prunus key add",
    },
}
"""What people write who know other tools, by the group in which they do (None: the program), and what it is here."""
MIN_FOLD = 40
"""A narrower terminal breaks lines by itself."""
_ERROR = "Error: "


@dataclass
class Options:
    """The options that every command takes."""

    profile: str | None = None
    key: str | None = None
    """The file of a key, for a broker on a network."""
    debug: bool = False

    def find_profile(self) -> Profile:
        """The profile, for what is done on this host alone: a key for a broker elsewhere is refused."""
        self.refuse_key()
        return self._profile_here()

    def local_profile(self) -> Profile | None:
        """The profile, unless a key is given for a broker elsewhere: for what is done over either."""
        return self._profile_here() if self.key is None else None

    def refuse_key(self) -> None:
        """`click.UsageError` if a key is given: it says which profile of this host is not touched."""
        if self.key is None:
            return
        from prunus.errors import ProfileError

        try:
            here = f" (here {self._profile_here().path})"
        except ProfileError:  # none, or one that can't be read
            here = ""
        context = click.get_current_context(silent=True)
        what = f"`{context.command_path}`" if context is not None else "this"
        raise click.UsageError(
            f"{what} is about a profile of the host on which it runs{here}, not about the broker that --key is for: "
            "run it on the broker's own host, with --profile or in its folder, not with --key",
            context,
        )

    def _profile_here(self) -> Profile:
        from prunus.runtime.profile import Profile

        return Profile.find(self.profile)


def main() -> None:
    """The program ``prunus``, once all commands are there."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to fail
    atexit.register(gc.freeze)  # what is there in the end needs no last search for cycles, which takes long
    try:
        cli(prog_name="prunus")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


class Command(click.Command):
    """A command that takes the options of `Options` too, wherever they stand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in self.params:
            if isinstance(option, click.Option) and isinstance(option.type, click.IntRange) and not option.count:
                option.metavar = option.metavar or "N"
        if not any("--profile" in parameter.opts for parameter in self.params):
            self.params.append(
                click.Option(["--profile"], metavar="NAME|PATH", expose_value=False, callback=_keep, hidden=True)
            )
        self.params.append(click.Option(["--key"], metavar="FILE", expose_value=False, callback=_keep, hidden=True))
        self.params.append(click.Option(["--debug"], is_flag=True, expose_value=False, callback=_keep, hidden=True))


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value == "":
        raise click.BadParameter("it is empty; is a variable of the shell not set?")
    options = context.ensure_object(Options)
    if value and parameter.name:
        setattr(options, parameter.name, value)
    if options.profile and options.key:
        raise click.UsageError(
            f"--profile {options.profile} is a profile of this host, and --key {options.key} is for a broker on a "
            "network: say one of them",
            context,
        )


def _show_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from prunus import __version__

        click.echo(f"prunus {__version__}")
        context.exit()


class Group(click.Group):
    """Commands in the order in which they are written here; errors as one sentence."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.parent is not None:
            super().format_commands(ctx, formatter)
            return
        width = max(len(name) for name in self.commands)
        for title, commands in sections(self).items():
            with formatter.section(title):
                room = formatter.width - width - 6
                formatter.write_dl(
                    [(f"{name:<{width}}", command.get_short_help_str(room)) for name, command in commands.items()]
                )

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            here = OTHER_NAMES.get(self.name if ctx.parent else None, {}).get(args[0])
            if here is None:
                raise
            raise click.UsageError(f"No such command {args[0]!r}. Here it is `{here}`.", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.parent is not None:
            return super().invoke(ctx)
        from prunus.errors import PrunusError

        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except click.ClickException as error:
            text = folded(error.format_message())
            vars(error).update(format_message=lambda: text)
            raise
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:  # the outermost place: nobody else can say it to the user
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            if ctx.ensure_object(Options).debug:
                raise
            if isinstance(error, PrunusError):
                raise click.ClickException(folded(_with_hint(error, ctx.ensure_object(Options)))) from error
            if isinstance(error, ValueError) and _is_about_arguments(error):
                raise click.ClickException(folded(str(error))) from error
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise click.ClickException(f"{what} (this should not happen; --debug shows where)") from error


Group.group_class = Group


def folded(message: str) -> str:
    """An error with its lines broken between words, where a person reads it on a terminal; no word is ever cut."""
    return _folded(f"{_ERROR}{message}").removeprefix(_ERROR) if sys.stderr.isatty() else message


def say(text: str) -> None:
    """Print sentences, their lines broken in the same way."""
    click.echo(_folded(text) if sys.stdout.isatty() else text)


def _folded(text: str) -> str:
    width = max(shutil.get_terminal_size().columns, MIN_FOLD)
    return "\n".join(
        textwrap.fill(line, width, drop_whitespace=True, break_long_words=False, break_on_hyphens=False)
        if len(line) > width and not line.startswith((" ", "\t"))
        else line
        for line in text.split("\n")
    )


def sections(group: click.Group) -> dict[str, dict[str, click.Command]]:
    """The commands that people see, by the title under which they stand."""
    seen = {name: command for name, command in group.commands.items() if not command.hidden}
    found = {title: {name: seen.pop(name) for name in names if name in seen} for title, names in SECTIONS.items()}
    return {title: commands for title, commands in {**found, OTHERS: seen}.items() if commands}


_EPILOG = (
    "Exit codes: " + "; ".join(f"{code}: {meaning.partition(';')[0]}" for code, meaning in EXIT_CODES.items()) + "."
)


def _is_about_arguments(error: ValueError) -> bool:
    """Whether the communicator raised it: so it refuses what can't be asked of a broker."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_globals.get("__name__") in _REFUSING


_REFUSING = tuple(f"prunus.messaging.{name}" for name in ("arguments", "peer", "client", "transfers"))


def _with_hint(error: Exception, options: Options) -> str:
    """What to do about a broker that does not answer depends on whether somebody restarts it."""
    from prunus.errors import ConnectionLostError, PrunusError
    from prunus.runtime.locks import read_holder

    if not isinstance(error, ConnectionLostError) or options.key is not None:
        return str(error)
    try:
        daemon, broker = (read_holder(options.find_profile().lock(name)) for name in ("daemon", "broker"))
    except PrunusError:
        daemon = broker = None
    if broker is not None:
        what = f"{error}\nIts process runs (pid {broker.pid}), but is stopped, or has too much to do"
        return f"{what}; `prunus daemon restart` puts another in its place." if daemon is not None else f"{what}."
    if daemon is not None:
        return f"{error}\nThe daemon starts the broker again; `prunus daemon logs broker` tells why it ended."
    return f"{error}\n`prunus daemon start` starts one."


@click.group(
    cls=Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option("--profile", metavar="NAME|PATH", expose_value=False, callback=_keep, help="Which profile: a name, or a path with a slash. Otherwise $PRUNUS_PROFILE, the nearest .prunus, or the user's default.")  # fmt: skip  # noqa: E501
@click.option("--key", metavar="FILE", expose_value=False, callback=_keep, help="The file of a key: for a broker on a network, in place of a profile.")  # fmt: skip  # noqa: E501
@click.option("--debug", is_flag=True, expose_value=False, callback=_keep, help="Show tracebacks.")
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show it.")
@click.pass_context
def cli(context: click.Context) -> None:
    """Run workflows that survive: launch, watch and control processes."""
    context.ensure_object(Options)
    if os.environ.get("NO_COLOR") or is_dumb():  # (for tables rich sees to it)
        context.color = False
