# SPDX-License-Identifier: GPL-2.0-only
"""The demonstration's result as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from migrator.lab.demo import Move, Rates

Row = tuple[str, "Callable[[Move], str]"]

ROWS: Sequence[Row] = (
    ("connections lost", lambda m: f"{m.connections_lost:,} of {m.connections_total:,}"),
    ("bytes verified", lambda m: f"{m.bytes_verified:,}"),
    ("probes lost", lambda m: f"{m.probes_lost:,} of {m.probes_sent:,}"),
    ("frames duplicated", lambda m: f"{m.frames_duplicated:,}"),
    ("entries moved", lambda m: f"{m.entries_moved:,}"),
    ("rounds", lambda m: str(m.rounds)),
    ("switchover", lambda m: f"{m.switchover_ms:.1f} ms"),
    ("snapshot", lambda m: f"{m.snapshot_bytes / 1e6:.2f} MB"),
)
PARTS = ("held", "drained", "committed", "resumed", "open")


def show(console: Console, without: Move, with_state: Sequence[Move], rates: Rates) -> None:
    """Print one column a move."""
    moves = [without, *with_state]
    table = Table(title="One VM, moved under traffic", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column(f"without state\n{without.source} → {without.destination}", justify="right")
    for move in with_state:
        table.add_column(f"with state\n{move.source} → {move.destination}", justify="right")
    for name, value in ROWS:
        table.add_row(name, *(value(move) for move in moves))
        if name == "switchover":
            for part in PARTS:
                table.add_row(f"  {part}", *(f"{m.parts_ms[part]:.1f} ms" for m in moves), style="dim")
    console.print(table)
    console.print(
        f"{rates.entries:,} entries: checkpoint {rates.checkpoint_entries_per_s:,.0f} a second, "
        f"restore {rates.restore_entries_per_s:,.0f} a second"
    )
    for move in moves:
        for warning in move.warnings:
            console.print(f"{move.source} → {move.destination}: {warning}")


def convincing(without: Move, with_state: Sequence[Move]) -> bool:
    """All is lost without state, nothing with it."""
    return without.connections_lost > 0 and all(
        m.outcome == "complete" and m.connections_lost == m.probes_lost == m.frames_duplicated == 0 for m in with_state
    )
