"""`migrator checkpoint`, `restore`, `inspect`, `diff`: the network state of a VM in a file."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import click

from datapath.state.kind import Record
from migrator import diff as differences
from migrator import inspect as inspection
from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Command, Context, pass_context
from migrator.cli.local import find_ports
from migrator.errors import ConfigInvalid
from migrator.table import plain, print_fields, print_json, print_table, size

DIFF_LINES_MAX = 20
_CHUNK = 1 << 18
_FILE = click.Path(path_type=Path, dir_okay=False, allow_dash=True)


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A file to read; -: standard input. Raises ConfigInvalid."""
    if str(file) == "-":
        yield sys.stdin.buffer
        return
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise ConfigInvalid(f"{file}: {error.strerror}") from None


@click.command(cls=Command)
@click.argument("vm")
@click.option("-o", "--output", type=_FILE, required=True, help="File to write; -: standard output.")
@pass_context
def checkpoint(context: Context, vm: str, output: Path) -> None:
    """Write all network state of a VM on this host to a file. The VM goes on running."""
    chunks = context.agent.Checkpoint(pb.VmRequest(vm=vm_uuid(context, vm)), timeout=None)
    written = _write(output, (chunk.data for chunk in chunks))
    if str(output) == "-":
        return
    if context.json:
        print_json({"file": str(output), "bytes": written})
    else:
        click.echo(f"{output}: {size(written)}")


def vm_uuid(context: Context, word: str) -> str:
    """Uuid of a VM named by it, or by its name when the coordinator can be asked."""
    try:
        return str(uuid.UUID(word))
    except ValueError:
        return find_ports(context, word)[0].vm


def _write(output: Path, chunks: Iterable[bytes]) -> int:
    """Write to a new file that takes its place only when it is complete. Returns its size in bytes."""
    if str(output) == "-":
        return sum(sys.stdout.buffer.write(chunk) for chunk in chunks)
    try:
        handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    except OSError as error:
        raise ConfigInvalid(f"{output}: {error.strerror}") from None
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            written = sum(file.write(chunk) for chunk in chunks)
            file.flush()
            os.fsync(file.fileno())
        part.replace(output)
    except OSError as error:
        raise ConfigInvalid(f"{output}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    return written


@click.command(cls=Command)
@click.argument("file", type=_FILE)
@click.option("--device", "devices", multiple=True, metavar="MAC=DEVICE", help="Device of a NIC on this host.")
@click.option("--epoch", type=click.IntRange(1), help="Epoch of the new instances; default: the next.")
@pass_context
def restore(context: Context, file: Path, devices: tuple[str, ...], epoch: int | None) -> None:
    """Make the ports of a snapshot on this host, with all their state. All of it is checked before anything is made."""
    pairs = [device.partition("=") for device in devices]
    wrong = next((device for device, pair in zip(devices, pairs, strict=True) if not pair[2]), None)
    if wrong is not None:
        raise ConfigInvalid(f"--device: expected MAC=DEVICE, not {wrong!r}")
    head = pb.RestoreHead(devices={mac.lower(): device for mac, _, device in pairs}, epoch=epoch or 0)
    reply = context.agent.Restore(_chunks(file, head), timeout=None)
    if context.json:
        print_json(plain(reply))
        return
    kinds = sorted({*reply.loaded, *reply.rejected})
    print_table(("KIND", "LOADED", "REJECTED"), [(k, reply.loaded[k], reply.rejected[k] or "") for k in kinds])


def _chunks(file: Path, head: pb.RestoreHead) -> Iterator[pb.RestoreChunk]:
    yield pb.RestoreChunk(head=head)
    with opened(file) as stream:
        while data := stream.read(_CHUNK):
            yield pb.RestoreChunk(data=data)


@click.command("inspect", cls=Command)
@click.argument("file", type=_FILE)
@click.option("--records", is_flag=True, help="Every record, one a line; with --json one object a line.")
@click.option("--kind", default="", help="Only records of this kind.")
@click.option("--port", default="", metavar="MAC", help="Only records of this port.")
@click.option("--limit", type=click.IntRange(1), help="At most so many records.")
@pass_context
def inspect(context: Context, file: Path, records: bool, kind: str, port: str, limit: int | None) -> None:
    """Show what is in a snapshot. All of it is read and checked; with --records the records themselves."""
    with opened(file) as stream:
        if records or kind or port:
            for record in inspection.records(stream, kind=kind, port=port.lower(), limit=limit):
                print_json(record, lines=True) if context.json else click.echo(_record_line(record))
            return
        found = inspection.inspect(stream)
    if context.json:
        print_json(found)
        return
    ports = found.pop("ports")
    print_fields({**found, "kinds": [f"{name} {kind['version']}" for name, kind in found["kinds"].items()]})
    click.echo()
    kinds = list(dict.fromkeys(name for counts in ports.values() for name in counts))
    rows = [(mac, *(counts.get(name, 0) for name in kinds)) for mac, counts in ports.items()]
    print_table(("PORT", *(name.upper() for name in kinds)), rows)


def _record_line(record: dict[str, Any]) -> str:
    return f"{record['port']} {record['kind']} {record['op']} {_fields(record['record'])}"


def _fields(record: Record) -> str:
    """`name=value …`, text as it is and everything else as JSON; what is empty is left out."""
    shown = {name: value for name, value in record.items() if value not in ("", [], {})}
    compact = partial(json.dumps, separators=(",", ":"))
    return " ".join(f"{name}={v if isinstance(v, str) else compact(v)}" for name, v in shown.items())


@click.command("diff", cls=Command)
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@click.option("--ignore", multiple=True, metavar="FIELD", help="A field that may differ, such as age_ns.")
@click.option("--no-accounting", is_flag=True, help="Leave out what is only counted.")
@pass_context
def diff(context: Context, a: Path, b: Path, ignore: tuple[str, ...], no_accounting: bool) -> int:
    """Show what differs between two snapshots, by port and kind. Exit code 1 when something does, as diff(1)."""
    with opened(a) as one, opened(b) as other:
        found = differences.diff(one, other, ignore=ignore, accounting=not no_accounting)
    if context.json:
        print_json([_difference(item) for item in found])
    else:
        for item in found:
            print_difference(item)
    return 1 if found else 0


def _difference(item: differences.Difference) -> dict[str, Any]:
    changed = zip(inspection.rows(item.before), inspection.rows(item.after), strict=True)
    return {
        "port": item.port,
        "kind": item.kind,
        "added": list(inspection.rows(item.added)),
        "removed": list(inspection.rows(item.removed)),
        "changed": [{"before": before, "after": after} for before, after in changed],
        "fields": dict(item.fields),
    }


def print_difference(item: differences.Difference) -> None:
    """A summary, then lines with + and - as diff(1) has them."""
    counts = ", ".join(f"{count} {what}" for what, count in item.counts().items() if count)
    fields = f" ({', '.join(f'{name} in {count}' for name, count in item.fields.items())})" if item.fields else ""
    click.echo(f"{item.port} {item.kind}: {counts}{fields}")
    for sign, table in (("-", item.removed), ("+", item.added), ("<", item.before), (">", item.after)):
        for record in inspection.rows(table, DIFF_LINES_MAX):
            click.echo(f"{sign} {_fields(record)}")
        if len(table) > DIFF_LINES_MAX:
            click.echo(f"{sign} and {len(table) - DIFF_LINES_MAX} more (--json shows all)")
