"""How a process is run, said by its class, by who launches it, or by its parent: the options, once for all.

===============  =====================================================================================================
option           meaning
===============  =====================================================================================================
pid              its name, if the caller wants to choose it; a new UUIDv7 otherwise
key              a name of the caller's for what is to be done: while a process with this key is kept, launching it
                 again makes nothing new and leads to that process
tags             words to find it by
queue            the workers that take this queue run it; ``"default"`` if nobody says anything
priority         0 to 9, 9 first. A child whose class says nothing has that of its parent
resources        tokens that it takes while a worker has it (not while it is parked): ``{"licence": 1}``
on_exception     ``"fail"`` or ``"pause"``: what becomes of it when a step raises for good
parent_close     what becomes of a child when its parent ends: ``"kill"``, ``"abandon"`` or ``"wait"``
===============  =====================================================================================================

``queue``, ``priority`` and ``resources`` may be attributes of a class; who makes the process may say otherwise. They
are for the workers of a daemon: `prunus.execute` runs everything here and now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict

DEFAULT_QUEUE = "default"
RESERVED_QUEUES = frozenset({"control"})
"""Queues in which workers find what is no step."""
MAX_PRIORITY = 9
MAX_NAME_CHARS = 255
"""The longest name of a queue or a resource, and the longest key."""
MAX_TOKENS = 2**31 - 1
"""The most tokens of one resource that one process takes."""

ParentClose = Literal["kill", "abandon", "wait"]
OnException = Literal["fail", "pause"]


class RunOptions(TypedDict, total=False):
    """What several processes can have in common. None is the same as nothing said."""

    tags: Iterable[str]
    queue: str | None
    priority: int | None
    resources: Mapping[str, int] | None
    on_exception: OnException | None


class MapOptions(RunOptions, total=False):
    """For each of the children of `Process.map`."""

    parent_close: ParentClose


class SubmitOptions(MapOptions, total=False):
    """For a child: `Process.submit`. (Its parent waits for the very pid that it gave, so a child has no key.)"""

    pid: str | None


class BatchOptions(RunOptions, total=False):
    """For each of the processes of `ProcessController.launch_many`."""

    paused: str | bool
    """It waits for a `play` before its first step; a text is the reason."""
    pause_at: str | None
    """It pauses before this step."""


class LaunchOptions(BatchOptions, total=False):
    """For one process: `ProcessController.launch`."""

    pid: str | None
    key: str | None
    parent: str | None
    """The pid of the process whose child it is."""
    parent_close: ParentClose


def read_pid(pid: object) -> str:
    """Raises `ValueError` for what can be no pid: lists of pids are lines, and the words of a shell."""
    if not isinstance(pid, str) or not pid or any(letter.isspace() or not letter.isprintable() for letter in pid):
        raise ValueError(f"a pid is a text without spaces and control characters, not {pid!r:.300}")
    return pid


def read_queue(queue: object) -> str:
    """Raises `ValueError` for what is no name of a queue."""
    name = _read_name("queue", queue)
    if name in RESERVED_QUEUES:
        raise ValueError(f"the queue {name!r} is for what workers are told beside their work; choose another name")
    return name


def read_key(key: object) -> str:
    """Raises `ValueError` for what is no key."""
    return _read_name("key", key)


def read_priority(priority: object) -> int:
    """Raises `ValueError` for what is no priority."""
    if not isinstance(priority, int) or isinstance(priority, bool) or not 0 <= priority <= MAX_PRIORITY:
        raise ValueError(f"a priority is a number from 0 to {MAX_PRIORITY} (the first), not {priority!r}")
    return priority


def read_resources(resources: object) -> dict[str, int]:
    """Raises `ValueError` for what are no tokens by the names of their resources."""
    if not isinstance(resources, Mapping):
        raise ValueError(f'resources are tokens by name, such as {{"licence": 1}}, not {resources!r}')
    for name, tokens in resources.items():
        _read_name("resource", name)
        if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= MAX_TOKENS:
            raise ValueError(f"of the resource {name!r} a process takes 1 to {MAX_TOKENS:,} tokens, not {tokens!r}")
    return dict(resources)


def read_map_options(options: MapOptions) -> dict[str, Any]:
    """Those that are given, as plain data. Raises `ValueError` for what no process could have."""
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    readers = {"queue": read_queue, "priority": read_priority, "resources": read_resources, "tags": read_tags}
    return {name: readers[name](value) if name in readers else value for name, value in given.items()}


def read_tags(tags: object) -> list[str]:
    """Raises `ValueError` for what are no tags; a text is one word, not many letters."""
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise ValueError(f'tags are several texts, such as ["demo"], not {tags!r:.300}')
    return [str(tag) for tag in tags]


def read_class_options(process_class: Any) -> None:
    """Raises `ValueError` for a class whose options no process could have."""
    read_queue(process_class.queue)
    read_priority(process_class.priority)
    read_resources(process_class.resources)


def _read_name(what: str, name: object) -> str:
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARS:
        raise ValueError(f"a {what} is a text of 1 to {MAX_NAME_CHARS} characters, not {name!r:.300}")
    return name
