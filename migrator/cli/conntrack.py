"""`migrator conntrack`: connections that a VM's ports track."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

import click

from datapath.state import conntrack as state
from datapath.state.kind import Columns
from migrator.cli.context import Context, Group, complete, pass_context
from migrator.cli.local import dump, find_ports
from migrator.errors import ObjectNotFound
from migrator.table import print_json

_STATES = {number: name for name, number in state.STATES.items()}
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
_FLAGS = (
    ("replied", state.REPLIED),
    ("assured", state.ASSURED),
    ("inbound", state.INBOUND),
    ("learned", state.LEARNED),
)


@click.group(cls=Group)
def conntrack() -> None:
    """Tracked connections."""


@conntrack.command("list")
@click.argument("word", metavar="VM|PORT", shell_complete=complete("vm"))
@pass_context
def list_(context: Context, word: str) -> None:
    """Connections of a VM on this host, one a line; with --json one object a line."""
    ports = find_ports(context, word)
    macs = {port.mac for port in ports}
    known = False
    for section in dump(context, ports[0].vm, state.CONNTRACK.name):
        known = True
        if section.port in macs and section.table is not None and section.table.columns is not None:
            for entry in entries(section.table.columns):
                print_json({"mac": section.port, **entry}, lines=True) if context.json else click.echo(line(entry))
    if not known:
        raise ObjectNotFound(f"{word} has no connections on this host", hint=f"it is at {ports[0].host}")


def entries(columns: Columns) -> Iterator[dict[str, Any]]:
    """Rows of a table for people. Fragment records are left out: they are no connections."""
    names = list(columns)
    for row in zip(*(columns[name].tolist() for name in names), strict=True):
        entry = dict(zip(names, row, strict=True))
        if entry.get("type"):
            continue
        flags = int(entry.get("flags", 0))
        yield {
            "proto": _PROTOCOLS.get(entry["proto"], str(entry["proto"])),
            "state": _STATES.get(entry["state"], str(entry["state"])),
            "local": _address(entry["laddr"]),
            "local_port": entry["lport"],
            "remote": _address(entry["raddr"]),
            "remote_port": entry["rport"],
            "flags": [name for name, bit in _FLAGS if flags & bit],
            "idle_s": entry.get("age_ns", 0) / 1e9,
            "mark": entry.get("mark", 0),
            "id": entry["id"],
            **{name: entry[name] for name in ("packets_from", "packets_to", "bytes_from", "bytes_to") if name in entry},
        }


def line(entry: dict[str, Any]) -> str:
    """One connection, from the VM's side, with an arrow from who began it."""
    arrow = "<-" if "inbound" in entry["flags"] else "->"
    ends = f"{_end(entry['local'], entry['local_port'])} {arrow} {_end(entry['remote'], entry['remote_port'])}"
    flags = " ".join(f"[{name}]" for name in entry["flags"] if name != "inbound")
    counted = (
        f"from {entry['packets_from']}/{entry['bytes_from']} to {entry['packets_to']}/{entry['bytes_to']}"
        if "packets_from" in entry
        else ""
    )
    words = (entry["proto"], entry["state"], ends, flags, counted, f"idle {entry['idle_s']:.1f} s")
    return " ".join(word for word in words if word)


def _address(raw: bytes) -> str:
    address = ipaddress.IPv6Address(raw.ljust(16, b"\0"))
    return str(address.ipv4_mapped or address)


def _end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
