# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures of the BPF_PROG_RUN tests: the object is compiled once a session and loaded anew for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .harness import Switch, compile_object
from .model import BPF_SOURCES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root for bpf(2)"))


@pytest.fixture(scope="session")
def switch_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_object(BPF_SOURCES / "switch.bpf.c", tmp_path_factory.mktemp("bpf") / "switch.bpf.o")


@pytest.fixture
def switch(switch_object: Path) -> Iterator[Switch]:
    with Switch(switch_object) as loaded:
        yield loaded
