"""`migrator port set|unset`: kinds of state that are declared at a port; and how `port show` prints them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from datapath.errors import Error
from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.cli.changes import report
from migrator.cli.context import Context, complete, pass_context
from migrator.cli.local import dump, find_ports
from migrator.documents import read_value
from migrator.errors import ConfigInvalid
from migrator.inspect import rows
from migrator.table import plain, print_table


def _kinds(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return sorted(name for name in config.DOCUMENTS if name.startswith(incomplete))


_word = click.argument("word", metavar="VM|MAC|VM/MAC", shell_complete=complete("vm"))
_kind = click.argument("kind", metavar="KIND", shell_complete=_kinds)


@click.command("set")
@_word
@_kind
@click.argument("document", required=False)
@click.option("-f", "--file", "file", metavar="FILE", help="Read the document from a YAML file; -: standard input.")
@click.option("--dry-run", is_flag=True, help="Check it and say what would change.")
@pass_context
def set_(context: Context, word: str, kind: str, document: str | None, file: str | None, dry_run: bool) -> None:
    """Declare a kind of state at a port, or at all of a VM: DOCUMENT is what stands under its name in `migrator apply`.

    It replaces what was declared of the kind there.
    """
    _known(kind)
    if (document is None) == (file is None):
        raise ConfigInvalid("expected a document, or a file with --file")
    text, name = (document, "document") if document is not None else (_text(str(file)), str(file))
    checked = _checked(kind, read_value(str(text), name))
    ports = find_ports(context, word)
    for item in ports:
        item.kinds[kind] = checked
    reply = context.coordinator.Apply(pb.ApplyRequest(config=pb.Config(ports=ports), dry_run=dry_run))
    report(context, reply, dry_run=dry_run)


@click.command()
@_word
@_kind
@pass_context
def unset(context: Context, word: str, kind: str) -> None:
    """Declare a kind of state no more."""
    _known(kind)
    ports = find_ports(context, word)
    for item in ports:
        item.kinds.pop(kind, None)
    report(context, context.coordinator.Apply(pb.ApplyRequest(config=pb.Config(ports=ports))))


def _known(kind: str) -> None:
    if kind not in config.DOCUMENTS:
        raise ConfigInvalid(f"no kind {kind!r} is declared at a port", hint=f"one of {', '.join(config.DOCUMENTS)}")


def _text(file: str) -> str:
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{file}: {error}") from None


def _checked(kind: str, body: Any) -> str:
    try:
        return config.written(config.DOCUMENTS[kind].model_validate(body))
    except ValidationError as error:
        problems = (f"{config.where(body, one['loc'])}: {config.reason(one)}" for one in error.errors())
        raise ConfigInvalid(f"{kind}: " + "; ".join(problems)) from None


def plain_port(port: pb.Port) -> dict[str, Any]:
    """A declared port as `migrator apply` reads it: each kind under its name."""
    body = plain(port)
    return {**body, **{kind: json.loads(text) for kind, text in body.pop("kinds").items()}}


def records_here(context: Context, port: pb.Port) -> dict[str, list[dict[str, Any]]]:
    """Records of the port's declared kinds as this host's switch has them, with what it counted."""
    return {kind: _records(context, port, kind) for kind in port.kinds}


def _records(context: Context, port: pb.Port, kind: str) -> list[dict[str, Any]]:
    try:
        sections = [one for one in dump(context, port.vm, kind) if one.port == port.mac and one.table is not None]
    except Error as error:
        click.echo(f"migrator: {kind}: {error}", err=True)
        return []
    return [record for one in sections if one.table is not None for record in rows(one.table)]


def print_records(kind: str, records: list[dict[str, Any]]) -> None:
    """A line for each record; fields that are empty everywhere are left out."""
    names = [name for name in dict.fromkeys(n for one in records for n in one) if any(one.get(name) for one in records)]
    print_table([f"{kind.upper()}: {names[0]}", *names[1:]] if names else [kind.upper()], _cells(records, names))


def _cells(records: list[dict[str, Any]], names: list[str]) -> list[list[Any]]:
    return [[one.get(name, "") for name in names] for one in records]
