"""`migrator migrate`: move a VM with its network state, and follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Command, Context, complete, pass_context
from migrator.cli.progress import follow

_OF_REQUEST = {"timeout": "timeout_s", "downtime": "downtime_ms", "strict": "strict"}
_OF_MOVE = {
    "bandwidth": "bandwidth_mib_s",
    "postcopy": "postcopy",
    "copy_storage": "copy_storage",
    "persistent": "persistent",
    "undefine": "undefine",
    "tunnelled": "tunnelled",
    "uri": "uri",
    "data_uri": "data_uri",
}
_OPTIONS = (
    click.option("--strict/--best-effort", default=None, help="Refuse rather than go on degraded."),
    click.option("--timeout", type=click.FloatRange(min=1), metavar="SECONDS", help="Until the switchover."),
    click.option("--downtime", type=click.IntRange(1), metavar="MS", help="Wanted downtime of the guest."),
    click.option("--bandwidth", type=click.IntRange(1), metavar="MIB/S", help="Of the guest's memory, at most."),
    click.option("--postcopy/--no-postcopy", default=None, help="It may be turned to post-copy on its way."),
    click.option("--tunnelled/--no-tunnelled", default=None, help="Memory goes through libvirtd's own connection."),
    click.option("--copy-storage", type=click.Choice(["all", "inc"]), help="Disks that are not shared go along."),
    click.option("--persistent/--no-persistent", default=None, help="Define it at the destination. Default: as here."),
    click.option("--undefine/--no-undefine", default=None, help="Define it no more at the source. Default: as above."),
)


def move_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of how a VM is moved, for every command that moves one; `request` takes them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def request(vm: str, to: str, options: dict[str, Any], **fields: Any) -> pb.MigrateRequest:
    """The order. What was not given is not in it: the source's host knows what it does by default."""
    given = {name: value for name, value in options.items() if value is not None}
    fields |= {_OF_REQUEST[name]: value for name, value in given.items() if name in _OF_REQUEST}
    move = {_OF_MOVE[name]: value for name, value in given.items() if name in _OF_MOVE}
    return pb.MigrateRequest(vm=vm, to=to, move=pb.MoveOptions(**move), **fields)


@click.command(cls=Command)
@click.argument("vm", shell_complete=complete("vm"))
@click.option("--to", "to", required=True, metavar="HOST", shell_complete=complete("host"), help="Destination.")
@click.option("--dry-run", is_flag=True, help="Prepare the destination, then undo it.")
@move_options
@click.option("--uri", metavar="URI", help="Of the destination's libvirtd, for the source's.")
@click.option("--data-uri", metavar="URI", help="Where the guest's memory is sent to.")
@click.option("--no-state", is_flag=True, help="Move the ports with empty tables: connections are lost.")
@click.option("--detach", is_flag=True, help="Print the migration's id and do not wait.")
@pass_context
def migrate(context: Context, /, vm: str, to: str, dry_run: bool, no_state: bool, detach: bool, **options: Any) -> int:
    """Move VM (its uuid or name) to another host with all of its network state.

    Where libvirt runs it, libvirt is told to. The exit code tells how it ended: 0 complete, 40 degraded, 41 aborted,
    31 refused, 37 in doubt.
    """
    order = request(vm, to, options, dry_run=dry_run, without_state=no_state)
    return follow(context, context.coordinator.Migrate(order, timeout=None), detach=detach)
