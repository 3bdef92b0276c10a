"""`migrator watch`: a snapshot, then every change as it happens."""

from __future__ import annotations

import click

from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Command, Context, pass_context
from migrator.table import plain, print_json

SORTS = ("network", "address-set", "policy", "port", "place", "migration", "host")


@click.command(cls=Command)
@click.option(
    "--from", "from_revision", type=click.IntRange(0), default=0, metavar="REVISION", help="Changes after it."
)
@click.option("--sort", "sorts", multiple=True, type=click.Choice(SORTS), help="Only this sort; several times: these.")
@click.option("--count", type=click.IntRange(1), help="End after so many changes.")
@click.option("--snapshot", is_flag=True, help="End with the snapshot.")
@pass_context
def watch(context: Context, from_revision: int, sorts: tuple[str, ...], count: int | None, snapshot: bool) -> None:
    """Print what there is, then every change; with --from only changes after that revision. JSON: one object a line."""
    request = pb.WatchRequest(from_revision=from_revision, sorts=sorts)
    for number, change in enumerate(context.coordinator.Watch(request, timeout=None), 1):
        if context.json:
            print_json(plain(change), lines=True)
        else:
            click.echo(line(change))
        if number == count or (snapshot and change.snapshot_end):
            return


def line(change: pb.Change) -> str:
    """A change in one line."""
    if change.snapshot_end:
        return f"{change.revision}\tsnapshot ends"
    what = "removed" if change.removed else "is" if change.snapshot else "changed"
    return f"{change.revision}\t{change.sort} {change.name} {what}{_detail(change)}"


def _detail(change: pb.Change) -> str:
    if change.removed:
        return ""
    match change.sort:
        case "port":
            return f": at {change.port.host}"
        case "place":
            return f": at {change.place.host}, epoch {change.place.epoch}"
        case "migration":
            m = change.migration
            return f": {m.source} to {m.destination}, {m.phase} {m.outcome}, {m.entries} entries"
        case "host":
            return ": connected" if change.host.connected else ": gone"
        case _:
            return ""
