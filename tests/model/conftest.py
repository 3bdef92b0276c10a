"""`--model=full`: the larger budgets, which take hours of CPU together; `make model` has them."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--model", choices=("small", "full"), default="small", help="budgets of the exhaustive model")
