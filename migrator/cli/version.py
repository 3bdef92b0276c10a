"""`migrator version`: what is installed here, and what runs here."""

from __future__ import annotations

from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import click

from datapath.registry import KINDS
from migrator import protocol
from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Context, pass_context
from migrator.errors import MigrationError
from migrator.table import print_fields, print_json


@click.command()
@pass_context
def version(context: Context) -> None:
    """Versions of what is installed here and of the agent that runs here. `migrator host list` shows all hosts."""
    kinds = {name: kind.version for name, kind in KINDS.items()}
    found = {
        "installed": installed("vm-netstate-migrator"),
        "protocol": protocol.text(protocol.spoken()),
        "kinds": kinds,
        **_running(context),
    }
    if context.json:
        print_json(found)
    else:
        print_fields({**found, "kinds": [f"{name} {number}" for name, number in kinds.items()]})


def _running(context: Context) -> dict[str, Any]:
    """Of this host's agent; nothing when none answers."""
    if not Path(context.agent_socket).exists():
        return {"running": ""}
    try:
        status = context.agent.Status(pb.Empty())
    except MigrationError:
        return {"running": ""}
    return {"running": status.version, "running_protocol": status.protocol, "layout": status.layout}
