"""Process classes described as data, Markdown and Mermaid."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from prunus.processes import Process, WorkChain, if_, return_, while_
from prunus.processes.describe import as_markdown, as_mermaid, describe, describe_parts
from prunus.processes.steps import RetryPolicy, query, step, update


class Scan(WorkChain):
    """Scan a parameter
    until it | converges.
    """

    version = 3

    @dataclass
    class Messages:
        stop: str

    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.input("cell.a", valid_type=list[float], default=[1.0], help="in | Å")
        spec.input("cell.b", default=lambda cell: cell.a, metadata={"kind": float, "tags": {"x"}, "at": object})
        spec.input("broken", default=lambda: 1 / 0)
        spec.input_namespace("options", dynamic=True, valid_type=int, required=False)
        spec.output("energy", valid_type=float, help="in eV")
        spec.exit_code(400, "ERROR_LOST", "lost after {n} steps")
        spec.outline(
            cls.prepare,
            while_(cls.goes_on)(cls.relax, if_(cls.is_lost)(return_(400)).elif_(cls.is_odd)(cls.prepare)),
            if_(cls.is_odd)(cls.relax).else_(return_),
        )

    @step(name="setup", retry=RetryPolicy(max_attempts=4, retry_on=(OSError,)), timeout=60, renamed_from="init")
    def prepare(self) -> None:
        """Prepare it.

        At length.
        """

    async def relax(self) -> None: ...

    def goes_on(self) -> bool:
        return False

    def is_lost(self) -> bool:
        return False

    def is_odd(self) -> bool:
        return False

    @query
    def how_far(self, since: int = 0) -> float:
        """How far it is."""
        return 0.0

    @update
    def set_limit(self, limit: float, *, why: str | None = None) -> None: ...


class Plain(Process):
    async def run(self) -> None: ...

    @step(effect="once")
    async def after(self) -> None: ...


class Outlined(WorkChain):
    @classmethod
    def define(cls, spec: Any) -> None:
        super().define(spec)
        spec.outline(cls.one, return_(7))

    def one(self) -> None: ...


def test_a_description_is_plain_data() -> None:
    """JSON holds it; it says what the class takes, gives, can be asked, and does."""
    about = json.loads(json.dumps(describe(Scan)))
    assert about["class_id"].endswith("test_describe:Scan")
    assert (about["name"], about["version"]) == ("Scan", 3)
    assert about["doc"] == "Scan a parameter\nuntil it | converges."
    assert about["inputs"] == {
        "ports": {
            "cell": {
                "ports": {
                    "a": {"type": "list[float]", "required": False, "default": "[1.0]", "help": "in | Å"},
                    "b": {
                        "type": "any value",
                        "required": False,
                        "default": "computed from the other values",
                        "metadata": {"kind": "float", "tags": ["x"], "at": "object"},
                    },
                }
            },
            "broken": {
                "type": "any value",
                "required": False,
                "default": "(could not be made: ZeroDivisionError('division by zero'))",
            },
            "options": {"ports": {}, "dynamic": "int", "required": False},
        }
    }
    assert about["outputs"] == {"ports": {"energy": {"type": "float", "required": True, "help": "in eV"}}}
    assert [code["status"] for code in about["exit_codes"]] == [10, 11, 400]
    assert about["messages"] == {"stop": {"type": "str"}}
    assert about["queries"] == {
        "how_far": {
            "doc": "How far it is.",
            "parameters": {"since": {"type": "int", "required": False, "default": "0"}},
        }
    }
    assert about["updates"]["set_limit"]["parameters"] == {
        "limit": {"type": "float", "required": True},
        "why": {"type": "str or None", "required": False, "default": "None"},
    }
    setup = about["steps"].pop("setup")
    assert setup.pop("retry") == {
        "max_attempts": 4,
        "initial_interval_s": 1.0,
        "backoff": 2.0,
        "max_interval_s": 100.0,
        "jitter": 0.1,
        "retry_on": ["OSError"],
        "give_up_on": [],
    }
    assert setup == {
        "doc": "Prepare it.\n\nAt length.",
        "method": "prepare",
        "timeout_s": 60,
        "renamed_from": ["init"],
    }
    assert about["steps"] == {"relax": {"doc": ""}}
    assert about["outline"] == [
        "setup",
        {"while goes_on": ["relax", {"if is_lost": [{"return": 400}], "elif is_odd": ["setup"]}]},
        {"if is_odd": ["relax"], "else": [{"return": 0}]},
    ]


def test_a_class_without_anything_has_empty_parts() -> None:
    """A docstring of its base is not its own; the first step is always there."""
    about = describe(Plain)
    assert about["doc"] == ""
    assert about["outline"] is None
    assert about["steps"] == {"run": {"doc": ""}, "after": {"doc": "", "effect": "once"}}
    assert about["messages"] == about["queries"] == about["updates"] == {}


def test_a_description_is_made_of_its_parts() -> None:
    """What is marked in the class is an argument."""

    def asked(self: Any, n: int) -> None:
        """Ask."""

    about = describe_parts(Plain, Plain.spec(), 7, {}, {"asked": asked}, {})
    assert about["version"] == 7
    assert about["steps"] == {"run": {"doc": ""}}
    assert about["queries"] == {"asked": {"doc": "Ask.", "parameters": {"n": {"type": "int", "required": True}}}}


def test_markdown_has_a_table_for_each_part_that_is_not_empty() -> None:
    """Whatever stands in the texts, a row stays a row."""
    text = as_markdown(describe(Scan))
    lines = text.splitlines()
    assert lines[0] == "# Scan"
    assert [line for line in lines if line.startswith("## ")] == [
        f"## {title}"
        for title in ("Inputs", "Outputs", "Messages", "Queries", "Updates", "Exit codes", "Steps", "Outline")
    ]
    for row in (
        r"| `cell.a` | list[float] | no | `[1.0]` | in \| Å |",
        "| `options` | namespace; others: int | no |  |  |",
        "| `energy` | float | yes |  | in eV |",
        "| `stop` | str |  |",
        "| `how_far(since: int = 0)` | How far it is. |",
        "| `set_limit(limit: float, why: str or None = None)` |  |",
        "| 400 | `ERROR_LOST` | lost after {n} steps |",
        "| `setup` | up to 4 attempts; method: prepare; timeout_s: 60; renamed_from: init | Prepare it. |",
        "| `relax` |  |  |",
    ):
        assert row in lines
    assert "```mermaid\nflowchart TD\n" in text
    assert text.endswith("```\n")
    plain = as_markdown(describe(Plain))
    assert [line for line in plain.splitlines() if line.startswith("## ")] == ["## Exit codes", "## Steps"]
    assert "| `after` | effect: once |  |" in plain


def test_a_flowchart_has_the_branches_and_loops_of_the_outline() -> None:
    """Each arrow goes where the outline goes."""
    assert as_mermaid(describe(Scan)) == (
        "flowchart TD\n"
        "    n0([begin])\n"
        '    n1["setup"]\n'
        "    n0 --> n1\n"
        '    n2{"goes_on?"}\n'
        "    n1 --> n2\n"
        '    n3["relax"]\n'
        "    n2 -->|yes| n3\n"
        '    n4{"is_lost?"}\n'
        "    n3 --> n4\n"
        '    n5(["return 400"])\n'
        "    n4 -->|yes| n5\n"
        '    n6{"is_odd?"}\n'
        "    n4 -->|no| n6\n"
        '    n7["setup"]\n'
        "    n6 -->|yes| n7\n"
        "    n7 --> n2\n"
        "    n6 -->|no| n2\n"
        '    n8{"is_odd?"}\n'
        "    n2 -->|no| n8\n"
        '    n9["relax"]\n'
        "    n8 -->|yes| n9\n"
        '    n10(["return 0"])\n'
        "    n8 -->|no| n10\n"
        "    n11([end])\n"
        "    n9 --> n11\n"
    )


@pytest.mark.parametrize(
    ("process_class", "chart"),
    [
        (Plain, 'flowchart TD\n    n0([begin])\n    n1["run"]\n    n0 --> n1\n    n2["after"]\n'),
        (
            Outlined,
            'flowchart TD\n    n0([begin])\n    n1["one"]\n    n0 --> n1\n    n2(["return 7"])\n    n1 --> n2\n',
        ),
    ],
)
def test_a_flowchart_says_no_more_than_is_known(process_class: type[Process], chart: str) -> None:
    """Without an outline only the first step has its place; behind a return nothing comes."""
    assert as_mermaid(describe(process_class)) == chart


def test_texts_are_quoted_in_a_flowchart() -> None:
    """A name that came from elsewhere can't break the chart."""
    chart = as_mermaid({"outline": ['say "no"', {'while "x"': ["a"]}], "steps": {}})
    assert '["say #quot;no#quot;"]' in chart
    assert '{"#quot;x#quot;?"}' in chart
