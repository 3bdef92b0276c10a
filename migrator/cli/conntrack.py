"""`migrator conntrack`: connections that a VM's ports track."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from datapath.registry import KINDS
from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Context, Group, complete, pass_context
from migrator.cli.local import dump, find_ports
from migrator.inspect import rows
from migrator.table import print_json
from migrator.watching.match import fields, parse
from migrator.watching.wire import to_messages

_KIND = KINDS["conntrack"]


def _complete_match(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    return [f"{name}=" for name in fields([_KIND.name]) if name.startswith(incomplete)]


@click.group(cls=Group)
def conntrack() -> None:
    """Tracked connections."""


@conntrack.command("list")
@click.argument("word", metavar="VM|PORT", shell_complete=complete("vm"))
@pass_context
def list_(context: Context, word: str) -> None:
    """Connections of a VM on this host, one a line; with --json one object a line. Ports and addresses of the guest
    stand first, the arrow points away from who began."""
    ports = find_ports(context, word)
    macs = {port.mac for port in ports}
    for section in dump(context, ports[0].vm, _KIND.name):
        if section.port not in macs or section.table is None:
            continue
        for record in rows(section.table):
            if context.json:
                print_json({"mac": section.port, **record}, lines=True)
            elif not record.get("type"):  # fragments on their way are no connections
                click.echo(line(record))


@conntrack.command("set-label")
@click.argument("word", metavar="VM|PORT", shell_complete=complete("vm"))
@click.option("--mark", default="", metavar="VALUE[/MASK]", help="Its 32 bits, or those of the mask.")
@click.option("--label", default="", metavar="VALUE[/MASK]", help="Its 128 bits, or those of the mask.")
@click.option(
    "--match",
    "matches",
    multiple=True,
    metavar="FIELD=VALUE",
    shell_complete=_complete_match,
    help="Only connections of which this holds, or FIELD!=VALUE; several times: all. As of `migrator watch`.",
)
@click.option("--all", "every", is_flag=True, help="All connections.")
@pass_context
def set_label(context: Context, word: str, mark: str, label: str, matches: Sequence[str], every: bool) -> None:
    """Give connections of a VM on this host another mark or label. Each is judged again at its next packet."""
    if every == bool(matches):
        raise click.UsageError("either --match or --all")
    wanted = [parse(text) for text in matches]
    ports = find_ports(context, word)
    whole = word in (ports[0].vm, ports[0].name)
    matched = changed = 0
    for port in ports[:1] if whole else ports:
        reply = context.agent.Relabel(
            pb.RelabelRequest(
                vm=port.vm,
                mac="" if whole else port.mac,
                matches=to_messages(wanted),
                mark=mark,
                label=label,
            )
        )
        matched, changed = matched + reply.matched, changed + reply.changed
    if context.json:
        print_json({"matched": matched, "changed": changed})
    else:
        click.echo(f"{changed} of {matched} connections changed")


def line(record: dict[str, Any]) -> str:
    """One connection: `tcp ESTABLISHED 192.0.2.1:443 <- 198.51.100.7:40000 [REPLIED] [ASSURED] …`."""
    flags = record.get("flags", [])
    arrow = "<-" if "INBOUND" in flags else "->"
    ends = f"{_end(record['laddr'], record['lport'])} {arrow} {_end(record['raddr'], record['rport'])}"
    counted = [
        f"{way} {record[f'packets_{way}']} packets {record[f'bytes_{way}']} bytes"
        for way in ("from", "to")
        if f"packets_{way}" in record
    ]
    marks = [f"[{flag}]" for flag in flags if flag != "INBOUND"]
    mark = [f"mark={record['mark']:#x}"] if record.get("mark") else []
    mark += [f"label={record['label']}"] if record.get("label", "0x0") != "0x0" else []
    idle = [f"idle {record['age_ns'] / 1e9:.1f} s"] if "age_ns" in record else []
    return " ".join([str(record["proto"]), str(record["state"]), ends, *marks, *mark, *counted, *idle])


def _end(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
