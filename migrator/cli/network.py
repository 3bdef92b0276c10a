"""`migrator network`: separate L2 domains."""

from __future__ import annotations

from typing import Any

import click

from migrator import config
from migrator.cli.apply import apply as apply_command
from migrator.cli.changes import apply, checked, declared, named, remove
from migrator.cli.context import Context, Group, pass_context
from migrator.table import plain, print_fields, print_json, print_table


@click.group(cls=Group)
def network() -> None:
    """Networks: separate L2 domains on VLANs, overlays, or local to a host."""


network.add_command(apply_command)


@network.command()
@click.argument("name")
@click.option("--kind", required=True, type=click.Choice(["uplink", "overlay", "local"]), help="How it leaves a host.")
@click.option("--vlan", type=int, help="802.1Q id on the uplink; 0: untagged.")
@click.option("--vni", type=int, help="24-bit id of an overlay.")
@click.option("--mtu", type=int, help="Bytes of the IP packets; default 1500.")
@click.option("--uplink", help="Name of the interface on each host; default: the agent's first.")
@click.option("--ageing", "ageing_s", type=int, metavar="SECONDS", help="Of learned L2 entries; default 300.")
@pass_context
def add(context: Context, /, **fields: Any) -> None:
    """Make a network, or change it."""
    apply(context, networks=[checked(config.Network, **fields)])


@network.command("list")
@pass_context
def list_(context: Context) -> None:
    """All networks."""
    networks = declared(context).networks
    if context.json:
        print_json([plain(item) for item in networks])
        return
    rows = [(n.name, n.kind, n.vlan or "", n.vni or "", n.mtu or 1500, n.uplink) for n in networks]
    print_table(("NETWORK", "KIND", "VLAN", "VNI", "MTU", "UPLINK"), rows)


@network.command()
@click.argument("name")
@pass_context
def show(context: Context, name: str) -> None:
    """One network and the ports on it."""
    everything = declared(context)
    body = plain(named(everything.networks, "network", name))
    body["ports"] = [f"{p.vm}/{p.mac}" for p in everything.ports if name in (p.network, *p.trunk.values())]
    (print_json if context.json else print_fields)(body)


@network.command("del")
@click.argument("name")
@pass_context
def del_(context: Context, name: str) -> None:
    """Remove a network that no port is on."""
    remove(context, "network", name)
