"""The tool that writes the crash matrix's table, and that every fault has its place in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.netns.matrix_faults import FAULTS
from tools import crash_matrix

TOOL = Path(crash_matrix.__file__)
TEXT = f"before\n{crash_matrix.BEGIN}old\n{crash_matrix.END}after\n"


def result(point: str, fault: str, outcome: str, **fields: object) -> str:
    line = {
        "point": point,
        "fault": fault,
        "outcome": outcome,
        "scenario": "plain",
        "lost": 0,
        "silence_ms": 12.4,
        **fields,
    }
    return json.dumps(line) + "\n"


def write(tmp_path: Path, text: str, *lines: str, option: str = "") -> subprocess.CompletedProcess[str]:
    results, file = tmp_path / "results", tmp_path / "page.md"
    results.write_text("".join(lines))
    file.write_text(text)
    command = [sys.executable, str(TOOL), *([option] if option else []), str(results), str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_every_fault_has_its_column() -> None:
    assert [fault for faults in crash_matrix.KINDS.values() for fault in faults] == [str(fault) for fault in FAULTS]


def test_the_table_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    done = write(
        tmp_path,
        TEXT,
        result("source.send.final", "kill-A", "aborted", lost=7),
        result("source.final", "kill-A", "aborted"),
        result("source.final", "kill-A", "complete", silence_ms=30.0),
        result("source.final", "reboot-B", "refused"),
    )
    assert done.returncode == 0, done
    written = (tmp_path / "page.md").read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert "3 cases at 2 points with 2 faults: 1 aborted, 1 complete, 1 refused." in written
    rows = [line for line in written.splitlines() if line.startswith("| source")]
    points = [row.split(" | ")[0] for row in rows]
    assert points == ["| source.final", "| source.final", "| source.send.final"], "phases come first"
    assert rows[0] == "| source.final | kill-A | plain | complete | 30 | 0 |"
    assert rows[-1] == "| source.send.final | kill-A | plain | aborted | 12 | 7 |"


def test_qemu_guests_have_a_table_of_their_own(tmp_path: Path) -> None:
    own = f"{crash_matrix.QEMU_BEGIN}old\n{crash_matrix.QEMU_END}"
    done = write(tmp_path, TEXT + own, result("hook.start", "libvirtd-A", "aborted"), option="--qemu")
    assert done.returncode == 0, done
    written = (tmp_path / "page.md").read_text()
    assert written.startswith(TEXT) and written.count("old") == 1
    assert "| hook.start | libvirtd-A | plain | aborted | 12 | 0 |" in written


def test_many_cases_make_a_grid(tmp_path: Path) -> None:
    faults = [fault for column in crash_matrix.KINDS.values() for fault in column[1:]]
    lines = [result("source.final", fault, "refused" if fault == "reboot-B" else "complete") for fault in faults]
    lines.append(result("source.final", "kill-A", "aborted", lost=7))
    assert write(tmp_path, TEXT, *lines).returncode == 0
    row = next(line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| source"))
    assert row.startswith("| source.final | a12-7 c12 c12 | · c12 c12 |") and row.endswith("| · r12 |")


@pytest.mark.parametrize("text", ["nothing", crash_matrix.BEGIN])
def test_a_page_without_a_place_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    done = write(tmp_path, text, result("source.final", "kill-A", "aborted"))
    assert done.returncode and "no place for the table" in done.stderr
    assert (tmp_path / "page.md").read_text() == text


def test_of_many_cases_there_is_a_row_a_fault(tmp_path: Path) -> None:
    """Too many for a row each, too few for a row a point."""
    cells = [(f"source.p{n}", "kill-A" if n % 2 else "reboot-B") for n in range(crash_matrix.LISTED + 1)]
    lines = [
        result(point, fault, "aborted" if fault == "kill-A" else "degraded", lost=n // 100)
        for n, (point, fault) in enumerate(cells)
    ]
    assert write(tmp_path, TEXT, *lines).returncode == 0
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith(("| kill", "| reboot"))]
    assert rows == ["| kill | 50 | 0 | 0 | 50 | 0 | 0 | 0 | 12 |", "| reboot | 51 | 0 | 51 | 0 | 0 | 1 | 1 | 12 |"]
