"""`migrator apply`: documents in YAML or TOML, all of them or nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.cli.changes import report
from migrator.cli.context import Command, Context, pass_context
from migrator.documents import read_documents
from migrator.errors import ConfigInvalid


@click.command(cls=Command)
@click.option(
    "-f", "--file", "files", multiple=True, required=True, metavar="FILE", help="YAML or TOML; -: standard input."
)
@click.option("--dry-run", is_flag=True, help="Check all of it and say what would change.")
@pass_context
def apply(context: Context, files: tuple[str, ...], dry_run: bool) -> None:
    """Make the objects of these documents so, all of them or none.

    A document has any of the keys networks, address_sets, policies, ports: each a list. What no document names stays.
    """
    parts = [read_documents(_read(name), name if name != "-" else "standard input") for name in files]
    fields = config.Config.model_fields
    wanted = config.Config(**{field: [item for part in parts for item in getattr(part, field)] for field in fields})
    reply = context.coordinator.Apply(pb.ApplyRequest(config=config.to_message(wanted), dry_run=dry_run))
    report(context, reply, dry_run=dry_run)


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text()
    except OSError as error:
        raise ConfigInvalid(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigInvalid(f"{name}: byte {error.start} is not UTF-8") from None
