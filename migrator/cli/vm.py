"""`migrator vm`: one VM with its ports, its place and what happens to it."""

from __future__ import annotations

import click

from datapath.errors import Error
from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Context, Group, complete, pass_context
from migrator.cli.local import find_ports, here
from migrator.table import plain, print_fields, print_json, print_table


@click.group(cls=Group)
def vm() -> None:
    """Virtual machines."""


@vm.command()
@click.argument("word", metavar="VM", shell_complete=complete("vm"))
@pass_context
def show(context: Context, word: str) -> None:
    """A VM's host, ports and newest migration; with live numbers when it is on this host."""
    ports = find_ports(context, word)
    uuid = ports[0].vm
    migrations = [m for m in context.coordinator.Migrations(pb.Empty()).migrations if m.vm == uuid]
    instances = _instances(context, uuid)
    body = {
        "vm": uuid,
        "name": next((p.name for p in ports if p.name), ""),
        "host": ports[0].host,
        "ports": [plain(p) for p in ports],
        "instances": [plain(item) for item in instances],
        "migration": plain(migrations[-1]) if migrations else None,
    }
    if context.json:
        print_json(body)
        return
    newest = migrations[-1] if migrations else None
    said = f"{newest.id}: {newest.phase}{', ' + newest.outcome if newest.outcome else ''}" if newest else ""
    print_fields({"vm": uuid, "name": body["name"], "host": body["host"], "newest migration": said})
    click.echo()
    rows = [(p.mac, p.network, p.policy, list(p.addresses)) for p in ports]
    print_table(("MAC", "NETWORK", "POLICY", "ADDRESSES"), rows)
    if instances:
        click.echo()
        columns = ("INSTANCE HERE", "EPOCH", "STATE", "GATE", "DEVICE", "CONNECTIONS", "GUEST")
        print_table(columns, [_instance_row(item) for item in instances])


def _instances(context: Context, uuid: str) -> list[pb.PortStatus]:
    """Instances on this host; none when there is no agent to ask."""
    try:
        return [status for status in here(context) if status.instance.vm == uuid]
    except Error:
        return []


def _instance_row(s: pb.PortStatus) -> tuple[object, ...]:
    return s.instance.mac, s.instance.epoch, s.instance.state, s.gate, s.device, s.connections, s.guest
