"""`migrator checkpoint`, `restore`, `inspect`, `diff`: the network state of a VM in a file."""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Command, Context, pass_context
from migrator.cli.local import find_ports
from migrator.errors import ConfigInvalid
from migrator.table import plain, print_json, print_table, size

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
