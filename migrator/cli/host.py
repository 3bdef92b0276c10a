"""`migrator host`: the hosts that have, or had, an agent."""

from __future__ import annotations

import time

import click

from migrator._pb import migrator_pb2 as pb
from migrator.cli.changes import remove
from migrator.cli.context import Context, Group, complete, pass_context
from migrator.cli.drain import drain
from migrator.table import plain, print_json, print_table


@click.group(cls=Group)
def host() -> None:
    """Hosts of the cluster."""


host.add_command(drain)


@host.command("list")
@pass_context
def list_(context: Context) -> None:
    """All hosts, with their versions, driver, ports and what they have acknowledged."""
    hosts = context.coordinator.Hosts(pb.Empty()).hosts
    if context.json:
        print_json([plain(item) for item in hosts])
        return
    columns = (
        *("HOST", "STATE", "VERSION", "PROTOCOL", "LAYOUT", "DRIVER"),
        *("PORTS", "UNDERLAY", "PEER", "PLACES", "LAST SEEN"),
    )
    print_table(columns, [_row(item) for item in hosts])


def _row(item: pb.Host) -> tuple[object, ...]:
    state = "connected" if item.connected else "gone"
    seen = "now" if item.connected else f"{time.time() - item.last_seen_s:.0f} s ago" if item.last_seen_s else ""
    versions = item.version, item.protocol, item.layout
    return item.name, state, *versions, item.driver, item.ports, item.underlay, item.peer, item.place_revision, seen


@host.command("remove")
@click.argument("name", shell_complete=complete("host"))
@pass_context
def remove_(context: Context, name: str) -> None:
    """Forget a host for good. It must not be connected and no VM may be on it."""
    remove(context, "host", name)
