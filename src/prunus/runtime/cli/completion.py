"""``prunus completion``, and what a shell completes: pids, services, queues, tags, classes and the like.

The commands themselves know nothing of it: `attach` goes once through all of them and gives each parameter of a known
name its completion. Rules: an answer has a bound (`ASK_TIMEOUT_S` for the daemon, `SEARCH_S` for files); whatever goes
wrong, nothing is completed and nothing is said; and no code of the user is imported or run.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

from prunus.runtime.cli.group import Command, Options

if TYPE_CHECKING:
    from prunus.persistence.persister import Query, Record
    from prunus.persistence.requests import RequestPersister

ASK_TIMEOUT_S = 0.5
"""A daemon that has not answered by then is not waited for, ..."""
TIMEOUT_VARIABLE = "PRUNUS_COMPLETION_TIMEOUT_S"
"""... unless this environment variable says another number of seconds: for a broker that is far away."""
SEARCH_S = 0.1
"""How long files are looked through for classes."""
MAX_FILES = 200
MAX_FILE_BYTES = 500_000
PIDS_SHOWN = 30
ROWS_READ = 200
"""Of so many of the newest processes the tags, classes and queues are known."""
SHELLS = ("bash", "zsh", "fish")

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]

_SET_UP = {
    "bash": 'eval "$(prunus completion bash)"     # in ~/.bashrc',
    "zsh": 'eval "$(prunus completion zsh)"      # in ~/.zshrc, after compinit',
    "fish": "prunus completion fish | source      # in ~/.config/fish/config.fish",
}


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands in a shell.

    \b
    bash:  eval "$(prunus completion bash)"     in ~/.bashrc
    zsh:   eval "$(prunus completion zsh)"      in ~/.zshrc, after compinit
    fish:  prunus completion fish | source      in ~/.config/fish/config.fish
    """
    completer = get_completion_class(shell)
    assert completer is not None, "click completes in all of these shells"
    click.echo(f"# {_SET_UP[shell]}")
    click.echo(completer(context.find_root().command, {}, "prunus", "_PRUNUS_COMPLETE").source())


