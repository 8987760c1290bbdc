"""A process class, described for people and tools: as plain data, as Markdown, as a Mermaid flowchart.

`describe` gathers what a class says of itself into dictionaries, lists, texts and numbers; `as_markdown` and
`as_mermaid` need nothing but these, so a description may have come over a wire or out of a file.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prunus.processes import loading
from prunus.processes.ports import plain
from prunus.processes.schemas import Arguments
from prunus.processes.spec import ProcessSpec

if TYPE_CHECKING:
    from prunus.processes.process import Process


def describe(process_class: type[Process]) -> dict[str, Any]:
    """What a process class is, takes, gives and can be asked, as data that JSON can hold. Raises `SpecError`.

    The keys: ``class_id``, ``name``, ``doc``, ``version``; ``inputs`` and ``outputs`` (`PortNamespace.describe`);
    ``exit_codes``; ``messages``; ``queries`` and ``updates`` (their parameters); ``steps``, with those of their options
    that are not the usual ones; and ``outline``, None if there is none.
    """
    return describe_parts(
        process_class,
        process_class.spec(),
        process_class.version,
        process_class.steps(),
        process_class.queries(),
        process_class.updates(),
    )


def describe_parts(
    process_class: type[Any],
    spec: ProcessSpec,
    version: int,
    steps: Mapping[str, Any],
    queries: Mapping[str, Callable[..., Any]],
    updates: Mapping[str, Callable[..., Any]],
) -> dict[str, Any]:
    """What `describe` returns, of these parts. `steps` are the `StepOptions` of those that have some, by name."""
    described = spec.describe()
    outline = described.get("outline")
    names = dict.fromkeys([*(_step_names(outline) if outline else ["run"]), *steps])
    return {
        "class_id": loading.class_id(process_class),
        "name": described["name"],
        "doc": inspect.cleandoc(process_class.__dict__.get("__doc__") or ""),
        "version": version,
        "inputs": described["inputs"],
        "outputs": described["outputs"],
        "exit_codes": described["exit_codes"],
        "messages": described["messages"],
        "queries": {name: _describe_method(method) for name, method in queries.items()},
        "updates": {name: _describe_method(method) for name, method in updates.items()},
        "steps": {name: _describe_step(process_class, name, steps.get(name)) for name in names},
        "outline": outline,
    }


def _describe_method(method: Callable[..., Any]) -> dict[str, Any]:
    return {"doc": inspect.getdoc(method) or "", "parameters": Arguments(method).describe()}


def _describe_step(process_class: type[Any], name: str, options: Any) -> dict[str, Any]:
    method = getattr(process_class, name if options is None else options.method, None)
    about: dict[str, Any] = {"doc": inspect.getdoc(method) or "" if callable(method) else ""}
    for field in () if options is None else dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name != "name" and value != field.default and not (field.name == "method" and value == name):
            about[field.name] = _plain_option(value)
    return about


def _plain_option(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain_option(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return plain(value)


def _step_names(block: Iterable[Any]) -> Iterator[str]:
    """The steps in an outline, in the order of the text."""
    for instruction in block:
        if isinstance(instruction, str):
            yield instruction
        elif "return" not in instruction:
            for inner in instruction.values():
                yield from _step_names(inner)


# --- Markdown -------------------------------------------------------------------------------------------


def as_markdown(description: Mapping[str, Any]) -> str:
    """A description as a page of Markdown. The outline is a Mermaid flowchart; parts that are empty are left out."""
    parts = [f"# {description['name']}", f"`{description['class_id']}`, version {description['version']}"]
    if description["doc"]:
        parts.append(description["doc"])
    for title in ("inputs", "outputs"):
        rows = list(_port_rows(description[title]))
        if rows:
            parts += [f"## {title.capitalize()}", _table(("name", "type", "required", "default", "help"), rows)]
    messages = [(f"`{name}`", about["type"], about.get("help", "")) for name, about in description["messages"].items()]
    if messages:
        parts += ["## Messages", _table(("name", "type", "help"), messages)]
    for title in ("queries", "updates"):
        rows = [(f"`{_call(name, about)}`", _first_line(about["doc"])) for name, about in description[title].items()]
        if rows:
            parts += [f"## {title.capitalize()}", _table(("call", "help"), rows)]
    codes = [(str(code["status"]), f"`{code['label']}`", code["message"]) for code in description["exit_codes"]]
    parts += ["## Exit codes", _table(("status", "label", "message"), codes)]
    steps = [
        (f"`{name}`", _options_text(about), _first_line(about["doc"])) for name, about in description["steps"].items()
    ]
    parts += ["## Steps", _table(("name", "options", "help"), steps)]
    if description["outline"]:
        parts += ["## Outline", f"```mermaid\n{as_mermaid(description)}```"]
    return "\n\n".join(parts) + "\n"


def _port_rows(space: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, ...]]:
    for name, about in space["ports"].items():
        path, help = f"{prefix}{name}", about.get("help", "")
        required = "yes" if about.get("required", True) else "no"
        if "ports" in about:
            kind = f"namespace; others: {about['dynamic']}" if "dynamic" in about else "namespace"
            yield f"`{path}`", kind, required, "", help
            yield from _port_rows(about, f"{path}.")
        else:
            default = f"`{about['default']}`" if "default" in about else ""
            yield f"`{path}`", about["type"], required, default, help
    if "dynamic" in space and not prefix:
        yield "any other", space["dynamic"], "no", "", ""


def _call(name: str, about: Mapping[str, Any]) -> str:
    parameters = (
        f"{parameter}: {said['type']}" + (f" = {said['default']}" if "default" in said else "")
        for parameter, said in about["parameters"].items()
    )
    return f"{name}({', '.join(parameters)})"


def _options_text(about: Mapping[str, Any]) -> str:
    options = {name: value for name, value in about.items() if name != "doc"}
    retry = options.pop("retry", None)
    texts = [] if retry is None else [f"up to {retry['max_attempts']} attempts"]
    texts += [
        f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}" for name, value in options.items()
    ]
    return "; ".join(texts)


def _first_line(doc: str) -> str:
    return doc.partition("\n")[0]


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in line)} |" for line in lines
    )


# --- Mermaid --------------------------------------------------------------------------------------------

_Tails = list[tuple[str, str | None]]
"""Nodes from which the next arrow starts, with what stands at it."""


def as_mermaid(description: Mapping[str, Any]) -> str:
    """The outline as a Mermaid flowchart, with its branches and loops.

    A process without an outline decides in its steps which one is next, so only the first one has an arrow.
    """
    chart = _Chart()
    begin = chart.node("([begin])")
    if description["outline"]:
        tails = chart.block(description["outline"], [(begin, None)])
        if tails:
            chart.join(tails, chart.node("([end])"))
    else:
        tails = [(begin, None)]
        for name in description["steps"]:
            node = chart.step(name)
            chart.join(tails, node)
            tails = []
    return "\n".join(["flowchart TD", *chart.lines]) + "\n"


class _Chart:
    """The lines of a flowchart."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._count = 0

    def node(self, shape: str) -> str:
        name = f"n{self._count}"
        self._count += 1
        self.lines.append(f"    {name}{shape}")
        return name

    def step(self, text: str) -> str:
        return self.node(f'["{_quote(text)}"]')

    def join(self, tails: _Tails, node: str) -> None:
        for tail, label in tails:
            self.lines.append(f"    {tail} -->{f'|{label}|' if label else ''} {node}")

    def block(self, instructions: Iterable[Any], tails: _Tails) -> _Tails:
        for instruction in instructions:
            tails = self._instruction(instruction, tails)
        return tails

    def _instruction(self, instruction: Any, tails: _Tails) -> _Tails:
        if isinstance(instruction, str):
            node = self.step(instruction)
            self.join(tails, node)
            return [(node, None)]
        if "return" in instruction:
            self.join(tails, self.node(f'(["return {instruction["return"]}"])'))
            return []
        behind: _Tails = []
        for title, body in instruction.items():
            word, _, predicate = title.partition(" ")
            if word == "else":
                return behind + self.block(body, tails)
            node = self.node(f'{{"{_quote(predicate)}?"}}')
            self.join(tails, node)
            ends = self.block(body, [(node, "yes")])
            if word == "while":
                self.join(ends, node)
            else:
                behind += ends
            tails = [(node, "no")]
        return behind + tails


def _quote(text: str) -> str:
    return text.replace('"', "#quot;")
