# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures of the BPF tests: the object is compiled and loaded once a session, its maps are emptied after each test."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .harness import Switch, compile_object
from .lab import Lab
from .model import BPF_SOURCES
from .probe import Probe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root for bpf(2)"))


@pytest.fixture(scope="session")
def switch_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_object(BPF_SOURCES / "switch.bpf.c", tmp_path_factory.mktemp("bpf") / "switch.bpf.o")


@pytest.fixture(scope="session")
def loaded_switch(switch_object: Path) -> Iterator[Switch]:
    with Switch(switch_object) as loaded:
        yield loaded


@pytest.fixture
def switch(loaded_switch: Switch) -> Iterator[Switch]:
    yield loaded_switch
    loaded_switch.reset()


@pytest.fixture
def lab(switch: Switch) -> Iterator[Lab]:
    with Lab(switch) as made:
        yield made


@pytest.fixture(scope="session")
def loaded_probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Switch]:
    source = Path(__file__).with_name("ct_probe.bpf.c")
    with Switch(compile_object(source, tmp_path_factory.mktemp("bpf") / "ct_probe.bpf.o")) as loaded:
        yield loaded


@pytest.fixture
def ports(loaded_probe: Switch) -> Iterator[Callable[..., Probe]]:
    """Makes ports on ct_probe.bpf.c: ports(rules, flags=..., limit=...). Each has a slot of its own."""
    yield functools.partial(Probe, loaded_probe)
    loaded_probe.unlink()
