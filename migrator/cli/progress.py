"""Shows a migration while it runs, memory of the guest and network state as one."""

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
from migrator.cli.report import IN_DOUBT, memory_now, numbers, print_report
from migrator.errors import OUTCOMES, PeerLost, exit_code
from migrator.table import plain, print_json


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
    try:
        for report in reports:
            last = report
            if first or report.phase == IN_DOUBT:
                break
    except KeyboardInterrupt:
        if last is not None and not last.done:
            watch, end = f"migrator migration show {last.id} --follow", f"migrator migration abort {last.id}"
            click.echo(f"migrator: the migration goes on: `{watch}` shows it, `{end}` ends it", err=True)
        raise
    return last


def code_of(report: pb.Migration) -> int:
    """Exit code of an ended migration."""
    return OUTCOMES.get(report.outcome, exit_code(Exception()))


def _silent(reports: Iterable[pb.Migration]) -> Iterable[pb.Migration]:
    return reports


def _lines(reports: Iterable[pb.Migration]) -> Iterable[pb.Migration]:
    """A line whenever the phase changes, or the pass over the guest's memory."""
    shown = None
    for report in reports:
        state = (report.phase, report.memory.get("passes"))
        if state != shown:
            shown = state
            click.echo(f"{report.phase}: {'; '.join(filter(None, (memory_now(report), numbers(report))))}")
        yield report


def _live(reports: Iterable[pb.Migration]) -> Iterable[pb.Migration]:
    """Two lines that change in place."""
    begun = time.monotonic()
    with Live(console=Console(), refresh_per_second=10, transient=True) as live:
        for report in reports:
            grid = Table.grid(padding=(0, 2))
            grid.add_row(f"[bold]{report.phase}[/]", "state", numbers(report), f"{time.monotonic() - begun:.1f} s")
            if report.memory:
                grid.add_row("", "memory", memory_now(report), "")
            live.update(grid)
            yield report
