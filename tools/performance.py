#!/usr/bin/env python3
"""Writes what `make bench` measured into docs/performance.md: a table and the charts of each benchmark.

tools/performance.py [RESULTS] [FILE]    RESULTS: a folder of NAME.json and NAME-*.svg, bench/results if not named

Between `<!-- figures: NAME -->` and `<!-- end of figures -->` stands what NAME.json says; a benchmark that has no file
keeps what stood there. Charts go to the folder beside FILE that has its name.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

PLACE = re.compile(r"(<!-- figures: ([a-z]+) -->\n).*?(<!-- end of figures -->\n)", re.DOTALL)
QUIET = 0.3
"""CPUs that others used just before a benchmark, up to which the machine counts as quiet."""


def main(arguments: list[str]) -> int:
    results = Path(arguments[0] if arguments else "bench/results")
    file = Path(arguments[1] if len(arguments) > 1 else "docs/performance.md")
    charts = file.with_suffix("")

    def filled(place: re.Match[str]) -> str:
        before, name, after = place.groups()
        found = results / f"{name}.json"
        if not found.exists():
            return place.group()
        return before + "\n" + section(json.loads(found.read_text()), _charts(results, name, charts)) + "\n" + after

    text, count = PLACE.subn(filled, file.read_text())
    if not count:
        raise SystemExit(f"{file} has no place for figures, between <!-- figures: NAME --> and <!-- end of figures -->")
    file.write_text(text)
    return 0


def _charts(results: Path, name: str, folder: Path) -> list[str]:
    """Copies a benchmark's charts; as the page refers to them."""
    made = []
    for chart in sorted(results.glob(f"{name}-*.svg")):
        folder.mkdir(exist_ok=True)
        shutil.copyfile(chart, folder / chart.name)
        made.append(f"![{chart.stem}]({folder.name}/{chart.name})\n")
    return made


def section(result: dict[str, Any], charts: list[str]) -> str:
    """Where and when, the table, what must be known of it, the charts."""
    lines = ["| figure | median | least | most | n | unit | budget |", "|---|---:|---:|---:|---:|---|---|"]
    lines += [_row(figure) for figure in result["figures"]]
    notes = "".join(f"\n{note}\n" for note in result["notes"])
    return f"{_head(result)}\n" + "\n".join(lines) + "\n" + notes + "".join(f"\n{chart}" for chart in charts)


def _head(result: dict[str, Any]) -> str:
    machine, busy = result["machine"], result["busy_before"]
    marks = ["**a quick run: smaller workloads, few rounds**"] if result["quick"] else []
    marks += [f"**beside other work ({busy} CPUs): read ratios, not times**"] if busy > QUIET else []
    return (
        ", ".join(
            [
                f"{machine['date']}, revision {machine['revision']}",
                f"{machine['cpus']} CPUs {machine['cpu']}{', virtual' if machine['virtual'] else ''}",
                f"Linux {machine['kernel']}",
                f"{result['lasted_s']} s",
                *marks,
            ]
        )
        + ".\n"
    )


def _row(figure: dict[str, Any]) -> str:
    spread = figure.get("values") or list(figure["quantiles"].values())
    numbers = [number(value) for value in (figure["median"], min(spread), max(spread))]
    return f"| {figure['name']} | {' | '.join(numbers)} | {figure['n']} | {figure['unit']} | {_budget(figure)} |"


def _budget(figure: dict[str, Any]) -> str:
    if "met" not in figure:
        return ""
    asked = [figure["budget"]] if figure["budget"] else []
    asked += (
        [f"p99 {figure['budget_p99']} ({number(figure['p99'])})"] if figure["budget_p99"] and "p99" in figure else []
    )
    return f"{', '.join(asked).replace('<', '&lt;').replace('>', '&gt;')} {'met' if figure['met'] else '**missed**'}"


def number(value: float) -> str:
    """To four digits that count."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
