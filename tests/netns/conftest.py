# SPDX-License-Identifier: GPL-2.0-only
"""Tests with network namespaces: a cluster of real daemons, shared as long as each test leaves it as it found it."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from .driver_lab import shelf
from .world import ClusterBox, World


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root for network namespaces"))


@pytest.fixture(scope="session")
def cluster_box() -> Iterator[ClusterBox]:
    box = ClusterBox()
    yield box
    box.close()


@pytest.fixture(scope="session", autouse=True)
def hosts_of_drivers() -> Iterator[None]:
    """What stands ready between tests ends with the session."""
    yield
    shelf.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """On failure the report shows what the daemons wrote."""
    report = yield
    world = getattr(item, "funcargs", {}).get("world")
    if report.failed and isinstance(world, World):
        world.failed = True
        report.sections.append(("daemons", world.logs()))
    return report


@pytest.fixture
def world(cluster_box: ClusterBox) -> Iterator[World]:
    """Three hosts with agents; whatever the test makes is removed, and the hosts must look as if it never was."""
    made = World(cluster_box.get())
    cluster_box.dirty = True
    with made.cluster.scope():
        try:
            yield made
            if not made.failed:
                made.leave_nothing()
        finally:
            made.end()
    cluster_box.dirty = made.failed


@pytest.fixture(params=["there", "there and back"])
def route(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Hosts that the VM, at h1, moves to: h2; or h2 and back within two seconds."""
    return ("h2",) if request.param == "there" else ("h2", "h1")
