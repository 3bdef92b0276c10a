"""`migrator demo`: two hosts, a VM under traffic, moved without its state and with it."""

from __future__ import annotations

from pathlib import Path

import click

from migrator.cli.context import Command, Context, pass_context


@click.command(cls=Command)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it into this SVG file.")
@pass_context
def demo(context: Context, plot: Path | None) -> int:
    """Show on real traffic what is lost without the state and kept with it. Needs root; leaves nothing behind."""
    from migrator.lab import demo as lab

    return int(lab.main(json=context.json, plot=plot) or 0)
