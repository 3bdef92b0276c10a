"""Sends changes of the configuration to the coordinator and prints what came of them."""

from __future__ import annotations

from typing import Any

import click
from pydantic import ValidationError

from migrator import config
from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Context
from migrator.errors import ConfigInvalid, ObjectNotFound
from migrator.table import plain, print_json


def declared(context: Context) -> pb.Config:
    """The whole configuration of the cluster."""
    found: pb.Config = context.coordinator.Show(pb.Empty())
    return found


def named(objects: Any, sort: str, name: str) -> Any:
    """The object of that name. Raises ObjectNotFound."""
    found = next((item for item in objects if item.name == name), None)
    if found is None:
        raise ObjectNotFound(f"no {sort} {name!r}", hint=f"`migrator {sort} list` shows all")
    return found


def checked(model: Any, **fields: Any) -> Any:
    """A model of options; those that were not given (None) are left out. Raises ConfigInvalid that names the option."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = config.where(given, first["loc"])
        prefix = f"{field}: " if first["loc"] else ""
        raise ConfigInvalid(prefix + config.reason(first)) from None


def apply(context: Context, *, dry_run: bool = False, **objects: Any) -> None:
    """Apply models, given by the fields of Config, and print what changed."""
    message = config.to_message(config.Config(**objects))
    report(context, context.coordinator.Apply(pb.ApplyRequest(config=message, dry_run=dry_run)), dry_run=dry_run)


def remove(context: Context, sort: str, name: str) -> None:
    report(context, context.coordinator.Remove(pb.Removal(sort=sort, name=name)))


def report(context: Context, reply: pb.ApplyReply, *, dry_run: bool = False) -> None:
    if context.json:
        print_json(plain(reply))
        return
    for line in reply.changed:
        click.echo(f"{line} (dry run)" if dry_run else line)
    if not reply.changed:
        click.echo("nothing to change")
    for line in reply.warnings:
        click.echo(f"migrator: warning: {line}", err=True)
