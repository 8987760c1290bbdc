"""The tables of docs/wire-protocol.md. ``python -m tests.messaging.wire_reference`` prints them."""

from __future__ import annotations

import types
from typing import Any, Union, get_args, get_origin

import msgspec

from prunus.messaging.messages import BrokerMessage, ClientMessage


def tables_as_markdown() -> str:
    """What a client says, and what the broker says."""
    return f"### What a client says\n\n{_table(ClientMessage)}\n\n### What the broker says\n\n{_table(BrokerMessage)}"


def _table(union: Any) -> str:
    messages = sorted(get_args(union), key=lambda one: one.__struct_config__.tag)
    rows = [f"| {one.__struct_config__.tag} | `{one.__name__}` | {_fields(one)} | {_about(one)} |" for one in messages]
    return "\n".join(["| tag | message | fields, in order | |", "|---|---|---|---|", *rows])


def _about(message: type[msgspec.Struct]) -> str:
    text = " ".join((message.__doc__ or "").partition("\n\n")[0].split())
    return text.replace("``", "`").replace("|", "\\|")


def _fields(message: type[msgspec.Struct]) -> str:
    return ", ".join(f"`{field.name}`: {_type(field.type)}" for field in msgspec.structs.fields(message)) or "none"


def _type(annotation: Any) -> str:
    if hasattr(annotation, "__metadata__"):
        return _type(annotation.__origin__)
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(one) for one in get_args(annotation))
    if get_origin(annotation) is tuple:
        inner = [one for one in get_args(annotation) if one is not Ellipsis]
        shown = ", ".join(_type(one) for one in inner)
        return f"list of {shown}" if Ellipsis in get_args(annotation) else f"({shown})"
    if get_args(annotation):
        return " or ".join(repr(one) for one in get_args(annotation))
    names = {type(None): "nil", str: "text", bytes: "bytes", int: "integer", float: "number", bool: "boolean"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


if __name__ == "__main__":
    print(tables_as_markdown())
