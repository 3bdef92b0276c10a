"""`migrator acl`: policies, their rules and how often each was hit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from datapath.state.acl import LABELS
from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.cli.apply import apply as apply_command
from migrator.cli.changes import apply, checked, declared, named, remove
from migrator.cli.context import Context, Group, complete, pass_context
from migrator.cli.local import dump, find_ports
from migrator.errors import ObjectNotFound
from migrator.table import plain, print_json, print_table

_RULE_COLUMNS = ("ID", "PRIO", "DIRECTION", "PROTOCOL", "REMOTE", "PORTS", "ICMP", "ACTION", "LOG", "LABELS")


@click.group(cls=Group)
def acl() -> None:
    """Policies: stateful rules of what may begin a connection, from the guest and to it."""


acl.add_command(apply_command)


@acl.command()
@click.argument("policy", shell_complete=complete("policy"))
@click.option("--direction", type=click.Choice(["from", "to"]), help="Who begins: from the guest, or to it.")
@click.option("--action", type=click.Choice(["allow", "drop", "reject"]), help="What becomes of it.")
@click.option("--priority", type=int, help="0 to 65535, the lowest that matches wins; default 100.")
@click.option("--protocol", help="any, tcp, udp, icmp, icmpv6 or a number; default any.")
@click.option(
    "--remote", multiple=True, metavar="PREFIX|@SET", help="The other end; default any. Several times: any of."
)
@click.option("--ports", multiple=True, metavar="PORT[-PORT]", help="Destination ports; default any.")
@click.option("--icmp", metavar="TYPE[/CODE]", help="ICMP type and code; default any.")
@click.option("--log", is_flag=True, default=None, help="Report what it matches.")
@click.option("--mark", metavar="VALUE[/MASK]", help="Only connections that have this mark when they are judged again.")
@click.option("--label", metavar="VALUE[/MASK]", help="The same of the label.")
@click.option("--set-mark", metavar="VALUE[/MASK]", help="What it lets in gets this mark.")
@click.option("--set-label", metavar="VALUE[/MASK]", help="What it lets in gets this label.")
@pass_context
def add(context: Context, /, policy: str, **fields: Any) -> None:
    """Add a rule to a policy, which is made if need be. Without --direction and --action: an empty policy, which
    lets nothing new in or out."""
    known = next((item for item in declared(context).policies if item.name == policy), pb.Policy(name=policy))
    model = config.from_message(known, config.Policy)
    given = {name: value for name, value in fields.items() if value not in (None, ())}
    rules = [checked(config.Rule, **_listed(given))] if given else []
    apply(context, policies=[model.model_copy(update={"rules": [*model.rules, *rules]})])


def _listed(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


@acl.command("list")
@pass_context
def list_(context: Context) -> None:
    """All policies."""
    everything = declared(context)
    if context.json:
        print_json([plain(policy) for policy in everything.policies])
        return
    used = [port.policy for port in everything.ports]
    print_table(("POLICY", "RULES", "PORTS"), [(p.name, len(p.rules), used.count(p.name)) for p in everything.policies])


@acl.command()
@click.argument("word", metavar="POLICY|VM|PORT", shell_complete=complete("policy"))
@pass_context
def show(context: Context, word: str) -> None:
    """A policy's rules; or, of a VM or port on this host, the rules as they are applied, with their hits."""
    policy = next((item for item in declared(context).policies if item.name == word), None)
    if policy is None:
        _show_applied(context, word)
    elif context.json:
        print_json(plain(policy))
    else:
        print_table(_RULE_COLUMNS, [_rule_row(rule) for rule in policy.rules])


def _rule_row(rule: pb.Rule) -> Sequence[object]:
    lists = (list(rule.remote) or "any", list(rule.ports))
    return (
        rule.id,
        rule.priority,
        rule.direction,
        rule.protocol or "any",
        *lists,
        rule.icmp,
        rule.action,
        rule.log,
        _labels(plain(rule)),
    )


def _labels(fields: dict[str, Any]) -> list[str]:
    return [f"{name}={fields[name]}" for name in LABELS if fields.get(name)]


def _show_applied(context: Context, word: str) -> None:
    ports = find_ports(context, word)
    macs = {port.mac for port in ports}
    rules: dict[tuple[str, int], dict[str, Any]] = {}
    for section in dump(context, ports[0].vm, "acl"):
        for record in section.table.records or () if section.table and section.port in macs else ():
            empty = {"mac": section.port, "hits": 0, "hit_bytes": 0}  # hits come in records of their own
            rules.setdefault((section.port, record["id"]), empty).update(record)
    if context.json:
        print_json(list(rules.values()))
        return
    print_table(("MAC", *_RULE_COLUMNS, "HITS", "BYTES"), [_record_row(record) for record in rules.values()])


def _record_row(record: dict[str, Any]) -> Sequence[object]:
    ports = ["-".join(str(end) for end in dict.fromkeys(span)) for span in record.get("ports", [])]
    icmp = "/".join(str(part) for part in record.get("icmp", []))
    return (
        record["mac"],
        record["id"],
        record.get("priority", ""),
        record.get("direction", ""),
        record.get("protocol", ""),
        record.get("remote") or "any",
        ports,
        icmp,
        record.get("action", ""),
        record.get("log", False),
        _labels(record),
        record["hits"],
        record["hit_bytes"],
    )


@acl.command("del")
@click.argument("policy", shell_complete=complete("policy"))
@click.option("--rule", type=int, metavar="ID", help="Only this rule.")
@pass_context
def del_(context: Context, policy: str, rule: int | None) -> None:
    """Remove a policy that no port has, or one of its rules."""
    if rule is None:
        remove(context, "policy", policy)
        return
    model = config.from_message(named(declared(context).policies, "acl", policy), config.Policy)
    rules = [item for item in model.rules if item.id != rule]
    if len(rules) == len(model.rules):
        raise ObjectNotFound(f"policy {policy} has no rule {rule}", hint=f"`migrator acl show {policy}` shows all")
    apply(context, policies=[model.model_copy(update={"rules": rules})])
