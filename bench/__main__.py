"""`make bench`: run all benchmarks, or the named ones; print medians and spreads, write bench/results/NAME.json."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path

from rich.console import Console

from bench.figures import Figures

NAMES = ("tables", "programs", "cluster", "watch")
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="*", help="all when none is named")
    parser.add_argument("--quick", action="store_true", help="smaller workloads, fewer repetitions")
    arguments = parser.parse_args()
    if os.geteuid():
        parser.error("needs root: the benchmarks load BPF programs into namespaces of their own")
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.name or NAMES:
        began = time.monotonic()
        figures: Figures = importlib.import_module(f"bench.{name}").measure(quick=arguments.quick)
        Console(width=132).print(figures.table(f"{name}, {time.monotonic() - began:.0f} s"))
        result = {"benchmark": name, "machine": machine(), "figures": figures.as_data()}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
