"""How commands print what they know: tables and lines for people, JSON for programs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON's types, every field named, 64-bit numbers as numbers, bytes as hexadecimal text."""
    body: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.containing_oneof is not None and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            body[field.name] = {str(key): _value(item) for key, item in sorted(value.items())}
        elif field.is_repeated:
            body[field.name] = [_value(item) for item in value]
        else:
            body[field.name] = _value(value)
    return body


def _value(value: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    return value.hex() if isinstance(value, bytes) else value


def print_json(value: Any, *, lines: bool = False) -> None:
    """One JSON value; `lines` keeps it on one line and sends it at once."""
    sys.stdout.write(json.dumps(value, indent=None if lines else 2, ensure_ascii=False) + "\n")
    if lines:
        sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns without frames, as wide as they need to be when the output is no terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=not sys.stdout.isatty(), overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    if sys.stdout.isatty():
        Console(highlight=False, markup=False, emoji=False).print(table)
        return
    text = io.StringIO()
    Console(file=text, highlight=False, markup=False, emoji=False, width=1_000).print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))


def print_fields(fields: Mapping[str, object]) -> None:
    """`name  value` lines; what is empty is left out."""
    shown = {name: cell(value) for name, value in fields.items() if value not in ("", None, [], {}, ())}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        sys.stdout.write(f"{name:<{width}}  {value}\n")


def cell(value: object) -> str:
    """A value in a table: lists joined by commas, maps as k=v, yes or empty for truth."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    return str(value)


def size(count: float) -> str:
    """Bytes for people: 12.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError(count)
