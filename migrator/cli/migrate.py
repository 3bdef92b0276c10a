"""`migrator migrate`: move a VM's network state, and follow it."""

from __future__ import annotations

import click

from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Command, Context, complete, pass_context
from migrator.cli.progress import follow

INTERRUPTED_HINT = "the migration goes on; `migrator migration list` shows it, `migrator migration abort` ends it"


@click.command(cls=Command)
@click.argument("vm", shell_complete=complete("vm"))
@click.option("--to", "to", required=True, metavar="HOST", shell_complete=complete("host"), help="Destination.")
@click.option("--dry-run", is_flag=True, help="Prepare the destination, then undo it.")
@click.option("--strict/--best-effort", default=False, help="Refuse rather than go on degraded. Default: best effort.")
@click.option("--no-state", is_flag=True, help="Move the ports with empty tables: connections are lost.")
@click.option("--timeout", type=click.FloatRange(min=1), metavar="SECONDS", help="Until the switchover.")
@click.option("--downtime", type=click.IntRange(1), metavar="MS", help="Wanted downtime of the guest; default 300.")
@click.option("--detach", is_flag=True, help="Print the migration's id and do not wait.")
@pass_context
def migrate(
    context: Context,
    vm: str,
    to: str,
    dry_run: bool,
    strict: bool,
    no_state: bool,
    timeout: float | None,
    downtime: int | None,
    detach: bool,
) -> int:
    """Move VM (its uuid or name) to another host with all of its network state.

    The exit code tells how it ended: 0 complete, 40 degraded, 41 aborted, 31 refused, 37 in doubt.
    """
    request = pb.MigrateRequest(
        vm=vm,
        to=to,
        dry_run=dry_run,
        strict=strict,
        without_state=no_state,
        timeout_s=timeout or 0,
        downtime_ms=downtime or 0,
    )
    try:
        return follow(context, context.coordinator.Migrate(request, timeout=None), detach=detach)
    except KeyboardInterrupt:
        click.echo(f"migrator: {INTERRUPTED_HINT}", err=True)
        raise
