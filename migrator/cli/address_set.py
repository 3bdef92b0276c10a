"""`migrator address-set`: prefixes that rules name together."""

from __future__ import annotations

import click

from migrator import config
from migrator.cli.apply import apply as apply_command
from migrator.cli.changes import apply, checked, declared, named, remove
from migrator.cli.context import Context, Group, pass_context
from migrator.table import plain, print_fields, print_json, print_table


@click.group(cls=Group, name="address-set")
def address_set() -> None:
    """Address sets: prefixes that rules name together as @NAME."""


address_set.add_command(apply_command)


@address_set.command()
@click.argument("name")
@click.argument("prefixes", nargs=-1, metavar="PREFIX...")
@pass_context
def add(context: Context, name: str, prefixes: tuple[str, ...]) -> None:
    """Make an address set of these prefixes, or give it these instead of its own."""
    apply(context, address_sets=[checked(config.AddressSet, name=name, prefixes=list(prefixes))])


@address_set.command("list")
@pass_context
def list_(context: Context) -> None:
    """All address sets."""
    sets = declared(context).address_sets
    if context.json:
        print_json([plain(item) for item in sets])
        return
    print_table(("SET", "PREFIXES"), [(item.name, list(item.prefixes)) for item in sets])


@address_set.command()
@click.argument("name")
@pass_context
def show(context: Context, name: str) -> None:
    """One address set and the policies that name it."""
    everything = declared(context)
    body = plain(named(everything.address_sets, "address-set", name))
    body["policies"] = [
        policy.name for policy in everything.policies if any(f"@{name}" in rule.remote for rule in policy.rules)
    ]
    (print_json if context.json else print_fields)(body)


@address_set.command("del")
@click.argument("name")
@pass_context
def del_(context: Context, name: str) -> None:
    """Remove an address set that no rule names."""
    remove(context, "address-set", name)
