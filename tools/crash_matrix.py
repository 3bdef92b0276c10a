#!/usr/bin/env python3
"""Writes the table of the crash matrix into docs/reliability.md, out of what tests/netns/test_matrix.py wrote down.

tools/crash_matrix.py [--qemu] RESULTS [FILE]    --qemu: of tests/libvirt/test_matrix.py

RESULTS: lines of JSON, one a case; of two of one case the later counts
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

BEGIN, END = "<!-- crash matrix: written by tools/crash_matrix.py -->\n", "<!-- end of the crash matrix -->\n"
QEMU_BEGIN = "<!-- crash matrix of QEMU guests: written by tools/crash_matrix.py -->\n"
QEMU_END = "<!-- end of the crash matrix of QEMU guests -->\n"
KINDS = {
    "kill": ("kill-A", "kill-B", "kill-C"),
    "kill two": ("kill-AB", "kill-AC", "kill-BC"),
    "freeze": ("freeze-A", "freeze-B", "freeze-C"),
    "cut": ("cut-AB", "cut-CA", "cut-CB"),
    "stall": ("stall-AB", "stall-CA", "stall-CB"),
    "half-close": ("half-AB", "half-CA", "half-CB"),
    "delay": ("delay-AB", "delay-CA", "delay-CB"),
    "throttle": ("throttle-AB", "throttle-CA", "throttle-CB"),
    "corrupt": ("corrupt-AB", "corrupt-CA", "corrupt-CB"),
    "disk full": ("full-A", "full-B", "full-C"),
    "memory": ("starve-A", "starve-B", "starve-C"),
    "reboot": ("reboot-A", "reboot-B"),
}
"""Column -> its faults, in the order in which a cell names them."""
LETTERS = {"complete": "c", "degraded": "d", "aborted": "a", "refused": "r"}
NONE = "·"
FILLED = 0.25  # of the cells, at least, for a row a point
LISTED = 100  # cases, at most, for a row a case


def main(arguments: list[str]) -> int:
    qemu = arguments[0] == "--qemu"
    arguments = arguments[1:] if qemu else arguments
    start, stop = (QEMU_BEGIN, QEMU_END) if qemu else (BEGIN, END)
    results: dict[tuple[str, str], dict[str, object]] = {}
    for line in Path(arguments[0]).read_text().splitlines():
        result = json.loads(line)
        results[result["point"], result["fault"]] = result
    file = Path(arguments[1] if len(arguments) > 1 else "docs/reliability.md")
    before, _, rest = file.read_text().partition(start)
    _, end, after = rest.partition(stop)
    if not end:
        raise SystemExit(f"{file} has no place for the table, between {start.strip()} and {stop.strip()}")
    file.write_text(before + start + "\n" + table(results) + "\n" + stop + after)
    return 0


def table(results: dict[tuple[str, str], dict[str, object]]) -> str:
    """The summary, then a row a point; where most cells would be empty a row a case, or of many cases a row a fault."""
    outcomes = Counter(str(result["outcome"]) for result in results.values())
    points = list(dict.fromkeys(point for point, _ in results))
    faults = {fault for _, fault in results}
    said = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    head = f"{len(results):,} cases at {len(points)} points with {len(faults)} faults: {said}.\n"
    points = sorted(points, key=_order(points))
    sparse = len(results) < len(points) * sum(map(len, KINDS.values())) * FILLED
    brief = _faults(results) if len(results) > LISTED else _cases(results, points)
    return head + "\n" + "\n".join(brief if sparse else _grid(results, points)) + "\n"


def _faults(results: dict[tuple[str, str], dict[str, object]]) -> list[str]:
    lines = [
        "| fault | cases | " + " | ".join(LETTERS) + " | cases that lost some | most lost | longest silence, ms |",
        "|---|" + "---:|" * (len(LETTERS) + 4),
    ]
    for kind, faults in KINDS.items():
        of_kind = [result for (_, fault), result in results.items() if fault in faults]
        if of_kind:
            outcomes = [sum(result["outcome"] == name for result in of_kind) for name in LETTERS]
            lost = [int(str(result["lost"])) for result in of_kind]
            silence = max(float(str(result["silence_ms"])) for result in of_kind)
            numbers = [len(of_kind), *outcomes, sum(map(bool, lost)), max(lost), f"{silence:.0f}"]
            lines.append(f"| {kind} | " + " | ".join(map(str, numbers)) + " |")
    return lines


def _grid(results: dict[tuple[str, str], dict[str, object]], points: list[str]) -> list[str]:
    lines = ["| point | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 1) + "|"]
    for point in points:
        cells = [" ".join(_cell(results.get((point, fault))) for fault in faults) for faults in KINDS.values()]
        lines.append(f"| {point} | " + " | ".join(cells) + " |")
    return lines


def _cases(results: dict[tuple[str, str], dict[str, object]], points: list[str]) -> list[str]:
    lines = ["| point | fault | move | outcome | silence, ms | lost |", "|---|---|---|---|---|---|"]
    for point, fault in sorted(results, key=lambda one: points.index(one[0])):
        one = results[point, fault]
        silence = float(str(one["silence_ms"]))
        lines.append(f"| {point} | {fault} | {one['scenario']} | {one['outcome']} | {silence:.0f} | {one['lost']} |")
    return lines


def _order(points: list[str]):  # type: ignore[no-untyped-def]
    """Phases first, then messages, each as they were run."""
    return lambda point: (point.count(".") > 1, points.index(point))


def _cell(result: dict[str, object] | None) -> str:
    if result is None:
        return NONE
    lost = f"-{result['lost']}" if result["lost"] else ""
    return f"{LETTERS[str(result['outcome'])]}{float(str(result['silence_ms'])):.0f}{lost}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
