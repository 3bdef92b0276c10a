# SPDX-License-Identifier: GPL-2.0-only
"""docs/performance.md is filled from what the benchmarks wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import performance

MACHINE = {"date": "2026-01-02 03:04", "revision": "abc", "cpus": 2, "cpu": "CPU", "virtual": True, "kernel": "6.18"}
PAGE = """before
<!-- figures: one -->
old
<!-- end of figures -->
between
<!-- figures: two -->
kept
<!-- end of figures -->
"""


def result(**changes: Any) -> dict[str, Any]:
    figures = [
        {"name": "a", "unit": "ns", "n": 2, "median": 1234.5, "values": [1000.0, 1469.0]},
        {
            "name": "b",
            "unit": "x",
            "n": 1,
            "median": 0.6,
            "values": [0.6],
            "budget": "<0.5",
            "budget_p99": "",
            "met": False,
        },
        {
            "name": "c",
            "unit": "ms",
            "n": 200,
            "median": 2.0,
            "p99": 9.0,
            "quantiles": {"0": 1.0, "50": 2.0, "100": 11.0},
            "budget": "<5",
            "budget_p99": "<15",
            "met": True,
        },
    ]
    plain = {"quick": False, "busy_before": 0.1, "lasted_s": 7, "machine": MACHINE, "figures": figures, "notes": ["so"]}
    return {**plain, **changes}


def test_a_page_is_filled_and_the_rest_kept(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(result()))
    (tmp_path / "one-times.svg").write_text("<svg/>")
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    for _ in range(2):  # again: nothing is added
        performance.main([str(tmp_path), str(page)])
    text = page.read_text()
    assert "old" not in text and "kept" in text and text.startswith("before\n") and "between" in text
    assert "| a | 1,234 | 1,000 | 1,469 | 2 | ns |  |" in text
    assert "| b | 0.6 | 0.6 | 0.6 | 1 | x | &lt;0.5 **missed** |" in text
    assert "| c | 2 | 1 | 11 | 200 | ms | &lt;5, p99 &lt;15 (9) met |" in text
    assert text.count("![one-times](page/one-times.svg)") == 1 and (tmp_path / "page" / "one-times.svg").exists()
    assert "beside other work" not in text and "quick" not in text


@pytest.mark.parametrize(
    "change, said", [({"quick": True}, "a quick run"), ({"busy_before": 1.5}, "beside other work (1.5 CPUs)")]
)
def test_figures_that_are_no_result_say_so(change: dict[str, Any], said: str) -> None:
    assert said in performance.section(result(**change), [])


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("nothing\n")
    with pytest.raises(SystemExit, match="no place"):
        performance.main([str(tmp_path), str(tmp_path / "page.md")])
