# SPDX-License-Identifier: GPL-2.0-only
"""The demonstration's result as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from migrator.lab.demo import Move

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
    ("checkpoint", lambda m: f"{m.checkpoint_entries_per_s / 1e6:.2f} M entries/s"),
    ("restore", lambda m: f"{m.restore_entries_per_s / 1e6:.2f} M entries/s"),
)


def show(console: Console, without: Move, with_state: Sequence[Move]) -> None:
    """Print one column a move."""
    moves = [without, *with_state]
    table = Table(title="One VM, moved under traffic", title_justify="left")
    table.add_column("")
    table.add_column(f"without state\n{without.source} → {without.destination}", justify="right")
    for move in with_state:
        table.add_column(f"with state\n{move.source} → {move.destination}", justify="right")
    for name, value in ROWS:
        table.add_row(name, *(value(move) for move in moves))
    table.add_section()
    for part in sorted({part for move in with_state for part in move.times_ms}):
        table.add_row(f"  {part}", *(f"{m.times_ms[part]:.2f} ms" if part in m.times_ms else "" for m in moves))
    console.print(table)
    for move in moves:
        for warning in move.warnings:
            console.print(f"{move.source} → {move.destination}: {warning}")


def convincing(without: Move, with_state: Sequence[Move]) -> bool:
    """All is lost without state, nothing with it."""
    return without.connections_lost > 0 and all(
        m.outcome == "complete" and m.connections_lost == m.probes_lost == m.frames_duplicated == 0 for m in with_state
    )
