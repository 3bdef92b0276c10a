"""Shows a migration while it runs, and its report when it has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from migrator._pb import migrator_pb2 as pb
from migrator.cli.context import Context
from migrator.errors import OUTCOMES, PeerLost, exit_code
from migrator.table import plain, print_fields, print_json, print_table, size

IN_DOUBT = "in-doubt"


def follow(context: Context, reports: Iterable[pb.Migration], *, detach: bool = False) -> int:
    """Show reports until the last one; returns the exit code of its outcome."""
    shown = _silent if context.json or detach else _live if sys.stdout.isatty() else _lines
    last = _last(shown(reports), first=detach)
    if last is None:
        raise PeerLost("the coordinator ended the stream without a report", hint="`migrator migration list`")
    if context.json:
        print_json(plain(last))
    elif detach:
        click.echo(last.id)
    else:
        print_report(last)
    if detach:
        return 0
    if last.phase == IN_DOUBT:
        return OUTCOMES[IN_DOUBT]
    if not last.done:
        raise PeerLost(
            f"the coordinator is gone; migration {last.id} goes on by itself", hint="`migrator migration show`"
        )
    return code_of(last)


def _last(reports: Iterable[pb.Migration], *, first: bool) -> pb.Migration | None:
    """The last of the reports, or the first. What is in doubt is not waited for: it may last."""
    last = None
    for report in reports:
        last = report
        if first or report.phase == IN_DOUBT:
            break
    return last


def code_of(report: pb.Migration) -> int:
    """Exit code of an ended migration."""
    return OUTCOMES.get(report.outcome, exit_code(Exception()))


def _silent(reports: Iterable[pb.Migration]) -> Iterable[pb.Migration]:
    return reports


def _lines(reports: Iterable[pb.Migration]) -> Iterable[pb.Migration]:
    """A line whenever the phase changes."""
    phase = ""
    for report in reports:
        if report.phase != phase:
            phase = report.phase
            click.echo(f"{phase}: {numbers(report)}")
        yield report


def _live(reports: Iterable[pb.Migration]) -> Iterable[pb.Migration]:
    """One line that changes in place."""
    begun = time.monotonic()
    with Live(console=Console(), refresh_per_second=10, transient=True) as live:
        for report in reports:
            row = Table.grid(padding=(0, 2))
            row.add_row(f"[bold]{report.phase}[/]", numbers(report), f"{time.monotonic() - begun:.1f} s")
            live.update(row)
            yield report


def numbers(report: pb.Migration) -> str:
    rate = f", {report.rate:,.0f}/s" if report.rate else ""
    return f"round {report.rounds}, {report.entries:,} entries, {size(report.bytes)}{rate}"


def print_report(report: pb.Migration) -> None:
    """The whole report for people."""
    print_fields(
        {
            "migration": report.id,
            "vm": report.vm,
            "from": report.source,
            "to": report.destination,
            "phase": report.phase,
            "outcome": report.outcome,
            "reason": report.reason,
            "epoch": report.epoch,
            "copied": numbers(report),
            "stopped by": ("agent" if report.leading else "guest or hypervisor") if report.outcome else "",
            "frames": dict(sorted(report.frames.items())),
        }
    )
    for title, values in (
        ("MOVED", {kind: f"{count:,}" for kind, count in sorted(report.moved.items())}),
        ("NOT MOVED", {what: f"{count:,}" for what, count in sorted(report.not_moved.items())}),
        ("TIME", {name: f"{ms:,.2f} ms" for name, ms in report.times_ms.items()}),
    ):
        if values:
            click.echo()
            print_table((title, ""), values.items())
    for warning in report.warnings:
        click.echo(f"migrator: warning: {warning}", err=True)
    hint_at_doubt([report])


def hint_at_doubt(reports: Iterable[pb.Migration]) -> None:
    """Say what can be done about each migration that waits for a word of where its guest is."""
    for report in reports:
        if report.phase == IN_DOUBT:
            hosts = f"{report.source}|{report.destination}"
            resolve = f"migrator migration resolve {report.id} --guest-at {hosts}"
            click.echo(f"migrator: hint: look where VM {report.vm} runs, then `{resolve}`", err=True)