class Bash(BashComplete):
    """Completion in bash, which takes ``:`` and ``=`` for the ends of words: of ``flow:Lo`` it gives us ``Lo`` only.

    So the script hands over the line as it is, and cuts off what bash has already.
    """

    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' response item type value line="${COMP_LINE:0:COMP_POINT}"
    local word="${line##*[[:space:]]}" cut=""
    if [[ "$COMP_WORDBREAKS" == *:* && "$word" == *[:=]* ]]; then
        cut="${word%%"${word##*[:=]}"}"
    fi
    response=$(env COMP_WORDS="$line" COMP_CWORD=-1 %(complete_var)s=bash_complete "$1" 2>/dev/null)
    COMPREPLY=()
    for item in $response; do
        type="${item%%%%,*}"
        value="${item#*,}"
        if [[ $type == dir ]]; then
            compopt -o dirnames
        elif [[ $type == file ]]; then
            compopt -o default
        elif [[ $type == plain ]]; then
            COMPREPLY+=("${value#"$cut"}")
        fi
    done
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def source(self) -> str:
        return self.source_template % self.source_vars()

    def get_completion_args(self) -> tuple[list[str], str]:
        if os.environ.get("COMP_CWORD") != "-1":
            return super().get_completion_args()
        line = os.environ["COMP_WORDS"]
        words = click.shell_completion.split_arg_string(line)
        is_new = not words or line[-1:].isspace()
        return (words[1:], "") if is_new else (words[1:-1], words[-1])


add_completion_class(Bash)


def attach(root: click.Group) -> None:
    """Give the parameters of all commands their completions, by the names of command and parameter."""
    for path, command in _commands(root, ()):
        for parameter in command.params:
            completer = _completer(path, parameter)
            if completer is not None:
                _set(parameter, completer)


def _set(parameter: click.Parameter, completer: Completer) -> None:
    def complete(context: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        try:
            return completer(context, parameter, incomplete)
        except Exception:  # a shell that completes nothing is better than one that shows a traceback
            return []

    parameter.shell_complete = complete  # type: ignore[method-assign, assignment]


def _commands(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, group
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


def _completer(path: tuple[str, ...], parameter: click.Parameter) -> Completer | None:
    """Which completion a parameter has; None: that of its type."""
    is_argument = isinstance(parameter, click.Argument)
    if isinstance(parameter.type, click.Choice | click.Path | click.File):
        return None
    if f"--{parameter.name}" == "--key" and "--key" in parameter.opts and getattr(parameter, "metavar", "") == "FILE":
        return files
    if (*path, parameter.name) in _OF_COMMANDS:
        return _OF_COMMANDS[*path, parameter.name]
    by_name = _ARGUMENTS if is_argument else _OPTIONS
    return by_name.get(parameter.name or "")


# --- what is completed ------------------------------------------------------------------------------


def pids(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The newest processes that the command is for, by the end of their pids (or by the beginning, if that was typed);
    those that were named already are left out."""
    from prunus.persistence.persister import Query

    wanted = _WANTED.get(context.info_name or "", {"unfinished": True})
    rows = _newest(context, Query(limit=PIDS_SHOWN if not incomplete else ROWS_READ, **wanted))
    named = _named(context)
    items = []
    for row in rows:
        short = short_pid(row.pid)
        value = short if short.startswith(incomplete) else row.pid if row.pid.startswith(incomplete) else None
        if value is not None and not named & {short, row.pid}:
            name = row.class_id.rpartition(":")[2]
            items.append(CompletionItem(value, help=f"{name}: {_state(row)}"))
    return items[:PIDS_SHOWN]


def short_pid(pid: str) -> str:
    """The same as `display.short`, without the hundred milliseconds that it takes to import what draws tables."""
    uuid, dot, item = pid.partition(".")
    return f"{uuid[-8:]}{dot}{item}" if len(uuid) == 36 else pid


def _state(row: Record) -> str:
    if row.is_terminal:
        return row.state
    if row.aside is not None:
        return f"{row.state}, set aside"
    return row.state if row.play == "playing" else f"{row.state}, {row.play}"


def _named(context: click.Context) -> set[str]:
    given = (context.params.get(name) for name in ("pid", "pids"))
    return {pid for each in given if each for pid in ((each,) if isinstance(each, str) else each)}


def tags(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Those of the newest processes."""
    return _words((tag for row in _newest(context) for tag in row.tags), incomplete)


def known_classes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The classes of the newest processes."""
    return _words((row.class_id for row in _newest(context)), incomplete)


def launchable(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Classes in the files of this folder, and those of the newest processes."""
    found = list(find_classes(Path.cwd(), incomplete))
    try:
        known = [row.class_id for row in _newest(context)]
    except Exception:  # no daemon need run for what the files say
        known = []
    return _words([*found, *known], incomplete)


def queues(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """All that the broker has."""
    return _words(_ask(context, _queue_names), incomplete)


def queues_or_commands(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem[str]]:
    """Of ``prunus tasks``, after which either may stand."""
    items = []
    if context.parent is not None and "list" not in os.environ.get("COMP_WORDS", "").split():
        group = context.parent.command
        items = click.Group.shell_complete(group, context.parent, incomplete) if isinstance(group, click.Group) else []
    return [*items, *queues(context, parameter, incomplete)]


def services(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Those that have a log."""
    profile = context.ensure_object(Options).find_profile()
    return _words(sorted(file.stem for file in profile.log_folder.glob("*.log")), incomplete)


def schedules(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The names of schedules: they are processes of a class of their own."""
    from prunus.persistence.persister import Query

    rows = _newest(context, Query(class_id=SCHEDULE_CLASS, unfinished=True, limit=ROWS_READ))
    return _words((row.pid.removeprefix(SCHEDULE_PREFIX) for row in rows), incomplete)


def messages(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The messages that the process which was named waits for."""
    from prunus.persistence.persister import Query

    named = _named(context)
    rows = [row for row in _newest(context, Query(unfinished=True, limit=ROWS_READ)) if _is_named(row, named)]
    return _words((name for row in rows for name in row.names), incomplete)


def _is_named(row: Record, named: set[str]) -> bool:
    return any(row.pid.endswith(text) or row.pid.startswith(text) for text in named)


def key_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The keys of the profile."""
    return _words(sorted(context.ensure_object(Options).find_profile().keys.clients()), incomplete)


def profiles(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The user's own profiles; after a slash or a dot folders."""
    from prunus.runtime.profile import user_profiles

    if "/" in incomplete or incomplete.startswith((".", "~")):
        return [CompletionItem(incomplete, type="dir")]
    folder = user_profiles()
    return _words(sorted(each.name for each in folder.iterdir()) if folder.is_dir() else [], incomplete)


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    return [CompletionItem(incomplete, type="file")]


_ARGUMENTS: dict[str, Completer] = {
    "pid": pids,
    "pids": pids,
    "queue": queues,
    "process_class": launchable,
    "message": messages,
}
_OPTIONS: dict[str, Completer] = {
    "tag": tags,
    "tags": tags,
    "queue": queues,
    "queue_too": queues,
    "queues": queues,
    "parent": pids,
    "class": known_classes,
    "class_": known_classes,
    "cls": known_classes,
    "class_id": known_classes,
    "process_class": known_classes,
    "task_key": pids,
    "profile": profiles,
}
_OF_COMMANDS: dict[tuple[str | None, ...], Completer] = {
    ("daemon", "logs", "name"): services,
    ("daemon", "logs", "service"): services,
    ("daemon", "logs", "services"): services,
    ("tasks", "list", "queue"): queues_or_commands,
    ("key", "revoke", "name"): key_names,
    ("schedule", "add", "words"): launchable,
    **{("schedule", command, "name"): schedules for command in ("show", "pause", "play", "remove", "run-now")},
    **{("schedule", command, "names"): schedules for command in ("show", "pause", "play", "remove", "run-now")},
}
_WANTED: dict[str, dict[str, Any]] = {
    "play": {"play": "paused", "unfinished": True},
    "retry": {"states": ("excepted",)},
    "show": {},
    "logs": {},
    "tree": {},
    "watch": {"unfinished": True},
    "fork": {},
    "export": {},
    "delete": {"states": ("finished", "excepted", "killed")},
}
"""What processes a command is for, if not those that have not ended."""
SCHEDULE_CLASS = "prunus.runtime.schedules:Schedule"
SCHEDULE_PREFIX = "schedule-"


# --- where it is known from -------------------------------------------------------------------------


def _newest(context: click.Context, query: Query | None = None) -> Sequence[Record]:
    from prunus.persistence.persister import Query

    asked = query or Query(limit=ROWS_READ)
    found: Sequence[Record] = _ask(context, lambda call: _persister(call).query(asked))
    return found


def _persister(call: Callable[[bytes], Awaitable[bytes]]) -> RequestPersister:
    from prunus.persistence.requests import RequestPersister

    return RequestPersister(call)


async def _queue_names(call: Callable[[bytes], Awaitable[bytes]]) -> list[str]:
    import msgspec

    return sorted(msgspec.json.decode(await call(b"statistics"))["queues"])


def _ask(context: click.Context, work: Callable[[Callable[[bytes], Awaitable[bytes]]], Awaitable[Any]]) -> Any:
    """What `work` gets from the broker, which it asks by the function that it is given. Nothing if none
    answers in time, or none runs."""
    from prunus import messaging
    from prunus.errors import PrunusError
    from prunus.runtime.connecting import find_broker
    from prunus.runtime.locks import read_holder

    timeout_s = float(os.environ.get(TIMEOUT_VARIABLE) or ASK_TIMEOUT_S)
    options = context.ensure_object(Options)
    if options.key is None:
        profile = options.find_profile()
        if read_holder(profile.lock("broker")) is None:
            return []
        endpoint = find_broker(profile)
    else:
        endpoint = find_broker(key=options.key)

    async def ask() -> Any:
        communicator = await messaging.connect(endpoint, name="completion", timeout_s=timeout_s)

        async def call(request: bytes) -> bytes:
            async with asyncio.timeout(timeout_s):
                [answer] = await communicator.call([request])
            return answer

        try:
            answers.append(await work(call))
        finally:
            asked.set()
            await communicator.close()

    def run() -> None:
        try:
            asyncio.run(ask())
        except (PrunusError, TimeoutError):
            asked.set()

    # In a thread, because it takes seconds to part with a broker that says nothing; nobody waits for that here.
    answers: list[Any] = []
    asked = threading.Event()
    threading.Thread(target=run, daemon=True, name="completion").start()
    asked.wait(timeout_s)
    return answers[0] if answers else []


def find_classes(folder: Path, incomplete: str, *, seconds: float = SEARCH_S) -> Iterator[str]:
    """``module:Class`` of what looks like a process class in the files of a folder and of its packages.

    The files are read, never imported: a class counts if it is derived from one whose name is that of a base of ours,
    or from another such class in the same file.
    """
    end_s = time.monotonic() + seconds
    module, colon, _ = incomplete.partition(":")
    if colon:
        place = folder.joinpath(*module.split("."))
        names = [place.with_suffix(".py"), place / "__init__.py"]
    else:
        inner = (
            file for package in folder.iterdir() if (package / "__init__.py").is_file() for file in package.glob("*.py")
        )
        names = [*sorted(folder.glob("*.py")), *sorted(inner)]
    for file in names[:MAX_FILES]:
        if not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
            continue
        parts = file.relative_to(folder).with_suffix("").parts
        dotted = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        bases = {"Process", "WorkChain"}
        for found in _CLASS.finditer(file.read_text(encoding="utf-8", errors="replace")):
            parents = {re.split(r"[\[.]", part.strip())[0 if "[" in part else -1] for part in found[2].split(",")}
            if parents & bases:
                bases.add(found[1])
                yield f"{dotted}:{found[1]}"
        if time.monotonic() > end_s:
            return


_CLASS = re.compile(r"^class[ \t]+(\w+)[ \t]*\(([^)]*)\)[ \t]*:", re.MULTILINE)


def _words(words: Any, incomplete: str) -> list[CompletionItem[str]]:
    """Each once, in their order."""
    return [CompletionItem(word) for word in dict.fromkeys(words) if word.startswith(incomplete)]
