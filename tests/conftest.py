# SPDX-License-Identifier: GPL-2.0-only
"""Tests with the mark `alone` can be left out of a run, or be the only ones in it: see tools/run_tests.py."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--alone", choices=("no", "only"), help="leave out the tests that need the machine for themselves, or the rest"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--alone")
    if wanted:
        chosen = [item for item in items if (item.get_closest_marker("alone") is not None) == (wanted == "only")]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen
