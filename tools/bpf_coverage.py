#!/usr/bin/python3
"""Which branches of datapath/bpf the BPF tests take, and which none does.

    tools/bpf_coverage.py [--keep DIRECTORY] [pytest arguments]

Runs tests/bpf (or what the arguments say) on objects that count (tests/bpf/coverage.py), prints a table of the files
and each side of a condition that was not reached. What cannot be reached at all, or not at will, is in
tests/bpf/unreachable.toml with its reason.

Exit code: that of the tests; 1 when a branch is neither reached nor in that list, or is in it and was reached.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "datapath" / "bpf"
UNREACHABLE = ROOT / "tests" / "bpf" / "unreachable.toml"
VARIABLE = "MIGRATOR_BPF_COVERAGE"
SIDES = ("true", "false")


@dataclass(frozen=True, order=True)
class Branch:
    """A side of a condition. Named by function and text, so that it keeps its name when lines move."""

    file: str
    line: int
    column: int
    function: str
    condition: str
    side: str

    @property
    def name(self) -> str:
        return f"{self.function}: {self.condition}: {self.side}"


@dataclass
class File:
    counts: dict[Branch, int] = field(default_factory=lambda: defaultdict(int))
    functions: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def measure(directory: Path, arguments: list[str]) -> int:
    """Run the tests. Returns pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or ["tests/bpf"])]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {VARIABLE: str(directory)}, check=False).returncode


def export(directory: Path) -> list[dict[str, Any]]:
    """Functions of all objects as llvm-cov tells them."""
    profile = directory / "merged.profdata"
    subprocess.run(["llvm-profdata-19", "merge", *directory.glob("*.proftext"), "-o", profile], check=True)
    first, *others = sorted(directory.glob("*.described.o"))
    objects = [first, *(argument for other in others for argument in ("-object", other))]
    command = ["llvm-cov-19", "export", "-instr-profile", profile, *objects]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return list(json.loads(found.stdout)["data"][0]["functions"])


def gather(functions: list[dict[str, Any]]) -> dict[str, File]:
    """Files of the switch with the counts of their branches, summed over the objects that include them."""
    files: dict[str, File] = defaultdict(File)
    for function in functions:
        name = function["name"].split(":")[-1]
        for line, column, end_line, end_column, yes, no, number, *_ in function["branches"]:
            path = Path(function["filenames"][number])
            if SOURCES not in path.parents:
                continue
            relative = str(path.relative_to(SOURCES))
            text = condition(path, line, column, end_line, end_column)
            if not text:
                continue  # in a macro that is not ours: bpf_htons asks whether its argument is a constant
            for side, count in zip(SIDES, (yes, no), strict=True):
                files[relative].counts[Branch(relative, line, column, name, text, side)] += count
        home = Path(function["filenames"][0])
        if SOURCES in home.parents:
            files[str(home.relative_to(SOURCES))].functions[name] += function["count"]
    return files


def condition(path: Path, line: int, column: int, end_line: int, end_column: int) -> str:
    """The text of a condition in its file, on one line. LLVM lets one that ends in a macro end at the macro's name."""
    lines = path.read_text().splitlines()[line - 1 : end_line]
    rest = lines[-1][end_column - 1 :]
    lines[-1] = lines[-1][: end_column - 1]
    lines[0] = lines[0][column - 1 :]
    text = " ".join(" ".join(lines).split())
    return text + arguments_of(rest) if text and rest.startswith("(") else text


def arguments_of(rest: str) -> str:
    """The parenthesis that `rest` begins with."""
    depth = 0
    for index, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[: index + 1]
    return rest


@dataclass(frozen=True)
class Excuse:
    """Why a branch need not be reached. `sometimes`: chance reaches it, as when two CPUs meet."""

    why: str
    sometimes: bool


def unreachable() -> dict[str, Excuse]:
    """By the name of a branch."""
    groups = tomllib.loads(UNREACHABLE.read_text())["unreachable"]
    return {name: Excuse(group["why"], group.get("sometimes", False)) for group in groups for name in group["branches"]}


def report(files: dict[str, File], excused: dict[str, Excuse]) -> int:
    """Print the table and what is missing. Returns the exit code."""
    total, missing = [0, 0, 0], []
    print(f"{'file':24} {'functions':>12} {'branches':>9} {'reached':>8} {'cannot':>7} {'missing':>8}")
    for name, file in sorted(files.items()):
        left = [branch for branch, count in file.counts.items() if not count]
        lacking = [branch for branch in left if branch.name not in excused]
        row = [len(file.counts), len(file.counts) - len(left), len(left) - len(lacking)]
        run = sum(1 for count in file.functions.values() if count)
        print(f"{name:24} {run:>5} of {len(file.functions):>3} {row[0]:>9} {row[1]:>8} {row[2]:>7} {len(lacking):>8}")
        total = [a + b for a, b in zip(total, row, strict=True)]
        missing += lacking
    print(f"{'all':24} {'':12} {total[0]:>9} {total[1]:>8} {total[2]:>7} {len(missing):>8}")
    for branch in sorted(missing):
        print(f"not reached: {branch.file}:{branch.line}: {branch.name}")
    stale = list(outdated(files, excused))
    print(*stale, sep="\n", end="\n" if stale else "")
    return 1 if missing or stale else 0


def outdated(files: dict[str, File], excused: dict[str, Excuse]) -> Iterator[str]:
    """What is wrong with the list itself."""
    counts: dict[str, list[int]] = defaultdict(list)
    for file in files.values():
        for branch, count in file.counts.items():
            counts[branch.name].append(count)
    for name, excuse in excused.items():
        if name not in counts:
            yield f"not in the source: {name}"
        elif all(counts[name]) and not excuse.sometimes:
            yield f"reached all the same: {name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--keep", type=Path, metavar="DIRECTORY", help="leave counts there, to look at with llvm-cov-19"
    )
    known, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = (known.keep or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        result = measure(directory, arguments)
        return report(gather(export(directory)), unreachable()) or result


if __name__ == "__main__":
    sys.exit(main())
