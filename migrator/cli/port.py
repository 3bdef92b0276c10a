"""`migrator port`: NICs of VMs, and what goes through them."""

from __future__ import annotations

from typing import Any

import click

from datapath.errors import Error
from datapath.state.conntrack import ALARM_PERCENT
from datapath.state.drops import NAMES
from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.cli.apply import apply as apply_command
from migrator.cli.changes import apply, checked, declared, remove, report
from migrator.cli.context import Context, Group, complete, pass_context
from migrator.cli.kinds import plain_port, print_records, records_here, set_, unset
from migrator.cli.local import find_ports, here
from migrator.errors import ConfigInvalid, ObjectNotFound
from migrator.table import plain, print_fields, print_json, print_table


@click.group(cls=Group)
def port() -> None:
    """Ports: the NICs of VMs."""


port.add_command(apply_command)
port.add_command(set_)
port.add_command(unset)


@port.command()
@click.option("--vm", required=True, metavar="UUID", help="The VM.")
@click.option("--mac", required=True, help="MAC address of the NIC.")
@click.option("--network", required=True, help="Network of untagged frames.")
@click.option("--host", shell_complete=complete("host"), help="Where the VM is; default: where its other ports are.")
@click.option(
    "--device", help="Tap or veth; {vm8} and {mac6} stand for the uuid's first 8 and the MAC's last 6 digits."
)
@click.option("--device-at", "devices", multiple=True, metavar="HOST=DEVICE", help="Where the pattern does not fit.")
@click.option("--address", "addresses", multiple=True, help="IPv4 or IPv6 address that the guest may use.")
@click.option("--policy", help="Policy; without one everything new is dropped.")
@click.option("--trunk", multiple=True, metavar="VLAN=NETWORK", help="Network of frames with this tag.")
@click.option("--mtu", type=int, help="Default: the network's.")
@click.option("--connections-max", type=int, help="Size of the connection table; default 65536.")
@click.option("--learned-max", type=int, help="L2 addresses that may be learned behind the port; default 16.")
@click.option("--timeout", "timeouts_ms", multiple=True, metavar="NAME=MS", help="Such as tcp_established=3600000.")
@click.option(
    "--no-antispoof", "antispoof", flag_value=False, default=None, help="Let the guest send from any address."
)
@click.option("--learning", is_flag=True, default=None, help="Accept connections that are under way already.")
@click.option("--name", help="The VM's name, for people.")
@pass_context
def add(context: Context, /, **fields: Any) -> None:
    """Declare a port, or change it."""
    for name in ("devices", "trunk", "timeouts_ms"):
        fields[name] = _pairs(name, fields[name])
    fields["addresses"] = list(fields["addresses"])
    apply(context, ports=[checked(config.Port, **fields)])


def _pairs(name: str, items: tuple[str, ...]) -> dict[str, str]:
    pairs = [item.partition("=") for item in items]
    wrong = next((item for item, pair in zip(items, pairs, strict=True) if not pair[1] or not pair[0]), None)
    if wrong is not None:
        raise ConfigInvalid(f"{name}: expected NAME=VALUE, not {wrong!r}")
    return {left: right for left, _, right in pairs}


@port.command("list")
@pass_context
def list_(context: Context) -> None:
    """All ports of the cluster."""
    ports = declared(context).ports
    if context.json:
        print_json([plain_port(item) for item in ports])
        return
    rows = [(p.vm, p.name, p.mac, p.network, p.host, p.policy, _mode(p), list(p.addresses)) for p in ports]
    print_table(("VM", "NAME", "MAC", "NETWORK", "HOST", "POLICY", "MODE", "ADDRESSES"), rows)


def _mode(p: pb.Port) -> str:
    return "learning" if p.learning else "enforcing"


@port.command()
@click.argument("word", metavar="VM|MAC|VM/MAC", shell_complete=complete("vm"))
@pass_context
def show(context: Context, word: str) -> None:
    """A port, or all of a VM; with counters and drops when it is on this host."""
    ports = find_ports(context, word)
    try:
        known = {(s.instance.vm, s.instance.mac): s for s in here(context)}
    except Error as error:
        known = {}
        click.echo(f"migrator: no counters: {error}", err=True)
    statuses = [known.get((p.vm, p.mac)) for p in ports]
    kinds = [records_here(context, p) if s is not None else {} for p, s in zip(ports, statuses, strict=True)]
    if context.json:
        triples = zip(ports, statuses, kinds, strict=True)
        print_json([{**plain_port(p), "status": _status(s, records)} for p, s, records in triples])
        return
    for number, (declared_port, status, records) in enumerate(zip(ports, statuses, kinds, strict=True)):
        if number:
            click.echo()
        _print(declared_port, status)
        for kind, found in records.items():
            click.echo()
            print_records(kind, found)


def _status(status: pb.PortStatus | None, records: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    return {**plain(status), "kinds": records} if status is not None else None


def _print(declared_port: pb.Port, status: pb.PortStatus | None) -> None:
    body = plain_port(declared_port)
    if status is not None:
        live = plain(status)
        instance = live.pop("instance")
        live.pop("addresses")
        body = {**body, **live, "state": instance["state"], "epoch": instance["epoch"]}
        body["connections"] = fullness(status.connections, status.connections_max)
        body.pop("connections_max", None)
    counters, drops = body.pop("counters", {}), body.pop("drops", {})
    print_fields({key: value for key, value in body.items() if value != 0})
    if counters:
        click.echo()
        print_table(("COUNTER", ""), sorted(counters.items()))
    if drops:
        click.echo()
        print_table(("DROPPED BECAUSE", "FRAMES", ""), [(name, drops[name], sentence(name)) for name in sorted(drops)])


def fullness(connections: int, room: int) -> str:
    """How full a connection table is; from ALARM_PERCENT on, what to do about it."""
    text = f"{connections} of {room}"
    if room and connections * 100 >= room * ALARM_PERCENT:
        text += f", nearly full: raise connections_max (alarm from {ALARM_PERCENT} %)"
    return text


def sentence(reason: str) -> str:
    """What a drop reason means, "" when a newer switch made it up."""
    known = NAMES.get(reason)
    return known.sentence if known else ""


@port.command()
@click.argument("word", metavar="VM|MAC|VM/MAC", shell_complete=complete("vm"))
@pass_context
def enforce(context: Context, word: str) -> None:
    """Let ports learn no more: connections under way were taken up, from now on only what the policy allows begins."""
    ports = find_ports(context, word)
    for item in ports:
        item.learning = False
    reply = context.coordinator.Apply(pb.ApplyRequest(config=pb.Config(ports=ports)))
    report(context, reply)


@port.command("del")
@click.argument("word", metavar="VM/MAC|MAC")
@pass_context
def del_(context: Context, word: str) -> None:
    """Remove one port from its VM and host."""
    ports = find_ports(context, word)
    if len(ports) > 1:
        names = ", ".join(f"{p.vm}/{p.mac}" for p in ports)
        raise ObjectNotFound(f"{word} names {len(ports)} ports", hint=f"one of {names}")
    remove(context, "port", f"{ports[0].vm}/{ports[0].mac}")
