"""`make bench`: run all benchmarks, or the named ones; print medians and spreads, write bench/results/.

NAME.json has the figures with the machine's description, NAME-*.svg the charts that the documents show. With --quick
both go to .cache/bench: a smaller workload is not to be taken for a result.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from bench import machine
from bench.figures import Figures, Unverified

NAMES = ("tables", "among", "programs", "switchover", "forwarding", "host", "qemu", "cluster", "watch")
RESULTS = Path(__file__).parent / "results"
QUICK = Path(__file__).parent.parent / ".cache" / "bench"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="*", choices=[[], *NAMES], metavar="name", help=f"of {', '.join(NAMES)}; or all")
    parser.add_argument("--quick", action="store_true", help="smaller workloads, fewer repetitions")
    arguments = parser.parse_args()
    if os.geteuid():
        parser.error("needs root: the benchmarks load BPF programs into namespaces of their own")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made goes at the end of its block
    console = Console(width=140)
    failed = 0
    for name in arguments.name or NAMES:
        try:
            run(name, arguments.quick, console)
        except Unverified as error:
            failed = 1
            console.print(f"{name}: no figures, its workload was not what it should be: {error}", style="red")
    return failed


def run(name: str, quick: bool, console: Console) -> None:
    """Measure, print and write one benchmark. Raises Unverified."""
    busy, began = machine.busy(), time.monotonic()
    figures: Figures = importlib.import_module(f"bench.{name}").measure(quick=quick)
    lasted = time.monotonic() - began
    console.print(figures.table(f"{name}, {lasted:.0f} s"))
    for note in figures.notes:
        console.print(f"  {note}")
    result = {
        "benchmark": name,
        "quick": quick,
        "lasted_s": round(lasted),
        "busy_before": busy,
        "machine": machine.describe(),
        **figures.as_data(),
    }
    folder = QUICK if quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for chart, drawn in figures.charts.items():
        (folder / f"{name}-{chart}.svg").write_text(drawn.svg())


if __name__ == "__main__":
    sys.exit(main())
