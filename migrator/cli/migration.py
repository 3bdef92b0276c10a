"""`migrator migration`: migrations that run and that ended."""

from __future__ import annotations

import time

import click

from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Context, Group, complete, pass_context
from migrator.cli.progress import code_of, follow
from migrator.cli.report import hint_at_doubt, print_report
from migrator.errors import MigrationNotFound
from migrator.table import plain, print_json, print_table


@click.group(cls=Group)
def migration() -> None:
    """Migrations: those that run and the reports of the last thousand."""


@migration.command("list")
@click.option("--running", is_flag=True, help="Only those without an outcome.")
@pass_context
def list_(context: Context, running: bool) -> None:
    """All migrations that are known, oldest first."""
    reports = [m for m in context.coordinator.Migrations(pb.Empty()).migrations if not (running and m.done)]
    if context.json:
        print_json([plain(report) for report in reports])
        return
    columns = ("MIGRATION", "VM", "FROM", "TO", "PHASE", "OUTCOME", "ENTRIES", "STARTED", "REASON")
    print_table(columns, [_row(report) for report in reports])
    hint_at_doubt(reports)


def _row(m: pb.Migration) -> tuple[object, ...]:
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(m.started_at))
    return m.id, m.vm, m.source, m.destination, m.phase, m.outcome, m.entries, started, m.reason


@migration.command()
@click.argument("word", metavar="ID")
@click.option("--follow", "follow_", is_flag=True, help="Until its end; the exit code tells the outcome.")
@pass_context
def show(context: Context, word: str, follow_: bool) -> int:
    """One migration's report. ID may be the beginning of one."""
    report = _find(context, word)
    if follow_:
        return follow(context, context.coordinator.Follow(pb.MigrationRef(id=report.id), timeout=None))
    (print_json(plain(report)) if context.json else print_report(report))
    return 0


def _find(context: Context, word: str) -> pb.Migration:
    """The newest migration whose id begins with `word`. Raises MigrationNotFound when none or several do."""
    found: list[pb.Migration] = [
        m for m in context.coordinator.Migrations(pb.Empty()).migrations if m.id.startswith(word)
    ]
    if len(found) != 1:
        raise MigrationNotFound(
            f"{len(found) or 'no'} migrations begin with {word!r}", hint="`migrator migration list`"
        )
    return found.pop()


@migration.command()
@click.argument("word", metavar="ID")
@pass_context
def abort(context: Context, word: str) -> int:
    """Ask for the end of a migration. Once the guest runs at the destination there is nothing to abort."""
    found = _find(context, word)
    context.coordinator.Abort(pb.MigrationRef(id=found.id))
    for report in context.coordinator.Follow(pb.MigrationRef(id=found.id), timeout=None):
        found = report
    (print_json(plain(found)) if context.json else print_report(found))
    return 0 if found.outcome == "aborted" else code_of(found)


@migration.command()
@click.argument("word", metavar="ID")
@click.option(
    "--guest-at", required=True, metavar="HOST", shell_complete=complete("host"), help="Where the guest runs."
)
@pass_context
def resolve(context: Context, word: str, guest_at: str) -> None:
    """Say where the guest is, when a migration is in doubt and nobody else can know."""
    found = _find(context, word)
    report = context.coordinator.Resolve(pb.ResolveRequest(id=found.id, guest_at=guest_at))
    (print_json(plain(report)) if context.json else print_report(report))
